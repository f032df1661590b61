"""The catalogue of expansions, complete: importing this imports every family."""

from __future__ import annotations

from dualform.functions import attribute_products, bumps, densities, patches, pointwise, polynomials, wavelets
from dualform.functions.basis import Expansion, expansions

# Importing them fills the catalogue.
families = (pointwise, attribute_products, polynomials, bumps, densities, wavelets, patches)

__all__ = ["Expansion", "expansions", "families"]

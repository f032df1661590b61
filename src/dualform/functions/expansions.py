"""The catalogue of expansions, complete: importing this imports every family."""

from __future__ import annotations

from dualform.functions import bumps, densities, patches, pointwise, polynomials, products, wavelets
from dualform.functions.basis import Expansion, expansions

families = (pointwise, products, polynomials, bumps, densities, wavelets, patches)  # importing them fills the catalogue

__all__ = ["Expansion", "expansions", "families"]

"""The catalogue of expansions, complete: importing this imports every family."""

from __future__ import annotations

from dualform.functions import bumps, pointwise, polynomials, products
from dualform.functions.basis import Expansion, expansions

families = (pointwise, polynomials, bumps, products)  # importing them has filled the catalogue

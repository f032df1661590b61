"""Features of several attributes: tensor powers (Taylor) and subsets (combinatorial). Legend: m attributes, d degree, r subset size."""

from __future__ import annotations

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, expansions, positive
from dualform.functions.pointwise import identity


@expansions.record(
    name="taylor",
    aliases=("taylor_expansion",),
    formula="[x, x (x) x, .., x^(x)d]; symmetric: each monomial once",
    source="Zhang 2024 (RPN 1), section 5",
    domain="all reals; grows as x^d",
)
def taylor(degree: int = 2, symmetric: bool = False) -> Expansion:
    """Expand the attributes in their products of up to `degree` factors.

    kappa(x) = [x, x (x) x, ..]: all m^r products of r factors, the first slowest; symmetric keeps the C(m + r - 1, r) distinct ones
    Shape:  (..., m) -> (..., D), D = sum_r m^r, or C(m + d, d) - 1 if symmetric.
    Raises: ShapeError for degree < 1 and, when called, for a row of more than 1e8 features.
    """
    positive("taylor", "degree", degree)
    edge = 10.0 ** (30.0 / degree)
    return Expansion(
        "taylor",
        lambda x: x,
        lambda m: m,
        "C(m + d, d) - 1" if symmetric else "m + m^2 + .. + m^d",
        degrees=tuple(range(1, int(degree) + 1)),
        symmetric=symmetric,
        reach=(-edge, edge),
    )

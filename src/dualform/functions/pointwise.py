"""Lists of functions of one attribute, and the maps that are no basis: identity, reciprocal, linear. Legend: x attribute, s = sigmoid(x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, Interval, attribute_wise, everywhere, expansions
from dualform.shapes import fail


def pointwise(
    name: str,
    functions: Sequence[Callable[[Tensor], Tensor]],
    terms: Sequence[str],
    domain: Interval,
    reach: Interval = everywhere,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
) -> Expansion:
    """Make the expansion [f_1(p), .., f_k(p)], p = prepare(x), of every attribute, function by function."""

    def basis(x: Tensor, axis: int) -> Tensor:
        p = prepare(x)
        return torch.stack([f(p) for f in functions], axis)

    return attribute_wise(name, basis, terms, layout="function", domain=domain, reach=reach)


@expansions.record(
    name="identity",
    aliases=("identity_expansion",),
    formula="x",
    source="Zhang 2024 (RPN 1), section 5",
    domain="all reals",
)
def identity() -> Expansion:
    """Keep the attributes as they are."""
    return Expansion(
        "identity", lambda x: x, lambda m: m, "m", layout="attribute", basis=lambda x, axis: x.unsqueeze(axis), terms=("x",), degree=1,
    )  # fmt: skip


@expansions.record(
    name="reciprocal",
    aliases=("reciprocal_expansion",),
    formula="1 / x, |x| <= 1e-6 taken as 1e-6 with x's sign (0 is positive)",
    source="Zhang 2024 (RPN 1), section 5",
    domain="all reals; constant +-1e6 on |x| <= 1e-6, where the gradient is 0",
)
def reciprocal() -> Expansion:
    """Take the reciprocal of every attribute, clamped around 0."""

    def basis(x: Tensor, axis: int) -> Tensor:
        least = torch.where(x < 0, -1e-6, 1e-6).to(x.dtype)
        return torch.where(x.abs() <= 1e-6, least, x).reciprocal().unsqueeze(axis)

    return attribute_wise("reciprocal", basis, ["1/x"], domain=(0.1, 2.0))

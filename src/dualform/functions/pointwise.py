"""Functions of one attribute; maps but no basis: identity, reciprocal, linear. Legend: x attribute, s = sigmoid(x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, Interval, attribute_wise, everywhere, expansion


def pointwise(
    name: str, words: str, functions: Sequence[Callable[[Tensor], Tensor]], terms: Sequence[str], interval: Interval,
    *, reach: Interval = everywhere, prepare: Callable[[Tensor], Tensor] = lambda x: x, **columns: Any,
) -> None:  # fmt: skip
    """Register the expansion [f_1(p), .., f_k(p)], p = prepare(x), of every attribute, function by function."""

    def basis(x: Tensor, axis: int) -> list[Tensor]:
        p = prepare(x)
        return [f(p) for f in functions]

    def build() -> Expansion:
        return attribute_wise(name, basis, terms, layout="function", domain=interval, reach=reach)

    build.__name__, build.__doc__ = name, f"Expand every {words}."
    expansion(**columns)(build)


@expansion(formula="x", source="Zhang 2024 (RPN 1), section 5", domain="all reals")
def identity() -> Expansion:
    """Keep the attributes as they are."""
    return Expansion(
        "identity", lambda x: x, lambda m: m, "m", layout="attribute", basis=lambda x, axis: x.unsqueeze(axis),
        terms=("x",), degree=1,
    )  # fmt: skip


@expansion(
    formula="1 / x, |x| <= 1e-6 taken as 1e-6 with x's sign (0 is positive)",
    source="Zhang 2024 (RPN 1), section 5",
    domain="all reals; constant +-1e6 on |x| <= 1e-6, where the gradient is 0",
)
def reciprocal() -> Expansion:
    """Take the reciprocal of every attribute, clamped around 0."""

    def basis(x: Tensor, axis: int) -> Tensor:
        least = (x.sign() + 0.5).sign() * 1e-6  # 0 counts as positive
        return torch.where(x.abs() <= 1e-6, least, x).reciprocal().unsqueeze(axis)

    return attribute_wise("reciprocal", basis, ["1/x"], domain=(0.1, 2.0))


pointwise(
    "trigonometric", "attribute in its sine, cosine and tangent", (torch.sin, torch.cos, torch.tan),
    ("sin(x)", "cos(x)", "tan(x)"), (-1.4, 1.4), reach=(-1e6, 1e6), formula="[sin x, cos x, tan x]",
    source="Zhang 2024 (RPN 1), section 5 (there in the order cos, sin, tan)",
    domain="all reals; tan has poles at pi/2 + k pi",
)  # fmt: skip
pointwise(
    "arc_trigonometric", "squashed attribute in inverse trigonometric functions; the first two sum to pi / 2",
    (lambda s: torch.asin(0.99 * s), lambda s: torch.acos(0.99 * s), torch.atan),
    ("asin(0.99/(1+exp(-x)))", "acos(0.99/(1+exp(-x)))", "atan(1/(1+exp(-x)))"), (-3.0, 3.0), prepare=torch.sigmoid,
    formula="[arcsin(0.99 s), arccos(0.99 s), arctan s], s = sigmoid(x)",
    source="Zhang 2024 (RPN 1), section 5 (there of x itself)",
    domain="all reals, through s in [0, 1]; saturates for large |x|",
)  # fmt: skip
pointwise(
    "hyperbolic", "attribute in its hyperbolic sine, cosine and tangent", (torch.sinh, torch.cosh, torch.tanh),
    ("sinh(x)", "cosh(x)", "tanh(x)"), (-2.0, 2.0), reach=(-88.0, 88.0), formula="[sinh x, cosh x, tanh x]",
    source="Zhang 2024 (RPN 1), section 5 (there in the order cosh, sinh, tanh)",
    domain="all reals; grows as e^|x|, infinite in float32 beyond |x| = 88",
)  # fmt: skip
pointwise(
    "arc_hyperbolic", "squashed attribute in inverse hyperbolic functions",
    (torch.asinh, lambda s: torch.acosh(s + 1.01), lambda s: torch.atanh(0.99 * s)),
    ("asinh(1/(1+exp(-x)))", "acosh(1.01+1/(1+exp(-x)))", "atanh(0.99/(1+exp(-x)))"), (-3.0, 3.0),
    prepare=torch.sigmoid, formula="[arcsinh s, arccosh(s + 1.01), arctanh(0.99 s)], s = sigmoid(x)",
    source="Zhang 2024 (RPN 1), section 5 (there of x itself)",
    domain="all reals, through s in [0, 1]; saturates for large |x|",
)  # fmt: skip

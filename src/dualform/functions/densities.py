"""Log-densities of one attribute. Legend: s = slope sigmoid(x) + floor (half line), theta their parameters.

Each is log_prob of the class of its name in torch.distributions, written out: numbers stay numbers, so that nothing is
built, moved or checked per call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, attribute_wise, expansion
from dualform.functions.in_blocks import by_slopes
from dualform.shapes import fail

Theta = Sequence[tuple[float, ...]]


class Density(NamedTuple):
    """log p(x | theta) on tensors, its derivative, and its text; `positive` names the parameters that must be."""

    log_prob: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    text: Callable[..., str]
    parameters: tuple[str, ...]
    positive: tuple[str, ...]
    half_line: bool = False
    kink: bool = False


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    return (x - mean).square() * (-0.5 / std**2) - (math.log(std) + 0.5 * math.log(2 * math.pi))


def _cauchy(x: Tensor, loc: float, scale: float) -> Tensor:
    return -torch.log1p(((x - loc) / scale).square()) - math.log(math.pi * scale)


def _laplace(x: Tensor, loc: float, scale: float) -> Tensor:
    return (x - loc).abs() * (-1 / scale) - math.log(2 * scale)


def _gamma(s: Tensor, concentration: float, rate: float) -> Tensor:
    return s.log() * (concentration - 1) - s * rate + (concentration * math.log(rate) - math.lgamma(concentration))


def _gamma_slope(s: Tensor, concentration: float, rate: float) -> Tensor:
    return s.reciprocal() * (concentration - 1) - rate


def _gamma_text(s: str, concentration: float, rate: float) -> str:
    constant = concentration * math.log(rate) - math.lgamma(concentration)
    return f"{concentration - 1!r}*log({s})-{rate!r}*{s}+({constant!r})"


normal_density = Density(
    _normal, lambda x, mean, std: (x - mean) * (-1 / std**2),
    lambda x, mean, std: f"-0.5*(({x}-({mean!r}))/{std!r})**2-({math.log(std) + 0.5 * math.log(2 * math.pi)!r})",
    ("mean", "std"), ("std",),
)  # fmt: skip
cauchy_density = Density(
    _cauchy, lambda x, loc, scale: (x - loc) / ((x - loc).square() + scale**2) * -2,
    lambda x, loc, scale: f"-log(1+(({x}-({loc!r}))/{scale!r})**2)-({math.log(math.pi * scale)!r})", ("loc", "scale"),
    ("scale",),
)  # fmt: skip
laplace_density = Density(
    _laplace, lambda x, loc, scale: (x - loc).sign() * (-1 / scale),
    lambda x, loc, scale: f"-abs({x}-({loc!r}))/{scale!r}-({math.log(2 * scale)!r})", ("loc", "scale"), ("scale",),
    kink=True,
)  # fmt: skip
gamma_density = Density(
    _gamma, _gamma_slope, _gamma_text, ("concentration", "rate"), ("concentration", "rate"), half_line=True
)  # fmt: skip
chi2_density = Density(
    lambda s, df: _gamma(s, df / 2, 0.5), lambda s, df: _gamma_slope(s, df / 2, 0.5),
    lambda s, df: _gamma_text(s, df / 2, 0.5), ("df",), ("df",), half_line=True,
)  # fmt: skip
exponential_density = Density(
    lambda s, rate: s * -rate + math.log(rate), lambda s, rate: torch.full_like(s, -rate),
    lambda s, rate: f"-{rate!r}*{s}+({math.log(rate)!r})", ("rate",), ("rate",), half_line=True,
)  # fmt: skip


def log_densities(name: str, pairs: Sequence[tuple[Density, Sequence[float]]], slope: float, floor: float) -> Expansion:
    """Make the expansion in log-densities, each with its theta; densities on the half line see s."""
    if not pairs:
        fail(name, "theta", "is empty", "at least one tuple of parameters", "Leave it out for the usual ones.")
    for density, theta in pairs:
        given = dict(zip(density.parameters, theta, strict=False))
        if len(theta) != len(density.parameters) or not all(given[p] > 0 for p in density.positive):
            expected = f"({', '.join(density.parameters)}) with {' and '.join(density.positive)} > 0"
            fail(name, "theta", f"holds {tuple(theta)}", expected, "Pass a tuple of such tuples.")
    known = [(density, [float(value) for value in theta]) for density, theta in pairs]

    def basis(x: Tensor, axis: int) -> list[Tensor]:
        s = torch.sigmoid(x) * slope + floor if any(density.half_line for density, _ in known) else x
        return [p.log_prob(s if p.half_line else x, *theta) for p, theta in known]

    def slopes(x: Tensor, axis: int) -> list[Tensor]:
        sigmoid = torch.sigmoid(x)
        s, inner = sigmoid * slope + floor, sigmoid * (1 - sigmoid) * slope
        return [p.slope(s, *theta) * inner if p.half_line else p.slope(x, *theta) for p, theta in known]

    squashed = f"({slope!r}/(1+exp(-x))+{floor!r})"
    terms = [p.text(squashed if p.half_line else "x", *theta) for p, theta in known]
    rough = "Laplace: |x - loc| has a kink at each loc, where the gradient is taken as 0"
    return attribute_wise(
        name, basis, terms, pull=by_slopes(slopes), layout="function", domain=(-2.0, 2.0), reach=(-1e15, 1e15),
        rough=rough if any(p.kink for p, _ in known) else "",
    )  # fmt: skip


_source = "Zhang 2024 (RPN 1), section 5"
_half = "all reals, through s in (0, 1); saturates for large |x|, its gradient with it"


def _family(
    name: str, density: Density, theta: Sequence[float | tuple[float, ...]], formula: str, domain: str = _half,
    slope: float = 0.99, floor: float = 0.001,
) -> None:  # fmt: skip
    """Register `naive_<name>`, the log-density under one distribution, and `<name>`, under several, default theta."""
    usual: Theta = tuple(t if isinstance(t, tuple) else (t,) for t in theta)
    parameters = [
        inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=float(value), annotation="float")
        for p, value in zip(density.parameters, usual[0], strict=True)
    ]

    def one(**values: float) -> Expansion:
        return log_densities(f"naive_{name}", [(density, tuple(values.values()))], slope, floor)

    def several(theta: Sequence[float | Sequence[float]] = usual) -> Expansion:
        each = [t if isinstance(t, Sequence) else (t,) for t in theta]
        return log_densities(name, [(density, t) for t in each], slope, floor)

    one.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    of = "squashed attribute" if density.half_line else "attribute"
    one.__doc__ = f"Take the log-density of every {of} under one {name} distribution."
    shown = ", ".join(density.parameters)
    several.__doc__ = f"Take the log-densities of every {of} under {name} distributions, theta = (({shown}), ..)."
    for short, build in ((f"naive_{name}", one), (name, several)):
        build.__name__ = short
        expansion(formula=formula, source=_source, domain=domain)(build)


_family(
    "normal", normal_density, ((0, 1), (1, 1), (-1, 1), (0, 0.1), (1, 0.1), (-1, 0.1)),
    "log N(x; mean, std)", "all reals; falls as -x^2",
)  # fmt: skip
_family(
    "cauchy", cauchy_density, ((0, 1), (0, 0.5), (1, 1), (1, 0.5), (-1, 1), (-1, 0.5)),
    "log Cauchy(x; loc, scale)", "all reals; falls as -log|x|",
)  # fmt: skip
_family(
    "laplace", laplace_density, ((0, 1), (0, 2), (1, 1), (1, 2), (-1, 1), (-1, 2)),
    "log Laplace(x; loc, scale)", "all reals; falls as -|x|; kinks at each loc",
)  # fmt: skip
_family(
    "gamma", gamma_density, ((0.5, 1), (0.5, 2), (1, 1), (1, 2), (2, 1), (2, 2)),
    "log Gamma(s; concentration, rate), s = 0.99 sigmoid(x) + 0.001",
)  # fmt: skip
_family("chi2", chi2_density, (1, 2), "log chi2_df(s), s = sigmoid(x) + 0.001", slope=1.0)
_family(
    "exponential", exponential_density, (0.5, 0.75, 1, 2, 3, 5),
    "log Exp(s; rate) = log rate - rate s, s = 0.99 sigmoid(x) + 0.001; all are affine in s (rank m + 1)",
)  # fmt: skip


@expansion(
    source=_source,
    formula="[log N(x; 0, 1), log Cauchy(x; 0, 1), log chi2_1(s), log Gamma(s; 1/2, 1), log Laplace(x; 0, 1), "
    "log Exp(s; 1)]",
    domain="all reals; the parts in s = 0.99 sigmoid(x) + 0.001 saturate, the others fall",
)
def hybrid_probabilistic() -> Expansion:
    """Take the log-density of every attribute under one distribution of each family."""
    return log_densities(
        "hybrid_probabilistic",
        [
            (normal_density, (0, 1)), (cauchy_density, (0, 1)), (chi2_density, (1,)),
            (gamma_density, (0.5, 1)), (laplace_density, (0, 1)), (exponential_density, (1,)),
        ],
        0.99, 0.001,
    )  # fmt: skip

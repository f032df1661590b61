"""Built-in inner models. Each is an ordinary module on token rows (..., K) -> (..., V): none knows how it learns.

A record `learners.X(**options)` is a recipe: called with a width it builds the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualform import functions
from dualform.catalogue import Catalogue
from dualform.functions.head import HeadConfig, parts
from dualform.functions.remainders import find_activation
from dualform.own_code import CodeError, expect_options, reader

Recipe = Callable[[int], nn.Module]


def _own_recipe(where: str, found: Any, options: Mapping[str, Any]) -> Recipe:
    """Make a recipe of the user's own class, or function of a width."""
    expected = "a class or function of the head width that makes an nn.Module"
    if isinstance(found, nn.Module):
        kind = type(found).__name__
        raise CodeError(f"{where} is a built {kind}; expected {expected}. Pass {kind}, not {kind}(...).")
    is_module = not isinstance(found, type) or issubclass(found, nn.Module)
    if not callable(found) or not is_module:
        what = "a class that is no nn.Module" if isinstance(found, type) else f"a {type(found).__name__}"
        raise CodeError(f"{where} is {what}; expected {expected}. Derive it from nn.Module, or name another.")
    expect_options(where, found, 1, options, "NAME(dim, **options)")
    return partial(found, **options)


learners = Catalogue("learners", reader("learners", _own_recipe))


def _hidden(name: str, expand: float) -> Callable[[int], int]:
    """Return the rule for a hidden width: expand times the width, at least 1."""
    if expand <= 0:
        raise ValueError(
            f"{name}: expand is {expand}; expected a number > 0, hidden width / width. Leave it out for 4."
        )
    return lambda dim: max(round(expand * dim), 1)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(*shape))


class AffineStack(nn.Module):
    """x -> act(... act(x W1 + b1) ...) W_depth + b_depth, row convention, W N(0, 0.02), b 0."""

    def __init__(self, widths: list[int], activation: str, bias: bool) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        self.activation = find_activation("MLP", activation)
        for j, (m, n) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.register_parameter(f"W{j}", _weight(m, n))
            self.register_parameter(f"b{j}", nn.Parameter(torch.zeros(n)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        for j in range(1, self.depth + 1):
            x = x @ getattr(self, f"W{j}")
            bias = getattr(self, f"b{j}")
            x = x if bias is None else x + bias
            x = self.activation(x) if j < self.depth else x
        return x


@learners.record(name="Linear", formula="x W + b", source="Sun et al. 2024, TTT-Linear")
def Linear(bias: bool = True) -> Recipe:
    """Build a linear map (TTT-Linear's, without its residual and norm: see residual_norm).

    Shape:  (..., K) -> (..., K); W1 (K, K), b1 (K,).
    """
    return lambda dim: AffineStack([dim, dim], "identity", bias)


@learners.record(name="MLP", formula="act(x W1 + b1) W2 + b2, ...", source="Sun et al. 2024, TTT-MLP")
def MLP(depth: int = 2, expand: float = 4, activation: str = "gelu_tanh", bias: bool = True) -> Recipe:
    """Build a multi-layer perceptron with `depth` weight matrices; TTT-MLP's is the default.

    Shape:  (..., K) -> (..., K); hidden width expand K, at least 1.
    Raises: ValueError if depth < 1, expand <= 0 or the activation is unknown.
    """
    if depth < 1:
        raise ValueError(
            f"MLP: depth is {depth}; expected at least one weight matrix, depth >= 1. Use depth=1 for Linear."
        )
    find_activation("MLP", activation)
    hidden = _hidden("MLP", expand)
    return lambda dim: AffineStack([dim, *[hidden(dim)] * (depth - 1), dim], activation, bias)


class GatedUnit(nn.Module):
    """x -> (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.W_gate, self.W_up, self.W_down = _weight(dim, hidden), _weight(dim, hidden), _weight(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.W_gate) * (x @ self.W_up)) @ self.W_down


@learners.record(name="SwiGLU", formula="(silu(x W_gate) * (x W_up)) W_down", source="Shazeer 2020; LaCT 2025")
def SwiGLU(expand: float = 4) -> Recipe:
    """Build a gated linear unit without biases.

    Shape:  (..., K) -> (..., K); hidden width expand K, at least 1.
    Raises: ValueError if expand <= 0.
    """
    hidden = _hidden("SwiGLU", expand)
    return lambda dim: GatedUnit(dim, hidden(dim))


class Factored(nn.Module):
    """x -> x (A B)."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(dim, rank) * dim**-0.5)
        self.B = _weight(rank, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.A @ self.B)


@learners.record(name="LowRank", formula="x (A B)", source="Hu et al. 2021, as a hidden state")
def LowRank(rank: int) -> Recipe:
    """Build a linear map of low rank, written as the product it is; the derivation re-associates it.

    Shape:  (..., K) -> (..., K); A (K, rank), B (rank, K).
    Raises: ValueError if rank < 1.
    """
    if rank < 1:
        raise ValueError(f"LowRank: rank is {rank}; expected rank >= 1. Pass a positive rank.")
    return lambda dim: Factored(dim, rank)


class ResidualNorm(nn.Module):
    """x -> x + LN(f(x)); the norm's gain and bias are slow."""

    slow = ("norm.*",)

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.slow = ("norm.*", *(f"inner.{name}" for name in getattr(inner, "slow", ())))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.inner(x))


@learners.record(
    name="residual_norm", formula="x + LN(f(x))", source="Sun et al. 2024, section 2.7", nested={"spec": learners}
)
def residual_norm(spec: Recipe) -> Recipe:
    """Wrap a learner in a residual connection and a layer norm (eps 1e-6, biased variance), gain and bias slow.

    Shape:  (..., K) -> (..., K).
    """
    return lambda dim: ResidualNorm(spec(dim), dim)


@learners.record(
    name="Head",
    formula="<kappa(x), psi(w)> + b + pi(x)",
    source="Zhang 2024 (RPN), as a hidden state",
    nested={name: catalogue for name, catalogue in parts.items() if catalogue.names()},
)
def Head(
    expansion: Any = "identity", reconciliation: Any = "identity", remainder: Any = "zero", interdependence: Any = None,
    compression: Any = None, channels: int = 1, fusion: Any = "mean", bias: bool = True,
) -> Recipe:  # fmt: skip
    """Build an RPN head: any expansion with any reconciliation. Its flat w is the fast weight,
    with bias and remainder weights.

    psi affine: one site; multilinear: the tokens meet one factor after the other; a hypernet: w is carried per token.
    Shape:  (..., K) -> (..., K); w (channels l,), l = reconciliation.length(K, D), D = expansion.dim(K).
    Raises: ValueError for unknown names and options; ShapeError, when built at a width, for sizes that do not join.
    """
    options = {
        "expansion": expansion, "reconciliation": reconciliation, "remainder": remainder,
        "interdependence": interdependence, "compression": compression, "channels": channels, "fusion": fusion,
        "bias": bias,
    }  # fmt: skip
    HeadConfig(1, 1, **options)  # what does not depend on the width is refused here
    return lambda dim: functions.Head(dim, dim, **options)

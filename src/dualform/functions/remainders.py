"""Remainders pi: R^m -> R^n, what is added to <kappa(x), psi(w)>: nothing, a constant, the input, a linear map of it.

    p.length(m, n) -> l        p(x, n, w=None, b=None) -> (..., n)

Legend: m input, n output, l parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.catalogue import Catalogue, near_misses
from dualform.shapes import fail

remainders = Catalogue("remainders")

RPN1 = "Zhang 2024 (RPN 1, arXiv 2407.04819)"
remainder = partial(remainders.record, suffix="_remainder", source=RPN1)

Activation = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:  # with a name, so that what holds it can be pickled
    return x


# Every elementwise function that a record may name.
activations: dict[str, Activation] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": _same,
}


def find_activation(where: str, activation: str | Activation) -> Activation:
    """Look an activation up by name; a callable is one already."""
    if callable(activation):
        return activation
    if activation not in activations:
        advice = near_misses(activation, sorted(activations))
        fail(where, "activation", f"is {activation!r}", f"one of {sorted(activations)}", advice, ValueError)
    return activations[activation]


@dataclass(frozen=True)
class Remainder:
    """What is added, as data: a number times ones, or act(x), or act(x W^T + b), or act(x) W^T + b."""

    name: str
    kind: str  # "constant", "identity", "linear"
    c: float = 0.0
    activation: str | Activation = "identity"
    inside: bool = False
    bias: bool = False

    def length(self, m: int, n: int) -> int:
        """Count the weights; refuse sizes that the remainder does not join."""
        if self.kind == "identity" and m != n:
            advice = "Use remainder='linear', or equal widths."
            fail(self.name, "n", f"is {n}", f"n = m = {m}, as the input itself is added", advice)
        return m * n if self.kind == "linear" else 0

    @property
    def is_zero(self) -> bool:
        return self.kind == "constant" and self.c == 0

    def linear_part(self, x: Tensor) -> Tensor:
        """Return what the linear map is applied to."""
        return find_activation(self.name, self.activation)(x) if self.inside else x

    def __call__(self, x: Tensor, n: int, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        m = x.shape[-1]
        l = self.length(m, n)
        act = find_activation(self.name, self.activation)
        if self.kind == "constant":
            return torch.full((*x.shape[:-1], n), self.c, dtype=x.dtype, device=x.device)
        if self.kind == "identity":
            return act(x)
        if w is None or w.numel() != l or tuple(w.shape) not in ((n, m), (l,)):
            found = "is None" if w is None else f"has shape {tuple(w.shape)}"
            wanted = f"(n, m) = ({n}, {m}) or (n m,) = ({l},)"
            fail(self.name, "w", found, wanted, "Pass the weights of the linear map.")
        if b is not None and tuple(b.shape) != (n,):
            fail(self.name, "b", f"has shape {tuple(b.shape)}", f"(n,) = ({n},)", "Pass one bias per output.")
        y = F.linear(self.linear_part(x), w.reshape(n, m), b)
        return y if self.inside else act(y)


@remainder(formula="pi(x) = c 1_n")
def constant(c: float = 1.0) -> Remainder:
    """Add c to every output.

    Shape:  x (..., m) -> (..., n); no weights. Differs: the leading axes of x are kept where tinyBIG returns (n,).
    Dtype:  x's.
    """
    return Remainder("constant", "constant", float(c))


@remainder(formula="pi(x) = 0")
def zero() -> Remainder:
    """Add nothing."""
    return Remainder("zero", "constant", 0.0)


@remainder(formula="pi(x) = 1_n")
def one() -> Remainder:
    """Add one to every output."""
    return Remainder("one", "constant", 1.0)


@remainder(aliases=("residual",), formula="pi(x) = act(x), m = n")
def identity(activation: str | Activation = "identity") -> Remainder:
    """Add the input itself: a residual connection.

    Shape:  x (..., n) -> (..., n); no weights.
    Raises: ShapeError if m is not n; ValueError for an unknown activation.
    """
    find_activation("identity", activation)
    return Remainder("identity", "identity", activation=activation)


@remainder(
    formula="pi(x) = act(x W^T + b), or act(x) W^T + b with inside=True",
    source=f"{RPN1}; Liu et al. 2024 (KAN) for inside=True",
)
def linear(activation: str | Activation = "identity", bias: bool = False, inside: bool = False) -> Remainder:
    """Add a linear map of the input; with `inside` the activation comes before the map, as in a KAN.

    Shape:  x (..., m) -> (..., n); W (n, m) or its n m entries, b (n,).
    Raises: ShapeError if W or b has another shape; ValueError for an unknown activation.
    Example:
        >>> p = remainders.linear()
        >>> p.length(2, 1), p(torch.tensor([1.0, 2.0]), 1, torch.tensor([[3.0, 4.0]])).tolist()
        (2, [11.0])
    """
    find_activation("linear", activation)
    return Remainder("linear", "linear", activation=activation, inside=inside, bias=bias)

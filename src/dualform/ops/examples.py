"""Example calls of ops as data: the laws are tried on them, with sizes drawn, and the documentation prints them.

call("conv1d", T("b c l"), T("o c 3"), stride=2)        axes are letters (a size each) or numbers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# One size for each letter, all different where a matrix is read twice.
SIZES = {"n": 3, "m": 4, "k": 2, "p": 5, "b": 2, "c": 4, "o": 6, "h": 5, "w": 6, "l": 7}


@dataclass(frozen=True)
class T:
    """A floating tensor: "unit" in (0.3, 0.95), "big" in (1.2, 2), "signed" about 0, "positive" definite, or "flat"."""

    axes: str = ""
    kind: str = "unit"

    def __str__(self) -> str:
        return f"[{', '.join(self.axes.split())}]"

    def make(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Draw it in float64, not contiguous where the rank allows."""
        shape = shape_of(self.axes, sizes)
        x = torch.rand(shape[::-1], generator=generator, dtype=torch.float64)
        x = x.permute(list(range(len(shape) - 1, -1, -1)))
        if self.kind == "flat":
            x = x.contiguous()
        if self.kind == "big":
            return x * 0.8 + 1.2
        if self.kind == "signed":
            return x * 4 - 2
        if self.kind == "positive":
            return x @ x.mT + shape[-1] * torch.eye(shape[-1], dtype=x.dtype)
        return x * 0.65 + 0.3


@dataclass(frozen=True)
class I:  # noqa: E742  (beside T and B, it reads as the type it is)
    """A tensor of indices below a size: a number, or a letter of the call's."""

    axes: str
    below: str

    def __str__(self) -> str:
        return f"int[{', '.join(self.axes.split())}] < {self.below}"

    def make(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Draw it."""
        return torch.randint(0, max(shape_of(self.below, sizes)[0], 1), shape_of(self.axes, sizes), generator=generator)


@dataclass(frozen=True)
class B:
    """A mask."""

    axes: str

    def __str__(self) -> str:
        return f"bool[{', '.join(self.axes.split())}]"

    def make(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Draw it."""
        return torch.rand(shape_of(self.axes, sizes), generator=generator) > 0.4


def shape_of(axes: str, sizes: Mapping[str, int]) -> list[int]:
    return [int(a) if a.isdigit() else sizes[a] for a in axes.split()]


@dataclass(frozen=True)
class Example:
    """One call: an op ("add.Tensor"; "" is the row's own), its arguments, its keywords; which of several results."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    part: int = 0

    def of(self, part: int) -> Example:
        """The same call, looked at in another of its results."""
        return replace(self, part=part)

    def __str__(self) -> str:
        shown = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs]
        return f"{self.op.split('.')[0].split('::')[-1]}({', '.join(shown)})"

    def calls(self, op: str, overload: str) -> bool:
        """Is it a call of this op, and of this overload if one is named?"""
        mine, _, detail = self.op.partition(".")
        return not self.op or (mine == op and (not overload or detail == overload))

    @property
    def letters(self) -> frozenset[str]:
        """The sizes that may be drawn."""
        found: set[str] = set()
        _mapped((self.args, dict(self.kwargs)), lambda t: found.update(f"{t.axes} {getattr(t, 'below', '')}".split()))
        return frozenset(a for a in found if not a.isdigit())

    @property
    def target(self) -> Any:
        """The overload that is called."""
        name, _, overload = self.op.partition(".")
        space, _, name = name.rpartition("::")
        packet = getattr(getattr(torch.ops, space or "aten"), name)
        return getattr(packet, overload or ("default" if "default" in packet.overloads() else packet.overloads()[0]))

    def arguments(self, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> tuple[list[Any], dict[str, Any]]:
        """Draw the tensors."""
        generator = torch.Generator().manual_seed(seed)
        return _mapped((list(self.args), dict(self.kwargs)), lambda t: t.make(sizes, generator))


def call(op: str, *args: Any, **kwargs: Any) -> Example:
    """Write an example down."""
    return Example(op, tuple(_frozen(a) for a in args), tuple((k, _frozen(v)) for k, v in kwargs.items()))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _mapped(value: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(value, T | I | B):
        return f(value)
    if isinstance(value, dict):
        return {k: _mapped(v, f) for k, v in value.items()}
    return [_mapped(v, f) for v in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(v) for v in value)}]"
    if isinstance(value, Tensor):
        return str(value.tolist())
    return repr(value) if isinstance(value, str) else str(value)

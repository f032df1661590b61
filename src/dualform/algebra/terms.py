"""The atoms of a structured derivative: labels, factors, selections, and terms that are products of them.

    value[out..., in...] = coef * prod factors * prod deltas

A label that stands on an output axis and on an input axis is a Kronecker delta; it is never stored. A label on the
output only is a broadcast copy, on the input only a sum, on neither a contraction. An axis is a row-major tuple of
labels, so that reshapes need no numbers; an axis of size 1 is the empty tuple, so that broadcasting is no special case.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dualform.storages import memory_of


class Label:
    """One atom of an axis. Two labels are the same index if and only if they are the same object."""

    __slots__ = ("name", "size")

    def __init__(self, size: int, name: str = "") -> None:
        self.size = int(size)
        self.name = name

    def __repr__(self) -> str:
        return f"{self.name or '_'}:{self.size}"


Axis = tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class Factor:
    """A stored tensor with one label per axis; `name` is for people ("X", "p", "gelu'(h)")."""

    tensor: Tensor
    labels: tuple[Label, ...]
    name: str = ""


class Relation(ABC):
    """A factor of zeros and ones that is known by a rule (relations.py has the other kinds); it stores no numbers.

    A relation that is a function reads `bigs` at the place that `smalls` say: flat(bigs) = values[smalls].
    """

    @property
    @abstractmethod
    def labels(self) -> tuple[Label, ...]:
        """Its indices."""

    @property
    @abstractmethod
    def key(self) -> tuple:
        """What makes two relations on the same labels equal."""

    @abstractmethod
    def renamed(self, final: Callable[[Label], Axis]) -> Relation:
        """Rename or split the labels."""

    @abstractmethod
    def dense(self, like: Tensor) -> Factor:
        """Store the zeros and ones."""


@dataclass(frozen=True, eq=False)
class Select(Relation):
    """The relation big = start + step * small between two indices, always inside big; step may be negative."""

    small: Label
    big: Label
    start: int
    step: int = 1

    @property
    def smalls(self) -> tuple[Label, ...]:
        return (self.small,)

    @property
    def bigs(self) -> tuple[Label, ...]:
        return (self.big,)

    @property
    def labels(self) -> tuple[Label, ...]:
        return (self.small, self.big)

    @property
    def key(self) -> tuple:
        return ("select", self.start, self.step)

    def renamed(self, final: Callable[[Label], Axis]) -> Select:
        """Rename; a split needs a Window."""
        (small,), (big,) = final(self.small), final(self.big)
        return replace(self, small=small, big=big)

    def values(self, device: torch.device) -> Tensor:
        """The place in big of each small."""
        return torch.arange(self.small.size, device=device) * self.step + self.start

    def dense(self, like: Tensor) -> Factor:
        hit = self.values(like.device).unsqueeze(1) == torch.arange(self.big.size, device=like.device)
        return Factor(hit.to(like.dtype), self.labels, "select")

    @property
    def is_identity(self) -> bool:
        return self.start == 0 and self.step == 1 and self.small.size == self.big.size

    @property
    def indices(self) -> range:
        """The values of `big` that are reached."""
        return range(self.start, self.start + self.step * self.small.size, self.step)


@dataclass(frozen=True, eq=False)
class Term:
    """One product: see the module's equation."""

    coef: float
    factors: tuple[Factor | Relation, ...]
    out: tuple[Axis, ...]
    inn: tuple[Axis, ...]

    @property
    def tensors(self) -> tuple[Factor, ...]:
        return tuple(f for f in self.factors if isinstance(f, Factor))

    @property
    def selects(self) -> tuple[Select, ...]:
        return tuple(f for f in self.factors if isinstance(f, Select))

    @property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(f for f in self.factors if isinstance(f, Relation))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors behind the factors, and behind the relations that look up an index."""
        tensors = (f.tensor if isinstance(f, Factor) else getattr(f, "index", None) for f in self.factors)
        return tuple(t for t in tensors if t is not None)

    @property
    def visible(self) -> tuple[Label, ...]:
        """Distinct labels of the axes, output first."""
        return tuple(dict.fromkeys([*atoms(self.out), *atoms(self.inn)]))

    @property
    def hidden(self) -> tuple[Label, ...]:
        """Labels that only factors have: the contracted ones."""
        seen = set(self.visible)
        return tuple(dict.fromkeys(label for f in self.factors for label in f.labels if label not in seen))


def atoms(axes: Iterable[Axis]) -> tuple[Label, ...]:
    """Flatten axes into their labels, in order."""
    return tuple(label for axis in axes for label in axis)


def fresh_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Make one new label for each axis of a shape; an axis of size 1 gets none."""
    return tuple(() if n == 1 else (Label(n),) for n in shape)


def sizes(labels: Iterable[Label]) -> list[int]:
    return [label.size for label in labels]


def volume(labels: Iterable[Label]) -> int:
    return math.prod(label.size for label in labels)


def make_factor(tensor: Tensor, axes: Sequence[Axis], name: str = "") -> Factor:
    """Label a tensor whose axis k is `axes[k]`: split composite axes, drop size 1, take diagonals of repeats."""
    labels = atoms(axes)
    shape = sizes(labels)
    if list(tensor.shape) != shape:
        tensor = tensor.reshape(shape)
    return diagonal(Factor(tensor, labels, name))


def diagonal(factor: Factor) -> Factor:
    """Replace a repeated label by the diagonal of the two axes (a view)."""
    tensor, labels = factor.tensor, list(factor.labels)
    while len(set(labels)) < len(labels):
        second = next(k for k, label in enumerate(labels) if label in labels[:k])
        first = labels.index(labels[second])
        tensor = torch.diagonal(tensor, dim1=first, dim2=second)
        label = labels[second]
        labels = [x for k, x in enumerate(labels) if k not in (first, second)] + [label]
    return Factor(tensor, tuple(labels), factor.name)


def substitute(term: Term, change: Mapping[Label, Axis]) -> Term:
    """Rename or split labels throughout a term; a label renamed onto another of the same factor becomes a diagonal.

    A label of a Select may be renamed, not split.
    """

    def final(label: Label) -> Axis:
        if label not in change:
            return (label,)
        return tuple(x for part in change[label] for x in (final(part) if part is not label else (part,)))

    def axes(old: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(tuple(x for label in axis for x in final(label)) for axis in old)

    factors: list[Factor | Relation] = []
    for f in term.factors:
        if not any(label in change for label in f.labels):
            factors.append(f)
        elif isinstance(f, Factor):
            factors.append(make_factor(f.tensor, [final(label) for label in f.labels], f.name))
        else:
            factors.append(f.renamed(final))
    return Term(term.coef, tuple(factors), axes(term.out), axes(term.inn))


def renewed(term: Term) -> Term:
    """Give a term labels of its own, so that nothing is captured by accident when it meets another."""
    own = dict.fromkeys([*term.visible, *term.hidden])
    return substitute(term, {label: (Label(label.size, label.name),) for label in own})


Identity = tuple[Any, ...]


def identity_of(t: Tensor) -> Identity:
    """What tells two tensors apart: where their numbers are; views of one tensor that show the same numbers are one.

    The order of axes does not matter.
    """
    steps = tuple(sorted(zip(t.stride(), t.shape, strict=True), reverse=True))
    try:
        return (memory_of(t), t.storage_offset(), steps)
    except (NotImplementedError, RuntimeError):  # tensors inside a transform
        return (id(t),)

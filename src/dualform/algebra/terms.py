"""The atoms of a structured derivative: labels, factors, selections, and terms that are products of them.

    value[out..., in...] = coef * prod factors * prod deltas

A label that stands on an output axis and on an input axis is a Kronecker delta; it is never stored. A label on the
output only is a broadcast copy, on the input only a sum, on neither a contraction. An axis is a row-major tuple of
labels, so that reshapes need no numbers; an axis of size 1 is the empty tuple, so that broadcasting is no special case.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
    """A stored tensor with one label per axis; `name` is for people ("X", "p", "gelu'(h)").

    made: what the tensor is a sum of, where that is recorded; the terms' outputs are its axes, whatever its labels
    """

    tensor: Tensor
    labels: tuple[Label, ...]
    name: str = ""
    made: tuple[Term, ...] = ()

    @property
    def is_mask(self) -> bool:
        """Is it of truth values: it selects, and what it leaves out is 0 even where other factors are infinite?"""
        return self.tensor.dtype == torch.bool


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
        """Store the zeros and ones, as a mask."""


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
        return Factor(hit, self.labels, "select")

    @property
    def is_identity(self) -> bool:
        return self.start == 0 and self.step == 1 and self.small.size == self.big.size

    @property
    def indices(self) -> range:
        """The values of `big` that are reached."""
        return range(self.start, self.start + self.step * self.small.size, self.step)


class IndexFunction(Relation):
    """A relation that is a function."""

    smalls: Axis
    bigs: Axis

    @property
    def labels(self) -> Axis:
        return (*self.smalls, *self.bigs)

    @abstractmethod
    def values(self, device: torch.device) -> Tensor:
        """The places in bigs."""

    def dense(self, like: Tensor) -> Factor:
        hit = self.values(like.device).unsqueeze(-1) == torch.arange(volume(self.bigs), device=like.device)
        return make_factor(hit, (*((x,) for x in self.smalls), self.bigs), "[at]")


@dataclass(frozen=True, eq=False)
class Window(IndexFunction):
    """flat(bigs) = start + sum_k steps[k] smalls[k]; where that is outside of bigs, nothing."""

    smalls: Axis
    bigs: Axis
    start: int
    steps: tuple[int, ...]

    @property
    def key(self) -> tuple:
        return ("window", self.start, self.steps, len(self.bigs))

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the greatest place."""
        ends = [step * (x.size - 1) for x, step in zip(self.smalls, self.steps, strict=True)]
        return self.start + sum(e for e in ends if e < 0), self.start + sum(e for e in ends if e > 0)

    @property
    def is_total(self) -> bool:
        least, most = self.reach
        return least >= 0 and most < volume(self.bigs)

    def renamed(self, final: Callable[[Label], Axis]) -> Window:
        steps: dict[Label, int] = {}
        for small, step in zip(self.smalls, self.steps, strict=True):
            parts = final(small)
            for k, part in enumerate(parts):
                steps[part] = steps.get(part, 0) + step * volume(parts[k + 1 :])
        bigs = tuple(x for big in self.bigs for x in final(big))
        return Window(tuple(steps), bigs, self.start, tuple(steps.values()))

    def values(self, device: torch.device) -> Tensor:
        total = torch.full((), self.start, dtype=torch.int64, device=device)
        for k, (small, step) in enumerate(zip(self.smalls, self.steps, strict=True)):
            along = torch.arange(small.size, device=device) * step
            total = total + along.reshape([-1] + [1] * (len(self.smalls) - k - 1))
        return total

    def inside(self, like: Tensor) -> Factor:
        """1 where the place is in bigs, else 0."""
        place = self.values(like.device)
        return Factor((place >= 0) & (place < volume(self.bigs)), self.smalls, "inside")


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


def same_place(left: Axis, right: Axis) -> Window:
    """flat(right) = flat(left): ties axes of equal volume whose radices do not nest."""
    return Window(left, right, 0, tuple(volume(left[k + 1 :]) for k in range(len(left))))


_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def recorded() -> Iterator[None]:
    """Keep with every factor that is made in here what it is made of, for people; so all of that stays in memory."""
    before = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(before)


def factor_of(made: Iterable[Term], tensor: Tensor, labels: Sequence[Label], name: str = "") -> Factor:
    """A factor that stands for a sum of terms, which have an output for each of its axes."""
    return Factor(tensor, tuple(labels), name, tuple(made) if _recording.get() else ())


def read_from(f: Factor, tensor: Tensor, labels: Sequence[Label], *relations: Relation) -> Factor:
    """A factor whose entries are some of another's: which, say its labels and the relations between them."""
    return factor_of((product(x, labels) for x in [(f, *relations)]), tensor, labels, f.name)


def product(factors: Sequence[Factor | Relation], labels: Sequence[Label]) -> Term:
    """A product of factors, summed over all labels but these."""
    return Term(1.0, tuple(factors), tuple((x,) for x in labels), ())


def make_factor(tensor: Tensor, axes: Sequence[Axis], name: str = "") -> Factor:
    """Label a tensor whose axis k is `axes[k]`: split composite axes, drop size 1, take diagonals of repeats."""
    return relabelled(Factor(tensor, (), name), axes)


def relabelled(f: Factor, axes: Sequence[Axis]) -> Factor:
    """The same numbers under other labels, one axis of them for each of the factor's own."""
    labels = atoms(axes)
    shape = sizes(labels)
    if list(f.tensor.shape) == shape:
        return diagonal(replace(f, labels=labels))
    tensor = f.tensor.reshape(shape)
    if not _recording.get():
        return diagonal(Factor(tensor, labels, f.name))
    own = [axis[0] if len(axis) == 1 else Label(volume(axis)) for axis in axes]
    ties = [same_place(axis, (x,)) for x, axis in zip(own, axes, strict=True) if len(axis) > 1]
    return diagonal(read_from(replace(f, labels=tuple(own)), tensor, labels, *ties))


def diagonal(factor: Factor) -> Factor:
    """Replace a repeated label by the diagonal of the two axes (a view)."""
    tensor, labels = factor.tensor, list(factor.labels)
    if len(set(labels)) == len(labels):
        return factor
    while len(set(labels)) < len(labels):
        second = next(k for k, label in enumerate(labels) if label in labels[:k])
        first = labels.index(labels[second])
        tensor = torch.diagonal(tensor, dim1=first, dim2=second)
        label = labels[second]
        labels = [x for k, x in enumerate(labels) if k not in (first, second)] + [label]
    return read_from(factor, tensor, labels)


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
            factors.append(relabelled(f, [final(label) for label in f.labels]))
        else:
            factors.append(f.renamed(final))
    return Term(term.coef, tuple(factors), axes(term.out), axes(term.inn))


def renewed(term: Term) -> Term:
    """Give a term labels of its own, so that nothing is captured by accident when it meets another."""
    own = dict.fromkeys([*term.visible, *term.hidden])
    return substitute(term, {label: (Label(label.size, label.name),) for label in own})


def written_with(term: Term, labels: Sequence[Label]) -> Term:
    """A product as it is written where its outputs have these labels: fresh hidden ones, and a diagonal stays as two
    equal labels of one factor, which is not read again."""
    own: dict[Label, Label] = {}
    ties: list[Factor | Relation] = []
    for x, label in zip(atoms(term.out), labels, strict=True):
        if own.setdefault(x, label) is not label:
            ties.append(Select(label, own[x], 0))
    for x in (*term.visible, *term.hidden):
        own.setdefault(x, Label(x.size, x.name))
    factors = (
        replace(f, labels=tuple(own[x] for x in f.labels)) if isinstance(f, Factor) else f.renamed(lambda x: (own[x],))
        for f in term.factors
    )
    return Term(term.coef, (*factors, *ties), tuple((x,) for x in labels), ())


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


def key_of(term: Term) -> tuple:
    """What is equal for terms that are equal but for their coefficients."""
    number = {label: (k, label.size) for k, label in enumerate([*term.visible, *term.hidden])}

    def axes(side: tuple) -> tuple:
        return tuple(tuple(number[x] for x in axis) for axis in side)

    def factor(f: Factor | Relation) -> tuple:
        if not isinstance(f, Factor):
            return (0, f.key, *(number[x] for x in f.labels))
        steps = zip(f.tensor.stride(), f.tensor.shape, (number[x] for x in f.labels), strict=True)
        return (1, identity_of(f.tensor), *(tag for *_, tag in sorted(steps, reverse=True)))

    return (axes(term.out), axes(term.inn), tuple(sorted(map(factor, term.factors))))

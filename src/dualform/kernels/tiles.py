"""Values of a kernel: tiles in registers, places in memory that are read when they are needed, and parts put together.

A tile is a variable of Triton's with an axis for each axis of the value that is not of size 1 or repeated, in any
order: a transpose, a new axis, a repetition are bookkeeping and no instructions. A variable's axis has 16 entries or
the next power of two; what lies beyond the value's size is zero where the axis is `clean`, else anything.

Legend: r axes of a value, a one of them; a variable's own axes are numbered apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

Shape = tuple[int, ...]
LIMIT = 2**17  # entries of a tile: 1024 threads of 128 registers
DEEP = 2**14  # of one of three axes and more, short ones that leave most of it empty, where nothing waits for it


class Untileable(Exception):
    """A value that cannot be inside a kernel, and why."""

    def __init__(self, why: str, node: fx.Node | None = None) -> None:
        super().__init__(why)
        self.why, self.node = why, node


def padded(n: int) -> int:
    """Return how many entries an axis of a variable has: what a product of matrices takes."""
    return max(16, 1 << (n - 1).bit_length())


def is_deep(n: fx.Node) -> bool:
    """Has a value more than two axes, short ones that would fill a large tile with nothing?"""
    made = n.meta.get("val")
    sizes = [k for k in made.shape if k != 1] if isinstance(made, torch.Tensor) else []
    return len(sizes) > 2 and math.prod(map(padded, sizes)) > DEEP


@dataclass(frozen=True)
class Tile:
    """A value in registers, or a number that fills it."""

    text: str
    shape: Shape
    axes: tuple[int | None, ...] = ()  # of the variable, for each axis of the value
    clean: frozenset[int] = frozenset()  # the variable's axes that are zero beyond the value's size
    kind: torch.dtype = torch.float32
    looped: bool = True  # does it change from mini-batch to mini-batch?
    held: bool = False  # is it made of what is carried on, entry by entry?
    number: float | None = None

    @property
    def rank(self) -> int:
        """Axes of the variable."""
        return sum(a is not None for a in self.axes)

    @property
    def order(self) -> list[int]:
        """The value's axes that the variable has, in its order."""
        return [self.axes.index(k) for k in range(self.rank)]

    @property
    def sizes(self) -> Shape:
        """The value's sizes along the variable's axes."""
        return tuple(self.shape[a] for a in self.order)


@dataclass(frozen=True)
class Memory:
    """A value in memory: along each axis, which of the tensor's it is (None: repeated), from where, by which steps."""

    name: str
    shape: Shape
    axes: tuple[int | None, ...]
    start: tuple[int, ...]  # along the tensor's own axes
    steps: tuple[int, ...]
    kind: torch.dtype
    looped: bool

    @classmethod
    def whole(cls, name: str, shape: Sequence[int], kind: torch.dtype, looped: bool) -> Memory:
        r = len(shape)
        return cls(name, tuple(shape), tuple(range(r)), (0,) * r, (1,) * r, kind, looped)


@dataclass(frozen=True)
class Parts:
    """Values that lie behind each other along an axis."""

    axis: int
    values: tuple[Any, ...]

    @property
    def shape(self) -> Shape:
        return resized(self.values[0].shape, self.axis, sum(self.sizes))

    @property
    def sizes(self) -> Shape:
        return tuple(x.shape[self.axis] for x in self.values)

    @property
    def kind(self) -> torch.dtype:
        return self.values[0].kind


Value = Tile | Memory | Parts


def axes_in(space: Sequence[int], r: int) -> tuple[int | None, ...]:
    """Number a variable's axes among a value's r; space: the value's axes that it has, in its order."""
    return tuple(space.index(a) if a in space else None for a in range(r))


def resized(shape: Sequence[int], axis: int, n: int) -> Shape:
    return (*shape[:axis], n, *shape[axis + 1 :])


def behind(axis: int, values: Sequence[Value]) -> Value:
    """Lay values behind each other along an axis."""
    return values[0] if len(values) == 1 else Parts(axis, tuple(values))


def blocked(x: Memory, cut: tuple[int, int] | None) -> Value:
    """Cut what is in memory along an axis, into blocks of so many entries."""
    if cut is None:
        return x
    axis, size = cut
    found = [sliced(x, axis, k, k + size, 1) for k in range(0, x.shape[axis], size)]
    return behind(axis, [v for v in found if v is not None])


def constant(number: float, shape: Sequence[int], kind: torch.dtype) -> Tile:
    """Fill a shape with a number."""
    return Tile(spelt(number), tuple(shape), (None,) * len(shape), kind=kind, looped=False, number=number)


def between(x: Value, axis: int, before: int, after: int, number: float = 0.0) -> Value:
    """Lay a value, along an axis, between entries that are a number."""
    ends = [constant(number, resized(x.shape, axis, n), x.kind) for n in (before, after)]
    return behind(axis, [v for v in (ends[0], x, ends[1]) if v.shape[axis]])


def spelt(x: float) -> str:
    """Write a number as Triton reads it."""
    if isinstance(x, bool | int):
        return repr(x)
    return repr(float(x)) if math.isfinite(x) else f"float('{float(x)}')"


def _along(x: Value, shape: Sequence[int], order: Sequence[int | None]) -> Value:
    """Give a value new axes: axis order[a] of the old, or None for one that is new or repeated."""
    if isinstance(x, Parts):
        if x.axis not in order and x.shape[x.axis] == 1:
            return _along(x.values[0], shape, order)
        if order.count(x.axis) != 1:
            raise Untileable("an axis of parts is repeated or gone")
        at = order.index(x.axis)
        parts = zip(x.values, x.sizes, strict=True)
        return Parts(at, tuple(_along(v, resized(shape, at, n), order) for v, n in parts))
    axes = tuple(None if k is None or x.shape[k] != n else x.axes[k] for k, n in zip(order, shape, strict=True))
    if isinstance(x, Memory):
        return replace(x, shape=tuple(shape), axes=axes, steps=tuple(1 if k is None else x.steps[k] for k in order))
    return replace(x, shape=tuple(shape), axes=axes)


def permuted(x: Value, dims: Sequence[int]) -> Value:
    r = len(x.shape)
    dims = [d % r for d in dims]
    return _along(x, [x.shape[d] for d in dims], dims)


def unsqueezed(x: Value, dim: int) -> Value:
    r = len(x.shape)
    dim = dim % (r + 1)
    return _along(x, (*x.shape[:dim], 1, *x.shape[dim:]), [*range(dim), None, *range(dim, r)])


def squeezed(x: Value, dims: Sequence[int] | None = None) -> Value:
    r = len(x.shape)
    named = range(r) if dims is None else [d % r for d in dims]
    kept = [a for a in range(r) if not (a in named and x.shape[a] == 1)]
    if isinstance(x, Parts) and x.axis not in kept:
        return squeezed(x.values[0], dims)
    return _along(x, [x.shape[a] for a in kept], kept)


def expanded(x: Value, shape: Sequence[int]) -> Value:
    new = len(shape) - len(x.shape)
    sizes = [x.shape[a - new] if n == -1 else n for a, n in enumerate(shape)]
    if isinstance(x, Parts) and sizes[x.axis + new] != x.shape[x.axis]:
        x = x.values[0]  # one part, repeated
    return _along(x, sizes, [*[None] * new, *range(len(x.shape))])


def selected(x: Value, dim: int, index: int) -> Value | None:
    """Take one entry along an axis; None where that moves entries."""
    dim = dim % len(x.shape)
    index = index % x.shape[dim]
    if isinstance(x, Parts):
        if dim == x.axis:
            for v, n in zip(x.values, x.sizes, strict=True):
                if index < n:
                    return selected(v, dim, index)
                index -= n
        found = [selected(v, dim, index) for v in x.values]
        return None if any(v is None for v in found) else Parts(x.axis - (dim < x.axis), tuple(found))
    rest = [a for a in range(len(x.shape)) if a != dim]
    axis = x.axes[dim]
    if axis is None:
        return _along(x, [x.shape[a] for a in rest], rest)
    if isinstance(x, Memory):
        start = list(x.start)
        start[axis] += index * x.steps[dim]
        return _along(replace(x, start=tuple(start)), [x.shape[a] for a in rest], rest)
    return None


def sliced(x: Value, dim: int, start: int, end: int, step: int) -> Value | None:
    """Take entries along an axis; None where that moves entries."""
    dim = dim % len(x.shape)
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    n = len(range(start, end, step))
    shape = resized(x.shape, dim, n)
    if n == x.shape[dim]:
        return x
    if n == 0:
        raise Untileable("it has no entry")
    if isinstance(x, Parts):
        return _sliced_parts(x, dim, range(start, end, step))
    axis = x.axes[dim]
    if axis is None:
        return replace(x, shape=shape)
    if isinstance(x, Memory):
        begin, steps = list(x.start), list(x.steps)
        begin[axis] += start * x.steps[dim]
        steps[dim] *= step
        axes = tuple(None if a == dim and n == 1 else k for a, k in enumerate(x.axes))
        return replace(x, shape=shape, start=tuple(begin), steps=tuple(steps), axes=axes)
    if start == 0 and step == 1 and n > 1 and padded(n) == padded(x.shape[dim]):
        return replace(x, shape=shape, clean=x.clean - {axis})
    return None


def _sliced_parts(x: Parts, dim: int, places: range) -> Value | None:
    if dim != x.axis:
        found = [sliced(v, dim, places.start, places.stop, places.step) for v in x.values]
        return None if any(v is None for v in found) else Parts(x.axis, tuple(found))
    taken, at = [], 0
    for v, n in zip(x.values, x.sizes, strict=True):
        own = [k - at for k in places if at <= k < at + n]
        at += n
        if len(own) == n:
            taken.append(v)
        elif own:
            part = sliced(v, dim, own[0], own[-1] + 1, places.step)
            if part is None:
                return None
            taken.append(part)
    return taken[0] if len(taken) == 1 else Parts(dim, tuple(taken))


def regrouped(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match axes of a reshape: groups of old axes and of new ones with equally many entries, sizes of 1 left out."""
    a, b = [k for k, n in enumerate(old) if n != 1], [k for k, n in enumerate(new) if n != 1]
    found = []
    while a or b:
        left, right = [a.pop(0)], [b.pop(0)]
        x, y = old[left[0]], new[right[0]]
        while x != y:
            if x < y:
                left.append(a.pop(0))
                x *= old[left[-1]]
            else:
                right.append(b.pop(0))
                y *= new[right[-1]]
        found.append((left, right))
    return found


def relabelled(x: Value, shape: Sequence[int]) -> Value | None:
    """Reshape where only axes of size 1 come and go; None where entries move."""
    groups = regrouped(x.shape, shape)
    if any(len(left) > 1 or len(right) > 1 for left, right in groups):
        return None
    if isinstance(x, Parts) and x.shape[x.axis] == 1:
        x = x.values[0]
    order: list[int | None] = [None] * len(shape)
    for (left,), (right,) in groups:
        order[right] = left
    return _along(x, shape, order)

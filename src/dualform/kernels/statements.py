"""What a schedule is made of: statements over buffers, as data.

    Product   C = beta D + alpha A B         one matrix product, the sum it goes into included
    Nest      loops over one index space     entry-by-entry work and the sums over it, row by row, stage after stage

Views cost nothing: a value is a buffer with strides. Nothing here knows a learner, or the language that is printed.

Legend: a space is a shape without its axes of size 1: its last axis is the column, the others lead;
        a stage is one pass over
a row, and what is summed over a row in one stage is at hand in the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LINE = 64  # bytes that rows are padded to


@dataclass(eq=False)
class Buffer:
    """Memory for one value; rows are padded to `align` entries, so that a vector may be read at any place of a row."""

    name: str
    shape: tuple[int, ...]
    align: int
    place: str = "scratch"  # or what the caller keeps: "state", "fixed", ...
    dtype: torch.dtype | None = None  # of the caller's tensor that it is read from
    offset: int = 0
    first: int = -1  # statement that writes it
    last: int = -1  # statement that reads it last
    over: Buffer | None = None  # it is written over this one

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in entries, per axis of the shape."""
        step, found = 1, []
        for n in reversed(self.shape):
            found.append(step if n > 1 else 0)
            if n > 1:
                step *= -(-n // self.align) * self.align if step == 1 and len(space_of(self.shape)) > 1 else n
        return tuple(reversed(found))

    @property
    def size(self) -> int:
        """Entries, padding included."""
        rows = max([s * n for s, n in zip(self.strides, self.shape, strict=True)], default=1)
        return -(-max(rows, 1) // self.align) * self.align


@dataclass(frozen=True)
class View:
    """A value: entries of a buffer."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def along(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides per axis of a space that this value is broadcast to."""
        lead = len(shape) - len(self.shape)
        steps = [0] * lead + [s if n != 1 else 0 for s, n in zip(self.strides, self.shape, strict=True)]
        return tuple(s for s, n in zip(steps, shape, strict=True) if n != 1)


def whole(buffer: Buffer) -> View:
    return View(buffer, buffer.shape, buffer.strides)


def space_of(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


@dataclass(frozen=True)
class Read:
    """An operand in memory: its strides along the loops of a nest."""

    view: View
    steps: tuple[int, ...]


Operand = Any  # Read | Item | float


@dataclass(eq=False)
class Item:
    """One value of a nest: "map" entry by entry, "row" one number per row, "reduce" over the column,
    "total" over other axes."""

    kind: str
    op: str
    operands: list[Operand]
    params: dict[str, Any]
    out: View
    steps: tuple[int, ...]  # of `out`, along the loops
    stage: int = 0
    kept: bool = False  # does anything outside the nest read it?
    axes: tuple[int | None, ...] = ()  # for each axis of the value, the loop that counts it

    @property
    def reads_in(self) -> int:
        """The pass over a row in which it reads."""
        return self.stage - (self.kind == "reduce")


@dataclass(eq=False)
class Nest:
    """Loops over a space, and what is computed in them."""

    space: tuple[int, ...]
    items: list[Item] = field(default_factory=list)

    @property
    def stages(self) -> int:
        return 1 + max((i.stage for i in self.items), default=0)

    def reads(self) -> Iterable[View]:
        return (x.view for i in self.items for x in i.operands if isinstance(x, Read))

    def writes(self) -> Iterable[View]:
        return (i.out for i in self.items if i.kept)

    @property
    def flops(self) -> int:
        """Of matrix products: none."""
        return 0


def entrywise(op: str, out: View, values: Sequence[View | float]) -> Nest:
    """Make a nest of its own for an entry-by-entry function of values in memory, or numbers."""
    operands = [Read(x, x.along(out.shape)) if isinstance(x, View) else x for x in values]
    return Nest(space_of(out.shape), [Item("map", op, operands, {}, out, out.along(out.shape), kept=True)])


@dataclass(eq=False)
class MatrixProduct:
    """out = beta init + alpha a b, for each of `batch` pairs."""

    out: View
    a: View
    b: View
    alpha: float = 1.0
    beta: float = 0.0
    init: View | None = None

    def reads(self) -> Iterable[View]:
        return (self.a, self.b) if self.init is None else (self.a, self.b, self.init)

    def writes(self) -> Iterable[View]:
        return (self.out,)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.out.shape) * self.a.shape[-1]


Statement = Nest | MatrixProduct


@dataclass(eq=False)
class Schedule:
    """Statements in order; where inputs are expected and outputs are left; scratch of `scratch` entries."""

    inputs: list[Buffer]
    outputs: list[View | float]
    statements: list[Statement]
    scratch: int
    align: int
    carried: tuple[int, ...] = ()  # outputs that the next mini-batch starts from
    types: dict[int, torch.dtype] = field(default_factory=dict)  # that outputs are rounded to for the caller

    @property
    def itemsize(self) -> int:
        return LINE // self.align

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products."""
        return sum(s.flops for s in self.statements if isinstance(s, MatrixProduct))

    @property
    def entries(self) -> int:
        """Operations entry by entry, and summands of rows."""
        return sum(math.prod(s.space) * len(s.items) for s in self.statements if isinstance(s, Nest))

    @property
    def _crossing(self) -> list[tuple[int, int]]:
        """Entries of what comes from and goes to the caller with each mini-batch, and bytes of one;
        what stays with a row is not counted."""
        outputs = [(k, x) for k, x in enumerate(self.outputs) if isinstance(x, View) and x.buffer.place == "scratch"]
        types = [(b.shape, b.dtype) for b in self.inputs if b.place == "scratch"]
        types += [(x.shape, self.types.get(k)) for k, x in outputs]
        return [(math.prod(shape), t.itemsize if t else self.itemsize) for shape, t in types]

    @property
    def moved(self) -> int:
        """Entries that come from and go to the caller."""
        return sum(n for n, _ in self._crossing)

    @property
    def nbytes(self) -> int:
        """The same in bytes, each in the type that the caller's tensor has."""
        return sum(n * size for n, size in self._crossing)

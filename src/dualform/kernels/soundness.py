"""Is a schedule sound: in bounds, shaped and typed as its graph, written before read, nothing lost while needed?

Asked between passes under DUALFORM_VERIFY=1, and by tests: the memory is played through,
and every entry of it knows whose it is.

Legend: T when something happens in a nest (row, stage, phase), k by which item; in a phase, columns come in any order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dualform.graphs.edit import inputs_of, results_of
from dualform.kernels.statements import Buffer, Item, MatrixProduct, Nest, Read, Schedule, View, whole

BEFORE, LOOP, AFTER = range(3)  # phases of a stage: per row, per column, per row


class BrokenSchedule(AssertionError):
    """A pass made a schedule that is not sound."""


def verify(s: Schedule, gm: fx.GraphModule | None, name: str, placed: Collection[str] = ()) -> None:
    """Check a schedule by itself and, where it is given, against the graph that it is made of.

    placed: the memories in which values have their places already; in others each has one of its own.
    Raises: BrokenSchedule, naming the pass, the value, what was found and what was expected.
    """
    _Check(s, name, placed).run(gm)


class _Access(NamedTuple):
    """Entries of a buffer that a nest's item reads or writes, and when."""

    buffer: Buffer
    entries: Tensor
    T: Tensor
    column: Tensor
    k: int


class _Check:
    def __init__(self, s: Schedule, name: str, placed: Collection[str]) -> None:
        self.s, self.name, self.placed = s, name, placed
        self.first: dict[Buffer, int] = {}  # a number for each entry of each buffer
        self.holds: dict[Any, Tensor] = {}  # whose entry each place of a memory has
        used = (v.buffer for one in s.statements for v in (*one.reads(), *one.writes()))
        total = 0
        for b in dict.fromkeys((*s.inputs, *used, *(x.buffer for x in s.outputs if isinstance(x, View)))):
            self.first[b], total = total, total + b.size
            key, at = self._place(b)
            if key == "scratch" and at + b.size > s.scratch:
                raise self.fail(b, "ends beyond the scratch memory", f"at most {s.scratch} entries")
            held = self.holds.get(key, torch.empty(0, dtype=torch.long))
            self.holds[key] = torch.full((max(len(held), at + b.size),), -1)

    def fail(self, b: Buffer, what: str, expected: str) -> BrokenSchedule:
        at = f"{b.name} {list(b.shape)} in {b.place} + {b.offset}"
        return BrokenSchedule(f"{self.name}: {at} {what}; expected {expected}. The pass is wrong: please report it.")

    def _place(self, b: Buffer) -> tuple[Any, int]:
        """The memory that a buffer is in, and where."""
        root = b.over or b
        if b.place in self.placed:
            return b.place, root.offset
        return (b.place, id(root)), 0

    def run(self, gm: fx.GraphModule | None) -> None:
        if gm is not None:
            self._like(gm)
        for b in self.s.inputs:
            self._write(b, self._entries(whole(b)))
        for one in self.s.statements:
            if isinstance(one, MatrixProduct):
                self._product(one)
            else:
                self._nest(one)
        for x in self.s.outputs:
            if isinstance(x, View):
                self._read(x.buffer, self._entries(x))

    def _like(self, gm: fx.GraphModule) -> None:
        """Inputs and outputs are shaped and typed as the graph's."""
        inputs = [n.meta["val"] for n in inputs_of(gm.graph)]
        for b, x in zip(self.s.inputs, inputs, strict=True):
            if (b.shape, b.dtype, b.align) != (tuple(x.shape), x.dtype, self.s.align):
                raise self.fail(
                    b, f"is of {b.dtype}, aligned to {b.align}", f"{list(x.shape)} of {x.dtype}, {self.s.align}"
                )
        for x, n in zip(self.s.outputs, results_of(gm.graph), strict=True):
            if isinstance(x, View) and x.shape != tuple(n.meta["val"].shape):
                raise self.fail(x.buffer, f"is returned as {list(x.shape)}", f"{list(n.meta['val'].shape)}")

    def _entries(self, view: View, steps: Sequence[int] | None = None, space: Sequence[int] | None = None) -> Tensor:
        """Number the entries of a view, or those that steps along a space reach, which are entries of it."""
        steps, space = (view.strides, view.shape) if steps is None or space is None else (steps, space)
        if len(steps) != len(space):
            raise self.fail(view.buffer, f"has steps {list(steps)}", f"one for each axis of {list(space)}")
        try:
            return torch.arange(view.buffer.size).as_strided(tuple(space), tuple(steps), view.offset)
        except RuntimeError:
            where = f"is read or written from {view.offset} along {list(steps)} over {list(space)}"
            raise self.fail(view.buffer, where, f"what is inside its {view.buffer.size} entries") from None

    def _at(self, b: Buffer, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The memory that a buffer is in, and the places of entries."""
        key, at = self._place(b)
        return self.holds[key], entries + at

    def _write(self, b: Buffer, entries: Tensor) -> None:
        held, at = self._at(b, entries)
        held[at] = self.first[b] + entries

    def _read(self, b: Buffer, entries: Tensor) -> None:
        held, at = self._at(b, entries)
        self._own(b, held[at], entries)

    def _own(self, b: Buffer, found: Tensor, entries: Tensor) -> None:
        wrong = found != self.first[b] + entries
        if bool(wrong.any()):
            owner = int(found[wrong][0])
            other = next((x.name for x, n in self.first.items() if n <= owner < n + x.size), None)
            what = "is read before it is written" if other in (None, b.name) else f"is read where {other} was written"
            raise self.fail(b, f"{what}, entry {int(entries[wrong][0])}", "its own value")

    def _product(self, p: MatrixProduct) -> None:
        *batch, M, N = p.out.shape
        K, b, out = p.a.shape[-1], p.out.buffer, self._entries(p.out)
        inits = [] if p.init is None else [p.init]
        shapes = [*((x, M, N) for x in inits), (p.a, M, K), (p.b, K, N)]
        for x, *shape in shapes:
            if x.shape[-2:] != tuple(shape) or list(x.shape[:-2]) not in (batch, []):
                raise self.fail(x.buffer, f"is a factor or summand {list(x.shape)}", f"{[*batch, *shape]}")
            entries = self._entries(x)
            self._read(x.buffer, entries)
            if self._place(x.buffer)[0] == self._place(b)[0]:
                read, written = entries + self._place(x.buffer)[1], out + self._place(b)[1]
                if x is p.init:  # each entry is read before it is written
                    read = read[read != written] if read.shape == written.shape else read
                if bool(torch.isin(read, written).any()):
                    raise self.fail(x.buffer, f"is overwritten by {b.name} while it is read", "memory apart")
        self._write(b, out)
        if N > 1 and p.b.strides[-1] == 1 and (rest := -N % b.align):  # whole vectors are written
            beyond = self._entries(View(b, (*batch, M, rest), p.out.strides, p.out.offset + N))
            held, at = self._at(b, beyond)
            held[at] = -1

    def _nest(self, nest: Nest) -> None:
        writes: list[_Access] = []
        for k, item in enumerate(nest.items):
            if item.kind == "total":
                everything = torch.arange(item.out.buffer.size)
                held, at = self._at(item.out.buffer, everything)
                held[at] = -1  # it begins at zero
                for x in writes:
                    if self._place(x.buffer)[0] == self._place(item.out.buffer)[0]:
                        self._apart(x, item.out.buffer, everything)
            elif item.kept:
                phase = {"row": BEFORE, "map": LOOP, "reduce": AFTER}[item.kind]
                new = self._access(nest, item.out, item.steps, phase, item.reads_in, k)
                if set(new.entries.tolist()) != set(self._entries(item.out).flatten().tolist()):
                    raise self.fail(item.out.buffer, "is not written whole", "every entry of its view")
                for x in writes:
                    self._apart(x, new.buffer, new.entries)
                writes.append(new)
        for k, item in enumerate(nest.items):
            phase = BEFORE if item.kind == "row" else LOOP
            for x in item.operands:
                if isinstance(x, Read):
                    found = self._access(nest, x.view, x.steps, phase, item.reads_in, k)
                    if not bool(torch.isin(found.entries.flatten(), self._entries(x.view).flatten()).all()):
                        raise self.fail(x.view.buffer, f"is read along {x.steps}", f"its strides {x.view.strides}")
                    self._in_time(found, writes)
                elif isinstance(x, Item) and x.kind == "map" and x.kept and item.reads_in > x.stage:
                    self._in_time(self._access(nest, x.out, x.steps, phase, item.reads_in, k), writes)
                elif isinstance(x, Item) and (nest.items.index(x) >= k or item.reads_in < x.stage):
                    raise self.fail(
                        x.out.buffer, f"is read by {item.out.buffer.name} before it is made", "the order reversed"
                    )
        for x in writes:
            self._write(x.buffer, x.entries)
        for item in nest.items:
            if item.kind == "total":
                self._write(item.out.buffer, self._entries(item.out))

    def _access(self, nest: Nest, view: View, steps: Sequence[int], phase: int, stage: int, k: int) -> _Access:
        *lead, column = nest.space or (1,)
        space = tuple(nest.space) if phase == LOOP else tuple(lead)
        entries = self._entries(view, steps, space)
        rows = torch.arange(math.prod(lead)).reshape(tuple(lead)) if nest.space else torch.tensor(0)
        T = (rows * nest.stages + stage) * 3 + phase
        by_column = phase == LOOP and bool(nest.space)
        columns = torch.arange(column).expand(space) if by_column else torch.zeros(space, dtype=torch.long)
        T = (T.unsqueeze(-1) if by_column else T).expand(space)
        return _Access(view.buffer, entries.flatten(), T.flatten(), columns.flatten(), k)

    def _apart(self, x: _Access, b: Buffer, entries: Tensor) -> None:
        """Two values of one nest are in two places."""
        (own, at), (other, there) = self._place(x.buffer), self._place(b)
        if own == other and bool(torch.isin(x.entries + at, entries + there).any()):
            raise self.fail(x.buffer, f"and {b.name} are written to one place", "memory apart")

    def _in_time(self, r: _Access, writes: Iterable[_Access]) -> None:
        """What a read finds is its own: what lay there before the nest, or what this has written there last."""
        key, at = self._place(r.buffer)
        places = r.entries + at
        found = self.holds[key][places]
        for w in writes:
            other, there = self._place(w.buffer)
            if other != key:
                continue
            when = torch.full((len(self.holds[key]), 3), -1)
            when[w.entries + there] = torch.stack([w.T, w.column, w.entries], -1)
            T, column, entry = when[places].unbind(-1)
            beside = (T == r.T) & (column != r.column)
            if bool(beside.any()):
                raise self.fail(
                    r.buffer, f"is read in one column where {w.buffer.name} is written in another", "memory apart"
                )
            earlier = (T >= 0) & ((T < r.T) | ((T == r.T) & (w.k < r.k)))
            found = torch.where(earlier, self.first[w.buffer] + entry, found)
        self._own(r.buffer, found, r.entries)

"""Functions laid out in memory, for walkers over statements: where values lie that stay, what moves before and after.

Nothing here is text: a dialect spells the moves. A walker over tiles, whose values live in registers, needs none of it.

Legend: slot, the memory of one mini-batch of a row (state, kept values); the rest of a row stays from block to block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dualform.graphs.verify import is_on
from dualform.kernels.schedule import schedule
from dualform.kernels.soundness import verify
from dualform.kernels.statements import LINE, Buffer, View, whole
from dualform.kernels.targets import EACH, ROW, Direction, Function, Kinds, What, label, place_of
from dualform.learning.backends import BackendError
from dualform.learning.plan import Input

# Places of an argument along n, beside `EACH` and `ROW`: what a group, or that from mini-batch n on, starts from.
GROUP, CHECKPOINT = "group", "checkpoint"
# Memory of a row, of a mini-batch of it; all else is scratch memory, or the caller's.
PLACES = ("fixed", "state", "kept", "passed", "cotangent", "sums")


class Load(NamedTuple):
    """A caller's tensor into a buffer."""

    out: View
    argument: int
    dtype: torch.dtype
    where: str
    turn: int = 0  # 1 or -1: that of the next or the last mini-batch is needed soon
    unless: int | None = None  # not where it is the memory of that argument


class Store(NamedTuple):
    """A value, or a number, into a caller's tensor."""

    value: View | float
    shape: tuple[int, ...]
    argument: int
    dtype: torch.dtype
    where: str


class Write(NamedTuple):
    """A value to another place, "copy", or added to what is there, "plus"."""

    op: str
    out: View
    value: View | float


class Clear(NamedTuple):
    """Zeros for the sums."""

    entries: int


class Address(NamedTuple):
    """A state that stays with the caller: its place is that of an argument, ("after", k)."""

    place: str
    argument: int


Move = Load | Store | Write | Clear | Address


@dataclass
class Layout:
    """What all functions share: the caller's arguments, and where values lie that stay from function to function."""

    dtype: torch.dtype
    kinds: Kinds = ()
    arguments: list[tuple[str, What]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # entries of each place
    offsets: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def align(self) -> int:
        return LINE // self.dtype.itemsize

    @property
    def slot(self) -> int:
        """Entries of a mini-batch's own memory: its state, then what is kept."""
        return self.sizes.get("state", 0) + self.sizes.get("kept", 0)

    def number(self, role: str, what: What) -> int:
        if (role, what) not in self.arguments:
            self.arguments.append((role, what))
        return self.arguments.index((role, what))

    def settle(self, b: Buffer) -> Buffer:
        """Give a buffer its place: that of its name."""
        if b.place in PLACES:
            size = self.sizes.get(b.place, 0)
            self.offsets.setdefault((b.place, b.name), size)
            b.offset = self.offsets[b.place, b.name]
            self.sizes[b.place] = max(size, b.offset + b.size)
        return b

    def buffer(self, place: str, name: str, shape: Sequence[int]) -> Buffer:
        return self.settle(Buffer(name, tuple(shape), self.align, place))

    def load(self, b: Buffer, role: str, what: What, where: str, turn: int = 0, unless: int | None = None) -> Load:
        return Load(whole(b), self.number(role, what), b.dtype or self.dtype, where, turn, unless)

    def store(self, value: View | float, shape: Sequence[int], role: str, what: What, where: str) -> Store:
        return Store(value, tuple(shape), self.number(role, what), self.kind(role, what), where)

    def kind(self, role: str, what: What) -> torch.dtype:
        """Say what an argument that is written is made of."""
        token = (what.part, what.name) if isinstance(what, Input) and what.over == "block" else (role, "")
        return dict(self.kinds).get(token, self.dtype)


def after(k: int) -> str:
    """Name the place of a state that stays with the caller."""
    return f"after{k}"


class Body:
    """A function as statements over buffers; made first, its moves when all of its direction are."""

    def __init__(self, function: Function, layout: Layout, there: Mapping[Input, int]) -> None:
        """there: states that stay with the caller, and their numbers."""
        self.function, self.layout = function, layout
        self.sources, self.targets, self.shapes = function.sources, function.targets, function.result_shapes
        self.there = [there[x] for x in self.sources if x in there]
        over = {k: self.sources.index(t.what) for k, t in enumerate(self.targets) if t.is_carried}
        self.beside = any(t.kind == "next" for t in self.targets)  # is the next state written one slot further?
        stay = {k: t.kind for k, t in enumerate(self.targets) if t.stays}
        places = [after(there[x]) if x in there else place_of(x) for x in self.sources]
        names = [label(x) for x in self.sources]
        self.schedule = schedule(function.graph, layout.align, places, names, over, self.beside, stay)
        self.schedule.carried = tuple(over)
        self.schedule.types = {k: layout.kind(*t.what[:2]) for k, t in enumerate(self.targets) if t.kind == "given"}
        for x, b in zip(self.sources, self.schedule.inputs, strict=True):
            b.dtype = dict(layout.kinds).get((x.part, x.name), b.dtype)
            if x not in there:
                layout.settle(b)
        for k in stay:
            x, target = self.schedule.outputs[k], self._stays(k)
            if isinstance(x, View) and x.buffer.place == target.place:
                x.buffer.offset = target.offset
        if is_on():
            verify(self.schedule, None, f"layout of {function.name}", ("scratch", *PLACES))
        self._check()

    def _check(self) -> None:
        """Check that no new state is another one's old value, which is written over one by one."""
        moves = {k: self.buffer(t.what) for k, t in enumerate(self.targets) if t.is_carried}
        for k, own in moves.items():
            x = self.schedule.outputs[k]
            if isinstance(x, View) and x.buffer is not own and x.buffer in moves.values():
                raise BackendError(
                    "cpp: a rule exchanges states as they are; expected new values. Use backend='eager'."
                )

    def _stays(self, k: int) -> Buffer:
        kind, what = self.targets[k]
        return self.layout.buffer(kind, label(Input(kind, what, "block")), self.shapes[k])

    def buffer(self, source: Input) -> Buffer:
        return self.schedule.inputs[self.sources.index(source)]

    def place(self) -> None:
        """Say what moves before the statements and after them; number the arguments."""
        self.addresses = [Address(after(k), self.layout.number("after", k)) for k in self.there]
        # others may yet read the old values of what is carried
        order = sorted(range(len(self.targets)), key=lambda k: self.targets[k].is_carried)
        self.last = [move for k in order for move in self._leave(k)]
        self.first = [*self.addresses, *self.loads("scratch", EACH, self.function.turn)]

    def loads(self, place: str, where: str, turn: int = 0) -> list[Load]:
        """Load what is read of the inputs that are held somewhere."""
        s = self.schedule
        read = {v.buffer for one in s.statements for v in one.reads()}
        read |= {x.buffer for x in s.outputs if isinstance(x, View)}
        pairs = zip(s.inputs, self.sources, strict=True)
        return [self.layout.load(b, "input", x, where, turn) for b, x in pairs if b.place == place and b in read]

    def _leave(self, k: int) -> list[Move]:
        """Put output k where it goes."""
        target, x, shape, layout = self.targets[k], self.schedule.outputs[k], self.shapes[k], self.layout
        if target.kind == "given":
            role, what, where = target.what
            return [layout.store(x, shape, role, what, where)]
        if target.kind == "added":
            return [Write("plus", whole(layout.buffer("sums", label(target.what), shape)), x)]
        if target.stays:
            return [Write("copy", whole(self._stays(k)), x)]
        old = self.buffer(target.what)
        if target.kind == "over":
            return [Write("copy", whole(old), x)]
        if isinstance(x, View) and x.buffer.place == "next":
            return []
        return [Write("copy", whole(Buffer(old.name, old.shape, layout.align, "next", over=old)), x)]


class Frame:
    """A direction laid out: its functions, and what a row does around them.

    begin, end: of a row. keep: the state that mini-batch n starts from. enter: load the state that a group starts from.
    """

    def __init__(self, d: Direction, functions: Sequence[Function]) -> None:
        self.layout, self.shapes = Layout(d.dtype, d.kinds), d.step.shapes
        self.over = [t.what for t in d.step.targets if t.kind == "over"]
        self.keep, self.enter = list[Move](), list[Move]()
        states = {x: self._state(k, x) for k, x in enumerate(d.held("state"))} if d.advance is None else {}
        there = {x: k for k, (x, b) in enumerate(states.items()) if b.place != "state"}
        self.bodies = [Body(f, self.layout, there) for f in functions]
        self.parts = {f"{body.function.name}:": body.schedule for body in self.bodies}
        self.scratch = max(s.scratch for s in self.parts.values())
        for body in self.bodies:
            body.place()
        self.addresses = [x for body in self.bodies for x in body.addresses]  # of states that stay with the caller
        self.sums = {x: self.layout.buffer("sums", label(x), self.shapes[x]) for x in d.summed}
        fixed = {x.argument: x for body in self.bodies for x in body.loads("fixed", ROW)}
        self.begin: list[Move] = [*fixed.values(), *self.addresses]
        self.end = self._forward(states) if d.advance is None else self._backward(d)

    def size(self, place: str) -> int:
        return self.layout.sizes.get(place, 0)

    def _state(self, k: int, x: Input) -> Buffer:
        """Make a state's buffer; one that the caller lays out alike stays with the caller."""
        b = Buffer(label(x), self.shapes[x], self.layout.align, "state")
        plain = torch.empty(b.shape, device="meta").stride()
        alike = all(n == 1 or s == t for n, s, t in zip(b.shape, b.strides, plain, strict=True))
        if x in self.over and alike and b.size == math.prod(b.shape):
            b.place = after(k)
        return b

    def _forward(self, states: Mapping[Input, Buffer]) -> list[Move]:
        layout, end = self.layout, []
        for k, b in enumerate(states.values()):
            same = layout.number("before", k), layout.number("after", k)
            stays = layout.settle(b).place != "state"
            self.begin.append(layout.load(b, "before", k, ROW, unless=same[1] if stays else None))
        for k, (x, b) in enumerate(states.items()):
            self.keep.append(layout.store(whole(b), b.shape, "kept", k, CHECKPOINT))
            if b.place == "state" and x in self.over:
                end.append(layout.store(whole(b), b.shape, "after", k, ROW))
        return end

    def _backward(self, d: Direction) -> list[Move]:
        layout, bodies = self.layout, self.bodies
        turned = {x: layout.buffer("cotangent", label(x), self.shapes[x]) for x in d.held("cotangent")}
        self.begin += [layout.load(b, "cotangent", k, ROW) for k, b in enumerate(turned.values())]
        self.begin.append(Clear(self.size("sums")))
        states = (bodies[0].buffer(x) for x in d.held("state"))  # where `advance` reads them
        self.enter += [layout.load(b, "kept", k, GROUP) for k, b in enumerate(states)]
        ends = [("turned", k, turned[x]) for k, x in enumerate(self.over)]
        ends += [("gradient", x, b) for x, b in self.sums.items()]
        return [layout.store(whole(b), b.shape, role, what, ROW) for role, what, b in ends]

"""A function over one mini-batch: what it reads, its statements, where its results go.

Legend: slot, the memory of one mini-batch of a row (state, kept values); the rest of a row's memory stays from block to block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from dualform.kernels import cpp
from dualform.kernels.schedule import schedule
from dualform.kernels.statements import LINE, Buffer, View, whole
from dualform.learning.backends import BackendError
from dualform.learning.plan import Input

WHERE, START = "n, b, h", "0, b, h"
ARGUMENTS = "const Arg* g, long n, long b, long h, T* s, T* f, T* st, T* kp, T* ps, T* ct, T* acc"
CALL = "g, n, b, h, s, f, st, {kp}, {ps}, ct, acc"

STAYS = ("kept", "passed")  # with a mini-batch

Argument = tuple[str, Any]
# What the caller's tensors are made of, where that is not what is computed in: ((part, name) of an `Input`, type), ...
Kinds = tuple[tuple[tuple[str, str], torch.dtype], ...]


class Target(NamedTuple):
    """Where an output goes.

    "given" to the caller, as argument `what` | "over" input `what`, which it replaces | "next": what the next mini-batch has as
    input `what` | "added" to the sum of argument `what` | "kept" with the state by name, or "passed" on to what comes after
    """

    kind: str
    what: Any


def place_of(x: Input) -> str:
    """Say where an input is held."""
    if x.part in ("th", "R"):
        return "state"
    if x.part == "cotangent":
        return "scratch" if x.name == "0" else "cotangent"
    if x.part in STAYS:
        return x.part
    return "scratch" if x.over == "block" else "fixed"


def label(x: Input) -> str:
    """Name an input's buffer."""
    return f"{x.part}_{x.name}".replace(".", "_") if x.name != x.part else x.name


@dataclass
class Layout:
    """What all pieces share: the caller's arguments, and where values lie that stay from piece to piece."""

    dtype: torch.dtype
    kinds: Kinds = ()
    arguments: list[Argument] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # entries of each place
    offsets: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def align(self) -> int:
        return LINE // self.dtype.itemsize

    @property
    def slot(self) -> int:
        """Entries of a mini-batch's own memory: its state, then what is kept."""
        return self.sizes.get("state", 0) + self.sizes.get("kept", 0)

    def number(self, role: str, what: Any) -> int:
        if (role, what) not in self.arguments:
            self.arguments.append((role, what))
        return self.arguments.index((role, what))

    def settle(self, b: Buffer) -> Buffer:
        """Give a buffer its place: that of its name."""
        if b.place not in ("scratch", "next"):
            size = self.sizes.get(b.place, 0)
            self.offsets.setdefault((b.place, b.name), size)
            b.offset = self.offsets[b.place, b.name]
            self.sizes[b.place] = max(size, b.offset + b.size)
        return b

    def buffer(self, place: str, name: str, shape: Sequence[int]) -> Buffer:
        return self.settle(Buffer(name, tuple(shape), self.align, place))

    def load(self, buffer: Buffer, role: str, what: Any, where: str, ahead: str = "0") -> str:
        return cpp.load_text(whole(buffer), self.number(role, what), buffer.dtype or self.dtype, where, ahead)

    def store(self, view: View | float, shape: Sequence[int], role: str, what: Any, where: str) -> str:
        return cpp.store_text(view, shape, self.number(role, what), self.kind(role, what), where)

    def kind(self, role: str, what: Any) -> torch.dtype:
        """Say what an argument that is written is made of."""
        token = (what.part, what.name) if role == "gradient" and what.over == "block" else (role, "")
        return dict(self.kinds).get(token, self.dtype)


class Piece:
    """A graph as a function of the generated source; made first, printed when all of its unit are."""

    def __init__(
        self, name: str, graph: fx.GraphModule, sources: Sequence[Input], targets: Sequence[Target], layout: Layout,
        there: Mapping[Input, str] | None = None,
    ) -> None:  # fmt: skip
        """there: inputs that stay with the caller, and the variable that has the address."""
        self.name, self.sources, self.targets, self.layout = name, sources, targets, layout
        over = {k: list(sources).index(t.what) for k, t in enumerate(targets) if t.kind in ("over", "next")}
        beside = any(t.kind == "next" for t in targets)
        stay = {k: t.kind for k, t in enumerate(targets) if t.kind in STAYS}
        places = [(there or {}).get(x, place_of(x)) for x in sources]
        names = [label(x) for x in sources]
        self.schedule = schedule(graph, layout.align, places, names, over, beside, stay)
        self.schedule.carried = tuple(over)
        self.schedule.types = {k: layout.kind(*t.what[:2]) for k, t in enumerate(targets) if t.kind == "given"}
        for x, b in zip(sources, self.schedule.inputs, strict=True):
            b.dtype = dict(layout.kinds).get((x.part, x.name), b.dtype)
        (output,) = [n for n in graph.graph.nodes if n.op == "output"]
        self.shapes = [tuple(x.meta["val"].shape) if isinstance(x, fx.Node) else () for x in output.args[0]]  # pyright: ignore
        for x, b in zip(sources, self.schedule.inputs, strict=True):
            if x not in (there or {}):
                layout.settle(b)
        for k in stay:
            x, target = self.schedule.outputs[k], self._stays(k)
            if isinstance(x, View) and x.buffer.place == target.place:
                x.buffer.offset = target.offset
        self._check()

    def _check(self) -> None:
        """Check that no new state is another one's old value, which is written over one by one."""
        moves = {k: self.buffer(t.what) for k, t in enumerate(self.targets) if t.kind in ("over", "next")}
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
        return self.schedule.inputs[list(self.sources).index(source)]

    @property
    def used(self) -> set[Buffer]:
        """The inputs that are read."""
        s = self.schedule
        read = {v.buffer for one in s.statements for v in one.reads()}
        return {b for b in s.inputs if b in read | {x.buffer for x in s.outputs if isinstance(x, View)}}

    def _loads(self, turn: str) -> Iterable[str]:
        for b, x in zip(self.schedule.inputs, self.sources, strict=True):
            if b.place == "scratch" and b in self.used:
                yield self.layout.load(b, "input", x, WHERE, turn + "g[{0}].sn")

    def _leave(self, k: int) -> list[str]:
        """Put output k where it goes."""
        target, x, shape, layout = self.targets[k], self.schedule.outputs[k], self.shapes[k], self.layout
        if target.kind == "given":
            role, what, where = target.what
            return [layout.store(x, shape, role, what, where)]
        if target.kind == "added":
            return cpp.add_text(whole(layout.buffer("sums", label(target.what), shape)), x)
        if target.kind in STAYS:
            return cpp.copy_text(whole(self._stays(k)), x)
        old = self.buffer(target.what)
        if target.kind == "over":
            return cpp.copy_text(whole(old), x)
        if isinstance(x, View) and x.buffer.place == "next":
            return []
        return cpp.copy_text(whole(Buffer(old.name, old.shape, layout.align, "next", over=old)), x)

    def text(self, turn: str, head: Iterable[str] = ()) -> str:
        """Print the function. turn: whose turn is next, "" the later mini-batch's or "-" the earlier's."""
        late = ("over", "next")  # others may yet read the old values
        order = sorted(range(len(self.targets)), key=lambda k: self.targets[k].kind in late)
        left = [line for k in order for line in self._leave(k)]
        beside = [f"T* nx = st + {self.layout.slot};"] if any(t.kind == "next" for t in self.targets) else []
        return cpp.function(
            self.name, ARGUMENTS, [*head, *beside, *self._loads(turn), *cpp.statements(self.schedule), *left]
        )


def stays_there(b: Buffer) -> bool:
    """Does the caller lay a value out as its buffer does?"""
    plain = torch.empty(b.shape, device="meta").stride()
    return b.size == math.prod(b.shape) and all(
        n == 1 or s == t for n, s, t in zip(b.shape, b.strides, plain, strict=True)
    )

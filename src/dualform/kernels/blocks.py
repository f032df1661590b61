"""Both directions of a step as C++ functions over rows: what is read, carried, kept and given back per mini-batch.

    forward    for each row: state <- start; per mini-batch: keep the state where asked, then the step
    backward   for each row, group by group from the last: states of the group again from its first, and what else the vjp
               begins with (`sharing`), then the vjp in reverse

Legend: n mini-batches of one call, G per kept state, P = B H rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dualform.kernels import cpp
from dualform.kernels.lowering import lowered
from dualform.kernels.report import Bound, bound, describe
from dualform.kernels.schedule import schedule
from dualform.kernels.sharing import shared
from dualform.kernels.statements import LINE, Buffer, Schedule, View, whole
from dualform.learning.backends import BackendError
from dualform.learning.derive import only_outputs
from dualform.learning.scan import Input

WHERE, START = "n, b, h", "0, b, h"


Argument = tuple[str, Any]
# What the caller's tensors are made of, where that is not what is computed in: ((part, name) of an `Input`, type), ...
Kinds = tuple[tuple[tuple[str, str], torch.dtype], ...]


@dataclass(frozen=True)
class Unit:
    """A function in C++ and what its arguments are: pairs (role, what), in order; and its memory in entries."""

    text: str
    parts: dict[str, Schedule]
    arguments: tuple[Argument, ...]
    memory: int  # per thread, without the states of a group
    state: int  # entries of one state, and of what is kept with it

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products, for one mini-batch of one row."""
        return sum(s.flops for s in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes that come from and go to the caller's tensors, for one mini-batch of one row."""
        return sum(s.nbytes for s in self.parts.values())

    @property
    def memory_bytes(self) -> int:
        """Scratch memory of a thread, without the states of a group."""
        return self.memory * next(iter(self.parts.values())).itemsize

    def bound(self, flops_per_second: float, bytes_per_second: float) -> Bound:
        """Say below which time a mini-batch of a row cannot go on a machine of such rates, and what sets it."""
        return bound(self.flops, self.nbytes, flops_per_second, bytes_per_second)

    def __str__(self) -> str:
        parts = [f"{name}\n{describe(s)}" for name, s in self.parts.items()]
        kept = self.memory_bytes * self.state // self.memory if self.memory else 0
        states = f", and {kept:,} for each state of a group" if kept else ""
        return "\n".join([*parts, f"memory of a thread: {self.memory_bytes:,} bytes{states}"])


def _keep(inputs: Sequence[Input]) -> Callable[[int], str]:
    def place(i: int) -> str:
        x = inputs[i]
        if x.part in ("th", "R"):
            return "state"
        if x.part == "cotangent":
            return "scratch" if x.name == "0" else "cotangent"
        if x.part == "kept":
            return "kept"
        return "scratch" if x.over == "block" else "fixed"

    return place


def _over(inputs: Sequence[Input], first: int) -> dict[int, int]:
    """Let each new state, from output `first` on, be written over the old one."""
    states = [i for i, x in enumerate(inputs) if x.part in ("th", "R")]
    return {first + k: i for k, i in enumerate(states)}


@dataclass
class _Writer:
    """Collects arguments, and the text that moves them."""

    dtype: torch.dtype
    kinds: dict[tuple[str, str], torch.dtype]
    arguments: list[tuple[str, Any]] = field(default_factory=list)

    def number(self, role: str, what: Any) -> int:
        if (role, what) not in self.arguments:
            self.arguments.append((role, what))
        return self.arguments.index((role, what))

    def load(self, buffer: Buffer, role: str, what: Any, where: str, ahead: str = "0") -> str:
        return cpp.load_text(whole(buffer), self.number(role, what), buffer.dtype or self.dtype, where, ahead)

    def store(self, view: View | float, shape: Sequence[int], role: str, what: Any, where: str) -> str:
        token = (what.part, what.name) if role == "gradient" and what.over == "block" else (role, "")
        return cpp.store_text(view, shape, self.number(role, what), self.kinds.get(token, self.dtype), where)


def _typed(s: Schedule, inputs: Sequence[Input], kinds: Kinds) -> Schedule:
    """Note what the caller's tensors are made of."""
    for b, x in zip(s.inputs, inputs, strict=True):
        b.dtype = dict(kinds).get((x.part, x.name), b.dtype)
    return s


def _used(s: Schedule) -> list[Buffer]:
    read = {v.buffer for one in s.statements for v in one.reads()} | {
        x.buffer for x in s.outputs if isinstance(x, View)
    }
    return [b for b in s.inputs if b in read]


def _settle(schedules: Sequence[Schedule], place: str) -> int:
    """Give the inputs that stay somewhere the same place in all schedules; return its size."""
    size, at = 0, {}
    for s in schedules:
        for b in s.inputs:
            if b.place == place:
                if b.name not in at:
                    at[b.name], size = size, size + b.size
                b.offset = at[b.name]
    return size


def _own_state(after: Sequence[View | float], states: Sequence[Buffer]) -> None:
    """Check that no new state is another one's old value, which is written over one by one."""
    for k, x in enumerate(after):
        if isinstance(x, View) and x.buffer in states and (k >= len(states) or x.buffer is not states[k]):
            raise BackendError("cpp: a rule exchanges states as they are; expected new values. Use backend='eager'.")


def _in_place(states: Sequence[Buffer], w: _Writer) -> list[str]:
    """Let states that the caller lays out as a buffer stay with the caller, where they are left; return their addresses."""
    lines = []
    for k, b in enumerate(states):
        plain = torch.empty(b.shape, device="meta").stride()
        if b.size == math.prod(b.shape) and all(
            n == 1 or s == t for n, s, t in zip(b.shape, b.strides, plain, strict=True)
        ):
            b.place = f"after{k}"
            lines.append(f"T* {b.place} = at<T>(g[{w.number('after', k)}], {START});")
    return lines


def _load_blocks(w: _Writer, s: Schedule, inputs: Sequence[Input], turn: str) -> list[str]:
    """Load what a mini-batch reads; the one whose turn is next ("" the later, "-" the earlier) is fetched meanwhile."""
    used = _used(s)
    return [
        w.load(b, "input", x, WHERE, turn + "g[{0}].sn")
        for b, x in zip(s.inputs, inputs, strict=True) if b.place == "scratch" and b in used
    ]  # fmt: skip


ARGUMENTS = "const Arg* g, long n, long b, long h, T* s, T* f, T* st, T* ct, T* acc"
CALL = "g, {0}, b, h, s, f, {1}, ct, acc"
HEAD = (
    "static void rows(long lo, long hi, long H, long count, long G, long phase, const Arg* g, T* s) {\n  Flush flush;"
)
RUN = """
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long memory, long threads) {
  parallel(threads, [=](long k) { rows(P * k / threads, P * (k + 1) / threads, H, count, G, phase, g, s + k * memory); });
}"""


def forward_unit(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, name: str, kinds: Kinds = ()
) -> Unit:
    """Write the forward direction: (inputs of a block, state) -> (outputs, state)."""
    align = LINE // dtype.itemsize
    s = _typed(schedule(lowered(plain), align, _keep(inputs), _over(inputs, 1)), inputs, kinds)
    s.carried, s.types = tuple(range(1, len(s.outputs))), {0: dict(kinds).get(("o", ""), dtype)}
    states = [b for b in s.inputs if b.place == "state"]
    w = _Writer(dtype, dict(kinds))
    o, *after = s.outputs
    same = len(after) == len(states)
    there = _in_place(states, w) if same else []
    state, fixed = _settle([s], "state"), _settle([s], "fixed")
    _own_state(after, states)
    body = [*there, *_load_blocks(w, s, inputs, ""), *cpp.statements(s)]
    body.append(w.store(o, _shape(plain, 0), "o", None, WHERE))
    for k, x in enumerate(after):
        if same:
            body += cpp.copy_text(whole(states[k]), x)
        else:
            body.append(w.store(x, _shape(plain, 1 + k), "after", k, START))
    rows = [
        w.load(b, "input", x, START)
        for b, x in zip(s.inputs, inputs, strict=True)
        if b.place == "fixed" and b in _used(s)
    ]
    rows += there
    for k, b in enumerate(states):
        other = f"if (g[{w.number('before', k)}].p != g[{w.number('after', k)}].p) " if b.place != "state" else ""
        rows.append(other + w.load(b, "before", k, START))
    kept = [w.store(whole(b), b.shape, "kept", k, "(n + phase) / G, b, h") for k, b in enumerate(states)]
    ends = [w.store(whole(b), b.shape, "after", k, START) for k, b in enumerate(states) if same and b.place == "state"]
    main = [
        HEAD, f"T *f = s + {s.scratch}, *st = f + {fixed}, *ct = st + {state}, *acc = ct;",
        "for (long row = lo; row < hi; ++row) {", "long b = row / H, h = row % H;", *rows,
        "for (long n = 0; n < count; ++n) {", "if (G && (n + phase) % G == 0) {", *kept, "}",
        f"step({CALL.format('n', 'st')});", "}", *ends, "}", "}",
    ]  # fmt: skip
    text = cpp.source(dtype, [f"// {name}, forward", cpp.function("step", ARGUMENTS, body), cpp.indented(main), RUN])
    return Unit(text, {"forward:": s}, tuple(w.arguments), s.scratch + fixed + state, state)


def backward_unit(
    plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
    dtype: torch.dtype, name: str, kinds: Kinds = (),
) -> Unit:  # fmt: skip
    """Write the backward direction: (inputs, kept states, cotangents) -> gradients of the inputs that have one."""
    align = LINE // dtype.itemsize
    again, turned_back, kept = shared(lowered(only_outputs(plain, slice(1, None))), lowered(reverse), len(inputs))
    both = [
        *inputs, *(Input("cotangent", str(k), "block") for k in range(outputs)), *(Input("kept", str(k), "block") for k in range(kept))
    ]  # fmt: skip
    advance = schedule(again, align, _keep(inputs), _over(inputs, 0), beside=True, kept=kept)
    _typed(advance, inputs, kinds)
    wanted = [x for x, want in zip(inputs, wants, strict=True) if want]
    turning = [k for k, x in enumerate(wanted) if x.part in ("th", "R")]
    carrying = [i for i, x in enumerate(both) if x.part == "cotangent" and x.name != "0"]
    over = dict(zip(turning, carrying, strict=True)) if len(turning) == len(carrying) else {}
    back = _typed(schedule(turned_back, align, _keep(both), over), both, kinds)
    back.types = {k: dict(kinds).get((x.part, x.name), dtype) for k, x in enumerate(wanted) if x.over == "block"}
    state, fixed = _settle([back, advance], "state"), _settle([back, advance], "fixed")
    cotangents, slot = _settle([back], "cotangent"), state + _settle([back], "kept")
    w = _Writer(dtype, dict(kinds))
    states = [b for b in back.inputs if b.place == "state"]
    after, keeps = advance.outputs[: len(advance.outputs) - kept], advance.outputs[len(advance.outputs) - kept :]
    places = [b for b in back.inputs if b.place == "kept"]
    for b, x in zip(places, keeps, strict=True):
        if isinstance(x, View) and x.buffer.place == "kept":
            x.buffer.offset = b.offset
    forth = [
        f"T *kp = st + {state}, *nx = st + {slot};",
        *_load_blocks(w, advance, inputs, ""),
        *cpp.statements(advance),
    ]
    for b, x in zip(places, keeps, strict=True):
        forth += cpp.copy_text(whole(b), x)
    held = [b for b in advance.inputs if b.place == "state"]
    _own_state(after, held)
    same = len(after) == len(states)
    if same:
        for b, x in zip(held, after, strict=True):
            if not (isinstance(x, View) and x.buffer.place == "next"):
                forth += cpp.copy_text(whole(Buffer(b.name, b.shape, align, "next", over=b)), x)
    body = [f"T* kp = st + {state};", *_load_blocks(w, back, both, "-"), *cpp.statements(back)]
    carried = [b for b in back.inputs if b.place == "cotangent"]
    sums, size, results, ends, turned = [], 0, [], [], []
    shapes = [b.shape for b, want in zip(back.inputs, wants, strict=False) if want]
    at = 0
    for x, value, shape in zip(wanted, back.outputs, shapes, strict=True):
        if x.part in ("th", "R"):
            if same:
                turned += cpp.copy_text(whole(carried[at]), value)
            else:
                results.append(w.store(value, shape, "turned", at, START))
            at += 1
        elif x.over == "block":
            results.append(w.store(value, shape, "gradient", x, WHERE))
        else:
            total = Buffer(f"sum_{x.name}", tuple(shape), align, "sums", offset=size)
            size += total.size
            sums.append(total)
            results += cpp.add_text(whole(total), value)
            ends.append(w.store(whole(total), shape, "gradient", x, START))
    if same:
        ends += [w.store(whole(b), b.shape, "turned", k, START) for k, b in enumerate(carried)]
    used = {b.name for s in (back, advance) for b in _used(s)}
    rows = [
        w.load(b, "input", x, START) for b, x in zip(back.inputs, both, strict=True) if b.place == "fixed" and b.name in used
    ]  # fmt: skip
    rows += [w.load(b, "cotangent", k, START) for k, b in enumerate(carried)]
    rows += [f"for (long e = 0; e < {size}; ++e) acc[e] = 0;"]
    starts = [w.load(b, "kept", k, "group, b, h") for k, b in enumerate(states)]
    scratch = max(back.scratch, advance.scratch)
    main = [
        HEAD,
        f"T *f = s + {scratch}, *ct = f + {fixed}, *acc = ct + {cotangents}, *ring = acc + {size};",
        "for (long row = lo; row < hi; ++row) {", "long b = row / H, h = row % H;", *rows,
        "for (long group = (count - 1) / G; group >= 0; --group) {",
        "long first = group * G, last = first + G < count ? first + G : count;", "T* st = ring;", *starts,
        f"for (long n = first; n < last; ++n, st += {slot}) advance({CALL.format('n', 'st')});",
        f"for (long n = last - 1; n >= first; --n) step({CALL.format('n', f'(st -= {slot})')});", "}", *ends, "}", "}",
    ]  # fmt: skip
    functions = [cpp.function("advance", ARGUMENTS, forth), cpp.function("step", ARGUMENTS, [*body, *results, *turned])]
    text = cpp.source(dtype, [f"// {name}, backward", *functions, cpp.indented(main), RUN])
    advance.carried = tuple(range(len(after)))
    back.carried = tuple(turning)
    parts = {"a state again:": advance, "in reverse:": back}
    return Unit(text, parts, tuple(w.arguments), scratch + fixed + cotangents + size, slot)


def _shape(gm: fx.GraphModule, k: int) -> tuple[int, ...]:
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    return tuple(output.args[0][k].meta["val"].shape)


__all__ = ["Argument", "Kinds", "Unit", "backward_unit", "forward_unit"]

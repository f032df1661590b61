"""Both directions of a step as C++ functions over rows: what is read, carried, kept and given back per mini-batch.

    forward    for each row: state <- start; per mini-batch: keep the state where asked, then the step
    backward   for each row, group by group from the last: states of the group again from its first, and what else the vjp
               begins with (`sharing`), then the vjp in reverse

Rows run beside each other; where there are fewer rows than threads, `pipeline` runs mini-batches beside each other, too.
Legend: n mini-batches of one call, G per kept state, P = B H rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from dualform.kernels import cpp
from dualform.kernels.lowering import lowered
from dualform.kernels.pieces import (
    CALL,
    START,
    WHERE,
    Argument,
    Kinds,
    Layout,
    Piece,
    Target,
    label,
    place_of,
    stays_there,
)  # fmt: skip
from dualform.kernels.report import Bound, bound, describe
from dualform.kernels.sharing import shared
from dualform.kernels.statements import Buffer, Schedule, whole
from dualform.learning.derive import only_outputs
from dualform.learning.plan import Input


@dataclass(frozen=True)
class Unit:
    """A function in C++ and what its arguments are: pairs (role, what), in order; and its memory in entries."""

    text: str
    parts: dict[str, Schedule]
    arguments: tuple[Argument, ...]
    memory: int  # per thread, and per row where rows share threads; without slots
    slot: int  # of a mini-batch in a group: its state, and what is kept with it

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
        kept = self.memory_bytes * self.slot // self.memory if self.memory else 0
        states = f", and {kept:,} for each state of a group" if kept else ""
        return "\n".join([*parts, f"memory of a thread: {self.memory_bytes:,} bytes{states}"])


def _state(inputs: Sequence[Input]) -> list[Input]:
    return [x for x in inputs if x.part in ("th", "R")]


def forward_targets(inputs: Sequence[Input], results: int) -> list[Target]:
    """Say where (output, state) of a step go: each new state over the old one, if there are as many."""
    states = _state(inputs)
    if results - 1 == len(states):
        after = [Target("over", x) for x in states]
    else:
        after = [Target("given", ("after", k, START)) for k in range(results - 1)]
    return [Target("given", ("o", None, WHERE)), *after]


def backward_targets(inputs: Sequence[Input], wants: Sequence[bool], cotangents: Sequence[Input]) -> list[Target]:
    """Say where gradients go: of a mini-batch's own to the caller, of others into a sum, of the state on."""
    wanted = [x for x, want in zip(inputs, wants, strict=True) if want]
    turning, found = _state(wanted), []
    for x in wanted:
        if x not in turning:
            found.append(Target("given", ("gradient", x, WHERE)) if x.over == "block" else Target("added", x))
        elif len(turning) == len(cotangents):
            found.append(Target("over", cotangents[turning.index(x)]))
        else:
            found.append(Target("given", ("turned", turning.index(x), START)))
    return found


@dataclass
class RowText:
    """What a row needs before its first mini-batch and after its last."""

    begin: list[str]
    keep: list[str]  # store the state that mini-batch n starts from
    enter: list[str]  # load the state that a group starts from
    end: list[str]


def _fixed(layout: Layout, pieces: Sequence[Piece]) -> list[str]:
    """Load what stays with a row."""
    found = {}
    for p in pieces:
        for b, x in zip(p.schedule.inputs, p.sources, strict=True):
            if b.place == "fixed" and b in p.used:
                found[x] = layout.load(b, "input", x, START)
    return list(found.values())


class Forward:
    """The forward direction: (inputs of a block, state) -> (outputs, state)."""

    def __init__(self, plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, kinds: Kinds) -> None:
        self.inputs, self.layout, self.graph = inputs, Layout(dtype, kinds), lowered(plain)
        (output,) = [n for n in self.graph.graph.nodes if n.op == "output"]
        self.targets = forward_targets(inputs, len(output.args[0]))
        placeholders = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        self.states: dict[Input, Buffer] = {}
        self.there: dict[Input, str] = {}  # states that the caller lays out as a buffer stay with the caller
        for x, n in zip(inputs, placeholders, strict=True):
            if place_of(x) == "state":
                b = Buffer(label(x), tuple(n.meta["val"].shape), self.layout.align, "state")
                if stays_there(b) and Target("over", x) in self.targets:
                    b.place = self.there[x] = f"after{len(self.states)}"
                self.states[x] = b

    def row(self, pieces: Sequence[Piece]) -> RowText:
        layout, states = self.layout, [*self.states.values()]
        for b in states:
            if b.place == "state":
                layout.settle(b)
        begin = [*_fixed(layout, pieces), *self.addresses()]
        for k, b in enumerate(states):
            same = f"if (g[{layout.number('before', k)}].p != g[{layout.number('after', k)}].p) "
            begin.append((same if b.place != "state" else "") + layout.load(b, "before", k, START))
        keep = [layout.store(whole(b), b.shape, "kept", k, "(n + phase) / G, b, h") for k, b in enumerate(states)]
        over = [t.what for t in self.targets if t.kind == "over"]
        end = [
            layout.store(whole(b), b.shape, "after", k, START)
            for k, (x, b) in enumerate(self.states.items()) if b.place == "state" and x in over
        ]  # fmt: skip
        return RowText(begin, keep, [], end)

    def addresses(self) -> list[str]:
        """Say where the states are that stay with the caller."""
        at = [(b, self.layout.number("after", k)) for k, b in enumerate(self.states.values()) if b.place != "state"]
        return [f"T* {b.place} = at<T>(g[{k}], {START});" for b, k in at]


class Backward:
    """The backward direction: (inputs, kept states, cotangents) -> gradients of the inputs that have one."""

    def __init__(
        self, plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
        dtype: torch.dtype, kinds: Kinds,
    ) -> None:  # fmt: skip
        self.layout, states = Layout(dtype, kinds), _state(inputs)
        again, self.graph, kept = shared(lowered(only_outputs(plain, slice(1, None))), lowered(reverse), len(inputs))
        self.cotangents = [Input("cotangent", str(k), "block") for k in range(1, outputs)]
        names = [str(k) for k in range(kept)]
        self.sources = [
            *inputs, Input("cotangent", "0", "block"), *self.cotangents, *(Input("kept", x, "block") for x in names)
        ]  # fmt: skip
        self.targets = backward_targets(inputs, wants, self.cotangents)
        if outputs - 1 == len(states):
            on = [Target("next", x) for x in states]
        else:  # such a mini-batch is the only one of its call
            again, on = only_outputs(again, slice(outputs - 1, None)), []
        self.advance = Piece("advance", again, inputs, [*on, *(Target("kept", x) for x in names)], self.layout)
        self.states = [self.advance.buffer(x) for x in states]
        given = [n.meta["val"].shape for n in self.graph.graph.nodes if n.op == "placeholder"]
        self.shapes = {x: tuple(shape) for x, shape in zip(self.sources, given, strict=True)}

    def row(self, pieces: Sequence[Piece]) -> RowText:
        layout = self.layout
        turned = {x: layout.buffer("cotangent", label(x), self.shapes[x]) for x in self.cotangents}
        begin = _fixed(layout, pieces)
        begin += [layout.load(b, "cotangent", k, START) for k, b in enumerate(turned.values())]
        begin.append(f"for (long e = 0; e < {layout.sizes.get('sums', 0)}; ++e) acc[e] = 0;")
        enter = [layout.load(b, "kept", k, "group, b, h") for k, b in enumerate(self.states)]
        over = [t.what for t in self.targets if t.kind == "over"]
        end = [layout.store(whole(turned[x]), turned[x].shape, "turned", k, START) for k, x in enumerate(over)]
        for x in (t.what for t in self.targets if t.kind == "added"):
            total = layout.buffer("sums", label(x), self.shapes[x])
            end.append(layout.store(whole(total), total.shape, "gradient", x, START))
        return RowText(begin, [], enter, end)


HEAD = "static void rows(long lo, long hi, long H, long count, long G, long phase, const Arg* g, T* s) {"
RUN = """
extern "C" long need(long P, long count, long G, long threads) {{ return threads * ({memory} + {slots} * {slot}); }}
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long threads) {{
  long memory = need(1, count, G, 1);
  parallel(threads, [=](long k) {{ rows(P * k / threads, P * (k + 1) / threads, H, count, G, phase, g, s + k * memory); }});
}}"""


def _row_by_row(
    name: str, layout: Layout, pieces: Sequence[Piece], functions: Sequence[str], row: RowText, main: Sequence[str], slots: str
) -> Unit:  # fmt: skip
    """Put a unit together that runs each row from end to end. slots: how many of them, or "" where one serves all mini-batches."""
    scratch = max(p.schedule.scratch for p in pieces)
    fixed, turned, sums = (layout.sizes.get(x, 0) for x in ("fixed", "cotangent", "sums"))
    slot = layout.slot if slots else 0
    memory = scratch + fixed + turned + sums + layout.slot - slot
    lines = [
        HEAD, "Flush flush;", f"T *f = s + {scratch}, *ct = f + {fixed}, *acc = ct + {turned}, *ring = acc + {sums}, *st = ring;",
        "for (long row = lo; row < hi; ++row) {", "long b = row / H, h = row % H;", *row.begin, *main, *row.end, "}", "}",
    ]  # fmt: skip
    run = RUN.format(memory=memory, slot=slot, slots=slots or 0)
    text = cpp.source(layout.dtype, [f"// {name}", *functions, cpp.indented(lines), run])
    return Unit(text, {f"{p.name}:": p.schedule for p in pieces}, tuple(layout.arguments), memory, slot)


def forward_unit(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, name: str, kinds: Kinds = ()
) -> Unit:
    """Write the forward direction, row by row."""
    d = Forward(plain, inputs, dtype, kinds)
    step = Piece("step", d.graph, inputs, d.targets, d.layout, d.there)
    functions, row = [step.text("", d.addresses())], d.row([step])
    main = [
        "for (long n = 0; n < count; ++n) {", "if (G && (n + phase) % G == 0) {", *row.keep, "}",
        f"step({CALL.format(kp='st', ps='st')});", "}",
    ]  # fmt: skip
    return _row_by_row(f"{name}, forward", d.layout, [step], functions, row, main, "")


def backward_unit(
    plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
    dtype: torch.dtype, name: str, kinds: Kinds = (),
) -> Unit:  # fmt: skip
    """Write the backward direction, row by row."""
    d = Backward(plain, reverse, inputs, wants, outputs, dtype, kinds)
    step = Piece("step", d.graph, d.sources, d.targets, d.layout)
    functions, row = [d.advance.text(""), step.text("-")], d.row([d.advance, step])
    slot, call = d.layout.slot, CALL.format(kp=f"st + {d.layout.sizes.get('state', 0)}", ps="st")
    main = [
        "for (long group = (count - 1) / G; group >= 0; --group) {",
        "long first = group * G, last = first + G < count ? first + G : count;", "st = ring;", *row.enter,
        f"for (long n = first; n < last; ++n, st += {slot}) advance({call});",
        "for (long n = last - 1; n >= first; --n) {", f"st -= {slot};", f"step({call});", "}", "}",
    ]  # fmt: skip
    return _row_by_row(
        f"{name}, backward", d.layout, [d.advance, step], functions, row, main, "((G < count ? G : count) + 1)"
    )


__all__ = ["Argument", "Backward", "Forward", "RowText", "Unit", "backward_unit", "forward_unit"]

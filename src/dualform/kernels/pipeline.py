"""Rows cut in slices: where there are fewer rows than processors, mini-batches of a row run beside each other.

`learning.fission` splits a direction where the state passes: `before` does not wait for it, `loop` carries it on, nothing waits
for `after`. Groups of mini-batches go through these as through a pipeline: while the loop is at one group, other threads are
with the group after it, or before it.

    forward     before(w)      loop(w - 1)      after(w - 2)                      at the same time, window by window
    backward    advance(w)     before(w - 1)    loop(w - 2)     after(w - 3)      sums of w - 4; from the last window on

Which thread runs what changes no bit: what is added over mini-batches is added in their order, by the row's own turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from dualform.kernels import cpp
from dualform.kernels.blocks import Backward, Forward, RowText, Unit
from dualform.kernels.ops import work
from dualform.kernels.pieces import ARGUMENTS, CALL, Kinds, Layout, Piece, Target, label
from dualform.kernels.sharing import MOVED
from dualform.kernels.statements import whole
from dualform.learning.fission import Part, split
from dualform.learning.scan import Input

WINDOW = 16  # mini-batches that go through the forward together


class Stage(NamedTuple):
    """What happens to a window, so many steps after it came in: in turn ("forth" or "back") or beside each other ("each")."""

    piece: str
    delay: int
    order: str
    before: Sequence[str] = ()  # what a window begins with
    each: Sequence[str] = ()  # what comes before each mini-batch


def _price(n: fx.Node) -> float:
    value = n.meta.get("val")
    return MOVED * value.numel() if isinstance(value, torch.Tensor) and value.ndim else math.inf


def _pieces(
    graph: fx.GraphModule, sources: Sequence[Input], targets: Sequence[Target], layout: Layout, there: dict[Input, str]
) -> dict[str, Piece]:
    """Make `before`, `loop` and `after` of a direction; what passes from one to the next is kept with the mini-batch."""
    (output,) = [n for n in graph.graph.nodes if n.op == "output"]
    results: list[Any] = list(output.args[0])  # pyright: ignore[reportArgumentType]: a tuple of nodes
    on = [k for k, t in enumerate(targets) if t.kind == "over"]
    carried = [targets[k].what for k in on]
    f = split(graph, [sources.index(x) for x in carried], on, None, _price, work)
    known = dict(zip(f.inputs, sources, strict=True))
    parts: dict[str, Part] = {name: getattr(f, name) for name in ("before", "loop", "after")}
    home = {x: name for name in parts for x in parts[name].outputs if isinstance(x, fx.Node) and x not in known}
    crossing = {x for part in parts.values() for x in part.inputs}
    crossing |= {x for x in parts["loop"].outputs if x in f.carried}  # the state that a mini-batch starts from
    found = {}
    for name, part in parts.items():
        first = on if name == "loop" else []
        kept = [x for x in part.outputs[len(first) :] if x in crossing]
        ends = [k for k in range(len(results)) if k not in on and home.get(results[k], "after") == name]
        wanted = [*(results[k] for k in first), *kept, *(results[k] for k in ends)]
        inner, inputs = _module(part, wanted, f.carried if name == "loop" else ())
        goes = [
            *(targets[k] for k in first),
            *(Target("kept", x.name) for x in kept),
            *(_in_turn(targets[k]) for k in ends),
        ]
        made = [
            known[x] if x in known and not (name == "after" and x in f.carried) else Input("kept", x.name, "block")
            for x in inputs
        ]
        found[name] = Piece(name, inner, made, goes, layout, {x: there[x] for x in made if x in there})
    return found


def _module(part: Part, wanted: Sequence[Any], carried: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy a part so that it returns what is wanted, inputs among it, and takes all that is carried."""
    graph, copies = fx.Graph(), {}
    outputs: Any = graph.graph_copy(part.graph.graph, copies)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values: dict[Any, Any] = dict(zip(part.inputs, placeholders, strict=True))
    values |= {x: y for x, y in zip(part.outputs, outputs, strict=True) if x not in values}
    new = [
        x
        for x in dict.fromkeys((*carried, *wanted))
        if isinstance(x, fx.Node) and x.op == "placeholder" and x not in values
    ]
    for x in new:
        with graph.inserting_before(next(iter(graph.nodes), None)):
            values[x] = graph.placeholder(x.name)
        values[x].meta = dict(x.meta)
    graph.output([values.get(x, x) for x in wanted])
    return fx.GraphModule(part.graph, graph), [*reversed(new), *part.inputs]


def _in_turn(t: Target) -> Target:
    """What is added over mini-batches is kept until it is their turn."""
    return Target("kept", f"sum_{label(t.what)}") if t.kind == "added" else t


RUN = """
extern "C" long need(long P, long count, long G, long threads) {{ return threads * {scratch} + P * ({memory} + {ring} * {window} * {slot}); }}
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long threads) {{
  long W = {window}, windows = (count - 1) / W + 1;
  T* rows = s + threads * {scratch};
  stages(threads, windows + {last} + 2, {turns} * P + {beside} * P * W, [=](long t, long i, long k) {{
    item(t, i, P, H, count, G, phase, W, windows, g, s + k * {scratch}, rows);
  }});
}}"""
ITEM = "static void item(long t, long i, long P, long H, long count, long G, long phase, long W, long windows, const Arg* g, T* s, T* rows) {"


def _unit(
    name: str, layout: Layout, pieces: Sequence[Piece], functions: Sequence[str], stages: Sequence[Stage], row: RowText,
    held: int, window: str, backwards: bool,
) -> Unit:  # fmt: skip
    """Put a unit together. held: entries of the state, where it stays with the row."""
    fixed, turned, sums = (layout.sizes.get(x, 0) for x in ("fixed", "cotangent", "sums"))
    scratch, last = max(p.schedule.scratch for p in pieces), max(x.delay for x in stages)
    memory, slot, ring = fixed + turned + sums + held, layout.slot - held, last + 1
    kept = layout.sizes.get("state", 0) - held
    size = f"({memory} + {ring} * (W + 1) * {slot})"
    at_row = [
        "long b = row / H, h = row % H;",
        f"T *f = rows + row * {size}, *ct = f + {fixed}, *acc = ct + {turned}, *st = acc + {sums}, *ring = st + {held};",
    ]
    at_window = [
        f"long w = t - 1 - {{delay}}; if (w < 0 || w >= windows) return; long in_ring = w % {ring};",
        "w = windows - 1 - w;" if backwards else "",
        f"long first = w * W, last = first + W < count ? first + W : count; T* slots = ring + in_ring * (W + 1) * {slot};",
    ]
    own = "" if held else f"st = slots + (n - first) * {slot}; "
    call = CALL.format(n="n", s="s", st="st", kp="kp")
    one = f"{own}T* kp = slots + (n - first) * {slot} + {kept};"
    lines = [
        ITEM, "if (t == 0 || t == windows + " + str(last) + " + 1) {", "if (i >= P) return;", "long row = i;", *at_row,
        "if (t == 0) {", *row.begin, "} else {", *row.end, "}", "return;", "}",
    ]  # fmt: skip
    loops = {"forth": "for (long n = first; n < last; ++n) {", "back": "for (long n = last - 1; n >= first; --n) {"}
    turns = [x for x in stages if x.order != "each"]
    beside = [x for x in stages if x.order == "each"]
    for x in turns:
        begin = "" if held or not x.before else "st = slots; long group = w;"
        lines += [
            "if (i < P) {", "long row = i;", *at_row, *(line.format(delay=x.delay) for line in at_window), begin, *x.before,
            loops[x.order], *x.each, one, f"{x.piece}({call});", "}", "return;", "}", "i -= P;",
        ]  # fmt: skip
    for x in beside:
        lines += [
            "if (i < P * W) {", "long row = i / W;", *at_row, *(line.format(delay=x.delay) for line in at_window),
            "long n = first + i % W; if (n >= last) return;", one, f"{x.piece}({call});", "return;", "}", "i -= P * W;",
        ]  # fmt: skip
    run = RUN.format(
        scratch=scratch,
        memory=memory,
        ring=ring,
        window=window,
        slot=slot,
        last=last,
        turns=len(turns),
        beside=len(beside),
    ).replace(f"{ring} * {window} * {slot}", f"{ring} * ({window} + 1) * {slot}")
    text = cpp.source(layout.dtype, [f"// {name}, in slices", *functions, cpp.indented([*lines, "}"]), run])
    return Unit(text, {f"{p.name}:": p.schedule for p in pieces}, tuple(layout.arguments), scratch + memory, slot)


def forward_unit(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, name: str, kinds: Kinds = ()
) -> Unit:
    """Write the forward direction, in slices."""
    d = Forward(plain, inputs, dtype, kinds)
    pieces = _pieces(d.graph, inputs, d.targets, d.layout, d.there)
    functions = [p.text("", d.addresses() if p.name == "loop" else ()) for p in pieces.values()]
    row = d.row([*pieces.values()])
    keep = ["if (G && (n + phase) % G == 0) {", *row.keep, "}"]
    stages = [
        Stage("before", 0, "each"), Stage("loop", 1, "forth", d.addresses(), keep), Stage("after", 2, "each")
    ]  # fmt: skip
    held = d.layout.sizes.get("state", 0)
    return _unit(
        f"{name}, forward", d.layout, [*pieces.values()], functions, stages, row, held, str(WINDOW), backwards=False
    )


def backward_unit(
    plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
    dtype: torch.dtype, name: str, kinds: Kinds = (),
) -> Unit:  # fmt: skip
    """Write the backward direction, in slices."""
    d = Backward(plain, reverse, inputs, wants, outputs, dtype, kinds)
    pieces = _pieces(d.graph, d.sources, d.targets, d.layout, {})
    functions = [d.advance.text(""), *(p.text("-") for p in pieces.values())]
    sums: list[str] = []
    for t in d.targets:
        if t.kind == "added":
            here = d.layout.buffer("sums", label(t.what), d.shapes[t.what])
            there = d.layout.buffer("kept", label(Input("kept", _in_turn(t).what, "block")), here.shape)
            sums += cpp.add_text(whole(here), whole(there))
    every = [d.advance, *pieces.values()]
    row = d.row(every)
    stages = [
        Stage("total", 4, "back"), Stage("loop", 2, "back"), Stage("advance", 0, "forth", row.enter),
        Stage("after", 3, "each"), Stage("before", 1, "each"),
    ]  # fmt: skip
    functions.append(cpp.function("total", ARGUMENTS, sums))
    return _unit(
        f"{name}, backward", d.layout, every, functions, stages, row, 0, "(G < count ? G : count)", backwards=True
    )


__all__ = ["backward_unit", "forward_unit"]

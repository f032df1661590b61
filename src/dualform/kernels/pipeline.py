"""Rows cut in slices: where there are fewer rows than threads, mini-batches of a row run beside each other.

`learning.fission` splits a direction where the state passes: `before` does not wait for it, `loop` carries it on, nothing waits
for `after`. Windows of mini-batches go through these as through a pipeline: while the loop is at one window, other threads are
with the windows before and after it.

    forward     before(t)      loop(t - 1)      after(t - 2)                                    at the same time, step by step
    backward    advance(t)     before(t - m)    loop(t - m - 1)    after(t - m - 2)    sums of t - m - 3

In the backward pass groups come from the last to the first, m windows each, their states computed again one group ahead. Which
thread runs what changes no bit: what is added over mini-batches is added in their order, in the row's own turn.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from dualform.kernels import cpp
from dualform.kernels.blocks import Backward, Forward, RowText, Unit
from dualform.kernels.ops import VIEWS, work
from dualform.kernels.pieces import ARGUMENTS, CALL, Kinds, Layout, Piece, Target, label
from dualform.kernels.sharing import made_again, price
from dualform.kernels.statements import whole
from dualform.learning.fission import Part, split
from dualform.learning.scan import Input

# Bytes that a window passes on, to stay in the second cache; and how many mini-batches it has at least and at most.
WINDOW_BYTES, WINDOW = 2**19, (4, 16)


class Stage(NamedTuple):
    """What happens to a window, so many steps after it came in: in turn ("forth" or "back") or beside each other ("each")."""

    piece: str
    delay: str
    order: str
    before: Sequence[str] = ()  # what a window begins with
    each: Sequence[str] = ()  # what comes before each mini-batch


def _views_apart(gm: fx.GraphModule) -> None:
    """Give every reader a view of its own: a view is no reason to be in the same place."""
    for n in reversed(list(gm.graph.nodes)):
        if n.op == "call_function" and (n.target in VIEWS or n.target is operator.getitem):
            for user in list(n.users)[1:]:
                with gm.graph.inserting_before(n):
                    twin = gm.graph.node_copy(n)
                user.replace_input_with(n, twin)


def _pieces(
    graph: fx.GraphModule, sources: Sequence[Input], targets: Sequence[Target], layout: Layout, there: dict[Input, str]
) -> dict[str, Piece]:
    """Make `before`, `loop` and `after` of a direction; what passes from one to the next stays with the mini-batch."""
    _views_apart(graph)
    (output,) = [n for n in graph.graph.nodes if n.op == "output"]
    results: list[Any] = list(output.args[0])  # pyright: ignore[reportArgumentType]: a tuple of nodes
    on = [k for k, t in enumerate(targets) if t.kind == "over"]
    carried = [targets[k].what for k in on]
    f = split(graph, [sources.index(x) for x in carried], on, None, price, work, made_again)
    known = dict(zip(f.inputs, sources, strict=True))
    parts: dict[str, Part] = {name: getattr(f, name) for name in ("before", "loop", "after")}
    home = {x: name for name in parts for x in parts[name].outputs if isinstance(x, fx.Node) and x not in known}
    crossing = {x for part in parts.values() for x in part.inputs}
    crossing |= {x for x in parts["loop"].outputs if x in f.carried}  # the state that a mini-batch starts from
    found = {}
    for name, part in parts.items():
        first = on if name == "loop" else []
        passed = [x for x in part.outputs[len(first) :] if x in crossing]
        ends = [k for k in range(len(results)) if k not in on and home.get(results[k], "after") == name]
        wanted = [*(results[k] for k in first), *passed, *(results[k] for k in ends)]
        inner, inputs = _module(part, wanted, f.carried if name == "loop" else ())
        goes = [*(targets[k] for k in first), *(Target("passed", x.name) for x in passed), *(_in_turn(targets[k]) for k in ends)]  # fmt: skip
        given = {x: y for x, y in known.items() if name != "after" or x not in f.carried}
        made = [given.get(x, Input("passed", x.name, "block")) for x in inputs]
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
    """What is added over mini-batches is passed on, until it is their turn."""
    return Target("passed", f"sum_{label(t.what)}") if t.kind == "added" else t


RUN = """
extern "C" long need(long P, long count, long G, long threads) {{
  long E = {extent};
  return threads * {scratch} + P * ({memory} + {groups} * (E + 1) * {slot} + {ring} * {window} * {passed});
}}
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long threads) {{
  long W = {window}, E = {extent}, m = (E - 1) / W + 1, steps = ((count - 1) / E + 1) * m + {last} + 1;
  T* rows = s + threads * {scratch};
  stages(threads, steps, {turns} * P + {beside} * P * W, [=](long t, long i, long k) {{
    item(t, i, P, H, count, G, phase, W, E, m, steps, g, s + k * {scratch}, rows);
  }});
}}"""
ITEM = "static void item(long t, long i, long P, long H, long count, long G, long phase, long W, long E, long m, long steps, const Arg* g, T* s, T* rows) {"


def _unit(
    name: str, layout: Layout, pieces: Sequence[Piece], functions: Sequence[str], stages: Sequence[Stage], row: RowText,
    extent: str, held: bool,
) -> Unit:  # fmt: skip
    """Put a unit together. extent: mini-batches of a group. held: does the state stay with the row? Else each mini-batch has its own."""
    fixed, turned, sums, state, passed = (
        layout.sizes.get(x, 0) for x in ("fixed", "cotangent", "sums", "state", "passed")
    )
    scratch, memory = max(p.schedule.scratch for p in pieces), fixed + turned + sums + held * state
    slot, ring, groups = (
        (0 if held else layout.slot),
        len({x.delay for x in stages if x.piece != "advance"}),
        "(2 + (m + 1) / m)",
    )
    low, high = WINDOW
    window = min(max(WINDOW_BYTES // max(1, passed * layout.dtype.itemsize), low), high)
    size = f"({memory} + {groups} * (E + 1) * {slot} + {ring} * W * {passed})"
    at_row = [
        "long b = row / H, h = row % H;",
        f"T *f = rows + row * {size}, *ct = f + {fixed}, *acc = ct + {turned}, *st = acc + {sums}, *own = st + {held * state};",
    ]
    at_batch = [] if held else [f"st = own + ((w.order % {groups}) * (E + 1) + n - w.from) * {slot};"]
    at_batch.append(f"T* ps = own + {groups} * (E + 1) * {slot} + ((w.at % {ring}) * W + n - w.first) * {passed};")
    call = CALL.format(kp=f"st + {0 if held else state}", ps="ps")
    lines = [
        ITEM, "if (t == 0 || t == steps) {", "if (i >= P) return;", "long row = i;", *at_row,
        "if (t == 0) {", *row.begin, "} else {", *row.end, "}", "return;", "}", "Window w;",
    ]  # fmt: skip
    loops = {
        "forth": "for (long n = w.first; n < w.last; ++n) {",
        "back": "for (long n = w.last - 1; n >= w.first; --n) {",
    }
    turns, beside = ([x for x in stages if (x.order == "each") == each] for each in (False, True))
    for x in (*turns, *beside):
        forth = "true" if held or x.order == "forth" else "false"
        found = f"if (!window(t - 1 - ({x.delay}), W, E, count, {forth}, w)) return;"
        if x.order == "each":
            lines += [
                "if (i < P * W) {",
                "long row = i / W;",
                found,
                *at_row,
                "long n = w.first + i % W;",
                "if (n >= w.last) return;",
            ]
            lines += [*at_batch, f"{x.piece}({call});", "return;", "}", "i -= P * W;"]
        else:
            lines += ["if (i < P) {", "long row = i;", found, *at_row, *x.before, loops[x.order], *x.each]
            lines += [*at_batch, f"{x.piece}({call});", "}", "return;", "}", "i -= P;"]
    last = f"m + {ring - 1}" if not held else f"{ring - 1}"
    run = RUN.format(
        scratch=scratch, memory=memory, groups=groups, ring=ring, window=window, slot=slot, passed=passed, last=last, extent=extent,
        turns=len(turns), beside=len(beside),
    ).replace("  return threads", f"  long m = (E - 1) / {window} + 1;\n  return threads")  # fmt: skip
    text = cpp.source(layout.dtype, [f"// {name}, in slices", *functions, cpp.indented([*lines, "}"]), run])
    return Unit(
        text, {f"{p.name}:": p.schedule for p in pieces}, tuple(layout.arguments), scratch + memory, slot + passed
    )


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
        Stage("loop", "1", "forth", d.addresses(), keep), Stage("after", "2", "each"), Stage("before", "0", "each")
    ]  # fmt: skip
    return _unit(f"{name}, forward", d.layout, [*pieces.values()], functions, stages, row, "count", held=True)


def backward_unit(
    plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
    dtype: torch.dtype, name: str, kinds: Kinds = (),
) -> Unit:  # fmt: skip
    """Write the backward direction, in slices."""
    d = Backward(plain, reverse, inputs, wants, outputs, dtype, kinds)
    pieces = _pieces(d.graph, d.sources, d.targets, d.layout, {})
    every = [d.advance, *pieces.values()]
    functions, sums = [d.advance.text(""), *(p.text("-") for p in pieces.values())], []
    for t in d.targets:
        if t.kind == "added":
            here = d.layout.buffer("sums", label(t.what), d.shapes[t.what])
            there = d.layout.buffer("passed", label(Input("passed", _in_turn(t).what, "block")), here.shape)
            sums += cpp.add_text(whole(here), whole(there))
    functions.append(cpp.function("total", ARGUMENTS, sums))
    row = d.row(every)
    enter = [f"if (w.first == w.from) {{ long group = w.group; st = own + (w.order % (2 + (m + 1) / m)) * (E + 1) * {d.layout.slot};", *row.enter, "}"]  # fmt: skip
    stages = [
        Stage("total", "m + 3", "back"), Stage("loop", "m + 1", "back"), Stage("advance", "0", "forth", enter),
        Stage("after", "m + 2", "each"), Stage("before", "m", "each"),
    ]  # fmt: skip
    return _unit(f"{name}, backward", d.layout, every, functions, stages, row, "(G < count ? G : count)", held=False)


__all__ = ["backward_unit", "forward_unit"]

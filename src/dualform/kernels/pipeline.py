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
from importlib.resources import files
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
from dualform.learning.plan import Input

# Bytes that a window passes on, to stay in the second cache; and how many mini-batches it has at least and at most.
WINDOW_BYTES, WINDOW = 2**19, (4, 16)


class Stage(NamedTuple):
    """What happens to a window, so many steps after it came in: in turn ("forth" or "back") or beside each other ("each")."""

    piece: str
    delay: str
    order: str
    before: Sequence[str] = ()  # what a window begins with
    each: Sequence[str] = ()  # what comes before each mini-batch


def views_apart(gm: fx.GraphModule) -> None:
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
    views_apart(graph)
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
        inner, inputs = part_module(part, wanted, f.carried if name == "loop" else ())
        goes = [*(targets[k] for k in first), *(Target("passed", x.name) for x in passed), *(_in_turn(targets[k]) for k in ends)]  # fmt: skip
        given = {x: y for x, y in known.items() if name != "after" or x not in f.carried}
        made = [given.get(x, Input("passed", x.name, "block")) for x in inputs]
        found[name] = Piece(name, inner, made, goes, layout, {x: there[x] for x in made if x in there})
    return found


def part_module(part: Part, wanted: Sequence[Any], carried: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
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


def _item(stages: Sequence[Stage], row: RowText, state: str) -> list[str]:
    """Write what step t does with item i: first and last what a row needs, else a window in turn, or one of its mini-batches."""
    argument = "const Arg* g = c.g; Row r = row_of(c, {}); long b = r.b, h = r.h, G = c.G, phase = c.phase; T *f = r.f, *ct = r.ct, *acc = r.acc, *st = r.st;"
    one = f"st = state_of(c, r, w, n); T *kp = st + {state}, *ps = passed_of(r, w, n);"
    loops = {
        "forth": "for (long n = w.first; n < w.last; ++n) {",
        "back": "for (long n = w.last - 1; n >= w.first; --n) {",
    }
    lines = [
        "static void item(const Call& c, long t, long i, T* s) {", "if (t == 0 || t == c.steps) {", "if (i >= c.P) return;",
        argument.format("i"), "if (t == 0) {", *row.begin, "} else {", *row.end, "}", "return;", "}", "Window w;",
    ]  # fmt: skip
    for x in sorted(stages, key=lambda x: x.order == "each"):
        forth = "STAYS" if x.order != "forth" else "true"
        late = f"if (!window(t - 1 - ({x.delay}), c.E, c.count, {forth}, w)) return;"
        call = f"{x.piece}({CALL.format(kp='kp', ps='ps')});"
        if x.order == "each":
            lines += [
                "if (i < c.P * W) {",
                late,
                argument.format("i / W"),
                "long n = w.first + i % W;",
                "if (n >= w.last) return;",
            ]
            lines += [one, call, "return;", "}", "i -= c.P * W;"]
        else:
            lines += ["if (i < c.P) {", late, argument.format("i"), *x.before, loops[x.order], *x.each]
            lines += [one, call, "}", "return;", "}", "i -= c.P;"]
    return [*lines, "}"]


def _unit(
    name: str, layout: Layout, pieces: Sequence[Piece], functions: Sequence[str], stages: Sequence[Stage], row: RowText, held: bool
) -> Unit:  # fmt: skip
    """Put a unit together. held: does the state stay with the row? Else each mini-batch has its own."""
    size = {x: layout.sizes.get(x, 0) for x in ("fixed", "cotangent", "sums", "state", "passed")}
    ring = len({x.delay for x in stages if x.piece != "advance"})
    window = min(max(WINDOW_BYTES // max(1, size["passed"] * layout.dtype.itemsize), WINDOW[0]), WINDOW[1])
    constants = {
        "FIXED": size["fixed"], "TURNED": size["cotangent"], "SUMS": size["sums"], "STAYS": int(held), "HELD": held * size["state"],
        "SLOT": 0 if held else layout.slot, "STATE": size["state"], "PASSED": size["passed"], "RING": ring, "W": window,
        "SCRATCH": max(p.schedule.scratch for p in pieces), "LATE": ring - 1, "TURNS": sum(x.order != "each" for x in stages),
        "BESIDE": sum(x.order == "each" for x in stages),
    }  # fmt: skip
    sizes = f"enum : long {{ {', '.join(f'{x} = {n}' for x, n in constants.items())} }};"
    support = files("dualform.kernels").joinpath("pipeline.h").read_text()
    item = cpp.indented(_item(stages, row, "0" if held else "STATE"))
    text = cpp.source(layout.dtype, [f"// {name}, in slices", sizes, support, *functions, item])
    memory = constants["SCRATCH"] + size["fixed"] + size["cotangent"] + size["sums"] + constants["HELD"]
    return Unit(
        text,
        {f"{p.name}:": p.schedule for p in pieces},
        tuple(layout.arguments),
        memory,
        constants["SLOT"] + size["passed"],
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
    return _unit(f"{name}, forward", d.layout, [*pieces.values()], functions, stages, row, held=True)


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
    enter = ["if (w.first == w.from) {", "long group = w.group;", "st = state_of(c, r, w, w.from);", *row.enter, "}"]
    stages = [
        Stage("total", "c.m + 3", "back"), Stage("loop", "c.m + 1", "back"), Stage("advance", "0", "forth", enter),
        Stage("after", "c.m + 2", "each"), Stage("before", "c.m", "each"),
    ]  # fmt: skip
    return _unit(f"{name}, backward", d.layout, every, functions, stages, row, held=False)


__all__ = ["backward_unit", "forward_unit"]

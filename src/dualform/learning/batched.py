"""A step mapped over rows (batch x heads, or blocks x batch x heads), in parts that run at any number of them.

The step is mapped once, over a made-up number of rows, and split where the state passes. The real number of rows
is an input of each part, or written into it: nothing is traced again for another batch,
another length or another device.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from dualform.graphs.edit import Graph, add_input, add_plain, copied, inputs_of, stepped, unwritten
from dualform.graphs.simplify import tidy
from dualform.graphs.split import Fission, Part
from dualform.graphs.trace import source_line
from dualform.graphs.verify import BrokenGraph, is_on
from dualform.learning.derive import Table, trace_fake
from dualform.shapes import TraceError, fail

aten = torch.ops.aten
# A prime larger than any size in a learner: an integer in a mapped graph is a multiple of it or has nothing to do with
# rows.
ROWS = 2**31 - 1
# Another one: where graphs are verified, what was taken for a number of rows counts these too, and nothing else
# differs.
_OTHER = 2**31 - 19
_END = 2**62  # beyond it, a slice goes on to the end


def mapped(gm: fx.GraphModule, shared: Sequence[bool], table: Table | None = None) -> fx.GraphModule:
    """Map a graph over ROWS rows; `shared` inputs are the same for all. table: what is decomposed, norms if None."""
    gm = _without_rows(gm)
    made = _over(ROWS, gm, shared, table)
    for node in made.graph.nodes:
        numbers = [x for x in _numbers(node) if ROWS <= x < _END]
        if any("arange" in str(node.target) or x % ROWS or x // ROWS >= ROWS for x in numbers):
            found = "is mapped over rows by their numbers, which its parts do not know"
            advice = "Write reads and writes at places with gather and scatter."
            what = f"{node.target} in a learner's step"
            fail("derive", what, found, "ops that act on each row alone", advice, TraceError)
    if is_on():
        _expect_rows(made.graph, _over(_OTHER, gm, shared, table).graph)
    return made


def _over(rows: int, gm: fx.GraphModule, shared: Sequence[bool], table: Table | None) -> fx.GraphModule:
    inputs = [node.meta["val"] for node in inputs_of(gm.graph)]
    dims = tuple(None if s else 0 for s in shared)
    examples = [x.new_empty(x.shape if s else (rows, *x.shape)) for x, s in zip(inputs, shared, strict=True)]
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)  # it would loop over all rows
    try:
        return tidy(trace_fake(torch.vmap(stepped(gm), in_dims=dims), examples, table))
    except RuntimeError as error:
        op = re.search(r"(\S+) hit the vmap fallback", str(error))
        if op is None:
            raise
        what, advice = f"{op[1]} in a learner's step", "Write that line of the learner with other ops."
        fail("derive", what, "cannot be mapped over rows by torch", "ops that vmap knows", advice, TraceError)
    finally:
        functorch._set_vmap_fallback_enabled(before)


def _expect_rows(graph: fx.Graph, other: fx.Graph) -> None:
    """Is each number of rows one, and no other number? Then it follows them to another made-up number of rows."""
    for node, twin in zip(graph.nodes, other.nodes, strict=True):
        numbers = [x // ROWS * _OTHER if _counts_rows(x) else x for x in _numbers(node)]
        if node.target != twin.target or numbers != _numbers(twin):
            raise BrokenGraph(
                f"mapped: {node.format_node()} has the numbers {_numbers(node)} over {ROWS} rows and {_numbers(twin)} "
                f"over {_OTHER}; expected multiples of both. The map is wrong: please report it."
            )


def _numbers(node: fx.Node) -> list[int]:
    """List the sizes and places among a node's arguments."""
    return [x for x in _entries(node.args[k] for k in _counts(node)) if type(x) is int]


def _counts(node: fx.Node) -> list[int]:
    """Which of a node's arguments may be sizes or places; all of an operator of Python's."""
    every = range(len(node.args))
    return [k for k in _sizes(node.target) if k in every] if hasattr(node.target, "_schema") else list(every)


@cache
def _end_at(target: Any) -> int | None:
    """Where slices have their end, two behind their axis."""
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    return names.index("end") if "dim" in names and "end" in names else None


def _without_rows(gm: fx.GraphModule) -> fx.GraphModule:
    """Keep the user's own whole numbers from being taken for numbers of rows."""
    if any(_end_at(node.target) is not None for node in gm.graph.nodes):
        gm = copied(gm)
    for node in gm.graph.nodes:
        at = _end_at(node.target)
        if at is not None and len(node.args) > at and type(node.args[at]) is int:  # it ends where its tensor does
            first, second = node.args[:2]
            sizes = second if node.target is aten.slice_backward.default else first.meta["val"].shape
            node.args = (*node.args[:at], min(node.args[at], sizes[node.args[at - 2]]), *node.args[at + 1 :])
        for k in _sizes(node.target) if node.op == "call_function" else ():
            if any(map(_counts_rows, _entries(node.args[k : k + 1]))):
                what = f"{node.target} in a learner's step"
                advice = f"Write another number there. {source_line(node)}".rstrip()
                found, expected = f"has the number {node.args[k]}", f"sizes and places below {ROWS}"
                fail("derive", what, found, expected, advice, TraceError)
    return gm


@cache
def _sizes(target: Any) -> tuple[int, ...]:
    """Which arguments of an op may be sizes or places: whole numbers; another number is the user's."""
    schema = getattr(target, "_schema", None)
    return tuple(k for k, a in enumerate(schema.arguments) if "int" in str(a.type)) if schema else ()


def row_axis(node: fx.Node) -> int | None:
    """Find the axis of a mapped value that counts rows; None: all rows share it."""
    shape = node.meta["val"].shape
    return shape.index(ROWS) if ROWS in shape else None


def row_bytes(node: fx.Node) -> float:
    """Price a mapped value: bytes per row, infinite if rows are not an axis of their own."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or (ROWS not in value.shape and any(n >= ROWS for n in value.shape)):
        return float("inf")
    return float(value.numel() * value.element_size() // (ROWS if ROWS in value.shape else 1))


def at(gm: fx.GraphModule, rows: int, device: torch.device) -> fx.GraphModule:
    """Write a number of rows and a device into a mapped graph, or a part of one."""
    gm = copied(gm)
    _write(gm.graph, lambda times: times * rows, device)
    return gm


def at_any(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Make the number of rows of a mapped graph, or of a part of one, its last input; and write a device into it."""
    graph, made = Graph(), dict[int, fx.Node]()
    copies = {n: graph.node_copy(n) for n in inputs_of(gm.graph)}
    rows = made[1] = add_input(graph, "rows")
    last = rows
    graph.output(graph.graph_copy(gm.graph, copies))

    def times(n: int) -> fx.Node:
        nonlocal last
        if n not in made:
            with graph.inserting_after(last):
                last = made[n] = add_plain(graph, operator.mul, rows, n)
        return made[n]

    _write(graph, times, device)
    return unwritten(gm, graph)


def _write(graph: fx.Graph, times: Callable[[int], Any], device: torch.device) -> None:
    """Write a device, and multiples of the number of rows."""

    def real(n: Any) -> Any:
        return times(n // ROWS) if _counts_rows(n) else n

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if any(map(_counts_rows, _numbers(node))):
            counts = _counts(node)
            node.args = tuple(map_aggregate(x, real) if k in counts else x for k, x in enumerate(node.args))
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": device}


def joined(f: Fission, blocks: Sequence[int], rows: int, heads: int, device: torch.device) -> fx.GraphModule:
    """Write the parts of some blocks as one graph: inputs -> (state after them, states before each, other outputs).

    Inputs that are a block's own, and what is returned for each block, have blocks * rows rows in ascending order.
    """
    graph, n = Graph(), len(blocks)
    fixed = {x: add_input(graph, x.name) for x in f.inputs}
    many: dict[fx.Node, Any] = {x: fixed.pop(x) for x in f.varying}
    states = [[fixed.pop(x) for x in f.carried]]

    def value(x: fx.Node, count: int) -> Any:
        if x in many:
            return many[x]
        axis, times = row_axis(x), [1] * x.meta["val"].ndim
        if axis is None or count == heads:
            return fixed[x]
        times[axis] = count // heads
        return add_plain(graph, aten.repeat.default, fixed[x], times)

    def write(part: Part, count: int, given: Sequence[Any]) -> Any:
        own = at(part.graph, count, device).graph
        return graph.graph_copy(own, dict(zip(inputs_of(own), given, strict=True)))

    def join(parts: Sequence[Any], axis: int | None) -> Any:
        return parts[0] if n == 1 else add_plain(graph, aten.cat.default, list(parts), axis or 0)

    fixed |= zip(f.once.outputs, write(f.once, heads, [value(x, heads) for x in f.once.inputs]), strict=True)
    many |= zip(f.before.outputs, write(f.before, n * rows, [value(x, n * rows) for x in f.before.inputs]), strict=True)
    kept: list[Sequence[Any]] = [()] * n
    r = len(f.carried)
    for j in blocks:
        held = dict(zip(f.carried, states[-1], strict=True))
        given = []
        for x in f.loop.inputs:
            if x in held:
                given.append(held[x])
            elif x in many and row_axis(x) is not None:
                given.append(add_plain(graph, aten.slice.Tensor, many[x], row_axis(x), j * rows, (j + 1) * rows))
            else:
                given.append(value(x, rows))
        out = write(f.loop, rows, given)
        states.append(list(out[:r]))
        kept[j] = out[r:]
    many |= {x: join(parts, row_axis(x)) for x, parts in zip(f.loop.outputs[r:], zip(*kept, strict=True), strict=True)}
    many |= zip(f.after.outputs, write(f.after, n * rows, [value(x, n * rows) for x in f.after.inputs]), strict=True)
    started = zip(*(states[blocks.index(j)] for j in range(n)), strict=True)
    graph.output([*states[-1], *(join(x, 0) for x in started), *(value(x, n * rows) for x in f.others)])
    return fx.GraphModule(torch.nn.Module(), graph)


def example(x: fx.Node, rows: int, device: torch.device) -> Tensor:
    """Make a tensor of the shape that a mapped value has at a number of rows."""
    value = x.meta["val"]
    shape = [n // ROWS * rows if _counts_rows(n) else n for n in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=device)


def _entries(args: Iterable[Any]) -> list[Any]:
    return [y for x in args for y in (x if isinstance(x, list | tuple) else (x,))]


def _counts_rows(x: Any) -> bool:
    return type(x) is int and x >= ROWS and x % ROWS == 0

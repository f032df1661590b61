"""Split a mapped step where its state passes: loop fission, by the graph's own dependencies.

    once     made of what no mini-batch changes: once per call
    before   does not wait for the state: many mini-batches at once
    loop     from one state to the next: mini-batch by mini-batch, nothing else
    after    the next state does not wait for it: many mini-batches at once

The same split serves both directions (in reverse the carried thing is the cotangent of the state) and every backend.
What may run in the loop or after it goes where it costs least: an op in the loop costs its dispatch, a value that
crosses into `after` is stored for every mini-batch. That is a minimum cut.

Legend: a node is *free* if it depends on the state and the next state does not depend on it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dualform.graphs.cut import minimum_cut
from dualform.graphs.edit import add, extract, inputs_of, needed, nodes_in, results_of, unwritten, without_dead
from dualform.graphs.regroup import waiting
from dualform.ops.table import kind_of, row_of

aten = torch.ops.aten
# An op run in the loop costs about as much time as storing this many bytes per row (LAB.md, 2026-11-24).
BYTES_PER_OP = 4096


@dataclass(frozen=True)
class Part:
    """A piece of a graph: `graph(*inputs) -> outputs`, both named by the nodes of the whole."""

    graph: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Fission:
    """A graph in four parts; `others` are the outputs that are not carried on."""

    inputs: tuple[fx.Node, ...]
    carried: tuple[fx.Node, ...]
    varying: tuple[fx.Node, ...]  # the other inputs that are not the same for every mini-batch
    others: tuple[Any, ...]
    once: Part
    before: Part
    loop: Part  # returns the next state first, then the values that are kept
    after: Part


def dispatch(node: fx.Node) -> float:
    """Price an op that runs in the loop, one by one."""
    return 1.0 if kind_of(node.target) == "view" or node.target is operator.getitem else BYTES_PER_OP


def split(
    gm: fx.GraphModule, carried: Sequence[int], returned: Sequence[int], fixed: Sequence[int] | None,
    size: Callable[[fx.Node], float], work: Callable[[fx.Node], float] = dispatch,
    again: Callable[[list[fx.Node]], set[fx.Node]] | None = None,
) -> Fission:  # fmt: skip
    """Split a graph whose inputs `carried` are what the previous mini-batch gave as outputs `returned`.

    fixed: inputs that every mini-batch shares; None if nothing is to be made once. size: price of storing a value;
    infinite if it cannot be, as one that is not cut by rows. work: price of an op in the loop. again: chooses, among
    values that do not wait, those that are made where they are used, not stored.
    """
    inputs, results = tuple(inputs_of(gm.graph)), results_of(gm.graph)
    following = tuple(results[i] for i in returned)
    others = tuple(x for i, x in enumerate(results) if i not in set(returned))
    ends, nodes = dict.fromkeys(nodes_in(others)), [n for n in gm.graph.nodes if n.op == "call_function"]
    state, waits = {inputs[i] for i in carried}, waiting(gm.graph, carried)
    varies = set(nodes) if fixed is None else waiting(gm.graph, [i for i in range(len(inputs)) if i not in set(fixed)])
    loop = needed(following) & waits - state
    free = [n for n in nodes if n in waits and n not in loop]
    loop |= _cheaper_inside(free, loop | state, ends, size, work)
    place = {n: "after" if n in waits else "before" if n in varies else "once" for n in nodes}
    place |= dict.fromkeys(loop, "loop")
    homes = {node: {name} for node, name in place.items()}
    early = [n for n in nodes if place[n] in ("once", "before") and n not in ends]
    anew = again(early) if again else {n for n in early if _made_anew(n, size)}
    for node in reversed(early):
        if node in anew:  # the loop returns the next state, even one that does not wait for the last
            homes[node] = set().union(*(homes[u] for u in node.users if u in homes), ["loop"] * (node in following))

    def part(name: str, wanted: Iterable[fx.Node], first: Sequence[Any] = ()) -> Part:
        kept = {n for n in wanted if place.get(n) == name or (name == "loop" and n in state)}
        return _extract(gm, [n for n in nodes if name in homes[n]], kept, first)

    after = part("after", ends)
    inner = part("loop", (*after.inputs, *ends), following)
    crossing = (*inner.inputs, *after.inputs, *ends)
    before = part("before", crossing)
    once = part("once", (*crossing, *before.inputs))
    own = tuple(n for i, n in enumerate(inputs) if i not in {*carried, *(fixed or ())})
    return Fission(inputs, tuple(inputs[i] for i in carried), own, others, once, before, inner, after)


def _is_turned(node: fx.Node) -> bool:
    """Is it a view of all entries of another, in another order or repeated?"""
    row = row_of(node.target)
    if row.kind != "view" or row.ordered or not isinstance(node.meta["val"], torch.Tensor):
        return False
    return node.meta["val"].numel() >= node.all_input_nodes[0].meta["val"].numel()


def _made_anew(node: fx.Node, size: Callable[[fx.Node], float]) -> bool:
    """Is a value better made where it is used than stored: it cannot be cut, or is larger than what it is made of?"""
    if size(node) == math.inf or _is_turned(node):
        return True
    return size(node) > sum(size(x) for x in node.all_input_nodes) + BYTES_PER_OP and len({*node.users}) == 1


def _cheaper_inside(
    free: list[fx.Node], fixed: set[fx.Node], ends: dict[fx.Node, None], size: Callable[[fx.Node], float],
    work: Callable[[fx.Node], float],
) -> set[fx.Node]:  # fmt: skip
    """Choose the free nodes that had better run in the loop: a minimum cut between the loop and what comes after."""
    network: dict[tuple[Any, Any], float] = {}
    free_nodes = set(free)

    def stored(node: fx.Node) -> str:
        name = f"stored {node.name}"
        if (node, name) not in network:
            network[node, name] = size(node)
            if node in fixed:
                network["loop", node] = math.inf
        return name

    for node in free:
        network[node, "after"] = work(node)
        for source in node.all_input_nodes:
            if source in free_nodes or source in fixed:
                network[stored(source), node] = math.inf
            if source in free_nodes:
                network[node, source] = math.inf  # inside only with all that it needs
    for node in ends:
        if node in free_nodes or node in fixed:
            network[stored(node), "after"] = math.inf
    inside = minimum_cut(((a, b, c) for (a, b), c in network.items()), "loop", "after")
    return {n for n in free if n in inside}


def _extract(gm: fx.GraphModule, nodes: list[fx.Node], kept: set[fx.Node], first: Sequence[Any] = ()) -> Part:
    """Copy a part's nodes into a graph of their own; what it returns is `first`, then `kept` in the whole's order."""
    own, returned = set(nodes), (*first, *(n for n in gm.graph.nodes if n in kept))
    asked = [*nodes_in(returned), *(source for node in nodes for source in node.all_input_nodes)]
    inputs = tuple(dict.fromkeys(n for n in asked if n not in own))

    def laid_out(graph: fx.Graph, made: dict[fx.Node, fx.Node]) -> list[Any]:
        def whole(x: Any) -> Any:
            if not isinstance(x, fx.Node) or x.op == "placeholder" or x.meta["val"].is_contiguous():
                return made[x] if isinstance(x, fx.Node) else x
            return add(graph, aten.clone.default, made[x], memory_format=torch.contiguous_format)

        return [whole(x) for x in returned]

    graph = without_dead(extract(nodes, inputs, laid_out))
    return Part(unwritten(gm, graph), inputs, returned)

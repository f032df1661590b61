"""Split a mapped step where its state passes: loop fission, by the graph's own dependencies.

    once     made of what no mini-batch changes: once per call
    before   does not wait for the state: many mini-batches at once
    loop     from one state to the next: mini-batch by mini-batch, nothing else
    after    the next state does not wait for it: many mini-batches at once

The same split serves both directions (in reverse the carried thing is the cotangent of the state) and every backend.
What may run in the loop or after it goes where it costs least: an op in the loop costs its dispatch, a value that crosses
into `after` is stored for every mini-batch. That is a minimum cut.

Legend: a node is *free* if it depends on the state and the next state does not depend on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dualform.learning.regroup import reached

aten = torch.ops.aten
# An op run in the loop costs about as much time as storing this many bytes per row (LAB.md, 2026-11-24).
BYTES_PER_OP = 4096
_views = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.expand.default,
    operator.getitem,
}  # fmt: skip
_turned = {aten.expand.default, aten.transpose.int, aten.t.default, aten.permute.default}


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
    return 1.0 if node.target in _views else BYTES_PER_OP


def split(
    gm: fx.GraphModule, carried: Sequence[int], returned: Sequence[int], fixed: Sequence[int] | None,
    size: Callable[[fx.Node], float], work: Callable[[fx.Node], float] = dispatch,
    again: Callable[[list[fx.Node]], set[fx.Node]] | None = None,
) -> Fission:  # fmt: skip
    """Split a graph whose inputs `carried` are what the previous mini-batch gave as outputs `returned`.

    fixed: inputs that every mini-batch shares; None if nothing is to be made once. size: price of storing a value; infinite if it
    cannot be, as one that is not cut by rows. work: price of an op in the loop. again: chooses, among values that do not wait, those
    that are made where they are used, not stored.
    """
    inputs = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    following = tuple(output.args[0][i] for i in returned)
    others = tuple(x for i, x in enumerate(output.args[0]) if i not in set(returned))
    ends, nodes = _nodes(others), [n for n in gm.graph.nodes if n.op == "call_function"]
    state, waits = {inputs[i] for i in carried}, reached(gm.graph, carried)
    varies = set(nodes) if fixed is None else reached(gm.graph, [i for i in range(len(inputs)) if i not in set(fixed)])
    loop = _sources(following) & waits - state
    free = [n for n in nodes if n in waits and n not in loop]
    loop |= _cheaper_inside(free, loop | state, ends, size, work)
    place = {n: "after" if n in waits else "before" if n in varies else "once" for n in nodes} | dict.fromkeys(
        loop, "loop"
    )
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


def _made_anew(node: fx.Node, size: Callable[[fx.Node], float]) -> bool:
    """Is a value better made where it is used than stored: one that cannot be cut, or larger than what it is made of?"""
    if size(node) == float("inf") or node.target in _turned:
        return True
    return size(node) > sum(size(x) for x in node.all_input_nodes) + BYTES_PER_OP and len({*node.users}) == 1


def _nodes(values: Iterable[Any]) -> set[fx.Node]:
    return {x for x in values if isinstance(x, fx.Node)}


def _sources(goals: Iterable[Any]) -> set[fx.Node]:
    """Collect the goals and everything they are computed from."""
    found: set[fx.Node] = set()
    stack = list(_nodes(goals))
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _cheaper_inside(
    free: list[fx.Node], fixed: set[fx.Node], ends: set[fx.Node], size: Callable[[fx.Node], float],
    work: Callable[[fx.Node], float],
) -> set[fx.Node]:  # fmt: skip
    """Choose the free nodes that had better run in the loop: a minimum cut between the loop and what comes after."""
    import networkx  # with torch; a tenth of a second, not at `import dualform`

    network = networkx.DiGraph()
    network.add_nodes_from(["loop", "after"])
    free_nodes = set(free)

    def stored(node: fx.Node) -> str:
        name = f"stored {node.name}"
        if not network.has_edge(node, name):
            nbytes = size(node)
            network.add_edge(node, name, **({} if nbytes == float("inf") else {"capacity": nbytes}))  # none: never cut
            if node in fixed:
                network.add_edge("loop", node)
        return name

    for node in free:
        network.add_edge(node, "after", capacity=work(node))
        for source in node.all_input_nodes:
            if source in free_nodes or source in fixed:
                network.add_edge(stored(source), node)
            if source in free_nodes:
                network.add_edge(node, source)  # inside only with all that it needs
    for node in ends & (free_nodes | fixed):
        network.add_edge(stored(node), "after")
    _, (inside, _) = networkx.minimum_cut(network, "loop", "after")
    return {n for n in inside if n in free_nodes}


def _extract(gm: fx.GraphModule, nodes: list[fx.Node], kept: set[fx.Node], first: Sequence[Any] = ()) -> Part:
    """Copy a part's nodes into a graph of their own; what it returns is `first`, then `kept` in the whole's order."""
    graph, own = fx.Graph(), set(nodes)
    returned = (*first, *(n for n in gm.graph.nodes if n in kept))
    needed = [*_nodes(returned), *(source for node in nodes for source in node.all_input_nodes)]
    inputs = tuple(dict.fromkeys(n for n in needed if n not in own))
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)

    def whole(node: fx.Node) -> fx.Node:
        if node.op == "placeholder" or node.meta["val"].is_contiguous():
            return made[node]
        copy = graph.call_function(aten.clone.default, (made[node],), {"memory_format": torch.contiguous_format})
        copy.meta = {"val": node.meta["val"].contiguous()}
        return copy

    results = [whole(x) if isinstance(x, fx.Node) else x for x in returned]
    graph.output(results)
    graph.eliminate_dead_code()
    return Part(fx.GraphModule(gm, graph), inputs, returned)

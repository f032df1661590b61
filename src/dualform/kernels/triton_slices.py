"""A direction of a step in slices, for the card: before, loop and after, of which only the loop goes in order.

Where a value is made, and what passes between kernels, are minimum cuts: of what waits for the state by bytes
(`graphs/split`), of the rest by nanoseconds of a program alone on its processor, which is what the loop is.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from dualform.graphs.edit import inputs_of, needed, results_of, without_repeats
from dualform.graphs.regroup import waiting
from dualform.graphs.split import dispatch, split
from dualform.kernels.ops import is_factor_alone
from dualform.kernels.sharing import made_again
from dualform.kernels.targets import parted, views_apart
from dualform.kernels.triton_kernel import Kernel
from dualform.kernels.triton_schedule import TileDirection
from dualform.ops.table import kind_of

# Nanoseconds: to write and read an entry for a hundred rows, beside what any load costs; of an entry of a map; of a sum
# or a product.
PASSED, LOAD, ENTRY, MEETING = 0.2, 30.0, 0.02, 200.0
# Where more than so many entries are carried on they fill registers, of so many warps: then a product reads its state
# again, and what is a factor alone is made by every warp.
ENTRIES, WARPS = 8192, 8


def _stored(n: fx.Node) -> float:
    """Price passing a value on, for one row: its bytes, of the type of factors if it is nothing else.
    An op in the loop is worth 4096,
    as on the CPU: a tile there takes about as long as an op's latency where rows are few,
    and three of them where rows fill the card."""
    made = n.meta.get("val")
    if not isinstance(made, torch.Tensor):
        return math.inf
    return float(made.numel() * (2 if n.users and is_factor_alone(n) else made.element_size()))


def _given(n: fx.Node) -> int:
    """Count the entries that an op reads of what is given to all slices."""
    found = 0
    for x in n.all_input_nodes:
        while x.op != "placeholder" and _is_view(x):
            x = x.all_input_nodes[0]
        found += x.meta["val"].numel() if x.op == "placeholder" else 0
    return found


def _working(n: fx.Node, heavy: bool) -> float:
    """Price an op in the loop; a twin of one that is there anyway costs nothing."""
    if n.meta.get("twin"):
        return 1.0
    return dispatch(n) + (_given(n) if heavy and kind_of(n.target) == "product" else 0.0)


def _is_view(n: fx.Node) -> bool:
    return kind_of(n.target) == "view" or n.target is operator.getitem


def _passing(n: fx.Node, heavy: bool) -> float:
    made = n.meta["val"]
    if _is_view(n) or not isinstance(made, torch.Tensor) or not made.ndim:
        return math.inf
    return LOAD + PASSED * made.numel() / (2 if heavy and is_factor_alone(n) else 1)


def _making(n: fx.Node, heavy: bool) -> float:
    made = n.meta["val"]
    if _is_view(n) or not isinstance(made, torch.Tensor):
        return 0.0
    if kind_of(n.target) == "map":
        return 1.0 + ENTRY * made.numel() * (WARPS if heavy and is_factor_alone(n) else 1)
    return MEETING + (PASSED * _given(n) if heavy else 0.0)


def maps_apart(graph: fx.Graph, carried: list[int], following: list[fx.Node]) -> None:
    """Give what the next state does not wait for maps of its own: it may be made of fewer values than it was given."""
    loop = needed(following) & waiting(graph, carried)
    for n in reversed(list(graph.nodes)):
        away = [u for u in n.users if u.op == "call_function" and u not in loop]
        if n in loop and kind_of(n.target) == "map" and away:
            with graph.inserting_after(n):
                twin = graph.node_copy(n)
            twin.meta["twin"] = True
            for u in away:
                u.replace_input_with(n, twin)


def sliced(d: TileDirection) -> list[Kernel]:
    """Cut a direction where its state passes."""
    views_apart(d.graph)
    on = [k for k, t in enumerate(d.targets) if t.kind == "over"]
    places = [d.sources.index(d.targets[k].what) for k in on]
    if not d.backwards:  # in reverse, what is made again after the loop takes longer than its bytes (LAB.md)
        maps_apart(d.graph.graph, places, [x for k in on if isinstance(x := results_of(d.graph.graph)[k], fx.Node)])
    results = results_of(d.graph.graph)
    heavy = sum(math.prod(x.meta["val"].shape) for x in d.carried) > ENTRIES
    passing, making, working = (partial(price, heavy=heavy) for price in (_passing, _making, _working))
    f = split(d.graph, places, on, None, _stored, working, again=lambda values: made_again(values, passing, making))
    found: list[TileDirection] = []
    for name, graph, made, goes in parted(f, d.sources, d.targets, results):
        if goes:
            without_repeats(graph.graph)
            keeps, own = d.keeps if name == "loop" else "", f"{d.name}_{name}"
            found.append(TileDirection(own, graph, made, goes, d.dtype, d.precision, keeps, d.backwards, d.whole))
    readers: dict[str, list[fx.Node]] = {}
    for one in found:
        for n, x in zip(inputs_of(one.graph.graph), one.sources, strict=True):
            if x.part == "passed":
                readers.setdefault(x.name, []).append(n)
    short = frozenset(name for name, nodes in readers.items() if all(map(is_factor_alone, nodes)))
    return [replace(one, short=short).kernel() for one in found]


__all__ = ["maps_apart", "sliced"]

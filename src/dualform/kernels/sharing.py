"""What the backward takes from the states computed again, and what it computes again itself: a minimum cut.

A group's states are computed again before its vjp runs, and the vjp of a mini-batch begins with much of the same. A
value that both have is kept, if to store and load it costs less than what it would take to compute it from what is kept
below it.

    minimise  sum over recomputed n of work(n) + sum over kept n of moved(n)
    such that what the rest of the later graph reads, and what a recomputed value is made of, is recomputed or kept
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from dualform.graphs.cut import minimum_cut
from dualform.graphs.edit import add_input, inputs_of, output_of
from dualform.kernels.ops import work
from dualform.ops.table import kind_of

# To store an entry and load it again, from beyond the second cache, takes as long as so many multiplications and
# additions.
MOVED = 32.0
Price = Callable[[fx.Node], float]


def _keys(gm: fx.GraphModule, names: dict[Any, int], given: int) -> dict[fx.Node, int]:
    """Number values so that equal numbers mean equal values; the first `given` inputs are the same in all graphs."""
    found: dict[fx.Node, int] = {}
    for i, n in enumerate(inputs_of(gm.graph)):
        found[n] = names.setdefault(("input", i if i < given else n), len(names))
    for n in gm.graph.nodes:
        if n.op == "call_function":
            args, kwargs = fx.map_arg((n.args, n.kwargs), found.__getitem__)  # pyright: ignore[reportArgumentType]
            value = n.meta.get("val")
            kind = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None
            found[n] = names.setdefault(repr((n.target, args, kwargs, kind)), len(names))
    return found


def price(n: fx.Node) -> float:
    """Price of keeping a value; infinite for what is no buffer of its own."""
    if kind_of(n.target) in ("view", "pieces") or n.target is operator.getitem or n.meta["val"].ndim == 0:
        return math.inf
    return MOVED * n.meta["val"].numel()


def shared(earlier: fx.GraphModule, later: fx.GraphModule, given: int) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """Let `earlier` return, after its outputs, values that `later` then reads as inputs after its own; return both,
    and how many.

    given: how many inputs are the same tensors in both.
    """
    names: dict[Any, int] = {}
    made = {key: n for n, key in _keys(earlier, names, given).items() if n.op == "call_function"}
    key_of = _keys(later, names, given)
    both = [n for n in later.graph.nodes if n.op == "call_function" and key_of[n] in made]
    kept, _ = _cut(both, price, work)
    graph = later.graph
    last = inputs_of(graph)[-1]
    for n in reversed(kept):
        new = add_input(graph, f"kept_{n.name}", after=last)
        new.meta = dict(n.meta)
        n.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    output = output_of(earlier.graph)
    output.args = ([*output.args[0], *(made[key_of[n]] for n in kept)],)  # pyright: ignore
    return fx.GraphModule(earlier, earlier.graph), fx.GraphModule(later, graph), len(kept)


def _cut(values: list[fx.Node], price: Price, work: Price) -> tuple[list[fx.Node], list[fx.Node]]:
    """Of values that others read, choose those that are kept, and those that are made again from what is kept."""
    network: list[tuple[Any, Any, float]] = []
    inside = set(values)
    for n in values:  # n: it is needed; "again n": it is computed again
        if any(user not in inside for user in n.users):
            network.append(("read", n, math.inf))
        network += [(n, ("again", n), price(n)), (("again", n), "work", work(n))]
        for source in n.all_input_nodes:
            if source in inside:
                network.append((("again", n), source, math.inf))
    needed = minimum_cut(network, "read", "work")
    made = [n for n in values if ("again", n) in needed]
    return [n for n in values if n in needed and ("again", n) not in needed], made


def made_again(values: list[fx.Node], price: Price = price, work: Price = work) -> set[fx.Node]:
    """Of values that are at hand in one place, choose those that are made again in others."""
    return set(_cut(values, price, work)[1])

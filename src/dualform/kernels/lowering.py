"""A graph in ops that have a row: what torch or we spell out in others, and what is known before it runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dualform.graphs.edit import copied, emitter, inputs_of
from dualform.graphs.simplify import tidy
from dualform.kernels.ops import Unsupported
from dualform.learning.derive import trace_fake
from dualform.learning.transforms import undisturbed
from dualform.ops.table import ENTRIES, definitions, find_row, kind_of

aten = torch.ops.aten


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """Spell a graph out in ops that have a row."""

    def make() -> fx.GraphModule:
        from torch._decomp import core_aten_decompositions, decomposition_table

        table = {op: f for op, f in core_aten_decompositions().items() if not _is_known(op)} | definitions("lowered")
        inputs = [n.meta["val"] for n in inputs_of(gm.graph)]
        refused: list[fx.Node] = []
        while True:
            made = trace_fake(gm, [x.new_empty(x.shape) for x in inputs], table)
            unknown = [n for n in made.graph.nodes if n.op == "call_function" and not _is_known(n.target)]
            more = {n.target: f for n in unknown if (f := decomposition_table.get(n.target)) and n.target not in table}
            if not more:
                break
            refused, table = refused or unknown, table | more
        digits = max((x.dtype.itemsize for x in inputs if x.is_floating_point()), default=0)
        if unknown:  # named as the learner does, if it can be
            raise Unsupported(next((n for n in unknown if "aten" in str(n.target)), (refused or unknown)[0]))
        rounded = next((n for n in made.graph.nodes if n.op == "call_function" and _rounds(n, digits)), None)
        if rounded is not None:
            raise Unsupported(rounded, why=f"it has results of {_types(rounded)}, and generated code has one type")
        return tidy(_turned_last(made))

    return undisturbed(make)


def _types(n: fx.Node) -> str:
    return ", ".join(dict.fromkeys(str(x.dtype) for x in tree_leaves(n.meta["val"]) if isinstance(x, Tensor)))


def _is_known(target: Any) -> bool:
    return bool(kind_of(target)) or target is operator.getitem


def _rounds(n: fx.Node, digits: int) -> bool:
    """Is a value computed with fewer digits than the others? It would not be rounded. Or is it complex?"""

    def few(x: Any) -> bool:
        return isinstance(x, Tensor) and (x.is_complex() or (x.is_floating_point() and x.dtype.itemsize < digits))

    row = find_row(n.target)
    passed_on = row is not None and (row.kind == "view" or (row.kind == "map" and ENTRIES[row.spelt(n)[0]].passes))
    if passed_on and all(few(x.meta["val"]) for x in n.all_input_nodes if x.meta["val"].is_floating_point()):
        return any(x.is_complex() for x in tree_leaves(n.meta["val"]))
    return any(few(x) for x in tree_leaves(n.meta.get("val")))


_TURNS = {aten.t.default, aten.transpose.int}


def _turned_last(gm: fx.GraphModule) -> fx.GraphModule:
    """Compute entry by entry in the order in which the operands lie: f(x^T, y^T) = f(x, y)^T."""
    for n in gm.graph.nodes:
        turns = {(x.target, *x.args[1:]) for x in n.all_input_nodes if x.target in _TURNS and "val" in x.meta}
        row = find_row(n.target)
        if len(turns) != 1 or row is None or row.kind != "map" or ENTRIES[row.spelt(n)[0]].is_placed:
            continue
        if any(x.target not in _TURNS or x.meta["val"].shape != n.meta["val"].shape for x in n.all_input_nodes):
            continue
        ((turn, *axes),) = turns
        given: Any = fx.map_arg(n.args, lambda x: x.args[0])
        inner = emitter(gm.graph, n)(n.target, *given, **n.kwargs)
        n.target, n.args, n.kwargs = turn, (inner, *axes), {}
    for n in gm.graph.nodes:
        if n.target is aten.view.default:  # of what may not lie in order any more
            n.target = aten.reshape.default
    return gm


def specialised(gm: fx.GraphModule, values: Mapping[int, Tensor]) -> fx.GraphModule:
    """Compute what depends on known inputs alone, and drop the branches that it rules out; the inputs stay."""
    gm = copied(gm)
    known = {n: values[k] for k, n in enumerate(inputs_of(gm.graph)) if k in values}
    for n in list(gm.graph.nodes):
        if n.op == "call_function" and n.all_input_nodes and all(x in known for x in n.all_input_nodes):
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda x: known[x])  # pyright: ignore
            known[n] = n.target(*args, **kwargs)
        elif n.target == aten.where.self and n.args[0] in known:
            condition = known[n.args[0]]
            taken = n.args[1] if bool(condition.all()) else n.args[2] if not bool(condition.any()) else None
            if isinstance(taken, fx.Node) and taken.meta["val"].shape == n.meta["val"].shape:
                n.replace_all_uses_with(taken)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm

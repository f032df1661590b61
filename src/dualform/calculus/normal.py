"""Bring a traced graph into one form: every node makes one tensor.

split, chunk, unbind, ... -> slices and selects        max.dim, min.dim -> argmax and gather        lift -> nothing
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Emit = Callable[..., fx.Node]

_COPIES = {aten.lift_fresh.default, aten.lift_fresh_copy.default}
_EXTREMA = {aten.max.dim: aten.argmax.default, aten.min.dim: aten.argmin.default}
_SPLITS = {
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unsafe_split", "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes", "aten::tensor_split", "aten::hsplit", "aten::vsplit", "aten::dsplit", "aten::unbind",
}  # fmt: skip


def normalised(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite results of several tensors as results of one each."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _COPIES:
            original: Any = node.args[0]
            node.replace_all_uses_with(original)
        elif node.target is operator.getitem:
            _part(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _part(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    position: Any = node.args[1]
    name = getattr(getattr(source.target, "_schema", None), "name", "")

    def emit(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        new.meta["stack_trace"] = node.meta.get("stack_trace") or node.stack_trace or ""
        return new

    if source.target in _EXTREMA:
        node.replace_all_uses_with(_extremum(emit, source, position))
    elif name in _SPLITS:
        node.replace_all_uses_with(_piece(emit, source, name, position))


def _extremum(emit: Emit, source: Any, position: int) -> fx.Node:
    x, dim, *rest = source.args
    keep = bool(rest and rest[0]) or bool(source.kwargs.get("keepdim"))
    if position == 1:
        return emit(_EXTREMA[source.target], x, dim, keep)
    where = emit(_EXTREMA[source.target], x, dim, True)
    if not x.meta["val"].ndim:
        return emit(aten.alias.default, x)
    best = emit(aten.gather.default, x, dim, where)
    return best if keep else emit(aten.squeeze.dim, best, dim)


def _piece(emit: Emit, source: Any, name: str, position: int) -> fx.Node:
    x, value = source.args[0], source.args[0].meta["val"]
    parts: list[Tensor] = list(source.meta["val"])
    position %= len(parts)
    if name == "aten::unbind":
        dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
        return emit(aten.select.int, x, dim, position)
    if all(p.shape == value.shape for p in parts):
        return emit(aten.alias.default, x)
    dim = next(d for d in range(value.ndim) if any(p.shape[d] != value.shape[d] for p in parts))
    start = sum(p.shape[dim] for p in parts[:position])
    return emit(aten.slice.Tensor, x, dim, start, start + parts[position].shape[dim])

"""Bring a traced graph into one form: every node makes one tensor.

split, chunk, unbind, ... -> slices and selects        max.dim, sort, topk, median.dim, ... -> their index, and gather
broadcast_tensors -> expand        var_mean, aminmax -> one op each        view -> reshape        lift -> nothing
copy, fill -> what they write      x[arange(n), i] -> gather, and scatter where it is written
native_group_norm, of which the mean and the deviation are not used -> group_norm
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.casts import with_casts
from dualform.graphs.edit import Emit, cleaned, emitter
from dualform.graphs.verify import verified
from dualform.ops.table import bound_arguments, inverse, kind_of, row_of

aten = torch.ops.aten

# A view is a reshape that promises how its numbers lie; a rewritten graph need not keep that promise.
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_COPIES = {aten.lift_fresh.default, aten.lift_fresh_copy.default}


@verified
def normalised(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite results of several tensors as results of one each."""
    with_casts(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.kwargs.get("memory_format") is not None:  # no view asks any more how numbers lie in memory
            node.kwargs = {name: x for name, x in node.kwargs.items() if name != "memory_format"}
        if getattr(node.target, "_overloadname", "") == "Scalar_Tensor" and node.meta["val"].is_floating_point():
            _with_tensor(gm.graph, node)
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        elif node.target in _COPIES:
            original: Any = node.args[0]
            original.meta["fresh"] = original.op == "get_attr"  # a number that the function made, not one that it found
            node.replace_all_uses_with(original)
        elif node.target is operator.getitem:
            _part(gm.graph, node)
        elif node.target is aten.index_select.default and _counts(node.args[2], _size(*node.args[:2])):
            node.replace_all_uses_with(emitter(gm.graph, node)(aten.alias.default, node.args[0]))
        elif node.target is aten.index.Tensor and (axes := _own_axes(node)):
            node.replace_all_uses_with(_of_own_row(emitter(gm.graph, node), axes, node))
        elif row_of(node.target).overwrites:
            node.replace_all_uses_with(_written(emitter(gm.graph, node), node))
        elif node.target is aten.index_put.default and (axes := _own_axes(node)):
            node.replace_all_uses_with(_to_own_row(emitter(gm.graph, node), axes, *node.args))
        elif node.target is aten.index_put.default and (axis := _column_axis(node)):
            node.replace_all_uses_with(_to_columns(emitter(gm.graph, node), axis, *node.args))
        elif node.target is aten.index_put.default:
            _masked(gm.graph, node)
    return cleaned(gm)


def _with_tensor(graph: fx.Graph, node: Any) -> None:
    """remainder(3.0, x) -> remainder(full(3.0), x): torch differentiates that one."""
    twin = getattr(node.target.overloadpacket, "Tensor", None)
    if twin is not None:
        first = emitter(graph, node)(aten.full.default, [], node.args[0], dtype=node.meta["val"].dtype)
        node.target, node.args = twin, (first, *node.args[1:])


def _masked(graph: fx.Graph, node: fx.Node) -> None:
    """x[mask] = number -> where(mask, number, x): entry by entry, as it is meant."""
    given = bound_arguments(node)
    x, number, (mask, *rest) = given["self"], given["values"], given["indices"]
    if rest or given["accumulate"] or mask is None or mask.meta["val"].dtype != torch.bool:
        return
    if number.meta["val"].numel() != 1 or number.meta["val"].dtype != x.meta["val"].dtype:
        return
    value, emit = x.meta["val"], emitter(graph, node)
    for _ in range(value.ndim - mask.meta["val"].ndim):
        mask = emit(aten.unsqueeze.default, mask, -1)
    number = emit(aten.reshape.default, number, []) if number.meta["val"].ndim else number
    node.replace_all_uses_with(emit(aten.where.self, mask, number, x))


def _written(emit: Emit, node: fx.Node) -> fx.Node:
    """What an in-place write leaves, which keeps nothing but the shape and type of what was there."""
    old, new = (*node.args, 0)[:2]
    like = node.meta["val"]
    if not isinstance(new, fx.Node):
        return emit(aten.full_like.default, old, new)
    if new.meta["val"].dtype != like.dtype:
        new = emit(aten._to_copy.default, new, dtype=like.dtype)
    return new if new.meta["val"].shape == like.shape else emit(aten.expand.default, new, list(like.shape))


def _sizes(x: Any) -> list[int]:
    return list(x.meta["val"].shape)


def _size(x: Any, axis: int) -> int:
    """How many entries an axis has; the one that a number is taken to have has one."""
    return _sizes(x)[axis] if x.meta["val"].ndim else 1


def _own_axes(node: fx.Node) -> list[int]:
    """The indexed axes of x[arange(n)], and of x[arange(n), i] or x[arange(n)[:, None], :, i, j], places in each row;
    empty: it is another index."""
    x: Any = node.args[0]
    indices: Any = node.args[1]
    axes = [k for k, i in enumerate(indices) if i is not None]
    rows, *places = (indices[k] for k in axes)
    if not _counts(rows, _sizes(x)[axes[0]]):
        return []
    if not places:
        return axes
    if axes[0] or any(p.meta["val"].dtype not in (torch.int64, torch.int32) for p in places):
        return []
    shape = torch.broadcast_shapes(*(_sizes(i) for i in (rows, *places)))
    lead = all(p.meta["val"].ndim <= rows.meta["val"].ndim for p in places)
    return axes if lead and shape[0] == _sizes(x)[0] else []


def _counts(rows: Any, n: int) -> bool:
    """Is it 0 ... n-1, along its one axis that is not of size 1?"""
    while rows.meta["val"].numel() == n and n in _sizes(rows) and not rows.meta["val"].is_floating_point():
        if rows.op == "get_attr":
            value = getattr(rows.graph.owning_module, rows.target)
            return value.dtype != torch.bool and value.tolist() == torch.arange(n).reshape(value.shape).tolist()
        op = getattr(rows.target, "_opname", "")
        if op not in ("to", "_to_copy") and kind_of(rows.target) != "view":
            return op == "arange" and rows.args in ((n,), (0, n), (0, n, 1))
        rows = rows.args[0]
    return False


def _own_places(emit: Emit, axes: list[int], x: Any, indices: Any) -> tuple[fx.Node, fx.Node, list[int], list[int]]:
    """x as (n, m, *rest), places (n, k, *rest) in its second axis, what lies there, and the order of x's axes."""
    order = [*axes, *(k for k in range(x.meta["val"].ndim) if k not in axes)]
    x = emit(aten.permute.default, x, order)
    n, *sizes = _sizes(x)
    rest = sizes[len(axes) - 1 :]
    shape = list(torch.broadcast_shapes(*(_sizes(indices[k]) for k in axes)))
    place: Any = None
    for k, m in zip(axes[1:], sizes, strict=False):
        one = emit(aten.remainder.Scalar, indices[k], m)
        place = one if place is None else emit(aten.add.Tensor, emit(aten.mul.Tensor, place, m), one)
    place = emit(aten.expand.default, place, shape)
    if place.meta["val"].dtype != torch.int64:
        place = emit(aten._to_copy.default, place, dtype=torch.int64)
    place = emit(aten.reshape.default, place, [n, -1, *(1 for _ in rest)])
    place = emit(aten.expand.default, place, [-1, -1, *rest])
    return emit(aten.reshape.default, x, [n, -1, *rest]), place, [*shape, *rest], order


def _of_own_row(emit: Emit, axes: list[int], node: Any) -> fx.Node:
    if len(axes) == 1:
        return emit(aten.reshape.default, node.args[0], _sizes(node))
    x, place, shape, _ = _own_places(emit, axes, *node.args)
    return emit(aten.reshape.default, emit(aten.gather.default, x, 1, place), shape)


def _column_axis(node: fx.Node) -> int:
    """The axis whose places x[:, places] = y writes to, the same for all rows; 0: it is another write."""
    given = bound_arguments(node)
    *before, index = given["indices"]
    if given["accumulate"] or not before or any(i is not None for i in before) or index is None:
        return 0
    value = index.meta["val"]
    return len(before) if value.ndim == 1 and value.dtype == torch.int64 else 0


def _to_columns(emit: Emit, axis: int, x: Any, indices: Any, values: Any, accumulate: bool = False) -> fx.Node:
    """x[:, places] = values -> index_copy, which counts no rows."""
    shape = list(x.meta["val"].shape)
    index = emit(aten.remainder.Scalar, indices[axis], shape[axis])
    shape[axis] = index.meta["val"].shape[0]
    return emit(aten.index_copy.default, x, axis, index, emit(aten.expand.default, values, shape))


def _to_own_row(emit: Emit, axes: list[int], x: Any, indices: Any, values: Any, accumulate: bool = False) -> fx.Node:
    if len(axes) == 1:
        size, (k,) = _sizes(x), axes
        values = emit(aten.expand.default, values, [*size[:k], *_sizes(indices[k]), *size[k + 1 :]])
        values = emit(aten.reshape.default, values, size)
        return emit(aten.add.Tensor, x, values) if accumulate else values
    rows, place, shape, order = _own_places(emit, axes, x, indices)
    values = emit(aten.reshape.default, emit(aten.expand.default, values, shape), _sizes(place))
    rows = emit(aten.scatter_add.default if accumulate else aten.scatter.src, rows, 1, place, values)
    rows = emit(aten.reshape.default, rows, [_sizes(x)[k] for k in order])
    return emit(aten.permute.default, rows, inverse(order))


def _part(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    position: Any = node.args[1]
    emit = emitter(graph, node)
    if source.target is aten.broadcast_tensors.default:
        shape = list(node.meta["val"].shape)
        node.replace_all_uses_with(emit(aten.expand.default, source.args[0][position], shape))
    alone = not any(other.users for other in source.users if other is not node)
    if source.target is aten.native_group_norm.default and position == 0 and alone:
        x, weight, bias, *_, groups, eps = source.args  # which takes numbers that lie anywhere
        node.replace_all_uses_with(emit(aten.group_norm.default, x, groups, weight, bias, eps))
    match row_of(source.target).several:
        case ("cut",):
            node.replace_all_uses_with(_piece(emit, source, position))
        case ("picked",) if position == 0:
            node.replace_all_uses_with(_picked(emit, source, node))
        case ("picked", index):
            node.replace_all_uses_with(_extremum(emit, source, position, getattr(aten, index).default))
        case (_, _) as ops:
            node.replace_all_uses_with(_one_of_two(emit, source, ops[position]))


def _extremum(emit: Emit, source: Any, position: int, index: Any) -> fx.Node:
    x, dim, *rest = source.args
    keep = bool(rest and rest[0]) or bool(source.kwargs.get("keepdim"))
    if position == 1:
        return emit(index, x, dim, keep)
    where = emit(index, x, dim, True)
    if not x.meta["val"].ndim:
        return emit(aten.alias.default, x)
    best = emit(aten.gather.default, x, dim, where)
    return best if keep else emit(aten.squeeze.dim, best, dim)


def _one_of_two(emit: Emit, source: Any, op: str) -> fx.Node:
    given = bound_arguments(source)
    x = given["self"]
    whole = list(range(x.meta["val"].ndim))
    dims = whole if given.get("dim") in (None, []) else given["dim"]
    dims, keep = [dims] if isinstance(dims, int) else dims, bool(given.get("keepdim"))
    if op in ("amin", "amax"):
        return emit(getattr(aten, op).default, x, dims, keep)
    if op == "mean":
        return emit(aten.mean.dim, x, dims, keep)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    return emit(getattr(aten, op).correction, x, dims, correction=1 if correction is None else correction, keepdim=keep)


def _picked(emit: Emit, source: Any, node: fx.Node) -> fx.Node:
    """The values of an op that also says where it found them: x, gathered there."""
    given = bound_arguments(source)
    x, value = given["self"], given["self"].meta["val"]
    if not value.ndim:
        return emit(aten.alias.default, x)
    index = emit(operator.getitem, source, 1)
    dropped = index.meta["val"].ndim < value.ndim
    index = emit(aten.unsqueeze.default, index, given["dim"]) if dropped else index
    best = emit(aten.gather.default, x, given["dim"], index)
    return emit(aten.squeeze.dim, best, given["dim"]) if dropped else best


def _piece(emit: Emit, source: Any, position: int) -> fx.Node:
    x, value = source.args[0], source.args[0].meta["val"]
    parts: list[Tensor] = list(source.meta["val"])
    position %= len(parts)
    if source.target is aten.unbind.int:
        dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
        return emit(aten.select.int, x, dim, position)
    if all(p.shape == value.shape for p in parts):
        return emit(aten.alias.default, x)
    dim = next(d for d in range(value.ndim) if any(p.shape[d] != value.shape[d] for p in parts))
    start = sum(p.shape[dim] for p in parts[:position])
    return emit(aten.slice.Tensor, x, dim, start, start + parts[position].shape[dim])

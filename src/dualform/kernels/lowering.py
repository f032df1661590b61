"""A graph in ops that have a row: what torch or we spell out in others, and what is known before it runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dualform.kernels.ops import MAPS, PIECES, PRODUCTS, REDUCTIONS, VIEWS
from dualform.learning.derive import trace_fake, undisturbed
from dualform.learning.simplify import tidy

aten = torch.ops.aten


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """Spell a graph out in ops that have a row."""

    def make() -> fx.GraphModule:
        from torch._decomp import core_aten_decompositions

        known = {*MAPS, *PIECES, *PRODUCTS, *REDUCTIONS, *VIEWS}
        table = {op: f for op, f in core_aten_decompositions().items() if op not in known} | _own
        inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
        return tidy(_turned_last(trace_fake(gm, [x.new_empty(x.shape) for x in inputs], table)))

    return undisturbed(make)


_TURNS = {aten.t.default, aten.transpose.int}


def _turned_last(gm: fx.GraphModule) -> fx.GraphModule:
    """Compute entry by entry in the order in which the operands lie: f(x^T, y^T) = f(x, y)^T."""
    for n in gm.graph.nodes:
        turns = {(x.target, *x.args[1:]) for x in n.all_input_nodes if x.target in _TURNS and "val" in x.meta}
        if n.target not in MAPS or n.target in (aten.tril.default, aten.triu.default) or len(turns) != 1:
            continue
        if any(x.target not in _TURNS or x.meta["val"].shape != n.meta["val"].shape for x in n.all_input_nodes):
            continue
        ((turn, *axes),) = turns
        with gm.graph.inserting_before(n):
            inner = gm.graph.call_function(n.target, fx.map_arg(n.args, lambda x: x.args[0]), n.kwargs)
        inner.meta["val"] = turn(n.meta["val"], *axes)
        n.target, n.args, n.kwargs = turn, (inner, *axes), {}
    return gm


def specialised(gm: fx.GraphModule, values: Mapping[int, Tensor]) -> fx.GraphModule:
    """Compute what depends on known inputs alone, and drop the branches that it rules out; the inputs stay."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    known = {n: values[k] for k, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder") if k in values}
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


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd, mean, rstd


def _standardize_vjp(g: Tensor, x: Tensor, hat: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        c = 2 * math.sqrt(2 / math.pi)
        return x * torch.sigmoid(x * (c + c * 0.044715 * x * x))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Any:
    return NotImplemented if min is None or max is None else x.clamp_min(min).clamp_max(max)


def _vector_norm(x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    axes = list(range(x.ndim)) if dim is None else dim
    if ord in (math.inf, -math.inf):
        return (x.abs().amax if ord > 0 else x.abs().amin)(axes, keepdim)
    if ord == 0:
        return (x != 0).to(x.dtype).sum(axes, keepdim)
    if ord == 1:
        return x.abs().sum(axes, keepdim)
    return (x * x).sum(axes, keepdim).sqrt() if ord == 2 else (x.abs() ** ord).sum(axes, keepdim) ** (1 / ord)


def _addmm(x: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return (x if beta == 1 else beta * x) + (a @ b if alpha == 1 else alpha * (a @ b))


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    centred = x - x.amax(dim, keepdim=True)
    return centred - torch.log(torch.exp(centred).sum(dim, keepdim=True))


def _softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return y * (g - (g * y).sum(dim, keepdim=True))


def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return g - torch.exp(y) * g.sum(dim, keepdim=True)


# What picks entries is spelt as a sum over all of them, a few dozen here; where, not times 0, so that a NaN stays where it is.


def _picked(x: Tensor, dim: int, taken: Tensor) -> Tensor:
    """out[..., i, ...] = sum over j with taken[i, j] of x[..., j, ...]."""
    rows = torch.where(taken, x.movedim(dim, -1).unsqueeze(-2), 0.0).sum(-1)
    return rows.movedim(-1, dim)


def _at(index: Tensor, n: int) -> Tensor:
    """taken[i, j]: is j the index at i?"""
    index = torch.where(index < 0, index + n, index)
    return index[:, None] == torch.arange(n, device=index.device)


def _cumsum(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    if not x.ndim:
        return x
    place = torch.arange(x.shape[dim], device=x.device)
    return _picked(x, dim, place[:, None] >= place)


def _flip(x: Tensor, dims: Any) -> Tensor:
    for dim in dims:
        place = torch.arange(x.shape[dim], device=x.device)
        x = _picked(x, dim, place[:, None] + place == x.shape[dim] - 1)
    return x


def _one_axis(indices: Any) -> int | None:
    """Find the only axis that is indexed, by a vector of numbers."""
    axes = [k for k, i in enumerate(indices) if i is not None]
    return axes[0] if len(axes) == 1 and indices[axes[0]].ndim == 1 and indices[axes[0]].dtype == torch.long else None


def _index(x: Tensor, indices: Any) -> Any:
    axis = _one_axis(indices)
    return NotImplemented if axis is None else _picked(x, axis, _at(indices[axis], x.shape[axis]))


def _index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    axis = _one_axis(indices)
    if axis is None or not accumulate:
        return NotImplemented
    return x + _picked(values.expand(_indexed(x, axis, indices[axis])), axis, _at(indices[axis], x.shape[axis]).T)


def _indexed(x: Tensor, axis: int, index: Tensor) -> list[int]:
    return [len(index) if k == axis else n for k, n in enumerate(x.shape)]


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return _picked(x, dim, _at(index, x.shape[dim]))


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    return x + alpha * _picked(source, dim, _at(index, x.shape[dim]).T)


stop_gradient_op = torch.ops.dualform.stop_gradient.default
_own: dict[Any, Callable[..., Any]] = {
    torch.ops.dualform.standardize.default: _standardize,
    torch.ops.dualform.standardize_vjp.default: _standardize_vjp,
    stop_gradient_op: lambda x: x.detach(),
    aten.gelu.default: _gelu,
    aten.silu.default: lambda x: x * torch.sigmoid(x),
    aten.clamp.default: _clamp,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.cumsum.default: _cumsum,
    aten.flip.default: _flip,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_add,
}

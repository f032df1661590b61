"""A graph in ops that have a row: what torch or we spell out in others, and what is known before it runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dualform.graphs.edit import copied, emitter, inputs_of
from dualform.graphs.simplify import tidy
from dualform.kernels.ops import MAPS, PIECES, PRODUCTS, REDUCTIONS, VIEWS, Unsupported
from dualform.kernels.picking import PICKING
from dualform.learning.derive import gelu, trace_fake
from dualform.learning.transforms import undisturbed

aten = torch.ops.aten


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """Spell a graph out in ops that have a row."""

    def make() -> fx.GraphModule:
        from torch._decomp import core_aten_decompositions, decomposition_table

        table = {op: f for op, f in core_aten_decompositions().items() if op not in _known} | _own
        inputs = [n.meta["val"] for n in inputs_of(gm.graph)]
        refused: list[fx.Node] = []
        while True:
            made = trace_fake(gm, [x.new_empty(x.shape) for x in inputs], table)
            unknown = [n for n in made.graph.nodes if n.op == "call_function" and n.target not in _known]
            more = {n.target: f for n in unknown if (f := decomposition_table.get(n.target)) and n.target not in table}
            if not more:
                break
            refused, table = refused or unknown, table | more
        digits = max((x.dtype.itemsize for x in inputs if x.is_floating_point()), default=0)
        unknown += [n for n in made.graph.nodes if n.op == "call_function" and _rounds(n, digits)]
        if unknown:  # named as the learner does, if it can be
            raise Unsupported(next((n for n in unknown if "aten" in str(n.target)), (refused or unknown)[0]))
        return tidy(_turned_last(made))

    return undisturbed(make)


_known = {*MAPS, *PIECES, *PRODUCTS, *REDUCTIONS, *VIEWS, operator.getitem}
_CONSTANTS = {"fill", "where", "copy"}


def _rounds(n: fx.Node, digits: int) -> bool:
    """Is a value computed with fewer digits than the others? It would not be rounded. Or is it complex?"""

    def few(x: Any) -> bool:
        return isinstance(x, Tensor) and (x.is_complex() or (x.is_floating_point() and x.dtype.itemsize < digits))

    passed_on = n.target in VIEWS or (n.target in MAPS and MAPS[n.target](n)[0] in _CONSTANTS)
    if passed_on and all(few(x.meta["val"]) for x in n.all_input_nodes if x.meta["val"].is_floating_point()):
        return any(x.is_complex() for x in tree_leaves(n.meta["val"]))
    return any(few(x) for x in tree_leaves(n.meta.get("val")))


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
        given: Any = fx.map_arg(n.args, lambda x: x.args[0])
        inner = emitter(gm.graph, n)(n.target, *given, **n.kwargs)
        n.target, n.args, n.kwargs = turn, (inner, *axes), {}
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


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd, mean, rstd


def _standardize_vjp(g: Tensor, x: Tensor, hat: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))


def _clamp_between(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    x = x if min is None else torch.maximum(x, min)
    return x if max is None else torch.minimum(x, max)


def _round(x: Tensor, *, decimals: int = 0) -> Tensor:
    tens = 10.0 ** abs(decimals)
    return (x * tens).round() / tens if decimals >= 0 else (x / tens).round() * tens


def _variance_and_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = [d % x.ndim for d in dim or range(x.ndim)]
    rest = max(math.prod(x.shape[d] for d in axes) - (1 if correction is None else correction), 0)
    mean = x.mean(axes, keepdim=True)
    found = ((x - mean) ** 2).sum(axes, keepdim=True) * (1 / rest if rest else math.inf)
    kept = [n for d, n in enumerate(x.shape) if d not in axes]
    return (found, mean) if keepdim else (found.reshape(kept), mean.reshape(kept))


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


def _most(value: Callable[..., Tensor], place: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, dim, keepdim=False: (value(x, dim, keepdim), place(x, dim, keepdim))


def _pad(x: Tensor, pad: Any, value: float = 0.0) -> Any:
    if min(pad, default=0) >= 0:
        return NotImplemented
    for k, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis, first, last = x.ndim - 1 - k, max(-before, 0), max(-after, 0)
        x = x.narrow(axis, first, x.shape[axis] - first - last)
    return aten.constant_pad_nd.default(x, [max(n, 0) for n in pad], value)


def _windows(x: Tensor, axis: int, size: int, step: int) -> Tensor:
    if not x.ndim:
        return x.expand(1)
    axis, starts = axis % x.ndim, range(0, x.shape[axis] - size + 1, step)
    return torch.stack([x.narrow(axis, s, size).movedim(axis, -1) for s in starts], axis)


def _repeat(x: Tensor, repeats: Any) -> Tensor:
    """Put axes of repeats between those of x."""
    sizes = [*[1] * (len(repeats) - x.ndim), *x.shape]
    wide = x.reshape([n for size in sizes for n in (1, size)])
    wide = wide.expand([n for size, r in zip(sizes, repeats, strict=True) for n in (r, size)])
    return wide.reshape([size * r for size, r in zip(sizes, repeats, strict=True)])


_own: dict[Any, Callable[..., Any]] = {
    torch.ops.dualform.standardize.default: _standardize,
    torch.ops.dualform.standardize_vjp.default: _standardize_vjp,
    aten.gelu.default: gelu,
    aten.silu.default: lambda x: x * torch.sigmoid(x),
    aten.clamp.default: lambda x, min=None, max=None: (
        NotImplemented if min is None or max is None else x.clamp_min(min).clamp_max(max)
    ),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: lambda g, y, dim, dtype: y * (g - (g * y).sum(dim, keepdim=True)),
    aten._log_softmax_backward_data.default: lambda g, y, dim, dtype: g - torch.exp(y) * g.sum(dim, keepdim=True),
    aten.clamp.Tensor: _clamp_between,
    aten.clamp_min.Tensor: _clamp_between,
    aten.clamp_max.Tensor: torch.minimum,
    aten.round.decimals: _round,
    aten.var.correction: lambda *a, **k: _variance_and_mean(*a, **k)[0],
    aten.var_mean.correction: _variance_and_mean,
    aten.std.correction: lambda *a, **k: _variance_and_mean(*a, **k)[0].sqrt(),
    aten.max.dim: _most(torch.amax, torch.argmax),
    aten.min.dim: _most(torch.amin, torch.argmin),
    aten.softshrink_backward.default: lambda g, x, threshold: torch.where(x.abs() > threshold, g, 0.0),
    aten.hardshrink_backward.default: lambda g, x, threshold: torch.where(x.abs() > threshold, g, 0.0),
    aten.constant_pad_nd.default: _pad,
    aten.unfold.default: _windows,
    aten.repeat.default: _repeat,
} | PICKING

"""Rows of sums and of what is made of sums: means, norms, extrema, running sums.

Most reductions need no rule of their own: each entry feeds one result,
so the op's own backward over ones is all slopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Axis, Label, Term, fresh_axes, make_factor
from dualform.ops import picking
from dualform.ops.examples import T, call
from dualform.ops.pointwise import named, nothing
from dualform.ops.table import ALL, FOLDS, Fold, OpCall, diagonal_terms, dims_of, row

NM, BNM, SIGNED = T("n m"), T("b n m"), T("n m", "signed")


def reduced(call: OpCall, x: Tensor, dim: Any = None) -> tuple[list[int], tuple[Axis, ...], tuple[Axis, ...]]:
    """The dims of x that go (dim, where the call names none), the output's axes and x's."""
    dims = dims_of(call.bound.get("dim", call.bound.get("axis", dim)), x.ndim)
    inn = fresh_axes(x.shape)
    kept = call.out.ndim == x.ndim
    out = tuple(() if k in dims else axis for k, axis in enumerate(inn) if kept or k not in dims)
    return dims, out, inn


def along(*ops: str) -> list[Any]:
    """The usual calls of a reduction: of all, of one axis, of some and kept."""
    return [c for op in ops for c in (call(op, NM), call(op, T("")), call(op, T("l")))]


FOLDS |= {
    "sum": Fold(("T(0)", "{0} += {1};"), ("tl.sum({0}, {axis})", "0.0"), "plus"),
    "prod": Fold(("T(1)", "{0} *= {1};"), ("tl.reduce({0}, {axis}, times_)", "1.0"), "mul"),
}
for _op, _sign, _end in (("max", ">", "-"), ("min", "<", "")):
    _begun = (f"T({_end}INFINITY)", f"{{0}} = ({{1}} {_sign} {{0}} || {{1}} != {{1}} ? {{1}} : {{0}});")
    FOLDS[f"a{_op}"] = Fold(_begun, (f"a{_op}_({{0}}, {{axis}})", f"float('{_end}inf')"), _op)


def _folded(n: fx.Node) -> tuple[str, list[Any], dict[str, Any]]:
    """Which axis of the result each axis of the operand is, None if it goes, and what the result is scaled by."""
    x: Any = n.args[0]
    name, shape = named(n), tuple(x.meta["val"].shape)
    dims: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    keep = bool(n.args[2] if len(n.args) > 2 else n.kwargs.get("keepdim", False))
    over = set(dims_of(dims, len(shape))) if shape else set()
    kept = [None if a in over else sum(keep or b not in over for b in range(a)) for a in range(len(shape))]
    scale = 1 / math.prod(shape[a] for a in over) if name == "mean" else 1.0
    return "sum" if name == "mean" else name, [x], {"kept": kept, "scale": scale}


_folds = {"kind": "reduction", "entry": _folded}


@row(
    "aten::sum", affine=ALL, **_folds, odd=True, python="{0}.sum() | {0}.sum({1}) | {0}.sum({1}, "
    "keepdim={2}) | x.", called=True,
    examples=[*along("sum"), call("sum.dim_IntList", NM, [-1]), call("sum.dim_IntList", T("n m k"), [0, 2], True), call("sum.dim_IntList", NM, [])],
)  # fmt: skip
def _sum(call: OpCall, operand: int) -> list[Term]:
    _, out, inn = reduced(call, call.operands[0])
    return [Term(1.0, (), out, inn)]


@row("aten::sum_to_size", affine=ALL, examples=[call("", T("2 n m"), [3, 1])])
def _sum_to_size(call: OpCall, operand: int) -> list[Term]:
    x = call.operands[0]
    inn = fresh_axes(x.shape)
    kept = inn[x.ndim - call.out.ndim :]
    return [Term(1.0, (), tuple(() if n == 1 else axis for n, axis in zip(call.out.shape, kept, strict=True)), inn)]


@row(
    "aten::mean", affine=ALL, **_folds, odd=True, called=True,
    examples=[*along("mean"), call("mean.dim", NM, [0]), call("mean.dim", T("n m k"), [0, -1], True)],
)  # fmt: skip
def _mean(call: OpCall, operand: int) -> list[Term]:
    x = call.operands[0]
    dims, out, inn = reduced(call, x)
    return [Term(1.0 / math.prod(x.shape[d] for d in dims), (), out, inn)]


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


def _most(value: Callable[..., Tensor], place: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, dim, keepdim=False: (value(x, dim, keepdim), place(x, dim, keepdim))


# Two ops of the same arguments.
_both = {"several": ("var", "mean"), "python": "torch."}
row("aten::var_mean", **_both, examples=[call("var_mean.dim", NM, [1])])(None)
row(
    "aten::var_mean.correction", **_both, definition=_variance_and_mean, lowered=_variance_and_mean,
    examples=[call("", NM, [1], correction=0)],
)(None)  # fmt: skip
row("aten::std_mean", several=("std", "mean"), examples=[call("std_mean.correction", NM, [1], correction=0)])(None)
row("aten::aminmax", several=("amin", "amax"), examples=[call("", NM, dim=1)])(None)


@row(
    "aten::prod", **_folds, examples=[*along("prod"), call("prod.dim_int", SIGNED, 0), call("prod.dim_int", BNM, -1, True)],
)  # fmt: skip
@row("aten::amax", "aten::amin", **_folds, examples=[call("amax", NM, [1]), call("amin", NM, [0, 1], True)])
@row("aten::var", "aten::std", examples=[*along("var", "std"), call("var.dim", NM, [0])])
@row(
    "aten::var.correction", lowered=lambda *a, **k: _variance_and_mean(*a, **k)[0],
    examples=[call("", NM, [1], correction=0, keepdim=True)],
)  # fmt: skip
@row(
    "aten::std.correction", lowered=lambda *a, **k: _variance_and_mean(*a, **k)[0].sqrt(), examples=[call("", BNM, [0, 2], correction=1)]
)  # fmt: skip
@row(
    "aten::linalg_vector_norm", lowered=_vector_norm,
    examples=[*(call("", SIGNED, p, [1]) for p in (2, 1, 0, 3, 0.5, float("inf"), -float("inf"), -1)), call("", SIGNED)],
)  # fmt: skip
@row("aten::logsumexp", lowered="torch", examples=[call("", NM, [1]), call("", BNM, [0, 1], True)])
@row(
    "aten::norm", "aten::frobenius_norm", "aten::max", "aten::min", "aten::median", "aten::nanmedian", "aten::nansum",
    "aten::nanmean", "aten::special_logsumexp",
    examples=[
        *along("max", "min", "median", "nanmedian", "nansum", "nanmean"), call("special_logsumexp", NM, [1]), call("nansum", NM, [0]), call("norm.ScalarOpt_dim", NM, 2, [1]), call("norm.Scalar", NM, 3),
        call("nanmean", NM, [1]), call("frobenius_norm.dim", BNM, [1, 2]),
    ],
)  # fmt: skip
def reduction(call: OpCall, operand: int) -> list[Term]:
    """Slopes of any reduction; ties and zeros as torch's own backward has them."""
    if "other" in call.bound:
        return NotImplemented
    _, out, inn = reduced(call, call.operands[0])
    slope = make_factor(slope_of(call, operand), inn, _slope_name(call))
    cut = (make_factor(call.out != 0, out, "[std≠0]"),) if "::std" in call.target._schema.name else ()
    return [Term(1.0, (slope, *cut), out, inn)]


@row(
    "aten::binary_cross_entropy",
    examples=[
        *(call("", NM, NM, None, k) for k in (0, 1, 2)), call("", NM, NM, NM, 1), call("", NM, NM, T("m"), 0),
    ],
)  # fmt: skip
def _cross_entropy(call: OpCall, operand: int) -> list[Term]:
    """Entry by entry, then summed or averaged: (x - t) / (x (1 - x)), by no less than 1e-12, as torch divides."""
    if call.places[operand][0] == "weight":
        return NotImplemented
    inn = fresh_axes(call.operands[operand].shape)
    slope = make_factor(slope_of(call, operand), inn, _slope_name(call))
    return [Term(1.0, (slope,), () if call.bound["reduction"] else inn, inn)]


def slope_of(call: OpCall, operand: int) -> Tensor:
    """d (sum of the result) / d operand: all there is to know where each entry feeds one result."""
    pulled: Any = torch.func.vjp(lambda t: call.run(operand, t), call.operands[operand])
    return pulled[1](torch.ones_like(pulled[0]))[0]


def _slope_name(call: OpCall) -> str:
    name = call.target._schema.name.split("::")[1]
    return "p" if name.endswith("logsumexp") else f"{name.replace('linalg_vector_', '')}'({call.operand_name(0)})"


def _along(call: OpCall, name: str, k: int | None) -> list[Term]:
    """Each entry of a sort looks at its whole line."""
    inn, dim = fresh_axes(call.argument(name, k).shape), call.bound["dim"]
    out = list(inn)
    if inn:
        out[dim] = fresh_axes(call.out.shape)[dim]
    return [Term(1.0, (), tuple(out), inn)]


def _over(call: OpCall, name: str, k: int | None) -> list[Term]:
    """Each entry of a reduction looks at the whole of what is reduced to it."""
    _, out, inn = reduced(call, call.argument(name, k))
    return [Term(1.0, (), out, inn)]


row("aten::argmax", reads=_over, lowered=picking.first(torch.amax), examples=[call("", NM, 1), call("", NM)])(nothing)
_calls = [call("", NM, 1), call("", NM, 0, True)]
row("aten::argmin", reads=_over, lowered=picking.first(torch.amin), examples=_calls)(nothing)
row(
    "aten::any", "aten::all", "aten::count_nonzero", reads=_over,
    examples=[call(op, NM, 1) for op in ("any.dim", "all.dim", "count_nonzero")],
)(nothing)  # fmt: skip
row(
    "aten::argsort", reads=_along, examples=[call("", NM, 1), call("", BNM, 0, True), call("argsort.stable", NM, stable=True)],
)(nothing)  # fmt: skip


def _elsewhere(call: OpCall, operand: int) -> list[Term]:
    """The values of such an op are gathered at its indices (normal.py); those have no derivative."""
    return NotImplemented


# Values of their argument, and where they found them.
_picks = {"several": ("picked",)}
row(
    "aten::mode", "aten::nanmedian.dim", reads=_over, **_picks,
    examples=[call(op, NM, 1).of(1) for op in ("mode", "nanmedian.dim")],
)(_elsewhere)  # fmt: skip
row("aten::kthvalue", reads=_over, lowered=picking.kthvalue, **_picks, examples=[call("", NM, 2, 1).of(1)])(_elsewhere)
row("aten::median.dim", reads=_over, lowered=picking.median, **_picks, examples=[call("", NM, 1).of(1)])(_elsewhere)
row("aten::topk", reads=_along, lowered=picking.topk, **_picks, examples=[call("", NM, 2, 1).of(1)])(_elsewhere)
for _op, _run in (("cummax", picking.cummax), ("cummin", picking.cummin)):
    row(f"aten::{_op}", reads=_along, lowered=_run, **_picks, examples=[call("", NM, 1).of(1)])(_elsewhere)
row("aten::sort", reads=_along, lowered=picking.sort, **_picks, examples=[call("", NM, 1).of(1)])(_elsewhere)
for _op, _value, _place in (("max", torch.amax, torch.argmax), ("min", torch.amin, torch.argmin)):
    row(
        f"aten::{_op}.dim", several=("picked", f"arg{_op}"), lowered=_most(_value, _place), examples=[call("", NM, 1), call("", NM, 1).of(1)]
    )(reduction)  # fmt: skip


@row(
    "aten::cumsum", affine=ALL, odd=True, python="x.", lowered=picking.running(torch.sum, 0), examples=[call("", NM, 1), call("", T("1 m"), 0), call("", T(""), 0), call("", BNM, -2)]
)  # fmt: skip
def _cumsum(call: OpCall, operand: int) -> list[Term]:
    """A triangle: dy_i/dx_j = [i >= j]."""
    x = call.operands[0]
    inn = fresh_axes(x.shape)
    out, dim = list(inn), call.bound["dim"] % max(x.ndim, 1)
    if not x.ndim or not inn[dim]:
        return [Term(1.0, (), inn, inn)]
    out[dim] = (Label(x.shape[dim]),)
    return [Term(1.0, (Triangle(out[dim], inn[dim]),), tuple(out), inn)]


_RUNS = [call("", SIGNED, 1), call("", T(""), 0), call("", BNM, 0), call("", T("n 1"), 1)]


@row("aten::cumprod", lowered=picking.running(torch.prod, 1), examples=_RUNS)
@row("aten::logcumsumexp", lowered=picking.running(torch.logsumexp, -math.inf), examples=_RUNS)
def _running(call: OpCall, operand: int) -> list[Term]:
    """A triangle of slopes for each line: those of the running product are products that leave one factor out."""
    x, dim = call.operands[0], call.bound["dim"] % max(call.operands[0].ndim, 1)
    inn = fresh_axes(x.shape)
    if not x.ndim or not inn[dim]:
        return diagonal_terms(call, operand)
    out, n = list(inn), x.shape[dim]
    out[dim] = (Label(n),)
    line = x.movedim(dim, -1)
    lower = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()  # [output, input]
    if call.target._schema.name == "aten::cumprod":
        eye = torch.eye(n, dtype=torch.bool, device=x.device)
        left_out = torch.where(eye, torch.ones_like(line).unsqueeze(-1), line.unsqueeze(-2))  # [input, factor]
        slope = left_out.cumprod(-1).mT
    else:
        gap = line.unsqueeze(-2) - call.out.movedim(dim, -1).unsqueeze(-1)
        slope = torch.where(lower, gap, torch.zeros_like(gap)).exp()
    rest = tuple(axis for k, axis in enumerate(inn) if k != dim)
    name = f"{call.target._schema.name.split('::')[1]}'({call.operand_name(0)})"
    return [Term(1.0, (make_factor(slope * lower, (*rest, out[dim], inn[dim]), name),), tuple(out), inn)]

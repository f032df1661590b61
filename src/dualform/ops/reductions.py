"""Rows of sums and of what is made of sums: means, norms, extrema, running sums.

Most reductions need no rule of their own: each entry feeds one result, so the op's own backward over ones is all slopes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Axis, Label, Term, fresh_axes, make_factor
from dualform.ops.examples import T, call
from dualform.ops.table import ALL, Call, diagonal_terms, dims_of, row, volume_of

NM, BNM, SIGNED = T("n m"), T("b n m"), T("n m", "signed")


def _reduced(call: Call) -> tuple[list[int], tuple[Axis, ...], tuple[Axis, ...]]:
    """The dims that go, the output's axes and the input's."""
    x = call.operands[0]
    dims = dims_of(call.bound.get("dim", call.bound.get("axis")), x.ndim)
    inn = fresh_axes(x.shape)
    kept = call.out.ndim == x.ndim
    out = tuple(() if k in dims else axis for k, axis in enumerate(inn) if kept or k not in dims)
    return dims, out, inn


def along(*ops: str) -> list[Any]:
    """The usual calls of a reduction: of all, of one axis, of some and kept."""
    return [c for op in ops for c in (call(op, NM), call(op, T("")), call(op, T("l")))]


@row(
    "aten::sum", affine=ALL,
    examples=[*along("sum"), call("sum.dim_IntList", NM, [-1]), call("sum.dim_IntList", T("n m k"), [0, 2], True), call("sum.dim_IntList", NM, [])],
)  # fmt: skip
def _sum(call: Call, operand: int) -> list[Term]:
    _, out, inn = _reduced(call)
    return [Term(1.0, (), out, inn)]


@row("aten::sum_to_size", affine=ALL, examples=[call("", T("2 n m"), [3, 1])])
def _sum_to_size(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    inn = fresh_axes(x.shape)
    kept = inn[x.ndim - call.out.ndim :]
    return [Term(1.0, (), tuple(() if n == 1 else axis for n, axis in zip(call.out.shape, kept, strict=True)), inn)]


@row(
    "aten::mean",
    affine=ALL,
    examples=[*along("mean"), call("mean.dim", NM, [0]), call("mean.dim", T("n m k"), [0, -1], True)],
)
def _mean(call: Call, operand: int) -> list[Term]:
    dims, out, inn = _reduced(call)
    return [Term(1.0 / volume_of(call.operands[0].shape, dims), (), out, inn)]


@row(
    "aten::var", "aten::std", "aten::logsumexp", "aten::linalg_vector_norm", "aten::norm", "aten::frobenius_norm", "aten::prod", "aten::amax",
    "aten::amin", "aten::max", "aten::min", "aten::median", "aten::nanmedian", "aten::nansum", "aten::nanmean", "aten::special_logsumexp",
    examples=[
        *along("var", "std", "prod", "max", "min", "median", "nanmedian", "nansum", "nanmean"),
        call("var.correction", NM, [1], correction=0, keepdim=True), call("var.dim", NM, [0]), call("std.correction", BNM, [0, 2], correction=1),
        call("prod.dim_int", SIGNED, 0), call("prod.dim_int", BNM, -1, True), call("amax", NM, [1]), call("amin", NM, [0, 1], True),
        call("logsumexp", NM, [1]), call("logsumexp", BNM, [0, 1], True), call("special_logsumexp", NM, [1]), call("nansum", NM, [0]),
        *(call("linalg_vector_norm", SIGNED, p, [1]) for p in (2, 1, 0, 3, 0.5, float("inf"), -float("inf"), -1)),
        call("linalg_vector_norm", SIGNED), call("norm.ScalarOpt_dim", NM, 2, [1]), call("norm.Scalar", NM, 3), call("nanmean", NM, [1]),
        call("frobenius_norm.dim", BNM, [1, 2]),
    ],
)  # fmt: skip
def reduction(call: Call, operand: int) -> list[Term]:
    """Slopes of any reduction; ties and zeros as torch's own backward has them."""
    if "other" in call.bound:
        return NotImplemented
    _, out, inn = _reduced(call)
    return [Term(1.0, (make_factor(slope_of(call, operand), inn, _slope_name(call)),), out, inn)]


def slope_of(call: Call, operand: int) -> Tensor:
    """d (sum of the result) / d operand: all there is to know where each entry feeds one result."""
    pulled: Any = torch.func.vjp(lambda t: call.run(operand, t), call.operands[operand])
    return pulled[1](torch.ones_like(pulled[0]))[0]


def _slope_name(call: Call) -> str:
    name = call.target._schema.name.split("::")[1]
    return "p" if name.endswith("logsumexp") else f"{name.replace('linalg_vector_', '')}'({call.operand_name(0)})"


def _nothing(call: Call, operand: int) -> list[Term]:
    return []


def _along(call: Call, name: str, k: int | None) -> list[Term]:
    """Each entry of a sort looks at its whole line."""
    inn, dim = fresh_axes(call.argument(name, k).shape), call.bound["dim"]
    out = list(inn)
    if inn:
        out[dim] = fresh_axes(call.out.shape)[dim]
    return [Term(1.0, (), tuple(out), inn)]


def _over(call: Call, name: str, k: int | None) -> list[Term]:
    """Each entry of a reduction looks at the whole of what is reduced to it."""
    inn = fresh_axes(call.argument(name, k).shape)
    dims = dims_of(call.bound.get("dim"), len(inn))
    kept = call.out.ndim == len(inn)
    return [Term(1.0, (), tuple(() if k in dims else a for k, a in enumerate(inn) if kept or k not in dims), inn)]


row(
    "aten::argmax", "aten::argmin", "aten::any", "aten::all", "aten::count_nonzero", reads=_over,
    examples=[
        *(call(op, NM, 1) for op in ("argmax", "argmin", "any.dim", "all.dim", "count_nonzero")), call("argmax", NM),
        call("argmin", NM, 0, True),
    ],
)(_nothing)  # fmt: skip
row(
    "aten::argsort",
    reads=_along,
    examples=[call("", NM, 1), call("", BNM, 0, True), call("argsort.stable", NM, stable=True)],
)(_nothing)


def _elsewhere(call: Call, operand: int) -> list[Term]:
    """The values of such an op are gathered at its indices (normal.py); those have no derivative."""
    return NotImplemented


row(
    "aten::kthvalue", "aten::mode", "aten::median.dim", "aten::nanmedian.dim", reads=_over,
    examples=[call("kthvalue", NM, 2, 1).of(1), *(call(op, NM, 1).of(1) for op in ("mode", "median.dim", "nanmedian.dim"))],
)(_elsewhere)  # fmt: skip
row(
    "aten::sort", "aten::topk", "aten::cummax", "aten::cummin", reads=_along,
    examples=[call("topk", NM, 2, 1).of(1), *(call(op, NM, 1).of(1) for op in ("sort", "cummax", "cummin"))],
)(_elsewhere)  # fmt: skip


@row(
    "aten::cumsum", affine=ALL, examples=[call("", NM, 1), call("", T("1 m"), 0), call("", T(""), 0), call("", BNM, -2)]
)
def _cumsum(call: Call, operand: int) -> list[Term]:
    """A triangle: dy_i/dx_j = [i >= j]."""
    x = call.operands[0]
    inn = fresh_axes(x.shape)
    out, dim = list(inn), call.bound["dim"] % max(x.ndim, 1)
    if not x.ndim or not inn[dim]:
        return [Term(1.0, (), inn, inn)]
    out[dim] = (Label(x.shape[dim]),)
    return [Term(1.0, (Triangle(out[dim], inn[dim]),), tuple(out), inn)]


@row(
    "aten::cumprod",
    "aten::logcumsumexp",
    examples=[call("", SIGNED, 1), call("", T(""), 0), call("", BNM, 0), call("", T("n 1"), 1)],
)
def _running(call: Call, operand: int) -> list[Term]:
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

"""Rows of the ops that act entry by entry, and of the ops through which nothing flows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Axis, Label, Term, fresh_axes, make_factor
from dualform.ops.examples import B, I, T, call
from dualform.ops.table import (
    ALL,
    EACH,
    FIRST,
    Call,
    Product,
    Row,
    add_row,
    broadcast_axes,
    diagonal_terms,
    entrywise_reads,
    row,
)

NM = T("n m")


def pointwise(call: Call, operand: int) -> list[Term]:
    """The generic entry-by-entry rule: one pass of the op's own backward over ones gives the diagonal."""
    x = call.operands[operand]
    spread = x if x.shape == call.out.shape else x.expand(call.out.shape).contiguous()
    pulled: Any = torch.func.vjp(lambda t: call.run(operand, t), spread)
    (slope,) = pulled[1](torch.ones_like(pulled[0]))
    return diagonal_terms(call, operand, slope, _slope_name(call, operand))


def _slope_name(call: Call, operand: int) -> str:
    op = call.target._schema.name.split("::")[1]
    mark = "'" if len(call.operands) == 1 else f"'{operand + 1}"
    return f"{op}{mark}({','.join(call.operand_name(k) for k in range(len(call.operands)))})"


@row(
    "aten::add", affine=ALL,
    examples=[call("add.Tensor", T("m"), NM), call("add.Tensor", T("n 1"), T("m"), alpha=2), call("add.Tensor", T("n"), 2.0)],
)  # fmt: skip
def _add(call: Call, operand: int) -> list[Term]:
    scaled = call.places[operand][0] == "other"
    return diagonal_terms(call, operand, coef=float(call.bound.get("alpha", 1)) if scaled else 1.0)


@row(
    "aten::sub", "aten::subtract", affine=ALL,
    examples=[call("sub.Tensor", NM, T("m")), call("sub.Tensor", T("1 1"), NM, alpha=3), call("subtract.Tensor", NM, T("m"))],
)  # fmt: skip
def _sub(call: Call, operand: int) -> list[Term]:
    scaled = call.places[operand][0] == "other"
    return diagonal_terms(call, operand, coef=-float(call.bound.get("alpha", 1)) if scaled else 1.0)


@row("aten::rsub", affine=ALL, examples=[call("rsub.Tensor", NM, T("m"), alpha=2), call("rsub.Scalar", NM, 1.0)])
def _rsub(call: Call, operand: int) -> list[Term]:
    scaled = call.places[operand][0] == "self"
    return diagonal_terms(call, operand, coef=-float(call.bound.get("alpha", 1)) if scaled else 1.0)


@row("aten::neg", "aten::negative", affine=ALL, examples=[call("", NM)])
def _neg(call: Call, operand: int) -> list[Term]:
    return diagonal_terms(call, operand, coef=-1.0)


def _mul_form(call: Call) -> Product:
    out = fresh_axes(call.out.shape)
    other = call.bound["other"]
    axes = tuple(broadcast_axes(out, x.shape) for x in call.operands)
    return Product(out, axes, float(other) if isinstance(other, (int, float)) else 1.0)


def _mul(call: Call, operand: int) -> list[Term]:
    """The factor is the other side on its own axes; a mask of integers or bools is one too."""
    other = call.bound["other" if call.places[operand][0] == "self" else "self"]
    if not isinstance(other, Tensor):
        return diagonal_terms(call, operand, coef=float(other))
    return diagonal_terms(call, operand, other.to(call.out.dtype), _called(call, other))


for _op in ("aten::mul", "aten::multiply"):
    _tries = [(T("n 1"), T("m")), (NM, 2.5), (NM, B("n m")), (T(""), T("n"))]
    _calls = tuple(call(f"{_op.removeprefix('aten::')}.Tensor", *a) for a in _tries)
    add_row(Row(_op, _mul, EACH, multilinear=True, form=_mul_form, examples=_calls))


@row("aten::mul.Scalar", affine=ALL, examples=[call("", NM, 2.5)])
def _scale(call: Call, operand: int) -> list[Term]:
    return diagonal_terms(call, operand, coef=float(call.bound["other"]))


@row(
    "aten::div", "aten::divide", "aten::true_divide", affine=FIRST,
    examples=[
        *(call(f"{op}.Tensor", T("n 1"), T("m")) for op in ("div", "divide", "true_divide")), call("div.Tensor", NM, 2.0)
    ],
)  # fmt: skip
def _div(call: Call, operand: int) -> list[Term]:
    if call.bound.get("rounding_mode") is not None:
        return []
    x, y = call.bound["self"], call.bound["other"]
    if call.places[operand][0] == "self":
        if not isinstance(y, Tensor):
            return diagonal_terms(call, operand, coef=1 / float(y))
        return diagonal_terms(call, operand, 1 / y.to(call.out.dtype), f"(1/{_called(call, y)})")
    name = f"({_called(call, x)}/{_called(call, y)}²)"
    return diagonal_terms(call, operand, x / (y * y), name, -1.0)


@row(
    "aten::div.Tensor_mode", "aten::div.Scalar_mode", "aten::divide.Tensor_mode", "aten::divide.Scalar_mode",
    examples=[
        call("div.Tensor_mode", T("n"), T("n"), rounding_mode="floor"),
        call("div.Tensor_mode", T("n"), T("n"), rounding_mode=None), call("div.Scalar_mode", T("n"), 2.0, rounding_mode="trunc"),
        call("divide.Tensor_mode", T("n"), T("n"), rounding_mode="floor"),
        call("divide.Scalar_mode", T("n"), 2.0, rounding_mode=None),
    ],
)  # fmt: skip
def _rounded_div(call: Call, operand: int) -> list[Term]:
    return _div(call, operand)


def _called(call: Call, value: Any) -> str:
    for k, x in enumerate(call.operands):
        if x is value:
            return call.operand_name(k)
    return "c" if isinstance(value, Tensor) else f"{value:g}"


@row(
    "aten::where", affine=ALL, reads=entrywise_reads,
    examples=[call("where.self", B("n m"), T("n 1"), T("m")), call("where.ScalarOther", B("n m"), NM, 0.0)],
)  # fmt: skip
def _where(call: Call, operand: int) -> list[Term]:
    chosen = call.bound["condition"]
    mask = chosen if call.places[operand][0] == "self" else ~chosen
    name = "[c]" if call.places[operand][0] == "self" else "[not c]"
    return diagonal_terms(call, operand, mask.to(call.out.dtype), name)


@row(
    "aten::masked_fill", affine=ALL, reads=entrywise_reads,
    examples=[call("masked_fill.Scalar", NM, B("m"), 0.5), call("masked_fill.Tensor", NM, B("n m"), T(""))],
)  # fmt: skip
def _masked_fill(call: Call, operand: int) -> list[Term]:
    mask = call.bound["mask"]
    keeps = call.places[operand][0] == "self"
    return diagonal_terms(call, operand, (~mask if keeps else mask).to(call.out.dtype), "[kept]" if keeps else "[mask]")


@row(
    "aten::tril", "aten::triu", affine=ALL,
    examples=[call("", T("k n m")), call("", T("n n"), -1), call("", NM, 1), call("", T("n 1")), call("", T("1 m"), 1)],
)  # fmt: skip
def _triangle(call: Call, operand: int) -> list[Term]:
    """tril keeps row + diagonal >= col; triu keeps col >= row + diagonal. No mask is stored."""
    axes: list[Axis] = list(fresh_axes(call.out.shape))
    # An axis of size 1 has no label for a relation to speak of; a label of its own for the relation is index 0 of it.
    row_, col = (axis or (Label(1),) for axis in axes[-2:])
    k = call.bound["diagonal"]
    lower = call.target._schema.name == "aten::tril"
    keeps = Triangle(row_, col, -k) if lower else Triangle(col, row_, k)
    return [Term(1.0, (keeps,), tuple(axes), tuple(axes))]


@row(
    "aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::alias", "aten::lift_fresh",
    "aten::lift_fresh_copy", "aten::positive", "aten::dropout", "aten::requires_grad_", affine=ALL, reads=entrywise_reads,
    examples=[
        *(call(op, NM) for op in ("clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "positive")),
        call("to.dtype", NM, torch.float64), call("to.dtype", T("n"), torch.int64), call("_to_copy", NM, dtype=torch.float64),
        call("dropout", NM, 0.5, False),
    ],
)  # fmt: skip
def _same(call: Call, operand: int) -> list[Term]:
    return diagonal_terms(call, operand) if operand == 0 else []


row("aten::type_as", affine=ALL, reads=entrywise_reads, unread=["other"], examples=[call("", T("n"), T("k"))])(_same)


@row("aten::copy", affine=ALL, reads=entrywise_reads, unread=["self"], examples=[call("", NM, T("m"))])
def _copy(call: Call, operand: int) -> list[Term]:
    return diagonal_terms(call, operand) if call.places[operand][0] == "src" else []


@row(
    "aten::fill", affine=ALL, reads=entrywise_reads, unread=["self"],
    examples=[call("fill.Tensor", NM, T("")), call("fill.Scalar", NM, 2.0)],
)  # fmt: skip
def _fill(call: Call, operand: int) -> list[Term]:
    return diagonal_terms(call, operand) if call.places[operand][0] == "value" else []


@row(
    "aten::detach", "aten::sign", "aten::sgn", "aten::floor", "aten::ceil", "aten::round", "aten::trunc", "aten::heaviside",
    "aten::floor_divide", reads=entrywise_reads,
    examples=[
        *(call(op, NM) for op in ("detach", "sign", "sgn", "floor", "ceil", "round", "trunc")),
        call("floor_divide", NM, T("m")), call("heaviside", NM, T("m")),
    ],
)  # fmt: skip
def _nothing(call: Call, operand: int) -> list[Term]:
    return []


row(
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::new_zeros", "aten::new_ones",
    "aten::new_full", "aten::new_empty", unread=["self"],
    examples=[
        *(call(op, NM) for op in ("zeros_like", "ones_like")), call("full_like", NM, 2.0),
        call("new_zeros", NM, [2]), call("new_ones", NM, [2]), call("new_full", NM, [2], 1.0),
    ],
)(_nothing)  # fmt: skip


def _bins(call: Call, name: str, k: int | None) -> list[Term]:
    """A value looks at all bounds of its own line; lines are the leading axes of bounds that have several."""
    out, x = fresh_axes(call.out.shape), call.argument(name, k)
    if name in ("self", "input") and x.shape == call.out.shape:
        return [Term(1.0, (), out, out)]
    lines = out[:-1] if x.ndim > 1 else ()
    return [Term(1.0, (), out, (*lines, *fresh_axes(x.shape[-1:])))]


row(
    "aten::bucketize", "aten::searchsorted", reads=_bins,
    examples=[call("bucketize.Tensor", NM, T("m")), call("searchsorted.Tensor", T("m"), NM)],
)(_nothing)  # fmt: skip


def _marks(call: Call, name: str, k: int | None) -> list[Term]:
    """A row of marks looks at one number."""
    out = fresh_axes(call.out.shape)
    return [Term(1.0, (), out, out[:-1])]


row("aten::one_hot", reads=_marks, examples=[call("", I("n", "m"), 4)])(_nothing)


# Entry by entry too, though torch does not tag them (leaky_relu before 2.13).
row(
    "aten::hardswish", "aten::leaky_relu", "aten::log_sigmoid", "aten::absolute",
    examples=[call("", T("n m", "signed"))],
)(pointwise)  # fmt: skip


# Slopes that are cheap in terms of the result, or plainer to read than the generic rule.
def _unary(slope: Any, shown: str) -> Any:
    def rule(call: Call, operand: int) -> list[Term]:
        x = call.operands[operand]
        return diagonal_terms(call, operand, slope(x, call.out), shown.format(x=call.operand_name(operand)))

    return rule


for _name, _slope, _shown in (
    ("exp", lambda x, y: y, "exp({x})"),
    ("log", lambda x, y: 1 / x, "(1/{x})"),
    ("sqrt", lambda x, y: 0.5 / y, "(1/2√{x})"),
    ("rsqrt", lambda x, y: -0.5 * y * y * y, "rsqrt'({x})"),
    ("reciprocal", lambda x, y: -y * y, "(-1/{x}²)"),
    ("sin", lambda x, y: x.cos(), "cos({x})"),
    ("cos", lambda x, y: -x.sin(), "(-sin({x}))"),
    ("tanh", lambda x, y: 1 - y * y, "tanh'({x})"),
    ("sigmoid", lambda x, y: y * (1 - y), "sigmoid'({x})"),
    ("relu", lambda x, y: (x > 0).to(x.dtype), "[{x}>0]"),
    ("square", lambda x, y: 2 * x, "2{x}"),
):
    row(f"aten::{_name}", examples=[call("", NM), call("", T(""))])(_unary(_slope, _shown))


@row("aten::pow.Tensor_Scalar", examples=[call("", NM, p) for p in (2, 0, 1, 3.5, -1)])
def _power(call: Call, operand: int) -> list[Term]:
    x, p, name = call.operands[0], call.bound["exponent"], call.operand_name(0)
    if p == 0:
        return []
    if p == 1:
        return diagonal_terms(call, operand)
    if p == 2:
        return diagonal_terms(call, operand, x, name, 2.0)
    return diagonal_terms(call, operand, x ** (p - 1), f"{name}^{p - 1:g}", float(p))


@row("aten::addcmul", affine=(frozenset({0, 1}), frozenset({0, 2})), examples=[call("", NM, T("m"), T("n 1"), value=2)])
def _addcmul(call: Call, operand: int) -> list[Term]:
    where = call.places[operand][0]
    if where == "self":
        return diagonal_terms(call, operand)
    other = "tensor2" if where == "tensor1" else "tensor1"
    value = float(call.bound["value"])
    return diagonal_terms(call, operand, call.bound[other], _called(call, call.bound[other]), value)


@row(
    "aten::lerp.Tensor", "aten::lerp.Scalar", affine=(frozenset({0, 1}),),
    examples=[call("lerp.Tensor", NM, T("m"), T("n 1")), call("lerp.Scalar", NM, T("m"), 0.3)],
)  # fmt: skip
def _lerp(call: Call, operand: int) -> list[Term]:
    where, w = call.places[operand][0], call.bound["weight"]
    if where == "weight":
        return diagonal_terms(call, operand, call.bound["end"] - call.bound["self"], "(end-start)")
    share = w if where == "end" else 1 - w
    if isinstance(w, Tensor):
        return diagonal_terms(call, operand, share, "w" if where == "end" else "(1-w)")
    return diagonal_terms(call, operand, coef=float(share))


# The derivative by the result of a branch or a clamp is 0/1; the rest is the generic rule with an affine claim added.
row("aten::addcdiv", affine=(frozenset({0, 1}),), examples=[call("", NM, T("m"), T("n 1"), value=2)])(pointwise)
row("aten::clamp", "aten::clip", "aten::clamp_min", "aten::clamp_max", examples=[
    call("clamp", NM, 0.5, 0.8), call("clamp.Tensor", NM, T("m")), call("clip", NM, 0.5), call("clamp_min", NM, 0.6),
    call("clamp_max", NM, 0.6),
])(pointwise)  # fmt: skip


@row(
    "aten::prelu",
    affine=(frozenset({1}),),
    examples=[call("", T("b c l", "signed"), T("c")), call("", T("n", "signed"), T("1"))],
)
def _prelu(call: Call, operand: int) -> list[Term]:
    """x where x > 0, else w x, one w for each channel (axis 1)."""
    x, weight = call.operands
    out = fresh_axes(x.shape)
    channel = (out[1] if x.ndim > 1 else (),) if weight.numel() > 1 else ((),) * weight.ndim
    low = (x < 0).to(x.dtype)
    if operand == 1:
        return [Term(1.0, (make_factor(x * low, out, "x[x<0]"),), out, channel)]
    w = make_factor(weight, channel, call.operand_name(1))
    return [
        Term(1.0, (make_factor((x >= 0).to(x.dtype), out, "[x>=0]"),), out, out),
        Term(1.0, (make_factor(low, out, "[x<0]"), w), out, out),
    ]


def is_pointwise(target: Any) -> bool:
    """Does torch tag the op as entry by entry?"""
    return torch.Tag.pointwise in getattr(target, "tags", ())

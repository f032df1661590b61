"""Rows of the ops that act entry by entry, and of the ops through which nothing flows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Axis, Label, Term, fresh_axes, make_factor
from dualform.ops import picking
from dualform.ops.examples import B, I, T, call
from dualform.ops.table import (
    ALL,
    EACH,
    ENTRIES,
    FIRST,
    Entry,
    OpCall,
    Product,
    bound_arguments,
    broadcast_axes,
    diagonal_terms,
    entrywise_reads,
    row,
    row_of,
)

NM = T("n m")
Spelt = tuple[str, list[Any], dict[str, Any]]


def named(n: fx.Node) -> str:
    """The op's name, without its overload."""
    target: Any = n.target
    return target._schema.name.removeprefix("aten::")


def pointwise(call: OpCall, operand: int) -> list[Term]:
    """The generic entry-by-entry rule: one pass of the op's own backward over ones gives the diagonal."""
    x = call.operands[operand]
    spread = x if x.shape == call.out.shape else x.expand(call.out.shape).contiguous()
    pulled: Any = torch.func.vjp(lambda t: call.run(operand, t), spread)
    (slope,) = pulled[1](torch.ones_like(pulled[0]))
    return diagonal_terms(call, operand, slope, _slope_name(call, operand))


def selecting(call: OpCall, operand: int) -> list[Term]:
    """The same of an op whose slopes are 0, 1, or a half where two tie: masks, as torch's backward selects."""
    (term,) = pointwise(call, operand)
    (slope,) = term.tensors
    sign = {"maximum": ">", "fmax": ">", "minimum": "<", "fmin": "<"}.get(call.target._schema.name.split("::")[1])
    if sign is None or len(call.operands) < 2:
        return [replace(term, factors=(replace(slope, tensor=slope.tensor != 0),))]
    own, other = call.operand_name(operand), call.operand_name(1 - operand)
    alone = replace(slope, tensor=slope.tensor == 1, name=f"[{own}{sign}{other}]")
    tied = replace(slope, tensor=slope.tensor == 0.5, name=f"[{own}={other}]")
    return [replace(term, factors=(alone,)), replace(term, coef=0.5, factors=(tied,))]


def cutting(call: OpCall, operand: int) -> list[Term]:
    """The same of an op whose backward leaves out the entries of slope 0: the slope, and a mask beside it."""
    (term,) = pointwise(call, operand)
    (slope,) = term.tensors
    return [replace(term, factors=(slope, replace(slope, tensor=slope.tensor != 0, name=f"[{slope.name}≠0]")))]


def _slope_name(call: OpCall, operand: int) -> str:
    op = call.target._schema.name.split("::")[1]
    mark = "'" if len(call.operands) == 1 else f"'{operand + 1}"
    return f"{op}{mark}({','.join(call.operand_name(k) for k in range(len(call.operands)))})"


ENTRIES |= {
    "plus": Entry("{0} + {1}", "{0} + {1}", zero=True, bare=True),
    "add": Entry("{0} + {alpha} * {1}", "{0} + {alpha} * {1}", zero=True, bare=True),
    "sub": Entry("{0} - {1}", "{0} - {1}", zero=True, bare=True),
    "submul": Entry("{0} - {alpha} * {1}", "{0} - {alpha} * {1}", zero=True, bare=True),
    "rsub": Entry("{1} - {0}", "{1} - {0}", bare=True),
}


def _summed(n: fx.Node) -> Spelt:
    alpha, operands = bound_arguments(n)["alpha"], list(n.args[:2])
    if named(n) == "rsub" and alpha != 1:
        return "submul", operands[::-1], {"alpha": alpha}
    plain, scaled = {"add": ("plus", "add"), "rsub": ("rsub", "")}.get(named(n), ("sub", "submul"))
    return (plain, operands, {}) if alpha == 1 else (scaled, operands, {"alpha": alpha})


@row(
    "aten::add", affine=ALL, signs=(1, 1), entry=_summed, python="{0} + {1}", called=True, over=(0, 1),
    examples=[call("add.Tensor", T("m"), NM), call("add.Tensor", T("n 1"), T("m"), alpha=2), call("add.Tensor", T("n"), 2.0)],
)  # fmt: skip
@row(
    "aten::sub", "aten::subtract", affine=ALL, signs=(1, -1), entry=_summed, python="{0} - {1}", called=True, over=(0,),
    examples=[call("sub.Tensor", NM, T("m")), call("sub.Tensor", T("1 1"), NM, alpha=3), call("subtract.Tensor", NM, T("m"))],
)  # fmt: skip
@row(
    "aten::rsub", affine=ALL, entry=_summed, fresh=True,
    examples=[call("rsub.Tensor", NM, T("m"), alpha=2), call("rsub.Scalar", NM, 1.0), call("rsub.Scalar", NM, 1.0, 2)],
)  # fmt: skip
def _sum(call: OpCall, operand: int) -> list[Term]:
    """x + alpha y, x - alpha y, or y - alpha x."""
    op = call.target._schema.name
    if call.places[operand][0] != ("self" if op == "aten::rsub" else "other"):
        return diagonal_terms(call, operand)
    alpha = float(call.bound.get("alpha", 1))
    return diagonal_terms(call, operand, coef=alpha if op == "aten::add" else -alpha)


row(
    "aten::neg", "aten::negative", affine=ALL, entry=Entry("-{0}", "-{0}", zero=True, name="neg"), signs=(-1,),
    python="-{0}", called=True, over=(0,), examples=[call("", NM)],
)(lambda call, operand: diagonal_terms(call, operand, coef=-1.0))  # fmt: skip


def _mul_form(call: OpCall) -> Product:
    out = fresh_axes(call.out.shape)
    other = call.bound["other"]
    axes = tuple(broadcast_axes(out, x.shape) for x in call.operands)
    return Product(out, axes, float(other) if isinstance(other, (int, float)) else 1.0)


def _mul(call: OpCall, operand: int) -> list[Term]:
    """The factor is the other side on its own axes; a mask of integers or bools is one too."""
    other = call.bound["other" if call.places[operand][0] == "self" else "self"]
    if not isinstance(other, Tensor):
        return diagonal_terms(call, operand, coef=float(other))
    factor = other if other.dtype == torch.bool else other.to(call.out.dtype)
    return diagonal_terms(call, operand, factor, _called(call, other))


_MUL = Entry("{0} * {1}", "{0} * {1}", bare=True, name="mul")
for _op in ("aten::mul", "aten::multiply"):
    _tries = [(T("n 1"), T("m")), (NM, 2.5), (NM, B("n m")), (T(""), T("n"))]
    _calls = tuple(call(f"{_op.removeprefix('aten::')}.Tensor", *a) for a in _tries)
    row(
        _op, affine=EACH, multilinear=True, form=_mul_form, examples=_calls, entry=_MUL, python="{0} * {1}", called=True, over=(0, 1),
    )(_mul)  # fmt: skip


row("aten::mul.Scalar", affine=ALL, entry=_MUL, python="{0} * {1}", examples=[call("", NM, 2.5)])(
    lambda call, operand: diagonal_terms(call, operand, coef=float(call.bound["other"]))
)
ENTRIES["truncated"] = Entry("std::trunc({0} / {1})", flops=6.0)


def _quotient(n: fx.Node) -> Spelt:
    names: Any = {None: "div", "floor": "floor_divide", "trunc": "truncated"}
    return names[n.kwargs.get("rounding_mode")], list(n.args[:2]), {}


@row(
    "aten::div.Tensor_mode", "aten::div.Scalar_mode", "aten::divide.Tensor_mode", "aten::divide.Scalar_mode", entry=_quotient,
    examples=[
        call("div.Tensor_mode", T("n"), T("n"), rounding_mode="floor"),
        call("div.Tensor_mode", T("n"), T("n"), rounding_mode=None), call("div.Scalar_mode", T("n"), 2.0, rounding_mode="trunc"),
        call("divide.Tensor_mode", T("n"), T("n"), rounding_mode="floor"),
        call("divide.Scalar_mode", T("n"), 2.0, rounding_mode=None),
    ],
)  # fmt: skip
@row(
    "aten::div", "aten::divide", "aten::true_divide", affine=FIRST, entry=Entry("{0} / {1}", "{0} / {1}", 6.0, bare=True, name="div"),
    odd=True, python="{0} / {1}", called=True, over=(0,),
    examples=[*(call(f"{op}.Tensor", T("n 1"), T("m")) for op in ("div", "divide", "true_divide")), call("div.Tensor", NM, 2.0)],
)  # fmt: skip
def _div(call: OpCall, operand: int) -> list[Term]:
    if call.bound.get("rounding_mode") is not None:
        return []
    x, y = call.bound["self"], call.bound["other"]
    if call.places[operand][0] == "self":
        if not isinstance(y, Tensor):
            return diagonal_terms(call, operand, coef=1 / float(y))
        return diagonal_terms(call, operand, 1 / y.to(call.out.dtype), f"(1/{_called(call, y)})")
    name = f"({_called(call, x)}/{_called(call, y)}²)"
    return diagonal_terms(call, operand, x / (y * y), name, -1.0)


def _called(call: OpCall, value: Any) -> str:
    for k, x in enumerate(call.operands):
        if x is value:
            return call.operand_name(k)
    return "c" if isinstance(value, Tensor) else f"{value:g}"


@row(
    "aten::where", affine=ALL, reads=entrywise_reads, python="torch.", called=True,
    entry=Entry("({0} != 0 ? {1} : {2})", "tl.where({0}, {1}, {2})", passes=True),
    examples=[call("where.self", B("n m"), T("n 1"), T("m")), call("where.ScalarOther", B("n m"), NM, 0.0)],
)  # fmt: skip
def _where(call: OpCall, operand: int) -> list[Term]:
    chosen = call.bound["condition"].bool()  # of bytes, any but 0
    mask = chosen if call.places[operand][0] == "self" else ~chosen
    name = "[c]" if call.places[operand][0] == "self" else "[not c]"
    return diagonal_terms(call, operand, mask, name)


@row(
    "aten::masked_fill", affine=ALL, reads=entrywise_reads,
    examples=[call("masked_fill.Scalar", NM, B("m"), 0.5), call("masked_fill.Tensor", NM, B("n m"), T(""))],
)  # fmt: skip
def _masked_fill(call: OpCall, operand: int) -> list[Term]:
    mask = call.bound["mask"]
    keeps = call.places[operand][0] == "self"
    return diagonal_terms(call, operand, ~mask if keeps else mask, "[kept]" if keeps else "[mask]")


def _kept_triangle(n: fx.Node) -> Spelt:
    return named(n), [n.args[0]], {"diagonal": bound_arguments(n)["diagonal"]}


_TRIANGLES = [call("", T("k n m")), call("", T("n n"), -1), call("", NM, 1), call("", T("n 1")), call("", T("1 m"), 1)]
for _op, _sign in (("tril", ">="), ("triu", "<=")):
    ENTRIES[_op] = Entry(f"({{row}} {_sign} {{col}} - ({{diagonal}}) ? {{0}} : T(0))")


@row("aten::triu", affine=ALL, entry=_kept_triangle, python="x.", examples=_TRIANGLES)
@row("aten::tril", affine=ALL, entry=_kept_triangle, odd=True, python="x.", called=True, over=(0,), examples=_TRIANGLES)
def _triangle(call: OpCall, operand: int) -> list[Term]:
    """tril keeps row + diagonal >= col; triu keeps col >= row + diagonal. No mask is stored."""
    axes: list[Axis] = list(fresh_axes(call.out.shape))
    # An axis of size 1 has no label for a relation to speak of; a label of its own for the relation is index 0 of it.
    row_, col = (axis or (Label(1),) for axis in axes[-2:])
    k = call.bound["diagonal"]
    lower = call.target._schema.name == "aten::tril"
    keeps = Triangle(row_, col, -k) if lower else Triangle(col, row_, k)
    return [Term(1.0, (keeps,), tuple(axes), tuple(axes))]


@row(
    "aten::to", "aten::positive", "aten::dropout", "aten::requires_grad_", affine=ALL, reads=entrywise_reads,
    examples=[call("positive", NM), call("to.dtype", NM, torch.float64), call("to.dtype", T("n"), torch.int64), call("dropout", NM, 0.5, False)],
)  # fmt: skip
def _same(call: OpCall, operand: int) -> list[Term]:
    return diagonal_terms(call, operand) if operand == 0 else []


def _alias(base: Any, value: Any) -> tuple[Any, tuple[Any, ...]]:
    return torch.ops.aten.alias.default, (value,)


def _cast(n: fx.Node) -> Spelt:
    x: Any = n.args[0]
    if not isinstance(x, fx.Node):
        return "fill", [], {"value": x}
    before, after = x.meta["val"].dtype, n.meta["val"].dtype
    if after == torch.bool:
        return "nonzero", [x], {}
    return "trunc" if before.is_floating_point and not after.is_floating_point else "copy", [x], {}


_COPY = Entry("{0}", "{0}", zero=True, passes=True, name="copy")
ENTRIES["nonzero"] = Entry("T({0} != 0)", "{0} != 0", truth=True)
_known = {"affine": ALL, "reads": entrywise_reads, "examples": [call("", NM)]}
row("aten::clone", entry=_COPY, python="x.", fresh=True, **_known)(_same)
row("aten::zero", unread=["self"], overwrites=True, examples=[call("", NM)])(None)
row("aten::contiguous", entry=_COPY, **_known)(_same)
row("aten::lift_fresh_copy", entry=_COPY, ordered=True, **_known)(_same)
row("aten::alias", "aten::lift_fresh", kind="view", ordered=True, put=_alias, **_known)(_same)
row("aten::_to_copy", entry=_cast, **_known | {"examples": [call("", NM, dtype=torch.float64)]})(_same)
row("aten::type_as", affine=ALL, reads=entrywise_reads, unread=["other"], examples=[call("", T("n"), T("k"))])(_same)


@row(
    "aten::copy", affine=ALL, reads=entrywise_reads, unread=["self"], overwrites=True, examples=[call("", NM, T("m"))],
    entry=lambda n: ("copy", [n.args[1]], {}),
)  # fmt: skip
@row(
    "aten::fill", affine=ALL, reads=entrywise_reads, unread=["self"], overwrites=True,
    examples=[call("fill.Tensor", NM, T("")), call("fill.Scalar", NM, 2.0)],
)  # fmt: skip
def _written(call: OpCall, operand: int) -> list[Term]:
    return [] if call.places[operand][0] == "self" else diagonal_terms(call, operand)


@row("aten::sgn", "aten::heaviside", reads=entrywise_reads, examples=[call("sgn", NM), call("heaviside", NM, T("m"))])
def nothing(call: OpCall, operand: int) -> list[Term]:
    return []


row("aten::detach", kind="view", ordered=True, reads=entrywise_reads, examples=[call("", NM)])(nothing)
_UP, _DOWN = "tl.ceil({0})", "tl.floor({0})"
for _op, _entry in {
    "sign": Entry(
        "T(({0} > 0) - ({0} < 0))", "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to({T})", zero=True
    ),
    "floor": Entry("std::floor({0})", _DOWN, zero=True),
    "ceil": Entry("std::ceil({0})", _UP, 25.0, zero=True),
    "round": Entry("std::nearbyint({0})", "round_({0})", 25.0, zero=True),
    "trunc": Entry("std::trunc({0})", f"tl.where({{0}} < 0, {_UP}, {_DOWN})", 25.0, zero=True),
}.items():
    row(f"aten::{_op}", reads=entrywise_reads, entry=_entry, examples=[call("", NM)])(nothing)
row(
    "aten::floor_divide", reads=entrywise_reads, examples=[call("", NM, T("m"))],
    entry=Entry("floor_divide_({0}, {1})", "tl.floor({0} / {1})", 25.0),
)(nothing)  # fmt: skip


def _decimals(x: Tensor, *, decimals: int = 0) -> Tensor:
    tens = 10.0 ** abs(decimals)
    return (x * tens).round() / tens if decimals >= 0 else (x / tens).round() * tens


row("aten::round.decimals", reads=entrywise_reads, lowered=_decimals, examples=[call("", NM, decimals=1)])(nothing)


def _bins(call: OpCall, name: str, k: int | None) -> list[Term]:
    """A value looks at all bounds of its own line; lines are the leading axes of bounds that have several."""
    out, x = fresh_axes(call.out.shape), call.argument(name, k)
    if name in ("self", "input") and x.shape == call.out.shape:
        return [Term(1.0, (), out, out)]
    lines = out[:-1] if x.ndim > 1 else ()
    return [Term(1.0, (), out, (*lines, *fresh_axes(x.shape[-1:])))]


row("aten::bucketize", reads=_bins, examples=[call("bucketize.Tensor", NM, T("m"))])(nothing)
row("aten::searchsorted", reads=_bins, examples=[call("searchsorted.Tensor", T("m"), NM)])(nothing)
row("aten::bucketize.Tensor", reads=_bins, lowered=picking.bucketize, examples=[call("", NM, T("m"))])(nothing)
row("aten::searchsorted.Tensor", reads=_bins, lowered=picking.searchsorted, examples=[call("", T("m"), NM)])(nothing)


def _marks(call: OpCall, name: str, k: int | None) -> list[Term]:
    """A row of marks looks at one number."""
    out = fresh_axes(call.out.shape)
    return [Term(1.0, (), out, out[:-1])]


row("aten::one_hot", reads=_marks, examples=[call("", I("n", "m"), 4)])(nothing)


ENTRIES["addcmul"] = Entry("{0} + {alpha} * {1} * {2}", "{0} + {alpha} * {1} * {2}", bare=True)


@row(
    "aten::addcmul", affine=(frozenset({0, 1}), frozenset({0, 2})), called=True, over=(0,),
    entry=lambda n: ("addcmul", list(n.args[:3]), {"alpha": bound_arguments(n)["value"]}), examples=[call("", NM, T("m"), T("n 1"), value=2)],
)  # fmt: skip
def _addcmul(call: OpCall, operand: int) -> list[Term]:
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
def _lerp(call: OpCall, operand: int) -> list[Term]:
    where, w = call.places[operand][0], call.bound["weight"]
    if where == "weight":
        return diagonal_terms(call, operand, call.bound["end"] - call.bound["self"], "(end-start)")
    share = w if where == "end" else 1 - w
    if isinstance(w, Tensor):
        return diagonal_terms(call, operand, share, "w" if where == "end" else "(1-w)")
    return diagonal_terms(call, operand, coef=float(share))


# The derivative by the result of a branch or a clamp is 0/1; the rest is the generic rule with an affine claim added.
row("aten::addcdiv", affine=(frozenset({0, 1}),), examples=[call("", NM, T("m"), T("n 1"), value=2)])(pointwise)


def _clamped(n: fx.Node) -> Spelt:
    bound = bound_arguments(n)
    low, high = bound.get("min"), bound.get("max")
    assert low is None or high is None  # lowered
    return ("max", [n.args[0], low], {}) if high is None else ("min", [n.args[0], high], {})


def _between(x: Tensor, min: Any = None, max: Any = None) -> Any:
    return NotImplemented if min is None or max is None else x.clamp_min(min).clamp_max(max)


def _between_tensors(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    x = x if min is None else torch.maximum(x, min)
    return x if max is None else torch.minimum(x, max)


row("aten::clamp", entry=_clamped, lowered=_between, python="x.", examples=[call("", NM, 0.5, 0.8)])(selecting)
row("aten::clamp_min", "aten::clamp_max", entry=_clamped, examples=[call("", NM, 0.6)])(selecting)
row("aten::clamp.Tensor", lowered=_between_tensors, python="x.", examples=[call("", NM, T("m"))])(selecting)
row("aten::clamp_min.Tensor", lowered=_between_tensors, examples=[call("", NM, T("m"))])(selecting)
row("aten::clamp_max.Tensor", lowered=torch.minimum, examples=[call("", NM, T("m"))])(selecting)
row("aten::clip", examples=[call("", NM, 0.5)])(selecting)
row(
    "aten::hardtanh", "aten::relu6", "aten::hardshrink", "aten::softshrink", "aten::threshold",
    examples=[
        *(call(op, T("n m", "signed")) for op in ("hardtanh", "relu6", "hardshrink", "softshrink")),
        call("threshold", T("n m", "signed"), 0.2, 0.1),
    ],
)(selecting)  # fmt: skip


@row(
    "aten::prelu", affine=(frozenset({1}),), examples=[call("", T("b c l", "signed"), T("c")), call("", T("n", "signed"), T("1"))],
)  # fmt: skip
def _prelu(call: OpCall, operand: int) -> list[Term]:
    """x where x > 0, else w x, one w for each channel (axis 1)."""
    x, weight = call.operands
    out = fresh_axes(x.shape)
    channel = (out[1] if x.ndim > 1 else (),) if weight.numel() > 1 else ((),) * weight.ndim
    low = x < 0
    if operand == 1:
        return [Term(1.0, (make_factor(x, out, call.operand_name(0)), make_factor(low, out, "[x<0]")), out, channel)]
    w = make_factor(weight, channel, call.operand_name(1))
    high = make_factor(x >= 0, out, "[x>=0]")
    return [Term(1.0, (high,), out, out), Term(1.0, (make_factor(low, out, "[x<0]"), w), out, out)]


def is_pointwise(target: Any) -> bool:
    """Does torch tag the op as entry by entry?"""
    return torch.Tag.pointwise in getattr(target, "tags", ())


def is_structured(target: Any) -> bool:
    """Does an op's derivative keep its structure: has it a rule, or acts it entry by entry?"""
    return row_of(target).rule is not None or is_pointwise(target)

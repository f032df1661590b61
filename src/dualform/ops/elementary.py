"""Rows of the functions of one number or two: exponentials, roots, angles, activations and their slopes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.terms import Term
from dualform.ops.examples import T, call
from dualform.ops.pointwise import NM, Spelt, cutting, named, pointwise, selecting
from dualform.ops.table import ENTRIES, Entry, OpCall, diagonal_terms, row

# Entry by entry too, though torch does not tag them (leaky_relu before 2.13).
row("aten::leaky_relu", examples=[call("", T("n m", "signed"))])(pointwise)


@row("aten::log_sigmoid", examples=[call("", T("n m", "signed"))])
def _log_sigmoid(call: OpCall, operand: int) -> list[Term]:
    """d log sigmoid(x) = sigmoid(-x) dx, which has a second derivative that is short, too."""
    x = call.operands[0]
    return diagonal_terms(call, operand, torch.sigmoid(-x), f"log_sigmoid'({call.operand_name(0)})")


row("aten::hardswish", "aten::hardsigmoid", examples=[call("", T("n m", "signed"))])(cutting)
row(
    "aten::abs", "aten::absolute", entry=Entry("std::fabs({0})", "tl.abs({0})", zero=True, name="abs"), python="torch.",
    examples=[call("", T("n m", "signed"))],
)(pointwise)  # fmt: skip

# Functions of one number, of two: C++, Triton, price, f(0) = 0.
for _op, _cpp, _triton, _zero in (
    ("erf", "std::erf({0})", "tl.erf({0})", True), ("log1p", "std::log1p({0})", "log1p_({0})", True),
    ("expm1", "std::expm1({0})", "expm1_({0})", True), ("atan", "std::atan({0})", "atan_({0})", True),
    ("sinh", "std::sinh({0})", "0.5 * (expm1_({0}) - expm1_(-{0}))", True),
    ("cosh", "std::cosh({0})", "0.5 * (tl.exp({0}) + tl.exp(-{0}))", False), ("lgamma", "std::lgamma({0})", "", False),
    ("tan", "std::tan({0})", "tl.sin({0}) / tl.cos({0})", True), ("asin", "std::asin({0})", "atan_({0} / tl.sqrt((1.0 - {0}) * (1.0 + {0})))", True),
    ("acos", "std::acos({0})", "2.0 * atan_(tl.sqrt((1.0 - {0}) / (1.0 + {0})))", False), ("asinh", "std::asinh({0})", "asinh_({0})", True),
    ("acosh", "std::acosh({0})", "tl.log({0} + tl.sqrt({0} * {0} - 1.0))", False),
    ("atanh", "std::atanh({0})", "0.5 * (log1p_({0}) - log1p_(-{0}))", True), ("erfc", "std::erfc({0})", "1.0 - tl.erf({0})", False),
    ("exp2", "std::exp2({0})", "tl.exp2({0})", False), ("log2", "std::log2({0})", "tl.log2({0})", False),
    ("log10", "std::log10({0})", "0.4342944819032518 * tl.log({0})", False), ("digamma", "T(digamma_({0}))", "", False),
    ("erfinv", "T(erfinv_({0}))", "", False), ("special_ndtri", "T(ndtri_({0}))", "", False),
    ("special_erfcx", "T(erfcx_({0}))", "", False),
):  # fmt: skip
    _entry = Entry(_cpp, _triton, 25.0, _zero, name=_op.removeprefix("special_"))
    _python = "torch." if _op == "erf" else ""
    _example = call("", T("n m", "big" if _op == "acosh" else "unit"))
    row(f"aten::{_op}", entry=_entry, python=_python, examples=[_example])(pointwise)
for _op, _cpp, _triton in (
    ("atan2", "std::atan2({0}, {1})", "atan2_({0}, {1})"), ("hypot", "std::hypot({0}, {1})", "tl.sqrt({0} * {0} + {1} * {1})"),
    ("fmod", "std::fmod({0}, {1})", "{0} % {1}"), ("remainder", "remainder_({0}, {1})", "{0} - {1} * tl.floor({0} / {1})"),
    ("copysign", "std::copysign({0}, {1})", ""), ("fmax", "std::fmax(T({0}), T({1}))", "tl.where(({0} > {1}) | ({1} != {1}), {0}, {1})"),
    ("fmin", "std::fmin(T({0}), T({1}))", "tl.where(({0} < {1}) | ({1} != {1}), {0}, {1})"),
):  # fmt: skip
    _tensors = ".Tensor" if _op in ("fmod", "remainder", "copysign") else ""
    row(
        f"aten::{_op}", entry=Entry(_cpp, _triton, 25.0, bare=_op in ("fmax", "fmin")), examples=[call(f"{_op}{_tensors}", NM, T("m"))],
    )({"fmax": selecting, "fmin": selecting, "copysign": cutting}.get(_op, pointwise))  # fmt: skip
for _op, _sign in (("maximum", ">"), ("minimum", "<")):
    _entry = Entry(
        f"({{0}} {_sign} {{1}} || {{0}} != {{0}} ? {{0}} : {{1}})",
        f"tl.where(({{0}} {_sign} {{1}}) | ({{0}} != {{0}}), {{0}}, {{1}})", bare=True, name=_op[:3],
    )  # fmt: skip
    row(f"aten::{_op}", entry=_entry, python="torch.", examples=[call("", NM, T("m"))])(selecting)


def _polygamma(n: fx.Node) -> Spelt:
    return ("digamma", [n.args[1]], {}) if n.args[0] == 0 else ("polygamma", [n.args[1]], {"order": n.args[0]})


def _bessel(n: fx.Node) -> Spelt:
    name = named(n)
    return "bessel_ie" if name.endswith("e") else "bessel_i", [n.args[0]], {"order": int("1" in name)}


ENTRIES |= {
    "polygamma": Entry("T(polygamma_({order}, {0}))", flops=25.0), "bessel_i": Entry("T(bessel_i_({order}, {0}))", flops=25.0),
    "bessel_ie": Entry("T(bessel_ie_({order}, {0}))", flops=25.0),
}  # fmt: skip
row("aten::polygamma", entry=_polygamma, examples=[call("", k, NM) for k in (0, 2)])(pointwise)
_orders = ("aten::i0", "aten::special_i0e", "aten::special_i1", "aten::special_i1e")
row(*_orders, entry=_bessel, examples=[call("", NM)])(pointwise)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x times the normal distribution's integral up to it; 0.5 (1 + tanh u) = sigmoid(2u), shared with the slopes."""
    return x * (torch.sigmoid(_steepness(x)[0]) if approximate == "tanh" else _normal(x))


def _tanh_gelu(x: Tensor, approximate: str = "none") -> Any:
    return _gelu(x, approximate) if approximate == "tanh" else NotImplemented


def _normal(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_slope(g: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        normal = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return g * (_normal(x) + x * normal)
    u, du = _steepness(x)
    s = torch.sigmoid(u)
    return g * (s + x * (s * (1 - s)) * du)


def _steepness(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2u and its derivative, u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c, square = 2 * math.sqrt(2 / math.pi), x * x
    return x * (c + c * 0.044715 * square), c + 3 * c * 0.044715 * square


_HIDDEN = T("n m", "signed")
row(
    "aten::gelu", lowered=_gelu, sloped=_tanh_gelu, examples=[call("", _HIDDEN), call("", _HIDDEN, approximate="tanh")],
)(pointwise)  # fmt: skip
row("aten::silu", lowered=lambda x: x * torch.sigmoid(x), examples=[call("", _HIDDEN)])(pointwise)
row("aten::gelu_backward", sloped=_gelu_slope, examples=[call("", NM, _HIDDEN)])(pointwise)


def _where_large(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    return torch.where(x.abs() > threshold, g, 0.0)


row("aten::softshrink_backward", sloped="torch", lowered=_where_large, examples=[call("", NM, _HIDDEN, 0.5)])(pointwise)
row("aten::hardshrink_backward", lowered=_where_large, examples=[call("", NM, _HIDDEN, 0.5)])(pointwise)
for _op, _example in {
    "sigmoid": call("", NM, NM), "tanh": call("", NM, NM), "silu": call("", NM, _HIDDEN), "elu": call("", NM, 1.0, 1.0, 1.0, False, _HIDDEN),
    "softplus": call("", NM, _HIDDEN, 1.0, 20.0), "leaky_relu": call("", NM, _HIDDEN, 0.1, False), "hardtanh": call("", NM, _HIDDEN, -1.0, 1.0),
    "hardsigmoid": call("", NM, _HIDDEN), "hardswish": call("", NM, _HIDDEN), "mish": call("", NM, _HIDDEN),
    "threshold": call("", NM, _HIDDEN, 0.5),
}.items():  # fmt: skip
    row(f"aten::{_op}_backward", sloped="torch", examples=[_example])(None)


# Slopes that are cheap in terms of the result, or plainer to read than the generic rule.
def _unary(slope: Any, shown: str) -> Any:
    def rule(call: OpCall, operand: int) -> list[Term]:
        x = call.operands[operand]
        return diagonal_terms(call, operand, slope(x, call.out), shown.format(x=call.operand_name(operand)))

    return rule


for _op, _slope, _shown, _cpp, _triton, _flops, _zero in (
    ("exp", lambda x, y: y, "exp({x})", "exp_({0})", "tl.exp({0})", 25.0, False),
    ("log", lambda x, y: 1 / x, "(1/{x})", "std::log({0})", "tl.log({0})", 25.0, False),
    ("sqrt", lambda x, y: 0.5 / y, "(1/2√{x})", "std::sqrt({0})", "tl.sqrt({0})", 6.0, True),
    ("rsqrt", lambda x, y: -0.5 * y * y * y, "rsqrt'({x})", "T(1) / std::sqrt({0})", "tl.rsqrt({0})", 6.0, False),
    ("reciprocal", lambda x, y: -y * y, "(-1/{x}²)", "T(1) / {0}", "1.0 / {0}", 6.0, False),
    ("sin", lambda x, y: x.cos(), "cos({x})", "std::sin({0})", "tl.sin({0})", 25.0, True),
    ("cos", lambda x, y: -x.sin(), "(-sin({x}))", "std::cos({0})", "tl.cos({0})", 25.0, False),
    ("tanh", lambda x, y: 1 - y * y, "tanh'({x})", "tanh_({0})", "tanh_({0})", 25.0, True),
    ("sigmoid", lambda x, y: y * (1 - y), "sigmoid'({x})", "sigmoid_({0})", "tl.sigmoid({0})", 25.0, False),
    (
        "relu", lambda x, y: x > 0, "[{x}>0]",
        "({0} > 0 || {0} != {0} ? {0} : T(0))", "tl.where({0} < 0, 0.0, {0})", 1.0, True,
    ),
):  # fmt: skip
    row(
        f"aten::{_op}", entry=Entry(_cpp, _triton, _flops, _zero), python="torch.", called=_op in ("tanh", "exp", "sigmoid", "rsqrt"),
        over=(0,) * (_op == "sigmoid"), examples=[call("", NM), call("", T(""))],
    )(_unary(_slope, _shown))  # fmt: skip
row("aten::square", python="{0} ** 2", examples=[call("", NM), call("", T(""))])(_unary(lambda x, y: 2 * x, "2{x}"))

_POWER = Entry("std::pow({0}, {1})", "pow_({0}, {1})", 25.0, name="pow")
row(
    "aten::pow", entry=_POWER, python="{0} ** {1}", examples=[call("pow.Tensor_Tensor", NM, T("m")), call("pow.Scalar", 2.0, NM)],
)(pointwise)  # fmt: skip


def _powered(n: fx.Node) -> Spelt:
    arguments: Any = n.args
    x, p = arguments
    if p in (2, 2.0):
        return "mul", [x, x], {}
    if p in (0.5, -0.5, -1):
        return {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[p], [x], {}
    return "pow", [x, p], {}


@row(
    "aten::pow.Tensor_Scalar", entry=_powered, python="{0} ** {1}", examples=[call("", NM, p) for p in (2, 0, 1, 3.5, -1)],
)  # fmt: skip
def _power(call: OpCall, operand: int) -> list[Term]:
    x, p, name = call.operands[0], call.bound["exponent"], call.operand_name(0)
    if p == 0:
        return []
    if p == 1:
        return diagonal_terms(call, operand)
    if p == 2:
        return diagonal_terms(call, operand, x, name, 2.0)
    return diagonal_terms(call, operand, x ** (p - 1), f"{name}^{p - 1:g}", float(p))

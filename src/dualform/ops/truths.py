"""Rows of comparisons, of truth values and of bits, through which nothing flows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from dualform.ops.examples import B, I, T, call
from dualform.ops.pointwise import NM, Spelt, named, nothing
from dualform.ops.table import ENTRIES, Entry, row

# Truth values: of two operands, of one.
_COMPARED = {"eq": "==", "ne": "!=", "ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
for _op, _sign in _COMPARED.items():
    row(
        f"aten::{_op}", entry=Entry(f"T({{0}} {_sign} {{1}})", f"{{0}} {_sign} {{1}}", bare=True), python=f"{{0}} {_sign} {{1}}",
        examples=[call(f"{_op}.Tensor", NM, T("m")), call(f"{_op}.Scalar", NM, 0.5)],
    )(nothing)  # fmt: skip
for _op, _cpp, _triton in (
    ("and", "T({0} != 0 && {1} != 0)", "{0} & {1}"),
    ("or", "T({0} != 0 || {1} != 0)", "{0} | {1}"),
    ("xor", "T(({0} != 0) != ({1} != 0))", "{0} ^ {1}"),
):
    ENTRIES[_op] = Entry(_cpp, _triton, truth=True)
    row(f"aten::logical_{_op}", entry=replace(ENTRIES[_op], name=_op), examples=[call("", B("n m"), B("m"))])(nothing)
for _op, _entry in {
    "logical_not": Entry("T({0} == 0)", "{0} == 0", truth=True, name="not"),
    "isnan": Entry("T({0} != {0})", "{0} != {0}"),
    "isinf": Entry("T(std::fabs({0}) == T(INFINITY))", "tl.abs({0}) == float('inf')", 25.0),
    "signbit": Entry("T(std::signbit({0}))", flops=25.0),
}.items():
    row(f"aten::{_op}", entry=_entry, examples=[call("", T("n m", "signed"))])(nothing)


def _bits(n: fx.Node) -> Spelt:
    """Of truth values, or bit by bit."""
    name = named(n).rpartition("_")[2]
    name = name if n.meta["val"].dtype == torch.bool else f"bits_{name}"
    return name, list(n.args[:1] if "not" in name else n.args[:2]), {}


for _op, _sign in (("and", "&"), ("or", "|"), ("xor", "^")):
    ENTRIES[f"bits_{_op}"] = Entry(f"T(int64_t({{0}}) {_sign} int64_t({{1}}))", f"{{0}} {_sign} {{1}}", bare=True)
    _example = call(f"bitwise_{_op}.Tensor", I("n m", "9"), I("m", "9"))
    row(f"aten::bitwise_{_op}", entry=_bits, examples=[_example])(nothing)
ENTRIES["bits_not"] = Entry("T(~int64_t({0}))", "-1 - {0}")
row("aten::bitwise_not", entry=_bits, examples=[call("", I("n m", "9"))])(nothing)
for _op, _mark in (("left", "l"), ("right", "r")):
    _sign = {"l": "<<", "r": ">>"}[_mark]
    _entry = Entry(f"T(int64_t({{0}}) {_sign} int64_t({{1}}))", f"{{0}} {_sign} {{1}}", bare=True, name=f"shift_{_op}")
    row(
        f"aten::__{_mark}shift__", f"aten::bitwise_{_op}_shift", entry=_entry,
        examples=[call(f"{_name}.Tensor", I("n m", "9"), I("m", "4")) for _name in (f"__{_mark}shift__", f"bitwise_{_op}_shift")],
    )(nothing)  # fmt: skip

# What the operators &= and so on call, by what does the same.
OPERATORS = {
    "__iand__": "bitwise_and_", "__ior__": "bitwise_or_", "__ixor__": "bitwise_xor_", "__ilshift__": "bitwise_left_shift_",
    "__irshift__": "bitwise_right_shift_",
}  # fmt: skip

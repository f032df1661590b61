"""Rows of the ops that make a tensor of a number and sizes, or of its places."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dualform.ops.examples import call
from dualform.ops.pointwise import NM, Spelt, named, nothing
from dualform.ops.table import ENTRIES, Entry, OpCall, find_row, row


def filled_with(n: fx.Node) -> Any:
    """The number that an op fills a tensor with; None if it is another op, or memory as it was found."""
    row = find_row(n.target)
    if row is None or row.entry is not _filled or is_empty(n.target):
        return None
    bound = OpCall(n.target, n.args, dict(n.kwargs), n.meta["val"]).bound
    return bound.get("fill_value", bound.get("s", float("ones" in named(n))))


def is_empty(target: Any) -> bool:
    """Does an op give memory as it was found?"""
    row = find_row(target)
    return row is not None and row.entry is _filled and "empty" in target._opname


def is_uniform(n: fx.Node) -> bool:
    """Does an op make a tensor of its sizes alone, the same number in every entry?"""
    row = find_row(n.target)
    return row is not None and row.entry is _filled and not n.all_input_nodes


def _filled(n: fx.Node) -> Spelt:
    value = torch.tensor(filled_with(n) or 0.0, dtype=n.meta["val"].dtype)  # with the digits that it has
    return "fill", [], {"value": float(value)}


def _counted(n: fx.Node) -> Spelt:
    start, _, step = (0, *n.args, 1) if len(n.args) == 1 else (*n.args, 1)[:3]
    return "arange", [], {"start": start, "step": step}


ENTRIES |= {"fill": Entry("T({value})", passes=True), "arange": Entry("T({start}) + T({step}) * T({i0})")}
row(
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::new_zeros", "aten::new_ones", "aten::new_full",
    "aten::new_empty", unread=["self"], entry=_filled,
    examples=[*(call(op, NM) for op in ("zeros_like", "ones_like")), call("full_like", NM, 2.0), call("new_zeros", NM, [2]), call("new_ones", NM, [2]), call("new_full", NM, [2], 1.0)],
)(nothing)  # fmt: skip
row(
    "aten::full", "aten::zeros", "aten::ones", "aten::scalar_tensor", "aten::empty", "aten::empty_strided",
    "aten::_efficientzerotensor", entry=_filled,
    examples=[call("full", [2], 1.0), call("zeros", [2]), call("ones", [2]), call("scalar_tensor", 2.0), call("_efficientzerotensor", [2])],
)(None)  # fmt: skip
row("aten::arange", entry=_counted, python="torch.", examples=[call("arange", 3), call("arange.start", 1, 4)])(None)
row("aten::eye", entry=Entry("T({i0} == {i1})"), examples=[call("eye", 3), call("eye.m", 2, 3)])(None)

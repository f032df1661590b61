"""Rows of the ops that put a tensor together from pieces: concatenation, borders, repeats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.queries import flipped, range_of
from dualform.algebra.relations import Lookup, window
from dualform.algebra.terms import Axis, Label, Relation, Term, atoms, fresh_axes, volume
from dualform.ops.examples import T, call
from dualform.ops.table import ALL, FIRST, OpCall, row

aten = torch.ops.aten


def _joined(n: fx.Node, shape: tuple[int, ...]) -> Any:
    parts: Any = n.args[0]
    axis: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
    axis = axis % len(shape)
    at = 0
    for x in parts:
        if n.target == aten.stack.default:
            yield (lambda t, at=at: t.select(axis, at)), x
            at += 1
        else:
            size = x.meta["val"].shape[axis] if x.meta["val"].ndim == len(shape) else 0
            yield (lambda t, at=at, size=size: t.narrow(axis, at, size)), x
            at += size


_pieces = {"affine": ALL, "kind": "pieces", "entry": _joined, "python": "torch."}


@row(
    "aten::cat", "aten::concat", "aten::concatenate", **_pieces,
    examples=[call("", [T("n m"), T("n 1"), T("n k")], 1), call("", [T("n m"), T("0"), T("k m")], 0)],
)  # fmt: skip
def _cat(call: OpCall, operand: int) -> list[Term]:
    pieces = call.bound["tensors"]
    where: Any = call.places[operand][1]
    dim = call.bound["dim"] % call.out.ndim
    if pieces[where].ndim != call.out.ndim:  # the legacy empty tensor
        return []
    start = sum(p.shape[dim] for p in pieces[:where] if p.ndim == call.out.ndim)
    count = pieces[where].shape[dim]
    return [*flipped([range_of(call.out.shape, dim, range(start, start + count))])] if count else []


@row("aten::stack", **_pieces, examples=[call("", [T("n"), T("n"), T("n")], 1), call("", [T("n m")], -1)])
def _stack(call: OpCall, operand: int) -> list[Term]:
    where: Any = call.places[operand][1]
    dim = call.bound["dim"] % call.out.ndim
    return [*flipped([range_of(call.out.shape, dim, range(where, where + 1), drop=True)])]


def _bordered_pieces(n: fx.Node, shape: tuple[int, ...]) -> Any:
    arguments: tuple[Any, ...] = (*n.args, 0.0)
    x, pads, value = arguments[:3]
    widths = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    assert all(w >= 0 for pair in widths for w in pair)  # lowered

    def place(t: Any) -> Any:
        for k, (before, after) in enumerate(widths):
            axis = len(shape) - len(widths) + k
            t = t.narrow(axis, before, shape[axis] - before - after)
        return t

    yield (lambda t: t), float(value)
    yield place, x


def _cut_first(x: Tensor, pad: Any, value: float = 0.0) -> Any:
    if min(pad, default=0) >= 0:
        return NotImplemented
    for k, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis, first, last = x.ndim - 1 - k, max(-before, 0), max(-after, 0)
        x = x.narrow(axis, first, x.shape[axis] - first - last)
    return aten.constant_pad_nd.default(x, [max(n, 0) for n in pad], value)


def _window(n: fx.Node, shape: tuple[int, ...]) -> Any:
    x, _, *where = n.args
    view: Any = aten.select.int if n.target == aten.select_backward.default else aten.slice.Tensor
    yield (lambda t: t), 0.0
    yield (lambda t: view(t, *where)), x


row("aten::select_backward", kind="pieces", entry=_window, examples=[call("", T("n"), [3, 4], 1, 2)])(None)
row("aten::slice_backward", kind="pieces", entry=_window, examples=[call("", T("k"), [4], 0, 1, 3, 1)])(None)


@row(
    "aten::constant_pad_nd", affine=FIRST, kind="pieces", entry=_bordered_pieces, lowered=_cut_first,
    examples=[call("", T("n m"), [1, 2, 0, 1]), call("", T("1"), [0, 2]), call("", T("n p"), [-1, 2, 1, -1]), call("", T("n m"), [0, 0])],
)  # fmt: skip
@row(
    "aten::pad", affine=FIRST,
    examples=[call("", T("n m"), [1, 2, 0, 1]), *(call("pad", T("b c l"), [2, 1], mode) for mode in ("reflect", "replicate", "circular")), call("pad", T("b c 4 5"), [1, 2, 3, 0], "reflect"), *(call("pad", T("b c 4 5"), [-1, 1, 2, -2], mode) for mode in ("reflect", "replicate", "circular"))],
)  # fmt: skip
def _pad(call: OpCall, operand: int) -> list[Term]:
    """The border is zero (a window that reaches outside), a mirror, the edge, or the other end (a lookup)."""
    x, pads, mode = call.operands[0], list(call.bound["pad"]), call.bound.get("mode", "constant")
    inn, out = fresh_axes(x.shape), list(fresh_axes(call.out.shape))
    relations: list[Relation] = []
    for k in range(x.ndim):
        from_end = 2 * (x.ndim - 1 - k)
        before, after = pads[from_end : from_end + 2] if from_end < len(pads) else (0, 0)
        if before == after == 0:
            out[k] = inn[k]
        elif mode == "constant":
            relations += window([out[k]], inn[k], -before, [1])
        else:
            relations += _mirrored(out[k], inn[k], x.shape[k], before, after, mode, x.device)
    return [Term(1.0, tuple(relations), tuple(out), inn)]


def _mirrored(out: Axis, inn: Axis, n: int, before: int, after: int, mode: str, device: torch.device) -> list[Relation]:
    place = torch.arange(volume(out), device=device) - before
    if mode == "circular":  # of what a negative border leaves
        first = max(-before, 0)
        place = first + (place - first) % (n - first - max(-after, 0))
    elif mode == "replicate":
        place = place.clamp(0, n - 1)
    else:
        place = (n - 1) - ((n - 1) - place.abs()).abs()
    return [Lookup(out, inn, place if out else place.squeeze(0))] if inn else []


def _bordered(mode: str) -> Any:
    def rule(call: OpCall, operand: int) -> list[Term]:
        args = (call.operands[0], call.bound["padding"], mode)
        return _pad(OpCall(torch.ops.aten.pad.default, args, {}, call.out, names=call.names), operand)

    return rule


for _name, _mode in (("reflection", "reflect"), ("replication", "replicate")):
    for _rank, _axes in enumerate(("b c 4", "b c 4 5", "c 3 4 5"), 1):
        row(f"aten::{_name}_pad{_rank}d", affine=ALL, examples=[call("", T(_axes), [1, 2] * _rank)])(_bordered(_mode))


def _repeated(x: Tensor, repeats: Any) -> Tensor:
    """Put axes of repeats between those of x."""
    sizes = [*[1] * (len(repeats) - x.ndim), *x.shape]
    wide = x.reshape([n for size in sizes for n in (1, size)])
    wide = wide.expand([n for size, r in zip(sizes, repeats, strict=True) for n in (r, size)])
    return wide.reshape([size * r for size, r in zip(sizes, repeats, strict=True)])


@row("aten::tile", affine=ALL, sizes={"dims"}, examples=[call("", T("n 1"), [2, 2, 3]), call("", T("k n m"), [2])])
@row("aten::repeat", affine=ALL, lowered=_repeated, examples=[call("", T("n 1"), [2, 2, 3]), call("", T(""), [])])
def _repeat(call: OpCall, operand: int) -> list[Term]:
    x, times = call.operands[0], list(call.bound["repeats" if "repeats" in call.bound else "dims"])
    times = [1] * (x.ndim - len(times)) + times
    inn = fresh_axes(x.shape)
    padded = ((),) * (len(times) - x.ndim) + inn
    out = tuple(((Label(n),) if n != 1 else ()) + axis for n, axis in zip(times, padded, strict=True))
    return [Term(1.0, (), out, inn)]


@row(
    "aten::repeat_interleave.self_int", affine=ALL, examples=[call("", T("n m"), 2, 1), call("", T("n m"), 3), call("", T("n"), 1, 0)],
)  # fmt: skip
def _repeat_interleave(call: OpCall, operand: int) -> list[Term]:
    x, times, dim = call.operands[0], call.bound["repeats"], call.bound["dim"]
    inn = fresh_axes(x.shape)
    copies: Axis = (Label(times),) if times != 1 else ()
    if dim is None:
        return [Term(1.0, (), ((*atoms(inn), *copies),), inn)]
    out = tuple((*axis, *copies) if k == dim % x.ndim else axis for k, axis in enumerate(inn))
    return [Term(1.0, (), out, inn)]

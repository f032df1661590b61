"""Rows of the ops that move numbers by a rule and compute none: views, slices, concatenation, borders, diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.compose import compose_terms
from dualform.algebra.relations import Lookup, window
from dualform.algebra.terms import Axis, Label, Relation, Select, Term, atoms, fresh_axes, volume
from dualform.ops import picking
from dualform.ops.examples import T, call
from dualform.ops.table import ALL, FIRST, Call, dims_of, index_terms, row, window_terms, without_axis

aten = torch.ops.aten


def _on_meta(value: Any, own: Tensor, stand_in: Tensor) -> Any:
    if value is own:
        return stand_in
    return torch.empty(value.shape, device="meta") if isinstance(value, Tensor) else value


def _moved(call: Call, operand: int) -> list[Term]:
    x = call.operands[operand]

    def strides_of(stand_in: Tensor) -> Tensor:
        args = [_on_meta(a, x, stand_in) for a in call.args]
        return call.target(*args, **{k: _on_meta(a, x, stand_in) for k, a in call.kwargs.items()})

    return index_terms(call, operand, strides_of) if operand == 0 else []


def _shaped_back(base: Any, value: Any, *rest: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.view.default, (value, list(base.meta["val"].shape))


def _ordered_back(base: Any, value: Any, dims: list[int]) -> tuple[Any, tuple[Any, ...]]:
    positive = [d % len(dims) for d in dims]
    return aten.permute.default, (value, [positive.index(k) for k in range(len(dims))])


def _turned_back(base: Any, value: Any, first: int, second: int) -> tuple[Any, tuple[Any, ...]]:
    return aten.transpose.int, (value, first, second)


def _axes_back(base: Any, value: Any, source: Any, to: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.movedim.intlist, (value, *([d] if isinstance(d, int) else d for d in (to, source)))


_NMK = T("n m k")
_view = {"affine": ALL, "kind": "view"}
_eager = {"odd": True, "python": "x.", "called": True}
row("aten::permute", **_view, **_eager, put=_ordered_back, examples=[call("", T("n 1 m"), [2, 0, 1])])(_moved)
row("aten::transpose", **_view, **_eager, put=_turned_back, examples=[call("transpose.int", _NMK, 0, -1)])(_moved)
row(
    "aten::t", **_view, put=lambda base, value: (aten.t.default, (value,)), odd=True, python="{0}.T",
    examples=[call("", T("n m")), call("", T("n"))],
)(_moved)  # fmt: skip
row(
    "aten::unsqueeze",
    **_view,
    ordered=True,
    **_eager,
    put=_shaped_back,
    examples=[call("", T("n m"), 1), call("", T(""), 0)],
)(_moved)
row(
    "aten::squeeze", **_view, ordered=True, **_eager, put=_shaped_back,
    examples=[call("squeeze", T("1 n 1")), call("squeeze.dim", T("1 n"), 0), call("squeeze.dims", T("1 n 1"), [0, 2])],
)(_moved)  # fmt: skip
row("aten::expand", **_view, **_eager, examples=[call("", T("n 1"), [2, -1, 4]), call("", T(""), [2])])(_moved)
row("aten::mH", "aten::adjoint", affine=ALL, python="{0}.mH", examples=[call("", T("n m"))])(_moved)
row(
    "aten::mT",
    affine=ALL,
    python="{0}.mT",
    put=lambda base, value: (aten.mT.default, (value,)),
    examples=[call("", T("b n m"))],
)(_moved)
row(
    "aten::numpy_T",
    affine=ALL,
    python="{0}.T",
    put=lambda base, value: (aten.numpy_T.default, (value,)),
    examples=[call("", _NMK)],
)(_moved)
row(
    "aten::swapaxes", "aten::swapdims", affine=ALL, put=_turned_back,
    examples=[call(op, _NMK, 0, -1) for op in ("swapaxes", "swapdims")],
)(_moved)  # fmt: skip
row("aten::movedim", affine=ALL, put=_axes_back, examples=[call("movedim.int", _NMK, 0, -1)])(_moved)
row(
    "aten::matrix_H", "aten::moveaxis", "aten::expand_as", "aten::broadcast_to", affine=ALL, unread=["other"],
    examples=[
        call("matrix_H", T("n m")), call("moveaxis.int", _NMK, 0, -1),
        call("expand_as", T("n 1"), T("k n m")), call("broadcast_to", T("3 1"), [3, 4]),
    ],
)(_moved)  # fmt: skip


@row("aten::view", **_view, ordered=True, put=_shaped_back, odd=True, python="x.", examples=[call("", T("6"), [2, 3])])
@row(
    "aten::_unsafe_view",
    **_view,
    ordered=True,
    put=_shaped_back,
    odd=True,
    python="{0}.view({1})",
    examples=[call("", T("12"), [3, 4])],
)
@row(
    "aten::reshape",
    **_view,
    ordered=True,
    **_eager,
    put=_shaped_back,
    examples=[call("", T("k 6"), [3, -1]), call("", T("6 4"), [8, 3]), call("", T("1"), [])],
)
@row("aten::flatten", affine=ALL, put=_shaped_back, python="x.", examples=[call("flatten.using_ints", _NMK, 1)])
@row(
    "aten::unflatten", "aten::ravel", "aten::reshape_as", "aten::view_as", affine=ALL, put=_shaped_back, unread=["other"],
    examples=[
        call("view_as", T("12"), T("3 4")), call("unflatten.int", T("6 m"), 0, [2, 3]), call("ravel", T("n m")),
        call("reshape_as", T("6"), T("2 3")),
    ],
)  # fmt: skip
def _reshaped(call: Call, operand: int) -> list[Term]:
    x = call.operands[operand]
    if operand:
        return []
    out, inn = fresh_axes(call.out.shape), fresh_axes(x.shape)
    if 0 in x.shape:
        return []
    unflatten = Term(1.0, (), out, (atoms(out),))
    flatten = Term(1.0, (), (atoms(inn),), inn)
    term = compose_terms(unflatten, flatten)
    return [] if term is None else [term]


def _bounds(start: Any, end: Any, step: int, size: int) -> tuple[int, int]:
    """First index and number of indices of a slice."""
    chosen = range(size)[slice(start, end, step)]
    return chosen.start, len(chosen)


@row(
    "aten::slice", **_view, put=lambda base, value, *at: (aten.slice_scatter.default, (base, value, *at)),
    examples=[
        call("slice.Tensor", T("n m"), 0, 1, 3), call("slice.Tensor", T("l"), 0, 0, 9, 2), call("slice.Tensor", T("p k"), 0, 2, 3),
        call("slice.Tensor", T("n"), -1, 2, 1), call("slice.Tensor", T("l"), 0, 1, -1, 3),
    ],
)  # fmt: skip
def _slice(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    start, count = _bounds(b["start"], b["end"], b["step"], x.shape[dim])
    return window_terms(x.shape, dim, start, b["step"], count, into=False) if count else []


@row(
    "aten::narrow", affine=ALL, examples=[call("", T("k p"), 1, 1, 3), call("", T("p"), 0, -2, 2)],
    put=lambda base, value, dim, start, n: (aten.slice_scatter.default, (base, value, dim, start, start + n)),
)  # fmt: skip
def _narrow(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    return window_terms(x.shape, dim, int(b["start"]) % max(x.shape[dim], 1), 1, b["length"], into=False)


@row(
    "aten::select.int", **_view, python="x.", examples=[call("", T("n m"), 1, -1), call("", T("1"), 0, 0)],
    put=lambda base, value, *at: (aten.select_scatter.default, (base, value, *at)),
)  # fmt: skip
def _select(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    return without_axis(window_terms(x.shape, dim, b["index"] % x.shape[dim], 1, 1, into=False), dim, "out")


# What cuts a tensor along an axis.
_cuts = {"several": ("cut",)}
row("aten::unbind", kind="view", **_cuts, examples=[call("", T("n m"), 1).of(1)])(None)
row("aten::split", kind="view", **_cuts, examples=[call("split.Tensor", T("p m"), 2).of(1)])(None)
row(
    "aten::split_with_sizes",
    kind="view",
    **_cuts,
    definition=torch.split,
    examples=[call("", T("n 4"), [1, 3], 1).of(1)],
)(None)
row(
    "aten::chunk", "aten::tensor_split", "aten::hsplit", "aten::vsplit", "aten::dsplit", "aten::unsafe_split", "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes", **_cuts,
    examples=[
        call("chunk", T("p m"), 2), call("tensor_split.sections", T("p m"), 2).of(1), call("hsplit.int", T("n 4"), 2), call("vsplit.int", T("4 n"), 2),
        call("dsplit.int", T("n m 4"), 2), call("unsafe_split.Tensor", T("p m"), 2).of(1), call("unsafe_chunk", T("p m"), 2),
        call("unsafe_split_with_sizes", T("n 4"), [1, 3], 1).of(1),
    ],
)(None)  # fmt: skip


def _outside(base: Tensor, dim: int, start: int, step: int, count: int) -> list[Term]:
    """The identity away from a window: minus the window, which stores nothing either."""
    out = fresh_axes(base.shape)
    whole = Term(1.0, (), out, out)
    if not count:
        return [whole]
    if count == base.shape[dim]:
        return []
    inside = Select(Label(count), out[dim][0], start, step)
    return [whole, Term(-1.0, (inside,), out, out)]


@row(
    "aten::slice_scatter", affine=ALL,
    examples=[call("", T("5 k"), T("2 k"), 0, 1, 5, 2), call("", T("1"), T("1"), 0), call("", T("n"), T("0"), 0, 1, 1)],
)  # fmt: skip
def _slice_scatter(call: Call, operand: int) -> list[Term]:
    base, b = call.bound["self"], call.bound
    dim = b["dim"] % base.ndim
    start, count = _bounds(b["start"], b["end"], b["step"], base.shape[dim])
    if call.places[operand][0] == "self":
        return _outside(base, dim, start, b["step"], count)
    return window_terms(base.shape, dim, start, b["step"], count, into=True) if count else []


@row("aten::select_scatter", affine=ALL, examples=[call("", T("n 4"), T("n"), 1, 2), call("", T("n 1"), T("n"), 1, 0)])
def _select_scatter(call: Call, operand: int) -> list[Term]:
    base, b = call.bound["self"], call.bound
    dim = b["dim"] % base.ndim
    start = b["index"] % base.shape[dim]
    if call.places[operand][0] == "self":
        return _outside(base, dim, start, 1, 1)
    return without_axis(window_terms(base.shape, dim, start, 1, 1, into=True), dim, "inn")


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
def _cat(call: Call, operand: int) -> list[Term]:
    pieces = call.bound["tensors"]
    where = call.places[operand][1]
    assert where is not None
    dim = call.bound["dim"] % call.out.ndim
    if pieces[where].ndim != call.out.ndim:  # the legacy empty tensor
        return []
    start = sum(p.shape[dim] for p in pieces[:where] if p.ndim == call.out.ndim)
    count = pieces[where].shape[dim]
    return window_terms(call.out.shape, dim, start, 1, count, into=True) if count else []


@row("aten::stack", **_pieces, examples=[call("", [T("n"), T("n"), T("n")], 1), call("", [T("n m")], -1)])
def _stack(call: Call, operand: int) -> list[Term]:
    where = call.places[operand][1]
    assert where is not None
    dim = call.bound["dim"] % call.out.ndim
    return without_axis(window_terms(call.out.shape, dim, where, 1, 1, into=True), dim, "inn")


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
    examples=[
        call("", T("n m"), [1, 2, 0, 1]), *(call("pad", T("b c l"), [2, 1], mode) for mode in ("reflect", "replicate", "circular")),
        call("pad", T("b c 4 5"), [1, 2, 3, 0], "reflect"),
    ],
)  # fmt: skip
def _pad(call: Call, operand: int) -> list[Term]:
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
            relations += _mirrored(out[k], inn[k], x.shape[k], before, mode, x.device)
    return [Term(1.0, tuple(relations), tuple(out), inn)]


def _mirrored(out: Axis, inn: Axis, n: int, before: int, mode: str, device: torch.device) -> list[Relation]:
    place = torch.arange(volume(out), device=device) - before
    if mode == "circular":
        place = place % n
    elif mode == "replicate":
        place = place.clamp(0, n - 1)
    else:
        place = (n - 1) - ((n - 1) - place.abs()).abs()
    return [Lookup(out, inn, place if out else place.squeeze(0))] if inn else []


def _bordered(mode: str) -> Any:
    def rule(call: Call, operand: int) -> list[Term]:
        args = (call.operands[0], call.bound["padding"], mode)
        return _pad(Call(torch.ops.aten.pad.default, args, {}, call.out, names=call.names), operand)

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


@row("aten::tile", affine=ALL, examples=[call("", T("n 1"), [2, 2, 3]), call("", T("k n m"), [2])])
@row("aten::repeat", affine=ALL, lowered=_repeated, examples=[call("", T("n 1"), [2, 2, 3])])
def _repeat(call: Call, operand: int) -> list[Term]:
    x, times = call.operands[0], list(call.bound.get("repeats") or call.bound["dims"])
    times = [1] * (x.ndim - len(times)) + times
    inn = fresh_axes(x.shape)
    padded = ((),) * (len(times) - x.ndim) + inn
    out = tuple(((Label(n),) if n != 1 else ()) + axis for n, axis in zip(times, padded, strict=True))
    return [Term(1.0, (), out, inn)]


@row(
    "aten::repeat_interleave.self_int",
    affine=ALL,
    examples=[call("", T("n m"), 2, 1), call("", T("n m"), 3), call("", T("n"), 1, 0)],
)
def _repeat_interleave(call: Call, operand: int) -> list[Term]:
    x, times, dim = call.operands[0], call.bound["repeats"], call.bound["dim"]
    inn = fresh_axes(x.shape)
    copies: Axis = (Label(times),) if times != 1 else ()
    if dim is None:
        return [Term(1.0, (), ((*atoms(inn), *copies),), inn)]
    out = tuple((*axis, *copies) if k == dim % x.ndim else axis for k, axis in enumerate(inn))
    return [Term(1.0, (), out, inn)]


def _on_diagonal(
    along: Axis, axes: Sequence[Axis], pair: tuple[int, int], offset: int
) -> tuple[list[Axis], list[Relation]]:
    """Tie two axes to one index: the first starts at max(-offset, 0), the second at max(offset, 0)."""
    tied, relations = list(axes), []
    for axis, start in zip(pair, (max(-offset, 0), max(offset, 0)), strict=True):
        if volume(axes[axis]) == volume(along):
            tied[axis] = along
        else:
            relations += window([along], axes[axis], start, [1])
    return tied, relations


@row("aten::diagonal_copy", "aten::linalg_diagonal", affine=ALL, examples=[call("", T("n n"))])
@row(
    "aten::diagonal", **_view, put=lambda base, value, *at: (aten.diagonal_scatter.default, (base, value, *at)),
    examples=[call("", T("n n")), call("", T("n m"), 1), call("", T("k m n"), -1, 1, 2), call("", T("n m"), 3)],
)  # fmt: skip
def _diagonal(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    first, second = b["dim1"] % x.ndim, b["dim2"] % x.ndim
    (along,) = fresh_axes(call.out.shape[-1:])
    inn, relations = _on_diagonal(along, fresh_axes(x.shape), (first, second), b["offset"])
    rest = [axis for k, axis in enumerate(inn) if k not in (first, second)]
    return [Term(1.0, tuple(relations), (*rest, along), tuple(inn))]


@row("aten::diag_embed", affine=ALL, examples=[call("", T("k n")), call("", T("n"), 1), call("", T("k n"), -2, 0, 2)])
def _diag_embed(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    return _embedded(x, call.out, b["offset"], b["dim1"] % call.out.ndim, b["dim2"] % call.out.ndim)


def _embedded(x: Tensor, out_: Tensor, offset: int, first: int, second: int) -> list[Term]:
    inn = fresh_axes(x.shape)
    axes = list(fresh_axes(out_.shape))
    others = [k for k in range(out_.ndim) if k not in (first, second)]
    for k, axis in zip(others, inn[:-1], strict=True):
        axes[k] = axis
    out, relations = _on_diagonal(inn[-1], axes, (first, second), offset)
    return [Term(1.0, tuple(relations), tuple(out), inn)]


@row(
    "aten::diagonal_scatter",
    affine=ALL,
    lowered=picking.diagonal_scatter,
    examples=[call("", T("n n"), T("n")), call("", T("3 4"), T("2"), 2)],
)
def _diagonal_scatter(call: Call, operand: int) -> list[Term]:
    """The base away from the diagonal, and the source on it."""
    base, b = call.bound["self"], call.bound
    first, second = b["dim1"] % base.ndim, b["dim2"] % base.ndim
    embedded = _embedded(call.bound["src"], base, b["offset"], first, second)[0]
    if call.places[operand][0] == "src":
        return [embedded]
    out = fresh_axes(base.shape)
    return [Term(1.0, (), out, out), Term(-1.0, embedded.factors, embedded.out, embedded.out)]


@row("aten::diag", affine=ALL, examples=[call("", T("n")), call("", T("n m"), 1), call("", T("n"), -1)])
def _diag(call: Call, operand: int) -> list[Term]:
    """A vector on a diagonal, or the diagonal of a matrix."""
    x, offset = call.operands[0], call.bound["diagonal"]
    if x.ndim == 1:
        return _embedded(x, call.out, offset, 0, 1)
    (along,) = fresh_axes(call.out.shape)
    inn, relations = _on_diagonal(along, fresh_axes(x.shape), (0, 1), offset)
    return [Term(1.0, tuple(relations), (along,), tuple(inn))]


@row("aten::trace", affine=ALL, examples=[call("", T("n m")), call("", T("n n"))])
def _trace(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    (along,) = fresh_axes([min(x.shape)])
    inn, relations = _on_diagonal(along, fresh_axes(x.shape), (0, 1), 0)
    return [Term(1.0, tuple(relations), (), tuple(inn))]


@row("aten::flip", affine=ALL, odd=True, lowered=picking.flip, examples=[call("", T("n m"), [0, 1])])
@row("aten::fliplr", "aten::flipud", affine=ALL, examples=[call("", T("n m"))])
def _flip(call: Call, operand: int) -> list[Term]:
    """big = n - 1 - small on each flipped axis."""
    x = call.operands[0]
    named = {"aten::fliplr": [1], "aten::flipud": [0]}.get(call.target._schema.name)
    return _flipped(x, dims_of(call.bound["dims"], x.ndim) if named is None else named)


def _flipped(x: Tensor, dims: list[int]) -> list[Term]:
    inn, out = fresh_axes(x.shape), list(fresh_axes(x.shape))
    relations: list[Relation] = []
    for k, axis in enumerate(inn):
        if k in dims and axis:
            relations.append(Select(out[k][0], axis[0], x.shape[k] - 1, -1))
        else:
            out[k] = axis
    return [Term(1.0, tuple(relations), tuple(out), inn)]


@row("aten::rot90", affine=ALL, examples=[call("", T("n m"), k, [0, 1]) for k in (1, 2, -1, 4)])
def _rot90(call: Call, operand: int) -> list[Term]:
    """Flips and a transposition."""
    x, turns = call.operands[0], call.bound["k"] % 4
    first, second = (d % x.ndim for d in call.bound["dims"])
    (term,) = _flipped(x, {0: [], 1: [second], 2: [first, second], 3: [first]}[turns])
    if turns % 2:
        out = list(term.out)
        out[first], out[second] = out[second], out[first]
        term = replace(term, out=tuple(out))
    return [term]


@row(
    "aten::roll",
    affine=ALL,
    examples=[
        call("", T("n m"), [1], [1]),
        call("", T("p"), [-2], [0]),
        call("", T("n m"), [2, -1], [0, 1]),
        call("", T("n m"), [5]),
        call("", T("n"), [0], [0]),
    ],
)
def _roll(call: Call, operand: int) -> list[Term]:
    """Along each axis a roll is two windows: what stays and what wraps around."""
    x, dims, shifts = call.operands[0], call.bound["dims"], call.bound["shifts"]
    if not dims:
        flat: Axis = (Label(x.numel()),) if x.numel() != 1 else ()
        inn, out = fresh_axes(x.shape), fresh_axes(x.shape)
        moved = _rolled([Term(1.0, (), (flat,), (flat,))], 0, shifts[0])
        flattened = _composed(moved, [Term(1.0, (), (atoms(inn),), inn)])
        return _composed([Term(1.0, (), out, (atoms(out),))], flattened)
    axes = fresh_axes(x.shape)
    terms = [Term(1.0, (), axes, axes)]
    for dim, shift in zip(dims, shifts, strict=True):
        terms = _rolled(terms, dim % x.ndim, shift)
    return terms


def _composed(outer: list[Term], inner: list[Term]) -> list[Term]:
    pairs = [compose_terms(a, b) for a in outer for b in inner]
    return [t for t in pairs if t is not None]


def _rolled(terms: list[Term], dim: int, shift: int) -> list[Term]:
    """Roll the output axis `dim`."""
    n = volume(terms[0].out[dim])
    shift %= n
    if shift == 0:
        return terms
    found = []
    for term in terms:
        for source, target, count in ((0, shift, n - shift), (n - shift, 0, shift)):
            moved, along = Label(n), Label(count)
            ties = (Select(along, moved, target, 1), Select(along, term.out[dim][0], source, 1))
            out = (*term.out[:dim], (moved,), *term.out[dim + 1 :])
            found.append(Term(term.coef, (*term.factors, *ties), out, term.inn))
    return found

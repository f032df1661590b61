"""Rows of the ops that move numbers by a rule and compute none: views, slices, concatenation, borders, diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.compose import compose_terms
from dualform.algebra.queries import flipped, range_of
from dualform.algebra.relations import window
from dualform.algebra.terms import Axis, Label, Relation, Select, Term, atoms, fresh_axes, volume
from dualform.ops import picking
from dualform.ops.examples import T, call
from dualform.ops.table import ALL, OpCall, inverse, placed, row

aten = torch.ops.aten


def _on_meta(value: Any, own: Tensor, stand_in: Tensor) -> Any:
    if value is own:
        return stand_in
    return torch.empty(value.shape, device="meta") if isinstance(value, Tensor) else value


def _moved(call: OpCall, operand: int) -> list[Term]:
    """A permutation, an expansion or a squeeze: by where the strides of a contiguous stand-in go."""
    if operand:
        return []
    x = call.operands[0]
    stand_in, inn = torch.empty(x.shape, device="meta"), fresh_axes(x.shape)
    args = [_on_meta(a, x, stand_in) for a in call.args]
    moved = call.target(*args, **{k: _on_meta(a, x, stand_in) for k, a in call.kwargs.items()})
    owner = {stand_in.stride(k): inn[k] for k in range(x.ndim) if x.shape[k] != 1}
    seen = zip(moved.shape, moved.stride(), strict=True)
    out = tuple(() if n == 1 else owner[step] if step else (Label(n),) for n, step in seen)
    return [Term(1.0, (), out, inn)]


def _shaped_back(base: Any, value: Any, *rest: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.view.default, (value, list(base.meta["val"].shape))


def _ordered_back(base: Any, value: Any, dims: list[int]) -> tuple[Any, tuple[Any, ...]]:
    return aten.permute.default, (value, inverse([d % len(dims) for d in dims]))


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
    "aten::unsqueeze", **_view, ordered=True, **_eager, put=_shaped_back, examples=[call("", T("n m"), 1), call("", T(""), 0)],
)(_moved)  # fmt: skip
row(
    "aten::squeeze", **_view, ordered=True, **_eager, put=_shaped_back,
    examples=[call("squeeze", T("1 n 1")), call("squeeze.dim", T("1 n"), 0), call("squeeze.dims", T("1 n 1"), [0, 2])],
)(_moved)  # fmt: skip
row("aten::expand", **_view, **_eager, examples=[call("", T("n 1"), [2, -1, 4]), call("", T(""), [2])])(_moved)
row("aten::mH", "aten::adjoint", affine=ALL, python="{0}.mH", examples=[call("", T("n m"))])(_moved)
row(
    "aten::mT", affine=ALL, python="{0}.mT", put=lambda base, value: (aten.mT.default, (value,)), examples=[call("", T("b n m"))],
)(_moved)  # fmt: skip
row(
    "aten::numpy_T", affine=ALL, python="{0}.T", put=lambda base, value: (aten.numpy_T.default, (value,)), examples=[call("", _NMK)],
)(_moved)  # fmt: skip
row(
    "aten::swapaxes", "aten::swapdims", affine=ALL, put=_turned_back,
    examples=[call(op, _NMK, 0, -1) for op in ("swapaxes", "swapdims")],
)(_moved)  # fmt: skip
row("aten::movedim", affine=ALL, put=_axes_back, examples=[call("movedim.int", _NMK, 0, -1)])(_moved)
row(
    "aten::matrix_H", "aten::moveaxis", "aten::expand_as", "aten::broadcast_to", affine=ALL, unread=["other"],
    examples=[call("matrix_H", T("n m")), call("moveaxis.int", _NMK, 0, -1), call("expand_as", T("n 1"), T("k n m")), call("broadcast_to", T("3 1"), [3, 4])],
)(_moved)  # fmt: skip


@row("aten::view", **_view, ordered=True, put=_shaped_back, odd=True, python="x.", examples=[call("", T("6"), [2, 3])])
@row(
    "aten::_unsafe_view", **_view, ordered=True, put=_shaped_back, odd=True, python="{0}.view({1})",
    examples=[call("", T("12"), [3, 4])],
)  # fmt: skip
@row(
    "aten::reshape", **_view, ordered=True, **_eager, put=_shaped_back,
    examples=[call("", T("k 6"), [3, -1]), call("", T("6 4"), [8, 3]), call("", T("1"), [])],
)  # fmt: skip
@row("aten::flatten", affine=ALL, put=_shaped_back, python="x.", examples=[call("flatten.using_ints", _NMK, 1)])
@row(
    "aten::unflatten", "aten::ravel", "aten::reshape_as", "aten::view_as", affine=ALL, put=_shaped_back, unread=["other"],
    examples=[call("view_as", T("12"), T("3 4")), call("unflatten.int", T("6 m"), 0, [2, 3]), call("ravel", T("n m")), call("reshape_as", T("6"), T("2 3"))],
)  # fmt: skip
def _reshaped(call: OpCall, operand: int) -> list[Term]:
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


def _span(call: OpCall, x: Tensor) -> tuple[int, range]:
    """Which axis of x a slice, a narrow or a select is of, and which places."""
    b, dim = call.bound, call.bound["dim"] % x.ndim
    if "index" in b:
        return dim, range(x.shape[dim])[b["index"] % x.shape[dim] :][:1]
    if "length" in b:
        start = int(b["start"]) % max(x.shape[dim], 1)
        return dim, range(start, start + b["length"])
    return dim, range(x.shape[dim])[slice(b["start"], b["end"], b["step"])]


@row(
    "aten::slice", **_view, put=lambda base, value, *at: (aten.slice_scatter.default, (base, value, *at)),
    examples=[
        call("slice.Tensor", T("n m"), 0, 1, 3), call("slice.Tensor", T("l"), 0, 0, 9, 2), call("slice.Tensor", T("p k"), 0, 2, 3),
        call("slice.Tensor", T("n"), -1, 2, 1), call("slice.Tensor", T("l"), 0, 1, -1, 3),
    ],
)  # fmt: skip
@row(
    "aten::narrow", affine=ALL, examples=[call("", T("k p"), 1, 1, 3), call("", T("p"), 0, -2, 2)],
    put=lambda base, value, dim, start, n: (aten.slice_scatter.default, (base, value, dim, start, start + n)),
)  # fmt: skip
@row(
    "aten::select.int", **_view, python="x.", examples=[call("", T("n m"), 1, -1), call("", T("1"), 0, 0)],
    put=lambda base, value, *at: (aten.select_scatter.default, (base, value, *at)),
)  # fmt: skip
def _cut_out(call: OpCall, operand: int) -> list[Term]:
    x = call.operands[0]
    dim, chosen = _span(call, x)
    return [range_of(x.shape, dim, chosen, "index" in call.bound)] if len(chosen) else []


# What cuts a tensor along an axis.
_cuts = {"several": ("cut",)}
row("aten::unbind", kind="view", **_cuts, examples=[call("", T("n m"), 1).of(1)])(None)
row("aten::split", kind="view", **_cuts, examples=[call("split.Tensor", T("p m"), 2).of(1)])(None)
row(
    "aten::split_with_sizes", kind="view", **_cuts, definition=torch.split, examples=[call("", T("n 4"), [1, 3], 1).of(1)],
)(None)  # fmt: skip
row(
    "aten::chunk", "aten::tensor_split", "aten::hsplit", "aten::vsplit", "aten::dsplit", "aten::unsafe_split", "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes", **_cuts,
    examples=[
        call("chunk", T("p m"), 2), call("tensor_split.sections", T("p m"), 2).of(1), call("hsplit.int", T("n 4"), 2), call("vsplit.int", T("4 n"), 2),
        call("dsplit.int", T("n m 4"), 2), call("unsafe_split.Tensor", T("p m"), 2).of(1), call("unsafe_chunk", T("p m"), 2),
        call("unsafe_split_with_sizes", T("n 4"), [1, 3], 1).of(1),
    ],
)(None)  # fmt: skip


def _outside(base: Tensor, dim: int, chosen: range) -> list[Term]:
    """The identity away from a window: minus the window, which stores nothing either."""
    out = fresh_axes(base.shape)
    whole = Term(1.0, (), out, out)
    if not len(chosen):
        return [whole]
    if len(chosen) == base.shape[dim]:
        return []
    inside = Select(Label(len(chosen)), out[dim][0], chosen.start, chosen.step)
    return [whole, Term(-1.0, (inside,), out, out)]


def _cleared(call: OpCall, g: Tensor) -> Tensor:
    """The part of the base, either way: what is written over is 0, whatever stands there."""
    values = call.bound | {"self": g, "src": torch.zeros_like(call.bound["src"])}
    args, kwargs = placed(call.target, values)
    return call.target(*args, **kwargs)


@row(
    "aten::slice_scatter", affine=ALL, adjoint=_cleared,
    examples=[call("", T("5 k"), T("2 k"), 0, 1, 5, 2), call("", T("1"), T("1"), 0), call("", T("n"), T("0"), 0, 1, 1)],
)  # fmt: skip
@row(
    "aten::select_scatter",
    affine=ALL,
    adjoint=_cleared,
    examples=[call("", T("n 4"), T("n"), 1, 2), call("", T("n 1"), T("n"), 1, 0)],
)
def _put_in(call: OpCall, operand: int) -> list[Term]:
    base = call.bound["self"]
    dim, chosen = _span(call, base)
    if call.places[operand][0] == "self":
        return _outside(base, dim, chosen)
    return [*flipped([range_of(base.shape, dim, chosen, "index" in call.bound)])] if len(chosen) else []


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


def _diagonal_of(x: Tensor, count: int, pair: tuple[int, int], offset: int, keep: bool = True) -> list[Term]:
    """The entries on a diagonal, on an axis of their own behind the others, or summed."""
    (along,) = fresh_axes([count])
    inn, relations = _on_diagonal(along, fresh_axes(x.shape), pair, offset)
    rest = [axis for k, axis in enumerate(inn) if k not in pair]
    return [Term(1.0, tuple(relations), (*rest, *[along] * keep), tuple(inn))]


@row("aten::diagonal_copy", "aten::linalg_diagonal", affine=ALL, examples=[call("", T("n n"))])
@row(
    "aten::diagonal", **_view, put=lambda base, value, *at: (aten.diagonal_scatter.default, (base, value, *at)),
    examples=[call("", T("n n")), call("", T("n m"), 1), call("", T("k m n"), -1, 1, 2), call("", T("n m"), 3)],
)  # fmt: skip
def _diagonal(call: OpCall, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    return _diagonal_of(x, call.out.shape[-1], (b["dim1"] % x.ndim, b["dim2"] % x.ndim), b["offset"])


@row("aten::diag_embed", affine=ALL, examples=[call("", T("k n")), call("", T("n"), 1), call("", T("k n"), -2, 0, 2)])
def _diag_embed(call: OpCall, operand: int) -> list[Term]:
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
    "aten::diagonal_scatter", affine=ALL, adjoint=_cleared, lowered=picking.diagonal_scatter,
    examples=[call("", T("n n"), T("n")), call("", T("3 4"), T("2"), 2)],
)  # fmt: skip
def _diagonal_scatter(call: OpCall, operand: int) -> list[Term]:
    """The base away from the diagonal, and the source on it."""
    base, b = call.bound["self"], call.bound
    first, second = b["dim1"] % base.ndim, b["dim2"] % base.ndim
    embedded = _embedded(call.bound["src"], base, b["offset"], first, second)[0]
    if call.places[operand][0] == "src":
        return [embedded]
    out = fresh_axes(base.shape)
    return [Term(1.0, (), out, out), Term(-1.0, embedded.factors, embedded.out, embedded.out)]


@row("aten::diag", affine=ALL, examples=[call("", T("n")), call("", T("n m"), 1), call("", T("n"), -1)])
def _diag(call: OpCall, operand: int) -> list[Term]:
    """A vector on a diagonal, or the diagonal of a matrix."""
    x, offset = call.operands[0], call.bound["diagonal"]
    return _embedded(x, call.out, offset, 0, 1) if x.ndim == 1 else _diagonal_of(x, len(call.out), (0, 1), offset)


row("aten::trace", affine=ALL, examples=[call("", T("n m")), call("", T("n n"))])(
    lambda call, operand: _diagonal_of(call.operands[0], min(call.operands[0].shape), (0, 1), 0, keep=False)
)


@row(
    "aten::flip",
    affine=ALL,
    odd=True,
    lowered=picking.flip,
    examples=[call("", T("n m"), [0, 1]), call("", T("n m"), []), call("", T(""), [-1])],
)
@row("aten::fliplr", "aten::flipud", affine=ALL, examples=[call("", T("n m"))])
def _flip(call: OpCall, operand: int) -> list[Term]:
    """big = n - 1 - small on each flipped axis."""
    x = call.operands[0]
    named = {"aten::fliplr": [1], "aten::flipud": [0]}.get(call.target._schema.name)
    return _flipped(x, [d % max(x.ndim, 1) for d in call.bound["dims"]] if named is None else named)


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
def _rot90(call: OpCall, operand: int) -> list[Term]:
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
    "aten::roll", affine=ALL,
    examples=[call("", T("n m"), [1], [1]), call("", T("p"), [-2], [0]), call("", T("n m"), [2, -1], [0, 1]), call("", T("n m"), [5]), call("", T("n"), [0], [0])],
)  # fmt: skip
def _roll(call: OpCall, operand: int) -> list[Term]:
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

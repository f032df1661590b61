"""Rows of the ops that move numbers and compute none: views, slices, concatenation, gathers, sums of an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.calculus.compose import compose_terms
from dualform.calculus.table import (
    ALL,
    FIRST,
    Call,
    diagonal_terms,
    dims_of,
    index_terms,
    row,
    window_terms,
    without_axis,
)
from dualform.calculus.terms import Axis, Label, Select, Term, atoms, fresh_axes, make_factor


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


row(
    "aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::matrix_H", "aten::mH", "aten::adjoint",
    "aten::movedim", "aten::moveaxis", "aten::swapaxes", "aten::swapdims", "aten::unsqueeze", "aten::squeeze",
    "aten::expand", "aten::expand_as", "aten::broadcast_to", affine=ALL,
)(_moved)  # fmt: skip


@row(
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten", "aten::ravel",
    "aten::reshape_as", "aten::view_as", affine=ALL,
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
    term = compose_terms(unflatten, flatten, call.out)
    return [] if term is None else [term]


def _bounds(start: Any, end: Any, step: int, size: int) -> tuple[int, int]:
    """First index and number of indices of a slice."""
    chosen = range(size)[slice(start, end, step)]
    return chosen.start, len(chosen)


@row("aten::slice", affine=ALL)
def _slice(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    start, count = _bounds(b["start"], b["end"], b["step"], x.shape[dim])
    return window_terms(x.shape, dim, start, b["step"], count, into=False) if count else []


@row("aten::narrow", affine=ALL)
def _narrow(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    return window_terms(x.shape, dim, int(b["start"]) % max(x.shape[dim], 1), 1, b["length"], into=False)


@row("aten::select.int", affine=ALL)
def _select(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    dim = b["dim"] % x.ndim
    return without_axis(window_terms(x.shape, dim, b["index"] % x.shape[dim], 1, 1, into=False), dim, "out")


def _outside(base: Tensor, dim: int, start: int, step: int, count: int) -> list[Term]:
    """The identity away from a window: minus the window, which stores nothing either."""
    out = fresh_axes(base.shape)
    whole = Term(1.0, (), out, out)
    if base.shape[dim] == 1:
        return []
    small = Label(count)
    inside = Select(small, out[dim][0], start, step)
    return [whole, Term(-1.0, (inside,), out, out)]


@row("aten::slice_scatter", affine=ALL)
def _slice_scatter(call: Call, operand: int) -> list[Term]:
    base, b = call.bound["self"], call.bound
    dim = b["dim"] % base.ndim
    start, count = _bounds(b["start"], b["end"], b["step"], base.shape[dim])
    if call.places[operand][0] == "self":
        return _outside(base, dim, start, b["step"], count)
    return window_terms(base.shape, dim, start, b["step"], count, into=True)


@row("aten::select_scatter", affine=ALL)
def _select_scatter(call: Call, operand: int) -> list[Term]:
    base, b = call.bound["self"], call.bound
    dim = b["dim"] % base.ndim
    start = b["index"] % base.shape[dim]
    if call.places[operand][0] == "self":
        return _outside(base, dim, start, 1, 1)
    return without_axis(window_terms(base.shape, dim, start, 1, 1, into=True), dim, "inn")


@row("aten::cat", "aten::concat", "aten::concatenate", affine=ALL)
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


@row("aten::stack", affine=ALL)
def _stack(call: Call, operand: int) -> list[Term]:
    where = call.places[operand][1]
    assert where is not None
    dim = call.bound["dim"] % call.out.ndim
    return without_axis(window_terms(call.out.shape, dim, where, 1, 1, into=True), dim, "inn")


@row("aten::constant_pad_nd", "aten::pad", affine=FIRST)
def _pad(call: Call, operand: int) -> list[Term]:
    if call.bound.get("mode", "constant") != "constant":
        return NotImplemented
    x, pads = call.operands[0], list(call.bound["pad"])
    if any(p < 0 for p in pads):
        return NotImplemented
    inn = list(fresh_axes(x.shape))
    out: list[Axis] = list(fresh_axes(call.out.shape))
    relations = []
    for k, axis in enumerate(inn):
        from_end = x.ndim - 1 - k
        before = pads[2 * from_end] if 2 * from_end < len(pads) else 0
        if call.out.shape[k] == x.shape[k]:
            out[k] = axis
        else:
            relations.append(Select(axis[0] if axis else Label(1), out[k][0], before, 1))
    return [Term(1.0, tuple(relations), tuple(out), tuple(inn))]


@row("aten::repeat", affine=ALL)
def _repeat(call: Call, operand: int) -> list[Term]:
    x, times = call.operands[0], call.bound["repeats"]
    inn = fresh_axes(x.shape)
    padded = ((),) * (len(times) - x.ndim) + inn
    out = tuple(((Label(n),) if n != 1 else ()) + axis for n, axis in zip(times, padded, strict=True))
    return [Term(1.0, (), out, inn)]


@row("aten::diagonal", affine=ALL)
def _diagonal(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    first, second, offset = b["dim1"] % x.ndim, b["dim2"] % x.ndim, b["offset"]
    inn = list(fresh_axes(x.shape))
    n = call.out.shape[-1]
    along = Label(n)
    relations: list[Select] = []
    for axis, start in ((first, max(-offset, 0)), (second, max(offset, 0))):
        if x.shape[axis] == n and n != 1:
            inn[axis] = (along,)
        elif inn[axis]:
            relations.append(Select(along, inn[axis][0], start, 1))
    rest = [axis for k, axis in enumerate(inn) if k not in (first, second)]
    return [Term(1.0, tuple(relations), (*rest, (along,) if n != 1 else ()), tuple(inn))]


@row("aten::diag_embed", affine=ALL)
def _diag_embed(call: Call, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    if b["offset"] != 0:
        return NotImplemented
    inn = fresh_axes(x.shape)
    first, second = b["dim1"] % call.out.ndim, b["dim2"] % call.out.ndim
    rest = iter(inn[:-1])
    out = tuple(inn[-1] if k in (first, second) else next(rest) for k in range(call.out.ndim))
    return [Term(1.0, (), out, inn)]


def _taken(call: Call, dim: int, index: Tensor) -> list[Term]:
    """out[..., i..., ...] = x[..., index[i...], ...]: a stored one-hot relation on that axis."""
    x = call.operands[0]
    inn = fresh_axes(x.shape)
    chosen = fresh_axes(index.shape)
    column = torch.arange(x.shape[dim], device=index.device)
    hit = (torch.remainder(index, x.shape[dim]).unsqueeze(-1) == column).to(x.dtype)
    relation = make_factor(hit, (*chosen, inn[dim]), "[index]")
    return [Term(1.0, (relation,), (*inn[:dim], *chosen, *inn[dim + 1 :]), inn)]


@row("aten::index_select", affine=ALL)
def _index_select(call: Call, operand: int) -> list[Term]:
    return _taken(call, call.bound["dim"] % call.operands[0].ndim, call.bound["index"].reshape(-1))


@row("aten::embedding", affine=FIRST)
def _embedding(call: Call, operand: int) -> list[Term]:
    return _taken(call, 0, call.bound["indices"])


@row("aten::index.Tensor", affine=FIRST)
def _index(call: Call, operand: int) -> list[Term]:
    given = [(k, i) for k, i in enumerate(call.bound["indices"]) if i is not None]
    if len(given) != 1 or given[0][1].dtype == torch.bool:
        return NotImplemented
    return _taken(call, *given[0])


@row("aten::gather", affine=FIRST)
def _gather(call: Call, operand: int) -> list[Term]:
    x, index = call.operands[0], call.bound["index"]
    if x.ndim == 0:
        return [Term(1.0, (), (), ())]
    dim = call.bound["dim"] % x.ndim
    out = fresh_axes(index.shape)
    inn = list(fresh_axes(x.shape))
    relations: list[Any] = []
    for k in range(x.ndim):
        if k == dim:
            continue
        if x.shape[k] == index.shape[k]:
            inn[k] = out[k]
        elif inn[k]:
            relations.append(Select(out[k][0] if out[k] else Label(1), inn[k][0], 0, 1))
    hit = (index.unsqueeze(-1) == torch.arange(x.shape[dim], device=index.device)).to(x.dtype)
    relations.append(make_factor(hit, (*out, inn[dim]), "[index]"))
    return [Term(1.0, tuple(relations), out, tuple(inn))]


@row("aten::scatter.src", affine=ALL)
def _scatter(call: Call, operand: int) -> list[Term]:
    """out[.., index[.., j], ..] = src[.., j, ..]: a stored one-hot relation; self stays where no index points."""
    base, index = call.bound["self"], call.bound["index"]
    dim = call.bound["dim"] % base.ndim if base.ndim else 0
    around = [k for k in range(base.ndim) if k != dim]
    if base.ndim == 0 or index.shape != call.bound["src"].shape or any(index.shape[k] != base.shape[k] for k in around):
        return NotImplemented
    out = fresh_axes(base.shape)
    hit = index.unsqueeze(dim) == torch.arange(base.shape[dim], device=index.device).view(-1, *[1] * (base.ndim - dim))
    if call.places[operand][0] == "self":
        return diagonal_terms(call, operand, (~hit.any(dim + 1)).to(call.out.dtype), "[kept]")
    inn = list(out)
    inn[dim] = fresh_axes((index.shape[dim],))[0]
    relation = make_factor(hit.to(call.out.dtype), (*out[: dim + 1], inn[dim], *out[dim + 1 :]), "[index]")
    return [Term(1.0, (relation,), out, tuple(inn))]


@row("aten::flip", affine=ALL)
def _flip(call: Call, operand: int) -> list[Term]:
    return _permuted_axes(
        call, lambda n: torch.arange(n - 1, -1, -1), dims_of(call.bound["dims"], call.operands[0].ndim)
    )


@row("aten::roll", affine=ALL)
def _roll(call: Call, operand: int) -> list[Term]:
    """A roll is two windows: what stays and what wraps around."""
    x, dims = call.operands[0], call.bound["dims"]
    dims = [0] if x.ndim == 1 and not dims else dims
    if len(dims) != 1:
        return NotImplemented
    dim = dims[0] % x.ndim
    n, shift = x.shape[dim], call.bound["shifts"][0] % max(x.shape[dim], 1)
    if shift == 0:
        axes = fresh_axes(x.shape)
        return [Term(1.0, (), axes, axes)]
    found = []
    for source, target, count in ((0, shift, n - shift), (n - shift, 0, shift)):
        inn = fresh_axes(x.shape)
        moved, along = Label(n), Label(count)
        ties = (Select(along, moved, target, 1), Select(along, inn[dim][0], source, 1))
        found.append(Term(1.0, ties, (*inn[:dim], (moved,), *inn[dim + 1 :]), inn))
    return found


def _permuted_axes(call: Call, order: Callable[[int], Tensor], dims: list[int]) -> list[Term]:
    x = call.operands[0]
    inn, out = fresh_axes(x.shape), list(fresh_axes(x.shape))
    factors = []
    for k in range(x.ndim):
        if k not in dims or not inn[k]:
            out[k] = inn[k]
            continue
        n = x.shape[k]
        hit = (order(n).to(x.device).unsqueeze(1) == torch.arange(n, device=x.device)).to(x.dtype)
        factors.append(make_factor(hit, (out[k], inn[k]), "flip"))
    return [Term(1.0, tuple(factors), tuple(out), inn)]

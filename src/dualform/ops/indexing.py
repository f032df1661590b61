"""Rows of the ops that read or write at stored places: gather, indexing, embedding, scatter, and their kin.

A place is a lookup: the index tensor is kept, its zeros and ones never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.relations import Lookup, window
from dualform.algebra.terms import Axis, Factor, Label, Relation, Select, Term, atoms, fresh_axes, make_factor, volume
from dualform.ops import lookups, picking
from dualform.ops.examples import B, I, T, call
from dualform.ops.table import ALL, FIRST, OpCall, broadcast_axes, defined_row, diagonal_terms, entrywise_reads, row


def lookup(chosen: Sequence[Axis], big: Axis, index: Tensor) -> tuple[Relation, ...]:
    """big = index[chosen]; negative places count from the end; an axis of size 1 has one place."""
    if not big:
        return ()
    size = [n for n in index.shape if n != 1]
    own = atoms(axis for axis, n in zip(chosen, index.shape, strict=True) if n != 1)
    return (Lookup(own, big, torch.remainder(index.reshape(size), volume(big))),)


def _taken(call: OpCall, dim: int, index: Tensor) -> list[Term]:
    """out[..., i..., ...] = x[..., index[i...], ...]."""
    inn = fresh_axes(call.operands[0].shape)
    chosen = fresh_axes(index.shape)
    return [Term(1.0, lookup(chosen, inn[dim], index), (*inn[:dim], *chosen, *inn[dim + 1 :]), inn)]


def _reads_taken(call: OpCall, name: str, k: int | None) -> list[Term]:
    """Where a whole index stands in the result."""
    if name == "self" or name == "weight":
        return NotImplemented
    out, index = fresh_axes(call.out.shape), call.argument(name, k)
    at = call.bound["dim"] % max(call.out.ndim, 1) if "dim" in call.bound else 0
    return [Term(1.0, (), out, out[at : at + index.ndim])]


@row(
    "aten::index_select", affine=ALL, lowered=picking.index_select, reads=_reads_taken,
    examples=[call("", T("n m"), 0, I("k", "n")), call("", T("n m"), -1, I("p", "m"))],
)  # fmt: skip
def _index_select(call: OpCall, operand: int) -> list[Term]:
    x = call.operands[0]
    index = call.bound["index"].reshape(-1)
    return _taken(call, call.bound["dim"] % x.ndim, index) if x.ndim else diagonal_terms(call, operand)


@row(
    "aten::embedding", affine=FIRST, lowered=picking.embedding, mapped=lookups.embedding, reads=_reads_taken,
    examples=[call("", T("n m"), I("b k", "n")), call("", T("n m"), I("p", "n"), 1)],
)  # fmt: skip
def _embedding(call: OpCall, operand: int) -> list[Term]:
    """A padding row is read, and gets no derivative."""
    index, padding = call.bound["indices"], call.bound["padding_idx"]
    (term,) = _taken(call, 0, index)
    if padding < 0:
        return [term]
    kept = make_factor(index != padding, term.out[: index.ndim], "[idx!=padding]")
    return [Term(1.0, (kept, *term.factors), term.out, term.inn)]


def _reads_indexed(call: OpCall, name: str, k: int | None) -> list[Term]:
    """Where one of several indices stands: they are broadcast to each other."""
    given = call.bound["indices"]
    if name == "self" or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in given):
        return NotImplemented
    _, chosen, out, _ = _places(call.bound["self"], list(enumerate(given)))
    return [Term(1.0, (), out, broadcast_axes(chosen, call.argument(name, k).shape))]


row("aten::put", mapped=lookups.put)(None)
row("aten::embedding_dense_backward", mapped="torch")(None)
row("aten::_unsafe_index", affine=FIRST, lowered=picking.index, examples=[call("", T("n m"), [I("k", "n")])])(None)
row(
    "aten::_unsafe_index_put", lowered=picking.index_put, examples=[call("", T("3 m"), [torch.tensor([2, 0])], T("2 m"))],
)(None)  # fmt: skip


@row(
    "aten::index.Tensor", affine=FIRST, reads=_reads_indexed, lowered=picking.index, mapped=lookups.index,
    examples=[
        call("", T("m n"), [None, I("k", "n")]), call("", T("n m"), [I("b k", "n")]), call("", T("n m"), [I("k", "n"), I("k", "m")]),
        call("", T("n k m"), [I("b 1", "n"), None, I("p", "m")]), call("", T("n m k"), [None, I("b 1", "m"), I("p", "k")]),
    ],
)  # fmt: skip
def _index(call: OpCall, operand: int) -> list[Term]:
    x = call.operands[0]
    out, relations, inn = _indexed(x, call.bound["indices"])
    return [Term(1.0, relations, out, inn)]


_Read = tuple[tuple[Axis, ...], tuple[Relation, ...], tuple[Axis, ...]]


def _indexed(x: Tensor, indices: Sequence[Tensor | None]) -> _Read:
    """The axes of x[indices], the lookups, and the axes of x, as torch and numpy index: together, broadcast."""
    given: list[tuple[int, Tensor]] = []
    position = 0
    for index in indices:
        if index is None:
            position += 1
        elif index.dtype in (torch.bool, torch.uint8):
            given += [(position + k, where) for k, where in enumerate(index.nonzero(as_tuple=True))]
            position += index.ndim
        else:
            given.append((position, index))
            position += 1
    inn, chosen, out, given = _places(x, given)
    return out, _joint_lookup(x, given, inn, chosen), inn


def _places(
    x: Tensor, indices: Sequence[tuple[int, Tensor | None]]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...], tuple[Axis, ...], list[tuple[int, Tensor]]]:
    """The axes of x, of the indices broadcast, of x[indices]; the indices with the axes they read."""
    given = [(k, i) for k, i in indices if i is not None]
    inn = fresh_axes(x.shape)
    chosen = fresh_axes(torch.broadcast_shapes(*(i.shape for _, i in given)))
    places = [k for k, _ in given]
    adjacent = places == list(range(places[0], places[0] + len(places)))
    kept = [axis for k, axis in enumerate(inn) if k not in places]
    front = places[0] if adjacent else 0
    return inn, chosen, (*kept[:front], *chosen, *kept[front:]), given


def _joint_lookup(
    x: Tensor, given: list[tuple[int, Tensor]], inn: tuple[Axis, ...], chosen: tuple[Axis, ...]
) -> tuple[Relation, ...]:
    """Indices that share no axis look up apart; others say one place together."""
    own = [{len(chosen) - i.ndim + k for k, n in enumerate(i.shape) if n != 1} for _, i in given]
    if sum(map(len, own)) == len(set().union(*own)):
        return tuple(r for k, i in given for r in lookup(chosen[len(chosen) - i.ndim :] if i.ndim else (), inn[k], i))
    flat: Any = None
    for k, i in given:
        place = torch.remainder(i, x.shape[k])
        flat = place if flat is None else flat * x.shape[k] + place
    return lookup(chosen, tuple(label for k, _ in given for label in inn[k]), flat)


def _reads_each(call: OpCall, name: str, k: int | None) -> list[Term]:
    """An index of its own for each entry of the result."""
    is_flat = call.bound.get("dim", 0) is None
    return NotImplemented if name == "self" or is_flat else entrywise_reads(call, name, k)


@row(
    "aten::gather", affine=FIRST, lowered=picking.gather, reads=_reads_each,
    examples=[call("", T("n m"), 1, I("n k", "m")), call("", T("n m"), 0, I("p 2", "n")), call("", T(""), 0, I("", "1"))],
)  # fmt: skip
def _gather(call: OpCall, operand: int) -> list[Term]:
    x, index = call.operands[0], call.bound["index"]
    if x.ndim == 0:
        return diagonal_terms(call, operand)
    out, relations, inn = _gathered(x.shape, call.bound["dim"] % x.ndim, index)
    return [Term(1.0, relations, out, inn)]


def _gathered(shape: Sequence[int], dim: int, index: Tensor) -> _Read:
    """Axes of the index, how they look up, and axes of the tensor that is read; other axes are cut to the index."""
    out, inn = fresh_axes(index.shape), list(fresh_axes(shape))
    relations: list[Relation] = []
    for k, n in enumerate(shape):
        if k == dim:
            relations += lookup(out, inn[k], index)
        elif n == index.shape[k]:
            inn[k] = out[k]
        else:
            relations += window([out[k]], inn[k], 0, [1])
    return out, tuple(relations), tuple(inn)


@row(
    "aten::take_along_dim", affine=FIRST, reads=_reads_each,
    examples=[call("", T("n m"), I("1 k", "m"), 1), call("", T("n m", "flat"), I("k", "12"))],
)  # fmt: skip
def _take_along_dim(call: OpCall, operand: int) -> list[Term]:
    """A gather whose other axes are broadcast; without dim, of the flat tensor."""
    x, index, dim = call.operands[0], call.bound["indices"], call.bound["dim"]
    if dim is None:
        return _flat_taken(x, index.reshape(-1))
    dim %= x.ndim
    out, inn = list(fresh_axes(call.out.shape)), list(fresh_axes(x.shape))
    for k in range(x.ndim):
        if k != dim and inn[k]:
            inn[k] = out[k]
    own = tuple(() if index.shape[k] == 1 else axis for k, axis in enumerate(out))
    return [Term(1.0, lookup(own, inn[dim], index), tuple(out), tuple(inn))]


@row("aten::take", affine=FIRST, reads=_reads_each, mapped=lookups.take, examples=[call("", T("n m"), I("k p", "12"))])
def _take(call: OpCall, operand: int) -> list[Term]:
    return _flat_taken(call.operands[0], call.bound["index"])


def _flat_taken(x: Tensor, index: Tensor) -> list[Term]:
    inn, out = fresh_axes(x.shape), fresh_axes(index.shape)
    return [Term(1.0, lookup(out, atoms(inn), index), out, inn)]


@row(
    "aten::repeat_interleave.self_Tensor", affine=ALL, examples=[call("", T("2 m"), torch.tensor([1, 2]), 0, output_size=3)],
)  # fmt: skip
def _repeat_interleave(call: OpCall, operand: int) -> list[Term]:
    x, times, dim = call.operands[0], call.bound["repeats"], call.bound["dim"]
    n = x.numel() if dim is None else x.shape[dim]
    count = call.out.numel() if dim is None else call.out.shape[dim]
    index = torch.arange(n, device=x.device).repeat_interleave(times.expand(n), output_size=count)
    return _flat_taken(x, index) if dim is None else _taken(call, dim % x.ndim, index)


# Writes: what is written over keeps no derivative; what is written has the transpose of a read
def _kept(covered: Tensor, axes: tuple[Axis, ...]) -> list[Term]:
    """The identity where nothing was written; `covered` is 1 where something was, and may have axes of size 1."""
    return [Term(1.0, (make_factor(covered == 0, broadcast_axes(axes, covered.shape), "[kept]"),), axes, axes)]


def _reads_written(call: OpCall, name: str, k: int | None) -> list[Term]:
    """An entry looks at the indices of its line, to see whether it is written."""
    if name != "index":
        return NotImplemented
    index, base = call.argument(name, k), call.bound["self"]
    out = fresh_axes(base.shape)
    if not base.ndim:
        return [Term(1.0, (), (), ((),) * index.ndim)]
    dim = call.bound["dim"] % base.ndim
    if index.ndim < base.ndim:  # one index for whole slices
        return [Term(1.0, (Select(Label(1), out[dim][0], 0),), out, fresh_axes(index.shape))] if out[dim] else []
    inn, relations = list(fresh_axes(index.shape)), []
    for n, axis in enumerate(out):
        if n != dim and index.shape[n] == base.shape[n]:
            inn[n] = axis
        elif n != dim:
            relations += window([inn[n]], axis, 0, [1])
    return [Term(1.0, tuple(relations), out, tuple(inn))]


_writes = {"affine": ALL, "reads": _reads_written}


@row(
    "aten::scatter_add", **_writes, lowered=partial(picking.scatter, add=True),
    examples=[call("", T("n m"), 1, I("n k", "m"), T("n k"))],
)  # fmt: skip
@row(
    "aten::scatter.src", "aten::scatter.value", **_writes, lowered=picking.scatter,
    examples=[call("scatter.src", T("n 4"), 1, torch.tensor([[0, 2], [3, 1]]), T("2 k")), call("scatter.value", T("n m"), 0, I("k 2", "n"), 2.0)],
)  # fmt: skip
def _scatter(call: OpCall, operand: int) -> list[Term]:
    base, index, adds = call.bound["self"], call.bound["index"], call.target._schema.name == "aten::scatter_add"
    if base.ndim == 0:
        return diagonal_terms(call, operand) if adds or call.places[operand][0] == "src" else []
    dim = call.bound["dim"] % base.ndim
    if call.places[operand][0] == "self":
        if adds:
            return diagonal_terms(call, operand)
        return _kept(torch.zeros_like(base).scatter(dim, index, 1.0), fresh_axes(base.shape))
    src = call.bound["src"]
    read, relations, inn = _gathered(base.shape, dim, index)
    axes = list(read)
    more: list[Relation] = []
    for k, n in enumerate(src.shape):
        if n != index.shape[k]:
            axes[k] = fresh_axes([n])[0]
            more += window([read[k]], axes[k], 0, [1])
    return [Term(1.0, (*relations, *more), inn, tuple(axes))]


@row("aten::index_copy", **_writes, mapped="torch", examples=[call("", T("3 m"), 0, torch.tensor([2, 0]), T("2 m"))])
@row(
    "aten::index_add", **_writes, mapped="torch", lowered=picking.index_add,
    examples=[call("", T("n m"), 0, I("k", "n"), T("k m"), alpha=2), call("", T("n m"), 1, I("p", "m"), T("n p"))],
)  # fmt: skip
def _index_add(call: OpCall, operand: int) -> list[Term]:
    base, index, adds = call.bound["self"], call.bound["index"].reshape(-1), "alpha" in call.bound
    dim = call.bound["dim"] % max(base.ndim, 1)
    out = fresh_axes(base.shape)
    if call.places[operand][0] == "self":
        return [Term(1.0, (), out, out)] if adds else _kept(_covered(base, dim, index), out)
    coef = float(call.bound.get("alpha", 1))
    if base.ndim == 0:
        return [Term(coef, (), (), ((),) * call.operands[operand].ndim)]
    chosen = fresh_axes(index.shape)
    return [Term(coef, lookup(chosen, out[dim], index), out, (*out[:dim], *chosen, *out[dim + 1 :]))]


def _covered(base: Tensor, dim: int, index: Tensor) -> Tensor:
    """1 in the slices of `dim` that an index names; of size 1 along the other axes."""
    if base.ndim == 0:
        return torch.ones_like(base)
    along = torch.zeros(base.shape[dim], dtype=base.dtype, device=base.device).index_fill(0, index, 1.0)
    return along.reshape([-1 if k == dim else 1 for k in range(base.ndim)])


@row(
    "aten::index_fill", **_writes, mapped=lookups.index_fill,
    examples=[call("index_fill.int_Scalar", T("n m"), 0, I("k", "n"), 2.0), call("index_fill.int_Tensor", T("n m"), 1, I("k", "m"), T(""))],
)  # fmt: skip
def _index_fill(call: OpCall, operand: int) -> list[Term]:
    base, out = call.bound["self"], fresh_axes(call.out.shape)
    covered = _covered(base, call.bound["dim"] % max(base.ndim, 1), call.bound["index"].reshape(-1))
    if call.places[operand][0] == "self":
        return _kept(covered, out)
    return [Term(1.0, (make_factor(covered, broadcast_axes(out, covered.shape), "[filled]"),), out, ())]


def _reads_put(call: OpCall, name: str, k: int | None) -> list[Term]:
    """A mask of the whole, entry by entry; the places of a value are known by its own derivative."""
    if name != "indices":
        return NotImplemented
    index, base = call.argument(name, k), call.bound["self"]
    if index.dtype == torch.bool and index.shape == base.shape and call.bound["values"].numel() == 1:
        return entrywise_reads(call, name, k)
    return NotImplemented


@row(
    "aten::index_put", affine=ALL, reads=_reads_put, lowered=picking.index_put, mapped=lookups.index_put,
    examples=[
        call("", T("3 m"), [torch.tensor([2, 0])], T("2 m")), call("", T("n m"), [I("k", "n"), I("k", "m")], T("k"), True),
        call("", T("n m"), [None, I("k", "m")], T("1"), True), call("", T("n m"), [B("n m")], T("")),
        call("", T("n m"), [None, I("k", "m")], T("n k")),
    ],
)  # fmt: skip
def _index_put(call: OpCall, operand: int) -> list[Term]:
    base, indices, adds = call.bound["self"], call.bound["indices"], call.bound["accumulate"]
    masks = [i for i in indices if i is not None and i.dtype == torch.bool]
    if len(masks) == 1 and masks[0].shape == base.shape and call.bound["values"].numel() == 1:
        return _masked_put(call, operand, masks[0], adds)
    chosen, relations, whole = _indexed(base, indices)
    if call.places[operand][0] == "values":
        shape = call.operands[operand].shape
        shown = chosen[len(chosen) - len(shape) :] if shape else ()
        inn = tuple(() if n == 1 else axis for n, axis in zip(shape, shown, strict=True))
        # A value that is broadcast over places on an axis of size 1, which no relation speaks of, is written so often.
        spoken = {*atoms(whole), *atoms(inn), *(x for r in relations for x in r.labels)}
        times = volume(x for x in atoms(chosen) if x not in spoken)
        return [Term(float(times), relations, whole, inn)]
    if adds:
        return [Term(1.0, (), whole, whole)]
    ones = torch.ones((), dtype=base.dtype, device=base.device)
    return _kept(torch.ops.aten.index_put.default(torch.zeros_like(base), indices, ones), whole)


def _masked_put(call: OpCall, operand: int, mask: Tensor, adds: bool) -> list[Term]:
    """x[mask] = value: no place depends on the mask's values."""
    out = fresh_axes(mask.shape)
    if call.places[operand][0] == "values":
        inn: tuple[Axis, ...] = ((),) * call.operands[operand].ndim
        return [Term(1.0, (make_factor(mask, out, "[mask]"),), out, inn)]
    kept: tuple[Factor, ...] = () if adds else (make_factor(~mask, out, "[kept]"),)
    return [Term(1.0, kept, out, out)]


@defined_row(
    "aten::masked_scatter", call("", T("n m"), B("n m"), T("n m", "flat")), call("", T("n m"), B("m"), T("n m", "flat"))
)
def _masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The k-th true place takes the k-th number of the source."""
    mask, x = torch.broadcast_tensors(mask, self)
    order = (mask.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(0)
    return torch.where(mask, source.reshape(-1)[order.reshape(mask.shape)], x)


@defined_row(
    "aten::scatter_reduce", *(call("scatter_reduce.two", T("k m"), 0, I("n m", "k"), T("n m"), r, include_self=s) for r in ("sum", "mean", "prod", "amax", "amin") for s in (True, False))
)  # fmt: skip
def _scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Sums and averages of what lands on a place; for products and extremes, all that may land there."""
    if reduce in ("prod", "amax", "amin"):
        return _landed(self, dim, index, src, reduce, include_self)
    own = self if include_self else self.scatter(dim, index, 0.0)
    total = own.scatter_add(dim, index, src)
    if reduce == "sum":
        return total
    one = torch.ones_like(self) if include_self else torch.ones_like(self).scatter(dim, index, 0.0)
    return total / one.scatter_add(dim, index, torch.ones_like(src)).clamp(min=1)


def _landed(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """(..., n) numbers land on (..., m): a table (..., n + 1, m) of what each brings, and its own."""
    dim %= self.ndim
    if any(a != b for k, (a, b) in enumerate(zip(index.shape, self.shape, strict=True)) if k != dim):
        raise NotImplementedError(f"{reduce} on a part of the places")
    none = {"prod": 1.0, "amax": -torch.inf, "amin": torch.inf}[reduce]
    for k, size in enumerate(index.shape):
        src = src.narrow(k, 0, size)
    places = torch.arange(self.shape[dim], device=index.device)
    hits = index.movedim(dim, -1)[..., None] == places
    brought = torch.where(hits, src.movedim(dim, -1)[..., None], none)
    own = self.movedim(dim, -1)
    own = own if include_self else torch.where(hits.any(-2), none, own)
    table = torch.cat([brought, own[..., None, :]], -2)
    return (table.prod(-2) if reduce == "prod" else getattr(table, reduce)(-2)).movedim(-1, dim)


@defined_row(
    "aten::index_reduce", *(call("", T("k m"), 0, I("n", "k"), T("n m"), r, include_self=s) for r in ("mean", "prod", "amax", "amin") for s in (True, False))
)  # fmt: skip
def _index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    shape = [-1 if k == dim % self.ndim else 1 for k in range(self.ndim)]
    places = index.to(torch.int64).reshape(shape).expand_as(source)
    return self.scatter_reduce(dim, places, source, reduce, include_self=include_self)


@defined_row(
    "aten::_embedding_bag", call("", T("n m"), I("p", "n"), torch.tensor([0, 2, 2])),
    call("", T("n m"), I("p", "n"), torch.tensor([0, 3]), False, 1),
)  # fmt: skip
@defined_row(
    "aten::_embedding_bag_forward_only", call("", T("n m"), I("p", "n"), torch.tensor([0, 2, 2]), False, 0, False, T("p")),
)  # fmt: skip
def bags(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor]:  # fmt: skip
    """Rows of the weight, summed (mode 0), averaged (1), or the largest (2) of the bag that their place lies in."""
    starts = offsets[:-1] if include_last_offset else offsets
    bag = (torch.arange(indices.shape[0], device=indices.device)[:, None] >= starts).sum(1) - 1
    counted = (indices != padding_idx).to(weight.dtype)
    scale = counted if per_sample_weights is None else counted * per_sample_weights
    none = weight.new_zeros(starts.shape[0], weight.shape[1])
    if mode == 2:
        where = torch.where(indices != padding_idx, bag, starts.shape[0])[:, None].expand(-1, weight.shape[1])
        kept = torch.cat([none, none[:1]]).scatter_reduce(0, where, weight[indices], "amax", include_self=False)
        return (kept[:-1],)
    total = none.index_add(0, bag, weight[indices] * scale[:, None])
    if mode == 0:
        return (total,)
    return (total / weight.new_zeros(starts.shape[0]).index_add(0, bag, counted).clamp(min=1)[:, None],)

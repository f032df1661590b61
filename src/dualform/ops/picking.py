"""What picks, puts and orders entries, spelt in ops that have a row: sums over all entries of an axis, a few dozen.

`where`, not times 0, so that a NaN stays where it is.

Legend: taken[..., i, j] says whether the result's entry i is the operand's j, along one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def _picked(x: Tensor, dim: int, taken: Tensor) -> Tensor:
    """out[..., i, ...] = sum over j with taken[i, j] of x[..., j, ...]."""
    rows = torch.where(taken, x.movedim(dim, -1).unsqueeze(-2), 0).sum(-1)
    return rows.movedim(-1, dim)


def _put(x: Tensor, dim: int, taken: Tensor, source: Tensor) -> Tensor:
    """Write source's entry j over x's i where taken[..., i, j], the last of several."""
    j = torch.arange(taken.shape[-1], device=x.device)
    last = torch.where(taken, j, -1).amax(-1, keepdim=True)
    shape = [*[1] * (x.ndim - last.ndim + 1), *last.shape[:-1]]
    hit = (last >= 0).reshape(shape).movedim(-1, dim)
    return torch.where(hit, _picked(source, dim, j == last), x)


def _places(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _counted(index: Tensor, n: int) -> Tensor:
    """Count from the front what is counted from the end."""
    return torch.where(index < 0, index + n, index)


def _at(index: Tensor, n: int) -> Tensor:
    """taken[..., i, j]: is j the index at i?"""
    return _counted(index, n).unsqueeze(-1) == _places(n, index)


def flip(x: Tensor, dims: Any) -> Tensor:
    for dim in dims:
        place = _places(x.shape[dim], x)
        x = _picked(x, dim, place[:, None] + place == x.shape[dim] - 1)
    return x


class Indexed:
    """An index over some axes of a tensor, as one over their entries in order, its rows; counted: from the front."""

    def __init__(self, shape: Sequence[int], indices: Any, counted: Callable[[Tensor, int], Tensor] = _counted) -> None:
        self.axes = [k for k, i in enumerate(indices) if i is not None]
        self.lead = list(range(len(self.axes)))
        flat: Any = 0
        for k in self.axes:
            flat = flat * shape[k] + counted(indices[k], shape[k])
        self.flat: Tensor = flat
        together = self.axes == list(range(self.axes[0], self.axes[-1] + 1))
        first = self.axes[0] if together else 0  # where the result has the index's axes
        self.own, self.there = list(range(flat.ndim)), list(range(first, first + flat.ndim))

    def rows(self, x: Tensor) -> Tensor:
        return x.movedim(self.axes, self.lead).flatten(0, len(self.axes) - 1)

    def result(self, picked: Tensor) -> Tensor:
        """The rows that were asked for, as the index and its place among the axes have them."""
        return picked.reshape(*self.flat.shape, *picked.shape[1:]).movedim(self.own, self.there)

    def given(self, values: Tensor, rows: Tensor) -> Tensor:
        """What is written, a row for each that is asked for."""
        lead = self.there[0] if self.there else 0
        wanted = (*rows.shape[1 : 1 + lead], *self.flat.shape, *rows.shape[1 + lead :])
        return values.expand(wanted).movedim(self.there, self.own).reshape(-1, *rows.shape[1:])

    def whole(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        sizes = [shape[k] for k in self.axes]
        return rows.reshape(*sizes, *rows.shape[1:]).movedim(self.lead, self.axes)


def can_index(indices: Any) -> bool:
    return all(i is None or i.dtype in (torch.long, torch.int32) for i in indices)


def index(x: Tensor, indices: Any) -> Any:
    """x[indices]."""
    if not can_index(indices):
        return NotImplemented
    at = Indexed(x.shape, indices)
    rows = at.rows(x)
    return at.result(_picked(rows, 0, _at(at.flat.reshape(-1), len(rows))))


def index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if not can_index(indices):
        return NotImplemented
    at = Indexed(x.shape, indices)
    rows = at.rows(x)
    given, taken = at.given(values, rows), _at(at.flat.reshape(-1), len(rows)).T
    return at.whole(rows + _picked(given, 0, taken) if accumulate else _put(rows, 0, taken, given), x.shape)


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return _picked(x, dim, _at(index, x.shape[dim])) if x.ndim else x


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    return x + alpha * _picked(source, dim, _at(index, x.shape[dim]).T)


def embedding(weight: Tensor, indices: Tensor, *rest: Any) -> Any:
    return index(weight, [indices])


def _fitted(x: Tensor, dim: int, sizes: Sequence[int], fill: float = 0) -> Tensor:
    """Cut or fill up all axes but one."""
    for k, n in enumerate(sizes):
        if k != dim and n < x.shape[k]:
            x = x.narrow(k, 0, n)
        elif k != dim and n > x.shape[k]:
            x = pad(x, [0, 0] * (x.ndim - 1 - k) + [0, n - x.shape[k]], value=fill)
    return x


def gather(x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    if not x.ndim:
        return x.expand(index.shape)
    dim = dim % x.ndim
    return _picked(_fitted(x, dim, index.shape), dim, _at(index.movedim(dim, -1), x.shape[dim]))


def _spread(x: Tensor, dim: int, index: Tensor, source: Any) -> tuple[Tensor, Tensor]:
    """Return taken and the source, both as wide as x along the other axes; what fills them up goes nowhere."""
    given = source if isinstance(source, Tensor) else torch.full_like(index, source, dtype=x.dtype)
    given = _fitted(given, dim, index.shape).narrow(dim, 0, index.shape[dim])
    index = _fitted(_counted(index, x.shape[dim]), dim, x.shape, -1).movedim(dim, -1)
    return index.unsqueeze(-2) == _places(x.shape[dim], x)[:, None], _fitted(given, dim, x.shape)


def scatter(x: Tensor, dim: int, index: Tensor, source: Any, add: bool = False) -> Tensor:
    dim = dim % max(x.ndim, 1)
    taken, given = _spread(x, dim, index, source)
    return x + _picked(given, dim, taken) if add else _put(x, dim, taken, given)


def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    whole = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = (_places(n, x) for n in whole.shape[-2:])
    along = -1 if offset >= 0 else -2  # the rows or the columns count as the source does
    wide = pad(source, (0, whole.shape[-2 if offset >= 0 else -1] - source.shape[-1]))
    on = columns - rows[:, None] == offset
    return torch.where(on, wide.unsqueeze(along), whole).movedim((-2, -1), (dim1, dim2))


def running(over: Callable[..., Tensor], fill: float) -> Callable[..., Tensor]:
    """Take in, for each entry i of an axis, the entries j <= i, and `fill` for the rest."""

    def run(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
        if not x.ndim:
            return x
        place = _places(x.shape[dim], x)
        return over(torch.where(place[:, None] >= place, x.movedim(dim, -1).unsqueeze(-2), fill), -1).movedim(-1, dim)

    return run


def sort(x: Tensor, dim: int = -1, descending: bool = False, stable: Any = None) -> tuple[Tensor, Tensor]:
    """Each entry to the place that is the number of those before it; equal ones stay in order, a NaN is the largest."""
    if not x.ndim:
        return x, torch.zeros_like(x, dtype=torch.long)
    rows = x.movedim(dim, -1)
    a, b, place = rows.unsqueeze(-1), rows.unsqueeze(-2), _places(rows.shape[-1], x)
    less, more = ((p < q) | ((p == p) & (q != q)) for p, q in ((b, a), (a, b)))
    before = torch.where(more if descending else less, True, ~less & ~more & (place < place[:, None]))
    taken = before.to(torch.long).sum(-1).unsqueeze(-2) == place[:, None]
    return _picked(rows, -1, taken).movedim(-1, dim), torch.where(taken, place, 0).sum(-1).movedim(-1, dim)


def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, places = sort(x, dim, largest)
    return (values.narrow(dim, 0, k), places.narrow(dim, 0, k)) if x.ndim else (values, places)


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if not x.ndim:
        return sort(x)
    values, places = (y.narrow(dim, k - 1, 1) for y in sort(x, dim))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two in the middle; a NaN, if there is one."""
    if not x.ndim:
        return sort(x)
    middle, last = (kthvalue(x, k, dim, keepdim) for k in ((x.shape[dim] + 1) // 2, x.shape[dim]))
    broken = last[0] != last[0]
    return torch.where(broken, *(y[0] for y in (last, middle))), torch.where(broken, *(y[1] for y in (last, middle)))


def _extreme(most: Callable[..., Tensor], fill: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The most so far, and the last place of it; a NaN is it from there on."""
        if not x.ndim:
            return sort(x)
        rows, place = x.movedim(dim, -1), _places(x.shape[dim], x)
        seen = place[:, None] >= place
        values = most(torch.where(seen, rows.unsqueeze(-2), fill), -1)
        hit = (rows.unsqueeze(-2) == values.unsqueeze(-1)) | (rows != rows).unsqueeze(-2)
        places = torch.where(seen & hit, place, -1).amax(-1)
        return values.movedim(-1, dim), places.movedim(-1, dim)

    return run


cummax, cummin = _extreme(torch.amax, -math.inf), _extreme(torch.amin, math.inf)


def searchsorted(
    bounds: Tensor, x: Tensor, out_int32: bool = False, right: bool = False, side: Any = None, sorter: Any = None
) -> Any:
    """Count the bounds before each entry, in its own line if there are several; all are before a NaN."""
    if sorter is not None:
        return NotImplemented
    a, b = bounds if bounds.ndim == 1 else bounds.unsqueeze(-2), x.unsqueeze(-1)
    after = a > b if right or side == "right" else a >= b
    count = (~after).to(torch.long).sum(-1)
    return count.to(torch.int32) if out_int32 else count


def bucketize(x: Tensor, bounds: Tensor, out_int32: bool = False, right: bool = False) -> Any:
    return searchsorted(bounds, x, out_int32, right)


def first(most: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def index(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """The first of the largest, or smallest; a NaN is either."""
        rows = x.reshape(-1) if dim is None or not x.ndim else x.movedim(dim, -1)
        place = _places(rows.shape[-1], x)
        found = torch.where((rows == most(rows, -1, keepdim=True)) | (rows != rows), place, len(place)).amin(-1)
        if not keepdim:
            return found
        return found.reshape([1] * x.ndim) if dim is None or not x.ndim else found.unsqueeze(dim)

    return index

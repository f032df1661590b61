"""The relations between indices that a derivative knows by a rule instead of storing zeros and ones.

    Window    flat(bigs) = start + sum_k steps[k] smalls[k]      convolution, pooling, unfold, reshapes that do not nest
    Lookup    flat(bigs) = index[smalls...]                      gather, embedding, sort, max-pooling
    Triangle  flat(rows) >= flat(cols) + offset                  cumsum, tril, triu, causal masks

`flat` is the row-major position in a tuple of labels. A window may reach outside: there it relates to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualform.algebra.terms import (
    Axis,
    Factor,
    IndexFunction,
    Label,
    Relation,
    Select,
    Window,
    diagonal,
    make_factor,
    read_from,
    sizes,
    volume,
)


@dataclass(frozen=True, eq=False)
class Lookup(IndexFunction):
    """flat(bigs) = index[smalls...]; every entry of `index` is a place in bigs."""

    smalls: Axis
    bigs: Axis
    index: Tensor
    name: str = "idx"

    @property
    def key(self) -> tuple:
        return ("lookup", id(self.index), len(self.bigs))

    def renamed(self, final: Callable[[Label], Axis]) -> Lookup:
        moved = make_factor(self.index, [final(x) for x in self.smalls])
        bigs = tuple(x for b in self.bigs for x in final(b))
        return replace(self, smalls=moved.labels, bigs=bigs, index=moved.tensor)

    def values(self, device: torch.device) -> Tensor:
        return self.index


# A relation that is a function from `smalls` to a place in `bigs`.
Reading = Select | Window | Lookup


@dataclass(frozen=True, eq=False)
class Triangle(Relation):
    """1 where flat(rows) >= flat(cols) + offset, else 0."""

    rows: Axis
    cols: Axis
    offset: int = 0

    @property
    def labels(self) -> Axis:
        return (*self.rows, *self.cols)

    @property
    def key(self) -> tuple:
        return ("triangle", self.offset, len(self.rows))

    def renamed(self, final: Callable[[Label], Axis]) -> Triangle:
        rows, cols = (tuple(x for y in side for x in final(y)) for side in (self.rows, self.cols))
        return Triangle(rows, cols, self.offset)

    def dense(self, like: Tensor) -> Factor:
        rows, cols = (torch.arange(volume(side), device=like.device) for side in (self.rows, self.cols))
        return make_factor(rows[:, None] >= cols + self.offset, (self.rows, self.cols), "[>=]")


def window(smalls: Sequence[Axis], big: Axis, start: int, steps: Sequence[int]) -> tuple[Relation, ...]:
    """The plainest relation big = start + sum steps[k] smalls[k] between axes; () if it always holds."""
    kept = [(axis[0], step) for axis, step in zip(smalls, steps, strict=True) if axis]
    made = Window(tuple(x for x, _ in kept), big, start, tuple(step for _, step in kept))
    if not kept and not big and start == 0:
        return ()
    if len(kept) < 2 and len(big) == 1 and made.is_total:
        small, step = kept[0] if kept else (Label(1), 1)
        return (Select(small, big[0], start, step),)
    return (made,)


def as_window(select: Select) -> Window:
    """The same relation in the form whose labels can be split."""
    return Window((select.small,), (select.big,), select.start, (select.step,))


def restricted(relation: Relation, s: Select) -> Relation | None:
    """The relation where one of its indices is s.start + s.step * s.small; None if it has no such form."""
    if isinstance(relation, Window) and s.big in relation.smalls and s.small not in relation.smalls:
        k = relation.smalls.index(s.big)
        smalls, steps = list(relation.smalls), list(relation.steps)
        start = relation.start + steps[k] * s.start
        smalls[k], steps[k] = s.small, steps[k] * s.step
        return Window(tuple(smalls), relation.bigs, start, tuple(steps))
    if isinstance(relation, Window) and relation.bigs == (s.big,) and s.step == 1:
        return replace(relation, bigs=(s.small,), start=relation.start - s.start)
    if isinstance(relation, Lookup) and s.big in relation.smalls and s.small not in relation.smalls:
        k = relation.smalls.index(s.big)
        index = relation.index.index_select(k, s.values(relation.index.device))
        smalls = (*relation.smalls[:k], s.small, *relation.smalls[k + 1 :])
        return replace(relation, smalls=smalls, index=index)
    if isinstance(relation, Triangle) and s.step == 1:
        if relation.rows == (s.big,):
            return replace(relation, rows=(s.small,), offset=relation.offset - s.start)
        if relation.cols == (s.big,):
            return replace(relation, cols=(s.small,), offset=relation.offset + s.start)
    return None


def plainer(relation: Relation) -> Select | None:
    """The Select that says the same, if there is one."""
    if not isinstance(relation, Window) or not len(relation.smalls) == len(relation.bigs) == 1:
        return None
    if not relation.is_total or relation.smalls == relation.bigs or relation.steps[0] == 0:
        return None
    return Select(relation.smalls[0], relation.bigs[0], relation.start, relation.steps[0])


def chained(outer: Window | Lookup, inner: Window | Lookup) -> Relation | None:
    """One relation for two, where the place of `inner` is an index that says the place of `outer`, and nothing else."""
    if not set(inner.bigs) <= set(outer.smalls) or set(inner.smalls) & set(outer.labels):
        return None
    if isinstance(outer, Window) and isinstance(inner, Window) and len(inner.bigs) == 1:
        k = outer.smalls.index(inner.bigs[0])
        kept = [(x, n) for x, n in zip(outer.smalls, outer.steps, strict=True) if x is not inner.bigs[0]]
        kept += [(x, n * outer.steps[k]) for x, n in zip(inner.smalls, inner.steps, strict=True)]
        start = outer.start + outer.steps[k] * inner.start
        return Window(tuple(x for x, _ in kept), outer.bigs, start, tuple(n for _, n in kept))
    if isinstance(outer, Window) and not outer.is_total:
        return None
    index = next((r.index for r in (outer, inner) if isinstance(r, Lookup)), None)
    if index is None:
        return None
    place = read(inner, Factor(outer.values(index.device), outer.smalls))
    return Lookup(place.labels, outer.bigs, place.tensor)


# Applied: an index that a relation reads is taken out of a tensor, or put back into one
def narrowed(tensor: Tensor, axis: int, s: Select) -> Tensor:
    """The entries start, start + step, ... of an axis; a view unless the step is negative."""
    first, last = s.start, s.start + s.step * (s.small.size - 1)
    window = (slice(None),) * axis + (slice(min(first, last), max(first, last) + 1, abs(s.step)),)
    taken = tensor[window]
    return taken.flip(axis) if s.step < 0 else taken


def read(relation: Reading, f: Factor) -> Factor:
    """Replace the labels `bigs` of a factor by `smalls`: f[..., smalls, ...] = f[..., flat place, ...]."""
    if not any(x in f.labels for x in relation.bigs):
        return f
    if isinstance(relation, Select):
        axis = f.labels.index(relation.big)
        labels = tuple(relation.small if x is relation.big else x for x in f.labels)
        return diagonal(read_from(f, narrowed(f.tensor, axis, relation), labels, relation))
    if isinstance(relation, Window) and len(relation.bigs) == 1 and _slides(relation, f):
        return _unfolded(relation, f)
    own = [x for x in f.labels if x in relation.bigs or x in relation.smalls]
    rest = [x for x in f.labels if x not in own]
    tensor = f.tensor.permute([f.labels.index(x) for x in (*own, *rest)])
    places = _places(relation, own, tensor.device)
    if len(own) == 1:
        taken = tensor.index_select(0, places[0].reshape(-1))
        taken = taken.reshape(sizes((*relation.smalls, *rest)))
    else:
        taken = tensor[tuple(places)]
    return read_from(f, taken, (*relation.smalls, *rest), relation)


def _places(relation: Reading, own: Sequence[Label], device: torch.device) -> list[Tensor]:
    """An index tensor over `smalls` for each label: the digit of the place for a big one, itself for a small one."""
    place = relation.values(device)
    if isinstance(relation, Window) and not relation.is_total:
        place = place.clamp(0, volume(relation.bigs) - 1)
    found = []
    for x in own:
        if x in relation.bigs:
            k = relation.bigs.index(x)
            below = volume(relation.bigs[k + 1 :])
            found.append(place if len(relation.bigs) == 1 else torch.div(place, below, rounding_mode="floor") % x.size)
        else:
            after = len(relation.smalls) - relation.smalls.index(x) - 1
            found.append(torch.arange(x.size, device=device).reshape([-1] + [1] * after).expand(place.shape))
    return found


def is_padded(relation: Window, f: Factor) -> bool:
    """Does reading this factor give zeros outside? Else they have to be multiplied in."""
    return len(relation.bigs) == 1 and relation.bigs[0] in f.labels and _slides(relation, f)


def _slides(relation: Window, f: Factor) -> bool:
    """Is it the window of a convolution: one or two positive steps, over an axis that shares no index with it?"""
    plain = 1 <= len(relation.smalls) <= 2 and all(step > 0 for step in relation.steps)
    return plain and not any(x in f.labels for x in relation.smalls)


def _unfolded(relation: Window, f: Factor) -> Factor:
    """Read by padding and sliding views instead of by an index."""
    (big,) = relation.bigs
    axis = f.labels.index(big)
    least, most = relation.reach
    tensor = f.tensor
    if least < 0 or most >= big.size:
        pads = [0, 0] * (tensor.ndim - axis - 1) + [max(-least, 0), max(most + 1 - big.size, 0)]
        tensor = torch.nn.functional.pad(tensor, pads)
    tensor = tensor.narrow(axis, max(least, 0), most - least + 1)
    outer, *inner = zip(relation.smalls, relation.steps, strict=True)
    labels = list(f.labels)
    labels[axis] = outer[0]
    if inner:
        ((small, step),) = inner
        tensor = tensor.unfold(axis, step * (small.size - 1) + 1, outer[1])[..., ::step]
        labels.append(small)
    else:
        tensor = tensor[(slice(None),) * axis + (slice(None, None, outer[1]),)]
    return Factor(tensor, tuple(labels), f.name)


def write(relation: Reading, f: Factor, wanted: Sequence[Label]) -> Factor:
    """The transpose of `read`: add the entries of f over `smalls` into `bigs`, keeping those smalls that are wanted."""
    stay = [x for x in relation.smalls if x in wanted]
    bigs = [x for x in relation.bigs if x in wanted]
    rest = [x for x in f.labels if x not in relation.smalls]
    if isinstance(relation, Select) and not stay:
        axis = f.labels.index(relation.small)
        labels = tuple(relation.big if x is relation.small else x for x in f.labels)
        return Factor(_padded(f.tensor, axis, relation), labels, f.name)
    tensor = f.tensor.permute([f.labels.index(x) for x in (*relation.smalls, *rest)])
    places = _places(relation, [*stay, *bigs], tensor.device)
    empty = tensor.new_zeros(sizes([*stay, *bigs, *rest]))
    if len(places) == 1:
        flat = tensor.reshape([math.prod(sizes(relation.smalls)), *sizes(rest)])
        result = empty.index_add(0, places[0].reshape(-1), flat)
    else:
        result = empty.index_put(tuple(places), tensor, accumulate=True)
    return Factor(result, (*stay, *bigs, *rest), f.name)


def _padded(tensor: Tensor, axis: int, s: Select) -> Tensor:
    first, last = s.start, s.start + s.step * (s.small.size - 1)
    if s.step < 0:
        tensor, first, last = tensor.flip(axis), last, first
    if abs(s.step) == 1:
        return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - axis - 1) + [first, s.big.size - last - 1])
    shape = list(tensor.shape)
    shape[axis] = s.big.size
    return tensor.new_zeros(shape).slice_scatter(tensor, axis, first, last + 1, abs(s.step))


def summed_up(triangle: Triangle, f: Factor) -> Factor | None:
    """A triangle that meets a tensor in a summed index is a running sum; None if it has another offset or form."""
    if triangle.offset or len(triangle.rows) != 1 or len(triangle.cols) != 1:
        return None
    (row,), (col,) = triangle.rows, triangle.cols
    if row.size != col.size or (row in f.labels) == (col in f.labels):
        return None
    forward = col in f.labels
    gone, new = (col, row) if forward else (row, col)
    axis = f.labels.index(gone)
    total = f.tensor.cumsum(axis) if forward else f.tensor.flip(axis).cumsum(axis).flip(axis)
    return Factor(total, tuple(new if x is gone else x for x in f.labels), f.name)

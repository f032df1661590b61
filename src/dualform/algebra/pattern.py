"""The entries of a sum of terms that are not zero for all numbers: where they are, and what.

What relations tie is a list of the indices that they allow; every other label runs along an axis of its own. An entry
is the product of the factors there, once those that share a summed index are contracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.contract import contract
from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Factor, Label, Term, atoms, sizes, volume
from dualform.storages import memory_of

Indices = dict[Label, Tensor]


def pattern(terms: Sequence[Term], device: torch.device) -> Tensor:
    """The place of each entry in the flattened tensor, in order.

    Terms that cancel whatever the numbers are, as a whole and the window that is cut out of it, leave none: they cancel
    for other numbers, too, and such are tried.
    """
    return _Sum(terms, device).places


def entries(terms: Sequence[Term], like: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each entry in the flattened tensor, in order, and its value."""
    found = _Sum(terms, like.device)
    return found.places, found.of(lambda t: t.to(like.dtype), like.dtype)[found.kept]


class _Sum:
    """Terms, and every place that one of them reaches."""

    def __init__(self, terms: Sequence[Term], device: torch.device) -> None:
        self.terms = [(term, *_spots(term, device)) for term in terms]
        none = torch.zeros(0, dtype=torch.int64, device=device)
        reached = torch.cat([none, *(places.reshape(-1) for *_, places in self.terms)])
        self.where, self.back = reached.unique(return_inverse=True)

    def of(
        self, numbers: Callable[[Tensor], Tensor], dtype: torch.dtype, size: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        """The sum at each place, of the tensors' numbers or of others."""
        parts = [size(_product(*term, numbers, dtype)).reshape(-1) for term in self.terms]
        none = torch.zeros(0, dtype=dtype, device=self.where.device)
        return torch.zeros_like(self.where, dtype=dtype).index_add(0, self.back, torch.cat([none, *parts]))

    @cached_property
    def kept(self) -> Any:
        """Which places the terms do not cancel at."""
        if len(self.where) == len(self.back):
            return slice(None)
        draws = torch.Generator().manual_seed(0)

        @cache
        def memory(_: int, count: int) -> Tensor:
            return torch.rand(count, generator=draws, dtype=torch.float64) + 0.5

        def other(t: Tensor) -> Tensor:
            """Other numbers for a tensor: where the memory is the same, so are they."""
            count = t.untyped_storage().nbytes() // t.element_size()
            return memory(memory_of(t), count).as_strided(t.shape, t.stride(), t.storage_offset()).to(t.device)

        total, largest = (self.of(other, torch.float64, size) for size in (torch.clone, torch.abs))
        return total.abs() > 1e-12 * largest

    @property
    def places(self) -> Tensor:
        """The places that are kept."""
        return self.where[self.kept]


def _spots(term: Term, device: torch.device) -> tuple[Indices, Tensor]:
    """The index of each label that somebody sees, or that a relation ties, and the places: to be broadcast together."""
    tied: Indices = {}
    count = 1
    for relation in term.relations:
        tied, count = _allowed(relation, tied, count, device)
    free = [x for x in term.visible if x not in tied]
    index = {x: i.reshape(-1, *[1] * len(free)) for x, i in tied.items()}
    for k, x in enumerate(free):
        index[x] = torch.arange(x.size, device=device).reshape(-1, *[1] * (len(free) - k - 1))
    places = torch.zeros([count, *sizes(free)], dtype=torch.int64, device=device)
    step = 1
    for label in reversed(atoms((*term.out, *term.inn))):
        places += index[label] * step
        step *= label.size
    return index, places


def _allowed(relation: Any, tied: Indices, count: int, device: torch.device) -> tuple[Indices, int]:
    """The indices that a relation allows beside those that others do, and how many."""
    is_triangle = isinstance(relation, Triangle)
    for x in dict.fromkeys(relation.labels if is_triangle else relation.smalls):
        if x not in tied:
            tied = {y: i.repeat_interleave(x.size) for y, i in tied.items()}
            tied[x] = torch.arange(x.size, device=device).repeat(count)
            count *= x.size
    if is_triangle:
        rows, cols = (_flat(side, tied) for side in (relation.rows, relation.cols))
        kept = rows >= cols + relation.offset
    else:
        place = relation.values(device)[tuple(tied[x] for x in relation.smalls)].expand(count)
        kept = (place >= 0) & (place < volume(relation.bigs))
        below = volume(relation.bigs)
        for x in relation.bigs:
            below //= x.size
            digit = place.div(below, rounding_mode="floor") % x.size
            kept = kept & (tied.setdefault(x, digit) == digit)
    kept = kept.expand(count)
    return {x: i[kept] for x, i in tied.items()}, int(kept.sum())


def _flat(labels: Sequence[Label], index: Indices) -> Any:
    return sum(index[x] * volume(labels[k + 1 :]) for k, x in enumerate(labels))


def _product(
    term: Term, index: Indices, places: Tensor, numbers: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """The value of a term at each place."""
    total = torch.full((), term.coef, dtype=dtype, device=places.device)
    factors = [Factor(numbers(f.tensor), f.labels) for f in term.tensors]
    while factors:
        group = [factors.pop()]
        while met := [f for f in factors if any(x in g.labels for g in group for x in f.labels if x not in index)]:
            group += met
            factors = [f for f in factors if f not in met]
        labels = [x for x in dict.fromkeys(x for f in group for x in f.labels) if x in index]
        total = total * contract(group, labels)[tuple(index[x] for x in labels)]
    return total.expand(places.shape)

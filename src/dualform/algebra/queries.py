"""Questions to a sum of terms, answered from its labels: slices, diagonals, traces, and proofs. No number is read.

A proof holds for all values of the factors: what is claimed zero is zero, what is claimed independent is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from dualform.algebra.compose import compose_terms
from dualform.algebra.contract import ContractionPlan, plan
from dualform.algebra.relations import Window, window
from dualform.algebra.sums import merged
from dualform.algebra.terms import Axis, Factor, Relation, Term, atoms, fresh_axes, make_factor, volume


def after(outer: Term, terms: Iterable[Term]) -> tuple[Term, ...]:
    """Put a map behind the output of each term."""
    found = [compose_terms(outer, term) for term in terms]
    return merged([term for term in found if term is not None])


def flipped(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Swap output and input."""
    return tuple(replace(t, out=t.inn, inn=t.out) for t in terms)


def joined(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Put all axes on the output's side."""
    return tuple(replace(t, out=(*t.out, *t.inn), inn=()) for t in terms)


def parted(terms: Iterable[Term], count: int) -> tuple[Term, ...]:
    """Leave the first `count` axes on the output's side, the others on the input's."""
    return tuple(replace(t, out=t.out[:count], inn=t.out[count:]) for t in terms)


def range_of(shape: Sequence[int], axis: int, chosen: range, drop: bool = False) -> Term:
    """The map that takes a range of one axis, which is not stored; `drop`: and that axis, of one index, away."""
    big = fresh_axes(shape)
    (small,) = fresh_axes([len(chosen)]) if len(chosen) != shape[axis] else (big[axis],)
    relation = window([small], big[axis], chosen.start, [chosen.step]) if small is not big[axis] else ()
    return Term(1.0, relation, (*big[:axis], *[small] * (not drop), *big[axis + 1 :]), big)


def diagonal(shape: Sequence[int], first: int, second: int) -> Term:
    """The map that takes the entries with equal indices on two axes; the second goes away."""
    big = list(fresh_axes(shape))
    big[second] = big[first]
    return Term(1.0, (), tuple(a for k, a in enumerate(big) if k != second), tuple(big))


def total(shape: Sequence[int], axis: int) -> Term:
    """The map that sums an axis away."""
    big = fresh_axes(shape)
    return Term(1.0, (), tuple(a for k, a in enumerate(big) if k != axis), big)


def is_diagonal(terms: Sequence[Term], out_axis: int, in_axis: int) -> bool:
    """Does every term vanish unless the two indices are equal?"""
    return all(_place(t, t.out[out_axis]) == _place(t, t.inn[in_axis]) for t in terms)


def _place(term: Term, axis: Axis) -> tuple:
    """What an axis's index is: its labels, those that a selection gives replaced by what they are selected with."""
    given = {s.big: (s.small, s.start, s.step) for s in term.selects}
    for w in term.relations:
        if isinstance(w, Window) and len(w.smalls) == len(w.bigs) == 1 and w.steps[0] in (1, -1):
            given[w.smalls[0]] = (w.bigs[0], -w.start * w.steps[0], w.steps[0])
    return tuple(given.get(label, (label, 0, 1)) for label in axis)


def is_identity(terms: Sequence[Term]) -> bool:
    """Is the sum one product of deltas, one for each axis?"""
    if len(terms) != 1:
        return False
    (term,) = terms
    labels = [x for axis in term.out for x in axis]
    return term.coef == 1 and not term.factors and term.out == term.inn and len(set(labels)) == len(labels)


def depends(terms: Sequence[Term], out_axis: int, in_axis: int) -> bool:
    """Does some term tie the two indices, by a delta, a factor, or a chain of factors over summed indices?"""
    return any(_tied(t, t.out[out_axis], t.inn[in_axis]) for t in terms)


def _tied(term: Term, first: Axis, second: Axis) -> bool:
    reached, hidden = set(first), set(term.hidden)
    todo = list(reached)
    while todo:
        label = todo.pop()
        for f in term.factors:
            if label in f.labels:
                new = set(f.labels) - reached
                reached |= new
                # Beyond a visible label that a factor has, other factors are other functions of that label; a relation
                # and a summed index pass the tie on.
                todo += [x for x in new if x in hidden or isinstance(f, Relation)]
    return any(x in reached for x in second)


def term_plan(term: Term, seed: str | None, result: str | None, like: torch.Tensor) -> ContractionPlan:
    """Price the contraction of a term with a seed on one side into the axes of the other, or without one of all."""
    wanted = term.visible if result is None else tuple(dict.fromkeys(atoms(getattr(term, result))))
    factors: list = list(term.factors)
    if seed is not None:
        axes = getattr(term, seed)
        blank = torch.empty([volume(axis) for axis in axes], dtype=like.dtype, device="meta")
        factors.insert(0, make_factor(blank, axes, "seed"))
    if not any(isinstance(f, Factor) and not f.is_mask for f in factors):
        factors.append(Factor(torch.empty((), dtype=like.dtype, device="meta"), (), "1"))
    return plan(factors, [x for x in wanted if any(x in f.labels for f in factors)])

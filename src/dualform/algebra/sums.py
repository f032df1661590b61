"""Keep sums of terms small: merge equal ones, contract what shrinks, and meet the delta patterns of too many.

A delta holds in a sum of terms if it holds in each of them: the pattern of the sum is the meet of the patterns, and the
sum is one stored factor over it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dualform.algebra.contract import contract
from dualform.algebra.materialise import DENSE_LIMIT, expect_room, spread
from dualform.algebra.relations import as_window
from dualform.algebra.shifts import windowed
from dualform.algebra.terms import (
    Factor,
    Identity,
    Label,
    Relation,
    Select,
    Term,
    atoms,
    factor_of,
    identity_of,
    key_of,
    product,
    same_place,
    substitute,
    volume,
)

# Sums of at most this many terms are kept as they are: softmax has two, a layer norm three, a product of both six.
# Longer ones are kept where one factor would store far more; of more terms than MANY nobody waits for the chain rule.
MAX_TERMS, MANY = 8, 2048


def tidy(terms: Sequence[Term], like: Tensor) -> tuple[Term, ...]:
    """Merge equal terms, contract factors where that stores less, and shorten a sum that is too long.

    Shifts become windows; then all terms become one factor, or those of one pattern, if that does not store far more.
    """
    uses = Counter(key for term in terms for key in {identity_of(f.tensor) for f in term.tensors})
    small = added(merged([shrunk(term, uses) for term in terms]))
    small = windowed(small, like) if len(small) > MAX_TERMS else small
    if len(small) <= MAX_TERMS:
        meet = _Meet(small) if _is_wasteful(small) else None
        return (meet.sum(like),) if meet and volume(meet.stored) < _numbers(small) else small
    if (one := _one_term(small, like)) is not None:
        return (one,)
    groups: dict[tuple, list[Term]] = {}
    for k, term in enumerate(small):
        key = (k,) if term.relations else key_of(replace(term, coef=1.0, factors=()))
        groups.setdefault(key, []).append(term)
    parts = [(_one_term(group, like, MAX_TERMS // 2), group) for group in groups.values()]
    small = tuple(term for one, group in parts for term in ([one] if one else group))
    if len(small) <= MANY:
        return small
    meet = _Meet(small)
    expect_room("jacobian", f"a sum of {len(small)} terms", volume(meet.stored) * like.dtype.itemsize)
    return (meet.sum(like),)


def _one_term(terms: Sequence[Term], like: Tensor, most: int | None = None) -> Term | None:
    """The sum as one factor, if that stores about as much as the terms, or few enough for so many of them.

    most: how many may be kept, whatever they store
    """
    meet = _Meet(terms) if len(terms) > 1 else None
    if meet is None or (size := volume(meet.stored)) * like.dtype.itemsize > DENSE_LIMIT:
        return None
    is_small = size <= 2 * _numbers(terms) + len(terms) ** 2
    return meet.sum(like) if is_small or (most is not None and len(terms) > most) else None


def _numbers(terms: Sequence[Term]) -> int:
    """How many are stored; a truth value is an eighth of one."""
    stored = {identity_of(f.tensor): f for term in terms for f in term.tensors}.values()
    return sum(f.tensor.numel() // (8 if f.is_mask else 1) for f in stored)


def _is_wasteful(terms: Sequence[Term]) -> bool:
    """May one factor over the meet store less? It stores no less than the labels of any one term's factors span."""
    least = max((volume({x for f in term.factors for x in f.labels if x in term.visible}) for term in terms), default=0)
    return (len(terms) > 1 or any(term.relations for term in terms)) and _numbers(terms) > least


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Add the coefficients of terms that are equal but for them; drop zeros."""
    groups: dict[tuple, list[Term]] = {}
    for term in terms:
        groups.setdefault(key_of(term), []).append(term)
    sums = [replace(group[0], coef=_exact_sum([t.coef for t in group])) for group in groups.values()]
    return tuple(term for term in sums if term.coef != 0)


def _exact_sum(coefs: Sequence[float]) -> float:
    """The sum; zero where only rounding is left of it, as in 0.1 + 0.2 - 0.3."""
    total = math.fsum(coefs)
    return 0.0 if abs(total) <= 4 * sys.float_info.epsilon * max(map(abs, coefs)) else total


def added(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Add the factors of terms that have one factor each on the same labels of the same pattern."""
    groups: dict[tuple, list[tuple[Term, list[Label]]]] = {}
    for k, term in enumerate(terms):
        order = [x for x in term.visible if any(x in f.labels for f in term.factors)]
        single = len(term.factors) == len(term.tensors) == 1 and len(order) == len(term.tensors[0].labels)
        single = single and not term.tensors[0].is_mask
        key = (key_of(replace(term, factors=())), tuple(term.visible.index(x) for x in order)) if single else (k,)
        groups.setdefault(key, []).append((term, order))
    result = []
    for group in groups.values():
        first, order = group[0]
        if len(group) > 1:
            parts = [contract(t.factors, labels) * t.coef for t, labels in group]
            made = (replace(product(t.factors, labels), coef=t.coef) for t, labels in group)
            first = replace(first, coef=1.0, factors=(factor_of(made, sum(parts[1:], parts[0]), order),))
        result.append(first)
    return tuple(result)


def shrunk(term: Term, uses: Mapping[Identity, int]) -> Term:
    """Contract groups of factors where the result stores fewer numbers than the group.

    uses: in how many terms of the sum a tensor stands; one that others keep anyway is no saving.
    """
    term = _joined(term)
    hidden = set(term.hidden)
    alone = [f for f in term.tensors if uses.get(identity_of(f.tensor), 1) == 1]
    masks = _whole_masks(term)
    bulk = sum(f.tensor.numel() for f in alone if f not in masks)
    linked = [f for f in term.factors if any(label in hidden for label in f.labels)]
    if any(isinstance(f, Factor) and not f.is_mask for f in linked):
        keep = list(dict.fromkeys(x for f in linked for x in f.labels if x not in hidden))
        stored = sum(f.tensor.numel() for f in linked if isinstance(f, Factor))
        # A relation that reaches an axis is worth more as one: the factor stays small.
        if not any(isinstance(f, Relation) for f in linked) and volume(keep) <= stored:
            rest = (f for f in term.factors if f not in linked)
            term = replace(term, factors=(*rest, multiplied(linked, keep)))
    masks = _whole_masks(term)
    numbers = [f for f in term.tensors if f not in masks]
    keep = [x for x in term.visible if any(x in f.labels for f in numbers)]
    if bulk > volume(keep) and len(numbers) > 1 and not term.relations:
        term = replace(term, factors=(multiplied(numbers, keep), *masks))
    return term


def _whole_masks(term: Term) -> list[Factor]:
    """The masks that have all labels that are stored: they stay masks, which a later infinity meets."""
    span = {x for f in term.tensors for x in f.labels}
    is_dense = volume(span) == volume((*atoms(term.out), *atoms(term.inn)))  # a mask beside that is stored on top
    return [] if is_dense else [f for f in term.tensors if f.is_mask and {*f.labels} == span]


def multiplied(factors: Sequence[Factor | Relation], labels: Sequence[Label]) -> Factor:
    """The product of factors as one factor, summed over all labels but these."""
    return factor_of([product(factors, labels)], contract(factors, labels), labels)


def _joined(term: Term) -> Term:
    """Multiply factors that have the same labels."""
    masks = _whole_masks(term)
    groups: dict[tuple[frozenset[Label], bool], list[Factor]] = {}
    for f in term.tensors:
        groups.setdefault((frozenset(f.labels), f in masks), []).append(f)
    if len(groups) == len(term.tensors):
        return term
    factors: list[Factor | Relation] = list(term.relations)
    for group in groups.values():
        factors.append(multiplied(group, group[0].labels) if len(group) > 1 else group[0])
    return replace(term, factors=tuple(factors))


class _Meet:
    """The finest pattern that holds in all terms: positions of axes grouped by the label that they share in each."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms, self.hulls = _hulled(_refined(terms))
        self.columns = [(*atoms(t.out), *atoms(t.inn)) for t in self.terms]
        self.count = len(self.columns[0])
        classes: dict[tuple[Label, ...], list[int]] = {}
        for k in range(self.count):
            classes.setdefault(tuple(column[k] for column in self.columns), []).append(k)
        self.label_at: dict[int, Label] = {}
        loose: set[Label] = set()
        for key, members in classes.items():
            label = Label(key[0].size, key[0].name)
            self.label_at.update(dict.fromkeys(members, label))
            each = zip(self.terms, key, self.columns, strict=True)
            # No term stores this label, or ties it to one outside its class.
            if all(n.count(x) == len(members) and not any(x in f.labels for f in t.factors) for t, x, n in each):
                loose.add(label)
        self.stored = [x for x in dict.fromkeys(self.label_at[k] for k in range(self.count)) if x not in loose]

    def sum(self, like: Tensor) -> Term:
        """Add the terms into one factor over the pattern."""
        made = []
        for term, column in zip(self.terms, self.columns, strict=True):
            first = {self.label_at[k]: column[k] for k in reversed(range(self.count))}
            made.append(replace(term, out=tuple((first[label],) for label in self.stored), inn=()))
        parts = [spread(term, term.out, (), like) for term in made]
        dense = sum(parts[1:], parts[0])
        whole = {x: Select(x, hull.big, hull.start) for k, hull in self.hulls.items() for x in [self.label_at[k]]}
        labels = iter(whole[x].big if (x := self.label_at[k]) in whole else x for k in range(self.count))
        out = tuple(tuple(next(labels) for _ in axis) for axis in self.terms[0].out)
        inn = tuple(tuple(next(labels) for _ in axis) for axis in self.terms[0].inn)
        return Term(1.0, (factor_of(made, dense, self.stored), *whole.values()), out, inn)


def _hulled(terms: Sequence[Term]) -> tuple[list[Term], dict[int, Select]]:
    """Cut the columns of which all terms select a part to the range that they reach together."""
    found, hulls = list(terms), dict[int, Select]()
    columns = [(*atoms(t.out), *atoms(t.inn)) for t in terms]
    for k, first in enumerate(columns[0]):
        parts = [_part_of(term, column, column[k]) for term, column in zip(found, columns, strict=True)]
        cuts = [s for s in parts if s is not None]
        start, end = min((s.start for s in cuts), default=0), max((s.start + s.small.size for s in cuts), default=0)
        if len(cuts) < len(parts) or end - start == first.size:
            continue
        hulls[k] = Select(Label(end - start), Label(first.size, first.name), start)
        for n, s in enumerate(cuts):
            hull = Label(end - start, first.name)
            part = Select(s.small, hull, s.start - start)
            rest = tuple(part if f is s else f for f in found[n].factors)
            found[n] = substitute(replace(found[n], factors=rest), {s.big: (hull,)})
    return found, hulls


def _part_of(term: Term, column: Sequence[Label], label: Label) -> Select | None:
    """The selection of a range that is all that a term says of a label."""
    first, *more = [f for f in term.factors if label in f.labels] or [None]
    if more or not isinstance(first, Select) or first.big is not label or first.small is label:
        return None
    return first if column.count(label) == 1 and (first.step == 1 or first.small.size == 1) else None


def _refined(terms: Sequence[Term]) -> list[Term]:
    """Split the axes of all terms into common atoms; an axis whose radices do not nest becomes whole in each term."""
    result = list(terms)
    # A split label may stand on an axis that was already done, hence until nothing changes.
    while True:
        before = result
        for side in ("out", "inn"):
            for axis in range(len(getattr(terms[0], side))):
                cuts = sorted(set().union(*(_cuts(getattr(t, side)[axis]) for t in result)))
                nested = all(b % a == 0 for a, b in zip(cuts, cuts[1:], strict=False))
                result = [_recut(t, side, axis, cuts if nested else None) for t in result]
        if all(a is b for a, b in zip(before, result, strict=True)):
            return result


def _cuts(axis: Sequence[Label]) -> set[int]:
    """The strides of an axis's atoms, and its size."""
    strides, step = {1}, 1
    for label in reversed(axis):
        step *= label.size
        strides.add(step)
    return strides


def _recut(term: Term, side: str, axis: int, cuts: list[int] | None) -> Term:
    labels = getattr(term, side)[axis]
    if cuts is None:
        if len(labels) < 2:
            return term
        whole = Label(volume(labels))
        tie = same_place(labels, (whole,))
        axes = tuple((whole,) if k == axis else a for k, a in enumerate(getattr(term, side)))
        term = replace(term, factors=(*term.factors, tie))
        return replace(term, out=axes) if side == "out" else replace(term, inn=axes)
    change: dict[Label, tuple[Label, ...]] = {}
    step = 1
    for label in reversed(labels):
        inside = [c for c in cuts if step <= c <= step * label.size]
        parts = [Label(b // a, label.name) for a, b in zip(inside, inside[1:], strict=False)]
        if len(parts) > 1 and label not in change:
            change[label] = tuple(reversed(parts))
        step *= label.size
    if not change:
        return term
    cut = [isinstance(f, Select) and any(x in change for x in f.labels) for f in term.factors]
    factors = [as_window(f) if c and isinstance(f, Select) else f for f, c in zip(term.factors, cut, strict=True)]
    return substitute(replace(term, factors=tuple(factors)), change)

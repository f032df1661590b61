"""The chain rule on terms: the inner axes of one meet the outer axes of the other, label by label.

    (J2 J1)[out..., in...] = sum over mid of J2[out..., mid...] J1[mid..., in...]

Two labels of one size become one label (a delta eliminated by renaming); where sizes differ, as (12,) with (3, 4), the
longer label is split; where no split exists, that axis alone gets a stored permutation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dualform.algebra.relations import Lookup, Window, as_window, chained, plainer, read, restricted
from dualform.algebra.terms import Axis, Factor, Label, Relation, Select, Term, renewed, same_place, substitute, volume


def compose_terms(outer: Term, inner: Term) -> Term | None:
    """Compose two terms, or None if their product is zero."""
    outer, inner = renewed(outer), renewed(inner)
    meeting = _Meeting(outer, inner)
    for left, right in zip(outer.inn, inner.out, strict=True):
        meeting.unify(left, right)
    joined = Term(outer.coef * inner.coef, tuple(meeting.factors), outer.out, inner.inn)
    middle = [label for axis in (*outer.inn, *inner.out) for label in axis]
    joined = substitute(joined, meeting.change)
    middle = list(dict.fromkeys(x for label in middle for x in meeting.final(label)))
    settled = settle_relations(joined)
    if settled is None:
        return None
    present = {*settled.visible, *settled.hidden, *meeting.absorbed(joined, settled)}
    free = volume(label for label in middle if label not in present)
    return replace(settled, coef=settled.coef * free)


class _Meeting:
    """The labels of two terms while their middle axes are matched."""

    def __init__(self, outer: Term, inner: Term) -> None:
        self.factors: list[Factor | Relation] = [*outer.factors, *inner.factors]
        self.change: dict[Label, Axis] = {}

    def final(self, label: Label) -> Axis:
        if label not in self.change:
            return (label,)
        return tuple(x for part in self.change[label] for x in self.final(part))

    @staticmethod
    def absorbed(before: Term, after: Term) -> set[Label]:
        """Labels that a relation consumed: their sum is in its meaning, not in the coefficient."""
        gone = {label for s in before.relations for label in s.labels}
        return gone - {label for s in after.relations for label in s.labels}

    def unify(self, left: Axis, right: Axis) -> None:
        a = [x for label in left for x in self.final(label)]
        b = [x for label in right for x in self.final(label)]
        while a and b:
            # A label that the other axis has renamed or split since it was read is read again.
            if (fresh := self.final(a[-1])) != (a[-1],):
                a[-1:] = fresh
                continue
            if (fresh := self.final(b[-1])) != (b[-1],):
                b[-1:] = fresh
                continue
            x, y = a[-1], b[-1]
            if x.size == y.size:
                if x is not y:
                    self.change[y] = (x,)
                    x.name = x.name or y.name
                a.pop()
                b.pop()
            elif x.size % y.size == 0:
                self.split(x, y.size)
            elif y.size % x.size == 0:
                self.split(y, x.size)
            else:
                self.permute(a, b)
                return

    def split(self, label: Label, low: int) -> None:
        """Replace a label by (high, low), and split the partners that Selects tie it to, where they align."""
        low_label = Label(low)
        self.change[label] = (Label(label.size // low), low_label)
        pending = [label]
        while pending:
            current = pending.pop()
            for k, f in enumerate(self.factors):
                if not isinstance(f, Select):
                    continue
                f = replace(f, small=self._renamed(f.small), big=self._renamed(f.big))
                if current not in f.labels:
                    self.factors[k] = f
                    continue
                other = f.big if f.small is current else f.small
                aligned = f.step == 1 and f.start % low == 0 and other.size % low == 0 and f.small is not f.big
                if not aligned or (other in self.change and self.change[other][-1] is not low_label):
                    self.factors[k] = as_window(f)
                    continue
                if other not in self.change:
                    self.change[other] = (Label(other.size // low), low_label)
                    pending.append(other)
                high = {x: self.change[x][0] for x in f.labels}
                self.factors[k] = Select(high[f.small], high[f.big], f.start // low, 1)

    def _renamed(self, label: Label) -> Label:
        while label in self.change and len(self.change[label]) == 1:
            (label,) = self.change[label]
        return label

    def permute(self, a: list[Label], b: list[Label]) -> None:
        """Tie two groups of labels with equal volume and radices that do not fit, by their place."""
        self.factors.append(same_place(tuple(a), tuple(b)))


def settle_relations(term: Term) -> Term | None:
    """Remove every relation that a renaming, a slice or an intersection can replace; None if the term is zero."""
    progress = True
    while progress:
        progress = False
        for r in term.relations:
            if isinstance(r, Window) and volume(r.smalls) == 1 and len({*r.bigs}) < len(r.bigs):
                if (places := _digits(r)) is None:
                    return None
                term, progress = replace(term, factors=(*(f for f in term.factors if f is not r), *places)), True
                break
            if isinstance(r, Window | Lookup) and (simpler := _simpler(term, r)) is not None:
                term, progress = simpler, True
                break
        for s in term.selects:
            step = _settled(term, s)
            if step is None:
                return None
            if step is not term:
                term, progress = step, True
                break
    return term


def _digits(r: Window) -> list[Select] | None:
    """One place of a diagonal: the same digit wherever a label stands; None where it is not on the diagonal."""
    found: dict[Label, int] = {}
    for k, x in enumerate(r.bigs):
        digit = r.start // volume(r.bigs[k + 1 :]) % x.size
        if found.setdefault(x, digit) != digit or not r.is_total:
            return None
    return [Select(Label(1), x, digit) for x, digit in found.items()]


def _simpler(term: Term, r: Window | Lookup) -> Term | None:
    """Write a window or lookup as a plainer relation, or merge it with the one that reads its place."""
    if len({*r.bigs, *r.smalls}) < len(r.bigs) + len(r.smalls):
        # A label that stands twice, as on a diagonal, ties more than a place: most of them are never reached.
        if len({*r.bigs}) == len(r.bigs):
            return None
        return replace(term, factors=tuple(r.dense(torch.empty(())) if f is r else f for f in term.factors))
    plain = plainer(r)
    if plain is not None:
        return replace(term, factors=tuple(plain if f is r else f for f in term.factors))
    rest = [f for f in term.factors if f is not r]
    bare = replace(term, factors=tuple(rest))
    elsewhere = {*bare.visible, *bare.hidden}
    if isinstance(r, Window) and not r.is_total:
        return None
    if not any(x in elsewhere for x in r.bigs):
        # Nothing reads the place: the sum over it is one for each value of the smalls.
        return replace(bare, coef=bare.coef * volume(x for x in r.smalls if x not in elsewhere))
    readers = [f for f in rest if any(x in f.labels for x in r.bigs)]
    if len(readers) != 1 or any(x in term.visible for x in r.bigs) or not isinstance(readers[0], Window | Lookup):
        return None
    merged = chained(readers[0], r)
    return None if merged is None else replace(term, factors=tuple(merged if f is readers[0] else f for f in rest))


def _settled(term: Term, s: Select) -> Term | None:
    rest = tuple(f for f in term.factors if f is not s)
    bare = replace(term, factors=rest)
    if s.is_identity:
        # Keep the label that an axis shows.
        if s.big in term.visible:
            return substitute(bare, {s.small: (s.big,)})
        return substitute(bare, {s.big: (s.small,)})
    others = [f for f in rest if isinstance(f, Select)]
    twin = next((o for o in others if o.big is s.big), None)
    shown = term.visible
    is_free = s.big not in shown or (twin is not None and not {s.small, twin.small} <= {*shown})
    if twin is not None and is_free and not any(o.small is s.big for o in others):
        return _intersected(term, s, twin)
    if any(s.big in f.labels for f in bare.tensors):
        # The relation lets the tensor be read at start + step * small only.
        sliced = tuple(read(s, f) if isinstance(f, Factor) else f for f in rest)
        return replace(term, factors=(*sliced, s))
    if twin is not None:
        return term
    readers = [f for f in term.relations if f is not s and s.big in f.labels]
    if readers:
        narrow = {f: _through(f, s) for f in readers}
        held = any(x is None for x in narrow.values()) or sum(not isinstance(f, Select) for f in readers) > 1
        kept = (s,) if s.big in shown else ()
        return term if held else replace(bare, factors=(*(narrow[f] if f in readers else f for f in rest), *kept))
    if s.big in shown:
        return term
    # Nothing else reads big: the sum over it is one for each value of small.
    free = 1 if s.small in {*bare.visible, *bare.hidden} else s.small.size
    return replace(bare, coef=bare.coef * free)


def _through(relation: Relation, s: Select) -> Relation | None:
    """The relation where one of its indices is s.start + s.step * s.small."""
    if not isinstance(relation, Select):
        return restricted(relation, s)
    step = relation.step
    if relation.small is not s.big:
        return None
    return Select(s.small, relation.big, relation.start + step * s.start, step * s.step)


def _intersected(term: Term, s: Select, t: Select) -> Term | None:
    """Two ranges of one index: [big in s][big in t] is a relation between the small ones, and big if it is shown."""
    rest = tuple(f for f in term.factors if f is not s and f is not t)
    common = sorted(set(s.indices) & set(t.indices))
    if not common:
        return None
    step = common[1] - common[0] if len(common) > 1 else 1
    meet = Label(len(common), s.small.name)
    single = len(common) == 1
    tied = [Select(meet, x.small, (common[0] - x.start) // x.step, 1 if single else step // x.step) for x in (s, t)]
    # A tensor that reads big reads it on the common range only.
    shared = Select(meet, s.big, common[0], step)
    sliced = [read(shared, f) if isinstance(f, Factor) else f for f in rest]
    if s.big in term.visible or any(s.big in f.labels for f in sliced):
        tied.append(shared)
    return replace(term, factors=(*sliced, *tied))

"""Terms that differ in where they read an axis alone, as those of a stencil, are one term over a window.

sum over k of c[k] [in = start + step out + gap k] = sum over k of w[k] [in = start + step out + gap k], k an index
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.compose import settle_relations
from dualform.algebra.relations import as_window, plainer
from dualform.algebra.terms import Factor, Label, Relation, Select, Term, Window, atoms, key_of

# A window has at most so many places for each term that it stands for: a star of shifts leaves some empty.
SPARE = 4


def windowed(terms: Sequence[Term], like: Tensor) -> tuple[Term, ...]:
    """Make one term of those that are shifts of each other."""
    groups: dict[Any, list[_Shifted]] = {}
    for n, term in enumerate(terms):
        shifted = _Shifted(term)
        groups.setdefault(key_of(shifted.bare) if shifted.starts else n, []).append(shifted)
    found = []
    for group in groups.values():
        one = _joined(group, like) if len(group) > 2 else None
        found += [shifted.term for shifted in group] if one is None else [one]
    return tuple(found)


class _Shifted:
    """A term, the same with all that shifts written as windows that start at 0, the last of its factors; their starts.

    A shift is big = start + steps smalls for all smalls for which that lies inside; no other factor has the label big.
    """

    def __init__(self, term: Term) -> None:
        self.term = term
        columns = [*atoms(term.out), *atoms(term.inn)]
        self.middle = len(atoms(term.out))
        self.at = {x: k for k, x in enumerate(columns) if columns.count(x) == 1}
        self.uses: dict[Label, list[Any]] = {}
        for f in term.factors:
            for x in dict.fromkeys(f.labels):
                self.uses.setdefault(x, []).append(f)
        self.windows: dict[int, Window] = {}  # by the column of what is shifted
        self.gone: set[int] = set()
        for f in term.factors:
            if isinstance(f, Window) and len(f.bigs) == 1:
                self._tie([f], f)
            elif isinstance(f, Select):
                self._select(f)
        axes = [(x,) for x in columns]
        for j, x in enumerate(columns[self.middle :], self.middle):
            same = [k for k, y in enumerate(columns) if y is x]
            if len(same) == 2 and same[0] < self.middle:
                axes[j] = (Label(x.size, x.name),)
                self.windows[j] = Window((x,), axes[j], 0, (1,))
        fresh = iter(x for axis in axes for x in axis)
        sides = [tuple(tuple(next(fresh) for _ in axis) for axis in side) for side in (term.out, term.inn)]
        ordered = [w for _, w in sorted(self.windows.items(), key=lambda item: item[0])]
        self.starts = [w.start for w in ordered]
        rest = [f for f in term.factors if id(f) not in self.gone]
        self.bare = Term(1.0, (*rest, *(replace(w, start=0) for w in ordered)), *sides)

    def _tie(self, factors: Sequence[Relation], made: Window) -> None:
        (big,) = made.bigs
        if big not in self.at or self.uses[big] != [factors[-1]] or big in made.smalls:
            return
        self.windows[self.at[big]] = made
        self.gone.update(map(id, factors))

    def _select(self, f: Select) -> None:
        """A selection itself, turned round where output is selected from input, or two of what stands nowhere else."""
        if id(f) in self.gone or f.big not in self.at:
            return
        both = self.uses[f.small]
        other = next((o for o in both if o is not f), None)
        if f.small in self.term.visible or len(both) != 2 or not isinstance(other, Select) or other.big not in self.at:
            turned = f.step == 1 and self.at[f.big] < self.middle <= self.at.get(f.small, 0)
            if turned and self.uses[f.small] == [f]:
                self._tie([f], Window((f.big,), (f.small,), -f.start, (1,)))
            else:
                self._tie([f], as_window(f))
        elif f.step == 1 and other.step > 0 and self.uses[f.big] == [f]:
            step, start = other.step, other.start - other.step * f.start
            last = min(f.big.size - 1, (other.big.size - 1 - start) // step)
            if (max(0, -(start // step)), last) == (f.start, f.start + f.small.size - 1):
                self._tie([f, other], Window((f.big,), (other.big,), start, (step,)))


def _joined(group: Sequence[_Shifted], like: Tensor) -> Term | None:
    """One term for a group of shifts, if the places that they reach lie close enough."""
    bare = group[0].bare
    starts = [sorted(set(own)) for own in zip(*(shifted.starts for shifted in group), strict=True)]
    gaps = [math.gcd(*(s - own[0] for s in own)) for own in starts]
    counts = [(own[-1] - own[0]) // gap + 1 if gap else 1 for own, gap in zip(starts, gaps, strict=True)]
    if math.prod(counts) > SPARE * len(group):
        return None
    weights = [0.0] * math.prod(counts)
    for shifted in group:
        place = 0
        for s, own, gap, n in zip(shifted.starts, starts, gaps, counts, strict=True):
            place = place * n + ((s - own[0]) // gap if gap else 0)
        weights[place] += shifted.term.coef
    along = [Label(n) for n in counts]
    rest, windows = bare.factors[: -len(counts)], bare.factors[-len(counts) :]
    made = [_reaching(w, own[0], gap, k) for w, own, gap, k in zip(windows, starts, gaps, along, strict=True)]
    if len(set(weights)) == 1:
        return settle_relations(replace(bare, coef=weights[0], factors=(*rest, *made)))
    labels = tuple(k for k in along if k.size > 1)
    w = torch.tensor(weights, dtype=like.dtype, device=like.device).reshape([k.size for k in labels])
    return settle_relations(replace(bare, factors=(*rest, *made, Factor(w, labels, "w"))))


def _reaching(window: Any, start: int, gap: int, k: Label) -> Relation:
    """A window that starts at several places, along an index of its own."""
    more = ((k,), (gap,)) if gap else ((), ())
    made = Window((*window.smalls, *more[0]), window.bigs, start, (*window.steps, *more[1]))
    return plainer(made) or made

"""Index expressions, and products whose indices can be computed with: what a printed formula says, as data.

4*m+l-1        idx[i][j]        2 Σ_m x[m,k] δ(i,4*m+l) [i>=k]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dualform.algebra.index_text import IndexFormula, Line, in_order, sum_letter


@dataclass(frozen=True)
class Index:
    """An index expression: start + sum of step * name, or the entry of a table of indices, as idx[i][j]."""

    steps: tuple[tuple[str, int], ...] = ()
    start: int = 0
    table: str = ""
    at: tuple[Index, ...] = ()

    @classmethod
    def read(cls, text: str) -> Index:
        """Read "1+2*i", "4*m+l-1", "2-i", "i", "0" or "idx[i][j+1]"."""
        if text.endswith("]"):
            table, _, rest = text.partition("[")
            return cls(table=table, at=tuple(cls.read(x) for x in _groups(f"[{rest}")))
        start, steps = 0, []
        for sign, step, name in re.findall(r"([+-]?)(?:(\d+)\*)?([^\W\d]\w*'*|\d+)", text):
            scale = int(step or 1) * (-1 if sign == "-" else 1)
            if name.isdigit():
                start += scale * int(name)
            else:
                steps.append((name, scale))
        return cls(tuple(steps), start)

    def __str__(self) -> str:
        if self.table:
            return self.table + "".join(f"[{x}]" for x in self.at)
        parts = [f"{step:+d}*{name}" if abs(step) != 1 else f"{'+-'[step < 0]}{name}" for name, step in self.steps]
        shown = "".join(parts)
        first = str(self.start) if self.start > 0 or not parts else ""
        last = str(self.start) if self.start < 0 and parts else ""
        return f"{first}{shown if first else shown.removeprefix('+')}{last}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.steps) + tuple(name for x in self.at for name in x.names)

    @property
    def plain(self) -> str:
        """The name, where the expression is one index and nothing else."""
        return self.steps[0][0] if len(self.steps) == 1 and self.steps[0][1] == 1 and not self.start else ""

    def put(self, values: Mapping[str, Index]) -> Index:
        """Replace names by expressions."""
        if self.table:
            return replace(self, at=tuple(x.put(values) for x in self.at))
        start, steps = self.start, dict[str, int]()
        for name, step in self.steps:
            value = values.get(name, Index(((name, 1),)))
            if value.table:
                return value if self.plain else self
            start += step * value.start
            for inner, scale in value.steps:
                steps[inner] = steps.get(inner, 0) + step * scale
        return Index(tuple((name, step) for name, step in steps.items() if step), start)

    def bounds(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """The smallest and the largest value; a table is made for the axis that it is tied to, so it stays in range."""
        ends = [step * (sizes[name] - 1) for name, step in self.steps]
        return self.start + sum(min(e, 0) for e in ends), self.start + sum(max(e, 0) for e in ends)

    def minus(self, other: Index) -> Index:
        """The difference of two expressions that are no tables."""
        return Index((*self.steps, *((name, -step) for name, step in other.steps)), self.start - other.start).put({})


def combined(parts: Sequence[tuple[str, int]], start: int) -> Index:
    """start + sum of step * expression."""
    read = [(Index.read(text), step) for text, step in parts]
    steps = tuple((name, step * scale) for x, step in read for name, scale in x.steps)
    return Index(steps, start + sum(step * x.start for x, step in read)).put({})


def _groups(text: str) -> list[str]:
    """What stands in each of the outer brackets: [i][idx[j]] has i and idx[j]."""
    found, depth = [""], 0
    for c in text:
        depth += (c == "[") - (c == "]")
        if depth == 0:
            found.append("")
        elif (c, depth) != ("[", 1):
            found[-1] += c
    return found[:-1]


Tie = tuple[Index, Index]


@dataclass(frozen=True)
class IndexProduct:
    """A `Line` whose indices can be computed with."""

    coef: float
    factors: tuple[tuple[str, tuple[Index, ...]], ...]
    ties: tuple[Tie, ...]
    sums: tuple[tuple[str, int], ...]
    steps: tuple[Tie, ...] = ()

    @classmethod
    def read(cls, line: Line) -> IndexProduct:
        factors = tuple((name, tuple(Index.read(x) for x in labels)) for name, labels in line.factors)
        ties, steps = (tuple((Index.read(a), Index.read(b)) for a, b in pairs) for pairs in (line.ties, line.steps))
        return cls(line.coef, factors, ties, line.sums, steps)

    def line(self, axes: Sequence[str]) -> Line:
        """Write the product for people: ties as the axes stand."""
        factors = tuple((name, tuple(str(x) for x in labels)) for name, labels in self.factors)
        ties = [(str(a), str(b)) for a, b in self.ties]
        place = {name: k for k, name in enumerate(axes)}
        ties = [(b, a) if place.get(b, len(place)) < place.get(a, len(place)) else (a, b) for a, b in ties]
        steps = tuple((str(a), str(b)) for a, b in self.steps)
        return Line(self.coef, factors, in_order(ties, axes), (), self.sums, steps)

    def put(self, values: Mapping[str, Index]) -> IndexProduct:
        return replace(
            self,
            factors=tuple((name, tuple(x.put(values) for x in labels)) for name, labels in self.factors),
            ties=tuple((a.put(values), b.put(values)) for a, b in self.ties),
            steps=tuple((a.put(values), b.put(values)) for a, b in self.steps),
        )

    def renamed(self, names: Mapping[str, str]) -> IndexProduct:
        """Rename indices, the summed ones too."""
        moved = self.put({old: Index(((new, 1),)) if new != "0" else Index() for old, new in names.items()})
        return replace(moved, sums=tuple((names.get(s, s), n) for s, n in moved.sums))

    @property
    def indices(self) -> list[Index]:
        """Every index expression in it."""
        pairs = (*self.ties, *self.steps)
        return [*(x for tie in pairs for x in tie), *(x for _, labels in self.factors for x in labels)]

    def uses(self, name: str) -> bool:
        return any(name in x.names for x in self.indices)


def canonical(p: IndexProduct, axes: Sequence[str], known: dict[str, int], avoid: Sequence[str] = ()) -> IndexProduct:
    """Name the summed indices anew, in the order in which they are met."""
    summed = dict(p.sums)
    ties = sorted(p.ties, key=lambda tie: min([axes.index(n) for x in tie for n in x.names if n in axes], default=99))
    indices = [*(x for tie in ties for x in tie), *p.indices]
    met = dict.fromkeys([*(name for x in indices for name in x.names if name in summed), *summed])
    names = dict[str, str]()
    for s in met:
        names[s] = sum_letter(summed[s], [*axes, *avoid, *names.values()], known)
    return replace(p.renamed(names), sums=tuple((names[s], summed[s]) for s in met))


def added(products: Sequence[IndexProduct], axes: Sequence[str]) -> list[IndexProduct]:
    """Add the coefficients of equal products."""
    groups: dict[tuple, list[IndexProduct]] = {}
    for p in products:
        groups.setdefault(_key(p, axes), []).append(p)
    summed = [replace(group[0], coef=sum(p.coef for p in group)) for group in groups.values()]
    return [p for p in summed if p.coef]


def _key(p: IndexProduct, axes: Sequence[str]) -> tuple:
    """What two products that differ in order, in their coefficient and in equal indices share."""
    plain = replace(canonical(p, axes, {}), coef=1.0)
    for a, b in plain.ties:
        for one, other in ((a, b), (b, a)):
            first = min((axes.index(n) if n in axes else len(axes) for n in other.names), default=-1)
            if one.plain in axes and axes.index(one.plain) < first:
                factors = tuple((n, tuple(one if x == other else x for x in labels)) for n, labels in plain.factors)
                plain = replace(plain, factors=factors)
    ties = frozenset(frozenset(map(str, tie)) for tie in plain.ties)
    factors = tuple(sorted((name, tuple(map(str, labels))) for name, labels in plain.factors))
    return factors, ties, frozenset(plain.sums), frozenset(map(str, plain.steps))


def collected(f: IndexFormula) -> IndexFormula:
    """Add equal lines of a formula."""
    axes = [name for name in (*f.out, *f.inn) if name != "0"]
    found = added([IndexProduct.read(line) for line in f.lines], axes)
    return f if len(found) == len(f.lines) else replace(f, lines=tuple(p.line(axes) for p in found))


def in_axes(f: IndexFormula, out: Sequence[str], inn: Sequence[str]) -> IndexFormula:
    """The same formula with other names of its axes."""
    axes = (*f.out, *f.inn)
    new = {a: b for a, b in zip(axes, (*out, *inn), strict=True) if a != "0"}
    lines = []
    for p in map(IndexProduct.read, f.lines):
        own = dict[str, str]()
        for s, n in p.sums:
            own[s] = sum_letter(n, [*out, *inn, *own.values()], {})
        lines.append(p.renamed({**new, **own}).line([*out, *inn]))
    return replace(f, out=tuple(out), inn=tuple(inn), lines=tuple(lines))


def is_same(a: IndexFormula, b: IndexFormula) -> bool:
    """Do two formulas differ in the order of what is added and multiplied only?"""

    def keys(f: IndexFormula) -> list[str]:
        axes = [name for name in (*f.out, *f.inn) if name != "0"]
        return sorted(str((_key(p, axes), p.coef)) for p in map(IndexProduct.read, f.lines))

    return (a.out, a.inn) == (b.out, b.inn) and keys(a) == keys(b)

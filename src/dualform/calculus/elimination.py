"""The chain rule as it is done on paper: formulas are put into each other, and each delta takes one summed index away.

    Σ_l Σ_m δ(i,l) δ(j,m) x[l,k] δ(m,n)  =  Σ_m δ(j,m) x[i,k] δ(m,n)  =  x[i,k] δ(j,n)

Every line is a `Formula`: what is printed can be read back and evaluated, and all lines of a derivation are equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dualform.calculus.notation import Formula, Line, axis_letters, in_order, letters, sum_letter


@dataclass(frozen=True)
class Move:
    """One line of a derivation, and the rule that made it of the line before."""

    formula: Formula
    reason: str


@dataclass(frozen=True)
class Link:
    """One way into a node: its local derivative after the derivative of the operand, None where that is the input itself."""

    local: Formula
    before: Formula | None
    shape: tuple[int, ...]  # the operand's


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
        return (f"{first}{shown if first else shown.removeprefix('+')}") + (
            str(self.start) if self.start < 0 and parts else ""
        )

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
class Product:
    """A `Line` whose indices can be computed with."""

    coef: float
    factors: tuple[tuple[str, tuple[Index, ...]], ...]
    ties: tuple[Tie, ...]
    sums: tuple[tuple[str, int], ...]
    steps: tuple[Tie, ...] = ()

    @classmethod
    def read(cls, line: Line) -> Product:
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

    def put(self, values: Mapping[str, Index]) -> Product:
        return replace(
            self,
            factors=tuple((name, tuple(x.put(values) for x in labels)) for name, labels in self.factors),
            ties=tuple((a.put(values), b.put(values)) for a, b in self.ties),
            steps=tuple((a.put(values), b.put(values)) for a, b in self.steps),
        )

    def renamed(self, names: Mapping[str, str]) -> Product:
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


def _product(a: Product, b: Product) -> Product:
    sums, steps = (*a.sums, *b.sums), (*a.steps, *b.steps)
    return Product(a.coef * b.coef, (*a.factors, *b.factors), (*a.ties, *b.ties), sums, steps)


def derive(
    symbol: str, links: Sequence[Link], out: Sequence[int], inn: Sequence[int], copies: bool, avoid: Sequence[str] = ()
) -> list[Move]:
    """Join the derivatives of a node's operands into the node's own: every line, each with its reason.

    copies: put in only those formulas that copy the input first, and show what is left to sum over
    avoid: letters that no index gets
    """
    names = letters(avoid)
    outs, inns = axis_letters(out, names), axis_letters(inn, names)
    sizes = dict(zip((*outs, *inns), (*out, *inn), strict=True))
    axes = (*outs, *inns)
    spoken = (*axes, *avoid)
    splits = {f.symbol: len(f.out) for link in links for f in (link.local, link.before) if f is not None}
    tensors = {k: t for link in links for f in (link.local, link.before) if f is not None for k, t in f.tensors.items()}

    def formula(products: Sequence[Product]) -> Formula:
        return Formula(symbol, outs, inns, tuple(p.line(axes) for p in products), tensors, splits)

    whole: list[Product] = []
    halfway: list[Product] = []
    full: list[Product] = []
    known: dict[str, int] = {}
    for link in links:
        if link.before is None:
            whole.append(_symbol(link.local, axes))
            halfway.append(whole[-1])
            full += _put_in(whole[-1], link.local, spoken, known)
            continue
        mid, summed = list[str](), list[tuple[str, int]]()
        for n in link.shape:
            mid.append("0" if n == 1 else sum_letter(n, [*spoken, *mid], known))
            summed += [(mid[-1], n)] if n != 1 else []
        above = replace(_symbol(link.local, (*outs, *mid)), sums=tuple(summed))
        whole.append(_product(above, _symbol(link.before, (*mid, *inns))))
        inner = _put_in(whole[-1], link.before, spoken, known)
        halfway += inner
        full += [p for q in inner for p in _put_in(q, link.local, spoken, known)]
    moves = [Move(formula(whole), "the chain rule" if len(links) == 1 else "the chain rule, one product for each path")]
    if copies:
        for shorter, _ in _eliminated(halfway, sizes):
            halfway = shorter
        moves.append(Move(formula(halfway), _summed_copies(halfway)))
        locals_ = {link.local.symbol: link.local for link in links}
        full = [p for q in halfway for p in _put_in(q, locals_[_whole_of(q, locals_)], spoken, known)]
    moves.append(Move(formula(full), "the formulas of the steps put in"))
    for products, reason in _eliminated(full, sizes):
        moves.append(Move(formula(products), reason))
        full = products
    known = {}
    ordered = [_canonical(p, axes, known, avoid) for p in full]
    if ordered != full:
        moves[-1] = replace(moves[-1], formula=formula(ordered))
    return moves


def _put_in(product: Product, f: Formula, axes: Sequence[str], known: dict[str, int]) -> list[Product]:
    """Replace a whole derivative in a product by its formula: one product for each of its lines."""
    at = next(k for k, (name, _) in enumerate(product.factors) if name == f.symbol)
    indices = product.factors[at][1]
    values = {a: b for a, b in zip((*f.out, *f.inn), indices, strict=True) if a != "0"}
    found = []
    for line in f.lines:
        own = dict[str, str]()
        for s, n in line.sums:
            own[s] = sum_letter(n, [*axes, *dict(product.sums), *own.values()], known)
        p = Product.read(line).put({**values, **{s: Index(((new, 1),)) for s, new in own.items()}})
        factors = (*product.factors[:at], *p.factors, *product.factors[at + 1 :])
        sums = (*product.sums, *((own[s], n) for s, n in line.sums))
        steps = (*product.steps, *p.steps)
        found.append(Product(product.coef * line.coef, factors, (*product.ties, *p.ties), sums, steps))
    return found


def _whole_of(product: Product, symbols: Mapping[str, Formula]) -> str:
    return next(name for name, _ in product.factors if name in symbols)


def _symbol(f: Formula, axes: Sequence[str]) -> Product:
    return Product(1.0, ((f.symbol, tuple(Index.read(x) for x in axes)),), (), ())


def _summed_copies(products: Sequence[Product]) -> str:
    left = list(dict.fromkeys(s for p in products for s, _ in p.sums))
    if not left:
        return "each delta of the copy keeps one index"
    many = len(left) > 1
    return (
        f"the sum runs over the broadcast {'axes' if many else 'axis'} {', '.join(left)}: no delta of the copy ties "
        f"{'them' if many else 'it'}, every copy contributes"
    )


def _eliminated(products: Sequence[Product], sizes: Mapping[str, int]) -> Iterator[tuple[list[Product], str]]:
    """Take one summed index away at a time, in all products that have it; then add what is equal."""
    current = list(products)
    for _ in range(64):  # every pass removes an index, a tie or a product
        for rule in (_substitute, _split, _recombine, _count):
            found = rule(current, sizes)
            if found is not None:
                break
        else:
            break
        current, reason = found
        yield current, reason
    collected = _collected(current, [name for name in sizes if name != "0"])
    if len(collected) < len(current):
        yield collected, "equal terms added"


Found = tuple[list[Product], str] | None


def _clean(p: Product, sizes: Mapping[str, int]) -> list[Product]:
    """Drop ties that always hold; a product with a tie that never holds is zero."""
    kept: list[Tie] = []
    for a, b in p.ties:
        low, high = (-1, 1) if a.table or b.table else a.minus(b).bounds(sizes)
        if low > 0 or high < 0:
            return []
        if a != b and (low, high) != (0, 0) and (a, b) not in kept and (b, a) not in kept:
            kept.append((a, b))
    gaps = [(step, *step[0].minus(step[1]).bounds(sizes)) for step in dict.fromkeys(p.steps)]
    if any(high < 0 for _, _, high in gaps):
        return []
    return [replace(p, ties=tuple(kept), steps=tuple(step for step, low, _ in gaps if low < 0))]


def _all(p: Product, sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, **dict(p.sums)}


def _substitute(products: Sequence[Product], sizes: Mapping[str, int]) -> Found:
    """Σ_s δ(s, e) f(s) = f(e), where e stays in the range of s."""
    for s in dict.fromkeys(name for p in products for name, _ in p.sums):
        result: list[Product] = []
        said: list[str] = []
        for p in products:
            value = _value_of(p, s, _all(p, sizes))
            if value is None:
                result.append(p)
                continue
            tie, e = value
            rest = replace(p, ties=tuple(t for t in p.ties if t is not tie), sums=tuple(x for x in p.sums if x[0] != s))
            result += _clean(rest.put({s: e}), _all(p, sizes))
            said.append(f"Σ_{s} δ({tie[0]},{tie[1]}) leaves {s} = {e}")
        if said:
            return result, "; ".join(dict.fromkeys(said))
    return None


def _value_of(p: Product, s: str, sizes: Mapping[str, int]) -> tuple[Tie, Index] | None:
    if s not in dict(p.sums):
        return None
    for tie in p.ties:
        for one, other in (tie, tie[::-1]):
            if one.plain == s and s not in other.names and (not other.table or _can_look_up(p, s, tie)):
                low, high = other.bounds(sizes)
                if low >= 0 and high < sizes[s]:
                    return tie, other
    return None


def _can_look_up(p: Product, s: str, tie: Tie) -> bool:
    """Does an index stand by itself wherever it stands, so that a table's entry can take its place?"""
    others = [x for x in p.indices if s in x.names and not any(x is end for end in tie)]
    inside = [y for x in p.indices for y in x.at if s in y.names]
    return all(x.plain == s for x in others) and not inside and not any(s in x.names for t in p.steps for x in t)


def _split(products: Sequence[Product], sizes: Mapping[str, int]) -> Found:
    """δ(c a + b, c d + e) = δ(a, d) δ(b, e), where b and e are smaller than c: digits are equal one by one."""
    for k, p in enumerate(products):
        known = _all(p, sizes)
        for tie in p.ties:
            parts = _digits(tie, known)
            if parts:
                new = replace(p, ties=tuple(x for t in p.ties for x in (parts if t is tie else (t,))))
                shown = " ".join(f"δ({a},{b})" for a, b in parts)
                return [*products[:k], *_clean(new, known), *products[k + 1 :]], (
                    f"δ({tie[0]},{tie[1]}) = {shown}: equal numbers have equal digits"
                )
    return None


def _digits(tie: Tie, sizes: Mapping[str, int]) -> tuple[Tie, ...]:
    a, b = tie
    if a.table or b.table or any(step < 0 for x in tie for _, step in x.steps):
        return ()
    if len(a.steps) < 2 or len(b.steps) < 2:
        return ()
    c = max(step for _, step in a.steps)
    if c != max(step for _, step in b.steps):
        return ()
    highs = [Index(tuple((n, s // c) for n, s in x.steps if s % c == 0)) for x in (a, b)]
    lows = [Index(tuple((n, s) for n, s in x.steps if s % c), x.start) for x in (a, b)]
    if any(low.bounds(sizes)[0] < 0 or low.bounds(sizes)[1] >= c for low in lows):
        return ()
    return ((highs[0], highs[1]), (lows[0], lows[1]))


def _recombine(products: Sequence[Product], sizes: Mapping[str, int]) -> Found:
    """Σ_a Σ_b δ(i, c a + b) f(c a + b) = f(i), where c a + b runs over all that i can be, once."""
    for k, p in enumerate(products):
        known = _all(p, sizes)
        for tie in p.ties:
            for plain, digits in (tie, tie[::-1]):
                if not plain.plain or len(digits.steps) < 2 or not _covers(digits, dict(p.sums), known[plain.plain]):
                    continue
                rest = replace(p, ties=tuple(t for t in p.ties if t is not tie))
                moved = replace(
                    rest,
                    factors=tuple((n, tuple(plain if x == digits else x for x in labels)) for n, labels in p.factors),
                    ties=tuple((plain if a == digits else a, plain if b == digits else b) for a, b in rest.ties),
                )
                if any(moved.uses(name) for name in digits.names):
                    continue
                moved = replace(moved, sums=tuple(x for x in moved.sums if x[0] not in digits.names))
                return [*products[:k], *_clean(moved, known), *products[k + 1 :]], (
                    f"{digits} takes each value of {plain} once"
                )
    return None


def _covers(digits: Index, sums: Mapping[str, int], size: int) -> bool:
    """Does a mixed-radix number of summed digits run over 0 ... size - 1, once each?"""
    reach = 1
    for name, step in sorted(digits.steps, key=lambda pair: pair[1]):
        if name not in sums or step != reach:
            return False
        reach *= sums[name]
    return reach == size and digits.start == 0


def _count(products: Sequence[Product], sizes: Mapping[str, int]) -> Found:
    """A sum over an index that nothing has is a factor."""
    for k, p in enumerate(products):
        for s, n in p.sums:
            if not p.uses(s):
                new = replace(p, coef=p.coef * n, sums=tuple(x for x in p.sums if x[0] != s))
                return [*products[:k], new, *products[k + 1 :]], f"nothing depends on {s}: Σ_{s} is a factor {n}"
    return None


def _canonical(p: Product, axes: Sequence[str], known: dict[str, int], avoid: Sequence[str] = ()) -> Product:
    """Name the summed indices anew, in the order in which they are met."""
    summed = dict(p.sums)
    ties = sorted(p.ties, key=lambda tie: min([axes.index(n) for x in tie for n in x.names if n in axes], default=99))
    indices = [*(x for tie in ties for x in tie), *p.indices]
    met = dict.fromkeys([*(name for x in indices for name in x.names if name in summed), *summed])
    names = dict[str, str]()
    for s in met:
        names[s] = sum_letter(summed[s], [*axes, *avoid, *names.values()], known)
    return replace(p.renamed(names), sums=tuple((names[s], summed[s]) for s in met))


def _collected(products: Sequence[Product], axes: Sequence[str]) -> list[Product]:
    """Add the coefficients of equal products."""
    groups: dict[tuple, list[Product]] = {}
    for p in products:
        groups.setdefault(_key(p, axes), []).append(p)
    summed = [replace(group[0], coef=sum(p.coef for p in group)) for group in groups.values()]
    return [p for p in summed if p.coef]


def _key(p: Product, axes: Sequence[str]) -> tuple:
    """What two products that differ in order, in their coefficient and in equal indices share."""
    plain = replace(_canonical(p, axes, {}), coef=1.0)
    for a, b in plain.ties:
        for one, other in ((a, b), (b, a)):
            if one.plain in axes and axes.index(one.plain) < min(
                (axes.index(n) if n in axes else len(axes) for n in other.names), default=-1
            ):
                factors = tuple((n, tuple(one if x == other else x for x in labels)) for n, labels in plain.factors)
                plain = replace(plain, factors=factors)
    ties = frozenset(frozenset(map(str, tie)) for tie in plain.ties)
    factors = tuple(sorted((name, tuple(map(str, labels))) for name, labels in plain.factors))
    return factors, ties, frozenset(plain.sums), frozenset(map(str, plain.steps))


def collected(f: Formula) -> Formula:
    """Add equal lines of a formula."""
    axes = [name for name in (*f.out, *f.inn) if name != "0"]
    found = _collected([Product.read(line) for line in f.lines], axes)
    return f if len(found) == len(f.lines) else replace(f, lines=tuple(p.line(axes) for p in found))


def in_axes(f: Formula, out: Sequence[str], inn: Sequence[str]) -> Formula:
    """The same formula with other names of its axes."""
    axes = (*f.out, *f.inn)
    new = {a: b for a, b in zip(axes, (*out, *inn), strict=True) if a != "0"}
    lines = []
    for p in map(Product.read, f.lines):
        own = dict[str, str]()
        for s, n in p.sums:
            own[s] = sum_letter(n, [*out, *inn, *own.values()], {})
        lines.append(p.renamed({**new, **own}).line([*out, *inn]))
    return replace(f, out=tuple(out), inn=tuple(inn), lines=tuple(lines))


def is_same(a: Formula, b: Formula) -> bool:
    """Do two formulas differ in the order of what is added and multiplied only?"""

    def keys(f: Formula) -> list[str]:
        axes = [name for name in (*f.out, *f.inn) if name != "0"]
        return sorted(str((_key(p, axes), p.coef)) for p in map(Product.read, f.lines))

    return (a.out, a.inn) == (b.out, b.inn) and keys(a) == keys(b)

"""Deltas take summed indices away, one at a time, and what is left is added up.

Σ_l Σ_m δ(i,l) δ(j,m) x[l,k] δ(m,n)  =  Σ_m δ(j,m) x[i,k] δ(m,n)  =  x[i,k] δ(j,n)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dualform.algebra.index_products import Index, IndexProduct, Tie, added


def eliminated(products: Sequence[IndexProduct], sizes: Mapping[str, int]) -> Iterator[tuple[list[IndexProduct], str]]:
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
    collected = added(current, [name for name in sizes if name != "0"])
    if len(collected) < len(current):
        yield collected, "equal terms added"


Found = tuple[list[IndexProduct], str] | None


def _clean(p: IndexProduct, sizes: Mapping[str, int]) -> list[IndexProduct]:
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


def _all(p: IndexProduct, sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, **dict(p.sums)}


def _substitute(products: Sequence[IndexProduct], sizes: Mapping[str, int]) -> Found:
    """Σ_s δ(s, e) f(s) = f(e), where e stays in the range of s."""
    for s in dict.fromkeys(name for p in products for name, _ in p.sums):
        result: list[IndexProduct] = []
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


def _value_of(p: IndexProduct, s: str, sizes: Mapping[str, int]) -> tuple[Tie, Index] | None:
    if s not in dict(p.sums):
        return None
    for tie in p.ties:
        for one, other in (tie, tie[::-1]):
            if one.plain == s and s not in other.names and (not other.table or _can_look_up(p, s, tie)):
                low, high = other.bounds(sizes)
                if low >= 0 and high < sizes[s]:
                    return tie, other
    return None


def _can_look_up(p: IndexProduct, s: str, tie: Tie) -> bool:
    """Does an index stand by itself wherever it stands, so that a table's entry can take its place?"""
    others = [x for x in p.indices if s in x.names and not any(x is end for end in tie)]
    inside = [y for x in p.indices for y in x.at if s in y.names]
    return all(x.plain == s for x in others) and not inside and not any(s in x.names for t in p.steps for x in t)


def _split(products: Sequence[IndexProduct], sizes: Mapping[str, int]) -> Found:
    """δ(c a + b, c d + e) = δ(a, d) δ(b, e), where b and e are smaller than c: digits are equal one by one."""
    for k, p in enumerate(products):
        known = _all(p, sizes)
        for tie in p.ties:
            parts = _digits(tie, known)
            if parts:
                new = replace(p, ties=tuple(x for t in p.ties for x in (parts if t is tie else (t,))))
                shown = " ".join(f"δ({a},{b})" for a, b in parts)
                said = f"δ({tie[0]},{tie[1]}) = {shown}: equal numbers have equal digits"
                return [*products[:k], *_clean(new, known), *products[k + 1 :]], said
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


def _recombine(products: Sequence[IndexProduct], sizes: Mapping[str, int]) -> Found:
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
                said = f"{digits} takes each value of {plain} once"
                return [*products[:k], *_clean(moved, known), *products[k + 1 :]], said
    return None


def _covers(digits: Index, sums: Mapping[str, int], size: int) -> bool:
    """Does a mixed-radix number of summed digits run over 0 ... size - 1, once each?"""
    reach = 1
    for name, step in sorted(digits.steps, key=lambda pair: pair[1]):
        if name not in sums or step != reach:
            return False
        reach *= sums[name]
    return reach == size and digits.start == 0


def _count(products: Sequence[IndexProduct], sizes: Mapping[str, int]) -> Found:
    """A sum over an index that nothing has is a factor."""
    for k, p in enumerate(products):
        for s, n in p.sums:
            if not p.uses(s):
                new = replace(p, coef=p.coef * n, sums=tuple(x for x in p.sums if x[0] != s))
                return [*products[:k], new, *products[k + 1 :]], f"nothing depends on {s}: Σ_{s} is a factor {n}"
    return None

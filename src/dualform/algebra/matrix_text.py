"""Sums of products of tensors with at most two axes, in matrix notation: what a reader of the matrix cookbook expects.

    Σ_k B[j,k] A[k,i] = (A^T B^T)[i,j]        Σ_k x[k] A[k,i] + Σ_k A[i,k] x[k] = ((A + A^T) x)[i]

A summed index that two factors have is a matrix product, one that a vector has beside two matrices a diagonal between
them; indices that stay are rows and columns. Every piece has its numbers beside its text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from dualform.algebra.index_text import number, tex
from dualform.algebra.matrix_pieces import (
    ONE,
    Atom,
    MatrixChain,
    Piece,
    diagonal,
    diagonal_of,
    divided_by,
    entrywise,
    leaf,
    power_text,
)

_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


class NoMatrixForm(Exception):
    """A product that no chain of matrices says."""


@dataclass(frozen=True)
class MatrixTerm:
    """coef * numbers * chain; without a chain a number."""

    coef: float
    scalar: Atom
    chain: MatrixChain | None

    @property
    def value(self) -> Tensor:
        body = self.scalar.value * self.coef
        return body if self.chain is None else body * self.chain.value

    @property
    def key(self) -> tuple[str, str | None]:
        return self.scalar.text, None if self.chain is None else self.chain.text


Item = tuple[MatrixChain, tuple[Hashable, ...]]


def contracted(
    coef: float,
    atoms: Sequence[tuple[Atom, Sequence[Hashable]]],
    free: Sequence[Hashable],
    sizes: Mapping[Hashable, int],
) -> MatrixTerm:
    """Write a product of atoms at indices, summed over all but the free ones, as a chain of matrices.

    free: up to two, rows then columns; the same twice is a diagonal
    """
    numbers: list[tuple[Atom, int]] = [(ONE, 1)]
    items: list[Item] = []
    for atom, at in atoms:
        if not at:
            numbers.append((atom, 1))
        else:
            items.append((MatrixChain(((atom, False),), 0), tuple(at)))
    inner = {x for _, at in items for x in at} - set(free)
    while inner:
        before = len(inner)
        for k in sorted(inner, key=lambda k: sum(k in at for _, at in items)):
            if _summed(items, k, numbers, free, sizes):
                inner = {x for _, at in items for x in at} - set(free)
                break
        if len(inner) == before:
            raise NoMatrixForm
    chain = _of_free(items, tuple(free), sizes)
    return MatrixTerm(coef, entrywise(numbers), chain)


def _summed(
    items: list[Item],
    k: Hashable,
    numbers: list[tuple[Atom, int]],
    free: Sequence[Hashable],
    sizes: Mapping[Hashable, int],
) -> bool:
    """Sum over one index, where the factors that have it allow it."""
    mine = [item for item in items if k in item[1]]
    vectors = [c for c, at in mine if at == (k,)]
    double = [c for c, at in mine if len(at) == 2 and set(at) == {k}]
    matrices = [(c if at[0] == k else c.T, at[1] if at[0] == k else at[0]) for c, at in mine if set(at) != {k}]
    ones = MatrixChain(((Atom("𝟏", torch.ones(sizes[k], 1, dtype=mine[0][0].value.dtype)), False),), 0)
    made: list[Item] = []
    if double:
        if len(double) > 1 or vectors or matrices:
            return False
        numbers.append((_trace(double[0]), 1))
    elif len(matrices) == 0:
        if len(vectors) == 1:
            numbers.append((_number(ones.T.after(vectors[0])), 1))
        elif len(vectors) == 2:
            numbers.append((_number(vectors[0].T.after(vectors[1])), 1))
        else:
            first = _vector(vectors[:-1])
            numbers.append((_number(first.T.after(vectors[-1])), 1))
    elif len(matrices) == 1:
        (M, other), by = matrices[0], _vector(vectors) if vectors else ones
        made.append((M.T.after(by), (other,)))
    elif len(matrices) == 2:
        (M, a), (N, b) = matrices
        between = MatrixChain(((diagonal(_vector(vectors)), False),), 0) if vectors else MatrixChain((), sizes[k])
        if a != b:
            made.append((M.T.after(between).after(N), (a, b)))
        elif a not in free and sum(a in at for _, at in items) == 2:
            numbers.append((_trace(M.T.after(between).after(N)), 1))
        else:
            both = MatrixChain(((entrywise([(M.T.atom, 1), (N.T.atom, 1)]), False),), 0)
            made.append((both.after(_vector(vectors) if vectors else ones), (a,)))
    else:
        ends = {other for _, other in matrices}
        if len(ends) == len(matrices):
            return False
        twice = next(e for e in ends if sum(e == other for _, other in matrices) > 1)
        merged = [M for M, other in matrices if other == twice]
        both = MatrixChain(((entrywise([(M.atom, 1) for M in merged]), False),), 0)
        kept = [item for item in items if not (k in item[1] and twice in item[1])]
        items[:] = [*kept, (both, (k, twice))]
        return _summed(items, k, numbers, free, sizes)
    items[:] = [*(item for item in items if k not in item[1]), *made]
    return True


def _vector(vectors: Sequence[MatrixChain]) -> MatrixChain:
    if len(vectors) == 1:
        return vectors[0]
    return MatrixChain(((entrywise([(v.atom, 1) for v in vectors]), False),), 0)


def _number(c: MatrixChain) -> Atom:
    """A chain from a row to a column, read from the side that comes first."""
    first = min(c, c.T, key=lambda x: (sum(t for _, t in x.pieces), x.text))
    return Atom(first.text, c.value, False)


def _trace(c: MatrixChain) -> Atom:
    """The same, whatever piece it begins at, read from either side."""
    turns = [MatrixChain((*x.pieces[k:], *x.pieces[:k]), 0) for x in (c, c.T) for k in range(len(c.pieces))]
    first = min(turns or [c], key=lambda x: (sum(t for _, t in x.pieces), len(x.text), x.text))
    return Atom(f"tr({first.text})", c.value.trace().reshape(1, 1), True)


def _of_free(items: Sequence[Item], free: tuple[Hashable, ...], sizes: Mapping[Hashable, int]) -> MatrixChain | None:
    if not free:
        return None

    def ones(x: Hashable) -> MatrixChain:
        like = items[0][0].value.dtype if items else torch.float64
        return MatrixChain(((Atom("𝟏", torch.ones(sizes[x], 1, dtype=like)), False),), 0)

    def vector(x: Hashable) -> MatrixChain | None:
        found = [c for c, at in items if at == (x,)]
        if any(set(at) == {x} and len(at) == 2 for _, at in items):
            raise NoMatrixForm
        return _vector(found) if found else None

    if len(free) == 1:
        return vector(free[0]) or ones(free[0])
    i, j = free
    if i == j:
        v = vector(i)
        return MatrixChain(((diagonal(v), False),), 0) if v else MatrixChain((), sizes[i])
    u, v = vector(i), vector(j)
    whole = [c if at == (i, j) else c.T for c, at in items if len(at) == 2]
    if not whole:
        return (u or ones(i)).after((v or ones(j)).T)
    M = whole[0] if len(whole) == 1 else MatrixChain(((entrywise([(c.atom, 1) for c in whole]), False),), 0)
    if u:
        M = MatrixChain(((diagonal(u), False),), 0).after(M)
    return M.after(MatrixChain(((diagonal(v), False),), 0)) if v else M


def added(terms: Sequence[MatrixTerm]) -> list[MatrixTerm]:
    """Add what has one text; positive products first, then those with fewer transposes."""
    groups: dict[tuple, list[MatrixTerm]] = {}
    for term in terms:
        groups.setdefault(term.key, []).append(term)
    summed = [replace(group[0], coef=sum(t.coef for t in group)) for group in groups.values()]
    kept = [t for t in summed if abs(t.coef) > 1e-14]
    return sorted(kept, key=lambda t: (t.coef < 0, sum(turned for _, turned in t.chain.pieces) if t.chain else 0))


def text_of(terms: Sequence[MatrixTerm]) -> str:
    """The sum, with what products share in front of a bracket or behind it."""
    terms = gathered(terms)
    if len(terms) < 2:
        return _product(terms[0]) if terms else "0"
    first = terms[0]
    if first.chain is None:
        return " + ".join(map(_product, terms)).replace("+ -", "- ")
    parts = [{(p.text, power): (p, power) for p, power in t.scalar.parts if p.text != "𝟏"} for t in terms]
    common = [pair for key, pair in parts[0].items() if all(key in other for other in parts)]
    coef = abs(first.coef) if all(abs(abs(t.coef) - abs(first.coef)) < 1e-12 for t in terms) else 1.0
    if common or coef != 1:
        under = [(p, -power) for p, power in common]
        inner = [replace(t, coef=t.coef / coef, scalar=entrywise([(t.scalar, 1), *under, (ONE, 1)])) for t in terms]
        chain = MatrixChain(((_sum(inner), False),), 0)
        return _product(MatrixTerm(coef, entrywise([*common, (ONE, 1)]), chain))
    return " + ".join(map(_product, terms)).replace("+ -", "- ")


def gathered(terms: Sequence[MatrixTerm]) -> list[MatrixTerm]:
    """Draw out what several products begin or end with, or have as an entrywise part, until none share any."""
    found = list(terms)
    for _ in range(len(terms)):
        for share in (_last, _first, _part):
            for k, term in enumerate(found):
                group = [t for t in found[k:] if _is_alike(t, term)]
                made = share(group)
                if made is not None:
                    rest = [t for t in found if not any(t is g for g in made[0])]
                    found = sorted([*rest, made[1]], key=lambda t: t.coef < 0)
                    break
            else:
                continue
            break
        else:
            break
    return found


def _is_alike(a: MatrixTerm, b: MatrixTerm) -> bool:
    """Have two products the same number before them, up to its sign?"""
    same = abs(abs(a.coef) - abs(b.coef)) < 1e-12 and a.scalar.text == b.scalar.text
    return same and a.chain is not None and b.chain is not None


def _tag(piece: Piece) -> tuple:
    return piece[0].text, piece[0].inverse, piece[1]


def _sum(terms: Sequence[MatrixTerm]) -> Atom:
    """A sum in brackets."""
    terms = added(terms)
    shown = text_of(terms)
    total = sum((t.value for t in terms[1:]), terms[0].value)
    return leaf(shown if len(terms) == 1 else f"({shown})", total, len(terms) > 1)


Group = tuple[list[MatrixTerm], MatrixTerm] | None


def _last(group: Sequence[MatrixTerm]) -> Group:
    """A x + B x = (A + B) x."""
    longer = [t for t in group if t.chain and len(t.chain.pieces) > 1]
    mine = [
        t
        for t in longer
        if t.chain and longer[0].chain and _tag(t.chain.pieces[-1]) == _tag(longer[0].chain.pieces[-1])
    ]
    return _drawn(mine, lambda c: MatrixChain(c.pieces[:-1], 0), lambda inner, c: (*inner, c.pieces[-1]))


def _first(group: Sequence[MatrixTerm]) -> Group:
    """A x + A y = A (x + y)."""
    longer = [t for t in group if t.chain and len(t.chain.pieces) > 1]
    mine = [
        t for t in longer if t.chain and longer[0].chain and _tag(t.chain.pieces[0]) == _tag(longer[0].chain.pieces[0])
    ]
    return _drawn(mine, lambda c: MatrixChain(c.pieces[1:], 0), lambda inner, c: (c.pieces[0], *inner))


def _drawn(
    mine: list[MatrixTerm],
    rest: Callable[[MatrixChain], MatrixChain],
    whole: Callable[[tuple[Piece, ...], MatrixChain], tuple[Piece, ...]],
) -> Group:
    if len(mine) < 2 or mine[0].chain is None:
        return None
    coef = abs(mine[0].coef)
    if all(t.coef < 0 for t in mine):
        coef = -coef
    inner = gathered(added([MatrixTerm(t.coef / coef, ONE, rest(t.chain)) for t in mine if t.chain]))
    if len(inner) == 1 and inner[0].coef == 1 and inner[0].chain:
        pieces = inner[0].chain.pieces
    else:
        pieces = ((_sum(inner), False),)
    return mine, replace(mine[0], coef=coef, chain=MatrixChain(whole(pieces, mine[0].chain), 0))


def _part(group: Sequence[MatrixTerm]) -> Group:
    """a ∘ b + a ∘ c = a ∘ (b + c), and of diagonals the diagonal."""
    alone = [t for t in group if t.chain and len(t.chain.pieces) == 1 and not t.chain.pieces[0][1]]
    diagonals = [t for t in alone if t.chain and t.chain.pieces[0][0].inner is not None]
    if len(diagonals) > 1:
        coef = abs(diagonals[0].coef)
        inner = [
            MatrixTerm(t.coef / coef, ONE, MatrixChain(((t.chain.pieces[0][0].inner, False),), 0))
            for t in diagonals
            if t.chain and t.chain.pieces[0][0].inner
        ]
        made = diagonal_of(replace(_sum(inner), tight=True))
        return diagonals, replace(diagonals[0], coef=coef, chain=MatrixChain(((made, False),), 0))
    for t in alone:
        for part, power in t.chain.pieces[0][0].powers if t.chain else ():
            own = [
                u
                for u in alone
                if u.chain and any(p.text == part.text and n >= power > 0 for p, n in u.chain.pieces[0][0].powers)
            ]
            if len(own) > 1:
                coef = abs(own[0].coef)
                inner = [
                    MatrixTerm(
                        u.coef / coef,
                        ONE,
                        MatrixChain(((entrywise([(u.chain.pieces[0][0], 1), (part, -power)]), False),), 0),
                    )
                    for u in own
                    if u.chain
                ]
                made = entrywise([(part, power), (_sum(inner), 1)])
                return own, replace(own[0], coef=coef, chain=MatrixChain(((made, False),), 0))
    return None


def _product(term: MatrixTerm) -> str:
    """2 s A x, and -(A x)/(2 s) as people divide."""
    scalar, body = term.scalar, None if term.chain is None else term.chain.text
    above = [p for p in scalar.parts if p[1] > 0 and p[0].text != "𝟏"]
    below = [p for p in scalar.parts if p[1] < 0]
    size, sign = Fraction(abs(term.coef)).limit_denominator(4096), "-" if term.coef < 0 else ""
    is_exact = math.isclose(abs(term.coef), size, rel_tol=1e-12)
    top, _, bottom = str(size).partition("/") if is_exact else number(abs(term.coef)).partition("/")
    shown = [] if top == "1" else [top]
    shown += [power_text(*p) for p in above]
    shown += [] if body is None else [body]
    text = " ".join(shown) or "1"
    return sign + text + divided_by([bottom] * bool(bottom) + [power_text(p, -power) for p, power in below])


_LATEX = {
    "⁻ᵀ": r"^{-\top}", "⁻¹": "^{-1}", "ᵀ": r"^{\top}", "∘": r"\circ", "⊘": r"\oslash", "𝟏": r"\mathbf{1}",
    "⊗": r"\otimes",
    **{c: f"_{{{k}}}" for k, c in enumerate("₀₁₂₃₄")},
}  # fmt: skip


def in_latex(text: str) -> str:
    """The same in LaTeX."""
    bars = iter([r"\lVert ", r" \rVert"] * text.count("‖"))
    text = re.sub("‖", lambda _: next(bars), text)
    text = re.sub(r"(?<![\\\w])[A-Za-z_][A-Za-z_0-9']*", lambda m: tex(m[0]), text)
    for plain, written in _LATEX.items():
        text = text.replace(plain, written)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0].translate(_PLAIN)}}}", text)
    return text.replace(" ", r"\,").replace(r"\lVert\,", r"\lVert ").replace(r"\,\rVert", r"\rVert")

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
from functools import reduce

import torch
from torch import Tensor

from dualform.algebra.index_text import number, tex

# Ones, of a vector and of a matrix.
_ONES = ("𝟏", "𝟏 𝟏ᵀ")
# Superscripts: of a transpose, an inverse, and an inverse transposed.
_MARKS = {(False, False): "", (True, False): "ᵀ", (False, True): "⁻¹", (True, True): "⁻ᵀ"}
_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


class NoMatrixForm(Exception):
    """A product that no chain of matrices says."""


@dataclass(frozen=True)
class Atom:
    """A text with its numbers, two axes of them: (n, m) a matrix, (n, 1) a vector, (1, 1) a number.

    powers: of an entrywise product, its parts and their exponents; inverse: is it that of what `text` is? inner: of a
    diagonal matrix, the vector; made: the product that it is
    """

    text: str
    value: Tensor
    tight: bool = True
    symmetric: bool = False
    inverse: bool = False
    powers: tuple[tuple[Atom, int], ...] = ()
    inner: Atom | None = None
    made: Chain | None = None

    @property
    def bracketed(self) -> str:
        """The text as a part of a product."""
        return self.text if self.tight else f"({self.text})"

    @property
    def parts(self) -> tuple[tuple[Atom, int], ...]:
        return self.powers or ((self, 1),)

    @property
    def is_vector(self) -> bool:
        return self.value.shape[1] == 1

    @property
    def T(self) -> Atom | None:
        """The transpose, where it is more than a mark."""
        if self.symmetric or self.is_vector:
            return self if self.symmetric else None
        if self.made is not None:
            return self.made.T.atom
        if self.powers:
            return entrywise([(Chain(((part, False),), 0).T.atom, power) for part, power in self.powers])
        return None


def leaf(text: str, t: Tensor, tight: bool = True, symmetric: bool = False, inverse: bool = False) -> Atom:
    """A text for a tensor of at most two axes."""
    shape = (*t.shape, *[1] * (2 - t.ndim))
    return Atom(text, t.reshape(shape).to(torch.float64), tight, symmetric, inverse)


def powered(base: Atom, exponent: int) -> Atom:
    """Entry by entry, to a power."""
    return entrywise([(base, exponent)])


def entrywise(parts: Sequence[tuple[Atom, int]]) -> Atom:
    """Multiply entry by entry; equal parts become powers."""
    found: dict[str, tuple[Atom, int]] = {}
    for outer, times in parts:
        for part, power in outer.parts:
            key = part.text + _MARKS[False, part.inverse]
            found[key] = (part, found.get(key, (part, 0))[1] + power * times)
    kept = tuple((part, power) for part, power in found.values() if power and part.text not in _ONES)
    shape = torch.broadcast_shapes(*(part.value.shape for part, _ in parts))
    one = torch.ones(shape, dtype=parts[0][0].value.dtype)
    value = reduce(torch.mul, (part.value**power for part, power in kept), one)
    if not kept:
        return Atom("𝟏", value) if shape[1] == 1 else Atom("𝟏 𝟏ᵀ", value, False, True)
    if len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    above = [_power(part, power) for part, power in kept if power > 0]
    below = [_power(part, -power) for part, power in kept if power < 0]
    below = [f"({x})" if " ∘ " in x and shape != (1, 1) else x for x in below]
    if shape == (1, 1):
        text = " ".join(above) or "1"
        text += _under(below)
    else:
        text = " ∘ ".join(above) or ("𝟏" if shape[1] == 1 else "(𝟏 𝟏ᵀ)")
        text += "".join(f" ⊘ {x}" for x in below)
    tight = len(kept) == 1 and kept[0][1] > 0 and shape == (1, 1)
    return Atom(text, value, tight, powers=kept)


def _power(part: Atom, power: int) -> str:
    shown = part.bracketed + _MARKS[False, part.inverse]
    if power == 1:
        return shown
    if part.is_vector and part.value.shape[0] == 1:
        return f"{shown}{str(power).translate(_DIGITS)}"
    return " ∘ ".join([shown] * power)


Piece = tuple[Atom, bool]


@dataclass(frozen=True)
class Chain:
    """A product of matrices, each as it is or transposed; without any the identity of a size."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def T(self) -> Chain:
        turned = ((a, t, None if t else a.T) for a, t in reversed(self.pieces))
        return Chain(tuple((other, False) if other else (a, not t) for a, t, other in turned), self.cols)

    @property
    def rows(self) -> int:
        return _shape(self.pieces[0])[0] if self.pieces else self.size

    @property
    def cols(self) -> int:
        return _shape(self.pieces[-1])[1] if self.pieces else self.size

    def after(self, other: Chain) -> Chain:
        """The product, itself on the left."""
        pieces = list(self.pieces)
        for piece in other.pieces:
            if pieces and _cancel(pieces[-1], piece):
                pieces.pop()
            else:
                pieces.append(piece)
        return Chain(tuple(pieces), other.cols if pieces else self.rows)

    @property
    def value(self) -> Tensor:
        like = self.pieces[0][0].value if self.pieces else torch.ones((), dtype=torch.float64)
        eye = torch.eye(self.rows, dtype=like.dtype)
        return reduce(torch.matmul, (a.value.mT if t else a.value for a, t in self.pieces), eye)

    @property
    def text(self) -> str:
        """A X^T b, powers for repeats."""
        shown: list[str] = []
        runs: list[tuple[Piece, int]] = []
        for piece in self.pieces:
            same = runs and (runs[-1][0][0].text, runs[-1][0][0].inverse, runs[-1][0][1]) == (
                piece[0].text, piece[0].inverse, piece[1],
            ) and not piece[0].is_vector  # fmt: skip
            runs[-1:] = [(piece, runs[-1][1] + 1)] if same else [*runs[-1:], (piece, 1)]
        alone = len(runs) == 1
        for (a, t), times in runs:
            mark = _MARKS[t, a.inverse]
            text = a.text if a.tight or (alone and not mark and times == 1) else f"({a.text})"
            shown.append(
                text + mark
                if times == 1
                else f"({text}{mark}){str(times).translate(_DIGITS)}"
                if mark
                else f"{text}{str(times).translate(_DIGITS)}"
            )
        return " ".join(shown) or "I"

    @property
    def atom(self) -> Atom:
        """As one piece of a larger product."""
        if len(self.pieces) == 1 and not self.pieces[0][1]:
            return self.pieces[0][0]
        same = self.text == self.T.text and not self.pieces[0][0].is_vector if self.pieces else True
        tight = len(self.pieces) < 2 and not (self.pieces and not self.pieces[0][0].tight)
        return Atom(self.text, self.value, tight, same, made=self)


def _shape(piece: Piece) -> tuple[int, int]:
    n, m = piece[0].value.shape
    return (m, n) if piece[1] else (n, m)


def _cancel(a: Piece, b: Piece) -> bool:
    """Is one the inverse of the other?"""
    turned = a[1] == b[1] or a[0].symmetric
    return a[0].text == b[0].text and a[0].inverse != b[0].inverse and turned


@dataclass(frozen=True)
class MatrixTerm:
    """coef * numbers * chain; without a chain a number."""

    coef: float
    scalar: Atom
    chain: Chain | None

    @property
    def value(self) -> Tensor:
        body = self.scalar.value * self.coef
        return body if self.chain is None else body * self.chain.value

    @property
    def key(self) -> tuple[str, str | None]:
        return self.scalar.text, None if self.chain is None else self.chain.text


Item = tuple[Chain, tuple[Hashable, ...]]
_ONE = Atom("𝟏", torch.ones(1, 1, dtype=torch.float64))


def contracted(
    coef: float,
    atoms: Sequence[tuple[Atom, Sequence[Hashable]]],
    free: Sequence[Hashable],
    sizes: Mapping[Hashable, int],
) -> MatrixTerm:
    """Write a product of atoms at indices, summed over all but the free ones, as a chain of matrices.

    free: up to two, rows then columns; the same twice is a diagonal
    """
    numbers: list[tuple[Atom, int]] = [(_ONE, 1)]
    items: list[Item] = []
    for atom, at in atoms:
        if not at:
            numbers.append((atom, 1))
        else:
            items.append((Chain(((atom, False),), 0), tuple(at)))
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
    ones = Chain(((Atom("𝟏", torch.ones(sizes[k], 1, dtype=mine[0][0].value.dtype)), False),), 0)
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
        between = Chain(((_diagonal(_vector(vectors)), False),), 0) if vectors else Chain((), sizes[k])
        if a != b:
            made.append((M.T.after(between).after(N), (a, b)))
        elif a not in free and sum(a in at for _, at in items) == 2:
            numbers.append((_trace(M.T.after(between).after(N)), 1))
        else:
            both = Chain(((entrywise([(M.T.atom, 1), (N.T.atom, 1)]), False),), 0)
            made.append((both.after(_vector(vectors) if vectors else ones), (a,)))
    else:
        ends = {other for _, other in matrices}
        if len(ends) == len(matrices):
            return False
        twice = next(e for e in ends if sum(e == other for _, other in matrices) > 1)
        merged = [M for M, other in matrices if other == twice]
        both = Chain(((entrywise([(M.atom, 1) for M in merged]), False),), 0)
        kept = [item for item in items if not (k in item[1] and twice in item[1])]
        items[:] = [*kept, (both, (k, twice))]
        return _summed(items, k, numbers, free, sizes)
    items[:] = [*(item for item in items if k not in item[1]), *made]
    return True


def _vector(vectors: Sequence[Chain]) -> Chain:
    if len(vectors) == 1:
        return vectors[0]
    return Chain(((entrywise([(v.atom, 1) for v in vectors]), False),), 0)


def _diagonal(v: Chain) -> Atom:
    return diagonal_of(v.atom)


def diagonal_of(v: Atom) -> Atom:
    """diag(v)."""
    inside = v.text[1:-1] if v.tight and v.text.startswith("(") else v.text + _MARKS[False, v.inverse]
    return Atom(f"diag({inside})", v.value[:, 0].diag(), True, True, inner=v)


def _number(c: Chain) -> Atom:
    """A chain from a row to a column, read from the side that comes first."""
    first = min(c, c.T, key=lambda x: (sum(t for _, t in x.pieces), x.text))
    return Atom(first.text, c.value, False)


def _trace(c: Chain) -> Atom:
    """The same, whatever piece it begins at, read from either side."""
    turns = [Chain((*x.pieces[k:], *x.pieces[:k]), 0) for x in (c, c.T) for k in range(len(c.pieces))]
    first = min(turns or [c], key=lambda x: (sum(t for _, t in x.pieces), len(x.text), x.text))
    return Atom(f"tr({first.text})", c.value.trace().reshape(1, 1), True)


def _of_free(items: Sequence[Item], free: tuple[Hashable, ...], sizes: Mapping[Hashable, int]) -> Chain | None:
    if not free:
        return None

    def ones(x: Hashable) -> Chain:
        like = items[0][0].value.dtype if items else torch.float64
        return Chain(((Atom("𝟏", torch.ones(sizes[x], 1, dtype=like)), False),), 0)

    def vector(x: Hashable) -> Chain | None:
        found = [c for c, at in items if at == (x,)]
        if any(set(at) == {x} and len(at) == 2 for _, at in items):
            raise NoMatrixForm
        return _vector(found) if found else None

    if len(free) == 1:
        return vector(free[0]) or ones(free[0])
    i, j = free
    if i == j:
        v = vector(i)
        return Chain(((_diagonal(v), False),), 0) if v else Chain((), sizes[i])
    u, v = vector(i), vector(j)
    whole = [c if at == (i, j) else c.T for c, at in items if len(at) == 2]
    if not whole:
        return (u or ones(i)).after((v or ones(j)).T)
    M = whole[0] if len(whole) == 1 else Chain(((entrywise([(c.atom, 1) for c in whole]), False),), 0)
    if u:
        M = Chain(((_diagonal(u), False),), 0).after(M)
    return M.after(Chain(((_diagonal(v), False),), 0)) if v else M


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
        inner = [replace(t, coef=t.coef / coef, scalar=entrywise([(t.scalar, 1), *under, (_ONE, 1)])) for t in terms]
        chain = Chain(((_sum(inner), False),), 0)
        return _product(MatrixTerm(coef, entrywise([*common, (_ONE, 1)]), chain))
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
    return leaf(shown if len(terms) == 1 else f"({shown})", sum(t.value for t in terms), len(terms) > 1)  # type: ignore[arg-type]


Group = tuple[list[MatrixTerm], MatrixTerm] | None


def _last(group: Sequence[MatrixTerm]) -> Group:
    """A x + B x = (A + B) x."""
    longer = [t for t in group if t.chain and len(t.chain.pieces) > 1]
    mine = [
        t
        for t in longer
        if t.chain and longer[0].chain and _tag(t.chain.pieces[-1]) == _tag(longer[0].chain.pieces[-1])
    ]
    return _drawn(mine, lambda c: Chain(c.pieces[:-1], 0), lambda inner, c: (*inner, c.pieces[-1]))


def _first(group: Sequence[MatrixTerm]) -> Group:
    """A x + A y = A (x + y)."""
    longer = [t for t in group if t.chain and len(t.chain.pieces) > 1]
    mine = [
        t for t in longer if t.chain and longer[0].chain and _tag(t.chain.pieces[0]) == _tag(longer[0].chain.pieces[0])
    ]
    return _drawn(mine, lambda c: Chain(c.pieces[1:], 0), lambda inner, c: (c.pieces[0], *inner))


def _drawn(
    mine: list[MatrixTerm],
    rest: Callable[[Chain], Chain],
    whole: Callable[[tuple[Piece, ...], Chain], tuple[Piece, ...]],
) -> Group:
    if len(mine) < 2 or mine[0].chain is None:
        return None
    coef = abs(mine[0].coef)
    if all(t.coef < 0 for t in mine):
        coef = -coef
    inner = gathered(added([MatrixTerm(t.coef / coef, _ONE, rest(t.chain)) for t in mine if t.chain]))
    if len(inner) == 1 and inner[0].coef == 1 and inner[0].chain:
        pieces = inner[0].chain.pieces
    else:
        pieces = ((_sum(inner), False),)
    return mine, replace(mine[0], coef=coef, chain=Chain(whole(pieces, mine[0].chain), 0))


def _part(group: Sequence[MatrixTerm]) -> Group:
    """a ∘ b + a ∘ c = a ∘ (b + c), and of diagonals the diagonal."""
    alone = [t for t in group if t.chain and len(t.chain.pieces) == 1 and not t.chain.pieces[0][1]]
    diagonals = [t for t in alone if t.chain and t.chain.pieces[0][0].inner is not None]
    if len(diagonals) > 1:
        coef = abs(diagonals[0].coef)
        inner = [
            MatrixTerm(t.coef / coef, _ONE, Chain(((t.chain.pieces[0][0].inner, False),), 0))
            for t in diagonals
            if t.chain and t.chain.pieces[0][0].inner
        ]
        made = diagonal_of(replace(_sum(inner), tight=True))
        return diagonals, replace(diagonals[0], coef=coef, chain=Chain(((made, False),), 0))
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
                        _ONE,
                        Chain(((entrywise([(u.chain.pieces[0][0], 1), (part, -power)]), False),), 0),
                    )
                    for u in own
                    if u.chain
                ]
                made = entrywise([(part, power), (_sum(inner), 1)])
                return own, replace(own[0], coef=coef, chain=Chain(((made, False),), 0))
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
    shown += [_power(*p) for p in above]
    shown += [] if body is None else [body]
    text = " ".join(shown) or "1"
    return sign + text + _under([bottom] * bool(bottom) + [_power(p, -power) for p, power in below])


def _under(parts: Sequence[str]) -> str:
    """What a product is divided by."""
    return f"/({' '.join(parts)})" if len(parts) > 1 else f"/{parts[0]}" if parts else ""


_LATEX = {
    "⁻ᵀ": r"^{-\top}", "⁻¹": "^{-1}", "ᵀ": r"^{\top}", "∘": r"\circ", "⊘": r"\oslash", "𝟏": r"\mathbf{1}", "⊗": r"\otimes",
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

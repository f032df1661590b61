"""The chain rule as it is done on paper: formulas are put into each other, and deltas eliminated.

Every line is a `Formula`: what is printed can be read back and evaluated, and all lines of a derivation are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualform.algebra.index_products import Index, IndexProduct, canonical
from dualform.algebra.index_text import IndexFormula, axis_letters, letters, stated, sum_letter
from dualform.explanations.deltas import eliminated


@dataclass(frozen=True)
class Move:
    """One line of a derivation, and the rule that made it of the line before."""

    formula: IndexFormula
    reason: str


@dataclass(frozen=True)
class Link:
    """One way into a node: its local derivative after the operand's; None where that is the input itself."""

    local: IndexFormula
    before: IndexFormula | None
    shape: tuple[int, ...]  # the operand's


def _product(a: IndexProduct, b: IndexProduct) -> IndexProduct:
    sums, steps = (*a.sums, *b.sums), (*a.steps, *b.steps)
    return IndexProduct(a.coef * b.coef, (*a.factors, *b.factors), (*a.ties, *b.ties), sums, steps)


def derive(
    symbol: str,
    links: Sequence[Link],
    out: Sequence[int],
    inn: Sequence[int],
    copies: bool,
    avoid: Sequence[str] = (),
    called: tuple[Sequence[str], Sequence[str]] | None = None,
) -> list[Move]:
    """Join the derivatives of a node's operands into the node's own: every line, each with its reason.

    copies: put in only those formulas that copy the input first, and show what is left to sum over
    avoid: letters that no index gets; called: what the axes are called, i, j, k, ... where it is not given
    """
    names = letters(avoid)
    outs, inns = map(tuple, called or (axis_letters(out, names), axis_letters(inn, names)))
    sizes = dict(zip((*outs, *inns), (*out, *inn), strict=True))
    axes = (*outs, *inns)
    spoken = (*axes, *avoid)
    told = [f for link in links for f in (link.local, link.before) if f is not None]
    tensors = {k: t for f in told for k, t in f.tensors.items()}
    splits = {f.symbol: len(f.out) for f in told}
    stored = {letter.symbol: letter for f in told for letter in f.where}

    def formula(products: Sequence[IndexProduct]) -> IndexFormula:
        lines = tuple(p.line(axes) for p in products)
        return IndexFormula(symbol, outs, inns, lines, tensors, splits, stated(lines, stored))

    whole: list[IndexProduct] = []
    halfway: list[IndexProduct] = []
    full: list[IndexProduct] = []
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
        for shorter, _ in eliminated(halfway, sizes):
            halfway = shorter
        moves.append(Move(formula(halfway), _summed_copies(halfway)))
        locals_ = {link.local.symbol: link.local for link in links}
        wholes = [next(locals_[name] for name, _ in q.factors if name in locals_) for q in halfway]
        full = [p for q, f in zip(halfway, wholes, strict=True) for p in _put_in(q, f, spoken, known)]
    moves.append(Move(formula(full), "the formulas of the steps put in"))
    for products, reason in eliminated(full, sizes):
        moves.append(Move(formula(products), reason))
        full = products
    known = {}
    ordered = [canonical(p, axes, known, avoid) for p in full]
    if ordered != full:
        moves[-1] = replace(moves[-1], formula=formula(ordered))
    return moves


def _put_in(product: IndexProduct, f: IndexFormula, axes: Sequence[str], known: dict[str, int]) -> list[IndexProduct]:
    """Replace a whole derivative in a product by its formula: one product for each of its lines."""
    at = next(k for k, (name, _) in enumerate(product.factors) if name == f.symbol)
    indices = product.factors[at][1]
    values = {a: b for a, b in zip((*f.out, *f.inn), indices, strict=True) if a != "0"}
    found = []
    for line in f.lines:
        own = dict[str, str]()
        for s, n in line.sums:
            own[s] = sum_letter(n, [*axes, *dict(product.sums), *own.values()], known)
        p = IndexProduct.read(line).put({**values, **{s: Index(((new, 1),)) for s, new in own.items()}})
        factors = (*product.factors[:at], *p.factors, *product.factors[at + 1 :])
        sums = (*product.sums, *((own[s], n) for s, n in line.sums))
        steps = (*product.steps, *p.steps)
        found.append(IndexProduct(product.coef * line.coef, factors, (*product.ties, *p.ties), sums, steps))
    return found


def _symbol(f: IndexFormula, axes: Sequence[str]) -> IndexProduct:
    return IndexProduct(1.0, ((f.symbol, tuple(Index.read(x) for x in axes)),), (), ())


def _summed_copies(products: Sequence[IndexProduct]) -> str:
    left = list(dict.fromkeys(s for p in products for s, _ in p.sums))
    if not left:
        return "each delta of the copy keeps one index"
    many = len(left) > 1
    return (
        f"the sum runs over the broadcast {'axes' if many else 'axis'} {', '.join(left)}: no delta of the copy ties "
        f"{'them' if many else 'it'}, every copy contributes"
    )

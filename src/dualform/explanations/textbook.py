"""Slopes and values as textbooks write them: one record for each function, used only where it gives the stored numbers.

tanh' = 1 - tanh^2        cof X = det X inv(X)^T        norm' = x/|x|
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from dualform.algebra.linear_map import Derivative
from dualform.algebra.matrix_pieces import Atom, leaf, powered
from dualform.algebra.terms import Factor, Label, Term, atoms, fresh_axes
from dualform.explanations.matrix_form import MAX_TEXT, MatrixForm, Terms
from dualform.explanations.matrix_terms import MatrixEquation, flat, put
from dualform.graphs.local_derivatives import Program
from dualform.ops.table import OpCall

Slope = Callable[[MatrixForm, fx.Node, Factor | None], Terms | None]
FUNCTIONS: dict[str, Slope] = MatrixForm.functions
VALUES = MatrixForm.printed


def _slope(*names: str) -> Callable[[Slope], Slope]:
    def add(f: Slope) -> Slope:
        FUNCTIONS.update(dict.fromkeys(names, f))
        return f

    return add


def _entries(m: MatrixForm, node: fx.Node, *terms: tuple[float, Sequence[Atom]]) -> Terms:
    """A sum of entrywise products of the shape of a node."""
    axes = fresh_axes(m.number(node).shape)
    return [
        Term(c, tuple(m.factor(a, axes if a.value.numel() > 1 or not atoms(axes) else ()) for a in parts), axes, ())
        for c, parts in terms
    ]


@_slope("inv")
def inverse(m: MatrixForm, node: fx.Node, f: Factor | None = None) -> Terms:
    """The inverse of a value; of a product of square matrices, the product of theirs."""
    written = m.matrices_of(m.value(node), lambda t: t.out)
    v = m.number(node)
    pieces = written[0].chain.pieces if len(written) == 1 and written[0].chain and written[0].scalar.text == "𝟏" else ()
    if pieces and all(a.value.shape[0] == a.value.shape[1] for a, _ in pieces):
        out = [Label(v.shape[0]) for _ in range(len(pieces) + 1)]
        factors = []
        for k, (a, turned) in enumerate(reversed(pieces)):
            other = replace(a, value=torch.linalg.inv_ex(a.value).inverse, inverse=not a.inverse)
            at = (out[k + 1], out[k]) if turned else (out[k], out[k + 1])
            factors.append(Factor(other.value, at, m.leaf(other).name))
        return [Term(1 / written[0].coef, tuple(factors), ((out[0],), (out[-1],)), ())]
    one = m.atom(node)
    text = one.bracketed
    axes = fresh_axes(v.shape)
    other = Atom(text, torch.linalg.inv_ex(v).inverse, True, one.symmetric, True)
    return [Term(1.0, (m.factor(other, axes),), axes, ())]


@_slope("cof")
def _cof(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """cof X = det X inv(X)^T, where X has an inverse."""
    det = m.factor(_det(m, node), ())
    return [replace(t, factors=(*t.factors, det), out=t.out[::-1]) for t in inverse(m, node, None) or []]


def _det(m: MatrixForm, node: fx.Node) -> Atom:
    one = m.atom(node)
    if one.inverse:
        return powered(leaf(f"det({one.text})", torch.linalg.inv_ex(one.value).inverse.det()), -1)
    return leaf(f"det({m.text(node)})", torch.linalg.det(m.number(node)))


@_slope("norm'")
def _norm(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """x |x|^(p-2) over the (p-1)th power of the norm; sign x for p = 1."""
    u = m.number(node)
    for call in m.applied("norm", node):
        p = call.bound.get("ord", call.bound.get("p")) or 2
        if p == 1:
            return _entries(m, node, (1.0, [_SIGN(m, node)]))
        if p not in (2, 3, 4):
            continue
        size, axes = m.factor(powered(_norm_of(m, node, p), 1 - p), ()), fresh_axes(u.shape)
        sizes = [m.factor(_ABS(m, node), axes)] * int(p - 2)
        return [put(Term(1.0, (), axes, ()), (size, *sizes), t, atoms(axes)) for t in m.value(node)]
    return None


def _norm_of(m: MatrixForm, node: fx.Node, p: float = 2) -> Atom:
    kind = "" if p == 2 else "₀₁₂₃₄"[int(p)]
    return leaf(f"‖{m.text(node)}‖{kind}", torch.linalg.vector_norm(m.number(node), p))


def _of(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[MatrixForm, fx.Node], Atom]:
    def made(m: MatrixForm, node: fx.Node) -> Atom:
        u = m.number(node)
        return leaf(f"{name}({m.text(node)})", f(flat(u)))

    return made


_SIGMOID, _TANH, _SIGN = _of("sigmoid", torch.sigmoid), _of("tanh", torch.tanh), _of("sign", torch.sign)
_ABS, _EXP, _SQRT = _of("abs", torch.abs), _of("exp", torch.exp), _of("sqrt", torch.sqrt)


def _after(a: Atom) -> Atom:
    """1 + a."""
    one = "1" if a.value.numel() == 1 else "𝟏" if a.is_vector else "𝟏 𝟏ᵀ"
    return Atom(f"({one} + {a.text})", 1 + a.value)


def _beside(a: Atom) -> Atom:
    """1 - a."""
    one = "1" if a.value.numel() == 1 else "𝟏" if a.is_vector else "𝟏 𝟏ᵀ"
    return Atom(f"({one} - {a.text})", 1 - a.value)


FUNCTIONS |= {
    "exp": lambda m, n, f: _entries(m, n, (1.0, [_EXP(m, n)])),
    "sigmoid'": lambda m, n, f: _entries(m, n, (1.0, [_SIGMOID(m, n), _beside(_SIGMOID(m, n))])),
    "tanh'": lambda m, n, f: _entries(m, n, (1.0, [_beside(powered(_TANH(m, n), 2))])),
    "softplus'": lambda m, n, f: _entries(m, n, (1.0, [_SIGMOID(m, n)])),
    "log_sigmoid'": lambda m, n, f: _entries(m, n, (1.0, []), (-1.0, [_SIGMOID(m, n)])),
    "abs'": lambda m, n, f: _entries(m, n, (1.0, [_SIGN(m, n)])),
    "sin'": lambda m, n, f: _entries(m, n, (1.0, [_of("cos", torch.cos)(m, n)])),
    "cos'": lambda m, n, f: _entries(m, n, (-1.0, [_of("sin", torch.sin)(m, n)])),
    "relu'": lambda m, n, f: _entries(m, n, (1.0, [leaf(f"[{m.text(n)} > 0]", flat(m.number(n) > 0))])),
    "log1p'": lambda m, n, f: _entries(m, n, (1.0, [powered(_after(m.atom(n)), -1)])),
    "log'": lambda m, n, f: _entries(m, n, (1.0, [powered(m.atom(n), -1)])),
    "sqrt'": lambda m, n, f: _entries(m, n, (0.5, [powered(_SQRT(m, n), -1)])),
}


@_slope("clamp'", "clamp_min'", "clamp_max'", "maximum'", "minimum'")
def _bound_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """1, where no bound is met."""
    return _entries(m, node, (1.0, []))


@_slope("var'")
def _variance_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """2 (x - mean x) / (n - correction)."""
    u, axes = m.number(node), fresh_axes(m.number(node).shape)
    for call in m.applied("var", node):
        correction = call.bound.get("correction")
        rest = u.numel() - (1 if correction is None else correction)
        mean = m.factor(leaf(f"mean({m.text(node)})", u.mean()), ())
        apart = [put(Term(2 / rest, (), axes, ()), (), t, atoms(axes)) for t in m.value(node)]
        return [*apart, Term(-2 / rest, (mean,), axes, ())]
    return None


@_slope("std'")
def _deviation_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """(x - mean x) / ((n - correction) std x)."""
    u, axes = m.number(node), fresh_axes(m.number(node).shape)
    for call in m.applied("std", node):
        correction = call.bound.get("correction")
        rest = u.numel() - (1 if correction is None else correction)
        mean = m.factor(leaf(f"mean({m.text(node)})", u.mean()), ())
        under = m.factor(powered(leaf(f"std({m.text(node)})", call.out), -1), ()) if call.out.numel() == 1 else mean
        apart = [put(Term(1 / rest, (), axes, ()), (under,), t, atoms(axes)) for t in m.value(node)]
        return [*apart, Term(-1 / rest, (mean, under), axes, ())]
    return None


@_slope("matrix_norm'")
def _spectral_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """The outer product of the first singular vectors."""
    U, _, Vh = torch.linalg.svd(m.number(node), full_matrices=False)
    if 1 in m.number(node).shape:
        return None
    shown = m.text(node)
    rows, cols = fresh_axes(m.number(node).shape)
    pair = m.factor(leaf(f"u₁({shown})", U[:, 0]), (rows,)), m.factor(leaf(f"v₁({shown})", Vh[0]), (cols,))
    return [Term(1.0, pair, (rows, cols), ())]


@_slope("binary_cross_entropy'")
def _binary_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """(x - y) / (x (1 - x)), a mean's share of it."""
    x = m.atom(node)
    for call in m.applied("binary_cross_entropy", node):
        y = next(iter(m.named(call.operand_name(1))), None) if len(call.operands) == 2 else None
        if y is None:
            continue
        axes = fresh_axes(call.operands[0].shape)
        under = m.factor(powered(x, -1), axes), m.factor(powered(_beside(x), -1), axes)
        share = 1 / x.value.numel() if call.bound["reduction"] == 1 else 1.0
        above = [*((share, t) for t in m.value(node)), *((-share, t) for t in m.value(y))]
        return [put(Term(c, (), axes, ()), under, t, atoms(axes)) for c, t in above]
    return None


@_slope("prod'")
def _product_slope(m: MatrixForm, node: fx.Node, f: Factor | None) -> Terms | None:
    """The product over each entry, where none is 0."""
    whole = leaf(f"prod({m.text(node)})", m.number(node).prod())
    return _entries(m, node, (1.0, [whole, powered(m.atom(node), -1)]))


def _exponential(m: MatrixForm, node: fx.Node, call: OpCall) -> Atom | None:
    """exp of a log_softmax is the softmax."""
    source = m.sources(node)[0]
    inner = m.home[source].call(source) if source.op == "call_function" else None
    if inner is None or "log_softmax" not in inner.target._schema.name or call.out.ndim != 1:
        return None
    return leaf(f"softmax({m.text(m.sources(source)[0])})", call.out)


def _of_a_vector(m: MatrixForm, node: fx.Node, call: OpCall) -> Atom | None:
    name = call.target._schema.name.split("::")[1].strip("_")
    if name == "softmax" and "p" in m.told:
        letter = m.called(Factor(call.out, (Label(call.out.shape[0]),), "p")) if call.out.ndim == 1 else ""
        if letter in m.told:
            return leaf(letter, call.out)
    return leaf(f"{name}({m.text(m.sources(node)[0])})", call.out) if call.out.ndim == 1 else None


VALUES |= {"softmax": _of_a_vector, "logsumexp": _of_a_vector}
VALUES["log_softmax"] = _of_a_vector
VALUES["exp"] = _exponential
VALUES["det"] = lambda m, node, call: _det(m, m.sources(node)[0])


def _norm_value(m: MatrixForm, node: fx.Node, call: OpCall) -> Atom | None:
    for p in (2, 1, 3, 4):
        made = _norm_of(m, m.sources(node)[0], p)
        if call.out.numel() == 1 and torch.allclose(call.out.reshape(1, 1), made.value, rtol=1e-9):
            return made
    return None


VALUES |= {"vector_norm": _norm_value, "matrix_norm": _norm_value}
VALUES["norm"] = _norm_value


def matrix_form(
    programs: Sequence[Program], called: Callable[[Factor], str], told: Container[str], J: Derivative, symbol: str
) -> MatrixEquation | None:
    """The shorter of two forms, sums multiplied out or in brackets, if it is short; and its numbers."""
    found = [
        form
        for spread in (True, False)
        if (form := MatrixForm(programs, called, told, spread).of(J, symbol)) is not None
    ]
    short = [form for form in found if len(form.text) <= MAX_TEXT]
    return min(short, key=lambda form: len(form.text)) if short else None

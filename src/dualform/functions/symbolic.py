"""From heads to formulas: monomials with coefficients, spline pieces, functions, in the inputs' own names.

Terms are the features' own texts (`Expansion.features`); functions of one attribute that are polynomials between knots
are read off at degree + 1 points per piece; what a head does with its features is its own code, run on matrices instead
of rows.

Legend: m inputs, n outputs, D features, k functions per attribute, R rows of the sample, c coefficients.
"""

from __future__ import annotations

import ast
import keyword
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import sympy
import torch
from sympy.utilities.lambdify import implemented_function

from dualform.functions.basis import Expansion, vocabulary
from dualform.functions.formula import Formula, FormulaLine, Values, inner
from dualform.functions.head import Head
from dualform.shapes import fail

Terms = dict[sympy.Expr, float]  # f_k -> c_k; the key 1 has the constant
Affine = tuple[np.ndarray, np.ndarray]  # slope and shift, or scale and mean, per column

_one = sympy.Integer(1)
_words: dict[str, Any] = {
    **{name: getattr(sympy, name) for name in vocabulary if hasattr(sympy, name)},
    "abs": sympy.Abs, "max": sympy.Max, "min": sympy.Min, "sinc": lambda t: sympy.sinc(sympy.pi * t),
}  # fmt: skip
_activations: dict[str, Callable[[Any], Any]] = {
    "gelu_tanh": lambda x: x * (1 + sympy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu": lambda x: x * (1 + sympy.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + sympy.exp(-x)),
    "relu": lambda x: sympy.Max(0, x),
    "tanh": sympy.tanh,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "identity": lambda x: x,
}
_metrics: dict[str, Callable[[list[Any]], Any]] = {
    "max": lambda ys: sympy.Max(*ys),
    "min": lambda ys: sympy.Min(*ys),
    "prod": lambda ys: sympy.Mul(*ys),
    "l1_norm": lambda ys: sympy.Add(*(sympy.Abs(y) for y in ys)),
    "l2_norm": lambda ys: sympy.sqrt(sympy.Add(*(y**2 for y in ys))),
    "var": lambda ys: sympy.Add(*((y - sympy.Add(*ys) / len(ys)) ** 2 for y in ys)) / (len(ys) - 1),
    "std": lambda ys: sympy.sqrt(_metrics["var"](ys)),
}
# Beyond this loss of digits a polynomial is printed in standardised inputs, with a line for each, and not expanded.
_most_cancelled = 1e3
_noise = 1e-12


def formula_of(
    heads: Sequence[Head], labels: Sequence[str], outputs: Sequence[str], sample: np.ndarray, tolerance: float,
    scale: Affine | None = None, units: Affine | None = None,
) -> Formula:  # fmt: skip
    """Write down what heads in a row compute of (x - mean) / scale, times the units' slope plus their shift.

    Terms are dropped while what they do together to the line they are in, on the sample's rows,
    stays below tolerance times the line's standard deviation.
    Shape:  sample (R, m).
    """
    names = tuple(_identifiers(labels))
    writer = _Writer(names, tuple(labels), Values(names, sample))
    inputs: list[sympy.Expr] = [sympy.Symbol(name) for name in writer.inputs]
    if scale is not None:
        inputs = writer.standardised(inputs, heads[0].expansion, *scale)
    for depth, head in enumerate(heads, 1):
        last = depth == len(heads)
        names = writer.names(outputs if last else [f"h{depth}_{i}" for i in range(head.n)])
        slope, shift = units if last and units is not None else (np.ones(head.n), np.zeros(head.n))
        writer.tolerance = tolerance if last else tolerance * inner
        found = writer.head(head, inputs, names)
        inputs = []
        for name, terms, a, b in zip(names, found, slope, shift, strict=True):
            terms = {f: c * float(a) for f, c in terms.items()}
            terms[_one] = terms.get(_one, 0.0) + float(b)
            inputs.append(writer.line(name, terms))
    return writer.finished([str(name) for name in inputs])


@dataclass
class _Writer:
    """The lines so far, and the values that their names have on the sample."""

    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    known: Values
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        self.lines: list[FormulaLine] = []
        self.taken = set(self.inputs)

    def names(self, labels: Sequence[str]) -> list[str]:
        """Find names for lines that neither an input nor another line has."""
        found = _identifiers(labels, self.taken)
        self.taken |= set(found)
        return found

    def line(self, name: str, terms: Terms) -> sympy.Symbol:
        """Prune a sum, give it a name and evaluate it."""
        functions = [f for f in terms if f != _one]
        values = self.known.columns(functions)
        c = np.array([terms[f] for f in functions])
        middle = values.mean(1)
        effect = np.abs(c) * values.std(1)
        total = (c[:, None] * values).sum(0).std()
        order = effect.argsort(kind="stable")
        dropped = order[np.cumsum(effect[order]) <= self.tolerance * total]
        if self.tolerance == 0:
            dropped = np.flatnonzero(c == 0)
        constant = terms.get(_one, 0.0) + float((c * middle)[dropped].sum())
        kept = [i for i in effect.argsort(kind="stable")[::-1] if i not in set(dropped.tolist())]
        if kept and abs(constant) <= self.tolerance * total:
            constant = 0.0  # rounding noise beside what it is added to
        made = FormulaLine(name, tuple(_times(float(c[i]), functions[i]) for i in kept), constant)
        self.lines.append(made)
        self.known.add(made)
        return sympy.Symbol(name)

    def standardised(
        self, inputs: list[sympy.Expr], expansion: Expansion, scale: np.ndarray, mean: np.ndarray
    ) -> list[sympy.Expr]:
        """Put (x - mean) / scale in the place of x, in its own line where an expanded polynomial would lose digits."""
        degree = max(expansion.degrees) * (expansion.degree or 1)
        # features that are standardised already have a mean and a scale of rounding errors
        mean = np.where(np.abs(mean) <= _noise * scale, 0.0, mean)
        scale = np.where(np.abs(scale - 1) <= _noise, 1.0, scale)
        z = [(x - float(m)) / float(s) for x, s, m in zip(inputs, scale, mean, strict=True)]
        if (np.abs(mean / scale).max() + 1) ** degree <= _most_cancelled:
            return [sympy.expand(e) for e in z]
        named = []
        for i, (x, name) in enumerate(zip(self.inputs, self.names([f"z_{x}" for x in self.inputs]), strict=True)):
            self.lines.append(FormulaLine(name, ((1 / float(scale[i]), sympy.Symbol(x)),), -float(mean[i] / scale[i])))
            self.known.add(self.lines[-1])
            named.append(sympy.Symbol(name))
        return named

    def head(self, head: Head, inputs: list[sympy.Expr], names: Sequence[str]) -> list[Terms]:
        """Return the terms of every output of a head."""
        matrices = list(head.matrix().detach().double())
        fusion = head.fusion
        if fusion.kind == "reduce" and len(matrices) > 1 and fusion.metric not in ("sum", "mean"):
            found = self._reduced(head, [_features(head.expansion, inputs, w) for w in matrices], names)
        else:
            # Linear in the channels' outputs, so it may be given columns of psi(w) in place of rows.
            with torch.no_grad():
                joined = head.double()._fuse([w.mT for w in matrices], head.fusion_weight).mT
            found = _features(head.expansion, inputs, joined)
        bias = torch.zeros(head.n) if head.bias is None else head.bias
        for terms, b in zip(found, bias.tolist(), strict=True):
            terms[_one] = terms.get(_one, 0.0) + b
        self._add_remainder(head, inputs, found, names)
        return found

    def _reduced(self, head: Head, channels: list[list[Terms]], names: Sequence[str]) -> list[Terms]:
        """A maximum, a product ...: a line for each channel, and one for what is made of them."""
        metric = head.fusion.metric
        if metric not in _metrics:
            advice = "It has no formula."
            fail("formula", "fusion", f"is {head.fusion.name}", f"one of {sorted(_metrics)}, or a linear one", advice)
        found = []
        for i, name in enumerate(names):
            parts = self.names([f"{name}_channel{c}" for c in range(len(channels))])
            parts = [self.line(part, terms[i]) for part, terms in zip(parts, channels, strict=True)]
            found.append({_metrics[cast(str, metric)](parts): 1.0})
        return found

    def _add_remainder(self, head: Head, inputs: list[sympy.Expr], found: list[Terms], names: Sequence[str]) -> None:
        r = head.remainder
        if callable(r.activation):
            what = f"has the activation {r.activation!r}"
            fail("formula", "remainder", what, f"one of {sorted(_activations)}", "Name it.")
        act = _activations[r.activation]
        for i, (terms, name) in enumerate(zip(found, names, strict=True)):
            if r.kind == "constant":
                _add(terms, _one, r.c)
            elif r.kind == "identity":
                _add_all(terms, act(inputs[i]), 1.0)
            else:
                assert head.remainder_weight is not None
                weights = head.remainder_weight[i].tolist()
                b = 0.0 if head.remainder_bias is None else float(head.remainder_bias[i])
                if r.inside or r.activation == "identity":
                    _add(terms, _one, b)
                    for x, c in zip(inputs, weights, strict=True):
                        _add_all(terms, act(x), c)
                else:
                    straight: Terms = {_one: b}
                    for x, c in zip(inputs, weights, strict=True):
                        _add_all(straight, x, c)
                    (label,) = self.names([f"{name}_remainder"])
                    _add(terms, act(self.line(label, straight)), 1.0)

    def finished(self, outputs: list[str]) -> Formula:
        """Leave out lines that nothing uses any more."""
        needed, kept = set(outputs), []
        for line in reversed(self.lines):
            if line.name in needed:
                kept.append(line)
                needed |= line.symbols
        return Formula(self.inputs, self.labels, tuple(reversed(kept)), tuple(outputs), self.known.rows)


def _add(terms: Terms, f: sympy.Expr, c: float) -> None:
    terms[f] = terms.get(f, 0.0) + c


def _add_all(terms: Terms, expression: Any, c: float) -> None:
    """Add c times an expression, sum by sum."""
    for f, a in _parts(sympy.sympify(expression)):
        _add(terms, f, a * c)


def _parts(expression: sympy.Expr) -> list[tuple[sympy.Expr, float]]:
    """Split into functions with coefficients; polynomials are multiplied out."""
    if expression.is_polynomial():
        expression = sympy.expand(expression)
    split = [part.as_coeff_Mul() for part in sympy.Add.make_args(expression)]
    return [(f, float(a)) for a, f in split]


def _times(c: float, f: sympy.Expr) -> tuple[float, sympy.Expr]:
    """Put a coefficient inside the pieces if there are such."""
    if not isinstance(f, sympy.Piecewise):
        return c, f
    pieces = cast("Sequence[tuple[Any, Any]]", f.args)
    rows = [(sympy.Add(*(c * part for part in sympy.Add.make_args(e))), condition) for e, condition in pieces]
    return 1.0, sympy.Piecewise(*rows, evaluate=False)


def _features(expansion: Expansion, inputs: list[sympy.Expr], weight: torch.Tensor) -> list[Terms]:
    """Return sum_k weight[i, k] kappa_k(inputs) for every row i of weight (rows, D)."""
    if expansion.degree is not None and expansion.basis is not None and expansion.degrees == (1,):
        return _piecewise(expansion, inputs, weight)
    names = [f"a{i}" for i in range(len(inputs))]
    scope = {"__builtins__": {}, "_indicator": _indicator} | _words | dict(zip(names, inputs, strict=True))
    scope |= _untold(expansion, len(inputs))
    parts = [_parts(sympy.sympify(eval(_compiled(text), scope))) for text in expansion.features(names)]
    found = []
    for row in weight.tolist():
        terms: Terms = {}
        for c, part in zip(row, parts, strict=True):
            if c:
                for f, a in part:
                    _add(terms, f, a * c)
        found.append(terms)
    return found


def _untold(expansion: Expansion, m: int) -> dict[str, Any]:
    """Make functions of sympy of those that have no text: they print by their names, and evaluate by the expansion."""

    def function(k: int, word: str, of: list[int]) -> Any:
        def values(*columns: Any) -> np.ndarray:
            rows = torch.from_numpy(np.stack(np.broadcast_arrays(*columns), -1).astype(np.float64))
            return expansion.base(rows)[..., 0 if len(of) < m else k].numpy()

        return implemented_function(_identifiers([word])[0], values)

    return {word: function(k, word, of) for k, (word, of) in enumerate(expansion.untold(m))}


class _Indicators(ast.NodeTransformer):
    """Make 0 <= t < 1, which counts as 0 or 1 in a feature's text, something that symbols can go through."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        sides = [node.left, *node.comparators]
        compared = zip(sides, node.ops, node.comparators, strict=False)
        pairs = [ast.Compare(left, [op], [right]) for left, op, right in compared]
        return ast.Call(ast.Name("_indicator", ast.Load()), cast("list[ast.expr]", pairs), [])


def _compiled(text: str) -> Any:
    return compile(ast.fix_missing_locations(_Indicators().visit(ast.parse(text, mode="eval"))), "<feature>", "eval")


def _indicator(*conditions: Any) -> sympy.Expr:
    return sympy.Piecewise((1, sympy.And(*conditions)), (0, True))


def _piecewise(expansion: Expansion, inputs: list[sympy.Expr], weight: torch.Tensor) -> list[Terms]:
    """Read the learnt function of each attribute, a polynomial between knots, off at degree + 1 points per piece."""
    m, k, d = len(inputs), cast(int, expansion.width), cast(int, expansion.degree)
    axis = (m, k) if expansion.layout == "attribute" else (k, m)
    weight = weight.unflatten(-1, axis) if axis == (m, k) else weight.unflatten(-1, axis).mT
    ends = list(expansion.knots)
    spans = list(zip(ends, ends[1:], strict=False)) if ends else [(-1.0, 1.0)]
    angles = (torch.arange(d + 1, dtype=torch.float64) + 0.5) * (math.pi / (d + 1))
    nodes = angles.cos() if d else torch.zeros(1, dtype=torch.float64)
    read = torch.linalg.inv(torch.linalg.vander(nodes, N=d + 1))
    pieces = [read @ expansion.phi((a + b) / 2 + (b - a) / 2 * nodes) for a, b in spans]  # (d + 1, k) in (-1, 1)
    found: list[Terms] = [{} for _ in weight]
    for i, z in enumerate(inputs):
        x, slope, shift = _affine(z)
        for terms, w in zip(found, weight[:, i], strict=True):
            polynomials = []
            for (a, b), piece in zip(spans, pieces, strict=True):
                local = np.polynomial.Polynomial((piece @ w).tolist())
                inner = np.polynomial.Polynomial([(shift - (a + b) / 2) * 2 / (b - a), slope * 2 / (b - a)])
                polynomials.append([float(c) for c in np.atleast_1d(cast(Any, local(inner)).coef)])
            if not ends:
                for power, c in enumerate(polynomials[0]):
                    _add(terms, x**power, c)
            else:
                cuts = [(e - shift) / slope for e in ends]
                rows: list[tuple[Any, Any]] = [(sympy.Integer(0), x < cuts[0])]
                for cut, coefficients in zip(cuts[1:], polynomials, strict=True):
                    rows.append((sympy.Add(*(c * x**power for power, c in enumerate(coefficients))), x < cut))
                _add(terms, sympy.Piecewise(*rows, (0, True), evaluate=False), 1.0)
    return found


def _affine(z: sympy.Expr) -> tuple[sympy.Expr, float, float]:
    """Read z = slope x + shift, slope > 0, of one symbol x."""
    x = next(iter(z.free_symbols))
    slope, shift = (float(c) for c in sympy.Poly(z, x).all_coeffs()) if z != x else (1.0, 0.0)
    return cast("sympy.Expr", x), slope, shift


def _identifiers(labels: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Make different names of any labels, which Python takes and sympy reads as symbols: `mean radius` is mean_radius.

    A label that is such a name already keeps it, wherever it stands.
    """
    plain = [_identifier(label) for label in labels]
    used, found = set(taken), dict[int, str]()
    for i in sorted(range(len(plain)), key=lambda i: plain[i] != labels[i]):
        name = plain[i]
        while name in used or not _is_a_symbol(name):
            name += "_"
        used.add(name)
        found[i] = name
    return [found[i] for i in range(len(plain))]


def _identifier(label: str) -> str:
    text = unicodedata.normalize("NFKC", label)  # as Python reads names
    name = "".join(c if f"_{c}".isidentifier() else "_" for c in text) or "_"
    return name if name.isidentifier() else f"_{name}"


@cache
def _is_a_symbol(name: str) -> bool:
    """Does sympy read the word as a symbol, and not as a number, a function or a keyword: I, N, beta?"""
    try:
        return not keyword.iskeyword(name) and sympy.sympify(name) == sympy.Symbol(name)
    except Exception:  # whatever a class of sympy's says of being read alone
        return False

"""Formulas as text, as LaTeX, as sympy and as functions of rows: a line per output, and per unit of the layers before.

    output = sum_i c_i f_i(inputs and earlier lines) + constant

Legend: m inputs, n outputs, R rows, c coefficients, f functions (sympy expressions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import sympy
import torch
from sympy.printing.str import sstr

from dualform.shapes import fail


@dataclass(frozen=True)
class FormulaLine:
    """name = sum_i c_i f_i + constant, the terms that matter most first."""

    name: str
    terms: tuple[tuple[float, sympy.Expr], ...]
    constant: float

    @property
    def symbols(self) -> set[str]:
        return {str(symbol) for _, f in self.terms for symbol in f.free_symbols}

    def expression(self) -> sympy.Expr:
        return sympy.Add(*(c * f for c, f in self.terms), sympy.Float(self.constant))

    def write(self, digits: int | None, function: Callable[[sympy.Expr], str], times: str) -> str:
        """Join the terms' texts, leaving out factors of one."""
        parts = [(c, function(f)) for c, f in self.terms]
        shown = [(_near(c, digits), text) for c, text in parts]
        if self.constant or not shown:
            shown.append((_near(self.constant, digits), ""))
        found = ""
        for number, text in shown:
            size = abs(number)
            factor = "" if size == 1 and text else str(size) + (times if text else "")
            sign = ("-" if number < 0 else "") if not found else " - " if number < 0 else " + "
            found += sign + factor + text
        return found


@dataclass(frozen=True, repr=False)
class Formula:
    """Formulas in order: each may use the names of those before it. str() is text that Python and sympy read.

    Shape:  formula(X): X (R, m) -> (R, n), in float64, with all digits.
    Raises: ShapeError for another m.
    Example:
        >>> x = sympy.Symbol("x")
        >>> f = Formula(("x",), ("x",), (FormulaLine("y", ((0.5, x**2), (1.0, sympy.sin(x))), -2.0),), ("y",))
        >>> f, f([[0.0]]).tolist()
        (y = 0.5*x**2 + sin(x) - 2, [[-2.0]])
    """

    inputs: tuple[str, ...]  # as they appear in the text
    labels: tuple[str, ...]  # as they were given
    lines: tuple[FormulaLine, ...]
    outputs: tuple[str, ...]

    def text(self, digits: int | None = 6) -> str:
        """Return a line `name = expression` each, numbers rounded to so many significant digits (None: all)."""

        @cache
        def function(f: sympy.Expr) -> str:
            text = sstr(_rounded(f, digits), full_prec=False)
            return f"({text})" if isinstance(f, sympy.Add) else text

        return "\n".join(f"{line.name} = {line.write(digits, function, '*')}" for line in self.lines)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def to_latex(self, digits: int | None = 4) -> str:
        """Return an aligned block of LaTeX."""
        names = {
            sympy.Symbol(name): r"\text{%s}" % re.sub(r"([_&%$#{}])", r"\\\1", label)  # noqa: UP031 (braces of LaTeX)
            for name, label in zip(self.inputs, self.labels, strict=True)
            if not re.fullmatch(r"[a-zA-Z]+_?\d*", label)
        }

        @cache
        def function(f: sympy.Expr) -> str:
            text = sympy.latex(_rounded(f, digits), symbol_names=names)
            return rf"\left({text}\right)" if isinstance(f, sympy.Add) else text

        named = ((sympy.latex(sympy.Symbol(line.name)), line) for line in self.lines)
        rows = [rf"{name} &= {line.write(digits, function, chr(92) + ', ')}" for name, line in named]
        rows = [re.sub(r"(\d)e([+-]?)0*(\d+)", r"\1 \\cdot 10^{\2\3}", row).replace("^{+", "^{") for row in rows]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"

    def _repr_latex_(self) -> str:
        return f"$${self.to_latex()}$$"

    @property
    def expressions(self) -> dict[str, sympy.Expr]:
        """Return each output as one sympy expression of the inputs, earlier lines put in."""
        known: dict[sympy.Symbol, sympy.Expr] = {}
        for line in self.lines:
            known[sympy.Symbol(line.name)] = cast("sympy.Expr", line.expression().xreplace(known))
        return {name: known[sympy.Symbol(name)] for name in self.outputs}

    def __call__(self, X: Any) -> np.ndarray:
        known = self._values(X)
        return np.stack([known[name] for name in self.outputs], 1)

    def effects(self, X: Any, output: int = 0) -> list[tuple[str, float]]:
        """Return the terms of an output's own line with their standard deviations on the rows of X, largest first."""
        known = self._values(X)
        (line,) = (line for line in self.lines if line.name == self.outputs[output])
        values = known.columns([f for _, f in line.terms])
        found = [(_short(f), abs(c) * float(v.std())) for (c, f), v in zip(line.terms, values, strict=True)]
        return sorted(found, key=lambda pair: -pair[1])

    def _values(self, X: Any) -> Values:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] != len(self.inputs):
            advice = "Pass rows of the inputs " + ", ".join(self.inputs) + "."
            fail("Formula", "X", f"has shape {X.shape}", f"(R, m) with m = {len(self.inputs)}", advice)
        known = Values(self.inputs, X)
        for line in self.lines:
            known.add(line)
        return known


def _short(f: sympy.Expr) -> str:
    """Name a term in a list: pieces by what they are a function of."""
    if isinstance(f, sympy.Piecewise):
        return f"pieces({', '.join(sorted(map(str, f.free_symbols)))})"
    return sstr(_rounded(f, 3), full_prec=False)


class Values(dict[str, np.ndarray]):
    """What names, and functions of them, are on R rows. A function met again is not computed again."""

    def __init__(self, names: Sequence[str], rows: np.ndarray) -> None:
        super().__init__(zip(names, rows.T, strict=True))
        self.num_rows = len(rows)
        self.found: dict[sympy.Expr, np.ndarray] = {}

    def add(self, line: FormulaLine) -> None:
        weights = np.array([c for c, _ in line.terms])
        self[line.name] = weights @ self.columns([f for _, f in line.terms]) + line.constant

    def columns(self, functions: Sequence[sympy.Expr]) -> np.ndarray:
        """Evaluate (number of functions, R)."""
        new = [f for f in dict.fromkeys(functions) if f not in self.found]
        symbols = sorted(set().union(*(f.free_symbols for f in new)), key=str)
        modules = [{"erf": lambda x: torch.erf(torch.as_tensor(x)).numpy()}, "numpy"]
        with np.errstate(all="ignore"):
            values = sympy.lambdify(symbols, new, modules=modules)(*(self[str(s)] for s in symbols))
        for f, v in zip(new, values, strict=True):
            self.found[f] = np.broadcast_to(np.asarray(v, dtype=np.float64), (self.num_rows,))
        return np.array([self.found[f] for f in functions]).reshape(len(functions), self.num_rows)


def _near(value: float, digits: int | None) -> float | int:
    """Round to so many significant digits, a whole number to an int."""
    value = value if digits is None else float(f"{value:.{digits}g}")
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _rounded(expression: sympy.Expr, digits: int | None) -> sympy.Expr:
    numbers = {f: sympy.sympify(_near(float(f), digits)) for f in expression.atoms(sympy.Float)}
    return cast("sympy.Expr", expression.xreplace(numbers))

"""Formulas as text, as LaTeX, as sympy and as functions of rows: a line per output, and per unit of the layers before.

    output = sum_i c_i f_i(inputs and earlier lines) + constant

Legend: m inputs, n outputs, R rows, c coefficients, f functions (sympy expressions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import numpy as np
import sympy
import torch
from sympy.printing.str import sstr

from dualform.shapes import fail

inner = 0.1  # the share of a tolerance that lines before the last have: what they drop is bent and scaled after them
_ranked = 250  # rows are enough to rank inputs
_longest = 1500  # characters that are printed; of longer formulas, a summary


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

    Of formulas too long to be read, str() is a summary; `text()` writes out any.
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
    sample: np.ndarray | None = field(default=None, compare=False)  # rows that terms and features are ranked on

    def text(self, digits: int | None = 6) -> str:
        """Return a line `name = expression` each, numbers rounded to so many significant digits (None: all)."""

        @cache
        def function(f: sympy.Expr) -> str:
            text = sstr(_rounded(f, digits), full_prec=False)
            return f"({text})" if isinstance(f, sympy.Add) else text

        return "\n".join(f"{line.name} = {line.write(digits, function, '*')}" for line in self.lines)

    def __str__(self) -> str:
        text = self.text()
        return text if len(text) <= _longest else self.summary()

    __repr__ = __str__

    def summary(self, count: int = 8) -> str:
        """Say what the formulas are made of: lines and terms, what moves each output most, what tolerances leave.

        Strongest are the inputs: the standard deviation of what changes in the output when the rows' values of one
        are shuffled, over sqrt(2); where it acts alone, that of its own part.
        """
        said = [f"{len(self.lines):,} lines, {sum(len(line.terms) for line in self.lines):,} terms; text() writes them"]
        depth = dict.fromkeys(self.inputs, 0)
        for line in self.lines:
            depth[line.name] = 1 + max((depth[name] for name in line.symbols), default=0)
        for k in range(1, max(depth.values(), default=0) + 1):
            lines = [line for line in self.lines if depth[line.name] == k]
            names = [line.name for line in lines]
            shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} .. {names[-1]}"
            said.append(f"  {shown}: {sum(len(line.terms) for line in lines):,} terms")
        if self.sample is None:
            return "\n".join(said)
        for i, (output, effects) in enumerate(zip(self.outputs, self.input_effects(self.sample), strict=True)):
            if i == 3:
                said.append(f"  and {len(self.outputs) - i} more outputs")
                break
            shown = ", ".join(f"{name} {size:.3g}" for name, size in effects[:count])
            more = f" and {len(effects) - count} more" if len(effects) > count else ""
            said.append(f"strongest in {output}, as standard deviations of {output}: {shown}{more}")
        known = self._values(self.sample)
        left = ", ".join(f"{t:g} {sum(self._left(line, known, t) for line in self.lines):,}" for t in (0.01, 0.03, 0.1))
        return "\n".join([*said, f"terms that a tolerance leaves, about: {left}"])

    def _left(self, line: FormulaLine, known: Values, tolerance: float) -> int:
        """Count the terms of a line that a tolerance would leave."""
        tolerance = tolerance if line.name in self.outputs else tolerance * inner
        effects = np.abs([c for c, _ in line.terms]) * known.columns([f for _, f in line.terms]).std(1)
        return int((np.sort(effects).cumsum() > tolerance * known[line.name].std()).sum())

    def input_effects(self, X: Any) -> list[list[tuple[str, float]]]:
        """Return for each output the inputs by what moves it when their values are shuffled, largest first."""
        X = np.asarray(X, dtype=np.float64)
        X = X[:: max(1, len(X) // _ranked)]
        shuffled = X[np.random.RandomState(0).permutation(len(X))]
        moved = [np.where(np.arange(X.shape[1]) == i, shuffled, X) for i in range(X.shape[1])]
        # in one call: writing the functions out costs more than evaluating them
        before, *after = np.split(self(np.concatenate([X, *moved])), X.shape[1] + 1)
        effects = [np.sqrt(np.square(values - before).mean(0) / 2) for values in after]
        return [
            sorted(zip(self.labels, map(float, column), strict=True), key=lambda pair: -pair[1])
            for column in np.transpose(effects)
        ]

    def to_latex(self, digits: int | None = 4) -> str:
        """Return an aligned block of LaTeX."""
        names = {
            sympy.Symbol(name): sympy.latex(sympy.Symbol(label))
            if re.fullmatch(r"[a-zA-Z]+_?\d*", label)
            else r"\text{%s}" % re.sub(r"([_&%$#{}])", r"\\\1", label)  # noqa: UP031 (braces of LaTeX)
            for name, label in zip(self.inputs, self.labels, strict=True)
        }

        @cache
        def function(f: sympy.Expr) -> str:
            text = sympy.latex(_rounded(f, digits), symbol_names=names)
            return rf"\left({text}\right)" if isinstance(f, sympy.Add) else text

        named = ((sympy.latex(sympy.Symbol(line.name)), line) for line in self.lines)
        rows = [rf"{name} &= {line.write(digits, function, chr(92) + ', ')}" for name, line in named]
        rows = [re.sub(r"(\d)e([+-]?)0*(\d+)", r"\1 \\cdot 10^{\2\3}", row).replace("^{+", "^{") for row in rows]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"

    def _repr_latex_(self) -> str | None:
        return f"$${self.to_latex()}$$" if len(self.text()) <= _longest else None

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
        """Return what moves an output most, with standard deviations on the rows of X: its terms, or the inputs.

        Terms where they are functions of the inputs; where they are of units in between, the inputs.
        """
        if not self.is_flat(output):
            return self.input_effects(X)[output]
        (line,) = (line for line in self.lines if line.name == self.outputs[output])
        known = self._values(X)
        values = known.columns([f for _, f in line.terms])
        found = [(_short(f), abs(c) * float(v.std())) for (c, f), v in zip(line.terms, values, strict=True)]
        return sorted(found, key=lambda pair: -pair[1])

    def is_flat(self, output: int) -> bool:
        """Is an output's line one of functions of the inputs, or of a single input's line each, and not of units?"""
        lines = {line.name: line.symbols for line in self.lines}
        of = {name: {name} for name in self.inputs}
        for name, symbols in lines.items():
            of[name] = set().union(*(of[symbol] for symbol in symbols))
        return all(len(of[symbol]) <= 1 for symbol in lines[self.outputs[output]])

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
        self.rows, self.num_rows = rows, len(rows)
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
            values = sympy.lambdify(symbols, new, modules=modules, dummify=True)(*(self[str(s)] for s in symbols))
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

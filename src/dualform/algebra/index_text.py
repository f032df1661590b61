"""Index notation of terms, as plain text and as LaTeX, and back to numbers.

    2 Σ_h W2[h,j] gelu'(h)[i,h] X[i,k]        J[i,j,k,l]        δ(j,l)

`Line` is the data: the text is printed from it and a test evaluates it, so a printed formula cannot lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count

from torch import Tensor

LETTERS = "ijklmnopqrstuvwxyzabcdefgh"


def letters(taken: Container[str] = (), alphabet: str = LETTERS) -> Iterator[str]:
    """Index names in the order in which people use them: i j k ... then i1 j1 ..."""
    for round_ in count():
        for letter in alphabet:
            name = letter + (str(round_) if round_ else "")
            if name not in taken:
                yield name


def sum_letter(size: int, taken: Sequence[str], known: dict[str, int]) -> str:
    """A name for a summed index: one name has one size in all lines of a formula, which `known` remembers."""
    name = next(name for name in letters(taken) if known.get(name, size) == size)
    known[name] = size
    return name


def axis_letters(shape: Sequence[int], names: Iterator[str]) -> tuple[str, ...]:
    """One index name for each axis; an axis of size 1 has only the index 0."""
    return tuple("0" if n == 1 else next(names) for n in shape)


def primed(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Mark names that are taken with primes."""
    found = list(taken)
    for name in names:
        while name in found and name != "0":
            name += "'"
        found.append(name)
    return found[len(taken) :]


@dataclass(frozen=True)
class Line:
    """One product in index notation.

    coef; factors (name, indices); deltas (a, b); selects (big, start, step, small); sums (index, size);
    steps (a, b): 1 where a >= b. A delta may look an index up: δ(i,idx[j]).
    An index of an axis that is a composite of labels is written as a polynomial of its atoms: "4*a+b".
    """

    coef: float
    factors: tuple[tuple[str, tuple[str, ...]], ...]
    deltas: tuple[tuple[str, str], ...]
    selects: tuple[tuple[str, int, int, str], ...]
    sums: tuple[tuple[str, int], ...]
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """The pairs of index expressions that must be equal: deltas, then selections."""
        return (*self.deltas, *((big, affine(start, step, small)) for big, start, step, small in self.selects))

    def text(self) -> str:
        factors = [f"{name}[{','.join(labels)}]" if labels else name for name, labels in self.factors]
        # Whole derivatives in a chain are joined by dots, numbers by nothing.
        joined = [" · ".join(factors)] if factors and any(map(_is_symbol, self.factors)) else factors
        body = [*joined, *(f"δ({a},{b})" for a, b in self.ties), *(f"[{a}>={b}]" for a, b in self.steps)]
        sums = [f"Σ_{s}" for s, _ in self.sums]
        if not body:
            return " ".join([*sums, number(self.coef)])
        return _coefficient(number(self.coef)) + " ".join([*sums, *body])

    def latex(self, splits: Mapping[str, int] | None = None) -> str:
        """`splits` tells how many indices of a whole derivative belong to its output."""
        sums = [rf"\sum_{{{s}}}" for s, _ in self.sums]
        body: list[str] = []
        for name, labels in self.factors:
            if splits and name in splits:
                above, below = name.split("/")
                body.append(_partial(above[1:], labels[: splits[name]], below[1:], labels[splits[name] :]))
            else:
                body.append(tex(name) + _subscript(labels))
        body += [rf"\delta{_subscript(tie)}" for tie in self.ties]
        body += [rf"[{_tex_index(a)} \geq {_tex_index(b)}]" for a, b in self.steps]
        if not body:
            return r"\,".join([*sums, _tex_number(self.coef)])
        return _coefficient(_tex_number(self.coef)) + r"\,".join([*sums, *body])


def affine(start: int, step: int, small: str) -> str:
    if small == "0":
        return str(start)
    scaled = {1: small, -1: f"-{small}"}.get(step, f"{step}*{small}")
    return scaled if start == 0 else f"{start}{'' if step < 0 else '+'}{scaled}"


def _is_symbol(factor: tuple[str, tuple[str, ...]]) -> bool:
    """Is it a derivative as a whole, as dz/dx, rather than a stored tensor?"""
    return re.fullmatch(r"d[\w.]+/d[\w.]+", factor[0]) is not None


def number(value: float) -> str:
    """Write a number as people do, 3, 0.5, 1/3, 1/√3, where that is exact; with six digits where it is not."""
    if not math.isfinite(value) or value == round(value, 6):
        return f"{value:.10g}"
    sign, size = ("-" if value < 0 else ""), abs(value)
    if _is_exact(size, Fraction(size).limit_denominator(4096)):
        return f"{sign}{Fraction(size).limit_denominator(4096)}"
    square = Fraction(size * size).limit_denominator(4096)
    if _is_exact(size * size, square) and 1 in (square.numerator, square.denominator):
        return f"{sign}√{square.numerator}" if square.denominator == 1 else f"{sign}1/√{square.denominator}"
    return f"{value:.6g}"


def _is_exact(value: float, near: Fraction) -> bool:
    return near.numerator < 4096 and math.isclose(value, float(near), rel_tol=4e-16)


def _tex_number(value: float) -> str:
    shown = re.sub(r"√(\d+)", r"\\sqrt{\1}", number(value))
    sign, size = ("-", shown[1:]) if shown.startswith("-") else ("", shown)
    above, slash, below = size.partition("/")
    return rf"{sign}\frac{{{above}}}{{{below}}}" if slash else re.sub(r"e([+-]\d+)", r"\\cdot 10^{\1}", shown)


def _coefficient(shown: str) -> str:
    """What stands before a product: 1 and -1 are a sign."""
    return shown[:-1] if shown in ("1", "-1") else f"{shown} "


def tex(name: str) -> str:
    """A name in LaTeX: letters as they are, words upright, an expression in brackets of its own."""
    if re.fullmatch(r"[A-Za-z]", name):
        return name
    if re.fullmatch(r"[\w.]+", name):
        return rf"\mathrm{{{_tex_escaped(name)}}}"
    word = re.fullmatch(r"(\w+)('\d*)\((.*)\)", name)
    if word is not None:  # a slope, as gelu'(h)
        index = _subscript((word[2][1:],)) if word[2][1:] else ""
        return rf"\mathrm{{{_tex_escaped(word[1])}}}{word[2][0]}{index}({_tex_plain(word[3])})"
    inside = _tex_plain(name)
    return inside if name[0] + name[-1] in ("()", "[]") else rf"({inside})"


def _tex_plain(text: str) -> str:
    for plain, written in _TEX.items():
        text = text.replace(plain, written)
    return re.sub(r"(?<![\\A-Za-z])[A-Za-z]\w+", lambda m: rf"\mathrm{{{m[0]}}}", text)


def _tex_escaped(word: str) -> str:
    return word.replace("_", r"\_")


_TEX = {
    "_": r"\_", "·": r"\cdot ", "δ": r"\delta ", "²": "^2", "√": r"\surd ", "#": r"\#", "≥": r"\geq ", "≤": r"\leq ",
    "…": r"\dots ",
}  # fmt: skip


def _subscript(labels: Iterable[str]) -> str:
    shown = ",".join(map(_tex_index, labels))
    return f"_{{{shown}}}" if shown else ""


def _tex_index(text: str) -> str:
    return _tex_escaped(text.replace("*", ""))


def _partial(above: str, out: Sequence[str], below: str, inn: Sequence[str]) -> str:
    up, down = (tex(above) + _subscript(out), tex(below) + _subscript(inn))
    return rf"\frac{{\partial {up}}}{{\partial {down}}}"


@dataclass(frozen=True)
class IndexFormula:
    """A derivative as a sum of lines: symbol[out, inn] = line + line + ...; `tensors` are the values of the names.

    where: what the letters of stored products and sums stand for, each after those that need it
    """

    symbol: str
    out: tuple[str, ...]
    inn: tuple[str, ...]
    lines: tuple[Line, ...]
    tensors: Mapping[str, Tensor]
    splits: Mapping[str, int] = field(default_factory=dict)
    where: tuple[IndexFormula, ...] = ()

    @property
    def left(self) -> str:
        """The entry that the formula gives."""
        indices = (*self.out, *self.inn)
        return f"{self.symbol}[{','.join(indices)}]" if indices else self.symbol

    def right(self) -> str:
        """The sum of products."""
        joined = " + ".join(line.text() for line in self.lines) or "0"
        return joined.replace("+ -", "- ")

    def __str__(self) -> str:
        return f"{self.left} = {self.right()}"

    @property
    def told(self) -> str:
        """The formula, and the ranges that it does not show."""
        return f"{self}    ({self.ranges})" if self.ranges else str(self)

    @property
    def sentence(self) -> str:
        """The formula and what its letters stand for, in one line."""
        return ", where ".join([self.told, *(["; ".join(f.told for f in self.where)] if self.where else [])])

    @property
    def ranges(self) -> str:
        """The ranges of the summed indices, where no factor's axis shows them: `m<4, n<2`."""
        found: dict[str, int] = {}
        for line in self.lines:
            for name, n in line.sums:
                axes = [self._size(f, k) for f, labels in line.factors for k, x in enumerate(labels) if x == name]
                if not axes or any(size not in (n, None) for size in axes):
                    found[name] = n
        return ", ".join(f"{name}<{n}" for name, n in found.items())

    def _size(self, name: str, axis: int) -> int | None:
        return self.tensors[name].shape[axis] if name in self.tensors else None

    def latex_left(self) -> str:
        """The entry that the formula gives, with a fraction of partials."""
        above, _, below = self.symbol.partition("/")
        if below:
            return _partial(above[1:], self.out, below[1:], self.inn)
        return tex(self.symbol) + _subscript((*self.out, *self.inn))

    def latex_right(self) -> str:
        """The sum of products."""
        right = " + ".join(line.latex(self.splits) for line in self.lines) or "0"
        return right.replace("+ -", "- ")

    def latex(self) -> str:
        """The formula with fractions of partials and subscripts."""
        return f"{self.latex_left()} = {self.latex_right()}"


def in_order(ties: Sequence[tuple[str, str]], axes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Sort ties as their axes stand: δ(i,l) before δ(j,k), and not δ(l,i)."""
    place = {name: k for k, name in enumerate(axes)}
    ties = [(b, a) if a in place and b in place and place[b] < place[a] else (a, b) for a, b in ties]
    return tuple(sorted(ties, key=lambda tie: min(place.get(x, len(place)) for x in tie)))


def used(lines: Iterable[Line]) -> set[str]:
    """The names of tensors in lines."""
    looked_up = {text.split("[")[0] for line in lines for tie in line.deltas for text in tie if "[" in text}
    return looked_up | {name for line in lines for name, _ in line.factors}


def stated(lines: Sequence[Line], stored: Mapping[str, IndexFormula]) -> tuple[IndexFormula, ...]:
    """Of what letters stand for, that which lines need."""
    found: dict[str, IndexFormula] = {}
    waiting = sorted(used(lines) & stored.keys())
    while waiting:
        letter = waiting.pop(0)
        if letter not in found:
            found[letter] = stored[letter]
            waiting += sorted(used(stored[letter].lines) & stored.keys())
    return tuple(found.values())

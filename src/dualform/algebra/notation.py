"""Index notation of terms, as plain text and as LaTeX, and back to numbers.

    2 Σ_h W2[h,j] gelu'(h)[i,h] X[i,k]        J[i,j,k,l]        δ(j,l)

`Line` is the data: the text is printed from it and a test evaluates it, so a printed formula cannot lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count

import torch
from torch import Tensor

from dualform.algebra.relations import Lookup, Triangle, Window
from dualform.algebra.terms import Axis, Factor, Label, Term
from dualform.storages import memory_of

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
        return (*self.deltas, *((big, _affine(start, step, small)) for big, start, step, small in self.selects))

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


def _affine(start: int, step: int, small: str) -> str:
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
    """A derivative as a sum of lines: symbol[out, inn] = line + line + ...; `tensors` are the values of the names."""

    symbol: str
    out: tuple[str, ...]
    inn: tuple[str, ...]
    lines: tuple[Line, ...]
    tensors: Mapping[str, Tensor]
    splits: Mapping[str, int] = field(default_factory=dict)

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


def formula(
    terms: Sequence[Term], out_shape: Sequence[int], in_shape: Sequence[int], symbol: str = "J",
    axes: tuple[Sequence[str], Sequence[str]] | None = None, names: Names | None = None,
) -> IndexFormula:  # fmt: skip
    """Write terms in index notation: one name for each axis, an axis of size 1 is index 0.

    Names are given by position, so that all lines of one formula speak of the same indices; `axes` gives the caller's.
    `names` is shared by formulas that are to call one tensor by one name.
    """
    known = Names() if names is None else names
    fresh = letters(known.avoid)
    if axes is None:
        out, inn = axis_letters(out_shape, fresh), axis_letters(in_shape, fresh)
    else:
        out = tuple(axes[0])
        inn = tuple(f"{name}'" if name in out else name for name in axes[1])
    summed: dict[str, int] = {}
    lines = tuple(_line(term, out, inn, known, summed) for term in terms)
    used = {name for line in lines for name, _ in line.factors}
    used |= {text.split("[")[0] for line in lines for tie in line.deltas for text in tie if "[" in text}
    return IndexFormula(symbol, out, inn, lines, {name: t for name, t in known.found.items() if name in used})


class Names:
    """One name for one tensor: equal views share it, a second tensor of the same name gets a number."""

    def __init__(self, taken: Callable[[str], bool] = lambda name: False, avoid: Sequence[str] = ()) -> None:
        """`taken`: names that no second tensor gets; `avoid`: letters that no index gets."""
        self.avoid = tuple(avoid)
        self.found: dict[str, Tensor] = {}
        self.owner: dict[tuple, str] = {}
        self.base: dict[str, str] = {}
        self.taken = taken

    def of(self, f: Factor) -> str:
        t = f.tensor
        # Meta and fake tensors have no numbers: the object is all there is to tell them by.
        where = t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" else id(t)
        key = (where, tuple(t.shape), tuple(t.stride()), f.name)
        if key not in self.owner:
            self.owner[key] = self._equal(f) or self._new(f)
        return self.owner[key]

    def _equal(self, f: Factor) -> str:
        """The name of a tensor of the same numbers: of the same origin, or of one that another trace named."""
        foreign = len(f.name) > 1 and re.fullmatch(r"\w+", f.name) and not self.taken(f.name)
        for name, t in self.found.items():
            known = self.base[name] == f.name or (foreign and self.taken(name))
            alike = known and t.shape == f.tensor.shape and t.dtype == f.tensor.dtype
            if alike and type(t) is type(f.tensor) is Tensor and t.device.type != "meta" and torch.equal(t, f.tensor):
                return name
        return ""

    def _new(self, f: Factor) -> str:
        base = f.name or "F"
        mark = "" if base.isidentifier() and not base[-1].isdigit() else "#"
        numbered = (base if k == 1 else f"{base}{mark}{k}" for k in count(1))
        name = next(n for n in numbered if n not in self.found and (n == base or not self.taken(n)))
        self.found[name] = f.tensor
        self.base[name] = f.name
        return name


def _line(term: Term, out: tuple[str, ...], inn: tuple[str, ...], tensors: Names, summed: dict[str, int]) -> Line:
    name: dict[Label, str] = {}
    whole: dict[Axis, str] = {}
    deltas: list[tuple[str, str]] = []
    sums: list[tuple[str, int]] = []

    def add(label: Label) -> None:
        if label.size == 1:
            name[label] = "0"
            return
        name[label] = sum_letter(label.size, [*out, *inn, *tensors.avoid, *(s for s, _ in sums)], summed)
        sums.append((name[label], label.size))

    axes: list[tuple[str, Axis]] = [*zip(out, term.out, strict=True), *zip(inn, term.inn, strict=True)]
    # Plain axes name their label first; a composite axis is then a relation to the names of its atoms.
    for letter, axis in axes:
        if len(axis) == 1:
            if axis[0] in name:
                deltas.append((name[axis[0]], letter))
            else:
                name[axis[0]] = letter
    for letter, axis in axes:
        if len(axis) < 2:
            continue
        if axis in whole:
            deltas.append((whole[axis], letter))
            continue
        whole[axis] = letter
        inside = [x for x in axis if any(x in f.labels for f in term.factors)]
        shared = any(x in other for x in axis for _, other in axes if other != axis)
        if not inside and not shared and len(set(axis)) == len(axis):
            continue
        for label in axis:
            if label not in name:
                add(label)
        deltas.append((letter, _polynomial(axis, name)))
    for label in term.hidden:
        add(label)
    steps: list[tuple[str, str]] = []
    for r in term.relations:
        if isinstance(r, Window | Lookup):
            deltas.append((_polynomial(r.bigs, name), _place(r, name, tensors)))
        elif isinstance(r, Triangle):
            low = f"{_polynomial(r.cols, name)}{r.offset:+d}" if r.offset else _polynomial(r.cols, name)
            steps.append((_polynomial(r.rows, name), low))
    return Line(
        term.coef, tuple((tensors.of(f), tuple(name[x] for x in f.labels)) for f in term.tensors),
        in_order(deltas, [*out, *inn]), tuple((name[s.big], s.start, s.step, name[s.small]) for s in term.selects),
        tuple(sums), tuple(steps),
    )  # fmt: skip


def _place(r: Window | Lookup, name: Mapping[Label, str], tensors: Names) -> str:
    """Where a relation reads: 2*i+j-1, or idx[i][j]."""
    if isinstance(r, Lookup):
        return tensors.of(Factor(r.index, r.smalls, r.name)) + "".join(f"[{name[x]}]" for x in r.smalls)
    steps = ((name[x], step) for x, step in zip(r.smalls, r.steps, strict=True) if name[x] != "0")
    parts = [f"{step:+d}*{x}" if abs(step) != 1 else f"{'+-'[step < 0]}{x}" for x, step in steps]
    return ("".join(parts) + (f"{r.start:+d}" if r.start or not parts else "")).removeprefix("+")


def in_order(ties: Sequence[tuple[str, str]], axes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Sort ties as their axes stand: δ(i,l) before δ(j,k), and not δ(l,i)."""
    place = {name: k for k, name in enumerate(axes)}
    ties = [(b, a) if a in place and b in place and place[b] < place[a] else (a, b) for a, b in ties]
    return tuple(sorted(ties, key=lambda tie: min(place.get(x, len(place)) for x in tie)))


def _polynomial(axis: Axis, name: dict[Label, str]) -> str:
    parts, stride = [], 1
    for label in reversed(axis):
        if label.size != 1:
            parts.append(name[label] if stride == 1 else f"{stride}*{name[label]}")
        stride *= label.size
    return "+".join(reversed(parts)) or "0"


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors occupy, each storage once, and no more of a storage than its views show."""
    shown: dict[int, dict[tuple, int]] = {}
    total: dict[int, int] = {}
    for t in tensors:
        key = memory_of(t)
        view = (t.storage_offset(), tuple(t.shape), tuple(t.stride()))
        seen = torch.Size([n for n, s in zip(t.shape, t.stride(), strict=True) if s != 0]).numel()
        shown.setdefault(key, {})[view] = seen * t.element_size()
        total[key] = t.untyped_storage().nbytes()
    return sum(min(total[key], sum(views.values())) for key, views in shown.items())

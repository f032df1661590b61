"""Index notation of terms, as plain text and as LaTeX, and back to numbers.

    2 Σ_h W2[h,j] gelu'(h)[i,h] X[i,k]        J[i,j,k,l]        δ(j,l)

`Line` is the data: the text is printed from it and a test evaluates it, so a printed formula cannot lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from dualform.calculus.relations import Lookup, Triangle, Window
from dualform.calculus.terms import Axis, Factor, Label, Term

LETTERS = "ijklmnopqrstuvwxyzabcdefgh"


def letters(taken: Sequence[str] = ()) -> Iterator[str]:
    """Index names in the order in which people use them: i j k ... then i1 j1 ..."""
    for round_ in count():
        for letter in LETTERS:
            name = letter + (str(round_) if round_ else "")
            if name not in taken:
                yield name


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

    def text(self) -> str:
        body = [f"Σ_{s}" for s, _ in self.sums]
        body += [f"{name}[{','.join(labels)}]" if labels else name for name, labels in self.factors]
        body += [f"δ({a},{b})" for a, b in self.deltas]
        body += [f"δ({big},{_affine(start, step, small)})" for big, start, step, small in self.selects]
        body += [f"[{a}>={b}]" for a, b in self.steps]
        return _coefficient(self.coef, bool(body[len(self.sums) :])) + " ".join(body)

    def latex(self) -> str:
        body = [rf"\sum_{{{s}}}" for s, _ in self.sums]
        body += [rf"{_tex(name)}_{{{','.join(labels)}}}" for name, labels in self.factors]
        body += [rf"\delta_{{{a},{b}}}" for a, b in self.deltas]
        body += [rf"\delta_{{{big},{_affine(start, step, small)}}}" for big, start, step, small in self.selects]
        body += [rf"[{a}\ge {b}]" for a, b in self.steps]
        return _coefficient(self.coef, bool(body[len(self.sums) :])) + r"\,".join(body)


def _affine(start: int, step: int, small: str) -> str:
    scaled = {1: small, -1: f"-{small}"}.get(step, f"{step}*{small}")
    return scaled if start == 0 else f"{start}{'' if step < 0 else '+'}{scaled}"


def _coefficient(coef: float, follows: bool) -> str:
    if follows and coef in (1, -1):
        return "" if coef == 1 else "-"
    shown = f"{coef:.6g}"
    return shown + (" " if follows else "")


def _tex(name: str) -> str:
    escaped = name.replace("_", r"\_").replace("·", r"\cdot ").replace("δ", r"\delta ")
    if len(name) == 1 or "\\" in escaped:
        return escaped if len(name) == 1 else rf"({escaped})"
    return rf"\mathrm{{{escaped}}}"


@dataclass(frozen=True)
class Formula:
    """A derivative as a sum of lines: symbol[out, inn] = line + line + ...; `tensors` are the values of the names."""

    symbol: str
    out: tuple[str, ...]
    inn: tuple[str, ...]
    lines: tuple[Line, ...]
    tensors: Mapping[str, Tensor]

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

    def latex(self) -> str:
        """The formula with fractions of partials and subscripts."""
        right = " + ".join(line.latex() for line in self.lines) or "0"
        above, _, below = self.symbol.partition("/")
        if below:
            indexed = [
                rf"\partial {_tex(above[1:])}_{{{','.join(self.out)}}}",
                rf"\partial {_tex(below[1:])}_{{{','.join(self.inn)}}}",
            ]
            left = rf"\frac{{{indexed[0]}}}{{{indexed[1]}}}"
        else:
            left = rf"{_tex(self.symbol)}_{{{','.join((*self.out, *self.inn))}}}"
        return f"{left} = {right.replace('+ -', '- ')}"


def formula(
    terms: Sequence[Term],
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    symbol: str = "J",
    axes: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Formula:
    """Write terms in index notation: one name for each axis, an axis of size 1 is index 0.

    Names are given by position, so that all lines of one formula speak of the same indices; `axes` gives the caller's.
    """
    names = letters()
    if axes is None:
        out = tuple("0" if n == 1 else next(names) for n in out_shape)
        inn = tuple("0" if n == 1 else next(names) for n in in_shape)
    else:
        out = tuple(axes[0])
        inn = tuple(f"{name}'" if name in out else name for name in axes[1])
    tensors = _Names()
    lines = tuple(_line(term, out, inn, tensors) for term in terms)
    return Formula(symbol, out, inn, lines, tensors.found)


class _Names:
    """One name for one tensor: equal views share it, a second tensor of the same name gets a number."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.owner: dict[tuple, str] = {}

    def of(self, f: Factor) -> str:
        t = f.tensor
        # Meta and fake tensors have no numbers: the object is all there is to tell them by.
        where = t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" else id(t)
        key = (where, tuple(t.shape), tuple(t.stride()), f.name)
        if key not in self.owner:
            base = f.name or "F"
            name = next(n for k in count(1) if (n := base if k == 1 else f"{base}#{k}") not in self.found)
            self.owner[key] = name
            self.found[name] = t
        return self.owner[key]


def _line(term: Term, out: tuple[str, ...], inn: tuple[str, ...], tensors: _Names) -> Line:
    names = letters([*out, *inn])
    name: dict[Label, str] = {}
    whole: dict[Axis, str] = {}
    deltas: list[tuple[str, str]] = []
    sums: list[tuple[str, int]] = []
    steps: list[tuple[str, str]] = []
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
        if not inside and not shared:
            continue
        for label in axis:
            if label not in name:
                name[label] = next(names)
                sums.append((name[label], label.size))
        deltas.append((letter, _polynomial(axis, name)))
    for label in term.hidden:
        name[label] = next(names)
        sums.append((name[label], label.size))
    for r in term.relations:
        if isinstance(r, Window | Lookup):
            deltas.append((_polynomial(r.bigs, name), _place(r, name, tensors)))
        elif isinstance(r, Triangle):
            low = f"{_polynomial(r.cols, name)}{_signed(r.offset)}" if r.offset else _polynomial(r.cols, name)
            steps.append((_polynomial(r.rows, name), low))
    return Line(
        term.coef,
        tuple((tensors.of(f), tuple(name[x] for x in f.labels)) for f in term.tensors),
        tuple(deltas),
        tuple((name[s.big], s.start, s.step, name[s.small]) for s in term.selects),
        tuple(sums),
        tuple(steps),
    )


def _place(r: Window | Lookup, name: Mapping[Label, str], tensors: _Names) -> str:
    """Where a relation reads: 2*i+j-1, or idx[i][j]."""
    if isinstance(r, Lookup):
        return tensors.of(Factor(r.index, r.smalls, r.name)) + "".join(f"[{name[x]}]" for x in r.smalls)
    parts = [
        f"{_signed(step)}*{name[x]}" if abs(step) != 1 else f"{'+-'[step < 0]}{name[x]}"
        for x, step in zip(r.smalls, r.steps, strict=True)
    ]
    return ("".join(parts) + (_signed(r.start) if r.start or not parts else "")).removeprefix("+")


def _signed(n: int) -> str:
    return f"{n:+d}"


def _polynomial(axis: Axis, name: dict[Label, str]) -> str:
    parts, stride = [], 1
    for label in reversed(axis):
        parts.append(name[label] if stride == 1 else f"{stride}*{name[label]}")
        stride *= label.size
    return "+".join(reversed(parts)) or "0"


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors occupy, each storage once, and no more of a storage than its views show."""
    shown: dict[int, dict[tuple, int]] = {}
    total: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        key = storage._cdata
        view = (t.storage_offset(), tuple(t.shape), tuple(t.stride()))
        seen = torch.Size([n for n, s in zip(t.shape, t.stride(), strict=True) if s != 0]).numel()
        shown.setdefault(key, {})[view] = seen * t.element_size()
        total[key] = storage.nbytes()
    return sum(min(total[key], sum(views.values())) for key, views in shown.items())

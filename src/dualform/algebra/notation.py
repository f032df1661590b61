"""Terms in index notation: which index is called what, which tensor, and what its letters stand for.

J[i,j,k] = A[j,i] δ(i,k), where A[j,i] = 2 a[j,i] - b[j,i]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.index_products import combined
from dualform.algebra.index_text import IndexFormula, Line, affine, in_order, letters, primed, sum_letter, used
from dualform.algebra.relations import Lookup, Triangle
from dualform.algebra.terms import Axis, Factor, Label, Relation, Select, Term, Window, atoms, written_with
from dualform.storages import memory_of


def formula(
    terms: Sequence[Term], out_shape: Sequence[int], in_shape: Sequence[int], symbol: str = "J",
    axes: tuple[Sequence[str | None], Sequence[str | None]] | None = None, names: Names | None = None,
) -> IndexFormula:  # fmt: skip
    """Write terms in index notation: one name for each axis, an axis of size 1 is index 0.

    Names are given by position, so that all lines of one formula speak of the same indices; `axes` gives the caller's.
    `names` is shared by formulas that are to call one tensor by one name.
    """
    known = Names() if names is None else names
    out, inn = spoken(out_shape, in_shape, axes, known.avoid)
    summed: dict[str, int] = {}
    lines = tuple(_line(_looked_into(term, known), out, inn, known, summed) for term in terms)
    return replace(_of_lines(symbol, out, inn, lines, known), where=_where(lines, known, summed))


def spoken(
    out_shape: Sequence[int], in_shape: Sequence[int],
    axes: tuple[Sequence[str | None], Sequence[str | None]] | None, avoid: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """The caller's names of axes, letters for those that have none, and a prime on what the output has already."""
    names = letters(avoid)
    sides = axes or ([None] * len(out_shape), [None] * len(in_shape))
    out, inn = (
        tuple(("0" if n == 1 else next(names)) if name is None else name for name, n in zip(side, shape, strict=True))
        for side, shape in zip(sides, (out_shape, in_shape), strict=True)
    )
    return out, tuple(primed(inn, out))


def _of_lines(
    symbol: str, out: tuple[str, ...], inn: tuple[str, ...], lines: tuple[Line, ...], known: Names
) -> IndexFormula:
    names = used(lines)
    return IndexFormula(symbol, out, inn, lines, {name: t for name, t in known.found.items() if name in names})


def _where(lines: tuple[Line, ...], known: Names, summed: dict[str, int]) -> tuple[IndexFormula, ...]:
    """What the letters in lines stand for, and the letters in that; each with the indices that it has in the lines."""
    found: dict[str, IndexFormula] = {}
    waiting = list(lines)
    while waiting:
        line = waiting.pop(0)
        for letter, labels in line.factors:
            if letter not in known.made or letter in found:
                continue
            f = known.made[letter]
            is_plain = len(set(labels)) == len(labels) and all(x.replace("'", "").isidentifier() for x in labels)
            out = labels if is_plain else spoken(f.tensor.shape, (), None, known.avoid)[0]
            own = tuple(_line(term, out, (), known, summed) for term in written(f, known))
            found[letter] = _of_lines(letter, out, (), own, known)
            waiting += own
    return tuple(found.values())


# Products of at most so many factors are written where they stand in what a letter stands for.
MAX_FACTORS = 5


def written(f: Factor, known: Names, views: bool = True) -> tuple[Term, ...]:
    """What a factor is made of: sums stay letters, products are put in; entries of other tensors as `views` says."""
    return tuple(sorted((_looked_into(t, known, views, MAX_FACTORS) for t in f.made), key=lambda t: t.coef < 0))


def _looked_into(term: Term, known: Names, views: bool = True, most: int = 0) -> Term:
    """Put in what a factor shows entries of, and products up to `most` factors, for the factor."""
    factors: list[Factor | Relation] = []
    coef, count = term.coef, len(term.tensors)
    for f in term.factors:
        if not isinstance(f, Factor) or len(f.made) != 1:
            factors.append(f)
            continue
        more = len(f.made[0].tensors) - 1
        is_shown = views and known.shows(f) if is_view(f) else count + more <= most
        if not is_shown:
            factors.append(f)
            continue
        inner = _looked_into(written_with(f.made[0], f.labels), known, views, most and most - count + 1)
        count += len(inner.tensors) - 1
        factors += inner.factors
        coef *= inner.coef
    return replace(term, coef=coef, factors=tuple(factors))


def told(f: Factor) -> str:
    """What a factor is called, or what it is made of where it has no name."""
    lone = Term(1.0, (f,), tuple((x,) for x in f.labels), ())
    shown = formula([lone], f.tensor.shape, ())
    return f.name or (f"({shown.where[0].right()})" if len(shown.where) == 1 else "a factor")


def is_view(f: Factor) -> bool:
    """Is it entries of another tensor, each as it is?"""
    if len(f.made) != 1 or len(f.made[0].tensors) != 1 or f.made[0].coef != 1:
        return False
    (term,) = f.made
    told = {x for r in term.relations for x in getattr(r, "bigs", ())}
    return len(set(term.visible)) == len(term.out) and all(x in told or x.size == 1 for x in term.hidden)


# Letters for what is made by multiplying and adding: those that rules leave (C inverse, L factor, X solution, ...).
LETTERS_MADE = "ABDEGHKMNPQRSUVWYZ"


class Names:
    """One name for one tensor: equal views share it, a second tensor of the same name gets a number."""

    def __init__(
        self, values: Mapping[str, Tensor] | None = None, avoid: Sequence[str] = (),
        axes: Mapping[str, Sequence[str | None]] | None = None,
    ) -> None:  # fmt: skip
        """`values`: the names that are given, no other tensor gets one; `avoid`: letters that no index gets.

        axes: names of the axes of some of the values
        """
        self.values = dict(values or {})
        self.avoid = tuple(avoid)
        self.axes = axes or {}
        self.found: dict[str, Tensor] = {}
        self.made: dict[str, Factor] = {}
        self.owner: dict[tuple, str] = {}
        self.base: dict[str, str] = {}

    def of(self, f: Factor) -> str:
        """The name of a factor."""
        t = f.tensor
        # Meta and fake tensors have no numbers: the object is all there is to tell them by.
        where = t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" else id(t)
        key = (where, tuple(t.shape), tuple(t.stride()), f.name)
        if key not in self.owner:
            self.owner[key] = self._equal(f) or self._new(f)
        return self.owner[key]

    def shows(self, f: Factor) -> bool:
        """Is a factor shown as entries of another tensor? Axes of size 1 of what a rule alone made are not missed."""
        if not is_view(f):
            return False
        (term,) = f.made
        base = term.tensors[0]
        kept = tuple(x for x in base.labels if x.size != 1)
        return bool(base.made or base.name in self.values or term.relations or kept != atoms(term.out))

    def _equal(self, f: Factor) -> str:
        """The name of a tensor of the same numbers: of the same origin, or of one that another trace named."""
        given = self.values.get(f.name)
        if given is not None and is_alike(given, f.tensor):
            self.found[f.name] = f.tensor
            self.base[f.name] = f.name
            return f.name
        foreign = f.name and re.fullmatch(r"\w+", f.name) and (len(f.name) > 1 or f.name in self.values)
        known = [(name, t) for name, t in self.found.items() if self.base[name] == f.name]
        known += self.values.items() if foreign else ()
        alike = [name for name, t in known if is_alike(t, f.tensor)]
        name = next((n for n in alike if _is_same_memory(dict(known)[n], f.tensor)), alike[0] if alike else "")
        if name in self.values:
            self.found[name] = f.tensor
            self.base[name] = name
        return name

    def _new(self, f: Factor) -> str:
        base = f.name or ("" if f.made else "F")
        mark = "" if base.isidentifier() and not base[-1].isdigit() else "#"
        numbered = (base if k == 1 else f"{base}{mark}{k}" for k in count(1))
        fresh = numbered if base else letters(self.avoid, LETTERS_MADE)
        name = next(n for n in fresh if n not in self.found and n not in self.values)
        self.found[name] = f.tensor
        self.base[name] = f.name
        if f.made and not is_view(f):
            self.made[name] = f
        return name


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Have two tensors the same shape, type and numbers?"""
    if a is b or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return a is b
    return {type(a), type(b)} <= {Tensor, torch.nn.Parameter} and a.device.type != "meta" and torch.equal(a, b)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device.type != "meta" and a.data_ptr() == b.data_ptr()


def _line(term: Term, out: tuple[str, ...], inn: tuple[str, ...], tensors: Names, summed: dict[str, int]) -> Line:
    name: dict[Label, str] = {}
    whole: dict[Axis, str] = {}
    deltas: list[tuple[str, str]] = []
    sums: list[tuple[str, int]] = []
    factors = [(tensors.of(f), f.labels) for f in term.tensors]
    hints = {x: n for f, labels in factors if f in tensors.axes for x, n in zip(labels, tensors.axes[f], strict=True)}
    told: dict[Label, Any] = {r.bigs[0]: r for r in term.relations if isinstance(r, Select | Window) if _says(r, term)}

    def add(label: Label) -> None:
        if label in told:
            r = told[label]
            for x in r.smalls:
                if x not in name:
                    add(x)
            name[label] = _place(r, name, tensors)
            return
        if label.size == 1:
            name[label] = "0"
            return
        taken = [*out, *inn, *(s for s, _ in sums)]
        hint = hints.get(label)
        if hint and hint not in taken and summed.setdefault(hint, label.size) == label.size:
            name[label] = hint
        else:
            name[label] = sum_letter(label.size, [*taken, *tensors.avoid], summed)
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
        if label not in name:
            add(label)
    steps: list[tuple[str, str]] = []
    for r in term.relations:
        if isinstance(r, Triangle):
            low = f"{_polynomial(r.cols, name)}{r.offset:+d}" if r.offset else _polynomial(r.cols, name)
            steps.append((_polynomial(r.rows, name), low))
        elif isinstance(r, Window | Lookup) and r not in told.values():
            deltas.append((_polynomial(r.bigs, name), _place(r, name, tensors)))
    return Line(
        term.coef, tuple((f, tuple(name[x] for x in labels)) for f, labels in factors),
        in_order(deltas, [*out, *inn]),
        tuple((name[s.big], s.start, s.step, name[s.small]) for s in term.selects if s.big not in told),
        tuple(sums), tuple(steps),
    )  # fmt: skip


def _says(r: Select | Window, term: Term) -> bool:
    """Does a relation say what an index is that nothing else ties, and that no axis has?"""
    if len(r.bigs) != 1 or r.bigs[0] in (*term.visible, *r.smalls):
        return False
    others = [other for other in term.relations if other is not r and r.bigs[0] in other.labels]
    read = all(isinstance(other, Window | Lookup) and r.bigs[0] not in other.bigs for other in others)
    return read and (isinstance(r, Select) or r.is_total)


def _place(r: Any, name: Mapping[Label, str], tensors: Names) -> str:
    """Where a relation reads: 2*i+j-1, or idx[i][j]."""
    if isinstance(r, Lookup):
        if not r.smalls and type(r.index) is Tensor and r.index.device.type != "meta":
            return str(int(r.index))  # one place
        return tensors.of(Factor(r.index, r.smalls, r.name)) + "".join(f"[{name[x]}]" for x in r.smalls)
    if isinstance(r, Select):
        return affine(r.start, r.step, name[r.small])
    if any(not name[x].replace("'", "").isidentifier() and name[x] != "0" for x in r.smalls):
        return str(combined([(name[x], step) for x, step in zip(r.smalls, r.steps, strict=True)], r.start))
    steps = ((name[x], step) for x, step in zip(r.smalls, r.steps, strict=True) if name[x] != "0")
    parts = [f"{step:+d}*{x}" if abs(step) != 1 else f"{'+-'[step < 0]}{x}" for x, step in steps]
    return ("".join(parts) + (f"{r.start:+d}" if r.start or not parts else "")).removeprefix("+")


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

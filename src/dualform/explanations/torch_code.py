"""Write the application of a derivative as torch statements that run.

x_bar = g.sum((0,))            x_bar = torch.einsum('ij,kj->ik', g, W)
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.index_text import LETTERS
from dualform.algebra.linear_map import Derivative
from dualform.algebra.notation import Names, formula, written
from dualform.algebra.relations import Lookup, Triangle, Window
from dualform.algebra.terms import Axis, Factor, Label, Relation, Select, Term, atoms, sizes, volume
from dualform.ops.table import inverse

# Up to so many letters of stored products and sums are made in the code; more are taken as they are.
MAX_MADE = 8
# Sums up to so many characters are one statement.
MAX_LINE = 100


@dataclass(frozen=True)
class Pullback:
    """Statements that make `target` of `seed` and the tensors of `namespace`, which are called as in the formulas."""

    text: str
    namespace: dict[str, Tensor]
    seed: str
    target: str

    def run(self, g: Tensor) -> Tensor:
        """What the statements make of a seed."""
        scope: dict[str, Any] = {"torch": torch, self.seed: g, **self.namespace}
        exec(self.text, scope)
        return scope[self.target]


def vjp_code(J: Derivative, names: Names, of: str) -> Pullback:
    """Write statements that pull a gradient of the output back to the input that is called `of`."""
    spelling = _Spelling(names, J)
    g, bar = spelling.seed, spelling.free(f"{_plain(of)}_bar")
    made = _assigned(bar, [_term_code(term, g, spelling) for term in J.terms], J.in_shape, g)
    lines = [*spelling.notes, *spelling.lines, *made]
    return Pullback("\n".join(lines), spelling.namespace, g, bar)


class _Spelling:
    """What code calls things: a tensor as the formulas do, where that is a name in Python."""

    def __init__(self, names: Names, J: Derivative) -> None:
        self.names = names
        self.namespace: dict[str, Tensor] = {}
        self.notes: list[str] = []  # what the formulas call a tensor that Python cannot call so
        self.lines: list[str] = []
        self.called: dict[Any, str] = {}
        self.taken = {"torch", *names.values}
        self.seed = self.free("g")
        self.makes = len(formula(J.terms, J.out_shape, J.in_shape, names=names).where) <= MAX_MADE

    def free(self, stem: str) -> str:
        """A name that nothing else has."""
        every = (stem if k == 1 else f"{stem}_{k}" for k in count(1))
        name = next(n for n in every if n not in self.taken and n not in self.names.found)
        self.taken.add(name)
        return name

    def factor(self, f: Factor) -> str:
        """A name for a factor; a line of its own makes what is made of others."""
        key = self._key(f)
        if key not in self.called:
            self.called[key] = self._named(f, key) if isinstance(key, str) else self._viewed(f)
        return self.called[key]

    def _key(self, f: Factor) -> Any:
        """A name in the formulas, or entries of what has one."""
        return (id(f.tensor), tuple(f.tensor.shape)) if self.names.shows(f) else self.names.of(f)

    def _named(self, f: Factor, shown: str) -> str:
        plain = _plain(shown)
        name = shown if plain == shown and shown not in ("torch", self.seed) else self.free(plain)
        if shown in self.names.made and self.makes:
            parts = [_term_code(replace(t, out=(), inn=t.out), "", self) for t in written(f, self.names, views=False)]
            self.lines += _assigned(name, parts, f.tensor.shape, self.seed)
            return name
        self.namespace[name] = f.tensor
        self.notes += [f"# {name} is {shown}"] if name != shown else []
        return name

    def _viewed(self, f: Factor) -> str:
        (term,), (base,) = f.made, f.made[0].tensors
        code, labels = self.factor(base), list(base.labels)
        ties = {r.bigs[0]: r.smalls for r in term.relations if isinstance(r, Window) and len(r.bigs) == 1}
        cut = [s for s in term.selects if s.step > 0 and labels.count(s.big) == 1]
        if cut:
            cuts = {s.big: s for s in cut}
            windows = [_slice(cuts[x]) if x in cuts else ":" for x in labels]
            code += f"[{', '.join(windows).removesuffix(', :' * (len(labels) - 1 - max(map(labels.index, cuts))))}]"
            labels = [cuts[x].small if x in cuts else x for x in labels]
        flat = [x for label in labels for x in ties.get(label, (label,)) if x.size != 1]
        out = atoms(term.out)
        if flat == [x for x in out if x.size != 1] and len(cut) + len(ties) == len(term.relations):
            parts = [("", code if labels == list(out) else f"{code}.reshape({sizes(out)})")]
        else:
            parts = [_term_code(replace(term, out=(), inn=term.out), "", self)]
        if parts[0][1].isidentifier():
            return parts[0][1]
        if (key := str(parts)) not in self.called:  # other entries of the same tensor may have been the same
            self.called[key] = self.free(re.sub(r"_\d+$", "", self.called[self._key(base)]))
            self.lines += _assigned(self.called[key], parts, f.tensor.shape, self.seed)
        return self.called[key]

    def relation(self, r: Relation) -> str:
        """A name for a relation's zeros and ones, which a line of its own makes of ranges."""
        line = f"({_test(r, self)}).to({self.seed})"
        if line not in self.called:
            self.called[line] = self.free("at")
            self.lines.append(f"{self.called[line]} = {line}")
        return self.called[line]


def _assigned(name: str, parts: Sequence[tuple[str, str]], shape: Sequence[int], g: str) -> list[str]:
    """Statements that add up parts of a tensor."""
    first, *codes = (code for _, code in parts) if parts else (f"{g}.new_zeros({list(shape)})",)
    if any(window for window, _ in parts):
        lines = (f"{name}{window} {_signed(code, '=')}" for window, code in parts)
        return [f"{name} = {g}.new_zeros({list(shape)})", *lines]
    whole = " ".join([f"{name} = {_bare(first)}", *(_signed(code, "") for code in codes)])
    if len(whole) <= MAX_LINE:
        return [whole]
    return [f"{name} = {_bare(first)}", *(f"{name} = {name} {_signed(code, '')}" for code in codes)]


def _bare(code: str) -> str:
    """A product that stands alone needs no bracket."""
    return code[1:-1] if re.fullmatch(r"\([\w.]+( \* [\w.]+)+\)", code) else code


def _signed(code: str, assigned: str) -> str:
    return f"-{assigned} {code[1:]}" if code.startswith("-") else f"+{assigned} {code}"


def _term_code(term: Term, g: str, spelling: _Spelling) -> tuple[str, str]:
    """The part of the result that a term adds to, as `[1:3]`, nothing for all of it, and what it adds; g: the seed."""
    term, window = _without_windows(term, "inn")
    term, cut = _without_windows(term, "out")
    term, put = _looked_up(term, "inn", spelling)
    term, taken = _looked_up(term, "out", spelling)
    stored = list(term.factors)
    seed = atoms(term.out)
    target = atoms(term.inn)
    unique = list(dict.fromkeys(target))
    have = [x for x in unique if x in seed or any(x in f.labels for f in stored)]
    code = f"{g}{cut}" if taken is None else f"{_ordered(f'{g}{cut}', taken.order)}[{taken.places.rstrip(',')}]"
    code = _reshaped(code, term.out) if g else ""
    if not g and not stored:
        code = f"torch.ones(()).to({spelling.seed})"
    elif stored or len(set(seed)) < len(seed):
        names = [spelling.factor(f) if isinstance(f, Factor) else spelling.relation(f) for f in stored]
        code = _einsum(code, seed, stored, names, have, spelling.seed)
    else:
        gone = tuple(k for k, x in enumerate(seed) if x not in have)
        code = f"{code}.sum({gone})" if gone else code
        order = [x for x in seed if x in have]
        code = _permuted(code, order, have)
    if len(have) < len(unique):
        if have != unique[len(unique) - len(have) :]:
            code = f"{code}.reshape({[x.size if x in have else 1 for x in unique]})"
        if not window or len(unique) < len(target):  # a window takes what is broadcast to it
            code = f"{code}.expand({sizes(unique)})"
    order = list(unique)
    while len(order) < len(target):
        twice = next(x for k, x in enumerate(target) if target[:k].count(x) and order.count(x) < target.count(x))
        code = f"torch.diag_embed({code}.movedim({order.index(twice)}, -1))"
        order = [x for x in order if x is not twice] + [twice, twice]
    code = _permuted(code, order, target)
    if len(have) < len(unique) and window and any(len(axis) != 1 for axis in term.inn):
        code = f"{code}.expand({sizes(target)})"
    if [volume(axis) for axis in term.inn] != sizes(target):
        code = f"{code}.reshape({[volume(axis) for axis in term.inn]})"
    if term.coef != 1:
        code = f"-{code}" if term.coef == -1 else f"{term.coef!r} * {code}"
    if put is not None:
        code = f"{spelling.seed}.new_zeros({put.shape}).index_put(({put.places}), {code}, accumulate=True)"
        code = _ordered(code, inverse(put.order))
    return window, code


@dataclass(frozen=True)
class _Places:
    """Axes that are read at places, or added to there: first in an order; their sizes, and those of the rest."""

    order: list[int]
    shape: list[int]
    places: str


def _looked_up(term: Term, side: str, spelling: _Spelling) -> tuple[Term, _Places | None]:
    """Write a relation that says the place on whole axes, side by side, and nothing else, as indices of them."""
    axes: tuple[Axis, ...] = getattr(term, side)
    every = [*atoms(term.out), *atoms(term.inn), *(x for f in term.factors for x in f.labels)]
    found: dict[int, Any] = {}
    for r in term.relations:
        if isinstance(r, Select | Lookup) or (isinstance(r, Window) and r.is_total):
            ranges = (range(a, b) for a in range(len(axes)) for b in range(a + 1, len(axes) + 1))
            whole = next((own for own in ranges if atoms(axes[k] for k in own) == r.bigs), ())
            if whole and all(every.count(x) == 2 for x in r.bigs):
                found |= dict.fromkeys(whole, r)
    if not found:
        return term, None
    labels = list(dict.fromkeys(x for r in found.values() for x in r.smalls))
    others = [k for k, axis in enumerate(axes) if k not in found and any(x in labels for x in axis)]
    labels = list(dict.fromkeys([*(x for k in others for x in axes[k]), *labels]))
    first = sorted([*found, *others])
    texts = [_digit(found[k], axes[k], labels, spelling) if k in found else _flat(axes[k], labels) for k in first]
    rest = [k for k in range(len(axes)) if k not in first]
    order = [*first, *rest]
    changed = (*((x,) for x in labels), *(axes[k] for k in rest))
    factors = tuple(f for f in term.factors if f not in found.values())
    places = ", ".join(texts) + "," * (len(texts) == 1)
    return replace(term, factors=factors, **{side: changed}), _Places(order, [volume(axes[k]) for k in order], places)


def _digit(r: Any, axis: Axis, labels: Sequence[Label], spelling: _Spelling) -> str:
    """The index of one of the axes whose place together a relation says."""
    place = _place(r, labels, spelling) if axis else _flat(axis, labels)
    if axis in ((), r.bigs):
        return place
    start = r.bigs.index(axis[0])
    below, size = volume(r.bigs[start + len(axis) :]), volume(axis)
    place = f"({place})" if " " in place else place
    over = place if below == 1 else f"{place} // {below}"
    return f"{over} % {size}" if start else over


def _ordered(code: str, order: Sequence[int]) -> str:
    return code if list(order) == sorted(order) else f"{code}.permute({list(order)})"


def _without_windows(term: Term, side: str) -> tuple[Term, str]:
    """Write a selection that reaches one axis of one side, and nothing else, as a slice of that axis."""
    axes: list[Axis] = list(getattr(term, side))
    cuts = [":"] * len(axes)
    factors = list(term.factors)
    every = [*atoms(term.out), *atoms(term.inn), *(x for f in term.factors for x in f.labels)]
    for s in term.selects:
        for k, axis in enumerate(axes):
            if axis == (s.big,) and every.count(s.big) == 2 and s.step > 0:
                cuts[k] = _slice(s)
                axes[k] = (s.small,)
                factors.remove(s)
    while cuts and cuts[-1] == ":":
        cuts.pop()
    changed = replace(term, factors=tuple(factors), **{side: tuple(axes)})
    return changed, f"[{', '.join(cuts)}]" if cuts else ""


def _slice(s: Select) -> str:
    end = s.start + s.step * (s.small.size - 1) + 1
    return f"{s.start or ''}:{end if end < s.big.size else ''}" + (f":{s.step}" if s.step != 1 else "")


def _reshaped(code: str, axes: tuple[Axis, ...]) -> str:
    return code if all(len(axis) == 1 for axis in axes) else f"{code}.reshape({sizes(atoms(axes))})"


def _permuted(code: str, have: Sequence[Label], wanted: Sequence[Label]) -> str:
    if list(have) == list(wanted):
        return code
    left = list(range(len(have)))
    order = []
    for label in wanted:
        k = next(k for k in left if have[k] is label)
        left.remove(k)
        order.append(k)
    return f"{code}.T" if order == [1, 0] else f"{code}.permute({order})"


def _einsum(
    g: str, seed: Sequence[Label], factors: Sequence[Factor | Relation], names: Sequence[str], out: Sequence[Label],
    like: str,
) -> str:  # fmt: skip
    letters = dict(zip(dict.fromkeys([*seed, *(x for f in factors for x in _labels(f))]), LETTERS, strict=False))
    masks = [k for k, f in enumerate(factors) if isinstance(f, Factor) and f.is_mask]
    late = next((k for k in masks if {*_labels(factors[k])} <= {*out}), None)
    if late is not None and (g or len(factors) > 1):  # it selects: what it leaves out is 0, whatever the rest is
        rest = [k for k in range(len(factors)) if k != late]
        reach = {*seed, *(x for k in rest for x in _labels(factors[k]))}
        have = [x for x in out if x in reach]
        inner = _einsum(g, seed, [factors[k] for k in rest], [names[k] for k in rest], have, like)
        inner = _bare(_along(inner, have, out))
        mine = [x for x in out if x in _labels(factors[late])]
        mask = _along(_permuted(names[late], _labels(factors[late]), mine), mine, out)
        return f"torch.where({mask}, {inner}, 0)"
    names = [f"{name}.to({like})" if k in masks else name for k, name in enumerate(names)]
    operands = [*([(g, tuple(seed))] if g else []), *zip(names, map(_labels, factors), strict=True)]
    if all(labels in (tuple(out), ()) for _, labels in operands):
        joined = " * ".join(name for name, _ in operands)
        return f"({joined})" if len(operands) > 1 else joined
    if len(operands) == 1 and set(out) == set(operands[0][1]) and len(out) == len(operands[0][1]):
        return _permuted(operands[0][0], operands[0][1], out)
    spec = ",".join("".join(letters[x] for x in labels) for _, labels in operands)
    return f"torch.einsum('{spec}->{''.join(letters[x] for x in out)}', {', '.join(name for name, _ in operands)})"


def _along(code: str, have: Sequence[Label], out: Sequence[Label]) -> str:
    """Let a tensor over some axes, in their order, be spread over all."""
    is_last = [*have] == [*out][len(out) - len(have) :]
    return code if is_last else f"{code}.reshape({[x.size if x in have else 1 for x in out]})"


def _labels(f: Factor | Relation) -> tuple[Label, ...]:
    """One label for each axis of what stands for a factor."""
    return f.labels if isinstance(f, Factor) else tuple(dict.fromkeys(f.labels))


def _spread(label: Label, among: Sequence[Label]) -> str:
    """The values of an index, along its axis among others."""
    behind = len(among) - 1 - among.index(label)
    return f"torch.arange({label.size})" + (f"[:{', None' * behind}]" if behind else "")


def _flat(labels: Sequence[Label], among: Sequence[Label], steps: Sequence[int] = (), start: int = 0) -> str:
    """The row-major position of some indices, or another sum of them."""
    steps = steps or [volume(labels[k + 1 :]) for k in range(len(labels))]
    spread = [(step, _spread(x, among)) for x, step in zip(labels, steps, strict=True)]
    shown = " + ".join(text if step == 1 else f"{step} * {text}" for step, text in spread)
    return f"{shown} {'+-'[start < 0]} {abs(start)}" if start and shown else shown or f"torch.tensor({start})"


def _place(r: Any, among: Sequence[Label], spelling: _Spelling) -> str:
    """The place that a relation says, at each value of some indices."""
    if not isinstance(r, Lookup):
        return _flat(r.smalls, among, (r.step,) if isinstance(r, Select) else r.steps, r.start)
    index = spelling.factor(Factor(r.index, r.smalls, r.name)) + ("" if r.index.is_cpu else ".cpu()")
    is_last = [*r.smalls] == [*among][len(among) - len(r.smalls) :]
    return index if is_last else f"{index}[{', '.join(_spread(x, among) for x in r.smalls)}]"


def _test(r: Relation, spelling: _Spelling) -> str:
    """Where a relation holds, in ranges."""
    labels = _labels(r)
    if isinstance(r, Triangle):
        return f"{_flat(r.rows, labels)} >= {_flat(r.cols, labels)}" + (f" + {r.offset}" if r.offset else "")
    if isinstance(r, Lookup | Select | Window):
        return f"{_place(r, labels, spelling)} == {_flat(r.bigs, labels)}"
    raise NotImplementedError(f"vjp_code: there is no way to write {type(r).__name__}")


def _plain(name: str) -> str:
    """A Python name like another."""
    plain = name.replace("'", "_slope").replace("²", "_sq").replace("√", "sqrt_")
    base = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_") or "F"
    return f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) else base

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
    stored = list(term.factors)
    seed = atoms(term.out)
    target = atoms(term.inn)
    unique = list(dict.fromkeys(target))
    have = [x for x in unique if x in seed or any(x in f.labels for f in stored)]
    code = _reshaped(f"{g}{cut}", term.out) if g else ""
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
    return window, code


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
        inner = _einsum(g, seed, [factors[k] for k in rest], [names[k] for k in rest], out, like)
        mine = _labels(factors[late])
        mask = _permuted(names[late], mine, [x for x in out if x in mine])
        spread = [x.size if x in mine else 1 for x in out]
        mask = mask if len(mine) == len(out) else f"{mask}.reshape({spread})"
        return f"torch.where({mask}, {inner[1:-1] if inner[0] == '(' else inner}, 0)"
    names = [f"{name}.to({like})" if k in masks else name for k, name in enumerate(names)]
    operands = [*([(g, tuple(seed))] if g else []), *zip(names, map(_labels, factors), strict=True)]
    if all(labels in (tuple(out), ()) for _, labels in operands):
        joined = " * ".join(name for name, _ in operands)
        return f"({joined})" if len(operands) > 1 else joined
    if len(operands) == 1 and set(out) == set(operands[0][1]) and len(out) == len(operands[0][1]):
        return _permuted(names[0], operands[0][1], out)
    spec = ",".join("".join(letters[x] for x in labels) for _, labels in operands)
    return f"torch.einsum('{spec}->{''.join(letters[x] for x in out)}', {', '.join(name for name, _ in operands)})"


def _labels(f: Factor | Relation) -> tuple[Label, ...]:
    """One label for each axis of what stands for a factor."""
    return f.labels if isinstance(f, Factor) else tuple(dict.fromkeys(f.labels))


def _test(r: Relation, spelling: _Spelling) -> str:
    """Where a relation holds, in ranges."""
    labels = _labels(r)

    def spread(label: Label) -> str:
        behind = len(labels) - 1 - labels.index(label)
        return f"torch.arange({label.size})" + (f"[:{', None' * behind}]" if behind else "")

    def flat(labels: Sequence[Label], steps: Sequence[int], start: int) -> str:
        parts = [spread(x) if step == 1 else f"{step} * {spread(x)}" for x, step in zip(labels, steps, strict=True)]
        shown = " + ".join(parts) or "0"
        return f"{shown} {'+-'[start < 0]} {abs(start)}" if start else shown

    def place(labels: Sequence[Label]) -> str:
        return flat(labels, [volume(labels[k + 1 :]) for k in range(len(labels))], 0)

    if isinstance(r, Triangle):
        test = f"{place(r.rows)} >= {place(r.cols)}" + (f" + {r.offset}" if r.offset else "")
    elif isinstance(r, Lookup):
        index = spelling.factor(Factor(r.index, r.smalls, r.name)) + ("" if r.index.is_cpu else ".cpu()")
        test = f"{index}[{', '.join([spread(x) for x in r.smalls]) or '()'}] == {place(r.bigs)}"
    elif isinstance(r, Select | Window):
        steps = (r.step,) if isinstance(r, Select) else r.steps
        test = f"{flat(r.smalls, steps, r.start)} == {place(r.bigs)}"
    else:
        raise NotImplementedError(f"vjp_code: there is no way to write {type(r).__name__}")
    return test


def _plain(name: str) -> str:
    """A Python name like another."""
    plain = name.replace("'", "_slope").replace("²", "_sq").replace("√", "sqrt_")
    base = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_") or "F"
    return f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) else base

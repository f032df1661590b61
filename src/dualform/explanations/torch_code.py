"""Write the application of a derivative as torch statements that run.

x_bar = g.sum((0,))            x_bar = torch.einsum('ij,kj->ik', g, W)
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dualform.algebra.linear_map import Derivative
from dualform.algebra.notation import LETTERS
from dualform.algebra.relations import Lookup, Triangle, Window
from dualform.algebra.terms import Axis, Factor, Label, Relation, Select, Term, atoms, sizes, volume


def vjp_code(J: Derivative) -> tuple[str, dict[str, Tensor]]:
    """Write statements that make `x_bar` from `g`, and the tensors that they name."""
    namespace: dict[str, Tensor] = {}
    relations: list[str] = []
    parts = [_term_code(term, namespace, relations) for term in J.terms]
    relations = [*_spelt(J, namespace), *relations]
    if not parts:
        return f"x_bar = torch.zeros({J.in_shape}, dtype={J.dtype})", namespace
    if not any(window for window, _ in parts):
        codes = [code for _, code in parts]
        more = (f"x_bar = x_bar {_signed(code, '')}" for code in codes[1:])
        return "\n".join([*relations, f"x_bar = {codes[0]}", *more]), namespace
    lines = [*relations, f"x_bar = g.new_zeros({list(J.in_shape)})"]
    return "\n".join([*lines, *(f"x_bar{window} {_signed(code, '=')}" for window, code in parts)]), namespace


def _spelt(J: Derivative, namespace: dict[str, Tensor]) -> list[str]:
    """What the formulas call a factor whose name is no Python name."""
    called: dict[int, list[str]] = {}
    for f in (f for term in J.terms for f in term.tensors):
        called.setdefault(id(f.tensor), []).append(f.name)
    given = {name: called.get(id(tensor), [name]) for name, tensor in namespace.items()}
    return [f"# {name} is {others[0]}" for name, others in given.items() if name not in others]


def _signed(code: str, assigned: str) -> str:
    return f"-{assigned} {code[1:]}" if code.startswith("-") else f"+{assigned} {code}"


def _term_code(term: Term, namespace: dict[str, Tensor], relations: list[str]) -> tuple[str, str]:
    """The part of `x_bar` that a term adds to, as `[1:3]` or nothing for all of it, and what it adds."""
    term, window = _without_windows(term, "inn")
    term, cut = _without_windows(term, "out")
    stored = list(term.factors)
    seed = atoms(term.out)
    target = atoms(term.inn)
    unique = list(dict.fromkeys(target))
    have = [x for x in unique if x in seed or any(x in f.labels for f in stored)]
    code = _reshaped(f"g{cut}", term.out)
    if stored or len(set(seed)) < len(seed):
        names = [
            _identifier(f, namespace) if isinstance(f, Factor) else _related(f, namespace, relations) for f in stored
        ]
        code = _einsum(code, seed, stored, names, have)
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
                end = s.start + s.step * (s.small.size - 1) + 1
                cuts[k] = f"{s.start or ''}:{end if end < s.big.size else ''}" + (f":{s.step}" if s.step != 1 else "")
                axes[k] = (s.small,)
                factors.remove(s)
    while cuts and cuts[-1] == ":":
        cuts.pop()
    changed = replace(term, factors=tuple(factors), **{side: tuple(axes)})
    return changed, f"[{', '.join(cuts)}]" if cuts else ""


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
    return f"{code}.permute({order})"


def _einsum(
    g: str, seed: Sequence[Label], factors: Sequence[Factor | Relation], names: Sequence[str], out: Sequence[Label]
) -> str:
    letters = dict(zip(dict.fromkeys([*seed, *(x for f in factors for x in _labels(f))]), LETTERS, strict=False))
    spec = ",".join("".join(letters[x] for x in labels) for labels in (seed, *(_labels(f) for f in factors)))
    if not seed and len(factors) == 1 and _labels(factors[0]) == tuple(out):
        return f"{g} * {names[0]}"
    if all(_labels(f) == tuple(seed) for f in factors) and list(seed) == list(out):
        return f"({' * '.join([g, *names])})"
    return f"torch.einsum('{spec}->{''.join(letters[x] for x in out)}', {', '.join([g, *names])})"


def _labels(f: Factor | Relation) -> tuple[Label, ...]:
    """One label for each axis of what stands for a factor."""
    return tuple(dict.fromkeys(f.labels))


def _related(r: Relation, namespace: dict[str, Tensor], relations: list[str]) -> str:
    """A name for a relation's zeros and ones, which a line of its own makes of ranges."""

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
        index = _identifier(Factor(r.index, r.smalls, r.name), namespace) + ("" if r.index.is_cpu else ".cpu()")
        test = f"{index}[{', '.join([spread(x) for x in r.smalls]) or '()'}] == {place(r.bigs)}"
    elif isinstance(r, Select | Window):
        steps = (r.step,) if isinstance(r, Select) else r.steps
        test = f"{flat(r.smalls, steps, r.start)} == {place(r.bigs)}"
    else:
        raise NotImplementedError(f"vjp_code: there is no way to write {type(r).__name__}")
    line = f"({test}).to(g)"
    for known in relations:
        if known.endswith(f" = {line}"):
            return known.split(" = ")[0]
    relations.append(f"at{len(relations) + 1} = {line}")
    return relations[-1].split(" = ")[0]


def _identifier(f: Factor, namespace: dict[str, Tensor]) -> str:
    """A Python name for a factor: its own where that is one."""
    plain = f.name.replace("'", "_slope").replace("²", "_sq").replace("√", "sqrt_")
    base = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_") or "F"
    base = f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) or base in ("g", "torch", "x_bar") else base
    name, k = base, 2
    while name in namespace and namespace[name] is not f.tensor:
        name, k = f"{base}_{k}", k + 1
    namespace[name] = f.tensor
    return name

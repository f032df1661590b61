"""Write the application of a derivative as torch statements that run.

x_bar = g.sum((0,))            x_bar = torch.einsum('ij,kj->ik', g, W)
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dualform.calculus.notation import LETTERS
from dualform.calculus.structure import Derivative
from dualform.calculus.terms import Axis, Factor, Label, Term, atoms, sizes, volume


def vjp_code(J: Derivative) -> tuple[str, dict[str, Tensor]]:
    """Write statements that make `x_bar` from `g`, and the tensors that they name."""
    namespace: dict[str, Tensor] = {}
    like = torch.empty((), dtype=J.dtype, device=J.device)
    parts = [_term_code(term, J.in_shape, namespace, like) for term in J.terms]
    if not parts:
        return f"x_bar = torch.zeros({J.in_shape}, dtype={J.dtype})", namespace
    lines = [f"x_bar = {parts[0]}"] + [_added(part) for part in parts[1:]]
    return "\n".join(lines), namespace


def _added(part: str) -> str:
    return f"x_bar = x_bar - {part[1:]}" if part.startswith("-") else f"x_bar = x_bar + {part}"


def _term_code(term: Term, in_shape: Sequence[int], namespace: dict[str, Tensor], like: Tensor) -> str:
    stored = [f if isinstance(f, Factor) else f.dense(like) for f in term.factors]
    seed = atoms(term.out)
    target = atoms(term.inn)
    unique = list(dict.fromkeys(target))
    have = [x for x in unique if x in seed or any(x in f.labels for f in stored)]
    code = _reshaped("g", term.out)
    if stored or len(set(seed)) < len(seed):
        code = _einsum(code, seed, stored, have, namespace)
    else:
        gone = tuple(k for k, x in enumerate(seed) if x not in have)
        code = f"{code}.sum({gone})" if gone else code
        order = [x for x in seed if x in have]
        code = _permuted(code, order, have)
    if len(have) < len(unique):
        shape = [x.size if x in have else 1 for x in unique]
        code = f"{code}.reshape({shape}).expand({sizes(unique)})"
    order = list(unique)
    while len(order) < len(target):
        twice = next(x for k, x in enumerate(target) if target[:k].count(x) and order.count(x) < target.count(x))
        code = f"torch.diag_embed({code}.movedim({order.index(twice)}, -1))"
        order = [x for x in order if x is not twice] + [twice, twice]
    code = _permuted(code, order, target)
    if [volume(axis) for axis in term.inn] != sizes(target):
        code = f"{code}.reshape({list(in_shape)})"
    if term.coef != 1:
        code = f"-{code}" if term.coef == -1 else f"{term.coef!r} * {code}"
    return code


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
    g: str, seed: Sequence[Label], factors: Sequence[Factor], out: Sequence[Label], namespace: dict[str, Tensor]
) -> str:
    letters = dict(zip(dict.fromkeys([*seed, *(x for f in factors for x in f.labels)]), LETTERS, strict=False))
    spec = ",".join("".join(letters[x] for x in labels) for labels in (seed, *(f.labels for f in factors)))
    names = [_identifier(f, namespace) for f in factors]
    if all(f.labels == tuple(seed) for f in factors) and list(seed) == list(out):
        return f"({' * '.join([g, *names])})"
    return f"torch.einsum('{spec}->{''.join(letters[x] for x in out)}', {', '.join([g, *names])})"


def _identifier(f: Factor, namespace: dict[str, Tensor]) -> str:
    """A Python name for a factor: its own where that is one."""
    base = re.sub(r"\W+", "_", f.name.replace("'", "_slope").replace("·", "_")).strip("_") or "F"
    base = f"_{base}" if base[0].isdigit() or keyword.iskeyword(base) or base in ("g", "torch", "x_bar") else base
    name, k = base, 2
    while name in namespace and namespace[name] is not f.tensor:
        name, k = f"{base}_{k}", k + 1
    namespace[name] = f.tensor
    return name

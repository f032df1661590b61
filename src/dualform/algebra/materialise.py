"""From a term to a tensor: contract its factors, then put the values where its deltas and selections say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dualform.algebra.contract import contract
from dualform.algebra.terms import Axis, Factor, Label, Relation, Term, atoms, sizes, volume

# Bytes above which nothing dense is formed, unless `dense()` is told a limit.
DENSE_LIMIT = 4 * 2**30


ALONG = "Use J.vjp or J.jvp, which go along the graph, or a smaller argument."


def expect_room(function: str, what: str, size: int, advice: str = ALONG) -> None:
    """Refuse to form a dense array of so many bytes that nobody asked for."""
    if size > DENSE_LIMIT:
        raise MemoryError(
            f"{function}: {what} takes {size:,} bytes if it is stored dense; expected at most {DENSE_LIMIT:,}. {advice}"
        )


def spread(term: Term, axes: Sequence[Axis], seeds: Sequence[Factor], like: Tensor) -> Tensor:
    """Contract a term with seed factors into a tensor whose axes are `axes`, with pure ops only (traces, vmaps)."""
    shape = [volume(axis) for axis in axes]
    labels = atoms(axes)
    unique = list(dict.fromkeys(labels))
    factors = [*seeds, *term.factors]
    value, have = gather(factors, unique, like)
    if term.coef != 1:
        value = -value if term.coef == -1 else value * term.coef
    for axis, label in enumerate(unique):
        if label not in have:
            value = value.unsqueeze(axis)
    if len(have) < len(unique):
        value = value.expand(sizes(unique))
    while len(unique) < len(labels):
        repeated = next(label for k, label in enumerate(labels) if label in labels[:k])
        value, unique, labels = _embedded(value, unique, labels, repeated)
    if unique != list(labels):
        value = value.permute([unique.index(label) for label in labels])
    return value if list(value.shape) == shape else value.reshape(shape)


def _embedded(
    value: Tensor, unique: list[Label], labels: tuple[Label, ...], repeated: Label
) -> tuple[Tensor, list[Label], tuple[Label, ...]]:
    """Give the second occurrence of a repeated label an axis of its own, zero off the diagonal."""
    twin = Label(repeated.size, repeated.name)
    axis = unique.index(repeated)
    value = torch.diag_embed(value.movedim(axis, -1))
    rest = [label for label in unique if label is not repeated]
    second = [k for k, label in enumerate(labels) if label is repeated][1]
    return value, [*rest, repeated, twin], (*labels[:second], twin, *labels[second + 1 :])


def gather(factors: Sequence[Factor | Relation], wanted: Sequence[Label], like: Tensor) -> tuple[Tensor, list[Label]]:
    """Contract factors onto those of the wanted labels that they have; no factor at all is the number 1."""
    have = [label for label in wanted if any(label in f.labels for f in factors)]
    factors = list(factors)
    if not any(isinstance(f, Factor) and f.tensor.dtype is not torch.bool for f in factors):
        factors.append(Factor(torch.ones((), dtype=like.dtype, device=like.device), (), "1"))
    value = contract(factors, have)
    return value if value.is_floating_point() else value.to(like.dtype), have  # of masks alone, a count


# The part of the result, and the least number of entries, that the values of a term may take while they are placed.
PART, LEAST = 128, 2**16


def scatter(term: Term, axes: Sequence[Axis], result: Tensor) -> None:
    """Add a term into a fresh contiguous tensor: a delta is a stride, a selection a stride and an offset.

    A product that is large itself is computed and placed piece by piece along one label.
    """
    factors, labels, strides, offset = _laid_out(term, axes)
    have = [x for x in labels if any(x in f.labels for f in factors)]
    free = [x for x in have if not any(x in f.labels for f in factors if not isinstance(f, Factor))]
    is_view = len(factors) == 1 and isinstance(factors[0], Factor) and len(have) == len(factors[0].labels)
    pieces = math.ceil(volume(have) / max(result.numel() // PART, LEAST))
    if is_view or not free or pieces < 2:
        result.as_strided(sizes(labels), strides, offset).add_(_spread(factors, labels, result), alpha=term.coef)
        return
    along = next((x for x in free if x.size >= pieces), max(free, key=lambda x: x.size))
    at = labels.index(along)
    count = math.ceil(along.size / pieces)
    for start in range(0, along.size, count):
        piece = Label(min(count, along.size - start))
        cut = [_narrowed(f, along, piece, start) for f in factors]
        some = [piece if x is along else x for x in labels]
        view = result.as_strided(sizes(some), strides, offset + start * strides[at])
        view.add_(_spread(cut, some, result), alpha=term.coef)


def _narrowed(f: Factor | Relation, along: Label, piece: Label, start: int) -> Factor | Relation:
    if along not in f.labels or not isinstance(f, Factor):
        return f
    axis = f.labels.index(along)
    labels = tuple(piece if x is along else x for x in f.labels)
    return Factor(f.tensor.narrow(axis, start, piece.size), labels, f.name)


def _spread(factors: Sequence[Factor | Relation], labels: Sequence[Label], like: Tensor) -> Tensor:
    """Contract factors onto labels; an axis that they lack has size 1."""
    value, have = gather(factors, labels, like)
    for axis, label in enumerate(labels):
        if label not in have:
            value = value.unsqueeze(axis)
    return value


def _laid_out(term: Term, axes: Sequence[Axis]) -> tuple[list[Factor | Relation], list[Label], list[int], int]:
    """Where a term's labels step in the flattened tensor; selections that become a stride and an offset are gone."""
    strides: dict[Label, int] = {}
    offset = 0
    step = 1
    for label in reversed(atoms(axes)):
        strides[label] = strides.get(label, 0) + step
        step *= label.size
    factors: list[Factor | Relation] = list(term.factors)
    bound = [label for f in term.tensors for label in f.labels]
    for s in term.selects:
        shared = [f for f in term.relations if f is not s and s.big in f.labels]
        if s.step > 0 and s.big in strides and s.big not in bound and not shared:
            outer = strides.pop(s.big)
            strides[s.small] = strides.get(s.small, 0) + outer * s.step
            offset += outer * s.start
            factors.remove(s)
    labels = sorted(strides, key=lambda x: -strides[x])
    return factors, labels, [strides[x] for x in labels], offset

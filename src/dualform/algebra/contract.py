"""Contraction of labelled tensors, pair by pair, at a cost that can be read before it is paid.

    out[labels] = sum over the other labels of prod factors

A pairwise step becomes an elementwise product, a matrix product, or a batched one; the ops emitted are the ones a
person would write, because the traced result is printed as code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.planner import Price, flops, free_order, get_symbol
from dualform.algebra.relations import Reading, Triangle, Window, is_padded, read, summed_up, write
from dualform.algebra.terms import Factor, Label, Relation, diagonal, sizes, volume


@dataclass(frozen=True)
class ContractionStep:
    """One pairwise step: `kind` is mul, mm (a matrix product of any batch), or dot (a product, then a sum)."""

    kind: str
    left: str
    right: str
    result: str
    price: Price

    def __str__(self) -> str:
        step = f"{self.left} {self.right} -> {self.result}   {self.kind}"
        return f"{step}, {self.price.flops:,} flops, {self.price.bytes:,} bytes"


@dataclass(frozen=True)
class ContractionPlan:
    """The order of a contraction and its cost; `bytes`: what steps write, `naive`: flops in one loop nest."""

    path: tuple[tuple[int, ...], ...]
    steps: tuple[ContractionStep, ...]
    naive: int

    @property
    def price(self) -> Price:
        return sum((step.price for step in self.steps), Price())

    @property
    def flops(self) -> int:
        return int(self.price.flops)

    @property
    def matmul_flops(self) -> int:
        """The part of `flops` that runs as matrix products."""
        return sum(int(step.price.flops) for step in self.steps if step.kind == "mm")

    @property
    def bytes(self) -> int:
        return int(self.price.bytes)

    def __str__(self) -> str:
        lines = [
            f"{len(self.steps)} steps, {self.flops:,} flops, {self.bytes:,} bytes written; "
            f"one loop nest: {self.naive:,} flops; largest intermediate: {self.price.largest:,} numbers"
        ]
        return "\n".join([*lines, *(f"  {k + 1}. {step}" for k, step in enumerate(self.steps))])


@dataclass(frozen=True)
class _Task:
    """A contraction without relations: operands, the labels computed, what is put back where afterwards; are there
    masks among numbers?"""

    operands: list[Factor]
    out: tuple[Label, ...]
    writes: list[tuple[Reading, tuple[Label, ...]]]
    has_masks: bool


def _ordered(operands: Sequence[Factor], out: Sequence[Label]) -> tuple[tuple[int, ...], ...]:
    number = {x: k for k, x in enumerate(dict.fromkeys([*out, *(x for f in operands for x in f.labels)]))}
    inputs = tuple(frozenset(number[x] for x in f.labels) for f in operands)
    return free_order(inputs, frozenset(number[x] for x in out), tuple(sizes(number)))


def _prepare(factors: Sequence[Factor | Relation], out: Sequence[Label]) -> _Task:
    """Replace every index that a relation reads by its place: reads of the operands, then writes of the result."""
    operands = [diagonal(f) for f in factors if isinstance(f, Factor)]
    relations = [f for f in factors if isinstance(f, Relation)]
    like = operands[0].tensor if operands else torch.ones(())
    result, writes = list(out), []
    while relations:
        r = _next(relations)
        relations.remove(r)
        if isinstance(r, Triangle):
            operands = _summed_up(r, operands, relations, result, like)
            continue
        reading: Any = r
        if set(reading.smalls) & set(reading.bigs) or len(set(reading.bigs)) < len(reading.bigs):
            operands.append(r.dense(like))
            continue
        twins = [o for o in relations if set(o.labels) & set(reading.bigs)]
        operands += [o.dense(like) for o in twins]
        relations = [o for o in relations if o not in twins]
        if isinstance(r, Window) and not r.is_total:
            # What is read outside is 0, but times another factor that reaches there.
            beside = any({*r.smalls} <= {*f.labels} and not f.is_mask for f in operands)
            if beside or not any(is_padded(r, f) for f in operands):
                operands.append(r.inside(like))
        operands = [read(reading, f) for f in operands]
        if any(x in result for x in reading.bigs):
            writes.append((reading, tuple(result)))
            result = _replaced(result, reading)
        present = {x for f in (*operands, *relations) for x in f.labels}
        operands = _with_ones(operands, [x for x in reading.smalls if x not in present], like)
    operands = [_summed(f, _lonely(k, operands, result)) for k, f in enumerate(operands)]
    dtypes = {f.tensor.dtype for f in operands}
    has_masks = len(dtypes) > 1 and torch.bool in dtypes
    if len(dtypes - {torch.bool}) > 1:
        common = reduce(torch.promote_types, dtypes)
        operands = [f if f.is_mask or f.tensor.dtype == common else _cast(f, common) for f in operands]
    return _Task(operands, tuple(result), writes[::-1], has_masks)


def _next(relations: Sequence[Relation]) -> Relation:
    """A relation whose read indices say no other relation's place, so that reads nest; triangles come last."""
    functions: list[Any] = [r for r in relations if not isinstance(r, Triangle)]
    inner = {x for r in functions for x in r.smalls}
    return next((r for r in functions if not inner & set(r.bigs)), (functions or relations)[0])


def _cast(f: Factor, dtype: torch.dtype) -> Factor:
    return replace(f, tensor=f.tensor.to(dtype))


def _replaced(result: Sequence[Label], r: Reading) -> list[Label]:
    new = [x for x in r.smalls if x not in result]
    first = next(k for k, x in enumerate(result) if x in r.bigs)
    kept = [x for x in result if x not in r.bigs]
    return [*kept[:first], *new, *kept[first:]]


def _with_ones(operands: list[Factor], labels: Sequence[Label], like: Tensor) -> list[Factor]:
    """Give labels that no operand has a factor of ones."""
    for x in labels:
        if x.size == 1 and operands:
            first = operands[0]
            operands = [Factor(first.tensor.unsqueeze(0), (x, *first.labels), first.name), *operands[1:]]
        else:
            operands = [*operands, Factor(torch.ones(x.size, dtype=like.dtype, device=like.device), (x,), "1")]
    return operands


def _summed_up(
    r: Triangle, operands: list[Factor], others: Sequence[Relation], result: Sequence[Label], like: Tensor
) -> list[Factor]:
    """A running sum where one operand alone has the summed index; else the triangle as a mask."""
    taken = {x for o in others for x in o.labels}
    for gone in (*r.cols, *r.rows):
        owners = [f for f in operands if gone in f.labels]
        if len(owners) == 1 and gone not in result and gone not in taken:
            total = summed_up(r, owners[0])
            if total is not None and gone not in total.labels:
                return [total if f is owners[0] else f for f in operands]
    return [*operands, r.dense(like)]


def _lonely(position: int, operands: Sequence[Factor], out: Sequence[Label]) -> list[Label]:
    others = {label for k, f in enumerate(operands) if k != position for label in f.labels} | set(out)
    return [label for label in operands[position].labels if label not in others]


def _summed(f: Factor, labels: Sequence[Label]) -> Factor:
    if not labels:
        return f
    tensor = f.tensor.sum([f.labels.index(label) for label in labels])
    return Factor(tensor, tuple(x for x in f.labels if x not in labels), f.name)


def plan(factors: Sequence[Factor | Relation], out: Sequence[Label]) -> ContractionPlan:
    """Choose the order of a contraction and price it; reads shapes only.

    flops of a pairwise step = 2 prod(sizes) if it sums an index, prod(sizes) if it does not
    Shape:  as `contract`.
    Dtype:  bytes are counted in the dtype of the factors.
    Raises: ValueError if a label of `out` is in no factor.
    """
    task = _prepare(factors, out)
    _check(task, out)
    names = _names(task)

    def show(name: str, labels: Sequence[Label]) -> str:
        return f"{name}[{','.join(names[label] for label in labels)}]"

    path, steps, work = _ordered(task.operands, task.out), [], list(task.operands)
    fresh = count(1)
    for positions in path:
        if len(positions) < 2:
            continue
        right, left = (work.pop(k) for k in sorted(positions, reverse=True))
        keep = {label for f in work for label in f.labels} | set(task.out)
        union = list(dict.fromkeys([*left.labels, *right.labels]))
        kept = tuple(sorted((label for label in union if label in keep), key=_rank(task.out)))
        kind = _kind(left, right, keep)
        made = volume(kept)
        bytes_each = max(f.tensor.element_size() for f in (left, right))
        price = Price(flops(volume(union), kind != "mul"), made * bytes_each, made if work else 0)
        result = Factor(left.tensor, kept, f"t{next(fresh)}")
        a, b = (show(f.name or "_", f.labels) for f in (left, right))
        steps.append(ContractionStep(kind, a, b, show(result.name, kept), price))
        work.append(result)
    every = {label for f in task.operands for label in f.labels}
    return ContractionPlan(path, tuple(steps), flops(volume(every), len(every) > len(task.out), len(task.operands)))


def _rank(order: Sequence[Label]) -> Callable[[Label], int]:
    position = {label: k for k, label in enumerate(order)}
    return lambda label: position.get(label, len(position))


def _kind(a: Factor, b: Factor, keep: set[Label]) -> str:
    shared = set(a.labels) & set(b.labels)
    if shared <= keep:
        return "mul"
    own = (set(a.labels) ^ set(b.labels)) & keep
    return "mm" if own else "dot"


def _names(task: _Task) -> dict[Label, str]:
    names: dict[Label, str] = {}
    free_letters = (get_symbol(k) for k in count(8))
    for label in [*task.out, *(label for f in task.operands for label in f.labels)]:
        if label not in names:
            free = label.name and label.name not in names.values()
            names[label] = label.name if free else next(x for x in free_letters if x not in names.values())
    return names


def _check(task: _Task, out: Sequence[Label]) -> None:
    missing = [label for label in task.out if not any(label in f.labels for f in task.operands)]
    if missing or not task.operands:
        raise ValueError(
            f"contract: out {list(out)} has labels {missing} that no factor has; expand the result instead."
        )


def contract(factors: Sequence[Factor | Relation], out: Sequence[Label]) -> Tensor:
    """Contract labelled factors into one tensor with axes `out`.

    out[labels] = sum over all other labels of prod factors (a relation counts as a 0/1 factor, and stores nothing)
    Where a mask is False the product is 0, whatever the other factors are.
    Shape:  factors, each one label per axis -> (sizes of `out`); a label that repeats inside a factor is a diagonal.
    Dtype:  that of the factors, promoted to one.
    Raises: ValueError if a label of `out` is in no factor.
    Example:
        >>> i, j, k = Label(2), Label(3), Label(4)
        >>> contract([Factor(torch.ones(2, 3), (i, j)), Factor(torch.ones(3, 4), (j, k))], (i, k)).shape
        torch.Size([2, 4])
    """
    task = _prepare(factors, out)
    _check(task, out)
    work, masks = _selected(task) if task.has_masks else (list(task.operands), [])
    for positions in _ordered(work, task.out):
        if len(positions) < 2:
            continue
        b, a = (work.pop(k) for k in sorted(positions, reverse=True))
        hints = [task.out] if not work else [*(f.labels for f in work), task.out]
        keep = {label for f in work for label in f.labels} | set(task.out)
        if a.is_mask and b.is_mask and {*a.labels} & {*b.labels} - keep:  # what they count is a number
            a = _cast(a, next((f.tensor.dtype for f in task.operands if not f.is_mask), torch.get_default_dtype()))
        work.append(_pair(a, b, keep, hints))
    (result,) = work
    result = _summed(result, _lonely(0, [result], task.out))
    for mask in masks:
        result = _product(mask, result, [task.out])
    for relation, wanted in task.writes:
        result = write(relation, result, wanted)
    return _permuted(result, out)


def _selected(task: _Task) -> tuple[list[Factor], list[Factor]]:
    """The operands, and the masks that select of the result. What a mask selects of a sum, it selects of its parts.

    A mask over summed labels selects of the operands that have all its labels, after those within them are multiplied.
    """
    masks = [f for f in task.operands if f.is_mask]
    numbers = [f for f in task.operands if not f.is_mask]
    late = [m for m in masks if {*m.labels} <= {*task.out}]
    left: list[Factor] = []
    for mask in (m for m in masks if m not in late):
        own = {*mask.labels}
        inside = [f for f in numbers if {*f.labels} < own]
        around = [f for f in numbers if {*f.labels} >= own]
        if not inside and not around:
            left.append(mask)
            continue
        first = reduce(lambda a, b: _product(a, b, [b.labels]), [*inside, *around[:1]])
        met = [_product(mask, f, [f.labels]) for f in (first, *around[1:])]
        numbers = [f for f in numbers if f not in inside and f not in around] + met
    return [*numbers, *left], late


def _permuted(f: Factor, order: Sequence[Label]) -> Tensor:
    if tuple(order) == f.labels:
        return f.tensor
    if len(order) == 2:
        return f.tensor.t()
    return f.tensor.permute([f.labels.index(label) for label in order])


def aligned(f: Factor, order: Sequence[Label]) -> Tensor:
    """Permute to `order` and unsqueeze the labels that are absent (leading ones broadcast by themselves)."""
    tensor = _permuted(f, [label for label in order if label in f.labels])
    axis = 0
    for label in order:
        if label in f.labels:
            axis += 1
        elif axis:
            tensor = tensor.unsqueeze(axis)
            axis += 1
    return tensor


def _pair(a: Factor, b: Factor, keep: set[Label], hints: Sequence[Sequence[Label]]) -> Factor:
    shared = [label for label in a.labels if label in b.labels]
    a = _summed(a, [label for label in a.labels if label not in shared and label not in keep])
    b = _summed(b, [label for label in b.labels if label not in shared and label not in keep])
    summed = [label for label in shared if label not in keep]
    batch = [label for label in shared if label in keep]
    rows = [label for label in a.labels if label not in shared]
    cols = [label for label in b.labels if label not in shared]
    if not summed:
        return _product(a, b, hints)
    if a.tensor.dtype is not b.tensor.dtype:
        common = torch.promote_types(a.tensor.dtype, b.tensor.dtype)
        a, b = _cast(a, common), _cast(b, common)
    if not rows and not cols and (batch or len(summed) > 1):
        product = _product(a, b, [[*batch, *summed]])
        return _summed(product, summed)
    if not _rows_first(rows, cols, hints):
        a, b, rows, cols = b, a, cols, rows
    return _matmul(a, b, batch, rows, summed, cols)


def _rows_first(rows: list[Label], cols: list[Label], hints: Sequence[Sequence[Label]]) -> bool:
    """Put the result's axes in the order that its next use wants, so that no transpose is needed there."""
    if not rows or not cols:
        return bool(rows) or not cols
    for hint in hints:
        r = [k for k, label in enumerate(hint) if label in rows]
        c = [k for k, label in enumerate(hint) if label in cols]
        if r and c:
            return min(r) < min(c)
    for label in hints[-1]:
        if label in rows or label in cols:
            return label in rows
    return True


def _product(a: Factor, b: Factor, hints: Sequence[Sequence[Label]]) -> Factor:
    union = list(dict.fromkeys([*a.labels, *b.labels]))
    if set(a.labels) == set(union):
        order = list(a.labels)
    elif set(b.labels) == set(union):
        order = list(b.labels)
    else:
        order = sorted(union, key=_rank(hints[-1]))
    for hint in hints:
        if set(hint) == set(union):
            order = list(hint)
            break
    x, y = aligned(a, order), aligned(b, order)
    if a.tensor.dtype is b.tensor.dtype or a.is_mask is b.is_mask:
        return Factor(x & y if a.is_mask else x * y, tuple(order))
    return Factor(torch.where(x, y, 0) if a.is_mask else torch.where(y, x, 0), tuple(order))


def _matmul(
    a: Factor, b: Factor, batch: list[Label], rows: list[Label], summed: list[Label], cols: list[Label]
) -> Factor:
    if not batch and max(len(rows), len(summed), len(cols)) == 1:
        if rows and cols:
            return Factor(_permuted(a, [*rows, *summed]) @ _permuted(b, [*summed, *cols]), (*rows, *cols))
        if rows and a.labels == (*rows, *summed):
            return Factor(a.tensor @ b.tensor, tuple(rows))
        if rows:  # a vector times a matrix as it lies: its derivative lies the same way
            return Factor((b.tensor[None] @ a.tensor).squeeze(0), tuple(rows))
        return Factor(a.tensor @ b.tensor, ())
    larger = a if a.tensor.numel() >= b.tensor.numel() else b
    summed = [label for label in larger.labels if label in summed]
    groups = [batch] if batch else []
    left = _grouped(a, [*groups, rows, summed])
    right = _grouped(b, [*groups, summed, cols])
    result = torch.bmm(left, right) if batch else left @ right
    labels = (*batch, *rows, *cols)
    if list(result.shape) != sizes(labels):
        result = result.reshape(sizes(labels))
    return Factor(result, labels)


def _grouped(f: Factor, groups: Sequence[Sequence[Label]]) -> Tensor:
    """View a factor as a tensor with one axis per group of labels; an empty group is an axis of size 1."""
    tensor = _permuted(f, [label for group in groups for label in group])
    shape = [volume(group) for group in groups]
    return tensor if list(tensor.shape) == shape else tensor.reshape(shape)

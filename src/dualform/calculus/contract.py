"""Contraction of labelled tensors, pair by pair, at a cost that can be read before it is paid.

    out[labels] = sum over the other labels of prod factors

A pairwise step becomes an elementwise product, a matrix product, or a batched one; the ops emitted are the ones a person
would write, because the traced result is printed as code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import count

import opt_einsum
import torch
from opt_einsum.paths import DynamicProgramming
from torch import Tensor

from dualform.calculus.terms import Factor, Label, Select, diagonal, one_hot, sizes, volume


@dataclass(frozen=True)
class Step:
    """One pairwise step: `kind` is mul, mm (a matrix product of any batch), or dot (a product, then a sum)."""

    kind: str
    left: str
    right: str
    result: str
    flops: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.left} {self.right} -> {self.result}   {self.kind}, {self.flops:,} flops, {self.bytes:,} bytes"


@dataclass(frozen=True)
class Plan:
    """The order of a contraction and its cost; `bytes` counts what the steps write."""

    path: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def matmul_flops(self) -> int:
        """The part of `flops` that runs as matrix products."""
        return sum(step.flops for step in self.steps if step.kind == "mm")

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    def __str__(self) -> str:
        lines = [f"{len(self.steps)} steps, {self.flops:,} flops, {self.bytes:,} bytes written"]
        return "\n".join([*lines, *(f"  {k + 1}. {step}" for k, step in enumerate(self.steps))])


@dataclass(frozen=True)
class _Task:
    """A contraction without Selects: operands, the labels computed, and the zero padding that follows."""

    operands: list[Factor]
    out: tuple[Label, ...]
    pads: list[Select]


@lru_cache(maxsize=4096)
def _path(inputs: tuple[frozenset[int], ...], output: frozenset[int], extents: tuple[int, ...]) -> tuple:
    if len(inputs) <= 2:
        return (tuple(range(len(inputs))),)
    symbol = opt_einsum.get_symbol
    search = DynamicProgramming(minimize="flops", cost_cap=False, search_outer=True)
    named = [frozenset(symbol(k) for k in labels) for labels in inputs]
    found = search(named, frozenset(symbol(k) for k in output), {symbol(k): n for k, n in enumerate(extents)})
    return tuple(tuple(sorted(pair)) for pair in found)


def _ordered(operands: Sequence[Factor], out: Sequence[Label]) -> tuple[tuple[int, ...], ...]:
    number: dict[Label, int] = {}
    for label in [*out, *(label for f in operands for label in f.labels)]:
        number.setdefault(label, len(number))
    inputs = tuple(frozenset(number[label] for label in f.labels) for f in operands)
    return _path(inputs, frozenset(number[label] for label in out), tuple(label.size for label in number))


def _prepare(factors: Sequence[Factor | Select], out: Sequence[Label]) -> _Task:
    """Replace every Select's big index by start + step * small: slices of the operands, padding of the result."""
    operands = [diagonal(f) for f in factors if isinstance(f, Factor)]
    selects = [f for f in factors if isinstance(f, Select)]
    like = operands[0].tensor if operands else torch.ones(())
    result, pads = list(out), []
    while selects:
        s = selects.pop(0)
        twins = [o for o in selects if o.big is s.big]
        operands += [one_hot(o, like) for o in twins]
        selects = [_chained(o, s) for o in selects if o not in twins]
        if s.big in result and s.small in result:
            operands.append(one_hot(s, like))
            continue
        operands = [_sliced(f, s) for f in operands]
        if s.big in result:
            result[result.index(s.big)] = s.small
            pads = [_chained(p, s) for p in pads]
            pads.append(s)
        if any(s.small in f.labels for f in [*operands, *selects]):
            continue
        if s.small.size == 1 and operands:
            first = operands[0]
            operands[0] = Factor(first.tensor.unsqueeze(0), (s.small, *first.labels), first.name)
        else:
            operands.append(Factor(torch.ones(s.small.size, dtype=like.dtype, device=like.device), (s.small,), "1"))
    operands = _one_dtype([_summed(f, _lonely(k, operands, result)) for k, f in enumerate(operands)])
    return _Task(operands, tuple(result), pads[::-1])


def _one_dtype(operands: list[Factor]) -> list[Factor]:
    """Promote factors to their common dtype, as an elementwise op would."""
    common = (
        reduce(torch.promote_types, (f.tensor.dtype for f in operands), operands[0].tensor.dtype) if operands else None
    )
    return [f if f.tensor.dtype == common else Factor(f.tensor.to(common), f.labels, f.name) for f in operands]


def _chained(outer: Select, inner: Select) -> Select:
    """outer after inner: outer's small index is inner's big one."""
    if outer.small is not inner.big:
        return outer
    return Select(inner.small, outer.big, outer.start + outer.step * inner.start, outer.step * inner.step)


def _sliced(f: Factor, s: Select) -> Factor:
    if s.big not in f.labels:
        return f
    axis = f.labels.index(s.big)
    window = [slice(None)] * axis + [slice(s.start, s.start + s.step * (s.small.size - 1) + 1, s.step)]
    labels = tuple(s.small if label is s.big else label for label in f.labels)
    return diagonal(Factor(f.tensor[tuple(window)], labels, f.name))


def _lonely(position: int, operands: Sequence[Factor], out: Sequence[Label]) -> list[Label]:
    others = {label for k, f in enumerate(operands) if k != position for label in f.labels} | set(out)
    return [label for label in operands[position].labels if label not in others]


def _summed(f: Factor, labels: Sequence[Label]) -> Factor:
    if not labels:
        return f
    tensor = f.tensor.sum([f.labels.index(label) for label in labels])
    return Factor(tensor, tuple(x for x in f.labels if x not in labels), f.name)


def plan(factors: Sequence[Factor | Select], out: Sequence[Label]) -> Plan:
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
        flops = volume(union) * (1 if kind == "mul" else 2)
        result = Factor(left.tensor, kept, f"t{next(fresh)}")
        steps.append(
            Step(
                kind,
                show(left.name or "_", left.labels),
                show(right.name or "_", right.labels),
                show(result.name, kept),
                flops,
                volume(kept) * left.tensor.element_size(),
            )
        )
        work.append(result)
    return Plan(path, tuple(steps))


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
    letters = (opt_einsum.get_symbol(k) for k in count(8))
    for label in [*task.out, *(label for f in task.operands for label in f.labels)]:
        if label not in names:
            free = label.name and label.name not in names.values()
            names[label] = label.name if free else next(x for x in letters if x not in names.values())
    return names


def _check(task: _Task, out: Sequence[Label]) -> None:
    missing = [label for label in task.out if not any(label in f.labels for f in task.operands)]
    if missing or not task.operands:
        raise ValueError(
            f"contract: out {list(out)} has labels {missing} that no factor has; expand the result instead."
        )


def contract(factors: Sequence[Factor | Select], out: Sequence[Label]) -> Tensor:
    """Contract labelled factors into one tensor with axes `out`.

    out[labels] = sum over all other labels of prod factors (a Select counts as a 0/1 factor, and stores nothing)
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
    work = list(task.operands)
    for positions in _ordered(work, task.out):
        if len(positions) < 2:
            continue
        b, a = (work.pop(k) for k in sorted(positions, reverse=True))
        hints = [task.out] if not work else [*(f.labels for f in work), task.out]
        keep = {label for f in work for label in f.labels} | set(task.out)
        work.append(_pair(a, b, keep, hints))
    (result,) = work
    tensor = _permuted(_summed(result, _lonely(0, [result], task.out)), task.out)
    labels = list(task.out)
    for pad in task.pads:
        axis = labels.index(pad.small)
        tensor = _padded(tensor, axis, pad)
        labels[axis] = pad.big
    return tensor


def _padded(tensor: Tensor, axis: int, pad: Select) -> Tensor:
    if pad.step == 1:
        after = pad.big.size - pad.start - pad.small.size
        return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - axis - 1) + [pad.start, after])
    shape = list(tensor.shape)
    shape[axis] = pad.big.size
    last = pad.start + pad.step * (pad.small.size - 1) + 1
    return tensor.new_zeros(shape).slice_scatter(tensor, axis, pad.start, last, pad.step)


def _permuted(f: Factor, order: Sequence[Label]) -> Tensor:
    if tuple(order) == f.labels:
        return f.tensor
    if len(order) == 2:
        return f.tensor.t()
    return f.tensor.permute([f.labels.index(label) for label in order])


def _aligned(f: Factor, order: Sequence[Label]) -> Tensor:
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
    return Factor(_aligned(a, order) * _aligned(b, order), tuple(order))


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

"""Reads and writes at places as gathers and scatters, which map over rows entry by entry.

    x[i, :, j]  ->  (x with the axes of i and j first, as a table)[i n + j]        x[i] += v  ->  scatter_add

For the others vmap numbers the rows, and a number of a row is right only where all rows are;
parts of a step run at some.

Legend: a table has one row per place, and what is read at a place along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Indices = Sequence[Tensor | None]


class _Table(NamedTuple):
    """A tensor as a table, the places that are asked for, and how to come back."""

    rows: Tensor  # (places, rest)
    place: Tensor  # (asked, rest)
    order: list[int]  # the axes of x: indexed ones, then the rest
    asked: list[int]  # the shape that the indices make together
    rest: list[int]
    front: int  # where in the result, among the rest, `asked` stands


def _as_table(x: Tensor, indices: Indices) -> _Table:
    """As torch and numpy index: indices are broadcast together, and stand first unless their axes are neighbours."""
    given = [(k, i) for k, i in enumerate(indices) if i is not None]
    axes = [k for k, _ in given]
    others = [k for k in range(x.ndim) if k not in axes]
    asked = list(torch.broadcast_shapes(*(i.shape for _, i in given)))
    flat = torch.zeros((), dtype=torch.int64, device=x.device)
    for k, i in given:
        flat = flat * x.shape[k] + torch.remainder(i.long(), x.shape[k])  # int32 is no index of gather
    rest = [x.shape[k] for k in others]
    rows = x.permute(axes + others).reshape(math.prod(x.shape[k] for k in axes), math.prod(rest))
    place = flat.expand(asked).reshape(-1, 1).expand(-1, rows.shape[1])
    neighbours = axes == list(range(axes[0], axes[0] + len(axes)))
    return _Table(rows, place, axes + others, asked, rest, axes[0] if neighbours else 0)


def _are_masks(indices: Indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def index(x: Tensor, indices: Indices) -> Any:
    if _are_masks(indices):
        return NotImplemented
    t = _as_table(x, indices)
    found, n = t.rows.gather(0, t.place).reshape(t.asked + t.rest), len(t.asked)
    after = list(range(n, n + len(t.rest)))
    return found.permute(after[: t.front] + list(range(n)) + after[t.front :])


def index_put(x: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Any:
    if _are_masks(indices):
        if len(indices) != 1 or indices[0] is None or indices[0].shape != x.shape or values.numel() != 1:
            return NotImplemented
        value = values.reshape(())
        return torch.where(indices[0], x + value if accumulate else value, x)
    t = _as_table(x, indices)
    n, first = len(t.asked), t.front
    shape = t.rest[:first] + t.asked + t.rest[first:]
    own = list(range(first, first + n))
    moved = values.expand(shape).permute(own + [k for k in range(len(shape)) if k not in own]).reshape(t.place.shape)
    written = t.rows.scatter_add(0, t.place, moved) if accumulate else t.rows.scatter(0, t.place, moved)
    back = sorted(range(x.ndim), key=t.order.__getitem__)
    return written.reshape([x.shape[k] for k in t.order]).permute(back)


def embedding(weight: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    return index(weight, [indices])


def take(x: Tensor, at: Tensor) -> Tensor:
    return index(x.reshape(-1), [at])


def put(x: Tensor, at: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    return index_put(x.reshape(-1), [at.reshape(-1)], source.reshape(-1), accumulate).reshape(x.shape)


def index_fill(x: Tensor, dim: int, at: Tensor, value: Any) -> Tensor:
    """torch's own keeps strides by an op that cannot be mapped over rows."""
    shape = [at.numel() if k == dim % x.ndim else n for k, n in enumerate(x.shape)]
    value = value.to(x.dtype) if isinstance(value, Tensor) else x.new_full((), value)
    return torch.index_copy(x, dim, at.reshape(-1), value.expand(shape))

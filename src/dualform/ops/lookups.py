"""Reads and writes at places as gathers and scatters, which map over rows entry by entry.

    x[i, :, j]  ->  (x with the axes of i and j as rows)[i n + j]        x[i] += v  ->  scatter_add

For the others vmap numbers the rows, and a number of a row is right only where all rows are;
parts of a step run at some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.ops.picking import Indexed, can_index

Indices = Sequence[Tensor | None]


def _from_front(index: Tensor, n: int) -> Tensor:
    return torch.remainder(index.long(), n)  # int32 is no index of gather


def _places(at: Indexed, rows: Tensor) -> Tensor:
    """The row that is asked for, for each entry of one."""
    return at.flat.reshape(-1, *[1] * (rows.ndim - 1)).expand(-1, *rows.shape[1:])


def index(x: Tensor, indices: Indices) -> Any:
    if not can_index(indices):
        return NotImplemented
    at = Indexed(x.shape, indices, _from_front)
    rows = at.rows(x)
    return at.result(rows.gather(0, _places(at, rows)))


def index_put(x: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Any:
    if not can_index(indices):
        if len(indices) != 1 or indices[0] is None or indices[0].shape != x.shape or values.numel() != 1:
            return NotImplemented
        value = values.reshape(())
        return torch.where(indices[0], x + value if accumulate else value, x)
    at = Indexed(x.shape, indices, _from_front)
    rows = at.rows(x)
    write = rows.scatter_add if accumulate else rows.scatter
    return at.whole(write(0, _places(at, rows), at.given(values, rows)), x.shape)


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

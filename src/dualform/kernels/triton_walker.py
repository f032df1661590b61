"""The walker: a graph over small tensors as lines of Triton, value by value in the graph's order.

Each op is looked up in the tables of `ops`, and written by `triton_text`; what has no row, or is no tile,
is for the caller to place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dualform.kernels.ops import Unsupported
from dualform.kernels.tiles import (
    Memory,
    Parts,
    Shape,
    Tile,
    Untileable,
    Value,
    behind,
    between,
    constant,
    expanded,
    permuted,
    squeezed,
    unsqueezed,
)
from dualform.kernels.triton_text import Writer
from dualform.ops.table import ENTRIES, find_row

aten = torch.ops.aten


class Walker:
    """Walks a graph: `values` has what is known, `step` adds a node's value by writing its lines."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.values: dict[fx.Node, Any] = {}

    def step(self, n: fx.Node) -> None:
        """Write a node."""
        try:
            self.values[n] = self._value(n)
        except Untileable as error:
            raise Untileable(error.why, error.node or n) from None

    def steps(self, nodes: Sequence[fx.Node]) -> None:
        """Write sums that are computed at once."""
        found = []
        for n in nodes:
            known = find_row(n.target)
            assert known is not None
            _, (x,), params = known.spelt(n)
            found.append((n.name, self._given(x), params["kept"], params["scale"], tuple(n.meta["val"].shape)))
        self.values |= dict(zip(nodes, self.writer.reduced_at_once(found), strict=True))

    def _given(self, x: Any) -> Any:
        return self.values[x] if isinstance(x, fx.Node) else x

    def _value(self, n: fx.Node) -> Any:
        w = self.writer
        if n.target is operator.getitem:
            return self._given(n.args[0])[n.args[1]]  # pyright: ignore[reportArgumentType, reportCallIssue]
        known = find_row(n.target)
        if known is None or not known.kind:
            raise Unsupported(n)
        if known.kind == "view":
            return self._view(n)
        made = n.meta["val"]
        if made.numel() == 0:
            raise Untileable("it has no entry")
        shape, kind = tuple(made.shape), made.dtype
        if known.kind == "product":
            a, b = (self._given(x) for x in n.args[:2])
            return w.product(n.name, a, b, shape)
        if known.kind == "reduction":
            row, (x,), params = known.spelt(n)
            return w.reduced(n.name, row, self._given(x), params["kept"], params["scale"], shape)
        if known.kind == "pieces":
            return self._pieces(n, shape)
        row, operands, params = known.spelt(n)
        if ENTRIES[row].is_placed:
            x = self._given(operands[0]) if operands else None
            return w.filled(n.name, row, params, x, shape, kind)
        operands = [self._given(x) for x in operands]
        if all(not isinstance(x, Memory | Parts) and not (isinstance(x, Tile) and x.number is None) for x in operands):
            return self._folded(n, shape, kind)
        return w.mapped(n.name, row, operands, params, shape, kind)

    def _folded(self, n: fx.Node, shape: Shape, kind: torch.dtype) -> Tile:
        """Compute with numbers now."""

        def number(x: fx.Node) -> Any:
            tile = self.values[x]
            return torch.full(tile.shape, tile.number, dtype=tile.kind)

        args, kwargs = fx.map_arg((n.args, n.kwargs), number)  # pyright: ignore[reportArgumentType]
        found = n.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return constant(found.flatten()[0].item(), shape, kind)

    def _view(self, n: fx.Node) -> Any:
        w, x, target, args = self.writer, self._given(n.args[0]), n.target, tuple(n.args[1:])
        if isinstance(x, Parts):
            try:
                return self._moved(n, x, target, args)
            except Untileable:
                x = w.real(x)
        return self._moved(n, x, target, args)

    def _moved(self, n: fx.Node, x: Value, target: Any, args: tuple[Any, ...]) -> Any:
        w, r = self.writer, len(x.shape)
        if target in (aten.detach.default, aten.alias.default):
            return x
        if target in (aten.t.default, aten.transpose.int):
            first, second = args or (0, 1)
            order = list(range(r))
            if r > 1:
                order[first], order[second] = order[second], order[first]
            return permuted(x, order)
        if target == aten.permute.default:
            return permuted(x, args[0])
        if target == aten.unsqueeze.default:
            return unsqueezed(x, args[0])
        if target.overloadpacket == aten.squeeze:
            return squeezed(x, None if not args else [args[0]] if isinstance(args[0], int) else args[0])
        if (row := find_row(target)) is not None and row.ordered:
            return w.view(n.name, x, tuple(n.meta["val"].shape))
        if target == aten.expand.default:
            return expanded(x, args[0])
        if target == aten.select.int:
            return w.select(n.name, x, *args)
        if target == aten.slice.Tensor:
            found: Any = (*args, *(0, 0, None, 1)[len(args) :])
            dim, start, end, step = found
            return w.slice(x, dim, start or 0, x.shape[dim] if end is None else end, step, n.name)
        if target == aten.diagonal.default:
            return w.diagonal(n.name, x, *args, **n.kwargs)
        return self._cut(n, x, target, args)

    def _cut(self, n: fx.Node, x: Value, target: Any, args: Any) -> Any:
        """Cut a value along an axis: into entries, or into pieces."""
        w = self.writer
        if target == aten.unbind.int:
            dim: Any = (*args, n.kwargs.get("dim", 0))[0]
            return tuple(w.select(n.name, x, dim, k) for k in range(x.shape[dim]))
        if target in (aten.split.Tensor, aten.split_with_sizes.default):
            dim = args[1] if len(args) > 1 else n.kwargs.get("dim", 0)
            size, total = args[0], x.shape[dim]
            sizes = [min(size, total - k) for k in range(0, total, size)] if isinstance(size, int) else size
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
            return tuple(w.slice(x, dim, s, s + size, 1, n.name) for s, size in zip(starts, sizes, strict=True))
        raise Untileable(f"the view {target} has no Triton text")

    def _pieces(self, n: fx.Node, shape: Shape) -> Value:
        w = self.writer
        args: Any = n.args
        if n.target in (aten.cat.default, aten.stack.default):
            dim: Any = args[1] if len(args) > 1 else n.kwargs.get("dim", 0)
            dim = dim % len(shape)
            found = [self._given(x) for x in args[0]]
            if n.target == aten.stack.default:
                return behind(dim, [unsqueezed(x, dim) for x in found])
            return behind(dim, [x for x in found if x.shape[dim]])
        x = self._given(args[0])
        if n.target == aten.select_backward.default:
            _, _, dim, index = args
            dim, index = dim % len(shape), index % shape[dim % len(shape)]
            return w.placed(n.name, unsqueezed(x, dim), dim, range(index, index + 1), shape[dim])
        if n.target == aten.slice_backward.default:
            _, _, dim, start, end, step = args
            dim = dim % len(shape)
            places = range(*slice(start, end, step).indices(shape[dim]))
            return w.placed(n.name, x, dim, places, shape[dim])
        if n.target == aten.constant_pad_nd.default:
            return self._padded(n, x, shape)
        raise Untileable(f"the op {n.target} has no Triton text")

    def _padded(self, n: fx.Node, x: Value, shape: Shape) -> Value:
        pads: Any = n.args[1]
        fill: Any = n.args[2] if len(n.args) > 2 else 0.0
        for k, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            x = between(x, len(shape) - 1 - k, before, after, fill)
        return self.writer.real(x, n.name) if sum(k != 1 for k in shape) <= 2 else x  # once, for all who read it


__all__ = ["Walker"]

"""A flat leaf in pieces: a parameter that a learner only ever slices is as many leaves, each of its own shape.

    w = [A | B], f(x) = (x A) B        sites of w at two places    ->    one site of A, one of B, no term between them

The state keeps the leaf as it is; a step cuts it where it begins and joins it where it ends.

Legend: a piece is a range [start, stop) of a leaf's first axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.edit import add_input
from dualform.learning.emit import Emitter, StepInputs
from dualform.learning.sites import Analysis

aten = torch.ops.aten
Ranges = dict[str, list[tuple[str, int, int]]]  # leaf -> (piece's name, start, stop), covering it


def cut_leaves(a: Analysis) -> Ranges:
    """Replace every leaf that is only sliced by its pieces, in the graph; return where each piece was."""
    cut: Ranges = {}
    for leaf, node in list(a.leaf_nodes.items()):
        size = node.meta["val"].shape[0] if node.meta["val"].ndim else 0
        found = _ranges(node, 0, size)
        covers = _cover(sorted({(start, stop) for _, start, stop in found}), size)
        if covers is None or len(covers) < 2:
            continue
        cut[leaf] = [(f"{leaf}[{start}:{stop}]", start, stop) for start, stop in covers]
        _replace(a, leaf, node, found, cut[leaf])
    return cut


def _ranges(node: fx.Node, start: int, stop: int) -> list[tuple[fx.Node, int, int]]:
    """List the nodes that take a range of a leaf and are not sliced further."""
    inner = [_range(user, stop - start) for user in node.users]
    if not inner or None in inner:
        return [(node, start, stop)]
    found = zip(node.users, inner, strict=True)
    return [hit for user, r in found if r is not None for hit in _ranges(user, start + r[0], start + r[1])]


def _range(node: fx.Node, size: int) -> tuple[int, int] | None:
    """Read a slice of the first axis; None for anything else."""
    if node.target != aten.slice.Tensor or node.kwargs:
        return None
    _, dim, start, stop, step = (*node.args, *(None,) * (5 - len(node.args)))
    begin, end, stride = slice(start, stop, step).indices(size)  # pyright: ignore[reportArgumentType]: fx arguments
    return (begin, max(begin, end)) if dim in (None, 0) and stride == 1 else None


def _cover(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]] | None:
    """Fill the gaps between ranges; None if two of them overlap."""
    covers, at = [], 0
    for start, stop in [*ranges, (size, size)]:
        if start < at:
            return None
        covers += [(at, start)] * (start > at) + [(start, stop)] * (stop > start)
        at = stop
    return covers


def _replace(
    a: Analysis, leaf: str, node: fx.Node, found: list[tuple[fx.Node, int, int]], pieces: list[tuple[str, int, int]]
) -> None:
    graph, value, ordinal = a.graph.graph, node.meta["val"], node.meta["ordinal"]
    made: dict[tuple[int, int], fx.Node] = {}
    piece = node
    for name, start, stop in pieces:
        made[start, stop] = piece = add_input(graph, f"{node.name}_{start}", after=piece)
        own = ordinal._replace(key=hash((ordinal.key, start)))
        piece.meta |= {**node.meta, "val": value[start:stop], "ordinal": own}
        a.leaf_nodes[name] = piece
    for old, start, stop in found:
        if stop > start:
            old.replace_all_uses_with(made[start, stop])
    del a.leaf_nodes[leaf]
    for old in reversed(list(graph.nodes)):
        if old is node or (old.op == "call_function" and not old.users):
            graph.erase_node(old)


class InPieces:
    """An emitter whose leaves are pieces of those that the step is given."""

    def __init__(self, emitter: Emitter, cut: Ranges) -> None:
        self.emitter, self.cut = emitter, cut

    def __call__(self, x: StepInputs) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
        o, after, registers = self.emitter(
            x._replace(th=self._parts(x.th, 0), R=x.R and self._parts(x.R, 1), init=x.init and self._parts(x.init, 0))
        )
        return o, self._whole(after, x.th, 0), registers and self._whole(registers, x.th, 1)

    def _parts(self, held: Mapping[str, Tensor], axis: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for leaf, w in held.items():
            pieces: list[Any] = self.cut.get(leaf, [])
            found |= {name: w.narrow(axis, start, stop - start) for name, start, stop in pieces} or {leaf: w}
        return found

    def _whole(self, held: Mapping[str, Tensor], leaves: Mapping[str, Tensor], axis: int) -> dict[str, Tensor]:
        pieces = {leaf: [held[name] for name, _, _ in self.cut.get(leaf, [(leaf, 0, 0)])] for leaf in leaves}
        return {leaf: torch.cat(parts, axis) if len(parts) > 1 else parts[0] for leaf, parts in pieces.items()}

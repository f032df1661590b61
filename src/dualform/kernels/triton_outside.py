"""What torch computes beside kernels, for the rows of all mini-batches at once.

Legend: n mini-batches, P = B H rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.edit import copied, emitter, replace, results_of, without_dead
from dualform.kernels.triton_kernel import Outside
from dualform.learning.batched import ROWS, at, mapped
from dualform.learning.prepare import in_place
from dualform.learning.transforms import undisturbed

aten = torch.ops.aten
SMALL = 4  # rows and columns of a matrix, a rule's registers say, of which there are as many as pairs of all tokens


def with_small_products_as_sums(gm: fx.GraphModule) -> fx.GraphModule:
    """Multiply small matrices entry by entry: a library would take a program for each, and copies of what repeats."""
    gm = copied(gm)
    for node in [x for x in gm.graph.nodes if x.target is aten.bmm.default]:
        (_, m, k), (_, _, n) = shapes = [_shape(x) for x in node.args]
        if max(m, k, n) > SMALL:
            continue
        whole = [_unmerged(x) for x in node.args]
        a, b = whole if _shape(whole[0])[:-2] == _shape(whole[1])[:-2] else node.args
        emit, total = emitter(gm.graph, node), None
        for j in range(k):
            pair = emit(aten.slice.Tensor, a, -1, j, j + 1), emit(aten.slice.Tensor, b, -2, j, j + 1)
            total = emit(aten.mul.Tensor, *pair) if total is None else emit(aten.addcmul.default, total, *pair)
        replace(node, emit(aten.reshape.default, total, [shapes[0][0], m, n]))
    without_dead(gm.graph)
    gm.recompile()
    return gm


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.meta["val"].shape)


def _unmerged(x: Any) -> Any:
    """Find matrices before their axes were laid into one, and copied for it."""
    if x.target is not aten.reshape.default or _shape(x.args[0])[-2:] != _shape(x)[-2:]:
        return x
    source = x.args[0]
    return source.args[0] if source.target is aten.clone.default else source


def computed(
    parts: dict[Any, Any], name: object, part: Outside, values: Sequence[Tensor], space: tuple[int, int, int],
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Run a graph on (n, B, H, ...) values. parts: what was made ready before, by name and size."""
    count, B, H = space
    rows = count * B * H
    key = (name, rows, device)
    if key not in parts:
        if name not in parts:
            graph = with_small_products_as_sums(part.graph)
            parts[name] = undisturbed(lambda: mapped(graph, [False] * len(values))) if values else graph
        parts[key] = undisturbed(lambda: in_place(at(parts[name], rows, device)))
    flat = [
        x.expand(count, B, H, *x.shape[3:]).reshape(rows, *shape).to(kind)
        for x, shape, kind in zip(values, part.shapes, part.kinds, strict=True)
    ]
    own = [x.meta["val"].shape[:1] == (ROWS,) for x in results_of(parts[name].graph)]
    found = zip(parts[key](*flat), own, strict=True)
    return [(x if each else x.expand(rows, *x.shape)).unflatten(0, (count, B, H)) for x, each in found]


__all__ = ["computed"]

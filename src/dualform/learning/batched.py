"""A step mapped over rows (batch x heads, or blocks x batch x heads), in parts that run at any number of them.

The step is mapped once, over a made-up number of rows, and split where the state passes. For a real number of rows that
number is written into the graph: nothing is traced again for another batch, another length or another device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from dualform.learning.derive import trace_fake
from dualform.learning.simplify import tidy

# A prime larger than any size in a learner: an integer in a mapped graph is a multiple of it or has nothing to do with rows.
ROWS = 2**31 - 1


def mapped(gm: fx.GraphModule, shared: Sequence[bool]) -> fx.GraphModule:
    """Map a graph over ROWS rows; `shared` inputs are the same for all."""
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    dims = tuple(None if s else 0 for s in shared)
    examples = [x.new_empty(x.shape if s else (ROWS, *x.shape)) for x, s in zip(inputs, shared, strict=True)]
    return tidy(trace_fake(torch.vmap(gm, in_dims=dims), examples))


def row_axis(node: fx.Node) -> int | None:
    """Find the axis of a mapped value that counts rows; None: all rows share it."""
    shape = node.meta["val"].shape
    return shape.index(ROWS) if ROWS in shape else None


def row_bytes(node: fx.Node) -> float:
    """Price a mapped value: bytes per row, infinite if rows are not an axis of their own."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or (ROWS not in value.shape and any(n >= ROWS for n in value.shape)):
        return float("inf")
    return float(value.numel() * value.element_size() // (ROWS if ROWS in value.shape else 1))


def at(gm: fx.GraphModule, rows: int, device: torch.device) -> fx.GraphModule:
    """Write a number of rows and a device into a mapped graph, or a part of one."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = _pytree.tree_map(lambda x: _real(x, rows), node.args)
            node.kwargs = {name: device if name == "device" else x for name, x in node.kwargs.items()}
    return fx.GraphModule(gm, graph)


def examples(gm: fx.GraphModule, rows: int, device: torch.device) -> list[Tensor]:
    """Make inputs of the shapes that a mapped graph has at a number of rows."""
    values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    return [torch.empty([_real(n, rows) for n in x.shape], dtype=x.dtype, device=device) for x in values]


def _real(x: Any, rows: int) -> Any:
    return x // ROWS * rows if type(x) is int and x >= ROWS and x % ROWS == 0 else x

"""Clean a traced graph: what does nothing goes, what is computed twice is shared, constants meet their neighbours.

Exact in real arithmetic and in floating point up to the order of scalar products; every rewrite removes an operation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.edit import add_alike, replace, unwritten, without_dead, without_repeats
from dualform.graphs.verify import verified_below_autograd
from dualform.ops.table import row_of

aten = torch.ops.aten
_products = {aten.mul.Tensor, aten.mul.Scalar}
_filled = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}
_bilinear = {aten.bmm.default, aten.mm.default}


@verified_below_autograd
def tidy(gm: fx.GraphModule) -> fx.GraphModule:
    """Simplify a graph; inputs, outputs and their order stay."""
    _Folder(gm.graph).run()
    graph = without_repeats(gm.graph)
    without_dead(graph)
    for node in graph.nodes:  # a view of what was laid out otherwise before the rewriting may be none now
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return unwritten(gm, graph)


class _Folder:
    """One pass in graph order; `constant` maps nodes to the number that fills them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.constant: dict[fx.Node, float] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target == aten._efficientzerotensor.default:  # the slope of sgn: none may write to it
                node.target = aten.zeros.default
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                self.visit(node)

    def visit(self, node: fx.Node) -> None:
        target, args, value = node.target, node.args, node.meta["val"]
        first = args[0] if args else None
        before = first.meta.get("val") if isinstance(first, fx.Node) else None
        if not isinstance(first, fx.Node) or not isinstance(before, Tensor) or not value.is_floating_point():
            return
        row = row_of(target)
        unchanged = before.shape == value.shape and before.dtype == value.dtype
        if (row.ordered or target == aten.expand.default) and unchanged:
            replace(node, first)
        elif target in _filled:
            self.constant[node] = _filled[target]  # pyright: ignore[reportArgumentType]: it is an OpOverload
        elif target == aten.fill.Scalar and isinstance(args[1], int | float):
            self.constant[node] = args[1]
            node.target = aten.full_like.default  # which vmap knows how to batch
        elif first in self.constant and row.kind == "view":
            self.constant[node] = self.constant[first]
        elif target in _products and not node.kwargs:
            self.product(node, first, args[1])
        elif target == aten.pow.Tensor_Scalar and args[1] == 1.0 and unchanged:
            replace(node, first)
        elif target == aten.add.Tensor and not node.kwargs and isinstance(args[1], fx.Node):
            self.sum(node, first, args[1])
        elif target == aten.sub.Tensor and not node.kwargs and isinstance(args[1], fx.Node):
            if args[1].target == aten.neg.default:
                node.target, node.args = aten.add.Tensor, (first, args[1].args[0])
        elif target == aten.neg.default and first.target == aten.neg.default:
            replace(node, first.args[0])  # type: ignore[arg-type]
        elif row.odd and first.target == aten.neg.default:
            self.negate(node, (first.args[0], *args[1:]))
        elif target in _bilinear and isinstance(args[1], fx.Node) and args[1].target == aten.neg.default:
            self.negate(node, (first, args[1].args[0]))
        elif target == aten.transpose.int and first.target == target:
            axes = [{n % value.ndim for n in x.args[1:]} for x in (node, first)]
            if axes[0] == axes[1]:
                replace(node, first.args[0])  # type: ignore[arg-type]
        elif target == aten.t.default and first.target == target:
            replace(node, first.args[0])  # type: ignore[arg-type]
        elif target == aten.permute.default and list(args[1]) == list(range(value.ndim)):  # type: ignore[arg-type]
            replace(node, first)

    def product(self, node: fx.Node, x: fx.Node, y: Any) -> None:
        """x * number: fold into a product with another number, drop a factor of 1; a filled tensor is a number."""
        if isinstance(y, fx.Node) and (x in self.constant or y.target == aten.neg.default):
            x, y = y, x
        if isinstance(y, fx.Node) and x.target == aten.neg.default and y not in self.constant:
            self.negate(node, (x.args[0], y))
            return
        scale = self.constant.get(y) if isinstance(y, fx.Node) else y
        if scale is None or isinstance(scale, complex):
            return
        if x in self.constant:
            self.constant[node] = self.constant[x] * scale
            return
        if x.meta["val"].shape != node.meta["val"].shape or x.meta["val"].dtype != node.meta["val"].dtype:
            return
        if x.target == aten.neg.default and isinstance(x.args[0], fx.Node):
            scale, x = -scale, x.args[0]
        numbers = node.meta["val"].is_floating_point()  # whole ones wrap around at each product
        if numbers and x.target in _products and isinstance(x.args[1], int | float) and not x.kwargs:
            scale, x = scale * x.args[1], x.args[0]  # type: ignore[assignment]
            if not isinstance(x, fx.Node) or x.meta["val"].shape != node.meta["val"].shape:
                return
        if numbers and isinstance(scale, int) and abs(scale) >= 2**63:  # no whole number of torch's
            scale = float(scale)
        if scale == 1.0:
            replace(node, x)
        elif math.isfinite(scale):
            node.target, node.args = aten.mul.Tensor, (x, scale)

    def negate(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """Turn a node into minus itself of other arguments."""
        positive = add_alike(self.graph, node, node.target, *args, **node.kwargs)
        node.target, node.args, node.kwargs = aten.neg.default, (positive,), {}
        self.visit(positive)

    def sum(self, node: fx.Node, x: fx.Node, y: fx.Node) -> None:
        """x + (-y) = x - y."""
        for left, right in ((x, y), (y, x)):
            if right.target == aten.neg.default and right not in self.constant:
                node.target, node.args = aten.sub.Tensor, (left, right.args[0])
                return

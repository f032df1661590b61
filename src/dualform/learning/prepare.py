"""How a graph becomes a function: op by op, in place where nobody sees it, or as it is for who must see every op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.edit import add_alike, without_dead, written
from dualform.graphs.kept import is_stopped
from dualform.ops.table import find_row

aten = torch.ops.aten
Prepared = Callable[..., Sequence[Tensor]]  # what runs a graph
Examples = Callable[[], list[Tensor]]  # of its inputs
Prepare = Callable[[fx.GraphModule, Examples], Prepared]


def in_place(gm: fx.GraphModule, examples: Examples = list) -> Prepared:
    """Run a graph op by op: a product and the sum it goes into as one, over arguments that nothing else needs."""
    in_one_pass(gm.graph, {aten.bmm.default, aten.mul.Tensor})
    _reuse(gm.graph)
    for node in gm.graph.nodes:
        node.target = as_python_calls(node.target)
    return written(gm)


def by_inductor(gm: fx.GraphModule, examples: Examples) -> Prepared:
    """Compile a graph with torch's inductor."""
    from torch._inductor import compile as compiled  # seconds: not at `import dualform`

    in_one_pass(gm.graph, {aten.bmm.default})
    for node in gm.graph.nodes:
        node.meta.clear()  # shapes of another number of rows
    inputs: list[Any] = list(examples())
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    with torch.no_grad():
        return compiled(gm, inputs, options={"cpp_wrapper": on_cpu})  # pyright: ignore[reportReturnType]: as the graph


def as_python_calls(target: Any) -> Any:
    """Python's own entry points take two thirds of the time of an overload called by name."""
    row = find_row(target)
    if row is None or not row.called:
        return target
    return getattr(torch, target._opname, None) or getattr(Tensor, target._opname)


def visible(gm: fx.GraphModule) -> Prepared:
    """Run a graph op by op and out of place, so that autograd and every transform see what is done."""
    for node in gm.graph.nodes:
        if is_stopped(node):
            node.target, node.args = torch.Tensor.detach, tuple(node.args[0])  # which cuts both modes, at every level
    return written(gm)


def _reuse(graph: fx.Graph) -> None:
    """Write a result over an argument that nothing else needs: no new memory, and what was just read is in cache."""
    for node in graph.nodes:
        row = find_row(node.target)
        places = row.over if row is not None else ()
        for i in places[:1] if "alpha" in node.kwargs else places:  # x + alpha y is not y + alpha x
            x = node.args[i]
            if isinstance(x, fx.Node) and _fresh(x) and len(x.users) == 1 and node.args.count(x) == 1:
                old, new = x.meta["val"], node.meta["val"]
                if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
                    rest = [y for j, y in enumerate(node.args) if j != i]
                    node.meta["written"] = True
                    node.target, node.args = getattr(Tensor, f"{node.target._opname}_"), (x, *rest)
                    break


def _fresh(node: fx.Node) -> bool:
    """Does a node's value have memory of its own?"""
    row = find_row(node.args[0].target if node.target is operator.getitem else node.target)  # pyright: ignore
    return node.meta.get("written", False) or (row is not None and bool(row.fresh or row.over))


def in_one_pass(graph: fx.Graph, products: set[Any]) -> None:
    """Write x + a @ b, and x + a * b, as one op: one pass over memory."""
    for node in reversed(list(graph.nodes)):
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            _accumulate(graph, node, products)
    without_dead(graph)


def _accumulate(graph: fx.Graph, node: fx.Node, products: set[Any]) -> None:
    left, right = node.args
    sign = -1 if node.target == aten.sub.Tensor else 1
    for total, product, scale in ((left, right, sign), *([(right, left, 1)] if sign > 0 else [])):
        if (
            not (isinstance(product, fx.Node) and isinstance(total, fx.Node))
            or len(product.users) > 1
            or product.kwargs
            or product.target not in products
            or len({x.meta["val"].dtype for x in (node, total, *product.all_input_nodes) if "val" in x.meta}) > 1
        ):
            continue
        full = product.meta["val"].shape == node.meta["val"].shape
        if product.target == aten.bmm.default and full:
            target, name = aten.baddbmm.default, "alpha"
        elif product.target == aten.mul.Tensor and isinstance(product.args[1], fx.Node):
            target, name = aten.addcmul.default, "value"
        else:
            continue
        options = {name: scale} if scale != 1 else {}
        node.replace_all_uses_with(add_alike(graph, node, target, total, *product.args, **options))
        return

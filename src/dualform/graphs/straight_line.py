"""A linear map between tensors as two straight-line programs: what does not depend on the seed, and what does.

    x_bar = apply(g, *prepare(*inputs))

Both come from one trace of the map along its graph of local derivatives: slopes, transposes and products of weights are
made once for each derivative, and a vjp is then as few torch calls as a person would write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.graphs.edit import broadcasts, emitter, extract, inputs_of, reached, replace, results_of, without_repeats
from dualform.graphs.functionalize import functionalized
from dualform.graphs.this_thread import out_of_sight
from dualform.ops.table import row_of

aten = torch.ops.aten
_functions = torch._C._VariableFunctions  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Split:
    """prepare(*inputs) -> what the seed meets; apply(seed, *prepared) -> the result."""

    prepare: Callable[..., tuple[Tensor, ...]]
    apply: Callable[..., Tensor]


def straight(compute: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Trace a computation on stand-ins of its inputs, out of sight of any trace or transform that is going on."""
    with out_of_sight():
        gm = make_fx(compute, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        gm = functionalized(gm, blame)  # torch.func writes its bases in place
    return fx.GraphModule(gm, without_repeats(gm.graph))


def blame(node: fx.Node, what: str, advice: str) -> NoReturn:
    """What cannot be rewritten in a graph of our own is our mistake."""
    raise AssertionError(f"{node.format_node()} {what}")


def split(compute: Callable[..., Tensor], seed: Tensor, *inputs: Tensor) -> Split:
    """Trace compute(seed, *inputs), linear in the seed, and part it in two."""
    gm = straight(compute, seed, *inputs)
    first, *rest = inputs_of(gm.graph)
    _fuse(gm.graph, first)
    late, (result,) = reached(gm.graph, [first]), results_of(gm.graph)
    early = [n for n in gm.graph.nodes if n.op in ("call_function", "get_attr") and n not in late]
    wanted = [n for n in (*rest, *early) if n is result or any(user in late for user in n.users)]
    after = [n for n in gm.graph.nodes if n in late and n.op == "call_function"]
    prepare = extract(early, rest, lambda _, made: tuple(made[n] for n in wanted))
    apply = extract(after, (first, *wanted), lambda _, made: made[result])
    return Split(runnable(prepare, gm), runnable(apply, gm))


def runnable(graph: fx.Graph, owner: fx.GraphModule) -> Callable[..., Any]:
    """Turn a graph into a Python function that calls torch by its public names where those are the same op."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            name = node.target._opname
            if hasattr(_functions, name):
                node.target = getattr(_functions, name)
            elif hasattr(torch._C.TensorBase, name):
                node.op, node.target = "call_method", name
    graph.eliminate_dead_code()
    return fx.GraphModule(owner, graph).forward


def _fuse(graph: fx.Graph, seed: fx.Node) -> None:
    """Move numbers and axes of size 1 to what is known before the seed, and make one call of two where there is one."""
    late = reached(graph, [seed])
    passes: list[tuple[Any, Callable[[fx.Graph, fx.Node, set[fx.Node]], None]]] = [
        (aten.mul.Tensor, _move_number),
        (aten.unsqueeze.default, _move_unsqueeze),
        (aten.unsqueeze.default, _keep_dim),
        (aten.expand.default, _leave_expand),
        (aten.add.Tensor, _add),
        (aten.sub.Tensor, _subtract),
    ]
    for target, rewrite in passes:
        for node in reversed(graph.nodes) if rewrite in (_move_number, _move_unsqueeze) else list(graph.nodes):
            if node.target is target and not node.kwargs and node in late:
                rewrite(graph, node, late)
        graph.eliminate_dead_code()
        late = reached(graph, [seed])


def _move_number(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """c * (a * b) -> (c * a) * b for an a that is known before the seed."""
    x, scale = node.args
    if isinstance(scale, fx.Node) or not isinstance(x, fx.Node):
        return
    product = _unspread(x)
    if not _alone(product, aten.mul.Tensor) or product not in late:
        return
    parts = [a for a in product.args if isinstance(a, fx.Node)]
    known, other = [a for a in parts if a not in late], [a for a in parts if a in late]
    if len(known) != 1 or len(other) != 1:
        return
    inner = _unspread(other[0])
    deeper = [a for a in inner.args if isinstance(a, fx.Node) and a not in late]
    if _alone(inner, aten.mul.Tensor) and deeper:
        product, known = inner, deeper
    product.replace_input_with(known[0], emitter(graph, product)(aten.mul.Tensor, known[0], scale))
    node.replace_all_uses_with(x)


def _unspread(x: Any) -> Any:
    """What a tensor was before it got axes of its own alone."""
    while _alone(x, aten.unsqueeze.default) or _alone(x, aten.expand.default):
        x = x.args[0]
    return x


def _move_unsqueeze(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """unsqueeze(sum * b) -> unsqueeze(sum) * unsqueeze(b): the second is made before, the first is keepdim."""
    product: Any = node.args[0]
    if not _alone(product, aten.mul.Tensor):
        return
    parts, rank = product.args, product.meta["val"].ndim
    if not all(isinstance(a, fx.Node) and a.meta["val"].ndim == rank for a in parts):
        return
    if not any(a not in late for a in parts) or not any(_alone(a, aten.sum.dim_IntList) for a in parts):
        return
    raised = []
    for a in parts:
        new = emitter(graph, node)(aten.unsqueeze.default, a, node.args[1])
        if a in late:
            late.add(new)
        raised.append(new)
    late.add(_replace(graph, node, aten.mul.Tensor, tuple(raised)))


def _is_even(target: Any) -> bool:
    """Is it a sum or a product, entry by entry?"""
    row = row_of(target)
    return row.kind == "map" and (row.multilinear or len(row.signs) == 2)


def _leave_expand(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """An expand whose every user is a sum with a full tensor is left to that sum."""
    x: Any = node.args[0]
    if all(_is_even(u.target) and all(broadcasts(u, k) for k, y in enumerate(u.args) if y is node) for u in node.users):
        node.replace_all_uses_with(x)


def _alone(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1 and not node.kwargs


def _keep_dim(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """sum, then unsqueeze at that place -> sum with keepdim."""
    total: Any = node.args[0]
    if not _alone(total, aten.sum.dim_IntList) or len(total.args) != 2 or len(total.args[1]) != 1:
        return
    x, (dim,) = total.args
    if node.args[1] % node.meta["val"].ndim != dim % x.meta["val"].ndim:
        return
    _replace(graph, node, aten.sum.dim_IntList, (x, [dim], True))


def _add(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """a + (-b) -> a - b;  a + b * c -> addcmul(a, b, c)."""
    for k in (1, 0):
        part: Any = node.args[k]
        other: Any = node.args[1 - k]
        if not isinstance(other, fx.Node) or not isinstance(part, fx.Node):
            return
        if _alone(part, aten.neg.default):
            _replace(graph, node, aten.sub.Tensor, (other, part.args[0]))
            return
        if _multiplies(part, other):
            _replace(graph, node, aten.addcmul.default, (other, *part.args))
            return


def _subtract(graph: fx.Graph, node: fx.Node, late: set[fx.Node]) -> None:
    """a - b * c -> addcmul(a, b, c, value=-1)."""
    other, part = node.args
    if isinstance(other, fx.Node) and _multiplies(part, other):
        _replace(graph, node, aten.addcmul.default, (other, *part.args), {"value": -1})  # type: ignore[union-attr]


def _multiplies(part: Any, other: fx.Node) -> bool:
    if not _alone(part, aten.mul.Tensor) or not all(isinstance(a, fx.Node) for a in part.args):
        return False
    values = [v.meta["val"] for v in (other, *part.args)]
    return len({v.dtype for v in values}) == 1 and min(v.ndim for v in values[1:]) > 0


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
    new = emitter(graph, node)(target, *args, **kwargs or {})
    replace(node, new)
    return new

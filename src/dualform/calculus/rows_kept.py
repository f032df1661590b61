"""The derivative of an op with a gradient of its own: the transpose of what its backward does to a gradient.

    g -> backward(g, x) linear        J = (d backward / d g)^T, structure and all
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from dualform.calculus.definitions import defined
from dualform.calculus.kept import is_kept, named
from dualform.calculus.program import LocalRule, Program
from dualform.calculus.queries import flipped
from dualform.calculus.table import Call, find_row
from dualform.calculus.terms import Term
from dualform.calculus.trace import source_line
from dualform.shapes import TraceError

aten = torch.ops.aten


def kept_terms(call: Call, operand: int, rule: LocalRule) -> list[Term]:
    """Differentiate a kept op by one of its floating inputs."""
    inputs, key, result = (call.bound[name] for name in ("inputs", "key", "result"))
    made = named(key)
    if made.refusal:
        raise TraceError(made.refusal)
    backward = made.backward[result]
    if backward is None:
        return []
    place = [k for k, x in enumerate(inputs) if x.is_floating_point()][operand]
    (output,) = backward.graph.find_nodes(op="output")
    if output.args[0][place] is None:
        return []
    bent = first_bend(backward)
    if bent is not None:
        raise TraceError(
            f"jacobian: the gradient of {made.name} is no linear function of the gradient that it is given: "
            f"`{source_line(bent) or bent.target}`; expected a backward that is a matrix product with it. "
            "There is no derivative then: take torch's gradients, or write a linear backward."
        )
    names = ["g", *(call.operand_name(k) for k in range(len(call.operands)))] if len(call.operands) == len(inputs) else ()
    tensors: Any = [torch.zeros_like(call.out), *inputs, *made.results(result, inputs, call.out, key)]
    program = Program(_reads_gradient(backward), tensors, 0, rule, names, place)
    return list(flipped(program.terms()))


@cache
def _reads_gradient(gm: fx.GraphModule) -> fx.GraphModule:
    """A backward in which a detached gradient is the gradient: what a second derivative must not see, the first does."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    first = graph.find_nodes(op="placeholder")[0]
    late = reached(graph, first)
    for node in list(graph.nodes):
        if node.target is aten.detach.default and node in late:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def reached(graph: fx.Graph, first: fx.Node) -> set[fx.Node]:
    """What depends on an input."""
    late = {first}
    for node in graph.nodes:
        if node.op == "call_function" and any(n in late for n in node.all_input_nodes):
            late.add(node)
    return late


@cache
def first_bend(gm: fx.GraphModule) -> fx.Node | None:
    """The first op of a backward that is not linear in the incoming gradient; None if all are."""
    return _bend(gm, frozenset({0}))


def _bend(gm: fx.GraphModule, active: frozenset[int]) -> fx.Node | None:
    """The first op that is not linear in these inputs together."""
    inputs = gm.graph.find_nodes(op="placeholder")
    late = set().union(*(reached(gm.graph, inputs[k]) for k in active))
    return next((n for n in gm.graph.nodes if n in late and n.op == "call_function" and not _is_linear(n, late)), None)


def _is_linear(node: fx.Node, late: set[fx.Node]) -> bool:
    """Is an op linear in those of its operands that depend on the gradient? Affine by its row, and 0 where they are 0."""
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    flat: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), lambda n: flat.append(n))
    operands = [n for n in flat if n.meta["val"].is_floating_point()]
    row, active = find_row(node.target), frozenset(k for k, n in enumerate(operands) if n in late)
    if any(n in late and n not in operands for n in flat):
        return False
    if row is None or row.rule is None:  # by its definition
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        found = None if is_kept(node) else defined(Call(node.target, args, kwargs, node.meta["val"]))
        return found is not None and _bend(found[0], frozenset(k for k, n in enumerate(flat) if n in late)) is None
    if not row.is_affine(active):
        return False
    return row.multilinear or not any(_at_zero(node, late, bool(mask)).any() for mask in (0, 1))


def _at_zero(node: fx.Node, late: set[fx.Node], mask: bool) -> Tensor:
    """The value of an op where the gradient is 0, everything else is 1, and its masks are all the same."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), partial(_stand_in, late, mask))
    return target(*args, **kwargs)


def _stand_in(late: set[fx.Node], mask: bool, n: fx.Node) -> Tensor:
    value = n.meta["val"]
    full = partial(torch.full, tuple(value.shape), dtype=value.dtype)
    if value.dtype == torch.bool:
        return full(mask)
    return full(1 if value.is_floating_point() and n not in late and not is_zero(n) else 0)


def is_zero(node: Any) -> bool:
    """Does the graph say that a tensor is all zeros?"""
    while getattr(node.target, "_opname", "") in ("expand", "reshape", "view", "clone", "alias", "detach", "_to_copy"):
        node = node.args[0]
    name = getattr(node.target, "_opname", "")
    if name in ("full", "full_like", "new_full", "scalar_tensor", "fill"):
        return node.args[0 if name == "scalar_tensor" else 1] == 0
    return name in ("zeros", "zeros_like", "new_zeros")

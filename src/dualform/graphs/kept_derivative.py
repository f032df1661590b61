"""The derivative of an op with a gradient of its own: the transpose of what its backward does to a gradient.

g -> backward(g, x) linear        J = (d backward / d g)^T, structure and all
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.queries import flipped
from dualform.algebra.terms import Term
from dualform.graphs.definitions import defined_at
from dualform.graphs.edit import applied, copied, inputs_of, nodes_in, reached, replace, results_of
from dualform.graphs.kept import is_kept, named, written_out
from dualform.graphs.local_derivatives import LocalRule, Program
from dualform.graphs.this_thread import out_of_sight
from dualform.graphs.trace import source_line
from dualform.ops.factories import filled_with
from dualform.ops.table import OpCall, row_of
from dualform.shapes import TraceError

aten = torch.ops.aten


def kept_terms(call: OpCall, operand: int, rule: LocalRule) -> list[Term]:
    """Differentiate a kept op by one of its floating inputs."""
    inputs, key, result = (call.bound[name] for name in ("inputs", "key", "result"))
    made = named(key)
    if made.refusal:
        raise TraceError(made.refusal)
    backward = made.backward[result]
    if backward is None:
        return []
    place = [k for k, x in enumerate(inputs) if x.is_floating_point()][operand]
    if results_of(backward.graph)[place] is None:
        return []
    bent = first_bend(backward)
    if bent is not None:
        raise TraceError(
            f"jacobian: the gradient of {made.name} is no linear function of the gradient that it is given: "
            f"`{source_line(bent) or bent.target}`; expected a backward that is a matrix product with it. "
            "There is no derivative then: take torch's gradients, or write a linear backward."
        )
    names = ["g", *map(call.operand_name, range(len(inputs)))] if len(call.operands) == len(inputs) else []
    tensors: Any = [torch.zeros_like(call.out), *inputs, *made.results(result, inputs, call.out, key)]
    program = Program(_of_gradient(backward), tensors, 0, rule, names, place)
    return list(flipped(program.terms()))


def expect_twice(gm: fx.GraphModule) -> None:
    """Refuse a second derivative through a gradient whose value and whose derivative are two things."""
    for node in gm.graph.nodes:
        backward = named(node.args[1]).backward[node.args[2]] if is_kept(node) else None
        if backward is None:
            continue
        late = reached(backward.graph, inputs_of(backward.graph)[:1])
        cuts = (n for n in backward.graph.nodes if is_kept(n) or n.target is aten.detach.default)
        other = next((n for n in cuts if n in late), None)
        if other is not None:
            raise TraceError(
                f"hessian: the gradient of {named(node.args[1]).name} detaches the gradient that it is given, or hands "
                f"it to another function with a gradient of its own: `{source_line(other) or other.target}`; expected "
                "a gradient whose derivative is that of its value. Use torch.autograd.functional.hessian."
            )


@cache
def _of_gradient(gm: fx.GraphModule) -> fx.GraphModule:
    """A backward as a function of the gradient: a detached gradient is the gradient, a kept function its value."""
    late = reached(gm.graph, inputs_of(gm.graph)[:1])
    own = {n.name for n in late if is_kept(n) and all(x in late for x in n.all_input_nodes)}
    gm = written_out(gm, lambda n: n.name in own)
    gm = copied(gm)
    graph = gm.graph
    late = reached(graph, inputs_of(graph)[:1])
    for node in list(graph.nodes):
        if node.target is aten.detach.default and node in late:
            replace(node, node.args[0])
    return gm


@cache
def first_bend(gm: fx.GraphModule) -> fx.Node | None:
    """The first op of a backward that is not linear in the incoming gradient; None if all are."""
    with out_of_sight():  # it computes, also while others trace
        return _bend(_of_gradient(gm), frozenset({0}))


def _bend(gm: fx.GraphModule, active: frozenset[int]) -> fx.Node | None:
    """The first op that is not linear in these inputs together."""
    inputs = inputs_of(gm.graph)
    late = reached(gm.graph, [inputs[k] for k in active])
    zeros: set[fx.Node] = set()
    for node in (n for n in gm.graph.nodes if n.op == "call_function"):
        if node in late:
            if not _is_linear(node, late, zeros):
                return node
        elif _is_zero(node, zeros):
            zeros.add(node)
    return None


def _is_linear(node: fx.Node, late: set[fx.Node], zeros: set[fx.Node]) -> bool:
    """Is an op linear in the operands that depend on the gradient: affine by its row, and 0 where they are 0?"""
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    row, operands = row_of(node.target), _operands(node)
    if any(n in late and n not in operands for n in node.all_input_nodes):
        return False
    if row.rule is None:  # by its definition
        flat = nodes_in((node.args, dict(node.kwargs)))
        found = None if is_kept(node) else defined_at(node)
        return found is not None and _bend(found, frozenset(k for k, n in enumerate(flat) if n in late)) is None
    if not row.is_affine(frozenset(k for k, n in enumerate(operands) if n in late)):
        return False
    return row.multilinear or _vanishes(node, late | zeros)


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Does the graph say that a tensor is all zeros?"""
    operands = _operands(node)
    if filled_with(node) is not None or getattr(node.target, "_opname", "") == "fill":
        return _vanishes(node, zeros)
    if not operands:
        return False
    if row_of(node.target).multilinear:
        return any(n in zeros for n in operands)
    return all(n in zeros for n in operands) and _vanishes(node, zeros)


def _vanishes(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Is an op 0 where these operands are 0 and all others 1, whatever its masks?"""

    def stand_in(n: fx.Node, mask: bool) -> Tensor:
        value = n.meta["val"]
        number = mask if value.dtype == torch.bool else int(value.is_floating_point() and n not in zeros)
        return torch.full(tuple(value.shape), number, dtype=value.dtype)

    return not any(bool(applied(node, partial(stand_in, mask=mask)).any()) for mask in (False, True))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [n for n in nodes_in((node.args, dict(node.kwargs))) if n.meta["val"].is_floating_point()]

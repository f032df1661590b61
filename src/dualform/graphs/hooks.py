"""A hook on a tensor of a trace: a node between that tensor and all its uses, with its op where that reads it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.graphs.aside import aside, without_detach
from dualform.graphs.edit import add_input, add_plain, applied, cleaned, output_of, results_of
from dualform.graphs.kept import kept_op
from dualform.graphs.requiring import can_move
from dualform.graphs.this_thread import caller
from dualform.shapes import TraceError


class Handle:
    """What `register_hook` gives inside a trace."""

    def __init__(self, where: str) -> None:
        self.where = where

    def remove(self) -> None:
        """Refuse: the hook is in the graph."""
        raise TraceError(
            f"trace: the hook of `{self.where}` is removed again; expected it to stay. Do not register it."
        )


class Maker:
    """The op that made a hooked tensor, where its own gradient reads it: in second derivatives, through the hook."""

    def __init__(self, node: fx.Node, joint: fx.GraphModule) -> None:
        self.node, self.joint = node, joint
        self.nodes = _made_by(node).all_input_nodes
        self.values: list[Tensor] = [n.meta["val"] for n in self.nodes]

    @staticmethod
    def of(node: fx.Node) -> Maker | None:
        """None for an op whose gradient does not read its result: a hook is then a node of its own behind it."""
        source = _made_by(node)
        moved = [n for n in source.all_input_nodes if can_move(n.meta.get("val"))]
        if source.op != "call_function" or not moved:
            return None
        at = [source.all_input_nodes.index(n) for n in moved]

        def joint(g: Tensor, *given: Tensor) -> list[Tensor | None]:
            inputs = [x.detach().requires_grad_() if k in at else x for k, x in enumerate(given)]
            out = _run(node, [x.clone() for x in inputs] if source.target._schema.is_mutable else inputs)
            leaves = [inputs[k] for k in at]
            grads = torch.autograd.grad(out, leaves, g, allow_unused=True, create_graph=True)
            found = dict(zip(at, grads, strict=True))
            return [out, *(found.get(k) for k in range(len(inputs)))]

        with aside([n.meta["val"] for n in source.all_input_nodes]) as stand_ins, torch.enable_grad():
            made = make_fx(joint, tracing_mode="real")(torch.empty_like(node.meta["val"]), *stand_ins)
        without_detach(made.graph)
        out, *grads = results_of(made.graph)
        if all(user.op == "output" for user in out.users):
            return None
        if source.target._schema.is_mutable:
            raise TraceError(
                f"trace: a hook on the result of {source.target._opname}, written in place, whose gradient reads that "
                "result; expected one made anew. Write h = op(h)."
            )
        out.replace_all_uses_with(add_input(made.graph, "out"))
        output_of(made.graph).args = (grads,)
        return Maker(node, cleaned(made))

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        """The op."""
        return (_run(self.node, given),)

    def pull(self, g: Tensor, given: Sequence[Tensor], out: Tensor) -> list[Tensor | None]:
        """Its gradient."""
        return list(self.joint(g, *given, out))


def _made_by(node: fx.Node) -> Any:
    return node.args[0] if node.target is operator.getitem else node


def _run(node: fx.Node, given: Sequence[Tensor]) -> Tensor:
    """The op that made a node, on other tensors."""
    source: Any = _made_by(node)
    made = applied(source, dict(zip(source.all_input_nodes, given, strict=True)).__getitem__)
    return made if source is node else made[node.args[1]]


def put_hook(graph: Any, raw: fx.Node, node: fx.Node, key: str, operands: list[fx.Node], where: str) -> fx.Node:
    """Put a hook between a tensor and all its uses, in place of the one that is there."""
    new = add_plain(graph, kept_op, operands, key, 0)
    new.meta |= {**raw.meta, "hooks": raw in operands, "stack_trace": caller.line}
    order = {n: k for k, n in enumerate(graph.nodes)}
    uses = [user for user in node.users if user is not new]
    if uses:
        first = min(uses, key=order.__getitem__)
        constants = [n for n in operands if n.op == "get_attr" and order[n] > order[first]]
        if any(order[n] >= order[first] for n in operands if n not in constants):
            raise TraceError(
                f"trace: `{where}` registers a hook on a tensor that was used before, and the hook reads a tensor made "
                "since; expected it registered where its tensor is made. Move it up, or compute inside the hook."
            )
        for n in (*constants, new):
            first.prepend(n)
        for user in uses:
            user.replace_input_with(node, new)
    return new

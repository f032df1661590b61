"""Ops that are made of other ops: their definition, traced once for each kind of call, and differentiated as a program.

A definition is a row's own (attention, cdist), torch's composite kernel (cross_entropy_loss, gru_cell), or torch's
table of decompositions (mse_loss, and the backward ops that a traced gradient holds).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree

from dualform.algebra.terms import Term
from dualform.graphs.hollow import META, Hollow, Hollows
from dualform.graphs.local_derivatives import LocalRule, Program
from dualform.graphs.recorder import below_dispatch
from dualform.graphs.this_thread import out_of_sight
from dualform.graphs.trace import trace
from dualform.ops.table import OpCall, Target, row_of

_Like = tuple[tuple[int, ...], torch.dtype, torch.device]

# Ops of which torch's table (2.13) has a definition of something else: targets after -1 count there.
_WRONG = {"aten::multilabel_margin_loss_forward"}


def definition_of(target: Target) -> Callable[..., Any] | None:
    """A function of the op's arguments that is made of other ops, if there is one."""
    from torch._decomp import decomposition_table  # slow: not at `import dualform`

    own = row_of(target).definition
    if own is not None:
        return own
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name in _WRONG:
        return None
    return target.decompose if target._can_decompose() else decomposition_table.get(target)


class _Hole:
    """The place of a tensor among constants."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hole)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=512)
def _traced(
    target: Target, constants: tuple[Any, ...], spec: _pytree.TreeSpec, likes: tuple[_Like, ...], part: int | None
) -> fx.GraphModule | None:
    """Trace a definition on stand-ins, out of sight of any trace or transform that is going on; None if that fails."""
    definition = definition_of(target)
    if definition is None:
        return None
    composite = getattr(definition, "__self__", None) is target

    def defined(*tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = _pytree.tree_unflatten([next(given) if isinstance(c, _Hole) else c for c in constants], spec)
        result = definition(*args, **kwargs)
        return result if part is None else result[part]

    with out_of_sight(), Hollows():
        stand_ins = _stand_ins(likes)
        try:
            # A composite kernel shows its ops after dispatch only: before it, it is one op again.
            gm = trace(below_dispatch(defined, stand_ins) if composite else defined, *stand_ins)
        except Exception:  # whatever the reason, there is no definition to differentiate; the op is refused or dense
            return None
    ops = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    # A definition that is the op itself again, or is written below the ops that have rows, says nothing.
    return None if any(op == target or str(op).startswith("prims.") for op in ops) else gm


def _stand_ins(likes: tuple[_Like, ...]) -> list[Tensor]:
    if all(device.type == "cpu" for _, _, device in likes):
        return [Hollow(torch.empty(shape, dtype=dtype, device=META)) for shape, dtype, _ in likes]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in likes]


def defined(call: OpCall) -> tuple[fx.GraphModule, list[Tensor]] | None:
    """The traced definition of an op at a call, and the tensors that it takes."""
    flat, spec = _pytree.tree_flatten((call.args, dict(call.kwargs)))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    constants = tuple(_Hole() if isinstance(x, Tensor) else x for x in flat)
    likes = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
    gm = _traced(call.target, constants, spec, likes, call.part)
    return None if gm is None else (gm, tensors)


def defined_at(node: fx.Node) -> fx.GraphModule | None:
    """The traced definition of a node's op."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    found = defined(OpCall(node.target, args, kwargs, node.meta["val"]))
    return found and found[0]


def definition_terms(call: OpCall, operand: int, rule: LocalRule) -> list[Term] | None:
    """Differentiate an op through its definition; None if it has none."""
    found = defined(call)
    if found is None:
        return None
    gm, tensors = found
    floating = [k for k, t in enumerate(tensors) if t.is_floating_point()]
    names = iter(call.names)
    named = [next(names, "") if t.is_floating_point() else "" for t in tensors]
    return list(Program(gm, tensors, floating[operand], rule, named).terms())

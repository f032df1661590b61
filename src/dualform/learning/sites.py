"""Where the weights meet the data: reading a learner's trace.

A node is *par* if it depends on fast leaves only and *tok* if it depends on the tokens. A *site* is a tok node with a par
operand. It is admissible if, its tok operands held fixed, it is jointly affine in the leaves behind its par operands; the
op table says so. This file marks nodes, proves that tokens do not mix, and lists the sites.

Legend: W tokens in the trace, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree

from dualform.calculus import rules
from dualform.calculus.definitions import definition_of
from dualform.calculus.structure import Axis, Derivative, Label
from dualform.calculus.trace import source_line, trace

aten = torch.ops.aten
PER_TOKEN = "Per token: use reduction='none' and sum over the last axis, or df.objectives.Squared()."


class DerivationError(ValueError):
    """A learner, objective or rule for which the asked form does not exist."""


class Place(NamedTuple):
    """Where the token index sits: axis `axis` is (outer, W, inner), row-major."""

    axis: int
    outer: int
    inner: int


@torch.library.custom_op("dualform::stop_gradient", mutates_args=())
def stop_gradient(x: Tensor) -> Tensor:
    """A learner's own detach: the identity, with no gradient in either loop. (A trace drops aten's, autograd makes many.)"""
    return x.clone()


stop_gradient.register_fake(torch.empty_like)
stop_gradient.register_autograd(lambda ctx, g: None)
stop_gradient.register_vmap(lambda info, dims, x: (stop_gradient(x), dims[0]))


@dataclass(eq=False)
class Site:
    """A node where fast weights meet tokens."""

    node: fx.Node
    pars: tuple[fx.Node, ...]  # its par operands
    leaves: tuple[str, ...]  # the fast leaves behind them
    admissible: bool
    why: str = ""  # why not


@dataclass(eq=False)
class Analysis:
    """A learner's trace at W tokens, marked."""

    graph: fx.GraphModule
    who: str  # whose: the learner's, the objective's or the rule's
    tokens: tuple[fx.Node, ...]  # inputs with a token axis
    leaf_nodes: dict[str, fx.Node]
    slow_nodes: dict[str, fx.Node]
    output: fx.Node
    constants: dict[str, Tensor]  # tensors that the trace made itself, as inputs
    leaves: dict[fx.Node, frozenset[str]] = field(default_factory=dict)  # fast leaves a node depends on
    tok: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, Place] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    @property
    def x(self) -> fx.Node:
        """The tokens that a learner reads."""
        return self.tokens[0]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "call_function"]

    def is_par(self, node: fx.Node) -> bool:
        return node not in self.tok and bool(self.leaves[node])

    def value(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Run one node on the values in `env`."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        return stop_gradient(*args) if is_detach(node) else node.target(*args, **kwargs)  # type: ignore[operator]

    def call(self, node: fx.Node, env: Mapping[fx.Node, Any], row: str = "x") -> rules.Call:
        """Describe a node and its values for the op table; operands are named as in the trace, the tokens `row`."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        names = tuple(
            row if s is self.x else f"{s.name}_{row}" if s in self.tok else s.name for s in operand_nodes(node)
        )
        return rules.Call(node.target, args, kwargs, env[node], names=names)  # type: ignore[arg-type]


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """List the nodes behind `Call.operands`: the floating tensor arguments, lists flattened."""
    flat, _ = _pytree.tree_flatten((node.args, dict(node.kwargs)))
    return [x for x in flat if isinstance(x, fx.Node) and is_floating(x.meta["val"])]


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# Ops whose value does not depend on their tensor argument's numbers.
_shape_only = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}


# Entry by entry, though torch does not tag them: a slot computed as a float becomes an index, or one of two.
_entrywise = {"to", "_to_copy", "where"}
# Ops that take only the shape of their second argument.
_shape_from_second = {"expand_as", "view_as", "reshape_as", "type_as"}


def prepared(graph: fx.GraphModule, **parts: Any) -> Analysis:
    """Spell out and number a trace whose inputs are told apart; `mark` fills in the rest."""
    _spell_out(graph)
    for n, node in enumerate(graph.graph.nodes):
        node.meta["ordinal"] = n
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    return Analysis(graph=graph, output=(output.all_input_nodes or [output])[0], **parts)


def _spell_out(graph: fx.GraphModule) -> None:
    """Replace ops that the table has no row for by their own definition in ops that it has, where torch gives one."""
    pending = [node for node in graph.graph.nodes if _has_no_row(node)]
    while pending:
        node = pending.pop()
        definition = _definition(node)
        if definition is None:
            continue
        sources = list(node.all_input_nodes)
        part = trace(definition, *(s.meta["val"] for s in sources))
        if any(n.op == "get_attr" or str(n.target).startswith("prims.") for n in part.graph.nodes):
            continue
        copies: dict[fx.Node, fx.Node] = {}
        holes = iter(sources)
        with graph.graph.inserting_before(node):
            for inner in part.graph.nodes:
                if inner.op == "placeholder":
                    copies[inner] = next(holes)
                elif inner.op == "output":
                    (result,) = inner.all_input_nodes
                    node.replace_all_uses_with(copies[result])
                else:
                    copies[inner] = graph.graph.node_copy(inner, copies.__getitem__)
                    copies[inner].meta |= {"stack_trace": node.meta.get("stack_trace") or node.stack_trace}
                    if _has_no_row(inner) and inner.target != node.target:
                        pending.append(copies[inner])
        graph.graph.erase_node(node)


def _has_no_row(node: fx.Node) -> bool:
    is_op = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return is_op and isinstance(node.meta.get("val"), Tensor) and not rules.is_structured(node.target)


def _definition(node: fx.Node) -> Callable[..., Tensor] | None:
    written = definition_of(node.target)
    if written is None:
        return None

    def definition(*tensors: Tensor) -> Tensor:
        values = dict(zip(node.all_input_nodes, tensors, strict=True))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        return written(*args, **kwargs)

    if getattr(written, "__self__", None) is not node.target:
        return definition
    return make_fx(definition, tracing_mode="real")(*(s.meta["val"] for s in node.all_input_nodes))  # after dispatch


def mark(a: Analysis, W: int) -> None:
    """Fill in leaves, tok, places (proving that tokens stay apart) and sites."""
    a.leaves, a.tok, a.places, a.sites = {}, set(a.tokens), dict.fromkeys(a.tokens, Place(0, 1, 1)), []
    names = {node: name for name, node in a.leaf_nodes.items()}
    env = {node: node.meta.get("val") for node in a.graph.graph.nodes}
    for node in a.graph.graph.nodes:
        if node.op == "placeholder":
            a.leaves[node] = frozenset({names[node]} if node in names else ())
            continue
        if node.op == "output":
            continue
        sources = [] if _is_shape_only(node) else node.all_input_nodes
        a.leaves[node] = frozenset().union(*(a.leaves[s] for s in sources))
        if any(s in a.tok for s in sources):
            a.tok.add(node)
            if W > 1:
                a.places[node] = _place(a, node, env, W)
            pars = tuple(s for s in sources if a.is_par(s))
            if pars:
                a.sites.append(_site(a, node, pars))


def _is_shape_only(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return name in _shape_only


def _site(a: Analysis, node: fx.Node, pars: tuple[fx.Node, ...]) -> Site:
    leaves = tuple(name for name in a.leaf_nodes if any(name in a.leaves[p] for p in pars))
    operands = operand_nodes(node)
    if not all(p in operands for p in pars):
        return Site(node, pars, leaves, False, "a weight decides a branch or an index")
    if not rules.affine(node.target, frozenset(j for j, s in enumerate(operands) if s in pars)):
        return Site(node, pars, leaves, False, f"{op_name(node)} is not jointly affine in its weights")
    crooked = next((bad for p in pars if (bad := first_crooked(a, p)) is not None), None)
    if crooked is not None:
        return Site(
            node, pars, leaves, False, f"the weights pass through {op_name(crooked)}, which is not affine in them"
        )
    return Site(node, pars, leaves, True)


def first_crooked(a: Analysis, node: fx.Node) -> fx.Node | None:
    """Find the first node behind a par node that is not jointly affine in the leaves; None if there is none."""
    if node.op == "placeholder" or not a.leaves[node]:
        return None
    operands = operand_nodes(node)
    pars = [s for s in node.all_input_nodes if a.leaves[s]]
    for p in pars:
        found = first_crooked(a, p)
        if found is not None:
            return found
    joint = frozenset(j for j, s in enumerate(operands) if a.leaves[s])
    straight = all(p in operands for p in pars) and rules.affine(node.target, joint) and not is_detach(node)
    return None if straight else node


def is_detach(node: fx.Node) -> bool:
    """Is it a detach? Its derivative is zero, so the value of weights behind one must be carried, not differentiated."""
    return node.target == aten.detach.default


def op_name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def _place(a: Analysis, node: fx.Node, env: Mapping[fx.Node, Any], W: int) -> Place:
    """Prove that a node keeps tokens apart and say where its token index sits."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise _mixes(a, node)
    tags = getattr(node.target, "tags", ())
    found: set[Place] = set()
    operands = operand_nodes(node)
    for j, source in enumerate(node.all_input_nodes):
        if source not in a.tok or (j > 0 and op_name(node) in _shape_from_second):
            continue
        if is_detach(node):
            found.add(a.places[source])
        elif torch.Tag.pointwise in tags or op_name(node) in _entrywise:
            place = a.places[source]
            found.add(place._replace(axis=place.axis + value.ndim - source.meta["val"].ndim))
        elif source not in operands:
            found.add(_looked_up(node, a.places[source]))  # type: ignore[arg-type]
        else:
            for k in (k for k, operand in enumerate(operands) if operand is source):
                found |= _carried(a.call(node, env), k, a.places[source], W) or {None}  # type: ignore[arg-type]
    if len(found) != 1 or None in found:
        raise _mixes(a, node)
    return found.pop()


def _looked_up(node: fx.Node, place: Place) -> Place | None:
    """Where an op keeps the token index of an index that it is given; None if it loses it."""
    if op_name(node) == "gather":  # an index of its own for each entry of the result stands where that entry does
        return place
    if op_name(node) in ("scatter", "scatter_add"):  # and one for each entry of the source, along the other axes
        dim: Any = node.args[1]
        return None if place.axis == dim % node.meta["val"].ndim else place
    return None


def _carried(call: rules.Call, operand: int, place: Place, W: int) -> set[Place]:
    """Where an op carries the token index of an operand; empty if it loses it."""
    known = rules.derivative(call, operand) if is_floating(call.out) else rules.reads(call, operand)
    return set() if known is None else carried_places(known, place, W)


def _mixes(a: Analysis, node: fx.Node) -> DerivationError:
    where = source_line(node) or f"{op_name(node)}, called inside torch"
    if _has_no_row(node) or not isinstance(node.meta["val"], Tensor):
        return DerivationError(
            f"derive: the {a.who} uses {op_name(node)} at {where}, which has no row in the table of ops; expected ops "
            "that can be shown to keep tokens apart. Write it with other ops, or add a row (calculus/table.py)."
        )
    return DerivationError(
        f"derive: the {a.who} mixes tokens at {where}: {op_name(node)} makes one row depend on others; expected {_apart[a.who]}"
    )


_apart = {
    "learner": "a function of each row alone, (..., K) -> (..., V). Remove the operation over the token axis.",
    "objective": f"a loss of each token alone, (..., V), (..., V) -> (...,). {PER_TOKEN}",
    "rule": "coefficients made of each token's own position and gates. Remove the operation over the token axis.",
}


def carried_places(J: Derivative, place: Place, W: int) -> set[Place]:
    """Follow the token index of an input axis to the output: one place per term; empty if a term loses it."""
    found: set[Place] = set()
    for term in J.terms:
        hit = find_label(term.inn[place.axis], place.inner, W)
        if hit is None:
            return set()
        label, inner = hit
        where = [
            (axis, stride)
            for axis, labels in enumerate(term.out)
            for other, stride in strides(labels)
            if other is label
        ]
        if len(where) != 1:
            return set()
        axis, stride = where[0]
        inner *= stride
        found.add(Place(axis, math.prod(l.size for l in term.out[axis]) // (inner * W), inner))
    return found


def strides(labels: Axis) -> list[tuple[Label, int]]:
    """List an axis' labels with their strides, outermost first."""
    return [(label, math.prod(l.size for l in labels[n + 1 :])) for n, label in enumerate(labels)]


def find_label(labels: Axis, inner: int, W: int) -> tuple[Label, int] | None:
    """Find the one label that holds the digits [inner, inner W) of an axis, and where in it they begin."""
    for label, stride in strides(labels):
        if stride <= inner and inner * W <= stride * label.size and inner % stride == 0:
            return label, inner // stride
    return None

"""One form for graphs: the same function written in two ways becomes the same ops.

    view of a view -> one view      cat of all slices -> nothing      a composite op -> its definition

A rewriting is an identity of functions; which values the ops compute with is not looked at.
`identities.py` has those of numbers, sums and exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.definitions import defined_at
from dualform.graphs.edit import call_key, emitter, inline, nodes_in, replace, unwritten
from dualform.ops.pointwise import is_structured
from dualform.ops.table import bound_arguments, dims_of

aten = torch.ops.aten
Rewriting = Callable[["Rewriter", Any], Any]
_rules: dict[str, list[Rewriting]] = {}


def rewrites(*names: str) -> Callable[[Rewriting], Rewriting]:
    """Add a rewriting of ops, by name."""

    def add(rule: Rewriting) -> Rewriting:
        for name in names:
            _rules.setdefault(name, []).append(rule)
        return rule

    return add


def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring a graph into its canonical form: rewritings, equal nodes once, dead nodes gone."""
    write_out(gm.graph)
    rewriter = Rewriter(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            rewriter.visit(node)
    gm.graph.eliminate_dead_code()
    return unwritten(gm, gm.graph)  # holds no tensor that the graph does not name


def write_out(graph: fx.Graph) -> None:
    """Replace ops that are differentiated through their definition by it."""
    for node in list(graph.nodes):
        if not name_of(node) or is_structured(node.target) or not isinstance(node.meta.get("val"), Tensor):
            continue
        if not node.all_input_nodes:  # a constant is nothing to look into
            continue
        found = defined_at(node)
        if found is not None and not any(n.op == "get_attr" for n in found.graph.nodes):
            results, _ = inline(graph, node, found.graph, nodes_in((node.args, dict(node.kwargs))))
            replace(node, results[0])


class Rewriter:
    """Apply rewritings at node after node; those before are in canonical form, and no two of them are equal."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.at: Any = None
        self.known: dict[Hashable, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Rewrite a node, and what it was rewritten to."""
        self.at = node
        new = self._rewritten(node) or self.known.setdefault(call_key(node.target, node.args, node.kwargs), node)
        if new is not node:
            node.replace_all_uses_with(new)

    def make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the present one, itself rewritten; an equal one that is there already."""
        key = call_key(target, args, kwargs)
        if key in self.known:
            return self.known[key]
        new = emitter(self.graph, self.at)(target, *args, **kwargs)
        return self._rewritten(new) or self.known.setdefault(key, new)

    def _rewritten(self, node: fx.Node) -> fx.Node | None:
        for rule in _rules.get(name_of(node), ()):
            new = rule(self, node)
            if new is not None and new is not node:
                return new
        return None


def name_of(node: Any) -> str:
    """The op's name without overload; empty for what is no aten op."""
    target = node.target if isinstance(node, fx.Node) else None
    return target._opname if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" else ""


def value(node: Any) -> Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@rewrites(
    "clone", "contiguous", "alias", "positive", "view", "reshape", "_unsafe_view", "expand", "flatten",
    "unflatten", "to", "_to_copy", "type_as", "lift_fresh", "broadcast_to", "expand_as", "view_as", "reshape_as",
    "squeeze", "ravel",
)  # fmt: skip
def _nothing(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    return x if value(x).shape == value(node).shape and value(x).dtype == value(node).dtype else None


@rewrites("view", "reshape", "_unsafe_view", "flatten", "unflatten", "ravel", "view_as", "reshape_as")
def _reshaped_twice(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    if _reshaped_twice not in _rules.get(name_of(x), ()):
        return None
    return r.make(aten.reshape.default, x.args[0], list(value(node).shape))


@rewrites("slice", "narrow")
def _whole(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    return x if value(node).shape == value(x).shape and bound_arguments(node).get("step", 1) == 1 else None


@rewrites("roll")
def _rolled(r: Rewriter, node: Any) -> Any:
    b = bound_arguments(node)
    x = b["self"]
    if len(b["dims"]) != 1:
        return None
    dim, shift = b["dims"][0] % value(x).ndim, b["shifts"][0]
    if name_of(x) == "roll" and [d % value(x).ndim for d in bound_arguments(x)["dims"]] == [dim]:
        return r.make(aten.roll.default, bound_arguments(x)["self"], [shift + bound_arguments(x)["shifts"][0]], [dim])
    return x if shift % max(value(x).shape[dim], 1) == 0 else None


@rewrites("flip")
def _flipped(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    if not node.args[1]:
        return x
    twice = name_of(x) == "flip" and x.args[1]
    return (
        x.args[0] if twice and set(dims_of(twice, value(x).ndim)) == set(dims_of(node.args[1], value(x).ndim)) else None
    )


@rewrites("cat", "concat", "concatenate")
def _glued(r: Rewriter, node: Any) -> Any:
    """A cat of slices of one tensor that lie side by side is their common slice."""
    b = bound_arguments(node)
    pieces = b["tensors"]
    if len(pieces) == 1:
        return pieces[0]
    dim = b["dim"] % value(node).ndim
    if any(name_of(p) != "slice" for p in pieces):
        return None
    parts = [bound_arguments(p) for p in pieces]
    x = parts[0]["self"]
    size = value(x).shape
    ranges = [range(size[dim])[slice(p["start"], p["end"])] for p in parts if p["dim"] % len(size) == dim]
    same = all(p["self"] is x and p["step"] == 1 for p in parts) and len(ranges) == len(parts)
    if same and all(a.stop == b.start for a, b in zip(ranges, ranges[1:], strict=False)):
        return r.make(aten.slice.Tensor, x, dim, ranges[0].start, ranges[-1].stop)
    return None


@rewrites("stack")
def _restacked(r: Rewriter, node: Any) -> Any:
    b = bound_arguments(node)
    dim = b["dim"] % value(node).ndim
    if any(name_of(p) != "select" for p in b["tensors"]):
        return None
    parts = [bound_arguments(p) for p in b["tensors"]]
    x = parts[0]["self"]
    n = value(x).shape
    at = [(p["self"], p["dim"] % len(n), p["index"] % n[p["dim"]]) for p in parts]
    return x if at == [(x, dim, k) for k in range(n[dim])] and n == value(node).shape else None

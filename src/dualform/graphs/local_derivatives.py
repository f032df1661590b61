"""A traced function as a graph of local derivatives: values, derivatives by accumulation, vjp and jvp along the graph.

Sums of paths multiply with depth; the graph does not. Terms are made by accumulation node by node, tidied at each.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.linear_map import Derivative, Term, compose, derivative_of, identity
from dualform.algebra.sums import tidy
from dualform.algebra.terms import Relation
from dualform.graphs.edit import evaluated, inputs_of, needed, nodes_in, reached, results_of
from dualform.ops.table import OpCall

LocalRule = Callable[[OpCall, int], Derivative]


class Program:
    """A graph with values, seen from one input: what depends on it, and each such op's local derivatives."""

    def __init__(
        self, gm: fx.GraphModule, args: Sequence[Tensor] | Mapping[fx.Node, Any], wrt: int, rule: LocalRule,
        names: Sequence[str] | Mapping[fx.Node, str] = (), output: int = 0,
    ) -> None:  # fmt: skip
        """args: the inputs, or the values of all nodes; names: of the inputs, or of any nodes; output: which result."""
        self.gm = gm
        self.rule = rule
        self.inputs = inputs_of(gm.graph)
        self.names = dict(names if isinstance(names, Mapping) else zip(self.inputs, names, strict=False))
        self.source = self.inputs[wrt]
        self.values = args if isinstance(args, Mapping) else evaluated(gm, args)
        self.output: Any = results_of(gm.graph)[output]
        self.active = self._active()

    def name_of(self, node: fx.Node) -> str:
        """What people call a node's value."""
        return self.names.get(node) or node.name

    def _active(self) -> list[fx.Node]:
        """Nodes on a path from the input to the output, in order."""
        between = reached(self.gm.graph, [self.source]) & needed([self.output])
        return [n for n in self.gm.graph.nodes if n in between and n.op == "call_function"]

    def call(self, node: fx.Node) -> OpCall | None:
        """The op behind a node as the table knows it; None for a result of several tensors, seen at its parts."""
        value = self.values[node]
        if not isinstance(value, Tensor):
            return None
        assert not value.is_complex(), node  # pairs.py leaves none
        source: Any = node
        part: Any = None
        if node.target is operator.getitem:
            source, part = node.args[0], node.args[1]
        args, kwargs = fx.map_arg((source.args, dict(source.kwargs)), lambda n: self.values[n])
        names = tuple(self.name_of(n) for n in self.operand_nodes(source))
        return OpCall(source.target, args, kwargs, value, part, names)

    def operand_nodes(self, node: fx.Node) -> list[fx.Node]:
        """The nodes behind `OpCall.operands`."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        flat = nodes_in((source.args, dict(source.kwargs)))
        return [n for n in flat if isinstance(self.values[n], Tensor) and self.values[n].is_floating_point()]

    @cached_property
    def local(self) -> dict[fx.Node, list[tuple[fx.Node, Derivative]]]:
        """For each active node, the operands that depend on the input, each with d node / d operand."""
        active = {self.source, *self.active}
        found: dict[fx.Node, list[tuple[fx.Node, Derivative]]] = {}
        for node in self.active:
            call = self.call(node)
            if call is None:
                continue
            found[node] = [
                (source, self.rule(call, k))
                for k, source in enumerate(self.operand_nodes(node))
                if source in active or (source.target is operator.getitem and source.args[0] in active)
            ]
        return found

    @cached_property
    def selects(self) -> bool:
        """Does an op on the way leave entries out, so that what is infinite there counts for nothing?"""
        known = [J for parts in self.local.values() for _, J in parts if not (J.route and J.route.is_stored)]
        said = [J.route.selects if J.route else None for J in known]
        terms = (term for J, x in zip(known, said, strict=True) if x is None for term in J.terms)
        return True in said or any(isinstance(f, Relation) or f.is_mask for term in terms for f in term.factors)

    def terms(self) -> tuple[Term, ...]:
        """Accumulate d output / d input, from whichever end is smaller."""
        out, x = self.values[self.output], self.values[self.source]
        if self.output is self.source:
            return identity(x).terms
        return (self._backward() if out.numel() <= x.numel() else self._forward()).terms

    def totals(self, most: float = math.inf) -> dict[fx.Node, Derivative]:
        """d node / d input of the active nodes, as far as none on the way has more than `most` entries."""
        x = self.values[self.source]
        total: dict[fx.Node, Derivative] = {self.source: identity(x)}
        for node, parts in self.local.items():
            if not parts:  # it is reached through integers and truth values only
                total[node] = derivative_of(self.values[node], x)
            elif all(source in total for source, _ in parts) and self.values[node].numel() * x.numel() <= most:
                total[node] = _summed([compose(local, total[source]) for source, local in parts])
        return total

    def _forward(self) -> Derivative:
        return self.totals().get(self.output) or derivative_of(self.values[self.output], self.values[self.source])

    def _backward(self) -> Derivative:
        out = self.values[self.output]
        paths: dict[fx.Node, list[Derivative]] = {self.output: [identity(out)]}
        for node, parts in reversed(self.local.items()):
            if node in paths:
                outer = _summed(paths.pop(node))
                for source, local in parts:
                    paths.setdefault(source, []).append(compose(outer, local))
        found = paths.get(self.source)
        return _summed(found) if found else derivative_of(out, self.values[self.source])

    def vjp(self, g: Tensor) -> Tensor:
        """Pull a gradient of the output back along the graph."""
        pulled: dict[fx.Node, Tensor] = {self.output: g}
        for node, parts in reversed(self.local.items()):
            if node in pulled:
                seed = pulled.pop(node)
                for source, local in parts:
                    part = local.vjp(seed)
                    pulled[source] = pulled[source] + part if source in pulled else part
        x = self.values[self.source]
        return pulled[self.source] if self.source in pulled else torch.zeros_like(x)

    def jvp(self, v: Tensor) -> Tensor:
        """Push a direction in the input forward along the graph."""
        pushed: dict[fx.Node, Tensor] = {self.source: v}
        for node, parts in self.local.items():
            paths = [local.jvp(pushed[source]) for source, local in parts if source in pushed]
            if paths:
                pushed[node] = sum(paths[1:], paths[0])
        return pushed[self.output] if self.output in pushed else torch.zeros_like(self.values[self.output])


def _summed(paths: Sequence[Derivative]) -> Derivative:
    first = paths[0]
    like = torch.empty((), dtype=first.dtype, device=first.device)
    return first.with_terms(tidy([t for p in paths for t in p.terms], like))

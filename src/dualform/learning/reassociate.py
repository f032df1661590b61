"""Token first: rewrite a product of weights that meets the tokens so that every pairwise product has a token operand.

    x @ (A @ B) -> (x @ A) @ B        einsum(x, A, B) pairwise        x @ (A @ A.T) -> two tied sites

The same function, so exact. A par node is written as a sum of products of affine par nodes over labelled axes, read off
the one table of derivative rules (a multilinear op is its own derivative times its operand); the site then becomes a
chain of contractions that starts at the tokens.

Legend: labels are axes' atoms (algebra.terms); a product is a Term without input axes whose factors are named by nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from dualform.algebra.planner import letters, token_order
from dualform.algebra.terms import Axis, Factor, Label, Term, atoms, fresh_axes, renewed, sizes, substitute, volume
from dualform.graphs import local_rules
from dualform.graphs.edit import add
from dualform.graphs.this_thread import no_modes
from dualform.learning.sites import Analysis, first_crooked, is_of_one_type, mark, operand_nodes
from dualform.ops.pointwise import is_pointwise
from dualform.ops.table import find_row, row_of

aten = torch.ops.aten


class _NoProduct(Exception):
    """The par subgraph is not a sum of products of leaves."""


@dataclass
class _Chain:
    """One product: its tokens, the weights in the order in which they meet them, and the labels left."""

    term: Term
    tokens: Factor
    steps: list[tuple[str, Factor, str, str]]  # letters of the tokens, a weight, its letters, those of the product
    left: tuple[Label, ...]


def reassociate(a: Analysis, W: int, *, always: bool) -> Analysis:
    """Rewrite inadmissible sites where every intermediate is smaller than what it replaces, or wherever possible."""
    refused: set[str] = set()
    while True:
        site = next((s for s in a.sites if not s.admissible and s.node.name not in refused), None)
        if site is None:
            return a
        product = _without_bias(a, site.node)
        limit = math.inf if always else W * sum(p.meta["val"].numel() for p in site.pars)
        try:
            chains = [_chain(a, term, limit) for term in _product_of(a, product)]
        except _NoProduct:
            if product is not site.node:
                a.graph.graph.erase_node(product)
            refused.add(site.node.name)
            continue
        with a.graph.graph.inserting_before(site.node):
            total = _emit(a, product, chains)
            if product is not site.node:
                total = _node(a.graph.graph, aten.add.Tensor, total, _bias(site.node))
        _replace(a, site.node, total)
        mark(a, W)


def _bias(node: fx.Node) -> Any:
    """What linear and addmm add to their product; None if there is nothing, or another op."""
    if node.target == aten.linear.default:
        return node.args[2] if len(node.args) == 3 else None
    return node.args[0] if node.target == aten.addmm.default and not node.kwargs else None


def _without_bias(a: Analysis, node: fx.Node) -> fx.Node:
    """Put the product of linear and addmm, alone, beside it."""
    if _bias(node) is None:
        return node
    with a.graph.graph.inserting_before(node):
        if node.target == aten.linear.default:
            return _node(a.graph.graph, aten.linear.default, *node.args[:2])
        return _node(a.graph.graph, aten.mm.default, *node.args[1:])


def _node(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Add a call, named as its op for who reads the program."""
    node = add(graph, target, *args)
    node._rename(target.overloadpacket.__name__)
    return node


def _replace(a: Analysis, old: fx.Node, new: fx.Node) -> None:
    for node in a.graph.graph.nodes:
        if "ordinal" not in node.meta:  # made here: it stands for the same line
            node.meta.setdefault("stack_trace", old.meta.get("stack_trace"))
    new.meta |= {"stack_trace": old.meta.get("stack_trace"), "ordinal": old.meta.get("ordinal")}
    new.stack_trace = old.stack_trace
    old.replace_all_uses_with(new)
    if a.output is old:
        a.output = new
    a.graph.graph.erase_node(old)
    for node in reversed(list(a.graph.graph.nodes)):
        if not node.users and node.op == "call_function":
            a.graph.graph.erase_node(node)


def _expand(a: Analysis, node: fx.Node) -> list[Term]:
    """Write a node as a sum of products of tokens, affine par nodes and constants."""
    if node in a.tok or first_crooked(a, node) is None:
        axes = fresh_axes(node.meta["val"].shape)
        return [Term(1.0, (_factor(node, axes),), axes, ())]
    return _product_of(a, node) if row_of(node.target).multilinear else _sum_of(a, node)


def _factor(node: fx.Node, axes: tuple[Axis, ...]) -> Factor:
    labels = atoms(axes)
    return Factor(torch.empty(sizes(labels), device="meta"), labels, node.name)


def _meta_call(node: fx.Node) -> local_rules.OpCall:
    """Describe an op on meta tensors: only its labels are asked for."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: torch.empty_like(n.meta["val"], device="meta"))
    return local_rules.OpCall(node.target, args, kwargs, torch.empty_like(node.meta["val"], device="meta"))


def _product_of(a: Analysis, node: fx.Node) -> list[Term]:
    """A multilinear op as the table writes it: out[axes] = coef * sum prod operand_k[axes_k]."""
    row, operands = find_row(node.target), _numbers(node)
    if row is None or row.form is None:
        raise _NoProduct
    product = row.form(_meta_call(node))
    if len(product.axes) != len(operands):
        raise _NoProduct
    return _combine(a, Term(product.coef, (), product.out, ()), list(zip(operands, product.axes, strict=True)))


def _combine(a: Analysis, term: Term, pieces: list[tuple[fx.Node, tuple[Axis, ...]]]) -> list[Term]:
    """Put each operand's own expansion in its place."""
    # the operands' axes ride along as extra output axes while labels are unified
    shown, at = len(term.out), len(term.out)
    terms = [replace(term, out=(*term.out, *(axis for _, axes in pieces for axis in axes)))]
    for node, axes in pieces:
        grown: list[Term] = []
        for inner in _expand(a, node):
            inner = renewed(inner)
            for t in terms:
                carrier = Term(t.coef * inner.coef, (*t.factors, *inner.factors), (*t.out, *inner.out), ())
                carrier = _unified(carrier, at, len(t.out), len(axes))
                grown.append(replace(carrier, out=carrier.out[: len(t.out)]))
        terms, at = grown, at + len(axes)
        if len(pieces) > 1 and len(terms) > 8:
            raise _NoProduct
    return [_summed(t, shown) for t in terms]


def _summed(term: Term, shown: int) -> Term:
    """Leave the first output axes; an index that nothing else has is a sum of equal numbers."""
    there = {*atoms(term.out[:shown]), *(label for f in term.factors for label in f.labels)}
    free = volume(label for label in dict.fromkeys(atoms(term.out[shown:])) if label not in there)
    return replace(term, coef=term.coef * free, out=term.out[:shown])


def _unified(term: Term, start: int, other: int, count: int) -> Term:
    """Make `count` output axes from `start` on and those from `other` on the same labels."""
    for k in range(count):
        while True:
            left, right = list(term.out[start + k]), list(term.out[other + k])
            clash = None
            while left and right:
                x, y = left.pop(), right.pop()
                if x is not y:
                    clash = (x, y)
                    break
            if clash is None:
                if left or right:
                    raise _NoProduct
                break
            x, y = clash
            if x.size == y.size:
                term = substitute(term, {y: (x,)})
            elif x.size % y.size == 0:
                term = substitute(term, {x: (Label(x.size // y.size), y)})
            elif y.size % x.size == 0:
                term = substitute(term, {y: (Label(y.size // x.size), x)})
            else:
                raise _NoProduct
    return term


def _sum_of(a: Analysis, node: fx.Node) -> list[Term]:
    """A view, a sum, a scaling, a number added: a sum over the operands, and what is left when all of them are zero."""
    operands, call = _numbers(node), _meta_call(node)
    if not local_rules.affine(node.target, frozenset(range(len(operands)))):
        raise _NoProduct
    found: list[Term] = []
    for j, source in enumerate(operands):
        for term in local_rules.derivative(call, j).terms:
            if term.factors:
                raise _NoProduct
            term = renewed(term)
            found += _combine(a, Term(term.coef, (), term.out, ()), [(source, term.inn)])
    offset = _offset(node)
    return [*found, Term(offset, (), fresh_axes(call.out.shape), ())] if offset else found


# How a schema says that an argument may be a number that is computed with, not a size or a dimension.
_NUMBERS = {"number", "float", "Tensor"}


def _numbers(node: fx.Node) -> list[fx.Node]:
    """The operands of an op that takes no other tensor, such as a mask, all of its result's type."""
    operands = operand_nodes(node)
    if not is_of_one_type(node) or set(node.all_input_nodes) != set(operands):
        raise _NoProduct
    return operands


def _offset(node: fx.Node) -> float:
    """The number that an affine op gives everywhere for operands of zero."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {x.name: value for x, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    if not any(isinstance(given.get(x.name), int | float) and str(x.type) in _NUMBERS for x in schema):
        return 0.0
    if not is_pointwise(node.target):
        raise _NoProduct
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda _: torch.zeros((), dtype=torch.float64))
    with no_modes():
        return float(node.target(*args, **kwargs))  # type: ignore[operator]


def _chain(a: Analysis, term: Term, limit: float) -> _Chain:
    """Order a product's weights from the tokens on, every intermediate below a limit."""
    if not all(isinstance(f, Factor) for f in term.factors):
        raise _NoProduct
    by_name = {n.name: n for n in a.graph.graph.nodes}
    tokens = [f for f in term.tensors if by_name[f.name] in a.tok]
    weights = [f for f in term.tensors if by_name[f.name] not in a.tok]
    whole = all(f.tensor.numel() == by_name[f.name].meta["val"].numel() for f in term.tensors)
    if len(tokens) != 1 or len(weights) > 6 or not whole:
        raise _NoProduct
    spelled = [f.labels for f in (*tokens, *weights)] + [atoms(term.out)]
    name = letters(*spelled)
    labels, *others, rows = ("".join(name[x] for x in one) for one in spelled)
    extents = tuple((x, label.size) for label, x in name.items())
    order = token_order((labels,), tuple(others), (False,) * len(weights), rows, extents, limit)
    if order is None:
        raise _NoProduct
    steps = [(left, weights[k], right, out) for k, left, right, out in order.steps if k is not None]
    return _Chain(term, tokens[0], steps, tuple(label for x in order.labels for label in name if name[label] == x))


def _emit(a: Analysis, node: fx.Node, chains: list[_Chain]) -> fx.Node:
    """Write the chains of a product and their sum, where the graph inserts."""
    graph = a.graph.graph
    by_name = {n.name: n for n in graph.nodes}
    shape = list(node.meta["val"].shape)
    total: fx.Node | None = None
    for chain in chains:
        value = _viewed(graph, by_name[chain.tokens.name], sizes(chain.tokens.labels))
        for left, f, right, out in chain.steps:
            value = _product(graph, value, left, _viewed(graph, by_name[f.name], sizes(f.labels)), right, out)
        value = _finished(graph, value, chain.left, chain.term, shape)
        total = value if total is None else _node(graph, aten.add.Tensor, total, value)
    assert total is not None
    return total


def _viewed(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    return node if list(node.meta["val"].shape) == shape else _node(graph, aten.reshape.default, node, shape)


def _product(graph: fx.Graph, x: fx.Node, left: str, w: fx.Node, right: str, out: str) -> fx.Node:
    if len(left) == len(right) == len(out) == 2 and out == left[0] + right.replace(left[1], ""):
        return _node(graph, aten.mm.default, x, w if right[0] == left[1] else _node(graph, aten.t.default, w))
    return _node(graph, aten.einsum.default, f"{left},{right}->{out}", [x, w])


def _finished(graph: fx.Graph, value: fx.Node, labels: tuple[Label, ...], term: Term, shape: list[int]) -> fx.Node:
    """Bring a chain's result to the site's shape: order, repeats, broadcast axes, coefficient."""
    wanted = atoms(term.out)
    if len(set(wanted)) != len(wanted):
        raise _NoProduct
    over = [k for k, label in enumerate(labels) if label not in wanted]
    if over:  # no weight has met it: the weights are a number
        value = _node(graph, aten.sum.dim_IntList, value, over)
        labels = tuple(label for label in labels if label in wanted)
    present = tuple(label for label in wanted if label in labels)
    if present != labels:
        value = _node(graph, aten.permute.default, value, [labels.index(label) for label in present])
    if present != wanted:
        value = _node(graph, aten.reshape.default, value, [label.size if label in labels else 1 for label in wanted])
        value = _node(graph, aten.expand.default, value, sizes(wanted))
    value = _viewed(graph, value, shape)
    return value if term.coef == 1.0 else _node(graph, aten.mul.Tensor, value, term.coef)

"""Regroup the sums and products of a graph so that what is ready before the state meets first.

    a + s - b  ->  s + (a - b)        s * a * b  ->  s * (a b)        s waits for the state, a and b do not

so that the bracket leaves the loop. Exact in real arithmetic; no op is added to what runs in the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dualform.graphs.edit import add, broadcasts, inputs_of, reached, shape_of, without_dead
from dualform.graphs.simplify import tidy
from dualform.graphs.verify import verified_below_autograd
from dualform.ops.table import row_of

aten = torch.ops.aten
_products = {aten.mul.Tensor, aten.mul.Scalar}
_quotients = {aten.div.Tensor, aten.div.Scalar}


def _signs(node: fx.Node) -> tuple[int, ...]:
    """Those of a sum's operands; none if it is another op."""
    signs = row_of(node.target).signs
    return signs if len(signs) == len(node.args) and not node.kwargs else ()


def _scales(node: fx.Node) -> bool:
    return node.target in _products or node.target in _quotients


@verified_below_autograd
def ready_first(gm: fx.GraphModule, carried: Sequence[int]) -> fx.GraphModule:
    """Regroup the sums and products that wait for the state."""
    _pass(gm.graph, carried)
    gm = tidy(gm)  # signs that sums have passed on
    _pass(gm.graph, carried)
    return gm


def waiting(graph: fx.Graph, inputs: Sequence[int]) -> set[fx.Node]:
    """Collect what depends on some of the inputs, and these."""
    given = inputs_of(graph)
    return reached(graph, [given[i] for i in inputs])


def _pass(graph: fx.Graph, carried: Sequence[int]) -> None:
    for node in list(graph.nodes):
        _commute_expand(graph, node)
    for node in graph.nodes:
        if _signs(node) or (_scales(node) and not node.kwargs):
            for k, x in enumerate(node.args):
                if broadcasts(node, k):
                    node.update_arg(k, x.args[0])  # type: ignore[union-attr]
    for is_part, regroup in ((_signs, _regroup_sum), (_scales, _regroup_product)):
        waits = waiting(graph, carried)
        for node in reversed(list(graph.nodes)):
            if node in waits and is_part(node) and not node.kwargs and not _inner(node, is_part):
                regroup(graph, node, waits)
    without_dead(graph)


@verified_below_autograd
def join_products(graph: fx.Graph) -> None:
    """Write a @ x + b @ x as (a + b) @ x: the corrections of a weight and of its bias share their gradients; leave out
    what is added and taken off again."""
    for root in reversed(list(graph.nodes)):
        if not _signs(root) or _inner(root, _signs):
            continue
        every, _ = _terms(root)
        terms = _left_over(every) or every
        is_shorter, by_right = len(terms) < len(every), dict[fx.Node, list[int]]()
        for i, (_, x) in enumerate(terms):
            if isinstance(x, fx.Node) and x.target in (aten.mm.default, aten.bmm.default) and len(x.users) == 1:
                by_right.setdefault(x.args[1], []).append(i)  # type: ignore[arg-type]
        with graph.inserting_before(root):
            for right, places in by_right.items():
                lefts = [(terms[i][0], terms[i][1].args[0]) for i in places]
                if len({shape_of(x) for _, x in lefts}) != 1 or len(lefts) < 2 or _size(lefts[0][1]) > _size(right):
                    continue
                kept, lefts = [t for i, t in enumerate(terms) if i not in places], _left_over(lefts)
                if lefts:
                    sign, left = _added(graph, lefts)
                    kept.append((sign, add(graph, terms[places[0]][1].target, left, right)))
                if kept:
                    terms, is_shorter = kept, True
                    break
            if is_shorter:
                root.replace_all_uses_with(_total(graph, terms))
    without_dead(graph)


def _left_over(terms: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Take out pairs of a term and its negative."""
    found: list[tuple[int, Any]] = []
    for sign, x in terms:
        if (-sign, x) in found:
            found.remove((-sign, x))
        else:
            found.append((sign, x))
    return found


def _inner(node: fx.Node, is_part: Callable[[fx.Node], Any]) -> bool:
    """Is a node part of the same tree as its only user?"""
    users = list(node.users)
    divides = len(users) == 1 and users[0].target in _quotients and users[0].args[1] is node
    return len(users) == 1 and is_part(users[0]) and users[0].kwargs == {} and not divides


def _commute_expand(graph: fx.Graph, node: fx.Node) -> None:
    """Apply an op with a number before its argument is expanded, not after."""
    if _scales(node) and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float):
        source = node.args[0]
        if source.target == aten.expand.default:
            with graph.inserting_before(node):
                small = add(graph, node.target, source.args[0], node.args[1])
                node.replace_all_uses_with(add(graph, aten.expand.default, small, *source.args[1:]))


def _regroup_sum(graph: fx.Graph, root: fx.Node, waits: set[fx.Node]) -> None:
    every, negations = _terms(root)
    terms = _left_over(every) or every
    ready = [t for t in terms if t[1] not in waits]
    if len(every) < 2 or not (negations or len(terms) < len(every) or (len(ready) > 1 and len(terms) > 2)):
        return
    with graph.inserting_before(root):
        made = [_added(graph, ready)] if ready else []
        root.replace_all_uses_with(_total(graph, [t for t in terms if t[1] in waits] + made))


def _terms(root: fx.Node) -> tuple[list[tuple[int, Any]], int]:
    """List the signed terms of a sum, and count the negations that it holds."""
    terms: list[tuple[int, Any]] = []
    negations = 0

    def collect(x: Any, sign: int, top: bool = False) -> None:
        nonlocal negations
        if isinstance(x, fx.Node) and _signs(x) and (top or len(x.users) == 1):
            negations += x.target == aten.neg.default
            for part, own in zip(x.args, _signs(x), strict=True):
                collect(part, sign * own)
        else:
            terms.append((sign, x))

    collect(root, 1, top=True)
    return terms, negations


def _total(graph: fx.Graph, terms: list[tuple[int, Any]]) -> fx.Node:
    sign, total = _added(graph, terms)
    return total if sign > 0 else add(graph, aten.neg.default, total)


def _added(graph: fx.Graph, terms: list[tuple[int, Any]]) -> tuple[int, Any]:
    """Add terms up: what is positive first, small ones first."""
    terms = sorted(terms, key=lambda t: (-t[0], _size(t[1])))
    (sign, total), *rest = terms
    for own, x in rest:
        same = own == sign
        if isinstance(total, fx.Node):
            total = add(graph, aten.add.Tensor if same else aten.sub.Tensor, total, x)
        elif isinstance(x, fx.Node):  # a number stands second
            total = add(graph, aten.add.Tensor, x if same else add(graph, aten.neg.default, x), total)
        else:
            total = total + x if same else total - x
    return sign, total


def _regroup_product(graph: fx.Graph, root: fx.Node, waits: set[fx.Node]) -> None:
    number, factors = 1.0, []

    def collect(x: Any, top: bool = False) -> None:
        nonlocal number
        if not isinstance(x, fx.Node):
            number *= x
        elif x.kwargs or not (top or len(x.users) == 1):
            factors.append(x)
        elif x.target in _products:
            for part in x.args:
                collect(part)
        elif x.target in _quotients and not isinstance(x.args[1], fx.Node):
            collect(x.args[0])
            number /= x.args[1]  # type: ignore[operator]
        else:
            factors.append(x)

    collect(root, top=True)
    factors.sort(key=_size)
    ready, late = ([x for x in factors if (x in waits) == is_late] for is_late in (False, True))
    scaled = number != 1.0
    smaller = scaled and bool(late) and shape_of(late[0]) != shape_of(root)
    if len(ready) + scaled < 2 and not smaller:
        return
    with graph.inserting_before(root):
        if scaled:
            group = ready or late
            group[0] = add(graph, aten.mul.Tensor, group[0], number)
        groups = [_multiplied(graph, part) for part in (late, ready) if part]
        root.replace_all_uses_with(_multiplied(graph, sorted(groups, key=_size)))


def _size(x: Any) -> int:
    return math.prod(shape_of(x))


def _multiplied(graph: fx.Graph, factors: list[fx.Node]) -> fx.Node:
    total = factors[0]
    for x in factors[1:]:
        total = add(graph, aten.mul.Tensor, total, x)
    return total

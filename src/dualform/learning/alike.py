"""Is a function of tokens the same however many there are? Two of its traces are laid side by side.

x / x.shape[0]         takes 16 for 16 tokens and 17 for 17: refused
zeros(len(x), 4)       grows with them: where, is `meta["rows"]` of the node, and `mark` keeps such rows apart
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dualform.graphs.counts import Fork
from dualform.graphs.edit import held_by
from dualform.graphs.hollow import Hollow
from dualform.graphs.kept import is_kept, named
from dualform.graphs.trace import source_line
from dualform.learning.sites import Place, op_name
from dualform.learning.spelling import fitted
from dualform.ops.factories import is_empty
from dualform.ops.table import find_row

aten = torch.ops.aten
# Sizes, which a result's shape shows.
_SIZES = {"size", "shape", "sizes", "repeats"}


class Differs(Exception):
    """Where two traces are of two functions, and in what."""


class Noted(NamedTuple):
    """A node as it was traced, before passes change it."""

    node: fx.Node
    target: Any
    args: dict[str, Any]
    value: Any
    fitted: fx.Node | None = None


class Seen(NamedTuple):
    """A trace at W tokens, and the numbers among its results."""

    W: int
    nodes: list[Noted]
    results: Any = None
    asked: Any = None  # what was asked of W meanwhile


def seen(gm: fx.GraphModule, W: int) -> Seen:
    """Note a trace, and number the calls that are there for any number of tokens."""
    for k, node in enumerate(n for n in gm.graph.nodes if fitted(n) is None):
        node.meta["call"] = k
    return Seen(W, [_noted(gm, node) for node in gm.graph.nodes])


def _noted(gm: fx.GraphModule, node: fx.Node) -> Noted:
    if node.op == "get_attr":
        return Noted(node, node.op, {}, getattr(gm, str(node.target)))
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else map(str, range(len(node.args)))
    rest = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} if schema else {}
    target = node.target if node.op == "call_function" else node.op
    given = {**rest, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return Noted(node, target, given, node.meta.get("val"), fitted(node))


def difference(first: Seen, second: Seen, read: list[Tensor]) -> str:
    """Say where two traces are of two functions, empty if they are of one; mark what grows with the tokens in the
    second. read: takes the tensors that they are of one for the numbers of."""
    try:
        _compare(first, second)
    except Differs as error:
        try:
            _compare(*(_folded(made, read) for made in (first, second)))
        except (Differs, RuntimeError, IndexError):
            return str(error)
    return ""


def _folded(made: Seen, read: list[Tensor]) -> Seen:
    """A trace with what it makes of constants alone as what the function holds: where it keeps a table for so many
    rows, one trace makes it and another finds it."""
    values, one, told = dict[fx.Node, Any](), dict[int, fx.Node](), list[Noted]()
    for n in made.nodes:
        given: list[fx.Node] = []
        args: Any = fx.map_arg(n.args, lambda x, given=given: given.append(x) or one.get(id(values.get(x)), x))
        if n.target == "get_attr" and not n.value.requires_grad:
            values[n.node] = n.value  # found at each use anew
            read.append(n.value)
        elif isinstance(n.target, torch._ops.OpOverload) and all(x in values for x in given):
            if n.target._schema.is_mutable or is_empty(n.target) or torch.Tag.nondeterministic_seeded in n.target.tags:
                raise Differs
            values[n.node] = n.target(**fx.map_arg(args, values.__getitem__))
        if n.node in values:
            one.setdefault(id(values[n.node]), n.node)
            n = n._replace(target="get_attr", args={}, value=values[n.node])
        told.append(n if n.node in values else n._replace(args=args))
    needed: set[fx.Node] = set()
    for n in told:
        fx.map_arg(n.args, needed.add)
    return made._replace(nodes=[n for n in told if n.node not in values or n.node in needed])


def decided(fork: Fork | None, wrong: str, W0: int, W: int) -> str:
    """Say where a function chooses by the number of tokens, and what is otherwise then."""
    first = f"{fork.where}: then " if fork and not wrong.startswith(fork.where) else ""
    return f"{first}{wrong} (for {W0} and {W} tokens)"


def own_tables(gm: fx.GraphModule, read: list[Tensor], W: int) -> None:
    """Let tables that one trace finds be that trace's own: no other has them as inputs."""
    gm.meta["read"] += read
    for value, node in held_by(gm) if read else ():
        if any(value is x for x in read):
            gm.meta["for"] = f"_for_{W}"
            setattr(gm, str(node.target), value.clone())


def _compare(first: Seen, second: Seen) -> None:
    is_one = 1 in (first.W, second.W)
    before = {n.node: n.fitted for n in (*first.nodes, *second.nodes) if is_one and n.fitted is not None}
    ones, others = ([n for n in made.nodes if n.node not in before] for made in (first, second))
    twins: dict[fx.Node, fx.Node] = {}

    def is_same(name: str, x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return twins.get(_behind(x, before)) is _behind(y, before)
        if isinstance(x, list | tuple) and isinstance(y, list | tuple):
            return len(x) == len(y) and all(is_same(name, *pair) for pair in zip(x, y, strict=True))
        return type(x) is type(y) and (x == y or x != x or (name in _SIZES and type(x) is int))

    for a, b in zip(ones, others, strict=False):
        if a.target != b.target:
            raise _differs(f"{_said(b.node)} stands where {_said(a.node)} did", b, a)
        twins[a.node] = b.node
        rows = _rows(a, b, first.W, second.W)
        if rows is not None:
            b.node.meta["rows"] = rows
        if is_kept(a.node) and a.args["key"] != b.args["key"]:
            for pair in zip(_graphs(a), _graphs(b), strict=True):
                _compare(*(seen(gm, made.W) for gm, made in zip(pair, (first, second), strict=True)))
        elif not (getattr(a.target, "_opname", "") == "arange" and rows) and not (
            a.target is aten.slice.Tensor and _is_whole(a) and _is_whole(b)
        ):
            row = find_row(a.target)
            sizes, ways = (row.sizes, row.ways) if row else ((), ())
            for name in (a.args.keys() | b.args.keys()).difference(ways):
                x, y = a.args.get(name), b.args.get(name)
                if not is_same("size" if name in sizes else name, x, y):
                    raise _differs(f"{_said(b.node)} takes {name} = {x}, then {y}", b, a)
    if len(ones) != len(others):
        longer = max(ones, others, key=len)[min(len(ones), len(others)) - 1]
        raise _differs(f"{len(ones)} ops, then {len(others)}", longer)


def _differs(what: str, *places: Noted) -> Differs:
    """Say what differs, by the first line that is known: no line made a result, nor what a function holds."""
    nodes = [p.node for p in places]
    near = (*(y for x in nodes for y in (x, *x.users)), *(y for x in nodes for y in x.all_input_nodes))
    return Differs(f"`{next(filter(None, map(source_line, near)), op_name(nodes[0]))}`: {what}")


def _said(node: fx.Node) -> str:
    return "the result" if node.op == "output" else op_name(node)


def _behind(node: fx.Node, before: dict[fx.Node, fx.Node]) -> fx.Node:
    return _behind(before[node], before) if node in before else node


def _graphs(n: Noted) -> list[fx.GraphModule]:
    made = named(n.args["key"])
    return [made.forward, *(gm for gm in made.backward if gm is not None)]


def _tensors(n: Noted) -> list[Tensor]:
    return [x for x in (n.value if isinstance(n.value, tuple | list) else [n.value]) if isinstance(x, Tensor)]


def _rows(a: Noted, b: Noted, W0: int, W: int) -> Place | None:
    """Which axis of a value grows with the tokens; a tensor that the function holds does not change besides."""
    if len(_tensors(a)) != len(_tensors(b)):
        raise _differs(f"{len(_tensors(a))} pieces, then {len(_tensors(b))}", b)
    for x, y in zip(_tensors(a), _tensors(b), strict=True):
        axes = [k for k, (m, n) in enumerate(zip(x.shape, y.shape, strict=False)) if m != n]
        if x.ndim != y.ndim or len(axes) > 1 or any(x.shape[k] * W != y.shape[k] * W0 for k in axes):
            raise _differs(f"a shape {tuple(x.shape)}, then {tuple(y.shape)}", b)
        if b.target == "get_attr" and x is not y and not _is_equal(x, y, axes):
            raise _differs("a tensor of other numbers", b)
        if axes:
            return Place(axes[0], 1, y.shape[axes[0]] // W)
    return None


def _is_equal(x: Tensor, y: Tensor, grown: list[int]) -> bool:
    """Are two tensors of the same numbers; of the same first row, where one has more rows?"""
    told = not any(isinstance(t, Hollow) or t.is_meta or hasattr(t, "fake_mode") for t in (x, y))
    x, y = (t.narrow(grown[0], 0, 1) if grown else t for t in (x, y))
    return told and x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def _is_whole(n: Noted) -> bool:
    """Does a slice leave nothing out?"""
    size = n.args["self"].meta["val"].shape[n.args.get("dim", 0)]
    return len(range(*slice(n.args.get("start"), n.args.get("end"), n.args.get("step")).indices(size))) == size

"""A trace in known ops: spelt out in ops with a row, writes as slices, nothing that cannot be mapped over rows."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from dualform.graphs.definitions import definition_of
from dualform.graphs.edit import add, inputs_of, output_of
from dualform.graphs.kept import is_kept, named
from dualform.graphs.recorder import below_dispatch
from dualform.graphs.trace import source_line, trace
from dualform.ops.pointwise import is_structured
from dualform.ops.table import definitions, find_row
from dualform.shapes import TraceError

aten = torch.ops.aten


class DerivationError(ValueError):
    """A learner, objective or rule for which the asked form does not exist."""


def op_name(node: fx.Node) -> str:
    if is_kept(node):
        return named(str(node.args[1])).name
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def spell(graph: fx.GraphModule, who: str) -> None:
    """Spell out and number the nodes of a trace."""
    spell_out(graph)
    for node in list(graph.graph.nodes):
        if node.target == aten.select_scatter.default:
            _as_slice_scatter(graph.graph, node)
        elif node.target == aten.slice_scatter.default:
            _inside(node)
        elif node.target == aten.embedding.default and len(node.args) > 2:
            _without_padding(graph.graph, node)
        elif node.target == aten.pad.default and "circular" in node.args:
            _in_circles(graph.graph, node)
    _number(graph.graph)
    for node in graph.graph.nodes:
        if node.all_input_nodes and not _has_rule_for_rows(node.target):
            raise DerivationError(
                f"derive: the {who} uses {op_name(node)} at {source_line(node) or 'a line inside torch'}, which torch "
                "cannot map over rows (batch and heads); expected ops with a vmap rule. Write that line with other "
                "ops."
            )


class Ordinal(NamedTuple):
    """Which node of a trace it is, however many tokens there are: a call of the user's by its number, what a call is
    spelt out in by what it is made of. numbers: what else it is given."""

    key: int
    inputs: tuple[tuple[int, bool], ...]  # keys, and is each a call's
    numbers: tuple[Any, ...]


def _number(graph: fx.Graph) -> None:
    """Say of each node which one it is. Torch leaves out, for one token, what fits sizes to others."""
    said: Counter[Any] = Counter()
    for node in graph.nodes:
        behind = [_behind(x) for x in node.all_input_nodes]
        inputs = tuple((x.meta["ordinal"].key, x.op != "call_function" or "call" in x.meta) for x in behind)
        name = str(node.target) if node.op == "call_function" else node.op
        key = (name, node.meta.get("call", inputs))
        said[key] += 1
        row = find_row(node.target)
        args = (op_name(node), node.args[2:]) if is_kept(node) else node.args  # its key is of the sizes in it, too
        leaves = [] if row is not None and row.ways else pytree.tree_leaves((args, node.kwargs))
        numbers = tuple(x if type(x) is int else repr(x) for x in leaves if not isinstance(x, fx.Node))
        node.meta["ordinal"] = Ordinal(hash((key, said[key])), inputs, numbers if node.op == "call_function" else ())


def _behind(node: fx.Node) -> fx.Node:
    source = fitted(node)
    return node if source is None else _behind(source)


def fitted(node: fx.Node) -> fx.Node | None:
    """What an op fits to other sizes: torch writes it only where they differ or are not 1, and one token has size 1."""
    if node.target is operator.getitem:
        made, place = cast("tuple[Any, int]", node.args)
        return made.args[0][place] if made.target is aten.broadcast_tensors.default else None
    row, is_contiguous = find_row(node.target), node.target is aten.contiguous.default
    is_reshape = row is not None and row.ordered and row.odd
    fits = is_reshape or is_contiguous or node.target in (aten.expand.default, aten.sum_to_size.default)
    return node.all_input_nodes[0] if fits else None


def twins(many: fx.Graph, one: fx.Graph, W: int) -> dict[fx.Node, fx.Node]:
    """Match nodes of two traces of a learner where they are certainly alike; rewritten ones for their originals."""
    nodes, others = map(_by_key, (many, one))
    found: dict[fx.Node, fx.Node] = {}
    wrong: set[int] = set()

    def are_one(x: tuple[int, bool], y: tuple[int, bool]) -> bool:
        """Are two inputs twins, or are both of what a call is spelt out in, otherwise for one token?"""
        is_part = not (x[1] or y[1] or x[0] in others or y[0] in nodes)
        return (x[0] == y[0] and x[0] not in wrong) or is_part

    def are_alike(n: Ordinal, m: Ordinal) -> bool:
        if [len(n.inputs), len(n.numbers)] != [len(m.inputs), len(m.numbers)]:
            return False
        numbers = zip(n.numbers, m.numbers, strict=True)
        return all(map(are_one, n.inputs, m.inputs)) and all(
            x == y or (isinstance(x, int) and isinstance(y, int) and x == W * y) for x, y in numbers
        )

    for key, own in nodes.items():
        there = others.get(key, [])
        if there and are_alike(own[-1].meta["ordinal"], there[-1].meta["ordinal"]):
            last = -1 if len(own) != len(there) else 0
            found |= zip(own[last:], there[last:], strict=True)
        else:
            wrong.add(key)
    for n in many.nodes:
        source = fitted(n)
        if n not in found and source in found:  # one token has that size already
            found[n] = found[source]
    return found


def _by_key(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if (ordinal := node.meta.get("ordinal")) is not None:
            found.setdefault(ordinal.key, []).append(node)
    return found


def _as_slice_scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Write a slice of width 1: vmap over select_scatter has a wrong derivative by its source (torch 2.13)."""
    base, source, dim, index = node.args
    index %= base.meta["val"].shape[dim]  # type: ignore[operator, union-attr, index]
    with graph.inserting_before(node):
        thick = _made(graph, node, aten.unsqueeze.default, source, dim)
    node.target, node.args = aten.slice_scatter.default, (base, thick, dim, index, index + 1)


def _inside(node: fx.Node) -> None:
    """Write where a slice ends, not that it goes on for ever, which vmap takes for a size."""
    base, source, *rest = node.args
    dim, start, end, step = (*rest, *(0, None, None, 1)[len(rest) :])
    span = range(*slice(start, end, step).indices(base.meta["val"].shape[dim]))  # type: ignore[union-attr, misc, index]
    node.args = (base, source, dim, span.start, span.stop, step)


def _in_circles(graph: fx.Graph, node: fx.Node) -> None:
    """Write a circular pad as slices side by side: torch's own copies into an empty tensor, which vmap loops over."""
    made, pads, *_ = node.args
    with graph.inserting_before(node):
        for k, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True)):  # type: ignore[index]
            value = made.meta["val"]  # type: ignore[union-attr]
            dim, size = value.ndim - 1 - k, value.shape[value.ndim - 1 - k]
            low, high = max(-left, 0), size - max(-right, 0)  # what is cut off is not come back to
            spans = [(high - left, high)] * (left > 0) + [(low, high)] + [(low, low + right)] * (right > 0)
            made = [_made(graph, node, aten.slice.Tensor, made, dim, *span) for span in spans]
            made = _made(graph, node, aten.cat.default, made, dim)
    node.replace_all_uses_with(made)  # type: ignore[arg-type]
    graph.erase_node(node)


def _without_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Write what padding means, a row of the table that is read and does not learn, as a detach."""
    padding, users = node.args[2], list(node.users)
    node.args = node.args[:2]
    if padding < 0:  # type: ignore[operator]
        return
    made: Any = node
    with graph.inserting_before(node.next):
        still = _made(graph, node, aten.detach.default, node)
        is_padding = _made(
            graph, node, aten.unsqueeze.default, _made(graph, node, aten.eq.Scalar, node.args[1], padding), -1
        )
        made = _made(graph, node, aten.where.self, is_padding, still, node)
    for user in users:
        user.replace_input_with(node, made)


def _made(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert a call at the line of another."""
    node = add(graph, target, *args)
    node.meta = {**like.meta, "val": node.meta["val"]}
    return node


def _has_rule_for_rows(target: Any) -> bool:
    """Does torch map an op over rows by a rule, not by a loop over them?"""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target in definitions("mapped"):
        return True
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(
        has(target.name(), key)
        for key in ("FuncTorchBatched", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    )


def spell_out(graph: fx.GraphModule) -> None:
    """Replace ops that the table has no row for by their own definition in ops that it has, where torch gives one."""
    pending = [node for node in graph.graph.nodes if has_no_row(node)]
    while pending:
        node = pending.pop()
        definition = _definition(node)
        if definition is None:
            continue
        sources = list(node.all_input_nodes)
        try:
            part = trace(definition, *(s.meta["val"] for s in sources))
        except TraceError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            raise DerivationError(
                f"derive: {op_name(node)} at {source_line(node)} has no definition for {error.__cause__}; expected a "
                "form of it that is in the table of ops. Write it with other ops."
            ) from error
        if any(_says_nothing(n, node) for n in part.graph.nodes):
            continue
        results: Any = output_of(part.graph).args[0]
        results = results.args if _is_named_tuple(results) else results
        if not isinstance(results, fx.Node) and any(user.args[1] >= len(results) for user in node.users):
            continue  # of some of its results alone
        copies: dict[fx.Node, fx.Node] = dict(zip(inputs_of(part.graph), sources, strict=True))
        with graph.graph.inserting_before(node):
            for inner in part.graph.nodes:
                if inner.op == "call_function" and not _is_named_tuple(inner):
                    copies[inner] = graph.graph.node_copy(inner, copies.__getitem__)
                    copies[inner].meta |= {"stack_trace": node.meta.get("stack_trace") or node.stack_trace}
                    if has_no_row(inner):
                        pending.append(copies[inner])
        _stand_for(graph.graph, node, fx.map_arg(results, copies.__getitem__))


def _says_nothing(part: fx.Node, whole: fx.Node) -> bool:
    """Does a definition close over tensors, go below the ops that have rows, or need the op itself?"""
    return part.op == "get_attr" or str(part.target).startswith("prims.") or part.target == whole.target


def _is_named_tuple(x: Any) -> bool:
    """Is it a call that only gives names to several results?"""
    return isinstance(x, fx.Node) and isinstance(x.target, type) and issubclass(x.target, tuple)


def _stand_for(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    """Put what a definition returns, one value or several, in the place of a node."""
    if isinstance(results, fx.Node):
        results.meta |= {"rows": node.meta["rows"]} if "rows" in node.meta else {}
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def has_no_row(node: fx.Node) -> bool:
    """Has the op no structure of its own? One of several results has none that is known before it is looked at."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_complex():  # made of constants: the tracer leaves no others
        return False
    # An op of no tensors has none to have.
    is_op = isinstance(node.target, torch._ops.OpOverload) and len(node.all_input_nodes) > 0
    return is_op and not is_structured(node.target)


def _definition(node: fx.Node) -> Callable[..., Any] | None:
    written = definition_of(node.target)
    if written is None:
        return None

    def definition(*tensors: Tensor) -> Tensor:
        values = dict(zip(node.all_input_nodes, tensors, strict=True))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        return written(*args, **kwargs)

    if getattr(written, "__self__", None) is not node.target:
        return definition
    return below_dispatch(definition, [s.meta["val"] for s in node.all_input_nodes])

"""Edit a graph: add a node with its value and its line, find what is given, returned, reached, needed, take parts out.

A node's value, `meta["val"]`, is a stand-in of its shape and dtype; its line, `meta["stack_trace"]`, is the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module, _use_lazy_graph_module

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
# What a node that another stands for, or becomes part of, takes from it.
_OF_THE_LINE = ("section", "ordinal")


class Graph(fx.Graph):
    """A graph that searches no arguments for symbolic sizes, which no trace here has: a third of what a node costs."""

    def create_node(
        self, op: str, target: Any, args: Any = None, kwargs: Any = None, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """Add a node where the graph inserts."""
        made = super().create_node(op, target, None, None, name, type_expr)
        if args or kwargs:
            made._update_args_kwargs(tuple(args or ()), kwargs or {})
        return made

    def node_copy(self, node: fx.Node, arg_transform: Callable[[fx.Node], Any] = lambda x: x) -> fx.Node:
        """Copy a node of another graph, its notes included."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), arg_transform)  # type: ignore[misc]
        made = self.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        made.meta.update(node.meta)  # to assign it would look the node up
        return made


def line_of(node: fx.Node) -> str:
    """Return where the user's code made a node, as torch writes it."""
    return node.meta.get("stack_trace") or node.stack_trace or ""


def value_of(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run an op on its arguments' stand-ins."""
    filled, named = fx.map_arg((args, dict(kwargs)), lambda n: n.meta["val"])  # type: ignore[misc]
    return target(*filled, **named)


def applied(node: fx.Node, stand_for: Callable[[fx.Node], Any]) -> Any:
    """Run a node's op on what stands for its arguments."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), stand_for)  # type: ignore[misc]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def add(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call where the graph inserts, with its value."""
    new = graph.call_function(target, args, kwargs)
    new.meta["val"] = value_of(target, args, kwargs)
    return new


def add_plain(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Add a call without a value, to a graph over a real number of rows, whose parts have those of a made-up one."""
    return graph.call_function(target, args)


def add_alike(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call before a node whose value, and notes, it has: another way to the same."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def add_input(graph: fx.Graph, name: str, value: Any = None, after: fx.Node | None = None) -> fx.Node:
    """Add an input after another one, the last if none is named; value: a tensor or a stand-in."""
    given = inputs_of(graph)
    with graph.inserting_after(after or given[-1]) if given else graph.inserting_before(next(iter(graph.nodes), None)):
        new = graph.placeholder(name)
    if value is not None:
        new.meta["val"] = value
    return new


def own_values(gm: fx.GraphModule, shared: Container[int] | None = None) -> None:
    """Give nodes values that nobody else holds; shared: the identities of those that others may hold, else all."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (shared is None or id(value) in shared):
            node.meta["val"] = value.detach()


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of a node's value; that of a number is ()."""
    return tuple(x.meta["val"].shape) if isinstance(x, fx.Node) else ()


def held_by(gm: fx.GraphModule) -> list[tuple[torch.Tensor, fx.Node]]:
    """List the tensors that a graph holds, and their nodes."""
    return [(getattr(gm, str(node.target)), node) for node in gm.graph.find_nodes(op="get_attr")]


def lift(gm: fx.GraphModule, stand_for: Callable[[torch.Tensor, fx.Node], fx.Node]) -> None:
    """Let other nodes, as `stand_for(tensor, node)` gives them, stand for the tensors that a graph holds."""
    for value, node in held_by(gm):
        replace(node, stand_for(value, node))


def broadcasts(user: fx.Node, k: int) -> bool:
    """Can an entry-by-entry op do without the expand of its argument k: has another of them the result's shape?"""
    x: Any = user.args[k]
    if not isinstance(x, fx.Node) or x.target is not aten.expand.default:
        return False
    small: Any = x.args[0]
    rest = [y.meta["val"].shape for y in user.args if isinstance(y, fx.Node) and y is not x]
    return small.meta["val"].ndim == x.meta["val"].ndim and user.meta["val"].shape in rest


def emitter(graph: fx.Graph, at: fx.Node) -> Emit:
    """Return what adds calls before a node, each with its value and that node's line."""

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with graph.inserting_before(at):
            new = add(graph, target, *args, **kwargs)
        _take_line(new, at)
        return new

    return emit


def _take_line(new: fx.Node, at: fx.Node) -> None:
    new.meta |= {name: at.meta[name] for name in _OF_THE_LINE if name in at.meta}
    new.meta["stack_trace"] = line_of(at)


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    """List a graph's inputs in order."""
    return list(graph.find_nodes(op="placeholder"))


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the node that says what a graph returns."""
    (output,) = graph.find_nodes(op="output")
    return output


def results_of(graph: fx.Graph) -> list[Any]:
    """List what a graph returns, a single result too."""
    found: Any = output_of(graph).args[0]
    return list(found) if isinstance(found, list | tuple) else [found]


def nodes_in(values: Any) -> list[fx.Node]:
    """List the nodes among arguments, however nested, repeats included."""
    found: list[fx.Node] = []
    fx.map_arg(values, lambda n: found.append(n))  # type: ignore[arg-type, func-returns-value]
    return found


def reached(graph: fx.Graph, first: Iterable[fx.Node]) -> set[fx.Node]:
    """Collect what depends on some nodes, and these; what a graph returns is no node of it."""
    found = set(first)
    for node in graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def needed(goals: Iterable[Any], beyond: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Collect some nodes and all that they are computed from, nothing beyond some; what is no node is passed over."""
    found: set[fx.Node] = set()
    stack = [x for x in goals if isinstance(x, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in beyond else node.all_input_nodes
    return found


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let another node stand for one, which goes."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph, its nodes' notes included; tensors that it holds are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    output_of(graph).meta = dict(output_of(gm.graph).meta)
    return unwritten(gm, graph)


def inline(graph: fx.Graph, at: fx.Node, part: fx.Graph, given: Sequence[Any]) -> tuple[list[Any], list[fx.Node]]:
    """Write a part out before `at`, of these inputs: return what it returns, and the nodes made, of at's line."""
    copies: dict[fx.Node, Any] = dict(zip(inputs_of(part), given, strict=True))
    before = set(copies)
    with graph.inserting_before(at):
        found: Any = graph.graph_copy(part, copies)
    made = [new for old, new in copies.items() if old not in before]
    for new in made:
        _take_line(new, at)
    return list(found) if isinstance(found, list | tuple) else [found], made


def extract(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], finish: Callable[[fx.Graph, dict], Any]) -> fx.Graph:
    """Copy nodes, in order, into a graph of their own; finish(graph, copies by their originals): what it returns."""
    graph, made = Graph(), {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(finish(graph, made))
    return graph


def frozen(x: Any) -> Any:
    """Make a hashable twin of an argument; 1, 1.0 and True are three."""
    if isinstance(x, fx.Node):
        return x
    if isinstance(x, list | tuple):
        return (type(x).__name__, *map(frozen, x))
    if isinstance(x, dict):
        return tuple((name, frozen(v)) for name, v in sorted(x.items()))
    return type(x), str(x) if isinstance(x, float | slice) else x


def call_key(target: Any, args: Any, kwargs: Any) -> Any:
    """Return what equal calls have in common."""
    return target, frozen(args), frozen(kwargs)


def writes(node: fx.Node) -> bool:
    """Does an op write to one of its arguments?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def without_repeats(graph: fx.Graph) -> fx.Graph:
    """Keep one of equal nodes; what is random or writes is never equal to another."""
    kept: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or writes(node) or _is_random(node.target):
            continue
        first = kept.setdefault(call_key(node.target, node.args, node.kwargs), node)
        if first is not node:
            replace(node, first)
    return graph


@cache
def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) or "empty" in str(target)


def cleaned(gm: fx.GraphModule) -> fx.GraphModule:
    """A changed graph without dead nodes, whose code is that of its nodes."""
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def unwritten(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module whose Python code is written when it is first run or read: most never are."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def written(gm: fx.GraphModule) -> Callable[..., Any]:
    """A changed graph as a function that runs often: its code is written now, and no call asks whether it is."""
    gm.recompile()
    _LazyGraphModule.force_recompile(gm)
    return gm.forward


def stepped(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph as a function that goes from node to node: for a single call, less than to write and compile its code."""

    def run(*given: Any) -> Any:
        values = evaluated(gm, given)
        return fx.map_arg(output_of(gm.graph).args[0], values.__getitem__)

    return run


def evaluated(
    gm: fx.GraphModule, given: Iterable[Any], call: Callable[[fx.Node, Any, Any], Any] | None = None
) -> dict[fx.Node, Any]:
    """Run a graph from node to node and return the value of each; `call` runs an op on arguments, if not as it is."""
    rest, at = iter(given), dict[fx.Node, Any]()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            at[node] = next(rest)
        elif node.op == "get_attr":
            at[node] = getattr(gm, str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
            at[node] = node.target(*args, **kwargs) if call is None else call(node, args, kwargs)
    return at


def without_dead(graph: fx.Graph) -> fx.Graph:
    """Erase what nothing reads and what writes nothing. (fx asks each op for effects, at ten times the price.)"""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not writes(node):
            graph.erase_node(node)
    return graph


def only_outputs(gm: fx.GraphModule, keep: slice) -> fx.GraphModule:
    """Copy a graph with some of its outputs and without what the others needed."""
    graph = Graph()
    values: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(gm.graph, values)
    graph.output(list(outputs)[keep])  # type: ignore[call-overload]
    without_dead(graph)
    return unwritten(gm, graph)

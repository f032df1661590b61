"""Graphs as functions, and what is done to any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module


def unwritten(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module whose Python code is written when it is first run or read: most never are."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def stepped(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph as a function that goes from node to node: for a single call, less than to write and compile its code."""

    def run(*given: Any) -> Any:
        rest, at = iter(given), dict[fx.Node, Any]()
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                at[node] = next(rest)
            elif node.op == "get_attr":
                at[node] = getattr(gm, str(node.target))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
                if node.op == "output":
                    return args[0]
                at[node] = node.target(*args, **kwargs)

    return run


def without_dead(graph: fx.Graph) -> fx.Graph:
    """Erase what nothing reads and what writes nothing. (fx asks of each op whether it has effects, at ten times the price.)"""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not writes(node):
            graph.erase_node(node)
    return graph


def writes(node: fx.Node) -> bool:
    """Is it an op in place?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

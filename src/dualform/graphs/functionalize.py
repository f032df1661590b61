"""Rewrite in-place ops of a traced graph as functional ones; what a write changes is every view of the same memory.

base[view] <- value      becomes      base' = scatter(base, value at view), and later reads of other views are taken anew
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx

from dualform.graphs.edit import add, line_of, unwritten, writes
from dualform.graphs.hollow import Hollow
from dualform.graphs.kept import carried
from dualform.graphs.recorder import twin_of
from dualform.ops.table import find_row

aten = torch.ops.aten
Blame = Callable[[fx.Node, str, str], NoReturn]


def functionalized(gm: fx.GraphModule, blame: Blame) -> fx.GraphModule:
    """Rewrite a graph without in-place ops, grad-mode switches and dead nodes; `blame` reports what cannot be rewritten."""
    if not any(writes(n) for n in gm.graph.nodes) and not any(_switch(n) is not None for n in gm.graph.nodes):
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm
    return _Rewriter(gm, blame).run()


def _switch(node: fx.Node) -> bool | None:
    """True or False if the node turns gradients on or off."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
        return bool(node.args[0])
    return None


class _Rewriter:
    """One pass in order; `value[n]` is the new node that holds what the old node n means now."""

    def __init__(self, gm: fx.GraphModule, blame: Blame) -> None:
        self.gm = gm
        self.blame = blame
        self.graph = fx.Graph()
        self.value: dict[fx.Node, fx.Node] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()
        self.grad = True

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            switch = _switch(node)
            if switch is not None:
                self.grad = switch
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.read))
            elif writes(node):
                self.write(node)
            else:
                self.copy(node)
                if not self.grad and isinstance(node.meta.get("val"), torch.Tensor):
                    self.value[node] = self.emit(aten.detach.default, (self.value[node],), node)
        result = unwritten(self.gm, self.graph)
        result.graph.eliminate_dead_code()
        result.recompile()
        return result

    def emit(self, target: Any, args: tuple, like: fx.Node, kwargs: dict | None = None) -> fx.Node:
        new = add(self.graph, target, *args, **kwargs or {})
        new.meta["stack_trace"] = line_of(like)
        return new

    def copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self.read)
        self.value[node] = new
        if node.op != "call_function":
            return
        source = _viewed(node)
        if source is not None:
            self.parent[node] = source

    def read(self, node: fx.Node) -> fx.Node:
        """The node's present value; a view of rewritten memory is taken again."""
        if node in self.stale:
            self.stale.discard(node)
            behind = self.read(self.parent[node])
            self.value[node] = behind if writes(node) else self.graph.node_copy(node, self.read)
        return self.value[node]

    def write(self, node: fx.Node) -> None:
        """Replace `target_(dst, ...)` by its functional twin and put the result back through the views of dst."""
        dst = node.args[0]
        if not isinstance(dst, fx.Node) or sum(a.is_write for a in _alias_infos(node)) != 1 or "out" in node.kwargs:
            self.blame(node, "writes to several tensors", "Write it without out= arguments or running statistics.")
        root = dst
        while root in self.parent:
            root = self.parent[root]
        if root.op in ("placeholder", "get_attr"):
            self.blame(node, "writes to an input or a buffer", "Clone it first, or return the new value.")
        before = self.value[root]
        self.assign(dst, self.functional(node), node)
        if not self.grad and before.meta["val"].is_floating_point():  # another value, the gradient that it had
            self.spoil(root)
            self.stale.discard(root)
            self.value[root] = self.emit(*carried(before, self.value[root]), node)
        self.value[node] = self.read(dst)
        self.parent[node] = dst

    def functional(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        first: Any = node.args[0]
        packet = target._schema.name.split("::")[1]
        if packet == "detach_":
            return self.emit(aten.detach.default, (self.read(first),), node)
        if packet == "copy_":  # whose functional twin torch cannot differentiate
            return self.fitted(self.read(node.args[1]), first.meta["val"], node)  # type: ignore[arg-type]
        twin = twin_of(target)
        if twin is None:
            self.blame(node, "changes a tensor in place in a way that has no functional twin", "Write y = op(x).")
        args = fx.map_arg(node.args, self.read)
        kwargs = fx.map_arg(node.kwargs, self.read)
        new, like = self.emit(twin, args, node, kwargs), node.meta["val"]
        return self.cast(new, like.dtype, node)

    def cast(self, new: fx.Node, dtype: torch.dtype, node: fx.Node) -> fx.Node:
        same = new.meta["val"].dtype == dtype
        return new if same else self.emit(aten._to_copy.default, (new,), node, {"dtype": dtype})

    def fitted(self, new: fx.Node, like: torch.Tensor, node: fx.Node) -> fx.Node:
        """A value in the shape and dtype of what it is written to."""
        new = self.cast(new, like.dtype, node)
        same = new.meta["val"].shape == like.shape
        return new if same else self.emit(aten.expand.default, (new, list(like.shape)), node)

    def assign(self, dst: fx.Node, new: fx.Node, node: fx.Node) -> None:
        """dst now means `new`: so do its base, through the inverse of the view, and all other views of that base."""
        if dst in self.parent:
            self.assign(self.parent[dst], self.put_back(dst, new, node), node)
        for view, base in self.parent.items():
            if base is dst:
                self.spoil(view)
        self.stale.discard(dst)
        self.value[dst] = new

    def spoil(self, view: fx.Node) -> None:
        self.stale.add(view)
        for other, base in self.parent.items():
            if base is view:
                self.spoil(other)

    def put_back(self, view: fx.Node, new: fx.Node, node: fx.Node) -> fx.Node:
        base = self.read(self.parent[view])
        if writes(view):
            return new
        row = find_row(view.target)
        rule = carried if view.target is aten.detach.default else row and row.put
        if rule is None and _layout(view) == _layout(self.parent[view]):  # as `to` gives what it was given
            return new
        if rule is None:
            self.blame(node, f"writes through {view.target}", "Build the tensor with torch.where or torch.cat.")
        target, args = rule(base, new, *view.args[1:], *view.kwargs.values())
        return self.emit(target, args, node)


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a node's results lie in: reshape may copy, and einsum may not."""
    if node.meta.get("hooks"):  # a hook is a node behind its tensor: it sees what is written to the memory of that
        behind: Any = node.args[0]
        return behind[0] if _viewed(behind[0]) is not None else None
    if node.target is operator.getitem and _viewed(node.args[0]) is None:  # type: ignore[arg-type]
        return None
    if str(node.target).startswith(
        "aten.unsafe_"
    ):  # whose pieces are written to only where nobody reads the whole any more
        return None
    own = _memory(node)
    return next((x for x in node.all_input_nodes if own & _memory(x)), None)


def _memory(node: fx.Node) -> set[int]:
    made = node.meta.get("val")
    parts = made if isinstance(made, tuple | list) else (made,)
    tensors = [x.shape_of if isinstance(x, Hollow) else x for x in parts if isinstance(x, torch.Tensor)]
    return {x.untyped_storage()._cdata for x in tensors if x.layout == torch.strided}


def _layout(node: fx.Node) -> Any:
    x = node.meta.get("val")
    return (x.shape, x.stride(), x.storage_offset(), x.dtype) if isinstance(x, torch.Tensor) else None


def _alias_infos(node: fx.Node) -> list[Any]:
    return [a.alias_info for a in node.target._schema.arguments if a.alias_info is not None]  # type: ignore[union-attr]

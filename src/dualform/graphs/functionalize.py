"""Rewrite in-place ops of a traced graph as functional ones; what a write changes is every view of the same memory.

base[view] <- value   becomes   base' = scatter(base, value at view); later reads of other views are taken anew
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx

from dualform.graphs.edit import add, cleaned, line_of, unwritten, writes
from dualform.graphs.hollow import laid_out_as
from dualform.graphs.kept import carried
from dualform.graphs.recorder import twin_of
from dualform.ops.table import inverse, row_of
from dualform.storages import memory_of

aten = torch.ops.aten
IN_TRAINING = "Where training mode does it, as BatchNorm and spectral_norm do, call .eval()."
OWN_WRITES = f"Clone it first, or return the new value. {IN_TRAINING}"
Blame = Callable[[fx.Node, str, str], NoReturn]

_HALVES = (aten.real.default, aten.imag.default)
_PAIRS: dict[Any, Any] = {
    aten.view_as_real.default: aten.view_as_complex.default,
    aten.view_as_complex.default: aten.view_as_real.default,
}


def functionalized(gm: fx.GraphModule, blame: Blame) -> fx.GraphModule:
    """Rewrite a graph without in-place ops, grad-mode switches and dead nodes; `blame` reports what cannot be."""
    if not any(writes(n) or _switch(n) is not None for n in gm.graph.nodes):
        return cleaned(gm)
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
        return cleaned(unwritten(self.gm, self.graph))

    def emit(self, target: Any, args: tuple, like: fx.Node, kwargs: dict | None = None) -> fx.Node:
        new = add(self.graph, target, *args, **kwargs or {})
        new.meta["stack_trace"] = line_of(like)
        return new

    def copy(self, node: fx.Node) -> None:
        self.value[node] = self.again(node)
        if node.op != "call_function":
            return
        source = _viewed(node)
        if source is not None and node.target is operator.getitem:  # a piece of what was cut up
            source = self.parent.get(source)
        if source is not None:
            self.parent[node] = source

    def read(self, node: fx.Node) -> fx.Node:
        """The node's present value; a view of rewritten memory is taken again."""
        if node in self.stale:
            self.stale.discard(node)
            behind = self.read(self.parent[node])
            self.value[node] = behind if writes(node) else self.again(node)
        return self.value[node]

    def again(self, node: fx.Node) -> fx.Node:
        """Copy a node; what counts steps in memory is what it sees there, which later values need not keep."""
        base: Any = node.args[0] if node.target is aten.as_strided.default else None
        at = base and _Places.of(*(laid_out_as(n.meta["val"]) for n in (base, node)))
        return self.taken(self.read(base), at, node) if at else self.graph.node_copy(node, self.read)

    def write(self, node: fx.Node) -> None:
        """Replace `target_(dst, ...)` by its functional twin and put the result back through the views of dst."""
        dst = node.args[0]
        target: Any = node.target
        written = [a for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not isinstance(dst, fx.Node) or len(written) != 1 or "out" in node.kwargs:
            self.blame(
                node,
                "writes to several tensors",
                f"Write it without out= arguments or running statistics. {IN_TRAINING}",
            )
        root = dst
        while root in self.parent:
            root = self.parent[root]
        if root.op in ("placeholder", "get_attr"):
            self.blame(node, "writes to an input or a buffer", OWN_WRITES)
        if self.is_lent(root):
            self.blame(node, "writes to memory of numpy's", "Copy it first: torch.tensor(array), or x.clone().")
        before = self.value[root]
        self.assign(dst, self.functional(node), node)
        if not self.grad and before.meta["val"].is_floating_point():  # another value, the gradient that it had
            self.spoil(root)
            self.stale.discard(root)
            self.value[root] = self.emit(*carried(before, self.value[root]), node)
        self.value[node] = self.read(dst)
        self.parent[node] = dst

    def is_lent(self, root: fx.Node) -> bool:
        """Is it in memory that is not torch's, as from_numpy makes it, where others see what no graph knows of?"""
        source: Any = root.args[0] if root.target is aten.lift_fresh_copy.default else None
        held: Any = getattr(self.gm, source.target) if source is not None and source.op == "get_attr" else None
        is_plain = type(held) is torch.Tensor and held.layout == torch.strided and held.device.type == "cpu"
        return is_plain and not held.untyped_storage().resizable()

    def functional(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        first: Any = node.args[0]
        if target._opname == "detach_":
            return self.emit(aten.detach.default, (self.read(first),), node)
        if target._opname == "copy_":  # whose functional twin torch cannot differentiate
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
        rule = carried if view.target is aten.detach.default else row_of(view.target).put
        if rule is None and _layout(view) == _layout(self.parent[view]):  # as `to` gives what it was given
            return new
        if rule is not None:
            return self.emit(*rule(base, new, *view.args[1:], *view.kwargs.values()), node)
        if view.target in _PAIRS:
            return self.emit(_PAIRS[view.target], (new,), node)
        if view.target in _HALVES:
            halves = [new if half is view.target else self.emit(half, (base,), node) for half in _HALVES]
            return self.emit(aten.complex.default, tuple(halves), node)
        found = _Places.of(*(laid_out_as(n.meta["val"]) for n in (self.parent[view], view)))
        if found is None:
            self.blame(node, f"writes through {view.target}", "Build the tensor with torch.where or torch.cat.")
        return self.placed(base, new, found, node)

    def placed(self, base: fx.Node, new: fx.Node, at: _Places, node: fx.Node) -> fx.Node:
        """Put a value where a view has it: axes that both have to the front, the others are one."""
        value = self.laid(new, at.of_view, at, node)
        if len(at.places) < math.prod(at.shape[at.shared :]):
            rows = self.laid(base, at.of_base, at, node)
            value = self.emit(aten.slice_scatter.default, (rows, value, *at.span), node)
        back = self.emit(aten.reshape.default, (value, at.shape), node)
        return self.emit(aten.permute.default, (back, inverse(at.of_base)), node)

    def taken(self, base: fx.Node, at: _Places, node: fx.Node) -> fx.Node:
        """Take what a view sees of its base."""
        part = self.emit(aten.slice.Tensor, (self.laid(base, at.of_base, at, node), *at.span), node)
        shape = node.meta["val"].shape
        part = self.emit(aten.reshape.default, (part, [shape[j] for j in at.of_view]), node)
        return self.emit(aten.permute.default, (part, inverse(at.of_view)), node)

    def laid(self, x: fx.Node, order: list[int], at: _Places, node: fx.Node) -> fx.Node:
        x = self.emit(aten.permute.default, (x, order), node)
        return self.emit(aten.reshape.default, (x, [*at.shape[: at.shared], -1]), node)


class _Places(NamedTuple):
    """Where a view lies in its base: the axes that they share, in an order for each, and even places in the rest."""

    of_base: list[int]
    of_view: list[int]
    shared: int
    shape: list[int]  # the base's, in that order
    places: list[int]

    @property
    def span(self) -> tuple[int, int, int, int]:
        """The axis of the rest, and the slice of it."""
        first, last = self.places[0], self.places[-1]
        return self.shared, first, last + 1, max(1, (last - first) // max(1, len(self.places) - 1))

    @staticmethod
    def of(base: torch.Tensor, view: torch.Tensor) -> _Places | None:
        """None where they do not lie so."""
        own = {(n, s): j for j, (n, s) in enumerate(zip(view.shape, view.stride(), strict=True)) if n > 1}
        axes = list(enumerate(zip(base.shape, base.stride(), strict=True)))
        same = {k: own[a] for k, a in axes if a in own}
        rest = sorted((k for k, _ in axes if k not in same), key=lambda k: (-base.stride(k), -base.shape[k]))
        others = [j for j in range(view.ndim) if j not in same.values()]
        unit = base.stride(rest[-1]) if rest else 1
        dense = all(
            base.stride(k) == unit * math.prod(base.shape[m] for m in rest[n + 1 :]) for n, k in enumerate(rest)
        )
        at = [view.storage_offset() - base.storage_offset()]
        for j in others:
            at = [p + n * view.stride(j) for p in at for n in range(view.shape[j])]
        steps = {b - a for a, b in itertools.pairwise(at)}
        size = unit * math.prod(base.shape[k] for k in rest)
        even = bool(at) and len(steps) < 2 and min(steps, default=1) >= 1
        if not dense or not even or any(p % unit or not 0 <= p < size for p in at):
            return None
        shape = [base.shape[k] for k in (*same, *rest)]
        return _Places([*same, *rest], [*same.values(), *others], len(same), shape, [p // unit for p in at])


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a node's results lie in: reshape may copy, and einsum may not."""
    if node.meta.get("hooks"):  # a hook is a node behind its tensor: it sees what is written to the memory of that
        behind: Any = node.args[0]
        return behind[0] if _viewed(behind[0]) is not None else None
    if node.target is operator.getitem and _viewed(node.args[0]) is None:  # type: ignore[arg-type]
        return None
    if str(node.target).startswith("aten.unsafe_"):  # its pieces are written to where nobody reads the whole any more
        return None
    own = _memory(node)
    return next((x for x in node.all_input_nodes if own & _memory(x)), None)


def _memory(node: fx.Node) -> set[int]:
    made = node.meta.get("val")
    parts = made if isinstance(made, tuple | list) else (made,)
    tensors = [laid_out_as(x) for x in parts if isinstance(x, torch.Tensor)]
    return {memory_of(x) for x in tensors if x.layout == torch.strided}


def _layout(node: fx.Node) -> Any:
    x = node.meta.get("val")
    return (x.shape, x.stride(), x.storage_offset(), x.dtype) if isinstance(x, torch.Tensor) else None

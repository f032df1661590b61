"""From a graph of one mini-batch to statements over buffers: what is fused, in which order, what lives how long."""

from __future__ import annotations

import itertools
import math
import operator
from bisect import insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dualform.graphs.edit import inputs_of, results_of
from dualform.graphs.verify import is_on
from dualform.kernels import memory
from dualform.kernels.ops import Unsupported
from dualform.kernels.soundness import verify
from dualform.kernels.statements import (
    Buffer,
    Item,
    MatrixProduct,
    Nest,
    Read,
    Schedule,
    View,
    entrywise,
    space_of,
    whole,
)
from dualform.ops.table import find_row

aten = torch.ops.aten
_NO_COPY: dict[Any, Any] = dict.fromkeys((aten.reshape.default, aten._unsafe_view.default), aten.view.default)


def schedule(
    gm: fx.GraphModule, align: int, places: Sequence[str], names: Sequence[str], over: Mapping[int, int],
    beside: bool = False, stay: Mapping[int, str] | None = None,
) -> Schedule:  # fmt: skip
    """Turn a graph into statements.

    places: where each input is held; "scratch" if it may be written over. over: outputs that had better be written over
    an input; beside: or where the next mini-batch has it. stay: outputs that stay with the mini-batch, and where.
    """
    return _Scheduler(gm, align, places, names).run(over, beside, stay or {})


class _Scheduler:
    def __init__(self, gm: fx.GraphModule, align: int, places: Sequence[str], names: Sequence[str]) -> None:
        self.gm, self.align = gm, align
        self.nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        self.results: list[Any] = results_of(gm.graph)
        self.values: dict[fx.Node, Any] = {}  # View, tuple of Views
        self.inputs: list[Buffer] = []
        for n, place, name in zip(inputs_of(gm.graph), places, names, strict=True):
            buffer = Buffer(name, tuple(n.meta["val"].shape), align, place, n.meta["val"].dtype)
            self.inputs.append(buffer)
            self.values[n] = whole(buffer)
        self.statements: list[Nest | MatrixProduct] = []
        self.copies: list[Nest] = []  # each value of them to a place of its own
        self.nest: Nest | None = None
        self.own: dict[Buffer, Item] = {}  # values of the open nest
        self.added = _sums_of_products(self.nodes, set(self.results))
        self.inside = {p for p, *_ in self.added.values()}

    def run(self, over: Mapping[int, int], beside: bool, stay: Mapping[int, str]) -> Schedule:
        pending = [n for n in self.nodes if n not in self.inside]
        waits = {n: {x for x in self._sources(n) if x not in self.values} for n in pending}
        readers: dict[fx.Node, list[int]] = {}
        for k, n in enumerate(pending):
            for x in waits[n]:
                readers.setdefault(x, []).append(k)
        ready = [k for k, n in enumerate(pending) if not waits[n]]
        while ready:
            at = next((at for at in ready if self._takes(pending[at])), None)
            if at is None:
                assert self.nest is not None, f"no order: {[pending[k] for k in ready]}"
                self._close()
                continue
            ready.remove(at)
            for k in readers.get(pending[at], ()):
                waits[pending[k]].discard(pending[at])
                if not waits[pending[k]]:
                    insort(ready, k)
        assert not any(waits.values()), f"no order: {[n for n in pending if waits[n]]}"
        self._close()
        outputs = [self.values[x] if isinstance(x, fx.Node) else x for x in self.results]
        self._mark_kept(outputs)
        made = Schedule(self.inputs, outputs, self.statements, 0, self.align)
        self._verify(made, "schedule")
        memory.into_pieces(self.statements, self.copies, outputs)
        self._verify(made, "into_pieces")
        for k, place in stay.items():
            memory.stay(outputs[k], place)
        for k, i in over.items():
            if beside:
                memory.write_beside(outputs, k, self.inputs[i])
            else:
                memory.write_over(self.statements, outputs, k, self.inputs[i])
        self._verify(made, "write_over")
        made.scratch = memory.place(self.statements, self.inputs, outputs)
        self._verify(made, "place", ("scratch",))
        return made

    def _verify(self, made: Schedule, name: str, placed: Sequence[str] = ()) -> None:
        if is_on():
            verify(made, self.gm, name, placed)

    def _sources(self, n: fx.Node) -> list[fx.Node]:
        """List what a node reads; a sum that a product is added into reads the product's factors."""
        product = self.added[n][0] if n in self.added else None
        return [*(product.all_input_nodes if product else ()), *(x for x in n.all_input_nodes if x is not product)]

    def _takes(self, n: fx.Node) -> bool:
        """Add a node to what is open, or make a statement of it; False if it must wait until the nest is closed."""
        row = find_row(n.target)
        kind = row.kind if row else ""
        if kind == "view" or n.target is operator.getitem:
            return self._view(n)
        if n in self.added or kind == "product":
            if any(self.values[x].buffer in self.own for x in self._sources(n)):
                return False
            self._product(n)
            return True
        if kind == "pieces":
            if self.nest is not None:
                return False
            self._pieces(n, row)
            return True
        return self._joins(n)

    def _view(self, n: fx.Node) -> bool:
        source = self.values[n.all_input_nodes[0]]
        if n.target is operator.getitem:
            self.values[n] = source[n.args[1]]
            return True
        base = torch.empty(1 << 40, dtype=torch.float32, device="meta")
        x = base.as_strided(source.shape, source.strides, source.offset)
        try:
            target: Any = _NO_COPY.get(n.target, n.target)
            found = target(x, *n.args[1:], **n.kwargs)
        except RuntimeError:  # no view of memory laid out like this
            if self.nest is not None:
                return False
            self._copy(n, source)
            return True

        def view(y: torch.Tensor) -> View:
            return View(source.buffer, tuple(y.shape), tuple(y.stride()), int(y.storage_offset()))

        self.values[n] = tuple(view(y) for y in found) if isinstance(found, list | tuple) else view(found)
        return True

    def _copy(self, n: fx.Node, source: View) -> None:
        """Lay a value out anew, in the order of its entries; a reshape counts them in that order."""
        fresh = Buffer(n.name, source.shape, 1)
        self.statements.append(entrywise("copy", whole(fresh), [source]))
        x = torch.empty(fresh.shape, device="meta").reshape(n.meta["val"].shape)
        self.values[n] = View(fresh, tuple(x.shape), tuple(x.stride()))

    def _product(self, n: fx.Node) -> None:
        product, alpha, beta, init = self.added.get(n, (n, 1.0, 0.0, None))
        A, B = (self.values[x] for x in product.args[:2])  # pyright: ignore[reportArgumentType]: nodes
        shape = tuple(n.meta["val"].shape)
        out = Buffer(n.name, shape, self.align)
        D = None if init is None else self.values[init]
        view = whole(out)
        if len(A.shape) == 1:
            A = View(A.buffer, (1, *A.shape), (0, *A.strides), A.offset)
        if len(B.shape) == 1:
            B = View(B.buffer, (*B.shape, 1), (*B.strides, 0), B.offset)
        full = (*A.shape[:-1], B.shape[-1])
        self.statements.append(MatrixProduct(_reshaped(view, full), A, B, alpha, beta, D and _reshaped(D, full)))
        self.values[n] = view

    def _pieces(self, n: fx.Node, row: Any) -> None:
        out = Buffer(n.name, tuple(n.meta["val"].shape), self.align)
        base, pieces, first = whole(out), list(row.spelt(n, out.shape)), len(self.statements)
        for place, value in pieces:
            x = torch.empty(1 << 40, device="meta").as_strided(base.shape, base.strides, 0)
            y = place(x)
            target = View(out, tuple(y.shape), tuple(y.stride()), int(y.storage_offset()))
            if math.prod(target.shape):
                given = self.values[value] if isinstance(value, fx.Node) else value
                self.statements.append(entrywise("copy", target, [given]))
        if all(isinstance(value, fx.Node) for _, value in pieces):  # else what is put there first would come too late
            self.copies += self.statements[first:]  # pyright: ignore[reportAttributeAccessIssue]: all nests
        self.values[n] = base

    def _joins(self, n: fx.Node) -> bool:
        row = find_row(n.target)
        if row is None or row.kind not in ("map", "reduction"):
            raise Unsupported(n)
        reduction = row.kind == "reduction"
        shape = tuple(n.meta["val"].shape)
        op, arguments, params = row.spelt(n)
        loops = tuple(self.values[arguments[0]].shape) if reduction else shape
        space = space_of(loops)
        own = [x for x in arguments if isinstance(x, fx.Node) and self.values[x].buffer in self.own]
        if self.nest is None:
            self.nest = Nest(space)
        rows = not reduction and space == self.nest.space[:-1] and bool(own) and space != self.nest.space
        if not rows and space != self.nest.space:
            return False
        operands, stage = [], 0
        for x in arguments:
            if not isinstance(x, fx.Node):
                operands.append(x)
                continue
            view = self.values[x]
            steps = view.along(loops)
            item = self.own.get(view.buffer)
            if item is None:
                operands.append(Read(view, steps))
                continue
            wanted = item.steps if item.kind != "row" and item.kind != "reduce" else (*item.steps, *[0] * (not rows))
            if item.kind == "total" or (rows and item.kind == "map") or view.offset or steps != wanted:
                return False
            operands.append(item)
            stage = max(stage, item.stage)
        out = Buffer(n.name, shape, self.align)
        view = whole(out)
        if reduction:
            kept = params.pop("kept")  # for each axis of the operand, its axis in the result
            steps = tuple(0 if kept[a] is None else view.strides[kept[a]] for a, size in enumerate(loops) if size != 1)
            over = [a for a, size in enumerate(loops) if size != 1 and kept[a] is None]
            last = [a for a, size in enumerate(loops) if size != 1][-1:]
            if over == last and len(space) > 0:
                item = Item("reduce", op, operands, params, view, steps[:-1], stage + 1)
            else:
                item = Item("total", op, operands, params, view, steps, stage, kept=True)
        else:
            count = itertools.count()
            axes = tuple(None if size == 1 else next(count) for size in shape)
            item = Item("row" if rows else "map", op, operands, params, view, view.along(shape), stage, axes=axes)
        self.nest.items.append(item)
        self.own[out] = item
        self.values[n] = view
        return True

    def _close(self) -> None:
        if self.nest is not None and self.nest.items:
            self.statements.append(self.nest)
        self.nest, self.own = None, {}

    def _mark_kept(self, outputs: Sequence[View | float]) -> None:
        """Store what something outside its nest reads."""
        read = {v.buffer for s in self.statements for v in s.reads()}
        read |= {x.buffer for x in outputs if isinstance(x, View)}
        for s in self.statements:
            if isinstance(s, Nest):
                for item in s.items:
                    item.kept = item.kept or item.out.buffer in read


def _reshaped(view: View, shape: tuple[int, ...]) -> View:
    if view.shape == shape:
        return view
    steps = iter([s for s, n in zip(view.strides, view.shape, strict=True) if n != 1])
    return View(view.buffer, shape, tuple(next(steps) if n != 1 else 0 for n in shape), view.offset)


def _sums_of_products(
    nodes: Sequence[fx.Node], results: set[Any]
) -> dict[fx.Node, tuple[fx.Node, float, float, fx.Node]]:
    """Find sums that a matrix product may be added into: node -> (product, alpha, beta, the other summand)."""
    found: dict[fx.Node, tuple[fx.Node, float, float, fx.Node]] = {}
    used: set[fx.Node] = set()
    for n in nodes:
        arguments: tuple[Any, ...] = n.args
        if n.target not in (aten.add.Tensor, aten.sub.Tensor) or n.kwargs:
            continue
        if not all(isinstance(x, fx.Node) for x in arguments):
            continue
        x, y = arguments
        sign = -1.0 if n.target == aten.sub.Tensor else 1.0
        for product, other, alpha, beta in ((y, x, sign, 1.0), (x, y, 1.0, sign)):
            if (
                product.target in (aten.mm.default, aten.bmm.default) and len(product.users) == 1
                and product not in results and product not in used and other is not product
                and other.meta["val"].shape == n.meta["val"].shape
            ):  # fmt: skip
                found[n] = (product, alpha, beta, other)
                used.add(product)
                break
    return found

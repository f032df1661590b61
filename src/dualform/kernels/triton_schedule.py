"""Both directions of a step as Triton kernels: a program per row scans its mini-batches, with the state in registers.

    forward    state <- start; per mini-batch: keep the state where asked, then the step
    advance    the same without outputs, each group of mini-batches beside the others: where the reverse starts from
    reverse    from the last mini-batch: the vjp, the state's gradient in registers, sums of what all mini-batches share

What no tile can hold and the next state need not wait for, torch computes for all mini-batches at once: `before` the
kernel what does not wait for the state (coefficients of a rule with several registers, say), `after` it what nothing in
the kernel waits for.

Legend: n mini-batches of one call, G per kept state, P = B H rows; `Input` as in learning/plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from dualform.graphs.edit import extract, inputs_of, needed, only_outputs, results_of, unwritten
from dualform.kernels.lowering import lowered
from dualform.kernels.ops import Unsupported
from dualform.kernels.targets import Target, backward_targets, forward_targets, label, place_of
from dualform.kernels.tiles import (
    DEEP,
    LIMIT,
    Memory,
    Parts,
    Tile,
    Untileable,
    Value,
    axes_in,
    behind,
    padded,
    unsqueezed,
)
from dualform.kernels.triton_kernel import RESERVED, Argument, Crossing, Kernel, Outside, held_in, source
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_order import abreast
from dualform.kernels.triton_text import Writer
from dualform.kernels.triton_walker import Walker
from dualform.learning.backends import BackendError
from dualform.learning.plan import Input

TILE_AHEAD = 2048  # entries of such a tile, at most


class Refused(BackendError):
    """An op that has to be in a kernel and cannot. waits: does the next state wait for it?"""

    def __init__(self, node: fx.Node, why: str, line: str = "", waits: bool = True) -> None:
        where = f" at {line}" if line else ""
        part = "is part of what the next state waits for, and no kernel has it" if waits else "is not generated"
        super().__init__(
            f"triton: the op {node.target}{where} {part}: {why}; expected ops on tiles with a Triton text in their "
            "rows, ops/. Use backend='eager' or 'inductor', or add its text."
        )
        self.node, self.why, self.waits = node, why, waits


@dataclass
class TileDirection:
    """A graph, where its inputs come from and its outputs go; and its kernel, written.

    carried: inputs that the next mini-batch has from this one, with the output that they become (None: none does).
    """

    name: str
    graph: fx.GraphModule
    sources: Sequence[Input]
    targets: Sequence[Target]
    dtype: torch.dtype
    precision: Precision
    keeps: str = ""  # "" | "some" | "each": does it store the state that a mini-batch starts from?
    backwards: bool = False
    whole: Sequence[Input] = ()  # of a slice: the inputs of the whole direction
    short: frozenset[str] = frozenset()  # what passes from slice to slice in the type of factors
    orders: dict[str, list[int]] = field(default_factory=dict)  # how carried variables lie, if not as their tensors

    def __post_init__(self) -> None:
        self.whole = self.whole or self.sources
        self.kept = tuple(x for x in self.whole if self.backwards and place_of(x) == "state")
        self.order = [x for x in self.whole if self._is_carried(x)]
        self.inputs, self.results = inputs_of(self.graph.graph), results_of(self.graph.graph)
        self.steps = [n for n in self.graph.graph.nodes if n.op == "call_function"]
        self.source = dict(zip(self.inputs, self.sources, strict=True))
        self.carried = {n: x for n, x in self.source.items() if self._is_carried(x)}
        self.over = {self.targets[k].what: x for k, x in enumerate(self.results) if self.targets[k].kind == "over"}

    def _is_carried(self, x: Input) -> bool:
        return place_of(x) == ("cotangent" if self.backwards else "state")

    # -- where what is computed ----------------------------------------------------------------------------------

    def _place(self) -> None:
        """Say which values torch computes before the kernel and after it, by writing the kernel once."""
        waits = set(self.carried)
        for n in self.steps:
            if any(x in waits for x in n.all_input_nodes):
                waits.add(n)
        leads, ends = needed(self.over.values()), {*self.results}
        self.waits, self.early, self.late, self.apart = waits, set[fx.Node](), set[fx.Node](), dict[fx.Node, str]()
        self._begin()
        for n in self.steps:
            inside = n in waits and n in leads
            if not inside and n in waits and any(x in self.late for x in n.all_input_nodes):
                self.late.add(n)
                continue
            try:
                self.writer.most = LIMIT if inside else DEEP
                self.walker.step(n)
                if not inside and n in ends:
                    self.writer.tiles(self.walker.values[n])
            except (Untileable, Unsupported) as error:
                if inside:
                    raise Refused(n, error.why) from None
                self.apart[n] = error.why
                if n in waits:
                    self.late.add(n)
                else:
                    self.early.add(n)
                    self.walker.values[n] = self._memory("made", n)
        for n in reversed(self.steps):  # what would be passed to torch as a large tile, it computes
            if n in waits and n not in leads and _is_deep(n) and any(x in self.late for x in n.users):
                self.late.add(n)

    def _memory(self, role: str, n: fx.Node) -> Any:
        """Read a value of torch's."""
        made = n.meta["val"]
        if isinstance(made, list | tuple):
            raise Refused(n, "it has several results", waits=False)
        return self._read(role, n.name, n.name, tuple(made.shape), made.dtype, True)

    def _outside(self, goals: Sequence[fx.Node], nodes: set[fx.Node], targets: Sequence[Target] = ()) -> Outside:
        """Take nodes out as a graph of their own."""
        wanted = needed(goals)
        ordered = [n for n in self.steps if n in wanted and n in nodes]
        read = {x for n in ordered for x in n.all_input_nodes} | {*goals}
        given = [n for n in (*self.inputs, *self.steps) if n in read and n not in nodes]
        inputs = tuple(self.source[n] if n in self.source and n not in self.carried else n.name for n in given)
        values = [n.meta["val"] for n in given]
        graph = extract(ordered, given, lambda _, made: [made[n] for n in goals])
        shapes, kinds = tuple(tuple(x.shape) for x in values), tuple(x.dtype for x in values)
        apart = {n: why for n, why in self.apart.items() if n in ordered}
        return Outside(unwritten(self.graph, graph), inputs, shapes, kinds, tuple(targets), apart)

    # -- the kernel ----------------------------------------------------------------------------------------------

    def _loads_ahead(self) -> bool:
        """Has it registers for what the next mini-batch reads? (LAB.md: in reverse, or with 64 tokens, it has none.)"""
        if not self.precision.ahead or not self.carried or self.backwards:
            return False
        return all(n.meta["val"].numel() <= TILE_AHEAD for n, x in self.source.items() if x.part in ("q", "k", "v"))

    def _begin(self) -> None:
        """Start writing: what is carried is in registers, all else in memory."""
        self.writer = Writer(self.dtype, self.precision, taken=set(RESERVED), ahead=self._loads_ahead())
        self.walker, self.arguments = Walker(self.writer), list[Argument]()
        self.variables: dict[Input, list[Tile]] = {}
        self.head: list[str] = []
        for n, x in self.source.items():
            shape, kind = tuple(n.meta["val"].shape), n.meta["val"].dtype
            if n in self.carried:
                self.walker.values[n] = self._variable(x, shape, kind)
            else:
                role, what = held_in(x, self.kept)
                kind = self._passes_as(what) if role == "slice" and kind.is_floating_point else kind
                self.walker.values[n] = self._read(role, what, label(x), shape, kind, x.over == "block")

    def _argument(self, role: str, what: Any, hint: str, rank: int, dtype: torch.dtype) -> str:
        found = next((a.name for a in self.arguments if (a.role, a.what) == (role, what)), None)
        if found is None:
            found, k = hint, 2
            while found in {a.name for a in self.arguments}:
                found, k = f"{hint}_{k}", k + 1
            self.arguments.append(Argument(role, what, found, rank, dtype))
            self.writer.taken |= {f"{found}_{x}" for x in ("p", "row", "at", "ahead", *self.arguments[-1].strides)}
        return found

    def _read(self, role: str, what: Any, hint: str, shape: tuple[int, ...], kind: torch.dtype, looped: bool) -> Memory:
        return Memory.whole(self._argument(role, what, hint, len(shape), kind), shape, kind, looped)

    def _variable(self, x: Input, shape: tuple[int, ...], kind: torch.dtype) -> Value:
        """Have what is carried on as variables: registers beside each other."""
        registers = shape[0] if self._has_registers(x) else 0
        role = "cotangent" if self.backwards else "before"
        index = self.order.index(x)
        memory = self._argument(role, index, f"{label(x)}_{role}", len(shape), kind)
        found = []
        for k in range(registers or 1):
            own = shape[1:] if registers else shape
            name = self.writer.named(f"{label(x)}_{k}" if registers else label(x))
            order = self.orders.get(name, [a for a, n in enumerate(own) if n != 1])
            tile = Tile(name, own, axes_in(order, len(own)), frozenset(range(len(order))), kind, held=True)
            shift = len(shape) - len(own)
            start = (k, *[0] * len(own)) if registers else (0,) * len(own)
            at = replace(Memory.whole(memory, shape, kind, False), start=start)
            text = self.writer.read(at, [a + shift for a in order], f"{memory}_row")
            self.head.append(f"{name} = {text}.to({self.writer.T})")
            found.append(tile)
        self.variables[x] = found
        if not registers:
            return found[0]
        return behind(0, [unsqueezed(t, 0) for t in found])

    def _has_registers(self, x: Input) -> bool:
        if not self.backwards:
            return x.part == "R"
        return int(x.name) > sum(y.part == "th" for y in self.kept)  # cotangents of anchors come first

    def kernel(self) -> Kernel:
        """Write the kernel; again, if what is carried on had better lie otherwise."""
        after, passed = self._written()
        for _ in range(2):
            if self._reordered():
                after, passed = self._written()
        made = {a.what for a in self.arguments if a.role == "made"}
        before = self._outside([n for n in self.steps if n.name in made], set(self.steps)) if made else None
        ends, sizes = zip(self.targets, self.results, strict=True), self.writer.sizes
        slices = tuple(Crossing(t.what, _shape(x), self._passes_as(t.what)) for t, x in ends if t.kind == "passed")
        return Kernel(
            self.name, self._text(), tuple(self.arguments), before, after,
            tuple(Crossing(n.name, _shape(n), n.meta["val"].dtype) for n in passed), self.kept, slices,
            bool(self.carried), self.writer.flops, sum(math.prod(_shape(n)) for n in self.carried),
            max(sizes, default=1), sum(sizes) // max(1, len(sizes)),
        )  # fmt: skip

    def _written(self) -> tuple[Outside | None, list[fx.Node]]:
        """Place and write what is computed; return what torch does after the kernel, and what that reads of it."""
        self._place()
        late = [k for k, x in enumerate(self.results) if isinstance(x, fx.Node) and x in self.late | self.early]
        after, passed = None, list[fx.Node]()
        if late:
            own = {n for n in self.steps if n in self.late or n not in self.waits}
            after = self._outside([self.results[k] for k in late], own, [self.targets[k] for k in late])
            passed = [n for n in [*self.inputs, *self.steps] if n.name in after.inputs]
        self._write([k for k in range(len(self.results)) if k not in late], passed)
        return after, passed

    def _write(self, wanted: Sequence[int], passed: Sequence[fx.Node]) -> None:
        """Write what the kernel computes, in order, and where it goes."""
        self._begin()
        read = needed([*(self.results[k] for k in wanted), *passed], self.early)
        self._keep()
        for n in self.steps:
            if n in read and n in self.early:
                self.walker.values[n] = self._memory("made", n)
        self.tail, self.moves = list[str](), dict[str, Tile]()
        waiting = [k for k in wanted if self.targets[k].kind != "over"]
        inside = [n for n in self.steps if n in read and n not in self.early]
        groups = abreast(inside, self.walker.values) if self.precision.at_once else [[n] for n in inside]
        for group in ([], *groups):
            if len(group) > 1:
                self.walker.steps(group)
            elif group:
                self.walker.step(group[0])
            for k in [k for k in waiting if self.results[k] in self.walker.values]:  # at once: registers are few
                waiting.remove(k)
                self._leave_at(k)
        for n in passed:
            value = self.walker.values[n]
            name = self._argument("passed", n.name, f"{n.name}_out", len(value.shape), value.kind)
            self.writer.store(name, value, True)
        for k in (*waiting, *(k for k in wanted if self.targets[k].kind == "over")):
            self._leave_at(k)
        used = {a for a in self.arguments if a.role not in ("input", "kept", "made") or self._is_used(a)}
        self.arguments = [a for a in self.arguments if a in used]

    def _passes_as(self, name: Any) -> torch.dtype:
        return self.precision.factors if name in self.short and self.precision.factors else self.dtype

    def _leave_at(self, k: int) -> None:
        try:
            self._leave(self.targets[k], self.results[k])
        except Untileable as error:
            raise Refused(self.results[k], error.why, waits=self.targets[k].kind == "over") from None

    def _is_used(self, a: Argument) -> bool:
        w = self.writer
        return any(f"{a.name}_at" in line or f"{a.name}_ahead" in line for line in (*w.once, *w.loop, *w.next)) or (
            a.role == "kept" and bool(self.keeps)
        )

    def _keep(self) -> None:
        """Store the state that a mini-batch starts from."""
        if not self.keeps:
            return
        some = self.keeps == "some"
        if some:
            self.writer.line("since = (n + phase) % G", True)
            self.writer.line("if since == 0:", True)
        for n, x in self.carried.items():
            value = self.walker.values[n]
            name = self._argument("kept", self.order.index(x), f"{label(x)}_kept", len(value.shape), value.kind)
            where = "(m + phase) // G" if some else "m"
            base = f"{name}_row + {where} * {name}_sn"
            self.writer.store(name, value, True, "    " if some else "", base)

    def _leave(self, target: Target, x: Any) -> None:
        """Put an output where it goes."""
        w = self.writer
        value = self.walker.values[x]
        if target.kind == "over":
            own = value.values if isinstance(value, Parts) and self._has_registers(target.what) else None
            if self._has_registers(target.what):
                shape = value.shape[1:]
                parts = own if own and len(own) == value.shape[0] and value.axis == 0 else [
                    w.slice(value, 0, k, k + 1) for k in range(value.shape[0])
                ]  # fmt: skip
                found = [w.view(x.name, v, shape) for v in parts]
            else:
                found = [value]
            for variable, v in zip(self.variables[target.what], found, strict=True):
                self.moves[variable.text] = w.all_clean(w.real(v))
            return
        if target.kind == "added":
            tile = w.real(value)
            space = [a for a, n in enumerate(tile.shape) if n != 1]
            name = w.named(f"sum_{label(target.what)}")
            self.head.append(f"{name} = tl.full({[padded(tile.shape[a]) for a in space]}, 0.0, {w.T})")
            w.line(f"{name} += {w.aligned(tile, space, len(tile.shape))}", True)
            total = Tile(name, tile.shape, axes_in(space, len(tile.shape)))
            hint = f"{label(target.what)}_gradient"
            goal = self._argument("gradient", target.what, hint, len(tile.shape), self.dtype)
            self._after(lambda: w.store(goal, total, True, base=f"{goal}_row + part * {goal}_sn"))
            return
        role, what, where = ("slice", target.what, "n") if target.kind == "passed" else target.what
        hint = {"o": "o", "after": f"after_{what}", "turned": f"turned_{what}"}.get(
            role, f"{label(what)}_gradient" if isinstance(what, Input) else f"{what}_passed"
        )
        kind = self._passes_as(what) if role == "slice" else value.kind
        name = self._argument(role, what, hint, len(value.shape), kind)
        w.store(name, value, True, base="" if where.startswith("n") else f"{name}_row")

    def _after(self, write: Callable[[], None]) -> None:
        """Write lines that come after the loop."""
        kept, self.writer.loop = self.writer.loop, []
        write()
        self.tail += self.writer.loop
        self.writer.loop = kept

    def _reordered(self) -> bool:
        """Had what is carried on better lie as its next value does?"""
        changed = False
        for variables in self.variables.values():
            for v in variables:
                new = self.moves.get(v.text)
                if new is None or new.rank != v.rank or new.rank < 2:
                    continue
                if new.order != self.orders.get(v.text, sorted(new.order)):
                    self.orders[v.text] = new.order
                    changed = True
        return changed

    def _carry(self) -> list[str]:
        """Let the new values take the place of the old."""
        variables = {v.text: v for many in self.variables.values() for v in many}
        texts = {name: self.writer.whole(new, variables[name].order) for name, new in self.moves.items()}
        olds = {text: f"old_{k}" for k, text in enumerate(texts.values()) if text in texts}
        found = [f"{old} = {text}" for text, old in olds.items()]
        return found + [f"{name} = {olds.get(text, text)}" for name, text in texts.items() if text != name]

    def _ends(self) -> list[str]:
        """Store what is carried on, after the loop."""
        for x, variables in self.variables.items():
            if x not in self.over or self.keeps == "each":
                continue
            index = self.order.index(x)
            role = "turned" if self.backwards else "after"
            registers = self._has_registers(x)
            rank = len(variables[0].shape) + registers
            name = self._argument(role, index, f"{label(x)}_{role}", rank, self.dtype)
            for k, v in enumerate(variables):
                wide = unsqueezed(v, 0) if registers else v
                start = (k, *[0] * len(v.shape)) if registers else ()
                self._after(lambda n=name, t=wide, s=start: self.writer.store(n, t, True, base=f"{n}_row", start=s))
        return self.tail

    def _text(self) -> str:
        """Put the source together."""
        carry, tail = self._carry(), self._ends()
        return source(self.name, self.arguments, self.writer, self.backwards, self.head, carry, tail)


def _shape(n: fx.Node) -> tuple[int, ...]:
    return tuple(n.meta["val"].shape)


def _is_deep(n: fx.Node) -> bool:
    """Has a value more than two axes, short ones that would fill a large tile with nothing?"""
    made = n.meta.get("val")
    sizes = [k for k in made.shape if k != 1] if isinstance(made, torch.Tensor) else []
    return len(sizes) > 2 and math.prod(map(padded, sizes)) > DEEP


def forward_direction(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, precision: Precision, keeps: str
) -> TileDirection:
    """Read the forward direction. keeps: which states it stores, "" none, "some" every G-th, "each"."""
    graph = lowered(plain)
    targets = forward_targets(inputs, len(results_of(graph.graph)))
    return TileDirection("forward", graph, inputs, targets, dtype, precision, keeps)


def advance_direction(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, precision: Precision
) -> TileDirection:
    """Read what computes a group's states again, and stores each."""
    graph = lowered(only_outputs(plain, slice(1, None)))
    targets = forward_targets(inputs, 1 + len(results_of(graph.graph)))[1:]
    return TileDirection("advance", graph, inputs, targets, dtype, precision, "each")


def reverse_direction(
    reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int, dtype: torch.dtype,
    precision: Precision,
) -> TileDirection:  # fmt: skip
    """Read the vjp, from the last mini-batch to the first."""
    cotangents = [Input("cotangent", str(k), "block") for k in range(outputs)]
    targets = backward_targets(inputs, wants, cotangents[1:])
    sources = [*inputs, *cotangents]
    return TileDirection("reverse", lowered(reverse), sources, targets, dtype, precision, backwards=True)


__all__ = ["Refused", "TileDirection", "advance_direction", "forward_direction", "reverse_direction"]

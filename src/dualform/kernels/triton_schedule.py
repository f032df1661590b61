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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dualform.graphs.edit import extract, inputs_of, needed, only_outputs, results_of, unwritten
from dualform.kernels.lowering import lowered
from dualform.kernels.ops import Unsupported, is_factor_alone
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
    blocked,
    is_deep,
    padded,
    unsqueezed,
)
from dualform.kernels.triton_kernel import RESERVED, Argument, Crossing, Kernel, Outside, held_in, source
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_order import abreast, tightened
from dualform.kernels.triton_text import Writer
from dualform.kernels.triton_walker import Walker
from dualform.learning.backends import BackendError
from dualform.learning.plan import Input

# Entries of a block of what only weights have, hidden columns say; and of a tile from which lines are put in order.
BLOCK, LARGE = 128, 8192
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
            if n in waits and n not in leads and is_deep(n) and any(x in self.late for x in n.users):
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
        self.variables: dict[Input, list[tuple[Tile, Sequence[int]]]] = {}
        self.head: list[str] = []
        self.blocks, self.again, self.cuts = 1, False, dict[Any, Any]()
        for n, x in self.source.items():
            if n in self.carried:
                self.walker.values[n] = self._variable(n)
            else:
                shape, kind = _shape(n), n.meta["val"].dtype
                role, what = held_in(x, self.kept)
                kind = self._passes_as(what) if role == "slice" and kind.is_floating_point else kind
                found = self._read(role, what, label(x), shape, kind, x.over == "block")
                self.walker.values[n] = blocked(found, self._cut_at(n))

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

    def _variable(self, n: fx.Node) -> Value:
        """Have what is carried on as variables: registers beside each other."""
        x, shape, kind = self.carried[n], _shape(n), n.meta["val"].dtype
        registers = shape[0] if self._has_registers(x) else 0
        index, role = self.order.index(x), "cotangent" if self.backwards else "before"
        memory = self._argument(role, index, f"{label(x)}_{role}", len(shape), kind)
        whole, self.variables[x] = Memory.whole(memory, shape, kind, False), []
        cut = self.cuts[x] = self._cut_at(n, bool(registers))

        def variable(at: Memory, hint: str) -> Tile:
            name = self.writer.named(hint)
            order = self.orders.get(name, [a for a, n in enumerate(at.shape) if n != 1])
            clean, axes = frozenset(range(len(order))), axes_in(order, len(at.shape))
            self.variables[x].append((Tile(name, at.shape, axes, clean, kind, held=True), at.start))
            self.writer.entries[name] = math.prod(map(padded, at.shape))
            self.head.append(f"{name} = {self.writer.read(at, order, f'{memory}_row')}.to({self.writer.T})")
            return self.variables[x][-1][0]

        def blocks(at: Any, hint: str) -> Value:
            at = blocked(at, cut)
            if isinstance(at, Parts):
                return Parts(at.axis, tuple(variable(v, f"{hint}_{k}") for k, v in enumerate(at.values)))
            return variable(at, hint)

        if not registers:
            return blocks(whole, label(x))
        each = [blocks(self.writer.select(x.name, whole, 0, k), f"{label(x)}_{k}") for k in range(registers)]
        return behind(0, [unsqueezed(v, 0) for v in each])

    def _cut_at(self, n: fx.Node, shift: int = 0) -> tuple[int, int] | None:
        """Say which axis is cut: longer than any of a token; where gradients are carried, of large ones (LAB.md)."""
        tokens = [_shape(x) for x, i in self.source.items() if i.part in ("q", "k", "v")]
        own, count = max((k for shape in tokens for k in shape), default=0), max((s[0] for s in tokens), default=1)
        for a, k in enumerate(_shape(n)):
            if k > max(own, BLOCK) and not (self.backwards and self.carried and count * k <= LARGE):
                self.blocks, self.again = max(self.blocks, -(-k // BLOCK)), self.again or count * k > LARGE
                return a - shift, BLOCK
        return None

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
        made = {a.what for a in self.arguments if a.role == "made"} | {*(after.inputs if after else ())}
        first = [n for n in self.steps if n.name in made and n not in self.waits]  # what torch reads again, too
        before = self._outside(first, set(self.steps)) if first else None
        ends, sizes = zip(self.targets, self.results, strict=True), self.writer.sizes
        slices = tuple(Crossing(t.what, _shape(x), self._passes_as(t.what)) for t, x in ends if t.kind == "passed")
        return Kernel(
            self.name, self._text(), tuple(self.arguments), before, after,
            tuple(Crossing(n.name, _shape(n), n.meta["val"].dtype) for n in passed), self.kept, slices,
            bool(self.carried), self.writer.flops, sum(math.prod(_shape(n)) for n in self.carried),
            max(sizes, default=1) * self.blocks, sum(sizes) // max(1, len(sizes)), self.again,
            frozenset(self.kept.index(x) for n, x in self.source.items() if x in self.kept and not is_factor_alone(n)),
        )  # fmt: skip

    def _written(self) -> tuple[Outside | None, list[fx.Node]]:
        """Place and write what is computed; return what torch does after the kernel, and what that reads of it."""
        self._place()
        late = [k for k, x in enumerate(self.results) if isinstance(x, fx.Node) and x in self.late | self.early]
        after, passed = None, list[fx.Node]()
        if late:
            after = self._outside([self.results[k] for k in late], self.late, [self.targets[k] for k in late])
            passed = [n for n in [*self.inputs, *self.steps] if n.name in after.inputs and n in self.waits]
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
            if self.cuts[target.what] is not None:
                axis, size = self.cuts[target.what]
                stops = range(size, found[0].shape[axis] + size, size)
                found = [w.slice(v, axis, k - size, k) for v in found for k in stops]
            for (variable, _), v in zip(self.variables[target.what], found, strict=True):
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
            for v, _ in variables:
                new = self.moves.get(v.text)
                if new is None or new.rank != v.rank or new.rank < 2:
                    continue
                if new.order != self.orders.get(v.text, sorted(new.order)):
                    self.orders[v.text], changed = new.order, True
        return changed

    def _carry(self) -> list[str]:
        """Let the new values take the place of the old."""
        variables = {v.text: v for many in self.variables.values() for v, _ in many}
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
            name = self._argument(role, index, f"{label(x)}_{role}", len(variables[0][1]), self.dtype)
            for v, start in variables:
                wide = unsqueezed(v, 0) if registers else v
                self._after(lambda n=name, t=wide, s=start: self.writer.store(n, t, True, base=f"{n}_row", start=s))
        return self.tail

    def _text(self) -> str:
        """Put the source together."""
        w, carry, tail = self.writer, self._carry(), self._ends()
        if self.blocks > 1 or max(w.sizes, default=0) > LARGE:
            fixed = max([len(w.next), *(k + 1 for k, x in enumerate(w.loop) if x.startswith(" "))])
            held = [v.text for many in self.variables.values() for v, _ in many]
            w.loop[fixed:] = tightened(w.loop[fixed:], w.entries, held, carry, self.again)
        return source(self.name, self.arguments, self.writer, self.backwards, self.head, carry, tail)


def _shape(n: fx.Node) -> tuple[int, ...]:
    return tuple(n.meta["val"].shape)


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

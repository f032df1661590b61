"""What a call needs of its derivation: each direction of a block mapped over rows, split, ready; what backends keep.

Each direction is the traced graph of one mini-batch, split where the state passes (`fission`): what does not wait for
the state runs for many mini-batches at once, the loop holds only what carries the state on.

Legend: B batch, T time, H heads, P = B H rows, n blocks of a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, fx

from dualform.graphs.edit import only_outputs
from dualform.graphs.regroup import ready_first
from dualform.graphs.split import Fission, split
from dualform.graphs.whole_norms import native_norms
from dualform.learning.batched import at_any, example, joined, mapped, row_axis, row_bytes
from dualform.learning.call import Call, Names
from dualform.learning.derive import Derivation, TracedStep, retyped, slopes_as_arithmetic
from dualform.learning.grid import Variant
from dualform.learning.prepare import Prepare, Prepared, in_place, visible
from dualform.learning.transforms import TRACING, undisturbed

Own = TypeVar("Own")


class Input(NamedTuple):
    """One tensor of a block: which part of the step's inputs, its name there, and how it varies over rows."""

    part: str
    name: str
    over: str  # "block" each block's own | "heads" one per head | "shared"


class Rows(NamedTuple):
    """What a call's rows are; and what makes so many of their blocks one function, if anything does."""

    batch: int
    heads: int
    blocks: int | None = None
    prepare: Prepare = in_place


Visit = Callable[[int, list[Tensor]], list[Tensor]]
Once = dict[tuple[fx.Node, int], Tensor]  # 0: per head; else for so many rows


class Result(NamedTuple):
    """What some blocks gave."""

    state: list[Tensor]
    others: list[Tensor]
    states: list[Tensor] | None = None  # what each block started from, where it is at hand


Given = Callable[[Input], Tensor]  # a block's own for the rows of all blocks, one per head, or shared


@dataclass(eq=False)
class Way:
    """One direction of a step, mapped over rows and split."""

    inputs: list[Input]
    fission: Fission
    returns: int  # tensors of state that the loop returns
    prepare: Callable[[fx.GraphModule], Prepared]
    parts: dict[tuple[fx.GraphModule, torch.device], Prepared] = field(default_factory=dict)
    wholes: dict[tuple[int, bool, Rows, torch.device], Prepared] = field(default_factory=dict)

    @classmethod
    def of(
        cls, graph: fx.GraphModule, inputs: list[Input], carried: Sequence[int], returned: Sequence[int],
        prepare: Callable[[fx.GraphModule], Prepared],
    ) -> Way:  # fmt: skip
        fixed = [i for i, x in enumerate(inputs) if x.over != "block"]
        return cls(inputs, split(graph, carried, returned, fixed, row_bytes), len(returned), prepare)

    def retyped(self, old: torch.dtype, new: torch.dtype) -> Way:
        """Return the same with numbers of another dtype."""
        f = self.fission
        parts = {"once": f.once, "before": f.before, "loop": f.loop, "after": f.after}
        cast = {name: replace(part, graph=retyped(part.graph, old, new)) for name, part in parts.items()}
        return Way(self.inputs, replace(f, **cast), self.returns, self.prepare, self.parts)

    def part(self, name: str, device: torch.device) -> Prepared:
        """Return a part, ready to run op by op on its inputs and their number of rows."""
        graph: fx.GraphModule = getattr(self.fission, name).graph
        if (graph, device) not in self.parts:
            with TRACING:
                self.parts[graph, device] = self.prepare(at_any(graph, device))
        return self.parts[graph, device]

    def whole(self, blocks: Sequence[int], rows: Rows, device: torch.device) -> Prepared:
        """Return all parts of some blocks as one compiled function."""
        key = (len(blocks), blocks[0] > blocks[-1], rows, device)
        if key not in self.wholes:
            f, n, P = self.fission, len(blocks), rows.batch * rows.heads
            count = dict.fromkeys(f.inputs, rows.heads) | dict.fromkeys(f.varying, n * P) | dict.fromkeys(f.carried, P)

            def make() -> Prepared:
                graph = joined(f, [j - min(blocks) for j in blocks], P, rows.heads, device)
                return rows.prepare(graph, lambda: [example(x, count[x], device) for x in f.inputs])

            self.wholes[key] = undisturbed(make)
        return self.wholes[key]

    def run(
        self, blocks: Sequence[int], given: Given, state: list[Tensor], visit: Visit, rows: Rows, once: Once
    ) -> Result:
        """Run blocks in the order given; return the state after them and the other outputs, for all blocks' rows.

        given: values of the inputs, blocks in ascending order. visit(n, state): what block n starts from. once: what
        was computed for other blocks of the call and is the same for all.
        """
        if rows.blocks == len(blocks) and self.returns == len(self.fission.carried):
            return self._run_whole(blocks, given, state, visit, rows)
        f, n, P, device = self.fission, len(blocks), rows.batch * rows.heads, state[0].device
        source = dict(zip(f.inputs, self.inputs, strict=True))
        made: dict[fx.Node, Tensor] = {}

        def value(x: fx.Node, count: int) -> Tensor:
            if x in made:
                return made[x]
            if x in f.varying:
                return given(source[x])
            if (x, count) not in once:
                per_head, axis = once[x, 0] if (x, 0) in once else given(source[x]), row_axis(x)
                alone = axis is None or count == rows.heads
                once[x, count] = per_head if alone else torch.cat([per_head] * (count // rows.heads), axis or 0)
            return once[x, count]

        def compute(name: str, count: int) -> list[tuple[fx.Node, Tensor]]:
            part = getattr(f, name)
            if not part.outputs:
                return []
            values = [value(x, count) for x in part.inputs]
            return list(zip(part.outputs, self.part(name, device)(*values, count), strict=True))

        if f.once.outputs and (f.once.outputs[0], 0) not in once:
            once |= {(x, 0): y for x, y in compute("once", rows.heads)}
        made |= compute("before", n * P)
        slots: list[int | Sequence[Tensor]] = []
        for x in f.loop.inputs:
            axis = row_axis(x)
            if x in f.carried:
                slots.append(f.carried.index(x))
            elif axis is None or not (x in made or x in f.varying):
                slots.append([value(x, P)] * n)
            else:
                slots.append(value(x, n * P).chunk(n, axis))
        loop, first = self.part("loop", device), min(blocks)
        kept: list[Sequence[Tensor]] = [()] * n
        for block in blocks:
            j = block - first
            state = visit(block, state)
            out = loop(*[state[x] if isinstance(x, int) else x[j] for x in slots], P)
            state, kept[j] = list(out[: self.returns]), out[self.returns :]
        for x, parts in zip(f.loop.outputs[self.returns :], zip(*kept, strict=True), strict=True):
            made[x] = parts[0] if n == 1 else torch.cat(parts, row_axis(x) or 0)
        made |= compute("after", n * P)
        return Result(state, [value(x, n * P) for x in f.others])

    def _run_whole(self, blocks: Sequence[int], given: Given, state: list[Tensor], visit: Visit, rows: Rows) -> Result:
        f, n = self.fission, len(blocks)
        state = visit(blocks[0], state)
        held = dict(zip(f.carried, state, strict=True))
        source = zip(f.inputs, self.inputs, strict=True)
        out = self.whole(blocks, rows, state[0].device)(*(held[x] if x in held else given(y) for x, y in source))
        r = self.returns
        states = list(out[r : 2 * r])
        for block, *each in zip(range(min(blocks), max(blocks) + 1), *(x.chunk(n) for x in states), strict=True):
            if block != blocks[0]:
                visit(block, each)  # between blocks alike it changes nothing
        return Result(list(out[:r]), list(out[2 * r :]), states)


@dataclass(eq=False)
class Natives:
    """What backends that run whole calls keep with a plan; all plans of a structure share it.

    refused: why no backend does where nobody chose it; instead: what runs for a backend whose code is wrong here;
    faults: what was wrong, by what was tried; tokens: calls of one token, which may come to repay compiling; checked:
    what was compared with eager; made: each backend's own record, by its class.
    """

    refused: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    checked: set[tuple[object, ...]] = field(default_factory=set)
    made: dict[type, object] = field(default_factory=dict)

    def of(self, kind: type[Own]) -> Own:
        """Return a backend's own record, an empty one at first."""
        if kind not in self.made:
            self.made.setdefault(kind, kind())
        return cast("Own", self.made[kind])


@dataclass(eq=False)
class Plan:
    """A derivation and its directions.

    names: of the gates with a time axis, of the fast leaves, and of what is not fast, as a call has them.
    """

    derivation: Derivation
    ways: dict[tuple[Variant, str], Way] = field(default_factory=dict)
    natives: Natives = field(default_factory=Natives)
    names: Names = ([], [], [])
    key: str = ""  # what an op knows it by
    asked: tuple[str, int, torch.dtype, str] | None = None  # whose it is, and for what: program, width, dtype, form
    is_checked: bool = False  # is generated code compared with eager at its first use?
    source: Plan | None = None  # the same in another dtype, whose graphs are taken

    def out_dtype(self, call: Call) -> torch.dtype:
        """Say what the outputs are rounded to: q's digits; losses keep all."""
        return call.dtype if self.derivation.inner.observed else call.q.dtype

    def step(self, variant: Variant) -> TracedStep:
        steps = self.derivation.steps
        return steps[variant] if variant in steps else undisturbed(lambda: self.derivation.step(variant))

    def inputs(self, variant: Variant) -> list[Input]:
        """List a block's inputs, in the order of its graph."""
        d, found = self.derivation, []
        for part, value in self.step(variant).inputs._asdict().items():
            for name in value if isinstance(value, dict) else [] if value is None else [part]:
                own = "shared" if part == "slow" and name not in d.parts.slow else "heads"
                found.append(Input(part, name, own if part in ("slow", "init") else "block"))
        return found

    def way(self, variant: Variant, name: str) -> Way:
        """Return a direction of a block: "forward", "advance" (the state alone), "reverse" or "visible".

        The last is forward again, of plain ops alone, each with a derivative of its own.
        """
        key = (variant, name)
        if key not in self.ways:
            with TRACING:
                if key not in self.ways:
                    self.ways[key] = self._way(variant, name)
        return self.ways[key]

    def _way(self, variant: Variant, name: str) -> Way:
        if self.source is not None:
            return self.source.way(variant, name).retyped(self.source.derivation.dtype, self.derivation.dtype)
        step, inputs = self.step(variant), self.inputs(variant)
        state = [i for i, x in enumerate(inputs) if x.part in ("th", "R")]
        count = step.num_outputs
        reverse = step.reverse if name == "reverse" else None
        carried, returned, prepare, table = state, range(1, count), in_place, None
        if reverse is not None:
            wanted = list(itertools.compress(range(len(inputs)), step.wants))
            carried, returned = range(len(inputs) + 1, len(inputs) + count), [wanted.index(i) for i in state]
            inputs = [*inputs, *(Input("cotangent", str(i), "block") for i in range(count))]
        elif name == "visible":
            prepare, table = visible, slopes_as_arithmetic()

        def make() -> Way:
            graph = reverse or (step.graph if name == "visible" else step.plain)
            whole = mapped(graph, [x.over == "shared" for x in inputs], table)
            native_norms(whole.graph)
            if name == "advance":
                whole = only_outputs(whole, slice(1, None))
            leaves = range(count - 1) if name == "advance" else returned
            return Way.of(ready_first(whole, carried), inputs, carried, leaves, prepare)

        return undisturbed(make)

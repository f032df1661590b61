"""Run a chunk program over a sequence as one `torch.library` op each way.

Each direction is the traced graph of one mini-batch, split where the state passes (`fission`): what does not wait for the
state runs for many mini-batches at once, the loop holds only what carries the state on. The backward is the traced vjp, in
reverse, from checkpoints every G blocks and the states in between recomputed. Inside an op autograd does not run.

Legend: B batch, T time, H heads, P = B H rows, N blocks, n blocks of a piece, G blocks per checkpoint, th anchor, R registers.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from dualform.learning.backends import Backend, BackendError, Run, Whole, backends
from dualform.learning.batched import at, example, joined, mapped, row_axis, row_bytes
from dualform.learning.derive import Derivation, Step, only_outputs, undisturbed
from dualform.learning.fission import Fission, split
from dualform.learning.grid import Grid, Variant, arrange
from dualform.learning.norms import native_norms
from dualform.learning.regroup import ready_first

Leaves = dict[str, Tensor]
# Tokens, over all rows, that one call works on: enough to hide dispatch, few enough to stay in a CPU's cache (LAB.md).
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
# The backward reads the weights of all these blocks, too: so much of the largest leaf.
LEAF_BYTES_AT_ONCE = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}


class Call(NamedTuple):
    """The tensors of one call; the op takes them as a flat list. q, k, v and gates may be of fewer digits than the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Leaves  # (B, T, H) each
    slow: Leaves  # (H, ...) parameters, and buffers as they are
    anchor: Leaves  # (B, H, ...)
    registers: Leaves  # (B, H, r, ...)
    position: Tensor  # (B,)
    init: Leaves  # (H, ...): where a document starts
    offset: Tensor | None = None  # (chunk,)
    mask: Tensor | None = None  # (B, T)
    reset: Tensor | None = None  # (B, T)
    carried: bool = False  # did the caller give a state?

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return next(iter(self.anchor.values())).dtype


class Input(NamedTuple):
    """One tensor of a block: which part of the step's inputs, its name there, and how it varies over rows."""

    part: str
    name: str
    over: str  # "block" each block's own | "heads" one per head | "shared"


class Rows(NamedTuple):
    """What a call's rows are, and what runs them."""

    batch: int
    heads: int
    backend: str


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
    made: dict[Any, Run] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: list[Input], carried: Sequence[int], returned: Sequence[int]) -> Way:
        fixed = [i for i, x in enumerate(inputs) if x.over != "block"]
        return cls(inputs, split(graph, carried, returned, fixed, row_bytes), len(returned))

    def part(self, name: str, rows: int, device: torch.device) -> Run:
        """Return a part, ready to run op by op on so many rows."""
        key = (name, rows, device)
        if key not in self.made:
            self.made[key] = found("eager").prepare(at(getattr(self.fission, name).graph, rows, device), list)
        return self.made[key]

    def whole(self, blocks: Sequence[int], rows: Rows, device: torch.device) -> Run:
        """Return all parts of some blocks as one compiled function."""
        key = (len(blocks), blocks[0] > blocks[-1], rows, device)
        if key not in self.made:
            f, n, P = self.fission, len(blocks), rows.batch * rows.heads
            count = {
                **dict.fromkeys(f.inputs, rows.heads),
                **dict.fromkeys(f.varying, n * P),
                **dict.fromkeys(f.carried, P),
            }

            def make() -> Run:
                graph = joined(f, [j - min(blocks) for j in blocks], P, rows.heads, device)
                return found(rows.backend).prepare(graph, lambda: [example(x, count[x], device) for x in f.inputs])

            self.made[key] = undisturbed(make)
        return self.made[key]

    def run(
        self, blocks: Sequence[int], given: Given, state: list[Tensor], visit: Visit, rows: Rows, once: Once
    ) -> Result:
        """Run blocks in the order given; return the state after them and the other outputs, for all blocks' rows.

        given: values of the inputs, blocks in ascending order. visit(n, state): what block n starts from. once: what was
        computed for other blocks of the call and is the same for all.
        """
        if found(rows.backend).blocks == len(blocks) and self.returns == len(self.fission.carried):
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
            return list(zip(part.outputs, self.part(name, count, device)(*values), strict=True))

        if f.once.outputs and (f.once.outputs[0], 0) not in once:
            once |= {(x, 0): y for x, y in compute("once", rows.heads)}
        made |= compute("before", n * P)
        slots: list[Any] = []
        for x in f.loop.inputs:
            axis = row_axis(x)
            if x in f.carried:
                slots.append(f.carried.index(x))
            elif axis is None or not (x in made or x in f.varying):
                slots.append([value(x, P)] * n)
            else:
                slots.append(value(x, n * P).chunk(n, axis))
        loop, first = self.part("loop", P, device), min(blocks)
        kept: list[Sequence[Tensor]] = [()] * n
        for block in blocks:
            j = block - first
            state = visit(block, state)
            out = loop(*[state[x] if isinstance(x, int) else x[j] for x in slots])
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


_transforms = torch._C._are_functorch_transforms_active  # inside vmap and the like tensors have no memory of their own


@cache
def found(backend: str) -> Backend:
    """Look a backend up."""
    return backends.build(backend).build()


def chosen(backend: str, plan: Plan, call: Call) -> str:
    """Choose a backend where nobody did: the first that says it suits, else eager."""
    if backend != "auto":
        return backend
    if "refused" in plan.natives:
        return "eager"
    each = ((name, found(name).whole) for name in backends.names())
    return next((name for name, whole in each if whole is not None and whole.suits(plan, call)), "eager")


def chosen_in_words(plan: Plan) -> str:
    """Say what runs calls where nobody chose."""
    if "refused" in plan.natives:
        return f"eager, because {plan.natives['refused']}"
    each = ((name, found(name).whole) for name in backends.names())
    return "; ".join([*(f"{name} {whole.says(plan)}" for name, whole in each if whole is not None), "else eager"])


def _runs_whole(
    backend: str, plan: Plan, call: Call, direction: Callable[[Whole, Run_], list[Tensor]]
) -> list[Tensor] | Run_:
    """Let a backend that takes calls as they are run this one; else return the run, for the loop."""
    name = chosen(backend, plan, call)
    run, whole = Run_(plan, call, name), found(name).whole
    if whole is None:
        return run
    try:
        return direction(whole, run)
    except BackendError as error:
        if backend != "auto":
            raise
        plan.natives["refused"] = str(error)
        warnings.warn(f"{error} The calls of this program run on backend='eager'.", stacklevel=2)
        return Run_(plan, call, "eager")


@dataclass(eq=False)
class Plan:
    """A derivation and its directions."""

    derivation: Derivation
    ways: dict[tuple[Variant, str], Way] = field(default_factory=dict)
    natives: dict[Any, Any] = field(default_factory=dict)  # what a backend that runs whole calls made
    counts: Counter[str] = field(default_factory=Counter)  # and the calls of one token, which may come to repay it

    def out_dtype(self, call: Call) -> torch.dtype:
        """Say what the outputs are rounded to: q's digits; losses keep all."""
        return call.dtype if self.derivation.inner.observed else call.q.dtype

    def step(self, variant: Variant) -> Step:
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
        """Return a direction of a block: "forward", "advance" (the state alone) or "reverse"."""
        key = (variant, name)
        if key not in self.ways:
            step, inputs = self.step(variant), self.inputs(variant)
            state = [i for i, x in enumerate(inputs) if x.part in ("th", "R")]
            count = step.num_outputs
            if name == "reverse":
                wanted = list(itertools.compress(range(len(inputs)), step.wants))
                graph = step.reverse
                carried, returned = range(len(inputs) + 1, len(inputs) + count), [wanted.index(i) for i in state]
                inputs = [*inputs, *(Input("cotangent", str(i), "block") for i in range(count))]
            else:
                graph, carried, returned = step.plain, state, range(1, count)
            whole = undisturbed(lambda: mapped(graph, [x.over == "shared" for x in inputs]))
            native_norms(whole.graph)
            if name == "advance":
                whole, returned = only_outputs(whole, slice(1, None)), range(count - 1)
            whole = ready_first(whole, carried)
            self.ways[key] = Way.of(whole, inputs, carried, returned)
        return self.ways[key]


class Run_:
    """One call on its grid: what both directions share."""

    def __init__(self, plan: Plan, call: Call, backend: str) -> None:
        self.plan, self.call, d = plan, call, plan.derivation
        self.B, self.T, self.H = call.q.shape[:3]
        self.rows, self.rule, self.L = Rows(self.B, self.H, backend), d.inner.rule, len(call.anchor)
        device = call.q.device
        self.slow = {name: x.to(device) for name, x in d.constants.items()} | call.slow
        self.grid: Grid = arrange(
            self.T, d.chunk, call.position, call.mask, call.reset, call.dtype, call.carried, d.block
        )
        self.blocks = len(self.grid.variants)
        self.same: dict[int, Once] = {}
        widest = max(v.width for v in self.grid.variants)
        kind = "cpu" if device.type == "cpu" else "cuda"
        by_tokens = TOKENS_AT_ONCE[kind] // (self.B * self.H * widest)
        by_leaves = LEAF_BYTES_AT_ONCE[kind] // max(x.nbytes for x in call.anchor.values())
        compiled = found(backend).blocks
        self.at_once = compiled or _power(by_tokens)
        self.at_once_back = compiled or _power(min(by_tokens, by_leaves))

    def given(self, piece: range, more: Callable[[Input], Tensor]) -> Given:
        """Read a piece's inputs, each once; `more`: those that the grid does not have."""
        found: dict[Input, Tensor] = {}

        def get(x: Input) -> Tensor:
            if x.over != "block":
                return self.fixed(x).contiguous()
            if x not in found:
                own = self.of_blocks(x, piece)
                found[x] = more(x) if own is None else own.flatten(0, 2).contiguous()
                if found[x].is_floating_point():
                    found[x] = found[x].to(self.call.dtype)
            return found[x]

        return get

    def fixed(self, x: Input) -> Tensor:
        """Read what all blocks share: (H, ...), or as it is."""
        return (self.slow if x.part == "slow" else self.call.init)[x.name]

    def of_blocks(self, x: Input, piece: range) -> Tensor | None:
        """Read the blocks of a piece, (n, B, H, ...); None for what the grid does not have."""
        g, c = self.grid, self.call
        if x.part in ("q", "k", "v"):
            return g.take(getattr(c, x.part), piece, fill=True)
        if x.part == "gates" and x.name != "offset":
            return g.take(c.gates[x.name], piece)
        if x.part not in ("i", "valid", "full", "opens", "gates"):
            return None
        W = g.variants[piece.start].width
        if x.part == "gates":
            assert c.offset is not None
            mark = c.offset[g.i[piece.start : piece.stop, :, :W].long() - 1]
        else:
            mark = getattr(g, x.part)[piece.start : piece.stop]
            mark = mark[:, :, :W] if x.part in ("i", "valid") else mark
        return mark[:, :, None].expand(len(piece), self.B, self.H, *mark.shape[2:])

    def once(self, way: Way) -> Once:
        """Return what was computed for a direction that is the same for all blocks."""
        return self.same.setdefault(id(way), {})

    def known(self, n: int) -> bool:
        """Are block n's registers at their start?"""
        v = self.grid.variants[n]
        return v.fresh and all(self.rule.resets) and not v.opens

    def returns_registers(self, n: int) -> bool:
        return not (self.grid.variants[n].completes(self.plan.derivation.chunk) and all(self.rule.resets))

    def start(self, th: Sequence[Tensor]) -> list[Tensor]:
        """Registers at their start, one row each."""
        return [torch.stack([s * w for s in self.rule.start], 1) for w in th]

    def enter(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """Give block n the state that it takes: with registers or without."""
        if self.known(n):
            return state[: self.L]
        return state if len(state) > self.L else state + self.start(state)

    def turn(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """Turn the gradient of the state that block n + 1 took into that of the state that block n returned."""
        L = self.L
        dth, dR = state[:L], state[L:]
        if self.returns_registers(n):
            return dth + (dR or [torch.zeros_like(x) for x in self.start(dth)])
        scaled = [(k, s) for k, s in enumerate(self.rule.start) if s and dR]
        return [sum((s * r[:, k] for k, s in scaled), w) for w, r in zip(dth, dR or dth, strict=True)]

    def new_output(self) -> Tensor:
        """Make what `grid.put` fills."""
        like = self.call.q.new_empty(0, dtype=self.plan.out_dtype(self.call))
        return self.grid.new(like, self.B, self.T, self.H, self.plan.derivation.out_width)

    def held(self) -> list[Tensor]:
        """The state of the call, by rows."""
        c = self.call
        return [x.flatten(0, 1).contiguous() for x in (*c.anchor.values(), *c.registers.values())]

    def rowed(self, x: Tensor) -> Tensor:
        """Split rows: (P, ...) -> (B, H, ...)."""
        return x.unflatten(0, (self.B, self.H))

    def whole(self, state: list[Tensor]) -> list[Tensor]:
        return state if len(state) > self.L else state + self.start(state)


def _power(n: int) -> int:
    """Return the largest power of two up to n, 1 at least."""
    return 1 << (max(1, n).bit_length() - 1)


def run_forward(plan: Plan, call: Call, checkpoints: int, backend: str) -> list[Tensor]:
    """Return [o, *anchor, *registers, position, *checkpoints of anchor, *of registers]."""
    run = _runs_whole(backend, plan, call, lambda whole, run: whole.forward(run, checkpoints))
    if isinstance(run, list):
        return run
    state = run.held()
    saved = [x.new_empty(checkpoints, *x.shape) for x in state[: checkpointed(plan, call)]]
    G = -(-run.blocks // checkpoints) if checkpoints else run.blocks + 1
    o = run.new_output()

    def visit(n: int, state: list[Tensor]) -> list[Tensor]:
        if checkpoints and n % G == 0:
            held = state if len(saved) <= len(state) else run.whole(state)
            for buffer, x in zip(saved, held, strict=False):
                buffer[n // G] = x
        return run.enter(n, state)

    for piece in run.grid.pieces(run.at_once):
        way = plan.way(run.grid.variants[piece.start], "forward")
        state, (y,), _ = way.run(piece, run.given(piece, _none), state, visit, run.rows, run.once(way))
        run.grid.put(o, piece, y.unflatten(0, (len(piece), run.B, run.H)))
    lead = (run.B, run.H)
    after = [x.unflatten(0, lead) for x in run.whole(state)]
    return [run.grid.done(o), *after, run.grid.position, *(x.unflatten(1, lead) for x in saved)]


def checkpointed(plan: Plan, call: Call) -> int:
    """Count the tensors of a checkpoint: the anchors alone where every block is certain to start its registers anew."""
    d, L = plan.derivation, len(call.anchor)
    known = all(d.inner.rule.resets) and d.block is None
    return L if known and not call.carried and call.mask is None and call.reset is None else 2 * L


def _none(x: Input) -> Tensor:
    raise AssertionError(x)


class Gradients:
    """Gradients of a call's tensors, filled in piece by piece."""

    def __init__(self, run: Run_) -> None:
        call, g = run.call, run.grid
        self.run = run
        self.tokens = {
            n: g.new(x, *x.shape) for n, x in (("q", call.q), ("k", call.k), ("v", call.v), *call.gates.items())
        }
        self.sums = {("slow", name): torch.zeros_like(x) for name, x in call.slow.items()}
        self.sums |= {("init", name): torch.zeros_like(x) for name, x in call.init.items()}
        self.offset = None if call.offset is None else torch.zeros_like(call.offset)

    def add(self, x: Input, piece: range, value: Tensor) -> None:
        """Add the gradient of an input of some blocks: (n, B, H, ...), or already summed over the blocks."""
        g = self.run.grid
        if (x.part, x.name) in self.sums:
            self.sums[x.part, x.name] += value.sum((0, 1, 2) if x.over == "shared" else (0, 1))
        elif x.name == "offset":
            assert self.offset is not None
            blocks, W = slice(piece.start, piece.stop), g.variants[piece.start].width
            index, keep = g.i[blocks, :, :W].long() - 1, g.valid[blocks, :, :W]
            self.offset.index_add_(0, index.flatten(), (value.sum(2) * keep).flatten())
        elif x.part in ("q", "k", "v", "gates"):
            g.put(self.tokens[x.name], piece, value)

    def flat(self, state: list[Tensor]) -> list[Tensor]:
        """Return the gradient of every floating tensor of the call, in order; state: of the one it began with."""
        run, call, L = self.run, self.run.call, self.run.L
        if len(state) == L:
            state = state + [torch.zeros_like(x) for x in run.start(state)]
        state = [x.unflatten(0, (run.B, run.H)) for x in state]
        names, done = list(call.anchor), {n: run.grid.done(x) for n, x in self.tokens.items()}
        tree = call._replace(
            q=done["q"],
            k=done["k"],
            v=done["v"],
            gates={name: done[name] for name in call.gates},
            slow={name: self.sums["slow", name] for name in call.slow},
            anchor=dict(zip(names, state[:L], strict=True)),
            registers=dict(zip(names, state[L:], strict=True)),
            init={name: self.sums["init", name] for name in call.init},
            offset=self.offset,
        )
        return [x for x, y in zip(_flat(tree), _flat(call), strict=True) if y.is_floating_point()]


def run_backward(
    plan: Plan, call: Call, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int, backend: str
) -> list[Tensor]:
    """Return the gradient of every floating tensor of `call`, in order."""
    run = _runs_whole(backend, plan, call, lambda whole, run: whole.backward(run, saved, cotangents, checkpoints))
    if isinstance(run, list):
        return run
    g = run.grid
    G = -(-run.blocks // checkpoints)
    do, state = cotangents[0], [x.flatten(0, 1).contiguous() for x in cotangents[1:]]
    saved = [x.flatten(1, 2) for x in saved]
    gradients = Gradients(run)

    states: dict[int, list[Tensor]] = {}
    stacks: dict[range, list[Tensor] | None] = {}

    def note(n: int, state: list[Tensor]) -> list[Tensor]:
        states[n] = run.enter(n, state)
        return states[n]

    span = G * max(1, run.at_once_back // G)
    for start in reversed(range(0, run.blocks, span)):
        stop = min(start + span, run.blocks)
        states.clear()
        stacks.clear()
        pieces = g.pieces(run.at_once_back, start, stop)
        for group in range(start, stop, G) if G > 1 else ():
            held = [x[group // G] for x in saved]
            for piece in g.pieces(run.at_once_back, group, min(group + G, stop)):
                if len(piece) == 1 and piece.stop in (group + G, stop):
                    note(piece.start, held)  # what comes after it is known
                else:
                    way = plan.way(g.variants[piece.start], "advance")
                    held, _, stacks[piece] = way.run(
                        piece, run.given(piece, _none), held, note, run.rows, run.once(way)
                    )
        if G == 1:
            stacks |= {piece: [x[piece.start : piece.stop].flatten(0, 1) for x in saved] for piece in pieces}
        for piece in reversed(pieces):
            variant = g.variants[piece.start]
            way, wants = plan.way(variant, "reverse"), plan.step(variant).wants
            inputs = way.inputs[: len(wants)]
            order = {x: k for k, x in enumerate(x for x in inputs if x.part in ("th", "R"))}

            stack = stacks.get(piece)

            def more(
                x: Input, piece: range = piece, order: dict[Input, int] = order, stack: list[Tensor] | None = stack
            ) -> Tensor:
                if x.part == "cotangent":
                    return g.take(do, piece).flatten(0, 2)
                return torch.cat([states[n][order[x]] for n in piece]) if stack is None else stack[order[x]]

            state, found_, _ = way.run(piece[::-1], run.given(piece, more), state, run.turn, run.rows, run.once(way))
            rest = [x for x, w in zip(inputs, wants, strict=True) if w and x.part not in ("th", "R")]
            for x, value in zip(rest, found_, strict=True):
                gradients.add(x, piece, value.unflatten(0, (len(piece), run.B, run.H)))
    return gradients.flat(state)


# -- the op ------------------------------------------------------------------------------------------------------
# The op takes a flat list and a key, "program|form|backend|optional tensors": plain strings, so that compiled code may hold them.


class Source(Protocol):
    """What stands behind a key: a program, which knows its names and makes its plans."""

    @property
    def tensor_names(self) -> tuple[list[str], list[str], list[str]]: ...  # gates of (B, T, H), leaves, slow
    def plan(self, K: int, dtype: torch.dtype, form: str) -> Plan: ...


_sources: WeakValueDictionary[str, Source] = WeakValueDictionary()
_count = itertools.count()


def register(source: Source) -> str:
    """Name a program, for keys."""
    name = f"program{next(_count)}"
    _sources[name] = source
    return name


def _flat(call: Call) -> list[Tensor]:
    optional = [x for x in (call.offset, call.mask, call.reset) if x is not None]
    named = [
        *call.gates.values(),
        *call.slow.values(),
        *call.anchor.values(),
        *call.registers.values(),
        *call.init.values(),
    ]
    return [call.q, call.k, call.v, call.position, *named, *optional]


def _call(key: str, tensors: Sequence[Tensor]) -> tuple[Plan, Call, str]:
    name, form, backend, optional = key.split("|")
    source, rest = _sources[name], iter(tensors)
    gates, leaves, slow = source.tensor_names
    q, k, v, position = (next(rest) for _ in range(4))

    def take(names: list[str]) -> Leaves:
        return {n: next(rest) for n in names}

    gate, rest_slow, anchor, registers, init = take(gates), take(slow), take(leaves), take(leaves), take(leaves)
    given = optional.split(",")
    extra = {n: next(rest) for n in given if n not in ("", "carried")}
    call = Call(
        q, k, v, gate, rest_slow, anchor, registers, position, init,
        extra.get("offset"), extra.get("mask"), extra.get("reset"), "carried" in given,
    )  # fmt: skip
    return source.plan(q.shape[-1], call.dtype, form), call, backend


def _own(found: Iterable[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that an operator may: none that it was given, each laid out as its fake says."""
    theirs = {x.data_ptr() for x in given}
    return [x.clone(memory_format=torch.contiguous_format) if x.data_ptr() in theirs else x.contiguous() for x in found]


@torch.library.custom_op("dualform::scan", mutates_args=())
def scan_op(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call, backend = _call(key, tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _own(run_forward(plan, call, checkpoints, backend), tensors)


@scan_op.register_fake
def _(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call, _ = _call(key, tensors)
    held = [*call.anchor.values(), *call.registers.values()]
    o = call.q.new_empty(*call.q.shape[:3], plan.derivation.out_width, dtype=plan.out_dtype(call))
    return [
        o,
        *(x.new_empty(x.shape) for x in held),
        torch.empty_like(call.position),
        *(x.new_empty(checkpoints, *x.shape) for x in held[: checkpointed(plan, call)]),
    ]


@torch.library.custom_op("dualform::scan_backward", mutates_args=())
def scan_backward_op(
    tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int
) -> list[Tensor]:
    plan, call, backend = _call(key, tensors)
    given = [*tensors, *saved, *cotangents]
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _own(run_backward(plan, call, saved, cotangents, checkpoints, backend), given)


@scan_backward_op.register_fake
def _(tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x.is_floating_point()]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.key, ctx.checkpoints = inputs
    _, call, _ = _call(ctx.key, tensors)
    ctx.held = len(call.anchor) + len(call.registers)
    ctx.count = len(tensors)
    ctx.outputs = [(x.shape, x.dtype) for x in output[: 1 + ctx.held]]
    ctx.set_materialize_grads(False)  # else the checkpoints get gradients of their size, all zero
    ctx.save_for_backward(*tensors, *output[2 + ctx.held :])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], None, None]:
    held = ctx.saved_tensors  # read once: a checkpointed region gives them only once
    tensors, saved = list(held[: ctx.count]), list(held[ctx.count :])
    given = zip(grads, ctx.outputs, strict=False)
    cotangents = [tensors[0].new_zeros(shape, dtype=dtype) if g is None else g for g, (shape, dtype) in given]
    found = iter(scan_backward_op(tensors, saved, cotangents, ctx.key, ctx.checkpoints))
    return [next(found) if x.is_floating_point() else None for x in tensors], None, None


scan_op.register_autograd(_backward, setup_context=_setup)


def checkpoints_for(T: int, chunk: int, remat: str | int | None, nbytes: int, keep: int) -> int:
    """Count checkpoints of nbytes each: G mini-batches one, None all.

    "auto" keeps every state while that takes at most `keep` bytes, else one per power of two near the root of their number.
    """
    N = -(-T // chunk)
    if remat is None:
        return N + 1
    if isinstance(remat, int):
        return N // remat + 1
    if torch.compiler.is_compiling():  # coarse steps, so that a new length rarely compiles anew
        return next(K for K in (4, 16, 64, 256, 1024) if K * K > N or K == 1024)
    return N if N * nbytes <= keep else -(-N // (1 << (N.bit_length() // 2)))


def _stepped(name: str, form: str, backend: str, call: Call, overwrite: bool) -> list[Tensor] | None:
    """Run one token as plain a way as there is: without an op around it."""
    alone = call.q.shape[1] == 1 and call.carried and call.mask is None and call.reset is None
    if not alone or type(call.q) is not Tensor or torch.compiler.is_compiling() or _transforms():
        return None
    plan = _sources[name].plan(call.q.shape[-1], call.dtype, form)
    plan.counts["tokens"] += 1
    whole = found(chosen(backend, plan, call)).whole
    try:
        return None if whole is None else whole.step(plan, call, overwrite)
    except BackendError:
        return None  # the op says why


def scan(
    name: str, form: str, backend: str, call: Call, chunk: int, remat: str | int | None, overwrite: bool = False
) -> list[Tensor]:
    """Run the op for a registered program: [o, *anchor, *registers, position]. overwrite: the state given may be lost."""
    tensors = _flat(call)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not learns and (stepped := _stepped(name, form, backend, call, overwrite)) is not None:
        return stepped
    state = keep = 0
    if learns and not torch.compiler.is_compiling():  # there the op alone chooses, and sizes may be symbols
        state = sum(x.nbytes for x in call.anchor.values())
        keep = found(chosen(backend, _sources[name].plan(call.q.shape[-1], call.dtype, form), call)).keep
    checkpoints = checkpoints_for(call.q.shape[1], chunk, remat, state, keep) if learns else 0
    held = len(call.anchor) + len(call.registers)
    given = {"offset": call.offset, "mask": call.mask, "reset": call.reset, "carried": call.carried or None}
    key = f"{name}|{form}|{backend}|{','.join(n for n, x in given.items() if x is not None)}"
    return scan_op(tensors, key, checkpoints)[: 2 + held]

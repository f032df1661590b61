"""The backend "cpp": stretches of mini-batches of one kind, each in one call of compiled code."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, fx

from dualform.graphs.trace import source_line
from dualform.kernels import cpp_rows, cpp_slices, targets
from dualform.kernels.dialect import Unit
from dualform.kernels.launch import Native, Place, compiled, placed
from dualform.kernels.lowering import specialised
from dualform.kernels.ops import Unsupported
from dualform.kernels.targets import Direction, Kinds, Role
from dualform.learning.backends import Backend, BackendError, Ready, Whole, Words, backends
from dualform.learning.call import Call
from dualform.learning.grid import Variant
from dualform.learning.loop import Gradients, GridCall
from dualform.learning.plan import Input, Plan
from dualform.learning.transforms import TRACING
from dualform.storages import memory_of

Tensors = Mapping[str, Callable[..., Tensor]]  # by role: the tensor of an argument
Found = Mapping[tuple[str, object], Tensor]
M = TypeVar("M")


class NativeUnit(NamedTuple):
    native: Native
    arguments: tuple[Role, ...]


@dataclass(eq=False)
class NativeFunctions:
    """What was compiled for a plan: functions by kind of block, direction, how they end,
    slices and the caller's types."""

    functions: dict[tuple[Variant, str, bool | None, bool, Kinds], NativeUnit] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)  # what one token has at each place of its mini-batch


# Multiplications and additions, both directions, from which a call repays some seconds of compiling (LAB.md).
WORTH_COMPILING = 2e8
SLICED = 32  # mini-batches from which a stretch is cut in slices, if rows are few
TOKENS_WORTH_COMPILING = 1000  # one by one: each saves a millisecond or two


def _kinds(plan: Plan, call: Call) -> Kinds:
    """Say which of the caller's tensors have fewer digits than are computed with."""
    wide, o = call.dtype, plan.out_dtype(call)
    found = [((part, part), getattr(call, part).dtype) for part in ("q", "k", "v")]
    found += [(("gates", name), x.dtype) for name, x in call.gates.items()]
    found += [(("o", ""), o), (("cotangent", "0"), o)]
    return tuple(one for one in found if one[1] != wide)


def described(plan: Plan, variant: Variant, direction: str, full: bool | None = None, kinds: Kinds = ()) -> Direction:
    """Describe a direction of a kind of block. full: whether its mini-batches end with it, where that is known."""
    step, inputs, dtype, name = plan.step(variant), plan.inputs(variant), plan.derivation.dtype, str(variant)
    if direction == "backward":
        return targets.backward(step.plain, step.reverse, inputs, step.wants, step.num_outputs, dtype, name, kinds)
    end = {} if full is None else {k: torch.tensor(full) for k, x in enumerate(inputs) if x.part == "full"}
    return targets.forward(specialised(step.plain, end), inputs, dtype, name, kinds)


def written(
    plan: Plan, variant: Variant, direction: str, full: bool | None = None, slices: bool = False, kinds: Kinds = ()
) -> Unit:  # fmt: skip
    """Write a direction. slices: for few rows."""
    try:
        return (cpp_slices if slices else cpp_rows).unit(described(plan, variant, direction, full, kinds))
    except Unsupported as error:
        raise Unsupported(error.node, line_of(plan, error.node), error.why) from None


def line_of(plan: Plan, node: fx.Node) -> str:
    """Name the learner's line that asked for an op, if it is there under the same name."""
    traced = (n for a in plan.derivation.analyses.values() for n in a.nodes)
    return next((source_line(n) for n in traced if n.target == node.target), "")


def made(
    plan: Plan, call: Call, variant: Variant, direction: str, full: bool | None = None, slices: bool = False
) -> NativeUnit:
    """Return a direction's compiled function; made once per plan, and per kind of the caller's tensors."""
    key, found = (
        (variant, direction, full, slices, kinds := _kinds(plan, call)),
        plan.natives.of(NativeFunctions).functions,
    )
    with TRACING if key not in found else nullcontext():
        if key not in found:
            unit = written(plan, variant, direction, full, slices, kinds)
            native = Native(compiled(unit.text), unit.flops, plan.derivation.dtype, slices)
            found[key] = NativeUnit(native, unit.arguments)
        return found[key]


def cut(rows: int, count: int) -> bool:
    """Is a stretch of so many mini-batches cut in slices: are there threads for two of a row, enough to fill them?"""
    return count >= SLICED and torch.get_num_threads() >= 2 * rows


ONE = Variant(1, fresh=False, dense=True, opens=False)  # a token that goes on with a state


def _marks(chunk: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one token has at each place of its mini-batch."""
    place = torch.arange(1, chunk + 1)
    return {"i": place.to(dtype), "valid": torch.ones(chunk, dtype=dtype), "full": place == chunk}


def _stretches(run: GridCall, start: int, end: int) -> list[range]:
    """Cut blocks into runs of one kind whose state passes from one to the next as it is."""
    g, found = run.grid, []
    while start < end:
        stop, v = start + 1, g.variants[start]
        steady = run.known(start) != run.returns_registers(start)
        if steady and (g.spans is None or v.dense):
            while stop < end and g.variants[stop] == v:
                stop += 1
        found.append(range(start, stop))
        start = stop
    return found


def _spread(run: GridCall, x: Input, piece: range, do: Tensor | None = None) -> Tensor:
    """View an input as (n, B, H, ...)."""
    if x.part == "cotangent":
        assert do is not None
        return run.grid.take(do, piece)
    if x.over != "block":
        fixed, lead = run.fixed(x), (len(piece), run.B, run.H)[: 2 if x.over == "heads" else 3]
        return fixed.expand(*lead, *fixed.shape)
    found = run.of_blocks(x, piece)
    assert found is not None
    return found


class Stretches(Whole, Generic[M]):
    """Runs calls by stretches, each by what is `made` for it."""

    @abstractmethod
    def check(self, call: Call) -> None:
        """Refuse calls that are not for this backend."""

    @abstractmethod
    def made(self, run: GridCall, piece: range, direction: str) -> M:
        """Return what runs a stretch."""

    def again(self, plan: Plan, call: Call, given: list[Tensor], words: Words, ready: Ready) -> list[Tensor]:
        return ready()()

    def as_run(self, name: str, run: GridCall, backward: bool) -> tuple[list[str], tuple[str, ...]]:
        return [name], ()

    def seen(self, run: GridCall, way: str) -> bool | None:
        return None

    def trial(self) -> AbstractContextManager[None]:
        return nullcontext()

    def instead(self) -> Mapping[str, object] | None:
        return None

    @abstractmethod
    def _call(self, run: GridCall, made: M, tensors: Tensors, count: int, G: int, phase: int) -> Found | None:
        """Run a direction over a stretch; G mini-batches per kept state, 0: none is kept.

        Return by argument what was not written where it was to be, if anything: gradients that are sums, in parts.
        """

    def forward(self, run: GridCall, checkpoints: int) -> list[Tensor]:
        call, grid = run.call, run.grid
        self.check(call)
        state = run.held()
        saved = run.new_checkpoints(state, checkpoints)
        G = -(-run.blocks // checkpoints) if checkpoints else 0
        o = run.new_output()
        for piece in _stretches(run, 0, run.blocks):
            state = self._advance(run, piece, state, o, saved, G)
        after = [run.rowed(x) for x in run.whole(state)]
        return [grid.done(o), *after, grid.position, *(x.unflatten(1, (run.B, run.H)) for x in saved)]

    def _advance(
        self, run: GridCall, piece: range, state: list[Tensor], o: Tensor | None, saved: list[Tensor], G: int
    ) -> list[Tensor]:
        """Run a stretch forward: write its outputs and kept states, return the state after it."""
        n, native = piece.start, self.made(run, piece, "forward")
        before = run.enter(n, state)
        after = [torch.empty_like(x) for x in run.whole(state)[: (1 + run.returns_registers(n)) * run.L]]
        y = None if o is None else run.grid.place(o, piece)
        apart = y is None
        if y is None:
            shape = (len(piece), run.B, run.H, run.grid.variants[n].width, run.plan.derivation.out_width)
            y = run.call.q.new_empty(shape, dtype=run.plan.out_dtype(run.call))
        kept = range(-(-n // G), (piece.stop - 1) // G + 1) if G else range(0)
        known = before[len(saved) :]  # to be at their start

        def begins(k: int) -> Tensor:
            if n == 0 and k < run.L and not run.call.carried:  # read where they lie
                w = [*run.call.init.values()][k]
                return w.expand(1, run.B, *w.shape)
            return run.rowed(before[k])[None]

        keeps = [*(x[kept.start : kept.stop] for x in saved), *(x.new_empty(len(kept), *x.shape) for x in known)]
        tensors = {
            "o": lambda _: y, "before": begins,
            "after": lambda k: run.rowed(after[k])[None],
            "kept": lambda k: keeps[k].unflatten(1, (run.B, run.H)), "input": lambda x: _spread(run, x, piece),
        }  # fmt: skip
        self._call(run, native, tensors, len(piece), G, n - kept.start * G)
        if apart and o is not None:
            run.grid.put(o, piece, y)
        if len(saved) > len(before):
            for k in kept:
                for w, r in zip(saved[: run.L], saved[run.L :], strict=True):
                    r[k] = run.start([w[k]])[0]
        return after

    def backward(self, run: GridCall, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int) -> list[Tensor]:
        do, turned = cotangents[0], [x.flatten(0, 1).contiguous() for x in cotangents[1:]]
        saved = [x.flatten(1, 2) for x in saved]
        gradients = Gradients(run)
        for piece, G, starts in self._jobs(run, saved, -(-run.blocks // checkpoints)):
            turned = self._reverse(run, piece, G, starts, turned, do, gradients)
        return gradients.flat(turned)

    def _jobs(self, run: GridCall, saved: list[Tensor], G: int) -> Iterator[tuple[range, int, list[Tensor]]]:
        """Yield stretches from the last to the first: with blocks per kept state, and these states."""
        every, stop = _stretches(run, 0, run.blocks), run.blocks
        while stop > 0:
            group = (stop - 1) // G
            while every[-1].start >= stop:
                every.pop()
            if every[-1].start <= group * G:  # with all groups before it that lie in the same stretch
                group = -(-every[-1].start // G)
                count = 2 * run.L if not run.known(group * G) else run.L
                yield range(group * G, stop), G, [x[group : (stop - 1) // G + 1] for x in saved[:count]]
            else:
                pieces = _stretches(run, group * G, stop)
                held, starts = [x[group] for x in saved], []
                for piece in pieces:
                    starts.append([x[None] for x in run.enter(piece.start, held)])
                    held = self._advance(run, piece, held, None, [], 0)
                for piece, start in zip(reversed(pieces), reversed(starts), strict=True):
                    yield piece, len(piece), start
            stop = group * G

    def _reverse(
        self, run: GridCall, piece: range, G: int, starts: list[Tensor], turned: list[Tensor], do: Tensor,
        gradients: Gradients,
    ) -> list[Tensor]:  # fmt: skip
        """Run a stretch in reverse: fill in gradients, return that of the state it began with."""
        native = self.made(run, piece, "backward")
        turned = run.turn(piece.stop - 1, turned)
        turned = turned[: (1 + run.returns_registers(piece.start)) * run.L]
        before = [torch.empty_like(x[0]) for x in starts]
        placed: list[tuple[Input, Tensor]] = []

        def gradient(x: Input) -> Tensor:
            tokens = gradients.tokens.get(x.name) if x.over == "block" else None
            own = None if tokens is None else run.grid.place(tokens, piece)
            if own is None:
                shape = (len(piece) if x.over == "block" else 1, *_spread(run, x, piece).shape[1:])
                own = do.new_empty(shape, dtype=run.call.dtype if tokens is None else tokens.dtype)
                placed.append((x, own))
            return own

        tensors = {
            "input": lambda x: _spread(run, x, piece, do), "kept": lambda k: starts[k].unflatten(1, (run.B, run.H)),
            "cotangent": lambda k: run.rowed(turned[k])[None], "turned": lambda k: run.rowed(before[k])[None],
            "gradient": gradient,
        }  # fmt: skip
        found = self._call(run, native, tensors, len(piece), G, 0) or {}
        for x, value in placed:
            gradients.add(x, piece, found.get(("gradient", x), value))
        return before


class _Sequence(Stretches[NativeUnit]):
    """Runs stretches by compiled functions."""

    def suits(self, plan: Plan, call: Call) -> bool:
        if call.q.device.type != "cpu":
            return False
        if plan.natives.of(NativeFunctions).functions:  # for a longer call: what follows it stays there
            return True
        if call.q.shape[1] == 1:
            return plan.natives.tokens > TOKENS_WORTH_COMPILING
        return call.q[..., 0].numel() >= self._enough(plan)

    def says(self, plan: Plan) -> str:
        many, single = f"{self._enough(plan):,} tokens x heads on", f"{TOKENS_WORTH_COMPILING:,} single tokens"
        made = (
            "compiled already"
            if plan.natives.of(NativeFunctions).functions
            else f"from {many}, or {single}, which repay compiling"
        )
        return f"on the CPU, {made}, few rows in slices beside each other"

    @staticmethod
    def _enough(plan: Plan) -> int:
        """Count the tokens of single heads from which a call repays compiling."""
        return math.ceil(WORTH_COMPILING / (12 * sum(p.numel() for p in plan.derivation.parts.fast.values())))

    def schedule(self, plan: Plan, variant: Variant) -> dict[str, Unit]:
        return {way: written(plan, variant, way) for way in ("forward", "backward")}

    def check(self, call: Call) -> None:
        if call.q.device.type != "cpu":
            what = f"cpp: q is on {call.q.device}; expected the CPU, whose code this backend makes."
            raise BackendError(f"{what} Use backend='auto', or move it.")

    def made(self, run: GridCall, piece: range, direction: str) -> NativeUnit:
        slices = cut(run.B * run.H, len(piece))
        return made(run.plan, run.call, run.grid.variants[piece.start], direction, slices=slices)

    def step(self, plan: Plan, call: Call, overwrite: bool) -> list[Tensor] | None:
        first, chunk, (B, _, H, _) = int(call.state.position[0]), plan.derivation.chunk, call.q.shape
        held = call.held
        alike = B == 1 or not bool((call.state.position != first).any())
        if not (alike and all(x.is_contiguous() for x in held) and 0 <= first < chunk):
            return None
        # A state that nothing has been read into yet is the weights themselves.
        ours = overwrite and not set(map(memory_of, held)) & set(map(memory_of, call.init.values()))
        native, size = made(plan, call, ONE, "forward", first + 1 == chunk), call.dtype.itemsize
        own, slow = plan.natives.of(NativeFunctions), plan.derivation.constants | call.slow
        marks = own.marks = own.marks or _marks(chunk, call.dtype)
        after = held if ours else [torch.empty_like(x) for x in held]
        o = call.q.new_empty(B, 1, H, plan.derivation.out_width, dtype=plan.out_dtype(call))

        def tokens(x: Tensor) -> Place:
            row, token, head, *rest = x.stride()
            return (x.data_ptr(), 0, row, head, token, *rest)

        def given(x: Input) -> Place:
            if x.over != "block":
                value = (slow if x.part == "slow" else call.init)[x.name]
                return (value.data_ptr(), 0, 0, *[0] * (x.over == "shared"), *value.stride())
            if x.part in marks:
                return (marks[x.part].data_ptr() + first * size,)
            if x.name == "offset" and call.offset is not None:
                return (call.offset.data_ptr() + first * call.offset.stride(0) * size,)
            return tokens(call.gates[x.name] if x.part == "gates" else getattr(call, x.part))

        places = {
            "o": lambda _: tokens(o), "input": given, "kept": lambda _: (),
            "before": lambda k: (held[k].data_ptr(), 0, *held[k].stride()),
            "after": lambda k: (after[k].data_ptr(), 0, *after[k].stride()),
        }  # fmt: skip
        native.native([places[role](what) for role, what in native.arguments], B * H, H, 1, 0, 0)
        return [o, *after, (call.state.position + 1) % chunk]

    @staticmethod
    def _call(  # pyright: ignore
        run: GridCall, made: NativeUnit, tensors: Tensors, count: int, G: int, phase: int
    ) -> None:  # fmt: skip
        given = [tensors[role](what) for role, what in made.arguments]  # alive until the call is over
        made.native([placed(x) for x in given], run.B * run.H, run.H, count, G, phase)


def never(graph: fx.GraphModule, examples: Callable[[], list[Tensor]]) -> NoReturn:
    """What such a backend has in the place of `prepare`."""
    raise AssertionError("the loop runs this backend's calls whole")


@backends.record(
    name="cpp", formula="C++ made of the traced graphs, compiled on the spot", source="this project, kernels/"
)
def cpp() -> Backend:
    """Compile the step and its vjp to code of this machine; needs a C++ compiler, the first call takes some seconds."""
    return Backend(never, whole=_Sequence(), keep=0)  # computing a state again costs no more than a fresh page

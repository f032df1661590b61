"""The backend "triton": stretches of mini-batches of one kind, each in one kernel.

Which stretch, which tensors and which kept states are what they are in C++ (`backend`);
here a stretch's kernels are written, and run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dualform.bounded import Bounded
from dualform.graphs.edit import results_of
from dualform.kernels import triton_launch, triton_seen
from dualform.kernels.backend import ONE, Found, Stretches, Tensors, _stretches, line_of, never
from dualform.kernels.lowering import specialised
from dualform.kernels.ops import Unsupported
from dualform.kernels.tape import recorded
from dualform.kernels.triton_choice import cut, launch_for, tried_next
from dualform.kernels.triton_kernel import Argument, Kernel, Outside, goal_of, held_in
from dualform.kernels.triton_launch import Launch
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_outside import computed
from dualform.kernels.triton_schedule import (
    Refused,
    TileDirection,
    advance_direction,
    forward_direction,
    reverse_direction,
)
from dualform.kernels.triton_slices import sliced
from dualform.kernels.triton_token import Token, written_over
from dualform.kernels.triton_trial import trial
from dualform.learning.backends import Backend, BackendError, backends, backends_key
from dualform.learning.call import Call
from dualform.learning.grid import Variant
from dualform.learning.loop import GridCall
from dualform.learning.plan import Input, Plan
from dualform.learning.transforms import TRACING
from dualform.storages import memory_of

# What a stretch computes again and passes on, for its backward, at once.
STATE_BYTES = 512 * 2**20
KEEP = 5 * 2**28  # states of a call: reading one costs less than the chain that makes it again
GRID = 65535  # programs of a launch along its second axis, at most
PROGRAMS = 2048  # of kernels whose mini-batches are beside each other: some for each of a card's processors
TAPES = 64  # kinds of calls that are remembered step by step
WORTH_COMPILING = 4096  # tokens of single heads from which a call repays some seconds of compiling


@dataclass(eq=False)
class Made:
    """A direction's kernels, and what each of its tensors is, as for C++."""

    kernels: dict[str, list[Kernel]]
    arguments: tuple[tuple[str, Any], ...]
    factors: torch.dtype | None  # the type that products of matrices take, if not that which is computed in
    parts: dict[Any, Any] = field(default_factory=dict)  # what torch computes outside, for so many rows
    seen: bool = False  # was all of it seen right, by the record?

    @cached_property
    def over(self) -> list[Kernel]:
        """The kernels of one token that write its state where it was."""
        return [*map(written_over, self.kernels["forward"])]

    @property
    def said(self) -> str:
        """Say what runs, and what of it torch computes."""
        every = list({k.name: k for some in self.kernels.values() for k in some}.values())
        apart = sum(p.ops for k in every for p in (k.before, k.after) if p)
        return f"{' + '.join(k.name for k in every)}{f' ({apart} ops by torch)' if apart else ''}"


Key = tuple[Variant, str, Precision, bool]  # kind of block, direction, how it multiplies, slices


@dataclass(eq=False)
class Compiled:
    """What was written for a plan, and made ready to be launched."""

    made: dict[Key, Made] = field(default_factory=dict)
    tapes: Bounded[Any] = field(
        default_factory=lambda: Bounded(TAPES)
    )  # of calls by kind: "seen" once, then how they run


def written(
    plan: Plan, variant: Variant, direction: str, precision: Precision, slices: bool = False, full: bool | None = None
) -> dict[str, list[Kernel]]:  # fmt: skip
    """Write a direction's kernels, which run one after the other: "forward", or "advance" and "reverse". slices:
    for few rows."""
    step, inputs, dtype = plan.step(variant), plan.inputs(variant), plan.derivation.dtype
    states = sum(x.part in ("th", "R") for x in inputs)
    alone = step.num_outputs - 1 != states  # such a mini-batch is the only one of its call

    def kernels(d: TileDirection) -> list[Kernel]:
        return sliced(d) if slices and not alone else [d.kernel()]

    try:
        if direction == "forward":
            end = {} if full is None else {k: torch.tensor(full) for k, x in enumerate(inputs) if x.part == "full"}
            plain = specialised(step.plain, end)
            return {
                f"forward {k}".strip(): kernels(forward_direction(plain, inputs, dtype, precision, k))
                for k in ("", "some")
            }
        found = {
            "reverse": kernels(reverse_direction(step.reverse, inputs, step.wants, step.num_outputs, dtype, precision))
        }
        if not alone:
            found["advance"] = [advance_direction(step.plain, inputs, dtype, precision).kernel()]
        return found
    except Refused as error:
        raise Refused(error.node, error.why, line_of(plan, error.node), error.waits) from None
    except Unsupported as error:
        raise Refused(error.node, error.why, line_of(plan, error.node), waits=False) from None


class _Rows(Stretches[Made]):
    """Runs calls by stretches, a program per row."""

    def __init__(self, precision: Precision, warps: int | None, stages: int, slices: bool | None) -> None:
        self.precision, self.warps, self.stages, self.slices = precision, warps, stages, slices

    def suits(self, plan: Plan, call: Call) -> bool:
        device = call.q.device
        if device.type != "cuda" or call.dtype != torch.float32 or triton_launch.lack(device):
            return False
        # Triton's compiler is wrong for some kernels: none is taken that was not seen right.
        if not plan.is_checked and not triton_seen.seen(device):
            return False
        # What follows a longer call stays there.
        return bool(plan.natives.of(Compiled).made) or call.q[..., 0].numel() >= WORTH_COMPILING

    def says(self, plan: Plan) -> str:
        if not torch.cuda.is_available():
            return ""
        why = triton_launch.lack(torch.device("cuda"))
        if why:
            return f"not on this card: {why}"
        device = torch.device("cuda", torch.cuda.current_device())
        record = f"the record of {triton_seen.architecture(device)}"
        ends = {True: f"seen right, by {record}", False: "compared with eager at its first use, apart"}
        where = f"on the card in float32, from {WORTH_COMPILING:,} tokens x heads on"
        if not plan.is_checked:
            ends[False] = "compiled only, eager runs in its place"
            where += f", where {record} has it: prove=False or DUALFORM_PROVE=0 compares nothing at first use"
        made = plan.natives.of(Compiled).made.values()
        each = {end: ", ".join(dict.fromkeys(x.said for x in made if x.seen is seen)) for seen, end in ends.items()}
        return where + "".join(f"; made: {names}, {end}" for end, names in each.items() if names)

    def trial(self) -> AbstractContextManager[None]:
        return trial()

    def instead(self) -> Mapping[str, object] | None:
        return tried_next(warps=self.warps, stages=self.stages, slices=self.slices)

    def as_run(self, name: str, run: GridCall, backward: bool) -> tuple[list[str], tuple[str, ...]]:
        way = "backward" if backward else "forward"
        ways = {self._in_slices(run, piece, way) for piece in _stretches(run, 0, run.blocks)}
        options = {"warps": self.warps, "stages": self.stages, "float32": self.precision.float32}
        each = [backends_key(("triton", options | {"slices": slices})) for slices in sorted(ways)]
        return each, triton_launch.place(run.call.q.device)

    def seen(self, run: GridCall, way: str) -> bool:
        if not (known := triton_seen.seen(run.call.q.device)):
            return False
        used: list[tuple[Made, list[Kernel]]] = []
        if way == "step":
            made = self._made(run.plan, run.call, ONE, "forward", False)
            used = [(made, [*made.over, *made.kernels["forward"]])]
        for piece in _stretches(run, 0, run.blocks) if way != "step" else ():
            made = self.made(run, piece, "forward")
            used.append((made, made.kernels["forward" if way == "backward" else way]))
            if way == "backward":
                made = self.made(run, piece, way)
                used.append((made, [*chain.from_iterable(made.kernels.values())]))
        for made, kernels in used:
            found = all(triton_seen.digest(k, self._launch(k), run.call.kinds) in known for k in kernels)
            made.seen = made.seen or found
            if not found:
                return False
        return True

    def _launch(self, kernel: Kernel) -> Launch:
        return launch_for(kernel, self.warps, self.stages)

    def schedule(self, plan: Plan, variant: Variant) -> dict[str, Kernel]:
        ways = [written(plan, variant, way, self.precision, bool(self.slices)) for way in ("forward", "backward")]
        return {k.name: k for way in ways for name, kernels in way.items() if name != "forward some" for k in kernels}

    def step(self, plan: Plan, call: Call, overwrite: bool) -> list[Tensor] | None:
        held = call.held
        # A state that nothing has been read into yet is the weights themselves.
        ours = overwrite and not set(map(memory_of, held)) & set(map(memory_of, call.init.values()))
        ours = ours and all(x.is_contiguous() for x in held)
        return self.again(plan, call, call.flat(), ("step", ours), lambda: partial(self._step, plan, call, ours))

    def _step(self, plan: Plan, call: Call, ours: bool) -> list[Tensor]:
        self.check(call)
        made, token = self._made(plan, call, ONE, "forward", False), Token(plan, call, ours)
        own = {(role, what): token.tensor(role, what) for role, what in made.arguments if role != "kept"}
        self._run_all(token, made, made.over if ours else made.kernels["forward"], own, 1, 1, 0)
        return [token.o, *token.after, token.position()]

    def again(self, plan: Plan, call: Call, given: list[Tensor], words: Any, ready: Callable[[], Any]) -> list[Tensor]:
        """From the second call with tensors of these shapes on, where nothing else decides what runs,
        as it was written down."""
        where = set[int]()  # rows stand: a call cuts its mini-batches there; the kernel of one token asks by itself
        if words[0] != "step" and call.before is not None:
            where = {*call.before.position.tolist()}
        if len(where) > 1 or call.mask is not None or call.reset is not None or triton_launch.is_watched():
            return ready()()
        kinds = [(x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in given]
        alike = tuple(map(id, given)) if len({*map(id, given)}) < len(given) else ()
        ids = tuple(map(alike.index, alike))
        key = (self.warps, self.stages, self.precision, self.slices, words, *where, call.q.device, ids, *kinds)
        tapes = plan.natives.of(Compiled).tapes
        tape = tapes.get(key)
        if tape is None:
            tapes[key] = "seen"
            return ready()()
        if tape == "seen":
            self.check(call)
            found, made = recorded(ready(), given)
            tapes[key] = made or "never"
            return found
        if tape == "never":
            return ready()()
        with triton_launch.on(call.q.device.index):
            return tape(given)

    def check(self, call: Call) -> None:
        triton_launch.triton_module()
        if call.q.device.type != "cuda" and not triton_launch.is_interpreted():
            raise BackendError(
                f"triton: q is on {call.q.device}; expected a CUDA device, whose code this backend makes. Use "
                "backend='auto', or move it."
            )
        if call.q.device.type == "cuda" and (why := triton_launch.lack(call.q.device)):
            raise BackendError(f"triton: {why} Use backend='inductor' or 'eager'.")
        if call.dtype == torch.float64 and not triton_launch.is_interpreted():
            raise BackendError(
                f"triton: the state is {call.dtype}; expected torch.float32, the most that products of its kernels "
                "have. Use backend='eager'."
            )

    def _in_slices(self, run: GridCall, piece: range, direction: str) -> bool:
        if self.slices is not None:
            return self.slices
        d = run.plan.derivation
        registers = d.inner.rule.num_registers * (not run.known(piece.start))
        entries = sum(p.numel() for p in d.parts.fast.values()) * (1 + registers)
        return cut(entries, run.B * run.H, len(piece), direction)

    def made(self, run: GridCall, piece: range, direction: str) -> Made:
        slices = self._in_slices(run, piece, direction)
        return self._made(run.plan, run.call, run.grid.variants[piece.start], direction, slices)

    def _made(self, plan: Plan, call: Call, variant: Variant, direction: str, slices: bool) -> Made:
        precision = self.precision
        if not triton_launch.is_interpreted():  # which multiplies bits of bfloat16, and adds pairs one by one
            short = call.q.dtype == torch.bfloat16 and call.dtype == torch.float32
            factors = precision.factors or (torch.bfloat16 if short else None)
            narrow = triton_launch.is_narrow(torch.cuda.get_device_capability(call.q.device))
            turns = triton_launch.turns(triton_launch.triton_module().__version__)
            precision = replace(precision, factors=factors, at_once=True, ahead=True, narrow=narrow, turns=turns)
        key, own = (variant, direction, precision, slices), plan.natives.of(Compiled)
        with TRACING if key not in own.made else nullcontext():
            if key not in own.made:
                kernels = written(plan, variant, direction, precision, slices)
                every = [k for some in kernels.values() for k in some]
                inner = ("made", "passed", "slice", *(["before"] if direction == "backward" else []))
                wanted = dict.fromkeys((a.role, a.what) for k in every for a in k.arguments if a.role not in inner)
                for k in every:
                    for part in (k.before, k.after):
                        wanted |= dict.fromkeys(
                            held_in(x, k.kept) for x in (part.inputs if part else ()) if isinstance(x, Input)
                        )
                        wanted |= dict.fromkeys(goal_of(t) for t in (part.targets if part else ()))
                own.made[key] = Made(kernels, tuple(x for x in wanted if x[0] not in inner), precision.factors)
            return own.made[key]

    def _call(self, run: GridCall, made: Made, tensors: Tensors, count: int, G: int, phase: int) -> Found:
        given = {(role, what): tensors[role](what) for role, what in made.arguments}
        if "reverse" in made.kernels:
            self._reverse_of(run, made, given, count, G)
        else:
            self._run_all(run, made, made.kernels["forward some" if G else "forward"], given, count, max(G, 1), phase)
        return given

    def _reverse_of(self, run: GridCall, made: Made, given: dict[Any, Tensor], count: int, G: int) -> None:
        """Run the vjp: some groups at once from the last, their states computed again beside each other."""
        kept = [key for key in given if key[0] == "kept"]
        kinds = {key: self._kept_as(made, key, given[key]) for key in kept}
        passed = sum(x.dtype.itemsize * math.prod(x.shape) for k in made.kernels["reverse"] for x in k.slices)
        again = sum(given[key][0].numel() * kinds[key].itemsize for key in kept) if G > 1 else 0
        nbytes = again + passed * run.B * run.H or 1
        most = min(max(1, STATE_BYTES // (nbytes * G)), GRID) * G
        stops = [*range(most, count, most), count]
        turned: dict[Any, Tensor] = {}
        for stop in reversed(stops):
            start = (stop - 1) // most * most
            own = {key: self._cut(key, x, start, stop, G) for key, x in given.items()}
            sums = [key for key in own if key[0] == "gradient" and key[1].over != "block"]
            if stop != count:
                own |= {("cotangent", k): x for (_, k), x in turned.items()}
                own |= {key: torch.empty_like(own[key][:1]) for key in sums}
            if start and stop - start:
                own |= {key: torch.empty_like(x) for key, x in own.items() if key[0] == "turned"}
            if G > 1 and stop - start > 1:
                own |= self._states(run, made, own, kinds, stop - start, G)
            self._run_all(run, made, made.kernels["reverse"], own, stop - start, 1, 0)
            turned = {key: own[key] for key in own if key[0] == "turned"}
            for key in sums:
                whole = stop == count
                given[key] = own[key] if whole else given[key].sum(0, True).add_(own[key].sum(0, True))

    @staticmethod
    def _cut(key: Any, x: Tensor, start: int, stop: int, G: int) -> Tensor:
        role, what = key
        if role == "kept":
            return x[start // G : -(-stop // G)]
        return x[start:stop] if role == "input" or (role == "gradient" and what.over == "block") else x

    @staticmethod
    def _kept_as(made: Made, key: tuple[str, int], x: Tensor) -> torch.dtype:
        """Say in which type a state is computed again: that of factors, if it is nothing else in reverse."""
        exact = set[int]().union(*(k.exact for k in made.kernels["reverse"]))
        return x.dtype if key[1] in exact else made.factors or x.dtype

    def _states(
        self, run: GridCall, made: Made, given: dict[Any, Tensor], kinds: dict[Any, torch.dtype], count: int, G: int
    ) -> dict[Any, Tensor]:
        """Compute what each mini-batch started from again."""
        (kernel,) = made.kernels["advance"]
        starts = {("before", key[1]): given[key] for key in kinds}
        states = {key: given[key].new_empty(count, *given[key].shape[1:], dtype=kinds[key]) for key in kinds}
        groups = -(-count // G)
        self._run(run, made, kernel, {**given, **starts, **states}, groups, (count, G, 1, 0))
        return states

    def _run_all(
        self, run: GridCall | Token, made: Made, kernels: list[Kernel], given: dict[Any, Tensor], count: int, G: int,
        phase: int,
    ) -> None:  # fmt: skip
        """Run a direction's kernels: what carries the state on row by row,
        the rest in groups of mini-batches beside each other."""
        given |= {
            ("slice", x.name): torch.empty(count, run.B, run.H, *x.shape, dtype=x.dtype, device=run.call.q.device)
            for k in kernels for x in k.slices if ("slice", x.name) not in k.by_torch
        }  # fmt: skip
        for kernel in kernels:
            if kernel.carries or len(kernels) == 1:
                self._run(run, made, kernel, given, 1, (count, count, G, phase))
                continue
            group = max(min(max(run.B * run.H * count // PROGRAMS, 1), 16), -(-count // GRID))
            groups = -(-count // group)
            sums = [(a.role, a.what) for a in kernel.arguments if a.role == "gradient" and a.what.over != "block"]
            own = {key: given[key].new_empty(groups, *given[key].shape[1:]) for key in sums}
            given |= own  # whose parts are summed with all else that is
            self._run(run, made, kernel, given, groups, (count, group, 1, 0))

    def _run(
        self, run: GridCall | Token, made: Made, kernel: Kernel, given: dict[Any, Tensor], groups: int,
        scalars: tuple[int, int, int, int],
    ) -> None:  # fmt: skip
        """Run a kernel with what torch does before it and after."""
        count = scalars[0]
        room = {}
        if kernel.before is not None:
            names = [x.name for x in results_of(kernel.before.graph.graph)]
            found_ = self._torch(
                run, made, kernel, kernel.before, [given[held_in(x, kernel.kept)] for x in kernel.before.inputs], count
            )
            room |= dict(zip(names, found_, strict=True))
        for name, shape, kind in kernel.passed:
            kind = run.call.dtype if kind == torch.bool else kind
            room[name] = run.call.q.new_empty(count, run.B, run.H, *shape, dtype=kind)
        own = [room[a.what] if a.role in ("made", "passed") else given[a.role, a.what] for a in kernel.arguments]
        tensors = [_shaped(x, a) for x, a in zip(own, kernel.arguments, strict=True)]
        if tensors:  # else torch does all of it
            triton_launch.run(kernel, tensors, run.B * run.H, run.H, groups, scalars, self._launch(kernel))
        if kernel.after is None:
            return
        values = [room[x] if isinstance(x, str) else given[held_in(x, kernel.kept)] for x in kernel.after.inputs]
        found_ = self._torch(run, made, kernel, kernel.after, values, count)
        for t, x in zip(kernel.after.targets, found_, strict=True):
            if goal := kernel.by_torch.get(goal_of(t)):
                given[goal_of(t)] = x.to(goal.dtype)
            else:
                given[goal_of(t)].copy_(x.sum(0, keepdim=True) if t.kind == "added" else x)

    @staticmethod
    def _torch(
        run: GridCall | Token, made: Made, kernel: Kernel, part: Outside, values: list[Tensor], count: int
    ) -> list[Tensor]:
        """Compute what is outside, for the rows of all mini-batches."""
        name = (kernel.name, part is kernel.before)
        return computed(made.parts, name, part, values, (count, run.B, run.H), run.call.q.device)


def _shaped(x: Tensor, a: Argument) -> Tensor:
    assert x.ndim == 3 + a.rank, (a, x.shape)
    return x


@backends.record(
    name="triton", formula="Triton made of the traced graphs, a program per row", source="this project, kernels/"
)
def triton(warps: int | None = None, stages: int = 3, float32: str = "ieee", slices: bool | None = None) -> Backend:
    """Compile the step and its vjp to kernels of a GPU.

    warps: of a program, None: as many as hold the state; stages: mini-batches whose reads are under way, at most;
    float32: how its products are multiplied, "ieee", "tf32" or "tf32x3"; slices: is what need not wait for the state in
    kernels of its own? None: where that was found faster.
    """
    return Backend(never, whole=_Rows(Precision(None, float32), warps, stages, slices), keep=KEEP)

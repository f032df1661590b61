"""Run a chunk program over a sequence: blocks in order, batch and heads at once, as one `torch.library` op each way.

Forward: the traced step, mapped over batch and heads. Backward: its traced vjp in reverse, from checkpoints every G blocks
and the states in between recomputed. Inside an op autograd does not run, so both directions are graphs.

Legend: B batch, T time, H heads, N blocks, G blocks per checkpoint, th anchor, R registers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from dualform.learning.derive import Derivation, flatten, only_outputs, rebuild, trace_fake, undisturbed
from dualform.learning.emit import StepInputs
from dualform.learning.grid import Grid, Variant, arrange
from dualform.learning.simplify import tidy

Leaves = dict[str, Tensor]


class Call(NamedTuple):
    """The tensors of one call; the op takes them as a flat list."""

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


@dataclass(eq=False)
class Batched:
    """A step for (B, H) at once: forward, its state outputs alone, and, when first asked for, its vjp.

    Traced on the CPU whatever the device: in a CUDA backward, autograd's own thread is taken, and a trace that needs it
    would wait for ever.
    """

    traced: fx.GraphModule
    shapes: list[Tensor]  # examples of the inputs
    wants: list[bool]  # which inputs have gradients
    device: torch.device

    @cached_property
    def forward(self) -> fx.GraphModule:
        return placed(self.traced, self.device)

    @cached_property
    def advance(self) -> fx.GraphModule:
        return only_outputs(self.forward, slice(1, None))

    @cached_property
    def vjp(self) -> fx.GraphModule:
        return placed(undisturbed(lambda: _transpose(self)), self.device)


@dataclass(eq=False)
class Plan:
    """A derivation with its batched graphs."""

    derivation: Derivation
    compiled: dict[tuple[Variant, int, int, torch.device], Batched] = field(default_factory=dict)

    def batched(self, variant: Variant, B: int, H: int, device: torch.device) -> Batched:
        key = (variant, B, H, device)
        if key not in self.compiled:
            self.compiled[key] = undisturbed(lambda: _batch(self.derivation, variant, B, H, device))
        return self.compiled[key]


def placed(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Copy a graph so that what it creates is created on a device."""
    if device.type == "cpu":
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    return fx.GraphModule(gm, graph)


def _axes(like: StepInputs, buffers: frozenset[str]) -> tuple[StepInputs, StepInputs]:
    """Say along which axis each input carries batch, and then heads (None: shared)."""

    def tree(over: Callable[[str, str], int | None]) -> StepInputs:
        parts: dict[str, Any] = {}
        for part, value in like._asdict().items():
            if isinstance(value, dict):
                parts[part] = {name: over(part, name) for name in value}
            else:
                parts[part] = None if value is None else over(part, part)
        return StepInputs(**parts)

    def batch(part: str, name: str) -> int | None:
        return None if part in ("slow", "init") else 0

    def heads(part: str, name: str) -> int | None:
        return None if part in ("i", "valid", "full", "opens") or name in buffers else 0

    return tree(batch), tree(heads)


def _batch(derivation: Derivation, variant: Variant, B: int, H: int, device: torch.device) -> Batched:
    step = derivation.step(variant)
    like = step.inputs
    buffers = frozenset({*derivation.parts.buffers, *derivation.constants})
    over_batch, over_heads = _axes(like, buffers)

    def dims(tree: StepInputs) -> tuple[int | None, ...]:
        flat, _ = _pytree.tree_flatten(like)
        marks, _ = _pytree.tree_flatten(tree)
        return tuple(m for x, m in zip(flat, marks, strict=True) if isinstance(x, Tensor))

    b, h = dims(over_batch), dims(over_heads)
    shapes = [
        x.new_empty((*((B,) if i == 0 else ()), *((H,) if j == 0 else ()), *x.shape))
        for x, i, j in zip(flatten(like), b, h, strict=True)
    ]
    forward = tidy(trace_fake(torch.vmap(torch.vmap(step.graph, in_dims=h), in_dims=b), shapes))
    wants = [x.is_floating_point() and not _is_mark(n, like) for n, x in enumerate(shapes)]
    return Batched(forward, shapes, wants, device)


def _transpose(step: Batched) -> fx.GraphModule:
    """Trace the vjp of a batched step: (inputs, cotangents) -> gradients of the inputs that have one."""
    n = len(step.shapes)
    like = step.shapes[0]
    cotangents = [like.new_empty(o.meta["val"].shape) for o in _outputs(step.traced)]

    def reverse(*tensors: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_(w) for x, w in zip(tensors[:n], step.wants, strict=True)]
        leaves = [x for x, w in zip(inputs, step.wants, strict=True) if w]
        outputs = step.traced(*inputs)
        return list(torch.autograd.grad(outputs, leaves, list(tensors[n:]), allow_unused=True, materialize_grads=True))

    return tidy(trace_fake(reverse, step.shapes + cotangents))


def _is_mark(n: int, like: StepInputs) -> bool:
    """Is input n a position or a validity, which have no gradient?"""
    kinds = [part for part, value in like._asdict().items() for _ in flatten(value)]
    return kinds[n] in ("i", "valid")


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    return list(output.args[0])  # type: ignore[arg-type]


@dataclass
class _Run:
    """One call laid out on its grid: what both directions share."""

    plan: Plan
    call: Call

    def __post_init__(self) -> None:
        c = self.call
        self.B, self.T, self.H = c.q.shape[:3]
        d = self.plan.derivation
        self.rule, self.leaves = d.inner.rule, list(c.anchor)
        self.constants = {name: x.to(c.q.device) for name, x in d.constants.items()}
        self.grid: Grid = arrange(self.T, d.chunk, c.position, c.mask, c.reset, c.q.dtype, c.carried, d.block)
        self.laid = {name: self.grid.lay(x, fill=True) for name, x in (("q", c.q), ("k", c.k), ("v", c.v))}
        self.gates = {name: self.grid.lay(x) for name, x in c.gates.items()}

    @property
    def blocks(self) -> int:
        return len(self.grid.variants)

    def known(self, n: int) -> bool:
        v = self.grid.variants[n]
        return v.fresh and all(self.rule.resets) and not v.opens

    def certain(self, n: int) -> bool:
        return self.grid.variants[n].completes(self.plan.derivation.chunk)

    def inputs(self, n: int, th: Leaves, R: Leaves | None) -> StepInputs:
        """Collect block n's inputs."""
        g, v, c = self.grid, self.grid.variants[n], self.call
        W = v.width
        gates = {name: g.block(x, n) for name, x in self.gates.items()}
        i = g.i[n][:, :W]  # type: ignore[index]
        if c.offset is not None:
            token = c.offset[i.long() - 1] if not v.fresh else c.offset[:W].expand(self.B, W)
            gates["offset"] = token[:, None].expand(self.B, self.H, W)
        return StepInputs(
            th=th,
            R=None if self.known(n) else (self.start(th) if R is None else R),
            q=g.block(self.laid["q"], n, fill=True),
            k=g.block(self.laid["k"], n, fill=True),
            v=g.block(self.laid["v"], n, fill=True),
            gates={name: gates[name] for name in self.rule.gates},
            slow=c.slow | self.constants,
            i=None if v.fresh else i,
            valid=None if v.dense else g.valid[n][:, :W],  # type: ignore[index]
            full=None if self.certain(n) else g.full[n],  # type: ignore[index]
            opens=g.opens[n] if v.opens else None,  # type: ignore[index]
            init=c.init if v.opens else None,
        )

    def start(self, th: Leaves) -> Leaves:
        """Registers at their start."""
        return {name: torch.stack([s * w for s in self.rule.start], 2) for name, w in th.items()}

    def batched(self, n: int) -> Batched:
        return self.plan.batched(self.grid.variants[n], self.B, self.H, self.call.q.device)

    def state(self, out: Sequence[Tensor]) -> tuple[Leaves, Leaves | None]:
        """Split a step's state outputs into (th, R)."""
        L = len(self.leaves)
        R = dict(zip(self.leaves, out[L:], strict=True)) if len(out) > L else None
        return dict(zip(self.leaves, out[:L], strict=True)), R

    def group(self, checkpoints: int) -> int:
        return -(-self.blocks // checkpoints) if checkpoints else self.blocks


def packed(inputs: StepInputs) -> list[Tensor]:
    """List a block's tensors with the strides that its graph was traced for."""
    return [x.contiguous() for x in flatten(inputs)]


def run_forward(plan: Plan, call: Call, checkpoints: int) -> list[Tensor]:
    """Return [o, *anchor, *registers, position, *checkpoints of anchor, *of registers]."""
    run = _Run(plan, call)
    d, th, R = plan.derivation, dict(call.anchor), dict(call.registers)
    saved = [x.new_empty(checkpoints, *x.shape) for x in (*th.values(), *R.values())]
    G, laid = run.group(checkpoints), None
    state: tuple[Leaves, Leaves | None] = (th, R)
    for n in range(run.blocks):
        if checkpoints and n % G == 0:
            held = (*state[0].values(), *(state[1] or run.start(state[0])).values())
            for buffer, x in zip(saved, held, strict=True):
                buffer[n // G] = x
        o, *rest = run.batched(n).forward(*packed(run.inputs(n, *state)))
        if laid is None:
            lead = run.laid["v"].shape[:-1]
            laid = o.new_zeros(*lead, d.out_width)
        run.grid.write(laid, n, o)
        state = run.state(rest)
    th, R = state[0], state[1] or run.start(state[0])
    assert laid is not None
    return [run.grid.lift(laid, run.T), *th.values(), *R.values(), run.grid.position, *saved]


def run_backward(
    plan: Plan, call: Call, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int
) -> list[Tensor]:
    """Return the gradient of every floating tensor of `call`, in order."""
    run = _Run(plan, call)
    L, G = len(run.leaves), run.group(checkpoints)
    do = run.grid.lay(cotangents[0])
    dth: Leaves = dict(zip(run.leaves, cotangents[1 : 1 + L], strict=True))
    dR: Leaves = dict(zip(run.leaves, cotangents[1 + L :], strict=True))
    grads = {
        "q": torch.zeros_like(run.laid["q"]),
        "k": torch.zeros_like(run.laid["k"]),
        "v": torch.zeros_like(run.laid["v"]),
    }
    dgates = {name: torch.zeros_like(x) for name, x in run.gates.items()}
    dslow = {name: torch.zeros_like(x) for name, x in call.slow.items()}
    dinit = {name: torch.zeros_like(x) for name, x in call.init.items()}
    doffset = None if call.offset is None else torch.zeros_like(call.offset)
    for group in reversed(range(0, run.blocks, G)):
        held = [x[group // G] for x in saved]
        states: list[tuple[Leaves, Leaves | None]] = [run.state(held)]
        stop = min(group + G, run.blocks)
        for n in range(group, stop - 1):
            states.append(run.state(run.batched(n).advance(*packed(run.inputs(n, *states[-1])))))
        for n in reversed(range(group, stop)):
            th, R = states[n - group]
            inputs, step = run.inputs(n, th, R), run.batched(n)
            returns_R = not (run.certain(n) and all(run.rule.resets))
            if not returns_R:
                dth = (
                    {w: dth[w] + sum(s * dR[w][:, :, k] for k, s in enumerate(run.rule.start)) for w in dth}
                    if any(run.rule.start)
                    else dth
                )
            cots = [run.grid.block(do, n), *dth.values(), *(dR.values() if returns_R else ())]
            flat = packed(inputs)
            got = iter(step.vjp(*flat, *(x.contiguous() for x in cots)))
            back = rebuild(inputs, [next(got) if w else x for w, x in zip(step.wants, flat, strict=True)])
            dth = back.th
            if run.known(n):
                dR = {w: torch.zeros_like(x) for w, x in dR.items()}
            elif R is None:
                assert back.R is not None
                dth = {w: dth[w] + sum(s * back.R[w][:, :, k] for k, s in enumerate(run.rule.start)) for w in dth}
                dR = {w: torch.zeros_like(x) for w, x in dR.items()}
            else:
                assert back.R is not None
                dR = back.R
            for name, x in (("q", back.q), ("k", back.k), ("v", back.v)):
                run.grid.write(grads[name], n, x)
            for name, x in dgates.items():
                run.grid.write(x, n, back.gates[name])
            if doffset is not None:
                W = run.grid.variants[n].width
                index = run.grid.i[n][:, :W].long() - 1  # type: ignore[index]
                keep = back.gates["offset"].sum(1) * run.grid.valid[n][:, :W]  # type: ignore[index]
                doffset.index_add_(0, index.reshape(-1), keep.reshape(-1))
            for name, x in dslow.items():
                if x.is_floating_point():
                    x += back.slow[name]
            if back.init is not None:
                for name, x in dinit.items():
                    x += back.init[name]
    tree = Call(
        *(run.grid.lift(grads[name], run.T) for name in "qkv"),
        gates={name: run.grid.lift(x, run.T) for name, x in dgates.items()},
        slow=dslow,
        anchor=dth,
        registers=dR,
        position=call.position,
        init=dinit,
        offset=doffset,
        mask=call.mask,
        reset=call.reset,
    )
    return [x for x, y in zip(_flat(tree), _flat(call), strict=True) if y.is_floating_point()]


# -- the op ------------------------------------------------------------------------------------------------------
# The op takes a flat list and a key, "program|form|optional tensors": plain strings, so that compiled code may hold them.


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


def _call(key: str, tensors: Sequence[Tensor]) -> tuple[Plan, Call]:
    name, form, optional = key.split("|")
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
    return source.plan(q.shape[-1], q.dtype, form), call


def _own(found: Iterable[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that an operator may: none that it was given, each laid out as its fake says."""
    return [
        x.clone(memory_format=torch.contiguous_format) if any(x is y for y in given) else x.contiguous() for x in found
    ]


@torch.library.custom_op("dualform::scan", mutates_args=())
def scan_op(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call = _call(key, tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _own(run_forward(plan, call, checkpoints), tensors)


@scan_op.register_fake
def _(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call = _call(key, tensors)
    held = [*call.anchor.values(), *call.registers.values()]
    o = call.v.new_empty(*call.v.shape[:3], plan.derivation.out_width)
    return [
        o,
        *(x.new_empty(x.shape) for x in held),
        torch.empty_like(call.position),
        *(x.new_empty(checkpoints, *x.shape) for x in held),
    ]


@torch.library.custom_op("dualform::scan_backward", mutates_args=())
def scan_backward_op(
    tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int
) -> list[Tensor]:
    plan, call = _call(key, tensors)
    given = [*tensors, *saved, *cotangents]
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _own(run_backward(plan, call, saved, cotangents, checkpoints), given)


@scan_backward_op.register_fake
def _(tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x.is_floating_point()]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.key, ctx.checkpoints = inputs
    _, call = _call(ctx.key, tensors)
    ctx.held = len(call.anchor) + len(call.registers)
    ctx.count = len(tensors)
    ctx.outputs = [x.shape for x in output[: 1 + ctx.held]]
    ctx.set_materialize_grads(False)  # else the checkpoints get gradients of their size, all zero
    ctx.save_for_backward(*tensors, *output[2 + ctx.held :])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], None, None]:
    held = ctx.saved_tensors  # read once: a checkpointed region gives them only once
    tensors, saved = list(held[: ctx.count]), list(held[ctx.count :])
    given = zip(grads, ctx.outputs, strict=False)
    cotangents = [tensors[0].new_zeros(shape) if g is None else g for g, shape in given]
    found = iter(scan_backward_op(tensors, saved, cotangents, ctx.key, ctx.checkpoints))
    return [next(found) if x.is_floating_point() else None for x in tensors], None, None


scan_op.register_autograd(_backward, setup_context=_setup)


def checkpoints_for(T: int, chunk: int, remat: str | int | None) -> int:
    """Count checkpoints: "auto" about the square root of the number of mini-batches, G one per G, None one each."""
    N = (T + chunk - 1) // chunk + 1
    if remat is None:
        return N
    if isinstance(remat, int):
        return (N + remat - 1) // remat
    if torch.compiler.is_compiling():  # coarse steps, so that a new length rarely compiles anew
        return next(K for K in (4, 16, 64, 256, 1024) if K * K >= N or K == 1024)
    return math.isqrt(N - 1) + 1


def scan(name: str, form: str, call: Call, chunk: int, remat: str | int | None) -> list[Tensor]:
    """Run the op for a registered program: [o, *anchor, *registers, position]."""
    tensors = _flat(call)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    checkpoints = checkpoints_for(call.q.shape[1], chunk, remat) if learns else 0
    held = len(call.anchor) + len(call.registers)
    given = {"offset": call.offset, "mask": call.mask, "reset": call.reset, "carried": call.carried or None}
    key = f"{name}|{form}|{','.join(n for n, x in given.items() if x is not None)}"
    return scan_op(tensors, key, checkpoints)[: 2 + held]

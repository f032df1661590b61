"""The op: a program over a sequence as one `torch.library` op each way.

It takes a flat list of tensors and a key, a plain string, so that compiled code may hold both. Inside an op autograd
does not run: its backward is an op of its own.

Legend: B batch, T time, H heads.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from dualform.graphs.operators import custom_operator, library
from dualform.graphs.this_thread import compiles, exports, is_looked_at
from dualform.learning import shipped
from dualform.learning.backends import BackendError, backend_of, check_step, chosen, run_backward, run_forward
from dualform.learning.call import Call, Names
from dualform.learning.front_door import FrontDoor
from dualform.learning.grid import variants_of
from dualform.learning.loop import checkpointed, run_visible
from dualform.learning.plan import Plan
from dualform.learning.sites import DerivationError
from dualform.learning.transforms import TRACING, has_tangent, inside, is_one_of_many, on_behalf, undisturbed, watched


class Source(Protocol):
    """What makes plans: a program."""

    door: FrontDoor
    places: dict[str, str]

    @property
    def tensor_names(self) -> Names: ...
    def plan(self, K: int, dtype: torch.dtype, form: str) -> Plan: ...
    def follow(self) -> None: ...
    def as_read(self) -> AbstractContextManager[None]: ...


_sources: WeakValueDictionary[str, Source] = WeakValueDictionary()
_plans: WeakValueDictionary[str, Plan] = WeakValueDictionary()
_compiled: dict[str, Plan] = {}  # what compiled graphs, which hold keys alone, may call at any time
_count = itertools.count()
F = TypeVar("F", bound=Callable[..., object])


def register(source: Source) -> str:
    """Name a program."""
    name = f"program{next(_count)}"
    _sources[name] = source
    return name


def _plan(name: str, form: str, K: int, dtype: torch.dtype) -> Plan:
    """Return a program's plan for a call, under a key of its own: what a program changes into has another."""
    source = _sources[name]
    plan = source.plan(K, dtype, form)
    if not plan.key:
        with TRACING:
            key = plan.key or f"plan{next(_count)}"
            plan.names, plan.asked, _plans[key] = source.tensor_names, (name, K, dtype, form), plan
            plan.key = key  # last: who reads it finds the rest
    return plan


def _constant(f: F) -> F:
    """Mark a function whose result a compiler may keep, as torch.compiler's does at the price of its import."""
    setattr(f, "_dynamo_marked_constant", True)  # noqa: B010
    return f


@_constant
def followed(name: str, modes: tuple[bool, ...]) -> bool:
    """Let a program follow what has changed, before a compiler looks at it."""
    source = _sources[name]
    with source.as_read():
        undisturbed(source.follow, role="holds")
    return True


@_constant
def _key(name: str, form: str, K: int, dtype: torch.dtype) -> str:
    return _plan(name, form, K, dtype).key


@_constant
def _text(name: str, form: str, K: int, dtype: torch.dtype, T: int | None, given: str) -> str:
    """Write a plan for a file that other processes read. T: the length of every call, None if it may vary."""
    with _sources[name].as_read():
        plan, words = _plan(name, form, K, dtype), given.split(",")
        d, (carried, masked, resets) = plan.derivation, (x in words for x in ("carried", "mask", "reset"))
        return undisturbed(lambda: shipped.written(plan, variants_of(T, d.chunk, d.block, carried, masked, resets)))


def _planned(key: str) -> Plan:
    """Find what stands behind a key: "plan|backend|optional tensors"."""
    name = key.partition("|")[0]
    return shipped.read(name) if name.startswith(shipped.MARK) else _plans[name]


def _call(key: str, tensors: Sequence[Tensor]) -> tuple[Plan, Call, str]:
    plan, (_, backend, given) = _planned(key), key.split("|")
    return plan, _read(plan, tensors, given), backend


def _read(plan: Plan, tensors: Sequence[Tensor], given: str) -> Call:
    return Call.of(tensors, plan.names, plan.derivation.inner.rule.start, given)


def _scan_shapes(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call, _ = _call(key, tensors)
    if plan.key:
        _compiled[plan.key] = plan
    held, position = call.held, call.state.position
    o = call.q.new_empty(*call.q.shape[:3], plan.derivation.out_width, dtype=plan.out_dtype(call))
    saved = [x.new_empty(checkpoints, *x.shape) for x in held[: checkpointed(plan, call, checkpoints)]]
    return [o, *(x.new_empty(x.shape) for x in (*held, position)), *saved]


def _seen(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    """The op under a transform of torch.func, as a graph that holds it calls it: ops in its place."""
    plan, call, _ = _call(key, tensors)
    found = run_visible(plan, call)
    return [*found, *(x.new_zeros(checkpoints, *x.shape) for x in found[1 : 1 + checkpointed(plan, call, checkpoints)])]


def _gradient_shapes(
    tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x.is_floating_point()]


@custom_operator("scan_backward", _gradient_shapes)
def scan_backward_op(
    tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor], key: str, checkpoints: int
) -> list[Tensor]:
    plan, call, backend = _call(key, tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return run_backward(plan, call, saved, cotangents, checkpoints, backend)


class _Kept(Protocol):
    """What a forward keeps for its backward."""

    plan: Plan  # which lives as long as the graph
    key: str
    is_direct: bool  # did no operator stand around it?
    checkpoints: int
    count: int  # of the tensors given
    held: int  # of the state
    role: dict[str, bool]
    outputs: list[tuple[torch.Size, torch.dtype]]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _setup(ctx: _Kept, inputs: tuple[list[Tensor], str, int], output: list[Tensor]) -> None:
    tensors, ctx.key, ctx.checkpoints = inputs
    ctx.plan, ctx.is_direct = _planned(ctx.key), False
    _keep(ctx, tensors, output)


def _keep(ctx: _Kept, tensors: Sequence[Tensor], output: Sequence[Tensor]) -> None:
    ctx.held = 2 * len(ctx.plan.names[1])
    ctx.count, ctx.role = len(tensors), dict(inside.__dict__)
    ctx.outputs = [(x.shape, x.dtype) for x in output[: 1 + ctx.held]]
    ctx.set_materialize_grads(False)  # else the checkpoints get gradients of their size, all zero
    ctx.save_for_backward(*tensors, *output[2 + ctx.held :])


def _backward(ctx: _Kept, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    with on_behalf(ctx.role):
        return _gradients(ctx, grads), None, None


def _gradients(ctx: _Kept, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    held = ctx.saved_tensors  # read once: a checkpointed region gives them only once
    tensors, saved = list(held[: ctx.count]), list(held[ctx.count :])
    many = any(g is not None and is_one_of_many(g) for g in grads)
    if many or torch.is_grad_enabled() or watched():  # these gradients will be differentiated again
        return _backward_visibly(ctx.key, tensors, grads)
    cotangents = grads[: len(ctx.outputs)]
    if ctx.is_direct and _is_plain((*tensors, *saved, *(g for g in cotangents if g is not None))):
        _, backend, given = ctx.key.split("|")
        call = _read(ctx.plan, tensors, given)
        with _no_autocast(call.q.device.type):
            found = iter(run_backward(ctx.plan, call, saved, cotangents, ctx.checkpoints, backend))
    else:
        kinds = zip(cotangents, ctx.outputs, strict=True)
        given = [tensors[0].new_zeros(shape, dtype=dtype) if g is None else g for g, (shape, dtype) in kinds]
        found = iter(scan_backward_op(tensors, saved, given, ctx.key, ctx.checkpoints))
    return [next(found) if x.is_floating_point() else None for x in tensors]


def _backward_visibly(key: str, tensors: list[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients as functions of the tensors and of `grads`: through the forward, run again in plain ops."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [x.view_as(x) for x in tensors]  # one given twice has a gradient for each place
        plan, call, _ = _call(key, given)
        outputs = run_visible(plan, call)
        wanted = [x for x in given if x.requires_grad]
        ends = [(y, g) for y, g in zip(outputs, grads, strict=False) if g is not None and y.requires_grad]
        if not ends:
            return [None] * len(given)
        values, cotangents = zip(*ends, strict=True)
        found = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=again, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in given]


def _expect_current(plan: Plan) -> None:
    """Refuse to run, in a compiled graph, what its program was when that is another function by now."""
    name, K, dtype, form = plan.asked or ("", 0, torch.float32, "")
    source = _sources.get(name)
    if source is None or source.door.is_current():
        return
    closed = dict(source.door.parts.closed)
    undisturbed(source.follow, role="holds")
    same = source.plan(K, dtype, form).derivation.structure == plan.derivation.structure
    now = {name: x for name, x in source.door.parts.closed.items() if name not in source.places}
    other = [name for name, x in now.items() if x is not closed.get(name)] if same else ["learner, objective or rule"]
    if other:
        raise DerivationError(
            f"program: {other[0]} changed after torch.compile had read it; expected what was compiled. Compile again, "
            "after torch.compiler.reset()."
        )


@custom_operator("scan", _scan_shapes, _backward, _setup)
def scan_op(tensors: list[Tensor], key: str, checkpoints: int) -> list[Tensor]:
    plan, call, backend = _call(key, tensors)
    _expect_current(plan)
    if any(has_tangent(x) for x in tensors):
        raise NotImplementedError(
            "dualform: a compiled or exported graph was given dual tensors of torch.autograd.forward_ad; expected "
            "plain ones, its tangents would be lost. Use torch.func.jvp, or call the module that it was made of."
        )
    with torch.autocast(tensors[0].device.type, enabled=False):
        return run_forward(plan, call, checkpoints, backend)


class _Direct(torch.autograd.Function):
    """The op where nothing looks at it: at a third of the price of an operator made in Python."""

    @staticmethod
    def forward(ctx: _Kept, plan: Plan, call: Call, key: str, checkpoints: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = _run_direct(plan, call, key, checkpoints)
        ctx.plan, ctx.key, ctx.is_direct, ctx.checkpoints = plan, key, True, checkpoints
        ctx.mark_non_differentiable(found[1 + 2 * len(call.init)])
        _keep(ctx, tensors, found)
        return tuple(found)

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_backward(ctx, grads)[0]


def _run_direct(plan: Plan, call: Call, key: str, checkpoints: int) -> list[Tensor]:
    with _no_autocast(call.q.device.type):
        return run_forward(plan, call, checkpoints, key.split("|")[1])


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Are tensors torch's own, while no mode asks for the operator and nothing is traced?"""
    own = all(type(x) is Tensor or type(x) is Parameter for x in tensors)
    return own and not (tensors[0].is_meta or compiles() or is_looked_at())


library.impl("scan", _seen, "FuncTorchDynamicLayerFrontMode")


def checkpoints_for(T: int, chunk: int, remat: str | int | None, nbytes: int, keep: int) -> int:
    """Count checkpoints of nbytes each: G mini-batches one, None all.

    "auto" keeps every state while that takes at most `keep` bytes,
    else one per power of two near the root of their number.
    """
    N = -(-T // chunk)
    if remat is None:
        return N + 1
    if isinstance(remat, int):
        return N // remat + 1
    if exports():  # one file for every length
        return 16
    if compiles():  # coarse steps, so that a new length rarely compiles anew
        return next(K for K in (4, 16, 64, 256, 1024) if K * K > N or K == 1024)
    return N if N * nbytes <= keep else -(-N // (1 << (N.bit_length() // 2)))


def _stepped(name: str, form: str, backend: str, call: Call, overwrite: bool) -> list[Tensor] | None:
    """Run one token as plain a way as there is: without an op around it."""
    if type(call.q) is not Tensor or compiles():
        return None
    if not (call.q.shape[1] == 1 and call.carried and call.mask is None and call.reset is None):
        return None
    plan = _plan(name, form, call.q.shape[-1], call.dtype)
    plan.natives.tokens += 1
    taken = chosen(backend, plan, call)
    whole = backend_of(taken).whole
    try:
        if whole is None:
            return None
        if plan.is_checked or backend == "auto":
            check_step(taken, plan, call)
        return whole.step(plan, call, overwrite)
    except BackendError:
        return None  # the op says why


@_disable_dynamo  # torch.compiler.disable imports the compiler at once
def _visibly(name: str, form: str, call: Call) -> list[Tensor]:
    return run_visible(_plan(name, form, call.q.shape[-1], call.dtype), call)


def scan(
    name: str, form: str, backend: str, call: Call, chunk: int, remat: str | int | None, overwrite: bool
) -> list[Tensor]:
    """Return a program's [o, *anchor, *registers, position]. overwrite: the state given may be lost."""
    if watched():
        return _visibly(name, form, call)
    tensors = call.flat()
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not learns and (stepped := _stepped(name, form, backend, call, overwrite)) is not None:
        return stepped
    width = operator.index(call.q.shape[-1])  # a compiler may take it for one that varies
    kind, nbytes, keep = (name, form, width, call.dtype), 0, 0
    if learns and not compiles():  # there the op alone chooses, and sizes may be symbols
        nbytes = call.q.shape[0] * sum(x.nbytes for x in call.init.values())
        keep = backend_of(chosen(backend, _plan(*kind), call)).keep
    checkpoints = checkpoints_for(call.q.shape[1], chunk, remat, nbytes, keep) if learns else 0
    given, T = call.given, call.q.shape[1]
    if exports():
        fixed = type(T) is int and not torch.compiler.is_dynamo_compiling()
        key = _text(*kind, T if fixed else None, given)
    else:
        key = _key(*kind)
    key, count = f"{key}|{backend}|{given}", 2 + 2 * len(call.init)
    if not _is_plain(tensors):
        return scan_op(tensors, key, checkpoints)[:count]
    plan = _plan(*kind)
    found = _Direct.apply(plan, call, key, checkpoints, *tensors) if learns else _run_direct(plan, call, key, 0)
    return list(found[:count])

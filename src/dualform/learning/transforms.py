"""What torch's transforms ask of a call: to be seen op by op, to read no hidden value, to keep nothing of theirs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from dualform.graphs.hollow import Hollows
from dualform.graphs.this_thread import captures, compiles, no_modes, records, traces_apart

functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
inside = threading.local()  # "worker": traces itself; "holds": its caller holds the lock for it


class _Tracing:
    """torch's tracers keep state for the whole process: one thread at a time, and those that it waits for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not inside.__dict__:
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        if not inside.__dict__:
            self._lock.release()


TRACING = _Tracing()


def undisturbed(make: Callable[[], Any], role: str = "worker") -> Any:
    """Run on a thread of its own, where no mode of the caller reaches: inside an op autograd is off, under fake tensors
    nothing is real. One at a time; role "holds": what runs may trace in turn."""
    if getattr(inside, "worker", False):
        return make()

    def run() -> Any:
        setattr(inside, role, True)
        traces_apart()
        with Hollows() if role == "worker" else nullcontext():
            return make()

    with TRACING, _uncollected():
        _first_fake_tensors()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(copy_context().run, run).result()  # the caller's context variables


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hold the garbage collector back: a graph is many small objects, and it goes through all of torch's."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@cache
def _first_fake_tensors() -> None:
    """A torch for CUDA that finds no GPU crashes if its first fake tensors are another thread's (seen in 2.11)."""
    if torch.version.cuda is not None and not torch.cuda.is_available():
        with no_modes(), FakeTensorMode():
            pass


@contextmanager
def on_behalf(role: dict[str, bool]) -> Iterator[None]:
    """Run as part of what another thread does and waits for: autograd runs a GPU's backward on one of its own."""
    before = dict(inside.__dict__)
    inside.__dict__.update(role)
    try:
        yield
    finally:
        inside.__dict__.clear()
        inside.__dict__.update(before)


def watched() -> bool:
    """Is a transform of torch.func at work, or forward differentiation? They must see every op."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_known(x: Tensor) -> bool:
    """May a call depend on a tensor's values? Not if traced, captured or on meta, nor where vmap hides an axis."""
    if compiles() or x.is_meta or records() or captures(x):
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def unwrapped(x: Tensor) -> Tensor:
    """What transforms of torch.func at work have wrapped, as a trace on a thread of its own sees it; one of many."""
    while functorch.is_functorch_wrapped_tensor(x):
        axis = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None
        x = functorch.get_unwrapped(x)
        x = x if axis is None else x.select(axis, 0)
    return x


def is_batched(x: Tensor) -> bool:
    """Does vmap hide an axis of a tensor?"""
    while functorch.is_functorch_wrapped_tensor(x) and not functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)


def stand_ins(tensors: Iterable[Tensor], module: Any) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """What a trace on a thread of its own sees of what transforms have wrapped, by identity, with both; and, by name,
    what takes the place of a module's tensors that vmap has batched, which no other thread can use."""
    inner = {id(x): (x, unwrapped(x)) for x in tensors}
    held = [*module.named_parameters(), *module.named_buffers()] if isinstance(module, torch.nn.Module) else []
    instead = {name: inner[id(x)][1] for name, x in held if id(x) in inner and is_batched(x)}
    return {id(within): (x, within) for x, within in inner.values() if within is not x}, instead


def is_one_of_many(x: Tensor) -> bool:
    """Is a tensor a batch of gradients, as torch.autograd.grad takes them with is_grads_batched?"""
    return functorch.is_legacy_batchedtensor(x)


def has_tangent(x: Tensor) -> bool:
    """Is a tensor a dual number of torch.autograd.forward_ad?"""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that later calls will use: no mode, grad mode or transform of the first caller reaches them.

    While it switches modes off it holds the tracers' lock: one stack of modes is the whole process's.
    """
    with TRACING, no_modes(), temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.no_grad():
        yield

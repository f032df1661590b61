"""What torch's transforms ask of a call: to be seen op by op, to read no value that they hide, to keep nothing of theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from dualform.graphs.this_thread import compiles, records

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


@contextmanager
def on_behalf(role: dict[str, bool]) -> Iterator[None]:
    """Run as part of what another thread does and waits for: autograd runs the backward of a GPU's tensors on a thread of its own."""
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
    """May a call depend on a tensor's values? Not while it is traced, nor on the meta device, nor where they differ along an axis that vmap hides."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    if compiles() or x.is_meta or records():
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def is_one_of_many(x: Tensor) -> bool:
    """Is a tensor a batch of gradients, as torch.autograd.grad takes them with is_grads_batched?"""
    return torch._C._functorch.is_legacy_batchedtensor(x)  # type: ignore[attr-defined]


def has_tangent(x: Tensor) -> bool:
    """Is a tensor a dual number of torch.autograd.forward_ad?"""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that later calls will use: no mode, grad mode or transform of the first caller reaches them.

    While it switches modes off it holds the tracers' lock: one stack of modes is the whole process's.
    """
    with (
        TRACING,
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield

"""What this thread does to the calls that it makes: torch's own flags and modes are the whole process's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import _ops
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx import traceback as fx_traceback
from torch.utils._python_dispatch import _disable_current_modes

_C: Any = torch._C


class _Caller(threading.local):
    line = ""  # of the user's, that a trace is at
    is_told = False  # does torch's own tracer write lines into nodes?


caller = _Caller()


class _Modes(_ops._ModeStackStateForPreDispatch):
    """torch's modes above dispatch: one stack for the process, and one of its own for each thread that asks for it."""

    def __init__(self, shared: Any) -> None:
        self.shared, self.own = shared, threading.local()

    @property
    def here(self) -> Any:
        return getattr(self.own, "stack", self.shared)

    def set(self, index: int, mode: Any) -> None:
        self.here.set(index, mode)

    def get(self, index: int) -> Any:
        return self.here.get(index)

    def count(self) -> int:
        return self.here.count()

    @property
    def _schema_check_mode(self) -> Any:
        return self.here._schema_check_mode

    @_schema_check_mode.setter
    def _schema_check_mode(self, mode: Any) -> None:
        self.here._schema_check_mode = mode


_modes: Any = _Modes(_ops._mode_stack_state_for_pre_dispatch)
_ops._mode_stack_state_for_pre_dispatch = _modes


def traces_apart() -> None:
    """Give this thread modes of its own from now on: it sees nothing that another exports, nor the other its traces."""
    _modes.own.stack = _ops._ModeStackStateForPreDispatch()


def compiles() -> bool:
    """Does this thread run under torch.compile or torch.export?"""
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and _is_traced())


def exports() -> bool:
    """Does this thread run under torch.export?"""
    return torch.compiler.is_exporting() and (torch.compiler.is_dynamo_compiling() or _is_traced())


def _is_traced() -> bool:
    keys = _C._TorchDispatchModeKey
    modes = (keys.PROXY, keys.FUNCTIONAL, keys.FAKE)
    return _is_above() or any(_C._get_dispatch_mode(mode) is not None for mode in modes)


def _is_above() -> bool:
    return _C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)


def records() -> bool:
    """Does this thread write down what it runs?"""
    proxies = _C._TorchDispatchModeKey.PROXY
    if _C._get_dispatch_mode(proxies) is not None:
        return True
    return _is_above() and torch._ops._get_dispatch_mode_pre_dispatch(proxies) is not None


def captures(x: torch.Tensor) -> bool:
    """Is what is done to a tensor written down as a CUDA graph, which is run again with other numbers?"""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def apart() -> Iterator[None]:
    """Trace in this thread so, unless it is traced itself."""
    begins = not _is_above() and not hasattr(_modes.own, "stack")
    if begins:
        traces_apart()
    try:
        yield
    finally:
        if begins:
            del _modes.own.stack


@contextmanager
def no_modes() -> Iterator[None]:
    """Switch this thread's modes off. Of those above dispatch, torch's own way would take another thread's, too."""
    with apart(), _disable_current_modes():
        yield


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Compute where no trace, and no transform of torch.func, that is going on sees it."""
    with temporarily_clear_interpreter_stack(), no_modes():
        yield


@contextmanager
def lines_told() -> Iterator[None]:
    """Let torch's own tracer write lines into nodes: it knows of one trace in the process."""
    before, caller.is_told = caller.is_told, True
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        caller.is_told = before


def uncompiled() -> AbstractContextManager[Any]:
    """What torch.compile made is traced as what it was made of."""
    # Nothing is compiled where it is not loaded, nor while another thread still loads it.
    patch: Any = getattr(sys.modules.get("torch._dynamo.config"), "patch", None)
    return nullcontext() if patch is None else patch(error_on_nested_fx_trace=False)


def is_looked_at() -> bool:
    """Does a mode of this thread, or torch.jit, ask for what it runs?"""
    modes = _C._len_torch_dispatch_stack() or _C._is_torch_function_mode_enabled()
    return bool(modes) or _C._get_tracing_state() is not None

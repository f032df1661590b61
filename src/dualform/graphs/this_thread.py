"""What this thread does to the calls that it makes: torch's own flags and modes are the whole process's."""

from __future__ import annotations

from typing import Any

import torch

_C: Any = torch._C


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

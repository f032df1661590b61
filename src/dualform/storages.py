"""Which memory a tensor lies in, and what lies there."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def memory_of(x: Tensor) -> int:
    """Tell a tensor's memory from any other's: views have one, and so have tensors made of one array.

    Raises: NotImplementedError or RuntimeError for a tensor inside a transform, which has none.
    """
    with torch._C.DisableTorchFunction():
        storage = x.untyped_storage()
    return (storage.data_ptr() if type(x) in _PLAIN else 0) or storage._cdata  # of no numbers, it is nowhere


def like(p: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Stand in for a parameter: a trace reads shapes, on the CPU wherever the learner is."""
    return torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device=device or "cpu")


def contents(x: Tensor) -> bytes | int:
    """What lies there, to be compared later: the bytes, where numpy and `.data` write past torch's count of writes.

    Of a tensor that is not on the CPU it is that count: to look would be to wait for the device.
    """
    try:
        if type(x) in _PLAIN and x.device.type == "cpu" and x.layout == torch.strided and x.numel():
            span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            with torch._C.DisableTorchFunction():
                return ctypes.string_at(x.data_ptr(), span * x.element_size())
    except RuntimeError:  # inside a transform
        pass
    return times_written(x)


def last_written(x: Tensor) -> tuple[int, int] | None:
    """Where a tensor lies, and how often torch has written there; None where that says nothing: on the CPU, whose
    numbers are looked at, and in inference mode and inside a transform, where nobody counts."""
    if x.device.type == "cpu" or x.is_inference():
        return None
    try:
        return memory_of(x), x._version
    except RuntimeError:
        return None


def times_written(x: Tensor) -> int:
    """How often torch has written to it."""
    return 0 if x.is_inference() else x._version


def is_even(x: Tensor, axis: int) -> bool:
    """Is a tensor of plain memory the same all along an axis?"""
    if type(x) not in _PLAIN or x.is_meta or not x.numel():
        return False
    # In plain memory, where an axis of size 1 has the stride of one, too.
    rows = (y.clone(memory_format=torch.contiguous_format) for y in (x.narrow(axis, 0, 1).expand_as(x), x))
    return torch.equal(*(y.view(torch.uint8) for y in rows))


def thin(x: Tensor) -> Tensor:
    """Cut a tensor to size 1 along axes that it is the same along, as one of as many equal rows as there are tokens."""
    for k in range(x.ndim):
        x = x.narrow(k, 0, 1) if is_even(x, k) else x
    return x

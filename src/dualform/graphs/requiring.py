"""What requires a gradient inside a trace, and how a gradient is fitted to what it is one of.

A stand-in has no gradient: what it would have, were it real, is noted on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from dualform.graphs.hollow import Hollow
from dualform.shapes import TraceError

LIVE = "_dualform_requires_grad"
DATA = vars(torch._C.TensorBase)["data"].__get__  # what x.data calls
DETACH = {Tensor.detach, torch.detach, Tensor.detach_, torch.detach_}


def transforms() -> int:
    """How many torch.func transforms are active."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (an extension module that the stubs lack)
    return functorch.maybe_current_level() or 0


def can_move(x: Any) -> bool:
    """Is it a tensor that can have a gradient?"""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def requires_grad(x: Tensor) -> bool:
    """Will it require a gradient when the function is run with inputs that do?"""
    known = getattr(x, LIVE, None)
    return can_move(x) and (x.requires_grad if known is None else known)


def set_requires_grad(x: Tensor, flag: bool = True) -> Tensor:
    """x.requires_grad_(flag) inside a trace."""
    if isinstance(x, FakeTensor | Hollow):
        setattr(x, LIVE, flag)
    return x


def fitted(g: Any, x: Tensor, where: str) -> Tensor:
    """A gradient in the shape and dtype of what it is a gradient of, as torch fits it: copies are summed."""
    lead = g.ndim - x.ndim if isinstance(g, Tensor) else -1
    if lead < 0 or any(a not in (1, b) for a, b in zip(x.shape, g.shape[lead:], strict=True)):
        got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise TraceError(
            f"trace: the backward of `{where}` gives a gradient of shape {got}; expected its input's = "
            f"{tuple(x.shape)}. Return it in that shape."
        )
    if g.shape != x.shape:
        g = g.sum_to_size(x.shape)
    return g if g.dtype == x.dtype else g.to(x.dtype)


def node_of(x: Tensor) -> fx.Node | None:
    """The node of a tensor in the trace, or the recording, that is going on."""
    if isinstance(x, Hollow):
        return getattr(x, "node", None)
    mode: Any = get_proxy_mode()
    tracer = getattr(mode, "tracer", None)
    held: Any = None if tracer is None else get_proxy_slot(x, tracer, None)
    return getattr(getattr(held, "proxy", None), "node", None)

"""Numbers where an op has a value and slopes, to stand where nothing was picked: 0 times NaN is no 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualform.graphs.constants import aside
from dualform.graphs.custom import listening
from dualform.graphs.hollow import tensors_in

OTHERS = (0.5, 2.0, -0.5)  # most functions have slopes at one of them


class Count(int):
    """How many are picked: a size of other tensors of them, and no number."""

    refuse: Callable[[], NoReturn]


_BINARY = "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow lt le gt ge eq ne"
for _name in f"{_BINARY} neg abs int float index bool str repr format".split():
    setattr(Count, f"__{_name}__", lambda self, *_: self.refuse())


def counted(args: Any, kwargs: Any, number: Callable[[Any], int]) -> Any:
    """Arguments with a number for how many are picked."""
    given = pytree.tree_map_only(torch.Size, tuple, (args, kwargs))
    return pytree.tree_map_only(Count, number, given)


def at_one(x: Tensor, at: int, axes: int, many: int = 1) -> list[int]:
    return [*x.shape[:at], many, *x.shape[at + axes :]]


def number(n: float, x: Tensor, at: int, axes: int) -> tuple[Tensor, Tensor]:
    """What to put where nothing was picked, and what it is for one entry: not one number along an axis, of which no
    deviation has a slope."""
    shape, ndim = at_one(x, at, axes), x.ndim
    if not x.is_floating_point():
        return torch.full((), 1, dtype=x.dtype, device=x.device), torch.ones(shape, dtype=x.dtype)
    with aside():
        own = _varied(n, shape, x.dtype, at + axes < ndim)
    if at + axes == ndim or x.shape[-1] == 1:
        return torch.full((), n, dtype=x.dtype, device=x.device), own
    return torch.linspace(n, 1.25 * n, x.shape[-1], dtype=x.dtype, device=x.device), own


def _varied(n: float, shape: Sequence[int], dtype: torch.dtype, is_varied: bool = True) -> Tensor:
    size = shape[-1] if shape and is_varied else 1
    own = torch.linspace(n, 1.25 * n, size, dtype=dtype) if size > 1 else torch.full((1,), n, dtype=dtype)
    return own.expand(shape)


def valued(func: Callable[..., Any], args: Any, kwargs: Any, numbers: dict[int, Tensor]) -> tuple[bool, Tensor | None]:
    """Has an op a value and slopes where tensors are these numbers, and which value, None if it is of others, too?"""
    tensors = tensors_in(args, kwargs)
    leaves: list[Tensor] = []

    def one(x: Tensor) -> Tensor:
        floating = x.is_floating_point()
        made = numbers.get(id(x))
        if made is None:
            made = _varied(OTHERS[0], x.shape, x.dtype) if floating else torch.ones(x.shape, dtype=x.dtype)
        made = made.clone()
        leaves.extend([made.requires_grad_()] if floating else [])
        return made * 1 if floating else made  # no leaf, which an op in place may not write to

    args, kwargs = counted(args, kwargs, lambda _: 1)
    with aside(), listening(None), torch.enable_grad():
        try:
            own, named = pytree.tree_map_only(Tensor, one, (args, kwargs))
            made = func(*own, **named)
            is_one = all(bool(x.isfinite().all()) for x in _slopes(made, leaves))
            known = isinstance(made, Tensor) and all(id(x) in numbers for x in tensors)
            return is_one, made.detach() if known else None
        except (RuntimeError, TypeError, ValueError, IndexError):
            return True, None  # nothing can be said: whatever is wrong with the call, it says itself


def _slopes(made: Any, leaves: list[Tensor]) -> Iterator[Tensor]:
    """A value, and its first two derivatives."""
    for _ in range(3):
        if not isinstance(made, Tensor):
            return
        yield made.detach()
        if not made.requires_grad or not made.is_floating_point():
            return
        slopes = torch.autograd.grad(made.sum(), leaves, create_graph=True, allow_unused=True)
        parts = [g.sum() for g in slopes if g is not None]
        yield from (g.detach() for g in parts)
        made = sum(parts) if parts else None

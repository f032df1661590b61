"""What a mask picks whose values no trace knows: h[h < 0], as many entries as there will be. They stay where they are.

h[m] *= 0.1        ->    picked = where(m, h, 1/2) * 0.1;  h = where(m, picked, h)

An entry is worked on alone until it is written back under the same mask; whatever else is asked of so many entries is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from dualform.graphs.constants import version_of
from dualform.ops.table import entrywise_reads, find_row

aten = torch.ops.aten
_TOLD = {vars(torch._C.TensorBase)[n].__get__ for n in ("dtype", "device")} | {Tensor.is_floating_point}


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _is_alone(target: Any) -> bool:
    """Is each entry of its result made of one entry?"""
    row = find_row(target)
    return row is not None and row.reads is entrywise_reads


class Selected:
    """The tensors of one trace that stand for picked entries, and how its masks were made, all by identity."""

    def __init__(self, refuse: Callable[[], NoReturn], marked: Callable[..., Any]) -> None:
        self.refuse, self.marked = refuse, marked
        self._picked: dict[int, tuple[Tensor, Tensor, Any]] = {}  # with mask, spread over it, and how that was made
        self._masks: dict[int, tuple[Tensor, int, Any]] = {}
        # What the call that is going on picks, and the last node before it.
        self._next: tuple[Tensor, Any, Any] | None = None

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Call:
        """The call in terms of whole tensors."""
        self._next = None
        if func is Tensor.__getitem__ and _is_mask(args[1], args[0]) and id(args[0]) not in self._picked:
            x, mask = args
            spread = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
            # What is not picked is a number that most functions have a slope at.
            other = torch.full((), 0.5 if x.is_floating_point() else 1, dtype=x.dtype, device=x.device)
            self._next = (spread, self._key(mask), None)
            return torch.where, (spread, x, other), {}
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        picked = [self._picked[id(x)] for x in leaves if id(x) in self._picked]
        if not picked or func in _TOLD:
            return func, args, kwargs
        like, mask, key = picked[0]
        if func is Tensor.__setitem__ and id(args[0]) not in self._picked and _is_mask(args[1], args[0]):
            x, value = args[0], args[2]
            if self._key(args[1]) != key or x.shape != value.shape:
                self.refuse()
            chosen = (mask, value.to(x.dtype), x)
            return Tensor.copy_, (x, self.marked(torch.where, chosen, {}, torch.where(*chosen))), {}
        rest = like.ndim - key[0]
        if any(p[2] != key for p in picked) or any(x.ndim > rest for x in leaves if id(x) not in self._picked):
            self.refuse()
        self._next = (mask, key, next(reversed(_graph().nodes)))
        return func, args, kwargs

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Note what is picked, and how a mask was made: two that were made alike are one."""
        if self._next is not None:
            mask, key, last = self._next
            shape = mask.shape[: key[0]]
            if not isinstance(result, Tensor) or result.shape[: key[0]] != shape or (last and not _each_alone(last)):
                self.refuse()
            self._picked[id(result)] = (result, mask, key)
        elif isinstance(result, Tensor) and result.dtype == torch.bool and not kwargs:
            self._masks[id(result)] = (result, version_of(result), (func, pytree.tree_map(self._key, args)))

    def below(self) -> None:
        """Refuse a transform inside: it wraps what it is given, and may sum over what is picked."""
        if self._picked:
            self.refuse()

    def end(self, result: Any) -> None:
        """Refuse a result of as many entries as were picked."""
        if any(id(x) in self._picked for x in pytree.tree_leaves(result)):
            self.refuse()

    def _key(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        held = self._masks.get(id(x))
        if held is None or held[0] is not x or held[1] != version_of(x):
            held = self._masks[id(x)] = (x, version_of(x), (id(x), version_of(x)))
        return x.ndim, held[2]


def _is_mask(mask: Any, x: Tensor) -> bool:
    is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
    return is_bool and mask.ndim > 0 and mask.shape == x.shape[: mask.ndim]


def _graph() -> Any:
    mode: Any = get_proxy_mode()
    return mode.graph if hasattr(mode, "graph") else mode.tracer.graph


def _each_alone(last: Any) -> bool:
    """Does all that was recorded since take entry by entry?"""
    node = next(reversed(_graph().nodes))
    while node is not last:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and not _is_alone(node.target) and torch.Tag.pointwise not in tags:
            return False
        node = node.prev
    return True

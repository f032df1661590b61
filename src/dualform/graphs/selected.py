"""What a mask picks whose values no trace knows: h[h < 0], as many entries as there will be. They stay where they are.

h[m] *= 0.1        ->    picked = where(m, h, 1/2) * 0.1;  h = where(m, picked, h)

An entry is worked on alone until it is written back under the same mask; whatever else is asked of so many entries is
refused. What stands where nothing was picked is followed: before an op that has no value or no slope there, another
number is put there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from dualform.graphs.constants import aside, version_of
from dualform.ops.table import entrywise_reads, find_row

aten = torch.ops.aten
_TOLD = {vars(torch._C.TensorBase)[n].__get__ for n in ("dtype", "device")} | {Tensor.is_floating_point}
_OTHERS = (0.5, 2.0, -0.5)  # numbers to put where nothing was picked: most functions have slopes at one of them

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
        self._other: dict[int, Any] = {}  # the number where nothing was picked, None: not known
        self._made: Any = None  # that of the call that is going on

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Call:
        """The call in terms of whole tensors."""
        self._next, self._made = None, None
        if func is Tensor.__getitem__ and _is_mask(args[1], args[0]) and id(args[0]) not in self._picked:
            x, mask = args
            spread = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
            self._made = _OTHERS[0] if x.is_floating_point() else 1
            other = torch.full((), self._made, dtype=x.dtype, device=x.device)
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
            return Tensor.copy_, (x, self._where(mask, value.to(x.dtype), x)), {}
        rest = like.ndim - key[0]
        if any(p[2] != key for p in picked) or any(x.ndim > rest for x in leaves if id(x) not in self._picked):
            self.refuse()
        args, kwargs = self._with_slopes(func, args, kwargs, mask)
        self._next = (mask, key, next(reversed(_graph().nodes)))
        return func, args, kwargs

    def _with_slopes(self, func: Callable[..., Any], args: Any, kwargs: Any, mask: Tensor) -> Any:
        """Arguments with a number where nothing was picked that the op has a value and slopes at:
        0 times NaN is no 0."""
        held = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and id(x) in self._picked]
        given = {id(x): self._other[id(x)] for x in held}
        tried = ({k: n if other is None else other for k, other in given.items()} for n in _OTHERS)
        again = (dict.fromkeys(given, n) for n in _OTHERS)
        for now in (*tried, *again):
            is_one, self._made = _at(func, args, kwargs, now)
            if is_one:
                break
        else:
            self.refuse()
        put = {
            id(x): self._where(mask, x, torch.full((), now[id(x)], dtype=x.dtype, device=x.device))
            for x in held
            if now[id(x)] != given[id(x)] and x.is_floating_point()
        }
        name = getattr(func, "__name__", "").removesuffix("__")
        if name.startswith("__i") or (name.endswith("_") and not name.startswith("__")):
            self._other = dict.fromkeys(self._other)  # others may look at the same memory
            first = args[0]
            if id(first) in put:
                copied = (first, put.pop(id(first)))
                self.marked(Tensor.copy_, copied, {}, Tensor.copy_(*copied))
        return pytree.tree_map_only(Tensor, lambda x: put.get(id(x), x), (args, kwargs))

    def _where(self, *chosen: Tensor) -> Tensor:
        """Choose by a mask: a value that requires a gradient where one of the two does."""
        return self.marked(torch.where, chosen, {}, torch.where(*chosen))

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Note what is picked, and how a mask was made: two that were made alike are one."""
        if self._next is not None:
            mask, key, last = self._next
            shape = mask.shape[: key[0]]
            if not isinstance(result, Tensor) or result.shape[: key[0]] != shape or (last and not _each_alone(last)):
                self.refuse()
            self._picked[id(result)] = (result, mask, key)
            self._other[id(result)] = self._made
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


def _at(func: Callable[..., Any], args: Any, kwargs: Any, numbers: dict[int, Any]) -> tuple[bool, Any]:
    """Has an op a value and slopes where some tensors are these numbers, and which value,
    None if it is of other tensors, too."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    leaves: list[Tensor] = []

    def one(x: Tensor) -> Tensor:
        floating = x.is_floating_point()
        made = torch.full((1,), numbers.get(id(x), _OTHERS[0] if floating else 1), dtype=x.dtype)
        leaves.extend([made.requires_grad_()] if floating else [])
        return made * 1 if floating else made  # no leaf, which an op in place may not write to

    with aside(), torch.enable_grad():
        try:
            own, named = pytree.tree_map_only(Tensor, one, (args, kwargs))
            made = func(*own, **named)
            is_one = all(bool(x.isfinite().all()) for x in _slopes(made, leaves))
            known = isinstance(made, Tensor) and made.numel() == 1 and all(id(x) in numbers for x in tensors)
            return is_one, made.item() if known else None
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

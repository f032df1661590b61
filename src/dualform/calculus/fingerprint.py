"""What a function is made of: a key that is equal for equal code and settings, with every tensor as an open slot.

Two closures of one source line are the same function on other tensors. Their key is the same; the tensors are read anew at
each call, so that nothing closed over can be stale. What cannot be read (objects of foreign types) has no key.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Code that does not change while a program runs: it is known by identity.
_FIXED = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "dualform", "opt_einsum", "einops", "math"}
_VALUES = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
# An object graph larger than this is cheaper to trace than to read.
_LIMIT = 4000


class Unreadable(Exception):
    """Something that a function depends on has no key."""


class Fingerprint:
    """The key of some objects, and the tensors in it in the order in which they were met.

    key: hashable, or None if something could not be read; names: what the code calls each tensor
    """

    def __init__(self, *objects: Any) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self._slots: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # ids are only unique among the living
        try:
            self.key: Hashable | None = (_context(), *(self._read(x, "") for x in objects))
        except Unreadable:
            self.key = None

    def _read(self, x: Any, name: str) -> Hashable:
        kind = type(x)
        if kind in _VALUES:
            return (kind, x)
        if isinstance(x, Tensor):
            return self._tensor(x, name)
        if isinstance(
            x, types.ModuleType | types.BuiltinFunctionType | torch._ops.OpOverload | torch._ops.OpOverloadPacket
        ):
            return x
        if id(x) in self._seen:
            return ("again", self._seen[id(x)])
        self._seen[id(x)] = len(self._seen)
        self._held.append(x)
        if len(self._seen) > _LIMIT:
            raise Unreadable
        if isinstance(x, list | tuple):
            return (kind, *(self._read(v, f"{name}{k}") for k, v in enumerate(x)))
        if kind is dict:
            return (kind, *((self._read(k, ""), self._read(v, str(k))) for k, v in x.items()))
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, types.MethodType):
            return (kind, self._read(x.__func__, name), self._read(x.__self__, name))
        if kind is partial:
            return (kind, *(self._read(v, name) for v in (x.func, x.args, x.keywords)))
        if isinstance(x, type):
            return self._class(x)
        return self._object(x)

    def _tensor(self, x: Tensor, name: str) -> Hashable:
        if type(x) not in (Tensor, nn.Parameter):
            raise Unreadable
        if id(x) in self._slots:
            return ("tensor", self._slots[id(x)])
        self._slots[id(x)] = len(self.tensors)
        self.tensors.append(x)
        self.names.append(name)
        layout = x.stride() if x.layout is torch.strided else x.layout
        return (type(x), tuple(x.shape), layout, x.dtype, x.device)

    def _function(self, f: types.FunctionType) -> Hashable:
        if _is_fixed(f.__module__):
            # Library code is known by identity, but a closure that a library made (torch.func.functional_call, vmap, a
            # decorator) closes over the caller's things.
            return (f.__code__, *self._cells(f)) if f.__closure__ else f
        parts = [self._read(v, n) for n, v in _globals_read(f)]
        return (f.__code__, *self._cells(f), *parts, self._read(f.__defaults__, ""), self._read(f.__kwdefaults__, ""))

    def _cells(self, f: types.FunctionType) -> Iterator[Hashable]:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                yield self._read(cell.cell_contents, name)
            except ValueError:  # not bound yet
                yield None

    def _class(self, kind: type) -> Hashable:
        if _is_fixed(kind.__module__):
            return kind
        bases = (self._read(base, "") for base in kind.__bases__)
        return (kind, *bases, *(self._member(v, n) for n, v in vars(kind).items()))

    def _member(self, x: Any, name: str) -> Hashable:
        if isinstance(x, staticmethod | classmethod):
            x = x.__func__
        if isinstance(x, property):
            return (property, self._read(x.fget, name))
        hidden = name.startswith(("__", "_abc_")) and not isinstance(x, types.FunctionType)
        if hidden or isinstance(x, types.GetSetDescriptorType | types.MemberDescriptorType):
            return type(x)
        return self._read(x, name)

    def _object(self, x: Any) -> Hashable:
        kind = type(x)
        fixed = _is_fixed(kind.__module__)
        if not hasattr(x, "__dict__") or (fixed and not isinstance(x, nn.Module)):
            raise Unreadable
        items = sorted(vars(x).items(), key=lambda item: item[0])
        return (self._read(kind, ""), *((n, self._read(_plain(v), n.strip("_"))) for n, v in items))


def _plain(value: Any) -> Any:
    """torch keeps a module's parts in subclasses of dict and set; empty ones (hooks) are nothing."""
    if isinstance(value, dict):
        return dict(value) if value else None
    if isinstance(value, set | frozenset):
        return tuple(sorted(value)) if value else None
    return value


def _is_fixed(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _FIXED


def _globals_read(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, and the attributes it may read of the caller's own modules."""
    names = _names(f.__code__)
    for name in names:
        if name in f.__globals__:
            value = f.__globals__[name]
            yield name, value
            if isinstance(value, types.ModuleType) and not _is_fixed(value.__name__):
                yield from ((n, vars(value)[n]) for n in names if n in vars(value))


def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return (*code.co_names, *(n for names in inner for n in names))


def _context() -> Hashable:
    """The switches that change what the same code computes."""
    return (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


def fingerprint(f: Callable[..., Any], *rest: Any) -> Fingerprint:
    """Read a function and its arguments."""
    return Fingerprint(f, *rest)

"""A module on other tensors, itself untouched: a copy of its structure in which every place that held a parameter or a
buffer takes what it is given.

torch.func.functional_call puts tensors into the module itself while it runs: other threads see them, and a submodule
that is reached by two names keeps them. Here the user's objects are only read.
"""

from __future__ import annotations

import threading
import types
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dualform.graphs.code_names import is_fixed
from dualform.graphs.fingerprint import behind, slots_of
from dualform.shapes import TraceError


class Twin:
    """Run a module's code on other tensors: `Twin(module)({name: tensor}, *args)`.

    Shared, tied and nested parts stay so; lists, dicts, bound methods, hooks and closures that lead to the module lead
    to its copy; what forward writes (attributes, lists) it writes to the copy, which is made for each call. Tensors
    that are not registered are the module's own.
    Shape:  tensors: of named_parameters() and named_buffers(), any shapes the code takes.
    Dtype:  any.
    Raises: TraceError if forward puts another tensor in the place of a parameter or buffer, or the module is scripted.
    """

    def __init__(self, module: nn.Module) -> None:
        self._source = module

    def __call__(self, tensors: Mapping[str, Tensor], *args: Any) -> Any:
        """Run forward with these tensors in place of the module's own."""
        own = [*self._source.named_parameters(), *self._source.named_buffers()]
        self._own = {id(x): tensors[name] for name, x in own if name in tensors}
        self._slots: list[tuple[Callable[[Any], Any], Any, Tensor]] = []  # how to look, at what; what it held
        self._copies: dict[int, Any] = {}
        self._held: list[Any] = [x for _, x in own]  # ids are only unique among the living
        for x in self._held:
            stand_in = self._own.get(id(x), x)
            for n, value in vars(x).items() if stand_in is not x else ():  # attributes that a tensor has been given
                vars(stand_in).setdefault(n, value)
        try:
            result = self._copy(self._source)(*args)
            for held, key, x in self._slots:
                if held(key) is not x:
                    name = next((n for n, t in tensors.items() if t is x), str(key))
                    raise TraceError(
                        f"trace: forward of {type(self._source).__name__} puts another tensor in the place of "
                        f"{name!r}; expected a pure function of its inputs. Compute the new value without assigning "
                        "it, or call .eval()."
                    )
            return result
        finally:
            del self._own, self._slots, self._copies, self._held  # the copy ends with the call

    def _copy(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._own.get(id(x), x)
        if type(x) in _ATOMS:
            return x
        if id(x) in self._copies:
            return self._copies[id(x)]
        self._held.append(x)
        return _maker(type(x))(self, x)

    def _object(self, x: Any) -> Any:
        """A plain object of the user's is copied where something in it was."""
        holds = isinstance(x, _HOLDERS)
        if isinstance(x, Enum | type | Tensor) or (is_fixed(type(x).__module__) and not holds):
            return x
        before = len(self._slots)
        try:
            new = (_base(type(x)) if holds else object).__new__(type(x))
        except TypeError:  # made of a number, a word, ...: it holds no place for a tensor
            return x
        self._copies[id(x)] = new
        if self._fill_attributes(new, x) and len(self._slots) == before:
            self._copies[id(x)] = x
        return self._copies[id(x)]

    def _fill_attributes(self, new: Any, x: Any) -> bool:
        """Copy what an object holds; return whether all of it stays as it is."""
        held = getattr(x, "__dict__", {})
        if held:
            self._fill(new.__dict__, held)
        is_same = all(new.__dict__[name] is value for name, value in held.items())
        for slot in slots_of(x).values():
            value = slot.__get__(x)
            slot.__set__(new, copy := self._copy(value))
            if id(value) in self._own:
                self._slots.append((slot.__get__, new, copy))
            is_same = is_same and copy is value
        return is_same

    def _module(self, x: nn.Module) -> nn.Module:
        if isinstance(x, torch.jit.ScriptModule):
            raise TraceError(
                f"trace: {type(x).__name__} is scripted; expected Python code that can be traced. Pass the module it "
                "was made of."
            )
        new = self._copies[id(x)] = type(x).__new__(type(x))
        self._fill_attributes(new, x)
        return new

    def _dict(self, x: dict[Any, Any]) -> dict[Any, Any]:
        new = self._copies[id(x)] = _shell(x)
        keys = {key: self._copy(key) for key in x}
        if any(copy is not key for key, copy in keys.items()):
            _base(type(x)).clear(new)
        self._fill(new, {keys[key]: value for key, value in x.items()})
        self._beside(new, x)
        return new

    def _list(self, x: list[Any]) -> list[Any]:
        new = self._copies[id(x)] = _shell(x)
        self._fill(new, dict(enumerate(x)))
        self._beside(new, x)
        return new

    def _beside(self, new: Any, x: Any) -> None:
        """What a list or dict of the user's class holds in attributes."""
        held = getattr(x, "__dict__", None)
        if held is x:  # an "attribute dict"
            new.__dict__ = new
        elif held:
            self._fill(new.__dict__, held)

    def _fill(self, holder: Any, items: Mapping[Any, Any]) -> None:
        base = _base(type(holder))  # a class of the user's may refuse, or do more
        for key, value in items.items():
            copy = self._copy(value)
            base.__setitem__(holder, key, copy)
            if id(value) in self._own:
                self._slots.append((partial(base.__getitem__, holder), key, copy))

    def _tuple(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = [self._copy(v) for v in x]
        if all(new is old for new, old in zip(parts, x, strict=True)):
            return x
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)

    def _set(self, x: Any) -> Any:
        parts = [self._copy(v) for v in x]
        if {id(v) for v in parts} == {id(v) for v in x}:
            return x
        new = _base(type(x)).__new__(type(x), parts)
        if isinstance(new, set):
            set.update(new, parts)
        self._beside(new, x)
        return new

    def _mapping(self, x: types.MappingProxyType[Any, Any]) -> Any:
        new = self._dict(dict(x))
        return x if all(new.get(key, new) is value for key, value in x.items()) else types.MappingProxyType(new)

    def _weak(self, x: Any) -> Any:
        """A weak reference, or proxy: this call keeps what it is to."""
        target = x() if isinstance(x, weakref.ref) else behind(x)
        copy = self._copy(target)
        if copy is target:
            return x
        if isinstance(x, weakref.KeyedRef):
            return type(x)(copy, lambda ref: None, x.key)
        return type(x)(copy) if isinstance(x, weakref.ref) else weakref.proxy(copy)

    def _cached(self, x: Any) -> Any:
        """A cache around a function: what it keeps is of the module's own tensors."""
        copy = self._copy(x.__wrapped__)
        return x if copy is x.__wrapped__ else lru_cache(**x.cache_parameters())(copy)

    def _method(self, x: types.MethodType) -> Any:
        return types.MethodType(x.__func__, self._copy(x.__self__))

    def _partial(self, x: partial[Any]) -> Any:
        return partial(self._copy(x.func), *self._tuple(x.args), **{k: self._copy(v) for k, v in x.keywords.items()})

    def _function(self, x: types.FunctionType) -> Any:
        """A function that closes over something that was copied, or has it as a default, is made over the copy."""
        given, named, closure = x.__defaults__ or (), x.__kwdefaults__ or {}, x.__closure__ or ()
        if not (given or named or closure):
            return x
        cells = tuple(types.CellType() for _ in closure)
        new = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, cells)
        self._copies[id(x)] = new
        new.__defaults__, new.__kwdefaults__ = self._tuple(given), {n: self._copy(v) for n, v in named.items()}
        new.__dict__ = x.__dict__
        changed = new.__defaults__ is not given or any(new.__kwdefaults__[n] is not v for n, v in named.items())
        for cell, old in zip(cells, closure, strict=True):
            try:
                content = old.cell_contents
            except ValueError:  # not bound yet
                continue
            copied = self._copy(content)
            cell.cell_contents = copied
            if id(content) in self._own:
                self._slots.append((lambda _, cell=cell: cell.cell_contents, 0, copied))
            changed = changed or id(content) in self._own or (copied is not content and copied is not new)
        if not changed:
            self._copies[id(x)] = x
        return self._copies[id(x)]


def typed(
    function: Callable[..., Any], dtype: torch.dtype, instead: Mapping[str, torch.Tensor] | None = None
) -> Callable[..., Any]:
    """Take what a function that is a module holds in the state's float type, as a learner's is: a model in bfloat16
    keeps a float32 state. instead: what takes the place of its tensors."""
    if not isinstance(function, nn.Module):
        return function
    held = {**dict(function.named_parameters()), **dict(function.named_buffers()), **(instead or {})}
    other = {n: x.to(dtype) for n, x in held.items() if x.is_floating_point() and x.dtype != dtype}
    return partial(Twin(function), {**(instead or {}), **other}) if other or instead else function


def _base(kind: type) -> Any:
    """The library's class that a class is made of."""
    return next(base for base in kind.__mro__ if is_fixed(base.__module__))


def _shell(x: Any) -> Any:
    """A list or dict of the same class and items: `copy` of a class of the user's gives a plain one."""
    if is_fixed(type(x).__module__):
        return x.copy()
    base = _base(type(x))
    new = base.__new__(type(x))
    if isinstance(x, defaultdict):
        new.default_factory = x.default_factory
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        base.__setitem__(new, key, value) if isinstance(x, dict) else base.append(new, value)
    return new


_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter, type}
# Python's own, of what the user puts there.
_HOLDERS = (
    types.SimpleNamespace, Namespace, UserDict, UserList, ChainMap, threading.local,
    weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet,
)  # fmt: skip
_MAKERS: list[tuple[Any, Callable[[Twin, Any], Any]]] = [
    (nn.Module, Twin._module), (dict, Twin._dict), (list, Twin._list), (deque, Twin._list), (tuple, Twin._tuple),
    (types.MethodType, Twin._method), (partial, Twin._partial), (types.FunctionType, Twin._function),
    (set, Twin._set), (frozenset, Twin._set), (types.MappingProxyType, Twin._mapping),
    (weakref.ProxyTypes, Twin._weak), (weakref.ref, Twin._weak), (type(lru_cache(len)), Twin._cached),
    (object, Twin._object),
]  # fmt: skip


@lru_cache(maxsize=1024)
def _maker(kind: type) -> Callable[[Twin, Any], Any]:
    return next(make for known, make in _MAKERS if issubclass(kind, known))

"""What a function is made of: a key that is equal for equal code and settings, with every tensor as an open slot.

Two closures of one source line are the same function on other tensors. Their key is the same; the tensors are read anew
at each call, so that nothing closed over can be stale. What cannot be read (objects of foreign types) has no key.
"""

from __future__ import annotations

import ctypes
import datetime
import decimal
import fractions
import inspect
import logging
import operator
import os
import pathlib
import random
import re
import sys
import threading
import types
import warnings
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import is_dataclass
from enum import Enum
from functools import cached_property, partial, partialmethod
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dualform.graphs.code_names import is_fixed, is_librarys, is_name, telling, used_by

_VALUES = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
_NUMBERS_AND_WORDS = (int, float, complex, str, bytes)
# Library objects that are what they are: equal by value, or one thing for as long as they live.
_PLAIN = (
    logging.Logger, re.Pattern, pathlib.PurePath, fractions.Fraction, decimal.Decimal, datetime.date, datetime.time,
    datetime.timedelta, type(threading.Lock()), type(threading.RLock()), inspect.Signature, types.GenericAlias,
    types.UnionType, numpy.ufunc, numpy.dtype, torch.memory_format, torch.layout, torch.Generator,
    types.CodeType,
)  # fmt: skip
_C_DATA = ctypes.c_int.__mro__[-2]  # which no module shows
_GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator, numpy.random.BitGenerator)
# Hooks of every module, one mapping for each kind.
_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks")
# Code that names one of these may reach a module by its name, or the variables of the process.
_IMPORTERS, _SETTERS = {"modules", "import_module", "__import__"}, {"environ", "environb", "getenv", "getenvb"}
# What a class keeps under a name of two underscores for its own methods; the rest there is Python's.
_MEMBERS = (types.FunctionType, partialmethod, partial, Tensor, numpy.ndarray, int, float, complex, str)
# An object graph larger than this is cheaper to trace than to read.
_LIMIT = 4000


# What code may ask torch for, beyond the switches that change what the same code computes.
_SETTINGS = (
    "are_deterministic_algorithms_enabled", "get_num_threads", "get_num_interop_threads",
    "get_float32_matmul_precision", "initial_seed", "is_deterministic_algorithms_warn_only_enabled",
)  # fmt: skip


class Unreadable(Exception):
    """Something that a function depends on has no key."""


class Fingerprint:
    """The key of some objects, and the tensors in it in the order in which they were met.

    key: hashable, or None if something could not be read (`unreadable`: its type); names: what code calls each tensor
    """

    def __init__(self, *objects: Any, watch: bool = False) -> None:
        self._watches = watch
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.unreadable = ""
        self._slots: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # ids are only unique among the living
        # Mappings, lists and sets with what they held, and under which keys.
        self._watched: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []
        self._modules: dict[int, types.ModuleType | Tensor] = {}  # the caller's own, whose attributes code may read
        self._libraries: set[str] = set()
        self._words: dict[str, None] = {}  # all names that code uses: what it may read of a module
        self._named: list[tuple[Any, str, Any]] = []  # attributes and globals with what they were
        self._arrays: list[tuple[numpy.ndarray, bytes]] = []
        self._kinds: list[tuple[Tensor, tuple[torch.Size, torch.dtype, torch.device]]] = []
        self._states: list[tuple[Any, Fingerprint]] = []  # objects that say what is in them
        self._locals: list[tuple[threading.local, dict[str, Any]]] = []
        self._thread = threading.get_ident()
        self._default = torch.get_default_dtype()
        try:
            # The switches that change what the same code computes.
            switches = (self._default, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
            read = (self._read(x, "") for x in (*objects, *(vars(nn.modules.module)[n] for n in _HOOKS)))
            key = (switches, *read, *self._read_modules())
            self._asked = [getattr(torch, name) for name in _SETTINGS if name in self._words]
            self._set = self._settings()
            self.key: Hashable | None = (*key, *self._set)
        except Unreadable as error:
            self.key, self.unreadable = None, str(error)

    def holds(self) -> bool:
        """Is all that was read under `watch` what it was, by identity? False says only that it must be read again.

        An object that cannot be read is taken for changed at each question.
        """
        if self.key is None or torch.get_default_dtype() is not self._default or self._settings() != self._set:
            return False
        for x, values, keys in self._watched:
            if len(x) != len(values) or not all(map(operator.is_, x, keys)):
                return False
            if keys is not values and not all(map(operator.is_, x.values(), values)):
                return False
        if any(x.tobytes() != entries for x, entries in self._arrays):
            return False
        if any(not Fingerprint(x).equals(state) for x, state in self._states):
            return False
        for x, name, value in self._named:
            if (x.get(name, x) if type(x) is dict else getattr(x, name, x)) is not value:
                return False
        return all((x.shape, x.dtype, x.device) == kind for x, kind in self._kinds)

    def _settings(self) -> tuple[Hashable, ...]:
        """What torch is set to, of which code asks."""
        return tuple(ask() for ask in self._asked)

    def equals(self, other: Fingerprint) -> bool:
        """Is it the same on the same tensors?"""
        same = self.key == other.key and len(self.tensors) == len(other.tensors)
        return same and all(map(operator.is_, self.tensors, other.tensors))

    def take_along(self) -> None:
        """Let this thread's own variables be what they were where they were read."""
        if threading.get_ident() != self._thread:
            for x, held in self._locals:
                vars(x).clear()
                vars(x).update(held)

    @property
    def generators(self) -> list[Any]:
        """What draws random numbers for Python and numpy, where code may reach it."""
        found = [x for x in self._held if isinstance(x, _GENERATORS)]
        if "random" in self._words or self._libraries & {"random", "numpy.random"}:
            found += [getattr(random, "_inst"), getattr(numpy.random.mtrand, "_rand")]  # noqa: B009
        return list({id(x): x for x in found}.values())

    @cached_property
    def telling(self) -> list[str]:
        """Lines of code that may tell a tensor from what stands for it in a trace."""
        functions = [x for x in self._held if isinstance(x, types.FunctionType) and not is_librarys(x)]
        functions = [f for f in functions if f.__name__ != "__init__"]  # where parts are made
        return list(dict.fromkeys(line for f in functions for line in telling(f)))

    def _watch(self, x: Any) -> None:
        if self._watches:
            keys = tuple(x)
            self._watched.append((x, tuple(x.values()) if isinstance(x, Mapping) else keys, keys))

    def _watch_names(self, items: Iterable[tuple[Any, str, Any]]) -> None:
        if self._watches:
            self._named += items

    def _read(self, x: Any, name: str) -> Hashable:
        kind = type(x)
        if kind in _VALUES:
            if kind is str and is_name(x):
                self._words[x] = None
            return (kind, x)
        if isinstance(x, Tensor):
            return self._tensor(x, name)
        if isinstance(x, types.BuiltinFunctionType) and not isinstance(x.__self__, types.ModuleType | type | None):
            return (kind, x.__name__, self._read(x.__self__, name))
        if isinstance(x, types.ModuleType):
            self._libraries.add(x.__name__)
            if not is_fixed(x.__name__):
                self._modules[id(x)] = x
            return x
        if isinstance(x, types.BuiltinFunctionType | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return x
        if isinstance(x, _PLAIN) or kind is object:
            return (kind, x)
        if id(x) in self._seen:
            return ("again", self._seen[id(x)])
        self._seen[id(x)] = len(self._seen)
        self._held.append(x)
        if len(self._seen) > _LIMIT:
            raise Unreadable(f"more than {_LIMIT} objects")
        if isinstance(x, Enum):
            return (self._own_kind(x), x.name, self._read(x.value, name))
        if kind is tuple and all(type(v) in _VALUES for v in x):
            self._words |= dict.fromkeys(v for v in x if type(v) is str and is_name(v))
            return (kind, x, *map(type, x))
        if isinstance(x, list | tuple | deque):
            if not isinstance(x, tuple):
                self._watch(x)
            return (self._own_kind(x), *(self._read(v, f"{name}{k}") for k, v in enumerate(x)))
        if isinstance(x, dict | types.MappingProxyType):
            self._watch(x)
            held = ((self._read(k, ""), self._read(v, str(k))) for k, v in x.items())
            return (self._own_kind(x) if isinstance(x, dict) else dict, *held)
        if isinstance(x, set | frozenset):
            self._watch(x)
            return (self._own_kind(x), *sorted((self._read(v, "") for v in x), key=repr))
        if isinstance(x, _NUMBERS_AND_WORDS) and not isinstance(x, numpy.generic):
            base: Any = next(base for base in _NUMBERS_AND_WORDS if isinstance(x, base))
            return (self._own_kind(x), base.__repr__(x))
        if kind.__module__ == "typing":
            return (kind, repr(x))
        if isinstance(x, range | slice | numpy.generic | torch.finfo | torch.iinfo):
            return (kind, repr(x))
        if isinstance(x, numpy.ndarray) and x.dtype != object:
            self._arrays.append((x, x.tobytes()))
            return (kind, x.shape, x.dtype.str, x.tobytes())
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, types.MethodType):
            return (kind, self._read(x.__func__, name), self._read(x.__self__, name))
        if isinstance(x, partial | partialmethod):
            return (kind, *(self._read(v, name) for v in (x.func, x.args, x.keywords)))
        if isinstance(x, weakref.ref):
            return (kind, self._read(x(), name))
        if kind in weakref.ProxyTypes:
            return (kind, self._read(behind(x), name))
        if isinstance(x, operator.attrgetter | operator.itemgetter | operator.methodcaller):
            return (kind, self._read(x.__reduce__()[1], name))
        if isinstance(x, type):
            return self._class(x)
        return self._object(x)

    def _own_kind(self, x: Any) -> Hashable:
        """A class made of a builtin one, and what its object holds besides: methods read globals, as functions do."""
        kind = type(x)
        if is_fixed(kind.__module__):
            return dict if isinstance(x, dict) else kind
        self._watch_names([(x, "__class__", kind)])
        held = getattr(x, "__dict__", None)
        return (self._read(kind, ""), self._read(held, "") if held else None)

    def _tensor(self, x: Tensor, name: str) -> Hashable:
        if type(x) not in (Tensor, nn.Parameter):
            raise Unreadable(type(x).__name__)
        if id(x) in self._slots:
            return ("tensor", self._slots[id(x)])
        self._slots[id(x)] = len(self.tensors)
        self.tensors.append(x)
        self.names.append(name)
        self._kinds.append((x, (x.shape, x.dtype, x.device)))
        self._watch(vars(x))
        if vars(x):
            self._modules[id(x)] = x
        layout = x.stride() if x.layout is torch.strided else x.layout
        return (type(x), tuple(x.shape), layout, x.dtype, x.device)

    def _function(self, f: types.FunctionType) -> Hashable:
        self._watch_names((f, name, getattr(f, name)) for name in ("__code__", "__defaults__", "__kwdefaults__"))
        if is_librarys(f):
            # Library code is known by identity, but a closure that a library made (torch.func.functional_call, vmap, a
            # decorator) closes over the caller's things.
            return (f.__code__, *self._cells(f)) if f.__closure__ else f
        used = used_by(f.__code__)
        self._words |= dict.fromkeys(used.words)
        own = sys.modules.get(str(f.__globals__.get("__name__")))
        if "globals" in used.globals and own is not None and vars(own) is f.__globals__:
            self._modules[id(own)] = own  # which name is asked for may stand in what it holds
        found = [n for n in used.words if n in f.__globals__]
        # A name that is missing may be made later, and hide a builtin: a mapping stands for nothing in itself.
        asked = used.words if "globals" in used.globals else used.globals
        missing = ((f.__globals__, n, f.__globals__) for n in asked if n not in f.__globals__)
        self._watch_names((f.__globals__, n, f.__globals__[n]) for n in found)
        self._watch_names(missing)
        parts = [self._read(f.__globals__[n], n) for n in found]
        package = f.__globals__.get("__package__")
        imported = [m for n in used.imported for m in (n, f"{package}.{n}") if m in sys.modules]
        parts += [self._read(sys.modules[m], m) for m in imported]
        if vars(f):
            self._watch(vars(f))
            parts.append(self._read(vars(f), ""))
        held = (*self._cells(f), *parts, self._read(f.__defaults__, ""), self._read(f.__kwdefaults__, ""))
        return (f.__code__, tuple(found), *held)

    def _read_modules(self) -> Iterator[Hashable]:
        """What code may read of the caller's own modules, however it came by them: attributes that some code names."""
        done: set[tuple[int, str]] = set()

        def found() -> list[tuple[types.ModuleType | Tensor, str]]:
            if _IMPORTERS & self._words.keys():
                named = (sys.modules[n] for n in self._words if n in sys.modules and not is_fixed(n))
                self._modules.update((id(m), m) for m in named)
            pairs = ((m, n) for m in self._modules.values() for n in self._words)
            return [(m, n) for m, n in pairs if n in vars(m) and (id(m), n) not in done]

        if _SETTERS & self._words.keys():
            yield self._read(vars(os.environ)["_data"], "environ")
        while todo := found():
            for module, n in todo:
                done.add((id(module), n))
                value = vars(module)[n]
                self._watch_names([(vars(module), n, value)])
                yield (getattr(module, "__name__", self._slots.get(id(module))), n, self._read(value, n))

    def _cells(self, f: types.FunctionType) -> Iterator[Hashable]:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not bound yet
                content = None
            else:
                self._watch_names([(cell, "cell_contents", content)])
            yield self._read(content, name)

    def _class(self, kind: type) -> Hashable:
        if is_fixed(kind.__module__):
            return kind
        self._watch(vars(kind))
        bases = (self._read(base, "") for base in (*kind.__bases__, type(kind)))
        return (kind, *bases, *(self._member(v, n) for n, v in vars(kind).items()))

    def _member(self, x: Any, name: str) -> Hashable:
        if isinstance(x, staticmethod | classmethod):
            x = x.__func__
        if isinstance(x, property | cached_property):
            return (type(x), self._read(x.fget if isinstance(x, property) else x.func, name))
        hidden = name.startswith(("__", "_abc_")) and not isinstance(x, _MEMBERS)
        places = (types.GetSetDescriptorType, types.MemberDescriptorType)
        if hidden or isinstance(x, places) or type(x).__module__ == "_ctypes":  # a field
            return type(x)
        return self._read(x, name)

    def _object(self, x: Any) -> Hashable:
        kind = type(x)
        if hasattr(kind, "__fingerprint__"):
            return self._said(x, kind, self._read(x.__fingerprint__(), ""))
        if isinstance(x, ContextVar):
            return self._said(x, kind, x.name, self._read(x.get(None), x.name))
        if isinstance(x, threading.local):  # another thread's is another
            self._locals.append((x, dict(vars(x))))
            return self._said(x, self._read(kind, ""), self._read(self._locals[-1][1], ""))
        if isinstance(x, _C_DATA):
            return self._state(x)
        readable = not is_fixed(kind.__module__) or isinstance(x, nn.Module | types.SimpleNamespace | Namespace)
        slots = slots_of(x)
        if not (readable or is_dataclass(x)) or not (hasattr(x, "__dict__") or slots):
            wrapped = getattr(x, "__wrapped__", None)  # a cache or the like around a function
            if wrapped is None and not is_fixed(kind.__module__):
                raise Unreadable(f"{kind.__module__}.{kind.__qualname__}")
            return self._state(x) if wrapped is None else (kind, self._read(wrapped, ""))
        items = [(n, slot.__get__(x)) for n, slot in slots.items()]
        self._watch_names([*((x, n, v) for n, v in items), (x, "__class__", kind)])
        if hasattr(x, "__dict__"):
            self._watch(vars(x))
            items += vars(x).items()
        items.sort(key=operator.itemgetter(0))
        return (self._read(kind, ""), *((n, self._read(v, n.strip("_"))) for n, v in items))

    def _state(self, x: Any) -> Hashable:
        """What an object of a library would be pickled as: random.Random, itertools.count, array, UserDict, ..."""
        kind = type(x)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = x.__reduce_ex__(2)
        except Exception as error:  # locks and queues of other processes say so in words of their own
            raise Unreadable(f"{kind.__module__}.{kind.__qualname__}") from error
        if isinstance(made, str):  # a global's name
            return (kind, made)
        maker, *rest = (*made, None, None, None)[:5]
        own = (maker, *rest[:2], *(v and list(v) for v in rest[2:]))
        return self._said(x, kind, *(self._read(v, "") for v in own))

    def _said(self, x: Any, *found: Hashable) -> Hashable:
        """What an object says of itself, which is asked again."""
        if self._watches:
            self._states.append((x, Fingerprint(x)))
        return found


def slots_of(x: Any) -> dict[str, Any]:
    """The places of an object beside its `__dict__` that hold something, by the names that they have."""
    bases = (base for base in reversed(type(x).__mro__) if "__slots__" in vars(base))
    slots = {n: v for base in bases for n, v in vars(base).items() if isinstance(v, types.MemberDescriptorType)}
    return {n: slot for n, slot in slots.items() if hasattr(x, n)}


def behind(proxy: Any) -> Any:
    """What a weak proxy stands for; None: it is gone."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None

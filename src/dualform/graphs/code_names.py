"""What code names: globals, modules, attributes; and the lines that may tell a tensor from what stands for it."""

from __future__ import annotations

import builtins
import dis
import linecache
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

# Code that does not change while a program runs: it is known by identity.
_FIXED = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "dualform", "opt_einsum", "einops", "math"}
# What tells a tensor, or a parameter, from what stands for it in a trace: names of attributes, and values.
_TELLING = set(
    "__class__ Parameter Buffer is_leaf _version _base _is_view storage_offset is_contiguous stride requires_grad "
    "is_grad_enabled singledispatch singledispatchmethod node shape_of writes".split()  # the last are a stand-in's own
)
_VARIABLES = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"}
_KINDS = (type, nn.Parameter, nn.Buffer)


def is_fixed(module: str | None) -> bool:
    """Is a module's code known by identity?"""
    if not isinstance(module, str):  # a compiled metaclass has a descriptor there
        return module is not None
    return module.partition(".")[0] in _FIXED


def is_librarys(f: types.FunctionType) -> bool:
    """Was a function written in such a module? (`__module__` is what functools.wraps says.)"""
    return is_fixed(f.__globals__.get("__name__"))


def telling(f: types.FunctionType) -> Iterator[str]:
    """The lines of a function that may tell a tensor, or a parameter, from what stands for it."""
    used = used_by(f.__code__)
    named = {n: f.__globals__.get(n, getattr(builtins, n, None)) for n in used.globals}
    for n, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        with suppress(ValueError):  # not bound yet
            named[n] = cell.cell_contents
    kinds = {n for n, x in named.items() if any(x is kind for kind in _KINDS)}
    if kinds or _TELLING.intersection(used.words):
        yield from _lines_of(f.__code__, kinds)


def _lines_of(code: types.CodeType, kinds: set[str]) -> Iterator[str]:
    """Where code reads one of these variables, or an attribute of `_TELLING`."""
    for step in dis.get_instructions(code):
        is_read = step.opname in _VARIABLES and step.argval in kinds
        is_asked = (
            step.opname not in (*_VARIABLES, "STORE_ATTR") and isinstance(step.argval, str) and step.argval in _TELLING
        )
        if (is_read or is_asked) and step.positions is not None:
            number = step.positions.lineno or code.co_firstlineno
            line = linecache.getline(code.co_filename, number).strip()
            yield f"{line}   ({pathlib.Path(code.co_filename).name}:{number})"
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _lines_of(inner, kinds)


class Used(NamedTuple):
    """What a function's code names: globals, modules that it imports, and all words, attributes and strings too."""

    globals: tuple[str, ...]
    imported: tuple[str, ...]
    words: tuple[str, ...]


@lru_cache(maxsize=4096)
def used_by(code: types.CodeType) -> Used:
    """What code names, inner functions' too."""
    inner = [used_by(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    steps = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    named = [n for op, n in steps if op in ("LOAD_GLOBAL", "LOAD_NAME")]
    imported = [n for op, n in steps if op == "IMPORT_NAME" and n and not is_fixed(n)]
    words = (*code.co_names, *filter(is_name, _strings(code.co_consts)))
    own = Used(tuple(named), tuple(imported), words)
    merged = ((name for one in (own, *inner) for name in one[k]) for k in range(3))
    return Used(*(tuple(dict.fromkeys(names)) for names in merged))


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for x in constants:
        if isinstance(x, tuple | frozenset):
            yield from _strings(x)
        elif isinstance(x, str):
            yield x


def is_name(word: str) -> bool:
    """May it name an attribute or a module?"""
    return all(part.isidentifier() for part in word.split("."))

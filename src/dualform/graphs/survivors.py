"""What user code keeps of a trace: a table made at its first call, in a dict, a global, an lru_cache.

table = lru_cache(lambda n: torch.arange(n) / n)        what it holds is given its numbers, where it is
seen["h"] = x @ w                                       is taken out of `seen` again, and refused

No stand-in outlives its trace: whoever finds it later would compute with a tensor without numbers.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from dualform.graphs.edit import own_values
from dualform.graphs.hollow import Hollow
from dualform.shapes import TraceError

Value = Callable[[], Tensor]  # finds the numbers of what is made of constants alone
Named = Callable[[], str]  # looks for a name among all objects


class _Seen(NamedTuple):
    tensor: weakref.ref[Tensor]
    line: str
    value: Value | None = None


class Settled(TraceError):
    """A refusal that stands: a second trace would find what the first has left, or say it worse."""


def survivors() -> Survivors:
    """Those of the trace that this thread runs."""
    return _here.outer or Survivors()


class _Threads(threading.local):
    outer: Survivors | None = None


_here = _Threads()


class Survivors:
    """The stand-ins that the function of one trace has seen; a trace inside another leaves its own to that one."""

    def __init__(self) -> None:
        self.outer, self.before = _here.outer, sys.exc_info()[1]
        self.refused: Exception | None = None  # what torch said of a call
        self._seen: list[_Seen] = []
        self._values: Callable[[], dict[int, Value]] = dict

    def __enter__(self) -> Survivors:
        """What the trace makes stays young until its end, where it is collected alone, not with all that there is."""
        _here.outer, self.is_collected = self, gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, *_: Any) -> None:
        _here.outer = self.outer
        if self.is_collected:
            gc.enable()

    def begin(self, inputs: Sequence[Tensor], values: Callable[[], dict[int, Value]]) -> None:
        """Take a function's inputs; values: lets go of all tensors that are known, and says how to find the numbers of
        each, by its identity."""
        self._values = values
        self.note(inputs, "")

    def note(self, tree: Any, line: str) -> None:
        """Note what the line's op gave."""
        leaves = pytree.tree_leaves(tree) if isinstance(tree, list | tuple | dict) else (tree,)
        self._seen += [_Seen(weakref.ref(x), line) for x in leaves if isinstance(x, Hollow | FakeTensor)]

    def end(self, gm: fx.GraphModule | None = None, error: BaseException | None = None, is_shown: bool = True) -> bool:
        """Leave no stand-in behind. Say whether the function found some of its own making, now with numbers.

        Whoever asks has let go of all tensors of the trace, but in its graph and in its error: one that nobody is shown
        loses its frames.
        Raises: Settled if something is kept that is made of an input, unless there is an error already.
        """
        values = self._values()
        seen = [s._replace(value=s.value or values.get(id(s.tensor()))) for s in self._seen]
        self._seen, self.refused = [], None
        _forget(error, self.before, is_shown)
        if self.outer is not None:
            self.outer._seen += seen
            return False
        left = {id(x): (x, s.line, s.value) for s in reversed(seen) if (x := s.tensor()) is not None}
        del seen  # a tensor with weak references is not exchanged
        x = None  # it stands in a cell
        if gm is not None:
            own_values(gm, left)
        made = {id(x) for x, _, value in left.values() if value is not None and _is_given(x, value)}
        kept = [(weakref.ref(x), line, value) for x, line, value in left.values() if id(x) not in made]
        left.clear()
        _collect([x for x, *_ in kept], fully=error is None)
        if any(x() is not None for x, *_ in kept) and gc.get_freeze_count():
            gc.unfreeze()  # of what is frozen nobody is told what refers to it
        where = _let_go(tuple(x() for x, *_ in kept))
        found = [
            (line, say)
            for (_, line, value), say in zip(reversed(kept), reversed(where), strict=True)
            if say and value is None
        ]
        if found and error is None:
            line, say = found[-1]
            raise Settled(
                f"trace: {f'`{line}`' if line else 'an input'} is kept in {say()} beyond the call; expected a "
                "function that keeps nothing made of its inputs. Return it; a table that depends on no input may be "
                "kept."
            )
        return bool(made)


def let_go(made: Sequence[weakref.ref[Tensor]]) -> None:
    """Take tensors of a run that nobody asked for out of where its function has kept them."""
    _collect(made)
    _let_go(tuple(x() for x in made))


def _collect(kept: Sequence[weakref.ref[Tensor]], fully: bool = True) -> None:
    """What refers to itself, as a module's copy and its methods, is kept by nobody."""
    for generation in (1, 2):
        if any(x() is not None for x in kept) and (generation == 1 or fully):
            gc.collect(generation)


def _forget(error: BaseException | None, before: BaseException | None, is_shown: bool) -> None:
    """Let go of what the frames of an error hold, and of those behind it; a frame that is there holds its closure."""
    todo, done = [error], [before]
    while todo:
        error = todo.pop()
        if error is not None and error not in done:
            done.append(error)
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__traceback__ if is_shown else None
            todo += [error.__cause__, error.__context__]


def _is_given(x: Tensor, value: Value) -> bool:
    """Exchange a stand-in for its numbers, for all who hold it."""
    try:
        with torch.inference_mode(False):
            torch.utils.swap_tensors(x, value().detach())
    except Exception:  # torch still refers to it, or the numbers are gone
        return False
    return True


def _let_go(things: tuple[Any, ...]) -> list[Named | None]:
    """Take things out of where they are kept, and say how to name that; None if no Python object keeps it.

    All at once, and then the tuples that they are in: to ask what refers to a thing is to look at all objects.
    """
    wanted, where = [id(x) for x in things], dict[int, Named]()
    things = tuple(x for x in things if x is not None)
    roots = {id(x): {id(x)} for x in things}
    while things:
        holders = _holders(things)
        owners, around, found = (
            _owners([h for h in holders if isinstance(h, dict)]),
            dict[int, Any](),
            dict[int, Named](),
        )
        here = set(map(id, things))
        for holder in holders:
            for x in {id(x): x for x in gc.get_referents(holder) if id(x) in here}.values():
                if isinstance(holder, tuple | frozenset):
                    around |= {} if id(holder) in roots else {id(holder): holder}
                    roots.setdefault(id(holder), set()).update(roots[id(x)])
                elif (named := _taken(holder, x, owners)) is not None:
                    found |= dict.fromkeys(roots[id(x)], named)
        where = found | where
        things = tuple(around.values())
        holder = x = None
        del holders, owners, around
    return [where.get(key) for key in wanted]


def _holders(things: tuple[Any, ...]) -> list[Any]:
    """What refers to things, but for frames: no closure of ours is one."""
    return [h for h in gc.get_referrers(*things) if h is not things and not isinstance(h, FrameType)]


def _taken(holder: Any, x: Any, owners: Mapping[int, Any]) -> Named | None:
    if isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
        return lambda: f"the cache of {holder.__qualname__}"
    if isinstance(holder, CellType):
        holder.cell_contents = None
        return lambda: "a variable of a closure"
    if isinstance(holder, dict):
        owner = owners.get(id(holder))
        shape = isinstance(owner, fx.Node)  # of a graph's node
        return None if shape else _taken_out(holder, _keys(holder, x), owner)
    if isinstance(holder, list | deque | set):
        kept = [v for v in holder if v is not x]
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(kept)
        return lambda: _named(holder)
    return _taken_out({}, _keys(getattr(holder, "__dict__", {}), x), holder)


def _taken_out(names: dict[Any, Any], keys: list[Any], owner: Any) -> Named | None:
    """Take entries out of a dict; what has a name gets none of it, as before a first call."""
    for key in keys:
        if owner is None:
            del names[key]
        elif isinstance(owner, dict):
            owner[key] = None
        else:
            setattr(owner, key, None)
    if not keys or isinstance(owner, dict):
        return lambda: str(keys[0]) if keys else f"a {type(owner).__qualname__}"
    if owner is None:
        return lambda: f"{_named(names)}[{keys[0]!r}]"
    return lambda: f"{getattr(owner, '__qualname__', type(owner).__qualname__)}.{keys[0]}"


def _owners(dicts: Sequence[dict[Any, Any]]) -> dict[int, Any]:
    """Whose names dicts hold, by the dict's identity: a module's globals their own; nobody's are left out."""
    found: dict[int, Any] = {id(names): names for names in dicts if "__builtins__" in names}
    left = {id(names) for names in dicts} - found.keys()
    for owner in gc.get_referrers(*dicts) if left else []:
        for names in gc.get_referents(owner):
            if id(names) in left and (isinstance(owner, type | fx.Node) or getattr(owner, "__dict__", None) is names):
                found.setdefault(id(names), owner)
    return found


def _keys(names: Mapping[Any, Any], x: Any) -> list[Any]:
    return [key for key, value in names.items() if value is x or key is x]


def _named(holder: Any) -> str:
    """The name of a list or dict that is a global or an attribute."""
    for names in gc.get_referrers(holder):
        keys = _keys(names if isinstance(names, dict) else getattr(names, "__dict__", {}), holder)
        if keys and isinstance(keys[0], str):
            return keys[0]
    return f"a {type(holder).__qualname__}"

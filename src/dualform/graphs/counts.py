"""How many rows there are, as a number that says what a function decides by it.

y if x.shape[0] > 4 else z    in a trace of 17 rows goes one way; at(n) > 4 says that up to 4 rows go another

Sizes that a trace reads are such numbers, and what is made of them by arithmetic; for torch they are plain ones.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Of = Callable[[int], Any]
_READ: set[Any] = {Tensor.size, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel}
_READ |= {vars(torch._C.TensorBase)[n].__get__ for n in ("shape", "nbytes")}
_SQUEEZED = {torch.squeeze, Tensor.squeeze, Tensor.squeeze_}


class Fork(NamedTuple):
    """Something decided by a number: what it is for so many rows, what it was, and the caller's line."""

    at: _Of
    found: Any
    where: str


class Asked:
    """What the function of one trace asks of the number of its rows W."""

    def __init__(self, W: int) -> None:
        self.W = W
        self.note: Callable[[], str] = str  # gives the caller's line
        self.is_read, self.is_over = False, False
        self.where = ""  # a size is read first
        self.forks: list[Fork] = []

    def line(self) -> str:
        """The caller's line."""
        line = self.note()
        return line and f"`{line}`"

    def told(self, n: Any) -> Any:
        """A size as it is read: as many rows know that they are."""
        if isinstance(n, tuple):
            return type(n)(self.told(x) for x in n)
        if type(n) is not int or n == 0 or n % self.W:
            return n
        self.is_read, self.where = True, self.where or self.line()
        return _made(self, lambda rows: n // self.W * rows)

    def decided(self, at: _Of, found: Any) -> Any:
        """Note what a number decides, and give it."""
        self.forks.append(Fork(at, found, self.line()))
        return found

    def may_choose(self, n: int) -> bool:
        """May so many rows choose unseen, as by a key? Where a size is read: all that calls compute."""
        return self.is_read and n < self.W and n & (n - 1) == 0

    def fork(self, n: int) -> Fork | None:
        """The first that goes otherwise for n rows."""
        return next((c for c in self.forks if _value(c.at, n) != c.found), None)


def _value(at: _Of, n: int) -> Any:
    try:
        return at(n)
    except (ArithmeticError, ValueError):
        return None


class _Threads(threading.local):
    asked: Asked | None = None


_here = _Threads()


@contextmanager
def asking(asked: Asked | None, note: Callable[[], str]) -> Iterator[None]:
    """Tell what this thread reads of sizes; a trace inside a trace tells the outer one."""
    if asked is None:
        yield
        return
    before, asked.note, _here.asked = _here.asked, note, asked
    try:
        yield
    finally:
        _here.asked, asked.is_over = before, True


def told(func: Any, result: Any) -> Any:
    """What a call of torch gives, told if it is a size."""
    asked = _here.asked
    if asked is None:
        return result
    asked.is_read |= func in _SQUEEZED  # which asks whether there is one row
    return asked.told(result) if func in _READ else result


class _Told:
    """A number made of how many rows there are."""

    asked: Asked
    at: _Of
    plain: Callable[..., Any]

    def __reduce__(self) -> Any:
        return type(self.plain()), (self.plain(),)


class _Count(_Told, int):
    plain = int.__int__


class _Share(_Told, float):
    plain = float.__float__


def _made(asked: Asked, at: _Of) -> Any:
    value = at(asked.W)
    kind = {int: _Count, float: _Share}.get(type(value))
    if kind is None:
        return value
    made = kind(value)
    made.asked, made.at = asked, at
    return made


def _done(do: Callable[..., Any], *given: Any) -> Any:
    """Compute with numbers of which some are told."""
    if not all(isinstance(x, int | float) for x in given):
        return NotImplemented
    parts = [x.plain() if isinstance(x, _Told) and x.asked.is_over else x for x in given]
    own = [x for x in parts if isinstance(x, _Told)]
    value = do(*(x.plain() if isinstance(x, _Told) else x for x in parts))

    def at(n: int) -> Any:
        return do(*(x.at(n) if isinstance(x, _Told) else x for x in parts))

    if not own or (do in _EQUAL and len(own) < 2 and value is (do is operator.eq)):
        return value  # what equals a number exactly is a key of what somebody keeps for so many rows
    return own[0].asked.decided(at, value) if do in _DECIDE else _made(own[0].asked, at)


_EQUAL = (operator.eq, operator.ne)
# What gives one of few values, or a number that tells nothing more.
_DECIDE = {*_EQUAL, operator.lt, operator.le, operator.gt, operator.ge, operator.mod, operator.and_}
_DECIDE |= {operator.index, bool, int, float, repr}
_METHODS: dict[str, Any] = {name: do for name, do in vars(operator).items() if name in dir(int) and callable(do)}
_METHODS |= {f"__{f.__name__}__": f for f in (bool, int, float, repr, round, pow, math.floor, math.ceil, math.trunc)}


def _method(do: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def run(self: _Told, *rest: Any) -> Any:
        return _done(do, *rest, self) if reflected else _done(do, self, *rest)

    return run


for _name, _do in _METHODS.items():
    setattr(_Told, _name, _method(_do))
    if hasattr(int, _other := _name.replace("__", "__r", 1)):
        setattr(_Told, _other, _method(_do, reflected=True))

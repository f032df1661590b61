"""Is a kernel's text sound: every variable made before it is used, tiles that go together, every address in its tensor?

Asked before a launch under DUALFORM_VERIFY=1, and by tests. The text is run as Python on integers that have values, as
many bits as Triton gives them, and on tiles that have shapes alone; memory knows which program read and wrote each
entry, since programs run in no order.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.kernels.soundness import BrokenSchedule

SMALL = 64  # mini-batches of single rows up to which every one is played; of more, the first and the last
TRACKED = 2**22  # entries of a tensor up to which it is known who wrote each


NOBODY, SEVERAL = -1, -2


class Ledger:
    """The program that wrote each entry of a storage, and the one that read it."""

    def __init__(self, size: int) -> None:
        self.writer, self.reader = np.full(size, NOBODY), np.full(size, NOBODY)


class Room:
    """A tensor's memory: which places are entries, and who read and wrote them."""

    def __init__(self, name: str, x: Tensor, ledgers: dict[tuple[int, int], Ledger]) -> None:
        self.name, self.x, self.first = name, x, x.storage_offset()
        self.size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        storage, own = x.untyped_storage(), x.element_size()
        whole, key = storage.nbytes() // own, (storage.data_ptr(), own)
        self.places: np.ndarray[Any, Any] | None = None
        if whole <= TRACKED:
            self.places = torch.arange(self.size).as_strided(x.shape, x.stride()).numpy()
            self.is_entry = np.zeros(self.size, bool)
            self.is_entry[self.places] = True
            self.ledger = ledgers.setdefault(key, Ledger(whole))

    def check(self, at: np.ndarray[Any, Any], program: int, writes: bool) -> None:
        wrong = at[(at < 0) | (at >= self.size)]
        if not wrong.size and self.places is not None:
            wrong = at[~self.is_entry[at]]
        if wrong.size:
            what = f"{'written' if writes else 'read'} at {int(wrong[0])}"
            raise _broken(f"{self.name} {list(self.x.shape)} is {what}; expected one of its entries")
        if self.places is None:
            return
        at, writer, reader = at + self.first, self.ledger.writer, self.ledger.reader
        others = (writer[at] != NOBODY) & (writer[at] != program)
        if writes:
            if len(np.unique(at)) != at.size or bool(others.any()):
                raise _broken(f"{self.name} is written twice at one place; expected one program and one entry for each")
            others = (reader[at] != NOBODY) & (reader[at] != program)
            writer[at] = program
        else:
            reader[at] = np.where((reader[at] == NOBODY) | (reader[at] == program), program, SEVERAL)
        if bool(others.any()):
            raise _broken(
                f"{self.name} is read by one program where another writes; expected programs that run in any order"
            )

    def is_whole(self) -> bool:
        return self.places is None or not bool((self.ledger.writer[self.places + self.first] == NOBODY).any())


def _broken(what: str) -> BrokenSchedule:
    return BrokenSchedule(f"triton: {what}. The writer of the kernel is wrong: please report it.")


@dataclass(frozen=True, eq=False)
class Played:
    """A tile: of floats, of integers or truths with their values where they are known, or of places in a tensor."""

    shape: tuple[int, ...]
    kind: str  # "float" | "int" | "truth" | "place"
    value: np.ndarray[Any, Any] | None = None
    bits: int = 32
    room: Room | None = None

    def __post_init__(self) -> None:
        if self.kind == "int" and self.value is not None and bool((np.abs(self.value) >= 2 ** (self.bits - 1)).any()):
            raise _broken(f"an integer of {self.bits} bits is {int(np.abs(self.value).max())}; expected one that fits")

    def __getitem__(self, index: Any) -> Played:
        shape = np.broadcast_to(0, self.shape)[index].shape
        return Played(shape, self.kind, None if self.value is None else self.value[index], self.bits, self.room)

    def to(self, kind: Any) -> Played:
        return Played(self.shape, kind.kind, self.value if kind.kind == self.kind else None, kind.bits, self.room)

    def __bool__(self) -> bool:
        assert self.value is not None and not self.shape
        return bool(self.value)

    def __neg__(self) -> Played:
        return Played(self.shape, self.kind, None if self.value is None else -self.value, self.bits)

    def __invert__(self) -> Played:
        return Played(self.shape, self.kind, None if self.value is None else ~self.value, self.bits)


def _played(x: Any) -> Played:
    if isinstance(x, Played):
        return x
    kind = "truth" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"
    bits = 64 if kind == "int" and abs(x) >= 2**31 else 32
    return Played((), kind, np.asarray(x) if kind != "float" else None, bits)


def _together(f: Callable[..., Any] | None, *given: Any, kind: str = "") -> Played:
    """Compute entry by entry; f: of integers and truths whose values are known."""
    tiles = [_played(x) for x in given]
    try:
        shape = np.broadcast_shapes(*(x.shape for x in tiles))
    except ValueError:
        raise _broken(f"tiles of {[list(x.shape) for x in tiles]} meet; expected shapes that go together") from None
    kinds = [x.kind for x in tiles]
    kind = kind or next(k for k in ("place", "float", "int", "truth") if k in kinds)
    values = [x.value for x in tiles]
    value = None if f is None or kind == "float" or any(v is None for v in values) else f(*values)
    room = next((x.room for x in tiles if x.room), None)
    return Played(shape, kind, value, max(x.bits for x in tiles), room)


def _spell(f: Callable[..., Any], known: Callable[..., Any] | None, kind: str = "") -> None:
    """Let Python's operator between tiles compute what it does between their values."""
    name = f.__name__.strip("_")
    setattr(Played, f"__{name}__", lambda x, y: _together(known, x, y, kind=kind))
    setattr(Played, f"__r{name}__", lambda x, y: _together(known, y, x, kind=kind))


_o = operator
for _f in (_o.add, _o.sub, _o.mul, _o.floordiv, _o.mod, _o.and_, _o.or_, _o.xor, _o.lshift, _o.rshift):
    _spell(_f, _f)
for _f in (_o.lt, _o.le, _o.gt, _o.ge, _o.eq, _o.ne):
    _spell(_f, _f, "truth")
_spell(_o.truediv, None, "float")


class Player:
    """What a text calls `tl`."""

    def __init__(self, program: tuple[int, int], number: int, every: bool) -> None:
        self.program, self.number, self.every = program, number, every
        for name in ("float32", "float64", "bfloat16", "float16"):
            setattr(self, name, SimpleNamespace(kind="float", bits=32))
        self.int1, self.int32 = SimpleNamespace(kind="truth", bits=32), SimpleNamespace(kind="int", bits=32)
        self.int64, self.constexpr = SimpleNamespace(kind="int", bits=64), int

    def __getattr__(self, name: str) -> Any:
        return lambda *given: _together(None, *given, kind="float")  # a function of entries

    def program_id(self, axis: int) -> Played:
        return _played(self.program[axis])

    def arange(self, start: int, stop: int) -> Played:
        return Played((stop - start,), "int", np.arange(start, stop))

    def range(self, start: Any, stop: Any, num_stages: int) -> Iterator[Played]:
        caller = sys._getframe(1).f_locals
        before = {n: (x.shape, x.kind) for n, x in caller.items() if isinstance(x, Played)}
        every = range(*(int(_played(x).value) for x in (start, stop)))  # pyright: ignore[reportArgumentType]: known
        for n in every if self.every else dict.fromkeys((*every[:1], *every[-1:])):
            yield _played(n)
            now = sys._getframe(1).f_locals
            for name, was in before.items():
                if (now[name].shape, now[name].kind) != was:
                    raise _broken(f"{name} is carried on as {list(now[name].shape)}; expected {list(was[0])}")

    def _touched(self, at: Played, mask: Any, writes: bool) -> None:
        if at.room is None or at.value is None:
            raise _broken("something is read or written that is no place in a tensor; expected one")
        which = _together(None, at, True if mask is None else mask)
        reached, truths = np.broadcast_to(at.value, which.shape), None if mask is None else _played(mask).value
        if truths is not None:
            reached = reached[np.broadcast_to(truths, which.shape)]
        at.room.check(reached.reshape(-1), self.number, writes)

    def load(self, at: Played, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Played:
        self._touched(at, mask, False)
        dtype = at.room.x.dtype if at.room else torch.float32
        return Played(at.shape, "float" if dtype.is_floating_point else "truth" if dtype == torch.bool else "int")

    def store(self, at: Played, x: Any, mask: Any = None) -> None:
        if _together(None, at, x).shape != at.shape or len(_played(x).shape) not in (0, len(at.shape)):
            raise _broken(
                f"a tile of {list(_played(x).shape)} is written over {list(at.shape)}; expected as many entries"
            )
        self._touched(at, mask, True)

    def full(self, shape: Sequence[int], x: Any, kind: Any) -> Played:
        return Played(tuple(shape), kind.kind)

    def where(self, truth: Any, x: Any, y: Any) -> Played:
        both = _together(None, x, y)
        return _together(np.where, truth, x, y, kind=both.kind)

    def minimum(self, x: Any, y: Any) -> Played:
        return _together(np.minimum, x, y)

    def maximum(self, x: Any, y: Any) -> Played:
        return _together(np.maximum, x, y)

    def sum(self, x: Played, axis: int) -> Played:
        if axis >= len(x.shape):
            raise _broken(f"a sum runs over axis {axis} of {list(x.shape)}; expected one of them")
        return Played((*x.shape[:axis], *x.shape[axis + 1 :]), x.kind)

    max = min = sum

    def reduce(self, x: Any, axis: int, join: Any) -> Any:
        if not isinstance(x, tuple):
            return self.sum(x, axis)
        if len({t.shape for t in x}) != 1:
            raise _broken(f"{[list(t.shape) for t in x]} are summed at once; expected one shape")
        return tuple(self.sum(t, axis) for t in x)

    def dot(self, x: Played, y: Played, **more: Any) -> Played:
        (*a, m, k), (*b, j, n) = x.shape, y.shape
        if a != b or k != j or min(m, k, n) < 16:
            raise _broken(
                f"{list(x.shape)} is multiplied with {list(y.shape)}; expected as many columns as rows, >= 16"
            )
        return Played((*a, m, n), "float")

    def permute(self, x: Played, order: Sequence[int]) -> Played:
        if sorted(order) != list(range(len(x.shape))):
            raise _broken(f"{list(x.shape)} is permuted by {list(order)}; expected each axis once")
        return Played(tuple(x.shape[k] for k in order), x.kind)

    def broadcast_to(self, x: Any, shape: Sequence[int]) -> Played:
        if (found := _together(None, x, Played(tuple(shape), _played(x).kind))).shape != tuple(shape):
            raise _broken(f"{list(_played(x).shape)} is repeated to {list(shape)}; expected shapes that go together")
        value = _played(x).value
        return Played(found.shape, found.kind, None if value is None else np.broadcast_to(value, shape))

    def reshape(self, x: Played, shape: Sequence[int]) -> Played:
        if math.prod(x.shape) != math.prod(shape):
            raise _broken(f"{list(x.shape)} is read as {list(shape)}; expected as many entries")
        return Played(tuple(shape), x.kind)

    def gather(self, x: Played, index: Played, axis: int) -> Played:
        rest = [[n for a, n in enumerate(t.shape) if a != axis] for t in (x, index)]
        wrong = index.value is None or bool(((index.value < 0) | (index.value >= x.shape[axis])).any())
        if rest[0] != rest[1] or wrong:
            raise _broken(f"{list(x.shape)} is read beyond itself along axis {axis}; expected places inside it")
        return Played(index.shape, x.kind)


def verify(text: str, name: str, given: Sequence[Tensor | int], grid: tuple[int, int], numbers: Sequence[int]) -> None:
    """Play a kernel with the arguments of a launch. numbers: heads, count, group, G, phase.

    Raises: BrokenSchedule, naming the tensor or the tile, what was found and what was expected.
    """
    body = text.partition("import triton.language as tl\n")[2]
    jit = SimpleNamespace(jit=lambda f=None, **more: f or (lambda g: g))
    space: dict[str, Any] = {"triton": jit, "tl": SimpleNamespace(constexpr=int)}
    exec(compile(body, f"<{name}>", "exec"), space)
    function = space[name]
    names = function.__code__.co_varnames
    ledgers: dict[tuple[int, int], Ledger] = {}
    rooms = {k: Room(names[k], x, ledgers) for k, x in enumerate(given) if isinstance(x, Tensor)}
    places = [
        Played((), "place", np.asarray(0), 64, rooms[k]) if k in rooms else _played(x) for k, x in enumerate(given)
    ]
    every = grid[0] * grid[1] * numbers[1] <= SMALL
    ends = [range(n) if every else dict.fromkeys((0, n // 2, n - 1)) for n in grid]
    for number, program in enumerate(itertools.product(*ends)):
        space["tl"] = Player((program[0], program[1]), number, every)
        try:
            function(*places, *map(_played, numbers), STAGES=1)
        except (NameError, TypeError) as error:
            raise _broken(f"{name}: {error}; expected a text that says what it uses") from error
    for room in rooms.values():
        stored = rf"tl\.store\({room.name.removesuffix('_p')}_(at|row)\b"
        if every and re.search(stored, text) and not room.is_whole():
            raise _broken(f"{room.name} is not written whole; expected every entry")


__all__ = ["verify"]

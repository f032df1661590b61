"""How a language spells what a function is made of, and what a walker makes of a direction.

A second printer is one record and one walker:

    Dialect   the texts below, for its language; how ops read in it is a column of their rows,
              `ops.table.Entry` and `Fold`: an entry or fold that has no text there, the walker refuses
    walker    unit(direction: targets.Direction) -> Unit: goes through the graphs of `direction.functions`, or of
              `.sliced()`, reads each source where `targets` says it is held, spells each node, leaves each result
              where its target says

The caller (`backend`) hands over what `Unit.arguments` names, in that order. C++ walks statements over buffers
(`schedule`, `layout`: `cpp_rows` from row to row, `cpp_slices` where rows are few); one over tiles walks graphs, its
values in registers, and gives `load` and `store` a tile where they have a buffer here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualform.kernels.report import TimeBound, bound, describe
from dualform.kernels.statements import Schedule
from dualform.kernels.targets import Role
from dualform.ops.table import ENTRIES, FOLDS


@dataclass(frozen=True)
class Dialect:
    """A language.

    name: that of its column. types: of numbers. where: the index (n, b, h) of an argument. number: a constant. loop:
    over so many, the variable's name given. load, store: as `layout.Load` and `layout.Store` say.
    """

    name: str
    types: Mapping[torch.dtype, str]
    where: Mapping[str, str]
    number: Callable[[float], str]
    loop: Callable[[str, int], str]
    load: Callable[[Any], str]
    store: Callable[[Any], str]

    def entry(self, op: str, operands: Sequence[str], params: Mapping[str, Any], at: Sequence[str]) -> str:
        """Spell an entry of a result; at: its index along each axis."""
        names = {f"i{k}": x for k, x in enumerate(at)} | {"row": ["0", "0", *at][-2], "col": ["0", *at][-1]}
        given = {k: self.number(x) if k in NUMBERS else x for k, x in params.items()}
        return getattr(ENTRIES[op], self.name).format(*operands, **names, **given)

    def fold(self, op: str) -> tuple[str, str]:
        """Spell what a reduction begins with, and how it goes on."""
        return getattr(FOLDS[op], self.name)


NUMBERS = ("value", "alpha", "start", "step")  # parameters that are numbers of the type computed in, not whole ones


@dataclass(frozen=True)
class Unit:
    """A direction's source and what its arguments are: pairs (role, what), in order; and its memory in entries."""

    text: str
    parts: dict[str, Schedule]
    arguments: tuple[Role, ...]
    memory: int  # per thread, and per row where rows share threads; without slots
    slot: int  # of a mini-batch in a group: its state, and what is kept with it

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products, for one mini-batch of one row."""
        return sum(s.flops for s in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes that come from and go to the caller's tensors, for one mini-batch of one row."""
        return sum(s.nbytes for s in self.parts.values())

    @property
    def memory_bytes(self) -> int:
        """Scratch memory of a thread, without the states of a group."""
        return self.memory * next(iter(self.parts.values())).itemsize

    def bound(self, flops_per_second: float, bytes_per_second: float) -> TimeBound:
        """Say below which time a mini-batch of a row cannot go on a machine of such rates, and what sets it."""
        return bound(self.flops, self.nbytes, flops_per_second, bytes_per_second)

    def __str__(self) -> str:
        parts = [f"{name}\n{describe(s)}" for name, s in self.parts.items()]
        kept = self.memory_bytes * self.slot // self.memory if self.memory else 0
        states = f", and {kept:,} for each state of a group" if kept else ""
        return "\n".join([*parts, f"memory of a thread: {self.memory_bytes:,} bytes{states}"])

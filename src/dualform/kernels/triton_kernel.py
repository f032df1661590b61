"""A kernel of a direction: its tensors, what torch does before and after it, and the frame of source around its lines.

A program is a row and a group of mini-batches; it loads what is carried, goes over them, and stores what is carried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from dualform.kernels import triton_ops
from dualform.kernels.targets import Target
from dualform.kernels.triton_lines import Lines
from dualform.kernels.triton_order import helpers
from dualform.learning.plan import Input

SCALARS = ("H", "count", "group", "G", "phase")
# Names that the frame has, and the kernels'.
RESERVED = {*SCALARS, *"tl triton row part first last n m j b h STAGES since float forward advance reverse".split()}


class Argument(NamedTuple):
    """A tensor of a kernel, (n, B, H, ...): what it is (as for C++), its name, and how many axes an entry has."""

    role: str
    what: Any
    name: str
    rank: int
    dtype: torch.dtype

    @property
    def strides(self) -> tuple[str, ...]:
        """Name its strides, after its own name."""
        return ("sn", "sb", "sh", *(f"s{k}" for k in range(self.rank)))


def held_in(x: Input, kept: Sequence[Input]) -> tuple[str, Any]:
    """Name the tensor of an input, as (role, what): in reverse, a state is one that was kept."""
    return ("kept", kept.index(x)) if x in kept else ("slice", x.name) if x.part == "passed" else ("input", x)


def goal_of(t: Target) -> tuple[str, Any]:
    """Name the tensor that an output goes to, as (role, what)."""
    if t.kind == "passed":
        return "slice", t.what
    return ("gradient", t.what) if t.kind == "added" else (t.what[0], t.what[1])


@dataclass(frozen=True)
class Outside:
    """What torch computes for all mini-batches: a graph, and its inputs: `Input`s, or names of values that are passed
    by the kernel, or were computed before it.

    apart: the ops that no kernel has, and why; what else there is stands between them and the kernel.
    """

    graph: fx.GraphModule
    inputs: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[torch.dtype, ...]
    targets: tuple[Target, ...] = ()
    apart: Mapping[fx.Node, str] = field(default_factory=dict)

    @property
    def ops(self) -> int:
        return len(self.graph.graph.nodes) - len(self.inputs) - 1


class Crossing(NamedTuple):
    """A value of each mini-batch that passes from one kernel to the next, or to torch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel's source, what its tensors are, and what torch does before and after it."""

    name: str
    text: str
    arguments: tuple[Argument, ...]
    before: Outside | None
    after: Outside | None
    passed: tuple[Crossing, ...]  # what it hands to `after`
    kept: tuple[Input, ...]  # in reverse, the states that a mini-batch started from
    slices: tuple[Crossing, ...]  # what it hands to later kernels
    carries: bool  # is one mini-batch after another?
    flops: int  # of matrix products, for one mini-batch of one row
    held: int  # entries of what is carried on
    largest: int  # entries of its largest tile, and of its tiles on average
    usual: int
    again: bool  # does it read again what it has no room for?
    exact: frozenset[int]  # of `kept`: what it reads as more than a factor of products

    @cached_property
    def by_torch(self) -> dict[tuple[str, Any], Crossing]:
        """What torch hands to later kernels, by tensor."""
        names = {t.what for t in (self.after.targets if self.after else ()) if t.kind == "passed"}
        return {("slice", x.name): x for x in self.slices if x.name in names}

    def __str__(self) -> str:
        lines = [
            f"# {part.ops} ops {when} it, by torch, for all mini-batches at once\n"
            for when, part in (("before", self.before), ("after", self.after)) if part is not None
        ]  # fmt: skip
        return "".join([*lines, self.text])


def source(
    name: str, arguments: Sequence[Argument], w: Lines, backwards: bool, head: Sequence[str], carry: Sequence[str],
    tail: Sequence[str],
) -> str:  # fmt: skip
    """Put lines together: head, the last before the loop; carry, the last in it; tail, those after it."""

    def those(lines: Sequence[str], suffix: str) -> list[str]:
        return [a.name for a in arguments if any(f"{a.name}_{suffix}" in x for x in lines)]

    rows = [f"{a.name}_row = {a.name}_p + b * {a.name}_sb + h * {a.name}_sh" for a in arguments]
    rows += [f"{a.name}_row += part * {a.name}_sn" for a in arguments if a.role == "before"]
    fixed = [f"{x}_at = {x}_row" for x in those(w.once, "at")]
    moving = [f"{x}_at = {x}_row + m * {x}_sn" for x in those(w.loop, "at")]
    ahead, on = (
        [f"{x}_ahead = {x}_row + (row * 0 + {n}) * {x}_sn" for x in those(w.next, "ahead")]
        for n in ("first", "tl.minimum(n + 1, last - 1)")
    )
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        "part = tl.program_id(1).to(tl.int64)",
        "b = row // H",
        "h = row % H",
        "first = tl.program_id(1) * group",
        "last = tl.minimum(first + group, count)",
        *(f"i{n} = tl.arange(0, {n})" for n in sorted(w.places)),
        *(*rows, *fixed, *w.once, *head, *ahead, *w.first),
        f"for {'j in tl.range(0, last - first' if backwards else 'n in tl.range(first, last'}, num_stages=STAGES):",
    ]
    begun = len(w.next)  # lines that take what was loaded ahead
    turn = ["n = last - 1 - j"] if backwards else []
    loop = [*turn, "m = row * 0 + n", *moving, *w.loop[:begun], *on, *w.next, *w.loop[begun:], *carry]
    text = "\n".join([*(f"    {x}" for x in body), *(f"        {x}" for x in loop), *(f"    {x}" for x in tail)])
    scalars = ", ".join(f'"{x}"' for x in SCALARS[1:])
    names = [f"{a.name}_{x}" for a in arguments for x in ("p", *a.strides)]
    begin = f"@triton.jit(do_not_specialize=[{scalars}])"
    define = f"def {name}({', '.join([*names, *SCALARS])}, STAGES: tl.constexpr):"
    imports = "import triton\nimport triton.language as tl\n\n"
    return "\n".join([imports, triton_ops.helpers(text), helpers(text), "", begin, define, text, ""])


__all__ = ["RESERVED", "SCALARS", "Argument", "Crossing", "Kernel", "Outside", "goal_of", "held_in", "source"]

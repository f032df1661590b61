"""What a generated function reads, writes, keeps and sums: one description, in whatever language and however it fuses.

A *function* is a graph of one mini-batch of one row (batch x head), with what each input is and where each output goes.
A *direction* is the functions that a row runs, mini-batch after mini-batch:

    forward    state <- start; per mini-batch: keep the state where asked, then `step`
    backward   group by group from the last: `advance`, the states of the group again from its first, and what else the
               vjp begins with (`sharing`); then `step`, the vjp, in reverse

Where rows are few a step is split where the state passes (`sliced`): `before` does not wait for it, `loop` carries it
on, nothing waits for `after`. The caller's tensors are arguments (role, what), (n, B, H, ...) each, of any strides:

    held         an input is ...                     and comes from, and goes to
    scratch      a mini-batch's own                  ("input", x) of mini-batch n
    fixed        the row's, or everybody's           ("input", x), the same for every n
    state        carried to the next mini-batch      ("before", k) -> ("after", k); in a group from ("kept", k)
    cotangent    carried to the one before           ("cotangent", k) -> ("turned", k)
    kept         made by `advance` with a state, and stays with the mini-batch until `step` has read it
    passed       made by one function of a split step, stays with the mini-batch until a later one has read it

Legend: n mini-batches of one call, G per kept state, P = B H rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from dualform.graphs.edit import inputs_of, only_outputs, results_of
from dualform.graphs.split import Fission, Part, split
from dualform.kernels.lowering import lowered
from dualform.kernels.ops import work
from dualform.kernels.sharing import made_again, price, shared
from dualform.learning.plan import Input
from dualform.ops.table import kind_of

EACH, ROW = "n", "0"  # the place of an argument along n: each mini-batch has its own; the only one of its row

What = Input | int | None
Role = tuple[str, What]
# What the caller's tensors are made of, where that is not what is computed in: ((part, name) of an `Input`, type), ...
Kinds = tuple[tuple[tuple[str, str], torch.dtype], ...]


class Target(NamedTuple):
    """Where an output goes.

    "given" to the caller, `what` = (role, what, EACH or ROW) | "over" input `what`, which it replaces | "next": what
    the next mini-batch has as input `what` | "added" over all mini-batches, for argument ("gradient", what) of the row
    (the caller adds rows) | "kept" with the state by name, or "passed" on to what comes after
    """

    kind: str
    what: Any

    @property
    def is_carried(self) -> bool:
        return self.kind in ("over", "next")

    @property
    def stays(self) -> bool:
        """With its mini-batch?"""
        return self.kind in STAYS


STAYS = ("kept", "passed")


def place_of(x: Input) -> str:
    """Say where an input is held."""
    if x.part in ("th", "R"):
        return "state"
    if x.part == "cotangent":
        return "scratch" if x.name == "0" else "cotangent"
    if x.part in STAYS:
        return x.part
    return "scratch" if x.over == "block" else "fixed"


def label(x: Input) -> str:
    """Name an input's buffer."""
    return f"{x.part}_{x.name}".replace(".", "_") if x.name != x.part else x.name


@dataclass(frozen=True)
class Function:
    """A graph, what its inputs are, where its outputs go. turn: the next mini-batch is the later, 1, or earlier, -1."""

    name: str
    graph: fx.GraphModule
    sources: tuple[Input, ...]
    targets: tuple[Target, ...]
    turn: int = 1

    @property
    def results(self) -> list[Any]:
        """The outputs: nodes, or numbers."""
        return results_of(self.graph.graph)

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.meta["val"].shape) if isinstance(x, fx.Node) else () for x in self.results]

    @property
    def shapes(self) -> dict[Input, tuple[int, ...]]:
        """Shapes of the inputs."""
        given = [n.meta["val"].shape for n in inputs_of(self.graph.graph)]
        return {x: tuple(shape) for x, shape in zip(self.sources, given, strict=True)}


@dataclass(frozen=True)
class Direction:
    """The functions that a row runs; `name` for people, `kinds` of the caller's tensors. advance: in the backward."""

    name: str
    dtype: torch.dtype
    kinds: Kinds
    step: Function
    advance: Function | None = None

    @property
    def functions(self) -> list[Function]:
        return [self.step] if self.advance is None else [self.advance, self.step]

    def held(self, place: str) -> list[Input]:
        """List what the step is given that is held somewhere: "state", "cotangent", ..."""
        return [x for x in self.step.sources if place_of(x) == place]

    @property
    def summed(self) -> list[Input]:
        """What gradients are added up for, over the mini-batches of a row."""
        return [t.what for t in self.step.targets if t.kind == "added"]

    def sliced(self) -> list[Function]:
        """Split the step where the state passes, in this order: `before`, `loop`, `after`."""
        return [*self.functions[:-1], *_parts(self.step)]


def forward(
    plain: fx.GraphModule, inputs: Sequence[Input], dtype: torch.dtype, name: str, kinds: Kinds = ()
) -> Direction:
    """Describe the forward direction: (inputs of a block, state) -> (outputs, state)."""
    step = Function("step", lowered(plain), tuple(inputs), ())
    step = replace(step, targets=tuple(forward_targets(inputs, len(step.results))))
    return Direction(f"{name}, forward", dtype, kinds, step)


def forward_targets(inputs: Sequence[Input], results: int) -> list[Target]:
    """Say where (output, state) of a step go: each new state over the old one, if there are as many."""
    after = [Target("over", x) for x in inputs if place_of(x) == "state"]
    if len(after) != results - 1:
        after = [Target("given", ("after", k, ROW)) for k in range(results - 1)]
    return [Target("given", ("o", None, EACH)), *after]


def backward(
    plain: fx.GraphModule, reverse: fx.GraphModule, inputs: Sequence[Input], wants: Sequence[bool], outputs: int,
    dtype: torch.dtype, name: str, kinds: Kinds = (),
) -> Direction:  # fmt: skip
    """Describe the backward direction: (inputs, kept states, cotangents) -> gradients of the inputs that have one."""
    states = tuple(x for x in inputs if place_of(x) == "state")
    again, graph, kept = shared(lowered(only_outputs(plain, slice(1, None))), lowered(reverse), len(inputs))
    cotangents = tuple(Input("cotangent", str(k), "block") for k in range(1, outputs))
    names = [str(k) for k in range(kept)]
    sources = (*inputs, Input("cotangent", "0", "block"), *cotangents, *(Input("kept", x, "block") for x in names))
    on = [Target("next", x) for x in states]
    if outputs - 1 != len(states):  # such a mini-batch is the only one of its call
        again, on = only_outputs(again, slice(outputs - 1, None)), []
    advance = Function("advance", again, tuple(inputs), (*on, *(Target("kept", x) for x in names)))
    step = Function("step", graph, sources, tuple(backward_targets(inputs, wants, cotangents)), -1)
    return Direction(f"{name}, backward", dtype, kinds, step, advance)


def backward_targets(inputs: Sequence[Input], wants: Sequence[bool], cotangents: Sequence[Input]) -> list[Target]:
    """Say where gradients go: of a mini-batch's own to the caller, of others into a sum, of the state on."""
    wanted = [x for x, want in zip(inputs, wants, strict=True) if want]
    turning, found = [x for x in wanted if place_of(x) == "state"], []
    for x in wanted:
        if x not in turning:
            found.append(Target("given", ("gradient", x, EACH)) if x.over == "block" else Target("added", x))
        elif len(turning) == len(cotangents):
            found.append(Target("over", cotangents[turning.index(x)]))
        else:
            found.append(Target("given", ("turned", turning.index(x), ROW)))
    return found


def in_turn(t: Target) -> Target:
    """What is added over mini-batches is passed on, until it is their turn."""
    return Target("passed", f"sum_{label(t.what)}") if t.kind == "added" else t


def _parts(step: Function) -> list[Function]:
    """Make `before`, `loop` and `after`; what passes from one to the next stays with the mini-batch."""
    views_apart(step.graph)
    on = [k for k, t in enumerate(step.targets) if t.kind == "over"]
    places = [step.sources.index(step.targets[k].what) for k in on]
    f = split(step.graph, places, on, None, price, work, made_again)
    found = list[Function]()
    for name, graph, made, goes in parted(f, step.sources, step.targets, step.results):
        at_hand = {t.what for f in found for t in f.targets}
        assert not (late := [x for x in made if x.part == "passed" and x.name not in at_hand]), f"{name} reads {late}"
        found.append(replace(step, name=name, graph=graph, sources=made, targets=tuple(map(in_turn, goes))))
    return found


def parted(
    f: Fission, sources: Sequence[Input], targets: Sequence[Target], results: Sequence[Any]
) -> Iterator[tuple[str, fx.GraphModule, tuple[Input, ...], list[Target]]]:
    """Yield a split step's `before`, `loop` and `after`, each with what its inputs are and where its outputs go."""
    on = [k for k, t in enumerate(targets) if t.kind == "over"]
    known = dict(zip(f.inputs, sources, strict=True))
    parts: dict[str, Part] = {"before": f.before, "loop": f.loop, "after": f.after}
    home = {x: name for name in parts for x in parts[name].outputs if isinstance(x, fx.Node) and x not in known}
    crossing = {x for part in parts.values() for x in part.inputs}
    crossing |= {x for x in f.loop.outputs if x in f.carried}  # the state that a mini-batch starts from
    for name, part in parts.items():
        first = on if name == "loop" else []
        passed = [x for x in part.outputs[len(first) :] if x in crossing]
        ends = [k for k in range(len(results)) if k not in on and home.get(results[k], "after") == name]
        wanted = [*(results[k] for k in first), *passed, *(results[k] for k in ends)]
        inner, inputs = part_module(part, wanted, f.carried if name == "loop" else ())
        goes = [*(targets[k] for k in first), *(Target("passed", x.name) for x in passed), *(targets[k] for k in ends)]
        given = {x: y for x, y in known.items() if name != "after" or x not in f.carried}
        yield name, inner, tuple(given.get(x, Input("passed", x.name, "block")) for x in inputs), goes


def views_apart(gm: fx.GraphModule) -> None:
    """Give every reader a view of its own: a view is no reason to be in the same place."""
    for n in reversed(list(gm.graph.nodes)):
        if n.op == "call_function" and (kind_of(n.target) == "view" or n.target is operator.getitem):
            for user in list(n.users)[1:]:
                with gm.graph.inserting_before(n):
                    twin = gm.graph.node_copy(n)
                user.replace_input_with(n, twin)


def part_module(part: Part, wanted: Sequence[Any], carried: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy a part so that it returns what is wanted, inputs among it, and takes all that is carried."""
    graph, copies = fx.Graph(), {}
    outputs: Any = graph.graph_copy(part.graph.graph, copies)
    values: dict[Any, Any] = dict(zip(part.inputs, inputs_of(graph), strict=True))
    values |= {x: y for x, y in zip(part.outputs, outputs, strict=True) if x not in values}
    missing = (x for x in dict.fromkeys((*carried, *wanted)) if isinstance(x, fx.Node) and x.op == "placeholder")
    new = [x for x in missing if x not in values]
    for x in new:
        with graph.inserting_before(next(iter(graph.nodes), None)):
            values[x] = graph.placeholder(x.name)
        values[x].meta = dict(x.meta)
    graph.output([values.get(x, x) for x in wanted])
    return fx.GraphModule(part.graph, graph), [*reversed(new), *part.inputs]

"""A function traced once for its shapes: what of its derivatives does not depend on values is made once and kept.

The first use of a derivative interprets the graph; from the second on, a straight-line program made from the same rules
runs (`graphs/straight_line.py`). Traces are kept by `fingerprint.py`'s key: code, settings, shapes, strides, dtypes and
devices; never values of tensors, and never identity alone. At most 256 are kept, the least recently used goes first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dualform.algebra.index_text import IndexFormula
from dualform.algebra.laid import refilled, tensors_of
from dualform.algebra.linear_map import Derivative, Route
from dualform.algebra.normal_form import settled
from dualform.algebra.terms import Term, recorded
from dualform.bounded import Bounded
from dualform.explanations.account import Story
from dualform.explanations.composition import Joined
from dualform.explanations.explanation import Explanation
from dualform.explanations.wording import name_nodes
from dualform.graphs.edit import add_input, evaluated, lift, results_of
from dualform.graphs.fingerprint import Fingerprint
from dualform.graphs.identities import canonical_graph
from dualform.graphs.local_derivatives import Program
from dualform.graphs.local_rules import derivative as local_derivative
from dualform.graphs.local_rules import reads_values
from dualform.graphs.straight_line import Split, runnable, split, straight
from dualform.graphs.told_apart import expect_as_on_tensors
from dualform.graphs.trace import trace
from dualform.shapes import fail
from dualform.storages import times_written

TermsAt = Callable[[Sequence[Tensor]], Sequence[Term]]

_traces: Bounded[Traced] = Bounded(256)


def clear_cache() -> None:
    """Forget all traces.

    Shape:  none.
    Dtype:  none.
    Raises: nothing.
    """
    _traces.clear()


def cache_size() -> int:
    """How many traces are kept.

    Shape:  none.
    Dtype:  none.
    Raises: nothing.
    """
    return len(_traces)


@dataclass(frozen=True)
class Skeleton:
    """A sum of terms without its numbers: the factors' tensors are results of `values(*inputs)`, by position."""

    terms: tuple[Term, ...]
    places: tuple[tuple[int, ...], ...]
    values: Callable[..., tuple[Tensor, ...]]
    graph: fx.GraphModule

    @staticmethod
    def of(compute: TermsAt, inputs: Sequence[Tensor]) -> Skeleton:
        """Make the terms on stand-ins, and write down how their tensors come from the inputs."""
        terms: list[Term] = []

        def tensors(*given: Tensor) -> tuple[Tensor, ...]:
            terms[:] = settled(compute(given))
            return tuple(_distinct(terms).values())

        gm = straight(tensors, *inputs)
        position = {key: k for k, key in enumerate(_distinct(terms))}
        places = tuple(tuple(position[id(t)] for t in found) for found in tensors_of(terms))
        copy = fx.Graph()
        copy.output(copy.graph_copy(gm.graph, {}))
        return Skeleton(tuple(terms), places, runnable(copy, gm), gm)

    def filled(self, inputs: Sequence[Tensor]) -> tuple[Term, ...]:
        """The terms at a point."""
        made = self.values(*inputs)
        found = []
        for term, places in zip(self.terms, self.places, strict=True):
            at = iter(places)
            found.append(replace(term, factors=tuple(refilled(f, made, at)[0] for f in term.factors)))
        return tuple(found)


def _distinct(terms: Sequence[Term]) -> dict[int, Tensor]:
    return {id(t): t for found in tensors_of(terms) for t in found}


class Traced:
    """A function's graph; its inputs are the tensors among the arguments, then the tensors that it closes over."""

    def __init__(
        self, f: Callable[..., Any], tensors: Sequence[Tensor], names: Sequence[str], known: Fingerprint,
        steps: bool = False,
    ) -> None:  # fmt: skip
        self.spec: Any = None

        def flat(*given: Tensor) -> Any:
            result = f(*given)
            for path, leaf in pytree.tree_flatten_with_path(result)[0]:
                if not isinstance(leaf, Tensor):
                    where = f" at {pytree.keystr(path)}" if path else ""
                    advice = "Return tensors alone."
                    expected = "tensors, or a dict, tuple or list of them"
                    fail("jacobian", "f", f"returns {type(leaf).__name__}{where}", expected, advice)
            leaves, self.spec = pytree.tree_flatten(result)
            return tuple(leaves)

        gm = trace(flat, *tensors, generators=known.generators, steps=steps)
        expect_as_on_tensors(flat, gm, tensors, tensors, known.telling)
        self.slots, constants, made = _lifted(gm, known)
        self.gm = canonical_graph(gm)
        self.is_cacheable = made
        self.input_names = [*names, *constants]
        self.names = name_nodes(self.gm, self.input_names)
        self.out_values: list[Tensor] = [n.meta["val"] for n in results_of(self.gm.graph)]
        _refuse_steps(results_of(self.gm.graph))
        self.uses: Counter[tuple] = Counter()
        self.made: dict[tuple, Any] = {}

    def program(self, values: Any, output: int, source: int) -> Program:
        """The graph of local derivatives from one input to one result."""
        return Program(self.gm, values, source, local_derivative, self.names, output)

    def again(self, key: tuple, make: Callable[[], Any]) -> Any:
        """From the second use of `key` on, what `make` makes, made once; None at the first use."""
        if key not in self.made:
            self.uses[key] += 1
            if self.uses[key] < 2:
                return None
            try:
                self.made[key] = make()
            except RuntimeError as error:
                if not reads_values(error):
                    raise
                self.made[key] = None  # it cannot be written down for all values: it is interpreted each time
        return self.made[key]

    def always(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes, made once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def gradient(self, source: int, inputs: Sequence[Tensor]) -> fx.GraphModule:
        """The graph of the gradient of the first result's sum."""

        def compute(*given: Tensor) -> Tensor:
            program = self.program(given, 0, source)
            return program.vjp(torch.ones_like(program.values[program.output]))

        return self.always(("gradient", source), lambda: straight(compute, *inputs))

    def linear(self, kind: str, output: int, source: int, inputs: Sequence[Tensor]) -> Split | None:
        """The vjp or jvp as two straight-line programs."""

        def make() -> Split:
            like = self.out_values[output] if kind == "vjp" else inputs[source]
            seed = torch.empty(like.shape, dtype=like.dtype, device=like.device)

            def compute(seed: Tensor, *given: Tensor) -> Tensor:
                return getattr(self.program(given, output, source), kind)(seed)

            return split(compute, seed, *inputs)

        return self.again((kind, output, source), make)

    def terms(self, key: tuple, compute: TermsAt, point: Point) -> tuple[Term, ...]:
        """A sum of terms at a point: computed at the first use of `key`, from then on filled in."""
        made = self.again(key, lambda: Skeleton.of(compute, point.inputs)) if point.is_plain else None
        return settled(compute(point.inputs)) if made is None else made.filled(point.inputs)


def _refuse_steps(results: Sequence[fx.Node]) -> None:
    """Results of integers or bools alone move in steps: there is no derivative that says anything."""
    if results and not any(node.meta["val"].is_floating_point() for node in results):
        dtype, made = results[0].meta["val"].dtype, getattr(results[0].target, "_opname", results[0].name)
        soft = "or a soft form of it (softmax for argmax, sigmoid for >)."
        advice = f"It moves in steps: return what it was made of, {soft}"
        fail("jacobian", "f", f"returns {dtype} (made by {made})", "a floating result", advice)


def _lifted(gm: fx.GraphModule, known: Fingerprint) -> tuple[list[int | Tensor], list[str], bool]:
    """Make closed-over tensors inputs: its name, and where each is found again (a fingerprint slot, or itself)."""
    slot: dict[int, Any] = {id(t): k for k, t in enumerate(known.tensors)}
    slots: list[int | Tensor] = []
    names: list[str] = []
    nodes: dict[int, fx.Node] = {}

    def stand_for(value: Tensor, node: fx.Node) -> fx.Node:
        if id(value) not in nodes:
            nodes[id(value)] = add_input(gm.graph, f"constant{len(nodes)}", node.meta.get("val", value))
            slots.append(slot.get(id(value), value))
            names.append((known.names[slot[id(value)]] if id(value) in slot else "") or f"c{len(nodes)}")
        return nodes[id(value)]

    lift(gm, stand_for)
    return slots, names, known.key is not None and all(isinstance(s, int) for s in slots)


def traced(
    key: Fingerprint, flat: Callable[..., Any], tensors: Sequence[Tensor], names: Sequence[str], steps: bool = False
) -> tuple[Traced, list[Tensor]]:
    """Trace a function of tensors, or find its trace by its key; and the tensors that it closes over now.

    steps: masks of the tensors may be read; their values are part of the key.
    """
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    found = _traces.get(key.key) if key.key is not None and plain else None
    if found is None:
        found = Traced(flat, tensors, names, key, steps)
        if plain and found.is_cacheable:
            _traces[key.key] = found
    return found, [key.tensors[s].detach() if isinstance(s, int) else s.detach() for s in found.slots]


class Point:
    """The tensors at which a function is differentiated; what its graph makes of them is made when asked for."""

    def __init__(self, traced: Traced, inputs: Sequence[Tensor]) -> None:
        self.traced = traced
        self.inputs = list(inputs)
        self.versions = [times_written(t) for t in inputs]

    @cached_property
    def values(self) -> dict[fx.Node, Any]:
        return evaluated(self.traced.gm, self.inputs)

    @property
    def is_plain(self) -> bool:
        return all(type(t) is Tensor and t.device.type != "meta" for t in self.inputs)

    def check(self) -> None:
        """Refuse to go on from tensors that are not what they were."""
        for name, t, version in zip(self.traced.input_names, self.inputs, self.versions, strict=True):
            if times_written(t) != version:
                found, advice = "was changed in place since", "Differentiate again, or differentiate a clone."
                fail("Derivative", name, found, "the tensor differentiated at", advice, ValueError)


class AtPoint(Route):
    """The route of a derivative that a traced function has at a point; `story` makes its account."""

    def __init__(self, point: Point, story: Callable[[], Story]) -> None:
        self.point = point
        self.story = story

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The function's inputs and the tensors that it closes over, by name."""
        return dict(zip(self.point.traced.input_names, self.point.inputs, strict=True))

    def explain(self, derivative: Derivative, level: str) -> Explanation:
        """The account of the derivative."""
        with recorded():
            return self.story().explain(self.told(derivative), level, *self.programs)

    def shown(self, derivative: Derivative) -> IndexFormula:
        """The derivative in index notation, in the names of its account."""
        with recorded():
            return self.story().shown(self.told(derivative))

    def told(self, derivative: Derivative) -> Derivative:
        """The derivative made once more, with a record of what its factors are made of."""
        self.point.check()
        with recorded():
            found = derivative.with_terms(settled(self.computed()), derivative.is_symmetric)
        found.route = self
        return found

    @abstractmethod
    def computed(self) -> Sequence[Term]:
        """The terms, from what is new and nobody keeps."""

    @property
    @abstractmethod
    def programs(self) -> Sequence[Program]:
        """The graphs whose nodes' names the factors have."""

    def joined(self, outer: Derivative, inner: Derivative) -> Route:
        """The route of a product."""
        return Joined(outer, inner)


class Applied(AtPoint):
    """The route of a first derivative, of one result by one input."""

    def __init__(self, point: Point, output: int, source: int, story: Callable[[], Story]) -> None:
        super().__init__(point, story)
        self.output = output
        self.source = source
        self._ready: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {}

    @cached_property
    def _program(self) -> Program:
        return self.point.traced.program(self.point.values, self.output, self.source)

    def terms(self) -> tuple[Term, ...]:
        """The derivative as a sum of terms."""
        self.point.check()
        point, key = self.point, ("terms", self.output, self.source)

        def compute(inputs: Sequence[Tensor]) -> Sequence[Term]:
            if inputs is point.inputs:
                return self.computed()
            return point.traced.program(inputs, self.output, self.source).terms()

        return point.traced.terms(key, compute, point)

    @property
    def programs(self) -> Sequence[Program]:
        """A program of its own."""
        return [self.point.traced.program(self.point.values, self.output, self.source)]

    def computed(self) -> Sequence[Term]:
        """The terms, along a program of their own."""
        return self.programs[0].terms()

    def vjp(self, g: Tensor) -> Tensor:
        """Pull back along the graph."""
        return self._apply("vjp", g)

    def jvp(self, v: Tensor) -> Tensor:
        """Push forward along the graph."""
        return self._apply("jvp", v)

    def _apply(self, kind: str, seed: Tensor) -> Tensor:
        self.point.check()
        ready = self._ready.get(kind)
        result = self._along_graph(kind, seed) if ready is None else ready[0](seed, *ready[1])
        return self._looked_at_again(kind, seed, result) if self._selects else result

    def _looked_at_again(self, kind: str, seed: Tensor, result: Tensor) -> Tensor:
        point = self.point
        if _is_finite(result) or not _is_finite(seed):
            return result
        try:  # 0 times infinity where a mask comes later on this way: the terms have it beside what it leaves out
            out, x = point.traced.out_values[self.output], point.inputs[self.source]
            plain = Derivative(self.terms(), out.shape, x.shape, out.dtype, x.device)
        except MemoryError:
            return result
        return torch.where(result.isfinite(), result, getattr(plain, kind)(seed))

    def _along_graph(self, kind: str, seed: Tensor) -> Tensor:
        point = self.point
        made = point.traced.linear(kind, self.output, self.source, point.inputs) if point.is_plain else None
        if made is None:
            return getattr(self._program, kind)(seed)
        if kind not in self._ready:
            self._ready[kind] = made.apply, made.prepare(*point.inputs)
        apply, prepared = self._ready[kind]
        return apply(seed, *prepared)

    @cached_property
    def _selects(self) -> bool:
        key = ("selects", self.output, self.source)
        return self.point.is_plain and self.point.traced.always(key, lambda: self._program.selects)

    def completed(self, dense: Tensor) -> Tensor:
        """Pull back again, along the graph, the rows that hold no number: terms add up in another order."""
        if not self._selects or _is_finite(dense):
            return dense
        rows = dense.reshape(self.point.traced.out_values[self.output].numel(), -1)
        for k in (~rows.isfinite()).any(1).nonzero().flatten().tolist():
            seed = torch.zeros(len(rows), dtype=dense.dtype, device=dense.device)
            seed[k] = 1
            row = self._along_graph("vjp", seed.reshape(self.point.traced.out_values[self.output].shape)).flatten()
            rows[k] = torch.where(rows[k].isfinite(), rows[k], row)
        return dense


def _is_finite(x: Tensor) -> bool:
    """Are all numbers finite? Of what a transform wraps nobody knows."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]
    return type(x) is not Tensor or is_wrapped or x.device.type == "meta" or math.isfinite(x.sum().item())

"""Second derivatives: the derivative of a structured derivative, factor by factor, so that its deltas stay.

d (c A B) / dx = c (dA/dx) B + c A (dB/dx)        A, B: tensors that a traced graph makes of the inputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualform.algebra.compose import compose_terms
from dualform.algebra.laid import refilled
from dualform.algebra.linear_map import Derivative
from dualform.algebra.sums import tidy
from dualform.algebra.terms import Factor, Term
from dualform.calculus.jacobian import Given, Wrt
from dualform.calculus.traced import AtPoint, Point, Skeleton
from dualform.explanations.account import Story
from dualform.explanations.explanation import Explanation
from dualform.graphs.complex_rules import paired
from dualform.graphs.edit import evaluated, results_of
from dualform.graphs.identities import canonical_graph
from dualform.graphs.kept_derivative import expect_twice
from dualform.graphs.local_derivatives import Program
from dualform.graphs.local_rules import derivative as local_derivative
from dualform.graphs.single_results import normalised
from dualform.graphs.straight_line import blame
from dualform.shapes import fail


def hessian(f: Callable[..., Any], *args: Any, wrt: Wrt = 0, **kwargs: Any) -> Any:
    """Differentiate a torch function twice, keeping the structure.

    H[out..., in..., in'...] = d^2 f[out...] / d args[wrt][in...] d args[wrt][in'...]
    Shape:  f gives one tensor; H.out_shape = out_shape + in_shape, H.in_shape = in_shape. A tuple `wrt` gives a tuple
            of tuples of mixed partials, an argument that is a tree a tree of trees.
    Dtype:  the result's. For a scalar f, `H.is_symmetric` and H[a][b] is H[b][a].T, the same numbers.
    Raises: as `jacobian`; ValueError if f gives more than one tensor.
    Example:
        >>> import torch
        >>> H = hessian(lambda x: (x * x).sum(), torch.ones(3))
        >>> print(H.structure, H.nbytes, H.is_symmetric)
        J[i,j] = 2 δ(i,j) 0 True
    """
    given = Given(f, args, kwargs)
    chosen = given.chosen("hessian", wrt)
    at = given.traced(None)
    expect_twice(at.traced.gm)
    if len(at.traced.out_values) != 1:
        what = f"returns {len(at.traced.out_values)} tensors"
        fail("hessian", "f", what, "one tensor", "Choose one of them.", ValueError)
    scalar = at.traced.out_values[0].ndim == 0
    found: dict[tuple[int, int], Derivative] = {}

    def block(first: int, second: int) -> Derivative:
        if scalar and (second, first) in found:
            mirrored = found[second, first]
            return mirrored if first == second else mirrored.T
        return found.setdefault((first, second), _block(given, at, first, second, scalar and first == second))

    def rows(first: Any, second: Any) -> Any:
        return pytree.tree_map(lambda a: pytree.tree_map(partial(block, a), second), first)

    if isinstance(wrt, tuple):
        return tuple(tuple(rows(a, b) for b in chosen) for a in chosen)
    return rows(chosen[0], chosen[0])


def _block(given: Given, at: Point, first: int, second: int, symmetric: bool) -> Derivative:
    route = Second(at, first, second, partial(_gradient_story, given, at, first, second))
    out, x, y = at.traced.out_values[0], at.inputs[first], at.inputs[second]
    shape = (*out.shape, *x.shape)
    return Derivative(route.terms, shape, y.shape, out.dtype, x.device, route=route, symmetric=symmetric)


class Second(AtPoint):
    """The route of a second derivative: its terms, and its account as the derivative of the gradient."""

    def __init__(self, point: Point, first: int, second: int, story: Callable[[], Story]) -> None:
        super().__init__(point, story)
        self.first = first
        self.second = second

    def terms(self) -> tuple[Term, ...]:
        """The second derivative as a sum of terms."""
        self.point.check()
        traced = self.point.traced
        slope = traced.always(("slope", self.first), lambda: _slope(self.point, self.first))
        return traced.terms(("second", self.first, self.second), partial(self._differentiated, slope), self.point)

    @property
    def programs(self) -> Sequence[Program]:
        """That of the first derivative's numbers, if it has any."""
        traced, inputs = self.point.traced, self.point.inputs
        graph = traced.always(("slope", self.first), lambda: _slope(self.point, self.first)).graph
        names = traced.input_names
        return [Program(graph, inputs, self.second, local_derivative, names)] if results_of(graph.graph) else []

    def explain(self, derivative: Derivative, level: str) -> Explanation:
        """The account of the derivative of the gradient."""
        out = self.point.traced.out_values[0]
        if out.ndim:
            expected, advice = "one number", "Explain one of them: index the result of f."
            fail("explain", "f", f"gives {tuple(out.shape)} numbers", expected, advice, ValueError)
        return super().explain(derivative, level)

    def computed(self) -> Sequence[Term]:
        """The terms, from a first derivative of their own."""
        return self._differentiated(_slope(self.point, self.first), self.point.inputs)

    def _differentiated(self, slope: Skeleton, inputs: Sequence[Tensor]) -> Sequence[Term]:
        traced = self.point.traced
        values = evaluated(slope.graph, inputs)
        like = traced.out_values[0]
        blank = torch.empty((), dtype=like.dtype, device=like.device)
        made = [values[node] for node in results_of(slope.graph.graph)]
        moved: dict[int, Sequence[Term]] = {}
        total: list[Term] = []
        for term, places in zip(slope.terms, slope.places, strict=True):
            at = iter(places)
            filled = [refilled(f, made, at) for f in term.factors]
            for k, (f, place) in enumerate(filled):
                if not isinstance(f, Factor) or place is None or f.is_mask:
                    continue
                if place not in moved:
                    program = Program(slope.graph, values, self.second, local_derivative, traced.input_names, place)
                    moved[place] = program.terms()
                others = tuple(g for j, (g, _) in enumerate(filled) if j != k)
                outer = Term(term.coef, others, (*term.out, *term.inn), tuple((x,) for x in f.labels))
                total += [t for inner in moved[place] if (t := compose_terms(outer, inner)) is not None]
        return tidy(total, blank)

    def vjp(self, g: Tensor) -> Tensor:
        """Apply the adjoint by the terms."""
        return self._plain().vjp(g)

    def jvp(self, v: Tensor) -> Tensor:
        """Apply the second derivative by the terms."""
        return self._plain().jvp(v)

    def _plain(self) -> Derivative:
        at = self.point
        out, x, y = at.traced.out_values[0], at.inputs[self.first], at.inputs[self.second]
        return Derivative(self.terms(), (*out.shape, *x.shape), y.shape, out.dtype, x.device)


def _slope(point: Point, source: int) -> Skeleton:
    """The first derivative without numbers, its graph in canonical form."""
    traced = point.traced

    def compute(inputs: Sequence[Tensor]) -> Sequence[Term]:
        return traced.program(inputs, 0, source).terms()

    found = Skeleton.of(compute, point.inputs)
    return Skeleton(found.terms, found.places, found.values, canonical_graph(paired(normalised(found.graph), blame)))


def _gradient_story(given: Given, at: Point, first: int, second: int) -> Story:
    """The account of the derivative of the gradient (of the sum of the results, if f gives several numbers)."""
    gm = at.traced.gradient(first, at.inputs)
    constants = at.inputs[len(given.tensors) :]

    def gradient(*tensors: Tensor) -> Tensor:
        return gm(*tensors, *constants)

    return Story(gradient, given.tensors, second, given.names, None)

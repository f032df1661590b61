"""Derivatives that know which axis counts tokens: weighted, masked, turned, and priced without being computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.algebra.contract import plan
from dualform.algebra.linear_map import Axis, Derivative, Factor, Term, compose
from dualform.algebra.planner import Price
from dualform.algebra.relations import Lookup
from dualform.algebra.terms import Label, Relation, atoms, sizes, volume
from dualform.graphs import local_rules as table
from dualform.learning.rules import Coefficients, Scalar


class Place(NamedTuple):
    """Where the token index sits: axis `axis` is (outer, W, inner), row-major."""

    axis: int
    outer: int
    inner: int


def token_first(x: Tensor, place: Place, W: int) -> Tensor:
    axis, outer, inner = place
    x = x.reshape(*x.shape[:axis], outer, W, inner, *x.shape[axis + 1 :])
    return x.movedim(axis + 1, 0)


def token_back(x: Tensor, place: Place, shape: Sequence[int]) -> Tensor:
    axis, outer, inner = place
    x = x.reshape(x.shape[0], *shape[:axis], outer, inner, *shape[axis + 1 :])
    return x.movedim(0, axis + 1).reshape(shape)


def separated(J: Derivative, place: Place, W: int, y: Tensor) -> tuple[Derivative, int]:
    """View y so that its token index is an axis of its own."""
    if place.outer == 1 and place.inner == 1:
        return J, place.axis
    shape = [*y.shape[: place.axis], place.outer, W, place.inner, *y.shape[place.axis + 1 :]]
    view = table.OpCall(torch.ops.aten.reshape.default, (y, shape), {}, y.reshape(shape))
    return compose(table.derivative(view, 0), J), place.axis + 1


def _edit(J: Derivative, change: Callable[[Term], Term], out: Sequence[int], inn: Sequence[int]) -> Derivative:
    return Derivative(tuple(change(term) for term in J.terms), tuple(out), tuple(inn), J.dtype, J.device)


def tokens(axes: tuple[Axis, ...], axis: int | None) -> Axis:
    return () if axis is None else axes[axis]


def count(J: Derivative, axis: int | None) -> int:
    return 1 if axis is None else J.out_shape[axis]


def masked(kernel: Derivative, q: int | None, k: int | None, C: Tensor) -> Derivative:
    """Multiply a kernel [t.., s..] by C[t, s]."""

    def change(term: Term) -> Term:
        t, s = tokens(term.out, q), tokens(term.inn, k)
        return replace(term, factors=(*term.factors, Factor(C.reshape(sizes((*t, *s))), (*t, *s), "C")))

    return _edit(kernel, change, kernel.out_shape, kernel.in_shape)


def weighted(J: Derivative, axis: int | None, w: Scalar) -> Derivative:
    """Multiply J by a weight per token of its output."""
    if not isinstance(w, Tensor):
        return w * J

    def change(term: Term) -> Term:
        t = tokens(term.out, axis)
        return replace(term, factors=(*term.factors, Factor(w.reshape(sizes(t)), t, "w")))

    return _edit(J, change, J.out_shape, J.in_shape)


def per_source(J: Derivative, axis: int | None) -> Derivative:
    """Turn J into the map delta -> each token's own gradient: J^T with the token kept as the first output axis."""
    T = J.T

    def change(term: Term) -> Term:
        return replace(term, out=(tokens(term.inn, axis), *term.out))

    return _edit(T, change, (count(J, axis), *T.out_shape), T.in_shape)


def per_target(J: Derivative, axis: int | None) -> Derivative:
    """Turn J into the map (weights per token) -> y."""

    def change(term: Term) -> Term:
        return replace(term, inn=(tokens(term.out, axis), *term.inn))

    return _edit(J, change, J.out_shape, (count(J, axis), *J.in_shape))


# A leaf at some sites of the keys: d y / d leaf, the token axis of y, delta.
Written = tuple[Derivative, "int | None", Tensor]


def together(written: Sequence[Written]) -> list[Written]:
    """Lay what like sites write one upon another, along a summed axis: n uses meet n in n products, not n^2."""
    groups: dict[Any, list[Written]] = {}
    for one in written:
        groups.setdefault((one[1], *map(_pattern, one[0].terms)), []).append(one)
    return [_stacked(group) if len(group) > 1 else group[0] for group in groups.values()]


def _pattern(term: Term) -> Any:
    """A term but for its numbers."""
    number = {label: (k, label.size) for k, label in enumerate((*term.visible, *term.hidden))}
    sides = tuple(tuple(tuple(number[x] for x in axis) for axis in side) for side in (term.out, term.inn))
    kinds = ((f.tensor.dtype if isinstance(f, Factor) else f.key, *(number[x] for x in f.labels)) for f in term.factors)
    return term.coef, sides, tuple(kinds)


def _stacked(written: Sequence[Written]) -> Written:
    u, axis = Label(len(written)), written[0][1]

    def stack(*fs: Any) -> Any:
        first, *others = fs
        if isinstance(first, Relation) or all(f.tensor is first.tensor for f in others):
            return first
        return Factor(torch.stack([f.tensor for f in fs]), (u, *first.labels), f"[{', '.join(f.name for f in fs)}]")

    def laid(*terms: Term) -> Term:
        factors = tuple(itertools.starmap(stack, zip(*(t.factors for t in terms), strict=True)))
        return replace(terms[0], factors=factors, out=((u,), *terms[0].out))

    Js, deltas = [J for J, _, _ in written], [delta for *_, delta in written]
    J = Js[0]
    terms = tuple(itertools.starmap(laid, zip(*(J.terms for J in Js), strict=True)))
    made = Derivative(terms, (u.size, *J.out_shape), J.in_shape, J.dtype, J.device)
    return made, None if axis is None else axis + 1, torch.stack(deltas)


def running(coef: Coefficients, W: int, size: int, itemsize: int) -> tuple[bool, Price]:
    """Is sum_{s<=t} C[t,s] g_s a running sum, and its price, that of one where C = tril(row x col); size:
    numbers of all W g's."""
    added, product = Price(3 * size, 6 * size * itemsize), Price(2 * W * size, 2 * size * itemsize)
    can = coef.row is not None and coef.col is not None
    return can and added.total < product.total, added if can else product


def prefix(g: Tensor, coef: Coefficients) -> Tensor:
    """sum_{s<=t} C[t,s] g_s."""
    shape = (-1, *[1] * (g.ndim - 1))
    if coef.row is not None and coef.col is not None and running(coef, len(g), g.numel(), g.element_size())[0]:
        return coef.row.reshape(shape) * (coef.col.reshape(shape) * g).cumsum(0)
    return (coef.C @ g.flatten(1)).reshape(g.shape) if g.ndim > 1 else coef.C @ g


def is_elementwise(J: Derivative) -> bool:
    """Does each entry of y meet one entry of the leaf, so that a leaf per token is no larger than y?"""
    return all(set(atoms(term.inn)) <= set(atoms(term.out)) for term in J.terms)


def kernel_first(K: Derivative, v: Tensor) -> Price:
    """Price K[v] with the kernel made before it meets v: query with key first."""
    total = Price()
    for term in K.terms:
        kept = _present((*term.out, *term.inn), term.factors)
        made = Factor(v.new_empty(sizes(kept)), kept, "K")
        alone = Derivative((replace(term, factors=(made,)),), K.out_shape, K.in_shape, K.dtype, K.device)
        total += plan(term.factors, kept).price + Price(largest=volume(kept)) + price(alone, v)
    return total


def _present(axes: tuple[Axis, ...], factors: Sequence[Factor | Relation]) -> tuple[Label, ...]:
    return tuple(x for x in dict.fromkeys(atoms(axes)) if any(x in f.labels for f in factors))


def price(J: Derivative, like: Tensor) -> Price:
    """Price J[v] without computing it, v of a dtype like this: every term's contraction, as planned."""
    total = Price()
    for term in J.terms:
        labels = atoms(term.inn)
        factors = (*term.factors, Factor(like.new_empty(sizes(labels)), labels, "v"))
        total += plan(factors, _present(term.out, factors)).price
    return total


def carried_places(J: Derivative | None, place: Place, W: int) -> set[Place | None]:
    """Follow the token index of an input axis to the output: one place per term; empty if a term loses it."""
    found: set[Place | None] = set()
    for term in () if J is None else J.terms:
        hit = find_label(term.inn[place.axis], place.inner, W)
        if hit is None:
            return set()
        label, inner = hit
        every = ((axis, *found) for axis, labels in enumerate(term.out) for found in strides(labels))
        where = [(axis, stride) for axis, other, stride in every if other is label]
        if len(where) != 1 or are_tied(term, {label}):
            return set()
        axis, stride = where[0]
        inner *= stride
        found.add(Place(axis, math.prod(l.size for l in term.out[axis]) // (inner * W), inner))
    return found


def are_tied(term: Term, labels: set[Label]) -> bool:
    """Does a relation say which index it is? To look up one number for each index does not."""
    return any(labels & set(r.bigs if isinstance(r, Lookup) else r.labels) for r in term.relations)


def uncut(term: Term, labels: set[Label]) -> tuple[Term, set[Label]]:
    """Follow indices to before they were cut: a part of what is the same along an axis is so, too."""
    cuts = [r for r in term.selects if r.small in labels]
    rest = tuple(f for f in term.factors if not any(f is r for r in cuts))
    return replace(term, factors=rest), labels | {r.big for r in cuts}


def strides(labels: Axis) -> list[tuple[Label, int]]:
    """List an axis' labels with their strides, outermost first."""
    return [(label, math.prod(l.size for l in labels[n + 1 :])) for n, label in enumerate(labels)]


def find_label(labels: Axis, inner: int, W: int) -> tuple[Label, int] | None:
    """Find the one label that holds the digits [inner, inner W) of an axis, and where in it they begin."""
    for label, stride in strides(labels):
        if stride <= inner and inner * W <= stride * label.size and inner % stride == 0:
            return label, inner // stride
    return None

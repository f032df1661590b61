"""Terms without an input, put in for factors; and an equation of matrices with the numbers of its text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.index_text import tex
from dualform.algebra.linear_map import Derivative
from dualform.algebra.materialise import spread
from dualform.algebra.matrix_text import NoMatrixForm, in_latex
from dualform.algebra.terms import Factor, Label, Term, atoms, written_with
from dualform.explanations.explanation import deviation
from dualform.graphs.local_derivatives import Program
from dualform.ops.table import OpCall


@dataclass(frozen=True)
class MatrixEquation:
    """left = text, with the numbers of the text; of a differential those at one change of the input."""

    left: str
    text: str
    value: Tensor
    change: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.left} = {self.text}"

    def latex(self) -> str:
        """For a paper."""
        above, _, below = self.left.partition("/")
        text = re.sub(r"\\mathrm\{d([A-Za-z])\}", r"\\mathrm{d}\1", in_latex(self.text))
        left = (
            rf"\frac{{\partial {tex(above[1:])}}}{{\partial {tex(below[1:])}}}"
            if below
            else rf"\mathrm{{d}}{tex(above[1:])}"
        )
        return f"{left} = {text}"

    def error(self, J: Derivative) -> float:
        """How far its numbers are from the derivative's."""
        expected = J.dense() if self.change is None else J.jvp(self.change)
        return deviation(self.value.to(expected.dtype), expected)


def put(term: Term, rest: Sequence[Any], made: Term, labels: Sequence[Label]) -> Term:
    """A term with a factor at these labels replaced by what it is made of; an axis of size 1 needs none.

    Two axes of one label tie the labels that they have here.
    """
    own, kept = ([x for x in side if x.size != 1] for side in (atoms(made.out), labels))
    if [x.size for x in own] != [x.size for x in kept]:
        raise NoMatrixForm
    first: dict[Label, Label] = {}
    change = {here: first[x] for x, here in zip(own, kept, strict=True) if first.setdefault(x, here) is not here}
    inner = written_with(replace(made, out=tuple((x,) for x in first)), [*first.values()])
    whole = replace(term, coef=term.coef * inner.coef, factors=(*rest, *inner.factors))
    # What is summed over, and no factor has any more, counts.
    present = {*whole.visible, *(x for f in whole.factors for x in f.labels)}
    whole = replace(whole, coef=whole.coef * prod(x.size for x in first.values() if x not in present))
    return _renamed(whole, change) if change else whole


def _renamed(t: Term, change: Mapping[Label, Label]) -> Term:
    """The same with other labels, none split."""

    def final(x: Label) -> Label:
        return change.get(x, x)

    factors = (
        replace(f, labels=tuple(map(final, f.labels))) if isinstance(f, Factor) else f.renamed(lambda x: (final(x),))
        for f in t.factors
    )
    out, inn = (tuple(tuple(map(final, axis)) for axis in side) for side in (t.out, t.inn))
    return Term(t.coef, tuple(factors), out, inn)


def onto(t: Term, labels: Sequence[Label]) -> Term:
    """A term without an input at the labels of what it stands for."""
    return put(Term(1.0, (), tuple((x,) for x in labels), ()), (), t, labels)


def kept_axes(t: Term) -> tuple[tuple[Label, ...], ...]:
    """The axes of more than one entry."""
    return tuple(axis for axis in t.out if prod(x.size for x in axis) != 1)


def single(t: Term) -> Term:
    if any(len(axis) != 1 for axis in t.inn):
        raise NoMatrixForm
    return t


def dense_of(t: Term, shape: Sequence[int]) -> Tensor:
    """The numbers of a term without an input."""
    return spread(t, t.out, (), torch.zeros((), dtype=torch.float64)).reshape(tuple(shape))


def deep(f: Factor) -> Iterator[Factor]:
    yield f
    for t in f.made:
        for g in t.tensors:
            yield from deep(g)


def is_equal(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.numel() != b.numel():
        return False
    kept = [n for n in a.shape if n != 1] == [n for n in b.shape if n != 1]
    if not kept or not b.is_floating_point():
        return kept and torch.equal(a.reshape(b.shape).to(b.dtype), b)
    return torch.allclose(a.reshape(b.shape).to(b.dtype), b, rtol=torch.finfo(b.dtype).eps ** 0.7, atol=0)


# What is made of the shape of another.
_FILLED = re.compile("(new_)?(ones|zeros|full)(_like)?")


def is_shaped(node: fx.Node) -> bool:
    """Does an op take only the shape of its operands?"""
    return _FILLED.fullmatch(str(getattr(node.target, "_opname", ""))) is not None


def has_options(call: OpCall) -> bool:
    return any(isinstance(a, (int, float, str)) and not isinstance(a, bool) for a in call.args[1:])


def flat(v: Tensor) -> Tensor:
    """Without axes of size 1."""
    return v.squeeze() if 1 in v.shape else v


def unit(n: int, k: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[k]


def two_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape, *[1] * (2 - len(shape)))


def bare(text: str) -> str:
    """Without the bracket around the whole."""
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if text[0] == "(" and k == len(text) - 1 else text
    return text


def still_nodes(programs: Sequence[Program]) -> set[fx.Node]:
    """The nodes that depend on no floating input."""
    found = set()
    for program in programs:
        moving = {n for n in program.inputs if program.values[n].is_floating_point()}
        for node, value in program.values.items():
            if any(n in moving for n in node.all_input_nodes) and not is_shaped(node):
                moving.add(node)
            elif node not in moving and isinstance(value, Tensor) and node.op == "call_function":
                found.add(node)
    return found


def fixed_values(programs: Sequence[Program]) -> dict[str, list[Tensor]]:
    """Values that depend on no floating input, and what losses make of labels alone, by their names."""
    found: dict[str, list[Tensor]] = {}
    still = still_nodes(programs)
    for program in programs:
        for node in still & program.values.keys():
            found.setdefault(program.name_of(node), []).append(program.values[node])
        for node, parts in program.local.items():
            call = program.call(node)
            if call is not None and "ignore_index" in call.bound:
                for part in (g for _, J in parts for t in J.terms for f in t.tensors for g in deep(f)):
                    found.setdefault(part.name, []).append(part.tensor)
    return found

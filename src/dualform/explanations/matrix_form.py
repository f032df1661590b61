"""The textbook form of a derivative: its terms, and the values in them, written out to the inputs in matrix notation.

    f = x^T A x: df/dx[i] = Ax[i] + Σ_j x[j] A[j,i] = ((A + A^T) x)[i]        Z = A X B: dZ = A dX B

What an op's value is made of comes from its own derivative, where it is linear in an operand; what its slope is, from
one record for each function, which is used only where it gives the numbers that are stored.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dualform.algebra.compose import compose_terms
from dualform.algebra.linear_map import Derivative
from dualform.algebra.matrix_pieces import Atom, MatrixChain, entrywise, leaf, powered
from dualform.algebra.matrix_text import MatrixTerm, NoMatrixForm, added, contracted, text_of
from dualform.algebra.relations import Lookup
from dualform.algebra.terms import Factor, Label, Relation, Select, Term, atoms, fresh_axes
from dualform.explanations.matrix_terms import (
    MatrixEquation,
    bare,
    dense_of,
    fixed_values,
    flat,
    has_options,
    is_equal,
    kept_axes,
    onto,
    put,
    single,
    still_nodes,
    two_axes,
    unit,
)  # fmt: skip
from dualform.graphs.local_derivatives import Program
from dualform.ops.table import ALL, EACH, OpCall, find_row

# Sums of more products, and longer texts, are not easier to read than the indices.
MAX_PRODUCTS, MAX_FACTORS, MAX_TEXT = 24, 16, 160
# Derivatives of more entries are not written, because their numbers are compared.
MAX_NUMBERS = 4096

Terms = list[Term]


# Functions that print by another name; ops that are their operand where no bound is met.
_SAID = {"sgn": "sign"}
_BOUNDS = re.compile("clamp.*|maximum|minimum")


class MatrixForm:
    """What the values of a program are, as sums of products of inputs and functions of them.

    functions: what rules name by a function of a value; printed: what values print as, where that is not the op's name;
    the records are in textbook.py
    """

    functions: ClassVar[dict[str, Callable[[MatrixForm, fx.Node, Factor | None], Terms | None]]] = {}
    printed: ClassVar[dict[str, Callable[[MatrixForm, fx.Node, OpCall], Atom | None]]] = {}

    def __init__(
        self, programs: Sequence[Program], called: Callable[[Factor], str], told: Container[str], spread: bool
    ) -> None:
        """programs: whose nodes factors are named after; `called`: the name of a factor in the account; told: the names
        that it explains; spread: are sums multiplied out, or in brackets?"""
        self.programs = programs
        self.told = told
        self.home = {n: program for program in programs for n in program.values}
        self.called = called
        self.spread = spread
        self.leaves: dict[str, Atom] = {}
        self.known: dict[fx.Node, Terms] = {}

    def of(self, J: Derivative, symbol: str) -> MatrixEquation | None:
        """symbol = a sum of chains; None where there is none."""
        if len(J.out_shape) > 2 or len(J.in_shape) > 2 or 1 in J.shape or not 0 < prod(J.shape) <= MAX_NUMBERS:
            return None
        above, below = symbol.split("/")
        if any(self.named(name) for name in ("I", below)):
            return None  # a letter of the notation
        if not J.terms:
            return None
        try:
            whole = [t for term in J.terms for t in self._written(term)]
            if len(J.shape) <= 2:
                written = self.matrices_of(whole, lambda t: (*t.out, *t.inn))
                return MatrixEquation(symbol, bare(text_of(written)), self._sum(written, J.shape))
            # As a differential: what a change of the input does.
            change = torch.randn(J.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            change = change.to(J.dtype)
            key = self.leaf(leaf(below, change)).name
            moved = [
                replace(t, factors=(*t.factors, Factor(change, atoms(t.inn), key)), inn=()) for t in map(single, whole)
            ]
            written = self.matrices_of(moved, lambda t: t.out)
            return MatrixEquation(above, bare(text_of(written)), self._sum(written, J.out_shape), change)
        except NoMatrixForm:
            return None

    def _sum(self, terms: Sequence[MatrixTerm], shape: Sequence[int]) -> Tensor:
        return (
            sum((t.value for t in terms), torch.zeros((), dtype=torch.float64))
            .expand(two_axes(shape))
            .reshape(tuple(shape))
        )

    def matrices_of(self, terms: Terms, axes: Callable[[Term], Any]) -> list[MatrixTerm]:
        found = []
        for t in terms:
            free = axes(t)
            if len(free) == 2 and all(len(axis) == 2 for axis in free):
                found.append(kronecker(self, t, free))
                continue
            if any(len(axis) != 1 for axis in free):
                raise NoMatrixForm
            rows = [axis[0] for axis in free]
            held = [(self.leaves[f.name], [x for x in f.labels if x.size != 1]) for f in t.tensors]
            sizes: dict[Hashable, int] = {x: x.size for x in (*t.visible, *t.hidden)}
            seen = {x for _, at in held for x in at}
            coef = t.coef * prod(x.size for x in t.visible if x not in seen and x not in rows)
            found.append(contracted(coef, held, rows, sizes))
        return added(found)

    @cached_property
    def _still(self) -> set[fx.Node]:
        return still_nodes(self.programs)

    @cached_property
    def _fixed(self) -> dict[str, list[Tensor]]:
        return fixed_values(self.programs)

    # What factors are made of.

    def _written(self, term: Term) -> Iterator[Term]:
        """Put in, for each factor, what it is made of, down to leaves; multiplied out."""
        if len(term.factors) > MAX_FACTORS:
            raise NoMatrixForm
        for k, f in enumerate(term.factors):
            made = self._relation(f) if isinstance(f, Relation) else self._made(f)
            if made is None:
                continue
            rest = (*term.factors[:k], *term.factors[k + 1 :])
            total = [t for m in made for t in self._written(put(term, rest, m, f.labels))]
            if len(total) > MAX_PRODUCTS:
                raise NoMatrixForm
            yield from total
            return
        yield term

    def _relation(self, f: Relation) -> Terms:
        """A choice of places, as a matrix of zeros and ones."""
        if isinstance(f, Lookup) and len(f.smalls) == len(f.bigs) == 1:
            name = next((self.name(n) for n in self.home if is_equal(self.number(n), f.index)), "")
            if name not in self.told:
                raise NoMatrixForm
            return self._lone(leaf(f"onehot({name})", f.dense(torch.ones(())).tensor.double()), f.labels)
        if isinstance(f, Lookup) and not f.smalls and len(f.bigs) == 1:
            return self._lone(leaf(f"e({int(f.index)})", unit(f.bigs[0].size, int(f.index))), f.bigs)
        if isinstance(f, Select) and f.small.size == 1:
            (one,) = self._lone(leaf(f"e({f.start})", unit(f.big.size, f.start)), (f.big,))
            return [replace(one, out=((f.small,), (f.big,)))]
        raise NoMatrixForm

    def _made(self, f: Factor) -> Terms | None:
        """What a factor is made of: by its record, by the node whose value it is, by the slope of a function.

        None: it is a leaf.
        """
        if f.made:
            return list(f.made)
        if f.name in self.leaves:
            if f.tensor.numel() != self.leaves[f.name].value.numel():
                raise NoMatrixForm  # some of its entries
            return None
        if f.tensor.ndim > 2:
            raise NoMatrixForm
        name = re.sub(r"#\d+$", "", f.name)
        found = self._constant(f) or self._named(name, f)
        if found is None:
            shown = self.called(f)
            found = self._named(shown, f) if shown != name else None
            is_told = shown in self.told and re.fullmatch(r"\w+|cof\(\w+\)", shown)
            if not found and not is_told:
                raise NoMatrixForm  # it has a name that says less than the indices do
            found = found or self._lone(leaf(shown, flat(f.tensor)), f.labels)
        return found

    def _constant(self, f: Factor) -> Terms | None:
        """A number everywhere that labels and shapes alone decide."""
        if f.is_mask and f.tensor.numel() == 1 and bool(f.tensor):
            return [Term(1.0, (), tuple((x,) for x in f.labels), ())]  # a guard that is not met here, nor nearby
        if not f.tensor.numel() or not bool((f.tensor == f.tensor.flatten()[0]).all()):
            return None
        if not any(is_equal(t, f.tensor) for t in self._fixed.get(re.sub(r"#\d+$", "", f.name), ())):
            return None
        return [Term(float(f.tensor.flatten()[0]), (), tuple((x,) for x in f.labels), ())]

    def _named(self, name: str, f: Factor) -> Terms | None:
        """The value of a node, or a function of one, if it is what is stored."""
        if re.fullmatch(r"\w+", name):
            node = next((n for n in self.named(name) if is_equal(self.number(n), f.tensor)), None)
            return node and self._at(self.value(node), f)
        if name == "c" or name == "":
            whole = (n for n in self.home if n.op == "placeholder" and is_equal(self.number(n), f.tensor))
            if (node := next(whole, None)) is not None:
                return self._lone(leaf(self.name(node), flat(f.tensor)), f.labels)
        root = re.fullmatch(r"\(1/2√(\w+)\)|\[(\w+)>0\]", name)
        slope = "sqrt'" if root and root[1] else "relu'"
        for node in self.named(root[1] or root[2]) if root else ():
            if found := self._checked(self.functions[slope](self, node, f), f):
                return found
        quotient = re.fullmatch(r"\((-?\w+)/(\w+?)(²?)\)", name)
        above, under, square = quotient.groups() if quotient else ("", "", "")
        for below in self.named(under) if quotient else ():
            if found := self._checked(self._quotient(above, below, 2 if square else 1), f):
                return found
        if name.startswith("solve("):
            node = next((n for n in self.home if "solve" in str(n.target) and is_equal(self.number(n), f.tensor)), None)
            return node and self._at(self.value(node), f)
        call = re.fullmatch(r"(\w+'?)\d?\((\w+)(,\w+)*\)", name)
        kind = call[1] if call else ""
        for node in self.named(call[2]) if call and kind in self.functions else ():
            if found := self._checked(self.functions[kind](self, node, f), f):
                return found
        return None

    def applied(self, op: str, node: fx.Node) -> list[OpCall]:
        """The calls of an op whose first operand has the name of a node."""
        calls = (self.home[n].call(n) for n in self.home if op in str(n.target) or n.target is operator.getitem)
        found = (c for c in calls if c is not None and op in c.target._schema.name)
        return [c for c in found if c.operands and c.operand_name(0) == self.name(node)]

    def _quotient(self, above: str, below: fx.Node, power: int) -> Terms | None:
        shape = self.number(below).shape
        axes = fresh_axes(shape)
        under = self.factor(powered(self.atom(below), -power), axes)
        sign, name = (-1.0, above[1:]) if above.startswith("-") else (1.0, above)
        if name.isdigit():
            return [Term(sign * float(name), (under,), axes, ())]
        for node in self.named(name):
            own = fresh_axes(self.number(node).shape)
            if self.number(node).shape == shape:
                return [put(Term(sign, (), axes, ()), (under,), t, atoms(axes)) for t in self.value(node)]
            if self.number(below).numel() == 1:
                return [put(Term(sign, (), own, ()), (under,), t, atoms(own)) for t in self.value(node)]
        return None

    def number(self, node: fx.Node) -> Any:
        """The value of a node as it is."""
        return self.home[node].values[node]

    def name(self, node: fx.Node) -> str:
        return self.home[node].name_of(node)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The floating operands."""
        return self.home[node].operand_nodes(node)

    def named(self, name: str) -> list[fx.Node]:
        """The floating values of a name."""
        found = (n for n in self.home if self.name(n) == name and isinstance(self.number(n), Tensor))
        return [n for n in found if self.number(n).is_floating_point()]

    def _checked(self, terms: Terms | None, f: Factor) -> Terms | None:
        """Terms of a factor, if they are its numbers."""
        if terms is None:
            return None
        try:
            written = self.matrices_of([t for term in terms for t in self._written(term)], kept_axes)
        except NoMatrixForm:
            return None
        value = self._sum(written, [x.size for (x,) in kept_axes(terms[0])] if terms else ())
        stored = f.tensor.to(value.dtype).squeeze()
        for turned in (value, value.mT if value.ndim == 2 else value):
            if turned.squeeze().shape == stored.shape and torch.allclose(
                turned.squeeze(), stored, rtol=1e-6, atol=1e-9
            ):
                labels = f.labels if turned is value else f.labels[::-1]
                return [onto(t, labels) for t in terms]
        return None

    def _at(self, terms: Terms, f: Factor) -> Terms:
        return [onto(t, f.labels) for t in terms]

    # What the values of nodes are made of.

    def value(self, node: fx.Node) -> Terms:
        """The terms of a node's value, outputs for its axes; a leaf of its own where it is no product of others."""
        if node not in self.known:
            self.known[node] = self._value(node)
        return self.known[node]

    def _value(self, node: fx.Node) -> Terms:
        v = self.number(node)
        axes = fresh_axes(v.shape)
        if node.op != "call_function":
            return [Term(1.0, (self.factor(leaf(self.name(node), flat(v)), axes),), axes, ())]
        call = self.home[node].call(node)
        if call is None or v.ndim > 2:
            raise NoMatrixForm
        op, row = call.target._schema.name.split("::")[1].removeprefix("linalg_"), find_row(call.target)
        if row is not None and row.ordered and call.operands[0].shape == v.shape:
            return self.value(self.sources(node)[0])
        if op in ("inv", "inverse", "inv_ex") and v.ndim == 2:
            return self.functions["inv"](self, self.sources(node)[0], None) or []
        if _BOUNDS.fullmatch(op) and is_equal(v, call.operands[0]) and call.operands[0].shape == v.shape:
            return self.value(self.sources(node)[0])  # no bound is met here, nor nearby
        if op == "eye" and v.shape[0] == v.shape[1]:
            return [Term(1.0, (), (axes[0], axes[0]), ())]
        if node in self._still and v.numel() and bool((v == v.flatten()[0]).all()):
            return [Term(float(v.flatten()[0]), (), axes, ())]
        terms = self._linear(node, call, v)
        if terms is None:
            return [Term(1.0, (self.factor(self._function(node, call), axes),), axes, ())]
        if len(terms) > 1 and not self.spread:
            atom = self._bracket(terms, v)
            return [Term(1.0, (self.factor(atom, axes),), axes, ())]
        return terms

    def _bracket(self, terms: Terms, v: Tensor) -> Atom:
        written = self.matrices_of(terms, kept_axes)
        shown = text_of(written)
        return leaf(f"({shown})" if len(written) > 1 else shown, flat(v), len(written) > 1)

    def _linear(self, node: fx.Node, call: OpCall, v: Tensor) -> Terms | None:
        """Where an op is linear in operands, its value is its derivative times them, and a number."""
        row = find_row(call.target)
        if row is None or not call.operands:
            return None
        chosen: list[int] = []
        if row.affine == ALL:
            chosen = [*range(len(call.operands))]
        elif row.affine == EACH or row.multilinear:
            chosen = [0]
        elif row.affine and not isinstance(row.affine, str):
            chosen = sorted(row.affine[0])
        sources = self.sources(node)
        terms: Terms = []
        for k in chosen:
            if k >= len(call.operands):
                return None
            for local in self.home[node].rule(call, k).terms:
                for inner in self.value(sources[k]):
                    joined = compose_terms(local, inner)
                    if joined is not None:
                        terms += self._written(joined)
        if not chosen:
            return None
        total = sum((dense_of(t, v.shape) for t in terms), torch.zeros((), dtype=v.dtype))
        rest = (v - total).flatten()
        small = torch.finfo(v.dtype).eps ** 0.6 * (1 + v.abs().max().item()) if v.numel() else 0
        if not rest.numel() or not bool(((rest - rest[0]).abs() <= small).all()):
            return None
        if abs(rest[0].item()) > small:
            terms.append(Term(rest[0].item(), (), fresh_axes(v.shape), ()))
        return terms

    def _function(self, node: fx.Node, call: OpCall) -> Atom:
        """A function of values, by name."""
        op = call.target._schema.name.split("::")[1].removeprefix("linalg_").removeprefix("_")
        sources = self.sources(node)
        v = self.number(node)
        if op in self.printed and (made := self.printed[op](self, node, call)) is not None:
            return made
        if torch.Tag.pointwise in call.target.tags and len(sources) == 1 and not has_options(call):
            return leaf(f"{_SAID.get(op, op)}({self.text(sources[0])})", flat(v))
        if self.name(node) not in self.told:
            raise NoMatrixForm
        return leaf(self.name(node), flat(v))

    def text(self, node: fx.Node) -> str:
        """A node's value in matrix notation."""
        written = self.matrices_of(self.value(node), kept_axes)
        return bare(text_of(written))

    def atom(self, node: fx.Node) -> Atom:
        """A node's value as one piece."""
        written = self.matrices_of(self.value(node), kept_axes)
        v = self.number(node)
        if len(written) == 1 and written[0].coef == 1:
            (term,) = written
            if term.chain is None:
                return term.scalar
            if term.scalar.text == "𝟏":
                return term.chain.atom
        return leaf(f"({bare(text_of(written))})", flat(v))

    # Leaves.

    def factor(self, atom: Atom, axes: Any) -> Factor:
        """A leaf at axes; those of size 1 have no label."""
        labels = tuple(x for axis in axes for x in axis)
        shape = tuple(x.size for x in labels)
        if prod(shape) != atom.value.numel():
            raise NoMatrixForm
        return Factor(atom.value.reshape(shape), labels, self.leaf(atom).name)

    def leaf(self, atom: Atom) -> Factor:
        key = f"{atom.text}|{atom.inverse}"
        known = self.leaves.setdefault(key, atom)
        if known.value.numel() != atom.value.numel() or not is_equal(known.value, atom.value):
            raise NoMatrixForm  # two things of one name
        return Factor(atom.value, (), key)

    def _lone(self, atom: Atom, labels: Sequence[Label]) -> Terms:
        return [
            Term(
                1.0,
                (Factor(atom.value.reshape([x.size for x in labels]), tuple(labels), self.leaf(atom).name),),
                tuple((x,) for x in labels),
                (),
            )
        ]


def kronecker(m: MatrixForm, t: Term, free: Sequence[tuple[Label, ...]]) -> MatrixTerm:
    """A product of two parts that share no index, the one at the leading places of rows and columns."""
    parts = []
    for k in (0, 1):
        rows = [axis[k] for axis in free]
        mine = set(rows)
        while any(mine & {*f.labels} and not mine >= {*f.labels} for f in t.tensors):
            mine |= {x for f in t.tensors if mine & {*f.labels} for x in f.labels}
        held = tuple(f for f in t.tensors if mine & {*f.labels})
        parts.append((replace(t, coef=1.0, factors=held, out=tuple((x,) for x in rows), inn=()), {*held}))
    if parts[0][1] & parts[1][1] or any(f not in parts[0][1] | parts[1][1] for f in t.tensors if f.labels):
        raise NoMatrixForm
    left, right = (m.matrices_of([part], lambda p: p.out)[0] for part, _ in parts)
    if not left.chain or not right.chain:
        raise NoMatrixForm
    numbers = entrywise(
        [(m.leaves[f.name], 1) for f in t.tensors if not f.labels] + [(left.scalar, 1), (right.scalar, 1)]
    )
    a, b = left.chain.atom, right.chain.atom
    made = Atom(f"{a.bracketed} ⊗ {b.bracketed}", torch.kron(a.value, b.value), False)
    return MatrixTerm(t.coef * left.coef * right.coef, numbers, MatrixChain(((made, False),), 0))

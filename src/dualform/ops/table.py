"""The record of one op, all that is known of it: its derivative, its kind, its text in every language. One row per op.

A row is added with the decorator:  @row("aten::mm", affine=EACH, multilinear=True)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from dualform.algebra.terms import Axis, Term, fresh_axes, make_factor
from dualform.ops.examples import Example

T = TypeVar("T")
Target = Any  # torch._ops.OpOverload or OpOverloadPacket; torch has no public name for them

_PEOPLE = {
    "self": "x", "input": "x", "weight": "W", "mat1": "A", "mat2": "B", "other": "y", "tensor1": "a", "tensor2": "b",
}  # fmt: skip


@dataclass(frozen=True)
class OpCall:
    """One application of an op to tensors: concrete, fake or traced.

    `part` is the position in the result of an op that returns several tensors; `names` are those of the operands.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    part: int | None = None
    names: tuple[str, ...] = ()

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Arguments by their name in the op's schema, defaults included."""
        return bound_arguments(self)

    @cached_property
    def places(self) -> tuple[tuple[str, int | None], ...]:
        """Argument name, and position in it if it is a list, of each operand."""
        return tuple(place for place in self.arguments if self.argument(*place).is_floating_point())

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:
        """The floating tensor arguments, lists flattened."""
        return tuple(self.argument(*place) for place in self.places)

    @cached_property
    def arguments(self) -> tuple[tuple[str, int | None], ...]:
        """Argument name, and position in it if it is a list, of every tensor, whatever its type."""
        return tuple((name, k) for name, k, _ in arguments_of(self, Tensor))

    def argument(self, name: str, k: int | None) -> Tensor:
        """One of `arguments`."""
        return self.bound[name] if k is None else self.bound[name][k]

    def operand_name(self, operand: int) -> str:
        """What people call an operand: the given name, or one made from the schema."""
        if operand < len(self.names):
            return self.names[operand]
        name, k = self.places[operand]
        return f"{_PEOPLE.get(name, name)}{'' if k is None else k}"

    def with_operand(self, operand: int, value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with one operand replaced."""
        name, k = self.places[operand]
        values = dict(self.bound)
        values[name] = value if k is None else [value if j == k else v for j, v in enumerate(values[name])]
        return placed(self.target, values)

    def run(self, operand: int, value: Tensor) -> Tensor:
        """Apply the op with one operand replaced."""
        args, kwargs = self.with_operand(operand, value)
        result = self.target(*args, **kwargs)
        return result if self.part is None else result[self.part]


def bound_arguments(call: OpCall | fx.Node) -> dict[str, Any]:
    """The arguments of a call, or of a node, by their name in the op's schema, defaults included."""
    target: Target = call.target
    values = {a.name: a.default_value for a in target._schema.arguments}
    values.update(zip([*values], call.args, strict=False))
    return values | dict(call.kwargs)


def arguments_of(call: OpCall | fx.Node, kind: type[T]) -> list[tuple[str, int | None, T]]:
    """What is of a kind among the arguments of a call, or of a node: argument, position in it if it is a list, it."""
    target: Target = call.target
    named = (*zip((a.name for a in target._schema.arguments), call.args, strict=False), *call.kwargs.items())
    found: list[tuple[str, int | None, T]] = []
    for name, value in named:
        parts = list(enumerate(value)) if isinstance(value, (list, tuple)) else [(None, value)]
        found += [(name, k, x) for k, x in parts if isinstance(x, kind)]
    return found


def placed(target: Target, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of these names as the op takes them: by position, and by keyword."""
    schema = target._schema.arguments
    named = {a.name: values[a.name] for a in schema if a.kwarg_only}
    return tuple(values[a.name] for a in schema if not a.kwarg_only), named


Rule = Callable[[OpCall, int], "list[Term]"]
Reads = Callable[[OpCall, str, "int | None"], "list[Term]"]
Adjoint = Callable[[OpCall, Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """How an entry of a result reads, by language; an empty text: it cannot be said there.

    {0}, {1}, ... are operands, {alpha}, ... parameters, {i0}, {i1}, ... the place along the value's axes, {row} and
    {col} along the last two. flops: as many multiplications and additions as it takes about as long as. zero: it is 0
    where its operands are. truth: it takes truth values as they are. bare: a number may stand where a tile does.
    passes: it rounds nothing, but passes an operand on. name: "" for the op's.
    """

    cpp: str
    triton: str = ""
    flops: float = 1.0
    zero: bool = False
    truth: bool = False
    bare: bool = False
    passes: bool = False
    name: str = ""

    @cached_property
    def count(self) -> int:
        """How many operands it reads."""
        return len(set(re.findall(r"{\d}", self.cpp)))

    @property
    def is_placed(self) -> bool:
        """Is it made of its place, or of no operand?"""
        return not self.count or "{row}" in self.cpp


@dataclass(frozen=True)
class Fold:
    """How a reduction reads, by language. cpp: what it begins with, and how {1} goes into {0}. triton: that of a tile
    along {axis}, and the number that changes nothing. joins: the entry that makes one of two."""

    cpp: tuple[str, str]
    triton: tuple[str, str] = ("", "")
    joins: str = ""


# By the names that statements give them.
ENTRIES: dict[str, Entry] = {}
FOLDS: dict[str, Fold] = {}


@dataclass(frozen=True)
class Row:
    """What is known of an op.

    rule: its derivative as terms; None if the op is differentiated through `definition`, a function of the same
    arguments, or has no operand. reads: which entries of an argument (its name, its position in a list) the result
    looks at, as terms, where the derivative does not say it: results of integers, indices, masks. unread: arguments of
    which it takes only shape and type. affine: the maximal sets of operands in which it is jointly affine; "each":
    every operand by itself; "all": all together. multilinear: homogeneous in each operand. examples: calls on which the
    laws are tried. adjoint: for a linear op of one operand, how a gradient is pulled back without the terms, where that
    is cheaper; for the first of several, what is kept of it, either way. sizes: arguments, whatever they are called,
    that the shapes of operands and result decide. ways: those
    that say how it goes about it, by sizes or flags of the process: the same numbers.

    kind: "map" (entry by entry), "reduction", "product" (of two matrices), "pieces", "view" (the same memory, read
    otherwise); what has none is spelt out in others before it is generated. entry: how it reads: an Entry, or a
    function of a node: (name of the entry or fold, operands, parameters); of pieces, of a node and its shape: pairs
    (place, value). lowered: a function of the same arguments in ops that have a kind; NotImplemented where it does not
    say. mapped: the same in ops that vmap maps as they are, "torch" for torch's. sloped: the same of a derivative, as a
    product of a slope and the incoming gradient. several: what its results are: ("cut",) along an axis; ("picked",) at
    the last, or at what this op gives; or an op each. put: of a view, (base, value, *its other arguments) -> the op and
    arguments that write through it. signs: of a sum, entry by entry: its operands'. overwrites: of its first operand it
    keeps shape and type alone. ordered: its entries are its first operand's, in their order. odd: it passes on the sign
    of its first operand. python: how a call of it is printed, by the number of its operands; the first that fits of
    several, parted by |: "{0} + {1}", a method "x." of its own name, a function "torch." of its own name. called: does
    eager call it as Python names it, which takes two thirds of the time? over: operands that its result may be written
    over, by the method of its name with a _. fresh: its results have memory of their own.
    """

    name: str
    rule: Rule | None
    affine: str | tuple[frozenset[int], ...] = ()
    multilinear: bool = False
    form: Callable[[OpCall], Product] | None = None
    examples: Sequence[Example] = ()
    definition: Callable[..., Any] | None = None
    reads: Reads | None = None
    adjoint: Adjoint | None = None
    unread: Collection[str] = frozenset()
    sizes: Collection[str] = ()
    ways: Collection[str] = ()
    kind: str = ""
    entry: Entry | Callable[..., Any] | None = None
    lowered: Callable[..., Any] | None = None
    mapped: Callable[..., Any] | str | None = None
    sloped: Callable[..., Any] | str | None = None
    several: tuple[str, ...] = ()
    put: Callable[..., tuple[Any, tuple[Any, ...]]] | None = None
    signs: tuple[int, ...] = ()
    overwrites: bool = False
    ordered: bool = False
    odd: bool = False
    python: str = ""
    called: bool = False
    over: tuple[int, ...] = ()
    fresh: bool = False

    def spelt(self, node: fx.Node, *rest: Any) -> Any:
        """How a call reads: (name of the entry or fold, operands, parameters), or its pieces."""
        if isinstance(self.entry, Entry):
            return self.entry.name, list(node.args[: self.entry.count]), {}
        assert self.entry is not None
        return self.entry(node, *rest)

    def is_affine(self, operands: frozenset[int]) -> bool:
        if not operands or self.affine == "all":
            return True
        if isinstance(self.affine, str):  # "each"
            return len(operands) == 1
        return any(operands <= group for group in self.affine)


ALL = "all"
EACH = "each"
FIRST = (frozenset({0}),)
ROWS: dict[str, Row] = {}


def is_known(name: str) -> bool:
    """Has this version of torch such an op? Old spellings go, and new ones come."""
    space, _, op = name.rpartition("::")
    op, _, overload = op.partition(".")
    packet = getattr(getattr(torch.ops, space), op, None)
    return packet is not None and (not overload or overload in packet.overloads())


@cache
def definitions(column: str) -> dict[Target, Callable[..., Any]]:
    """What a column of the rows says of how ops are spelt out, by overload."""
    from torch._decomp import get_decompositions  # slow: not at `import dualform`

    rows = [row for row in ROWS.values() if getattr(row, column)]
    own = {x: getattr(row, column) for row in rows for x in _overloads(row.name) if find_row(x) is row}
    theirs = [x for x, f in own.items() if f == "torch"]
    return {x: f for x, f in own.items() if f != "torch"} | get_decompositions(theirs)


def _overloads(name: str) -> list[Target]:
    space, _, op = name.partition("::")
    op, _, overload = op.partition(".")
    packet = getattr(getattr(torch.ops, space), op)
    return [getattr(packet, x) for x in ([overload] if overload else packet.overloads()) if "out" not in x]


def add_row(row: Row) -> None:
    """Put a row into the table, if torch has the op; of its examples it keeps those that call it."""
    if not is_known(row.name):
        return
    op, _, overload = row.name.removeprefix("aten::").partition(".")
    own = tuple(
        replace(e, op=e.op or f"{op}{'.' if overload else ''}{overload}") for e in row.examples if e.calls(op, overload)
    )
    entry = row.entry
    if isinstance(entry, Entry):
        entry = replace(entry, name=entry.name or op)
        ENTRIES[entry.name] = entry
    kind = row.kind or ("map" if entry else "")
    definitions.cache_clear()
    ROWS[row.name] = replace(row, examples=own, unread=frozenset(row.unread), entry=entry, kind=kind)


def row(*names: str, **columns: Any) -> Callable[[Any], Any]:
    """Add a row, with the columns of `Row`, for each name: "aten::mm" for all overloads, "aten::add.Tensor" for one."""

    def add(rule: Rule | None) -> Rule | None:
        for name in names:
            add_row(Row(name, rule, **columns))
        return rule

    return add


def defined_row(name: str, *examples: Example) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a row for an op that is differentiated through a function of the same arguments, made of other ops."""

    def add(definition: Callable[..., Any]) -> Callable[..., Any]:
        add_row(Row(name, None, examples=examples, definition=definition))
        return definition

    return add


@dataclass(frozen=True)
class Product:
    """out[axes] = coef * sum prod operand_k[axes_k]: the form of every multilinear op."""

    out: tuple[Axis, ...]
    axes: tuple[tuple[Axis, ...], ...]
    coef: float = 1.0


def product_row(*names: str, **columns: Any) -> Callable[[Callable[[OpCall], Product]], Any]:
    """Add a row for an op that is a product of its operands; its derivative is the product of the others."""

    def add(form: Callable[[OpCall], Product]) -> Callable[[OpCall], Product]:
        def rule(call: OpCall, operand: int) -> list[Term]:
            return [product_term(call, form(call), operand)]

        for name in names:
            add_row(Row(name, rule, EACH, True, form, **columns))
        return form

    return add


def product_term(call: OpCall, product: Product, operand: int) -> Term:
    """The product of all operands but one, between the output's axes and that operand's."""
    others = [k for k in range(len(product.axes)) if k != operand]
    factors = [make_factor(call.operands[k], product.axes[k], call.operand_name(k)) for k in others]
    # An index that the operand alone has, and that the output lacks, is a sum: it stays on the input.
    return Term(product.coef, tuple(factors), product.out, product.axes[operand])


def find_row(target: Target) -> Row | None:
    """Look an op up: this overload first, then all overloads."""
    if isinstance(target, torch._ops.OpOverload):
        return ROWS.get(target._name) or ROWS.get(target._overloadpacket._qualified_op_name)
    return ROWS.get(getattr(target, "_qualified_op_name", ""))


_NOTHING_KNOWN = Row("", None)


def row_of(target: Target) -> Row:
    """What is known of an op: an empty row if it has none."""
    return find_row(target) or _NOTHING_KNOWN


def kind_of(target: Target) -> str:
    """The kind of an op; "" if it has none."""
    return row_of(target).kind


def broadcast_axes(out: tuple[Axis, ...], shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of an operand that is broadcast to `out`: aligned at the right, size 1 is the empty axis."""
    shown = out[len(out) - len(shape) :] if len(shape) else ()
    return tuple(() if n == 1 else axis for n, axis in zip(shape, shown, strict=True))


def diagonal_terms(
    call: OpCall, operand: int, factor: Tensor | None = None, name: str = "", coef: float = 1.0
) -> list[Term]:
    """Entry by entry: the input's labels are the output's, times a factor that may be smaller than the output."""
    if coef == 0:
        return []
    out = fresh_axes(call.out.shape)
    inn = broadcast_axes(out, call.operands[operand].shape)
    factors = [] if factor is None else [make_factor(factor, broadcast_axes(out, factor.shape), name)]
    return [Term(coef, tuple(factors), out, inn)]


def entrywise_reads(call: OpCall, name: str, k: int | None = None) -> list[Term]:
    """Each entry of the result looks at one entry of the argument, broadcast to it."""
    out = fresh_axes(call.out.shape)
    return [Term(1.0, (), out, broadcast_axes(out, call.argument(name, k).shape))]


def dims_of(dim: Any, rank: int) -> list[int]:
    """Normalise a dim argument: None or [] means all; a number has none."""
    if not rank or dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return sorted(range(len(order)), key=order.__getitem__)

"""The one table of derivative rules: look an op up, differentiate it, ask in which operands it is affine.

The rows are in ops/, a row per op. What has no row: entry-by-entry ops have one rule for all; composite ops are
differentiated through their own definition; the rest gets a dense derivative of that op alone, and says so once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from dualform import ops
from dualform.algebra.linear_map import Derivative, Route, derivative_of
from dualform.algebra.materialise import expect_room
from dualform.algebra.terms import Term, fresh_axes, make_factor
from dualform.graphs.definitions import definition_terms
from dualform.graphs.kept import CARRIED
from dualform.graphs.kept_derivative import kept_terms
from dualform.ops.examples import T
from dualform.ops.examples import call as example
from dualform.ops.pointwise import is_pointwise, pointwise
from dualform.ops.table import Adjoint, OpCall, Target, entrywise_reads, placed, row, row_of
from dualform.shapes import TraceError, fail

for _found in iter_modules(ops.__path__):  # each puts its rows into the table
    import_module(f"{ops.__name__}.{_found.name}")
aten = torch.ops.aten
_warned: set[str] = set()
# What stand-ins without values raise where a derivative depends on values.
_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


def reads_values(error: Exception) -> bool:
    """Was this raised by a stand-in that was asked for a value?"""
    # By its name: the module that defines the last one imports sympy, which takes half a second.
    return isinstance(error, _UNKNOWN) or type(error).__name__ == "GuardOnDataDependentSymNode"


def derivative(call: OpCall, operand: int) -> Derivative:
    """Differentiate one op with respect to one of its floating operands, exactly and with its structure.

    J[out..., in...] = d call.out / d call.operands[operand]
    Shape:  call.out.shape + operand.shape.
    Dtype:  that of call.out. Works on concrete, fake, meta and traced tensors.
    Raises: IndexError if there is no such operand. Warns once when the terms of an op are asked for that has only a
            dense derivative.
    """
    x = call.operands[operand]
    if not call.out.is_floating_point() or x.numel() == 0 or call.out.numel() == 0:
        return derivative_of(call.out, x)
    found = row_of(call.target)
    is_first = call.places[operand] == call.arguments[0]  # that an adjoint is of
    if found.rule is not None and found.adjoint is not None and is_first:
        route = _Linear(call, operand, found.adjoint)
        return derivative_of(call.out, x, partial(found.rule, call, operand), route)
    terms = _terms(call, operand)
    if terms is None:
        return derivative_of(call.out, x, partial(_dense, call, operand), _Torchs(call, operand))
    return derivative_of(call.out, x, terms)


row("dualform::kept", examples=[example("dualform::kept", [T("n"), T("n")], CARRIED, 0)])(
    lambda call, operand: kept_terms(call, operand, derivative)
)


@dataclass(frozen=True)
class _Linear(Route):
    """A linear op is its own derivative."""

    call: OpCall
    operand: int
    adjoint: Adjoint

    @property
    def selects(self) -> bool:
        return len(self.call.operands) > 1

    def vjp(self, g: Tensor) -> Tensor:
        return self.adjoint(self.call, g)

    def jvp(self, v: Tensor) -> Tensor:
        return self.adjoint(self.call, v) if self.selects else self.call.run(self.operand, v)


@dataclass(frozen=True)
class _Torchs(Route):
    """An op whose gradient torch alone knows, as that of an op of one's own: a vjp asks for it once."""

    call: OpCall
    operand: int
    is_stored = True

    def vjp(self, g: Tensor) -> Tensor:
        return _pulled(self.call, self.operand, [g.clone()])[0]

    def jvp(self, v: Tensor) -> Tensor:
        x = self.call.operands[self.operand]
        return derivative_of(self.call.out, x, _dense(self.call, self.operand)).jvp(v)


def _terms(call: OpCall, operand: int) -> list[Term] | None:
    """By its row, entry by entry, or through its definition, in this order; None if nothing is known of the op."""
    rule = row_of(call.target).rule
    if rule is not None and (terms := rule(call, operand)) is not NotImplemented:
        return terms
    if is_pointwise(call.target):
        try:
            return pointwise(call, operand)
        except (RuntimeError, NotImplementedError):  # torch has no backward for it: perhaps it has a definition
            pass
    return definition_terms(call, operand, derivative)


def _dense(call: OpCall, operand: int) -> list[Term]:
    name, x = call.target._schema.name, call.operands[operand]
    advice = "Take torch's gradients (torch.func.vjp) of that op, or add a row (ops/table.py)."
    expect_room("derivative", f"that of {name}", call.out.numel() * x.numel() * x.element_size(), advice)
    basis = torch.eye(call.out.numel(), dtype=call.out.dtype, device=call.out.device)
    # One cotangent at a time: torch's batching rules of some backwards are wrong (cdist's is), and as_strided's reads
    # the memory that its cotangent is a part of.
    rows = _pulled(call, operand, [row.clone() for row in basis.reshape(-1, *call.out.shape)])
    full = torch.stack(rows).reshape([*call.out.shape, *x.shape])
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"dualform: {name} has no derivative row; its own derivative is stored dense", stacklevel=_users()
        )
    out, inn = fresh_axes(call.out.shape), fresh_axes(x.shape)
    return [Term(1.0, (make_factor(full, (*out, *inn), f"d{name.split('::')[1]}"),), out, inn)]


def _users() -> int:
    """How far up the caller's own line is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("dualform", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _pulled(call: OpCall, operand: int, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that torch has; by plain autograd where an op of one's own has one that transforms cannot take."""
    run, x = partial(call.run, operand), call.operands[operand]
    try:
        pull: Any = torch.func.vjp(run, x)[1]
        return [pull(g)[0] for g in cotangents]
    except (RuntimeError, NotImplementedError) as error:
        if reads_values(error):
            raise
    try:
        with torch.enable_grad(), _Undetached():
            at = x.view_as(x).requires_grad_()
            out = run(at)
            return [torch.autograd.grad(out, at, g, retain_graph=True, materialize_grads=True)[0] for g in cotangents]
    except (RuntimeError, NotImplementedError) as error:
        fail(
            "derivative", f"{call.target._schema.name} by {call.operand_name(operand)}",
            f"has no row and no backward in torch ({str(error).splitlines()[0]})", "a differentiable op",
            "Detach that argument, write it with other ops, or register a gradient (torch.library.register_autograd).",
            TraceError,
        )  # fmt: skip


class _Undetached(TorchDispatchMode):
    """Autograd hands results back detached: here, where a second derivative may look on, as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (aten.alias.default if func is aten.detach.default else func)(*args, **kwargs or {})


def affine(target: OpCall | Target, operands: frozenset[int]) -> bool:
    """Tell whether an op is jointly affine in these operands, the others held fixed.

    op(a + s) - op(a) is linear in s = changes of the operands; what the row says, never probed: without one, in none
    """
    return row_of(target.target if isinstance(target, OpCall) else target).is_affine(operands)


def reads(call: OpCall, name: str, k: int | None = None) -> Derivative | None:
    """Tell which entries of a tensor argument a result looks at, as if it were a sum of them; None: not known.

    name, k: one of `call.arguments`, of whatever type; integers and masks are looked at as numbers are.
    Shape:  call.out.shape + argument.shape.
    Dtype:  none; no value is read.
    Raises: KeyError if there is no such argument.
    """
    x, found = call.argument(name, k), row_of(call.target)
    terms = NotImplemented if found.reads is None else found.reads(call, name, k)
    if terms is NotImplemented and is_pointwise(call.target):
        terms = entrywise_reads(call, name, k)
    if terms is not NotImplemented:
        return derivative_of(call.out, x, terms)
    if x.is_floating_point() and call.out.is_floating_point():
        return derivative(call, call.places.index((name, k)))
    if found.rule is None or name not in _NUMBERS or x.is_floating_point():
        return None
    numbers = _as_numbers(call)
    return derivative(numbers, numbers.places.index((name, k)))


# Arguments in which an op that takes integers or truth values does with them what it does with floating numbers.
_NUMBERS = {"self", "input", "other", "src", "source", "tensors", "values", "value"}


def _as_numbers(call: OpCall) -> OpCall:
    """The same call of floating stand-ins."""

    def number(x: Any) -> Any:
        return torch.empty_like(x, dtype=torch.float64) if isinstance(x, Tensor) else x

    values = {
        name: ([*map(number, v)] if isinstance(v, (list, tuple)) else number(v)) if name in _NUMBERS else v
        for name, v in call.bound.items()
    }
    args, rest = placed(call.target, values)
    rest.pop("dtype", None)
    return replace(call, args=args, kwargs=rest, out=number(call.out))

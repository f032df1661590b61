"""For people who write backward passes: undo a broadcast, and say what is wrong with a hand-written backward.

    check: got = backward(g, *args), expected = J.vjp(g)

A wrong gradient is compared with what the usual slips would give: every op's local derivative with one factor left out,
transposed, flipped, inverted or taken from another tensor, one term left out, negated or weighed otherwise, one axis
summed that should not be, the op along another axis. The slip that gives exactly what was got, for two incoming
gradients, is the message; a number is the entries of an axis only where the function sums over that axis.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.axis_names import Axes, parse
from dualform.algebra.notation import formula
from dualform.calculus.jacobian import Given, jacobian, made
from dualform.calculus.mistakes import Slip, of_shape, of_values
from dualform.explanations.wording import name_nodes
from dualform.graphs.local_derivatives import Program
from dualform.graphs.local_rules import derivative as local_derivative
from dualform.graphs.rewriting import write_out
from dualform.graphs.trace import trace
from dualform.shapes import ShapeError, fail


def unbroadcast(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum a gradient over the axes along which a tensor of this shape was broadcast.

    x_bar[in] = sum over copies of grad[..., in]      (`why_unbroadcast` says which axes, and why)
    Shape:  grad (any shape that `shape` broadcasts to) -> shape.
    Dtype:  that of grad.
    Raises: ShapeError if `shape` does not broadcast to the gradient's.
    Example:
        >>> unbroadcast(torch.ones(4, 3), (3,))
        tensor([4., 4., 4.])
    """
    lead, ones = _copied_axes("unbroadcast", tuple(grad.shape), tuple(shape))
    if ones:
        grad = grad.sum([lead + k for k in ones], keepdim=True)
    return grad.sum(list(range(lead))) if lead else grad


def why_unbroadcast(grad_shape: Sequence[int], shape: Sequence[int]) -> str:
    """Say which axes `unbroadcast` sums, and why.

    Shape:  two shapes, the second broadcasts to the first.
    Dtype:  none.
    Raises: ShapeError if it does not.
    Example:
        >>> print(why_unbroadcast((4, 3), (3,)))
        x:(3,) was copied into x_b:(4, 3), and the gradient of a copy is a sum over the copies: dx_b/dx[i,j,k] = δ(j,k)
          axis 0 (4): x has no such axis: sum it away
          axis 1 (3): x has it: keep it
        in torch: grad.sum(0)
    """
    grad_shape, shape = tuple(grad_shape), tuple(shape)
    lead, ones = _copied_axes("why_unbroadcast", grad_shape, shape)
    J = jacobian(lambda x: x.expand(grad_shape), torch.zeros(shape))
    shown = formula(J.terms, grad_shape, shape, "dx_b/dx")
    told = f"x:{shape} was copied into x_b:{grad_shape}, and the gradient of a copy is a sum over the copies: "
    lines = [told + str(shown)]
    code = "grad"
    for axis, n in enumerate(grad_shape):
        if axis < lead:
            lines.append(f"  axis {axis} ({n}): x has no such axis: sum it away")
        elif axis - lead in ones:
            lines.append(f"  axis {axis} ({n}): x has one entry there: sum it, and keep the axis with size 1")
        else:
            lines.append(f"  axis {axis} ({n}): x has it: keep it")
    if ones:
        code += f".sum({[lead + k for k in ones]}, keepdim=True)"
    if lead:
        code += f".sum({0 if lead == 1 else list(range(lead))})"
    return "\n".join([*lines, f"in torch: {code}"])


def _copied_axes(function: str, grad: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, list[int]]:
    """How many leading axes were added, and which of the others were stretched from size 1."""
    lead = len(grad) - len(shape)
    fits = lead >= 0 and all(a in (b, 1) for a, b in zip(shape, grad[lead:], strict=True))
    if not fits:
        fail(function, "shape", f"is {shape}", f"one that broadcasts to the gradient's = {grad}", "Swap the arguments?")
    return lead, [k for k, n in enumerate(shape) if n == 1 and grad[lead + k] != 1]


@dataclass(frozen=True)
class Fault:
    """What is wrong with the gradient of one argument: a word for the kind, and a sentence."""

    argument: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"check: {self.message}"


@dataclass(frozen=True)
class Report:
    """The result of a check; true if nothing is wrong. `formulas` are the derivatives of the arguments."""

    faults: tuple[Fault, ...]
    errors: dict[str, float]
    formulas: dict[str, str]

    @property
    def ok(self) -> bool:
        """Is every gradient right?"""
        return not self.faults

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            shown = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
            return f"check: all gradients are right; largest errors: {shown}"
        wrong = {fault.argument for fault in self.faults}
        lines = [str(fault) for fault in self.faults]
        return "\n".join([*lines, *(f"  {text}" for name, text in self.formulas.items() if name in wrong)])


def check(
    backward: Callable[..., Any], f: Callable[..., Tensor], *args: Any, axes: str | None = None,
    g: Tensor | None = None, **kwargs: Any,
) -> Report:  # fmt: skip
    """Compare a hand-written backward pass with the structured derivative, and say what is wrong.

    backward(g, *args) -> the gradient of each floating tensor among `args`, in order (one of them alone, or a tuple)
    Shape:  f(*args, **kwargs) is one tensor; g, random if not given, is shaped like it. `axes` names axes in messages.
    Dtype:  that of the arguments; float64 finds more.
    Raises: as `jacobian`; ValueError if g is not finite or not shaped like f's result.
    Example:
        >>> x, y = torch.rand(3), torch.rand(4, 3)
        >>> print(check(lambda g, x, y: (g.sum(0), -g), lambda x, y: x - y, x, y))
        check: all gradients are right; largest errors: x 0.0e+00, y 0.0e+00
        >>> print(check(lambda g, x, y: (g.sum(0), g), lambda x, y: x - y, x, y).faults[0])
        check: y's gradient has the wrong sign; expected minus it. Negate it.
    """
    given = Given(f, args, kwargs)
    named = None if axes is None else parse(axes, given.named_tensors)
    at = given.traced(named)
    if len(at.traced.out_values) != 1:
        fail("check", "f", f"returns {len(at.traced.out_values)} tensors", "one tensor", "Choose one.", ValueError)
    out = at.traced.out_values[0]
    seed = _seed(out, g)
    floating = [k for k, t in enumerate(given.tensors) if t.is_floating_point()]
    before = [t._version for t in [seed, *given.tensors]]
    got = _returned(backward(seed, *args), len(floating))
    if isinstance(got, str):
        return Report((Fault("backward", "count", got),), {}, {})
    watched = zip(["g", *given.names], [seed, *given.tensors], before, strict=True)
    said = "was changed in place by the backward; expected it untouched. Write to a clone."
    faults = [Fault(name, "in place", f"{name} {said}") for name, t, version in watched if t._version != version]
    if faults:
        return Report(tuple(faults), {}, {})
    return _compared(given, at, backward, args, seed, got, floating, named)


def _seed(out: Tensor, g: Tensor | None) -> Tensor:
    if g is None:
        generator = torch.Generator().manual_seed(90017)  # no seed that arguments are made with: g is to be like none
        drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64) + 0.5
        return drawn.to(out.dtype).to(out.device if out.device.type != "meta" else "cpu")
    if g.shape != out.shape:
        raise ShapeError(f"check: g has shape {tuple(g.shape)}; expected f's = {tuple(out.shape)}. Leave it out.")
    if not g.isfinite().all():
        fail("check", "g", "has entries that are not finite", "finite numbers", "Leave it out.", ValueError)
    return g


def _returned(result: Any, count: int) -> list[Any] | str:
    """The gradients that a backward returned, or what is wrong with their number."""
    found = list(result) if isinstance(result, tuple | list) else [result]
    if len(found) == count:
        return found
    expected = f"one for each floating tensor argument = {count}"
    return f"backward returns {len(found)} gradients; expected {expected}. Return them in the arguments' order."


def _compared(
    given: Given, at: Any, backward: Callable[..., Any], args: Any, seed: Tensor, got: list[Any], floating: list[int],
    named: Axes | None,
) -> Report:  # fmt: skip
    derivatives = {k: made(at, 0, k, lambda k=k: given.story(0, k, named), named) for k in floating}
    expected = {k: J.vjp(seed) for k, J in derivatives.items()}
    faults, errors, formulas = [], {}, {}
    for k, found in zip(floating, got, strict=True):
        name = given.names[k]
        names = None if named is None else named.of(0, k)
        J = derivatives[k]
        slip = _slip(given, k, seed, found, expected, backward, args, floating.index(k), J, names)
        if slip is not None:
            faults.append(Fault(name, slip.kind, f"{name}'s gradient {slip.message}"))
            assert J.route is not None
            formulas[name] = replace(J.route.shown(J), symbol=f"df/d{name}").sentence
        elif found is not None and found.numel():
            errors[name] = (found - expected[k]).abs().max().item()
    return Report(tuple(faults), errors, formulas)


def _is_noise(error: Tensor, seed: Tensor, J: Any) -> bool:
    """Is a difference what rounding leaves where large numbers cancel?"""
    if not error.numel() or math.prod(J.shape) > 2**20 or not error.isfinite().all():
        return False
    most = torch.tensordot(seed.abs(), J.dense().abs(), seed.ndim).max().item()
    return error.abs().max().item() <= 64 * torch.finfo(J.dtype).eps * most


def _slip(
    given: Given, k: int, seed: Tensor, found: Any, expected: dict[int, Tensor], backward: Callable[..., Any],
    args: Any, place: int, J: Any, names: Any,
) -> Slip | None:  # fmt: skip
    """What is wrong with one gradient; None if nothing is."""
    right = expected[k]
    if found is None:
        return None if J.is_zero else Slip("none", "is None; expected a tensor. Return the gradient.")
    if not isinstance(found, Tensor):
        return Slip("type", f"is {type(found).__name__}; expected a tensor. Return a tensor.")
    if found.shape == right.shape and _is_noise(found - right, seed, J):
        return None
    # The caller's own ops, not rewritten: what a slip is named after.
    gm = trace(lambda *tensors: given.flat(*tensors), *given.tensors, steps=given.steps)
    spelled = copy.deepcopy(gm)
    write_out(spelled.graph)
    spelled.recompile()
    graphs = [gm, spelled] if len(spelled.graph.nodes) != len(gm.graph.nodes) else [gm]
    programs = [Program(g, given.tensors, k, local_derivative, name_nodes(g, given.names)) for g in graphs]
    shape = of_shape(found, right, names)
    if shape is not None:
        return shape

    def again(g: Tensor) -> Tensor:
        result = _returned(backward(g, *args), len(expected))
        assert not isinstance(result, str)
        return result[place]

    others = {given.names[j]: value for j, value in expected.items() if j != k}
    return of_values(found, right, seed, again, others, programs, J, names)

"""A hand-written backward is right, or what is wrong with it is named: one planted fault each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dualform as df
from dualform.calculus import check, unbroadcast, why_unbroadcast
from dualform.shapes import ShapeError

generator = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


A, B, W, S = rand(3), rand(4, 3), rand(3, 3), rand(4, 4)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def layer(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return torch.tanh(h)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def softmax_backward(g: Tensor, x: Tensor, sign: float = 1.0, dim: int = -1) -> Tensor:
    p = x.softmax(-1)
    return p * (g - sign * (g * p).sum(dim, keepdim=True))


def slope(x: Tensor, w: Tensor) -> Tensor:
    return 1 - torch.tanh(x @ w) ** 2


Backward = Callable[..., Any]
RIGHT: list[tuple[Backward, Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (lambda g, x, y: (g.sum(0), g), add, (A, B)),
    (lambda g, x, y: ((g * y).sum(0), g * x), mul, (A, B)),
    (lambda g, x, w: (g @ w.T, x.T @ g), matmul, (B, W)),
    (lambda g, x, w: ((g * slope(x, w)) @ w.T, x.T @ (g * slope(x, w))), layer, (B, W)),
    (softmax_backward, softmax, (B,)),
    (lambda g, x: [g.expand(4, 3) / 12], lambda x: x.mean(), (B,)),
    (lambda g, x, y: (unbroadcast(g, (4, 1)), g), add, (rand(4, 1), S)),
    (lambda g, x, y: (None, g), lambda x, y: x.detach() * 0 + y, (B, B)),
]
# backward, function, arguments; the argument, the kind, and the words that the message must have
PLANTED: list[tuple[Backward, Callable[..., Tensor], tuple[Tensor, ...], str, str, str]] = [
    (lambda g, x, y: (g, g), add, (A, B), "x", "kept axis", r"keeps axis 0 \(4\), which should be summed.*g\.sum\(0\)"),
    (lambda g, x, y: (g.sum(0, keepdim=True), g), add, (A, B), "x", "extra axis", r"extra axis of size 1 at 0; "
    r"expected \(3,\)"),
    (lambda g, x, y: (g.sum(1), g), add, (rand(4, 1), S), "x", "lost axis", r"lost axis 1 \(1\); expected shape \(4, "
    r"1\). Use keepdim"),
    (lambda g, x, y: (g.sum(0), g.sum(0)), add, (A, B), "y", "summed axis", r"was summed over axis 0 \(4\), "
    r"which the argument has"),
    (lambda g, x, y: (g.sum(0), g.mean(1)), add, (A, B), "y", "summed axis", r"was averaged over axis 1 \(3\)"),
    (lambda g, x, y: (g.sum(1), g), add, (rand(4), S), "x", "wrong axis", r"sums z's axis 1 where axis 0 should be "
    r"summed.*\.sum\(0\)"),
    (lambda g, x, y: (g.mean(0), g), add, (A, B), "x", "averaged", r"averaged over axis 0 \(4\) of the result; "
    r"expected the sum"),
    (lambda g, x: g.expand(4, 3), lambda x: x.mean(), (B,), "x", "count", r"misses the factor 1/12"),
    (lambda g, x: g * x, lambda x: x * x, (B,), "x", "scale", r"is 1/2 times what it should be"),
    (lambda g, x, y: (g.sum(0), -g), add, (A, B), "y", "sign", r"has the wrong sign"),
    (lambda g, x, w: (g @ w.T, g.T @ x), matmul, (B, W), "w", "transposed", r"is transposed"),
    (lambda g, x, w: (g @ w.T, g.T @ x), matmul, (B, rand(3, 5)), "w", "transposed", r"transposed; expected shape \(3, "
    r"5\)"),
    (lambda g, x, w: (g @ w, x.T @ g), matmul, (B, W), "x", "transposed factor", r"uses w transposed"),
    (lambda g, x, y: (g * x, g * y), mul, (B, rand(4, 3)), "x", "swapped", r"is the gradient of y; expected its own"),
    (lambda g, x, y: ((g * y).sum(0), g * y), mul, (A, B), "y", "wrong operand", r"uses y where x is expected"),
    (lambda g, x, y: ((g * y).sum(0), g), mul, (A, B), "y", "missing factor", r"misses the factor x"),
    (lambda g, x, w: ((g * slope(x, w)) @ w.T, x.T @ g), layer, (B, W), "w", "missing factor", r"tanh'\(h\).*torch\.tanh\(h\)"),
    (lambda g, x: g / x.exp(), torch.exp, (B,), "x0", "inverted factor", r"divides by exp\(x0\)"),
    (lambda g, x: g * x.exp() ** 2, torch.exp, (B,), "x0", "repeated factor", r"exp\(x0\) twice"),
    (lambda g, x: g * x.softmax(-1), softmax, (B,), "x", "missing term", r"misses the term -1 p·p"),
    (lambda g, x: softmax_backward(g, x, -1.0), softmax, (B,), "x", "term sign", r"wrong sign in the term -1 p·p"),
    (lambda g, x: softmax_backward(g, x, 1.0, 0), softmax, (B,), "x", "wrong axis", r"sums over axis 0 inside dz/dx "
    r"where axis 1"),
    (lambda g, x: g, lambda x: x + x.tanh(), (B,), "x", "missing path", r"misses the path through tanh"),
    (lambda g, x: g.cumsum(0), lambda x: x.cumsum(0), (A,), "x", "not transposed", r"forward; expected its transpose"),
    (lambda g, x: g, lambda x: x.flip(0), (A,), "x", "reversed", r"reversed along axis 0"),
    (lambda g, x: torch.cat([2 * g[:1], g[1:]]), lambda x: x * 1.0, (B,), "x", "scaled axis", r"along axis 0 \(4\) by \[2, 1, 1, 1\]"),
    (lambda g, x: 2 * x, lambda x: (x * x).sum(), (B,), "x", "g unused", r"does not use g: it is the gradient for g = "
    r"1"),
    (lambda g, x: g * g, lambda x: 2 * x, (B,), "x", "not linear", r"is not linear in g"),
    (lambda g, x: torch.zeros_like(x), lambda x: 2 * x, (B,), "x", "zero", r"is zero everywhere"),
    (lambda g, x: (g - g) / (x - x), lambda x: 2 * x, (B,), "x", "NaN", r"is NaN in 12 of 12 entries, first at \[0, "
    r"0\]"),
    (lambda g, x, y: (None, g), add, (A, B), "x", "none", r"is None; expected a tensor"),
    (lambda g, x: 3.0, lambda x: 2 * x, (B,), "x", "type", r"is float; expected a tensor"),
    (lambda g, x: (2 * g).reshape(-1), lambda x: 2 * x, (B,), "x", "reshaped", r"right entries in the shape \(12,\); "
    r"expected \(4, 3\)"),
    (lambda g, x: rand(7), lambda x: 2 * x, (B,), "x", "shape", r"has shape \(7,\); expected its argument's = \(4, "
    r"3\)"),
    (lambda g, x: g.mul_(2), lambda x: 2 * x, (B,), "g", "in place", r"g was changed in place"),
    (lambda g, x, y: g, add, (A, B), "backward", "count", r"returns 1 gradients; expected one for each .* = 2"),
    (lambda g, x: g / x, torch.log, (torch.zeros(2, dtype=torch.float64),), "x0", "not differentiable", r"itself is -?inf at \[0\]"),
    (lambda g, x: g * (x > -0.5), F.relu, (B,), "input", "values", r"is wrong in \d of 12 entries.*got .*; expected 0"),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(RIGHT)))
def test_a_right_backward_passes(k: int) -> None:
    backward, f, args = RIGHT[k]
    report = check(backward, f, *args)
    assert report, str(report)
    assert all(error < 1e-12 for error in report.errors.values())
    assert "all gradients are right" in str(report)


@pytest.mark.parametrize("k", range(len(PLANTED)))
def test_a_planted_fault_is_named(k: int) -> None:
    backward, f, args, argument, kind, words = PLANTED[k]
    report = check(backward, f, *args)
    assert not report.ok
    first = report.faults[0]
    assert (first.argument, first.kind) == (argument, kind), str(report)
    assert re.search(words, report.faults[0].message), str(report)
    assert str(report).startswith("check: ")


def test_messages_speak_of_the_caller_s_axes() -> None:
    report = check(lambda g, x, y: (g, g), add, A, B, axes="feat, batch feat -> batch feat")
    assert "axis 0 (batch=4)" in str(report)
    assert "df/dx[batch,feat,feat'] = δ(feat,feat')" in str(report)


def test_several_faults_are_all_reported() -> None:
    report = check(lambda g, x, y: (g, -g), add, A, B)
    assert [(f.argument, f.kind) for f in report.faults] == [("x", "kept axis"), ("y", "sign")]


def test_check_in_single_precision_and_with_a_given_g() -> None:
    x, y = A.float(), B.float()
    assert check(lambda g, x, y: ((g * y).sum(0), g * x), mul, x, y, g=torch.ones(4, 3))
    assert not check(lambda g, x, y: ((g * y).sum(0), g * x * 1.001), mul, x, y)
    with pytest.raises(ShapeError, match=r"g has shape \(3,\); expected f's = \(4, 3\)"):
        check(lambda g, x, y: (g, g), add, x, y, g=torch.ones(3))
    with pytest.raises(ValueError, match="g has entries that are not finite"):
        check(lambda g, x, y: (g, g), add, x, y, g=torch.full((4, 3), float("nan")))


@pytest.mark.parametrize(
    ("grad", "shape"), [((4, 3), (3,)), ((5, 4, 3), (4, 1)), ((2, 3), ()), ((3,), (3,)), ((0, 3), (1, 3))]
)
def test_unbroadcast_is_the_adjoint_of_expand(grad: tuple[int, ...], shape: tuple[int, ...]) -> None:
    g = rand(*grad)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(x.expand(grad), x, g)
    torch.testing.assert_close(df.calculus.unbroadcast(g, shape), expected)
    scope: dict[str, Any] = {"grad": g}
    code = why_unbroadcast(grad, shape).rpartition("in torch: ")[2]
    torch.testing.assert_close(eval(code, scope), expected)


def test_unbroadcast_refuses_what_does_not_broadcast() -> None:
    with pytest.raises(ShapeError, match=r"shape is \(4, 3\); expected one that broadcasts to the gradient's = \(3,\)"):
        unbroadcast(rand(3), (4, 3))
    assert "axis 0 (5): x has no such axis: sum it away" in why_unbroadcast((5, 4, 3), (4, 1))

"""A catalogue of slips in hand-derived gradients: each is named by what it is, and a right gradient is never called one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight

from dualform.calculus import check, mistakes

generator = torch.Generator().manual_seed(1)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


B, D, K = 5, 4, 3
X, W, b, w, Y, T, A, R4 = rand(B, D), rand(D, K), rand(K), rand(D), rand(B, K), rand(B, K), rand(D, D), rand(4, 4)
signal, kernel, image, filters = rand(2, 3, 8), rand(4, 3, 3), rand(2, 2, 5, 6), rand(3, 2, 3, 3)
labels = torch.tensor([0, 2, 1, 1, 0])
hot = F.one_hot(labels, K).double()
mask = X > 0
Q, Key, V = rand(3, 4), rand(5, 4), rand(5, 2)


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w + b


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(x, w)


def conv2(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def mse(p: Tensor, t: Tensor) -> Tensor:
    return ((p - t) ** 2).mean()


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, labels)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def norm_by_hand(x: Tensor) -> Tensor:
    m = x.mean(-1, keepdim=True)
    v = ((x - m) ** 2).mean(-1, keepdim=True)
    return (x - m) / (v + 1e-5).sqrt()


def normed(g: Tensor, x: Tensor, mean: float = 1, along: float = 1, axis: int = -1) -> Tensor:
    r = 1 / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = (x - x.mean(-1, keepdim=True)) * r
    return r * (g - mean * g.mean(axis, keepdim=True) - along * h * (g * h).mean(axis, keepdim=True))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T / 2
    return scores.softmax(-1) @ v


def residual(x: Tensor, w: Tensor) -> Tensor:
    return x + (x @ w).tanh()


def pulled(f: Callable[..., Tensor], *args: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return torch.func.vjp(f, *args)[1]  # type: ignore[return-value]


def p(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def slope(x: Tensor, w: Tensor) -> Tensor:
    return 1 - (x @ w).tanh() ** 2


def keep(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


Backward = Callable[..., Any]
# name: backward, function, arguments, the argument that is wrong, kind, words of the message
SLIPS: dict[str, tuple[Backward, Callable[..., Tensor], tuple[Tensor, ...], str, str, str]] = {
    "batch unsummed, bias": (lambda g, x, w, b: (g @ w.T, x.T @ g, g), linear, (X, W, b), "b", "kept axis", r"axis 0 \(5\)"),
    "batch averaged, bias": (lambda g, x, w, b: (g @ w.T, x.T @ g, g.mean(0)), linear, (X, W, b), "b", "averaged", r"axis 0 \(5\) of the result"),
    "batch unsummed, weight": (lambda g, x, w, b: (g @ w.T, x[:, :, None] * g[:, None], g.sum(0)), linear, (X, W, b), "w", "kept axis", r"axis 0 \(5\).*same argument is used all along it"),
    "batch averaged, weight": (lambda g, x, w, b: (g @ w.T, x.T @ g / B, g.sum(0)), linear, (X, W, b), "w", "averaged", r"axis 0 \(5\) of the result"),
    "first sample alone": (lambda g, x, w, b: (g @ w.T, x[:1].T @ g[:1], g.sum(0)), linear, (X, W, b), "w", "missing entries", r"entry 0 of axis 0 \(5\) of the result alone"),
    "last sample left out": (lambda g, x, w, b: (g @ w.T, x[:-1].T @ g[:-1], g.sum(0)), linear, (X, W, b), "w", "missing entries", r"leaves out entry 4 of axis 0"),
    "weight transposed": (lambda g, x, w, b: (g @ w.T, g.T @ x, g.sum(0)), linear, (X, W, b), "w", "transposed", "transposed"),
    "sum over the wrong axis": (lambda g, x, b: (g, g.sum(1)), lambda x, b: x + b, (R4, w), "b", "wrong axis", r"axis 1 where axis 0.*\.sum\(0\)"),
    "one row of a sum": (lambda g, x: torch.cat([g[:1] * 0, 2 * g[1:]]), lambda x: 2 * x, (X,), "x", "missing entries", "leaves out entry 0 of axis 0"),
    "no 2 of a square": (lambda g, x: g * x, lambda x: x**2, (X,), "x", "scale", "1/2 times"),
    "2 for 3 of a cube": (lambda g, x: 2 * g * x**2, lambda x: x**3, (X,), "x", "scale", "0.666667 times"),
    "mean without 1/N": (lambda g, p, t: (2 * g * (p - t), -2 * g * (p - t) / 15), mse, (Y, T), "p", "count", r"1/15, the entries of axis 0 \(5\) and axis 1 \(3\)"),
    "mean over one axis": (lambda g, p, t: (2 * g * (p - t) / B, -2 * g * (p - t) / 15), mse, (Y, T), "p", "count", r"misses the factor 1/3, the entries of axis 1 \(3\)"),
    "plus in a difference": (lambda g, p, t: (2 * g * (p + t) / 15, -2 * g * (p - t) / 15), mse, (Y, T), "p", "wrong factor", "wrong sign inside sub"),
    "sign, or swapped": (lambda g, p, t: (2 * g * (t - p) / 15, -2 * g * (p - t) / 15), mse, (Y, T), "p", "sign", r"wrong sign.*Or it is the gradient of t.*Both give these numbers"),
    "mean of an axis without 1/n": (lambda g, x: g[:, None].expand_as(x), lambda x: x.mean(1), (X,), "x", "count", r"misses the factor 1/4, the entries of axis 1 \(4\)"),
    "mean by the other axis": (lambda g, x: g[:, None].expand_as(x) / B, lambda x: x.mean(1), (X,), "x", "count", r"divides by 5, the entries of axis 0 \(5\); expected 4, those of axis 1"),
    "mean where it sums": (lambda g, x: g[:, None].expand_as(x) / D, lambda x: x.sum(1), (X,), "x", "count", r"1/4, the entries of axis 1 \(4\), too many"),
    "n for n - 1": (lambda g, x: 2 * g * (x - x.mean()) / 20, lambda x: x.var(), (X,), "x", "count", "divides by 20 where 19 is expected"),
    "half of a quadratic form": (lambda g, x, A: (g * (A @ x), g * torch.outer(x, x)), lambda x, A: x @ A @ x, (w, A), "x", "missing path", "straight into z"),
    "a matrix taken for symmetric": (lambda g, x, A: (2 * g * (A @ x), g * torch.outer(x, x)), lambda x, A: x @ A @ x, (w, A), "x", "term factor", "2 times the term .* and 0 times the term"),
    "softmax: diagonal term": (lambda g, x: g * p(x), softmax, (X,), "x", "missing term", r"-1 p·p of dz/dx"),
    "softmax: as a sigmoid": (lambda g, x: g * p(x) * (1 - p(x)), softmax, (X,), "x", "diagonal only", "diagonal of the Jacobian"),
    "softmax: sum over the wrong axis": (lambda g, x: p(x) * (g - (g * p(x)).sum(0, keepdim=True)), softmax, (X,), "x", "wrong axis", "axis 0 inside .* axis 1 is expected"),
    "softmax: of the other axis": (lambda g, x: p(x, 0) * (g - (g * p(x, 0)).sum(0, keepdim=True)), softmax, (X,), "x", "wrong axis", "along axis 0 in z where axis 1"),
    "softmax: plus": (lambda g, x: p(x) * (g + keep(g * p(x))), softmax, (X,), "x", "term sign", "wrong sign in the term -1 p·p"),
    "softmax: mean for sum": (lambda g, x: p(x) * (g - keep(g * p(x)) / D), softmax, (X,), "x", "term factor", "1/4 times the term -1 p·p"),
    "softmax: without p before": (lambda g, x: g - keep(g * p(x)), softmax, (X,), "x", "missing factor", "factor p of every term"),
    "log-softmax: no sum": (lambda g, x: g - p(x) * g, log_softmax, (X,), "x", "diagonal only", "diagonal of the Jacobian"),
    "log-softmax: g forgotten": (lambda g, x: g - p(x), log_softmax, (X,), "x", "not linear", "part without g"),
    "log-softmax: wrong axis": (lambda g, x: g - p(x) * g.sum(0, keepdim=True), log_softmax, (X,), "x", "wrong axis", "axis 0 inside"),
    "cross-entropy: no 1/N": (lambda g, z: g * (p(z) - hot), cross_entropy, (Y,), "z", "count", r"1/5, the entries of axis 0 \(5\)"),
    "cross-entropy: 1/NK": (lambda g, z: g * (p(z) - hot) / B / K, cross_entropy, (Y,), "z", "count", r"1/3, the entries of axis 1 \(3\), too many"),
    "cross-entropy: without labels": (lambda g, z: g * p(z) / B, cross_entropy, (Y,), "z", "missing term", r"misses the term \+1 of dlog_softmax"),
    "cross-entropy: y - p": (lambda g, z: g * (hot - p(z)) / B, cross_entropy, (Y,), "z", "sign", "wrong sign"),
    "cross-entropy: p + y": (lambda g, z: g * (hot + p(z)) / B, cross_entropy, (Y,), "z", "term sign", r"wrong sign in the term \+1"),
    "cross-entropy: softmax over the batch": (lambda g, z: g * (p(z, 0) - hot) / B, cross_entropy, (Y,), "z", "wrong axis", "made along axis 0 where axis 1"),
    "layer norm: no mean": (lambda g, x: normed(g, x, 0), norm, (X,), "x", "missing term", r"-0.25 r"),
    "layer norm: wrong axis": (lambda g, x: normed(g, x, axis=0), norm, (X,), "x", "wrong axis", "axis 0 inside .* axis 1"),
    "layer norm: no 1/std": (lambda g, x: normed(g, x) * (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(), norm, (X,), "x", "missing factor", "factor r of every term"),
    "layer norm by hand: no mean": (lambda g, x: normed(g, x, 0), norm_by_hand, (X,), "x", "missing path", "path through m;"),
    "layer norm by hand: scale alone": (lambda g, x: normed(g, x, 0, 0), norm_by_hand, (X,), "x", "missing path", "0 times the path x -> m -> .* and 0 times the path x -> sub"),
    "norm: not divided": (lambda g, x: g * x, lambda x: x.norm(), (w,), "x", "scale", "has the factor z = .* too many"),
    "norm: divided twice": (lambda g, x: g * x / (x @ x), lambda x: x.norm(), (w,), "x", "scale", "divided by z = .* once too often"),
    "norm of rows: by columns": (lambda g, x: g[:, None] * x / x.norm(dim=0, keepdim=True), lambda x: x.norm(dim=1), (R4,), "x", "wrong axis", "along axis 0 where axis 1"),
    "x / norm: no projection": (lambda g, x: g / x.norm(), lambda x: x / x.norm(), (w,), "x", "missing path", "path through norm"),
    "kernel not flipped": (lambda g, x, w: (conv1d_input(x.shape, w.flip(-1), g), conv1d_weight(x, w.shape, g)), conv, (signal, kernel), "x", "flipped factor", r"uses w in the wrong direction along axis 2.*w\.flip"),
    "kernel not flipped, 2d": (lambda g, x, w: (conv2d_input(x.shape, w.flip(-1, -2), g), conv2d_weight(x, w.shape, g)), conv2, (image, filters), "x", "flipped factor", r"along axes \[2, 3\]"),
    "kernel flipped in one axis": (lambda g, x, w: (conv2d_input(x.shape, w.flip(-1), g), conv2d_weight(x, w.shape, g)), conv2, (image, filters), "x", "flipped factor", "along axis 3"),
    "kernel's gradient flipped": (lambda g, x, w: (conv1d_input(x.shape, w, g), conv1d_weight(x, w.shape, g).flip(-1)), conv, (signal, kernel), "w", "reversed", "reversed along axis 2"),
    "kernel: batch unsummed": (lambda g, x, w: (conv1d_input(x.shape, w, g), torch.stack([conv1d_weight(x[k : k + 1], w.shape, g[k : k + 1]) for k in range(2)])), conv, (signal, kernel), "w", "kept axis", r"axis 0 \(2\).*same argument"),
    "kernel: batch averaged": (lambda g, x, w: (conv1d_input(x.shape, w, g), conv1d_weight(x, w.shape, g) / 2), conv, (signal, kernel), "w", "averaged", r"axis 0 \(2\) of the result"),
    "kernel transposed": (lambda g, x, w: (conv2d_input(x.shape, w.mT, g), conv2d_weight(x, w.shape, g)), conv2, (image, filters), "x", "transposed factor", r"w\.transpose\(2, 3\)"),
    "image off by one": (lambda g, x, w: (conv1d_input(x.shape, w, g).roll(1, -1), conv1d_weight(x, w.shape, g)), conv, (signal, kernel), "x", "shifted", r"shifted by \+1 along axis 2"),
    "channel's bias: batch unsummed": (lambda g, x, b: (g, g.sum(-1)), lambda x, b: x + b[:, None], (rand(2, 3, 5), b), "b", "kept axis", r"axis 0 \(2\)"),
    "channel's bias: places unsummed": (lambda g, x, b: (g, g.sum(0)), lambda x, b: x + b[:, None], (rand(2, 3, 5), b), "b", "kept axis", r"axis 1 \(5\)"),
    "pool not averaged": (lambda g, x: g.repeat_interleave(2, -1), lambda x: F.avg_pool1d(x, 2), (signal,), "x", "scale", "2 times"),
    "copies averaged": (lambda g, x: g.reshape(2, 3, 4, 2).mean(-1), lambda x: x.repeat_interleave(2, -1), (rand(2, 3, 4),), "x", "scale", "1/2 times"),
    "running sum forward": (lambda g, x: g.cumsum(0), lambda x: x.cumsum(0), (X,), "x", "not transposed", "forward; expected its transpose"),
    "running sum without itself": (lambda g, x: g.flip(0).cumsum(0).flip(0) - g, lambda x: x.cumsum(0), (X,), "x", "off by one", "lost a diagonal"),
    "running sum of the other axis": (lambda g, x: g.flip(1).cumsum(1).flip(1), lambda x: x.cumsum(0), (X,), "x", "wrong axis", "along axis 1 in z where axis 0"),
    "roll the same way": (lambda g, x: g.roll(1, 0), lambda x: x.roll(1, 0), (X,), "x", "not transposed", "forward"),
    "slice put back one too early": (lambda g, x: F.pad(g, (0, 0, 0, 1)), lambda x: x[1:], (X,), "x", "shifted", r"shifted by -1 along axis 0"),
    "difference: both plus": (lambda g, x: F.pad(g, (1, 0)) + F.pad(g, (0, 1)), lambda x: x[1:] - x[:-1], (w,), "x", "path sign", "wrong sign"),
    "difference: one side": (lambda g, x: F.pad(g, (1, 0)), lambda x: x[1:] - x[:-1], (w,), "x", "missing path", "path through slice"),
    "flip forgotten": (lambda g, x: g, lambda x: x.flip(1), (X,), "x", "reversed", "along axis 1"),
    "axes in the function's order": (lambda g, x: g.permute(2, 0, 1), lambda x: x.permute(2, 0, 1), (rand(3, 3, 3),), "x", "transposed", r"order \(2, 0, 1\)"),
    "relu: no mask": (lambda g, x: g, lambda x: x.relu(), (X,), "x", "missing factor", r"\[x>0\]"),
    "relu: mask inverted": (lambda g, x: g * (x < 0), lambda x: x.relu(), (X,), "x", "inverted mask", r"\[x>0\] inverted"),
    "mask forgotten": (lambda g, x: g, lambda x: torch.where(mask, x, 0.0), (X,), "x", "missing factor", r"\[c\]"),
    "triangle forgotten": (lambda g, x: g, lambda x: x.tril() * 1.0, (A,), "x", "missing mask", "misses the triangle"),
    "triu for tril": (lambda g, x: g.triu(), lambda x: x.tril(), (A,), "x", "not transposed", "turned over"),
    "clamp: no mask": (lambda g, x: g, lambda x: x.clamp(-0.5, 0.5), (X,), "x", "missing factor", "clamp"),
    "tanh: 1 - z": (lambda g, x: g * (1 - x.tanh()), lambda x: x.tanh(), (X,), "x", "wrong factor", "1 - z where tanh'"),
    "tanh: slope of the result": (lambda g, x: g * (1 - x.tanh().tanh() ** 2), lambda x: x.tanh(), (X,), "x", "wrong factor", r"1 - tanh\(z\)² where tanh'"),
    "sigmoid: squared": (lambda g, x: g * x.sigmoid() ** 2, lambda x: x.sigmoid(), (X,), "x", "wrong factor", "z² where sigmoid'"),
    "log: x for 1/x": (lambda g, x: g * x, lambda x: x.log(), (X.abs(),), "x", "wrong operand", r"x where \(1/x\)"),
    "quotient: square forgotten": (lambda g, x, y: (g / y, -g * x / y), lambda x, y: x / y, (X, rand(B, D)), "y", "wrong operand", r"z where \(x/y²\)"),
    "copies unsummed": (lambda g, x, s: (g * s, g * x), lambda x, s: x * s, (X, rand(B, 1)), "s", "kept axis", r"axis 1 \(4\).*keepdim=True"),
    "number unsummed": (lambda g, x, s: (g * s, g * x), lambda x, s: x * s, (X, rand()), "s", "kept axis", r"axis 0 \(5\) and axis 1 \(4\)"),
    "residual: no skip": (lambda g, x, w: ((g * slope(x, w)) @ w.T, x.T @ (g * slope(x, w))), residual, (X, A), "x", "missing path", "straight into z"),
    "residual: skip alone": (lambda g, x, w: (g, x.T @ (g * slope(x, w))), residual, (X, A), "x", "missing path", "path through matmul"),
    "stopped in one branch": (lambda g, x: g * x.tanh(), lambda x: x * x.tanh(), (X,), "x", "missing path", "path through tanh"),
    "tied weight: one use": (lambda g, x, w: (g @ w.T @ w.T, x.T @ (g @ w.T)), lambda x, w: x @ w @ w, (X, A), "w", "missing path", "straight into z"),
    "attention: no scale": (lambda g, q, k, v: (2 * pulled(attention, q, k, v)(g)[0], *pulled(attention, q, k, v)(g)[1:]), attention, (Q, Key, V), "q", "scale", "2 times"),
    "attention: weights not transposed": (lambda g, q, k, v: (*pulled(attention, q, k, v)(g)[:2], p(q @ k.T / 2) @ g), attention, (R4, A, rand(4, 2)), "v", "transposed factor", r"softmax transposed"),
    "attention: softmax's diagonal": (lambda g, q, k, v: (((g @ v.T) * p(q @ k.T / 2)) @ k / 2, *pulled(attention, q, k, v)(g)[1:]), attention, (Q, Key, V), "q", "missing term", "-1 p·p of dsoftmax"),
    "embedding overwritten": (lambda g, w: torch.zeros_like(w).index_put((labels,), g), lambda w: w[labels], (rand(4, 3),), "w", "overwritten", "looked up more than once"),
    "inverse: sign": (lambda g, x: torch.linalg.inv(x).T @ g @ torch.linalg.inv(x).T, lambda x: torch.linalg.inv(x), (A,), "x", "sign", "wrong sign"),
    "inverse: not transposed": (lambda g, x: -torch.linalg.inv(x) @ g @ torch.linalg.inv(x), lambda x: torch.linalg.inv(x), (A,), "x", "not transposed", "forward"),
    "log det: not transposed": (lambda g, x: g * torch.linalg.inv(x), lambda x: torch.linalg.slogdet(x)[1], (A,), "x", "transposed", "transposed"),
    "det: without det": (lambda g, x: g * torch.linalg.inv(x).T, lambda x: torch.linalg.det(x), (A,), "x", "scale", "divided by z = .* once too often"),
    "a part of its own": (lambda g, x: 2 * g + torch.eye(B, D).double(), lambda x: 2 * x, (X,), "x", "not linear", "part without g"),
    "no rule": (lambda g, x: g * (x**3 + 0.1), lambda x: x.sin(), (X,), "x", "values", r"wrong in 20 of 20 entries: got"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_named(name: str) -> None:
    backward, f, args, argument, kind, words = SLIPS[name]
    report = check(backward, f, *args)
    found = {fault.argument: fault for fault in report.faults}
    assert argument in found, str(report)
    assert found[argument].kind == kind, str(report)
    assert re.search(words, found[argument].message), found[argument].message
    assert set(found) == {argument}, str(report)


@pytest.mark.parametrize("name", SLIPS)
def test_the_right_gradient_is_no_slip(name: str) -> None:
    _, f, args, *_ = SLIPS[name]
    right = check(lambda g, *given: pulled(f, *given)(g), f, *args)
    assert right, str(right)
    args32 = tuple(x.float() if x.is_floating_point() else x for x in args)
    if name != "mask forgotten":  # a mask that is made of double precision
        single = check(lambda g, *given: pulled(f, *given)(g), f, *args32)
        assert single, str(single)


def test_a_number_is_an_axis_s_only_where_it_is_summed() -> None:
    """1/2 is no mean over a batch of 2 that the function does not sum over."""
    report = check(lambda g, x: g / 2, lambda x: x * 1.0, rand(2, 3))
    assert report.faults[0].kind == "scale"
    report = check(lambda g, x, b: (g, g.sum(0) / 2), lambda x, b: x + b, rand(2, 3), rand(3))
    assert report.faults[0].kind == "averaged"


def test_what_cannot_be_told_apart_is_said() -> None:
    S = A + A.T
    report = check(lambda g, x: g.T, lambda x: x * 1.0, S, g=torch.diag_embed(w[:3]).new_ones(D, D).triu())
    assert report.faults[0].kind == "transposed"
    report = check(lambda g, x, y: (-g, g), lambda x, y: x - y, X, T.new_ones(B, D))
    assert all("Or it is the gradient of" in fault.message for fault in report.faults)


@pytest.mark.parametrize("wrong", ["slip", "count", "verdict"])
def test_the_law_bites(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip that is not tried, counts of any axis, and numbers that are close enough."""
    if wrong == "slip":
        monkeypatch.setattr(mistakes, "slips", lambda *_: iter(()))
    if wrong == "count":
        monkeypatch.setattr(mistakes, "_free", lambda J, side: list(range(len(getattr(J.terms[0], side)))))
    if wrong == "verdict":
        monkeypatch.setattr(mistakes, "close", lambda a, b: a.shape == b.shape)
    failed = 0
    for name in ("pool not averaged", "copies averaged", "kernel not flipped", "tanh: 1 - z"):
        backward, f, args, argument, kind, _ = SLIPS[name]
        found = {fault.argument: fault.kind for fault in check(backward, f, *args).faults}
        failed += found.get(argument) != kind
    assert failed

"""What autograd finds finite is finite here, and equal: where torch selects, so do masks; an account says what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualform import explain, hessian, jacobian
from dualform.calculus import Derivative

TIGHT: Any = {"rtol": 1e-10, "atol": 1e-10}
X = torch.tensor([[-1.0, 0.0, 2.0], [3.0, -2.0, 0.5]], dtype=torch.float64)
NONE = torch.tensor([[True, True, True], [False, True, False]])
GOOD = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.3, 0.6]], dtype=torch.float64)


def put(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = 0.0
    y[1:, :1] = 0.0
    return y


def put_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[y <= 0] = 0.0
    return y


GUARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "clamp": lambda x: x.clamp(0, 1), "clamp_min": lambda x: x.clamp(min=0), "hardtanh": lambda x: F.hardtanh(x, 0, 1),
    "maximum": lambda x: torch.maximum(x, x.new_zeros(3)), "fmax": lambda x: torch.fmax(x.new_zeros(()), x), "relu6": F.relu6,
    "minimum": lambda x: -torch.minimum(-x, x.new_zeros(3)), "where": lambda x: torch.where(x > 0, x, 0.0), "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "fill": lambda x: x.masked_fill(x <= 0, 0.0), "scatter": lambda x: x.abs().scatter(1, torch.tensor([[0], [2]]), 0.0), "tril": lambda x: x.abs().tril(),
    "triu": lambda x: x.abs().triu(1), "put": lambda x: put(x.abs()), "put mask": put_mask, "pad": lambda x: F.pad(x.abs() + 0.1, (1, 1)),
    "index_fill": lambda x: x.abs().index_fill(1, torch.tensor([0]), 0.0), "softshrink": lambda x: F.softshrink(x).abs(), "hardsigmoid": lambda x: F.hardsigmoid(4 * x),
    "hardswish": lambda x: F.hardswish(4 * x).relu(), "masked_scatter": lambda x: x.masked_scatter(x <= 0, x.new_zeros(6)), "std": lambda x: (0 * x[:, :1] + 1).expand(2, 3).std(1, keepdim=True) * x.abs(),
}  # fmt: skip
STEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt, "log": lambda x: x.log(), "power": lambda x: x**0.3, "inverse": lambda x: 1 / x, "rsqrt": torch.rsqrt,
}  # fmt: skip
AROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x, "scaled": lambda x: 3 * x, "rows": lambda x: x.sum(1), "all": lambda x: x.sum(), "twice": lambda x: x + x * x,
    "running": lambda x: x.cumsum(-1), "guarded": lambda x: torch.where(x.isfinite(), x, 0.0), "turned": lambda x: x.T if x.ndim == 2 else x,
}  # fmt: skip


def expect_finite(f: Callable[[Tensor], Tensor], x: Tensor) -> Derivative:
    """Compare with autograd where that is finite: every entry, vjp and jvp, traced and kept."""
    rows, y = [], f(x)
    for k in range(y.numel()):
        leaf = x.clone().requires_grad_()
        rows.append(torch.autograd.grad(f(leaf).flatten()[k], leaf, allow_unused=True, materialize_grads=True)[0])
    expected = torch.stack(rows).reshape(*y.shape, *x.shape)
    g = torch.linspace(0.5, 1.5, y.numel(), dtype=x.dtype).reshape(y.shape)
    pulled: Any = torch.autograd.functional.vjp(f, x, g)[1]
    made = [jacobian(f, x), jacobian(f, x)]
    for J in made:
        for got, want in ((J.dense(), expected), (J.vjp(g), pulled)):
            there = want.isfinite()
            torch.testing.assert_close(got[there], want[there], **TIGHT)
        if expected.isfinite().all() and J.jvp(x).isfinite().all():
            torch.testing.assert_close(J.jvp(x), torch.tensordot(expected, x, x.ndim), **TIGHT)
    return made[0]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_guards(guard: str) -> None:
    expect_finite(lambda x: GUARDS[guard](x).sqrt(), X)


PROGRAMS = st.tuples(*(st.sampled_from(sorted(names)) for names in (AROUND, GUARDS, STEEP, AROUND, GUARDS)))


@settings(max_examples=15, deadline=None)
@given(PROGRAMS, st.booleans())
def test_finite_in_autograd_is_finite_here(drawn: tuple[str, ...], outer: bool) -> None:
    inside, guard, steep, outside, last = drawn

    def f(x: Tensor) -> Tensor:
        y = AROUND[inside](x.exp() if outer else x)
        y = STEEP[steep](GUARDS[guard](y if y.ndim == 2 and y.shape[1] == 3 else x))
        return GUARDS[last](y) if outer and y.shape == x.shape else AROUND[outside](y)

    expect_finite(f, X)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T).masked_fill(NONE, -torch.inf).softmax(-1).masked_fill(NONE, 0.0) @ v


def test_rows_that_see_nothing() -> None:
    q, k, v = (torch.sin(torch.arange(4.0 * n, dtype=torch.float64) * (n + 1)).reshape(n, 4) for n in (2, 3, 3))
    for J in (expect_finite(lambda q: attend(q, k, v), q), expect_finite(lambda k: attend(q, k, v), k)):
        assert J.dense().isfinite().all()
        assert Derivative(J.terms, J.out_shape, J.in_shape, J.dtype, "cpu").vjp(torch.ones_like(q)).isfinite().all()


def test_cross_entropy_of_what_is_certain() -> None:
    z, t = torch.tensor([800.0, -800.0, 0.3]).double(), torch.tensor([0.0, 1.0, 0.2]).double()
    for reduction in ("none", "mean", "sum"):
        expect_finite(lambda z, r=reduction: F.binary_cross_entropy(z.sigmoid(), t, reduction=r), z)
        expect_finite(lambda p, r=reduction: F.binary_cross_entropy(p, t, t + 1, reduction=r), z.clamp(0, 1))
    H = hessian(lambda p: F.binary_cross_entropy(p, GOOD[0]), GOOD[1])
    wanted = torch.func.jacrev(torch.func.jacrev(lambda p: F.binary_cross_entropy(p, GOOD[0])))(GOOD[1])
    torch.testing.assert_close(H.dense(), wanted, **TIGHT)


def test_second_derivatives_select_too() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 1.0).log().sum() + x.relu().square().sum()

    torch.testing.assert_close(hessian(f, X).dense(), torch.func.jacrev(torch.func.jacrev(f))(X), **TIGHT)


def test_an_account_says_what_is_no_number_and_why() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    told = explain(lambda x: torch.where(x > 0, x.sqrt(), 0.0), x)
    assert "note        autograd's is nan in 2 of 3 entries, first at [0], and finite here: (1/2√x)" in str(told)
    assert "where x is -1" in told.notes[0]
    assert told.to_dict()["notes"] == list(told.notes)
    assert "and finite here" in told.to_html()
    (said,) = explain(lambda x: (x * x).sqrt(), x).notes
    assert said.startswith(
        "x_bar is nan in 1 of 3 entries, first at [1]: (1/2√mul) in dz/dmul is inf at [1], where mul is 0"
    )
    assert not explain(torch.exp, x).notes


def test_a_mask_is_stored_as_truth_values() -> None:
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for f in (torch.relu, lambda x: x.clamp(0, 1), lambda x: torch.where(x > 0, x, 0.0)):
        assert jacobian(f, x).nbytes == 7
    assert jacobian(lambda x: x.relu().sqrt(), x).nbytes == 7 * 9
    assert math.isfinite(jacobian(lambda x: x.relu().sqrt(), x).dense().sum().item())


@pytest.mark.parametrize(
    "after",
    [lambda h: h.T, lambda h: h.sum(0), lambda h: h.sum(1), lambda h: h.sum(), lambda h: (h * h[0]).sum(0)],
    ids=["turned", "rows", "columns", "all", "weighed"],
)
def test_printed_code_selects_whatever_a_gradient_reaches(after: Any) -> None:
    """Explaining runs what it prints, and raises where that differs from autograd."""
    x = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -3.0]], dtype=torch.float64)
    J = jacobian(lambda x: after(x.relu()), x)
    assert "torch.where(" in J.explain().code

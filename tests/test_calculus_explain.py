"""The printed derivation is true: its formulas are parsed back and evaluated, its code is run, its shapes are shown."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from formula_reader import evaluate
from torch import Tensor

from dualform.calculus import Explanation, explain, jacobian
from dualform.calculus.explain import Step
from dualform.calculus.notation import Formula


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def value_of(formula: Formula, shape: tuple[int, ...], whole: dict[str, Tensor] | None = None) -> Tensor:
    """Give the numbers that the printed text stands for; `whole` are derivatives that stand in it by name."""
    tensors = {**formula.tensors, **{k: v for k, v in (whole or {}).items() if k in formula.right()}}
    return evaluate(formula.right(), (*formula.out, *formula.inn), shape, tensors, formula.ranges)


def mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = x @ w1
    return F.gelu(h) @ w2


EXAMPLES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "broadcast": (lambda x, y: x + y, (rand(2), rand(2, 2)), 0),
    "wide broadcast": (lambda x, y: x * y, (rand(3, 1), rand(2, 3, 2)), 0),
    "matmul left": (lambda x, y: x @ y, (rand(2, 3), rand(3, 2)), 0),
    "matmul right": (lambda x, y: x @ y, (rand(2, 3), rand(3, 2)), 1),
    "mlp": (mlp, (rand(2, 3), rand(3, 3), rand(3, 2)), 1),
    "softmax": (lambda x: x.softmax(-1), (rand(2, 3),), 0),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (rand(2, 3), rand(3), rand(3)), 0),
    "residual": (lambda x: x + x.relu() * 2, (rand(2, 2),), 0),
    "slices": (lambda x: (x[1:, ::2] - x[:-1, 1::2]).sum(0), (rand(3, 4),), 0),
    "cat": (lambda x, y: torch.cat([x, y * x]), (rand(2, 2), rand(2, 2)), 0),
    "reshape": (lambda x: x.reshape(4, 2).exp().T, (rand(2, 4),), 0),
    "diagonal": (lambda x: x.diagonal() * x.sum(), (rand(3, 3),), 0),
    "scalar": (lambda x: (x * x).sum(), (rand(3),), 0),
    "rank 0": (lambda x, y: x * y, (rand(), rand(2)), 0),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (rand(2, 3), rand(2, 3), rand(2, 2)), 1),
    "constant": (lambda x: x.detach(), (rand(2),), 0),
    "size 1": (lambda x: x.expand(2, 2) * 3, (rand(1, 1),), 0),
}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], int, Explanation]:
    f, args, wrt = EXAMPLES[request.param]
    return f, args, wrt, explain(f, *args, wrt=wrt, level="proof")


def test_printed_formulas_are_the_derivatives(example: tuple) -> None:
    *_, told = example
    for step in (*told.steps, told.result):
        torch.testing.assert_close(value_of(step.formula, step.shape), step.derivative.dense(), rtol=2e-6, atol=1e-12)
        assert str(step.formula) in str(told)


def check_the_proof(told: Explanation, in_shape: tuple[int, ...]) -> int:
    """Every line of every stage is the same derivative; whole derivatives in it are those that came before."""
    whole = {step.formula.symbol: step.derivative.dense() for step in told.steps}
    lines = 0
    for stage in told.stages:
        shape = (*stage.out_shape, *in_shape)
        if stage.moves:
            values = [value_of(move.formula, shape, whole) for move in stage.moves]
            for value in values[:-1]:
                torch.testing.assert_close(value, values[-1], rtol=2e-6, atol=1e-12)
            whole[stage.symbol] = values[-1]
            lines += len(values)
    if told.stages and not told.left_out:
        expected = told.result.derivative.dense()
        torch.testing.assert_close(whole[told.result.formula.symbol], expected, rtol=2e-6, atol=1e-12)
    return lines


def test_every_line_of_the_proof_is_the_derivative(example: tuple) -> None:
    _, args, wrt, told = example
    check_the_proof(told, tuple(args[wrt].shape))
    text = str(told)
    for stage in told.stages:
        for move in stage.moves:
            assert move.formula.right() in text
            assert move.reason in text


def test_printed_code_is_the_vjp(example: tuple) -> None:
    f, args, wrt, told = example
    J = jacobian(f, *args, wrt=wrt)
    g = rand(*J.out_shape)
    scope = {"torch": torch, "g": g, **told.namespace}
    exec(told.code, scope)
    (expected,) = torch.func.vjp(lambda x: f(*args[:wrt], x, *args[wrt + 1 :]), args[wrt])[1](g)
    torch.testing.assert_close(scope["x_bar"], expected, rtol=1e-10, atol=1e-10)
    assert told.code.splitlines()[0] in str(told)


def test_checks_are_small_and_shapes_are_shown(example: tuple) -> None:
    *_, told = example
    assert len(told.checks) == 3
    assert all(error < 1e-10 for _, error in told.checks)
    for step in (*told.steps, told.result):
        assert step.shape == step.out_shape + step.in_shape
        assert (
            f"shape {step.out_shape} + {step.in_shape} = {step.shape}; {math.prod(step.shape):,} numbers if dense"
            in str(told)
        )


def test_the_steps_compose_to_the_result() -> None:
    for name in ("broadcast", "wide broadcast", "matmul right", "mlp", "reshape"):
        f, args, wrt = EXAMPLES[name]
        told = explain(f, *args, wrt=wrt)
        J = told.steps[0].derivative
        for step in told.steps[1:]:
            J = step.derivative @ J
        torch.testing.assert_close(J.dense(), told.result.derivative.dense())


def test_the_question_everybody_asks() -> None:
    """z = x + y with x (2,) and y (2, 2): the copy x_b, three shapes, nothing stored, and why the sum runs."""
    text = str(explain(lambda x, y: x + y, torch.randn(2), torch.randn(2, 2)))
    for wanted in (
        "broadcast  x -> x_b   (2,) -> (2, 2)",
        "dx_b/dx[i,j,k] = δ(j,k)",
        "shape (2, 2) + (2,) = (2, 2, 2); 8 numbers if dense, 0 stored",
        "z = x_b + y",
        "dz/dx_b[i,j,k,l] = δ(i,k) δ(j,l)",
        "shape (2, 2) + (2, 2) = (2, 2, 2, 2); 16 numbers if dense, 0 stored",
        "dz/dx[i,j,k] = Σ_l Σ_m dz/dx_b[i,j,l,m] · dx_b/dx[l,m,k]",
        "= Σ_l dz/dx_b[i,j,l,k]    <- the sum runs over the broadcast axis l",
        "dz/dx[i,j,k] = δ(j,k)",
        "x_bar = g.sum((0,))",
        "max error 0.0e+00",
    ):
        assert wanted in text


def test_names_are_the_callers() -> None:
    told = explain(mlp, rand(2, 3), rand(3, 3), rand(3, 2), wrt=1)
    text = str(told)
    assert "dz/dw1 = dz/dgelu · dgelu/dh · dh/dw1" in text
    assert "dz/dw1[i,j,k,l] = w2[l,j] gelu'(h)[i,l] x[i,k]" in text
    assert "h = x @ w1   (test_calculus_explain.py:" in text
    named = jacobian(lambda a, b: a @ b, rand(2, 3), rand(3, 2), axes="batch feat, feat out -> batch out")
    assert str(named.explain("one-line")).startswith("dz/da[batch,out,batch',feat] = b[feat,out] δ(batch,batch')")


def test_levels_latex_and_html() -> None:
    J = jacobian(lambda x: x.softmax(-1), rand(2, 3))
    assert "\n" not in str(J.explain("one-line"))
    assert len(J.explain("steps").checks) == 2
    latex = J.explain().to_latex()
    assert latex.startswith(r"\begin{aligned}")
    assert (
        r"\frac{\partial z_{i,j}}{\partial x_{k,l}} &= p_{i,j}\,\delta_{i,k}\,\delta_{j,l} - p_{i,j}\,p_{i,l}\,\delta_{i,k}"
        in latex
    )
    shown = J.explain()._repr_html_()
    assert shown.startswith("<pre")
    assert 'title="index i"' in shown
    with pytest.raises(ValueError, match="level is 'all'; expected one of"):
        J.explain("all")
    with pytest.raises(ValueError, match="the derivative is a composition"):
        (J @ J).explain()


def test_a_wrong_step_does_not_pass() -> None:
    """The law bites: a formula with one delta fewer, or another coefficient, evaluates to something else."""
    told = explain(lambda x: 2 * x, rand(3))
    step: Step = told.result
    (line,) = step.formula.lines
    for changed in (Formula("J", step.formula.out, step.formula.inn, (type(line)(3.0, (), line.deltas, (), ()),), {}), Formula("J", step.formula.out, step.formula.inn, (type(line)(2.0, (), (), (), ()),), {})):  # fmt: skip
        assert not torch.allclose(value_of(changed, step.shape), step.derivative.dense())

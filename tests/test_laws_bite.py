"""Every law bites: one planted wrong record each, and the law must say so."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dualform as df
from dualform import testing as laws
from dualform.learning import emit, forms, layer, loop, program, scan
from dualform.learning.state import State


def bites(law, *args, **kwargs):
    with pytest.raises(laws.LawBroken) as caught:
        law(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def fresh(monkeypatch):
    """Programs derived in a test with something broken stay in that test."""
    monkeypatch.setattr(program, "_programs", program.Bounded(16))
    monkeypatch.setattr(program, "_structures", program.Bounded(16))
    return monkeypatch


class Linear(nn.Module):
    dim = 3

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3))
        self.g = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x @ self.W) * self.g


def derive(rule=("sgd", {"lr": 0.5}), chunk=2):
    return df.derive(Linear(), "squared", rule, chunk=chunk)


class Wrong:
    """A program whose fast forms are wrong in the way of `spoil`: (call, arguments) -> (o, state)."""

    def __init__(self, right, spoil):
        self.right, self.spoil = right, spoil

    def __getattr__(self, name):
        return getattr(self.right, name)

    def __call__(self, *args, form="auto", **options):
        if form == "primal":
            return self.right(*args, form=form, **options)
        return self.spoil(self.right, *args, form=form, **options)


def test_forms_notice_a_coefficient_that_is_off_by_one(fresh):
    def unroll(rule, i, gates, valid, last=None):
        return real(rule, i + 1, gates, valid, None if last is None else last)

    real = emit.unroll
    fresh.setattr(emit, "unroll", unroll)
    assert "auto o" in bites(laws.check_forms, derive(df.rules.SGD(lr=0.5, averaged=True)), time=4)


def test_forms_notice_an_objective_without_its_half(fresh):
    real = emit.Emitter._losses
    fresh.setattr(emit.Emitter, "_losses", lambda self, prediction, x: 2 * real(self, prediction, x))
    assert "auto o" in bites(laws.check_forms, derive(), time=4)


def test_forms_notice_a_token_that_reads_itself_too_late(fresh):
    real = forms.masked
    fresh.setattr(forms, "masked", lambda kernel, q, k, C: real(kernel, q, k, C.tril(-1)))
    fresh.setattr(forms, "prefix", lambda g, coef: (coef.C.tril(-1) @ g.flatten(1)).reshape(g.shape))
    assert "auto o" in bites(laws.check_forms, derive(), time=4)


def test_forms_notice_a_lost_cross_term_of_a_tied_weight(fresh):
    class Tied(Linear):
        def forward(self, x):
            return torch.tanh(x @ self.W) @ self.W

    real = emit.together
    fresh.setattr(emit, "together", lambda written: real(written[:1]))
    assert "auto o" in bites(laws.check_forms, df.derive(Tied(), chunk=2, slow=("g",)), time=4)


@pytest.mark.parametrize("which", ["q", "gate.lr", "param.W"])
def test_forms_notice_an_outer_gradient(which):
    """Outputs and state are right, one gradient is off by a millionth."""

    def spoil(right, q, k, v, gates, *, params, **options):
        pick = {"q": q, "gate.lr": gates["lr"], "param.W": params["W"]}[which]
        wrong = pick + 1e-6 * (pick - pick.detach())
        q = wrong if which == "q" else q
        gates = gates | {"lr": wrong} if which == "gate.lr" else gates
        params = params | {"W": wrong} if which == "param.W" else params
        return right(q, k, v, gates, params=params, **options)

    assert f"auto d {which}" in bites(laws.check_forms, Wrong(derive(), spoil), time=4)


def test_forms_notice_a_gradient_that_the_vjp_loses(fresh):
    real = scan.run_backward

    def lost(plan, call, saved, cotangents, *rest):
        return real(plan, call, saved, [cotangents[0], *map(torch.zeros_like, cotangents[1:])], *rest)

    fresh.setattr(scan, "run_backward", lost)
    assert "auto d" in bites(laws.check_forms, derive(), time=4)


def test_forms_and_resets_notice_a_grid_that_ignores_a_reset(fresh):
    real = loop.arrange
    fresh.setattr(
        loop, "arrange", lambda T, chunk, position, mask, reset, *rest: real(T, chunk, position, mask, None, *rest)
    )
    bites(laws.check_forms, derive(), time=6, resets=True)
    assert "o from 2" in bites(laws.check_reset, derive(), 2, time=5)


def test_splits_notice_a_state_that_drops_registers():
    def forget(right, *args, **options):
        o, state = right(*args, **options)
        return o, State(state.anchor, {n: torch.zeros_like(r) for n, r in state.registers.items()}, state.position)

    wrong = Wrong(derive(), forget)
    assert "cut at [3]" in bites(laws.check_split, wrong, [3], time=4)


def test_splits_notice_a_position_that_starts_again():
    def forget(right, *args, **options):
        o, state = right(*args, **options)
        return o, replace(state, position=torch.zeros_like(state.position))

    bites(laws.check_split, Wrong(derive(df.rules.SGD(momentum=0.5), chunk=4), forget), [3], time=5)


def test_causality_notices_a_layer_that_peeks():
    def peek(right, q, k, v, *args, **options):
        return right(q, k, v.roll(-1, 1), *args, **options)

    assert "o before 2" in bites(laws.check_causal, Wrong(derive(), peek), 2, time=4)


def test_padding_notices_a_mask_that_is_ignored():
    def ignore(right, *args, mask=None, **options):
        return right(*args, **options)

    bites(laws.check_padding, Wrong(derive(), ignore), time=4)


def test_padding_notices_an_output_on_padding():
    def loud(right, *args, **options):
        o, state = right(*args, **options)
        return o + 1e-6 * (o == 0), state

    assert "o of padding" in bites(laws.check_padding, Wrong(derive(), loud), time=4)


def test_zero_rates_notice_weights_that_move():
    rule = df.Rule(lambda i, lr: df.Step(((1.0,),), (lr,), (1.0,), 0.999))
    wrong = derive(rule)
    bites(laws.check_static, wrong, wrong.learner, time=4)


def test_derivatives_notice_a_lost_delta_a_sign_and_a_term(monkeypatch):
    real = df.jacobian
    x, w = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def f(x, w):
        return x * w + x.tanh()

    def lost(f, *args, wrt=0):  # ones in the place of the delta of x: every entry of a row reaches every other
        J = real(f, *args, wrt=wrt)
        dense = J.dense()

        class Dense:
            out_shape, in_shape = J.out_shape, J.in_shape

            def dense(self):
                return dense.sum(-1, keepdim=True).expand_as(dense)

        return Dense()

    laws.check_derivative(f, x, w)
    for spoil in (
        lost,
        lambda *a, wrt=0: -1 * real(*a, wrt=wrt),
        lambda f, *a, wrt=0: real(lambda x, w: x * w, *a, wrt=wrt),
    ):
        monkeypatch.setattr(laws.functions, "jacobian", spoil)
        assert "dense" in bites(laws.check_derivative, f, x, w)


def test_layers_notice_convolutions_that_forget(monkeypatch):
    made = df.TestTimeTraining(8, 2, learner=df.learners.Linear(), rule=df.rules.SGD(), chunk=2, share_qk=True).double()
    laws.check_layer(made, [3], time=5)
    real = layer.causal_windows
    monkeypatch.setattr(layer, "causal_windows", lambda x, tail, *rest: real(x, torch.zeros_like(tail), *rest))
    assert "cut at [3] o" in bites(laws.check_layer, made, [3], time=5)


def test_layers_notice_a_convolution_over_the_future(monkeypatch):
    made = df.TestTimeTraining(8, 2, learner=df.learners.Linear(), rule=df.rules.SGD(), chunk=2, share_qk=True).double()
    real = layer.convolved
    monkeypatch.setattr(layer, "convolved", lambda windows, conv: real(windows._replace(columns=windows.columns.roll(-1, 1)), conv))  # fmt: skip
    assert "y before" in bites(laws.check_layer, made, [], time=5)


def test_check_learner_passes_every_law_on(fresh):
    real = emit.Emitter._losses
    fresh.setattr(emit.Emitter, "_losses", lambda self, prediction, x: 2 * real(self, prediction, x))
    bites(laws.check_learner, Linear(), chunk=2)


@pytest.mark.parametrize("got", [torch.ones(2), torch.ones(3).double(), torch.full((2,), torch.nan).double(),
                                 torch.ones(2).double() + 1e-9, torch.ones(2, dtype=torch.long)], ids=str)  # fmt: skip
def test_agreement_is_strict(got):
    bites(laws.agree, "x", got, torch.ones(2, dtype=torch.float64))
    bites(laws.agree, "x", torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))


def test_every_law_is_bitten():
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in [n for n in vars(laws) if n.startswith("check_")]:
        planted = rf"bites\(laws\.{name},|pytest\.raises\(LawBroken.*\):\n +{name}\("
        assert re.search(planted, source), f"no wrong record is planted for {name}"

"""How programs are used: what a caller changes between two calls is seen, and nothing else costs a trace."""

import functools
import logging
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, Optional

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualform as df
from dualform.learning import program as programs


class Scaled(nn.Module):
    """A linear map whose output goes through a function of the user's."""

    def __init__(self, g: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 4)
        self.g = g
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self, x @ self.w)


class Doubled(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def helped(y: Tensor) -> Tensor:
    return y * helped.scale  # type: ignore[attr-defined]


@functools.wraps(F.gelu)
def wrapped(y: Tensor) -> Tensor:
    return F.gelu(y) * settings.v


def _late(y: Tensor) -> Tensor:
    return y * globals()["late"] if "late" in globals() else y


def _imports(y: Tensor) -> Tensor:
    import hostile_settings  # type: ignore[import-not-found]

    return y * hostile_settings.scale


settings = types.SimpleNamespace(v=1.0)
number = torch.tensor(1.0)
folder, inside = types.ModuleType("hostile_folder"), types.ModuleType("hostile_folder.inside")
folder.inside = inside  # type: ignore[attr-defined]


def _closing(module: types.ModuleType) -> Callable[..., Tensor]:
    return lambda self, y: y * module.scale


CHANGES: dict[str, tuple[Callable[[], Scaled], Callable[[Any], Any]]] = {
    "function attribute": (lambda: Scaled(lambda s, y: helped(y)), lambda s: setattr(helped, "scale", 2.0)),
    "module in a module": (
        lambda: Scaled(lambda s, y: y * folder.inside.scale),
        lambda s: setattr(inside, "scale", 2.0),
    ),
    "module in an attribute": (
        lambda: Scaled(lambda s, y: y * s.m.scale, m=inside),
        lambda s: setattr(inside, "scale", 2.0),
    ),
    "module in a closure": (lambda: Scaled(_closing(inside)), lambda s: setattr(inside, "scale", 2.0)),
    "module imported inside": (lambda: Scaled(lambda s, y: _imports(y)), lambda s: setattr(inside, "scale", 2.0)),
    "name read as text": (
        lambda: Scaled(lambda s, y: y * getattr(inside, "scale")),  # noqa: B009
        lambda s: setattr(inside, "scale", 2.0),
    ),
    "global made later": (lambda: Scaled(lambda s, y: _late(y)), lambda s: globals().__setitem__("late", 2.0)),
    "key of a dict": (
        lambda: Scaled(lambda s, y: 2 * y if "double" in s.flags else y, flags={"single": True}),
        lambda s: (s.flags.pop("single"), s.flags.__setitem__("double", True)),
    ),
    "name of an attribute": (
        lambda: Scaled(lambda s, y: 2 * y if hasattr(s, "loud") else y, single=True),
        lambda s: (delattr(s, "single"), setattr(s, "loud", True)),
    ),
    "entries of an array": (
        lambda: Scaled(lambda s, y: y * float(s.a[0]), a=numpy.ones(2)),
        lambda s: s.a.__imul__(2),
    ),
    "function in library clothes": (lambda: Scaled(lambda s, y: wrapped(y)), lambda s: setattr(settings, "v", 2.0)),
    "class of the learner": (lambda: Scaled(lambda s, y: y), lambda s: setattr(s, "__class__", Doubled)),
    "tensor read by value": (lambda: Scaled(lambda s, y: y * number.item()), lambda s: number.mul_(2)),
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as it was before a change."""
    helped.scale = inside.scale = settings.v = 1.0  # type: ignore[attr-defined]
    number.fill_(1.0)
    globals().pop("late", None)
    monkeypatch.setitem(sys.modules, "hostile_settings", inside)


def _both(program: df.ChunkProgram) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, 5, 1, 4, generator=torch.Generator().manual_seed(1))
    return program(x, x, x)[0], program(x, x, x, form="primal")[0]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen_at_the_next_call(what: str) -> None:
    make, change = CHANGES[what]
    learner = make()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=2, prove=False)
    before, _ = _both(program)
    change(learner)
    after, definition = _both(program)
    assert not torch.allclose(before, definition, rtol=1e-2)
    torch.testing.assert_close(after, definition)


class Remembering(Scaled):
    """What classes carry beside their code."""

    size: Optional[int] = None  # noqa: UP045
    twice = functools.partialmethod(lambda self, y, k: k * y, k=2.0)
    alias = Optional[int]  # noqa: UP045

    @functools.cached_property
    def k(self) -> float:
        return 2.0


@pytest.mark.parametrize(
    "attribute", [logging.getLogger("x"), threading.Lock(), torch.channels_last, torch.finfo(torch.float32), object()]
)
def test_what_learners_carry_costs_no_trace(attribute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Remembering(lambda s, y: s.k * s.twice(y), attribute=attribute)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=2, prove=False)
    _both(program)
    _both(program)
    monkeypatch.setattr(programs, "Derivation", None)  # deriving again would fail
    torch.testing.assert_close(*_both(program))


def test_a_closed_over_table_that_moves_costs_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.ones(4)
    program = df.derive(Scaled(lambda s, y: y * table), rule=df.rules.SGD(lr=0.1), chunk=2, prove=False)
    before, _ = _both(program)
    monkeypatch.setattr(programs, "Derivation", None)
    table.mul_(2)
    after, definition = _both(program)
    torch.testing.assert_close(after, definition)
    assert not torch.allclose(before, after, rtol=1e-2)


@pytest.mark.parametrize("form", ["auto", "primal"])
def test_second_derivatives_through_a_layer_norm_are_those_of_differences(form: str) -> None:
    learner = df.learners.residual_norm(df.learners.Linear())(4).double()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2, prove=False)
    x = torch.randn(1, 4, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def slope(v: Tensor) -> Tensor:
        v = v.detach().requires_grad_() if not v.requires_grad else v
        (g,) = torch.autograd.grad(program(x, x, v, form=form)[0].square().sum(), v, create_graph=True)
        return (g * x.cos()).sum()

    v, step = x.sin().requires_grad_(), 1e-5 * x.exp()
    (found,) = torch.autograd.grad(slope(v), v)
    numeric = (slope(v.detach() + step) - slope(v.detach() - step)).detach() / 2
    torch.testing.assert_close((found * step).sum(), numeric, rtol=1e-5, atol=0)


class Holding(nn.Module):
    """A learner that runs a program of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.linear = 4, nn.Linear(4, 4)
        self.inner = df.derive(nn.Linear(4, 4), chunk=2, prove=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)[:, None, None]
        return self.inner(h, h, h)[0][:, 0, 0]


def test_a_learner_that_holds_a_program_is_refused_for_what_it_is() -> None:
    with pytest.raises(df.DerivationError, match="the learner's 'inner' is a program"):
        df.derive(Holding(), chunk=2)


class Weighted(nn.Module):
    """A loss with a learned weight and a constant, which stay in their dtype where a proof runs in float64."""

    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("b", torch.tensor(0.7))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.w * (self.b * (prediction - target)).abs().pow(3).sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_in_single_precision_is_compared_to_its_digits(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))  # nothing is remembered
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    torch.manual_seed(seed)
    program = df.derive(df.learners.Linear()(4), Weighted(), df.rules.SGD(lr=0.5), chunk=4)
    assert program.proof is not None
    assert "the gradient of objective.w" in program.proof.compared
    assert program.proof.error < 1e-6


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.BatchNorm1d])
def test_what_training_mode_updates_is_said(norm: Any) -> None:
    learner = nn.Sequential(nn.Linear(4, 4), norm(4) if norm is nn.BatchNorm1d else norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"training mode does it.*call \.eval\(\)"):
        df.derive(learner, chunk=2, prove=False)
    df.derive(learner.eval(), chunk=2, prove=False)


def test_what_inference_mode_made_is_learnt_from() -> None:
    program = df.derive(nn.Linear(4, 4), rule=df.rules.SGD(lr=0.1), chunk=2, prove=False)
    q = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            state, x = program(q, q, q)[1], q.cos()
        o, after = program(x, x, q, state=state)
        (o.sum() + after.anchor["weight"].sum()).backward()
        weight: Any = program.learner.weight
        found.append((o, weight.grad))
        weight.grad = None
    torch.testing.assert_close(*found)


kept: list[Tensor] = []
tables: dict[str, Tensor] = {}


def _keeps(s: Any, y: Tensor) -> Tensor:
    kept.append(y)
    return y


def _tabulates(s: Any, y: Tensor) -> Tensor:
    if "mean" not in tables:
        tables["mean"] = y.mean(0)
    return y + tables["mean"]


@pytest.mark.parametrize("g", [_keeps, _tabulates])
def test_nothing_of_the_trials_for_a_width_is_left(g: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="is kept in"):
        df.derive(Scaled(g), chunk=2, prove=False)
    assert not kept
    assert not tables


class Own(nn.Module):
    """Ops that give what they are given: a learner's own weight and table, not something of the trial's."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.ones(4))
        self.free = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.type_as(x) * self.scale.to(x) + self.b.type_as(x) * self.free.type_as(x)


def test_a_trial_for_the_width_takes_nothing_of_the_learners_own() -> None:
    learner = Own()
    before = {**learner.state_dict(keep_vars=True), "free": learner.free}
    df.derive(learner, chunk=2, prove=False)
    after = {**learner.state_dict(keep_vars=True), "free": learner.free}
    assert {n: id(x) for n, x in after.items()} == {n: id(x) for n, x in before.items()}

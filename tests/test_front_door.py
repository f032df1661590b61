"""How user code comes in: read, traced, proved apart, followed; never touched, never stale."""

import ast
import copy
import functools
import itertools
import math
import pickle
import re
import secrets
import threading
import time
from array import array
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws
from dualform.functions.in_blocks import is_unobserved
from dualform.graphs import this_thread
from dualform.graphs.recorder import record_as_called
from dualform.graphs.trace import trace
from dualform.graphs.twin import Twin
from dualform.learning import front_door
from dualform.learning.op import checkpoints_for
from dualform.models.attention import allowed

DOUBLE = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Square(nn.Module):
    """tanh(x W), with whatever a test hangs on it."""

    dim = 4

    def __init__(self, **attributes):
        super().__init__()
        self.W = nn.Parameter(0.5 * rand(4, 4))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return torch.tanh(x @ self.W)


# -- the module is never touched, however its parts hang together ----------------------------------------------------


class Loop(Square):
    def __init__(self):
        super().__init__()
        block = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([block] * 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x @ self.W


class TwoNames(Square):
    def __init__(self):
        super().__init__()
        self.core = nn.Linear(4, 4)
        self.net = nn.Sequential(self.core, nn.Tanh())

    def forward(self, x):
        return self.net(x) @ self.W


class Tied(Square):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.W[0]


class InLists(Square):
    """Parts in a plain list, a dict, a closure, a bound method, a partial."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.parts = [self.part]
        self.table = {"part": (self.part, 1)}
        self.closure = lambda x: x @ self.W
        self.method = self.through
        self.partial = partial(self.through)

    def through(self, x):
        return x * self.W[0]

    def forward(self, x):
        return self.parts[0](x) + self.table["part"][0](x) + self.closure(x) + self.method(x) + self.partial(x)


class Hooked(Square):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.lin.register_forward_hook(lambda m, args, out: out * m.bias.sum())
        self.lin.register_forward_pre_hook(lambda m, args: (args[0] * 2,))

    def forward(self, x):
        return self.lin(x) @ self.W


class Helper:
    def __init__(self, owner):
        self.owner = owner

    def __call__(self, x):
        return x @ self.owner.W


class WithHelper(Square):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self)

    def forward(self, x):
        return torch.tanh(self.helper(x))


class Cell(Square):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x):
        return self.cell(x, x @ self.W)


class Writes(Square):
    """Writes attributes and lists of its own while it runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.last = x @ self.W
        self.seen.append(self.last)
        return torch.tanh(self.last)


SHAPES = (Loop, TwoNames, Tied, InLists, Hooked, WithHelper, Cell, Writes)


@pytest.mark.parametrize("kind", SHAPES)
def test_modules_of_any_shape_are_right_and_left_as_they_were(kind):
    torch.manual_seed(0)
    learner = kind().double()
    before = {name: (id(m), dict(vars(m))) for name, m in learner.named_modules(remove_duplicate=False)}
    tensors = {n: (id(p), p.detach().clone()) for n, p in learner.named_parameters(remove_duplicate=False)}
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=3)
    laws.check_forms(program, time=7)
    x = rand(2, 5, 2, 4)
    program(x, x, x), program(x, x, x, form="primal")
    assert {
        n: (id(p), p.detach()) for n, p in learner.named_parameters(remove_duplicate=False)
    }.keys() == tensors.keys()
    for n, p in learner.named_parameters(remove_duplicate=False):
        assert id(p) == tensors[n][0]
        assert torch.equal(p, tensors[n][1])
        assert type(p) is nn.Parameter
    for name, m in learner.named_modules(remove_duplicate=False):
        assert id(m) == before[name][0]
        assert vars(m).keys() == before[name][1].keys()
    assert getattr(learner, "seen", []) == []


def test_a_twin_refuses_a_parameter_that_forward_puts_aside():
    class Replaces(Square):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(4, dtype=DOUBLE))

        def forward(self, x):
            self.count = self.count + 1
            return x @ self.W + self.count

    with pytest.raises(ValueError, match=r"Replaces puts another tensor in the place of 'count'"):
        df.derive(Replaces(), chunk=2)


def test_a_layer_takes_a_learner_of_shared_parts():
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner=lambda d: Loop(), chunk=3).double()
    laws.check_layer(layer, [2, 5])


# -- nothing is stale -------------------------------------------------------------------------------------------------

_SCALE = 1.0


class Changing(Square):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.act, self.scale, self.config = torch.tanh, [1.0], {"t": 1.0}
        self.array, self.plain = np.ones(4), torch.ones(4, dtype=DOUBLE)
        self.nested = {"inner": [Helper(None)]}
        self.nested["inner"][0].gain = 1.0
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = (
            self.act(x @ self.W)
            * self.scale[0]
            * self.config["t"]
            * self.factor
            * self.nested["inner"][0].gain
            * _SCALE
        )
        y = y * torch.from_numpy(self.array) * self.plain
        return y * 3 if not self.training else y


CHANGES = {
    "a function": lambda m: setattr(m, "act", torch.sin),
    "an entry of a list": lambda m: m.scale.__setitem__(0, 3.0),
    "a list": lambda m: setattr(m, "scale", [3.0]),
    "an entry of a dict": lambda m: m.config.__setitem__("t", 2.0),
    "an attribute of an object in a list": lambda m: setattr(m.nested["inner"][0], "gain", 2.0),
    "an attribute of the class": lambda m: setattr(Changing, "factor", 2.0),
    "a global": lambda m: globals().__setitem__("_SCALE", 2.0),
    "an array": lambda m: m.array.__setitem__(0, 5.0),
    "a plain tensor": lambda m: setattr(m, "plain", 2 * m.plain),
    "a plain tensor, in place": lambda m: m.plain.mul_(2.0),
    "the mode": lambda m: m.eval(),
    "a parameter": lambda m: setattr(m, "W", nn.Parameter(0.3 * rand(4, 4, seed=5))),
    "a parameter's numbers": lambda m: m.W.data.mul_(0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_at_the_next_call_and_the_next_derive(what, monkeypatch):
    monkeypatch.setattr(Changing, "factor", 1.0)
    monkeypatch.setitem(globals(), "_SCALE", 1.0)
    learner = Changing()
    learner.drop = nn.Identity()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2)
    x = rand(1, 5, 1, 4)
    old = program(x, x, x)[0].detach()
    CHANGES[what](learner)
    new = program(x, x, x)[0].detach()
    assert not torch.allclose(old, new)
    laws.agree("o", new, program(x, x, x, form="primal")[0])
    laws.agree("o", df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2)(x, x, x)[0], new)


class Huber:
    delta = 0.1

    def __call__(self, p, t):
        e = (p - t).abs()
        return torch.where(e < self.delta, 0.5 * e * e, self.delta * (e - 0.5 * self.delta)).sum(-1)


def test_a_change_of_the_objective_and_of_the_rule_is_seen():
    huber, x = Huber(), rand(1, 5, 1, 4)
    program = df.derive(Square(), huber, chunk=2)
    old = program(x, x, x)[0].detach()
    huber.delta = 9.0
    laws.agree("o", program(x, x, x)[0], program(x, x, x, form="primal")[0])
    assert not torch.allclose(old, program(x, x, x)[0])
    c = 1.0
    closing = df.derive(Square(), lambda p, t: c * (p - t).square().sum(-1), chunk=2)
    closing(x, x, x)
    c = 2.0
    laws.agree("o", closing(x, x, x)[0], closing(x, x, x, form="primal")[0])
    rate = [0.1]
    rule = df.Rule(step=lambda i, lr: df.Step(A=((1.0,),), b=(rate[0] * lr,), u=(1.0,), a=1.0))
    ruled = df.derive(Square(), rule=rule, chunk=2)
    ruled(x, x, x)
    rate[0] = 0.4
    laws.agree("o", ruled(x, x, x)[0], ruled(x, x, x, form="primal")[0])


def test_what_cannot_be_read_is_traced_at_each_call():
    class Held(Square):
        def forward(self, x):
            return torch.tanh(x @ self.W) * self.box[0]

    values = array("d", [1.0])
    learner = Held(box=values)
    program, x = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2), rand(1, 5, 1, 4)
    program(x, x, x)
    values[0] = 2.0
    laws.agree("o", program(x, x, x)[0], program(x, x, x, form="primal")[0])


# -- a module like any other ------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        self.program = df.derive(self.inner, chunk=2)

    def forward(self, x):
        return self.program(x, x, x)[0]


def test_a_module_that_holds_a_program_is_copied_loaded_and_changed_like_any():
    x = rand(1, 3, 1, 4)
    model = Model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert float(twin(x).detach().abs().max()) < 1e-12 or not torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert twin.inner.weight.grad is not None
    assert model.inner.weight.grad is None
    model = Model()
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()}, assign=True)
    laws.agree("o", model(x), model.program(x, x, x, form="primal")[0])
    model = Model()
    before = model(x).detach()
    model.inner.weight = nn.Parameter(torch.zeros(4, 4, dtype=DOUBLE))
    assert not torch.equal(model(x), before)
    assert model.program.learner is model.inner
    alone = nn.ModuleDict({"program": df.derive(nn.Linear(4, 4), chunk=2)})
    assert {n for n, _ in alone.named_parameters()} == {"program.learner.weight", "program.learner.bias"}
    alone.double()
    assert alone["program"](x, x, x)[0].dtype == DOUBLE
    assert set(dict(Model().named_parameters())) == {"inner.weight", "inner.bias"}


def test_parameters_that_need_no_gradient_are_slow_and_stay():
    learner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    learner[0].requires_grad_(False)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=2)
    assert set(program.parts.fast) == {"2.weight", "2.bias"}
    laws.check_forms(program, time=5)
    x = rand(1, 5, 1, 4)
    program(x, x, x)[0].sum().backward()
    assert learner[0].weight.grad is None
    assert learner[2].weight.grad is not None
    learner.requires_grad_(False)
    with pytest.raises(df.DerivationError, match=r"no fast parameter.*requires_grad=False \['0.bias'"):
        df.derive(learner, chunk=2)
    assert program(x, x, x)[0].shape == x.shape  # frozen for evaluation: what learns was said at derive


def test_lazy_parameters_are_refused_with_the_way_on():
    with pytest.raises(df.DerivationError, match=r"'weight' has no shape yet.*Run it once"):
        df.derive(nn.LazyLinear(4), chunk=2)


@pytest.mark.parametrize("option", ["chunk", "block"])
@pytest.mark.parametrize("value", [2.5, 0, -1, "4", True])
def test_sizes_that_are_none_are_refused(option, value):
    with pytest.raises(df.DerivationError, match=rf"{option} is {re.escape(repr(value))}; expected a number of tokens"):
        df.derive(Square(), **{"chunk": 2, option: value})


# -- what is closed over is an input ----------------------------------------------------------------------------------

CODES = rand(5, 4, seed=3)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, p, t):
        return self.t * (p - t).square().sum(-1)


OBJECTIVES = {
    "weighted": lambda w: lambda p, t: (w * (p - t) ** 2).sum(-1),
    "module": lambda w: Temperature(),
    "literal": lambda w: lambda p, t: (torch.tensor([1.0, 2, 3, 4]) * (p - t) ** 2).sum(-1),
    "codebook distances": lambda w: lambda p, t: ((p @ CODES.T).log_softmax(-1) * (t @ CODES.T).softmax(-1)).sum(-1),
    "codebook labels": lambda w: lambda p, t: F.cross_entropy(p @ CODES.T, (t @ CODES.T).argmax(-1), reduction="none"),
    "a weight of the learner's": lambda w: lambda p, t: (p - t).square().sum(-1) * w.sum(),
    "detached": lambda w: (
        lambda p, t: (p - t).square().sum(-1) / (1 + (p - t).detach().abs().sum(-1)) * w.detach().sum()
    ),
    "cross entropy as a module": lambda w: lambda p, t: nn.CrossEntropyLoss(reduction="none")(p, t.softmax(-1)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_that_close_over_tensors(name):
    w = nn.Parameter(torch.rand(4, dtype=DOUBLE) + 0.5)
    objective = OBJECTIVES[name](w)
    program = df.derive(Square(), objective, df.rules.SGD(lr=0.2), chunk=3)
    laws.check_forms(program, time=7)
    laws.check_forms(program, time=7, carried=True, ragged=True, resets=True)
    x = rand(2, 7, 2, 4)
    closed = [p for p in (w, *getattr(objective, "parameters", list)()) if program.parts.closed and p.requires_grad]
    if not closed:
        return
    sums = [program(x, x, x, form=form)[0].sum() for form in ("auto", "primal")]
    grads = [torch.autograd.grad(y, closed, allow_unused=True, materialize_grads=True) for y in sums]
    for got, expected in zip(*grads, strict=True):
        laws.agree("closed", got, expected)


def test_parameters_that_are_not_registered_have_their_gradient():
    g = nn.Parameter(torch.ones(4, dtype=DOUBLE))

    class Hidden(Square):
        def forward(self, x):
            return torch.tanh(x @ self.W) * self.gains[0]

    learner = Hidden()
    learner.gains = [g]
    program, x = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2), rand(2, 5, 2, 4)
    a, b = (torch.autograd.grad(program(x, x, x, form=f)[0].sum(), [g, learner.W]) for f in ("auto", "primal"))
    for got, expected in zip(a, b, strict=True):
        laws.agree("gradient", got, expected)
    assert next(iter(program.parts.closed.values())) is g


def test_a_weight_reached_through_a_global_is_refused(monkeypatch):
    class Elsewhere(Square):
        def forward(self, x):
            return x @ _HELD["learner"].W

    learner = Elsewhere()
    monkeypatch.setitem(_HELD, "learner", learner)
    with pytest.raises(df.DerivationError, match=r"reaches its own 'W' at return x @ _HELD.*expected self\.W"):
        df.derive(learner, chunk=2)


_HELD: dict = {}


# -- tokens are proved apart in all three
# -------------------------------------------------------------------------------

MIXING = {
    "mean": (lambda p, t: (p - t).square().mean(), r"shape \(\).*reduction='none'"),
    "nn.MSELoss()": (nn.MSELoss(), r"reduction='none' and sum over the last axis, or df\.objectives\.Squared\(\)"),
    "kept axis": (lambda p, t: (p - t).square().mean(-1, keepdim=True), r"shape \(3, 1\)"),
    "not summed": (nn.MSELoss(reduction="none"), r"shape \(3, 4\)"),
    "normalised over all": (
        lambda p, t: ((p - t) / (p - t).norm()).square().sum(-1),
        r"the objective mixes tokens at .*norm",
    ),
    "softmax over tokens": (
        lambda p, t: (p - t).square().sum(-1).softmax(0),
        r"the objective mixes tokens at .*softmax",
    ),
    "divided by the batch's": (lambda p, t: (p - t).square().sum(-1) / (1 + t.square().sum()), "mixes tokens"),
    "centred": (lambda p, t: (p - p.mean(0)).square().sum(-1), "mixes tokens"),
    "random": (lambda p, t: (torch.rand_like(p) * (p - t)).sum(-1), "is random"),
    "a branch": (
        lambda p, t: (p - t).square().sum(-1) if bool((p > 0).all()) else p.sum(-1),
        "reads a tensor's values",
    ),
    "a tuple": (lambda p, t: ((p - t).square().sum(-1), p), "returns"),
    "integers": (lambda p, t: (p > t).sum(-1), "int64"),
}


@pytest.mark.parametrize("name", MIXING)
def test_objectives_that_are_not_of_one_token_are_refused(name):
    objective, words = MIXING[name]
    with pytest.raises(ValueError, match=words):
        df.derive(Square(), objective, chunk=3)


RULES = {
    "cumsum": (lambda i, lr: df.Step(((1.0,),), (0.3 * lr.cumsum(0) if lr.ndim else lr,), (1.0,), 1.0), "mixes tokens"),
    "mean": (lambda i, lr: df.Step(((1.0,),), (0.3 * lr / lr.mean(),), (1.0,), 1.0), "the rule mixes tokens at .*mean"),
    "a branch": (
        lambda i, lr: df.Step(((1.0,),), (lr if float(i.sum()) > 1 else 0 * lr,), (1.0,), 1.0),
        "reads a tensor's values",
    ),
    "flipped": (
        lambda i, lr: df.Step(((1.0,),), (lr.flip(0) if lr.ndim else lr,), (1.0,), 1.0),
        "mixes tokens|coefficient",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_are_not_of_one_token_are_refused(name):
    step, words = RULES[name]
    with pytest.raises(ValueError, match=words):
        df.derive(Square(), rule=df.Rule(step=step), chunk=3)


def test_rules_that_close_over_tensors_and_stop_gradients():
    w = nn.Parameter(torch.tensor(0.3, dtype=DOUBLE))
    steps = [
        lambda i, lr: df.Step(((1.0,),), (w * lr,), (1.0,), 1.0),
        lambda i, lr: df.Step(((1.0,),), (torch.where(i > 1, lr, 0 * lr),), (1.0,), 1.0),
        lambda i, lr: df.Step(((1.0,),), (0.3 * lr.detach(),), (1.0,), 1.0),
        lambda i, lr: df.Step(((1.0,),), (0.3 * lr,), (lr / lr.detach(),), 1.0),
        lambda i, lr: df.Step(((torch.sigmoid(w),),), (0.3 * lr,), (1.0,), 1.0 - w),
    ]
    for step in steps:
        program = df.derive(Square(), rule=df.Rule(step=step), chunk=3)
        laws.check_forms(program, time=7)
        laws.check_forms(program, time=7, carried=True, ragged=True, resets=True)
    program, x = df.derive(Square(), rule=df.Rule(step=steps[0]), chunk=3), rand(2, 7, 2, 4)
    a, b = (torch.autograd.grad(program(x, x, x, form=f)[0].sum(), w)[0] for f in ("auto", "primal"))
    laws.agree("w", a, b)


@pytest.mark.parametrize("name", df.objectives.names())
def test_every_objective_of_the_catalogue(name):
    laws.check_forms(df.derive(Square(), name, df.rules.SGD(lr=0.2), chunk=3), time=7)


def test_a_size_that_is_the_mini_batchs_by_chance_is_no_token_axis():
    class Folded(Square):
        def forward(self, x):
            return (x @ self.W).reshape(4, -1)

    with pytest.raises(ValueError, match=r"reshape\(4, -1\)"):
        df.derive(Folded(), chunk=4)
    with pytest.raises(ValueError, match=r"shape \(4,\) for predictions and targets \(W, V\) = \(5, 4\)"):
        df.derive(Square(), lambda p, t: (p - t).square().reshape(4, -1).sum(-1), chunk=4)


# -- how many tokens there are is no number of a learner --------------------------------------------------------------


class Body(nn.Module):
    """A learner whose forward is a function of its own, for one line each."""

    def __init__(self, body):
        super().__init__()
        self.W, self.b, self.body = nn.Parameter(rand(4, 4, seed=3) / 2), nn.Parameter(rand(4, seed=4)), body

    def forward(self, x):
        return self.body(x @ self.W, self.b, x)


def repeated(h, b, x):
    for _ in range(x.shape[0]):
        h = h * 1.1
    return h


def branched(h, b, x):
    return h * 2 if len(x) > 8 else h


class Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 1

    @staticmethod
    def backward(ctx, g):
        return g / len(g)


class Counted(Averaged):
    @staticmethod
    def backward(ctx, g):
        return g / torch.ones(len(g), dtype=g.dtype).sum()


NUMBERS = {
    "shape": lambda h, b, x: h / x.shape[0],
    "size": lambda h, b, x: h / x.size(0),
    "len": lambda h, b, x: h + b * len(x),
    "numel": lambda h, b, x: h / math.sqrt(x.numel()),
    "range": repeated,
    "branch": branched,
    "a tensor": lambda h, b, x: h * torch.tensor(float(len(x)), dtype=x.dtype),
    "a fill": lambda h, b, x: h * torch.full((len(x), 1), 1 / len(x), dtype=x.dtype),
    "where": lambda h, b, x: torch.where(x > 0, h, 1 / len(x)),
    "a power": lambda h, b, x: h.sigmoid() ** (1 / len(x)),
    "an option": lambda h, b, x: F.layer_norm(h, (4,), eps=1e-3 * len(x)),
    "columns": lambda h, b, x: x * h[:, : len(x) - 6].sum(-1, keepdim=True),
    "a shift": lambda h, b, x: h.roll(len(x), -1),
    "ones": lambda h, b, x: h / torch.ones(len(x), dtype=x.dtype).sum(),
    "softmax": lambda h, b, x: h * torch.zeros(len(x), 1, dtype=x.dtype).softmax(0),
    "softmax of weights": lambda h, b, x: h * b[:1].expand(len(x), 1).softmax(0),
    "a sum of weights": lambda h, b, x: h + b.expand(len(x), -1).sum(0),
    "a list": lambda h, b, x: h * torch.tensor([1.0] * len(x), dtype=x.dtype).sum(),
    "arange": lambda h, b, x: h * torch.arange(len(x), dtype=x.dtype).mean(),
    "linspace": lambda h, b, x: h * torch.linspace(0, 1, len(x), dtype=x.dtype)[1],
    "a backward": lambda h, b, x: Averaged.apply(h),
    "ones of a backward": lambda h, b, x: Counted.apply(h),
}


@pytest.mark.parametrize("prove", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_learner_that_reads_how_many_tokens_there_are_is_refused(name, prove):
    with pytest.raises(df.DerivationError, match=r"reads the number of tokens, at `.*\(test_front_door.py:\d+\)`: "):
        df.derive(Body(NUMBERS[name]), chunk=8, prove=prove)


def test_the_numbers_are_named():
    with pytest.raises(df.DerivationError, match=r"div takes other = 8, then 9 \(for 8 and 9 tokens\)"):
        df.derive(Body(NUMBERS["shape"]), chunk=8)


def test_objective_and_rule_that_read_how_many_tokens_there_are_are_refused():
    learner = nn.Linear(4, 4).double()
    with pytest.raises(df.DerivationError, match=r"the objective reads the number of tokens.*(?s:.)*8, then 9"):
        df.derive(learner, lambda p, v: (p - v).square().sum(-1) / len(p), chunk=8)
    for step in (
        lambda i: df.Step(A=((1.0,),), b=(0.1 * i / i.numel(),), u=(1.0,), a=0.0),
        lambda i: df.Step(((1.0,),), (1 / i.numel(),), (1.0,), 0.0),
    ):
        with pytest.raises(df.DerivationError, match="the rule reads the number of tokens"):
            df.derive(learner, rule=df.Rule(step=step, gates=(), start=(1.0,), resets=(False,)), chunk=8)


def nested(h, b, x):
    n = x.shape[0]
    return (h if n != 6 else h * 2) if n < 7 else h


def failing(h, b, x):
    if len(x) == 1:
        raise ValueError("one is none")
    return h


class Few(Averaged):
    @staticmethod
    def backward(ctx, g):
        return g * 2 if len(g) < 3 else g


# Choices that fall alike for the 8 and 9 tokens of the first traces.
CHOICES = {
    "one": lambda h, b, x: h * (2 if x.shape[0] == 1 else 1),
    "one, turned round": lambda h, b, x: h * (2 if 1 == x.size(0) else 1),
    "four": lambda h, b, x: h * 2 if len(x) > 4 else h,
    "seven alone": lambda h, b, x: h * 2 if x.shape[0] == 7 else h,
    "more than there are": lambda h, b, x: h * 2 if x.size(0) > 9 else h,
    "a remainder": lambda h, b, x: (h, h * 2)[x.size(0) % 8 == 5],
    "a list": lambda h, b, x: [h, h, h * 3, *[h] * 5][len(x) % 8],
    "bits": lambda h, b, x: h * 2 if not x.shape[0] & 8 else h,
    "a truth": lambda h, b, x: h if x.shape[0] - 3 else h * 2,
    "least": lambda h, b, x: h * min(len(x), 5),
    "a member": lambda h, b, x: h * 2 if len(x) in (2, 5) else h,
    "numel": lambda h, b, x: h * 2 if x.numel() > 20 else h,
    "prod": lambda h, b, x: h * 2 if math.prod(x.shape) < 20 else h,
    "a share": lambda h, b, x: h * 2 if 12 / x.shape[0] > 3.5 else h,
    "a root": lambda h, b, x: h * 2 if math.sqrt(len(x)) < 1.5 else h,
    "numpy": lambda h, b, x: h * 2 if np.sqrt(len(x)) < 1.5 else h,
    "halves": lambda h, b, x: h * 2 if math.ceil(x.shape[0] / 4) == 1 else h,
    "digits": lambda h, b, x: h * 2 if f"{x.shape[0]}" == "3" else h,
    "other sizes": lambda h, b, x: h * 2 if x.shape[0] < x.shape[1] else h,
    "a shape": lambda h, b, x: h * 2 if x.shape == (1, 4) else h,
    "strides": lambda h, b, x: h * 2 if x.t().contiguous().stride(0) < 3 else h,
    "of what is made": lambda h, b, x: h * 2 if torch.cat([h, x], 1).shape[0] == 3 else h,
    "keys": lambda h, b, x: h * {1: 3.0}.get(len(x), 1.0),
    "a key": lambda h, b, x: h * {4: 3.0}.get(x.shape[0], 1.0),
    "a shape as a key": lambda h, b, x: h * {(2, 4): 3.0}.get(tuple(x.shape), 1.0),
    "a set": lambda h, b, x: h * 2 if x.size(0) in {2, 5} else h,
    "an index": lambda h, b, x: h * [1.0, 1.0, 1.0, 1.0, 2.0, *[1.0] * 9][x.shape[0]],
    "an index of halves": lambda h, b, x: h * [1.0, 1.0, 2.0, *[1.0] * 9][x.shape[0] // 2],
    "how many bits": lambda h, b, x: h * {3: 2.0}.get(x.shape[0].bit_length(), 1.0),
    "a size": lambda h, b, x: h * 2 if x.shape.numel() < 6 else h,
    "squeezed": lambda h, b, x: h[:, None].squeeze() * b,
    "nested": nested,
    "an error": failing,
    "an error of two": lambda h, b, x: h if len(x) != 2 else 1 / 0,
    "a backward": lambda h, b, x: Few.apply(h),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_learner_that_decides_by_how_many_tokens_there_are_is_refused(name):
    expected = r"reads the number of tokens, at (`.*\(test_front_door.py:\d+\)`|its sizes): .*(for 8 and|do not)"
    with pytest.raises(df.DerivationError, match=expected):
        df.derive(Body(CHOICES[name]), chunk=8, prove=False)


def test_where_it_is_decided_is_named():
    with pytest.raises(
        df.DerivationError, match=r"at `return h \* 2 if .* else h .*py:\d+\)`.*\(for 16 and 1 tokens\)"
    ):
        df.derive(Body(branched), prove=False)
    with pytest.raises(df.DerivationError, match=r"at `if len\(x\) == 1: .*py:\d+\)`: 17 tokens run and 1 do not"):
        df.derive(Body(failing), prove=False)


def returned_early(h, b, x):
    if x.shape[0] > x.shape[1]:
        return h
    return h * b


def returned_late(h, b, x):
    if x.shape[0] < x.shape[1]:
        return h * b
    return h


def one_of_two(h, b, x):
    y = h * b
    z = y + h
    if x.shape[0] == x.shape[1]:
        return y
    return z


def itself(h, b, x):
    if x.shape[0] >= x.shape[1]:
        return x * 1
    return x @ b.outer(b)


@pytest.mark.parametrize("chunk", [4, 5, 8])
@pytest.mark.parametrize("body", [returned_early, returned_late, one_of_two, itself])
def test_where_two_sizes_are_compared_is_named(body, chunk):
    """The same number as the width, too; an op that stands before the result, or in its place."""
    with pytest.raises(df.DerivationError, match=r"at `if x.shape\[0\] .*py:\d+\)`: then `.*py:\d+\)`: .* tokens\)"):
        df.derive(Body(body), chunk=chunk, prove=False)


def test_objective_and_rule_that_decide_by_how_many_tokens_there_are_are_refused():
    learner = nn.Linear(4, 4).double()
    with pytest.raises(df.DerivationError, match=r"the objective reads the number of tokens.*for 16 and 1 tokens"):
        df.derive(learner, lambda p, v: (p - v).square().sum(-1) * (1 if len(p) > 3 else 2), prove=False)

    def step(i, lr):
        return df.Step(((1.0,),), (0.3 * lr,), (1.0 if i.numel() != 5 else 2.0,), 1.0)

    with pytest.raises(df.DerivationError, match=r"the rule reads the number of tokens.*for 16 and 5 tokens"):
        df.derive(learner, rule=df.Rule(step=step), prove=False)


@pytest.mark.parametrize("many", [1, 2, 4])
def test_a_choice_that_nobody_sees_is_refused_whoever_was_derived_before(many):
    """Of learners with the same first traces, each is traced at other numbers of tokens itself."""
    x = rand(1, 3, 1, 4, seed=5)  # computed as four
    plain, odd = (Body(lambda h, b, x, k=k: h * (2 if x.shape.numel() == k else 1)) for k in (0, 4 * many))
    df.derive(plain, chunk=8, prove=False)(x, x, x)
    with pytest.raises(df.DerivationError, match=rf"reads the number of tokens.*\(for 8 and {many} tokens\)"):
        df.derive(odd, chunk=8, prove=False)


@functools.lru_cache
def pair(shape):
    return shape[0], shape[1] // 2


HARMLESS = {
    "asserted": lambda h, b, x: h if x.shape[0] > 0 and x.shape[-1] == 4 and len(x) == len(h) else 1 / 0,
    "some": lambda h, b, x: h if len(x) else x,
    "the same": lambda h, b, x: h * 1 if len(x) == 1 else 1 * h,
    "most": lambda h, b, x: h[: max(x.shape[0], 1)],
    "a multiple": lambda h, b, x: h if x.numel() % 4 == 0 else 1 / 0,
    "a product": lambda h, b, x: h.reshape(math.prod(x.shape[:-1]), 2, -1).flatten(1),
    "broadcast": lambda h, b, x: b.expand(torch.broadcast_shapes(h.shape, b.shape)) * h,
    "kept by shape": lambda h, b, x: h.view(*pair(x.shape), 2).flatten(1),
    "own axis": lambda h, b, x: h.view(len(x), 4, 1).squeeze(2),
    "too many": lambda h, b, x: h if x.shape[0] < 12 else 1 / 0,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_numbers_that_decide_nothing_are_right(name):
    for _ in range(2):  # what is kept by shapes was kept
        program = df.derive(Body(HARMLESS[name]), rule=df.rules.SGD(lr=0.1), chunk=8, prove=False)
    x = rand(1, 11, 1, 4, seed=5)
    for T in (1, 11):
        found, right = (program(*[x[:, :T]] * 3, form=form, backend="eager")[0] for form in ("auto", "primal"))
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_who_reads_no_size_is_traced_no_more(monkeypatch):
    traced = []
    plain = front_door.trace
    monkeypatch.setattr(front_door, "trace", lambda f, *x, **rest: traced.append(len(x[-1])) or plain(f, *x, **rest))
    df.derive(Body(lambda h, b, x: torch.tanh(h) * b), chunk=8, prove=False)
    assert sorted(traced) == [8] * 3 + [9] * 3
    df.derive(Body(lambda h, b, x: torch.tanh(h).view(len(x), -1) * b), chunk=8, prove=False)
    assert sorted(traced) == [1, 2, 4] + [8] * 6 + [9] * 6
    df.derive(Body(lambda h, b, x: torch.tanh(h).view(x.shape[0], -1) * b), chunk=8, prove=False)
    assert sorted(traced) == [1, 1, 2, 2, 4, 4] + [8] * 9 + [9] * 9


_sizes: list = []


def test_numbers_outlive_their_trace_as_plain_ones():
    df.derive(Body(lambda h, b, x: _sizes.append((x.shape[0], x.shape[0] / 2)) or h), chunk=8, prove=False)
    for a, b in zip(next(x for x in _sizes if x[0] == 9), (9, 4.5), strict=True):
        assert [(a == b) is True, type(a + 1) is type(b), repr(a) == repr(b)] == [True] * 3
        assert copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == b


SIZES = {
    "ones": lambda h, b, x: h + torch.ones(len(x), 1, dtype=x.dtype),
    "a state": lambda h, b, x: h + torch.zeros(len(x), 4, dtype=x.dtype) @ h.new_ones(4, 4),
    "new_zeros": lambda h, b, x: torch.cat([h, x.new_zeros(x.shape[0], 2)], -1)[:, 1:5],
    "expand": lambda h, b, x: h + b.expand(x.shape[0], -1),
    "bmm": lambda h, b, x: torch.bmm(h.unsqueeze(1), torch.outer(b, b).expand(len(x), 4, 4)).squeeze(1),
    "view": lambda h, b, x: (h.view(len(x), 2, 2) * b[:2]).reshape(len(x), -1),
    "own rows": lambda h, b, x: h[torch.arange(len(x)), x.argmax(-1)][:, None] * x,
    "all rows": lambda h, b, x: h[: len(x)],
    "layers": lambda h, b, x: h + torch.zeros(x.shape[0] * 2, 2, dtype=x.dtype).view(x.shape[0], 4),
    "written": lambda h, b, x: torch.empty_like(h).copy_(b[None]) * h,
}


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_as_many_rows_as_tokens_are_right(name, chunk):
    program = df.derive(Body(SIZES[name]), rule=df.rules.SGD(lr=0.1), chunk=chunk)
    x = rand(1, 11, 1, 4, seed=5).requires_grad_()
    leaves = [x, *program.learner.parameters()]
    found = [program(x, x.sin(), x.cos(), form=form, backend="eager")[0] for form in ("auto", "primal")]
    gradients = [torch.autograd.grad(o.square().sum(), leaves, materialize_grads=True) for o in found]
    for a, b in zip((found[0], *gradients[0]), (found[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# -- what fails at every width, or whatever the width, fails at derive
# ----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A learner whose width no attribute says."""

    def __init__(self, body=None, *shapes):
        super().__init__()
        self.W, *self.rest = (nn.Parameter(rand(*shape, seed=3) / 2) for shape in shapes or [(4, 4)])
        self.V, self.body = (self.rest or [None])[0], body

    def forward(self, x):
        return self.body(self, x)


def raising(kind, *words):
    def body(s, x):
        h = torch.tanh(x @ s.W)
        raise kind(*words) if h.requires_grad or len(words) else kind
        return h

    return body


def three_axes(s, x):
    batch, time, width = x.shape
    return (x @ s.W).view(batch, time, width)


FAILING = {
    "no attribute": (
        Wide(lambda s, x: x @ s.missing),
        r"test_front_door.py:\d+\)` failed with AttributeError: .*missing",
    ),
    "no key": (Wide(lambda s, x: {"y": x @ s.W}["z"]), r"py:\d+\)` failed with KeyError: 'z'"),
    "an argument": (Wide(lambda s, x, y: x @ s.W), "failed with TypeError"),
    "raises": (Wide(raising(RuntimeError, "broken")), r"raise kind.*py:\d+\)` failed with RuntimeError: broken"),
    "raises at once": (Wide(lambda s, x: 1 / 0), r"py:\d+\)` failed with ZeroDivisionError"),
    "no widths fit": (Wide(lambda s, x: x @ s.W @ s.V, (4, 4), (5, 4)), r"py:\d+\)` failed with .*4 and 5x4"),
    "nor in the second line": (
        Wide(lambda s, x: F.linear(F.linear(x, s.W).relu(), s.V), (8, 4), (4, 6)),
        "failed with",
    ),
    "parts of torch": (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(6, 4)), r"`Linear\(in_features=6.*failed"),
    "no forward": (nn.ParameterList([rand(4, 4)]), "should not be called"),
    "three axes": (Wide(three_axes), r"batch, time, width = x.shape   \(.*expected 3, got 2"),
    "one number": (Wide(lambda s, x: (x @ s.W).sum()), "mixes tokens at .*sum"),
    "one number of all": (Wide(lambda s, x: (x * s.W).sum(), (4,)), "mixes tokens at .*sum"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_learner_that_fails_whatever_the_width_fails_at_derive(name):
    learner, words = FAILING[name]
    with pytest.raises(ValueError, match=words):
        df.derive(learner, chunk=3, prove=False)


# Widths that nothing shows: 77 = 7 times 11, 100 = 2 times 50.
HIDDEN = {
    "viewed": (lambda s, x: x.view(-1, 7, 11).mean(-1) * s.W, (7,), 77),
    "checked": (lambda s, x: x.view(-1, 7, 11).mean(-1) * s.W if x.shape[-1] == 77 else 1 / 0, (7,), 77),
    "split": (lambda s, x: sum(half[:, :7] for half in x.split(50, -1)[1:2] or 1 / 0) * s.W, (7,), 100),
    "unpacked": (lambda s, x: (lambda a, b: a[:, :7] * b[:, :7])(*x.split(50, -1)) * s.W, (7,), 100),
    "indexed": (lambda s, x: x[:, [76, *range(6)]] * s.W, (7,), 77),
    "looked up": (lambda s, x: x.index_select(-1, torch.arange(70, 77)) * s.W, (7,), 77),
    "columns": (
        lambda s, x: sum(x[:, k] for k in range(x.shape[1])).view(-1, 1) * x.view(-1, 7, 11)[..., 0] * s.W,
        (7,),
        77,
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_width_that_nothing_shows_is_known_at_the_call(name):
    body, shape, K = HIDDEN[name]
    program = df.derive(Wide(body, shape), rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    assert program.width is None
    q, k, v = rand(1, 5, 1, K, seed=1), rand(1, 5, 1, K, seed=2), rand(1, 5, 1, 7, seed=3)
    found, right = (program(q, k, v, form=form, backend="eager")[0] for form in ("auto", "primal"))
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    with pytest.raises(df.ShapeError, match=r"v has width 4; expected the learner's output V = 7"):
        program(q, k, v[..., :4])
    rule = df.Rule(step=lambda i, lr: df.Step(((1.0,),), (lr / i.numel(),), (1.0,), 1.0))
    with pytest.raises(df.DerivationError, match="the rule reads the number of tokens"):
        df.derive(Wide(body, shape), rule=rule, chunk=3, prove=False)


calls = itertools.count(1)


@pytest.mark.parametrize("number", [lambda: secrets.randbelow(1 << 40), time.perf_counter, lambda: next(calls)])
def test_a_function_that_is_another_one_at_each_call_is_refused(number):
    learner = nn.Linear(4, 4).double()
    for options in ({}, {"prove": False}):
        with pytest.raises(df.DerivationError, match="the learner is another function at each call"):
            df.derive(Body(lambda h, b, x: h * number()), **options)
        with pytest.raises(df.DerivationError, match="the objective is another function at each call"):
            df.derive(learner, lambda p, v: (p - v).square().sum(-1) * number(), **options)


# -- threads
# ------------------------------------------------------------------------------------------------------------


def test_first_calls_from_many_threads():
    found: dict[int, object] = {}
    program = df.derive(df.learners.MLP()(4).double(), rule=df.rules.SGD(lr=0.1), chunk=3)

    def first(n):
        try:
            x = rand(1, 4 + n, 1, 4).requires_grad_()
            program(x, x, x, backend="eager")[0].sum().backward()
            own = df.derive(nn.Linear(4, 4).double(), chunk=2 + n)
            found[n] = own(x, x, x, backend="eager")[0].isfinite().all()
        except Exception as error:
            found[n] = error

    threads = [threading.Thread(target=first, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[n] for n in range(8) if found[n] is not True and not bool(found[n] == True)] == []  # noqa: E712


@contextmanager
def held_elsewhere(hold):
    """While another thread is inside `hold(wait)`, which calls `wait` in the midst of what it does."""
    there, leave, errors = threading.Event(), threading.Event(), []

    def wait():
        there.set()
        assert leave.wait(120)

    def run():
        try:
            hold(wait)
        except Exception as error:
            errors.append(error)
        there.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert there.wait(120)
        assert not errors
        yield
    finally:
        leave.set()
        thread.join()
    assert errors == []


class Waits(nn.Module):
    def __init__(self, wait):
        super().__init__()
        self.wait = wait

    def forward(self, x):
        self.wait()
        return x * 2


def flags(wait):
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        wait()
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before


def exporting(wait):
    torch.export.export(Waits(wait), (torch.ones(2),), strict=False)


def compiling(wait):
    def backend(gm, inputs):
        wait()
        return gm

    torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)(torch.ones(2))


def recording(wait):
    record_as_called(lambda x: wait() or x * 2, ["x"], [torch.ones(2)])


def proxies(wait):
    make_fx(lambda x: wait() or x * 2, pre_dispatch=True)(torch.ones(2))


@pytest.mark.parametrize("hold", [flags, exporting, compiling, recording, proxies])
def test_what_another_thread_traces_changes_no_plain_call(hold):
    learner = Scaled()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=4).double()
    x, y = rand(2, 7, 1, 4), rand(2, 7, 8)
    program(x, x, x, backend="eager"), layer(y)
    with held_elsewhere(hold):
        assert not this_thread.compiles()
        assert not this_thread.exports()
        assert not this_thread.records()
        learner.scale = 3.0
        torch.testing.assert_close(program(x, x, x, backend="eager")[0], program(x, x, x, form="primal")[0])
        assert allowed(None, 5, 5, 8, x.device) is None  # in a file for every length it is a mask
        kept = checkpoints_for(512, 16, "auto", 8, 1 << 20)
        shared = is_unobserved(x)
    assert kept == checkpoints_for(512, 16, "auto", 8, 1 << 20)
    assert shared


def tracing(wait):
    trace(lambda x: wait() or torch.tanh(x) * 2, torch.ones(2))


class Once:
    """Waits at the first time that it is traced."""

    def __init__(self, wait):
        self.wait, self.is_done = wait, False

    def __fingerprint__(self):
        return ()

    def __call__(self):
        if this_thread.records() and not self.is_done:
            self.is_done = True
            self.wait()


class Pauses(Square):
    def forward(self, x):
        self.pause()
        return super().forward(x)


def deriving(wait):
    df.derive(Pauses(pause=Once(wait)), chunk=3, prove=False)


def differentiating(wait):
    df.jacobian(lambda x: wait() or torch.tanh(x) * 2, torch.ones(2))


@pytest.mark.parametrize("hold", [tracing, deriving, differentiating])
def test_export_and_compile_go_on_while_another_thread_traces(hold):
    """torch keeps the modes of a trace above dispatch, and the line that it is at, once for the process; ours are a thread's."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.ones(2, 3)
    expected = model(x)
    with held_elsewhere(hold):
        made = torch.export.export(model, (x,), strict=False)
        lines = [n.meta.get("stack_trace") or "" for n in made.graph.nodes]
        assert not any("test_front_door" in line for line in lines)
        compiled = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        made_fx = make_fx(lambda x: model(x), pre_dispatch=True)(x)
    for run in (made.module(), made_fx):
        torch.testing.assert_close(run(x), expected)


@pytest.mark.parametrize("hold", [exporting, compiling, proxies])
def test_what_is_derived_while_another_thread_exports(hold):
    learner = Square(scale=nn.Parameter(rand(4)))
    with held_elsewhere(hold):
        program = df.derive(learner, chunk=3, prove=False)
        x = rand(1, 5, 1, 4).requires_grad_()
        o, _ = program(x, x, x, backend="eager")
        torch.testing.assert_close(o, program(x, x, x, form="primal")[0])
        o.sum().backward()
        assert df.jacobian(lambda x: torch.tanh(x) * 2, torch.ones(2)).shape == (2, 2)
    assert "test_front_door" in str(program.sites[0].line)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(rand(4, 4, seed=3) / 2)
        self.scale = 1.0

    def forward(self, x):
        return torch.tanh(x @ self.W) * self.scale


@pytest.mark.parametrize("hold", [recording, proxies])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_trace_elsewhere_between_forward_and_backward(hold, part):
    """Which rows are padded decides a call's layout: forward and backward must both see it."""
    program = df.derive(Scaled(), rule=df.rules.SGD(lr=0.3, momentum=0.2), chunk=3)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)

    def gradients(around):
        x = rand(2, 8, 1, 4).requires_grad_()
        with around if part == "forward" else nullcontext():
            o, state = program(x, x.sin(), x.cos(), mask=mask, backend="eager")
        leaves = [x, *program.learner.parameters()]
        with around if part == "backward" else nullcontext():
            return torch.autograd.grad((o.square().sum() + state.anchor["W"].sum()), leaves)

    expected = gradients(nullcontext())
    for a, b in zip(gradients(held_elsewhere(hold)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- the house
# ----------------------------------------------------------------------------------------------------------


def test_nothing_else_calls_objective_or_rule():
    folder = Path(df.__file__).parent / "learning"
    doors = {
        "front_door.py",
        "primal.py",
        "rules.py",
    }  # rules.py: a record looks at its own sizes; unroll runs what it is given
    for path in folder.glob("*.py"):
        calls = re.findall(r"\b(?:objective|rule\.step|rule_step)\(", path.read_text())
        named = [c for c in calls if not c.startswith("objective(") or "def " not in c]
        assert path.name in doors or not [c for c in named if c != "trace_objective("], f"{path.name}: {named}"


def imports_of(tree):
    """Which names a module imports from where."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def looks_at_user_code(tree):
    """Where a module reads `.objective` other than through a door,
    or runs `.step` of something that it calls a rule."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and (
            (node.attr == "objective" and not ast.unparse(node.value).endswith("door"))
            or (node.attr == "step" and "rule" in ast.unparse(node.value).lower())
        )
    ]


# The definition, and the records themselves; what runs a learner beside the front door: the definition's own runs, and
# a trial of its width (front_door). spelling traces definitions of ops.
APART = {"primal", "rules", "objectives", "front_door"}
TRACERS = {"front_door": {"trace", "Twin"}, "spelling": {"trace"}, "program": {"Twin"}, "width": {"Twin"}}


def breaches(name, tree):
    """What a module of learning/ does without the front door."""
    imported = imports_of(tree)
    doors = imported.get("dualform.learning.front_door", set())
    tracers = {n for m in ("trace", "twin") for n in imported.get(f"dualform.graphs.{m}", set()) & {"trace", "Twin"}}
    found = [f"imports {n}" for n in tracers - TRACERS.get(name, set())]
    if name not in APART and "unroll" in imported.get("dualform.learning.rules", set()) and "TracedRule" not in doors:
        found.append("unrolls a rule that was not traced")
    if name not in APART and "FrontDoor" not in doors:
        found += looks_at_user_code(tree)
    return found


def test_the_imports_say_who_looks_at_user_code():
    for path in (Path(df.__file__).parent / "learning").glob("*.py"):
        assert breaches(path.stem, ast.parse(path.read_text())) == [], path.name


@pytest.mark.parametrize(
    "planted",
    [
        "from dualform.graphs.trace import trace",
        "from dualform.graphs.twin import Twin",
        "from dualform.learning.rules import unroll",
        "loss = program.objective(prediction, target)",
        "run = vmap(call.objective)",
        "A, b, u, a = self.rule.step(i, lr=lr)",
    ],
)
def test_that_law_bites(planted):
    assert breaches("loop", ast.parse(planted)) != []


def test_a_twin_is_the_module():
    torch.manual_seed(0)
    for kind in SHAPES:
        m, x = kind().double(), rand(3, 4)
        own = {**dict(m.named_parameters()), **dict(m.named_buffers())}
        other = {n: 2 * t for n, t in own.items()}
        expected = (
            torch.func.functional_call(copy.deepcopy(m), other, (x,)) if kind not in (InLists, WithHelper) else None
        )
        laws.agree(kind.__name__, Twin(m)(own, x), copy.deepcopy(m)(x))
        if expected is not None and kind not in (Loop, TwoNames):  # which functional_call leaves broken
            laws.agree(kind.__name__, Twin(m)(other, x), expected)

"""The other kinds of user code, drawn: objectives (right and wrong ones), rules, the shapes of modules.

The law of forms holds for each, and what is not of one token is refused. DUALFORM_EXAMPLES=300 draws more of them,
at random.
"""

import os
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_printer import check_printed
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws
from dualform.learning import emit

DOUBLE = torch.float64
MANY = int(os.environ.get("DUALFORM_EXAMPLES", "0"))


def drawn(*strategies, examples):
    """Run a test on drawn code: the same at each run, unless more are asked for."""
    found = settings(
        max_examples=MANY or examples, deadline=None, derandomize=not MANY, suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    return lambda test: found(given(*strategies)(test))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- objectives: a residual, a weight per entry or token, a way to sum
# ------------------------------------------------------


class Written(nn.Module):
    """A learner whose forward is a line."""

    dim = 4

    def __init__(self, line):
        super().__init__()
        for n, (name, shape) in enumerate({"A": (4, 2), "B": (2, 4), "W": (4, 4), "g": (4,)}.items()):
            self.register_parameter(name, nn.Parameter(0.6 * rand(*shape, seed=n)))
        self.register_buffer("mask", rand(4, 4, seed=7) > -0.5)
        self.register_buffer("steps", torch.tensor([[0, 1, 2, 3]]))
        self.register_buffer("count", torch.tensor(2))
        self.register_buffer("constant_0", torch.tensor(0.5, dtype=DOUBLE))
        self.yes, self.constant, self.line = True, 0.25, line
        self.code = compile(line, "<drawn>", "eval")

    def forward(self, x):
        return eval(self.code, {"torch": torch, "F": F, "self": self, "x": x})

    def extra_repr(self):
        return self.line


RESIDUALS = {
    "difference": lambda p, t: p - t, "product": lambda p, t: p * t, "soft": lambda p, t: (p - t).tanh(),
    "scaled": lambda p, t: (p - t) / (1 + t.abs()), "cosine": lambda p,
    t: F.normalize(p + 2, dim=-1) - F.normalize(t, dim=-1),
}  # fmt: skip
SIZES = {
    "square": lambda e: e.square(), "huber": lambda e: torch.where(e.abs() < 0.5, 0.5 * e * e, 0.5 * (e.abs() - 0.25)),
    "log cosh": lambda e: e.cosh().log(), "power": lambda e: e**2 * (1 + e**2), "itself": lambda e: e,
}  # fmt: skip
FACTORS = {
    "none": lambda p, t, w: 1.0, "entry": lambda p, t, w: w, "number": lambda p, t, w: w.sum(), "literal": lambda p, t,
    w: torch.tensor([1.0, 2, 3, 4]),
    "detached": lambda p, t, w: 1 / (1 + (p - t).detach().abs()), "table": lambda p, t, w: w[t.argmax(-1)][..., None],
    "mask": lambda p, t, w: t > 0, "without": lambda p, t, w: _without(p, t),
}  # fmt: skip
SUMS = {
    "sum": lambda e: e.sum(-1), "mean": lambda e: e.mean(-1), "half": lambda e: 0.5 * e.sum(-1),
    "logsumexp": lambda e: e.logsumexp(-1),
    "dot": lambda e: torch.einsum("...i,i->...", e, torch.linspace(0, 1, e.shape[-1], dtype=e.dtype)),
}  # fmt: skip
WRONG = {
    "mean over all": lambda e: e.mean(), "sum over all": lambda e: e.sum(), "over tokens": lambda e: e.sum(0),
    "not summed": lambda e: e,
    "kept": lambda e: e.sum(-1, keepdim=True), "softmax over tokens": lambda e: e.sum(-1).softmax(0),
    "centred": lambda e: (e - e.mean(0)).sum(-1),
    "running": lambda e: e.sum(-1).cumsum(0), "flipped": lambda e: e.sum(-1).flip(0),
    "sorted": lambda e: e.sum(-1).sort()[0],
    "shared norm": lambda e: (e / (1 + e.norm())).sum(-1), "numbered": lambda e: e.sum(-1) * torch.arange(e.shape[0]),
}  # fmt: skip


@torch.no_grad()
def _without(p, t):
    return 1 / (1 + (p - t).square())


def objective(residual, size, factor, reduce, w):
    return lambda p, t: reduce(SIZES[size](RESIDUALS[residual](p, t)) * FACTORS[factor](p, t, w))


_parts = (st.sampled_from(sorted(RESIDUALS)), st.sampled_from(sorted(SIZES)), st.sampled_from(sorted(FACTORS)))


@drawn(*_parts, st.sampled_from(sorted(SUMS)), examples=7)
def test_objectives(residual, size, factor, sums):
    w = nn.Parameter(torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) + 0.5)
    program = df.derive(
        Written("torch.tanh(x @ self.W)"),
        objective(residual, size, factor, SUMS[sums], w),
        df.rules.SGD(lr=0.2),
        chunk=3,
    )
    laws.check_forms(program, time=5)
    laws.check_forms(program, time=5, carried=True, ragged=True, resets=True)
    if program.parts.closed and w in [*program.parts.closed.values()]:
        x = rand(2, 5, 2, 4)
        a, b = (
            torch.autograd.grad(
                program(x, x.cos(), x.sin(), form=f)[0].sum(), w, materialize_grads=True, allow_unused=True
            )[0]
            for f in ("auto", "primal")
        )
        laws.agree("closed", a, b)
    check_printed(program)


@drawn(*_parts, st.sampled_from(sorted(WRONG)), examples=40)
def test_objectives_of_several_tokens_are_refused(residual, size, factor, wrong):
    w = torch.rand(4, dtype=DOUBLE) + 0.5
    with pytest.raises(ValueError, match=r"derive: the objective|Per token|trace: "):
        df.derive(Written("torch.tanh(x @ self.W)"), objective(residual, size, factor, WRONG[wrong], w), chunk=3)


# -- rules: registers and coefficients
# ----------------------------------------------------------------------------------------

COEFFICIENTS = {
    "1": lambda i, lr, w: 1.0, "0.5": lambda i, lr, w: 0.5, "rate": lambda i, lr, w: 0.3 * lr, "closed": lambda i, lr,
    w: w, "gated": lambda i, lr, w: torch.sigmoid(w) * lr,
    "late": lambda i, lr, w: torch.where(i > 1, lr, 0.1 * lr), "harmonic": lambda i, lr, w: 1 / i, "keep": lambda i, lr,
    w: 1 - 0.2 * lr,
    "detached": lambda i, lr, w: 0.3 * lr.detach(), "ratio": lambda i, lr, w: lr / lr.detach(), "literal": lambda i, lr,
    w: torch.tensor(0.4),
}  # fmt: skip
MIXED = {
    "cumsum": lambda lr: lr.cumsum(0), "mean": lambda lr: lr / (lr.mean() + 1), "flip": lambda lr: lr.flip(0),
    "softmax": lambda lr: lr.softmax(0),
    "first": lambda lr: lr[:1] * lr, "numbered": lambda lr: lr * torch.arange(lr.shape[0]),
    "norm": lambda lr: lr / lr.norm(),
}  # fmt: skip
_coefficient = st.sampled_from(sorted(COEFFICIENTS))


@st.composite
def _rules(draw):
    r = draw(st.integers(1, 2))
    names = {
        "A": [draw(_coefficient) for _ in range(r * r)],
        "b": [draw(_coefficient) for _ in range(r)],
        "u": [draw(_coefficient) for _ in range(r)],
        "a": draw(_coefficient),
    }
    return names, [draw(st.sampled_from([0.0, 1.0])) for _ in range(r)], [draw(st.booleans()) for _ in range(r)]


def rule(names, start, resets, w):
    def step(i, lr):
        def value(name):
            return COEFFICIENTS[name](i, lr, w)

        r = len(start)
        A = tuple(tuple(value(n) for n in names["A"][k * r : (k + 1) * r]) for k in range(r))
        return df.Step(A, tuple(map(value, names["b"])), tuple(map(value, names["u"])), value(names["a"]))

    return df.Rule(step=step, start=tuple(start), resets=tuple(resets))


@drawn(_rules(), examples=10)
def test_rules(given_rule):
    w = nn.Parameter(torch.tensor(0.3, dtype=DOUBLE))
    program = df.derive(Written("torch.tanh(x @ self.W)"), rule=rule(*given_rule, w), chunk=3)
    laws.check_forms(program, time=7)
    laws.check_forms(program, time=5, carried=True, ragged=True, resets=True)
    check_printed(program)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("place", ["A", "b", "u", "a"])
def test_rules_of_several_tokens_are_refused(name, place):
    def step(i, lr):
        mixed = MIXED[name](lr) if lr.ndim else lr
        found = {"A": 1.0, "b": 0.3 * lr, "u": 1.0, "a": 1.0} | {place: mixed}
        return df.Step(((found["A"],),), (found["b"],), (found["u"],), found["a"])

    with pytest.raises(ValueError, match=r"derive: the rule|trace: "):
        df.derive(Written("torch.tanh(x @ self.W)"), rule=df.Rule(step=step), chunk=3)


# -- the shapes of modules: a tree of drawn parts, shared, tied, in lists, with hooks
# ------------------------------------------


class Tree(nn.Module):
    """Run a list of parts, each a way of holding one linear map."""

    dim = 4

    def __init__(self, ways):
        super().__init__()
        torch.manual_seed(len(ways))
        self.ways, self.shared, self.listed, self.table = ways, nn.Linear(4, 4).double(), [], {}
        self.parts = nn.ModuleDict()
        self.again = nn.Sequential(self.shared, nn.Tanh())
        for n, way in enumerate(ways):
            part = self.parts[str(n)] = nn.Linear(4, 4).double()
            if way == "tied":
                part.weight = self.shared.weight
            elif way == "hooked":
                part.register_forward_hook(lambda m, args, out: out * (1 + m.bias.sum()))
            elif way == "normed":
                nn.utils.parametrizations.weight_norm(part)
            elif way == "nested":
                self.parts[str(n)] = nn.Sequential(nn.ModuleList([part])[0], nn.Sequential(nn.Identity()))
            elif way == "bound":
                self.table[way, n] = part.forward
            elif way == "partial":
                self.table[way, n] = partial(F.linear, weight=part.weight, bias=part.bias)
            self.listed.append(part)
            self.table[n] = lambda x, n=n: self.listed[n](x)

    def forward(self, x):
        for n, way in enumerate(self.ways):
            called = {"shared": self.again, "listed": self.listed[n], "closure": self.table[n]}
            held = called.get(way) or self.table.get((way, n)) or self.parts[str(n)]
            x = x + torch.tanh(held(x))
        return x


@drawn(
    st.lists(
        st.sampled_from(
            ["plain", "shared", "tied", "hooked", "normed", "listed", "closure", "nested", "bound", "partial"]
        ),
        min_size=1,
        max_size=3,
    ),
    examples=10,
)
def test_shapes_of_modules(ways):
    learner = Tree(ways)
    before = {n: (id(p), p.detach().clone()) for n, p in learner.named_parameters(remove_duplicate=False)}
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3)
    laws.check_forms(program, time=5)
    for n, p in learner.named_parameters(remove_duplicate=False):
        assert (id(p), True) == (before[n][0], bool(torch.equal(p, before[n][1])))
    check_printed(program)


# -- these laws bite
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["expression", "objective", "rule"])
def test_the_laws_bite(kind, monkeypatch):
    if kind == "expression":
        real = emit.Emitter._starting_point
        monkeypatch.setattr(
            emit.Emitter, "_starting_point", lambda self, *args: [(0.99 * w, t) for w, t in real(self, *args)]
        )
        program = df.derive(Written("x @ (self.A @ self.B + 1)"), rule=df.rules.SGD(lr=0.05, decay=0.1), chunk=2)
    elif kind == "objective":
        real_losses = emit.Emitter._losses
        monkeypatch.setattr(
            emit.Emitter, "_losses", lambda self, p, x: real_losses(self, p.detach() + 0.99 * (p - p.detach()), x)
        )
        program = df.derive(
            Written("torch.sin(x @ self.W)"), objective("difference", "huber", "none", SUMS["half"], None), chunk=2
        )
    else:
        real_unroll = emit.unroll
        monkeypatch.setattr(emit, "unroll", lambda rule, i, *rest: real_unroll(rule, i + 0.01, *rest))
        program = df.derive(
            Written("torch.cos(x @ self.W)"),
            rule=rule({"A": ["1"], "b": ["rate"], "u": ["harmonic"], "a": "1"}, [0.0], [True], None),
            chunk=2,
        )
    with pytest.raises(laws.LawBroken):
        laws.check_forms(program, time=5)

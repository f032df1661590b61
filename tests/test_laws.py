"""The laws over the catalogue and over learners that no part of the package knows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws

DOUBLE = torch.float64


def parameter(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return nn.Parameter(0.5 * torch.randn(*shape, generator=g, dtype=DOUBLE))


class Tied(nn.Module):
    """A residual net whose two blocks and whose output share one weight."""

    def __init__(self):
        super().__init__()
        self.W, self.b = parameter(4, 4), parameter(4)

    def forward(self, x):
        h = x + torch.tanh(x @ self.W + self.b)
        h = h + torch.sin(h @ self.W.T)
        return h @ self.W + self.b


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.A, self.B = parameter(4, 2), parameter(2, 4)

    def forward(self, x):
        return x @ (self.A @ self.B)


class Gram(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = parameter(4, 3)

    def forward(self, x):
        return torch.tanh(x @ (self.A @ self.A.T))


class ThreeOperands(nn.Module):
    def __init__(self):
        super().__init__()
        self.A, self.B = parameter(4, 3), parameter(3, 5)

    def forward(self, x):
        return torch.einsum("ti,ij,jk->tk", x, self.A, self.B)


class OnePlusGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.W = parameter(4), parameter(4, 4)

    def forward(self, x):
        return (x @ self.W) * (1 + self.gain)


class Hadamard(nn.Module):
    def __init__(self):
        super().__init__()
        self.A, self.B = parameter(4, 4), parameter(4, 4, seed=1)

    def forward(self, x):
        return x @ (self.A * self.B)


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.V, self.g = parameter(4, 4), parameter(4)

    def forward(self, x):
        return x @ (self.g * self.V / self.V.square().sum(0).sqrt())


class Maximum(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.c = parameter(4, 4), parameter(4)

    def forward(self, x):
        return torch.maximum(x @ self.W, self.c)


class InPlaceRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.U = parameter(4, 6), parameter(6, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x @ self.W) @ self.U


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = parameter(4, 4)
        self.register_buffer("table", torch.linspace(-1, 1, 16, dtype=DOUBLE).reshape(4, 4))

    def forward(self, x):
        return x @ (self.W * self.table) + torch.tanh(x @ self.table)


class Rectangular(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.b = parameter(5, 3), parameter(3)

    def forward(self, x):
        return F.linear(x, self.W.T, self.b)


class FastNorm(nn.Module):
    """A fast layer-norm gain: where vmap's own derivative is wrong (DESIGN section 2)."""

    def __init__(self):
        super().__init__()
        self.W, self.norm = parameter(4, 4), nn.LayerNorm(4, dtype=DOUBLE)

    def forward(self, x):
        return x + self.norm(x @ self.W)


class Stopped(nn.Module):
    """A detach inside the learner: no gradient flows through it, its value still moves with the weights."""

    def __init__(self):
        super().__init__()
        self.W, self.U = parameter(4, 4), parameter(4, 4, seed=2)

    def forward(self, x):
        h = x @ self.W
        return h @ self.U + torch.tanh(h.detach()) + x @ self.U.detach()


class Heads(nn.Module):
    """Rows cut into groups, mixed inside a row, weights shared by the groups."""

    def __init__(self):
        super().__init__()
        self.W, self.s = parameter(2, 2), parameter(3)

    def forward(self, x):
        h = x.reshape(*x.shape[:-1], 3, 2) @ self.W
        h = h * self.s[:, None]
        a, b = h.flatten(-2).chunk(2, -1)
        return torch.cat([a * b.softmax(-1), b[..., :3] - a], -1)


class Kronecker(nn.Module):
    def __init__(self):
        super().__init__()
        self.A, self.B = parameter(2, 2), parameter(3, 2)

    def forward(self, x):
        return x @ torch.kron(self.A, self.B)


class SoftmaxWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.L, self.W = parameter(4, 4), parameter(4, 4, seed=3)

    def forward(self, x):
        return x @ self.L.softmax(0) + x.exp().log1p() @ self.W.exp()


class GatedRms(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.norm = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.RMSNorm(6)
        self.down = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.double()

    def forward(self, x):
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


own = [Tied, Product, Gram, ThreeOperands, OnePlusGain, Hadamard, WeightNorm, Maximum, InPlaceRelu, Buffer, Rectangular,
       FastNorm, Stopped, Heads, Kronecker, SoftmaxWeights, GatedRms]  # fmt: skip
needs_tokens = {Hadamard: False, WeightNorm: True, Maximum: True, SoftmaxWeights: True, Stopped: True}
rules = {
    "sgd": df.rules.SGD(lr=0.5),
    "averaged": df.rules.SGD(lr=0.5, averaged=True),
    "momentum": df.rules.SGD(lr=0.3, momentum=0.8),
    "decay": df.rules.SGD(lr=0.3, decay=0.2),
    "titans": df.rules.SGD(lr=0.2, momentum=0.6, decay=0.1),
    "user": df.Rule(
        step=lambda i, lr, momentum: df.Step(
            A=((1.0, momentum), (0.0, momentum)), b=(lr * (1 + momentum), lr), u=(1.0, 0.5), a=0.0
        ),
        gates=("lr", "momentum"), constants={"momentum": 0.5}, start=(1.0, 0.0), resets=(False, True), name="user",
    ),
}  # fmt: skip
names = list(rules)


built_in = [
    df.learners.Linear(), df.learners.MLP(depth=2, expand=2), df.learners.MLP(depth=3, expand=1.5, activation="silu"),
    df.learners.SwiGLU(expand=1.5), df.learners.LowRank(rank=2),
    df.learners.residual_norm(df.learners.MLP(depth=2, expand=2)), df.learners.residual_norm(df.learners.Linear()),
]  # fmt: skip


def wobble(prediction, target):
    """An objective of one's own: Huber-like, not quadratic."""
    return torch.log(torch.cosh(prediction - target)).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("kind", own, ids=lambda k: k.__name__)
def test_learners_of_ones_own(kind, chunk):
    rule = rules[names[(own.index(kind) + chunk) % len(names)]]
    forms = ["auto"] if needs_tokens.get(kind) else ["auto", "dual"]
    program = df.derive(kind(), df.objectives.Squared(), rule, chunk=chunk)
    laws.check_forms(program, forms, time=2 * chunk + 1, seed=chunk)
    laws.check_forms(program, forms, time=2 * chunk + 2, seed=chunk, carried=True, ragged=True, resets=True)


@pytest.mark.parametrize("rule", rules)
@pytest.mark.parametrize("spec", built_in, ids=repr)
def test_built_in_learners(spec, rule):
    program = df.derive(spec(4).double(), df.objectives.Squared(), rules[rule], chunk=4)
    laws.check_forms(program, ["auto", "dual"], time=9)
    laws.check_forms(program, ["auto"], time=9, carried=True, ragged=True, resets=True, seed=3)


@pytest.mark.parametrize("objective", [df.objectives.Squared("v-k"), df.objectives.DotProduct(), wobble], ids=["v-k", "dot", "own"])
def test_objectives(objective):
    program = df.derive(df.learners.MLP(depth=2, expand=2)(4).double(), objective, rules["titans"], chunk=3)
    laws.check_forms(program, ["auto", "dual"], time=8, carried=True)


@pytest.mark.parametrize("kind", [k for k, needs in needs_tokens.items() if needs], ids=lambda k: k.__name__)
def test_dual_refuses_and_names_the_line(kind):
    program = df.derive(kind(), chunk=4)
    problem = laws.draw(program)
    with pytest.raises(df.DerivationError, match=r"form='dual' does not exist at .*test_laws.py:\d+"):
        problem.run("dual")

"""The laws over the catalogue and over learners that no part of the package knows."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws
from dualform.learning.primal import primal

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


class SharedModules(nn.Module):
    """Two names for one parameter, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dec.weight = self.enc.weight
        self.double()

    def forward(self, x):
        return self.dec(self.enc(self.enc(x)).sigmoid()) - x


class GatedRms(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.norm = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.RMSNorm(6)
        self.down = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.double()

    def forward(self, x):
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class SpelledOut(nn.Module):
    """Ops without a row of their own: torch's definitions of them have."""

    def __init__(self):
        super().__init__()
        self.W, self.a, self.cell = parameter(4, 8), parameter(1), nn.GRUCell(4, 4, dtype=DOUBLE)

    def forward(self, x):
        h = F.normalize(F.glu(x @ self.W, -1), dim=-1)
        return self.cell(F.prelu(h, self.a.square()), x)


own = [Tied, Product, Gram, ThreeOperands, OnePlusGain, Hadamard, WeightNorm, Maximum, InPlaceRelu, Buffer, Rectangular,
       FastNorm, Stopped, Heads, Kronecker, SoftmaxWeights, GatedRms, SharedModules, SpelledOut]  # fmt: skip
needs_tokens = [
    WeightNorm,
    Maximum,
    SoftmaxWeights,
    Stopped,
    SpelledOut,
]  # some leaf of these enters in no affine way: no dual form
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


def of(recipe, objective, rule, chunk, dim=4):
    return df.derive(recipe(dim).double(), objective, rules[rule], chunk=chunk)


@pytest.mark.parametrize("kind", own, ids=lambda k: k.__name__)
def test_learners_of_ones_own(kind):
    """Rules and mini-batches rotate over the learners; padding, resets and carried state always,
    whole mini-batches too."""
    n = own.index(kind)
    chunk = (3, 4, 1, 3, 7)[n % 5]
    program = df.derive(kind(), df.objectives.Squared(), rules[names[n % len(names)]], chunk=chunk)
    laws.check_forms(program, ["auto"], time=2 * chunk + 2, carried=True, ragged=True, resets=True, seed=n)
    laws.check_forms(program, ["auto" if kind in needs_tokens else "dual"], time=2 * chunk, seed=n + 1)


@pytest.mark.parametrize("n", range(len(built_in)), ids=lambda n: repr(built_in[n]))
def test_built_in_learners(n):
    spec = built_in[n]
    for rule, chunk in ((names[n % len(names)], 3), (names[(n + 4) % len(names)], 4)):
        program = of(spec, df.objectives.Squared(), rule, chunk)
        laws.check_forms(program, ["auto"], time=2 * chunk + 2, carried=True, ragged=True, resets=True, seed=n)
    laws.check_forms(program, ["dual"], time=2 * chunk, seed=n)


@pytest.mark.parametrize("rule", rules)
def test_rules(rule):
    program = of(built_in[1], df.objectives.Squared(), rule, 3)
    laws.check_forms(program, ["auto"], time=8, carried=True, ragged=True, resets=True)
    laws.check_forms(program, ["dual"], time=6)


@pytest.mark.parametrize(
    ("objective", "rule"),
    [(df.objectives.Squared("v-k"), "titans"), (df.objectives.DotProduct(), "momentum"), (wobble, "averaged")],
    ids=["v-k", "dot", "own"],
)
def test_objectives(objective, rule):
    program = of(built_in[1], objective, rule, 3)
    laws.check_forms(program, ["auto"], time=8, carried=True, ragged=True, resets=True)
    laws.check_forms(program, ["dual"], time=6)


@settings(max_examples=8)
@given(st.data())
def test_every_split_is_one_call(data):
    """Cut points, padding per row and resets are drawn; forms change between calls."""
    program = of(built_in[5], df.objectives.Squared(), "titans", 3)
    laws.check_split(
        program,
        data.draw(st.lists(st.integers(1, 9), max_size=4)),
        data.draw(st.permutations(["auto", "primal", "dual"]).map(lambda forms: forms[:2])),
        time=data.draw(st.sampled_from([6, 7, 10])),
        seed=data.draw(st.integers(0, 99)),
        carried=data.draw(st.booleans()), ragged=data.draw(st.booleans()), resets=data.draw(st.booleans()),
    )  # fmt: skip


def test_decoding_token_by_token_is_the_whole():
    laws.check_split(of(built_in[5], df.objectives.Squared(), "averaged", 3), range(1, 8), time=8)


def test_future_padding_and_other_documents_change_nothing():
    program = of(built_in[5], df.objectives.Squared(), "titans", 3)
    laws.check_causal(program, 4, time=10)
    laws.check_padding(program, time=10)
    laws.check_reset(program, 4, time=10)


def test_a_rate_of_zero_is_the_static_learner():
    learner = FastNorm()
    for rule in ("sgd", "averaged", "momentum"):
        laws.check_static(df.derive(learner, rule=rules[rule], chunk=3), learner, time=7)


def test_every_law_for_a_learner_of_ones_own():
    laws.check_learner(Tied(), rule=rules["momentum"], chunk=3, forms=["auto"])


def test_weights_that_are_not_used_stay():
    """Found by a drawn learner: nothing fast meets the tokens."""

    class Idle(Product):
        def forward(self, x):
            return torch.tanh(x @ self.A)

    laws.check_forms(df.derive(Idle(), chunk=3, slow=("A",)), time=7, carried=True, ragged=True, resets=True)


@pytest.mark.parametrize("kind", needs_tokens, ids=lambda k: k.__name__)
def test_dual_refuses_and_names_the_line(kind):
    program = df.derive(kind(), chunk=4)
    problem = laws.draw(program)
    with pytest.raises(df.DerivationError, match=r"form='dual' does not exist at .*test_laws.py:\d+"):
        problem.run("dual")


def test_the_definition_fits_on_a_page():
    """The primal form is what all else is tested against: 40 lines at most, no trace, no vmap, no calculus."""
    source = inspect.getsource(primal)
    assert len(source.splitlines()) <= 40
    assert not re.search(r"vmap|make_fx|calculus|sites|emit", source)


@pytest.mark.parametrize("path", ["calculus", "learning/derive.py", "learning/emit.py", "learning/sites.py",
                                  "learning/reassociate.py", "learning/plan.py", "learning/loop.py", "learning/op.py",
                                  "graphs/simplify.py", "learning/grid.py", "kernels"])  # fmt: skip
def test_nothing_is_derived_by_hand(path):
    """No learner is named where derivations are made."""
    place = Path(df.__file__).parent / path
    known = [*df.learners.names(), "AffineStack", "GatedUnit", "Factored", "ResidualNorm", "TTT-Linear", "TTT-MLP"]
    names = [n for n in known if n.lower() not in ("linear", "head")] + [
        r"learners\.\w+",
        r"from dualform\.learning\.learners",
    ]  # aten.linear is an op, and programs have heads
    for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
        found = re.search("|".join(rf"\b{n}\b" for n in names), file.read_text(), re.IGNORECASE)
        assert not found, f"{file.name} names {found[0]}"

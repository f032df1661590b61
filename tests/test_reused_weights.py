"""A weight used n times: n products per token and not n^2, the same numbers, and a derivation as long as n."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import dualform as df
from dualform.learning.front_door import FrontDoor
from dualform.learning.grid import Variant

DOUBLE = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Repeats(nn.Module):
    """A module of one weight and one bias, run as `step` says."""

    def __init__(self, step, n, dim=4):
        super().__init__()
        self.step, self.n, self.dim = step, n, dim
        self.W, self.b = nn.Parameter(0.3 * rand(dim, dim)), nn.Parameter(0.1 * rand(dim, seed=1))

    def forward(self, x):
        return self.step(self, x)


def unrolled(s, x):
    h = x
    for _ in range(s.n):
        h = torch.tanh(h @ s.W + s.b) + x
    return h


def runge_kutta(s, x):
    def f(h):
        return torch.tanh(nn.functional.linear(h, s.W, s.b))

    for _ in range(s.n):
        k1 = f(x)
        k2 = f(x + k1 / (2 * s.n))
        k3 = f(x + k2 / (2 * s.n))
        x = x + (k1 + 2 * k2 + 2 * k3 + f(x + k3 / s.n)) / (6 * s.n)
    return x


def there_and_back(s, x):
    """Uses that are not alike: the transpose, a scale, a slice, one entry by one."""
    for k in range(s.n):
        x = torch.tanh(x @ s.W) @ s.W.T + (k + 1) * x @ s.W
        x = x + torch.sin(x * s.W[0] + s.b) + nn.functional.pad(x[..., :2] @ s.W[:2, :2], (0, 2))
    return x / x.norm(dim=-1, keepdim=True)


def heads(s, x):
    """Tokens that are no axis by themselves, and a weight that meets parts of them."""
    for _ in range(s.n):
        x = torch.tanh(x.unflatten(-1, (2, 2)) @ s.W[:2, :2] + s.b[:2]).flatten(-2) + x
    return x


class Recurrent(nn.Module):
    """torch's own recurrence over a token in parts."""

    def __init__(self, kind, n, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.n, self.dim = n, 2 * n
        self.net = kind(2, 2, num_layers=layers, batch_first=True).double()

    def forward(self, x):
        return self.net(x.unflatten(-1, (self.n, 2)))[0].flatten(-2)


LEARNERS = {
    "loop": lambda: Repeats(unrolled, 3),
    "Runge-Kutta": lambda: Repeats(runge_kutta, 2),
    "uses that are not alike": lambda: Repeats(there_and_back, 2),
    "parts of tokens": lambda: Repeats(heads, 3),
    "GRU": lambda: Recurrent(nn.GRU, 2, 1),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in LEARNERS for form in ("auto", "dual") if (name, form) != ("GRU", "dual")],
)
def test_many_uses_of_a_weight_are_the_definition(name, form):
    learner = LEARNERS[name]()
    chunk = 1 if form == "dual" and name in ("loop", "parts of tokens") else 3
    program = df.derive(learner, rule=df.rules.SGD(lr=0.05, momentum=0.4, decay=0.1), chunk=chunk, prove=False)
    assert form == "auto" or program.forms["dual"] is None
    q, k, v = (rand(2, 4, 2, learner.dim, seed=n).requires_grad_() for n in range(3))
    lr = rand(2, 4, 2, seed=4).sigmoid().requires_grad_()
    found = []
    for kind in (form, "primal"):
        o, state = program(q, k, v, {"lr": lr}, form=kind, backend="eager")
        held = [x for x in state.tensors().values() if x.is_floating_point()]
        scalar = sum((x * rand(*x.shape, seed=9)).sum() for x in (o, *held))
        found.append([o, *held, *torch.autograd.grad(scalar, [q, k, v, lr, *learner.parameters()])])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["auto", "dual"])
@pytest.mark.parametrize(
    "make", [lambda n: Repeats(unrolled, n), lambda n: Repeats(runge_kutta, n)], ids=["loop", "RK"]
)
def test_a_program_grows_as_its_uses(make, form):
    """Four times the uses: at most four times the ops, forward and in reverse."""

    def size(n):
        program = df.derive(make(n), chunk=4, prove=False)
        step = program.plan(4, DOUBLE, form).step(Variant(4, fresh=True, dense=True, opens=False))
        return len(step.graph.graph.nodes), len(step.reverse.graph.nodes)

    for few, many in zip(size(2), size(8), strict=True):
        assert many <= 4 * few


def test_what_is_alike_is_read_by_one_product():
    """Three uses and a transposed one: two products of scores at each site of the weight."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.dim = nn.Parameter(0.3 * rand(4, 4)), 4

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(x @ self.W)
            return x @ self.W.T

    program = df.derive(Mixed(), chunk=3, prove=False)
    assert [len(site.kernels) for site in program.sites] == [2, 2, 2, 2]
    assert "(3, 3, 4)" in program.code  # uses, tokens, width
    assert "site 4" in str(program.explain())


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_recurrence_of_torchs_loads_no_compiler(kind):
    """Its kernels turn their result in place, which took torch's own tracer, and that a second of imports."""
    code = f"""if True:
        import sys, torch, dualform as df
        class R(torch.nn.Module):
            dim = 8
            def __init__(self):
                super().__init__()
                self.net = torch.nn.{kind}(4, 4, batch_first=True).double()
            def forward(self, x):
                return self.net(x.unflatten(-1, (2, 4)))[0].flatten(-2)
        df.derive(R(), chunk=3, prove=False)
        print([m for m in ("torch._dynamo", "sympy") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_proof_traces_no_learner_again(monkeypatch, dtype, tmp_path):
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    calls, real = [], FrontDoor.trace_learner
    monkeypatch.setattr(FrontDoor, "trace_learner", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    program = df.derive(Repeats(unrolled, 2, dim=5).to(dtype), chunk=3)
    assert program.proof is not None
    assert program.proof.compared
    assert len({call[1:] for call in calls}) == len(calls)  # once at each number of tokens, in one dtype

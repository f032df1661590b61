"""A rule unrolled over a block is its recurrence, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dualform as df
from dualform.learning.rules import Rule, Step, rules, segment_products, unroll, vector


def nesterov(i, lr, momentum):
    return Step(A=((1.0, momentum), (0.0, momentum)), b=(lr * (1 + momentum), lr), u=(1.0, 0.5), a=0.25)


catalogue = {
    "sgd": rules.SGD(lr=0.3).build(),
    "averaged": rules.SGD(lr=0.3, averaged=True).build(),
    "momentum": rules.SGD(lr=0.3, momentum=0.9).build(),
    "decay": rules.SGD(lr=0.3, decay=0.1).build(),
    "titans": rules.SGD(lr=0.3, momentum=0.9, decay=0.1).build(),
    "own": Rule(nesterov, ("lr", "momentum"), {"momentum": 0.5}, (1.0, 0.0), (False, True)),
}


@pytest.mark.parametrize("name", catalogue)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 9), padded=st.booleans())
def test_unrolled_is_recurrence(name, seed, n, padded):
    rule, g = catalogue[name], torch.Generator().manual_seed(seed)
    r = rule.num_registers

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    valid = (torch.rand(n, generator=g) > 0.4).double() if padded else None
    keep = torch.ones(n, dtype=torch.float64) if valid is None else valid
    i = keep.cumsum(0).clamp(min=1)
    gates = {gate: draw(n) for gate in rule.gates}
    th, R0, grads = draw(()), draw(r), draw(n)
    got = unroll(rule, i, gates, valid)
    ones = torch.ones(n, dtype=torch.float64)
    R = R0.clone()
    for t in range(n):
        if keep[t]:
            A, b, u, a = rule.step(i[t], **{gate: x[t] for gate, x in gates.items()})
            R = torch.stack([sum(A[k][l] * R[l] for l in range(r)) - b[k] * grads[t] for k in range(r)])
            theta = a * th + sum(u[k] * R[k] for k in range(r))
            c, d = vector(got.c, ones)[t], [vector(x, ones)[t] for x in got.d]
            closed = c * th + sum(d[k] * R0[k] for k in range(r)) - (got.C[t] * grads).sum()
            torch.testing.assert_close(closed, theta, rtol=1e-11, atol=1e-11)
    for k in range(r):
        closed = sum(got.carry[k][l] * R0[l] for l in range(r)) - (got.write[k] * grads).sum()
        torch.testing.assert_close(closed, R[k], rtol=1e-11, atol=1e-11)
    if got.row is not None:
        torch.testing.assert_close(torch.outer(got.row, got.col).tril(), got.C)


@pytest.mark.parametrize("upper", [None, 0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_segment_products(n, upper):
    """Also where an entry is a number, which it then stays."""
    A = torch.randn(n, 2, 2, dtype=torch.float64)
    A[0] = 0
    entries = [[A[:, k, l] for l in range(2)] for k in range(2)]
    if upper is not None:
        A[:, 1, 0], A[:, 1, 1] = 0, upper
        entries[1] = [0.0, upper]
    ones = A.new_ones(n)
    product, prefix = segment_products(entries, ones)
    assert upper != 1 or (product[1], prefix[1]) == ([0.0, 1.0], [0.0, 1.0])
    product = torch.stack([torch.stack([vector(x, ones.expand(n, n)) for x in row], -1) for row in product], -2)
    prefix = torch.stack([torch.stack([vector(x, ones) for x in row], -1) for row in prefix], -2)
    for t in range(n):
        total = torch.eye(2, dtype=torch.float64)
        for s in range(t, -1, -1):
            torch.testing.assert_close(product[t, s], total)
            total = total @ A[s]
        torch.testing.assert_close(prefix[t], total)


def test_a_rule_must_agree_with_itself():
    with pytest.raises(ValueError, match=r"A with 1 entries.*per register = 2"):
        Rule(lambda i, lr: Step(((1.0,),), (lr,), (1.0,), 1.0), ("lr",), start=(0.0, 0.0), resets=(True, True))
    with pytest.raises(ValueError, match=r"momentum = 0\.9"):
        rules.SGD(averaged=True, momentum=0.9).build()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "PlainSGD"),
        ({"averaged": True}, "AveragedSGD"),
        ({"momentum": 0.5}, "MomentumSGD"),
        ({"momentum": 0.5, "decay": 0.1}, "MomentumSGD"),
        ({"decay": 0.1}, "DecayedSGD"),
    ],
)
def test_sgd_is_the_front_of_four_records(options, name):
    front = rules.SGD(lr=0.3, **options).build()
    record = rules[name](lr=0.3, **{n: x for n, x in options.items() if n != "averaged"}).build()
    gates = {gate: torch.tensor(0.2, dtype=torch.float64) for gate in front.gates}
    i = torch.tensor(2.0, dtype=torch.float64)
    assert (front.gates, front.constants, front.start, front.resets, front.name) == (
        record.gates, record.constants, record.start, record.resets, record.name,
    )  # fmt: skip
    assert front.step(i, **gates) == record.step(i, **gates)


half = torch.full((), 0.5, dtype=torch.float64)
# Written with tensors that no token reaches, the same at every one.
EVEN = {
    "a": lambda i, lr: Step(((1.0,),), (lr,), (1.0,), torch.ones_like(i) * 0.9),
    "a alone": lambda i, lr: Step(((1.0,),), (lr,), (torch.ones_like(i),), torch.zeros_like(i)),
    "u": lambda i, lr: Step(((1.0,),), (lr,), (torch.full_like(lr, 0.5),), 1.0),
    "A": lambda i, lr: Step(((torch.ones(i.shape) * 0.5,),), (lr,), (1.0,), 1.0),
    "A by new": lambda i, lr: Step(((i.new_full(i.shape, 0.9),),), (lr,), (1.0,), 1.0),
    "A expanded": lambda i, lr: Step(((half.expand_as(i),),), (lr,), (1.0,), 1.0),
    "A of a function": lambda i, lr: Step(((torch.exp(-torch.ones_like(i)),),), (lr,), (1.0,), 1.0),
    "A chosen": lambda i, lr: Step(((torch.where(torch.zeros_like(i) > 0, 0.1, 0.9).to(i),),), (lr,), (1.0,), 1.0),
    "A of pieces": lambda i, lr: Step(((torch.stack([torch.ones_like(i), i * 0]).sum(0) * 0.9,),), (lr,), (1.0,), 1.0),
    "b": lambda i, lr: Step(((1.0,),), (torch.full(i.shape, 0.2, dtype=i.dtype) * lr,), (1.0,), 1.0),
    "b without gate": lambda i, lr: Step(((1.0,),), (torch.zeros_like(i) + 0.2,), (1.0,), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", EVEN)
def test_coefficients_that_are_the_same_at_every_token(name, kept):
    rule = Rule(EVEN[name], start=(1.0 if kept else 0.0,), resets=(not kept,))
    torch.manual_seed(0)
    learner = nn.Linear(3, 3).double()
    program = df.derive(learner, rule=rule, chunk=4, prove=False)
    x = (0.5 * torch.randn(3, 2, 9, 2, 3, dtype=torch.float64)).requires_grad_()
    lr, w = torch.rand(2, 9, 2).double().requires_grad_(), torch.randn(2, 9, 2, 3).double()
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] + [True] * 3])
    found = []
    for form in ("auto", "primal"):
        o, state = program(*x, {"lr": lr}, mask=mask, form=form)
        leaves = [x, lr, *learner.parameters()]
        grads = torch.autograd.grad((o * w).sum(), leaves, allow_unused=True, materialize_grads=True)
        found.append([o, *state.tensors().values(), *grads])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def of_place(make):
    return lambda i, lr: Step(((make(i, i.numel()).to(i).reshape(i.shape),),), (lr,), (1.0,), 1.0)


UNEVEN = {
    "arange": of_place(lambda i, n: torch.arange(n)), "linspace": of_place(lambda i, n: torch.linspace(0, 1, n)),
    "cumsum": of_place(lambda i, n: torch.ones(n).cumsum(0)), "eye": of_place(lambda i, n: torch.eye(n)[0]),
    "flip": of_place(lambda i, n: i.reshape(-1).flip(0)), "mean": of_place(lambda i, n: i.mean().expand(n)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEVEN)
def test_coefficients_by_the_place_in_the_batch_are_refused(name):
    with pytest.raises(df.DerivationError, match=r"Write it entry by entry|mixes tokens at"):
        df.derive(nn.Linear(3, 3), rule=Rule(UNEVEN[name]), chunk=4, prove=False)

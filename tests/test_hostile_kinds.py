"""What a search of public learners, weights, objectives and rules found, each with its variants."""

import pytest
import torch
from torch import nn

import dualform as df
from dualform.learning.lookups import _index_put
from dualform.testing import check_forms

D = 4


class Learner(nn.Module):
    """Any function of the tokens, weights and 32-bit places."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        for name, shape in {"W": (D, D), "U": (D, D), "b": (D,)}.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=torch.float64)))
        self.register_buffer("places", torch.tensor([2, 0, 3, 0], dtype=torch.int32))

    def forward(self, x):
        return torch.tanh(self.run(self, x))


def program_of(run):
    torch.manual_seed(0)
    return df.derive(Learner(run), rule=df.rules.SGD(lr=0.2), chunk=3)


def test_places_of_32_bits():
    """Where rows are wide, torch adds them at places of 64 bits only."""
    x, at, rows = torch.zeros(4, 48), torch.tensor([2, 0, 3, 0], dtype=torch.int32), torch.randn(4, 48)
    expected = torch.ops.aten.index_put(x, [at.long()], rows, True)
    assert torch.equal(_index_put(x, [at], rows, True), expected)
    check_forms(program_of(lambda s, x: x @ s.W[s.places] + s.U[(x @ s.W).argmax(-1).int()]), time=5)


def fixed_point(s, x):
    """A step after some that carry no gradient, from zeros: deep equilibrium."""
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(2):
            z = torch.tanh(z @ s.U + x @ s.W + s.b)
    return z @ s.U + x @ s.W + s.b


SHAPED = {
    "fixed point": fixed_point,
    "detached": lambda s, x: x @ s.W + (torch.ones_like(x) @ s.U).detach(),
    "from a state of zeros": lambda s, x: torch.tanh(torch.zeros_like(x) @ s.U + s.b) @ s.U.exp() + x,
}


@pytest.mark.parametrize("run", SHAPED.values(), ids=SHAPED)
def test_tensors_that_have_only_the_shape_of_the_tokens(run):
    check_forms(program_of(run), time=5)


class Halved(torch.autograd.Function):
    """The identity, with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


class Product(torch.autograd.Function):
    """A product and where it is positive, with the gradient of one side halved."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        positive = a * b > 0
        ctx.mark_non_differentiable(positive)
        return a * b, positive

    @staticmethod
    def backward(ctx, g, _):
        a, b = ctx.saved_tensors
        return 0.5 * g * b, g * a


def product(s, x):
    y, positive = Product.apply(x @ s.W, x + s.b)
    return y + positive


FUNCTIONS = {"on tokens": lambda s, x: Halved.apply(x @ s.W) * s.b, "of two": product}


@pytest.mark.parametrize("run", FUNCTIONS.values(), ids=FUNCTIONS)
def test_custom_functions_of_tokens(run):
    check_forms(program_of(run), time=5)


def test_a_closed_over_tensor_is_a_coefficient_as_it_is():
    kept = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    rule = df.Rule(lambda i, lr: df.Step(A=((kept,),), b=(0.1 * lr,), u=(1.0,), a=1.0), resets=(False,))
    program = df.derive(nn.Linear(D, D).double(), rule=rule, chunk=3)
    check_forms(program, time=5)
    x = torch.randn(1, 5, 1, D, dtype=torch.float64)
    assert torch.autograd.grad(program(x, x, x)[0].square().sum(), kept)[0] != 0


def test_a_norm_of_odd_order_is_an_objective():
    """Its gradient is made with pow_, whose twin has another overload's name."""
    program = df.derive(nn.Linear(D, D).double(), lambda p, t: (p - t).norm(p=3, dim=-1), chunk=3)
    check_forms(program, time=5)

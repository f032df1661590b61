"""What fresh users wrote that was refused, though it is right: masks written out, losses of rows, distributions."""

import functools

import numpy as np
import pytest
import torch
from recurrence import by_hand
from torch import distributions as td
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform.shapes import TraceError

D = 4
KEPT = [True, False, True, True]


class Learner(nn.Module):
    def __init__(self, body=lambda h, s: h):
        super().__init__()
        self.W, self.U = (nn.Parameter(0.5 * torch.randn(n, D, dtype=torch.float64)) for n in (D, 6))
        self.body = body

    def forward(self, x):
        return self.body(torch.tanh(x @ self.W) * 1, self)


def expect_the_recurrence(learner, loss):
    program = df.derive(learner, loss, df.rules.SGD(lr=0.1), chunk=3, prove=False)
    x = torch.randn(1, 7, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected, leaves = by_hand(learner, x[0, :, 0], loss=loss), [x, *learner.parameters()]
    slopes = torch.autograd.grad(expected.sin().sum(), leaves, materialize_grads=True)
    for way in ({"backend": "eager"}, {"form": "primal"}):
        o = program(x, x.sin(), x.cos(), **way)[0][0, :, 0]
        torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-11)
        for got, wanted in zip(torch.autograd.grad(o.sin().sum(), leaves, materialize_grads=True), slopes, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def squared(prediction, target):
    return (prediction - target).square().sum(-1) / 2


def zeroed(h, s):
    h[:, KEPT] = 0
    return h + s.U[0]


def scaled(h, s):
    h[:, KEPT] = h[:, KEPT] * s.U[0, :3]
    return h


@pytest.mark.parametrize(
    "body",
    [
        lambda h, s: h[:, KEPT] @ s.U[:3],
        lambda h, s: h[..., np.array(KEPT)] @ s.U[:3],
        lambda h, s: h.unflatten(-1, (2, 2))[:, [[True, False], [True, True]]] @ s.U[:3],
        lambda h, s: h @ s.W[KEPT].T @ s.U[:3],
        zeroed,
        scaled,
    ],
)
def test_masks_that_are_written_out(body):
    expect_the_recurrence(Learner(body), squared)


BYTES = torch.tensor(KEPT, dtype=torch.uint8)


def put(h, index, value):
    h[index] = value
    return h


def rows_of_bytes(h, s):
    mask = (h.sum(-1) > 0).byte()
    return put(h, mask, torch.sin(h[mask] @ s.W))


@pytest.mark.filterwarnings("ignore:.*uint8:UserWarning", "ignore:indexing with dtype torch.uint8:UserWarning")
@pytest.mark.parametrize(
    "body",
    [
        lambda h, s: h[:, BYTES] @ s.U[:3],
        lambda h, s: h[..., BYTES.numpy()] @ s.U[:3],
        lambda h, s: h @ s.W[BYTES].T @ s.U[:3],
        lambda h, s: h * s.W[torch.eye(D, dtype=torch.uint8)],
        lambda h, s: h[:, torch.where(BYTES)[0]] @ s.U[:3],
        lambda h, s: h[:, torch.where(torch.tensor(KEPT))[0]] @ s.U[:3],
        lambda h, s: h[:, BYTES.nonzero()[:, 0]] @ s.U[:3],
        lambda h, s: torch.where((h > 0).byte(), h, s.U[0]),
        lambda h, s: torch.where((h > 0).byte() * 2, h.sin(), h * s.U[1]),
        lambda h, s: torch.where(BYTES, h.sin(), h * s.U[1]),
        lambda h, s: put(h.clone(), (..., BYTES), (h @ s.U[:3].T) * 2),
        rows_of_bytes,
    ],
)
def test_masks_of_bytes(body):
    """As torch reads an index of torch.uint8: as a mask, though it warns."""
    expect_the_recurrence(Learner(body), squared)


def doubled(h, s):
    mask = (h >= h.amax(-1, keepdim=True)).byte()  # one of a row: torch writes a single number as it fills
    return put(h, mask, h[mask] * 2)


@pytest.mark.filterwarnings("ignore:.*uint8:UserWarning")
def test_a_choice_by_bytes_has_the_slopes_of_what_is_chosen():
    x, y = torch.randn(2, 3, D, dtype=torch.float64)
    for mask in ((x > 0).byte() * 2, torch.tensor([0, 2, 1, 255], dtype=torch.uint8)):
        for wrt in (0, 1):
            J = df.jacobian(lambda x, y, mask=mask: torch.where(mask, x * y, y.sin()), x, y, wrt=wrt)
            expected = torch.func.jacrev(lambda x, y, mask=mask: torch.where(mask, x * y, y.sin()), wrt)(x, y)
            torch.testing.assert_close(J.dense(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*uint8:UserWarning", "ignore:indexing with dtype torch.uint8:UserWarning")
@pytest.mark.parametrize(
    "body",
    [
        lambda h, s: put(h, (slice(None), BYTES), 0.5),
        lambda h, s: put(h, (h > 0).byte(), 0.5),
        doubled,
        lambda h, s: h.index_put(((h > 0).byte(),), torch.ones((), dtype=h.dtype)),
        lambda h, s: h.masked_fill(BYTES, 0.5),
        lambda h, s: h.masked_fill_((h > 0).byte(), 0.5),
    ],
)
def test_numbers_under_masks_of_bytes_are_refused_as_torch_refuses_them(body):
    with pytest.raises(RuntimeError, match="masked_fill_ only supports boolean masks"):
        Learner(body)(torch.ones(1, D, dtype=torch.float64))
    with pytest.raises(TraceError, match="masked_fill_ only supports boolean masks"):
        df.derive(Learner(body), squared, chunk=3, prove=False)


LOSSES = {
    "largest": lambda p, v: (p - v).abs().amax(-1),
    "classes at axis 1": lambda p, v: F.cross_entropy(p[..., None], v.argmax(-1, keepdim=True), reduction="none")[
        ..., 0
    ],
    "dim=1": lambda p, v: F.mse_loss(p, v, reduction="none").sum(1),
    "mapped": lambda p, v: torch.vmap(lambda a, b: (a - b) @ (a - b))(p, v),
    "normal": lambda p, v: -td.Normal(p[:, :2], F.softplus(p[:, 2:]) + 0.1).log_prob(v[:, :2]).sum(-1),
    "categorical": lambda p, v: -td.Categorical(logits=p).log_prob(v.argmax(-1)),
    "divergence": lambda p, v: td.kl_divergence(td.Categorical(logits=v), td.Categorical(logits=p)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_rows(name):
    expect_the_recurrence(Learner(), LOSSES[name])


class Learned(nn.Module):
    """A loss with a map of its own, which casts nothing."""

    def __init__(self):
        super().__init__()
        self.t, self.head = nn.Parameter(torch.ones(())), nn.Linear(D, D)
        self.register_buffer("weight", torch.linspace(0.5, 1, D))

    def forward(self, prediction, target):
        return (self.weight * (self.t * self.head(prediction) - target).square()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_a_module_follows_its_layer_to_another_type(dtype):
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", objective=Learned(), rule=("sgd", {"lr": 0.3}), chunk=4)
    x = torch.randn(2, 9, 8)
    expected, before = layer(x)[0], [p.detach().clone() for p in layer.objective.parameters()]
    layer.to(dtype)
    y = layer(x.to(dtype))[0]
    torch.testing.assert_close(y.float(), expected, atol=1e-5 if dtype.itemsize > 2 else 0.05, rtol=1e-4)
    y.sum().backward()
    for p, was in zip(layer.objective.parameters(), before, strict=True):
        assert p.dtype == p.grad.dtype == dtype
        assert p.grad.abs().sum() > 0
        assert torch.equal(p, was.to(dtype))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)])
def test_a_loss_of_another_type_than_the_state_is_the_definition_s(types):
    learner, loss = nn.Linear(D, D).to(types[0]), Learned().to(types[1])
    program, q = df.derive(learner, loss, df.rules.SGD(lr=0.1), chunk=3, prove=False), torch.randn(1, 7, 2, D)
    found = []
    for way in ({"backend": "eager"}, {"form": "primal"}):
        o = program(q, q.sin(), q.cos(), **way)[0]
        found.append((o, *torch.autograd.grad(o.sum(), [*loss.parameters(), *learner.parameters()])))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.05 if torch.bfloat16 in types else 1e-5)


def made():
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", objective=Learned(), rule=("sgd", {"lr": 0.3}), chunk=4)
    return layer.double(), torch.randn(2, 9, 8, dtype=torch.float64)


def slopes(x, **changed):
    layer, _ = made()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(changed.get("times", 1.0))
    found = torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))
    return dict(zip(dict(layer.named_parameters()), found, strict=True))


def value(layer, x):
    return lambda p: torch.func.functional_call(layer, p, (x,))[0].sin().sum()


def expect_same(got, expected):
    for name, wanted in expected.items():
        torch.testing.assert_close(got[name].detach(), wanted, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first jvp of a process
@pytest.mark.parametrize("warm", [False, True])
def test_gradients_of_torch_func_reach_a_loss_s_parameters(warm):
    layer, x = made()
    if warm:
        layer(x)
    given, expected = {n: p.detach() for n, p in layer.named_parameters()}, slopes(x)
    expect_same(torch.func.grad(value(layer, x))(given), expected)
    along = {n: torch.randn_like(p) for n, p in given.items()}
    pushed = torch.func.jvp(value(layer, x), (given,), (along,))[1]
    torch.testing.assert_close(pushed.detach(), sum((along[n] * g).sum() for n, g in expected.items()))


def test_models_side_by_side_each_have_their_own_loss():
    layer, x = made()
    given = {n: torch.stack([p.detach(), 1.1 * p.detach()]) for n, p in layer.named_parameters()}
    found = torch.vmap(torch.func.grad(value(layer, x)))(given)
    for n, times in enumerate((1.0, 1.1)):
        expect_same({name: g[n] for name, g in found.items()}, slopes(x, times=times))
    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    several = torch.vmap(lambda t: value(layer, x)({"objective.t": t}))(t)
    alone = torch.stack([value(layer, x)({"objective.t": t}) for t in t])
    torch.testing.assert_close(several, alone)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, at the first jvp of a process
def test_what_a_loss_closes_over_is_differentiated_by_torch_func():
    torch.manual_seed(0)
    learner, q = nn.Linear(D, D).double(), torch.randn(1, 7, 2, D, dtype=torch.float64)

    def run(t):
        return df.derive(learner, lambda p, v: t * (p - v).square().sum(-1), ("sgd", {"lr": 0.1}), chunk=3)(q, q, q)[
            0
        ].sum()

    t = torch.tensor(1.0, dtype=torch.float64)
    wanted = torch.autograd.grad(run(own := t.clone().requires_grad_()), own)[0]
    torch.testing.assert_close(torch.func.grad(run)(t).detach(), wanted)
    torch.testing.assert_close(torch.func.jvp(run, (t,), (torch.ones_like(t),))[1].detach(), wanted)


class Keeps(Learner):
    """Adds a table that it keeps for so many rows."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.table, self.tables = kept, None, {}

    def forward(self, x):
        return torch.tanh(x @ self.W) + self.kept(self, x)


def table_of(n):
    return torch.linspace(0.1, 0.4, D, dtype=torch.float64).expand(n, D) * 2 + torch.full((n, 1), 0.5)


def grown(s, x):
    if s.table is None or len(s.table) < len(x):
        s.table = table_of(len(x))
    return s.table[: len(x)]


def made_again(s, x):
    if s.table is None or len(s.table) != len(x):
        s.table = table_of(len(x))
    return s.table


def keyed(s, x):
    return s.tables.setdefault(x.shape, table_of(len(x)))


@pytest.mark.parametrize("rows", [None, 1, 3, 5])
@pytest.mark.parametrize("kept", [grown, made_again, keyed])
def test_a_table_that_is_kept_for_some_number_of_rows_is_no_number_of_tokens(kept, rows):
    """One trace makes it, another finds it, as it was left by a run on so many rows."""
    learner = Keeps(kept)
    if rows is not None:
        learner(torch.ones(rows, D, dtype=torch.float64))
    program = df.derive(learner, squared, df.rules.SGD(lr=0.1), chunk=3, prove=False)
    x = torch.randn(1, 7, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves, found = [x, learner.W], []
    for way in ({"backend": "eager"}, {"form": "primal"}):
        o = program(x, x.sin(), x.cos(), **way)[0]
        found.append((o, *torch.autograd.grad(o.sin().sum(), leaves)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    tables = [x for x in (learner.table, *learner.tables.values()) if x is not None]
    for table in tables:
        table.add_(1.0)  # other numbers for so many rows than for others
        with pytest.raises(df.DerivationError, match="reads the number of tokens"):
            program(x, x.sin(), x.cos(), backend="eager")


@functools.cache
def thinner(n):
    return torch.full((n, D), 1.0 / n, dtype=torch.float64)


@pytest.mark.parametrize("at", [lambda s, x: thinner(len(x)), lambda s, x: thinner(len(x)).mean(0)])
def test_a_table_of_other_numbers_for_other_numbers_of_rows_is_refused(at):
    with pytest.raises(df.DerivationError, match="reads the number of tokens"):
        df.derive(Keeps(at), squared, chunk=3, prove=False)

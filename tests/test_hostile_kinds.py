"""What a search of public learners, weights, objectives and rules found, each with its variants."""

import collections
import itertools
import random
import warnings
from array import array
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dualform as df
from dualform.graphs.fingerprint import Fingerprint
from dualform.ops.lookups import index_put
from dualform.ops.spelled import differentiable_twice
from dualform.shapes import ShapeError, TraceError
from dualform.testing import agree, check_forms

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


def program_of(run, kind=None, objective="squared"):
    torch.manual_seed(0)
    return df.derive((kind or Learner)(run), objective, df.rules.SGD(lr=0.2), chunk=3)


def test_places_of_32_bits():
    """Where rows are wide, torch adds them at places of 64 bits only."""
    x, at, rows = torch.zeros(4, 48), torch.tensor([2, 0, 3, 0], dtype=torch.int32), torch.randn(4, 48)
    expected = torch.ops.aten.index_put(x, [at.long()], rows, True)
    assert torch.equal(index_put(x, [at], rows, True), expected)
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


# -- what is run late: in the outer backward ---------------------------------------------------------------------------


class Late(nn.Module):
    """A slow gain that a hook, a checkpoint or a Function's context reads when gradients are taken."""

    slow, dim = ("s",), D

    def __init__(self, way):
        super().__init__()
        self.way = way
        for name, shape in {"W": (D, D), "U": (D, D), "s": (D,)}.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=torch.float64)))

    def forward(self, x):
        return self.way(self, x)


class Gained(torch.autograd.Function):
    """The identity, whose gradient asks a module for its gain."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * ctx.module.s, None


def hooked(s, x):
    h = (x @ s.W).tanh()
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-0.3, 0.3))
        h.register_hook(lambda g: g * s.s * h)
    return (h.square() + h) @ s.U


LATE = {
    "hooks": hooked,
    "checkpoint": lambda s, x: checkpoint(lambda h: (h @ s.W).tanh() * s.s, x, use_reentrant=False) @ s.U,
    "context": lambda s, x: Gained.apply((x @ s.W).tanh(), s) @ s.U,
}


@pytest.mark.parametrize("way", LATE.values(), ids=LATE)
def test_what_runs_late_reads_its_own_heads_weights(way):
    """Heads with slow weights of their own are those heads alone, by the definition and as derived."""
    torch.manual_seed(0)
    learner = Late(way)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=3)
    check_forms(program, time=5)
    q, k, v = (torch.randn(1, 5, 2, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gain = torch.randn(2, D, dtype=torch.float64, requires_grad=True)

    def gradients(o):
        return torch.autograd.grad((o * torch.linspace(-1, 1, D).double()).sum(), (q, k, v, gain))

    for form in ("auto", "primal"):
        both = program(q, k, v, params={"s": gain}, form=form)[0]
        each = [program(*(x[:, :, h : h + 1] for x in (q, k, v)), params={"s": gain[h]}, form=form)[0] for h in (0, 1)]
        for a, b in zip(gradients(both), gradients(torch.cat(each, 2)), strict=True):
            agree("gradient", a, b)


class Reached(nn.Module):
    """Weights that forward reaches by a partial, a default or a tuple, beside their names."""

    dim = D

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.U = (nn.Parameter(0.5 * torch.randn(D, D, dtype=torch.float64)) for _ in range(2))
        w, u = self.W, self.U
        self.run = {
            "partial": lambda: partial(F.linear, weight=w),
            "positional": lambda: partial(torch.matmul, w),
            "default": lambda: lambda x, w=w: x @ w,
            "keyword": lambda: self.keyword(w),
            "tuple": lambda: None,
            "method": lambda: self.method,
        }[way]()
        self.pair = (w, [u]) if way == "tuple" else None

    @staticmethod
    def keyword(given):
        def run(x, *, w=given):
            return x @ w

        return run

    def method(self, x):
        return x @ self.W

    def forward(self, x):
        if self.pair:
            return torch.tanh(x @ self.pair[0]) @ self.pair[1][0]
        made = self.run(x.mT).mT if getattr(self.run, "args", ()) else self.run(x)
        return torch.tanh(made) @ self.U


@pytest.mark.parametrize("way", ["partial", "positional", "default", "keyword", "tuple", "method"])
def test_weights_are_reached_by_any_way(way):
    check_forms(df.derive(Reached(way), rule=df.rules.SGD(lr=0.2), chunk=3), time=5)


# -- values that are known: closed-over tensors and buffers ------------------------------------------------------------


class Tables(Learner):
    def __init__(self, run):
        super().__init__(run)
        self.register_buffer("mask", torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]).bool())
        self.register_buffer("row", torch.tensor([True, False, True, True]))
        self.register_buffer("table", torch.linspace(-1, 1.5, D * D, dtype=torch.float64).reshape(D, D))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("on", torch.tensor(True))
        self.plain = torch.arange(D * D).reshape(D, D) % 3 == 0


def written(w, mask, values):
    w = w.clone()
    w[mask] = values
    return w


KNOWN = {
    "mask": lambda s, x: x @ s.W + s.W[s.mask].sum(),
    "columns": lambda s, x: F.pad(x @ s.W[:, s.row], (0, 1)),
    "columns of tokens": lambda s, x: x[:, s.row] @ s.W[:3],
    "made of masks": lambda s, x: x @ s.W + s.W[~s.mask & s.plain].sum() + s.U[s.table > 0].mean(),
    "masked_select": lambda s, x: x @ s.W * torch.masked_select(s.W, s.mask).mean(),
    "masked_scatter": lambda s, x: x @ s.table.masked_scatter(s.mask, s.W[s.mask]),
    "assigned": lambda s, x: x @ written(written(s.W, s.mask, s.U[s.mask]), s.plain, s.U[s.plain].exp()),
    "item": lambda s, x: x @ s.W * float(s.table[0, 1]) + s.order[0].item(),
    "tolist": lambda s, x: x @ s.W[s.order.tolist()],
    "numpy": lambda s, x: x @ (s.W * torch.from_numpy(s.table.numpy() ** 2)),
    "if": lambda s, x: x @ s.W if s.on else x @ s.U,
    "range": lambda s, x: sum(x @ s.W * k for k in range(int(s.count))),
    "slice": lambda s, x: F.pad(x @ s.W[:, : s.count], (0, 1)),
    "unique": lambda s, x: x @ s.W * len(torch.unique(s.order // 2)),
    "arange": lambda s, x: F.pad(x @ s.W[:, torch.arange(D) % 2 == 0], (0, 2)),
}


@pytest.mark.parametrize("run", KNOWN.values(), ids=KNOWN)
def test_values_of_buffers_are_constants(run):
    torch.manual_seed(0)
    check_forms(df.derive(Tables(run), rule=df.rules.SGD(lr=0.2), chunk=3), time=5)


@pytest.mark.parametrize("name", ["mask", "item", "if", "range", "assigned"])
@pytest.mark.parametrize("replaced", [False, True])
def test_constants_that_change_are_derived_again(name, replaced):
    torch.manual_seed(0)
    learner, x = Tables(KNOWN[name]), torch.randn(1, 5, 1, D, dtype=torch.float64)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=3)
    before = program(x, x, x)[0].detach()
    for own, b in list(learner.named_buffers()):
        other = ~b if b.dtype == torch.bool else b - 1 if b.ndim == 0 else b.flip(0)
        setattr(learner, own, other) if replaced else b.copy_(other)
    learner.plain = ~learner.plain
    after = program(x, x, x)[0]
    agree("o", after, program(x, x, x, form="primal")[0])
    assert float((before - after).detach().abs().max()) > 1e-3


def test_other_values_of_a_constant_are_refused():
    torch.manual_seed(0)
    program, x = program_of(KNOWN["mask"], Tables), torch.randn(1, 5, 1, D, dtype=torch.float64)
    program(x, x, x, params={"mask": program.learner.mask.clone()})
    with pytest.raises(ShapeError, match=r"params\['mask'\] has other values than the learner's own buffer"):
        program(x, x, x, params={"mask": ~program.learner.mask})


def test_constants_on_a_card_are_compared_once(monkeypatch):
    """To look is to wait for the card, and under a capture nobody may: a buffer is looked at again when it is written."""
    from dualform.learning import standing

    torch.manual_seed(0)
    program, x = program_of(KNOWN["mask"], Tables), torch.randn(1, 5, 1, D, dtype=torch.float64)
    looks, equal, own = [], torch.equal, program.learner.mask
    program(x, x, x)  # traces, which compares too
    monkeypatch.setattr(torch, "equal", lambda *args: looks.append(1) or equal(*args))

    def run(mask):
        before = len(looks)
        program(x, x, x, params={"mask": mask})
        return len(looks) - before

    given = own.clone()
    assert [run(given), run(given)] == [1, 1]  # on the CPU, whose numbers numpy may write uncounted, each time
    monkeypatch.setattr(standing, "last_written", lambda x: (x.data_ptr(), x._version))  # as on a card
    assert [run(given), run(given), run(given.view(D, D)), run(given)] == [1, 0, 1, 1]
    monkeypatch.setattr(standing, "is_known", lambda x: False)  # as under a capture
    assert run(given) == 0
    with pytest.raises(ShapeError, match=r"params\['mask'\] has other values"):
        run(own.clone())
    monkeypatch.setattr(standing, "is_known", lambda x: True)
    assert run(given) == 0
    given.logical_not_()
    for wrong in (given, given, ~own):  # refused once and again
        with pytest.raises(ShapeError, match=r"params\['mask'\] has other values"):
            run(wrong)
    given.copy_(own)
    assert [run(given), run(given)] == [1, 0]
    program.learner.mask = ~own  # which derives again
    with pytest.raises(ShapeError, match=r"params\['mask'\] has other values"):
        run(given)
    assert run(~own) == 1


UNKNOWN = {
    "random": lambda s, x: x @ s.W + s.W[torch.rand(D, D) > 0.5].sum(),
    "weights": lambda s, x: x @ s.W + s.W[s.W > 0].sum(),
    "tokens": lambda s, x: x @ s.W if x.sum() > 0 else x,
    "written": lambda s, x: (m := s.mask.clone()).copy_(s.W > 0) is m and x @ s.W + s.W[m].sum(),
    "written by a view": lambda s, x: (m := s.mask.clone())[0].copy_(s.W[0] > 0) is None or x @ s.W + s.W[m].sum(),
}


@pytest.mark.parametrize("run", UNKNOWN.values(), ids=UNKNOWN)
def test_values_that_are_no_constants_are_refused(run):
    with pytest.raises(TraceError, match=r"reads a tensor's values.*graph that is the same for all values"):
        program_of(run, Tables)


def rows(x):
    return torch.arange(x.shape[0])


PLACES = {
    "prod": lambda s, x: x @ torch.ones_like(s.W).scatter_reduce(0, s.order.expand(D, D) // 2, s.W + 2, "prod"),
    "prod of tokens": lambda s, x: torch.full_like(x, 3.0).scatter_reduce(
        1, (s.order // 2).expand_as(x), x @ s.W + 2, "prod", include_self=False
    ),
    "amax": lambda s, x: torch.ones_like(x).scatter_reduce(
        1, (s.order // 2).expand_as(x), x @ s.W + 2, "amax", include_self=False
    ),
    "amin": lambda s, x: x @ torch.ones_like(s.W).scatter_reduce(0, s.order.expand(D, D) // 2, s.W + 2, "amin"),
    "index_reduce": lambda s, x: x @ s.W.index_reduce(0, torch.tensor([0, 2]), s.U[:2], "mean"),
    "accumulated": lambda s, x: torch.zeros_like(x).index_put(
        (rows(x)[:, None], (x @ s.W).argsort(-1) // 2), x @ s.U, accumulate=True
    ),
    "written": lambda s, x: written(x @ s.W, (rows(x), x.argmax(-1)), x @ s.b),
    "gated": lambda s, x: (lambda v, i: torch.zeros_like(x).index_put((rows(x)[:, None], i), v.softmax(-1)) @ s.U)(
        *(x @ s.W).topk(2, -1)
    ),
    "read": lambda s, x: (x @ s.W)[rows(x)[:, None], (x @ s.W).topk(2, -1).indices] @ s.U[:2],
    "lstsq": lambda s, x: x @ torch.linalg.lstsq(s.W + 2 * torch.eye(D, dtype=x.dtype), s.table).solution,
    "lstsq, tall": lambda s, x: x @ torch.linalg.lstsq(
        torch.cat([s.W, s.U]) + torch.eye(8, 4, dtype=x.dtype), torch.cat([s.table, s.table + 1])
    ).solution,
    "gaussian_nll": lambda s, x: F.gaussian_nll_loss(x @ s.W, x, (x @ s.U).exp(), full=True, reduction="none"),
    "instance_norm": lambda s, x: F.instance_norm((x @ s.W)[:, None], weight=s.b[:1], bias=s.b[1:2])[:, 0],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("run", PLACES.values(), ids=PLACES)
def test_functions_that_were_refused(run):
    torch.manual_seed(0)
    check_forms(df.derive(Tables(run), rule=df.rules.SGD(lr=0.2), chunk=3), time=5)


def test_a_gaussian_loss_is_an_objective_and_a_negative_variance_no_number():
    check_forms(program_of(lambda s, x: x @ s.W, Tables, lambda p, t: F.gaussian_nll_loss(p, t, p.exp(), reduction="none").sum(-1)), time=5)  # fmt: skip
    program = program_of(lambda s, x: x @ s.W, Tables, lambda p, t: F.gaussian_nll_loss(p, t, t, reduction="none").sum(-1))  # fmt: skip
    x = torch.randn(1, 4, 1, D, dtype=torch.float64)
    assert bool(program(x, x, -x.abs())[0].isnan().any())


def test_the_third_derivative_of_an_instance_norm():
    """torch's own is wrong: the definition spells it out."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def third(f):
        found = f(x).square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad((found * found.detach().cos()).sum(), x, create_graph=True)
            found = g.pow(2)
        return g

    def spelled(x):
        apart = x - x.mean(-1, keepdim=True)
        return apart * (apart.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    with differentiable_twice():
        agree("third", third(lambda x: F.instance_norm(x) + x.sin()), third(lambda x: spelled(x) + x.sin()))


# -- complex constants
# --------------------------------------------------------------------------------------------------


def turned(x, by):
    return torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2, 2)) * by).flatten(1)


def recurrent(s, x):
    """A linear recurrent unit inside a token, from a state of complex zeros."""
    pole, into = torch.exp(-s.b[:2].exp() + 1j * s.b[2:].exp()), torch.complex(s.W[:2, 0], s.W[:2, 1])
    h, found = torch.zeros(x.shape[0], 2, dtype=torch.complex128), []
    for k in range(D):
        h = pole * h + into * x[:, k : k + 1]
        found.append((h * into).sum(-1).real)
    return torch.stack(found, -1) @ s.U


COMPLEX = {
    "recurrent": recurrent,
    "buffer": lambda s, x: turned(x @ s.W, torch.polar(s.table[0, :2], s.table[1, :2])),
    "ones": lambda s, x: turned(x @ s.W, torch.ones(2, dtype=torch.complex128)),
    "ones as pairs": lambda s, x: x @ s.W + torch.view_as_real(torch.ones(2, dtype=torch.complex128)).flatten(),
    "number": lambda s, x: turned(x @ s.W, torch.full((2,), 1 + 2j, dtype=torch.complex128)),
    "linspace": lambda s, x: turned(x @ s.W, torch.linspace(0, 1j, 2, dtype=torch.complex128)),
    "like": lambda s, x: turned(x @ s.W, torch.full_like(torch.view_as_complex(s.W.reshape(4, 2, 2))[0], 1 - 1j)),
    "eye": lambda s, x: torch.view_as_real(
        torch.view_as_complex((x @ s.W).reshape(-1, 2, 2)) @ torch.eye(2, dtype=torch.complex128)
    ).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("run", COMPLEX.values(), ids=COMPLEX)
def test_complex_constants(run):
    torch.manual_seed(0)
    check_forms(df.derive(Tables(run), rule=df.rules.SGD(lr=0.2), chunk=3), time=5)


# -- what cannot be read, and what is where
# -----------------------------------------------------------------------------


def changed(box):
    kind = type(box)
    if hasattr(box, "random"):
        box.random()
    elif kind in (bytearray, array):
        box[0] = 7
    elif hasattr(box, "append"):
        box.append(3)
    elif hasattr(box, "__setitem__"):
        box["z"] = 7
    else:
        next(box)


BOXES = {
    "Random": lambda: random.Random(0), "bytearray": lambda: bytearray(b"ab"), "count": lambda: itertools.count(3),
    "Generator": lambda: numpy.random.default_rng(0), "UserDict": lambda: collections.UserDict(a=1),
    "deque": lambda: collections.deque([1]),
    "UserList": lambda: collections.UserList([1]), "array": lambda: array("d", [1.0]),
    "defaultdict": lambda: collections.defaultdict(list, {1: [2]}),
    "ChainMap": lambda: collections.ChainMap({1: 2}), "iterator": lambda: iter([1, 2]),
    "cycle": lambda: itertools.cycle([1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("make", BOXES.values(), ids=BOXES)
def test_objects_of_the_library_are_read(make):
    box = make()
    reading = Fingerprint(nn.Identity(), [box], watch=True)
    assert reading.key is not None
    assert reading.key == Fingerprint(nn.Identity(), [make()]).key
    assert reading.holds()
    assert reading.holds()
    changed(box)
    assert not reading.holds()
    assert reading.key != Fingerprint(nn.Identity(), [box]).key


def test_what_cannot_be_read_is_said_once_by_name():
    learner = nn.Linear(D, D).double()
    learner.box = (n for n in range(3))
    with pytest.warns(UserWarning, match=r"builtins.generator, whose state cannot be read; they are traced again"):
        program = df.derive(learner, chunk=3)
    x = torch.randn(1, 3, 1, D, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree("o", program(x, x, x)[0], program(x, x, x, form="primal")[0])


def test_a_change_of_the_default_dtype_is_seen():
    program, x = program_of(lambda s, x: x @ s.W + torch.ones(D) / 3), torch.randn(1, 3, 1, D, dtype=torch.float64)
    program(x, x, x)
    try:
        torch.set_default_dtype(torch.float64)
        agree("o", program(x, x, x)[0], program(x, x, x, form="primal")[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_border_names_what_is_wrong():
    learner = nn.Linear(D, D).double()
    program, x = df.derive(learner, chunk=3), torch.randn(1, 5, 1, D, dtype=torch.float64)
    state, away = program(x, x, x)[1], x.to("meta")
    for call, message in (
        (lambda: program(x, x, x, mask=torch.ones(1, 5, dtype=torch.bool, device="meta")), r"mask is on meta; expected q's device = cpu"),
        (lambda: program(x, x, away), r"v is on meta; expected q's device = cpu"),
        (lambda: program(x, x, x, {"lr": x[..., 0].to("meta")}), r"gates\['lr'\] is on meta"),
        (lambda: program(away, away, away, state=state), r"state's anchor.weight is on cpu; "
        r"expected q's device = meta"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=message):
            call()
    with pytest.raises(df.DerivationError, match="derive: the learner is a program"):
        df.derive(program)
    with pytest.raises(ValueError, match=r"inductor: blocks is 0; expected a number of mini-batches >= 1"):
        program(x, x, x, backend=df.backends.inductor(blocks=0))
    with pytest.raises(TraceError, match=r"`Dropout\(p=0.5, inplace=False\)   \(dropout.py:\d+\)` is random"):
        df.derive(nn.Sequential(nn.Linear(D, D), nn.Dropout()), chunk=3)


def test_learners_and_calls_of_inference_mode():
    with torch.inference_mode():
        learner = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double()
    program, x = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3), torch.randn(1, 5, 1, D, dtype=torch.float64)
    agree("o", program(x, x, x)[0], program(x, x, x, form="primal")[0])
    with torch.inference_mode():
        y = x.clone()
        agree("o", program(y, y, y)[0], program(y, y, y, form="primal")[0])
        assert not program(y, y, y, form="primal")[0].requires_grad


class _Called(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.w, self.f = nn.Parameter(torch.eye(4)), f

    def forward(self, x):
        return self.f(x, self.w)


def test_tiles_of_as_many_rows_as_tokens():
    rows = _Called(lambda x, w: x @ w + torch.tile(w[0], (x.shape[0], 1)))
    alone = _Called(lambda x, w: x @ w + w[0])
    x = torch.randn(1, 9, 2, 4)
    found, want = (df.derive(learner, chunk=4, prove=False)(x, x, x)[0] for learner in (rows, alone))
    torch.testing.assert_close(found, want)


def test_bags_that_offsets_part_are_rows():
    def bags(x, w):
        return nn.functional.embedding_bag((x > 0).long().flatten(), w, torch.arange(0, x.numel(), 4))

    x = torch.randn(1, 9, 2, 4)
    apart, rows = (
        _Called(f) for f in (lambda x, w: x @ w + bags(x, w), lambda x, w: x @ w + w[(x > 0).long()].mean(1))
    )
    found, want = (df.derive(learner, chunk=4, prove=False)(x, x, x)[0] for learner in (apart, rows))
    torch.testing.assert_close(found, want)


def test_a_learner_that_picks_and_weighs_has_finite_gradients():
    def f(x, w):
        h = x @ w
        h[h < 0] = torch.sqrt(-h[h < 0]) * w.sum()
        return h

    x, learner = torch.randn(1, 9, 2, 4), _Called(f)
    o, _ = df.derive(learner, chunk=4, prove=False, rule=("sgd", {"lr": 0.01}))(x, x, x)
    (g,) = torch.autograd.grad(o.sum(), learner.w)
    assert torch.cat([o.flatten(), g.flatten()]).isfinite().all()


CIRCLES = {
    "both ways": lambda s, x: F.pad((x @ s.W)[:, None], (1, 2), mode="circular")[:, 0, 1:5],
    "cut": lambda s, x: F.pad((x @ s.W)[:, None], (-1, 1), mode="circular")[:, 0],
    "two axes": lambda s, x: F.pad((x @ s.W).view(-1, 1, 2, 2), (1, 0, 2, 1), mode="circular").flatten(1)[:, :D] + x,
    "a convolution": lambda s, x: F.conv1d(F.pad(x[:, None], (1, 1), mode="circular"), s.W[:1, None, :3])[:, 0],
}


@pytest.mark.parametrize("run", CIRCLES.values(), ids=CIRCLES)
def test_circular_pads_are_slices(run):
    check_forms(program_of(run), time=5)
    torch.manual_seed(1)
    x = torch.randn(1, 1, 1, D, dtype=torch.float64)  # against the module itself: before anything was learnt
    program = program_of(run)
    state = program.initial_state(1, 1)
    o, _ = program(x, x, x, {"lr": torch.zeros(1, 1, 1, dtype=torch.float64)}, state=state)
    agree("output", o[0, 0], program.learner(x[0, 0]))

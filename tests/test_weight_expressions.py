"""Weights that are made of parameters, in every way that people make them: right in outputs, state and outer gradients.

Several expressions share one program, each with parameters of its own, so that all of them are tried in little time.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import dualform as df
from dualform.ops import lookups
from dualform.testing import check_forms, check_static

D = 4


class Weight(nn.Module):
    """x @ w(parameters), or any function of the tokens and the parameters."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        for name, shape in {"W": (D, D), "A": (D, 2), "B": (2, D), "v": (D,), "s": ()}.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=torch.float64)))
        self.register_buffer("mask", torch.rand(D, D) > 0.5)
        self.register_buffer("count", torch.tensor([0, 1, 2, 3]))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x):
        return self.make(self, x) if self.make.__code__.co_argcount == 2 else x @ self.make(self)


class Sum(nn.Module):
    """Several learners, added."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def program_of(parts, chunk=3, **rule):
    return df.derive(Sum(parts).double(), rule=df.rules.SGD(**({"lr": 0.2} | rule)), chunk=chunk)


def grouped(cases, size):
    names = list(cases)
    return [pytest.param(names[n : n + size], id="+".join(names[n : n + size])) for n in range(0, len(names), size)]


def eye(**options):
    return torch.eye(D, dtype=torch.float64, **options)


def skew(w):
    return w - w.T


def butterfly(s):
    """Two stages of 2 x 2 rotations."""
    c, z = torch.cos(s.v), torch.sin(s.v)
    first = torch.block_diag(*[torch.stack([torch.stack([c[k], -z[k]]), torch.stack([z[k], c[k]])]) for k in (0, 1)])
    second = torch.block_diag(*[torch.stack([torch.stack([c[k], -z[k]]), torch.stack([z[k], c[k]])]) for k in (2, 3)])
    return first @ second[s.order][:, s.order]


def monarch(s):
    left, right = s.W.reshape(2, 2, 4)[..., :2], s.W.reshape(2, 2, 4)[..., 2:]
    return torch.einsum("kij,jkl->ikjl", left, right).reshape(D, D)


def ternary(s):
    """BitLinear: rounded to -1, 0, 1 with the derivative of the identity."""
    scale = s.W.abs().mean().clamp(min=1e-5)
    rounded = (s.W / scale).round().clamp(-1, 1) * scale
    return s.W + (rounded - s.W).detach()


def pruned(s):
    """The largest half of the weights."""
    kept = s.W.abs().flatten().topk(8).indices
    return s.W * torch.zeros(16, dtype=s.W.dtype).scatter(0, kept, 1.0).reshape(D, D)


def power_iteration(s):
    u = torch.ones(D, dtype=s.W.dtype)
    for _ in range(3):
        u = F.normalize(s.W.T @ (s.W @ u), dim=0)
    return s.W / (s.W @ u).norm()


# Numbers, masks and offsets beside products: each was dropped, or the call failed.
OFFSETS = {
    "product plus number": lambda s: s.A @ s.B + 1,
    "number minus product": lambda s: 1 - s.A @ s.B,
    "shift with alpha": lambda s: torch.add(s.A @ s.B, 0.5, alpha=3),
    "rsub": lambda s: torch.rsub(s.A @ s.B, 2.0),
    "gram plus ridge": lambda s: s.W @ s.W.T + 1e-3,
    "gram plus eye": lambda s: s.W @ s.W.T + 0.1 * torch.eye(D),
    "shift, transposed": lambda s: (s.A @ s.B + 1).T,
    "product of shifted": lambda s: (s.A + 1) @ (s.B - 1),
    "mean of a shift": lambda s: s.W - (s.A @ s.B + 1).mean(0),
    "padded with a number": lambda s: F.pad(s.A @ s.B[:, :3], (0, 1), value=0.5),
    "stacked with ones": lambda s: torch.cat([s.A @ s.B[:, :3], torch.ones(D, 1, dtype=s.A.dtype)], 1),
    "bool buffer": lambda s: (s.A @ s.B) * s.mask,
    "int buffer": lambda s: (s.A @ s.B) * s.count,
    "int constant": lambda s: (s.A @ s.B) * torch.tensor([0, 1, 2, 3]),
    "magnitude mask": lambda s: s.W * (s.W.abs() > 0.3),
    "where on signs": lambda s: torch.where(s.W > 0, s.W, 0.1 * s.W),
    "masked fill": lambda s: (s.A @ s.B).masked_fill(s.mask, 0.5),
    "assigned entries": lambda s: _assigned(s.A @ s.B),
    "gate by a sign": lambda s, x: (x @ s.W) * (s.v > 0),
    "gate by a buffer": lambda s, x: (x @ s.W) * s.count,
    "shifted token weights": lambda s, x: (x @ s.A + 1) @ s.B + 1,
    "cross of numbers": lambda s, x: F.linear(x, s.A @ s.B + 1, s.v),
}


def _assigned(w):
    w = w.clone()
    w[0] = 1
    w[:, 1] = 0.5 * w[:, 2]
    return w


# Weights that are no affine function of parameters, with and without a bias.
CURVED = {
    "tanh, bias": lambda s, x: F.linear(x, torch.tanh(s.W), s.v),
    "softmax, bias": lambda s, x: F.linear(x, s.W.softmax(-1), s.v),
    "addmm": lambda s, x: torch.addmm(s.v, x, s.W.exp()),
    "DoRA": lambda s: s.v.abs() * (s.W + s.A @ s.B) / (s.W + s.A @ s.B).norm(dim=0),
    "LoRA": lambda s: s.W + 2.0 * (s.A @ s.B),
    "low rank plus diagonal": lambda s: s.A @ s.B + s.v.diag(),
    "Cayley": lambda s: torch.linalg.solve(eye() + skew(s.W), eye() - skew(s.W)),
    "butterfly": butterfly,
    "Monarch": monarch,
    "circulant": lambda s: torch.stack([s.v.roll(k) for k in range(D)]),
    "circulant by Fourier": lambda s, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(s.v), n=D),
    "Toeplitz": lambda s: torch.cat([s.v, s.W[0]])[torch.arange(D)[:, None] - torch.arange(D) + 3],
    "permuted rows": lambda s: s.W[s.order],
    "index add": lambda s: s.W.index_add(0, s.order, s.A @ s.B),
    "shared entries": lambda s: s.v[s.order[:, None] * s.order % 4],
    "Sinkhorn": lambda s: (lambda p: p / p.sum(1, keepdim=True))(s.W.exp() / s.W.exp().sum(0)),
    "complex phases": lambda s: torch.view_as_real(torch.polar(s.W[:, :2].exp(), s.W[:, 2:])).flatten(1),
    "power iteration": power_iteration,
    "Cholesky": lambda s: torch.linalg.cholesky(s.W @ s.W.T + eye()),
    "detached scale": lambda s: s.W / s.W.norm().detach(),
}  # fmt: skip

# Ops with several results, positions among weights, and what rounds.
SEVERAL = {
    "qr": lambda s: torch.linalg.qr(s.W + 2 * eye())[0],
    "svd": lambda s: torch.linalg.svd(s.W).S.diag(),
    "eigh": lambda s: (lambda e, q: (q * e.abs()) @ q.T)(*torch.linalg.eigh(s.W + s.W.T)),
    "slogdet": lambda s: s.W * torch.linalg.slogdet(s.W)[1],
    "var_mean": lambda s: (lambda var, mean: (s.W - mean) / var.sqrt())(*torch.var_mean(s.W, 1, keepdim=True)),
    "aminmax": lambda s: (lambda low, high: (s.W - low) / (high - low))(*torch.aminmax(s.W, dim=0)),
    "topk values": lambda s: s.W.topk(4, 0)[0],
    "topk positions": lambda s: s.W.gather(0, s.W.abs().topk(4, 0).indices),
    "sorted": lambda s: s.W.sort(0)[0] + s.W.sort(1).indices * s.W,
    "largest and where": lambda s: (lambda best, where: s.W - best + where * s.W)(*s.W.max(0)),
    "median": lambda s: s.W - s.W.median(0).values,
    "split": lambda s: torch.cat(s.W.chunk(2, 0)[::-1]) * torch.cat(s.W.split(2, 1)[::-1], 1),
    "pruned": pruned,
    "ternary": ternary,
    "fake quantised": lambda s: torch.fake_quantize_per_tensor_affine(s.W, 0.1, 0, -8, 7),
    "fake quantised channels": lambda s: torch.fake_quantize_per_channel_affine(
        s.W, torch.tensor([0.1, 0.2, 0.1, 0.3]), torch.zeros(4, dtype=torch.int32), 0, -8, 7
    ),
    "single precision": lambda s: s.W.float().to(s.W.dtype),
    "double gain": lambda s, x: ((x @ s.W).double() * s.v.double()).to(x.dtype),
    "half bias": lambda s, x: x @ s.W + s.v.half(),
    "promoted constant": lambda s: s.W + torch.ones(D, D, dtype=torch.float32),
    "autocast off": lambda s, x: _autocast_off(s, x),
}


def _autocast_off(s, x):
    with torch.autocast("cpu", enabled=False):
        return torch.tanh(x @ s.W)


EXPRESSIONS = OFFSETS | CURVED | SEVERAL


@pytest.mark.parametrize("names", grouped(EXPRESSIONS, 6))
def test_a_program_is_primal(names):
    torch.manual_seed(len(names[0]))
    check_forms(program_of([Weight(EXPRESSIONS[n]) for n in names]), time=7)


def test_at_rate_0_a_program_is_the_learner():
    torch.manual_seed(0)
    names = (
        "product plus number",
        "number minus product",
        "gram plus ridge",
        "bool buffer",
        "int constant",
        "magnitude mask",
        "gate by a sign",
    )
    program = program_of([Weight(OFFSETS[n]) for n in names])
    check_static(program, program.learner, heads=1, time=5)


def test_the_dual_form_keeps_offsets():
    """Re-associated everywhere: (x A) B + sum of x, once for each number."""
    names = [
        "product plus number",
        "number minus product",
        "gram plus ridge",
        "shift, transposed",
        "product of shifted",
    ]
    torch.manual_seed(0)
    program = program_of([Weight(OFFSETS[n]) for n in names])
    assert {c.form for c in program.sites} == {"scores"}
    check_forms(program, ("dual",), time=7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.orthogonal(nn.Linear(D, D)),
        lambda: parametrizations.orthogonal(nn.Linear(D, D, bias=False), orthogonal_map="cayley"),
        lambda: parametrizations.spectral_norm(nn.Linear(D, D)).eval(),
    ],
    ids=["orthogonal", "cayley", "spectral_norm"],
)
def test_parametrizations(make):
    torch.manual_seed(0)
    check_forms(df.derive(make().double(), rule=df.rules.SGD(lr=0.2), chunk=3), time=7)


def test_weight_norm_is_its_formula():
    """Against the formula: torch's own second derivative of _weight_norm is wrong (2.13)."""
    torch.manual_seed(0)
    given, written = Weight(lambda s: torch._weight_norm(s.W, s.A[:, :1], 0)), Weight(
        lambda s: s.W * (s.A[:, :1] / s.W.norm(dim=1, keepdim=True))
    )  # fmt: skip
    written.load_state_dict(given.state_dict())
    from dualform.testing.programs import draw, outcome, same_outcome

    problems = [draw(program_of([x]), time=7) for x in (given, written)]
    got, expected = (outcome(p, lambda p=p, f=f: p.run(f)) for p, f in zip(problems, ("auto", "primal"), strict=True))
    same_outcome(got, expected)


def test_batch_norm_in_evaluation():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(D)
    norm(torch.randn(20, D))
    learner = nn.Sequential(nn.Linear(D, D), norm, nn.Tanh(), nn.BatchNorm1d(D, affine=False)).eval()
    check_forms(df.derive(learner.double(), rule=df.rules.SGD(lr=0.2), chunk=3), time=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_inside(dtype):
    """The same casts as the learner's: results differ by no more than that type rounds, most not at all."""
    torch.manual_seed(0)
    learner = Weight(lambda s, x: (x.to(dtype) @ s.W.to(dtype)).to(x.dtype))
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=3)
    q, k, v = (torch.randn(2, 7, 2, D, dtype=torch.float64) for _ in range(3))
    (got, state), (expected, after) = (program(q, k, v, form=form) for form in ("auto", "primal"))
    for x, y in ((got, expected), (state.anchor["W"], after.anchor["W"])):
        assert (x - y).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max()
        assert dtype == torch.float32 or (x == y).double().mean() > 0.9  # sums of two roundings seldom fall apart


def test_autocast_inside():
    """In single precision, where autocast casts: as primal, which runs the module under it."""

    def forward(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.einsum("...k,kv->...v", x, s.W)
            with torch.autocast("cpu", enabled=False):
                h = h.float() @ s.W
            return F.layer_norm(h, (D,)).float() + F.linear(h, s.W, s.v).float()

    torch.manual_seed(0)
    program = df.derive(Weight(forward).float(), rule=df.rules.SGD(lr=0.02), chunk=3)
    q, k, v = (0.5 * torch.randn(2, 7, 2, D) for _ in range(3))
    got, expected = (program(q, k, v, form=form)[0] for form in ("auto", "primal"))
    assert (got - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    plain = df.derive(Weight(lambda s, x: x @ s.W).float(), chunk=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own does not reach a learner
        inside = plain(q, k, v)[0]
    assert torch.equal(inside, plain(q, k, v)[0])


# The rows of docs/learners_refused.md that are not about tokens (tests/test_token_places.py has those), by words of
# theirs.
REFUSED = {
    "a complex parameter that learns": (
        lambda: _complex(),
        r"'W' is torch.complex(64|128); expected real floating numbers.*torch.view_as_real",
    ),
    "`linalg.ldl_solve`": (
        lambda: Weight(lambda s: torch.linalg.ldl_solve(*torch.linalg.ldl_factor(s.W.detach()), s.A @ s.B)),
        "uses linalg_ldl_solve at .*ldl_solve.*cannot map over rows",
    ),
    '`form="dual"` where weights are cast': (
        lambda: Weight(lambda s: s.W.float().to(s.W.dtype)),
        "form='dual' does not exist at .*the weights pass through _?to",
    ),
}


def _complex():
    class Learner(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(D, D, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(self.W.dtype) @ self.W).real

    return Learner()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_derived_is_refused(name):
    make, reason = REFUSED[name]
    assert name in (Path(__file__).parents[1] / "docs" / "learners_refused.md").read_text()

    def planned():
        return df.derive(make(), chunk=3).plan(D, torch.float64, "dual" if "dual" in name else "auto")

    with pytest.raises(ValueError, match=reason):
        planned()


def test_reads_and_writes_at_places_are_torch_s():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)

    def places(n, *shape):
        return torch.randint(-n, n, shape, generator=g)

    for index in (
        [places(3, 2)], [None, places(4, 2, 3)], [places(3, 2), places(4, 2)], [places(3, 2, 1), None, places(5, 6)],
        [None, places(4, 2, 1), places(5, 3)], [None, None, places(5)], [places(3, 2), places(4, 1), places(5, 2)],
    ):  # fmt: skip
        found = torch.ops.aten.index(x, index)
        assert torch.equal(lookups.index(x, index), found)
        for values in (torch.randn(found.shape, generator=g, dtype=x.dtype), found[..., :1], found.new_tensor(math.pi)):
            args = (x, index, values, True)
            torch.testing.assert_close(lookups.index_put(*args), torch.ops.aten.index_put(*args))
        assert torch.equal(
            lookups.index_put(x, index, x.new_tensor(2.0)), torch.ops.aten.index_put(x, index, x.new_tensor(2.0))
        )

"""What a mask picks, rows that Python repeats, factors that solve and bags: derived, and equal to the recurrence by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from recurrence import by_hand
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform.graphs.trace import TraceError, trace
from dualform.learning.sites import kept_apart
from dualform.ops import spelled

D = 4


class Twice(torch.autograd.Function):
    """A square whose gradient is its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] * g


class Part(nn.Module):
    def __init__(self, body):
        super().__init__()
        for name, shape in {"W": (D, D), "b": (D,), "U": (5, D)}.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=torch.float64)))
        self.net = nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, D)).double()
        self.register_buffer("table", torch.linspace(-1, 1, D, dtype=torch.float64))
        self.body = body

    def forward(self, x):
        h = torch.tanh(x @ self.W) * 1
        made = self.body(h, self)
        return h if made is None else made


class Parts(nn.Module):
    def __init__(self, bodies):
        super().__init__()
        self.parts = nn.ModuleList(map(Part, bodies))

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def expect_the_recurrence(learner, plain=None):
    """plain: a learner that is the same, where torch cannot differentiate the first twice."""
    plain = plain or learner
    plain.load_state_dict(learner.state_dict())
    program = df.derive(learner, rule=df.rules.SGD(lr=0.05), chunk=3, prove=False)
    x = torch.randn(1, 7, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for made, o in (
        (learner, program(x, x.sin(), x.cos(), backend="eager")[0][0, :, 0]),
        (learner, program(x, x.sin(), x.cos(), form="primal")[0][0, :, 0]),
        (plain, by_hand(plain, x[0, :, 0], 0.05, 3)),
    ):
        found.append((o, *torch.autograd.grad(o.sin().sum(), [x, *made.parameters()], materialize_grads=True)))
    for other in found[1:]:
        for got, expected in zip(found[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def grouped(cases, size=5):
    names = list(cases)
    return [pytest.param(names[n : n + size], id="+".join(names[n : n + size])) for n in range(0, len(names), size)]


def entries(read, write=lambda h: h < 0):
    """h[write] = h[read] b."""

    def body(h, s):
        h[write(h)] = h[read(h)] * s.b[0]

    return body


def rows(of, mask=lambda h: h[:, 0] < 0):
    def body(h, s):
        m = mask(h)
        h[m] = of(h[m], s)

    return body


def written(write):
    def body(h, s):
        write(h, h[:, 0] < 0, s)

    return body


def turned(write):
    """Rows at the last axis."""

    def body(h, s):
        g = h.T.contiguous()
        write(g, g[0] < 0, s)
        return g.T

    return body


def experts(h, s):
    out, which = torch.zeros_like(h), (h @ s.W).argmax(-1)
    for k in range(D):
        out[which == k] = torch.tanh(h[which == k] @ s.W * s.U[k])
    return out


def two_experts(h, s):
    m, out = h[:, 0] < 0, torch.zeros_like(h)
    out[m], out[~m] = F.linear(h[m], s.W, s.b), s.net(h[~m])
    return out


def in_what_was_picked(h, s):
    m = h < 0
    p = h[m]
    q = p < -0.3
    p[q] = p[q] * s.b[0]
    h[m] = p


def in_rows(h, s):
    m = h[:, 0] < 0
    p = h[m]
    p[p > 0.2] *= s.b[0]
    p[:, 0] = 0
    h[m] = p


def pieces(h, s):
    g = h.view(-1, 2, 2)
    m = g[:, :, 0] < 0
    g[m] = torch.cat([g[m].softmax(-1)[:, :1] * s.b[0], g[m].flip(-1)[:, 1:]], -1)
    return g.view(-1, D)


PICKED = {
    "not of not": entries(lambda h: h < 0, lambda h: ~~(h < 0)),
    "cloned": entries(lambda h: (h < 0).clone()),
    "detached": entries(lambda h: (h < 0).detach(), lambda h: h.detach() < 0),
    "of type bool": entries(lambda h: (h < 0).bool().to(torch.bool)),
    "by name": entries(lambda h: torch.lt(input=h, other=0.0), lambda h: h.lt(other=0)),
    "either": entries(lambda h: (h > 0.1) ^ (h < 0.4), lambda h: (h < 0.4) ^ (h > 0.1)),
    "and": entries(lambda h: (h < 0) & (h > -0.5), lambda h: torch.logical_and(h > -0.5, h < 0)),
    "or": entries(lambda h: ~((h < 0) | (h > 0.5)), lambda h: ~(h < 0) & ~(h > 0.5)),
    "in a tuple": entries(lambda h: (h < 0,), lambda h: (h < 0,)),
    "selected": lambda h, s: h.masked_scatter(h < 0, torch.masked_select(input=h, mask=h < 0) * s.b[0]),
    "put": lambda h, s: h.index_put((h < 0,), h[h < 0] * s.b[0]),
    "put by name": lambda h, s: h.index_put_(indices=(h < 0,), values=h[h < 0] * s.b[0], accumulate=True),
    "scattered": lambda h, s: h.masked_scatter_(h < 0, h[h < 0] * s.b[0]),
    "in what was picked": in_what_was_picked,
    "an own gradient": lambda h, s: h.index_put((h < 0,), Twice.apply(h[h < 0]) * s.b[0]),
    "own gradients of rows": rows(lambda p, s: Twice.apply(p * s.b)),
    "in rows": in_rows,
    "of two axes": pieces,
    "a slice": written(lambda h, m, s: h.__setitem__((m, slice(None)), h[m, :] * s.b)),
    "a part": written(lambda h, m, s: h.__setitem__((m, slice(2)), h[m, :2] * s.b[:2])),
    "a column": written(lambda h, m, s: h.__setitem__((m, 0), h[m].sum(-1))),
    "dots": written(lambda h, m, s: h.__setitem__((m, ...), h[m, ...] * s.b)),
    "an axis more": written(lambda h, m, s: h.__setitem__((m, None), h[m, None] * s.b)),
    "the same for all": written(lambda h, m, s: h.__setitem__(m, s.b)),
    "weights that are large": lambda h, s: h.__setitem__((slice(None), s.b > 0), h[:, s.b > 0].exp()),
    "at the last axis": turned(lambda g, m, s: g.__setitem__((slice(None), m), g[:, m] * s.b[:, None])),
    "behind dots": turned(lambda g, m, s: g.__setitem__((..., m), g[..., m] * s.b[0])),
    "products": rows(lambda p, s: p @ s.W + torch.einsum("nd,de->ne", p, s.W)),
    "softmax": rows(lambda p, s: F.softmax(p, -1) * s.b),
    "norms": rows(lambda p, s: F.normalize(p, dim=-1) + p / p.norm(dim=-1, keepdim=True)),
    "deviations": rows(lambda p, s: (p - p.mean(-1, keepdim=True)) / p.std(-1, keepdim=True) * s.b),
    "layer norm": rows(lambda p, s: F.layer_norm(p, (D,), s.b)),
    "sums": rows(lambda p, s: p.cumsum(-1) * p.max(-1, keepdim=True).values),
    "turned": rows(lambda p, s: p[:, [1, 0, 3, 2]] + p.unflatten(1, (2, 2)).mT.flatten(1)),
    "shapes": rows(lambda p, s: p.view(p.shape[0], 2, 2).flip(-1).reshape(p.shape) * (p.shape[-1] + p.ndim)),
    "a module": rows(lambda p, s: s.net(p)),
    "experts": experts,
    "two experts": two_experts,
    "a sum, twice": lambda h, s: h.__setitem__(h.sum(-1) > 0, h[h.sum(-1) > 0] * s.b),
    "the largest, twice": lambda h, s: h.__setitem__(h.max(-1).values > 0.5, h[h.max(-1)[0] > 0.5].tanh() * s.b),
    "a product, twice": lambda h, s: h.__setitem__((h @ s.W)[:, 0] > 0, h[torch.matmul(h, s.W)[:, 0] > 0] * s.b),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:std")  # of no rows, by hand
@pytest.mark.parametrize("names", grouped(PICKED))
def test_what_a_mask_picks_is_the_recurrence(names):
    torch.manual_seed(len(names[0]))
    expect_the_recurrence(Parts([PICKED[n] for n in names]))


MET = {
    "a sum over rows": rows(lambda p, s: p.sum(0)),
    "softmax over rows": rows(lambda p, s: p.softmax(0)),
    "one of them": rows(lambda p, s: p * p[:1]),
    "turned about": rows(lambda p, s: p.flip(0)),
    "a mean of all": rows(lambda p, s: p - p.mean()),
    "their number": rows(lambda p, s: p / p.shape[0]),
    "their number, as a size": rows(lambda p, s: p + torch.ones(p.shape[0], 1, dtype=p.dtype)),
    "their entries' number": rows(lambda p, s: p / p.numel()),
    "normed over rows": rows(lambda p, s: F.normalize(p, dim=0)),
    "products with each other": rows(lambda p, s: (p @ p.T).softmax(-1) @ p),
    "other rows": lambda h, s: h.index_put((h[:, 0] < 0,), h[h[:, 1] < 0]),
    "a column over many": lambda h, s: h.__setitem__(h < 0, h[h < 0] * s.b),
    "written over": lambda h, s: (m := h < 0, p := h[m], m.logical_not_(), h.__setitem__(m, p))[0] * h,
    "a mask written over, worked on": lambda h, s: (m := h < 0, p := h[m] * s.b[0], m.logical_not_(), p.exp())[0] * h,
    "a sum, written over": lambda h, s: (p := h[h.sum(-1) > 0], h.neg_(), h.__setitem__(h.sum(-1) > 0, p))[0] * h,
    "another sum": lambda h, s: h.__setitem__(h.sum(-1) > 0, h[h.sum(-1, dtype=torch.float32) > 0]),
    "a view written over": lambda h, s: (m := h < 0, h.view(-1).neg_(), h.__setitem__(m, h[h < 0]))[0] * h,
}


@pytest.mark.parametrize("name", MET)
@pytest.mark.parametrize("count", [1, 3])
def test_picked_entries_that_meet_are_refused(name, count):
    part = Part(MET[name])
    with pytest.raises(TraceError, match=r"reads a tensor's values \(how many entries a mask picks.*torch\.where"):
        trace(lambda x: part(x), torch.randn(count, D, dtype=torch.float64), proved=kept_apart)


def test_seen_parts_of_what_is_picked_are_its_own_memory():
    def body(h, s):
        m = h[:, 0] < 0
        p = h[m] * s.b
        p[:, :2].mul_(2)
        p.unflatten(1, (2, 2))[:, 1].exp_()
        h[m] = p

    torch.manual_seed(0)
    expect_the_recurrence(Parts([body]))


REPEATED = {
    "stacked": lambda h, s: h + torch.stack([s.b] * len(h)),
    "stacked behind": lambda h, s: (h.T * torch.stack([s.b.sin()] * h.shape[0], 1)).T,
    "joined": lambda h, s: h + torch.cat([s.b[None]] * len(h)) + torch.vstack([s.b] * len(h)),
    "joined as matrices": lambda h, s: h + torch.vstack([s.b.view(1, D)] * len(h)) + torch.concat([s.b[None]] * len(h), dim=0),
    "numbers": lambda h, s: h + h.new_tensor([[1.0, 2, 3, 4]] * len(h)) + torch.tensor([0.5] * len(h))[:, None],
    "numpy's": lambda h, s: h * torch.from_numpy(np.tile(np.arange(4.0), (len(h), 1))),
    "a convolution each": lambda h, s: F.conv1d(h[None], s.b[:3].expand(len(h), 1, 3), padding=1, groups=len(h))[0],
    "a kernel each": lambda h, s: F.conv1d(h[None], (h @ s.W)[:, None, :3], padding=1, groups=h.shape[0])[0],
    "an image each": lambda h, s: F.conv2d(h.view(1, -1, 2, 2), s.W[:2, :2].expand(len(h), 1, 2, 2), padding=1, groups=len(h))[0, :, :2, :2].reshape(-1, D),
}  # fmt: skip


@pytest.mark.parametrize("names", grouped(REPEATED, 3))
def test_what_is_repeated_for_each_row_is_no_number_of_tokens(names):
    torch.manual_seed(len(names[0]))
    expect_the_recurrence(Parts([REPEATED[n] for n in names]))


@pytest.mark.parametrize(
    "body",
    [
        lambda h, s: torch.stack([r @ s.W for r in h]),
        lambda h, s: torch.stack([h[i] @ s.W for i in range(len(h))]),
        lambda h, s: torch.cat([r @ s.W for r in h.split(1)]),
        lambda h, s: torch.stack([F.linear(r, s.W) for r in h.unbind(0)]),
    ],
)
def test_a_loop_over_rows_is_refused_and_another_way_is_right(body):
    with pytest.raises(df.DerivationError, match=r"takes rows apart, as a loop.*test_picks.*torch.vmap\(f\)\(x\)"):
        df.derive(Parts([body]), chunk=3, prove=False)


# More rows of docs/learners_refused.md.
REFUSED = {
    "`nonzero`": (lambda h, s: h.index_add(0, (h[:, 0] < 0).nonzero()[:, 0], h[:1]), "reads a tensor's values"),
    "`torch.where(m)`": (lambda h, s: h[torch.where(h[:, 0] < 0)[0]], "reads a tensor's values"),
    "`if m.any()`": (lambda h, s: h * 2 if (h < 0).any() else h, "reads a tensor's values"),
    "`F.group_norm`": (lambda h, s: F.group_norm(h[None], h.shape[0])[0], "group_norm takes num_groups = 3"),
    "`nn.EmbeddingBag`": (lambda h, s: h + F.embedding_bag(ids(h).view(-1), s.U, torch.arange(0, h.numel(), D).clamp(min=1) - 1), "index_add makes one row depend"),
    "`max_norm`": (lambda h, s: h + F.embedding_bag(ids(h), s.U, max_norm=1.0), "writes to an input or a buffer"),
    "`torch.from_numpy(a.copy()).mul_(2)`": (lambda h, s: h * torch.from_numpy(np.ones(D).copy()).mul_(2), "memory of numpy"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_in_the_table(name):
    body, reason = REFUSED[name]
    assert name.strip("`") in (Path(__file__).parents[1] / "docs" / "learners_refused.md").read_text()
    with pytest.raises((df.DerivationError, TraceError), match=reason):
        df.derive(Parts([body]), chunk=3, prove=False)


def test_a_function_mapped_over_rows_is_the_recurrence():
    torch.manual_seed(0)
    expect_the_recurrence(Parts([lambda h, s: torch.vmap(lambda r: s.W @ r + torch.outer(r, r).sum(0))(h)]))


def matrix(h, s):
    return s.W @ s.W.T + 2 * torch.eye(D, dtype=h.dtype)


def matrices(h, s):
    return matrix(h, s) + h[:, :, None] * h[:, None, :]


factors = torch.linalg.lu_factor
SOLVED = {
    "by factors": lambda h, s: torch.linalg.lu_solve(*factors(matrix(h, s)), h.T).T,
    "by factors from the right": lambda h, s: torch.linalg.lu_solve(*factors(matrix(h, s) + s.W), h, left=False),
    "by turned factors": lambda h, s: torch.linalg.lu_solve(*factors(matrix(h, s) + s.W), h.T, adjoint=True).T,
    "by factors of each": lambda h, s: torch.linalg.lu_solve(*factors(matrices(h, s)), h[:, :, None])[:, :, 0],
    "unpacked": lambda h, s: torch.linalg.lu(matrices(h, s))[2].sum(-1) + h @ torch.linalg.lu(matrix(h, s))[1],
    "old names": lambda h, s: torch.lu_solve(h.T, *factors(matrix(h, s))).T + torch.triangular_solve(h.T, matrix(h, s))[0].T,
    "unchecked": lambda h, s: torch.linalg.solve_ex(matrix(h, s), h.T).result.T,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.(triangular_solve|lu_solve) is deprecated")
@pytest.mark.parametrize("names", grouped(SOLVED, 4))
def test_solutions_by_factors(names):
    torch.manual_seed(len(names[0]))
    expect_the_recurrence(Parts([SOLVED[n] for n in names]))


def test_what_torch_cannot_differentiate_is_said_so(monkeypatch):
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    with pytest.raises(df.DerivationError, match=r"ldl_factor_ex is not implemented.*Torch has no such derivative"):
        df.derive(Parts([lambda h, s: h @ torch.linalg.ldl_factor(matrix(h, s))[0]]), chunk=3)


def ids(h):
    return (h > 0).long() + 2 * (h > 0.4).long()


def masked(of):
    return lambda h, s: of(s.U[ids(h)], (ids(h) != 0)[..., None])


BAGS = {
    "sum": ({"mode": "sum"}, lambda h, s: s.U[ids(h)].sum(-2)),
    "mean": ({"mode": "mean"}, lambda h, s: s.U[ids(h)].mean(-2)),
    "max": ({"mode": "max"}, lambda h, s: s.U[ids(h)].max(-2).values),
    "padded": ({"mode": "mean", "padding_idx": 0}, masked(lambda x, m: (x * m).sum(-2) / m.sum(-2).clamp(min=1))),
    "padded max": ({"mode": "max", "padding_idx": -5}, masked(lambda x, m: torch.where(m.any(-2), torch.where(m, x, -9e9).max(-2).values, 0.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAGS)
def test_bags_are_their_definition(name):
    options, plain = BAGS[name]
    torch.manual_seed(0)
    expect_the_recurrence(
        Parts([lambda h, s: h + F.embedding_bag(ids(h), s.U, **options)]), Parts([lambda h, s: h + plain(h, s)])
    )

    def parted(h, s):
        starts, ends = torch.arange(0, h.numel() + 1, D), name == "sum"
        return h + F.embedding_bag(
            ids(h).flatten(), s.U, starts if ends else starts[:-1], include_last_offset=ends, **options
        )

    expect_the_recurrence(Parts([parted]), Parts([lambda h, s: h + plain(h, s)]))
    table, places = torch.randn(5, D), torch.randint(0, 5, (6, 3))
    places[0] = 0
    torch.testing.assert_close(
        spelled._embedding_bag(places, table, **options), F.embedding_bag(places, table, **options)
    )


def test_bags_of_constants_are_looked_up_whatever_their_sizes():
    places, starts = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([0, 2, 2])
    for options, plain in (
        ({}, lambda s: torch.stack([s.U[:2].mean(0), s.U[0] * 0, s.U[[2, 3, 1]].mean(0)])),
        ({"mode": "sum", "padding_idx": 3}, lambda s: torch.stack([s.U[:2].sum(0), s.U[0] * 0, s.U[[2, 1]].sum(0)])),
    ):
        torch.manual_seed(0)
        expect_the_recurrence(
            Parts([lambda h, s, o=options: h @ F.embedding_bag(places, s.U, starts, **o).T @ s.U[:3]]),
            Parts([lambda h, s, plain=plain: h @ plain(s).T @ s.U[:3]]),
        )


def test_weighted_bags_are_their_definition():
    torch.manual_seed(0)
    expect_the_recurrence(
        Parts([lambda h, s: h + F.embedding_bag(ids(h), s.U, mode="sum", per_sample_weights=h)]),
        Parts([lambda h, s: h + (s.U[ids(h)] * h[..., None]).sum(-2)]),
    )


def test_weights_of_padding_count_nothing():
    torch.manual_seed(0)
    weights, kept = torch.sigmoid, lambda h: (ids(h) != 2)[..., None]
    expect_the_recurrence(
        Parts(
            [lambda h, s: h + F.embedding_bag(ids(h), s.U, mode="sum", per_sample_weights=weights(h), padding_idx=-3)]
        ),
        Parts([lambda h, s: h + (s.U[ids(h)] * weights(h)[..., None] * kept(h)).sum(-2)]),
    )


@pytest.mark.parametrize(
    ("mode", "weights"), [("mean", lambda h: h), ("sum", lambda h: h[:, :1]), ("sum", lambda h: h[0])]
)
def test_weights_that_torch_does_not_take_are_refused_in_its_words(mode, weights):
    learner = Parts([lambda h, s: F.embedding_bag(ids(h), s.U, mode=mode, per_sample_weights=weights(h))])
    with pytest.raises(TraceError, match=r"py:\d+\)` failed with .*Error: embedding_bag: .*per_sample_weights"):
        df.derive(learner, chunk=3, prove=False)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_reversed_differences_are_scaled(backend):
    """rsub(x, y, alpha) = y - alpha x, of a number too."""
    torch.manual_seed(0)
    learner = Parts(
        [lambda h, s: torch.rsub(h, 2.0, alpha=3) + torch.rsub(h @ s.W, h, alpha=2) + torch.rsub(s.b, 1, alpha=2)]
    )
    program = df.derive(learner, rule=df.rules.SGD(lr=0.05), chunk=3, prove=False)
    x = torch.randn(1, 7, 1, D, dtype=torch.float64)
    got = program(x, x.sin(), x.cos(), backend=backend)[0][0, :, 0]
    torch.testing.assert_close(got, by_hand(learner, x[0, :, 0], 0.05, 3), rtol=1e-9, atol=1e-11)


def test_a_number_as_a_tensor_is_that_number_among_complex_ones():
    f = lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.scalar_tensor(2.5, dtype=torch.complex128))  # noqa: E731
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(trace(f, x)(x), 2.5 * x)
    torch.testing.assert_close(df.jacobian(f, x).dense().reshape(6, 6), 2.5 * torch.eye(6, dtype=x.dtype))

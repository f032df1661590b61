"""Tokens stay apart: what keeps them so is right, through integers too; what mixes them or tells them apart by
their place is refused with the line."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform.testing import check_forms

D = 4


class Learner(nn.Module):
    """Any function of the tokens, three parameters and what it is given."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, shape in {"W": (D, D), "C": (5, D), "b": (D,)}.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=torch.float64)))
        for name, module in modules.items():
            setattr(self, name, module)
            for p in module.parameters():
                nn.init.normal_(p, std=0.5)

    def forward(self, x):
        return self.run(self, x)


class Sum(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def grouped(cases, size):
    names = list(cases)
    return [pytest.param(names[n : n + size], id="+".join(names[n : n + size])) for n in range(0, len(names), size)]


def program_of(parts, chunk=3):
    return df.derive(Sum(parts).double(), rule=df.rules.SGD(lr=0.2), chunk=chunk)


def written(place, value):
    def run(s, x):
        h = x @ s.W
        h[place] = value(h) if callable(value) else value
        return h

    return run


def experts(s, x):
    """The two best of four experts, each a row-wise gain."""
    gate, which = (x @ s.W).softmax(-1).topk(2, -1)
    return (gate.unsqueeze(-1) * torch.tanh(x.unsqueeze(-2) * s.C[which])).sum(-2)


def routed(s, x):
    gate = torch.zeros_like(x).scatter(-1, (x @ s.W).topk(2, -1, sorted=False).indices, 1.0)
    return torch.einsum("te,ek,tk->tk", gate, s.W, x)


def product_keys(s, x):
    h = x @ s.W
    left, i = (h[..., :2] @ s.C[:, :2].T).topk(2, -1)
    right, j = (h[..., 2:] @ s.C[:, 2:].T).topk(2, -1)
    score = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(-2)
    place = (2 * i.unsqueeze(-1) + j.unsqueeze(-2)).flatten(-2) % 5
    best, at = score.topk(2, -1)
    return (best.softmax(-1).unsqueeze(-1) * s.C[place.gather(-1, at)]).sum(-2)


def nearest_code(s, x):
    return x @ s.W + s.C[torch.cdist(x, s.C).argmin(-1)]


def straight_through(s, x):
    h = x @ s.W
    q = F.embedding(((h.unsqueeze(-2) - s.C) ** 2).sum(-1).argmin(-1), s.C)
    return h + (q - h).detach() + q


def residual_codes(s, x):
    out, rest = torch.zeros_like(x), x @ s.W
    for codes in (s.C[:2], s.C[2:]):
        q = codes[(rest @ codes.T).argmax(-1)]
        out, rest = out + q, rest - q
    return out


def squash(s, x):
    """Capsules of two numbers."""
    u = (x @ s.W).unflatten(-1, (2, 2))
    n = (u * u).sum(-1, keepdim=True)
    return (n / (1 + n) * u / (n + 1e-6).sqrt()).flatten(-2)


def splines(s, x):
    """KAN: hats on a grid, and a silu."""
    grid = torch.linspace(-2, 2, 5, dtype=x.dtype)
    hats = (1 - (x.unsqueeze(-1) - grid).abs()).clamp(min=0)
    return torch.einsum("tkg,gk->tk", hats, s.C) + F.silu(x) @ s.W


def bins(s, x):
    """A piecewise constant gain of each channel, looked up."""
    place = torch.bucketize(x, torch.linspace(-1, 1, 4, dtype=x.dtype))
    return x * s.C.T.expand(x.shape[0], D, 5).gather(2, place.unsqueeze(-1)).squeeze(-1)


def hopfield(s, x):
    h = x
    for _ in range(2):
        h = (2.0 * h @ s.C.T).softmax(-1) @ s.C
    return h @ s.W


def inner_attention(s, x):
    h = (x @ s.W).unflatten(-1, (2, 2))
    return (h @ h.mT).softmax(-1).matmul(h).flatten(-2)


def maxout(s, x):
    return torch.stack([x @ s.W, x @ s.W.T], -1).amax(-1)


def film(s, x):
    scale, shift = F.linear(x[..., :2], s.W[:, :2]).chunk(2, -1)
    return torch.cat([x[..., :2] * (1 + scale), x[..., 2:] + shift], -1) + s.b


def sparsemax(s, x):
    z = x @ s.W
    ordered = z.sort(-1, descending=True).values
    k = torch.arange(1, D + 1, dtype=x.dtype)
    support = 1 + k * ordered > ordered.cumsum(-1)
    count = support.sum(-1, keepdim=True)
    tau = (ordered.cumsum(-1).gather(-1, count - 1) - 1) / count
    return (z - tau).clamp(min=0)


def two(x):
    return x.unflatten(-1, (2, 2))


# What was refused, or failed at the first call, though no token meets another.
APART = {
    "expand_as": (lambda s, x: x @ s.W + s.b.expand_as(x), {}),
    "type_as": (lambda s, x: x @ s.W + s.b.type_as(x), {}),
    "view_as": (lambda s, x: (x @ s.W).flatten().view_as(x), {}),
    "one entry assigned": (written((..., 0), 0), {}),
    "half assigned": (written((..., slice(0, 2)), lambda h: h[..., 2:].tanh()), {}),
    "the rest assigned": (written((..., slice(1, None)), lambda h: h[..., :3] * 2), {}),
    "assigned a tensor": (written((slice(None), 1), lambda h: h[:, 3] * 2), {}),
    "in-place fill": (lambda s, x: (lambda h: h[..., 1:].fill_(0.5) * 0 + h[..., 1:])((x @ s.W).clone()) @ s.W[1:], {}),
    "assigned where": (lambda s, x: written(x > 0, 0.0)(s, x), {}),
    "masked fill": (lambda s, x: (x @ s.W).masked_fill(x > 0, 0.5), {}),
    "one_hot": (lambda s, x: F.one_hot((x @ s.W).argmax(-1), D).to(x.dtype) @ s.W, {}),
    "table by position": (lambda s, x: s.W[(x @ s.W).argmax(-1)], {}),
    "embedding": (lambda s, x: x @ s.W + s.table((x[..., 0] > 0).long() + (x[..., 1] > 0)), {"table": nn.Embedding(3, D)}),
    "embedding with "
    "padding": (lambda s, x: x @ s.W + s.table((x[..., 0] > 0).long()), {"table": nn.Embedding(3, D, padding_idx=0)}),
    "one place a row": (lambda s, x: (x @ s.W) * x[torch.arange(x.shape[0]), x.argmax(-1)].unsqueeze(-1), {}),
    "bucketize": (lambda s, x: (x @ s.W) * torch.bucketize(x, torch.tensor([0.0, 1.0])), {}),
    "searchsorted": (lambda s, x: (x @ s.W) * torch.searchsorted(torch.tensor([0.0, 1.0], dtype=x.dtype), x), {}),
    "searchsorted in its row": (lambda s, x: (x @ s.W) * torch.searchsorted(x.sort(-1).values, x), {}),
    "isin": (lambda s, x: (x @ s.W) * torch.isin((x > 0).long() + (x > 1), torch.tensor([1, 2])), {}),
    "largest and where": (lambda s, x: (lambda v, i: x @ s.W * v.unsqueeze(-1) * i.unsqueeze(-1))(*x.max(-1)), {}),
    "topk mask": (lambda s, x: (x @ s.W) * torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0), {}),
    "unsorted topk": (routed, {}),
    "experts": (experts, {}),
    "product keys": (product_keys, {}),
    "nearest code": (nearest_code, {}),
    "straight through": (straight_through, {}),
    "residual codes": (residual_codes, {}),
    "running maximum": (lambda s, x: (x @ s.W).cummax(-1).values, {}),
    "kthvalue": (lambda s, x: x @ s.W * (x @ s.W).kthvalue(2, -1, True).values, {}),
    "median": (lambda s, x: x @ s.W - (x @ s.W).median(-1, True).values, {}),
    "mode": (lambda s, x: x @ s.W * (x @ s.W).mode(-1, True).indices, {}),
    "gathered in order": (lambda s, x: (x @ s.W).gather(-1, x.argsort(-1)), {}),
    "scattered in order": (lambda s, x: torch.zeros_like(x).scatter_add(-1, x.argsort(-1), x @ s.W), {}),
    "take_along_dim": (lambda s, x: torch.take_along_dim(x @ s.W, x.argsort(-1), -1), {}),
    "truth values": (lambda s, x: (x @ s.W) * (x > 0).any(-1, keepdim=True) + (x < 1).all(-1, keepdim=True), {}),
    "counts": (lambda s, x: (x @ s.W) * (x > 0).sum(-1, keepdim=True) + (x > 0).cumsum(-1), {}),
    "padded with ones": (lambda s, x: torch.cat([x @ s.W[:, :3], torch.ones(x.shape[0], 1, dtype=x.dtype)], -1), {}),
    "batched weights": (lambda s, x: torch.bmm(x.unsqueeze(1), s.W.expand(x.shape[0], D, D)).squeeze(1), {}),
    "kernel 1, turned": (lambda s, x: s.conv(x.T[None])[0].T, {"conv": nn.Conv1d(D, D, 1)}),
    "kernel 1 twice": (lambda s, x: s.conv(x.T[None].unsqueeze(2))[0, :, 0].T, {"conv": nn.Conv2d(D, D, 1, groups=2)}),
    "GRU cell": (lambda s, x: s.cell(x), {"cell": nn.GRUCell(D, D)}),
    "GRU cell with a state": (lambda s, x: s.cell(x, x @ s.W), {"cell": nn.GRUCell(D, D)}),
    "LSTM cell": (lambda s, x: s.cell(x)[0], {"cell": nn.LSTMCell(D, D)}),
    "RNN inside": (lambda s, x: s.net(two(x))[0].flatten(-2), {"net": nn.RNN(2, 2, batch_first=True)}),
    "GRU inside": (lambda s, x: s.net(two(x))[0].flatten(-2), {"net": nn.GRU(2, 2, batch_first=True)}),
    "LSTM inside": (lambda s, x: s.net(two(x))[0].flatten(-2), {"net": nn.LSTM(2, 2, batch_first=True)}),
    "attention inside": (lambda s, x: s.net(two(x), two(x), two(x))[0].flatten(-2), {"net": nn.MultiheadAttention(2, 1, batch_first=True)}),
    "inner attention": (inner_attention, {}),
    "squash": (squash, {}),
    "splines": (splines, {}),
    "bins": (bins, {}),
    "Hopfield": (hopfield, {}),
    "maxout": (maxout, {}),
    "FiLM": (film, {}),
    "sparsemax": (sparsemax, {}),
    "RBF": (lambda s, x: torch.exp(-(x.unsqueeze(-2) - s.C).square().sum(-1)) @ s.C, {}),
    "Fourier features": (lambda s, x: torch.cat([(x @ s.W[:, :2]).cos(), (x @ s.W[:, 2:]).sin()], -1) @ s.W, {}),
    "gated": (lambda s, x: F.glu(F.linear(x, torch.cat([s.W, s.W.T])), -1), {}),
    "grouped maximum": (lambda s, x: two(x @ s.W).max(-1).values.repeat_interleave(2, -1), {}),
    "group norm": (lambda s, x: s.norm(x @ s.W), {"norm": nn.GroupNorm(2, D)}),
    "local response": (lambda s, x: F.local_response_norm((x @ s.W).unsqueeze(-1), 2).squeeze(-1), {}),
    "rows turned and "
    "back": (lambda s, x: (x.T.contiguous().T @ s.W).reshape(-1, 2, 2).transpose(1, 2).reshape(-1, D), {}),
}  # fmt: skip


@pytest.mark.parametrize("names", grouped(APART, 6))
def test_tokens_are_followed(names):
    torch.manual_seed(len(names[0]))
    check_forms(program_of([Learner(APART[n][0], **APART[n][1]) for n in names]), time=7)


MIXED = {
    "sort": lambda s, x: (x @ s.W).sort(0)[0],
    "order": lambda s, x: x @ s.W * x.argsort(0),
    "topk": lambda s, x: x @ s.W * x.topk(1, 0).indices,
    "median": lambda s, x: x @ s.W - x.median(0).values,
    "mean": lambda s, x: (x - x.mean(0)) @ s.W,
    "norm of all": lambda s, x: x @ s.W / x.norm(),
    "softmax": lambda s, x: (x @ s.W).softmax(0),
    "running sum": lambda s, x: (x @ s.W).cumsum(0),
    "running count": lambda s, x: (x @ s.W) * (x > 0).cumsum(0),
    "any": lambda s, x: x @ s.W * (x > 0).any(),
    "all": lambda s, x: x @ s.W * (x > 0).all(0),
    "votes": lambda s, x: x @ s.W * F.one_hot(x.argmax(0), x.shape[0]).sum(0)[:, None],
    "constant places": lambda s, x: (x @ s.W)[torch.arange(x.shape[0]).flip(0)],
    "flip": lambda s, x: (x @ s.W).flip(0),
    "roll": lambda s, x: (x @ s.W).roll(1, 0),
    "shift": lambda s, x: torch.cat([torch.zeros(1, D, dtype=x.dtype), x[:-1]]) @ s.W,
    "another's index": lambda s, x: (x @ s.W).gather(0, x.argsort(0)),
    "rows in order": lambda s, x: (x @ s.W)[x[:, 0].argsort()],
    "scatter": lambda s, x: (x @ s.W).scatter(0, (x > 0).long(), 1.0),
    "another's bounds": lambda s, x: x @ s.W * torch.searchsorted(x[:, 0].contiguous(), x),
    "merged with features": lambda s, x: (x @ s.W).reshape(2, -1).softmax(-1).reshape(-1, D),
    "turned and merged": lambda s, x: (x @ s.W).t().reshape(-1, D),
    "flat sort": lambda s, x: (x @ s.W).reshape(-1).sort()[0].reshape(-1, D),
    "split and moved": lambda s, x: (x @ s.W).reshape(-1, 1, 2, 2).transpose(0, 3).reshape(-1, D),
    "attention": lambda s, x: (x @ x.t()).softmax(-1) @ x @ s.W,
    "causal sum": lambda s, x: torch.ones(x.shape[0], x.shape[0], dtype=x.dtype).tril() @ x @ s.W,
    "kernel 3": lambda s, x: F.conv1d(x.t()[None], s.W[:, :, None].expand(D, D, 3), padding=1)[0].t(),
    "batch norm in training": lambda s, x: F.batch_norm(x @ s.W, None, None, training=True),
}
PLACED = {
    "triangle": lambda s, x: (x @ s.W).tril(),
    "first row assigned": written(0, 0.0),
    "first rows assigned": written(slice(0, 2), 1.0),
    "row replaced": lambda s, x: torch.select_scatter(x @ s.W, torch.zeros(D, dtype=x.dtype), 0, 0),
    "diagonal replaced": lambda s, x: torch.diagonal_scatter(x @ s.W, torch.zeros(min(x.shape), dtype=x.dtype)),
    "row filled": lambda s, x: (x @ s.W).index_fill(0, torch.tensor([0]), 1.0),
    "row copied": lambda s, x: (x @ s.W).index_copy(0, torch.tensor([0]), torch.ones(1, D, dtype=x.dtype)),
    "entry put": lambda s,
    x: (x @ s.W).index_put([torch.tensor([0]), torch.tensor([1])], torch.ones((), dtype=x.dtype)),
    "position added": lambda s, x: x @ s.W + torch.arange(x.shape[0])[:, None],
    "position times": lambda s, x: x @ s.W * torch.linspace(0, 1, x.shape[0], dtype=x.dtype)[:, None],
    "position embedded": lambda s, x: x @ s.W + F.embedding(torch.arange(x.shape[0]) % 5, s.C),
    "position masked": lambda s, x: (x @ s.W).masked_fill(torch.arange(x.shape[0])[:, None] > 0, 0.0),
    "position chosen": lambda s, x: torch.where(torch.arange(x.shape[0])[:, None] > 0, x @ s.W, x),
    "position as a feature": lambda s,
    x: torch.cat([x[:, :3], torch.arange(x.shape[0], dtype=x.dtype)[:, None]], -1) @ s.W,
    "identity column": lambda s, x: (x @ s.W) * torch.eye(x.shape[0], dtype=x.dtype)[:, :1],
    "padded constant": lambda s, x: x @ s.W + F.pad(torch.ones(1, 1, dtype=x.dtype), (0, 0, 0, x.shape[0] - 1)),
    "mirrored constant": lambda s,
    x: x @ s.W + F.pad(torch.arange(2.0, dtype=x.dtype)[None], (0, x.shape[0] - 2), "circular").T,
    "stacked numbers": lambda s,
    x: x @ s.W + torch.stack([x.new_full((), float(n)) for n in range(x.shape[0])])[:, None],
    "counted ones": lambda s, x: x @ s.W + x.new_ones(x.shape[0], 1).cumsum(0),
    "repeated and cut": lambda s,
    x: x @ s.W + torch.arange(2.0, dtype=x.dtype).repeat_interleave(x.shape[0])[1 : x.shape[0] + 1, None],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_mixed_tokens_are_refused(name):
    with pytest.raises(df.DerivationError, match=r"mixes tokens at .*test_token_places.py:\d+"):
        df.derive(Learner(MIXED[name]).double(), chunk=3).derivation  # noqa: B018


@pytest.mark.parametrize("name", PLACED)
def test_tokens_told_apart_by_their_place_are_refused(name):
    with pytest.raises(
        df.DerivationError,
        match=r"(mixes tokens|treats tokens by their place in the batch) at .*test_token_places.py:\d+",
    ):
        df.derive(Learner(PLACED[name]).double(), chunk=3).derivation  # noqa: B018

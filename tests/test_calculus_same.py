"""The same function has the same structure and stores the same bytes, in whatever way it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.calculus import jacobian

generator = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, generator=generator, dtype=torch.float64)
W = torch.randn(4, 5, generator=generator, dtype=torch.float64)
Y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
ROW = W[:, 0].clone()


def stable_softmax(x: Tensor) -> Tensor:
    e = (x - x.max(-1, keepdim=True)[0].detach()).exp()
    return e / e.sum(-1, keepdim=True)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def attention(x: Tensor) -> Tensor:
    weights = (x @ x.T / 2).softmax(-1)
    return weights @ x


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)


SAME: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "softmax": [
        lambda x: x.softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True), stable_softmax,
        lambda x: x.log_softmax(-1).exp(), lambda x: x.exp() * (1 / x.exp().sum(-1, keepdim=True)),
        lambda x: x.exp() / x.exp().sum(-1)[:, None], lambda x: F.softmax(x + 3, 1), lambda x: x.T.softmax(0).T,
    ],
    "mean": [lambda x: x.mean(0), lambda x: x.sum(0) / 3, lambda x: x.sum(0) * (1 / 3), lambda x: (x / 3).sum(0)],
    "transposed product": [
        lambda x: (x @ W).T, lambda x: W.T @ x.T, lambda x: torch.einsum("ij,jk->ki", x, W),
        lambda x: F.linear(x, W.T).t(),
    ],
    "product": [
        lambda x: x @ W, lambda x: torch.einsum("ij,jk->ik", x, W), lambda x: F.linear(x, W.T),
        lambda x: (x[:, :, None] * W).sum(1), lambda x: torch.bmm(x[None], W[None])[0],
        lambda x: torch.tensordot(x, W, 1),
        lambda x: torch.einsum("jk,ij->ik", W, x), lambda x: torch.addmm(torch.zeros(3, 5, dtype=x.dtype), x, W),
    ],
    "nothing": [
        lambda x: x, lambda x: x.reshape(2, 6).reshape(3, 4), lambda x: x.reshape(12).view(3, 4), lambda x: x.T.T,
        lambda x: x.permute(1, 0).permute(1, 0), lambda x: torch.cat([x[:1], x[1:]]),
        lambda x: torch.stack(x.unbind(1), 1),
        lambda x: torch.cat(x.split(2, 1), 1), lambda x: x.flip(0).flip(0), lambda x: x.roll(1, 0).roll(-1, 0),
        lambda x: 2 * x - x, lambda x: x + 0, lambda x: x.clone() * 1.0, lambda x: x[None].squeeze(0),
        lambda x: x @ torch.eye(4, dtype=x.dtype), lambda x: torch.eye(3, dtype=x.dtype) @ x,
        lambda x: torch.ones_like(x) * x,
        lambda x: F.pad(x, (1, 1))[:, 1:-1], lambda x: torch.stack([x[0], x[1], x[2]]),
    ],
    "twice": [lambda x: x + x, lambda x: 2 * x, lambda x: x * 2, lambda x: x / 0.5, lambda x: 3 * x - x, lambda x: -(-2 * x), lambda x: torch.cat([x, x]).reshape(2, 3, 4).sum(0)],
    "broadcast add": [
        lambda x: x[0] + W.T, lambda x: x[0].expand(5, 4) + W.T, lambda x: x[0].repeat(5, 1) + W.T,
        lambda x: x[0][None] + W.T,
        lambda x: torch.ones(5, 1, dtype=x.dtype) * x[0] + W.T,
    ],
    "permute": [
        lambda x: x.reshape(3, 2, 2).permute(2, 1, 0), lambda x: x.reshape(3, 2, 2).permute(0, 2, 1).permute(1, 2, 0),
        lambda x: x.reshape(3, 2, 2).transpose(0, 2), lambda x: x.reshape(3, 2, 2).movedim(0, 2).transpose(0, 1),
    ],
    "square": [
        lambda x: x * x, lambda x: x**2, lambda x: x.square(), lambda x: (x.view(-1) * x.view(-1)).view(3, 4),
        lambda x: torch.pow(x, 2), lambda x: x.reshape(2, 6).reshape(3, 4) * x,
    ],
    "cube": [lambda x: x**3, lambda x: x * x * x, lambda x: x.square() * x],
    "layer norm": [lambda x: F.layer_norm(x, (4,)), layer_norm, standard],
    "rms norm": [
        lambda x: F.rms_norm(x, (4,), None, 1e-6), lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x / (x.square().sum(-1, keepdim=True) / 4 + 1e-6).sqrt(),
    ],
    "log softmax": [
        lambda x: x.log_softmax(-1), lambda x: x - x.logsumexp(-1, keepdim=True), lambda x: x.softmax(-1).log(),
        lambda x: x - x.exp().sum(-1, keepdim=True).log(),
    ],
    "logsumexp": [lambda x: x.logsumexp(1), lambda x: x.exp().sum(1).log()],
    "silu": [F.silu, lambda x: x * x.sigmoid(), lambda x: x / (1 + (-x).exp())],
    "relu": [F.relu, lambda x: x.clamp(min=0), lambda x: torch.where(x > 0, x, torch.zeros_like(x)), lambda x: x * (x > 0)],
    "residual": [lambda x: x * (ROW + 1), lambda x: x * ROW + x, lambda x: x + ROW * x],
    "norm": [lambda x: x / x.norm(dim=-1, keepdim=True), F.normalize, lambda x: x / (x * x).sum(-1, keepdim=True).sqrt()],
    "distance": [lambda x: F.mse_loss(x, Y), lambda x: ((x - Y) ** 2).mean(), lambda x: (x - Y).square().sum() / 12],
    "sum": [lambda x: x.sum(), lambda x: x.sum(0).sum(0), lambda x: x.reshape(-1).sum(), lambda x: x.mean() * 12],
    "dot": [lambda x: x[0] @ x[1], lambda x: (x[0] * x[1]).sum(), lambda x: torch.einsum("i,i", x[0], x[1])],
    "association": [lambda x: (x @ W) @ W.T, lambda x: x @ (W @ W.T), lambda x: torch.einsum("ij,jk,lk->il", x, W, W)],
    "two layers": [lambda x: F.gelu(x @ W) @ W.T, lambda x: F.gelu(F.linear(x, W.T)) @ W.T],
    "variance": [lambda x: x.var(0, correction=0), lambda x: ((x - x.mean(0)) ** 2).mean(0)],
    "attention": [attention, lambda x: F.scaled_dot_product_attention(x, x, x)],
}  # fmt: skip


X4, X3, V = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64), torch.stack([X, Y]), X[0].clone()
WB = torch.stack([W, 2 * W])
OTHER_RANKS: dict[str, tuple[Tensor, list[Callable[[Tensor], Tensor]]]] = {
    "softmax of a "
    "vector": (V, [lambda x: x.softmax(0), lambda x: x.exp() / x.exp().sum(), lambda x: (x - x.max()).exp() / (x - x.max()).exp().sum(), lambda x: (x - x.logsumexp(0)).exp()]),
    "softmax over axis 1 of "
    "4": (X4, [lambda x: x.softmax(1), lambda x: x.exp() / x.exp().sum(1, keepdim=True), lambda x: x.movedim(1, -1).softmax(-1).movedim(-1, 1), lambda x: x.log_softmax(1).exp()]),
    "softmax, scaled": (X3, [lambda x: (x / 2).softmax(-1), lambda x: (x * 0.5).softmax(-1), lambda x: (x / 2).exp() / (x / 2).exp().sum(-1, keepdim=True)]),
    "mean over two "
    "axes": (X4, [lambda x: x.mean((1, 3)), lambda x: x.sum((1, 3)) / 15, lambda x: x.sum(3).sum(1) / 15, lambda x: x.mean(3).mean(1), lambda x: torch.einsum("abcd->ac", x) / 15, lambda x: x.movedim(1, 2).reshape(2, 4, 15).mean(-1)]),
    "mean kept": (X3, [lambda x: x.mean(1, keepdim=True), lambda x: x.sum(1, keepdim=True) / 3, lambda x: x.mean(1)[:, None], lambda x: x.sum(1).unsqueeze(1) * (1 / 3)]),
    "batched transposed "
    "product": (X3, [lambda x: (x @ W).mT, lambda x: W.mT @ x.mT, lambda x: torch.einsum("bij,jk->bki", x, W), lambda x: F.linear(x, W.T).permute(0, 2, 1)]),
    "batched product": (X3, [lambda x: x @ WB, lambda x: torch.bmm(x, WB), lambda x: torch.einsum("bij,bjk->bik", x, WB), lambda x: (x[..., None] * WB[:, None]).sum(-2)]),
    "product, flattened": (X3, [lambda x: x @ W, lambda x: (x.reshape(6, 4) @ W).reshape(2, 3, 5), lambda x: torch.matmul(x.flatten(0, 1), W).unflatten(0, (2, 3)), lambda x: torch.tensordot(x, W, 1)]),
    "nothing, rank 4": (X4, [lambda x: x, lambda x: x.reshape(6, 20).reshape(2, 3, 4, 5), lambda x: x.permute(3, 1, 0, 2).permute(2, 1, 3, 0), lambda x: x.flatten(1).unflatten(1, (3, 4, 5)), lambda x: torch.stack(list(x.unbind(2)), 2), lambda x: (x.reshape(2, -1) + x.reshape(2, -1)).reshape(2, 3, 4, 5) / 2]),
    "broadcast add, "
    "rank 3": (V, [lambda y: X3 + y, lambda y: X3 + y.expand(2, 3, 4), lambda y: X3 + y[None, None], lambda y: X3 + y.repeat(2, 3, 1), lambda y: X3 + torch.ones(2, 3, 1, dtype=y.dtype) * y, lambda y: torch.broadcast_tensors(X3, y)[1] + X3]),
    "permutes": (X4, [lambda x: x.permute(2, 0, 3, 1), lambda x: x.permute(0, 2, 1, 3).permute(1, 0, 3, 2)[:, :].permute(1, 0, 2, 3).permute(1, 0, 2, 3), lambda x: torch.einsum("abcd->cadb", x), lambda x: x.transpose(0, 2).permute(0, 2, 3, 1)]),
    "batched attention": (X3, [lambda x: F.scaled_dot_product_attention(x, x, x), lambda x: (x @ x.mT / 2).softmax(-1) @ x]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_RANKS)
def test_same_function_same_structure_at_other_ranks(name: str) -> None:
    x, functions = OTHER_RANKS[name]
    found = {(J.structure, J.nbytes) for J in (jacobian(f, x) for f in functions)}
    assert len(found) == 1, found


@pytest.mark.parametrize("name", SAME)
def test_same_function_same_structure(name: str) -> None:
    found = []
    for f in SAME[name]:
        J = jacobian(f, X)
        torch.testing.assert_close(J.dense(), torch.func.jacrev(f)(X), rtol=1e-9, atol=1e-9)
        found.append((J.structure, J.nbytes))
    assert len(set(found)) == 1, found


NARROW = torch.rand(3)  # float32
BESIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "filled": lambda x: torch.full((3,), 0.1) * x, "a number": lambda x: torch.tensor(0.1) * x,
    "of whole numbers": lambda x: torch.arange(3) * torch.full((), 0.1, dtype=x.dtype) * x,
    "multiplied": lambda x: x * NARROW, "divided": lambda x: NARROW / x, "raised": lambda x: NARROW**x,
    "chosen": lambda x: torch.where(NARROW > 0.5, x, NARROW), "joined": lambda x: torch.cat([x, NARROW]),
    "weighted": lambda x: torch.cov(x, correction=0, fweights=torch.tensor([7, 4, 1]), aweights=NARROW),
    "weighted by counts": lambda x: torch.cov(x, correction=2, fweights=torch.tensor([7, 4, 1])),
    "quantile": lambda x: x.nanquantile(0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_numbers_of_another_precision_keep_their_digits_and_their_type(name: str) -> None:
    x = torch.rand(3, dtype=torch.float64)
    f = BESIDE[name]
    expected = torch.autograd.functional.jacobian(f, x)
    for _ in range(2):
        J = jacobian(f, x)
        torch.testing.assert_close(J.dense(), expected, rtol=1e-14, atol=1e-14)
        assert J.vjp(torch.ones(J.out_shape, dtype=x.dtype)).dtype == x.dtype


def test_other_functions_have_other_structures() -> None:
    """The law bites: one structure for all would pass it."""
    shown = [jacobian(same[0], X).structure for same in SAME.values()]
    assert len(set(shown)) > 12
    assert jacobian(lambda x: x.softmax(0), X).structure != jacobian(lambda x: x.softmax(1), X).structure
    assert jacobian(lambda x: x @ W, X).structure != jacobian(lambda x: (x @ W).T, X).structure

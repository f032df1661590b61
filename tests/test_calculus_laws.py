"""Laws of structured derivatives: exact, composable, applied either way, small, and polynomial in depth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualform.calculus import Derivative, compose, jacobian
from dualform.shapes import ShapeError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rope(x: Tensor) -> Tensor:
    return torch.cat([-x[..., 1::2], x[..., ::2]], -1) * torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype)


def block(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = F.rms_norm(x, (8,))
    q, k, v = (rope((h @ w).view(5, 2, 4)).transpose(0, 1) for w in (wq, wk, wv))
    x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(5, 8)
    return x + F.silu(F.layer_norm(x, (8,)) @ w1) @ w2


BLOCK = (rand(5, 8), *(rand(8, 8, seed=k) / 3 for k in range(5)))

PROGRAMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "broadcast": (lambda x, y: x + y, (rand(2), rand(2, 2))),
    "wide broadcast": (lambda x, y: x * y, (rand(4, 1), rand(3, 4, 2))),
    "two layers": (lambda w, x, v: F.gelu(x @ w) @ v, (rand(3, 4), rand(5, 3), rand(4, 2))),
    "tied": (lambda w, x: torch.tanh(x @ w) @ w.T + x, (rand(4, 3), rand(2, 4))),
    "split and gate": (lambda x: (lambda a, b: a.sigmoid() * b)(*x.split(2, -1)), (rand(3, 4),)),
    "heads": (lambda x: x.view(3, 2, 4).transpose(0, 1).reshape(2, 12), (rand(3, 8),)),
    "odd reshape": (lambda x: x.reshape(4, 6).softmax(-1).reshape(3, 8) * x, (rand(3, 8),)),
    "chunk and view": (lambda x: x.chunk(2, -1)[1].view(3, 2, 2).sum(1), (rand(3, 8),)),
    "rotary": (lambda x: rope(x) * x, (rand(3, 4),)),
    "slices of slices": (lambda x: x[1:, ::2][:, 1:].sum(0) * x[0, 2:4], (rand(4, 6),)),
    "overlapping windows": (lambda x: x[1:] * x[:-1] + x[:-1].cumsum(0), (rand(5),)),
    "pad and diagonal": (lambda x: torch.diagonal(F.pad(x, (1, 0)), 1) * x.diagonal(), (rand(3, 3),)),
    "normalised": (lambda x: x / x.norm(dim=-1, keepdim=True), (rand(3, 4),)),
    "extrema": (lambda x: x.max(-1)[0] * x.amax(0).sum() + x.std(), (rand(3, 4),)),
    "rank 0": (lambda x: x * x + x.sin(), (rand(),)),
    "size 1": (lambda x: x.expand(3, 4) + x.squeeze(), (rand(1, 1),)),
    "scalar out": (lambda x: (x @ x.T).logsumexp(0).mean(), (rand(3, 4),)),
    "where": (lambda x, y: torch.where(x > 0, x * y, y), (rand(3, 1), rand(4))),
    "constant": (lambda x: torch.ones_like(x), (rand(3),)),
    "itself": (lambda x: x, (rand(3),)),
    "block wrt input": (block, BLOCK),
    "block wrt key": (lambda k, x, *w: block(x, w[0], k, *w[1:]), (BLOCK[2], BLOCK[0], BLOCK[1], *BLOCK[3:])),
}  # fmt: skip


def check(f: Callable[..., Tensor], args: tuple[Tensor, ...], wrt: int = 0) -> Derivative:
    """dense, vjp and jvp, along the graph and by the terms, against autograd."""
    J = jacobian(f, *args, wrt=wrt)
    expected = torch.func.jacrev(f, wrt)(*args)
    torch.testing.assert_close(J.dense(), expected, **TIGHT)
    g, v = rand(*J.out_shape, seed=1), rand(*J.in_shape, seed=2)
    plain = Derivative(J.terms, J.out_shape, J.in_shape, J.dtype, J.device)
    for way in (J, plain):
        torch.testing.assert_close(way.vjp(g), torch.tensordot(g, expected, g.ndim), **TIGHT)
        torch.testing.assert_close(way.jvp(v), torch.tensordot(expected, v, v.ndim), **TIGHT)
    torch.testing.assert_close((g * plain.jvp(v)).sum(), (plain.T.jvp(g) * v).sum(), **TIGHT)
    return J


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivative_is_exact(name: str) -> None:
    check(*PROGRAMS[name])


def test_several_arguments_and_keywords() -> None:
    x, w, b = rand(2, 3), rand(4, 3), rand(4)

    def f(x: Tensor, weight: Tensor, *, bias: Tensor, scale: float) -> Tensor:
        return F.linear(x, weight, bias) * scale

    Jx, Jw, Jb = jacobian(f, x, w, wrt=(0, 1, "bias"), bias=b, scale=2.0)
    assert (Jx.shape, Jw.shape, Jb.shape) == ((2, 4, 2, 3), (2, 4, 4, 3), (2, 4, 4))
    torch.testing.assert_close(Jb.dense(), 2 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert torch.equal((Jw @ jacobian(lambda w: w, w)).dense(), Jw.dense())


def test_the_same_tensor_twice_is_two_arguments() -> None:
    x = rand(3, 3)
    J = check(lambda a, b: a @ b, (x, x))
    assert not torch.equal(J.dense(), jacobian(lambda a, b: a @ b, x, x, wrt=1).dense())
    torch.testing.assert_close(jacobian(lambda a: a @ x, x).dense(), J.dense())


def test_non_contiguous_and_shared_storage() -> None:
    base = rand(4, 6)
    check(lambda a, b: (a * b).softmax(0), (base.T[::2], base[:, ::2].T[:3].contiguous()))


def test_empty_axes() -> None:
    J = jacobian(lambda x: x * 2, torch.zeros(0, 3))
    assert J.dense().shape == (0, 3, 0, 3)
    assert J.vjp(torch.zeros(0, 3)).shape == (0, 3)
    assert jacobian(lambda x: x.sum(0), torch.zeros(0, 3)).vjp(torch.ones(3)).shape == (0, 3)


def chain() -> list[Derivative]:
    x = rand(2, 6)
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.softmax(-1),
        lambda t: t.reshape(3, 4)[:, 1:],
        lambda t: (t * t).sum(0),
        lambda t: torch.stack([t, t.sin()]),
    ]
    found = []
    for f in steps:
        found.append(jacobian(f, x))
        x = f(x)
    return found


def test_long_sums_of_unlike_radices_collapse() -> None:
    """(3, 4) and (4, 3) have no common atoms on an axis of 12: the sum is exact all the same."""

    def f(x: Tensor) -> Tensor:
        parts = [x * x, x.flip(0) * x, x.roll(2), x.view(2, 6).T.reshape(12), x.view(6, 2).T.reshape(12), x.cumsum(0)]
        parts += [
            x.view(3, 4).T.reshape(12) * x,
            x.view(4, 3).T.reshape(12).sin(),
            torch.cat([x[4:], x[:4]]),
            x.sum() * x,
        ]
        return torch.stack(parts).sum(0)

    assert len(check(f, (rand(12),)).terms) == 1


def test_composition_is_the_chain_rule_and_associates() -> None:
    a, b, c, d = chain()
    left = ((d @ c) @ b) @ a
    right = d @ (c @ (b @ a))
    dense = d.dense()
    for J in (c, b, a):
        dense = torch.tensordot(dense, J.dense(), len(J.out_shape))
    torch.testing.assert_close(left.dense(), dense, **TIGHT)
    torch.testing.assert_close(right.dense(), dense, **TIGHT)
    torch.testing.assert_close((d @ c).T.dense(), compose(c.T, d.T).dense(), **TIGHT)


def test_sums_and_scales() -> None:
    a, b = chain()[:2]
    torch.testing.assert_close((2 * a - a).dense(), a.dense(), **TIGHT)
    torch.testing.assert_close((a + a).dense(), 2 * a.dense(), **TIGHT)
    assert len((a + a).terms) == len(a.terms)
    assert (0 * b).terms == ()
    with pytest.raises(ShapeError, match="second summand"):
        a + b
    with pytest.raises(ShapeError, match=r"inner has output shape \(2, 6\)"):
        a @ a.T @ b.T @ a


def test_stored_numbers() -> None:
    x, w = rand(5, 4), rand(4, 3)
    assert jacobian(lambda a, b: a + b, rand(64), rand(64, 64)).nbytes == 0
    assert jacobian(lambda a: a.reshape(5, 2, 2).transpose(0, 1).reshape(2, 10), x).nbytes == 0
    assert jacobian(rope, rand(3, 8)).nbytes <= 8 * 8
    J = jacobian(lambda w: x @ w, w)
    (factor,) = (f for t in J.terms for f in t.tensors)
    assert J.nbytes == x.nbytes
    assert factor.tensor.data_ptr() == x.data_ptr()
    assert jacobian(lambda a: a.softmax(-1), x).nbytes == x.nbytes
    assert jacobian(F.gelu, x).nbytes == x.nbytes
    v = rand(3, 2)
    assert jacobian(lambda w: F.gelu(x @ w) @ v, w).nbytes == x.nbytes + 5 * 3 * 8 + v.nbytes
    assert J.dense_nbytes == 8 * 5 * 3 * 4 * 3


def test_a_term_is_never_larger_than_its_dense_form() -> None:
    for f, args in PROGRAMS.values():
        J = jacobian(f, *args)
        assert J.nbytes <= 2 * max(J.dense_nbytes, sum(a.nbytes for a in args))


@pytest.mark.parametrize("norm", [False, True])
def test_depth_is_polynomial(norm: bool) -> None:
    weights = [rand(4, 4, seed=k) / 3 for k in range(24)]

    def net(x: Tensor) -> Tensor:
        for w in weights:
            h = torch.tanh(x @ w)
            x = x + (F.layer_norm(h, (4,)) if norm else h)
        return x

    J = check(net, (rand(3, 4),))
    assert len(J.terms) <= 8
    assert J.nbytes <= 3 * 4 * 4 * 8  # tokens stay apart: block diagonal
    scalar = check(lambda x: net(x).square().sum(), (rand(3, 4),))
    assert scalar.nbytes <= 8 * 12 * len(scalar.terms)


THREE = torch.tensor([[[0.5, -1.0, 0.25]]], dtype=torch.float64)


def zeroed(x: Tensor) -> Tensor:
    y = x * 2
    y[0] = 0.0
    y[:, -1:] += x[:, :1]
    return y


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, torch.sin, F.silu, torch.square, lambda x: x.softmax(-1), lambda x: x.softmax(0), lambda x: 0.5 * x - 1,
    lambda x: x - x.mean(-1, keepdim=True), lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: F.rms_norm(x, x.shape[-1:]),
    lambda x: x.transpose(0, 1).reshape(x.shape), lambda x: x.reshape(-1).flip(0).reshape(x.shape),
    lambda x: torch.cat([x[1:], x[:1]]), lambda x: torch.stack(x.unbind(-1), -1), lambda x: x.roll(1, -1),
    lambda x: x + x.sum(0), lambda x: x.cumsum(-1), lambda x: x.tril(), lambda x: x[:, :1].expand(x.shape),
    lambda x: x.masked_fill(x > 1, 0.0), lambda x: x.detach() * x, lambda x: x @ x.T @ x / 4,
    lambda x: x.amax(-1, keepdim=True) * x,
    lambda x: F.conv1d(x[:, None], THREE, padding=1)[:, 0], lambda x: F.avg_pool1d(x[:, None], 2, 1, 1)[:, 0, 1:],
    lambda x: x.sort(-1)[0],
    lambda x: F.max_pool1d(x[None], 3, 1, 1)[0], lambda x: x.gather(0, x.argsort(0)),
    lambda x: x.clone().mul_(x).add_(1), lambda x: x.tanh().cumprod(-1),
    lambda x: F.pad(x, (1, 1))[:, 2:], lambda x: F.pad(x, (1, 1), mode="replicate")[:, :-2],
    lambda x: x.triu() + x.flip(0), lambda x: F.normalize(x + 2, dim=-1),
    lambda x: x[torch.arange(len(x)).flip(0)], lambda x: x.repeat_interleave(2, 0)[::2],
    lambda x: torch.group_norm(x[None], 1)[0], lambda x: x.reshape(-1).roll(1).reshape(x.shape),
    lambda x: x.unfold(1, 1, 1).squeeze(-1) * x,
    lambda x: torch.zeros_like(x).index_add(0, torch.zeros(len(x), dtype=torch.long), x) + x, zeroed,
    lambda x: x.logcumsumexp(0) - x,
    lambda x: F.cosine_similarity(x[:, None], x[None], dim=-1) @ x,
    lambda x: F.cross_entropy(x, x.softmax(-1), reduction="none")[:, None] * x, lambda x: x.T.reshape(x.shape),
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.mul, torch.sub, lambda a, b: torch.where(a > b, a, b * a), lambda a, b: (a @ b.T).tanh() @ a,
    lambda a, b: torch.einsum("ij,ik->jk", a, b).sum(0) * a if a.shape == b.shape else a, lambda a, b: a / (1 + b * b),
]  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[int, int, int, int]]]:
    """A straight-line program: each line applies one op to any earlier values,
    so that residuals and reuse are drawn."""
    shape = draw(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4])))
    length = draw(st.integers(2, 12))
    lines = []
    for k in range(length):
        first, second = draw(st.integers(0, k)), draw(st.integers(0, k))
        lines.append((draw(st.integers(0, 2)), draw(st.integers(0, len(UNARY) - 1)), first, second))
    return shape, lines


@given(programs())
def test_random_programs(drawn: tuple[tuple[int, int], list[tuple[int, int, int, int]]]) -> None:
    shape, lines = drawn

    def f(x: Tensor) -> Tensor:
        values = [x]
        for kind, op, first, second in lines:
            a, b = values[first], values[second]
            values.append(UNARY[op % len(UNARY)](a) if kind else BINARY[op % len(BINARY)](a, b))
        return values[-1] + values[len(values) // 2]

    x = rand(*shape)
    J = jacobian(f, x)
    expected = torch.func.jacrev(f)(x)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(J.dense() / scale, expected / scale, **TIGHT)
    g = rand(*J.out_shape, seed=3)
    torch.testing.assert_close(J.vjp(g) / scale, torch.tensordot(g, expected, g.ndim) / scale, **TIGHT)
    torch.testing.assert_close(J.jvp(x) / scale, torch.tensordot(expected, x, x.ndim) / scale, **TIGHT)


@given(
    st.lists(st.sampled_from([1, 2, 3, 4]), min_size=0, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(0, 4),
)
def test_broadcast_shapes(shape: list[int], ones: list[bool], cut: int) -> None:
    small = [1 if one else n for n, one in zip(shape, ones, strict=False)][min(cut, len(shape)) :]
    check(lambda a, b: a * b + a, (rand(*small), rand(*shape)))


@given(st.permutations([2, 3, 4]), st.sampled_from([(24,), (4, 6), (8, 3), (2, 2, 6), (3, 8)]))
def test_reshapes(order: list[int], shape: tuple[int, ...]) -> None:
    J = check(lambda x: x.permute([o - 2 for o in order]).reshape(shape).cumsum(0), (rand(2, 3, 4),))
    assert J.shape == (*shape, 2, 3, 4)


def test_jacobian_validates_at_the_border() -> None:
    x = rand(2, 3)
    with pytest.raises(ValueError, match=r"argument 0 has dtype torch.int64; expected a floating dtype"):
        jacobian(lambda a: a * 2, torch.arange(3))
    with pytest.raises(ValueError, match=r"f returns float at \[1\]; expected tensors"):
        jacobian(lambda a: (a, 1.0), x)
    with pytest.raises(ValueError, match="wrt is 1; expected the position of one of 1 arguments"):
        jacobian(lambda a: a, x, wrt=1)
    with pytest.raises(ValueError, match=r"wrt is 'b'; expected a keyword argument, one of \['c'\]"):
        jacobian(lambda a, c: a, x, wrt="b", c=x)
    with pytest.raises(ValueError, match="argument 0 is float; expected a floating tensor"):
        jacobian(lambda a: a, 1.0)
    with pytest.raises(ShapeError, match=r"axis 1 of a \(feat=3\) meets axis 0 of b \(feat=4\)"):
        jacobian(lambda a, b: a @ b, x, rand(4, 4), axes="batch feat, feat out -> batch out")
    with pytest.raises(ValueError, match="names 1 axes of a; expected its rank = 2"):
        jacobian(lambda a: a, x, axes="i -> i")
    J = jacobian(lambda a: a * 2, x)
    with pytest.raises(ShapeError, match=r"vjp: g has shape \(3,\); expected the output's shape = \(2, 3\)"):
        J.vjp(rand(3))

"""Laws of the one table: every row is exact, and its claims of affinity are true. A new row fails here until sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.calculus import rules
from dualform.calculus.rules import ROWS, Call, affine, derivative, multilinear

aten = torch.ops.aten
Sample = tuple[Any, tuple, dict]


def r(*shape: int) -> Tensor:
    """Positive, away from kinks and ties, and not contiguous where the rank allows."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.rand(tuple(reversed(shape)), generator=generator, dtype=torch.float64) + 0.3
    return x.permute(*range(len(shape) - 1, -1, -1)) if shape else x


def s(target: Any, *args: Any, **kwargs: Any) -> Sample:
    return target, args, kwargs


MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [True, True, False, False]])
INDEX = torch.tensor([2, 0, 2])

_SAME_SHAPE = (
    "neg negative clone alias positive exp log sqrt rsqrt reciprocal sin cos tanh sigmoid relu square detach sign sgn"
)
_SAME_SHAPE += " floor ceil round trunc zeros_like ones_like empty_like tril triu contiguous lift_fresh lift_fresh_copy"

SAMPLES: dict[str, list[Sample]] = {
    f"aten::{name}": [s(getattr(aten, name).default, r(3, 4))]
    for name in _SAME_SHAPE.split()
    if name != "lift_fresh_copy"
}
SAMPLES |= {
    "aten::lift_fresh_copy": [s(aten.lift_fresh_copy.default, r(3, 4))],
    "aten::tril": [s(aten.tril.default, r(2, 3, 4)), s(aten.tril.default, r(3, 3), -1)],
    "aten::triu": [s(aten.triu.default, r(3, 4), 1)],
    "aten::round": [s(aten.round.default, r(3))],
    "aten::add": [s(aten.add.Tensor, r(2), r(2, 2)), s(aten.add.Tensor, r(3, 1), r(4), alpha=2), s(aten.add.Tensor, r(3), 2.0)],
    "aten::sub": [s(aten.sub.Tensor, r(3, 4), r(4)), s(aten.sub.Tensor, r(1, 1), r(3, 4), alpha=3)],
    "aten::subtract": [s(aten.subtract.Tensor, r(3, 4), r(4))],
    "aten::rsub": [s(aten.rsub.Tensor, r(3, 4), r(4), alpha=2), s(aten.rsub.Scalar, r(3), 1.0)],
    "aten::mul": [s(aten.mul.Tensor, r(3, 1), r(4)), s(aten.mul.Tensor, r(3), 2.5), s(aten.mul.Tensor, r(3, 4), MASK), s(aten.mul.Tensor, r(), r(2))],
    "aten::mul.Scalar": [s(aten.mul.Scalar, r(3), 2.5)],
    "aten::multiply": [s(aten.multiply.Tensor, r(3, 1), r(4))],
    "aten::div": [s(aten.div.Tensor, r(3, 1), r(4)), s(aten.div.Tensor, r(3), 2.0)],
    "aten::div.Tensor_mode": [s(aten.div.Tensor_mode, r(3), r(3), rounding_mode="floor"), s(aten.div.Tensor_mode, r(3), r(3), rounding_mode=None)],
    "aten::div.Scalar_mode": [s(aten.div.Scalar_mode, r(3), 2.0, rounding_mode="trunc")],
    "aten::divide.Tensor_mode": [s(aten.divide.Tensor_mode, r(3), r(3), rounding_mode="floor")],
    "aten::divide.Scalar_mode": [s(aten.divide.Scalar_mode, r(3), 2.0, rounding_mode=None)],
    "aten::hardswish": [s(aten.hardswish.default, r(3, 4))],
    "aten::log_sigmoid": [s(aten.log_sigmoid.default, r(3, 4))],
    "aten::absolute": [s(aten.absolute.default, r(3, 4))],
    "aten::divide": [s(aten.divide.Tensor, r(3, 1), r(4))],
    "aten::true_divide": [s(aten.true_divide.Tensor, r(3, 1), r(4))],
    "aten::where": [s(aten.where.self, MASK, r(3, 1), r(4)), s(aten.where.ScalarOther, MASK, r(3, 4), 0.0)],
    "aten::masked_fill": [s(aten.masked_fill.Scalar, r(3, 4), MASK, 0.5), s(aten.masked_fill.Tensor, r(3, 4), MASK, r())],
    "aten::to": [s(aten.to.dtype, r(3, 4), torch.float64), s(aten.to.dtype, r(3), torch.int64)],
    "aten::_to_copy": [s(aten._to_copy.default, r(3, 4), dtype=torch.float64)],
    "aten::type_as": [s(aten.type_as.default, r(3), r(2))],
    "aten::view_as": [s(aten.view_as.default, r(12), r(3, 4))],
    "aten::dropout": [s(aten.dropout.default, r(3), 0.5, False)],
    "aten::requires_grad_": [],  # in place; the tracer has rewritten it
    "aten::copy": [s(aten.copy.default, r(3, 4), r(4))],
    "aten::fill": [s(aten.fill.Tensor, r(3, 4), r()), s(aten.fill.Scalar, r(3), 2.0)],
    "aten::full_like": [s(aten.full_like.default, r(3), 2.0)],
    "aten::new_zeros": [s(aten.new_zeros.default, r(3), [2])],
    "aten::new_ones": [s(aten.new_ones.default, r(3), [2])],
    "aten::new_full": [s(aten.new_full.default, r(3), [2], 1.0)],
    "aten::new_empty": [],  # no value to compare
    "aten::empty_like": [],
    "aten::heaviside": [],  # autograd has no derivative to compare
    "aten::argmax": [s(aten.argmax.default, r(3, 4), 1)],
    "aten::argmin": [s(aten.argmin.default, r(3, 4), 1)],
    "aten::floor_divide": [],
    "aten::pow.Tensor_Scalar": [s(aten.pow.Tensor_Scalar, r(3, 4), p) for p in (0, 1, 2, 3.5, -1)],
    "aten::addcmul": [s(aten.addcmul.default, r(3, 4), r(4), r(3, 1), value=2)],
    "aten::lerp.Tensor": [s(aten.lerp.Tensor, r(3, 4), r(4), r(3, 1))],
    "aten::lerp.Scalar": [s(aten.lerp.Scalar, r(3, 4), r(4), 0.3)],
    "aten::mm": [s(aten.mm.default, r(3, 4), r(4, 2)), s(aten.mm.default, r(1, 4), r(4, 1))],
    "aten::bmm": [s(aten.bmm.default, r(2, 3, 4), r(2, 4, 2))],
    "aten::matmul": [
        s(aten.matmul.default, r(*a), r(*b))
        for a, b in (((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 2)), ((2, 1, 2, 3), (3, 3, 2)), ((2, 3), (2, 3, 1)))
    ],
    "aten::mv": [s(aten.mv.default, r(3, 4), r(4))],
    "aten::dot": [s(aten.dot.default, r(4), r(4))],
    "aten::vdot": [s(aten.vdot.default, r(4), r(4))],
    "aten::outer": [s(aten.outer.default, r(3), r(4))],
    "aten::ger": [s(aten.ger.default, r(3), r(4))],
    "aten::kron": [s(aten.kron.default, r(2, 3), r(3, 2)), s(aten.kron.default, r(2), r(3, 2).contiguous())],
    "aten::einsum": [
        s(aten.einsum.default, "ij,jk->ik", [r(2, 3), r(3, 4)]),
        s(aten.einsum.default, "...i,ij,kj->...k", [r(2, 3), r(3, 4), r(2, 4)]),
        s(aten.einsum.default, "ii,i->i", [r(3, 3), r(3)]),
        s(aten.einsum.default, "ab,cb", [r(2, 3), r(4, 3)]),
        s(aten.einsum.default, "ab,bc->c", [r(2, 1), r(3, 2)]),
    ],
    "aten::tensordot": [s(aten.tensordot.default, r(2, 3, 4), r(4, 5, 2), [2, 0], [0, 2])],
    "aten::addmm": [s(aten.addmm.default, r(4), r(3, 2), r(2, 4), beta=2, alpha=3)],
    "aten::baddbmm": [s(aten.baddbmm.default, r(2, 3, 4), r(2, 3, 2), r(2, 2, 4), alpha=3)],
    "aten::addmv": [s(aten.addmv.default, r(3), r(3, 2), r(2))],
    "aten::linear": [s(aten.linear.default, r(2, 3, 4), r(5, 4), r(5)), s(aten.linear.default, r(4), r(1, 4))],
    "aten::permute": [s(aten.permute.default, r(2, 1, 4), [2, 0, 1])],
    "aten::transpose": [s(aten.transpose.int, r(2, 3, 4), 0, -1)],
    "aten::t": [s(aten.t.default, r(3, 4)), s(aten.t.default, r(3))],
    "aten::numpy_T": [s(aten.numpy_T.default, r(3, 4))],
    "aten::mT": [s(aten.mT.default, r(2, 3, 4))],
    "aten::mH": [s(aten.mH.default, r(3, 4))],
    "aten::matrix_H": [s(aten.matrix_H.default, r(3, 4))],
    "aten::adjoint": [s(aten.adjoint.default, r(3, 4))],
    "aten::movedim": [s(aten.movedim.int, r(2, 3, 4), 0, 2)],
    "aten::moveaxis": [s(aten.moveaxis.int, r(2, 3, 4), 0, 2)],
    "aten::swapaxes": [s(aten.swapaxes.default, r(2, 3, 4), 0, 2)],
    "aten::swapdims": [s(aten.swapdims.default, r(2, 3, 4), 0, 2)],
    "aten::unsqueeze": [s(aten.unsqueeze.default, r(3, 4), 1), s(aten.unsqueeze.default, r(), 0)],
    "aten::squeeze": [s(aten.squeeze.default, r(1, 3, 1)), s(aten.squeeze.dim, r(1, 3), 0), s(aten.squeeze.dims, r(1, 3, 1), [0, 2])],
    "aten::expand": [s(aten.expand.default, r(3, 1), [2, 3, 4]), s(aten.expand.default, r(), [2])],
    "aten::expand_as": [s(aten.expand_as.default, r(3, 1), r(2, 3, 4))],
    "aten::broadcast_to": [s(aten.broadcast_to.default, r(3, 1), [3, 4])],
    "aten::view": [s(aten.view.default, r(6).clone(), [2, 3]), s(aten.view.default, torch.rand(6, 4, dtype=torch.float64), [8, 3])],
    "aten::reshape": [s(aten.reshape.default, r(2, 6), [3, 4]), s(aten.reshape.default, r(12), [2, -1]), s(aten.reshape.default, r(1), [])],
    "aten::_unsafe_view": [s(aten._unsafe_view.default, r(12), [3, 4])],
    "aten::flatten": [s(aten.flatten.using_ints, r(2, 3, 4), 1)],
    "aten::unflatten": [s(aten.unflatten.int, r(6, 2), 0, [2, 3])],
    "aten::ravel": [s(aten.ravel.default, r(2, 3))],
    "aten::reshape_as": [s(aten.reshape_as.default, r(6), r(2, 3))],
    "aten::scatter.src": [
        s(aten.scatter.src, r(3, 4), 1, torch.tensor([[0, 2], [3, 1], [1, 2]]), r(3, 2)),
        s(aten.scatter.src, r(3, 4), 0, torch.tensor([[2, 0, 1, 2]]), r(1, 4)),
    ],
    "aten::slice": [s(aten.slice.Tensor, r(5, 2), 0, 1, 4), s(aten.slice.Tensor, r(5), 0, 0, 9, 2), s(aten.slice.Tensor, r(5), 0, 2, 3), s(aten.slice.Tensor, r(3), 0, 2, 1)],
    "aten::narrow": [s(aten.narrow.default, r(2, 5), 1, 1, 3)],
    "aten::select.int": [s(aten.select.int, r(3, 4), 1, -1), s(aten.select.int, r(1), 0, 0)],
    "aten::slice_scatter": [s(aten.slice_scatter.default, r(5, 2), r(2, 2), 0, 1, 5, 2), s(aten.slice_scatter.default, r(1), r(1), 0)],
    "aten::select_scatter": [s(aten.select_scatter.default, r(3, 4), r(3), 1, 2)],
    "aten::stack": [s(aten.stack.default, [r(3), r(3), r(3)], 1)],
    "aten::constant_pad_nd": [s(aten.constant_pad_nd.default, r(3, 4), [1, 2, 0, 1])],
    "aten::pad": [s(aten.pad.default, r(3, 4), [1, 2]), s(aten.pad.default, r(1), [0, 2])],
    "aten::repeat": [s(aten.repeat.default, r(3, 1), [2, 2, 3])],
    "aten::diagonal": [s(aten.diagonal.default, r(3, 3)), s(aten.diagonal.default, r(3, 4), 1), s(aten.diagonal.default, r(2, 4, 3), -1, 1, 2)],
    "aten::diag_embed": [s(aten.diag_embed.default, r(2, 3))],
    "aten::index_select": [s(aten.index_select.default, r(3, 4), 0, INDEX)],
    "aten::embedding": [s(aten.embedding.default, r(3, 4), INDEX.reshape(1, 3))],
    "aten::index.Tensor": [s(aten.index.Tensor, r(4, 3), [None, INDEX]), s(aten.index.Tensor, r(3, 4), [INDEX - 1])],
    "aten::gather": [s(aten.gather.default, r(3, 4), 1, INDEX.reshape(3, 1)), s(aten.gather.default, r(3, 4), 0, INDEX.reshape(1, 3))],
    "aten::flip": [s(aten.flip.default, r(3, 4), [0, 1])],
    "aten::roll": [s(aten.roll.default, r(3, 4), [1], [1]), s(aten.roll.default, r(3), [-1], [0])],
    "aten::sum": [s(aten.sum.default, r(3, 4)), s(aten.sum.dim_IntList, r(3, 4), [-1]), s(aten.sum.dim_IntList, r(3, 4, 2), [0, 2], True), s(aten.sum.default, r())],
    "aten::mean": [s(aten.mean.default, r(3, 4)), s(aten.mean.dim, r(3, 4), [0])],
    "aten::var": [s(aten.var.correction, r(3, 4), [1], correction=0, keepdim=True), s(aten.var.dim, r(3, 4), [0]), s(aten.var.default, r(5))],
    "aten::std": [s(aten.std.correction, r(3, 4), [1], correction=1)],
    "aten::amax": [s(aten.amax.default, r(3, 4), [1])],
    "aten::amin": [s(aten.amin.default, r(3, 4), [0, 1], True)],
    "aten::max": [s(aten.max.default, r(3, 4)), s(aten.max.other, r(3), r(3) + 0.1)],
    "aten::min": [s(aten.min.default, r(3, 4))],
    "aten::logsumexp": [s(aten.logsumexp.default, r(3, 4), [1])],
    "aten::linalg_vector_norm": [s(aten.linalg_vector_norm.default, r(3, 4), 2, [1])],
    "aten::norm": [s(aten.norm.ScalarOpt_dim, r(3, 4), 2, [1]), s(aten.norm.Scalar, r(3, 4), 2)],
    "aten::cumsum": [s(aten.cumsum.default, r(3, 4), 1), s(aten.cumsum.default, r(1, 4), 0)],
    "aten::softmax": [s(aten.softmax.int, r(3, 4), -1)],
    "aten::_softmax": [s(aten._softmax.default, r(3, 4), 0, False)],
    "aten::log_softmax": [s(aten.log_softmax.int, r(3, 4), 1)],
    "aten::_log_softmax": [s(aten._log_softmax.default, r(3, 4), 1, False)],
    "aten::layer_norm": [s(aten.layer_norm.default, r(3, 4), [4], r(4), r(4)), s(aten.layer_norm.default, r(2, 3, 2), [3, 2])],
    "aten::rms_norm": [s(aten.rms_norm.default, r(3, 4), [4], r(4)), s(aten.rms_norm.default, r(3, 4), [4], None, 0.1)],
    "aten::scaled_dot_product_attention": [
        s(aten.scaled_dot_product_attention.default, r(2, 3, 4), r(2, 3, 4), r(2, 3, 2), None, 0.0, True),
        s(aten.scaled_dot_product_attention.default, r(3, 4), r(5, 4), r(5, 2), r(3, 5)),
    ],
}  # fmt: skip
SAMPLES |= {
    name: [s(getattr(aten, name.split("::")[1]).default, [r(2, 3), r(2, 1), r(2, 2)], 1)]
    for name in ("aten::cat", "aten::concat", "aten::concatenate")
}

CASES = [
    pytest.param(name, k, id=f"{name.split('::')[1]}-{k}")
    for name in sorted(SAMPLES)
    for k in range(len(SAMPLES[name]))
]


def make_call(name: str, k: int) -> Call:
    target, args, kwargs = SAMPLES[name][k]
    return Call(target, args, kwargs, target(*args, **kwargs))


def reference(call: Call, operand: int) -> Tensor:
    if not call.out.is_floating_point():
        return torch.zeros(*call.out.shape, *call.operands[operand].shape, dtype=torch.float64)
    if call.target is aten.copy.default:  # autograd knows it in place only
        x, y = call.operands
        return torch.func.jacrev(lambda *t: t[0].clone().copy_(t[1]), operand)(x, y)
    return torch.func.jacrev(lambda t: call.run(operand, t))(call.operands[operand])


def test_every_row_has_a_sample() -> None:
    assert set(ROWS) == set(SAMPLES)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_row_is_exact(name: str, k: int, recwarn: pytest.WarningsRecorder) -> None:
    call = make_call(name, k)
    for operand, x in enumerate(call.operands):
        J = derivative(call, operand)
        expected = reference(call, operand)
        assert J.shape == (*call.out.shape, *x.shape)
        torch.testing.assert_close(J.dense(), expected.to(J.dtype), rtol=1e-10, atol=1e-10)
        if call.out.is_floating_point():
            g, v = torch.randn_like(call.out), torch.randn_like(x)
            torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(J.jvp(v), torch.tensordot(expected, v, v.ndim), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(J.T.jvp(g), J.vjp(g), rtol=1e-12, atol=1e-12)
    assert not recwarn.list


def _joint(call: Call, group: tuple[int, ...], change: list[Tensor], scale: float) -> Tensor:
    for operand, step in zip(group, change, strict=True):
        args, kwargs = call.with_operand(operand, call.operands[operand] + scale * step)
        call = Call(call.target, args, kwargs, call.out)
    return call.target(*call.args, **call.kwargs)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_claimed_affinity_is_true(name: str, k: int) -> None:
    """Second differences vanish along a joint change of the operands; probing only ever tests a claim."""
    call = make_call(name, k)
    if not call.out.is_floating_point():
        return
    count = len(call.operands)
    groups = [g for n in range(1, count + 1) for g in itertools.combinations(range(count), n)]
    for group in groups:
        if affine(call, frozenset(group)):
            change = [torch.rand_like(call.operands[j]) for j in group]
            f = [_joint(call, group, change, scale) for scale in (0.0, 1.0, 2.0)]
            torch.testing.assert_close(f[2] - f[1], f[1] - f[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_claimed_products_are_products(name: str, k: int) -> None:
    call = make_call(name, k)
    biased = name == "aten::linear" and len(call.operands) == 3
    if multilinear(call) and not biased:
        for operand, x in enumerate(call.operands):
            torch.testing.assert_close(call.run(operand, 3 * x), 3 * call.out)
            assert len(derivative(call, operand).terms) == 1


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        (aten.mm.default, [{0}, {1}]),
        (aten.linear.default, [{0, 2}, {1, 2}]),
        (aten.addmm.default, [{0, 1}, {0, 2}]),
        (aten.layer_norm.default, [{1, 2}]),
        (aten.mul.Tensor, [{0}, {1}]),
        (aten.div.Tensor, [{0}]),
        (aten.where.self, [{0, 1}]),
        (aten.cat.default, [{0, 1, 2}]),
        (aten.exp.default, []),
        (aten.conv1d.default, []),
    ],
)
def test_affine_says_what_design_says(target: Any, groups: list[set[int]]) -> None:
    for n in (1, 2, 3):
        for group in itertools.combinations(range(3), n):
            expected = any(set(group) <= g for g in groups)
            if max(group) < max((max(g) for g in groups), default=0) + 1:
                assert affine(target, frozenset(group)) == expected, group


POINTWISE = (
    "abs acos asinh atan cosh digamma elu erf erfc exp2 expm1 gelu hardsigmoid hardtanh leaky_relu lgamma log1p log2"
)
POINTWISE += " logit mish selu sigmoid silu sinh softplus tan"


@pytest.mark.parametrize("name", POINTWISE.split())
def test_pointwise_tag(name: str) -> None:
    target = getattr(aten, name).default
    x = r(3, 4) * 0.7
    call = Call(target, (x,), {}, target(x))
    torch.testing.assert_close(derivative(call, 0).dense(), reference(call, 0), rtol=1e-10, atol=1e-10)
    assert derivative(call, 0).nbytes <= math.prod(x.shape) * 8


@pytest.mark.parametrize("build", [lambda x, y: s(aten.maximum.default, x, y), lambda x, y: s(aten.atan2.default, x, y), lambda x, y: s(aten.hypot.default, x, y), lambda x, y: s(aten.pow.Tensor_Tensor, x, y)])  # fmt: skip
def test_pointwise_tag_with_two_operands(build: Callable[[Tensor, Tensor], Sample]) -> None:
    target, args, kwargs = build(r(3, 1), r(4) + 0.05)
    call = Call(target, args, kwargs, target(*args, **kwargs))
    for operand in (0, 1):
        torch.testing.assert_close(derivative(call, operand).dense(), reference(call, operand), rtol=1e-10, atol=1e-10)


def test_an_op_without_a_row_is_exact_and_says_so_once() -> None:
    x, w = r(1, 2, 5), r(3, 2, 2)
    call = Call(aten.conv1d.default, (x, w), {}, aten.conv1d.default(x, w))
    rules._warned.discard("aten::conv1d")
    with pytest.warns(UserWarning, match="aten::conv1d has no derivative row"):
        J = derivative(call, 0)
    torch.testing.assert_close(J.dense(), reference(call, 0))
    assert torch.equal(derivative(call, 0).dense(), J.dense())


def test_a_user_adds_an_op_with_one_row() -> None:
    @rules.row("aten::frac", affine=rules.EACH)
    def _frac(call: Call, operand: int) -> list:
        return derivative(Call(aten.clone.default, (call.operands[0],), {}, call.out), 0).terms  # type: ignore[return-value]

    try:
        call = Call(aten.frac.default, (r(3),), {}, r(3).frac())
        assert torch.equal(derivative(call, 0).dense(), torch.eye(3, dtype=torch.float64))
        assert affine(call, frozenset({0}))
    finally:
        del ROWS["aten::frac"]


@pytest.mark.parametrize(
    "name", ["aten::linear", "aten::softmax", "aten::layer_norm", "aten::scaled_dot_product_attention", "aten::cat"]
)
def test_rows_work_inside_a_trace_and_a_vmap(name: str) -> None:
    call = make_call(name, 0)
    x, g = call.operands[0], torch.randn_like(call.out)

    def pull(g: Tensor, x: Tensor) -> Tensor:
        args, kwargs = call.with_operand(0, x)
        return derivative(Call(call.target, args, kwargs, call.target(*args, **kwargs)), 0).vjp(g)

    expected = derivative(call, 0).vjp(g)
    for mode in ("real", "fake"):
        gm = make_fx(pull, tracing_mode=mode, _allow_non_fake_inputs=True)(g, x)
        torch.testing.assert_close(gm(g, x), expected)
    batched = torch.vmap(pull)(torch.stack([g, 2 * g]), torch.stack([x, x]))
    torch.testing.assert_close(batched[1], 2 * expected)

"""The tracer: same function, one tensor per node, functional, and errors that name the caller's line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dualform.calculus import jacobian, source_line, trace
from dualform.shapes import TraceError

W = torch.randn(3, 4)
BUFFER = torch.zeros(3)


def names(gm: torch.fx.GraphModule) -> list[str]:
    return [n.target._opname for n in gm.graph.nodes if n.op == "call_function"]


def inplace_relu(x: Tensor) -> Tensor:
    h = x @ W
    h.relu_()
    return h * 2


def writes_views(x: Tensor) -> tuple[Tensor, ...]:
    h = x * 2
    flat = h.view(-1)
    column = h[:, 1]
    h[:, :2] = 0.5
    h[0].add_(1.0)
    h.t()[1:].clamp_(max=0.7)
    h += 1
    h.masked_fill_(h > 1.5, 0.0)
    h[:, torch.tensor([0, 2])] = 5.0
    fresh = torch.zeros(2, 3)
    fresh[1:].copy_(x[:1])
    fresh.unsqueeze(0).mul_(3)
    return h, flat, column, fresh


def no_grad_part(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sum()
    return x * scale


@pytest.mark.parametrize("f", [inplace_relu, writes_views, no_grad_part])
def test_traced_function_is_the_function(f: Callable[..., object]) -> None:
    x = torch.randn(2, 3)
    gm = trace(f, x)
    torch.testing.assert_close(gm(x), f(x), rtol=0, atol=0)
    assert not any(n.target._schema.is_mutable for n in gm.graph.nodes if n.op == "call_function")
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_ops_stay_whole() -> None:
    def f(x: Tensor) -> Tensor:
        h = F.layer_norm(F.linear(x, W.t()), (4,))
        a = F.scaled_dot_product_attention(h, h, h)
        return torch.einsum("ij,kj->ik", a.softmax(-1), F.rms_norm(h, (4,)))

    expected = ["t", "linear", "layer_norm", "scaled_dot_product_attention", "softmax", "rms_norm", "einsum"]
    assert names(trace(f, torch.randn(2, 3))) == expected


def test_nodes_make_one_tensor() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = x.split(2, -1)
        c, d = x.unbind(0)
        e = x.chunk(3, dim=-1)[1]
        return (a * b).sum() + (c * d).sum() + e.sum() + x.max(-1)[0].sum() + x.min(0, keepdim=True).values.sum()

    gm = trace(f, x := torch.randn(2, 4))
    assert not any("getitem" in str(n.target) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(x), f(x))


def test_closed_over_tensors_are_attributes_and_twins_are_apart() -> None:
    x = torch.randn(3, 3)
    gm = trace(lambda a, b: a @ b @ W, x, x)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    (constant,) = [n for n in gm.graph.nodes if n.op == "get_attr"]
    assert len(inputs) == 2
    assert all(len(n.users) == 1 for n in inputs)
    assert getattr(gm, constant.target) is W


def test_source_lines() -> None:
    gm = trace(inplace_relu, torch.randn(2, 3))
    lines = [source_line(n) for n in gm.graph.nodes if n.op == "call_function"]
    assert [line.split("   ")[0] for line in lines] == ["h = x @ W", "h.relu_()", "return h * 2"]
    assert all("test_calculus_trace.py:" in line for line in lines)


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, training=self.training)


def test_dropout_that_is_off_is_nothing() -> None:
    assert names(trace(Dropped().eval(), torch.randn(3))) == []


def branches(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def writes_input(x: Tensor) -> Tensor:
    x.relu_()
    return x


def writes_buffer(x: Tensor) -> Tensor:
    BUFFER.add_(1)
    return x + BUFFER


NORM = nn.BatchNorm1d(3)

REFUSED: list[tuple[Callable[..., Tensor], str]] = [
    (Dropped(), r"F.dropout\(x, 0.1.*is random \(dropout in training mode\)"),
    (lambda x: x + torch.rand(3), r"torch.rand\(3\).*is random"),
    (lambda x: torch.bernoulli(x), "is random"),
    (branches, r"if x.sum\(\) > 0:.*reads a tensor's values"),
    (lambda x: x * x.sum().item(), r"item\(\).*reads a tensor's values"),
    (lambda x: x[x > 0], "reads a tensor's values"),
    (lambda x: torch.tensor(x.tolist()), "reads a tensor's values"),
    (lambda x: torch.tensor(x.numpy()), r"x.numpy\(\).*leaves torch; expected tensor ops"),
    (lambda x: torch.fft.rfft(x).abs().clamp(1).to(torch.complex64).tanh().real, r"tanh.*complex numbers by tanh"),
    (lambda x: torch.fft.rfft(x), r"returns a complex tensor.*Return torch.view_as_real"),
    (lambda x: (x.sum().backward(), x)[1], r"backward\(\).*writes gradients into .grad.*Use torch.autograd.grad"),
    (lambda x: x[0].add_(1), r"add_\(1\).*writes to an input or a buffer.*Clone it first"),
    (writes_input, r"x.relu_\(\).*writes to an input or a buffer"),
    (writes_buffer, r"BUFFER.add_\(1\).*writes to an input or a buffer"),
    (lambda x: NORM(x), "writes to an input or a buffer"),
    (lambda x: x @ torch.zeros(5, 5), r"x @ torch.zeros\(5, 5\).*RuntimeError"),
]


@pytest.mark.parametrize(("f", "message"), REFUSED)
def test_refusals_name_the_line(f: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        trace(f, torch.randn(2, 3))
    assert "test_calculus_trace.py:" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def sorts(x: Tensor) -> tuple[Tensor, ...]:
    values, order = x.sort(0, descending=True)
    middle = x.median(-1)
    top = x.topk(2, dim=1)
    spread, centre = torch.var_mean(x, [0], keepdim=True)
    low, high = x.aminmax(dim=0)
    return (
        values,
        order,
        middle.values,
        middle.indices,
        top[0],
        top[1],
        spread,
        centre,
        low,
        high,
        x.cummax(1)[0],
        x.kthvalue(2, keepdim=True)[0],
    )


def test_values_found_somewhere_are_gathered_there() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = trace(sorts, x)
    for made, expected in zip(gm(x), sorts(x), strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-15)  # a variance is summed in another order


MASK = torch.tensor([[True, False, True], [False, False, True]])
ROW = MASK[1].clone()


def test_closed_over_masks_are_places() -> None:
    x = torch.randn(2, 3)
    for f in (lambda x: x[MASK], lambda x: x.masked_select(ROW), lambda x: x[:, ROW]):
        assert torch.equal(trace(f, x)(x), f(x))


def test_results_of_integers_are_refused_with_a_soft_form() -> None:
    with pytest.raises(
        ValueError, match=r"f returns torch.int64 \(made by argmax\); expected a floating result.*softmax for argmax"
    ):
        jacobian(lambda x: x.argmax(-1), torch.randn(2, 3))


def test_inputs_are_not_touched() -> None:
    x = torch.randn(2, 3)
    before = x.clone()
    with pytest.raises(TraceError):
        trace(writes_input, x)
    assert torch.equal(x, before)


def test_fake_tensors_trace_too() -> None:
    x = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.randn(2, 3))
    assert names(trace(lambda a: (a @ W).exp(), x)) == ["matmul", "exp"]


def test_no_grad_and_detach_stop_derivatives() -> None:
    x = torch.randn(3, dtype=torch.float64)
    assert jacobian(lambda a: a.detach() * 2, x).terms == ()
    torch.testing.assert_close(jacobian(no_grad_part, x).dense(), torch.eye(3, dtype=torch.float64) * x.sum())


def test_inplace_relu_has_the_right_derivative() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    w = W.double()

    def in_place(x: Tensor) -> Tensor:
        h = x @ w
        h.relu_()
        return h * h

    expected = torch.func.jacrev(lambda x: (x @ w).relu().square())(x)
    torch.testing.assert_close(jacobian(in_place, x).dense(), expected)

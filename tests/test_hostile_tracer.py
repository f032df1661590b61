"""What a trace made of a function of plain torch: memory, gradients and values as torch has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.graphs.trace import trace
from dualform.shapes import TraceError


def _no_view(x: Tensor) -> Tensor:
    h = x * 2
    h.t().reshape(-1).zero_()
    torch.flatten(h.t()).zero_()
    h.t().ravel().zero_()
    return h


def _views(x: Tensor) -> Tensor:
    h = x * 2
    h.ravel()[1:].mul_(3)
    h.view_as(torch.empty(12))[0] = 5
    h.reshape_as(torch.empty(2, 6))[1].mul_(x[0, 0])
    h.mT[0] = 1
    h.T[1].mul_(2)
    h.swapaxes(0, 1)[2].mul_(7)
    h.movedim(0, 1)[3].mul_(7)
    torch.atleast_3d(h).mul_(2)
    torch.broadcast_to(h, (3, 4)).mul_(2)
    h.expand(3, 4).mul_(2)
    h.to(torch.float64).mul_(2)
    h.type_as(x).mul_(2)
    return h


def _same_without_gradients(x: Tensor) -> Tensor:
    h = x * 2
    with torch.no_grad():
        y = h.to(x.dtype)
    return h * y


def _operators(x: Tensor) -> Tensor:
    m = x > 0
    m &= x < 1
    m |= x < -1
    m ^= x < -2
    return x * m


@pytest.mark.parametrize("f", [_no_view, _views, _same_without_gradients, _operators])
def test_memory_is_shared_as_in_torch(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(f, x)(x), f(x))
    torch.testing.assert_close(df.jacobian(f, x).dense(), torch.autograd.functional.jacobian(f, x))


def _split(x: Tensor) -> Tensor:
    h = x * 2
    torch.tensor_split(h, 2)[0].mul_(5)
    return h


def _diagonal(x: Tensor) -> Tensor:
    h = x[:, :3] * 2
    torch.einsum("ii->i", h).mul_(5)
    return h


def _data(x: Tensor) -> Tensor:
    h = x * 2
    h.data = x * 5
    return h


@pytest.mark.parametrize("f", [_split, _diagonal, _data])
def test_writes_that_cannot_be_followed_are_refused(f):
    with pytest.raises(TraceError, match=r"writes through|other memory"):
        trace(f, torch.randn(3, 4))


def _narrower(x: Tensor) -> Tensor:
    h = x.float()
    h.add_(x)
    h *= x
    h.pow_(2)
    return h


def _half(x: Tensor) -> Tensor:
    h = x.half()
    h.add_(x.float())
    return h.double()


def _compared(x: Tensor) -> Tensor:
    h = x * 2
    h.gt_(0)
    return h


def _shifted(x: Tensor) -> Tensor:
    n = torch.arange(4)
    n <<= 1
    n |= 1
    n ^= 3
    n >>= 1
    return x * n


@pytest.mark.parametrize("f", [_narrower, _half, _compared, _shifted])
def test_in_place_keeps_the_dtype(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(f, x)(x), f(x))


def _columns(x: Tensor) -> Tensor:
    h = x * 2
    h[:, torch.tensor([1, 3])] = x[:, :2]
    h[:, torch.tensor([True, False, False, False])] = 0
    return h


def test_columns_written_at_places_have_a_derivative():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(df.jacobian(_columns, x).dense(), torch.autograd.functional.jacobian(_columns, x))


def _own_results(x: Tensor) -> Tensor:
    h = x.t().sort(0).values
    h.mul_(2)
    return h


def test_one_of_several_results_may_be_written_to():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(_own_results, x)(x), _own_results(x))


class _Numbers(torch.nn.Module):
    """Numbers that are multiples of the one that stands for rows."""

    def __init__(self):
        super().__init__()
        self.W = torch.nn.Parameter(0.4 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.W).clamp(min=-(2**31 - 1), max=2**31 - 1)
        h = h.div(2**31 - 1).mul(2 * (2**31 - 1))
        h = h + torch.full((4,), 2**31 - 1, dtype=x.dtype) / 2**31 + (torch.arange(4) * (2**31 - 1)) % 5
        return torch.cat([h[..., 1 : 2**31 - 1], x[..., :1]], -1)


class _Rolled(_Numbers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x @ self.W, 2**31 - 1, -1)


def test_large_numbers_of_the_learner_are_no_numbers_of_rows():
    program = df.derive(_Numbers(), rule=df.rules.SGD(lr=0.2), chunk=3, prove=False)
    drawn = torch.Generator().manual_seed(2)
    for B, T, H in [(2, 7, 1), (1, 2, 2)]:
        q, k, v = (torch.randn(B, T, H, 4, dtype=torch.float64, generator=drawn) for _ in range(3))
        got, expected = (program(q, k, v, form=form, backend="eager")[0] for form in ("auto", "primal"))
        torch.testing.assert_close(got, expected)


def test_a_size_that_cannot_be_told_from_rows_is_refused():
    program = df.derive(_Rolled(), chunk=3, prove=False)
    q = torch.zeros(2, 7, 1, 4, dtype=torch.float64)
    with pytest.raises(TraceError, match="has the number"):
        program(q, q, q)


class _Columns(_Numbers):
    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.W).clone()
        h[:, torch.tensor([True, False, False, False])] = 0
        h[..., [1, -1]] = self.W[0, :2]
        return h


def test_a_learner_may_write_columns():
    program = df.derive(_Columns(), rule=df.rules.SGD(lr=0.2), chunk=3, prove=False)
    q, k, v = torch.randn(3, 2, 7, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, expected = (program(q, k, v, form=form, backend="eager")[0] for form in ("auto", "primal"))
    torch.testing.assert_close(got, expected)

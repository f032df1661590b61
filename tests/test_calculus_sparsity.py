"""What scipy is given holds the entries that are not zero for all numbers, and no others; the pattern and its picture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.calculus import hessian, jacobian

pytest.importorskip("scipy")
torch.manual_seed(0)
X = torch.randn(12, dtype=torch.float64)
COPY = X.clone()
M = torch.rand(6, 6, dtype=torch.float64) + 0.5
TABLE = torch.randn(5, 3, dtype=torch.float64)
LINE, PICTURE = (torch.rand(2, 1, *size, dtype=torch.float64) + 0.5 for size in ((3,), (3, 3)))
PLACES, WORDS = torch.tensor([3, 1, 1, 0]), torch.tensor([0, 2, 2, 4])


def overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[3:9] = 0
    return y


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "flip": (lambda x: x.flip(0), X), "gather": (lambda x: x[PLACES], X), "sort": (lambda x: x.sort()[0], X),
    "gather rows": (lambda m: m.gather(1, PLACES[:, None]), M), "pad": (lambda x: F.pad(x, (1, 2)), X),
    "crop": (lambda x: F.pad(x, (-2, 3)), X), "circular": (lambda x: F.pad(x[None], (2, 2), mode="circular"), X),
    "convolution": (lambda x: F.conv1d(x[None, None], LINE, padding=1), X),
    "convolution of a picture": (lambda m: F.conv2d(m[None, None], PICTURE, padding=1, stride=2), M),
    "average": (lambda x: F.avg_pool1d(x[None], 3, 1), X), "largest": (lambda m: F.max_pool2d(m[None, None], 2), M),
    "topk": (lambda x: x.topk(3)[0], X), "embedding": (lambda w: F.embedding(WORDS, w), TABLE),
    "unfold": (lambda x: x.unfold(0, 5, 2), X), "shift": (lambda x: x[1:] - x[:-1], X), "roll": (lambda x: x.roll(3), X),
    "strided": (lambda x: x.as_strided((3, 2), (2, 1), 3), X), "cumsum": (lambda x: x.cumsum(0), X),
    "triangle": (lambda m: m.tril(-1), M), "diagonal": (lambda m: m.diagonal(1), M), "trace": (lambda m: m.trace(), M),
    "embedded": (lambda x: x.diag_embed(1), X), "reshape": (lambda m: m.reshape(4, 9).T.reshape(12, 3), M),
    "product": (lambda m: m @ m.T, M), "kron": (lambda m: torch.kron(m[:2, :2], m[2:4, 2:4]), M),
    "outer": (lambda x: torch.outer(x[:4], x[2:6]), X), "softmax": (lambda m: m.softmax(-1), M),
    "overwritten": (overwritten, X), "sum": (lambda x: x.sum(), X), "nothing": (lambda x: torch.zeros_like(x), X),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_zero_for_all_numbers_is_stored_and_nothing_else(name: str) -> None:
    f, x = FUNCTIONS[name]
    J = jacobian(f, x)
    dense = torch.autograd.functional.jacobian(f, x).reshape(f(x).numel(), x.numel())  # type: ignore[union-attr]
    found, pattern = J.to_scipy_sparse(), J.sparsity()
    torch.testing.assert_close(torch.from_numpy(found.toarray()), dense, rtol=1e-12, atol=1e-12)
    assert found.nnz == pattern.nnz == int((dense != 0).sum())
    assert pattern.dtype == bool
    assert (pattern.toarray() == (dense != 0).numpy()).all()


def test_an_entry_that_is_zero_by_chance_is_one() -> None:
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    J = jacobian(torch.relu, x)
    assert J.dense().count_nonzero() == 1
    assert J.to_scipy_sparse().nnz == J.sparsity().nnz == 2


def test_terms_that_cancel_leave_nothing_whatever_their_numbers_are() -> None:
    J = jacobian(lambda x: x * X, X)
    assert (J - J).sparsity().nnz == 0
    assert (J - jacobian(lambda x: x * COPY, X)).sparsity().nnz == 12, "equal by chance"


def test_second_derivatives_and_half_precision() -> None:
    H = hessian(lambda x: (x[1:] * x[:-1]).sum() + (x**3).sum(), X)
    assert H.to_scipy_sparse().nnz == 3 * 12 - 2
    assert jacobian(lambda x: x[:0], X).to_scipy_sparse().shape == (0, 12)
    half = jacobian(lambda x: 2 * x.flip(0), torch.ones(3, dtype=torch.bfloat16)).to_scipy_sparse()
    assert half.toarray().tolist() == [[0, 0, 2], [0, 2, 0], [2, 0, 0]]


def test_a_large_pattern_needs_no_dense_array() -> None:
    J = jacobian(lambda x: F.avg_pool1d(x[None, None], 4)[0, 0].flip(0), torch.ones(200_000))
    assert J.sparsity().shape == (50_000, 200_000)
    assert J.sparsity().nnz == J.to_scipy_sparse().nnz == 200_000


@pytest.mark.parametrize("size", [7, 700])
def test_the_picture_of_a_pattern_shows_every_entry(size: int) -> None:
    pytest.importorskip("matplotlib")
    J = jacobian(lambda x: x[1:] - x[:-1], torch.ones(size, dtype=torch.float64))
    figure = J.spy()
    figure.draw_without_rendering()
    (panel,) = figure.axes
    assert panel.get_title().startswith(f"{2 * size - 2:,} of {size * (size - 1):,} entries")
    (image,) = panel.images
    shares = torch.tensor(image.get_array().filled(0))
    cell = (size - 1) * size / shares.numel()
    assert shares.sum().item() * cell == pytest.approx(2 * size - 2, rel=1e-5)
    assert jacobian(lambda x: x[:0], X).spy().axes

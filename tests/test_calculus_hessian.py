"""Second derivatives: exact, symmetric, and as structured as the first."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform import hessian

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
generator = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


Z, X, Y, W = rand(5), rand(7, 4), rand(7, 3), rand(4, 3)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "cross-entropy": (lambda z: -z.log_softmax(-1)[2], Z),
    "least squares": (lambda w: 0.5 * ((X @ w - Y) ** 2).sum(), W),
    "entry by entry": (lambda z: z.tanh().sum(), Z),
    "products": (lambda z: (z[:, None] * z).exp().sum(), Z),
    "layer norm": (lambda z: F.layer_norm(z, (5,)).square().sum(), Z),
    "logsumexp": (lambda z: z.logsumexp(0), Z),
    "two layers": (lambda w: (F.gelu(X @ w) ** 2).mean(), W),
    "linear": (lambda z: z.sum(), Z),
    "softplus": (lambda w: F.softplus(X @ w).mean(), W),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x).square().sum(), X),
    "vector": (lambda z: z * z * z.sum(), Z),
    "matrix": (lambda x: x.softmax(-1) @ W, X),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian_is_exact(name: str) -> None:
    f, x = FUNCTIONS[name]
    expected = torch.func.jacrev(torch.func.jacrev(f))(x)
    for _ in range(3):  # interpreted, compiled, filled in
        H = hessian(f, x)
        torch.testing.assert_close(H.dense(), expected, **TIGHT)
    assert H.shape == (*f(x).shape, *x.shape, *x.shape)
    v = torch.ones_like(x)
    torch.testing.assert_close(H.jvp(v), torch.tensordot(expected, v, v.ndim), **TIGHT)
    assert H.is_symmetric == (f(x).ndim == 0)


def test_cross_entropy_is_diag_p_minus_p_p() -> None:
    for f in (lambda z: -z.log_softmax(-1)[2], lambda z: z.logsumexp(0) - z[2]):
        H = hessian(f, Z)
        assert H.structure == "J[i,j] = A[i] δ(i,j) - A[i] A[j]"
        assert H.nbytes == Z.nbytes
        assert "symmetric" in repr(H)


def test_least_squares_is_a_kronecker_product() -> None:
    H = hessian(lambda w: 0.5 * ((X @ w - Y) ** 2).sum(), W)
    assert H.structure == "J[i,j,k,l] = A[i,k] δ(j,l)"
    (factor,) = H.terms[0].tensors
    torch.testing.assert_close(factor.tensor, X.T @ X, **TIGHT)
    assert H.nbytes == 4 * 4 * 8


def test_mixed_partials_mirror() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).square().sum()

    (a, b), (c, d) = hessian(f, X, W, wrt=(0, 1))
    expected: Any = torch.func.jacrev(torch.func.jacrev(f, (0, 1)), (0, 1))(X, W)
    for J, row, column in ((a, 0, 0), (b, 0, 1), (c, 1, 0), (d, 1, 1)):
        torch.testing.assert_close(J.dense(), expected[row][column], **TIGHT)
    stored = {t.untyped_storage().data_ptr() for term in b.terms for t in term.stored}
    assert {t.untyped_storage().data_ptr() for term in c.terms for t in term.stored} == stored


def test_trees_of_second_derivatives() -> None:
    p = {"w": W, "b": rand(3)}
    H = hessian(lambda p: (X @ p["w"] + p["b"]).tanh().sum(), p)
    expected: Any = torch.func.jacrev(torch.func.jacrev(lambda p: (X @ p["w"] + p["b"]).tanh().sum()))(p)
    for row in p:
        for column in p:
            torch.testing.assert_close(H[row][column].dense(), expected[row][column], **TIGHT)


def test_a_second_derivative_explains_itself() -> None:
    text = str(hessian(lambda z: z.logsumexp(0), Z).explain("one-line"))
    assert re.search(r"(p\d?)\[i\] δ\(i,j\) - \1\[i\] \1\[j\]", text)

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


ALONG = torch.arange(1.0, 5, dtype=torch.float64)
LYING: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda x: F.group_norm(x, 2), "group_norm, scaled": lambda x: F.group_norm(x, 2, ALONG, ALONG),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]), "instance_norm": F.instance_norm,
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True), "softmax": lambda x: x.softmax(1),
    "avg_pool": lambda x: F.avg_pool1d(x, 2), "max_pool": lambda x: F.max_pool1d(x, 2),
    "conv": lambda x: F.conv1d(x, ALONG.reshape(1, 4, 1)), "interpolate": lambda x: F.interpolate(x, 5, mode="linear"),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x), "reshape": lambda x: x.reshape(-1),
    "pad": lambda x: F.pad(x, (1, 1), mode="reflect"), "cumprod": lambda x: x.cumprod(1), "glu": lambda x: F.glu(x, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LYING)
def test_hessians_need_no_order_in_memory(name: str) -> None:
    x, f = rand(3, 4, 2).permute(2, 1, 0), LYING[name]
    expected = torch.autograd.functional.hessian(lambda x: (f(x) ** 3).sum(), x)
    for y in (x, x.contiguous()):
        torch.testing.assert_close(hessian(lambda x: (f(x) ** 3).sum(), y).dense(), expected, **TIGHT)


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


S = X.T @ X + 4 * torch.eye(4, dtype=torch.float64)
LOW = S - S[:1] * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)[:, None]  # without an inverse
MATRICES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, int]] = {
    "logdet": (torch.logdet, S, 17), "slogdet": (lambda x: x.slogdet()[1], -S, 16), "det": (torch.det, S, 48), "no inverse": (torch.det, LOW, 48),
    "batch": (torch.logdet, torch.stack([S, 2 * S]), 34), "log of det": (lambda x: x.det().log(), S, 90), "one": (torch.det, S[:1, :1], 0),
    "solve": (lambda x: torch.linalg.solve(x, X[0]).sum() + x.logdet(), S, 60),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_determinants_keep_their_kronecker_structure(name: str) -> None:
    f, x, most = MATRICES[name]
    expected = torch.func.jacrev(torch.func.jacrev(f))(x)
    for _ in range(3):
        H = hessian(f, x)
        torch.testing.assert_close(H.dense(), expected, **TIGHT)
    assert H.nbytes <= 8 * most


def test_second_derivatives_of_norms_and_powers_in_place() -> None:
    def powered(x: Tensor, p: float) -> Tensor:
        y = x.clone()
        y **= p
        return y.sum()

    found: dict[str, Callable[[Tensor], Tensor]] = {f"x **= {p}": lambda x, p=p: powered(x, p) for p in (3, 0.5, -1)}
    for p in (0, 0.5, 1, 2, 3, -1, float("inf"), -float("inf")):
        found[f"norm {p}"] = lambda x, p=p: x.norm(p=p)
        found[f"norms {p}"] = lambda x, p=p: torch.linalg.vector_norm(x, p, dim=1, keepdim=True).sin().sum()
    found |= {
        f"matrix norm {p}": lambda x, p=p: torch.linalg.matrix_norm(x, p) for p in (1, 2, float("inf"), "nuc", "fro")
    }
    for name, f in found.items():
        x = X[:3].abs() + 1
        expected = torch.func.jacrev(torch.func.jacrev(f))(x)
        torch.testing.assert_close(hessian(f, x).dense(), expected, **TIGHT, msg=name)


def test_what_only_gradients_hold_has_rows() -> None:
    norm = torch.nn.BatchNorm1d(4).double().eval()
    for f, x in (
        (lambda x: norm(x).tanh().sum(), X), (lambda x: F.adaptive_avg_pool3d(x, (2, 2, 1)).square().sum(), torch.ones(1, 2, 3, 3, 3).double()),
    ):  # fmt: skip
        torch.testing.assert_close(hessian(f, x).dense(), torch.func.jacrev(torch.func.jacrev(f))(x), **TIGHT)

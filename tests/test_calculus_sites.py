"""Derivatives by parameters: per-sample gradients and norms, Gauss-Newton diagonals, tangent kernels by contraction."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import dualform as df
from dualform.calculus import SiteDerivatives, site_derivatives
from dualform.shapes import ShapeError

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.RMSNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm(self.first(x)))
        return self.last(h + h @ self.first.weight @ self.first.weight.T)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).tanh().mean(1))


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "pooled":
        return Pooled().double(), torch.randint(0, 7, (4, 5))
    if name == "sequence":
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(4, 3, 6).double()
    return Net().double(), torch.randn(4, 6, dtype=torch.float64)


def reference(module: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    p = {name: v.detach() for name, v in module.named_parameters()}
    return p, jacrev(lambda p: functional_call(module, p, (x,)))(p)


@pytest.mark.parametrize("name", ["net", "pooled", "sequence"])
def test_contractions_equal_the_materialised(name: str) -> None:
    module, x = made(name)
    p, J = reference(module, x)
    sites = site_derivatives(module, x)
    assert list(sites) == list(p)
    g = torch.randn(sites.out_shape, dtype=torch.float64)

    def loss(p: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        return (functional_call(module, p, (x[None],))[0] * g).sum()

    expected: Any = vmap(grad(loss), (None, 0, 0))(p, x, g)
    got = sites.per_sample_gradients(g)
    out = g.ndim
    for key in p:
        torch.testing.assert_close(got[key], expected[key], **TIGHT)
        torch.testing.assert_close(sites[key].dense(), J[key], **TIGHT)
        torch.testing.assert_close(sites.gauss_newton_diagonal()[key], J[key].square().sum(tuple(range(out))), **TIGHT)
        weighted = J[key].square() * (g * g).reshape(*g.shape, *[1] * p[key].ndim)
        torch.testing.assert_close(sites.gauss_newton_diagonal(g * g)[key], weighted.sum(tuple(range(out))), **TIGHT)
    norms = sum(v.flatten(1).square().sum(1) for v in expected.values())
    torch.testing.assert_close(sites.per_sample_norms(g), torch.as_tensor(norms).sqrt(), **TIGHT)
    kernel = sum(torch.tensordot(v.flatten(out), v.flatten(out), ([out], [out])) for v in J.values())
    K = sites.ntk()
    assert K.is_symmetric
    torch.testing.assert_close(K.dense(), kernel, **TIGHT)
    torch.testing.assert_close(
        K[0][{K.in_axes[0]: slice(1, 3)}].dense(), kernel[0].movedim(out - 1, 0)[1:3].movedim(0, out - 1), **TIGHT
    )


def test_gauss_newton_with_a_structured_hessian() -> None:
    module, x = made("net")
    p, J = reference(module, x)
    sites = site_derivatives(module, x)
    y = module(x).detach()
    H = df.hessian(lambda y: y.logsumexp(-1).sum(), y)
    assert H.nbytes == y.nbytes
    dense = H.dense()
    for key, diagonal in sites.gauss_newton_diagonal(H).items():
        flat = J[key].flatten(2)
        expected = torch.einsum("bvp,bvcw,cwp->p", flat, dense, flat).view(p[key].shape)
        torch.testing.assert_close(diagonal, expected, **TIGHT)


def test_samples_apart_is_proved() -> None:
    module, x = made("net")
    assert site_derivatives(module, x).samples_are_apart
    assert not site_derivatives(nn.Sequential(nn.Linear(6, 2), nn.Softmax(0)).double(), x).samples_are_apart
    module, x = made("pooled")
    assert not site_derivatives(module, x).samples_are_apart  # integers have no derivative: no proof


def test_kernel_between_two_batches() -> None:
    module, x = made("net")
    other = torch.flip(x, [0])[:3] * 2
    K = site_derivatives(module, x).ntk(site_derivatives(module, other))
    (_, J), (_, L) = reference(module, x), reference(module, other)
    expected = sum(torch.einsum("bvp,cwp->bvcw", J[k].flatten(2), L[k].flatten(2)) for k in J)
    torch.testing.assert_close(K.dense(), expected, **TIGHT)


def test_nothing_is_materialised() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    sites = site_derivatives(module, torch.randn(32, 64))
    assert sites.nbytes * 50 < sites.dense_nbytes
    assert sites["2.weight"].nbytes == 32 * 64 * 4


def test_bad_input_is_refused() -> None:
    module, x = made("net")
    sites = site_derivatives(module, x)
    with pytest.raises(ShapeError, match=r"g has shape \(3,\); expected y's = \(4, 3\)"):
        sites.per_sample_norms(torch.ones(3))
    with pytest.raises(ShapeError, match=r"hessian has shape \(4,\); expected y's = \(4, 3\)"):
        sites.gauss_newton_diagonal(torch.ones(4))
    with pytest.raises(ValueError, match="module has no parameters"):
        site_derivatives(nn.Tanh(), x)
    assert isinstance(sites, SiteDerivatives)
    with pytest.raises(ValueError, match="other has parameters"):
        sites.ntk(site_derivatives(nn.Linear(6, 3).double(), x))


COPIED = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("name", ["net", "pooled"])
def test_they_are_copied_as_their_terms_and_what_is_proved(name: str, copied: Any) -> None:
    module, x = made(name)
    module.hook = lambda: None  # the module itself would not be pickled
    sites = site_derivatives(module, x)
    again = copied(sites)
    assert isinstance(again, SiteDerivatives)
    assert (again.samples_are_apart, again.nbytes) == (name == "net", sites.nbytes)
    g = torch.randn(sites.out_shape, dtype=torch.float64)
    for n, G in sites.per_sample_gradients(g).items():
        torch.testing.assert_close(again.per_sample_gradients(g)[n], G, rtol=0, atol=0)
    torch.testing.assert_close(again.ntk().dense(), sites.ntk().dense(), rtol=0, atol=0)

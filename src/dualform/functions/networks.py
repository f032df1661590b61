"""Networks that people know, as stacks of heads: each record's configuration is the whole definition.

`networks.mlp(dims=(784, 64, 10))` is a value; calling it builds the module, `to_toml()` writes it down. Adapters are
called with the linear map that they adapt.

Legend: dims the widths, input first; m attributes, n outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.catalogue import Catalogue
from dualform.functions.head import Head, HeadConfig
from dualform.functions.layer import Adapter, StackConfig, adapter
from dualform.shapes import fail

networks = Catalogue("networks")


def _stack(name: str, dims: Sequence[int], activation: str = "identity", **options: Any) -> StackConfig:
    if len(dims) < 2:
        fail(name, "dims", f"is {tuple(dims)}", "at least two widths", "Pass (inputs, ..., outputs).", ValueError)
    pairs = zip(dims, dims[1:], strict=False)
    return StackConfig(tuple(HeadConfig(m, n, **options) for m, n in pairs), activation)  # type: ignore[arg-type]


@networks.record(formula="W_K act(... act(W_1 x + b_1)) + b_K", source="Rosenblatt 1958")
def mlp(dims: Sequence[int], activation: str = "relu", bias: bool = True) -> StackConfig:
    """Build a multi-layer perceptron: identity expansion, identity reconciliation.

    Shape:  (..., dims[0]) -> (..., dims[-1]).
    Raises: ValueError for fewer than two widths or an unknown activation.
    Example:
        >>> networks.mlp(dims=(4, 8, 2))()(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    return _stack("mlp", dims, activation, bias=bias)


@networks.record(formula="y_j = sum_i w_ji silu(x_i) + sum_k c_jik B_k(x_i)", source="Liu et al. 2024 (KAN), eq. 2.10")
def kan(dims: Sequence[int], cells: int = 5, degree: int = 3, span: tuple[float, float] = (-1.0, 1.0)) -> StackConfig:
    """Build a Kolmogorov-Arnold network: B-splines on every edge, on a silu base.

    Shape:  (..., dims[0]) -> (..., dims[-1]).
    Differs: the spline's scale w_s is in its coefficients; the grid does not move.
    """
    spline = ("bspline", {"cells": cells, "degree": degree, "span": span})
    base = ("linear", {"activation": "silu", "inside": True})
    return _stack("kan", dims, expansion=spline, remainder=base, bias=False)


@networks.record(aliases=("svm",), formula="y = W phi(x) + b, phi_ik = exp(-(eps (x_i - c_k))^2)", source="Zhang 2024")
def rbf(
    dims: Sequence[int], count: int = 10, span: tuple[float, float] = (-1.0, 1.0), epsilon: float = 1.0
) -> StackConfig:
    """Build an additive radial-basis network: Gaussian bumps on a grid of centres per attribute (no points of R^m).

    Shape:  (..., dims[0]) -> (..., dims[-1]).
    """
    bumps = ("gaussian_rbf", {"count": count, "span": span, "epsilon": epsilon})
    return _stack("rbf", dims, expansion=bumps)


@networks.record(
    formula="y_c = log prior_c + sum_i log N(x_i; mu_ci, var_ci)", source="Maron 1961; Zhang 2024 for the head"
)
def naive_bayes(dims: Sequence[int]) -> StackConfig:
    """Build a Gaussian naive Bayes classifier's joint log-likelihood: two log-densities per attribute span x and x^2.

    Shape:  (..., m) -> (..., classes), dims = (m, classes). `set_naive_bayes` puts means and variances in.
    """
    return _stack("naive_bayes", dims, expansion=("normal", {"theta": ((0, 1), (1, 1))}))


@torch.no_grad()
def set_naive_bayes(head: Head, means: Tensor, variances: Tensor, priors: Tensor) -> Head:
    """Set a head on the log-densities of N(0, 1) and N(1, 1) to the naive Bayes classifier of these moments.

    With f_0, f_1 the two log-densities, x = f_1 - f_0 + 1/2 and x^2 = -2 f_0 - log 2 pi.
    Shape:  means, variances (classes, m), priors (classes,).
    Raises: ShapeError if the head is not one that `networks.naive_bayes` makes, or sizes differ.
    """
    n, m = head.n, head.m
    asked = tuple(getattr(head.expansion, "terms", ()))
    if head.D != 2 * m or head.l != n * 2 * m or head.bias is None or len(asked) != 2:
        advice = "Build it with networks.naive_bayes(dims=(m, classes))."
        fail("set_naive_bayes", "head", f"is {head}", "two normal log-densities, identity psi, a bias", advice)
    if means.shape != (n, m) or variances.shape != (n, m) or priors.shape != (n,):
        found = f"have shapes {tuple(means.shape)}, {tuple(variances.shape)}, {tuple(priors.shape)}"
        fail("set_naive_bayes", "moments", found, f"({n}, {m}), ({n}, {m}), ({n},)", "Pass one row per class.")
    slope, curve = means / variances, 1 / variances
    f0, f1 = curve - slope, slope
    by_attribute = head.expansion.layout == "attribute"
    head.w.copy_(torch.stack([f0, f1], -1 if by_attribute else -2).flatten())
    log_2pi = math.log(2 * math.pi)
    constant = -0.5 * (torch.log(variances) + log_2pi + means * slope) + 0.5 * (log_2pi * curve + slope)
    head.bias.copy_(torch.log(priors) + constant.sum(-1))
    return head


@networks.record(formula="y = W [x, x (x) x, ...] + b, W of rank r if given", source="Zhang 2024")
def taylornet(dims: Sequence[int], degree: int = 2, rank: int | None = None, symmetric: bool = False) -> StackConfig:
    """Build a polynomial network: Taylor expansions, with a low-rank matrix if a rank is given.

    Shape:  (..., dims[0]) -> (..., dims[-1]).
    """
    taylor = ("taylor", {"degree": degree, "symmetric": symmetric})
    psi = "identity" if rank is None else ("low_rank", {"rank": rank})
    return _stack("taylornet", dims, expansion=taylor, reconciliation=psi)


@networks.record(formula="y = linear(x) + (alpha / r) A B x", source="Hu et al. 2021")
def lora(rank: int = 4, alpha: float | None = None) -> Adapter:
    """Adapt a given nn.Linear by a matrix of low rank; alpha = r if not given.

    Shape:  nn.Linear -> Adapted.
    Example:
        >>> networks.lora(rank=2)(torch.nn.Linear(6, 4)).head.w.shape
        torch.Size([20])
    """
    return adapter("low_rank", rank, alpha)


@networks.record(formula="y = linear(x) + (alpha / r) ((A B) * (P Q)) x", source="Hyeon-Woo et al. 2022")
def loha(rank: int = 4, alpha: float | None = None) -> Adapter:
    """Adapt a given nn.Linear by the entrywise product of two matrices of low rank; alpha = r if not given."""
    return adapter("loha", rank, alpha)

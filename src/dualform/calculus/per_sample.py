"""What structured derivatives by parameters are good for: per-sample gradients, norms, Gauss-Newton, tangent kernels.

    g_b = sum_v g[b,v] J[b,v; p]     |g_b|^2 = g_b . g_b     diag(J^T H J)     K = sum_p J_p J_p^T

Each is one contraction of the factors of J; no per-sample weight and no Jacobian is formed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dualform.algebra.linear_map import Derivative
from dualform.algebra.materialise import spread
from dualform.algebra.sums import merged
from dualform.algebra.terms import Term, make_factor
from dualform.calculus.jacobian import jacobian
from dualform.shapes import fail


class SiteDerivatives(Mapping[str, Derivative]):
    """Hold d y / d p for every parameter of a module at an input: a mapping from parameter names to derivatives.

    J[b..., v...; p...] = d y[b..., v...] / d p[p...]; axis 0 of y is the sample (or the token)
    Shape:  y (B, ..., V); each derivative out_shape = y's, in_shape = its parameter's.
    Dtype:  that of y.
    Raises: ShapeError if a gradient does not fit y.
    """

    def __init__(self, derivatives: Mapping[str, Derivative], are_apart: Callable[[], bool] | bool) -> None:
        self._derivatives = dict(derivatives)
        self._are_apart = are_apart

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the derivatives and what is proved of them: the module that they are of stays in the process."""
        return SiteDerivatives, (self._derivatives, self.samples_are_apart)

    def __getitem__(self, name: str) -> Derivative:
        return self._derivatives[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._derivatives)

    def __len__(self) -> int:
        return len(self._derivatives)

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of y."""
        return next(iter(self.values())).out_shape

    @cached_property
    def samples_are_apart(self) -> bool:
        """True proves that y[b] depends on x[b] alone; False too where x has no derivative (integers)."""
        return self._are_apart() if callable(self._are_apart) else self._are_apart

    @property
    def nbytes(self) -> int:
        """Bytes of the factors; those of several parameters share some."""
        return sum(J.nbytes for J in self.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all Jacobians, materialised."""
        return sum(J.dense_nbytes for J in self.values())

    def _weighted(self, J: Derivative, g: Tensor, method: str) -> Derivative:
        """sum over all but the sample of g J: one row per sample."""
        if g.shape != self.out_shape:
            found = f"has shape {tuple(g.shape)}"
            fail(method, "g", found, f"y's = {self.out_shape}", "Pass the loss's gradient by y.")
        terms = [Term(t.coef, (make_factor(g, t.out, "g"), *t.factors), t.out[:1], t.inn) for t in J.terms]
        return Derivative(terms, J.out_shape[:1], J.in_shape, J.dtype, J.device)

    def per_sample_gradients(self, g: Tensor) -> dict[str, Tensor]:
        """Contract to the gradient of each sample's own part of a loss.

        G_p[b, p...] = sum over v of g[b, v...] J_p[b, v...; p...]
        Shape:  g like y -> each (B, *shape of p).
        Dtype:  that of y.
        Raises: ShapeError if g is not shaped like y.
        """
        found = {}
        for name, J in self.items():
            rows = self._weighted(J, g, "per_sample_gradients")
            parts = [spread(t, (*t.out, *t.inn), (), g) for t in rows.terms]
            found[name] = sum(parts[1:], parts[0]) if parts else g.new_zeros(rows.shape)
        return found

    def per_sample_norms(self, g: Tensor) -> Tensor:
        """Contract to the norm of each sample's gradient over all parameters; no gradient is formed.

        n[b]^2 = sum over p of (sum over v of g[b, v] J_p[b, v; p])^2
        Shape:  g like y -> (B,).
        Dtype:  that of y.
        Raises: ShapeError if g is not shaped like y.
        """
        total = torch.zeros(self.out_shape[:1], dtype=g.dtype, device=g.device)
        for J in self.values():
            rows = self._weighted(J, g, "per_sample_norms")
            total = total + (rows @ rows.T).diagonal(0, 0).dense()
        return total.clamp(min=0).sqrt()

    def gauss_newton_diagonal(self, hessian: Derivative | Tensor | None = None) -> dict[str, Tensor]:
        """Contract to the diagonal of the Gauss-Newton matrix of each parameter.

        D_p[p] = sum over o, o' of J_p[o; p] H[o; o'] J_p[o'; p]
        Shape:  `hessian`: of the loss by y, as df.hessian gives it; or its diagonal, shaped like y; None: the identity,
                which is that of half the squared error. -> each shaped like its parameter.
        Dtype:  that of y.
        Raises: ShapeError if the Hessian does not fit y.
        """
        found = {}
        for name, J in self.items():
            right = J if hessian is None else _weights(hessian, self.out_shape) @ J
            M = J.T @ right
            for axis in range(len(J.in_shape)):
                M = M.diagonal(axis, 0)
            found[name] = M.dense()
        return found

    def ntk(self, other: SiteDerivatives | None = None) -> Derivative:
        """Compose the neural tangent kernel, structured: slice it for blocks, `dense()` it for all.

        K[b, v; b', v'] = sum over p of J_p[b, v; p] J'_p[b', v'; p]
        Shape:  y's shape by the other y's.
        Dtype:  that of y.
        Raises: ValueError if the other has other parameters.
        """
        right = self if other is None else other
        if list(right) != list(self):
            found = f"has parameters {list(right)}"
            fail("ntk", "other", found, f"{list(self)}", "Pass the same module's.", ValueError)
        parts = [J @ right[name].T for name, J in self.items()]
        return parts[0].with_terms(merged([t for part in parts for t in part.terms]), symmetric=other is None)


def _weights(hessian: Derivative | Tensor, shape: tuple[int, ...]) -> Derivative:
    if isinstance(hessian, Derivative):
        if (hessian.out_shape, hessian.in_shape) != (shape, shape):
            found = f"is {hessian.out_shape} by {hessian.in_shape}"
            fail("gauss_newton_diagonal", "hessian", found, f"{shape} by {shape}", "Pass df.hessian(loss, y).")
        return hessian
    if tuple(hessian.shape) != shape:
        found = f"has shape {tuple(hessian.shape)}"
        fail("gauss_newton_diagonal", "hessian", found, f"y's = {shape}", "Pass one weight for each entry of y.")
    return jacobian(lambda y, weight: y * weight, torch.zeros_like(hessian), hessian)


def site_derivatives(module: nn.Module, x: Tensor, *args: Any) -> SiteDerivatives:
    """Differentiate a module by each of its parameters at an input, keeping samples and structure apart.

    J_p[b..., v...; p...] = d module(x)[b..., v...] / d p[p...]
    Shape:  x (B, ...) -> module(x, *args) (B, ..., V), one tensor.
    Dtype:  parameters and result floating.
    Raises: ValueError if the module has no parameters; as `jacobian` else (a write to a buffer, randomness, ...).
    Example:
        >>> sites = site_derivatives(nn.Linear(3, 2), torch.ones(5, 3))
        >>> {name: (J.shape, J.nbytes) for name, J in sites.items()}
        {'weight': ((5, 2, 2, 3), 60), 'bias': ((5, 2, 2), 0)}
        >>> sites.per_sample_norms(torch.ones(5, 2))
        tensor([2.8284, 2.8284, 2.8284, 2.8284, 2.8284])
    """
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.is_floating_point()}
    if not parameters:
        fail("site_derivatives", "module", "has no parameters", "at least one", "Use df.jacobian.", ValueError)
    buffers = dict(module.named_buffers())

    def run(p: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, (p, buffers), (x, *args))

    found = jacobian(run, parameters, x, buffers)

    def are_apart() -> bool:
        return x.is_floating_point() and jacobian(run, parameters, x, buffers, wrt=1).is_diagonal(0)

    return SiteDerivatives(found, are_apart)

"""The discrete Fourier transform as two real maps, and their row.

    cosines(x)[..., k, ...] = sum over l of cos(2 pi k l / n) x[..., l, ...]        sines: the same with sin

fft(x) = cosines(x) - i sines(x) for a real x. The matrix is symmetric in k and l, so the adjoint is the same map with
its sizes swapped, and is applied as a transform; the terms hold one matrix, with deltas on all other axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualform.algebra.terms import Term, fresh_axes, make_factor
from dualform.ops.examples import T, call
from dualform.ops.table import ALL, OpCall, row


def _cosines(x: Tensor, dim: int, n: int, out: int) -> Tensor:
    return _spectrum(x, dim, n, out).real.clone()


def _sines(x: Tensor, dim: int, n: int, out: int) -> Tensor:
    return -_spectrum(x, dim, n, out).imag


def _spectrum(x: Tensor, dim: int, n: int, out: int) -> Tensor:
    """The first `out` of n frequencies along dim; x is zero beyond its size."""
    # Not rfft, whose backward writes into a buffer: torch cannot vmap that.
    return torch.fft.fft(x, n, dim).narrow(dim, 0, out)


# Made of torch's own ops, so that autograd, vmap and fake tensors know them; in our traces they stay whole.
for _name, _map in (("cosines", _cosines), ("sines", _sines)):
    torch.library.define(f"dualform::{_name}", "(Tensor x, int dim, int n, int out) -> Tensor")
    torch.library.impl(f"dualform::{_name}", "CompositeImplicitAutograd", _map)
cosines, sines = torch.ops.dualform.cosines.default, torch.ops.dualform.sines.default


def _pulled(call: OpCall, g: Tensor) -> Tensor:
    dim, n = call.bound["dim"], call.bound["n"]
    return call.target(g, dim, n, call.operands[0].shape[dim])


@row(
    "dualform::cosines", "dualform::sines", affine=ALL, adjoint=_pulled,
    examples=[call(op, x, *rest) for op in ("dualform::cosines", "dualform::sines") for x, *rest in ((T("n m"), 0, 3, 3), (T("3 n"), -2, 5, 3), (T("5"), 0, 6, 6))],
)  # fmt: skip
def _transform(call: OpCall, operand: int) -> list[Term]:
    """One matrix on one axis."""
    x, dim, n = call.operands[0], call.bound["dim"] % call.out.ndim, call.bound["n"]
    inn = fresh_axes(x.shape)
    (frequency,) = fresh_axes([call.out.shape[dim]])
    k, l = (torch.arange(shape[dim], device=x.device) for shape in (call.out.shape, x.shape))
    angles = (torch.outer(k, l) % n).double() * (2 * math.pi / n)  # rounded last: 6.3 in float32 is 2e-7 off
    is_cosine = call.target._schema.name.endswith("cosines")
    values, name = (angles.cos(), "cos") if is_cosine else (angles.sin(), "sin")
    wave = make_factor(values.to(x.dtype), (frequency, inn[dim]), name)
    return [Term(1.0, (wave,), (*inn[:dim], frequency, *inn[dim + 1 :]), inn)]

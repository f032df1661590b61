"""Rows of sums and of what is made of sums: means, extrema, softmax, normalisations.

Legend: p a softmax, h the normalised input, r the reciprocal standard deviation, n the number of entries summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualform.calculus.table import ALL, Call, dims_of, row, volume_of
from dualform.calculus.terms import Axis, Factor, Label, Term, fresh_axes, make_factor


def _reduced(call: Call) -> tuple[list[int], tuple[Axis, ...], tuple[Axis, ...]]:
    """The dims that go, the output's axes and the input's."""
    x = call.operands[0]
    dims = dims_of(call.bound.get("dim"), x.ndim)
    inn = fresh_axes(x.shape)
    kept = call.out.ndim == x.ndim
    out = tuple(() if k in dims else axis for k, axis in enumerate(inn) if kept or k not in dims)
    return dims, out, inn


@row("aten::sum", affine=ALL)
def _sum(call: Call, operand: int) -> list[Term]:
    _, out, inn = _reduced(call)
    return [Term(1.0, (), out, inn)]


@row("aten::mean", affine=ALL)
def _mean(call: Call, operand: int) -> list[Term]:
    dims, out, inn = _reduced(call)
    return [Term(1.0 / volume_of(call.operands[0].shape, dims), (), out, inn)]


def _with_dims(call: Call, dims: list[int], out: Tensor) -> Tensor:
    """Give a reduced result its axes of size 1 back."""
    if out.ndim == call.operands[0].ndim:
        return out
    for d in sorted(dims):
        out = out.unsqueeze(d)
    return out


def _slope(
    call: Call, slope: Tensor, name: str, coef: float, inn: tuple[Axis, ...], out: tuple[Axis, ...]
) -> list[Term]:
    return [Term(coef, (make_factor(slope, inn, name),), out, inn)]


@row("aten::var")
def _var(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    dims, out, inn = _reduced(call)
    centred = x - x.mean(dims, keepdim=True)
    return _slope(call, centred, f"({call.operand_name(0)}-mean)", 2.0 / _freedom(call, dims), inn, out)


@row("aten::std")
def _std(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    dims, out, inn = _reduced(call)
    slope = (x - x.mean(dims, keepdim=True)) / _with_dims(call, dims, call.out)
    return _slope(call, slope, "((x-mean)/std)", 1.0 / _freedom(call, dims), inn, out)


def _freedom(call: Call, dims: list[int]) -> float:
    correction = call.bound.get("correction")
    if correction is None:
        correction = 1 if call.bound.get("unbiased", True) else 0
    return max(volume_of(call.operands[0].shape, dims) - float(correction), 0.0) or float("nan")


@row("aten::amax", "aten::amin", "aten::max", "aten::min")
def _extremum(call: Call, operand: int) -> list[Term]:
    if "other" in call.bound or call.part is not None:
        return NotImplemented
    x = call.operands[0]
    dims, out, inn = _reduced(call)
    hit = (x == _with_dims(call, dims, call.out)).to(x.dtype)
    # Ties share the derivative, as torch's own backward has it.
    return _slope(call, hit / hit.sum(dims, keepdim=True), "[extremum]", 1.0, inn, out)


@row("aten::logsumexp")
def _logsumexp(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    dims, out, inn = _reduced(call)
    return _slope(call, (x - _with_dims(call, dims, call.out)).exp(), "p", 1.0, inn, out)


@row("aten::linalg_vector_norm", "aten::norm")
def _norm(call: Call, operand: int) -> list[Term]:
    order = call.bound.get("ord", call.bound.get("p", 2))
    if order is not None and order != 2:
        return NotImplemented
    x = call.operands[0]
    dims, out, inn = _reduced(call)
    whole = _with_dims(call, dims, call.out)
    slope = torch.where(whole == 0, torch.zeros_like(x), x / whole)
    return _slope(call, slope, f"({call.operand_name(0)}/norm)", 1.0, inn, out)


@row("aten::cumsum", affine=ALL)
def _cumsum(call: Call, operand: int) -> list[Term]:
    x = call.operands[0]
    if x.ndim == 0 or x.shape[call.bound["dim"]] == 1:
        axes = fresh_axes(x.shape)
        return [Term(1.0, (), axes, axes)]
    dim = call.bound["dim"] % x.ndim
    inn = fresh_axes(x.shape)
    n = x.shape[dim]
    upto = Label(n)
    mask = torch.ones(n, n, dtype=x.dtype, device=x.device).tril()
    out = (*inn[:dim], (upto,), *inn[dim + 1 :])
    return [Term(1.0, (make_factor(mask, ((upto,), inn[dim]), "tril"),), out, inn)]


def _twin(axes: tuple[Axis, ...], dims: list[int]) -> tuple[Axis, ...]:
    """The same axes with fresh labels on some."""
    return tuple(tuple(Label(x.size, x.name) for x in axis) if k in dims else axis for k, axis in enumerate(axes))


@row("aten::softmax", "aten::_softmax")
def _softmax(call: Call, operand: int) -> list[Term]:
    """dp_j/dx_k = p_j (δ_jk - p_k)."""
    p = call.out
    out = fresh_axes(p.shape)
    inn = _twin(out, dims_of(call.bound["dim"], p.ndim))
    here, there = make_factor(p, out, "p"), make_factor(p, inn, "p")
    return [Term(1.0, (here,), out, out), Term(-1.0, (here, there), out, inn)]


@row("aten::log_softmax", "aten::_log_softmax")
def _log_softmax(call: Call, operand: int) -> list[Term]:
    """d log p_j/dx_k = δ_jk - p_k."""
    out = fresh_axes(call.out.shape)
    inn = _twin(out, dims_of(call.bound["dim"], call.out.ndim))
    return [Term(1.0, (), out, out), Term(-1.0, (make_factor(call.out.exp(), inn, "p"),), out, inn)]


@row("aten::layer_norm", affine=(frozenset({1, 2}),))
def _layer_norm(call: Call, operand: int) -> list[Term]:
    """y_j = w_j h_j + b_j with h = (x - mean) r: dy_j/dx_k = w_j r (δ_jk - 1/n - h_j h_k / n)."""
    b = call.bound
    x, weight = b["input"], b["weight"]
    dims = list(range(x.ndim - len(b["normalized_shape"]), x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    r = (centred.square().mean(dims, keepdim=True) + b["eps"]).rsqrt()
    return _normalised(call, operand, "input", centred * r, r, weight, dims, centred_too=True)


@row("aten::rms_norm", affine=(frozenset({1}),))
def _rms_norm(call: Call, operand: int) -> list[Term]:
    """y_j = w_j h_j with h = x r: dy_j/dx_k = w_j r (δ_jk - h_j h_k / n)."""
    b = call.bound
    x, weight = b["input"], b["weight"]
    dims = list(range(x.ndim - len(b["normalized_shape"]), x.ndim))
    eps = torch.finfo(x.dtype).eps if b["eps"] is None else b["eps"]
    r = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    return _normalised(call, operand, "input", x * r, r, weight, dims, centred_too=False)


def _normalised(
    call: Call,
    operand: int,
    input_name: str,
    h: Tensor,
    r: Tensor,
    weight: Tensor | None,
    dims: list[int],
    centred_too: bool,
) -> list[Term]:
    out = fresh_axes(h.shape)
    where = call.places[operand][0]
    last = tuple(out[d] for d in dims)
    hat = make_factor(h, out, "h")
    if where == "weight":
        return [Term(1.0, (hat,), out, last)]
    if where == "bias":
        return [Term(1.0, (), out, last)]
    assert where == input_name
    outer: tuple[Factor, ...] = (make_factor(r, tuple(() if k in dims else a for k, a in enumerate(out)), "r"),)
    if weight is not None:
        outer = (make_factor(weight, last, _weight_name(call)), *outer)
    n = volume_of(h.shape, dims)
    inn = _twin(out, dims)
    terms = [Term(1.0, outer, out, out), Term(-1.0 / n, (*outer, hat, make_factor(h, inn, "h")), out, inn)]
    if centred_too:
        terms.insert(1, Term(-1.0 / n, outer, out, inn))
    return terms


def _weight_name(call: Call) -> str:
    return next(call.operand_name(k) for k, (name, _) in enumerate(call.places) if name == "weight")

"""Rows of softmax and of the normalisations, whatever they normalise over.

Legend: p a softmax, h the normalised input, r the reciprocal standard deviation, n the number of entries summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dualform.algebra.terms import Axis, Factor, Label, Term, atoms, fresh_axes, make_factor, volume
from dualform.ops.examples import T, call
from dualform.ops.table import OpCall, defined_row, dims_of, row

NM = T("n m")
GAIN = (frozenset({1, 2}),)


def _twin(axes: tuple[Axis, ...], dims: list[int]) -> tuple[Axis, ...]:
    """The same axes with fresh labels on some."""
    return tuple(tuple(Label(x.size, x.name) for x in axis) if k in dims else axis for k, axis in enumerate(axes))


_ALONG = [call("softmax.int", NM, -1), call("softmax.int", T(""), 0), call("softmax.int", T("b n m"), 1)]


def _exponentials(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def _shifted(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    centred = x - x.amax(dim, keepdim=True)
    return centred - torch.log(torch.exp(centred).sum(dim, keepdim=True))


row(
    "aten::_softmax_backward_data", lowered=lambda g, y, dim, dtype: y * (g - (g * y).sum(dim, keepdim=True)),
    examples=[call("", NM, NM, 1, torch.float64)],
)(None)  # fmt: skip
row(
    "aten::_log_softmax_backward_data", lowered=lambda g, y, dim, dtype: g - torch.exp(y) * g.sum(dim, keepdim=True),
    examples=[call("", NM, NM, 1, torch.float64)],
)(None)  # fmt: skip


@row("aten::_softmax", lowered=_exponentials, examples=[call("", NM, 0, False)])
@row("aten::softmax", python="torch.", examples=_ALONG)
@row("aten::special_softmax", "aten::_safe_softmax", examples=[call("", NM, 0)])
def _softmax(call: OpCall, operand: int) -> list[Term]:
    """dp_j/dx_k = p_j (δ_jk - p_k)."""
    p = call.out
    out = fresh_axes(p.shape)
    inn = _twin(out, dims_of(call.bound["dim"], p.ndim))
    here, there = make_factor(p, out, "p"), make_factor(p, inn, "p")
    return [Term(1.0, (here,), out, out), Term(-1.0, (here, there), out, inn)]


@row("aten::_log_softmax", lowered=_shifted, examples=[call("", NM, 1, False)])
@row(
    "aten::log_softmax", "aten::special_log_softmax",
    examples=[call("log_softmax.int", NM, 1), call("log_softmax.int", T(""), 0), call("special_log_softmax", NM, 0)],
)  # fmt: skip
def _log_softmax(call: OpCall, operand: int) -> list[Term]:
    """d log p_j/dx_k = δ_jk - p_k."""
    out = fresh_axes(call.out.shape)
    inn = _twin(out, dims_of(call.bound["dim"], call.out.ndim))
    return [Term(1.0, (), out, out), Term(-1.0, (make_factor(call.out.exp(), inn, "p"),), out, inn)]


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """h and r of x over dims."""
    centred = x - x.mean(dims, keepdim=True)
    r = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * r, r


def _layer_normalised(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _widened(x)
    var, mean = torch.var_mean(wide, list(range(x.ndim - len(shape), x.ndim)), correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = (wide - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), mean.to(x.dtype), rstd.to(x.dtype)


def _layer_normalised_backward(
    g: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    wide, axes = _widened(g), list(range(x.ndim - len(shape), x.ndim))
    N, rest = math.prod(shape), axes[0] if axes else x.ndim
    hat = (_widened(x) - mean) * rstd
    dx = wide if weight is None else wide * weight
    inner = dx * N - torch.sum(dx, axes, True) - hat * torch.sum(dx * hat, axes, True)

    def over_rows(of: Tensor, leaf: Tensor | None, is_wanted: bool) -> Tensor | None:
        if leaf is None or not is_wanted:
            return None
        return (of.sum(list(range(rest))) if rest else of).to(leaf.dtype)

    dweight = over_rows(wide * hat, weight, wanted[1])
    return (((rstd / N) * inner).to(x.dtype) if wanted[0] else None, dweight, over_rows(wide, bias, wanted[2]))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# vmap over native_layer_norm_backward has a wrong derivative when the gain is fast (torch 2.13); torch's own
# definitions are these, and load sympy. A batch norm's statistics have none at all.
row("aten::native_layer_norm_backward", mapped=_layer_normalised_backward, fresh=True)(None)
row(
    "aten::native_group_norm", "aten::native_group_norm_backward", "aten::_fused_rms_norm", "aten::_fused_rms_norm_backward",
    "aten::native_batch_norm", "aten::native_batch_norm_backward", mapped="torch",
)(None)  # fmt: skip


@row(
    "aten::native_layer_norm", affine=GAIN, mapped=_layer_normalised, called=True, fresh=True,
    examples=[call("", NM, [4], T("4"), T("4"), 1e-5)],
)  # fmt: skip
@row(
    "aten::layer_norm", affine=GAIN, ways={"cudnn_enable"},
    examples=[call("", NM, [4], T("4"), T("4")), call("", T("k 3 2"), [3, 2]), call("", T("n 1"), [1])],
)  # fmt: skip
def _layer_norm(call: OpCall, operand: int) -> list[Term]:
    """y_j = w_j h_j + b_j with h = (x - mean) r: dy_j/dx_k = w_j r (δ_jk - 1/n - h_j h_k / n)."""
    if call.part:
        return NotImplemented
    b = call.bound
    dims = list(range(b["input"].ndim - len(b["normalized_shape"]), b["input"].ndim))
    h, r = _standardised(b["input"], dims, b["eps"])
    axes = fresh_axes(h.shape)
    return _normalised(call, operand, axes, h, r, atoms(axes[dims[0] :]), axes[dims[0] :])


@row(
    "aten::rms_norm", affine=(frozenset({1}),),
    examples=[call("", NM, [4], T("4")), call("", NM, [4], None, 0.1), call("", T("k 3 2"), [3, 2])],
)  # fmt: skip
def _rms_norm(call: OpCall, operand: int) -> list[Term]:
    """y_j = w_j h_j with h = x r: dy_j/dx_k = w_j r (δ_jk - h_j h_k / n)."""
    b, x = call.bound, call.bound["input"]
    dims = list(range(x.ndim - len(b["normalized_shape"]), x.ndim))
    eps = torch.finfo(x.dtype).eps if b["eps"] is None else b["eps"]
    r = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    axes = fresh_axes(x.shape)
    return _normalised(call, operand, axes, x * r, r, atoms(axes[dims[0] :]), axes[dims[0] :], centred_too=False)


@row(
    "aten::group_norm", affine=GAIN, ways={"cudnn_enabled"},
    examples=[call("", T("b 4 l"), 2, T("4"), T("4")), call("", T("b 4"), 2), call("", T("1 6 n k"), 3, T("6"), T("6"), 0.1), call("", T("b 4 n"), 4), call("", T("b 3 n"), 1)],
)  # fmt: skip
def _group_norm(call: OpCall, operand: int) -> list[Term]:
    """A channel is (group, member): as layer_norm, over the members and all positions."""
    x, groups = call.bound["input"], call.bound["num_groups"]
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    h, r = _standardised(x.reshape(split), list(range(2, len(split))), call.bound["eps"])
    n, g, member, *places = fresh_axes(split)
    axes = (n, (*g, *member), *places)
    return _normalised(
        call, operand, axes, h, r, atoms((member, *places)), ((*g, *member),), split=(n, g, member, *places)
    )


@row(
    "aten::batch_norm", "aten::instance_norm",  # which operand is which depends on what is given: no claim of affinity
    ways={"cudnn_enabled"}, examples=[
        call("batch_norm", T("b c l"), T("c"), T("c"), T("c"), T("c"), False, 0.1, 1e-5, False),
        call("batch_norm", T("n c"), None, None, T("c"), T("c"), False, 0.1, 1e-5, False),
        call("batch_norm", T("b c l"), T("c"), T("c"), None, None, True, 0.1, 1e-5, False),
        call("instance_norm", T("b c l"), T("c"), T("c"), None, None, True, 0.1, 1e-5, False), call("instance_norm", T("b c l"), None, None, T("c"), T("c"), False, 0.1, 1e-5, False),
    ],
)  # fmt: skip
def _batch_norm(call: OpCall, operand: int) -> list[Term]:
    """With running statistics affine in each channel; with those of the batch, layer_norm over all but the channel."""
    b, x = call.bound, call.bound["input"]
    own = call.target._schema.name == "aten::instance_norm"
    axes = fresh_axes(x.shape)
    channel = (axes[1],)
    if b["use_input_stats"] if own else b["training"]:
        dims = [d for d in range(x.ndim) if d != 1 and not (own and d == 0)]
        h, r = _standardised(x, dims, b["eps"])
        return _normalised(call, operand, axes, h, r, atoms(axes[d] for d in dims), channel)
    along = [-1 if k == 1 else 1 for k in range(x.ndim)]
    mean, r, weight = b["running_mean"], (b["running_var"] + b["eps"]).rsqrt(), b["weight"]
    gain = () if weight is None else (make_factor(weight, channel, _weight_name(call)),)
    scale = (make_factor(r, channel, "r"), *gain)
    where = call.places[operand][0]
    if where == "bias":
        return [Term(1.0, (), axes, channel)]
    if where == "input":
        return [Term(1.0, scale, axes, axes)]
    if where == "running_mean":
        return [Term(-1.0, scale, axes, channel)]
    h = make_factor((x - mean.reshape(along)) * r.reshape(along), axes, "h")
    if where == "weight":
        return [Term(1.0, (h,), axes, channel)]
    rest = (make_factor(r * r, channel, "r²"), *scale[1:])
    return [Term(-0.5, (h, *rest), axes, channel)]


@defined_row(
    "aten::_native_batch_norm_legit_no_training", call("", T("b c l"), T("c"), T("c"), T("c"), T("c"), 0.1, 1e-5)
)
def _batch_norm_evaluated(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch norm that does not train is in torch's gradients."""
    shape = [-1 if k == 1 else 1 for k in range(x.ndim)]
    y = (x - mean.reshape(shape)) * (var + eps).rsqrt().reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), x.new_empty(0), x.new_empty(0)


def _normalised(
    call: OpCall, operand: int, out: tuple[Axis, ...], h: Tensor, r: Tensor, over: Sequence[Label],
    gain: tuple[Axis, ...], centred_too: bool = True, split: tuple[Axis, ...] | None = None,
) -> list[Term]:  # fmt: skip
    """The derivative of w h + b: h, r have axes `split` (or `out`), normalised over labels `over`; w, b have `gain`."""
    where = call.places[operand][0]
    own = out if split is None else split
    hat = make_factor(h, own, "h")
    if where == "weight":
        return [Term(1.0, (hat,), out, gain)]
    if where == "bias":
        return [Term(1.0, (), out, gain)]
    if where != "input":
        return []
    outer: tuple[Factor, ...] = (make_factor(r, tuple(tuple(x for x in a if x not in over) for a in own), "r"),)
    if (weight := call.bound["weight"]) is not None:
        outer = (make_factor(weight, gain, _weight_name(call)), *outer)
    twins = {x: Label(x.size, x.name) for x in over}

    def twin(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(tuple(twins.get(x, x) for x in axis) for axis in axes)

    n = volume(over)
    terms = [Term(1.0, outer, out, out), Term(-1.0 / n, (*outer, hat, make_factor(h, twin(own), "h")), out, twin(out))]
    if centred_too:
        terms.insert(1, Term(-1.0 / n, outer, out, twin(out)))
    return terms


def _weight_name(call: OpCall) -> str:
    return next(call.operand_name(k) for k, (name, _) in enumerate(call.places) if name == "weight")

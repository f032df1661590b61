"""Rows of softmax and of the normalisations, whatever they normalise over.

Legend: p a softmax, h the normalised input, r the reciprocal standard deviation, n the number of entries summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualform.algebra.terms import Axis, Factor, Label, Term, fresh_axes, make_factor, volume
from dualform.ops.examples import T, call
from dualform.ops.table import Call, dims_of, row

NM = T("n m")
GAIN = (frozenset({1, 2}),)


def _twin(axes: tuple[Axis, ...], dims: list[int]) -> tuple[Axis, ...]:
    """The same axes with fresh labels on some."""
    return tuple(tuple(Label(x.size, x.name) for x in axis) if k in dims else axis for k, axis in enumerate(axes))


_ALONG = [call("softmax.int", NM, -1), call("softmax.int", T(""), 0), call("softmax.int", T("b n m"), 1)]


@row(
    "aten::softmax",
    "aten::_softmax",
    "aten::special_softmax",
    "aten::_safe_softmax",
    examples=[*_ALONG, call("_softmax", NM, 0, False), call("special_softmax", NM, 0), call("_safe_softmax", NM, 0)],
)
def _softmax(call: Call, operand: int) -> list[Term]:
    """dp_j/dx_k = p_j (δ_jk - p_k)."""
    p = call.out
    out = fresh_axes(p.shape)
    inn = _twin(out, dims_of(call.bound["dim"], p.ndim))
    here, there = make_factor(p, out, "p"), make_factor(p, inn, "p")
    return [Term(1.0, (here,), out, out), Term(-1.0, (here, there), out, inn)]


@row(
    "aten::log_softmax", "aten::_log_softmax", "aten::special_log_softmax",
    examples=[call("log_softmax.int", NM, 1), call("log_softmax.int", T(""), 0), call("_log_softmax", NM, 1, False), call("special_log_softmax", NM, 0)],
)  # fmt: skip
def _log_softmax(call: Call, operand: int) -> list[Term]:
    """d log p_j/dx_k = δ_jk - p_k."""
    out = fresh_axes(call.out.shape)
    inn = _twin(out, dims_of(call.bound["dim"], call.out.ndim))
    return [Term(1.0, (), out, out), Term(-1.0, (make_factor(call.out.exp(), inn, "p"),), out, inn)]


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """h and r of x over dims."""
    centred = x - x.mean(dims, keepdim=True)
    r = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * r, r


@row(
    "aten::layer_norm", "aten::native_layer_norm", affine=GAIN,
    examples=[
        call("layer_norm", NM, [4], T("4"), T("4")), call("layer_norm", T("k 3 2"), [3, 2]), call("layer_norm", T("n 1"), [1]),
        call("native_layer_norm", NM, [4], T("4"), T("4"), 1e-5),
    ],
)  # fmt: skip
def _layer_norm(call: Call, operand: int) -> list[Term]:
    """y_j = w_j h_j + b_j with h = (x - mean) r: dy_j/dx_k = w_j r (δ_jk - 1/n - h_j h_k / n)."""
    if call.part:
        return NotImplemented
    b = call.bound
    dims = list(range(b["input"].ndim - len(b["normalized_shape"]), b["input"].ndim))
    h, r = _standardised(b["input"], dims, b["eps"])
    axes = fresh_axes(h.shape)
    return _normalised(call, operand, axes, h, r, [label for d in dims for label in axes[d]], axes[dims[0] :])


@row(
    "aten::rms_norm",
    affine=(frozenset({1}),),
    examples=[call("", NM, [4], T("4")), call("", NM, [4], None, 0.1), call("", T("k 3 2"), [3, 2])],
)
def _rms_norm(call: Call, operand: int) -> list[Term]:
    """y_j = w_j h_j with h = x r: dy_j/dx_k = w_j r (δ_jk - h_j h_k / n)."""
    b, x = call.bound, call.bound["input"]
    dims = list(range(x.ndim - len(b["normalized_shape"]), x.ndim))
    eps = torch.finfo(x.dtype).eps if b["eps"] is None else b["eps"]
    r = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    axes = fresh_axes(x.shape)
    over = [label for d in dims for label in axes[d]]
    return _normalised(call, operand, axes, x * r, r, over, axes[dims[0] :], centred_too=False)


@row(
    "aten::group_norm", affine=GAIN,
    examples=[
        call("", T("b 4 l"), 2, T("4"), T("4")), call("", T("b 4"), 2), call("", T("1 6 n k"), 3, T("6"), T("6"), 0.1), call("", T("b 4 n"), 4), call("", T("b 3 n"), 1),
    ],
)  # fmt: skip
def _group_norm(call: Call, operand: int) -> list[Term]:
    """A channel is (group, member): as layer_norm, over the members and all positions."""
    x, groups = call.bound["input"], call.bound["num_groups"]
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    h, r = _standardised(x.reshape(split), list(range(2, len(split))), call.bound["eps"])
    n, g, member, *places = fresh_axes(split)
    axes = (n, (*g, *member), *places)
    over = [*member, *(label for axis in places for label in axis)]
    return _normalised(call, operand, axes, h, r, over, ((*g, *member),), split=(n, g, member, *places))


@row(
    "aten::batch_norm", "aten::instance_norm",  # which operand is which depends on what is given: no claim of affinity
    examples=[
        call("batch_norm", T("b c l"), T("c"), T("c"), T("c"), T("c"), False, 0.1, 1e-5, False),
        call("batch_norm", T("n c"), None, None, T("c"), T("c"), False, 0.1, 1e-5, False),
        call("batch_norm", T("b c l"), T("c"), T("c"), None, None, True, 0.1, 1e-5, False),
        call("instance_norm", T("b c l"), T("c"), T("c"), None, None, True, 0.1, 1e-5, False), call("instance_norm", T("b c l"), None, None, T("c"), T("c"), False, 0.1, 1e-5, False),
    ],
)  # fmt: skip
def _batch_norm(call: Call, operand: int) -> list[Term]:
    """With running statistics, an affine map of each channel; with those of the batch, as layer_norm over all but the channel."""
    b, x = call.bound, call.bound["input"]
    own = call.target._schema.name == "aten::instance_norm"
    axes = fresh_axes(x.shape)
    channel = (axes[1],)
    if b["use_input_stats"] if own else b["training"]:
        dims = [d for d in range(x.ndim) if d != 1 and not (own and d == 0)]
        h, r = _standardised(x, dims, b["eps"])
        return _normalised(call, operand, axes, h, r, [label for d in dims for label in axes[d]], channel)
    along = [-1 if k == 1 else 1 for k in range(x.ndim)]
    mean, r, weight = b["running_mean"], (b["running_var"] + b["eps"]).rsqrt(), b["weight"]
    scale = (
        make_factor(r, channel, "r"),
        *([] if weight is None else [make_factor(weight, channel, _weight_name(call))]),
    )
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


def _normalised(
    call: Call,
    operand: int,
    out: tuple[Axis, ...],
    h: Tensor,
    r: Tensor,
    over: Sequence[Label],
    gain: tuple[Axis, ...],
    centred_too: bool = True,
    split: tuple[Axis, ...] | None = None,
) -> list[Term]:
    """The derivative of w h + b: h and r have axes `split` (or `out`), normalised over the labels `over`; w, b have `gain`."""
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


def _weight_name(call: Call) -> str:
    return next(call.operand_name(k) for k, (name, _) in enumerate(call.places) if name == "weight")

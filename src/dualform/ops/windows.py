"""Rows of the ops that slide a window over the last axes: convolutions, pooling, unfolding, resampling.

    out[n, (g, o), i...] = sum over c, k of x[n, (g, c), stride i + dilation k - padding ...] w[(g, o), c, k...]

The places are relations between the axes, and stored as such; what reaches over the border is zero.
Legend: n batch, g groups, c and o channels in and out, i output place, k place in the window, p input place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualform.algebra.relations import Window, window
from dualform.algebra.terms import Axis, Factor, Relation, Term, atoms, fresh_axes, make_factor
from dualform.ops.examples import T, call
from dualform.ops.indexing import lookup
from dualform.ops.table import ALL, OpCall, row

aten = torch.ops.aten


def _each(value: Any, rank: int) -> list[int]:
    """One number for each sliding axis, given one, a list of one, or a list."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _convolved(
    call: OpCall, operand: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    transposed: bool,
) -> list[Term]:  # fmt: skip
    """The module's equation; transposed, x and out change places in it."""
    x, weight = call.bound["input"], call.bound["weight"]
    rank = weight.ndim - 2
    batch = fresh_axes(x.shape[: x.ndim - rank - 1])
    (group,) = fresh_axes([groups])
    first, second = fresh_axes([weight.shape[0] // groups, weight.shape[1]])
    taps = fresh_axes(weight.shape[2:])
    seen, made = fresh_axes(x.shape[x.ndim - rank :]), list(fresh_axes(call.out.shape[call.out.ndim - rank :]))
    inside, outside = (made, seen) if not transposed else (seen, made)
    relations: list[Relation] = []
    for k in range(rank):
        one_each = not taps[k] and stride[k] == 1 and x.shape[k - rank] == call.out.shape[k - rank]
        if one_each and padding[k] == 0:
            made[k] = seen[k]
        else:
            relations += _slide(inside[k], taps[k], outside[k], -padding[k], stride[k], dilation[k])
    channels = ((*group, *first), (*group, *second))
    x_channel, out_channel = channels if transposed else channels[::-1]
    axes = {"input": (*batch, x_channel, *seen), "weight": ((*group, *first), second, *taps), "bias": (out_channel,)}
    out = (*batch, out_channel, *made)
    where = call.places[operand][0]
    if where == "bias":
        return [Term(1.0, (), out, axes["bias"])]
    other = "weight" if where == "input" else "input"
    name = call.operand_name(next(k for k, (n, _) in enumerate(call.places) if n == other))
    return [Term(1.0, (make_factor(call.bound[other], axes[other], name), *relations), out, axes[where])]


def _kept_lead(call: OpCall, rank: int) -> tuple[tuple[Axis, ...], list[Axis]]:
    """Axes of the operand and of the result, which share all but the last."""
    inn, out = fresh_axes(call.operands[0].shape), list(fresh_axes(call.out.shape))
    return inn, [*inn[: len(inn) - rank], *out[len(out) - rank :]]


def _slide(inside: Axis, tap: Axis, outside: Axis, start: int, stride: int, dilation: int) -> tuple[Relation, ...]:
    return window([inside, tap], outside, start, [stride, dilation])


def _same(weight: Tensor, dilation: list[int], padding: str) -> list[int]:
    """How far the window starts before the input: for "same", half of what it overlaps, the odd one after."""
    return [d * (k - 1) // 2 if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]


JOINT = (frozenset({0, 2}), frozenset({1, 2}))
_CONVOLUTIONS = [
    call("conv1d", T("b c l"), T("o c 3"), T("o"), [1], [1]), call("conv1d", T("c l"), T("o c 2"), None, [2], [0], [2]),
    call("conv1d.padding", T("b 1 l"), T("o 1 4"), None, [1], "same", [1]), call("conv1d", T("b c l"), T("4 1 1"), None, [1], [0], [1], 4),
    call("conv1d", T("b 4 l"), T("6 2 3"), T("6"), [2], [1], [1], 2), call("conv1d.padding", T("b c l"), T("o c 3"), T("o"), [1], "valid"),
    call("conv2d", T("b c h w"), T("k c 2 3"), T("k"), [2, 1], [1, 0], [1, 2]), call("conv2d", T("1 4 h w"), T("4 1 2 2"), None, [1], [1], [1], 4),
    call("conv2d.padding", T("1 k h w"), T("3 k 3 2"), None, [1], "same", [1, 2]), call("conv2d", T("1 1 h w"), T("1 1 1 1")),
    call("conv3d", T("1 k 3 3 4"), T("2 k 2 2 2"), T("2"), [1], [1]), call("conv3d.padding", T("1 1 3 3 4"), T("2 1 2 1 3"), None, [1], "same"),
]  # fmt: skip


@row("aten::conv1d", "aten::conv2d", "aten::conv3d", affine=JOINT, sizes={"groups"}, examples=_CONVOLUTIONS)
@row(
    "aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d", affine=JOINT, sizes={"groups"},
    examples=[
        call("conv_transpose1d", T("b c l"), T("c o 3"), T("o"), [2], [1], [1]), call("conv_transpose1d", T("c l"), T("c 2 2")),
        call("conv_transpose2d.input", T("1 4 3 2"), T("4 3 2 3"), T("6"), [2, 1], [1], [0], 2, [1, 2]),
        call("conv_transpose3d.input", T("1 k 2 2 3"), T("k 1 2 1 2")),
    ],
)  # fmt: skip
@row(
    "aten::convolution", "aten::_convolution", affine=JOINT, sizes={"groups"},
    examples=[
        call("convolution", T("b c l"), T("o c 3"), T("o"), [2], [1], [1], False, [0], 1),
        call("convolution", T("b c l"), T("c o 3"), None, [2], [1], [1], True, [1], 1),
        call("_convolution.deprecated", T("b c l"), T("o c 3"), T("o"), [2], [1], [1], False, [0], 1, False, False, False),
    ],
)  # fmt: skip
def _convolution(call: OpCall, operand: int) -> list[Term]:
    b, weight = call.bound, call.bound["weight"]
    rank = weight.ndim - 2
    stride, dilation = _each(b["stride"], rank), _each(b["dilation"], rank)
    padding = _same(weight, dilation, b["padding"]) if isinstance(b["padding"], str) else _each(b["padding"], rank)
    transposed = b.get("transposed", "transpose" in call.target._schema.name)
    return _convolved(call, operand, stride, padding, dilation, b["groups"], transposed)


@row(
    "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d", affine=ALL,
    examples=[
        call("avg_pool1d", T("b c l"), 3, 2, 1), call("avg_pool1d", T("c l"), 2, 3, 1, True, False), call("avg_pool2d", T("b k h w"), 2),
        call("avg_pool2d", T("k h w"), [2, 3], [1, 2], [1, 1], False, False), call("avg_pool2d", T("1 k h w"), 2, 3, 0, True, True, 5),
        call("avg_pool2d", T("1 1 h w"), 3, 2, 1, True), call("avg_pool3d", T("1 k 3 2 4"), 2),
    ],
)  # fmt: skip
def _average_pool(call: OpCall, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    rank = int(call.target._schema.name[-2])
    size = _each(b["kernel_size"], rank)
    stride = _each(b["stride"], rank) if b["stride"] else size
    padding = _each(b["padding"], rank)
    (inn, out), lead = _kept_lead(call, rank), x.ndim - rank
    relations: list[Relation] = []
    shares: list[Factor] = []
    coef = 1.0 if not b.get("divisor_override") else 1.0 / b["divisor_override"]
    for k in range(rank):
        (tap,) = fresh_axes([size[k]])
        axis, border = lead + k, padding[k] if b["count_include_pad"] else 0
        relations += _slide(out[axis], tap, inn[axis], -padding[k], stride[k], 1)
        if b.get("divisor_override"):
            continue
        starts = (i * stride[k] - padding[k] for i in range(call.out.shape[axis]))
        # How many places of a window are counted: those inside, and those on the border if that counts.
        counts = [min(start + size[k], x.shape[axis] + border) - max(start, -border) for start in starts]
        if len(set(counts)) == 1:
            coef /= counts[0]
        else:
            share = torch.tensor([1 / n for n in counts], dtype=x.dtype, device=x.device)
            shares.append(make_factor(share, (out[axis],), "1/count"))
    return [Term(coef, (*shares, *relations), tuple(out), inn)]


@row(
    "aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d", "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d",
    affine=ALL,
    examples=[
        call("adaptive_avg_pool1d", T("b c l"), [3]), call("adaptive_avg_pool1d", T("b c 6"), [2]), call("adaptive_avg_pool2d", T("b k h w"), [2, 3]),
        call("adaptive_avg_pool2d", T("k h w"), [1, 6]), call("_adaptive_avg_pool2d", T("b k h w"), [1, 4]), call("adaptive_avg_pool3d", T("1 k 2 4 3"), [2, 2, 2]),
        call("_adaptive_avg_pool3d", T("1 k 2 4 3"), [2, 2, 2]),
    ],
)  # fmt: skip
def _adaptive_average_pool(call: OpCall, operand: int) -> list[Term]:
    """Equal windows where the sizes divide; else one small matrix of shares for each axis."""
    x, rank = call.operands[0], len(call.bound["output_size"])
    inn, out = _kept_lead(call, rank)
    coef, factors = 1.0, []
    for k in range(x.ndim - rank, x.ndim):
        n, m = x.shape[k], call.out.shape[k]
        if n == m:
            out[k] = inn[k]
        elif n % m == 0:
            (tap,) = fresh_axes([n // m])
            factors += _slide(out[k], tap, inn[k], 0, n // m, 1)
            coef /= n // m
        else:
            shares = torch.zeros(m, n, dtype=x.dtype)
            for i in range(m):
                start, end = i * n // m, -(-(i + 1) * n // m)
                shares[i, start:end] = 1 / (end - start)
            factors.append(make_factor(shares.to(x.device), (out[k], inn[k]), "share"))
    return [Term(coef, tuple(factors), tuple(out), inn)]


@row(
    "aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d", "aten::max_pool2d_with_indices",
    "aten::max_pool3d_with_indices", "aten::max_pool1d_with_indices", "aten::adaptive_max_pool1d",
    "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d",
    examples=[
        call("max_pool1d", T("b c l"), 3, 2, 1), call("max_pool2d", T("b k h w"), 2), call("max_pool2d", T("k h w"), [2, 3], [1, 2], 1, 1, True),
        call("max_pool3d", T("1 k 3 2 4"), 2), call("max_pool2d", T("1 1 h w"), 2, 1, 0, 2), call("max_pool2d_with_indices", T("b k h w"), 2),
        call("max_pool3d_with_indices", T("1 k 3 2 4"), 2), call("max_pool1d_with_indices", T("b c l"), 3),
        call("adaptive_max_pool1d", T("b c l"), [3]), call("adaptive_max_pool2d", T("b k h w"), [2, 3]),
        call("adaptive_max_pool3d", T("1 k 3 2 4"), [2, 2, 2]),
    ],
)  # fmt: skip
def _max_pool(call: OpCall, operand: int) -> list[Term]:
    """Each output reads the place of its maximum."""
    x, name = call.operands[0], call.target._schema.name.removeprefix("aten::").removesuffix("_with_indices")
    rank = int(name[-2])
    with_indices = getattr(aten, name if name.startswith("adaptive") else f"{name}_with_indices")
    _, index = with_indices(*call.args, **call.kwargs)
    inn, out = _kept_lead(call, rank)
    return [Term(1.0, lookup(out, atoms(inn[x.ndim - rank :]), index), tuple(out), inn)]


def _windows(x: Tensor, axis: int, size: int, step: int) -> Tensor:
    if not x.ndim:
        return x.expand(1)
    axis, starts = axis % x.ndim, range(0, x.shape[axis] - size + 1, step)
    return torch.stack([x.narrow(axis, s, size).movedim(axis, -1) for s in starts], axis)


# vmap's is a loop over rows.
row("aten::unfold_backward", mapped="torch", examples=[call("", T("4 k 2"), [5, 2], 0, 2, 1)])(None)


@row(
    "aten::unfold", affine=ALL, lowered=_windows,
    examples=[call("", T("l k"), 0, 3, 2), call("", T("n l"), 1, 2, 1), call("", T("n"), -1, 1, 2), call("", T("4"), 0, 4, 1)],
)  # fmt: skip
def _unfold(call: OpCall, operand: int) -> list[Term]:
    x, b = call.operands[0], call.bound
    if x.ndim == 0:
        axes = fresh_axes(call.out.shape)
        return [Term(1.0, (), axes, ())]
    dim = b["dimension"] % x.ndim
    inn = fresh_axes(x.shape)
    place, tap = fresh_axes([call.out.shape[dim], b["size"]])
    relations = window([place, tap], inn[dim], 0, [b["step"], 1])
    return [Term(1.0, relations, (*inn[:dim], place, *inn[dim + 1 :], tap), inn)]


@row(
    "aten::as_strided", affine=ALL, examples=[call("", T("12", "flat"), [3, 2], [2, 1], 1), call("", T("3 4", "flat"), [3, 3], [4, 1])],
)  # fmt: skip
def _as_strided(call: OpCall, operand: int) -> list[Term]:
    """A window over the numbers as they lie in memory."""
    x, b = call.operands[0], call.bound
    if not x.is_contiguous():
        return NotImplemented
    inn, out = fresh_axes(x.shape), fresh_axes(call.out.shape)
    start = 0 if b["storage_offset"] is None else int(b["storage_offset"]) - int(x.storage_offset())
    steps = [n for n, axis in zip(b["stride"], out, strict=True) if axis]
    return [Term(1.0, (Window(atoms(out), atoms(inn), start, tuple(steps)),), out, inn)]


def _columns(call: OpCall, image: torch.Size) -> tuple[tuple[Axis, ...], tuple[Relation, ...], tuple[Axis, ...]]:
    """Axes of an image (n, c, p, q), of its columns (n, (c, k, l), (i, j)), and the windows between."""
    b = call.bound
    size, stride, padding, dilation = (_each(b[name], 2) for name in ("kernel_size", "stride", "padding", "dilation"))
    whole = fresh_axes(image)
    *lead, p, q = whole
    reach = [image[len(image) - 2 + k] + 2 * padding[k] - dilation[k] * (size[k] - 1) for k in (0, 1)]
    places = [(n - 1) // step + 1 for n, step in zip(reach, stride, strict=True)]
    taps, at = fresh_axes(size), fresh_axes(places)
    relations: list[Relation] = []
    for k, axis in enumerate((p, q)):
        relations += _slide(at[k], taps[k], axis, -padding[k], stride[k], dilation[k])
    return whole, tuple(relations), (*lead[:-1], (*lead[-1], *taps[0], *taps[1]), (*at[0], *at[1]))


@row(
    "aten::im2col", affine=ALL,
    examples=[call("", T("b k h w"), [2, 3], [1, 1], [1, 0], [2, 1]), call("", T("k h w"), [2, 2], [1, 1], [0, 0], [1, 1])],
)  # fmt: skip
@row(
    "aten::col2im", affine=ALL,
    examples=[call("", T("b 8 9"), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), call("", T("8 9"), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])],
)  # fmt: skip
def _column_map(call: OpCall, operand: int) -> list[Term]:
    is_back = call.target._schema.name == "aten::col2im"
    image, relations, columns = _columns(call, call.out.shape if is_back else call.operands[0].shape)
    return [Term(1.0, relations, image, columns) if is_back else Term(1.0, relations, columns, image)]


# Resampling: one small matrix for each axis
@row(
    "aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d", "aten::upsample_linear1d",
    "aten::upsample_bilinear2d", "aten::upsample_trilinear3d", "aten::upsample_bicubic2d", "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact2d", "aten::_upsample_nearest_exact3d", affine=ALL,
    examples=[
        call("upsample_nearest1d", T("b c l"), [9]), call("upsample_nearest2d", T("b k 3 w"), [6, 4]), call("upsample_linear1d", T("b c l"), [5], True),
        call("upsample_bilinear2d", T("b k 3 4"), [5, 6], False), call("upsample_bicubic2d", T("1 k 3 4"), [5, 6], True),
        call("upsample_trilinear3d", T("1 k 2 3 2"), [3, 2, 4], False), call("_upsample_nearest_exact1d", T("b c l"), [9]),
        call("upsample_nearest2d.vec", T("b k 3 4"), None, [2.0, 1.5]), call("upsample_bilinear2d.vec", T("b k 3 4"), None, False, [2.0, 1.5]),
        call("upsample_nearest3d", T("1 k 2 3 2"), [3, 2, 4]), call("_upsample_nearest_exact2d", T("b k 3 w"), [6, 4]),
        call("_upsample_nearest_exact3d", T("1 k 2 3 2"), [3, 2, 4]),
    ],
)  # fmt: skip
def _resampled(call: OpCall, operand: int) -> list[Term]:
    """Each axis by itself: its matrix is the op applied to the identity of that axis, the others of size 1."""
    x = call.operands[0]
    inn, out = _kept_lead(call, x.ndim - 2)
    factors = []
    for k in range(2, x.ndim):
        n, m = x.shape[k], call.out.shape[k]
        if n == m:
            out[k] = inn[k]
            continue
        rest = x.shape[2:]
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        basis = eye.reshape([n, 1, *(n if j == k else 1 for j in range(2, x.ndim))]).expand(n, 1, *rest)
        moved = call.run(0, basis.contiguous())
        share = moved[(slice(None), 0, *(slice(None) if j == k else 0 for j in range(2, x.ndim)))]
        factors.append(make_factor(share.reshape(n, m), (inn[k], out[k]), "share"))
    return [Term(1.0, tuple(factors), tuple(out), inn)]

"""Which ops a schedule is made of, and how each reads: a row per op.

MAPS        op -> (entry, operands, parameters)   entry by entry; a dialect says how it spells an entry, by name
REDUCTIONS  op -> (entry, operands, parameters)   over axes
PRODUCTS    op -> factors and summand             matrix products
PIECES      op -> (place, value), ...             put together from pieces
VIEWS                                             the same memory, read otherwise
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dualform.learning.backends import BackendError

aten = torch.ops.aten


class Unsupported(BackendError):
    """An op that has no row here."""

    def __init__(self, node: fx.Node, line: str = "") -> None:
        where = f" at {line}" if line else ""
        super().__init__(
            f"cpp: the op {node.target}{where} has no row in kernels/ops.py; expected one of {len(MAPS)} maps, "
            f"{len(REDUCTIONS)} reductions, {len(PRODUCTS)} products, views. Use backend='eager', or add its row."
        )
        self.node = node


VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.select.int, aten.slice.Tensor,
    aten.expand.default, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.diagonal.default, aten.detach.default,
    aten.alias.default,
}  # fmt: skip

Row = tuple[str, list[Any], dict[str, Any]]
MAPS: dict[Any, Callable[[fx.Node], Row]] = {}
REDUCTIONS: dict[Any, Callable[[fx.Node], Row]] = {}
PRODUCTS: dict[Any, Callable[..., Any]] = {}
PIECES: dict[Any, Callable[..., Any]] = {}


# Entry by entry, of so many operands and without parameters: name, name.overload, or either = entry.
for _count, _names in {
    0: "eye.default eye.m",
    1: "neg exp log tanh sigmoid erf sqrt abs rsqrt reciprocal sin cos sign relu log1p expm1 atan sinh cosh floor lgamma tan asin acos ceil "
       "trunc round.default asinh acosh atanh erfc exp2 log2 log10 signbit isnan isinf digamma erfinv logical_not.default=not "
       "special_ndtri.default=ndtri special_erfcx.default=erfcx special_erfc.default=erfc clone.default=copy contiguous.default=copy "
       "lift_fresh_copy.default=copy",
    2: "mul.Tensor mul.Scalar div.Tensor div.Scalar eq ne ge gt le lt rsub.Scalar pow.Tensor_Tensor pow.Scalar maximum.default=max "
       "minimum.default=min atan2 hypot fmod remainder copysign fmax fmin floor_divide logical_and.default=and logical_or.default=or "
       "logical_xor.default=xor __lshift__=shift_left bitwise_left_shift=shift_left __rshift__=shift_right bitwise_right_shift=shift_right",
    3: "where.self where.ScalarSelf where.ScalarOther where.Scalar",
}.items():  # fmt: skip
    for _op, _, _entry in (x.partition("=") for x in _names.split()):
        _name, _, _overload = _op.partition(".")
        _packet = getattr(aten, _name)
        for _x in [_overload] if _overload else _packet.overloads():
            MAPS[getattr(_packet, _x)] = lambda n, k=_count, e=_entry or _name: (e, list(n.args[:k]), {})


def _row(*targets: Any, table: dict[Any, Any] = MAPS) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for target in targets:
            table[target] = function
        return function

    return add


def _name_of(n: fx.Node) -> str:
    target: Any = n.target
    return target._schema.name.removeprefix("aten::")


@_row(
    aten.bitwise_not.default,
    *(getattr(getattr(aten, f"bitwise_{x}"), y) for x in ("and", "or", "xor") for y in ("Tensor", "Scalar", "Scalar_Tensor")),
)  # fmt: skip
def _bits(n: fx.Node) -> Row:
    name = _name_of(n).rpartition("_")[2]
    name = name if n.meta["val"].dtype == torch.bool else f"bits_{name}"
    return name, list(n.args[:1] if "not" in name else n.args[:2]), {}


@_row(aten._to_copy.default)
def _cast(n: fx.Node) -> Row:
    x: Any = n.args[0]
    before, after = x.meta["val"].dtype, n.meta["val"].dtype
    if after == torch.bool:
        return "nonzero", [x], {}
    return "trunc" if before.is_floating_point and not after.is_floating_point else "copy", [x], {}


@_row(aten.copy.default)
def _copy(n: fx.Node) -> Row:
    return "copy", [n.args[1]], {}


@_row(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(n: fx.Node) -> Row:
    names: Any = {None: "div", "floor": "floor_divide", "trunc": "truncated"}
    return names[n.kwargs.get("rounding_mode")], list(n.args[:2]), {}


@_row(aten.polygamma.default)
def _polygamma(n: fx.Node) -> Row:
    return ("digamma", [n.args[1]], {}) if n.args[0] == 0 else ("polygamma", [n.args[1]], {"order": n.args[0]})


@_row(aten.i0.default, aten.special_i1.default, aten.special_i0e.default, aten.special_i1e.default)
def _bessel(n: fx.Node) -> Row:
    name = _name_of(n)
    return "bessel_ie" if name.endswith("e") else "bessel_i", [n.args[0]], {"order": int("1" in name)}


@_row(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _sum(n: fx.Node) -> Row:
    alpha = n.kwargs.get("alpha", n.args[2] if len(n.args) > 2 else 1)
    plain, scaled = ("plus", "add") if _name_of(n) == "add" else ("sub", "submul")
    return (plain, list(n.args[:2]), {}) if alpha == 1 else (scaled, list(n.args[:2]), {"alpha": alpha})


@_row(aten.addcmul.default)
def _addcmul(n: fx.Node) -> Row:
    return "addcmul", list(n.args[:3]), {"alpha": n.kwargs.get("value", 1)}


@_row(aten.pow.Tensor_Scalar)
def _pow(n: fx.Node) -> Row:
    arguments: Any = n.args
    x, p = arguments
    if p in (2, 2.0):
        return "mul", [x, x], {}
    if p in (0.5, -0.5, -1):
        return {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[p], [x], {}
    return "pow", [x, p], {}


@_row(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(n: fx.Node) -> Row:
    low, high = (*n.args[1:], None, None)[:2]
    if n.target == aten.clamp_max.default:
        low, high = None, low
    low, high = n.kwargs.get("min", low), n.kwargs.get("max", high)
    if low is not None and high is not None:
        raise Unsupported(n)  # decomposed before
    return ("max", [n.args[0], low], {}) if high is None else ("min", [n.args[0], high], {})


@_row(aten.tril.default, aten.triu.default)
def _triangle(n: fx.Node) -> Row:
    return _name_of(n), [n.args[0]], {"diagonal": n.args[1] if len(n.args) > 1 else n.kwargs.get("diagonal", 0)}


@_row(
    aten.full.default, aten.full_like.default, aten.zeros.default, aten.ones.default, aten.zeros_like.default,
    aten.ones_like.default, aten.scalar_tensor.default, aten.empty.memory_format, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.empty_strided.default,
)  # fmt: skip
def _fill(n: fx.Node) -> Row:
    name = _name_of(n)
    if "zeros" in name or "empty" in name:
        return "fill", [], {"value": 0.0}
    if "ones" in name:
        return "fill", [], {"value": 1.0}
    value: Any = n.args[0 if "scalar" in name else -1]
    return "fill", [], {"value": float(torch.tensor(value, dtype=n.meta["val"].dtype))}  # with the digits that it has


@_row(aten.arange.start, aten.arange.default, aten.arange.start_step)
def _arange(n: fx.Node) -> Row:
    start, _, step = (0, *n.args, 1) if len(n.args) == 1 else (*n.args, 1)[:3]
    return "arange", [], {"start": start, "step": step}


@_row(
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.prod.dim_int,
    aten.prod.default, table=REDUCTIONS,
)  # fmt: skip
def _reduction(n: fx.Node) -> Row:
    x: Any = n.args[0]
    name, shape = _name_of(n), tuple(x.meta["val"].shape)
    dims: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    keep = bool(n.args[2] if len(n.args) > 2 else n.kwargs.get("keepdim", False))
    named = [dims] if isinstance(dims, int) else dims or range(len(shape))
    over = {d % len(shape) for d in named} if shape else set()
    kept = [None if a in over else sum(keep or b not in over for b in range(a)) for a in range(len(shape))]
    scale = 1 / math.prod(shape[a] for a in over) if name == "mean" else 1.0
    return "sum" if name == "mean" else name, [x], {"kept": kept, "scale": scale}


@_row(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, table=PRODUCTS)
def _mm(n: fx.Node, alpha: float, beta: float, init: Any) -> Any:
    return n.args[0], n.args[1], alpha, beta, init


@_row(aten.cat.default, aten.stack.default, table=PIECES)
def _cat(n: fx.Node, shape: tuple[int, ...]) -> Any:
    parts: Any = n.args[0]
    axis: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
    axis = axis % len(shape)
    at = 0
    for x in parts:
        if n.target == aten.stack.default:
            yield (lambda t, at=at: t.select(axis, at)), x
            at += 1
        else:
            size = x.meta["val"].shape[axis] if x.meta["val"].ndim == len(shape) else 0
            yield (lambda t, at=at, size=size: t.narrow(axis, at, size)), x
            at += size


@_row(aten.select_backward.default, aten.slice_backward.default, table=PIECES)
def _window(n: fx.Node, shape: tuple[int, ...]) -> Any:
    x, _, *where = n.args
    view: Any = aten.select.int if n.target == aten.select_backward.default else aten.slice.Tensor
    yield (lambda t: t), 0.0
    yield (lambda t: view(t, *where)), x


@_row(aten.constant_pad_nd.default, table=PIECES)
def _pad(n: fx.Node, shape: tuple[int, ...]) -> Any:
    arguments: tuple[Any, ...] = (*n.args, 0.0)
    x, pads, value = arguments[:3]
    widths = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    if any(w < 0 for pair in widths for w in pair):
        raise Unsupported(n)

    def place(t: Any) -> Any:
        for k, (before, after) in enumerate(widths):
            axis = len(shape) - len(widths) + k
            t = t.narrow(axis, before, shape[axis] - before - after)
        return t

    yield (lambda t: t), float(value)
    yield place, x


# As many multiplications and additions of one lane as an entry takes about as long as, where that is not one.
SLOW = {
    name: flops
    for flops, names in {
        6.0: "div sqrt rsqrt reciprocal truncated",
        25.0: "exp log tanh sigmoid erf sin cos log1p expm1 atan sinh cosh lgamma asin acos pow tan ceil trunc round asinh acosh atanh erfc exp2 "
        "log2 log10 atan2 hypot fmod remainder floor_divide copysign signbit isinf fmax fmin digamma polygamma erfinv ndtri erfcx bessel_i bessel_ie",
    }.items()
    for name in names.split()
}  # fmt: skip


def work(n: fx.Node) -> float:
    """Estimate how many multiplications and additions a value takes; a view takes none."""
    if n.target in VIEWS or not isinstance(n.meta.get("val"), torch.Tensor):
        return 0.0
    first = next((x.meta["val"] for x in n.all_input_nodes), n.meta["val"])
    if n.target in PRODUCTS:
        return float(n.meta["val"].numel() * first.shape[-1])
    if n.target in REDUCTIONS:
        return float(first.numel())
    return n.meta["val"].numel() * (SLOW.get(MAPS[n.target](n)[0], 1.0) if n.target in MAPS else 1.0)

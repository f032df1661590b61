"""Rows of the products: matmul in every rank, einsum, linear, and those with an addend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.terms import Axis, Label, Term, fresh_axes, make_factor
from dualform.ops.examples import Example, T, call
from dualform.ops.table import OpCall, Product, broadcast_axes, defined_row, product_row, product_term, row


def _axis(n: int) -> Axis:
    return () if n == 1 else (Label(n),)


def _matrix_product(call: OpCall) -> Product:
    """out[..., i, j] = sum_k a[..., i, k] b[..., k, j]; a vector lacks its outer axis; batch axes broadcast."""
    a, b = call.operands[:2]
    return _batched(a.shape, b.shape, call.out.shape)


def _batched(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> Product:
    rows = [_axis(a[-2])] if len(a) > 1 else []
    cols = [_axis(b[-1])] if len(b) > 1 else []
    inner = _axis(a[-1])
    batch = fresh_axes(shape[: len(shape) - len(rows) - len(cols)])
    left = (*broadcast_axes(batch, a[:-2]), *rows, inner)
    right = (*broadcast_axes(batch, b[:-2]), inner, *cols)
    return Product((*batch, *rows, *cols), (left, right))


product_row(
    "aten::mm", kind="product", odd=True, python="{0} @ {1}", called=True,
    examples=[call("", T("n m"), T("m k")), call("", T("1 m"), T("m 1"))],
)(_matrix_product)  # fmt: skip
product_row(
    "aten::bmm", kind="product", odd=True, python="{0} @ {1}", called=True, fresh=True, examples=[call("", T("b n m"), T("b m k"))]
)(_matrix_product)  # fmt: skip
product_row("aten::mv", kind="product", python="{0} @ {1}", examples=[call("", T("n m"), T("m"))])(_matrix_product)
product_row("aten::vdot", examples=[call("", T("n"), T("n"))])(_matrix_product)
product_row("aten::dot", kind="product", examples=[call("", T("n"), T("n"))])(_matrix_product)
product_row(
    "aten::matmul", "aten::linalg_matmul", python="{0} @ {1}",
    examples=[
        *(call("matmul", T(a), T(b)) for a, b in (("n", "n"), ("n m", "m"), ("m", "m k"), ("n m", "m k"))),
        call("matmul", T("b 1 n m"), T("c m k")), call("matmul", T("n m"), T("b m 1")), call("linalg_matmul", T("n m"), T("m k")),
    ],
)(_matrix_product)  # fmt: skip


@product_row("aten::outer", python="torch.", examples=[call("", T("n"), T("m"))])
@product_row("aten::ger", examples=[call("", T("n"), T("m"))])
def _outer(call: OpCall) -> Product:
    i, j = fresh_axes(call.out.shape)
    return Product((i, j), ((i,), (j,)))


@product_row("aten::inner", examples=[call("", T("n m"), T("k m")), call("", T("m"), T("m")), call("", T(""), T("n"))])
def _inner(call: OpCall) -> Product:
    a, b = call.operands
    if not a.ndim or not b.ndim:
        axes = fresh_axes(call.out.shape)
        return Product(axes, (axes if a.ndim else (), axes if b.ndim else ()))
    inner = _axis(a.shape[-1])
    left, right = fresh_axes(a.shape[:-1]), fresh_axes(b.shape[:-1])
    return Product((*left, *right), ((*left, inner), (*right, inner)))


@product_row("aten::kron", examples=[call("", T("k n", "flat"), T("n k", "flat")), call("", T("k"), T("n k", "flat"))])
def _kron(call: OpCall) -> Product:
    rank = call.out.ndim
    a, b = (fresh_axes((1,) * (rank - x.ndim) + tuple(x.shape)) for x in call.operands)
    out = tuple(p + q for p, q in zip(a, b, strict=True))
    own = tuple(axes[rank - x.ndim :] for axes, x in zip((a, b), call.operands, strict=True))
    return Product(out, own)


_SPECS = [
    ("ij,jk->ik", "n m", "m k"), ("...i,ij,kj->...k", "b n", "n m", "k m"), ("ii,i->i", "n n", "n"), ("ab,cb", "k n", "m n"),
    ("ab,bc->c", "k 1", "n k"), ("i...,i->...", "n m k", "n"), ("aab->ba", "n n m"), ("bhd,bhd->", "b 2 n", "b 2 n"),
]  # fmt: skip


@product_row(
    "aten::einsum", ways={"path"}, examples=[call("einsum", spec, [T(x) for x in tensors]) for spec, *tensors in _SPECS]
)
def _einsum(call: OpCall) -> Product:
    tensors = call.operands
    left, arrow, right = call.bound["equation"].replace(" ", "").partition("->")
    inputs = left.split(",")
    dotted = [(s.replace("...", ""), x) for s, x in zip(inputs, tensors, strict=True) if "..." in s]
    rank = max((x.ndim - len(s) for s, x in dotted), default=0)
    dots = [f"…{k}" for k in range(rank)]

    def letters(spec: str, ndim: int) -> list[str]:
        before, found, after = spec.partition("...")
        if not found:
            return list(before)
        return [*before, *dots[rank - (ndim - len(before) - len(after)) :], *after]

    specs = [letters(s, x.ndim) for s, x in zip(inputs, tensors, strict=True)]
    size: dict[str, int] = {}
    for spec, x in zip(specs, tensors, strict=True):
        for letter, n in zip(spec, x.shape, strict=True):
            size[letter] = max(size.get(letter, 1), n) if n else 0
    axis = {letter: _axis(n) for letter, n in size.items()}
    if arrow:
        out = letters(right, len(right.replace("...", "")) + rank)
    else:
        seen = [letter for spec in specs for letter in spec]
        out = [*dots, *sorted(s for s in set(seen) if seen.count(s) == 1 and s not in dots)]
    named = (tuple(axis[letter] for letter in spec) for spec in specs)
    axes = tuple(broadcast_axes(own, x.shape) for own, x in zip(named, tensors, strict=True))
    return Product(tuple(axis[letter] for letter in out), axes)


@product_row(
    "aten::tensordot",
    examples=[call("", T("k n m"), T("m p k"), [2, 0], [0, 2]), call("", T("1 1 1"), T("2 1 2"), [0, 1], [2, 0]), call("", T("3 k"), T("1 m"), [0], [0])],
)  # fmt: skip
def _tensordot(call: OpCall) -> Product:
    """An axis of size 1 is paired with one of any size: the sum over that is of the other operand alone."""
    a, b = call.operands[:2]
    left = list(fresh_axes(a.shape))
    right = list(fresh_axes(b.shape))
    pairs = list(zip(call.bound["dims_self"], call.bound["dims_other"], strict=True))
    for p, q in pairs:
        if a.shape[p] == b.shape[q]:
            right[q % b.ndim] = left[p % a.ndim]
    mine, theirs = {p % a.ndim for p, _ in pairs}, {q % b.ndim for _, q in pairs}
    out = [x for k, x in enumerate(left) if k not in mine] + [x for k, x in enumerate(right) if k not in theirs]
    return Product(tuple(out), (tuple(left), tuple(right)))


def _added(x: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return (x if beta == 1 else beta * x) + (a @ b if alpha == 1 else alpha * (a @ b))


def _with_addend(name: str, examples: Sequence[Example], **columns: Any) -> None:
    """out = beta * self + alpha * (a @ b); addbmm sums the batch too."""

    def rule(call: OpCall, operand: int) -> list[Term]:
        pair = [k for k, (where, _) in enumerate(call.places) if where != "self"]
        a, b = (call.operands[k] for k in pair)
        whole = _batched(a.shape, b.shape, a.shape[:-1] + b.shape[-1:] if name == "aten::addbmm" else call.out.shape)
        product = replace(whole, out=whole.out[-call.out.ndim :])
        if operand not in pair:
            inn = broadcast_axes(product.out, call.operands[operand].shape)
            return [Term(float(call.bound.get("beta", 1)), (), product.out, inn)]
        mine = pair.index(operand)
        other = make_factor(call.operands[pair[1 - mine]], product.axes[1 - mine], call.operand_name(pair[1 - mine]))
        return [Term(float(call.bound.get("alpha", 1)), (other,), product.out, product.axes[mine])]

    row(name, affine=(frozenset({0, 1}), frozenset({0, 2})), examples=examples, **columns)(rule)


for _op, _shapes, _columns in (
    ("addmm", ("m", "n k", "k m"), {"lowered": _added, "python": "{0} + {1} @ {2} | torch."}),
    ("baddbmm", ("b n m", "b n k", "b k m"), {"lowered": _added, "called": True, "over": (0,)}),
    ("addmv", ("n", "n k", "k"), {}),
    ("addbmm", ("n m", "b n k", "b k m"), {}),
):
    _with_addend(f"aten::{_op}", [call("", *map(T, _shapes), beta=2, alpha=3)], **_columns)


def _linear(call: OpCall, operand: int) -> list[Term]:
    """out[..., n] = sum_k x[..., k] W[n, k] + b[n]."""
    product = _linear_form(call)
    if operand == 2:
        return [Term(1.0, (), product.out, product.out[call.out.ndim - call.operands[2].ndim :])]
    return [product_term(call, product, operand)]


def _linear_form(call: OpCall) -> Product:
    x, weight = call.operands[:2]
    rows = fresh_axes(x.shape[:-1])
    inner = _axis(x.shape[-1])
    cols = (_axis(weight.shape[0]),) if weight.ndim > 1 else ()
    return Product((*rows, *cols), ((*rows, inner), (*cols, inner)))


row(
    "aten::linear", affine=(frozenset({0, 2}), frozenset({1, 2})), multilinear=True, form=_linear_form,
    examples=[call("", T("b n m"), T("p m"), T("p")), call("", T("m"), T("1 m"))],
)(_linear)  # fmt: skip


@defined_row("aten::bilinear", call("", T("b n"), T("b m"), T("o n m"), T("o")), call("", T("n"), T("m"), T("o n m")))
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[..., o] = sum_ij x[..., i] W[o, i, j] y[..., j] + b[o]."""
    product = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return product if bias is None else product + bias

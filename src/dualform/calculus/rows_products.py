"""Rows of the products: matmul in every rank, einsum, linear, and those with an addend."""

from __future__ import annotations

from collections.abc import Sequence

from dualform.calculus.table import ROWS, Call, Product, Row, broadcast_axes, product_row, product_term
from dualform.calculus.terms import Axis, Label, Term, fresh_axes, make_factor


def _axis(n: int) -> Axis:
    return () if n == 1 else (Label(n),)


def _matrix_product(call: Call) -> Product:
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


product_row("aten::mm", "aten::bmm", "aten::matmul", "aten::mv", "aten::dot", "aten::vdot")(_matrix_product)


@product_row("aten::outer", "aten::ger")
def _outer(call: Call) -> Product:
    i, j = fresh_axes(call.out.shape)
    return Product((i, j), ((i,), (j,)))


@product_row("aten::kron")
def _kron(call: Call) -> Product:
    rank = call.out.ndim
    a, b = (fresh_axes((1,) * (rank - x.ndim) + tuple(x.shape)) for x in call.operands)
    out = tuple(p + q for p, q in zip(a, b, strict=True))
    own = tuple(axes[rank - x.ndim :] for axes, x in zip((a, b), call.operands, strict=True))
    return Product(out, own)


@product_row("aten::einsum")
def _einsum(call: Call) -> Product:
    tensors = call.operands
    left, arrow, right = call.bound["equation"].replace(" ", "").partition("->")
    inputs = left.split(",")
    rank = max(
        (x.ndim - len(s.replace("...", "")) for s, x in zip(inputs, tensors, strict=True) if "..." in s), default=0
    )
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
    axes = tuple(
        tuple(() if n == 1 else axis[letter] for letter, n in zip(spec, x.shape, strict=True))
        for spec, x in zip(specs, tensors, strict=True)
    )
    return Product(tuple(axis[letter] for letter in out), axes)


@product_row("aten::tensordot")
def _tensordot(call: Call) -> Product:
    a, b = call.operands[:2]
    left = list(fresh_axes(a.shape))
    right = list(fresh_axes(b.shape))
    pairs = list(zip(call.bound["dims_self"], call.bound["dims_other"], strict=True))
    for p, q in pairs:
        right[q % b.ndim] = left[p % a.ndim]
    mine, theirs = {p % a.ndim for p, _ in pairs}, {q % b.ndim for _, q in pairs}
    out = [x for k, x in enumerate(left) if k not in mine] + [x for k, x in enumerate(right) if k not in theirs]
    return Product(tuple(out), (tuple(left), tuple(right)))


def _with_addend(name: str, addend: str, scale: str, product_scale: str) -> None:
    """out = scale * addend + product_scale * (a @ b)."""

    def rule(call: Call, operand: int) -> list[Term]:
        pair = [k for k, (where, _) in enumerate(call.places) if where != addend]
        a, b = (call.operands[k] for k in pair)
        product = _batched(a.shape, b.shape, call.out.shape)
        if operand not in pair:
            inn = broadcast_axes(product.out, call.operands[operand].shape)
            return [Term(float(call.bound.get(scale, 1)), (), product.out, inn)]
        mine = pair.index(operand)
        other = make_factor(call.operands[pair[1 - mine]], product.axes[1 - mine], call.operand_name(pair[1 - mine]))
        return [Term(float(call.bound.get(product_scale, 1)), (other,), product.out, product.axes[mine])]

    groups = (frozenset({0, 1}), frozenset({0, 2}))
    ROWS[name] = Row(name, rule, groups)


for _op in ("addmm", "baddbmm", "addmv"):
    _with_addend(f"aten::{_op}", "self", "beta", "alpha")


def _linear(call: Call, operand: int) -> list[Term]:
    """out[..., n] = sum_k x[..., k] W[n, k] + b[n]."""
    product = _linear_form(call)
    if operand == 2:
        return [Term(1.0, (), product.out, product.out[call.out.ndim - call.operands[2].ndim :])]
    return [product_term(call, product, operand)]


def _linear_form(call: Call) -> Product:
    x, weight = call.operands[:2]
    rows = fresh_axes(x.shape[:-1])
    inner = _axis(x.shape[-1])
    cols = (_axis(weight.shape[0]),) if weight.ndim > 1 else ()
    return Product((*rows, *cols), ((*rows, inner), (*cols, inner)))


ROWS["aten::linear"] = Row(
    "aten::linear", _linear, (frozenset({0, 2}), frozenset({1, 2})), multilinear=True, form=_linear_form
)

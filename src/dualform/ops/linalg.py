"""Rows of matrix functions: inverses, solves, factors, determinants.

Legend: A (..., n, n), B (..., n, k), X a solution, L a Cholesky factor, C an inverse.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.materialise import expect_room
from dualform.algebra.relations import Triangle
from dualform.algebra.terms import Axis, Factor, Relation, Term, fresh_axes, make_factor
from dualform.ops.examples import T, call
from dualform.ops.reductions import reduced, slope_of
from dualform.ops.spelled import cdist
from dualform.ops.table import OpCall, broadcast_axes, defined_row, row

NN, BNN = T("n n", "positive"), T("b n n", "positive")
FACTORS, PIVOTS = T("2 3 3", "positive"), torch.tensor([[2, 2, 3], [1, 3, 3]], dtype=torch.int32)


def _square(x: Tensor) -> tuple[tuple[Axis, ...], Axis, Axis]:
    """Batch axes, row and column of a matrix."""
    *batch, i, j = fresh_axes(x.shape)
    return tuple(batch), i, j


@row(
    "aten::linalg_inv", "aten::inverse", "aten::linalg_inv_ex", examples=[call("", BNN), call("", NN), call("", T("b 1 1"))],
)  # fmt: skip
def _inverse(call: OpCall, operand: int) -> list[Term]:
    """dC = -C dA C."""
    if call.part:
        return NotImplemented
    batch, i, j = _square(call.out)
    _, k, l = _square(call.out)
    name = f"inv({call.operand_name(0)})"
    left = make_factor(call.out, (*batch, i, k), name)
    right = make_factor(call.out, (*batch, l, j), name)
    return [Term(-1.0, (left, right), (*batch, i, j), (*batch, k, l))]


@row(
    "aten::linalg_solve", "aten::linalg_solve_ex", "aten::_linalg_solve_ex", "aten::linalg_solve_triangular", affine=(frozenset({1}),),
    examples=[
        call("linalg_solve", BNN, T("b n k")), call("linalg_solve", NN, T("n")), call("linalg_solve", BNN, T("b n")), call("linalg_solve", NN, T("k n"), left=False),
        call("linalg_solve_ex", BNN, T("b n k")), call("_linalg_solve_ex", BNN, T("b n k")), call("linalg_solve", NN, T("b n k")),
        *(call("linalg_solve_triangular", BNN, T("b n k"), upper=u, unitriangular=v) for u, v in ((False, False), (True, False), (False, True))),
        call("linalg_solve_triangular", NN, T("k n"), upper=True, left=False),
    ],
)  # fmt: skip
def _solve(call: OpCall, operand: int) -> list[Term]:
    """A X = B: dX = C dB - C dA X, for a triangular A with the triangle of dA; X A = B likewise from the right."""
    if call.part:
        return NotImplemented
    A, B = call.operands
    upper, left = call.bound.get("upper"), call.bound["left"]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    if upper is None:
        C = torch.linalg.inv(A)
    else:
        C = torch.linalg.solve_triangular(A, eye.expand_as(A), upper=upper, unitriangular=call.bound["unitriangular"])
    vector = upper is None and (B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1]))
    axes = fresh_axes(call.out.shape if not vector else (*call.out.shape, 1))
    batch, (p, q) = axes[:-2], axes[-2:]
    solved, free = (p, q) if left else (q, p)
    (unknown,), (equation,) = fresh_axes(A.shape[-1:]), fresh_axes(A.shape[-1:])

    def of(x: Tensor, *matrix: Axis) -> tuple[Axis, ...]:
        """Axes of an operand: its batch axes are broadcast to the result's."""
        own = x.shape[:-2]
        shown = batch[len(batch) - len(own) :]
        return (*(() if n == 1 else axis for n, axis in zip(own, shown, strict=True)), *matrix)

    out = axes[:-1] if vector else axes
    pair = (solved, equation) if left else (equation, solved)
    inverse = make_factor(
        C, of(C, *pair), f"inv({call.operand_name(0) if len(call.names) > 1 or operand == 0 else 'A'})"
    )
    if operand == 1:
        rhs = (equation, free) if left else (free, equation)
        whole = B.unsqueeze(-1) if vector else B
        inn = of(whole, *rhs)
        return [Term(1.0, (inverse,), out, inn[:-1] if vector else inn)]
    X = call.out.unsqueeze(-1) if vector else call.out
    said = f"solve({call.operand_name(0)},{call.operand_name(1)})" if len(call.operands) > 1 else "X"
    solution = make_factor(X, (*batch, *((unknown, free) if left else (free, unknown))), said)
    row_, col = (equation, unknown) if left else (unknown, equation)
    factors: list[Factor | Relation] = [inverse, solution]
    if upper is not None and row_:
        strict = int(call.bound["unitriangular"])
        factors.append(Triangle(col, row_, strict) if upper else Triangle(row_, col, strict))
    elif upper is not None and call.bound["unitriangular"]:
        return []
    return [Term(-1.0, tuple(factors), out, of(A, row_, col))]


@row(
    "aten::linalg_cholesky", "aten::cholesky", "aten::linalg_cholesky_ex",
    examples=[call("", BNN), call("", NN), call("linalg_cholesky", NN, upper=True), call("", T("b 1 1"))],
)  # fmt: skip
def _cholesky(call: OpCall, operand: int) -> list[Term]:
    """dL = L f(C dA C^T), C = L^-1; f keeps the lower triangle and halves the diagonal; dA is made symmetric first."""
    if call.part:
        return NotImplemented
    upper = bool(call.bound["upper"])
    L = call.out.mT if upper else call.out
    n = L.shape[-1]
    batch, i, j = _square(L)
    _, a, k = _square(L)
    (l,) = fresh_axes((n,))
    eye = torch.eye(n, dtype=L.dtype, device=L.device)
    C = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
    half = (torch.ones_like(eye).tril() - 0.5 * eye) if n != 1 else torch.full_like(eye, 0.5)
    outer = make_factor(L, (*batch, i, a), "L"), make_factor(half, (a, j), "half")
    factors = (*outer, make_factor(C, (*batch, a, k), "C"), make_factor(C, (*batch, j, l), "C"))
    out = (*batch, j, i) if upper else (*batch, i, j)
    return [Term(0.5, factors, out, (*batch, k, l)), Term(0.5, factors, out, (*batch, l, k))]


@row(
    "aten::cholesky_solve", examples=[call("", T("b n k"), BNN), call("", T("n k"), NN, True), call("", T("n k"), BNN)]
)
def _cholesky_solve(call: OpCall, operand: int) -> list[Term]:
    """L L^T X = B: dX = C dB - C (dL L^T + L dL^T) X, C = (L L^T)^-1; as in torch, for all of dL."""
    B, L = call.operands
    upper, X = call.bound["upper"], call.out
    *batch, i, k = fresh_axes(X.shape)
    a, b = fresh_axes(L.shape[-2:])
    C, M = torch.cholesky_inverse(L, upper), L.mT if upper else L

    def factor(x: Tensor, name: str, *matrix: Axis) -> Factor:
        return make_factor(x, (*broadcast_axes(tuple(batch), x.shape[:-2]), *matrix), name)

    out = (*batch, i, k)
    if operand == 0:
        return [Term(1.0, (factor(C, "C", i, a),), out, (*broadcast_axes(tuple(batch), B.shape[:-2]), a, k))]
    inn = (*broadcast_axes(tuple(batch), L.shape[:-2]), *((b, a) if upper else (a, b)))
    first = (factor(C, "C", i, a), factor(M.mT @ X, "L^T X", b, k))
    return [Term(-1.0, first, out, inn), Term(-1.0, (factor(C @ M, "C L", i, b), factor(X, "X", a, k)), out, inn)]


@defined_row(
    "aten::linalg_lu_solve", *(call("", FACTORS, PIVOTS, T("2 3 k"), adjoint=a) for a in (False, True)),
    *(call("", FACTORS, PIVOTS, T("2 k 3"), left=False, adjoint=a) for a in (False, True)),
)  # fmt: skip
def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """A X = B with A = P L U, or A^T X = B; X A = B is A^T X^T = B^T."""
    if not left:
        return _lu_solve(LU, pivots, B.mT, adjoint=not adjoint).mT
    P, L, U = torch.lu_unpack(LU, pivots)
    solve = torch.linalg.solve_triangular
    if adjoint:
        return P @ solve(L.mT, solve(U.mT, B, upper=False), upper=True, unitriangular=True)
    return solve(U, solve(L, P.mT @ B, upper=False, unitriangular=True), upper=True)


@defined_row("aten::triangular_solve", *(call("", T("b n k"), BNN, u, t) for u in (True, False) for t in (True, False)))
def _triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    """The old spelling, with a copy of the matrix."""
    M = A.mT if transpose else A
    return torch.linalg.solve_triangular(M, self, upper=upper != transpose, unitriangular=unitriangular), A.clone()


def _reads_matrix(call: OpCall, name: str, k: int | None) -> list[Term]:
    """Every result of a matrix, whole numbers too, looks at all of it, and of its pivots."""
    many = call.operands[0].ndim - 2
    batch = fresh_axes(call.out.shape[:many])
    out, inn = fresh_axes(call.out.shape[many:]), fresh_axes(call.argument(name, k).shape[many:])
    return [Term(1.0, (), (*batch, *out), (*batch, *inn))]


@defined_row("aten::linalg_lu", call("", BNN).of(2), call("", T("b n m")).of(1))
def _lu(A: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """By the factors as one matrix, which torch maps over rows."""
    return torch.lu_unpack(*torch.linalg.lu_factor(A, pivot=pivot))


@row(
    "aten::_linalg_svd", "aten::_linalg_eigh", reads=_reads_matrix,
    examples=[*(call("_linalg_svd", T(x)).of(1) for x in ("b n m", "m n")), call("_linalg_svd", T("b n m")).of(2), call("_linalg_eigh", BNN), call("_linalg_eigh", NN, "U"), call("_linalg_eigh", T("1 1"))],
)  # fmt: skip
def _spectrum(call: OpCall, operand: int) -> list[Term]:
    """dσ_i = u_i^T dA v_i, of a symmetric A dλ_i = v_i^T dA v_i: a product of rank one for each."""
    A, b = call.operands[0], call.bound
    is_even = "UPLO" in b
    if (call.part or 0) != (0 if is_even else 1):
        return _each_matrix(call, operand)
    if is_even:
        V = torch.linalg.eigh(A, b["UPLO"])[1]
        pair = (V, "V"), (V, "V")
    else:
        U, _, Vh = torch.linalg.svd(A, full_matrices=False)
        pair = (U, "U"), (Vh.mT, "V")
    batch, i, j = _square(A)
    (k,) = fresh_axes(call.out.shape[-1:])
    factors = tuple(make_factor(x, (*batch, axis, k), name) for (x, name), axis in zip(pair, (i, j), strict=True))
    return [Term(1.0, factors, (*batch, k), (*batch, i, j))]


@row(
    "aten::linalg_pinv", "aten::linalg_matrix_exp", "aten::linalg_qr", "aten::linalg_lu_factor_ex", "aten::lu_unpack", "aten::cholesky_inverse",
    reads=_reads_matrix, examples=[
        call("lu_unpack", FACTORS, PIVOTS).of(1), call("lu_unpack", FACTORS, PIVOTS).of(2),
        call("linalg_pinv.atol_rtol_tensor", T("b n m")), call("linalg_matrix_exp", T("b n n")), call("linalg_qr", T("b m n")).of(1),
        call("linalg_lu_factor_ex", BNN), call("cholesky_inverse", BNN), call("linalg_matrix_exp", T("n n")),
    ],
)  # fmt: skip
def _each_matrix(call: OpCall, operand: int) -> list[Term]:
    """Every matrix of a batch by itself; within one, all depends on all."""
    x = call.operands[0]
    if len(call.operands) > 1:
        return NotImplemented
    many = x.ndim - 2
    own, matrix = call.out.shape[many:], x.shape[many:]
    name = f"that of {call.target._schema.name}"
    advice = "Take torch's gradients (torch.func.vjp) of that op."
    expect_room("derivative", name, math.prod(own) * x.numel() * x.element_size(), advice)
    pulled: Any = torch.func.vjp(partial(call.run, 0), x)
    basis = torch.eye(math.prod(own), dtype=x.dtype, device=x.device).reshape(-1, *[1] * many, *own)
    try:
        slopes = torch.stack([pulled[1](g.expand(call.out.shape))[0] for g in basis])
    except RuntimeError:  # torch has no derivative of this part
        return NotImplemented
    batch, out, inn = fresh_axes(x.shape[:many]), fresh_axes(own), fresh_axes(matrix)
    entries = slopes.reshape(*own, *x.shape).movedim(list(range(len(own))), list(range(many, many + len(own))))
    name = f"{call.target._schema.name.split('::')[1].strip('_').removeprefix('linalg_')}'({call.operand_name(0)})"
    return [Term(1.0, (make_factor(entries, (*batch, *out, *inn), name),), (*batch, *out), (*batch, *inn))]


def _factored(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V and s of A = U diag(s) V^T, and det U det V."""
    U, s, Vh = torch.linalg.svd(A)
    return U, Vh.mT, s, torch.linalg.det(U) * torch.linalg.det(Vh)


def _left_out(s: Tensor) -> Tensor:
    """The products of all but one, without a division."""
    one = torch.ones_like(s[..., :1])
    before, after = torch.cat([one, s[..., :-1]], -1), torch.cat([one, s.flip(-1)[..., :-1]], -1)
    return before.cumprod(-1) * after.cumprod(-1).flip(-1)


def _cofactor(A: Tensor) -> Tensor:
    U, V, s, sign = _factored(A)
    return (U * (sign[..., None] * _left_out(s))[..., None, :]) @ V.mT


def _tracked(A: Tensor) -> Tensor:
    """Where torch differentiates, it is what it is made of; else one op, so that its derivative is its row's."""
    if A.requires_grad:
        return _cofactor(A)
    with torch._C._AutoDispatchBelowAutograd():
        return cofactor(A)


_library = torch.library.Library("dualform", "FRAGMENT")
_library.define("cofactor(Tensor A) -> Tensor")
_library.impl("cofactor", _cofactor, "CompositeExplicitAutograd")
_library.impl("cofactor", _tracked, "Autograd")
cofactor: Any = torch.ops.dualform.cofactor.default
torch.library.register_fake("dualform::cofactor", torch.empty_like, lib=_library)
torch.library.register_vmap(
    "dualform::cofactor", lambda info, dims, A: (cofactor(A.movedim(dims[0], 0)), 0), lib=_library
)


@row("dualform::cofactor", examples=[call("dualform::cofactor", x) for x in (BNN, NN, T("b 1 1"))])
def _cofactors(call: OpCall, operand: int) -> list[Term]:
    """A = U s V^T: minors that two rows and two columns are left out of, as products of all but two of s."""
    A = call.operands[0]
    U, V, s, sign = _factored(A)
    n = A.shape[-1]
    if n == 1:
        return []
    eye = torch.eye(n, dtype=torch.bool, device=A.device)
    rest = _left_out(torch.where(eye, 1.0, s[..., None, :])) * (~eye).to(A.dtype) * sign[..., None, None]
    batch, i, j = _square(A)
    _, k, l = _square(A)
    _, a, c = _square(A)

    def term(coef: float, *axes: Axis) -> Term:
        pairs = zip((U, V, U, V), "UVUV", zip((i, j, k, l), axes, strict=True), strict=True)
        factors = [make_factor(x, (*batch, *pair), name) for x, name, pair in pairs]
        return Term(coef, (*factors, make_factor(rest, (*batch, a, c), "s")), (*batch, i, j), (*batch, k, l))

    return [term(1.0, a, a, c, c), term(-1.0, a, c, c, a)]


@row(
    "aten::linalg_det", "aten::det", "aten::_linalg_det",
    examples=[call(op, x) for op in ("linalg_det", "det", "_linalg_det") for x in (BNN, NN)],
)  # fmt: skip
def _det(call: OpCall, operand: int) -> list[Term]:
    """d det A = tr(cof(A)^T dA)."""
    if call.part:
        return NotImplemented
    batch, i, j = _square(call.operands[0])
    cofactors = make_factor(cofactor(call.operands[0]), (*batch, i, j), f"cof({call.operand_name(0)})")
    return [Term(1.0, (cofactors,), batch, (*batch, i, j))]


@row(
    "aten::logdet", "aten::linalg_slogdet", "aten::slogdet", "aten::_linalg_slogdet",
    examples=[call("logdet", BNN), call("logdet", NN), *(call(op, BNN).of(1) for op in ("linalg_slogdet", "slogdet", "_linalg_slogdet"))],
)  # fmt: skip
def _logdet(call: OpCall, operand: int) -> list[Term]:
    """d log|det A| = tr(A^-1 dA)."""
    if call.part == 0:  # a sign
        return []
    if call.part not in (None, 1):
        return NotImplemented
    A = call.operands[0]
    batch, i, j = _square(A)
    C = torch.linalg.inv_ex(A).inverse
    if call.part is None:  # of a negative determinant there is no logarithm, and torch's slope is 0
        C = torch.where(call.out.isnan()[..., None, None] & ~A.isnan().any(), 0.0, C)
    return [Term(1.0, (make_factor(C, (*batch, j, i), f"inv({call.operand_name(0)})"),), batch, (*batch, i, j))]


@row(
    "aten::linalg_matrix_norm", "aten::nuclear_norm",
    examples=[call("nuclear_norm", NN), call("linalg_matrix_norm.str_ord", BNN, "nuc"), call("linalg_matrix_norm", T("n b m"), 2, [0, 2])],
)  # fmt: skip
def _of_a_matrix(call: OpCall, operand: int) -> list[Term]:
    """One number of a matrix: its slopes are a matrix of each batch entry."""
    _, out, inn = reduced(call, call.operands[0], [-2, -1])
    name = f"{call.target._schema.name.split('::')[1].removeprefix('linalg_')}'({call.operand_name(0)})"
    return [Term(1.0, (make_factor(slope_of(call, operand), inn, name),), out, inn)]


defined_row(
    "aten::cdist", call("", T("b n k"), T("b m k"), 2.0), call("", T("n k"), T("m k"), 1.0), call("", T("n k"), T("m k"), float("inf")),
)(cdist)  # fmt: skip

"""Parameter reconciliations psi: R^l -> R^(n x D): how few numbers may stand for a weight matrix.

A record `reconciliations.X(**options)` knows its length, its matrix and how to meet the features without it:

    r.length(n, D) -> l        r(w, n, D) -> (n, D)        r.apply(kappa, w, n) -> (..., n)

Almost all are one line over the engine in `multilinear`. What is frozen (masks, random matrices, hypernets) is drawn
from the record's seed by `r.constants(n, D)`, the same everywhere; a Head keeps it in buffers, a bare call draws it
anew.

Legend: n output, D expanded, l parameters; n = p s, D = q t; r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.catalogue import Catalogue
from dualform.functions.multilinear import Constants, Features, Multilinear, WeightFactor, normal, width_of
from dualform.shapes import fail, is_whole

reconciliations = Catalogue("reconciliations")

RPN1 = "Zhang 2024 (RPN 1, arXiv 2407.04819)"
reconciliation = partial(reconciliations.record, suffix="_reconciliation", source=RPN1)


@dataclass(frozen=True)
class Reconciliation:
    """A structure behind the public border: sizes and shapes are checked here, once."""

    structure: Multilinear | Hyper

    def length(self, n: int, D: int) -> int:
        return self.structure.length(n, D)

    def constants(self, n: int, D: int) -> dict[str, Tensor]:
        return self.structure.constants(n, D)

    def __call__(self, w: Tensor, n: int, D: int, constants: Constants | None = None) -> Tensor:
        self._check(w, n, D)
        return self.structure.dense(w, n, D, self.constants(n, D) if constants is None else constants)

    def apply(self, kappa: Features, w: Tensor, n: int, constants: Constants | None = None) -> Tensor:
        D = width_of(kappa)
        self._check(w, n, D)
        return self.structure.apply(kappa, w, n, self.constants(n, D) if constants is None else constants)

    def _check(self, w: Tensor, n: int, D: int) -> None:
        l = self.length(n, D)
        if tuple(w.shape) != (l,):
            count = f"has {w.numel()} entries" if w.ndim == 1 else f"has shape {tuple(w.shape)}"
            advice = "Pass a w of that length (`length(n, D)`), or other options."
            fail(self.structure.name, "w", count, f"l({n}, {D}) = {l} entries in one axis, n = {n}, D = {D}", advice)


def _whole(name: str, least: int = 1, **options: int | None) -> None:
    for option, value in options.items():
        if value is not None and not is_whole(value, least):
            advice = "Pass a positive integer." if least else "Pass a whole number."
            fail(name, option, f"is {value!r}", f"an integer {option} >= {least}", advice, ValueError)


A, B = WeightFactor("ij"), WeightFactor("kl")
S, T = WeightFactor("ka"), WeightFactor("al")
_dense = Multilinear("identity", (A,))


@reconciliation(formula="W = reshape(w, (n, D)); l = n D")
def identity() -> Reconciliation:
    """Reshape w, nothing else.

    Shape:  w (l,) -> (n, D) with l = n D; apply: (..., D) -> (..., n). Leading dims: any.
    Dtype:  w's.
    Raises: ShapeError if w does not have l entries.
    Example:
        >>> r = reconciliations.identity()
        >>> r.length(2, 3), r(torch.arange(6.0), 2, 3).tolist()
        (6, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    """
    return Reconciliation(_dense)


@reconciliation(formula="W = c 1_(n x D); l = 0")
def constant(c: float = 1.0) -> Reconciliation:
    """Take every entry as c; there is nothing to learn."""
    return Reconciliation(Multilinear("constant", (), coef=float(c)))


@reconciliation(formula="W = 0; l = 0")
def zero() -> Reconciliation:
    """Take the zero matrix."""
    return Reconciliation(Multilinear("zero", (), coef=0.0))


@reconciliation(formula="W = 1_(n x D); l = 0")
def one() -> Reconciliation:
    """Take the matrix of ones: every output is the sum of the features."""
    return Reconciliation(Multilinear("one", ()))


@reconciliations.record(
    aliases=("constant_eye_reconciliation", "constant_eye"), formula="W = I_(n x D); l = 0", source=RPN1
)
def eye() -> Reconciliation:
    """Take the identity matrix, cut or filled with zeros: the first n features go through."""
    return Reconciliation(Multilinear("eye", (WeightFactor("ij", "eye"),)))


@reconciliation(formula="W = M * scatter(w), M with round(p n D) seeded ones; l = round(p n D)")
def masking(p: float = 0.5, seed: int = 0) -> Reconciliation:
    """Keep a share p of the entries, at places drawn once from the seed; the others are zero and cost nothing.

    Shape:  w (l,) -> (n, D) with l = max(1, round(p n D)). Leading dims: any.
    Raises: ValueError unless 0 < p <= 1.
    Differs: tinyBIG keeps n D parameters, 1 - p idle, and draws the mask in forward.
    """
    _whole("masking", 0, seed=seed)
    if not 0 < p <= 1:
        fail("masking", "p", f"is {p}", "a share 0 < p <= 1", "Pass the share of entries to keep.", ValueError)
    return Reconciliation(Multilinear("masking", (WeightFactor("ij", "kept", "places"),), share=float(p), seed=seed))


@reconciliation(aliases=("tiling",), formula="W = 1_(p x q) (x) w; l = (n/p)(D/q)")
def duplicated_padding(p: int = 2, q: int | None = None) -> Reconciliation:
    """Tile one small matrix p times down and q times across (q = p if not given).

    Shape:  w (l,) -> (n, D) with l = (n/p)(D/q). Leading dims: any.
    Raises: ShapeError if p does not divide n or q does not divide D.
    Differs: tinyBIG repeats the entries of vec(w) one by one, which is no tiling.
    """
    _whole("duplicated_padding", p=p, q=q)
    return Reconciliation(Multilinear("duplicated_padding", (B,), rows="ik", cols="jl", p=p, q=p if q is None else q))


@reconciliation(aliases=("block_diagonal",), formula="W = I_(p x q) (x) w; l = (n/p)(D/q)")
def duplicated_diagonal_padding(p: int = 2, q: int | None = None) -> Reconciliation:
    """Repeat one small matrix along the diagonal (q = p if not given).

    Shape:  w (l,) -> (n, D) with l = (n/p)(D/q). Leading dims: any.
    Raises: ShapeError if p does not divide n or q does not divide D.
    Differs: tinyBIG runs for p = q = n only.
    """
    _whole("duplicated_diagonal_padding", p=p, q=q)
    factors = (WeightFactor("ij", "eye"), B)
    q = p if q is None else q
    return Reconciliation(Multilinear("duplicated_diagonal_padding", factors, rows="ik", cols="jl", p=p, q=q))


@reconciliations.record(
    aliases=("lorr", "lorr_reconciliation"),
    formula="W = A B, A (n, r), B (r, D); l = r (n + D)",
    source=f"{RPN1}; Hu et al. 2021",
)
def low_rank(rank: int = 2) -> Reconciliation:
    """Multiply two thin matrices.

    Shape:  w (l,) -> (n, D) with l = r (n + D); A comes first in w. Leading dims: any.
    Raises: ShapeError if w does not have l entries; ValueError if rank < 1.
    Example:
        >>> r = reconciliations.low_rank(rank=1)
        >>> r(torch.tensor([1.0, 2.0, 5.0, 6.0, 7.0]), 2, 3).tolist()
        [[5.0, 6.0, 7.0], [10.0, 12.0, 14.0]]
    """
    _whole("low_rank", rank=rank)
    return Reconciliation(Multilinear("low_rank", (WeightFactor("ia"), WeightFactor("aj")), rank=rank))


@reconciliation(
    aliases=("kronecker",),
    formula="W = A (x) B, A (p, q), B (n/p, D/q); l = p q + n D / (p q)",
    source=f"{RPN1}; Zhang et al. 2021 (PHM)",
)
def hm(p: int | None = None, q: int | None = None) -> Reconciliation:
    """Multiply two small matrices as Kronecker does: hypercomplex multiplication.

    Shape:  w (l,) -> (n, D) with l = p q + (n/p)(D/q); A comes first in w. Leading dims: any.
    Raises: ShapeError if p does not divide n or q does not divide D. None is the largest factor up to the square root.
    Differs: tinyBIG reshapes the outer product of flat factors, which is not Kronecker's.
    """
    _whole("hm", p=p, q=q)
    return Reconciliation(Multilinear("hm", (A, B), rows="ik", cols="jl", p=p, q=q))


@reconciliation(formula="W = A (x) (S T), S (n/p, r), T (r, D/q); l = p q + r (n/p + D/q)")
def lphm(p: int | None = None, q: int | None = None, rank: int = 2) -> Reconciliation:
    """Take a Kronecker product whose second factor has low rank; w holds A, S, T in this order."""
    _whole("lphm", p=p, q=q, rank=rank)
    return Reconciliation(Multilinear("lphm", (A, S, T), rows="ik", cols="jl", p=p, q=q, rank=rank))


@reconciliation(formula="W = (P Q) (x) (S T); l = r (p + q + n/p + D/q)")
def dual_lphm(p: int | None = None, q: int | None = None, rank: int = 2) -> Reconciliation:
    """Take a Kronecker product of two matrices of low rank; w holds P, Q, S, T in this order."""
    _whole("dual_lphm", p=p, q=q, rank=rank)
    factors = (WeightFactor("ib"), WeightFactor("bj"), S, T)
    return Reconciliation(Multilinear("dual_lphm", factors, rows="ik", cols="jl", p=p, q=q, rank=rank))


@reconciliation(
    aliases=("random_matrix_adaptation", "vera"),
    formula="W = diag(w_1) A diag(w_2) B^T, A (n, r), B (D, r) seeded N(0, 1); l = n + r",
    source=f"{RPN1}; Kopiczko et al. 2024 (VeRA)",
)
def random_matrix_adaption(rank: int = 2, seed: int = 0) -> Reconciliation:
    """Scale the rows and the inner axis of a frozen product; w holds the n row scales, then the r inner ones."""
    _whole("random_matrix_adaption", rank=rank)
    _whole("random_matrix_adaption", 0, seed=seed)
    frozen = WeightFactor("ia", "normal", "A"), WeightFactor("ja", "normal", "B")
    factors = (WeightFactor("i"), frozen[0], WeightFactor("a"), frozen[1])
    return Reconciliation(Multilinear("random_matrix_adaption", factors, rank=rank, seed=seed))


@reconciliations.record(
    aliases=("hadamard_low_rank",),
    formula="W = (A B) * (P Q), each of rank r; l = 2 r (n + D)",
    source="Hyeon-Woo et al. 2022 (FedPara); LyCORIS",
)
def loha(rank: int = 2) -> Reconciliation:
    """Multiply two matrices of low rank entry by entry: rank up to r^2; w holds A, B, P, Q in this order."""
    _whole("loha", rank=rank)
    factors = (WeightFactor("ia"), WeightFactor("aj"), WeightFactor("ib"), WeightFactor("bj"))
    return Reconciliation(Multilinear("loha", factors, rank=rank))


@dataclass(frozen=True)
class Hyper:
    """W = gain * reshape(net(w)), the net frozen; not multilinear in w.

    W is formed: it is smaller than the frozen matrix that makes it. `gain` sets its scale (a Head finds it).
    """

    name: str
    entries: int
    hidden: int
    rank: int | None  # None: an MLP with biases; else sigmoid(w P Q^T) S T^T
    seed: int
    is_matrix: ClassVar[bool] = False

    def length(self, n: int, D: int) -> int:
        if min(n, D) < 1:
            fail(self.name, "n, D", f"are {n}, {D}", "n >= 1 and D >= 1", "Pass the numbers of outputs and features.")
        return self.entries

    def piece_lengths(self, n: int, D: int) -> list[int]:
        return [self.length(n, D)]

    def constants(self, n: int, D: int) -> dict[str, Tensor]:
        g = np.random.default_rng(self.seed)

        def draw(*shape: int, fan_in: int) -> Tensor:
            return normal(g, *shape).div_(math.sqrt(fan_in))

        l, h, r = self.entries, self.hidden, self.rank
        gain = {"gain": torch.ones((), device="cpu", dtype=torch.float32)}
        if r is None:
            first = {"net.0.weight": draw(h, l, fan_in=l), "net.0.bias": draw(h, fan_in=l)}
            return gain | first | {"net.2.weight": draw(n * D, h, fan_in=h), "net.2.bias": draw(n * D, fan_in=h)}
        first = {"P": draw(l, r, fan_in=l), "Q": draw(h, r, fan_in=r)}
        return gain | first | {"S": draw(h, r, fan_in=h), "T": draw(n * D, r, fan_in=r)}

    def _written(self, w: Tensor, n: int, D: int, c: Constants) -> Tensor:
        if self.rank is None:
            h = torch.sigmoid(F.linear(w, c["net.0.weight"].to(w), c["net.0.bias"].to(w)))
            flat = F.linear(h, c["net.2.weight"].to(w), c["net.2.bias"].to(w))
        else:
            h = torch.sigmoid(F.linear(w @ c["P"].to(w), c["Q"].to(w)))
            flat = F.linear(h @ c["S"].to(w), c["T"].to(w))
        return flat.reshape(n, D)

    def dense(self, w: Tensor, n: int, D: int, constants: Constants) -> Tensor:
        return _gained(self._written(w, n, D, constants), constants)

    def apply(self, kappa: Features, w: Tensor, n: int, constants: Constants) -> Tensor:
        W = self._written(w, n, width_of(kappa), constants)
        y = F.linear(kappa, W) if isinstance(kappa, Tensor) else _dense.apply(kappa, W.flatten(), n, {})
        return _gained(y, constants)


def _gained(x: Tensor, constants: Constants) -> Tensor:
    return x * constants["gain"].to(x) if "gain" in constants else x


@reconciliation(
    formula="W = reshape(V sigmoid(U w + a) + b), U, V, a, b seeded and frozen; l given",
    source=f"{RPN1}; Ha et al. 2017",
)
def hypernet(l: int = 64, hidden_dim: int = 128, seed: int = 0) -> Reconciliation:
    """Let a frozen two-layer net write the matrix; w, of any length l, is its input."""
    _whole("hypernet", l=l, hidden_dim=hidden_dim)
    _whole("hypernet", 0, seed=seed)
    return Reconciliation(Hyper("hypernet", l, hidden_dim, None, seed))


@reconciliation(formula="W = reshape(sigmoid(w P Q^T) S T^T), all seeded and frozen, of rank r; l given")
def random_matrix_hypernet(rank: int = 2, l: int = 64, hidden_dim: int = 128, seed: int = 0) -> Reconciliation:
    """Let a frozen net of low-rank matrices write the matrix: r, not hidden_dim, times n D frozen numbers."""
    _whole("random_matrix_hypernet", rank=rank, l=l, hidden_dim=hidden_dim)
    _whole("random_matrix_hypernet", 0, seed=seed)
    return Reconciliation(Hyper("random_matrix_hypernet", l, hidden_dim, rank, seed))

"""One engine for every structured weight: W is a product of small tensors over labelled axes, and so is <kappa, W>.

    W[rows, cols] = coef * sum  prod_k  factor_k[labels_k]        y[rows] = sum_cols kappa[cols] W[rows, cols]

A low-rank matrix is "ia,aj"; a Kronecker product is "ij,kl" with rows "ik" and columns "jl"; a tiled one leaves "ij"
out. `dense` multiplies the factors together; `apply` starts at the tokens and meets one factor at a time, so that
neither W nor, where kappa is an outer product itself, kappa is ever formed. The order of the steps is planned once per
size.

Legend: m input, D expanded, n output, l parameters; rows "i" or "ik" (n = p s), columns "j" or "jl" (D = q t); "a",
        "b" ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.algebra.planner import Pairing, TokenOrder, token_order
from dualform.shapes import fail


class Outer(NamedTuple):
    """An expanded row kept as what it is: kappa = left (x) right, the last axes multiplied, row-major."""

    left: Tensor
    right: Tensor

    @property
    def width(self) -> int:
        return self.left.shape[-1] * self.right.shape[-1]

    def dense(self) -> Tensor:
        return (self.left.unsqueeze(-1) * self.right.unsqueeze(-2)).flatten(-2)


Features = Tensor | Outer
Constants = Mapping[str, Tensor]


def as_tensor(kappa: Features) -> Tensor:
    return kappa.dense() if isinstance(kappa, Outer) else kappa


def width_of(kappa: Features) -> int:
    return kappa.width if isinstance(kappa, Outer) else kappa.shape[-1]


@dataclass(frozen=True)
class WeightFactor:
    """One tensor of the product: what its axes are called and where its numbers come from.

    fill: the next entries of w: "w", at seeded places only: "kept"; seeded constants: "normal"; the identity: "eye".
    """

    labels: str
    fill: str = "w"
    name: str = ""


@dataclass(frozen=True)
class Multilinear:
    """A matrix that is multilinear in the pieces of a flat w: the record of a structured reconciliation."""

    name: str
    factors: tuple[WeightFactor, ...]
    rows: str = "i"
    cols: str = "j"
    p: int | None = None
    q: int | None = None
    rank: int = 1
    share: float = 1.0  # of the entries that are parameters, where a factor is "kept"
    coef: float = 1.0
    seed: int = 0

    @property
    def is_matrix(self) -> bool:
        """Is W nothing but a view of w?"""
        whole = [WeightFactor(self.rows + self.cols)]
        return list(self.factors) == whole and len(whole[0].labels) == 2 and self.coef == 1.0

    def sizes(self, n: int, D: int) -> dict[str, int]:
        """Give every label its size; refuse a split that does not divide."""
        for letter, size in (("n", n), ("D", D)):
            if size < 1:
                fail(self.name, letter, f"is {size}", f"{letter} >= 1", "Pass the number of outputs and of features.")
        found = dict.fromkeys("".join(f.labels for f in self.factors), self.rank)
        for what, axes, size, part in (("n", self.rows, n, self.p), ("D", self.cols, D, self.q)):
            if len(axes) == 1:
                found[axes] = size
                continue
            first = largest_factor(size) if part is None else part
            if size % first:
                letter = "p" if what == "n" else "q"
                near = [d for d in range(1, size + 1) if size % d == 0]
                found = f"is {first} and {what} is {size}"
                advice = f"Pass another {letter}, or None for the largest factor up to the square root."
                fail(self.name, letter, found, f"{letter} divides {what}: one of {near[:12]}", advice)
            found[axes[0]], found[axes[1]] = first, size // first
        return found

    def shapes(self, sizes: dict[str, int]) -> list[tuple[int, ...]]:
        return [tuple(sizes[label] for label in f.labels) for f in self.factors]

    def _entries(self, factor: WeightFactor, shape: tuple[int, ...]) -> int:
        if factor.fill == "kept":
            return max(1, round(self.share * math.prod(shape)))
        return math.prod(shape) if factor.fill == "w" else 0

    def piece_lengths(self, n: int, D: int) -> list[int]:
        """Count the entries of w in each factor, in order."""
        return [self._entries(f, shape) for f, shape in zip(self.factors, self.shapes(self.sizes(n, D)), strict=True)]

    def length(self, n: int, D: int) -> int:
        return sum(self.piece_lengths(n, D))

    def constants(self, n: int, D: int) -> dict[str, Tensor]:
        """Draw what is frozen, alike for a seed on every machine: normal numbers, or the kept entries' places."""
        g = np.random.default_rng(self.seed)
        found: dict[str, Tensor] = {}
        for f, shape in zip(self.factors, self.shapes(self.sizes(n, D)), strict=True):
            if f.fill == "normal":
                drawn = normal(g, *shape)
                # the axis that the tokens meet lies last in memory: their product then reads it twice as fast
                found[f.name] = drawn.T.contiguous().T if f.labels[0] in self.cols else drawn
            elif f.fill == "kept":
                kept, size = self._entries(f, shape), math.prod(shape)
                table = np.full(size, kept, dtype=np.int64)  # elsewhere: the entry after the last, a zero
                table[np.sort(g.permutation(size)[:kept])] = np.arange(kept)
                found[f.name] = torch.from_numpy(table.reshape(shape))
        return found

    def tensors(self, w: Tensor, sizes: dict[str, int], constants: Constants) -> list[Tensor | None]:
        """Cut w into the factors, in order; None stands for an identity, which is never formed here."""
        found: list[Tensor | None] = []
        start = 0
        for f, shape in zip(self.factors, self.shapes(sizes), strict=True):
            stop = start + self._entries(f, shape)
            piece = w if stop - start == w.shape[0] else w[start:stop]
            if f.fill == "w":
                found.append(piece.reshape(shape))
            elif f.fill == "kept":
                found.append(F.pad(piece, (0, 1))[constants[f.name]])
            else:
                found.append(None if f.fill == "eye" else constants[f.name].to(w))
            start = stop
        return found

    def dense(self, w: Tensor, n: int, D: int, constants: Constants) -> Tensor:
        """Multiply the factors together: (n, D)."""
        sizes = self.sizes(n, D)
        shapes = self.shapes(sizes)
        tensors = [
            torch.eye(*shape, dtype=w.dtype, device=w.device) if t is None else t
            for t, shape in zip(self.tensors(w, sizes, constants), shapes, strict=True)
        ]
        labels = self.rows + self.cols
        given = "".join(f.labels for f in self.factors)
        ones = [label for label in labels if label not in given]  # axes that no factor has: W is the same along them
        tensors += [torch.ones(sizes[label], dtype=w.dtype, device=w.device) for label in ones]
        spec = ",".join([f.labels for f in self.factors] + ones) + "->" + labels
        W = torch.einsum(spec, *tensors).reshape(n, D)
        return W if self.coef == 1.0 else W * self.coef

    def apply(self, kappa: Features, w: Tensor, n: int, constants: Constants) -> Tensor:
        """Contract the tokens with one factor at a time: (..., D) -> (..., n)."""
        D = width_of(kappa)
        sizes = self.sizes(n, D)
        specs = [f.labels for f in self.factors]
        tensors = self.tensors(w, sizes, constants)
        tokens, specs, tensors, sizes = self._split(kappa, specs, tensors, sizes)
        fixed = tuple(t is None for t in tensors)
        plan = plan_steps(tuple(spec for spec, _ in tokens), tuple(specs), fixed, self.rows, tuple(sizes.items()))
        _, y = tokens.pop(plan.start)
        others = [_walk(x, plan.other, tensors, sizes, None) for _, x in tokens]  # one, where kappa is an outer product
        y = _finish(_walk(y, plan.steps, tensors, sizes, *(others or [None])), plan.labels, self.rows, sizes)
        y = y.reshape(*y.shape[: y.ndim - len(self.rows)], n)
        return y if self.coef == 1.0 else y * self.coef

    def _split(
        self, kappa: Features, specs: list[str], tensors: list[Tensor | None], sizes: dict[str, int]
    ) -> tuple[list[tuple[str, Tensor]], list[str], list[Tensor | None], dict[str, int]]:
        """Name the axes of the tokens. An outer product stays one where the columns split as it does, or can be."""
        if isinstance(kappa, Outer):
            U, V = kappa.left.shape[-1], kappa.right.shape[-1]
            if len(self.cols) == 2 and (sizes[self.cols[0]], sizes[self.cols[1]]) == (U, V):
                return [(self.cols[0], kappa.left), (self.cols[1], kappa.right)], specs, tensors, sizes
            whole = all(t is not None for spec, t in zip(specs, tensors, strict=True) if self.cols in spec)
            if len(self.cols) == 1 and whole:
                sizes = sizes | {"g": U, "h": V}
                cut = [spec.replace(self.cols, "gh") for spec in specs]
                parts = [
                    t if t is None or spec == new else t.reshape([sizes[label] for label in new])
                    for t, spec, new in zip(tensors, specs, cut, strict=True)
                ]
                return [("g", kappa.left), ("h", kappa.right)], cut, parts, sizes
            kappa = kappa.dense()
        shape = [sizes[label] for label in self.cols]
        x = kappa if len(shape) == 1 else kappa.reshape(*kappa.shape[:-1], *shape)
        return [(self.cols, x)], specs, tensors, sizes


def normal(g: np.random.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers. By numpy: no mode of torch (vmap, a trace, a device) reaches them."""
    return torch.from_numpy(g.standard_normal(shape, dtype=np.float32))


def largest_factor(size: int) -> int:
    """Find the largest factor of a size that is not above its square root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)


def plan_steps(*problem: Any) -> TokenOrder:
    """Find the order again; torch.compile takes it as it is."""
    return token_order(*problem)  # pyright: ignore[reportReturnType]  # without a limit there is one


# What torch.compiler.assume_constant_result sets; that would import the whole compiler, which takes as long as torch.
plan_steps._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _walk(
    y: Tensor, steps: Sequence[Pairing], factors: list[Tensor | None], sizes: dict[str, int], other: Any
) -> Tensor:
    for which, left, right, out in steps:
        if which is None:
            y = torch.einsum(f"...{left},...{right}->...{out}", y, other)
        elif (factor := factors[which]) is None:
            y = _through_eye(y, left, right, out, sizes)
        else:
            y = _meet(y, left, factor, right, out)
    return y


def _meet(y: Tensor, labels: str, factor: Tensor, right: str, out: str) -> Tensor:
    """Contract tokens with a factor; where that is a matrix product, its gradient is laid out as the factor is."""
    if not _is_product(labels, right, out):
        return torch.einsum(f"...{labels},{right}->...{out}", y, factor)
    if right[-1] != labels[-1]:
        return F.linear(y, factor.T)
    if factor.ndim == 2:
        return F.linear(y, factor)
    return F.linear(y, factor.flatten(0, -2)).unflatten(-1, factor.shape[:-1])


def _is_product(labels: str, right: str, out: str) -> bool:
    """Is the tokens' last axis all that is summed, and the factor, as it lies, a matrix on it?"""
    last = labels[-1]
    summed = [label for label in labels if label in right and label not in out] == [last]
    lies = len(right) > 1 and (right[-1] == last or (right[0] == last and len(right) == 2))
    return summed and lies and out == labels[:-1] + right.replace(last, "")


def _through_eye(y: Tensor, labels: str, right: str, out: str, sizes: dict[str, int]) -> Tensor:
    """Meet an identity matrix: one label takes the place of the other, cut or filled with zeros to its size."""
    row, col = right
    axis = labels.index(col)
    y = y.movedim(axis - len(labels), -1)
    size = sizes[row]
    y = y[..., :size] if size <= sizes[col] else F.pad(y, (0, size - sizes[col]))
    now = labels.replace(col, "") + row
    return y if now == out else torch.einsum(f"...{now}->...{out}", y)


def _finish(y: Tensor, labels: str, rows: str, sizes: dict[str, int]) -> Tensor:
    """Bring the result to the rows' order: what is not a row is summed, a row that no factor has is repeated."""
    wanted = "".join(label for label in rows if label in labels)
    if wanted != labels:
        y = torch.einsum(f"...{labels}->...{wanted}", y)
    if wanted != rows:
        missing = [k for k, label in enumerate(rows) if label not in wanted]
        for k in missing:
            y = y.unsqueeze(k - len(rows) if k - len(rows) != 0 else -1)
        y = y.expand(*y.shape[: y.ndim - len(rows)], *[sizes[label] for label in rows])
    return y

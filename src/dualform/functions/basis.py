"""What a data expansion is: kappa: R^m -> R^D, as one frozen value; and the catalogue of all of them.

Legend: x (..., m) data, m attributes, k functions per attribute (phi_1 .. phi_k), M base dim, D expanded, n outputs.

    kappa(x) = [ u, u (x) u, .., u^(x)d ],   u = base(x) in R^M      (x) the Kronecker product, first factor slowest

Almost every expansion has d = `power` = 1: it *is* its base. Taylor has base = x and any d; wavelets of order d
likewise. What contracts kappa with weights may use that structure (`contract` does) and build no row of D. Most bases
act on each attribute alone, through `basis(x, axis)`, which gives phi_1(x) .. phi_k(x) one by one, or on a new axis: -1
is the layout "attribute" (all functions of x_1, then all of x_2, ...), -2 the layout "function" (phi_1 of all
attributes, then phi_2, ...). `blocks` lays them side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dualform.catalogue import Catalogue
from dualform.functions.in_blocks import Basis, Pull, evaluate, joined
from dualform.functions.subsets import monomials, num_subsets, symmetric_powers
from dualform.shapes import fail, is_whole

expansions = Catalogue("expansions")
expansion = partial(expansions.record, suffix="_expansion")

# The widest row that is built: 0.4 GB in float32. Beyond it a setting exploded, and the message says how to do without.
widest_row = 100_000_000

Interval = tuple[float, float]
Layout = Literal["attribute", "function", "mixed"]
everywhere: Interval = (-math.inf, math.inf)


@dataclass(frozen=True)
class Expansion:
    """Map x (..., m) to its features kappa(x) (..., D).

    kappa(x) = [u, u (x) u, .., u^(x)d], u = base(x)
    Shape:  (..., m) -> (..., D), D = dim(m); any leading dims, none included.
    Dtype:  x's. Nothing is fitted or drawn: the same x gives the same features, on any device.
    Raises: ShapeError for a size m that the expansion does not take, for integers, and for a row too wide to build.
    Source: Zhang 2024 (RPN 1, arXiv 2407.04819), section 5.
    Example:
        >>> import torch, dualform as df
        >>> taylor = df.expansions.taylor(degree=2)
        >>> taylor.dim(3), taylor(torch.tensor([1.0, 2.0, 3.0])).tolist()[:6]
        (12, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    """

    name: str
    base: Callable[[Tensor], Tensor]
    base_dim: Callable[[int], int]
    rule: str  # D as text, in m and the options
    domain: Interval = (-1.0, 1.0)  # where it is differentiable (almost everywhere, if `rough`) and finite in float32
    reach: Interval = everywhere  # where float32 stays finite
    layout: Layout = "mixed"
    basis: Basis | None = None
    terms: tuple[str, ...] = ()  # phi_1 .. phi_k as Python expressions in x
    degree: int | None = None  # phi_j is a polynomial of this degree between neighbouring knots, if there are any
    knots: tuple[float, ...] = ()
    power: int = 1  # d: tensor powers of the base up to this one
    symmetric: bool = False  # of each tensor power keep each monomial once
    batchwise: bool = True  # row i of the result depends on row i of x alone
    label: Callable[[Sequence[str]], list[str]] | None = None  # the features' names, where `terms` do not say them
    rough: str = ""  # where and why it is not differentiable inside its domain

    @property
    def degrees(self) -> tuple[int, ...]:
        """The tensor powers of the base that are features: 1 .. d."""
        return tuple(range(1, self.power + 1))

    @property
    def width(self) -> int | None:
        """k, the number of functions per attribute, or None if the expansion does not act on each attribute alone."""
        return len(self.terms) if self.basis is not None else None

    def dim(self, m: int) -> int:
        """Return D, the number of features of m attributes."""
        if m < 1:
            fail(self.name, "m", f"is {m}", "at least one attribute, m >= 1", "Pass the size of x's last axis.")
        M = self.base_dim(m)
        return sum(num_subsets(M, d, repeat=True) if self.symmetric else M**d for d in self.degrees)

    def takes(self, m: int) -> bool:
        """Does it expand m attributes?"""
        try:
            return self.dim(m) > 0
        except ValueError:
            return False

    def phi(self, x: Tensor) -> Tensor:
        """Evaluate the k functions of one attribute: x (...) -> (..., k)."""
        if self.basis is None:
            advice = "Call the expansion itself."
            fail(self.name, "phi", "does not exist", "an expansion of each attribute alone", advice)
        return joined(self.basis(x, -1), -1)

    def check(self, m: int) -> int:
        """Return D = dim(m), or refuse a row too wide to build."""
        D = self.dim(m)
        if D > widest_row:
            M, d = self.base_dim(m), self.power
            packed = sum(num_subsets(M, p, repeat=True) for p in self.degrees)
            ways = [f"symmetric=True ({packed:,} features)"] if d > 1 and not self.symmetric else []
            ways += [f"degree={d - 1} (at most {sum(M**p for p in range(1, d)):,})"] if d > 1 else []
            ways += ["fewer attributes"]
            ways += ["contract(x, weight), which builds no row"] if d > 1 and not self.symmetric else []
            found = f"has m = {m} attributes, which make D = {self.rule} = {D:,} features per row"
            advice = f"Use {', '.join(ways[:-1])}{' or ' if ways[:-1] else ''}{ways[-1]}."
            fail(self.name, "x", found, f"at most {widest_row:,}", advice)
        return D

    def __call__(self, x: Tensor) -> Tensor:
        self._check_input(x)
        self.check(x.shape[-1])
        return self.expand(x)

    def expand(self, x: Tensor) -> Tensor:
        """Expand an x that was checked before."""
        u = self.base(x)
        if self.power == 1:
            return u
        if self.symmetric:
            return torch.cat(list(symmetric_powers(u, self.power)), -1)
        found = u
        for _ in range(1, self.power):
            # [1, kappa_(d-1)] (x) u = kappa_d: no copy of lower powers; a matmul, whose backward forms nothing as wide
            rows = torch.cat([torch.ones_like(u[..., :1]), found], -1)
            found = (rows.unsqueeze(-1) @ u.unsqueeze(-2)).flatten(-2)
        return found

    def _check_input(self, x: Tensor) -> None:
        check_floating(self.name, x)
        if x.ndim == 0:
            fail(self.name, "x", "is a scalar", "x (..., m)", "Add an axis of attributes: x[..., None].")

    def contract(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return kappa(x) @ weight.T without building a row of D features where tensor powers allow it.

        Horner: W_1 u + W_2 (u (x) u) + .. = (W_1 + (W_2 + ..) u) u, last factor first: b n M^(d-1) numbers, not b M^d.
        Shape:  x (..., m), weight (n, D), its columns those of kappa: W_d (n, M^d) for d in degrees -> (..., n).
        """
        n, M = weight.shape[0], self.base_dim(x.shape[-1])
        if self.symmetric or self.power == 1 or n >= M:
            return self(x) @ weight.mT
        self._check_input(x)
        u = self.base(x)
        parts = weight.split([M**d for d in self.degrees], -1)
        total = u @ parts[-1].reshape(-1, M).mT  # (..., n M^(d - 1))
        for part in reversed(parts[:-1]):
            total = (total + part.flatten()).unflatten(-1, (-1, M)) @ u.unsqueeze(-1)
            total = total.squeeze(-1)
        return total

    @torch.no_grad()
    def untold(self, m: int) -> list[tuple[str, list[int]]]:
        """Name the base's functions, each with the attributes it is of, where neither `terms` nor `label` say them.

        One function of each attribute has the expansion's name; any others are its name with a number, of all m.
        """
        if self.label is not None or self.basis is not None:
            return []
        low, high = (max(-1.0, min(1.0, end)) for end in self.domain)
        x = low + (high - low) * (0.3 + 0.4 * torch.linspace(0, 1, m + 1, dtype=torch.float64)[1:].square())
        found = self.base(x)
        if torch.equal(found, x):
            return []
        if len(found) == m and self.takes(1) and torch.equal(found, torch.cat([self.base(t) for t in x.split(1)])):
            return [(self.name, [i]) for i in range(m)]
        return [(f"{self.name}_{k}", list(range(m))) for k in range(len(found))]

    def features(self, names: Sequence[str]) -> list[str]:
        """Name the D features as Python expressions in the attributes' names and the functions of `vocabulary`."""
        if self.label is not None:
            return self.label(names)
        base = [f"{word}({', '.join(names[i] for i in of)})" for word, of in self.untold(len(names))] or list(names)
        if self.basis is not None:
            rows = [[substitute(term, name) for term in self.terms] for name in names]
            base = [cell for row in (rows if self.layout == "attribute" else zip(*rows, strict=True)) for cell in row]
        if self.power == 1:
            return base
        kinds = [monomials(len(base), d, unique=self.symmetric) for d in self.degrees]
        wrapped = base if self.basis is None else [f"({term})" for term in base]
        return ["*".join(wrapped[i] for i in index) for kind in kinds for index in kind]


def check_floating(name: str, x: Tensor) -> None:
    """Refuse what is no tensor of floating numbers."""
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]: the public border
        fail(name, "x", f"is a {type(x).__name__}", "a tensor x (..., m)", "Convert it: torch.as_tensor(x).")
    if not x.is_floating_point():
        fail(name, "x", f"has dtype {x.dtype}", "a floating dtype", "Convert it: x.float() or x.double().")


def substitute(term: str, name: str) -> str:
    """Put another name, or an expression, in the place of the word x."""
    return re.sub(r"\bx\b", name.replace("\\", r"\\"), term)


def _sinc(t: float) -> float:
    return math.sin(math.pi * t) / (math.pi * t) if t else 1.0


# What the terms of expansions are written in: eval(term, vocabulary | {"x": 0.5}).
vocabulary: dict[str, object] = {
    name: getattr(math, name)
    for name in "exp log sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh pi".split()
} | {"abs": abs, "max": max, "sinc": _sinc}  # fmt: skip


def attribute_wise(
    name: str, basis: Basis, terms: Sequence[str], *, pull: Pull | None = None, layout: Layout = "attribute",
    rule: str = "", **notes: Any,
) -> Expansion:  # fmt: skip
    """Make the expansion that applies the functions of `basis`, one term each, to every attribute alone."""
    k = len(terms)

    def base(x: Tensor) -> Tensor:
        return evaluate(x, basis, pull, k, -1 if layout == "attribute" else -2).flatten(-2)

    return Expansion(
        name, base, lambda m: m * k, rule or f"{k} m", layout=layout, basis=basis, terms=tuple(terms), **notes
    )


def along(values: Tensor, axis: int) -> Tensor:
    """Lay k constants along the new axis of a basis: (k,) for the axis -1, (k, 1) for -2."""
    return values if axis == -1 else values.unsqueeze(-1)


def positive(name: str, option: str, value: float, least: int = 1) -> None:
    """Refuse a degree or a count that is no whole number >= least."""
    if not is_whole(value, least):
        fail(name, option, f"is {value!r}", f"a whole number {option} >= {least}", f"Pass {option}={least} or more.")

"""Shifted and scaled copies of one function on every attribute: radial bases, Fourier terms, uniform B-splines.

Legend: x attribute, c centre, eps inverse width, h cell width, t cells, d degree, N order, P period.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, along, attribute_wise, expansion, positive, substitute
from dualform.functions.in_blocks import Local, Pull, by_slopes
from dualform.shapes import fail

Span = tuple[float, float]
Radial = Callable[[Tensor], Tensor]


def _ordered(name: str, span: Span) -> tuple[float, float]:
    if len(span) != 2 or not span[0] < span[1] or not all(math.isfinite(end) for end in span):
        fail(name, "span", f"is {span}", "two finite numbers, low < high", "Pass span=(low, high).")
    return float(span[0]), float(span[1])


def _radial(
    name: str, shape: str, function: Radial, slope: Radial, span: Span, count: int, epsilon: float, centres: Any
) -> Expansion:
    """Place function((eps (x - c))^2) at every centre; `shape`: its text in c, eps; slope: f' in terms of f.

    centres: (k,) for all attributes, (m, k) for each its own, None for `count` even ones in span.
    """
    positive(name, "count", count)
    low, high = _ordered(name, span)
    if not (math.isfinite(epsilon) and epsilon != 0):
        fail(name, "epsilon", f"is {epsilon}", "a finite number, not 0", "Pass the inverse width of a bump.")
    step = (high - low) / max(1, count - 1)
    wanted = [low + step * k for k in range(count)] if centres is None else centres
    try:
        given = torch.tensor(wanted, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        advice = "Pass nested tuples of equal lengths."
        fail(name, "centres", f"are {wanted!r}", "finite numbers, (k,) or (m, k)", advice)
    if given.ndim not in (1, 2) or not given.numel() or not given.isfinite().all():
        advice = "Pass nested tuples."
        fail(name, "centres", f"has shape {tuple(given.shape)}", "finite numbers, (k,) or (m, k)", advice)
    values = given.tolist()

    def places(x: Tensor) -> Tensor:
        if centres is None:
            return torch.linspace(low * epsilon, high * epsilon, count, dtype=x.dtype, device=x.device)
        return torch.tensor(values, dtype=x.dtype, device=x.device) * epsilon

    def basis(x: Tensor, axis: int) -> Tensor:
        scaled = x if epsilon == 1 else x * epsilon
        return function((scaled.unsqueeze(axis) - along(places(x), axis)).square())

    def pull(x: Tensor, y: Tensor, g: Tensor, axis: int) -> Tensor:
        # sum_k g_k f'_k 2 eps (eps x - eps c_k): two products with constants, and no pass more over the features
        t, c = slope(y).mul_(g), places(x)
        return ((t @ torch.ones_like(c)) * (x * epsilon) - t @ c) * (2 * epsilon)

    domain = (float(given.min()) - 1, float(given.max()) + 1)
    if given.ndim == 1:
        terms = [shape.format(eps=epsilon, c=c) for c in values]
        known = Pull(pull, keeps_features=True, width=3)
        return attribute_wise(name, basis, terms, pull=known, rule="m k, k centres", domain=domain)
    m, k = given.shape

    def size(found: int) -> int:
        if found != m:
            fail(name, "x", f"has {found} attributes", f"{m}, one row of centres each", f"Pass x (..., {m}).")
        return m * k

    def label(names: Sequence[str]) -> list[str]:
        rows = zip(names, values, strict=True)
        return [substitute(shape.format(eps=epsilon, c=c), name) for name, row in rows for c in row]

    return Expansion(name, lambda x: basis(x, -1).flatten(-2), size, "m k, k centres", domain, label=label)


Centres = Sequence[float] | Sequence[Sequence[float]] | None


def _bump(name: str, words: str, shape: str, function: Radial, slope: Radial, **columns: Any) -> None:
    """Register the expansion in copies of one bump."""

    def build(span: Span = (-1.0, 1.0), count: int = 10, epsilon: float = 1.0, centres: Centres = None) -> Expansion:
        return _radial(name, shape, function, slope, span, count, epsilon, centres)

    build.__name__, build.__doc__ = name, f"Expand every attribute in {words} around centres."
    expansion(domain="all reals; decays to 0 away from the centres", **columns)(build)


_bump(
    "gaussian_rbf", "Gaussian bumps", "exp(-({eps!r}*(x-({c!r})))**2)", lambda r: torch.exp(-r), lambda y: -y,
    formula="exp(-(eps (x - c_k))^2), c_k = linspace(span, count) or the given centres", source="Broomhead, Lowe 1988",
)  # fmt: skip
_bump(
    "inverse_quadratic_rbf", "inverse quadratic bumps", "1/(1+({eps!r}*(x-({c!r})))**2)", lambda r: 1 / (1 + r),
    lambda y: -y * y, formula="1 / (1 + (eps (x - c_k))^2), c_k as for gaussian_rbf", source="Fornberg, Flyer 2015",
)  # fmt: skip


@expansion(
    formula="[cos(2 pi n x / P), sin(2 pi n x / P)] for n = 1 .. N",
    source="Zhang 2024 (RPN 1), section 5",
    domain="all reals, with period P",
)
def fourier(period: float = 10, order: int = 5) -> Expansion:
    """Expand every attribute in cosines and sines of the harmonics of one period."""
    positive("fourier", "order", order)
    if not (math.isfinite(period) and period > 0):
        fail("fourier", "period", f"is {period}", "a positive number P", "Pass the length of one period in units of x.")

    def basis(x: Tensor, axis: int) -> Tensor:
        n = torch.arange(1, order + 1, dtype=x.dtype, device=x.device)
        angle = x.unsqueeze(axis) * along(n * (2 * math.pi / period), axis)
        # cos and sin of one harmonic are neighbours: a pair axis right after the harmonics', then both in one
        pair = axis if axis == -1 else -2
        both = torch.stack([angle.cos(), angle.sin()], pair)
        return both.flatten(-2) if axis == -1 else both.flatten(-3, -2)

    terms = [f"{f}({2 * math.pi * n / period!r}*x)" for n in range(1, order + 1) for f in ("cos", "sin")]
    domain, reach = (-period / 2, period / 2), (-1e6, 1e6)
    return attribute_wise("fourier", basis, terms, layout="function", rule="2 m N", domain=domain, reach=reach)


def _spline_pieces(d: int) -> list[list[float]]:
    """Return the d + 1 pieces of the uniform B-spline of degree d, as seen from one cell: row p has the factors of u^p.

    Cox and de Boor on unit knots, on coefficients: N_r^k = ((u + k - r) N_{r-1}^{k-1} + (r + 1 - u) N_r^{k-1}) / k.
    """
    pieces = [[1.0]]
    for k in range(1, d + 1):
        rising, falling = [[0.0], *pieces], [*pieces, [0.0]]
        pieces = []
        for r in range(k + 1):
            piece = [0.0] * (k + 1)
            for p, value in enumerate(rising[r]):
                piece[p] += (k - r) * value / k
                piece[min(p + 1, k)] += value / k
            for p, value in enumerate(falling[r]):
                piece[p] += (r + 1) * value / k
                piece[min(p + 1, k)] -= value / k
            pieces.append(piece)
    return [[piece[p] for piece in pieces] for p in range(d + 1)]


def _spline_text(start: float, h: float, d: int) -> str:
    """Write a spline as truncated powers of the distance to its nearer end: nothing large cancels."""
    c = (d + 1) / 2
    near = f"abs((x-({start!r}))/{h!r}-{c!r})"
    factors = [(-1) ** j * math.comb(d + 1, j) / math.factorial(d) for j in range(math.ceil(c))]
    return "+".join(f"{f!r}*max(0.0,{c - j!r}-{near})**{d}" for j, f in enumerate(factors)).replace("+-", "-")


@expansion(
    aliases=("b_spline",),
    formula="B_i of degree d on the knots low + h (-d .. t + d), h = (high - low) / t (Cox, de Boor), i = 1 .. t + d",
    source="de Boor 1978; Liu 2024 (KAN), section 2.3",
    domain="all reals; sums to 1 on [low, high), fades to 0 over d cells outside and stays 0",
)
def bspline(span: Span = (-1.0, 1.0), cells: int = 5, degree: int = 3) -> Expansion:
    """Expand every attribute in uniform B-splines of one degree; only the degree + 1 that are not 0 are evaluated."""
    positive("bspline", "cells", cells)
    positive("bspline", "degree", degree)
    low, high = _ordered("bspline", span)
    t, d = int(cells), int(degree)
    h = (high - low) / t
    pieces = _spline_pieces(d)

    def local(x: Tensor, rows: list[list[float]]) -> Local:
        place = (x - low) * (1 / h) + d  # in cells from the first knot
        cell = place.detach().floor()
        u = (place - cell).clamp(0, 1)
        factors = [x.new_tensor(row).reshape(-1, *[1] * x.ndim) for row in rows]
        values = torch.addcmul(factors[-2], factors[-1], u)  # Horner, all d + 1 pieces at once
        for lower in factors[-3::-1]:
            values = torch.addcmul(lower, values, u)
        return Local(values, cell - d, t + d)

    def basis(x: Tensor, axis: int) -> Local:
        return local(x, pieces)

    def slopes(x: Tensor, axis: int) -> Local:
        return local(x, [[p / h * value for value in row] for p, row in enumerate(pieces)][1:])

    terms = [_spline_text(low + h * (i - d), h, d) for i in range(t + d)]
    knots = tuple(low + h * k for k in range(-d, t + d + 1))
    known = {"pull": by_slopes(slopes), "domain": (low, high), "degree": d, "knots": knots}
    return attribute_wise("bspline", basis, terms, rule="m (t + d)", **known)

"""Polynomials of one attribute by three-term recurrences: one engine, and a row of coefficients per family.

    P_n(x) = (a x + b) P_{n-1}(x) + (c + e x^2) P_{n-2}(x),   (a, b, c, e) = step(n),   n = 2 .. d

c or e is 0. P_0 is no feature (a bias has it). Legend: x attribute, d degree, n index, al and be alpha and beta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dualform.functions.basis import Expansion, Interval, attribute_wise, expansion, positive
from dualform.functions.in_blocks import by_slopes
from dualform.shapes import fail

Rows = list[tuple[float, float, float, float]]
Step = Callable[[int], tuple[float, float, float, float]]


def recurrence(
    name: str, degree: int, p0: float, p1: tuple[float, float], step: Step, interval: Interval = (-1.0, 1.0)
) -> Expansion:
    """Make the expansion [P_1, .., P_d] of every attribute. p1: (slope, shift) of P_1."""
    positive(name, "degree", degree)
    d = int(degree)
    try:
        rows = [step(n) for n in range(2, d + 1)]
    except ZeroDivisionError:
        advice = "Choose other parameters: the polynomial of that degree is not defined by its recurrence."
        fail(name, "alpha and beta", "make a denominator of the recurrence 0", "alpha > -1 and beta > -1", advice)

    terms = [_text(coefficients) for coefficients in _coefficients(p0, p1, rows)]
    # |P_d| stays below 1e30 up to here: the leading coefficients of d <= 20 are below 1e23.
    edge = 10.0 ** (min(30.0, 30.0 / d))
    pull = by_slopes(lambda x, axis: _run_slopes(x, p0, p1, rows))
    return attribute_wise(
        name, lambda x, axis: _run(x, p0, p1, rows), terms, pull=pull, rule="m d", degree=d, domain=interval,
        reach=(-edge, edge) if d > 1 else (-1e30, 1e30),
    )  # fmt: skip


def _run(x: Tensor, p0: float, p1: tuple[float, float], rows: Rows) -> Iterator[Tensor]:
    slope, shift = p1
    line = x if slope == 1 else x * slope if slope else torch.zeros_like(x)
    older, newer = p0, line + shift if shift else line
    yield newer
    for a, b, c, e in rows:
        low = older * c if c else 0.0
        if b:
            low = newer * b + low
        if e:
            low = x * x * (older * e) + low
        older, newer = newer, _plus(low, x, newer, a)
        yield newer


def _plus(low: Tensor | float, x: Tensor, y: Tensor, a: float) -> Tensor:
    """Return low + a x y."""
    if isinstance(low, Tensor):
        return torch.addcmul(low, x, y, value=a) if a else low
    return x * y * a + low if low else x * y * a


def _run_slopes(x: Tensor, p0: float, p1: tuple[float, float], rows: Rows) -> Iterator[Tensor]:
    """Differentiate the recurrence: P_n' = a P_{n-1} + (a x + b) P_{n-1}' + (c + e x^2) P_{n-2}' + 2 e x P_{n-2}."""
    below: Tensor | float = p0
    older, newer = torch.zeros_like(x), torch.full_like(x, p1[0])
    yield newer
    for value, (a, b, c, e) in zip(_run(x, p0, p1, rows), rows, strict=False):
        grown = torch.addcmul(value * a, x, newer, value=a) if a else newer * b
        if a and b:
            grown.add_(newer, alpha=b)
        if c:
            grown.add_(older, alpha=c)
        if e:
            grown.add_(x * (x * older + 2 * below), alpha=e)
        older, newer, below = newer, grown, value
        yield newer


def _coefficients(p0: float, p1: tuple[float, float], rows: Rows) -> list[list[float]]:
    """Run the recurrence on coefficients, lowest power first."""
    older, newer = [p0], [p1[1], p1[0]]
    found = [newer]
    for n, (a, b, c, e) in enumerate(rows, 2):
        longer = [0.0] * (n + 1)
        for power, value in enumerate(newer):
            longer[power + 1] += a * value
            longer[power] += b * value
        for power, value in enumerate(older):
            longer[power] += c * value
            if e:
                longer[power + 2] += e * value
        older, newer = newer, longer
        found.append(newer)
    return found


def _text(coefficients: list[float]) -> str:
    powers = ["", "x", *(f"x**{n}" for n in range(2, len(coefficients)))]
    parts = []
    for value, power in zip(coefficients, powers, strict=False):
        factor = "" if value == 1 and power else "-" if value == -1 and power else repr(float(value))
        parts += [f"{factor}*{power}" if factor not in ("", "-") and power else factor + power] if value else []
    return "+".join(parts).replace("+-", "-") or "0.0"


def _family(
    name: str, words: str, p0: float, p1: tuple[float, float], step: Step, *, interval: Interval = (-1.0, 1.0),
    **columns: Any,
) -> None:  # fmt: skip
    """Register a family whose one option is the degree."""

    def build(degree: int = 2) -> Expansion:
        return recurrence(name, degree, p0, p1, step, interval)

    build.__name__, build.__doc__ = name, f"Expand every attribute in {words}."
    expansion(**columns)(build)


_family(
    "chebyshev", "Chebyshev polynomials of the first kind, degrees 1 to `degree`", 1, (1, 0), lambda n: (2, 0, -1, 0),
    formula="T_n = 2 x T_{n-1} - T_{n-2}, T_0 = 1, T_1 = x", source="Mason, Handscomb 2003; DLMF 18.9",
    domain="all reals; |T_n| <= 1 on [-1, 1], grows as x^n outside (x is not squashed)",
)  # fmt: skip
_family(
    "legendre", "Legendre polynomials, degrees 1 to `degree`", 1, (1, 0),
    lambda n: ((2 * n - 1) / n, 0, -(n - 1) / n, 0),
    formula="n P_n = (2n - 1) x P_{n-1} - (n - 1) P_{n-2}, P_0 = 1, P_1 = x", source="DLMF 18.9",
    domain="all reals; |P_n| <= 1 on [-1, 1], grows as x^n outside",
)  # fmt: skip


@expansion(
    formula="P_n^(al,be), P_1 = ((al + be + 2) x + al - be) / 2, standard recurrence",
    source="DLMF 18.9.2",
    domain="all reals; orthogonal on [-1, 1], grows as x^n outside; not where n + al + be or 2n + al + be - 2 is 0",
)
def jacobi(degree: int = 2, alpha: float = 1.0, beta: float = 1.0) -> Expansion:
    """Expand every attribute in Jacobi polynomials, degrees 1 to `degree`."""
    s = alpha + beta

    def step(n: int) -> tuple[float, float, float, float]:
        scale = 2 * n * (n + s) * (2 * n + s - 2)
        return (
            (2 * n + s - 1) * (2 * n + s) * (2 * n + s - 2) / scale,
            (2 * n + s - 1) * (alpha**2 - beta**2) / scale,
            -2 * (n + alpha - 1) * (n + beta - 1) * (2 * n + s) / scale,
            0,
        )

    return recurrence("jacobi", degree, 1, ((s + 2) / 2, (alpha - beta) / 2), step)


@expansion(
    formula="n C_n = 2 (n + al - 1) x C_{n-1} - (n + 2 al - 2) C_{n-2}, C_0 = 1, C_1 = 2 al x",
    source="DLMF 18.9",
    domain="all reals; orthogonal on [-1, 1], grows as x^n outside",
)
def gegenbauer(degree: int = 2, alpha: float = 1.0) -> Expansion:
    """Expand every attribute in Gegenbauer polynomials, degrees 1 to `degree`."""
    return recurrence(
        "gegenbauer", degree, 1, (2 * alpha, 0),
        lambda n: (2 * (n - 1 + alpha) / n, 0, -(n - 2 + 2 * alpha) / n, 0),
    )  # fmt: skip


_family(
    "hermite", "the probabilists' Hermite polynomials, degrees 1 to `degree`", 1, (1, 0), lambda n: (1, 0, 1 - n, 0),
    formula="He_n = x He_{n-1} - (n - 1) He_{n-2}, He_0 = 1, He_1 = x", interval=(-3.0, 3.0),
    source="DLMF 18.9 (the probabilists' polynomials)",
    domain="all reals; orthogonal under the standard normal density, grows as x^n",
)  # fmt: skip


@expansion(
    formula="n L_n = (2n - 1 + al - x) L_{n-1} - (n - 1 + al) L_{n-2}, L_0 = 1, L_1 = 1 + al - x",
    source="DLMF 18.9. Differs from tinyBIG 0.2.1, which starts from L_1 = x + 1 + al",
    domain="all reals; orthogonal on [0, inf) under x^al exp(-x), grows as x^n",
)
def laguerre(degree: int = 2, alpha: float = 1.0) -> Expansion:
    """Expand every attribute in generalised Laguerre polynomials, degrees 1 to `degree`."""
    return recurrence(
        "laguerre", degree, 1, (-1, 1 + alpha),
        lambda n: (-1 / n, (2 * n - 1 + alpha) / n, -(n - 1 + alpha) / n, 0), (0.0, 4.0),
    )  # fmt: skip


_family(
    "bessel", "Bessel polynomials, degrees 1 to `degree`", 1, (1, 1), lambda n: (2 * n - 1, 0, 1, 0),
    formula="y_n = (2n - 1) x y_{n-1} + y_{n-2}, y_0 = 1, y_1 = x + 1", source="Krall, Frink 1949",
    domain="all reals; grows as (2n - 1)!! x^n",
)  # fmt: skip
_family(
    "reverse_bessel", "reverse Bessel polynomials, degrees 1 to `degree`", 1, (1, 1), lambda n: (0, 2 * n - 1, 0, 1),
    formula="theta_n = (2n - 1) theta_{n-1} + x^2 theta_{n-2}, theta_0 = 1, theta_1 = x + 1",
    source="Krall, Frink 1949", domain="all reals; grows as x^n",
)  # fmt: skip
_family(
    "fibonacci", "Fibonacci polynomials F_1 to F_degree", 0, (0, 1), lambda n: (1, 0, 1, 0),
    formula="F_n = x F_{n-1} + F_{n-2}, F_0 = 0, F_1 = 1", source="Hoggatt, Bicknell 1973",
    domain="all reals; grows as x^(n-1); the first feature of each attribute is the constant 1",
)  # fmt: skip
_family(
    "lucas", "Lucas polynomials, degrees 1 to `degree`", 2, (1, 0), lambda n: (1, 0, 1, 0),
    formula="L_n = x L_{n-1} + L_{n-2}, L_0 = 2, L_1 = x", source="Bicknell 1970", domain="all reals; grows as x^n",
)  # fmt: skip

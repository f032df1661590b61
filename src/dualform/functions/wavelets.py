"""Wavelets of one attribute: one engine of dilations and translations, a mother per family.

    phi_{s,t}(x) = a^(-s/2) phi(x / a^s - t b),   s = 0 .. scales - 1,  t = 0 .. shifts - 1

Orders above 1 are tensor powers, as in a Taylor expansion. Legend: a dilation, b translation, tau = x / a^s - t b.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.catalogue import Catalogue
from dualform.functions.basis import (
    Expansion,
    Interval,
    along,
    attribute_wise,
    everywhere,
    expansion,
    expansions,
    positive,
    substitute,
)
from dualform.functions.in_blocks import Pull
from dualform.shapes import fail

_options = "dilation a >= 1, translation b >= 0; a = 1 makes all scales the same"


class Mother(NamedTuple):
    """One wavelet phi, before it is dilated and moved; text is phi as an expression in tau."""

    phi: Callable[[Tensor], Tensor]
    text: str
    domain: Interval
    reach: Interval = everywhere
    rough: str = ""
    slope: Callable[[Tensor], Tensor] | None = None  # phi' as a tensor of its own


def _children_options(
    dilation: float = 1.0, translation: float = 1.0, degree: int = 1, scales: int = 1, shifts: int = 1
) -> dict[str, Any]:
    return locals()


_common = inspect.signature(_children_options).parameters


def wavelet(
    *aliases: str, domain: str, nested: Mapping[str, Catalogue] | None = None, **columns: Any
) -> Callable[[Callable[..., Mother]], Callable[..., Mother]]:
    """Register the expansion in the children of the mother that the decorated function makes; their options are its."""

    def register(make: Callable[..., Mother]) -> Callable[..., Mother]:
        own = inspect.signature(make).parameters
        order = (own, _common) if nested else (_common, own)  # a spec of another record leads

        def build(**options: Any) -> Expansion:
            mother = make(**{name: options.pop(name) for name in own})
            return dilated(make.__name__, mother, **options)

        signature = inspect.Signature([p for part in order for p in part.values()])
        build.__signature__ = signature  # type: ignore[attr-defined]
        build.__name__, build.__doc__, build.__module__ = make.__name__, make.__doc__, make.__module__
        expansion(aliases=aliases, domain=f"{domain}; {_options}", nested=nested, **columns)(build)
        return make

    return register


def dilated(
    name: str, mother: Mother, dilation: float, translation: float, degree: int, scales: int, shifts: int
) -> Expansion:
    """Make the expansion in the children of one mother."""
    a, b = dilation, translation
    for option, value in (("degree", degree), ("scales", scales), ("shifts", shifts)):
        positive(name, option, value)
    if not (a >= 1 and b >= 0 and math.isfinite(a) and math.isfinite(b)):
        fail(name, "(dilation, translation)", f"is ({a}, {b})", "dilation >= 1, translation >= 0", "Pass a = 2, b = 1.")
    children = [(s, t) for s in range(scales) for t in range(shifts)]

    def constants(x: Tensor, axis: int, power: float) -> Tensor:
        return along(x.new_tensor([a ** (power * s) for s, _ in children]), axis)

    def places(x: Tensor, axis: int) -> Tensor:
        shift = along(x.new_tensor([-t * b for _, t in children]), axis)
        x = x.unsqueeze(axis)
        return x + shift if a == 1 else torch.addcmul(shift, x, constants(x, axis, -1))

    def basis(x: Tensor, axis: int) -> Tensor:
        y = mother.phi(places(x, axis))
        return y if a == 1 else y * constants(x, axis, -0.5)

    def pull(x: Tensor, y: None, g: Tensor, axis: int) -> Tensor:
        assert mother.slope is not None
        return mother.slope(places(x, -1)).mul_(g) @ constants(x, -1, -1.5)

    terms = [f"{a ** (-s / 2)!r}*({mother.text.replace('tau', f'(x/{a**s!r}-{t * b!r})')})" for s, t in children]
    known = None if mother.slope is None else Pull(pull, width=5)
    made = attribute_wise(name, basis, terms, pull=known, domain=mother.domain, reach=mother.reach, rough=mother.rough)
    return replace(made, power=degree, rule="sum of (m s t)^i, i = 1 .. degree")


@wavelet(
    formula="a^(-s/2) phi(x / a^s - t b) with the function of any other record as phi",
    source="Zhang 2024 (RPN 1), section 5; in tinyBIG 0.2.1 the abstract base of the others",
    domain="that of the mother, in tau",
    nested={"mother": expansions},
)
def discrete_wavelet(mother: Any = "ricker_wavelet") -> Mother:
    """Expand every attribute in dilations and translations of one function, that of an expansion with one."""
    if mother.width != 1 or mother.power != 1:
        found = f"is {mother}, with {mother.width or 'no'} functions per attribute"
        advice = "Pass an expansion such as ricker_wavelet, naive_normal or ('gaussian_rbf', {'centres': (0.0,)})."
        fail("discrete_wavelet", "mother", found, "exactly 1", advice)
    return Mother(
        lambda tau: mother.phi(tau).squeeze(-1), substitute(mother.terms[0], "tau"), mother.domain, mother.reach,
        mother.rough,
    )  # fmt: skip


@wavelet(
    "haar", "harr_wavelet", "harr_wavelet_expansion", formula="phi(tau) = 1 on [0, 1/2), -1 on [1/2, 1), else 0",
    source="Haar 1910", domain="all reals; 0 outside [0, 1) in tau",
)  # fmt: skip
def haar_wavelet() -> Mother:
    """Expand every attribute in Haar wavelets."""

    def mother(tau: Tensor) -> Tensor:
        half = (2 * tau).floor()
        return (1 - half.abs()).relu() - (1 - (half - 1).abs()).relu()

    return Mother(
        mother, "(0<=tau<0.5)-(0.5<=tau<1)", (-0.5, 1.5),
        rough="piecewise constant: jumps at tau = 0, 1/2, 1 and has gradient 0 elsewhere",
    )  # fmt: skip


@wavelet(
    formula="phi(tau) = tau^(al-1) (1 - tau)^(be-1) / B(al, be) on [0, 1], else 0",
    source="Zhang 2024 (RPN 1), section 5. Differs from tinyBIG 0.2.1, "
    "which squashes the whole batch if one tau is outside",
    domain="all reals; 0 outside [0, 1] in tau; alpha, beta >= 1",
)
def beta_wavelet(alpha: float = 1.0, beta: float = 1.0) -> Mother:
    """Expand every attribute in dilated densities of the beta distribution."""
    if not (alpha >= 1 and beta >= 1):
        advice = "Below 1 the density is not bounded."
        fail("beta_wavelet", "(alpha, beta)", f"is ({alpha}, {beta})", "both >= 1", advice)
    scale = math.exp(math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta))

    def mother(tau: Tensor) -> Tensor:
        inside = (tau >= 0) & (tau <= 1)
        safe = torch.where(inside, tau, 0.5)  # so that no infinite slope of what is left out is multiplied by 0
        return torch.where(inside, scale * safe ** (alpha - 1) * (1 - safe) ** (beta - 1), tau.abs() * 0)

    return Mother(
        mother, f"(0<=tau<=1)*{scale!r}*abs(tau)**{alpha - 1!r}*abs(1-tau)**{beta - 1!r}", (0.1, 0.9),
        rough="" if min(alpha, beta) >= 2 else "alpha or beta below 2: jumps or has an infinite slope at tau = 0 or 1",
    )  # fmt: skip


def _sinc(t: Tensor) -> Tensor:
    """sin(pi t) / (pi t), 1 at 0: as torch.sinc, whose CPU kernel takes one number at a time."""
    t = _off_zero(t * math.pi)
    return torch.sin(t) / t


def _off_zero(t: Tensor) -> Tensor:
    """Move 0, and nothing else that matters, to the smallest normal number, whose sine divided by it is 1."""
    return t + torch.finfo(t.dtype).tiny


@wavelet(
    formula="phi(tau) = (sin 2 pi tau - sin pi tau) / (pi tau), 1 at 0",
    source="Mallat 2009, section 7.2. Differs from tinyBIG 0.2.1, which gives NaN at 0",
    domain="all reals; decays as 1 / tau",
)
def shannon_wavelet() -> Mother:
    """Expand every attribute in Shannon wavelets."""

    def mother(tau: Tensor) -> Tensor:
        half = _off_zero(tau * (math.pi / 2))  # sin 4h - sin 2h = 2 cos 3h sin h
        return torch.cos(3 * half) * torch.sin(half) / half

    def slope(tau: Tensor) -> Tensor:
        a = _off_zero(tau * math.pi)
        c = torch.cos(a)
        y = torch.sin(a).mul_(2 * c - 1).div_(a)
        found = c.square().mul_(4).sub_(2).sub_(c).sub_(y).div_(a)
        near = a.abs() < 0.03  # where that cancels
        if near.any():
            few = a[near]
            square = few.square()
            found[near] = few * (-7 / 3 + square * (31 / 30 + square * (-127 / 840 + square * (511 / 45360))))
        return found.mul_(math.pi)

    return Mother(mother, "2*sinc(2*tau)-sinc(tau)", (-2.0, 2.0), slope=slope)


@wavelet(
    "mexican_hat_wavelet",
    formula="phi(tau) = 2 (1 - (tau/sigma)^2) exp(-tau^2 / (2 sigma^2)) / (sqrt(3 sigma) pi^(1/4))",
    source="Ricker 1953",
    domain="all reals; decays to 0",
)
def ricker_wavelet(sigma: float = 1.0) -> Mother:
    """Expand every attribute in Ricker wavelets (Mexican hats)."""
    _width("ricker_wavelet", "sigma", sigma)
    scale = 2 / (math.sqrt(3 * sigma) * math.pi**0.25)

    def mother(tau: Tensor) -> Tensor:
        square = tau.square()
        return (scale - square * (scale / sigma**2)) * torch.exp(square * (-0.5 / sigma**2))

    def slope(tau: Tensor) -> Tensor:
        square = tau.square()
        fade = torch.exp(square * (-0.5 / sigma**2)).mul_(tau)
        return square.mul_(scale / sigma**4).sub_(3 * scale / sigma**2).mul_(fade)

    return Mother(
        mother, f"{scale!r}*(1-(tau/{sigma!r})**2)*exp(-0.5*(tau/{sigma!r})**2)", (-3.0, 3.0), (-1e15, 1e15),
        slope=slope,
    )  # fmt: skip


@wavelet(
    formula="phi(tau) = N(tau; 0, sigma_1) - N(tau; 0, sigma_2)",
    source="Marr, Hildreth 1980 (difference of Gaussians)",
    domain="all reals; decays to 0",
)
def dog_wavelet(sigma_1: float = 1.0, sigma_2: float = 2.0) -> Mother:
    """Expand every attribute in differences of two Gaussian densities."""
    _width("dog_wavelet", "sigma_1", sigma_1)
    _width("dog_wavelet", "sigma_2", sigma_2)
    root = math.sqrt(2 * math.pi)

    def mother(tau: Tensor) -> Tensor:
        square = tau.square()
        one, two = (torch.exp(square * (-0.5 / s**2)) * (1 / (root * s)) for s in (sigma_1, sigma_2))
        return one - two

    def slope(tau: Tensor) -> Tensor:
        square = tau.square()
        one, two = (torch.exp(square * (-0.5 / s**2)).mul_(-1 / (root * s**3)) for s in (sigma_1, sigma_2))
        return one.sub_(two).mul_(tau)

    text = "-".join(f"exp(-0.5*(tau/{s!r})**2)/{root * s!r}" for s in (sigma_1, sigma_2))
    return Mother(mother, text, (-3.0, 3.0), slope=slope)


def _width(name: str, option: str, sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        fail(name, option, f"is {sigma}", f"a positive number {option}", "Pass the width of the wavelet.")


def _band(c: Tensor | float, turn: Callable[[Tensor], Tensor], width: float) -> Tensor:
    # the integral of cos(c w) or sin(c w) over a band, w / pi from 2/3 to 4/3 (times 3 width), up to a factor
    assert isinstance(c, Tensor)
    return turn(3 * width * math.pi * c) * _sinc(width * c)


@wavelet(
    formula="phi(tau) = psi(tau), the inverse Fourier transform of e^(-iw/2) (sin(pi/2 nu(3|w|/2pi - 1)) on [2pi/3, "
    "4pi/3], cos(pi/2 nu(3|w|/4pi - 1)) on [4pi/3, 8pi/3]), nu(x) = x; part='scaling': the scaling function",
    source="Meyer 1985; Valenzuela, de Oliveira 2015. Differs from tinyBIG 0.2.1, "
    "whose phi is the scaling function (NaN at +-3/4)",
    domain="all reals; decays as 1 / tau^2",
)
def meyer_wavelet(part: str = "wavelet") -> Mother:
    """Expand every attribute in Meyer wavelets, or in their scaling functions."""

    def psi(tau: Tensor) -> Tensor:
        u = tau - 0.5
        low = _band(0.75 + u, torch.cos, 1 / 3) + _band(0.75 - u, torch.cos, 1 / 3)
        high = _band(0.375 + u, torch.sin, 2 / 3) + _band(0.375 - u, torch.sin, 2 / 3)
        return (2 * high - low) / 3

    def scaling(tau: Tensor) -> Tensor:
        fade = _band(0.75 + tau, torch.sin, 1 / 3) + _band(0.75 - tau, torch.sin, 1 / 3)
        return (2 * _sinc(tau * (2 / 3)) + fade) / 3

    def text(c: str, turn: str, width: str) -> str:
        return "+".join(f"{turn}(3*{width}*pi*({c}{sign}u))*sinc({width}*({c}{sign}u))" for sign in "+-")

    psi_text = f"(2*({text('0.375', 'sin', '2/3')})-({text('0.75', 'cos', '1/3')}))/3".replace("u", "(tau-0.5)")
    scaling_text = f"(2*sinc(2/3*tau)+{text('0.75', 'sin', '1/3')})/3".replace("u", "tau").replace("tatau", "tau")
    parts = {"wavelet": (psi, psi_text), "scaling": (scaling, scaling_text)}
    if part not in parts:
        fail("meyer_wavelet", "part", f"is {part!r}", f"one of {sorted(parts)}", "Pass part='wavelet' for psi.")
    mother, shown = parts[part]
    return Mother(mother, shown, (-2.0, 3.0))

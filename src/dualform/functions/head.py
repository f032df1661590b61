"""The Head: a layer y = fuse_c <kappa(x), psi(w_c)> + b + pi(x), any expansion, reconciliation, remainder, fusion.

Legend: m input, D expanded, n output, l parameters per channel, C channels, k width of a channel's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualform.catalogue import Catalogue
from dualform.functions.basis import Expansion, check_floating
from dualform.functions.compressions import compressions
from dualform.functions.config import Config
from dualform.functions.expansions import expansions
from dualform.functions.fusions import Fusion, fusions
from dualform.functions.interdependences import interdependences
from dualform.functions.multilinear import Features, Outer, as_tensor
from dualform.functions.reconciliations import Reconciliation, reconciliations
from dualform.functions.remainders import Remainder, remainders
from dualform.shapes import fail

# Which options are specs, and of which catalogue.
parts: dict[str, Catalogue] = {
    "expansion": expansions, "reconciliation": reconciliations, "remainder": remainders,
    "interdependence": interdependences, "compression": compressions, "fusion": fusions,
}  # fmt: skip


@dataclass(frozen=True)
class HeadConfig(Config):
    """What a Head is, as data: hashable, and JSON or TOML and back.

    Raises: ValueError for an unknown name, option or key, or a size below one.
    Example:
        >>> c = HeadConfig(4, 2, reconciliation=("low_rank", {"rank": 1}))
        >>> HeadConfig.from_dict(c.to_dict()) == c, c.build()(torch.zeros(3, 4)).shape
        (True, torch.Size([3, 2]))
    """

    m: int
    n: int
    expansion: Any = "identity"
    reconciliation: Any = "identity"
    remainder: Any = "zero"
    interdependence: Any = None
    compression: Any = None
    channels: int = 1
    fusion: Any = "mean"
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("m", "n", "channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                fail("Head", name, f"is {value!r}", f"an integer {name} >= 1", "Pass a positive size.", ValueError)
            object.__setattr__(self, name, int(value))
        for name, catalogue in parts.items():
            spec = getattr(self, name)
            if spec is None and name in ("interdependence", "compression"):
                continue
            if spec is not None and not catalogue.names():
                fail("Head", name, f"is {spec!r}", f"{name} = None", "None exist as yet.", ValueError)
            object.__setattr__(self, name, catalogue.build(spec))

    def build(self) -> Head:
        return Head(**{name: getattr(self, name) for name in self.__dataclass_fields__})


def _is_outer(expansion: Expansion) -> bool:
    return expansion.power > 1 and not expansion.symmetric


def features(expansion: Expansion, x: Tensor) -> Features:
    """Expand an x that was checked; tensor powers stay an outer product, [u, u (x) u, ...] = [1, u, ...] (x) u."""
    if not _is_outer(expansion):
        return expansion.expand(x)
    u = expansion.base(x)
    powers = [torch.ones_like(u[..., :1]), u]
    while len(powers) < expansion.power:
        powers.append(as_tensor(Outer(powers[-1], u)))
    return Outer(torch.cat([powers[d - 1] for d in expansion.degrees], -1), u)


class Head(nn.Module):
    """Map x (..., m) to (..., n): features, meeting a structured matrix; channels fused; bias; remainder.

    y = fuse_c <kappa(x), psi(w_c)> + b + pi(x)
    Shape:  (..., m) -> (..., n). w (channels l,), b (n,); remainder and fusion weights are parameters of their own;
            what is frozen (masks, random matrices, hypernets) is in buffers. Any leading dims, none and empty ones
            included.
    Dtype:  the parameters'. At the start the mean square is 1 for x ~ N(0, 1), but for constants and residuals.
    Raises: ShapeError for another last axis than m, for sizes that do not join, and for a row of features too wide to
            build; ValueError for unknown names and options.
    Source: Zhang 2024 (RPN 1, 2). Differs: the bias is added once, not once per channel.
    Example:
        >>> head = Head(4, 2, expansion=("taylor", {"degree": 2}), reconciliation=("low_rank", {"rank": 1}))
        >>> head(torch.zeros(5, 4)).shape, head.w.shape
        (torch.Size([5, 2]), torch.Size([22]))
    """

    def __init__(
        self, m: int, n: int, *, expansion: Any = "identity", reconciliation: Any = "identity", remainder: Any = "zero",
        interdependence: Any = None, compression: Any = None, channels: int = 1, fusion: Any = "mean",
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        c = HeadConfig(m, n, expansion, reconciliation, remainder, interdependence, compression, channels, fusion, bias)
        self.config = c
        self.m, self.n, self.channels = m, n, channels = c.m, c.n, c.channels
        self._look_up()
        self.D = self.expansion.check(m)
        self.width = self.fusion.channel_width(n, channels)
        dims = (self.width,) * channels
        if (found := self.fusion.width(dims, n)) != n:
            fail("Head", "fusion", f"gives {found} outputs", f"n = {n}", "Leave the fusion's own n out.")
        self.l = self.reconciliation.length(self.width, self.D)
        self.w = nn.Parameter(torch.empty(channels * self.l))
        self.bias = nn.Parameter(torch.empty(n)) if bias else None
        l_r, l_f = self.remainder.length(m, n), self.fusion.length(dims, n)
        self.remainder_weight = nn.Parameter(torch.empty(n, m)) if l_r else None
        self.remainder_bias = nn.Parameter(torch.empty(n)) if self.remainder.bias else None
        self.fusion_weight = nn.Parameter(torch.empty(l_f)) if l_f else None
        self._frozen = self._freeze("frozen", self.reconciliation.constants(self.width, self.D))
        self._frozen_fusion = self._freeze("frozen_fusion", self.fusion.constants(dims, n))
        self.reset_parameters()

    def _look_up(self) -> None:
        c = self.config
        self.expansion: Expansion = c.expansion.build()
        self.reconciliation: Reconciliation = c.reconciliation.build()
        self.remainder: Remainder = c.remainder.build()
        self.fusion: Fusion = c.fusion.build()
        one = self.channels == 1 and self.fusion.is_plain
        self.is_matrix = one and self.reconciliation.structure.is_matrix and not _is_outer(self.expansion)

    def __getstate__(self) -> dict[str, Any]:
        # What the records build holds functions that do not pickle; the records themselves do.
        built = ("expansion", "reconciliation", "remainder", "fusion")
        return {name: value for name, value in self.__dict__.items() if name not in built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_up()

    def _freeze(self, prefix: str, constants: Mapping[str, Tensor]) -> dict[str, tuple[str, bool]]:
        """Register constants as buffers; return where each is, and whether turned, as it lies in memory, for saving."""
        places: dict[str, tuple[str, bool]] = {}
        for name, x in constants.items():
            is_turned = not x.is_contiguous()
            places[name] = f"{prefix}_{name.replace('.', '_')}", is_turned
            x = (x.mT if is_turned else x).to(self.w.device)
            self.register_buffer(places[name][0], x.to(self.w.dtype) if x.is_floating_point() else x)
        return places

    def _thaw(self, places: Mapping[str, tuple[str, bool]]) -> dict[str, Tensor]:
        held = ((name, getattr(self, place), turned) for name, (place, turned) in places.items())
        return {name: x.mT if turned else x for name, x, turned in held}

    def constants(self) -> dict[str, Tensor]:
        """Return what is frozen in the reconciliation, by the names that `reconciliation.constants` gives."""
        return self._thaw(self._frozen)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw w so that the output's mean square is 1 for standard normal x, whatever the basis and the structure are.

        One number is found: with w ~ N(0, 1) the output's mean square over a stratified sample is a power of w's scale.
        A linear remainder takes half of the mean square.
        """
        for bias in (self.bias, self.remainder_bias):
            if bias is not None:
                bias.zero_()
        nn.init.normal_(self.w)
        if self.w.is_meta:
            return
        x = sample(self.expansion, self.m, self.D).to(self.w.device)
        kappa = features(self.expansion, x)
        target = 1.0 if self.remainder_weight is None else math.sqrt(0.5)
        start = self.fusion.start((self.width,) * self.channels)
        mixes = self.fusion_weight is not None and start is None
        constants = {name: c.double() if c.is_floating_point() else c for name, c in self.constants().items()}

        def run(w: Tensor) -> Tensor:
            ys = self._channels(kappa, w, constants)
            return torch.stack(ys) if mixes else self._fuse(ys, None if start is None else start.to(w))

        if "gain" in constants:  # w passes through a net: what comes out of it is scaled
            size = mean_square(run(self.w.double()) / constants["gain"])
            gain = self.get_buffer(self._frozen["gain"][0]).fill_(target / math.sqrt(size) if size > 0 else 1.0)
            constants["gain"] = gain.double()
        else:
            self.w.copy_(_scaled(self.w.double(), run, target))
        if self.fusion_weight is not None:
            self.fusion_weight.copy_(torch.randn_like(self.fusion_weight) if start is None else start)
        if mixes:
            ys = self._channels(kappa, self.w.double(), constants)
            mixed = cast("Tensor", self.fusion_weight)
            mixed.copy_(_scaled(mixed.double(), lambda v: self._fuse(ys, v), target))
        if self.remainder_weight is not None:
            self.remainder_weight.normal_()
            linear = self.remainder.linear_part(x)
            scaled = _scaled(self.remainder_weight.double(), lambda v: linear @ v.mT, math.sqrt(0.5) if self.l else 1.0)
            self.remainder_weight.copy_(scaled)

    def _channels(self, kappa: Features, w: Tensor, constants: Mapping[str, Tensor]) -> list[Tensor]:
        pieces = [w] if self.channels == 1 else [w[c * self.l : (c + 1) * self.l] for c in range(self.channels)]
        meet = self.reconciliation.structure.apply  # sizes were checked when the head was built
        return [meet(kappa, piece, self.width, constants) for piece in pieces]

    def _fuse(self, ys: list[Tensor], weight: Tensor | None) -> Tensor:
        if len(ys) == 1 and self.fusion.is_plain:
            return ys[0]
        return self.fusion(ys, weight, self.n, self._thaw(self._frozen_fusion))

    def forward(self, x: Tensor, kappa: Features | None = None) -> Tensor:
        """Return y; kappa: the features of x, where they are known."""
        check_floating("Head", x)
        if x.shape[-1:] != (self.m,):
            has = f"has shape {tuple(x.shape)}"
            fail("Head", "x", has, f"(..., m) with m = {self.m}", "Pass rows of m attributes.")
        kappa = self.features(x) if kappa is None else kappa
        if self.is_matrix:  # psi(w) is a view of w
            y = F.linear(cast("Tensor", kappa), self.w.view(self.n, self.D), self.bias)
        else:
            y = self._fuse(self._channels(kappa, self.w, self.constants()), self.fusion_weight)
            if self.bias is not None:
                y = y + self.bias
        if self.remainder.is_zero:
            return y
        return y + self.remainder(x, self.n, self.remainder_weight, self.remainder_bias)

    def features(self, x: Tensor) -> Features:
        """Return kappa(x) of an x that was checked, which no weight changes; tensor powers stay an outer product."""
        return self.expansion.expand(x) if self.is_matrix else features(self.expansion, x)

    def matrix(self) -> Tensor:
        """Materialise psi(w): (channels, n, D), or (channels, n / channels, D) under a concatenation."""
        pieces = self.w.reshape(self.channels, self.l).unbind(0)
        constants = self.constants()
        return torch.stack([self.reconciliation(piece, self.width, self.D, constants) for piece in pieces])

    def extra_repr(self) -> str:
        c, default = self.config, HeadConfig(self.m, self.n)
        shown = [
            f"{name}={getattr(c, name)!r}"
            for name in HeadConfig.__dataclass_fields__
            if name not in ("m", "n") and getattr(c, name) != getattr(default, name)
        ]
        return ", ".join([f"{self.m}, {self.n}", *shown, f"D={self.D}", f"l={self.l}"])


def mean_square(y: Tensor) -> float:
    return float(y.square().mean()) if y.numel() else 0.0


def _scaled(w: Tensor, run: Callable[[Tensor], Tensor], target: float) -> Tensor:
    """Scale w so that run(w) has the target as its root mean square; of which degree run is, is measured."""
    one, two = mean_square(run(w)), mean_square(run(2 * w))
    if not (0 < one < two < math.inf):
        return w  # nothing depends on w, or nothing is seen of it: the record's constants decide
    degree = math.log2(two / one) / 2
    return w * (target / math.sqrt(one)) ** (1 / degree)


def span_of(expansion: Expansion) -> tuple[float, float]:
    """Say where the features have second moments: where float32 holds them; with poles (1/x, tan) the domain."""
    return expansion.reach if _has_moments(expansion) else expansion.domain


def sample(expansion: Expansion, m: int, D: int) -> Tensor:
    """Draw standard normal rows, each attribute stratified, where the features have second moments."""
    count = min(max(2**18 // D, 16), 2**13)
    g = torch.Generator(device="cpu").manual_seed(0)
    order = torch.rand(count, m, generator=g, dtype=torch.float64, device="cpu").argsort(0)
    within = torch.rand(count, m, generator=g, dtype=torch.float64, device="cpu")
    return _normal_quantiles((order + within) / count, span_of(expansion))


def _normal_quantiles(u: Tensor, span: tuple[float, float]) -> Tensor:
    low, high = torch.special.ndtr(torch.tensor(span, dtype=torch.float64, device=u.device))
    return torch.special.ndtri(low + u * (high - low)).clamp(*span)


@lru_cache(maxsize=256)
def _has_moments(expansion: Expansion) -> bool:
    """Tell whether finer grids agree on the functions' mean square; at a pole it grows without end."""
    if expansion.basis is None:
        return True
    found = [
        mean_square(expansion.phi(_normal_quantiles((torch.arange(N, dtype=torch.float64) + 0.5) / N, expansion.reach)))
        for N in (2**11, 2**13, 2**15)
    ]
    return max(found) < 1.5 * min(found)

"""Layers of heads side by side, stacks of layers, and adapters around a given linear map.

Legend: m input, n output of a head; dims the widths of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualform.functions.config import Config
from dualform.functions.fusions import fusions
from dualform.functions.head import Head, HeadConfig
from dualform.functions.reconciliations import reconciliations
from dualform.functions.remainders import find_activation
from dualform.shapes import fail


@dataclass(frozen=True)
class LayerConfig(Config):
    """Heads that read the same input, and the fusion that joins what they say."""

    heads: tuple[HeadConfig, ...]
    fusion: Any = "mean"

    def __post_init__(self) -> None:
        heads = tuple(h if isinstance(h, HeadConfig) else HeadConfig.from_dict(h) for h in self.heads)
        if not heads:
            fail("Layer", "heads", "is empty", "at least one head", "Add a HeadConfig.", ValueError)
        if len(inputs := {h.m for h in heads}) > 1:
            fail("Layer", "heads", f"read m = {sorted(inputs)}", "one m for all", "Give them the same input width.")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "fusion", fusions.build(self.fusion))
        self.fusion.width(tuple(h.n for h in heads))

    @property
    def m(self) -> int:
        return self.heads[0].m

    @property
    def n(self) -> int:
        return self.fusion.width(tuple(h.n for h in self.heads))

    def build(self) -> Layer:
        return Layer(self)


class Layer(nn.Module):
    """Run heads side by side on one input and fuse their outputs; a single head is itself.

    y = fuse_h head_h(x)
    Shape:  (..., m) -> (..., n), n as the fusion says.
    Dtype:  the parameters'.
    Raises: ShapeError for heads that do not join.
    Source: Zhang 2024 (RPN 1). Differs: tinyBIG repeats one head, sharing its parameters.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(h.build() for h in config.heads)
        self.fusion = config.fusion.build()
        dims = tuple(h.n for h in config.heads)
        l = self.fusion.length(dims)
        start = self.fusion.start(dims)
        first = torch.randn(l) / (sum(dims) ** 0.5) if start is None else start
        self.fusion_weight = nn.Parameter(first.clone()) if l else None
        for name, x in self.fusion.constants(dims).items():
            self.register_buffer(f"frozen_{name}", x.to(first) if x.is_floating_point() else x)

    def forward(self, x: Tensor) -> Tensor:
        ys = [head(x) for head in self.heads]
        if len(ys) == 1 and self.fusion.is_plain:
            return ys[0]
        frozen = {name.removeprefix("frozen_"): buffer for name, buffer in self.named_buffers(recurse=False)}
        return self.fusion(ys, self.fusion_weight, None, frozen)


@dataclass(frozen=True)
class StackConfig(Config):
    """Layers one after the other, an activation between them (not after the last).

    Raises: ValueError, ShapeError for layers that do not fit.
    Example:
        >>> c = StackConfig((HeadConfig(4, 3, expansion="legendre"), HeadConfig(3, 2)), activation="tanh")
        >>> StackConfig.from_toml(c.to_toml()) == c == StackConfig.from_json(c.to_json())
        True
    """

    layers: tuple[LayerConfig, ...]
    activation: str = "identity"

    def __post_init__(self) -> None:
        layers = tuple(_layer(spec) for spec in self.layers)
        if not layers:
            fail("Stack", "layers", "is empty", "at least one layer", "Add a HeadConfig.", ValueError)
        for k, (a, b) in enumerate(zip(layers, layers[1:], strict=False)):
            if a.n != b.m:
                advice = "Make the widths agree."
                fail("Stack", f"layer {k + 1}", f"reads m = {b.m}", f"the width of layer {k}, n = {a.n}", advice)
        find_activation("Stack", self.activation)
        object.__setattr__(self, "layers", layers)

    def build(self) -> Stack:
        return Stack(self)


def _layer(spec: Any) -> LayerConfig:
    if isinstance(spec, LayerConfig):
        return spec
    if isinstance(spec, HeadConfig):
        return LayerConfig((spec,))
    values = cast("Mapping[str, Any]", spec)
    return LayerConfig.from_dict(values) if "heads" in values else LayerConfig((HeadConfig.from_dict(values),))


class Stack(nn.Sequential):
    """Run layers one after the other.

    y = layer_K(... act(layer_1(x)))
    Shape:  (..., m) -> (..., n).
    Dtype:  the parameters'.
    Raises: ShapeError for an input of another width.
    Example:
        >>> Stack([HeadConfig(4, 3), HeadConfig(3, 2)], activation="relu")(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(self, layers: StackConfig | Sequence[Any], activation: str = "identity") -> None:
        config = layers if isinstance(layers, StackConfig) else StackConfig(tuple(layers), activation)
        super().__init__(*(layer.build() for layer in config.layers))
        self.config = config

    def forward(self, input: Tensor) -> Tensor:
        x, act = input, find_activation("Stack", self.config.activation)
        for k, layer in enumerate(self):
            x = layer(x if k == 0 else act(x))
        return x


class Adapted(nn.Module):
    """A given linear map, frozen, and a structured change of it that learns.

    y = linear(x) + scale <x, psi(w)>
    Shape:  (..., m) -> (..., n), those of the linear map.
    Dtype:  the linear map's.
    Raises: ValueError unless it is given an nn.Linear.
    Source: Hu et al. 2021 (LoRA); Hyeon-Woo et al. 2022 (LoHa). At the start the change is zero.
    Example:
        >>> linear = nn.Linear(6, 4)
        >>> adapted = Adapted(linear, "low_rank", scale=2.0)
        >>> x = torch.randn(3, 6)
        >>> torch.equal(adapted(x), linear(x)), adapted.merged()(x).shape
        (True, torch.Size([3, 4]))
    """

    def __init__(self, linear: nn.Linear, reconciliation: Any, scale: float = 1.0) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):  # pyright: ignore[reportUnnecessaryIsInstance]: the public border
            found = f"is a {type(linear).__name__}"
            fail("Adapted", "linear", found, "an nn.Linear", "Pass the layer that is to be adapted.", ValueError)
        self.linear, self.scale = linear.requires_grad_(False), scale
        head = Head(linear.in_features, linear.out_features, reconciliation=reconciliation, bias=False)
        self.head = head.to(linear.weight)
        lengths = self.head.reconciliation.structure.piece_lengths(linear.out_features, linear.in_features)
        with torch.no_grad():  # the first learnt factor of the product is zero, so all of it is
            self.head.w[: next(filter(None, lengths), 0)].zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.head(x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add the change to a copy of the linear map: the same function, without an adapter."""
        m, n, bias = self.linear.in_features, self.linear.out_features, self.linear.bias
        linear = nn.Linear(m, n, bias is not None, device=self.linear.weight.device, dtype=self.linear.weight.dtype)
        linear.weight.copy_(self.linear.weight + self.scale * self.head.matrix()[0])
        if bias is not None:
            linear.bias.copy_(bias)
        return linear


Adapter = Callable[[nn.Linear], Adapted]


def adapter(name: str, rank: int, alpha: float | None) -> Adapter:
    """Make the function that adapts a linear map by a matrix of rank r, scaled by alpha / r."""
    reconciliations[name](rank=rank)
    scale = 1.0 if alpha is None else alpha / rank
    return lambda linear: Adapted(linear, (name, {"rank": rank}), scale)

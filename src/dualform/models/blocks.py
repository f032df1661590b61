"""A block of a language model: a mixer (a layer that learns while it reads, or attention), a SwiGLU, perhaps a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from dualform.learning.layer import TestTimeTraining, causal_windows, depthwise
from dualform.learning.learners import learners
from dualform.learning.objectives import objectives
from dualform.learning.rules import rules
from dualform.models.attention import Attention
from dualform.models.cache import BlockState, DocumentCache, FastWeightCache
from dualform.models.configuration import DualformConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), no biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ShortConv(nn.Module):
    """conv(norm(x)): each channel mixes its last few tokens of the same document."""

    def __init__(self, config: DualformConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.conv = nn.Conv1d(dim, dim, config.conv_kernel, groups=dim)

    def forward(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.conv.kernel_size[0] - 1, x.shape[2])
        windows, tail = causal_windows(x, tail.to(x.dtype), mask, reset)
        return depthwise(windows, self.conv), tail


def learning_layer(config: DualformConfig) -> TestTimeTraining:
    """Build the layer that a configuration describes."""
    layer = TestTimeTraining(
        config.hidden_size,
        config.num_attention_heads,
        learner=learners.build(config.learner),
        objective=objectives.build(config.objective),
        rule=rules.build(config.rule),
        chunk=config.chunk,
        rope_theta=config.rope_theta,
        share_qk=config.share_qk,
        use_gate=config.use_gate,
        conv_kernel=config.conv_kernel,
    )
    for tensor in own_tensors(layer).values():
        # The layer has drawn its own values; transformers' init must refill them only where it made them from nothing.
        tensor._is_hf_initialized = tensor.device.type != "meta"  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that are the layer's own, not its submodules'."""
    return dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])


class DualformBlock(GradientCheckpointingLayer):
    """h + conv(norm(h)) if asked for, h + mixer(norm(h)), h + ffn(norm(h))."""

    def __init__(self, config: DualformConfig, index: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.index, self.kind = index, config.layer_types[index]
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.seq_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if self.kind == "test_time":
            self.mixer: nn.Module = learning_layer(config)
        else:
            self.mixer = Attention(dim, config.num_attention_heads, config.rope_theta)
        self.conv = ShortConv(config) if config.pre_conv else None
        self.mlp = SwiGLU(dim, config.intermediate_size)

    def forward(self, h: Tensor, inputs: dict[str, Any], past_key_values: Cache | None = None) -> Tensor:
        cache: Any = None if past_key_values is None else past_key_values.layers[self.index]
        h = self._learn(h, inputs, cache) if self.kind == "test_time" else self._attend(h, inputs, cache)
        return h + self.mlp(self.ffn_norm(h))

    def _learn(self, h: Tensor, inputs: dict[str, Any], cache: FastWeightCache | None) -> Tensor:
        past = None if cache is None else cache.state
        h, tail = self._convolve(h, inputs, past and past.conv.get("pre"))
        mask, reset = inputs["attention_mask"], inputs["reset"]
        y, state = self.mixer(self.seq_norm(h), past and past.layer, attention_mask=mask, reset=reset)
        if cache is not None:
            cache.advance(BlockState(state, {} if tail is None else {"pre": tail}), h.shape[1])
        return h + y

    def _attend(self, h: Tensor, inputs: dict[str, Any], cache: DocumentCache | None) -> Tensor:
        h, tail = self._convolve(h, inputs, cache and cache.conv)
        if cache is not None:
            cache.conv = tail
        return h + self.mixer(self.seq_norm(h), inputs["positions"], inputs[self.kind], inputs["documents"], cache)

    def _convolve(self, h: Tensor, inputs: dict[str, Any], tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.conv is None:
            return h, None
        y, tail = self.conv(h, tail, inputs["attention_mask"], inputs["reset"])
        return h + y, tail

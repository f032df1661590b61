"""A block of a language model: a mixer (a layer that learns while it reads, or attention), a SwiGLU, a convolution."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from dualform.graphs.this_thread import compiles
from dualform.learning.layer import DepthwiseConv, TestTimeTraining, causal_windows, convolved
from dualform.learning.learners import learners
from dualform.learning.objectives import objectives
from dualform.learning.rules import rules
from dualform.models.attention import Attention, allowed
from dualform.models.cache import BlockState, Columns, DocumentCache, FastWeightCache, join
from dualform.models.configuration import DualformConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 at least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        return self.weight * F.rms_norm(wide, self.weight.shape, eps=self.eps).to(x.dtype)


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
        self.kernel_size = config.conv_kernel
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.conv = DepthwiseConv(dim, dim, config.conv_kernel, groups=dim)

    def forward(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.kernel_size - 1, x.shape[2])
        windows, tail = causal_windows(x, tail.to(x.dtype), mask, reset)
        return convolved(windows, self.conv), tail


def learning_layer(config: DualformConfig, name: str = "", prove: bool = True) -> TestTimeTraining:
    """Build the layer that a configuration describes; name: how errors call it; prove: as df.derive's."""
    objective: Any = objectives.build(config.objective)
    if isinstance(objective.build(), nn.Module):  # each layer has parameters of its own
        with torch.device("cpu"):
            objective = objective.record.function(**objective.options)
    layer = TestTimeTraining(
        config.hidden_size, config.num_attention_heads, learner=learners.build(config.learner), objective=objective,
        rule=rules.build(config.rule), chunk=config.chunk,
        rope_theta=config.rope_theta, share_qk=config.share_qk, use_gate=config.use_gate,
        conv_kernel=config.conv_kernel, prove=prove,
    )  # fmt: skip
    layer.name = name
    for tensor in own_tensors(layer).values():
        # The layer has drawn its own values; transformers' init must refill them only where it made them from nothing.
        tensor._is_hf_initialized = tensor.device.type != "meta"  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that are the layer's own, not its submodules'."""
    return dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])


class AttentionView(NamedTuple):
    """What layers of one kind look at: where all columns stand, and which of them each token sees."""

    columns: Columns | None
    mask: Tensor | None
    window: int | None


@dataclass(frozen=True)
class BlockCall:
    """What one call gives every block, and none should compute again.

    mask, reset (B, T) bool; positions (B or 1, T), for the rotations of attention; views: for each kind of it.
    """

    mask: Tensor | None
    reset: Tensor | None
    positions: Tensor
    views: dict[str, AttentionView]
    with_weights: bool = False
    # What each layer's cache held before it read, for blocks that run again for gradients; None without gradients.
    before: dict[int, Any] | None = None
    observed: list[tuple[Tensor, Tensor]] | None = None  # where layers leave their inner losses, if anyone asks

    def once(self, index: int, cache: Any) -> Any:
        """Return the cache that block `index` reads on: first its own, then a copy of what that held before."""
        assert self.before is not None
        if index in self.before:
            return copy.copy(self.before[index])
        self.before[index] = copy.copy(cache)
        cache.cut = not torch.is_grad_enabled()
        return cache

    def to(self, *args: Any, **kwargs: Any) -> BlockCall:
        """Move the tensors, as hooks do that run each layer on a device of its own."""
        given = (self.mask, self.reset, self.positions, self.views)
        mask, reset, positions, views = _pytree.tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), given)
        return replace(self, mask=mask, reset=reset, positions=positions, views=views)

    def select(self, rows: Tensor) -> BlockCall:
        """Return the same call with the given rows only; `first` makes its views again."""
        rows = rows.to(self.positions.device)
        mask, reset = (None if y is None else y.index_select(0, rows) for y in (self.mask, self.reset))
        positions = self.positions if self.positions.shape[0] == 1 else self.positions.index_select(0, rows)
        return BlockCall(mask, reset, positions, self.views)

    def first(self, x: Tensor, cache: Any) -> BlockCall:
        """Return the same call with the columns of x only, its first ones, for the layer that holds this cache."""
        T, given = x.shape[1], (self.mask, self.reset, self.positions)
        mask, reset, positions = (None if y is None else y[:, :T] for y in given)
        past = cache if isinstance(cache, DocumentCache) else None
        assert positions is not None
        views = {k: view(past, mask, reset, x, v.window) for k, v in self.views.items()}
        return BlockCall(mask, reset, positions, views)


def view(
    past: DocumentCache | None, mask: Tensor | None, reset: Tensor | None, like: Tensor, window: int | None
) -> AttentionView:
    """Look at past and new columns; like (B, T, ...)."""
    columns = join(past, mask, reset, like)
    T = like.shape[1]
    S = T if past is None else past.get_mask_sizes(T)[0]
    return AttentionView(columns, allowed(columns, T, S, window, like.device), window)


class DualformBlock(GradientCheckpointingLayer):
    """h + conv(norm(h)) if asked for, h + mixer(norm(h)), h + ffn(norm(h))."""

    def __init__(self, config: DualformConfig, index: int, prove: bool = True) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.index, self.kind = index, config.layer_types[index]
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.seq_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if self.kind == "test_time":
            self.mixer: nn.Module = learning_layer(config, f"layer {index}", prove)
        else:
            self.mixer = Attention(dim, config.num_attention_heads, config.rope_theta)
        self.conv = ShortConv(config) if config.pre_conv else None
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.carried = self._carried()

    def _carried(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a test-time block carries for each row of a batch, and its mini-batch."""
        mixer, tails = self.mixer, {}
        if not isinstance(mixer, TestTimeTraining):
            return {}
        if self.conv is not None:
            tails["conv.pre"] = self.conv.kernel_size - 1
        if mixer.conv_q is not None:
            tails["layer.conv.qk"] = mixer.conv_kernel - 1
        fast = {name: mixer.get_parameter(mixer.leaves[name]) for name in mixer.program.parts.fast}
        shapes = {f"layer.memory.anchor.{name}": tuple(p.shape) for name, p in fast.items()}
        shapes |= {name: (length, mixer.dim) for name, length in tails.items()}
        return shapes | {"chunk": (mixer.chunk,)}

    def forward(self, h: Tensor, call: BlockCall, past: Cache | None = None) -> Tensor:
        # By position: transformers' checkpointing, which runs a layer twice, drops what has a cache's name.
        cache: Any = None if past is None else past.layers[self.index]
        if cache is not None and call.before is not None and self.training and self.gradient_checkpointing:
            cache = call.once(self.index, cache)
        if cache is not None:
            cache.record(h, call, self.mix)
        y = self.mix(h, call, cache)
        return y + self.mlp(self.ffn_norm(y))

    def mix(self, h: Tensor, call: BlockCall, cache: Any) -> Tensor:
        """Do what depends on other tokens, and carry it."""
        return self._learn(h, call, cache) if self.kind == "test_time" else self._attend(h, call, cache)

    def _learn(self, h: Tensor, call: BlockCall, cache: FastWeightCache | None) -> Tensor:
        past, ours = (None, False) if cache is None else cache.lend()
        if cache is not None and not compiles():
            cache.check(self.carried, h.shape[0])
        h, tail = self._convolve(h, call, past and past.conv.get("pre"))
        x, held, rows = self.seq_norm(h), past and past.layer, {"attention_mask": call.mask, "reset": call.reset}
        if call.observed is not None:
            call.observed.append(self.mixer(x, held, **rows, observed=True))
        y, state = self.mixer(x, held, **rows, overwrite=ours)
        if cache is not None:
            cache.advance(BlockState(state, {} if tail is None else {"pre": tail}), h.shape[1])
        return h + y

    def _attend(self, h: Tensor, call: BlockCall, cache: DocumentCache | None) -> Tensor:
        h, tail = self._convolve(h, call, cache and cache.conv)
        if cache is not None:
            cache.conv = tail
        view = call.views[self.kind]
        y, _ = self.mixer(self.seq_norm(h), call.positions, view.mask, view.columns, cache, call.with_weights)
        return h + y

    def _convolve(self, h: Tensor, call: BlockCall, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.conv is None:
            return h, None
        y, tail = self.conv(h, tail, call.mask, call.reset)
        return h + y, tail

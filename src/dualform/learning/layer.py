"""A sequence layer around a chunk program: projections, rotary positions, gates, norms, short convolutions.

Legend: B batch, T time, H heads, d model width, f head width, b mini-batch (chunk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from dualform.graphs.this_thread import compiles
from dualform.learning.call import expect_kinds
from dualform.learning.finite import NonFiniteError
from dualform.learning.grid import places
from dualform.learning.program import ChunkProgram, derive
from dualform.learning.state import Carried, State
from dualform.learning.templates import expect_fitting, materialised, own_names, templates
from dualform.learning.transforms import lasting
from dualform.shapes import ShapeError, is_whole, require


@dataclass(frozen=True)
class LayerState(Carried):
    """What a layer carries: the fast weights, the tails of its short convolutions, and tokens read of each document."""

    memory: State
    conv: dict[str, Tensor]
    position: Tensor


_pytree.register_dataclass(
    LayerState,
    field_names=["memory", "conv", "position"],
    drop_field_names=[],
    serialized_type_name="dualform.LayerState",
)


class TestTimeTraining(nn.Module):
    """Map a sequence with a model that learns while it reads.

    q, k, v = x W_q, x W_k, x W_v;  RoPE(q, k) at position mod b;  z = program(q, k, v, lr = sigmoid(x w_h + c_h) / f)
    y = W_o norm(z)      (use_gate: W_o (gelu(x W_g) * norm(z)))
    Shape:  x, y (B, T, dim); attention_mask, reset (B, T) bool.
    Dtype:  y has x's dtype; fast weights float32 or float64.
    Raises: ShapeError if heads does not divide dim or the head width is odd.
    Source: Sun et al. 2024 (TTT), sections 2.6-2.7 and code. Differs: pairs are rotated where they lie (same function).
    Example:
        >>> import dualform as df, torch
        >>> layer = df.TestTimeTraining(32, 2, learner="linear", objective="squared", rule=("sgd", {"averaged": True}))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> y.shape, state.position
        (torch.Size([1, 20, 32]), tensor([20]))
    """

    __test__ = False  # the name is not a test's
    # How it runs and complains, not what it is: no configuration holds these.
    backend: Any = "auto"
    nan_policy: str = "propagate"
    name: str = ""  # of the layer in its model, for errors
    program: ChunkProgram  # of a template: no part of this module

    def __init__(
        self, dim: int, heads: int, *, learner: Any, objective: Any = "squared", rule: Any = "sgd", chunk: int = 16,
        rope_theta: float = 1e4, share_qk: bool = False, use_gate: bool = False, post_norm: bool = True,
        conv_kernel: int = 4, prove: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, n in (("dim", dim), ("heads", heads), ("conv_kernel", conv_kernel)):
            require(is_whole(n), "TestTimeTraining", name, n, "a whole number >= 1", "Pass a positive int.")
        for name, flag in (("share_qk", share_qk), ("use_gate", use_gate), ("post_norm", post_norm)):
            require(isinstance(flag, bool), "TestTimeTraining", name, flag, "True or False", "Pass one of them.")
        is_right = type(rope_theta) is not bool and isinstance(rope_theta, int | float) and 0 < rope_theta < math.inf
        require(is_right, "TestTimeTraining", "rope_theta", rope_theta, "a number > 0", "Leave it out for 10000.")
        if dim % heads:
            raise ShapeError(
                f"TestTimeTraining: dim is {dim} with heads = {heads}; expected dim % heads = 0, here "
                f"{dim % heads}. Change one of them."
            )
        f = dim // heads
        if f % 2:
            raise ShapeError(
                f"TestTimeTraining: the head width is dim / heads = {f}; expected an even number, RoPE turns pairs. "
                "Change dim or heads."
            )
        self.dim, self.heads, self.head_dim, self.chunk, self.rope_theta = dim, heads, f, chunk, float(rope_theta)
        self.conv_kernel = conv_kernel
        models = templates(learner, f, heads)
        born = [dict(model.named_parameters()) for model in models]
        made = derive(materialised(models[0]), objective, rule, chunk=chunk, prove=prove)
        expect_fitting(made, models, f)
        object.__setattr__(self, "program", made)
        for name, part in made.named_children():  # an objective that is a module is trained, saved and moved with this
            if name != "learner":
                self.add_module(name, part)
        parts = self.program.parts
        self.leaves = own_names("initial_", [*parts.fast, *parts.slow])
        for name, own in self.leaves.items():
            stacked = torch.stack([tensors[name].detach() for tensors in born])
            stacked = stacked if stacked.is_meta else stacked.to(torch.get_default_device())
            self.register_parameter(own, nn.Parameter(stacked, requires_grad=born[0][name].requires_grad))
        self.tables = own_names("learner_", list(parts.buffers))
        for name, own in self.tables.items():
            self.register_buffer(own, parts.buffers[name].clone().to(torch.get_default_device()))
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = None if share_qk else nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=False) if use_gate else None
        self.conv_q = DepthwiseConv(dim, dim, conv_kernel, groups=dim) if share_qk else None
        self.conv_k = DepthwiseConv(dim, dim, conv_kernel, groups=dim) if share_qk else None
        self.post_norm = nn.LayerNorm(dim, eps=1e-6) if post_norm else None
        gates = self.program.rule.gates
        self.rate_weight = nn.Parameter(0.02 * torch.randn(heads, dim)) if "lr" in gates else None
        self.rate_bias = nn.Parameter(torch.zeros(heads)) if "lr" in gates else None
        self.offset = nn.Parameter(torch.zeros(chunk)) if "offset" in gates else None
        self.rate_scale: Tensor
        self.register_buffer("rate_scale", torch.ones(()))

    def train(self, mode: bool = True) -> TestTimeTraining:
        """Set the mode of the layer, and of the learner that its program runs."""
        super().train(mode)
        self.program.learner.train(mode)
        return self

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, attention_mask: Tensor | None = None,
        reset: Tensor | None = None, overwrite: bool = False, observed: bool = False,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Return (y, state); any split of x over calls with the state carried gives the same y.

        overwrite: the state given is not needed again; without gradients, the new one may take its memory.
        observed: return `inner_losses` instead, within a call, where hooks have brought the weights.
        """
        x, mask, reset = self._checked(x, state, attention_mask, reset)
        q, k, v, gates, tails, position = self._read(x, state, mask, reset)
        own = {name: getattr(self, own) for name, own in {**self.leaves, **self.tables}.items()}
        rest: dict[str, Any] = {"state": state and state.memory, "mask": mask, "reset": reset, "params": own}
        if observed:
            before, after, _ = self.program.losses(k, v, gates, **rest)
            return before.transpose(1, 2), after.transpose(1, 2)
        rest |= {"backend": self.backend, "nan_policy": self.nan_policy, "overwrite": overwrite}
        try:
            z, memory = self.program(q, k, v, gates, **rest)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name or type(self).__name__}: {error}") from None
        z = z.flatten(2)
        if self.post_norm is not None:  # CPUs norm no numbers wider than the gain
            z = self.post_norm(z.to(min(x.dtype, self.post_norm.weight.dtype, key=lambda kind: kind.itemsize)))
        z = z if self.g_proj is None else F.gelu(self.g_proj(x), approximate="tanh") * z
        return self.o_proj(z), LayerState(memory, tails, position)

    def inner_losses(
        self, x: Tensor, state: LayerState | None = None, *, attention_mask: Tensor | None = None,
        reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return each token's inner loss before and after its own update.

        before_t = loss(f(k_t; anchor), v_t): the one whose gradient is taken;  after_t = loss(f(k_t; theta_t), v_t)
        Shape:  as forward -> (B, heads, T) each, 0 for padding.
        Dtype:  float32, or float64 if x or the layer is.
        Raises: ShapeError.
        """
        return self(x, state, attention_mask=attention_mask, reset=reset, observed=True)

    def _checked(
        self, x: Tensor, state: LayerState | None, attention_mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return x with padding blank, and what is padding and where documents begin, as truth values."""
        tensors = {"x": x, "attention_mask": attention_mask, "reset": reset}
        expect_kinds("TestTimeTraining", tensors, state, LayerState)
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeError(
                f"TestTimeTraining: x has shape {tuple(x.shape)}; expected (batch, time, dim = {self.dim}). Check the "
                "layer's dim."
            )
        if not x.is_floating_point():
            raise ShapeError(f"TestTimeTraining: x has dtype {x.dtype}; expected one of real numbers. Pass x.float().")
        expect_type("TestTimeTraining", "x", x, self.v_proj)
        B, T, _ = x.shape
        for name, given in (("attention_mask", attention_mask), ("reset", reset)):
            if given is not None and given.shape != (B, T):
                raise ShapeError(
                    f"TestTimeTraining: {name} has shape {tuple(given.shape)}; expected (batch, time) = {(B, T)}. Pass "
                    "one value per token."
                )
        if state is not None and (state.position.shape != (B,) or ("qk" in state.conv) != (self.conv_q is not None)):
            raise ShapeError(
                f"TestTimeTraining: state has {state.position.shape[0]} rows and convolutions {sorted(state.conv)}; "
                f"expected batch = {B} rows and {['qk'] if self.conv_q is not None else []}. Pass a state of this "
                "layer (state.select, state.fork)."
            )
        mask = None if attention_mask is None else attention_mask.bool()
        reset = None if reset is None else reset.bool()
        if mask is not None:  # 0 times NaN is NaN, in each gradient that what padding holds would reach
            x = x.masked_fill(~mask[..., None], 0)
        return x, mask, reset

    def _read(
        self, x: Tensor, state: LayerState | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return q, k, v and gates for the program, the tails of the convolutions, and the position after x."""
        B, T, _ = x.shape
        document = torch.zeros(B, dtype=torch.long, device=x.device) if state is None else state.position
        _, place = places(T, document, mask, reset)
        q, k, tails = self._queries_and_keys(x, state, mask, reset)
        v = self._heads(self.v_proj(x))
        by = self._angles(place % self.chunk, q)
        q, k = turned(self._heads(q), by), turned(self._heads(k), by)
        gates = {}
        if self.rate_weight is not None and self.rate_bias is not None:
            logits = (x @ self.rate_weight.to(x.dtype).T).to(self.rate_weight.dtype) + self.rate_bias
            gates["lr"] = logits.sigmoid() / self.head_dim * self.rate_scale
        if self.offset is not None:
            gates["offset"] = self.offset
        last = place[:, -1] + 1 if T else document
        return q, k, v, gates, tails, last

    def _angles(self, place: Tensor, like: Tensor) -> Tensor:
        kind = (self.head_dim, self.rope_theta, torch.promote_types(torch.float32, like.dtype))
        if type(like) is not Tensor or compiles():
            return angles(place, *kind)
        return angles_below(self.chunk, *kind, like.device)[:, place]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def _queries_and_keys(
        self, x: Tensor, state: LayerState | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shared = self.q_proj(x)
        if self.k_proj is not None:
            return shared, self.k_proj(x), {}
        assert self.conv_q is not None and self.conv_k is not None
        none = shared.new_zeros(len(x), self.conv_kernel - 1, self.dim)
        tail = none if state is None else state.conv["qk"].to(shared.dtype)
        window, tail = causal_windows(shared, tail, mask, reset)
        return convolved(window, self.conv_q), convolved(window, self.conv_k), {"qk": tail}

    def explain(self, level: str = "steps") -> Any:
        """Explain the derivation of this layer's program: sites, structured derivatives, forms, costs, code."""
        return self.program.explain(level)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, chunk={self.chunk}, learner={type(self.program.learner).__name__}, "
            f"rule={self.program.rule.name}"
        )


def expect_type(where: str, name: str, x: Tensor, linear: nn.Module) -> None:
    """Refuse numbers of another type than a plain map's, where nothing would cast them: autocast leaves float64 be."""
    w: Any = linear.weight if type(linear) is nn.Linear else x
    if x.dtype == w.dtype or type(w) not in (Tensor, nn.Parameter) or linear._forward_pre_hooks:
        return
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not casts or torch.float64 in (x.dtype, w.dtype):
        raise ShapeError(
            f"{where}: {name} has dtype {x.dtype}; expected the parameters' = {w.dtype}. Pass {name}.to({w.dtype}), or "
            f"cast the module: .to({x.dtype})."
        )


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x (B, T, H, f) by position theta^(-2i/f), computed in float32 at least."""
    return turned(x, angles(position, x.shape[-1], theta, torch.promote_types(torch.float32, x.dtype)))


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Turn the pairs of x (B, T, H, f); by (2, B, T, f): what multiplies each entry, and the other of its pair."""
    y = x.to(by.dtype)
    others = y.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).reshape(x.shape)
    return torch.addcmul(y * by[0, :, :, None], others, by[1, :, :, None]).to(x.dtype)


def angles(position: Tensor, f: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return (cos, cos, ...) and (-sin, sin, ...) of each position's angles, for `turned`."""
    frequency = theta ** (-torch.arange(0, f, 2, dtype=dtype, device=position.device) / f)
    angle = position[..., None].to(dtype) * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, cos, -sin, sin], -1).unflatten(-1, (2, 2)).movedim(-2, 0).flatten(-2)


@lru_cache(maxsize=64)
def angles_below(count: int, f: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angles of positions 0 ... count - 1, computed once."""
    with lasting():
        return angles(torch.arange(count, device=device), f, theta, dtype)


class DepthwiseConv(nn.Conv1d):
    """Be an nn.Conv1d; with a filter for each channel, run as the few sums of products that it is,
    which CPUs do faster.

    y_t = bias + sum_j weight_j x_{t+j}
    Shape:  (B, dim, T + n - 1) -> (B, dim, T).
    Dtype:  as x.
    """

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: its name for x
        if self.weight.shape[1] > 1:  # adapters make others of its kind, of low rank
            return super().forward(x)
        T = x.shape[-1] - self.kernel_size[0] + 1
        weights = self.weight.to(x.dtype).unbind(2)
        total = x[..., :T] * weights[0]
        if self.bias is not None:
            total = total + self.bias.to(x.dtype)[:, None]
        for j, w in enumerate(weights[1:], 1):
            total = torch.addcmul(total, x[..., j : j + T], w)
        return total


class Windows(NamedTuple):
    """What a causal convolution sees: the columns themselves (B, n - 1 + T, d), or each token's own n (B, T, n, d)."""

    columns: Tensor
    apart: bool


def causal_windows(x: Tensor, tail: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Windows, Tensor]:
    """Give each token its last n valid tokens of the same document, and the next call's tail (B, n-1, d).

    The last is the token itself; what lies before a document's start is zero. tail (B, n-1, d) holds the tokens before.
    """
    B, T, d = x.shape
    n = tail.shape[1] + 1
    if (mask is None and reset is None) or T == 0:
        joined = torch.cat([tail, x], 1)
        return Windows(joined, False), joined[:, T:].clone()  # not the whole text
    device = x.device
    valid = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask
    joined = torch.cat([tail, x, x.new_zeros(B, 1, d)], 1)  # the last row is the zero that empty places read
    rank = valid.cumsum(1)  # 1-based rank among this call's valid tokens
    first = torch.zeros_like(rank) if reset is None else torch.where(reset, rank - valid.long(), 0).cummax(1).values
    began = torch.zeros_like(valid) if reset is None else reset.cumsum(1) > 0
    token = torch.full((B, T + 1), T + n - 1, dtype=torch.long, device=device)
    token = token.scatter(1, torch.where(valid, rank - 1, T), torch.arange(T, device=device).expand(B, T) + n - 1)
    token = torch.cat([token[:, :T], token.new_full((B, 1), T + n - 1)], 1)  # where padding went
    rows = torch.arange(B, device=device)[:, None]

    def at(wanted: Tensor, first: Tensor, began: Tensor) -> Tensor:
        here = token.gather(1, (wanted - 1).clamp(min=0))
        before = torch.where(began, T + n - 1, (wanted + n - 2).clamp(min=0))
        index = torch.where(wanted > first, here, torch.where(wanted > -(n - 1), before, T + n - 1))
        return joined[rows, torch.where((wanted <= first) & (wanted > 0), T + n - 1, index)]

    windows = torch.stack([at(rank - back, first, began) for back in range(n - 1, -1, -1)], 2)
    last = rank[:, -1:] - torch.arange(n - 2, -1, -1, device=device)
    return Windows(windows, True), at(last, first[:, -1:], began[:, -1:])


def convolved(windows: Windows, conv: nn.Module) -> Tensor:
    """Apply a convolution, called as the module it is, to what each token sees: (B, T, d)."""
    x, apart = windows
    if not apart:
        return conv(x.mT).mT
    B, T = x.shape[:2]
    return conv(x.flatten(0, 1).mT)[..., 0].unflatten(0, (B, T))

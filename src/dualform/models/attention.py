"""Softmax attention, the layer that every other one is compared with: torch's SDPA, RoPE, documents kept apart.

B batch, T new tokens, S columns looked at, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualform.learning.layer import rotate
from dualform.models.cache import DocumentCache


def allowed(documents: Tensor | None, T: int, S: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which columns each new token may look at, (B or 1, 1, T, S); None if SDPA's own causal rule says it."""
    inside = window is None or S <= window
    if documents is None and inside and (T in (1, S)):
        return None
    column = torch.arange(S, device=device)
    row = column[S - T :, None]
    mask = column <= row
    if window is not None:
        mask &= column > row - window
    mask = mask[None]
    if documents is not None:
        # A padding column sees its own kind, itself at least, so that no row of the softmax is empty.
        mask = mask & (documents[:, S - T :, None] == documents[:, None, :])
    return mask[:, None]


class Attention(nn.Module):
    """Attend causally within each document.

    Shape:  x (B, T, dim), mask (B or 1, 1, T, S) bool or None -> (B, T, dim).
    Dtype:  as x; rotations in float32 at least.
    Raises: ValueError if the cache holds other sizes.
    Source: Vaswani et al. 2017; Su et al. 2021 (interleaved pairs).
    """

    def __init__(self, dim: int, heads: int, rope_theta: float) -> None:
        super().__init__()
        self.heads, self.rope_theta = heads, rope_theta
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, documents: Tensor | None, cache: DocumentCache | None
    ) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (
            y.transpose(1, 2) for y in (rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta), v)
        )
        if cache is not None:
            k, v = cache.extend(k, v, documents)
        causal = mask is None and q.shape[2] > 1
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(o.transpose(1, 2).flatten(2))

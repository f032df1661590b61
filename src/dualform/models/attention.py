"""Softmax attention, the layer that every other one is compared with: torch's SDPA, RoPE, documents kept apart.

B batch, T new tokens, S columns looked at, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualform.graphs.this_thread import compiles, exports
from dualform.learning.layer import rotate
from dualform.learning.transforms import watched
from dualform.models.cache import Columns, DocumentCache


def allowed(columns: Columns | None, T: int, S: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which of S columns each of the T last may look at, (B or 1, 1, T, S); None: SDPA's own causal rule.

    A token sees the tokens of its document up to itself, the last `window` of them. Padding sees what a token in its
    place would, and itself, so that no row of the softmax is empty.
    """
    # A window is never left out where a file is written for every length.
    unseen = window is not None and (exports() or S > window)
    if columns is None and not unseen and T in (1, S):
        return None
    column = torch.arange(S, device=device)
    row = column[S - T :, None]
    if columns is None:
        mask = column <= row
        return (mask if window is None else mask & (column > row - window))[None, None]
    documents, ranks = columns.documents, columns.ranks
    own = torch.where(documents < 0, -1 - documents, documents)[:, S - T :, None]
    mask = (column <= row) & (documents[:, None] == own)
    if window is not None:
        mask &= ranks[:, None] > ranks[:, S - T :, None] - window
    return (mask | (column == row))[:, None]


class Attention(nn.Module):
    """Attend causally within each document.

    Shape:  x (B, T, dim), positions (B or 1, T), mask (B or 1, 1, T, S) bool or None, where all S columns stand
            -> (B, T, dim), and the weights (B, H, T, S) if asked for, else None.
    Dtype:  as x; rotations in float32 at least.
    Raises: ValueError if the cache holds other sizes.
    Source: Vaswani et al. 2017; Su et al. 2021 (interleaved pairs).
    """

    def __init__(self, dim: int, heads: int, rope_theta: float) -> None:
        super().__init__()
        self.heads, self.rope_theta = heads, rope_theta
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, columns: Columns | None, cache: DocumentCache | None,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(y, positions, self.rope_theta) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.extend(k, v, columns)
        if with_weights or watched():  # SDPA's kernels have no forward derivative
            o, weights = attend(q, k, v, mask)
        else:
            causal = mask is None
            if q.shape[2] == 1:  # asked this way, a compiler that holds the length as a symbol has a plain bool too
                causal = False
            o, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), None
            if o.requires_grad and not compiles():
                o = Twice.apply(o, q, k, v, mask)
        return self.o_proj(o.transpose(1, 2).flatten(2)), weights


class Twice(torch.autograd.Function):
    """Give SDPA's result a gradient that has a gradient: its kernels' backwards have none.

    A backward that nobody differentiates is the kernel's own; of one that is, the ops that define it take the place.
    dv = w^T do,  ds = w (dw - sum_S dw w) / sqrt(D) with dw = do v^T,  dq = ds k,  dk = ds^T q
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (do,) = grads
        if not torch.is_grad_enabled() and not watched():
            return do, None, None, None, None
        q, k, v, mask = ctx.saved_tensors
        _, w = attend(q, k, v, mask)
        do = do.to(w.dtype)  # under autocast SDPA's is another than q's
        dw = do @ v.mT
        ds = w * (dw - (dw * w).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        return None, ds @ k, ds.mT @ q, w.mT @ do, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what SDPA returns, and its weights, which it keeps to itself."""
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = (q @ k.mT).to(torch.promote_types(torch.float32, q.dtype))
    weights = (scores / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    return weights @ v, weights

"""The row of attention: differentiated through its definition.

out = softmax(scale q k^T + mask) v
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualform.ops.examples import B, T, call
from dualform.ops.table import defined_row

_QKV = (T("b h 4"), T("b l 4"), T("b l k"))


@defined_row(
    "aten::scaled_dot_product_attention",
    call("", T("b h 4"), T("b h 4"), T("b h k"), None, 0.0, True), call("", *_QKV, T("h l")), call("", *_QKV, None, 0.0, False, scale=0.3),
    call("", T("n 4"), T("l 4"), T("l k"), B("n l")), call("", T("2 4"), T("2 4"), T("2 k"), torch.tensor([[True, False], [False, False]])), call("", T("1 4 n k"), T("1 2 l k"), T("1 2 l k"), None, 0.0, True, enable_gqa=True),
)  # fmt: skip
def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if attn_mask is None:
        return scores.softmax(-1) @ value
    masked = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    # A row that may look nowhere is zero, not 0/0.
    return torch.ops.aten._safe_softmax.default(scores, -1) @ value

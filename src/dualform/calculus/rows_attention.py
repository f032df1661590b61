"""The row of attention: differentiated through its definition, traced once for each shape.

out = softmax(scale q k^T + mask) v
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from dualform.calculus.program import LocalRule, Program
from dualform.calculus.table import Call, row
from dualform.calculus.terms import Term
from dualform.calculus.trace import trace

_Like = tuple[tuple[int, ...], torch.dtype, torch.device]


def _define(scale: float, causal: bool, grouped: bool, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    for mask in masks:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@lru_cache(maxsize=256)
def _definition(scale: float, causal: bool, grouped: bool, likes: tuple[_Like, ...]) -> fx.GraphModule:
    """Trace the definition on stand-ins, out of sight of any trace or transform that is going on."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        with FakeTensorMode(allow_non_fake_inputs=True):
            stand_ins = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in likes]

        def defined(*args: Tensor) -> Tensor:
            q, k, v, *masks = args
            return _define(scale, causal, grouped, q, k, v, *masks)

        return trace(defined, *stand_ins)


def attention_row(rule: LocalRule) -> None:
    """Add the row; `rule` differentiates the ops of the definition."""

    @row("aten::scaled_dot_product_attention")
    def _attention(call: Call, operand: int) -> list[Term]:
        b = call.bound
        q, mask = b["query"], b["attn_mask"]
        scale = q.shape[-1] ** -0.5 if b["scale"] is None else b["scale"]
        args = [q, b["key"], b["value"], *([mask] if mask is not None else [])]
        likes = tuple((tuple(a.shape), a.dtype, a.device) for a in args)
        gm = _definition(float(scale), b["is_causal"], bool(b.get("enable_gqa")), likes)
        order = ["query", "key", "value", "attn_mask"].index(call.places[operand][0])
        return list(Program(gm, args, order, rule, call.names).terms())

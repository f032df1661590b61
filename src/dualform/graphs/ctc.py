"""The connectionist temporal classification loss as an op of log probabilities and lengths, which no trace reads.

    loss[b] = ctc(log_probs)[b]        d loss[b] / d log_probs[t,b',c] = δ(b,b') slopes[t,b,c]

torch's own op gives out what it needs for its backward, too, whose shape depends on the lengths.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from dualform.algebra.terms import Term, fresh_axes, make_factor
from dualform.graphs.operators import custom_operator
from dualform.ops.examples import T, call
from dualform.ops.spelled import SPELLED
from dualform.ops.table import OpCall, row

aten = torch.ops.aten


def _has_none(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError("the second derivative of ctc_loss, which torch has none of")


@custom_operator("ctc_slopes", lambda log_probs, *_: torch.empty_like(log_probs), _has_none)
def _slopes(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """As torch has them: right behind a log_softmax."""
    given = (log_probs, targets, input_lengths, target_lengths)
    loss, alpha = aten._ctc_loss.Tensor(*given, blank, zero_infinity)
    return aten._ctc_loss_backward.Tensor(torch.ones_like(loss), *given, loss, alpha, blank, zero_infinity)


def _kept(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _pulled(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return g.unsqueeze(-1) * _slopes(*ctx.saved_tensors, *ctx.rest), *[None] * 5


@custom_operator("ctc", lambda log_probs, *_: log_probs.new_empty(log_probs.shape[1]), _pulled, _kept)
def _loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    return aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]


_lengths = (torch.tensor([[1, 2], [3, 1]]), torch.tensor([5, 4]), torch.tensor([2, 1]))


@row("dualform::ctc", examples=[call("dualform::ctc", T("5 2 4"), *_lengths, 0, False)])
def _of_its_own_row(call: OpCall, operand: int) -> list[Term]:
    """A loss is of the rows of its sequence."""
    inn = fresh_axes(call.operands[0].shape)
    return [Term(1.0, (make_factor(_slopes(*call.args), inn, f"ctc'({call.operand_name(0)})"),), (inn[1],), inn)]


def _ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0,
    reduction: str | int = "mean", zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """As torch's, batched or not."""
    many, long = (
        (n if isinstance(n, Tensor) else torch.tensor(n)).reshape(-1) for n in (input_lengths, target_lengths)
    )
    is_batched = log_probs.ndim == 3
    rows = log_probs if is_batched else log_probs.unsqueeze(1)
    own = targets if is_batched else targets.reshape(1, -1)
    loss = _loss(rows, own, many, long, blank, zero_infinity)
    loss = torch.where(loss == math.inf, 0.0, loss) if zero_infinity else loss
    if reduction in ("mean", 1):
        return (loss / long.clamp(min=1)).mean()
    return loss.sum() if reduction in ("sum", 2) else loss if is_batched else loss.squeeze(0)


SPELLED |= dict.fromkeys((torch.ctc_loss, torch.nn.functional.ctc_loss), _ctc_loss)

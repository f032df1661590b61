"""Heads that classify a text, or each of its tokens, on the language models' body.

B batch, T tokens, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.utils.generic import can_return_tuple

from dualform.models.arguments import check_labels
from dualform.models.body import DualformModel, DualformPreTrainedModel, cross_entropy
from dualform.models.configuration import DualformConfig
from dualform.models.versions import CACHE, SequenceOutput


class Classifier(DualformPreTrainedModel):
    """What both heads share: a linear map of what they read off the body."""

    bias = False

    def __init__(self, config: DualformConfig, *, prove: bool = True) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = DualformModel(config, prove=prove)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=self.bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, **kwargs: Any,
    ) -> SequenceOutput:  # fmt: skip
        body = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs,
            return_dict=True,
        )  # fmt: skip
        logits = self.score(self.read(body.last_hidden_state, attention_mask, input_ids))
        loss = None
        if labels is not None:
            if not labels.is_floating_point() and labels.ndim < logits.ndim and self.num_labels > 1:
                check_labels(labels, logits, -100)
            # How many labels the whole batch has, over which the Trainer averages.
            count = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **count)
        more = {"hidden_states": body.hidden_states, "attentions": body.attentions, CACHE: getattr(body, CACHE)}
        return SequenceOutput(loss=loss, logits=logits, **more)

    def read(self, h: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        """Return what is classified of h (B, T, hidden)."""
        return h


class DualformForSequenceClassification(Classifier):
    """Classify a text by what its last token has become, wherever padding stands.

    The last token is the last column that attention_mask keeps, or without one the last not config.pad_token_id.
    Shape:  as DualformModel; labels (B,) whole numbers, or (B, C) for several, or numbers to regress -> logits (B, C).
    Dtype:  logits as the parameters.
    Raises: as DualformModel.
    Source: transformers' heads for causal models. Differs: padding on either side, with or without pad_token_id.
    """

    def read(self, h: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        at = last_token(h, mask, ids, self.config.pad_token_id)
        return h[torch.arange(h.shape[0], device=h.device), at]


class DualformForTokenClassification(Classifier):
    """Classify each token of a text, by what it and those before it have become.

    Shape:  as DualformModel; labels (B, T), -100 = not counted -> logits (B, T, C). What padding gets is not defined.
    Dtype:  logits as the parameters; the loss in float32 at least.
    Raises: as DualformModel.
    """

    bias = True

    def __init__(self, config: DualformConfig, *, prove: bool = True) -> None:
        super().__init__(config, prove=prove)
        self.loss_function = cross_entropy


def last_token(h: Tensor, mask: Tensor | None, ids: Tensor | None, pad: int | None) -> Tensor:
    """Return the column of each row's last token, (B,); the first of a row that has none."""
    B, T = h.shape[:2]
    if mask is not None:
        valid = mask[:, mask.shape[1] - T :].bool()
    elif ids is not None and pad is not None:
        valid = ids != pad
    else:
        return torch.full((B,), T - 1, device=h.device)
    column = torch.arange(T, device=h.device)
    return torch.where(valid.to(h.device), column, 0).amax(1)


AutoModelForSequenceClassification.register(DualformConfig, DualformForSequenceClassification)
AutoModelForTokenClassification.register(DualformConfig, DualformForTokenClassification)

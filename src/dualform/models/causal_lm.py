"""Causal language models on transformers' classes: test-time layers, attention layers, or both.

B batch, T new tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dualform.learning.layer import TestTimeTraining
from dualform.models.attention import allowed
from dualform.models.blocks import DualformBlock, RMSNorm, learning_layer, own_tensors
from dualform.models.cache import adopt, joined_documents, number_documents
from dualform.models.configuration import DualformConfig


class DualformPreTrainedModel(PreTrainedModel):
    """What both models share: their configuration, initial values, and what transformers may do with them."""

    config: DualformConfig
    config_class = DualformConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["DualformBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": DualformBlock}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5  # torch's own initial values, as the published code keeps them
            for tensor in module.parameters(recurse=False):
                init.uniform_(tensor, -bound, bound)
        elif isinstance(module, TestTimeTraining):
            missing = {n: x for n, x in own_tensors(module).items() if not getattr(x, "_is_hf_initialized", False)}
            fresh = own_tensors(learning_layer(self.config)) if missing else {}
            for name, tensor in missing.items():
                init.copy_(tensor, fresh[name].to(tensor))
        else:
            super()._init_weights(module)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the padding mask as it is, for any cache: the model makes what its layers need."""
        return attention_mask


class DualformModel(DualformPreTrainedModel):
    """Embed tokens and run the blocks.

    Shape:  input_ids (B, T) or inputs_embeds (B, T, hidden), attention_mask (B, T or past + T), reset (B, T) bool
            -> last_hidden_state (B, T, hidden). What padding outputs is not defined.
    Dtype:  as the parameters; fast weights in float32 (float64 for float64 parameters).
    Raises: ValueError for ids outside the vocabulary, shapes that do not fit, a cache of another model.
    Source: Sun et al. 2024, figure 16.
    """

    def __init__(self, config: DualformConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DualformBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            given = "both" if input_ids is not None else "neither"
            raise ValueError(
                f"DualformModel: {given} of input_ids and inputs_embeds given; expected one. Pass one of them."
            )
        if inputs_embeds is None:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None and self.config.layer_types is not None
        kinds = self.config.layer_types
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt(past_key_values, kinds, self.config.sliding_window)
        inputs = self._inputs(inputs_embeds, attention_mask, position_ids, past_key_values, reset)
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h, inputs, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h), past_key_values=past_key_values)

    def _inputs(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None, reset: Tensor | None
    ) -> dict[str, Any]:
        """Return what every layer of a kind needs and none should compute again."""
        B, T, _ = x.shape
        mask = new_columns("attention_mask", mask, B, T)
        if reset is not None and reset.shape != (B, T):
            raise ValueError(
                f"DualformModel: reset has shape {tuple(reset.shape)}; expected (batch, tokens) = {(B, T)}."
            )
        reset = None if reset is None or (not torch.compiler.is_compiling() and not reset.any()) else reset.bool()
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(seen, seen + T, device=x.device)[None]
        documents = number_documents(mask, reset)
        inputs = {"attention_mask": mask, "reset": reset, "documents": documents, "positions": positions}
        assert self.config.layer_types is not None
        for kind in {"full_attention", "sliding_attention"} & set(self.config.layer_types):
            held: Any = None if cache is None else cache.layers[self.config.layer_types.index(kind)]
            window = self.config.sliding_window if kind == "sliding_attention" else None
            S = T if held is None else held.get_mask_sizes(T)[0]
            inputs[kind] = allowed(joined_documents(held, documents, x), T, S, window, x.device)
        return inputs


class DualformForCausalLM(DualformPreTrainedModel, GenerationMixin):
    """Predict the next token.

    Shape:  as DualformModel; labels (B, T), -100 = not counted -> logits (B, T or logits_to_keep, vocab), loss scalar,
            past_key_values, which carries the fast weights and makes any split of a text exact.
    Dtype:  logits as the parameters; the loss in float32, in nats per token.
    Raises: as DualformModel.
    Source: Sun et al. 2024.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DualformConfig) -> None:
        super().__init__(config)
        self.model = DualformModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            reset=reset,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(body.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=body.past_key_values, hidden_states=body.hidden_states
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]: names, not positions
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        # `reset` speaks of the prompt; generated tokens belong to its last document.
        reset, cache = kwargs.pop("reset", None), kwargs.get("past_key_values")
        inputs = cast("Any", super()).prepare_inputs_for_generation(input_ids, **kwargs)
        if reset is not None:
            new = inputs.get("input_ids")
            T = (new if new is not None else inputs["inputs_embeds"]).shape[1]
            seen = cache.get_seq_length() if cache is not None else 0
            part = reset[:, seen : seen + T].bool()
            inputs["reset"] = F.pad(part, (0, T - part.shape[1]))
        return inputs


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the embedding has no row for (not under torch.compile, which must not wait for values)."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"DualformModel: input_ids holds {low if low < 0 else high}; expected ids in 0 ... vocab_size - 1 = {vocab_size - 1}. "
            "Use the tokenizer that the model was trained with."
        )


def new_columns(name: str, mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """Return the last T columns of a padding mask as bool, None if it masks nothing."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"DualformModel: {name} has shape {tuple(mask.shape)}; expected (batch, tokens) = {(B, T)} or (batch, past + "
            "tokens). Pass the 2D padding mask."
        )
    mask = mask[:, -T:].bool()
    return None if not torch.compiler.is_compiling() and mask.all() else mask


AutoConfig.register("dualform", DualformConfig)
AutoModel.register(DualformConfig, DualformModel)
AutoModelForCausalLM.register(DualformConfig, DualformForCausalLM)

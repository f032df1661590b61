"""Causal language models on transformers' classes: test-time layers, attention layers, or both.

B batch, T new tokens.
"""

from __future__ import annotations

from pathlib import Path
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
from dualform.models.attention import Attention
from dualform.models.blocks import Call, DualformBlock, RMSNorm, View, learning_layer, own_tensors, view
from dualform.models.cache import Rollback, adopt
from dualform.models.configuration import DualformConfig
from dualform.models.weight_files import check_weights


class DualformPreTrainedModel(PreTrainedModel):
    """What both models share: their configuration, initial values, and what transformers may do with them."""

    config: DualformConfig
    config_class = DualformConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = False  # decoding may take tokens back: `cache.Rollback`
    _supports_sdpa = True
    _supports_context_parallel = False
    _no_split_modules = ["DualformBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": DualformBlock, "attentions": Attention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, from safetensors only: pickles are refused, damaged files named."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir() and kwargs.get("state_dict") is None:
            check_weights("from_pretrained", folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})

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

    @torch.no_grad()
    def inner_losses(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reset: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Read how well the layers knew each token: their inner loss before and after the update that it caused.

        before_t = loss(f(k_t; anchor), v_t), whose gradient is taken;  after_t = loss(f(k_t; theta_t), v_t)
        Shape:  input_ids (B, T), and whatever else forward takes -> (layers, B, heads, T) each: the test-time layers, in
                order; 0 for padding. A cache that is passed is read on, as in forward.
        Dtype:  float32, float64 for float64 parameters.
        Raises: as forward; ValueError if no layer learns at test time.
        Source: Sun et al. 2024, figure 4.
        Example:
            >>> import torch
            >>> model = DualformForCausalLM(DualformConfig(preset="tiny-ttt-linear"))
            >>> before, after = model.inner_losses(torch.tensor([[1, 72, 105, 72, 105]]))
            >>> before.shape, bool((after < before).all())
            (torch.Size([2, 1, 4, 5]), True)
        """
        mixers = [m for m in self.modules() if isinstance(m, TestTimeTraining)]
        if not mixers:
            raise ValueError(
                f"inner_losses: layer_types is {self.config.layer_types}; expected a 'test_time' layer. Attention has no inner loss."
            )
        found: list[tuple[Tensor, Tensor]] = []

        def read(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = {name: x for name, x in kwargs.items() if name != "overwrite"}  # nothing is written here
            found.append(cast("TestTimeTraining", mixer).inner_losses(*args, **inputs))

        hooks = [mixer.register_forward_pre_hook(read, with_kwargs=True) for mixer in mixers]
        try:
            self(input_ids, attention_mask, past_key_values=past_key_values, reset=reset, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        before, after = zip(*found, strict=True)
        return torch.stack(before), torch.stack(after)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the padding mask as it is, for any cache: the model makes what its layers need."""
        return attention_mask


class DualformModel(DualformPreTrainedModel):
    """Embed tokens and run the blocks.

    Padding, left, right or in between, changes nothing for the tokens that are there; neither does the way a text is cut into
    calls. position_ids turn the queries and keys of attention layers only (default: the number of tokens before, padding not
    counted); test-time layers turn theirs by the place in the mini-batch, which they carry. Without a mask and a cache, a
    position 0 inside a row starts a new document, as `reset` does, and so do the inner entries of cu_seq_lens_q.
    Shape:  input_ids (B, T) or inputs_embeds (B, T, hidden), attention_mask (B, T or past + T), position_ids (B or 1, T),
            reset (B, T) bool -> last_hidden_state (B, T, hidden); if asked for, hidden_states, one more than layers, and
            attentions, one per attention layer (B, heads, T, columns in its cache + T). What padding outputs is not defined.
    Dtype:  as the parameters; fast weights in float32 (float64 for float64 parameters).
    Raises: ValueError for ids outside the vocabulary, shapes that do not fit, a cache of another model or batch.
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
        with_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        if (ends := kwargs.get("cu_seq_lens_q")) is not None:
            starts = packed_starts(torch.as_tensor(ends, device=inputs_embeds.device), *inputs_embeds.shape[:2])
            reset = starts if reset is None else reset.bool() | starts
        call = self._call(inputs_embeds, attention_mask, position_ids, past_key_values, reset, with_weights)
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h, call, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h), past_key_values=past_key_values)

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        reset: Tensor | None,
        with_weights: bool,
    ) -> Call:
        """Check what was given, and prepare what every layer of a kind needs."""
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"DualformModel: inputs_embeds has shape {tuple(x.shape)}; expected (batch, tokens, hidden_size = "
                f"{self.config.hidden_size}). Pass what the model's embed_tokens returns."
            )
        B, T, _ = x.shape
        seen = 0 if cache is None else cache.get_seq_length()
        if reset is not None and reset.shape != (B, T):
            raise ValueError(
                f"DualformModel: reset has shape {tuple(reset.shape)}; expected (batch, tokens) = {(B, T)}."
            )
        if positions is not None:
            positions = positions[None] if positions.ndim == 1 else positions
            if positions.shape not in ((1, T), (B, T)):
                raise ValueError(
                    f"DualformModel: position_ids has shape {tuple(positions.shape)}; expected (batch or 1, tokens) = {(B, T)}."
                )
            if mask is None and not seen and T > 1:
                starts = F.pad(positions[:, 1:] == 0, (1, 0)).expand(B, T)
                reset = starts if reset is None else reset.bool() | starts
        mask = new_columns(mask, B, T, seen)
        reset = None if reset is None or (not torch.compiler.is_compiling() and not reset.any()) else reset.bool()
        views: dict[str, View] = {}
        assert self.config.layer_types is not None
        for kind in {"full_attention", "sliding_attention"} & set(self.config.layer_types):
            held: Any = None if cache is None else cache.layers[self.config.layer_types.index(kind)]
            window = self.config.sliding_window if kind == "sliding_attention" else None
            views[kind] = view(held, mask, reset, x, window)
        if positions is None:
            ranks = [v.columns.ranks[:, -T:] for v in views.values() if v.columns is not None and T]
            positions = ranks[0].clamp(min=0) if ranks else torch.arange(seen, seen + T, device=x.device)[None]
        return Call(mask, reset, positions, views, with_weights)


class DualformForCausalLM(DualformPreTrainedModel, GenerationMixin):
    """Predict the next token.

    Shape:  as DualformModel; labels (B, T), -100 = not counted -> logits (B, T or logits_to_keep, vocab), loss scalar,
            past_key_values, which carries the fast weights and makes any split of a text exact. Padding has the logits
            of the last token before it.
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
        h = body.last_hidden_state
        if attention_mask is not None:
            h = onto_padding(h, attention_mask[:, -h.shape[1] :])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]: names, not positions
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # `reset` speaks of the prompt; generated tokens belong to its last document.
        reset, cache = kwargs.pop("reset", None), kwargs.get("past_key_values")
        inputs = cast("Any", super()).prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        new = inputs.get("input_ids")
        B, T = (new if new is not None else inputs["inputs_embeds"]).shape[:2]
        if not T:
            raise ValueError(
                f"generate: input_ids has shape {(B, T)}; expected at least one token to go on from. Begin with bos_token_id = "
                f"{self.config.bos_token_id}, or pass no input_ids."
            )
        if reset is not None:
            seen = cache.get_seq_length() if cache is not None else 0
            part = reset[:, seen : seen + T].bool()
            inputs["reset"] = F.pad(part, (0, T - part.shape[1]))
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        # transformers counts on from the last column, and puts padding there at 0.
        if (mask := model_kwargs.get("attention_mask")) is not None:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        return cast("Any", super())._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]: whatever else it takes
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = cast("Any", super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Before anything asks the layers to record: transformers makes layers of its own for kinds of attention.
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache) and self.config.layer_types is not None:
            adopt(cache, self.config.layer_types, self.config.sliding_window)
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return cast("Any", super())._assisted_decoding(*args, **kwargs)
        finally:
            # It has switched recording on; whoever reads on with the cache would pay for what nobody takes back.
            for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
                if isinstance(layer, Rollback):
                    layer.record_past, layer.records = False, []


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the embedding has no row for (not under torch.compile, which must not wait for values)."""
    if ids.ndim != 2 or ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"DualformModel: input_ids has shape {tuple(ids.shape)} and type {ids.dtype}; expected (batch, tokens) of whole "
            "numbers. Pass what the tokenizer returns with return_tensors='pt'."
        )
    if torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"DualformModel: input_ids holds {low if low < 0 else high}; expected ids in 0 ... vocab_size - 1 = {vocab_size - 1}. "
            "Use the tokenizer that the model was trained with."
        )


def packed_starts(ends: Tensor, B: int, T: int) -> Tensor:
    """Return where documents of one packed row start, (1, T) bool, from its cumulative lengths 0, ..., T (n + 1,)."""
    if B != 1 or ends.ndim != 1 or ends.numel() < 2:
        raise ValueError(
            f"DualformModel: cu_seq_lens_q has shape {tuple(ends.shape)} with batch = {B}; expected (documents + 1,) and one "
            "packed row, batch = 1. Pass reset (batch, tokens) for more rows."
        )
    return (torch.arange(T, device=ends.device) == ends[1:-1, None]).any(0)[None]


def onto_padding(h: Tensor, mask: Tensor) -> Tensor:
    """Give padding (B, T) what the last token before it says, so that right-padded prompts go on from their own ends."""
    column = torch.arange(h.shape[1], device=h.device).expand(mask.shape)
    last = torch.where(mask.bool(), column, 0).cummax(1).values
    return h.gather(1, last[..., None].expand_as(h))


def new_columns(mask: Tensor | None, B: int, T: int, seen: int) -> Tensor | None:
    """Return the last T columns of a padding mask as bool, None if it masks nothing."""
    if mask is None:
        return None
    if mask.shape not in ((B, T), (B, seen + T)):
        past = f" or (batch, past + tokens) = {(B, seen + T)}" if seen else ""
        raise ValueError(
            f"DualformModel: attention_mask has shape {tuple(mask.shape)}; expected (batch, tokens) = {(B, T)}{past}. Pass "
            "the 2D padding mask, 1 for tokens and 0 for padding."
        )
    mask = mask[:, mask.shape[1] - T :].bool()
    return None if not torch.compiler.is_compiling() and mask.all() else mask


AutoConfig.register("dualform", DualformConfig)
AutoModel.register(DualformConfig, DualformModel)
AutoModelForCausalLM.register(DualformConfig, DualformForCausalLM)

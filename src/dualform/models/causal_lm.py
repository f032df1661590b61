"""Causal language models on transformers' classes: test-time layers, attention layers, or both.

B batch, T new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dualform.catalogue import near_misses
from dualform.learning.layer import TestTimeTraining
from dualform.models.attention import Attention
from dualform.models.blocks import Call, DualformBlock, RMSNorm, View, learning_layer, own_tensors, view
from dualform.models.cache import Rollback, adopt
from dualform.models.configuration import DualformConfig
from dualform.models.documents import (
    joined,
    onto_padding,
    read_mask,
    starts_by_index,
    starts_by_lengths,
    starts_by_positions,
)
from dualform.models.versions import CACHE, OTHER, BaseOutput, CausalOutput, one_cache, renamed, transformers_version
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
    _skip_keys_device_placement = ["past_key_values", "cache"]
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseOutput:
        if (input_ids is None) == (inputs_embeds is None):
            given = "both" if input_ids is not None else "neither"
            raise ValueError(
                f"DualformModel: {given} of input_ids and inputs_embeds given; expected one. Pass one of them."
            )
        refuse_unknown("DualformModel", DualformModel.forward, kwargs)
        past = one_cache("DualformModel", past_key_values, cache)
        if inputs_embeds is None:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past is None and not (self.training and self.gradient_checkpointing):
            past = DynamicCache(config=self.config)
        if past is not None:
            transformers_version.check(
                lambda: DualformForCausalLM(DualformConfig(preset="tiny-ttt-linear", **smallest))
            )
            adopt(past, self.config)
        with_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        packed = {"reset": reset, "seq_idx": kwargs.get("seq_idx"), "cu_seq_lens_q": kwargs.get("cu_seq_lens_q")}
        call = self._call(inputs_embeds, attention_mask, position_ids, past, packed, with_weights)
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h, call, past)
        return BaseOutput(last_hidden_state=self.norm(h), **{CACHE: past})

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        packed: dict[str, Tensor | None],
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
        if cache is not None and torch.is_grad_enabled() and any(getattr(held, "cut", False) for held in cache.layers):
            raise ValueError(
                "DualformModel: past_key_values holds a state that reentrant activation checkpointing made without gradients; expected "
                "one that has them, or that was detached on purpose. Call cache.detach(), or use "
                'activation_checkpointing_kwargs={"use_reentrant": False}.'
            )
        mask, starts = read_mask(mask, B, T, seen)
        if positions is not None:
            positions = positions[None] if positions.ndim == 1 else positions
            if positions.shape not in ((1, T), (B, T)):
                raise ValueError(
                    f"DualformModel: position_ids has shape {tuple(positions.shape)}; expected (batch or 1, tokens) = {(B, T)}."
                )
            starts = joined(starts, starts_by_positions(positions, mask, B, seen))
        reset = joined(starts, said_starts(packed, B, T, seen, x.device))
        views: dict[str, View] = {}
        assert self.config.layer_types is not None
        for kind in {"full_attention", "sliding_attention"} & set(self.config.layer_types):
            held: Any = None if cache is None else cache.layers[self.config.layer_types.index(kind)]
            window = self.config.sliding_window if kind == "sliding_attention" else None
            views[kind] = view(held, mask, reset, x, window)
        if positions is None:
            ranks = [v.columns.ranks[:, -T:] for v in views.values() if v.columns is not None and T]
            positions = ranks[0].clamp(min=0) if ranks else torch.arange(seen, seen + T, device=x.device)[None]
        return Call(mask, reset, positions, views, with_weights, {} if torch.is_grad_enabled() else None)


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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        for_loss = {name: kwargs.pop(name) for name in ("shift_labels", "ignore_index") if name in kwargs}
        refuse_unknown("DualformForCausalLM", DualformForCausalLM.forward, kwargs)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            reset=reset,
            cache=cache,
            **kwargs,
        )
        h = body.last_hidden_state
        if attention_mask is not None:
            h = onto_padding(h, attention_mask[:, attention_mask.shape[1] - h.shape[1] :])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept])
        loss = None
        if labels is not None:
            for_loss |= kwargs
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        return CausalOutput(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            **{CACHE: getattr(body, CACHE)},
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, on a cache by either of its names.

        Shape:  see transformers' generate; a cache that is passed has read the first columns of the ids, which are all given.
        Raises: ValueError for ids that a cache has read already, for names that nobody knows.
        """
        kwargs = renamed("generate", kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(cache := kwargs.get(CACHE), Cache) and ids is not None and ids.shape[1] <= cache.get_seq_length():
            seen = cache.get_seq_length()
            raise ValueError(
                f"generate: input_ids has {ids.shape[1]} columns and the cache has read {seen}; expected what was read and what is new "
                "together, more than those. Pass torch.cat([ids that were read, new ids], 1), and a mask of as many columns."
            )
        if ids is not None:
            kwargs = as_reset(kwargs, *ids.shape[:2], ids.device)
        found = super().generate(inputs, *args, **kwargs)
        if isinstance(found, ModelOutput) and not hasattr(found, OTHER):
            setattr(found, OTHER, getattr(found, CACHE))
        return found

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        try:
            cast("Any", super())._validate_model_kwargs(model_kwargs)
        except ValueError:
            known = [*GenerationConfig().to_dict(), *inspect.signature(GenerationMixin.generate).parameters]
            refuse_unknown("generate", type(self).forward, model_kwargs, [name for name in known if name[0] != "_"])
            raise

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]: names, not positions
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # `reset` speaks of the prompt; generated tokens belong to its last document.
        kwargs = renamed("prepare_inputs_for_generation", kwargs)
        reset, cache = kwargs.pop("reset", None), kwargs.get(CACHE)
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
        if isinstance(cache := model_kwargs.get(CACHE), Cache):
            adopt(cache, self.config)
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return cast("Any", super())._assisted_decoding(*args, **kwargs)
        finally:
            # It has switched recording on; whoever reads on with the cache would pay for what nobody takes back.
            for layer in getattr(kwargs.get(CACHE), "layers", ()):
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


def said_starts(packed: dict[str, Tensor | None], B: int, T: int, seen: int, device: torch.device) -> Tensor | None:
    """Return the starts that reset, seq_idx and cu_seq_lens_q say, whichever are given."""
    reset, index, ends = (packed.get(name) for name in packing)
    if reset is not None and reset.shape != (B, T):
        raise ValueError(f"DualformModel: reset has shape {tuple(reset.shape)}; expected (batch, tokens) = {(B, T)}.")
    by_index = None if index is None else starts_by_index(torch.as_tensor(index, device=device), B, T, seen)
    by_lengths = None if ends is None else starts_by_lengths(torch.as_tensor(ends, device=device), B, T)
    return joined(reset, by_index, by_lengths)


def as_reset(given: dict[str, Any], B: int, T: int, device: torch.device) -> dict[str, Any]:
    """Say where documents start as `reset` does: `generate` hands the same arguments to calls that read other columns."""
    valid, starts = read_mask(given.get("attention_mask"), B, T, 0)
    starts = joined(starts, said_starts({name: given.get(name) for name in packing}, B, T, 0, device))
    rest = {name: value for name, value in given.items() if name not in packing}
    if starts is None:
        return rest
    return {**rest, "reset": starts} | ({} if valid is None else {"attention_mask": valid.long()})


def refuse_unknown(where: str, forward: Any, given: dict[str, Any], more: Sequence[str] = ()) -> None:
    """Refuse a keyword argument that nobody reads: what it asks for would silently not happen."""
    if given.keys() <= spoken:
        return
    own = [name for name in inspect.signature(forward).parameters if name not in ("self", "args", "kwargs")]
    known = [*own, *more, *sorted(spoken)]
    for name, value in given.items():
        if value is not None and name not in known:
            raise ValueError(f"{where}: unknown argument {name!r}. {near_misses(name, known)}")


packing = ("reset", "seq_idx", "cu_seq_lens_q")
# What transformers hands to every model, needed or not.
spoken = TransformersKwargs.__optional_keys__ | TransformersKwargs.__required_keys__ | {"return_dict"}
# For the check on versions of transformers that no test run has seen.
smallest = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "chunk": 4,
    "layer_types": ["test_time", "full_attention"], "initializer_range": 0.3, "share_qk": True,
}  # fmt: skip
AutoConfig.register("dualform", DualformConfig)
AutoModel.register(DualformConfig, DualformModel)
AutoModelForCausalLM.register(DualformConfig, DualformForCausalLM)

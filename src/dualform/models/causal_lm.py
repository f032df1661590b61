"""Causal language models on transformers' classes: test-time layers, attention layers, or both.

B batch, T new tokens.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import ModelOutput, can_return_tuple

from dualform.models.arguments import check_labels, refuse_unknown
from dualform.models.body import DualformModel, DualformPreTrainedModel, cross_entropy
from dualform.models.cache import Rollback, adopt
from dualform.models.captured import CapturedStep, is_capturable
from dualform.models.configuration import DualformConfig
from dualform.models.documents import as_reset, onto_padding
from dualform.models.versions import CACHE, OTHER, CausalOutput, renamed, transformers_version


class DualformForCausalLM(DualformPreTrainedModel, GenerationMixin):
    """Predict the next token.

    Shape:  as DualformModel; labels (B, T), -100 = not counted -> logits (B, T or logits_to_keep, vocab), loss scalar,
            past_key_values, which carries the fast weights and makes any split of a text exact. Padding has the logits
            of the last token before it.
    Dtype:  logits as the parameters; the loss in float32 at least, in nats per token.
    Raises: as DualformModel.
    Source: Sun et al. 2024.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DualformConfig, *, prove: bool = True) -> None:
        super().__init__(config)
        self.model = DualformModel(config, prove=prove)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = next_token_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, reset: Tensor | None = None,
        cache: Cache | None = None, **kwargs: Any,
    ) -> CausalOutput:  # fmt: skip
        for_loss = {name: kwargs.pop(name) for name in ("shift_labels", "ignore_index") if name in kwargs}
        refuse_unknown("DualformForCausalLM", DualformForCausalLM.forward, kwargs)
        body = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, reset=reset, cache=cache,
            **kwargs, return_dict=True,
        )  # fmt: skip
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
            loss=loss, logits=logits, hidden_states=body.hidden_states, attentions=body.attentions,
            **{CACHE: getattr(body, CACHE)},
        )  # fmt: skip

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, on a cache by either of its names.

        Shape:  see transformers' generate. The ids begin with those that a cache has read; or they are new ones only,
                where attention_mask (batch, read + new) says so.
        Raises: ValueError for ids that do not go on from what the cache has read, and for names that nobody knows.
        """
        kwargs = renamed("generate", kwargs)
        ids, cache = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get(CACHE)
        if ids is not None:
            length = ids.shape[1]
            if isinstance(cache, Cache) and cache.get_seq_length():
                config = args[0] if args else kwargs.get("generation_config")
                length = continued(cache, ids, kwargs.get("attention_mask"), getattr(config, "is_assistant", False))
            kwargs = as_reset(kwargs, ids.shape[0], length, ids.device)
        found = cast("Any", super()).generate(inputs, *args, **kwargs)
        if isinstance(found, ModelOutput) and not hasattr(found, OTHER):
            setattr(found, OTHER, getattr(found, CACHE))
        return found

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what `generate_batch` and a paged cache need: keys and values of attention alone.

        Raises: ValueError.
        """
        raise ValueError(
            "generate: continuous batching (generate_batch, cache_implementation='paged') cuts keys and values into "
            "pages; expected a cache that takes the state of fast weights, as the default does. Leave it out, and pass "
            "rows of unequal lengths with an attention_mask."
        )

    def _expand_inputs_for_generation(self, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Beams, and several answers to one text, each go on from what its row has read.
        ids, cache, copies = kwargs["input_ids"], kwargs.get(CACHE), kwargs["expand_size"]
        for layer in cache.layers if isinstance(cache, Cache) and copies > 1 else ():
            if isinstance(layer, Rollback) and layer.num_rows == len(ids):
                layer.batch_repeat_interleave(copies)
        return cast("Any", super())._expand_inputs_for_generation(**kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        try:
            cast("Any", super())._validate_model_kwargs(model_kwargs)
        except ValueError:
            own = inspect.signature(cast("Any", GenerationMixin).generate).parameters
            known = [*GenerationConfig().to_dict(), *own]
            refuse_unknown("generate", type(self).forward, model_kwargs, [name for name in known if name[0] != "_"])
            raise

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]: names, not positions
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # `reset` speaks of the prompt; generated tokens belong to its last document.
        kwargs = renamed("prepare_inputs_for_generation", kwargs)
        reset, cache = kwargs.pop("reset", None), kwargs.get(CACHE)
        # transformers takes the first call of assisted decoding for one on an empty cache
        if getattr(cache, drafted, False):
            kwargs["next_sequence_length"] = input_ids.shape[1] - cast("Cache", cache).get_seq_length()
        inputs = cast("Any", super()).prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        new = inputs.get("input_ids")
        B, T = (new if new is not None else inputs["inputs_embeds"]).shape[:2]
        if not T:
            raise ValueError(
                f"generate: input_ids has shape {(B, T)}; expected at least one token to go on from. Begin with "
                f"bos_token_id = {self.config.bos_token_id}, or pass no input_ids."
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

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        own = is_capturable(self) and not generation_config.disable_compile and generation_config.compile_config is None
        return own or cast("Any", super())._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return what `generate` calls for each token after the prompt: CUDA graphs, where nothing else was asked."""
        own = compile_config is None and is_capturable(self)
        return CapturedStep(self) if own else cast("Any", super()).get_compiled_call(compile_config)

    def _prefill(  # pyright: ignore[reportIncompatibleMethodOverride]: whatever else it takes
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        cache, size = model_kwargs.get(CACHE), generation_config.prefill_chunk_size
        filled = cache if isinstance(cache, Cache) and cache.get_seq_length() else None
        if size is not None and filled is not None and model_kwargs.get("inputs_embeds") is None:
            input_ids = self._read_parts(input_ids, size, filled, model_kwargs)
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return cast("Any", super())._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _read_parts(self, ids: Tensor, size: int, cache: Cache, model_kwargs: dict[str, Any]) -> Tensor:
        """Read all but the last `size` columns or fewer; return the ids to go on with.

        transformers 5.17 cuts ids, masks and positions as if the cache had read nothing (5.24 does not).
        """
        whole = {name: x for name in ("attention_mask", "position_ids") if (x := model_kwargs.get(name)) is not None}
        read = cache.get_seq_length()
        # A mask need not be there to say it: 5.24 drops one that is all ones.
        left_out = read if getattr(cache, only_new, False) else 0
        total = left_out + ids.shape[1]
        for stop in range(read + size, total, size):
            part = {name: x[..., : stop - total] for name, x in whole.items()}
            given = {**model_kwargs, **part, "next_sequence_length": size}
            self(**self.prepare_inputs_for_generation(ids[:, : stop - left_out], **given), return_dict=True)
            read = stop
        return ids[:, read - left_out :] if left_out else ids

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if getattr(cache, only_new, False):
            raise ValueError(
                "generate: input_ids holds new columns only; expected those that the cache has read too, since drafts "
                "are compared with the whole text. Pass torch.cat([ids that were read, new ids], 1)."
            )
        if cache is not None:
            setattr(cache, drafted, True)
        try:
            return cast("Any", super())._assisted_decoding(*args, **kwargs)
        finally:
            # It has switched recording on; whoever reads on with the cache would pay for what nobody takes back.
            for layer in getattr(cache, "layers", ()):
                if isinstance(layer, Rollback):
                    layer.record_past, layer.records = False, []
            if cache is not None:
                setattr(cache, drafted, False)


def next_token_loss(
    logits: Tensor, labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **kwargs: Any
) -> Tensor:
    """Score each token's logits against the next label; shift_labels: labels that stand there already."""
    if shift_labels is None:
        check_labels(labels, logits, ignore_index)
        shift_labels = F.pad(labels[..., 1:].long(), (0, 1), value=ignore_index)
    return cross_entropy(logits, shift_labels, ignore_index=ignore_index, **kwargs)


def continued(cache: Cache, ids: Tensor, mask: Tensor | None, is_draft: bool) -> int:
    """Return how many columns there are, read and new; refuse ids that a filled cache does not go on with."""
    seen, new = cache.get_seq_length(), ids.shape[1]
    setattr(cache, only_new, mask is not None and mask.shape[1] == seen + new)
    if getattr(cache, only_new):
        return seen + new
    read = getattr(cache.layers[0], "read", None)
    wrong = f"has {new} columns" if new <= seen else ""
    if not wrong and read is not None and len(read) == len(ids) and not is_draft:
        given = ids[:, seen - read.shape[1] : seen].to(read.device)
        same = torch.equal(given, read)
        wrong = "" if same else f"has {given[0].tolist()} before column {seen}, not {read[0].tolist()},"
    if wrong:
        raise ValueError(
            f"generate: input_ids {wrong} and the cache has read {seen} columns; expected those and the new ones "
            "together. Pass torch.cat([ids that were read, new ids], 1); or the new ids with attention_mask (batch, "
            f"read + new) = {(len(ids), seen + new)}."
        )
    return new


# What `generate` notes on a cache: do the ids hold new columns only; are drafts being tried.
only_new, drafted = "_dualform_only_new", "_dualform_drafted"
# For the check on versions of transformers that no test run has seen.
smallest = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
    "chunk": 4, "layer_types": ["test_time", "full_attention"], "initializer_range": 0.3, "share_qk": True,
}  # fmt: skip
transformers_version.build = lambda: DualformForCausalLM(DualformConfig(preset="tiny-ttt-linear", **smallest))
AutoModelForCausalLM.register(DualformConfig, DualformForCausalLM)

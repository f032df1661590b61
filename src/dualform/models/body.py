"""The body of our language models: embedded tokens through blocks; and what transformers may do with our models.

B batch, T new tokens.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dualform.graphs.this_thread import compiles
from dualform.learning.layer import TestTimeTraining, expect_type
from dualform.learning.transforms import is_known
from dualform.models.arguments import check_ids, check_labels, refuse_unknown
from dualform.models.attention import Attention
from dualform.models.blocks import AttentionView, BlockCall, DualformBlock, RMSNorm, learning_layer, own_tensors, view
from dualform.models.cache import adopt
from dualform.models.configuration import DualformConfig, gather_code
from dualform.models.documents import joined, read_mask, said_starts, starts_by_positions
from dualform.models.versions import CACHE, BaseOutput, one_cache, transformers_version
from dualform.models.weight_files import check_weights

# For from_pretrained(..., trust_remote_code=True): a file that imports the package, and what it is asked for there.
beside = "modeling_dualform"
auto_classes = {
    "AutoConfig": "DualformConfig",
    "AutoModel": "DualformModel",
    "AutoModelForCausalLM": "DualformForCausalLM",
    "AutoModelForSequenceClassification": "DualformForSequenceClassification",
    "AutoModelForTokenClassification": "DualformForTokenClassification",
}
import_us = f'''"""A model of the package dualform (`pip install dualform`), for trust_remote_code=True."""

from dualform.models import {", ".join(auto_classes.values())}
'''


# Where the layers leave their inner losses, for whoever asks: one request's own, whatever else runs at the same time.
observing: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("observing", default=None)


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
        """Load as transformers does, from safetensors only: pickles are refused, damaged files named.

        trust_remote_code: let code run that came with the model: the file of a learner, objective or rule of its own.
        """
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir() and kwargs.get("state_dict") is None:
            check_weights("from_pretrained", folder)
        if pretrained_model_name_or_path is not None:
            gather_code(pretrained_model_name_or_path, kwargs, trusted=kwargs.get("trust_remote_code") is True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, to be decoded with a cache, and loaded also where nobody has imported dualform.

        A Trainer switches config.use_cache off for itself: how a model was run, not what it is.
        """
        held, self.config.use_cache = self.config.use_cache, True
        self.config.auto_map = {auto: f"{beside}.{name}" for auto, name in auto_classes.items()}
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.use_cache = held
        if kwargs.get("is_main_process", True):
            Path(save_directory, f"{beside}.py").write_text(import_us, encoding="utf-8")
        return saved

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Leave out the copy of our source that transformers would save; `save_pretrained` says why."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5  # torch's own initial values, as the published code keeps them
            for tensor in module.parameters(recurse=False):
                init.uniform_(tensor, -bound, bound)
        elif isinstance(module, TestTimeTraining):
            missing = {n: x for n, x in own_tensors(module).items() if not getattr(x, "_is_hf_initialized", False)}
            fresh = own_tensors(learning_layer(self.config, prove=False)) if missing else {}
            for name, tensor in missing.items():
                init.copy_(tensor, fresh[name].to(tensor))
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def inner_losses(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, reset: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Read how well the layers knew each token: their inner loss before and after the update that it caused.

        before_t = loss(f(k_t; anchor), v_t), whose gradient is taken;  after_t = loss(f(k_t; theta_t), v_t)
        Shape:  input_ids (B, T), and whatever else forward takes -> (layers, B, heads, T) each: the test-time layers,
                in order; 0 for padding. A cache that is passed is read on, as in forward.
        Dtype:  float32, float64 for float64 parameters.
        Raises: as forward; ValueError if no layer learns at test time.
        Source: Sun et al. 2024, figure 4.
        Example:
            >>> import dualform as df, torch
            >>> model = df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-linear"))
            >>> before, after = model.inner_losses(torch.tensor([[1, 72, 105, 72, 105]]))
            >>> before.shape, bool((after < before).all())
            (torch.Size([2, 1, 4, 5]), True)
        """
        if not any(isinstance(m, TestTimeTraining) for m in self.modules()):
            raise ValueError(
                f"inner_losses: layer_types is {self.config.layer_types}; expected a 'test_time' layer. Attention has "
                "no inner loss."
            )
        found: list[tuple[Tensor, Tensor]] = []
        token = observing.set(found)
        try:
            self(input_ids, attention_mask, past_key_values=past_key_values, reset=reset, **kwargs)
        finally:
            observing.reset(token)
        before, after = zip(*found, strict=True)
        return torch.stack(before), torch.stack(after)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the padding mask as it is, for any cache: the model makes what its layers need."""
        return attention_mask


class DualformModel(DualformPreTrainedModel):
    """Embed tokens and run the blocks.

    Padding, left, right or in between, changes nothing for the tokens that are there; neither does the way a text is
    cut into calls. position_ids turn the queries and keys of attention layers only (default: the number of tokens
    before, padding not counted); test-time layers turn theirs by the place in the mini-batch, which they carry. Without
    a mask and a cache, a position 0 inside a row starts a new document, as `reset` does, and so do the inner entries of
    cu_seq_lens_q.
    Shape:  input_ids (B, T) or inputs_embeds (B, T, hidden), attention_mask (B, T or past + T), position_ids (B or 1,
            T), reset (B, T) bool -> last_hidden_state (B, T, hidden); if asked for, hidden_states, one more than
            layers, and attentions, one per attention layer (B, heads, T, columns in its cache + T). What padding
            outputs is not defined.
    Dtype:  as the parameters; fast weights in float32 (float64 for float64 parameters).
    Raises: ValueError for ids outside the vocabulary, shapes that do not fit, a cache of another model or batch.
    Source: Sun et al. 2024, figure 16.
    """

    def __init__(self, config: DualformConfig, *, prove: bool = True) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DualformBlock(config, i, prove) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        reset: Tensor | None = None, cache: Cache | None = None, **kwargs: Any,
    ) -> BaseOutput:  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            given = "both" if input_ids is not None else "neither"
            raise ValueError(
                f"DualformModel: {given} of input_ids and inputs_embeds given; expected one. Pass one of them."
            )
        refuse_unknown("DualformModel", DualformModel.forward, kwargs)
        if kwargs.get("is_causal") is False:
            raise ValueError(
                "DualformModel: is_causal is False; expected a causal model's True or nothing. Every layer reads from "
                "left to right."
            )
        past = one_cache("DualformModel", past_key_values, cache)
        if inputs_embeds is None:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past is None and not (self.training and self.gradient_checkpointing):
            past = DynamicCache(config=self.config)
        if past is not None:
            transformers_version.check()
            adopt(past, self.config)
        with_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        packed = {"reset": reset, "seq_idx": kwargs.get("seq_idx"), "cu_seq_lens_q": kwargs.get("cu_seq_lens_q")}
        call = self._call(inputs_embeds, attention_mask, position_ids, past, packed, with_weights)
        first: Any = past.layers[0] if past is not None and past.layers else None
        is_first = first is None or not first.seen
        # What padding holds reaches no gradient, not even as 0 times NaN.
        h = inputs_embeds if call.mask is None else inputs_embeds.masked_fill(~call.mask[..., None], 0)
        for layer in self.layers:
            h = layer(h, call, past)
        if first is not None:
            first.note(input_ids if input_ids is not None and is_known(input_ids) else None, is_first)
        carried: dict[str, Any] = {CACHE: past}
        return BaseOutput(last_hidden_state=self.norm(h), **carried)

    def _call(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None,
        packed: dict[str, Tensor | None], with_weights: bool,
    ) -> BlockCall:  # fmt: skip
        """Check what was given, and prepare what every layer of a kind needs."""
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"DualformModel: inputs_embeds has shape {tuple(x.shape)}; expected (batch, tokens, hidden_size = "
                f"{self.config.hidden_size}). Pass what the model's embed_tokens returns."
            )
        mlp: Any = self.layers[0].mlp
        expect_type("DualformModel", "inputs_embeds", x, getattr(mlp, "gate_proj", mlp))
        B, T, _ = x.shape
        seen = 0 if cache is None else cache.get_seq_length()
        if cache is not None and torch.is_grad_enabled() and any(getattr(held, "cut", False) for held in cache.layers):
            raise ValueError(
                "DualformModel: past_key_values holds a state that reentrant activation checkpointing made without "
                "gradients; expected one that has them, or that was detached on purpose. Call cache.detach(), or use "
                'activation_checkpointing_kwargs={"use_reentrant": False}.'
            )
        mask, starts = read_mask(mask, B, T, seen)
        if positions is not None:
            positions = positions[None] if positions.ndim == 1 else positions
            if positions.shape not in ((1, T), (B, T)):
                raise ValueError(
                    f"DualformModel: position_ids has shape {tuple(positions.shape)}; expected (batch or 1, tokens) = "
                    f"{(B, T)}."
                )
            starts = joined(starts, starts_by_positions(positions, mask, B, seen))
        reset = joined(starts, said_starts(packed, B, T, seen, x.device))
        views: dict[str, AttentionView] = {}
        assert self.config.layer_types is not None
        for kind in {"full_attention", "sliding_attention"} & set(self.config.layer_types):
            held: Any = None if cache is None else cache.layers[self.config.layer_types.index(kind)]
            window = self.config.sliding_window if kind == "sliding_attention" else None
            views[kind] = view(held, mask, reset, x, window)
        if positions is None:
            ranks = [v.columns.ranks[:, -T:] for v in views.values() if v.columns is not None and T]
            positions = ranks[0].clamp(min=0) if ranks else torch.arange(seen, seen + T, device=x.device)[None]
        observed = None if compiles() else observing.get()
        return BlockCall(mask, reset, positions, views, with_weights, {} if torch.is_grad_enabled() else None, observed)


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, ignore_index: int = -100, **_: Any
) -> Tensor:
    """Score logits (..., C) against labels (...), in float32 at least: transformers' own losses narrow float64.

    num_items_in_batch: how many labels the whole batch has, over which to average; default those that are counted here.
    """
    check_labels(labels, logits, ignore_index)
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype)).flatten(0, -2)
    return fixed_cross_entropy(wide, labels.to(logits.device, torch.long).flatten(), num_items_in_batch, ignore_index)


AutoConfig.register("dualform", DualformConfig)
AutoModel.register(DualformConfig, DualformModel)

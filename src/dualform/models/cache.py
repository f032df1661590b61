"""What a model carries between calls, one object per layer, in the cache that transformers' `generate` makes and moves.

B batch, H heads, S past columns, T new columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicLayer

from dualform.learning.layer import LayerState
from dualform.learning.state import Carried


@dataclass(frozen=True)
class BlockState(Carried):
    """What a test-time block carries: its layer's state and, under "pre", the tail of the convolution before it."""

    layer: LayerState
    conv: dict[str, Tensor]


class FastWeightCache(CacheLayerMixin):
    """Hold the state of one test-time layer and the columns seen; transformers finds it by the layer's kind."""

    _layer_type = "test_time"
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.state: BlockState | None = None
        self.seen = 0

    def advance(self, state: BlockState, num_columns: int) -> None:
        self.state, self.seen, self.is_initialized = state, self.seen + num_columns, True

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError(
            "FastWeightCache: a test-time layer has no keys and values to initialise. Call the layer instead."
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("FastWeightCache: a test-time layer has no keys and values to update. Call `advance` instead.")

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state and self.state.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.state and self.state.fork(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"FastWeightCache: crop is asked to forget {-tokens_to_remove} tokens; expected 0, since what fast weights "
                "learnt cannot be unlearnt. Keep an earlier state (`copy.deepcopy(cache)`) and continue from it."
            )

    def offload(self) -> None:
        """Stay where the state is: it is as small after a million tokens as after one."""

    prefetch = offload


# Subclassing registered the class for dynamic caches; a state of fixed size is as good a layer of a static one.
STATIC_LAYER_TYPE_MAPPING["test_time"] = FastWeightCache


class DocumentCache(DynamicLayer):
    """Hold keys, values and, per column, its document's number (-1: padding; no numbers: one document, no padding)."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None  # pyright: ignore[reportIncompatibleVariableOverride]: per layer here
        self.documents: Tensor | None = None
        self.conv: Tensor | None = None  # the tail of the convolution before the layer
        self.seen = 0

    def extend(self, keys: Tensor, values: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append the new columns; return all keys and values that the new queries may look at."""
        B, H, _, D = (keys if self.keys is None else self.keys).shape
        if (B, H, D) != (*keys.shape[:2], keys.shape[3]):
            raise ValueError(
                f"past_key_values: holds keys of batch {B}, heads {H}, head_dim {D}; expected batch {keys.shape[0]}, heads "
                f"{keys.shape[1]}, head_dim {keys.shape[3]}. Pass the cache that this model returned for these rows."
            )
        self.documents = joined_documents(self, documents, keys)
        self.seen += keys.shape[-2]
        keys, values = super().update(keys, values)
        if self.window is not None:
            kept = max(self.window - 1, 1)
            self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
            self.documents = None if self.documents is None else self.documents[:, -kept:]
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = 0 if self.keys is None else self.keys.shape[-2]
        return past + query_length, self.seen - past

    def reset(self) -> None:
        super().reset()
        self.documents, self.conv, self.seen = None, None, 0

    def _rows(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.documents = None if self.documents is None else self.documents.index_select(0, rows)
            self.conv = None if self.conv is None else self.conv.index_select(0, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self._rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


def joined_documents(past: DocumentCache | None, new: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the document numbers of past and new columns (B, S + T), or None where all is one document."""
    S = 0 if past is None or past.keys is None else past.keys.shape[-2]
    old = None if past is None else past.documents
    if old is None and new is None:
        return None
    zeros = like.new_zeros(like.shape[0], S if old is None else like.shape[-2], dtype=torch.long)
    if old is None:
        return torch.cat([zeros, new], 1) if new is not None and S else new
    last = old.amax(1, keepdim=True).clamp(min=0)
    return torch.cat([old, last + zeros if new is None else torch.where(new < 0, new, new + last)], 1)


def number_documents(mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """Number the documents of the new columns from 0 = the one that was open; padding is -1."""
    if mask is None and reset is None:
        return None
    like = reset if reset is not None else mask
    assert like is not None
    numbers = torch.zeros_like(like, dtype=torch.long) if reset is None else reset.long().cumsum(1)
    return numbers if mask is None else numbers.masked_fill(~mask, -1)


def adopt(cache: Cache, kinds: list[str], window: int | None) -> None:
    """Put our layers in place of empty ones; refuse a cache that another model has filled."""
    for i, kind in enumerate(kinds):
        wanted = FastWeightCache if kind == "test_time" else DocumentCache
        held = cache.layers[i] if i < len(cache.layers) else None
        if isinstance(held, wanted):
            continue
        if held is not None and getattr(held, "get_seq_length", lambda: True)():
            raise ValueError(
                f"past_key_values: layer {i} is a filled {type(held).__name__}; expected {wanted.__name__} for a layer of "
                f"kind {kind!r}. Pass a cache that this model returned, or none."
            )
        made = FastWeightCache() if kind == "test_time" else DocumentCache(window if kind != "full_attention" else None)
        cache.layers[i : i + 1] = [made]

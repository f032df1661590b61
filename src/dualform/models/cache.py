"""What a model carries between calls, one object per layer, in the cache that transformers' `generate` makes and moves.

B batch, H heads, S past columns, T new columns. A column is a token or padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicLayer

from dualform.graphs.this_thread import captures
from dualform.learning.layer import LayerState
from dualform.learning.state import Carried, row_numbers
from dualform.models.configuration import DualformConfig


@dataclass(frozen=True)
class BlockState(Carried):
    """What a test-time block carries: its layer's state and, under "pre", the tail of the convolution before it."""

    layer: LayerState
    conv: dict[str, Tensor]
    copies = "Call cache.detach() first, or fill the cache under torch.no_grad()."


class Columns(NamedTuple):
    """Where the columns of a batch stand, needed as soon as a row has padding or more than one document.

    documents (B, S): the number of the column's document, d for a token and -1 - d for padding inside document d.
    ranks (B, S): how many tokens of the row come before it (padding: as the token before it).
    document, tokens (B,): the document each row is in after the last column, and its tokens so far.
    """

    documents: Tensor
    ranks: Tensor
    document: Tensor
    tokens: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        return Columns(*(function(x) for x in self))


class CachedCall(NamedTuple):
    """One call that a cache recorded: what it held, what was read (h (B, T, d), call), how to read it again."""

    before: Rollback
    h: Tensor
    call: Any  # blocks.BlockCall
    read: Callable[[Tensor, Any, Any], object]

    def select(self, rows: Tensor) -> CachedCall:
        before = copy.copy(self.before)
        before.take(rows)
        return CachedCall(before, self.h.index_select(0, rows.to(self.h.device)), self.call.select(rows), self.read)

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedCall:
        return self  # nothing in it is ever written


class Rollback:
    """Undo the last columns, for decoding that tries tokens and takes some back (`crop`); move by rows.

    What fast weights learnt cannot be unlearnt: while recording, a layer keeps what it held before each call, and how
    to read the first columns of that call again.
    """

    is_croppable = True
    record_past = False
    cut = False  # was the state made without the gradients that were asked for? Then nobody may go on as if it had them
    seen: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.records: list[CachedCall] = []
        # The last ids (B, n), which tell whether more ids go on from them; None: not known.
        self.read: Tensor | None = None

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self), records=[*self.records])
        return made

    def activate_past_recording(self) -> None:
        self.record_past = True

    def record(self, h: Tensor, call: Any, read: Callable[[Tensor, Any, Any], object]) -> None:
        """Say, before a call, what it reads and how a cache (this one or a copy) reads its first columns again."""
        if self.record_past:
            before = copy.copy(self)
            before.records, before.record_past = [], False
            self.records.append(CachedCall(before, h, call, read))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns, exactly; what is left is kept for good."""
        n, known = -tokens_to_remove, sum(reading.h.shape[1] for reading in self.records)
        if not 0 <= n <= known:
            asked = f"forget {n} columns" if n >= 0 else f"keep {tokens_to_remove} columns, which crop does not know"
            raise ValueError(
                f"{type(self).__name__}: crop is asked to {asked}; expected 0 ... {known}, those read since the last "
                "crop while recording, as a negative number. Call `cache.activate_past_recording()` before they are "
                "read, or keep an earlier state (`copy.deepcopy(cache)`)."
            )
        records, self.records = self.records, []
        recording, self.record_past = self.record_past, False
        while n:
            before, h, call, read = records.pop()
            vars(self).update({name: x for name, x in vars(before).items() if name not in ("records", "record_past")})
            kept = max(h.shape[1] - n, 0)
            if kept:
                self.read = None
                read(h[:, :kept], call.first(h[:, :kept], self), self)
            n -= min(n, h.shape[1])
        self.record_past = recording

    def note(self, ids: Tensor | None, is_first: bool) -> None:
        """Remember the last of the ids that were just read (B, T), few of them."""
        if ids is not None and not is_first:
            ids = None if self.read is None else torch.cat([self.read, ids], 1)
        self.read = None if ids is None else ids[:, -8:]

    @property
    def num_rows(self) -> int | None:
        """How many rows are held; None before anything was read."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> None:
        """Keep the rows of these numbers of what is held."""
        self.read = None if self.read is None else self.read.index_select(0, rows.to(self.read.device))

    def detach(self) -> None:
        """Cut what is held from the graph that made it."""
        raise NotImplementedError

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the given rows, in that order: numbers (negative from the end) or a truth value for each row."""
        if self.num_rows is not None:
            rows = row_numbers(indices, self.num_rows)
            self.records = [reading.select(rows) for reading in self.records]
            self.take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.num_rows is not None:
            self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))


class FastWeightCache(Rollback, CacheLayerMixin):
    """Hold the state of one test-time layer and the columns seen; transformers finds it by the layer's kind."""

    _layer_type = "test_time"
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._state: BlockState | None = None
        self._ours = False  # does nobody else hold the state? Then the next may be written over it
        self.seen = 0
        self.chunk: tuple[int, ...] | None = None  # the layer's mini-batch; a file says it otherwise

    @property
    def state(self) -> BlockState | None:
        """The state, which whoever reads it may keep: nothing is written over it from now on."""
        self._ours = False
        return self._state

    @state.setter
    def state(self, state: BlockState | None) -> None:
        self._state, self._ours = state, False

    def __copy__(self) -> FastWeightCache:
        self._ours = False  # what two hold, nobody writes over
        return super().__copy__()

    def lend(self) -> tuple[BlockState | None, bool]:
        """Give a layer the state to go on from, and say whether it may write the next one over it."""
        return self._state, self._ours and not self.record_past and not self.records

    def check(self, expected: dict[str, tuple[int, ...]], batch: int) -> None:
        """Refuse a state of other rows or of another layer; expected: each tensor's row shape, and the mini-batch."""
        if self._state is None:
            self.chunk = expected["chunk"]
            return
        held = {name: tuple(x.shape) for name, x in self._state.tensors().items()}
        rows = held["layer.position"][0]
        if rows != batch:
            raise ValueError(
                f"past_key_values: holds the state of {rows} rows; expected batch = {batch}. Pass the cache that this "
                "model returned for these rows, or move it by `batch_select_indices` and `batch_repeat_interleave`."
            )
        held = {name: shape[1:] for name, shape in held.items() if "anchor." in name or "conv." in name}
        held["chunk"] = self.chunk or expected["chunk"]
        for name in sorted(held.keys() | expected.keys()):
            if held.get(name) != expected.get(name):
                raise ValueError(
                    f"past_key_values: holds {name} of {held.get(name, 'no shape')} a row; expected "
                    f"{expected.get(name, 'none')}. Pass a cache that this model returned, or none."
                )

    def advance(self, state: BlockState, num_columns: int) -> None:
        if self._state is not None and self._ours and captures(state.layer.position):
            for x, new in zip(self._state.tensors().values(), state.tensors().values(), strict=True):
                x if x is new else x.copy_(new)  # a graph that is replayed goes on from where it was
            state = self._state
        self._state, self._ours = state, True
        self.seen, self.is_initialized = self.seen + num_columns, True

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
        self.state, self.seen, self.is_initialized, self.records, self.cut = None, 0, False, [], False
        self.read = None

    @property
    def num_rows(self) -> int | None:
        return None if self._state is None else self._state.layer.position.shape[0]

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self._state = self._state and self._state.select(rows)  # copies: still nobody else's

    def detach(self) -> None:
        self._state, self.cut = self._state and self._state.detach(), False

    def offload(self) -> None:
        """Stay where the state is: it is as small after a million tokens as after one."""

    prefetch = offload


# Subclassing registered the class for dynamic caches; a state of fixed size is as good a layer of a static one.
STATIC_LAYER_TYPE_MAPPING["test_time"] = FastWeightCache


class DocumentCache(Rollback, DynamicLayer):
    """Hold keys, values and, where rows have padding or several documents, where their columns stand."""

    supports_early_init = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None  # pyright: ignore[reportIncompatibleVariableOverride]: per layer here
        self.columns: Columns | None = None
        self.conv: Tensor | None = None  # the tail of the convolution before the layer
        self.seen = 0

    def extend(self, keys: Tensor, values: Tensor, columns: Columns | None) -> tuple[Tensor, Tensor]:
        """Append the new columns; return all keys and values that the new queries may look at.

        columns: where all columns stand, `join(self, ...)`.
        """
        B, H, _, D = (keys if self.keys is None else self.keys).shape
        if (B, H, D) != (*keys.shape[:2], keys.shape[3]):
            raise ValueError(
                f"past_key_values: holds keys of batch {B}, heads {H}, head_dim {D}; expected batch {keys.shape[0]}, "
                f"heads {keys.shape[1]}, head_dim {keys.shape[3]}. Pass the cache that this model returned for these "
                "rows."
            )
        self.columns = columns
        self.seen += keys.shape[-2]
        keys, values = super().update(keys, values)
        if self.window is not None:
            self._forget(max(self.window - 1, 1))
        return keys, values

    def _forget(self, kept: int) -> None:
        """Keep the last tokens of each row only; padding goes first, so that it takes no token's place."""
        assert self.keys is not None and self.values is not None
        if self.columns is not None and self.keys.shape[2] > kept:
            order = (self.columns.documents >= 0).to(torch.int8).argsort(dim=1, stable=True)
            across = order[:, None, :, None].expand_as(self.keys)
            self.keys, self.values = self.keys.gather(2, across), self.values.gather(2, across)
            documents, ranks = (x.gather(1, order)[:, -kept:] for x in self.columns[:2])
            self.columns = self.columns._replace(documents=documents, ranks=ranks)
        self.keys, self.values = self.keys[:, :, -kept:], self.values[:, :, -kept:]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = 0 if self.keys is None else self.keys.shape[-2]
        return past + query_length, self.seen - past

    def reset(self) -> None:
        self.keys, self.values, self.is_initialized = None, None, False
        self.columns, self.conv, self.seen, self.records, self.cut = None, None, 0, [], False
        self.read = None

    @property
    def num_rows(self) -> int | None:
        return None if self.keys is None else self.keys.shape[0]

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        if self.keys is not None and self.values is not None:
            self._over(lambda x: x.index_select(0, rows.to(x.device)))

    def detach(self) -> None:
        self.cut = False
        if self.keys is not None:
            self._over(Tensor.detach)

    def _over(self, function: Callable[[Tensor], Tensor]) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = function(self.keys), function(self.values)
        self.columns = self.columns and self.columns.map(function)
        self.conv = None if self.conv is None else function(self.conv)


def join(past: DocumentCache | None, mask: Tensor | None, reset: Tensor | None, like: Tensor) -> Columns | None:
    """Say where past and new columns stand, (B, S + T); None: one document, no padding. like (B, T, ...)."""
    old = None if past is None else past.columns
    if old is None and mask is None and reset is None:
        return None
    B, T, device = *like.shape[:2], like.device
    if old is None:
        S, seen = (0, 0) if past is None or past.keys is None else (past.keys.shape[-2], past.seen)
        zero = torch.zeros(B, dtype=torch.long, device=device)
        ranks = torch.arange(seen - S, seen, device=device).expand(B, S)
        old = Columns(torch.zeros_like(ranks), ranks, zero, zero + seen)
    valid = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask
    number = old.document[:, None] + (0 if reset is None else reset.long().cumsum(1))
    documents = torch.where(valid, number, -1 - number)
    ranks = old.tokens[:, None] + valid.long().cumsum(1) - 1
    after = (old.document + (0 if reset is None else reset.long().sum(1)), old.tokens + valid.sum(1))
    return Columns(torch.cat([old.documents, documents], 1), torch.cat([old.ranks, ranks], 1), *after)


def detach(cache: Cache) -> Cache:
    """Cut all that a cache holds from the graph that made it, and return the cache."""
    for layer in cache.layers:
        if isinstance(layer, Rollback):
            layer.detach()
    return cache


# The caches that carry our layers are transformers' own, and it makes them.
Cache.detach = detach  # pyright: ignore[reportAttributeAccessIssue]


def adopt(cache: Cache, config: DualformConfig) -> None:
    """Put our layers in place of empty ones; refuse a cache that another model has filled."""
    kinds, window = config.layer_types or [], config.sliding_window
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values: is a {type(cache).__name__}; expected a Cache. Pass what this model returned as "
            "past_key_values, or DynamicCache(config=model.config)."
        )
    recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    for i, kind in enumerate(kinds):
        wanted = FastWeightCache if kind == "test_time" else DocumentCache
        width = window if kind == "sliding_attention" else None
        held = cache.layers[i] if i < len(cache.layers) else None
        filled = held is not None and bool(getattr(held, "get_seq_length", lambda: True)())
        if isinstance(held, wanted) and (kind == "test_time" or getattr(held, "window", None) == width or not filled):
            if isinstance(held, DocumentCache):
                held.window, held.is_sliding = width, width is not None
            continue
        if filled:
            found = f"{type(held).__name__}" + (f" of window {held.window}" if isinstance(held, DocumentCache) else "")
            expected = wanted.__name__ + (f" of window {width}" if wanted is DocumentCache else "")
            raise ValueError(
                f"past_key_values: layer {i} is a filled {found}; expected {expected} for a layer of kind {kind!r}. "
                "Pass a cache that this model returned, or none."
            )
        made = FastWeightCache() if kind == "test_time" else DocumentCache(width)
        made.record_past = recording
        cache.layers[i : i + 1] = [made]
    lengths = [getattr(layer, "get_seq_length", lambda: -1)() for layer in cache.layers]
    if len(set(lengths)) > 1 or len(lengths) > len(kinds):
        raise ValueError(
            f"past_key_values: holds {len(lengths)} layers that have seen {lengths} columns; expected {len(kinds)} "
            "layers, all with the same number. Pass a cache that this model returned, or none."
        )

"""A model's carried state as a safetensors file: what every layer remembers, and the tokens that were read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dualform.learning.state import under
from dualform.models.cache import BlockState, Columns, DocumentCache, FastWeightCache, adopt
from dualform.models.configuration import DualformConfig

# What must agree for a state to mean the same to two models.
_identity = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads learner objective rule chunk use_gate share_qk "
    "pre_conv conv_kernel rope_theta layer_types sliding_window"
).split()


class StateFileError(ValueError):
    """A file that holds no state, or another model's."""


def save_state(path: Path, config: DualformConfig, cache: Cache, ids: Tensor) -> None:
    """Write a cache and the ids (B, n) that were read or are still to be read.

    Shape:  ids (B, n); the cache has seen the first `cache.get_seq_length()` of them.
    Dtype:  as they are.
    """
    tensors = {"ids": ids}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, FastWeightCache):
            assert layer.state is not None
            tensors |= layer.state.tensors(f"{i}.")
        elif isinstance(layer, DocumentCache):
            assert layer.keys is not None and layer.values is not None
            tensors |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
            tensors |= {} if layer.conv is None else {f"{i}.conv": layer.conv}
            if layer.columns is not None:
                # Layers share these; a file wants its own of each.
                tensors |= {f"{i}.columns.{name}": x.clone() for name, x in layer.columns._asdict().items()}
    about = {"identity": json.dumps(_identify(config)), "seen": str(cache.get_seq_length())}
    save_file({name: x.detach().contiguous().cpu() for name, x in tensors.items()}, str(path), metadata=about)


def load_state(path: Path, config: DualformConfig, device: torch.device | str = "cpu") -> tuple[Cache, Tensor]:
    """Read what `save_state` wrote: the cache and the ids.

    Shape:  ids (B, n).
    Dtype:  as saved.
    Raises: StateFileError if the file is no state, or the state of a model that differs (the field is named).
    """
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise StateFileError(
            f"load_state: {path} cannot be read ({error}); expected a file that save_state wrote."
        ) from None
    if "identity" not in about or "ids" not in tensors:
        raise StateFileError(f"load_state: {path} holds no model's state; expected a file that save_state wrote.")
    theirs, ours = json.loads(about["identity"]), _identify(config)
    for name in _identity:
        if theirs.get(name) != ours[name]:
            raise StateFileError(
                f"load_state: {path} is the state of another model, {name} = {theirs.get(name)}; expected "
                f"{ours[name]}. Use the model that wrote it."
            )
    cache, seen = DynamicCache(config=config), int(about["seen"])
    adopt(cache, config)
    for i, layer in enumerate(cache.layers):
        own = under(tensors, f"{i}.")
        if isinstance(layer, FastWeightCache):
            layer.advance(BlockState.of(own), seen)
        elif isinstance(layer, DocumentCache):
            columns = under(own, "columns.")
            layer.extend(own["keys"], own["values"], Columns(**columns) if columns else None)
            layer.seen, layer.conv = seen, own.get("conv")
    return cache, tensors["ids"]


def _identify(config: DualformConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in _identity}

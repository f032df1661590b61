"""What a caller hands to a model by name, and ids: what nobody would read is refused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from dualform.catalogue import near_misses
from dualform.learning.transforms import is_known

# What transformers hands to every model, needed or not.
spoken = TransformersKwargs.__optional_keys__ | TransformersKwargs.__required_keys__ | {"return_dict"}


def refuse_unknown(where: str, forward: Any, given: dict[str, Any], more: Sequence[str] = ()) -> None:
    """Refuse a keyword argument that nobody reads: what it asks for would silently not happen."""
    if given.keys() <= spoken:
        return
    own = [name for name in inspect.signature(forward).parameters if name not in ("self", "args", "kwargs")]
    known = [*own, *more, *sorted(spoken)]
    for name, value in given.items():
        if value is not None and name not in known:
            raise ValueError(f"{where}: unknown argument {name!r}. {near_misses(name, known)}")


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the embedding has no row for (unless hidden: under torch.compile and vmap)."""
    if ids.ndim != 2 or ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"DualformModel: input_ids has shape {tuple(ids.shape)} and type {ids.dtype}; expected (batch, tokens) of "
            "whole numbers. Pass what the tokenizer returns with return_tensors='pt'."
        )
    if not ids.numel() or not is_known(ids):
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"DualformModel: input_ids holds {low if low < 0 else high}; expected ids in 0 ... vocab_size - 1 = "
            f"{vocab_size - 1}. Use the tokenizer that the model was trained with."
        )

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
    """Refuse token ids that the embedding has no row for."""
    if ids.ndim != 2 or ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"DualformModel: input_ids has shape {tuple(ids.shape)} and type {ids.dtype}; expected (batch, tokens) of "
            "whole numbers. Pass what the tokenizer returns with return_tensors='pt'."
        )
    last, advice = f"vocab_size - 1 = {vocab_size - 1}", "Use the tokenizer that the model was trained with."
    _expect_below("DualformModel: input_ids", ids, vocab_size, f"ids in 0 ... {last}. {advice}")


def check_labels(labels: Tensor, logits: Tensor, ignored: int) -> None:
    """Refuse labels (...) of another shape than that of logits (..., C), and those of no class."""
    shape, C = tuple(logits.shape[:-1]), logits.shape[-1]
    if labels.shape != shape:
        raise ValueError(
            f"loss: labels has shape {tuple(labels.shape)}; expected the logits' = {shape}. Pass one label for each, "
            f"{ignored} where none counts."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"loss: labels has dtype {labels.dtype}; expected whole numbers. Pass labels.long().")
    text = f"classes in 0 ... {C - 1}, of which the logits have {C}, or ignore_index = {ignored} where none counts."
    _expect_below("loss: labels", labels, C, f"{text} Correct the labels.", ignored)


def _expect_below(name: str, x: Tensor, count: int, expected: str, ignored: int = 0) -> None:
    """Refuse numbers outside 0 ... count - 1; unless they are hidden (under torch.compile and vmap), or on a GPU that
    trains, which would be waited for: CUDA's own kernels assert it."""
    if not x.numel() or not is_known(x) or (x.is_cuda and torch.is_grad_enabled() and torch.version.hip is None):
        return
    low, high = (int(end) for end in torch.where(x == ignored, 0, x).aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} holds {low if low < 0 else high}; expected {expected}")

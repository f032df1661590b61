"""Which columns of a batch are padding, and where its rows begin new documents: every way in which collators say it.

B batch, T new columns, S past and new columns. A start is a column that begins a document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dualform.learning.grid import starts_by_lengths
from dualform.learning.transforms import is_known

packing = ("reset", "seq_idx", "cu_seq_lens_q")


def read_mask(mask: Tensor | None, B: int, T: int, seen: int) -> tuple[Tensor | None, Tensor | None]:
    """Return which of the last T columns are tokens, and the starts that a numbered mask says; None: all, none.

    Shape:  mask (B, T) or (B, seen + T): bool, or 0 for padding and 1, or 1 1 2 2 2 ... for tokens of packed documents.
    Raises: ValueError for another shape, for other values, and for numbers that fall.
    """
    if mask is None:
        return None, None
    if mask.shape not in ((B, T), (B, seen + T)):
        past = f" or (batch, past + tokens) = {(B, seen + T)}" if seen else ""
        raise ValueError(
            f"DualformModel: attention_mask has shape {tuple(mask.shape)}; expected (batch, tokens) = {(B, T)}{past}. "
            "Pass the 2D padding mask, 1 for tokens and 0 for padding."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.long()  # in uint8 no step falls, and 2**31 is 0
    valid, starts = mask.bool(), None
    if mask.dtype != torch.bool and (not is_known(mask) or _is_numbered(mask)):
        before = previous(valid)
        step = mask - mask.gather(1, before.clamp(min=0))
        starts = (valid & (before >= 0) & (step != 0))[:, mask.shape[1] - T :]
        if is_known(mask):
            if bool((valid & (before >= 0) & (step < 0)).any()):
                raise ValueError(
                    "DualformModel: attention_mask numbers documents that fall along a row; expected 0 for padding "
                    "and documents numbered in their order, 1 1 2 2 2 ... Number them so, or pass reset."
                )
            if seen and mask.shape[1] == T:
                raise ValueError(
                    f"DualformModel: attention_mask numbers documents over {T} columns with {seen} read before; "
                    f"expected (batch, past + tokens) = {(B, seen + T)}, which says whether the first goes on. Pass "
                    "that, or reset."
                )
    valid = valid[:, mask.shape[1] - T :]
    return None if is_known(valid) and valid.all() else valid, starts


def _is_numbered(mask: Tensor) -> bool:
    """Does a mask number documents? Refuse one that says neither that nor what is padding."""
    if not mask.numel():
        return False
    low, high = mask.aminmax()
    if bool((low >= 0) & (high < 2**31)) and (not mask.is_floating_point() or bool((mask == mask.round()).all())):
        return bool(high > 1)
    wrong = mask[~((mask >= 0) & (mask == mask.round()) & (mask < 2**31))]
    raise ValueError(
        f"DualformModel: attention_mask holds {wrong[0].item()}; expected 1 for tokens and 0 for padding, truth "
        "values, or whole numbers of packed documents, 1 1 2 2 2 ... Pass the tokenizer's mask, not one that is added "
        "to scores."
    )


def previous(valid: Tensor) -> Tensor:
    """Return the last token's column before each column of valid (B, S); -1 where there is none."""
    column = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, column, -1).cummax(1).values
    # No tensor of T - 1 columns: an export of any length would ask if that is 1.
    return F.pad(last, (1, 0), value=-1)[:, :-1]


def starts_by_positions(positions: Tensor, valid: Tensor | None, B: int, seen: int) -> Tensor | None:
    """Return where positions (B or 1, T) do not go on by one, (B, T) bool; padding between may count.

    Raises: ValueError if they do not after past columns, whose last position nobody knows.
    """
    T = positions.shape[1]
    if T < 2:
        return None
    positions = positions.expand(B, T)
    if valid is None:
        starts = F.pad(positions.diff(dim=1) != 1, (1, 0))
    else:
        before = previous(valid)
        step = positions - positions.gather(1, before.clamp(min=0))
        gap = torch.arange(T, device=positions.device) - before
        starts = valid & (before >= 0) & (step != 1) & (step != gap)
    if seen and (not is_known(starts) or not starts.any()):
        return None
    if seen:
        raise ValueError(
            f"DualformModel: position_ids begin a document among {T} columns that go on from {seen} read before; "
            "expected positions that go on one by one, since the last one read is not known here. Say where documents "
            "start with reset."
        )
    return starts


def starts_by_index(index: Tensor, B: int, T: int, seen: int) -> Tensor:
    """Return where the number of the document (B, T) changes, (B, T) bool."""
    if index.shape != (B, T) or seen:
        past = f" after {seen} columns" if seen else ""
        raise ValueError(
            f"DualformModel: seq_idx has shape {tuple(index.shape)}{past}; expected (batch, tokens) = {(B, T)} and "
            "nothing read before, whose document it does not say. Pass reset (batch, tokens)."
        )
    return F.pad(index.diff(dim=1) != 0, (1, 0))


def joined(*starts: Tensor | None) -> Tensor | None:
    """Return the starts that any of these says; None for none."""
    found = None
    for one in starts:
        if one is not None:
            found = one.bool() if found is None else found | one.bool()
    return None if found is None or (is_known(found) and not found.any()) else found


def said_starts(packed: dict[str, Tensor | None], B: int, T: int, seen: int, device: torch.device) -> Tensor | None:
    """Return the starts that reset, seq_idx and cu_seq_lens_q say, whichever are given."""
    reset, index, ends = (packed.get(name) for name in packing)
    if reset is not None and reset.shape != (B, T):
        raise ValueError(f"DualformModel: reset has shape {tuple(reset.shape)}; expected (batch, tokens) = {(B, T)}.")
    starts = [reset]
    if index is not None:
        starts.append(starts_by_index(torch.as_tensor(index, device=device), B, T, seen))
    if ends is not None:
        starts.append(starts_by_lengths("DualformModel: cu_seq_lens_q", torch.as_tensor(ends, device=device), B, T))
    return joined(*starts)


def as_reset(given: dict[str, Any], B: int, T: int, device: torch.device) -> dict[str, Any]:
    """Say where documents start as `reset`: `generate` hands the same arguments to calls on other columns."""
    valid, starts = read_mask(given.get("attention_mask"), B, T, 0)
    starts = joined(starts, said_starts({name: given.get(name) for name in packing}, B, T, 0, device))
    rest = {name: value for name, value in given.items() if name not in packing}
    if starts is None:
        return rest
    tokens = torch.ones(B, T, dtype=torch.long, device=device) if valid is None else valid.long()
    return {**rest, "reset": starts, "attention_mask": tokens}


def onto_padding(h: Tensor, mask: Tensor) -> Tensor:
    """Give padding (B, T) what the last token before it says: right-padded prompts go on from their own ends."""
    column = torch.arange(h.shape[1], device=h.device).expand(mask.shape)
    last = torch.where(mask.bool(), column, 0).cummax(1).values
    return h.gather(1, last[..., None].expand_as(h))

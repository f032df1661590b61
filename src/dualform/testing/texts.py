"""The laws of language models: any split, padding, batch and document leave a token's logits as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.testing.agreement import agree, edges_of


def _text(model: Any, seed: int, batch: int, time: int, ragged: bool, resets: bool) -> dict[str, Tensor]:
    """Draw a batch of texts; every row has a token."""
    g = torch.Generator().manual_seed(seed)
    text = {"input_ids": torch.randint(0, model.config.vocab_size, (batch, time), generator=g)}
    if ragged:
        text["attention_mask"] = (torch.rand(batch, time, generator=g) > 0.3).long()
        text["attention_mask"][:, time // 2] = 1
    if resets:
        text["reset"] = torch.rand(batch, time, generator=g) > 0.8
    return text


@torch.no_grad()
def _logits(model: Any, text: dict[str, Tensor], cuts: Iterable[int] = ()) -> Tensor:
    """Read a text in parts, the cache carried."""
    T = text["input_ids"].shape[1]
    edges = edges_of(cuts, T)
    cache, found = None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = {name: x[:, start:stop] for name, x in text.items()}
        out = model(**part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def _tokens(text: dict[str, Tensor], x: Tensor) -> Tensor:
    """Keep what stands at tokens, (N, ...); what a model says at padding is not defined."""
    mask = text.get("attention_mask")
    return x.flatten(0, 1) if mask is None else x[mask.bool()]


def check_model_split(
    model: Any, cuts: Iterable[int], *, seed: int = 0, batch: int = 2, time: int = 13, ragged: bool = False,
    resets: bool = False,
) -> None:  # fmt: skip
    """Law: a text cut anywhere, the cache carried, is the text in one call. Cut everywhere: decoding is forward.

    model: a causal language model in eval mode, called as transformers' are, with `reset` (B, T) where documents start.
    """
    text, cuts = _text(model, seed, batch, time, ragged, resets), list(cuts)
    agree(f"logits cut at {cuts}", _tokens(text, _logits(model, text, cuts)), _tokens(text, _logits(model, text)))


def check_model_padding(
    model: Any, cuts: Iterable[int] = (), *, seed: int = 0, batch: int = 2, time: int = 13, resets: bool = False
) -> None:
    """Law: padding anywhere in a row, and cutting at it, changes nothing for the tokens that are there."""
    text = _text(model, seed, batch, time, False, resets)
    g = torch.Generator().manual_seed(seed)
    longer = time + 5
    places = torch.stack([torch.randperm(longer, generator=g)[:time].sort().values for _ in range(batch)])
    padded = _text(model, seed + 1, batch, longer, False, False)
    padded["input_ids"] = padded["input_ids"].scatter(1, places, text["input_ids"])
    padded["attention_mask"] = torch.zeros(batch, longer, dtype=torch.long).scatter(1, places, 1)
    if resets:
        padded["reset"] = torch.zeros(batch, longer, dtype=torch.bool).scatter(1, places, text["reset"])
    got = _logits(model, padded, cuts)[torch.arange(batch)[:, None], places]
    agree("logits among padding", got, _logits(model, text))


def check_model_batch(
    model: Any, *, seed: int = 0, batch: int = 3, time: int = 13, ragged: bool = False, resets: bool = False
) -> None:
    """Law: a row of a batch is that row alone."""
    text = _text(model, seed, batch, time, ragged, resets)
    together = _logits(model, text)
    for row in range(batch):
        alone = {name: x[row : row + 1] for name, x in text.items()}
        agree(f"logits of row {row}", _tokens(alone, together[row : row + 1]), _tokens(alone, _logits(model, alone)))


def check_model_reset(
    model: Any, at: int, *, seed: int = 0, batch: int = 2, time: int = 13, ragged: bool = False
) -> None:
    """Law: a document that starts inside a row is that document alone."""
    text = _text(model, seed, batch, time, ragged, False)
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[:, at] = True
    alone = {name: x[:, at:] for name, x in text.items()}
    packed = _logits(model, text | {"reset": reset})[:, at:]
    agree(f"logits of the document from {at}", _tokens(alone, packed), _tokens(alone, _logits(model, alone)))


def check_model_causal(
    model: Any, at: int, *, seed: int = 0, batch: int = 2, time: int = 13, ragged: bool = False
) -> None:
    """Law: what a model says before a token ignores it."""
    text = _text(model, seed, batch, time, ragged, False)
    other = text["input_ids"].clone()
    other[:, at:] = (other[:, at:] + 1) % model.config.vocab_size
    before = {name: x[:, :at] for name, x in text.items()}
    got, expected = (_logits(model, text | {"input_ids": ids})[:, :at] for ids in (other, text["input_ids"]))
    agree(f"logits before {at}", _tokens(before, got), _tokens(before, expected))


def check_model_generation(model: Any, lengths: Sequence[int], *, seed: int = 0, num_tokens: int = 6) -> None:
    """Law: greedy generation, prompts of these lengths in one batch, is forward on each text again and again."""
    text = _text(model, seed, len(lengths), max(lengths), False, False)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    found = model.generate(
        text["input_ids"], attention_mask=mask.long(), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    for row, n in enumerate(lengths):
        ids = text["input_ids"][row : row + 1, max(lengths) - n :]
        for _ in range(num_tokens):
            ids = torch.cat([ids, _logits(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
        agree(f"generate, row {row}", found[row, max(lengths) - n :], ids[0])


@torch.no_grad()
def check_model_rollback(
    model: Any, cuts: Iterable[int], taken: Sequence[int], *, seed: int = 0, batch: int = 2, time: int = 13,
    ragged: bool = False, resets: bool = False,
) -> None:  # fmt: skip
    """Law: columns read and taken back (`cache.crop`) were never read. taken: how many after each part."""
    text, cuts = _text(model, seed, batch, time, ragged, resets), list(cuts)
    edges = edges_of(cuts, time)
    cache, found = None, []
    for n, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        back = min(taken[n % len(taken)], time - stop) if cache is not None else 0
        part = {name: x[:, start : stop + back] for name, x in text.items()}
        out = model(**part, past_key_values=cache, use_cache=True)
        if cache is None:
            cache = out.past_key_values
            cache.activate_past_recording()
        else:
            cache.crop(-back)
        found.append(out.logits[:, : stop - start])
    got, expected = _tokens(text, torch.cat(found, 1)), _tokens(text, _logits(model, text))
    agree(f"logits with {list(taken)} taken back", got, expected)

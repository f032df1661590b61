"""What differs between versions of transformers: how a cache is called; and a check on versions no test has seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from dualform.graphs.this_thread import compiles

# Versions on which the whole suite of language models has run: elsewhere `check` compares before anything is answered.
seen_versions = ("5.17.0", "5.23.0", "5.24.0")
# How this version's `generate` and outputs call a cache, and how other versions do (5.24 renamed it).
CACHE, OTHER = "past_key_values", "cache"
if OTHER in {field.name for field in fields(BaseModelOutputWithPast)}:
    CACHE, OTHER = OTHER, CACHE


class BaseOutput(BaseModelOutputWithPast):
    """What the body returns; the cache by either name."""


class CausalOutput(CausalLMOutputWithPast):
    """What a language model returns; the cache by either name."""


class SequenceOutput(SequenceClassifierOutputWithPast):
    """What a classifier of sequences returns; the cache by either name."""


for _kind in (BaseOutput, CausalOutput, SequenceOutput):
    setattr(_kind, OTHER, property(lambda output: getattr(output, CACHE)))


def one_cache(function: str, past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given by either of its names."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            f"{function}: both past_key_values and cache are given; expected one, they are two names of one thing. "
            "Pass one of them."
        )
    return past_key_values if cache is None else cache


def renamed(function: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache, if there is one, under the name that this version uses."""
    rest = {name: value for name, value in given.items() if name not in (CACHE, OTHER)}
    cache = one_cache(function, given.get("past_key_values"), given.get("cache"))
    return rest if cache is None else {**rest, CACHE: cache}


class Unchecked:
    """Compare cached with uncached logits once per process, on a version of transformers that no test run has seen."""

    def __init__(self, version: str) -> None:
        self.version, self.lock, self.verdict = version, threading.RLock(), ""
        self.running, self.done = False, version in seen_versions
        self.build: Callable[[], Any] | None = None  # of a tiny model; who has models says it

    def check(self) -> None:
        """Raise if decoding on a carried state is not what reading again says."""
        if (self.done and not self.verdict) or compiles():
            return
        with self.lock:  # others wait; what the check itself calls comes here again
            if self.running:
                return
            if not self.done and self.build is not None:
                self.running = True
                try:
                    wrong = difference(self.build)
                    said = f"cached and uncached logits differ by {wrong:.2g} of their size"
                    self.verdict = "" if wrong < 1e-5 else said
                except Exception as error:
                    self.verdict = f"decoding raises {type(error).__name__}: {error}"
                self.running, self.done = False, True
        if self.verdict:
            raise RuntimeError(
                f"dualform: transformers is {self.version}, which no test run has seen, and {self.verdict}; expected "
                f"equal ones. Install one of the versions {', '.join(seen_versions)}, or pass use_cache=False and "
                "report this."
            )


def difference(build: Callable[[], Any]) -> float:
    """Return how far logits on a carried state are, relative, from one reading: two rows, 16 columns, left padding.

    Both by `generate`, which hands the cache about by its own name for it,
    a second call of which reads several tokens, and by calls.
    """
    quiet = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"), quiet:
        torch.manual_seed(0)
        model = build().double().eval()
        ids = torch.randint(3, model.config.vocab_size, (2, 16))
        valid = torch.ones_like(ids)
        valid[0, :3] = 0
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
        first = model.generate(ids[:, :7], attention_mask=valid[:, :7], max_new_tokens=3, pad_token_id=0, **options)
        whole = torch.cat([first.sequences, ids[:, 10:14]], 1)
        more = {"attention_mask": valid[:, :14], CACHE: getattr(first, CACHE)}
        second = model.generate(whole, max_new_tokens=2, pad_token_id=0, **more, **options)
        found = torch.stack([*first.logits, *second.logits], 1)
        want = model(second.sequences, attention_mask=valid, use_cache=False).logits
        want_generated = torch.cat([want[:, 6:9], want[:, 13:15]], 1)
        parts, cache, read = [], None, 0
        for n in (5, 1, 10):
            part = {"attention_mask": valid[:, : read + n], CACHE: cache, "use_cache": True}
            out = model(second.sequences[:, read : read + n], **part)
            parts, cache, read = [*parts, out.logits], getattr(out, CACHE), read + n
        pairs = [(found, want_generated), (torch.cat(parts, 1)[:, 3:], want[:, 3:])]
    return max(relative(x, y) for x, y in pairs)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max()) if x.shape == y.shape else float("inf")


transformers_version = Unchecked(transformers.__version__)

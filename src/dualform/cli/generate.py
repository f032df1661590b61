"""`dualform generate`: continue a text, say how its layers learnt from the prompt, and keep what was learnt."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed
from transformers.cache_utils import Cache

from dualform.cli.output import TrustCode, UsageError, load_model, show
from dualform.models import DualformForCausalLM
from dualform.models.state_file import load_state, save_state


def generate(
    model: str, /, *, prompt: str, max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0,
    state: Path | None = None, trust_code: TrustCode = False,
) -> None:  # fmt: skip
    """Continue a prompt, printing as it goes; then say on stderr how each layer's inner loss fell over the prompt.

    Args:
        model: A folder that `train` wrote.
        prompt: The text to continue.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time.
        seed: Of the sampling; temperature 0 draws nothing.
        state: A file that carries what the layers have learnt: read if it is there, and written at the end.
        trust_code: Let code run that came with the model, its learner's own file, and say which; without this it is
            refused, unless you ran the same file before on this machine.
    """
    if max_new_tokens < 1 or not (temperature == 0 or 1e-6 <= temperature < math.inf):  # below, logits overflow
        raise UsageError(
            f"generate: max_new_tokens is {max_new_tokens}, temperature {temperature}; expected >= 1, and 0 or finite, "
            ">= 1e-6."
        )
    if not 0 <= seed < 2**32:
        raise UsageError(f"generate: seed is {seed}; expected a whole number, 0 <= seed < 2**32 = {2**32}.")
    if not prompt.isprintable() and prompt.encode("utf-8", "ignore").decode() != prompt:
        raise UsageError("generate: prompt is no UTF-8 text; expected one. Convert it: iconv -t utf-8.")
    if state is not None and (state.is_dir() or not state.parent.is_dir()):
        raise UsageError(f"generate: state is {state}; expected a file in a folder that exists. Name another.")
    lm, tokenizer = load_model(model, trust_code)
    set_seed(seed)
    cache, past = None, torch.full((1, 1), lm.config.bos_token_id or 0, dtype=torch.long)
    if state is not None and state.exists():
        cache, past = load_state(state, lm.config)
    new = tokenizer(prompt, return_tensors="pt")["input_ids"].long().reshape(1, -1)
    ids = torch.cat([past, new], 1)
    learnt = how_it_learnt(lm, ids[:, 0 if cache is None else cache.get_seq_length() :], cache)
    print(prompt, end="", flush=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    result: Any = cast("Any", lm).generate(  # its protocol asks for attributes that only some models have
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_new_tokens,
        pad_token_id=lm.config.pad_token_id or 0, return_dict_in_generate=True,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    if learnt:
        print(file=sys.stderr)
        show(learnt, "inner loss over the prompt", file=sys.stderr)
    if state is not None:
        save_state(state, lm.config, result.past_key_values, result.sequences)


def how_it_learnt(lm: DualformForCausalLM, ids: Tensor, cache: Cache | None) -> list[dict[str, Any]]:
    """Tell, per test-time layer, the mean inner loss before and after each token's update; the cache stays as it is."""
    assert lm.config.layer_types is not None
    layers = [n for n, kind in enumerate(lm.config.layer_types) if kind == "test_time"]
    if not layers:
        return []
    # (2, layers, tokens): the rows of the batch are one text, its heads are averaged
    losses = torch.stack(lm.inner_losses(ids, past_key_values=copy.deepcopy(cache))).mean((2, 3))
    few = max(1, ids.shape[1] // 4)
    parts = {"first quarter": slice(few), "last quarter": slice(-few, None), "all": slice(None)}
    return [
        {"layer": layer} | {name: "{:.4f} → {:.4f}".format(*losses[:, n, part].mean(1)) for name, part in parts.items()}
        for n, layer in enumerate(layers)
    ]

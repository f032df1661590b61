"""A token of decoding as a CUDA graph: `generate` replays what the model's call launches, and the host does no more.

Only where nothing that is carried grows: all layers learn at test time, and no call is recorded to be taken back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dualform.graphs.this_thread import is_looked_at
from dualform.models.body import observing
from dualform.models.cache import FastWeightCache
from dualform.models.versions import CACHE, CausalOutput

logger = logging.getLogger(__name__)
_captures = threading.Lock()  # torch captures one at a time
ORDINARY = 3  # calls before one is captured: in them all is compiled, and calls are written down


def is_capturable(model: Any) -> bool:
    """May one call of a model be replayed for the next? Hooks of its modules would not be called."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    kinds = set(model.config.layer_types)
    return model.device.type == "cuda" and kinds == {"test_time"} and not hooked and not is_looked_at()


class CapturedStep:
    """A model's call for the tokens that one `generate` reads one at a time; any other call is the model's own."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, **inputs: Any) -> Any:
        ids: Any = inputs.get("input_ids")
        cache: Any = inputs.get(CACHE)
        if not self._fits(ids, cache, inputs):
            return self.model(**inputs)
        if self.replay is None:
            self.calls += 1
            if self.calls != ORDINARY + 1 or not self._capture(ids, cache):
                return self.model(**inputs)
        elif ids.shape != self.ids.shape or any(x is not y for x, y in zip(_tensors(cache), self.held, strict=True)):
            return self.model(**inputs)
        return self._replayed(ids, cache)

    def _fits(self, ids: Any, cache: Any, inputs: dict[str, Any]) -> bool:
        asks = inputs.get("output_hidden_states") or inputs.get("output_attentions") or inputs.get("labels") is not None
        if not isinstance(ids, Tensor) or ids.shape[1] != 1 or torch.is_grad_enabled() or asks:
            return False
        if inputs.get("reset") is not None or observing.get() is not None or not isinstance(cache, Cache):
            return False
        return all(isinstance(x, FastWeightCache) and x.lend()[1] for x in cache.layers)

    def _capture(self, ids: Tensor, cache: Cache) -> bool:
        """Write down a call, of which nothing runs yet; False where the host has a say in it."""
        layers: list[Any] = list(cache.layers)
        before = [dict(vars(layer)) for layer in layers]
        self.ids, self.held = ids.clone(), _tensors(cache)
        try:
            self.replay, self.logits = self.recorded(lambda: self._called(cache))
        except RuntimeError as error:  # it copies to the host, or waits for the card
            logger.warning("generate: each token is a call, no CUDA graph: %s", str(error).partition("\n")[0])
        for layer, was in zip(layers, before, strict=True):
            vars(layer).update(was)
        return self.replay is not None

    def _called(self, cache: Cache) -> Tensor:
        return self.model(input_ids=self.ids, use_cache=True, return_dict=True, **{CACHE: cache}).logits

    @staticmethod
    def recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Write down what a function launches; return how to launch it again, and where its result will be."""
        graph = torch.cuda.CUDAGraph()
        with _captures, torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            found = run()
        return graph.replay, found

    def _replayed(self, ids: Tensor, cache: Cache) -> CausalOutput:
        self.ids.copy_(ids)
        assert self.replay is not None
        self.replay()
        layers: list[Any] = list(cache.layers)
        for layer in layers:
            layer.advance(layer.lend()[0], 1)
        layers[0].note(ids, is_first=False)
        found: dict[str, Any] = {"logits": self.logits, CACHE: cache}
        return CausalOutput(**found)


def _tensors(cache: Cache) -> list[Tensor]:
    layers: list[Any] = list(cache.layers)
    return [x for layer in layers for x in layer.lend()[0].tensors().values()]

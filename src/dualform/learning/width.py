"""The width of the rows that a learner takes: what it says, or what its tensors show; or where it fails as at any."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dualform.graphs.counts import Asked, asking, told
from dualform.graphs.hollow import tensors_in
from dualform.graphs.survivors import let_go
from dualform.graphs.twin import Twin

# Runs of a learner at widths that its tensors may show, and at small ones; beyond these, the first call shows it.
_TRIALS = 32
_ROWS = 3


def infer_width(learner: nn.Module) -> int | None:
    """Find the width that a learner runs at; else one where it fails as at its own; None: the first call shows it."""
    said = [n for name in ("dim", "in_features", "K") if isinstance(n := getattr(learner, name, None), int)]
    shapes = [p.shape for p in itertools.chain(learner.parameters(), learner.buffers())]
    sizes = list(dict.fromkeys(n for shape in shapes for n in shape))
    own = [n for m in learner.modules() for n in vars(m).values() if type(n) is int and n > 0]
    products = [a * b for a, b in itertools.combinations_with_replacement(sizes, 2)]
    shown = list(dict.fromkeys([*said, *sizes, *own, *products]))[:_TRIALS]
    candidates = dict.fromkeys([*shown, *range(1, _TRIALS + 1)])
    found = next((K for K in candidates if _runs(learner, K)), said[0] if said else None)
    return _where_it_fails(learner, list(candidates), sizes) if found is None else found


def _where_it_fails(learner: nn.Module, candidates: list[int], sizes: list[int]) -> int | None:
    """Where a learner comes to an end, or further than at all other widths; or any width, if that is no matter."""
    tried = {K: _Steps.of(learner, K) for K in candidates}
    counts = Counter(steps.count for steps in tried.values())
    ends = [K for K, steps in tried.items() if not steps.error or (len(counts) == 2 and counts[steps.count] == 1)]
    # A size that has no factor in common with others is told apart from them.
    told = [K for K in candidates if K > 1 and all(math.gcd(K, n) == 1 for n in (*sizes, _ROWS) if n)]
    errors = {tried[K].error for K in told}
    is_free = len(told) > 1 and len(errors) == 1 and not any(tried[K].asks for K in told)
    return next(iter(ends), told[0] if is_free else None)


def _run(learner: nn.Module, K: int, made: _Made, rows: int = _ROWS) -> bool:
    """Run a learner on a few rows; return whether it gives as many."""
    p = next(learner.parameters(), torch.empty(()))
    buffers = {name: b.clone() for name, b in learner.named_buffers()}  # a trial writes to none of the learner's
    with torch.no_grad(), torch.random.fork_rng(devices=[]), made:
        found = Twin(learner)(buffers, made.noted(torch.zeros(rows, K, dtype=p.dtype, device=p.device)))
        return not isinstance(found, Tensor) or found.shape[:1] == (rows,)


class _Made(TorchFunctionMode):
    """What a run makes of the zeros that it is given: nobody may find it later."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, weakref.ref[Tensor]] = {}

    def noted(self, x: Tensor) -> Tensor:
        """Note a tensor, and give it."""
        self.seen[id(x)] = weakref.ref(x)
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, given = func(*args, **kwargs or {}), {id(x): x for x in tensors_in(args, kwargs or {})}
        if any((was := self.seen.get(key)) is not None and was() is x for key, x in given.items()):
            for x in tensors_in(result):
                if id(x) not in given:  # w.type_as(x) is the learner's own w
                    self.noted(x)
        return result


def _runs(learner: nn.Module, K: int) -> bool:
    """With one row less, too: reshape(-1, n) takes several rows for one where they have n entries together."""
    made = _Made()
    try:
        found = _run(learner, K, made) and _run(learner, K, made, _ROWS - 1)
    except Exception:
        found = False
    let_go([*made.seen.values()])  # now that no error's frames hold them
    return found


class _Steps(TorchFunctionMode):
    """Count a run's calls of torch, and see what it fails with, and whether it asks for the width before."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.asked, self.count, self.error, self.splits = Asked(K), 0, "", False

    @classmethod
    def of(cls, learner: nn.Module, K: int) -> _Steps:
        """Run a learner on rows of K."""
        self, made = cls(K), _Made()
        try:
            with self, asking(self.asked, str):
                _run(learner, K, made)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        let_go([*made.seen.values()])
        return self

    @property
    def asks(self) -> bool:
        """May the width have decided something? It decides how many pieces there are, and what an index finds."""
        return self.splits or bool(self.asked.forks) or self.error.startswith("IndexError")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.count += 1
        self.splits |= type(result) in (tuple, list)
        return told(func, result)

"""A learner's tensors by role: those that learn while the layer reads, those that do not, and buffers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dualform.learning.spelling import DerivationError
from dualform.shapes import require


class Roles(NamedTuple):
    """A learner's tensors by role; `closed`: those that learner, objective and rule close over."""

    fast: dict[str, Tensor]
    slow: dict[str, Tensor]
    buffers: dict[str, Tensor]
    closed: dict[str, Tensor]

    @property
    def rest(self) -> dict[str, Tensor]:
        """All that is not fast."""
        return {**self.slow, **self.buffers, **self.closed}


def split_parameters(learner: nn.Module, slow: Iterable[str], frozen: Iterable[str]) -> Roles:
    """Sort a learner's tensors: slow are those that patterns (given, and the module's own `slow`) or `frozen` name."""
    own = getattr(learner, "slow", ())
    own = () if isinstance(own, Tensor | nn.Module) else own  # a part of that name
    found = (*patterns("slow", slow), *patterns("the learner's own slow", own))
    named = dict(learner.named_parameters())
    for pattern in found:
        if not fnmatch.filter(named, pattern):
            raise DerivationError(
                f"derive: slow names {pattern!r}, which matches none of the parameters {sorted(named)}; expected an "
                "fnmatch pattern of one. Correct or drop it."
            )
    is_slow = {name: name in frozen or any(fnmatch.fnmatch(name, p) for p in found) for name in named}
    fast: dict[str, Tensor] = {name: p for name, p in named.items() if not is_slow[name]}
    if not fast:
        still = f", requires_grad=False {sorted(n for n in frozen if n in named)}" if frozen else ""
        raise DerivationError(
            f"derive: the learner has no fast parameter (parameters {sorted(named)}, slow {sorted(found)}{still}); "
            "expected at least one. A learner without weights cannot learn: give it an nn.Parameter that requires a "
            "gradient."
        )
    return Roles(fast, {n: p for n, p in named.items() if is_slow[n]}, dict(learner.named_buffers()), {})


def patterns(name: str, given: Any) -> tuple[str, ...]:
    """Read fnmatch patterns: one alone is not read letter by letter."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | Tensor) else (None,)
    advice = f"Write ({given!r},)." if isinstance(given, str) else "Name parameters, as in ('norm.*', '*.bias')."
    is_right = all(isinstance(p, str) for p in found)
    require(is_right, "derive", name, given, "a tuple of fnmatch patterns", advice, DerivationError)
    return cast("tuple[str, ...]", found)

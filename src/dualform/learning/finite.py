"""Where a state stopped being finite: the row, the head and the mini-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualform.learning.state import State

policies = ("propagate", "raise")


class NonFiniteError(ValueError):
    """An inner model's state holds an infinity or NaN."""


def check_finite(state: State, after: Callable[[int], State], length: int, chunk: int) -> None:
    """Raise where a call's last state is not finite; after(n): the state after n tokens of it, asked for a few n."""
    found = _first(state)
    if found is None:
        return
    if _first(after(0)) is not None:
        where = "in the state that was passed"
    else:
        low, high = 0, -(-length // chunk)  # mini-batches after which the state is finite, and is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _first(after(middle * chunk)) is not None else (middle, high)
        where = f"from mini-batch {low} on (tokens {low * chunk} to {min(length, high * chunk) - 1} of the call)"
        found = _first(after(min(length, high * chunk))) or found
    name, row, head = found
    raise NonFiniteError(
        f"program: the state's {name} is not finite in row {row}, head {head}, {where}; expected finite numbers under "
        "nan_policy='raise'. Lower the inner rate, look at that input, or pass nan_policy='propagate'."
    )


def _first(state: State) -> tuple[str, int, int] | None:
    """Name the first leaf that is not finite, its row and head."""
    for name, x in state.tensors().items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            bad: Tensor = ~torch.isfinite(x.flatten(2)).all(2)
            row, head = bad.nonzero()[0].tolist()
            return name, row, head
    return None

"""What torch computes beside kernels, for the rows of all mini-batches at once.

Legend: n mini-batches, P = B H rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.graphs.edit import results_of
from dualform.kernels.triton_kernel import Outside
from dualform.learning.batched import ROWS, at, mapped
from dualform.learning.prepare import in_place
from dualform.learning.transforms import undisturbed


def computed(
    parts: dict[Any, Any], name: object, part: Outside, values: Sequence[Tensor], space: tuple[int, int, int],
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Run a graph on (n, B, H, ...) values. parts: what was made ready before, by name and size."""
    count, B, H = space
    rows = count * B * H
    key = (name, rows, device)
    if key not in parts:
        if name not in parts:
            parts[name] = undisturbed(lambda: mapped(part.graph, [False] * len(values))) if values else part.graph
        parts[key] = undisturbed(lambda: in_place(at(parts[name], rows, device)))
    flat = [
        x.expand(count, B, H, *x.shape[3:]).reshape(rows, *shape).to(kind)
        for x, shape, kind in zip(values, part.shapes, part.kinds, strict=True)
    ]
    own = [x.meta["val"].shape[:1] == (ROWS,) for x in results_of(parts[name].graph)]
    found = zip(parts[key](*flat), own, strict=True)
    return [(x if each else x.expand(rows, *x.shape)).unflatten(0, (count, B, H)) for x, each in found]


__all__ = ["computed"]

"""Agreement: one table of tolerances, one error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

tolerances = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 3e-2}


class LawBroken(AssertionError):
    """A law does not hold; the message says where and by how much."""


def agree(name: str, got: Tensor, expected: Tensor) -> None:
    """Demand that two tensors are equal to the tolerance of their dtype, relative to max(1, their scale)."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise LawBroken(f"{name}: {tuple(got.shape)} {got.dtype}; expected {tuple(expected.shape)} {expected.dtype}.")
    if not got.dtype.is_floating_point:
        if not torch.equal(got, expected):
            raise LawBroken(f"{name}: {got.tolist()}; expected {expected.tolist()}.")
        return
    got, expected = got.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((got - expected).abs().max()) / scale if got.numel() else 0.0
    if not error <= tolerances[got.dtype]:
        raise LawBroken(f"{name}: error {error:.3g} of scale {scale:.3g}; expected <= {tolerances[got.dtype]:.3g}.")


def edges_of(cuts: Iterable[int], time: int) -> list[int]:
    """Where parts of a sequence begin and end: 0, the cuts inside it in order, its length."""
    return sorted({0, time, *(c for c in cuts if 0 < c < time)})

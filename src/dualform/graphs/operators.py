"""Operators of dualform's own, as torch.library.custom_op makes them, whose first call would load torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("dualform", "FRAGMENT")  # registrations live as long as it


def custom_operator(
    name: str, fake: Callable[..., Any], backward: Callable[..., Any] | None = None, keep: Any = None
) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function of tensors that writes to none and gives back none of them.

    fake: the shapes of its results; backward, keep: its gradient, and what that needs,
    as torch.library.register_autograd asks.
    """

    def make(f: Callable[..., Any]) -> Any:
        schema, op = torch.library.infer_schema(f, mutates_args=()), f"dualform::{name}"
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, f, "CompositeExplicitAutograd")
        torch.library.register_fake(op, fake, lib=library)
        torch.library.register_autograd(op, backward or _refused(name), setup_context=keep, lib=library)
        return getattr(torch.ops.dualform, name).default

    return make


def _refused(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"dualform::{name} has no derivative; expected the program to be differentiated. Call it instead."
        )

    return backward

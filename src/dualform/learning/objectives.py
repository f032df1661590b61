"""Inner objectives: the per-token loss that a learner takes a gradient of while it reads.

An objective is any callable (prediction (..., V), target (..., V)) -> (...,). `target` says what the target is made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from dualform.catalogue import Catalogue
from dualform.own_code import CodeError, expect_options, reader
from dualform.shapes import fail, require

Target = Literal["v", "v-k"]


def expect_target(where: str, name: str, target: Any, kind: type[ValueError] = ValueError) -> Target:
    """Refuse what no target is made of."""
    is_right = isinstance(target, str) and target in ("v", "v-k")
    require(is_right, where, name, target, "'v' or 'v-k'", "Choose one of the two.", kind)
    return cast("Target", target)


def expect_two_arguments(loss: Callable[..., Any]) -> None:
    """Refuse an objective that takes no prediction and target, as what makes one does not."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # of what is written in C
        return
    try:
        signature.bind(None, None)
    except TypeError:
        expected, found = "a function of two: f(prediction, target)", f"takes {signature}"
        fail("derive", "objective", found, expected, "Pass what it makes, if it makes one.", ValueError)


@dataclass(frozen=True)
class Objective:
    """Pair a per-token loss with what it compares the prediction to: v, or v - k."""

    loss: Callable[[Tensor, Tensor], Tensor]
    target: Target = "v"

    def __post_init__(self) -> None:
        advice = "Pass f(prediction, target) -> (...,), a loss per token."
        require(callable(self.loss), "Objective", "loss", self.loss, "a function of two tensors", advice, ValueError)
        expect_target("Objective", "target", self.target)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.loss(prediction, target)


def _own_loss(where: str, found: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Make an objective of the user's own function of two, or of what a class or function of options makes."""
    expected = "a function of two, f(prediction, target), or a class or function of options that makes one"
    if isinstance(found, nn.Module):
        kind = type(found).__name__
        raise CodeError(f"{where} is a built {kind}; expected {expected}. Pass {kind}, not {kind}(...).")
    if isinstance(found, Objective) and not options:
        return found
    if not callable(found) or isinstance(found, Objective):
        raise CodeError(f"{where} is a {type(found).__name__} with options {dict(options)}; expected {expected}.")
    needed = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty and p.name not in options]
    if not isinstance(found, type) and len([p for p in needed if p.kind <= p.POSITIONAL_OR_KEYWORD]) == 2:
        expect_options(where, found, 2, options, expected)
        return partial(found, **options) if options else found
    expect_options(where, found, 0, options, expected)
    made = found(**options)
    if not callable(made):
        raise CodeError(f"{where} made a {type(made).__name__}; expected {expected}. Return such a function.")
    expect_two_arguments(made)
    return made


objectives = Catalogue("objectives", reader("objectives", _own_loss))


@objectives.record(
    name="Squared",
    formula="1/2 || f(k) - v ||^2  (or v - k)",
    source="Sun et al. 2024 (TTT); the code has the factor 1/2, the paper does not",
    aliases=("mse",),
)
def Squared(target: Target = "v") -> Objective:
    """Build the squared loss with the factor 1/2, so that its gradient is f(k) - v.

    Shape:  (..., V), (..., V) -> (...,), one number per token.
    Raises: ValueError if target is neither "v" nor "v-k".
    """
    return Objective(half_squared_error, expect_target("Squared", "target", target))


@objectives.record(
    name="DotProduct",
    formula="- <f(k), v>",
    source="linear attention (Katharopoulos et al. 2020 as Sun et al. 2024 read it) and LaCT (Zhang et al. 2025)",
    aliases=("dot",),
)
def DotProduct() -> Objective:
    """Build the negative inner product with the value: the objective of linear attention.

    Shape:  (..., V), (..., V) -> (...,), one number per token.
    """
    return Objective(negative_dot, "v")


def half_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (prediction - target).square().sum(-1)


def negative_dot(prediction: Tensor, target: Tensor) -> Tensor:
    return -(prediction * target).sum(-1)

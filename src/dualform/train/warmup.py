"""Warm up the inner learning rate: early in training the layers learn slower at test time."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from dualform.learning.layer import TestTimeTraining
from dualform.train.settings import SettingsError


class RateWarmup(TrainerCallback):
    """Raise every layer's `rate_scale`, which multiplies its inner learning rates, from `start` to 1.

    rate_scale = start + (1 - start) min(1, n / steps),  n optimiser steps done
    Dtype:  the buffer's.
    Raises: SettingsError if start is not in 0 ... 1 or steps is negative.
    Source: Sun et al. 2024, ttt-lm-jax: TTT-MLP starts at ttt_base_lr_init = 0.01 of 0.1, start = 0.1 here, over
            ttt_base_lr_warmup = 10 % of the steps. Differs: the multiplier has the model's dtype, not bfloat16.
    Example:
        >>> warmup = RateWarmup(start=0.1, steps=480)
        >>> warmup.scale(0), warmup.scale(240), warmup.scale(4800)
        (0.1, 0.55, 1.0)
    """

    def __init__(self, start: float, steps: int) -> None:
        if not 0 <= start <= 1 or steps < 0:
            raise SettingsError(
                f"RateWarmup: start (rate_start) is {start} and steps (rate_warmup_steps) {steps}; expected 0 <= start "
                "<= 1, a share of the rule's rate, and steps >= 0. Change them."
            )
        self.start, self.steps = start, steps

    def scale(self, done: int) -> float:
        """Return the multiplier after so many optimiser steps."""
        return 1.0 if done >= self.steps else self.start + (1 - self.start) * done / self.steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        set_rate_scale(kwargs["model"], self.scale(state.global_step))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Also of a run that was stopped on the way: a model that is saved learns at its full rate.
        set_rate_scale(kwargs["model"], 1.0)


def set_rate_scale(model: nn.Module, scale: float) -> None:
    """Multiply the inner learning rates of every test-time layer by `scale`."""
    for layer in model.modules():
        if isinstance(layer, TestTimeTraining):
            layer.rate_scale.fill_(scale)

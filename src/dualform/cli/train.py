"""`dualform train`: train a byte-level language model and write its folder."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dualform.cli.output import AsJson, TrustCode, show
from dualform.train.metrics import plot_loss_by_position, terminal_plot
from dualform.train.run import MODEL, resumed
from dualform.train.settings import Settings, asked
from dualform.train.training import num_parameters
from dualform.train.training import train as run


def train(
    config: Path | None = None, /, *, preset: str | None = None, data: str | None = None, output: str | None = None,
    max_steps: int | None = None, seq_len: int | None = None, batch_size: int | None = None,
    learning_rate: float | None = None, seed: int | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    assignments: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    trust_code: TrustCode = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a model on text and score it on text held out.

    Args:
        config: A TOML file of these settings; its table [model] overrides fields of the preset.
        preset: A name that `dualform presets` lists. Default tiny-ttt-mlp.
        data: A file, a folder, or "shakespeare" (the default).
        output: The folder to write: model/, metrics.json, loss_by_position.png, checkpoints/. Default runs/PRESET.
        max_steps: Optimiser steps. Default 400.
        seq_len: Tokens per row. Default 128.
        batch_size: Rows per step. Default 16.
        learning_rate: Peak of the cosine schedule. Default 0.005.
        seed: Of weights and order. Default 0.
        resume: Go on with the run in the output folder, by its own settings, from its last whole checkpoint. What is
            given beside this must be what the run was made with.
        assignments: A setting as in the file: model.chunk=8, model.rule.lr=0.5, weight_decay=0. May be repeated. A
            learner, objective or rule of yours is FILE.py:NAME: model.learner=mine.py:Mine.
        trust_code: With --resume: let code run that came with the run, its learner's own file; without this it is
            refused, unless you ran the same file before on this machine.
        as_json: Print the final table as JSON.
    """
    flags = {
        "preset": preset, "data": data, "output": output, "max_steps": max_steps, "seq_len": seq_len,
        "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
    }  # fmt: skip
    document = asked(config, assignments or [], flags)
    settings = resumed(document) if resume else Settings(**document)
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log where the table belongs
        outcome = run(settings, resume=resume, trust_code=trust_code)
    if outcome.evaluation is None:
        said = f"stopped and saved at step {outcome.step} of {settings.max_steps}; go on with --resume."
        print(f"dualform: {said}", file=sys.stderr)
        return
    curve = {settings.preset: outcome.evaluation.loss_by_position}
    picture = plot_loss_by_position(curve, outcome.folder / "loss_by_position.png")
    row = {
        "model": settings.preset, "parameters": num_parameters(outcome.model), "steps": outcome.step,
        "train loss": outcome.train_loss, "held-out loss": outcome.evaluation.loss,
        "bits per byte": outcome.evaluation.bits_per_byte, "train tokens/s": outcome.train_tokens_per_second,
    }  # fmt: skip
    show([row], as_json=as_json)
    if not as_json:
        place = outcome.folder / MODEL
        print(f"\nheld-out loss by position\n{terminal_plot(curve)}\n\nmodel: {place}\nplot:  {picture}")

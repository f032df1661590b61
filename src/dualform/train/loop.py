"""One training run: settings in, a folder out. The loop is transformers' Trainer; here it is watched and written down.

DIR/settings.json, DIR/checkpoints/ (to resume from), DIR/model/ (weights, configuration, tokenizer), DIR/metrics.json.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dualform.catalogue import near_misses
from dualform.models import DualformConfig, DualformForCausalLM
from dualform.train.data import PackedRows, byte_tokenizer, load_corpus
from dualform.train.metrics import Evaluation, evaluate
from dualform.train.settings import Settings, SettingsError
from dualform.train.warmup import RateWarmup


class TrainingDiverged(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `evaluation` is None if it was interrupted."""

    folder: Path
    model: DualformForCausalLM
    step: int
    train_loss: float
    train_tokens_per_second: float
    evaluation: Evaluation | None


class WatchedTrainer(Trainer):
    """Stop at the first loss that is not finite, and say at which step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"train: the loss is {float(loss)} at step {self.state.global_step + 1}; expected a finite number. The last "
                f"checkpoint in {self.args.output_dir} is whole: lower --learning-rate or the rule's lr, and --resume from it."
            )
        return loss


class StopOnInterrupt(TrainerCallback):
    """Turn the first Ctrl-C into a save and a stop after the step that runs; a second one is not held back."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        try:
            before = signal.signal(signal.SIGINT, self._press)
        except ValueError:  # not the main thread: signals are someone else's
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, number: int, frame: Any) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: saving after this step (press again to stop at once)", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pressed:
            control.should_save = control.should_training_stop = True


def configure(settings: Settings) -> DualformConfig:
    """Build the model's configuration: the preset with the overrides, which must name fields that exist."""
    known = [f.name for f in fields(DualformConfig)]
    for name in settings.model.keys() - set(known):
        raise SettingsError(f"train: the model has no field {name!r}. {near_misses(name, known)}")
    return DualformConfig(preset=settings.preset, **settings.model)


def train(
    settings: Settings, *, resume: bool = False, evaluate_rows: int | None = None, quiet: bool = False
) -> Outcome:
    """Train, save and evaluate.

    Shape:  none.
    Dtype:  float32.
    Raises: SettingsError, CorpusError before anything is written; TrainingDiverged when the loss is not finite.
    """
    corpus = load_corpus(settings.data)
    rows = PackedRows(corpus.train, settings.seq_len)
    held_out = PackedRows(corpus.test, settings.seq_len, keep_rest=True)
    config = configure(settings)
    tokenizer = byte_tokenizer()
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"train: vocab_size is {config.vocab_size}; expected >= {len(tokenizer)} = 256 bytes and 3 special tokens. "
            "Use a tiny preset, or set model.vocab_size."
        )
    warmup = RateWarmup(settings.rate_start, settings.rate_warmup_steps)
    folder = settings.folder
    checkpoint = _checkpoint(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    set_seed(settings.seed)
    model = DualformForCausalLM(config)
    if settings.gradient_checkpointing:
        # Its name since transformers 5.20; the older one only warns there.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    interrupt = StopOnInterrupt()
    trainer = WatchedTrainer(
        model=model,
        args=_arguments(settings, quiet),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[interrupt, warmup],
    )
    with interrupt.listening():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    step = trainer.state.global_step
    stopped = interrupt.pressed and step < settings.max_steps
    outcome = Outcome(
        folder=folder,
        model=model,
        step=step,
        train_loss=_last_loss(trainer, result.training_loss),
        train_tokens_per_second=settings.batch_size * settings.seq_len * result.metrics["train_steps_per_second"],
        evaluation=None
        if stopped
        else evaluate(model, held_out, batch_size=settings.batch_size, max_rows=evaluate_rows),
    )
    write_metrics(outcome, trainer.state.log_history)
    return outcome


def _checkpoint(folder: Path, resume: bool) -> str | None:
    checkpoints = folder / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if resume and last is None:
        raise SettingsError(
            f"train: there is no checkpoint in {checkpoints} to resume from. Drop --resume, or name --output."
        )
    if not resume and (last is not None or (folder / "model").exists()):
        raise SettingsError(
            f"train: {folder} already holds a run; expected a folder without one, so that nothing is lost. Pass --resume to go "
            "on with it, or another --output."
        )
    return last


def _arguments(settings: Settings, quiet: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.folder / "checkpoints"),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup_steps, settings.max_steps // 2),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=max(1, min(20, settings.max_steps // 10)),
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        disable_tqdm=quiet or not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _last_loss(trainer: Trainer, mean: float) -> float:
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(logged[-1]) if logged else mean


def write_metrics(outcome: Outcome, history: list[dict[str, Any]]) -> None:
    """Write DIR/metrics.json: the last training loss, the held-out evaluation, and what was logged on the way."""
    document = {
        "step": outcome.step,
        "interrupted": outcome.evaluation is None,
        "train_loss": outcome.train_loss,
        "train_tokens_per_second": outcome.train_tokens_per_second,
        "held_out": None if outcome.evaluation is None else outcome.evaluation.to_json(),
        "parameters": num_parameters(outcome.model),
        "history": history,
    }
    (outcome.folder / "metrics.json").write_text(json.dumps(document, indent=2) + "\n")


def num_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())

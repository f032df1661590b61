"""One training run: settings in, a folder out. The loop is transformers' Trainer; here it is watched and written down.

DIR/settings.json, DIR/checkpoints/ (to resume from), DIR/model/ (weights, configuration, tokenizer), DIR/metrics.json.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dualform.models import DualformConfig, DualformForCausalLM
from dualform.models.configuration import gather_code
from dualform.train.data import Corpus, PackedRows, byte_tokenizer, load_corpus
from dualform.train.metrics import Evaluation, evaluate
from dualform.train.run import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    SETTINGS,
    TrainingRun,
    as_json,
    claim,
    keep_newest,
    newest_whole,
    nothing_to_resume,
    run_of,
    step_of,
    steps,
    write_text,
    written_whole,
)
from dualform.train.settings import Settings, SettingsError, configure, described
from dualform.train.warmup import RateWarmup, set_rate_scale

LOSSES = "losses.json"


class TrainingDiverged(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `evaluation` is None if it was interrupted, tokens per second if no step was left to take."""

    folder: Path
    model: DualformForCausalLM
    step: int
    train_loss: float
    train_tokens_per_second: float | None
    evaluation: Evaluation | None


class WatchedTrainer(Trainer):
    """Stop at the first loss that is not finite, and say at which step; save whole checkpoints or none.

    A line of the log tells the mean loss since the line before it. The losses that it is made of are kept in
    checkpoints, so that a run that goes on from one logs what it would have logged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self._workshop: Path | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"train: the loss is {float(loss)} at step {self.state.global_step + 1}; expected a finite number. "
                "Lower --learning-rate or the rule's lr, in another --output; the checkpoints in "
                f"{self.args.output_dir} are whole."
            )
        self.losses.append(float(loss))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["loss"] = math.fsum(self.losses) / len(self.losses)
            self.losses.clear()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._workshop is None else str(self._workshop)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, folder = self.state.global_step, Path(super()._get_output_dir(trial))
        with written_whole(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}") as made:
            self._workshop = made.parent
            try:
                super()._save_checkpoint(model, trial)
                (made / LOSSES).write_text(as_json(self.losses), encoding="utf-8")
            except (OSError, RuntimeError, SafetensorError) as error:
                raise OSError(
                    f"train: the checkpoint of step {step} cannot be written to {folder} ({error}); expected room for "
                    "it. Make some, then --resume: what was saved before is whole."
                ) from error
            finally:
                self._workshop = None
        keep_newest(folder.parent, step, 2)


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


@dataclass(frozen=True)
class RunParts:
    """What a run needs, made of its settings before anything is written."""

    rows: PackedRows
    held_out: PackedRows
    config: DualformConfig
    tokenizer: PreTrainedTokenizerFast
    warmup: RateWarmup


def train(
    settings: Settings, *, resume: bool = False, evaluate_rows: int | None = None, quiet: bool = False,
    trust_code: bool = False,
) -> Outcome:  # fmt: skip
    """Train, save and evaluate; or go on with a run from its newest whole checkpoint, to the same numbers bit for bit.

    trust_code: let code run that came with the run that goes on.
    Dtype:  float32.
    Raises: SettingsError, CorpusError before anything is written; TrainingDiverged when the loss is not finite.
    """
    corpus = _own_corpus(settings) if resume else load_corpus(settings.data)
    parts = _parts(settings, corpus)
    run = TrainingRun(settings.folder, settings, corpus.digest)
    start: Path | None = None
    if resume:
        start, record = _start(run, parts.config), run.metrics()
        for place in [path for path in (start, run.folder / MODEL) if trust_code and path and path.exists()]:
            for said in gather_code(place, {"local_files_only": True}, trusted=True):
                _say(f"code of the run runs: {said}")
        if record and (start is None or step_of(start) == settings.max_steps):
            _say(f"{run.folder} is finished, {record['step']} of {settings.max_steps} steps; nothing is left to do.")
            return _outcome_of(run, record)
        if start is None:
            raise nothing_to_resume(run.folder)
        _say(f"{run.folder} goes on after step {step_of(start)} of {settings.max_steps}.")
    else:
        claim(run.folder)
    model = _new_model(parts.config, settings)
    if start is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.write()
    if start is not None and step_of(start) >= settings.max_steps:
        model, step, rate, history = _learnt(start)
    else:
        step, rate, history = _learn(run, parts, model, start, quiet)
    with written_whole(run.folder / MODEL) as folder:
        model.save_pretrained(folder)
        parts.tokenizer.save_pretrained(folder)
    is_done = step >= settings.max_steps
    size = settings.batch_size
    scored = evaluate(model, parts.held_out, batch_size=size, max_rows=evaluate_rows) if is_done else None
    outcome = Outcome(run.folder, model, step, _last_loss(history), rate, scored)
    write_metrics(outcome, history)
    return outcome


def _own_corpus(settings: Settings) -> Corpus:
    """Read the text of the run that goes on: its own, or what is said to be the same elsewhere."""
    run = run_of(settings.folder)
    return load_corpus(settings.data) if run is None or run.settings.data != settings.data else run.corpus()


def _say(what: str) -> None:
    print(f"train: {what}", file=sys.stderr)


def _parts(settings: Settings, corpus: Corpus) -> RunParts:
    tokenizer, config = byte_tokenizer(), configure(settings)
    rows = PackedRows(corpus.train, settings.seq_len)
    held_out = PackedRows(corpus.test, settings.seq_len, keep_rest=True)
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"train: vocab_size is {config.vocab_size}; expected >= {len(tokenizer)} = 256 bytes and 3 special tokens. "
            "Use a tiny preset, or set model.vocab_size."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the Trainer would write the tokenizer's over it
        given, own = settings.model.get(name), getattr(tokenizer, name)
        if given not in (None, own):
            raise SettingsError(
                f"train: model.{name} is {given}; expected {own}, that of the tokenizer of bytes. Leave it out."
            )
    return RunParts(rows, held_out, config, tokenizer, RateWarmup(settings.rate_start, settings.rate_warmup_steps))


def _new_model(config: DualformConfig, settings: Settings) -> DualformForCausalLM:
    set_seed(settings.seed)
    model = DualformForCausalLM(config)
    if settings.gradient_checkpointing:
        # Its name since transformers 5.20; the older one only warns there.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _start(run: TrainingRun, config: DualformConfig) -> Path | None:
    """Return the checkpoint to go on from, saying which are passed over; None if a finished run has none."""
    folder = run.folder / CHECKPOINTS
    if steps(run.folder) or (run.folder / SETTINGS).exists():
        TrainingRun.read(run.folder).expect(run)
    start, broken = newest_whole(run.folder)
    if start is None and broken:
        told = "; ".join(f"{name}: {why}" for name, why in broken.items())
        raise SettingsError(
            f"train: no checkpoint in {folder} is whole ({told}); expected one to go on from. Begin again in another "
            "--output."
        )
    if start is not None:
        _expect_model(start, config)
    for name, why in broken.items():
        _say(f"{name} is not whole ({why}) and is passed over.")
    return start


def _expect_model(checkpoint: Path, config: DualformConfig) -> None:
    """Refuse a checkpoint of another model: what it lacks would be drawn anew, without a word."""
    held = described(DualformConfig.from_pretrained(checkpoint))
    for name, value in described(config).items():
        if value != held[name] and not name.endswith("_token_id"):  # these the Trainer takes from the tokenizer
            raise SettingsError(
                f"train: {name} is {value!r} by the run's settings and {held[name]!r} in {checkpoint}; expected the "
                f"same. Put {SETTINGS} back as the run wrote it, or use the version of dualform that made it."
            )


def _learnt(checkpoint: Path) -> tuple[DualformForCausalLM, int, None, list[dict[str, float]]]:
    """Read the model of a run whose last step was taken and that was ended before it could say so."""
    model = DualformForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    set_rate_scale(model, 1.0)  # as it is once training is over
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return model, step_of(checkpoint), None, state.log_history


def _learn(
    run: TrainingRun, parts: RunParts, model: DualformForCausalLM, start: Path | None, quiet: bool
) -> tuple[int, float, list[dict[str, float]]]:
    """Take the steps that are left; return the last one, tokens per second and what was logged."""
    settings, before = run.settings, 0
    interrupt = StopOnInterrupt()
    trainer = WatchedTrainer(
        model=model, args=_arguments(settings, parts.config, quiet), train_dataset=parts.rows,
        processing_class=parts.tokenizer, callbacks=[interrupt, parts.warmup],
    )  # fmt: skip
    if start is not None:
        before = step_of(start)
        trainer.losses = json.loads((start / LOSSES).read_text(encoding="utf-8"))
    with interrupt.listening():
        result = trainer.train(resume_from_checkpoint=None if start is None else str(start))
    step = trainer.state.global_step
    tokens = settings.batch_size * settings.seq_len * (step - before)
    return step, tokens / result.metrics["train_runtime"], trainer.state.log_history


def _outcome_of(run: TrainingRun, record: Mapping[str, Any]) -> Outcome:
    """Read what a finished run came to."""
    model = DualformForCausalLM.from_pretrained(run.folder / MODEL, local_files_only=True)
    held_out = Evaluation(**record["held_out"] | {"loss_by_position": tuple(record["held_out"]["loss_by_position"])})
    return Outcome(run.folder, model, record["step"], record["train_loss"], record["train_tokens_per_second"], held_out)


def _arguments(settings: Settings, config: DualformConfig, quiet: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.folder / CHECKPOINTS),
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
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        use_cache=config.use_cache,  # it goes into the configuration that is saved; training makes no cache
        disable_tqdm=quiet or not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _last_loss(history: list[dict[str, float]]) -> float:
    """Return the last loss that was logged, or the mean if a run ended before its first line."""
    return next(entry[name] for name in ("loss", "train_loss") for entry in reversed(history) if name in entry)


def write_metrics(outcome: Outcome, history: list[dict[str, float]]) -> None:
    """Write DIR/metrics.json: the last training loss, the held-out evaluation, and what was logged on the way."""
    held_out = None if outcome.evaluation is None else vars(outcome.evaluation)
    document = {
        "step": outcome.step, "interrupted": outcome.evaluation is None, "train_loss": outcome.train_loss,
        "train_tokens_per_second": outcome.train_tokens_per_second, "held_out": held_out,
        "parameters": num_parameters(outcome.model), "history": history,
    }  # fmt: skip
    write_text(outcome.folder / METRICS, as_json(document))


def num_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())

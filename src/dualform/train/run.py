"""The folder of a run: what it says it is, what in it is whole, and how a thing gets into it whole or not at all.

RUN/settings.json says what the run is. RUN/model/ and RUN/checkpoints/checkpoint-N/ are made in a folder `.new` beside
them, sealed (files.json, with the size and SHA-256 of each file), flushed and renamed. What the run did not write is
never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dualform.own_code import expect_no_paths
from dualform.train.data import Corpus, CorpusError, load_corpus, source_path
from dualform.train.settings import Settings, SettingsError, differences, laid_over, settled

SETTINGS, METRICS, PICTURE, MODEL, CHECKPOINTS = (
    "settings.json", "metrics.json", "loss_by_position.png", "model", "checkpoints",
)  # fmt: skip
SEAL, WORKSHOP = "files.json", ".new"


@dataclass(frozen=True)
class TrainingRun:
    """A folder, the settings it was made with, and the digest of its text (None: written before there were digests)."""

    folder: Path
    settings: Settings
    text: str | None

    @staticmethod
    def read(folder: Path) -> TrainingRun:
        """Read what a folder is.

        Raises: SettingsError if it is no run, or its settings cannot be read.
        """
        path = folder / SETTINGS
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingsError(
                f"train: {folder} is no run: it holds no {SETTINGS}. Name a folder that `train` wrote."
            ) from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"train: {path} cannot be read ({error}); expected what `train` wrote there.") from None
        known = [f.name for f in fields(Settings)]
        if not isinstance(document, dict) or not {"preset", "data", "max_steps", "seq_len"} <= document.keys():
            raise SettingsError(f"train: {path} holds no settings of a run. Name a folder that `train` wrote.")
        text = document.pop("text", None)
        expect_no_paths(f"train: {path}", {"model": document.get("model", {})})
        if unknown := document.keys() - set(known):
            raise SettingsError(f"train: {path} has the settings {sorted(unknown)}, which this version does not know.")
        return TrainingRun(folder, Settings(**{**document, "output": str(folder)}), text)

    def write(self) -> None:
        """Say what the folder is, its text by a path that is the same from everywhere."""
        path = source_path(self.settings.data)
        place = {} if path is None else {"data": str(path.resolve())}
        write_text(
            self.folder / SETTINGS,
            as_json(self.settings.to_dict() | {"model": settled(self.settings)} | place | {"text": self.text}),
        )

    def expect(self, other: TrainingRun) -> None:
        """Refuse to go on with other settings or another text than the folder's own."""
        where = self.folder / SETTINGS
        found = [
            f"{name} is {theirs!r} here and {ours!r} in {where}"
            for name, (ours, theirs) in differences(self.settings, other.settings).items()
        ]
        if self.text not in (None, other.text):
            place = str(source_path(other.settings.data) or "shakespeare")
            found.append(
                f"data is {place!r} here, SHA-256 {_short(other.text)}, and {self.settings.data!r}, SHA-256 "
                f"{_short(self.text)}, in {where}"
            )
        if found:
            raise SettingsError(
                f"train: {'; '.join(found)}; expected the same. Leave it out to go on as the run began, or name "
                "another --output for another run."
            )

    def corpus(self) -> Corpus:
        """Read the text that the folder says it was made with.

        Raises: CorpusError if it is not there any more; SettingsError if it is another one now.
        """
        try:
            found = load_corpus(self.settings.data)
        except CorpusError as error:
            raise CorpusError(
                f"{error} {self.folder} was made with it: pass --data with the place where it is now."
            ) from None
        if self.text not in (None, found.digest):
            raise SettingsError(
                f"train: the text {self.settings.data} has changed since {self.folder} was made with it: its SHA-256 "
                f"is {_short(found.digest)}; expected {_short(self.text)}. Put it back; or pass --data PATH: "
                "`evaluate` scores any text, `train --resume` goes on with the same one elsewhere."
            )
        return found

    def metrics(self) -> dict[str, Any] | None:
        """Return metrics.json, if the run is finished and its model is whole."""
        try:
            found = json.loads((self.folder / METRICS).read_text(encoding="utf-8"))
            whole = not found["interrupted"] and found["held_out"] is not None
            done = found["step"] >= self.settings.max_steps and whole
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if done and damage(self.folder / MODEL) is None else None


def resumed(document: Mapping[str, Any]) -> Settings:
    """Return the settings of the run in a document's output folder, what else it asks for laid over them.

    Raises: SettingsError if there is no run.
    """
    folder = Settings(**{name: document[name] for name in ("preset", "output") if name in document}).folder
    if not steps(folder) and not (folder / SETTINGS).exists():
        raise nothing_to_resume(folder)
    asked = {name: value for name, value in document.items() if name != "output"}
    return laid_over(TrainingRun.read(folder).settings, asked)


def nothing_to_resume(folder: Path) -> SettingsError:
    place = folder / CHECKPOINTS
    return SettingsError(f"train: there is no checkpoint in {place} to resume from. Drop --resume, or name --output.")


def _short(digest: str | None) -> str:
    return f"{digest or ''}"[:12]


def run_of(path: Path) -> TrainingRun | None:
    """Return the run that a folder is, or whose model or checkpoint it is; None if it is none."""
    for folder in [path, path.absolute().parent, path.absolute().parent.parent]:
        inside = path.absolute().relative_to(folder.absolute()).parts
        if (folder / SETTINGS).is_file() and inside[:1] in ((), (MODEL,), (CHECKPOINTS,)):
            return TrainingRun.read(folder)
    return None


def claim(folder: Path) -> None:
    """Refuse to begin a run where something is that would be lost, or that is someone else's."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SettingsError(
            f"train: output {folder} is a file; expected a folder, new or empty. Name another --output."
        )
    held = sorted(path.name for path in folder.iterdir())
    if held and SETTINGS not in held:
        raise SettingsError(
            f"train: output {folder} is no run and not empty: it holds "
            f"{held[0]!r}{f' and {len(held) - 1} more' * (len(held) > 1)}; expected a new or empty folder, so that "
            "nothing is lost. Name another --output."
        )
    if not held:
        return
    TrainingRun.read(folder)  # someone else may call a file settings.json too
    if steps(folder) or (folder / MODEL).exists():
        raise SettingsError(
            f"train: {folder} already holds a run; expected a folder without one, so that nothing is lost. Pass "
            "--resume to go on with it, or another --output."
        )


def steps(folder: Path) -> dict[int, Path]:
    """List a run's checkpoints by step, whole or not."""
    found = {}
    for path in (folder / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and path.is_dir():
            found[step_of(path)] = path
    return dict(sorted(found.items()))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the last checkpoint that is whole, and why each later one is not."""
    why: dict[str, str] = {}
    for step, path in reversed(steps(folder).items()):
        reason = damage(path) or _other_step(path, step)
        if reason is None:
            return path, why
        why[path.name] = reason
    return None, why


def _other_step(path: Path, step: int) -> str | None:
    try:
        held = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return "it is no checkpoint"
    return None if held == step else f"it is of step {held}"


def damage(folder: Path) -> str | None:
    """Say in what a sealed folder is not what was written; None: it is whole."""
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, (size, digest) in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
            if _digest(path) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {SEAL}, which is written last"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read ({error})"
    return None if listed else f"{SEAL} is empty"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _strangers(folder: Path) -> list[Path]:
    """List the files in a sealed folder that it does not list: someone else's."""
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8")).keys() | {SEAL}
    except (OSError, ValueError, AttributeError):
        listed = set()
    return [path for path in _files(folder) if str(path.relative_to(folder)) not in listed]


def as_json(document: Any) -> str:
    """Write as JSON; records of learners, objectives and rules as what they are in a configuration."""
    return json.dumps(document, indent=2, default=lambda record: record.to_json()) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file beside, flush it and rename it: the old one is there, or the new one, whenever the power goes."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _flush(new)
    new.replace(path)
    _flush(path.parent)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a folder to write that becomes `target`, unchanged until then, once it is left without an error."""
    work = target.parent / WORKSHOP
    _clear(work)
    made = work / target.name
    made.mkdir(parents=True)
    yield made
    listed = {str(path.relative_to(made)): [path.stat().st_size, _digest(path)] for path in _files(made)}
    (made / SEAL).write_text(as_json(listed), encoding="utf-8")
    if target.exists():
        _carry_over(target, made)
    for path in [*made.rglob("*"), made]:
        _flush(path)
    if target.exists():
        (work / "before").mkdir()
        target.rename(work / "before" / target.name)
    made.rename(target)
    _flush(target.parent)
    _clear(work)
    work.rmdir()


def _clear(work: Path) -> None:
    """Empty the workshop of what a kill left; a folder that was to be replaced, and was not, goes back to its place."""
    for path in work.glob("before/*"):
        if not (work.parent / path.name).exists():
            path.rename(work.parent / path.name)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _carry_over(old: Path, new: Path) -> None:
    """Keep what somebody laid into a folder that is written again."""
    for path in _strangers(old):
        place = new / path.relative_to(old)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place, follow_symlinks=False)


def _flush(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_newest(folder: Path, step: int, count: int) -> None:
    """Remove a run's checkpoints before the last `count` up to a step, but none that holds someone else's file."""
    past = [path for number, path in steps(folder).items() if number <= step]
    for path in past[:-count]:
        if not _strangers(path):
            work = folder / CHECKPOINTS / WORKSHOP
            _clear(work)
            path.rename(work / path.name)  # first out of sight: half a checkpoint is never met
            _clear(work)
            work.rmdir()


def remove_run(folder: Path) -> None:
    """Remove a run that is nothing but a run.

    Raises: SettingsError, with nothing removed, if anything in the folder is not what a run wrote there.
    """
    expect_only_a_run(folder)
    shutil.rmtree(folder)


def expect_only_a_run(folder: Path) -> None:
    """Refuse a folder in which anything is not what a run wrote there."""
    TrainingRun.read(folder)
    own = {folder / name for name in (SETTINGS, METRICS, PICTURE, f".{SETTINGS}.new", f".{METRICS}.new")}
    for sealed in [folder / MODEL, *steps(folder).values()]:
        if damage(sealed) is None:
            own |= set(_files(sealed)) - set(_strangers(sealed))
    own |= {path for place in (folder, folder / CHECKPOINTS) for path in _files(place / WORKSHOP)}
    others = [path for path in _files(folder) if path not in own or path.is_symlink()]
    if others or folder.is_symlink():
        raise SettingsError(
            f"train: {[*others, folder][0]} is not what a run wrote; expected {folder} to hold a run and nothing else, "
            "to be removed. Take it out, or name another folder."
        )

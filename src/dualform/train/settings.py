"""The settings of a training run: defaults, then a TOML file, then `--set`, then flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dualform.catalogue import near_misses


class SettingsError(ValueError):
    """A setting that does not exist or does not fit."""


@dataclass(frozen=True)
class Settings:
    """Say what to train, on what, for how long. `model` holds overrides of the preset's fields.

    The inner rate begins at `rate_start` times the rule's and reaches it after `rate_warmup_steps` (0: at once).
    """

    preset: str = "tiny-ttt-mlp"
    data: str = "shakespeare"
    output: str = ""
    max_steps: int = 400
    seq_len: int = 128
    batch_size: int = 16
    learning_rate: float = 5e-3
    seed: int = 0
    warmup_steps: int = 20
    rate_start: float = 0.1
    rate_warmup_steps: int = 0
    weight_decay: float = 0.1
    save_steps: int = 200
    gradient_checkpointing: bool = False
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for f in fields(self):
            value, wanted = (
                getattr(self, f.name),
                {"int": int, "float": (int, float), "str": str, "bool": bool}.get(str(f.type)),
            )
            if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and f.type != "bool")):
                raise SettingsError(f"train: {f.name} is {value!r}; expected a value of type {f.type}.")
        for name in ("max_steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"train: {name} is {getattr(self, name)}; expected a whole number >= 1.")
        if not self.learning_rate > 0:
            raise SettingsError(f"train: learning_rate is {self.learning_rate}; expected a number > 0.")

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.preset}")


def resolve(file: Path | None, assignments: list[str], flags: Mapping[str, Any]) -> Settings:
    """Merge a TOML file, `a.b=value` assignments and flags (None = not given) over the defaults.

    Shape:  none.
    Dtype:  none.
    Raises: SettingsError for a file that cannot be read, an unknown name, or a value that does not fit.
    """
    document = {} if file is None else _read(file)
    for assignment in assignments:
        _assign(document, assignment)
    document |= {name: value for name, value in flags.items() if value is not None}
    known = [f.name for f in fields(Settings)]
    for name in document.keys() - set(known):
        raise SettingsError(f"train: there is no setting {name!r}. {near_misses(name, known)}")
    if not isinstance(document.get("model", {}), Mapping):
        raise SettingsError(
            f"train: model is {document['model']!r}; expected a table of fields. Write [model] in the file."
        )
    return Settings(**document)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"train: {file} cannot be read ({error.strerror}); expected a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"train: {file} is not TOML: {error}") from None


def _assign(document: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise SettingsError(f"train: --set {assignment!r} is no assignment; expected a.b=value, as in model.chunk=8.")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for name in names[:-1]:
        document = document.setdefault(name, {})
        if not isinstance(document, dict):
            raise SettingsError(f"train: --set {assignment!r} goes into {name!r}, which is not a table.")
    document[names[-1]] = value

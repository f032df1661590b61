"""The settings of a training run: defaults (or the resumed run's), then a TOML file, then `--set`, then flags."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError

from dualform.catalogue import CatalogueError, expect, hints_of, near_misses, normalise
from dualform.models import DualformConfig, presets
from dualform.models.configuration import specs
from dualform.own_code import codes_in

# What a setting must be beyond its type: in words, from, below.
_ranges: dict[str, tuple[str, float, float]] = {
    **dict.fromkeys(("max_steps", "batch_size", "save_steps"), ("a whole number >= 1", 1, math.inf)),
    "seq_len": ("a whole number >= 2, a token and the next", 2, math.inf),
    "warmup_steps": ("a whole number >= 0", 0, math.inf),
    "learning_rate": ("a number > 0", math.ulp(0), math.inf),
    "weight_decay": ("a number >= 0", 0, math.inf),
    "seed": (f"a whole number, 0 <= seed < 2**32 = {2**32}", 0, 2**32),
}


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
        for name, value in self.to_dict().items():
            _fits(name, value)

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.preset}")

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _fits(name: str, value: Any) -> None:
    """Refuse a setting that there is not, and a value that it cannot have."""
    hints = hints_of(Settings)
    if name not in hints:
        inside = {name: f"model.{name}" for name in DualformConfig.__annotations__}
        path, last = name, name
        # Of a table that there is not, what stands in it says more than its name, unless that is nearly right.
        while isinstance(value, Mapping) and value and not get_close_matches(last, [*hints, *inside], cutoff=0.75):
            last, value = next(iter(cast("Mapping[str, Any]", value).items()))
            path = f"{path}.{last}"
        raise SettingsError(f"train: there is no setting {path!r}. {near_misses(last, list(hints), inside)}")
    if name == "model" and not isinstance(value, Mapping):
        raise SettingsError(f"train: model is {value!r}; expected a table of fields. Write [model] in the file.")
    expect("train", name, value, hints[name], kind=SettingsError)
    words, low, high = _ranges.get(name, ("", 0, 0))
    if words and not low <= cast("float", value) < high:
        raise SettingsError(f"train: {name} is {value}; expected {words}. Change it.")


def configure(settings: Settings) -> DualformConfig:
    """Build the model's configuration: the preset with the overrides, which must name fields that exist."""
    known = list(DualformConfig.__annotations__)  # what else transformers adds changes no run, or breaks it
    for name in settings.model.keys() - set(known):
        raise SettingsError(f"train: the model has no field {name!r}. {near_misses(name, known)}")
    try:
        return DualformConfig(preset=settings.preset, **settings.model)
    except CatalogueError:
        raise
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:  # the last is transformers'
        raise SettingsError(f"train: [model] does not fit: {error.__cause__ or error}") from None


def settled(settings: Settings) -> dict[str, Any]:
    """Return the model's overrides with own code by its digests: a run is what its files were when it began."""
    model = dict(settings.model)
    own = [name for name in specs if name in model]
    config = configure(settings) if own else None
    return model | {name: getattr(config, name) for name in own if [*codes_in(getattr(config, name))]}


def asked(file: Path | None, assignments: list[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a TOML file, `a.b=value` assignments and flags (None = not given) say, and nothing else.

    Raises: SettingsError for a file that cannot be read, an unknown name, or a value that does not fit.
    """
    document = {} if file is None else _read(file)
    for assignment in (None, *assignments):
        if assignment is not None:
            _assign(document, assignment)
        for name, value in document.items():  # each time: what stands before another is no less wrong
            _fits(name, value)
        presets[document.get("preset", Settings.preset)]
    return document | {name: value for name, value in flags.items() if value is not None}


def laid_over(own: Settings, document: Mapping[str, Any]) -> Settings:
    """Change of a run's settings what was asked for, its model's fields one by one."""
    return Settings(**_over(own.to_dict(), document))


def _over(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for name, value in other.items():
        before = merged.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            # Options of another learner, objective or rule do not mix with these.
            # Nor does a file that is named anew mix with what it was.
            same = value.get("name") in (None, before.get("name")) and not ("name" in value and "code" in before)
            merged[name] = _over(cast("Mapping[str, Any]", before), value) if same else value
        else:
            merged[name] = value
    return merged


def differences(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    """Name the settings in which two runs differ, with both values; spellings of one preset or model are no difference.

    Where a run lies and where its text lies is not compared: neither changes a number.
    """
    apart = ("output", "data", "model", "preset")
    pairs = {name: (value, getattr(theirs, name)) for name, value in ours.to_dict().items() if name not in apart}
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if normalise(ours.preset) != normalise(theirs.preset):
        return {"preset": (ours.preset, theirs.preset)} | found
    mine, other = (dict(_leaves("model", described(configure(settings)))) for settings in (ours, theirs))
    for name in mine | other:
        if mine.get(name) != other.get(name):
            found[name] = (mine.get(name), other.get(name))
    return found


def described(config: DualformConfig) -> dict[str, Any]:
    """Return the fields that say what a model is; those that transformers adds do not."""
    return {name: getattr(config, name) for name in DualformConfig.__annotations__}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, part in value.items():
        yield from _leaves(f"{path}.{name}", part)


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
        (value,) = tomllib.loads(f"x = {text}").values()
    except ValueError:
        value = text  # a bare word is a string, and so are several lines
    for name in names[:-1]:
        document = document.setdefault(name, {})
        if not isinstance(document, dict):
            raise SettingsError(f"train: --set {assignment!r} goes into {name!r}, which is not a table.")
    document[names[-1]] = value

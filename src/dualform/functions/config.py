"""Configurations as data: a frozen dataclass to a dictionary, JSON or TOML, and back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Self, cast

from dualform.catalogue import Bound, CatalogueError, near_misses


class Config:
    """What a module is, apart from its numbers. Abstract: subclasses are frozen dataclasses with `build`."""

    def build(self) -> Any:
        raise NotImplementedError

    def __call__(self) -> Any:
        return self.build()

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(cast("Any", self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config of a mapping; a key that it does not have is a mistake, not a detail."""
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cast("Any", cls))}
        for wrong in values.keys() - known.keys():
            raise CatalogueError(f"{cls.__name__}: unknown key {wrong!r}. {near_misses(str(wrong), list(known))}")
        for name, needed in known.items():
            if needed and name not in values:
                raise CatalogueError(f"{cls.__name__}: {name!r} is missing; expected a value. Add it.")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))

    def to_toml(self) -> str:
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_dict().items() if value is not None)

    @classmethod
    def from_toml(cls, text: str) -> Self:
        return cls.from_dict(tomllib.loads(text))


def _plain(value: Any) -> Any:
    if isinstance(value, Bound):
        return value.to_json()
    if isinstance(value, Config):
        return value.to_dict()
    return [_plain(item) for item in cast("tuple[Any, ...]", value)] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    """Write a value inline. TOML has no null: an option that is None is left out, None being its default."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in items if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in cast("list[Any]", value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)

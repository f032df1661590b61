"""Errors of the border, in one format: `<function>: <argument> <is what>; expected <rule>. <what to do next>.`"""

from __future__ import annotations

from typing import NoReturn


class ShapeError(ValueError):
    """A tensor or a size does not have the shape that its equation asks for."""


class TraceError(ValueError):
    """A function cannot be traced into a graph of pure tensor ops; the message names the line of the caller's code."""


def fail(
    function: str, argument: str, found: str, expected: str, advice: str, kind: type[ValueError] = ShapeError
) -> NoReturn:
    """Raise `kind` with the house's message: what was found, what was expected, what to do next."""
    raise kind(f"{function}: {argument} {found}; expected {expected}. {advice}")

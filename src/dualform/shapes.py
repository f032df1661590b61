"""Errors of the border, in one format: `<function>: <argument> <is what>; expected <rule>. <what to do next>.`"""

from __future__ import annotations

from typing import Any, NoReturn


class ShapeError(ValueError):
    """A tensor or a size does not have the shape that its equation asks for."""


class TraceError(ValueError):
    """A function cannot be traced into a graph of pure tensor ops; the message names the line of the caller's code."""


def fail(
    function: str, argument: str, found: str, expected: str, advice: str, kind: type[ValueError] = ShapeError
) -> NoReturn:
    """Raise `kind` with the house's message: what was found, what was expected, what to do next."""
    raise kind(f"{function}: {argument} {found}; expected {expected}. {advice}")


def require(
    is_right: bool, function: str, argument: str, value: Any, expected: str, advice: str,
    kind: type[ValueError] = ShapeError,
) -> None:  # fmt: skip
    """Refuse an argument that is not right, showing what it is."""
    if not is_right:
        fail(function, argument, f"is {shown(value)}", expected, advice, kind)


def shown(value: Any) -> str:
    """Write a value on one line, cut where that is long."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."


def is_whole(x: Any, least: int = 1) -> bool:
    """Is it a whole number, not too small? True and 2.0 are none."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least

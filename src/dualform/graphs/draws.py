"""Random numbers, Python's, numpy's and torch's, which a trace would hold for ever: refused, by line."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import fx

from dualform.graphs.code_names import is_fixed
from dualform.graphs.edit import emitter, replace
from dualform.ops.table import bound_arguments
from dualform.shapes import TraceError


def _states(generators: Sequence[Any]) -> list[Any]:
    """What each would go on from; bits of their own are asked for themselves."""
    return [
        x.getstate() if isinstance(x, random.Random)
        else x.get_state(legacy=False) if hasattr(x, "get_state")
        else getattr(x, "bit_generator", x).state
        for x in generators
    ]  # fmt: skip


@contextmanager
def undrawn(generators: Sequence[Any]) -> Iterator[None]:
    """Leave generators as they were."""
    before = _states(generators)
    try:
        yield
    finally:
        for x, state in zip(generators, before, strict=True):
            if isinstance(x, random.Random):
                x.setstate(state)
            elif hasattr(x, "set_state"):
                x.set_state(state)
            else:
                getattr(x, "bit_generator", x).state = state


@contextmanager
def no_draws(generators: Sequence[Any], again: Callable[[], Any], shown: Callable[[FrameType], str]) -> Iterator[None]:
    """Refuse to draw from some generators, and leave them as they were; `again` does the same once more,
    to find the line.

    shown: a frame's line as people read it. Other threads may draw meanwhile: no line, no refusal.
    """
    with undrawn(generators):
        before = pickle.dumps(_states(generators))
        yield
        if pickle.dumps(_states(generators)) != before and (line := _line_that_draws(generators, again, shown)):
            raise TraceError(
                f"trace: `{line}` is random; expected a pure function of its inputs. Draw the noise outside and pass "
                "it in."
            )


def _line_that_draws(generators: Sequence[Any], again: Callable[[], Any], shown: Callable[[FrameType], str]) -> str:
    """Run once more, line by line, and see when a generator moves."""
    found: list[str] = []
    last, state = "", pickle.dumps(_states(generators))

    def at(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal last, state
        if found or is_fixed(frame.f_globals.get("__name__")):
            return None
        now = pickle.dumps(_states(generators))
        found.extend([last] if last and now != state else [])
        last, state = shown(frame), now
        return at

    tracing = sys.gettrace()
    sys.settrace(at)
    try:
        with suppress(Exception):
            again()
    finally:
        sys.settrace(tracing)
    return found[0] if found else ""


# -- torch's own


def refuse_random_ops(gm: fx.GraphModule, blame: Callable[[fx.Node, str, str], NoReturn]) -> None:
    """Random ops are refused; dropout that is switched off is the identity, and of all it leaves zeros."""
    for node in list(gm.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        is_dropout = len(target._schema.returns) == 1 and [*bound_arguments(node)] == ["input", "p", "train"]
        if is_dropout and (not node.args[2] or node.args[1] == 0):
            replace(node, node.args[0])
        elif is_dropout and node.args[1] == 1:
            replace(node, emitter(gm.graph, node)(torch.ops.aten.zeros_like.default, node.args[0]))
        elif not _is_quiet(node):
            what = "is random (dropout in training mode)" if "dropout" in str(target) else "is random"
            blame(node, what, "Call .eval(), or draw the noise outside and pass it in.")


def _is_quiet(node: fx.Node) -> bool:
    """A random op whose random part is switched off by its arguments."""
    given = bound_arguments(node)
    return 0 in (given.get("dropout_p"), given.get("dropout")) or False in (given.get("training"), given.get("train"))

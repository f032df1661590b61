"""An op as Python: as a person writes it, or so that it runs when pasted."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.kept import is_stopped
from dualform.ops.table import find_row, kind_of

_DEFAULTS = {("pin_memory", False), ("device", torch.device("cpu"))}


# What Python writes with a sign or as an attribute.
_OPERATOR = re.compile(r"-\{0\}|\{0\} \S+ \{1\}|\{0\}\.\w+")


def _spellings(target: Any) -> list[str]:
    row = find_row(target)
    return row.python.split(" | ") if row is not None and row.python else []


def _filled_in(spelling: str, args: Sequence[str]) -> str:
    first, *rest = args
    return spelling.format(f"({first})" if "**" in spelling and first.startswith("-") else first, *rest)


def text_of(value: Any, names: dict[fx.Node, str]) -> str:
    """Spell an argument."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(text_of(x, names) for x in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{'-' * (value < 0)}torch.{str(value).lstrip('-')}"
    return f"torch.{value!r}" if isinstance(value, torch.device) else repr(value)


def statement(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """Spell one node: an operator, a method or torch function where Python has one, the op itself elsewhere."""
    target, args = node.target, [text_of(x, names) for x in node.args]
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(target))
        return f"torch.tensor({held.tolist()!r}, dtype={held.dtype})"
    if is_stopped(node):
        return f"{text_of(node.args[0][0], names)}.detach()"  # type: ignore[index]
    if target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    kwargs = [f"{k}={text_of(v, names)}" for k, v in node.kwargs.items() if v is not None and (k, v) not in _DEFAULTS]
    name, every = getattr(target, "_opname", ""), [*args, *kwargs]
    for spelling in _spellings(target):
        if spelling == "x.":
            return f"{args[0]}.{name}({', '.join(every[1:])})"
        if spelling == "torch.":
            return f"torch.{name}({', '.join(every)})"
        if not kwargs and spelling.count("{") == len(args):
            return _filled_in(spelling, args)
    return f"torch.ops.{target}({', '.join(every)})"


def written(node: fx.Node, name: Callable[[fx.Node], str], wide: dict[fx.Node, str] | None = None) -> str:
    """Write the op of a node in Python; `wide` gives operands that were broadcast first their names."""
    target: Any = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        return f"{written(source, name, wide)}[{node.args[1]}]"
    if not isinstance(target, torch._ops.OpOverload):
        return str(node.name)
    op, schema = target._schema.name.split("::")[1], target._schema.arguments
    called = wide or {}

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return called.get(value) or name(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(show, value))}]"
        return f"{value:g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)

    keywords = {k: v for k, v in node.kwargs.items() if v is not None and k not in ("layout", "device", "pin_memory")}
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    for spelling in _spellings(target):
        if not keywords and _OPERATOR.fullmatch(spelling) and spelling.count("{") == len(node.args):
            return _filled_in(spelling, [show(x) for x in node.args])
    first = show(node.args[0]) if node.args else ""
    if (window := _window(op, given, show)) is not None:
        return f"{first}[{window}]"
    is_spread = op == "repeat" or (op != "squeeze" and kind_of(target) in ("view", "reduction"))
    rest = _spread_out(node.args[1:], show) if is_spread else [show(x) for x in node.args[1:]]
    names = [*(a.name for a in schema[1:]), *[""] * len(rest)]
    rest = [f"{n}={x}" if n and x in ("True", "False") else x for n, x in zip(names, rest, strict=False)]
    rest += [f"{k}={show(v)}" for k, v in keywords.items()]
    method = schema and schema[0].name == "self" and hasattr(Tensor, op) and first.replace(".", "_").isidentifier()
    if method and torch.Tag.pointwise not in target.tags:
        return f"{first}.{op}({', '.join(rest)})"
    return f"{op}({', '.join([first, *rest] if first else rest)})"


def _spread_out(args: Sequence[Any], show: Callable[[Any], str]) -> list[str]:
    """reshape(4, 2) rather than reshape([4, 2]); sum(0) rather than sum([0])."""
    first, *rest = args or ((),)
    flat = list(first) if isinstance(first, (list, tuple)) else [first]
    if rest and len(flat) > 1:
        flat = [tuple(flat)]
    return [*map(show, flat), *map(show, rest)]


def _window(op: str, given: dict[str, Any], show: Callable[[Any], str]) -> str | None:
    if op == "index":
        return ", ".join(":" if k is None else show(k) for k in given["indices"])
    if op not in ("select", "slice"):
        return None
    axis, rank = given.get("dim", 0), given["self"].meta["val"].ndim
    if op == "select":
        return ", ".join([":"] * (axis % rank) + [show(given["index"])])
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    ends = "" if end is None or end >= 2**62 else str(end)
    cut = f"{start or ''}:{ends}" + (f":{step}" if step != 1 else "")
    return ", ".join([":"] * (axis % rank) + [cut])

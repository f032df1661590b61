"""An op as Python: as a person writes it, or so that it runs when pasted."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.kept import is_stopped

_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "mm": "@", "bmm": "@", "mv": "@", "pow": "**",
    "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!=",
}  # fmt: skip
MIRRORS = {"numpy_T": "T", "t": "T", "mT": "mT", "mH": "mH", "adjoint": "mH"}
_SPREAD = {"reshape", "view", "permute", "expand", "repeat", "_unsafe_view", "sum", "mean", "amax", "amin"}
# What runs under the name that aten has for it.
_METHODS = {
    "unsqueeze", "squeeze", "transpose", "permute", "expand", "cumsum", "tril", "triu", "view", "reshape", "select", "clone",
    "flatten", "clamp", "sum",
}  # fmt: skip
_FUNCTIONS = {
    "tanh", "exp", "sigmoid", "relu", "rsqrt", "sqrt", "log", "abs", "sin", "cos", "reciprocal", "where", "maximum", "minimum",
    "outer", "stack", "cat", "erf", "var_mean", "addmm", "softmax", "arange",
}  # fmt: skip
_DEFAULTS = {("pin_memory", False), ("device", torch.device("cpu"))}


def _signed(op: str, args: Sequence[str]) -> str | None:
    """An op that Python has a sign for, or torch an attribute."""
    if op in _SIGNS and len(args) == 2:
        first = f"({args[0]})" if args[0].startswith("-") and op == "pow" else args[0]
        return f"{first} {_SIGNS[op]} {args[1]}"
    if len(args) == 1 and (op == "neg" or op in MIRRORS):
        return f"-{args[0]}" if op == "neg" else f"{args[0]}.{MIRRORS[op]}"
    return None


# -- so that it runs ---------------------------------------------------------------------------------------------------


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
    every, name = [*args, *kwargs], getattr(getattr(target, "overloadpacket", None), "__name__", "")
    found = None if kwargs else _signed(name, args)
    if found is not None:
        return found
    if name == "addmm" and len(every) == 3:
        return f"{args[0]} + {args[1]} @ {args[2]}"
    if name == "square":
        return f"{args[0]} ** 2"
    if name == "sum" and len(args) > 2:
        every = [*args[:2], *["keepdim=True"] * (args[2] == "True"), *kwargs]
    name = {"_unsafe_view": "view"}.get(name, name)
    if name in _METHODS and str(target).startswith("aten."):
        return f"{args[0]}.{name}({', '.join(every[1:])})"
    return f"{f'torch.{name}' if name in _FUNCTIONS else f'torch.ops.{target}'}({', '.join(every)})"


# -- as a person writes it ---------------------------------------------------------------------------------------------


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
    found = None if keywords else _signed(op, [show(x) for x in node.args])
    if found is not None:
        return found
    first = show(node.args[0]) if node.args else ""
    if op in ("slice", "select", "index"):
        return f"{first}[{_window(op, given, show)}]"
    rest = [show(x) for x in node.args[1:]] if op not in _SPREAD else _spread_out(node.args[1:], show)
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


def _window(op: str, given: dict[str, Any], show: Callable[[Any], str]) -> str:
    if op == "index":
        return ", ".join(":" if k is None else show(k) for k in given["indices"])
    axis, rank = given.get("dim", 0), given["self"].meta["val"].ndim
    if op == "select":
        return ", ".join([":"] * (axis % rank) + [show(given["index"])])
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    ends = "" if end is None or end >= 2**62 else str(end)
    cut = f"{start or ''}:{ends}" + (f":{step}" if step != 1 else "")
    return ", ".join([":"] * (axis % rank) + [cut])

"""A traced step as Python that a person reads and that runs when pasted, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dualform.algebra.planner import counted
from dualform.graphs.edit import inputs_of
from dualform.graphs.kept import is_kept, is_stopped, written_out
from dualform.learning.derive import Derivation, Step, identifier, names_of

aten = torch.ops.aten


class Cost(NamedTuple):
    """Work and memory of one mini-batch for one head, forward.

    Units: flops of matrix products (2 per multiply-add, as torch counts them); bytes written by all operations; bytes of
    fast state (anchor and registers).
    """

    flops: int
    bytes: int
    state_bytes: int


def cost_of(step: Step, registers: int) -> Cost:
    """Count a step's cost from its graph."""
    flops, written, _ = counted(written_out(step.graph).graph.nodes)
    leaves = sum(w.numel() * w.element_size() for w in step.inputs.th.values())
    return Cost(int(flops), int(written), leaves * (1 + registers))


_infix: dict[Any, str] = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/", aten.mm.default: "@",
    aten.add.Scalar: "+", aten.sub.Scalar: "-", aten.mul.Scalar: "*", aten.div.Scalar: "/", aten.bmm.default: "@",
    aten.mv.default: "@", aten.pow.Tensor_Scalar: "**", aten.gt.Scalar: ">", aten.ge.Scalar: ">=", aten.lt.Scalar: "<",
    aten.le.Scalar: "<=", aten.gt.Tensor: ">", aten.ge.Tensor: ">=", aten.lt.Tensor: "<", aten.le.Tensor: "<=",
    aten.eq.Scalar: "==", aten.ne.Scalar: "!=",
}  # fmt: skip
_methods = {
    "unsqueeze", "squeeze", "transpose", "permute", "expand", "cumsum", "tril", "triu", "view", "reshape", "select", "clone",
    "flatten", "clamp",
}  # fmt: skip
_functions = {
    "tanh", "exp", "sigmoid", "relu", "rsqrt", "sqrt", "log", "abs", "sin", "cos", "reciprocal", "where", "maximum", "minimum",
    "outer", "stack", "cat", "erf", "var_mean", "addmm", "softmax", "arange",
}  # fmt: skip
_spelled: dict[Any, Callable[..., str]] = {
    aten.t.default: lambda a: f"{a}.T",
    aten.neg.default: lambda a: f"-{a}",
    aten.addmm.default: lambda c, a, b: f"{c} + {a} @ {b}",
    aten.square.default: lambda a: f"{a} ** 2",
    aten.sum.default: lambda a: f"{a}.sum()",
    aten._unsafe_view.default: lambda a, shape: f"{a}.view({shape})",
}


_defaults = {("pin_memory", False), ("device", torch.device("cpu"))}


Names = dict[fx.Node, str]


def _text(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(_text(x, names) for x in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{'-' * (value < 0)}torch.{str(value).lstrip('-')}"
    return f"torch.{value!r}" if isinstance(value, torch.device) else repr(value)


def statement(node: fx.Node, names: Names) -> str:
    """Spell one node: an operator, a method or torch function where Python has one, the op itself elsewhere."""
    target, args = node.target, [_text(x, names) for x in node.args]
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(target))
        return f"torch.tensor({held.tolist()!r}, dtype={held.dtype})"
    if is_stopped(node):
        return f"{_text(node.args[0][0], names)}.detach()"  # type: ignore[index]
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    given = {k: v for k, v in node.kwargs.items() if v is not None and (k, v) not in _defaults}
    plain = not given
    if target in _infix and plain and len(args) == 2:
        return f"{args[0]} {_infix[target]} {args[1]}"
    if target in _spelled and plain and (target != aten.addmm.default or len(args) == 3):
        return _spelled[target](*args)
    kwargs = [f"{k}={_text(v, names)}" for k, v in given.items()]
    if name in _methods and str(target).startswith("aten."):
        return f"{args[0]}.{name}({', '.join([*args[1:], *kwargs])})"
    if name == "sum" and len(args) > 1:
        keep = ", keepdim=True" if len(args) > 2 and args[2] == "True" else ""
        return f"{args[0]}.sum({args[1]}{keep})"
    if name in _functions:
        return f"torch.{name}({', '.join([*args, *kwargs])})"
    if callable(target) and getattr(target, "__module__", "") == "_operator" and target.__name__ == "getitem":
        return f"{args[0]}[{args[1]}]"
    return f"torch.ops.{target}({', '.join([*args, *kwargs])})"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"({', '.join(map(str, value.shape))})" if isinstance(value, Tensor) else ""


def print_step(step: Step, derivation: Derivation) -> str:
    """Print a step with a shape behind every line and a heading above every part."""
    graph = written_out(step.graph, lambda n: is_kept(n) and not is_stopped(n)).graph
    nodes = list(graph.nodes)
    inputs, returned = inputs_of(nodes[-1].graph), nodes[-1].args[0]
    names = dict(zip(inputs, names_of(step.inputs), strict=True))
    taken = {"torch", "mini_batch", *names.values()}
    leaves = [names[node] for node in inputs[: len(step.inputs.th)]]
    for node, name in zip(returned, ["o", *(f"{r}{w}_next" for r in ("", "R_") for w in leaves)], strict=False):
        if isinstance(node, fx.Node) and node not in names:
            names[node] = identifier(name, taken)
    names |= {n: identifier(n.name, taken) for n in nodes if n not in names}
    lines = ["import torch", "", "", f"def mini_batch({', '.join(names[n] for n in inputs)}):"]
    lines.append(
        f'    """{derivation.chunk} tokens, one head: {", ".join(f"{names[n]} {_shape(n)}" for n in inputs)}."""'
    )
    section = None
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.meta.get("section") != section:
            section = node.meta.get("section")
            lines.append(f"    # {section}")
        text = f"    {names[node]} = {statement(node, names)}"
        lines.append(f"{text:<64}  # {_shape(node)}")
    lines.append(f"    return {', '.join(_text(x, names) for x in returned)}")
    return "\n".join(lines)

"""A program as a line of text: what an exported file carries, so that a process that never saw the learner can run it.

The text holds the traced blocks of every kind that the exported call may need, op by op, and what a run must know of
the rule: no Python is in it, and none is run when it is read. From the blocks both directions and every backend are
made as ever.
"""

from __future__ import annotations

import base64
import json
import lzma
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.simplify import tidy
from dualform.learning.backends import BackendError
from dualform.learning.derive import TracedStep, flatten, trace_fake
from dualform.learning.emit import StepInputs
from dualform.learning.grid import Variant
from dualform.learning.plan import Plan
from dualform.learning.transforms import undisturbed

MARK = "text:"  # what such a text begins with, and no program's name does
_kinds = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format"}


def written(plan: Plan, variants: Sequence[Variant]) -> str:
    """Write what runs these kinds of blocks."""
    d, rule = plan.derivation, plan.derivation.inner.rule
    told = {
        "names": plan.names,
        "slow": list(d.parts.slow),
        "sizes": [p.numel() for p in d.parts.fast.values()],
        "start": rule.start,
        "resets": rule.resets,
        "observed": d.inner.observed,
        "chunk": d.chunk,
        "block": d.block,
        "out_width": d.out_width,
        "dtype": _plain(d.dtype),
        "constants": {name: _stored(x) for name, x in d.constants.items()},
        "steps": [[variant, _step(d.step(variant))] for variant in variants],
    }
    return MARK + base64.b64encode(lzma.compress(json.dumps(told).encode())).decode()


def _step(step: TracedStep) -> dict[str, Any]:
    def shaped(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: shaped(y) for name, y in x.items()}
        return None if x is None else [list(x.shape), _plain(x.dtype)]

    nodes = list(step.graph.graph.nodes)
    number = {node: n for n, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        if node.op == "get_attr":
            lines.append(["constant", _stored(getattr(step.graph, node.target))])
        else:
            target = "getitem" if node.target is operator.getitem else str(node.target)
            lines.append([node.op, target, _plain(node.args, number), _plain(node.kwargs, number)])
    return {"inputs": {part: shaped(x) for part, x in step.inputs._asdict().items()}, "nodes": lines}


def _plain(x: Any, number: dict[fx.Node, int] | None = None) -> Any:
    """Write an argument as JSON: a number, a word or None as it is, all else in a list that begins with its kind."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, fx.Node):
        return ["node", (number or {})[x]]
    if isinstance(x, list | tuple):
        return ["list" if isinstance(x, list) else "tuple", *(_plain(y, number) for y in x)]
    if isinstance(x, dict):
        return {name: _plain(y, number) for name, y in x.items()}
    if isinstance(x, complex):
        return ["complex", x.real, x.imag]
    if isinstance(x, slice):
        return ["slice", *(_plain(y, number) for y in (x.start, x.stop, x.step))]
    return [_kinds[type(x)], str(x).removeprefix("torch.")]


def _stored(x: Tensor) -> list[Any]:
    data = x.detach().cpu().contiguous()
    text = base64.b64encode(data.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
    return [list(x.shape), _plain(x.dtype), text]


def _read(x: Any, values: Sequence[Any] = ()) -> Any:
    if isinstance(x, dict):
        return {name: _read(y, values) for name, y in x.items()}
    if not isinstance(x, list):
        return x
    kind, *rest = x
    if kind in ("list", "tuple", "complex", "slice"):
        made = {"list": list, "tuple": tuple, "complex": lambda x: complex(*x), "slice": lambda x: slice(*x)}[kind]
        return made([_read(y, values) for y in rest])
    if kind == "node":
        return values[rest[0]]
    return torch.device(rest[0]) if kind == "device" else getattr(torch, rest[0])


def _tensor(stored: list[Any]) -> Tensor:
    shape, dtype, data = stored
    return torch.frombuffer(bytearray(base64.b64decode(data)), dtype=_read(dtype)).reshape(shape)


def _target(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, op, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, RuntimeError):
        raise BackendError(
            f"dualform: an exported program calls the operator {name!r}, which this process has not; expected a "
            "registered one. Import what registers it first."
        ) from None


def _graph(lines: list[Any]) -> fx.GraphModule:
    graph, root, values = fx.Graph(), torch.nn.Module(), []
    for n, (op, *line) in enumerate(lines):
        if op == "constant":
            root.register_buffer(f"constant_{n}", _tensor(line[0]))
            values.append(graph.get_attr(f"constant_{n}"))
        elif op == "placeholder":
            values.append(graph.placeholder(f"x{n}"))
        elif op == "output":
            graph.output(_read(line[1], values)[0])
        else:
            values.append(graph.call_function(_target(line[0]), *(_read(x, values) for x in line[1:])))
    return fx.GraphModule(root, graph)


@dataclass(eq=False)
class Shipped:
    """What a `Plan` reads of a derivation, read from a text."""

    inner: Any
    chunk: int
    block: int | None
    dtype: torch.dtype
    out_width: int
    parts: Any
    constants: dict[str, Tensor]
    told: dict[Variant, Any]
    steps: dict[Variant, TracedStep] = field(default_factory=dict)
    analyses: dict[int, Any] = field(default_factory=dict)

    def step(self, variant: Variant) -> TracedStep:
        """Build a kind of block from its lines."""
        if variant not in self.told:
            raise BackendError(
                "dualform: an exported program was called with masks, resets, a state or a length (blocks of "
                f"{variant}) that it was not exported with; expected calls like the one at export. Export it again "
                "with such inputs, lengths as torch.export.Dim."
            )
        if variant not in self.steps:
            told = self.told[variant]

            def empty(x: Any) -> Any:
                if isinstance(x, dict):
                    return {name: empty(y) for name, y in x.items()}
                return None if x is None else torch.empty(x[0], dtype=_read(x[1]))

            inputs = StepInputs(**{part: empty(x) for part, x in told["inputs"].items()})
            self.steps[variant] = TracedStep(tidy(trace_fake(_graph(told["nodes"]), flatten(inputs), {})), inputs, [])
        return self.steps[variant]


@lru_cache(maxsize=256)
def read(text: str) -> Plan:
    """Read what `written` wrote."""
    return undisturbed(lambda: _plan(json.loads(lzma.decompress(base64.b64decode(text.removeprefix(MARK))))))


def _plan(told: dict[str, Any]) -> Plan:
    gates, leaves, others = told["names"]
    rule = SimpleNamespace(start=tuple(told["start"]), resets=tuple(told["resets"]), num_registers=len(told["start"]))
    fast = {name: torch.empty(n, device="meta") for name, n in zip(leaves, told["sizes"], strict=True)}
    derivation: Any = Shipped(
        inner=SimpleNamespace(rule=rule, observed=told["observed"]),
        chunk=told["chunk"],
        block=told["block"],
        dtype=_read(told["dtype"]),
        out_width=told["out_width"],
        parts=SimpleNamespace(fast=fast, slow=told["slow"]),
        constants={name: _tensor(x) for name, x in told["constants"].items()},
        told={Variant(*variant): step for variant, step in told["steps"]},
    )
    return Plan(derivation, names=(gates, leaves, others))

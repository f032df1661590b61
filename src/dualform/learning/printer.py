"""A traced step as Python that a person reads and that runs when pasted, and what it costs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, fx

from dualform.algebra.planner import counted
from dualform.explanations.python_text import statement, text_of
from dualform.graphs.edit import inputs_of
from dualform.graphs.kept import is_kept, is_stopped, written_out
from dualform.learning.derive import Derivation, Step, identifier, names_of


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
    lines.append(f"    return {', '.join(text_of(x, names) for x in returned)}")
    return "\n".join(lines)

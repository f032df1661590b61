"""A traced step as Python that a person reads and that runs when pasted, and what it costs."""

from __future__ import annotations

import itertools
import keyword
import re
import unicodedata
from typing import NamedTuple

from torch import Tensor, fx

from dualform.algebra.planner import counted
from dualform.explanations.python_text import statement, text_of
from dualform.graphs.edit import inputs_of
from dualform.graphs.kept import is_kept, is_stopped, written_out
from dualform.learning.derive import Derivation, TracedStep
from dualform.learning.emit import StepInputs


class Cost(NamedTuple):
    """Work and memory of one mini-batch for one head, forward.

    Units: flops of matrix products (2 per multiply-add, as torch counts them); bytes written by all operations;
           bytes of
    fast state (anchor and registers).
    """

    flops: int
    bytes: int
    state_bytes: int


def cost_of(step: TracedStep, registers: int) -> Cost:
    """Count a step's cost from its graph."""
    flops, written, _ = counted(written_out(step.graph).graph.nodes)
    leaves = sum(w.numel() * w.element_size() for w in step.inputs.th.values())
    return Cost(int(flops), int(written), leaves * (1 + registers))


def identifier(name: str, taken: set[str]) -> str:
    """Spell any name as an identifier of its own, and take it: `0.weight` is w_0_weight, a second `a_w` is a_w_2."""
    plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name))
    plain = plain if plain[:1].isidentifier() else f"w_{plain}"
    tries = itertools.chain([plain], (f"{plain.rstrip('_')}_{n}" for n in itertools.count(2)))
    found = next(x for x in tries if x not in taken and not keyword.iskeyword(x))
    taken.add(found)
    return found


def names_of(inputs: StepInputs) -> list[str]:
    """Name every tensor of a step's inputs as the printed program does, each apart: q, k, v and gates keep theirs."""
    tree = inputs._asdict()
    parts = [part for part, value in tree.items() if value is not None and not isinstance(value, dict)]
    found = {part: [part] for part in parts}
    taken = {"torch", "mini_batch", *parts}
    for part in sorted((p for p, value in tree.items() if isinstance(value, dict)), key=lambda p: p != "gates"):
        prefix = {"R": "R_", "init": "init_"}.get(part, "")
        found[part] = [identifier(prefix + name, taken) for name in tree[part]]
    return [name for part in tree for name in found.get(part, ())]


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"({', '.join(map(str, value.shape))})" if isinstance(value, Tensor) else ""


def print_step(step: TracedStep, derivation: Derivation) -> str:
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

"""Autocast written out: the casts that torch would make under it stand in the graph, and the switches go.

    with torch.autocast("cpu", dtype=torch.bfloat16): x @ W        becomes        x.to(bfloat16) @ W.to(bfloat16)

Which ops cast, and what, is torch's own table: it is read off by tracing an op alone, with autocast and without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from dualform.graphs.aside import alone
from dualform.graphs.edit import emitter, inline, inputs_of, replace
from dualform.shapes import TraceError, fail

aten = torch.ops.aten


class _Autocast(NamedTuple):
    """What `with torch.autocast` was told."""

    device: str
    dtype: torch.dtype
    enabled: bool


def with_casts(graph: fx.Graph) -> None:
    """Write the casts of every region of autocast into a graph, and erase the switches."""
    inside: list[_Autocast] = []
    switches: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is torch.amp.autocast_mode._enter_autocast:
            inside.append(_Autocast(*node.args[:3]))  # type: ignore[arg-type]
            switches.insert(0, node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            inside.pop()
            graph.erase_node(node)
        elif inside and inside[-1].enabled and isinstance(node.target, torch._ops.OpOverload):
            _cast(graph, node, inside[-1])
    for node in switches:
        graph.erase_node(node)


def _cast(graph: fx.Graph, node: fx.Node, how: _Autocast) -> None:
    """Cast the arguments of an op as autocast does; where it casts inside a composite op, write that op out."""
    if how.device != "cpu":  # a trace is made of stand-ins on the CPU, whose table of casts is another one
        fail(
            "trace", f"autocast for {how.device!r} inside the function", "depends on the device that it runs on",
            "the same function everywhere", "Cast with .to(dtype), or use autocast around the call.", TraceError,
        )  # fmt: skip
    sources = node.all_input_nodes
    made, plain = (
        alone(node, torch.autocast(how.device, how.dtype, enabled=on, cache_enabled=False)) for on in (True, False)
    )
    before = _first_casts(plain, sources)
    casts = {x: dtype for x, dtype in _first_casts(made, sources).items() if before.get(x) != dtype}
    if _count(made) - _count(plain) == len(casts):
        for x, dtype in casts.items():
            node.replace_input_with(x, emitter(graph, node)(aten._to_copy.default, x, dtype=dtype))
        return
    (result,), _ = inline(graph, node, made.graph, sources)
    replace(node, result)


def _first_casts(gm: fx.GraphModule, sources: list[fx.Node]) -> dict[fx.Node, torch.dtype]:
    """Which arguments are cast, each to one type, before anything else is done with them."""
    found: dict[fx.Node, torch.dtype] = {}
    for x, hole in zip(sources, inputs_of(gm.graph), strict=True):
        user = next(iter(hole.users)) if len(hole.users) == 1 else None
        if user is not None and user.target == aten._to_copy.default and "dtype" in user.kwargs:
            found[x] = user.kwargs["dtype"]  # type: ignore[assignment]
    return found


def _count(gm: fx.GraphModule) -> int:
    return sum(node.target == aten._to_copy.default for node in gm.graph.nodes)

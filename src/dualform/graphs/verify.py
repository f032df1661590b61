"""Is a graph sound, and does a pass leave it meaning what it meant? Asked between passes under DUALFORM_VERIFY=1.

A node is written before it is read; its value has the shape and dtype that its op gives; and on drawn inputs the graph
returns, and hands back as gradients, what it did before: a lost `detach` shows there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from dualform.graphs.edit import copied, evaluated, inputs_of, line_of, nodes_in, results_of, value_of
from dualform.graphs.hollow import META, blank, each
from dualform.graphs.this_thread import out_of_sight

Pass = TypeVar("Pass", bound=Callable[..., Any])
# A pass may sum in another order; what it loses is larger.
TOLERANCE = 1e-6


class BrokenGraph(AssertionError):
    """A pass made a graph that is not sound, or that means something else."""


def is_on() -> bool:
    return os.environ.get("DUALFORM_VERIFY", "0") not in ("", "0")


def verified(f: Pass) -> Pass:
    """Mark a pass, a function of a graph (module) that returns one or changes it, to be verified where asked for."""
    return _marked(f, True)


def verified_below_autograd(f: Pass) -> Pass:
    """Mark a pass over traces made below autograd, where `aten.detach` is what autograd left, and cuts nothing."""
    return _marked(f, False)


def _marked(f: Pass, detaches: bool) -> Pass:
    @wraps(f)
    def run(given: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_on():
            return f(given, *args, **kwargs)
        graph = given.graph if isinstance(given, fx.GraphModule) else given
        owner = given if isinstance(given, fx.GraphModule) else torch.nn.Module()
        before = copied(fx.GraphModule(owner, graph))
        found = f(given, *args, **kwargs)
        after = found.graph if isinstance(found, fx.GraphModule) else found if isinstance(found, fx.Graph) else graph
        holder = found if isinstance(found, fx.GraphModule) else owner
        verify(fx.GraphModule(holder, after), before, f.__name__, detaches)
        return found

    return run  # type: ignore[return-value]


def verify(
    gm: fx.GraphModule, before: fx.GraphModule | None = None, name: str = "graph", detaches: bool = True
) -> None:
    """Check a graph by itself, and against the graph that a pass began with. detaches:
    does `aten.detach` cut gradients?

    Raises: BrokenGraph, naming the pass, the node, its line, what was found and what was expected.
    """
    _expect_order(gm.graph, name)
    for node in gm.graph.nodes:
        _expect_value(node, name)
    if before is not None:
        _expect_meaning(gm, before, name, detaches)


def _broken(name: str, node: fx.Node | None, what: str, expected: str) -> BrokenGraph:
    at = f" at {node.format_node()} {line_of(node)}" if node is not None else ""
    return BrokenGraph(f"{name}: {what}{at}; expected {expected}. The pass {name} is wrong: please report it.")


def _expect_order(graph: fx.Graph, name: str) -> None:
    written: set[fx.Node] = set()
    for node in graph.nodes:
        missing = next((x for x in node.all_input_nodes if x not in written), None)
        if missing is not None:
            raise _broken(name, node, f"{missing.name} is read before it is written", "every value made before its use")
        written.add(node)


def _expect_value(node: fx.Node, name: str) -> None:
    """Compare a node's stand-in with what its op gives for those of its arguments."""
    known = node.meta.get("val")
    if node.op != "call_function" or not isinstance(known, Tensor) or not node.all_input_nodes:
        return
    if any("val" not in x.meta for x in node.all_input_nodes):
        return
    with out_of_sight():
        try:
            made = value_of(node.target, *_on_meta(node))
        except (NotImplementedError, RuntimeError):  # no stand-in of this op is known to torch
            return
    if isinstance(made, Tensor) and (made.shape, made.dtype) != (known.shape, known.dtype):
        raise _broken(
            name, node, f"its value is said to be {tuple(known.shape)} of {known.dtype}",
            f"{tuple(made.shape)} of {made.dtype}, as its op gives",
        )  # fmt: skip


def _on_meta(node: fx.Node) -> tuple[Any, dict[str, Any]]:
    def stand_in(n: fx.Node) -> Any:
        return each(n.meta["val"], lambda x: blank(x, META) if isinstance(x, Tensor) else x)

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), stand_in)  # type: ignore[misc]
    return args, {k: META if k == "device" else v for k, v in kwargs.items()}


def _expect_meaning(gm: fx.GraphModule, before: fx.GraphModule, name: str, detaches: bool) -> None:
    shapes = [[n.meta.get("val") for n in inputs_of(g.graph)] for g in (before, gm)]
    if any(not isinstance(x, Tensor) or max((0, *x.shape)) > 10_000 for x in shapes[0]):
        return  # a graph over made-up rows holds no numbers
    told = [[(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in side] for side in shapes]
    if told[0] != told[1]:
        raise _broken(name, None, f"the inputs are {told[1]}", f"those before it, {told[0]}")
    drawn = [_drawn(x, k) for k, x in enumerate(shapes[0])]
    with out_of_sight():
        expected, got = _outcome(before, drawn, detaches), _outcome(gm, drawn, detaches)
    if len(expected) != len(got):
        raise _broken(name, None, f"{len(got)} results and gradients", f"{len(expected)}")
    for k, (x, y) in enumerate(zip(expected, got, strict=True)):
        if (x is None) != (y is None) or (x is not None and y is not None and not _alike(x, y)):
            raise _broken(name, None, f"result or gradient {k} is {_said(y)}", f"{_said(x)}, as before it")


def _said(x: Tensor | None) -> str:
    return "none" if x is None else f"{tuple(x.shape)} of {x.dtype}, sum {x.double().sum():.6g}"


def _drawn(x: Any, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if x.is_complex() or x.is_floating_point():
        return (torch.rand(x.shape, generator=g, dtype=torch.float64) + 0.5).to(x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype)


def _alike(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    small = x.dtype in (torch.bfloat16, torch.float16)
    rtol = 0.05 if small else TOLERANCE if x.dtype in (torch.float64, torch.complex128) else 1e-3
    return torch.allclose(x, y, rtol=rtol, atol=rtol, equal_nan=True)


def _through(node: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if node.target is torch.ops.aten.detach.default else node.target(*args, **kwargs)


def _outcome(gm: fx.GraphModule, drawn: Sequence[Tensor], detaches: bool) -> list[Tensor | None]:
    """Return what a graph returns, and the gradients of its results' sum."""
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in drawn]
    with torch.enable_grad():
        values = evaluated(gm, given, None if detaches else _through)
        found = [values[n] for n in nodes_in(results_of(gm.graph)) if isinstance(values[n], Tensor)]
        ends = [x for x in found if x.requires_grad and x.is_floating_point()]
        leaves = [x for x in given if x.requires_grad]
        if not ends or not leaves:
            return [x.detach() for x in found]
        weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape) for x in ends]
        grads = torch.autograd.grad(ends, leaves, weights, allow_unused=True)
    return [*(x.detach() for x in found), *(None if g is None or not bool(g.any()) else g for g in grads)]

"""Parts of a trace taken aside: traced out of its sight, what they close over made inputs, and replayed into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx
from torch.utils._device import DeviceContext

from dualform.graphs.edit import (
    add_input,
    applied,
    cleaned,
    emitter,
    evaluated,
    extract,
    held_by,
    inputs_of,
    lift,
    needed,
    output_of,
    replace,
    results_of,
)
from dualform.graphs.functionalize import functionalized
from dualform.graphs.kept import stop_gradient, stopped
from dualform.graphs.this_thread import out_of_sight
from dualform.shapes import TraceError

aten = torch.ops.aten


@contextmanager
def aside(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Out of sight of the trace that is going on: stand-ins of the inputs, all of one fake mode."""
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    with out_of_sight(), without_function_modes():
        fake = mode or FakeTensorMode(allow_non_fake_inputs=True)
        yield [x if isinstance(x, FakeTensor) else fake.from_tensor(x.detach()) for x in inputs]


@contextmanager
def unseen_above(mode: Any) -> Iterator[None]:
    """Trace into the same graph from below torch.func's transforms, no longer from above all of torch."""
    pre_dispatch = torch._ops.unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    if pre_dispatch is None:  # we are there already
        yield
        return
    lower = ProxyTorchDispatchMode(mode.tracer, mode.tracing_mode, False, mode._allow_fake_constant)
    try:
        with lower:
            yield
    finally:
        torch._ops._set_mode_pre_dispatch(pre_dispatch)


@contextmanager
def without_function_modes() -> Iterator[None]:
    """All but the default device."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())][::-1]
    devices = [m for m in modes if isinstance(m, DeviceContext)]
    for m in devices:
        torch._C._push_on_torch_function_stack(m)
    try:
        yield
    finally:
        for _ in devices:
            torch._C._pop_torch_function_stack()
        for m in modes:
            torch._C._push_on_torch_function_stack(m)


def alone(node: fx.Node, around: AbstractContextManager[Any] | None = None) -> fx.GraphModule:
    """Trace a node's op by itself, as a function of the nodes that it takes, inside a context."""
    given = node.all_input_nodes

    def run(*tensors: Tensor) -> Any:
        with around or nullcontext():
            return applied(node, dict(zip(given, tensors, strict=True)).__getitem__)

    with out_of_sight():
        return make_fx(run, tracing_mode="real")(*(n.meta["val"] for n in given))


def between(tracer: Any, outs: list[Any], x: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of a trace from one tensor to others, as a function of that tensor and of what else the part reads."""
    copy, copies = fx.Graph(), dict[fx.Node, Any]()
    copy.graph_copy(tracer.graph, copies)
    copy.output((copies[x], *(copies[o] for o in outs)))
    back = {copies[n].name: n for n in tracer.graph.nodes}
    whole = functionalized(fx.GraphModule(tracer.root, copy), blame)
    at, *ends = results_of(whole.graph)
    read = needed(ends, beyond={at})
    leaves = [n for n in whole.graph.nodes if n in read and n is not at and n.op in ("placeholder", "get_attr")]
    inner = [n for n in whole.graph.nodes if n in read and n not in (at, *leaves)]

    def finish(_: fx.Graph, made: dict[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
        for node in inner:
            if node.target is aten.detach.default:
                made[node].target, made[node].args = stopped(made[node].args[0])
        return tuple(made[n] for n in ends)

    return fx.GraphModule({}, extract(inner, [at, *leaves], finish)), [back[n.name] for n in leaves]


def replayed(gm: fx.GraphModule, tensors: Sequence[Tensor]) -> list[Any]:
    """Run a graph op by op, so that the trace that is going on sees its ops."""
    at = evaluated(gm, tensors, value_of)
    return [None if n is None else at[n] for n in results_of(gm.graph)]


def value_of(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run the op of a node where autograd may watch: the function's own detach is none of autograd's."""
    if node.target is aten.detach.default:
        return stop_gradient(*args)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def blame(node: fx.Node, what: str, advice: str) -> NoReturn:
    raise TraceError(f"trace: {node.target} {what} inside a gradient; expected plain ops. {advice}")


def collect(gm: fx.GraphModule, closed: list[Tensor], own: dict[int, int]) -> None:
    """Note the tensors that a graph closes over; a number that it made itself stays a number."""
    for value, node in held_by(gm):
        if node.meta.get("fresh") and value.numel() == 1 and not isinstance(value, FakeTensor):
            emit, number = emitter(gm.graph, node), value.item()
            replace(node, emit(aten.full.default, list(value.shape), number, dtype=value.dtype, device=value.device))
        elif id(value) not in own and not any(value is x for x in closed):
            closed.append(value)


def opened(gm: fx.GraphModule, first: int, count: int, closed: list[Tensor], own: dict[int, int]) -> None:
    """Make inputs of closed-over tensors: after the function's own `count`, which stand after `first` others."""
    given = inputs_of(gm.graph)
    last, results, made = given[first + count - 1], given[first + count :], []
    for k, x in enumerate(closed):
        last = add_input(gm.graph, f"closed{k}", x, after=last)
        made.append(last)

    def stand_for(value: Tensor, node: fx.Node) -> fx.Node:
        at = next((n for n, x in zip(made, closed, strict=True) if x is value), None)
        return results[own[id(value)]] if id(value) in own else at  # type: ignore[return-value]

    lift(gm, stand_for)
    for name in [name for name, x in vars(gm).items() if isinstance(x, Tensor)] + [*gm._buffers, *gm._parameters]:
        delattr(gm, name)  # a kept function holds no tensors
    if first:
        output_of(gm.graph).args = ((*results_of(gm.graph), *[None] * len(closed)),)
    else:
        without_detach(gm.graph)
    cleaned(gm)


def ones_by_shape(nodes: Iterable[fx.Node]) -> None:
    """Autograd begins with ones like the sum that it differentiates: they do not read it."""
    for node in nodes:
        if node.target in (aten.ones_like.default, aten.zeros_like.default):
            x, number = node.meta["val"], float(node.target is aten.ones_like.default)
            node.target, node.args = aten.full.default, (list(x.shape), number)
            node.kwargs = {"dtype": x.dtype, "device": x.device}


def without_detach(graph: fx.Graph) -> None:
    """A detached tensor is that tensor, where gradients are not asked for, or are taken already."""
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        replace(node, node.args[0])  # type: ignore[arg-type]

"""Gradients that somebody wrote: an op whose derivative is what its backward says, whatever its value is made of.

    kept(inputs, key, r) = forward(*inputs)[r]        its vjp: g -> backward_r(g, *inputs, *results)

Both are graphs of aten ops that hold no tensors, named by what they say, so that equal ones are one. The op is opaque:
what differentiates a graph meets the backward, and so does a second derivative, which is that of the backward's ops.
Once all derivatives are taken, `written_out` leaves the forward's ops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses import FakeTensorMode
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.graphs.edit import copied, inline, inputs_of, own_values, replace, results_of, without_dead
from dualform.graphs.operators import library
from dualform.graphs.this_thread import out_of_sight
from dualform.shapes import TraceError
from dualform.storages import memory_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Kept:
    """A function and its gradient.

    name: what people call it, as `Round.apply`; backward: one for each result, whose results are None for an input
    without gradient; None for a result without any. refusal: why it has no derivative, though its value may be used.
    """

    name: str
    forward: fx.GraphModule
    backward: tuple[fx.GraphModule | None, ...]
    refusal: str = ""

    def gradients(self, result: int, g: Tensor, inputs: Sequence[Tensor], out: Tensor, key: str) -> list[Tensor | None]:
        """The vjp of one result."""
        if self.refusal:
            raise TraceError(self.refusal)
        backward = self.backward[result]
        if backward is None:
            return [None] * len(inputs)
        return list(backward(g, *inputs, *self.results(result, inputs, out, key)))

    def results(self, result: int, inputs: Sequence[Tensor], out: Tensor, key: str) -> list[Tensor | None]:
        """All results, for a backward that reads them; those that it does not read are left out."""
        backward: Any = self.backward[result]
        read = [bool(n.users) for n in inputs_of(backward.graph)[1 + len(inputs) :]]
        return [
            (out if k == result else kept(list(inputs), key, k)) if is_read else None for k, is_read in enumerate(read)
        ]


_known: dict[str, Kept] = {}


def keep(made: Kept) -> str:
    """Give a function and its gradient a name for `kept`; equal ones have one."""
    graphs = [made.forward, *made.backward]
    with torch._C.DisableTorchFunction(), out_of_sight():
        for gm in filter(None, graphs):
            own_values(gm)
    said = "\n".join(_said(gm) for gm in graphs)
    key = f"{made.name}_{hashlib.sha256(f'{made.refusal}{said}'.encode()).hexdigest()[:16]}"
    _known.setdefault(key, made)
    return key


def _said(gm: fx.GraphModule | None) -> str:
    if gm is None:
        return "none"
    values = [n.meta["val"] for n in inputs_of(gm.graph) if "val" in n.meta]
    return f"{gm.code} {[(tuple(v.shape), v.dtype, str(v.device)) for v in values]}"


def named(key: str) -> Kept:
    """The function and its gradient behind a name."""
    return _known[key]


def kept(inputs: list[Tensor], key: str, result: int = 0) -> Tensor:
    """Call the op."""
    return torch.ops.dualform.kept.default(inputs, key, result)


def _forward(inputs: list[Tensor], key: str, result: int) -> Tensor:
    made = _known[key].forward(*inputs)[result]
    return made.clone() if memory_of(made) in map(memory_of, inputs) else made


library.define("kept(Tensor[] inputs, str key, int result) -> Tensor")
library.impl("kept", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("dualform::kept", _forward, lib=library)
kept_op = torch.ops.dualform.kept.default


class Vjp(_SingleLevelFunction):
    """The op and its gradient at one level of differentiation: torch's or a transform's."""

    @staticmethod
    def forward(ctx: Any, key: str, result: int, *inputs: Tensor) -> Tensor:
        """Go below this level."""
        with torch._C._AutoDispatchBelowAutograd():
            out = kept(list(inputs), key, result)
        ctx.key, ctx.result = key, result
        ctx.save_for_backward(*inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the backward, whose ops have derivatives of their own."""
        *inputs, out = ctx.saved_tensors
        return None, None, *named(ctx.key).gradients(ctx.result, g, inputs, out, ctx.key)


def _differentiable(inputs: list[Tensor], key: str, result: int = 0) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        with enable_single_level_autograd_function():
            return Vjp.apply(key, result, *inputs)  # type: ignore[attr-defined]
    with torch._C._AutoDispatchBelowAutograd():
        return kept(inputs, key, result)


library.impl("kept", _differentiable, "Autograd")


def _over_rows(info: Any, dims: Any, inputs: list[Tensor], key: str, result: int) -> tuple[Tensor, int]:
    if key == _STOPPED:  # of any shape
        return kept(inputs, key), dims[0][0]
    return kept(inputs, _mapped(key, tuple(dims[0]), inputs), result), 0


torch.library.register_vmap("dualform::kept", _over_rows, lib=library)


def _mapped(key: str, dims: tuple[int | None, ...], inputs: Sequence[Tensor]) -> str:
    """Map a function and its gradient over rows: each row has a gradient of its own, what rows share has their sum."""
    likes = [(tuple(x.shape), x.dtype, x.device) for x in inputs]
    one = named(key)

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(lambda *x: tuple(one.forward(*x)), dims)(*tensors)

    def backward(gm: fx.GraphModule, *tensors: Tensor) -> list[Tensor | None]:
        at = [k for k, made in enumerate(results_of(gm.graph)) if made is not None]
        over = (0, *dims, *[0] * (len(tensors) - 1 - len(dims)))
        found = torch.vmap(lambda *x: tuple(gm(*x)[k] for k in at), over)(*tensors) if at else ()
        all_rows: list[Tensor | None] = [None] * len(dims)
        for k, x in zip(at, found, strict=True):
            dim = dims[k]
            all_rows[k] = x.sum(0) if dim is None else x.movedim(0, dim)
        return all_rows

    def make() -> Kept:
        with FakeTensorMode(allow_non_fake_inputs=True):
            examples = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in likes]
        results = list(forward(*examples))
        backwards: list[fx.GraphModule | None] = []
        for gm, out in zip(one.backward, results, strict=True):
            given = [torch.empty_like(out), *examples, *results]
            backwards.append(None if gm is None else make_fx(partial(backward, gm), tracing_mode="real")(*given))
        return Kept(one.name, make_fx(forward, tracing_mode="real")(*examples), tuple(backwards), one.refusal)

    with ThreadPoolExecutor(1) as thread:  # where nothing is being mapped: a rule of vmap cannot begin another
        return keep(thread.submit(make).result())


def is_kept(node: Any) -> bool:
    """Is it a call of the op?"""
    return isinstance(node, fx.Node) and node.target is kept_op


def written_out(gm: fx.GraphModule, which: Callable[[fx.Node], bool] = is_kept) -> fx.GraphModule:
    """Write the op out as the forward's ops, for a graph that nobody differentiates any more."""
    if not any(which(n) for n in gm.graph.nodes):
        return gm
    gm = copied(gm)
    graph = gm.graph
    pending = [n for n in graph.nodes if which(n)]
    while pending:
        node = pending.pop()
        inputs, key, result = node.args
        results, made = inline(graph, node, _known[key].forward.graph, inputs)
        pending += [n for n in made if is_kept(n)]
        replace(node, results[result])
    without_dead(graph)
    return gm


_one = fx.symbolic_trace(lambda x0: (x0,))
_STOPPED = keep(Kept("stop_gradient", _one, (None,)))
CARRIED = keep(
    Kept("data", fx.symbolic_trace(lambda x0, x1: (x1,)), (fx.symbolic_trace(lambda x0, x1, x2, x3: (x0, None)),))
)


def once_only(x: Tensor, message: str) -> Tensor:
    """x, of which nobody may ask a derivative."""
    return kept([x], keep(Kept("once", _one, (None,), message)))


def stop_gradient(x: Tensor) -> Tensor:
    """The identity, with no gradient. (A trace drops aten's detach: autograd makes many.)"""
    return kept([x], _STOPPED)


def is_stopped(node: Any) -> bool:
    """Is it a call of `stop_gradient`?"""
    return is_kept(node) and node.args[1] == _STOPPED


def stopped(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """The call of `stop_gradient` in a graph."""
    return kept_op, ([x], _STOPPED, 0)


def carried(x: Any, data: Any) -> tuple[Any, tuple[Any, ...]]:
    """The call that has the value of `data` and the gradient of x: what autograd makes of x.data.copy_(data)."""
    return kept_op, ([x, data], CARRIED, 0)

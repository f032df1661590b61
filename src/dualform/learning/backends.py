"""How a part of a step is run: as it is, op by op, or compiled. Each backend is a record; all give the same numbers."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from dualform.catalogue import Catalogue, CatalogueError, near_misses, normalise
from dualform.graphs.edit import add_alike, without_dead, written
from dualform.graphs.kept import is_stopped

aten = torch.ops.aten
Run = Callable[..., Sequence[Tensor]]

backends = Catalogue("backends")
# States that the backward finds again need not be computed again, a tenth of its time; beyond this, memory counts more (LAB.md).
STATE_BYTES = 96 * 2**20
# Which arguments a result may be written over, and by what.
_over: dict[Any, tuple[tuple[int, ...], Any]] = {
    aten.add.Tensor: ((0, 1), torch.Tensor.add_), aten.sub.Tensor: ((0,), torch.Tensor.sub_),
    aten.mul.Tensor: ((0, 1), torch.Tensor.mul_), aten.neg.default: ((0,), torch.Tensor.neg_),
    aten.sigmoid.default: ((0,), torch.Tensor.sigmoid_), aten.baddbmm.default: ((0,), torch.Tensor.baddbmm_),
    aten.addcmul.default: ((0,), torch.Tensor.addcmul_), aten.tril.default: ((0,), torch.Tensor.tril_),
    aten.div.Tensor: ((0,), torch.Tensor.div_),
}  # fmt: skip
_makes = {aten.bmm.default, aten.clone.default, aten.rsub.Scalar}
_makes_several = {aten.native_layer_norm.default, aten.native_layer_norm_backward.default}
# Python's own entry points take two thirds of the time of an overload called by name.
_entries = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.div.Scalar: torch.div, aten.bmm.default: torch.bmm, aten.mm.default: torch.mm, aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean, aten.reshape.default: torch.reshape, aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze, aten.squeeze.dim: torch.squeeze, aten.squeeze.dims: torch.squeeze,
    aten.permute.default: torch.permute, aten.neg.default: torch.neg, aten.tanh.default: torch.tanh, aten.exp.default: torch.exp,
    aten.sigmoid.default: torch.sigmoid, aten.rsqrt.default: torch.rsqrt, aten.where.self: torch.where, aten.tril.default: torch.tril,
    aten.baddbmm.default: torch.baddbmm, aten.addcmul.default: torch.addcmul, aten.native_layer_norm.default: torch.native_layer_norm,
    aten.expand.default: torch.Tensor.expand,
}  # fmt: skip


class BackendError(ValueError):
    """A backend cannot run what it was given; the message says why. Where nobody chose it, eager runs instead."""


def backends_key(spec: Any, where: str = "program") -> str:
    """Write a backend, spelt in any way, as the one text that stands for it: `cpp`, `inductor {"blocks": 2}`, `auto`."""
    if isinstance(spec, str) and (spec == "auto" or spec in backends.names()):
        return spec
    if isinstance(spec, str) and normalise(spec) == "auto":
        return "auto"
    try:
        bound = backends.build(spec)
    except CatalogueError as error:
        known = ("auto", *backends.names())
        what = f"{where}: backend is {spec!r}; expected 'auto' or one of {backends.names()}, with options or without."
        hint = near_misses(spec, list(known)) if isinstance(spec, str) else str(error)
        raise BackendError(f"{what} {hint}") from None
    options = bound.to_json()
    name, plain = options.pop("name"), bound.record.options
    given = {option: value for option, value in options.items() if value != plain[option]}
    return f"{name} {json.dumps(given, sort_keys=True)}" if given else name


def backend_of(key: str) -> Backend:
    """Build the backend that a key stands for."""
    name, _, options = key.partition(" ")
    return backends[name](**json.loads(options or "{}")).build()


class Whole(Protocol):
    """What runs whole calls itself: the scan's two directions, with the same arguments and results."""

    def suits(self, plan: Any, call: Any) -> bool:
        """Is a call for this backend, where nobody chose one?"""
        ...

    def says(self, plan: Any) -> str:
        """Say in words which calls suit; nothing if none does."""
        ...

    def schedule(self, plan: Any, variant: Any) -> Any:
        """Say what will be run for a kind of block, direction by direction."""
        ...

    def step(self, plan: Any, call: Any, overwrite: bool) -> list[Tensor] | None:
        """Run one token, without gradients; overwrite: over the state given. None where `forward` is to do it."""
        ...

    def as_run(self, name: str, run: Any, backward: bool) -> tuple[str, tuple[str, ...]]:
        """Name the backend with what it chooses by a call's size, and what its code depends on beside the graphs: a compiler, a card."""
        ...

    def forward(self, run: Any, checkpoints: int) -> list[Tensor]: ...
    def backward(self, run: Any, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int) -> list[Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """How graphs become functions: `prepare(graph, make_examples)`.

    blocks: mini-batches that are compiled as one graph; a stretch of another length runs op by op. None: all do.
    whole: takes calls as they are instead.
    keep: a backward pass keeps every state of a call while they take at most so many bytes.
    """

    prepare: Callable[[fx.GraphModule, Callable[[], list[Tensor]]], Run]
    blocks: int | None = None
    whole: Whole | None = None
    keep: int = STATE_BYTES


@backends.record(name="eager", formula="the traced graphs, run op by op", source="the reference: any device, any dtype")
def eager() -> Backend:
    """Run graphs op by op, with a product and the sum it goes into as one op."""
    return Backend(_eager)


@backends.record(
    name="inductor", formula="some mini-batches as one graph, compiled", source="Ansel et al. 2024 (PyTorch 2)"
)
def inductor(blocks: int = 8) -> Backend:
    """Compile a few mini-batches at once with torch's inductor; the first call with a new batch takes about a minute."""
    if blocks < 1:
        raise ValueError(f"inductor: blocks is {blocks}; expected a number of mini-batches >= 1. Leave it out for 8.")
    return Backend(_inductor, blocks)


def _inductor(gm: fx.GraphModule, examples: Callable[[], list[Tensor]]) -> Run:
    from torch._inductor import compile as compiled  # seconds: not at `import dualform`

    _in_one_pass(gm.graph, {aten.bmm.default})
    for node in gm.graph.nodes:
        node.meta.clear()  # shapes of another number of rows
    inputs: list[Any] = list(examples())
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    with torch.no_grad():
        return compiled(gm, inputs, options={"cpp_wrapper": on_cpu})  # pyright: ignore[reportReturnType]: as the graph


def _eager(gm: fx.GraphModule, examples: Callable[[], list[Tensor]]) -> Run:
    _in_one_pass(gm.graph, {aten.bmm.default, aten.mul.Tensor})
    _reuse(gm.graph)
    for node in gm.graph.nodes:
        node.target = _entries.get(node.target, node.target) if node.op == "call_function" else node.target
    return written(gm)


def visible(gm: fx.GraphModule) -> Run:
    """Run a graph op by op and out of place, so that autograd and every transform see what is done."""
    for node in gm.graph.nodes:
        if is_stopped(node):
            node.target, node.args = torch.Tensor.detach, tuple(node.args[0])  # which cuts both modes, at every level
    return written(gm)


def _reuse(graph: fx.Graph) -> None:
    """Write a result over an argument that nothing else needs: no new memory, and what was just read is in cache."""
    for node in graph.nodes:
        places, target = _over.get(node.target, ((), None))
        for i in places[:1] if "alpha" in node.kwargs else places:  # x + alpha y is not y + alpha x
            x = node.args[i]
            if isinstance(x, fx.Node) and _fresh(x) and len(x.users) == 1 and node.args.count(x) == 1:
                old, new = x.meta["val"], node.meta["val"]
                if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
                    rest = [y for j, y in enumerate(node.args) if j != i]
                    node.target, node.args = target, (x, *rest)
                    break


def _fresh(node: fx.Node) -> bool:
    """Does a node's value have memory of its own?"""
    if node.target is operator.getitem:
        return node.args[0].target in _makes_several  # pyright: ignore
    return node.target in _over or node.target in _makes or any(node.target is t for _, t in _over.values())


def _in_one_pass(graph: fx.Graph, products: set[Any]) -> None:
    """Write x + a @ b, and x + a * b, as one op: one pass over memory."""
    for node in reversed(list(graph.nodes)):
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            _accumulate(graph, node, products)
    without_dead(graph)


def _accumulate(graph: fx.Graph, node: fx.Node, products: set[Any]) -> None:
    left, right = node.args
    sign = -1 if node.target == aten.sub.Tensor else 1
    for total, product, scale in ((left, right, sign), *([(right, left, 1)] if sign > 0 else [])):
        if (
            not (isinstance(product, fx.Node) and isinstance(total, fx.Node))
            or len(product.users) > 1
            or product.kwargs
            or product.target not in products
            or len({x.meta["val"].dtype for x in (node, total, *product.all_input_nodes) if "val" in x.meta}) > 1
        ):
            continue
        full = product.meta["val"].shape == node.meta["val"].shape
        if product.target == aten.bmm.default and full:
            target, name = aten.baddbmm.default, "alpha"
        elif product.target == aten.mul.Tensor and isinstance(product.args[1], fx.Node):
            target, name = aten.addcmul.default, "value"
        else:
            continue
        options = {name: scale} if scale != 1 else {}
        node.replace_all_uses_with(add_alike(graph, node, target, total, *product.args, **options))
        return

"""Write down the ops that a function of tensors runs, below autograd and vmap: a graph of plain aten ops.

Tensors in a recording have a shape and a dtype and no numbers: they seem to be on the CPU, and run on torch's meta device. torch's own
tracer (make_fx) does the same for more kinds of functions at ten times the price; here a function is our own.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]
_META, _CPU = torch.device("meta"), torch.device("cpu")


class CannotRecord(Exception):
    """The function writes to a tensor that others see, or reads values."""


class Recorded(Tensor):
    """A tensor of a recording: its shape as a meta tensor, and the node that makes it."""

    shape_of: Tensor
    node: fx.Node

    @staticmethod
    def __new__(cls, value: Tensor, node: fx.Node) -> Recorded:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=_CPU,
        )
        self.shape_of, self.node = value, node
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside its recording")


def _twin(func: Any) -> Any:
    """Find the op that does the same and is not in place: of the same arguments, as pow_.Scalar is pow.Tensor_Scalar."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    for overload in [] if packet is None else sorted(packet.overloads(), key=func._overloadname.__ne__):
        twin = getattr(packet, overload)
        if [str(a.type) for a in twin._schema.arguments] == [str(a.type) for a in func._schema.arguments]:
            return twin
    return None


class Recorder(TorchDispatchMode):
    """Record every op into `graph`; ops in `table` run by their definition instead."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.storages: Counter[int] = Counter()  # tensors that were ever of one memory; nodes keep them alive
        self.constants: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = self.table.get(func)
        if written is not None:
            with self:
                result = written(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._can_decompose():  # as below a definition of the table, where dispatch has gone past this
            with self:
                return func.decompose(*args, **kwargs)
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        made = func(*_each(args, _shape), **{name: _shape(_each(x, _shape)) for name, x in kwargs.items()})
        if not isinstance(made, Tensor | tuple | list | None):  # of dtypes or sizes
            return made
        node = self._call(func, _each(args, self._node), {name: _each(x, self._node) for name, x in kwargs.items()})
        return self._wrapped(made, node)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an op in place by its twin that is not, where nobody else sees the tensor."""
        twin, x = _twin(func), args[0] if args else None
        if twin is None or not isinstance(x, Recorded) or self.storages[_storage(x.shape_of)] > 1:
            raise CannotRecord(str(func))
        with self:
            result = twin(*args, **kwargs)
        if result.shape != x.shape or result.dtype != x.dtype:
            raise CannotRecord(str(func))
        x.node = result.node
        return x

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        name = getattr(getattr(func, "overloadpacket", func), "__name__", None)
        return self.graph.create_node("call_function", func, args, kwargs, name=name)

    def input(self, like: Tensor, name: str) -> Recorded:
        """Add an input."""
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=_META)
        return self._wrapped(made, self.graph.placeholder(name))

    def _wrapped(self, made: Any, node: fx.Node) -> Any:
        if isinstance(made, Tensor):
            node.meta["val"] = made = made if made.device == _META else made.to(_META)
            self.storages[_storage(made)] += 1
            return Recorded(made, node)
        if isinstance(made, tuple | list):
            node.meta["val"] = made
            return tuple(self._wrapped(x, self._call(operator.getitem, (node, n), {})) for n, x in enumerate(made))
        return None

    def _node(self, x: Any) -> Any:
        if isinstance(x, Recorded):
            return x.node
        return self._constant(x) if isinstance(x, Tensor) else x

    def _constant(self, x: Tensor) -> fx.Node:
        name = next((n for n, held in self.constants.items() if held is x), f"constant{len(self.constants)}")
        self.constants[name] = x
        setattr(self.root, name, x)
        node = self.graph.get_attr(name)
        node.meta["val"] = x.to(_META)
        return node


def _each(x: Any, f: Callable[[Any], Any]) -> Any:
    """Map an argument, or the entries of a list of them."""
    return type(x)(_each(v, f) for v in x) if isinstance(x, list | tuple) else f(x)


def _shape(x: Any) -> Any:
    if isinstance(x, Recorded):
        return x.shape_of
    return _META if isinstance(x, torch.device) else x.to(_META) if isinstance(x, Tensor) else x


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def record(f: Callable[..., Any], tensors: Sequence[Tensor], table: Table) -> fx.GraphModule:
    """Record a function of tensors that returns a list of tensors, outside any grad mode or autocast of the caller.

    gm(*tensors) == f(*tensors); every node has `meta["val"]`, a meta tensor of its shape.
    Raises: CannotRecord for writes to what others see, for results that are no tensors, and for tensors from outside.
    """
    recorder = Recorder(table)
    inputs = [recorder.input(x, f"arg{n}_1") for n, x in enumerate(tensors)]
    with torch.enable_grad(), torch.autocast(_CPU.type, enabled=False), recorder:
        results = f(*inputs)
    recorder.graph.output(_each(results, recorder._node))
    with _use_lazy_graph_module(True):
        return fx.GraphModule(recorder.root, recorder.graph)


def node_of(x: Tensor) -> fx.Node | None:
    """Find the node of a tensor in a recording that is going on."""
    return x.node if isinstance(x, Recorded) else None


def recorded_so_far() -> list[fx.Node]:
    """List the nodes of the recording that is going on."""
    mode = _get_current_dispatch_mode()
    return list(mode.graph.nodes) if isinstance(mode, Recorder) else []

"""Write down the ops that a function of tensors runs, below autograd and vmap: a graph of plain aten ops.

Tensors in a recording have a shape and a dtype and no numbers: they seem to be on the CPU, and run on torch's meta
device. torch's own tracer (make_fx) does the same for more kinds of functions at ten times the price; here a function
is our own.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, disable_autocast_cache, make_fx
from torch.fx.node import _side_effectful_need_to_be_preserved_pre_dispatch, map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from dualform.graphs.edit import Graph, unwritten
from dualform.graphs.hollow import CPU, META, Hollow, Hollows, blank, computed, each, is_reshaped, leaves_in, on_meta
from dualform.graphs.this_thread import caller, no_modes
from dualform.ops.truths import OPERATORS
from dualform.storages import memory_of

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]


class CannotRecord(Exception):
    """The function writes to a tensor that others see, or reads values."""


class WritesOutside(CannotRecord):
    """The function writes to a tensor that was there before it: torch's own tracer would run that."""


class Recorded(Hollow):
    """A tensor of a recording: hollow, and made by a node."""

    node: fx.Node
    writes: list[int]  # how often its memory was written to, the same list for all views of it

    @staticmethod
    def __new__(cls, value: Tensor, node: fx.Node, writes: list[int] | None = None) -> Recorded:
        self: Any = Hollow.__new__(cls, value)
        self.node, self.writes = node, [0] if writes is None else writes
        return self


def twin_of(func: Any) -> Any:
    """Find the op of the same arguments that is not in place, as pow_.Scalar is pow.Tensor_Scalar."""
    name: str = func._schema.name.removeprefix("aten::")
    name = OPERATORS.get(name) or name
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    for overload in [] if packet is None else sorted(packet.overloads(), key=func._overloadname.__ne__):
        twin = getattr(packet, overload)
        if [str(a.type) for a in twin._schema.arguments] == [str(a.type) for a in func._schema.arguments]:
            return twin
    return None


@cache
def _name_of(func: Any) -> str | None:
    name = getattr(getattr(func, "overloadpacket", func), "__name__", None)
    return name and fx.Graph()._target_to_str(name)


@cache
def _is_composite(func: Any) -> bool:
    return func._can_decompose()


class _Writing:
    """What writes a graph down, and the tensors that it finds."""

    prefix = "constant"

    def _begin(self) -> None:
        self.graph, self.root = Graph(), torch.nn.Module()
        self.constants: dict[str, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles while this records: torch need not load its compiler to be told so."""
        return False

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", func, args, kwargs, name=_name_of(func))

    def _node(self, x: Any) -> Any:
        if isinstance(x, Recorded):
            return x.node
        return self._constant(x) if isinstance(x, Tensor) else x

    def _constant(self, x: Tensor) -> fx.Node:
        name = next((n for n, held in self.constants.items() if held is x), f"{self.prefix}{len(self.constants)}")
        self.constants[name] = x
        setattr(self.root, name, x)
        node = self.graph.get_attr(name)
        node.meta["val"] = self._shown(on_meta(x))
        return node

    def _shown(self, x: Tensor) -> Tensor:
        return x

    def made(self, results: Any) -> fx.GraphModule:
        """End the recording."""
        self.graph.output(results)
        return unwritten(self.root, self.graph)


class Recorder(_Writing, TorchDispatchMode):
    """Record every op into `graph`; ops in `table` run by their definition instead."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.storages: Counter[int] = Counter()  # tensors that were ever of one memory; nodes keep them alive
        self._begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = self.table.get(func)
        if written is not None:
            with self:
                result = written(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if _is_composite(func):  # as below a definition of the table, where dispatch has gone past this
            with self:
                return func.decompose(*args, **kwargs)
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        made = computed(func, args, kwargs)
        if not isinstance(made, Tensor | tuple | list | None):  # of dtypes or sizes
            return made
        node = self._call(func, each(args, self._node), {name: each(x, self._node) for name, x in kwargs.items()})
        return self._wrapped(made, node)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an op in place by its twin that is not, where nobody else sees the tensor."""
        twin, x = twin_of(func), args[0] if args else None
        if twin is not None and isinstance(x, Recorded) and is_reshaped(func):
            return self._reshaped(func, twin, args, kwargs)
        if twin is None or not isinstance(x, Recorded) or self.storages[memory_of(x.shape_of)] > 1:
            raise CannotRecord(str(func))
        with self:
            result = twin(*args, **kwargs)
        if result.shape != x.shape or result.dtype != x.dtype:
            raise CannotRecord(str(func))
        x.node = result.node
        return x

    def _reshaped(self, func: Any, twin: Any, args: Any, kwargs: Any) -> Recorded:
        """Record that a tensor is its own view from now on, as rules of vmap write it: nobody else sees that."""
        x = args[0]
        with self:
            result = twin(*args, **kwargs)
        self.storages[memory_of(result.shape_of)] -= 1  # that view is this tensor
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        x.node, x.shape_of = result.node, result.shape_of
        return x

    def input(self, like: Tensor, name: str) -> Recorded:
        """Add an input."""
        return self._wrapped(blank(like, META), self.graph.placeholder(name))

    def _wrapped(self, made: Any, node: fx.Node) -> Any:
        if isinstance(made, Tensor):
            node.meta["val"] = made = made if made.device == META else made.to(META)
            self.storages[memory_of(made)] += 1
            return Recorded(made, node)
        if isinstance(made, tuple | list):
            node.meta["val"] = made
            return tuple(self._wrapped(x, self._call(operator.getitem, (node, n), {})) for n, x in enumerate(made))
        return None


def record(f: Callable[..., Any], tensors: Sequence[Tensor], table: Table) -> fx.GraphModule:
    """Record a function of tensors that returns a list of tensors, outside any grad mode or autocast of the caller.

    gm(*tensors) == f(*tensors); every node has `meta["val"]`, a meta tensor of its shape.
    Raises: CannotRecord for writes to what others see, for results that are no tensors, and for tensors from outside.
    """
    recorder = Recorder(table)
    inputs = [recorder.input(x, f"arg{n}_1") for n, x in enumerate(tensors)]
    with torch.enable_grad(), torch.autocast(CPU.type, enabled=False), recorder:
        results = f(*inputs)
    return recorder.made(each(results, recorder._node))


def below_dispatch(f: Callable[..., Any], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Trace a function as the basic ops that it comes to."""
    if all(isinstance(x, Hollow) for x in tensors):
        try:
            return record(f, tensors, {})
        except (CannotRecord, RuntimeError):  # torch's own tracer knows more
            pass
    with no_modes():
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = [blank(x, CPU) if isinstance(x, Hollow) else x for x in tensors]
        return make_fx(f, tracing_mode="real")(*tensors)


class AsCalled(_Writing, ProxyTorchDispatchMode):
    """Record every op as it is called: above autograd, autocast and the definitions of composite ops.

    Where torch's own tracer knows more than this, and it would have to guess, it gives up: CannotRecord.
    """

    prefix = "_tensor_constant"

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # the other loads torch's compiler
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack = []
        self.writes: dict[int, list[int]] = {}  # by memory; nodes keep it alive
        self.outside: dict[int, tuple[Tensor, Hollow]] = {}  # tensors that were there, with their twins
        self._begin()

    def input(self, like: Tensor, name: str) -> Recorded:
        """Add an input."""
        made = on_meta(like).clone()
        node = self.graph.placeholder(name)
        node.meta["val"] = self._shown(made)
        return self._recorded(made, node)

    def _recorded(self, made: Tensor, node: fx.Node) -> Recorded:
        return Recorded(made, node, self.writes.setdefault(memory_of(made), [0]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = leaves_in(args, kwargs)
        if torch.Tag.data_dependent_output in func.tags or any(_is_strange(x) for x in given):
            raise CannotRecord(str(func))
        writes = [k for k, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        is_plain = writes == [0] and isinstance(args[0], Tensor) and len(func._schema.returns) == 1
        if writes and (not is_plain or is_reshaped(func)):
            raise CannotRecord(str(func))
        if func is aten.lift_fresh.default:
            func = aten.lift_fresh_copy.default
        hollow = (each(args, self._hollow), {name: each(x, self._hollow) for name, x in kwargs.items()})
        if writes and memory_of(hollow[0][0].shape_of) in {memory_of(x.shape_of) for _, x in self.outside.values()}:
            raise WritesOutside(str(func))
        if writes and not isinstance(args[0], Recorded):
            raise CannotRecord(str(func))
        with torch._C._DisablePythonDispatcher(), Hollows():
            if any(isinstance(x, Tensor) for x in given):
                made = func(*hollow[0], **hollow[1])
            else:
                made = each(computed(func, *hollow), lambda x: Hollow(x) if isinstance(x, Tensor) else x)
        if writes:
            args[0].writes[0] += 1
        if not any(isinstance(x, Tensor) for x in leaves_in(made)):
            return made
        if not writes and any(made is x for x in given):  # as `to` gives what is so: with its gradient, in any mode
            return made
        node = self._call(func, each(args, self._node), {name: each(x, self._node) for name, x in kwargs.items()})
        return self._followed(made, node)

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = super()._call(func, args, kwargs)
        node.meta["stack_trace"] = caller.line
        return node

    def _shown(self, x: Tensor) -> Tensor:
        return Hollow(x)

    def _hollow(self, x: Any) -> Any:
        if isinstance(x, Hollow) or not isinstance(x, Tensor):
            return x
        return self.outside.setdefault(id(x), (x, Hollow(on_meta(x))))[1]

    def switched(self, func: Any, *args: Any) -> None:
        """Record a function that changes a mode of torch and makes no tensor."""
        self._call(func, args, {}).meta["val"] = None
        func(*args)

    def _followed(self, made: Any, node: fx.Node) -> Any:
        """Let a node be what made the tensors of a result; one that was there, as of an op in place, is it from now."""
        if isinstance(made, tuple | list):
            parts = [self._followed(x, self._call(operator.getitem, (node, n), {})) for n, x in enumerate(made)]
            node.meta["val"] = tuple(self._shown(x.shape_of) if isinstance(x, Hollow) else x for x in made)
            return (list if isinstance(made, list) else tuple)(parts)
        if not isinstance(made, Hollow):
            return made
        node.meta["val"] = self._shown(made.shape_of)
        if not isinstance(made, Recorded):
            return self._recorded(made.shape_of, node)
        made.node = node
        return made

    def result(self, x: Any) -> Any:
        """A function's result as a graph gives it out."""
        if not isinstance(x, Tensor | int | float | complex | str | bool | None):
            raise CannotRecord(type(x).__name__)
        return self._node(x)


def _is_strange(x: Any) -> bool:
    """Is it an argument of a kind that stands for more than a shape on the CPU?"""
    if isinstance(x, torch.device):
        return x.type != "cpu"
    if not isinstance(x, Tensor):
        return isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool | torch.Generator)
    plain = isinstance(x, Hollow) or type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return not plain or x.device.type != "cpu" or x.layout != torch.strided or x.is_complex() or x.is_quantized


def record_as_called(f: Callable[..., Any], names: Sequence[str], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Record a function of tensors as it calls torch: composite ops and ops in place stand as they are.

    Raises: CannotRecord, and whatever the function raises.
    """
    if any(not isinstance(x, Tensor) or _is_strange(x) for x in tensors):
        raise CannotRecord("inputs")
    recorder = AsCalled()
    inputs = [recorder.input(x, name) for name, x in zip(names, tensors, strict=True)]
    with enable_python_dispatcher(), _Switches(recorder), recorder, disable_autocast_cache():
        results = f(*inputs)
    return recorder.made(map_aggregate(results, recorder.result))


class _Switches(TorchFunctionMode):
    """See what switches gradients, autocast or a transform on and off."""

    def __init__(self, recorder: AsCalled) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return self.recorder.switched(func, *args)
        is_transform = "predispatch" in getattr(func, "__module__", "")
        if is_transform or func in _side_effectful_need_to_be_preserved_pre_dispatch:
            raise CannotRecord(str(func))
        return func(*args, **kwargs or {})


def recorded_so_far() -> list[fx.Node]:
    """List the nodes of the recording that is going on."""
    mode = _get_current_dispatch_mode()
    return list(mode.graph.nodes) if isinstance(mode, Recorder) else []

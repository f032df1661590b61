"""What of a function is not ops: its own gradients. A Function, a hook or a checkpoint becomes a node of the trace.

    y = Round.apply(x)        ->    y = kept([x], "Round.apply", 0), its backward traced beside its forward
    h.register_hook(f)        ->    every use of h, before and after, is one of kept([h], "hook f", 0)

While a trace runs, `torch.autograd.Function` asks here first; on other threads, and inside a transform, it is torch's own.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function, FunctionCtx, _is_setup_context_defined, _SingleLevelFunction
from torch.autograd.function import once_differentiable as _once
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    _ProxyTensor,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    set_proxy_slot,
)
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction

from dualform.graphs.edit import (
    add_input,
    add_plain,
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
from dualform.graphs.hollow import Hollow
from dualform.graphs.kept import Kept, Vjp, keep, kept, kept_op, named, stop_gradient, stopped, written_out
from dualform.graphs.recorder import CannotRecord
from dualform.shapes import TraceError

aten = torch.ops.aten
Trace = Callable[..., fx.GraphModule]
_ONCE = _once(lambda ctx: None).__code__
_LIVE = "_dualform_requires_grad"


class _Listening(threading.local):
    """The traces of a thread, innermost last."""

    def __init__(self) -> None:
        self.to: list[Listener] = []


_listening = _Listening()
_lock = threading.Lock()
_count = 0


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand this thread's Functions to a trace; the last one out leaves torch as it was."""
    global _count
    with _lock:
        _count += 1
        setattr(_SingleLevelFunction, "apply", classmethod(_applied))  # noqa: B010
    _listening.to.append(listener)
    try:
        yield
    finally:
        _listening.to.pop()
        with _lock:
            _count -= 1
            if not _count:
                delattr(_SingleLevelFunction, "apply")  # torch's own is the base's


def _applied(cls: Any, *args: Any) -> Any:
    listener = _listening.to[-1] if _listening.to else None
    if listener is None or cls is Vjp or cls.__module__.startswith("torch._library") or listener.is_transformed:
        return torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)(*args)
    return listener.function(cls, args)


class Context(FunctionCtx):
    """What a Function's forward leaves for its backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.to_save: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Tensor, ...] = ()
        self.dirty_tensors: tuple[Tensor, ...] = ()
        self.materialize_grads = True

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What was saved."""
        return tuple(self.to_save)

    def read(self, results: dict[int, Tensor]) -> None:
        """Let what refers to a result, by its identity, mean that result as it was given out."""
        for name, value in vars(self).items():
            setattr(self, name, pytree.tree_map(lambda x: results.get(id(x), x), value))


class Listener:
    """The gradients that the function of one trace defines."""

    def __init__(self, trace: Trace, note: Callable[[], str], depth: int) -> None:
        self.trace = trace
        self.note = note  # writes the caller's line into the next node, and gives it as text
        self.depth = depth
        self.hooked: dict[fx.Node, tuple[fx.Node, tuple[Any, ...]]] = {}  # what a tensor was before, and its hooks

    @property
    def is_transformed(self) -> bool:
        """Is a torch.func transform active that was not when the trace began?"""
        return transforms() != self.depth

    # -- what requires a gradient

    def begin(self, inputs: Sequence[Any]) -> None:
        """Take the inputs of the function that is traced."""
        for x in inputs:
            self.input(x)
        self.given = {n: x for x in inputs if (n := _node(x)) is not None}

    def input(self, x: Any) -> None:
        """What is made of inputs requires a gradient, if it can."""
        if isinstance(x, FakeTensor | Hollow) and can_move(x):
            setattr(x, _LIVE, True)

    def marked(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """What is made of what requires a gradient requires one, where gradients are on; inference mode makes constants."""
        if torch.is_inference_mode_enabled():
            return pytree.tree_map_only(Tensor, lambda x: x.detach() if can_move(x) else x, result)
        leaves = pytree.tree_leaves((args, kwargs)) if func not in _DETACH and torch.is_grad_enabled() else []
        if any(isinstance(x, Tensor) and requires_grad(x) for x in leaves):
            for x in pytree.tree_leaves(result):
                self.input(x)
        return result

    # -- Functions

    def transform(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Begin or end a transform unseen: torch's tracer makes nodes of that for torch.export (2.11: always), a graph of ops has none."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)

        return run

    def function(self, cls: Any, args: tuple[Any, ...]) -> Any:
        """Apply a Function: what it computes, with the gradient that it defines."""
        if _is_checkpoint(cls):
            return _checkpointed(cls, args)
        where = self.note()
        name = f"{cls.__qualname__.split('.')[-1]}.apply"
        if cls.__name__ == "BackwardHookFunction":
            raise TraceError(
                f"trace: `{where}` calls a module with a backward hook; expected gradients that the module's own forward "
                "says. Remove the hook, or register one on a tensor in forward: h.register_hook(...)."
            )
        needs = tuple(isinstance(a, Tensor) and requires_grad(a) for a in args)
        if not any(needs) or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return _Called(cls, args, needs, where).result()
        called = _Called(cls, args, needs, where)
        results = self.keep(name, called.forward, called.backward, called.tensors)
        return called.rebuilt(results)

    # -- hooks

    def hook(self, h: Tensor, f: Callable[[Tensor], Tensor | None]) -> _Handle:
        """Let the gradient of a tensor go through a function, after those that it goes through already."""
        where, node = self.note(), _node(h)
        if not requires_grad(h) or node is None:
            raise TraceError(
                f"trace: `{where}` hooks a tensor that requires no gradient; expected one that depends on an input. "
                "Guard it with `if h.requires_grad:`."
            )
        raw, earlier = self.hooked.get(node, (node, ()))
        hooks = (*earlier, f)
        maker = _Maker.of(raw)

        def backward(k: int, g: Tensor, given: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor | None]:
            for each in hooks:
                found = each(g)
                g = g if found is None else fitted(found, results[0], where)
            return [g] if maker is None else maker.pull(g, given, results[0])

        name = f"hook {getattr(f, '__name__', 'f')}"
        given = [h] if maker is None else maker.values
        forward = (lambda x: (x,)) if maker is None else maker.forward
        key, inputs = self._keep(name, forward, [backward], given, {id(h): 0})
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        operands = [raw] if maker is None else maker.nodes
        operands = [*operands, *(_operand(tracer, x) for x in inputs[len(given) :])]
        new = _hooked(tracer.graph, raw, node, key, operands, where)
        self.hooked[new] = (raw, hooks)
        set_proxy_slot(h, tracer, _ProxyTensor(fx.Proxy(new, tracer), None))
        return _Handle(where)

    # -- gradients taken inside

    def sees(self, args: Any) -> bool:
        """Is a call one of the trace's own, and not of a transform's tensors?"""
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]
        return not self.is_transformed and not any(
            isinstance(x, Tensor) and wrapped(x) for x in pytree.tree_leaves(args)
        )

    def below(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call inside a torch.func transform: the trace sees what the transform makes of it."""
        mode: Any = get_proxy_mode()
        before = len(mode.tracer.graph.nodes)
        if func in _DETACH or func == DATA:
            func = stop_gradient
        with _below_dispatch(mode):
            result = func(*args, **kwargs)
        new = list(mode.tracer.graph.nodes)[before:]
        for node in new:
            if node.target is aten.detach.default:  # autograd's own: it keeps results so
                node.target = aten.alias.default
        _ones_by_shape(new)
        return result

    def gradient(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None,
        create_graph: bool = False, only_inputs: bool = True, allow_unused: bool | None = None,
        is_grads_batched: bool = False, materialize_grads: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """torch.autograd.grad: the part of the trace between inputs and outputs is differentiated, and that is traced."""
        where = self.note()
        outs, ins = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
        seeds = [grad_outputs] if grad_outputs is None or isinstance(grad_outputs, Tensor) else list(grad_outputs)
        nodes = [_node(x) for x in ins]
        known = all(requires_grad(x) and _node(x) is not None for x in [*outs, *ins])
        if is_grads_batched or not known or any(n in self.hooked for n in nodes):
            why = (
                "is batched"
                if is_grads_batched
                else "is of a hooked tensor"
                if known
                else "is of tensors without gradient"
            )
            raise TraceError(
                f"trace: `{where}` {why}; expected a gradient of what depends on an input, by a tensor that it depends on. "
                "Call h.requires_grad_() on that tensor, or differentiate the function from outside."
            )
        seeds = [None] * len(outs) if grad_outputs is None else seeds
        found = [self._slope(outs, x, seeds, where) for x in ins]
        if any(x is None for x in found) and not (allow_unused or materialize_grads):
            raise TraceError(
                f"trace: `{where}` differentiates by a tensor that the result does not depend on; expected one that it does. "
                "Pass allow_unused=True or materialize_grads=True."
            )
        if materialize_grads:
            found = [torch.zeros_like(x) if g is None else g for x, g in zip(ins, found, strict=True)]
        return tuple(g if g is None or create_graph else g.detach() for g in found)

    def _slope(self, outs: list[Tensor], x: Tensor, seeds: list[Any], where: str) -> Tensor | None:
        """The gradient of some tensors of the trace by another."""
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        part, leaves = _between(tracer, [_node(o) for o in outs], _node(x))
        rest = [self.given[n] if n.op == "placeholder" else getattr(tracer.root, str(n.target)) for n in leaves]
        given = [s for s in seeds if s is not None]

        def joint(x: Tensor, *tensors: Tensor) -> list[Tensor | None]:
            at, more = x.detach().requires_grad_(), iter(tensors[len(rest) :])
            made = part(at, *tensors[: len(rest)])
            cotangents = [None if s is None else next(more) for s in seeds]
            live = [k for k, o in enumerate(made) if o.requires_grad]
            if not live:
                return [None]
            outs, given = [made[k] for k in live], [cotangents[k] for k in live]
            return list(torch.autograd.grad(outs, at, given, create_graph=True, allow_unused=True))

        with aside([x, *rest, *given]) as stand_ins, torch.enable_grad():
            try:
                made = functionalized(make_fx(joint, tracing_mode="real")(*stand_ins), _blame)
            except RuntimeError as error:
                raise TraceError(
                    f"trace: `{where}` failed with {error}; expected a gradient that torch can take."
                ) from error
        _without_detach(made.graph)
        _ones_by_shape(made.graph.nodes)
        made.graph.eliminate_dead_code()
        (found,) = replayed(made, [x, *rest, *given])
        if found is not None:
            self.input(found)
        return found

    # -- making a node

    def keep(self, name: str, forward: Callable[..., Any], backward: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Trace a function and its backward aside, and call them as one node for each result."""
        key, given = self._keep(name, forward, backward, inputs, {})
        made = []
        for k, back in enumerate(named(key).backward):
            x = kept(given, key, k)
            if back is not None:
                self.input(x)
            made.append(x)
        return made

    def _keep(
        self, name: str, forward: Callable[..., Any], backward: Any, inputs: Sequence[Tensor], own: dict[int, int]
    ) -> tuple[str, list[Tensor]]:
        """The key of a function and its backward, and their inputs: those given and the tensors that they close over.

        own: which tensor, by its identity, is which result
        """
        closed: list[Tensor] = []
        with aside(inputs) as stand_ins:
            made = self.trace(lambda *x: tuple(forward(*x)), *stand_ins)
            results = [n.meta["val"] for n in results_of(made.graph)]
            backwards: Any = backward() if callable(backward) else backward
            pulled: list[fx.GraphModule | None] = []
            count = len(stand_ins)
            for k, f in enumerate(backwards):

                def pull(*x: Tensor, k: int = k, f: Any = f) -> tuple[Any, ...]:
                    return tuple(f(k, x[0], x[1 : 1 + count], x[1 + count :]))

                examples = [results[k], *stand_ins, *results]
                pulled.append(None if f is None else self.trace(pull, *examples))
        made = written_out(made)  # nobody differentiates a forward
        graphs = [made, *(gm for gm in pulled if gm is not None)]
        for gm in graphs:
            _collect(gm, closed, own)
        for gm in graphs:
            _open(gm, 0 if gm is made else 1, count, closed, own)
        return keep(Kept(name, made, tuple(pulled))), [*inputs, *closed]


def _is_checkpoint(cls: Any) -> bool:
    """It computes the same again later, with the same gradient."""
    return cls.__module__ == "torch.utils.checkpoint"


def _checkpointed(cls: Any, args: tuple[Any, ...]) -> Any:
    return args[0](*args[2:]) if cls is CheckpointFunction else cls.forward(*args)  # 2.11: one that keeps its inputs


class Plain(Listener):
    """The listener of a recording that holds nothing but ops: it gives up where a function defines or takes a gradient."""

    def begin(self, inputs: Sequence[Any]) -> None:
        """Take the inputs of the function that is traced."""
        for x in inputs:
            self.input(x)

    def function(self, cls: Any, args: tuple[Any, ...]) -> Any:
        """Apply a checkpoint."""
        return _checkpointed(cls, args) if _is_checkpoint(cls) else self._give_up()

    def transform(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Give up."""
        self._give_up()

    def hook(self, h: Tensor, f: Callable[[Tensor], Tensor | None]) -> Any:
        """Give up."""
        self._give_up()

    def below(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give up."""
        self._give_up()

    def gradient(self, *args: Any, **kwargs: Any) -> Any:
        """Give up."""
        self._give_up()

    def _give_up(self) -> NoReturn:
        raise CannotRecord(self.note())


class _Called:
    """One call of a Function: its forward, and for each result its backward, as functions of the tensors among its arguments."""

    def __init__(self, cls: Any, args: tuple[Any, ...], needs: tuple[bool, ...], where: str) -> None:
        self.cls, self.args, self.needs, self.where = cls, args, needs, where
        self.places = [k for k, a in enumerate(args) if isinstance(a, Tensor)]
        self.tensors: list[Tensor] = [args[k] for k in self.places]
        self.single = False
        self.entries: list[Any] = []  # what forward gives; where it is a tensor, its place among the results
        self.moves: list[bool] = []  # which results have a gradient

    def run(self, tensors: Sequence[Tensor], ctx: Context) -> tuple[Any, ...]:
        """Run the author's forward."""
        args = list(self.args)
        for k, x in zip(self.places, tensors, strict=True):
            args[k] = x
        with torch.no_grad():
            if _is_setup_context_defined(self.cls.setup_context):
                out = self.cls.forward(*args)
                self.cls.setup_context(ctx, tuple(args), out)
            else:
                out = self.cls.forward(ctx, *args)
        self.single = not isinstance(out, tuple)
        return (out,) if self.single else out

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results."""
        ctx = Context(self.needs)
        found = self.run(tensors, ctx)
        still = [id(x) for x in ctx.non_differentiable]
        results = [x for x in found if isinstance(x, Tensor)]
        self.entries = [
            len([y for y in found[:k] if isinstance(y, Tensor)]) if isinstance(x, Tensor) else [x]
            for k, x in enumerate(found)
        ]
        self.moves = [can_move(x) and id(x) not in still for x in results]
        return tuple(results)

    def backward(self) -> list[Callable[..., Any] | None]:
        """How each result is pulled back; None where there is nothing to pull."""
        return [self.pull if moves else None for moves in self.moves]

    def pull(self, k: int, g: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor | None]:
        """The author's backward for a gradient of one result, the others' being zero."""
        user: Any = self.cls.vjp if self.cls.vjp is not Function.vjp else self.cls.backward
        if user is Function.backward:
            raise TraceError(
                f"trace: `{self.where}` has no backward; expected one, which torch's gradients need too. Write it, or use plain ops."
            )
        if getattr(user, "__code__", None) is _ONCE:
            user, message = (
                user.__wrapped__,
                f"trace: `{self.where}` is marked once_differentiable; expected no derivative of its gradient. Take the mark away, if its backward is made of torch ops.",
            )
            inputs, results = ([_once_only(x, message) for x in some] for some in (inputs, results))
        ctx = Context(self.needs)
        found = self.run(inputs, ctx)
        own = {id(x) for x in inputs}
        made = [x for x in found if isinstance(x, Tensor)]
        ctx.read({id(x): y for x, y in zip(made, results, strict=True) if id(x) not in own})
        blank = [torch.zeros_like(x) if ctx.materialize_grads else None for x in results]
        pulled = [g if j == k else b for j, b in enumerate(blank)]
        cotangents = [pulled[e] if isinstance(e, int) else None for e in self.entries]
        grads = user(ctx, cotangents) if getattr(self.cls, "boxed_grads_call", False) else user(ctx, *cotangents)
        grads = list(grads) if isinstance(grads, tuple) else [grads]
        if len(grads) < len(self.args) or any(x is not None for x in grads[len(self.args) :]):
            raise TraceError(
                f"trace: the backward of `{self.where}` returns {len(grads)} gradients; expected one for each argument of "
                f"forward = {len(self.args)}. Return None for what has none."
            )
        return [
            fitted(grads[p], x, self.where) if self.needs[p] and grads[p] is not None else None
            for p, x in zip(self.places, inputs, strict=True)
        ]

    def rebuilt(self, results: Sequence[Tensor]) -> Any:
        """The results in the form in which forward gives them."""
        found = tuple(results[e] if isinstance(e, int) else e[0] for e in self.entries)
        return found[0] if self.single else found

    def result(self) -> Any:
        """What it computes, where nothing needs a gradient."""
        return self.rebuilt(self.forward(*self.tensors))


class _Handle:
    """What `register_hook` gives inside a trace."""

    def __init__(self, where: str) -> None:
        self.where = where

    def remove(self) -> None:
        """Refuse: the hook is in the graph."""
        raise TraceError(
            f"trace: the hook of `{self.where}` is removed again; expected it to stay. Do not register it."
        )


class _Maker:
    """The op that made a hooked tensor, where its own gradient reads that tensor: in second derivatives, through the hook."""

    def __init__(self, node: fx.Node, joint: fx.GraphModule) -> None:
        self.node, self.joint = node, joint
        self.nodes = _made_by(node).all_input_nodes
        self.values: list[Tensor] = [n.meta["val"] for n in self.nodes]

    @staticmethod
    def of(node: fx.Node) -> _Maker | None:
        """None for an op whose gradient does not read its result: a hook is then a node of its own behind it."""
        source = _made_by(node)
        moved = [n for n in source.all_input_nodes if can_move(n.meta.get("val"))]
        if source.op != "call_function" or not moved:
            return None
        at = [source.all_input_nodes.index(n) for n in moved]

        def joint(g: Tensor, *given: Tensor) -> list[Tensor | None]:
            inputs = [x.detach().requires_grad_() if k in at else x for k, x in enumerate(given)]
            out = _run(node, [x.clone() for x in inputs] if source.target._schema.is_mutable else inputs)
            leaves = [inputs[k] for k in at]
            found = dict(
                zip(at, torch.autograd.grad(out, leaves, g, allow_unused=True, create_graph=True), strict=True)
            )
            return [out, *(found.get(k) for k in range(len(inputs)))]

        with aside([n.meta["val"] for n in source.all_input_nodes]) as stand_ins, torch.enable_grad():
            made = make_fx(joint, tracing_mode="real")(torch.empty_like(node.meta["val"]), *stand_ins)
        _without_detach(made.graph)
        out, *grads = results_of(made.graph)
        if all(user.op == "output" for user in out.users):
            return None
        if source.target._schema.is_mutable:
            raise TraceError(
                f"trace: a hook on the result of {source.target._opname}, written in place, whose gradient reads that result; "
                "expected one made anew. Write h = op(h)."
            )
        out.replace_all_uses_with(add_input(made.graph, "out"))
        output_of(made.graph).args = (grads,)
        made.graph.eliminate_dead_code()
        made.recompile()
        return _Maker(node, made)

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        """The op."""
        return (_run(self.node, given),)

    def pull(self, g: Tensor, given: Sequence[Tensor], out: Tensor) -> list[Tensor | None]:
        """Its gradient."""
        return list(self.joint(g, *given, out))


def _made_by(node: fx.Node) -> Any:
    return node.args[0] if node.target is operator.getitem else node


def _run(node: fx.Node, given: Sequence[Tensor]) -> Tensor:
    """The op that made a node, on other tensors."""
    source: Any = _made_by(node)
    at = dict(zip(source.all_input_nodes, given, strict=True))
    args, kwargs = fx.map_arg((source.args, dict(source.kwargs)), at.__getitem__)
    made = source.target(*args, **kwargs)
    return made if source is node else made[node.args[1]]


def _hooked(graph: Any, raw: fx.Node, node: fx.Node, key: str, operands: list[fx.Node], where: str) -> fx.Node:
    """Put a hook between a tensor and all its uses, in place of the one that is there."""
    new = add_plain(graph, kept_op, operands, key, 0)
    new.meta |= {
        **raw.meta,
        "hooks": raw in operands,
        "stack_trace": fx_traceback.current_meta.get("stack_trace", ""),
    }
    order = {n: k for k, n in enumerate(graph.nodes)}
    uses = [user for user in node.users if user is not new]
    if uses:
        first = min(uses, key=order.__getitem__)
        constants = [n for n in operands if n.op == "get_attr" and order[n] > order[first]]
        if any(order[n] >= order[first] for n in operands if n not in constants):
            raise TraceError(
                f"trace: `{where}` registers a hook on a tensor that was used before, and the hook reads a tensor made "
                "since; expected it registered where its tensor is made. Move it up, or compute inside the hook."
            )
        for n in (*constants, new):
            first.prepend(n)
        for user in uses:
            user.replace_input_with(node, new)
    return new


def _between(tracer: Any, outs: list[Any], x: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of a trace from one tensor to others, as a function of that tensor and of what else the part reads."""
    copy, copies = fx.Graph(), {}
    for node in tracer.graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.output((copies[x], *(copies[o] for o in outs)))
    back = {copies[n].name: n for n in tracer.graph.nodes}
    whole = functionalized(fx.GraphModule(tracer.root, copy), _blame)
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


def _blame(node: fx.Node, what: str, advice: str) -> NoReturn:
    raise TraceError(f"trace: {node.target} {what} inside a gradient; expected plain ops. {advice}")


def value_of(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run the op of a node, where autograd may be watching: a detach of the function's own is no detach of autograd's."""
    return stop_gradient(*args) if node.target is aten.detach.default else node.target(*args, **kwargs)  # type: ignore[operator]


# -- pieces


def transforms() -> int:
    """How many torch.func transforms are active."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (an extension module that the stubs lack)
    return functorch.maybe_current_level() or 0


def can_move(x: Any) -> bool:
    """Is it a tensor that can have a gradient?"""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def requires_grad(x: Tensor) -> bool:
    """Will it require a gradient when the function is run with inputs that do?"""
    known = getattr(x, _LIVE, None)
    return can_move(x) and (x.requires_grad if known is None else known)


def set_requires_grad(x: Tensor, flag: bool = True) -> Tensor:
    """x.requires_grad_(flag) inside a trace."""
    if isinstance(x, FakeTensor | Hollow):
        setattr(x, _LIVE, flag)
    return x


DATA = vars(torch._C.TensorBase)["data"].__get__  # what x.data calls
_DETACH = {Tensor.detach, torch.detach, Tensor.detach_, torch.detach_}


def fitted(g: Any, x: Tensor, where: str) -> Tensor:
    """A gradient in the shape and dtype of what it is a gradient of, as torch fits it: copies are summed."""
    lead = g.ndim - x.ndim if isinstance(g, Tensor) else -1
    if lead < 0 or any(a not in (1, b) for a, b in zip(x.shape, g.shape[lead:], strict=True)):
        got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise TraceError(
            f"trace: the backward of `{where}` gives a gradient of shape {got}; expected its input's = {tuple(x.shape)}. "
            "Return it in that shape."
        )
    if g.shape != x.shape:
        g = g.sum_to_size(x.shape)
    return g if g.dtype == x.dtype else g.to(x.dtype)


def _once_only(x: Tensor, message: str) -> Tensor:
    """x, of which nobody may ask a derivative."""
    if not can_move(x):
        return x
    graph = fx.Graph()
    graph.output((add_input(graph, "x"),))
    return kept([x], keep(Kept("once", fx.GraphModule({}, graph), (None,), message)))


def _node(x: Tensor) -> fx.Node | None:
    """The node of a tensor in the trace that is going on."""
    mode: Any = get_proxy_mode()
    held: Any = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return getattr(getattr(held, "proxy", None), "node", None)


def _operand(tracer: Any, x: Tensor) -> fx.Node:
    return _node(x) or tracer.create_arg(x)


@contextmanager
def aside(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Out of sight of the trace that is going on: stand-ins of the inputs, all of one fake mode."""
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    with ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(_without_function_modes())
        fake = mode or FakeTensorMode(allow_non_fake_inputs=True)
        yield [x if isinstance(x, FakeTensor) else fake.from_tensor(x.detach()) for x in inputs]


@contextmanager
def _below_dispatch(mode: Any) -> Iterator[None]:
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
def _without_function_modes() -> Iterator[None]:
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


def _collect(gm: fx.GraphModule, closed: list[Tensor], own: dict[int, int]) -> None:
    """Note the tensors that a graph closes over; a number that it made itself stays a number."""
    for value, node in held_by(gm):
        if node.meta.get("fresh") and value.numel() == 1 and not isinstance(value, FakeTensor):
            emit, number = emitter(gm.graph, node), value.item()
            replace(node, emit(aten.full.default, list(value.shape), number, dtype=value.dtype, device=value.device))
        elif id(value) not in own and not any(value is x for x in closed):
            closed.append(value)


def _open(gm: fx.GraphModule, first: int, count: int, closed: list[Tensor], own: dict[int, int]) -> None:
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
        _without_detach(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _ones_by_shape(nodes: Iterable[fx.Node]) -> None:
    """Autograd begins with ones like the sum that it differentiates: they do not read it."""
    for node in nodes:
        if node.target in (aten.ones_like.default, aten.zeros_like.default):
            x, number = node.meta["val"], float(node.target is aten.ones_like.default)
            node.target, node.args = aten.full.default, (list(x.shape), number)
            node.kwargs = {"dtype": x.dtype, "device": x.device}


def _without_detach(graph: fx.Graph) -> None:
    """A detached tensor is that tensor, where gradients are not asked for, or are taken already."""
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        replace(node, node.args[0])  # type: ignore[arg-type]

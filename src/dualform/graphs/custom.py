"""What of a function is not ops: its own gradients. A Function, a hook or a checkpoint becomes a node of the trace.

    y = Round.apply(x)        ->    y = kept([x], "Round.apply", 0), its backward traced beside its forward
    h.register_hook(f)        ->    every use of h, before and after, is one of kept([h], "hook f", 0)

While a trace runs, `torch.autograd.Function` asks here first; on other threads, and inside a transform,
it is torch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode, make_fx, set_proxy_slot
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from dualform.graphs import aside as unseen
from dualform.graphs.called import Called
from dualform.graphs.edit import results_of
from dualform.graphs.functionalize import functionalized
from dualform.graphs.hollow import Hollow, tensors_in
from dualform.graphs.hooks import Handle, Maker, put_hook
from dualform.graphs.kept import Kept, Vjp, keep, kept, named, stop_gradient, written_out
from dualform.graphs.recorder import CannotRecord
from dualform.graphs.requiring import DATA, DETACH, LIVE, can_move, fitted, node_of, requires_grad, transforms
from dualform.shapes import TraceError

aten = torch.ops.aten
Trace = Callable[..., fx.GraphModule]


class _Listening(threading.local):
    """The traces of a thread, innermost last."""

    def __init__(self) -> None:
        self.to: list[tuple[Listener | None, Any]] = [(None, None)]


_listening = _Listening()
_lock = threading.Lock()
_count = 0


@contextmanager
def listening(listener: Listener | None, selected: Any = None) -> Iterator[None]:
    """Hand this thread's Functions to a trace, which knows what masks picked, or to torch as ever; the last one out
    leaves torch as it was."""
    global _count
    with _lock:
        _count += 1
        setattr(_SingleLevelFunction, "apply", classmethod(_applied))  # noqa: B010
    _listening.to.append((listener, selected))
    try:
        yield
    finally:
        _listening.to.pop()
        if listener is not None:
            listener.given = {}  # lets go of the trace's inputs
        with _lock:
            _count -= 1
            if not _count:
                delattr(_SingleLevelFunction, "apply")  # torch's own is the base's


def _applied(cls: Any, *args: Any) -> Any:
    listener, selected = _listening.to[-1]
    if listener is None or cls is Vjp or cls.__module__.startswith("torch._library") or listener.is_transformed:
        return torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)(*args)
    listener.note()
    return selected.applied(cls.apply, args, lambda *args: listener.function(cls, args))


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
        self.given = {n: x for x in inputs if (n := node_of(x)) is not None}

    def input(self, x: Any) -> None:
        """What is made of inputs requires a gradient, if it can."""
        if isinstance(x, FakeTensor | Hollow) and can_move(x):
            setattr(x, LIVE, True)

    def marked(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Where gradients are on, what is made of what requires one does, too; inference mode makes constants."""
        if torch.is_inference_mode_enabled():
            return pytree.tree_map_only(Tensor, lambda x: x.detach() if can_move(x) else x, result)
        leaves = pytree.tree_leaves((args, kwargs)) if func not in DETACH and torch.is_grad_enabled() else []
        if any(isinstance(x, Tensor) and requires_grad(x) for x in leaves):
            for x in pytree.tree_leaves(result):
                self.input(x)
        return result

    # -- Functions

    def transform(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Begin or end a transform unseen: torch's tracer (2.11: always) makes nodes of that, which are no ops."""

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
                f"trace: `{where}` calls a module with a backward hook; expected gradients that the module's own "
                "forward says. Remove the hook, or register one on a tensor in forward: h.register_hook(...)."
            )
        needs = tuple(isinstance(a, Tensor) and requires_grad(a) for a in args)
        called = Called(cls, args, needs, where)
        if not any(needs) or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return called.result()
        return called.rebuilt(self.keep(name, called.forward, called.backward, called.tensors))

    # -- hooks

    def hook(self, h: Tensor, f: Callable[[Tensor], Tensor | None]) -> Handle:
        """Let the gradient of a tensor go through a function, after those that it goes through already."""
        where, node = self.note(), node_of(h)
        if not requires_grad(h) or node is None:
            raise TraceError(
                f"trace: `{where}` hooks a tensor that requires no gradient; expected one that depends on an input. "
                "Guard it with `if h.requires_grad:`."
            )
        raw, earlier = self.hooked.get(node, (node, ()))
        hooks = (*earlier, f)
        maker = Maker.of(raw)

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
        operands = [*operands, *(node_of(x) or tracer.create_arg(x) for x in inputs[len(given) :])]
        new = put_hook(tracer.graph, raw, node, key, operands, where)
        self.hooked[new] = (raw, hooks)
        set_proxy_slot(h, tracer, _ProxyTensor(fx.Proxy(new, tracer), None))
        return Handle(where)

    # -- gradients taken inside

    def sees(self, args: Any) -> bool:
        """Is a call one of the trace's own, and not of a transform's tensors?"""
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]
        return not self.is_transformed and not any(map(wrapped, tensors_in(args)))

    def below(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call inside a torch.func transform: the trace sees what the transform makes of it."""
        mode: Any = get_proxy_mode()
        if mode is None:  # torch's tracer, which has written the call down, runs it
            return func(*args, **kwargs)
        before = len(mode.tracer.graph.nodes)
        if func in DETACH or func == DATA:
            func = stop_gradient
        with unseen.unseen_above(mode):
            result = func(*args, **kwargs)
        new = list(mode.tracer.graph.nodes)[before:]
        for node in new:
            if node.target is aten.detach.default:  # autograd's own: it keeps results so
                node.target = aten.alias.default
        unseen.ones_by_shape(new)
        return result

    def gradient(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None,
        create_graph: bool = False, only_inputs: bool = True, allow_unused: bool | None = None,
        is_grads_batched: bool = False, materialize_grads: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """torch.autograd.grad: what is traced between inputs and outputs is differentiated, and that is traced."""
        where = self.note()
        outs, ins = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
        seeds = [grad_outputs] if grad_outputs is None or isinstance(grad_outputs, Tensor) else list(grad_outputs)
        nodes = [node_of(x) for x in ins]
        known = all(requires_grad(x) and node_of(x) is not None for x in [*outs, *ins])
        if is_grads_batched or not known or any(n in self.hooked for n in nodes):
            why = "is of a hooked tensor" if known else "is of tensors without gradient"
            why = "is batched" if is_grads_batched else why
            raise TraceError(
                f"trace: `{where}` {why}; expected a gradient of what depends on an input, by a tensor that it depends "
                "on. Call h.requires_grad_() on that tensor, or differentiate the function from outside."
            )
        seeds = [None] * len(outs) if grad_outputs is None else seeds
        found = [self._slope(outs, x, seeds, where) for x in ins]
        if any(x is None for x in found) and not (allow_unused or materialize_grads):
            raise TraceError(
                f"trace: `{where}` differentiates by a tensor that the result does not depend on; expected one that it "
                "does. Pass allow_unused=True or materialize_grads=True."
            )
        if materialize_grads:
            found = [torch.zeros_like(x) if g is None else g for x, g in zip(ins, found, strict=True)]
        return tuple(g if g is None or create_graph else g.detach() for g in found)

    def _slope(self, outs: list[Tensor], x: Tensor, seeds: list[Any], where: str) -> Tensor | None:
        """The gradient of some tensors of the trace by another."""
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        part, leaves = unseen.between(tracer, [node_of(o) for o in outs], node_of(x))
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

        with unseen.aside([x, *rest, *given]) as stand_ins, torch.enable_grad():
            try:
                made = functionalized(make_fx(joint, tracing_mode="real")(*stand_ins), unseen.blame)
            except RuntimeError as error:
                raise TraceError(
                    f"trace: `{where}` failed with {error}; expected a gradient that torch can take."
                ) from error
        unseen.without_detach(made.graph)
        unseen.ones_by_shape(made.graph.nodes)
        made.graph.eliminate_dead_code()
        (found,) = unseen.replayed(made, [x, *rest, *given])
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
        count = len(inputs)

        def pull(k: int, f: Any, *x: Tensor) -> tuple[Any, ...]:
            return tuple(f(k, x[0], x[1 : 1 + count], x[1 + count :]))

        with unseen.aside(inputs) as stand_ins:
            made = self.trace(lambda *x: tuple(forward(*x)), *stand_ins)
            results = [n.meta["val"] for n in results_of(made.graph)]
            backwards: Any = backward() if callable(backward) else backward
            given = [*stand_ins, *results]
            pulled = [f and self.trace(partial(pull, k, f), results[k], *given) for k, f in enumerate(backwards)]
        made = written_out(made)  # nobody differentiates a forward
        graphs = [made, *(gm for gm in pulled if gm is not None)]
        for gm in graphs:
            unseen.collect(gm, closed, own)
        for gm in graphs:
            unseen.opened(gm, 0 if gm is made else 1, count, closed, own)
        return keep(Kept(name, made, tuple(pulled))), [*inputs, *closed]


class Plain(Listener):
    """The listener of a recording of nothing but ops: it gives up where a function defines or takes a gradient."""

    def function(self, cls: Any, args: tuple[Any, ...]) -> Any:
        """Apply a checkpoint."""
        return _checkpointed(cls, args) if _is_checkpoint(cls) else self._give_up()

    def _give_up(self, *_: Any, **__: Any) -> NoReturn:
        raise CannotRecord(self.note())

    transform = hook = below = gradient = _give_up


def _is_checkpoint(cls: Any) -> bool:
    """It computes the same again later, with the same gradient."""
    return cls.__module__ == "torch.utils.checkpoint"


def _checkpointed(cls: Any, args: tuple[Any, ...]) -> Any:
    return args[0](*args[2:]) if cls is CheckpointFunction else cls.forward(*args)  # 2.11: one that keeps its inputs

"""One call of a torch.autograd.Function: its author's forward and backward, as functions of its tensor arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, _is_setup_context_defined
from torch.autograd.function import once_differentiable as _once
from torch.utils import _pytree as pytree

from dualform.graphs.kept import once_only
from dualform.graphs.requiring import can_move, fitted
from dualform.shapes import TraceError

_ONCE = _once(lambda ctx: None).__code__


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


class Called:
    """A call of a Function: its forward, and each result's backward, as functions of the tensors that it is given."""

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
        places = count()
        self.entries = [next(places) if isinstance(x, Tensor) else [x] for x in found]
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
                f"trace: `{self.where}` has no backward; expected one, which torch's gradients need too. Write it, or "
                "use plain ops."
            )
        if getattr(user, "__code__", None) is _ONCE:
            message = (
                f"trace: `{self.where}` is marked once_differentiable; expected no derivative of its gradient. Take "
                "the mark away, if its backward is made of torch ops."
            )
            user = user.__wrapped__
            inputs, results = (
                [once_only(x, message) if can_move(x) else x for x in some] for some in (inputs, results)
            )
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
                f"trace: the backward of `{self.where}` returns {len(grads)} gradients; expected one for each argument "
                f"of forward = {len(self.args)}. Return None for what has none."
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

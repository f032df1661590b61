"""The public face: the structured derivative of any torch function, and its explanation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from dualform.algebra.axis_names import Axes, expect_outputs, meeting, parse
from dualform.algebra.linear_map import Derivative
from dualform.calculus.traced import Applied, Point, Traced, traced
from dualform.explanations.account import Story
from dualform.explanations.explanation import Explanation
from dualform.graphs.fingerprint import Fingerprint
from dualform.shapes import ShapeError, TraceError, fail

Wrt = int | str | tuple["int | str", ...]


def jacobian(f: Callable[..., Any], *args: Any, wrt: Wrt = 0, axes: str | None = None, **kwargs: Any) -> Any:
    """Differentiate a torch function, keeping the structure: nothing is materialised unless asked.

    J[out..., in...] = d f[out...] / d args[wrt][in...]
    Shape:  arguments and result: tensors, or dicts, tuples and lists of them; J.shape = out_shape + in_shape. `wrt` is
            a position, the name of a keyword argument, or a tuple of these, which gives a tuple. A result that is a
            tree gives a tree of derivatives, and so does an argument. `axes` names the axes of the tensors in order, as
            "i j, j l -> i l".
    Dtype:  the result's, real; the argument must be floating. Where f has a kink, the derivative is autograd's choice.
    Raises: ValueError for an argument that is no floating tensor, a result that is no tensor, or axes that do not fit;
            TraceError for what cannot be traced. Warns once for an op that has no structured derivative.
    Example:
        >>> import torch
        >>> J = jacobian(lambda x, y: x + y, torch.ones(2), torch.ones(2, 2))
        >>> print(J.structure, J.shape, J.nbytes)
        J[i,j,k] = δ(j,k) (2, 2, 2) 0
    """
    given = Given(f, args, kwargs)
    chosen = given.chosen("jacobian", wrt)
    named = None if axes is None else parse(axes, given.named_tensors)
    at = given.traced(named)
    if named is not None:
        expect_outputs(named, at.traced.out_values)

    def derivative(output: int, source: int) -> Derivative:
        return made(at, output, source, partial(given.story, output, source, named), named)

    def tree(sources: Any) -> Any:
        found = [pytree.tree_map(partial(derivative, output), sources) for output in range(len(at.traced.out_values))]
        return pytree.tree_unflatten(found, at.traced.spec)

    return tuple(map(tree, chosen)) if isinstance(wrt, tuple) else tree(chosen[0])


def explain(
    f: Callable[..., Tensor], *args: Any, wrt: int | str = 0, level: str = "steps", **kwargs: Any
) -> Explanation:
    """Explain the derivative of a torch function step by step.

    the same as jacobian(f, *args, wrt=wrt, **kwargs).explain(level)
    Shape:  as `jacobian`.
    Dtype:  as `jacobian`.
    Raises: as `jacobian`; ValueError for an unknown level.
    Example:
        >>> import torch
        >>> print(explain(lambda x: 2 * x, torch.ones(3), level="one-line"))
        dz/dx[i,j] = 2 δ(i,j)   shape (3,) + (3,) = (3, 3); 9 numbers if dense, 0 stored
    """
    return jacobian(f, *args, wrt=wrt, **kwargs).explain(level)


def made(at: Point, output: int, source: int, story: Callable[[], Story], axes: Axes | None) -> Derivative:
    """The derivative of one result by one input, at a point."""
    route = Applied(at, output, source, story)
    out, x = at.traced.out_values[output], at.inputs[source]
    names = None if axes is None else axes.of(output, source)
    return Derivative(route.terms, out.shape, x.shape, out.dtype, x.device, route, names)


class Given:
    """A function and its arguments, flattened into the tensors among them."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.f = f
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.places = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self.leaves[k].detach() for k in self.places]
        self.names = _names(f, args, kwargs)
        self.asked: list[Any] | None = None  # what is differentiated by, as trees of positions; None: all that is real
        self.known: set[int] = set()  # the tensors that are constants, whose values the trace may read
        self.steps = False  # may the trace read masks of what is differentiated by?

    @property
    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors among the arguments and what they are called."""
        return list(zip(self.names, self.tensors, strict=True))

    def flat(self, *given: Tensor) -> Any:
        """The function of the tensors alone."""
        leaves = list(self.leaves)
        for n, (k, value) in enumerate(zip(self.places, given, strict=True)):
            if n not in self.known:
                leaves[k] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.f(*args, **kwargs)

    def result(self, output: int, *given: Tensor) -> Tensor:
        """One result of the function of the tensors."""
        return pytree.tree_leaves(self.flat(*given))[output]

    def traced(self, axes: Axes | None) -> Point:
        """Trace the function, or find its trace; an error about shapes speaks of axes."""
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        read = [(k, self.tensors[k].tolist()) for k in (range(len(self.tensors)) if self.steps else sorted(self.known))]
        key = Fingerprint(self.f, self.tensors, rest, str(self.spec), read)
        self.closed = {id(t): name for t, name in zip(key.tensors, key.names, strict=True) if name.isidentifier()}
        try:
            found, constants = traced(key, self.flat, self.tensors, self.names, self.steps)
        except TraceError as error:
            # Once more, with masks and places for constants; then with all whose values are asked, if nobody
            # differentiates by them; then for the masks that there are at this point.
            floating = [k for k, t in enumerate(self.tensors) if t.is_floating_point()]
            others = {*range(len(self.tensors))}.difference(pytree.tree_leaves(self.asked or floating))
            places = {k for k in others if _is_place(self.tensors[k])}
            if not (known := others if places <= self.known and not error.__cause__ else places) <= self.known:
                self.known = known
                return self.traced(axes)
            if not self.steps and not any(t.is_meta for t in self.tensors):
                self.steps = True
                return self.traced(axes)
            said = meeting(self.flat, self.tensors, self.names, axes) if error.__cause__ else None
            if said is None:
                raise
            raise ShapeError(f"jacobian: {said}; expected equal sizes, or size 1. {error}") from error
        return Point(found, [*self.tensors, *constants])

    def story(self, output: int, source: int, axes: Axes | None) -> Story:
        """The account of one derivative."""
        named = None if axes is None else ([list(a) for a in axes.inputs], list(axes.outputs[output]))
        return Story(partial(self.result, output), self.tensors, source, self.names, named, self.closed, self.steps)

    def chosen(self, function: str, wrt: Wrt) -> list[Any]:
        """For each item of `wrt`, the tree of positions among the tensors."""
        position = iter(range(len(self.places)))
        at = [next(position) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        marked = [_Place(k) if isinstance(leaf, Tensor) else leaf for k, leaf in zip(at, self.leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(marked, self.spec)
        found = []
        for one in wrt if isinstance(wrt, tuple) else (wrt,):
            tree = self._argument(function, one, args, kwargs)
            for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                self._expect_floating(function, f"argument {one}{pytree.keystr(path)}", leaf)
            if not pytree.tree_leaves(tree):
                fail(function, f"argument {one}", "has no tensor", "a floating tensor", "Differentiate by a tensor.")
            found.append(pytree.tree_map(lambda leaf: leaf.position, tree))
        self.asked = found
        return found

    def _argument(self, function: str, wrt: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(wrt, str):
            positional = _parameters(self.f)[: len(args)]
            if wrt not in kwargs and wrt not in positional:
                expected = f"a keyword argument, one of {list(kwargs)}"
                fail(function, "wrt", f"is {wrt!r}", expected, "Pass it by name.")
            return kwargs[wrt] if wrt in kwargs else args[positional.index(wrt)]
        if isinstance(wrt, bool) or not isinstance(wrt, int) or not -len(args) <= wrt < len(args):
            expected = f"the position of one of {len(args)} arguments"
            fail(function, "wrt", f"is {wrt}", expected, "Count from 0.")
        return args[wrt]

    def _expect_floating(self, function: str, argument: str, leaf: Any) -> None:
        if not isinstance(leaf, _Place):
            advice = "Differentiate by a tensor."
            fail(function, argument, f"is {type(leaf).__name__}", "a floating tensor", advice)
        x = self.tensors[leaf.position]
        if not x.is_floating_point():
            expected = "a real floating dtype" if x.is_complex() else "a floating dtype"
            advice = "Pass its real and imaginary parts." if x.is_complex() else "Convert it: x.double()."
            fail(function, argument, f"has dtype {x.dtype}", expected, advice)


def _is_place(x: Tensor) -> bool:
    """Can nobody differentiate by it? A mask, or places."""
    return not x.is_floating_point() and not x.is_complex()


@dataclass(frozen=True)
class _Place:
    """The position of a leaf among the tensors."""

    position: int


def _parameters(f: Callable[..., Any]) -> list[str]:
    try:
        found = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _names(f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The names of the tensors: f's parameters (x0, x1, ... where it does not tell), and the path inside a tree."""
    found = _parameters(f)
    heads = [found[k] if k < len(found) else f"x{k}" for k in range(len(args))]
    names: list[str] = []
    for head, value in [*zip(heads, args, strict=True), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path]
                name = ".".join([head, *parts])
                names.append(name if name not in names else f"{name}_{len(names)}")
    return names


__all__ = ["Given", "Traced", "explain", "jacobian", "made"]

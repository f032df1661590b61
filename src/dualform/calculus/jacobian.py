"""The public face: the structured derivative of any torch function, and its explanation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dualform.calculus.explain import Explanation
from dualform.calculus.story import Story
from dualform.calculus.structure import Derivative
from dualform.shapes import ShapeError, fail

Wrt = int | str | tuple[int | str, ...]


def jacobian(f: Callable[..., Tensor], *args: Any, wrt: Wrt = 0, axes: str | None = None, **kwargs: Any) -> Any:
    """Differentiate a torch function, keeping the structure: nothing is materialised unless asked.

    J[out..., in...] = d f[out...] / d args[wrt][in...]
    Shape:  f(*args, **kwargs) is one tensor; J.shape = out_shape + in_shape. `wrt` is a position, the name of a keyword
            argument, or a tuple of these, which gives a tuple. `axes` names axes, as "i j, j l -> i l".
    Dtype:  the result's; the argument must be floating.
    Raises: ValueError for an argument that is no floating tensor, a result that is no tensor, or axes that do not fit;
            TraceError for what cannot be traced. Warns once for an op that has no structured derivative.
    Example:
        >>> import torch
        >>> J = jacobian(lambda x, y: x + y, torch.ones(2), torch.ones(2, 2))
        >>> print(J.structure, J.shape, J.nbytes)
        J[i,j,k] = δ(j,k) (2, 2, 2) 0
    """
    if isinstance(wrt, tuple):
        return tuple(jacobian(f, *args, wrt=w, axes=axes, **kwargs) for w in wrt)
    names = _argument_names(f, len(args), tuple(kwargs))
    values = [*args, *kwargs.values()]
    chosen = _position(wrt, len(args), tuple(kwargs), values)
    tensors = [k for k, v in enumerate(values) if isinstance(v, Tensor)]
    named = _parse_axes(axes, [(names[k], values[k]) for k in tensors]) if axes is not None else None

    def flat(*given: Tensor) -> Any:
        filled = list(values)
        for k, v in zip(tensors, given, strict=True):
            filled[k] = v
        result = f(*filled[: len(args)], **dict(zip(kwargs, filled[len(args) :], strict=True)))
        if not isinstance(result, Tensor):
            fail("jacobian", "f", f"returns {type(result).__name__}", "one tensor", "Return the tensor alone.")
        return result

    given = [values[k].detach() for k in tensors]
    story = Story(flat, given, tensors.index(chosen), [names[k] for k in tensors], named)
    out, x = story.out, values[chosen]
    if named is not None and len(named[1]) != out.ndim:
        fail(
            "jacobian",
            "axes",
            f"names {len(named[1])} output axes",
            f"one for each of f's = {out.ndim}",
            "Name them all.",
        )
    return Derivative(story.program.terms, out.shape, x.shape, out.dtype, out.device, route=story)


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


def _argument_names(f: Callable[..., Any], count_: int, keywords: tuple[str, ...]) -> list[str]:
    """The names of f's parameters; x0, x1, ... where it does not tell."""
    try:
        found = [
            p.name
            for p in inspect.signature(f).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        found = []
    positional = [found[k] if k < len(found) else f"x{k}" for k in range(count_)]
    return [*positional, *keywords]


def _position(wrt: int | str, positional: int, keywords: tuple[str, ...], values: Sequence[Any]) -> int:
    if isinstance(wrt, str):
        if wrt not in keywords:
            fail("jacobian", "wrt", f"is {wrt!r}", f"a keyword argument, one of {list(keywords)}", "Pass it by name.")
        position = positional + keywords.index(wrt)
    else:
        if not -positional <= wrt < positional:
            fail("jacobian", "wrt", f"is {wrt}", f"the position of one of {positional} arguments", "Count from 0.")
        position = wrt % positional
    x = values[position]
    if not isinstance(x, Tensor):
        fail("jacobian", f"argument {wrt}", f"is {type(x).__name__}", "a floating tensor", "Differentiate by a tensor.")
    if not x.is_floating_point():
        fail("jacobian", f"argument {wrt}", f"has dtype {x.dtype}", "a floating dtype", "Convert it: x.double().")
    return position


def _parse_axes(spec: str, tensors: Sequence[tuple[str, Tensor]]) -> tuple[list[list[str]], list[str]]:
    left, arrow, right = spec.partition("->")
    inputs = [part.split() for part in left.split(",")]
    if not arrow or len(inputs) != len(tensors):
        fail(
            "jacobian", "axes", f"is {spec!r}", f"{len(tensors)} inputs, '->' and an output", "Write 'i j, j l -> i l'."
        )
    owner: dict[str, tuple[int, str, int]] = {}
    for names, (name, x) in zip(inputs, tensors, strict=True):
        if len(names) != x.ndim:
            fail("jacobian", "axes", f"names {len(names)} axes of {name}", f"its rank = {x.ndim}", "Name every axis.")
        for k, (axis, n) in enumerate(zip(names, x.shape, strict=True)):
            at, other, size = owner.setdefault(axis, (k, name, n))
            if n != size and 1 not in (n, size):
                raise ShapeError(
                    f"jacobian: axis {at} of {other} ({axis}={size}) meets axis {k} of {name} ({axis}={n}); "
                    "expected one size for one name. Rename one of them, or reshape."
                )
    return inputs, right.split()

"""Code that may tell what stands in for a tensor from a tensor: it must compute on tensors what its trace does.

h if type(x) is torch.Tensor else h.tanh()        a stand-in's type is another: refused, by that line
type(self).__name__                               asks for a type too, and is the same
2 * h if h.requires_grad else h                   another number where nobody asks for gradients: refused, too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dualform.graphs.requiring import can_move
from dualform.graphs.this_thread import out_of_sight
from dualform.shapes import TraceError

Outcome = list[Tensor] | Exception


def expect_as_on_tensors(
    f: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Tensor], own: Sequence[Tensor], where: Sequence[str]
) -> None:
    """Run a function on tensors and compare values and gradients with its graph's: on leaves, as parameters are, on
    results of others, as a weight that has learnt is, inside wider memory, as a token is, and without gradients.

    own: what the first inputs stand for; numbers for the rest are drawn. where: the lines that ask what tells them
    apart; none: nothing is run.
    Raises: TraceError that names these lines.
    """
    if not where or any(type(x) not in (Tensor, nn.Parameter) or x.is_meta for x in (*inputs, *own)):
        return
    for made in _ways:
        with out_of_sight(), torch.inference_mode(False), torch.set_grad_enabled(made is not Tensor.detach):
            expected, got = (_outcome(g, [made(x) for x in _drawn(inputs, own)]) for g in (f, gm))
        if isinstance(expected, Exception):  # what only leaves can is nothing to compare
            is_same, why = (
                made is not _as_drawn or isinstance(got, Exception),
                f" ({type(expected).__name__} on a tensor: {expected})",
            )
        else:
            is_same, why = not isinstance(got, Exception) and _are_close(got, expected), ""
        if not is_same:
            raise TraceError(
                f"trace: `{'` or `'.join(where)}` decides by what tells a tensor from what stands for it, as a weight "
                f"that has learnt does for a parameter, a view for memory of its own, one without gradients{why}; "
                "expected the same for all. Ask isinstance(x, torch.Tensor), or decide by shape or dtype."
            )


def _as_drawn(x: Tensor) -> Tensor:
    return x


def _inside(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 1]


_ways = (_as_drawn, Tensor.clone, _inside, Tensor.detach)


def _drawn(inputs: Sequence[Tensor], own: Sequence[Tensor]) -> Iterator[Tensor]:
    for k, like in enumerate(inputs):
        draws = torch.Generator(like.device).manual_seed(k)
        x = (
            own[k].detach().to(like.device, like.dtype, copy=True)
            if k < len(own)
            else torch.rand(like.shape, generator=draws, dtype=like.dtype, device=like.device)
        )
        x = nn.Parameter(x, can_move(x)) if k < len(own) and isinstance(own[k], nn.Parameter) else x
        yield x.requires_grad_(can_move(x))


def _outcome(f: Callable[..., Any], values: Sequence[Tensor]) -> Outcome:
    """Results, and the gradients of a sum of them; or what is raised."""
    try:
        found = [x for x in pytree.tree_leaves(f(*values)) if isinstance(x, Tensor)]
        found = [y for x in found for y in ((x.real, x.imag) if x.is_complex() else (x,))]
        ends = [
            (x * torch.arange(1, x.numel() + 1, device=x.device).view(x.shape).cos()).sum()
            for x in found
            if x.requires_grad
        ]
        leaves = [x for x in values if x.requires_grad]
        grads = torch.autograd.grad(ends, leaves, materialize_grads=True, allow_unused=True) if ends and leaves else ()
        return [*found, *grads]
    except Exception as error:
        return error


def _are_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    eps = max((torch.finfo(x.dtype).eps for x in expected if can_move(x)), default=0.0) ** 0.5
    return len(got) == len(expected) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=eps, atol=eps, equal_nan=True)
        for x, y in zip(got, expected, strict=True)
    )

"""A norm as one operation with its own derivatives, so that both directions of a step may use torch's native kernels.

    hat = (x - mean x) rstd        N(g) = rstd (g - mean g - hat mean(g hat))        over the last axis

N is the derivative of hat, and its own transpose: what waits for the state in a backward pass is N once more. Traced
through torch's own norms the second derivative would be some thirty operations on whole tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dualform.graphs.edit import add, shape_of, without_dead
from dualform.graphs.operators import custom_operator, library
from dualform.graphs.verify import verified_below_autograd
from dualform.ops.table import row

aten = torch.ops.aten


def _norm_shapes(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    small = (*x.shape[:-1], 1)
    return x.new_empty(x.shape), x.new_empty(small), x.new_empty(small)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output)


def _standardize_backward(
    ctx: Any, g: Tensor | None, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor, None]:
    x, hat, mean, rstd = ctx.saved_tensors
    D, found = x.shape[-1], torch.zeros_like(x) if g is None else standardize_vjp(g, x, hat, mean, rstd)
    if drstd is not None:
        found = found - drstd * (rstd * rstd * hat / D)
    return found if dmean is None else found + dmean / D, None


def _vjp_backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor]:
    g, x, hat, mean, rstd, N = ctx.saved_tensors
    along = (g * hat).mean(-1, keepdim=True)
    dhat = -(u * (rstd * along) + rstd * g * (u * hat).mean(-1, keepdim=True))
    return standardize_vjp(u, x, hat, mean, rstd), None, dhat, None, (u * N).sum(-1, keepdim=True) / rstd


@custom_operator("standardize", _norm_shapes, _standardize_backward, _keep)
def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return hat, mean and rstd."""
    return aten.native_layer_norm(x, [x.shape[-1]], None, None, eps)


@custom_operator(
    "standardize_vjp", lambda g, x, *_: x.new_empty(x.shape), _vjp_backward,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)  # fmt: skip
def standardize_vjp(g: Tensor, x: Tensor, hat: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return N(g)."""
    return aten.native_layer_norm_backward(g, x, [x.shape[-1]], mean, rstd, None, None, [True, False, False])[0]


def _rows_first(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        x.movedim(d, 0) if d is not None else x.expand(info.batch_size, *x.shape)
        for x, d in zip(tensors, dims, strict=True)
    ]


torch.library.register_vmap(
    standardize,
    lambda info, dims, x, eps: (standardize(*_rows_first(info, dims[:1], [x]), eps), (0, 0, 0)),
    lib=library,
)
torch.library.register_vmap(
    standardize_vjp, lambda info, dims, *tensors: (standardize_vjp(*_rows_first(info, dims, tensors)), 0), lib=library
)


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd, mean, rstd


row("dualform::standardize", lowered=_standardize)(None)
row(
    "dualform::standardize_vjp",
    lowered=lambda g, x, hat, mean, rstd: (
        rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
    ),
)(None)


@verified_below_autograd
def whole_norms(graph: fx.Graph) -> None:
    """Recognise norms and their derivatives in a traced graph, as `layer_norms` spells them out."""
    for target, recognise in ((aten.var_mean.correction, _norm), (aten.mul.Tensor, _norm_vjp)):
        for node in list(graph.nodes):
            if node.target == target:
                recognise(graph, node)
    without_dead(graph)


@verified_below_autograd
def native_norms(graph: fx.Graph) -> None:
    """Write torch's kernels in place of the operations of this file."""
    for node in list(graph.nodes):
        if node.target is torch.ops.dualform.standardize.default:
            x, eps = node.args
            node.target, node.args = aten.native_layer_norm.default, (x, [shape_of(x)[-1]], None, None, eps)
        elif node.target is torch.ops.dualform.standardize_vjp.default:
            g, x, _, mean, rstd = node.args
            with graph.inserting_before(node):
                args = (g, x, [shape_of(x)[-1]], mean, rstd, None, None, [True, False, False])
                made = add(graph, aten.native_layer_norm_backward.default, *args)
                node.replace_all_uses_with(add(graph, operator.getitem, made, 0))
    without_dead(graph)


def _only(nodes: Sequence[fx.Node], target: Any) -> fx.Node | None:
    found = [n for n in nodes if n.target == target]
    return found[0] if len(found) == 1 else None


def _norm(graph: fx.Graph, node: Any) -> None:
    """(x - mean) * rsqrt(var + eps) is hat; mean and rstd come with it."""
    x, axes = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(x, fx.Node) or list(axes or []) not in ([len(shape_of(x)) - 1], [-1]):
        return
    parts = {n.args[1]: n for n in node.users}
    is_plain = node.kwargs.get("correction") == 0 and node.kwargs.get("keepdim")
    if not is_plain or set(parts) != {0, 1} or len(parts[0].users) > 1:
        return
    shifted = _only(list(parts[0].users), aten.add.Tensor)
    root = shifted and _only(list(shifted.users), aten.rsqrt.default)
    if shifted is None or root is None or len(shifted.users) > 1 or not isinstance(shifted.args[1], float):
        return
    with graph.inserting_before(node):
        norm = add(graph, torch.ops.dualform.standardize.default, x, shifted.args[1])
        hat, mean, rstd = (add(graph, operator.getitem, norm, i) for i in range(3))
    for centred in [n for n in parts[1].users if n.target == aten.sub.Tensor and n.args == (x, parts[1])]:
        for product in [n for n in centred.users if n.target == aten.mul.Tensor and set(n.args) == {centred, root}]:
            product.replace_all_uses_with(hat)
    parts[1].replace_all_uses_with(mean)
    root.replace_all_uses_with(rstd)


def _norm_vjp(graph: fx.Graph, node: Any) -> None:
    """rstd / D * (D g - sum g - hat sum(g hat)) is N(g)."""
    try:
        scale, inner = node.args
        if inner.target != aten.sub.Tensor:
            scale, inner = inner, scale
        rstd, D = scale.args
        left, right = inner.args
        scaled, total = left.args
        g, again = scaled.args
        hat, along = right.args
        last = [len(shape_of(g)) - 1]
        matched = (
            scale.target in (aten.div.Tensor, aten.div.Scalar) and inner.target == left.target == aten.sub.Tensor
            and scaled.target == aten.mul.Tensor and D == again == shape_of(g)[-1] and total.args[0] is g
            and total.target == along.target == aten.sum.dim_IntList
            and list(total.args[1]) == list(along.args[1]) == last
            and along.args[0].target == aten.mul.Tensor and set(along.args[0].args) == {g, hat}
            and (hat.args[1], rstd.args[1]) == (0, 2) and hat.args[0] is rstd.args[0]
            and hat.args[0].target is torch.ops.dualform.standardize.default
        )  # fmt: skip
    except (AttributeError, ValueError, TypeError, IndexError):  # some other product
        return
    if matched:
        norm = hat.args[0]
        with graph.inserting_before(node):
            mean = add(graph, operator.getitem, norm, 1)
            found = add(graph, torch.ops.dualform.standardize_vjp.default, g, norm.args[0], hat, mean, rstd)
        node.replace_all_uses_with(found)

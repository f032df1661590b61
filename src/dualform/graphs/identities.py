"""Identities of functions of numbers, sums and exponentials, as rewritings of graphs.

pow(x, 2) -> mul(x, x)              sum(x) / n -> mean(x)
exp(u) / sum exp(u) -> softmax(u)   u - logsumexp u -> log_softmax u
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dualform.graphs.rewriting import Rewriter, is_number, name_of, rewrites, rewritten, value
from dualform.graphs.verify import verified
from dualform.ops.factories import filled_with
from dualform.ops.table import bound_arguments, dims_of, kind_of

aten = torch.ops.aten


@verified
def canonical_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a graph by all identities: the same function written in two ways becomes the same ops."""
    return rewritten(gm)


@rewrites("add", "sub", "mul", "div", "multiply", "subtract", "divide")
def _unexpanded(r: Rewriter, node: Any) -> Any:
    """An operand that is expanded before it meets a full tensor is broadcast there."""
    args = list(node.args)
    for k in (0, 1):
        x, other = args[k], args[1 - k]
        if name_of(x).startswith(("expand", "broadcast_to")) and isinstance(other, fx.Node):
            inner: Any = x.args[0]
            if value(other).shape == value(node).shape and value(inner).dtype == value(x).dtype:
                args[k] = inner
    return r.make(node.target, *args, **node.kwargs) if args != list(node.args) else None


@rewrites("matmul", "mm")
def _by_identity(r: Rewriter, node: Any) -> Any:
    """A product with eye(n) is its other operand."""
    a, b = node.args[:2]
    for eye, x in ((b, a), (a, b)):
        if name_of(eye) == "eye" and value(x).shape == value(node).shape and value(eye).shape[0] == value(eye).shape[1]:
            return x
    return None


@rewrites("mul", "multiply")
def _by_ones(r: Rewriter, node: Any) -> Any:
    """A product with ones of a shape is a copy to that shape."""
    for k in (0, 1):
        ones, x = node.args[k], node.args[1 - k]
        if not isinstance(ones, fx.Node) or filled_with(ones) != 1 or not isinstance(x, fx.Node):
            continue
        if value(x).dtype == value(node).dtype:
            shape = list(value(node).shape)
            return x if value(x).shape == value(node).shape else r.make(aten.expand.default, x, shape)
    return None


@rewrites("square")
def _squared(r: Rewriter, node: Any) -> Any:
    return r.make(aten.mul.Tensor, node.args[0], node.args[0])


@rewrites("pow")
def _power(r: Rewriter, node: Any) -> Any:
    x, p = node.args[:2]
    if not isinstance(x, fx.Node) or not is_number(p):
        return None
    if p in (2, 3, 4):
        squared = r.make(aten.mul.Tensor, x, x)
        return squared if p == 2 else r.make(aten.mul.Tensor, squared, x if p == 3 else squared)
    plainer = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}
    return x if p == 1 else r.make(plainer[p], x) if p in plainer else None


@rewrites("sqrt")
def _norm(r: Rewriter, node: Any) -> Any:
    """sqrt(sum x^2) -> the vector norm."""
    b = bound_arguments(node.args[0]) if name_of(node.args[0]) == "sum" else {}
    square: Any = b.get("self")
    if name_of(square) != "mul" or square.args[0] is not square.args[1] or b.get("dtype") is not None:
        return None
    dims = dims_of(b.get("dim"), value(square).ndim)
    if not dims:
        return None
    return r.make(aten.linalg_vector_norm.default, square.args[0], 2, dims, bool(b.get("keepdim")))


@rewrites("norm")
def _vector_norm(r: Rewriter, node: Any) -> Any:
    b = bound_arguments(node)
    p, x = 2 if b.get("p") is None else b["p"], b["self"]
    if not is_number(p) or b.get("dtype") is not None or not value(x).ndim:
        return None
    dims = dims_of(b.get("dim"), value(x).ndim)
    return r.make(aten.linalg_vector_norm.default, x, p, dims, bool(b.get("keepdim")))


@rewrites("rsqrt")
def _reciprocal_root(r: Rewriter, node: Any) -> Any:
    return r.make(aten.reciprocal.default, r.make(aten.sqrt.default, node.args[0]))


@rewrites("div", "divide", "true_divide")
def _divided(r: Rewriter, node: Any) -> Any:
    x, y = node.args[:2]
    if node.kwargs or not isinstance(x, fx.Node):
        return None
    if is_number(y) and y != 0 and value(x).is_floating_point():
        return r.make(aten.mul.Tensor, x, 1.0 / y)
    if isinstance(y, fx.Node):
        return _softmax(r, x, y) or _normalised(r, x, y)
    return None


@rewrites("mul", "multiply")
def _multiplied(r: Rewriter, node: Any) -> Any:
    x, y = node.args[:2]
    if is_number(y) and y == 1 and value(x).dtype == value(node).dtype:
        return x
    pairs: Any = ((x, y), (y, x))
    for a, b in pairs:
        constant = _filled(b)
        if constant is not None and isinstance(a, fx.Node) and _is_like(a, node) and value(b).dtype == value(a).dtype:
            return a if constant == 1 else r.make(aten.mul.Tensor, a, constant)
        if name_of(b) == "reciprocal" and isinstance(a, fx.Node):
            return r.make(aten.div.Tensor, a, b.args[0])
        if is_number(b) and name_of(a) == "sum":
            return _mean(r, a, b)
        if is_number(b) and name_of(a) == "mul" and is_number(a.args[1]):
            return r.make(aten.mul.Tensor, a.args[0], a.args[1] * b)
    return None


def _is_like(a: Any, node: Any) -> bool:
    return value(a).shape == value(node).shape and value(a).dtype == value(node).dtype


def _filled(node: Any) -> float | None:
    """The number that a tensor holds everywhere, where the graph says so."""
    while name_of(node) and (kind_of(node.target) == "view" or name_of(node) == "clone"):
        node = node.args[0]
    number = filled_with(node) if name_of(node) else None
    return float(number) if is_number(number) and number else None


def _mean(r: Rewriter, total: Any, scale: float) -> Any:
    b = bound_arguments(total)
    x = b["self"]
    dims = dims_of(b.get("dim"), value(x).ndim)
    count = math.prod(value(x).shape[d] for d in dims)
    if count and abs(scale * count - 1) < 1e-12 and b.get("dtype") is None:
        return r.make(aten.mean.dim, x, dims, bool(b.get("keepdim")))
    return None


@rewrites("unsqueeze")
def _kept_dim(r: Rewriter, node: Any) -> Any:
    """A reduction of one dim, put back by unsqueeze, is the reduction with keepdim."""
    total: Any = node.args[0]
    if not name_of(total) or (name_of(total) != "logsumexp" and kind_of(total.target) != "reduction"):
        return None
    b = bound_arguments(total)
    if not isinstance(b.get("dim"), list | tuple):
        return None
    dims = dims_of(b["dim"], value(b["self"]).ndim)
    if b["keepdim"] or len(dims) != 1 or node.args[1] % value(node).ndim != dims[0]:
        return None
    return r.make(total.target, b["self"], dims, True)


@rewrites("mean", "sum")
def _variance(r: Rewriter, node: Any) -> Any:
    """mean (x - mean x)^2 -> var(x); the sum is count times that."""
    b = bound_arguments(node)
    square = b["self"]
    if name_of(square) != "mul" or square.args[0] is not square.args[1] or b.get("dtype") is not None:
        return None
    dims = dims_of(b.get("dim"), value(square).ndim)
    x = _centred(square.args[0], dims)
    if x is None:
        return None
    spread = r.make(aten.var.correction, x, dims, correction=0, keepdim=bool(b.get("keepdim")))
    count = math.prod(value(x).shape[d] for d in dims)
    return spread if name_of(node) == "mean" else r.make(aten.mul.Tensor, spread, float(count))


def _centred(node: Any, dims: list[int]) -> Any:
    """x, if the node is x - mean(x, dims, keepdim)."""
    if name_of(node) != "sub" or node.kwargs or name_of(node.args[1]) != "mean":
        return None
    x, b = node.args[0], bound_arguments(node.args[1])
    same = b["self"] is x and "dim" in b and set(dims_of(b["dim"], value(x).ndim)) == set(dims)
    return x if same and b["keepdim"] else None


def _normalised(r: Rewriter, x: Any, root: Any) -> Any:
    """(x - mean) / sqrt(var + eps) -> layer_norm;  x / sqrt(mean x^2 + eps) -> rms_norm; over trailing dims."""
    if name_of(root) != "sqrt":
        return None
    inside: Any = root.args[0]
    if name_of(inside) != "add" or not is_number(inside.args[1]) or inside.kwargs:
        return None
    spread, eps = inside.args
    b = bound_arguments(spread) if name_of(spread) in ("var", "mean") else {}
    if "dim" not in b or not b["keepdim"]:
        return None
    dims = sorted(dims_of(b["dim"], value(x).ndim))
    shape = list(value(x).shape)
    if dims != list(range(len(shape) - len(dims), len(shape))):
        return None
    sizes = [shape[d] for d in dims]
    if name_of(spread) == "var":
        inner = _centred(x, dims)
        if inner is None or b["self"] is not inner or b.get("correction") != 0:
            return None
        return r.make(aten.layer_norm.default, inner, sizes, None, None, float(eps))
    square = b["self"]
    if name_of(square) == "mul" and square.args[0] is x and square.args[1] is x:
        return r.make(aten.rms_norm.default, x, sizes, None, float(eps))
    return None


@rewrites("layer_norm", "rms_norm")
def _without_gain(r: Rewriter, node: Any) -> Any:
    """A norm with a gain and a bias is the plain norm, times the gain, plus the bias."""
    b = bound_arguments(node)
    gain, bias = b["weight"], b.get("bias")
    if gain is None and bias is None:
        return None
    none = [None] * ("bias" in b)
    plain = r.make(node.target, b["input"], b["normalized_shape"], None, *none, b["eps"])
    scaled = plain if gain is None else r.make(aten.mul.Tensor, plain, gain)
    return scaled if bias is None else r.make(aten.add.Tensor, scaled, bias)


def _softmax(r: Rewriter, x: Any, total: Any) -> Any:
    """exp(u) / sum exp(u) -> softmax(u)."""
    dim = _summed_dim(total, "sum")
    if name_of(x) != "exp" or dim is None or bound_arguments(total)["self"] is not x:
        return None
    return r.make(aten.softmax.int, x.args[0], dim)


def _summed_dim(node: Any, op: str) -> int | None:
    """The one dim that a reduction takes, and keeps for what it is combined with; a vector's needs no keeping."""
    if name_of(node) != op:
        return None
    b = bound_arguments(node)
    is_vector = value(b["self"]).ndim == 1
    if not (is_vector or b.get("keepdim")) or b.get("dtype") is not None:
        return None
    dims = dims_of(b.get("dim"), value(b["self"]).ndim)
    return dims[0] if len(dims) == 1 else None


@rewrites("softmax", "_softmax", "log_softmax", "_log_softmax")
def _unshifted(r: Rewriter, node: Any) -> Any:
    """softmax(x - m) -> softmax(x) for an m that is constant along the dim; one spelling of the op and of the dim."""
    b = bound_arguments(node)
    x, dim = b["self"], b["dim"]
    if b.get("dtype") is not None or b.get("half_to_float") or not value(x).ndim:
        return None
    target = aten.log_softmax.int if "log" in name_of(node) else aten.softmax.int
    dim %= value(x).ndim
    moved = _shifted(x, dim)
    if moved is not None:
        return r.make(target, moved, dim)
    return r.make(target, x, dim) if (node.target, b["dim"]) != (target, dim) else None


def _shifted(x: Any, dim: int) -> Any:
    """y, if x is y - m or y + m with an m that does not vary along the dim."""
    if name_of(x) not in ("sub", "add") or not isinstance(x.args[0], fx.Node):
        return None
    y, m = x.args[:2]
    if value(y).shape != value(x).shape:
        return None
    if is_number(m):
        return y
    rank, shape = value(x).ndim, value(m).shape
    behind = dim - (rank - len(shape))
    return y if behind < 0 or (shape[behind] == 1 and value(x).shape[dim] != 1) else None


@rewrites("exp")
def _exp_of_log(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    return r.make(aten.softmax.int, x.args[0], x.args[1]) if name_of(x) == "log_softmax" else None


@rewrites("log")
def _log(r: Rewriter, node: Any) -> Any:
    x: Any = node.args[0]
    if name_of(x) == "softmax":
        return r.make(aten.log_softmax.int, x.args[0], x.args[1])
    b = bound_arguments(x) if name_of(x) == "sum" else {}
    if name_of(b.get("self")) == "exp" and b.get("dtype") is None:
        inner = b["self"].args[0]
        return r.make(aten.logsumexp.default, inner, dims_of(b.get("dim"), value(inner).ndim), bool(b.get("keepdim")))
    return None


@rewrites("sub")
def _log_softmax(r: Rewriter, node: Any) -> Any:
    """x - logsumexp(x) -> log_softmax(x)."""
    x, total = node.args[:2]
    dim = None if node.kwargs else _summed_dim(total, "logsumexp")
    if dim is None or bound_arguments(total)["self"] is not x:
        return None
    return r.make(aten.log_softmax.int, x, dim)


@rewrites("add")
def _shifted_back(r: Rewriter, node: Any) -> Any:
    """logsumexp(x - m) + m -> logsumexp(x)."""
    if node.kwargs:
        return None
    if is_number(node.args[1]) and node.args[1] == 0 and value(node.args[0]).dtype == value(node).dtype:
        return node.args[0]
    for total, m in (node.args[:2], node.args[1::-1]):
        dim = _summed_dim(total, "logsumexp")
        if dim is None:
            continue
        inner = bound_arguments(total)["self"]
        if name_of(inner) == "sub" and not inner.kwargs and inner.args[1] is m and _shifted(inner, dim):
            return r.make(aten.logsumexp.default, inner.args[0], [dim], True)
    return None

"""Complex tensors as pairs of real ones, z = re + i im: every derivative is of real numbers by real numbers.

A traced graph is rewritten node by node. A linear op acts on both parts, a product of k complex operands is 2^k real ones, a
Fourier transform is sums with cosines and sines, a composite op is spelled out first. What is left is refused by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dualform.graphs.edit import emitter, inputs_of
from dualform.graphs.functionalize import Blame, functionalized
from dualform.graphs.single_results import bound_arguments, normalised
from dualform.ops.fourier import cosines, sines
from dualform.ops.pointwise import filled_with
from dualform.ops.table import find_row

aten = torch.ops.aten
Part = Any  # a node, a number, or None for zero


class Pair(NamedTuple):
    """re + i im."""

    re: Part
    im: Part


def paired(gm: fx.GraphModule, blame: Blame) -> fx.GraphModule:
    """Rewrite a graph without complex tensors that depend on its inputs; `blame` reports what cannot be rewritten."""
    if any(_is_complex(node) for node in gm.graph.nodes):
        _Rewriter(gm.graph, blame).run()
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return gm


def _is_complex(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else x
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex())


Rule = Callable[["_Rewriter", fx.Node, dict[str, Any]], Any]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """How an op of complex numbers is written with pairs; by its name, its arguments by theirs."""

    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


class _Rewriter:
    """One pass in order; `pairs` holds the parts of what is complex."""

    def __init__(self, graph: fx.Graph, blame: Blame) -> None:
        self.graph = graph
        self.blame = blame
        self.pairs: dict[fx.Node, Pair] = {}
        self.at: Any = None

    def run(self) -> None:
        reached: set[fx.Node] = set()
        for node in list(self.graph.nodes):
            if node.op == "placeholder" or any(n in reached for n in node.all_input_nodes):
                reached.add(node)
            if node.op == "call_function" and node in reached:
                reached.add(self.visit(node))
            elif node.op == "output":
                for result in node.all_input_nodes:
                    if _is_complex(result):
                        advice = "Return torch.view_as_real(z), or z.real and z.imag."
                        self.blame(result, "returns a complex tensor", advice)

    def visit(self, node: fx.Node) -> fx.Node:
        """Rewrite a node if it makes or takes complex tensors; the node that stands for it now."""
        operands = pytree.tree_leaves((node.args, dict(node.kwargs)))
        if not _is_complex(node) and not any(map(_is_complex, operands)):
            return node
        self.at = node
        rule = _RULES.get(getattr(node.target, "_opname", "")) or self.general(node)
        made = rule(self, node, bound_arguments(node))
        if isinstance(made, Pair):
            self.pairs[node] = Pair(*(self.fitted(part, node.meta["val"]) for part in made))
            return node
        made = self.fitted(made, node.meta["val"])
        node.replace_all_uses_with(made)
        return made

    def general(self, node: Any) -> Rule:
        """By the op's row: linear, or a product; else by its definition."""
        if node.target is operator.getitem:
            self.refuse(node.args[0])
        row = find_row(node.target)
        tensors = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point() or n.meta["val"].is_complex()]
        if row is not None and row.multilinear:
            return _product
        if row is not None and row.is_affine(frozenset(range(len(tensors)))):
            return _partwise
        if isinstance(node.target, torch._ops.OpOverload) and node.target._can_decompose():
            return _spelled
        self.refuse(node)

    def refuse(self, node: Any) -> NoReturn:
        advice = "Write it with real and imaginary parts, or with + - * / @, abs, angle, exp, log, fft, sums and views."
        self.blame(
            node, f"makes or takes complex numbers by {node.target._opname}, which has no rule in real ones", advice
        )

    def fitted(self, part: Part, like: Tensor) -> Part:
        """A part in the shape and dtype of the whole, where broadcasting with the other part would have made it so."""
        if part is None:
            return None
        if not isinstance(part, fx.Node):
            return self.full(part, like)
        dtype = like.dtype.to_real() if like.is_complex() else like.dtype
        if part.meta["val"].dtype != dtype:
            part = self.emit(aten._to_copy.default, part, dtype=dtype)
        return part if part.meta["val"].shape == like.shape else self.emit(aten.expand.default, part, list(like.shape))

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emitter(self.graph, self.at)(target, *args, **kwargs)

    def pair(self, x: Any) -> Pair:
        """The parts of an argument; a real one has no imaginary part."""
        if not isinstance(x, fx.Node):
            return Pair(x.real or None, x.imag or None) if isinstance(x, complex) else Pair(x, None)
        if not _is_complex(x):
            return Pair(x, None)
        if (number := filled_with(x)) is not None:
            value = complex(number)
            return Pair(value.real or None, value.imag or None)
        if x not in self.pairs:  # an input or a constant
            self.pairs[x] = Pair(self.emit(aten.real.default, x), self.emit(aten.imag.default, x))
        return self.pairs[x]

    def whole(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The parts as tensors, zeros included."""
        re, im = (p if isinstance(p, fx.Node) else self.full(p or 0.0, x.meta["val"]) for p in self.pair(x))
        return re, im

    def full(self, value: float, like: Tensor) -> fx.Node:
        dtype = like.dtype.to_real() if like.is_complex() else like.dtype
        return self.emit(aten.full.default, list(like.shape), value, dtype=dtype, device=like.device)

    # -- arithmetic of parts, where None is zero

    def add(self, a: Part, b: Part, alpha: float = 1) -> Part:
        if b is None:
            return a
        if a is None:
            return b if alpha == 1 else self.mul(b, alpha)
        if not isinstance(a, fx.Node):
            return self.add(self.mul(b, alpha), a)
        return self.emit(aten.add.Tensor, a, b) if alpha == 1 else self.emit(aten.add.Tensor, a, b, alpha=alpha)

    def mul(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        if not isinstance(a, fx.Node):
            return a * b if not isinstance(b, fx.Node) else self.mul(b, a)
        return self.emit(aten.neg.default, a) if b == -1 else self.emit(aten.mul.Tensor, a, b)

    def neg(self, a: Part) -> Part:
        return self.mul(a, -1)

    def times(self, a: Pair, b: Pair) -> Pair:
        re = self.add(self.mul(a.re, b.re), self.mul(a.im, b.im), -1)
        return Pair(re, self.add(self.mul(a.re, b.im), self.mul(a.im, b.re)))

    def square(self, a: Pair) -> Part:
        """re^2 + im^2."""
        return self.add(self.mul(a.re, a.re), self.mul(a.im, a.im))

    def length(self, x: Any) -> fx.Node:
        """|z|; as a norm, its slope at 0 is 0, as torch has it."""
        both = self.emit(aten.stack.default, list(self.whole(x)), -1)
        return self.emit(aten.linalg_vector_norm.default, both, 2, [-1])

    def polar(self, length: Part, angle: Part) -> Pair:
        cos, sin = self.emit(aten.cos.default, angle), self.emit(aten.sin.default, angle)
        return Pair(self.mul(cos, length), self.mul(sin, length))

    def exp(self, a: Pair) -> Pair:
        length = 1.0 if a.re is None else self.emit(aten.exp.default, a.re)
        return Pair(length, None) if a.im is None else self.polar(length, a.im)


# -- ops that look at the parts


@_rule("real")
def _real(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.whole(given["self"])[0]


@_rule("imag")
def _imag(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.whole(given["self"])[1]


@_rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _filled_like(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    value = complex(given.get("fill_value", "ones" in node.target._opname))  # type: ignore[union-attr]
    if not _is_complex(node):
        return r.full(value.real, node.meta["val"])
    return Pair(value.real or None, value.imag or None)


@_rule("view_as_real", "view_as_real_copy")
def _view_as_real(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.emit(aten.stack.default, list(r.whole(given["self"])), -1)


@_rule("view_as_complex", "view_as_complex_copy")
def _view_as_complex(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return Pair(*(r.emit(aten.select.int, given["self"], -1, k) for k in (0, 1)))


@_rule("complex")
def _complex(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return Pair(given["real"], given["imag"])


@_rule("polar")
def _polar(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.polar(given["abs"], given["angle"])


@_rule("conj", "_conj", "conj_physical", "_conj_physical")
def _conj(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    re, im = r.pair(given["self"])
    return Pair(re, r.neg(im))


@_rule("abs", "absolute")
def _abs(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.length(given["self"])


@_rule("angle")
def _angle(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    re, im = r.whole(given["self"])
    return r.emit(aten.atan2.default, im, re)


@_rule("linalg_vector_norm", "norm")
def _norm(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    rest = {k: v for k, v in given.items() if k != "self" and (k != "dtype" or v is not None)}
    return r.emit(node.target, r.length(given["self"]), **rest)


@_rule("_to_copy", "to", "type")
def _to(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    re, im = r.pair(given["self"])
    return Pair(re, im) if _is_complex(node) else re


# -- arithmetic


@_rule("add", "sub", "subtract")
def _sum(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    a, b = r.pair(given["self"]), r.pair(given["other"])
    alpha = given["alpha"] * (1 if node.target._opname == "add" else -1)
    return Pair(r.add(a.re, b.re, alpha), r.add(a.im, b.im, alpha))


@_rule("rsub")
def _reversed(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    a, b = r.pair(given["self"]), r.pair(given["other"])
    return Pair(r.add(b.re, a.re, -given["alpha"]), r.add(b.im, a.im, -given["alpha"]))


@_rule("mul", "multiply")
def _times(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.times(r.pair(given["self"]), r.pair(given["other"]))


@_rule("square")
def _square(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    z = r.pair(given["self"])
    return r.times(z, z)


def _inverse(r: _Rewriter, z: Pair) -> Pair:
    if not any(isinstance(part, fx.Node) for part in z):
        found = 1 / complex(z.re or 0, z.im or 0)
        return Pair(found.real or None, found.imag or None)
    if z.im is None:
        return Pair(r.emit(aten.reciprocal.default, z.re), None)
    scale = r.emit(aten.reciprocal.default, r.square(z))
    return Pair(r.mul(scale, z.re), r.neg(r.mul(scale, z.im)))


@_rule("reciprocal")
def _reciprocal(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return _inverse(r, r.pair(given["self"]))


@_rule("div", "divide", "true_divide")
def _div(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.times(r.pair(given["self"]), _inverse(r, r.pair(given["other"])))


@_rule("sgn", "sign")
def _sgn(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    z = r.pair(given["self"])
    scale = r.emit(aten.reciprocal.default, r.length(given["self"]))
    return Pair(r.mul(scale, z.re), r.mul(scale, z.im))


@_rule("exp")
def _exp(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.exp(r.pair(given["self"]))


def _logarithm(r: _Rewriter, x: Any) -> Pair:
    if not isinstance(x, fx.Node):
        return r.pair(complex(torch.log(torch.tensor(x, dtype=torch.complex128))))
    if not _is_complex(x):
        return Pair(r.emit(aten.log.default, x), None)
    re, im = r.whole(x)
    return Pair(r.emit(aten.log.default, r.length(x)), r.emit(aten.atan2.default, im, re))


@_rule("log")
def _log(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return _logarithm(r, given["self"])


@_rule("sqrt")
def _sqrt(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    return r.exp(r.times(Pair(0.5, None), _logarithm(r, given["self"])))


@_rule("pow")
def _pow(r: _Rewriter, node: fx.Node, given: dict[str, Any]) -> Any:
    z, exponent = given["self"], given["exponent"]
    if isinstance(exponent, int) and 1 <= exponent <= 8:
        power = base = r.pair(z)
        for _ in range(exponent - 1):
            power = r.times(power, base)
        return power
    return r.exp(r.times(r.pair(exponent), _logarithm(r, z)))


# -- whole families


def _partwise(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    """A linear op acts on each part; a real operand among complex ones has no imaginary part, and neither has a number."""
    names = [a.name for a in node.target._schema.arguments if "number" in str(a.type) and a.name != "alpha"]
    parts = []
    for k in (0, 1):

        def part(x: Any, k: int = k) -> Any:
            if _is_complex(x):
                return r.whole(x)[k]
            is_real = k == 1 and x.meta["val"].is_floating_point()
            return r.emit(aten.zeros_like.default, x) if is_real else x

        values = {name: fx.map_arg(value, part) for name, value in given.items()}
        for name in names:
            if not isinstance(values[name], fx.Node) and values[name] is not None:
                values[name] = r.pair(complex(values[name]))[k] or 0.0
        if values.get("dtype") is not None:
            values["dtype"] = values["dtype"].to_real()
        parts.append(r.emit(node.target, *_placed(node, values)[0], **_placed(node, values)[1]))
    return Pair(*parts)


def _placed(node: Any, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    schema = node.target._schema.arguments
    return [values[a.name] for a in schema if not a.kwarg_only], {
        a.name: values[a.name] for a in schema if a.kwarg_only
    }


_rule("detach", "resolve_conj", "resolve_neg", "_neg_view")(_partwise)


def _product(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    """Every choice of parts is a real product, with the sign of i^k for k imaginary parts."""
    bias = given.get("bias")
    flat, spec = pytree.tree_flatten(given | {"bias": None})
    places = [k for k, x in enumerate(flat) if _is_complex(x)]
    parts: list[Part] = [None, None]
    for choice in product((0, 1), repeat=len(places)):
        chosen = list(flat)
        for k, which in zip(places, choice, strict=True):
            chosen[k] = r.whole(flat[k])[which]
        args, kwargs = _placed(node, pytree.tree_unflatten(chosen, spec))
        turns = sum(choice)
        parts[turns % 2] = r.add(parts[turns % 2], r.emit(node.target, *args, **kwargs), -1 if turns % 4 > 1 else 1)
    shift = r.pair(bias)
    return Pair(r.add(parts[0], shift.re), r.add(parts[1], shift.im))


@_rule("vdot", "linalg_vecdot")
def _vdot(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    """vdot(x, y) = sum of conj(x) y."""
    first, second = (a.name for a in node.target._schema.arguments[:2])
    z = r.pair(given[first])
    w = r.times(Pair(z.re, r.neg(z.im)), r.pair(given[second]))
    dims = [given["dim"]] if "dim" in given else [0]
    return Pair(*(None if part is None else r.emit(aten.sum.dim_IntList, part, dims) for part in w))


def _spelled(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    """Put an op's definition in its place, and rewrite that."""
    nodes = [n for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, fx.Node)]

    def call(*tensors: Tensor) -> Any:
        at = iter(tensors)
        args, kwargs = pytree.tree_map(
            lambda n: next(at) if isinstance(n, fx.Node) else n, (node.args, dict(node.kwargs))
        )
        return node.target(*args, **kwargs)

    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        gm = make_fx(call, tracing_mode="real")(*(n.meta["val"] for n in nodes))
    gm = normalised(functionalized(gm, r.blame))
    if any(n.target is node.target for n in gm.graph.nodes):
        r.refuse(node)
    inside: dict[fx.Node, Any] = dict(zip(inputs_of(gm.graph), nodes, strict=True))
    for n in gm.graph.nodes:
        if n.op == "call_function":
            with r.graph.inserting_before(node):
                copy = r.graph.node_copy(n, inside.__getitem__)
            copy.meta["stack_trace"] = node.meta.get("stack_trace") or node.stack_trace or ""
            inside[n] = r.visit(copy)
    r.at = node
    result = inside[gm.graph.output_node().all_input_nodes[0]]
    return r.pair(result) if _is_complex(node) else result


# Their rows are those of a transposition, which a conjugation goes with here.
_rule("mH", "adjoint", "matrix_H")(_spelled)


# -- the three transforms that all others are made of


def _scaled(r: _Rewriter, z: Pair, given: dict[str, Any], count: int) -> Pair:
    scale = {0: 1.0, 1: count**-0.5, 2: 1 / count}[given["normalization"]]
    return z if scale == 1 else Pair(r.mul(z.re, scale), r.mul(z.im, scale))


def _waves(r: _Rewriter, z: Pair, dim: int, sign: int, n: int, out: int) -> Pair:
    """sum over l of exp(sign 2 pi i k l / n) z[l]."""

    def of(op: Any, part: Part) -> Part:
        return None if part is None else r.emit(op, part, dim, n, out)

    re = r.add(of(cosines, z.re), of(sines, z.im), -sign)
    return Pair(re, r.add(of(cosines, z.im), of(sines, z.re), sign))


@_rule("_fft_r2c", "_fft_c2c")
def _fft(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    z, shape = r.pair(given["self"]), given["self"].meta["val"].shape
    sign = -1 if given.get("forward", True) else 1
    for dim in reversed(given["dim"]):
        z = _waves(r, z, dim % len(shape), sign, shape[dim], node.meta["val"].shape[dim])
    return _scaled(r, z, given, math.prod(shape[dim] for dim in given["dim"]))


@_rule("_fft_c2r")
def _real_fft(r: _Rewriter, node: Any, given: dict[str, Any]) -> Any:
    """Of the last dim half is given: the other half is its mirror, so that all but the ends count twice."""
    z, shape = r.pair(given["self"]), node.meta["val"].shape
    *others, last = (dim % len(shape) for dim in given["dim"])
    for dim in others:
        z = _waves(r, z, dim, 1, shape[dim], shape[dim])
    n, half = given["last_dim_size"], given["self"].meta["val"].shape[last]
    options = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
    ends, twice = (1, 2 * half - 1 - n), n - half
    counts = [
        r.emit(aten.full.default, [k], v, **options)
        for k, v in zip((ends[0], twice, ends[1]), (1.0, 2.0, 1.0), strict=True)
    ]
    weight = r.emit(aten.reshape.default, r.emit(aten.cat.default, counts), [-1, *[1] * (len(shape) - 1 - last)])
    z = _waves(r, Pair(r.mul(z.re, weight), r.mul(z.im, weight)), last, 1, n, n)
    return _scaled(r, z, given, math.prod(shape[dim] for dim in given["dim"])).re

"""Complex tensors as pairs of real ones, z = re + i im: every derivative is of real numbers by real numbers.

A traced graph is rewritten node by node. A linear op acts on both parts, a product of k complex operands is 2^k real
ones, a Fourier transform is sums with cosines and sines, a composite op is spelled out first. What is left is refused
by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dualform.graphs.aside import alone
from dualform.graphs.edit import emitter, inputs_of, line_of
from dualform.graphs.functionalize import Blame, functionalized
from dualform.graphs.single_results import normalised
from dualform.ops.factories import filled_with
from dualform.ops.table import bound_arguments, placed, row_of

aten = torch.ops.aten
Part = Any  # a node, a number, or None for zero


class Pair(NamedTuple):
    """re + i im."""

    re: Part
    im: Part


def is_complex(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else x
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex())


Rule = Callable[["PairWriter", fx.Node, dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """How an op of complex numbers is written with pairs; by its name, its arguments by theirs."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def _real(like: Tensor) -> torch.dtype:
    return like.dtype.to_real() if like.is_complex() else like.dtype


class PairWriter:
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
                    if is_complex(result):
                        advice = "Return torch.view_as_real(z), or z.real and z.imag."
                        self.blame(result, "returns a complex tensor", advice)

    def visit(self, node: fx.Node) -> fx.Node:
        """Rewrite a node if it makes or takes complex tensors; the node that stands for it now."""
        operands = pytree.tree_leaves((node.args, dict(node.kwargs)))
        if not is_complex(node) and not any(map(is_complex, operands)):
            return node
        self.at = node
        rule = RULES.get(getattr(node.target, "_opname", "")) or self.general(node)
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
        row = row_of(node.target)
        tensors = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point() or n.meta["val"].is_complex()]
        if row.multilinear:
            return _product
        if row.name and row.is_affine(frozenset(range(len(tensors)))):
            return _partwise
        if isinstance(node.target, torch._ops.OpOverload) and node.target._can_decompose():
            return _spelled
        self.refuse(node)

    def refuse(self, node: Any) -> NoReturn:
        what = f"makes or takes complex numbers by {node.target._opname}, which has no rule in real ones"
        advice = "Write it with real and imaginary parts, or with + - * / @, abs, angle, exp, log, fft, sums and views."
        self.blame(node, what, advice)

    def fitted(self, part: Part, like: Tensor) -> Part:
        """A part in the shape and dtype of the whole, where broadcasting with the other part would have made it so."""
        if part is None:
            return None
        if not isinstance(part, fx.Node):
            return self.full(part, like)
        if part.meta["val"].dtype != _real(like):
            part = self.emit(aten._to_copy.default, part, dtype=_real(like))
        return part if part.meta["val"].shape == like.shape else self.emit(aten.expand.default, part, list(like.shape))

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emitter(self.graph, self.at)(target, *args, **kwargs)

    def pair(self, x: Any) -> Pair:
        """The parts of an argument; a real one has no imaginary part."""
        if not isinstance(x, fx.Node):
            return Pair(x.real or None, x.imag or None) if isinstance(x, complex) else Pair(x, None)
        if not is_complex(x):
            return Pair(x, None)
        if (number := filled_with(x)) is not None:
            return self.pair(complex(number))
        if x not in self.pairs:  # an input or a constant
            self.pairs[x] = Pair(self.emit(aten.real.default, x), self.emit(aten.imag.default, x))
        return self.pairs[x]

    def whole(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The parts as tensors, zeros included."""
        re, im = (p if isinstance(p, fx.Node) else self.full(p or 0.0, x.meta["val"]) for p in self.pair(x))
        return re, im

    def full(self, value: float, like: Tensor) -> fx.Node:
        return self.emit(aten.full.default, list(like.shape), value, dtype=_real(like), device=like.device)

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

    def conj(self, a: Pair) -> Pair:
        return Pair(a.re, self.neg(a.im))

    def scaled(self, a: Pair, scale: Part) -> Pair:
        return Pair(self.mul(a.re, scale), self.mul(a.im, scale))

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
        return self.scaled(Pair(cos, sin), length)

    def exp(self, a: Pair) -> Pair:
        length = 1.0 if a.re is None else self.emit(aten.exp.default, a.re)
        return Pair(length, None) if a.im is None else self.polar(length, a.im)


def _partwise(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    """A linear op acts on each part; a real operand among complex ones, or a number, has no imaginary part."""
    names = [a.name for a in node.target._schema.arguments if "number" in str(a.type) and a.name != "alpha"]
    parts = []
    for k in (0, 1):

        def part(x: Any, k: int = k) -> Any:
            if is_complex(x):
                return r.whole(x)[k]
            is_real = k == 1 and x.meta["val"].is_floating_point()
            return r.emit(aten.zeros_like.default, x) if is_real else x

        values = {name: fx.map_arg(value, part) for name, value in given.items()}
        for name in names:
            if not isinstance(values[name], fx.Node) and values[name] is not None:
                values[name] = r.pair(complex(values[name]))[k] or 0.0
        if values.get("dtype") is not None:
            values["dtype"] = values["dtype"].to_real()
        args, kwargs = placed(node.target, values)
        parts.append(r.emit(node.target, *args, **kwargs))
    return Pair(*parts)


rule("detach", "resolve_conj", "resolve_neg", "_neg_view")(_partwise)


def _product(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    """Every choice of parts is a real product, with the sign of i^k for k imaginary parts."""
    bias = given.get("bias")
    flat, spec = pytree.tree_flatten(given | {"bias": None})
    places = [k for k, x in enumerate(flat) if is_complex(x)]
    parts: list[Part] = [None, None]
    for choice in product((0, 1), repeat=len(places)):
        chosen = list(flat)
        for k, which in zip(places, choice, strict=True):
            chosen[k] = r.whole(flat[k])[which]
        args, kwargs = placed(node.target, pytree.tree_unflatten(chosen, spec))
        turns = sum(choice)
        parts[turns % 2] = r.add(parts[turns % 2], r.emit(node.target, *args, **kwargs), -1 if turns % 4 > 1 else 1)
    shift = r.pair(bias)
    return Pair(r.add(parts[0], shift.re), r.add(parts[1], shift.im))


def _spelled(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    """Put an op's definition in its place, and rewrite that."""
    gm = normalised(functionalized(alone(node), r.blame))
    if any(n.target is node.target for n in gm.graph.nodes):
        r.refuse(node)
    inside: dict[fx.Node, Any] = dict(zip(inputs_of(gm.graph), node.all_input_nodes, strict=True))
    for n in gm.graph.nodes:
        if n.op == "call_function":
            with r.graph.inserting_before(node):
                copy = r.graph.node_copy(n, inside.__getitem__)
            copy.meta["stack_trace"] = line_of(node)
            inside[n] = r.visit(copy)
    r.at = node
    result = inside[gm.graph.output_node().all_input_nodes[0]]
    return r.pair(result) if is_complex(node) else result


# Their rows are those of a transposition, which a conjugation goes with here.
rule("mH", "adjoint", "matrix_H")(_spelled)

"""The account of a product of two derivatives: both factors, the sum over the middle, the order of the contraction.

(J2 J1)[out, in] = sum over mid of J2[out, mid] J1[mid, in]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dualform.algebra.index_text import IndexFormula
from dualform.algebra.linear_map import Derivative, Route, compose
from dualform.algebra.notation import Names, formula
from dualform.algebra.terms import recorded
from dualform.explanations.chain_rule import Link, derive
from dualform.explanations.explanation import LEVELS, Explanation, agreed, deviation
from dualform.explanations.steps import OpStep, Stage
from dualform.explanations.torch_code import Pullback, vjp_code
from dualform.explanations.wording import meaning, reasons
from dualform.shapes import fail

# The entries up to which every one is compared with the product of the factors.
MAX_COMPARED = 4096
# A chain rule of more products than this is not written out.
MAX_PRODUCTS = 12


@dataclass(frozen=True)
class Joined(Route):
    """The route of outer @ inner: one after the other; x: inner input, y: what they meet in, z: outer result."""

    outer: Derivative
    inner: Derivative

    def vjp(self, g: Tensor) -> Tensor:
        return self.inner.vjp(self.outer.vjp(g))

    def jvp(self, v: Tensor) -> Tensor:
        return self.outer.jvp(self.inner.jvp(v))

    def joined(self, outer: Derivative, inner: Derivative) -> Route:
        """A product of three is explained as one of two."""
        return Joined(outer, inner)

    def told(self, derivative: Derivative) -> Derivative:
        """The product made once more, with a record of what its factors are made of."""
        with recorded():
            product = compose(*map(_told, (self.outer, self.inner)))
        product.route = self
        return product

    def shown(self, derivative: Derivative) -> IndexFormula:
        """The product in index notation."""
        return self._step("chain", "dz/dx", self.told(derivative), self._names()).formula

    def _names(self) -> Names:
        values = {n: t for K in (self.outer, self.inner) if K.route is not None for n, t in K.route.inputs.items()}
        return Names(values, avoid="phrxyz")

    def explain(self, derivative: Derivative, level: str) -> Explanation:
        """Both factors with their shapes, how they meet, what a vjp costs, its code, and checks."""
        if level not in LEVELS:
            fail("explain", "level", f"is {level!r}", f"one of {list(LEVELS)}", "Choose one.", ValueError)
        names, derivative = self._names(), self.told(derivative)
        first = self._step("inner", "dy/dx", _told(self.inner), names)
        second = self._step("outer", "dz/dy", _told(self.outer), names)
        result = self._step("chain", "dz/dx", derivative, names)
        moves = []
        if len(first.formula.lines) * len(second.formula.lines) <= MAX_PRODUCTS:
            links = [Link(second.formula, first.formula, self.outer.in_shape)]
            moves = derive("dz/dx", links, derivative.out_shape, derivative.in_shape, False, names.avoid)
        code = vjp_code(derivative, names, "x")
        shapes = f"x:{self.inner.in_shape}  ->  y:{self.inner.out_shape}  ->  z:{self.outer.out_shape}"
        return Explanation(
            level, shapes, (first, second), ("dz/dx = dz/dy · dy/dx", *self._costs(derivative)), result, code,
            tuple(self._checks(derivative, code)), (Stage("dz/dx", tuple(moves), derivative.out_shape),),
            moves[-1].formula if moves else None,
        )  # fmt: skip

    def _step(self, op: str, symbol: str, J: Derivative, names: Names) -> OpStep:
        shown = formula(J.terms, J.out_shape, J.in_shape, symbol, names=names)
        known = {name: "an input" for K in (self.inner, self.outer) if K.route for name in K.route.inputs}
        why = ("an axis is empty: there is no entry",)
        if math.prod(J.shape):
            why = reasons(shown, partial(meaning, known=known))
        text = f"{symbol[1]} <- {symbol[-1]}   {J.out_shape} by {J.in_shape}"
        return OpStep(op, text, shown, J, "; ".join(why), "", why)

    def _costs(self, J: Derivative) -> Sequence[str]:
        """How a vjp by the terms would be contracted, and the price of going one after the other."""
        one, both = ([p.flops for p in K.plans("vjp")] for K in (J, self.outer)), self.inner.plans("vjp")
        whole, apart = (sum(found) for found in one)
        lines = [f"a vjp by these terms: {whole:,} flops; by dz/dy, then dy/dx: {apart + sum(p.flops for p in both):,}"]
        for k, plan in enumerate(J.plans("vjp"), 1):
            head = f"term {k}: " if len(J.terms) > 1 else ""
            lines += [f"{head}{line}" if n == 0 else line for n, line in enumerate(str(plan).splitlines())]
        return lines

    def _checks(self, J: Derivative, code: Pullback) -> list[tuple[str, float]]:
        generator = torch.Generator().manual_seed(0)
        g = torch.randn(J.out_shape, generator=generator, dtype=torch.float64).to(J.device, J.dtype)
        checks = [("the code above against the factors' vjps", deviation(code.run(g), self.vjp(g)))]
        if max(math.prod(K.shape) for K in (J, self.inner, self.outer)) <= MAX_COMPARED:
            product = torch.tensordot(self.outer.dense(), self.inner.dense(), len(self.inner.out_shape))
            checks.append(("every entry against the product of the factors", deviation(J.dense(), product)))
        return agreed(checks, J.dtype)


def _told(K: Derivative) -> Derivative:
    return K if K.route is None else K.route.told(K)

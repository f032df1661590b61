"""The forms of a program, a record each: where it applies, in which orders a block's sums may be taken, at what price.

At a site, a query token meets what the tokens up to it have written:
    y_t -= sum_{s<=t} C[t,s] J(xq_t) sum_sites J(x_s)^T delta_s
A correction is an order of that contraction. A form is the corrections that it allows, and what it asks of the learner.

Legend: W tokens, t query token, s key token, J d y / d leaf, delta d loss / d y, C the rule's coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dualform.algebra.linear_map import Derivative, compose
from dualform.algebra.planner import Price
from dualform.graphs.trace import source_line
from dualform.learning.rules import Coefficients, Rule
from dualform.learning.sites import Analysis
from dualform.learning.token_maps import (
    Written,
    is_elementwise,
    kernel_first,
    masked,
    per_source,
    per_target,
    prefix,
    price,
    running,
)


@dataclass
class Meeting:
    """Where one leaf meets the query tokens, and what the key pass left of it."""

    J: Derivative
    axis: int | None  # of the tokens in y
    written: list[Written]
    coef: Coefficients
    shape: torch.Size  # the leaf's
    W: int
    y: Tensor

    @cached_property
    def kernels(self) -> list[tuple[Derivative, Tensor]]:
        """Scores, query by key, and the delta that each meets."""
        return [
            (masked(compose(self.J, K.T), self.axis, other, self.coef.C), delta) for K, other, delta in self.written
        ]

    @cached_property
    def gradients(self) -> list[tuple[Derivative, Tensor]]:
        """The maps from each delta to every token's own gradient."""
        return [(per_source(K, other), delta) for K, other, delta in self.written]

    @cached_property
    def spread(self) -> Derivative:
        """The map from a weight per token to y."""
        return per_target(self.J, self.axis)


@dataclass(frozen=True)
class Correction:
    """An order of the contraction: its equation, price and value, and why it would not do (or None)."""

    name: str
    says: str
    equation: str
    price: Callable[[Meeting], Price]
    value: Callable[[Meeting], Tensor]
    applies: Callable[[Meeting], str | None]


def _scores_price(m: Meeting) -> Price:
    return sum((kernel_first(K, delta) for K, delta in m.kernels), Price())


def _scores(m: Meeting) -> Tensor:
    y = m.y
    for K, delta in m.kernels:
        y = y - K.jvp(delta)
    return y


def _state_price(m: Meeting) -> Price:
    _, summed = running(m.coef, m.W, m.W * m.shape.numel(), m.y.element_size())
    return sum((price(K, delta) for K, delta in m.gradients), summed) + price(m.spread, m.y)


def _state(m: Meeting) -> Tensor:
    g = [K.jvp(delta) for K, delta in m.gradients]
    return m.y - m.spread.jvp(prefix(sum(g[1:], g[0]), m.coef))


def _is_product(m: Meeting) -> str | None:
    return "each entry of y meets one entry of the leaf: a running sum does it" if is_elementwise(m.J) else None


def _is_sum(m: Meeting) -> str | None:
    return None if is_elementwise(m.J) else "an entry of y meets several entries of the leaf"


scores = Correction(
    "scores", " (dual): query with key first, no weight per token", "y_t -= sum_s (C[t,s] J_t J_s^T) delta_s",
    _scores_price, _scores, _is_product,
)  # fmt: skip
state = Correction(
    "state", ": the weights of every token, read in order", "y_t -= J_t (sum_s C[t,s] J_s^T delta_s)",
    _state_price, _state, _is_product,
)  # fmt: skip
scan = Correction(
    "scan", ": a running sum, no larger than the output", "y_t -= J_t * sum_s C[t,s] (J_s * delta_s)",
    _state_price, _state, _is_sum,
)  # fmt: skip
corrections = (scores, state, scan)
says = {c.name: c.says for c in corrections}


def _sites_are_affine(rule: Rule, a: Analysis) -> str | None:
    bad = next((site for site in a.sites if site.leaves and not site.admissible), None)
    return None if bad is None else f"{source_line(bad.node)}: {bad.why}"


@dataclass(frozen=True)
class Form:
    """One way to compute a program.

    applies: None, or the learner's line and why not. corrections: the orders that it allows; none: token by token, as
    the definition says. reassociates: are products of weights rewritten wherever they can be, or only where it is
    cheaper?
    """

    name: str
    says: str
    applies: Callable[[Rule, Analysis], str | None] = lambda rule, a: None
    corrections: tuple[Correction, ...] = ()
    reassociates: bool = False
    expected: str = ""  # what a learner must be for it

    def choose(self, m: Meeting) -> tuple[Correction, dict[str, Price]]:
        """Return the cheapest correction that applies, and what each would cost."""
        prices = {c.name: c.price(m) for c in corrections}
        able = [c for c in self.corrections if c.applies(m) is None]
        return min(able, key=lambda c: prices[c.name].total), prices


records = (
    Form(
        "auto",
        "each site in its cheapest order; weights per token where the learner is not affine in them",
        corrections=corrections,
    ),
    Form(
        "dual",
        "scores at every site: no gradient of a weight is formed",
        applies=_sites_are_affine,
        corrections=(scores, scan),
        reassociates=True,
        expected="weights that enter affinely, or as a product that can be re-associated",
    ),
    Form("primal", "one token after another, with the user's module and torch's gradients: the definition"),
)
forms = {form.name: form for form in records}

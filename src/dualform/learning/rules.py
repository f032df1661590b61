"""Update rules as register recurrences.

A rule keeps r registers R beside the anchor `th` (where a mini-batch's gradients g are taken):

    R_t = A_t R_{t-1} - b_t g_t          theta_t = a_t th + u_t . R_t

with scalars A (r x r), b (r), u (r), a computed from the gates at token t and from its position i in the mini-batch
(from 1). At the mini-batch's end `th <- theta_b`, and a register marked in `resets` starts anew. That is all a rule is.

Legend: r registers, n tokens in a block, t query token, s source token, k, l registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dualform.catalogue import Catalogue
from dualform.own_code import CodeError, expect_options, reader
from dualform.shapes import fail, require

Scalar = float | Tensor


class Step(NamedTuple):
    """One token's coefficients: A (r rows of r), b (r), u (r), a. Entries are numbers or tensors shaped like a gate."""

    A: tuple[tuple[Scalar, ...], ...]
    b: tuple[Scalar, ...]
    u: tuple[Scalar, ...]
    a: Scalar


@dataclass(frozen=True, eq=False)
class Rule:
    """Describe an optimiser that is linear in its gradients, as a register recurrence.

    R_t = A_t R_{t-1} - b_t g_t,  theta_t = a_t th + u_t . R_t
    Shape:  step(i, **gates) gets i and every gate as tensors of one shape and returns `Step` entries of that shape.
    Dtype:  the state's (float32 or float64).
    Raises: ValueError if the record's sizes disagree.
    Source: DESIGN section 1 of this project; covers SGD, TTT's averaged rule, momentum, weight decay, Titans.
    Example:
        >>> import dualform as df
        >>> lion_free = df.Rule(step=lambda i, lr: df.Step(A=((1.0,),), b=(0.5 * lr,), u=(1.0,), a=1.0), gates=("lr",))
        >>> lion_free.num_registers
        1
    """

    step: Callable[..., Step]
    gates: tuple[str, ...] = ("lr",)
    constants: Mapping[str, float] = field(default_factory=dict)  # a gate's value when the caller gives none
    start: tuple[float, ...] = (0.0,)  # R_0 = start * th: 0 an empty register, 1 a copy of the weights
    resets: tuple[bool, ...] = (True,)  # does the register start anew at each mini-batch?
    name: str = "rule"

    def __post_init__(self) -> None:
        self._expect_kinds()
        if len(self.start) != len(self.resets):
            raise ValueError(
                f"Rule: start has {len(self.start)} entries and resets has {len(self.resets)}; expected one of each "
                "per register. Give both the same length."
            )
        for part, size in self._sizes().items():
            if size != self.num_registers:
                raise ValueError(
                    f"Rule: step returns {part} with {size} entries; expected one per register = {self.num_registers} "
                    f"(start = {self.start}). Make start, resets, A, b and u agree."
                )

    def _expect_kinds(self) -> None:
        """Refuse fields of another kind."""

        def require_all(name: str, is_right: bool, expected: str, advice: str) -> None:
            require(is_right, "Rule", name, getattr(self, name), expected, advice, ValueError)

        def is_tuple(x: Any, *kinds: type) -> bool:
            return isinstance(x, tuple) and all(isinstance(v, kinds) for v in x)

        words = ", ".join(f"{gate}" for gate in self.gates) if is_tuple(self.gates, str) else "**gates"
        require_all("step", callable(self.step), f"a function step(i, {words}) -> Step", "Pass one.")
        require_all("gates", is_tuple(self.gates, str), "a tuple of names", "Write ('lr',), with its comma.")
        is_mapping = isinstance(self.constants, Mapping) and is_tuple(tuple(self.constants.values()), int, float)
        require_all("constants", is_mapping, "a mapping from gates to numbers", "Write {'decay': 0.1}.")
        require_all("start", is_tuple(self.start, int, float), "a tuple of numbers", "Write (0.0,), one per register.")
        require_all(
            "resets", is_tuple(self.resets, bool), "a tuple of True and False", "Write (True,), one per register."
        )
        require_all("name", isinstance(self.name, str), "a name", "Write a string.")

    def _sizes(self) -> dict[str, int]:
        """How many entries each part of a step has, all of which must be numbers or tensors."""
        gates, wanted = {gate: torch.ones(()) for gate in self.gates}, f"step(i, {', '.join(self.gates)}) -> Step"
        try:
            got = self.step(torch.ones(()), **gates)
            sizes = {"A": len(got.A), "b": len(got.b), "u": len(got.u)}
            sizes |= {f"A[{k}]": len(row) for k, row in enumerate(got.A)}
        except Exception as error:  # the user's code
            found = f"failed on tensors of shape () with {type(error).__name__}: {error}"
            fail("Rule", "step", found, wanted, f"Take {self.gates}, of any shape.", ValueError)
        for x in tree_leaves(tuple(got), is_leaf=lambda x: x is None):
            is_right = isinstance(x, Tensor | int | float)
            require(is_right, "Rule", "an entry of step", x, "a number or a tensor", f"Write {wanted}.", ValueError)
        return sizes

    @property
    def num_registers(self) -> int:
        return len(self.start)

    def default(self, gate: str) -> float:
        """Return the value of a gate that the caller leaves out: the rule's constant, or 1 for lr and 0 for offset."""
        return self.constants.get(gate, {"lr": 1.0, "offset": 0.0}.get(gate, 0.0))


def _own_rule(where: str, found: Any, options: Mapping[str, Any]) -> Rule:
    """Return the user's own rule, or what a function or class of options makes."""
    if not isinstance(found, Rule) and callable(found):
        expect_options(where, found, 0, options, "NAME(**options) -> df.Rule")
        found, options = found(**options), {}
    if not isinstance(found, Rule) or options:
        what = f"a Rule, and has the options {dict(options)}" if options else f"a {type(found).__name__}"
        raise CodeError(f"{where} is {what}; expected a df.Rule, or a function of options that makes one. Return one.")
    return found


rules = Catalogue("rules", reader("rules", _own_rule))


@rules.record(
    name="SGD",
    formula="S_t = momentum S_{t-1} - lr_t g_t; theta_t = (1 - decay_t) theta_{t-1} + S_t | averaged: "
    "theta_i = th - max(1/i + offset_i, 0) sum_{j<=i} lr_j g_j",
    source="Sun et al. 2024 (TTT), code: eta_ij = tok_i lr_j; Behrouz et al. 2024 (Titans), eq. 13-14",
    aliases=("gradient_descent",),
)
def SGD(lr: float = 1.0, *, averaged: bool = False, momentum: float = 0.0, decay: float = 0.0) -> Rule:
    """Build (averaged) stochastic gradient descent with per-token, per-head rates, momentum and weight decay.

    One of the four records below, by its options.
    Shape:  gates lr, momentum, decay (batch, time, head); offset (chunk,). Effective rate = lr * gates["lr"].
    Raises: ValueError if lr is not finite, or averaged is combined with momentum or decay.
    Example:
        >>> import dualform as df
        >>> df.rules.SGD(lr=0.1, momentum=0.9).gates
        ('lr', 'momentum')
    """
    if averaged and (momentum or decay):
        raise ValueError(
            f"SGD: averaged=True with momentum = {momentum}, decay = {decay}; expected both = 0, the average has no "
            "memory across mini-batches. Drop averaged, or write a Rule of your own."
        )
    if averaged:
        return AveragedSGD(lr)
    if momentum:
        return MomentumSGD(lr, momentum, decay)
    return DecayedSGD(lr, decay) if decay else PlainSGD(lr)


@rules.record(name="PlainSGD", formula="theta_t = theta_{t-1} - lr_t g_t", source="Robbins and Monro 1951")
def PlainSGD(lr: float = 1.0) -> Rule:
    """Build plain stochastic gradient descent, a step per token.

    Shape:  gate lr (batch, time, head). Effective rate = lr * gates["lr"].
    Raises: ValueError if lr is not finite.
    """
    return Rule(partial(_plain, rate=_finite(lr)), name="SGD")


@rules.record(
    name="AveragedSGD",
    formula="theta_i = th - max(1/i + offset_i, 0) sum_{j<=i} lr_j g_j",
    source="Sun et al. 2024 (TTT), code: eta_ij = tok_i lr_j",
)
def AveragedSGD(lr: float = 1.0) -> Rule:
    """Build TTT's rule: the average of a mini-batch's steps so far (i from 1), with a learnable offset per position.

    Shape:  gates lr (batch, time, head), offset (chunk,).
    Raises: ValueError if lr is not finite.
    """
    return Rule(partial(_average, rate=_finite(lr)), ("lr", "offset"), name="averaged SGD")


@rules.record(
    name="MomentumSGD",
    formula="S_t = momentum_t S_{t-1} - lr_t g_t; theta_t = (1 - decay_t) theta_{t-1} + S_t",
    source="Polyak 1964; Behrouz et al. 2024 (Titans), eq. 13-14",
)
def MomentumSGD(lr: float = 1.0, momentum: float = 0.9, decay: float = 0.0) -> Rule:
    """Build stochastic gradient descent with momentum, and with weight decay unless that is 0.

    Shape:  gates lr, momentum and, if decay is not 0, decay (batch, time, head).
    Raises: ValueError if lr is not finite.
    """
    gates = ("lr", "momentum", "decay") if decay else ("lr", "momentum")
    constants = {"momentum": momentum, "decay": decay}
    step = partial(_heavy_ball, rate=_finite(lr))
    return Rule(step, gates, constants, start=(1.0, 0.0), resets=(False, False), name="SGD with momentum")


@rules.record(
    name="DecayedSGD",
    formula="theta_t = (1 - decay_t) theta_{t-1} - lr_t g_t",
    source="Behrouz et al. 2024 (Titans), eq. 13-14 without momentum",
)
def DecayedSGD(lr: float = 1.0, decay: float = 0.1) -> Rule:
    """Build stochastic gradient descent with weight decay.

    Shape:  gates lr, decay (batch, time, head).
    Raises: ValueError if lr is not finite.
    """
    constants, step = {"decay": decay}, partial(_forget, rate=_finite(lr))
    return Rule(step, ("lr", "decay"), constants, (1.0,), (False,), name="SGD with decay")


def _finite(lr: float) -> float:
    if not math.isfinite(lr):
        raise ValueError(f"SGD: lr is {lr}; expected a finite number. Choose another.")
    return lr


# Functions of the module, not of a record's: a model is pickled with its rule.
def _average(i: Tensor, lr: Tensor, offset: Tensor, *, rate: float) -> Step:
    return Step(A=((1.0,),), b=(rate * lr,), u=((1 / i + offset).clamp(min=0),), a=1.0)


def _heavy_ball(i: Tensor, lr: Tensor, momentum: Tensor, decay: Scalar = 0.0, *, rate: float) -> Step:
    keep = 1.0 - decay
    return Step(A=((keep, momentum), (0.0, momentum)), b=(rate * lr, rate * lr), u=(1.0, 0.0), a=0.0)


def _forget(i: Tensor, lr: Tensor, decay: Tensor, *, rate: float) -> Step:
    return Step(A=((1.0 - decay,),), b=(rate * lr,), u=(1.0,), a=0.0)


def _plain(i: Tensor, lr: Tensor, *, rate: float) -> Step:
    return Step(A=((1.0,),), b=(rate * lr,), u=(1.0,), a=1.0)


class Recurrence(Protocol):
    """A rule, or its trace."""

    @property
    def num_registers(self) -> int: ...
    @property
    def step(self) -> Callable[..., Step]: ...


class Coefficients(NamedTuple):
    """A rule unrolled over a block: theta_t = c_t th + d_t . R_0 - sum_{s<=t} C[t,s] g_s,
    and the same for R at the end.

    `row`, `col` are set when C = tril(row x col): then a sum over s <= t is a running sum.
    """

    C: Tensor  # (n, n), lower triangular
    row: Tensor | None  # (n,)
    col: Tensor | None  # (n,)
    c: Scalar  # (n,) or a number
    d: tuple[Scalar, ...]  # r of (n,) or a number
    carry: tuple[tuple[Scalar, ...], ...]  # A_n ... A_1
    write: tuple[Tensor, ...]  # r of (n,): (A_n ... A_{s+1} b_s)_k
    end: tuple[Scalar, tuple[Scalar, ...]]  # a and u at the last token: theta_b = a th + u . R_b


def unroll(
    rule: Recurrence, i: Tensor, gates: Mapping[str, Tensor], valid: Tensor | None, last: Tensor | None = None
) -> Coefficients:
    """Unroll the recurrence over a block of n tokens at positions i (n,); invalid tokens have A = I, b = 0.

    `last` (n,) is 1 at the token that ends the mini-batch, if one does; None: the block's last token does.
    """
    r, ones = rule.num_registers, torch.ones_like(i)
    A, b, u, a = tree_map_only(Tensor, partial(vector, ones=ones), tuple(rule.step(i, **gates)))
    sources = [vector(x, ones) if valid is None else vector(x, ones) * valid for x in b]
    end = (_at(a, last), tuple(_at(x, last) for x in u))
    if all(is_number(A[k][l], float(k == l)) for k in range(r) for l in range(r)):
        outer = [
            (vector(x, ones)[:, None] * y).tril() for x, y in zip(u, sources, strict=True) if not is_number(x, 0.0)
        ]
        separable = r == 1
        return Coefficients(
            C=sum(outer[1:], outer[0]),
            row=vector(u[0], ones) if separable else None,
            col=sources[0] if separable else None,
            c=a,
            d=u,
            carry=tuple(tuple(float(k == l) for l in range(r)) for k in range(r)),
            write=tuple(sources),
            end=end,
        )
    if valid is not None:
        A = [[_unless(x, valid, float(k == l)) for l, x in enumerate(row)] for k, row in enumerate(A)]
    product, prefix = segment_products(A, ones)
    weights = [mixed([row[l] for row in product], [_across(x) for x in u]) for l in range(r)]  # u_t A_t ... A_{s+1}
    return Coefficients(
        C=vector(mixed(weights, sources), ones[:, None] * ones).tril(),
        row=None,
        col=None,
        c=a,
        d=tuple(mixed([row[l] for row in prefix], u) for l in range(r)),
        carry=tuple(tuple(_at(x, None) for x in row) for row in prefix),
        write=tuple(vector(mixed([_at(x, None) for x in row], sources), ones) for row in product),
        end=end,
    )


Square = Sequence[Sequence[Scalar]]  # r rows of r


def segment_products(A: Square, ones: Tensor) -> tuple[Square, Square]:
    """Multiply along every segment: A_t ... A_{s+1}, for s <= t, and A_t ... A_1.

    P <- P (P moved down by m tokens), for m = 1, 2, 4, ...: log2(n) rounds, no division, so zeros and negative numbers
    are exact; what is certainly 0 or 1 in all steps stays a number. Shape: entries (n,) or numbers -> (n, n), (n,).
    """
    n = len(ones)
    P = [[_below(x, float(k == l), ones) for l, x in enumerate(row)] for k, row in enumerate(A)]
    for m in (1 << j for j in range((n - 1).bit_length())):
        P = _times(P, [[_down(x, m, float(k == l)) for l, x in enumerate(row)] for k, row in enumerate(P)])
    first = [[x[0] if isinstance(x, Tensor) else x for x in row] for row in A]
    return P, _times([[x[:, 0] if isinstance(x, Tensor) else x for x in row] for row in P], first)


def _times(P: Square, Q: Square) -> Square:
    return [[mixed(row, column) for column in zip(*Q, strict=True)] for row in P]


def _below(x: Scalar, unit: float, ones: Tensor) -> Scalar:
    """Lay a step's entry out: x_t where s < t, the unit's where s >= t."""
    if is_number(x, unit):
        return unit
    n = len(ones)
    own = vector(x, ones)[:, None].expand(n, n).tril(-1)
    return own + ones.expand(n, n).triu() if unit else own


def _down(x: Scalar, m: int, unit: float) -> Scalar:
    return torch.nn.functional.pad(x[:-m], (0, 0, m, 0), value=unit) if isinstance(x, Tensor) else x


def _unless(x: Scalar, valid: Tensor, unit: float) -> Scalar:
    """Take a unit's entry at tokens that are none."""
    return unit if is_number(x, unit) else torch.where(valid != 0, x, unit)


def _across(x: Scalar) -> Scalar:
    return x[:, None] if isinstance(x, Tensor) else x


def mixed(u: Iterable[Scalar], weights: Iterable[Scalar]) -> Scalar:
    """Sum u_k weights_k, what is certainly 0 or 1 left out."""
    parts = [
        w if is_number(m, 1.0) else m if is_number(w, 1.0) else m * w
        for m, w in zip(u, weights, strict=True)
        if not (is_number(m, 0.0) or is_number(w, 0.0))
    ]
    return sum(parts[1:], parts[0]) if parts else 0.0


def vector(x: Scalar, ones: Tensor) -> Tensor:
    """Return x as a vector like `ones`: a literal of fewer digits meets the others in theirs."""
    return x.expand_as(ones).to(ones.dtype) if isinstance(x, Tensor) else x * ones


def _at(x: Scalar, last: Tensor | None) -> Scalar:
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    return x[-1] if last is None else (x * last).sum()


def is_number(x: Scalar, number: float) -> bool:
    """Is x that number for certain, not a tensor that may hold it?"""
    return not isinstance(x, Tensor) and float(x) == number

"""Fusions: many outputs, one per channel or head, become one.

    u.length(dims, n) -> l        u.width(dims) -> n        u(xs, w=None) -> (..., n)

Elementwise fusions reduce along the list; concatenations put widths side by side, and may pass through a structured
matrix from the catalogue of reconciliations.

Legend: xs k tensors (..., n_i), dims their widths, n output, l parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.catalogue import Bound, Catalogue, near_misses
from dualform.functions.multilinear import Constants
from dualform.functions.reconciliations import reconciliations
from dualform.shapes import fail

fusions = Catalogue("fusions")

RPN2 = "Zhang 2024 (RPN 2, arXiv 2411.11162)"
fusion = partial(fusions.record, suffix="_fusion", source=RPN2)

# What a list of equal widths may be reduced with; the list is the first axis.
metrics: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
    "prod": lambda x: x.prod(0),
    "median": lambda x: x.median(0).values,
    "l1_norm": lambda x: x.abs().sum(0),
    "l2_norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "std": lambda x: x.std(0),
    "var": lambda x: x.var(0),
}

_identities = {"sum", "mean", "max", "min", "prod", "median"}  # reductions that leave a list of one as it is


@dataclass(frozen=True)
class Fusion:
    """A way to join k outputs, as data.

    kind: "reduce" by a metric, "weigh" by k numbers (given, or learnt if none are), "cat" side by side,
    "mix" side by side through a reconciliation.
    """

    name: str
    kind: str
    metric: str | Callable[[Tensor], Tensor] = "sum"
    weights: tuple[float, ...] | None = None
    reconciliation: Any = None
    n: int | None = None
    options: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_plain(self) -> bool:
        """Is one input alone its own fusion?"""
        return self.kind == "cat" or (self.kind == "reduce" and self.metric in _identities)

    def width(self, dims: Sequence[int], n: int | None = None) -> int:
        """Say how wide the result is; refuse widths that do not join. `n` is what is wanted, where that is free."""
        dims = tuple(dims)
        if not dims or min(dims) < 1:
            fail(self.name, "dims", f"is {dims}", "one width >= 1 per input", "Pass at least one input.")
        if self.kind == "cat":
            return sum(dims)
        if self.kind == "mix":
            return self.n or n or dims[0]
        if len(set(dims)) > 1:
            fail(self.name, "dims", f"is {dims}", f"equal widths = {dims[0]}", "Use a concatenation for unequal ones.")
        if self.weights is not None and len(self.weights) != len(dims):
            advice = "Pass as many weights as there are inputs."
            fail(self.name, "weights", f"has {len(self.weights)} entries", f"one per input = {len(dims)}", advice)
        return dims[0]

    def channel_width(self, n: int, channels: int) -> int:
        """Say how wide each of so many equal channels must be for a result of width n."""
        if self.kind != "cat":
            return n
        if n % channels:
            expected = f"a multiple of channels = {channels}, as they are put side by side"
            fail(self.name, "n", f"is {n}", expected, "Change n or channels, or use another fusion.")
        return n // channels

    def length(self, dims: Sequence[int], n: int | None = None) -> int:
        width = self.width(dims, n)
        if self.kind == "mix":
            return self.reconciliation.length(width, sum(dims))
        return len(dims) if self.kind == "weigh" and self.weights is None else 0

    def constants(self, dims: Sequence[int], n: int | None = None) -> dict[str, Tensor]:
        return self.reconciliation.constants(self.width(dims, n), sum(dims)) if self.kind == "mix" else {}

    def start(self, dims: Sequence[int]) -> Tensor | None:
        """Return the weights to begin with where they are plain: a learnt weighted sum begins as the sum."""
        return torch.ones(len(dims)) if self.kind == "weigh" else None

    def __call__(
        self, xs: Sequence[Tensor], w: Tensor | None = None, n: int | None = None, constants: Constants | None = None
    ) -> Tensor:
        xs = list(xs)
        dims = tuple(x.shape[-1] for x in xs)
        l = self.length(dims, n)
        if l and (w is None or tuple(w.shape) != (l,)):
            found = "is None" if w is None else f"has shape {tuple(w.shape)}"
            fail(self.name, "w", found, f"l = {l} entries in one axis for dims = {dims}", "Pass a w of that length.")
        if self.kind == "cat":
            return torch.cat(xs, -1)
        if self.kind == "mix":
            assert w is not None
            return self.reconciliation.apply(torch.cat(xs, -1), w, self.width(dims, n), constants)
        stacked = torch.stack(xs)
        if self.kind == "weigh":
            given = stacked.new_tensor(self.weights) if self.weights is not None else w
            return torch.tensordot(given, stacked, 1)  # pyright: ignore[reportArgumentType]: w was checked above
        return (metrics[self.metric] if isinstance(self.metric, str) else self.metric)(stacked)


def _reducing(name: str, *aliases: str, formula: str) -> None:
    def build() -> Fusion:
        return Fusion(name, "reduce", name)

    build.__doc__ = f"Reduce the list by its {name.replace('_', ' ')}, entry by entry; widths must be equal."
    build.__name__ = name
    fusion(aliases=aliases, formula=formula)(build)


_reducing("sum", "summation_fusion", "summation", formula="sum_i x_i")
_reducing("mean", "average_fusion", "average", formula="(1/k) sum_i x_i")
_reducing("max", formula="max_i x_i")
_reducing("min", formula="min_i x_i")
_reducing("prod", formula="prod_i x_i")
_reducing("median", formula="median_i x_i (the lower one of two)")
_reducing("l1_norm", formula="sum_i |x_i|")
_reducing("l2_norm", formula="sqrt(sum_i x_i^2)")


@fusion(formula="metric_i x_i")
def metric(metric: str | Callable[[Tensor], Tensor] = "mean") -> Fusion:
    """Reduce the list by a named metric, or by a function of the stacked list (k, ..., n) -> (..., n).

    Shape:  k times (..., n) -> (..., n).
    Raises: ValueError for an unknown metric.
    """
    if isinstance(metric, str) and metric not in metrics:
        advice = near_misses(metric, sorted(metrics))
        fail("metric", "metric", f"is {metric!r}", f"one of {sorted(metrics)}", advice, ValueError)
    return Fusion("metric", "reduce", metric)


@fusion(formula="sum_i w_i x_i, w given")
def weighted_summation(weights: Sequence[float]) -> Fusion:
    """Add with given weights.

    Shape:  k times (..., n) -> (..., n); no parameters.
    Raises: ShapeError if there are not k weights.
    """
    return Fusion("weighted_summation", "weigh", weights=tuple(float(x) for x in weights))


@fusion(formula="sum_i w_i x_i, w learnt; l = k")
def parameterized_weighted_summation() -> Fusion:
    """Add with learnt weights, which a Head begins at one.

    Shape:  k times (..., n) -> (..., n); w (k,).
    Raises: ShapeError if w does not have k entries. Differs: tinyBIG's raises for every k > 1.
    """
    return Fusion("parameterized_weighted_summation", "weigh")


@fusion(formula="[x_1 | ... | x_k]")
def concatenation() -> Fusion:
    """Put the inputs side by side; the width is the sum of theirs.

    Shape:  k times (..., n_i) -> (..., sum n_i); no parameters.
    Example:
        >>> fusions.concatenation()([torch.ones(2, 3), torch.zeros(2, 1)]).shape
        torch.Size([2, 4])
    """
    return Fusion("concatenation", "cat")


def _mixing(name: str, of: str, *aliases: str) -> None:
    """Register a concatenation that passes through the named reconciliation, with that record's own options and n."""
    record = reconciliations[of]

    def build(n: int | None = None, **options: Any) -> Fusion:
        if n is not None and n < 1:
            advice = "Pass the output width, or None for that of the first input."
            fail(name, "n", f"is {n}", "n >= 1", advice, ValueError)
        inner: Bound = record(**options)
        return Fusion(name, "mix", reconciliation=inner, n=n)

    own = inspect.Parameter("n", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in record.signature.parameters.values()), own]
    )
    build.__doc__ = f"""Put the inputs side by side and mix them with a learnt matrix, psi = {of}.

    Shape:  k times (..., n_i) -> (..., n); w (l,), l that of {of} at (n, sum n_i). n = None is the first input's width.
    Raises: ShapeError if w does not have l entries.
    """
    build.__name__ = name
    fusion(aliases=aliases, formula=f"[x_1 | ... | x_k] psi(w)^T, psi = {of}")(build)


_mixing("parameterized_concatenation", "identity")
_mixing("lowrank_parameterized_concatenation", "low_rank", "low_rank_parameterized_concatenation")
_mixing("hm_parameterized_concatenation", "hm")
_mixing("lphm_parameterized_concatenation", "lphm")
_mixing("dual_lphm_parameterized_concatenation", "dual_lphm")
_mixing("random_matrix_adaption_parameterized_concatenation", "random_matrix_adaption")

"""What estimators are given, made ready: sparse and missing values, the targets' names, spans that meet the features.

Legend: X (R, m) rows, z the standardised features or a layer's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from dualform.functions.expansions import expansions
from dualform.functions.head import Head
from dualform.shapes import fail

_most_numbers = 2 * 10**8  # of X as a whole: 1.6 GB; sparse rows beyond are not written out
_widest = 4.0  # standard deviations: features further out do not widen a span
_hidden_span = (-3.0, 3.0)  # hidden units start with mean square one
_absent = 1e-9  # functions no larger are not there
_share = 0.05  # of a layer's inputs that may lie where its functions are not


def dense(name: str, X: Any, columns: Sequence[str]) -> np.ndarray:
    """Write out rows of zeros too, unless they are too many, and refuse missing values, saying which."""
    if sparse.issparse(X):
        R, m = X.shape
        if R * m > _most_numbers:
            found = f"is sparse, and R m = {R:,} * {m:,} numbers if its zeros are written out"
            advice = "Make fewer features of it first: make_pipeline(TruncatedSVD(50), ...)."
            fail(name, "X", found, f"at most {_most_numbers:,}", advice, ValueError)
        X = X.toarray()
    missing = np.isnan(X)
    if missing.any():
        counts = missing.sum(0)
        where = ", ".join(f"{columns[i]} ({counts[i]:,})" for i in np.flatnonzero(counts)[:5])
        more = ", ..." if (counts > 0).sum() > 5 else ""
        found = f"contains NaN in {missing.any(1).sum():,} of {len(X):,} rows, in the columns {where}{more}"
        advice = "Fill it in first: make_pipeline(SimpleImputer(add_indicator=True), ...), or leave those rows out."
        fail(name, "X", found, "a number in each place", advice, ValueError)
    return X


def refuse_missing_targets(name: str, y: Any) -> None:
    values = np.asarray(y)
    if values.dtype.kind == "f" and values.ndim and np.isnan(values).any():
        missing = np.isnan(values.reshape(len(values), -1)).any(1).sum()
        advice = "Leave those rows out."
        fail(name, "y", f"contains NaN in {missing:,} of {len(values):,} rows", "a target for each", advice, ValueError)


def target_names(y: Any) -> list[str] | None:
    """Return the names that a DataFrame's columns, or a Series, give the targets."""
    columns = getattr(y, "columns", None)
    names: list[Any] = list(columns) if columns is not None else [getattr(y, "name", None)]
    return names if all(isinstance(name, str) and name for name in names) else None


def spanned(layer: Mapping[str, Any], z: np.ndarray | None) -> Mapping[str, Any]:
    """Give an expansion that has a span, and was told none, the span of its inputs z (None: a hidden layer's)."""
    spec = layer.get("expansion")
    if isinstance(spec, str):
        word, options = spec, dict[str, Any]()
    elif isinstance(spec, Mapping):
        options = dict(spec)
        word = options.pop("name", None)
    elif isinstance(spec, Sequence) and len(spec) == 2 and isinstance(spec[1], Mapping):
        word, options = spec[0], dict(spec[1])
    else:
        return layer
    known = isinstance(word, str) and word in expansions and "span" in expansions[word].options
    if not known or options.keys() & {"span", "centres"}:
        return layer
    low, high = _hidden_span
    if z is not None and z.min() < z.max():
        reach = _widest * z.std()
        low, high = float(max(z.min(), z.mean() - reach)), float(min(z.max(), z.mean() + reach))
    return {**layer, "expansion": (word, {**options, "span": (low, high)})}


@torch.no_grad()
def unmet(network: nn.Sequential, x: Tensor) -> str | None:
    """Say which layer is given values where none of its functions is, if they are more than a few; x: the rows."""
    for i, head in enumerate(network):
        assert isinstance(head, Head)
        if head.expansion.basis is not None:
            low, high = head.expansion.domain
            near = torch.stack([x - 0.05, x, x + 0.05])  # a zero in passing is none
            outside = (head.expansion.phi(near).abs().amax(-1) <= _absent).all(0)
            if head.expansion.knots and i == 0:  # beyond the first and last whole cell functions are missing
                outside = (x < low) | (x > high)
            if (share := outside.double().mean().item()) > _share:
                advice = "Leave span out, and it follows the data, or pass" if i == 0 else "Pass"
                return (
                    f"layers[{i}]: {share:.0%} of its inputs, {x.min():.3g} .. {x.max():.3g}, lie outside what "
                    f"{head.config.expansion!r} spans; expected at most {_share:.0%}. {advice} a wider one."
                )
        x = head(x)
    return None

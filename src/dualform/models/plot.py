"""A learnt function as a picture: its basis, its strongest terms, its part in each feature. Needs the extra `viz`.

Legend: R rows of the sample, m features, f the function, k basis functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from dualform.algebra.drawing import pictures
from dualform.functions.basis import Expansion
from dualform.functions.formula import Formula

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ink, _thin, _dots, _bars = "#1f4e79", "#9db8d2", "#c9734b", "#6f9bc4"
_num_lines, _num_points = 24, 81


def draw(
    f: Callable[[np.ndarray], np.ndarray], sample: np.ndarray, labels: Sequence[str], number: int, output: str,
    expansion: Expansion, formula: Formula, is_standard: bool, points: Any, max_features: int,
) -> Figure:  # fmt: skip
    """Draw one output of a model; return the figure."""
    figure_of = pictures("plot")
    curves = [_curves(f, sample, i) for i in range(sample.shape[1])]
    order = np.argsort([-lines.std(1).mean() for _, lines in curves], kind="stable")[: max(1, max_features)]
    across = min(3, len(order))
    down = -(-len(order) // across)
    figure = figure_of(figsize=(max(8.0, 3.5 * across), 3.1 + 2.6 * down), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[2.7, 2.6 * down]))
    left, right = top.subplots(1, 2)
    _draw_basis(left, expansion, sample, is_standard)
    _draw_terms(right, formula, sample, number, output)
    panels = bottom.subplots(down, across, squeeze=False, sharey=True).flatten()
    for panel, i in zip(panels, order, strict=False):
        x, lines = curves[i]
        _draw_feature(panel, x, lines, sample[:, i], labels[int(i)])
        if points is not None and points[1] is not None:
            X, y = points
            middle = np.interp(X[:, i], curves[i][0], curves[i][1].mean(0))
            panel.plot(X[:, i], y - f(X) + middle, ".", color=_dots, markersize=3, alpha=0.5, zorder=1,
                       label="partial residuals")  # fmt: skip
    for panel in panels[len(order) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    for panel in panels[::across]:
        panel.set_ylabel(output)
    text = formula.text(4)
    if "\n" not in text and len(text) <= 100:
        figure.suptitle(text, family="monospace", fontsize=11)
    return figure


def _curves(f: Callable[[np.ndarray], np.ndarray], sample: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Change feature i alone, between its 1st and 99th percentile: (points,), (rows, points)."""
    rows = sample[np.linspace(0, len(sample) - 1, min(len(sample), 4 * _num_lines)).astype(int)]
    low, high = np.quantile(sample[:, i], [0.01, 0.99])
    x = np.linspace(low, high, _num_points)
    changed = np.repeat(rows[:, None], len(x), 1)
    changed[:, :, i] = x
    return x, f(changed.reshape(-1, sample.shape[1])).reshape(len(rows), len(x))


def _draw_feature(panel: Any, x: np.ndarray, lines: np.ndarray, values: np.ndarray, label: str) -> None:
    thin = lines[:: max(1, len(lines) // _num_lines)].T
    named = ["single rows", *[None] * (thin.shape[1] - 1)]
    panel.plot(x, thin, color=_thin, linewidth=0.6, alpha=0.7, zorder=2, label=named)
    panel.plot(x, lines.mean(0), color=_ink, linewidth=2.2, zorder=3, label="mean")
    inside = values[(values >= x[0]) & (values <= x[-1])][:300]
    marks = {"color": "#777777", "markersize": 4, "alpha": 0.5, "clip_on": False}
    panel.plot(inside, np.zeros(len(inside)), "|", transform=panel.get_xaxis_transform(), **marks)
    panel.set_xlabel(label)
    _plain(panel)


def _draw_basis(panel: Any, expansion: Expansion, sample: np.ndarray, is_standard: bool) -> None:
    """The functions of one feature; for tensor powers, those of it alone."""
    low, high = (-2.5, 2.5) if is_standard else np.quantile(sample, [0.01, 0.99])
    x = torch.linspace(float(low), float(high), 241, dtype=torch.float64)
    if expansion.basis is not None:
        y, said = expansion.phi(x), f"{expansion.name}: {expansion.width} functions of each feature"
    elif max(expansion.degrees) > 1:
        y = torch.stack([x**d for d in expansion.degrees], -1)
        said = f"{expansion.name}: products of up to {max(expansion.degrees)} features"
    else:
        one = expansion.batchwise and expansion.takes(1)
        y = expansion(x[:, None]) if one else torch.zeros(len(x), 0, dtype=x.dtype)
        said = f"{expansion.name}, of one feature" if one else f"{expansion.name}: {expansion.rule} features"
    shades = np.linspace(0.35, 1.0, max(1, y.shape[1]))
    for column, shade in zip(y.T.numpy(), shades, strict=False):
        panel.plot(x.numpy(), column, color=_ink, alpha=float(shade), linewidth=1.3)
    panel.set_title(said, fontsize=10)
    panel.set_xlabel("standardised feature" if is_standard else "feature")
    _plain(panel)


def _draw_terms(panel: Any, formula: Formula, sample: np.ndarray, number: int, output: str, count: int = 8) -> None:
    """The terms of the output's own line by what they move it, or, of layers in a row, the features."""
    effects = formula.effects(sample, number)[:count]
    shown = "terms" if formula.is_flat(number) else "features"
    names = [name if len(name) <= 30 else name[:28] + " …" for name, _ in effects]
    panel.barh(range(len(effects)), [size for _, size in effects], color=_bars)
    panel.set_yticks(range(len(effects)), names, family="monospace", fontsize=8)
    panel.invert_yaxis()
    panel.set_title(f"strongest {shown} of {output}", fontsize=10)
    panel.set_xlabel(f"standard deviation, in units of {output}")
    _plain(panel)


def _plain(panel: Any) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.tick_params(labelsize=8)

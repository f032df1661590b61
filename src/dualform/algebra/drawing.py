"""A derivative as a picture: its entries as a matrix of blocks, and its terms as wires from output axes to input axes.

A dashed wire is a delta, a box a stored factor, an open end a copy (on the output) or a sum (on the input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from dualform.algebra.index_products import Index
from dualform.algebra.index_text import IndexFormula, Line, number
from dualform.algebra.pattern import pattern
from dualform.algebra.proofs import Questions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, darkened to be read on white.
COLOURS = ("#0072b2", "#c04a00", "#00795a", "#a8407f", "#7a5c00", "#5b4fcf", "#8b1a1a", "#2f6f8f")
# Rows, and columns, of the matrix; beyond them only the first entries of the longest axes are drawn.
MAX_CELLS = 64
MAX_TERMS = 3
# Rows, and columns, of a picture of which entries there are; beyond them a cell stands for several.
MAX_SPOTS = 512
_PAGE = 7.2  # inches: text of 8 points is still that on a page


def pictures(where: str) -> type[Figure]:
    """Give the kind of figure that everything is drawn in: matplotlib is asked for only here."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{where}: the package {error.name!r} is not installed; expected the extra 'viz'. "
            'Run `pip install "dualform[viz]"`.',
            name=error.name,
        ) from error
    return _picture(Figure)


@cache
def _picture(Figure: type[Figure]) -> type[Figure]:
    class Picture(Figure):
        """A figure that a notebook shows without pyplot, which would show it twice."""

        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png", dpi=110)
            return written.getvalue()

    return Picture


def draw(J: Questions, shown: IndexFormula) -> Figure:
    """Draw the entries of a derivative, and how its terms join output to input."""
    terms = shown.lines[:MAX_TERMS]
    tallest = max([len(shown.out), len(shown.inn), *(len(line.factors) + len(line.ties) for line in terms)], default=1)
    wires, below = max(len(terms), 1), len(terms) > 1
    height = (2.9 if below else 1.0) + max(0.42 * tallest, 1.2 if below else 2.2) + 0.6
    figure = pictures("Derivative.plot")(figsize=(_PAGE, height), layout="constrained")
    if below:  # the matrix above, the terms in one row of the page's width
        grid = figure.add_gridspec(2, wires, height_ratios=[2.9, height - 3.5])
        panels = [figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, k]) for k in range(wires))]
    else:
        panels = list(figure.subplots(1, 2, width_ratios=[1.7, 1.0]))
    named = (x for x in (*shown.out, *shown.inn) if x != "0")
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(named)}
    _matrix(figure, panels[0], J, shown)
    for k, line in enumerate(terms):
        left = len(shown.lines) - MAX_TERMS
        more = f"  (and {left} more)" if k == MAX_TERMS - 1 and left > 0 else ""
        sign = "" if len(shown.lines) == 1 and line.coef == 1 else f"term {k + 1}:  {number(line.coef)} ×{more}"
        _wires(panels[k + 1], J, shown, line, colours, sign)
    if not terms:
        panels[1].set_axis_off()
        panels[1].text(0.5, 0.5, "no term:\nevery entry is 0", ha="center", va="center")
    text = "\n".join(wrap(shown.sentence, 84, subsequent_indent="    ")[:2])
    more = "" if len(text.split()) == len(shown.sentence.split()) else " ..."
    figure.suptitle(text + more, family="DejaVu Sans Mono", fontsize=9)
    return figure


def spy(J: Questions) -> Figure:
    """Draw which entries are not zero for all numbers; of too many to draw, what share of a cell is not."""
    rows, columns = (max(1, math.prod(shape)) for shape in (J.out_shape, J.in_shape))
    where = pattern(J.terms if math.prod(J.shape) else (), J.device).cpu()
    cells = min(rows, MAX_SPOTS), min(columns, MAX_SPOTS)
    places = (where // columns * cells[0] // rows, where % columns * cells[1] // columns)
    shares = torch.zeros(cells).index_put(places, torch.ones(len(where)), accumulate=True)
    shares *= math.prod(cells) / (rows * columns)
    figure = pictures("Derivative.spy")(figsize=(6.4, 6.4), layout="constrained")
    panel = figure.subplots()
    panel.imshow(
        torch.where(shares == 0, torch.nan, shares).numpy(), cmap="Blues", vmin=-0.5, vmax=1, interpolation="nearest",
        aspect="equal" if max(cells) < 8 * min(cells) else "auto", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )  # fmt: skip
    panel.set_ylabel(_flat("out", J.out_axes, J.out_shape))
    panel.set_xlabel(_flat("in", J.in_axes, J.in_shape))
    total = math.prod(J.shape)
    share = f" ({len(where) / total:.2g} of all)" if total else ""
    panel.set_title(f"{len(where):,} of {total:,} entries are not zero for all numbers{share}", fontsize=9)
    return figure


def _matrix(figure: Figure, panel: Axes, J: Questions, shown: IndexFormula) -> None:
    rows, columns = _fitting(J.out_shape), _fitting(J.in_shape)
    values = entries(shown, (*rows, *columns)).reshape(math.prod(rows), math.prod(columns))
    peak = values.nan_to_num(0, 0, 0).abs().max().item() if values.numel() else 0.0
    image = torch.where((values == 0) | ~values.isfinite(), torch.nan, values).cpu().numpy()
    panel.set_facecolor("#f1f3f5")
    if values.numel():
        limits = {"vmin": -peak or -1, "vmax": peak or 1}
        colours = panel.imshow(image, cmap="RdBu_r", aspect="auto", interpolation="nearest", **limits)
        figure.colorbar(colours, ax=panel, fraction=0.05, pad=0.02).ax.tick_params(labelsize=8)
    _lines(panel, rows, panel.axhline)
    _lines(panel, columns, panel.axvline)
    _ticks(panel, rows, "y")
    _ticks(panel, columns, "x")
    panel.xaxis.tick_top()
    panel.xaxis.set_label_position("top")
    above, _, below = shown.symbol.partition("/")
    panel.set_ylabel(_flat(above[1:] if below else "out", shown.out, J.out_shape), fontsize=9)
    panel.set_xlabel(_flat(below[1:] if below else "in", shown.inn, J.in_shape), fontsize=9)
    filled = int((values != 0).sum())
    axes = zip((*shown.out, *shown.inn), J.shape, (*rows, *columns), strict=True)
    cut = ", ".join(f"{name}<{n} of {m}" for name, m, n in axes if n < m)
    note = f"{filled:,} of {values.numel():,} entries {'drawn ' if cut else ''}are not 0, the largest is {peak:.3g}"
    panel.text(
        0, -0.02, note + (f"; drawn are {cut}" if cut else ""),
        transform=panel.transAxes, va="top", fontsize=8, color="#57606a",
    )  # fmt: skip


def _fitting(shape: Sequence[int]) -> list[int]:
    """Shorten the longest axes until their product can be drawn."""
    kept = list(shape)
    while math.prod(kept) > MAX_CELLS:
        kept[kept.index(max(kept))] -= 1
    return kept


def _flat(name: str, indices: Sequence[str], shape: Sequence[int]) -> str:
    label = f"{name}[{','.join(indices)}]" if indices else name
    return f"{label}   {tuple(shape)}"


def _lines(panel: Axes, sizes: Sequence[int], across: Any) -> None:
    """A thin line after each entry, a thick one after each block: where a slower index moves on."""
    total = math.prod(sizes)
    blocks = [n for n in sizes if n != 1]
    inner = blocks[-1] if len(blocks) > 1 else total
    for k in range(1, total):
        strong = k % inner == 0
        if strong or total <= 32:
            across(k - 0.5, color="#30363d" if strong else "#ffffff", linewidth=1.1 if strong else 0.5)


def _ticks(panel: Axes, sizes: Sequence[int], side: str) -> None:
    total = math.prod(sizes)
    every = [n for n in sizes if n != 1]
    places = range(total) if total <= 16 else range(0, total, max(every[-1] if len(every) > 1 else total // 8, 1))
    where = [k for k in places if len(places) <= 16 or k % (total // 8 or 1) == 0]
    names = [",".join(str(i) for i in numpy.unravel_index(k, tuple(sizes))) for k in where]
    getattr(panel, f"set_{side}ticks")(where, names, fontsize=8)
    panel.tick_params(length=2, pad=1)


def entries(f: IndexFormula, shape: Sequence[int]) -> Tensor:
    """The first entries of what a formula stands for: `shape` may be smaller than the derivative's."""
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    axes = [(name, n) for name, n in zip((*f.out, *f.inn), shape, strict=True)]
    for line in f.lines:
        order = [*axes, *line.sums]
        ranges = torch.meshgrid(*(torch.arange(n) for _, n in order), indexing="ij") if order else ()
        grid = dict(zip((name for name, _ in order), ranges, strict=True))
        value = torch.full([n for _, n in order], line.coef, dtype=torch.float64)
        for a, b in line.ties:
            value = value * (_at(a, grid) == _at(b, grid))
        for name, labels in line.factors:
            tensor = f.tensors[name].detach().cpu().to(torch.float64)
            # Where a tie is not met, an index may leave its axis; the entry is zero already.
            where = [_at(x, grid).clamp(0, n - 1) for x, n in zip(labels, tensor.shape, strict=True)]
            value = torch.where(value == 0, value, value * (tensor[tuple(where)] if where else tensor))
        total += value.sum(tuple(range(len(axes), len(order)))) if line.sums else value
    return total


def _at(text: str, grid: dict[str, Tensor]) -> Tensor:
    index = Index.read(text)
    return sum((step * grid[name] for name, step in index.steps), torch.tensor(index.start))


def _wires(panel: Axes, J: Questions, f: IndexFormula, line: Line, colours: dict[str, str], head: str) -> None:
    panel.set_axis_off()
    panel.set_xlim(-0.38, 1.38)
    panel.set_ylim(-0.12, 1.12)
    panel.set_title(head, fontsize=9, family="DejaVu Sans Mono")
    ends = {}
    for names, sizes, x in ((f.out, J.out_shape, 0.0), (f.inn, J.in_shape, 1.0)):
        for k, (name, n) in enumerate(zip(names, sizes, strict=True)):
            y = 1 - (k + 0.5) / len(names)
            _end(panel, x, y, "·" if name == "0" else name, n, colours.get(name, "#8b949e"))
            if name != "0":
                ends[name] = (x, y)
    panel.text(0, 1.1, "out", ha="center", fontsize=8, color="#57606a")
    panel.text(1, 1.1, "in", ha="center", fontsize=8, color="#57606a")
    straight = [tie for tie in line.ties if all(Index.read(x).plain in ends for x in tie)]
    bent = [tie for tie in line.ties if tie not in straight]
    for a, b in straight:
        bow = 0.18 if ends[a][0] == ends[b][0] else 0.0
        _wire(panel, ends[a], ends[b], colours[a], dashed=True, bow=bow)
    boxes = [(name, [n for x in at for n in Index.read(x).names]) for name, at in line.factors]
    boxes += [(f"δ({a},{b})", [n for x in (a, b) for n in Index.read(x).names]) for a, b in bent]
    inner: dict[str, list[tuple[float, float]]] = {}
    placed = sorted(boxes, key=lambda box: -sum(ends[n][1] for n in box[1] if n in ends))
    for k, (name, touched) in enumerate(placed):
        spot = (0.5, 1 - (k + 0.5) / len(placed))
        for n in dict.fromkeys(touched):
            if n in ends:
                _wire(panel, ends[n], spot, colours[n], dashed=name.startswith("δ("))
            else:
                inner.setdefault(n, []).append(spot)
        shown = name if len(name) <= 18 else f"{name[:15]}..."
        panel.text(*spot, shown, ha="center", va="center", fontsize=8, family="DejaVu Sans Mono", zorder=4,
                   bbox={"boxstyle": "round,pad=0.3", "fc": "#ffffff", "ec": "#57606a"})  # fmt: skip
    for spots in inner.values():
        for a, b in zip(spots, spots[1:], strict=False):
            _wire(panel, a, b, "#57606a", bow=0.12)
    bound = {n for tie in straight for n in tie} | {n for _, touched in boxes for n in touched}
    for name, (x, y) in ends.items():
        if name not in bound:
            _stub(panel, x, y, colours[name])
    if not line.factors:
        panel.text(0.5, -0.1, "nothing stored", ha="center", fontsize=8, color="#57606a")


def _end(panel: Axes, x: float, y: float, name: str, size: int, colour: str) -> None:
    panel.plot([x], [y], "o", color=colour, markersize=5, zorder=3)
    outside = -0.05 if x == 0 else 0.05
    text = f"{name}:{size}"
    panel.text(x + outside, y, text, ha="right" if x == 0 else "left", va="center", color=colour, fontsize=10,
               family="DejaVu Sans Mono")  # fmt: skip


def _wire(
    panel: Axes, a: tuple[float, float], b: tuple[float, float], colour: str, dashed: bool = False, bow: float = 0.0
) -> None:
    t = torch.linspace(0, 1, 33)
    ease = t * t * (3 - 2 * t)
    xs = a[0] + (b[0] - a[0]) * t + bow * 4 * t * (1 - t) * (1 if a[0] < 0.5 else -1)
    ys = a[1] + (b[1] - a[1]) * ease
    panel.plot(xs.tolist(), ys.tolist(), linestyle="--" if dashed else "-", color=colour, linewidth=1.6, zorder=1)


def _stub(panel: Axes, x: float, y: float, colour: str) -> None:
    """An index that ends in the open: a copy on the output, a sum on the input."""
    way = 0.2 if x == 0 else -0.2
    panel.plot([x, x + way], [y, y], color=colour, linewidth=1.6, zorder=1)
    panel.plot([x + way], [y], "o", mfc="#ffffff", mec=colour, markersize=6, zorder=3)
    panel.text(x + way, y - 0.035, "copy" if x == 0 else "sum", ha="center", va="top", fontsize=8, color=colour)

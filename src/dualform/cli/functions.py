"""`dualform functions`: what the catalogues of functions hold, record by record, with a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualform.cli.output import AsJson, UsageError, Words, show
from dualform.functions.describe import Curves, Description, Image, describe, example, families, find, parse, picture

shades = " .:-=+*#%@"


def functions(
    name: str | None = None, /, *, set: Words = None, png: Path | None = None, as_json: AsJson = False
) -> None:
    """List the functions of all families, one family, or describe a record: equation, sizes, domain, source, a picture.

    Args:
        name: A family (expansions), a record (taylor), or both where a name is in several families
            (remainders.identity). tinyBIG's class names are known.
        set: Options of the record: --set degree=3 symmetric=true.
        png: Write the picture as a PNG instead of drawing it in characters.
        as_json: Print JSON instead of a table.
    """
    if name is None or name in families:
        if set or png:
            raise UsageError(
                "functions: --set and --png are of one record; expected its name. Run `functions` for the names."
            )
        rows = list(_rows(families if name is None else {name: families[name]}))
        return show(rows, as_json=as_json) if rows or as_json else print(f"{name}: none as yet")
    if png is not None and (png.suffix != ".png" or not png.parent.is_dir()):
        raise UsageError(f"functions: --png is {png}; expected FILE.png in a folder that exists. Name another.")
    found = find(name)
    if len(found) > 1 and (set or png):
        names = " or ".join(f"{family}.{record.name}" for family, record in found)
        raise UsageError(f"functions: {name!r} is in several families; expected one, as in {names}. Name it so.")
    described = [(describe(family, r, **parse(r, set or [])), example(r, **parse(r, set or []))) for family, r in found]
    if as_json:
        print(json.dumps([asdict(text) for text, _ in described], indent=2, default=_written))
    for text, made in described:
        if not as_json:
            _print(text)
        drawn = picture(text.family, made) if made is not None else None
        if png is not None and drawn is None:
            raise UsageError(
                f"functions: {text.name!r} has no picture; expected a record that can be drawn. Leave --png out."
            )
        if png is not None and drawn is not None:
            draw(drawn).savefig(png, dpi=120)
            print(f"wrote {png}", file=sys.stderr if as_json else sys.stdout)
        elif drawn is not None and not as_json:
            print("\n" + (_characters(drawn) if isinstance(drawn, Image) else _terminal(drawn)))


def _rows(chosen: Any) -> Any:
    for family, catalogue in chosen.items():
        for name in catalogue:
            text = describe(family, catalogue[name])
            sizes = [f"{size} ({case})" for case, size in text.sizes.items()]
            row = {"family": family, "name": name, "equation": text.equation}
            yield row | {"size": text.rule or (sizes[0] if sizes else ""), "source": text.source}


def _written(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else str(value)


def _print(text: Description) -> None:
    fields = {
        "equation": text.equation,
        "": text.summary,
        "options": ", ".join(f"{key}={value!r}" for key, value in text.options.items()),
        "size": "; ".join(filter(None, [text.rule, *(f"{case}: {size}" for case, size in text.sizes.items())])),
        "domain": "; ".join(filter(None, [text.domain, *text.notes])),
        "source": text.source,
        "also called": ", ".join(text.aliases),
    }
    print(f"\n{text.family}.{text.name}")
    for key, value in fields.items():
        if value:
            print(f"  {key:<12}{value}")


def draw(what: Curves | Image) -> Any:
    """Draw a picture of a record as a matplotlib figure."""
    from matplotlib.figure import Figure  # here: of the extra `viz`, and slow to import

    figure = Figure(figsize=(6.4, 3.0))
    figure.subplots_adjust(left=0.1, right=0.76 if isinstance(what, Curves) else 0.99, bottom=0.12, top=0.88)
    axes = figure.add_subplot()
    axes.set_title(what.title, loc="left", fontsize=10)
    if isinstance(what, Image):
        top = max((abs(v) for row in what.rows for v in row), default=1.0) or 1.0
        shown = axes.imshow(what.rows, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        figure.colorbar(shown, ax=axes)
        return figure
    for label, line in what.lines.items():
        axes.plot(what.t, line, label=label if len(label) < 20 else label[:18] + "..", linewidth=1.6)
    axes.set_ylim(*_limits(what))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _terminal(what: Curves, width: int = 60, height: int = 14) -> str:
    """Draw curves in characters."""
    import plotille  # here: of the extra `viz`

    figure = plotille.Figure()
    figure.width, figure.height = width, height
    figure.x_label, figure.y_label = "t", "y"
    figure.color_mode = "names"
    colors = ("blue", "red", "green", "magenta", "cyan", "yellow", "white", "black")
    figure.with_colors = sys.stdout.isatty()
    for color, (label, line) in zip(colors, what.lines.items(), strict=False):
        figure.plot(what.t, line, lc=color if figure.with_colors else None, label=label)
    figure.set_y_limits(*_limits(what))
    return f"{what.title}\n{figure.show(legend=True)}"


def _limits(what: Curves) -> tuple[float, float]:
    """Show what lies between -6 and 6, with a margin: a pole would hide the rest."""
    values = [v for line in what.lines.values() for v in line]
    low, high = max(min(values), -6.0), min(max(values), 6.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _characters(what: Image) -> str:
    """Draw a matrix in characters, darker the larger."""
    top = max((abs(v) for row in what.rows for v in row), default=1.0) or 1.0
    lines = ["".join(shades[round(abs(v) / top * (len(shades) - 1))] * 2 for v in row) for row in what.rows]
    return "\n".join([f"{what.title} (absolute values; @ is {top:.3g})", *lines])

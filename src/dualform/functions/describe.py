"""What a record of any catalogue of functions says of itself, and what it looks like, as plain data.

The command line and the docs' catalogue page are both made of this; nothing here knows how to draw.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualform.catalogue import Bound, Catalogue, CatalogueError, Record, UnknownNameError, near_misses
from dualform.functions.compressions import compressions
from dualform.functions.expansions import expansions
from dualform.functions.fusions import fusions
from dualform.functions.interdependences import interdependences
from dualform.functions.networks import networks
from dualform.functions.reconciliations import reconciliations
from dualform.functions.remainders import remainders

_every = (expansions, reconciliations, remainders, fusions, interdependences, compressions, networks)
families: dict[str, Catalogue] = {c.kind: c for c in _every}
# What stands in for an option that must be given, so that its record can be shown.
given = {"weights": (2.0, 1.0), "dims": (4, 8, 2)}
most_lines = 8


@dataclass(frozen=True)
class Curves:
    """Functions of one number t: `lines` by label."""

    t: list[float]
    lines: dict[str, list[float]]
    title: str


@dataclass(frozen=True)
class Image:
    """A matrix, row by row."""

    rows: list[list[float]]
    title: str


@dataclass(frozen=True)
class Description:
    """One record in words and numbers."""

    family: str
    name: str
    equation: str
    summary: str
    options: dict[str, Any]
    sizes: dict[str, str]  # for some sizes, what it makes of them
    rule: str
    domain: str
    source: str
    aliases: tuple[str, ...]
    notes: tuple[str, ...] = ()


def find(name: str) -> list[tuple[str, Record]]:
    """Find every record of that name: `identity` is in three families, `expansions.identity` in one."""
    family, _, short = name.replace("/", ".").rpartition(".")
    if family and family not in families:
        raise UnknownNameError(f"functions: {family!r} is no family. {near_misses(family, list(families))}")
    found = [(kind, c[short]) for kind, c in families.items() if family in ("", kind) and short in c]
    if not found:
        known = [n for c in families.values() for record in c for n in (record, *c[record].aliases)]
        raise UnknownNameError(f"functions: no record is called {name!r}. {near_misses(short, known)}")
    return found


def example(record: Record, **options: Any) -> Bound | None:
    """Bind a record, with stand-ins for what must be given; None if there are none for it."""
    required = [n for n, default in record.options.items() if default is inspect.Parameter.empty and n not in options]
    if any(n not in given for n in required):
        return None
    return record(**{n: given[n] for n in required}, **options)


def describe(family: str, record: Record, **options: Any) -> Description:
    """Describe a record, with these options.

    Raises: CatalogueError for options that it does not have.
    Example:
        >>> describe("expansions", expansions["taylor"], degree=3).sizes["m = 10"]
        'D = 1,110'
    """
    made = example(record, **options)
    notes = () if made is None or family != "expansions" else tuple(_notes(made))
    summary = (record.__doc__ or "").strip().split("\n")[0]
    return Description(
        family, record.name, record.formula, summary, made.options if made is not None else options,
        _sizes[family](made) if made is not None and family in _sizes else {},
        getattr(made.build(), "rule", "") if made is not None else "",
        record.domain, record.source, record.aliases, notes,
    )  # fmt: skip


def _notes(e: Any) -> list[str]:
    low, high = e.domain
    notes = [f"differentiable on [{low:g}, {high:g}]" + (f", almost everywhere: {e.rough}" if e.rough else "")]
    if max(-e.reach[0], e.reach[1]) < 1e30:
        notes.append(f"finite in float32 on [{e.reach[0]:g}, {e.reach[1]:g}]")
    if e.width is not None:
        notes.append(f"{e.width} functions per attribute, laid out by {e.layout}")
    return notes


def _rows(cases: list[tuple[str, Callable[[], str]]]) -> dict[str, str]:
    found = {}
    for label, size in cases:
        try:
            found[label] = size()
        except ValueError:  # a size that this record does not take
            continue
    return found


_sizes: dict[str, Callable[[Any], dict[str, str]]] = {
    "expansions": lambda e: _rows([(f"m = {m}", lambda m=m: f"D = {e.dim(m):,}") for m in (1, 4, 10, 100, 784)]),
    "reconciliations": lambda r: _rows([
        (f"n = {n}, D = {D:,}", lambda n=n, D=D: f"l = {r.length(n, D):,}")
        for n, D in ((6, 12), (64, 784), (64, 615440))
    ]),
    "remainders": lambda p: _rows([
        (f"m = {m}, n = {n}", lambda m=m, n=n: f"l = {p.length(m, n):,}") for m, n in ((4, 4), (784, 64))
    ]),
    "fusions": lambda u: _rows([
        (f"dims = {d}", lambda d=d: f"n = {u.width(d)}, l = {u.length(d):,}") for d in ((4, 4), (2, 4, 6), (8,) * 4)
    ]),
}  # fmt: skip


def picture(family: str, made: Bound) -> Curves | Image | None:
    """Show a record: its functions over their domain, or the matrix that it is; None where there is nothing to see."""
    return _pictures[family](made) if family in _pictures else None


def _of_expansion(e: Any) -> Curves | Image:
    low, high = e.domain
    t = torch.linspace(low - 0.2 * (high - low), high + 0.2 * (high - low), 161, dtype=torch.float64)
    if e.width is not None:
        return _curves(t, e.phi(t), [f"phi_{k + 1}" for k in range(e.width)], f"{e.name}: functions of one attribute")
    m = next(m for m in range(2, 10_000) if e.takes(m))
    eye = torch.eye(m, dtype=torch.float64)
    if e.batchwise and torch.allclose(e(3 * eye).sum(0), e(eye.sum(0, keepdim=True) * 3)[0]) and m > 3:
        return Image(e(eye).mT.tolist(), f"{e.name}: the cell (column) that each feature (row) reads, m = {m}")
    line = torch.stack([t * 0.5**i for i in range(m)], -1)
    names = [f"x{i + 1}" for i in range(m)]
    return _curves(t, e(line), e.features(names), f"{e.name}: features of x = (t, t/2, ..), m = {m}")


def _curves(t: Tensor, y: Tensor, labels: list[str], title: str) -> Curves:
    lines = {label: y[:, k].tolist() for k, label in enumerate(labels[:most_lines])}
    more = "" if len(labels) <= most_lines else f" (the first {most_lines} of {len(labels)})"
    return Curves(t.tolist(), lines, title + more)


def _of_reconciliation(r: Any) -> Image:
    n, D = 6, 12
    g = torch.Generator().manual_seed(0)
    W = r(torch.randn(r.length(n, D), generator=g, dtype=torch.float64), n, D)
    return Image(W.tolist(), f"{r.name}: psi(w) for n = {n}, D = {D}, w normal, l = {r.length(n, D)}")


def _of_remainder(p: Any) -> Curves:
    t = torch.linspace(-3, 3, 161, dtype=torch.float64)
    w = torch.ones(p.length(1, 1), dtype=torch.float64) if p.length(1, 1) else None
    return _curves(t, p(t[:, None], 1, w), ["pi(t)"], f"{p.name}: pi of one attribute, w = 1")


def _of_fusion(u: Any) -> Curves:
    t = torch.linspace(-3, 3, 161, dtype=torch.float64)
    xs = [torch.sin(2 * t)[:, None], (t / 2)[:, None]]
    l = u.length((1, 1))
    fused = u(xs, torch.ones(l, dtype=torch.float64) if l else None)
    labels = ["x_1", "x_2", *[f"fused {k + 1}" if fused.shape[-1] > 1 else "fused" for k in range(fused.shape[-1])]]
    return _curves(t, torch.cat([*xs, fused], -1), labels, f"{u.name}: of sin 2t and t/2" + (", w = 1" if l else ""))


_pictures: dict[str, Callable[[Any], Curves | Image]] = {
    "expansions": _of_expansion, "reconciliations": _of_reconciliation, "remainders": _of_remainder,
    "fusions": _of_fusion,
}  # fmt: skip


def parse(record: Record, words: list[str]) -> dict[str, Any]:
    """Read key=value words as options; values as JSON where they are, else as text."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise CatalogueError(
                f"functions: {word!r} is no option; expected key=value, as in degree=3. Options: {record}."
            )
        if key in options:
            raise CatalogueError(f"functions: --set says {key!r} twice; expected once. Leave one out.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options

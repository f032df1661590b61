"""Reads printed formulas back and evaluates them: shares no code with what prints them.

- 1/3 Σ_m v[m,j] p[i,m] δ(i,k) + ...    with the values of v and p, and the shape of what the whole stands for
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NUMBER = r"(?P<top>√?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?:/(?P<low>√?\d+))?(?![\w\[(])"


def _number(text: str) -> float:
    return math.sqrt(float(text[1:])) if text.startswith("√") else float(text)


def _inside(text: str, at: int) -> tuple[str, int]:
    """What stands between the bracket at `at` and its partner, and where that ends."""
    depth = 0
    for k in range(at, len(text)):
        depth += (text[k] in "[(") - (text[k] in "])")
        if depth == 0:
            return text[at + 1 : k], k + 1
    raise AssertionError(f"no end to {text[at:]!r}")


def _listed(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    found, depth = [""], 0
    for c in text:
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return found if text else []


def parse(text: str, names: Sequence[str]) -> list[dict]:
    """Split a right side into products: sign and coefficient, summed indices, factors, deltas, steps."""
    known = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or "(?!)"
    token = re.compile(
        rf"\s*(?:Σ_(?P<sum>\w+)|(?P<delta>δ)(?=\()|(?P<name>{known})(?![\w'(])|(?P<step>(?=\[))|{NUMBER}|(?P<sign>[+-])|·)"
    )
    products: list[dict] = []
    at, begun = 0, False
    while at < len(text):
        m = token.match(text, at)
        assert m is not None, f"cannot read {text[at:]!r}"
        at = m.end()
        if not products or (m["sign"] and begun):
            products.append({"coef": 1.0, "sums": [], "factors": [], "deltas": [], "steps": []})
        if m["sign"]:
            products[-1]["coef"] *= -1 if m["sign"] == "-" else 1
        begun = not m["sign"]
        if m["sum"]:
            products[-1]["sums"].append(m["sum"])
        elif m["delta"]:
            pair, at = _inside(text, at)
            assert len(_listed(pair)) == 2, f"δ({pair}) has not two indices"
            products[-1]["deltas"].append(_listed(pair))
        elif m["name"]:
            indices, at = _inside(text, at) if text[at : at + 1] == "[" else ("", at)
            products[-1]["factors"].append((m["name"], _listed(indices)))
        elif m["step"] is not None:
            pair, at = _inside(text, at)
            products[-1]["steps"].append(pair.split(">="))
        elif m["top"]:
            products[-1]["coef"] *= _number(m["top"]) / (_number(m["low"]) if m["low"] else 1.0)
    return products


def _affine(text: str) -> dict[str, int]:
    """Read 4*m+l-1 as {m: 4, l: 1, "": -1}."""
    found: dict[str, int] = {}
    for part in re.findall(r"[+-]?[^+-]+", text):
        sign = -1 if part.startswith("-") else 1
        step, _, name = part.lstrip("+-").rpartition("*")
        if name.isdigit():
            found[""] = found.get("", 0) + sign * int(name) * int(step or 1)
        else:
            found[name] = found.get(name, 0) + sign * int(step or 1)
    return found


def evaluate(
    text: str, out: Sequence[str], shape: Sequence[int], tensors: Mapping[str, Tensor], said: str = ""
) -> Tensor:
    """Give the numbers that a printed right side stands for; `said` are the ranges that were printed beside it."""
    result = torch.zeros(tuple(shape), dtype=torch.float64)
    if text.strip() == "0":
        return result
    for product in parse(text, list(tensors)):
        sizes = {name: n for name, n in zip(out, shape, strict=True) if name != "0"}
        ranges = {}
        for name, indices in product["factors"]:
            assert len(indices) == tensors[name].ndim, (name, indices)
            ranges.update(dict(zip(indices, tensors[name].shape, strict=True)))
        ranges.update({name: int(n) for name, n in re.findall(r"(\w+)<(\d+)", said)})
        sizes.update({s: ranges[s] for s in product["sums"]})
        order = list(sizes)
        rows = [torch.arange(n) for n in sizes.values()]
        grid = dict(zip(order, torch.meshgrid(*rows, indexing="ij") if rows else (), strict=True))

        def at(index: str, grid: dict = grid) -> Tensor:
            if "[" in index:  # a table of indices: idx[i][j]
                name, start = index[: index.index("[")], index.index("[")
                places = []
                while start < len(index):
                    inner, start = _inside(index, start)
                    places.append(at(inner, grid))
                return tensors[name][tuple(places)]
            return sum(
                (step * (grid[n] if n else torch.tensor(1)) for n, step in _affine(index).items()), torch.tensor(0)
            )

        value = torch.full([sizes[n] for n in order], product["coef"], dtype=torch.float64)
        for a, b in product["deltas"]:
            value = value * (at(a) == at(b))
        for a, b in product["steps"]:
            value = value * (at(a) >= at(b))
        for name, indices in product["factors"]:
            where = [at(i) for i in indices]
            # an index may leave its range only where a delta is zero already
            kept = [(w >= 0) & (w < n) for w, n in zip(where, tensors[name].shape, strict=True)]
            for k in kept:
                assert not value[~k.expand_as(value)].any()
            clipped = [w.clamp(0, n - 1) for w, n in zip(where, tensors[name].shape, strict=True)]
            found = tensors[name][tuple(clipped)] if clipped else tensors[name]
            value = torch.where(value == 0, value, value * found.to(torch.float64))
        if product["sums"]:
            value = value.sum([order.index(s) for s in product["sums"]])
        result += value.reshape(tuple(shape)) if value.ndim else value
    return result

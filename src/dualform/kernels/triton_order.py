"""In which order a kernel computes: independent sums at once, as each alone has all warps meet twice.

A sum is joined by those later ones of the same shape and axis that wait for no product and no other sum; what they are
made of comes before, if it is maps and views alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import fx

from dualform.graphs.edit import needed
from dualform.ops.table import find_row, kind_of

MOST = 6  # sums at once


def _kind(n: fx.Node) -> object:
    """Name what sums at once have in common; None for what is no sum."""
    known = find_row(n.target)
    if known is None or known.kind != "reduction":
        return None
    row, operands, params = known.spelt(n)
    (x,) = operands
    kept = tuple(params["kept"])
    if row != "sum" or kept.count(None) != 1 or not isinstance(x, fx.Node) or not x.meta["val"].is_floating_point():
        return None
    return tuple(x.meta["val"].shape), kept.index(None), x.meta["val"].dtype


def _is_light(n: fx.Node) -> bool:
    return kind_of(n.target) in ("map", "view") or n.target is operator.getitem


def abreast(steps: Sequence[fx.Node], given: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Order nodes: each alone, or sums that are computed at once."""
    done, found = set(given), list[list[fx.Node]]()

    def emit(*nodes: fx.Node) -> None:
        found.append(list(nodes))
        done.update(nodes)

    for k, n in enumerate(steps):
        if n in done:
            continue
        kind = _kind(n)
        if kind is None:
            emit(n)
            continue
        group, ready = [n], dict[fx.Node, None]()
        for m in steps[k + 1 :]:
            if m in done or len(group) == MOST or any(x not in done and x not in ready for x in m.all_input_nodes):
                continue
            if _kind(m) == kind:
                group.append(m)
            elif _is_light(m):
                ready[m] = None
        wanted = needed(group, beyond=done)
        for m in ready:
            if m in wanted:
                emit(m)
        emit(*group)
    return found


def helpers(text: str) -> str:
    """Write the functions that add some pairs at once, those that a kernel's text calls."""
    found = []
    for k in range(2, MOST + 1):
        if f"sums{k}_" in text:
            x, y = [f"x{j}" for j in range(k)], [f"y{j}" for j in range(k)]
            sums = ", ".join(f"{a} + {b}" for a, b in zip(x, y, strict=True))
            found.append(f"@triton.jit\ndef sums{k}_({', '.join([*x, *y])}):\n    return {sums}\n")
    return "\n\n".join(found)


__all__ = ["abreast", "helpers"]

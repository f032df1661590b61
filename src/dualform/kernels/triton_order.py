"""In which order a kernel computes: independent sums at once, as each alone has all warps meet twice; and few tiles.

A sum is joined by those later ones of the same shape and axis that wait for no product and no other sum; what they are
made of comes before, if it is maps and views alone.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import fx

from dualform.graphs.edit import needed
from dualform.ops.table import find_row, kind_of

_MADE, _NAME = re.compile(r"([a-zA-Z_]\w*(?:, \w+)*) \+?= "), re.compile(r"(?<![\w.])[a-zA-Z_]\w*")
_HEAVY = re.compile(r"tl\.(dot|sum|reduce|gather|store|max|min|reshape|cumsum)\b")
ROOM = 45056  # entries that a program's registers hold beside what its lines make at once
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


class _Line(NamedTuple):
    """A line: what it makes, what it reads that others of the loop make, and whether it may be written again."""

    text: str
    makes: tuple[str, ...]
    takes: frozenset[str]
    cheap: bool


def _parsed(lines: Sequence[str], held: Collection[str], later: Collection[str]) -> list[_Line]:
    """Read lines. held: names that are carried on; later: that are read after them."""
    found, cheap, own = list[_Line](), set[str](), set(held)
    heads = [m[1].split(", ") if (m := _MADE.match(x)) else [] for x in lines]
    own |= {x for head in heads for x in head}
    for line, makes in zip(lines, heads, strict=True):
        text = line.split("  # ")[0]
        takes = frozenset(x for x in _NAME.findall(text) if x in own and x not in makes)
        light = len(makes) == 1 and makes[0] not in later and " += " not in line and not _HEAVY.search(text)
        light = light and takes <= cheap
        if light:
            cheap.add(makes[0])
        found.append(_Line(line, tuple(makes), takes, light))
    return found


def tightened(
    lines: Sequence[str], sizes: Mapping[str, int], held: Collection[str], last: Sequence[str], again: bool
) -> list[str]:
    """Order lines so that few entries live at once; again: and make again what is cheap and was not read for long.

    From the last line to the first, each time what leaves the fewest; what is cheap, loads and maps of them, where it
    is read. sizes: entries of what lines make. held: names that are carried on, which live anyway.
    last: lines that come after these.
    """
    parsed = _parsed(lines, held, {x for line in last for x in _NAME.findall(line)})
    heavy, cheap = [x for x in parsed if not x.cheap], {x.makes[0]: x for x in parsed if x.cheap}
    room = max(ROOM // 4, ROOM - sum(sizes[x] for x in held)) if again else 1 << 40
    return _with_cheap(_ordered(heavy, sizes, held), cheap, sizes, room)


def _ordered(lines: Sequence[_Line], sizes: Mapping[str, int], held: Collection[str]) -> list[_Line]:
    by = {name: k for k, x in enumerate(lines) for name in x.makes}
    before = [{by[x] for x in line.takes if x in by} for line in lines]
    below = list[set[int]]()  # what each waits for, at any distance
    for own in before:
        below.append(own.union(*(below[j] for j in own)))
    for name in held:  # it is read before something takes its place
        readers = [k for k, x in enumerate(lines) if name in x.takes]
        turns = [k for k in readers if " + " in lines[k].text and [*map(sizes.get, lines[k].makes)] == [sizes[name]]]
        if len(turns) == 1:
            before[turns[0]] |= {k for k in readers if k != turns[0] and turns[0] not in below[k]}
    left = [0] * len(lines)  # lines that come after each
    for own in before:
        for j in own:
            left[j] += 1
    ready, live, found = {k for k, n in enumerate(left) if not n}, set[str](), list[int]()

    def grows(k: int) -> int:
        return sum(sizes.get(x, 0) for x in lines[k].takes - live if x in by) - sum(
            sizes.get(x, 0) for x in lines[k].makes
        )

    while ready:
        k = min(ready, key=lambda k: (grows(k), -k))
        ready.remove(k)
        found.append(k)
        live = (live | lines[k].takes) - set(lines[k].makes)
        for j in before[k]:
            left[j] -= 1
            if not left[j]:
                ready.add(j)
    assert len(found) == len(lines), "lines wait for each other"
    return [lines[k] for k in reversed(found)]


def _with_cheap(lines: Sequence[_Line], cheap: Mapping[str, _Line], sizes: Mapping[str, int], room: int) -> list[str]:
    """Put in what is cheap where it is read; again, where it was last read long ago."""
    found, known, times = list[str](), dict[str, str](), dict[str, int]()

    def have(name: str) -> str:
        line = cheap[name]
        if name in known:
            known[name] = known.pop(name)  # the latest is the last
            return known[name]
        text = line.text
        for x in sorted(line.takes):
            text = re.sub(rf"(?<![\w.]){x}\b", have(x), text)
        count = times[name] = times.get(name, 0) + 1
        new = name if count == 1 else f"{name}_a{count}"
        text = re.sub(rf"^{name}\b", new, text)
        if count > 1 and "tl.load(" in text:
            text = re.sub(r"tl\.load\((\w+)_at", rf"tl.load(\1_at + tl.minimum(n + {count}, 0) * \1_sn", text)
        found.append(text)
        known[name] = new
        while sum(sizes.get(x, 16) for x in known) > room and len(known) > 1:
            del known[next(iter(known))]
        return new

    for line in lines:
        text = line.text
        for x in sorted(x for x in line.takes if x in cheap):
            text = re.sub(rf"(?<![\w.]){x}\b", have(x), text)
        found.append(text)
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


__all__ = ["abreast", "helpers", "tightened"]

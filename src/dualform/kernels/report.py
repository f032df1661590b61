"""A schedule in words: which statements wait for the state, where values lie, what it costs, and its floor."""

from __future__ import annotations

import math
from typing import NamedTuple

from dualform.kernels.statements import Buffer, Item, Nest, Schedule, Statement, View

SLICES = {
    "before": "does not wait for the state (parallel over mini-batches)",
    "carries": "carries the state on (one mini-batch after another)",
    "after": "waits for the state, nothing waits for it (parallel over mini-batches)",
}


class TimeBound(NamedTuple):
    """The time below which a schedule cannot go: seconds for one mini-batch of one row, and what sets it."""

    seconds: float
    by: str  # "flops" | "bytes"


def bound(flops: float, nbytes: float, flops_per_second: float, bytes_per_second: float) -> TimeBound:
    """Say how long the work takes at least on a machine of such rates, and whether its flops or its bytes say so."""
    return max(TimeBound(flops / flops_per_second, "flops"), TimeBound(nbytes / bytes_per_second, "bytes"))


def slices(s: Schedule) -> list[str]:
    """Name the slice that each statement belongs to."""
    waits = {b for b in s.inputs if _carried(b)}
    found = []
    for one in s.statements:
        late = any(v.buffer in waits for v in one.reads())
        waits |= {v.buffer for v in one.writes()} if late else set()
        found.append("after" if late else "before")
    leads = {x.buffer for k, x in enumerate(s.outputs) if k in s.carried and isinstance(x, View)}
    for k in reversed(range(len(s.statements))):
        one = s.statements[k]
        if any(v.buffer in leads for v in one.writes()):
            leads |= {v.buffer for v in one.reads()}
            found[k] = "carries" if found[k] == "after" else found[k]
    return found


def _carried(b: Buffer) -> bool:
    return b.place not in ("scratch", "fixed")


def describe(s: Schedule) -> str:
    """Print statements by slice, the buffers between them, and the totals."""
    of, lines = slices(s), []
    for name, words in SLICES.items():
        members = [k for k, x in enumerate(of) if x == name]
        if members:
            work = sum(s.statements[k].flops for k in members)
            lines.append(f"{name}: {words}; {work:,} flops")
            lines += [f"  {k:3} {_statement(s.statements[k])}" for k in members]
    each = s.flops / s.nbytes if s.nbytes else math.inf
    return "\n".join([
        *lines, "buffers: bytes, where, the statements from its first to its last", *_buffers(s),
        f"{s.flops:,} flops in products, {s.entries:,} entry by entry; {s.nbytes:,} bytes in and out ({s.moved:,} "
        f"entries in and out); scratch {s.scratch * s.itemsize:,} bytes",
        f"bound: the larger of {s.flops:,} / (flops a second) and {s.nbytes:,} / (bytes a second); the flops, where a "
        f"machine does fewer than {each:.1f} of them per byte",
    ])  # fmt: skip


def _statement(s: Statement) -> str:
    if isinstance(s, Nest):
        names = " ".join(_item(i) for i in s.items)
        return f"for {list(s.space)}, {s.stages} stage(s): {names}"
    init = "" if s.init is None else f" {s.beta:+g} {s.init.buffer.name}"
    a, b = (f"{v.buffer.name}{list(v.shape)}" for v in (s.a, s.b))
    return f"{s.out.buffer.name}{list(s.out.shape)} = {s.alpha:g} {a} @ {b}{init}"


def _item(item: Item) -> str:
    return f"{item.out.buffer.name}:{item.op}" + ("*" if item.kept else "")


def _buffers(s: Schedule) -> list[str]:
    used = {v.buffer: None for one in s.statements for v in (*one.reads(), *one.writes())}
    lines = []
    for b in used:
        where = "one state on from" if b.place == "next" else "over"
        place = f"{where} {b.over.name}" if b.over is not None else f"{b.place} + {b.offset * s.itemsize}"
        alive = f"{max(b.first, 0)}-{min(b.last, len(s.statements))}" if b.place == "scratch" else "stays"
        lines.append(f"  {b.name}{list(b.shape)} {b.size * s.itemsize:,} {place}, {alive}")
    return lines

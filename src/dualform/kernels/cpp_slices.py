"""A direction in C++, rows cut in slices: where rows are fewer than threads, mini-batches of one run beside each other.

Windows of mini-batches go through the functions of a split direction (`targets`) as through a pipeline: while the loop
is at one window, other threads are with the windows before and after it. At the same time, step by step:

    forward     before(t)      loop(t - 1)      after(t - 2)
    backward    advance(t)     before(t - m)    loop(t - m - 1)    after(t - m - 2)    sums of t - m - 3

In the backward groups come from the last to the first, m windows each, their states computed again one group ahead.
Which thread runs what changes no bit: what is added over mini-batches is added in their order, in the row's own turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualform.kernels import cpp_text
from dualform.kernels.cpp_text import CALL, body_text, function, header, indented, moved
from dualform.kernels.dialect import Unit
from dualform.kernels.layout import Frame, Write
from dualform.kernels.statements import whole
from dualform.kernels.targets import Direction, Target, in_turn, label
from dualform.learning.plan import Input

# Bytes that a window passes on, to stay in the second cache; and how many mini-batches it has at least and at most.
WINDOW_BYTES, WINDOW = 2**19, (4, 16)


class Turn(NamedTuple):
    """What happens to a window, so many steps after it came in: in turn ("forth", "back"), or all at once ("each")."""

    function: str
    delay: str
    order: str
    before: Sequence[str] = ()  # what a window begins with
    each: Sequence[str] = ()  # what comes before each mini-batch


def _turns(d: Direction, frame: Frame) -> list[Turn]:
    if d.advance is None:
        keep = ["if (G && (n + phase) % G == 0) {", *moved(frame.keep), "}"]
        loop = Turn("loop", "1", "forth", moved(frame.addresses), keep)
        return [loop, Turn("after", "2", "each"), Turn("before", "0", "each")]
    enter = [
        "if (w.first == w.from) {", "long group = w.group;", "st = state_of(c, r, w, w.from);", *moved(frame.enter), "}"
    ]  # fmt: skip
    return [
        Turn("total", "c.m + 3", "back"), Turn("loop", "c.m + 1", "back"), Turn("advance", "0", "forth", enter),
        Turn("after", "c.m + 2", "each"), Turn("before", "c.m", "each"),
    ]  # fmt: skip


def _total(frame: Frame) -> str:
    """Write what adds a mini-batch's summands."""
    moves = []
    for x, here in frame.sums.items():
        summand = label(Input("passed", in_turn(Target("added", x)).what, "block"))
        moves.append(Write("plus", whole(here), whole(frame.layout.buffer("passed", summand, here.shape))))
    return function("total", moved(moves))


def _item(turns: Sequence[Turn], frame: Frame, state: str) -> list[str]:
    """Write what step t does with item i: first and last what a row needs, else a window, or a mini-batch of it."""
    argument = "const Arg* g = c.g; Row r = row_of(c, {}); long b = r.b, h = r.h, G = c.G, phase = c.phase; "
    argument += "T *f = r.f, *ct = r.ct, *acc = r.acc, *st = r.st;"
    one = f"st = state_of(c, r, w, n); T *kp = st + {state}, *ps = passed_of(r, w, n);"
    forth, back = "for (long n = w.first; n < w.last; ++n) {", "for (long n = w.last - 1; n >= w.first; --n) {"
    lines = [
        "static void item(const Call& c, long t, long i, T* s) {", "if (t == 0 || t == c.steps) {",
        "if (i >= c.P) return;", argument.format("i"), "if (t == 0) {", *moved(frame.begin),
        "} else {", *moved(frame.end), "}", "return;", "}", "Window w;",
    ]  # fmt: skip
    for x in sorted(turns, key=lambda x: x.order == "each"):
        up, loop = ("true", forth) if x.order == "forth" else ("STAYS", back)
        late = f"if (!window(t - 1 - ({x.delay}), c.E, c.count, {up}, w)) return;"
        call = f"{x.function}({CALL.format(kp='kp', ps='ps')});"
        if x.order == "each":
            lines += [
                "if (i < c.P * W) {", late, argument.format("i / W"), "long n = w.first + i % W;",
                "if (n >= w.last) return;", one, call, "return;", "}", "i -= c.P * W;",
            ]  # fmt: skip
        else:
            lines += [
                "if (i < c.P) {", late, argument.format("i"), *x.before, loop, *x.each,
                one, call, "}", "return;", "}", "i -= c.P;",
            ]  # fmt: skip
    return [*lines, "}"]


def unit(d: Direction) -> Unit:
    """Write a direction."""
    frame = Frame(d, d.sliced())
    held = d.advance is None  # does the state stay with the row? Else each mini-batch has its own
    functions = [*map(body_text, frame.bodies), *([] if held else [_total(frame)])]
    turns = _turns(d, frame)
    size = {x: frame.size(x) for x in ("fixed", "cotangent", "sums", "state", "passed")}
    ring = len({x.delay for x in turns if x.function != "advance"})
    window = min(max(WINDOW_BYTES // max(1, size["passed"] * d.dtype.itemsize), WINDOW[0]), WINDOW[1])
    constants = {
        "FIXED": size["fixed"], "TURNED": size["cotangent"], "SUMS": size["sums"], "STAYS": int(held),
        "HELD": held * size["state"], "SLOT": 0 if held else frame.layout.slot, "STATE": size["state"],
        "PASSED": size["passed"], "RING": ring, "W": window, "SCRATCH": frame.scratch, "LATE": ring - 1,
        "TURNS": sum(x.order != "each" for x in turns), "BESIDE": sum(x.order == "each" for x in turns),
    }  # fmt: skip
    sizes = f"enum : long {{ {', '.join(f'{x} = {n}' for x, n in constants.items())} }};"
    item = indented(_item(turns, frame, "0" if held else "STATE"))
    text = cpp_text.source(d.dtype, [f"// {d.name}, in slices", sizes, header("cpp_slices.h"), *functions, item])
    memory = constants["SCRATCH"] + size["fixed"] + size["cotangent"] + size["sums"] + constants["HELD"]
    return Unit(text, frame.parts, tuple(frame.layout.arguments), memory, constants["SLOT"] + size["passed"])

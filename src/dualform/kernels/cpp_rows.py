"""A direction in C++, row by row: each row from end to end, beside the others; few rows are `cpp_slices`' work."""

from __future__ import annotations

from dualform.kernels import cpp_text
from dualform.kernels.cpp_text import CALL, body_text, indented, moved
from dualform.kernels.dialect import Unit
from dualform.kernels.layout import Frame
from dualform.kernels.targets import Direction

HEAD = "static void rows(long lo, long hi, long H, long count, long G, long phase, const Arg* g, T* s) {"
RUN = """
extern "C" long need(long P, long count, long G, long threads) {{ return threads * ({memory} + {slots} * {slot}); }}
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long threads) {{
  long memory = need(1, count, G, 1);
  parallel(threads, [=](long k) {{ rows(P * k / threads, P * (k + 1) / threads, H, count, G, phase, g, \
s + k * memory); }});
}}"""


def _forward(frame: Frame) -> list[str]:
    """Run a row's mini-batches in one slot."""
    return [
        "for (long n = 0; n < count; ++n) {", "if (G && (n + phase) % G == 0) {", *moved(frame.keep), "}",
        f"step({CALL.format(kp='st', ps='st')});", "}",
    ]  # fmt: skip


def _backward(frame: Frame) -> list[str]:
    """Run a row's groups from the last to the first, each mini-batch of a group in a slot of its own."""
    slot, call = frame.layout.slot, CALL.format(kp=f"st + {frame.size('state')}", ps="st")
    return [
        "for (long group = (count - 1) / G; group >= 0; --group) {",
        "long first = group * G, last = first + G < count ? first + G : count;", "st = ring;", *moved(frame.enter),
        f"for (long n = first; n < last; ++n, st += {slot}) advance({call});",
        "for (long n = last - 1; n >= first; --n) {", f"st -= {slot};", f"step({call});", "}", "}",
    ]  # fmt: skip


def unit(d: Direction) -> Unit:
    """Write a direction."""
    frame = Frame(d, d.functions)
    once = d.advance is None  # does one slot serve all mini-batches?
    scratch, slot = frame.scratch, 0 if once else frame.layout.slot
    fixed, turned, sums = (frame.size(x) for x in ("fixed", "cotangent", "sums"))
    memory = scratch + fixed + turned + sums + frame.layout.slot - slot
    lines = [
        HEAD, "Flush flush;",
        f"T *f = s + {scratch}, *ct = f + {fixed}, *acc = ct + {turned}, *ring = acc + {sums}, *st = ring;",
        "for (long row = lo; row < hi; ++row) {", "long b = row / H, h = row % H;", *moved(frame.begin),
        *(_forward(frame) if once else _backward(frame)), *moved(frame.end), "}", "}",
    ]  # fmt: skip
    run = RUN.format(memory=memory, slot=slot, slots=0 if once else "((G < count ? G : count) + 1)")
    text = cpp_text.source(d.dtype, [f"// {d.name}", *map(body_text, frame.bodies), indented(lines), run])
    return Unit(text, frame.parts, tuple(frame.layout.arguments), memory, slot)

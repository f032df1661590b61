"""Where generated C++ spends its time: by statement, forward and backward, learner by learner of cpu_learners.py.

    OMP_NUM_THREADS=1 python benchmarks/cpu_where.py ["low rank 8" ...] [--length 2048] [--most 5] [--output FILE]

Each statement is compiled between two readings of the processor's counter; the least of all its runs counts, so that
what else runs on the machine does not. "rest" is what is left of the compiled calls: rows moved in and out, states
kept, totals.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from typing import Any

import harness

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch
from cpu_learners import H, b, cases, d

import dualform as df
from dualform.kernels import cpp_text, launch
from dualform.kernels.report import _statement as in_words
from dualform.kernels.statements import MatrixProduct, Schedule

MOST = 1000
KINDS = ("products", "products of a factor laid out anew", "entry by entry")


class Watch:
    """Patches the printer and the loader; afterwards knows the cycles of each statement."""

    def __init__(self) -> None:
        self.statements: list[tuple[str, str, int]] = []  # kind, text, flops
        self.libraries: list[ctypes.CDLL] = []
        self.native = 0.0
        printed, loaded, call = cpp_text.source, ctypes.CDLL, launch.Native.__call__

        def library(path: str) -> ctypes.CDLL:
            self.libraries.append(loaded(path))
            return self.libraries[-1]

        def timed(native: launch.Native, *arguments: Any) -> None:
            start = time.process_time()
            call(native, *arguments)
            self.native += time.process_time() - start

        cpp_text.statements = self.lines
        head = f'extern "C" unsigned long spent[{MOST}]; unsigned long spent[{MOST}];'
        cpp_text.source = lambda dtype, functions: printed(dtype, [head, *functions])
        launch.ctypes.CDLL = library  # pyright: ignore[reportAttributeAccessIssue]
        launch.Native.__call__ = timed

    def lines(self, schedule: Schedule) -> list[str]:
        lines: list[str] = []
        for one in schedule.statements:
            text = cpp_text.statement_text(one)
            anew = any("turn<" in line or "packed[" in line for line in text)
            kind = KINDS[2] if not isinstance(one, MatrixProduct) else KINDS[anew]
            place = f"spent[{len(self.statements)}]"
            self.statements.append((kind, in_words(one), one.flops))
            lines += [
                "{ unsigned long since = __builtin_ia32_rdtsc();",
                *text,
                "since = __builtin_ia32_rdtsc() - since;",
            ]
            lines.append(f"if (!{place} || since < {place}) {place} = since; }}")
        return lines

    def spent(self) -> list[tuple[int, str, str, int]]:
        """Return (cycles, kind, text, flops) of the statements that ran since the last reading."""
        found = []
        for library in self.libraries:
            counts = (ctypes.c_ulong * MOST).in_dll(library, "spent")
            found += [(counts[k], *x) for k, x in enumerate(self.statements) if counts[k]]
            ctypes.memset(counts, 0, 8 * MOST)
        return found


def cycles_per_second() -> float:
    """Count the counter's steps in a tenth of a second."""
    source = (
        'extern "C" long need(long, long, long, long) { return 0; } extern "C" void run(long, long, long, long, '
        "long, const void*, "
    )
    source += "unsigned long* t, long) { *t = __builtin_ia32_rdtsc(); }"
    library, at = launch.compiled(source), (ctypes.c_ulong * 2)()
    start = time.perf_counter()
    library.run(0, 0, 0, 0, 0, None, ctypes.addressof(at), 0)
    time.sleep(0.1)
    library.run(0, 0, 0, 0, 0, None, ctypes.addressof(at) + 8, 0)
    return (at[1] - at[0]) / (time.perf_counter() - start)


def measure(options: argparse.Namespace) -> harness.Found:
    torch.set_num_threads(1)
    rate, rows, detail = cycles_per_second(), [], {}
    watch = Watch()
    q, k, v = (torch.randn(1, options.length, H, d, requires_grad=True) for _ in range(3))
    for name in options.names:
        recipe, rule = cases[name]
        torch.manual_seed(0)
        program, times = df.derive(recipe(d), rule=rule, chunk=b), []
        watch.libraries.clear()
        watch.statements.clear()
        for _ in range(options.rounds + 1):
            watch.native, start = 0.0, time.process_time()
            torch.autograd.grad(program(q, k, v, backend="cpp")[0].sum(), [q, k, v, *program.learner.parameters()])
            times.append((watch.native, time.process_time() - start))
        native, whole = (1e3 * min(x) for x in zip(*times[1:], strict=True))
        spent, runs = watch.spent(), options.length / b * H
        ms = {kind: 1e3 * runs * sum(c for c, x, *_ in spent if x == kind) / rate for kind in KINDS}
        flops = {kind: sum(f for _, x, _, f in spent if x == kind) * runs for kind in KINDS[:2]}
        rows.append(
            {"learner": name, "whole ms": whole, "compiled ms": native}
            | {f"{kind} ms": t for kind, t in ms.items()}
            | {"rest ms": native - sum(ms.values())}
            | {f"GFLOP/s of {kind}": f / max(ms[kind], 1e-9) / 1e6 for kind, f in flops.items()}
        )
        most = sorted(spent, reverse=True)[: options.most]
        detail[name] = [f"{c} cycles, {f} flops: {text}" for c, _, text, f in most]
    settings = {"batch": 1, "length": options.length, "heads": H, "dim": d, "chunk": b, "threads": 1}
    return {"settings": settings, "rows": rows, "cycles per second": rate, "most": detail}


def report(found: harness.Found) -> str:
    return harness.rows_table(found["rows"])


if __name__ == "__main__":
    parser = harness.parser(__doc__, length=2048, rounds=8, most=5)
    parser.add_argument("names", nargs="*", default=list(cases))
    harness.main(measure, report, parser.parse_args())

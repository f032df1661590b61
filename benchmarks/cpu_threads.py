"""How generated C++ uses threads where rows (batch x heads) are few: row by row, and in slices beside each other.

    python benchmarks/cpu_threads.py [--threads 1 2 4 8] [--heads 1 2 4] [--lengths 2048 8192] [--rounds 7] [--output FILE]

Forward and backward, batch 1. Row by row no more threads run than there are rows; in slices four of a row at most. By default
slices are taken from two threads of a row on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_learners import b, cases, d
from record import write

import dualform as df
from dualform.kernels import backend

RESULT = Path(__file__).parent / "results" / "cpu_threads.json"


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", nargs="+", type=int, default=[n for n in (1, 2, 4, 8, 16) if n <= most])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    load, rows = os.getloadavg(), []
    for name in ("TTT-Linear", "TTT-MLP"):
        recipe, rule = cases[name]
        for H in options.heads:
            for T in options.lengths:
                torch.manual_seed(0)
                program = df.derive(recipe(d), rule=rule, chunk=b)
                q, k, v = (torch.randn(1, T, H, d, requires_grad=True) for _ in range(3))
                g = torch.randn(1, T, H, d)

                def run() -> None:
                    o = program(q, k, v, backend="cpp")[0]  # noqa: B023
                    torch.autograd.grad(o, [q, k, v, *program.learner.parameters()], g)  # noqa: B023

                for threads in options.threads:
                    torch.set_num_threads(threads)
                    found: dict[str, list[float]] = {"row by row": [], "slices": []}
                    for _ in range(options.rounds + 1):
                        for way in found:
                            backend.cut = lambda rows, count, way=way: way == "slices" and count > 1
                            found[way].append(seconds(run))
                    ms = {f"{way} ms": 1e3 * statistics.median(x[1:]) for way, x in found.items()}
                    ratio = statistics.median(x / y for x, y in list(zip(*found.values(), strict=True))[1:])
                    rows.append(
                        {"learner": name, "heads": H, "T": T, "threads": threads}
                        | ms
                        | {"times faster in slices": ratio}
                    )
                    print(rows[-1], flush=True)
    settings = {"batch": 1, "dim": d, "chunk": b, "rounds": options.rounds}
    write(options.output, "few rows on many threads, forward + backward", load, settings, rows, digits=2)


if __name__ == "__main__":
    main()

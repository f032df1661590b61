"""How generated C++ uses threads where rows (batch x heads) are few: row by row, and in slices beside each other.

    python benchmarks/cpu_threads.py [--threads 1 2 4 8] [--heads 1 2 4] [--lengths 2048 8192] [--rounds 7] [--output
    FILE]

Forward and backward, batch 1. Row by row no more threads run than there are rows; in slices four of a row at most. By
default slices are taken from two threads of a row on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics

import harness
import torch
from cpu_learners import b, cases, d

import dualform as df
from dualform.kernels import backend


def times(name: str, H: int, T: int, threads: int, rounds: int) -> harness.Found:
    """Time both ways in turn."""
    recipe, rule = cases[name]
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    program = df.derive(recipe(d), rule=rule, chunk=b)
    q, k, v, g = (torch.randn(1, T, H, d, requires_grad=n < 3) for n in range(4))

    def run(sliced: bool) -> None:
        backend.cut = lambda rows, count: sliced and count > 1
        o = program(q, k, v, backend="cpp")[0]
        torch.autograd.grad(o, [q, k, v, *program.learner.parameters()], g)

    found = harness.alternating({"row by row": lambda: run(False), "slices": lambda: run(True)}, rounds)
    ratio = statistics.median(x / y for x, y in zip(*found.values(), strict=True))
    ms = {f"{way} ms": 1e3 * statistics.median(x) for way, x in found.items()}
    return {"learner": name, "heads": H, "T": T, "threads": threads} | ms | {"times faster in slices": ratio}


def measure(options: argparse.Namespace) -> harness.Found:
    rows = []
    for case in itertools.product(("TTT-Linear", "TTT-MLP"), options.heads, options.lengths, options.threads):
        rows.append(times(*case, options.rounds))
        print(rows[-1], flush=True)
    return {"settings": {"batch": 1, "dim": d, "chunk": b, "rounds": options.rounds}, "rows": rows}


def report(found: harness.Found) -> str:
    return harness.rows_table(found["rows"], digits=2)


if __name__ == "__main__":
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [n for n in (1, 2, 4, 8, 16) if n <= most]
    given = harness.options(__doc__, threads=threads, heads=[1, 2, 4], lengths=[2048, 8192], rounds=7)
    harness.main(measure, report, given)

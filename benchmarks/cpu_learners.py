"""Learners and rules without a line of their own in kernels/: forward and backward, eager and as generated C++.

    OMP_NUM_THREADS=1 python benchmarks/cpu_learners.py [--length 2048] [--rounds 3] [--output FILE]

The shares of the rate of a large matrix product are of the products alone, and of the rate measured beside each row;
the bound is the schedule's, at that rate and the rate of memory. What limits a row: `cpu_where.py`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import harness

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch
from torch import Tensor, nn

import dualform as df
from dualform.cli.bench import compare

H, d, b = 4, 64, 16


class Kronecker(nn.Module):
    """x (A kron B), a weight of 128 numbers that acts as 64 x 64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, side = dim, int(dim**0.5)
        self.A, self.B = (nn.Parameter(torch.randn(side, side) / side**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        side = len(self.A)
        return torch.einsum("...ab,ac,bd->...cd", x.unflatten(-1, (side, side)), self.A, self.B).flatten(-2)


averaged = df.rules.SGD(lr=0.1, averaged=True)
cases = {
    "TTT-Linear": (df.learners.residual_norm(df.learners.Linear()), averaged),
    "TTT-MLP": (df.learners.residual_norm(df.learners.MLP()), averaged),
    "SwiGLU": (df.learners.SwiGLU(), averaged),
    "MLP of 3 layers": (df.learners.MLP(depth=3, expand=2), averaged),
    "low rank 8": (df.learners.LowRank(rank=8), averaged),
    "Kronecker": (Kronecker, averaged),
    "Taylor-expanded head": (
        df.learners.Head(expansion=("taylor", {"degree": 2}), reconciliation=("low_rank", {"rank": 4})),
        df.rules.SGD(lr=0.01, averaged=True),
    ),
    "Linear, momentum": (df.learners.residual_norm(df.learners.Linear()), df.rules.SGD(lr=0.1, momentum=0.9)),
    "Linear, decay": (df.learners.residual_norm(df.learners.Linear()), df.rules.SGD(lr=0.1, decay=0.01)),
    "MLP, momentum and decay (Titans)": (df.learners.MLP(expand=2), df.rules.SGD(lr=0.1, momentum=0.9, decay=0.01)),
}


def bytes_per_second() -> float:
    """Measure how fast memory is read and written, beyond the caches."""
    x, y = torch.randn(1 << 24), torch.empty(1 << 24)
    return 2 * x.nbytes / min(harness.seconds(lambda: y.copy_(x)) for _ in range(5))


def bounded(row: dict[str, Any], program: df.ChunkProgram, steps: float, moved: float) -> dict[str, Any]:
    """Add the time below which the schedule cannot go at the measured rates, and the measured multiple of it."""
    parts = program.schedule("cpp").values()
    flops = sum(part.flops for part in parts) * steps / (row["cpp ms"] / 1e3) / (row["% of matmul rate"] / 100)
    bounds = [part.bound(flops, moved) for part in parts]
    least = 1e3 * steps * sum(bound.seconds for bound in bounds)
    return row | {"bound ms": least, "bound by": max(bounds).by, "times the bound": row["cpp ms"] / least}


def measure(options: argparse.Namespace) -> harness.Found:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, options.length, H, d, requires_grad=True) for _ in range(3))
    moved, rows = bytes_per_second(), []
    for name, (recipe, rule) in cases.items():
        program = df.derive(recipe(d), rule=rule, chunk=b)
        row = {"learner": name} | compare(program, (q, k, v), options.rounds)
        rows.append(bounded(row, program, options.length / b * H, moved))
        print(rows[-1], flush=True)
    settings = {"batch": 1, "length": options.length, "heads": H, "dim": d, "chunk": b, "rounds": options.rounds}
    return {"settings": settings, "rows": rows}


def report(found: harness.Found) -> str:
    return harness.rows_table(found["rows"])


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, length=2048, rounds=3))

"""Decoding: microseconds per token and layer at several positions of a text, op by op and as generated C++.

    OMP_NUM_THREADS=1 python benchmarks/decode.py [--positions 64 1024 8192] [--tokens 320] [--output FILE]

One layer (6 heads of 64, mini-batches of 16, one row), its projections included, whose state goes from token to token
as in `generate`: "cpp" writes it over the last one, "cpp, kept" leaves the last one alone. Sides alternate, token by
token.
"""

from __future__ import annotations

import argparse
import os
import statistics

import harness

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch

import dualform as df

HEADS, WIDTH = 6, 64
LEARNERS = {"TTT-Linear": df.learners.Linear(), "TTT-MLP": df.learners.MLP()}
SIDES = {"eager": ("eager", False), "cpp, kept": ("cpp", False), "cpp": ("cpp", True)}


def positions(learner: object, starts: list[int], tokens: int) -> list[harness.Found]:
    """Return, per position, the median of each side in microseconds."""
    torch.manual_seed(0)
    rule = df.rules.SGD(averaged=True)
    options = {"learner": df.learners.residual_norm(learner), "objective": df.objectives.Squared("v-k"), "rule": rule}
    layer = df.TestTimeTraining(HEADS * WIDTH, HEADS, **options)
    x = torch.randn(1, max(starts) + tokens, HEADS * WIDTH)
    rows = []
    for start in starts:
        layer.backend = "auto"
        _, state = layer(x[:, :start])
        states, at = dict.fromkeys(SIDES, state), dict.fromkeys(SIDES, start)
        states["cpp"] = state.fork(1)

        def step(side: str) -> None:
            layer.backend, over = SIDES[side]
            n = at[side]  # noqa: B023
            _, states[side] = layer(x[:, n : n + 1], states[side], overwrite=over)  # noqa: B023
            at[side] += 1  # noqa: B023

        steps = {side: lambda side=side: step(side) for side in SIDES}
        found = harness.alternating(steps, tokens - 16, warm=16)  # the first compile
        medians = {side: 1e6 * statistics.median(times) for side, times in found.items()}
        rows.append({"position": start} | medians | {"eager / cpp": medians["eager"] / medians["cpp"]})
    return rows


@torch.no_grad()
def measure(options: argparse.Namespace) -> harness.Found:
    found = {name: positions(learner, options.positions, options.tokens) for name, learner in LEARNERS.items()}
    settings = {"batch": 1, "heads": HEADS, "dim": WIDTH, "chunk": 16, "tokens": options.tokens}
    return {"settings": settings, "rows": [{"layer": name} | row for name, rows in found.items() for row in rows]}


def report(found: harness.Found) -> str:
    return harness.rows_table(found["rows"])


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, positions=[64, 1024, 8192, 32768], tokens=320))

"""Decoding: microseconds per token and layer at several positions of a text, op by op and as generated C++.

    OMP_NUM_THREADS=1 python benchmarks/decode.py [--positions 64 1024 8192] [--tokens 320] [--output FILE]

One layer (6 heads of 64, mini-batches of 16, one row), its projections included, whose state goes from token to token as in
`generate`: "cpp" writes it over the last one, "cpp, kept" leaves the last one alone. Sides alternate, token by token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch
from record import write

import dualform as df

RESULT = Path(__file__).parent / "results" / "decode.json"
HEADS, WIDTH = 6, 64
LEARNERS = {"TTT-Linear": df.learners.Linear(), "TTT-MLP": df.learners.MLP()}
SIDES = {"eager": ("eager", False), "cpp, kept": ("cpp", False), "cpp": ("cpp", True)}


def measure(learner: object, positions: list[int], tokens: int) -> list[dict[str, float]]:
    """Return, per position, the median of each side in microseconds."""
    torch.manual_seed(0)
    rule = df.rules.SGD(averaged=True)
    options = {"learner": df.learners.residual_norm(learner), "objective": df.objectives.Squared("v-k"), "rule": rule}
    layer = df.TestTimeTraining(HEADS * WIDTH, HEADS, **options)
    x = torch.randn(1, max(positions) + tokens, HEADS * WIDTH)
    rows = []
    for start in positions:
        layer.backend = "auto"
        _, state = layer(x[:, :start])
        states = dict.fromkeys(SIDES, state)
        states["cpp"] = state.fork(1)
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for n in range(start, start + tokens):
            for side, (layer.backend, over) in SIDES.items():
                begin = time.perf_counter()
                _, states[side] = layer(x[:, n : n + 1], states[side], overwrite=over)
                found[side].append(1e6 * (time.perf_counter() - begin))
        medians = {side: statistics.median(times[16:]) for side, times in found.items()}  # the first compile
        rows.append({"position": start} | medians | {"eager / cpp": medians["eager"] / medians["cpp"]})
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 1024, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    load = os.getloadavg()
    rows = [
        {"layer": name} | row
        for name, learner in LEARNERS.items()
        for row in measure(learner, options.positions, options.tokens)
    ]
    settings = {"batch": 1, "heads": HEADS, "dim": WIDTH, "chunk": 16, "tokens": options.tokens}
    write(options.output, "microseconds per token and layer, median", load, settings, rows)


if __name__ == "__main__":
    main()

"""Peak memory of one training step of a test-time layer at T = 8192, beside the formula of the docs.

    python benchmarks/memory.py      writes benchmarks/results/memory.json and .md

Each case runs in a process of its own; the peak is the growth of the resident set over the step (VmHWM,
reset before it).
"""

from __future__ import annotations

import argparse
import json
import math

import harness
import torch

import dualform as df

B, H, D, CHUNK = 1, 4, 64, 16
LEARNERS = {
    "TTT-Linear": df.learners.residual_norm(df.learners.Linear()),
    "TTT-MLP": df.learners.residual_norm(df.learners.MLP(depth=2, expand=4)),
}


def step(program, T):
    q, k, v = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(3))

    def run(remat):
        o, _ = program(q, k, v, remat=remat)
        torch.autograd.grad(o.square().sum(), [q, k, v, *program.parts.fast.values()])

    return run


def case(name: str, remat: str | int | None, T: int) -> dict:
    """Measure one step in this process; the programs are traced on a short sequence first."""
    torch.set_num_threads(1)
    program = df.derive(LEARNERS[name](D), df.objectives.Squared(), df.rules.SGD(lr=0.1, averaged=True), chunk=CHUNK)
    step(program, 8 * CHUNK)(remat)
    run = step(program, T)
    _, peak = harness.growth(lambda: run(remat))
    state = 4 * sum(p.numel() for p in program.parts.fast.values()) * (1 + program.rule.num_registers)
    N, tokens = T // CHUNK, 4 * B * T * H * D
    G = math.ceil(N / (math.isqrt(N) + 1)) if remat == "auto" else 1 if remat is None else remat
    return {
        "learner": name,
        "remat": str(remat),
        "peak_bytes": peak,
        "inputs_bytes": 3 * tokens,
        "formula_bytes": {
            "token tensors (q, k, v, o, laid out, and their gradients)": 14 * tokens,
            "checkpoints": B * H * state * math.ceil(N / G),
            "states inside one group": B * H * state * G // 2,
        },
    }


def measure(options: argparse.Namespace) -> harness.Found:
    cases = []
    for name in LEARNERS:
        for remat in ("auto", "4", "None"):
            cases += harness.alone(["--case", name, remat, "--length", options.length])
            print(cases[-1])
    shape = {"B": B, "T": options.length, "H": H, "d": D, "chunk": CHUNK, "dtype": "float32"}
    return {"shape": shape, "cases": cases}


def report(found: harness.Found) -> str:
    header = (
        "learner | remat | peak of f+b above inputs, MiB | formula, MiB | of which checkpoints | of which one group"
    )
    rows = []
    for c in found["cases"]:
        f = list(c["formula_bytes"].values())
        rows.append([c["learner"], c["remat"], *(x / 2**20 for x in (c["peak_bytes"], sum(f), f[1], f[2]))])
    return harness.table(header.split(" | "), rows, digits=0)


if __name__ == "__main__":
    given = harness.options(__doc__, length=8192, case=["", ""])
    if given.case[0]:
        name, remat = given.case
        way = None if remat == "None" else int(remat) if remat.isdigit() else remat
        print(json.dumps(case(name, way, given.length)))
    else:
        harness.main(measure, report, given)

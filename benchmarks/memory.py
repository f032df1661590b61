"""Peak memory of one training step of a test-time layer at T = 8192, beside the formula of the docs.

    python benchmarks/memory.py      writes benchmarks/results/memory.json and .md

Each case runs in a process of its own; the peak is the growth of the resident set over the step (VmHWM, reset before it).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import dualform as df

RESULT = Path(__file__).parent / "results" / "memory.json"
B, T, H, D, CHUNK = 1, 8192, 4, 64, 16
LEARNERS = {
    "TTT-Linear": df.learners.residual_norm(df.learners.Linear()),
    "TTT-MLP": df.learners.residual_norm(df.learners.MLP(depth=2, expand=4)),
}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def step(program, T):
    q, k, v = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(3))

    def run(remat):
        o, _ = program(q, k, v, remat=remat)
        torch.autograd.grad(o.square().sum(), [q, k, v, *program.parts.fast.values()])

    return run


def case(name: str, remat: str | int | None) -> dict:
    """Measure one step in this process; the programs are traced on a short sequence first."""
    torch.set_num_threads(1)
    program = df.derive(LEARNERS[name](D), df.objectives.Squared(), df.rules.SGD(lr=0.1, averaged=True), chunk=CHUNK)
    step(program, 8 * CHUNK)(remat)
    run = step(program, T)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(remat)
    state = 4 * sum(p.numel() for p in program.parts.fast.values()) * (1 + program.rule.num_registers)
    N = T // CHUNK
    G = math.ceil(N / (math.isqrt(N) + 1)) if remat == "auto" else 1 if remat is None else remat
    tokens = 4 * B * T * H * D
    return {
        "learner": name,
        "remat": str(remat),
        "peak_bytes": status("VmHWM") - before,
        "inputs_bytes": 3 * tokens,
        "formula_bytes": {
            "token tensors (q, k, v, o, laid out, and their gradients)": 14 * tokens,
            "checkpoints": B * H * state * math.ceil(N / G),
            "states inside one group": B * H * state * G // 2,
        },
    }


def main() -> None:
    if len(sys.argv) > 1:
        name, remat = sys.argv[1:]
        print(json.dumps(case(name, None if remat == "None" else int(remat) if remat.isdigit() else remat)))
        return
    cases = []
    for name in LEARNERS:
        for remat in ("auto", "4", "None"):
            out = subprocess.run(
                [sys.executable, __file__, name, remat], capture_output=True, text=True, check=True
            ).stdout
            cases.append(json.loads(out.splitlines()[-1]))
            print(cases[-1])
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULT.parent, check=False
    )
    RESULT.write_text(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": commit.stdout.strip(),
                "shape": {"B": B, "T": T, "H": H, "d": D, "chunk": CHUNK, "dtype": "float32"},
                "cases": cases,
            },
            indent=1,
        )
    )
    lines = [
        "| learner | remat | peak of f+b above inputs, MiB | formula, MiB | of which checkpoints | of which one group |",
        "|---|---|---|---|---|---|",
    ]
    for c in cases:
        f = list(c["formula_bytes"].values())
        row = [c["peak_bytes"], sum(f), f[1], f[2]]
        lines.append(f"| {c['learner']} | {c['remat']} | " + " | ".join(f"{x / 2**20:.0f}" for x in row) + " |")
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

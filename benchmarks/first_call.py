"""What a first call costs: imports, derivation, two directions, a new ragged length; each in its own process, one core.

    python benchmarks/first_call.py [--rounds 5] [--output FILE]     writes benchmarks/results/first_call.json and .md

residual_norm(MLP(2)), width 64, mini-batch 16, B 2, H 2, T 64 first. "cold" empties the folder of what is kept on disk
before each process, "remembered" and "warm cache" fill it once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness

# name: (backend, is the program proved, is the folder emptied each time)
CASES = {
    "eager, prove=False": ("eager", 0, True),
    "eager, prove=True, cold": ("eager", 1, True),
    "eager, prove=True, remembered": ("eager", 1, False),
    "auto, prove=False, cold cache": ("auto", 0, True),
    "auto, prove=False, warm cache": ("auto", 0, False),
    "auto, prove=True, cold cache": ("auto", 1, True),
}
SHOWN = (
    "import_torch import_dualform derive forward backward ragged_70 ragged_75 warm_forward warm_backward process"
).split()


def first_calls(backend: str, prove: bool) -> harness.Found:
    """Time this process's first calls."""
    found: harness.Found = {}

    def timed(name: str, run: Any) -> Any:
        kept: list[Any] = []
        found[name] = harness.seconds(lambda: kept.append(run()))
        return kept[0]

    torch = timed("import_torch", lambda: __import__("torch"))
    df = timed("import_dualform", lambda: __import__("dualform"))
    torch.manual_seed(0)
    learner = df.learners.residual_norm(df.learners.MLP(2))(64)
    a, b, c = (torch.randn(2, T, 2, 64).requires_grad_() for T in (64, 70, 75))
    program = timed("derive", lambda: df.derive(learner, chunk=16, prove=prove))

    def both(x: Any, forward: str, backward: str) -> float:
        o = timed(forward, lambda: program(x, x, x, backend=backend)[0])
        timed(backward, lambda: torch.autograd.grad(o.square().sum(), [x, *learner.parameters()]))
        return found[forward] + found[backward]

    both(a, "forward", "backward")
    for x, T in ((b, 70), (c, 75)):
        found[f"ragged_{T}"] = both(x, f"ragged_{T}_forward", f"ragged_{T}_backward")
    both(a, "warm_forward", "warm_backward")
    return found | {"proof": str(program.proof)}


def measure(options: argparse.Namespace) -> harness.Found:
    results = {}
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if core is not None:
        os.sched_setaffinity(0, {core})  # and so the processes that are started
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        env = {"CUDA_VISIBLE_DEVICES": "", "MKL_NUM_THREADS": "1", "DUALFORM_CACHE": str(cache), "DUALFORM_PROVE": "1"}
        for name, (backend, prove, cold) in CASES.items():
            runs: list[harness.Found] = []
            for n in range(-1 if not cold or not results else 0, options.rounds):  # the first of all makes bytecode
                if cold or n < 0:
                    shutil.rmtree(cache, ignore_errors=True)
                words, made = ["--one", backend, prove], []
                spent = harness.seconds(lambda: made.extend(harness.alone(words, env)))  # noqa: B023
                if n >= 0:
                    runs += [r | {"process": spent} for r in made if "failed" not in r]
            if runs:
                times = {k: harness.summary([r[k] for r in runs], digits=4) for k in runs[0] if k != "proof"}
                results[name] = {"seconds": times, "proof": runs[0]["proof"]}
                print(name, {k: statistics.median(r[k] for r in runs) for k in SHOWN}, flush=True)
    return {"what": (__doc__ or "").split("\n\n")[-1], "results": results}


def report(found: harness.Found) -> str:
    rows = [[name, *(r["seconds"].get(k, {}).get("median") for k in SHOWN)] for name, r in found["results"].items()]
    return harness.table(["seconds, median", *(k.replace("_", " ") for k in SHOWN)], rows, digits=3)


if __name__ == "__main__":
    given = harness.options(__doc__, rounds=5, one=["", ""])
    if given.one[0]:
        print(json.dumps(first_calls(given.one[0], given.one[1] == "1")))
    else:
        harness.main(measure, report, given)

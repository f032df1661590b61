"""Every learner with every objective and every rule: generated Triton, interpreted, against eager in float64.

    python benchmarks/triton_product.py [--minutes 30] [--again] [--output FILE]

Outputs, state and all outer gradients of two mini-batches and a ragged third that go on with a state, every other one in
slices. In an order that is drawn once: where the time is up, what there is is a sample, and the next run goes on with
it. --again: from the beginning.
"""

from __future__ import annotations

import harness  # isort: skip - first: it sets the number of threads

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(harness.HERE.parent / "tests"))
import torch
from test_laws import built_in, of, rules, wobble

import dualform as df
from dualform import testing as laws
from dualform.learning.backends import BackendError

LEARNERS = [*built_in, df.learners.Head(expansion=("taylor", {"degree": 2}), reconciliation=("low_rank", {"rank": 2}))]
OBJECTIVES = {name: df.objectives.build(name) for name in df.objectives.names()}
OBJECTIVES |= {"squared, v-k": df.objectives.Squared("v-k"), "log cosh": wobble}
CHUNK, TIME = 2, 5


def cases() -> list[tuple[int, str, str]]:
    every = [(n, objective, rule) for n in range(len(LEARNERS)) for objective in OBJECTIVES for rule in rules]
    random.Random(0).shuffle(every)
    return every


def compared(n: int, learner: int, objective: str, rule: str) -> harness.Found:
    """Run both sides; return the largest error of any tensor, in norm, of its own norm."""
    torch.manual_seed(n)
    program = of(LEARNERS[learner], OBJECTIVES[objective], rule, CHUNK)
    problem = laws.draw(program, time=TIME, batch=1, heads=1, carried=True, seed=n)
    right = laws.outcome(problem, lambda: problem.run("auto", backend="eager"))
    try:
        got = laws.outcome(problem, lambda: problem.run("auto", backend=("triton", {"slices": n % 2 == 1})))
    except BackendError as error:
        return {"refused": str(error)}
    found = {k: float((got[k] - x).double().norm() / x.double().norm().clamp(min=1)) for k, x in right.items()}
    worst = max(found, key=found.__getitem__)
    row = {"worst": worst, "error": float(f"{found[worst]:.2g}")}
    try:
        laws.same_outcome(got, right)
    except laws.LawBroken as error:
        return row | {"wrong": str(error)[:200]}
    return row


def measure(options: argparse.Namespace) -> harness.Found:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    every, start = cases(), time.process_time()
    rows: list[Any] = []
    if options.output.exists() and not options.again:
        rows = json.loads(options.output.read_text())["rows"]
    for n in range(len(rows), len(every)):
        if time.process_time() - start > 60 * options.minutes:
            break
        learner, objective, rule = every[n]
        began = time.process_time()
        found = compared(n, learner, objective, rule)
        names = {"learner": str(LEARNERS[learner]), "objective": objective, "rule": rule, "slices": n % 2 == 1}
        rows.append(names | found | {"seconds": round(time.process_time() - began, 1)})
        print(len(rows), rows[-1], flush=True)
        if len(rows) % 8 == 0:  # for a run that is ended
            partial = {"rows": rows, "of": len(every)} | harness.about("triton")
            harness.write(options.output, partial, report)
    return {"rows": rows, "of": len(every)}


def report(found: harness.Found) -> str:
    rows = found["rows"]
    wrong, refused = ([x for x in rows if what in x] for what in ("wrong", "refused"))
    right = [x for x in rows if x not in wrong and x not in refused]
    head = (
        f"{len(rows)} of {found['of']} products of learner, objective and rule, in an order that was drawn: {len(right)} "
        f"equal eager, {len(wrong)} do not, {len(refused)} are refused; largest error "
        f"{max((x['error'] for x in right), default=0):.1e} of a tensor's norm; {sum(x['seconds'] for x in rows):.0f} s "
        "of one core.\n\n"
    )
    lines = []
    for what in ("learner", "objective", "rule"):
        for name, count in Counter(x[what] for x in rows).items():
            own = [x for x in right if x[what] == name]
            lines.append([what, name, count, len(own), f"{max((x['error'] for x in own), default=0):.1e}"])
    lines.sort(key=lambda x: (("learner", "objective", "rule").index(x[0]), x[1]))
    bad = [[x["learner"], x["objective"], x["rule"], x.get("wrong") or x["refused"]] for x in (*wrong, *refused)]
    parts = [harness.table(["of", "name", "products", "right", "largest error"], lines)]
    return head + "\n".join(parts + ([harness.table(["learner", "objective", "rule", "what"], bad)] if bad else []))


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, minutes=30.0, again=False), "triton", "numpy")

"""One tree's speed beside another's, in one run: what a change of the house may not make slower.

    python benchmarks/beside.py --before COMMIT [--rows REGEX] [--rounds 9] [--least 0.05] [--output FILE]
    python benchmarks/beside.py --report [--output FILE]

writes benchmarks/results/beside.json and .md: a line for each row of cpu_ttt.py (inner parts and whole layers),
calculus.py and functions.py (ours), with the ratio before / now: above 1 is faster now.

Each tree has a process of its own, one thread, that holds what it has prepared. A round times a row on both, in turn,
in seconds of the processor, as the mean over calls that last --least of them together; the ratio is taken within a
round, then its median and quartiles over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness

Run = Callable[[], Any]
SIZE, BACKENDS, LAYERS = (1, 512), ("eager", "cpp"), ("eager layer", "cpp layer")


# -- one tree
# ------------------------------------------------------------------------------------------------------------


@cache
def _maker(learner: str) -> Any:
    import cpu_ttt

    return cpu_ttt.Maker(learner, None)


def _side(learner: str, side: str, both: bool) -> Run:
    made = _maker(learner).make(side, *SIZE)
    return made.both if both else made.forward


def _jacobian(name: str, n: int, what: str) -> Run:
    import torch
    from calculus import torch_case

    import dualform as df

    f, args = torch_case(name, n)
    if what == "cold":
        return lambda: (df.calculus.clear_cache(), df.jacobian(f, *args))
    J = df.jacobian(f, *args)
    g, v = torch.randn_like(f(*args)), torch.randn_like(args[0])
    return {"cached": partial(df.jacobian, f, *args), "vjp": partial(J.vjp, g), "jvp": partial(J.jvp, v)}[what]


def _function(k: int, both: bool) -> Run:
    import torch
    from functions import all_cases, prepared

    case = all_cases()[k]
    torch.manual_seed(0)
    return prepared(case.ours(case), case)[both]


def rows() -> dict[str, Callable[[], Run]]:
    """Name each row, and say how it is prepared."""
    import functions
    from calculus import CASES

    ways = (("forward", False), ("both", True))
    found: dict[str, Callable[[], Run]] = {}
    for learner in ("TTT-Linear", "TTT-MLP"):
        for side in (*BACKENDS, *LAYERS):
            found |= {f"{learner}, {side}, {way}": partial(_side, learner, side, both) for way, both in ways}
    for name in CASES:
        for what in ("cold", "cached", "vjp", "jvp"):
            found[f"jacobian of {name}, {what}"] = partial(_jacobian, name, 32 if name == "block" else 64, what)
    for k, case in enumerate(functions.all_cases()):
        found |= {f"{case.name}, {way}": partial(_function, k, both) for way, both in ways}
    return found


def serve() -> None:
    """Time a row for each line of a name and the least seconds; answer the seconds of a call, or why there are none."""
    import torch

    torch.set_num_threads(1)
    known, ready = rows(), {}
    for line in sys.stdin:
        name, least = json.loads(line)
        try:
            if name not in ready:
                ready[name] = known[name]()
                harness.repeated(ready[name], 2 * least, time.process_time)
            answer: Any = harness.repeated(ready[name], least, time.process_time)
        except Exception as error:  # whatever it is, the other rows go on
            answer = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps(answer), flush=True)


# -- two trees
# -----------------------------------------------------------------------------------------------------------


class Tree:
    """A process that times rows with the package that lies in a folder."""

    def __init__(self, source: Path, caches: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(source), "DUALFORM_CACHE": caches, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self, name: str, least: float) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, least]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compared(trees: Sequence[Tree], name: str, rounds: int, least: float) -> harness.Found:
    """Time a row on both trees in turn."""
    samples: list[list[float]] = [[], []]
    for r in range(-1, rounds):
        for side in (0, 1) if r % 2 else (1, 0):
            spent = trees[side].time(name, least)
            if isinstance(spent, str):
                return {"row": name, "absent": f"{('before', 'now')[side]}: {spent}"}
            samples[side] += [spent] if r >= 0 else []
    low, middle, high = harness.quartiles([a / b for a, b in zip(*samples, strict=True)])
    before, now = (harness.summary(xs, 1e3) for xs in samples)
    return {"row": name, "before_ms": before, "now_ms": now, "ratio": [low, middle, high]}


def measured(options: argparse.Namespace) -> Iterator[harness.Found]:
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "before"
        harness.git("worktree", "add", "--detach", str(old), options.before)
        try:
            trees = [Tree(src, f"{folder}/{k}") for k, src in enumerate((old / "src", harness.HERE.parent / "src"))]
            for name in rows():
                if re.search(options.rows, name):
                    found = compared(trees, name, options.rounds, options.least)
                    print(found["row"], found.get("absent") or f"{found['ratio'][1]:.2f}", flush=True)
                    yield found
            for tree in trees:
                tree.process.kill()
        finally:
            harness.git("worktree", "remove", "--force", str(old))


def measure(options: argparse.Namespace) -> harness.Found:
    before = harness.git("log", "-1", "--format=%H", options.before)
    return {"before": before, "rounds": options.rounds, "measured": list(measured(options))}


def report(found: harness.Found) -> str:
    lines = [
        [m["row"], m["before_ms"]["median"], m["now_ms"]["median"], *(f"{x:.2f}" for x in m["ratio"][1::-1]), f"{m['ratio'][2]:.2f}"]
        for m in found["measured"]
        if "ratio" in m
    ]  # fmt: skip
    absent = [f"- {m['row']}: {m['absent']}" for m in found["measured"] if "absent" in m]
    head = (
        f"Commit {found['commit'][:7]} beside {found['before'][:7]}, {found['rounds']} rounds; before / now, above 1 "
        "is faster now.\n\n"
    )
    table = harness.table("row | before, ms | now, ms | ratio | quartile | quartile".split(" | "), lines, 3)
    return head + table + "\n".join(absent)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        harness.main(measure, report, harness.options(__doc__, before="HEAD~1", rows="", rounds=9, least=0.05))

"""Compile generated Triton for cards that are not here: registers, spills, shared memory, and whether it fits.

    python benchmarks/triton_compiled.py [--workers 1] [--python OTHER] [--only WORDS] [--output FILE]
    python benchmarks/triton_compiled.py --check WORDS

Each kernel as the chooser launches it: cut as for 96 rows and 128 mini-batches, factors of bfloat16, with fewer stages
until a program of that card has the shared memory. --only: these learners; the others stay as they were. --python: of an
environment with another Triton, into "others". --check: compile these learners at 64 for `CHECKED`, which may take no
more than the record says.
"""

from __future__ import annotations

import harness  # isort: skip - first: it sets the number of threads

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dualform as df
from dualform.kernels import triton_backend, triton_launch
from dualform.kernels.triton_lines import Precision
from dualform.learning.backends import BackendError
from dualform.learning.grid import Variant


class Rectangular(nn.Module):
    """Half as many values as keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(dim, dim // 2) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W


L, SGD = df.learners, df.rules.SGD
LEARNERS = {
    "TTT-Linear": L.residual_norm(L.Linear()), "TTT-MLP": L.residual_norm(L.MLP()), "SwiGLU": L.SwiGLU(),
    "low rank": L.LowRank(rank=8), "Linear": L.Linear(), "MLP": L.MLP(), "K != V": Rectangular,
    "MLP of 3": L.residual_norm(L.MLP(depth=3, expand=2, activation="silu")),
}  # fmt: skip
# Bytes of shared memory that a program has.
ROOM = {10 * major + minor: n for (major, minor), n in triton_launch.SHARED.items()} | {"gfx942": 64 << 10}
CARDS: list[Any] = list(ROOM)
CHECKED: list[Any] = [80, 90, 100, "gfx942"]
ROWS, COUNT, LIMIT = 96, 128, 560  # heads of all sequences, mini-batches, seconds of a learner's kernels for one card
CASES = [
    *((name, 64, CARDS) for name in LEARNERS),
    *((name, d, [80, 90]) for name in ("TTT-Linear", "low rank", "K != V") for d in (16, 32, 96, 128)),
    *(("TTT-MLP", d, [80, 90]) for d in (16, 32)),
]


def kernels(learner: str, d: int, narrow: bool) -> Iterator[tuple[str, bool, Any]]:
    """Write a learner's kernels as a call with gradients runs them: direction, whether in slices, kernel."""
    program = df.derive(LEARNERS[learner](d), df.objectives.Squared(), SGD(lr=0.1, averaged=True), chunk=16)
    plan = program.plan(d, torch.float32, "auto")
    entries = sum(p.numel() for p in plan.derivation.parts.fast.values())
    precision = Precision(torch.bfloat16, at_once=True, ahead=True, narrow=narrow)
    for way in ("forward", "backward"):
        slices = triton_backend.cut(entries, ROWS, COUNT, way)
        found = triton_backend.written(plan, Variant(16, True, True, False), way, precision, slices)
        for name in found:
            if name != "forward some":
                yield from ((way, slices, kernel) for kernel in found[name])


def compiled(kernel: Any, card: Any) -> harness.Found:
    """Compile a kernel for a card, with fewer stages where it does not fit otherwise."""
    from triton.backends.compiler import GPUTarget

    cuda, how, row = isinstance(card, int), triton_backend.launch_for(kernel, None, 2), {}
    target = GPUTarget("cuda" if cuda else "hip", card, 32 if cuda else 64)
    for stages in range(how.stages, 0, -1):
        made = triton_launch.compiled(kernel, target, how._replace(stages=stages), alike=lambda a: (a.role, a.rank))
        row = {"warps": how.warps, "stages": stages, "shared": made.metadata.shared, "fits": False}
        if row["shared"] <= ROOM[card]:
            return row | {"fits": True} | resources(made, cuda)
    return row


def resources(made: Any, cuda: bool) -> dict[str, int]:
    """Read what a compiled kernel takes: registers of a thread, and what of them spills: bytes, on AMD registers."""
    if not cuda:
        names = {"registers": "vgpr_count", "spills": "vgpr_spill_count"}
        found = {name: re.findall(rf"\.{x}:\s*(\d+)", made.asm["amdgcn"]) for name, x in names.items()}
    else:
        from triton.backends import nvidia  # pyright: ignore[reportMissingImports]

        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        found = {name: re.findall(rf"{x}:(\d+)", said) for name, x in (("registers", "REG"), ("spills", "STACK"))}
    return {name: max(map(int, numbers)) for name, numbers in found.items() if numbers}


def rows_of(learner: str, d: int, card: Any) -> Iterator[harness.Found]:
    """Compile a learner's kernels for a card."""
    narrow = not isinstance(card, int) or triton_launch.is_narrow(divmod(card, 10))
    base = {"learner": learner, "d": d, "card": card}
    try:
        for way, slices, kernel in kernels(learner, d, narrow):
            row = base | {"way": way, "slices": slices, "kernel": kernel.name}
            try:
                yield row | compiled(kernel, card)
            except Exception as error:  # of Triton: it has many kinds
                yield row | {"failed": f"{type(error).__name__}: {str(error)[:120]}"}
    except BackendError as error:
        yield base | {"way": "both", "failed": str(error)}


def measure(options: argparse.Namespace) -> harness.Found:
    environment = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    words = set(options.only.split(",")) - {""}
    cases = [(name, d, card) for name, d, cards in CASES for card in cards if not words or name in words]

    def run(case: tuple[str, int, Any]) -> list[harness.Found]:
        one = ["--one", json.dumps(case)]
        found = list(harness.alone(one, environment, options.python or sys.executable, LIMIT))
        last = found[-2]["way"] if len(found) > 1 else "forward"  # of what came before the time was up
        base = {"learner": case[0], "d": case[1], "card": case[2], "way": last}
        return [x if "learner" in x else base | x for x in found]

    with ThreadPoolExecutor(options.workers) as pool:
        found = [row for rows in pool.map(run, cases) for row in rows]
    before = json.loads(options.output.read_text()) if words or options.python else {}
    others = before.get("others", [])
    if not options.python:
        return {"rows": merged(before.get("rows", []), found)} | ({"others": others} if others else {})
    asked = [options.python, "-c", "import triton, torch; print(triton.__version__, torch.__version__)"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    known = [row for x in others if x["triton"] == said[0] for row in x["rows"]] if words else []
    one = {"triton": said[0], "torch": said[1], "rows": merged(known, found)}
    return before | {"others": [*(x for x in others if x["triton"] != said[0]), one]}


def merged(before: list[harness.Found], found: list[harness.Found]) -> list[harness.Found]:
    """Put what was found in the place of what was known of the same learners, sizes and cards."""

    def case(row: harness.Found) -> tuple[Any, ...]:
        return row["learner"], row["d"], row["card"]

    done = set(map(case, found))
    places = {(name, d, card): n for n, (name, d, card) in enumerate((n, d, c) for n, d, cards in CASES for c in cards)}
    return sorted([*(x for x in before if case(x) not in done), *found], key=lambda x: places[case(x)])


def worse(learner: str, record: list[harness.Found]) -> Iterator[str]:
    """Say what takes more than it did, or is another kernel, or none: of a learner at 64, card by card."""

    def named(rows: list[harness.Found]) -> dict[str, harness.Found]:
        return {f"{x['way']} {x.get('kernel', '')}": x for x in rows}

    for card in CHECKED:
        own = [x for x in record if (x["learner"], x["d"], x["card"]) == (learner, 64, card)]
        before, now = named(own), named(list(rows_of(learner, 64, card)))
        where = f"{learner}, sm_{card}" if isinstance(card, int) else f"{learner}, {card}"
        if set(before) != set(now):
            yield f"{where}: the kernels are {sorted(now)}; the record has {sorted(before)}"
        for name in before.keys() & now.keys():
            a, b = before[name], now[name]
            if "failed" in b and "failed" not in a:
                yield f"{where}, {name}: {b['failed']}"
            for what in ("shared", "registers", "spills"):
                if b.get(what, 0) > a.get(what, b.get(what, 0)):
                    yield f"{where}, {name}: {what} {a[what]} -> {b[what]}"


def check(words: str) -> int:
    """Print what is worse than recorded; return how many are."""
    record = json.loads((harness.HERE / "results" / "triton_compiled.json").read_text())["rows"]
    found = [line for learner in words.split(",") for line in worse(learner, record)]
    for line in found:
        print(line)
    if found:
        again = f"python benchmarks/triton_compiled.py --only {words!r}"
        print(f"{len(found)} worse than recorded. If what was gained is worth it, say so and record them: {again}")
    return len(found)


def report(found: harness.Found) -> str:
    """Spell, for each learner and size, the largest demands of its kernels by card."""

    def cell(rows: list[harness.Found]) -> str:
        if any("failed" in x for x in rows):
            return "not compiled"
        if not all(x["fits"] for x in rows):
            return f"does not fit: {max(x['shared'] for x in rows) // 1024} KiB"
        most = {name: max(x.get(name, 0) for x in rows) for name in ("shared", "registers", "spills")}
        return f"{most['shared'] // 1024} KiB, {most['registers']}, {most['spills']}"

    def spelt(rows: list[harness.Found]) -> str:
        groups: dict[tuple[str, int, str], dict[Any, list[harness.Found]]] = {}
        for x in rows:
            if x["way"] != "both":
                groups.setdefault((x["learner"], x["d"], x["way"]), {}).setdefault(x["card"], []).append(x)
        head = ["learner, d, direction", *(f"sm_{c}" if isinstance(c, int) else c for c in CARDS)]
        lines = [
            [f"{n}, {d}, {way}", *(cell(by[c]) if c in by else "" for c in CARDS)] for (n, d, way), by in groups.items()
        ]
        return harness.table(head, lines)

    room = ", ".join(f"sm_{c} {n >> 10}" if isinstance(c, int) else f"{c} {n >> 10}" for c, n in ROOM.items())
    parts = [
        f"Triton {found['versions']['triton']}: shared memory of a program, registers of a thread, and what of them "
        f"spills (bytes; on gfx942 registers): the most of a direction's kernels. "
        f"KiB that a program may have: {room}.\n",
        spelt(found["rows"]),
    ]
    for other in found.get("others", []):
        bad = [x for x in other["rows"] if "failed" in x]
        parts += [
            f"Triton {other['triton']}, torch {other['torch']}: {len(other['rows'])} kernels, "
            f"{len(bad)} not compiled.\n",
            spelt(other["rows"]),
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    if "--one" in sys.argv:
        for row in rows_of(*json.loads(sys.argv[sys.argv.index("--one") + 1])):
            print(json.dumps(row), flush=True)
    elif "--check" in sys.argv:
        sys.exit(bool(check(sys.argv[sys.argv.index("--check") + 1])))
    else:
        os.environ.setdefault("TRITON_INTERPRET", "0")
        options = harness.options(__doc__, workers=1, python="", only="")
        harness.main(measure, report, options, "triton")

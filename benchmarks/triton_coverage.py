"""Which learners run wholly in generated Triton, in which direction, and the op that keeps the others from it.

    python benchmarks/triton_coverage.py [--drawn 80] [--only GROUPS] [--output FILE]

Learners of the catalogue, heads of every reconciliation and expansion, objectives, rules, drawn learners, and those of
the tests: what people write and publish. All small, in float32, as a card's kernels are written for 96 rows and 128
mini-batches. "torch beside": the kernel runs, and torch computes these ops for all mini-batches before it or after it.
Nothing is compiled: what a kernel can hold is found by writing it. --only: these groups; the others stay as they were.
"""

from __future__ import annotations

import harness  # isort: skip - first: it sets the number of threads

import argparse
import inspect
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(harness.HERE.parent / "tests"))
import dualform as df
from dualform.kernels import triton_backend
from dualform.kernels.backend import line_of
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_schedule import Refused
from dualform.learning.grid import Variant

WAYS, CHUNK, ROWS, COUNT = ("forward", "backward"), 3, 96, 128
VARIANT = Variant(CHUNK, True, True, False)
AVERAGED = df.rules.SGD(lr=0.1, averaged=True)
BASE = df.learners.residual_norm(df.learners.Linear())


class Case(NamedTuple):
    """A program to be: its name, its learner, and what is not as in most."""

    name: str
    learner: Callable[[], nn.Module]
    dim: int = 4
    objective: Any = df.objectives.Squared()
    rule: Any = AVERAGED


def catalogue(_: int) -> Iterator[Case]:
    """Every record by its defaults, what has none by the tests' options."""
    from test_laws import built_in

    for name in df.learners.names():
        needs = [p for p in inspect.signature(df.learners[name]).parameters.values() if p.default is p.empty]
        if not any(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in needs):
            yield Case(name, lambda name=name: df.learners[name]()(4))
    for spec in built_in:
        yield Case(str(spec), lambda spec=spec: spec(4))


def heads(_: int) -> Iterator[Case]:
    from test_head import expansions, reconciliations

    for r in reconciliations:
        made = df.learners.Head(reconciliation=r, remainder="identity")
        yield Case(f"reconciliation {r.name}", lambda made=made: made(4))
    for e in expansions:
        made = df.learners.Head(expansion=e, reconciliation=("low_rank", {"rank": 1}))
        yield Case(f"expansion {e.name}", lambda made=made: made(4))


def objectives(_: int) -> Iterator[Case]:
    from test_laws import wobble

    every = {name: df.objectives.build(name) for name in df.objectives.names()}
    for name, objective in (every | {"squared, v-k": df.objectives.Squared("v-k"), "log cosh": wobble}).items():
        yield Case(name, lambda: BASE(4), objective=objective)


def rules(_: int) -> Iterator[Case]:
    from test_laws import rules

    for name, rule in rules.items():
        yield Case(name, lambda: BASE(4), rule=rule)


def of_tests(_: int) -> Iterator[Case]:
    import test_laws
    import test_learners_ops
    import test_token_places
    import test_weight_expressions

    for kind in test_laws.own:
        yield Case(kind.__name__, kind, 5 if kind is test_laws.Rectangular else 6 if kind is test_laws.Heads else 4)
    for name, recipe in test_learners_ops.LEARNERS.items():
        yield Case(name, recipe, test_learners_ops.K)
    for name, (run, parts) in test_token_places.APART.items():
        yield Case(name, lambda run=run, parts=parts: test_token_places.Learner(run, **parts))
    for name, weight in test_weight_expressions.EXPRESSIONS.items():
        yield Case(name, lambda weight=weight: test_weight_expressions.Weight(weight))


def drawn(count: int) -> Iterator[Case]:
    """As the tests draw them, from a fixed seed."""
    import hypothesis
    from test_learners_drawn import learners

    found: list[Any] = []
    settings = hypothesis.settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    settings(hypothesis.given(learners())(lambda learner: found.append(learner)))()
    for n, learner in enumerate(found[:count]):
        yield Case(f"drawn {n}", lambda learner=learner: learner, learner.dim)


GROUPS = {
    "catalogue": catalogue, "heads": heads, "objectives": objectives, "rules": rules, "drawn": drawn,
    "of the tests": of_tests,
}  # fmt: skip


def op_name(target: Any) -> str:
    return str(target).removeprefix("aten.").split(".")[0]


def apart(plan: Any, node: Any, why: str) -> list[str]:
    """Name an op, why no kernel has it, and the learner's line where that is the op's own fault, not of a value of it."""
    line = line_of(plan, node).split("   (")[0].strip() if why.startswith(("its row", "the op", "the view")) else ""
    return [op_name(node.target), why, line]


def direction(plan: Any, way: str) -> harness.Found:
    """Write one direction as the chooser runs it, and say what came of it."""
    entries = sum(p.numel() for p in plan.derivation.parts.fast.values())
    slices = triton_backend.cut(entries, ROWS, COUNT, way)
    precision = Precision(torch.bfloat16, at_once=True, ahead=True)
    try:
        found = triton_backend.written(plan, VARIANT, way, precision, slices)
    except Refused as error:
        return {"ran": "refused", "apart": [apart(plan, error.node, error.why)]}
    parts = [p for some in found.values() for k in some for p in (k.before, k.after) if p is not None and p.ops]
    if not parts:
        return {"ran": "whole"}
    reasons = {tuple(apart(plan, n, why)): None for p in parts for n, why in p.apart.items()}
    return {"ran": "torch beside", "apart": [*map(list, reasons)]}


def rows_of(group: str, count: int) -> Iterator[harness.Found]:
    for case in GROUPS[group](count):
        base = {"group": group, "learner": case.name}
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = df.derive(case.learner().float(), case.objective, case.rule, chunk=CHUNK, prove=False)
                plan = program.plan(case.dim, torch.float32, "auto")
                plan.step(VARIANT)
            except (ValueError, RuntimeError, TypeError) as error:
                yield base | {"underivable": f"{type(error).__name__}: {error}"[:160]}
                continue
            for way in WAYS:
                try:
                    yield base | {"way": way} | direction(plan, way)
                except Exception as error:  # a fault of ours, which the table shows
                    yield base | {"way": way, "ran": "fails", "why": f"{type(error).__name__}: {error}"[:200]}


def measure(options: argparse.Namespace) -> harness.Found:
    words = [x for x in options.only.split(",") if x] or list(GROUPS)
    kept = json.loads(options.output.read_text())["rows"] if options.only and options.output.exists() else []
    rows = [x for x in kept if x["group"] not in words]
    for group in words:
        rows += harness.alone(["--one", group, options.drawn], limit=7200)
    return {"rows": sorted(rows, key=lambda x: list(GROUPS).index(x["group"]) if "group" in x else -1)}


def report(found: harness.Found) -> str:
    rows = [x for x in found["rows"] if "way" in x]
    lines = []
    for group in [*dict.fromkeys(x["group"] for x in rows), "all"]:
        own = [x for x in rows if group in (x["group"], "all")]
        count = Counter(x["ran"] for x in own)
        share = f"{100 * count['whole'] / len(own):.1f} %"
        lines.append([group, len(own), count["whole"], share, count["torch beside"], count["refused"], count["fails"]])
    head = ["learners", "directions", "wholly in Triton", "share", "torch beside", "refused", "failed"]
    rest = [x for x in rows if x["ran"] != "whole"]
    ops = Counter(op for x in rest for op in {op for op, *_ in x["apart"]})
    counted = ", ".join(f"{op} {n}" for op, n in sorted(ops.items(), key=lambda x: (-x[1], x[0])))
    often = f"The ops that keep a direction from it, and of how many: {counted}.\n"
    spelt = []
    for x in rest:
        (op, why, _), *more = x["apart"]
        at = next((line for *_, line in x["apart"] if line), "")
        where = f" at `{at.replace('|', chr(92) + '|').strip()}`" if at else ""
        spelt.append([x["learner"], x["way"], x["ran"], f"`{op}`{where}: {why}{f'; {len(more)} more' if more else ''}"])
    kinds = harness.table(["learner", "direction", "what runs", "what keeps it from a kernel"], spelt)
    return "\n".join([harness.table(head, lines), often, kinds])


if __name__ == "__main__":
    if "--one" in sys.argv:
        group, count = sys.argv[sys.argv.index("--one") + 1 :][:2]
        for row in rows_of(group, int(count)):
            print(json.dumps(row), flush=True)
    else:
        harness.main(measure, report, harness.options(__doc__, drawn=80, only=""), "triton")

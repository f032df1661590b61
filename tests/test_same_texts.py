"""What is printed, generated and split for a learner is the same in every process: no order is an address's."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import dualform as df
from dualform.graphs.split import split
from dualform.kernels.backend import written
from dualform.learning.grid import Variant
from dualform.learning.plan import row_bytes

PARTS = ("once", "before", "loop", "after")
LEARNERS = {"SwiGLU": {}, "LowRank": {"rank": 2}}  # both had graphs that differed
VARIANTS = [Variant(4, fresh=True, dense=True, opens=False), Variant(4, fresh=False, dense=False, opens=False)]


def plan_of(name):
    torch.manual_seed(0)
    program = df.derive(df.learners[name](**LEARNERS[name])(8), rule=df.rules.SGD(lr=0.1), chunk=4, prove=False)
    return program, program.plan(program.derivation.K, program.derivation.dtype, "auto")


def parts_of(fission):
    return {f"{n} {x}": str(getattr(getattr(fission, n), x)) for n in PARTS for x in ("inputs", "outputs")} | {
        n: getattr(fission, n).graph.code for n in PARTS
    }


def texts():
    """Everything that is written for a few learners: printed programs, C++ both ways, graphs both ways."""
    found = {}
    for name in LEARNERS:
        program, plan = plan_of(name)
        found[name] = program.code
        for n, variant in enumerate(VARIANTS):
            for way in ("forward", "reverse"):
                fission = parts_of(plan.way(variant, way).fission)
                found |= {f"{name} {n} {way} {part}": text for part, text in fission.items()}
        for way in ("forward", "backward"):
            for slices in (False, True):
                found[f"{name} {way} {slices}"] = written(plan, VARIANTS[0], way, slices=slices).text
    return found


def test_texts_are_the_same_in_every_process():
    code = "import json, test_same_texts as here; print(json.dumps(here.texts()))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environments = [os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed} for seed in ("0", "1")]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for env in environments]
    first, second = (json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in processes)
    assert {name for name in first if first[name] != second[name]} == set()


def test_copies_of_a_graph_are_split_alike():
    """A copy's nodes lie elsewhere in memory, so that a set of them has another order."""
    _, plan = plan_of("LowRank")
    step, inputs = plan.step(VARIANTS[0]), plan.inputs(VARIANTS[0])
    carried = [i for i, x in enumerate(inputs) if x.part in ("th", "R")]
    fixed = [i for i, x in enumerate(inputs) if x.over != "block"]
    keep, seen = [], set()
    for _ in range(20):
        graph = copy.deepcopy(step.plain)
        keep.append(graph)  # so that no two lie at the same addresses
        fission = split(graph, carried, range(1, step.num_outputs), fixed, row_bytes)
        seen.add(json.dumps(parts_of(fission)))
    assert len(seen) == 1

"""One description of what generated functions do, and each language in files of its own: what a second printer builds on.

A walker that runs the graphs by torch, on nothing but that description, gives eager's numbers: outputs, states, all gradients.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from test_kernels import aims, learned
from test_laws import names, of

from dualform import testing as laws
from dualform.kernels import backend, cpp_text, ops
from dualform.kernels.targets import EACH, ROW, Target, in_turn, place_of

KERNELS = Path(backend.__file__).parent


class Walk:
    """A direction, run graph by graph and row by row: what a printer would print is done."""

    def __init__(self, d, sliced):
        functions = d.sliced() if sliced else d.functions
        first = 0 if d.advance is None else 1
        self.d, self.advance, self.step = d, functions[:first], functions[first:]
        self.summands = {in_turn(Target("added", x)).what: x for x in d.summed}

    def __call__(self, tensors, rows, count, G, phase):
        self.argument = cache(lambda role, what: tensors[role](what))
        for self.row in torch.cartesian_prod(*map(torch.arange, rows)).tolist():
            self.sums = dict.fromkeys(self.d.summed, 0.0)
            (self.backward if self.advance else self.forward)(count, G, phase)
            for x, total in self.sums.items():
                self.give("gradient", x, ROW, 0, total)

    def take(self, role, what, n=0):
        return self.argument(role, what)[(n, *self.row)]

    def give(self, role, what, where, n, value):
        self.argument(role, what)[(n if where == EACH else 0, *self.row)] = value

    def add(self, x, value):
        self.sums[x] = self.sums[x] + value

    def run(self, functions, n, carried, stays):
        """Run a mini-batch; return what is carried on."""
        after = dict(carried)
        for f in functions:
            values = []
            for x in f.sources:
                place = place_of(x)
                if place in ("scratch", "fixed"):
                    values.append(self.take("input", x, n if place == "scratch" else 0))
                else:
                    values.append(stays[x.part, x.name] if place in ("kept", "passed") else carried[x])
            for target, value in zip(f.targets, f.graph(*values), strict=True):
                if target.kind == "given":
                    self.give(*target.what, n, value)
                elif target.is_carried:
                    after[target.what] = value
                elif target.kind == "added":
                    self.add(target.what, value)
                elif target.what in self.summands:
                    self.add(self.summands[target.what], value)
                else:
                    stays[target.kind, target.what] = value
        return after

    def forward(self, count, G, phase):
        state = {x: self.take("before", k) for k, x in enumerate(self.d.held("state"))}
        for n in range(count):
            for k, x in enumerate(self.d.held("state") if G and (n + phase) % G == 0 else ()):
                self.give("kept", k, EACH, (n + phase) // G, state[x])
            state = self.run(self.step, n, state, {})
        over = [t.what for t in self.d.step.targets if t.kind == "over"]
        for k, x in enumerate(self.d.held("state")):
            if x in over:
                self.give("after", k, ROW, 0, state[x])

    def backward(self, count, G, phase):
        turned = {x: self.take("cotangent", k) for k, x in enumerate(self.d.held("cotangent"))}
        for group in reversed(range(-(-count // G))):
            state, begun = {x: self.take("kept", k, group) for k, x in enumerate(self.d.held("state"))}, []
            for n in range(group * G, min(group * G + G, count)):
                stays = {}
                begun.append((n, state, stays))
                state = self.run(self.advance, n, state, stays)
            for n, state, stays in reversed(begun):
                turned = self.run(self.step, n, turned | state, stays)
        for k, x in enumerate(t.what for t in self.d.step.targets if t.kind == "over"):
            self.give("turned", k, ROW, 0, turned[x])


@pytest.fixture(params=[False, True], ids=["whole", "sliced"])
def walked(monkeypatch, request):
    """The backend's calls, with walks for compiled code."""
    walks = {}

    def made(plan, call, variant, direction, full=None, slices=False):
        key = (plan.derivation.structure, variant, direction, kinds := backend._kinds(plan, call))
        if key not in walks:
            walks[key] = Walk(backend.described(plan, variant, direction, full, kinds), request.param)
        return backend.Made(walks[key], ())

    def call(run, made, tensors, *rest):
        made.native(tensors, (run.B, run.H), *rest)

    monkeypatch.setattr(backend, "made", made)
    monkeypatch.setattr(backend._Sequence, "_call", staticmethod(call))


@pytest.mark.parametrize("n", range(len(learned)) if os.environ.get("DUALFORM_PAIRS") == "all" else (1, 5))
def test_the_description_is_all_that_a_walker_needs(n, walked):
    """Several kept states, several mini-batches of each, a carried state; learners, rules and objectives in turn."""
    program = of(learned[n], aims[n % len(aims)], names[(n + 2) % len(names)], 2)
    laws.check_backend(program, "cpp", time=7, carried=True, resets=n == 5, batch=1, seed=n)


@pytest.mark.parametrize("forgets", ["sums", "states"])
def test_a_walker_that_forgets_is_found(forgets, walked, monkeypatch):
    own = Walk.give
    if forgets == "sums":
        monkeypatch.setattr(Walk, "add", lambda self, x, value: None)
    else:
        monkeypatch.setattr(Walk, "give", lambda self, role, *rest: own(self, role, *rest) if role != "after" else None)
    with pytest.raises((laws.LawBroken, ValueError)):
        laws.check_backend(of(learned[6], aims[0], "averaged", 2), "cpp", time=5, batch=1)


# -- one language, one place -------------------------------------------------------------------------------------------

CPP = re.compile(
    r"\b(for|while|if) ?\(|\bT\(|std::|static |const Arg|\b(float|double|long|int\d*_t) ?[*&]* ?\w+ ?[=;(]|\w->|[\w)\]}];$|; ?}|\bg\["
)


def cpp_in(path):
    """List the string literals of a file that hold C++; docstrings are prose."""
    tree = ast.parse(path.read_text())
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    texts = [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in prose
    ]
    return [f"{path.name}:{n.lineno}: {n.value!r}" for n in texts if CPP.search(n.value)]


def test_a_language_stands_in_its_own_files():
    found = {path.name: cpp_in(path) for path in sorted(KERNELS.glob("*.py"))}
    assert [line for name, lines in found.items() if not name.startswith("cpp_") for line in lines] == []
    assert {name for name, lines in found.items() if lines} == {"cpp_rows.py", "cpp_slices.py", "cpp_text.py"}
    assert {path.name for path in KERNELS.glob("*.h")} == {"cpp_slices.h", "cpp_text.h"}


def test_a_language_elsewhere_is_found(tmp_path):
    for text in (
        'x = "for (int i = 0;"',
        'x = f"T {x} = exp_({y});"',
        'x = "static inline"',
        'x = f"g[{n}].s0"',
        'x = "float x = 0"',
    ):
        (tmp_path / "a.py").write_text(f'"""for (prose;"""\n{text}')
        assert len(cpp_in(tmp_path / "a.py")) >= 1, text


def test_what_describes_knows_no_language_and_no_buffer():
    def imported(path):
        for module, listed in re.findall(
            r"^from dualform\.kernels(?:\.(\w+))? import (.*)$", path.read_text(), re.MULTILINE
        ):
            yield from [module] if module else re.findall(r"\w+", listed)

    graph = {path.stem: {*imported(path)} for path in KERNELS.glob("*.py")}

    def reached(name):
        return {name}.union(*(reached(x) for x in graph.get(name, ())))

    speaking = {name for name in graph if any(x.startswith("cpp_") for x in reached(name))}
    assert {name for name in speaking if not name.startswith("cpp_")} == {"backend", "triton_backend", "__init__"}
    assert reached("targets") == {"targets", "lowering", "ops", "picking", "sharing"}


def test_a_dialect_spells_what_there_is():
    """Every reduction, and no entry that no row has; that none is missing is `test_every_row`."""
    reductions, source = {*"sum prod amax amin".split()}, (KERNELS / "ops.py").read_text()
    assert reductions == {*cpp_text.CPP.starts} == {*cpp_text.CPP.updates}
    assert {*ops.SLOW} <= {*cpp_text.CPP.entries}
    unknown = [x for x in cpp_text.CPP.entries if not re.search(rf"(\b|_){x.removeprefix('bits_')}\b", source)]
    assert unknown == []

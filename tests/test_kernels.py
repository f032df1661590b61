"""Generated C++ equals eager: outputs, state and all outer gradients, for learners that no file of kernels/ knows."""

import pytest
import torch
from test_laws import built_in, names, of, own, rules, wobble

import dualform as df
from dualform import testing as laws
from dualform.kernels import launch


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    """Compile fast rather than fast code; scratch memory is NaN."""
    monkeypatch.setattr(launch, "OPTIMISE", "-O1")
    monkeypatch.setattr(launch, "poison", True)


@pytest.mark.parametrize("kind", own, ids=lambda k: k.__name__)
def test_learners_of_ones_own(kind):
    n = own.index(kind)
    program = df.derive(kind(), df.objectives.Squared(), rules[names[n % len(names)]], chunk=(3, 4, 1, 3, 7)[n % 5])
    laws.check_backend(program, "cpp", time=7, carried=True, ragged=True, resets=True, seed=n)


@pytest.mark.parametrize("n", range(len(built_in)), ids=lambda n: repr(built_in[n]))
def test_built_in_learners(n):
    laws.check_backend(of(built_in[n], df.objectives.Squared(), names[n % len(names)], 4), "cpp", time=9, seed=n)


@pytest.mark.parametrize("rule", rules)
def test_rules(rule):
    program = of(built_in[1], df.objectives.Squared(), rule, 3)
    laws.check_backend(program, "cpp", time=8, carried=True, ragged=True, resets=True)


@pytest.mark.parametrize(
    ("objective", "rule"),
    [(df.objectives.Squared("v-k"), "titans"), (df.objectives.DotProduct(), "momentum"), (wobble, "averaged")],
    ids=["v-k", "dot", "own"],
)
def test_objectives(objective, rule):
    laws.check_backend(of(built_in[1], objective, rule, 3), "cpp", time=6)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads, monkeypatch):
    monkeypatch.setattr(launch, "FLOPS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        laws.check_backend(of(built_in[6], df.objectives.Squared(), "averaged", 3), "cpp", time=6, batch=3)
    finally:
        torch.set_num_threads(before)

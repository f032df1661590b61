"""The first launches of generated Triton run in a process of their own, which a fault ends instead of the user's."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_laws import built_in, rules
from test_triton import shifted

import dualform as df
from dualform.cli.cache import cache
from dualform.kernels import triton_backend, triton_choice, triton_launch, triton_trial
from dualform.learning.backends import BackendError, Miscompiled, chosen_in_words
from dualform.ops.table import ENTRIES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def proving(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALFORM_PROVE", "1")

    def run(backend="triton"):
        torch.manual_seed(0)
        program = df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=True)
        plan = program.plan(4, torch.float32, "auto")
        monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))  # of kernels alone
        plan.natives.made.clear()
        plan.natives.checked.clear()
        x = [torch.randn(3, 7, 1, 4)[:, :5].requires_grad_() for _ in range(3)]
        o, _ = program(*x, backend=backend)
        return [o, *torch.autograd.grad(o.square().sum(), x)]

    return run


def test_first_launches_run_apart_and_are_remembered(proving, monkeypatch):
    """Whatever the strides; forward as it keeps states, states computed again, and reverse."""
    names, tried = [], triton_trial.tried
    monkeypatch.setattr(triton_trial, "tried", lambda *words: names.append(words[1]) or tried(*words))
    for a, b in zip(proving(), proving("eager"), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert set(names) == {"forward", "advance", "reverse"}
    count = len(names)
    proving()
    assert len(names) == count  # another process would ask the disk, too


def test_a_launch_that_ends_its_process_is_refused(proving, monkeypatch):
    """By name, here and at the next call, which tries nothing; once that is forgotten, in a new process."""
    tanh, sent, asked = ENTRIES["rsqrt"], [], triton_trial._Other.asked
    monkeypatch.setattr(triton_trial._Other, "asked", lambda *words: sent.append(words) or asked(*words))
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(tanh, triton="__import__('os')._exit(3)"))
    says = r"triton: forward ended its process with 3.*a process of its own"
    for more in ("", ".*found so before.*`dualform cache clear`"):
        with pytest.raises(BackendError, match=says + more):
            proving()
    assert len(sent) == 1
    monkeypatch.setitem(ENTRIES, "rsqrt", tanh)
    cache("clear")
    assert proving()[0].isfinite().all()


def test_no_process_to_try_in_is_no_fault_of_the_code(proving, monkeypatch, tmp_path):
    """Refused, and not remembered: one that does not start, one that cannot import."""
    for python, says in (("no/such/python", "does not answer"), ("/bin/false", "ended its process with 1")):
        triton_trial._other.ended()
        monkeypatch.setattr(sys, "executable", python)
        with pytest.raises(
            BackendError, match=f"a process to try launches in {says}.*expected one that starts"
        ) as error:
            proving()
        assert not isinstance(error.value, Miscompiled)
        assert not [*tmp_path.glob("proofs/*")]


def test_an_answer_that_nobody_waits_for_is_not_taken_for_the_next(monkeypatch):
    other = triton_trial._Other()
    first = other.started()

    def interrupted(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(triton_trial.select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.asked({}, 60)
    assert other.process is None
    assert first.wait() == -9


def test_a_launch_that_takes_too_long_is_refused(proving, monkeypatch):
    monkeypatch.setattr(triton_trial, "LIMIT", 0.0)
    with pytest.raises(BackendError, match="triton: forward took more than 0 s"):
        proving()


def test_what_the_other_process_refuses_is_said_as_it_is(proving, monkeypatch):
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(ENTRIES["rsqrt"], triton="tl.no_such_function({0})"))
    with pytest.raises(BackendError, match=r"triton: forward does not compile .*no_such_function"):
        proving()


def lies(wrong, seen):
    """Run launches here, and spoil what some of them write."""

    def run(text, name, places, grid, numbers, how):
        seen.append(how)
        tensors = [x for x in places if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        triton_launch.first_run(text, name, places, grid, numbers, how)
        for x, y in zip(tensors, before, strict=True):
            if wrong(how) and not torch.equal(x.nan_to_num(), y.nan_to_num()):
                x.mul_(1.5)

    return run


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr(triton_backend._Rows, "suits", lambda self, plan, call: True)
    natives = plan_of().natives  # what another test's learner, the same one, came to
    natives.refused = ""
    natives.instead.clear()
    natives.faults.clear()


def plan_of(program=None):
    program = program or df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=True)
    return program.plan(4, torch.float32, "auto")


def test_auto_goes_down_its_short_list(proving, chosen, monkeypatch):
    """To the first way that is right, which it keeps, remembers by card, driver and Triton, and names; once aloud."""
    seen = []
    monkeypatch.setattr(triton_trial, "tried", lies(lambda how: how.stages > 1, seen))
    right = proving("eager")
    with pytest.warns(UserWarning, match=r"its code and eager differ in .*try backend='triton \{\"stages\": 1\}'"):
        found = proving("auto")
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    plan = plan_of()
    assert plan.natives.instead == {"triton": 'triton {"stages": 1}'}
    assert not plan.natives.refused
    assert "not triton, because triton: its code and eager differ in" in chosen_in_words(plan)
    count, tries = len(seen), {how.stages for how in seen}
    assert tries == {3, 1} or tries == {2, 1}
    proving("auto")  # asks the disk
    assert len(seen) == count
    plan.natives.instead.clear()  # as in another process
    with pytest.warns(UserWarning, match=r"differ in .*found so before.*try backend='triton \{\"stages\": 1\}'"):
        proving("auto")
    assert len(seen) == count
    monkeypatch.setattr(triton_launch, "place", lambda device: ("another card",))
    proving("auto")
    assert len(seen) > count
    plan.natives.instead.clear()


def test_where_nothing_on_the_list_is_right_eager_runs(proving, chosen, monkeypatch):
    seen = []
    monkeypatch.setattr(triton_trial, "tried", lies(lambda how: True, seen))
    with pytest.warns(UserWarning, match="its code and eager differ in") as said:
        found = proving("auto")
    assert len([x for x in said if "try backend='triton" in str(x.message)]) == len(triton_choice.SHORT_LIST) - 1
    assert "run on backend='eager'" in str(said[-1].message)
    assert {how.warps for how in seen} > {16}
    natives = plan_of().natives
    assert "its code and eager differ in" in natives.refused
    natives.refused = ""
    natives.instead.clear()
    for a, b in zip(found, proving("eager"), strict=True):
        assert torch.equal(a, b)


def test_what_no_options_would_change_is_not_tried_again(proving, chosen, monkeypatch):
    """An op without a text; a call that finds no memory."""

    def full(*words):
        raise triton_launch.short_of_memory(words[1], "out of memory")

    monkeypatch.setattr(triton_trial, "tried", full)
    with pytest.warns(UserWarning, match="finds no memory") as said:
        proving("auto")
    assert not [x for x in said if "try backend=" in str(x.message)]
    natives = plan_of().natives
    assert not natives.instead
    natives.refused = ""


def test_a_chosen_backend_is_what_was_chosen(proving, monkeypatch):
    """What a user asks for by name is refused, not run otherwise."""
    monkeypatch.setattr(triton_trial, "tried", lies(lambda how: how.stages > 1, []))
    with pytest.raises(Miscompiled, match="its code and eager differ in"):
        proving("triton")
    proving(("triton", {"stages": 1}))


def test_a_process_that_waited_long_enough_is_started_again():
    other, pipe = triton_trial._Other(), subprocess.PIPE
    other.started()
    other.ended()
    other.process = subprocess.Popen([sys.executable, "-c", ""], stdin=pipe, stdout=pipe)
    other.process.wait()
    what = {"text": "", "name": "x", "places": [], "grid": (1, 1), "numbers": (), "how": (4, 2)}
    assert "KeyError" in other.asked(what, 60)["error"]
    assert other.process is None

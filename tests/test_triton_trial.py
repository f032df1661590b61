"""The first launches of generated Triton run in a process of their own, which a fault ends instead of the user's."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_laws import built_in, rules
from test_triton import shifted

import dualform as df
from dualform.kernels import triton_trial
from dualform.learning.backends import BackendError
from dualform.ops.table import ENTRIES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def proving(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))

    def run(backend="triton"):
        torch.manual_seed(0)
        program = df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=True)
        plan = program.plan(4, torch.float32, "auto")
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
    """By name, here and at the next call; what follows goes on in a new process."""
    tanh = ENTRIES["rsqrt"]
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(tanh, triton="__import__('os')._exit(3)"))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"triton: forward ended its process with 3.*a process of its own"):
            proving()
    monkeypatch.setitem(ENTRIES, "rsqrt", tanh)
    assert proving()[0].isfinite().all()


def test_a_launch_that_takes_too_long_is_refused(proving, monkeypatch):
    monkeypatch.setattr(triton_trial, "LIMIT", 0.0)
    with pytest.raises(BackendError, match="triton: forward took more than 0 s"):
        proving()


def test_what_the_other_process_refuses_is_said_as_it_is(proving, monkeypatch):
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(ENTRIES["rsqrt"], triton="tl.no_such_function({0})"))
    with pytest.raises(BackendError, match=r"triton: forward does not compile .*no_such_function"):
        proving()


def test_a_process_that_waited_long_enough_is_started_again():
    other, pipe = triton_trial._Other(), subprocess.PIPE
    other.started()
    other.ended()
    other.process = subprocess.Popen([sys.executable, "-c", ""], stdin=pipe, stdout=pipe)
    other.process.wait()
    what = {"text": "", "name": "x", "places": [], "grid": (1, 1), "numbers": (), "how": (4, 2)}
    assert "KeyError" in other.asked(what, 60)["error"]
    assert other.process is None

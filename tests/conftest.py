"""What all tests share: the hypothesis profile (HYPOTHESIS_PROFILE=long for a night) and one thread per worker."""

import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

from dualform.learning import program

os.environ.setdefault("DUALFORM_PROVE", "0")  # the laws are the proof here; tests/test_proof.py switches it on
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, op by op; Triton reads it where it is imported

BEGAN = pytest.StashKey[float]()
hypothesis.settings.register_profile("house", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Triton's interpreter asks at each integer product whether it overflows, and patches itself at each call of a
    function of ours: two fifths of its time. What is right here has no such product, and it is patched already."""
    if any(Path(item.path).stem.startswith("test_triton") for item in session.items):
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def cpu():
    """Seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


def pytest_runtest_setup(item):
    item.stash[BEGAN] = cpu()


def pytest_runtest_teardown(item):
    """Let go of programs that no test uses any more, each of some ten thousand objects."""
    now = cpu()
    item.user_properties.append(("CPU", now - item.stash.get(BEGAN, now)))  # a skipped one never began
    if len(program._programs) > 12:
        program._programs.clear()
        program._structures.clear()


def pytest_terminal_summary(terminalreporter):
    """Say how many tests were skipped, also when none was (`-ra` lists their reasons), and which files cost most."""
    terminalreporter.write_line(f"skipped: {len(terminalreporter.stats.get('skipped', []))}")
    found, seconds = {}, Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, count in getattr(report, "user_properties", []):
                if getattr(report, "when", "") == "teardown" and name == "CPU":
                    seconds[Path(report.nodeid.partition("::")[0]).stem] += count
                if getattr(report, "when", "") == "call" and name.startswith("learners drawn: "):
                    found[name.removeprefix("learners drawn: ")] = count
    most = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.most_common(12))
    terminalreporter.write_line(f"CPU seconds: {seconds.total():.0f}; {most}")
    if found:
        rate = found["refused"] / max(1, found["examples"])
        terminalreporter.write_line(
            f"learners drawn: {found['examples']} ({found['dual']} in dual form too, {found['diverged']} diverge by "
            f"definition and are not compared); refused: {found['refused']} ({rate:.0%})"
        )

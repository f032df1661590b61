"""`--seen`: what tests that passed launched becomes the record of what was seen right on this card."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from launched import launched

from dualform.kernels import triton_seen

_seen, _passed = set(), pytest.StashKey[bool]()


def pytest_addoption(parser):
    parser.addoption("--seen", action="store_true", help="record which kernels ran right on this card")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture(autouse=True)
def _noted(request):
    if not request.config.getoption("--seen"):
        yield
        return
    with launched() as found:
        yield
    _seen.update(found if request.node.stash.get(_passed, False) else ())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _seen.update(getattr(node, "workeroutput", {}).get("seen", ()))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: its controller writes
        session.config.workeroutput["seen"] = sorted(_seen)
    elif session.config.getoption("--seen") and _seen:
        triton_seen.write(torch.device("cuda", torch.cuda.current_device()), _seen)

"""Two processes train as one does: the same rows, the same losses, and each goes on from the other's checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]


def test_losses_are_those_of_one_process_whoever_began(tmp_path):
    pytest.importorskip("accelerate")
    runs = ["one GPU", "two, FSDP2", "two, DDP, from one"]
    words = [sys.executable, str(HOME / "benchmarks/two_gpus.py"), "--device", "cpu", "--preset", "tiny-ttt-linear"]
    words += [
        "--steps",
        "4",
        "--rows",
        "4",
        "--length",
        "40",
        "--output",
        str(tmp_path / "found.json"),
        "--runs",
        *runs,
    ]
    said = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert said.returncode == 0, said.stderr[-2000:]
    found = {row["run"]: row.get("losses", row) for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    one = found["one GPU"]
    assert list(found) == runs
    assert len(one) == 4, one
    assert abs(one["1"] - one["4"]) > 1e-2, one  # it learns
    for name in runs[1:]:
        assert found[name].keys() == one.keys()
        assert all(abs(found[name][step] - loss) < 1e-5 for step, loss in one.items()), (name, found)

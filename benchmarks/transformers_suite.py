"""Run transformers' own common tests of causal language models against ours.

    python benchmarks/transformers_suite.py --source PATH [--select WORD]

PATH is a checkout of transformers, of the installed release or near it (its `tests` and `utils` are imported, nothing of it
is copied). Needs what those tests import: peft, parameterized, httpx. Writes
benchmarks/results/transformers_suite.json and .md. Two models are tested: test-time layers alone, with every option on,
and a hybrid of test-time, full and sliding-window attention layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.exporters.base import ExportedModel
from transformers.models.auto import modeling_auto

from dualform.models import DualformConfig, DualformForCausalLM, DualformModel

RESULT = Path(__file__).parent / "results" / "transformers_suite.json"
# What does not apply to these models, by the test's name, and why. Whatever fails beside these is a fault of ours.
not_applicable = {
    "test_attention_outputs": "expects attention weights of every layer; here only attention layers have any",
    **dict.fromkeys(
        ("test_torch_export_generate_dynamic", "test_torch_export_generate_static"),
        "prefill is exported; for a decoding step the exporter writes into nested attributes, and a state is frozen",
    ),
    "test_num_layers_is_small": "the hybrid needs a layer of each of three kinds; the test wants two layers",
}


def suite(name: str, **fields: Any) -> type:
    """Make the test class of one model from transformers' mixins."""
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_configuration_common import ConfigTester
    from tests.test_modeling_common import ModelTesterMixin, ids_tensor
    from tests.test_training_mixin import TrainingTesterMixin

    # The mixins tell bodies from heads by the tables of the models that transformers ships.
    modeling_auto.MODEL_MAPPING_NAMES["dualform"] = "DualformModel"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dualform"] = "DualformForCausalLM"
    if not hasattr(ExportedModel, "module"):  # what an export was before it was a model: trees before 5.20 ask for it
        ExportedModel.module = lambda self: self.program.module()
    kinds = fields.get("layer_types", ["test_time"])

    class Tester:
        """Sizes and inputs, under the names that the mixins look for."""

        base_model_class, causal_lm_class, config_class = DualformModel, DualformForCausalLM, DualformConfig
        batch_size, seq_length, vocab_size, is_training = 3, 7, 99, True
        hidden_size, intermediate_size, num_attention_heads = 32, 32, 2
        num_hidden_layers = fields.get("num_hidden_layers", 2)
        pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

        def get_config(self) -> DualformConfig:
            names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
            names += ["pad_token_id", "bos_token_id", "eos_token_id"]
            given = {n: getattr(self, n) for n in names} | {"chunk": 4, "tie_word_embeddings": False}
            return DualformConfig(**given | fields)

        def prepare_config_and_inputs_for_common(self) -> tuple[DualformConfig, dict[str, torch.Tensor]]:
            ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}

    class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
        all_model_classes = (DualformModel, DualformForCausalLM)
        has_attentions = kinds != ["test_time"]

        def setUp(self) -> None:
            self.model_tester = Tester()
            self.config_tester = ConfigTester(self, config_class=DualformConfig)

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

        def _check_past_key_values_for_generate(
            self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
        ) -> None:
            for layer, kind in zip(past_key_values.layers, config.layer_types, strict=True):
                assert layer.get_seq_length() == seq_length
                if kind == "test_time":
                    assert layer.state.layer.position.shape == (batch_size,)
                else:
                    heads, width = config.num_attention_heads, config.head_dim
                    assert layer.keys.shape == layer.values.shape == (batch_size, heads, seq_length, width)

    Suite.__name__ = Suite.__qualname__ = name
    return Suite


if os.environ.get("TRANSFORMERS_SUITE"):
    # Only under pytest, which collects this file below.
    TestPure = suite("TestPure", preset="ttt-linear-125m-mamba")
    TestHybrid = suite(
        "TestHybrid",
        preset="ttt-mlp-125m",
        num_hidden_layers=3,
        layer_types=["test_time", "full_attention", "sliding_attention"],
        sliding_window=64,  # wider than the inputs, as the mixins expect of every cache; tests/ has narrow ones
    )


class Recorder:
    """Keep every test's outcome, and why it was skipped or failed."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[1]
        if report.when != "call" and report.passed:
            return
        if self.found.get(name, {}).get("outcome") == "failed":
            return  # a part of the test has failed, whatever comes after
        reason = ""
        if report.skipped:
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(crash.message if crash else report.longrepr).splitlines()[0]
        self.found[name] = {
            "outcome": report.outcome,
            "reason": re.sub(r"(?:/[\w.+-]+){2,}/", "", reason.removeprefix("Skipped: "))[:200],
        }


def run(source: Path, select: str) -> dict[str, dict[str, str]]:
    """Run the mixins under pytest in this process; mark what does not apply."""
    sys.path.insert(0, str(source))
    os.environ |= {"TRANSFORMERS_SUITE": "1", "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}
    recorder = Recorder()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(Path(__file__).parent)]
    options += ["-k", select] if select else []
    pytest.main([*options, "-W", "ignore", "--show-capture=no", "--log-level=WARNING", __file__], plugins=[recorder])
    for name, entry in recorder.found.items():
        why = not_applicable.get(name.split("::")[-1])
        if entry["outcome"] == "failed" and why is not None:
            entry |= {"outcome": "not applicable", "reason": why}
    return recorder.found


def table(found: dict[str, dict[str, str]]) -> str:
    """One row per model, then what failed or does not apply, each with its reason."""
    outcomes = ("passed", "failed", "not applicable", "skipped")
    lines = ["| model | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for kind in sorted({name.split("::")[0] for name in found}):
        count = Counter(entry["outcome"] for name, entry in found.items() if name.startswith(kind + "::"))
        lines.append(f"| {kind.removeprefix('Test').lower()} | " + " | ".join(str(count[o]) for o in outcomes) + " |")
    listed: dict[tuple[str, str], set[str]] = {}
    for name, entry in found.items():
        if entry["outcome"] in ("failed", "not applicable"):
            listed.setdefault((name.split("::")[1], entry["reason"]), set()).add(name.split("::")[0][4:].lower())
    if listed:
        lines += ["", "| test | model | why it is not passed |", "|---|---|---|"]
        lines += [f"| `{test}` | {', '.join(sorted(kinds))} | {why} |" for (test, why), kinds in sorted(listed.items())]
    skips = Counter(entry["reason"] for entry in found.values() if entry["outcome"] == "skipped")
    if skips:
        lines += ["", "| skipped by the suite itself, because | tests |", "|---|---|"]
        lines += [f"| {reason.replace('|', '/')} | {n} |" for reason, n in skips.most_common()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--select", default="", help="pytest's -k; nothing is written then")
    parser.add_argument("--label", default="", help="which checkout it is, for the record")
    options = parser.parse_args()
    start = time.perf_counter()
    found = run(options.source, options.select)
    if not found:
        sys.exit("transformers_suite: no test ran; the results stay as they were. Read above what is missing.")
    seconds = time.perf_counter() - start
    print(table(found))
    if options.select:
        return
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here, check=False)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mixins": options.label,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "seconds": round(seconds),
    }
    RESULT.write_text(json.dumps(about | {"tests": found}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(table(found))
    if any(entry["outcome"] == "failed" for entry in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

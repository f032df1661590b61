"""Run transformers' own common tests of causal language models against ours.

    python benchmarks/transformers_suite.py --source PATH [--select WORD]

PATH is a checkout of transformers, of the installed release or near it (its `tests` and `utils` are imported, nothing
of it is copied). Needs what those tests import: peft, parameterized, httpx. Writes
benchmarks/results/transformers_suite.json and .md. Two models are tested: test-time layers alone, with every option on,
and a hybrid of test-time, full and sliding-window attention layers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from transformers.exporters.base import ExportedModel
from transformers.models.auto import modeling_auto

from dualform.models import DualformConfig, DualformForCausalLM, DualformModel

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


def kept(found: dict[str, dict[str, str]]) -> harness.Found:
    """Count the tests of each model by outcome, and keep those that did not pass:
    one entry for all of an outcome and a reason."""
    counts: dict[str, Counter[str]] = {}
    others: dict[tuple[str, str], list[str]] = {}
    for name, entry in found.items():
        counts.setdefault(name.split("::")[0], Counter())[entry["outcome"]] += 1
        if entry["outcome"] != "passed":
            others.setdefault((entry["outcome"], entry["reason"]), []).append(name)
    listed = [{"outcome": outcome, "reason": reason, "tests": tests} for (outcome, reason), tests in others.items()]
    return {"counts": {kind: dict(count) for kind, count in counts.items()}, "not passed": listed}


def report(found: harness.Found) -> str:
    """One row per model, then what failed or does not apply, each with its reason."""
    outcomes = ("passed", "failed", "not applicable", "skipped")
    counts = [
        [kind[4:].lower(), *(count.get(o, 0) for o in outcomes)] for kind, count in sorted(found["counts"].items())
    ]
    parts, listed, skips = [harness.table(["model", *outcomes], counts)], {}, Counter()
    for entry in found["not passed"]:
        for name in entry["tests"]:
            kind, test = name.split("::")
            if entry["outcome"] == "skipped":
                skips[entry["reason"].replace("|", "/")] += 1
            else:
                listed.setdefault((test, entry["reason"]), set()).add(kind[4:].lower())
    if listed:
        rows = [[f"`{test}`", ", ".join(sorted(kinds)), why] for (test, why), kinds in sorted(listed.items())]
        parts.append(harness.table(["test", "model", "why it is not passed"], rows))
    if skips:
        parts.append(harness.table(["skipped by the suite itself, because", "tests"], skips.most_common()))
    return "\n".join(parts)


def measure(options: argparse.Namespace) -> harness.Found:
    if options.source is None:
        sys.exit("transformers_suite: --source is missing; expected a checkout of transformers.")
    found: harness.Found = {}
    spent = harness.seconds(lambda: found.update(run(options.source, options.select)))
    if not found:
        sys.exit("transformers_suite: no test ran; the results stay as they were. Read above what is missing.")
    if options.select:
        print(report(kept(found)))
        sys.exit()
    return {"mixins": options.label, "seconds": round(spent)} | kept(found)


if __name__ == "__main__":
    # select: pytest's -k, nothing is written then; label: which checkout it is, for the record
    given = harness.options(__doc__, source=Path, select="", label="")
    found = harness.main(measure, report, given, "transformers")
    sys.exit(any(count.get("failed") for count in found["counts"].values()))

"""A training step of a small language model: tokens a second with layers that learn as they read, and with attention.

    OMP_NUM_THREADS=2 python benchmarks/small_lm.py [--length 1024] [--batch 1] [--rounds 3] [--output FILE]

6 layers, width 384, 6 heads, bytes as tokens; forward, backward and an AdamW step. Sides alternate, round by round; the
first round, which compiles, is not counted. "cpp" and "eager" are the same weights on two backends.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial

import harness

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch

from dualform.learning.layer import TestTimeTraining
from dualform.models import DualformConfig, DualformForCausalLM

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024}
SIDES = [
    ("TTT-Linear", "tiny-ttt-linear", "cpp"), ("TTT-Linear", "tiny-ttt-linear", "eager"),
    ("TTT-MLP", "tiny-ttt-mlp", "cpp"),
    ("TTT-MLP", "tiny-ttt-mlp", "eager"), ("attention", "tiny-attention", "-"),
]  # fmt: skip


def step(model: DualformForCausalLM, optimiser: torch.optim.Optimizer, backend: str, ids: torch.Tensor) -> None:
    for layer in model.modules():
        if isinstance(layer, TestTimeTraining):
            layer.backend = backend
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def measure(options: argparse.Namespace) -> harness.Found:
    models = {}
    for preset in dict.fromkeys(preset for _, preset, _ in SIDES):
        torch.manual_seed(0)
        model = DualformForCausalLM(DualformConfig(preset=preset, **SIZES))
        models[preset] = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 259, (options.batch, options.length))
    steps = {(name, way): partial(step, *models[preset], way, ids) for name, preset, way in SIDES}
    found = harness.alternating(steps, options.rounds)
    seconds = {key: statistics.median(times) for key, times in found.items()}
    parameters = {name: sum(p.numel() for p in models[preset][0].parameters()) for name, preset, _ in SIDES}
    rows = [
        {
            "model": name, "backend": backend, "parameters": parameters[name], "s per step": t,
            "tokens per s": ids.numel() / t, "of attention's": seconds["attention", "-"] / t,
        }
        for (name, backend), t in seconds.items()
    ]  # fmt: skip
    settings = {**SIZES, "batch": options.batch, "length": options.length, "chunk": 16, "rounds": options.rounds}
    samples = [{"model": name, "backend": way, "s": harness.summary(x)} for (name, way), x in found.items()]
    return {"settings": settings, "rows": rows, "samples": samples}


def report(found: harness.Found) -> str:
    return harness.rows_table(found["rows"], digits=2)


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, length=1024, batch=1, rounds=3))

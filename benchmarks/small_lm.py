"""A training step of a small language model: tokens a second with layers that learn while they read, and with attention.

    OMP_NUM_THREADS=2 python benchmarks/small_lm.py [--length 1024] [--batch 1] [--rounds 3] [--output FILE]

6 layers, width 384, 6 heads, bytes as tokens; forward, backward and an AdamW step. Sides alternate, round by round; the first
round, which compiles, is not counted. "cpp" and "eager" are the same weights on two backends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make everything slower on a shared machine

import torch
from record import write

from dualform.learning.layer import TestTimeTraining
from dualform.models import DualformConfig, DualformForCausalLM

RESULT = Path(__file__).parent / "results" / "small_lm.json"
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024}
SIDES = [
    ("TTT-Linear", "tiny-ttt-linear", "cpp"), ("TTT-Linear", "tiny-ttt-linear", "eager"), ("TTT-MLP", "tiny-ttt-mlp", "cpp"),
    ("TTT-MLP", "tiny-ttt-mlp", "eager"), ("attention", "tiny-attention", "-"),
]  # fmt: skip


def step(model: DualformForCausalLM, optimiser: torch.optim.Optimizer, backend: str, ids: torch.Tensor) -> float:
    """Take a training step and return its seconds."""
    for layer in model.modules():
        if isinstance(layer, TestTimeTraining):
            layer.backend = backend
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    load, models = os.getloadavg(), {}
    for preset in dict.fromkeys(preset for _, preset, _ in SIDES):
        torch.manual_seed(0)
        model = DualformForCausalLM(DualformConfig(preset=preset, **SIZES))
        models[preset] = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 259, (options.batch, options.length))
    found: dict[tuple[str, str], list[float]] = {(name, backend): [] for name, _, backend in SIDES}
    for _ in range(options.rounds + 1):
        for name, preset, backend in SIDES:
            found[name, backend].append(step(*models[preset], backend, ids))
    seconds = {key: statistics.median(times[1:]) for key, times in found.items()}
    parameters = {name: sum(p.numel() for p in models[preset][0].parameters()) for name, preset, _ in SIDES}
    rows = [
        {
            "model": name, "backend": backend, "parameters": parameters[name], "s per step": t,
            "tokens per s": ids.numel() / t, "of attention's": seconds["attention", "-"] / t,
        }
        for (name, backend), t in seconds.items()
    ]  # fmt: skip
    settings = {**SIZES, "batch": options.batch, "length": options.length, "chunk": 16, "rounds": options.rounds}
    samples = [{"model": name, "backend": backend, "s": times} for (name, backend), times in found.items()]
    write(options.output, "a training step", load, settings, rows, digits=2, samples=samples)


if __name__ == "__main__":
    main()

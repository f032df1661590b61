"""Four hidden states of one size on the demo's text: a linear map, and three that the catalogue of functions adds.

    python examples/hidden_states.py [--steps N] [--seeds N] [--output FILE.json]

Every model reads the same bytes of Shakespeare in the same order, that of its seed, and is asked about the same
held-out plays. What differs is the function that learns while it reads: TTT-Linear's matrix, a low-rank matrix, a sum
of Kronecker products, and a full matrix on a Taylor expansion of narrower heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging

import dualform as df
from dualform.cli.output import show
from dualform.train.settings import Settings
from dualform.train.training import train


def wrapped(**options: object) -> dict[str, object]:
    """A head inside a residual connection and a layer norm, as TTT-Linear is."""
    return {"learner": {"name": "residual_norm", "spec": {"name": "Head", **options}}}


states: dict[str, dict[str, object]] = {
    "TTT-Linear": {},
    "low rank 16": wrapped(reconciliation={"name": "low_rank", "rank": 16}),
    "4 Kronecker products": wrapped(
        reconciliation={"name": "hm", "p": 16, "q": 16}, channels=4, fusion={"name": "sum"}
    ),
    "linear on Taylor 3, 32 heads": wrapped(expansion={"name": "taylor", "degree": 3, "symmetric": True}, bias=False)
    | {"num_attention_heads": 32},
}


def state_numbers(model: df.DualformForCausalLM) -> int:
    """Count the numbers that one sequence's state holds in one layer."""
    layer = next(m for m in model.modules() if hasattr(m, "program"))
    state = layer.program.initial_state(1, model.config.num_attention_heads)
    return sum(x.numel() for x in state.anchor.values())


def trained(changes: dict[str, object], seed: int, options: argparse.Namespace) -> tuple[float, df.DualformForCausalLM]:
    """Train one model; return its bits per byte on the held-out rows, and the model."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            preset="tiny-ttt-linear",
            output=folder,
            max_steps=options.steps,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            save_steps=options.steps,
            data=options.data,
            seed=seed,
            model=changes,
        )
        outcome = train(settings, quiet=True, evaluate_rows=options.evaluate_rows)
    if outcome.evaluation is None:
        raise SystemExit("the run was interrupted")
    return outcome.evaluation.bits_per_byte, outcome.model


def run(label: str, changes: dict[str, object], options: argparse.Namespace) -> dict[str, object]:
    start = time.perf_counter()
    bits, models = zip(*(trained(changes, seed, options) for seed in range(options.seeds)), strict=True)
    numbers = state_numbers(models[0])
    return {
        "hidden state": label,
        "numbers per layer": numbers,
        "bytes per layer (float32)": 4 * numbers,
        "bits per byte": round(statistics.mean(bits), 3),
        "lowest to highest": f"{min(bits):.3f} to {max(bits):.3f}",
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "seconds per seed": round((time.perf_counter() - start) / options.seeds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--evaluate-rows", type=int, default=128)
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [run(label, changes, options) for label, changes in states.items()]
    show(rows, title=f"{options.steps} steps of {options.batch_size} x {options.seq_len} bytes, {options.seeds} seeds")
    if options.output is not None:
        settings = {
            "steps": options.steps,
            "seeds": options.seeds,
            "batch": options.batch_size,
            "seq_len": options.seq_len,
        }
        options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """Write the rows as the docs show them."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

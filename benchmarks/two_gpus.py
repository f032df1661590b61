"""Training on two GPUs of one host: Trainer under torchrun, DDP and FSDP2, beside one GPU on the same rows.

    python benchmarks/two_gpus.py [--preset ttt-linear-125m] [--steps 16]     writes benchmarks/results/two_gpus.json and .md
    python benchmarks/two_gpus.py --device cpu --preset tiny-ttt-linear ...   the same with gloo, in float32

Each run is a process group of its own that takes the same rows in the same order and saves in the middle; a resumed one
goes on from there with the other number of GPUs. As many rows each: twice the rows for two GPUs. tokens/s: the median of
the later steps. from one: the largest difference of a loss from that of one GPU, of the same step (FSDP2's model
returns its loss in bfloat16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import dualform as df

# name, processes, sharded, the run whose checkpoint it goes on from, how many times the rows
RUNS = (
    ("one GPU", 1, False, "", 1), ("two, DDP", 2, False, "", 1), ("two, FSDP2", 2, True, "", 1),
    ("two, DDP, as many rows each", 2, False, "", 2), ("two, FSDP2, as many rows each", 2, True, "", 2),
    ("one, from two, DDP", 1, False, "two, DDP", 1), ("two, DDP, from one", 2, False, "one GPU", 1),
    ("one, FSDP2, from two", 1, True, "two, FSDP2", 1),
)  # fmt: skip
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Watch(TrainerCallback):
    """Keep each step's seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, each of three steps through the vocabulary that it repeats."""

    def __init__(self, count: int, T: int, vocab: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.steps = torch.randint(vocab, (count, 3), generator=draw)
        self.T, self.vocab = T, vocab

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        ids = self.steps[k].repeat(self.T // 3 + 1)[: self.T].cumsum(0) % self.vocab
        return {"input_ids": ids, "labels": ids}


def train(options: argparse.Namespace, name: str) -> None:
    """One process of one run; the first writes what was seen."""
    _, world, sharded, before, times = next(run for run in RUNS if run[0] == name)
    folder = Path(options.folder)
    on_card = options.device == "cuda"
    torch.manual_seed(0)
    model = df.DualformForCausalLM(df.DualformConfig(preset=options.preset, use_cache=False))
    shard: dict[str, Any] = {"version": 2, "transformer_layer_cls_to_wrap": ["DualformBlock"]}
    watch = Watch()
    arguments = TrainingArguments(
        str(folder / name), max_steps=options.steps, save_steps=options.steps // 2, logging_steps=1, seed=0,
        per_device_train_batch_size=times * options.rows // world, bf16=on_card, use_cpu=not on_card, report_to="none",
        learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="constant", disable_tqdm=True, optim="adamw_torch_fused",
        **({"fsdp": "full_shard auto_wrap", "fsdp_config": shard} if sharded else {}),
    )  # fmt: skip
    data = Rows(times * options.rows * options.steps, options.length, model.config.vocab_size)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[watch])
    trainer.train(resume_from_checkpoint=str(folder / before / f"checkpoint-{options.steps // 2}") if before else None)
    if RANK == 0:
        took = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
        took.pop(options.steps // 2 - 1) if not before else None  # it saves
        losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
        found: dict[str, Any] = {"tokens": times * options.rows * options.length, "seconds": took, "losses": losses}
        if on_card:
            found["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        (folder / f"{name}.json").write_text(json.dumps(found))


def measure(options: argparse.Namespace) -> harness.Found:
    rows: list[harness.Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, world, *_ in (run for run in RUNS if run[0] in options.runs):
            words = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={world}",
                __file__,
            ]
            given = {k: v for k, v in vars(options).items() if k in ("preset", "steps", "rows", "length", "device")}
            words += [f"--{k}={v}" for k, v in given.items()] + [f"--folder={folder}", f"--what={name}"]
            found = subprocess.run(words, capture_output=True, text=True, check=False)
            seen = Path(folder) / f"{name}.json"
            if not seen.exists():
                rows.append({"run": name, "said": found.stderr[-1500:]})
            else:
                rows.append({"run": name} | json.loads(seen.read_text()))
            print(str(rows[-1])[:800], flush=True)
    return {"settings": vars(options) | {"output": ""}, "rows": rows}


def report(found: harness.Found) -> str:
    def rate(row: harness.Found) -> float:
        return row["tokens"] / statistics.median(row["seconds"][len(row["seconds"]) // 3 :])

    one = next((r for r in found["rows"] if r["run"] == "one GPU" and "losses" in r), None)
    table = []
    for row in found["rows"]:
        cells: harness.Found = {"run": row["run"]}
        if "losses" in row and one is not None:
            cells |= {"tokens a step": row["tokens"], "tokens/s": round(rate(row))}
            cells |= {"over one GPU": round(rate(row) / rate(one), 2), "GiB": row.get("GiB", "")}
            if row["tokens"] == one["tokens"]:
                cells["from one"] = f"{max(abs(x - one['losses'][k]) for k, x in row['losses'].items()):.1e}"
        table.append(cells | ({"said": row["said"][-300:].replace("\n", " ")} if "said" in row else {}))
    machine, s = found["machine"].get("gpu", "CPU"), found["settings"]
    head = f"{machine}, torch {found['versions']['torch']}; {s['preset']}, rows of {s['length']} tokens.\n"
    return head + "\n" + harness.rows_table(table, 2)


if __name__ == "__main__":
    defaults: dict[str, Any] = {
        "preset": "ttt-linear-125m", "steps": 16, "rows": 32, "length": 2048, "device": "cuda", "what": "", "folder": "", "runs": [run[0] for run in RUNS],
    }  # fmt: skip
    options = harness.options(__doc__, **defaults)
    if options.what:
        train(options, options.what)
    else:
        harness.main(measure, report, options, "triton", "transformers", "accelerate")

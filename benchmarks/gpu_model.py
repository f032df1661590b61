"""Whole models on a card: a training step, and a token of decoding, beside the same model with flash attention.

    python benchmarks/gpu_model.py [--compiles] [--parts train decode]
    torchrun --nproc-per-node 2 benchmarks/gpu_model.py --parts train     each GPU with its own rows (DDP)

The 125m presets (vocabulary 32,000) at 32,768 tokens a step, bfloat16 autocast, AdamW (fused). compiled: all that lies
around the inner programs and attention, part by part, as layers share what is compiled: norms, feed-forward,
projections and rotations. inner: the share of a step's time in kernels of the inner programs, or of attention; busy: in
any kernel (torch's profiler). Decoding, bfloat16 parameters: a step of the whole model as it is called, and captured as
a CUDA graph, whose 20 tokens are compared with those of calls.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch.nn.parallel import DistributedDataParallel

import dualform as df
from dualform.learning.layer import TestTimeTraining

TOKENS = 32768
RANK, WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
OURS, ATTENTION = ("forward", "reverse", "advance"), ("flash", "fmha", "sdpa")


def model_of(preset: str, backend: str) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = df.DualformForCausalLM(df.DualformConfig(preset=preset))
    for layer in model.modules():
        if isinstance(layer, TestTimeTraining):
            layer.backend = backend
    return model


def compiled(model: Any) -> None:
    """Compile, each once for all layers, what lies around the inner programs and attention."""
    for block in model.model.layers:
        for part in (block.seq_norm, block.ffn_norm, block.mlp):
            part.compile(dynamic=False)
        mixer = block.mixer
        if not isinstance(mixer, TestTimeTraining):
            mixer.compile(dynamic=False)
            continue
        mixer._read = torch.compile(mixer._read, dynamic=False)
        if mixer.post_norm is not None:
            mixer.post_norm.compile(dynamic=False)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Time steps one after the other, as training runs them: the median of some pairs."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / 2)
    return statistics.median(found)


def shares(run: Callable[[], Any], names: tuple[str, ...], spent: float) -> harness.Found:
    """Say which part of a step's time such kernels run, and any."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / 1e6 for e in profile.key_averages()}
    inner = sum(x for name, x in times.items() if any(n in name for n in names))
    most = sorted(times, key=times.__getitem__)[::-1][:8]
    return {
        "inner": round(inner / spent, 3), "busy": round(sum(times.values()) / spent, 3),
        "longest, ms": {name[:60]: round(1e3 * times[name], 2) for name in most},
    }  # fmt: skip


def train(preset: str, T: int, compiles: bool, rounds: int, backend: str) -> harness.Found:
    model = model_of(preset, backend).train()
    if compiles:
        compiled(model)
    whole = DistributedDataParallel(model, [RANK]) if WORLD > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (TOKENS // T, T), device="cuda")
    losses: list[torch.Tensor] = []

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = whole(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    start = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    spent = seconds(step, rounds)
    found = {"tokens/s": round(WORLD * TOKENS / spent), "ms": round(1e3 * spent, 2)}
    found |= {"GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2), "first three steps, s": round(first, 1)}
    found |= {"loss": [round(float(x), 4) for x in (losses[0], losses[-1])]}
    return found | shares(step, ATTENTION if preset.startswith("attention") else OURS, spent)


@torch.no_grad()
def decode(preset: str, batch: int, past: int, backend: str) -> harness.Found:
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new length
    model = model_of(preset, backend).to(torch.bfloat16).eval()
    ids = torch.randint(model.config.vocab_size, (batch, past), device="cuda")
    out = model(ids, use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, out.logits.argmax(-1)
    texts: list[torch.Tensor] = []

    def step() -> None:
        token.copy_(model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1))

    for _ in range(6):
        step()
    spent = seconds(step, 10)
    found: harness.Found = {"ms a token": round(1e3 * spent, 3)}
    if not preset.startswith("attention"):
        state = [x.clone() for layer in cache.layers for x in layer._state.tensors().values()]
        began = token.clone()
        for _ in range(20):
            step()
            texts.append(token.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        held = [x for layer in cache.layers for x in layer._state.tensors().values()]
        for x, y in zip([*held, token], [*state, began], strict=True):
            x.copy_(y)
        for n, text in enumerate(texts):
            graph.replay()
            found["first other token"] = None if torch.equal(token, text) else found.get("first other token") or n
        found["ms a token, as a graph"] = round(1e3 * seconds(graph.replay, 20), 3)
        found["kernels"] = len(profiled(graph.replay))
    return found


def profiled(run: Callable[[], Any]) -> list[Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def measure(options: argparse.Namespace) -> harness.Found:
    torch.cuda.set_device(RANK)
    if WORLD > 1:
        torch.distributed.init_process_group("nccl")
    rows = []
    sides = (False, True) if options.compiles else (False,)
    cases: list[tuple[harness.Found, Callable[[], harness.Found]]] = []
    for name in options.models:
        preset = f"{name}-{options.size}"
        for T in options.lengths if "train" in options.parts else ():
            for c in sides:
                what = {"part": "train", "model": name, "rows x tokens": f"{WORLD * TOKENS // T} x {T}", "compiled": c}
                run = lambda p=preset, t=T, c=c: train(p, t, c, options.rounds, options.backend)  # noqa: E731
                cases.append((what, run))
        for batch in options.batches if "decode" in options.parts else ():
            for past in options.past:
                what = {"part": "decode", "model": name, "batch": batch, "tokens before": past}
                cases.append((what, lambda p=preset, b=batch, n=past: decode(p, b, n, options.backend)))
    for what, run in cases:
        try:
            found = run()
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            found = {"said": str(error)[:300]}
        rows.append(what | found)
        if RANK == 0:
            print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return {"settings": {"tokens a step": TOKENS, "GPUs": WORLD, "size": options.size}, "rows": rows}


def report(found: harness.Found) -> str:
    train = [
        {k: v for k, v in r.items() if k not in ("part", "longest, ms", "loss")}
        for r in found["rows"]
        if r["part"] == "train"
    ]
    decoded = [{k: v for k, v in r.items() if k != "part"} for r in found["rows"] if r["part"] == "decode"]
    gpu, count = found["machine"].get("gpu", "no card"), found["settings"]["GPUs"]
    head = f"{gpu}, torch {found['versions']['torch']}, {count} GPU(s).\n"
    return "\n".join([head, *(harness.rows_table(rows, 2) for rows in (train, decoded) if rows)])


if __name__ == "__main__":
    defaults: dict[str, Any] = {
        "models": ["ttt-linear", "ttt-mlp", "attention"], "lengths": [2048, 8192, 32768], "parts": ["train", "decode"],
        "batches": [1, 64], "past": [512], "size": "125m", "rounds": 3, "backend": "triton", "compiles": False,
    }  # fmt: skip
    options = harness.options(__doc__, **defaults)
    if RANK:
        measure(options)
    else:
        harness.main(measure, report, options, "triton", "transformers")

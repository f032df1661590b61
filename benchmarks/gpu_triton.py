"""Generated Triton on a card: is it right, and how long do its kernels take?

    python benchmarks/gpu_triton.py [--parts right fast] [--limit 240]     writes benchmarks/results/gpu_triton.json and .md

Right: outputs, final state and all outer gradients of a few mini-batches against eager in float64, beside the error of eager in the same
types; the largest relative error in norm, each case in a process of its own, some beside each other (compiling is most of it). Fast:
medians of the kernels of one forward, and of one forward and backward, without and with all that Python does around them.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from typing import Any

import harness
import torch
from torch.nn.functional import normalize

import dualform as df
from dualform.kernels import triton_launch

L, SGD = df.learners, df.rules.SGD
learners = {
    "TTT-Linear": L.residual_norm(L.Linear()), "TTT-MLP": L.residual_norm(L.MLP()), "SwiGLU": L.SwiGLU(), "low rank": L.LowRank(rank=8),
    "Linear": L.Linear(), "MLP of 3": L.residual_norm(L.MLP(depth=3, expand=2, activation="silu")),
}  # fmt: skip
rules = {
    "averaged": SGD(lr=0.1, averaged=True), "SGD": SGD(lr=0.01), "momentum": SGD(lr=0.01, momentum=0.8), "decay": SGD(lr=0.01, decay=0.05),
    "Titans": SGD(lr=0.01, momentum=0.6, decay=0.05),
}  # fmt: skip
objectives = {"v-k": df.objectives.Squared("v-k"), "v": df.objectives.Squared(), "dot": df.objectives.DotProduct()}


def case(learner: str, rule: str = "averaged", d: int = 64, chunk: int = 16, **more: Any) -> dict[str, Any]:
    found = {
        "learner": learner,
        "rule": rule,
        "objective": "v-k",
        "d": d,
        "chunk": chunk,
        "B": 2,
        "T": 3 * chunk,
        "H": 2,
    }
    return found | {"dtype": "bfloat16", "ragged": False} | more


RIGHT = [
    case("TTT-Linear"), case("TTT-Linear", chunk=64), case("TTT-Linear", dtype="float32"), case("TTT-Linear", chunk=100, T=200),
    case("TTT-Linear", "SGD", chunk=1, T=6, dtype="float32"), case("TTT-Linear", dtype="float32", ragged=True, T=50),
    case("TTT-Linear", d=96), case("TTT-Linear", "momentum", d=128), case("TTT-Linear", d=48, chunk=24, T=90, ragged=True), case("TTT-MLP"),
    case("SwiGLU", "SGD"), case("low rank", "decay", objective="dot"), case("Linear", "Titans", dtype="float32"),
    case("Linear", "momentum", d=32, chunk=32, objective="dot"), case("MLP of 3", "decay", d=32, dtype="float32"),
]  # fmt: skip
FAST = [
    case(learner, chunk=chunk, B=B, T=T, H=H)
    for learner, B, T, H in (("TTT-Linear", 8, 2048, 12), ("TTT-Linear", 2, 8192, 32), ("TTT-Linear", 1, 32768, 32), ("TTT-MLP", 8, 2048, 12))
    for chunk in (16, 64)
]  # fmt: skip


def built(c: dict[str, Any]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Make a program, its module and drawn inputs."""
    torch.manual_seed(0)
    module = learners[c["learner"]](c["d"]).cuda()
    program = df.derive(module, objectives[c["objective"]], rules[c["rule"]], chunk=c["chunk"])
    g, shape = torch.Generator("cuda").manual_seed(1), (c["B"], c["T"], c["H"], c["d"])
    q, k, v = (torch.randn(*shape, generator=g, device="cuda") for _ in range(3))
    x = {"q": normalize(q, dim=-1), "k": normalize(k, dim=-1), "v": 0.5 * v}
    x = {name: t.to(getattr(torch, c["dtype"])) for name, t in x.items()}
    for name in program.rule.gates:
        rate = torch.rand(*shape[:3], generator=g, device="cuda") * (1.0 if name == "lr" else 0.3)
        x[name] = 0.02 * torch.randn(c["chunk"], generator=g, device="cuda") if name == "offset" else rate
    return program, module, {name: t.requires_grad_() for name, t in x.items()}


def called(program: Any, x: dict[str, torch.Tensor], backend: Any, **more: Any) -> tuple[torch.Tensor, Any]:
    return program(x["q"], x["k"], x["v"], {n: t for n, t in x.items() if n not in "qkv"}, backend=backend, **more)


def results(o: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
    return {"o": o} | {f"state {n}": t for n, t in state.tensors().items() if t.is_floating_point()}


def right(c: dict[str, Any]) -> dict[str, Any]:
    """Compare with eager in float64."""
    program, module, x = built(c)
    g = torch.Generator("cuda").manual_seed(2)
    params = {
        n: (
            p.detach().expand(c["H"], *p.shape) + 0.02 * torch.randn(c["H"], *p.shape, generator=g, device="cuda")
        ).requires_grad_()
        for n, p in module.named_parameters()
    }
    more: dict[str, Any] = {}
    if c["ragged"]:
        draw = torch.rand(2, c["B"], c["T"], generator=g, device="cuda")
        more = {"mask": draw[0] > 0.2, "reset": draw[1] > 0.95}
    cotangents: dict[str, torch.Tensor] = {}

    def outcome(program: Any, x: Any, params: Any, backend: Any) -> dict[str, torch.Tensor]:
        found = results(*called(program, x, backend, params=params, **more))
        for name, t in found.items():
            cotangents.setdefault(name, torch.randn(t.shape, generator=g, device="cuda"))
        total = sum((t.double() * cotangents[name]).sum() for name, t in found.items())
        leaves = {**x, **params}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {n: t.detach() for n, t in found.items()} | {f"d {n}": t for n, t in zip(leaves, grads, strict=True)}

    got = outcome(program, x, params, "triton")
    again, eager = outcome(program, x, params, "triton"), outcome(program, x, params, "eager")
    exact = df.derive(copy.deepcopy(module).double(), objectives[c["objective"]], rules[c["rule"]], chunk=c["chunk"])
    wide = [{n: t.detach().double().requires_grad_() for n, t in some.items()} for some in (x, params)]
    true = outcome(exact, *wide, "eager")

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()

    worst = max(true, key=lambda n: error(got[n], true[n]))
    other = [n for n in got if not torch.equal(got[n], again[n])]
    return {
        "worst": worst, "error": error(got[worst], true[worst]), "eager": error(eager[worst], true[worst]),
        "outputs": error(got["o"], true["o"]), "outputs, eager": error(eager["o"], true["o"]), "other bits": ", ".join(other),
    }  # fmt: skip


def fast(c: dict[str, Any]) -> dict[str, Any]:
    """Time the kernels of a call, and the call."""
    from triton.testing import do_bench, do_bench_cudagraph  # pyright: ignore[reportMissingImports]: where there is a card

    program, _, x = built(c)
    do, launches, plain = torch.randn_like(x["v"]), [], triton_launch.run

    def run(*words: Any) -> Any:
        launches.append((words, made := plain(*words)))
        return made

    def both() -> None:
        called(program, x, "triton")[0].backward(do)

    both()
    triton_launch.run = run
    both()
    triton_launch.run = plain
    spent: dict[Any, float] = {}
    kernels: dict[str, Any] = {}
    total = forward = 0.0
    for words, made in launches:
        name, key = words[0].name, (words[0].name, words[5])
        if key not in spent:
            spent[key] = do_bench_cudagraph(lambda w=words: plain(*w), rep=30, return_mode="median")
            kernels[name] = (
                f"{spent[key]:.3f} ms, {made.n_regs} registers, {made.n_spills} spilled, {made.metadata.shared} B"
            )
        total += spent[key]
        forward += spent[key] * name.startswith("forward")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    calls = {
        name: do_bench(f, warmup=15, rep=60, return_mode="median")
        for name, f in (("forward", lambda: called(program, x, "triton")), ("both", both))
    }
    return {
        "forward, kernels": forward, "both, kernels": total, "forward, call": calls["forward"], "both, call": calls["both"], "MiB": peak,
        "launches": len(launches), "each": kernels,
    }  # fmt: skip


def alone(cases: list[tuple[str, dict[str, Any]]], beside: int, limit: float) -> list[dict[str, Any]]:
    """Run cases in processes of their own, so many beside each other."""
    waiting, running, found = list(cases), [], []
    while waiting or running:
        while waiting and len(running) < beside:
            kind, c = waiting.pop(0)
            words = [sys.executable, __file__, "--one", json.dumps([kind, c])]
            running.append(
                (
                    kind,
                    c,
                    time.time(),
                    subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
                )
            )
        time.sleep(0.2)
        for one in list(running):
            kind, c, start, process = one
            if process.poll() is None and time.time() - start > limit:
                process.kill()
            if process.poll() is not None:
                running.remove(one)
                text = process.stdout.read() if process.stdout else ""
                lines = [line for line in text.splitlines() if line.startswith("{")]
                made = json.loads(lines[-1]) if lines else {"error said": text[-300:]}
                found.append({"kind": kind, **c, **made})
                print(found[-1], flush=True)
    return found


def measure(options: Any) -> harness.Found:
    found: list[dict[str, Any]] = []
    if "right" in options.parts:
        found += alone([("right", c) for c in RIGHT], os.cpu_count() or 1, options.limit)
    if "fast" in options.parts:  # nothing beside it
        found += alone([("fast", c) for c in FAST], 1, options.limit)
    return {"cases": found}


def report(found: harness.Found) -> str:
    def sizes(c: dict[str, Any]) -> list[Any]:
        shape = f"B{c['B']} T{c['T']} H{c['H']} d{c['d']}, {c['chunk']}"
        return [
            f"{c['learner']}, {c['rule']}, {c['objective']}",
            f"{shape}, {c['dtype']}{', ragged' if c['ragged'] else ''}",
        ]

    def tiny(x: float) -> str:
        return f"{x:.1e}"

    rights = [
        [*sizes(c), c["worst"], tiny(c["error"]), tiny(c["eager"]), tiny(c["outputs"]), tiny(c["outputs, eager"])]
        if "worst" in c else [*sizes(c), c["error said"], "-", "-", "-", "-"]
        for c in found["cases"] if c["kind"] == "right"
    ]  # fmt: skip
    names = ["forward, kernels", "both, kernels", "forward, call", "both, call", "MiB"]
    fasts = [
        [*sizes(c), *(f"{c[n]:.2f}" if n in c else "-" for n in names[:4]), f"{c['MiB']:.0f}" if "MiB" in c else "-"]
        for c in found["cases"] if c["kind"] == "fast"
    ]  # fmt: skip
    head = ["what", "sizes, mini-batch", "worst", "error", "eager's", "outputs", "eager's"]
    return "\n".join([
        f"{found['machine'].get('gpu', 'no card')}, torch {found['versions']['torch']}, triton {found['versions']['triton']}.\n",
        harness.table(head, rights), harness.table(["what", "sizes, mini-batch", *(f"{n}, ms" for n in names[:4]), "peak, MiB"], fasts),
    ])  # fmt: skip


if __name__ == "__main__":
    if "--one" in sys.argv:
        kind, c = json.loads(sys.argv[sys.argv.index("--one") + 1])
        print(json.dumps({"right": right, "fast": fast}[kind](c)))
    else:
        harness.main(measure, report, harness.options(__doc__, parts=["right", "fast"], limit=240.0), "triton")

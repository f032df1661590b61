"""Generated Triton on a card beside its peers: the time of calls, of their kernels alone, and the floors below them.

    python benchmarks/gpu_kernels.py [--limit 240] [--seconds 540] [--parts warm peers ours]

writes benchmarks/results/gpu_kernels.json and .md. What the seconds do not reach stays as it was recorded; each row
says of which commit it is.

Each case runs in a process of its own, alone on the card; medians, all samples in the JSON. A call is what a user
writes, torch.autograd around it; its kernels alone are the same call as a CUDA graph, replayed. Peers are
flash-linear-attention's TTT and torch's causal attention, in the same run, if they are there. Floors: bytes of q, k, v,
o, gates and their gradients over the card's copy rate; products of matrices over its bf16 rate; and the chain of
mini-batches, each as long as in the shortest hand-made kernel of that step alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

import dualform as df
from dualform.kernels import triton_launch

L, SGD = df.learners, df.rules.SGD
learners = {
    "TTT-Linear": L.residual_norm(L.Linear()), "TTT-MLP": L.residual_norm(L.MLP()), "SwiGLU": L.SwiGLU(),
    "low rank": L.LowRank(rank=8),
    "Linear": L.Linear(), "MLP of 3": L.residual_norm(L.MLP(depth=3, expand=2, activation="silu")),
}  # fmt: skip
rules = {
    "averaged": SGD(lr=0.1, averaged=True), "SGD": SGD(lr=0.01), "momentum": SGD(lr=0.01, momentum=0.8),
    "decay": SGD(lr=0.01, decay=0.05),
    "Titans": SGD(lr=0.01, momentum=0.6, decay=0.05),
}  # fmt: skip
objectives = {"v-k": df.objectives.Squared("v-k"), "v": df.objectives.Squared(), "dot": df.objectives.DotProduct()}
COPY, PRODUCTS = 4.2e12, 775e12  # bytes and operations a second, one H200
# Microseconds of a mini-batch's chain of dependent steps, forward and in reverse, hand-made and alone (one H100): by
# learner and tokens.
CHAIN = {("TTT-Linear", 16): (1.15, 2.0), ("TTT-Linear", 64): (1.93, 3.96), ("TTT-MLP", 16): (4.6, None)}


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


SHAPES = ((8, 2048, 12), (2, 8192, 32), (1, 32768, 32))
REACH = {  # of the issue: forward and backward, ms
    ("TTT-Linear", 8, 16): 0.75, ("TTT-Linear", 8, 64): 0.80, ("TTT-Linear", 2, 16): 2.2, ("TTT-Linear", 2, 64): 1.6,
    ("TTT-Linear", 1, 16): 8.0, ("TTT-Linear", 1, 64): 4.5, ("TTT-MLP", 8, 16): 4.5, ("TTT-MLP", 8, 64): 4.5,
    ("TTT-MLP", 1, 16): 45,
}  # fmt: skip
OURS = [case("TTT-Linear", chunk=chunk, B=B, T=T, H=H) for B, T, H in SHAPES for chunk in (16, 64)]
OURS += [case("TTT-MLP", B=8, T=2048, H=12), case("TTT-MLP", B=1, T=32768, H=32)]
OURS += [case("TTT-MLP", chunk=64, B=8, T=2048, H=12)]
OURS += [case("TTT-Linear", d=128, B=2, T=8192, H=16)]
OURS += [
    case(learner, rule, B=8, T=2048, H=12)
    for learner, rule in (
        ("SwiGLU", "averaged"), ("low rank", "averaged"), ("MLP of 3", "averaged"), ("TTT-Linear", "momentum"),
        ("TTT-Linear", "decay"), ("Linear", "Titans"),
    )
]  # fmt: skip
PEERS = [{"B": B, "T": T, "H": H, "chunk": chunk} for B, T, H in SHAPES for chunk in (16, 64)]


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


def timed(forward: Callable[[], Any], both: Callable[[], Any], graphs: bool = True, rep: int = 80) -> dict[str, Any]:
    """Time a call forward, and both ways; and as replayed graphs."""
    from triton.testing import do_bench, do_bench_cudagraph  # pyright: ignore[reportMissingImports]: where there is a card

    for _ in range(4):
        both()
    for _ in range(4):
        forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    found: dict[str, Any] = {"MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}
    for name, f in (("forward", forward), ("both", both)):
        samples = do_bench(f, warmup=15, rep=rep, return_mode="all")
        found[f"{name}, call"], found[f"{name}, samples"] = (
            sorted(samples)[len(samples) // 2],
            [round(x, 4) for x in samples],
        )
        if graphs:
            try:
                found[f"{name}, kernels"] = do_bench_cudagraph(f, rep=rep, return_mode="median")
            except RuntimeError as error:
                found[f"{name}, graph said"] = str(error)[:200]
    return found


def ours(c: dict[str, Any]) -> dict[str, Any]:
    program, module, x = built(c)
    do, leaves = torch.randn_like(x["v"]), [*x.values(), *module.parameters()]
    flops: list[int] = []
    plain = triton_launch.run

    def run(*words: Any) -> Any:
        flops.append(words[0].flops * words[5][0] * words[2])
        return plain(*words)

    def forward(backend: str = "triton") -> None:
        with torch.no_grad():
            called(program, x, backend)

    def both(backend: str = "triton") -> None:
        torch.autograd.grad(called(program, x, backend)[0], leaves, do, allow_unused=True)

    if c.get("only") == "forward":
        both = forward
    both()
    triton_launch.run = run
    forward()
    half = len(flops)
    both()
    triton_launch.run = plain
    if c.get("warm"):
        return {}
    per = {"q": 1, "o": 1, "k": 1, "v": 1}
    token = c["B"] * c["T"] * c["H"]
    moved = token * (c["d"] * 2 * len(per) + 4)
    chain = CHAIN.get((c["learner"], c["chunk"]), (None, None)) if c["d"] == 64 else (None, None)
    n = c["T"] // c["chunk"]
    floors = {
        "forward": [moved / COPY * 1e3, sum(flops[:half]) / PRODUCTS * 1e3, n * chain[0] * 1e-3 if chain[0] else None],
        "both": [
            3 * moved / COPY * 1e3,
            sum(flops[half:]) / PRODUCTS * 1e3,
            n * (chain[0] + chain[1]) * 1e-3 if chain[0] and chain[1] else None,
        ],
    }
    eager = {}
    if c["B"] == 8 and c.get("only") != "forward":
        eager = {"both, eager": timed(lambda: forward("eager"), lambda: both("eager"), False, 1)["both, call"]}
    found = timed(forward, both) | {"floors": floors} | eager
    return {k: v for k, v in found.items() if not k.startswith("both") or c.get("only") != "forward"}


def peers(c: dict[str, Any]) -> dict[str, Any]:
    """Time flash-linear-attention's TTT-Linear, and torch's causal attention."""
    B, T, H, d = c["B"], c["T"], c["H"], 64
    q, k, v = (torch.randn(B, T, H, d, device="cuda") for _ in range(3))
    q, k, v = (z.to(torch.bfloat16).requires_grad_() for z in (normalize(q, dim=-1), normalize(k, dim=-1), v))
    g = torch.randn(B, T, H, d, device="cuda", dtype=torch.bfloat16)

    def attention() -> torch.Tensor:
        return scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)

    def seen(call: Callable[[], torch.Tensor], xs: list[torch.Tensor], do: torch.Tensor) -> dict[str, Any]:
        def forward() -> None:
            with torch.no_grad():
                call()

        return timed(forward, lambda: torch.autograd.grad(call(), xs, do, allow_unused=True), False)

    found = {"attention": seen(attention, [q, k, v], g.transpose(1, 2))} if c["chunk"] == 16 else {}
    try:
        from fla.ops.ttt import chunk_ttt_linear  # pyright: ignore[reportMissingImports]: a peer, if it is there
    except ImportError as error:
        return found | {"fla said": str(error)}
    w, b = (torch.randn(H, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    eta = (torch.rand(B, T, H, 1, device="cuda") * 1e-2).to(torch.bfloat16).requires_grad_()
    start = (0.02 * torch.randn(B, H, d, d, device="cuda")).requires_grad_()
    bias = (0.02 * torch.randn(B, H, 1, d, device="cuda")).requires_grad_()

    def fla() -> torch.Tensor:
        more = {"initial_state": start, "initial_state_bias": bias, "output_final_state": True}
        return chunk_ttt_linear(q, k, v, w, b, eta, scale=1.0, eps=1e-6, chunk_size=c["chunk"], **more)[0]

    return found | {"fla": seen(fla, [q, k, v, w, b, eta, start, bias], g)}


def alone(cases: list[tuple[str, dict[str, Any]]], beside: int, limit: float, end: float) -> list[dict[str, Any]]:
    """Run cases in processes of their own, so many beside each other, and begin none after the end."""
    waiting, running, found = list(cases), [], []
    while running or (waiting and time.time() < end):
        while waiting and len(running) < beside and time.time() < end:
            kind, c = waiting.pop(0)
            words = [sys.executable, __file__, "--one", json.dumps([kind, c])]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            running.append((kind, c, time.time(), process))
        time.sleep(0.1)
        for one in list(running):
            kind, c, start, process = one
            if process.poll() is None and time.time() > min(start + limit, end + limit / 4):
                process.kill()
            if process.poll() is not None:
                running.remove(one)
                text = process.stdout.read() if process.stdout else ""
                lines = [line for line in text.splitlines() if line.startswith("{")]
                made = (
                    json.loads(lines[-1])
                    if lines
                    else {"error said": text.strip().splitlines()[-1][:400] if text.strip() else "killed"}
                )
                found.append({"kind": kind, **c, **made})
                print(json.dumps(found[-1]), flush=True)
    return found


def which(row: dict[str, Any]) -> str:
    """Name a row's case."""
    return json.dumps([row.get(x) for x in ("kind", "learner", "rule", "d", "chunk", "B", "T", "H")])


def merged(recorded: list[dict[str, Any]], found: list[dict[str, Any]], run: dict[str, str]) -> list[dict[str, Any]]:
    """Put rows of a run in the place of those recorded of their cases."""
    every = {which(x): x for x in recorded} | {which(x): x | {"run": run} for x in found}
    order = [which({"kind": kind, **c}) for kind, many in (("ours", OURS), ("peers", PEERS)) for c in many]
    return [every[x] for x in order if x in every]


def measure(options: Any) -> harness.Found:
    end, found = time.time() + options.seconds, list[dict[str, Any]]()
    recorded = json.loads(options.output.read_text()) if options.output.exists() else {"cases": []}
    before = {"commit": recorded.get("commit", "")[:7], "date": recorded.get("date", "")}
    recorded = [{"run": before} | x for x in recorded["cases"]]
    if "warm" in options.parts:  # compiled beside each other, for the disk
        alone([("ours", c | {"warm": True}) for c in OURS], max(1, (os.cpu_count() or 1) - 2), options.limit, end)
    main = [("ours", c) for c in OURS[:10] if "ours" in options.parts]
    more = [("ours", c) for c in OURS[10:] if "ours" in options.parts]
    turns = [*main, *(("peers", c) for c in PEERS if "peers" in options.parts), *more]
    found += alone(turns, 1, options.limit, end)
    now = harness.about()
    run = {"commit": now["commit"][:7], "date": now["date"]}
    return {"cases": merged(recorded, found, run)}


def report(found: harness.Found) -> str:
    fla = {(c["B"], c["chunk"]): c["fla"] for c in found["cases"] if c["kind"] == "peers" and "fla" in c}
    attention = {c["B"]: c["attention"] for c in found["cases"] if c["kind"] == "peers" and "attention" in c}

    def ms(x: Any) -> str:
        return "-" if x is None else f"{x:.2f}"

    rows, why, runs = [], [], dict[str, list[str]]()
    for c in found["cases"]:
        if c["kind"] != "ours":
            continue
        name = (
            f"{c['learner']}{'' if c['rule'] == 'averaged' else ', ' + c['rule']}, B{c['B']} T{c['T']} H{c['H']} "
            f"d{c['d']}, {c['chunk']}"
        )
        runs.setdefault(" of ".join(c["run"].values()) if "run" in c else "", []).append(name)
        if "error said" in c:
            why.append(f"- {name}: {c['error said']}")
            continue
        plain = c["d"] == 64 and c["rule"] == "averaged"
        peer = fla.get((c["B"], c["chunk"])) if c["learner"] == "TTT-Linear" and plain else None
        target = REACH.get((c["learner"], c["B"], c["chunk"])) if plain else None
        floor = {n: max(x for x in c["floors"][n] if x is not None) for n in ("forward", "both")}
        rows.append([
            name, *(ms(c.get(f"forward, {w}")) for w in ("call", "kernels")), ms(peer and peer["forward, call"]),
            *(ms(c.get(f"both, {w}")) for w in ("call", "kernels")), ms(peer and peer["both, call"]), ms(target),
            f"{ms(floor['both'])} "
            f"({c['both, kernels'] / floor['both']:.1f}x)" if "both, kernels" in c else ms(floor["both"]), ms(c.get("both, eager")), f"{c['MiB']:.0f}", ms(peer and peer["MiB"]).split(".")[0],
        ])  # fmt: skip
    head = [
        "what, mini-batch", "forward, call", "its kernels", "fla", "both, call", "its kernels", "fla", "target",
        "floor (kernels over it)",
        "both, eager", "peak, MiB", "fla's",
    ]  # fmt: skip
    beside = [[f"B{b}", ms(x["forward, call"]), ms(x["both, call"]), f"{x['MiB']:.0f}"] for b, x in attention.items()]
    parts = [
        f"{found['machine'].get('gpu', 'no card')}, torch {found['versions']['torch']}, triton "
        f"{found['versions']['triton']}; ms, medians, bfloat16.\n",
        harness.table(head, rows),
        harness.table(["causal attention, same shapes", "forward", "both", "peak, MiB"], beside),
    ]  # fmt: skip
    last = [f"Of commit {run}: {'; '.join(names)}.\n" for run, names in runs.items()] if len(runs) > 1 else []
    return "\n".join([*parts, *last, *(["Not run:\n", *why, ""] if why else [])])


if __name__ == "__main__":
    if "--one" in sys.argv:
        kind, c = json.loads(sys.argv[sys.argv.index("--one") + 1])
        print(json.dumps({"ours": ours, "peers": peers}[kind](c)))
    else:
        harness.main(
            measure,
            report,
            harness.options(__doc__, parts=["warm", "peers", "ours"], limit=240.0, seconds=540.0),
            "triton",
        )

"""Test-time training on a CPU: ours beside the official code, a plain loop of the same maths, and attention.

    python benchmarks/cpu_ttt.py [--official PATH/ttt.py] [--quick] [--cases REGEX] [--only time memory compile]
                                 [--threads 1 2] [--rounds 7] [--budget 40] [--output FILE]     one run, all sides
    python benchmarks/cpu_ttt.py --report [--output FILE]      table and goals again, from an earlier run

writes benchmarks/results/cpu_ttt.json (machine, versions, commit, medians, quartiles of ratios) and .md.

Sides, float32, 4 heads of width 64, mini-batches of 16. The inner part, from q, k, v (B, T, H, d), the rate gate and
the weights to the outputs and the gradients of all of them: `official`, `ttt()` of ttt-lm-pytorch's layer, unchanged;
`naive`, a loop of the paper's dual form with autograd, below; `sdpa`, causal attention on q, k, v; `eager`, `inductor`
and `cpp`, our program on that backend. The whole layer, with gate, shared q and k and their convolutions: `official
layer`, `eager layer` and so on.

Time: one process per learner and thread count; caches of compiled code begin empty. In each round every side runs once,
in an order that turns; a ratio is taken within a round, then median and quartiles over rounds. Before that every side's
outputs and gradients are compared with the naive loop's (the layers with the official layer's) at the very shape. A
side whose call would take longer than --budget seconds, by its own smaller cases, is skipped; one that takes long runs
in fewer rounds. The reason stands in the JSON. Memory: a process per side and repeat; a short sequence first, free
memory given back to the system, then the growth of the resident set's high-water mark (VmHWM, reset through clear_refs)
over one forward + backward, inputs and cotangent not counted. Compile: the first forward + backward of a fresh process
with empty cache directories, less the median of the next three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.util
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import quartiles, seconds
from torch import Tensor
from torch.nn import functional as F

import dualform as df

H, d, b = 4, 64, 16
BASE_RATE = {"TTT-Linear": 1.0, "TTT-MLP": 0.1}
OURS = ("eager", "inductor", "cpp")
INNER, LAYER = ("official", "naive", "sdpa", *OURS), ("official layer", *(f"{x} layer" for x in OURS))
TOLERANCE = 1e-4  # float32, relative to the tensor's norm, after a recurrence of up to 512 mini-batches

Fields = dict[str, Any]


# -- the maths, plainly ---------------------------------------------------------------------------------------------
# Legend: K, Q, V one mini-batch's keys, queries, values (B, H, b, d); Z pre-norm; G gradients of the inner loss; eta
# step sizes


def norm(Z: Tensor) -> tuple[Tensor, Tensor]:
    std = torch.sqrt(Z.var(-1, keepdim=True, unbiased=False) + 1e-6)
    return (Z - Z.mean(-1, keepdim=True)) / std, std


def norm_gradient(Z: Tensor, target: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Gradient of 1/2 |LN(Z) - target|^2 with respect to Z (Sun et al. 2024, code)."""
    X, std = norm(Z)
    g = (gain * X + bias - target) * gain
    return (g - g.mean(-1, keepdim=True) - X * (g * X).mean(-1, keepdim=True)) / std


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_gradient(x: Tensor) -> Tensor:
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)


def naive(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, offset: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Run TTT-Linear, or TTT-MLP if there is a W2: mini-batches in a Python loop, the gradients left to autograd."""
    gain, bias = p["norm.weight"][:, None], p["norm.bias"][:, None]
    W1, b1 = p["inner.W1"].expand(len(q), -1, -1, -1), p["inner.b1"][:, None].expand(len(q), -1, -1, -1)
    W2, b2 = (p["inner.W2"].expand(len(q), -1, -1, -1), p["inner.b2"][:, None]) if "inner.W2" in p else (None, None)
    token = (1 / torch.arange(1, b + 1) + offset).clamp_min(0)[:, None]
    outputs = []
    for Q, K, V, rate in zip(
        *(x.transpose(1, 2).split(b, 2) for x in (q, k, v)), lr.transpose(1, 2).split(b, 2), strict=True
    ):
        eta = torch.tril(token * rate[:, :, None])
        last = eta[:, :, -1, :, None]
        Z1 = K @ W1 + b1
        if W2 is None or b2 is None:
            G1 = norm_gradient(Z1, V - K, gain, bias)
            Z = Q @ W1 - (eta * (Q @ K.mT)) @ G1 + b1 - eta @ G1
        else:
            X2 = gelu(Z1)
            G2 = norm_gradient(X2 @ W2 + b2, V - K, gain, bias)
            G1 = (G2 @ W2.mT) * gelu_gradient(Z1)
            Q2 = gelu(Q @ W1 - (eta * (Q @ K.mT)) @ G1 + b1 - eta @ G1)
            Z = Q2 @ W2 - (eta * (Q2 @ X2.mT)) @ G2 + b2 - eta @ G2
            W2, b2 = W2 - (last * X2).mT @ G2, b2 - (last * G2).sum(2, keepdim=True)
        W1, b1 = W1 - (last * K).mT @ G1, b1 - (last * G1).sum(2, keepdim=True)
        outputs.append(Q + gain * norm(Z)[0] + bias)
    return torch.cat(outputs, 2).transpose(1, 2)


def flops(learner: str, side: str, B: int, T: int, mode: str) -> float:
    """Count multiplications and additions of matrix products; a backward pass costs two forward, and one to recompute.

    Per mini-batch and head, a layer of m inputs and n outputs: K W, Q W, K^T G: 3 (2 b m n); Q K^T and (eta * .) G: 2
    b^2 (m + n); and G W^T, 2 b m n, where a layer lies below. Attention: Q K^T and P V on half of T^2; backward 2.5
    times that (3.5 in all).
    """
    if side == "sdpa":
        return B * H * 2 * T * T * d * (1 if mode == "f" else 3.5)
    widths = [(d, d)] if learner == "TTT-Linear" else [(d, 4 * d), (4 * d, d)]
    step = sum((6 + 2 * (j > 0)) * b * m * n + 2 * b * b * (m + n) for j, (m, n) in enumerate(widths))
    return B * H * T / b * step * (1 if mode == "f" else 4)


# -- the sides ------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A function of its leaves; `leaves` are under names that all sides share,
    in shapes that flatten to the same order."""

    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    do: Tensor

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run()

    def both(self) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.run()
        grads = torch.autograd.grad(o, list(self.leaves.values()), self.do)
        return o.detach(), dict(zip(self.leaves, grads, strict=True))


def load_official(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("official_ttt", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    module.causal_conv1d_fn = module.causal_conv1d_update = None
    return module


def official_layer(learner: str, path: str) -> Any:
    module = load_official(path)
    kind = "linear" if learner == "TTT-Linear" else "mlp"
    config = module.TTTConfig(
        hidden_size=H * d, num_attention_heads=H, mini_batch_size=b, ttt_layer_type=kind,
        ttt_base_lr=BASE_RATE[learner],
        use_gate=True, share_qk=True, conv_kernel=4,
    )  # fmt: skip
    return (module.TTTLinear if kind == "linear" else module.TTTMLP)(config, layer_idx=0)


OFFICIAL_NAMES = {
    "inner.W1": "W1", "inner.b1": "b1", "inner.W2": "W2", "inner.b2": "b2",
    "norm.weight": "ttt_norm_weight", "norm.bias": "ttt_norm_bias",
}  # fmt: skip
LAYER_NAMES = {
    "rate_weight": "learnable_ttt_lr_weight", "rate_bias": "learnable_ttt_lr_bias", "offset": "learnable_token_idx",
    **{"initial_" + ours.replace(".", "_"): theirs for ours, theirs in OFFICIAL_NAMES.items()},
}  # fmt: skip


def learner_of(learner: str) -> Any:
    return df.learners.residual_norm(
        df.learners.Linear() if learner == "TTT-Linear" else df.learners.MLP(depth=2, expand=4)
    )


@dataclass
class Maker:
    """Makes the sides of one learner, all from the same seeds."""

    learner: str
    official: str | None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.rule = df.rules.SGD(lr=BASE_RATE[self.learner], averaged=True)
        module = learner_of(self.learner)(d)
        self.params = {n: torch.stack([p.detach()] * H) for n, p in module.named_parameters()}
        self.params = {n: p + 0.02 * torch.randn_like(p) for n, p in self.params.items()}
        self.program = df.derive(module, df.objectives.Squared(), self.rule, chunk=b)

    def absent(self, side: str) -> str | None:
        """Say why a side cannot run at all."""
        if side.startswith("official") and self.official is None:
            return "no --official PATH/ttt.py given"
        backend = side.split()[0]
        if backend in OURS and backend not in df.backends:
            return f"dualform has no backend {backend!r}"
        return None

    def make(self, side: str, B: int, T: int) -> Side:
        torch.manual_seed(1)
        if side in LAYER:
            return self._layer(side, torch.randn(B, T, H * d), torch.randn(B, T, H * d))
        q, k, v, do = (torch.randn(B, T, H, d) for _ in range(4))
        lr, offset = torch.rand(B, T, H) / d, 0.01 * torch.randn(b)
        leaves = {"q": q, "k": k, "v": v}
        if side != "sdpa":
            leaves |= {"lr": lr, "offset": offset, **{n: p.clone() for n, p in self.params.items()}}
        for x in leaves.values():
            x.requires_grad_()
        params = {n: leaves[n] for n in self.params if n in leaves}
        if side == "sdpa":

            def attend() -> Tensor:
                Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(Q, K, V, is_causal=True).transpose(1, 2)

            return Side(attend, leaves, do)
        rate = BASE_RATE[self.learner]
        if side == "naive":
            return Side(lambda: naive(q, k, v, rate * lr, offset, params), leaves, do)
        if side == "official":
            return self._official(leaves, do)
        gates = {"lr": lr, "offset": offset}
        return Side(lambda: self.program(q, k, v, gates, params=params, backend=side)[0], leaves, do)

    def _official(self, leaves: dict[str, Tensor], do: Tensor) -> Side:
        """The official `ttt()`, from the step sizes on: what `get_ttt_inputs` gives it,
        with the rate gate as an input."""
        assert self.official is not None
        layer, (B, T) = official_layer(self.learner, self.official), do.shape[:2]
        shared = {n: x for n, x in leaves.items() if n not in OFFICIAL_NAMES}
        for ours, theirs in OFFICIAL_NAMES.items():
            if ours in leaves:
                p = getattr(layer, theirs)
                p.data = leaves[ours].detach().view_as(p)
                shared[ours] = p
        rate, first = BASE_RATE[self.learner], layer.token_idx

        def run() -> Tensor:
            x = {n: leaves[m].transpose(1, 2).reshape(B, H, T // b, b, d) for n, m in zip(("XQ", "XK", "XV"), "qkv", strict=True)}  # fmt: skip
            token = torch.clamp_min(first + leaves["offset"], 0.0).reshape(1, 1, 1, b, 1).expand(B, H, T // b, b, 1)
            step = rate * leaves["lr"].transpose(1, 2).reshape(B, H, T // b, 1, b)
            o, _ = layer.ttt({**x, "eta": token * step, "token_eta": token, "ttt_lr_eta": step}, b, None)
            return o.view(B, T, H, d)

        return Side(run, shared, do)

    def _layer(self, side: str, x: Tensor, dy: Tensor) -> Side:
        x.requires_grad_()
        torch.manual_seed(2)
        ours = df.TestTimeTraining(
            H * d, H, learner=learner_of(self.learner), rule=self.rule, chunk=b, share_qk=True, use_gate=True
        )
        if side == "official layer":
            assert self.official is not None
            layer = official_layer(self.learner, self.official)
            names = {n: LAYER_NAMES.get(n, n) for n, _ in ours.named_parameters()}
            theirs = dict(layer.named_parameters())
            for own, name in names.items():
                theirs[name].data = ours.get_parameter(own).detach().view_as(theirs[name])
            position = torch.arange(x.shape[1]).expand(x.shape[:2])
            return Side(
                lambda: layer(x, position_ids=position), {"x": x, **{n: theirs[m] for n, m in names.items()}}, dy
            )
        ours.backend = side.split()[0]
        return Side(lambda: ours(x)[0], {"x": x, **dict(ours.named_parameters())}, dy)


def errors(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Relative error of the output and of every gradient, each against its tensor's norm."""
    pairs = {"o": (found[0], wanted[0]), **{n: (g, wanted[1][n]) for n, g in found[1].items()}}
    return {n: float((x.reshape(-1) - y.reshape(-1)).norm() / y.norm()) for n, (x, y) in pairs.items()}


# -- time -----------------------------------------------------------------------------------------------------------


def memory_available() -> float:
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def ratios(samples: dict[str, list[float]]) -> Fields:
    """Quartiles over rounds of a side's time over ours, both of the same round."""
    pairs = [(o, s) for s in OURS for o in INNER[:3]] + [("official layer", f"{s} layer") for s in OURS]
    found = {}
    for other, ours in pairs:
        each = [x / y for x, y in zip(samples.get(other, []), samples.get(ours, []), strict=False)]
        if each:
            found[f"{other} / {ours}"] = [float(f"{x:.8g}") for x in quartiles(each)]
    return found


@dataclass
class Timer:
    """Times one learner's cases in this process; remembers what a call took, to foresee larger ones."""

    maker: Maker
    threads: int
    rounds: int
    budget: float

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        self.took: dict[tuple[str, str, int, int], tuple[float, float]] = {}
        self.A, self.B = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def foreseen(self, side: str, mode: str, B: int, T: int) -> tuple[float, float]:
        """Seconds and GiB of a call, by the largest smaller case; what takes time quadratic in T grows so."""
        known = [(b0, t0) for s, m, b0, t0 in self.took if (s, m) == (side, mode) and b0 <= B and t0 <= T]
        if not known:
            return 0.0, 0.0
        b0, t0 = max(known, key=lambda at: at[0] * at[1])
        seconds, size = self.took[side, mode, b0, t0]
        power = 2 if side == "sdpa" or side.startswith("official") else 1
        return seconds * B / b0 * (T / t0) ** power, size * B * T / (b0 * t0)

    def refused(self, side: str, mode: str, B: int, T: int) -> str | None:
        """Say why a side is not run, if it is not."""
        seconds, size = self.foreseen(side, mode, B, T)
        free = memory_available()
        if seconds > self.budget:
            return f"a call would take about {seconds:.0f} s; the budget is {self.budget:.0f} s"
        if size > free / 2:
            return f"a call would take about {size:.0f} GiB; half of what is free is {free / 2:.0f} GiB"
        return self.maker.absent(side)

    def case(self, B: int, T: int, mode: str) -> Fields:
        skipped: dict[str, str] = {}
        sides: dict[str, Callable[[], Any]] = {}
        first: dict[str, float] = {}
        wrong: dict[str, dict[str, float]] = {}
        reference: dict[bool, Any] = {}
        for name in ("naive", *(s for s in INNER if s != "naive"), *LAYER):
            reason = self.refused(name, mode, B, T)
            if reason is not None:
                skipped[name] = reason
                continue
            for length in (2 * b, T) if "inductor" in name else (2 * b,):  # traced and compiled before the clock runs
                self._call(self.maker.make(name, B, length), mode)
            side = self.maker.make(name, B, T)
            results: list[Any] = []
            first[name] = seconds(lambda: results.extend(harness.growth(lambda: self._call(side, mode))))  # noqa: B023
            found, size = results
            self.took[name, mode, B, T] = first[name], size / 2**30
            if name != "sdpa":
                wrong[name] = errors(found, reference.setdefault(name in LAYER, found))
                bad = {n: e for n, e in wrong[name].items() if not e < TOLERANCE}
                if bad:
                    skipped[name] = f"disagrees: {bad}"
                    continue
            sides[name] = partial(self._call, side, mode)
        del reference
        gc.collect()
        samples: dict[str, list[float]] = {name: [] for name in ("gemm", *sides)}
        counts = {name: max(1, min(self.rounds, int(self.budget / first[name]))) for name in sides}
        for r in range(max([1, *counts.values()])):
            order = [name for name in sides if r < counts[name]]
            samples["gemm"].append(1e3 * seconds(lambda: self.A @ self.B))
            for name in order[r % len(order) :] + order[: r % len(order)]:
                samples[name].append(1e3 * seconds(sides[name]))
        return {
            "learner": self.maker.learner, "B": B, "T": T, "mode": mode, "threads": self.threads,
            "ms": {name: harness.summary(ts) for name, ts in samples.items()}, "ratios": ratios(samples),
            "relative_error": {name: float(f"{max(es.values()):.1e}") for name, es in wrong.items()},
            "skipped": skipped,
        }  # fmt: skip

    @staticmethod
    def _call(side: Side, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        return (side.forward(), {}) if mode == "f" else side.both()


# -- memory, compile time -------------------------------------------------------------------------------------------


def peak(maker: Maker, side: str, T: int) -> Fields:
    """Growth of this process's resident set over one forward + backward."""
    torch.set_num_threads(1)
    lengths = (8 * b, T) if side == "inductor" else (8 * b,)  # what is compiled is loaded before, for that length
    for length in lengths:
        maker.make(side, 1, length).both()
    run = maker.make(side, 1, T)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"learner": maker.learner, "side": side, "B": 1, "T": T, "peak_bytes": harness.growth(run.both)[1]}


def cold(maker: Maker, side: str, T: int) -> Fields:
    """First call of this process, its caches empty, and the calls after it."""
    torch.set_num_threads(1)
    run = maker.make(side, 1, T)
    times = [1e3 * seconds(run.both) for _ in range(4)]
    return {"learner": maker.learner, "side": side, "B": 1, "T": T, "calls_ms": [round(t, 1) for t in times]}


# -- one run --------------------------------------------------------------------------------------------------------


def work(job: Fields) -> None:
    """Do a worker's job: print one JSON line per result."""
    maker = Maker(job["learner"], job["official"])
    if job["what"] == "cases":
        timer = Timer(maker, job["threads"], job["rounds"], job["budget"])
        for B, T, mode in job["cases"]:
            print(json.dumps(timer.case(B, T, mode)), flush=True)
        return
    reason = maker.absent(job["side"])
    found = {"learner": job["learner"], "side": job["side"], "B": 1, "T": job["T"], "skipped": reason}
    print(json.dumps(found if reason else (peak if job["what"] == "memory" else cold)(maker, job["side"], job["T"])))


def results_of(job: Fields, caches: Path) -> Iterator[Fields]:
    """Run a job in a process of its own, with that folder for what is compiled, and yield its results as they come."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "DUALFORM_CACHE")
    environment = {"OMP_NUM_THREADS": str(job["threads"]), **dict.fromkeys(names, str(caches))}
    for one in harness.alone(["--worker", json.dumps(job)], environment):
        yield one | {"job": job} if "failed" in one else one


def source(official: str | None) -> Fields | None:
    if official is None:
        return None
    digest = hashlib.sha256(Path(official).read_bytes()).hexdigest()
    return {"file": "ttt.py of test-time-training/ttt-lm-pytorch", "sha256": digest}


def measure(args: argparse.Namespace) -> Fields:
    with tempfile.TemporaryDirectory() as folder:
        return measured(args, Path(folder))


def measured(args: argparse.Namespace, caches: Path) -> Fields:
    found: Fields = harness.about() | {
        "official": source(args.official),
        "settings": {"heads": H, "d": d, "chunk": b, "dtype": "float32", "rounds": args.rounds, "budget_s": args.budget},
        "cases": [], "memory": [], "compile": [], "failed": [],
    }  # fmt: skip
    lengths, batches = ((512,), (1,)) if args.quick else ((512, 2048, 8192), (1, 8))
    chosen = re.compile(args.cases)
    common = {"official": args.official, "rounds": args.rounds, "budget": args.budget, "threads": 1}

    def collect(part: str, where: str, **job: Any) -> int:
        """Do one job, compiled code in the folder `where`: it has its thread count built in;
        return how many results came."""
        before = len(found[part])
        for one in results_of({"what": part, **common, **job}, caches / where):
            found["failed" if "failed" in one else part].append(one)
            print(brief(one), flush=True)
            if not args.quick:
                args.output.write_text(harness.spelt(found) + "\n")
        return len(found[part]) - before

    for learner in BASE_RATE:
        for threads in args.threads if "time" in args.only else ():
            cases = [
                (B, T, mode)
                for B in batches for T in lengths for mode in ("f", "f+b")
                if chosen.search(f"{learner} B{B} T{T} {mode}")
            ]  # fmt: skip
            while cases:  # a worker that dies takes one case with it
                done = collect("cases", f"threads{threads}", learner=learner, threads=threads, cases=cases)
                cases = cases[done + 1 :]
        for T in (512,) if args.quick else (2048, 8192):
            if not chosen.search(f"{learner} B1 T{T} f+b"):
                continue
            for side in INNER if "memory" in args.only else ():
                for _ in range(1 if args.quick else 3):
                    collect("memory", "threads1", learner=learner, side=side, T=T)
            for side in OURS if "compile" in args.only and T < 8192 else ():
                collect("compile", f"cold-{learner}-{side}", learner=learner, side=side, T=T)
    return found


# -- report ---------------------------------------------------------------------------------------------------------


def ratio(case: Fields, other: str, ours: str) -> list[float] | None:
    """Quartiles over rounds of other's time / ours."""
    return case["ratios"].get(f"{other} / {ours}")


def show_ratio(q: list[float] | None) -> str:
    return "-" if q is None else f"{q[1]:.2f} ({q[0]:.2f}-{q[2]:.2f})"


def median(case: Fields, side: str) -> float | None:
    return case["ms"].get(side, {}).get("median")


def show_ms(case: Fields, side: str) -> str:
    t = median(case, side)
    return "-" if t is None else f"{t:.1f}" if t < 1000 else f"{t:.0f}"


def show_share(case: Fields, side: str) -> str:
    """The side's matrix work per second over that of a matrix product of size 1024, timed in the same rounds."""
    t, gemm = median(case, side), median(case, "gemm")
    if t is None or gemm is None:
        return "-"
    return f"{100 * flops(case['learner'], side, case['B'], case['T'], case['mode']) / t / (2 * 1024**3 / gemm):.1f}"


def brief(one: Fields) -> str:
    if "mode" not in one:
        return json.dumps(one)
    name = f"{one['learner']} B{one['B']} T{one['T']} {one['mode']}, {one['threads']} thread(s)"
    worst = max(one["relative_error"].values(), default=0.0)
    return (
        f"{name}: { ({s: show_ms(one, s) for s in one['ms']}) } ms, largest error {worst:.0e}, skipped {one['skipped']}"
    )


def per_case(cases: list[Fields], columns: dict[str, Callable[[Fields], str]]) -> str:
    """Spell a table with a row per case."""
    lines = [[c["learner"], c["B"], c["T"], c["mode"], c["threads"], *(f(c) for f in columns.values())] for c in cases]
    return harness.table(["learner", "B", "T", "pass", "threads", *columns], lines)


def report(found: Fields) -> str:
    """Render every table as Markdown."""
    cases, m = found["cases"], found["machine"]
    seen = {s for c in cases for s in c["ms"]} | {x["side"] for x in found["memory"] if "peak_bytes" in x}
    ours = {f"ours {s}": s for s in OURS if s in seen}
    sides = {"official": "official", "naive": "naive", "SDPA": "sdpa"} | ours
    rates = {
        n: statistics.median([2 * 1024**3 / c["ms"]["gemm"]["median"] / 1e6 for c in cases if c["threads"] == n])
        for n in sorted({c["threads"] for c in cases})
    }
    layers: dict[str, Callable[[Fields], str]] = {"official": lambda c: show_ms(c, "official layer")}
    for name, s in ours.items():
        layers[name] = lambda c, s=s: show_ms(c, f"{s} layer")
        layers[f"ratio to {name}"] = lambda c, s=s: show_ratio(ratio(c, "official layer", f"{s} layer"))
    beside = {f"{o} / {s}": (lambda c, o=o, s=s: show_ratio(ratio(c, o, s))) for s in ours.values() for o in INNER[:3]}
    text = [
        f"{m['processor']}, {m['cores']} cores ({m['vectors']}), torch {found['versions']['torch']}, commit "
        f"{found['commit'][:9]}{' and uncommitted changes' if found['uncommitted'] else ''}; load average "
        f"{m['load'][0]} before the run. "
        + "".join(f"Matrix products of size 1024, {n} thread(s): {rate:.0f} GF/s. " for n, rate in rates.items())
        + "\n",
        "Inner part: medians, ms.\n",
        per_case(cases, {name: (lambda c, s=s: show_ms(c, s)) for name, s in sides.items()}),
        "Time of the other over ours, median (quartiles) over rounds; more than 1: ours is faster.\n",
        per_case(cases, beside),
        "Share of the matrix-product rate, %. Every side is credited with the same work, a recomputed forward pass "
        "included.\n",
        per_case(cases, {name: (lambda c, s=s: show_share(c, s)) for name, s in sides.items()}),
        "Whole layer (projections, convolutions, rotary positions, norm, gate): medians, ms, and official / ours.\n",
        per_case(cases, layers),
    ]
    if found["memory"]:
        at = sorted({(x["learner"], x["T"]) for x in found["memory"]})
        peaks = [[n, T, *(show_peak(found, n, s, T) for s in sides.values())] for n, T in at]
        text += [
            "Peak memory of forward + backward above the inputs (q, k, v, gates and the output's gradient), B 1, "
            "MiB.\n",
            harness.table(["learner", "T", *sides], peaks),
        ]
    if found["compile"]:
        cold = [[x["learner"], x["T"], x["side"], compile_seconds(x)] for x in found["compile"] if not x.get("skipped")]
        text += [
            "First forward + backward of a process with empty caches, less a later one, B 1, s.\n",
            harness.table(["learner", "T", "backend", "s"], cold),
        ]
    return "\n".join([*text, "Goals.\n", "\n".join(f"- {line}" for line in goals(found)), ""])


def compile_seconds(one: Fields) -> float:
    return (one["calls_ms"][0] - statistics.median(one["calls_ms"][1:])) / 1e3


def peaks(found: Fields, learner: str, side: str, T: int) -> list[float]:
    here = [x for x in found["memory"] if (x["learner"], x["side"], x["T"]) == (learner, side, T)]
    return [x["peak_bytes"] / 2**20 for x in here if "peak_bytes" in x]


def show_peak(found: Fields, learner: str, side: str, T: int) -> str:
    low, middle, high = quartiles(peaks(found, learner, side, T) or [float("nan")])
    return "-" if middle != middle else f"{middle:.0f} ({low:.0f}-{high:.0f})"


# (learner, backend, other, T, at least): forward + backward, B 1, 1 thread
SPEED = [
    ("TTT-Linear", "eager", "official", 2048, 3.0), ("TTT-Linear", "eager", "official", 8192, 10.0),
    ("TTT-MLP", "eager", "official", 2048, 2.0), ("TTT-MLP", "eager", "official", 8192, 5.0),
    ("TTT-Linear", "eager", "naive", 2048, 1.7), ("TTT-MLP", "eager", "naive", 2048, 1.4),
    ("TTT-Linear", "inductor", "official", 2048, 4.5), ("TTT-Linear", "inductor", "official", 2048, 7.0),
    ("TTT-MLP", "inductor", "official", 2048, 2.8),
]  # fmt: skip
MEMORY = [("TTT-Linear", 210), ("TTT-MLP", 280), ("TTT-Linear", 105), ("TTT-MLP", 140)]
STRETCH = {("TTT-Linear", "inductor", "official", 2048, 7.0), ("TTT-Linear", 105), ("TTT-MLP", 140)}


# Generated C++, at every thread count: (learner, other, B, at least), forward + backward, T 2048
GENERATED = [
    ("TTT-Linear", "official", 1, 25.0), ("TTT-Linear", "naive", 1, 12.0), ("TTT-Linear", "naive", 8, 5.5),
    ("TTT-MLP", "official", 1, 8.0), ("TTT-MLP", "naive", 1, 5.0),
]  # fmt: skip
SHARES = [(40.0, ""), (60.0, " (stretch)")]
AHEAD_OF_ATTENTION = {
    "TTT-Linear": 512,
    "TTT-MLP": 2048,
}  # from this T on (asked: 4096 for the MLP, which is not measured)
GENERATED_PEAK, SECOND_THREAD = 50, 1.8


def goals_of_generated(found: Fields) -> Iterator[str]:
    """Compare the generated code with what was asked of it, case by case."""
    cases = [c for c in found["cases"] if c["ms"].get("cpp")]
    for c in cases:
        for least, kind in SHARES:
            share = show_share(c, "cpp")
            what = f"{' '.join(name(c))}: ours cpp at least {least:g} % of the product rate{kind}"
            yield verdict(what, None if share == "-" else float(share) >= least, share)
    for c in cases:
        same = {k: c[k] for k in ("learner", "B", "T", "mode")} | {"threads": 1}
        one = next((x for x in cases if same.items() <= x.items()), None)
        if c["threads"] == 2 and one is not None:
            gain = (median(one, "cpp") or 0.0) / (median(c, "cpp") or 1.0)
            what = f"{' '.join(name(c)[:-1])}: a second thread makes ours cpp at least {SECOND_THREAD} times as fast"
            yield verdict(what, gain >= SECOND_THREAD, f"{gain:.2f}")
    for threads in sorted({c["threads"] for c in found["cases"]}):
        for learner, other, B, least in GENERATED:
            wanted = {"learner": learner, "B": B, "T": 2048, "mode": "f+b", "threads": threads}
            case = next((c for c in cases if wanted.items() <= c.items()), None)
            q = ratio(case, other, "cpp") if case else None
            what = f"{learner} B{B} T2048 f+b, {threads} thread(s): {other} / ours cpp at least {least}"
            yield verdict(what, q and q[1] >= least, show_ratio(q))
    for c in cases:
        if c["T"] >= AHEAD_OF_ATTENTION[c["learner"]]:
            q = ratio(c, "sdpa", "cpp")
            yield verdict(f"{' '.join(name(c))}: ours cpp ahead of causal attention", q and q[1] >= 1, show_ratio(q))
    for learner in BASE_RATE:
        sizes = peaks(found, learner, "cpp", 8192)
        what = f"{learner} T 8192: peak of ours cpp at most {GENERATED_PEAK} MiB"
        yield verdict(what, sizes and quartiles(sizes)[1] <= GENERATED_PEAK, show_peak(found, learner, "cpp", 8192))


def name(case: Fields) -> list[str]:
    return [case["learner"], f"B{case['B']}", f"T{case['T']}", case["mode"], f"{case['threads']} thread(s)"]


def goals(found: Fields) -> list[str]:
    """Compare what was measured with what was asked: one line each."""
    lines = []
    for goal in SPEED:
        learner, ours, other, T, least = goal
        wanted = {"learner": learner, "B": 1, "T": T, "mode": "f+b", "threads": 1}
        case = next((c for c in found["cases"] if wanted.items() <= c.items()), None)
        q = ratio(case, other, ours) if case else None
        what = f"{learner} T {T}: {other} / ours {ours} at least {least}{' (stretch)' if goal in STRETCH else ''}"
        lines.append(verdict(what, q and q[1] >= least, show_ratio(q)))
    for goal in MEMORY:
        learner, most = goal
        for side in OURS:
            sizes = peaks(found, learner, side, 8192)
            what = f"{learner} T 8192: peak of ours {side} at most {most} MiB{' (stretch)' if goal in STRETCH else ''}"
            lines.append(verdict(what, sizes and quartiles(sizes)[1] <= most, show_peak(found, learner, side, 8192)))
    for learner in BASE_RATE:
        here = [x for x in found["compile"] if (x["learner"], x["side"]) == (learner, "inductor") and "calls_ms" in x]
        seconds = [compile_seconds(x) for x in here]
        what = f"{learner}: cold compile of inductor under 75 s"
        lines.append(verdict(what, seconds and max(seconds) < 75, f"{max(seconds):.0f} s" if seconds else "-"))
    return [*lines, *goals_of_generated(found)]


def verdict(what: str, holds: Any, value: str) -> str:
    return f"{'not measured' if holds is None or holds == [] else 'pass' if holds else 'miss'}: {what}; found {value}"


def main() -> int:
    only = ["time", "memory", "compile"]
    # official: path of the official ttt.py; cases: a regular expression on names like 'TTT-MLP B8 T2048 f+b'; budget:
    # seconds a side
    defaults = {
        "official": str,
        "quick": False,
        "cases": "",
        "only": only,
        "threads": [1, 2],
        "rounds": 7,
        "budget": 40.0,
    }
    args = harness.options(__doc__, **defaults, worker=str)
    if args.worker:
        work(json.loads(args.worker))
        return 0
    if args.quick:  # T 512, B 1, three rounds; the results stay as they are
        args.rounds, args.output = min(3, args.rounds), Path(tempfile.gettempdir()) / "cpu_ttt.json"
    found = harness.main(measure, report, args)
    wrong = [r for c in found["cases"] for r in c["skipped"].values() if r.startswith("disagrees")]
    return 1 if wrong or found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

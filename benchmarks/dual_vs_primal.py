"""Time and memory of the dual and the primal form of one mini-batch, over chunk and width, beside the cost model's choice.

    python benchmarks/dual_vs_primal.py [--quick]      writes benchmarks/results/dual_vs_primal.json and .md

Sides, in the same process, alternating: `primal`, the vectorised definition (vmap of grad, running sums of every weight,
vmap of the learner: per-token weights are materialised); `dual`, our program with form="dual"; `auto`, with form="auto".
Each is measured forward and forward + backward (gradients to q, k, v and the initial weights).
The paper (Sun et al. 2024, section 2.5) says of its JAX code that the dual form is more than 5x faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import dualform as df

RESULT = Path(__file__).parent / "results" / "dual_vs_primal.json"
LIMIT = 3e8  # bytes of per-token weights beyond which the primal side is not run


class Kronecker(nn.Module):
    """x (A kron B), A and B of width sqrt(d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.side = math.isqrt(dim)
        self.A = nn.Parameter(0.02 * torch.randn(self.side, self.side))
        self.B = nn.Parameter(0.02 * torch.randn(self.side, self.side))

    def forward(self, x):
        grid = x.unflatten(-1, (self.side, self.side))
        return torch.einsum("tij,ik,jl->tkl", grid, self.A, self.B).flatten(-2)


LEARNERS = {
    "TTT-Linear": df.learners.residual_norm(df.learners.Linear()),
    "TTT-MLP": df.learners.residual_norm(df.learners.MLP(depth=2, expand=4)),
    "SwiGLU": df.learners.SwiGLU(expand=4),
    "Kronecker": Kronecker,
}


def primal(learner, rate):
    """Materialise every token's weights, all tokens at once."""
    patterns = getattr(learner, "slow", ())
    slow = {n: p for n, p in learner.named_parameters() if any(n.startswith(s.rstrip("*")) for s in patterns)}

    def run(theta, q, k, v):
        def predict(theta, x):
            return functional_call(learner, {**slow, **theta}, (x[None],))[0]

        def loss(theta, x, y):
            return 0.5 * (predict(theta, x) - y).square().sum()

        g = vmap(grad(loss), in_dims=(None, 0, 0))(theta, k, v)
        i = torch.arange(1, len(q) + 1)
        per_token = {}
        for name, w in theta.items():
            mean = g[name].cumsum(0) / i.reshape(-1, *[1] * w.ndim)
            per_token[name] = w - rate * mean
        return vmap(predict)(per_token, q)

    return run


def peak(function):
    """Return the growth of the resident set while a function runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")

    def read(field):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) * 1024

    before = read("VmRSS")
    function()
    return max(0, read("VmHWM") - before)


def measure(sides, repeats):
    """Time the sides in turn; return per side all samples in ms and the peak memory."""
    times = {name: [] for name in sides}
    for f in sides.values():
        f()
    memory = {name: peak(f) for name, f in sides.items()}
    for _ in range(repeats):
        for name, f in sides.items():
            start = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"ms": [round(t, 4) for t in times[name]], "peak_bytes": memory[name]} for name in sides}


def case(name, d, chunk, repeats):
    torch.manual_seed(0)
    learner = LEARNERS[name](d)
    rate = 0.1
    program = df.derive(learner, df.objectives.Squared(), df.rules.SGD(lr=rate, averaged=True), chunk=chunk)
    q, k, v = (torch.randn(chunk, d, requires_grad=True) for _ in range(3))
    theta = {n: p.detach().requires_grad_() for n, p in program.parts.fast.items()}
    size = sum(p.numel() for p in theta.values()) * 4 * chunk
    run = primal(learner, rate)

    def ours(form):
        o, _ = program(*(x[None, :, None] for x in (q, k, v)), params=theta, form=form)
        return o[0, :, 0]

    feasible = size < LIMIT
    forward, both = {}, {}
    sides = {"primal": lambda: run(theta, q, k, v)} if feasible else {}
    sides |= {"dual": lambda: ours("dual"), "auto": lambda: ours("auto")}
    if feasible:
        torch.testing.assert_close(ours("dual"), run(theta, q, k, v), rtol=1e-3, atol=1e-4)
    for side, f in sides.items():

        def silent(f=f):
            with torch.no_grad():
                f()

        def train(f=f):
            torch.autograd.grad(f().square().sum(), [q, k, v, *theta.values()])

        forward[side], both[side] = silent, train
    return {
        "learner": name,
        "d": d,
        "chunk": chunk,
        "per_token_weights_bytes": size,
        "forms": {f"{c.site}:{c.leaf}": c.form for c in program.sites},
        "forward": measure(forward, repeats),
        "forward_backward": measure(both, repeats),
    }


def table(results):
    """Render the cases as Markdown: medians, ratios and the cost model's choices."""
    lines = [
        "| learner | d | chunk | f: primal ms | dual ms | ratio | f+b: primal ms | dual ms | ratio | auto ms | peak f+b, MiB: primal / dual | auto takes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in results["cases"]:

        def med(part, side, c=c):
            got = c[part].get(side)
            return statistics.median(got["ms"]) if got else None

        def show(x):
            return "-" if x is None else f"{x:.2f}"

        row = [c["learner"], str(c["d"]), str(c["chunk"])]
        for part in ("forward", "forward_backward"):
            p, q = med(part, "primal"), med(part, "dual")
            row += [show(p), show(q), "-" if p is None else f"{p / q:.1f}x"]
        mib = [c["forward_backward"].get(s) for s in ("primal", "dual")]
        row += [show(med("forward_backward", "auto"))]
        row += [" / ".join("-" if m is None else f"{m['peak_bytes'] / 2**20:.1f}" for m in mib)]
        row += [", ".join(sorted(set(c["forms"].values())))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write(cases, quick):
    """Store what was measured so far, with the machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULT.parent
    ).stdout.strip()
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "cases": cases,
    }
    if not quick:
        RESULT.write_text(json.dumps(results, indent=1))
        RESULT.with_suffix(".md").write_text(table(results) + "\n")
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    chunks, widths = ([1, 16], [16]) if quick else ([1, 16, 128, 1024], [16, 64, 256])
    done = json.loads(RESULT.read_text())["cases"] if RESULT.exists() and not quick else []  # a cut run goes on
    cases = list(done)
    for name in LEARNERS:
        for d in widths:
            for chunk in chunks:
                if any((c["learner"], c["d"], c["chunk"]) == (name, d, chunk) for c in done):
                    continue
                cases.append(case(name, d, chunk, 3 if chunk * d >= 65536 else 7))
                last = cases[-1]["forward_backward"]
                print(name, d, chunk, {s: round(statistics.median(x["ms"]), 2) for s, x in last.items()}, flush=True)
                write(cases, quick)
    print(table(write(cases, quick)))


if __name__ == "__main__":
    main()

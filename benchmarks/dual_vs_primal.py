"""Time and memory of the dual and the primal form of one mini-batch, by chunk, width, beside the cost model's choice.

    python benchmarks/dual_vs_primal.py [--quick] [--again]      writes benchmarks/results/dual_vs_primal.json and .md

Sides, in the same process, alternating: `primal`, the vectorised definition (vmap of grad, running sums of every
weight, vmap of the learner: per-token weights are materialised); `dual`, our program with form="dual"; `auto`, with
form="auto". Each is measured forward and forward + backward (gradients to q, k, v and the initial weights). The paper
(Sun et al. 2024, section 2.5) says of its JAX code that the dual form is more than 5x faster.
"""

from __future__ import annotations

import json
import math

import harness
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import dualform as df

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


def timed(sides, repeats):
    """Return per side its times in ms and its peak of memory; the sides take turns."""
    for f in sides.values():
        f()
    peaks = {name: harness.growth(f)[1] for name, f in sides.items()}
    times = harness.alternating(sides, repeats, warm=0)
    return {name: {"ms": harness.summary(times[name], 1e3), "peak_bytes": peaks[name]} for name in sides}


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
        "forward": timed(forward, repeats),
        "forward_backward": timed(both, repeats),
    }


def report(found):
    """Render the cases as Markdown: medians, ratios and the cost model's choices."""
    header = "learner | d | chunk | f: primal ms | dual ms | ratio | f+b: primal ms | dual ms | ratio | auto ms"
    rows = []
    for c in found["cases"]:
        row = [c["learner"], c["d"], c["chunk"]]
        for part in ("forward", "forward_backward"):
            p, q = (c[part][side]["ms"]["median"] if side in c[part] else None for side in ("primal", "dual"))
            row += [p, q, "-" if p is None else f"{p / q:.1f}x"]
        both = c["forward_backward"]
        mib = [f"{both[s]['peak_bytes'] / 2**20:.1f}" if s in both else "-" for s in ("primal", "dual")]
        rows.append([*row, both["auto"]["ms"]["median"], " / ".join(mib), ", ".join(sorted(set(c["forms"].values())))])
    names = [*header.split(" | "), "peak f+b, MiB: primal / dual", "auto takes"]
    return harness.table(names, rows, digits=2)


def measure(options):
    torch.set_num_threads(1)
    chunks, widths = ([1, 16], [16]) if options.quick else ([1, 16, 128, 1024], [16, 64, 256])
    goes_on = options.output.exists() and not options.quick and not options.again
    found = json.loads(options.output.read_text()) if goes_on else harness.about() | {"cases": []}
    done = {(c["learner"], c["d"], c["chunk"]) for c in found["cases"]}
    for name in LEARNERS:
        for d in widths:
            for chunk in chunks:
                if (name, d, chunk) not in done:
                    found["cases"].append(case(name, d, chunk, 3 if chunk * d >= 65536 else 7))
                    last = found["cases"][-1]["forward_backward"]
                    print(name, d, chunk, {s: x["ms"]["median"] for s, x in last.items()}, flush=True)
                    if not options.quick:
                        harness.write(options.output, found, report)
    return found


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, quick=False, again=False))

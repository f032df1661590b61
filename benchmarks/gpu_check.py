"""The same programs on a GPU: equal to the CPU's in float64, and how long a layer's step takes.

python benchmarks/gpu_check.py [--rounds 5] [--lengths 512 2048]      writes benchmarks/results/gpu_check.json and .md; needs CUDA
"""

from __future__ import annotations

import sys

import harness
import torch

import dualform as df

LEARNERS = {
    "TTT-Linear": df.learners.residual_norm(df.learners.Linear()),
    "TTT-MLP": df.learners.residual_norm(df.learners.MLP(depth=2, expand=4)),
    "SwiGLU": df.learners.SwiGLU(expand=2),
    "low rank": df.learners.LowRank(rank=4),
}
RULES = {
    "averaged": df.rules.SGD(lr=0.1, averaged=True),
    "Titans": df.rules.SGD(lr=0.01, momentum=0.5, decay=0.05),
}


def agreement(spec, rule, dtype):
    """Compare outputs, state and gradients on CUDA with the CPU's, padding, resets and a carried state included."""
    torch.manual_seed(0)
    learner = spec(16).to(dtype)
    program = df.derive(learner, df.objectives.Squared(), rule, chunk=8)
    B, T, H = 2, 37, 3
    x = {name: torch.randn(B, T, H, 16, dtype=dtype) for name in "qkv"}
    mask, reset = torch.rand(B, T) > 0.2, torch.rand(B, T) > 0.9
    results = []
    for device in ("cpu", "cuda"):
        inputs = {n: t.to(device).requires_grad_() for n, t in x.items()}
        o, state = program(**inputs, mask=mask.to(device), reset=reset.to(device))
        o2, state = program(**inputs, state=state)
        scalar = (o.sin().sum() + o2.sin().sum() + sum(w.square().sum() for w in state.anchor.values())).sum()
        grads = torch.autograd.grad(scalar, [*inputs.values(), *learner.parameters()])
        results.append([t.detach().cpu() for t in (o, o2, *state.anchor.values(), *grads)])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*results, strict=True))


def milliseconds(run):
    """Time one call by the device's clock."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def timings(spec, T, dtype, rounds):
    """Milliseconds of a layer's inner program, forward and forward + backward, B 8, H 12, d 64, mini-batch 16."""
    learner = spec(64).cuda()
    program = df.derive(learner, df.objectives.Squared(), RULES["averaged"], chunk=16)
    q, k, v = (torch.randn(8, T, 12, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))

    def forward():
        with torch.no_grad():
            program(q, k, v)

    def both():
        o, _ = program(q, k, v)
        torch.autograd.grad(o.float().square().sum(), [q, k, v, *program.parts.fast.values()])

    sides = {"forward": forward, "forward_backward": both}
    found = {n: harness.summary(x) for n, x in harness.alternating(sides, rounds, clock=milliseconds).items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    return found | {"peak_bytes_forward_backward": torch.cuda.max_memory_allocated() - before}


def distance(f, *inputs):
    """Largest difference of f on CUDA from f on the CPU, relative to the larger of 1 and the largest entry."""
    here, there = f(*inputs), f(*(x.cuda() for x in inputs)).cpu()
    return float(((here - there).abs().max() / here.abs().max().clamp(min=1)).detach())


def functions():
    """Every expansion and reconciliation in float64, and structured derivatives: CUDA against CPU."""
    torch.manual_seed(0)
    found = {}
    for name in df.expansions.names():
        low, high = df.expansions[name]().domain
        m = 4 if name in ("geometric", "cuboid_patch", "cylinder_patch", "sphere_patch") else 6
        x = low + (high - low) * torch.rand(7, m, dtype=torch.float64)
        found[f"expansion {name}"] = distance(df.expansions[name](), x)
    for name in df.reconciliations.names():
        head = df.Head(6, 4, expansion=("taylor", {"degree": 2}), reconciliation=name).double()
        found[f"reconciliation {name}"] = distance(
            lambda x, h=head: h.to(x.device)(x), torch.randn(5, 6, dtype=torch.float64)
        )
    maps = {
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (5,)),
        "x x^T": lambda x: x @ x.T,
        "sort": lambda x: x.sort(-1)[0],
        "broadcast": lambda x: x[1:] + x[:1],
    }
    for name, f in maps.items():
        found[f"derivative of {name}"] = distance(
            lambda x, f=f: df.jacobian(f, x).dense(), torch.randn(4, 5, dtype=torch.float64)
        )
    return found


def digits():
    """Accuracy on a held-out quarter of digits, and seconds, of the estimator's defaults on each device."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    X, y = load_digits(return_X_y=True)
    train, test, a, b = train_test_split(X, y, random_state=0)
    scale = StandardScaler().fit(train)
    found = {}
    for device in ("cpu", "cuda"):
        model = df.RPNClassifier(random_state=0, device=device)
        spent = harness.seconds(lambda: model.fit(scale.transform(train), a))  # noqa: B023
        found[device] = {"accuracy": model.score(scale.transform(test), b), "seconds": round(spent, 1)}
    return found


def measure(options):
    if not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device; expected one. Run this where there is a GPU.")
    torch.backends.cuda.matmul.allow_tf32 = False
    errors = {}
    for name, spec in LEARNERS.items():
        for rule_name, rule in RULES.items():
            for dtype in (torch.float64, torch.float32):
                errors[f"{name}, {rule_name}, {dtype}"] = agreement(spec, rule, dtype)
                print(name, rule_name, dtype, errors[f"{name}, {rule_name}, {dtype}"], flush=True)
    assert all(e < (1e-10 if "float64" in n else 1e-3) for n, e in errors.items()), errors
    others = functions()
    print(max(others.items(), key=lambda x: x[1]))
    assert all(e < 1e-10 for e in others.values()), others
    times = {}
    for name in ("TTT-Linear", "TTT-MLP"):
        for T in options.lengths:
            what = f"{name} B8 T{T} H12 d64 chunk16 bfloat16 in, float32 state"
            times[what] = timings(LEARNERS[name], T, torch.bfloat16, options.rounds)
            print(what, times[what], flush=True)
    return {
        "relative_error_cuda_against_cpu": errors, "milliseconds": times, "functions": others, "digits": digits(),
    }  # fmt: skip


def report(found):
    times = [
        [what, *(x[way]["median"] for way in ("forward", "forward_backward")), x["peak_bytes_forward_backward"] / 2**20]
        for what, x in found["milliseconds"].items()
    ]
    errors = found["relative_error_cuda_against_cpu"] | found["functions"]
    doubles = {n: e for n, e in errors.items() if "float32" not in n}
    worst = max(doubles, key=doubles.__getitem__)
    digits = ", ".join(f"{device} {x['accuracy']:.3f} in {x['seconds']} s" for device, x in found["digits"].items())
    head = (
        f"{found['machine']['gpu']}, torch {found['versions']['torch']}. Largest difference of {len(doubles)} in "
        "float64: "
    )
    head += f"{doubles[worst]:.1e} ({worst}). Digits: {digits}.\n\n"
    return head + harness.table(["what", "forward, ms", "forward + backward, ms", "peak, MiB"], times)


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, rounds=5, lengths=[512, 2048]))

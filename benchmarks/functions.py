"""Functions beside the obvious PyTorch and beside tinyBIG: time of both directions, peak memory, code size.

    python benchmarks/functions.py [--tinybig FOLDER [--interpreter PYTHON]] [--only REGEX] [--append] [--rounds N]

FOLDER holds the package `tinybig` (0.2.1: `pip download --no-deps tinybig==0.2.1`, unzipped). Its side runs in a
process of its own, under any interpreter with torch, numpy, scipy and scikit-learn; what else it imports is stubbed.
All sides take turns; times are minima of process CPU time, one thread. Outputs are compared before anything is timed
where both define the same function. Memory is the peak of what torch allocates during one forward and backward.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row: how each side is built, from shared sizes. `tinybig` is Python for the other process; m, n,
    b are its sizes."""

    name: str
    b: int
    m: int
    n: int
    ours: Callable[[Case], nn.Module]
    obvious: Callable[[Case], nn.Module]
    tinybig: str
    need: Callable[[Case], float] | None = None  # numbers that must exist at once in forward and backward
    equal: bool = True  # the same parameters give the same function in ours and the obvious one


def bound(catalogue: str, name: str, **options: Any) -> Any:
    import dualform as df

    return getattr(df, catalogue)[name](**options)


class Expand(nn.Module):
    def __init__(self, e: Any) -> None:
        super().__init__()
        self.e = e.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.e(x)


class Plain(nn.Module):
    """A function of x, as a module."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Weighed(nn.Module):
    """The obvious head: expand, build the matrix, multiply."""

    def __init__(self, l: int, expand: Callable[[Tensor], Tensor], matrix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(l))
        self.expand, self.matrix = expand, matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.expand(x), self.matrix(self.w))


# -- the obvious formulations
# --------------------------------------------------------------------------------------------


def taylor2(x: Tensor) -> Tensor:
    return torch.cat([x, (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)], -1)


def legendre(d: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        found = [torch.ones_like(x), x]
        for n in range(1, d):
            found.append(((2 * n + 1) * x * found[n] - n * found[n - 1]) / (n + 1))
        return torch.stack(found[1:], -1).flatten(-2)

    return run


def chebyshev(d: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        found = [torch.ones_like(x), x]
        for _ in range(1, d):
            found.append(2 * x * found[-1] - found[-2])
        return torch.stack(found[1:], -1).flatten(-2)

    return run


def bspline(t: int, d: int) -> Callable[[Tensor], Tensor]:
    """Cox and de Boor over every interval, as the common KAN packages do."""
    h = 2 / t
    knots = torch.tensor([-1 + h * k for k in range(-d, t + d + 1)])

    def run(x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        basis = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
        for k in range(1, d + 1):
            left = (x - knots[: -(k + 1)]) / (knots[k:-1] - knots[: -(k + 1)])
            right = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k])
            basis = left * basis[..., :-1] + right * basis[..., 1:]
        return basis.flatten(-2)

    return run


def rbf(count: int) -> Callable[[Tensor], Tensor]:
    centres = torch.linspace(-1, 1, count)
    return lambda x: torch.exp(-((x.unsqueeze(-1) - centres) ** 2)).flatten(-2)


def ricker(s: int, t: int) -> Callable[[Tensor], Tensor]:
    scale = 2 / (math.sqrt(3) * math.pi**0.25)

    def run(x: Tensor) -> Tensor:
        found = []
        for k in range(s):
            for shift in range(t):
                tau = x / 2.0**k - shift
                found.append(scale * (1 - tau**2) * torch.exp(-(tau**2) / 2) / math.sqrt(2.0**k))
        return torch.stack(found, -1).flatten(-2)

    return run


def normal(x: Tensor) -> Tensor:
    theta = [(0, 1), (1, 1), (-1, 1), (0, 0.1), (1, 0.1), (-1, 0.1)]
    return torch.cat([torch.distributions.Normal(float(mu), float(s)).log_prob(x) for mu, s in theta], -1)


def gamma(x: Tensor) -> Tensor:
    s = 0.99 * torch.sigmoid(x) + 0.001
    theta = [(0.5, 1), (0.5, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    return torch.cat([torch.distributions.Gamma(float(a), float(r)).log_prob(s) for a, r in theta], -1)


def low_rank(n: int, D: int, r: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w[: n * r].view(n, r) @ w[n * r :].view(r, D)


def kron(p: int, q: int, s: int, t: int) -> Callable[[Tensor], Tensor]:
    return lambda w: torch.kron(w[: p * q].view(p, q), w[p * q :].view(s, t))


def lphm(p: int, q: int, s: int, t: int, r: int) -> Callable[[Tensor], Tensor]:
    a, b = p * q, p * q + s * r
    return lambda w: torch.kron(w[:a].view(p, q), w[a:b].view(s, r) @ w[b:].view(r, t))


def dual_lphm(p: int, q: int, s: int, t: int, r: int) -> Callable[[Tensor], Tensor]:
    sizes = [(p, r), (r, q), (s, r), (r, t)]

    def run(w: Tensor) -> Tensor:
        P, Q, S, T = (x.view(shape) for x, shape in zip(w.split([a * b for a, b in sizes]), sizes, strict=True))
        return torch.kron(P @ Q, S @ T)

    return run


def frozen(name: str, n: int, D: int, **options: Any) -> dict[str, Tensor]:
    return bound("reconciliations", name, **options).constants(n, D)


def vera(n: int, D: int, r: int) -> Callable[[Tensor], Tensor]:
    c = frozen("random_matrix_adaption", n, D, rank=r)
    return lambda w: torch.diag(w[:n]) @ c["A"] @ torch.diag(w[n:]) @ c["B"].T


def hypernet(n: int, D: int, l: int, h: int) -> Callable[[Tensor], Tensor]:
    c = frozen("hypernet", n, D, l=l, hidden_dim=h)

    def run(w: Tensor) -> Tensor:
        hidden = torch.sigmoid(F.linear(w, c["net.0.weight"], c["net.0.bias"]))
        return F.linear(hidden, c["net.2.weight"], c["net.2.bias"]).view(n, D)

    return run


class ObviousKAN(nn.Module):
    """Cox and de Boor, two matrices per layer."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        pairs = list(zip(dims, dims[1:], strict=False))
        self.splines = nn.ParameterList(nn.Parameter(torch.randn(n, m * 8) * (m * 8) ** -0.5) for m, n in pairs)
        self.bases = nn.ParameterList(nn.Parameter(torch.randn(n, m) * m**-0.5) for m, n in pairs)
        self.basis = bspline(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for spline, base in zip(self.splines, self.bases, strict=True):
            x = F.linear(self.basis(x), spline) + F.linear(F.silu(x), base)
        return x


# -- the cases
# -----------------------------------------------------------------------------------------------------------


def expanding(
    name: str, b: int, obvious: Callable[[Tensor], Tensor], theirs: str, width: float, **options: Any
) -> Case:
    """An expansion alone. It must hold its D features, the gradient of each, and that of x."""
    spec = options.pop("spec", name.split()[0])
    return Case(
        name, b, 784, 0,
        lambda c: Expand(bound("expansions", spec, **options)), lambda c: Plain(obvious), f"Expand({theirs})",
        lambda c: c.b * c.m * (2 * width + 1),
        equal=spec not in ("normal", "gamma", "ricker_wavelet"),
    )  # fmt: skip


def weighing(
    name: str, b: int, m: int, n: int, expansion: str, psi: tuple[str, dict[str, Any]],
    matrix: Callable[[Case, int], Callable[[Tensor], Tensor]], theirs: str, need: Callable[[Case], float] | None = None,
) -> Case:  # fmt: skip
    import dualform as df

    def ours(c: Case) -> nn.Module:
        return df.Head(c.m, c.n, expansion=expansion, reconciliation=psi, bias=False)

    def obvious(c: Case) -> nn.Module:
        D = c.m + c.m**2 if expansion == "taylor" else c.m
        l = df.reconciliations.build(psi).length(c.n, D)
        return Weighed(l, taylor2 if expansion == "taylor" else lambda x: x, matrix(c, D))

    return Case(name, b, m, n, ours, obvious, theirs, need, equal=not psi[0].startswith("hypernet"))


def head_need(numbers: Callable[[Case], float]) -> Callable[[Case], float]:
    """Gradient of x, the output and its gradient, and what the case itself must hold: gradient of w,
    factors of kappa, products."""
    return lambda c: c.b * (c.m + 2 * c.n) + numbers(c)


def all_cases() -> list[Case]:
    import dualform as df

    D = 4704
    both = (64, 512)
    cases = [
        *(expanding(f"legendre d=5 b={b}", b, legendre(5), "legendre_expansion(d=5)", 5, degree=5) for b in both),
        *(expanding(f"chebyshev d=5 b={b}", b, chebyshev(5), "chebyshev_expansion(d=5)", 5, degree=5) for b in both),
        *(expanding(f"bspline t=5 d=3 b={b}", b, bspline(5, 3), "bspline_expansion(t=5, d=3)", 8) for b in both),
        *(expanding(f"gaussian_rbf 10 b={b}", b, rbf(10), "gaussian_rbf_expansion()", 10) for b in both),
        *(
            expanding(f"ricker s=3 t=3 b={b}", b, ricker(3, 3), "ricker_wavelet_expansion(a=2.0, s=3, t=3)", 9,
                      spec="ricker_wavelet", **wavelet_options()) for b in both
        ),
        *(expanding(f"normal b={b}", b, normal, "normal_expansion()", 6) for b in both),
        *(expanding(f"gamma b={b}", b, gamma, "gamma_expansion()", 6) for b in both),
        expanding("taylor d=2 b=64", 64, taylor2, "taylor_expansion(d=2)", 785, degree=2),
        weighing("taylor d=2, identity", 64, 784, 64, "taylor", ("identity", {}), lambda c, D: lambda w: w.view(c.n, D),
                 "Head(taylor_expansion(d=2), identity_reconciliation())",
                 head_need(lambda c: c.n * 784 * 785 + c.b * (c.n + 1) * 785)),
        weighing("taylor d=2, "
        "low rank 2", 64, 784, 64, "taylor", ("low_rank", {"rank": 2}), lambda c, D: low_rank(c.n, D, 2),
                 "Head(taylor_expansion(d=2), lorr_reconciliation(r=2))",
                 head_need(lambda c: 2 * (c.n + 784 * 785) + c.b * 3 * 785)),
        weighing("taylor d=2, "
        "hm 8x785", 64, 784, 64, "taylor", ("hm", {"p": 8, "q": 785}), lambda c, D: kron(8, 785, 8, 784),
                 "Head(taylor_expansion(d=2), hm_reconciliation(p=8, q=785))",
                 head_need(lambda c: 8 * (785 + 784) + c.b * (785 + 32))),
        weighing("low rank 8", 256, D, 256, "identity", ("low_rank", {"rank": 8}), lambda c, D: low_rank(c.n, D, 8),
                 "Head(identity_expansion(), lorr_reconciliation(r=8))",
                 head_need(lambda c: 8 * (c.n + D) + 2 * c.b * 8)),
        weighing("hm 16x48", 256, D, 256, "identity", ("hm", {"p": 16, "q": 48}), lambda c, D: kron(16, 48, 16, 98),
                 "Head(identity_expansion(), hm_reconciliation(p=16, q=48))",
                 head_need(lambda c: 16 * 48 + 16 * 98 + 2 * c.b * 48 * 16 + c.b * c.m)),
        weighing("lphm 16x48 r=4", 256, D, 256, "identity", ("lphm", {"p": 16, "q": 48, "rank": 4}),
                 lambda c, D: lphm(16, 48, 16, 98, 4),
                 "Head(identity_expansion(), lphm_reconciliation(p=16, q=48, r=4))",
                 head_need(lambda c: 2000 + 2 * c.b * 48 * 4 + 2 * c.b * 64)),
        weighing("dual_lphm 16x48 r=4", 256, D, 256, "identity", ("dual_lphm", {"p": 16, "q": 48, "rank": 4}),
                 lambda c, D: dual_lphm(16, 48, 16, 98, 4),
                 "Head(identity_expansion(), dual_lphm_reconciliation(p=16, q=48, r=4))",
                 head_need(lambda c: 1000 + 2 * c.b * 48 * 4 + 2 * c.b * 64)),
        weighing("random matrix r=8", 256, D, 256, "identity", ("random_matrix_adaption", {"rank": 8}),
                 lambda c, D: vera(c.n, D, 8), "Head(identity_expansion(), random_matrix_adaption_reconciliation(r=8))",
                 head_need(lambda c: c.n + 8 + 4 * c.b * 8 + c.b * c.n)),
        weighing("hypernet l=64 h=32", 256, 1176, 128, "identity", ("hypernet", {"l": 64, "hidden_dim": 32}),
                 lambda c, D: hypernet(c.n, D, 64, 32),
                 "Head(identity_expansion(), hypernet_reconciliation(l=64, hidden_dim=32))",
                 head_need(lambda c: 2 * c.n * c.m)),
        Case("training step: KAN [784, 64, "
        "10] b=256", 256, 784, 10, lambda c: df.functions.networks.kan(dims=(784, 64, 10))(),
             lambda c: ObviousKAN([784, 64, 10]), "kan(dims=[784, 64, 10])", equal=False),
        Case("training step: MLP [784, 64, "
        "10] b=256", 256, 784, 10, lambda c: df.functions.networks.mlp(dims=(784, 64, 10))(),
             lambda c: nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
             "mlp(dims=[784, 64, 10], enable_bias=True)",
             equal=False),
    ]  # fmt: skip
    return cases


def wavelet_options() -> dict[str, Any]:
    import dualform as df

    wanted = {"a": 2.0, "scale": 2.0, "base": 2.0} | dict.fromkeys("s scales num_scales t shifts num_shifts".split(), 3)
    return {name: value for name, value in wanted.items() if name in df.expansions["ricker_wavelet"].options}


# -- running
# -------------------------------------------------------------------------------------------------------------


def prepared(module: nn.Module, c: Case) -> tuple[Run, Run]:
    """Return forward without gradients, and one training step (or forward and backward of the outputs' sum of
    squares)."""
    torch.manual_seed(1)
    x = (2 * torch.rand(c.b, c.m) - 1).requires_grad_()
    tensors = [x, *(p for p in module.parameters() if p.requires_grad)]
    steps = c.name.startswith("training")
    optimizer = torch.optim.SGD(tensors[1:], lr=1e-3) if steps else None
    target = torch.arange(c.b) % max(1, c.n)

    @torch.no_grad()
    def forward() -> Tensor:
        return module(x)

    def both() -> None:
        if optimizer is None:
            y = module(x)
            torch.autograd.grad(y, tensors, torch.ones_like(y), allow_unused=True)
            return
        optimizer.zero_grad()
        F.cross_entropy(module(x.detach()), target).backward()
        optimizer.step()

    return forward, both


def seconds(run: Run) -> float:
    """Process time of one call, repeated to last at least 50 ms."""
    return harness.repeated(run, 0.05, time.process_time)


def peak(run: Run) -> int:
    """Peak of what torch allocates during one call, in bytes, above what was held before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    held = most = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Other:
    """tinyBIG in a process of its own, measured when told to."""

    def __init__(self, interpreter: str, folder: str) -> None:
        words = [interpreter, __file__, "--serve", folder]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        return {"error": "the process ended"}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(folder: str) -> None:
    """Answer on standard output: build a case, or time it once more."""
    place = theirs(folder)
    runs: tuple[Run, Run] | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "build" in question:
                c = Case(question["name"], question["b"], question["m"], question["n"], None, None, "")  # type: ignore[arg-type]
                place |= {"m": c.m, "n": c.n}
                torch.manual_seed(0)
                runs = prepared(eval(question["build"], place), c)
                runs[0]()
                answer: dict[str, Any] = {"torch": torch.__version__}
            elif question.get("peak"):
                assert runs is not None
                answer = {"peak": peak(runs[1])}
            else:
                assert runs is not None
                answer = {"f": seconds(runs[0]), "fb": seconds(runs[1])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("@" + json.dumps(answer), flush=True)


def theirs(folder: str) -> dict[str, Any]:
    """Import tinyBIG with stubs for what it needs at import only, and wrap its functions as modules."""
    import importlib.abc
    import importlib.machinery
    import types

    absent = ("torchtext", "torchdata", "torchvision", "tinybig.data", "tinybig.visual", "tinybig.learner", "portalocker",
              "tqdm", "yaml", "requests", "matplotlib", "sympy_stub")  # fmt: skip

    class Stub(types.ModuleType):
        __path__: list[str] = []
        __all__: list[str] = []

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if any(name == a or name.startswith(a + ".") for a in absent):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec: Any) -> Any:
            return Stub(spec.name)

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.insert(0, Finder())
    sys.path.insert(0, folder)
    import tinybig.expansion
    import tinybig.model
    import tinybig.reconciliation

    class TheirHead(nn.Module):
        def __init__(self, expansion: Any, reconciliation: Any) -> None:
            super().__init__()
            m, n = place["m"], place["n"]
            self.expansion, self.reconciliation, self.n = expansion, reconciliation, n
            self.D = expansion.calculate_D(m)
            self.w = nn.Parameter(torch.randn(1, reconciliation.calculate_l(n, self.D)))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.expansion(x), self.reconciliation(n=self.n, D=self.D, w=self.w))

    class TheirExpand(nn.Module):
        def __init__(self, expansion: Any) -> None:
            super().__init__()
            self.e = expansion

        def forward(self, x: Tensor) -> Tensor:
            return self.e(x)

    place: dict[str, Any] = {"Head": TheirHead, "Expand": TheirExpand}
    for module in (tinybig.expansion, tinybig.reconciliation, tinybig.model):
        place |= {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return place


def row_of(c: Case, rounds: int, other: Other | None) -> dict[str, Any]:
    torch.manual_seed(0)
    ours, obvious = c.ours(c), c.obvious(c)
    sides = {"ours": prepared(ours, c), "obvious": prepared(obvious, c)}
    if c.equal:
        with torch.no_grad():
            if hasattr(ours, "w") and hasattr(obvious, "w"):
                obvious.w.copy_(ours.w)
        torch.testing.assert_close(sides["ours"][0](), sides["obvious"][0](), rtol=2e-3, atol=2e-3)
    built = {"error": "not asked"} if other is None else other.ask(build=c.tinybig, name=c.name, b=c.b, m=c.m, n=c.n)
    samples: dict[str, dict[str, list[float]]] = {s: {"f": [], "fb": []} for s in (*sides, "tinybig")}
    for _ in range(rounds):
        for name, (forward, both) in sides.items():
            samples[name]["f"].append(seconds(forward))
            samples[name]["fb"].append(seconds(both))
        if other is not None and "error" not in built:
            for kind, value in other.ask().items():
                if kind in ("f", "fb"):
                    samples["tinybig"][kind].append(value)
    peaks = {name: peak(both) for name, (_, both) in sides.items()}
    if other is not None and "error" not in built:
        peaks["tinybig"] = other.ask(peak=True).get("peak")
    kept = {side: {kind: harness.summary(x) for kind, x in kinds.items()} for side, kinds in samples.items()}
    need = None if c.need is None else 4 * c.need(c)
    return {"case": c.name, "samples": kept, "peak": peaks, "need": need, "tinybig error": built.get("error")}


def stripped(text: str) -> int:
    """Count lines that hold code: no comments, docstrings or blank lines."""
    kept: set[int] = set()
    previous = tokenize.INDENT
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        starts = (tokenize.INDENT, tokenize.NEWLINE, tokenize.DEDENT)
        is_docstring = token.type == tokenize.STRING and previous in starts
        if token.type not in silent and not is_docstring:
            kept |= set(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type
    return len(kept)


def code_size(tinybig: str | None) -> dict[str, Any]:
    """Lines of both, raw and stripped: expansions, reconciliations, remainders, fusions, heads, layers."""
    import dualform

    def count(files: list[Path]) -> dict[str, int]:
        texts = [f.read_text(encoding="utf-8") for f in files]
        return {"files": len(texts), "raw": sum(t.count("\n") for t in texts), "stripped": sum(map(stripped, texts))}

    found = {"dualform": count(sorted((Path(dualform.__file__).parent / "functions").glob("*.py")))}
    if tinybig is not None:
        folders = ("expansion", "reconciliation", "remainder", "fusion", "head", "layer", "module", "koala")
        found["tinybig"] = count([f for d in folders for f in sorted((Path(tinybig) / "tinybig" / d).rglob("*.py"))])
    return found


def report(found: harness.Found) -> str:
    rows = []
    for row in found["rows"]:
        best = {s: [kinds[k].get("min") for k in ("f", "fb")] for s, kinds in row["samples"].items()}

        def beside(side: str) -> str:
            pairs = zip(best[side], best["ours"], strict=True)  # noqa: B023
            return " / ".join(f"{theirs / ours:.2f}x" if theirs and ours else "-" for theirs, ours in pairs)

        ms = " / ".join(f"{1e3 * (t or 0):.2f}" for t in best["ours"])
        sides = ("ours", "obvious", "tinybig")
        peaks = ", ".join(f"{p / 1e6:.1f}" if (p := row["peak"].get(s)) else "-" for s in sides)
        need = f"{row['peak']['ours'] / row['need']:.2f}" if row["need"] else "-"
        rows.append([row["case"], ms, beside("obvious"), beside("tinybig"), peaks, need])
    header = (
        "case | ours f / f+b ms | obvious f / f+b | tinyBIG f / f+b | peak MB: ours, obvious, tinyBIG | peak / need"
    )
    sizes = [[name, s["files"], f"{s['raw']:,}", f"{s['stripped']:,}"] for name, s in found["code"].items()]
    lines = harness.table(["code", "files", "lines", "without comments, docstrings, blanks"], sizes)
    return harness.table(header.split(" | "), rows) + "\n" + lines


def measure(options: argparse.Namespace) -> harness.Found:
    torch.set_num_threads(1)
    other = Other(options.interpreter, options.tinybig) if options.tinybig else None
    rows = {}
    if options.append and options.output.exists():
        rows = {row["case"]: row for row in json.loads(options.output.read_text())["rows"]}
    for c in all_cases():
        if re.search(options.only, c.name):
            rows[c.name] = row_of(c, options.rounds, other)
            print(json.dumps(rows[c.name]), flush=True)
    if other is not None:
        other.close()
    return {"code": code_size(options.tinybig), "rows": [rows[c.name] for c in all_cases() if c.name in rows]}


if __name__ == "__main__":
    # tinybig: a folder that holds the package; only: a regular expression; append: keep the other cases of the output
    # file
    defaults = {"tinybig": str, "interpreter": sys.executable, "only": "", "append": False, "rounds": 5, "serve": str}
    given = harness.options(__doc__, **defaults)
    if given.serve:
        torch.set_num_threads(1)
        serve(given.serve)
    else:
        harness.main(measure, report, given)

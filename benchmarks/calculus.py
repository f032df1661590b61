"""Structured derivatives beside torch.func, jax, sparsejac and asdex: growth of memory and time, one run, one thread.

    python benchmarks/calculus.py [--peers PYTHON] [--seconds 20] [--gib 8] [--cases add,gelu]

writes benchmarks/results/calculus.json (machine, versions, commit, medians and extremes) and calculus.md (the tables of
the docs). `--peers`: a Python that has jax, sparsejac and asdex, if this one does not; peers that do not import are
named as absent. Every case and tool runs in a process of its own, n doubling until the next size would pass the limits;
memory is the growth of the resident set's high-water mark.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
from harness import growth, seconds, summary

OURS = "dualform"
TORCH = ("jacrev", "jacrev_chunked", "jacfwd")
JAX = ("jax_jacrev", "jax_jacfwd", "sparsejac", "asdex")
# case: (what, first n, last n of ours, exponent of the dense size in n)
CASES = {
    "add": ("x + y, x (n), y (n, n), wrt x", 16, 2048, 3),
    "gelu": ("gelu(x), x (n)", 64, 2**18, 2),
    "softmax": ("softmax of rows, x (8, n)", 32, 2**14, 2),
    "layer_norm": ("layer norm of rows, x (8, n)", 32, 2**14, 2),
    "product": ("x @ w, both (n, n), wrt w", 16, 1024, 4),
    "mlp": ("gelu(x @ w1) @ w2, all (n, n), wrt w1", 16, 1024, 4),
    "bmm": ("a @ b, a (4, 1, n, n), b (4, n, n), wrt b", 8, 256, 4),
    "block": ("transformer block, x (n, 64), 4 heads, wrt x", 8, 256, 2),
}


def timed(run: Callable[[], Any], budget: float = 0.3, most: int = 30) -> list[float]:
    """Seconds of single calls, until the budget is spent."""
    samples = [seconds(run)]
    while sum(samples) < budget and len(samples) < most:
        samples.append(seconds(run))
    return samples


def repeated(run: Callable[[], Any], rounds: int = 7) -> list[float]:
    """Seconds per call of short calls: each sample is a mean over about 5 ms."""
    return [harness.repeated(run, 0.005) for _ in range(rounds)]


# -- the functions, in torch and in jax


def torch_case(name: str, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    r = torch.randn
    if name == "add":
        return (lambda x, y: x + y), (r(n), r(n, n))
    if name == "gelu":
        return F.gelu, (r(n),)
    if name == "softmax":
        return (lambda x: x.softmax(-1)), (r(8, n),)
    if name == "layer_norm":
        return (lambda x: F.layer_norm(x, x.shape[-1:])), (r(8, n),)
    if name == "product":
        return (lambda w, x: x @ w), (r(n, n), r(n, n))
    if name == "mlp":
        return (lambda w1, x, w2: F.gelu(x @ w1) @ w2), (r(n, n), r(n, n), r(n, n))
    if name == "bmm":
        return (lambda b, a: a @ b), (r(4, n, n), r(4, 1, n, n))

    def block(x: Any, wq: Any, wk: Any, wv: Any, wo: Any, w1: Any, w2: Any) -> Any:
        h = F.layer_norm(x, (64,))
        q, k, v = ((h @ w).view(-1, 4, 16).transpose(0, 1) for w in (wq, wk, wv))
        a = ((q @ k.mT) / 4).softmax(-1) @ v
        x = x + a.transpose(0, 1).reshape(-1, 64) @ wo
        return x + F.gelu(F.layer_norm(x, (64,)) @ w1) @ w2

    return block, (r(n, 64), *(r(64, 64) / 8 for _ in range(4)), r(64, 256) / 8, r(256, 64) / 16)


def jax_case(name: str, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    def r(*shape: int) -> Any:
        return jax.random.normal(jax.random.key(0), shape)

    def norm(x: Any) -> Any:
        c = x - x.mean(-1, keepdims=True)
        return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)

    if name == "add":
        y = r(n, n)
        return (lambda x: x + y), (r(n),)
    if name == "gelu":
        return (lambda x: jax.nn.gelu(x, approximate=False)), (r(n),)
    if name == "softmax":
        return (lambda x: jax.nn.softmax(x, -1)), (r(8, n),)
    if name == "layer_norm":
        return norm, (r(8, n),)
    x = r(n, n)
    if name == "product":
        return (lambda w: x @ w), (r(n, n),)
    if name == "mlp":
        w2 = r(n, n)
        return (lambda w1: jax.nn.gelu(x @ w1, approximate=False) @ w2), (r(n, n),)
    if name == "bmm":
        a = r(4, 1, n, n)
        return (lambda b: a @ b), (r(4, n, n),)
    weights = [r(64, 64) / 8 for _ in range(4)]
    w1, w2 = r(64, 256) / 8, r(256, 64) / 16

    def block(x: Any) -> Any:
        h = norm(x)
        q, k, v = ((h @ w).reshape(-1, 4, 16).swapaxes(0, 1) for w in weights[:3])
        a = jax.nn.softmax(q @ k.swapaxes(1, 2) / 4, -1) @ v
        x = x + a.swapaxes(0, 1).reshape(-1, 64) @ weights[3]
        return x + jax.nn.gelu(norm(x) @ w1, approximate=False) @ w2

    return block, (r(n, 64),)


# -- one tool on one case at one size


def run_ours(name: str, n: int, limits: argparse.Namespace) -> dict[str, Any]:
    import torch

    import dualform as df

    f, args = torch_case(name, n)
    f(*args)
    df.calculus.clear_cache()
    row: dict[str, Any] = {
        "build_cold": summary(timed(lambda: (df.calculus.clear_cache(), df.jacobian(f, *args)), 0.2, 5))
    }
    J = df.jacobian(f, *args)
    row["build_cached"] = summary(repeated(lambda: df.jacobian(f, *args)))
    row["dense_bytes"] = J.dense_nbytes
    # A block's structure is dense: every output depends on every input.
    if name != "block" or J.dense_nbytes < 2**26:
        _with_terms(df, f, args)
        df.calculus.clear_cache()
        fresh, row["peak"] = growth(lambda: _with_terms(df, f, args))
        row["stored"] = fresh.nbytes // 4
        row["structure"] = fresh.structure
    x = args[0].clone().requires_grad_()
    y = f(x, *args[1:])
    g, v = torch.randn_like(y), torch.randn_like(args[0])
    for _ in range(3):
        J.vjp(g), J.jvp(v)
    calls = {
        "vjp": lambda: J.vjp(g), "autograd_vjp": lambda: torch.autograd.grad(y, x, g, retain_graph=True),
        "jvp": lambda: J.jvp(v), "autograd_jvp": lambda: torch.func.jvp(lambda t: f(t, *args[1:]), (args[0],), (v,)),
    }  # fmt: skip
    turns = harness.alternating(calls, 14, warm=0, clock=lambda call: harness.repeated(call, 0.005))
    row |= {key: summary(samples) for key, samples in turns.items()}
    if "stored" in row and J.dense_nbytes < limits.gib * 2**30 / 2:
        assert J.terms
        _, row["dense_peak"] = growth(J.dense)
        row["dense"] = summary(timed(lambda: J.dense(), 1.0, 5))
    return row


def _with_terms(df: Any, f: Any, args: Any) -> Any:
    J = df.jacobian(f, *args)
    assert J.terms
    return J


def first_call(run: Callable[[], Any]) -> tuple[tuple[Any, int], float]:
    """Return a call's result and growth, and its seconds."""
    found: list[Any] = []
    spent = seconds(lambda: found.append(growth(run)))
    return found[0], spent


def run_torch(tool: str, name: str, n: int) -> dict[str, Any]:
    import torch

    f, args = torch_case(name, n)
    make: Any = (
        torch.func.jacfwd(f) if tool == "jacfwd" else torch.func.jacrev(f, chunk_size=64 if "chunk" in tool else None)
    )
    (result, high), first = first_call(lambda: make(*args))
    row = {"peak": high, "dense_bytes": result.numel() * 4}
    del result
    return {**row, "seconds": summary(timed(lambda: make(*args), 0.5, 5) if first < 2 else [first])}


def run_jax(tool: str, name: str, n: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    f, (x,) = jax_case(name, n)
    begun: list[Any] = []
    if tool == "asdex":
        import asdex

        flat = lambda t: f(t.reshape(x.shape)).reshape(-1)  # noqa: E731
        make, given = jax.jit(asdex.jacobian(flat, x.reshape(-1))), x.reshape(-1)
    elif tool == "sparsejac":
        import sparsejac

        flat = lambda t: f(t.reshape(x.shape)).reshape(-1)  # noqa: E731
        make, given = jax.jit(sparsejac.jacfwd(flat, sparsity=_pattern(name, n))), x.reshape(-1)
    else:
        make, given = jax.jit(getattr(jax, tool.removeprefix("jax_"))(f)), x
    setup = seconds(lambda: begun.append(make.lower(given).compile()))
    wait = lambda: jax.block_until_ready(begun[0](given))  # noqa: E731
    (result, high), first = first_call(wait)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(result))
    row = {"peak": high, "setup": setup, "result_bytes": stored, "out": int(jnp.size(x))}
    del result
    return {**row, "seconds": summary(timed(wait, 0.5, 5) if first < 2 else [first])}


def _pattern(name: str, n: int) -> Any:
    """sparsejac wants the sparsity pattern from its user."""
    import jax.experimental.sparse as sparse
    import numpy as np
    import scipy.sparse as ss

    eye, ones = ss.identity(n), np.ones((n, n))
    found = {
        "add": lambda: ss.vstack([eye] * n),
        "gelu": lambda: eye,
        "softmax": lambda: ss.block_diag([ones] * 8),
        "layer_norm": lambda: ss.block_diag([ones] * 8),
        "product": lambda: ss.kron(ones, eye),
    }
    if name not in found:
        raise NotImplementedError("the pattern has to be written by hand")
    return sparse.BCOO.from_scipy_sparse(ss.coo_matrix(found[name]()))


def worker(tool: str, name: str, limits: argparse.Namespace) -> None:
    """Print a line for each n, until the next n would pass the limits."""
    n, last = CASES[name][1:3]
    before: dict[str, Any] | None = None
    if tool not in JAX:
        import torch

        torch.set_num_threads(1)

    def run(n: int) -> dict[str, Any]:
        if tool == OURS:
            return run_ours(name, n, limits)
        return run_torch(tool, name, n) if tool in TORCH else run_jax(tool, name, n)

    run(max(n // 4, 2))  # imports and first calls are nobody's growth
    while n <= last:
        row = run(n)
        print(json.dumps({"n": n, **row}), flush=True)
        grows = 2 ** (CASES[name][3] + 0.5)
        if before is not None and before["peak"] > 2**24:
            grows = max(row["peak"] / before["peak"], 2.0)
        if tool != OURS:
            next_seconds = row["seconds"]["min"] * grows + 2 * row.get("setup", 0)
            if row["peak"] * grows > limits.gib * 2**30 or next_seconds > limits.seconds:
                return
        before = row if "peak" in row else None
        n *= 2


# -- all of them, and the tables


def one(tool: str, name: str, limits: argparse.Namespace) -> dict[str, Any]:
    """Run one tool on one case in a process of its own."""
    words = ["--worker", tool, "--cases", name, "--seconds", limits.seconds, "--gib", limits.gib]
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    python = limits.peers if tool in JAX else sys.executable
    rows = list(harness.alone(words, env, python, limit=60 + 6 * limits.seconds))
    failed = rows.pop()["failed"] if rows and "failed" in rows[-1] else ""
    return {"case": name, "tool": tool, "rows": rows, "absent": "" if rows else failed}


def slope(rows: list[dict[str, Any]], key: str) -> float | None:
    """The exponent: the log-log slope over the last three sizes."""
    some = [(math.log(r["n"]), math.log(max(r[key], 1))) for r in rows if key in r][-3:]
    if len(some) < 3:
        return None
    mean = [sum(column) / len(some) for column in zip(*some, strict=True)]
    return sum((a - mean[0]) * (b - mean[1]) for a, b in some) / sum((a - mean[0]) ** 2 for a, _ in some)


def tables(found: harness.Found) -> Iterator[str]:
    """The tables of the docs."""
    rows = {(m["case"], m["tool"]): m["rows"] for m in found["measured"]}
    cases = [name for name in CASES if (name, OURS) in rows]
    tools = [t for t in (*TORCH, *JAX) if any(rows.get((c, t)) for c in cases)]
    yield "Growth: exponent of n over the last three sizes; ours: numbers stored, peers: peak memory.\n"
    exponents = [
        [
            CASES[c][0],
            CASES[c][3],
            slope(rows[c, OURS], "stored"),
            *(slope(rows.get((c, t), []), "peak") for t in tools),
        ]
        for c in cases
    ]
    yield harness.table(["case", "dense size", OURS, *tools], exponents)
    yield "At each peer's last size within the limits: n, peak memory, and how many times our stored numbers (and our peak) that is.\n"
    yield harness.table(
        ["case", *tools], [[c, *(_against(rows[c, OURS], rows.get((c, t), [])) for t in tools)] for c in cases]
    )
    yield "Applying it: microseconds, best of all samples, and the ratio to autograd.\n"
    times = []
    for c in cases:
        for r in rows[c, OURS]:
            if r["n"] in (128, 256, 512, 1024):
                a, b, p, q = (r[k]["min"] * 1e6 for k in ("vjp", "autograd_vjp", "jvp", "autograd_jvp"))
                times.append([c, r["n"], a, b, f"{a / b:.2f}", p, q, f"{p / q:.2f}"])
    yield harness.table("case | n | vjp | autograd | ratio | jvp | torch.func.jvp | ratio".split(" | "), times)
    yield "`dense()` beside jacrev: seconds, and peak over the result's bytes; at the largest size that both ran.\n"
    dense = []
    for c in cases:
        peers = {r["n"]: r for r in rows.get((c, "jacrev"), [])}
        both = [r for r in rows[c, OURS] if "dense" in r and r["n"] in peers]
        if both:
            r, q, size = both[-1], peers[both[-1]["n"]], both[-1]["dense_bytes"]
            spent = [f"{x['min']:.3f}" for x in (r["dense"], q["seconds"])]
            dense.append(
                [c, r["n"], f"{size / 1e6:.0f}", *spent, f"{r['dense_peak'] / size:.2f}", f"{q['peak'] / size:.2f}"]
            )
    yield harness.table("case | n | result, MB | dense() | jacrev | peak / result | jacrev's".split(" | "), dense)
    yield "Building `df.jacobian(f, ...)`: milliseconds, best, at n = 128 or the nearest.\n"
    near = {c: min(rows[c, OURS], key=lambda r: abs(r["n"] - 128)) for c in cases}
    best = [[c, r["build_cold"]["min"] * 1e3, f"{r['build_cached']['min'] * 1e3:.3f}"] for c, r in near.items()]
    yield harness.table(["case", "cold", "cached"], best)
    missing = {m["tool"]: m["absent"] for m in found["measured"] if m["absent"]}
    if missing:
        yield "Not run: " + "; ".join(f"{t} ({why})" for t, why in missing.items()) + ".\n"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def _against(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> str:
    if not peer:
        return "-"
    last = peer[-1]
    own = next((r for r in ours if r["n"] == last["n"] and "stored" in r), None)
    shown = f"n={last['n']}, {last['peak'] / 1e6:.0f} MB"
    if own is None:
        return shown
    return f"{shown}, {last['peak'] / max(own['stored'] * 4, 4):,.0f}x ({last['peak'] / max(own['peak'], 4096):,.0f}x)"


def report(found: harness.Found) -> str:
    m, limits = found["machine"], found["limits"]
    head = (
        f"{m['processor']}, {m['cores']} cores, 1 thread used; torch {found['versions']['torch']}, peers "
        f"{found['peers']}; "
    )
    return head + f"until {limits['gib']:g} GiB or {limits['seconds']:g} s.\n\n" + "\n".join(tables(found))


def measure(limits: argparse.Namespace) -> harness.Found:
    found = []
    for name in limits.cases.split(","):
        for tool in limits.tools.split(","):
            spent = seconds(lambda: found.append(one(tool, name, limits)))  # noqa: B023
            sizes = [r["n"] for r in found[-1]["rows"]]
            print(f"{name} {tool}: n {sizes[:1]} to {sizes[-1:]}, {spent:.0f} s {found[-1]['absent']}", flush=True)
    ask = "import importlib.metadata as m; print({p: m.version(p) for p in ('jax', 'sparsejac', 'asdex')})"
    peers = subprocess.run([limits.peers, "-c", ask], capture_output=True, text=True, check=False)
    bounds = {"seconds": limits.seconds, "gib": limits.gib}
    return {"peers": peers.stdout.strip() or "not installed", "limits": bounds, "dtype": "float32", "measured": found}


if __name__ == "__main__":
    defaults = {"peers": sys.executable, "seconds": 20.0, "gib": 8.0, "cases": ",".join(CASES)}
    given = harness.options(__doc__, **defaults, tools=",".join((OURS, *TORCH, *JAX)), worker=str)
    if given.worker:
        worker(given.worker, given.cases, given)
    else:
        harness.main(measure, report, given)

"""What a Jacobian stores as a sparse array, beside asdex and sparsejac: entries and seconds, one run, one thread.

    python benchmarks/sparsity.py [--peers PYTHON] [--size 600] [--seconds 900] [--cases flip,conv]

writes benchmarks/results/sparsity.json and .md. `--peers`: a Python that has jax, sparsejac and asdex, if this one does
not. A case is the same function in torch and in jax; every tool runs in a process of its own. entries: those that are
not zero for all numbers, as the tool finds them, ours of a sort at this x (sparsejac is given asdex's); pattern: seconds
from the function to the pattern; values: from the function to the sparse array at the second call (jax: compiled).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import harness

OURS, PEERS = "dualform", ("asdex", "sparsejac")
CASES = {
    "flip": "x reversed", "gather": "x at places", "sort": "x sorted", "pad": "x with zeros around",
    "conv": "convolution with 3 numbers", "pool": "means of 4", "shift": "x[1:] - x[:-1]", "unfold": "windows of 5",
    "stencil": "5 points of a square grid", "embedding": "rows of a table at places", "product": "sin(A x), A of 8 rows",
    "rows": "softmax of rows of 8",
}  # fmt: skip


def torch_case(name: str, n: int) -> tuple[Any, Any]:
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    places, side = torch.randint(0, n, (n,), generator=generator), int(n**0.5)
    A, kernel = torch.ones(8, n).double(), torch.ones(1, 1, 3).double()

    def stencil(x: Any) -> Any:
        u = x[: side * side].reshape(side, side)
        middle = -4 * u[1:-1, 1:-1]
        return (middle + u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]).reshape(-1)

    found = {
        "flip": lambda x: x.flip(0), "gather": lambda x: x[places], "sort": lambda x: x.sort()[0],
        "pad": lambda x: F.pad(x, (1, 1)), "conv": lambda x: F.conv1d(x[None, None], kernel)[0, 0],
        "pool": lambda x: F.avg_pool1d(x[None], 4)[0], "shift": lambda x: x[1:] - x[:-1],
        "unfold": lambda x: x.unfold(0, 5, 1), "stencil": stencil,
        "embedding": lambda x: F.embedding(places % (n // 4), x[: n // 4 * 4].reshape(-1, 4)),
        "product": lambda x: (A @ x).sin(), "rows": lambda x: x[: n // 8 * 8].reshape(-1, 8).softmax(-1),
    }  # fmt: skip
    return found[name], x


def jax_case(name: str, n: int) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    x = jax.random.normal(jax.random.key(0), (n,), dtype=jnp.float64)
    places, side, A = jax.random.randint(jax.random.key(1), (n,), 0, n), int(n**0.5), jnp.ones((8, n))

    def stencil(x: Any) -> Any:
        u = x[: side * side].reshape(side, side)
        return -4 * u[1:-1, 1:-1] + u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]

    found = {
        "flip": lambda x: x[::-1], "gather": lambda x: x[places], "sort": jnp.sort, "pad": lambda x: jnp.pad(x, 1),
        "conv": lambda x: jnp.convolve(x, jnp.ones(3), "valid"),
        "pool": lambda x: x[: n // 4 * 4].reshape(-1, 4).mean(-1), "shift": lambda x: x[1:] - x[:-1],
        "unfold": lambda x: jnp.stack([x[k : n - 4 + k] for k in range(5)], -1), "stencil": stencil,
        "embedding": lambda x: x[: n // 4 * 4].reshape(-1, 4)[places % (n // 4)],
        "product": lambda x: jnp.sin(A @ x),
        "rows": lambda x: jax.nn.softmax(x[: n // 8 * 8].reshape(-1, 8), -1),
    }  # fmt: skip
    return lambda x: found[name](x).reshape(-1), x


def run_ours(name: str, n: int) -> dict[str, Any]:
    import dualform as df

    f, x = torch_case(name, n)

    def pattern() -> Any:
        df.calculus.clear_cache()
        return df.jacobian(f, x).sparsity()

    found, again = pattern(), harness.seconds(pattern)
    df.jacobian(f, x).to_scipy_sparse()
    return {
        "entries": found.nnz,
        "pattern": again,
        "values": harness.seconds(lambda: df.jacobian(f, x).to_scipy_sparse()),
    }


def run_peer(tool: str, name: str, n: int) -> dict[str, Any]:
    import asdex
    import jax

    f, x = jax_case(name, n)
    found: list[Any] = []
    pattern = harness.seconds(lambda: found.append(asdex.jacobian_sparsity(f, x)))
    if tool == "asdex":
        make, row = jax.jit(asdex.jacobian(f, x)), {"entries": found[0].nnz, "pattern": pattern}
    else:
        import sparsejac

        make, row = jax.jit(sparsejac.jacfwd(f, sparsity=found[0].to_bcoo())), {}
    jax.block_until_ready(make(x))
    return {**row, "values": harness.seconds(lambda: jax.block_until_ready(make(x)))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found, env = list[dict[str, Any]](), {"OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
    for tool in (OURS, *PEERS):
        words = ["--worker", tool, "--size", options.size, *(["--cases", options.cases] if options.cases else [])]
        python = sys.executable if tool == OURS else options.peers
        found += [{"tool": tool, **row} for row in harness.alone(words, env, python, options.seconds) if "case" in row]
    return {"size": options.size, "measured": found}


def report(found: dict[str, Any]) -> str:
    rows = {(m["case"], m["tool"]): m for m in found["measured"]}

    def cell(case: str, tool: str, what: str) -> Any:
        value = rows.get((case, tool), {}).get(what)
        return f"{1e3 * value:.1f}" if isinstance(value, float) else f"{value:,}" if value is not None else "-"

    cases = [c for c in CASES if (c, OURS) in rows]
    header = ["function", "entries", "asdex", "pattern, ms", "asdex", "values, ms", "asdex", "sparsejac"]
    body = [
        [CASES[c], *(cell(c, t, w) for w in ("entries", "pattern") for t in (OURS, "asdex")),
         *(cell(c, t, "values") for t in (OURS, *PEERS))] for c in cases
    ]  # fmt: skip
    return f"Of x with {found['size']:,} numbers; without a name: dualform.\n\n" + harness.table(header, body)


if __name__ == "__main__":
    parser = harness.parser(__doc__, peers=sys.executable, size=600, seconds=900.0, cases="")
    parser.add_argument("--worker", default="")
    chosen = parser.parse_args()
    if chosen.worker:
        run = run_ours if chosen.worker == OURS else partial(run_peer, chosen.worker)
        for case in chosen.cases.split(",") if chosen.cases else CASES:
            print(json.dumps({"case": case, **run(case, chosen.size)}), flush=True)
    else:
        harness.main(measure, report, chosen, "scipy")

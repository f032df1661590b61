"""Per-sample gradients, their norms, Gauss-Newton diagonals and tangent kernels without a per-sample weight.

    python examples/per_sample.py [--samples 128] [--width 256]

The same work with structured derivatives and with torch.func, one thread: seconds (best of three), growth of the
resident set's high-water mark, and the largest difference. Linux (it reads /proc).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import dualform as df


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measured(run: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result, the best time of three, and how far memory rose."""
    result, seconds, high = None, float("inf"), 0
    for _ in range(3):
        result = None
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.perf_counter()
        result = run()
        seconds = min(seconds, time.perf_counter() - start)
        high = max(high, resident("VmHWM") - before)
    return result, seconds, high


def difference(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest entry."""
    pairs = [(a[k], b[k]) for k in b] if isinstance(b, dict) else [(a, b)]
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, d = given.samples, given.width
    module = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, 10))
    x, g = torch.randn(n, d), torch.randn(n, 10)
    p = {name: value.detach() for name, value in module.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        return (functional_call(module, p, (x[None],))[0] * g).sum()

    def gradients() -> dict[str, Tensor]:
        return vmap(grad(loss), (None, 0, 0))(p, x, g)

    def norms() -> Tensor:
        return torch.stack([v.flatten(1).square().sum(1) for v in gradients().values()]).sum(0).sqrt()

    def jacobian(rows: Tensor) -> dict[str, Tensor]:
        return jacrev(lambda p: functional_call(module, p, (rows,)))(p)

    def diagonal() -> dict[str, Tensor]:
        return {k: v.square().sum((0, 1)) for k, v in jacobian(x).items()}

    def kernel() -> Tensor:
        return sum(torch.tensordot(v.flatten(2), v.flatten(2), ([2], [2])) for v in jacobian(x[:16]).values())  # type: ignore[return-value]

    work: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "per-sample gradients": (lambda: df.calculus.site_derivatives(module, x).per_sample_gradients(g), gradients),
        "their norms": (lambda: df.calculus.site_derivatives(module, x).per_sample_norms(g), norms),
        "Gauss-Newton diagonal": (lambda: df.calculus.site_derivatives(module, x).gauss_newton_diagonal(), diagonal),
        "tangent kernel of 16": (lambda: df.calculus.site_derivatives(module, x[:16]).ntk().dense(), kernel),
    }
    sites = df.calculus.site_derivatives(module, x)
    print(
        f"{n} samples, width {d}; Jacobians by all parameters: {sites.dense_nbytes / 1e6:,.0f} MB, kept: "
        f"{sites.nbytes / 1e6:.1f} MB"
    )
    for name, J in sites.items():
        print(f"  d y / d {name}: {J.structure}")
    print(f"{'':22} {'dualform':>18} {'torch.func':>18}   difference")
    for name, (ours, theirs) in work.items():
        a, mine, low = measured(ours)
        b, other, high = measured(theirs)
        cells = [f"{s * 1e3:8.1f} ms {m / 2**20:5.0f} MiB" for s, m in ((mine, low), (other, high))]
        print(f"{name:22} {cells[0]:>18} {cells[1]:>18}   {difference(a, b):.1e}")


if __name__ == "__main__":
    main()

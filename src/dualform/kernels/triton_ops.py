"""The functions that texts of rows call in Triton: `name_(...)` of `ops.table.Entry` and `Fold`."""

from __future__ import annotations

import re

_HELPERS = {
    "tanh_": "(x):\n    e = tl.exp(-2.0 * tl.abs(x))\n    y = (1.0 - e) / (1.0 + e)\n    return tl.where(x < 0, -y, y)",
    "log1p_": "(x):\n    y = 1.0 + x\n    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))",
    "expm1_": "(x):\n    y = tl.exp(x)\n    z = y - 1.0\n"
    "    return tl.where(y == 1.0, x, tl.where((z == -1.0) | (y == float('inf')), z, z * (x / tl.log(y))))",
    "asinh_": "(x):\n    a = tl.abs(x)\n    y = tl.log(a + tl.sqrt(a * a + 1.0))\n    return tl.where(x < 0, -y, y)",
    "round_": "(x):\n    y = tl.floor(x + 0.5)\n    return tl.where((y - x == 0.5) & (y - 2.0 * tl.floor(0.5 * y) == "
    "1.0), y - 1.0, y)",
    # A negative number has whole powers alone.
    "pow_": "(x, p):\n    y = tl.exp2(p * tl.log2(tl.abs(x)))\n    whole = p == tl.floor(p)\n    odd = p - 2.0 * "
    "tl.floor(0.5 * p) == 1.0\n"
    "    y = tl.where(x < 0, tl.where(whole, tl.where(odd, -y, y), float('nan')), y)\n    return tl.where(p == 0, 1.0, "
    "y)",
    "amax_": "(x, axis: tl.constexpr):\n    found = tl.max(x, axis)\n    return tl.where(tl.sum((x != x).to(tl.int32), "
    "axis) > 0, float('nan'), found)",
    "amin_": "(x, axis: tl.constexpr):\n    found = tl.min(x, axis)\n    return tl.where(tl.sum((x != x).to(tl.int32), "
    "axis) > 0, float('nan'), found)",
    "times_": "(x, y):\n    return x * y",
}  # fmt: skip


def helpers(text: str) -> str:
    """Write the functions that a kernel's text calls, those that they call first."""
    found: dict[str, str] = {}

    def need(body: str) -> None:
        for name in re.findall(r"\b(\w+_)\b", body):
            if name in _HELPERS and name not in found:
                need(_HELPERS[name])
                found[name] = f"@triton.jit\ndef {name}{_HELPERS[name]}\n"

    need(text)
    return "\n\n".join(found.values())


__all__ = ["helpers"]

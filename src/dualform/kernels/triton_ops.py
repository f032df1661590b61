"""The functions that texts of rows call in Triton: `name_(...)` of `ops.table.Entry` and `Fold`."""

from __future__ import annotations

import re

_HELPERS = {
    "tanh_": "(x):\n    e = tl.exp(-2.0 * tl.abs(x))\n    y = (1.0 - e) / (1.0 + e)\n    return tl.where(x < 0, -y, y)",
    "log1p_": "(x):\n    y = 1.0 + x\n    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))",
    "expm1_": "(x):\n    y = tl.exp(x)\n    z = y - 1.0\n"
    "    return tl.where(y == 1.0, x, tl.where((z == -1.0) | (y == float('inf')), z, z * (x / tl.log(y))))",
    "asinh_": "(x):\n    a = tl.abs(x)\n    y = tl.log(a + tl.sqrt(a * a + 1.0))\n    return tl.where(x < 0, -y, y)",
    # Cephes: a quotient of polynomials, after the angle is taken to within pi / 8 of 0.
    "atan_": "(x):\n    a = tl.abs(x)\n    far = a > 2.414213562373095\n    near = a <= 0.66\n"
    "    y = tl.where(far, -1.0 / a, tl.where(near, a, (a - 1.0) / (a + 1.0)))\n    z = y * y\n"
    "    p = (((-0.8750608600031904 * z - 16.157537187333652) * z - 75.00855792314705) * z - 122.88666844901361) * z "
    "- 64.85021904942025\n"
    "    q = ((((z + 24.858464901423062) * z + 165.02700983169885) * z + 432.88106049129027) * z + 485.3903996359137) "
    "* z + 194.5506571482614\n"
    "    y = y + y * (z * p / q)\n"
    "    y = tl.where(far, y + 1.5707963267948966, tl.where(near, y, y + 0.7853981633974483))\n"
    "    return tl.where(x < 0, -y, y)",
    "atan2_": "(y, x):\n    a = tl.abs(x)\n    b = tl.abs(y)\n    steep = b > a\n    low = tl.where(steep, a, b)\n"
    "    high = tl.where(steep, b, a)\n"
    "    r = atan_(tl.where(high == 0, 0.0, tl.where(low == high, 1.0, low / high)))\n"
    "    r = tl.where(steep, 1.5707963267948966 - r, r)\n"
    "    r = tl.where((x < 0) | (1.0 / x < 0), 3.141592653589793 - r, r)\n"
    "    r = tl.where((x != x) | (y != y), float('nan'), r)\n    return tl.where((y < 0) | (1.0 / y < 0), -r, r)",
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

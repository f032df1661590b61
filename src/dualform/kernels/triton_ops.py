"""How each op reads in Triton: the column beside `ops.TEXT`.

Operands are tiles in registers or numbers; {T} is the type that is computed in. What has no text here cannot be inside a kernel.
"""

from __future__ import annotations

import re

# Entry by entry; `name_(...)` is one of HELPERS.
TEXT = {
    "copy": "{0}", "add": "{0} + {alpha} * {1}", "plus": "{0} + {1}", "sub": "{0} - {1}", "submul": "{0} - {alpha} * {1}",
    "rsub": "{1} - {0}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}", "exp": "tl.exp({0})", "log": "tl.log({0})",
    "tanh": "tanh_({0})", "sigmoid": "tl.sigmoid({0})", "erf": "tl.erf({0})", "sqrt": "tl.sqrt({0})", "abs": "tl.abs({0})",
    "rsqrt": "tl.rsqrt({0})", "reciprocal": "1.0 / {0}", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "tan": "tl.sin({0}) / tl.cos({0})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to({T})", "relu": "tl.where({0} < 0, 0.0, {0})",
    "log1p": "log1p_({0})", "expm1": "expm1_({0})", "sinh": "0.5 * (expm1_({0}) - expm1_(-{0}))",
    "cosh": "0.5 * (tl.exp({0}) + tl.exp(-{0}))", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))", "round": "round_({0})", "erfc": "1.0 - tl.erf({0})",
    "asinh": "asinh_({0})", "acosh": "tl.log({0} + tl.sqrt({0} * {0} - 1.0))", "atanh": "0.5 * (log1p_({0}) - log1p_(-{0}))",
    "exp2": "tl.exp2({0})", "log2": "tl.log2({0})", "log10": "0.4342944819032518 * tl.log({0})",
    "hypot": "tl.sqrt({0} * {0} + {1} * {1})", "remainder": "{0} - {1} * tl.floor({0} / {1})", "floor_divide": "tl.floor({0} / {1})",
    "addcmul": "{0} + {alpha} * {1} * {2}", "pow": "pow_({0}, {1})",
    "max": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})", "min": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "fmax": "tl.where(({0} > {1}) | ({1} != {1}), {0}, {1})", "fmin": "tl.where(({0} < {1}) | ({1} != {1}), {0}, {1})",
    "where": "tl.where({0}, {1}, {2})", "eq": "{0} == {1}", "ne": "{0} != {1}", "ge": "{0} >= {1}", "gt": "{0} > {1}",
    "le": "{0} <= {1}", "lt": "{0} < {1}", "and": "{0} & {1}", "or": "{0} | {1}", "not": "{0} == 0", "xor": "{0} ^ {1}",
    "nonzero": "{0} != 0", "isnan": "{0} != {0}", "isinf": "tl.abs({0}) == float('inf')",
    "bits_and": "{0} & {1}", "bits_or": "{0} | {1}", "bits_xor": "{0} ^ {1}", "bits_not": "-1 - {0}",
    "shift_left": "{0} << {1}", "shift_right": "{0} >> {1}",
}  # fmt: skip

SPECIAL = {"fill", "arange", "eye", "tril", "triu"}  # made of places, by the walker
TRUTHS = {"and", "or", "not", "xor", "nonzero"}  # take truth values as they are
# f(0) = 0: entries beyond a tile's edge stay zero.
KEEPS_ZERO = {
    "copy", "neg", "abs", "sqrt", "sin", "tan", "tanh", "relu", "sign", "asinh", "atanh", "sinh", "erf", "log1p", "expm1", "floor", "ceil",
    "trunc", "round", "plus", "add", "sub", "submul",
}  # fmt: skip

_HELPERS = {
    "tanh_": "(x):\n    e = tl.exp(-2.0 * tl.abs(x))\n    y = (1.0 - e) / (1.0 + e)\n    return tl.where(x < 0, -y, y)",
    "log1p_": "(x):\n    y = 1.0 + x\n    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))",
    "expm1_": "(x):\n    y = tl.exp(x)\n    z = y - 1.0\n"
    "    return tl.where(y == 1.0, x, tl.where((z == -1.0) | (y == float('inf')), z, z * (x / tl.log(y))))",
    "asinh_": "(x):\n    a = tl.abs(x)\n    y = tl.log(a + tl.sqrt(a * a + 1.0))\n    return tl.where(x < 0, -y, y)",
    "round_": "(x):\n    y = tl.floor(x + 0.5)\n    return tl.where((y - x == 0.5) & (y - 2.0 * tl.floor(0.5 * y) == 1.0), y - 1.0, y)",
    # A negative number has whole powers alone.
    "pow_": "(x, p):\n    y = tl.exp2(p * tl.log2(tl.abs(x)))\n    whole = p == tl.floor(p)\n    odd = p - 2.0 * tl.floor(0.5 * p) == 1.0\n"
    "    y = tl.where(x < 0, tl.where(whole, tl.where(odd, -y, y), float('nan')), y)\n    return tl.where(p == 0, 1.0, y)",
    "amax_": "(x, axis: tl.constexpr):\n    found = tl.max(x, axis)\n    return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float('nan'), found)",
    "amin_": "(x, axis: tl.constexpr):\n    found = tl.min(x, axis)\n    return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float('nan'), found)",
    "times_": "(x, y):\n    return x * y",
}  # fmt: skip

REDUCTIONS = {
    "sum": ("tl.sum({0}, {axis})", "0.0"), "amax": ("amax_({0}, {axis})", "float('-inf')"), "amin": ("amin_({0}, {axis})", "float('inf')"),
    "prod": ("tl.reduce({0}, {axis}, times_)", "1.0"),
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


__all__ = ["KEEPS_ZERO", "REDUCTIONS", "SPECIAL", "TEXT", "TRUTHS", "helpers"]

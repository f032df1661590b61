"""How each op of complex numbers is written with pairs of real ones: parts, arithmetic, the Fourier transforms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dualform.graphs.complex_pairs import Pair, PairWriter, Part, is_complex, rule
from dualform.graphs.edit import cleaned
from dualform.graphs.functionalize import Blame
from dualform.ops.fourier import cosines, sines

aten = torch.ops.aten


rule("real")(lambda r, node, given: r.whole(given["self"])[0])
rule("imag")(lambda r, node, given: r.whole(given["self"])[1])
rule("view_as_real", "view_as_real_copy")(
    lambda r, node, given: r.emit(aten.stack.default, list(r.whole(given["self"])), -1)
)
rule("view_as_complex", "view_as_complex_copy")(
    lambda r, node, given: Pair(*(r.emit(aten.select.int, given["self"], -1, k) for k in (0, 1)))
)
rule("complex")(lambda r, node, given: Pair(given["real"], given["imag"]))
rule("polar")(lambda r, node, given: r.polar(given["abs"], given["angle"]))
rule("abs", "absolute")(lambda r, node, given: r.length(given["self"]))
rule("angle")(lambda r, node, given: r.emit(aten.atan2.default, *r.whole(given["self"])[::-1]))
rule("conj", "_conj", "conj_physical", "_conj_physical")(lambda r, node, given: r.conj(r.pair(given["self"])))
rule("mul", "multiply")(lambda r, node, given: r.times(r.pair(given["self"]), r.pair(given["other"])))
rule("square")(lambda r, node, given: r.times(r.pair(given["self"]), r.pair(given["self"])))
rule("reciprocal")(lambda r, node, given: _inverse(r, r.pair(given["self"])))
rule("div", "divide", "true_divide")(
    lambda r, node, given: r.times(r.pair(given["self"]), _inverse(r, r.pair(given["other"])))
)
rule("sgn", "sign")(
    lambda r, node, given: r.scaled(r.pair(given["self"]), r.emit(aten.reciprocal.default, r.length(given["self"])))
)
rule("exp")(lambda r, node, given: r.exp(r.pair(given["self"])))
rule("log")(lambda r, node, given: _logarithm(r, given["self"]))
rule("sqrt")(lambda r, node, given: r.exp(r.scaled(_logarithm(r, given["self"]), 0.5)))


@rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _filled_like(r: PairWriter, node: fx.Node, given: dict[str, Any]) -> Any:
    value = complex(given.get("fill_value", "ones" in node.target._opname))  # type: ignore[union-attr]
    return r.pair(value) if is_complex(node) else r.full(value.real, node.meta["val"])


@rule("linalg_vector_norm", "norm")
def _norm(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    rest = {k: v for k, v in given.items() if k != "self" and (k != "dtype" or v is not None)}
    return r.emit(node.target, r.length(given["self"]), **rest)


@rule("_to_copy", "to", "type")
def _to(r: PairWriter, node: fx.Node, given: dict[str, Any]) -> Any:
    re, im = r.pair(given["self"])
    return Pair(re, im) if is_complex(node) else re


@rule("add", "sub", "subtract")
def _sum(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    a, b = r.pair(given["self"]), r.pair(given["other"])
    alpha = given["alpha"] * (1 if node.target._opname == "add" else -1)
    return Pair(r.add(a.re, b.re, alpha), r.add(a.im, b.im, alpha))


@rule("rsub")
def _reversed(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    a, b = r.pair(given["self"]), r.pair(given["other"])
    return Pair(r.add(b.re, a.re, -given["alpha"]), r.add(b.im, a.im, -given["alpha"]))


def _inverse(r: PairWriter, z: Pair) -> Pair:
    if not any(isinstance(part, fx.Node) for part in z):
        return r.pair(1 / complex(z.re or 0, z.im or 0))
    if z.im is None:
        return Pair(r.emit(aten.reciprocal.default, z.re), None)
    scale = r.emit(aten.reciprocal.default, r.square(z))
    return Pair(r.mul(scale, z.re), r.neg(r.mul(scale, z.im)))


def _logarithm(r: PairWriter, x: Any) -> Pair:
    if not isinstance(x, fx.Node):
        return r.pair(complex(torch.log(torch.tensor(x, dtype=torch.complex128))))
    if not is_complex(x):
        return Pair(r.emit(aten.log.default, x), None)
    re, im = r.whole(x)
    return Pair(r.emit(aten.log.default, r.length(x)), r.emit(aten.atan2.default, im, re))


@rule("pow")
def _pow(r: PairWriter, node: fx.Node, given: dict[str, Any]) -> Any:
    z, exponent = given["self"], given["exponent"]
    if isinstance(exponent, int) and 1 <= exponent <= 8:
        power = base = r.pair(z)
        for _ in range(exponent - 1):
            power = r.times(power, base)
        return power
    return r.exp(r.times(r.pair(exponent), _logarithm(r, z)))


@rule("vdot", "linalg_vecdot")
def _vdot(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    """vdot(x, y) = sum of conj(x) y."""
    first, second = (a.name for a in node.target._schema.arguments[:2])
    w = r.times(r.conj(r.pair(given[first])), r.pair(given[second]))
    dims = [given["dim"]] if "dim" in given else [0]
    return Pair(*(None if part is None else r.emit(aten.sum.dim_IntList, part, dims) for part in w))


def _scaled(r: PairWriter, z: Pair, given: dict[str, Any], count: int) -> Pair:
    scale = {0: 1.0, 1: count**-0.5, 2: 1 / count}[given["normalization"]]
    return z if scale == 1 else r.scaled(z, scale)


def _waves(r: PairWriter, z: Pair, dim: int, sign: int, n: int, out: int) -> Pair:
    """sum over l of exp(sign 2 pi i k l / n) z[l]."""

    def of(op: Any, part: Part) -> Part:
        return None if part is None else r.emit(op, part, dim, n, out)

    re = r.add(of(cosines, z.re), of(sines, z.im), -sign)
    return Pair(re, r.add(of(cosines, z.im), of(sines, z.re), sign))


@rule("_fft_r2c", "_fft_c2c")
def _fft(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    z, shape = r.pair(given["self"]), given["self"].meta["val"].shape
    sign = -1 if given.get("forward", True) else 1
    for dim in reversed(given["dim"]):
        z = _waves(r, z, dim % len(shape), sign, shape[dim], node.meta["val"].shape[dim])
    return _scaled(r, z, given, math.prod(shape[dim] for dim in given["dim"]))


@rule("_fft_c2r")
def _real_fft(r: PairWriter, node: Any, given: dict[str, Any]) -> Any:
    """Of the last dim half is given: the other half is its mirror, so that all but the ends count twice."""
    z, shape = r.pair(given["self"]), node.meta["val"].shape
    *others, last = (dim % len(shape) for dim in given["dim"])
    for dim in others:
        z = _waves(r, z, dim, 1, shape[dim], shape[dim])
    n, half = given["last_dim_size"], given["self"].meta["val"].shape[last]
    options = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
    sizes = ((1, 1.0), (n - half, 2.0), (2 * half - 1 - n, 1.0))
    counts = [r.emit(aten.full.default, [k], v, **options) for k, v in sizes]
    weight = r.emit(aten.reshape.default, r.emit(aten.cat.default, counts), [-1, *[1] * (len(shape) - 1 - last)])
    z = _waves(r, r.scaled(z, weight), last, 1, n, n)
    return _scaled(r, z, given, math.prod(shape[dim] for dim in given["dim"])).re


def paired(gm: fx.GraphModule, blame: Blame) -> fx.GraphModule:
    """Rewrite a graph without complex tensors that depend on its inputs; `blame` reports what cannot be rewritten."""
    if not any(is_complex(node) for node in gm.graph.nodes):
        return gm
    PairWriter(gm.graph, blame).run()
    return cleaned(gm)

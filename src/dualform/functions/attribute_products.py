"""Features of several attributes: tensor powers (Taylor), subsets (combinatorial), linear maps, compositions.

Legend: m attributes, D features, d degree, r size of a subset or a monomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.catalogue import Bound
from dualform.functions.basis import Expansion, expansion, expansions, positive
from dualform.functions.subsets import num_subsets, subsets, tails
from dualform.shapes import fail

_source = "Zhang 2024 (RPN 1, arXiv 2407.04819), section 5"


@expansion(
    formula="[x, x (x) x, .., x^(x)d]; symmetric: each monomial once", source=_source, domain="all reals; grows as x^d"
)
def taylor(degree: int = 2, symmetric: bool = False) -> Expansion:
    """Expand the attributes in their products of up to `degree` factors.

    Shape:  (..., m) -> (..., D), D = sum_r m^r, or C(m + d, d) - 1 if symmetric.
    Raises: ShapeError for degree < 1 and, when called, for a row of more than 1e8 features.
    """
    positive("taylor", "degree", degree)
    edge = 10.0 ** (30.0 / degree)
    return Expansion(
        "taylor", lambda x: x, lambda m: m, "C(m + d, d) - 1" if symmetric else "m + m^2 + .. + m^d", power=int(degree),
        symmetric=symmetric, reach=(-edge, edge),
    )  # fmt: skip


@expansion(
    formula="[the r-subsets of x, each written out, r = 1 .. d], in lexicographic order",
    source=f"{_source}. tinyBIG 0.2.1 returns nested lists of them, which no head can take",
    domain="all reals",
)
def combinatorial(degree: int = 2, with_replacement: bool = False) -> Expansion:
    """List the attributes of every subset of up to `degree` attributes.

    Shape:  (..., m) -> (..., D), D = sum_r r C(m, r), or r C(m + r - 1, r) with replacement.
    Raises: ShapeError for degree < 1.
    """
    positive("combinatorial", "degree", degree)

    def base(x: Tensor) -> Tensor:
        tuples, found = x.unsqueeze(-1), [x]
        for starts in tails(x.shape[-1], degree, repeat=with_replacement):
            rests = [tuples[..., start:, :] for start in starts]
            firsts = [x[..., i : i + 1, None].expand(*rest.shape[:-1], 1) for i, rest in enumerate(rests)]
            tuples = torch.cat([torch.cat(pair, -1) for pair in zip(firsts, rests, strict=True)], -2)
            found.append(tuples.flatten(-2))
        return torch.cat(found, -1)

    def size(m: int) -> int:
        return sum(r * num_subsets(m, r, repeat=with_replacement) for r in range(1, degree + 1))

    def label(names: Sequence[str]) -> list[str]:
        return [name for chosen in subsets(names, degree, repeat=with_replacement) for name in chosen]

    rule = "sum of r C(m + r - 1, r)" if with_replacement else "sum of r C(m, r)"
    return Expansion("combinatorial", base, size, rule, label=label)


@expansion(
    formula="[log N(x_S; 0, I_r) for the r-subsets S, r = 1 .. d], in lexicographic order",
    source=_source,
    domain="all reals; falls as -x^2; sums of marginals, so they span what x_i^2 and 1 span",
)
def combinatorial_normal(degree: int = 1, with_replacement: bool = False) -> Expansion:
    """Take the log-density of every subset of up to `degree` attributes under the standard normal.

    Shape:  (..., m) -> (..., D), D = sum_r C(m, r), or C(m + r - 1, r) with replacement.
    Raises: ShapeError for degree < 1.
    """
    positive("combinatorial_normal", "degree", degree)

    def base(x: Tensor) -> Tensor:
        one = x.square() * -0.5 - 0.5 * math.log(2 * math.pi)
        total, found = one, [one]
        for starts in tails(x.shape[-1], degree, repeat=with_replacement):
            total = torch.cat([first + total[..., s:] for first, s in zip(one.split(1, -1), starts, strict=False)], -1)
            found.append(total)
        return torch.cat(found, -1)

    def size(m: int) -> int:
        return sum(num_subsets(m, r, repeat=with_replacement) for r in range(1, degree + 1))

    def label(names: Sequence[str]) -> list[str]:
        chosen = subsets(names, degree, repeat=with_replacement)
        return [f"-0.5*({'+'.join(f'{n}**2' for n in s)}+{len(s)}*log(2*pi))" for s in chosen]

    rule = "sum of C(m + r - 1, r)" if with_replacement else "sum of C(m, r)"
    return Expansion("combinatorial_normal", base, size, rule, reach=(-1e15, 1e15), label=label)


Matrix = Sequence[Sequence[float]]


@expansion(
    formula="c x, or pre x (over the rows of a batch), or x post; x if none is given",
    source=_source,
    domain="all reals",
)
def linear(
    c: float | Sequence[float] | None = None,
    pre: Sequence[float] | Matrix | None = None,
    post: Sequence[float] | Matrix | None = None,
) -> Expansion:
    """Scale the attributes, or mix rows or attributes, by constants.

    Shape:  c a number or (m,); pre (b, b): x (..., b, m), row i of the result depends on all b; post (m, D). The first
            that is given counts.
    Raises: ShapeError if x does not have the constants' size.
    """
    kind, given = next(((k, v) for k, v in (("c", c), ("pre", pre), ("post", post)) if v is not None), ("none", 1.0))
    value = torch.tensor(given, dtype=torch.float64, device="cpu")
    shape, numbers, name = tuple(value.shape), value.tolist(), "linear"
    allowed = {"none": (0,), "c": (0, 1), "pre": (2,), "post": (2,)}[kind]
    if len(shape) not in allowed or (kind == "pre" and shape[0] != shape[1]):
        advice = "Pass nested tuples of numbers."
        fail(name, kind, f"has shape {shape}", "c () or (m,), pre (b, b), post (m, D)", advice)

    def base(x: Tensor) -> Tensor:
        if kind == "none":
            return x
        constant = torch.tensor(numbers, dtype=x.dtype, device=x.device)
        if kind == "pre" and (x.ndim < 2 or x.shape[-2] != shape[0]):
            advice = "Pass b rows at once."
            fail(name, "x", f"has shape {tuple(x.shape)}", f"(..., {shape[0]}, m) for pre {shape}", advice)
        return constant * x if kind == "c" else constant @ x if kind == "pre" else x @ constant

    def size(m: int) -> int:
        if shape and kind != "pre" and m != shape[0]:
            fail(name, "x", f"has {m} attributes", f"{shape[0]}, as {kind} {shape} asks", f"Pass x (..., {shape[0]}).")
        return shape[-1] if kind == "post" else m

    def label(names: Sequence[str]) -> list[str]:
        if kind == "none":
            return list(names)
        if kind == "pre":
            advice = "pre mixes the rows of a batch: a row has no formula."
            fail(name, "features", "do not exist", "features of one row", advice)
        if kind == "post":
            columns = zip(*numbers, strict=True)
            return ["+".join(f"{c!r}*{n}" for n, c in zip(names, column, strict=True)) for column in columns]
        each = numbers if shape else [numbers] * len(names)
        return [f"{factor!r}*{n}" for n, factor in zip(names, each, strict=True)]

    rule = "D of post (m, D)" if kind == "post" else "m"
    return Expansion(name, base, size, rule, batchwise=kind != "pre", label=label)


def _parts(name: str, functions: Sequence[Bound | Expansion]) -> tuple[Expansion, ...]:
    if not functions:
        advice = "Pass specs, as in functions=('taylor', 'bspline')."
        fail(name, "functions", "is empty", "at least one expansion", advice)
    return tuple(part.build() if isinstance(part, Bound) else part for part in functions)


def _common(parts: Sequence[Expansion], ends: Callable[[Expansion], tuple[float, float]]) -> tuple[float, float]:
    low, high = max(ends(p)[0] for p in parts), min(ends(p)[1] for p in parts)
    return (low, high) if low < high else ends(parts[0])


@expansion(
    formula="[f_1(x) | .. | f_k(x)]",
    source=_source,
    domain="where all parts are defined",
    nested={"functions": (expansions,)},
)
def extended(functions: Any = ("identity",)) -> Expansion:
    """Put the features of several expansions side by side.

    Shape:  (..., m) -> (..., D), D = D_1 + .. + D_k.
    Raises: ShapeError for an empty list.
    """
    parts = _parts("extended", functions)
    return Expansion(
        "extended", lambda x: torch.cat([part(x) for part in parts], -1), lambda m: sum(part.dim(m) for part in parts),
        " + ".join(f"({part.rule})" for part in parts), domain=_common(parts, lambda part: part.domain),
        reach=_common(parts, lambda part: part.reach), batchwise=all(part.batchwise for part in parts),
        rough="; ".join(part.rough for part in parts if part.rough),
        label=lambda names: [feature for part in parts for feature in part.features(names)],
    )  # fmt: skip


@expansion(
    formula="f_k(.. f_1(x))",
    source=_source,
    domain="that of f_1; the others see what comes before them",
    nested={"functions": (expansions,)},
)
def nested(functions: Any = ("identity",)) -> Expansion:
    """Expand the features of one expansion in the next.

    Shape:  (..., m) -> (..., D), D = D_k(.. D_1(m)).
    Raises: ShapeError for an empty list.
    """
    parts = _parts("nested", functions)

    def base(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    def size(m: int) -> int:
        for part in parts:
            m = part.dim(m)
        return m

    def label(names: Sequence[str]) -> list[str]:
        for part in parts:
            names = [f"({feature})" for feature in part.features(names)]
        return [name[1:-1] for name in names]

    return Expansion(
        "nested", base, size, " then ".join(part.rule for part in parts), domain=parts[0].domain,
        batchwise=all(part.batchwise for part in parts), rough="; ".join(part.rough for part in parts if part.rough),
        label=label,
    )  # fmt: skip

"""Neighbourhoods on a grid: every cell's patch of values, zero beyond the border.

Legend: C channels, h x w x d cells (d depth, 1 for images), p patch centres, e offsets of a patch. x is (...,
        C h w d), channel
first, depth fastest; the features are (C, e, p) flattened.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from dualform.functions.basis import Expansion, expansions, positive
from dualform.shapes import fail

Offset = tuple[int, int, int]
Steps = int | Sequence[int]
_patch = partial(
    expansions.record, suffix="_based_geometric_expansion", source="Zhang 2024 (RPN 2, arXiv 2411.11162)",
    domain="all reals; cells beyond the border count as 0",
)  # fmt: skip


def patches(
    name: str, offsets: Sequence[Offset], grid: Sequence[int] | None, channels: int, stride: Steps
) -> Expansion:
    """Make the expansion in patches {cell + offset} around every stride-th cell. grid: (h, w[, d]); None: square."""
    positive(name, "channels", channels)
    strides = (stride,) * 3 if isinstance(stride, int) else (*stride, 1)[:3]
    shape = None if grid is None else (*grid, 1)[:3]
    for option, sizes in (("stride", strides), ("grid", shape or (1, 1, 1))):
        if len(sizes) != 3 or any(int(size) != size or size < 1 for size in sizes):
            fail(name, option, f"is {sizes}", "2 or 3 whole numbers >= 1", f"Pass {option}=(h, w) or (h, w, d).")
    if not offsets or any(len(offset) != 3 for offset in offsets):
        fail(name, "offsets", f"are {tuple(offsets)}", "at least one (i, j, k)", "Pass offsets=((0, 0, 0), ..).")
    before = tuple(max(0, -min(o[axis] for o in offsets)) for axis in range(3))
    after = tuple(max(0, max(o[axis] for o in offsets)) for axis in range(3))

    def cells(m: int) -> tuple[int, int, int]:
        side = math.isqrt(m // channels)
        h, w, d = shape or (side, side, 1)
        if channels * h * w * d != m:
            expected = f"channels * h * w * d = {channels} * {h} * {w} * {d} = {channels * h * w * d}"
            fail(name, "x", f"has {m} attributes", expected, "Pass grid=(h, w) or (h, w, d) and channels.")
        return h, w, d

    def size(m: int) -> int:
        centres = math.prod([-(-n // step) for n, step in zip(cells(m), strides, strict=True)])
        return channels * len(offsets) * centres

    def base(x: Tensor) -> Tensor:
        shape = cells(x.shape[-1])
        borders = [width for axis in (2, 1, 0) for width in (before[axis], after[axis])]
        wide = pad(x.unflatten(-1, (channels, *shape)), borders)
        found = []
        for offset in offsets:
            moved = wide
            for axis in range(3):
                start = before[axis] + offset[axis]
                moved = moved[(..., slice(start, start + shape[axis], strides[axis]), *[slice(None)] * (2 - axis))]
            found.append(moved.flatten(-3))
        return torch.stack(found, -2).flatten(-3)

    def label(names: Sequence[str]) -> list[str]:
        places = base(torch.arange(1.0, len(names) + 1, device="cpu")).long().tolist()
        return [("0.0", *names)[place] for place in places]

    return Expansion(name, base, size, "C e p", label=label)


def box(before: Sequence[int], after: Sequence[int]) -> list[Offset]:
    """List the offsets -before .. after of every axis, the last fastest."""
    i, j, k = (range(-low, high + 1) for low, high in zip(before, after, strict=True))
    return list(itertools.product(i, j, k))


def ball(radius: int, depth: int, *, flat: bool) -> list[Offset]:
    """List the offsets of a cylinder along the depth (flat discs) or of a ball, the last axis fastest."""
    cube = box((radius, radius, depth), (radius, radius, depth))
    return [(i, j, k) for i, j, k in cube if i * i + j * j + (0 if flat else k * k) <= radius * radius]


@_patch(formula="[x[c, centre + offset]] over channels c, offsets, centres", suffix="_expansion")
def geometric(
    offsets: Sequence[Offset] = tuple(box((1, 1, 0), (1, 1, 0))),
    grid: Sequence[int] | None = None, channels: int = 1, stride: Steps = 1,
) -> Expansion:  # fmt: skip
    """Expand a grid in patches of any shape, given by the offsets of its cells from the centre."""
    return patches("geometric", [tuple(o) for o in offsets], grid, channels, stride)  # type: ignore[misc]


@_patch(formula="geometric with the offsets -before .. after of each axis")
def cuboid_patch(
    before: Sequence[int] = (1, 1, 0), after: Sequence[int] | None = None,
    grid: Sequence[int] | None = None, channels: int = 1, stride: Steps = 1,
) -> Expansion:  # fmt: skip
    """Expand a grid in boxes, before + after + 1 cells along each axis (after = before unless given)."""
    after = before if after is None else after
    if len(before) != 3 or len(after) != 3 or min(*before, *after) < 0:
        advice = "Pass before=(1, 1, 0)."
        fail("cuboid_patch", "(before, after)", f"is {(before, after)}", "3 numbers >= 0 each", advice)
    return patches("cuboid_patch", box(before, after), grid, channels, stride)


@_patch(formula="geometric with the offsets i^2 + j^2 <= radius^2, |k| <= depth")
def cylinder_patch(
    radius: int = 1, depth: int = 0, grid: Sequence[int] | None = None, channels: int = 1, stride: Steps = 1
) -> Expansion:
    """Expand a grid in cylinders along its depth: discs, on an image."""
    positive("cylinder_patch", "radius", radius, 0)
    positive("cylinder_patch", "depth", depth, 0)
    return patches("cylinder_patch", ball(radius, depth, flat=True), grid, channels, stride)


@_patch(formula="geometric with the offsets i^2 + j^2 + k^2 <= radius^2")
def sphere_patch(radius: int = 1, grid: Sequence[int] | None = None, channels: int = 1, stride: Steps = 1) -> Expansion:
    """Expand a grid in balls."""
    positive("sphere_patch", "radius", radius, 0)
    return patches("sphere_patch", ball(radius, radius, flat=False), grid, channels, stride)

"""Lines of Triton that move entries: gathers, parts put together, slices and their places, reshapes, and stores.

A view that moves nothing is bookkeeping of `tiles`; the others are gathers, or masks over the places of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dualform.kernels.tiles import (
    LIMIT,
    Memory,
    Parts,
    Tile,
    Untileable,
    Value,
    between,
    padded,
    regrouped,
    relabelled,
    resized,
    selected,
    sliced,
    unsqueezed,
)
from dualform.kernels.triton_lines import Lines


class Moves(Lines):
    """Lines for whole values, and for views of them that move entries."""

    def real(self, x: Value, hint: str = "") -> Tile:
        """Have a value as a tile."""
        if isinstance(x, Memory):
            return self.load(x, hint)
        return self._together(x, hint or "whole") if isinstance(x, Parts) else x

    def tiles(self, x: Value) -> list[Tile]:
        """Have a value as tiles, one for each of its parts."""
        return [t for v in x.values for t in self.tiles(v)] if isinstance(x, Parts) else [self.real(x)]

    def store(
        self, name: str, value: Value, looped: bool, indent: str = "", base: str = "", start: Sequence[int] = ()
    ) -> None:
        """Write a value to the tensor of an argument."""
        start = list(start) or [0] * len(value.shape)
        if isinstance(value, Parts):
            for v, n in zip(value.values, value.sizes, strict=True):
                self.store(name, v, looped, indent, base, start)
                start[value.axis] += n
            return
        tile = self.real(value)
        space = [a for a, n in enumerate(tile.shape) if n != 1]
        goal = Memory(name, tile.shape, tuple(range(len(start))), tuple(start), (1,) * len(start), tile.kind, looped)
        where, mask = self.address(goal, space, base or f"{name}_at")
        text = self.whole(tile, space, f".to({self.T})" if tile.kind == torch.bool else "")
        self.line(f"{indent}tl.store({where}, {text}{f', mask={mask}' if mask else ''})", looped)

    # -- along an axis -------------------------------------------------------------------------------------------

    def gather(self, hint: str, x: Tile, axis: int, index: str, n: int) -> Tile:
        """Take, along a value's axis, the entries at n places: `index` in terms of the new places."""
        k = x.axes[axis]
        assert k is not None
        if n == 1:
            raise Untileable("one entry along an axis")
        shape, space = resized(x.shape, axis, n), x.order
        at = self.at(f"({index})", k, len(space))
        text = f"tl.gather({x.text}, tl.broadcast_to({at}, {[padded(shape[a]) for a in space]}), {k})"
        return self.made(hint, text, shape, space, x.looped, x.kind, x.clean - {k})

    def select(self, hint: str, x: Value, dim: int, index: int) -> Value:
        """Take one entry along an axis."""
        found = selected(x, dim, index)
        if found is not None:
            return found
        tile = self.counted(self.real(x))
        dim = dim % len(tile.shape)
        k, n = tile.axes[dim], tile.shape[dim]
        assert k is not None
        at = self.at(self.place(n), k, tile.rank)
        text = f"tl.sum(tl.where({at} == {index % n}, {tile.text}, 0), {k})"
        shape = (*tile.shape[:dim], *tile.shape[dim + 1 :])
        space = [a - (a > dim) for a in tile.order if a != dim]
        clean = frozenset(c - (c > k) for c in tile.clean if c != k)
        return self.made(hint, text, shape, space, tile.looped, tile.kind, clean)

    def slice(self, x: Value, dim: int, start: int, end: int, step: int = 1, hint: str = "part") -> Value:
        """Take entries along an axis."""
        found = sliced(x, dim, start, end, step)
        if found is not None:
            return found
        dim = dim % len(x.shape)
        places = range(*slice(start, end, step).indices(x.shape[dim]))
        if len(places) == 1:
            return unsqueezed(self.select(hint, x, dim, places[0]), dim)
        tile = self.real(x)
        last = tile.shape[dim] - 1
        index = f"tl.minimum({places.start} + {places.step} * {self.place(len(places))}, {last})"
        return self.gather(hint, tile, dim, index, len(places))

    def placed(self, hint: str, x: Value, dim: int, places: range, n: int) -> Value:
        """Put entries along an axis at places among n, zeros elsewhere."""
        dim = dim % len(x.shape)
        if len(places) == n:
            return x
        if places.step == 1 and (n <= 4 or isinstance(x, Parts)):
            return between(x, dim, places.start, n - places.start - len(places))
        tile = self.real(x)
        if tile.axes[dim] is not None:
            index = f"tl.minimum(tl.maximum(({self.place(n)} - {places.start}) // {places.step}, 0), {len(places) - 1})"
            tile = self.gather(hint, tile, dim, index, n)
        tile = replace(tile, shape=resized(x.shape, dim, n))
        space, i = self._beside([tile], dim)
        there = [f"({i} >= {places.start}) & ({i} < {places.stop})" if len(places) > 1 else f"{i} == {places.start}"]
        there += [f"(({i} - {places.start}) % {places.step} == 0)"] if len(places) > 1 and places.step > 1 else []
        text = f"tl.where({' & '.join(there)}, {self.operand(tile, space, len(tile.shape))}, 0)"
        clean = frozenset(p for p, a in enumerate(space) if a == dim or tile.axes[a] in tile.clean)
        return self.made(hint, text, tile.shape, space, tile.looped, tile.kind, clean)

    def _together(self, x: Parts, hint: str) -> Tile:
        """Put parts together as one tile."""
        shape, dim, n = x.shape, x.axis, x.shape[x.axis]
        if n == 1:
            return self.real(x.values[0])
        found: Any = None
        at = 0
        for v, size in zip(x.values, x.sizes, strict=True):
            tile = self.real(v)
            if tile.axes[dim] is not None and (at or padded(size) != padded(n)):
                index = f"tl.minimum(tl.maximum({self.place(n)} - {at}, 0), {size - 1})"
                tile = self.gather(hint, tile, dim, index, n)
            tile = replace(tile, shape=shape, clean=tile.clean - {tile.axes[dim]})
            found = tile if found is None else self._behind(hint, found, tile, dim, at)
            at += size
        return found

    def _behind(self, hint: str, first: Tile, second: Tile, dim: int, at: int) -> Tile:
        """Take the first's entries before a place along an axis, the second's from there on."""
        tiles, shape = (first, second), first.shape
        space, i = self._beside(tiles, dim)
        texts = [self.aligned(t, space, len(shape)) for t in tiles]
        if second.number is not None:
            texts[0] = self.operand(first, space, len(shape))
        clean = (
            p for p, a in enumerate(space) if a != dim and all(t.number == 0 or t.axes[a] in t.clean for t in tiles)
        )
        text, looped = f"tl.where({i} < {at}, {texts[0]}, {texts[1]})", first.looped or second.looped
        return self.made(hint, text, shape, space, looped, first.kind, frozenset(clean))

    def _beside(self, tiles: Sequence[Tile], dim: int) -> tuple[list[int], str]:
        """Choose the axes of what is made of tiles and of the places along an axis; and spell those."""
        shape = tiles[0].shape
        space = self.space_of(tiles, shape)
        space += [] if dim in space else [dim]
        return space, self.at(self.place(shape[dim]), space.index(dim), len(space))

    # -- in another shape ----------------------------------------------------------------------------------------

    def view(self, hint: str, x: Value, shape: Sequence[int]) -> Value:
        """Read a value's entries, in order, in another shape."""
        try:
            found = relabelled(x, shape)
        except Untileable:
            found = relabelled(self.real(x), shape)
        if found is not None:
            return found
        tile = self.real(x)
        if tile.number is not None:
            return replace(tile, shape=tuple(shape), axes=(None,) * len(shape))
        return self._reshaped(hint, tile, shape)

    def _reshaped(self, hint: str, x: Tile, shape: Sequence[int]) -> Tile:
        """Merge and split axes: to one axis per group, entries to their places, to the new axes."""
        groups = regrouped(x.shape, shape)
        text = self.whole(x, [a for left, _ in groups for a in left])
        olds = [[x.shape[a] for a in left] for left, _ in groups]
        news = [[shape[a] for a in right] for _, right in groups]
        lengths = [math.prod(map(padded, sizes)) for sizes in olds]
        if math.prod(lengths) > LIMIT or math.prod(math.prod(map(padded, sizes)) for sizes in news) > LIMIT:
            raise Untileable("its entries are no tile of a shape that can be read otherwise")
        text = f"tl.reshape({text}, {lengths})"
        for g, (old, new) in enumerate(zip(olds, news, strict=True)):
            if (len(old) > 1 or len(new) > 1) and (index := self._moves(old, new)):
                lengths[g] = math.prod(map(padded, new))
                at = self.at(f"({index})", g, len(groups))
                text = f"tl.gather({text}, tl.broadcast_to({at}, {lengths}), {g})"
        goal = [a for _, right in groups for a in right]
        text = f"tl.reshape({text}, {[padded(shape[a]) for a in goal]})"
        return self.made(hint, text, shape, goal, x.looped, x.kind)

    def _moves(self, old: Sequence[int], new: Sequence[int]) -> str:
        """Say where, in axes of old sizes, the entry at each place of axes of new sizes is; "" if at the same."""
        length, number = math.prod(map(padded, new)), math.prod(new)

        def plain(sizes: Sequence[int]) -> list[int]:
            return [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]

        def parts(sizes: Sequence[int]) -> list[int]:
            return plain([*map(padded, sizes)])

        if length == math.prod(map(padded, old)) and (parts(old), parts(new)) == (plain(old), plain(new)):
            return ""
        self.places.add(length)
        i = f"i{length}"
        entry = " + ".join(
            f"tl.minimum({i} // {far} % {padded(size)}, {size - 1}) * {near}"
            for size, far, near in zip(new, parts(new), plain(new), strict=True)
        )
        entry = f"tl.minimum({entry}, {number - 1})"
        return " + ".join(
            f"({entry}) // {near} % {size} * {far}" for size, far, near in zip(old, parts(old), plain(old), strict=True)
        )


__all__ = ["Moves"]

"""Lines of Triton for the ops of a kernel: maps, what is made of places, reductions, products, of tiles or parts.

Two rules of products: what lies beyond an axis that is summed over is zero in both factors, and what is carried on is
not transposed (some versions then compute something else on Hopper, silently: `triton_launch.TURNED_WRONG`): the other
factor and the result are; and where both are carried on, only a version that is right has the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dualform.kernels.tiles import (
    DEEP,
    Memory,
    Parts,
    Tile,
    Untileable,
    Value,
    axes_in,
    constant,
    expanded,
    padded,
    permuted,
    resized,
    spelt,
    unsqueezed,
)
from dualform.kernels.triton_lines import TYPES
from dualform.kernels.triton_moves import Moves
from dualform.ops.table import ENTRIES, FOLDS

SHORT = 8  # places summed over in a product that matrix units do not compute, to be added up one by one


class Writer(Moves):
    """Writes the lines of ops."""

    # -- maps ----------------------------------------------------------------------------------------------------

    def mapped(
        self,
        hint: str,
        row: str,
        operands: Sequence[Any],
        params: dict[str, Any],
        shape: Sequence[int],
        kind: torch.dtype,
    ) -> Value:
        """Compute entry by entry."""
        values = [
            x if isinstance(x, Tile | Memory | Parts) else constant(x, (), torch.get_default_dtype()) for x in operands
        ]
        if any(isinstance(x, Parts) for x in values):
            return self._mapped_parts(hint, row, values, params, shape, kind)
        if row == "copy" and values[0].kind == kind:
            return expanded(values[0], shape)
        entry = ENTRIES[row]
        if not entry.triton:
            raise Untileable(f"its row {row!r} has no Triton text in ops/")
        tiles = [self.real(x) for x in values]
        if row == "where" and tiles[0].number is not None:
            return expanded(tiles[1] if tiles[0].number else tiles[2], shape)
        space = self.space_of(tiles, shape)
        numbers = all(x.number is not None for x in (tiles[1:] if row == "where" else tiles))
        bare = row == "where" or entry.bare
        texts = []
        for p, x in enumerate(tiles):
            text = self.aligned(x, space, len(shape))
            truth = entry.truth or (row == "where" and p == 0)
            if x.number is not None:
                text = text if bare and not (numbers and p == 1) else f"tl.full([], {x.text}, {self.T})"
            elif truth and x.kind != torch.bool:
                text = f"({text} != 0)"
            elif not truth and (x.kind == torch.bool or (kind.is_floating_point and not x.kind.is_floating_point)):
                text = f"{text}.to({self.T if kind.is_floating_point else 'tl.int64'})"
            texts.append(text)
        text = self._power(texts, tiles[1].number) if row == "pow" else entry.triton.format(*texts, T=self.T, **params)
        if row == "copy" or (row == "trunc" and not kind.is_floating_point):
            text = f"({text}).to({self.typed(kind)})"
        held = any(x.held and x.rank == len(space) for x in tiles)
        looped = any(x.looped for x in tiles)
        return self.made(hint, text, shape, space, looped, kind, self._zeros(row, tiles, space, shape), held)

    @staticmethod
    def _power(texts: list[str], p: float | None) -> str:
        """x^p, a small whole p by products."""
        if p in (1, 2, 3, 4):
            return " * ".join([texts[0]] * int(p or 1))
        return ENTRIES["pow"].triton.format(*texts)

    def _zeros(self, row: str, tiles: Sequence[Tile], space: Sequence[int], shape: Sequence[int]) -> frozenset[int]:
        """Say along which axes a map gives zero beyond the edge."""
        found = set()
        for p, a in enumerate(space):
            places = [a - (len(shape) - len(x.shape)) for x in tiles]
            own = [x.axes[k] if k >= 0 else None for x, k in zip(tiles, places, strict=True)]
            zero = [x.number == 0 or k in x.clean for x, k in zip(tiles, own, strict=True)]
            absent = [k is None for k in own]
            if (
                (ENTRIES[row].zero and all(zero))
                or (row == "mul" and any(zero) and all(z or n for z, n in zip(zero, absent, strict=True)))
                or (row == "where" and all(zero[1:]))
                or (row == "div" and zero[0] and absent[1])
            ):
                found.add(p)
        return frozenset(found)

    def _mapped_parts(
        self, hint: str, row: str, values: list[Any], params: dict[str, Any], shape: Sequence[int], kind: torch.dtype
    ) -> Value:
        """Compute part by part, if what is not cut alike can be cut; else put parts together first."""
        r = len(shape)
        first = next(x for x in values if isinstance(x, Parts))
        at = first.axis + r - len(first.shape)
        alike = all(x.axis + r - len(x.shape) == at and x.sizes == first.sizes for x in values if isinstance(x, Parts))
        moves = any(isinstance(x, Tile) and (k := at - r + len(x.shape)) >= 0 and x.axes[k] is not None for x in values)
        small = sum(n != 1 for n in shape) <= 2
        if not alike or sum(first.sizes) != shape[at] or (moves and small):
            values = [self.real(x) if isinstance(x, Parts) else x for x in values]
            return self.mapped(hint, row, values, params, shape, kind)
        found, start = [], 0
        for k, n in enumerate(first.sizes):
            own = []
            for x in values:
                axis = at - (r - len(x.shape))
                if isinstance(x, Parts):
                    own.append(x.values[k])
                elif axis < 0 or x.shape[axis] == 1:
                    own.append(x)
                else:
                    own.append(self.slice(x, axis, start, start + n))
            start += n
            found.append(self.mapped(hint, row, own, params, resized(shape, at, n), kind))
        return Parts(at, tuple(found))

    def filled(
        self, hint: str, row: str, params: dict[str, Any], x: Value | None, shape: Sequence[int], kind: torch.dtype
    ) -> Tile:
        """Make a value of places: numbers, counts, triangles."""
        if row == "fill":
            return constant(params["value"], shape, kind)
        if row == "arange":
            if shape[0] == 1:
                return constant(params["start"], shape, kind)
            text = f"({spelt(params['start'])} + {spelt(params['step'])} * {self.place(shape[0])})"
            return self.made(hint, f"{text}.to({self.typed(kind)})", shape, [0], False, kind)
        r = len(shape)
        if row == "eye":
            space = [a for a in (0, 1) if shape[a] != 1]
            if not space:
                return constant(1.0, shape, kind)
            texts = [self.at(self.place(shape[a]), space.index(a), len(space)) if a in space else "0" for a in (0, 1)]
            text = f"({texts[0]} == {texts[1]}).to({self.typed(kind)})"
            return self.made(hint, text, shape, space, False, kind)
        if x is None or row not in ("tril", "triu"):
            raise Untileable(f"{row!r} is made of places, and has no walker here")
        tile = self.real(x)
        space = self.space_of([tile], shape)
        space += [a for a in (r - 2, r - 1) if a not in space and shape[a] != 1]
        rows, columns = (
            self.at(self.place(shape[a]), space.index(a), len(space)) if a in space else "0" for a in (r - 2, r - 1)
        )  # fmt: skip
        sign, shift = (">=" if row == "tril" else "<="), params["diagonal"]
        value = self.operand(tile, space, r)
        text = f"tl.where({rows} {sign} {columns}{f' - ({shift})' if shift else ''}, {value}, 0)"
        clean = frozenset(p for p, a in enumerate(space) if tile.axes[a] in tile.clean)
        return self.made(hint, text, shape, space, tile.looped, kind, clean)

    # -- reductions ----------------------------------------------------------------------------------------------

    def reduced(
        self, hint: str, row: str, x: Value, kept: Sequence[int | None], scale: float, shape: Sequence[int]
    ) -> Value:
        """Sum, or so, over the axes that are not kept."""
        text, neutral = FOLDS[row].triton
        if not text:
            raise Untileable(f"its row {row!r} has no Triton text in ops/")
        if isinstance(x, Parts):
            return self._reduced_parts(hint, row, x, kept, scale, shape)
        tile = self.real(x)
        over = [a for a, k in enumerate(kept) if k is None]
        if tile.number is not None:
            count = math.prod(tile.shape[a] for a in over)
            number = {"sum": tile.number * count * scale, "prod": tile.number**count}.get(row, tile.number)
            return constant(number, shape, tile.kind)
        times = math.prod(tile.shape[a] for a in over if tile.axes[a] is None)
        if times != 1 and row == "prod":
            raise Untileable("a product of repeated entries")
        own = sorted((k for a in over if (k := tile.axes[a]) is not None), reverse=True)
        factor = scale * times if row == "sum" else 1.0
        if not own and factor == 1:
            return replace(tile, shape=tuple(shape), axes=axes_in(self._left(tile, own, kept), len(shape)))
        for k in own:
            tile = self.cleaned(tile, k, neutral)
        tile = self.counted(tile)
        value = tile.text
        for k in own:
            value = text.format(value, axis=k)
        return self._folded(hint, value, tile, own, kept, factor, shape, row == "sum")

    def reduced_at_once(
        self, found: Sequence[tuple[str, Value, Sequence[int | None], float, Sequence[int]]]
    ) -> list[Value]:
        """Sum values over one axis each, in one reduction if they lie alike: (hint, value, kept, scale, shape) each."""
        tiles, own = [x for _, x, *_ in found if isinstance(x, Tile)], []
        for tile, (_, _, kept, *_) in zip(tiles, found, strict=False):
            own.append([k for a, n in enumerate(kept) if n is None and (k := tile.axes[a]) is not None])
        alike = len(tiles) == len(found) and len({(x.sizes, *k) for x, k in zip(tiles, own, strict=True)}) == 1
        if not alike or len(own[0]) != 1 or any(x.number is not None or x.kind == torch.bool for x in tiles):
            return [self.reduced(hint, "sum", x, kept, scale, shape) for hint, x, kept, scale, shape in found]
        ((k,), *_), looped = own, any(x.looped for x in tiles)
        tiles = [self.cleaned(x, k) for x in tiles]
        names = [self.named(f"{hint}_raw") for hint, *_ in found]
        self.line(
            f"{', '.join(names)} = tl.reduce(({', '.join(x.text for x in tiles)}), {k}, sums{len(found)}_)", looped
        )
        results = []
        for name, tile, (hint, _, kept, scale, shape) in zip(names, tiles, found, strict=True):
            results.append(self._folded(hint, name, replace(tile, looped=looped), [k], kept, scale, shape, True))
        return results

    @staticmethod
    def _left(x: Tile, own: Sequence[int], kept: Sequence[int | None]) -> list[int]:
        """List the result's axes that a variable has when its own are gone, in its order."""
        return [a for k, b in enumerate(x.order) if k not in own and (a := kept[b]) is not None]

    def _folded(
        self, hint: str, text: str, x: Tile, own: Sequence[int], kept: Sequence[int | None], factor: float,
        shape: Sequence[int], sums: bool,
    ) -> Tile:  # fmt: skip
        """Write what a tile is, folded along its own axes, times a factor."""
        text = text if factor == 1 else f"{text} * {spelt(factor)}"
        left = [k for k in range(x.rank) if k not in own]
        clean = frozenset(p for p, k in enumerate(left) if sums and k in x.clean)
        return self.made(hint, text, shape, self._left(x, own, kept), x.looped, x.kind, clean)

    def _reduced_parts(
        self, hint: str, row: str, x: Parts, kept: Sequence[int | None], scale: float, shape: Sequence[int]
    ) -> Value:
        goal = kept[x.axis]
        if goal is not None:
            parts = [(v, resized(shape, goal, n)) for v, n in zip(x.values, x.sizes, strict=True)]
            return Parts(goal, tuple(self.reduced(hint, row, v, kept, scale, s) for v, s in parts))
        found = [self.reduced(hint, row, v, kept, scale, shape) for v in x.values]
        total = found[0]
        for one in found[1:]:
            total = self.mapped(hint, FOLDS[row].joins, [total, one], {}, shape, one.kind)
        return total

    # -- products ------------------------------------------------------------------------------------------------

    def product(self, hint: str, a: Value, b: Value, shape: Sequence[int]) -> Value:
        """Multiply matrices (..., M, K) and (..., K, N); vectors where there is one axis."""
        if len(a.shape) == 1:
            found = self.product(hint, unsqueezed(a, 0), b, (1, *shape))
            return self.view(hint, found, shape)
        if len(b.shape) == 1:
            found = self.product(hint, a, unsqueezed(b, 1), (*shape, 1))
            return self.view(hint, found, shape)
        if isinstance(a, Parts) or isinstance(b, Parts):
            return self._product_of_parts(hint, a, b, shape)
        x, y = (self._factor(v) if isinstance(v, Memory) else self.real(v) for v in (a, b))
        r = len(shape)
        (m, ka), (kb, n) = x.axes[-2:], y.axes[-2:]
        batch = [k for t in (x, y) for k in t.axes[:-2] if k is not None]
        if ka is None or kb is None or m is None or n is None or (batch and len(batch) != 2):
            every = (*shape[:-1], x.shape[-1], shape[-1])
            there = {a + (a >= r - 1) * (k == 1) for k, t in enumerate((x, y)) for a in t.order}
            if x.shape[-1] <= SHORT and math.prod(padded(every[a]) for a in there) > DEEP:
                return self._outer_products(hint, x, y, shape)
            both = [unsqueezed(x, r), unsqueezed(y, r - 2)]
            terms = self.mapped(f"{hint}_terms", "mul", both, {}, every, self.dtype)
            kept = [*range(r - 1), None, r - 1]
            return self.reduced(hint, "sum", terms, kept, 1.0, shape)
        x, y = self.cleaned(x, ka), self.cleaned(y, kb)
        return self._dot(hint, x, y, shape)

    def _outer_products(self, hint: str, x: Value, y: Value, shape: Sequence[int]) -> Value:
        """Multiply by adding up, for each of a few places that are summed over, a column times a row."""
        r, total = len(shape), None
        for k in range(x.shape[-1]):
            column, row = self.select(hint, x, r - 1, k), self.select(hint, y, r - 2, k)
            one = self.mapped(hint, "mul", [unsqueezed(column, r - 1), unsqueezed(row, r - 2)], {}, shape, self.dtype)
            total = one if total is None else self.mapped(hint, "plus", [total, one], {}, shape, self.dtype)
        assert total is not None
        return total

    def _factor(self, x: Memory) -> Tile:
        """Read a factor; narrow: as something that Triton does not move what is read past, twice its bytes."""
        tile, kind = self.load(x, factor=True), self.precision.factors
        if not self.precision.narrow or kind is None or not tile.looped:
            return tile
        key = ("factor", tile.text)
        if key not in self.loaded:
            name = self.named(f"{tile.text}_factor")
            self.entries[name] = self.entries[tile.text] // 2
            self.line(f"{name} = tl.where(n < last, {tile.text}, 0.0).to({TYPES[kind]})", True)
            self.loaded[key] = replace(tile, text=name)
        return replace(self.loaded[key], shape=tile.shape, axes=tile.axes)

    def _dot(self, hint: str, x: Tile, y: Tile, shape: Sequence[int]) -> Tile:
        """Multiply tiles, or their transposes in reverse: whichever leaves alone what is carried on, and moves less."""
        r = len(shape)
        spaces = [*range(r - 2), r - 2, r - 1]

        def turned(t: Tile) -> bool:
            return t.order != sorted(t.order)

        forth = [t.held and turned(t) for t in (x, y)], sum(map(turned, (x, y)))
        swap = [*range(r - 2), r - 1, r - 2]
        x_, y_ = (permuted(t, swap) for t in (x, y))
        assert isinstance(x_, Tile) and isinstance(y_, Tile)
        back = [t.held and turned(t) for t in (y_, x_)], sum(map(turned, (y_, x_)))
        reverse = (any(back[0]), back[1]) < (any(forth[0]), forth[1])
        if any((back if reverse else forth)[0]) and not self.precision.turns:
            raise Untileable("both factors are carried on, one of them transposed")
        left, right = (y_, x_) if reverse else (x, y)
        factors = self.precision.factors or self.dtype
        short = f".to({TYPES[factors]})" if factors != self.dtype else ""  # before it moves: half the bytes
        texts = [self.aligned(t, [a for a in spaces if t.axes[a] is not None], r, short) for t in (left, right)]
        how = f", input_precision='{self.precision.float32}'" if factors == torch.float32 else ""
        out = f", out_dtype={self.T}" if self.dtype != torch.float32 else ""
        space = [a for a in ([*range(r - 2), r - 1, r - 2] if reverse else spaces) if shape[a] != 1]
        ends = enumerate(((left, -2), (right, -1)), len(space) - 2)
        clean = frozenset(p for p, (t, a) in ends if t.axes[a] in t.clean)
        self.flops += 2 * math.prod(shape) * x.shape[-1]
        text = f"tl.dot({texts[0]}, {texts[1]}{how}{out})"
        return self.made(hint, text, shape, space, x.looped or y.looped, self.dtype, clean)

    def _product_of_parts(self, hint: str, a: Value, b: Value, shape: Sequence[int]) -> Value:
        """Multiply what is cut: along its rows or columns part by part, along what is summed over part with part."""
        r = len(shape)
        for x, own, summed in ((a, r - 2, r - 1), (b, r - 1, r - 2)):
            if isinstance(x, Parts) and x.axis == own:
                pairs = [((v, b) if x is a else (a, v), resized(shape, own, v.shape[own])) for v in x.values]
                return Parts(own, tuple(self.product(hint, *p, s) for p, s in pairs))
            if isinstance(x, Parts) and x.axis == summed:
                other, axis = (b, r - 2) if x is a else (a, r - 1)
                total, start = None, 0
                for v, n in zip(x.values, x.sizes, strict=True):
                    part = self.slice(other, axis, start, start + n)
                    one = self.product(hint, *((v, part) if x is a else (part, v)), shape)
                    total = one if total is None else self.mapped(hint, "plus", [total, one], {}, shape, self.dtype)
                    start += n
                assert total is not None
                return total
        return self.product(hint, self.real(a), self.real(b), shape)

    def diagonal(self, hint: str, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
        """Take the entries whose places along two axes differ by a number; they come last."""
        r = len(x.shape)
        order = [a for a in range(r) if a not in (dim1 % r, dim2 % r)]
        tile = self.real(permuted(x, [*order, dim1, dim2]))
        rows, columns = tile.shape[-2:]
        length = min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns)
        if 1 in tile.shape:
            raise Untileable("a diagonal of one row, or beside axes of one entry")
        space = [*range(r)]
        i, j = (self.at(self.place(tile.shape[a]), a, r) for a in (r - 2, r - 1))
        text = f"tl.where({j} - {i} == {offset}, {self.aligned(tile, space, r)}, 0)"
        picked = self.made(f"{hint}_on", text, tile.shape, space, tile.looped, tile.kind)
        over = r - 1 if offset >= 0 else r - 2
        kept = [a if a < r - 2 else None if a == over else r - 2 for a in range(r)]
        rest = (*tile.shape[: r - 2], rows if offset >= 0 else columns)
        return self.slice(self.reduced(hint, "sum", picked, kept, 1.0, rest), r - 2, 0, length)


__all__ = ["Writer"]

"""Lines of Triton for values of a kernel: what is read and written, maps, reductions, products, views that move entries.

A value is a tile in registers (`tiles`); views are bookkeeping; maps, reductions and products are a line each. What cannot be a tile is
`Untileable`, and the caller decides where else it is computed.

Two rules of products: what lies beyond an axis that is summed over is zero in both factors, and what is carried on is never transposed
(Triton 3.4 to 3.7 then compute something else on Hopper, silently): instead, the other factor and the result are.

Legend: i16 places along an axis of 16 entries; T the type that is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dualform.kernels.tiles import (
    LIMIT,
    Memory,
    Parts,
    Tile,
    Untileable,
    Value,
    behind,
    constant,
    expanded,
    padded,
    permuted,
    regrouped,
    relabelled,
    selected,
    sliced,
    spelt,
    unsqueezed,
)  # fmt: skip
from dualform.ops.table import ENTRIES, FOLDS

aten = torch.ops.aten
TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
ITS_OWN = "cache_modifier='.ca'"  # what a load has by default; as it is said, the load is not merged with another of the same place


@dataclass(frozen=True)
class Precision:
    """What a product of matrices takes: the type of its factors (None: that which is computed in), and how float32 is multiplied.

    at_once: are sums that do not wait for each other one reduction? ahead: is what a mini-batch reads loaded during the one before?
    """

    factors: torch.dtype | None = None
    float32: str = "ieee"  # | "tf32" | "tf32x3"
    at_once: bool = False
    ahead: bool = False


@dataclass
class Writer:
    """Lines of a kernel: those before the loop over mini-batches, and those inside it."""

    dtype: torch.dtype
    precision: Precision = Precision()
    once: list[str] = field(default_factory=list)
    loop: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    places: set[int] = field(default_factory=set)
    loaded: dict[Any, Tile] = field(default_factory=dict)
    flops: int = 0
    sizes: list[int] = field(default_factory=list)  # entries of the tiles made
    ahead: bool = False  # is what the next mini-batch reads loaded while this one is computed?
    first: list[str] = field(default_factory=list)  # such loads, for the first mini-batch
    next: list[str] = field(default_factory=list)

    @property
    def T(self) -> str:
        return TYPES[self.dtype]

    # -- lines ---------------------------------------------------------------------------------------------------

    def named(self, hint: str) -> str:
        name, k = hint, 1
        while name in self.taken:
            name, k = f"{hint}_{k}", k + 1
        self.taken.add(name)
        return name

    def line(self, text: str, looped: bool) -> None:
        (self.loop if looped else self.once).append(text)

    def made(
        self, hint: str, text: str, shape: Sequence[int], space: Sequence[int], looped: bool, kind: torch.dtype,
        clean: frozenset[int] = frozenset(), held: bool = False,
    ) -> Tile:  # fmt: skip
        """Write a line; space: the value's axes that the variable has, in its order."""
        entries = math.prod(padded(shape[a]) for a in space)
        if entries > LIMIT:
            raise Untileable(f"its {' x '.join(map(str, shape))} entries are no tile of at most {LIMIT:,}")
        self.sizes.append(entries)
        name = self.named(hint)
        self.line(f"{name} = {text}  # {' x '.join(map(str, shape)) or 'a number'}", looped)
        axes = tuple(space.index(a) if a in space else None for a in range(len(shape)))
        return Tile(name, tuple(shape), axes, clean, kind, looped, held)

    def place(self, n: int) -> str:
        """Name the places along an axis of n entries."""
        self.places.add(padded(n))
        return f"i{padded(n)}"

    @staticmethod
    def at(text: str, axis: int, rank: int) -> str:
        """Turn a variable with one axis into one with `rank`, of which it is number `axis`."""
        return text if rank == 1 else f"{text}[{', '.join(':' if a == axis else 'None' for a in range(rank))}]"

    # -- memory --------------------------------------------------------------------------------------------------

    def _address(self, x: Memory, space: Sequence[int], base: str) -> tuple[str, str]:
        """Say where entries lie, and which of them exist. space: axes of the value, in the order of the variable's."""
        text, masks = base, []
        for k, start in enumerate(x.start):
            if start:
                text += f" + {start} * {x.name}_s{k}"
        for p, a in enumerate(space):
            i = self.at(self.place(x.shape[a]), p, len(space))
            step = f"{x.steps[a]} * " if x.steps[a] != 1 else ""
            text += f" + {step}{i} * {x.name}_s{x.axes[a]}"
            if padded(x.shape[a]) != x.shape[a]:
                masks.append(f"({i} < {x.shape[a]})")
        return text, " & ".join(masks)

    def load(self, x: Memory, hint: str = "", factor: bool = False) -> Tile:
        """Read a value, once: as its tensor's axes lie. factor: of a product, which reads it from memory laid out for that."""
        space = sorted(
            (a for a, k in enumerate(x.axes) if k is not None and x.shape[a] != 1), key=lambda a: x.axes[a] or 0
        )
        early = self.ahead and x.looped and not factor
        key = (x.name, x.start, factor and self.ahead, *((x.axes[a], x.steps[a], x.shape[a]) for a in space))
        if key in self.loaded:
            found = self.loaded[key]
            axes = tuple(space.index(a) if a in space else None for a in range(len(x.shape)))
            return replace(found, shape=x.shape, axes=axes)
        where, mask = self._address(x, space, f"{x.name}_{'ahead' if early else 'at'}")
        text = f"tl.load({where}{f', mask={mask}, other=0' if mask else ''}{', ' + ITS_OWN if early else ''})"
        if early:
            coming = self.named(f"{hint or x.name}_next")
            self.first.append(f"{coming} = {text}")
            self.next.append(f"{coming} = {text}")
            text = coming
        text += f".to({self.typed(x.kind)})"
        tile = self.made(hint or x.name, text, x.shape, space, x.looped, x.kind, frozenset(range(len(space))))
        if early:
            self.loop.insert(len(self.next) - 1, self.loop.pop())
        self.loaded[key] = tile
        return tile

    def typed(self, kind: torch.dtype) -> str:
        return "tl.int1" if kind == torch.bool else self.T if kind.is_floating_point else "tl.int64"

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
        where, mask = self._address(goal, space, base or f"{name}_at")
        text = self.aligned(tile, space, len(tile.shape))
        if tile.kind == torch.bool and tile.number is None:
            text = f"({text}).to({self.T})"
        if tile.number is not None:
            text = f"tl.full([{', '.join(str(padded(tile.shape[a])) for a in space)}], {text}, {self.T})"
        elif tile.rank < len(space):
            text = f"tl.broadcast_to({text}, [{', '.join(str(padded(tile.shape[a])) for a in space)}])"
        self.line(f"{indent}tl.store({where}, {text}{f', mask={mask}' if mask else ''})", looped)

    # -- tiles ---------------------------------------------------------------------------------------------------

    def real(self, x: Value, hint: str = "") -> Tile:
        """Have a value as a tile."""
        if isinstance(x, Memory):
            return self.load(x, hint)
        return self._together(x, hint or "whole") if isinstance(x, Parts) else x

    def aligned(self, x: Tile, space: Sequence[int], r: int, cast: str = "") -> str:
        """Spell a tile as a variable whose axes are those of `space`, axes of a result of r."""
        if not x.rank:
            return f"({x.text})" if x.text.startswith("-") else x.text
        before = r - len(x.shape)
        own = [x.axes[a - before] if a >= before else None for a in space]
        order = [k for k in own if k is not None]
        text = f"{x.text}{cast}"
        text = text if order == sorted(order) else f"tl.permute({text}, {order})"
        return text if None not in own else f"{text}[{', '.join('None' if k is None else ':' for k in own)}]"

    def mask(self, x: Tile, axis: int) -> str:
        """Say which places along a variable's axis the value has."""
        n = x.sizes[axis]
        return f"({self.at(self.place(n), axis, x.rank)} < {n})"

    def cleaned(self, x: Tile, axis: int, neutral: str = "0.0") -> Tile:
        """Put a number into what lies beyond a tile's edge."""
        n, key = x.sizes[axis], (x.text, axis, x.sizes[axis], neutral)
        if n == padded(n) or (axis in x.clean and neutral == "0.0"):
            return x
        if key in self.loaded:
            return replace(self.loaded[key], shape=x.shape, axes=x.axes)
        zero = neutral if neutral == "0.0" else f"tl.full([], {neutral}, {self.T})"
        name = self.named(f"{x.text}_in")
        value = x.text if x.kind != torch.bool else f"{x.text}.to({self.T})"
        self.line(f"{name} = tl.where({self.mask(x, axis)}, {value}, {zero})", x.looped)
        clean = x.clean | {axis} if neutral == "0.0" else x.clean - {axis}
        self.loaded[key] = replace(x, text=name, clean=clean)
        return self.loaded[key]

    def all_clean(self, x: Tile) -> Tile:
        for axis in range(x.rank):
            x = self.cleaned(x, axis)
        return x

    def space_of(self, tiles: Sequence[Tile], shape: Sequence[int]) -> list[int]:
        """Choose the axes of a result, in the order that moves the least: as what is carried lies, else the first that has them all."""
        r = len(shape)

        def own(x: Tile) -> list[int]:
            before = r - len(x.shape)
            pairs = [(k, a + before) for a, k in enumerate(x.axes) if k is not None]
            return [a for _, a in sorted(pairs)]

        needed = sorted({a for x in tiles for a in own(x)})
        full = [x for x in tiles if sorted(own(x)) == needed]
        best = next((x for x in full if x.held), full[0] if full else None)
        return own(best) if best else needed

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
            zero = [x.number == 0 or (k is not None and k in x.clean) for x, k in zip(tiles, own, strict=True)]
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
        moves = [
            x for x in values if isinstance(x, Tile) and (k := at - (r - len(x.shape))) >= 0 and x.axes[k] is not None
        ]
        small = sum(n != 1 for n in shape) <= 2
        if not alike or sum(first.sizes) != shape[at] or (moves and small):
            return self.mapped(
                hint, row, [self.real(x) if isinstance(x, Parts) else x for x in values], params, shape, kind
            )
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
            found.append(self.mapped(hint, row, own, params, (*shape[:at], n, *shape[at + 1 :]), kind))
        return Parts(at, tuple(found))

    def filled(
        self, hint: str, row: str, params: dict[str, Any], x: Value | None, shape: Sequence[int], kind: torch.dtype
    ) -> Tile:
        """Make a value of places: numbers, counts, triangles."""
        if row == "fill":
            return constant(params["value"], shape, kind)
        if row == "arange":
            i = self.place(shape[0]) if shape[0] > 1 else "0"
            text = f"({spelt(params['start'])} + {spelt(params['step'])} * {i})"
            if shape[0] == 1:
                return constant(params["start"], shape, kind)
            return self.made(hint, f"{text}.to({self.typed(kind)})", shape, [0], False, kind)
        r = len(shape)
        if row == "eye":
            if 1 in shape:
                raise Untileable("an identity of one row")
            rows, columns = self.at(self.place(shape[0]), 0, 2), self.at(self.place(shape[1]), 1, 2)
            text = f"({rows} == {columns}).to({self.typed(kind)})"
            return self.made(hint, text, shape, [0, 1], False, kind)
        if x is None or row not in ("tril", "triu"):
            raise Untileable(f"{row!r} is made of places, and has no walker here")
        tile = self.real(x)
        space = self.space_of([tile], shape)
        space += [a for a in (r - 2, r - 1) if a not in space and shape[a] != 1]
        rows, columns = (
            self.at(self.place(shape[a]), space.index(a), len(space)) if a in space else "0" for a in (r - 2, r - 1)
        )  # fmt: skip
        sign, shift = (">=" if row == "tril" else "<="), params["diagonal"]
        value = self.aligned(tile, space, r)
        value = f"tl.full([], {value}, {self.T})" if tile.number is not None else value
        text = f"tl.where({rows} {sign} {columns}{f' - ({shift})' if shift else ''}, {value}, 0)"
        clean = frozenset(p for p, a in enumerate(space) if tile.axes[a] is not None and tile.axes[a] in tile.clean)
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
        for k in own:
            tile = self.cleaned(tile, k, neutral)
        value = tile.text if tile.kind != torch.bool else f"{tile.text}.to({self.T})"
        for k in own:
            value = text.format(value, axis=k)
        factor = scale * times if row == "sum" else 1.0
        if factor != 1:
            value = f"{value} * {spelt(factor)}"
        variable = [k for k in range(tile.rank) if k not in own]
        logical = [self._goal(kept, tile.axes.index(k)) for k in variable]
        kind = tile.kind if tile.kind != torch.bool else self.dtype
        if not own and factor == 1:
            axes: list[int | None] = [None] * len(shape)
            for a, k in zip(logical, variable, strict=True):
                axes[a] = k
            return replace(tile, shape=tuple(shape), axes=tuple(axes))
        clean = frozenset(p for p, k in enumerate(variable) if k in tile.clean) if row == "sum" else frozenset()
        return self.made(hint, value, shape, logical, tile.looped, kind, clean)

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
            variable = [j for j in range(tile.rank) if j != k]
            logical = [self._goal(kept, tile.axes.index(j)) for j in variable]
            clean = frozenset(p for p, j in enumerate(variable) if j in tile.clean)
            text = name if scale == 1 else f"{name} * {spelt(scale)}"
            results.append(self.made(hint, text, shape, logical, looped, tile.kind, clean))
        return results

    @staticmethod
    def _goal(kept: Sequence[int | None], a: int) -> int:
        found = kept[a]
        assert found is not None
        return found

    def _reduced_parts(
        self, hint: str, row: str, x: Parts, kept: Sequence[int | None], scale: float, shape: Sequence[int]
    ) -> Value:
        goal = kept[x.axis]
        if goal is not None:
            shapes = [(*shape[:goal], n, *shape[goal + 1 :]) for n in x.sizes]
            return Parts(
                goal, tuple(self.reduced(hint, row, v, kept, scale, s) for v, s in zip(x.values, shapes, strict=True))
            )
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
        x, y = (self.load(v, factor=True) if isinstance(v, Memory) else self.real(v) for v in (a, b))
        r = len(shape)
        (m, ka), (kb, n) = x.axes[-2:], y.axes[-2:]
        batch = [k for t in (x, y) for k in t.axes[:-2] if k is not None]
        if ka is None or kb is None or m is None or n is None or (batch and len(batch) != 2):
            every = (*shape[:-1], x.shape[-1], shape[-1])
            both = [unsqueezed(x, r), unsqueezed(y, r - 2)]
            terms = self.mapped(f"{hint}_terms", "mul", both, {}, every, self.dtype)
            kept = [*range(r - 1), None, r - 1]
            return self.reduced(hint, "sum", terms, kept, 1.0, shape)
        x, y = self.cleaned(x, ka), self.cleaned(y, kb)
        return self._dot(hint, x, y, shape)

    def _dot(self, hint: str, x: Tile, y: Tile, shape: Sequence[int]) -> Tile:
        """Multiply tiles, or their transposes in reverse: whichever leaves alone what is carried on, and moves less."""
        r = len(shape)
        spaces = [*range(r - 2), r - 2, r - 1]

        def turned(t: Tile) -> bool:
            order = [k for k in t.axes if k is not None]
            return order != sorted(order)

        forth = [t.held and turned(t) for t in (x, y)], sum(map(turned, (x, y)))
        swap = [*range(r - 2), r - 1, r - 2]
        x_, y_ = (permuted(t, swap) for t in (x, y))
        assert isinstance(x_, Tile) and isinstance(y_, Tile)
        back = [t.held and turned(t) for t in (y_, x_)], sum(map(turned, (y_, x_)))
        reverse = (any(back[0]), back[1]) < (any(forth[0]), forth[1])
        if any((back if reverse else forth)[0]):
            raise Untileable("both factors are carried on, one of them transposed")
        left, right = (y_, x_) if reverse else (x, y)
        factors = self.precision.factors or self.dtype
        short = f".to({TYPES[factors]})" if factors != self.dtype else ""  # before it moves: half the bytes
        texts = [self.aligned(t, [a for a in spaces if t.axes[a] is not None], r, short) for t in (left, right)]
        how = f", input_precision='{self.precision.float32}'" if factors == torch.float32 else ""
        out = f", out_dtype={self.T}" if self.dtype != torch.float32 else ""
        space = [a for a in ([*range(r - 2), r - 1, r - 2] if reverse else spaces) if shape[a] != 1]
        clean = set()
        for p, (t, a) in enumerate(((left, -2), (right, -1)), len(space) - 2):
            k = t.axes[a]
            if k is not None and k in t.clean:
                clean.add(p)
        self.flops += 2 * math.prod(shape) * x.shape[-1]
        return self.made(
            hint, f"tl.dot({texts[0]}, {texts[1]}{how}{out})", shape, space, x.looped or y.looped, self.dtype, frozenset(clean)
        )  # fmt: skip

    def _product_of_parts(self, hint: str, a: Value, b: Value, shape: Sequence[int]) -> Value:
        """Multiply what is cut: along its own rows or columns part by part, along what is summed over part with part."""
        r = len(shape)
        for x, own, summed in ((a, r - 2, r - 1), (b, r - 1, r - 2)):
            if isinstance(x, Parts) and x.axis == own:
                shapes = [(*shape[:own], n, *shape[own + 1 :]) for n in x.sizes]
                pairs = [(v, b) if x is a else (a, v) for v in x.values]
                return Parts(own, tuple(self.product(hint, *p, s) for p, s in zip(pairs, shapes, strict=True)))
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

    # -- views that move entries -----------------------------------------------------------------------------------

    def gather(self, hint: str, x: Tile, axis: int, index: str, n: int) -> Tile:
        """Take, along a value's axis, the entries at n places: `index` in terms of the new places."""
        k = x.axes[axis]
        assert k is not None
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        if n == 1:
            raise Untileable("one entry along an axis")
        order = sorted((k, a) for a, k in enumerate(x.axes) if k is not None)
        space = [a for _, a in order]
        sizes = [padded(shape[a]) for a in space]
        at = self.at(f"({index})", k, len(space))
        text = f"tl.gather({x.text}, tl.broadcast_to({at}, {sizes}), {k})"
        return self.made(hint, text, shape, space, x.looped, x.kind, x.clean - {k})

    def select(self, hint: str, x: Value, dim: int, index: int) -> Value:
        """Take one entry along an axis."""
        found = selected(x, dim, index)
        if found is not None:
            return found
        tile = self.real(x)
        dim = dim % len(tile.shape)
        k = tile.axes[dim]
        assert k is not None
        n = tile.shape[dim]
        at = self.at(self.place(n), k, tile.rank)
        value = tile.text if tile.kind != torch.bool else f"{tile.text}.to({self.T})"
        text = f"tl.sum(tl.where({at} == {index % n}, {value}, 0), {k})"
        shape = (*tile.shape[:dim], *tile.shape[dim + 1 :])
        order = [a for _, a in sorted((k_, a) for a, k_ in enumerate(tile.axes) if k_ is not None and a != dim)]
        space = [a - (a > dim) for a in order]
        clean = frozenset(c - (c > k) for c in tile.clean if c != k)
        kind = tile.kind if tile.kind != torch.bool else self.dtype
        return self.made(hint, text, shape, space, tile.looped, kind, clean)

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
        shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
        if len(places) == n:
            return x
        if places.step == 1 and (n <= 4 or isinstance(x, Parts)):
            ends = [
                constant(0.0, (*shape[:dim], k, *shape[dim + 1 :]), x.kind)
                for k in (places.start, n - places.start - len(places))
            ]
            return behind(dim, [v for v in (ends[0], x, ends[1]) if v.shape[dim]])
        tile = self.real(x)
        if tile.axes[dim] is not None:
            index = f"tl.minimum(tl.maximum(({self.place(n)} - {places.start}) // {places.step}, 0), {len(places) - 1})"
            tile = self.gather(hint, tile, dim, index, n)
        tile = replace(tile, shape=shape)
        space = self.space_of([tile], shape)
        space += [] if dim in space else [dim]
        i = self.at(self.place(n), space.index(dim), len(space))
        there = [f"({i} >= {places.start}) & ({i} < {places.stop})" if len(places) > 1 else f"{i} == {places.start}"]
        there += [f"(({i} - {places.start}) % {places.step} == 0)"] if len(places) > 1 and places.step > 1 else []
        value = self.aligned(tile, space, len(shape))
        value = f"tl.full([], {value}, {self.T})" if tile.number is not None else value
        text = f"tl.where({' & '.join(there)}, {value}, 0)"
        clean = frozenset(
            p for p, a in enumerate(space) if a == dim or (tile.axes[a] is not None and tile.axes[a] in tile.clean)
        )
        return self.made(hint, text, shape, space, tile.looped, tile.kind, clean)

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
            tile = replace(tile, shape=shape)
            if tile.axes[dim] is not None:
                tile = replace(tile, clean=tile.clean - {tile.axes[dim]})
            found = tile if found is None else self._behind(hint, found, tile, dim, at)
            at += size
        return found

    def _behind(self, hint: str, first: Tile, second: Tile, dim: int, at: int) -> Tile:
        """Take the first's entries before a place along an axis, the second's from there on."""
        shape = first.shape
        space = self.space_of([first, second], shape)
        space += [] if dim in space else [dim]
        i = self.at(self.place(shape[dim]), space.index(dim), len(space))
        texts = [self.aligned(t, space, len(shape)) for t in (first, second)]
        if first.number is not None and second.number is not None:
            texts[0] = f"tl.full([], {texts[0]}, {self.T})"
        text = f"tl.where({i} < {at}, {texts[0]}, {texts[1]})"
        clean = [
            {p for p, a in enumerate(space) if t.number == 0 or (t.axes[a] is not None and t.axes[a] in t.clean)}
            for t in (first, second)
        ]
        return self.made(
            hint,
            text,
            shape,
            space,
            first.looped or second.looped,
            first.kind,
            frozenset(clean[0] & clean[1] - {space.index(dim)}),
        )

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
        space = [a for left, _ in groups for a in left]
        text = self.aligned(x, space, len(x.shape))
        if any(x.axes[a] is None for a in space):
            text = f"tl.broadcast_to({text}, {[padded(x.shape[a]) for a in space]})"
        olds = [[x.shape[a] for a in left] for left, _ in groups]
        news = [[shape[a] for a in right] for _, right in groups]
        moved = [len(left) > 1 or len(right) > 1 for left, right in groups]
        lengths = [math.prod(map(padded, sizes)) for sizes in olds]
        if math.prod(lengths) > LIMIT or math.prod(math.prod(map(padded, sizes)) for sizes in news) > LIMIT:
            raise Untileable("its entries are no tile of a shape that can be read otherwise")
        text = f"tl.reshape({text}, {lengths})"
        for g, (old, new) in enumerate(zip(olds, news, strict=True)):
            if moved[g] and (index := self._moves(old, new)):
                lengths[g] = math.prod(map(padded, new))
                at = self.at(f"({index})", g, len(groups))
                text = f"tl.gather({text}, tl.broadcast_to({at}, {lengths}), {g})"
        goal = [a for _, right in groups for a in right]
        text = f"tl.reshape({text}, {[padded(shape[a]) for a in goal]})"
        return self.made(hint, text, shape, goal, x.looped, x.kind)

    def _moves(self, old: Sequence[int], new: Sequence[int]) -> str:
        """Say, for each place of axes of the new sizes, at which place of axes of the old sizes its entry is; "" if at the same."""
        length, number = math.prod(map(padded, new)), math.prod(new)

        def parts(sizes: Sequence[int]) -> list[int]:
            return [math.prod(map(padded, sizes[k + 1 :])) for k in range(len(sizes))]

        def plain(sizes: Sequence[int]) -> list[int]:
            return [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]

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

    def diagonal(self, hint: str, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
        """Take the entries whose places along two axes differ by a number; they come last."""
        r = len(x.shape)
        order = [a for a in range(r) if a not in (dim1 % r, dim2 % r)]
        tile = self.real(permuted(x, [*order, dim1, dim2]))
        rows, columns = tile.shape[-2:]
        length = min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns)
        if rows == 1 or columns == 1:
            raise Untileable("a diagonal of one row")
        space = [*range(r)]
        i, j = (self.at(self.place(tile.shape[a]), a, r) for a in (r - 2, r - 1))
        if 1 in tile.shape:
            raise Untileable("a diagonal beside axes of one entry")
        picked = self.made(
            f"{hint}_on", f"tl.where({j} - {i} == {offset}, {self.aligned(tile, space, r)}, 0)", tile.shape, space, tile.looped, tile.kind
        )  # fmt: skip
        over = r - 1 if offset >= 0 else r - 2
        kept = [a if a < r - 2 else None if a == over else r - 2 for a in range(r)]
        rest = (*tile.shape[: r - 2], rows if offset >= 0 else columns)
        return self.slice(self.reduced(hint, "sum", picked, kept, 1.0, rest), r - 2, 0, length)


__all__ = ["TYPES", "Precision", "Writer"]

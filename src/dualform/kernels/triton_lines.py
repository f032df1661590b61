"""Lines of Triton for values of a kernel: names, loads of what is in memory, tiles spelt along the axes of a result.

A value is a tile in registers (`tiles`); views are bookkeeping. `triton_moves` adds what moves entries, `triton_text`
maps, reductions and products, a line each. What cannot be a tile is `Untileable`, and the caller decides where else it
is computed.

Legend: i16 places along an axis of 16 entries; T the type that is computed in; r axes of a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dualform.kernels.tiles import LIMIT, Memory, Tile, Untileable, axes_in, padded

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
ITS_OWN = (
    "cache_modifier='.ca'"  # a load's default; as it is said, the load is not merged with another of the same place
)


@dataclass(frozen=True)
class Precision:
    """What products of matrices take: the type of factors (None: that which is computed in), how float32 is multiplied.

    at_once: are sums that do not wait for each other one reduction? ahead: is what a mini-batch reads loaded during the
    one before? narrow: is what is read as a factor of fewer bits before it passes through shared memory? turns: may
    what is carried on be transposed in a product?
    """

    factors: torch.dtype | None = None
    float32: str = "ieee"  # | "tf32" | "tf32x3"
    at_once: bool = False
    ahead: bool = False
    narrow: bool = False
    turns: bool = False


@dataclass
class Lines:
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
    entries: dict[str, int] = field(default_factory=dict)  # of each tile made
    ahead: bool = False  # is what the next mini-batch reads loaded while this one is computed?
    first: list[str] = field(default_factory=list)  # such loads, for the first mini-batch
    next: list[str] = field(default_factory=list)
    most: int = LIMIT  # entries of a tile of three axes and more

    @property
    def T(self) -> str:
        return TYPES[self.dtype]

    def named(self, hint: str) -> str:
        name, k = hint, 1
        while name in self.taken:
            name, k = f"{hint}_{k}", k + 1
        self.taken.add(name)
        self.entries[name] = 16
        return name

    def line(self, text: str, looped: bool) -> None:
        (self.loop if looped else self.once).append(text)

    def made(
        self, hint: str, text: str, shape: Sequence[int], space: Sequence[int], looped: bool, kind: torch.dtype,
        clean: frozenset[int] = frozenset(), held: bool = False,
    ) -> Tile:  # fmt: skip
        """Write a line; space: the value's axes that the variable has, in its order."""
        entries = math.prod(padded(shape[a]) for a in space)
        most = self.most if len(space) > 2 else LIMIT
        if entries > most:
            sizes = " x ".join(map(str, shape))
            raise Untileable(f"its {sizes} entries are a tile of {entries:,}; expected at most {most:,}")
        self.sizes.append(entries)
        name = self.named(hint)
        self.entries[name] = entries
        self.line(f"{name} = {text}  # {' x '.join(map(str, shape)) or 'a number'}", looped)
        return Tile(name, tuple(shape), axes_in(space, len(shape)), clean, kind, looped, held)

    def place(self, n: int) -> str:
        """Name the places along an axis of n entries."""
        self.places.add(padded(n))
        return f"i{padded(n)}"

    @staticmethod
    def at(text: str, axis: int, rank: int) -> str:
        """Turn a variable with one axis into one with `rank`, of which it is number `axis`."""
        return text if rank == 1 else f"{text}[{', '.join(':' if a == axis else 'None' for a in range(rank))}]"

    def typed(self, kind: torch.dtype) -> str:
        return "tl.int1" if kind == torch.bool else self.T if kind.is_floating_point else "tl.int64"

    # -- memory --------------------------------------------------------------------------------------------------

    def address(self, x: Memory, space: Sequence[int], base: str) -> tuple[str, str]:
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

    def read(self, x: Memory, space: Sequence[int], base: str, how: str = "") -> str:
        """Spell a load, zero beyond the value's edge."""
        where, mask = self.address(x, space, base)
        return f"tl.load({where}{f', mask={mask}, other=0' if mask else ''}{how})"

    def load(self, x: Memory, hint: str = "", factor: bool = False) -> Tile:
        """Read a value, once: as its tensor's axes lie. factor: of a product, which reads it laid out for that."""
        space = sorted(
            (a for a, k in enumerate(x.axes) if k is not None and x.shape[a] != 1), key=lambda a: x.axes[a] or 0
        )
        early = self.ahead and x.looped and not factor
        key = (x.name, x.start, factor and self.ahead, *((x.axes[a], x.steps[a], x.shape[a]) for a in space))
        if key in self.loaded:
            return replace(self.loaded[key], shape=x.shape, axes=axes_in(space, len(x.shape)))
        text = self.read(x, space, f"{x.name}_{'ahead' if early else 'at'}", f", {ITS_OWN}" if early else "")
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

    # -- tiles ---------------------------------------------------------------------------------------------------

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

    def operand(self, x: Tile, space: Sequence[int], r: int) -> str:
        """Spell a tile as `aligned` does, a number in the type that is computed in."""
        text = self.aligned(x, space, r)
        return text if x.number is None else f"tl.full([], {text}, {self.T})"

    def whole(self, x: Tile, space: Sequence[int], cast: str = "") -> str:
        """Spell a tile as a variable that has every entry along the axes of `space`."""
        text, sizes = self.aligned(x, space, len(x.shape)), [padded(x.shape[a]) for a in space]
        if x.number is not None:
            return f"tl.full({sizes}, {text}, {self.T})"
        text = f"({text}){cast}" if cast else text
        return text if x.rank == len(space) else f"tl.broadcast_to({text}, {sizes})"

    def counted(self, x: Tile) -> Tile:
        """Have truths as numbers."""
        return replace(x, text=f"{x.text}.to({self.T})", kind=self.dtype) if x.kind == torch.bool else x

    def cleaned(self, x: Tile, axis: int, neutral: str = "0.0") -> Tile:
        """Put a number into what lies beyond a tile's edge."""
        n, key = x.sizes[axis], (x.text, axis, x.sizes[axis], neutral)
        if n == padded(n) or (axis in x.clean and neutral == "0.0"):
            return x
        if key in self.loaded:
            return replace(self.loaded[key], shape=x.shape, axes=x.axes)
        zero = neutral if neutral == "0.0" else f"tl.full([], {neutral}, {self.T})"
        name, inside = self.named(f"{x.text}_in"), f"({self.at(self.place(n), axis, x.rank)} < {n})"
        self.line(f"{name} = tl.where({inside}, {self.counted(x).text}, {zero})", x.looped)
        clean = x.clean | {axis} if neutral == "0.0" else x.clean - {axis}
        self.loaded[key] = replace(x, text=name, clean=clean)
        return self.loaded[key]

    def all_clean(self, x: Tile) -> Tile:
        for axis in range(x.rank):
            x = self.cleaned(x, axis)
        return x

    def space_of(self, tiles: Sequence[Tile], shape: Sequence[int]) -> list[int]:
        """Choose a result's axes, ordered to move the least: as what is carried lies, else the first that has all."""

        def own(x: Tile) -> list[int]:
            return [a + len(shape) - len(x.shape) for a in x.order]

        needed = sorted({a for x in tiles for a in own(x)})
        full = [x for x in tiles if sorted(own(x)) == needed]
        best = next((x for x in full if x.held), full[0] if full else None)
        return own(best) if best else needed


__all__ = ["TYPES", "Lines", "Precision"]

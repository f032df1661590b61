"""Pieces of matrix notation with their numbers: names, entrywise products and powers, and chains of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

# Ones, of a vector and of a matrix.
ONES = ("𝟏", "𝟏 𝟏ᵀ")


# Superscripts: of a transpose, an inverse, and an inverse transposed.
MARKS = {(False, False): "", (True, False): "ᵀ", (False, True): "⁻¹", (True, True): "⁻ᵀ"}


_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Atom:
    """A text with its numbers, two axes of them: (n, m) a matrix, (n, 1) a vector, (1, 1) a number.

    powers: of an entrywise product, its parts and their exponents; inverse: is it that of what `text` is? inner: of a
    diagonal matrix, the vector; made: the product that it is
    """

    text: str
    value: Tensor
    tight: bool = True
    symmetric: bool = False
    inverse: bool = False
    powers: tuple[tuple[Atom, int], ...] = ()
    inner: Atom | None = None
    made: MatrixChain | None = None

    @property
    def bracketed(self) -> str:
        """The text as a part of a product."""
        return self.text if self.tight else f"({self.text})"

    @property
    def parts(self) -> tuple[tuple[Atom, int], ...]:
        return self.powers or ((self, 1),)

    @property
    def is_vector(self) -> bool:
        return self.value.shape[1] == 1

    @property
    def T(self) -> Atom | None:
        """The transpose, where it is more than a mark."""
        if self.symmetric or self.is_vector:
            return self if self.symmetric else None
        if self.made is not None:
            return self.made.T.atom
        if self.powers:
            return entrywise([(MatrixChain(((part, False),), 0).T.atom, power) for part, power in self.powers])
        return None


def leaf(text: str, t: Tensor, tight: bool = True, symmetric: bool = False, inverse: bool = False) -> Atom:
    """A text for a tensor of at most two axes."""
    shape = (*t.shape, *[1] * (2 - t.ndim))
    return Atom(text, t.reshape(shape).to(torch.float64), tight, symmetric, inverse)


def powered(base: Atom, exponent: int) -> Atom:
    """Entry by entry, to a power."""
    return entrywise([(base, exponent)])


def entrywise(parts: Sequence[tuple[Atom, int]]) -> Atom:
    """Multiply entry by entry; equal parts become powers."""
    found: dict[str, tuple[Atom, int]] = {}
    for outer, times in parts:
        for part, power in outer.parts:
            key = part.text + MARKS[False, part.inverse]
            found[key] = (part, found.get(key, (part, 0))[1] + power * times)
    kept = tuple((part, power) for part, power in found.values() if power and part.text not in ONES)
    shape = torch.broadcast_shapes(*(part.value.shape for part, _ in parts))
    one = torch.ones(shape, dtype=parts[0][0].value.dtype)
    value = reduce(torch.mul, (part.value**power for part, power in kept), one)
    if not kept:
        return Atom("𝟏", value) if shape[1] == 1 else Atom("𝟏 𝟏ᵀ", value, False, True)
    if len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    above = [power_text(part, power) for part, power in kept if power > 0]
    below = [power_text(part, -power) for part, power in kept if power < 0]
    below = [f"({x})" if " ∘ " in x and shape != (1, 1) else x for x in below]
    if shape == (1, 1):
        text = " ".join(above) or "1"
        text += divided_by(below)
    else:
        text = " ∘ ".join(above) or ("𝟏" if shape[1] == 1 else "(𝟏 𝟏ᵀ)")
        text += "".join(f" ⊘ {x}" for x in below)
    tight = len(kept) == 1 and kept[0][1] > 0 and shape == (1, 1)
    return Atom(text, value, tight, powers=kept)


def power_text(part: Atom, power: int) -> str:
    shown = part.bracketed + MARKS[False, part.inverse]
    if power == 1:
        return shown
    if part.is_vector and part.value.shape[0] == 1:
        return f"{shown}{str(power).translate(_DIGITS)}"
    return " ∘ ".join([shown] * power)


Piece = tuple[Atom, bool]


@dataclass(frozen=True)
class MatrixChain:
    """A product of matrices, each as it is or transposed; without any the identity of a size."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def T(self) -> MatrixChain:
        turned = ((a, t, None if t else a.T) for a, t in reversed(self.pieces))
        return MatrixChain(tuple((other, False) if other else (a, not t) for a, t, other in turned), self.cols)

    @property
    def rows(self) -> int:
        return _shape(self.pieces[0])[0] if self.pieces else self.size

    @property
    def cols(self) -> int:
        return _shape(self.pieces[-1])[1] if self.pieces else self.size

    def after(self, other: MatrixChain) -> MatrixChain:
        """The product, itself on the left."""
        pieces = list(self.pieces)
        for piece in other.pieces:
            if pieces and _cancel(pieces[-1], piece):
                pieces.pop()
            else:
                pieces.append(piece)
        return MatrixChain(tuple(pieces), other.cols if pieces else self.rows)

    @property
    def value(self) -> Tensor:
        like = self.pieces[0][0].value if self.pieces else torch.ones((), dtype=torch.float64)
        eye = torch.eye(self.rows, dtype=like.dtype)
        return reduce(torch.matmul, (a.value.mT if t else a.value for a, t in self.pieces), eye)

    @property
    def text(self) -> str:
        """A X^T b, powers for repeats."""
        shown: list[str] = []
        runs: list[tuple[Piece, int]] = []
        for piece in self.pieces:
            same = runs and (runs[-1][0][0].text, runs[-1][0][0].inverse, runs[-1][0][1]) == (
                piece[0].text, piece[0].inverse, piece[1],
            ) and not piece[0].is_vector  # fmt: skip
            runs[-1:] = [(piece, runs[-1][1] + 1)] if same else [*runs[-1:], (piece, 1)]
        alone = len(runs) == 1
        for (a, t), times in runs:
            mark = MARKS[t, a.inverse]
            text = a.text if a.tight or (alone and not mark and times == 1) else f"({a.text})"
            shown.append(
                text + mark
                if times == 1
                else f"({text}{mark}){str(times).translate(_DIGITS)}"
                if mark
                else f"{text}{str(times).translate(_DIGITS)}"
            )
        return " ".join(shown) or "I"

    @property
    def atom(self) -> Atom:
        """As one piece of a larger product."""
        if len(self.pieces) == 1 and not self.pieces[0][1]:
            return self.pieces[0][0]
        same = self.text == self.T.text and not self.pieces[0][0].is_vector if self.pieces else True
        tight = len(self.pieces) < 2 and not (self.pieces and not self.pieces[0][0].tight)
        return Atom(self.text, self.value, tight, same, made=self)


def _shape(piece: Piece) -> tuple[int, int]:
    n, m = piece[0].value.shape
    return (m, n) if piece[1] else (n, m)


def _cancel(a: Piece, b: Piece) -> bool:
    """Is one the inverse of the other?"""
    turned = a[1] == b[1] or a[0].symmetric
    return a[0].text == b[0].text and a[0].inverse != b[0].inverse and turned


ONE = Atom("𝟏", torch.ones(1, 1, dtype=torch.float64))


def diagonal(v: MatrixChain) -> Atom:
    return diagonal_of(v.atom)


def diagonal_of(v: Atom) -> Atom:
    """diag(v)."""
    inside = v.text[1:-1] if v.tight and v.text.startswith("(") else v.text + MARKS[False, v.inverse]
    return Atom(f"diag({inside})", v.value[:, 0].diag(), True, True, inner=v)


def divided_by(parts: Sequence[str]) -> str:
    """What a product is divided by."""
    return f"/({' '.join(parts)})" if len(parts) > 1 else f"/{parts[0]}" if parts else ""

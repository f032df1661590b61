"""What can be asked of a derivative without materialising it: slices, diagonals, traces by axis names, and proofs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch

from dualform.algebra import queries
from dualform.algebra.axis_names import made
from dualform.algebra.normal_form import same_terms
from dualform.algebra.terms import Term
from dualform.shapes import fail


class Questions(ABC):
    """An array with named axes on two sides, a sum of terms. Answers come from labels, so they are proofs."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    _axes: tuple[Sequence[str], Sequence[str]] | None
    _symmetric: bool

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The products whose sum is the array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """out_shape + in_shape."""
        return self.out_shape + self.in_shape

    @abstractmethod
    def _like(self, terms: Sequence[Term], out: Sequence[int], inn: Sequence[int], axes: Any) -> Self:
        """An array of the same kind with other terms."""

    @property
    def out_axes(self) -> tuple[str, ...]:
        """The names of the output's axes."""
        return tuple(self._named[0])

    @property
    def in_axes(self) -> tuple[str, ...]:
        """The names of the input's axes."""
        return tuple(self._named[1])

    @property
    def _named(self) -> tuple[Sequence[str], Sequence[str]]:
        return self._axes or made(len(self.out_shape), len(self.in_shape))

    @property
    def is_zero(self) -> bool:
        """True proves that every entry is zero, whatever the values."""
        return not math.prod(self.shape) or not self.terms

    @property
    def is_identity(self) -> bool:
        """True proves that the derivative is the identity map."""
        return self.out_shape == self.in_shape and (not math.prod(self.shape) or queries.is_identity(self.terms))

    @property
    def is_symmetric(self) -> bool:
        """True proves that the derivative equals its transpose."""
        square = self.out_shape == self.in_shape
        return square and (self._symmetric or same_terms(self.terms, queries.flipped(self.terms)))

    def is_diagonal(self, axis: int | str, in_axis: int | str | None = None) -> bool:
        """True proves that entries vanish unless the index on an output axis equals the one on an input axis.

        J[..., a, ...; ..., b, ...] = 0 for a != b
        Shape:  `axis`: position or name on the output; `in_axis` on the input, by default the same position.
        Dtype:  none; no value is read.
        Raises: ValueError for an axis that is not there.
        """
        out = self._axis("out", axis)
        inn = self._axis("in", out if in_axis is None else in_axis)
        if not math.prod(self.shape):
            return True
        return self.out_shape[out] == self.in_shape[inn] and queries.is_diagonal(self.terms, out, inn)

    def depends(self, out_axis: int | str, in_axis: int | str) -> bool:
        """Tell whether some term ties an output axis to an input axis; False proves that none does.

        False: every term is a product of something that has the one index and something that has the other
        Shape:  axes by position or name.
        Dtype:  none; no value is read.
        Raises: ValueError for an axis that is not there.
        """
        out, inn = self._axis("out", out_axis), self._axis("in", in_axis)
        return math.prod(self.shape) > 0 and queries.depends(self.terms, out, inn)

    def _axis(self, side: str, axis: int | str) -> int:
        names = self.out_axes if side == "out" else self.in_axes
        if isinstance(axis, str):
            bare = axis if axis in names else f"{axis}'"
            if bare in names:
                return names.index(bare)
        elif -len(names) <= axis < len(names):
            return axis % len(names)
        fail("Derivative", f"the {side}put axis", f"is {axis!r}", f"one of {list(names)}", "Count from 0.", ValueError)

    def __getitem__(self, index: Any) -> Self:
        """Take entries: ints and slices over out and in axes, as of a tensor, or a dict of them by axis name."""
        found: Any = self
        for place, chosen, drop in self._choices(index):
            outer = queries.range_of(found.shape, place, chosen, drop)
            sizes = [len(chosen) if k == place else n for k, n in enumerate(found.shape)]
            found = found._through(outer, place if drop else None, sizes)
        return found

    def _choices(self, index: Any) -> list[tuple[int, range, bool]]:
        """For each axis that is cut, from the last: its place, the indices that stay, whether the axis goes away."""
        names = [*self.out_axes, *self.in_axes]
        if isinstance(index, dict):
            picked = [(self._place(name), item) for name, item in index.items()]
        else:
            items = list(index) if isinstance(index, tuple) else [index]
            if Ellipsis in items:
                at = items.index(Ellipsis)
                items[at : at + 1] = [slice(None)] * (len(names) - len(items) + 1)
            if len(items) > len(names):
                most = f"at most one for each axis = {len(names)}"
                fail("J[...]", "the index", f"has {len(items)} places", most, "Use ints, slices and one ellipsis.")
            picked = list(enumerate(items))
        found = []
        for place, item in sorted(picked, key=lambda p: -p[0]):
            n = self.shape[place]
            if isinstance(item, slice) and (item.step is None or item.step > 0):
                if item != slice(None):
                    found.append((place, range(n)[item], False))
            elif isinstance(item, int) and not isinstance(item, bool):
                if not -n <= item < n:
                    raise IndexError(f"J[...]: index {item} is out of the axis {names[place]} of {n} entries.")
                found.append((place, range(item % n, item % n + 1), True))
            else:
                where = f"the index of axis {names[place]}"
                fail("J[...]", where, f"is {item!r}", "an int or a slice forward", "Slice.")
        return found

    def _place(self, axis: int | str) -> int:
        names = [*self.out_axes, *self.in_axes]
        if isinstance(axis, str) and axis in names:
            return names.index(axis)
        if isinstance(axis, int) and -len(names) <= axis < len(names):
            return axis % len(names)
        fail("J[...]", "the axis", f"is {axis!r}", f"one of {names}", "Count from 0, the output first.", ValueError)

    def diagonal(self, out_axis: int | str = 0, in_axis: int | str | None = None) -> Self:
        """Take the entries with equal indices on an output and an input axis; the input's axis goes away.

        D[..., a, ...; ...] = J[..., a, ...; ..., a, ...]
        Shape:  in_shape loses `in_axis` (by default the output's position).
        Dtype:  the derivative's.
        Raises: ShapeError if the axes differ in size.
        """
        out = self._axis("out", out_axis)
        inn = self._axis("in", out if in_axis is None else in_axis)
        if self.out_shape[out] != self.in_shape[inn]:
            found = f"has {self.out_shape[out]} entries and the input's axis {inn} {self.in_shape[inn]}"
            fail("diagonal", f"the output's axis {out}", found, "equal sizes", "Slice one of them.")
        return self._through(queries.diagonal(self.shape, out, len(self.out_shape) + inn), len(self.out_shape) + inn)

    def trace(self, out_axis: int | str = 0, in_axis: int | str | None = None) -> Self:
        """Sum the entries with equal indices on an output and an input axis; both axes go away.

        S[...; ...] = sum over a of J[..., a, ...; ..., a, ...]
        Shape:  out_shape loses `out_axis`, in_shape `in_axis`.
        Dtype:  the derivative's.
        Raises: ShapeError if the axes differ in size.
        """
        found = self.diagonal(out_axis, in_axis)
        out = self._axis("out", out_axis)
        return found._through(queries.total(found.shape, out), out)

    def _through(self, outer: Term, gone: int | None = None, shape: Sequence[int] | None = None) -> Self:
        """Apply a map to all axes; `gone`: the axis that it takes away, or the new shape of as many axes."""
        split = len(self.out_shape)
        names = [*self.out_axes, *self.in_axes]
        sizes = list(self.shape if shape is None else shape)
        if gone is not None:
            split -= gone < split
            del names[gone], sizes[gone]
        live = math.prod(self.shape) and math.prod(sizes)
        terms = queries.parted(queries.after(outer, queries.joined(self.terms)), split) if live else ()
        return self._like(terms, sizes[:split], sizes[split:], (names[:split], names[split:]))

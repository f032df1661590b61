"""Subsets and monomials: which d of m things, in lexicographic order.

The tuples of size d that begin with i are i followed by each tuple of size d - 1 that may follow it; and these stand
together, at the end of the shorter ones. So a product or a sum over all tuples is one over their first elements and a
slice of what came before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def num_subsets(m: int, d: int, *, repeat: bool) -> int:
    """Count the d-tuples of m things in ascending order, with or without repetition."""
    return math.comb(m + d - 1 if repeat else m, d)


def monomials(m: int, d: int, *, unique: bool) -> Iterator[tuple[int, ...]]:
    """List the factors of each monomial of degree d: all m^d, or each once, in lexicographic order."""
    return itertools.combinations_with_replacement(range(m), d) if unique else itertools.product(range(m), repeat=d)


def subsets(names: Sequence[str], d: int, *, repeat: bool) -> list[tuple[str, ...]]:
    """List the tuples of 1 .. d names, in lexicographic order of their places."""
    choose = itertools.combinations_with_replacement if repeat else itertools.combinations
    return [chosen for r in range(1, d + 1) for chosen in choose(names, r)]


def tails(m: int, d: int, *, repeat: bool) -> Iterator[list[int]]:
    """Yield for sizes 2 .. d where, among the tuples one shorter, those that may follow each first element begin."""
    for size in range(2, d + 1):
        total = num_subsets(m, size - 1, repeat=repeat)
        follow = [num_subsets(m - i - (0 if repeat else 1), size - 1, repeat=repeat) for i in range(m)]
        starts = [total - count for count in follow if count]
        if not starts:
            return
        yield starts


def symmetric_powers(u: Tensor, d: int) -> Iterator[Tensor]:
    """Yield the monomials of degrees 1 .. d of u (..., M), each once, in lexicographic order."""
    power = u
    yield power
    factors = u.split(1, -1)
    for starts in tails(u.shape[-1], d, repeat=True):
        power = torch.cat([factor * power[..., start:] for factor, start in zip(factors, starts, strict=True)], -1)
        yield power

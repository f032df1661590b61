"""Index arithmetic of subsets and monomials: which d of m things, in lexicographic order, without Python loops over them.

The tuples (i_1, .., i_d) that begin with i are i followed by a *tail* of the tuples of size d - 1. So everything that a product or
a sum over tuples needs is, per tuple, its first element and where its rest stands among the shorter tuples.
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


def steps(m: int, d: int, *, repeat: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for sizes 2 .. d, per tuple, its first element and the place of its rest among the tuples one shorter."""
    here = torch.arange(m, device=device)
    starting = torch.ones(m, dtype=torch.int64, device=device)  # tuples of the size before that begin with i
    for size in range(2, d + 1):
        before = starting.cumsum(0) - starting  # where those that begin with i stand
        longer = starting.flip(0).cumsum(0).flip(0) - (0 if repeat else starting)
        total = num_subsets(m, size, repeat=repeat)
        first = here.repeat_interleave(longer, output_size=total)
        tail = before if repeat else before + starting
        shift = tail - (longer.cumsum(0) - longer)
        yield first, torch.arange(total, device=device) + shift[first]
        starting = longer


def symmetric_powers(u: Tensor, d: int) -> Iterator[Tensor]:
    """Yield the monomials of degrees 1 .. d of u (..., M), each once, in lexicographic order."""
    power = u
    yield power
    for first, rest in steps(u.shape[-1], d, repeat=True, device=u.device):
        power = u.index_select(-1, first) * power.index_select(-1, rest)
        yield power

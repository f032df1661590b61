"""The order of a contraction: one price for every order, and two searches for the cheapest.

    total = flops + FLOPS_PER_BYTE bytes        flops of a pairwise step = prod(sizes), twice that if it sums an index

In `free_order` any two operands may meet; in `token_order` each step has a token operand, so that no product of weights is
ever formed. Both count numbers as float32's, whatever they are: a dtype changes no order, and so no rounding.

Legend: an operand is a string of letters, one per axis; `sizes` pairs each letter with its extent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from functools import cache, lru_cache
from itertools import combinations, permutations, product
from typing import Any, NamedTuple

from opt_einsum import get_symbol
from opt_einsum.helpers import flop_count
from opt_einsum.paths import DynamicProgramming
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

# Elementwise traffic costs about this many matmul flops per byte on the machines measured (LAB.md, cost model).
FLOPS_PER_BYTE = 16.0
NUMBER = 4  # bytes, where an order is chosen
CACHE = 1 << 18  # numbers: where no operand has more, what a step writes is still near when the next reads it

Sizes = tuple[tuple[str, int], ...]


class Price(NamedTuple):
    """What a computation costs: flops, bytes moved, and the numbers of its largest intermediate; `total` is in flops."""

    flops: float = 0
    bytes: float = 0
    largest: float = 0

    @property
    def total(self) -> float:
        return self.flops + FLOPS_PER_BYTE * self.bytes

    def __add__(self, other: object) -> Price:
        assert isinstance(other, Price)
        return Price(self.flops + other.flops, self.bytes + other.bytes, max(self.largest, other.largest))


def counted(nodes: Iterable[fx.Node]) -> Price:
    """Price what is traced: flops of matrix products as torch counts them, bytes that ops write, the largest of their values."""
    total = Price()
    for node in (n for n in nodes if n.op == "call_function"):
        args, kwargs, made = fx.node.map_arg((node.args, node.kwargs, node), lambda n: n.meta.get("val"))
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        flops = int(formula(*args, **kwargs, out_val=made)) if formula else 0
        total += Price(flops, made.nbytes, made.numel()) if isinstance(made, Tensor) else Price(flops)
    return total


def letters(*operands: Iterable[Hashable]) -> dict[Any, str]:
    """Give labels letters, in the order in which they come."""
    return {label: get_symbol(k) for k, label in enumerate(dict.fromkeys(x for labels in operands for x in labels))}


@lru_cache(maxsize=4096)
def free_order(inputs: tuple[frozenset[str], ...], output: frozenset[str], sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    """Find the cheapest order: pairs of positions in a list that loses both operands and gains their product at its end."""
    if len(inputs) <= 2:
        return (tuple(range(len(inputs))),)
    extents = dict(sizes)
    is_near = all(math.prod(extents[x] for x in labels) <= CACHE for labels in inputs)
    written = FLOPS_PER_BYTE * NUMBER / 2  # the search counts a multiply-add as one
    minimize = "flops" if is_near else f"combo-{round(written)}"
    search = DynamicProgramming(minimize, cost_cap=False, search_outer=True)
    return tuple(tuple(sorted(pair)) for pair in search(list(inputs), output, extents))


class Meeting(NamedTuple):
    """Meet one more operand: a factor, or the other token (which = None); its labels, and the labels left afterwards."""

    which: int | None
    right: str
    out: str


class TokenOrder(NamedTuple):
    """The token to start at, the labels left, what is met in turn, what the other token meets before the two meet, the price."""

    start: int
    labels: str
    steps: tuple[Meeting, ...] = ()
    other: tuple[Meeting, ...] = ()
    price: Price = Price()


@lru_cache(maxsize=1024)
def token_order(
    tokens: tuple[str, ...],
    factors: tuple[str, ...],
    fixed: tuple[bool, ...],
    rows: str,
    sizes: Sizes,
    limit: float = math.inf,
) -> TokenOrder | None:
    """Find the cheapest order in which one token, or two that meet on the way, meet the factors one by one.

    fixed: which factors are identities, whose products rename. limit: what no intermediate may reach; None: each order has one.
    """
    operands, extents = (*tokens, *factors), dict(sizes)

    def meet(way: TokenOrder, which: int | None, right: str, later: str, other: TokenOrder | None = None) -> TokenOrder:
        out = _only(way.labels + right, later)
        price = way.price + _met(way.labels, right, out, extents, which is not None and fixed[which])
        if later == rows and out != _only(rows, out):
            price += Price(0, NUMBER * math.prod(extents[x] for x in out))
        found = way._replace(labels=out, steps=(*way.steps, Meeting(which, right, out)), price=price)
        return found._replace(other=other.steps, price=price + other.price) if other else found

    @cache
    def best(those: frozenset[int]) -> TokenOrder | None:
        """Contract these operands, a token or both among them."""
        own = sorted(k for k in those if k < len(tokens))
        if len(those) == 1:
            return TokenOrder(own[0], operands[own[0]])
        later = rows + "".join(labels for k, labels in enumerate(operands) if k not in those)
        rest = sorted(those.difference(own), reverse=True)
        found = [meet(way, k - len(tokens), operands[k], later) for k in rest if (way := best(those - {k}))]
        for (one, _), count in product(permutations(own, 2), range(len(rest) + 1)):
            for part in combinations(rest, count):
                way, other = best(frozenset((one, *part))), best(those.difference((one, *part)))
                found += [meet(way, None, other.labels, later, other)] if way and other else []
        if len(those) < len(operands):
            found = [way for way in found if way.price.largest < limit]
        return min(found, key=lambda way: way.price.total, default=None)

    return best(frozenset(range(len(operands))))


def _only(labels: str, wanted: str) -> str:
    return "".join(x for x in dict.fromkeys(labels) if x in wanted)


def _met(left: str, right: str, out: str, extents: dict[str, int], renames: bool) -> Price:
    """Price one step. A product reads the axes that it sums side by side; axes that it does not sum, it wants before the tokens'."""
    shared = [x for x in left if x in right]
    summed = "".join(x for x in shared if x not in out)
    size, beside, whole = (math.prod(extents[x] for x in labels) for labels in (out, left, right))
    moved, is_batched = size, 0 < len(summed) < len(shared)
    if is_batched or not left.endswith(summed):
        moved += (1 + is_batched) * beside
    if not renames and (is_batched or not (right.startswith(summed) or right.endswith(summed))):
        moved += whole
    flops = 0 if renames else flop_count({*left, *right}, len({*left, *right}) > len(out), 2, extents)
    return Price(flops, NUMBER * moved, size)

"""The order of a contraction: one price for every order, and two searches for the cheapest.

    total = flops + FLOPS_PER_BYTE bytes        flops of a pairwise step = prod(sizes), twice that if it sums an index

In `free_order` any two operands may meet; in `token_order` each step has a token operand, so that no product of weights
is ever formed. Both count numbers as float32's, whatever they are: a dtype changes no order, and so no rounding.

Legend: an operand is a string of letters, one per axis; `sizes` pairs each letter with its extent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from functools import cache, lru_cache
from itertools import combinations, permutations, product
from typing import Any, NamedTuple

from opt_einsum import get_symbol
from opt_einsum.paths import DynamicProgramming
from torch import Tensor, fx
from torch.fx.node import map_arg

# Elementwise traffic costs about this many matmul flops per byte on the machines measured (LAB.md, cost model).
FLOPS_PER_BYTE = 16.0
NUMBER = 4  # bytes, where an order is chosen
CALL = 16  # numbers per token that cost as much as one operation more, in calls of few tokens
CACHE = 1 << 18  # numbers: where no operand has more, what a step writes is still near when the next reads it

Path = tuple[tuple[int, ...], ...]
Words = tuple[str, ...]
Sizes = tuple[tuple[str, int], ...]


class Price(NamedTuple):
    """What a computation costs: flops, bytes moved, numbers of its largest intermediate; `total` is in flops."""

    flops: float = 0
    bytes: float = 0
    largest: float = 0

    @property
    def total(self) -> float:
        return self.flops + FLOPS_PER_BYTE * self.bytes

    def __add__(self, other: object) -> Price:
        assert isinstance(other, Price)
        return Price(self.flops + other.flops, self.bytes + other.bytes, max(self.largest, other.largest))


def flops(points: int, is_sum: bool, operands: int = 2) -> int:
    """Count the flops of a product of operands in one loop nest of so many points."""
    return points * (operands - 1 + is_sum)


def counted(nodes: Iterable[fx.Node]) -> Price:
    """Price what is traced: flops of matrix products as torch counts them, bytes written, the largest value."""
    from torch.utils.flop_counter import flop_registry  # loads triton: not at `import dualform`

    total = Price()
    for node in (n for n in nodes if n.op == "call_function"):
        args, kwargs, made = map_arg((node.args, node.kwargs, node), lambda n: n.meta.get("val"))
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        work = int(formula(*args, **kwargs, out_val=made)) if formula else 0
        total += Price(work, made.nbytes, made.numel()) if isinstance(made, Tensor) else Price(work)
    return total


def letters(*operands: Iterable[Hashable]) -> dict[Any, str]:
    """Give labels letters, in the order in which they come."""
    return {label: get_symbol(k) for k, label in enumerate(dict.fromkeys(x for labels in operands for x in labels))}


@lru_cache(maxsize=4096)
def free_order(inputs: tuple[frozenset[int], ...], out: frozenset[int], extents: tuple[int, ...]) -> Path:
    """Find the cheapest order: pairs of positions in a list that loses both and gains their product at its end."""
    if len(inputs) <= 2:
        return (tuple(range(len(inputs))),)
    is_near = all(math.prod(extents[k] for k in labels) <= CACHE for labels in inputs)
    minimize = "flops" if is_near else f"combo-{round(FLOPS_PER_BYTE * NUMBER / 2)}"  # a multiply-add is one, there
    search: Any = DynamicProgramming(minimize, cost_cap=False, search_outer=True)
    # Labels are numbers, not letters: sets of letters have another order in every process.
    return tuple(tuple(sorted(pair)) for pair in search(list(inputs), out, dict(enumerate(extents))))


class Pairing(NamedTuple):
    """Meet one more operand: a factor, or the other token (which = None); labels before, its own, those left."""

    which: int | None
    left: str
    right: str
    out: str


class TokenOrder(NamedTuple):
    """The token to start at, labels left, what is met in turn, what the other token meets before, the price."""

    start: int
    labels: str
    steps: tuple[Pairing, ...] = ()
    other: tuple[Pairing, ...] = ()
    price: Price = Price()


@lru_cache(maxsize=1024)
def token_order(
    tokens: Words, factors: Words, fixed: tuple[bool, ...], rows: str, sizes: Sizes, limit: float = math.inf
) -> TokenOrder | None:
    """Find the cheapest order in which one token, or two that meet on the way, meet the factors one by one.

    fixed: which factors are identities, whose products rename. limit: what no intermediate may reach; None:
    each order has one.
    """
    operands, first, extents = (*tokens, *factors), len(tokens), dict(sizes)

    def only(labels: str, wanted: str) -> str:
        return "".join(x for x in dict.fromkeys(labels) if x in wanted)

    def rank(way: TokenOrder) -> Any:  # of equals: what comes first
        return way.price.total, way.start, [-1 if step.which is None else step.which for step in way.steps]

    def meet(way: TokenOrder, which: int | None, other: TokenOrder, later: str) -> TokenOrder:
        out = only(way.labels + other.labels, later)
        price = _met(way.labels, other.labels, out, extents, which is not None and fixed[which])
        if later == rows:  # the result: no intermediate, and wanted in the order of the rows
            price = Price(price.flops, price.bytes + (out != only(rows, out)) * NUMBER * (CALL + price.largest))
        steps = (*way.steps, Pairing(which, way.labels, other.labels, out))
        return TokenOrder(way.start, out, steps, other.steps or way.other, way.price + other.price + price)

    @cache
    def ways(those: frozenset[int]) -> list[TokenOrder]:
        """Contract these operands, a token or both among them: the cheapest way to each order of the axes left."""
        own = sorted(k for k in those if k < first)
        if len(those) == 1:
            return [TokenOrder(own[0], operands[own[0]])]
        later = rows + "".join(labels for k, labels in enumerate(operands) if k not in those)
        rest = sorted(those.difference(own))
        found = [meet(way, k - first, TokenOrder(k, operands[k]), later) for k in rest for way in ways(those - {k})]
        for (one, _), count in product(permutations(own, 2), range(len(rest) + 1)):
            for part in combinations(rest, count):
                pairs = product(ways(frozenset((one, *part))), ways(those.difference((one, *part))))
                found += [meet(way, None, other, later) for way, other in pairs]
        below = [way for way in found if way.price.largest < limit]
        return list({way.labels: way for way in sorted(below, key=rank, reverse=True)}.values())

    return min(ways(frozenset(range(len(operands)))), key=rank, default=None)


def _met(left: str, right: str, out: str, extents: dict[str, int], renames: bool) -> Price:
    """Price a step, with what it lays out anew: a product wants summed axes side by side, kept ones up front."""
    shared = [x for x in left if x in right]
    summed = "".join(x for x in shared if x not in out)
    size, tokens, factor = (math.prod(extents[x] for x in labels) for labels in (out, left, right))
    moved, is_batched = size, 0 < len(summed) < len(shared)
    if is_batched or not left.endswith(summed):
        moved += (1 + is_batched) * tokens
    if not renames and (is_batched or not (right.startswith(summed) or right.endswith(summed))):
        moved += factor
    moved += CALL * (moved > size or len(summed) != 1)  # no matrix product of what lies there
    work = 0 if renames else flops(math.prod(extents[x] for x in {*left, *right}), len({*left, *right}) > len(out))
    return Price(work, NUMBER * moved, size)

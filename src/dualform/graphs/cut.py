"""A minimum cut: which nodes of a network stand with its source, so that the edges between cost least."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import TypeVar

N = TypeVar("N", bound=Hashable)


def minimum_cut(edges: Iterable[tuple[N, N, float]], source: N, sink: N) -> set[N]:
    """Return the source's side of a cut of least capacity; of several such cuts, that of the largest side.

    edges: (from, to, capacity); two of the same ends add up, math.inf is never cut.
    Source: Dinic 1970, from the sink: paths that are as short as can be, until none is left.
    """
    left: dict[N, dict[N, float]] = {source: {}, sink: {}}
    for a, b, capacity in edges:
        forth, back = left.setdefault(a, {}), left.setdefault(b, {})
        forth[b] = forth.get(b, 0.0) + capacity
        back.setdefault(a, 0.0)
    while True:
        distance, queue = {sink: 0}, [sink]
        for b in queue:
            for a in left[b]:
                if a not in distance and left[a][b] > 0:
                    distance[a] = distance[b] + 1
                    queue.append(a)
        if source not in distance:
            return left.keys() - distance.keys()
        untried, path = {a: list(left[a]) for a in distance}, [source]
        while path:
            here = path[-1]
            if here == sink:
                amount = min(left[a][b] for a, b in pairwise(path))
                assert amount < math.inf, "no cut is finite"
                for a, b in pairwise(path):
                    left[a][b] -= amount
                    left[b][a] += amount
                del path[next(k for k, (a, b) in enumerate(pairwise(path), 1) if left[a][b] <= 0) :]
            elif not untried[here]:
                path.pop()
                if path:
                    untried[path[-1]].pop()
            else:
                there = untried[here][-1]
                if left[here][there] > 0 and distance.get(there) == distance[here] - 1:
                    path.append(there)
                else:
                    untried[here].pop()

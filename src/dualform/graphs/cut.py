"""The cheapest way to part a network in two: what is on the source's side of a minimum cut."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

Edge = tuple[Hashable, Hashable, float]


def source_side(edges: Iterable[Edge], source: Hashable, sink: Hashable) -> set[Hashable]:
    """Return what stays with the source when the edges from its side to the sink's cost least; an infinite one is never cut.

    minimise  sum of the capacities of the edges (a, b) with a on the source's side and b on the sink's
    Raises: networkx.NetworkXUnbounded if every cut costs infinity.
    """
    import networkx  # with torch; a tenth of a second, not at `import dualform`

    network = networkx.DiGraph()
    network.add_nodes_from([source, sink])
    for a, b, capacity in edges:
        network.add_edge(a, b, **({} if math.isinf(capacity) else {"capacity": capacity}))
    _, (inside, _) = networkx.minimum_cut(network, source, sink)
    return set(inside)

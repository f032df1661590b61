"""How an op is generated, by its row: kinds of ops, what they read as, and what they cost."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dualform.learning.backends import BackendError
from dualform.ops.table import ENTRIES, ROWS, find_row, kind_of

SAYS_NOTHING = "its row in ops/ does not say how it is generated"


class Unsupported(BackendError):
    """An op that is not generated, and why."""

    def __init__(self, node: fx.Node, line: str = "", why: str = SAYS_NOTHING) -> None:
        where = f" at {line}" if line else ""
        known = sum(bool(row.kind or row.lowered) for row in ROWS.values())
        super().__init__(
            f"cpp: the op {node.target}{where} is not generated: {why}; expected one of {known} ops that have a kind, "
            "or are spelt out in those. Use backend='eager', or add `entry` to its row."
        )
        self.node, self.why = node, why


def work(n: fx.Node) -> float:
    """Estimate how many multiplications and additions a value takes; a view takes none."""
    row = find_row(n.target)
    kind = row.kind if row else ""
    if kind == "view" or not isinstance(n.meta.get("val"), torch.Tensor):
        return 0.0
    first = next((x.meta["val"] for x in n.all_input_nodes), n.meta["val"])
    if kind == "product":
        return float(n.meta["val"].numel() * first.shape[-1])
    if kind == "reduction":
        return float(first.numel())
    return n.meta["val"].numel() * (ENTRIES[row.spelt(n)[0]].flops if row and kind == "map" else 1.0)


def is_factor_alone(n: fx.Node) -> bool:
    """Is a value, through views, nothing but a factor of products of matrices?"""
    for user in n.users:
        kind = "view" if user.target is operator.getitem else kind_of(user.target)
        if kind == "product":
            if user.args[0] not in (n, user.args[1]) and user.args[1] is not n:
                return False
            shapes = [x.meta["val"].shape for x in (user, *user.all_input_nodes)]
            if len(shapes[0]) != 2 or any(1 in shape for shape in shapes):
                return False
        elif kind != "view" or not is_factor_alone(user):
            return False
    return True

"""How masks were made: two that were made alike are one, whatever they are called.

m, ~~m, m.clone(), torch.lt(input=h, other=0.0)        ->    lt(h, 0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dualform.graphs.constants import version_of
from dualform.graphs.requiring import node_of
from dualform.ops.table import Entry, row_of


class Masks:
    """The masks of one trace, and the tensors that they are made of, by identity and the writes to them."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, int, Any]] = {}

    def key(self, x: Any) -> Any:
        """How a mask was made; which tensor it is, and how often written to, of another one."""
        if not isinstance(x, Tensor):
            return x
        held = self._made.get(id(x))
        if held is None or held[0] is not x or held[1] != version_of(x):
            held = self._made[id(x)] = (x, version_of(x), (id(x), version_of(x)))
        return x.ndim, held[2]

    def note(self, func: Any, args: Any, kwargs: Any, result: Tensor, leaves: list[Tensor]) -> None:
        """Note by which op of which tensors a result was made, in one way of many."""
        made = self._by(func, args, kwargs, result, leaves)
        if made is not None:
            self._made[id(result)] = (result, version_of(result), made)

    def _by(self, func: Any, args: Any, kwargs: Any, result: Tensor, leaves: list[Tensor]) -> Any:
        node, keys = node_of(result), {node_of(x): self.key(x) for x in leaves}
        row, one = row_of(node and node.target), leaves[0] if len(leaves) == 1 else None
        passes = row.ordered or (isinstance(row.entry, Entry) and row.entry.passes)  # its operand's entries as they are
        if passes and one is not None and one.shape == result.shape and one.dtype == result.dtype:
            return self.key(one)[1]
        if result.dtype not in (torch.bool, torch.uint8):
            return None
        if node is None or any(n not in keys for n in node.all_input_nodes):
            return func, _hashable(pytree.tree_map(self.key, (args, kwargs)))
        if leaves and all(x.dtype == torch.bool for x in leaves) and len(node.args) == len(node.all_input_nodes):
            found = _truth(getattr(node.target, "_opname", ""), [keys[n] for n in node.all_input_nodes])
            if found is not None:
                return found
        return node.target, _hashable(fx.map_arg((node.args, dict(node.kwargs)), keys.__getitem__))


def _hashable(x: Any) -> Any:
    """Arguments in one way of many; 0 and 0.0 are one."""
    if isinstance(x, dict):
        return tuple((name, _hashable(v)) for name, v in sorted(x.items()))
    if isinstance(x, slice):
        return "slice", x.start, x.stop, x.step
    return tuple(map(_hashable, x)) if isinstance(x, list | tuple) else x


def _truth(name: str, keys: list[Any]) -> Any:
    """A mask of masks: `not` of `not` is none, and `or` is said by `and`."""

    def negated(x: Any) -> Any:
        return x[1][1] if isinstance(x[1], tuple) and x[1][:1] == ("not",) else (x[0], ("not", x))

    name = name.strip("_").removeprefix("logical_").removeprefix("bitwise_")
    ndim = max(x[0] for x in keys)
    if name == "not":
        return negated(keys[0])[1]
    if name == "or":
        return negated((ndim, ("and", frozenset(map(negated, keys)))))[1]
    return (name, frozenset(keys)) if name in ("and", "xor") else None

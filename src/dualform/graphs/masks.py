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
        self._noted: list[Any] = []  # what was made since somebody asked: of most traces nobody does
        self._ways: dict[Any, int] = {}  # in which what is no mask was made

    def key(self, x: Any) -> Any:
        """How a mask was made; which tensor it is, and how often written to, of another one."""
        if not isinstance(x, Tensor):
            return x
        if self._noted:
            noted, self._noted = self._noted, []
            for made in noted:
                self._settle(*made)
        held = self._made.get(id(x))
        if held is None or held[0] is not x or held[1] != version_of(x):
            held = self._made[id(x)] = (x, version_of(x), (id(x), version_of(x)))
        return x.ndim, held[2]

    def note(self, func: Any, args: Any, kwargs: Any, result: Any, leaves: list[Tensor]) -> None:
        """Note by which op of which tensors results were made."""
        found = [x for x in (result if isinstance(result, list | tuple) else [result]) if isinstance(x, Tensor)]
        self._noted.append((func, args, kwargs, result, leaves, [version_of(x) for x in (*leaves, *found)]))

    def _settle(
        self, func: Any, args: Any, kwargs: Any, result: Any, leaves: list[Tensor], versions: list[int]
    ) -> None:
        """Say it in one way of many; of what was written to since nothing is known."""
        results = result if isinstance(result, list | tuple) else [result]
        if versions == [version_of(x) for x in (*leaves, *results) if isinstance(x, Tensor)]:
            for k, x in enumerate(results):
                if isinstance(x, Tensor) and not any(x is y for y in leaves):
                    self._made[id(x)] = (x, version_of(x), self._by(func, args, kwargs, (k, x), leaves))

    def _by(self, func: Any, args: Any, kwargs: Any, result: tuple[int, Tensor], leaves: list[Tensor]) -> Any:
        k, x = result
        node, keys = node_of(x), {node_of(y): self.key(y) for y in leaves}
        row, one = row_of(node and node.target), leaves[0] if len(leaves) == 1 else None
        passes = row.ordered or (isinstance(row.entry, Entry) and row.entry.passes)  # its operand's entries as they are
        if passes and one is not None and one.shape == x.shape and one.dtype == x.dtype:
            return self.key(one)[1]
        if node is None or any(n not in keys for n in node.all_input_nodes):
            how: Any = (func, k, _hashable(pytree.tree_map(self.key, (args, kwargs))))
        else:
            if leaves and all(y.dtype == torch.bool for y in leaves) and len(node.args) == len(node.all_input_nodes):
                found = _truth(getattr(node.target, "_opname", ""), [keys[n] for n in node.all_input_nodes])
                if found is not None:
                    return found
            how = (node.target, _hashable(fx.map_arg((node.args, dict(node.kwargs)), keys.__getitem__)))
        if x.dtype in (torch.bool, torch.uint8):
            return how
        try:  # a number, as what a mask is made of is made of more
            return "made", self._ways.setdefault((how, x.dtype, x.shape), len(self._ways))
        except TypeError:  # of what cannot be told from others
            return id(x), version_of(x)


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

"""Where a module has the tensors that were read: a compiler, an export, functional_call put others there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from dualform.learning.roles import Roles
from dualform.learning.transforms import is_known
from dualform.shapes import ShapeError
from dualform.storages import contents, last_written


class Written(dict[Any, Any]):
    """A dict in which export lets stand what a call writes: of a plain one in a module it puts a copy back."""


def standing(module: nn.Module, name: str) -> Tensor:
    """Return the tensor that stands under a name in a module now."""
    where, _, last = name.rpartition(".")
    return getattr(module.get_submodule(where), last)


def note_places(places: dict[str, str], module: nn.Module, closed: Mapping[str, Tensor]) -> None:
    """Note under which name a module has each tensor that is closed over, if it has it."""
    own = {id(x): name for name, x in (*module.named_parameters(), *module.named_buffers())}
    places.clear()
    places.update({name: own[id(x)] for name, x in closed.items() if id(x) in own})


def as_they_stand(module: nn.Module, parts: Roles, places: Mapping[str, str]) -> Roles:
    """Return the parts with the tensors that stand in the module now."""
    fast, slow, buffers = ({name: standing(module, f"learner.{name}") for name in part} for part in parts[:3])
    closed = {n: standing(module, places[n]) if n in places else x for n, x in parts.closed.items()}
    return Roles(fast, slow, buffers, closed)


@contextmanager
def put_back(module: nn.Module, parts: Roles, places: Mapping[str, str]) -> Iterator[None]:
    """Put what was read back, while a trace runs, where an export has put tensors of its own."""
    read = {f"learner.{name}": x for name, x in (parts.fast | parts.slow | parts.buffers).items()}
    read |= {place: parts.closed[name] for name, place in places.items()}
    lent = {name: x for name, x in read.items() if type(standing(module, name)) not in (Tensor, nn.Parameter)}
    with _reparametrize_module(module, lent, tie_weights=True):
        yield


def expect_fixed(
    fixed: Mapping[str, Tensor], compared: dict[str, Any], slow: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    """Refuse other values of a buffer than those that the graph was made for; slow: the given ones, cast.

    Those of a card are compared once, and again when they are written: to look at each call is to wait for it, and
    under a capture nobody may look. compared: what was given last, and in what state.
    """
    for name, own in fixed.items():
        x, y = given.get(name), slow[name]
        if x is None or y is own:
            continue
        at, before = (last_written(x), contents(own), y.dtype), compared.get(name)
        if at[0] is not None and before is not None and before[0]() is x and before[1] == at:
            continue
        if not (is_known(y) and torch.equal(y, own.to(y))):
            raise ShapeError(
                f"program: params[{name!r}] has other values than the learner's own buffer, which forward reads as "
                "numbers (an index, a size, an if); expected the same. Write them into the learner's buffer, which "
                "derives again."
            )
        compared[name] = ref(x), at

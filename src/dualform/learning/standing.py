"""Where a module has the tensors that were read: a compiler, an export, functional_call put others there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from dualform.learning.front_door import Roles


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

"""The tensors that terms hold, in order; others in their place; and how they lie in memory, for pickles.

Two factors of one memory have one letter, and are stored once: they share it on the other side of a pickle, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.terms import Factor, Term, identity_of
from dualform.storages import memory_of


def _held(f: Any) -> str | None:
    """The field in which a factor or a relation holds a tensor."""
    return next((name for name in ("tensor", "index") if isinstance(getattr(f, name, None), Tensor)), None)


def refilled(f: Any, made: Sequence[Tensor], at: Iterator[int]) -> tuple[Any, int | None]:
    """A factor or relation with the next of some tensors in place of its own, and which that is; None: it has none."""
    held = _held(f)
    if held is None:
        return f, None
    place = next(at)
    new = replace(f, **{held: made[place]})
    if isinstance(f, Factor) and f.made:  # what it is made of is filled in, too
        inner = (replace(t, factors=tuple(refilled(g, made, at)[0] for g in t.factors)) for t in f.made)
        new = replace(new, made=tuple(inner))
    return new, place


def tensors_of(terms: Sequence[Term]) -> list[list[Tensor]]:
    """The tensors of each term's factors and relations, in order, each before those that it is made of."""
    return [[t for f in term.factors for t in _tensors(f)] for term in terms]


def _tensors(f: Any) -> list[Tensor]:
    held = _held(f)
    inner = [t for made in tensors_of(f.made) for t in made] if isinstance(f, Factor) else []
    return [] if held is None else [getattr(f, held), *inner]


class _Laid:
    """A tensor by its memory and how it lies there; a pickle of it is read as the tensor itself."""

    def __init__(self, memory: Tensor, x: Tensor) -> None:
        self.how = (memory, tuple(x.shape), x.stride(), x.storage_offset())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.as_strided, self.how


def laid(terms: Sequence[Term], inputs: Mapping[str, Tensor]) -> tuple[tuple[Term, ...], dict[str, Any]]:
    """Terms for a pickle, and their inputs by name: the numbers of those that stand in no term are left out."""
    memories: dict[tuple[int, torch.dtype], Tensor] = {}

    def one(x: Tensor) -> Any:
        if type(x) is not Tensor or x.layout != torch.strided or x.is_meta or x.is_neg() or x.requires_grad:
            return x
        key = (memory_of(x), x.dtype)
        if key not in memories:
            storage = x.untyped_storage()
            whole = x.new_empty(0).set_(storage, 0, (storage.nbytes() // x.itemsize,))  # type: ignore[call-overload]
            memories[key] = whole
        return _Laid(memories[key], x)

    held = tensors_of(terms)
    seen = {identity_of(x.squeeze()) for found in held for x in found}
    own = {name: one(x) if identity_of(x.squeeze()) in seen else x.new_empty(0) for name, x in inputs.items()}
    made = []
    for term, tensors in zip(terms, held, strict=True):
        at = iter(range(len(tensors)))
        lying = [one(x) for x in tensors]
        made.append(replace(term, factors=tuple(refilled(f, lying, at)[0] for f in term.factors)))
    return tuple(made), own

"""What a layer carries from one call to the next: (anchor, registers, position) and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree

from dualform.learning.transforms import is_known
from dualform.shapes import fail


class Carried:
    """Methods of everything that is carried: every field is a tensor, a mapping or another `Carried`, batch first."""

    copies: ClassVar = "Copy state.detach(), or state.fork(1), whose gradients go on."  # instead of a deep one

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        def over(value: Any) -> Any:
            if isinstance(value, Carried):
                return value._map(function)
            return {name: function(x) for name, x in value.items()} if isinstance(value, dict) else function(value)

        return replace(self, **{f.name: over(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return every tensor by its dotted name."""
        found: dict[str, Tensor] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Carried):
                found |= value.tensors(f"{prefix}{f.name}.")
            elif isinstance(value, dict):
                found |= {f"{prefix}{f.name}.{name}": x for name, x in value.items()}
            else:
                found[prefix + f.name] = value
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make one of its tensors by dotted name, as `tensors` gives them."""
        kinds, parts = get_type_hints(cls), dict[str, Any]()
        for f in fields(cls):  # type: ignore[arg-type]
            kind, own = kinds[f.name], under(tensors, f"{f.name}.")
            parts[f.name] = tensors[f.name] if kind is Tensor else kind.of(own) if hasattr(kind, "of") else own
        return cls(**parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name, x in self.tensors().items():
            if not x.is_leaf:
                expected = "numbers alone, as copy.deepcopy takes them of torch"
                fail(f"{type(self).__name__}.deepcopy", name, "has gradients to what made it", expected, self.copies)
        return self._map(lambda x: copy.deepcopy(x, memo))

    def detach(self) -> Self:
        """Cut the state from the graph that made it."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast; a dtype changes floating tensors only."""
        device_only = {name: x for name, x in kwargs.items() if name == "device"}
        places = [x for x in args if not isinstance(x, torch.dtype)]

        def move(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return x.to(*args, **kwargs)
            return x.to(*places, **device_only) if places or device_only else x

        return self._map(move)

    def fork(self, n: int) -> Self:
        """Repeat every row n times, copies beside each other, as beam search wants."""
        return self._map(lambda x: x.repeat_interleave(n, 0))

    def select(self, rows: Any) -> Self:
        """Keep rows of the batch, in this order: numbers (negative ones from the end) or a bool for each."""
        return self._map(lambda x: x.index_select(0, row_numbers(rows, x.shape[0]).to(x.device)))

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file."""
        save_file({name: x.detach().contiguous().cpu() for name, x in self.tensors().items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; refuse a file that holds something else."""
        tensors, kinds = load_file(str(path)), get_type_hints(cls)
        own = {f.name: kinds[f.name] for f in fields(cls)}  # type: ignore[arg-type]
        try:
            made = cls.of(tensors)
        except KeyError:
            made = None
        if made is None or made.tensors().keys() != tensors.keys():
            held = f"{'a tensor' if len(tensors) == 1 else 'tensors'} named {', '.join(map(repr, tensors))}"
            names = ", ".join(repr(n if kind is Tensor else f"{n}.*") for n, kind in own.items())
            raise ValueError(
                f"{cls.__name__}.load: {path} holds {held}; expected {names}. Pass a file that {cls.__name__}.save "
                "wrote."
            )
        return made


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class State(Carried):
    """Hold the fast weights between calls.

    Shape:  anchor {leaf: (B, H, *shape)}, registers {leaf: (B, H, r, *shape)}, position (B,) = tokens since the
            mini-batch began.
    Dtype:  float32, or float64 when the program computes in it; position int64.
    Source: DESIGN section 1 of this project.
    """

    anchor: dict[str, Tensor]
    registers: dict[str, Tensor]
    position: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make one of its tensors; there is no state without weights."""
        if not under(tensors, "anchor."):
            raise KeyError("anchor")
        return super().of(tensors)


def row_numbers(rows: Any, count: int) -> Tensor:
    """Return the numbers of the rows, out of so many, that a tensor or list of numbers or truth values chooses.

    Example:
        >>> row_numbers([True, False, True], 3), row_numbers([-1, 0], 3)
        (tensor([0, 2]), tensor([2, 0]))
    """
    chosen = torch.as_tensor(rows)
    if chosen.dtype == torch.bool and chosen.shape == (count,):
        return chosen.nonzero()[:, 0]
    if chosen.ndim != 1 or chosen.dtype == torch.bool or (chosen.is_floating_point() and chosen.numel()):
        raise IndexError(
            f"select: rows has shape {tuple(chosen.shape)} and type {chosen.dtype}; expected a list of row numbers, or "
            f"one truth value for each of the batch = {count} rows. Pass one of these."
        )
    chosen = chosen.long()
    if is_known(chosen) and bool(((chosen < -count) | (chosen >= count)).any()):
        raise IndexError(
            f"select: rows holds {chosen.tolist()}; expected numbers of the batch = {count} rows, {-count} ... "
            f"{count - 1}. Pass those."
        )
    return torch.where(chosen < 0, chosen + count, chosen)


_pytree.register_dataclass(
    State, field_names=["anchor", "registers", "position"], drop_field_names=[], serialized_type_name="dualform.State"
)

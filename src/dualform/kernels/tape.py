"""A call on a card, written down as it runs first, and run again without the Python around it: torch's ops, launches.

What runs must be decided by shapes, types and strides alone, which are the key that a caller keeps a tape under. Views
are no steps here: a step's argument is a place in an input, in a constant, or in what an earlier step made.

Legend: slot number of a tensor that has memory of its own;
        a constant is a tensor that was there before and is no input.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dualform.ops.factories import is_empty
from dualform.storages import memory_of

recording = threading.local()


class SlotView(NamedTuple):
    """A view of a slot; offset: from where the slot's tensor starts, in entries."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool

    def of(self, slots: list[Any]) -> Tensor:
        x = slots[self.slot]
        return x if self.is_whole else x.as_strided(self.size, self.stride, x.storage_offset() + self.offset)


@dataclass
class TapeStep:
    """An op of torch's, or a launch: what it takes, and the slots of what it makes. last:
    slots that nothing needs after it."""

    takes: list[SlotView]
    run: Callable[[list[Any]], Any]
    makes: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)


@dataclass
class Tape:
    steps: list[TapeStep]
    constants: dict[int, Tensor]
    outputs: list[SlotView]
    size: int

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        slots: list[Any] = [None] * self.size
        slots[: len(inputs)] = inputs
        for k, x in self.constants.items():
            slots[k] = x
        for step in self.steps:
            made = step.run(slots)
            for k, x in zip(step.makes, made, strict=True):
                slots[k] = x
            for k in step.last:
                slots[k] = None
        found = [p.of(slots) for p in self.outputs]
        return [x.clone() if p.slot in self.constants else x for p, x in zip(self.outputs, found, strict=True)]


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps, self.constants, self.bases = list[TapeStep](), dict[int, Tensor](), list(inputs)
        self.slot = {id(x): k for k, x in enumerate(inputs)}  # of every tensor seen; all are alive until the end
        self.alive = list(inputs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as graphs/hollow.py's: else torch loads its compiler

    def part(self, x: Tensor) -> SlotView:
        if id(x) not in self.slot:
            self.constants[self.new(x)] = x
        k = self.slot[id(x)]
        base = self.bases[k]
        offset, size, stride = int(x.storage_offset() - base.storage_offset()), tuple(x.shape), x.stride()
        return SlotView(k, size, stride, offset, (size, stride, offset) == (tuple(base.shape), base.stride(), 0))

    def new(self, x: Tensor) -> int:
        self.bases.append(x)
        self.alive.append(x)
        self.slot[id(x)] = len(self.bases) - 1
        return len(self.bases) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        parts = [self.part(x) for x in given]
        found = func(*args, **kwargs)
        made = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
        new = []
        for x in made:
            if id(x) in self.slot:
                continue  # written in place
            source = next((y for y in given if x.numel() and y.dtype == x.dtype and memory_of(x) == memory_of(y)), None)
            if source is None:
                new.append(x)
            else:
                self.slot[id(x)] = self.slot[id(source)]
                self.alive.append(x)
        if new or func._schema.is_mutable:
            assert not new or len(new) == len(made), func
            build = _building(args, kwargs, parts)

            def run(slots: list[Any]) -> list[Tensor]:
                own, named = build(slots)
                out = func(*own, **named)
                return [out] if isinstance(out, Tensor) else list(out or ())

            makes = [self.new(x) for x in new]
            if is_empty(func) and new[0].is_contiguous():
                x = new[0]
                run = partial(_empty, tuple(x.shape), x.dtype, x.device)
            self.steps.append(TapeStep(parts, run if makes else lambda slots: run(slots) and (), makes))
        return found

    def launched(
        self, tensors: Sequence[Tensor], launch: Callable[[list[int]], Any], again: Callable[[list[Tensor]], Any] | None
    ) -> None:
        """Note a launch. launch: with pointers; again: with tensors, where there is no compiled code."""
        parts = [self.part(x) for x in tensors]
        sizes = [x.element_size() for x in tensors]

        def run(slots: list[Any]) -> tuple[()]:
            if again is not None:
                again([p.of(slots) for p in parts])
            else:
                launch([slots[p.slot].data_ptr() + p.offset * n for p, n in zip(parts, sizes, strict=True)])
            return ()

        self.steps.append(TapeStep(parts, run))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, slots: list[Any]) -> list[Tensor]:
    """Make room as torch's own entry point does, at a third of the price of the op's overload."""
    return [torch.empty(shape, dtype=dtype, device=device)]


def _building(args: Any, kwargs: Any, parts: list[SlotView]) -> Callable[[list[Any]], tuple[Any, Any]]:
    """Write how an op's arguments are made again: tensors stand alone, or in a list."""
    rest, alone, listed = iter(parts), list[tuple[int, SlotView]](), list[tuple[int, list[Any]]]()
    for k, x in enumerate(args):
        if isinstance(x, Tensor):
            alone.append((k, next(rest)))
        elif isinstance(x, list | tuple) and any(isinstance(y, Tensor) for y in x):
            listed.append((k, [next(rest) if isinstance(y, Tensor) else y for y in x]))
    named = [(name, next(rest)) for name, x in kwargs.items() if isinstance(x, Tensor)]
    assert next(rest, None) is None, args
    plain = [None if isinstance(x, Tensor) else x for x in args]
    options = {name: x for name, x in kwargs.items() if not isinstance(x, Tensor)}

    def build(slots: list[Any]) -> tuple[Any, Any]:
        own = plain.copy()
        for k, p in alone:
            own[k] = p.of(slots)
        for k, xs in listed:
            own[k] = [x.of(slots) if isinstance(x, SlotView) else x for x in xs]
        return own, options | {name: p.of(slots) for name, p in named} if named else options

    return build


def recorded(call: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tape]:
    """Run a call and write it down."""
    recorder = _Recorder(inputs)
    recording.now = recorder
    try:
        with recorder:
            found = call()
    finally:
        recording.now = None
    outputs = [recorder.part(x) for x in found]
    kept = {p.slot for p in outputs} | set(range(len(inputs))) | set(recorder.constants)
    for step in reversed(recorder.steps):
        own = dict.fromkeys((*(p.slot for p in step.takes), *step.makes))
        step.last = [k for k in own if k not in kept]
        kept |= set(own)
    return found, Tape(recorder.steps, recorder.constants, outputs, len(recorder.bases))


__all__ = ["Tape", "recorded", "recording"]

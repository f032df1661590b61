"""A call on a card, written down as it runs once, and run again without the Python around it: allocations,
torch's ops, launches.

What runs must be decided by shapes, types and strides alone, which are the key that a caller keeps a tape under. Views
are no steps here: a step's argument is a place in an input, in a constant, or in what an earlier step made. A tape is a
function in Python's own text; what launches alone read and write lies in one allocation, whose parts serve others once
nothing needs them.

Legend: slot number of a tensor that has memory of its own;
        a constant is a tensor that was there before and is no input.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dualform.learning.prepare import as_python_calls
from dualform.ops.factories import is_empty
from dualform.storages import memory_of

recording = threading.local()
ALIGNMENT = 256  # bytes: more than any load asks for


class SlotView(NamedTuple):
    """A view of a slot; offset: from where the slot's tensor starts, in entries."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool
    bytes: int  # of an entry


@dataclass
class TapeStep:
    """An op of torch's, or a launch: the slots that it takes and makes, and how it is written."""

    takes: list[SlotView]
    makes: list[int] = field(default_factory=list)
    write: Callable[[_Writer], str] | None = None
    room: int = 0  # bytes, where it only makes room
    launches: bool = False


@dataclass
class Tape:
    """What runs a call again. text: its function."""

    text: str
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.run(inputs)


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps, self.constants, self.bases = list[TapeStep](), dict[int, Tensor](), list(inputs)
        self.slot = {id(x): k for k, x in enumerate(inputs)}  # of every tensor seen; all are alive until the end
        self.alive = list(inputs)
        self.reads = False  # has a number been read off a tensor?

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as graphs/hollow.py's: else torch loads its compiler

    def part(self, x: Tensor) -> SlotView:
        if id(x) not in self.slot:
            self.constants[self.new(x)] = x
        k = self.slot[id(x)]
        base = self.bases[k]
        offset, size, stride = int(x.storage_offset() - base.storage_offset()), tuple(x.shape), x.stride()
        whole = (size, stride, offset, x.dtype) == (tuple(base.shape), base.stride(), 0, base.dtype)
        return SlotView(k, size, stride, offset, whole, x.element_size())

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
        self.reads |= torch.Tag.data_dependent_output in func.tags
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
            makes = [self.new(x) for x in new]
            if is_empty(func) and new[0].is_contiguous():
                (x,) = new
                self.steps.append(TapeStep([], makes, lambda w: w.empty(x), x.nbytes))
            else:
                self.steps.append(TapeStep(parts, makes, lambda w: w.op(func, args, kwargs, iter(parts))))
        return found

    def launched(self, tensors: Sequence[Tensor], launch: Callable[[_Writer, list[str]], str]) -> None:
        """Note a launch. launch: writes it, of what it is to call and of pointers."""
        parts = [self.part(x) for x in tensors]
        self.steps.append(TapeStep(parts, [], lambda w: launch(w, [w.pointer(p) for p in parts]), launches=True))

    def called(self, tensors: Sequence[Tensor], again: Callable[[list[Tensor]], Any]) -> None:
        """Note a launch where there is no compiled code. again: with tensors."""
        parts = [self.part(x) for x in tensors]
        self.steps.append(TapeStep(parts, [], lambda w: f"{w.name(again)}([{', '.join(map(w.view, parts))}])"))


class _Writer:
    """Writes the function of a tape."""

    def __init__(self, recorder: _Recorder, outputs: list[SlotView], inputs: int) -> None:
        self.recorder, self.inputs, self.lines, self.views = recorder, inputs, list[str](), dict[str, str]()
        self.space: dict[str, Any] = {f"x{k}": x for k, x in recorder.constants.items()}
        self.space |= {"empty": torch.empty, "uint8": torch.uint8}
        steps, self.last = _read_later(recorder.steps, outputs), dict[int, int]()
        for n, step in enumerate(steps):
            self.last |= dict.fromkeys((*(p.slot for p in step.takes), *step.makes), n)
        seen = {p.slot for step in steps if not step.launches for p in step.takes} | {p.slot for p in outputs}
        rooms = {k: (n, step.room) for n, step in enumerate(steps) if step.room for k in step.makes if k not in seen}
        self.place, size = self._places(rooms)
        names = ", ".join(f"x{k}" for k in range(inputs))
        self.lines.append(f"({names},) = inputs")
        if size:
            self.lines.append(f"room = empty({size}, dtype=uint8, device=x0.device)")
            self.lines.append("at = room.data_ptr()")
        kept = {p.slot for p in outputs} | set(range(inputs)) | set(recorder.constants)
        for n, step in enumerate(steps):
            if step.makes and step.makes[0] in self.place:
                continue
            assert step.write is not None
            made = ", ".join(f"x{k}" for k in step.makes)
            text = step.write(self)
            self.lines.append(f"{made} = {text}" if made else text)
            gone = [f"x{k}" for k, end in self.last.items() if end == n and k not in kept and k not in self.place]
            gone += [v for text, v in self.views.items() if text.split(".")[0] in gone]
            self.lines += [f"{' = '.join(gone)} = None"] if gone else []
        found = [f"{self.view(p)}{'.clone()' if p.slot in recorder.constants else ''}" for p in outputs]
        self.lines.append(f"return [{', '.join(found)}]")

    def _places(self, rooms: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
        """Place what launches alone need in one allocation: the largest first, each where none lives beside it."""
        places, taken, most = dict[int, int](), list[tuple[int, int, int, int]](), 0
        for k, (start, size) in sorted(rooms.items(), key=lambda x: -x[1][1]):
            size, end, at = -(-size // ALIGNMENT) * ALIGNMENT, self.last[k], 0
            for low, high, first, last in sorted(taken):
                if first <= end and start <= last and at + size > low:
                    at = max(at, high)
            places[k] = at
            taken.append((at, at + size, start, end))
            most = max(most, at + size)
        return places, most

    def name(self, x: Any) -> str:
        """Name what has no text of its own."""
        found = next((name for name, y in self.space.items() if y is x), f"k{len(self.space)}")
        self.space[found] = x
        return found

    def value(self, x: Any) -> str:
        return repr(x) if type(x) in (int, bool, type(None)) else self.name(x)

    def pointer(self, p: SlotView) -> str:
        if p.slot in self.place:
            return f"at + {self.place[p.slot] + p.offset * p.bytes}"
        return f"x{p.slot}.data_ptr()" + (f" + {p.offset * p.bytes}" if p.offset else "")

    def view(self, p: SlotView) -> str:
        if p.is_whole:
            return f"x{p.slot}"
        text = f"x{p.slot}.as_strided({p.size}, {p.stride}, x{p.slot}.storage_offset() + {p.offset})"
        if text not in self.views:
            self.views[text] = f"v{len(self.views)}"
            self.lines.append(f"{self.views[text]} = {text}")
        return self.views[text]

    def empty(self, x: Tensor) -> str:
        """Make room as torch's own entry point does, at a third of the price of the op's overload."""
        return f"empty({tuple(x.shape)}, dtype={self.name(x.dtype)}, device={self.name(x.device)})"

    def op(self, func: Any, args: Any, kwargs: Any, parts: Any) -> str:
        """Write an op: tensors stand alone, or in a list."""

        def spelt(x: Any) -> str:
            if isinstance(x, Tensor):
                return self.view(next(parts))
            listed = isinstance(x, list | tuple) and any(isinstance(y, Tensor) for y in x)
            return f"[{', '.join(map(spelt, x))}]" if listed else self.value(x)

        words = [*map(spelt, args), *(f"{name}={spelt(x)}" for name, x in kwargs.items())]
        assert next(parts, None) is None, args
        return f"{self.name(as_python_calls(func))}({', '.join(words)})"


def _read_later(steps: list[TapeStep], outputs: list[SlotView]) -> list[TapeStep]:
    """Drop what makes tensors that nothing reads."""
    needed, found = {p.slot for p in outputs}, list[TapeStep]()
    for step in reversed(steps):
        if not step.makes or not needed.isdisjoint(step.makes):
            needed |= {p.slot for p in step.takes}
            found.append(step)
    return found[::-1]


def recorded(call: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tape | None]:
    """Run a call and write it down; nothing is where a tensor's numbers decided what ran."""
    recorder = _Recorder(inputs)
    recording.now = recorder
    try:
        with recorder:
            found = call()
    finally:
        recording.now = None
    if recorder.reads:
        return found, None
    writer = _Writer(recorder, [recorder.part(x) for x in found], len(inputs))
    text = "def tape(inputs):\n" + "".join(f"    {line}\n" for line in writer.lines)
    exec(compile(text, "<dualform-tape>", "exec"), writer.space)
    return found, Tape(text, writer.space["tape"])

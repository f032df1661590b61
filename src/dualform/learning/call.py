"""A call as one record: made once, checked and cast; what program, op and loop hand on, and every backend reads.

Legend: B batch, T time, H heads, K key width, V value width, r registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.learning.grid import starts_by_lengths
from dualform.learning.roles import Roles
from dualform.learning.rules import Rule
from dualform.learning.state import State
from dualform.shapes import ShapeError, require

Leaves = dict[str, Tensor]
Names = tuple[list[str], list[str], list[str]]
OPTIONAL = ("offset", "mask", "reset")  # tensors that a call may lack, in the order of the flat list


class Call(NamedTuple):
    """The tensors of one call. q, k, v and gates may be of fewer digits than is computed in, the state's."""

    q: Tensor  # (B, T, H, K)
    k: Tensor  # (B, T, H, K)
    v: Tensor  # (B, T, H, V)
    gates: Leaves  # (B, T, H) each
    slow: Leaves  # (H, ...) parameters; buffers, and what is closed over, as they are
    before: State | None  # that the caller gave
    init: Leaves  # (H, ...): where a document starts
    start: tuple[float, ...]  # of the registers, times init
    offset: Tensor | None = None  # (chunk,)
    mask: Tensor | None = None  # (B, T)
    reset: Tensor | None = None  # (B, T)

    @property
    def carried(self) -> bool:
        """Did the caller give a state?"""
        return self.before is not None

    @property
    def state(self) -> State:
        """The state that the call begins with; made at each question where none was given."""
        return self.before or started(self.init, self.start, self.q.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return next(iter(self.init.values())).dtype

    @property
    def kinds(self) -> tuple[str, ...]:
        """Name the types of the caller's tensors."""
        return tuple(str(x.dtype) for x in (self.q, self.k, self.v, *self.gates.values()))

    @property
    def held(self) -> list[Tensor]:
        """The state's anchors, then its registers."""
        return [*self.state.anchor.values(), *self.state.registers.values()]

    def after(self, held: Sequence[Tensor], position: Tensor) -> State:
        """Name what a state holds after the call."""
        L = len(self.init)
        return State(dict(zip(self.init, held[:L], strict=True)), dict(zip(self.init, held[L:], strict=True)), position)

    @property
    def given(self) -> str:
        """Name what the call has beside what every call has."""
        names = [name for name in OPTIONAL if getattr(self, name) is not None]
        return ",".join([*names, "carried"] if self.carried else names)

    def flat(self) -> list[Tensor]:
        """List the tensors, as an op takes them."""
        b = self.before
        held = [*b.anchor.values(), *b.registers.values(), b.position] if b else ()
        parts = (self.gates.values(), self.slow.values(), held, self.init.values())
        optional = [x for x in (self.offset, self.mask, self.reset) if x is not None]
        return [self.q, self.k, self.v, *chain.from_iterable(parts), *optional]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], names: Names, start: tuple[float, ...], given: str) -> Call:
        """Read the list; names: of the gates, of the fast leaves, and of what is not fast."""
        rest, (gates, leaves, others), words = iter(tensors), names, given.split(",")

        def some(part: Sequence[str]) -> Leaves:
            return {n: next(rest) for n in part}

        q, k, v, gate, slow = next(rest), next(rest), next(rest), some(gates), some(others)
        before = State(some(leaves), some(leaves), next(rest)) if "carried" in words else None
        init = some(leaves)
        return cls(q, k, v, gate, slow, before, init, start, *(next(rest) if n in words else None for n in OPTIONAL))

    def part(self, rows: slice, T: int) -> Call:
        """Take some rows, and their first T tokens."""
        mask, reset = (None if x is None else x[rows, :T] for x in (self.mask, self.reset))
        q, k, v = (x[rows, :T] for x in (self.q, self.k, self.v))
        gates = {n: x[rows, :T] for n, x in self.gates.items()}
        before = self.before and self.before._map(lambda x: x[rows])
        return self._replace(q=q, k=k, v=v, gates=gates, before=before, mask=mask, reset=reset)

    def owned(self) -> Call:
        """Copy what inference mode made: autograd keeps none of it."""
        tensors = self.flat()
        if not any(x.is_inference() for x in tensors):
            return self
        names = (list(self.gates), list(self.init), list(self.slow))
        return Call.of([x.clone() if x.is_inference() else x for x in tensors], names, self.start, self.given)

    def plain(self) -> Call:
        """Cast tokens to what is computed in; the definition takes gradients."""
        own, dtype = self.owned(), self.dtype
        q, k, v = (x.to(dtype) for x in (own.q, own.k, own.v))
        return own._replace(q=q, k=k, v=v, gates={n: x.to(dtype) for n, x in own.gates.items()})


def started(fast: Mapping[str, Tensor], start: tuple[float, ...], B: int) -> State:
    """Return the state that B rows start from: at the initial weights, registers at their start."""
    anchor = {name: w.expand(B, *w.shape) for name, w in fast.items()}
    registers = {name: torch.stack([s * w for s in start], 2) for name, w in anchor.items()}
    device = next(iter(fast.values())).device
    return State(anchor, registers, torch.zeros(B, dtype=torch.long, device=device))


class Signature(NamedTuple):
    """What a program takes: its learner's tensors, its rule, its mini-batch; its widths where they are known."""

    parts: Roles
    rule: Rule
    chunk: int
    width: int | None
    out_width: int | None

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """What the learner computes in, float32 at least, and where."""
        p = next(iter(self.parts.fast.values()))
        return torch.promote_types(torch.float32, p.dtype), p.device

    def computed_in(self, *given: Tensor | Mapping[str, Tensor]) -> torch.dtype:
        """Return the widest of the learner's type, the tokens' and the fast weights', float32 at least."""
        each = ([x] if isinstance(x, Tensor) else [x[n] for n in self.parts.fast if n in x] for x in given)
        return reduce(torch.promote_types, (x.dtype for x in chain.from_iterable(each)), self.kind[0])

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor] | None, state: State | None,
        mask: Tensor | None, reset: Tensor | None, params: Mapping[str, Tensor] | None, ends: Tensor | None = None,
    ) -> Call:  # fmt: skip
        """Check and cast what a caller gives; fill in the rest."""
        gates, params = {} if gates is None else gates, {} if params is None else params
        for name, given in (("gates", gates), ("params", params)):
            advice = "Write {'lr': tensor} or the like."
            if not hasattr(given, "items"):
                require(False, "program", name, given, "a mapping from names to tensors", advice)
            if not all(isinstance(x, Tensor) for x in given.values()):
                expect_kinds("program", {f"{name}[{n!r}]": x for n, x in given.items()}, None, State)
        rows = {"mask": mask, "reset": reset, "cu_seqlens": ends}
        expect_kinds("program", {"q": q, "k": k, "v": v, **rows}, state, State)
        self._expect_shapes(q, k, v, mask, reset)
        (B, T, H, _), device = q.shape, q.device
        marks = {"k": k, "v": v, **rows, **{f"gates[{n!r}]": x for n, x in gates.items()}}
        for name, x in (marks | {f"state's {n}": x for n, x in (state.tensors() if state else {}).items()}).items():
            if x is not None and x.device != device:
                raise ShapeError(
                    f"program: {name} is on {x.device}; expected q's device = {device}. Move it there: "
                    f".to({str(device)!r})."
                )
        if ends is not None:
            none = "None, or cu_seqlens = None: both say where documents start"
            require(reset is None, "program", "reset", reset, none, "Pass one of them.")
            reset = starts_by_lengths("program: cu_seqlens", ends, B, T)
        dtype = self.computed_in(q, k, v, params)
        init, slow = self.with_heads(params, H, dtype, device)
        slow |= {n: self._buffer(n, params.get(n, x), dtype, device) for n, x in self.parts.buffers.items()}
        slow |= {n: _moved(n, x, device) for n, x in self.parts.closed.items()}
        made = self._gates(gates, (B, T, H), dtype, device)
        offset = made.pop("offset", None)
        q, k, v = (_tokens(x, dtype) for x in (q, k, v))
        before = state and self._fitting(state, init, B)
        return Call(q, k, v, made, slow, before, init, self.rule.start, offset, mask, reset)

    def _expect_shapes(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reset: Tensor | None) -> None:
        if q.ndim != 4:
            raise ShapeError(
                f"program: q has shape {tuple(q.shape)}; expected (batch, time, heads, K), 4 axes. Add the missing "
                "axes."
            )
        if not (q.is_floating_point() or q.is_complex()):  # the output has its dtype
            raise ShapeError(f"program: q has dtype {q.dtype}; expected one of real numbers. Pass q.float().")
        B, T, H, _ = q.shape
        if k.shape != q.shape:
            raise ShapeError(
                f"program: k has shape {tuple(k.shape)}; expected q's = {tuple(q.shape)}. Make them agree."
            )
        if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
            raise ShapeError(
                f"program: v has shape {tuple(v.shape)}; expected (batch, time, heads, V) = {(B, T, H, 'V')}. Make "
                "them agree."
            )
        if q.shape[3] == self.width and self.out_width is not None:
            expect_width(v, self.out_width)
        for name, x in (("mask", mask), ("reset", reset)):
            if x is not None and (x.shape != (B, T) or x.dtype != torch.bool):
                raise ShapeError(
                    f"program: {name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected (batch, time) = "
                    f"{(B, T)} of torch.bool. Pass {name}.bool() of that shape."
                )

    def _fitting(self, state: State, fast: Leaves, B: int) -> State:
        """Refuse a state of another model, shape or dtype; cast nothing."""
        if set(state.anchor) != set(fast):
            raise ShapeError(
                f"program: state holds the leaves {sorted(state.anchor)}; expected the learner's = {sorted(fast)}. It "
                "belongs to another model: pass a state that this program returned."
            )
        parts = (("anchor", state.anchor, ()), ("registers", state.registers, (self.rule.num_registers,)))
        held = [
            (f"{part}.{n}", leaves[n], (B, w.shape[0], *r, *w.shape[1:]), w.dtype)
            for part, leaves, r in parts for n, w in fast.items()
        ]  # fmt: skip
        for name, x, shape, dtype in (*held, ("position", state.position, (B,), torch.long)):
            if x.shape != shape or x.dtype != dtype:
                raise ShapeError(
                    f"program: state's {name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected {tuple(shape)} "
                    f"and {dtype}. Pass a state of this batch and these heads (state.select, state.fork, state.to)."
                )
        if list(state.anchor) == list(state.registers) == list(fast):
            return state
        return replace(
            state, anchor={n: state.anchor[n] for n in fast}, registers={n: state.registers[n] for n in fast}
        )

    def with_heads(
        self, params: Mapping[str, Tensor], H: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fast and slow parameters with a head axis."""
        own = {**self.parts.fast, **self.parts.slow}
        for name in params:
            if name not in own and name not in self.parts.buffers:
                raise ShapeError(
                    f"program: params names {name!r}; expected some of {sorted(own)}. Use the learner's parameter "
                    "names."
                )

        def lift(name: str, p: Tensor) -> Tensor:
            shape, given = own[name].shape, params.get(name, p)
            if given.shape == shape:
                given = given.expand(H, *shape)
            elif given.shape != (H, *shape):
                raise ShapeError(
                    f"program: params[{name!r}] has shape {tuple(given.shape)}; expected {tuple(shape)} or (heads, "
                    f"...) = {(H, *shape)}. Pass one of the two."
                )
            return _moved(name, given, device, dtype)

        return {n: lift(n, p) for n, p in self.parts.fast.items()}, {n: lift(n, p) for n, p in self.parts.slow.items()}

    def _buffer(self, name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        wanted = self.parts.buffers[name].shape
        if x.shape != wanted:
            raise ShapeError(
                f"program: params[{name!r}] has shape {tuple(x.shape)}; expected the buffer's {tuple(wanted)}, shared "
                "by heads. Pass that."
            )
        return _moved(name, x, device, dtype if x.is_floating_point() else x.dtype)

    def _gates(
        self, gates: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        for name in gates:
            if name not in self.rule.gates:
                raise ShapeError(
                    f"program: gates has {name!r}; expected gates of the rule ({self.rule.name}) = {self.rule.gates}. "
                    "Drop it, or use a rule that has it (momentum and decay: give SGD a nonzero constant)."
                )
        found = {}
        for name in self.rule.gates:
            wanted = (self.chunk,) if name == "offset" else shape
            x = gates.get(name)
            if x is None:
                x = torch.full(wanted, self.rule.default(name), dtype=dtype, device=device)
            x = x.to(dtype) if name == "offset" else _tokens(x, dtype)
            if x.shape != wanted:
                raise ShapeError(
                    f"program: gates[{name!r}] has shape {tuple(x.shape)}; expected {wanted}. Pass one value each."
                )
            found[name] = x
        return found


def expect_kinds(where: str, tensors: Mapping[str, object], state: object, kind: type) -> None:
    """Refuse what is no tensor, and a state of another kind; those that may be left out are None."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (x is None and name in ("mask", "reset", "cu_seqlens", "attention_mask")):
            require(False, where, name, x, "a tensor", "Pass one: torch.as_tensor(...).")
    if not isinstance(state, kind | None):
        require(False, where, "state", state, f"a {kind.__name__}", "Pass what a call has returned.")


def expect_width(v: Tensor, V: int) -> None:
    """Refuse values of another width than the learner's output."""
    if v.shape[3] != V:
        raise ShapeError(f"program: v has width {v.shape[3]}; expected the learner's output V = {V}. Make them agree.")


def _moved(name: str, x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Bring what the user's code holds to where the tokens are."""
    if x.is_meta and device.type != "meta":
        raise ShapeError(
            f"program: {name} is on meta, where it has no numbers; expected q's device = {device}. Give it some first: "
            "module.to_empty(device=...), then module.load_state_dict(...)."
        )
    return x.to(device, dtype or x.dtype)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what is read token by token, unless each backend can widen it while it reads."""
    return x if x.dtype in _narrow and torch.promote_types(x.dtype, dtype) == dtype else x.to(dtype)


_narrow = (torch.bfloat16, torch.float16, torch.float32)

"""One token of each row, wherever it stands in its mini-batch: nothing is read off the card, so steps can be captured.

Legend: B batch, H heads, n blocks (one), W slots of a block (one).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualform.kernels.triton_kernel import Kernel
from dualform.learning.call import Call
from dualform.learning.loop import fixed
from dualform.learning.plan import Input, Plan

_STORE = re.compile(r"^( *)(?=tl\.store\(\w+_after_row)", re.M)


def written_over(kernel: Kernel) -> Kernel:
    """Let a kernel write a state where it was: once every thread has read its own."""
    return replace(kernel, text=_STORE.sub(r"\1tl.debug_barrier()\n\1", kernel.text, count=1))


class Token:
    """A call of one token, as what runs kernels reads calls. ours: may the next state be where this one is?"""

    def __init__(self, plan: Plan, call: Call, ours: bool) -> None:
        assert call.before is not None
        (self.B, _, self.H, _), self.plan, self.call, self.ours = call.q.shape, plan, call, ours
        self.held, self.now = call.held, call.before.position
        self.after = self.held if ours else [torch.empty_like(x) for x in self.held]
        self.o = call.q.new_empty(self.B, 1, self.H, plan.derivation.out_width, dtype=plan.out_dtype(call))
        self.place = self.now + 1  # from 1

    def position(self) -> Tensor:
        """Say where rows stand afterwards."""
        chunk = self.plan.derivation.chunk
        return torch.remainder(self.place, chunk, out=self.now) if self.ours else self.place % chunk

    def tensor(self, role: str, what: Any) -> Tensor:
        """Return what a kernel takes, (n, B, H, ...)."""
        if role == "input":
            return self._input(what)
        return (
            self.o[None].transpose(2, 3) if role == "o" else (self.held if role == "before" else self.after)[what][None]
        )

    def _input(self, x: Input) -> Tensor:
        call, B, H = self.call, self.B, self.H
        if x.over != "block":
            own, lead = fixed(self.plan, call, x), (1, B, H)[: 2 if x.over == "heads" else 3]
            return own.expand(*lead, *own.shape)
        if x.part == "full":
            return (self.place == self.plan.derivation.chunk)[None, :, None].expand(1, B, H)
        if x.name == "offset" and call.offset is not None:
            return call.offset[self.now][None, :, None, None].expand(1, B, H, 1)
        if x.part in ("i", "valid"):
            own = self.place if x.part == "i" else torch.ones_like(self.place)
            return own[None, :, None, None].expand(1, B, H, 1)
        return (call.gates[x.name] if x.part == "gates" else getattr(call, x.part))[None].transpose(2, 3)

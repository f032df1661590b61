"""A call, block after block: forward, and in reverse from kept states.

The backward is the traced vjp, in reverse, from checkpoints every G blocks and the states in between recomputed.

Legend: B batch, T time, H heads, N blocks, n blocks of a piece, G blocks per checkpoint, th anchor, R registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dualform.learning.call import Call
from dualform.learning.grid import Grid, arrange
from dualform.learning.plan import Given, Input, Once, Plan, Rows, Way
from dualform.learning.prepare import Prepare, in_place

# Tokens, over all rows, that one call works on: enough to hide dispatch, few enough to stay in a CPU's cache (LAB.md).
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
# The backward reads the weights of all these blocks, too: so much of the largest leaf.
LEAF_BYTES_AT_ONCE = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}


class GridCall:
    """One call on its grid: what both directions share. blocks: so many are compiled as one function, by `prepare`."""

    def __init__(self, plan: Plan, call: Call, blocks: int | None = None, prepare: Prepare = in_place) -> None:
        self.plan, self.call, d = plan, call, plan.derivation
        self.B, self.T, self.H = call.q.shape[:3]
        self.rows, self.rule, self.L = Rows(self.B, self.H, blocks, prepare), d.inner.rule, len(call.init)
        device = call.q.device
        self.position = call.before.position if call.before else torch.zeros(self.B, dtype=torch.long, device=device)
        marks = (self.position, call.mask, call.reset)
        self.grid: Grid = arrange(self.T, d.chunk, *marks, call.dtype, call.carried, d.block, not call.carried)
        self.blocks = len(self.grid.variants)
        self.same: dict[int, Once] = {}
        widest = max((v.width for v in self.grid.variants), default=1)
        kind = "cpu" if device.type == "cpu" else "cuda"
        by_tokens = TOKENS_AT_ONCE[kind] // (self.B * self.H * widest)
        by_leaves = LEAF_BYTES_AT_ONCE[kind] // max(self.B * x.nbytes for x in call.init.values())
        self.at_once = blocks or _power(by_tokens)
        self.at_once_back = blocks or _power(min(by_tokens, by_leaves))

    def given(self, piece: range, more: Callable[[Input], Tensor]) -> Given:
        """Read a piece's inputs, each once; `more`: those that the grid does not have."""
        found: dict[Input, Tensor] = {}

        def get(x: Input) -> Tensor:
            if x.over != "block":
                return self.fixed(x).contiguous()
            if x not in found:
                own = self.of_blocks(x, piece)
                found[x] = more(x) if own is None else own.flatten(0, 2).contiguous()
                if found[x].is_floating_point():
                    found[x] = found[x].to(self.call.dtype)
            return found[x]

        return get

    def fixed(self, x: Input) -> Tensor:
        return fixed(self.plan, self.call, x)

    def of_blocks(self, x: Input, piece: range) -> Tensor | None:
        """Read the blocks of a piece, (n, B, H, ...); None for what the grid does not have."""
        g, c = self.grid, self.call
        if x.part in ("q", "k", "v"):
            return g.take(getattr(c, x.part), piece, fill=True)
        if x.part == "gates" and x.name != "offset":
            return g.take(c.gates[x.name], piece, fill=True)  # a rule may be singular at 0, too
        if x.part not in ("i", "valid", "full", "opens", "gates"):
            return None
        W = g.variants[piece.start].width
        if x.part == "gates":
            assert c.offset is not None
            if g.variants[piece.start].completes(self.plan.derivation.chunk):
                return c.offset.expand(len(piece), self.B, self.H, W)
            mark = c.offset[g.i[piece.start : piece.stop, :, :W].long() - 1]
        else:
            mark = getattr(g, x.part)[piece.start : piece.stop]
            mark = mark[:, :, :W] if x.part in ("i", "valid") else mark
        return mark[:, :, None].expand(len(piece), self.B, self.H, *mark.shape[2:])

    def once(self, way: Way) -> Once:
        """Return what was computed for a direction that is the same for all blocks."""
        return self.same.setdefault(id(way), {})

    def known(self, n: int) -> bool:
        """Are block n's registers at their start?"""
        v = self.grid.variants[n]
        return v.fresh and all(self.rule.resets) and not v.opens

    def returns_registers(self, n: int) -> bool:
        return not (self.grid.variants[n].completes(self.plan.derivation.chunk) and all(self.rule.resets))

    def start(self, th: Sequence[Tensor]) -> list[Tensor]:
        """Registers at their start, one row each."""
        r = len(self.rule.start)
        if not any(self.rule.start):
            return [w.new_zeros(w.shape[0], r, *w.shape[1:]) for w in th]
        return [torch.stack([s * w for s in self.rule.start], 1) for w in th]

    def enter(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """Give block n the state that it takes: with registers or without."""
        if self.known(n):
            return state[: self.L]
        return state if len(state) > self.L else state + self.start(state)

    def turn(self, n: int, state: list[Tensor]) -> list[Tensor]:
        """Turn the gradient of the state that block n + 1 took into that of the state that block n returned."""
        L = self.L
        dth, dR = state[:L], state[L:]
        if self.returns_registers(n):
            r = len(self.rule.start)
            return dth + (dR or [w.new_zeros(w.shape[0], r, *w.shape[1:]) for w in dth])
        scaled = [(k, s) for k, s in enumerate(self.rule.start) if s and dR]
        return [sum((s * r[:, k] for k, s in scaled), w) for w, r in zip(dth, dR or dth, strict=True)]

    def new_output(self) -> Tensor:
        """Make what `grid.put` fills."""
        like = self.call.q.new_empty(0, dtype=self.plan.out_dtype(self.call))
        return self.grid.new(like, self.B, self.T, self.H, self.plan.derivation.out_width)

    def held(self) -> list[Tensor]:
        """The state of the call, by rows; without registers at their start where no state was given."""
        own = self.call.held if self.call.carried else [x.expand(self.B, *x.shape) for x in self.call.init.values()]
        return [x.flatten(0, 1).contiguous() for x in own]

    def new_checkpoints(self, state: list[Tensor], count: int) -> list[Tensor]:
        """Make room for so many kept states."""
        n = checkpointed(self.plan, self.call, count)
        return [x.new_empty(count, *x.shape) for x in (state if n <= len(state) else self.whole(state))[:n]]

    def rowed(self, x: Tensor) -> Tensor:
        """Split rows: (P, ...) -> (B, H, ...)."""
        return x.unflatten(0, (self.B, self.H))

    def whole(self, state: list[Tensor]) -> list[Tensor]:
        return state if len(state) > self.L else state + self.start(state)

    def again(self, like: Tensor) -> Tensor:
        """Which rows of a state (B, ...) start anew in a call without a token?"""
        starts = self.position.new_zeros(self.B, 1) if self.call.reset is None else self.call.reset
        return starts.any(1).reshape(self.B, *[1] * (like.ndim - 1))

    def idle(self) -> list[Tensor]:
        """The state after a call without a token, where the learner never runs."""
        c = self.call
        starts = [torch.stack([s * x for s in self.rule.start], 1) for x in c.init.values()]
        held = zip((*c.init.values(), *starts), c.held, strict=True)
        return [torch.where(self.again(x), new, x) for new, x in held]


def fixed(plan: Plan, call: Call, x: Input) -> Tensor:
    """Read what all blocks share: (H, ...), or as it is."""
    own = call.slow if x.part == "slow" else call.init
    return own[x.name] if x.name in own else plan.derivation.constants[x.name].to(call.q.device)


def _power(n: int) -> int:
    """Return the largest power of two up to n, 1 at least."""
    return 1 << (max(1, n).bit_length() - 1)


def forward(run: GridCall, checkpoints: int) -> list[Tensor]:
    """Return [o, *anchor, *registers, position, *checkpoints of anchor, *of registers]."""
    state, plan = run.held(), run.plan
    saved = run.new_checkpoints(state, checkpoints)
    G = -(-run.blocks // checkpoints) if checkpoints else run.blocks + 1
    o = run.new_output()

    def visit(n: int, state: list[Tensor]) -> list[Tensor]:
        if checkpoints and n % G == 0:
            held = state if len(saved) <= len(state) else run.whole(state)
            for buffer, x in zip(saved, held, strict=False):
                buffer[n // G] = x
        return run.enter(n, state)

    for piece in run.grid.pieces(run.at_once):
        way = plan.way(run.grid.variants[piece.start], "forward")
        state, (y,), _ = way.run(piece, run.given(piece, _none), state, visit, run.rows, run.once(way))
        run.grid.put(o, piece, y.unflatten(0, (len(piece), run.B, run.H)))
    after = [run.rowed(x) for x in run.whole(state)] if run.blocks else run.idle()
    return [run.grid.done(o), *after, run.grid.position, *(x.unflatten(1, (run.B, run.H)) for x in saved)]


def run_visible(plan: Plan, call: Call) -> list[Tensor]:
    """Return [o, *anchor, *registers, position] by ops that autograd and every transform see, one by one."""
    with torch.autocast(call.q.device.type, enabled=False):
        run = GridCall(plan, call)
        if not run.blocks:
            o = call.q.new_zeros(run.B, run.T, run.H, plan.derivation.out_width, dtype=plan.out_dtype(call))
            return [o, *run.idle(), run.grid.position]
        state, pieces, outputs = run.held(), run.grid.pieces(run.at_once), []
        for piece in pieces:
            way = plan.way(run.grid.variants[piece.start], "visible")
            state, (y,), _ = way.run(piece, run.given(piece, _none), state, run.enter, run.rows, run.once(way))
            outputs.append(y.unflatten(0, (len(piece), run.B, run.H)))
        o = run.grid.join(pieces, outputs, run.T).to(plan.out_dtype(call))
        return [o, *map(run.rowed, run.whole(state)), run.grid.position]


def checkpointed(plan: Plan, call: Call, count: int) -> int:
    """Count the tensors of a checkpoint, if any: anchors alone where blocks are certain to start their registers."""
    d, L = plan.derivation, len(call.init)
    if not count:
        return 0
    known = all(d.inner.rule.resets) and d.block is None
    return L if known and not call.carried and call.mask is None and call.reset is None else 2 * L


def _none(x: Input) -> Tensor:
    raise AssertionError(x)


class Gradients:
    """Gradients of a call's tensors, filled in piece by piece."""

    def __init__(self, run: GridCall) -> None:
        call, g = run.call, run.grid
        self.run = run
        tokens = {"q": call.q, "k": call.k, "v": call.v} | call.gates
        self.tokens = {n: g.new(x, *x.shape) for n, x in tokens.items()}
        self.sums: dict[tuple[str, str], Tensor] = {}

    def add(self, x: Input, piece: range, value: Tensor) -> None:
        """Add the gradient of an input of some blocks: (n, B, H, ...), or already summed over the blocks."""
        g, variant = self.run.grid, self.run.grid.variants[piece.start]
        if x.part in ("slow", "init"):
            self._sum(x.part, x.name, value.sum((0, 1, 2) if x.over == "shared" else (0, 1)))
        elif x.name == "offset" and variant.completes(self.run.plan.derivation.chunk):
            self._sum("gates", "offset", value.sum((0, 1, 2)))
        elif x.name == "offset":
            blocks, W = slice(piece.start, piece.stop), variant.width
            index, keep = g.i[blocks, :, :W].long() - 1, g.valid[blocks, :, :W]
            # A block's valid slots have places of their own: no sum in any order, as index_add_ has on a card.
            b = self.run.plan.derivation.chunk
            own = value.new_zeros(*index.shape[:2], b + 1).scatter_(2, torch.where(keep > 0, index, b), value.sum(2))
            self._sum("gates", "offset", own[..., :b].sum((0, 1)))
        elif x.part in ("q", "k", "v", "gates"):
            g.put(self.tokens[x.name], piece, value)

    def _sum(self, part: str, name: str, value: Tensor) -> None:
        found = self.sums.get((part, name))
        self.sums[part, name] = value if found is None else found.add_(value)

    def _start(self, th: Sequence[Tensor], R: Sequence[Tensor]) -> None:
        """Add the gradient of rows that start at `init`: (B, H, ...), registers (B, H, r, ...) or none."""
        for k, name in enumerate(self.run.call.init):
            scaled = [s * R[k][:, :, j] for j, s in enumerate(self.run.rule.start) if s and R]
            self._sum("init", name, sum(scaled, th[k]).sum(0))

    def idle(self, state: list[Tensor]) -> list[Tensor]:
        """Return what `flat` does for a call without a token; state: the gradient of the one after it, (B, H, ...)."""
        run, L = self.run, self.run.L
        started, held = zip(*((torch.where(a := run.again(x), x, 0), torch.where(a, 0, x)) for x in state), strict=True)
        self._start(started[:L], started[L:])
        return self.flat([x.flatten(0, 1) for x in held])

    def flat(self, state: list[Tensor]) -> list[Tensor]:
        """Return the gradient of every floating tensor of the call, in order; state: of the one it began with."""
        run, call, L = self.run, self.run.call, self.run.L
        if call.carried and len(state) == L:
            state = state + [w.new_zeros(w.shape[0], len(run.rule.start), *w.shape[1:]) for w in state]
        state = [x.unflatten(0, (run.B, run.H)) for x in state]
        if not call.carried:
            self._start(state[:L], state[L:])
        q, k, v, *gates = (run.grid.done(x) for x in self.tokens.values())

        def summed(part: str, name: str, x: Tensor) -> Tensor:
            found = self.sums.get((part, name))
            return torch.zeros_like(x) if found is None else found.to(x.dtype)

        slow, init = ({n: summed(part, n, x) for n, x in getattr(call, part).items()} for part in ("slow", "init"))
        gates, after = dict(zip(call.gates, gates, strict=True)), call.before and call.after(state, run.position)
        offset = None if call.offset is None else summed("gates", "offset", call.offset)
        tree = call._replace(q=q, k=k, v=v, gates=gates, slow=slow, before=after, init=init, offset=offset)
        return [x for x, y in zip(tree.flat(), call.flat(), strict=True) if y.is_floating_point()]


def backward(run: GridCall, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int) -> list[Tensor]:
    """Return the gradient of every floating tensor of the call, in order."""
    if not run.blocks:
        return Gradients(run).idle(cotangents[1:])
    g, plan = run.grid, run.plan
    if not checkpoints:  # none was kept: the state that the call began with is one
        saved, checkpoints = [x[None] for x in run.call.held], 1
    G = -(-run.blocks // checkpoints)
    do, state = cotangents[0], [x.flatten(0, 1).contiguous() for x in cotangents[1:]]
    saved = [x.flatten(1, 2) for x in saved]
    gradients = Gradients(run)

    states: dict[int, list[Tensor]] = {}
    stacks: dict[range, list[Tensor] | None] = {}

    def note(n: int, state: list[Tensor]) -> list[Tensor]:
        states[n] = run.enter(n, state)
        return states[n]

    span = G * max(1, run.at_once_back // G)
    for start in reversed(range(0, run.blocks, span)):
        stop = min(start + span, run.blocks)
        states.clear()
        stacks.clear()
        pieces = g.pieces(run.at_once_back, start, stop)
        for group in range(start, stop, G) if G > 1 else ():
            held = [x[group // G] for x in saved]
            for piece in g.pieces(run.at_once_back, group, min(group + G, stop)):
                if len(piece) == 1 and piece.stop in (group + G, stop):
                    note(piece.start, held)  # what comes after it is known
                else:
                    way, given = plan.way(g.variants[piece.start], "advance"), run.given(piece, _none)
                    held, _, stacks[piece] = way.run(piece, given, held, note, run.rows, run.once(way))
        if G == 1:
            stacks |= {piece: [x[piece.start : piece.stop].flatten(0, 1) for x in saved] for piece in pieces}
        for piece in reversed(pieces):
            variant = g.variants[piece.start]
            way, wants = plan.way(variant, "reverse"), plan.step(variant).wants
            inputs = way.inputs[: len(wants)]
            order = {x: k for k, x in enumerate(x for x in inputs if x.part in ("th", "R"))}
            stack = stacks.get(piece)

            def more(
                x: Input, piece: range = piece, order: dict[Input, int] = order, stack: list[Tensor] | None = stack
            ) -> Tensor:
                if x.part == "cotangent":
                    return g.take(do, piece).flatten(0, 2)
                return torch.cat([states[n][order[x]] for n in piece]) if stack is None else stack[order[x]]

            state, found, _ = way.run(piece[::-1], run.given(piece, more), state, run.turn, run.rows, run.once(way))
            rest = [x for x, w in zip(inputs, wants, strict=True) if w and x.part not in ("th", "R")]
            for x, value in zip(rest, found, strict=True):
                gradients.add(x, piece, value.unflatten(0, (len(piece), run.B, run.H)))
    return gradients.flat(state)

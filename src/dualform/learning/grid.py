"""Where each token goes: a row's valid tokens, cut into mini-batches and these into blocks of slots.

A block holds tokens of one mini-batch, left-aligned; empty slots are identity updates. Padding vanishes, a reset opens
a new mini-batch, and a call may begin and end anywhere inside one, so every split of a sequence is the same
computation.

Legend: B batch, T time, N blocks, W slots of a block, b the mini-batch (chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.learning.transforms import is_known, lasting
from dualform.shapes import ShapeError


class Variant(NamedTuple):
    """What is known about a block before it runs; each variant is its own traced program."""

    width: int  # slots
    fresh: bool  # every row begins a mini-batch here: positions are 1..W, resetting registers are at their start
    dense: bool  # every slot holds a token
    opens: bool  # some row starts a document here

    def completes(self, chunk: int) -> bool:
        """Is it certain that every row's mini-batch ends with this block?"""
        return self.fresh and self.dense and self.width == chunk


@dataclass(frozen=True)
class Grid:
    """A layout of B rows of T tokens: per block its variant, and per row positions, validity, completion, resets."""

    variants: list[Variant]
    spans: list[tuple[int, int]] | None  # every row alike: block n is these tokens
    index: Tensor | None  # (N, B, W) token of each slot, T where empty
    stand_in: tuple[Tensor, Tensor] | None  # (B,) each: row and place of a valid token, for an empty slot to read
    i: Tensor  # (N, B, W) position in the mini-batch, from 1
    valid: Tensor  # (N, B, W)
    full: Tensor  # (N, B)
    opens: Tensor | None  # (N, B)
    position: Tensor  # (B,) after the call
    some: Tensor | None = None  # (): is any token valid? None: so it is, or there is no block

    def pieces(self, most: int, start: int = 0, end: int | None = None) -> list[range]:
        """Cut blocks start ... end into stretches of one variant: `most` at once, then ever smaller powers of two."""
        found, end = [], len(self.variants) if end is None else end
        while start < end:
            stop = start + 1
            while stop < end and self.variants[stop] == self.variants[start]:
                stop += 1
            if self.spans is not None and not self.variants[start].dense:
                stop = start + 1
            while start < stop:
                size = min(most, 1 << ((stop - start).bit_length() - 1))
                found.append(range(start, start + size))
                start += size
        return found

    def take(self, x: Tensor, piece: range, fill: bool = False) -> Tensor:
        """Read the blocks of a piece from token-major x (B, T, H, ...): (n, B, H, W, ...), a view where rows are alike.

        fill: empty slots read a token of the row instead of zero.
        A learner may have no derivative at zero (x / |x|), and a masked NaN is a NaN.
        """
        n, W = len(piece), self.variants[piece.start].width
        if self.spans is not None:
            start, stop = self.spans[piece.start][0], self.spans[piece.stop - 1][1]
            part, missing = x[:, start:stop], n * W - (stop - start)
            if missing:
                shape = (x.shape[0], missing, *x.shape[2:])
                part = torch.cat([part, part[:, :1].expand(shape) if fill else part.new_zeros(shape)], 1)
            part = part.unflatten(1, (n, W)).transpose(0, 1)
        else:
            assert self.index is not None and self.stand_in is not None
            index, (other, place) = self.index[piece.start : piece.stop], self.stand_in
            empty, rows = index == x.shape[1], torch.arange(x.shape[0], device=x.device)[:, None]
            part = x[torch.where(empty, other[:, None], rows), torch.where(empty, place[:, None], index)]
            if not fill:
                part = part.masked_fill(empty.reshape(*empty.shape, *[1] * (x.ndim - 2)), 0)
            elif self.some is not None:
                part = torch.where(
                    self.some, part, torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)
                )
        return part.transpose(2, 3)  # (n, B, W, H, ...) -> (n, B, H, W, ...)

    def new(self, like: Tensor, *shape: int) -> Tensor:
        """Make a token-major result (B, T, ...) for `put`: zero where there will be no token."""
        if self.spans is not None:
            return like.new_empty(shape)
        return like.new_zeros(shape[0], shape[1] + 1, *shape[2:])  # empty slots write to the last token

    def place(self, out: Tensor, piece: range) -> Tensor | None:
        """View the blocks of a piece in what `new` made, (n, B, H, W, ...), where they are all there is in it."""
        n, W = len(piece), self.variants[piece.start].width
        if self.spans is None:
            return None
        start, stop = self.spans[piece.start][0], self.spans[piece.stop - 1][1]
        whole = n * W == stop - start
        return out[:, start:stop].unflatten(1, (n, W)).transpose(0, 1).transpose(2, 3) if whole else None

    def put(self, out: Tensor, piece: range, value: Tensor) -> None:
        """Write the blocks of a piece, (n, B, H, W, ...), into what `new` made."""
        target = self.place(out, piece)
        if target is not None:
            target.copy_(value)
            return
        value = value.transpose(2, 3)  # (n, B, W, H, ...)
        if self.spans is not None:
            start, stop = self.spans[piece.start][0], self.spans[piece.stop - 1][1]
            out[:, start:stop] = value[0, :, : stop - start]
        else:
            assert self.index is not None
            rows = torch.arange(out.shape[0], device=out.device)[:, None]
            out[rows, self.index[piece.start : piece.stop]] = value.to(out.dtype)

    def join(self, pieces: Sequence[range], values: Sequence[Tensor], T: int) -> Tensor:
        """Make the token-major result of all blocks, piece after piece, as `put` would, without writing to anything."""
        # (n, B, H, W, ...) -> (B, n W, H, ...)
        rows_first = [x.transpose(2, 3).transpose(0, 1).flatten(1, 2) for x in values]
        if self.spans is not None:
            sizes = [self.spans[p.stop - 1][1] - self.spans[p.start][0] for p in pieces]
            return torch.cat([x[:, :n] for x, n in zip(rows_first, sizes, strict=True)], 1)
        assert self.index is not None
        flat, token = torch.cat(rows_first, 1), self.index.transpose(0, 1).flatten(1)
        B, slots = token.shape
        places = torch.arange(slots, device=token.device).expand(B, slots)
        slot = torch.full((B, T + 1), -1, device=token.device).scatter(1, token, places)[:, :T]
        found = flat[torch.arange(B, device=token.device)[:, None], slot.clamp(min=0)]
        return found.masked_fill((slot < 0).reshape(B, T, *[1] * (found.ndim - 2)), 0)

    def done(self, out: Tensor) -> Tensor:
        """Return a result that all pieces were put into."""
        return out if self.spans is not None else out[:, :-1].contiguous()


def bucket(width: int, chunk: int) -> int:
    """Round a block's width up to a power of two (at most the mini-batch), so that few programs are traced."""
    return min(chunk, 1 << (width - 1).bit_length())


def variants_of(
    T: int | None, chunk: int, block: int | None, carried: bool, masked: bool, resets: bool
) -> list[Variant]:
    """List every kind of block that calls alike may meet: of length T, None for any; with a state, a mask, resets."""
    b, apart = min(chunk, block or chunk), carried or masked or resets
    if T is not None and not apart:
        grid = _sliced(T, chunk, 0, 1, torch.float32, torch.device("cpu"), False, b)
        return list(dict.fromkeys(grid.variants))
    most = chunk if T is None else min(T, chunk)
    found: dict[Variant, None] = {}
    for n in range(1, min(b, most) + 1) if not (masked or resets) else ():
        for fresh in (True, False) if carried or b < chunk else (True,):
            found[Variant(bucket(n, b), fresh, bucket(n, b) == n, False)] = None
    for n in range(1, most + 1) if apart else ():
        W = bucket(n, chunk)
        found |= dict.fromkeys([Variant(W, True, True, False), Variant(W, False, False, False)])
        found |= {Variant(W, False, False, True): None} if resets else {}
    return list(found)


def arrange(
    T: int, chunk: int, position: Tensor, mask: Tensor | None, reset: Tensor | None, dtype: torch.dtype,
    carried: bool = True, block: int | None = None, begins: bool = False,
) -> Grid:  # fmt: skip
    """Lay out a call: rows that stand alike are cut by slicing, others go through one gather.

    `begins`: every position is 0.

    `block`: at most so many tokens at once, where rows stand alike; it never changes a result.
    `carried`: the caller gave a state, whose registers count (and have gradients) even where a mini-batch begins.
    """
    known = all(x is None or is_known(x) for x in (position, mask, reset))
    plain = mask is None and reset is None
    if not known and (carried or not plain):
        return _token_by_token(T, chunk, position, mask, reset, dtype)
    read = known and not begins  # a card would have to be waited for
    first = int(position[0]) if read else 0
    alike = plain and (not read or bool((position == first).all()))
    if alike:
        kind = (len(position), dtype, position.device)
        grid = _sliced(T, chunk, first, *kind, carried, min(chunk, block or chunk))
        return replace(grid, position=(position + T) % chunk)
    return _gathered(T, chunk, position, mask, reset, dtype, carried)


def places(T: int, position: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give each token its document in this call (0 continues) and its position there, from 0: (B, T) each.

    A padding token has the position of the valid token before it. position (B,): tokens of document 0 read before.
    """
    B, device = position.shape[0], position.device
    if mask is None and reset is None:
        place = position[:, None] + torch.arange(T, device=device)
        return torch.zeros_like(place), place
    valid = torch.ones(B, T, dtype=torch.long, device=device) if mask is None else mask.long()
    rank = valid.cumsum(1)
    if reset is None:
        return torch.zeros_like(rank), rank - 1 + position[:, None]
    segment = reset.long().cumsum(1)
    first = torch.where(reset, rank - valid, 0).cummax(1).values
    return segment, rank - 1 - first + torch.where(segment == 0, position[:, None], 0)


def starts_by_lengths(name: str, ends: Tensor, B: int, T: int) -> Tensor:
    """Return where documents of one packed row start, (1, T) bool, from its cumulative lengths 0, ..., T (n + 1,).

    The first goes on from what was read before; one of no tokens between others leaves no trace. name: for errors.
    """
    if B != 1 or ends.ndim != 1 or ends.numel() < 2 or ends.dtype not in (torch.int, torch.long):
        raise ShapeError(
            f"{name} has shape {tuple(ends.shape)} and dtype {ends.dtype} with batch = {B}; expected (documents + 1,) "
            "of torch.int32 or torch.int64 and one packed row, batch = 1. Pass reset (batch, tokens) for more rows."
        )
    if is_known(ends) and (int(ends[0]) != 0 or int(ends[-1]) != T or bool((ends.diff() < 0).any())):
        raise ShapeError(
            f"{name} is {ends.tolist()}; expected lengths that grow from 0 to the number of tokens = {T}. Pass the "
            "cumulative lengths of this row's documents."
        )
    return torch.zeros(T + 1, dtype=torch.bool, device=ends.device).index_fill(0, ends[1:-1].long(), True)[None, :T]


@lru_cache(maxsize=16)
@lasting()
def _sliced(
    T: int, chunk: int, first: int, B: int, dtype: torch.dtype, device: torch.device, carried: bool, block: int
) -> Grid:
    """Lay out rows that stand alike; the position after the call is the caller's to fill in."""
    edges = [0, *range(chunk - first, T, chunk), T]
    spans = [
        (cut, min(cut + block, stop))
        for start, stop in zip(edges, edges[1:], strict=False)
        for cut in range(start, stop, block)
    ]
    begins = [(first + start) % chunk for start, _ in spans]
    sizes = [stop - start for start, stop in spans]
    widths = {size: bucket(size, block) for size in {*sizes}}
    variants = [
        Variant(widths[size], begin == 0 and (n > 0 or not carried), widths[size] == size, False)
        for n, (begin, size) in enumerate(zip(begins, sizes, strict=True))
    ]
    slot = torch.arange(max(widths.values()), device=device)
    begin, size = (torch.tensor(x, device=device)[:, None] for x in (begins, sizes))
    i = (begin + 1 + slot).clamp(max=chunk).to(dtype)  # empty slots stay in the mini-batch
    valid = (slot < size).to(dtype)
    return Grid(
        variants, spans, None, None, i[:, None].expand(-1, B, -1), valid[:, None].expand(-1, B, -1),
        (begin + size == chunk).expand(-1, B), None, torch.empty(0),
    )  # fmt: skip


def _gathered(
    T: int, chunk: int, position: Tensor, mask: Tensor | None, reset: Tensor | None, dtype: torch.dtype, held: bool
) -> Grid:
    B, device = position.shape[0], position.device
    true = torch.ones(B, T, dtype=torch.bool, device=device)
    mask = true if mask is None else mask
    reset = ~true if reset is None else reset
    if not bool(mask.any()):
        none = torch.empty(0)
        return Grid([], None, None, None, none, none, none, None, torch.where(reset.any(1), 0, position))
    rows = torch.arange(B, device=device)[:, None].expand(B, T)
    segment, place = places(T, position, mask, reset)
    counts = torch.zeros(B, T + 1, dtype=torch.long, device=device).index_put(
        (rows, segment), mask.long(), accumulate=True
    )
    carried = torch.zeros_like(counts)
    carried[:, 0] = position
    exists = torch.zeros_like(counts).scatter(1, segment, 1)  # a document that ends at once still takes a block
    exists[:, 0] = 0
    blocks = torch.maximum((carried + counts + chunk - 1) // chunk * (counts > 0), exists)
    offset = blocks.cumsum(1) - blocks
    first = offset.gather(1, segment)
    n, within = first + place // chunk, place % chunk
    slot = within - torch.where(place < chunk, carried.gather(1, segment), 0)
    N = max(1, int(blocks.sum(1).max()))
    W = bucket(int(slot[mask].max()) + 1, chunk)
    where = (n[mask], rows[mask], slot[mask])

    def scatter(values: Tensor, empty: float, dtype: torch.dtype) -> Tensor:
        return torch.full((N, B, W), empty, dtype=dtype, device=device).index_put(where, values[mask].to(dtype))

    tokens = torch.arange(T, device=device).expand(B, T)
    valid = scatter(true, 0, dtype)
    ends = mask & (within == chunk - 1)
    full = torch.zeros(N, B, dtype=torch.bool, device=device)
    full[n[ends], rows[ends]] = True
    opens = torch.zeros_like(full)
    opens[first[reset], rows[reset]] = True
    first_begins = (position == 0) & (not held)
    begins = opens | torch.cat([first_begins[None], full[:-1]])
    steady = begins.all(1) & valid.bool().all(2).all(1) & ~opens.any(1)  # everything else is the general program
    resets = bool(opens.any())
    variants = [Variant(W, True, True, False) if bool(s) else Variant(W, False, False, resets) for s in steady]
    last = segment[:, -1:]
    after = ((carried + counts).gather(1, last) % chunk)[:, 0]
    return Grid(
        variants, None, scatter(tokens, T, torch.long), _stand_ins(mask), scatter(within + 1, 1, dtype), valid, full,
        opens if resets else None, after,
    )  # fmt: skip


def _stand_ins(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find, for each row, a valid token: its own first one, or that of a row that has one."""
    first, has = mask.long().argmax(1), mask.any(1)
    other = has.long().argmax(0, keepdim=True)
    return torch.where(has, torch.arange(len(has), device=mask.device), other), torch.where(has, first, first[other])


def _token_by_token(
    T: int, chunk: int, position: Tensor, mask: Tensor | None, reset: Tensor | None, dtype: torch.dtype
) -> Grid:
    """Lay out rows of which nothing is known, a token a block: right for every mask, reset and position, and slower."""
    B, device = position.shape[0], position.device
    true = torch.ones(B, T, dtype=torch.bool, device=device)
    mask = true if mask is None else mask
    _, place = places(T, position, mask, reset)
    within = place % chunk
    index = torch.where(mask, torch.arange(T, device=device), T)
    i, valid, full = (within + 1).to(dtype), mask.to(dtype), mask & (within == chunk - 1)
    after = (place[:, -1] + 1) % chunk
    return Grid(
        [Variant(1, fresh=False, dense=False, opens=reset is not None)] * T, None, index.T[..., None], _stand_ins(mask),
        i.T[..., None], valid.T[..., None], full.T, None if reset is None else reset.T, after, mask.any(),
    )  # fmt: skip

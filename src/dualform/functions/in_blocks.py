"""The functions of every attribute, evaluated for a block of rows at a time: beside features almost nothing is held.

Written out op by op, a basis keeps each step of its arithmetic for the backward pass, and lays its k functions side by
side in one more copy. Here a block stays in the cache, each function is written where it belongs, and the backward pass
evaluates the block again, or its derivative where a family says it. Whatever looks on (a trace, a transform, a
compiler) sees the definition, op by op.

Legend: x (R, m) rows, k functions, axis -1 for features (R, m, k), -2 for (R, k, m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dualform.graphs.this_thread import compiles, records

# Below so many features the ops' own cost decides, and the definition is as good.
least_features = 2**16
# Numbers a block holds per tensor, at most and at least: small beside the cache, large beside the cost of an op.
most_numbers, least_numbers = 2**17, 2**12


class Local(NamedTuple):
    """Those of k functions that are not 0: row r of values (d + 1, ...) is function first + r, if there is one."""

    values: Tensor
    first: Tensor  # whole numbers in x's dtype; what is far off, or NaN, stands for no function
    total: int  # k

    def joined(self, axis: int) -> Tensor:
        width, k = len(self.values), self.total
        # width - 1 slots at either end hold functions that do not exist; what is far off goes to `width` slots behind
        slot = torch.where((self.first > -width) & (self.first < k), self.first, k + width - 1) + (width - 1)
        steps = torch.arange(width, dtype=slot.dtype, device=slot.device).reshape(-1, *[1] * slot.ndim)
        empty = (self.first * 0).unsqueeze(0).expand(k + 3 * width - 2, *self.first.shape)  # NaN stays NaN
        found = empty.scatter(0, (slot + steps).long(), self.values)[width - 1 : width - 1 + k]
        return found.movedim(0, axis)

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give each row of values, and where its numbers lie among numbers (..., k)."""
        width, k = len(self.values), self.total
        starts = torch.arange(0, k * self.first.numel(), k)
        low, high = self.first.aminmax()
        if low >= 0 and high <= k - width:  # all exist
            place = self.first.flatten().long().add_(starts)
            for values in self.values:
                yield values.flatten(), place
                place.add_(1)
            return
        for r, values in enumerate(self.values):
            column = self.first.flatten() + r
            exists = (column >= 0) & (column < k)
            yield values.flatten() * exists, torch.where(exists, column, 0).long().add_(starts)

    def write(self, into: Tensor) -> None:
        """Fill into (..., k) as `joined(-1)` is, without slots."""
        flat = into.zero_().view(-1)
        for values, place in self._rows():
            flat.index_add_(0, place, values)
        unknown = self.first.isnan()
        if unknown.any():
            into[unknown] = float("nan")

    def against(self, g: Tensor) -> Tensor:
        """Sum values times g (..., k) over the functions."""
        flat, found = g.reshape(-1), torch.zeros_like(self.first).flatten()
        for values, place in self._rows():
            found.addcmul_(flat.index_select(0, place), values)
        return found.view_as(self.first)


Values = Iterable[Tensor] | Tensor | Local
Basis = Callable[[Tensor, int], Values]  # x, the axis where a tensor (not a sequence) has its functions


def joined(values: Values, axis: int) -> Tensor:
    """Lay the functions that a basis gives along one axis."""
    if isinstance(values, Local):
        return values.joined(axis)
    return values if isinstance(values, Tensor) else torch.stack(tuple(values), axis)


class Pull(NamedTuple):
    """A family's own backward pass: run(x, y, g, axis) -> gx for a block of rows; y: its features, if kept."""

    run: Callable[[Tensor, Any, Tensor, int], Tensor]
    keeps_features: bool = False
    # How many tensors as wide as all the features basis and run hold at once; 0: they go one function at a time.
    width: int = 0


def by_slopes(slopes: Basis) -> Pull:
    """Make the backward pass of functions whose derivatives, as a basis gives functions, are known."""

    def run(x: Tensor, y: None, g: Tensor, axis: int) -> Tensor:
        values = slopes(x, axis)
        if isinstance(values, Local):
            return values.against(g)
        found = torch.zeros_like(x)
        for slope, weight in zip(values, g.unbind(axis), strict=True):
            found.addcmul_(slope, weight)
        return found

    return Pull(run)


def evaluate(x: Tensor, basis: Basis, pull: Pull | None, k: int, axis: int) -> Tensor:
    """Put phi_1(x) .. phi_k(x) on a new axis of x (..., m): in blocks where that pays and nothing looks on."""
    count = x.numel() * k if is_unobserved(x) and x.device.type == "cpu" else -1
    is_wide = pull is None or pull.width > 0
    if is_wide and not (x.requires_grad and torch.is_grad_enabled()):
        count //= 16  # nothing is kept for a backward pass, and a copy would be all that a small block adds
    if count >= least_features:
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        found: Tensor = _Blocks.apply(rows, basis, pull or _again(basis), k, axis)
        return found if x.ndim == 2 else found.unflatten(0, x.shape[:-1])
    return joined(basis(x, axis), axis)


def _again(basis: Basis) -> Pull:
    """Evaluate the block again and differentiate that."""

    def run(x: Tensor, y: None, g: Tensor, axis: int) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = joined(basis(x, axis), axis)
        return torch.autograd.grad(found, x, g)[0]

    return Pull(run, width=8)


def is_unobserved(x: Tensor) -> bool:
    """Do plain numbers run here, op by op: no trace, no transform, no mode, no subclass?"""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (an extension module that the stubs lack)
    return not (
        type(x) not in (Tensor, nn.Parameter)
        or compiles()
        or functorch.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack()
        or records()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, basis: Basis, pull: Pull, k: int, axis: int
    ) -> Tensor:
        numbers = 3 * most_numbers // pull.width // k if pull.width else x.numel()
        found = _features(x, basis, numbers, k, axis)
        ctx.save_for_backward(x, found if pull.keeps_features else None)
        ctx.given = basis, pull, k, axis
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y = ctx.saved_tensors
        basis, pull, k, axis = ctx.given
        again = torch.is_grad_enabled()  # to be differentiated once more
        is_batched = "Batched" in str(torch._C._dispatch_keys(g))  # grad(is_grads_batched=True)
        if again or is_batched or not is_unobserved(g):
            with torch.enable_grad():
                x = x if again else x.detach().requires_grad_()
                gx = torch.autograd.grad(joined(basis(x, axis), axis), x, g, create_graph=again)[0]
            return gx, None, None, None, None
        found = torch.empty_like(x)
        size = _size(x, most_numbers // pull.width // k if pull.width else x.numel() // 4)
        ys = [None] * len(x) if y is None else y.split(size)
        for rows, features, weights, into in zip(x.split(size), ys, g.split(size), found.split(size), strict=False):
            into.copy_(pull.run(rows, features, weights, axis))
        return found, None, None, None, None


def _size(x: Tensor, numbers: int) -> int:
    """How many rows make a block of so many attributes."""
    return max(1, max(numbers, least_numbers) * torch.get_num_threads() // x.shape[-1])


def _features(x: Tensor, basis: Basis, numbers: int, k: int, axis: int) -> Tensor:
    found = x.new_empty((*x.shape, k) if axis == -1 else (len(x), k, x.shape[-1]))
    size = _size(x, numbers)
    for rows, into in zip(x.split(size), found.split(size), strict=True):
        values = basis(rows, axis)
        if isinstance(values, Local):
            values.write(into)
        elif isinstance(values, Tensor):
            into.copy_(values)
        else:
            for value, place in zip(values, into.unbind(axis), strict=True):
                place.copy_(value)  # each in its place: half the time of a stack
    return found

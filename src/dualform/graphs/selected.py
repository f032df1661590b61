"""What a mask picks whose values no trace knows: h[h < 0], as many entries as there will be. They stay where they are.

h[m] *= 0.1        ->    picked = where(m, h, 1/2) * 0.1;  h = where(m, picked, h)

Every op runs as if all had been picked, which is the same for those that are if it keeps them apart, as `proved` proves
at a made-up number of them; what asks how many there are is refused. What stands where nothing was picked is followed:
before an op that has no value or no slope there, another number is put there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dualform.graphs import aside as unseen
from dualform.graphs.constants import version_of
from dualform.graphs.edit import inputs_of, results_of
from dualform.graphs.hollow import META, Hollow, laid_out_as, leaves_in, tensors_in
from dualform.graphs.masks import Masks
from dualform.graphs.numbers import OTHERS, Count, at_one, counted, number, valued
from dualform.ops.spelled import SPELLED
from dualform.ops.table import entrywise_reads, kind_of, row_of
from dualform.shapes import TraceError
from dualform.storages import memory_of

aten = torch.ops.aten

_TOLD = {vars(torch._C.TensorBase)[n].__get__ for n in ("dtype", "device", "is_cuda")}
_TOLD |= {Tensor.is_floating_point, Tensor.is_complex}
# What asks for a shape, and what of it.
_SHAPES: dict[Any, Callable[..., Any]] = {
    vars(torch._C.TensorBase)["shape"].__get__: torch.Size,
    vars(torch._C.TensorBase)["ndim"].__get__: len,
    Tensor.dim: len,
    Tensor.size: lambda shape, dim=None: torch.Size(shape) if dim is None else shape[dim],
}
_MANY = 7  # a made-up number of picked entries

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
# gm, at which axis its inputs have so many entries, how many -> at which its results have them
Proved = Callable[[fx.GraphModule, Sequence[int | None], int], Sequence[int | None]]


class Meets(Exception):
    """Picked entries are not kept apart."""


def alone(gm: fx.GraphModule, at: Sequence[int | None], many: int) -> Sequence[int | None]:
    """Say where the entries of results are if each is made of one entry."""
    for node in gm.graph.nodes:
        tags = getattr(node.target, "tags", ())
        is_alone = torch.Tag.pointwise in tags or row_of(node.target).reads is entrywise_reads
        if node.op == "call_function" and not is_alone and node.target is not aten.clone.default:
            raise Meets
    given = [(n.meta["val"], k) for n, k in zip(inputs_of(gm.graph), at, strict=True)]
    found, right = [n.meta["val"] for n in results_of(gm.graph)], {x.ndim - k for x, k in given if k is not None}
    for n in right:
        size = [x.shape[x.ndim - n] if x.ndim >= n else 1 for x in (*found, *(x for x, k in given if k is None))]
        if len(right) > 1 or size != [many] * len(found) + [1] * (len(size) - len(found)):
            raise Meets
    return [x.ndim - n for x in found for n in right]


class _Pick(NamedTuple):
    """A mask, over some neighbouring axes of whole tensors, and how it was made."""

    mask: Tensor
    key: Any
    written: int  # how often the mask was


class _Held(NamedTuple):
    """A whole tensor that stands for what was picked from it along some axes, the first of which is `at`."""

    x: Tensor
    pick: _Pick
    at: int
    other: Tensor | None  # what it is where nothing was picked, for one entry; None: not known


class Selected:
    """The tensors of one trace that stand for picked entries, and how its masks were made, all by identity."""

    def __init__(
        self, refuse: Callable[[], NoReturn], marked: Callable[..., Any], trace: Callable[..., Any], proved: Proved
    ) -> None:
        self.refuse, self.marked, self.trace, self.proved = refuse, marked, trace, proved
        self._picked: dict[int, _Held] = {}
        self.masks = Masks()
        # What the call that is going on makes: of each tensor of its result, where its entries are; and their number
        self._next: tuple[_Pick, Sequence[int | None], Tensor | None] | None = None
        self._filled: dict[int, _Held] = {}  # what stands for a picked tensor in it, with another number

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Call:
        """The call in terms of whole tensors."""
        self._next = None
        index = _INDEXED.get(func)
        if index is not None:
            x, at, *rest = index(*args, **kwargs)
            found = self._asked(x, at)
            made = found and (self._put(*found, *rest) if rest else self._pick(*found))
            if made:
                return made
        held = self._held(args, kwargs)
        if not held and any(isinstance(x, Count) for x in leaves_in(args, kwargs)):
            self.refuse()
        if not held or func in _TOLD:
            return func, args, kwargs
        if func in _SHAPES:
            return self._shape(func, *args, **kwargs)
        return self._each(func, args, kwargs, list(held.values()))

    def expect_booleans(self, func: Callable[..., Any], args: Any, kwargs: Any, note: Callable[[], str]) -> None:
        """Refuse what torch has no kernel for: to write numbers, or one at a time, under a mask of bytes."""
        index = _INDEXED.get(func)
        _, at, *rest = index(*args, **kwargs) if index else (None, None)
        if not rest or not any(p.dtype == torch.uint8 for p in tensors_in(at)):
            return
        held = self._picked.get(id(rest[0]))
        is_one = not isinstance(rest[0], Tensor) or rest[0].numel() == 1
        if is_one or (held and held.x.ndim == held.pick.mask.ndim):
            raise TraceError(
                f"trace: `{note()}` writes numbers under a torch.uint8 mask, for which torch has no kernel "
                "(masked_fill_ only supports boolean masks); expected a boolean one. Pass mask.bool()."
            )

    def applied(self, func: Callable[..., Any], args: Any, run: Callable[..., Any]) -> Any:
        """Call a function that no mode of torch sees, and which `run` applies."""
        with unseen.without_function_modes():
            to, args, _ = self.call(func, args, {})
        coming = self._next
        result = run(*args) if to is func else to(*args)
        self._next = coming
        with unseen.without_function_modes():
            self.note(func, args, {}, result)
        return result

    def _held(self, args: Any, kwargs: Any) -> dict[int, _Held]:
        """What is picked among arguments."""
        return {id(x): self._picked[id(x)] for x in leaves_in(args, kwargs) if id(x) in self._picked}

    def _shape(self, func: Any, x: Tensor, *rest: Any, **named: Any) -> Call:
        h = self._picked[id(x)]
        count = Count(h.pick.mask.numel())
        count.refuse = self.refuse
        said = _SHAPES[func](at_one(x, h.at, h.pick.mask.ndim, count), *rest, **named)
        return (lambda *_, **__: said), (x, *rest), named

    # -- reading and writing under a mask

    def _asked(self, x: Any, index: Any) -> tuple[Tensor, _Pick, int, bool] | None:
        """Which view of a tensor is asked for under a mask, where, and whether that is all of it; None: no such is."""
        parts = list(index) if isinstance(index, tuple) else [index]
        masks = [p for p in parts if isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) and p.ndim]
        if not isinstance(x, Tensor) or len(masks) != 1 or any(_is_list(p) for p in parts if p is not masks[0]):
            return None
        mask, held = masks[0], self._picked.get(id(masks[0]))
        taken = sum(mask.ndim if p is mask else p is not None and p is not ... for p in parts)
        parts = [y for p in parts for y in ([slice(None)] * (x.ndim - taken) if p is ... else [p])]
        k = next(n for n, p in enumerate(parts) if p is mask)
        at = sum(not isinstance(p, int) for p in parts[:k])
        whole = len(parts) == 1
        parts[k : k + 1] = [slice(None)] * mask.ndim
        own = self._picked.get(id(x))
        if own is not None or held is not None:  # in what was picked already
            if own is None or held is None or not whole or own.at or held.at or held.pick.key != own.pick.key:
                self.refuse()
            both = self._spread(own, mask.ndim) & mask
            return x, _Pick(both, ("in", own.pick.key, self.masks.key(mask)), version_of(both)), 0, True
        key, mask = self.masks.key(mask), mask if mask.dtype == torch.bool else self._now(Tensor.bool, mask)
        view = x if whole else self._now(Tensor.__getitem__, x, tuple(parts))
        if view.shape[at : at + mask.ndim] != mask.shape:
            return None
        return view, _Pick(mask, key, version_of(mask)), at, whole

    def _spread(self, held: _Held, axes: int = 0) -> Tensor:
        """A mask over a whole tensor, or over its first axes."""
        if held.pick.written != version_of(held.pick.mask):
            self.refuse()
        return _shaped(held.pick.mask, axes or held.x.ndim, held.at)

    def _pick(self, x: Tensor, pick: _Pick, at: int, whole: bool) -> Call:
        put, other = number(OTHERS[0], x, at, pick.mask.ndim)
        self._next = (pick, [at], other)
        return torch.where, (_shaped(pick.mask, x.ndim, at), x, put), {}

    def _put(
        self, x: Tensor, pick: _Pick, at: int, whole: bool, value: Any, adds: bool = False, fresh: bool = False
    ) -> Call | None:
        """Write picked entries where they were picked, or what is the same for all; a number is torch's to write."""
        held, right = self._picked.get(id(value)), x.ndim - at
        if held is not None and (held.pick.key != pick.key or held.x.ndim - held.at != right):
            self.refuse()
        is_number = not isinstance(value, Tensor) or not value.ndim
        if held is None and id(x) not in self._picked and ((whole and is_number) or pick.mask.ndim == x.ndim):
            return None
        if held is None and isinstance(value, Tensor) and value.ndim > right - pick.mask.ndim:
            self.refuse()
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=x.dtype, device=x.device)
        new = self._now(Tensor.to, value, x.dtype)
        new = self._now(torch.add, x, new) if adds else new
        new = self._now(torch.where, _shaped(pick.mask, x.ndim, at), new, x)
        if new.shape != x.shape:
            self.refuse()
        return (torch.clone, (new,), {}) if fresh else (Tensor.copy_, (x, new), {})

    # -- ops on what is picked

    def _each(self, func: Callable[..., Any], args: Any, kwargs: Any, held: list[_Held]) -> Call:
        """Any other op, if it keeps them apart: as if all had been picked."""
        pick, axes = held[0].pick, held[0].pick.mask.ndim
        if any(h.pick.key != pick.key for h in held) or kwargs.get("out") is not None:
            self.refuse()
        try:
            made, is_alone, is_view = self._places(func, args, kwargs)
        except Exception:  # whatever is wrong with it, or with so many entries
            self.refuse()
        args, kwargs = counted(args, kwargs, int.__index__)
        self._filled, other = {}, None
        if not is_view:  # of what is looked at, not of what stands for it
            args, kwargs, other = self._with_slopes(func, args, kwargs)
        self._next = (pick, made, other)
        if axes == 1 or is_alone:
            return func, args, kwargs
        shape, total = pick.mask.shape, pick.mask.numel()

        def flat(x: Tensor) -> Tensor:
            h = self._picked.get(id(x)) or self._filled.get(id(x))
            return x if h is None else self._now(Tensor.view, x, at_one(x, h.at, axes, total))

        def run(*args: Any, **kwargs: Any) -> Any:
            with unseen.without_function_modes():
                own, named = pytree.tree_map_only(Tensor, flat, (args, kwargs))
            leaves, spec = pytree.tree_flatten((SPELLED.get(func) or func)(*own, **named))
            with unseen.without_function_modes():
                whole = [
                    x if k is None or not isinstance(x, Tensor) else self._now(Tensor.unflatten, x, k, shape)
                    for x, k in zip(leaves, made, strict=True)
                ]
            return pytree.tree_unflatten(whole, spec)

        return run, args, kwargs

    def _places(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Sequence[int | None], bool, bool]:
        """At which axes a result's tensors have the entries, proved at a made-up number of them; is each made of
        one alone, is a part of an argument seen?"""
        tensors = list({id(x): x for x in tensors_in(args, kwargs)}.values())
        shapes_asked = any(isinstance(x, Count) for x in leaves_in(args, kwargs))
        args, kwargs = counted(args, kwargs, lambda _: _MANY)
        writes, seen = _writes(func), list[Tensor]()
        given = [self._picked.get(id(x)) for x in tensors]

        def run(*now: Tensor) -> list[Tensor]:
            by = {id(x): y.clone() for x, y in zip(tensors, now, strict=True)}
            own, named = pytree.tree_map_only(Tensor, lambda x: by[id(x)], (args, kwargs))
            found = [x for x in pytree.tree_leaves(func(*own, **named)) if isinstance(x, Tensor)]
            seen.extend(x for x in found if not writes and _memory(x) in {_memory(y) for y in by.values()})
            return [*found, own[0]] if writes else found

        at = [None if h is None else h.at for h in given]
        with unseen.aside([]):
            stand_ins: list[Tensor] = []
            for x, h in zip(tensors, given, strict=True):
                shape = x.shape if h is None else at_one(x, h.at, h.pick.mask.ndim, _MANY)
                stand_ins.append(Hollow(torch.empty(shape, dtype=x.dtype, device=META)))
            gm = self.trace(run, *stand_ins)
            try:
                made, is_alone = alone(gm, at, _MANY), True
            except Meets:
                made, is_alone = self.proved(gm, at, _MANY), False
        ops = [n.target for n in gm.graph.nodes if n.op == "call_function" and n.target is not aten.clone.default]
        if shapes_asked and any(kind_of(op) != "view" for op in ops):  # a number of them, that is no size
            raise Meets
        if writes and made[-1] != (self._picked[id(args[0])].at if id(args[0]) in self._picked else -1):
            raise Meets
        return made[: len(made) - writes], is_alone, bool(seen)

    def _with_slopes(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any, Tensor | None]:
        """Arguments with a number where nothing was picked that the op has a value and slopes at."""
        held = self._held(args, kwargs)

        def at(n: float, h: _Held) -> Tensor:
            return number(n, h.x, h.at, h.pick.mask.ndim)[1]

        tried = ({k: at(n, h) if h.other is None else h.other for k, h in held.items()} for n in OTHERS)
        again = ({k: at(n, h) for k, h in held.items()} for n in OTHERS)
        said = ((n, now, *valued(func, args, kwargs, now)) for n, now in zip(OTHERS * 2, (*tried, *again), strict=True))
        n, now, _, made = next((found for found in said if found[2]), (0.0, {}, False, None))
        if not now:
            self.refuse()
        put: dict[int, Tensor] = {}
        for k, h in held.items():
            if now[k] is not h.other and h.x.is_floating_point():
                put[k] = self._now(torch.where, self._spread(h), h.x, number(n, h.x, h.at, h.pick.mask.ndim)[0])
                self._filled[id(put[k])] = h
        if _writes(func):  # others may look at the same memory
            self._picked = {k: h._replace(other=None) for k, h in self._picked.items()}
            first = args[0]
            if id(first) in put:
                self._now(Tensor.copy_, first, put.pop(id(first)))
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: put.get(id(x), x), (args, kwargs))
        return args, kwargs, made

    def _now(self, func: Callable[..., Any], *args: Any) -> Tensor:
        """Run another op first: its value requires a gradient where one of its arguments does."""
        return self.marked(func, args, {}, func(*args))

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Note what is picked, and how a mask was made: two that were made alike are one."""
        leaves = tensors_in(args, kwargs)
        if self._next is not None:
            pick, made, other = self._next
            found = [x for x in pytree.tree_leaves(result) if x is not None]
            if not all(isinstance(x, Tensor) for x in found):
                self.refuse()
            for x, at in zip(found, made, strict=True):
                if at is not None:
                    if x.shape[at : at + pick.mask.ndim] != pick.mask.shape:
                        self.refuse()
                    self._picked[id(x)] = _Held(x, pick, at, other)
        self.masks.note(func, args, kwargs, result, leaves)

    def below(self) -> None:
        """Refuse a transform inside: it wraps what it is given, and may sum over what is picked."""
        if self._picked:
            self.refuse()

    def end(self, result: Any) -> None:
        """Refuse a result of as many entries as were picked."""
        if any(id(x) in self._picked for x in pytree.tree_leaves(result)):
            self.refuse()


def _memory(x: Tensor) -> int:
    return memory_of(laid_out_as(x))


def _shaped(mask: Tensor, ndim: int, at: int) -> Tensor:
    """A mask over axes of a tensor from `at` on, to be spread over the rest."""
    behind = ndim - at - mask.ndim
    return mask.reshape(*mask.shape, *[1] * behind) if behind else mask


def _writes(func: Any) -> bool:
    """Does a function of torch's write to its first argument?"""
    name = getattr(func, "__name__", "").removesuffix("__")
    return name.startswith("__i") or name == "__setitem" or (name.endswith("_") and not name.startswith("__"))


def _is_list(x: Any) -> bool:
    return isinstance(x, bool) or not (x is None or x is ... or isinstance(x, slice | int))


# What reads or writes under an index: (tensor, index), and of a write the value, does it add, is it to another tensor?


def _put_at(input: Tensor, indices: Any, values: Any, accumulate: bool = False, *, fresh: bool = False) -> Any:
    return input, tuple(slice(None) if i is None else i for i in indices), values, accumulate, fresh


def _masked(input: Tensor, mask: Any, source: Any = None, *, fresh: bool = False) -> Any:
    """A mask of all of a tensor, no smaller one."""
    at = mask if isinstance(mask, Tensor) and mask.shape == input.shape else None
    return (input, at) if source is None else (input, at, source, False, fresh)


_INDEXED: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: lambda x, index: (x, index),
    Tensor.__setitem__: lambda x, index, value: (x, index, value),
    **dict.fromkeys((torch.masked_select, Tensor.masked_select, Tensor.masked_scatter_), _masked),
    **dict.fromkeys((torch.masked_scatter, Tensor.masked_scatter), partial(_masked, fresh=True)),
    **dict.fromkeys((torch.index_put_, Tensor.index_put_), _put_at),
    **dict.fromkeys((torch.index_put, Tensor.index_put), partial(_put_at, fresh=True)),
}

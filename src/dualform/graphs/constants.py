"""What a trace knows of values: tensors that are made of constants alone, whatever the inputs are.

mask = table > 0; w[mask]        ->    w[places], where mask is true
n = count.item()                 ->    a number of the graph
x[x > 0]                         ->    x[places], where `steps` gives the values of x

A constant is a tensor that the function closes over, one of `known`, or what ops make of constants; its value is
computed when somebody asks for it. Those asked for are `read`: the graph is made for their values. Of `steps`, which
move, masks and the places of what is not zero are known, since they move in steps; their numbers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from dualform.graphs.hollow import tensors_in
from dualform.graphs.recorder import Recorded
from dualform.graphs.this_thread import out_of_sight
from dualform.shapes import TraceError
from dualform.storages import contents, times_written

# What reads values; what makes sizes of them.
_READ = {
    getattr(Tensor, n)
    for n in ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__")
}
_READ |= {Tensor.equal, Tensor.allclose, torch.equal, torch.allclose, Tensor.__contains__, torch.is_nonzero}
_SIZED = {torch.bincount, torch.unique, torch.unique_consecutive, torch.nonzero, torch.argwhere}
_SIZED |= {getattr(Tensor, f.__name__) for f in _SIZED if hasattr(Tensor, f.__name__)}
_PLACES = {torch.nonzero, torch.argwhere, Tensor.nonzero, Tensor.argwhere}  # which move in steps
_MASKS = (torch.bool, torch.uint8)  # as which an index is one
_LISTED = {torch.tensor, torch.as_tensor, torch.asarray}
_SELECTED = {Tensor.masked_select, torch.masked_select}
_NUMBERED = {Tensor.narrow, torch.narrow, Tensor.tensor_split, torch.tensor_split}  # whose numbers may be tensors
_SCATTERED = {Tensor.masked_scatter, torch.masked_scatter}
_REPEATED = {torch.repeat_interleave, Tensor.repeat_interleave}
_RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.bernoulli, torch.multinomial, torch.normal}
_RANDOM |= {torch.rand_like, torch.randn_like, torch.randint_like, torch.poisson, Tensor.bernoulli, Tensor.multinomial}
# By which argument: a tensor whose values an op does not read, but what it is like.
_LIKE = dict.fromkeys((torch.zeros_like, torch.ones_like, torch.full_like), 0)
_LIKE |= dict.fromkeys((Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor), 0)
_LIKE |= dict.fromkeys((Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as), 1)

_OFTEN = 1 << 16  # bytes, up to which memory is looked at before each op, not at the end alone
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Constants:
    """The tensors of one trace whose values are known, by identity; one that was written to since is known no more."""

    def __init__(self, known: Mapping[int, Tensor], note: Callable[[], str], steps: Sequence[Tensor] = ()) -> None:
        self.known = known  # by position among the inputs
        self.steps = steps  # the inputs' values, if masks of them may be read
        self._moving: set[int] = set()  # tensors that are made of these, by identity
        self.note = note  # gives the caller's line
        self.read: list[Tensor] = []
        self.shared: list[tuple[Tensor, int, str]] = []  # what numpy looks at, with its version and who let it
        self._made: dict[int, tuple[Tensor, int, Callable[[], Tensor]]] = {}
        self._there: dict[str, tuple[int, bytes | int]] = {}  # what lies in the memory that the trace closes over

    def begin(self, inputs: Sequence[Any]) -> None:
        """Take the inputs of the function that is traced."""
        for k, value in self.known.items():
            if not value.is_meta:
                self._keep(inputs[k], lambda value=value, to=inputs[k].dtype: self._noted(value).to(to, copy=True))
        for x, value in zip(inputs, self.steps, strict=False):
            if not self._has(x) and not value.is_meta:
                self._moving.add(id(x))
                self._keep(x, partial(self._noted, value))

    def _keep(self, x: Tensor, value: Callable[[], Tensor]) -> None:
        self._made[id(x)] = (x, version_of(x), value)

    def _noted(self, x: Tensor) -> Tensor:
        self.read.append(x)
        return x.detach()

    def released(self) -> dict[int, Callable[[], Tensor]]:
        """Let go of all tensors of the trace; how to find the values of those that are known, by identity."""
        made, self._made = self._made, {}
        self.shared = []
        return {id(x): value for x, version, value in made.values() if version_of(x) == version}

    def end(self) -> None:
        """Refuse what numpy would have seen."""
        for x, version, where in self.shared:
            if version_of(x) != version:
                raise TraceError(
                    f"trace: `{where}` looks at a tensor's memory, which is written to later; expected a pure function "
                    "of its inputs. Take x.clone().numpy(), or look at it after the last write."
                )

    def overwritten(self, *, small: bool) -> fx.Node | None:
        """Find what read memory that numpy or Python has written to since, as no op tells; small: of small alone."""
        mode: Any = get_proxy_mode()
        tracer: Any = getattr(mode, "tracer", mode)
        if tracer is None:
            return None
        for name, x in (vars(tracer.root) | dict(tracer.root.named_parameters())).items():
            if not isinstance(x, Tensor) or (small and name in self._there and x.nbytes > _OFTEN):
                continue
            now = (times_written(x), contents(x))
            before = self._there.setdefault(name, now)
            if now != before:
                readers = [u for n in tracer.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users]
                read = (y for u in readers for y in (u.users if "lift_fresh" in str(u.target) else [u]))
                if now[0] == before[0] and (reader := next(iter(read), None)) is not None:
                    return reader
                self._there[name] = now
        return None

    def knows(self, x: Any) -> bool:
        """Is it no tensor, or a constant?"""
        return self._has(x) and not (id(x) in self._moving and type(x) is not Tensor)

    def _has(self, x: Any) -> bool:
        """Is it no tensor, or one whose value is there?"""
        if not isinstance(x, Tensor) or type(x) is Tensor:
            return True
        made = self._made.get(id(x))
        return made is not None and made[0] is x and made[1] == version_of(x)

    def value(self, x: Any) -> Any:
        """The value of what is known."""
        if not isinstance(x, Tensor):
            return x
        with aside():
            return self._noted(x) if type(x) is Tensor else self._made[id(x)][2]()

    def values(self, func: Callable[..., Any], args: Any, kwargs: Any) -> dict[int, Callable[[], Tensor]] | None:
        """How to find the values that a call is given, as they are now; None if one is not known."""
        leaves = tensors_in(args, kwargs)
        found = {id(x): self._value_now(x) for x in leaves if self._has(x)}
        if (at := _LIKE.get(func)) is not None and isinstance(like := [*args, None, None][at], Tensor):
            found.setdefault(id(like), partial(torch.empty, like.shape, dtype=like.dtype, device=like.device))
        return None if func in _RANDOM or not all(id(x) in found for x in leaves) else found

    def _value_now(self, x: Tensor) -> Callable[[], Tensor]:
        if type(x) is not Tensor:
            return self._made[id(x)][2]
        version = x._version

        def value() -> Tensor:
            if x._version != version:
                raise _Written
            return self._noted(x)

        return value

    def made(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, values: Any) -> Any:
        """Note what an op made, or wrote, if it was given constants alone."""
        if values is None:
            return result
        first = args[0] if args and isinstance(args[0], Tensor) and type(args[0]) is not Tensor else None
        writes = first is not None and not self._has(first) and func not in _LIKE
        moves = any(id(x) in self._moving for x in tensors_in(args, kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        given = {id(x) for x in leaves if isinstance(x, Tensor)}
        tensors = tensors_in(result)
        # The trace's own tensors end with it: how to make them anew holds none.
        parts = [values[id(x)] if isinstance(x, Tensor) else lambda x=x: x for x in leaves]

        @cache
        def again() -> list[Tensor]:
            with aside():
                own, named = pytree.tree_unflatten([part() for part in parts], spec)
                if not writes:
                    return tensors_in(func(*own, **named))
                written = own[0].clone()
                func(written, *own[1:], **named)
                return [written]

        if writes and first is not None:
            self._keep(first, lambda: again()[0])
            self._moving |= {id(first)} if moves else set()
            return result
        for k, x in enumerate(tensors):
            if type(x) is not Tensor and id(x) not in given:
                self._keep(x, lambda k=k: again()[k])
                self._moving |= {id(x)} if moves else set()
        return result

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a call that reads constants gives, in a list; else the call, with places for known masks."""
        try:
            return self._call(func, args, kwargs)
        except _Written:
            return func, args, kwargs

    def _call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Any] | Call:
        is_where = func is torch.where and len(args) + len(kwargs) == 1
        if func in _READ or func in _SIZED or is_where:
            knows = self._has if is_where or func in _PLACES else self.knows
            if all(map(knows, pytree.tree_leaves((args, kwargs)))):
                with aside():
                    found = func(*pytree.tree_map(self.value, args), **pytree.tree_map(self.value, kwargs))
                if isinstance(found, numpy.ndarray):
                    found.setflags(write=False)  # the trace would not see it
                    self.shared.append((args[0], version_of(args[0]), self.note()))
                return [found]
        elif func in _REPEATED:
            repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
            if isinstance(repeats, Tensor) and self.knows(repeats):
                return self._repeated(args, kwargs, repeats)
        elif func is torch.tensor and isinstance(args[0], numpy.ndarray):
            return func, (args[0].copy(), *args[1:]), kwargs  # of what is there now, not of the array
        elif func in _LISTED and isinstance(args[0], list | tuple) and (parts := tensors_in(args[0])):
            if not all(map(self.knows, parts)):
                raise TraceError(
                    f"trace: `{self.note()}` makes a tensor of other tensors' numbers, which cuts their gradients; "
                    "expected tensor ops. Use torch.stack([...])."
                )
            with aside():
                numbers = pytree.tree_map_only(Tensor, lambda x: self.value(x).tolist(), args[0])
            return func, (numbers, *args[1:]), kwargs
        elif func is torch.nn.functional.embedding_bag:
            return func, (), self._bags(signature(func).bind(*args, **kwargs).arguments)
        elif func in _NUMBERED and all(map(self.knows, args[1:])):
            with aside():
                return (
                    func,
                    (args[0], *(self.value(x).tolist() if isinstance(x, Tensor) else x for x in args[1:])),
                    kwargs,
                )
        elif func in _SELECTED and not kwargs and self.is_mask(args[1]):
            shape = torch.broadcast_shapes(*(t.shape for t in args)) or torch.Size([1])
            return Tensor.__getitem__, (args[0].expand(shape), self.places(args[1], shape)), {}
        elif func in _SCATTERED and not kwargs and self.is_mask(args[1]):
            shape = torch.broadcast_shapes(*(t.shape for t in args[:2]))
            places = self.places(args[1], shape)
            source = args[2].reshape(-1)[: len(places[0])]
            return Tensor.index_put, (args[0].expand(shape), places, source), {}
        elif func is Tensor.__getitem__ or (
            func is Tensor.__setitem__  # one number at a mask of the whole is told as where
            and ((isinstance(args[2], Tensor) and args[2].ndim) or isinstance(args[1], tuple))
        ):
            return func, (args[0], self.places(args[1]), *args[2:]), kwargs
        return func, args, kwargs

    def _bags(self, given: dict[str, Any]) -> dict[str, Any]:
        """Bags of one size, as offsets say that are known, are rows."""
        x, offsets = given["input"], given.get("offsets")
        if not isinstance(offsets, Tensor) or not self.knows(offsets) or x.ndim != 1:
            return given
        with aside():
            starts = self.value(offsets).tolist()
        count = len(starts) - bool(given.get("include_last_offset"))
        n = x.numel() // max(1, count)
        if n == 0 or starts != list(range(0, n * len(starts), n)) or n * count != x.numel():
            return given
        w = given.get("per_sample_weights")
        rows = {"input": x.view(count, n), "per_sample_weights": None if w is None else w.view(count, n)}
        return given | rows | {"offsets": None, "include_last_offset": False}

    def _repeated(self, args: Any, kwargs: Any, repeats: Tensor) -> list[Any] | Call:
        """Repeating each entry so and so often is to look them up."""
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        x = args[0] if repeats is not args[0] else None
        n = None if x is None else x.shape[dim] if dim is not None else x.numel()
        with aside():
            times = self.value(repeats)
            index = torch.repeat_interleave(times if n is None else times.expand(n))
        if x is None:
            return [index]
        return torch.index_select, (x, dim, index) if dim is not None else (x.reshape(-1), 0, index), {}

    def is_mask(self, x: Any, kinds: tuple[torch.dtype, ...] = (torch.bool,)) -> bool:
        """Is it a mask whose values are known?"""
        return isinstance(x, Tensor) and x.dtype in kinds and self._has(x)

    def places(self, index: Any, shape: torch.Size | None = None) -> Any:
        """An index whose known masks say where they are true."""
        parts = index if isinstance(index, tuple) else (index,)
        with aside():
            parts = tuple(map(_mask_written_out, parts))
        if not any(self.is_mask(part, _MASKS) or isinstance(part, slice) for part in parts):
            return index
        found: list[Any] = []
        for part in parts:
            if not self.is_mask(part, _MASKS):
                found.append(self._ends(part) if isinstance(part, slice) else part)
                continue
            mask = self.value(part)
            with aside():
                found += (mask if shape is None else mask.expand(shape)).nonzero(as_tuple=True)
        return tuple(found)

    def _ends(self, part: slice) -> slice:
        """A slice whose known ends are numbers."""
        ends = (part.start, part.stop, part.step)
        with aside():
            return slice(*(int(self.value(x)) if isinstance(x, Tensor) and self.knows(x) else x for x in ends))


def _mask_written_out(part: Any) -> Any:
    """[True, False], or numpy's, as the mask that it is."""
    if isinstance(part, list) and part and all(isinstance(x, bool) for x in pytree.tree_leaves(part)):
        return torch.tensor(part)
    if isinstance(part, numpy.ndarray) and part.dtype in (bool, numpy.uint8) and part.ndim:
        return torch.tensor(part)
    return part


def version_of(x: Tensor) -> int:
    """How often a tensor's memory was written to, by views of it too."""
    return x.writes[0] if isinstance(x, Recorded) else times_written(x)


class _Written(Exception):
    """Something that a value is made of was written to."""


@contextmanager
def aside() -> Iterator[None]:
    """Compute, out of sight of the trace."""
    with out_of_sight(), torch.no_grad():
        yield

"""Tensors without numbers: a shape, a dtype and how they lie in memory, on the CPU as far as anybody can see.

A trace computes with them. Shapes come from torch: an op entry by entry runs on one entry, one of torch's core set on
zeros, where they are few, and any other on the meta device, whose kernels in Python load torch's whole compiler at
their first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dualform.ops.table import row_of

META, CPU = torch.device("meta"), torch.device("cpu")
FEW = 1 << 18  # numbers, up to which zeros are computed with
_Tag = torch.Tag
_VALUES = {_Tag.nondeterministic_seeded, _Tag.dynamic_output_shape, _Tag.data_dependent_output}
_KEPT = (None, torch.preserve_format)
_PLAIN = {RuntimeError, IndexError, TypeError, ValueError, NotImplementedError}


class Hollow(Tensor):
    """A tensor without numbers; `shape_of` is its twin on the meta device."""

    shape_of: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, *rest: Any) -> Hollow:
        self = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=CPU
        )  # fmt: skip
        self.shape_of = value
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_reshaped(func) and isinstance(args[0], Hollow):  # as an RNN of torch's turns its result
            with torch._C._DisableTorchDispatch():
                func(args[0].shape_of, *args[1:], **kwargs or {})
                return func(*args, **kwargs or {})
        made = computed(func, args, kwargs or {})
        first = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if func._schema.is_mutable and first is not None and first.is_write:  # not what rrelu notes its noise in
            return args[0]
        return each(made, lambda x: Hollow(x if x.device == META else x.to(META)) if isinstance(x, Tensor) else x)

    def __deepcopy__(self, memo: Any) -> Hollow:
        return Hollow(self.shape_of)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Hollow, (self.shape_of,)

    def __repr__(self, **_: Any) -> str:
        return f"Hollow({tuple(self.shape)}, {self.dtype})"


class Hollows(TorchDispatchMode):
    """Run ops of hollow tensors, and of those on the meta device, on shapes.

    A hollow tensor does so by itself; but at the first op that finds its way to a class,
    torch loads all of its distributed tensors.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if any(isinstance(x, Hollow) for x in tensors):
            return Hollow.__torch_dispatch__(func, types, args, kwargs)
        if tensors and all(type(x) is Tensor and x.is_meta for x in tensors):
            return computed(func, args, kwargs)
        return func(*args, **kwargs)


def leaves_in(*given: Any) -> list[Any]:
    """List arguments, and the entries of those that are lists or dicts, a shape's too."""
    found, todo = [], [*given]
    for x in todo:
        if isinstance(x, list | tuple):
            todo.extend(x)
        elif isinstance(x, dict):
            todo.extend(x.values())
        else:
            found.append(x)
    return found


def tensors_in(*given: Any) -> list[Tensor]:
    """List the tensors among arguments."""
    return [x for x in leaves_in(*given) if isinstance(x, Tensor)]


def each(x: Any, f: Callable[[Any], Any]) -> Any:
    """Map an argument, or the entries of a list of them."""
    if not isinstance(x, list | tuple):
        return f(x)
    made = [each(v, f) if isinstance(v, list | tuple) else f(v) for v in x]
    return made if isinstance(x, list) else tuple(made)


def blank(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same shape and type that lies in memory as another does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def laid_out_as(x: Tensor) -> Tensor:
    """The tensor that says how another lies in memory: of a hollow one its twin."""
    return x.shape_of if isinstance(x, Hollow) else x


def on_meta(x: Any) -> Any:
    """The twin of an argument on the meta device."""
    if isinstance(x, Hollow):
        return x.shape_of
    return META if isinstance(x, torch.device) else x.to(META) if isinstance(x, Tensor) else x


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an op of hollow and other tensors: tensors of the result's shape, dtype and strides; views are views.

    An op in place changes no shape, or raises.
    """
    args, kwargs = each(args, on_meta), {name: each(x, on_meta) for name, x in kwargs.items()}
    with torch._C._DisableTorchDispatch():
        return _computed(func, args, kwargs)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    find = _kind(func)
    made = find and find(func, args, kwargs)
    if made is not None:
        return made
    if not tensors_in(args, kwargs) and any(a.name == "device" for a in func._schema.arguments):
        kwargs["device"] = META
    before = [_laid_out(x) for x in args[:1]]
    made = func(*args, **kwargs)
    if func._schema.is_mutable and before != [_laid_out(x) for x in args[:1]]:
        raise NotImplementedError(f"{func} changes a shape in place")
    return made


@cache
def is_reshaped(func: Any) -> bool:
    """Does an op change in place how its tensor lies, as transpose_ does?"""
    return _Tag.inplace_view in func.tags and "detach" not in func._opname


@cache
def _kind(func: Any) -> Callable[..., Any] | None:
    """How to find the shape of an op's result without its kernel on the meta device; None: no way is known."""
    if func.is_view or _VALUES & set(func.tags):
        return None
    if func._schema.is_mutable:
        return _in_place if _Tag.pointwise in func.tags and func._opname.endswith("_") else None
    if _Tag.pointwise in func.tags or func._opname.endswith("_like"):
        return _entry_by_entry
    row = row_of(func)
    return _of_zeros if _Tag.core in func.tags or row.kind or row.lowered or row.several else None


def _laid_out(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else None


_known: dict[Any, Any] = {}  # what ops gave, by these and all that decides it


def _once(make: Callable[..., Any], func: Any, args: Any, kwargs: dict[str, Any], told: Callable[[Tensor], Any]) -> Any:
    """Run an op, or remember what it gave for other tensors of which the same is `told`; 1, 1.0 and True are three."""

    def seen(x: Any) -> Any:
        if isinstance(x, Tensor):
            return told(x)
        return type(x), tuple(map(seen, x)) if isinstance(x, list | tuple) else str(x) if isinstance(x, float) else x

    key = (make, func, *map(seen, args), *((name, seen(x)) for name, x in kwargs.items()))
    found = _known.get(key, _known)
    if found is _known:
        if len(_known) > 1 << 14:
            _known.clear()
        found = _known[key] = make(func, args, kwargs)
    return found


def _entry_by_entry(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Broadcast shapes; the dtype is that of one entry of each. None where the op is not so simple."""
    if kwargs.get("memory_format") not in _KEPT:
        return None
    tensors = tensors_in(args, kwargs)
    dtype = _once(_dtype_of_one, func, args, kwargs, lambda x: (x.dtype, x.ndim)) if len(tensors) <= 3 else None
    shape = None if dtype is None else _broadcast([x.shape for x in tensors])
    return None if shape is None else torch.empty_strided(shape, _strides(shape, tensors), dtype=dtype, device=META)


def _in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What is written to, where a result entry by entry fits there."""
    made = _entry_by_entry(func, args, kwargs)
    return args[0] if made is not None and made.shape == args[0].shape else None


def _dtype_of_one(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    """Run an op on one entry of each tensor."""

    def one(x: Any) -> Any:
        return torch.ones((1,) * x.ndim, dtype=x.dtype) if isinstance(x, Tensor) else CPU if x == META else x

    try:
        made = func(*each(args, one), **{name: each(x, one) for name, x in kwargs.items()})
    except (RuntimeError, TypeError):
        return _expect_taken(func, args, kwargs)
    is_plain = isinstance(made, Tensor) and made.ndim == max(x.ndim for x in tensors_in(args, kwargs))
    return made.dtype if is_plain else None


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape that shapes make together; None: they do not. (torch's own function loads sympy.)"""
    n = max(map(len, shapes))
    sizes = [{shape[len(shape) - n + k] for shape in shapes if len(shape) - n + k >= 0} - {1} for k in range(n)]
    return None if any(len(s) > 1 for s in sizes) else tuple(next(iter(s), 1) for s in sizes)


def _strides(shape: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How torch's TensorIterator lays a result out: axes in the order of the first operand that tells them apart."""
    held = []
    for x in tensors:
        lead = len(shape) - x.ndim
        own = zip(x.shape, x.stride(), shape[lead:], strict=True)
        held.append([0] * lead + [s if n == wide else 0 for n, s, wide in own])

    def is_wider(a: int, b: int) -> int:
        """Is axis a further out than b: 1 yes, -1 no, 0 unknown."""
        for strides in held:
            s, t = strides[a], strides[b]
            if s and t and (s != t or shape[a] > shape[b]):
                return 1 if s > t or (s == t and shape[a] > shape[b]) else -1
        return 0

    order = list(reversed(range(len(shape))))  # innermost first
    for i in range(1, len(order)):
        at = i
        for j in reversed(range(i)):
            wider = is_wider(order[j], order[at])
            if wider > 0:
                order[j], order[at], at = order[at], order[j], j
            elif wider < 0:
                break
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis], step = step, step * max(1, shape[axis])
    return tuple(strides)


def _of_zeros(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute with zeros, once for tensors laid out alike."""
    made = _once(_results_of_zeros, func, args, kwargs, _laid_out)
    return each(made, lambda x: blank(x, META) if isinstance(x, Tensor) else x)


def _results_of_zeros(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A largest size that is too large is stood in for by two small ones, which show where it goes."""
    leaves = leaves_in(args, kwargs)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    count = sum(math.prod(max(1, n) for n in x.shape) for x in tensors)  # an empty one is of as many rows
    largest = max((n for x in tensors for n in x.shape), default=0)
    if not tensors and (any(isinstance(x, float) for x in leaves) or _asked(leaves) > FEW):
        return None
    small = (largest,) if count <= FEW else (2, 3)
    try:
        found = [_at_zeros(func, args, kwargs, largest, n) for n in small]
    except (RuntimeError, IndexError, TypeError):
        return _expect_taken(func, args, kwargs)
    flat, spec = _pytree.tree_flatten(found[0])
    pairs = zip(flat, _pytree.tree_leaves(found[-1]), strict=True)
    made = [_told(*pair, largest if count > FEW else None) for pair in pairs]
    return None if any(x is NotImplemented for x in made) else _pytree.tree_unflatten(made, spec)


def _asked(leaves: Sequence[Any]) -> int:
    """How many numbers the whole numbers among arguments can ask for."""
    return math.prod(max(1, abs(n)) for n in leaves if isinstance(n, int))


def _expect_taken(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where it is not the values that an op does not take: its kernel on meta lets more pass."""
    error = refusal(func, args, kwargs)
    if error is not None:
        raise error


def refusal(func: Any, args: Any, kwargs: dict[str, Any]) -> Exception | None:
    """What torch says of a call that it refuses whatever the numbers are; None if it takes some, or that is unknown."""
    leaves = _pytree.tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    is_huge = _asked(leaves) > FEW
    is_large = sum(x.numel() for x in tensors) > FEW
    first = next((x.dtype for x in tensors if x.is_floating_point()), None)

    def tried(value: int, alike: bool = False) -> Exception | None:
        def real(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return CPU if isinstance(x, torch.device) else x
            kind = {"dtype": first if alike else x.dtype, "device": CPU}
            if is_large or x.layout is not torch.strided:
                return torch.full([min(n, 2) if is_large else n for n in x.shape], value, **kind)
            room = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            return torch.full((room,), value, **kind).as_strided(x.shape, x.stride())  # what a view takes, too

        try:
            func(*_pytree.tree_map(real, args), **_pytree.tree_map(real, kwargs))
        except Exception as error:  # one of a kind of its own is of values, as LinAlgError, or of stand-ins
            return error.with_traceback(None) if type(error) in _PLAIN else None  # its frames hold what was given
        return None

    found = [tried(value) for value in (0, 1)] if tensors and not is_huge else []
    if not found or None in found or len(set(map(str, found))) > 1:
        return None
    # A kernel that the CPU lacks another device may have; small shapes may not fit, but the dtypes do not either.
    if any(x.is_floating_point() and x.itemsize < 4 for x in tensors) or (is_large and tried(0, alike=True)):
        return None
    return found[0]


def _told(a: Any, b: Any, largest: int | None) -> Any:
    """A result on meta: it has the largest size wherever a has 2 and b has 3."""
    if not isinstance(a, Tensor):
        return a
    if largest is None:
        return a.to(META)
    if a.shape == b.shape:
        shape = list(a.shape)
    else:
        shape = [largest if (m, n) == (2, 3) else m for m, n in zip(a.shape, b.shape, strict=True)]
        if [3 if n == largest else n for n in shape] != list(b.shape):
            return NotImplemented
    return torch.empty(shape, dtype=a.dtype, device=META) if a.is_contiguous() and b.is_contiguous() else NotImplemented


def _at_zeros(func: Any, args: Any, kwargs: dict[str, Any], largest: int, n: int) -> Any:
    """Run an op on zeros, n in place of the largest size."""

    def zeros(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return CPU if isinstance(x, torch.device) else n if type(x) is int and x == largest else x
        shape, strides, reach = [n if s == largest else s for s in x.shape], [0] * x.ndim, 1
        for d in sorted(range(x.ndim), key=lambda d: (x.stride(d), -d)):
            if x.stride(d):
                strides[d], reach = reach, reach * shape[d]
        return torch.zeros(reach, dtype=x.dtype).as_strided(shape, strides)

    return func(*each(args, zeros), **{name: each(x, zeros) for name, x in kwargs.items()})

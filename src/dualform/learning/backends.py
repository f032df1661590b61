"""What runs a call: each backend is a record; all give the same numbers. Which is taken, and its comparison.

A backend is a way to make functions of graphs, for the loop; or it takes calls whole, as `Whole` says. Code that it
generates is compared with eager at its first use.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from dualform.catalogue import Catalogue, CatalogueError, near_misses, normalise
from dualform.learning import loop, proof
from dualform.learning.call import Call
from dualform.learning.grid import Variant
from dualform.learning.loop import GridCall
from dualform.learning.plan import Plan
from dualform.learning.prepare import Prepare, by_inductor, in_place
from dualform.learning.transforms import TRACING
from dualform.storages import memory_of

backends = Catalogue("backends")
# States that the backward finds again need not be computed again, a tenth of its time; beyond this, memory counts more
# (LAB.md).
STATE_BYTES = 96 * 2**20


class BackendError(ValueError):
    """A backend cannot run what it was given; the message says why. Where nobody chose it, eager runs instead."""


class Miscompiled(BackendError):
    """Code is wrong or does not run, as it was compiled; compiled with other options it may."""


class Stopped(Miscompiled):
    """It was ended from outside, or for want of memory: what another time may run."""


class Unseen(BackendError):
    """Code was compiled only, and its first use is not to be compared."""


class Code(Protocol):
    """Code that was generated for a direction; `str` says what it does."""

    @property
    def text(self) -> str: ...

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products, for one mini-batch of one row."""
        ...


Words = tuple[object, ...]  # all that decides what a direction runs, beside its tensors
Ready = Callable[[], Callable[[], list[Tensor]]]


class Directions(Protocol):
    """What runs both directions: the loop, or a backend."""

    def forward(self, run: GridCall, checkpoints: int) -> list[Tensor]: ...
    def backward(
        self, run: GridCall, saved: list[Tensor], cotangents: list[Tensor], checkpoints: int
    ) -> list[Tensor]: ...


class Whole(Directions, Protocol):
    """What runs whole calls itself: the loop's two directions, with the same arguments and results."""

    def suits(self, plan: Plan, call: Call) -> bool:
        """Is a call for this backend, where nobody chose one?"""
        ...

    def says(self, plan: Plan) -> str:
        """Say in words which calls suit; nothing if none does."""
        ...

    def schedule(self, plan: Plan, variant: Variant) -> Mapping[str, Code]:
        """Say what will be run for a kind of block, direction by direction."""
        ...

    def step(self, plan: Plan, call: Call, overwrite: bool) -> list[Tensor] | None:
        """Run one token, without gradients; overwrite: over the state given. None where `forward` is to do it."""
        ...

    def as_run(self, name: str, run: GridCall, backward: bool) -> tuple[list[str], tuple[str, ...]]:
        """Name the backend with each of what it chooses by a call's size, and what its code depends on beside the
        graphs: a compiler, a card."""
        return [name], ()

    def instead(self) -> Mapping[str, object] | None:
        """Say with which options the same graphs are compiled next, where this code proved wrong; None: no others."""
        return None

    def again(self, plan: Plan, call: Call, given: list[Tensor], words: Words, ready: Ready) -> list[Tensor]:
        """Run a direction: what `ready` returns, or what was written down when one like it ran."""
        return ready()()

    def seen(self, run: GridCall, way: str) -> bool | None:
        """Was all that is run seen right before, by a record that comes with this package? way: a direction, or "step".
        None: there is no such record, and code of this kind is trusted where nobody wants it compared."""
        return None

    def trial(self) -> AbstractContextManager[None]:
        """Run code that was never seen to run here where a fault harms nobody."""
        return nullcontext()


@dataclass(frozen=True)
class Backend:
    """How graphs become functions: `prepare(graph, make_examples)`.

    blocks: mini-batches that are compiled as one graph; a stretch of another length runs op by op. None: all do.
    whole: takes calls as they are instead.
    keep: a backward pass keeps every state of a call while they take at most so many bytes.
    """

    prepare: Prepare
    blocks: int | None = None
    whole: Whole | None = None
    keep: int = STATE_BYTES


@backends.record(name="eager", formula="the traced graphs, run op by op", source="the reference: any device, any dtype")
def eager() -> Backend:
    """Run graphs op by op, with a product and the sum it goes into as one op."""
    return Backend(in_place)


@backends.record(
    name="inductor", formula="some mini-batches as one graph, compiled", source="Ansel et al. 2024 (PyTorch 2)"
)
def inductor(blocks: int = 8) -> Backend:
    """Compile some mini-batches at once with torch's inductor, about a minute for each new batch."""
    if blocks < 1:
        raise ValueError(f"inductor: blocks is {blocks}; expected a number of mini-batches >= 1. Leave it out for 8.")
    return Backend(by_inductor, blocks)


def backends_key(spec: object, where: str = "program") -> str:
    """Write a backend, spelt in any way, as the one text that stands for it: `cpp`, `inductor {"blocks":
    2}`, `auto`."""
    if isinstance(spec, str) and spec in _words:
        return spec
    if isinstance(spec, str) and normalise(spec) == "auto":
        return "auto"
    try:
        bound = backends.build(spec)
    except CatalogueError as error:
        known = ("auto", *backends.names())
        what = f"{where}: backend is {spec!r}; expected 'auto' or one of {backends.names()}, with options or without."
        hint = near_misses(spec, list(known)) if isinstance(spec, str) else str(error)
        raise BackendError(f"{what} {hint}") from None
    options = bound.to_json()
    name, plain = options.pop("name"), bound.record.options
    given = {option: value for option, value in options.items() if value != plain[option]}
    if given:
        return f"{name} {json.dumps(given, sort_keys=True)}"
    _words.add(name)
    return name


_words = {"auto", "eager"}  # that stand for themselves, as was found


@cache
def backend_of(key: str) -> Backend:
    """Build the backend that a key stands for, once."""
    name, _, options = key.partition(" ")
    return backends[name](**json.loads(options or "{}")).build()


backend_of("eager")  # the reference is at hand


def chosen(backend: str, plan: Plan, call: Call) -> str:
    """Choose a backend where nobody did: the first that says it suits, else eager."""
    if backend != "auto":
        return backend
    if plan.natives.refused:
        return "eager"
    each = ((name, backend_of(name).whole) for name in backends.names())
    found = next((name for name, whole in each if whole is not None and whole.suits(plan, call)), "eager")
    return plan.natives.instead.get(found, found)


def chosen_in_words(plan: Plan) -> str:
    """Say what runs calls where nobody chose."""
    if plan.natives.refused:
        return f"eager, because {plan.natives.refused}"
    each = ((name, backend_of(name).whole) for name in backends.names())
    now = plan.natives.instead
    words = ((now.get(name, name), whole.says(plan)) for name, whole in each if whole is not None)
    faults = (f"not {name}, because {why}" for name, why in plan.natives.faults.items())
    return "; ".join([*(f"{name} {when}" for name, when in words if when), *faults, "else eager"])


def run_forward(plan: Plan, call: Call, checkpoints: int, backend: str) -> list[Tensor]:
    """Return [o, *anchor, *registers, position, *checkpoints of anchor, *of registers]."""

    def run(way: Directions, grid: GridCall) -> list[Tensor]:
        return way.forward(grid, checkpoints)

    return _run(backend, plan, call, run, call.flat(), ("forward", checkpoints))


def run_backward(
    plan: Plan, call: Call, saved: list[Tensor], given: Sequence[Tensor | None], checkpoints: int, backend: str
) -> list[Tensor]:
    """Return the gradients of a call's floating tensors, in order; given: of [o, *anchor, *registers], None for 0."""

    def run(way: Directions, grid: GridCall) -> list[Tensor]:
        return way.backward(grid, saved, _filled(plan, call, given), checkpoints)

    there = [g for g in given if g is not None]
    words = ("backward", checkpoints, len(saved), *(g is None for g in given))
    return _run(backend, plan, call, run, [*call.flat(), *saved, *there], words)


def _run(
    backend: str, plan: Plan, call: Call, run: Callable[[Directions, GridCall], list[Tensor]], given: list[Tensor],
    words: Words
) -> list[Tensor]:  # fmt: skip
    """Let a backend that takes calls whole run this one, else the loop; given: all tensors, words: all else."""
    name = chosen(backend, plan, call)
    taken = backend_of(name)
    whole = taken.whole

    def ready() -> Callable[[], list[Tensor]]:
        grid = GridCall(plan, call, taken.blocks, taken.prepare)
        way = loop if whole is None or not grid.blocks else whole
        if way is whole and (plan.is_checked or backend == "auto"):
            keeps = words[0] == "forward" and words[1]
            _check(name, plan, grid, "forward some" if keeps else str(words[0]))
        return lambda: own(run(way, grid), given)

    if whole is None:
        return ready()()
    try:
        return whole.again(plan, call, given, words, ready)
    except BackendError as error:
        if backend != "auto":
            raise
        if isinstance(error, Unseen):
            return own(run(loop, GridCall(plan, call)), given)
        options = whole.instead() if isinstance(error, Miscompiled) else None
        if options is not None:
            base = name.partition(" ")[0]
            plan.natives.instead[base] = other = backends_key((base, options))
            plan.natives.faults[name] = str(error)
            warnings.warn(f"{error} The calls of this program try backend={other!r}.", stacklevel=2)
            return _run(backend, plan, call, run, given, words)
        plan.natives.refused = str(error)
        warnings.warn(f"{error} The calls of this program run on backend='eager'.", stacklevel=2)
        return own(run(loop, GridCall(plan, call)), given)


def _filled(plan: Plan, call: Call, given: Sequence[Tensor | None]) -> list[Tensor]:
    """Write the zeros of outputs that nothing depends on: those of the state in one place, as nobody writes there."""
    o, B, registers = given[0], call.q.shape[0], (len(call.start),)
    if o is None:
        o = call.q.new_zeros(*call.q.shape[:3], plan.derivation.out_width, dtype=plan.out_dtype(call))
    shapes = [(B, w.shape[0], *r, *w.shape[1:]) for r in ((), registers) for w in call.init.values()]
    missing = [math.prod(shape) for shape, g in zip(shapes, given[1:], strict=True) if g is None]
    zeros = next(iter(call.init.values())).new_zeros(max(missing)) if missing else None

    def zero(shape: tuple[int, ...]) -> Tensor:
        assert zeros is not None
        return zeros[: math.prod(shape)].view(shape)

    return [o, *(zero(shape) if g is None else g for shape, g in zip(shapes, given[1:], strict=True))]


def own(found: Iterable[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors as an operator may: no memory that it was given or returns twice, each laid out as its fake."""
    taken, made = set(map(memory_of, given)), []
    for x in found:
        y = x.contiguous()
        y = y.clone(memory_format=torch.contiguous_format) if memory_of(y) in taken else y
        taken.add(memory_of(y))
        made.append(y)
    return made


def _check(name: str, plan: Plan, run: GridCall, way: str) -> None:
    """Compare generated code with eager at its first use, for each kind of block, on a part of the call, unless it was
    seen right before.

    way: "backward", "forward", or "forward some", which keeps states for a backward and may be code of its own.
    """
    whole, kinds, variants = backend_of(name).whole, run.call.kinds, frozenset(run.grid.variants)
    assert whole is not None
    each, place = whole.as_run(name, run, way == "backward")
    for as_run in each:
        key = (as_run, way, variants, kinds, place, plan.is_checked)
        if key in plan.natives.checked:
            continue
        with TRACING:
            if key not in plan.natives.checked and not _is_trusted(name, plan, run, way, key):
                words = (as_run, way, sorted(map(tuple, variants)), kinds, place)
                _compare(name, plan, key, words, partial(_unlike, as_run, plan, run, way))


def _is_trusted(name: str, plan: Plan, run: GridCall, way: str, key: Words) -> bool:
    """Need nothing be compared, now and later?"""
    whole = backend_of(name).whole
    assert whole is not None
    seen = whole.seen(run, way)
    if seen is False and not plan.is_checked:
        raise Unseen(f"{name}: its code is not in the record of what was seen right, and prove=False compares nothing.")
    if seen or not plan.is_checked:
        plan.natives.checked.add(key)
    return key in plan.natives.checked


def _compare(name: str, plan: Plan, key: Words, words: Words, unlike: Callable[[], str]) -> None:
    """Compare code with eager, or remember what was found: what differs, or does not end well, is not run again."""
    whole = backend_of(name).whole
    assert whole is not None

    def wrong() -> str:
        try:
            found = unlike()
        except Stopped:
            raise
        except Miscompiled as error:
            return str(error)
        return found and (
            f"{name}: its code and eager differ in {found}; expected the same numbers. This is a fault of dualform or "
            "of the compiler, please report it; backend='eager' is the reference."
        )

    plan.natives.checked.add(key)  # what compares runs the same
    try:
        with whole.trial():
            if found := proof.kernel(plan.derivation.structure, words, wrong):
                raise Miscompiled(found)
    except BaseException:
        plan.natives.checked.discard(key)
        raise


def check_step(name: str, plan: Plan, call: Call) -> None:
    """Compare the code for one token with eager at its first use, inside a mini-batch and at its end."""
    assert call.before is not None
    whole, before, chunk = backend_of(name).whole, call.before, plan.derivation.chunk
    known = call.q.device.type == "cpu"  # a card would have to be waited for, at each token: there both are compared
    key = (name, "step", known and int(before.position[0]) + 1 == chunk, str(call.q.dtype), plan.is_checked)
    if whole is None or key in plan.natives.checked:
        return
    run = GridCall(plan, call)
    if _is_trusted(name, plan, run, "step", key):
        return

    def compare() -> str:
        for n, over in product((None,) if known else (0, chunk - 1), (False, True)):
            there = before._map(torch.clone)
            there = there if n is None else replace(there, position=torch.full_like(before.position, n))
            one = call._replace(before=there)
            right = _named(call, run_forward(plan, one, 0, "eager"))
            got = whole.step(plan, one, over)
            if got is not None and (unlike := proof.unlike(_named(call, got), right, call.q.dtype)):
                return unlike
        return ""

    _compare(name, plan, key, (*key, *whole.as_run(name, run, False)), compare)


def _named(call: Call, results: list[Tensor]) -> dict[str, Tensor]:
    """Name a call's outputs and the state after it."""
    names = ["the outputs", *(f"the state's {part} {n}" for part in ("anchor", "register") for n in call.init)]
    return dict(zip(names, results, strict=False))


def _unlike(name: str, plan: Plan, run: GridCall, way: str) -> str:
    """Say what generated code and eager differ in, nothing if in nothing: on two rows of a call,
    and of their tokens as many as have every kind of block, if few do."""
    b = plan.derivation.chunk
    T = run.T if run.T <= 3 * b else 2 * b + (run.T + int(run.call.state.position[0])) % b
    call = run.call.part(slice(0, 2), T)
    if way != "backward":
        sides = [run_forward(plan, call, int(way != "forward"), side) for side in (name, "eager")]
        return proof.unlike(_named(call, sides[0]), _named(call, sides[1]), call.q.dtype)
    made, held = run_forward(plan, call, 1, "eager"), 1 + 2 * len(call.init)  # whose states both sides begin with
    g = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=g).to(x) for x in made[:held]]
    sides = [run_backward(plan, call, made[held + 1 :], cotangents, 1, side) for side in (name, "eager")]
    got, right = ({f"gradient {n}": x for n, x in enumerate(side)} for side in sides)
    return proof.unlike(got, right, call.q.dtype)

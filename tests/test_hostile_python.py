"""Python that researchers write around a learner: it is taken, and what changes there is seen at the next call."""

import argparse
import collections
import contextvars
import ctypes
import enum
import functools
import importlib
import multiprocessing
import os
import sys
import threading
import types
import typing
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrence import by_hand
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dualform as df

DOUBLE = torch.float64
gain = 1.0
words = ["gain"]
settings = types.ModuleType("hostile_python_settings")
setting: contextvars.ContextVar[float] = contextvars.ContextVar("setting", default=1.0)


class Scaled(nn.Module):
    """A linear map whose output goes through a function of the user's."""

    def __init__(self, g: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) / 4)
        self.g = g
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self, x @ self.w)


class Act(enum.Enum):
    SCALE = (1.0,)

    def __call__(self, y: Tensor) -> Tensor:
        return y * gain


class Table(enum.Enum):
    ROWS = [1.0]


class Config(dict[str, Any]):
    """A dict whose keys are attributes, and which takes no others."""

    factor = 1.0

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("frozen")

    @property
    def scaled(self) -> float:
        return self["a"] * self.factor * gain


class Alias(dict[str, Any]):
    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Ordered(collections.OrderedDict[str, Any]):
    pass


class Counting(collections.defaultdict[str, Any]):
    pass


class Rows(list[Any]):
    pass


class Pair(typing.NamedTuple):
    a: float

    @property
    def scaled(self) -> float:
        return self.a * gain


class Number(float):
    pass


class Word(str):
    __slots__ = ()


class Kind(type):
    factor = 1.0

    @property
    def scaled(cls) -> float:
        return cls.factor * gain


class Static(metaclass=Kind):
    pass


class Dunder:
    __gain__ = 1.0
    __call__ = functools.partialmethod(lambda self, y, k: y * k, k=1.0)


class Said:
    """Cannot be read, and says what it is."""

    def __init__(self) -> None:
        self.k, self.lock = 1.0, multiprocessing.Lock()

    def __fingerprint__(self) -> tuple[float]:
        return (self.k,)


class Slots:
    """Keeps what it holds beside any `__dict__`, one of it under a private name."""

    __slots__ = ("__k", "part")

    def __init__(self, part: Any = None) -> None:
        self.part, self.__k = part, [1.0]

    @property
    def k(self) -> list[float]:
        return self.__k


class Slotted(Scaled):
    __slots__ = ("held",)


class Local(threading.local):
    """Each thread's own."""

    def __init__(self, part: Any = None) -> None:
        self.part, self.k = part, 1.0


class Fields(ctypes.Structure):
    _fields_ = [("k", ctypes.c_double)]


def _tensor(**attributes: float) -> Tensor:
    t = torch.ones(4, dtype=DOUBLE)
    t.__dict__.update(attributes)
    return t


def _rows() -> Rows:
    rows = Rows([1.0])
    rows.k = 1.0  # type: ignore[attr-defined]
    return rows


def _set(holder: Any, name: str, value: Any) -> Callable[[Any], None]:
    return lambda s: setattr(holder, name, value)


def _global(s: Any) -> None:
    globals()["gain"] = 2.0


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "global in an enum's method": (lambda: Scaled(lambda s, y: s.a(y), a=Act.SCALE), _global),
    "value of an enum's member": (
        lambda: Scaled(lambda s, y: y * s.a.value[0], a=Table.ROWS),
        lambda s: Table.ROWS.value.__setitem__(0, 2.0),
    ),
    "class of a dict": (lambda: Scaled(lambda s, y: y * s.c.scaled, c=Config(a=1.0)), _set(Config, "factor", 2.0)),
    "global in a dict's method": (lambda: Scaled(lambda s, y: y * s.c.scaled, c=Config(a=1.0)), _global),
    "item of a dict of attributes": (
        lambda: Scaled(lambda s, y: y * s.c.a, c=Config(a=1.0)),
        lambda s: dict.__setitem__(s.c, "a", 2.0),
    ),
    "attribute of a dict of attributes": (
        lambda: Scaled(lambda s, y: y * s.c.a, c=Alias(a=1.0)),
        lambda s: setattr(s.c, "a", 2.0),
    ),
    "attribute of a list": (lambda: Scaled(lambda s, y: y * s.c.k, c=_rows()), lambda s: setattr(s.c, "k", 2.0)),
    "global in a tuple's method": (lambda: Scaled(lambda s, y: y * s.c.scaled, c=Pair(1.0)), _global),
    "a number of another class": (
        lambda: Scaled(lambda s, y: y * s.c, c=Number(1.0)),
        lambda s: setattr(s, "c", Number(2.0)),
    ),
    "a word of another class": (
        lambda: Scaled(lambda s, y: getattr(torch, s.c)(y), c=Word("tanh")),
        lambda s: setattr(s, "c", Word("sin")),
    ),
    "metaclass": (lambda: Scaled(lambda s, y: y * Static.scaled), _set(Kind, "factor", 2.0)),
    "global in a metaclass": (lambda: Scaled(lambda s, y: y * s.c.scaled, c=Static), _global),
    "class attribute of two underscores": (
        lambda: Scaled(lambda s, y: y * s.c.__gain__, c=Dunder()),
        _set(Dunder, "__gain__", 2.0),
    ),
    "special method that is no function": (
        lambda: Scaled(lambda s, y: s.c(y), c=Dunder()),
        _set(Dunder, "__call__", functools.partialmethod(lambda self, y, k: y * k, k=2.0)),
    ),
    "what an object says of itself": (
        lambda: Scaled(lambda s, y: y * s.c.k, c=Said()),
        lambda s: setattr(s.c, "k", 2.0),
    ),
    "names in a constant tuple": (
        lambda: Scaled(lambda s, y: y * sum(getattr(settings, n) for n in ("scale", "shift"))),
        _set(settings, "scale", 2.0),
    ),
    "name that an attribute holds": (
        lambda: Scaled(lambda s, y: y * getattr(settings, s.name), name="scale"),
        _set(settings, "scale", 2.0),
    ),
    "global whose name is data": (lambda: Scaled(lambda s, y: y * globals()[words[0]]), _global),
    "module by its name": (
        lambda: Scaled(lambda s, y: y * importlib.import_module("hostile_python_settings").scale),
        _set(settings, "scale", 2.0),
    ),
    "module in sys.modules": (
        lambda: Scaled(lambda s, y: y * sys.modules[s.name].scale, name="hostile_python_settings"),
        _set(settings, "scale", 2.0),
    ),
    "variable of the process": (
        lambda: Scaled(lambda s, y: y * float(os.environ["HOSTILE_SCALE"])),
        lambda s: os.environ.__setitem__("HOSTILE_SCALE", "2.0"),
    ),
    "attribute of a tensor": (
        lambda: Scaled(lambda s, y: y * s.c.k + s.c, c=_tensor(k=1.0)),
        lambda s: setattr(s.c, "k", 2.0),
    ),
    "new attribute of a tensor": (
        lambda: Scaled(lambda s, y: y * getattr(s.c, "k", 1.0) + s.c, c=_tensor()),
        lambda s: setattr(s.c, "k", 2.0),
    ),
    "private slot": (lambda: Scaled(lambda s, y: y * s.c.k[0], c=Slots()), lambda s: s.c.k.__setitem__(0, 2.0)),
    "variable of a thread": (lambda: Scaled(lambda s, y: y * s.c.k, c=Local()), lambda s: setattr(s.c, "k", 2.0)),
    "field of C's": (lambda: Scaled(lambda s, y: y * s.c.k, c=Fields(1.0)), lambda s: setattr(s.c, "k", 2.0)),
    "variable of the context": (lambda: Scaled(lambda s, y: y * setting.get()), lambda s: setting.set(2.0)),
}


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as it was before a change."""
    monkeypatch.setitem(globals(), "gain", 1.0)
    monkeypatch.setattr(settings, "scale", 1.0, raising=False)
    monkeypatch.setattr(settings, "shift", 0.0, raising=False)
    monkeypatch.setitem(sys.modules, "hostile_python_settings", settings)
    monkeypatch.setenv("HOSTILE_SCALE", "1.0")
    monkeypatch.setattr(Config, "factor", 1.0)
    monkeypatch.setattr(Kind, "factor", 1.0)
    monkeypatch.setattr(Dunder, "__gain__", 1.0)
    monkeypatch.setattr(Dunder, "__call__", vars(Dunder)["__call__"])
    Table.ROWS.value[0] = 1.0


def _x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def _run(program: df.ChunkProgram, x: Tensor) -> Tensor:
    q, k, v = (y[None, :, None] for y in (x, x.sin(), x.cos()))
    return program(q, k, v)[0][0, :, 0]


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_at_the_next_call(what: str) -> None:
    make, change = CHANGES[what]
    learner, x = make(), _x()

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # all of it can be read
            program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
            torch.testing.assert_close(_run(program, x), by_hand(learner, x))
            before = _run(program, x)
            change(learner)
            after = _run(program, x)
        assert not torch.allclose(before, after, rtol=1e-2)
        torch.testing.assert_close(after, by_hand(learner, x))

    contextvars.copy_context().run(run)


def test_a_hook_of_every_module_is_seen_at_the_next_call() -> None:
    part = nn.Linear(4, 4, dtype=DOUBLE)
    learner, x = Scaled(lambda s, y: part(y)), _x()
    learner.part = part
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    before = _run(program, x)

    def doubled(module: nn.Module, args: Any, y: Any) -> Any:
        return 2 * y if type(module) is nn.Linear else y

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        after, expected = _run(program, x), by_hand(learner, x)
    finally:
        handle.remove()
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(_run(program, x), before)


def test_a_context_variable_is_the_caller_s_at_derive() -> None:
    learner, x = Scaled(lambda s, y: y * setting.get()), _x()

    def run() -> None:
        setting.set(3.0)
        program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
        torch.testing.assert_close(_run(program, x), by_hand(learner, x))

    contextvars.copy_context().run(run)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "frozen": lambda part: Config(part=part),
    "alias": lambda part: Alias(part=part),
    "ordered": lambda part: Ordered(part=part),
    "counting": lambda part: Counting(lambda: None, part=part),
    "user dict": lambda part: collections.UserDict(part=part),
    "namespace": lambda part: types.SimpleNamespace(part=part),
    "arguments": lambda part: argparse.Namespace(part=part),
    "queue": lambda part: collections.deque([part]),
    "slots": Slots,
    "variable of a thread": Local,
    "set": lambda part: {part},
    "frozen set": lambda part: frozenset([part]),
    "weak set": lambda part: weakref.WeakSet([part]),
    "weak reference": lambda part: weakref.ref(part),
    "weak proxy": lambda part: collections.deque([weakref.proxy(part)]),
    "weak values": lambda part: weakref.WeakValueDictionary(part=part),
    "read-only": lambda part: types.MappingProxyType({"part": part}),
    "chain": lambda part: collections.ChainMap({}, {"part": part}),
    "cache": lambda part: functools.lru_cache(lambda: part),
    "key": lambda part: {part: 1.0},
}


def _part(held: Any) -> Any:
    if isinstance(held, types.SimpleNamespace | argparse.Namespace | Slots | Local):
        return held.part
    if isinstance(held, set | frozenset | weakref.WeakSet) or (isinstance(held, dict) and 1.0 in held.values()):
        return next(iter(held))
    return held() if callable(held) else held[0 if isinstance(held, collections.deque) else "part"]


@pytest.mark.parametrize("holder", HOLDERS)
def test_parts_in_whatever_holds_them_learn(holder: str) -> None:
    part = nn.Linear(4, 4, dtype=DOUBLE)
    held = HOLDERS[holder](part)
    learner, x = Scaled(lambda s, y: y + torch.tanh(_part(s.c)(y)), part=part, c=held), _x()
    learner.add_module("again", part)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))
    assert learner.c is held
    assert _part(held) in (part, weakref.proxy(part))


def test_a_part_in_a_module_s_own_slot_learns() -> None:
    part = nn.Linear(4, 4, dtype=DOUBLE)
    learner, x = Slotted(lambda s, y: y + torch.tanh(s.held[0](y)), part=part), _x()
    learner.held = [part]
    learner.add_module("again", part)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))


def test_attributes_of_a_weight_are_there_when_it_learns() -> None:
    learner, x = Scaled(lambda s, y: y * s.w.k), _x()
    learner.w.k = 3.0  # type: ignore[attr-defined]
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(Scaled(lambda s, y: y * 3.0), x))


def test_variables_of_a_thread_are_the_caller_s_at_derive() -> None:
    learner, x = Scaled(lambda s, y: y * s.c.k, c=Local()), _x()
    learner.c.k = 3.0
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))


SETTINGS: dict[str, tuple[Callable[[], float], Callable[[], Any]]] = {
    "threads": (lambda: float(torch.get_num_threads()), lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "seed": (lambda: float(torch.initial_seed() % 7 + 1), lambda: torch.manual_seed(torch.initial_seed() + 1)),
    "precision": (
        lambda: float(len(torch.get_float32_matmul_precision())),
        lambda: torch.set_float32_matmul_precision("high"),
    ),
    "determinism": (
        lambda: 1.0 + torch.are_deterministic_algorithms_enabled(),
        lambda: torch.use_deterministic_algorithms(True),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_code_asks_of_torchs_settings_is_seen_at_the_next_call(name: str) -> None:
    ask, change = SETTINGS[name]
    learner, x = Scaled(lambda s, y: y * ask() / 4), _x()
    before = torch.get_num_threads(), torch.initial_seed(), torch.get_float32_matmul_precision()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    old = _run(program, x)
    try:
        change()
        torch.testing.assert_close(_run(program, x), by_hand(learner, x))
        assert not torch.allclose(_run(program, x), old)
    finally:
        torch.set_num_threads(before[0])
        torch.manual_seed(before[1])
        torch.set_float32_matmul_precision(before[2])
        torch.use_deterministic_algorithms(False)


def test_what_a_pointer_points_at_cannot_be_read() -> None:
    number = ctypes.c_double(1.0)
    learner, x = Scaled(lambda s, y: y * s.c.contents.value, c=ctypes.pointer(number)), _x()
    with pytest.warns(UserWarning, match="LP_c_double"):
        program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    number.value = 2.0
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))


kind = type
TOLD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "type": lambda s, y: y.tanh() if type(y) is Tensor else y,
    "another name of it": lambda s, y: y.tanh() if kind(y) is Tensor else y,
    "a table by type": lambda s, y: y * {Tensor: 2.0}.get(type(y), 1.0),
    "class": lambda s, y: y.tanh() if y.__class__ is Tensor else y,
    "its name": lambda s, y: y.tanh() if type(s.w).__name__ == "Parameter" else y,
    "a parameter": lambda s, y: y.tanh() if isinstance(s.w, nn.Parameter) else y,
    "only for gradients": lambda s, y: y if type(y) is Tensor else y.detach() + s.w.sum(),
    "an error": lambda s, y: s.nothing if type(y) is Tensor else y,
    "a leaf": lambda s, y: y.tanh() if s.w.is_leaf else y,
    "a token's gradient": lambda s, y: y.tanh() if y.requires_grad else y,
    "a weight's gradient": lambda s, y: y.tanh() if s.w.requires_grad else y,
    "gradients at all": lambda s, y: y.tanh() if torch.is_grad_enabled() else y,
    "an attribute of its own": lambda s, y: y.tanh() if hasattr(s.w, "node") else y,
    "a view": lambda s, y: y.tanh() if s.w._base is None else y,
    "where it lies": lambda s, y: y.tanh() if s.w.is_contiguous() and not s.w.storage_offset() else y,
}


@pytest.mark.parametrize("how", TOLD)
def test_what_tells_a_tensor_from_its_stand_in_is_refused_by_line(how: str) -> None:
    with pytest.raises(ValueError, match=rf'"{how}": lambda.*test_hostile_python.py.*tells a tensor'):
        df.derive(Scaled(TOLD[how]), chunk=3, prove=False)


def test_an_objective_and_a_jacobian_that_tell_types_apart_are_refused() -> None:
    def loss(p: Tensor, v: Tensor) -> Tensor:
        return (p - v).square().sum(-1) * (1.0 if type(p) is Tensor else 2.0)

    with pytest.raises(ValueError, match=r"1\.0 if type.*tells a tensor"):
        df.derive(nn.Linear(4, 4), loss, chunk=3, prove=False)
    with pytest.raises(ValueError, match="tells a tensor"):
        df.jacobian(lambda x: x.sin() if type(x) is Tensor else 2 * x, torch.ones(2))


@pytest.mark.parametrize(
    "read", [lambda y: y.sum().item(), lambda y: y.numpy(), lambda y: float(y.max()), lambda y: y.tolist()]
)
def test_a_refusal_that_the_function_catches_stands(read: Callable[[Tensor], Any]) -> None:
    """On numbers nothing is raised, and the function goes another way."""

    def tries(s: Any, y: Tensor) -> Tensor:
        try:
            read(y.detach())
        except Exception:
            return y
        return 2 * y

    with pytest.raises(ValueError, match=r"test_hostile_python\.py:\d+\)` .*(reads|reaches|leaves|failed)"):
        df.derive(Scaled(tries), chunk=3, prove=False)


def test_what_gradients_alone_ask_for_is_taken() -> None:
    """Hooks and checkpoints where there are gradients; and a tensor is told to have one."""

    def g(s: Any, y: Tensor) -> Tensor:
        h = (y @ s.w).tanh()
        if h.requires_grad and torch.is_grad_enabled():
            h.register_hook(lambda g: 2 * g)
            h = checkpoint(torch.sin, h, use_reentrant=False)
        else:
            h = h.sin()
        z = h.detach()
        z.requires_grad = True
        return h + z

    learner, x = Scaled(g), _x()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))


def test_asking_for_types_that_are_the_same_is_taken() -> None:
    def g(s: Any, y: Tensor) -> Tensor:
        k = {Scaled: 2.0}.get(type(s), 1.0)
        return y * k * len(type(s).__name__) if issubclass(y.__class__, Tensor) else y

    learner, x = Scaled(g), _x()
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))


@pytest.mark.parametrize("make", [multiprocessing.Lock, lambda: multiprocessing.Value("d", 1.0)])
def test_what_belongs_to_several_processes_is_said_once_by_name(make: Callable[[], Any]) -> None:
    held: Any = make()
    learner, x = Scaled(lambda s, y: y * getattr(s.c, "value", 1.0), c=held), _x()
    with pytest.warns(UserWarning, match="multiprocessing"):
        program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))
    if hasattr(held, "value"):
        held.value = 2.0
        torch.testing.assert_close(_run(program, x), by_hand(learner, x))


class Dispatched(nn.Module):
    """Experts that gather their tokens, as public mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, dtype=DOUBLE)
        self.experts = nn.ModuleList(nn.Linear(4, 4, dtype=DOUBLE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            which, tokens = torch.where(torch.nn.functional.one_hot(chosen, 3).permute(2, 1, 0)[k])
            found = expert(x[None, tokens].reshape(-1, 4)) * weights[tokens, which, None]
            y.index_add_(0, tokens, found)
        return y


def test_tokens_that_are_gathered_by_value_are_refused_for_that() -> None:
    with pytest.raises(ValueError, match=r"torch\.where\(.*reads a tensor's values"):
        df.derive(Dispatched(), chunk=3)

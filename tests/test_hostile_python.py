"""Python that researchers write around a learner: it is taken, and what changes there is seen at the next call."""

import collections
import contextvars
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrence import by_hand
from torch import Tensor, nn

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


def _x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def _run(program: df.ChunkProgram, x: Tensor) -> Tensor:
    q, k, v = (y[None, :, None] for y in (x, x.sin(), x.cos()))
    return program(q, k, v)[0][0, :, 0]


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
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_parts_in_a_dict_of_the_user_s_class_learn(holder: str) -> None:
    part = nn.Linear(4, 4, dtype=DOUBLE)
    held = HOLDERS[holder](part)
    learner, x = Scaled(lambda s, y: y + torch.tanh(s.c["part"](y)), part=part, c=held), _x()
    learner.add_module("again", part)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3, prove=False)
    torch.testing.assert_close(_run(program, x), by_hand(learner, x))
    assert learner.c is held
    assert held["part"] is part

"""Learners whose ops have new rows: what is inside a token may be convolved, normalised in groups, sorted, compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualform as df

K = 6


class Learner(nn.Module):
    """Parts, and what is done with them and a row of tokens."""

    def __init__(self, forward: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.parts)


def convolved(x: Tensor, conv: nn.Module, norm: nn.Module, out: nn.Module) -> Tensor:
    h = norm(conv(x.reshape(-1, 1, K)))
    return out(F.gelu(h).reshape(*x.shape[:-1], 2 * K))


def sorted_(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
    return last(first(x).topk(4, -1)[0].unflatten(-1, (2, 2)).max(-1)[0])


LEARNERS: dict[str, Callable[[], Learner]] = {
    "conv1d and group norm": lambda: Learner(
        convolved, nn.Conv1d(1, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Linear(2 * K, K)
    ),
    "bilinear": lambda: Learner(lambda x, b: b(x, x.tanh()), nn.Bilinear(K, K, K)),
    "topk and max": lambda: Learner(sorted_, nn.Linear(K, K), nn.Linear(2, K)),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_dual_is_primal(name: str) -> None:
    torch.manual_seed(1)
    learner = LEARNERS[name]().double()
    program = df.derive(learner, df.objectives.Squared(), df.rules.SGD(lr=0.1), chunk=3)
    q, k, v = (torch.randn(2, 4, 2, K, dtype=torch.float64) for _ in range(3))
    (o, state), (expected, final) = (program(q, k, v, form=form) for form in ("auto", "primal"))
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.anchor, final.anchor, rtol=1e-10, atol=1e-10)


def test_tokens_that_are_sorted_among_each_other_are_refused() -> None:
    learner = Learner(lambda x, f: f(x).sort(0)[0], nn.Linear(K, K))
    with pytest.raises(ValueError, match=r"mixes tokens at .*sort\(0\).*makes one row depend on others"):
        df.derive(learner.double(), df.objectives.Squared(), df.rules.SGD(), chunk=3)


def test_an_index_of_other_tokens_is_refused() -> None:
    def crossed(x: Tensor, f: nn.Module) -> Tensor:
        return f(x).gather(-1, x.argsort(-1).flip(0))

    with pytest.raises(ValueError, match="mixes tokens"):
        df.derive(Learner(crossed, nn.Linear(K, K)).double(), df.objectives.Squared(), df.rules.SGD(), chunk=3)

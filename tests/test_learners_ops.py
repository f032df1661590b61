"""Learners whose ops have new rows: what is inside a token may be convolved, normalised in groups, sorted, compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualform as df
from dualform.graphs.trace import trace
from dualform.learning.batched import mapped

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


def attending(x: Tensor, query: nn.Module, memory: nn.Module) -> Tensor:
    """Attention to a memory of four learned slots."""
    keys = memory.weight.unflatten(-1, (2, K))
    return F.scaled_dot_product_attention(query(x).unsqueeze(-2), keys[:, 0], keys[:, 1]).squeeze(-2)


def filtered(x: Tensor, kernel: nn.Module, last: nn.Module) -> Tensor:
    """A circular convolution along the token, by transforms; the kernel is a fast weight."""
    return last(torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(kernel.weight[0]), n=K))


def layer_normed(x: Tensor, norm: nn.Module, last: nn.Module) -> Tensor:
    """By the op of three results, as torch.vmap writes it."""
    return last(torch.native_layer_norm(x, (K,), norm.weight, norm.bias, norm.eps)[0].tanh())


def by_steps(x: Tensor, part: nn.Module, steps: int) -> Tensor:
    """A whole sequence inside each token."""
    made = part(x.reshape(-1, steps, K // steps))
    return (made[0] if isinstance(made, tuple) else made).reshape(x.shape)


LEARNERS: dict[str, Callable[[], Learner]] = {
    "conv1d and group norm": lambda: Learner(
        convolved, nn.Conv1d(1, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Linear(2 * K, K)
    ),
    "bilinear": lambda: Learner(lambda x, b: b(x, x.tanh()), nn.Bilinear(K, K, K)),
    "topk and max": lambda: Learner(sorted_, nn.Linear(K, K), nn.Linear(2, K)),
    "sort": lambda: Learner(lambda x, f, g: g(f(x).sort(-1, descending=True)[0]), nn.Linear(K, K), nn.Linear(K, K)),
    "cumsum": lambda: Learner(lambda x, f, g: g(f(x).cumsum(-1).tanh()), nn.Linear(K, K), nn.Linear(K, K)),
    "attention": lambda: Learner(attending, nn.Linear(K, K), nn.Linear(2 * K, 4, bias=False)),
    "filter": lambda: Learner(filtered, nn.Linear(K, 1, bias=False), nn.Linear(K, K)),
    "complex product": lambda: Learner(
        lambda x, f, g: g(torch.view_as_real(torch.view_as_complex(f(x).unflatten(-1, (3, 2))) * (1 + 2j)).flatten(-2)),
        nn.Linear(K, K),
        nn.Linear(K, K),
    ),
    "layer norm of three results": lambda: Learner(layer_normed, nn.LayerNorm(K), nn.Linear(K, K)),
    "layer norm, mapped": lambda: Learner(
        lambda x, f, g: torch.vmap(lambda row: g(f(row)))(x), nn.LayerNorm(K), nn.Linear(K, K)
    ),
    "mapped over columns": lambda: Learner(
        lambda x, f: torch.vmap(f, -1, -1)(x.unflatten(-1, (2, 3))).flatten(-2), nn.Linear(2, 2)
    ),
    "convolution of one place": lambda: Learner(
        lambda x, f: f(x[..., None].flatten(0, -3)).reshape(x.shape), nn.Conv1d(K, K, 3, padding=1)
    ),
    "transformer inside": lambda: Learner(
        lambda x, f: by_steps(x, f, 3), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
    ),
    "two-layer gru inside": lambda: Learner(lambda x, f: by_steps(x, f, 2), nn.GRU(3, 3, 2, batch_first=True)),
    "spectrum": lambda: Learner(
        lambda x, f, g: g(torch.fft.rfft(f(x)).abs()), nn.Linear(K, K), nn.Linear(K // 2 + 1, K)
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_dual_is_primal(name: str) -> None:
    torch.manual_seed(1)
    learner = LEARNERS[name]().double()
    program = df.derive(learner, df.objectives.Squared(), df.rules.SGD(lr=0.1), chunk=3)
    tokens = [torch.randn(2, 4, 2, K, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = []
    for form in ("auto", "primal"):
        o, state = program(*tokens, form=form)
        loss = o.pow(2).sum() + sum(leaf.pow(3).sum() for leaf in state.anchor.values())
        found.append((o, state.anchor, torch.autograd.grad(loss, [*tokens, *learner.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_what_vmap_loops_over_is_refused_with_the_way_on() -> None:
    cell = Learner(lambda x, f: torch.vmap(lambda row: f(row[None])[0])(x), nn.GRUCell(K, K))
    with (
        pytest.warns(UserWarning, match="batching rule for aten::gru_cell"),
        pytest.raises(ValueError, match=r"torch\.vmap makes such a loop: call that on all rows"),
    ):
        df.derive(cell.double(), chunk=3)


def test_tokens_that_are_sorted_among_each_other_are_refused() -> None:
    learner = Learner(lambda x, f: f(x).sort(0)[0], nn.Linear(K, K))
    with pytest.raises(ValueError, match=r"mixes tokens at .*sort\(0\).*makes one row depend on others"):
        df.derive(learner.double(), df.objectives.Squared(), df.rules.SGD(), chunk=3)


def test_an_index_of_other_tokens_is_refused() -> None:
    def crossed(x: Tensor, f: nn.Module) -> Tensor:
        return f(x).gather(-1, x.argsort(-1).flip(0))

    with pytest.raises(ValueError, match="mixes tokens"):
        df.derive(Learner(crossed, nn.Linear(K, K)).double(), df.objectives.Squared(), df.rules.SGD(), chunk=3)


def test_an_op_that_cannot_be_mapped_is_refused_and_not_looped_over() -> None:
    gm = trace(lambda x: torch.ops.aten.unfold_backward(x, [5], 0, 3, 1), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"aten::unfold_backward in a learner's step cannot be mapped over rows"):
        mapped(gm, [False])


def test_a_step_whose_mapping_reshapes_in_place_needs_no_other_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch maps products with vectors, with squeeze_: torch's own tracer takes five times as long."""

    def unused(*_: object) -> None:
        raise AssertionError("torch's own tracer was asked")

    monkeypatch.setattr("dualform.learning.derive._traced_by_torch", unused)
    for name in ("two-layer gru inside", "conv1d and group norm"):
        test_dual_is_primal(name)

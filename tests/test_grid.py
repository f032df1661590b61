"""The grid puts every valid token into its mini-batch, in order, whatever the padding, resets and first positions."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dualform as df
from dualform import testing as laws
from dualform.learning import scan
from dualform.learning.grid import arrange
from dualform.testing.programs import outcome, same_outcome


def walk(T, chunk, position, mask, reset):
    """Say, token by token, what a row does: (mini-batch number, position in it from 1) per valid token, and the end."""
    rows, after = [], []
    for b in range(len(position)):
        i, number, seen = int(position[b]), 0, []
        for t in range(T):
            if reset[b, t]:
                i, number = 0, number + 1
            if mask[b, t]:
                i += 1
                seen.append((t, number, i))
                if i == chunk:
                    i, number = 0, number + 1
        rows.append(seen)
        after.append(i)
    return rows, after


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_grid_is_the_walk(data):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    chunk = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    bits = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)
    masked, resets = data.draw(st.booleans()), data.draw(st.booleans())
    mask = torch.tensor(data.draw(bits)) if masked else torch.ones(B, T, dtype=torch.bool)
    reset = torch.tensor(data.draw(bits)) if resets else torch.zeros(B, T, dtype=torch.bool)
    position = torch.tensor(data.draw(st.lists(st.integers(0, chunk - 1), min_size=B, max_size=B)))
    grid = arrange(T, chunk, position, mask if masked else None, reset if resets else None, torch.float64, data.draw(st.booleans()),
                   data.draw(st.sampled_from([None, None, 1, 2, 3])))  # fmt: skip
    rows, after = walk(T, chunk, position, mask, reset)
    assert grid.position.tolist() == after

    x = torch.arange(1, B * T + 1, dtype=torch.float64).reshape(B, T, 1, 1)
    back, laid = grid.new(x, *x.shape), {}
    for piece in grid.pieces(data.draw(st.sampled_from([1, 2, 4]))):
        assert len({grid.variants[n] for n in piece}) == 1
        found = grid.take(x, piece)
        laid |= {n: found[n - piece.start] for n in piece}
        grid.put(back, piece, found)
    assert list(laid) == list(range(len(grid.variants)))
    assert torch.equal(grid.done(back)[mask], x[mask])
    for b in range(B):
        blocks: dict[int, list] = {}
        for t, number, i in rows[b]:
            blocks.setdefault(number, []).append((float(x[b, t]), float(i)))
        found = []
        for n, variant in enumerate(grid.variants):
            tokens, W = laid[n][b, 0, :, 0], variant.width
            valid = grid.valid[n][b, :W].bool()
            assert not variant.dense or valid.all()
            assert variant.opens or grid.opens is None or not grid.opens[n].any()
            if variant.fresh:
                assert torch.equal(grid.i[n][b, :W][valid], torch.arange(1, W + 1).double()[valid])
            assert grid.i[n].min() >= 1
            assert grid.i[n].max() <= chunk
            here = list(zip(tokens[valid].tolist(), grid.i[n][b, :W][valid].tolist(), strict=True))
            if here:
                found.append(here)
                assert bool(grid.full[n][b]) == (here[-1][1] == chunk)
            else:
                assert not grid.full[n][b]
        assert list(chain(*found)) == list(chain(*blocks.values()))
        assert all(len({i for _, i in part}) == len(part) for part in found)  # no block spans two mini-batches


# -- what padding holds reaches nothing ----------------------------------------------------------------------------


class Unit(nn.Module):
    """Singular where its input is zero."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x / x.norm(dim=-1, keepdim=True) @ self.W)


masks = {
    "a row": [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]],
    "the first row": [[0, 0, 0, 0, 0], [1, 0, 1, 1, 1]],
    "parts": [[0, 0, 1, 1, 0], [1, 0, 1, 0, 0]],
    "all": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("mask", list(masks))
@pytest.mark.parametrize("learner", [Unit, lambda: df.learners.MLP(depth=2)(4)], ids=["singular", "mlp"])
def test_padding_reaches_nothing(learner, mask, fill, resets):
    """Outputs, state and every gradient are those of harmless padding, in both forms,
    carried state and gates included."""
    torch.manual_seed(0)
    program = df.derive(learner().double(), rule=df.rules.SGD(momentum=0.3, decay=0.1), chunk=3)
    p = laws.draw(program, time=5, carried=True)
    valid = torch.tensor(masks[mask], dtype=torch.bool)
    reset = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool) if resets else None
    drawn = {}
    for name, x in p.tensors.items():
        if name in "qkv" or name.startswith("gate."):
            gone = ~valid.reshape(*valid.shape, *[1] * (x.ndim - 2)).expand(x.shape)
            drawn[name] = (x.detach().masked_fill(gone, fill), x.detach())
        else:
            drawn[name] = (x.detach(), x.detach())
    filled, clean = (
        replace(p, mask=valid, reset=reset, tensors={n: t[k].clone().requires_grad_() for n, t in drawn.items()})
        for k in (0, 1)
    )
    wanted = outcome(clean, lambda: clean.run("primal"))
    for form, backend in (("auto", "eager"), ("auto", "auto"), ("primal", "auto")):
        got = outcome(filled, lambda form=form, backend=backend: filled.run(form, backend=backend))
        same_outcome(got, wanted, f"{form} {backend}")


@pytest.mark.parametrize("mask", list(masks))
def test_padding_reaches_nothing_in_generated_code(mask):
    torch.manual_seed(0)
    program = df.derive(Unit().double(), chunk=3)
    x, valid = torch.randn(2, 5, 2, 4, dtype=torch.float64), torch.tensor(masks[mask], dtype=torch.bool)
    x = x.masked_fill(~valid[..., None, None], torch.nan)
    found = []
    for backend in ("eager", "cpp"):
        leaf = x.clone().requires_grad_()
        o, state = program(leaf, leaf, leaf, mask=valid, backend=backend)
        loss = o.square().sum() + sum(w.square().sum() for w in state.anchor.values())
        found.append([o, *state.tensors().values(), *torch.autograd.grad(loss, [leaf, *program.learner.parameters()])])
    for a, b in zip(*found, strict=True):
        laws.agree("cpp", b, a)
        assert a.isfinite().all()


def test_gradients_from_no_kept_state():
    """A graph that was exported without gradients kept none; its backward starts from the state it was given."""
    torch.manual_seed(0)
    program = df.derive(df.learners.MLP()(4).double(), chunk=2)
    x = torch.randn(2, 9, 2, 4, dtype=torch.float64)
    calls = []
    real = scan.scan_op
    for count in (None, 0):
        leaf = x.clone().requires_grad_()
        scan.scan_op = real if count is None else lambda tensors, key, _: real(tensors, key, 0)
        try:
            o, state = program(leaf, leaf, leaf)
        finally:
            scan.scan_op = real
        calls.append(torch.autograd.grad(o.sum() + state.anchor["W1"].sum(), leaf)[0])
    laws.agree("gradient", calls[1], calls[0])

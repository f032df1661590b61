"""The grid puts every valid token into its mini-batch, in order, whatever the padding, resets and first positions."""

from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import assume, given, settings
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


PACKED_RULES = [df.rules.SGD(0.3), df.rules.SGD(0.3, averaged=True), df.rules.SGD(0.3, momentum=0.5, decay=0.1)]


@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 11), max_size=4).map(sorted), chunk=st.integers(1, 5),
    rule=st.sampled_from(PACKED_RULES), way=st.sampled_from([("auto", "eager"), ("auto", "cpp"), ("primal", "eager")]),
    carried=st.booleans(), wide=st.booleans(),
)  # fmt: skip
def test_packed_documents_are_calls_of_their_own(cuts, chunk, rule, way, carried, wide):
    """Outputs, the last state and every outer gradient; the first document goes on from the state that is given."""
    T, ends = 11, [0, *cuts, 11]
    assume(ends[-2] < T)
    torch.manual_seed(len(cuts))
    learner = df.learners.residual_norm(df.learners.MLP(depth=2, expand=1))(4).double()
    program = df.derive(learner, rule=rule, chunk=chunk, prove=False)
    gates = {name: torch.rand(1, T, 2).double().requires_grad_() for name in program.rule.gates if name != "offset"}
    q, k, v = (torch.randn(1, T, 2, 4).double().requires_grad_() for _ in range(3))
    _, before = program(q[:, :3], k[:, :3], v[:, :3]) if carried else (None, None)
    before = before and before.detach()._map(lambda x: x.requires_grad_() if x.is_floating_point() else x)
    end = torch.tensor(ends, dtype=torch.int64 if wide else torch.int32)
    form, backend = way
    o, after = program(q, k, v, gates, state=before, cu_seqlens=end, form=form, backend=backend)
    parts, rest = [], before
    for n, (a, b) in enumerate(pairwise(ends)):
        given = {name: x[:, a:b] for name, x in gates.items()}
        part, last = program(q[:, a:b], k[:, a:b], v[:, a:b], given, state=rest if n == 0 else None)
        parts.append(part)
    results = [[o, *after.tensors().values()], [torch.cat(parts, 1), *last.tensors().values()]]
    leaves = [q, k, v, *gates.values(), *learner.parameters(), *before.tensors().values()] if before else [
        q, k, v, *gates.values(), *learner.parameters()
    ]  # fmt: skip
    leaves = [x for x in leaves if x.is_floating_point()]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    torch.manual_seed(1)
    weights = [torch.randn_like(x) for x in results[0] if x.is_floating_point()]
    grads = [
        torch.autograd.grad(
            sum((w * x).sum() for w, x in zip(weights, [x for x in found if x.is_floating_point()], strict=True)),
            leaves, allow_unused=True, materialize_grads=True,
        )
        for found in results
    ]  # fmt: skip
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (
            torch.tensor([1, 6]),
            r"cu_seqlens is \[1, 6\]; expected lengths that grow from 0 to the number of tokens = 6",
        ),
        (torch.tensor([0, 5]), r"cu_seqlens is \[0, 5\]; expected"),
        (torch.tensor([0, 4, 2, 6]), r"cu_seqlens is \[0, 4, 2, 6\]; expected"),
        (torch.tensor([0, 7, 6]), r"cu_seqlens is \[0, 7, 6\]; expected"),
        (
            torch.tensor([0.0, 6.0]),
            r"cu_seqlens has shape \(2,\) and dtype torch.float32 .* torch.int32 or torch.int64",
        ),
        (torch.tensor([True, False]), "dtype torch.bool"),
        (torch.tensor([[0, 6]]), r"cu_seqlens has shape \(1, 2\)"),
        (torch.tensor([0]), r"cu_seqlens has shape \(1,\)"),
        (torch.tensor(6), r"cu_seqlens has shape \(\)"),
        ([0, 6], r"cu_seqlens is \[0, 6\]; expected a tensor"),
    ],
)
def test_ends_that_are_none_of_the_row_are_refused(ends, message):
    program, x = df.derive(nn.Linear(4, 4), chunk=2, prove=False), torch.ones(1, 6, 1, 4)
    with pytest.raises(ValueError, match=message):
        program(x, x, x, cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"reset is tensor.* both say where documents start"):
        program(x, x, x, cu_seqlens=torch.tensor([0, 6]), reset=torch.zeros(1, 6, dtype=torch.bool))
    x = torch.ones(2, 6, 1, 4)
    with pytest.raises(ValueError, match=r"with batch = 2; expected .* one packed row, batch = 1"):
        program(x, x, x, cu_seqlens=torch.tensor([0, 6]))


def test_packed_documents_in_compiled_code():
    program, x = df.derive(nn.Linear(4, 4), chunk=2, prove=False), torch.randn(1, 6, 1, 4)
    ends = torch.tensor([0, 1, 4, 6])
    run = torch.compile(lambda x, ends: program(x, x, x, cu_seqlens=ends)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x, ends), program(x, x, x, cu_seqlens=ends)[0])

"""What a trace made of a function of plain torch: memory, gradients and values as torch has them."""

from __future__ import annotations

import ctypes
import gc
import random
import re
import sys
from functools import lru_cache
from random import choice
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.random import normal
from recurrence import by_hand
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dualform as df
from dualform.graphs.trace import trace
from dualform.shapes import TraceError
from dualform.testing import check_forms


def _no_view(x: Tensor) -> Tensor:
    h = x * 2
    h.t().reshape(-1).zero_()
    torch.flatten(h.t()).zero_()
    h.t().ravel().zero_()
    return h


def _views(x: Tensor) -> Tensor:
    h = x * 2
    h.ravel()[1:].mul_(3)
    h.view_as(torch.empty(12))[0] = 5
    h.reshape_as(torch.empty(2, 6))[1].mul_(x[0, 0])
    h.mT[0] = 1
    h.T[1].mul_(2)
    h.swapaxes(0, 1)[2].mul_(7)
    h.movedim(0, 1)[3].mul_(7)
    torch.atleast_3d(h).mul_(2)
    torch.broadcast_to(h, (3, 4)).mul_(2)
    h.expand(3, 4).mul_(2)
    h.to(torch.float64).mul_(2)
    h.type_as(x).mul_(2)
    return h


def _same_without_gradients(x: Tensor) -> Tensor:
    h = x * 2
    with torch.no_grad():
        y = h.to(x.dtype)
    return h * y


def _operators(x: Tensor) -> Tensor:
    m = x > 0
    m &= x < 1
    m |= x < -1
    m ^= x < -2
    return x * m


def _diagonal(x: Tensor) -> Tensor:
    h = x[:, :3] * 2
    torch.einsum("ii->i", h).mul_(5)
    return h


@pytest.mark.parametrize("f", [_no_view, _views, _same_without_gradients, _operators, _diagonal])
def test_memory_is_shared_as_in_torch(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(f, x)(x), f(x))
    torch.testing.assert_close(df.jacobian(f, x).dense(), torch.autograd.functional.jacobian(f, x))


def _split(x: Tensor) -> Tensor:
    h = x * 2
    torch.tensor_split(h, 2)[0].mul_(5)
    return h


def test_a_piece_may_be_written_to():
    """In torch, too, where no gradient is asked for."""
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(trace(_split, x)(x), _split(x))


def _data(x: Tensor) -> Tensor:
    h = x * 2
    h.data = x * 5
    return h


@pytest.mark.parametrize("f", [_data])
def test_writes_that_cannot_be_followed_are_refused(f):
    with pytest.raises(TraceError, match=r"writes through|other memory"):
        trace(f, torch.randn(3, 4))


def _narrower(x: Tensor) -> Tensor:
    h = x.float()
    h.add_(x)
    h *= x
    h.pow_(2)
    return h


def _half(x: Tensor) -> Tensor:
    h = x.half()
    h.add_(x.float())
    return h.double()


def _compared(x: Tensor) -> Tensor:
    h = x * 2
    h.gt_(0)
    return h


def _shifted(x: Tensor) -> Tensor:
    n = torch.arange(4)
    n <<= 1
    n |= 1
    n ^= 3
    n >>= 1
    return x * n


@pytest.mark.parametrize("f", [_narrower, _half, _compared, _shifted])
def test_in_place_keeps_the_dtype(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(f, x)(x), f(x))


def _columns(x: Tensor) -> Tensor:
    h = x * 2
    h[:, torch.tensor([1, 3])] = x[:, :2]
    h[:, torch.tensor([True, False, False, False])] = 0
    return h


def test_columns_written_at_places_have_a_derivative():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(df.jacobian(_columns, x).dense(), torch.autograd.functional.jacobian(_columns, x))


def _own_results(x: Tensor) -> Tensor:
    h = x.t().sort(0).values
    h.mul_(2)
    return h


def test_one_of_several_results_may_be_written_to():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(_own_results, x)(x), _own_results(x))


class _Numbers(torch.nn.Module):
    """Numbers that are multiples of the one that stands for rows."""

    def __init__(self):
        super().__init__()
        self.W = torch.nn.Parameter(0.4 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.W).clamp(min=-(2**31 - 1), max=2**31 - 1)
        h = h.div(2**31 - 1).mul(2 * (2**31 - 1))
        h = h + torch.full((4,), 2**31 - 1, dtype=x.dtype) / 2**31 + (torch.arange(4) * (2**31 - 1)) % 5
        return torch.cat([h[..., 1 : 2**31 - 1], x[..., :1]], -1)


class _Rolled(_Numbers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x @ self.W, 2**31 - 1, -1)


def test_large_numbers_of_the_learner_are_no_numbers_of_rows():
    program = df.derive(_Numbers(), rule=df.rules.SGD(lr=0.2), chunk=3, prove=False)
    drawn = torch.Generator().manual_seed(2)
    for B, T, H in [(2, 7, 1), (1, 2, 2)]:
        q, k, v = (torch.randn(B, T, H, 4, dtype=torch.float64, generator=drawn) for _ in range(3))
        got, expected = (program(q, k, v, form=form, backend="eager")[0] for form in ("auto", "primal"))
        torch.testing.assert_close(got, expected)


def test_a_size_that_cannot_be_told_from_rows_is_refused():
    program = df.derive(_Rolled(), chunk=3, prove=False)
    q = torch.zeros(2, 7, 1, 4, dtype=torch.float64)
    with pytest.raises(TraceError, match="has the number"):
        program(q, q, q)


class _Columns(_Numbers):
    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.W).clone()
        h[:, torch.tensor([True, False, False, False])] = 0
        h[..., [1, -1]] = self.W[0, :2]
        return h


def test_a_learner_may_write_columns():
    program = df.derive(_Columns(), rule=df.rules.SGD(lr=0.2), chunk=3, prove=False)
    q, k, v = torch.randn(3, 2, 7, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, expected = (program(q, k, v, form=form, backend="eager")[0] for form in ("auto", "primal"))
    torch.testing.assert_close(got, expected)


# -- memory and numbers that no trace sees ---------------------------------------------------------------------------


def _through_a_plain_one(x: Tensor) -> Tensor:
    _TABLE.numpy()[0] = 7
    return x * _TABLE


def _in_place_of_numpy(x: Tensor) -> Tensor:
    t = torch.ones(4, dtype=x.dtype)
    a = t.numpy()
    a += 3
    return x * t


def _by_a_function_of_numpy(x: Tensor) -> Tensor:
    t = torch.ones(4, dtype=x.dtype)
    np.put(t.numpy(), [0], [7])
    return x * t


def _after_a_look(x: Tensor) -> Tensor:
    t = torch.ones(4, dtype=x.dtype)
    a = t.numpy()
    t[0] = 7
    return x * float(a[0])


def _with(f):
    def run(x: Tensor) -> Tensor:
        t = torch.ones(4, dtype=x.dtype)
        f(t)
        return x * t

    return run


_TABLE = torch.arange(4.0, dtype=torch.float64)
_WRITES = {
    "numpy": _with(lambda t: t.numpy().fill(7)),
    "item of numpy": _with(lambda t: t.numpy().__setitem__(0, 7)),
    "asarray": _with(lambda t: np.asarray(t).__setitem__(0, 7)),
    "memoryview": _with(lambda t: memoryview(t.numpy()).__setitem__(0, 7.0)),
    "forced": _with(lambda t: t.numpy(force=True).__setitem__(0, 7)),
    "out": _with(lambda t: np.add(1, 1, out=t.numpy())),
    "detached": _with(lambda t: t.detach().numpy().sort()),
    "pointer": _with(lambda t: ctypes.memset(t.data_ptr(), 0, 8)),
    "storage": _with(lambda t: t.untyped_storage().fill_(0)),
    "dlpack": _with(lambda t: np.from_dlpack(t).__setitem__(0, 7)),
    "dlpack of torch": _with(lambda t: torch.from_dlpack(t).zero_()),
    "apply": _with(lambda t: t.apply_(lambda v: 7)),
    "map": _with(lambda t: t.map_(t.clone(), lambda a, b: 7)),
    "in place": _in_place_of_numpy,
    "put": _by_a_function_of_numpy,
    "a plain tensor": _through_a_plain_one,
    "after a look": _after_a_look,
}


@pytest.mark.parametrize("name", _WRITES)
def test_writes_past_torch_are_refused_by_line(name):
    before = _TABLE.clone()
    with pytest.raises(TraceError, match=r"\(test_hostile_tracer.py:\d+\)` (reaches|looks at) a tensor's memory"):
        trace(_WRITES[name], torch.ones(4, dtype=torch.float64))
    assert torch.equal(_TABLE, before)


def test_numpy_may_look_and_copy():
    def f(x: Tensor) -> Tensor:
        t = torch.arange(4.0, dtype=x.dtype)
        a, rows = t.clone().numpy().copy(), t.tolist()
        a[0], rows[1] = 7, 5
        t[2] = 1  # known still
        return x * torch.from_numpy(a) + float(t.numpy().sum()) + torch.tensor(rows, dtype=x.dtype)

    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(trace(f, x)(x), f(x), rtol=0, atol=0)


class _Drawing(torch.nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.eye(4, dtype=torch.float64))
        self.draw, self.own, self.rng = draw, random.Random(1), np.random.default_rng(2)
        self.old, self.bits = np.random.RandomState(3), np.random.PCG64(4)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu if self.draw(self) else torch.tanh)(x @ self.W)

    def states(self) -> list:
        old = [s.get_state(legacy=False)["state"] for s in (self.old, np.random.mtrand._rand)]
        whole = [self.own.getstate(), random.getstate(), self.rng.bit_generator.state, self.bits.state]
        return [*whole, *((s["pos"], tuple(s["key"])) for s in old)]


def _imported(_: object) -> int:
    import random as chance  # where no global says it

    return chance.choice([1, 1])


_DRAWS = {
    "random": lambda m: random.random() < 2,
    "choice": lambda m: choice([True, True]),
    "imported": _imported,
    "numpy": lambda m: np.random.randint(0, 9) < 10,
    "a function of numpy": lambda m: normal() < 99,
    "own": lambda m: m.own.gauss(0, 1) < 99,
    "own of numpy": lambda m: m.rng.normal() < 99,
    "own old": lambda m: m.old.rand() < 2,
    "bits": lambda m: m.bits.random_raw() >= 0,
    "shuffled": lambda m: not m.own.shuffle([1, 2]),
}


@pytest.mark.parametrize("prove", [False, True])
@pytest.mark.parametrize("name", _DRAWS)
def test_random_numbers_of_python_and_numpy_are_refused_by_line(name, prove):
    """Whatever comes of them, and the generators are left as they were."""
    learner = _Drawing(_DRAWS[name])
    before = learner.states()
    with pytest.raises(TraceError, match=r"\(test_hostile_tracer.py:\d+\)` is random; expected"):
        df.derive(learner, chunk=4, prove=prove)
    assert learner.states() == before
    plain = torch.nn.Linear(4, 4).double()
    with pytest.raises(TraceError, match="is random; expected"):
        df.derive(plain, lambda p, v: (p - v).square().sum(-1) * (2.0 if learner.draw(learner) else 1.0), prove=prove)
    assert learner.states() == before


def test_random_numbers_in_a_derivative_are_refused():
    with pytest.raises(TraceError, match="is random; expected"):
        df.jacobian(lambda x: x * choice([1.0, 1.0]), torch.ones(3)).dense()


def test_a_generator_that_is_not_drawn_from_is_no_matter():
    learner = _Drawing(lambda m: m.training or random.random() < 2)
    program, x = df.derive(learner, chunk=4), torch.randn(1, 6, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(program(x, x, x, backend="eager")[0], program(x, x, x, form="primal")[0])


# -- written in place, read by value, laid out ------------------------------------------------------------------------


def _scaled(h, s):
    h[h < 0] *= 0.1
    return h


def _two_masks(h, s):
    h[h < 0] = h[h < 0] * 0.5
    h[h > 1] += s.b.sum()
    return h


def _log_where_it_is(h, s):
    m = h > 0
    h[m] = h[m].log().clamp(max=1.0)
    return h


def _of_another(h, s):
    m, y = h < 0, (h * 1).sin()
    h[m] = y[m].exp()
    h[~m] -= 1
    return h


def _both_masks(h, s):
    m = (h < 0) & s.some
    m |= h > 1
    h[m] = -h[m]
    return h


def _rows(h, s):
    m = h.sum(-1) > 0
    h[m] = h[m] * s.b
    return h


def _view(of):
    """Write through a view."""

    def body(h, s):
        h, M = h * 1, s.W * 1
        of(h, M)
        return h @ M

    return body


def _constant(of):
    return lambda h, s: h * float(of(s))


def _zeros(write):
    t = torch.zeros(4, dtype=torch.float64)
    write(t)
    return t


def _counted(s):
    n, t = 0, torch.zeros((), dtype=torch.int64)
    for k in range(3):
        t += k
        n += int(t > 1)
    return n


def _before_and_after(s):
    t = torch.full((2,), 0.25)
    u = t * 2
    t.mul_(3)
    return u.sum() + t.max()


def _filled_mask(h, s):
    m = torch.zeros(4, dtype=torch.bool)
    m[1] = True
    m[3:] = True
    return h[:, m].repeat(1, 2)


def _filled(value, dim=1, places=(0, 2)):
    def body(h, s):
        h.index_fill_(dim, torch.tensor(places), value(s))
        return h

    return body


def _never(write):
    def body(h, s):
        write(h, s.never)
        return h

    return body


def _complex_halves(h, s):
    c = torch.complex(h[:, :2], h[:, 2:])
    c.real.mul_(2)
    torch.view_as_real(c)[..., 1].mul_(s.b[0])
    return torch.cat([c.real, c.imag], -1)


def _as_complex(h, s):
    r = torch.stack([h, h.sin()], -1)
    torch.view_as_complex(r).mul_(2)
    return r.sum(-1)


_last = torch.channels_last
_LEARNERS = {
    "masked, scaled": _scaled,
    "masked, twice": _two_masks,
    "masked, a logarithm": _log_where_it_is,
    "masked, of another": _of_another,
    "masked, both": _both_masks,
    "masked, rows": _rows,
    "diagonal": _view(lambda h, M: M.fill_diagonal_(0)),
    "diagonal of one": _view(lambda h, M: torch.diagonal(M, 1).mul_(2)),
    "diagonal of a mask": lambda h, s: h @ (s.W * torch.ones(4, 4, dtype=torch.bool).fill_diagonal_(False)),
    "diagonal of cubes": lambda h, s: h @ (s.W.reshape(1, 4, 4) * torch.ones(4, 4, 4).fill_diagonal_(0.5)).sum(0),
    "diagonal that wraps": lambda h,
    s: h @ torch.cat([s.W, s.W]).mul(1).fill_diagonal_(1.0, wrap=True)[5:7].repeat(2, 1),
    "einsum": _view(lambda h, M: torch.einsum("bi->ib", h).mul_(2)),
    "einsum of a diagonal": _view(lambda h, M: torch.einsum("ii->i", M).zero_()),
    "unfold": _view(lambda h, M: h.unfold(1, 2, 2).mul_(3)),
    "part of unfold": _view(lambda h, M: h.unfold(1, 2, 2)[:, 0].mul_(3)),
    "as_strided": _view(lambda h, M: M.as_strided((4,), (5,)).mul_(2)),
    "rows of as_strided": _view(lambda h, M: M.as_strided((2, 4), (8, 1)).mul_(2)),
    "as_strided after a write": lambda h, s: h @ torch.addcmul(s.W, s.W, s.W).t().mul_(2).as_strided((4, 4), (4, 1)),
    "complex halves": _complex_halves,
    "complex": _as_complex,
    "never, read": lambda h, s: h + h[:, s.never].sum(-1, keepdim=True),
    "never, joined": lambda h, s: torch.cat([h[:, s.never], h], -1),
    "never, a product": lambda h, s: h * h[:, s.never].prod(-1, keepdim=True),
    "never, nothing": lambda h, s: torch.cat([h, h[:, :0]], -1),
    "never, selected": lambda h, s: h + s.b.masked_select(s.never).sum(),
    "never, written": _never(lambda h, m: h.__setitem__((slice(None), m), 5.0)),
    "never, scaled": _never(lambda h, m: h.__setitem__((slice(None), m), h[:, m] * 5.0)),
    "never, added": lambda h, s: h.index_add(1, s.never.nonzero()[:, 0], h[:, s.never]),
    "repeated": lambda h, s: h * torch.repeat_interleave(s.b[:2], torch.tensor([1, 3])),
    "repeated, a table": lambda h, s: h * s.table.repeat_interleave(2)[:4],
    "repeated, columns": lambda h, s: torch.repeat_interleave(h[:, :2], torch.tensor([1, 3]), dim=1),
    "repeated, by a buffer": lambda h, s: h[:, :2].repeat_interleave(2 * s.some.long()[:2] + 1, dim=-1),
    "repeated, places": lambda h, s: h * s.table[torch.repeat_interleave(torch.tensor([1, 3]))],
    "repeated, of a size": lambda h, s: h.repeat_interleave(torch.tensor([1, 0, 2, 1]), dim=-1, output_size=4),
    "written, an entry": _constant(lambda s: _zeros(lambda t: t.__setitem__(0, 0.5))[0].item()),
    "written, all": _constant(lambda s: _zeros(lambda t: t.fill_(0.3)).sum()),
    "written, twice": _constant(lambda s: _zeros(lambda t: t.add_(0.1).mul_(2)).sum().item()),
    "written, copied": _constant(lambda s: _zeros(lambda t: t.copy_(s.table)).max() / 3),
    "written, counted": _constant(_counted),
    "written, before and after": _constant(_before_and_after),
    "written, a mask": _filled_mask,
    "filled, a weight": _filled(lambda s: s.b[0]),
    "filled, a tensor": _filled(lambda s: torch.tensor(0.5, dtype=torch.float64)),
    "filled, a number": _filled(lambda s: 0.5, -1, (1,)),
    "remainder": lambda h, s: torch.remainder(h, 0.7) + torch.fmod(h, 0.4),
    "first a number": lambda h,
    s: torch.where(h > 0, 1.0, h) + torch.pow(2, h) + torch.rsub(h, 2.0) + 3.0 / (2 + h.sin()),
    "channels last": lambda h, s: h.view(-1, 1, 2, 2).contiguous(memory_format=_last).flatten(1),
    "channels last, to": lambda h, s: (h.view(-1, 2, 2, 1).to(memory_format=_last) * 2).reshape(-1, 4),
    "channels last, copied": lambda h,
    s: h.view(-1, 2, 1, 2).clone(memory_format=_last).permute(0, 2, 3, 1).reshape(-1, 4),
    "channels last, empty": lambda h,
    s: torch.empty_like(h.view(-1, 2, 1, 2), memory_format=_last).copy_(h.view(-1, 2, 1, 2)).flatten(1),
    "channels last, weights": lambda h,
    s: (s.W.view(1, 4, 2, 2).to(memory_format=_last) * h.view(-1, 4, 1, 1)).sum((2, 3)),
}  # fmt: skip


class _Learner(torch.nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        self.W = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=seeded) / 2)
        self.b = torch.nn.Parameter(torch.randn(4, dtype=torch.float64, generator=seeded))
        self.register_buffer("never", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("some", torch.tensor([True, False, True, False]))
        self.register_buffer("table", torch.arange(4.0, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(x @ self.W) * 1, self)


@pytest.mark.parametrize("name", _LEARNERS)
def test_a_learner_that_writes_reads_and_lays_out_is_the_recurrence(name):
    learner = _Learner(_LEARNERS[name])
    program = df.derive(learner, df.objectives.Squared(), rule=df.rules.SGD(lr=0.05), chunk=3, prove=False)
    # Two whole mini-batches are one traced block; what a learner is at one token is held against it below.
    x = torch.randn(1, 6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *learner.parameters()]
    results = program(x, x.sin(), x.cos(), backend="eager")[0][0, :, 0], by_hand(learner, x[0, :, 0], 0.05, 3)
    slopes = [torch.autograd.grad(o.sin().sum(), leaves, materialize_grads=True) for o in results]
    for a, b in zip((results[0], *slopes[0]), (results[1], *slopes[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    program.door.trace_learner(1, 4, torch.float64)  # refused if it is another function
    one = x[0, :1, 0].detach()
    torch.testing.assert_close(trace(lambda t: learner(t), one)(one), learner(one))


_REFUSED = {
    "a sum of picked": lambda h, s: h + h[h < 0].sum(),
    "how many are picked": lambda h, s: h * h[h < 0].shape[0],
    "a size of picked": lambda h, s: h * len(h[h < 0]),
    "picked under another mask": lambda h, s: h.index_put((h > 0.1,), h[h > 0]),
    "a mask that was written": lambda h, s: _changed_mask(h),
    "a tensor that was written": lambda h, s: _changed_entries(h),
    "picked, joined": lambda h, s: torch.cat([h[h < 0], h[h > 0]]).reshape(h.shape),
    "picked, sorted": lambda h, s: h + h[h < 0].sort().values[0],
    "picked, returned": lambda h, s: h[h < 0],
    "picked, transformed": lambda h, s: h * torch.func.grad(lambda y: y.sum() ** 2)(h[h < 0]).sum(),
    "picked, through a checkpoint": lambda h, s: h * checkpoint(lambda y: (y * y).sum(), h[h < 0], use_reentrant=False),
    "picked, and a row": lambda h, s: h + (h[h < 0] * s.b).sum(),
}


def _changed_mask(h):
    m = h < 0
    picked = h[m]
    m.logical_not_()
    h[m] = picked
    return h


def _changed_entries(h):
    picked = h[h < 0]
    h.neg_()
    h[h < 0] = picked
    return h


@pytest.mark.parametrize("name", _REFUSED)
def test_so_many_entries_as_a_mask_picks_are_no_size(name):
    learner = _Learner(_REFUSED[name])
    with pytest.raises(TraceError, match="reads a tensor's values"):
        trace(lambda x: learner(x), torch.randn(3, 4, dtype=torch.float64))


_shared = torch.ones(4)


def _outside(x: Tensor) -> Tensor:
    _shared[0] = 7
    return x * _shared


def _outside_whole(x: Tensor) -> Tensor:
    _shared.mul_(7)
    return x * _shared


def _outside_view(x: Tensor) -> Tensor:
    _shared.view(2, 2)[0].add_(7)
    return x * _shared


def _in_numpys(x: Tensor) -> Tensor:
    h = torch.ones(4)
    torch.from_numpy(h.numpy())[0] = 7
    return x * h


def _in_numpys_as_tensor(x: Tensor) -> Tensor:
    h = torch.ones(4)
    torch.as_tensor(h.numpy()[1:]).mul_(7)
    return x * h


def _in_numpys_own(x: Tensor) -> Tensor:
    a = np.ones(4)
    torch.asarray(a)[0] = 7
    return x * torch.from_numpy(a)


def _in_numpys_by_protocol(x: Tensor) -> Tensor:
    h = torch.ones(4)
    torch.from_dlpack(h.numpy())[0] = 7
    return x * h


def _in_numpys_buffer(x: Tensor) -> Tensor:
    h = torch.ones(4)
    torch.frombuffer(h.numpy(), dtype=h.dtype)[0] = 7
    return x * h


@pytest.mark.filterwarnings("ignore:The given .* is not writable")
@pytest.mark.parametrize(
    "f",
    [
        *(_outside, _outside_whole, _outside_view),
        *(_in_numpys, _in_numpys_as_tensor, _in_numpys_own, _in_numpys_by_protocol, _in_numpys_buffer),
    ],
)
def test_writes_to_memory_of_others_are_refused(f):
    with pytest.raises(TraceError, match=r"writes to an input or a buffer|writes to memory of numpy"):
        trace(f, torch.ones(4))
    assert _shared.tolist() == [1, 1, 1, 1]


def _roots(x: Tensor) -> Tensor:
    h = x * 1
    h[h < 0] = torch.sqrt(-h[h < 0])
    return h


def _arcs(x: Tensor) -> Tensor:
    h = x * 1
    m = h > 1
    h[m] = torch.acosh(h[m]) * 2
    return h


def _poles(x: Tensor) -> Tensor:
    h = x * 1
    m = h < 0
    h[m] = 1 / (h[m] - 0.5)
    return h


def _roots_in_place(x: Tensor) -> Tensor:
    h = x * 1
    m = h < 0
    p = h[m]
    p.neg_().sqrt_()
    h[m] = p
    return h


def _of_weights(x: Tensor) -> Tensor:
    h, w = x[:2] * 1, x[2]
    m = h < 0
    h[m] = torch.log(-h[m]) * w.sum()
    rows = h[:, 0] > 0
    h[rows] = h[rows] * w
    return h


@pytest.mark.parametrize("f", [_roots, _arcs, _poles, _roots_in_place, _of_weights])
def test_what_was_not_picked_has_no_slope_of_its_own(f):
    """0 times the slope of sqrt at -1/2 is NaN."""
    x = 1.5 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(trace(f, x)(x), f(x))
    torch.testing.assert_close(df.jacobian(f, x).dense(), want)
    torch.testing.assert_close(torch.autograd.functional.jacobian(trace(f, x), x), want)


def test_a_trace_goes_on_while_another_thread_still_imports_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.config", ModuleType("torch._dynamo.config"))
    assert trace(torch.tanh, torch.randn(3, 4)).graph is not None


# -- what user code keeps of a trace

_TABLES: dict = {}
_KEPT: dict = {}
_LOG: list = []
_GAIN = None


class _Rotary:
    gain = None


@lru_cache
def _cached(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(n, dtype=dtype) / n
    return angle.cos(), angle.sin()


def _in_a_cache(x: Tensor) -> Tensor:
    cos, sin = _cached(x.shape[-1], x.dtype)
    return torch.tanh(x) * cos + x.flip(-1) * sin


def _in_a_dict(x: Tensor) -> Tensor:
    if x.dtype not in _TABLES:
        _TABLES[x.dtype] = (torch.ones(x.shape[-1]).cumsum(0).to(x), x.new_zeros(1) + 2)
    gain, more = _TABLES[x.dtype]
    return torch.tanh(x) * gain + more


def _in_a_global(x: Tensor) -> Tensor:
    global _GAIN
    if _GAIN is None:
        _GAIN = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
    return torch.tanh(x) * _GAIN


def _in_a_class(x: Tensor) -> Tensor:
    if _Rotary.gain is None:
        _Rotary.gain = torch.eye(x.shape[-1], dtype=x.dtype)[0] + 1
    return torch.tanh(x) * _Rotary.gain


def _seen_again(x: Tensor) -> Tensor:
    """Another table at each call: the last stays."""
    _TABLES["last"] = torch.arange(x.shape[-1], dtype=x.dtype)
    return torch.tanh(x) * _TABLES["last"]


def _in_a_cache_with_a_hook(x: Tensor) -> Tensor:
    """Torch's own tracer follows a hook."""
    h = torch.tanh(x)
    if h.requires_grad:
        h.register_hook(lambda g: g * 1)
    return h * _cached(x.shape[-1], x.dtype)[0]


_CACHING = [_in_a_cache, _in_a_dict, _in_a_global, _in_a_class, _seen_again, _in_a_cache_with_a_hook]


@pytest.fixture
def _nothing_kept(monkeypatch):
    _cached.cache_clear()
    for held in (_TABLES, _KEPT, _LOG):
        held.clear()
    monkeypatch.setattr(_Rotary, "gain", None)
    monkeypatch.setitem(globals(), "_GAIN", None)


def _held() -> list:
    tables = [*_cached(4, torch.float64), _GAIN, _Rotary.gain, *_TABLES.values(), *_KEPT.values(), *_LOG]
    return [x for x in torch.utils._pytree.tree_leaves(tables) if x is not None]


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("f", _CACHING)
def test_a_table_cached_in_a_trace_has_its_numbers(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        traced = trace(f, x)
        assert all(type(t) is Tensor for t in _held())
        torch.testing.assert_close(traced(x), f(x))
    jacobian = df.jacobian(f, x).dense()
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(f, x))


class _Caching(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(0.5 * torch.randn(4, 4, dtype=torch.float64, generator=generator))
        self.f, self.table = f, None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4).to(x) / 4
        return self.f(x @ self.w) + self.table


def _in_parts_of_a_dict(x: Tensor) -> Tensor:
    if not _TABLES:
        _TABLES["all"] = {"scale": torch.arange(4, dtype=x.dtype), "shift": _cached(4, x.dtype)[0] * 2}
    return x * _TABLES["all"]["scale"] + _TABLES["all"]["shift"]


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * _TABLES.setdefault("gain", torch.ones(1, dtype=x.dtype) * 3)

    @staticmethod
    def backward(ctx, g):
        return g * _TABLES["gain"] * 2


def _in_a_gradient_of_picks(x: Tensor) -> Tensor:
    h = x * 1
    h[x < 0] = _Gained.apply(h[x < 0])
    return h


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("prove", [False, True])
@pytest.mark.parametrize("f", [*_CACHING[:4], _in_parts_of_a_dict, _in_a_gradient_of_picks])
def test_a_learner_may_cache_tables(f, prove):
    """As what the learner holds, not as numbers of the trace, from the first program on."""
    learner = _Caching(f)
    for chunk in (3, 2):
        check_forms(df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=chunk, prove=prove), time=7)
        assert learner.table is None or type(learner.table) is Tensor
        assert all(type(t) is Tensor for t in _held())
        assert type(learner(torch.ones(3, 4, dtype=torch.float64))) is Tensor


@pytest.mark.usefixtures("_nothing_kept")
def test_an_objective_may_cache_a_table():
    def weighted(prediction, target):
        return (_cached(4, prediction.dtype)[0] * (prediction - target) ** 2).sum(-1)

    learner = _Caching(torch.tanh)
    for _ in range(2):
        check_forms(df.derive(learner, weighted, rule=df.rules.SGD(lr=0.2), chunk=3), time=7)
        assert all(type(t) is Tensor for t in _cached(4, torch.float64))


def _keeps_in_a_dict(x):
    _KEPT["h"] = x * 2
    return _KEPT["h"].tanh()


def _keeps_in_a_pair(x):
    _KEPT["h"] = (torch.zeros(1), x * 2)
    return _KEPT["h"][1].tanh()


def _keeps_in_a_list(x):
    _LOG.append(x * 2)
    return _LOG[-1].tanh()


def _keeps_in_a_global(x):
    global _GAIN
    _GAIN = x * 2
    return _GAIN.tanh()


def _keeps_in_a_class(x):
    _Rotary.gain = x * 2
    return _Rotary.gain.tanh()


def _keeps_the_input(x):
    _LOG.append(x)
    return (x * 2).tanh()


def _keeps_with_a_hook(x):
    h = x * 2
    h.register_hook(lambda g: 2 * g)
    _KEPT["h"] = h.tanh()
    return _KEPT["h"] * h


_KEEPING = {
    "_KEPT['h']": _keeps_in_a_dict,
    "_KEPT": _keeps_in_a_pair,
    "_LOG": _keeps_in_a_list,
    "_GAIN": _keeps_in_a_global,
    "_Rotary.gain": _keeps_in_a_class,
    "an input is kept in _LOG": _keeps_the_input,
    '`_KEPT["h"] = h.tanh()': _keeps_with_a_hook,
}


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("where", _KEEPING)
def test_what_is_made_of_an_input_is_taken_back_and_refused(where):
    f = _KEEPING[where]
    for _ in range(2):
        with pytest.raises(TraceError, match=re.escape(where)) as error:
            trace(f, torch.randn(3, 4, dtype=torch.float64))
        assert where.startswith("an input") or "test_hostile_tracer.py:" in str(error.value)
        assert [*_KEPT, *_LOG] == []
        assert (_GAIN, _Rotary.gain) == (None, None)
    with pytest.raises(TraceError, match="is kept in"):
        df.derive(_Caching(f), rule=df.rules.SGD(lr=0.2), chunk=3)
    assert all(type(x) is Tensor for x in _held())
    assert type(f(torch.ones(3, 4, requires_grad=True))) is Tensor


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("where", list(_KEEPING)[:5])
def test_it_is_found_in_what_the_collector_has_frozen(where):
    """As servers freeze what they have loaded before they fork: gc.get_referrers does not look there."""
    gc.collect()
    gc.freeze()
    try:
        with pytest.raises(TraceError, match=re.escape(where)):
            trace(_KEEPING[where], torch.randn(3, 4, dtype=torch.float64))
    finally:
        gc.unfreeze()
    assert [*_KEPT, *_LOG] == []
    assert (_GAIN, _Rotary.gain) == (None, None)


@pytest.mark.usefixtures("_nothing_kept")
def test_a_failing_trace_leaves_nothing_either():
    def f(x):
        _TABLES["t"] = torch.arange(4.0)
        _LOG.append(x * 2)
        return x.sum().item() * x

    for _ in range(2):
        with pytest.raises(TraceError, match="values"):
            trace(f, torch.randn(3, 4))
        assert not _LOG
        assert all(type(t) is Tensor for t in _held())


def _picked(x):
    h = x * 1
    h[x < 0] *= 2
    return h


def test_a_trace_need_not_look_for_what_is_kept(monkeypatch):
    """Nothing is collected, and no memory searched, where nothing is left."""
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("collected"))
    monkeypatch.setattr(gc, "get_referrers", lambda *_: pytest.fail("searched"))
    trace(_in_a_cache, torch.randn(3, 4))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[ctx.saved_tensors[0] < 0] = 0
        return g


def test_the_collector_looks_at_what_a_trace_made_alone(monkeypatch):
    """A gradient of one's own leaves circles behind; a process of millions of objects took a second a trace for them.

    The collector is on, or off, as it was.
    """
    learner = _Caching(lambda x: _Masked.apply(x * 2))
    df.derive(learner, rule=df.rules.SGD(lr=0.3), chunk=3)  # what torch loads at its first trace
    monkeypatch.setattr(gc, "get_referrers", lambda *_: pytest.fail("searched"))
    collect, seen = gc.collect, set()
    monkeypatch.setattr(gc, "collect", lambda generation=2: seen.add(generation) or collect(generation))
    for switch, is_on in ((gc.disable, False), (gc.enable, True)):
        switch()
        try:
            df.derive(learner, rule=df.rules.SGD(lr=0.1 + is_on), chunk=3)
            assert gc.isenabled() == is_on
        finally:
            gc.enable()
    assert 2 not in seen
    learner = _Caching(torch.tanh)
    learner.log = []
    trace(lambda x: (learner(x), torch.zeros(3))[0], torch.randn(3, 4, dtype=torch.float64))
    trace(_picked, torch.randn(3, 4, dtype=torch.float64))


# -- tensors of one row, or none, beside token rows in functions that torch spells itself

_F = torch.nn.functional
_BESIDE = {
    "cosine_similarity": lambda h, b, s: h * _F.cosine_similarity(h, b, dim=-1)[..., None],
    "cosine_similarity of it": lambda h, b, s: h * _F.cosine_similarity(b, h, dim=-1)[..., None],
    "pairwise_distance": lambda h, b, s: h * _F.pairwise_distance(h, b)[..., None],
    "pairwise_distance of it": lambda h, b, s: h * _F.pairwise_distance(b, h, p=1)[..., None],
    "cdist": lambda h, b, s: h * torch.cdist(h, b.reshape(1, 4)),
    "bilinear": lambda h, b, s: h * _F.bilinear(h, b.expand(len(h), 4), s),
    "normalize": lambda h, b, s: _F.normalize(h * b, dim=-1) + _F.normalize(b, dim=-1),
    "kl_div": lambda h, b, s: h + _F.kl_div(h.log_softmax(-1), b.softmax(-1), reduction="none"),
    "kl_div of it": lambda h, b, s: h + _F.kl_div(b.log_softmax(-1), h.softmax(-1), reduction="none"),
    "poisson": lambda h, b, s: _F.poisson_nll_loss(h, b.exp(), reduction="none"),
    "gaussian": lambda h, b, s: _F.gaussian_nll_loss(h, b.expand_as(h), b.exp().expand_as(h), reduction="none"),
    "hinge": lambda h, b, s: h + _F.hinge_embedding_loss(h, b.sign(), reduction="none"),
    "cosine_embedding": lambda h, b, s: (
        h * _F.cosine_embedding_loss(h, b.expand_as(h), torch.ones(len(h)), reduction="none")[..., None]
    ),
    "lerp": lambda h, b, s: torch.lerp(h, b, b.sigmoid()) + torch.lerp(b, h, 0.3),
    "addcmul": lambda h, b, s: torch.addcmul(b, h, b) + torch.addcdiv(b, h, b.exp()),
    "vecdot": lambda h, b, s: h * torch.linalg.vecdot(h, b)[..., None],
    "clamp": lambda h, b, s: torch.clamp(h, min=-b.exp(), max=b.exp()),
    "deeper zeros_like": lambda h, b, s: torch.where(b > 0, h, torch.zeros_like(h.tanh())) + b,
}
_LOSSES = [_F.huber_loss, _F.smooth_l1_loss, _F.mse_loss, _F.l1_loss]


class _Beside(torch.nn.Module):
    def __init__(self, f, shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, size in {"w": (4, 4), "b": shape, "s": (4, 4, 4)}.items():
            drawn = torch.randn(size, dtype=torch.float64, generator=generator)
            setattr(self, name, torch.nn.Parameter(0.5 * drawn))
        self.f = f

    def forward(self, x):
        return self.f(torch.tanh(x @ self.w), self.b, self.s)


def _sum_of(names, table):
    return lambda *args: sum(table[name](*args) for name in names)


def _in_groups(names, size):
    names = list(names)
    return [pytest.param(names[n : n + size], id="+".join(names[n : n + size])) for n in range(0, len(names), size)]


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
@pytest.mark.parametrize("names", _in_groups(_BESIDE, 5))
def test_one_row_beside_token_rows(names, shape):
    check_forms(df.derive(_Beside(_sum_of(names, _BESIDE), shape), rule=df.rules.SGD(lr=0.2), chunk=3), time=4)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shape", [(1, 4), (4,), ()])
def test_losses_of_one_row_beside_token_rows(shape):
    def both(h, b, s):
        pairs = [(loss, *pair) for loss in _LOSSES for pair in ((h, b), (b, h))]
        return h * sum(loss(x, y, reduction="none") for loss, x, y in pairs)

    check_forms(df.derive(_Beside(both, shape), rule=df.rules.SGD(lr=0.2), chunk=3), time=4)


# -- what torch refuses

_WHOLE, _SINGLE = torch.eye(4, dtype=torch.long), torch.ones(4, 4, dtype=torch.float32)
_REFUSED_BY_TORCH = {
    "float @ long": lambda h: h @ _WHOLE,
    "double @ float": lambda h: h @ _SINGLE,
    "linear": lambda h: _F.linear(h, _SINGLE),
    "shapes": lambda h: h @ torch.ones(3, 5, dtype=h.dtype),
    "add": lambda h: h + torch.ones(3),
    "einsum": lambda h: torch.einsum("ij,jk->ik", h, _SINGLE),
    "cat": lambda h: torch.cat([h, h[0]], 0),
    "stack": lambda h: torch.stack([h, h[:1]], 0),
    "view": lambda h: h.view(3, 5),
    "bmm": lambda h: torch.bmm(h, h),
    "addmm": lambda h: torch.addmm(_SINGLE[0], h, _WHOLE),
    "mv": lambda h: torch.mv(h, _WHOLE[0]),
    "dot": lambda h: torch.dot(h[0], _WHOLE[0]),
    "minus of truths": lambda h: (h > 0) - (h < 0),
    "gather": lambda h: h.gather(1, h),
    "embedding": lambda h: _F.embedding(h, _SINGLE),
    "layer_norm": lambda h: _F.layer_norm(h, (5,)),
    "softmax": lambda h: h.softmax(5),
    "where": lambda h: torch.where(h, h, h),
    "expand": lambda h: h.expand(7, 7),
    "conv1d": lambda h: _F.conv1d(h[None], torch.ones(2, 3, 1, dtype=torch.float32)),
    "lerp": lambda h: torch.lerp(h, _SINGLE[:3], 0.5),
    "split": lambda h: h.split([1, 2], 1)[0],
    "in place": lambda h: _WHOLE.clone().add_(h),
    "inv": lambda h: torch.linalg.inv(h),
    "bits": lambda h: h & 1,
    "unfold": lambda h: h.unfold(1, 9, 1),
    "addcmul": lambda h: torch.addcmul(h, h, torch.ones(3)),
}


@pytest.mark.parametrize(
    ("name", "hooked"),
    [
        *((n, False) for n in _REFUSED_BY_TORCH),
        *((n, True) for n in ("float @ long", "mv", "softmax", "conv1d", "bits")),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(name, hooked):
    call, x = _REFUSED_BY_TORCH[name], torch.randn(3, 4, dtype=torch.float64)

    def f(x):
        if hooked:  # torch's own tracer follows that
            x.register_hook(lambda g: 2 * g)
        return call(x)

    with pytest.raises((RuntimeError, IndexError)) as own:
        call(x)
    with pytest.raises(TraceError, match=re.escape(str(own.value).splitlines()[0])) as error:
        trace(f, x)
    assert "test_hostile_tracer.py:" in str(error.value)


def test_a_function_may_try_what_torch_refuses():
    def f(x):
        try:
            return x @ _WHOLE
        except RuntimeError:
            return x @ _WHOLE.to(x.dtype) * 2

    x, state = torch.randn(3, 4, dtype=torch.float64), torch.get_rng_state()
    torch.testing.assert_close(trace(f, x)(x), 2 * x)
    assert torch.equal(state, torch.get_rng_state())


def test_a_function_may_try_to_view_what_does_not_lie_in_order():
    def f(x):
        try:
            return x.T.view(-1)
        except RuntimeError:
            return x.T.reshape(-1) * 2

    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(trace(f, x)(x), 2 * x.T.reshape(-1))


def test_wide_tensors_are_refused_for_their_dtypes_too():
    whole = torch.ones(800, 800, dtype=torch.long)
    with pytest.raises(TraceError, match="dtype, but got: float != long"):
        trace(lambda x: x @ whole, torch.randn(700, 800))


# -- picks in each row


def _rows(key, shape=(4,), write=False):
    def f(x):
        n, i = torch.arange(x.shape[0]), x.argmax(-1)
        h = torch.tanh(x).unflatten(-1, shape)
        if write:
            g = h.clone()
            g[key(n, i)] = (h * h)[key(n, i)]
            return g.flatten(1).index_put((n,), h.flatten(1), accumulate=True)
        return h.flatten(1) + h[key(n, i)].reshape(len(x), -1).sum(-1, keepdim=True)

    return f


_PICKS = {
    "x[arange]": _rows(lambda n, i: n),
    "x[arange of a width]": _rows(lambda n, i: n[:, None].int()),
    "x[range]": _rows(lambda n, i: range(len(n))),
    "x[list]": _rows(lambda n, i: list(range(len(n)))),
    "x[all true]": _rows(lambda n, i: torch.ones(len(n), dtype=torch.bool)),
    "x[arange, i]": _rows(lambda n, i: (n, i)),
    "x[range, i]": _rows(lambda n, i: (range(len(n)), i)),
    "x[arange, i, j]": _rows(lambda n, i: (n, i % 2, i // 2), (2, 2)),
    "x[arange, :, i]": _rows(lambda n, i: (n, slice(None), i % 2), (2, 2)),
    "x[arange, :, is]": _rows(lambda n, i: (n[:, None], slice(None), torch.stack([i % 2, 1 - i % 2], 1)), (2, 2)),
    "x[arange] = y": _rows(lambda n, i: n, write=True),
    "x[arange, i] = y": _rows(lambda n, i: (n, i), write=True),
    "x[arange, i, j] = y": _rows(lambda n, i: (n, i % 2, i // 2), (2, 2), write=True),
    "x[arange, :, i] = y": _rows(lambda n, i: (n, slice(None), i % 2), (2, 2), write=True),
    "x.gather": lambda x: x * x.gather(1, x.argmax(-1, keepdim=True)),
    "take_along_dim": lambda x: x * torch.take_along_dim(x, x.argmax(-1, keepdim=True), 1),
    "index_select": lambda x: x.index_select(0, torch.arange(len(x))).tanh(),
    "x.T[:, arange]": lambda x: x.tanh().T[:, torch.arange(len(x))].T,
}


@pytest.mark.parametrize("name", _PICKS)
def test_each_row_may_pick_its_own(name):
    f, x = _PICKS[name], torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trace(f, x)(x), f(x))
    torch.testing.assert_close(df.jacobian(f, x).dense(), torch.autograd.functional.jacobian(f, x))


@pytest.mark.parametrize("names", _in_groups(_PICKS, 6))
def test_each_token_may_pick_its_own(names):
    check_forms(df.derive(_Caching(_sum_of(names, _PICKS)), rule=df.rules.SGD(lr=0.2), chunk=3), time=4)


@pytest.mark.parametrize(
    "places",
    [lambda n: torch.arange(n) - 1, lambda n: torch.arange(n).flip(0), lambda n: torch.zeros(n, dtype=torch.long)],
)
def test_a_pick_from_other_rows_is_refused(places):
    def f(x):
        return x[places(len(x))]

    with pytest.raises(df.DerivationError, match="index makes one row depend on others"):
        df.derive(_Caching(f), chunk=3)


@pytest.mark.parametrize(
    "outer", [lambda m: m, lambda m: nn.Sequential(nn.Linear(4, 4), m)], ids=["alone", "in a sequence"]
)
def test_a_hook_of_torchs_is_refused_by_its_module(outer):
    """A hook has no forward, and no line of the user's calls it."""
    learner = outer(nn.utils.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(
        TraceError, match=r"`Linear\(in_features=4.*\(spectral_norm\.py:\d+\)` writes .* call \.eval\(\)"
    ):
        df.derive(learner)
    df.derive(learner.eval())

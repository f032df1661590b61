"""Memory that Python and numpy write to past torch: read as it is, followed, or refused by line."""

import array

import numpy as np
import pytest
import torch
from torch import nn

import dualform as df
from dualform.shapes import TraceError
from dualform.storages import contents, memory_of

DOUBLE = torch.float64
TABLE = np.arange(4.0)
HELD = torch.arange(4.0, dtype=DOUBLE)
SEEN = HELD.numpy()
BYTES = bytearray(np.arange(4.0).tobytes())


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Learner(nn.Module):
    dim = 4

    def __init__(self, f):
        super().__init__()
        self.f, self.W = f, nn.Parameter(0.2 * rand(4, 4))

    def forward(self, x):
        return self.f(self, x)


@pytest.fixture(autouse=True)
def fresh():
    TABLE[:] = SEEN[:] = np.arange(4.0)
    BYTES[:] = np.arange(4.0).tobytes()


def same(program):
    x = rand(1, 5, 1, 4)
    o, expected = program(x, x, x)[0], program(x, x, x, form="primal")[0]
    torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-12)
    return expected


# -- written between two readings --------------------------------------------------------------------------------------


def lent(made):
    """A tensor of memory that has another owner, read before and after that one writes."""

    def f(s, x):
        a = made()
        u = a[1]
        y = x * u
        a[0][0] += 6.0
        return y @ s.W + u

    return f


def of_bytes():
    held = bytearray(np.ones(4).tobytes())
    return memoryview(held).cast("d"), torch.frombuffer(held, dtype=DOUBLE)


def of(make, owner=lambda: np.ones(4)):
    def made():
        a = owner()
        return a, make(a)

    return made


def restored(s, x):
    y = x * HELD
    SEEN[0] = 7.0
    y = y @ s.W + HELD
    SEEN[0] = 0.0
    return y


def in_place(s, x):
    a = np.ones(4)
    u = torch.from_numpy(a)
    y = x * u
    np.add(a, 1, out=a)
    return y @ s.W + u


def through_a_view(s, x):
    a = np.ones(4)
    u = torch.from_numpy(a).view(2, 2)[:1].flatten()
    y = x * u.repeat(2)
    a[0] = 7.0
    return y @ s.W + u.repeat(2)


def large(s, x):
    a = np.ones(1 << 16)
    u = torch.from_numpy(a)
    y = x * u[:4]
    a[0] = 7.0
    return y @ s.W + u[:4]


WRITTEN = {
    "from_numpy": lent(of(torch.from_numpy)),
    "as_tensor": lent(of(torch.as_tensor)),
    "asarray": lent(of(torch.asarray)),
    "dlpack": lent(of(torch.from_dlpack)),
    "array": lent(of(lambda a: torch.frombuffer(a, dtype=DOUBLE), lambda: array.array("d", [1.0] * 4))),
    "memoryview": lent(of_bytes),
    "a global array": lent(lambda: (TABLE, torch.from_numpy(TABLE))),
    "written and restored": restored,
    "in place": in_place,
    "through a view": through_a_view,
    "large": large,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_between_two_readings_is_refused_by_line(name):
    with pytest.raises(
        TraceError, match=r"reads memory that is written to later.*Copy the array first: torch.tensor"
    ) as e:
        df.derive(Learner(WRITTEN[name]), chunk=3, prove=False)
    assert "test_memory.py:" in str(e.value)


def lends(s, x, how):
    u = torch.ones(4, dtype=DOUBLE)
    how(u)[0] = 7.0
    return (x * u) @ s.W


@pytest.mark.parametrize(
    "how",
    [torch.Tensor.numpy, np.asarray, lambda u: memoryview(u.numpy()), np.from_dlpack, lambda u: u.detach().numpy()],
)
def test_memory_of_the_traces_own_is_not_lent(how):
    with pytest.raises(TraceError, match=r"test_memory.py:\d+.*(reaches a tensor's memory|leaves torch)"):
        df.derive(Learner(lambda s, x: lends(s, x, how)), chunk=3, prove=False)


# -- right -------------------------------------------------------------------------------------------------------------


def before_it_is_read(s, x):
    a = np.ones(4)
    u = torch.from_numpy(a)
    y = x + 1
    a[0] = 7.0
    return (y * u) @ s.W


def filled_anew(s, x):
    a, y = np.zeros(4), 0.0
    for k in range(3):
        a[:] = k + 1
        y = y + torch.tanh(x * torch.tensor(a))
    return y @ s.W


RIGHT = {
    "before it is read": before_it_is_read,
    "copied each time": filled_anew,
    "a list": lambda s, x: (x * torch.as_tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)) @ s.W,
    "tensors in a list": lambda s, x: (x * torch.as_tensor([torch.tensor(2.0), HELD[1], 3, 4], dtype=DOUBLE)) @ s.W,
    "tensors in lists": lambda s, x: (x * torch.tensor([[HELD[1], 2.0], [3, HELD[3]]], dtype=DOUBLE).flatten()) @ s.W,
    "an array": lambda s, x: (x * torch.from_numpy(np.sin(TABLE))) @ s.W,
}


@pytest.mark.parametrize("name", RIGHT)
def test_memory_that_is_not_written_to_in_between_is_read(name):
    same(df.derive(Learner(RIGHT[name]), chunk=3, prove=False))


def test_numbers_of_tokens_and_weights_are_no_constants():
    for f in (
        lambda s, x: x * torch.tensor([s.W[0, 0], 1, 2, 3]),
        lambda s, x: torch.tensor([x[0, 0], x[0, 1]]) @ s.W[:2],
    ):
        with pytest.raises(TraceError, match=r"cuts their gradients.*torch.stack"):
            df.derive(Learner(f), chunk=3, prove=False)


# -- followed between calls --------------------------------------------------------------------------------------------


def by_numpy():
    SEEN[0] += 3.0


FOLLOWED = {
    "a closed-over tensor": (lambda s, x: (x * HELD) @ s.W, by_numpy),
    "its number": (lambda s, x: (x @ s.W) * HELD[0].item(), by_numpy),
    "a number of a view": (lambda s, x: (x @ s.W) * HELD[:2].sum().item(), by_numpy),
    "a choice": (lambda s, x: (x @ s.W) * 2 if HELD[0] > 1 else x @ s.W, by_numpy),
    "a mask": (lambda s, x: x[..., HELD > 1] @ s.W[HELD > 1], by_numpy),
    "written as .data": (lambda s, x: (x @ s.W) * HELD[0].item(), lambda: HELD.data.add_(3.0)),
    "an array": (lambda s, x: (x * torch.from_numpy(SEEN)) @ s.W, by_numpy),
    "bytes": (
        lambda s, x: (x @ s.W) * torch.frombuffer(BYTES, dtype=DOUBLE)[0].item(),
        lambda: memoryview(BYTES).cast("d").__setitem__(0, 3.0),
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_was_read_by_value_is_read_again_when_written_to(name):
    f, write = FOLLOWED[name]
    learner = Learner(f)
    program = df.derive(learner, chunk=3, prove=False)
    before = same(program)
    write()
    after = same(program)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(same(df.derive(learner, chunk=3, prove=False)), after)


def test_a_buffer_that_is_read_by_value_is_followed_past_torch():
    held = np.arange(4.0)
    learner = Learner(lambda s, x: (x @ s.W) * s.scale[1].item())
    learner.register_buffer("scale", torch.from_numpy(held))
    program = df.derive(learner, chunk=3, prove=False)
    before = same(program)
    held[1] = 5.0
    assert not torch.allclose(same(program), before)


# -- which memory ------------------------------------------------------------------------------------------------------


def test_memories_are_told_apart():
    x, array_ = torch.arange(6.0).reshape(2, 3), np.ones(3)
    assert memory_of(x) == memory_of(x.T[1:]) == memory_of(x.data)
    assert memory_of(x) != memory_of(x.clone())
    assert memory_of(torch.from_numpy(array_)) == memory_of(torch.from_numpy(array_))
    meta = torch.empty(2, 3, device="meta")
    assert memory_of(meta) == memory_of(meta[0])
    assert memory_of(meta) != memory_of(torch.empty(2, 3, device="meta"))
    assert memory_of(torch.empty(0)) != memory_of(torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_contents_are_the_bytes(dtype):
    x = torch.ones(3, 4).to(dtype)
    before = [contents(x), contents(x.T[1:, ::2]), contents(x[2])]
    x.data[0, 0] = 0
    x.data[2, 1] = float("nan") if dtype.is_floating_point else 0
    assert [contents(x), contents(x.T[1:, ::2]), contents(x[2])] != before
    assert contents(x[1]) == contents(x[1].clone())
    assert contents(x) == contents(x.clone())  # not-a-numbers too
    assert contents(torch.empty(0, 3, dtype=dtype)) == 0
    with torch.inference_mode():
        assert contents(torch.ones(2, dtype=dtype, device="meta")) == 0

"""The public face of structured derivatives: trees, names, slices, proofs, exports, limits, traces that are kept."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualform as df
from dualform.algebra.linear_map import Derivative
from dualform.calculus import cache_size, clear_cache, jacobian, traced
from dualform.shapes import ShapeError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SCALE = 2.0
GLOBAL = torch.ones(3, dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- trees


def test_trees_in_and_out() -> None:
    p = {"w": rand(3, 4), "b": [rand(4)]}
    x = rand(2, 3)

    def f(p: dict, x: Tensor, *, scale: Tensor) -> dict:
        h = x @ p["w"] + p["b"][0]
        return {"h": h * scale, "parts": (h.sum(), x)}

    J = jacobian(f, p, x, scale=rand(1))
    assert set(J) == {"h", "parts"}
    assert J["h"]["w"].shape == (2, 4, 3, 4)
    assert J["h"]["b"][0].shape == (2, 4, 4)
    assert J["parts"][1]["w"].is_zero
    expected = torch.func.jacrev(lambda p: f(p, x, scale=rand(1)))(p)
    torch.testing.assert_close(J["h"]["w"].dense(), expected["h"]["w"], **TIGHT)
    torch.testing.assert_close(J["parts"][0]["b"][0].dense(), expected["parts"][0]["b"][0], **TIGHT)
    of_p, of_scale, of_x = jacobian(f, p, x, scale=rand(1), wrt=(0, "scale", "x"))
    assert of_p["h"]["b"][0].structure == J["h"]["b"][0].structure
    assert of_scale["h"].shape == (2, 4, 1)
    assert of_x["parts"][1].is_identity


def test_several_results_of_one_op() -> None:
    values, where = jacobian(lambda x: x.max(-1), x := rand(3, 4))
    torch.testing.assert_close(values.dense(), torch.func.jacrev(lambda x: x.max(-1)[0])(x), **TIGHT)
    assert where.is_zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = rand(2, 3).to(dtype)
    J = jacobian(lambda x: x.softmax(-1) * 2, x)
    assert J.dtype == dtype
    assert J.dense().dtype == dtype
    assert J.vjp(torch.ones_like(x)).dtype == dtype


# -- axes


def test_names_slices_diagonals_and_traces() -> None:
    x, w = rand(2, 3), rand(3, 4)
    J = jacobian(lambda x, w: (x @ w).tanh(), x, w, axes="batch feat, feat out -> batch out")
    assert (J.out_axes, J.in_axes) == (("batch", "out"), ("batch'", "feat"))
    dense = J.dense()
    assert "J[batch,out,batch',feat]" in J.structure
    for index in (0, (slice(None), 1), (..., 2), (1, slice(1, 3), 0), (slice(0, 1), ..., slice(None, None, 2)), -1):
        torch.testing.assert_close(J[index].dense(), dense[index], **TIGHT)
    picked = J[{"out": slice(1, 3), "feat": 2}]
    assert (picked.out_axes, picked.in_axes) == (("batch", "out"), ("batch'",))
    torch.testing.assert_close(picked.dense(), dense[:, 1:3, :, 2], **TIGHT)
    per_sample = J.diagonal("batch")
    assert (per_sample.out_axes, per_sample.in_axes) == (("batch", "out"), ("feat",))
    torch.testing.assert_close(per_sample.dense(), torch.einsum("iaib->iab", dense), **TIGHT)
    torch.testing.assert_close(J.trace("batch").dense(), torch.einsum("iaib->ab", dense), **TIGHT)
    assert J.trace("batch").T.out_axes == ("feat",)
    square = jacobian(lambda x: x.softmax(-1).flip(0), rand(4, 4))
    torch.testing.assert_close(square.diagonal(0, 1).dense(), torch.einsum("iaci->iac", square.dense()), **TIGHT)
    torch.testing.assert_close(square[1:3].T.dense(), square.dense()[1:3].permute(2, 3, 0, 1), **TIGHT)
    assert square[2:2].dense().shape == (0, 4, 4, 4)
    with pytest.raises(IndexError, match="index 2 is out of the axis batch of 2"):
        J[2]
    with pytest.raises(ValueError, match=r"the axis is 'time'; expected one of \['batch', 'out', \"batch'\", 'feat'\]"):
        J[{"time": 0}]
    with pytest.raises(ShapeError, match="the output's axis 1 has 4 entries and the input's axis 1 3"):
        J.diagonal("out", "feat")
    with pytest.raises(ShapeError, match="has 5 places; expected at most one for each axis = 4"):
        J[0, 0, 0, 0, 0]


def test_proofs_read_labels_only() -> None:
    x, w = rand(4, 3), rand(3, 3)
    rows = jacobian(lambda x: x.softmax(-1), x)
    assert rows.is_diagonal(0)
    assert not rows.is_diagonal(1)
    assert rows.is_symmetric
    by_w = jacobian(lambda w: x @ w, w)
    assert by_w.is_diagonal(1)
    assert by_w.depends(0, 0)
    assert not by_w.depends(0, 1)
    copies = jacobian(lambda x, y: x + y, rand(3), rand(4, 3))
    assert copies.depends(1, 0)
    assert not copies.depends(0, 0)
    assert jacobian(lambda x: x.reshape(2, 6).reshape(4, 3), x).is_identity
    assert not jacobian(lambda x: 2 * x, x).is_identity
    assert jacobian(lambda x: x - x.clone(), x).is_zero
    assert jacobian(lambda x: 0.1 * x + 0.2 * x - 0.3 * x, x).is_zero
    # Zero here, but not for all values: no proof.
    zeros = torch.zeros(4, 3, dtype=x.dtype)
    assert not jacobian(lambda x: x * zeros, x).is_zero
    mixes = jacobian(lambda x: x - x.mean(0), x)
    assert not mixes.is_diagonal(0)
    assert mixes.is_diagonal(1)
    sliced = jacobian(lambda x: F.pad(x[1:3].tanh(), (0, 0, 1, 1)), x)
    assert sliced.is_diagonal(0)
    assert not jacobian(lambda x: x.roll(1, 0), x).is_diagonal(0)


SQUARE, COLUMNS = rand(3, 3), rand(2, 1, 1)
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.softmax(-1), lambda x: x @ SQUARE, lambda x: x.cumsum(0), lambda x: x.roll(1, 0), lambda x: x.sum(0),
    lambda x: F.layer_norm(x, (3,)), lambda x: x[1:] * x[:-1], lambda x: x.T, lambda x: x.expand(2, 4, 3) * COLUMNS,
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(FUNCTIONS)))
def test_claims_hold_for_the_numbers(k: int) -> None:
    """What is claimed diagonal vanishes off it; the sparse export holds every entry, the operator applies it."""
    x = rand(4, 3)
    J = jacobian(FUNCTIONS[k], x)
    dense = J.dense()
    for a in range(len(J.out_shape)):
        for b in range(len(J.in_shape)):
            if J.is_diagonal(a, b):
                moved = dense.movedim((a, len(J.out_shape) + b), (0, 1))
                off = ~torch.eye(len(moved), dtype=torch.bool)
                assert not moved[off].any()
    flat = dense.reshape(math.prod(J.out_shape), -1)
    sparse = J.to_scipy_sparse()
    torch.testing.assert_close(torch.from_numpy(sparse.toarray()), flat, **TIGHT)
    operator = J.to_linear_operator()
    v, g = rand(flat.shape[1]), rand(flat.shape[0])
    torch.testing.assert_close(torch.from_numpy(operator @ v.numpy()), flat @ v, **TIGHT)
    torch.testing.assert_close(torch.from_numpy(operator.rmatvec(g.numpy())), g @ flat, **TIGHT)


def test_sparse_holds_the_structure_only() -> None:
    J = jacobian(lambda x: x.softmax(-1), rand(50, 3))
    assert J.to_scipy_sparse().nnz == 50 * 9


def test_plans_show_order_and_cost() -> None:
    x, w, v = rand(5, 3), rand(3, 4), rand(4, 2)
    J = jacobian(lambda w: (x @ w).tanh() @ v, w)
    (plan,) = J.plans("vjp")
    assert plan.flops > 0
    assert "flops" in str(plan)
    u = rand(2, 2)
    second = jacobian(lambda h: h @ u, (x @ w).tanh() @ v)
    both = second @ J
    assert len(both.plans("dense")) == 1
    torch.testing.assert_close(both.dense(), torch.tensordot(second.dense(), J.dense(), 2), **TIGHT)
    with pytest.raises(ValueError, match="use is 'sum'; expected one of"):
        J.plans("sum")


# -- memory


def test_dense_refuses_above_a_limit() -> None:
    J = jacobian(torch.tanh, torch.ones(1 << 20))
    with pytest.raises(
        MemoryError, match=r"1048576 x 1048576 entries take 4,398,046,511,104 bytes; .*limit=.*4,194,304"
    ):
        J.dense()
    with pytest.raises(MemoryError, match="expected at most 8"):
        jacobian(torch.tanh, torch.ones(3)).dense(limit=8)


def test_large_products_are_placed_piece_by_piece() -> None:
    x, w, v = rand(17, 16), rand(16, 19), rand(19, 18)
    J = jacobian(lambda w: (x @ w).tanh() @ v, w)
    assert J.dense_nbytes > 2**16 * 8
    torch.testing.assert_close(J.dense(), torch.func.jacrev(lambda w: (x @ w).tanh() @ v)(w), **TIGHT)


def test_a_changed_input_is_refused() -> None:
    x = rand(3)
    J = jacobian(lambda x: x.sin(), x)
    J.dense()
    x.add_(1)
    with pytest.raises(ValueError, match=r"x was changed in place since; expected the tensor differentiated at"):
        J.vjp(x)


# -- traces that are kept


def test_the_first_use_is_interpreted_and_the_second_compiled_alike() -> None:
    x, w = rand(4, 6), rand(6, 6)

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = F.layer_norm(x @ w, (6,)) + x
        return torch.cat([h[:, ::2], h[:, 1::2]], 1).softmax(-1) @ w.T

    clear_cache()
    J = jacobian(f, x, w)
    g, v = rand(4, 6, seed=1), rand(4, 6, seed=2)
    first = J.vjp(g), J.jvp(v), J.dense()
    for _ in range(2):
        J = jacobian(f, x, w)
        for a, b in zip(first, (J.vjp(g), J.jvp(v), J.dense()), strict=True):
            torch.testing.assert_close(a, b, **TIGHT)
    torch.testing.assert_close(torch.vmap(J.vjp)(torch.stack([g, 2 * g]))[1], 2 * first[0], **TIGHT)
    other = jacobian(f, 2 * x, w)
    torch.testing.assert_close(other.vjp(g), torch.func.vjp(lambda x: f(x, w), 2 * x)[1](g)[0], **TIGHT)
    assert cache_size() == 1


def scaled(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * y * SCALE + GLOBAL


def test_nothing_closed_over_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    x = rand(3)
    for k in range(3):
        y = rand(3, seed=k)
        torch.testing.assert_close(jacobian(scaled(y), x).dense(), torch.diag(y * SCALE), **TIGHT)
    assert cache_size() == 1
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    torch.testing.assert_close(jacobian(scaled(y), x).dense(), torch.diag(y * 5.0), **TIGHT)
    y.mul_(3)
    torch.testing.assert_close(jacobian(scaled(y), x).dense(), torch.diag(y * 5.0), **TIGHT)


class Scaled(nn.Module):
    shift = 1.0

    def __init__(self, power: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) ** self.power + self.shift * x


def test_a_module_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    x, module = rand(2, 3), Scaled(2)

    def agree() -> None:
        torch.testing.assert_close(jacobian(module, x).dense(), torch.func.jacrev(module)(x), **TIGHT)

    agree()
    agree()
    assert cache_size() == 1
    module.linear.weight.data.mul_(2)
    agree()
    module.power = 3
    agree()
    monkeypatch.setattr(Scaled, "shift", 4.0)
    agree()
    module.linear = nn.Linear(3, 3, bias=False).double()
    agree()
    module.linear.register_forward_hook(lambda m, a, out: out * 2)
    agree()
    assert cache_size() >= 4


def test_the_key_is_shapes_strides_and_switches() -> None:
    clear_cache()
    f = scaled(rand(3))
    jacobian(f, rand(3))
    jacobian(f, rand(2, 3))
    jacobian(f, rand(3, 2).T)
    jacobian(f, rand(3).float())
    assert cache_size() == 4


def test_the_cache_is_bounded_and_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    monkeypatch.setattr(traced._traces, "size", 5)
    x = rand(2)
    y = rand(2)
    alive = weakref.ref(y)
    jacobian(lambda x, y=y: x * y, x)
    del y
    gc.collect()
    assert alive() is None
    for k in range(8):
        jacobian(lambda x, k=k: x * (k + 2), x)
    assert cache_size() == 5
    clear_cache()


# -- bad input


def bad_inner(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


def bad_broadcast(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def hidden_misfit(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    return h + y


MISFITS = [
    (bad_inner, "batch feat, time out -> batch out", r"axis 1 of x \(feat=3\) meets axis 0 of y \(time=4\) in matmul"),
    (bad_inner, None, r"axis 1 of x \(size=3\) meets axis 0 of y \(size=4\) in matmul"),
    (bad_broadcast, "batch feat, time out -> batch feat", r"axis 1 of x \(feat=3\) meets axis 1 of y \(out=5\) in add"),
    (hidden_misfit, None, r"axis 1 of an intermediate of shape \(2, 3\) \(size=3\) meets axis 1 of y \(size=5\)"),
    (bad_broadcast, "batch feat, time feat -> batch feat", r"axis 1 of x \(feat=3\) meets axis 1 of y \(feat=5\)"),
]


@pytest.mark.parametrize(("f", "axes", "message"), MISFITS)
def test_shapes_that_do_not_fit_are_named(f: Callable[..., Tensor], axes: str | None, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        jacobian(f, rand(2, 3), rand(4, 5), axes=axes)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: jacobian(lambda x: x * 2, torch.tensor([True])), r"argument 0 has dtype torch.bool; "
    r"expected a floating dtype"),
    (lambda: jacobian(lambda x: x, rand(2).to(torch.complex128)), "complex128; expected a real floating dtype"),
    (lambda: jacobian(lambda p: p["w"], {"w": rand(2), "n": torch.ones(2, dtype=torch.int64)}), r"argument 0\['n'\] has dtype"),
    (lambda: jacobian(lambda x: {"a": x, "b": 3.0}, rand(2)), r"f returns float at \['b'\]; expected tensors"),
    (lambda: jacobian(lambda x: None, rand(2)), "f returns NoneType"),
    (lambda: jacobian(lambda x: x, rand(2), wrt=True), "wrt is True; expected the position"),
    (lambda: jacobian(lambda x: x, []), "has no tensor|position of one"),
    (lambda: jacobian(lambda x: x, rand(2), axes="i -> i j"), "names 2 output axes; expected one for each of f's = 1"),
    (lambda: jacobian(lambda x: (x, x), rand(2), axes="i -> i"), "names 1 results; expected one list for each of f's = "
    "2"),
    (lambda: df.hessian(lambda x: (x, x), rand(2)), "f returns 2 tensors; expected one tensor"),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(REFUSED)))
def test_bad_input_is_refused(k: int) -> None:
    call, message = REFUSED[k]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kink_is_autograd_s_choice() -> None:
    for f in (torch.abs, F.relu, lambda x: x.clamp(min=0), lambda x: x.amax(0), lambda x: x.norm()):
        x = torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(jacobian(f, x).dense(), torch.func.jacrev(f)(x), **TIGHT)


def test_a_derivative_without_a_program_still_answers() -> None:
    J = jacobian(lambda x: x.softmax(-1), rand(2, 3))
    plain = Derivative(J.terms, J.out_shape, J.in_shape, J.dtype, J.device)
    assert (2 * plain - plain - plain).is_zero
    assert plain.structure == J.structure
    assert (plain / 2).structure.startswith("J[i,j,k,l]")


WIDE = rand(4, 5)
PICKLED = {
    "product": lambda x: jacobian(lambda x: x @ WIDE, x), "of itself": lambda x: jacobian(lambda x: x @ x.T, x),
    "batches": lambda x: jacobian(torch.bmm, x.expand(2, 3, 4), rand(2, 4, 3)), "named": lambda x: jacobian(torch.tanh, x, axes="i j -> i j"),
    "softmax": lambda x: jacobian(lambda x: x.softmax(-1), x), "looked up": lambda x: jacobian(lambda x: x.topk(2).values, x),
    "window": lambda x: jacobian(lambda x: x.unfold(1, 2, 1), x), "cumsum": lambda x: jacobian(lambda x: x.cumsum(0), x),
    "sum": lambda x: jacobian(torch.sin, x) + 2 * jacobian(torch.cos, x), "transpose": lambda x: jacobian(lambda x: x @ WIDE, x).T,
    "chain": lambda x: jacobian(torch.tanh, x.sin()) @ jacobian(torch.sin, x),
    "hessian": lambda x: df.hessian(lambda x: (x @ WIDE).square().sum() + x.exp().sum(), x),
}  # fmt: skip


@pytest.mark.parametrize(
    "copied", [lambda J: pickle.loads(pickle.dumps(J)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
@pytest.mark.parametrize("make", PICKLED.values(), ids=PICKLED)
def test_a_derivative_is_pickled_as_its_terms(make, copied):
    J = make(rand(3, 4))
    again = copied(J)
    assert (again.shape, again.nbytes, again.dtype, again.structure) == (J.shape, J.nbytes, J.dtype, J.structure)
    for x, y in ((again.dense(), J.dense()), (again.vjp(rand(*J.out_shape)), J.vjp(rand(*J.out_shape)))):
        torch.testing.assert_close(x, y, **TIGHT)
    torch.testing.assert_close(again.jvp(rand(*J.in_shape)), J.jvp(rand(*J.in_shape)), **TIGHT)
    text = jacobian(torch.exp, rand(2)).explain()
    assert str(copied(text)) == str(text)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["trace of a stack", "diagonal of a stack", "einsum of a stack", "matrix exp"])
def test_a_diagonal_of_an_axis_that_was_split_reaches_its_own_places_only(kind: str, n: int) -> None:
    """Entry k of a stack of n^2 is on the diagonal of (n, n) only where k = i n + i."""

    def f(x: Tensor) -> Tensor:
        if kind == "matrix exp":
            return torch.func.grad(lambda X: torch.matrix_exp(X).trace())(x.reshape(n, n))
        if kind == "trace of a stack":
            return torch.stack([x[k].sin() for k in range(n * n)]).reshape(n, n).trace()
        parts = torch.stack([x * (k + 1) for k in range(n * n)]).reshape(n, n, n, n)
        return torch.einsum("iikl->kl", parts) if kind[0] == "e" else parts.diagonal(dim1=0, dim2=1).sum(-1)

    x = torch.linspace(-1, 1, n * n, dtype=torch.float64)
    if kind == "matrix exp":
        J = df.hessian(lambda X: torch.matrix_exp(X).trace(), x.reshape(n, n))
        torch.testing.assert_close(J.dense().reshape(n, n, n * n), torch.func.jacrev(f)(x), rtol=1e-9, atol=1e-9)
        return
    J = df.jacobian(f, x)
    expected = torch.func.jacrev(f)(x)
    torch.testing.assert_close(J.dense(), expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(J.out_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), rtol=1e-12, atol=1e-12)

"""Contraction: equal to torch.einsum, priced before it is paid, and made of the ops a person would write."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.calculus.contract import contract, plan
from dualform.calculus.terms import Factor, Label, Select

t, s, i, o = (Label(n, name) for n, name in ((5, "t"), (5, "s"), (3, "i"), (4, "o")))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ops(f: object, *args: Tensor) -> list[str]:
    gm = make_fx(f)(*args)  # type: ignore[arg-type]
    return [n.target._opname for n in gm.graph.nodes if n.op == "call_function"]


def test_masked_scores_come_out_as_written_by_hand() -> None:
    def f(Q: Tensor, K: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return contract([Factor(Q, (t, i)), Factor(K, (s, i)), Factor(C, (t, s)), Factor(D, (s, o))], (t, o))

    args = rand(5, 3), rand(5, 3), rand(5, 5), rand(5, 4)
    assert ops(f, *args) == ["t", "mm", "mul", "mm"]
    Q, K, C, D = args
    torch.testing.assert_close(f(*args), (C * (Q @ K.T)) @ D)


def test_elementwise_and_vectors_stay_plain() -> None:
    assert ops(lambda c, x: contract([Factor(c, (t,)), Factor(x, (t, i))], (t, i)), rand(5), rand(5, 3)) == [
        "unsqueeze",
        "mul",
    ]
    assert ops(lambda x, b: contract([Factor(x, (t, i)), Factor(b, (i,))], (t, i)), rand(5, 3), rand(3)) == ["mul"]
    assert ops(lambda x, b: contract([Factor(x, (t, i)), Factor(b, (i,))], (t,)), rand(5, 3), rand(3)) == ["mv"]
    assert ops(lambda x: contract([Factor(x, (t, i))], (i,)), rand(5, 3)) == ["sum"]
    assert ops(lambda x: contract([Factor(x, (t, i))], (i, t)), rand(5, 3)) == ["t"]


@pytest.mark.parametrize("seed", range(8))
def test_contract_equals_einsum(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        count = rng.randint(2, 5)
        pool = [Label(n, name) for n, name in zip((2, 3, 4, 2, 3), "abcde", strict=True)][:count]
        factors = []
        for _ in range(rng.randint(1, 4)):
            labels = tuple(rng.choices(pool, k=rng.randint(0, 3)))  # repeats inside and between factors
            factors.append(Factor(rand(*(x.size for x in labels)), labels))
        present = list(dict.fromkeys(x for f in factors for x in f.labels))
        out = tuple(rng.sample(present, rng.randint(0, len(present))))
        spec = ",".join("".join(x.name for x in f.labels) for f in factors) + "->" + "".join(x.name for x in out)
        expected = torch.einsum(spec, *(f.tensor for f in factors))
        torch.testing.assert_close(contract(factors, out), expected, rtol=1e-12, atol=1e-12)
        assert plan(factors, out).flops >= 0


def test_plan_prices_without_numbers() -> None:
    shapes = ((5, 3), (t, i)), ((5, 3), (s, i)), ((5, 5), (t, s)), ((5, 4), (s, o))
    found = plan([Factor(torch.empty(shape, device="meta"), labels) for shape, labels in shapes], (t, o))
    assert found.flops == 2 * 5 * 5 * 3 + 5 * 5 + 2 * 5 * 5 * 4
    assert found.matmul_flops == found.flops - 25
    assert found.bytes == 4 * (25 + 25 + 20)
    assert [step.kind for step in found.steps] == ["mm", "mul", "mm"]
    assert "150 flops" in str(found)


def test_a_select_slices_and_pads() -> None:
    small, big = Label(3, "u"), Label(7, "v")
    x, y = rand(7), rand(3)
    for start, step in ((0, 1), (2, 1), (1, 2), (0, 3)):
        window = Select(small, big, start, step)
        stop = start + 3 * step
        assert torch.equal(contract([Factor(x, (big,)), window], (small,)), x[start:stop:step])
        placed = contract([Factor(y, (small,)), window], (big,))
        expected = torch.zeros(7, dtype=torch.float64)
        expected[start:stop:step] = y
        assert torch.equal(placed, expected)
        both = contract([Factor(y, (small,)), window], (small, big))
        assert torch.equal(both.sum(0), expected)


def test_contract_works_under_vmap_and_autograd() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return contract([Factor(a, (t, i)), Factor(b, (i, o)), Factor(a, (t, i))], (t, o))

    a, b = rand(2, 5, 3), rand(2, 3, 4)
    assert torch.autograd.gradcheck(f, (a[0].requires_grad_(), b[0].requires_grad_()))
    torch.testing.assert_close(torch.vmap(f)(a, b), torch.einsum("zti,zio->zto", a * a, b))


def test_an_absent_label_is_named() -> None:
    with pytest.raises(ValueError, match=r"out \[o:4\] has labels \[o:4\] that no factor has"):
        contract([Factor(rand(5, 3), (t, i))], (o,))


def test_mixed_dtypes_are_promoted() -> None:
    result = contract([Factor(rand(5, 3), (t, i)), Factor(torch.ones(3), (i,))], (t,))
    assert result.dtype == torch.float64

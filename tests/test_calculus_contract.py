"""Contraction: equal to torch.einsum, priced before it is paid, and made of the ops a person would write."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.algebra.contract import contract, plan
from dualform.algebra.planner import CALL, Price, _met, counted, token_order
from dualform.algebra.terms import Factor, Label, Select

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


@pytest.mark.parametrize("masks", [0, 0.7])
@pytest.mark.parametrize("seed", range(8))
def test_contract_equals_einsum(seed: int, masks: float) -> None:
    """Masks count as zeros and ones."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        count = rng.randint(2, 5)
        pool = [Label(n, name) for n, name in zip((2, 3, 4, 2, 3), "abcde", strict=True)][:count]
        factors = []
        for _ in range(rng.randint(1, 4)):
            labels = tuple(rng.choices(pool, k=rng.randint(0, 3)))  # repeats inside and between factors
            numbers = rand(*(x.size for x in labels))
            factors.append(Factor(numbers > 0 if factors and rng.random() < masks else numbers, labels))
        rng.shuffle(factors)
        present = list(dict.fromkeys(x for f in factors for x in f.labels))
        out = tuple(rng.sample(present, rng.randint(0, len(present))))
        spec = ",".join("".join(x.name for x in f.labels) for f in factors) + "->" + "".join(x.name for x in out)
        expected = torch.einsum(spec, *(f.tensor.double() for f in factors))
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


def test_a_plan_prints_the_loop_nest_and_the_largest_intermediate() -> None:
    shapes = ((5, 3), (t, i)), ((5, 3), (s, i)), ((5, 5), (t, s)), ((5, 4), (s, o))
    found = plan([Factor(torch.empty(shape, device="meta"), labels) for shape, labels in shapes], (t, o))
    assert found.naive == 4 * 5 * 5 * 3 * 4  # three products and a sum at every t, s, i, o
    assert found.price.largest == 25  # the scores; the result is no intermediate
    head = str(found).splitlines()[0]
    assert head == (
        "3 steps, 375 flops, 280 bytes written; one loop nest: 1,200 flops; largest intermediate: 25 numbers"
    )
    assert len(str(found).splitlines()) == 4
    alone = plan([Factor(torch.empty(5, 3), (t, i))], (t,))  # a sum is no step
    assert (alone.steps, alone.flops, alone.naive, alone.price) == ((), 0, 0, Price())
    outer = plan([Factor(torch.empty(5), (t,)), Factor(torch.empty(4), (o,))], (t, o))
    assert (outer.flops, outer.naive, outer.price.largest) == (20, 20, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_costs_what_its_trace_counts(seed: int) -> None:
    """One cost model: the flops of a plan's matrix products are those of the traced ops."""
    rng = random.Random(seed)
    for _ in range(10):
        pool = [Label(n, name) for n, name in zip((2, 3, 4, 5, 6), "abcde", strict=True)]
        factors = [tuple(rng.sample(pool, rng.randint(1, 3))) for _ in range(rng.randint(2, 4))]
        present = list(dict.fromkeys(x for labels in factors for x in labels))
        out = tuple(rng.sample(present, rng.randint(0, len(present))))
        args = [rand(*(x.size for x in labels)) for labels in factors]
        found = plan([Factor(x, labels) for x, labels in zip(args, factors, strict=True)], out)
        gm = make_fx(lambda *xs, fs=factors, o=out: contract([Factor(x, f) for x, f in zip(xs, fs, strict=True)], o))(
            *args
        )
        if not {"mv", "dot", "sum"} & {n.target._opname for n in gm.graph.nodes if n.op == "call_function"}:
            assert counted(gm.graph.nodes).flops == found.matmul_flops  # torch counts no product of a vector
        assert found.flops <= found.naive


def test_orders_from_the_tokens() -> None:
    sizes = (("t", 64), ("i", 32), ("a", 4), ("o", 32))
    low = token_order(("ti",), ("ia", "ao"), (False, False), "to", sizes)
    assert low is not None
    assert [step.out for step in low.steps] == ["ta", "to"]
    assert low.price.largest == 64 * 4
    assert low.price.flops == 2 * 64 * 32 * 4 * 2
    assert token_order(("ti",), ("ia", "ao"), (False, False), "to", sizes, 64 * 4) is None  # none is below the limit
    assert token_order(("ti",), ("ia", "ao"), (False, False), "to", sizes, 64 * 4 + 1) == low
    alone = token_order(("ti",), (), (), "ti", sizes)
    assert alone is not None
    assert alone.steps == ()
    # what only renames is free but for what it moves: an identity meets the fewest numbers
    eye = token_order(("i",), ("oi", "ao"), (True, False), "a", (("i", 32), ("o", 32), ("a", 2)))
    assert eye is not None
    assert eye.price.flops == 2 * 32 * 2


@pytest.mark.parametrize("seed", range(6))
def test_the_search_from_the_tokens_equals_all_orders(seed: int) -> None:
    """No order of meetings, with one token or with two, is cheaper than the one that is found."""
    rng = random.Random(seed)
    for _ in range(8):
        extents = {x: rng.choice((2, 3, 5, 8, 13)) for x in "ijkabg"}
        tokens, rows = ("j", "g")[: 1 + seed % 2], "ik"
        factors = tuple("".join(rng.sample("ijkabg", 2)) for _ in range(3))
        found = token_order(tokens, factors, (False,) * 3, rows, tuple(extents.items()))
        assert found is not None

        def met(left: str, right: str, later: str) -> tuple[float, str]:
            out = "".join(x for x in dict.fromkeys(left + right) if x in later)
            return _met(left, right, out, extents, False).total, out  # noqa: B023

        def walk(labels: str, order: tuple[int, ...], later: str) -> tuple[float, str]:
            total = 0.0
            for n, k in enumerate(order):
                price, labels = met(labels, factors[k], later + "".join(factors[m] for m in order[n + 1 :]))  # noqa: B023
                total += price
            return total, labels

        every = []
        for start, order in itertools.product(range(len(tokens)), itertools.permutations(range(3))):
            partner = "".join(x for k, x in enumerate(tokens) if k != start)
            for a, b in itertools.combinations_with_replacement(range(4), 2) if partner else [(0, 0)]:
                rest, after = ("".join(factors[k] for k in order[n:]) for n in (a, b))
                total, labels = walk(tokens[start], order[:a], rows + partner + rest)
                if partner:
                    price, right = walk(partner, order[a:b], rows + labels + after)
                    join, labels = met(labels, right, rows + after)
                    total += price + join
                price, labels = walk(labels, order[b:], rows)
                turned = labels != "".join(x for x in rows if x in labels)
                every.append(total + price + 64 * turned * (CALL + math.prod(extents[x] for x in labels)))
        assert found.price.total == min(every)

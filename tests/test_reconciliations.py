"""The laws of reconciliations, remainders and fusions, over whole catalogues; tinyBIG's numbers where right."""

import itertools
import re

import pytest
import torch

import dualform as df
from dualform import testing as laws
from dualform.functions.multilinear import Outer, plan_steps

DOUBLE = torch.float64
sizes = [(6, 12), (4, 4), (8, 6)]


def bound(catalogue):
    """One bound record per name, with options where a record has none of its own."""
    needed = {"weights": (0.5, 2.0, -1.0)}
    made = []
    for name in catalogue:
        options = {
            k: needed[k] for k, default in catalogue[name].options.items() if default is not None and k in needed
        }
        made.append(catalogue[name](**options))
    return made


@pytest.mark.parametrize("r", bound(df.reconciliations), ids=lambda r: r.name)
def test_reconciliations(r):
    for n, D in sizes:
        laws.check_reconciliation(r, n, D)


@pytest.mark.parametrize(
    "spec",
    [
        ("low_rank", {"rank": 5}), ("hm", {"p": 6, "q": 1}), ("hm", {"p": 1, "q": 12}),
        ("lphm", {"p": 3, "q": 4, "rank": 1}),
        ("dual_lphm", {"p": 2, "q": 6, "rank": 3}), ("duplicated_padding", {"p": 3, "q": 1}),
        ("masking", {"p": 0.1, "seed": 3}),
        ("duplicated_diagonal_padding", {"p": 2, "q": 3}), ("duplicated_diagonal_padding", {"p": 3, "q": 2}),
        ("masking", {"p": 1.0}), ("constant", {"c": -2.5}), ("hypernet", {"l": 3, "hidden_dim": 5}),
        ("loha", {"rank": 1}),
        ("random_matrix_hypernet", {"l": 2, "rank": 1}), ("random_matrix_adaption", {"rank": 7, "seed": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_reconciliations(spec):
    laws.check_reconciliation(df.reconciliations.build(spec), 6, 12)


def test_the_documented_products():
    """Against torch.kron and plain products, from the same flat w."""
    n, D, p, q, r = 6, 12, 2, 3, 2
    s, t = n // p, D // q

    def cut(w, *shapes):
        parts = w.split([a * b for a, b in shapes])
        return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]

    def drawn(name, **options):
        made = df.reconciliations[name](**options)
        w = torch.randn(made.length(n, D), dtype=DOUBLE)
        return w, made(w, n, D)

    w, W = drawn("hm", p=p, q=q)
    A, B = cut(w, (p, q), (s, t))
    laws.agree("hm", W, torch.kron(A, B))
    assert torch.linalg.matrix_rank(W) == 6  # tinyBIG's reshaped outer product has rank 1 here
    w, W = drawn("lphm", p=p, q=q, rank=r)
    A, S, T = cut(w, (p, q), (s, r), (r, t))
    laws.agree("lphm", W, torch.kron(A, S @ T))
    w, W = drawn("dual_lphm", p=p, q=q, rank=r)
    P, Q, S, T = cut(w, (p, r), (r, q), (s, r), (r, t))
    laws.agree("dual_lphm", W, torch.kron(P @ Q, S @ T))
    w, W = drawn("duplicated_padding", p=p, q=q)
    laws.agree("tiling", W, torch.kron(torch.ones(p, q, dtype=DOUBLE), w.reshape(s, t)))
    w, W = drawn("duplicated_diagonal_padding", p=p)
    laws.agree("diagonal", W, torch.block_diag(w.reshape(s, D // p), w.reshape(s, D // p)))
    w, W = drawn("low_rank", rank=r)
    A, B = cut(w, (n, r), (r, D))
    laws.agree("low rank", W, A @ B)
    w, W = drawn("loha", rank=r)
    A, B, P, Q = cut(w, (n, r), (r, D), (n, r), (r, D))
    laws.agree("loha", W, (A @ B) * (P @ Q))
    w, W = drawn("random_matrix_adaption", rank=r)
    c = df.reconciliations.random_matrix_adaption(rank=r).constants(n, D)
    laws.agree("vera", W, torch.diag(w[:n]) @ c["A"].double() @ torch.diag(w[n:]) @ c["B"].double().T)
    w, W = drawn("masking", p=0.25)
    laws.agree("masking", W[W != 0], w)
    assert len(w) == round(0.25 * n * D)


def test_identity_to_the_letter():
    r = df.reconciliations.identity()
    w = torch.arange(12.0)
    assert r.length(3, 4) == 12
    assert torch.equal(r(w, 3, 4), w.reshape(3, 4))
    for spelling in ("identity_reconciliation", "Identity", "identity"):
        assert df.reconciliations[spelling]() == r


def test_seeds_decide_what_is_frozen():
    for name in df.reconciliations:
        if "seed" not in df.reconciliations[name].options:
            continue
        draws = [df.reconciliations[name](seed=seed).constants(4, 6) for seed in (0, 0, 1)]
        assert all(torch.equal(draws[0][key], draws[1][key]) for key in draws[0])
        assert any(not torch.equal(draws[0][key], draws[2][key]) for key in draws[0]), name


def test_no_matrix_and_no_expanded_row_is_formed():
    """The largest tensor of apply on a factored row is far below n D and D."""
    n, m = 64, 40
    D = m * (m + 1)
    kappa = Outer(torch.randn(3, m + 1), torch.randn(3, m))
    for name, most in (("low_rank", 3 * 2 * (m + 1)), ("hm", 3 * n * m)):
        r = df.reconciliations[name](**({"p": 8, "q": m + 1} if name == "hm" else {}))
        w = torch.randn(r.length(n, D))
        seen = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, seen=seen):
                out = func(*args, **(kwargs or {}))
                aliases = func._schema.returns and func._schema.returns[0].alias_info is not None
                seen.append(0 if aliases or not isinstance(out, torch.Tensor) else out.numel())
                return out

        with Watch():
            r.apply(kappa, w, n)
        assert max(seen) <= max(most, len(w)), (name, max(seen))


def test_plans_start_at_the_tokens_and_are_cheapest():
    sizes = (("i", 50), ("a", 2), ("g", 30), ("h", 29))
    plan = plan_steps(("g", "h"), ("ia", "agh"), (False, False), "i", sizes)
    assert [s.which for s in (*plan.other, *plan.steps) if s.which is not None] == [1, 0]
    assert plan.steps[-1].out == "i"
    for start, steps in ((plan.start, plan.steps), (1 - plan.start, plan.other)):
        labels = ["g", "h"][start]
        for step in steps:
            assert set(step.out) <= set(labels) | set(step.right)
            labels = step.out
    sizes = (("i", 8), ("k", 8), ("j", 785), ("l", 784))
    plan = plan_steps(("j", "l"), ("ij", "kl"), (False, False), "ik", sizes)  # each token meets its own factor first
    assert {step.out for step in (*plan.other, plan.steps[0])} == {"i", "k"}


@pytest.mark.parametrize("p", bound(df.remainders), ids=lambda p: p.name)
def test_remainders(p):
    laws.check_remainder(p, 4, 4)
    if p.name != "identity":
        laws.check_remainder(p, 4, 3)


def test_remainders_with_activations():
    x, w, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    silu = torch.nn.functional.silu
    assert torch.equal(df.remainders.linear("silu")(x, 3, w, b), silu(x @ w.T + b))
    assert torch.equal(df.remainders.linear("silu", inside=True)(x, 3, w, b), silu(x) @ w.T + b)
    assert torch.equal(df.remainders.identity("tanh")(x, 4), torch.tanh(x))
    laws.check_remainder(df.remainders.linear("gelu", inside=True), 4, 3)


@pytest.mark.parametrize("u", bound(df.fusions), ids=lambda u: u.name)
def test_fusions(u):
    laws.check_fusion(u, (4, 4, 4))


def test_fusions_are_what_they_say():
    xs = [torch.randn(5, 4, dtype=DOUBLE) for _ in range(3)]
    s = torch.stack(xs)
    w = torch.randn(3, dtype=DOUBLE)
    expected = {
        "sum": s.sum(0), "mean": s.sum(0) / 3, "max": s.max(0).values, "min": s.min(0).values,
        "prod": xs[0] * xs[1] * xs[2],
        "median": s.sort(0).values[1], "l1_norm": s.abs().sum(0), "l2_norm": (s * s).sum(0).sqrt(),
        "concatenation": torch.cat(xs, -1),
    }  # fmt: skip
    for name, value in expected.items():
        laws.agree(name, df.fusions[name]()(xs), value)
    laws.agree("weights", df.fusions.weighted_summation(weights=(1, 2, 3))(xs), xs[0] + 2 * xs[1] + 3 * xs[2])
    laws.agree("learnt", df.fusions.parameterized_weighted_summation()(xs, w), torch.einsum("k,kbn->bn", w, s))
    laws.agree("metric", df.fusions.metric("std")(xs), s.std(0))
    mixed = df.fusions.parameterized_concatenation(n=2)
    w = torch.randn(mixed.length((4, 4, 4)), dtype=DOUBLE)
    laws.agree("mixed", mixed(xs, w), torch.cat(xs, -1) @ w.reshape(2, 12).T)
    laws.check_fusion(mixed, (2, 4, 6))
    assert df.fusions["summation"]() == df.fusions["sum_fusion"]() == df.fusions.sum()
    assert df.fusions["average_fusion"]() == df.fusions.mean()


def test_wide_structures_have_the_lengths_that_the_page_says():
    n, D = 64, 784 + 784**2
    lengths = {name: df.reconciliations[name]().length(n, D) for name in ("identity", "low_rank", "hm", "dual_lphm")}
    assert lengths == {
        "identity": n * D,
        "low_rank": 2 * (n + D),
        "hm": 8 * 784 + 8 * 785,
        "dual_lphm": 2 * (8 + 784 + 8 + 785),
    }


bad = [
    (lambda: df.reconciliations.low_rank(rank=0), "rank is 0; expected an integer rank >= 1"),
    (lambda: df.reconciliations.low_rank(rank=1.5), "rank is 1.5"),
    (lambda: df.reconciliations.masking(p=0.0), "p is 0.0; expected a share 0 < p <= 1"),
    (lambda: df.reconciliations.masking(p=1.5), "p is 1.5"),
    (lambda: df.reconciliations.hm(p=4).length(6, 12), "p is 4 and n is 6; expected p divides n: one of [1, 2, 3, 6]"),
    (lambda: df.reconciliations.duplicated_padding(p=2, q=5).length(6, 12), "q is 5 and D is 12"),
    (lambda: df.reconciliations.identity().length(0, 3), "n is 0"),
    (lambda: df.reconciliations.hypernet(l=0), "l is 0"),
    (lambda: df.reconciliations.low_rank(rank=True), "rank is True"),
    (lambda: df.reconciliations.masking(seed=-1), "seed is -1; expected an integer seed >= 0"),
    (lambda: df.reconciliations["low_rnak"], "'low_rank'"),
    (lambda: df.reconciliations.low_rank(rnak=2), "'rank'"),
    (lambda: df.reconciliations.identity()(torch.zeros(2, 3), 2, 3), "w has shape (2, 3); expected l(2, 3) = 6"),
    (lambda: df.remainders.identity().length(3, 4), "n is 4; expected n = m = 3"),
    (lambda: df.remainders.linear("sliu"), "'silu'"),
    (lambda: df.remainders.linear()(torch.zeros(2, 3), 4, torch.zeros(4, 3), torch.zeros(3)), "b has shape (3,)"),
    (lambda: df.fusions.sum().width((3, 4)), "dims is (3, 4); expected equal widths = 3"),
    (lambda: df.fusions.sum()([torch.zeros(2, 3), torch.zeros(2, 4)]), "dims is (3, 4)"),
    (lambda: df.fusions.sum()([]), "dims is ()"),
    (lambda: df.fusions.weighted_summation(weights=(1, 2)).width((3, 3, 3)), "weights has 2 entries; "
    "expected one per input = 3"),
    (lambda: df.fusions.metric("maen"), "'mean'"),
    (lambda: df.fusions.parameterized_concatenation(n=0), "n is 0"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(bad)))
def test_bad_input_raises_with_its_values(n):
    call, message = bad[n]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_records_are_data():
    """Every record has a formula, a source and a docstring; every bound one goes to JSON and back."""
    for catalogue in (df.reconciliations, df.remainders, df.fusions):
        for made in bound(catalogue):
            record = catalogue[made.name]
            assert all((record.formula, record.source, record.__doc__)), made
            assert catalogue.build(made.to_json()) == made
        keys = [catalogue[name] for name in catalogue]
        assert len({id(r) for r in keys}) == len(keys)
    assert all(
        a.formula != b.formula
        for a, b in itertools.combinations([df.reconciliations[n] for n in df.reconciliations], 2)
    )

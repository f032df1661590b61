"""The laws of heads over expansions and reconciliations, stacks, known networks, and what torch does to modules."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws
from dualform.functions import HeadConfig, LayerConfig, Stack, StackConfig, networks, set_naive_bayes

DOUBLE = torch.float64
# What an expansion's record cannot default; the sizes are those of four attributes.
needed = {"h": 2, "w": 2, "c": 2.0, "parts": ("identity", "legendre"), "p_h": 1, "p_w": 1, "radius": 1}


def specs(catalogue):
    made = []
    for name in catalogue:
        record = catalogue[name]
        asked = {k: v for k, v in needed.items() if k in record.options}
        made.append(record(**asked))
    return made


expansions, reconciliations = specs(df.expansions), [df.reconciliations[name]() for name in df.reconciliations]


@pytest.mark.parametrize("e", expansions, ids=lambda e: e.name)
def test_every_expansion(e):
    """Reconciliations, remainders and fusions rotate over the expansions."""
    n = expansions.index(e)
    r = reconciliations[n % len(reconciliations)]
    remainder = [df.remainders[name]() for name in df.remainders][n % len(df.remainders)]
    fusion = ["mean", "sum", "max", "concatenation", "parameterized_weighted_summation", "prod"][n % 6]
    torch.manual_seed(n)
    head = df.Head(4, 4, expansion=e, reconciliation=r, remainder=remainder, channels=2, fusion=fusion)
    laws.check_head(head)


@pytest.mark.parametrize("r", reconciliations, ids=lambda r: r.name)
def test_every_reconciliation(r):
    for expansion, m, n, channels in (("taylor", 4, 4, 1), ("identity", 6, 2, 3)):
        laws.check_head(df.Head(m, n, expansion=expansion, reconciliation=r, channels=channels))


@pytest.mark.parametrize("e", expansions, ids=lambda e: e.name)
def test_the_first_output_has_mean_square_one(e):
    """Every expansion with every reconciliation that has something to scale."""
    torch.manual_seed(0)
    for r in reconciliations:
        laws.check_unit_scale(df.Head(4, 4, expansion=e, reconciliation=r, bias=False), tolerance=0.2)


@pytest.mark.parametrize("u", [n for n in df.fusions if n not in ("weighted_summation", "metric")])
def test_the_first_output_under_every_fusion(u):
    torch.manual_seed(1)
    for remainder in ("zero", "linear"):
        laws.check_unit_scale(
            df.Head(6, 4, expansion="legendre", channels=2, fusion=u, remainder=remainder), tolerance=0.25
        )


def test_taylor_meets_low_rank_without_its_row():
    """Against the explicit quadratic form; the backward too."""
    m, n, r = 7, 3, 2
    head = df.Head(m, n, expansion="taylor", reconciliation=("low_rank", {"rank": r})).double()
    A, B = head.w[: n * r].reshape(n, r), head.w[n * r :].reshape(r, m + m * m)
    x = torch.randn(5, m, dtype=DOUBLE)
    quadratic = torch.einsum("rij,bi,bj->br", B[:, m:].reshape(r, m, m), x, x)
    expected = (x @ B[:, :m].T + quadratic) @ A.T + head.bias
    laws.agree("y", head(x), expected)
    got, wanted = (torch.autograd.grad(y.square().sum(), head.w)[0] for y in (head(x), expected))
    laws.agree("dw", got, wanted)


def test_gradcheck():
    head = df.Head(3, 2, expansion="legendre", reconciliation=("lphm", {"rank": 1}), remainder="linear").double()
    x = torch.rand(4, 3, dtype=DOUBLE, requires_grad=True)
    names = [name for name, _ in head.named_parameters()]

    def run(x, *tensors):
        return torch.func.functional_call(head, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *head.parameters()))


compiled = [("taylor", "dual_lphm"), ("bspline", "masking"), ("legendre", "hypernet"), ("gaussian_rbf", "random_matrix_adaption"),
            ("identity", "eye"), ("fourier", "duplicated_diagonal_padding")]  # fmt: skip


@pytest.mark.parametrize(("e", "r"), compiled)
def test_compile_and_export(e, r):
    head = df.Head(4, 4, expansion=e, reconciliation=r, remainder="linear", channels=2, fusion="sum")
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(7, 4)
    torch.testing.assert_close(exported(x), head(x))


def test_modules_do_what_modules_do():
    head = df.Head(4, 3, expansion="taylor", reconciliation="masking", remainder="linear")
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.w.add_(1.0)
    assert not torch.equal(head.w, twin.w)
    assert head.double().w.dtype == DOUBLE
    assert head(torch.zeros(2, 4, dtype=DOUBLE)).dtype == DOUBLE
    assert {"w", "bias", "remainder_weight", "frozen_places"} == set(head.state_dict())
    with torch.device("meta"):
        empty = df.Head(4, 3, expansion="taylor", reconciliation="masking", remainder="linear")
    assert empty.w.is_meta
    assert "expansions.taylor" in repr(head)
    assert "l=" in repr(head)
    plain = df.Head(4, 3)
    stacked = torch.func.stack_module_state([df.Head(4, 3) for _ in range(3)])[0]
    many = torch.vmap(lambda p, x: torch.func.functional_call(plain, p, (x,)), (0, None))
    assert many(stacked, torch.zeros(2, 4)).shape == (3, 2, 3)


def test_stacks_go_to_text_and_back(tmp_path):
    wide = LayerConfig((HeadConfig(5, 4, remainder="linear"), HeadConfig(5, 4, expansion="chebyshev")), fusion="sum")
    config = StackConfig((HeadConfig(3, 5, expansion=("bspline", {"cells": 4})), wide, HeadConfig(4, 2)), "tanh")
    file = tmp_path / "net.toml"
    file.write_text(config.to_toml())
    assert StackConfig.from_toml(file.read_text()) == config == StackConfig.from_json(config.to_json())
    stack = config.build()
    x = torch.randn(6, 3)
    h = torch.tanh(stack[0](x))
    h = torch.tanh(stack[1].heads[0](h) + stack[1].heads[1](h))
    torch.testing.assert_close(stack(x), stack[2](h))
    again = StackConfig.from_toml(file.read_text()).build()
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again(x), stack(x))


# -- known networks, each against its own definition
# --------------------------------------------------------------------


def test_mlp_is_linear_layers():
    net = networks.mlp(dims=(5, 7, 3), activation="gelu")()
    plain = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    with torch.no_grad():
        for layer, linear in zip(net, (plain[0], plain[2]), strict=True):
            layer.heads[0].w.copy_(linear.weight.flatten())
            layer.heads[0].bias.copy_(linear.bias)
    x = torch.randn(4, 5)
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-6)


def test_kan_is_splines_on_a_silu_base():
    scipy = pytest.importorskip("scipy.interpolate")
    import numpy as np

    net = networks.kan(dims=(3, 2), cells=4, degree=3)().double()
    head = net[0].heads[0]
    x = 1.8 * torch.rand(6, 3, dtype=DOUBLE) - 0.9
    h = 2 / 4
    knots = -1 + h * np.arange(-3, 4 + 3 + 1)
    c = head.w.detach().reshape(2, 3, 7).numpy()
    expected = F.silu(x) @ head.remainder_weight.T
    for j in range(2):
        for i in range(3):
            spline = scipy.BSpline(knots, c[j, i], 3)(x[:, i].numpy())
            expected[:, j] = expected[:, j] + torch.from_numpy(spline)
    laws.agree("kan", net(x), expected)


def test_rbf_is_bumps_on_a_grid():
    net = networks.rbf(dims=(2, 3), count=5, epsilon=1.5)().double()
    head = net[0].heads[0]
    x = torch.randn(4, 2, dtype=DOUBLE)
    centres = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    bumps = torch.exp(-((1.5 * (x[:, :, None] - centres)) ** 2))
    expected = torch.einsum("bik,nik->bn", bumps, head.w.reshape(3, 2, 5)) + head.bias
    laws.agree("rbf", net(x), expected)


def test_naive_bayes_is_naive_bayes():
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 4, generator=g, dtype=DOUBLE) * 2 + 1
    y = torch.randint(0, 3, (60,), generator=g)
    fitted = sklearn.GaussianNB().fit(X.numpy(), y.numpy())
    head = networks.naive_bayes(dims=(4, 3))().double()[0].heads[0]
    moments = [torch.from_numpy(a) for a in (fitted.theta_, fitted.var_, fitted.class_prior_)]
    set_naive_bayes(head, *moments)
    expected = torch.from_numpy(fitted.predict_joint_log_proba(X.numpy()))
    torch.testing.assert_close(head(X), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="two normal log-densities"):
        set_naive_bayes(df.Head(4, 3), *moments)
    with pytest.raises(ValueError, match=r"expected \(3, 4\)"):
        set_naive_bayes(head, moments[0].T, *moments[1:])


def test_taylornet_is_a_polynomial():
    net = networks.taylornet(dims=(3, 2), degree=3)().double()
    head = net[0].heads[0]
    x = torch.randn(4, 3, dtype=DOUBLE)
    W1, W2, W3 = head.w.reshape(2, 39).split([3, 9, 27], -1)
    expected = (
        x @ W1.T
        + torch.einsum("nij,bi,bj->bn", W2.reshape(2, 3, 3), x, x)
        + torch.einsum("nijk,bi,bj,bk->bn", W3.reshape(2, 3, 3, 3), x, x, x)
        + head.bias
    )
    laws.agree("taylornet", net(x), expected)
    assert networks.taylornet(dims=(3, 2), rank=1, symmetric=True)()(x.float()).shape == (4, 2)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_adapters_change_a_linear_map(kind):
    linear = nn.Linear(6, 4).double()
    x = torch.randn(5, 6, dtype=DOUBLE)
    before = linear(x).detach()
    adapted = networks[kind](rank=2, alpha=4)(linear)
    laws.agree("at the start", adapted(x), before)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == ["head.w"]
    nn.init.normal_(adapted.head.w)
    w = adapted.head.w
    if kind == "lora":
        change = w[:8].reshape(4, 2) @ w[8:].reshape(2, 6)
    else:
        A, B, P, Q = (p.reshape(s) for p, s in zip(w.split([8, 12, 8, 12]), [(4, 2), (2, 6)] * 2, strict=True))
        change = (A @ B) * (P @ Q)
    laws.agree("adapted", adapted(x), before + 2 * x @ change.T)
    laws.agree("merged", adapted.merged()(x), adapted(x))
    loss = adapted(x).square().sum()
    loss.backward()
    assert linear.weight.grad is None
    assert adapted.head.w.grad is not None
    with pytest.raises(ValueError, match=r"is a Conv1d; expected an nn\.Linear"):
        networks[kind]()(nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_adapters_learn_from_zero(kind):
    torch.manual_seed(0)
    adapted = networks[kind](rank=2)(nn.Linear(6, 4))
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    optimizer = torch.optim.Adam([adapted.head.w], lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(adapted(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


bad = [
    (lambda: df.Head(0, 2), "m is 0; expected an integer m >= 1"),
    (lambda: df.Head(3, 2.5), "n is 2.5"),
    (lambda: df.Head(3, 2, channels=0), "channels is 0"),
    (lambda: df.Head(3, 2, expansion="tailor"), "'taylor'"),
    (lambda: df.Head(3, 2, reconciliation=("low_rank", {"rank": 0})), "rank is 0"),
    (lambda: df.Head(3, 2, remainder="identity"), "n is 2; expected n = m = 3"),
    (lambda: df.Head(3, 4, channels=3, fusion="concatenation"), "n is 4; expected a multiple of channels = 3"),
    (lambda: df.Head(3, 4, channels=2, fusion=("parameterized_concatenation", {"n": 3})), "gives 3 outputs; "
    "expected n = 4"),
    (lambda: df.Head(3, 2, interdependence="graph"), "interdependence is 'graph'; expected interdependence = None"),
    (lambda: df.Head(10_000, 2, expansion=("taylor", {"degree": 3})), "1,000,100,010,000"),
    (lambda: df.Head(3, 2)(torch.zeros(5, 4)), "x has shape (5, 4); expected (..., m) with m = 3"),
    (lambda: df.Head(3, 2)(torch.zeros(())), "x has shape ()"),
    (lambda: df.Head(3, 2)([1.0, 2.0, 3.0]), "x is a list; expected a tensor"),
    (lambda: df.Head("3", 2), "m is '3'"),
    (lambda: df.Head(3, 2, reconciliation="hypernte"), "'hypernet'"),
    (lambda: HeadConfig.from_dict({"m": 2, "n": 3, "chanels": 2}), "unknown key 'chanels'. Did you mean 'channels'?"),
    (lambda: HeadConfig.from_dict({"m": 2}), "'n' is missing"),
    (lambda: StackConfig(()), "layers is empty"),
    (lambda: Stack([HeadConfig(2, 3), HeadConfig(4, 1)]), "reads m = 4; expected the width of layer 0, n = 3"),
    (lambda: Stack([HeadConfig(2, 3)], activation="rleu"), "'relu'"),
    (lambda: LayerConfig((HeadConfig(2, 3), HeadConfig(3, 3))), "read m = [2, 3]"),
    (lambda: LayerConfig((HeadConfig(2, 3), HeadConfig(2, 4))), "dims is (3, 4)"),
    (lambda: networks.mlp(dims=(3,)), "dims is (3,)"),
    (lambda: networks.lora(rank=0), "rank is 0"),
]  # fmt: skip


def test_numbers_of_numpy_are_numbers():
    head = df.Head(
        np.int64(3),
        np.int32(2),
        expansion=("taylor", {"degree": np.int64(2)}),
        reconciliation=("masking", {"p": np.float32(0.5)}),
    )
    assert HeadConfig.from_json(head.config.to_json()) == head.config == df.Head(
        3, 2, expansion=("taylor", {"degree": 2}), reconciliation=("masking", {"p": 0.5})
    ).config  # fmt: skip


@pytest.mark.parametrize("n", range(len(bad)))
def test_bad_input_raises_with_its_values(n):
    call, message = bad[n]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

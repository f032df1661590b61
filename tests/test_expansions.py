"""Laws and oracles of the data expansions. A new record is tested by existing."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import pywt
import scipy.integrate
import scipy.interpolate
import scipy.special
import scipy.stats
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import dualform as df
from dualform.functions import Expansion, expansions, in_blocks
from dualform.functions.basis import attribute_wise
from dualform.testing import LawBroken, agree, check_expansion, check_forms

DATA = Path(__file__).parent / "data"


def nudged(record):
    """Bind a record with every number and switch away from its default."""

    def moved(value):
        if isinstance(value, bool):
            return not value
        return value + 1 if isinstance(value, int) else value + 0.5 if isinstance(value, float) else value

    return record(**{name: moved(value) for name, value in record.options.items()})


def sizes(e):
    """Some numbers of attributes that it takes: a patch wants a grid's."""
    found = []
    for m in range(1, 19):
        try:
            e.dim(m)
        except df.ShapeError:
            continue
        found.append(m)
    return found


@pytest.mark.parametrize("name", expansions)
def test_laws(name):
    for e in (expansions[name](), nudged(expansions[name])):
        few = [m for m in sizes(e) if m > 1] or sizes(e)
        check_expansion(e, few[0] if len(few) < 3 else few[2])
        check_expansion(e, sizes(e)[0], seed=1)


@pytest.mark.parametrize("name", expansions)
def test_records_say_what_they_are(name):
    e = expansions[name]()
    assert e.record.formula
    assert e.record.source
    assert e.record.domain
    assert e.rule
    assert any(alias.endswith("_expansion") for alias in e.record.aliases)
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.build().rule = ""


SOME = {
    "constants": expansions.linear(post=((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))),
    "scales": expansions.linear(c=(1.0, 2.0, 3.0)),
    "mixing rows": expansions.linear(pre=np.random.default_rng(0).normal(size=(5, 5)).tolist()),
    "given centres": expansions.gaussian_rbf(centres=(0.1, 0.5)),
    "centres by attribute": expansions.inverse_quadratic_rbf(centres=((0.1, 0.5), (0.2, 0.3), (0.0, 1.0))),
    "cubic monomials": expansions.taylor(degree=3, symmetric=True),
    "powers of wavelets": expansions.dog_wavelet(degree=2, scales=2, shifts=2, dilation=2.0),
    "one after another": expansions.nested(functions=("bspline", ("taylor", {"degree": 2}))),
    "side by side": expansions.extended(functions=[("nested", {"functions": ["haar", "normal"]}), "taylor"]),
    "a mother of one's own": expansions.discrete_wavelet(mother=("naive_cauchy", {"scale": 0.3}), scales=2),
    "many splines": expansions.bspline(span=(-2, 3), cells=31, degree=5),
}


@pytest.mark.parametrize("name", SOME)
def test_laws_of_some_options(name):
    check_expansion(SOME[name], 3)


def test_laws_of_a_grid():
    check_expansion(expansions.cuboid_patch((1, 0, 1), (0, 2, 0), grid=(3, 2, 2), channels=2, stride=(2, 1, 2)), 24)
    check_expansion(expansions.sphere_patch(radius=2, grid=(3, 4), channels=2, stride=2), 24)


# -- every law bites ---------------------------------------------------------------------------------------------------


def planted(**changes):
    good = attribute_wise("planted", lambda x, axis: torch.stack([x, x * x], axis), ["x", "x*x"])
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"base_dim": lambda m: 2 * m + 1}, "shape"),
        ({"base": lambda x: torch.stack([x, x * x], -1).flatten(-2).float().to(x.dtype)}, "gradient|phi|text"),
        ({"base": lambda x: torch.stack([x, x * x], -1).flatten(-2).double()}, "dtype"),
        ({"base": lambda x: torch.stack([x, x * x - (x * x).mean()], -1).flatten(-2)}, "rows alone|again|shape"),
        ({"base": lambda x: torch.stack([x, x * x + 1e-6 * torch.rand(())], -1).flatten(-2)}, "again"),
        ({"base": lambda x: torch.stack([x.mul_(1.001), x * x], -1).flatten(-2)}, "after the call"),
        ({"base": lambda x: torch.stack([x.detach(), x * x], -1).flatten(-2)}, "gradient"),
        ({"domain": (-math.inf, 1.0)}, "domain"),
        ({"reach": (-1e25, 1e25)}, "float32 on the reach"),
        ({"terms": ("x", "x**3")}, "text"),
        ({"terms": ("x",)}, "features"),
        ({"layout": "function"}, "text|phi"),
        ({"basis": lambda x, axis: torch.stack([x, x * x * x], axis)}, "phi"),
    ],
)
def test_the_laws_bite(wrong, says):
    check_expansion(planted(reach=(-1e15, 1e15)))
    with pytest.raises(LawBroken, match=says):
        check_expansion(planted(**{"reach": (-1e15, 1e15)} | wrong))


class Forgetful(Expansion):
    def contract(self, x, weight):
        return self(x)[..., :-1] @ weight[:, :-1].mT


def test_the_law_of_contraction_bites():
    fields = {f.name: getattr(expansions.taylor().build(), f.name) for f in dataclasses.fields(Expansion)}
    with pytest.raises(LawBroken, match="contract"):
        check_expansion(Forgetful(**fields))


# -- oracles -----------------------------------------------------------------------------------------------------------

X = torch.linspace(-1.3, 1.7, 41, dtype=torch.float64)
POLYNOMIALS = {
    "chebyshev": ({}, scipy.special.eval_chebyt),
    "legendre": ({}, scipy.special.eval_legendre),
    "hermite": ({}, scipy.special.eval_hermitenorm),
    "laguerre": ({"alpha": 0.7}, lambda n, x: scipy.special.eval_genlaguerre(n, 0.7, x)),
    "gegenbauer": ({"alpha": 0.7}, lambda n, x: scipy.special.eval_gegenbauer(n, 0.7, x)),
    "jacobi": ({"alpha": 0.7, "beta": -0.4}, lambda n, x: scipy.special.eval_jacobi(n, 0.7, -0.4, x)),
    # y_n(x) = sum (n + k)! / ((n - k)! k!) (x / 2)^k, and theta_n(x) = x^n y_n(1 / x)
    "bessel": ({}, lambda n, x: sum(math.perm(n + k, 2 * k) / math.factorial(k) * (x / 2) ** k for k in range(n + 1))),
    "reverse_bessel": (
        {},
        lambda n, x: sum(math.perm(n + k, 2 * k) / math.factorial(k) * 0.5**k * x ** (n - k) for k in range(n + 1)),
    ),
    "fibonacci": ({}, lambda n, x: sum(math.comb(n - k - 1, k) * x ** (n - 2 * k - 1) for k in range((n + 1) // 2))),
    "lucas": (
        {},
        lambda n, x: sum(n / (n - k) * math.comb(n - k, k) * x ** (n - 2 * k) for k in range(n // 2 + 1)),
    ),
}


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_those_of_scipy(name):
    options, oracle = POLYNOMIALS[name]
    phi = expansions[name](degree=7, **options).phi(X)
    expected = np.stack([oracle(n, X.numpy()) * np.ones(len(X)) for n in range(1, 8)], -1)
    agree(name, phi, torch.from_numpy(expected))


def test_every_family_with_a_degree_and_no_knots_has_an_oracle():
    families = {n for n in expansions if "degree" in expansions[n].options and expansions[n](degree=2).degree == 2}
    assert {n for n in families if not expansions[n]().knots} == POLYNOMIALS.keys()


@pytest.mark.parametrize(
    ("span", "cells", "degree"), [((-1, 1), 5, 3), ((0, 3), 1, 1), ((-2, 1), 12, 2), ((0, 1), 4, 7)]
)
def test_splines_are_those_of_scipy(span, cells, degree):
    e = expansions.bspline(span=span, cells=cells, degree=degree)
    x = torch.linspace(e.knots[0] - 0.5, e.knots[-1] + 0.5, 201, dtype=torch.float64)
    for i in range(cells + degree):
        one = scipy.interpolate.BSpline.basis_element(e.knots[i : i + degree + 2], extrapolate=False)
        agree(f"B_{i}", e.phi(x)[..., i], torch.from_numpy(np.nan_to_num(one(x.numpy()))))
    inside = x[(x >= span[0]) & (x < span[1])]
    agree("partition of unity", e.phi(inside).sum(-1), torch.ones_like(inside))


def test_wavelets_are_those_of_pywavelets():
    mexican, _ = pywt.ContinuousWavelet("mexh").wavefun(length=201)
    _, at = pywt.ContinuousWavelet("mexh").wavefun(length=201)
    agree("ricker", expansions.ricker_wavelet().phi(torch.from_numpy(at))[..., 0], torch.from_numpy(mexican))
    # shan with bandwidth 1/2 and centre 3/4: psi = sqrt(B) sinc(B t) exp(2 pi i C t), ours is its real part over
    # sqrt(B)
    shannon, at = pywt.ContinuousWavelet("shan0.5-0.75").wavefun(length=201)
    got = expansions.shannon_wavelet().phi(torch.from_numpy(at))[..., 0]
    agree("shannon", got, torch.from_numpy(shannon.real / math.sqrt(0.5)))
    _, haar, at = pywt.Wavelet("haar").wavefun(level=6)
    here = (at > 0) & (at < 1) & (at != 0.5)
    got = expansions.haar().phi(torch.from_numpy(at[here]))[..., 0]
    agree("haar", got, torch.from_numpy(haar[here]))


def meyer(part, t):
    """Integrate the inverse Fourier transform of Meyer's functions with nu(x) = x."""
    pi = math.pi
    if part == "scaling":
        low, high = (0, 2 * pi / 3), (2 * pi / 3, 4 * pi / 3)
        bands = [(low, lambda w: 1.0), (high, lambda w: math.cos(pi / 2 * (3 * w / (2 * pi) - 1)))]
    else:
        low, high = (2 * pi / 3, 4 * pi / 3), (4 * pi / 3, 8 * pi / 3)
        bands = [
            (low, lambda w: math.sin(pi / 2 * (3 * w / (2 * pi) - 1))),
            (high, lambda w: math.cos(pi / 2 * (3 * w / (4 * pi) - 1))),
        ]
        t = t - 0.5
    return sum(
        scipy.integrate.quad(lambda w, f=f: f(w) * math.cos(w * t) / pi, *band, epsabs=1e-13)[0] for band, f in bands
    )


@pytest.mark.parametrize("part", ["wavelet", "scaling"])
def test_meyer_is_its_fourier_integral(part):
    points = [
        -3.3,
        -0.75,
        -0.25,
        0.0,
        0.125,
        0.5,
        0.75,
        0.875,
        1.25,
        4.0,
    ]  # the closed form's removable poles among them
    got = expansions.meyer_wavelet(part=part).phi(torch.tensor(points, dtype=torch.float64))[..., 0]
    agree(part, got, torch.tensor([meyer(part, t) for t in points], dtype=torch.float64))


def test_wavelets_integrate_to_zero_and_tinybig_scaling_function_does_not():
    t = torch.arange(-400, 400, 0.01, dtype=torch.float64)
    for name in ("haar", "ricker_wavelet", "dog_wavelet", "shannon_wavelet", "meyer_wavelet"):
        assert abs(expansions[name]().phi(t).sum() * 0.01) < 1e-2, name
    assert abs(expansions.meyer_wavelet(part="scaling").phi(t).sum() * 0.01 - 1) < 1e-3


def squashed(x, slope=0.99):
    return slope / (1 + np.exp(-x)) + 0.001


DENSITIES = {
    "normal": lambda x, mean, std: scipy.stats.norm.logpdf(x, mean, std),
    "cauchy": lambda x, loc, scale: scipy.stats.cauchy.logpdf(x, loc, scale),
    "laplace": lambda x, loc, scale: scipy.stats.laplace.logpdf(x, loc, scale),
    "gamma": lambda x, a, rate: scipy.stats.gamma.logpdf(squashed(x), a, scale=1 / rate),
    "chi2": lambda x, k: scipy.stats.chi2.logpdf(squashed(x, 1.0), k),
    "exponential": lambda x, rate: scipy.stats.expon.logpdf(squashed(x), scale=1 / rate),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_those_of_scipy(name):
    """The list, the naive one with its own parameters, and the hybrid's share."""
    for e in (expansions[name](), expansions[f"naive_{name}"](), nudged(expansions[f"naive_{name}"])):
        theta = e.options.get("theta") or [tuple(e.options.values())]
        for k, values in enumerate(theta):
            values = values if isinstance(values, tuple) else (values,)
            agree(f"{name}{values}", e.phi(X)[..., k], torch.from_numpy(DENSITIES[name](X.numpy(), *values)))


def test_the_hybrid_holds_one_of_each():
    x = X.numpy()
    expected = [
        scipy.stats.norm.logpdf(x), scipy.stats.cauchy.logpdf(x), scipy.stats.chi2.logpdf(squashed(x), 1),
        scipy.stats.gamma.logpdf(squashed(x), 0.5), scipy.stats.laplace.logpdf(x),
        scipy.stats.expon.logpdf(squashed(x)),
    ]  # fmt: skip
    agree("hybrid", expansions.hybrid_probabilistic().phi(X), torch.from_numpy(np.stack(expected, -1)))


def test_the_beta_wavelet_is_the_density_and_zero_outside():
    e = expansions.beta_wavelet(alpha=2.5, beta=3.5)
    agree("beta", e.phi(X)[..., 0], torch.from_numpy(scipy.stats.beta.pdf(X.numpy(), 2.5, 3.5)))
    x = torch.tensor([0.3, 7.0], dtype=torch.float64, requires_grad=True)
    e.phi(x).sum().backward()
    assert x.grad.isfinite().all()


def test_patches_are_those_of_unfold():
    x = torch.randn(3, 2 * 4 * 5, dtype=torch.float64)
    e = expansions.cuboid_patch(grid=(4, 5), channels=2, stride=2)
    expected = torch.nn.functional.unfold(x.view(3, 2, 4, 5), (3, 3), padding=1, stride=2)
    agree("unfold", e(x), expected.flatten(1))
    square = expansions.cuboid_patch()(x[:, :16])
    agree(
        "a square by default", square, torch.nn.functional.unfold(x[:, :16].view(3, 1, 4, 4), 3, padding=1).flatten(1)
    )


# -- Taylor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_symmetric_taylor_keeps_each_monomial_once(degree):
    x = torch.randn(2, 3, dtype=torch.float64)
    full, packed = expansions.taylor(degree=degree), expansions.taylor(degree=degree, symmetric=True)
    names = ["a", "b", "c"]
    first = {}
    for place, monomial in enumerate(full.features(names)):
        first.setdefault("*".join(sorted(monomial.split("*"))), place)
    assert packed.features(names) == list(first)
    assert packed.dim(3) == math.comb(3 + degree, degree) - 1
    agree("monomials", packed(x), full(x)[:, list(first.values())])


@pytest.mark.parametrize(("degree", "n"), [(2, 1), (3, 2), (4, 1), (2, 9)])
def test_contraction_builds_no_row(degree, n):
    e = expansions.taylor(degree=degree)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.randn(n, e.dim(4), dtype=torch.float64)
    agree("contract", e.contract(x, weight), e(x) @ weight.T)


def test_a_row_that_explodes_is_refused_with_its_size():
    with pytest.raises(
        df.ShapeError, match=r"1,000,100,010,000 features.*at most 100,000,000.*166,766,685,000.*100,010,000"
    ):
        expansions.taylor(degree=3)(torch.zeros(1, 10_000))
    assert expansions.taylor(degree=3).dim(10_000) == 10_000 + 10_000**2 + 10_000**3


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "x", "says"),
    [
        (("taylor", {"degree": 0}), None, "taylor: degree is 0; expected a whole number degree >= 1"),
        (("legendre", {"degree": 1.5}), None, "degree is 1.5"),
        (("jacobi", {"degree": 3, "alpha": -3.0, "beta": 0.0}), None, "alpha and beta"),
        (("bspline", {"cells": 0}), None, "cells is 0"),
        (("bspline", {"span": (1, 1)}), None, r"span is \(1, 1\)"),
        (("gaussian_rbf", {"epsilon": 0.0}), None, "epsilon is 0.0"),
        (("gaussian_rbf", {"centres": ()}), None, "centres"),
        (("gaussian_rbf", {"centres": ((1.0,), (2.0, 3.0))}), None, "centres are .*finite numbers"),
        (("gaussian_rbf", {"centres": "abc"}), None, "centres is 'abc'; expected a value of type Sequence"),
        (("fourier", {"period": -1.0}), None, "period is -1.0"),
        (("normal", {"theta": ((0.0, -1.0),)}), None, r"theta holds \(0.0, -1.0\).*std > 0"),
        (("gamma", {"theta": ()}), None, "theta is empty"),
        (("haar", {"dilation": 0.5}), None, r"is \(0.5, 1.0\); expected dilation >= 1"),
        (("ricker_wavelet", {"sigma": 0.0}), None, "sigma is 0.0"),
        (("beta_wavelet", {"alpha": 0.5}), None, r"is \(0.5, 1.0\)"),
        (("meyer_wavelet", {"part": "both"}), None, "part is 'both'"),
        (("discrete_wavelet", {"mother": "normal"}), None, "6 functions per attribute"),
        (("extended", {"functions": ()}), None, "functions is empty"),
        (("extended", {"functions": "taylor"}), None, "expected a list of specs"),
        (("nested", {"functions": ["taylr"]}), None, "'taylor'"),
        (("linear", {"post": (1.0, 2.0)}), None, r"post has shape \(2,\)"),
        (("linear", {"post": ((1.0,), (2.0,))}), torch.zeros(3), r"x has 3 attributes; expected 2"),
        (("linear", {"pre": ((1.0, 0.0), (0.0, 1.0))}), torch.zeros(3, 4), r"\(3, 4\); expected \(..., 2, m\)"),
        (("gaussian_rbf", {"centres": ((1.0,), (2.0,))}), torch.zeros(3), "x has 3 attributes; expected 2"),
        (("cuboid_patch", {"grid": (2, 3)}), torch.zeros(5), r"x has 5 attributes.*1 \* 2 \* 3 \* 1 = 6"),
        (("cuboid_patch", {"before": (1, 1)}), None, "3 numbers >= 0 each"),
        (("sphere_patch", {"stride": 0}), None, r"stride is \(0, 0, 0\)"),
        (("identity", {}), torch.tensor(1.0), "x is a scalar"),
        (("taylor", {}), torch.zeros(2, 0), "m is 0; expected at least one attribute"),
        (("taylor", {}), torch.zeros(2, 3, dtype=torch.int64), "dtype torch.int64; expected a floating dtype"),
        (("taylor", {}), [1.0, 2.0], "x is a list; expected a tensor"),
        (("taylor", {}), np.ones((2, 2)), "x is a ndarray; expected a tensor"),
        (("taylor", {"degre": 2}), None, "Did you mean 'degree'"),
        ("chebishev", None, "'chebyshev'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_values(spec, x, says):
    with pytest.raises(ValueError, match=says):
        expansions.build(spec)(x)


def test_numbers_outside_the_domain_do_what_the_record_says():
    far = torch.tensor([50.0])
    assert expansions.bspline()(far).eq(0).all()
    assert expansions.reciprocal()(torch.tensor([0.0, -0.0, -1e-9])).tolist() == pytest.approx([1e6, 1e6, -1e6])
    assert expansions.gaussian_rbf()(far).eq(0).all()
    assert expansions.bspline()(torch.tensor([math.nan])).isnan().all()
    assert expansions.haar()(torch.tensor([-0.1, 0.0, 0.5, 1.0])).tolist() == [0, 1, -1, 0]


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", expansions)
def test_every_expansion_is_one_graph(name):
    """Exported whole: no branch on data, nothing that a compiler cannot see."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.e = expansions[name]().build()

        def forward(self, x):
            return self.e(x)

    x = torch.rand(3, 4) + 0.2
    rows = {0: torch.export.Dim("rows")} if expansions[name]().batchwise else {}
    exported = torch.export.export(Layer(), (x,), dynamic_shapes={"x": rows}).module()
    more = torch.rand(5, 4) + 0.3
    agree("exported", exported(more), expansions[name]()(more))


@pytest.mark.parametrize(
    "spec", [("bspline", {"cells": 3, "degree": 2}), ("taylor", {"symmetric": True}), "reciprocal"]
)
def test_what_scatters_slices_and_clamps_is_a_hidden_state_too(spec):
    head = df.learners.Head(expansion=spec)(3).double()
    check_forms(df.derive(head, chunk=3), ("auto",), time=5)


# -- the class list ----------------------------------------------------------------------------------------------------

CLASSES = json.loads((DATA / "rpn_classes.json").read_text())
CATALOGUES = {
    "expansion": df.expansions,
    "reconciliation": df.reconciliations,
    "remainder": df.remainders,
    "fusion": df.fusions,
}


@pytest.mark.parametrize("family", CLASSES["classes"])
def test_every_class_resolves_or_waits_for_a_reason(family):
    """The laws run over whole catalogues, so a class that resolves has its law run."""
    names = CLASSES["classes"][family]
    if family in CLASSES["waiting"]:
        assert family not in CATALOGUES
        assert CLASSES["waiting"][family]
        return
    catalogue = CATALOGUES[family]
    rule = {"expansion": "dim", "reconciliation": "length", "remainder": "length", "fusion": "length"}[family]
    for name in names:
        if name in CLASSES["waiting"]:
            assert name not in catalogue
            continue
        record = catalogue[name]
        assert record.formula, name
        assert record.source, name
        required = {o: (1.0,) for o, p in record.signature.parameters.items() if p.default is inspect.Parameter.empty}
        assert callable(getattr(record(**required), rule)), name
    assert sum(map(len, CLASSES["classes"].values())) == 228


# -- in blocks of rows
# ---------------------------------------------------------------------------------------------------


def outcome(e, x, g):
    """Features, gradient, and the gradient of a gradient, of g (R, D) times the features of x (R, m)."""
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    y = e(x)
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True, allow_unused=True, materialize_grads=True)
    again = (
        torch.autograd.grad(gx.sin().sum(), (x, g), allow_unused=True, materialize_grads=True)
        if gx.requires_grad
        else ()
    )
    (once,) = torch.autograd.grad(e(x), x, g.detach(), allow_unused=True, materialize_grads=True)
    return {"y": y, "gx": gx, "once": once} | {f"again {k}": value for k, value in enumerate(again)}


def check_blocks(monkeypatch, e, rows=60, m=5):
    """Law: in blocks an expansion of every attribute is what its definition is, with two derivatives."""
    low, high = max(e.reach[0], e.domain[0] - 0.5), min(e.reach[1], e.domain[1] + 0.5)
    r = torch.Generator().manual_seed(0)
    x = low + (high - low) * torch.rand(rows, m, generator=r, dtype=torch.float64)
    g = torch.randn(rows, e.dim(m), generator=r, dtype=torch.float64)
    monkeypatch.setattr(in_blocks, "least_features", 2**40)
    expected = outcome(e, x, g)
    monkeypatch.setattr(in_blocks, "least_features", 0)
    monkeypatch.setattr(in_blocks, "least_numbers", 64)
    monkeypatch.setattr(in_blocks, "most_numbers", 64)
    found = outcome(e, x, g)
    assert torch.equal(e.base(x), x) or "Blocks" in type(e(x.requires_grad_()).grad_fn.next_functions[0][0]).__name__
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9 * (1 + float(value.detach().abs().max())))


@pytest.mark.parametrize("name", [name for name in expansions if expansions[name]().width])
def test_blocks_are_the_definition(monkeypatch, name):
    for e in (expansions[name](), nudged(expansions[name])):
        check_blocks(monkeypatch, dataclasses.replace(e.build(), power=1))


def test_the_law_of_blocks_bites(monkeypatch):
    wrong = attribute_wise(
        "wrong", lambda x, axis: [x.sin()], ["sin(x)"], pull=in_blocks.by_slopes(lambda x, axis: [x.cos() * 1.001])
    )
    with pytest.raises(AssertionError, match="not close"):
        check_blocks(monkeypatch, wrong)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own rules of forward derivatives
@pytest.mark.parametrize("name", ["bspline", "legendre", "normal", "gaussian_rbf", "ricker_wavelet", "fourier"])
def test_blocks_step_aside_for_whatever_looks_on(monkeypatch, name):
    monkeypatch.setattr(in_blocks, "least_features", 0)
    e, x = expansions[name](), torch.rand(6, 3, dtype=torch.float64)
    y, ones = e(x), torch.ones(6, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(e)(x), y)
    slope = torch.func.jvp(e, (x,), (ones,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(e(forward_ad.make_dual(x, ones)))
    torch.testing.assert_close(dual.tangent, slope)
    g = torch.rand_like(y)
    (gx,) = torch.autograd.grad(e(x.requires_grad_()), x, g)
    torch.testing.assert_close(torch.func.vjp(e, x.detach())[1](g)[0], gx)
    torch.testing.assert_close((g * slope).unflatten(-1, (3, -1) if e.layout == "attribute" else (-1, 3)).sum(
        -1 if e.layout == "attribute" else -2), gx)  # fmt: skip
    rows = torch.stack([torch.autograd.grad(e(x), x, one.view_as(y))[0] for one in torch.eye(y.numel(), dtype=y.dtype)])
    batched = torch.autograd.functional.jacobian(e, x.detach(), vectorize=True)
    torch.testing.assert_close(batched.reshape(y.numel(), *x.shape), rows)
    assert "_Blocks" not in str(make_fx(e)(x.detach()).graph)
    exported = torch.export.export(torch.nn.Sequential(df.Head(3, 2, expansion=name).double()), (x.detach(),))
    assert exported.module()(x.detach()).shape == (6, 2)


def test_blocks_keep_nan_where_it_is(monkeypatch):
    monkeypatch.setattr(in_blocks, "least_features", 0)
    x = torch.tensor([[0.1, float("nan")], [5.0, 0.3]])
    y = expansions.bspline()(x)
    assert y[0, 8:].isnan().all()
    assert not y[0, :8].isnan().any()
    assert (y[1, :8] == 0).all()

"""Formulas are the function: any expansion, reconciliation, remainder, fusion, as numbers,
as text that sympy reads."""

import numpy as np
import pytest
import sympy
import torch

import dualform as df
from dualform.functions import expansions, fusions, reconciliations, remainders
from dualform.functions.basis import Expansion
from dualform.functions.formula import Formula
from dualform.functions.head import Head
from dualform.functions.symbolic import formula_of


def read(text, X):
    """Evaluate a formula's text with nothing but sympy: the last line's value for each row."""
    values = {f"x{i}": column for i, column in enumerate(X.T)}
    for line in text.splitlines():
        name, expression = line.split(" = ", 1)
        symbols = {symbol: sympy.Symbol(symbol) for symbol in values}
        parsed = sympy.sympify(expression, locals=symbols)
        values[name] = sympy.lambdify(list(symbols.values()), parsed, ["scipy", "numpy"])(*values.values()) + np.zeros(
            len(X)
        )
    return values[name]


def check_formula(head, x, tolerance=1e-9):
    """The law: the formula, and its text alone, evaluate to what the head computes."""
    want = head(x).detach().numpy()
    made = formula_of([head], [f"x{i}" for i in range(x.shape[1])], [f"y{i}" for i in range(head.n)], x.numpy(), 0.0)
    size = np.abs(want).max() + 1e-300
    assert np.abs(made(x.numpy()) - want).max() <= tolerance * size
    assert np.abs(read(made.text(None), x.numpy()) - want[:, -1]).max() <= tolerance * size
    return made


def rows(expansion, m, num_rows=12):
    low, high = max(expansion.domain[0], -3.0), min(expansion.domain[1], 3.0)
    return low + (high - low) * torch.rand(num_rows, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", expansions)
def test_every_expansion_has_its_formula(name):
    expansion = expansions[name]()
    m = next(m for m in (2, 9) if takes(expansion, m))
    torch.manual_seed(0)
    check_formula(Head(m, 2, expansion=expansion).double(), rows(expansion, m))


def takes(expansion, m):
    try:
        return expansion.dim(m) > 0
    except ValueError:
        return False


@pytest.mark.parametrize("name", reconciliations)
def test_every_reconciliation_has_its_formula(name):
    torch.manual_seed(0)
    n = 6 if name == "duplicated_diagonal_padding" else 4
    try:
        head = Head(2, n, expansion="taylor", reconciliation=name).double()
    except ValueError:
        head = Head(2, 2, expansion=("chebyshev", {"degree": 2}), reconciliation=name).double()
    check_formula(head, rows(head.expansion, 2))


@pytest.mark.parametrize("name", fusions)
def test_every_fusion_has_its_formula(name):
    given = {"weighted_summation": {"weights": (0.5, 2.0)}}.get(name, {})
    torch.manual_seed(0)
    head = Head(2, 2, expansion="taylor", channels=2, fusion=(name, given)).double()
    if name == "median":
        with pytest.raises(ValueError, match="formula: fusion is median; expected one of"):
            check_formula(head, rows(head.expansion, 2))
    else:
        check_formula(head, rows(head.expansion, 2))


@pytest.mark.parametrize("name", remainders)
@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu"}, {"activation": "gelu"}, {"activation": "relu", "inside": True}]
)
def test_every_remainder_has_its_formula(name, options):
    known = remainders[name].options
    torch.manual_seed(0)
    head = Head(2, 2, remainder=(name, {k: v for k, v in options.items() if k in known})).double()
    check_formula(head, rows(head.expansion, 2))


def test_the_law_bites():
    """A feature whose text is not what it computes is noticed."""
    head = Head(2, 1, expansion="hyperbolic").double()
    wrong = {"terms": tuple(reversed(head.expansion.terms))}
    object.__setattr__(head, "expansion", type(head.expansion)(**{**vars(head.expansion), **wrong}))
    with pytest.raises(AssertionError):
        check_formula(head, rows(head.expansion, 2))


LAYERS = {
    "taylor": [{"expansion": ("taylor", {"degree": 3})}],
    "unique": [{"expansion": ("taylor", {"degree": 2, "symmetric": True}), "remainder": "linear"}],
    "spline": [{"expansion": ("bspline", {"span": (-2, 2)}), "remainder": ("linear", {"activation": "silu", "inside": True})}],
    "deep": [{"n": 3, "expansion": "gaussian_rbf"}, {"n": 2, "expansion": "fourier", "remainder": "linear"}, {"expansion": "bspline"}],
    "default": None,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # 20 iterations are enough to be read
@pytest.mark.filterwarnings("ignore:.*lie outside what:UserWarning")  # and leave hidden units anywhere
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("layers", LAYERS)
def test_the_formula_is_the_model(layers, standardize):
    r = np.random.RandomState(0)
    X = r.uniform(0.5, 2.0, (60, 2))
    y = 2 * X[:, 0] * X[:, 1] + np.sin(2 * X[:, 1])
    options = {"alpha": 0.1, "max_iter": 20, "standardize": standardize, "random_state": 0}
    model = df.RPNRegressor(LAYERS[layers], **options).fit(X, y)
    exact = model.formula(tolerance=0.0)
    np.testing.assert_allclose(exact(X)[:, 0], model.predict(X), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(read(exact.text(None), X), model.predict(X), rtol=1e-7, atol=1e-7)
    near = model.formula(tolerance=0.02)
    assert len(str(near)) <= len(str(exact))
    assert np.std(near(X)[:, 0] - model.predict(X)) <= (0.02 if len(near.lines) == 1 else 0.2) * np.std(
        model.predict(X)
    )
    labels = np.where(y > y.mean(), "high", "low")
    classifier = df.RPNClassifier(LAYERS[layers], **options).fit(X, labels)
    made = classifier.formula(0.0)
    assert made.outputs == ("low",)
    np.testing.assert_allclose(made(X)[:, 0], classifier.decision_function(X), rtol=1e-9, atol=1e-9)


def test_offsets_that_would_eat_the_digits_are_kept_apart():
    r = np.random.RandomState(0)
    year = r.uniform(2000, 2020, (80, 1))
    y = ((year[:, 0] - 2010) / 5) ** 3
    model = df.RPNRegressor([{"expansion": ("chebyshev", {"degree": 3})}]).fit(year, y)
    assert [line.name for line in model.formula().lines] == ["z_x0", "y"]
    np.testing.assert_allclose(read(str(model.formula()), year), y, atol=1e-2)


def test_names_are_the_features_own():
    pd = pytest.importorskip("pandas")
    r = np.random.RandomState(0)
    X = pd.DataFrame(r.uniform(1, 2, (50, 4)), columns=["mean radius (mm)", "lambda", "2nd", "exp"])
    Y = np.stack([X["mean radius (mm)"] * X["lambda"], X["2nd"] + X["exp"]], 1)
    made = df.RPNRegressor([{"expansion": ("taylor", {"degree": 2, "symmetric": True})}]).fit(X, Y).formula()
    assert str(made) == "y0 = lambda_*mean_radius__mm_\ny1 = exp_ + _2nd"
    assert r"\text{mean radius (mm)}" in made.to_latex()
    assert made.labels == tuple(X.columns)
    product = made.expressions["y0"].subs({"mean_radius__mm_": 2.0, "lambda_": 3.0})
    assert float(product) == pytest.approx(6.0)


def test_formulas_are_refused_where_there_is_none():
    X = np.random.RandomState(0).uniform(1, 2, (30, 2))
    model = df.RPNRegressor([{}]).fit(X, X[:, 0])
    with pytest.raises(ValueError, match=r"tolerance is 1.5; expected 0 <= tolerance < 1"):
        model.formula(1.5)
    with pytest.raises(ValueError, match=r"X has shape \(30, 1\); expected \(R, m\) with m = 2"):
        model.formula()(X[:, :1])
    assert isinstance(model.formula(), Formula)
    assert str(df.RPNRegressor([{}]).fit(X, np.full(30, 2.5)).formula()) == "y = 2.5"


AWKWARD = (
    "I E N S O Q C pi beta gamma zeta lambda None abs max sum exp re im Symbol Integer select array where y y_ h1_0 "
    "h1_1 z_x0 x0 x² ﬁx fix 1st π a_b"
).split() + ["a b", "a.b", "", " ", "mean radius (mm)", "y_channel0"]


@pytest.mark.parametrize("seed", range(8))
def test_any_names_read_back_as_the_model(seed):
    """The law: sympy, told nothing, reads the text as the model, whatever the columns and targets are called."""
    r = np.random.RandomState(seed)
    *labels, first, second = r.choice(AWKWARD, 6, replace=False).tolist()
    torch.manual_seed(seed)
    hidden = Head(4, 2, expansion=("taylor", {"degree": 2})).double()
    last = Head(2, 2, expansion="trigonometric", channels=2, fusion="prod").double()
    X = r.uniform(0.5, 1, (9, 4))
    made = formula_of([hidden, last], labels, [first, second], X, 0.0)
    assert len({*made.inputs, *(line.name for line in made.lines)}) == 4 + len(made.lines)
    values = dict(zip(made.inputs, X.T, strict=True))
    for line in made.text(None).splitlines():
        name, expression = line.split(" = ", 1)
        parsed = sympy.sympify(expression)
        read_as = sorted(parsed.free_symbols, key=str)
        assert {symbol.name for symbol in read_as} <= values.keys()
        values[name] = sympy.lambdify(read_as, parsed, "numpy", dummify=True)(*(values[s.name] for s in read_as))
    want = last(hidden(torch.from_numpy(X))).detach().numpy()
    np.testing.assert_allclose(np.stack([values[name] for name in made.outputs], 1), want, rtol=1e-9)
    np.testing.assert_allclose(made(X), want, rtol=1e-9)


def test_a_label_that_is_a_name_keeps_it():
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame(np.random.RandomState(0).uniform(1, 2, (20, 2)), columns=["a b", "a_b"])
    assert str(df.RPNRegressor([{}]).fit(X, 3 * X["a b"] + 5 * X["a_b"]).formula()) == "y = 5*a_b + 3*a_b_"


OWN = {
    "cubes": (lambda x: x**3, lambda m: m, {}, "y = 2*cubes(x0) - cubes(x1)"),
    "rolled": (lambda x: x.roll(1, -1), lambda m: m, {}, "rolled_1(x0, x1)"),
    "halves": (lambda x: torch.cat([x / 2, x.square()], -1), lambda m: 2 * m, {}, "halves_0(x0, x1)"),
    "beta": (torch.exp, lambda m: m, {"power": 2, "symmetric": True}, "beta_(x0)"),
}


@pytest.mark.parametrize("name", OWN)
def test_functions_without_text_are_shown_by_name(name):
    """An expansion of one's own says no terms: its formula is no sum of the attributes, and evaluates all the same."""
    base, dim, more, shown = OWN[name]
    head = Head(2, 1, expansion="identity").double()
    expansion = Expansion(name, base, dim, "", **more)
    torch.manual_seed(0)
    weight = torch.randn(1, expansion.dim(2), dtype=torch.float64)
    if name == "cubes":
        weight = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    head.w, head.bias = torch.nn.Parameter(weight[0]), None
    object.__setattr__(head, "expansion", expansion)
    head.D = expansion.dim(2)
    object.__setattr__(head, "matrix", lambda: weight[None])
    X = np.random.RandomState(0).uniform(-1, 1, (7, 2))
    made = formula_of([head], ["x0", "x1"], ["y"], X, 0.0)
    assert shown in str(made)
    np.testing.assert_allclose(made(X)[:, 0], (expansion(torch.from_numpy(X)) @ weight.mT)[:, 0], rtol=1e-12)
    assert {str(f.func) for f in sympy.sympify(str(made).split(" = ")[1]).atoms(sympy.core.function.AppliedUndef)}


def test_what_is_standardised_already_has_no_rounding_errors_in_its_formula():
    r = np.random.RandomState(0)
    X = r.uniform(1, 3, (60, 2))
    X = (X - X.mean(0)) / X.std(0) / 21
    model = df.RPNRegressor([{"expansion": "gaussian_rbf"}], alpha=0.1).fit(X, np.sin(21 * X[:, 0]))
    text = model.formula(0.0).text(None)
    assert "e-1" not in text
    np.testing.assert_allclose(model.formula(0.0)(X)[:, 0], model.predict(X), atol=1e-10)


def test_long_formulas_are_summed_up():
    r = np.random.RandomState(0)
    torch.manual_seed(0)
    heads = [Head(3, 4, expansion="gaussian_rbf").double(), Head(4, 1, expansion="gaussian_rbf").double()]
    heads[0].w.data.view(4, 3, 10)[:, 2] = 0  # the third input does nothing
    made = formula_of(heads, ["speed", "lift", "drag"], ["power"], r.randn(100, 3), 0.0)
    said = str(made)
    assert len(said) < 600 < 1500 < len(made.text())
    assert said.startswith(f"5 lines, {sum(len(line.terms) for line in made.lines):,} terms; text() writes them")
    assert "strongest in power" in said
    assert [name for name, _ in made.effects(made.sample)][2] == "drag"
    assert made.effects(made.sample)[2][1] == 0
    assert "terms that a tolerance leaves, about: 0.01 " in said
    assert made._repr_latex_() is None

"""RPNClassifier and RPNRegressor: scikit-learn's own checks, what they promise, and what they refuse."""

import pickle
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris, load_linnerud
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import dualform as df
from dualform.models import fitting

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # few iterations, on purpose
both = pytest.mark.parametrize("estimator", [df.RPNClassifier, df.RPNRegressor])
TAYLOR = [{"expansion": ("taylor", {"degree": 2, "symmetric": True})}]


# what they check does not need more iterations: scikit-learn gives its own estimators few, too
@parametrize_with_checks([df.RPNClassifier(max_iter=20), df.RPNRegressor(max_iter=20)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(num_rows=80, seed=0):
    r = np.random.RandomState(seed)
    X = r.uniform(-1, 1, (num_rows, 3))
    return X, np.sin(3 * X[:, 0]) + X[:, 1] * X[:, 2]


def quick(estimator, layers=None, **options):
    return estimator(layers, alpha=0.1, max_iter=30, random_state=0, **options)


def labelled(estimator, y):
    return np.where(y > 0, "up", "down") if estimator is df.RPNClassifier else y


def answers(model, X):
    return model.decision_function(X) if isinstance(model, df.RPNClassifier) else model.predict(X)


# -- what is promised --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_as_promised(seed):
    X, y = load_digits(return_X_y=True)
    train, test, a, b = train_test_split(X, y, random_state=seed)
    model = make_pipeline(StandardScaler(), df.RPNClassifier(random_state=seed)).fit(train, a)
    assert model.score(test, b) >= 0.97


def test_diabetes_as_promised():
    X, y = load_diabetes(return_X_y=True)
    model = make_pipeline(StandardScaler(), df.RPNRegressor(random_state=0))
    assert cross_val_score(model, X, y, cv=5).mean() >= 0.40


@both
def test_a_weight_is_a_repetition(estimator):
    """Bit for bit: equal rows are merged before anything is drawn or computed."""
    X, y = data(60)
    y = labelled(estimator, y)
    w = np.random.RandomState(1).randint(0, 4, len(X))
    order = np.random.RandomState(2).permutation(w.sum())
    for options in ({}, {"solver": "adam", "early_stopping": True}, {"layers": TAYLOR}):
        one = estimator(max_iter=15, random_state=0, **options).fit(X, y, sample_weight=w)
        two = estimator(max_iter=15, random_state=0, **options).fit(X.repeat(w, 0)[order], y.repeat(w)[order])
        np.testing.assert_array_equal(answers(one, X), answers(two, X))


@both
def test_nothing_global_is_touched(estimator):
    X, y = data()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = quick(estimator).fit(X, labelled(estimator, y))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(4)
    np.testing.assert_array_equal(answers(one, X), answers(quick(estimator).fit(X, labelled(estimator, y)), X))
    pickle.loads(pickle.dumps(one))
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(4).get_state())


@both
@pytest.mark.parametrize(
    "layers",
    [
        TAYLOR,
        [{"expansion": "bspline", "remainder": ("linear", {"activation": "silu", "inside": True})}],
        [{"n": 4, "reconciliation": ("low_rank", {"rank": 1}), "channels": 2}, {"expansion": "hyperbolic"}],
        [{"expansion": "taylor"}, {"expansion": "fourier", "reconciliation": ("masking", {"p": 0.5})}],
        [{"n": 5, "channels": 3, "fusion": "prod"}, {"m": 5, "expansion": "legendre"}],
    ],
)
def test_any_layers_fit_and_are_pickled_as_they_are(estimator, layers):
    X, y = data()
    model = quick(estimator, layers).fit(X, labelled(estimator, y))
    assert model.score(X, labelled(estimator, y)) > (0.6 if estimator is df.RPNClassifier else 0.1)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(answers(model, X), answers(again, X))
    assert [config.n for config in model.layers_][-1] == 1
    assert clone(model).layers == layers


def test_several_targets_at_once():
    X, y = data()
    Y = np.stack([y, X[:, 0] ** 2, -y], 1)
    model = df.RPNRegressor(TAYLOR).fit(X, Y)
    assert model.predict(X).shape == Y.shape
    assert model.predict(X[:1]).shape == (1, 3)
    np.testing.assert_allclose(model.predict(X)[:, 1], Y[:, 1], atol=1e-6)
    one = df.RPNRegressor(TAYLOR, alpha=1e-6).fit(X, Y[:, 1])
    np.testing.assert_allclose(one.predict(X), Y[:, 1], atol=1e-5)


def test_least_squares_is_ridge_and_leave_one_out_is_exact():
    X, y = data(40)
    X = StandardScaler().fit_transform(X)
    model = df.RPNRegressor([{}], alpha=2.0, standardize=False).fit(X, y)
    w = np.linalg.solve(X.T @ X + 2.0 * np.eye(3), X.T @ (y - y.mean()))
    np.testing.assert_allclose(model.predict(X), X @ w + y.mean(), atol=1e-12)

    def left_out(a):  # by refitting; the columns keep the scale of all rows, as in the closed form
        errors = []
        for i in range(len(X)):
            rest = np.arange(len(X)) != i
            A, b = X[rest] - X[rest].mean(0), y[rest] - y[rest].mean()
            w = np.linalg.solve(A.T @ A + a * np.eye(3), A.T @ b)
            errors.append(y[i] - y[rest].mean() - (X[i] - X[rest].mean(0)) @ w)
        return np.square(errors).sum()

    chosen = df.RPNRegressor([{}], standardize=False).fit(X, y).alpha_
    assert left_out(chosen) <= 1.001 * min(left_out(10.0 ** (k / 2)) for k in range(-6, 9))


def test_the_solvers_agree_where_the_problem_is_convex():
    X, y = data()
    found = [
        df.RPNRegressor([{"expansion": "hermite"}], alpha=1.0, solver=solver, max_iter=n, tol=1e-9, batch_size=80,
                        early_stopping=False, learning_rate=0.02, random_state=0).fit(X, y).predict(X)
        for solver, n in (("lbfgs", 500), ("adam", 2000))
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_early_stopping_keeps_the_best_weights():
    X, y = load_iris(return_X_y=True)
    for solver in ("lbfgs", "adam"):
        model = df.RPNClassifier(
            solver=solver,
            alpha=0.0,
            early_stopping=True,
            n_iter_no_change=4,
            max_iter=300,
            random_state=0,
            learning_rate=0.03,
        ).fit(X, y)
        curve = model.validation_curve_
        assert model.n_iter_ == len(curve) < 300
        assert int(np.argmin(curve)) < len(curve) - 3


def test_partial_fit_goes_on_and_warm_start_too():
    X, y = load_iris(return_X_y=True)
    model = df.RPNClassifier(random_state=0, learning_rate=0.01)
    for _ in range(30):
        for part in (slice(0, None, 2), slice(1, None, 2)):
            model.partial_fit(X[part], y[part], classes=[0, 1, 2])
    assert model.score(X, y) > 0.95
    assert model.n_iter_ == 60
    again = pickle.loads(pickle.dumps(model)).partial_fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), model.partial_fit(X, y).predict_proba(X))
    with pytest.raises(ValueError, match=r"new classes \[7\]"):
        model.partial_fit(X, np.where(y == 0, 7, y))
    warm = df.RPNClassifier(alpha=0.01, max_iter=3, warm_start=True, random_state=0)
    losses = [warm.fit(X, y).loss_curve_[-1] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_it_lives_among_the_others(capsys):
    frame, y = load_iris(as_frame=True, return_X_y=True)
    with joblib.parallel_config("threading"):
        search = GridSearchCV(
            make_pipeline(
                StandardScaler().set_output(transform="pandas"), df.RPNClassifier(max_iter=10, random_state=0)
            ),
            {"rpnclassifier__alpha": [0.1, 1.0], "rpnclassifier__layers": [None, TAYLOR]},
            cv=2,
            n_jobs=2,
        ).fit(frame, y.map({0: "a", 1: "b", 2: "c"}))
    model = search.best_estimator_[-1]
    assert list(model.feature_names_in_) == list(frame.columns)
    assert list(model.classes_) == ["a", "b", "c"]
    assert model.predict_proba(search.best_estimator_[:-1].transform(frame)).dtype == np.float64
    capsys.readouterr()
    df.RPNRegressor(verbose=2, max_iter=5, random_state=0).fit(frame.iloc[:, 1:], frame.iloc[:, 0])
    said = capsys.readouterr().out
    assert "RPNRegressor: alpha 2, held-out loss" in said
    assert "RPNRegressor: iteration 5, loss" in said


def test_float32_is_computed_in_float32_and_answered_in_float64():
    X, y = data()
    model = quick(df.RPNRegressor).fit(X.astype(np.float32), y)
    assert {p.dtype for p in model.network_.parameters()} == {torch.float32}
    assert model.predict(X.astype(np.float32)).dtype == np.float64
    assert {p.dtype for p in quick(df.RPNRegressor).fit(X, y).network_.parameters()} == {torch.float64}


def test_class_weights_are_sample_weights():
    X, y = data()
    y = labelled(df.RPNClassifier, y)
    one = quick(df.RPNClassifier, class_weight={"up": 3, "down": 1}).fit(X, y)
    two = quick(df.RPNClassifier).fit(X, y, sample_weight=np.where(y == "up", 3.0, 1.0))
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))


def test_rows_go_through_in_pieces(monkeypatch):
    X, y = data()
    whole = quick(df.RPNRegressor).fit(X, y).predict(X)
    monkeypatch.setattr(fitting, "_piece", 400)
    np.testing.assert_allclose(quick(df.RPNRegressor).fit(X, y).predict(X), whole, atol=1e-6)


@both
@pytest.mark.parametrize("layers", [None, [{"expansion": "taylor"}, {"reconciliation": ("low_rank", {"rank": 1})}]])
def test_folds_fitted_at_once_are_those_fitted_one_by_one(estimator, layers, monkeypatch):
    """Of 80 rows the folds are of two sizes: the shorter ones are filled up with a row that must count for nothing."""
    X, y = data()
    y = labelled(estimator, y)
    rows, _ = (model := quick(estimator, layers).fit(X, y))._start(X, y, np.arange(1.0, 81), False, False)
    out = torch.arange(80) % 3 == torch.arange(3)[:, None]

    def losses(alphas):
        return fitting.held_out(model.network_, rows, out, model._loss, alphas, 6, 1e-9)

    start, at_once = model.network_.flat(), losses([0.1, 5.0])
    assert torch.equal(model.network_.flat(), start)
    one_by_one = [losses([alpha])[0] for alpha in (0.1, 5.0)]

    def cannot(*_):
        raise RuntimeError

    monkeypatch.setattr(fitting, "vmap", cannot)
    for found in (one_by_one, losses([0.1, 5.0])):
        for a, b in zip(at_once, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert all((losses[~out] == 0).all() for losses in at_once)


def test_alpha_moves_with_the_data_no_more_than_they_do():
    """Not from 10 to 50 for a last digit; other units are the same problem."""
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:200], y[:200]
    cases = [(X, y), (X * (1 + 1e-15), y), (X * 1e3, 10 * y)]
    alphas = [df.RPNRegressor(random_state=0).fit(*case).alpha_ for case in cases]
    np.testing.assert_allclose(alphas, alphas[0], rtol=0.01)
    assert df.RPNRegressor(random_state=1).fit(X, y).alpha_ == pytest.approx(alphas[0], rel=2)


def test_few_rows_are_no_worse_than_with_ridge():
    X, Y = load_linnerud(return_X_y=True)
    fold = KFold(4, shuffle=True, random_state=0)
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 4, 30)))
    theirs, ours = (r2_score(Y, cross_val_predict(m, X, Y, cv=fold)) for m in (ridge, df.RPNRegressor(random_state=0)))
    assert ours > theirs - 0.1


@pytest.mark.parametrize(
    "expansion",
    ["bspline", ("bspline", {"cells": 8}), {"name": "bspline", "degree": 2}, "gaussian_rbf", "inverse_quadratic_rbf"],
)
@pytest.mark.parametrize("standardize", [True, False])
def test_spans_follow_the_data(expansion, standardize):
    x = 100 + 30 * np.random.RandomState(0).randn(300, 1) if standardize else np.random.RandomState(0).rand(300, 1) * 7
    model = df.RPNRegressor([{"expansion": expansion}], standardize=standardize).fit(x, 2 * x[:, 0])
    assert model.score(x, 2 * x[:, 0]) > 0.999


@both
def test_a_span_that_misses_the_data_is_told(estimator):
    x = np.random.RandomState(0).randn(300, 1)
    y = labelled(estimator, 2 * x[:, 0])
    for expansion in (("bspline", {"span": (-1, 1)}), ("gaussian_rbf", {"span": (20, 22)}), df.expansions.bspline()):
        with pytest.warns(
            UserWarning, match=r"layers\[0\]: \d+% of its inputs, -2\.8 .. 2\.35, lie outside what .* at most 5%"
        ):
            quick(estimator, [{"expansion": expansion}]).fit(x, y)


@pytest.mark.filterwarnings("error")
def test_what_did_not_converge_is_told():
    X, y = data(60)
    with pytest.warns(ConvergenceWarning, match=r"not converged after max_iter = 1 iterations; .* It is \d\.\d+"):
        df.RPNRegressor(max_iter=1, alpha=1.0, random_state=0).fit(X, y)
    with pytest.warns(ConvergenceWarning, match=r"not converged after max_iter = 3 iterations"):
        df.RPNClassifier(solver="adam", max_iter=3, alpha=1.0).fit(X, y > 0)
    with pytest.warns(ConvergenceWarning, match=r"diverged: the loss went from .*Lower learning_rate = 1000"):
        df.RPNRegressor(TAYLOR, solver="adam", max_iter=5, alpha=1.0, learning_rate=1e3).fit(X, y)
    df.RPNRegressor(alpha=1.0, random_state=0).fit(X, y)
    df.RPNRegressor(TAYLOR, solver="adam", alpha=1.0, learning_rate=0.01, tol=1e-3, random_state=0).fit(X, y)


@both
@pytest.mark.parametrize("kind", ["csr_matrix", "coo_array", "csc_array"])
def test_sparse_rows_are_taken(estimator, kind):
    X = sparse.random(40, 4, 0.4, random_state=0)
    y = labelled(estimator, X.toarray().sum(1) - 0.8)
    one, two = (quick(estimator, TAYLOR).fit(rows, y) for rows in (getattr(sparse, kind)(X), X.toarray()))
    np.testing.assert_array_equal(answers(one, sparse.csr_array(X)), answers(two, X.toarray()))


@both
def test_names_of_columns_targets_and_classes(estimator):
    X, y = data()
    X = pd.DataFrame(X, columns=["speed", "lift", "drag"])
    if estimator is df.RPNClassifier:
        three = np.select([y > 0.5, y > -0.5], ["up", "level"], "down")
        assert quick(estimator, TAYLOR).fit(X, three).formula().outputs == ("down", "level", "up")
        assert quick(estimator, TAYLOR).fit(X, pd.Series(y > 0, name="rises")).formula().outputs == ("rises_True",)
        numbered = quick(estimator, TAYLOR).fit(X, (y > 0) + 0)
        assert numbered.formula().outputs == ("class_1",)
        assert numbered.plot().subfigs[1].axes[0].get_ylabel() == "logit of class_1"
        return
    assert quick(estimator, TAYLOR).fit(X, pd.Series(y, name="power")).formula().outputs == ("power",)
    pair = pd.DataFrame({"power": y, "2nd": -y})
    model = quick(estimator, TAYLOR).fit(X, pair)
    assert model.formula().outputs == ("power", "_2nd")
    assert model.plot(output=1).subfigs[1].axes[0].get_ylabel() == "2nd"
    assert quick(estimator, TAYLOR).fit(X, y).formula().outputs == ("y",)


# -- what is refused ---------------------------------------------------------------------------------------------------

bad_layers = {
    r"layers is 'taylor'; expected a list of mappings": "taylor",
    r"layers is \{'expansion': 'taylor'\}; expected a list": {"expansion": "taylor"},
    r"layers is 3; expected a list": 3,
    r"layers is empty; expected at least one layer": [],
    r"layers\[1\] is 'taylor'; expected a mapping": [{}, "taylor"],
    r"no record is called 'tailor'. Did you mean 'taylor'": [{"expansion": "tailor"}],
    r"unknown key 'expansions'. Did you mean 'expansion'": [{"expansions": "taylor"}],
    r"layers\[0\] has m = 7; expected m = 3, the width before it": [{"m": 7}],
    r"layers\[1\] has m = 7; expected m = 4": [{"n": 4}, {"m": 7}],
    r"layers\[0\] has n = 9; expected n = 1, the number of outputs": [{"n": 9}],
    r"n is 0; expected an integer n >= 1": [{"n": 0}, {}],
    r"degree is 0": [{"expansion": ("taylor", {"degree": 0})}],
    r"n is 1; expected n = m = 3": [{"remainder": "identity"}],
}


@both
@pytest.mark.parametrize("message", bad_layers, ids=lambda m: m[:30])
def test_bad_layers(estimator, message):
    X, y = data()
    with pytest.raises(ValueError, match=message):
        estimator(bad_layers[message]).fit(X, labelled(estimator, y))


def test_settings_that_explode_are_refused_with_their_size():
    X, y = np.zeros((4, 10_000)), np.arange(4.0)
    with pytest.raises(ValueError, match=r"m = 10000 attributes, which make D = .* = 1,000,100,010,000 features"):
        df.RPNRegressor([{"expansion": ("taylor", {"degree": 3})}]).fit(X, y)


@both
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("alpha", -1.0, r"alpha is -1.0; expected a number >= 0, or 'auto'"),
        ("alpha", "much", r"alpha is 'much'"),
        ("solver", "adm", r"solver is 'adm'.* Did you mean 'adam'"),
        ("max_iter", 0, r"max_iter is 0; expected an integer > 0"),
        ("max_iter", 1.5, r"max_iter is 1.5; expected an integer > 0"),
        ("batch_size", True, r"batch_size is True"),
        ("validation_fraction", 0.9, r"validation_fraction is 0.9; expected 0 < fraction <= 0.5"),
        ("early_stopping", "yes", r"early_stopping is 'yes'; expected True, False or 'auto'"),
        ("device", "tpu9", r"device is 'tpu9'; expected a device that torch has here"),
        ("learning_rate", 0.0, r"learning_rate is 0.0; expected a number > 0"),
    ],
)
def test_bad_options(estimator, option, value, message):
    X, y = data()
    with pytest.raises(ValueError, match=message):
        estimator(**{option: value}).fit(X, labelled(estimator, y))


@both
def test_bad_data(estimator):
    X, y = data()
    y = labelled(estimator, y)
    model = quick(estimator)
    with pytest.raises(NotFittedError):
        model.predict(X)
    for wrong, message in [
        (
            np.where(X > 0.9, np.nan, X),
            r"X contains NaN in \d+ of 80 rows, in the columns x0 \(\d+\), x1.*SimpleImputer",
        ),
        (sparse.csr_array(np.where(X > 0.9, np.nan, X)), r"X contains NaN in \d+ of 80 rows"),
        (sparse.csr_array((80, 10**7)), r"R m = 80 \* 10,000,000 numbers .* at most 200,000,000. .*TruncatedSVD"),
        (X[:0], "0 sample"),
        (X[:, :0], "0 feature"),
        (X[:, 0], "Expected 2D array, got 1D array"),
        (X[:5], "inconsistent numbers of samples"),
        (X * 1e200, "X holds .*e.[12][09][09]; expected numbers up to 1e.152"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(wrong, y)
    with pytest.raises(ValueError, match=r"[Ss]ample.weights? (sums to 0|must contain at least one non-zero)"):
        model.fit(X, y, sample_weight=np.zeros(len(X)))
    if estimator is df.RPNRegressor:
        with pytest.raises(ValueError, match=r"y contains NaN in 2 of 80 rows; expected a target for each. Leave"):
            model.fit(X, np.where(np.arange(80) < 2, np.nan, y))
    model.fit(X, y)
    with pytest.raises(ValueError, match=r"X has 2 features, but RPN.* is expecting 3"):
        model.predict(X[:, :2])
    with pytest.raises(ValueError, match=r"infinite or NaN numbers for these X: expansions.taylor"):
        quick(estimator, [{"expansion": ("taylor", {"degree": 3})}], standardize=False).fit(X * 1e150, y)


def test_one_class_is_no_classification():
    X, _ = data()
    with pytest.raises(ValueError, match="y has one class, 'a'; expected at least two classes"):
        df.RPNClassifier().fit(X, np.full(len(X), "a"))


def test_least_squares_only_where_it_holds():
    X, y = data()
    with pytest.raises(ValueError, match="solver is 'least_squares'; expected one regression layer that is linear"):
        df.RPNRegressor(solver="least_squares").fit(X, y)


def test_the_planted_wrong_merge_is_noticed(monkeypatch):
    """The law above bites: rows that are not merged make a weight of two another thing than two rows."""
    monkeypatch.setattr(fitting, "merged", lambda x, y, w: (x, y, w))
    with pytest.raises(AssertionError):
        test_a_weight_is_a_repetition(df.RPNRegressor)


# -- the picture -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("layers", [None, TAYLOR, [{"expansion": "combinatorial"}], [{"expansion": "bspline"}]])
def test_the_picture_shows_basis_terms_and_features(estimator, layers, tmp_path):
    X, y = data()
    frame = pd.DataFrame(X, columns=["a b", "$c", "d"])
    model = quick(estimator, layers).fit(frame, labelled(estimator, y))
    figure = model.plot(frame, labelled(estimator, y), max_features=2)
    top, bottom = figure.subfigs
    figure.savefig(tmp_path / "picture.png")
    assert type(figure) is type(df.jacobian(torch.exp, torch.zeros(2)).plot())
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert [text.get_text() for text in bottom.axes[0].get_legend().texts] == [
        "single rows", "mean", *["partial residuals"] * (estimator is df.RPNRegressor),
    ]  # fmt: skip
    deep = layers is None
    assert top.axes[1].get_title().startswith(f"strongest {'features' if deep else 'terms'} of ")
    assert len(top.axes[0].lines) > 0
    assert len(top.axes[1].patches) > 0
    assert [panel.get_xlabel() in frame.columns for panel in bottom.axes] == [True, True]
    with pytest.raises(ValueError, match=r"output is 1; expected 0 <= output < 1"):
        model.plot(output=1)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    for name in ("dualform.models.tabular", "dualform.models.estimator"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(
        ImportError, match=r"dualform.RPNClassifier: the package 'sklearn.*' is not installed; expected the extra"
    ):
        df.RPNClassifier  # noqa: B018


def test_a_missing_matplotlib_is_named(monkeypatch):
    X, y = data()
    model = quick(df.RPNRegressor, TAYLOR).fit(X, y)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="expected the extra 'viz'"):
        model.plot()

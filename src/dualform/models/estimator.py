"""What the classifier and the regressor share: options and their checks, fitting, the formula, the picture.

Legend: X (R, m) rows, y targets, n outputs, alpha weight decay.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, is_regressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from dualform.catalogue import near_misses
from dualform.functions.formula import Formula
from dualform.functions.head import Head, HeadConfig
from dualform.functions.symbolic import formula_of
from dualform.models import fitting, inputs
from dualform.models.fitting import Network, Watch, WeightedRows
from dualform.models.plot import draw
from dualform.shapes import fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two layers of learnt functions of one variable, each with a straight line beside it: smooth, bounded in its bends,
# a straight line far from the data. Chosen over a dozen data sets (LAB, 2026-11-25).
bends = ("gaussian_rbf", {"span": (-2.0, 2.0), "count": 5, "epsilon": 1.0})
_bent: Mapping[str, Any] = {"expansion": bends, "remainder": "linear"}

_hidden = 32  # the width of a hidden layer that does not say its own
_few = 6  # fewer rows than these are not split to choose alpha
_full_batch = 5000  # up to so many rows L-BFGS sees all of them at once; beyond, Adam sees mini-batches
_solvers = ("auto", "least_squares", "lbfgs", "adam")

_taken: dict[str, Any] = {"dtype": [np.float64, np.float32], "accept_sparse": "csr", "ensure_all_finite": "allow-nan"}
_largest = 1e152  # squares of these, and their sums, are numbers still


@dataclass(eq=False, repr=False)
class RowsEstimator(BaseEstimator):
    """What the classifier and the regressor share; they differ in `_loss`, `_encoded`, `_scaled`, `_width`."""

    _loss: ClassVar[fitting.Loss]

    layers: Sequence[Mapping[str, Any]] | None = None
    _: KW_ONLY
    alpha: float | str = "auto"
    solver: str = "auto"
    max_iter: int = 1000
    tol: float = 1e-5
    batch_size: int = 128
    learning_rate: float = 3e-3
    early_stopping: bool | str = "auto"
    validation_fraction: float = 0.2
    n_iter_no_change: int = 10
    standardize: bool = True
    warm_start: bool = False
    device: str = "cpu"
    random_state: Any = None
    verbose: int = 0

    scaler_: Any = field(init=False)  # scikit-learn's scalers have no useful types
    alpha_: Any = field(init=False)
    n_features_in_: int = field(init=False)

    def _encoded(self, y: np.ndarray, new: bool) -> np.ndarray:
        """Turn y into what is computed with: class numbers, or (R, n) numbers."""
        raise NotImplementedError

    def _measure(self, t: np.ndarray, w: np.ndarray) -> None:
        """Learn the targets' scale, if they have one."""

    def _scaled(self, t: np.ndarray) -> np.ndarray:
        return t

    def _width(self) -> int:
        """Return n, the number of outputs."""
        raise NotImplementedError

    def _groups(self, y: Tensor) -> Tensor | None:
        """Say which rows a held-out part should have its share of."""
        return None

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to the rows of X and their targets y.

        Shape:  X (R, m), y (R,) or, in regression, (R, n); sample_weight (R,).
        Dtype:  float32 stays float32; all else is computed in float64.
        Raises: ValueError for layers, options, shapes or values that cannot be used.
        """
        goes_on = self.warm_start and hasattr(self, "network_")
        rows, generator = self._start(X, y, sample_weight, first=not goes_on, new_targets=not goes_on)
        self._train(rows, generator, goes_on)
        return self

    def _start(
        self, X: Any, y: Any, sample_weight: Any, first: bool, new_targets: bool
    ) -> tuple[WeightedRows, torch.Generator]:
        """Check all that was given, make what is not there yet, and return the rows as tensors."""
        self._check_options()
        names = inputs.target_names(y)
        inputs.refuse_missing_targets(type(self).__name__, y)
        X, y = validate_data(
            self, X, y, **_taken, multi_output=is_regressor(self), reset=first,
            y_numeric=is_regressor(self), ensure_min_samples=2 if first else 1,
        )  # fmt: skip
        X = inputs.dense(type(self).__name__, X, self._feature_names())
        for name, values in (("X", X), ("y", y)):
            if values.dtype.kind == "f" and (largest := float(np.abs(values).max())) > _largest:
                advice = "Scale it: its squares would overflow."
                self._refuse(name, f"holds {largest:.3g}", f"numbers up to {_largest:g}", advice)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weight.sum() > 0:  # newer releases of scikit-learn have refused it by now
            self._refuse("sample_weight", f"sums to {weight.sum()}", "a sum > 0", "Give weight to some row.")
        targets = self._encoded(y, new_targets)
        if new_targets or first:
            self._target_names = names
        x, t, w = fitting.merged(X, targets, weight * self._class_weight(y))
        if first:
            self.scaler_ = StandardScaler(with_mean=bool(self.standardize), with_std=bool(self.standardize))
            self.scaler_.fit(x, sample_weight=w)
            self._measure(t, w)
            self.sample_ = x[:: max(1, len(x) // 1000)].astype(np.float64)
        x, t = self.scaler_.transform(x), self._scaled(t)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if first:
            self.layers_ = self._configs(x)
            self.network_ = Network(self.layers_, seed, torch.float32 if x.dtype == np.float32 else torch.float64)
        dtype, device = self.network_.flat().dtype, self._device()
        t = torch.from_numpy(t).to(device)
        t = t.to(dtype) if t.is_floating_point() else t
        rows = WeightedRows(torch.from_numpy(x).to(device, dtype), t, torch.from_numpy(w).to(device, dtype))
        return rows, torch.Generator().manual_seed(seed)

    def _class_weight(self, y: np.ndarray) -> np.ndarray | float:
        return 1.0

    def _train(self, rows: WeightedRows, generator: torch.Generator, goes_on: bool) -> None:
        network = self.network_.to(self._device())
        head = network[0]
        solver = self.solver
        can_solve = is_regressor(self) and len(network) == 1 and fitting.is_linear(cast(Head, head), len(rows))
        if solver == "auto":
            solver = "least_squares" if can_solve else "lbfgs" if len(rows) <= _full_batch else "adam"
        if solver == "least_squares":
            if not can_solve:
                found = "is 'least_squares'"
                advice = "Use solver='lbfgs', or one layer with reconciliation='identity', channels=1 and a bias."
                self._refuse("solver", found, "one regression layer that is linear in its weights", advice)
            self._check_finite(cast(Head, head).expansion(rows.x), 0)
            alphas = fitting.least_squares(cast(Head, head), rows, self._given_alpha())
            self.alpha_ = alphas[0] if len(alphas) == 1 else np.array(alphas)
            self.loss_curve_, self.validation_curve_, self.n_iter_ = [network.loss(rows, self._loss)], [], 1
        else:
            self._check_finite(network.outputs(rows.x), len(network) - 1)
            self._iterate(network, rows, solver, generator, goes_on)
        self.network_ = network.cpu()
        if (found := inputs.unmet(network, rows.x[:: max(1, len(rows) // 1000)].cpu())) is not None:
            warnings.warn(f"{type(self).__name__}: {found}", stacklevel=3)

    def _iterate(
        self, network: Network, rows: WeightedRows, solver: str, generator: torch.Generator, goes_on: bool
    ) -> None:
        """Choose alpha if it is to be chosen, and descend."""
        stopping = self.early_stopping if self.early_stopping != "auto" else solver == "adam" and len(rows) >= 200
        fold = None
        if stopping:
            parts = max(2, round(1 / self.validation_fraction))
            fold = fitting.folds(self._groups(rows.y), len(rows), parts, generator)
        given = self._given_alpha()
        if given is not None:
            self.alpha_ = given
        elif not (goes_on and hasattr(self, "alpha_")):
            self.alpha_ = 1.0 if solver == "adam" or len(rows) < _few else self._chosen_alpha(network, rows, generator)
        watch, train = self._watch(), rows
        watch.on_training = solver == "adam" and fold is None
        if fold is not None:
            out = (fold == 0).to(rows.x.device)
            watch.held_out, train = rows[out], rows[~out]
        if solver == "lbfgs":
            fitting.lbfgs(network, train, self._loss, self.alpha_, self.max_iter, self.tol, watch)
        else:
            self._pass(network, train, self.max_iter, watch, generator, None)
        self._warn_unless_converged(watch)
        self.loss_curve_, self.validation_curve_ = watch.losses, watch.held_out_losses
        self.n_iter_ = max(1, len(watch.losses))

    def _pass(
        self, network: Network, rows: WeightedRows, count: int, watch: Watch, generator: torch.Generator, state: Any
    ) -> dict[str, Any]:
        options = {"batch": self.batch_size, "rate": self.learning_rate, "generator": generator, "state": state}
        return fitting.adam(network, rows, self._loss, self.alpha_, count, watch, **options)

    def _chosen_alpha(self, network: Network, rows: WeightedRows, generator: torch.Generator) -> float:
        """Validate: one large held-out part, or twice three folds of few rows; every alpha starts from one network."""
        large = len(rows) >= 500
        parts = max(2, round(1 / self.validation_fraction)) if large else 3
        splits = [fitting.folds(self._groups(rows.y), len(rows), parts, generator) for _ in range(1 if large else 2)]
        out = torch.stack([fold == k for fold in splits for k in range(1 if large else parts)]).to(rows.x.device)

        def score(alphas: Sequence[float]) -> list[Tensor]:
            steps = min(self.max_iter, 60)
            found = fitting.held_out(network, rows, out, self._loss, alphas, steps, self.tol) if alphas else []
            found = [(losses.sum(0) / len(splits)).double().cpu()[out.any(0).cpu()] for losses in found]
            for alpha, losses in zip(alphas, found, strict=True):
                if self.verbose:
                    print(f"{type(self).__name__}: alpha {alpha:g}, held-out loss {float(losses.mean()):.6g}")
            return found

        return fitting.best_decay(score)

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        first = not hasattr(self, "network_")
        rows, generator = self._start(X, y, sample_weight, first=first, new_targets=False)
        network, given = self.network_.to(self._device()), self._given_alpha()
        self.alpha_ = given if given is not None else 1.0
        state = None if first else getattr(self, "optimiser_", None)
        watch = self._watch()
        self.optimiser_ = self._pass(network, rows, 1, watch, generator, state)
        self.loss_curve_ = [*([] if first else self.loss_curve_), *watch.losses]
        self.validation_curve_, self.n_iter_ = [], len(self.loss_curve_)
        self.network_ = network.cpu()
        return self

    def _watch(self) -> Watch:
        every = max(1, 10 // int(self.verbose)) if self.verbose else 0
        return Watch(patience=self.n_iter_no_change, tol=self.tol, label=type(self).__name__, every=every)

    def _warn_unless_converged(self, watch: Watch) -> None:
        first, last = watch.losses[:1], watch.losses[-1:]
        if first and not last[0] <= first[0]:
            said = f"training diverged: the loss went from {first[0]:.3g} to {last[0]:.3g}; expected a fall."
            advice = f"Lower learning_rate = {self.learning_rate:g}, or use solver='lbfgs'."
        elif not watch.converged:
            said = f"not converged after max_iter = {self.max_iter} iterations; expected a loss that no longer falls."
            advice = f"It is {last[0]:.3g}. " * bool(last) + "Raise max_iter or alpha, or tol if this is good enough."
        else:
            return
        warnings.warn(f"{type(self).__name__}: {said} {advice}", ConvergenceWarning, stacklevel=5)

    def _refuse(self, what: str, found: str, expected: str, advice: str) -> NoReturn:
        fail(type(self).__name__, what, found, expected, advice, ValueError)

    def _check_options(self) -> None:
        positive = {
            "max_iter": Integral, "batch_size": Integral, "n_iter_no_change": Integral, "tol": Real,
            "learning_rate": Real,
        }  # fmt: skip
        for option, kind in positive.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
                word = "an integer" if kind is Integral else "a number"
                self._refuse(option, f"is {value!r}", f"{word} > 0", "Leave it out for the default.")
        if not (isinstance(self.validation_fraction, Real) and 0 < self.validation_fraction <= 0.5):
            advice = "A fifth is usual."
            self._refuse("validation_fraction", f"is {self.validation_fraction!r}", "0 < fraction <= 0.5", advice)
        if self.solver not in _solvers:
            found = f"is {self.solver!r}"
            self._refuse("solver", found, f"one of {list(_solvers)}", near_misses(str(self.solver), list(_solvers)))
        if self.early_stopping not in (True, False, "auto"):
            advice = "'auto' holds rows out for Adam only."
            self._refuse("early_stopping", f"is {self.early_stopping!r}", "True, False or 'auto'", advice)
        self._given_alpha()
        self._device()

    def _given_alpha(self) -> float | None:
        if self.alpha == "auto" and isinstance(self.alpha, str):
            return None
        if isinstance(self.alpha, (bool, str)) or not isinstance(self.alpha, Real) or not 0 <= self.alpha < np.inf:
            advice = "Larger values give smoother functions."
            self._refuse("alpha", f"is {self.alpha!r}", "a number >= 0, or 'auto'", advice)
        return float(self.alpha)

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or (device.type == "cuda" and not torch.cuda.is_available()):
            advice = "Use 'cpu', or 'auto' for a GPU if there is one."
            self._refuse("device", f"is {self.device!r}", "a device that torch has here", advice)
        return device

    def _configs(self, x: np.ndarray) -> tuple[HeadConfig, ...]:
        """Join the layers' widths: m comes from the layer before, n is the outputs' at the end."""
        (num_rows, m), name, layers = x.shape, type(self).__name__, self.layers
        if layers is None:
            layers = [{"n": _hidden if num_rows >= 1000 else _hidden // 2, **_bent}, _bent]
        example = 'Pass for example [dict(expansion="taylor")].'
        if isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence):
            self._refuse("layers", f"is {layers!r}", "a list of mappings of Head's options", example)
        if not layers:
            self._refuse("layers", "is empty", "at least one layer", example)
        configs = []
        for i, layer in enumerate(layers):
            if not isinstance(layer, Mapping):
                self._refuse(f"layers[{i}]", f"is {layer!r}", "a mapping of Head's options", example)
            n = self._width() if i == len(layers) - 1 else layer.get("n", _hidden)
            for key, right, source in (("m", m, "the width before it"), ("n", n, "the number of outputs")):
                if layer.get(key, right) != right:
                    advice = f"Leave {key} out: it is found from the data and the layers before."
                    fail(name, f"layers[{i}]", f"has {key} = {layer[key]}", f"{key} = {right}, {source}", advice)
            layer = inputs.spanned(layer, x if i == 0 else None)
            configs.append(HeadConfig.from_dict({**layer, "m": m, "n": n}))
            m = n
        return tuple(configs)

    def _check_finite(self, values: Tensor, layer: int) -> None:
        if not bool(torch.isfinite(values).all()):
            expansion = self.layers_[layer].expansion
            found = f"gives infinite or NaN numbers for these X: {expansion!r}"
            advice = "Scale X, lower the degree, or take an expansion that is defined there."
            self._refuse(f"layers[{layer}]", found, "finite features", advice)

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "network_")
        return self._evaluate(self._rows_of(X))

    def _rows_of(self, X: Any) -> np.ndarray:
        X = validate_data(self, X, **_taken, reset=False)
        return inputs.dense(type(self).__name__, X, self._feature_names())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _evaluate(self, X: np.ndarray) -> np.ndarray:
        network = self.network_.to(self._device())
        x = torch.from_numpy(np.array(self.scaler_.transform(X))).to(self._device(), network.flat().dtype)
        outputs = network.outputs(x).cpu().double().numpy()
        self.network_ = network.cpu()
        return outputs

    def _output_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return slope and shift per output, from the network's units to the targets'."""
        n = self.layers_[-1].n
        return np.ones(n), np.zeros(n)

    def _output_names(self) -> list[str]:
        raise NotImplementedError

    def _output_label(self, name: str) -> str:
        """Say in a picture what the output of that name is."""
        return name

    def _feature_names(self) -> list[str]:
        given = getattr(self, "feature_names_in_", None)
        return [str(name) for name in given] if given is not None else [f"x{i}" for i in range(self.n_features_in_)]

    def formula(self, tolerance: float = 1e-3) -> Formula:
        """Return the learnt function as formulas in the features' own names.

        y = sum of monomials, spline pieces, functions ... ; layers before the last get a line per unit
        Shape:  formula(X) (R, n) evaluates what is printed.
        Raises: NotFittedError before fit; ValueError for a tolerance outside [0, 1).
        Terms are dropped, the least first, while what all of them do together stays below tolerance times the output's
        standard deviation on the rows fitted to; tolerance=0 drops nothing.
        Example:
            >>> import numpy as np, dualform as df
            >>> X = np.random.RandomState(0).uniform(1, 3, (50, 2))
            >>> taylor = [dict(expansion=("taylor", {"degree": 2, "symmetric": True}))]
            >>> print(df.RPNRegressor(taylor).fit(X, 2 * X[:, 0] * X[:, 1] - 1).formula())
            y = 2*x0*x1 - 1
        """
        check_is_fitted(self, "network_")
        if isinstance(tolerance, bool) or not 0 <= tolerance < 1:
            found, advice = f"is {tolerance!r}", "It is a share of the output's standard deviation."
            fail(f"{type(self).__name__}.formula", "tolerance", found, "0 <= tolerance < 1", advice, ValueError)
        scale = (self.scaler_.scale_, self.scaler_.mean_) if self.standardize else None
        heads = [cast(Head, head).double() for head in copy.deepcopy(self.network_)]
        names, outputs = self._feature_names(), self._output_names()
        return formula_of(heads, names, outputs, self.sample_, tolerance, scale, self._output_scale())

    def plot(self, X: Any = None, y: Any = None, *, output: int = 0, max_features: int = 6) -> Figure:
        """Draw the basis functions, the strongest terms and each feature's learnt function; return the figure.

        A feature's curve is the output's mean over the rows fitted to, as that feature alone is changed; thin lines are
        single rows: where they are parallel the feature acts alone. Of layers in a row the features are ranked, not
        the units in between. A classifier's outputs are logits.
        Shape:  X (R, m) and y (R,), if given, are partial residuals about the curves (regression): the curve plus what
                the model misses; `output`: a class or target.
        Raises: NotFittedError before fit; ImportError without matplotlib (extra `viz`); ValueError for no such output.
        """
        check_is_fitted(self, "network_")
        names = self._output_names()
        if not 0 <= output < len(names):
            found, advice = f"is {output}", f"Outputs: {', '.join(names)}."
            fail(f"{type(self).__name__}.plot", "output", found, f"0 <= output < {len(names)}", advice, ValueError)
        slope, shift = self._output_scale()
        points = None
        if X is not None and y is not None:
            X = self._rows_of(X)
            targets = np.asarray(y).reshape(len(X), -1)
            points = (X.astype(np.float64), targets[:, output] if is_regressor(self) else None)

        def f(rows: np.ndarray) -> np.ndarray:
            return self._evaluate(rows)[:, output] * slope[output] + shift[output]

        return draw(
            f, self.sample_, self._feature_names(), output, self._output_label(names[output]),
            self.layers_[0].expansion.build(),
            self.formula(), bool(self.standardize), points, max_features,
        )  # fmt: skip

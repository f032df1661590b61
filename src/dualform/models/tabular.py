"""Heads as scikit-learn estimators: fit, predict, print the formula, plot it. Needs the extra `sklearn`.

Legend: X (R, m) rows, y targets, n outputs, K classes.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from dualform.models import fitting
from dualform.models.estimator import RowsEstimator
from dualform.shapes import fail


@dataclass(eq=False, repr=False)
class RPNClassifier(ClassifierMixin, RowsEstimator):
    """Classify rows with heads in a row: logits = head_L(.. head_1(standardised x)).

    P(class k | x) = softmax(logits)_k; of two classes, sigmoid(logit)
    Shape:  X (R, m), y (R,) labels of any kind.
    Dtype:  probabilities are float64; float32 rows are computed in float32, all others in float64.
    Raises: ValueError for layers, options, shapes or values that cannot be used, and for one class alone.
    Source: Zhang 2024 (RPN 1). layers=None: two layers of Gaussian bumps beside straight lines,
            as in Li 2024 (FastKAN).

    layers: a list of mappings of df.Head's options, widths found: None is a good start. alpha: weight decay; "auto" is
    validated on held-out rows. solver: "lbfgs" over all rows for up to 5000 of them, else "adam" on mini-batches with
    early stopping. Equal rows are one row of greater weight, so sample weights and repetition are the same thing.
    Example:
        >>> import dualform as df
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> df.RPNClassifier(random_state=0).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
        True
    """

    _loss = staticmethod(fitting.cross_entropy)

    _: KW_ONLY
    class_weight: Any = None

    def _encoded(self, y: np.ndarray, new: bool) -> np.ndarray:
        check_classification_targets(y)
        if new:
            self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            advice = "Give rows of another class too."
            self._refuse("y", f"has one class, {self.classes_.tolist()[0]!r}", "at least two classes", advice)
        found = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if not (self.classes_[found] == y).all():
            new = np.setdiff1d(y, self.classes_).tolist()
            advice = "Name all classes at the first call, or fit anew."
            self._refuse("y", f"has the new classes {new}", f"classes {self.classes_.tolist()}", advice)
        return found

    def _class_weight(self, y: np.ndarray) -> np.ndarray | float:
        return 1.0 if self.class_weight is None else compute_sample_weight(self.class_weight, y)

    def _width(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    def _groups(self, y: Tensor) -> Tensor | None:
        return y

    def _output_names(self) -> list[str]:
        named = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        (target,) = getattr(self, "_target_names", None) or ["class"]
        return [name if isinstance(name, str) else f"{target}_{name}" for name in named.tolist()]

    def _output_label(self, name: str) -> str:
        return f"logit of {name}"

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Pass once over more rows. The first call names all classes, and sets the features' scale.

        Shape:  X (R, m), y (R,), classes (K,), sample_weight (R,).
        Raises: ValueError for labels that the first call did not name.
        """
        if not hasattr(self, "network_"):
            self.classes_ = np.unique(y if classes is None else classes)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            expected = f"the first call's {self.classes_.tolist()}"
            self._refuse("classes", f"is {np.unique(classes).tolist()}", expected, "Leave it out after the first call.")
        return self._partial_fit(X, y, sample_weight)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits (R, K), or of two classes the log-odds (R,) of the second.

        Shape:  X (R, m).
        Raises: NotFittedError before fit; ValueError for another m.
        """
        outputs = self._outputs(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, (R, K).

        Shape:  X (R, m).
        Raises: NotFittedError before fit; ValueError for another m.
        """
        z = self._outputs(X)
        z = np.concatenate([np.zeros_like(z), z], 1) if len(self.classes_) == 2 else z
        p = np.exp(z - z.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithm of `predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row.

        Shape:  X (R, m) -> (R,).
        Raises: NotFittedError before fit; ValueError for another m.
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


class RPNRegressor(RegressorMixin, RowsEstimator):
    """Predict numbers with heads in a row: y = scale head_L(.. head_1(standardised x)) + mean.

    Shape:  X (R, m), y (R,) or (R, n) for n targets at once.
    Dtype:  predictions are float64; float32 rows are computed in float32, all others in float64.
    Raises: ValueError for layers, options, shapes or values that cannot be used.
    Source: Zhang 2024 (RPN 1). layers=None: two layers of Gaussian bumps beside straight lines,
            as in Li 2024 (FastKAN).

    layers and options are those of RPNClassifier. One layer with the identity reconciliation is linear in its weights:
    it is solved at once (solver "least_squares"), its decay chosen by the leave-one-out error, for symbolic regression
    exact.
    Example:
        >>> import numpy as np, dualform as df
        >>> X = np.random.RandomState(0).uniform(-1, 1, (80, 2))
        >>> y = X[:, 0] ** 2 + 0.5 * X[:, 1]
        >>> df.RPNRegressor([dict(expansion=("chebyshev", {"degree": 2}))]).fit(X, y).score(X, y) > 0.999
        True
    """

    _loss = staticmethod(fitting.squared_error)
    target_scaler_: Any

    def _encoded(self, y: np.ndarray, new: bool) -> np.ndarray:
        self._is_flat = y.ndim == 1
        return y.reshape(len(y), -1).astype(np.float64)

    def _measure(self, t: np.ndarray, w: np.ndarray) -> None:
        self.target_scaler_ = StandardScaler().fit(t, sample_weight=w)

    def _scaled(self, t: np.ndarray) -> np.ndarray:
        if t.shape[1] != self.target_scaler_.n_features_in_:
            expected = f"{self.target_scaler_.n_features_in_}, as at first"
            fail(type(self).__name__, "y", f"has {t.shape[1]} targets", expected, "Fit anew for other targets.")
        return self.target_scaler_.transform(t)

    def _width(self) -> int:
        return self.target_scaler_.n_features_in_

    def _output_scale(self) -> tuple[np.ndarray, np.ndarray]:
        return self.target_scaler_.scale_, self.target_scaler_.mean_

    def _output_names(self) -> list[str]:
        n = self._width()
        return getattr(self, "_target_names", None) or (["y"] if n == 1 else [f"y{i}" for i in range(n)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Pass once over more rows. The first call sets the scales of features and targets.

        Shape:  X (R, m), y (R,) or (R, n), sample_weight (R,).
        Raises: ValueError for another m or n than at first.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> np.ndarray:
        """Return the predictions, shaped as the targets were.

        Shape:  X (R, m) -> (R,) or (R, n).
        Raises: NotFittedError before fit; ValueError for another m.
        """
        outputs = self._outputs(X)
        y = self.target_scaler_.inverse_transform(outputs)
        return y[:, 0] if self._is_flat else y

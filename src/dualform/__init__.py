"""dualform: write a learner, get a sequence layer that learns at test time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dualform import auto_classes as _auto_classes  # noqa: F401 - Auto classes know our models
from dualform import functions
from dualform import moved as _moved  # noqa: F401 - last: it says old names of modules
from dualform.calculus import Derivative, Explanation, explain, hessian, jacobian
from dualform.catalogue import Bound, Catalogue, CatalogueError
from dualform.functions import Head, compressions, expansions, fusions, interdependences, reconciliations, remainders
from dualform.kernels import backend as _cpp  # noqa: F401 - it registers itself
from dualform.learning.backends import backends
from dualform.learning.layer import LayerState, TestTimeTraining
from dualform.learning.learners import learners
from dualform.learning.objectives import objectives
from dualform.learning.program import ChunkProgram, DerivationError, derive
from dualform.learning.rules import Rule, Step, rules
from dualform.learning.state import State
from dualform.shapes import ShapeError, TraceError

if TYPE_CHECKING:
    from dualform import models
    from dualform.models import (
        DualformConfig,
        DualformForCausalLM,
        DualformForSequenceClassification,
        DualformForTokenClassification,
        DualformModel,
        presets,
    )
    from dualform.models.tabular import RPNClassifier, RPNRegressor

__version__ = "0.1.0"

# Names that need more than the core: where each is, and the extra that brings what it needs.
_with_extras = {
    "DualformConfig": ("dualform.models", "models"), "DualformForCausalLM": ("dualform.models", "models"),
    "DualformForSequenceClassification": ("dualform.models", "models"),
    "DualformForTokenClassification": ("dualform.models", "models"), "DualformModel": ("dualform.models", "models"),
    "RPNClassifier": ("dualform.models.tabular", "sklearn"), "RPNRegressor": ("dualform.models.tabular", "sklearn"),
    "models": ("dualform.models", "models"), "presets": ("dualform.models", "models"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _with_extras:
        raise AttributeError(f"module 'dualform' has no attribute {name!r}")
    place, extra = _with_extras[name]
    try:
        module = import_module(place)
        return module if place == f"dualform.{name}" else getattr(module, name)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("dualform"):
            raise
        raise ImportError(
            f"dualform.{name}: the package {missing.name!r} is not installed; expected the extra {extra!r}. "
            f'Run `pip install "dualform[{extra}]"`.'
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_with_extras})


__all__ = [
    "Bound", "Catalogue", "CatalogueError", "ChunkProgram", "DerivationError", "Derivative", "DualformConfig",
    "DualformForCausalLM", "DualformForSequenceClassification", "DualformForTokenClassification", "DualformModel",
    "Explanation", "Head", "LayerState", "RPNClassifier", "RPNRegressor", "Rule", "ShapeError", "State", "Step",
    "TestTimeTraining", "TraceError", "__version__", "backends", "compressions", "derive", "expansions", "explain",
    "functions", "fusions", "hessian", "interdependences", "jacobian", "learners", "models", "objectives", "presets",
    "reconciliations", "remainders", "rules",
]  # fmt: skip

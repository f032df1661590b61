"""The laws, public: what must hold of every learner, objective, rule, form and function, and of yours.

Each law takes the thing it judges, compares it with an independent definition, and raises `LawBroken` with the name of
the quantity and the error. Tolerances are one table by dtype; nothing loosens it.
"""

from dualform.testing.agreement import LawBroken, agree, tolerances
from dualform.testing.functions import (
    check_derivative,
    check_expansion,
    check_fusion,
    check_head,
    check_reconciliation,
    check_remainder,
    check_unit_scale,
)
from dualform.testing.programs import (
    Problem,
    check_backend,
    check_causal,
    check_forms,
    check_layer,
    check_learner,
    check_padding,
    check_reset,
    check_split,
    check_static,
    draw,
    outcome,
    same_outcome,
)
from dualform.testing.texts import (
    check_model_batch,
    check_model_causal,
    check_model_generation,
    check_model_padding,
    check_model_reset,
    check_model_rollback,
    check_model_split,
)

__all__ = [
    "LawBroken", "Problem", "agree", "check_backend", "check_causal", "check_derivative", "check_expansion",
    "check_forms", "check_fusion", "check_head", "check_layer", "check_learner", "check_model_batch",
    "check_model_causal", "check_model_generation", "check_model_padding", "check_model_reset", "check_model_rollback",
    "check_model_split", "check_padding", "check_reconciliation", "check_remainder", "check_reset", "check_split",
    "check_static", "check_unit_scale", "draw", "outcome", "same_outcome", "tolerances",
]  # fmt: skip

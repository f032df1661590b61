"""Learnable functions: g(x|w) = <kappa(x), psi(w)> + pi(x)."""

from dualform.functions.compressions import compressions
from dualform.functions.expansions import Expansion, expansions
from dualform.functions.fusions import Fusion, fusions
from dualform.functions.head import Head, HeadConfig
from dualform.functions.interdependences import interdependences
from dualform.functions.layer import Adapted, Layer, LayerConfig, Stack, StackConfig
from dualform.functions.migration import TinybigDefect, from_tinybig
from dualform.functions.networks import networks, set_naive_bayes
from dualform.functions.reconciliations import Reconciliation, reconciliations
from dualform.functions.remainders import Remainder, activations, remainders

__all__ = [
    "Adapted", "Expansion", "Fusion", "Head", "HeadConfig", "Layer", "LayerConfig", "Reconciliation", "Remainder",
    "Stack", "StackConfig", "TinybigDefect", "activations", "compressions", "expansions", "from_tinybig", "fusions",
    "interdependences", "networks", "reconciliations", "remainders", "set_naive_bayes",
]  # fmt: skip

"""Learnable functions: g(x|w) = <kappa(x), psi(w)> + pi(x)."""

from dualform.functions.compressions import compressions
from dualform.functions.expansions import Expansion, expansions
from dualform.functions.fusions import Fusion, fusions
from dualform.functions.head import Head, HeadConfig
from dualform.functions.interdependences import interdependences
from dualform.functions.migration import TinybigDefect, from_tinybig
from dualform.functions.reconciliations import Reconciliation, reconciliations
from dualform.functions.remainders import Remainder, activations, remainders

__all__ = [
    "Expansion",
    "Fusion",
    "Head",
    "HeadConfig",
    "Reconciliation",
    "Remainder",
    "TinybigDefect",
    "activations",
    "compressions",
    "expansions",
    "from_tinybig",
    "fusions",
    "interdependences",
    "reconciliations",
    "remainders",
]

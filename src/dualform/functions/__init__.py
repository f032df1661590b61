"""Learnable functions: g(x|w) = <kappa(x), psi(w)> + pi(x)."""

from dualform.functions.expansions import Expansion, expansions

__all__ = ["Expansion", "expansions"]

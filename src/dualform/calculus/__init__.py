"""Structured derivatives of tensor functions: traced, composed and contracted with their deltas kept."""

from dualform.calculus.check import Fault, Report, check, unbroadcast, why_unbroadcast
from dualform.calculus.contract import Plan, contract, plan
from dualform.calculus.explain import Explanation, Step
from dualform.calculus.hessian import hessian
from dualform.calculus.jacobian import explain, jacobian
from dualform.calculus.reference import op_table
from dualform.calculus.relations import Lookup, Triangle, Window
from dualform.calculus.sites import SiteDerivatives, site_derivatives
from dualform.calculus.structure import Derivative, Factor, Label, Select, Term, compose
from dualform.calculus.trace import source_line, trace
from dualform.calculus.traced import cache_size, clear_cache

__all__ = [
    "Derivative", "Explanation", "Factor", "Fault", "Label", "Lookup", "Plan", "Report", "Select", "SiteDerivatives", "Step",
    "Term", "Triangle", "Window", "cache_size", "check", "clear_cache", "compose", "contract", "explain", "hessian",
    "jacobian", "op_table", "plan", "site_derivatives", "source_line", "trace", "unbroadcast", "why_unbroadcast",
]  # fmt: skip

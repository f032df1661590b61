"""Structured derivatives of tensor functions: traced, composed and contracted with their deltas kept."""

from dualform.algebra.contract import ContractionPlan as Plan
from dualform.algebra.contract import contract, plan
from dualform.algebra.linear_map import Derivative, Factor, Label, Select, Term, compose
from dualform.algebra.relations import Lookup, Triangle, Window
from dualform.calculus.check import Fault, Report, check, unbroadcast, why_unbroadcast
from dualform.calculus.hessian import hessian
from dualform.calculus.jacobian import explain, jacobian
from dualform.calculus.per_sample import SiteDerivatives, site_derivatives
from dualform.calculus.traced import cache_size, clear_cache
from dualform.explanations.explanation import Explanation
from dualform.explanations.op_table import op_table
from dualform.explanations.steps import OpStep as Step
from dualform.graphs.trace import source_line, trace

__all__ = [
    "Derivative", "Explanation", "Factor", "Fault", "Label", "Lookup", "Plan", "Report", "Select", "SiteDerivatives",
    "Step", "Term", "Triangle", "Window", "cache_size", "check", "clear_cache", "compose", "contract", "explain",
    "hessian", "jacobian", "op_table", "plan", "site_derivatives", "source_line", "trace", "unbroadcast",
    "why_unbroadcast",
]  # fmt: skip

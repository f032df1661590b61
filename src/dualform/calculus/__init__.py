"""Structured derivatives of tensor functions: traced, composed and contracted with their deltas kept."""

from dualform.calculus.contract import Plan, contract, plan
from dualform.calculus.explain import Explanation, Step
from dualform.calculus.jacobian import explain, jacobian
from dualform.calculus.structure import Derivative, Factor, Label, Select, Term, compose
from dualform.calculus.trace import source_line, trace

__all__ = [
    "Derivative", "Explanation", "Factor", "Label", "Plan", "Select", "Step", "Term", "compose", "contract", "explain",
    "jacobian", "plan", "source_line", "trace",
]  # fmt: skip

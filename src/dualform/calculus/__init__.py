"""Structured derivatives of tensor functions: traced, composed and contracted with their deltas kept."""

from dualform.calculus.contract import Plan, contract, plan
from dualform.calculus.explain import Explanation, Step
from dualform.calculus.jacobian import explain, jacobian
from dualform.calculus.reference import op_table
from dualform.calculus.relations import Lookup, Triangle, Window
from dualform.calculus.structure import Derivative, Factor, Label, Select, Term, compose
from dualform.calculus.trace import source_line, trace

__all__ = [
    "Derivative", "Explanation", "Factor", "Label", "Lookup", "Plan", "Select", "Step", "Term", "Triangle", "Window",
    "compose", "contract", "explain", "jacobian", "op_table", "plan", "source_line", "trace",
]  # fmt: skip

"""Identities of matrices that docs/identities.md shows: found, read back from the text, and the numbers of torch.func."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix_reader import evaluate
from torch import Tensor

import dualform as df
from dualform.algebra import matrix_pieces, matrix_text
from dualform.calculus import Derivative, hessian, jacobian
from dualform.explanations import matrix_form

PAGE = Path(__file__).parents[1] / "docs" / "identities.md"
block = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
TABLES: dict[str, Any] = {}
exec(block.split("for verb, table in")[0], TABLES)
ROWS = [(jacobian, *row) for row in TABLES["FIRST"].values()] + [(hessian, *row) for row in TABLES["SECOND"].values()]
NAMES = [f"1 {name}" for name in TABLES["FIRST"]] + [f"2 {name}" for name in TABLES["SECOND"]]
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def check_form(J: Derivative) -> str:
    """Read a matrix form back: whatever sizes fit, its numbers are the derivative's. Gives the text."""
    told: Any = J.explain()
    if told.matrices is None:
        return ""
    named = [f.tensors for step in told.steps for f in (step.formula, *step.formula.where)]
    named += [f.tensors for f in (told.result.formula, *told.result.formula.where)]
    tensors = (
        J.route.story().names.values | {name: t for found in named for name, t in found.items()} | dict(J.route.inputs)
    )
    expected, shape = J.dense(), J.shape
    if "/" not in told.matrices.left:
        change = torch.randn(J.in_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected, shape = torch.tensordot(expected, change, change.ndim), J.out_shape
        tensors[f"d{told.result.below}"] = change
    values = evaluate(told.matrices.text, tensors, shape)
    assert values, told.matrices
    for value in values:
        torch.testing.assert_close(value, expected.to(torch.float64), **CLOSE)
    assert f"{told.matrices}    <- in matrices" in str(told)
    assert told.matrices.latex().replace("= ", "&= ", 1) in told.to_latex()
    assert str(told.matrices) == told.to_dict()["matrices"]
    return told.matrices.text


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_an_identity_is_found_and_true(row: tuple) -> None:
    verb, f, args, form = row
    J = verb(f, *args)
    expected = torch.func.jacrev(f)(*args) if verb is jacobian else torch.func.jacrev(torch.func.jacrev(f))(*args)
    torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10)
    assert check_form(J) == form


x, v = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
P, Q = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
zeros = torch.tensor([2.0, 0.0, 3.0, 0.0]).double()
# What has a form or none: it is never a wrong one.
OTHERS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "one zero": (lambda x: x.prod(), (torch.tensor([2.0, 0.0, 3.0]).double(),)),
    "two zeros": (lambda x: x.prod(), (zeros,)),
    "running product": (lambda x: x.cumprod(0), (zeros,)),
    "singular": (lambda X: torch.linalg.det(X), (torch.ones(3, 3).double(),)),
    "norm at 0": (lambda x: x.norm(), (torch.zeros(3).double(),)),
    "an input called I": (lambda I, a: (I @ a).softmax(0), (P, v)),
    "an input called dX": (lambda X, dX: X @ dX @ X, (P, Q)),
    "an input called p": (lambda p, x: (p * x.softmax(0)).sum(), (x, v)),
    "inputs called as functions": (lambda det, tr: torch.linalg.det(det) * (det @ tr).sum(), (P, v)),
    "symmetric numbers": (lambda x, A: x @ A @ x, (x, P + P.T)),
    "no matrix": (lambda X: X.unfold(0, 2, 1).sum(-1), (P,)),
    "an axis of size 1": (lambda X, a: (X * a[:, None]).sum(1, keepdim=True), (P, v)),
    "mask": (lambda X: X.tril().relu().sum(0), (P,)),
    "a bound that is met": (lambda x: x.clamp(min=0.0) @ x, (x,)),
    "labels that are ignored": (lambda Z: F.cross_entropy(Z, torch.tensor([0, -100, 2, 1])), (P,)),
    "label weights": (lambda Z: F.cross_entropy(Z, torch.tensor([0, 3, 2, 1]), weight=v.abs()), (P,)),
    "ones that are numbers": (lambda x, p: -(p * x.log_softmax(0)).sum(), (x, v.softmax(0))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_form_is_true_or_none(name: str) -> None:
    f, args = OTHERS[name]
    for wrt in range(len(args)):
        J = jacobian(f, *args, wrt=wrt)
        assert J.dense().isfinite().all()
        torch.testing.assert_close(J.dense(), torch.autograd.functional.jacobian(f, args)[wrt], **CLOSE)
        check_form(J)


def test_products_with_zeros() -> None:
    for f in (lambda x: x.prod(), lambda x: x.cumprod(0), lambda x: (x.prod() * x).sum()):
        for verb, known in (
            (jacobian, torch.func.jacrev(f)),
            (hessian, torch.func.jacrev(torch.func.jacrev(lambda x, f=f: f(x).sum()))),
        ):
            J = verb(f if verb is jacobian else lambda x, f=f: f(x).sum(), zeros)
            assert J.dense().isfinite().all()
            torch.testing.assert_close(J.dense(), known(zeros), **CLOSE)
    assert "right where entries are 0" in str(jacobian(lambda x: x.prod(), zeros).explain())


@pytest.mark.parametrize("wrong", ["transpose", "divisor", "order", "slope", "value"])
def test_the_law_bites(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without its transposes or what it is divided by, in another order; a slope or a value that is not what it says."""
    if wrong == "transpose":
        monkeypatch.setattr(matrix_pieces, "MARKS", {**matrix_pieces.MARKS, (True, False): ""})
    if wrong == "divisor":
        monkeypatch.setattr(matrix_text, "divided_by", lambda parts: "")
    if wrong == "order":
        true = matrix_pieces.MatrixChain.after
        monkeypatch.setattr(
            matrix_pieces.MatrixChain, "after", lambda a, b: true(b, a) if a.rows == b.cols else true(a, b)
        )
    if wrong == "value":
        monkeypatch.setattr(matrix_form.MatrixForm, "_linear", lambda *_: None)
    if wrong == "slope":
        monkeypatch.setitem(matrix_form.MatrixForm.functions, "inv", lambda m, node, f: m.value(node))
    failed = 0
    for verb, f, args, form in ROWS:
        try:
            failed += check_form(verb(f, *args)) != form
        except (AssertionError, ArithmeticError, RuntimeError):
            failed += 1
    assert failed > 3


def test_in_html() -> None:
    told = df.explain(lambda x, A: x @ A @ x, x, P)
    assert '<div class="f">dz/dx = (A + Aᵀ) x</div>' in told.to_html()

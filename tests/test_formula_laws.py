"""Whatever formula is shown is true: read back from the text, the letters from the lines that define them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula_reader import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calculus_explain import EXAMPLES, STRANGE, drawn, rand
from test_calculus_laws import BLOCK, block
from test_identities import check_form
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dualform as df
from dualform.algebra import notation
from dualform.algebra.index_text import IndexFormula, tex
from dualform.algebra.notation import Names, formula
from dualform.algebra.terms import recorded
from dualform.calculus import Derivative, Explanation, hessian, jacobian
from dualform.explanations.op_table import example_call
from dualform.graphs.local_rules import derivative
from dualform.ops.table import ROWS

# Coefficients are printed with six digits where they are no fractions.
CLOSE = {"rtol": 2e-6, "atol": 1e-9}


def value_of(f: IndexFormula, shape: tuple[int, ...], leaves: Mapping[str, Tensor], right: str = "") -> Tensor:
    """The numbers of a formula's text; its letters have those of the lines that define them, never what is stored."""
    defined = {letter.symbol: letter for letter in f.where}
    made: dict[str, Tensor] = {}

    def tensors(line: IndexFormula) -> dict[str, Tensor]:
        found = {name: t for name, t in line.tensors.items() if name not in defined} | dict(leaves)
        return found | {name: letter(name) for name in line.tensors if name in defined}

    def letter(name: str) -> Tensor:
        if name not in made:
            line = defined[name]
            stored = next(g.tensors[name] for g in (f, *f.where) if name in g.tensors)
            made[name] = evaluate(line.right(), line.out, tuple(stored.shape), tensors(line), line.ranges)
            torch.testing.assert_close(made[name], stored.to(torch.float64), **CLOSE)
        return made[name]

    return evaluate(right or f.right(), (*f.out, *f.inn), shape, tensors(f), f.ranges)


def from_latex(row: str, names: list[str]) -> str:
    r"""A LaTeX row's right side as plain text: A_{i,j}\,\delta_{j,k} is A[i,j] δ(j,k)."""
    text = row.replace(r"\,", " ").removesuffix(r" \\").strip()
    for name in sorted(names, key=lambda n: -len(tex(n))):
        shown = re.escape(tex(name))
        text = re.sub(rf"(?<![\w\\{{]){shown}(?:_\{{([^{{}}]*)\}})", lambda m, n=name: f"«{n}»[{m[1]}]", text)
        text = re.sub(rf"(?<![\w\\{{«]){shown}(?![\w(»'_}}])", lambda _, n=name: f"«{n}»", text)
    text = re.sub(r"\\sum_\{([^{}]*)\}", r"Σ_\1", text)
    text = re.sub(r"\\delta_\{([^{}]*)\}", r"δ(\1)", text)
    text = re.sub(r"\\sqrt\{(\d+)\}", r"√\1", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\cdot 10\^\{([^{}]*)\}", r"e\1", text).replace(r" \geq ", ">=")
    indices = r"(\[[^\]«»]*\]|δ\([^)«»]*\))"  # 4m is 4*m there
    text = re.sub(indices, lambda m: re.sub(r"(?<![\w'])(\d+)(?=[A-Za-z])", r"\1*", m[0]), text)
    return re.sub("[«»]", "", text).replace(r"\_", "_")


def check_names(J: Derivative, told: Explanation) -> None:
    """A name that is an argument's stands for it; code has the formulas' names, and runs with nothing else."""
    given = J.route.inputs if J.route is not None else {}
    lines = [line for f in shown(told) for line in (f, *f.where)]
    stands: dict[str, Tensor] = {}
    for line in lines:
        for name, t in line.tensors.items():
            if name in given:
                assert t.shape == given[name].shape, name
                torch.testing.assert_close(t, given[name], rtol=0, atol=0, equal_nan=True)
            if name in stands:
                torch.testing.assert_close(t, stands[name], rtol=0, atol=0, equal_nan=True)
            stands[name] = t
        assert not {*line.out, *line.inn, *(s for product in line.lines for s, _ in product.sums)} & set(line.tensors)
    notes = dict(re.findall(r"^# (\w+) is (.*)$", told.code, re.MULTILINE))
    for name, t in told.namespace.items():
        assert notes.get(name, name) in {**given, **stands}
        torch.testing.assert_close(t, {**given, **stands}[notes.get(name, name)], rtol=0, atol=0, equal_nan=True)
    assert not {told.vjp.seed, told.vjp.target} & ({*given, *stands} | {"torch"})


def shown(told: Explanation) -> Iterator[IndexFormula]:
    """Every formula of an account."""
    yield from (step.formula for step in told.steps)
    yield from (move.formula for stage in told.stages for move in stage.moves)
    yield from [told.result.formula, *([told.expanded] if told.expanded else [])]


def check_account(J: Derivative, expected: Tensor) -> None:
    """Every formula of an account in text, LaTeX, HTML and one line, its code, and its names."""
    told: Any = J.explain("proof")
    if not expected.isfinite().all():
        return
    leaves = {n: t for n, t in (J.route.inputs if J.route else {}).items() if t.dtype != torch.complex128}
    whole = {step.formula.symbol: step.derivative.dense() for step in told.steps}
    text, page, latex = str(told), re.sub(r"<[^>]*>", "", told.to_html()), told.to_latex()
    plain = unescape(page).replace("\xa0", " ")
    for step in told.steps:
        found = value_of(step.formula, step.shape, leaves)
        torch.testing.assert_close(found, step.derivative.dense().to(torch.float64), **CLOSE)
    for stage in told.stages:
        shape = (*stage.out_shape, *J.in_shape)
        values = [value_of(m.formula, shape, leaves | whole) for m in stage.moves]
        for value in values:
            torch.testing.assert_close(value, values[-1], **CLOSE)
        if values:
            whole[stage.symbol] = values[-1]
    result = told.result.formula
    torch.testing.assert_close(value_of(result, J.shape, leaves), expected, **CLOSE)
    if told.expanded is not None:
        torch.testing.assert_close(value_of(told.expanded, J.shape, leaves), expected, **CLOSE)
    one = str(J.explain("one-line"))
    assert one.startswith(result.sentence + "   shape")
    for letter in result.where:
        assert f"where {letter.told}" in text
        assert f"where {letter.told}".replace("    (", " (") in plain
        assert letter.latex().replace("= ", "&= ", 1) in latex
        assert letter.told in one
    for line in (result, *result.where):
        read = from_latex(line.latex_right(), list(line.tensors))
        assert " ".join(read.split()) == " ".join(line.right().replace(" · ", " ").split())
    g = rand(*J.out_shape)
    torch.testing.assert_close(told.vjp.run(g), torch.tensordot(g, expected, g.ndim), rtol=1e-9, atol=1e-9)
    check_names(J, told)
    check_form(J)


a, b = rand(3, 2), rand(3, 2) + 1
S = torch.tensor([4.0, 0.4, 2.0]).double()
lower = torch.tril_indices(2, 2)
labels = torch.tensor([0, 1, 1])
chosen = torch.tensor([2, 0, 2])


def logdet_of_lower(p: Tensor) -> Tensor:
    M = torch.zeros(2, 2).double().index_put((lower[0], lower[1]), p)
    return torch.logdet(M + M.tril(-1).T)


def deep(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(4):
        x = x + torch.tanh(x @ w) * x.sum(-1, keepdim=True)
    return x.sum(0)


# Merged factors, views of factors, and names that rules, code or indices would like to have.
MERGED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "difference": (lambda x, a, b: (x * a - x * b).sum(0), (rand(3, 2), a, b)),
    "weighted sum": (lambda x, a, b: (2 * x * a + 3 * x * b).sum(0), (rand(3, 2), a, b)),
    "softmax, then a product": (lambda x, c: (x.softmax(0) * c).sum(), (rand(4), rand(4))),
    "cross entropy": (lambda z: F.cross_entropy(z, labels), (rand(3, 2),)),
    "log det of a symmetric": (logdet_of_lower, (S,)),
    "quadratic form": (lambda x, A: x @ A @ x, (rand(3), rand(3, 3))),
    "two products": (lambda x, A, B: (x @ A @ B).sum(-1), (rand(3, 3), rand(3, 4), rand(4, 2))),
    "rules' letters": (lambda x, p, h, r: F.layer_norm((x * p).softmax(-1), (2,)) * h * r, (rand(3, 2), a, b, b)),
    "code's names": (lambda g, torch, x_bar, at: (g * torch * x_bar + at).cumsum(0) * g, (a, b, rand(3, 2), b)),
    "index letters": (lambda i, j, k, A: (i @ j * k.softmax(-1) + A).sum(0), (rand(2, 3), rand(3, 2), a[:2], b[:2])),
    "capital letters": (lambda A, B, D: (A * B - 3 * A * D).sum(0), (rand(3, 2), a, b)),
    "views": (lambda x, y: x.diagonal() * y[::2, 1] * y.reshape(-1)[2:6:3] * y.flip(0)[1], (rand(2, 2), rand(3, 2))),
    "split axes": (lambda x, y: x.reshape(3, 2) * y.reshape(6)[:, None][:3], (rand(6), rand(2, 3))),
    "constants": (lambda x: x * x.detach() * torch.arange(3.0).double() * b[:, 0], (rand(3),)),
    "look-ups": (lambda x, w: (F.embedding(chosen, w) * x).sum(-1) * x.sort(-1).values.sum(), (rand(3, 2), rand(3, 2))),
    "deep": (deep, (rand(2, 3), rand(3, 3) / 3)),
    "many terms": (lambda x: sum((x * (k + 1)).roll(k, 0) * x for k in range(9)), (rand(9),)),
    "masked": (lambda x, m: torch.where(x > 0, x * m, -x).tril().sum(0), (rand(3, 3), rand(3, 3))),
    "convolution": (lambda x, w: F.conv1d(x, w, stride=2, padding=1).relu().sum(1), (rand(1, 2, 5), rand(2, 2, 3))),
}


@pytest.mark.parametrize("name", MERGED)
def test_letters_say_what_they_stand_for(name: str) -> None:
    f, args = MERGED[name]
    for wrt in range(len(args)):
        J = jacobian(f, *args, wrt=wrt)
        check_account(J, torch.func.jacrev(f, wrt)(*args))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gallery_is_read_back(name: str) -> None:
    f, args, wrt = EXAMPLES[name]
    check_account(jacobian(f, *args, wrt=wrt), torch.func.jacrev(f, wrt)(*args))


def test_the_page_of_pictures_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every derivative that docs/gallery.md explains."""
    page = (Path(__file__).parents[1] / "docs" / "gallery.md").read_text()
    explained: list[Derivative] = []
    monkeypatch.setattr(Derivative, "explain", lambda J, level="steps": explained.append(J))
    monkeypatch.setattr(Derivative, "plot", lambda J: None)
    blocks = re.findall(r"^```\{code-cell\}[^\n]*\n(?::\w+:[^\n]*\n)*(.*?)^```", page, re.MULTILINE | re.DOTALL)
    dtype = torch.get_default_dtype()
    try:
        exec("\n".join(block for block in blocks if "to_latex" not in block), {})
    finally:
        torch.set_default_dtype(dtype)
    monkeypatch.undo()
    assert len(explained) >= 12
    for J in explained:
        f = J.route.shown(J)
        exact = {"rtol": 1e-5, "atol": 1e-5} if J.dtype == torch.float32 else CLOSE
        torch.testing.assert_close(value_of(f, J.shape, dict(J.route.inputs)), J.dense().double(), **exact)


@pytest.mark.parametrize("name", [name for name in STRANGE if name != "long"])  # `deep` is as long
def test_what_is_strange_is_read_back(name: str) -> None:
    f, args = STRANGE[name]
    for J in tree_leaves(jacobian(f, *args)):
        check_account(J, J.dense())


def test_code_of_a_block_runs_in_its_formulas_names() -> None:
    """Six letters, products of which only the code makes some, and views of both: `explain` runs what it prints."""
    J = jacobian(block, *BLOCK)
    told: Any = J.explain()
    assert max(error for _, error in told.checks) < 1e-12
    check_names(J, told)
    made = {"torch": torch, told.vjp.seed: rand(*J.out_shape), **told.namespace}
    exec(told.code, made)
    for name, stored in told.result.formula.tensors.items():
        torch.testing.assert_close(made[name], stored)


@settings(max_examples=5)
@given(data=st.data())
def test_drawn_programs_are_read_back(data: st.DataObject) -> None:
    f, x = drawn(data.draw)
    check_account(jacobian(f, x), torch.func.jacrev(f)(x))


@pytest.mark.parametrize("letter", "abcdefghijklmnopqrstuvwxyz_")
def test_every_row_is_read_back(letter: str) -> None:
    rows = [row for name, row in ROWS.items() if row.examples and name.split("::")[1].startswith(letter)]
    calls = [example_call(row.examples[0]) for row in rows]
    for call, k in [(c, k) for c in calls for k in range(len(c.operands))]:
        with recorded():
            J = derivative(call, k)
            f = formula(J.terms, J.out_shape, J.in_shape)
        dense = J.dense()
        if dense.numel() <= 2**12 and dense.isfinite().all():
            torch.testing.assert_close(value_of(f, J.shape, {}), dense.to(torch.float64), **CLOSE)


def test_products_and_second_derivatives_are_read_back() -> None:
    x, w = rand(3, 4), rand(4, 2)
    J = jacobian(lambda h: h.softmax(-1), x @ w) @ jacobian(lambda x: (x @ w).tanh(), x)
    f = J.route.shown(J)
    torch.testing.assert_close(value_of(f, J.shape, {}), J.dense(), **CLOSE)
    for second, args in ((lambda x: (x.softmax(0) * x).sum(), (rand(4),)), (lambda x, w: (x @ w).tanh().sum(), (x, w))):
        H = hessian(second, *args)
        told: Any = H.explain("proof")
        torch.testing.assert_close(value_of(told.result.formula, H.shape, {}), H.dense(), **CLOSE)
        torch.testing.assert_close(H.dense(), torch.func.jacrev(torch.func.jacrev(second))(*args), rtol=1e-9, atol=1e-9)


def test_check_defines_its_letters() -> None:
    report = df.calculus.check(lambda g, z: g * z, lambda z: F.cross_entropy(z, labels), rand(3, 2))
    assert "df/dz[i,j] = A[i,j], where A[i,j] = " in str(report)


def test_axes_are_the_callers_from_the_first_step() -> None:
    J = jacobian(
        lambda x, w, k: ((x @ w) * k).softmax(-1).sum(0), rand(3, 2), rand(2, 4), rand(4), wrt=1,
        axes="batch l, l m, m -> m",
    )  # fmt: skip
    told: Any = J.explain("proof")
    assert str(told.steps[0].formula) == "dmatmul/dw[batch,m,l,m'] = x[batch,l] δ(m,m')"
    assert str(told.steps[2].formula).startswith("dsoftmax/dmul[batch,m,batch',m'] = p[batch,m] ")
    assert told.result.formula.left == "dz/dw[m,l,m']"
    check_account(J, J.dense())
    J = jacobian(lambda x, y: x @ y, rand(2, 3), rand(3, 4), axes="i j, j k -> i k")
    assert str(J.explain("one-line")).startswith("dz/dx[i,k,i',j] = y[j,k] δ(i,i')")


def test_names() -> None:
    told: Any = jacobian(
        lambda x, W: (x @ W).softmax(-1) * x.detach()[:, :1], rand(3, 2), rand(2, 2), wrt="W"
    ).explain()
    assert told.vjp.target == "W_bar"
    assert "W_bar = Σ_out g[out] J[out, in]" in str(told)
    scale = torch.tensor(3.0).double()
    text = str(jacobian(lambda x: x * scale * torch.tensor([1.0, 2.0]).double(), rand(2)).explain())
    assert "scale" in text
    assert "detach" not in text


@pytest.mark.parametrize("wrong", ["sign", "coefficient", "index", "term", "name"])
def test_the_law_bites(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A definition without its signs, coefficients, order of indices or one of its terms, and a name for two things."""
    true = notation.written

    def planted(f: Any, known: Names, views: bool = True) -> Any:
        terms = true(f, known, views)
        if not views:
            return terms
        if wrong == "sign":
            return tuple(replace(t, coef=abs(t.coef)) for t in terms)
        if wrong == "coefficient":
            return tuple(replace(t, coef=1.0 if t.coef > 0 else -1.0) for t in terms)
        if wrong == "index":
            return tuple(replace(t, out=t.out[::-1]) for t in terms)
        return terms[:1] if wrong == "term" else terms

    monkeypatch.setattr(notation, "written", planted)
    if wrong == "name":
        monkeypatch.setattr(notation, "is_alike", lambda a, b: a.shape == b.shape)
    f, args = (lambda x, p, b: (2 * x.softmax(-1) * p - 3 * x * b).sum(0), (rand(2, 2), a[:2], b[:2]))
    J = jacobian(f, *args)
    with pytest.raises((AssertionError, ArithmeticError)):
        check_account(J, torch.func.jacrev(f)(*args))

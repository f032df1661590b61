"""The printed derivation is true: its formulas are parsed back and evaluated, its code is run, its shapes are shown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula_reader import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dualform.algebra.drawing import entries
from dualform.algebra.index_text import IndexFormula, number
from dualform.algebra.notation import formula
from dualform.calculus import Explanation, Term, explain, hessian, jacobian
from dualform.calculus.traced import clear_cache
from dualform.explanations.explanation import LEVELS
from dualform.explanations.steps import OpStep
from dualform.ops.table import ROWS, OpCall


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def value_of(formula: IndexFormula, shape: tuple[int, ...], whole: dict[str, Tensor] | None = None) -> Tensor:
    """Give the numbers that the printed text stands for; `whole` are derivatives that stand in it by name."""
    tensors = {**formula.tensors, **{k: v for k, v in (whole or {}).items() if k in formula.right()}}
    return evaluate(formula.right(), (*formula.out, *formula.inn), shape, tensors, formula.ranges)


def mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = x @ w1
    return F.gelu(h) @ w2


EXAMPLES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "broadcast": (lambda x, y: x + y, (rand(2), rand(2, 2)), 0),
    "wide broadcast": (lambda x, y: x * y, (rand(3, 1), rand(2, 3, 2)), 0),
    "matmul left": (lambda x, y: x @ y, (rand(2, 3), rand(3, 2)), 0),
    "matmul right": (lambda x, y: x @ y, (rand(2, 3), rand(3, 2)), 1),
    "mlp": (mlp, (rand(2, 3), rand(3, 3), rand(3, 2)), 1),
    "softmax": (lambda x: x.softmax(-1), (rand(2, 3),), 0),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (rand(2, 3), rand(3), rand(3)), 0),
    "residual": (lambda x: x + x.relu() * 2, (rand(2, 2),), 0),
    "slices": (lambda x: (x[1:, ::2] - x[:-1, 1::2]).sum(0), (rand(3, 4),), 0),
    "cat": (lambda x, y: torch.cat([x, y * x]), (rand(2, 2), rand(2, 2)), 0),
    "reshape": (lambda x: x.reshape(4, 2).exp().T, (rand(2, 4),), 0),
    "diagonal": (lambda x: x.diagonal() * x.sum(), (rand(3, 3),), 0),
    "scalar": (lambda x: (x * x).sum(), (rand(3),), 0),
    "rank 0": (lambda x, y: x * y, (rand(), rand(2)), 0),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (rand(2, 3), rand(2, 3), rand(2, 2)), 1),
    "constant": (lambda x: x.detach(), (rand(2),), 0),
    "size 1": (lambda x: x.expand(2, 2) * 3, (rand(1, 1),), 0),
}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], int, Explanation]:
    f, args, wrt = EXAMPLES[request.param]
    return f, args, wrt, explain(f, *args, wrt=wrt, level="proof")


def test_printed_formulas_are_the_derivatives(example: tuple) -> None:
    *_, told = example
    for step in (*told.steps, told.result):
        torch.testing.assert_close(value_of(step.formula, step.shape), step.derivative.dense(), rtol=2e-6, atol=1e-12)
        assert str(step.formula) in str(told)


def check_the_proof(told: Explanation, in_shape: tuple[int, ...]) -> int:
    """Every line of every stage is the same derivative; whole derivatives in it are those that came before."""
    whole = {step.formula.symbol: step.derivative.dense() for step in told.steps}
    lines = 0
    for stage in told.stages:
        shape = (*stage.out_shape, *in_shape)
        if stage.moves:
            values = [value_of(move.formula, shape, whole) for move in stage.moves]
            for value in values[:-1]:
                torch.testing.assert_close(value, values[-1], rtol=2e-6, atol=1e-12)
            whole[stage.symbol] = values[-1]
            lines += len(values)
    if told.stages and not told.left_out:
        expected = told.result.derivative.dense()
        torch.testing.assert_close(whole[told.result.formula.symbol], expected, rtol=2e-6, atol=1e-12)
    return lines


def test_every_line_of_the_proof_is_the_derivative(example: tuple) -> None:
    _, args, wrt, told = example
    check_the_proof(told, tuple(args[wrt].shape))
    text = str(told)
    for stage in told.stages:
        for move in stage.moves:
            assert move.formula.right() in text
            assert move.reason in text


def test_printed_code_is_the_vjp(example: tuple) -> None:
    f, args, wrt, told = example
    J = jacobian(f, *args, wrt=wrt)
    g = rand(*J.out_shape)
    (expected,) = torch.func.vjp(lambda x: f(*args[:wrt], x, *args[wrt + 1 :]), args[wrt])[1](g)
    torch.testing.assert_close(told.vjp.run(g), expected, rtol=1e-10, atol=1e-10)
    assert told.code.splitlines()[0] in str(told)


def test_checks_are_small_and_shapes_are_shown(example: tuple) -> None:
    *_, told = example
    assert len(told.checks) == 3
    assert all(error < 1e-10 for _, error in told.checks)
    for step in (*told.steps, told.result):
        assert step.shape == step.out_shape + step.in_shape
        assert (
            f"shape {step.out_shape} + {step.in_shape} = {step.shape}; {math.prod(step.shape):,} numbers if dense"
            in str(told)
        )


def test_the_steps_compose_to_the_result() -> None:
    for name in ("broadcast", "wide broadcast", "matmul right", "mlp", "reshape"):
        f, args, wrt = EXAMPLES[name]
        told = explain(f, *args, wrt=wrt)
        J = told.steps[0].derivative
        for step in told.steps[1:]:
            J = step.derivative @ J
        torch.testing.assert_close(J.dense(), told.result.derivative.dense())


def test_the_question_everybody_asks() -> None:
    """z = x + y with x (2,) and y (2, 2): the copy x_b, three shapes, nothing stored, and why the sum runs."""
    text = str(explain(lambda x, y: x + y, torch.randn(2), torch.randn(2, 2)))
    for wanted in (
        "broadcast  x -> x_b   (2,) -> (2, 2)",
        "dx_b/dx[i,j,k] = δ(j,k)",
        "shape (2, 2) + (2,) = (2, 2, 2); 8 numbers if dense, 0 stored",
        "z = x_b + y",
        "dz/dx_b[i,j,k,l] = δ(i,k) δ(j,l)",
        "shape (2, 2) + (2, 2) = (2, 2, 2, 2); 16 numbers if dense, 0 stored",
        "dz/dx[i,j,k] = Σ_l Σ_m dz/dx_b[i,j,l,m] · dx_b/dx[l,m,k]",
        "= Σ_l dz/dx_b[i,j,l,k]    <- the sum runs over the broadcast axis l",
        "dz/dx[i,j,k] = δ(j,k)",
        "x_bar = g.sum((0,))",
        "max error 0.0e+00",
    ):
        assert wanted in text


def test_names_are_the_callers() -> None:
    told = explain(mlp, rand(2, 3), rand(3, 3), rand(3, 2), wrt=1)
    text = str(told)
    assert "dz/dw1 = dz/dgelu · dgelu/dh · dh/dw1" in text
    assert "dz/dw1[i,j,k,l] = w2[l,j] gelu'(h)[i,l] x[i,k]" in text
    assert "h = x @ w1   (test_calculus_explain.py:" in text
    named = jacobian(lambda a, b: a @ b, rand(2, 3), rand(3, 2), axes="batch feat, feat out -> batch out")
    assert str(named.explain("one-line")).startswith("dz/da[batch,out,batch',feat] = b[feat,out] δ(batch,batch')")


X, T, PICK = (torch.rand(n, dtype=torch.float64) for n in ((6,), (4, 5), (2, 3, 4)))
AT, IN_ROW = torch.tensor([3, 1, 1, 0]), torch.tensor([[0, 1], [4, 2], [3, 3], [1, 0]])
LOOKED_UP: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "places": (lambda x: x[AT], X), "rows": (lambda t: t[AT], T), "columns": (lambda t: t[:, AT], T),
    "in each row": (lambda t: t.gather(1, IN_ROW), T), "pairs": (lambda t: t[AT, AT], T),
    "pairs behind": (lambda t: t[:, AT[:2] - 1, AT[2:]], PICK), "all pairs": (lambda t: t[AT[:, None], AT], T),
    "summed": (lambda x: x[AT].sum(), X), "sorted": (lambda t: t.sort(0)[0], T), "largest": (lambda t: t.topk(2, 1)[0], T),
    "reshaped": (lambda t: t.reshape(20)[AT], T), "scattered": (lambda x: torch.zeros(4).double().index_add(0, AT, x[:4]), X),
    "flipped": (lambda x: x.flip(0), X), "windows": (lambda x: x.unfold(0, 3, 2), X),
    "pooled": (lambda t: torch.nn.functional.max_pool1d(t, 2), PICK), "words": (lambda t: torch.nn.functional.embedding(IN_ROW % 4, t), T),
    "of products": (lambda t: t[AT] * t[:, :1] + t.gather(1, IN_ROW).sum(1, True), T),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKED_UP)
def test_printed_code_looks_places_up_and_builds_no_matrix_of_them(name: str) -> None:
    told = jacobian(*LOOKED_UP[name]).explain("proof")
    assert "==" not in told.code
    assert "index_put" in told.code or "= g[" in told.code
    assert max(error for _, error in told.checks) < 1e-12


def test_levels() -> None:
    J = jacobian(lambda x, w: (x @ w).softmax(-1), rand(2, 3), rand(3, 2), wrt=1)
    one, steps, proof = (str(J.explain(level)) for level in ("one-line", "steps", "proof"))
    assert "\n" not in one
    assert len(J.explain("steps").checks) == 2
    assert "rule: matmul is a product, linear in w" in proof
    assert "the rule of softmax: dp_j/dx_k = p_j (δ_jk - p_k)" in proof
    assert "<- Σ_m δ(i,m) leaves m = i" in proof
    assert "rule:" not in steps
    assert "leaves" not in steps.replace(steps[steps.index("chain") :], "")
    with pytest.raises(ValueError, match="level is 'all'; expected one of"):
        J.explain("all")
    with pytest.raises(ValueError, match="made of terms alone"):
        (2 * J).explain()


# -- what is printed, whatever the function


def drawn(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A program of one to five ops with residuals, and an argument."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    moves: list[Callable[[Tensor], Tensor]] = []
    x = first = rand(*shape)
    for _ in range(draw(st.integers(1, 5))):
        move = draw(st.sampled_from(list(choices(x, draw(st.integers(0, max(x.ndim - 1, 0)))))))
        if move(x).numel() <= 36:
            moves.append(move)
            x = move(x)
        if x.shape == first.shape and draw(st.integers(0, 3)) == 0:
            moves.append(lambda x: x + 0.5 * first)
            x = moves[-1](x)

    def f(x: Tensor) -> Tensor:
        for move in moves:
            x = move(x)
        return x

    return f, first


def choices(x: Tensor, d: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """The ops that fit a tensor."""
    yield from (lambda x: x.tanh(), lambda x: x * x, lambda x: 2 - x, lambda x: x.sin() + x)
    if x.ndim:
        yield from (
            lambda x: x.sum(d),
            lambda x: x.mean(d, keepdim=True),
            lambda x: x.softmax(d),
            lambda x: x.cumsum(d),
        )
        yield from (lambda x: x.flatten(), lambda x: x - x.mean(d, keepdim=True), lambda x: torch.cat([x, x.exp()], d))
        yield from (lambda x: x.flip(d), lambda x: x.index_select(d, torch.tensor([0, x.shape[d] - 1, 0])))
        if x.shape[d] > 1:
            yield from (lambda x: x.narrow(d, 1, x.shape[d] - 1), lambda x: x.select(d, 1), lambda x: x.roll(1, d))
    if x.ndim == 1:
        yield from (lambda x: x[:, None] + x, lambda x: x.expand(2, *x.shape), lambda x: torch.outer(x, x))
    if x.ndim == 2:
        yield from (lambda x: x @ x.T, lambda x: F.pad(x, (1, 0)), lambda x: torch.einsum("ij,ij->i", x, x))
        yield from (lambda x: x.tril(), lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: x.diagonal())
    if x.ndim >= 2:
        yield from (lambda x: x.transpose(0, 1), lambda x: x.reshape(x.shape[1], x.shape[0], *x.shape[2:]))


@settings(max_examples=int(os.environ.get("EXPLAINED_PROGRAMS", "10")))
@given(data=st.data())
def test_whatever_is_printed_is_true(data: st.DataObject) -> None:
    """Every formula of every step, every line of the proof, the result and the terms, read back from the text."""
    f, x = drawn(data.draw)
    told = explain(f, x, level="proof")
    whole = torch.func.jacrev(f)(x)
    close = {"rtol": 2e-6, "atol": 1e-9}
    for step in told.steps:
        torch.testing.assert_close(value_of(step.formula, step.shape), step.derivative.dense(), **close)
    torch.testing.assert_close(value_of(told.result.formula, told.result.shape), whole, **close)
    check_the_proof(told, tuple(x.shape))
    J = jacobian(f, x)
    shown = formula(J.terms, J.out_shape, J.in_shape)
    torch.testing.assert_close(value_of(shown, J.shape), whole, **close)
    g = rand(*J.out_shape)
    torch.testing.assert_close(told.vjp.run(g), torch.func.vjp(f, x)[1](g)[0], rtol=1e-9, atol=1e-9)
    assert all(error < 1e-9 for _, error in told.checks)
    assert_balanced(told.to_latex())
    assert max(map(len, str(told).splitlines())) < 1500


def assert_balanced(text: str) -> list[str]:
    """One relation a row, braces in pairs; returns the rows without their ends."""
    first, *rows, last = text.split("\n")
    assert (first, last) == (r"\begin{aligned}", r"\end{aligned}")
    assert text.count("{") == text.count("}")
    assert all(row.count("&=") == 1 for row in rows)
    return [row.removesuffix(" " + 2 * chr(92)).replace("&", "") for row in rows]


def test_latex_parses(example: tuple) -> None:
    *_, told = example
    for level in LEVELS:
        rows = assert_balanced(replace(told, level=level).to_latex())
    for row in sorted(set(rows), key=len)[:6]:
        MathTextParser("path").parse(f"${row}$")


def test_latex_speaks_of_partials() -> None:
    latex = jacobian(lambda x: x.softmax(-1), rand(2, 3)).explain().to_latex()
    assert (
        r"\frac{\partial z_{i,j}}{\partial x_{k,l}} &= p_{i,j}\,\delta_{i,k}\,\delta_{j,l} - "
        r"p_{i,j}\,p_{i,l}\,\delta_{i,k}" in latex
    )
    added = explain(lambda x, y: x + y, rand(2), rand(2, 2)).to_latex()
    assert r"\sum_{l}\,\frac{\partial z_{i,j}}{\partial \mathrm{x\_b}_{l,k}}" in added


class Page(HTMLParser):
    """Checks that tags close and nothing is fetched; `marked` are the texts of the spans of each index."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marked: dict[str, set[str]] = {}
        self.text: list[str] = []
        self.index = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "span", "style", "code", "pre", "b", "ul", "li", "table", "tr", "td"), tag
        assert {name for name, _ in attrs} <= {"class", "title"}
        self.open.append(tag)
        words = (dict(attrs).get("class") or "").split()
        self.index = words[1] if words[:1] == ["i"] else ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.index:
            self.marked.setdefault(self.index, set()).add(data)
        if "style" not in self.open:
            self.text.append(data)
        else:
            assert "url" not in data
            assert "import" not in data


def test_html_stands_alone_and_marks_indices(example: tuple) -> None:
    *_, told = example
    for level in LEVELS:
        page = Page(replace(told, level=level)._repr_html_())
        assert not page.open
        text = "".join(page.text)
        assert told.result.formula.right() in text
        for name, size in zip(told.result.formula.out, told.result.out_shape, strict=True):
            assert name == "0" or {name, str(size)} <= page.marked[f"i-{name}"]
    assert all(step.text in text for step in told.steps)
    assert told.code.splitlines()[0] in text


def test_pictures(example: tuple) -> None:
    f, args, wrt, _ = example
    figure = jacobian(f, *args, wrt=wrt).plot()
    figure.draw_without_rendering()
    J = jacobian(f, *args, wrt=wrt)
    torch.testing.assert_close(
        entries(formula(J.terms, J.out_shape, J.in_shape), J.shape), J.dense(), rtol=2e-6, atol=1e-12
    )
    assert f"{int((J.dense() != 0).sum())} of {J.dense().numel()} entries" in figure.axes[0].texts[0].get_text()


def test_a_picture_of_what_is_too_large_shows_a_corner() -> None:
    figure = jacobian(lambda x, y: x + y, rand(20, 1), torch.zeros(10, 20, 30)).plot()
    assert "64 of 1,280 entries drawn are not 0" in (said := figure.axes[0].texts[0].get_text())
    assert "drawn are i<4 of 10, j<4 of 20, k<4 of 30" in said
    assert (jacobian(lambda x: x @ x.T, rand(5, 4)) @ jacobian(lambda x: 2 * x, rand(5, 4))).plot().axes


def test_a_whole_block_stays_short() -> None:
    block = (
        torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval().requires_grad_(False)
    )
    told = explain(block, rand(1, 4, 8), level="proof")
    text = str(told)
    assert len(told.steps) > 30
    assert f"Steps 17 to {len(told.steps) - 8} are left out here; they are in .steps: " in text
    assert len(text) < 60_000
    assert len(str(replace(told, level="steps"))) < 15_000
    assert "left out" in Page(told._repr_html_()).text[-1] or told.left_out in text
    assert max(error for _, error in told.checks) < 1e-12


def test_wrong_rules_change_the_text_and_break_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law bites: rules with a wrong sign, factor, delta or axis print something else, and the check says so."""
    clear_cache()
    right = explain(lambda x: x.softmax(-1) * 3, rand(2, 3))
    true_rule = ROWS["aten::softmax"].rule

    def dropped(call: OpCall, k: int) -> list[Term]:
        return true_rule(call, k)[:1]

    def signed(call: OpCall, k: int) -> list[Term]:
        return [replace(t, coef=abs(t.coef)) for t in true_rule(call, k)]

    def scaled(call: OpCall, k: int) -> list[Term]:
        return [replace(t, coef=t.coef / 3) for t in true_rule(call, k)]

    def turned(call: OpCall, k: int) -> list[Term]:
        first, *rest = true_rule(call, k)
        return [
            replace(
                first, inn=tuple(reversed(first.inn)) if first.out[0][0].size == first.out[1][0].size else first.out
            ),
            *rest,
            first,
        ]

    for wrong in (dropped, signed, scaled, turned):
        clear_cache()
        monkeypatch.setitem(ROWS, "aten::softmax", replace(ROWS["aten::softmax"], rule=wrong))
        with pytest.raises(ArithmeticError, match=r"largest error is [1-9].*; expected at most 1.5e-08"):
            explain(lambda x: x.softmax(-1) * 3, rand(2, 3))
        J = jacobian(lambda x: x.softmax(-1) * 3, rand(2, 3))
        shown = J.route.shown(J)
        assert str(shown) != str(right.result.formula)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(value_of(shown, J.shape), right.result.derivative.dense(), rtol=2e-6, atol=1e-9)
    clear_cache()


def test_wrong_text_does_not_pass() -> None:
    """The reader bites: one delta fewer, or another coefficient, evaluates to something else."""
    told = explain(lambda x: 2 * x, rand(3))
    step: OpStep = told.result
    (line,) = step.formula.lines
    for changed in (replace(line, coef=3.0), replace(line, deltas=())):
        wrong = IndexFormula("J", step.formula.out, step.formula.inn, (changed,), {})
        assert not torch.allclose(value_of(wrong, step.shape), step.derivative.dense())
    for text in ("2 δ(i,j", "2 δ(i;j)", "2 q[i]"):
        with pytest.raises(AssertionError):
            evaluate(text, ("i", "j"), (3, 3), {})


def test_numbers_are_exact_where_they_look_exact() -> None:
    shown = {
        1 / 3: "1/3",
        -2 / 7: "-2/7",
        3**-0.5: "1/√3",
        2**0.5: "√2",
        0.1: "0.1",
        1e-7: "1e-07",
        2.0: "2",
        0.12345678: "0.123457",
    }
    for value, text in shown.items():
        assert number(value) == text
    assert number(float("nan")) == "nan"


def written_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = y[1] * 2
    y += 1
    return y


STRANGE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "identity": (lambda x: x, (rand(3),)),
    "empty": (lambda x: x * 2, (rand(0, 3),)),
    "nothing left": (lambda x: x[:0] * 2, (rand(2, 3),)),
    "in place": (written_in_place, (rand(3, 2),)),
    "integers beside": (lambda w, i: F.embedding(i, w), (rand(4, 2), torch.tensor([[0, 3], [1, 1]]))),
    "numbers beside": (lambda x, n, s: x[:n] * s, (rand(3), 2, 1.5)),
    "names of indices": (lambda i, j: i @ j, (rand(2, 3), rand(3, 2))),
    "names of code": (lambda g, torch_: g * torch_, (rand(2), rand(2))),
    "tree": (lambda p: p["w"] * p["b"], ({"w": rand(2, 2), "b": rand(2)},)),
    "module": (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double(), (rand(4, 3),)),
    "composite": (torch.nn.GRUCell(2, 2).double(), (rand(1, 2), rand(1, 2))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (rand(2, 3), rand(2, 3), rand(2, 2))),
    "windows": (lambda x, w: F.conv1d(x, w, padding=1, stride=2), (rand(1, 2, 5), rand(2, 2, 3))),
    "look-ups": (lambda x: x.sort(-1).values, (rand(2, 3),)),
    "infinite": (lambda x: 1 / x, (torch.zeros(2, dtype=torch.float64),)),
    "long": (lambda x: torch.stack([x := x + x.tanh() for _ in range(14)])[-1], (rand(2),)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_functions_are_explained(name: str) -> None:
    f, args = STRANGE[name]
    for J in tree_leaves(jacobian(f, *args)):
        told = J.explain("proof")
        assert all(error < 1e-9 or name == "infinite" for _, error in told.checks), told.checks
        assert len(told.checks) == 3
        assert ("not to be compared, the numbers are not finite" in str(told)) == (name == "infinite")
        shown = told.result.formula
        assert not {*shown.out, *shown.inn} & {n for line in shown.lines for n, _ in line.factors}
        assert_balanced(told.to_latex())
        Page(told._repr_html_())
        json.dumps(told.to_dict())
        J.plot().draw_without_rendering()
        if math.isfinite(J.dense().sum()):
            torch.testing.assert_close(value_of(shown, J.shape), J.dense(), rtol=2e-6, atol=1e-9)
            check_the_proof(told, J.in_shape)


def test_second_derivatives_are_explained() -> None:
    H = hessian(lambda x: F.cross_entropy(x, torch.tensor([0, 2])), rand(2, 3))
    told = H.explain("proof")
    assert max(error for _, error in told.checks) < 1e-12
    assert [step.op for step in told.steps][:2] == ["_log_softmax", "exp"]
    check_the_proof(told, (2, 3))
    H.plot().draw_without_rendering()


@pytest.mark.parametrize("level", LEVELS)
def test_a_product_of_derivatives_is_explained(level: str) -> None:
    x, w = torch.rand(4, 5, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    inner, outer = jacobian(lambda x: x @ w, x), jacobian(lambda h: h.softmax(-1), x @ w)
    J = outer @ inner
    told = J.explain(level)
    assert max(error for _, error in told.checks) < 1e-12
    assert [step.shape for step in told.steps] == [inner.shape, outer.shape]
    f = told.result.formula
    found = evaluate(f.right(), (*f.out, *f.inn), J.shape, f.tensors, f.ranges)
    torch.testing.assert_close(found, torch.tensordot(outer.dense(), inner.dense(), 2))
    if level == "steps":
        assert "Σ_m Σ_n dz/dy[i,j,m,n] · dy/dx[m,n,k,l]    <- the chain rule" in str(told)
        assert "a vjp by these terms: 288 flops; by dz/dy, then dy/dx: 168" in str(told)
    last = jacobian(lambda z: z.sum(0), (x @ w).softmax(-1))
    for both in ((last @ outer) @ inner, last @ (outer @ inner)):
        assert max(error for _, error in both.explain(level).checks) < 1e-12
        both.explain(level).to_html(), both.explain(level).to_latex()

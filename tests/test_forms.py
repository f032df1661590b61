"""Forms are records: what each says of a learner, and that one more is one more record."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dualform as df
from dualform import testing as laws
from dualform.learning.forms import Form, Meeting, forms, scan, scores, state
from dualform.learning.grid import Variant

BLOCK = Variant(4, fresh=True, dense=True, opens=False)


class Curved(nn.Module):
    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.W)


def test_a_program_says_which_forms_apply_and_why_not():
    assert df.derive(df.learners.MLP(depth=2)(4), chunk=4).forms == {"dual": None, "primal": None}
    program = df.derive(Curved(), chunk=4)
    assert program.forms["primal"] is None
    assert program.forms["dual"] is not None
    assert "x @ torch.tanh(self.W)" in program.forms["dual"]
    assert "tanh, which is not affine" in program.forms["dual"]
    assert f"dual: {program.forms['dual']}" in str(program.explain())
    x = torch.zeros(1, 3, 1, 4)
    with pytest.raises(df.DerivationError, match=r"form='dual' does not exist at .*tanh") as caught:
        program(x, x, x, form="dual")
    assert str(program.forms["dual"]) in str(caught.value)


def test_every_site_lists_the_price_of_every_correction():
    for site in df.derive(df.learners.MLP(depth=2)(8), chunk=4).sites:
        assert list(site.prices) == ["scores", "state", "scan"]
        assert site.form == "scan" or site.prices[site.form] == min(site.prices.values(), key=lambda p: p.total)


@pytest.mark.parametrize("learner", [df.learners.MLP(depth=2), df.learners.residual_norm("linear")])
def test_one_more_form_is_one_more_record(monkeypatch, learner):
    """Weights per token at every site: a record, which every law takes by its name."""
    monkeypatch.setitem(forms, "per_token", Form("per_token", "weights per token", corrections=(state, scan)))
    program = df.derive(learner(4).double(), chunk=4)
    assert {c.form for c in program.plan(4, torch.float64, "per_token").derivation.step(BLOCK).choices} <= {
        "state",
        "scan",
    }
    assert program.forms["per_token"] is None
    laws.check_forms(program, ("per_token",))
    laws.check_split(program, (3, 5), ("per_token", "auto", "dual"))


def test_a_record_with_a_wrong_correction_is_found(monkeypatch):
    """The law bites: a correction that forgets a half is not the definition."""

    def half(m: Meeting) -> Tensor:
        return m.y + (scores.value(m) - m.y) / 2

    wrong = replace(scores, value=half)
    monkeypatch.setitem(forms, "wrong", Form("wrong", "half", corrections=(wrong, scan)))
    program = df.derive(df.learners.MLP(depth=2)(4).double(), chunk=4)
    with pytest.raises(AssertionError):
        laws.check_forms(program, ("wrong",))


def test_a_form_named_wrongly_is_told_the_forms():
    program, x = df.derive(df.learners.Linear()(4), chunk=4), torch.zeros(1, 3, 1, 4)
    with pytest.raises(df.DerivationError, match=r"form is 'dula'; expected one of \('auto', 'dual', 'primal'\)"):
        program(x, x, x, form="dula")

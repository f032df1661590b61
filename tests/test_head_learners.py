"""Heads as hidden states: the join of the catalogue of functions with learning at test time.

HEADS_LONG=1 runs every law of `check_learner` for every reconciliation and every expansion.
"""

import os
import re

import pytest
import torch
from test_head import expansions, reconciliations

import dualform as df
from dualform import testing as laws
from dualform.functions.multilinear import Multilinear

DOUBLE = torch.float64
rule = df.rules.SGD(lr=0.05)
is_long = bool(os.environ.get("HEADS_LONG"))


def learner(dim=4, **options):
    torch.manual_seed(0)
    return df.learners.Head(**options)(dim).double()


def laws_of(made, seed, chunk=2):
    """Definition against derived form: outputs, states, outer gradients; every law in the long run."""
    if is_long:
        laws.check_learner(made, rule=rule, chunk=3)
    program = df.derive(made, rule=rule, chunk=chunk)
    laws.check_forms(program, ["auto"], time=2 * chunk + 1, carried=True, ragged=True, resets=True, seed=seed)
    return program


@pytest.mark.parametrize("r", reconciliations, ids=lambda r: r.name)
def test_every_reconciliation_is_a_hidden_state(r):
    n = reconciliations.index(r)
    made = learner(reconciliation=r, remainder="identity", expansion=("identity", "taylor")[n % 2])
    program = laws_of(made, n)
    multilinear = isinstance(r.structure, Multilinear)
    assert multilinear == all(not choice.why for choice in program.sites)
    if multilinear:  # tokens first: no product of weights is formed, so the dual form exists
        laws.check_forms(program, ["dual"], time=4, seed=n + 1)
    else:  # a net: w is carried per token, and explain says so
        assert "is formed for every token" in str(program.explain())
        with pytest.raises(df.DerivationError, match=r"form='dual' does not exist at .*sigmoid, which is not affine"):
            laws.draw(program).run("dual")


@pytest.mark.parametrize("e", expansions if is_long else expansions[3::4], ids=lambda e: e.name)
def test_expansions_are_hidden_states(e):
    n = expansions.index(e)
    r = ("identity", "low_rank", "masking", "random_matrix_adaption")[n // 4 % 4]
    laws_of(learner(expansion=e, reconciliation=r), n)


def test_a_head_of_everything():
    made = learner(
        expansion="legendre", reconciliation=("lphm", {"rank": 1}), channels=2,
        fusion="lowrank_parameterized_concatenation",
        remainder=("linear", {"activation": "silu", "inside": True, "bias": True}),
    )  # fmt: skip
    laws_of(made, 0)
    laws.check_static(df.derive(made, rule=rule, chunk=2), made, time=3)


def test_affine_is_one_site_and_products_have_one_site_per_factor():
    def sites(**options):
        program = df.derive(learner(bias=False, **options), rule=rule, chunk=4)
        return [choice.leaf for choice in program.sites]

    assert sites(reconciliation="identity") == sites(reconciliation="masking") == ["w"]
    assert sorted(sites(reconciliation="low_rank")) == ["w[0:8]", "w[8:16]"]
    assert sorted(sites(reconciliation="hm", expansion="taylor")) == ["w[0:8]", "w[8:18]"]
    assert len(sites(reconciliation="dual_lphm")) == 4


def test_w_alone_is_fast_where_asked():
    program = df.derive(learner(reconciliation="low_rank"), slow=("bias",), chunk=2)
    assert list(program.parts.fast) == ["w"]
    assert program.initial_state(1, 1).anchor["w"].shape == (1, 1, 16)


def test_specs_and_layers():
    spec = df.learners.Head(expansion=("taylor", {"degree": 2}), reconciliation=("low_rank", {"rank": 1}))
    assert df.learners.build(spec.to_json()) == spec
    layer = df.TestTimeTraining(8, 2, learner=spec, objective="squared", rule=rule, chunk=4).double()
    y, state = layer(torch.randn(2, 6, 8, dtype=DOUBLE))
    laws.agree("y", torch.cat([layer(y[:, :3])[0], layer(y[:, 3:], layer(y[:, :3])[1])[0]], 1), layer(y)[0])
    assert state.memory.anchor["w"].shape == (2, 2, spec(4).l)
    wrapped = df.learners.residual_norm(df.learners.Head(reconciliation="masking"))
    assert df.derive(wrapped(4), chunk=2).parts.slow.keys() == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion": "tailor"}, "'taylor'"),
        ({"reconciliation": ("hm", {"p": 0})}, "p is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"interdependence": "graph"}, "expected interdependence = None"),
        ({"rank": 2}, "unknown option 'rank'"),
    ],
    ids=str,
)
def test_bad_options_raise_with_their_values(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        df.learners.Head(**options)


def test_bad_widths_raise_when_built():
    spec = df.learners.Head(reconciliation=("hm", {"p": 3}))
    with pytest.raises(ValueError, match="p is 3 and n is 4"):
        spec(4)


# -- leaves in pieces
# ----------------------------------------------------------------------------------------------------


class Sliced(torch.nn.Module):
    """A flat weight, sliced twice over, with a gap; another that overlaps, which stays whole."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(0.3 * torch.randn(40, generator=g, dtype=DOUBLE))
        self.v = torch.nn.Parameter(0.3 * torch.randn(10, generator=g, dtype=DOUBLE))

    def forward(self, x):
        inner = self.w[4:32]
        h = x @ inner[:12].reshape(4, 3) @ inner[12:24].reshape(3, 4)
        return h + self.v[:4] * x + self.v[2:6] + torch.tanh(self.w[36:]) * x


def test_a_flat_leaf_is_cut_where_it_is_sliced():
    program = df.derive(Sliced(), rule=df.rules.SGD(lr=0.1, momentum=0.5), chunk=2)
    laws.check_forms(program, ["auto"], time=5, carried=True, ragged=True, resets=True)
    leaves = {choice.leaf for choice in program.sites}
    assert {"w[4:16]", "w[16:28]", "w[36:40]", "v"} == leaves
    assert set(program.initial_state(1, 1).anchor) == {"w", "v"}

"""Sites that run token by token: the ops of one token are found among those of several, or the site is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import dualform as df
from dualform.graphs.trace import trace
from dualform.learning import front_door
from dualform.learning.spelling import spell, twins
from dualform.testing import check_forms

D = 4


class Body(nn.Module):
    """A learner with learned states of a recurrent part."""

    def __init__(self, body, part=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"W": (D, D), "b": (D,), "h": (1, 1, D), "c": (1, 1, D)}.items():
            drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
            setattr(self, name, nn.Parameter(0.5 * drawn))
        self.part = part and part.double()
        self.body = body

    def forward(self, x):
        return self.body(x, self)


def weights_of_states(x, s):
    n = len(x)
    return s.part(x.view(n, 2, 2), (s.h.repeat(1, n, 1), s.c.expand(1, n, D).contiguous()))[0].sum(1)


def states_expanded(x, s):
    n = x.shape[0]
    return s.part(x.view(n, 2, 2), (s.c.expand(-1, n, -1), s.h.expand(1, n, D)))[0].sum(1)


def beside_weights_of_weights(x, s):
    return s.part(x.view(-1, 2, 2))[0][:, -1] @ s.W.exp() + F.softplus(s.b) * (x @ s.W.cumprod(0))


def one_state(x, s):
    return s.part(x.view(len(x), 2, 2), s.h.repeat(1, len(x), 1))[0].sum(1)


def one_state_of_columns(x, s):
    return s.part(x.view(-1, 2, 2).transpose(0, 1), s.h.expand(-1, len(x), -1).contiguous())[1][0]


def two_layers(x, s):
    return s.part(x.view(-1, 2, 2), s.h.repeat(4, len(x), 1)[..., :2].contiguous())[0].sum(1)


def of_a_cell(x, s):
    return s.part(x, (s.h[0].expand(len(x), -1), s.c[0].repeat(len(x), 1)))[0]


LSTM, GRU, RNN = (lambda *size, of=of, **rest: of(*size, batch_first=True, **rest) for of in (nn.LSTM, nn.GRU, nn.RNN))
RECURRENT = {
    "lstm, learned states": (weights_of_states, lambda: LSTM(2, D)),
    "lstm, states expanded": (states_expanded, lambda: LSTM(2, D, bias=False)),
    "lstm, beside weights": (beside_weights_of_weights, lambda: LSTM(2, D)),
    "lstm, both ways": (beside_weights_of_weights, lambda: LSTM(2, 2, bidirectional=True)),
    "lstm cell": (of_a_cell, lambda: nn.LSTMCell(D, D)),
    "gru, a learned state": (one_state, lambda: GRU(2, D)),
    "gru, columns": (one_state_of_columns, lambda: nn.GRU(2, D)),
    "gru, two layers": (two_layers, lambda: GRU(2, 2, 2, bidirectional=True)),
    "rnn, a learned state": (one_state, lambda: RNN(2, D)),
    "rnn, of relu": (one_state, lambda: RNN(2, D, nonlinearity="relu", bias=False)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_part_inside_one_token_is_primal_at_its_first_call(name):
    body, part = RECURRENT[name]
    torch.manual_seed(0)
    check_forms(df.derive(Body(body, part()), rule=df.rules.SGD(lr=0.1), chunk=3, prove=False), time=4)


@pytest.mark.parametrize("part", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.RNN, nonlinearity="relu")])
@pytest.mark.parametrize("options", [{}, {"bias": False, "num_layers": 2}, {"bidirectional": True, "num_layers": 2}])
def test_recurrent_parts_are_spelt_as_torch_computes_them(part, options):
    module, x = part(3, 5, **options).double(), torch.randn(4, 2, 3, dtype=torch.float64)
    made = trace(lambda x: tuple(pytree.tree_leaves(module(x))), x)
    for found, right in zip(made(x), pytree.tree_leaves(module(x)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert {n.target._opname for n in made.graph.nodes if n.op == "call_function"} & {"linear", "addmm"}


# -- twins


def spelt(f, n):
    gm = trace(f, torch.empty(n, D), torch.empty(D))
    front_door.seen(gm, n)
    spell(gm, "learner")
    return gm.graph


def two(x, b):
    y, z = (x * b).exp(), (x + b).exp()
    return y - z.sin()


def two_turned(x, b):
    z, y = (x + b).exp(), (x * b).exp()
    return y - z.sin()


def scaled(x, b):
    return (x * 2) * (x * 3) + b


def scaled_turned(x, b):
    y, z = x * 3, x * 2
    return y * z + b


def one_more(x, b):
    y, z = (x * b).exp().exp(), (x + b).exp()
    return y - z.sin()


@pytest.mark.parametrize(("f", "other"), [(two, two_turned), (scaled, scaled_turned), (two, one_more)])
def test_no_pair_of_twins_is_made_wrongly(f, other):
    many, one = spelt(f, 3), spelt(other, 1)
    made = {}
    for graph in (many, one):  # what each node is, by what it is made of
        for node in graph.nodes:
            parts = [made[x] if x in made else repr(x) for x in node.args]
            made[node] = f"{node.target}({', '.join(parts)})" if node.op == "call_function" else str(node.target)
    found = {n: m for n, m in twins(many, one, 3).items() if n.op == "call_function"}
    assert all(made[n] == made[m] for n, m in found.items())
    own = {n: m for n, m in twins(many, spelt(f, 1), 3).items() if n.op != "output"}
    assert len(own) == len(many.nodes) - 1


def turned_for_one(x, s):
    if len(x) > 1:
        u, v = (x * s.b).exp(), (x - s.b).exp()
    else:
        v, u = (x - s.b).exp(), (x * s.b).exp()
    return (u @ s.W.exp()) * (v @ s.W.cumprod(0))


@pytest.mark.parametrize("prove", [False, True])
def test_ops_in_another_order_for_one_token_are_refused(monkeypatch, prove):
    """Who compares the traces is switched off: the match itself refuses."""
    x = torch.randn(1, 5, 1, D, dtype=torch.float64)
    monkeypatch.setattr(front_door, "difference", lambda *_: "")
    with pytest.raises(df.DerivationError, match=r"computed by other ops for one token than for \d"):
        df.derive(Body(turned_for_one), rule=df.rules.SGD(lr=0.1), chunk=3, prove=prove)(x, x, x)

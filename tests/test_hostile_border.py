"""A newcomer's hour: what people try first, and what they get wrong."""

import pytest
import torch
from torch import nn

import dualform as df
from dualform.ops.spelled import SPELLED

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "bias": False}]
)
def test_a_recurrence_gate_by_gate_is_torchs(options):
    net = nn.LSTM(3, 4, **options)
    n = net.num_layers * (1 + net.bidirectional)
    x, hx = torch.randn(2, 5, 3), tuple(torch.randn(2, n, 2 if net.batch_first else 5, 4))
    weights = [p.detach() for p in net.parameters()]
    given = (hx, weights, net.bias, net.num_layers, 0.0, True, net.bidirectional, net.batch_first)
    torch.testing.assert_close(SPELLED[torch.lstm](x, *given), torch.lstm(x, *given))


def test_a_recurrence_of_single_precision_learns():
    """torch traces it as a call of oneDNN, which vmap cannot map."""

    class Remembers(nn.Module):
        dim = 4

        def __init__(self):
            super().__init__()
            self.net = nn.LSTM(2, 2, batch_first=True)

        def forward(self, x):
            return x + self.net(x.unflatten(-1, (2, 2)))[0].flatten(-2)

    learner = Remembers()
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    o, _ = df.derive(learner, rule=df.rules.SGD(0.1), chunk=1, prove=False)(q, k, v)
    fast = {name: p.detach() for name, p in learner.named_parameters()}
    for t in range(5):  # one row, one head, by hand
        fast = {name: p.requires_grad_() for name, p in fast.items()}
        loss = (torch.func.functional_call(learner, fast, (k[0, t, 0],)) - v[0, t, 0]).square().sum() / 2
        slopes = torch.autograd.grad(loss, list(fast.values()))
        fast = {name: (p - 0.1 * g).detach() for (name, p), g in zip(fast.items(), slopes, strict=True)}
        torch.testing.assert_close(o[0, t, 0], torch.func.functional_call(learner, fast, (q[0, t, 0],)))


def test_an_output_is_never_cut_to_whole_numbers():
    """It has the queries' dtype."""
    program = df.derive(nn.Linear(4, 4), chunk=2, prove=False)
    q = torch.ones(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"q has dtype torch.int64; .* q.float\(\)"):
        program(q.long(), q, q)
    torch.testing.assert_close(program(q, q.long(), q.long())[0], program(q, q, q)[0])
    layer = df.TestTimeTraining(8, 2, learner="linear", objective="squared", rule="sgd", chunk=2, prove=False)
    with pytest.raises(ValueError, match=r"x has dtype torch.int64; .* x.float\(\)"):
        layer(torch.ones(1, 3, 8).long())


def test_labels_of_another_shape_are_named():
    pytest.importorskip("transformers")
    from dualform.models.causal_lm import next_token_loss

    with pytest.raises(ValueError, match=r"labels has shape \(2, 3\); .* = \(2, 6\)"):
        next_token_loss(torch.randn(2, 6, 9), torch.zeros(2, 3).long())

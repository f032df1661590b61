"""What torch computes beside kernels: once."""

import pytest
import torch
from test_laws import built_in, rules
from test_triton import kernels_of

import dualform as df
from dualform.graphs.edit import results_of
from dualform.testing import check_backend


def gamma(i, lr, momentum):
    """A rule with an op that has no Triton text, often enough to be handed on rather than computed again."""
    for _ in range(40):
        momentum = torch.lgamma(2 + 0.1 * momentum)
    return df.Step(A=((1.0, momentum), (0.0, momentum)), b=(lr, lr), u=(1.0, 0.0), a=0.0)


OWN = df.Rule(gamma, ("lr", "momentum"), {"momentum": 0.5}, (1.0, 0.0), (False, False))


def test_what_is_computed_before_a_kernel_is_not_computed_after_it(monkeypatch):
    """A rule's factors, which other kernels read, too; what is read after it is computed, or passed."""
    monkeypatch.setitem(rules, "own", OWN)
    waves = lambda dim: df.learners.Head(expansion="fourier")(dim)  # noqa: E731
    every = [*kernels_of(built_in[0], "own", 4, 4, slices=True).values(), *kernels_of(waves, dim=4, chunk=4).values()]
    both = [k for k in every if k.before and k.after]
    assert {bool(k.after.ops) for k in both} == {True, False}
    for k in both:
        first = {x.name for x in results_of(k.before.graph.graph)}
        given = {x for x in k.after.inputs if isinstance(x, str)}
        assert given <= first | {x.name for x in k.passed}
        assert not {x.name for x in k.passed} & first
        names = [{n.name for n in p.graph.graph.nodes if n.op == "call_function"} for p in (k.before, k.after)]
        assert not names[0] & names[1]
    handed = [k for k in every if k.by_torch]
    assert handed
    assert all(x in k.slices for k in handed for x in k.by_torch.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("slices", [False, True])
def test_what_torch_hands_on_is_right(slices):
    torch.manual_seed(0)
    program = df.derive(built_in[0](4).double(), rule=OWN, chunk=2)
    check_backend(program, ("triton", {"slices": slices}), time=5, batch=1, heads=1, carried=True)

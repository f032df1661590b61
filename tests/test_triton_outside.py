"""What torch computes beside kernels: once, and small matrices entry by entry."""

import pytest
import torch
from test_laws import built_in
from test_triton import kernels_of
from torch.fx.experimental.proxy_tensor import make_fx

from dualform.graphs.edit import inputs_of, results_of, stepped
from dualform.kernels.triton_outside import with_small_products_as_sums

aten = torch.ops.aten


def test_what_is_computed_before_a_kernel_is_not_computed_after_it():
    """A rule's transitions, which every gradient of them reads, too; what is read after it is computed, or passed."""
    every = [*kernels_of(built_in[0], "momentum", dim=4, chunk=4, slices=True).values()]
    both = [k for k in every if k.before and k.after]
    assert both
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


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1), (1, 4, 3), (5, 2, 2), (2, 5, 2)])
def test_small_matrices_are_multiplied_entry_by_entry(sizes, repeated):
    """Where what is repeated need not be copied; larger ones stay what they are."""
    m, k, n = sizes

    def f(x, y):
        if not repeated:
            return (x.flatten(0, 1) @ y.flatten(0, 1)).sin()
        wide = x[:, :, None].expand(4, 3, 2, m, k).clone(), y[:, None].expand(4, 3, 2, k, n).clone()
        a, b = wide[0].reshape(24, m, k), wide[1].reshape(24, k, n)
        return torch.bmm(a, b).reshape(4, 3, 2, m, n).sin()

    x, y = torch.randn(4, 3, m, k).double(), torch.randn(4, 2 if repeated else 3, k, n).double()
    gm = make_fx(f, tracing_mode="fake")(x, y)
    for node in gm.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    targets = {node.target for node in gm.graph.nodes}
    assert aten.bmm.default in targets
    assert (aten.clone.default in targets) is repeated
    got = with_small_products_as_sums(gm)
    small = max(sizes) <= 4
    assert (aten.bmm.default in {node.target for node in got.graph.nodes}) is not small
    assert (aten.clone.default in {node.target for node in got.graph.nodes}) is (repeated and not small)
    assert len(inputs_of(got.graph)) == 2
    assert (stepped(got)(x, y) - f(x, y)).abs().max() < 1e-13
    assert aten.bmm.default in {node.target for node in gm.graph.nodes}  # a copy was changed

"""The graph toolkit: what edits a graph, what cuts it, and that a broken pass of each sort is caught between passes."""

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import dualform as df
from dualform.graphs.cut import minimum_cut
from dualform.graphs.edit import (
    add,
    copied,
    emitter,
    extract,
    inline,
    inputs_of,
    line_of,
    needed,
    reached,
    replace,
    results_of,
    without_repeats,
)  # fmt: skip
from dualform.graphs.kept import stop_gradient
from dualform.graphs.simplify import tidy
from dualform.graphs.verify import BrokenGraph, verified, verify
from dualform.learning import batched
from dualform.learning.batched import ROWS
from dualform.learning.grid import Variant
from dualform.shapes import TraceError

aten = torch.ops.aten


def traced(f, *tensors: Tensor) -> fx.GraphModule:
    return make_fx(f, tracing_mode="fake")(*tensors)


def small() -> fx.GraphModule:
    return traced(lambda x, y: (torch.tanh(x @ y) * 2.0, x.sum()), torch.randn(3, 4), torch.randn(4, 3))


def node_of(gm: fx.GraphModule, target) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.target == target)


def test_a_node_is_added_with_its_value_and_its_line():
    gm = small()
    at = node_of(gm, aten.tanh.default)
    at.meta["stack_trace"] = 'File "mine.py", line 3'
    new = emitter(gm.graph, at)(aten.neg.default, at.args[0])
    assert new.meta["val"].shape == (3, 3)
    assert line_of(new) == 'File "mine.py", line 3'
    assert new.next is at


def test_what_is_reached_and_needed():
    gm = small()
    x, y = inputs_of(gm.graph)
    assert {n.target for n in reached(gm.graph, [y])} == {"y_1", *(n.target for n in gm.graph.nodes if n.target in (
        aten.mm.default, aten.tanh.default, aten.mul.Tensor))}  # fmt: skip
    first, second = results_of(gm.graph)
    assert needed([second]) == {x, second}
    assert y in needed([first, None, 3.0])


def test_a_part_is_taken_out_and_written_in():
    gm = small()
    mm, tanh = node_of(gm, aten.mm.default), node_of(gm, aten.tanh.default)
    part = extract([tanh], [mm], lambda _, made: [made[tanh]])
    assert [n.op for n in part.nodes] == ["placeholder", "call_function", "output"]
    (found,), made = inline(gm.graph, tanh, part, [mm])
    replace(tanh, found)
    assert made == [found]
    verify(fx.GraphModule(gm, gm.graph), small())


def test_equal_calls_are_one_and_numbers_of_two_kinds_are_two():
    gm = traced(lambda x: (x + 1, x + 1, x + 1.0, torch.rand_like(x), torch.rand_like(x)), torch.randn(2))
    without_repeats(gm.graph)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"].count(aten.add.Tensor) == 2
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"].count(aten.rand_like.default) == 2


def test_the_cheapest_cut():
    inf = float("inf")
    edges = [("s", "a", inf), ("a", "b", 3.0), ("b", "c", 1.0), ("c", "t", inf), ("a", "c", 2.0)]
    assert minimum_cut(edges, "s", "t") == {"s", "a", "b"}


def wrong_shape(gm: fx.GraphModule) -> fx.GraphModule:
    node = node_of(gm, aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].new_empty(3, 4)
    return gm


def wrong_dtype(gm: fx.GraphModule) -> fx.GraphModule:
    node = node_of(gm, aten.mul.Tensor)
    with gm.graph.inserting_before(node):
        cast = add(gm.graph, aten._to_copy.default, node.args[0], dtype=torch.float64)
    node.replace_input_with(node.args[0], cast)
    return gm


def used_before_it_is_made(gm: fx.GraphModule) -> fx.GraphModule:
    node_of(gm, aten.mm.default).prepend(node_of(gm, aten.tanh.default))
    return gm


def lost_factor(gm: fx.GraphModule) -> fx.GraphModule:
    node = node_of(gm, aten.mul.Tensor)
    replace(node, node.args[0])
    return gm


def lost_result(gm: fx.GraphModule) -> fx.GraphModule:
    output = next(iter(gm.graph.find_nodes(op="output")))
    output.args = (results_of(gm.graph)[:1],)
    return gm


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (wrong_shape, r"its value is said to be \(3, 4\) .*expected \(3, 3\)"),
        (wrong_dtype, r"said to be .* of torch.float32 .*expected .* of torch.float64"),
        (used_before_it_is_made, "mm is read before it is written"),
        (lost_factor, "result or gradient 0 is"),
        (lost_result, "results and gradients; expected"),
    ],
)
def test_a_broken_pass_of_each_sort_is_caught(monkeypatch, broken, says):
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    with pytest.raises(BrokenGraph, match=rf"{broken.__name__}: .*{says}"):
        verified(broken)(small())
    monkeypatch.setenv("DUALFORM_VERIFY", "0")
    verified(broken)(small())  # in use nobody pays for it


@pytest.mark.parametrize("cut", [aten.detach.default, "kept"])
def test_a_lost_detach_is_caught_though_every_value_is_right(monkeypatch, cut):
    stop = stop_gradient if cut == "kept" else torch.detach
    gm = traced(lambda x: (stop(x) * x.sin(),), torch.randn(4))

    def lost_detach(gm: fx.GraphModule) -> fx.GraphModule:
        for node in list(gm.graph.nodes):
            if node.target is aten.detach.default:
                replace(node, node.args[0])
            elif node.target is torch.ops.dualform.kept.default:
                replace(node, node.args[0][0])
        return gm

    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    with pytest.raises(BrokenGraph, match="lost_detach: result or gradient 1"):
        verified(lost_detach)(gm)


@pytest.mark.parametrize("name", df.learners.names())
def test_every_pass_of_a_derivation_leaves_its_graph_sound(monkeypatch, name):
    """Both directions of a whole and of a ragged block, every marked pass verified on the way."""
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    record = df.learners[name]
    asked = [n for n, default in record.options.items() if default is record.signature.empty]
    spec = record(**{n: "linear" if n in record.nested else 2 for n in asked})
    program = df.derive(spec(4).double(), chunk=3, prove=False)
    for variant in (Variant(3, fresh=True, dense=True, opens=False), Variant(2, fresh=False, dense=False, opens=True)):
        step = program.derivation.step(variant)
        verify(step.graph)
        verify(step.reverse)
    x = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    program(x, x, x)[0].sum().backward()


def test_a_pass_that_is_right_is_let_through(monkeypatch):
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    gm = traced(lambda x: ((x.neg().neg()) * 1.0 + x.t().t(),), torch.randn(3, 3))
    assert sum(n.op == "call_function" for n in tidy(copied(gm)).graph.nodes) == 1


@pytest.mark.parametrize("lost", [lambda n: n + 1, lambda n: n // 2, lambda n: ROWS * ROWS])
def test_a_number_that_is_no_multiple_of_rows_is_refused(monkeypatch, lost):
    """Numbers of rows are found again by what they are: what is none, and large, is not left to chance."""

    def wrong(rows, gm, *rest):
        made = own(rows, gm, *rest)
        node = node_of(made, aten.expand.default)
        node.args = (node.args[0], [lost(n) if n == ROWS else n for n in node.args[1]])
        return made

    gm = traced(lambda x, y: x + y.expand(3, 4).cumsum(0), torch.randn(3, 4), torch.randn(4))
    own = batched._over
    assert any(ROWS in n.meta["val"].shape for n in batched.mapped(gm, [False, False]).graph.nodes if n.op != "output")
    monkeypatch.setattr(batched, "_over", wrong)
    if lost(ROWS) > ROWS:
        with pytest.raises(TraceError, match=r"aten.expand.default in a learner's step is mapped over rows"):
            batched.mapped(gm, [False, False])
    else:
        monkeypatch.setenv("DUALFORM_VERIFY", "1")
        with pytest.raises(BrokenGraph, match=r"mapped: .*expand.*expected multiples of both"):
            batched.mapped(gm, [False, False])


def test_a_number_that_only_looks_like_one_of_rows_is_caught(monkeypatch):
    """A user's number that a multiple of ROWS happens to be would follow the rows:
    over another number of rows it stays."""
    gm = traced(lambda x: (x * 2.0).narrow(0, 0, 2), torch.randn(3, 4))
    monkeypatch.setattr(batched, "ROWS", 2)
    monkeypatch.setattr(batched, "_without_rows", lambda gm: gm)
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    with pytest.raises(BrokenGraph, match=r"mapped: .*expected multiples of both"):
        batched.mapped(gm, [False])

"""What a first call costs: no compiler is loaded, nothing is traced twice; shapes are torch's own."""

import math
import random
import subprocess
import sys
from functools import partial

import networkx
import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.graphs.constants import Constants
from dualform.graphs.cut import minimum_cut
from dualform.graphs.hollow import META, Hollow, Hollows, computed
from dualform.graphs.recorder import CannotRecord
from dualform.graphs.selected import alone
from dualform.graphs.trace import trace
from dualform.learning.batched import ROWS
from dualform.shapes import TraceError

aten = torch.ops.aten

_CALLS = """
import sys, torch, dualform as df
given = {{"LowRank": (2,), "residual_norm": (df.learners.MLP(2),)}}.get({name!r}, ())
learner = df.learners[{name!r}](*given)(16)
program = df.derive(learner, chunk=4, prove=False)
for T in (8, 11):
    x = torch.randn(2, T, 2, 16, requires_grad=True)
    o, state = program(x, x, x, backend="eager")
    o.sum().backward()
loaded = [name for name in ("torch._dynamo", "torch._inductor", "sympy", "networkx") if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("name", df.learners.names())
def test_a_first_call_loads_no_compiler(name: str) -> None:
    """torch._dynamo, sympy and networkx take 1.0, 0.3 and 0.1 s of a cold process; ragged blocks and gradients, too."""
    done = subprocess.run([sys.executable, "-c", _CALLS.format(name=name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def _laid_out(seed: int) -> list[Tensor]:
    """One to three tensors that broadcast, their axes in any order, with gaps, of one number along an axis,
    or of none."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = [r.choice([1, 2, 3, 5]) for _ in range(r.randrange(5))]
    found = []
    for _ in range(r.choice([1, 2, 2, 3])):
        order = r.sample(range(len(shape)), len(shape))
        x = torch.randn([shape[k] for k in order], generator=g).permute([order.index(k) for k in range(len(shape))])
        if shape and r.random() < 0.4:
            axis = r.randrange(len(shape))
            x = r.choice([x.narrow(axis, 0, 1).expand(shape), torch.cat([x, x], axis).narrow(axis, 0, shape[axis])])
        found.append(x.select(0, 0) if shape and r.random() < 0.2 else x)
    return found


def _lies(x: Tensor) -> tuple[tuple[int, ...], list[int], torch.dtype]:
    return tuple(x.shape), [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1], x.dtype


@pytest.mark.parametrize("op", [{1: aten.tanh.default, 2: aten.mul.Tensor, 3: aten.addcmul.default}])
def test_entry_by_entry_results_lie_as_torch_lays_them(op: dict) -> None:
    for seed in range(1500):
        given = _laid_out(seed)
        twins = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META) for x in given]
        assert _lies(computed(op[len(given)], twins, {})) == _lies(op[len(given)](*given)), seed


_X, _I = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64)
_OPS = {
    "promotion": (aten.add.Tensor, (_X.half(), _X.double())), "a number": (aten.div.Tensor, (_I, 2)),
    "whole numbers": (aten.remainder.Scalar, (_I, 2)), "comparison": (aten.le.Scalar, (_X, 0.0)),
    "where": (aten.where.self, (_X > 0, _X, _X[0])),
    "number of no axis": (aten.mul.Tensor, (_X.half(), torch.tensor(2.0))),
    "mean": (aten.mean.dim, (_X, [1], True)), "several": (aten.var_mean.correction, (_X, [0])),
    "cat": (aten.cat.default, ([_X, _X], 1)),
    "product": (aten.mm.default, (_X, _X.t())), "like": (aten.ones_like.default, (_X.t(),)),
    "sort": (aten.sort.default, (_X,)),
    "gather": (aten.gather.default, (_X, 0, _I)), "norm": (aten.native_layer_norm.default, (_X, [4], None, None, 1e-5)),
    "cumsum": (aten.cumsum.default, (_X.t(), 0)), "triangle": (aten.tril.default, (_X,)),
    "view": (aten.transpose.int, (_X, 0, 1)),
    "arange": (aten.arange.start, (1, 5)), "full": (aten.full.default, ([2, 3], 1)),
    "softmax": (aten._softmax.default, (_X, -1, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", _OPS)
def test_hollow_results_are_as_those_of_numbers(name: str) -> None:
    op, args = _OPS[name]
    right = op(*args)
    hollow = torch.utils._pytree.tree_map_only(Tensor, lambda x: Hollow(x.to(META)), args)
    for run in (op(*hollow) if any(isinstance(x, Hollow | list) for x in hollow) else computed(op, args, {}),):
        found, wanted = (torch.utils._pytree.tree_leaves(x) for x in (run, right))
        assert [_lies(x) for x in found] == [_lies(x) for x in wanted]


@pytest.mark.parametrize(
    ("op", "args"),
    [(aten.mean.dim, ([1], True)), (aten.cumsum.default, (1,)), (aten._softmax.default, (-1, False)), (aten.tril.default, ())],
)  # fmt: skip
def test_a_size_beyond_memory_goes_where_it_goes(op, args) -> None:
    small, large = torch.empty(7, 3, 5), torch.empty(ROWS, 3, 5, device=META)
    found, right = computed(op, (large, *args), {}), op(small, *args)
    assert tuple(found.shape) == (ROWS, *right.shape[1:])
    assert found.stride() == right.stride()


def test_an_op_of_values_has_no_shape() -> None:
    x = Hollow(torch.empty(4, device=META))
    with Hollows():
        for op in (aten.nonzero.default, aten._local_scalar_dense.default):
            with pytest.raises((NotImplementedError, RuntimeError)):
                op(x)


def _graph(f, *args) -> list[str]:
    return [
        str(node.target)
        for node in sys.modules["dualform.graphs.trace"]
        ._recorded(f, args, partial(Constants, {}, str), lambda gm: None, alone)
        .graph.nodes
    ]


def test_an_op_in_place_is_what_its_tensor_is_from_then_on() -> None:
    def f(x):
        h = x.clone()
        same = h.to(torch.float32)
        same.add_(1)
        return h * 2

    gm = trace(f, torch.ones(2))
    assert torch.equal(gm(torch.ones(2)), torch.full((2,), 4.0))
    assert _graph(f, torch.ones(2))[-2:] == ["aten.mul.Tensor", "output"]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x + float(x.sum()), lambda x: x[x > 0], lambda x: torch.func.grad(lambda y: y.sum())(x),
        lambda x: x.to("meta"),
        lambda x: torch.vmap(torch.sin)(x), lambda x: torch.fft.fft(x).real, lambda x: x.unsqueeze_(0),
        lambda x: torch.add(x, x, out=torch.empty(2)),
    ],
)  # fmt: skip
def test_what_would_be_a_guess_is_left_to_torch(f) -> None:
    with pytest.raises((CannotRecord, TraceError, RuntimeError, NotImplementedError)):
        _graph(f, torch.ones(2))


def test_a_minimum_cut_is_networkx_s() -> None:
    for seed in range(500):
        r = random.Random(seed)
        n = r.randrange(2, 12)
        network = {tuple(r.sample(range(n), 2)): r.choice([1.0, 2.0, 3.5, math.inf]) for _ in range(r.randrange(1, 40))}
        network = {(a, b): min(c, 9.0) if (a, b) == (0, n - 1) else c for (a, b), c in network.items()}
        graph = networkx.DiGraph()
        graph.add_nodes_from([0, n - 1])
        for (a, b), c in network.items():
            graph.add_edge(a, b, **({} if math.isinf(c) else {"capacity": c}))
        try:
            _, (side, _) = networkx.minimum_cut(graph, 0, n - 1)
        except networkx.NetworkXUnbounded:
            with pytest.raises(AssertionError, match="no cut is finite"):
                minimum_cut([(a, b, c) for (a, b), c in network.items()], 0, n - 1)
            continue
        assert minimum_cut([(a, b, c) for (a, b), c in network.items()], 0, n - 1) == side, seed


def test_parts_that_name_no_dtype_are_made_once_for_every_dtype() -> None:
    """The proof runs in float64 what the first call runs in float32; only what makes positions names a dtype."""
    program = df.derive(df.learners.MLP(2)(8), chunk=4, prove=False)
    x = torch.randn(2, 8, 2, 8)
    program(x, x, x, backend="eager")
    single, cpu = program.plan(8, torch.float32, "auto"), torch.device("cpu")
    double = program.plan_again(8, torch.float64, "auto", True)
    ((variant, name),) = single.ways
    ways = [plan.way(variant, name) for plan in (single, double)]
    made = {part: {id(way.part(part, cpu)) for way in ways} for part in ("once", "before", "loop", "after")}
    assert {part: len(found) for part, found in made.items()} == {"once": 2, "before": 1, "loop": 1, "after": 1}
    o, _ = program(x.double(), x.double(), x.double(), backend="eager")
    assert (o - program(x.double(), x.double(), x.double(), form="primal")[0]).abs().max() < 1e-12


def test_shapes_are_remembered_apart_for_numbers_alike() -> None:
    """1, 1.0 and True give other dtypes; what raises once raises again."""
    whole = torch.ones(3, dtype=torch.int64, device=META)
    for _ in range(2):
        made = [computed(aten.mul.Tensor, (whole, number), {}).dtype for number in (1, 1.0, True)]
        assert made == [torch.int64, torch.float32, torch.int64]
        assert computed(aten.pow.Tensor_Scalar, (whole, 2), {}).dtype == torch.int64
        with pytest.raises(RuntimeError, match="negative integer powers"):
            torch.ones(3, dtype=torch.int64).pow(-2)
        first, second = (computed(aten.tanh.default, (torch.ones(2, device=META),), {}) for _ in range(2))
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        sums = [computed(aten.sum.dim_IntList, (torch.ones(2, 3, device=META), [1]), {}) for _ in range(2)]
        assert sums[0].untyped_storage()._cdata != sums[1].untyped_storage()._cdata

"""What of learners runs wholly in generated Triton, and that the reason that is printed for the rest is true."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_laws import DOUBLE, Heads, built_in, rules
from test_triton import shifted, squared, value_of, written_for
from torch import nn

import dualform as df
from dualform import testing as laws
from dualform.kernels import triton_backend
from dualform.kernels.tiles import DEEP
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_schedule import Refused
from dualform.learning.grid import Variant
from dualform.ops import picking

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Learner(nn.Module):
    """A matrix, and what is done with it and the tokens."""

    def __init__(self, run, dim=4):
        super().__init__()
        self.W, self.run = nn.Parameter(0.5 * torch.randn(dim, dim, dtype=DOUBLE)), run

    def forward(self, x):
        return self.run(x @ self.W, x)


def program_of(run, rule="averaged", seed=0):
    torch.manual_seed(seed)
    return df.derive(run if isinstance(run, nn.Module) else Learner(run), squared, rules[rule], chunk=3)


def written(program, dim=4, slices=False):
    plan = program.plan(dim, DOUBLE, "auto")
    found = [
        triton_backend.written(plan, Variant(3, True, True, False), way, Precision(), slices)
        for way in ("forward", "backward")
    ]
    return [k for kernels in found for some in kernels.values() for k in some]


def outside(program, **options):
    return [p for k in written(program, **options) for p in (k.before, k.after) if p is not None and p.ops]


picks = {
    "topk": (lambda x, dim: picking.topk(x, 3, dim), lambda x, dim: torch.topk(x, 3, dim)),
    "least": (lambda x, dim: picking.topk(x, 2, dim, False), lambda x, dim: torch.topk(x, 2, dim, False)),
    "kthvalue": (lambda x, dim: picking.kthvalue(x, 2, dim), lambda x, dim: torch.kthvalue(x, 2, dim)),
    "median": (picking.median, torch.median),
    "median, kept": (lambda x, dim: picking.median(x, dim, True), lambda x, dim: torch.median(x, dim, True)),
    "cummax": (picking.cummax, torch.cummax), "cummin": (picking.cummin, torch.cummin),
}  # fmt: skip


@pytest.mark.parametrize("name", picks)
def test_what_picks_is_torchs(name):
    """Values and places, a NaN and infinities among them; no two are equal, whose order torch leaves open."""
    own, theirs = picks[name]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=DOUBLE, generator=g)
    x[0, 2, 1], x[1, 1, 3], x[2, 0, 0], x[3, 4, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    for dim in (0, 1, -1):
        for got, right in zip(own(x, dim), theirs(x, dim), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)


def test_a_number_is_picked_from_itself():
    for run in (
        lambda x: picking.topk(x, 1),
        lambda x: picking.kthvalue(x, 1),
        lambda x: picking.median(x, 0),
        lambda x: picking.cummax(x, 0),
    ):
        assert [y.item() for y in run(torch.tensor(2.0))] == [2.0, 0]


def test_running_extremes_of_equal_entries_are_where_torch_finds_them():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [2.0, 2.0, torch.nan, 5.0, torch.nan]])
    for own, theirs in ((picking.cummax, torch.cummax), (picking.cummin, torch.cummin)):
        for got, right in zip(own(x, 1), theirs(x, 1), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("right", [False, True])
def test_places_among_bounds_are_torchs(right):
    """Of bounds that all lines share, and of each line's own; equal ones, infinities and a NaN among what is looked for."""
    x = torch.tensor([[0.0, 1.0, 1.5, -torch.inf], [2.0, torch.nan, torch.inf, 0.5]])
    shared, own = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.5, 2.0]])
    for bounds in (shared, own):
        right_ = torch.searchsorted(bounds, x, right=right)
        assert torch.equal(picking.searchsorted(bounds, x, right=right), right_)
        assert torch.equal(picking.searchsorted(bounds, x, side="right" if right else None), right_)
    found = picking.bucketize(x, shared, True, right)
    assert found.dtype == torch.int32
    assert torch.equal(found, torch.bucketize(x, shared, out_int32=True, right=right))
    assert picking.searchsorted(shared, x, sorter=torch.arange(4)) is NotImplemented


learners = {
    "topk": lambda h, x: h.topk(3, -1).values.sum(-1, keepdim=True) * h.gather(-1, x.topk(4, -1).indices),
    "in the middle": lambda h, x: h - h.median(-1, True).values * h.kthvalue(2, -1, True).values,
    "so far": lambda h, x: h.cummax(-1).values * x - h.cummin(-1).values,
    "bounds": lambda h, x: h * torch.searchsorted(x.sort(-1).values, x) + torch.bucketize(x, torch.tensor([0.0, 1.0])),
    "maxout": lambda h, x: torch.stack([h, h * x], -1).amax(-1) + torch.stack([h, x.tanh()], 1).amin(1),
    "angles": lambda h, x: (0.1 * h).asin() + (0.1 * h).acos() * h.atan() - torch.atan2(h, x) + torch.fmod(h, 0.7),
    "attention": lambda h, x: (lambda y: (y @ y.mT).softmax(-1).matmul(y).flatten(-2))(h.unflatten(-1, (2, 2))),
}


@pytest.mark.parametrize("name", learners)
def test_they_are_eager_and_wholly_in_kernels(name):
    program = program_of(learners[name], seed=len(name))
    assert not outside(program)
    laws.check_backend(program, ("triton", {"slices": len(name) % 2 == 0}), time=4, batch=1, heads=1, seed=len(name))


def test_a_cast_of_a_number_is_the_number():
    """As torch spells what it rounds to few steps, in single precision."""
    torch.manual_seed(0)
    learner = Learner(lambda h, x: h + torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7)).float()
    program = df.derive(learner, squared, rules["sgd"], chunk=3)
    laws.check_backend(program, "triton", time=4, batch=1, heads=1, dtype=torch.float32)


def test_an_identity_of_one_row():
    """Of a rule that keeps one number beside each weight."""
    program = program_of(built_in[0](4).double(), "decay")
    assert not outside(program)
    laws.check_backend(program, "triton", time=4, batch=1, heads=1)


@pytest.mark.parametrize("slices", [False, True])
def test_tiles_of_three_axes_are_in_the_kernel(slices):
    """Rows in groups, each of them multiplied by a matrix; weights that differ from token to token."""
    program = df.derive(Heads(), shifted, rules["sgd"], chunk=3)
    assert not outside(program, dim=6, slices=slices)
    laws.check_backend(program, ("triton", {"slices": slices}), time=4, batch=1, heads=1)


def test_products_of_three_axes_are_added_up_place_by_place():
    """No tile of four axes is made; columns and rows of a tile, of a tensor, of what is put together."""
    for f in (
        lambda x, y: torch.bmm(x[:, :, None] * y[:, None, :], (x[:, None, :] * y[:, :, None]).mT).sum(2),
        lambda x, y: torch.bmm(x[:, :, None] * y[:, None, :], torch.stack([x, y, x * y, y, x], 1)).sum(2),
    ):
        got, right, _ = value_of(f)
        laws.agree("a product", got, right)
        assert "3 x 5 x 5 x 5" not in written_for(f, DOUBLE)[1].kernel().text


def test_what_torch_computes_is_named_with_its_size():
    """The op that no kernel has, not those that stand between it and the kernel."""
    parts = outside(
        program_of(
            lambda h, x: (
                h * x.sort(-1).indices.sort(-1).values
                + (x[:, :, None, None] * x[:, None, :, None] * x[:, None, None]).square().sum((1, 2, 3)).unsqueeze(-1)
            )
        )
    )
    said = {(str(n.target), why) for p in parts for n, why in p.apart.items()}
    assert said
    for op, why in said:
        sizes, entries = re.fullmatch(
            r"its ([\dx ]+) entries are a tile of ([\d,]+); expected at most 16,384", why
        ).groups()
        assert 16 ** sum(n != "1" for n in sizes.split(" x ")) == int(entries.replace(",", "")) > DEEP, op


def reason(program):
    with pytest.raises(Refused) as caught:
        written(program)
    return str(caught.value)


def test_a_refusal_says_what_keeps_an_op_out():
    """A type, a row that says nothing, a text that is missing where the next state waits: each by its own words."""
    half = reason(program_of(lambda h, x: h + x.half().cos()))
    assert "is not generated: it has results of torch.float16, and generated code has one type" in half
    silent = reason(program_of(lambda h, x: h * torch.igamma(x.abs() + 1, x.abs())))
    assert re.search(r"aten\.igamma.* is not generated: its row in ops/ does not say how it is generated", silent)
    waits = reason(program_of(lambda h, x: torch.lgamma(2 + h.abs())))
    assert re.search(r"aten\.(lgamma|digamma).* is part of what the next state waits for.*has no Triton text", waits)


def test_nine_directions_of_ten_run_wholly_in_triton():
    """By the recorded table, of every group of learners that the script counts; each fallback has its op and why."""
    sys.path.insert(0, str(RESULTS.parent))
    from triton_coverage import GROUPS

    rows = [x for x in json.loads((RESULTS / "triton_coverage.json").read_text())["rows"] if "way" in x]
    assert {x["group"] for x in rows} == set(GROUPS)
    assert {x["ran"] for x in rows} <= {"whole", "torch beside", "refused"}
    whole = [x for x in rows if x["ran"] == "whole"]
    assert len(whole) >= 0.9 * len(rows) > 450
    assert all(op and why for x in rows if x not in whole for op, why, _ in x["apart"])
    assert all(x["apart"] for x in rows if x not in whole)

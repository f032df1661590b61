"""Generated Triton equals eager: outputs, state, all outer gradients, interpreted; and it compiles for absent cards."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_laws import DOUBLE, built_in, of, own, rules, wobble
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import dualform as df
from dualform import testing as laws
from dualform.kernels import tape, triton_backend, triton_launch, triton_order, triton_schedule, triton_slices
from dualform.kernels.lowering import lowered
from dualform.kernels.targets import Target
from dualform.kernels.tiles import Tile, Untileable, permuted
from dualform.kernels.triton_launch import Launch
from dualform.kernels.triton_lines import Precision
from dualform.kernels.triton_schedule import TileDirection
from dualform.kernels.triton_text import Writer
from dualform.learning.backends import BackendError
from dualform.learning.grid import Variant
from dualform.learning.plan import Input
from dualform.ops.table import ENTRIES, find_row, kind_of
from dualform.testing import LawBroken, check_backend

# The interpreter is numpy, which warns of 1 / 0 in entries beyond a tile's edge.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
]  # fmt: skip
squared, shifted, dot = df.objectives.Squared(), df.objectives.Squared("v-k"), df.objectives.DotProduct()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
hard = {"carried": True, "ragged": True, "resets": True}


maps = [
    lambda x, y: -x, torch.exp, torch.log, torch.tanh, torch.sigmoid, torch.erf, torch.sqrt, torch.abs, torch.rsqrt,
    torch.reciprocal,
    torch.sin, torch.cos, torch.tan, torch.sign, torch.relu, torch.log1p, torch.expm1, torch.sinh, torch.cosh,
    torch.floor, torch.ceil,
    torch.trunc, torch.erfc, torch.asinh, lambda x, y: (1 + x).acosh(), lambda x, y: (0.3 * x).atanh(), torch.exp2,
    torch.log2, torch.log10,
    torch.hypot, torch.fmax, torch.fmin, torch.maximum, torch.minimum, lambda x, y: torch.remainder(5 * x - 3, y),
    lambda x, y: torch.div(3 - 5 * x, y, rounding_mode="floor"), lambda x, y: (5 * x - 3).round() * x, lambda x,
    y: (2 * x).round(),
    lambda x, y: x + y, lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x - y, lambda x,
    y: torch.sub(x, y, alpha=3), lambda x, y: 2 - x,
    lambda x, y: x * y, lambda x, y: x / y, lambda x, y: x**y, lambda x, y: x**3, lambda x, y: x**-1, lambda x,
    y: 1.5**x,
    lambda x, y: (x - 0.7) ** 3, lambda x, y: (x - 0.7) ** 5.0, lambda x, y: (x - 0.7).pow(-3), lambda x,
    y: x.clamp(0.6, 0.9),
    lambda x, y: torch.where((x > y) & (x != 0.5), x, y), lambda x, y: ((x <= y) | (y < 0.4)) * x, lambda x,
    y: (x >= y).logical_not() * y,
    lambda x, y: (x == y) * x, lambda x, y: torch.where(x > 0.7, torch.nan, x).isnan() * y, lambda x,
    y: (x / (y - y) > 0) * y,
    lambda x, y: torch.where(x > 0.7, -torch.inf, x).isinf() * y, lambda x, y: ((x > 0.7) ^ (y > 0.7)) * y, lambda x,
    y: (5 * x).bool() * y,
    lambda x, y: (9 * x - 5).long() * y, lambda x, y: (~(9 * x).long() & 5 | 8 ^ (9 * y).long()) * x, lambda x,
    y: torch.where(x > 0.7, 0.1, 0.2) + x,
    lambda x, y: (((9 * x).long() << 2) ^ (9 * y).long() >> 1) * x, lambda x, y: ((9 * x).long() << 40 >> 38) * y,
    lambda x, y: torch.addcmul(x, x, y, value=0.5), lambda x, y: x.clone(),
    torch.atan, lambda x, y: (99 * x - 50).atan(), lambda x, y: (0.8 * x).asin(), lambda x, y: (0.8 * x - 0.8).acos(),
    lambda x, y: torch.atan2(x - 0.7, 0.7 - y), lambda x, y: torch.fmod(5 * x - 3, y), lambda x, y: (1.6 * x).asin().isnan() * x,
    lambda x, y: torch.atan2((x > 0.7) / x - 0.0, torch.where(y > 0.7, -torch.inf, -0.0 * y)),
    lambda x, y: torch.where(x > 0.7, 1.0, -1.0 + 0 * x).asin() + torch.where(y > 0.7, -1.0, 1 + 0 * x).acos(),
]  # fmt: skip
others = [
    lambda x, y: x.tril(1), lambda x, y: x.triu(-1), lambda x, y: torch.eye(*x.shape, dtype=x.dtype) + x, lambda x,
    y: torch.arange(x.shape[1]) * x,
    lambda x, y: torch.full_like(x, 7.0), lambda x, y: x - x.amax(1, keepdim=True), lambda x, y: x / x.sum(0), lambda x,
    y: x * x.mean() + x.amin(),
    lambda x, y: torch.where(x > 1.1, torch.nan, x).amax(1, keepdim=True).isnan() * x, lambda x,
    y: x * x.prod(-1, keepdim=True),
    lambda x, y: torch.cat([x[:, 2:], y[:, :2]], 1), lambda x, y: torch.cat([x[1:], y[:1]]), lambda x, y: x @ y.T @ x,
    lambda x, y: x.T[1:4] @ y,
    lambda x, y: (x.T @ (x @ y[0])) @ y.T @ x.new_ones(*x.shape), lambda x,
    y: torch.nn.functional.pad(x[1:], (0, 0, 1, 0)),
    lambda x, y: torch.stack([x, y, x * y]).sum(0), lambda x, y: torch.stack([x, y], 2).reshape(3, 10)[:, 1::2],
    lambda x, y: x.flatten()[3:8] + y,
    lambda x, y: (x[:, :, None] * y[:, None, :]).reshape(3, 25)[:, 7:12], lambda x, y: x.flip(1) + y.diagonal(1)[:1],
    lambda x, y: x.cumsum(1), lambda x, y: x.unbind(1)[2][:, None] * y, lambda x, y: x[:, 1:3].sum(1, keepdim=True) + y,
    lambda x, y: torch.bmm(x[:, :, None], y[:, None, :]).sum(2) + x, lambda x, y: x.expand(4, 3, 5).sum(0), lambda x,
    y: x.T.reshape(5, 3).T,
    lambda x, y: (y.T.reshape(15) * torch.arange(15)).reshape(3, 5), lambda x, y: x.softmax(-1), lambda x,
    y: x.argmin() * y, lambda x, y: x.sort(1)[0] * y,
]  # fmt: skip


def written_for(f, dtype):
    """Write a function of two matrices, and what it is of two drawn ones."""
    g = torch.Generator().manual_seed(0)
    x, y = (0.2 + torch.rand(3, 5, generator=g, dtype=dtype) for _ in range(2))
    gm = lowered(make_fx(lambda x, y: [torch.broadcast_to(f(x, y), (3, 5)).clone()], tracing_mode="fake")(x, y))
    sources, targets = [Input("q", n, "block") for n in "xy"], [Target("given", ("o", None, "n, b, h"))]
    return gm, TileDirection("forward", gm, sources, targets, dtype, Precision()), x, y


def value_of(f, dtype=DOUBLE):
    gm, direction, x, y = written_for(f, dtype)
    kernel = direction.kernel()
    assert (kernel.before, kernel.after) == (None, None)
    o = torch.full((1, 1, 1, 3, 5), torch.nan, dtype=dtype)
    given = {"x": x, "y": y}
    tensors = [o if a.role == "o" else given[a.what.name][None, None, None] for a in kernel.arguments]
    triton_launch.run(kernel, tensors, 1, 1, 1, (1, 1, 1, 0), Launch())
    rows = {find_row(n.target).spelt(n)[0] for n in gm.graph.nodes if kind_of(n.target) == "map"}
    return o[0, 0, 0], torch.broadcast_to(f(x, y), (3, 5)).to(dtype), rows


def of_two(f):
    """Take functions of one argument as functions of two."""
    return (
        f
        if getattr(f, "__name__", "") == "<lambda>"
        or f in (torch.hypot, torch.fmax, torch.fmin, torch.maximum, torch.minimum)
        else lambda x, y: f(x)
    )


@pytest.fixture(scope="module")
def every_map():
    return [value_of(of_two(f)) for f in maps]


def test_every_map(every_map):
    found = set()
    for k, (got, expected, rows) in enumerate(every_map):
        laws.agree(f"map {k}", got, expected)
        found |= rows
    assert {name for name, entry in ENTRIES.items() if entry.triton} - found == set()


def test_other_ops(monkeypatch):
    """Reductions, products, triangles, what is put together and what moves entries;
    short axes do not leave the kernel here."""
    monkeypatch.setattr("dualform.kernels.triton_schedule.is_deep", lambda n: False)
    for k, f in enumerate(others):
        got, expected, _ = value_of(f)
        laws.agree(f"op {k}", got, expected)


@pytest.mark.parametrize("row", ["tanh", "sub"])
def test_a_wrong_row_is_found(row, monkeypatch):
    monkeypatch.setitem(ENTRIES, row, replace(ENTRIES[row], triton=f"1.001 * ({ENTRIES[row].triton})"))
    got, expected, _ = value_of(lambda x, y: x.tanh() - y)
    with pytest.raises(LawBroken):
        laws.agree("a map", got, expected)


pairs = [
    (built_in[6], shifted, "averaged", 3, hard), (built_in[6], squared, "titans", 4, {}),
    (built_in[1], shifted, "sgd", 3, hard),
    (built_in[2], squared, "decay", 3, {}), (built_in[3], wobble, "momentum", 3, hard),
    (built_in[4], shifted, "user", 3, hard), (built_in[0], wobble, "averaged", 1, {}),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(pairs)))
def test_learners_objectives_and_rules(n):
    """Every other one in slices."""
    recipe, objective, rule, chunk, drawn = pairs[n]
    check_backend(
        of(recipe, objective, rule, chunk),
        ("triton", {"slices": n % 2 == 1}),
        time=2 * chunk + 2,
        heads=1,
        seed=n,
        **drawn,
    )


@pytest.mark.parametrize("kind", own[1:3], ids=lambda k: k.__name__)
def test_learners_that_no_file_knows(kind):
    n = own.index(kind)
    check_backend(
        df.derive(kind(), squared, rules[list(rules)[n % 2]], chunk=3), "triton", time=4, heads=1, seed=n, **hard
    )


heads = [
    {"expansion": "taylor"}, {"reconciliation": "hypernet", "remainder": "identity"},
    {"channels": 2, "fusion": "lowrank_parameterized_concatenation"},
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(heads)))
def test_heads(n):
    """What no tile holds torch computes, before and after."""
    torch.manual_seed(0)
    program = df.derive(df.learners.Head(**heads[n])(4).double(), rule=df.rules.SGD(lr=0.05), chunk=2)
    check_backend(program, ("triton", {"slices": n == 2}), time=4, heads=1)


@pytest.mark.parametrize(("rule", "slices"), [("averaged", True), ("momentum", False)])
def test_groups_of_states_computed_again(rule, slices, monkeypatch):
    """Groups beside each other, some at once; the last is shorter."""
    monkeypatch.setattr(triton_backend, "STATE_BYTES", 3000)
    problem = laws.draw(of(built_in[6 * slices], shifted, rule, 2), time=10, heads=1, seed=3)
    expected = laws.outcome(problem, lambda: problem.run("auto", backend="eager"))
    for remat in (1, 2):
        run = lambda r=remat: problem.run("auto", backend=("triton", {"slices": slices}), remat=r)  # noqa: E731
        laws.same_outcome(laws.outcome(problem, run), expected, f"remat {remat}")


@pytest.mark.parametrize("slices", [False, True])
def test_states_computed_again_are_as_short_as_factors(slices, monkeypatch):
    """Where reverse reads them as nothing else: then bits are the same; biases are not such, nor are weights in a norm."""
    monkeypatch.setattr(triton_backend, "Precision", lambda factors, float32: Precision(torch.float32, float32))
    problem = laws.draw(of(built_in[6], shifted, "momentum", 2), time=10, heads=1, seed=3)
    kinds, rows = set(), triton_backend._Rows
    plain = rows._kept_as
    monkeypatch.setattr(rows, "_kept_as", staticmethod(lambda *a: kinds.add((a[1], x := plain(*a))) or x))
    run = lambda: problem.run("auto", backend=("triton", {"slices": slices, "stages": 21}), remat=2)  # noqa: E731
    found = laws.outcome(problem, run)
    assert {kind for _, kind in kinds} == {torch.float32, torch.float64}
    monkeypatch.setattr(rows, "_kept_as", staticmethod(lambda made, key, x: x.dtype))
    assert all(torch.equal(x, found[n]) for n, x in laws.outcome(problem, run).items())


def test_sizes_that_fill_tiles_and_do_not():
    for dim, chunk, time in ((16, 16, 32), (24, 20, 45)):
        check_backend(of(built_in[6], shifted, "averaged", chunk, dim), "triton", time=time, batch=1, heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fewer_digits_in_and_out(dtype):
    torch.manual_seed(0)
    program = df.derive(built_in[6](16), shifted, rules["averaged"], chunk=4)
    x = [torch.randn(1, 9, 2, 16).to(dtype).requires_grad_() for _ in range(3)]
    found = []
    for backend in ("eager", "triton"):
        o, _ = program(*x, backend=backend)
        found.append([o, *torch.autograd.grad(o.float().square().sum(), x)])
    assert all(a.dtype == b.dtype == dtype for a, b in zip(*found, strict=True))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # the interpreter cuts bits off
    for a, b in zip(*found, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * a.double().norm()


def as_on_a_card(monkeypatch):
    """Write as for a card: sums at once, and loads ahead."""
    monkeypatch.setattr(
        triton_backend, "Precision", lambda factors, float32: Precision(factors, float32, at_once=True, ahead=True)
    )


def test_sums_at_once_and_loads_ahead_are_right(monkeypatch):
    as_on_a_card(monkeypatch)
    program = of(built_in[6], shifted, "averaged", 2)
    for n, slices in enumerate((False, True)):
        check_backend(program, ("triton", {"slices": slices, "stages": 4 + n}), time=5, batch=1, heads=1, carried=True)


def test_factors_made_short_before_they_move_are_the_same(monkeypatch):
    """But for the order of sums in float32; and it is another text."""
    found = []
    for n, narrow in enumerate((False, True)):
        short = Precision(torch.float32, narrow=narrow)
        monkeypatch.setattr(triton_backend, "Precision", lambda factors, float32, short=short: short)
        for slices in (False, True):
            torch.manual_seed(0)
            problem = laws.draw(of(built_in[5], shifted, "averaged", 2), time=7, batch=1, heads=1, seed=3)
            backend = ("triton", {"slices": slices, "stages": 6 + n})
            found.append(laws.outcome(problem, lambda p=problem, b=backend: p.run("auto", backend=b)))
    for a, b in zip(found[:2], found[2:], strict=True):
        assert all((a[n] - b[n]).double().norm() <= 1e-6 * b[n].double().norm() for n in a)
    texts = [
        kernels_of(built_in[5], precision=Precision(torch.bfloat16, narrow=x))["reverse"].text for x in (False, True)
    ]
    assert "_factor = tl.where(n < last" not in texts[0]
    # Two weights of the state that a mini-batch began with, k and q: no other factor is read.
    assert texts[1].count("_factor = tl.where(n < last") >= 2


def test_cards_with_little_shared_memory_are_known():
    assert [triton_launch.is_narrow(x) for x in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))] == [0, 1, 1, 0, 0]
    assert triton_launch.is_narrow((12, 0))  # of which nothing is known


def test_what_waits_for_nothing_is_summed_at_once():
    _, direction, _, _ = written_for(
        lambda x, y: x * (x + y).sum(1, keepdim=True) + (y * y).sum(1, keepdim=True), DOUBLE
    )
    direction.precision = Precision(at_once=True)
    text = direction.kernel().text
    assert re.search(r"= tl\.reduce\(\(\w+, \w+\), 1, sums2_\)", text)
    assert "tl.sum(" not in text


def test_tensors_that_lie_alike_share_strides():
    kernel = kernels_of(built_in[6], slices=True)["reverse_loop"]
    same = [(a.role, a.rank) for a in kernel.arguments]
    text = triton_launch.sharing(kernel, tuple(same.index(x) for x in same))
    given = re.search(r"def reverse_loop\((.*)\):", text)[1].split(", ")
    own = re.search(r"def reverse_loop\((.*)\):", kernel.text)[1].split(", ")
    assert len(given) == len(set(given)) < 0.6 * len(own)
    assert {x for x in given if x.endswith("_p")} == {x for x in own if x.endswith("_p")}


def test_calls_of_one_shape_run_from_a_tape():
    """From the third on, whatever numbers are in the tensors; a tensor given twice is another kind of call."""
    program = of(built_in[6], shifted, "averaged", 2)
    tapes = (
        program.plan(4, DOUBLE, "auto").natives.of(triton_backend.Compiled).tapes
    )  # other tests' of this structure, too
    before = set(tapes)
    for seed in range(4):
        torch.manual_seed(seed)
        x = [torch.randn(1, 5, 1, 4, dtype=DOUBLE).requires_grad_() for _ in range(3)]
        sides = []
        for backend in ("triton", "eager"):
            o, state = program(*x, backend=backend)
            total = o.square().sum() + sum(t.sum() for t in state.tensors().values() if t.is_floating_point())
            sides.append(
                [o, *torch.autograd.grad(total, [*x, *program.learner.parameters()]), *state.tensors().values()]
            )
        for a, b in zip(*sides, strict=True):
            assert (a - b).double().norm() <= 1e-10 * b.double().norm()
    assert [type(x).__name__ for kind, x in tapes.items() if kind not in before] == ["Tape", "Tape"]
    same = program(x[0], x[0], x[2], backend="triton")[0]
    assert (same - program(x[0], x[0], x[2], backend="eager")[0]).abs().max() < 1e-10


@pytest.mark.parametrize(("rule", "slices"), [("averaged", False), ("momentum", True)])
def test_calls_that_go_on_with_a_state_run_from_a_tape(rule, slices):
    """One for each place in a mini-batch at which all rows stand, with gradients to and from states; rows that stand
    apart have none. The position after a call is that of this call."""
    program = of(built_in[0], shifted, rule, 2)
    tapes = program.plan(4, DOUBLE, "auto").natives.of(triton_backend.Compiled).tapes
    tapes.clear()
    for seed in range(3):
        for where in ([0, 0], [1, 1], [0, 1]) if seed < 2 else ([0, 0], [1, 1]):
            torch.manual_seed(seed)
            x = [torch.randn(2, 3, 1, 4, dtype=DOUBLE).requires_grad_() for _ in range(3)]
            gates = {
                g: (0.1 + 0.5 * torch.rand(2, 3, 1, dtype=DOUBLE)).requires_grad_()
                for g in program.rule.gates if g != "offset"
            }  # fmt: skip
            start = program.initial_state(2, 1)._map(
                lambda t: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t
            )
            start = replace(start._map(torch.clone).detach(), position=torch.tensor(where))
            held = [t.requires_grad_() for t in start.tensors().values() if t.is_floating_point()]
            sides = []
            for backend in (("triton", {"slices": slices}), "eager"):
                o, state = program(*x, gates, state=start, backend=backend)
                after = [*state.tensors().values()]
                total = o.square().sum() + sum(t.sin().sum() for t in after if t.is_floating_point())
                leaves = [*x, *gates.values(), *held, *program.learner.parameters()]
                grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
                sides.append([o, *grads, *after])
            for a, b in zip(*sides, strict=True):
                assert (a - b).double().norm() <= 1e-10 * b.double().norm()
    assert [type(x).__name__ for x in tapes.values()] == ["Tape"] * 4


@pytest.mark.parametrize("rule", rules)
@pytest.mark.parametrize("n", [2, 6])
def test_single_tokens_run_wherever_rows_stand(n, rule, monkeypatch):
    """One kernel a token, nothing read off the tensors; the state where it was, if it may be lost."""
    launches, plain, H = [], triton_launch.run, n // 3 or 1  # two heads of the one that is small
    program = of(built_in[n], shifted, rule, 3)
    torch.manual_seed(n)
    start = program.initial_state(3, H)
    start = replace(start.detach()._map(torch.clone), position=torch.tensor([0, 1, 2]))
    states = {"triton": start, "over": start.fork(1), "eager": start}
    kept = states["over"].tensors()
    monkeypatch.setattr(triton_launch, "run", lambda *a, **k: launches.append(a[0].name) or plain(*a, **k))
    with torch.no_grad():
        for _ in range(4):  # the last row ends its mini-batch at the first and at the last
            x = [torch.randn(3, 1, H, 4, dtype=DOUBLE) for _ in range(3)]
            gates = {g: 0.1 + 0.5 * torch.rand(3, 1, H, dtype=DOUBLE) for g in program.rule.gates if g != "offset"}
            sides, before = {}, len(launches)
            for side, state in states.items():
                over = {"backend": side.replace("over", "triton"), "overwrite": side == "over"}
                o, states[side] = program(*x, gates, state=state, **over)
                sides[side] = [o, *states[side].tensors().values()]
            for a, b, right in zip(sides["triton"], sides["over"], sides["eager"], strict=True):
                assert (a - right).double().norm() <= 1e-10 * right.double().norm()
                assert torch.equal(a, b)
            assert len(launches) - before in (0, 2)  # none is asked for where a tape has it
    assert all(x is kept[name] for name, x in states["over"].tensors().items())


def test_what_launches_alone_need_is_one_allocation():
    """No two of its parts lie on each other while both are needed."""
    steps = [tape.TapeStep([], [k], None, size) for k, size in enumerate((700, 256, 1, 600))]
    use = [
        tape.TapeStep([tape.SlotView(k, (1,), (1,), 0, True, 8) for k in ks], launches=True) for ks in ((0, 1), (2, 3))
    ]
    recorder = tape._Recorder([])
    recorder.steps, recorder.bases = [steps[0], steps[1], use[0], steps[2], steps[3], use[1]], [None] * 4
    for one in use:
        one.write = lambda w: "None"
    found = tape._Writer(recorder, [], 0).place
    assert found == {0: 0, 1: 768, 3: 0, 2: 768}


def test_wrong_code_is_refused_at_every_call(monkeypatch, tmp_path):
    """With what a call of this size runs: slices, or the whole."""
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    program = df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=True)
    plan = program.plan(4, torch.float32, "auto")
    plan.natives.checked.clear()
    x = torch.randn(1, 5, 1, 4)
    program(x, x, x, backend="triton")
    assert [json.loads(key[0].partition(" ")[2]) for key in plan.natives.checked] == [{"slices": False}]
    plan.natives.made.clear()
    plan.natives.checked.clear()
    for path in (tmp_path / "proofs").iterdir():
        path.unlink()
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(ENTRIES["rsqrt"], triton="1.01 * tl.rsqrt({0})"))
    for _ in range(2):
        with pytest.raises(BackendError, match="triton: its code and eager differ in"):
            program(x, x, x, backend="triton")


def test_the_law_bites(monkeypatch):
    monkeypatch.setitem(ENTRIES, "neg", replace(ENTRIES["neg"], triton="-1.001 * {0}"))
    with pytest.raises(LawBroken, match="triton"):
        check_backend(of(built_in[6], shifted, "averaged", 3), "triton", time=6)


def kernels_of(recipe, rule="averaged", dim=16, chunk=16, precision=None, slices=False):
    plan = df.derive(recipe(dim), shifted, rules[rule], chunk=chunk).plan(dim, torch.float32, "auto")
    variant = Variant(chunk, True, True, False)
    ways = (
        triton_backend.written(plan, variant, way, precision or Precision(), slices) for way in ("forward", "backward")
    )
    return {
        kernel.name if slices else name: kernel for way in ways for name, kernels in way.items() for kernel in kernels
    }


def carried_in(text):
    """Name what is carried on, and the tiles that are made of it entry by entry."""
    held = set(re.findall(r"^    (\w+) = tl\.load\(\w+_(?:before|cotangent)_row", text, re.M))
    assert held
    for name, said in re.findall(r"^ +(\w+) = (.*)  # \d+ x \d+$", text, re.M):
        moves = re.search(r"tl\.(dot|sum|reduce|gather|reshape|load)\b|am\w\w_\(", said)
        if not moves and held & set(re.findall(r"\b\w+\b(?!\[)", said)):
            held.add(name)
    return held


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0", "3.9.0"])
def test_nothing_that_is_carried_is_transposed_in_a_product(version):
    """Of the catalogue, both ways, whole and in slices; the text of a version that is wrong there holds none."""
    assert triton_launch.turns(version) == (version == "3.9.0")
    precision, products = Precision(torch.bfloat16, at_once=True, ahead=True, turns=triton_launch.turns(version)), 0
    some = range(len(built_in)) if version == "3.6.0" else (3, 6)
    for n in some:
        for kernel in kernels_of(
            built_in[n], list(rules)[n % len(rules)], precision=precision, slices=n % 2 == 0
        ).values():
            if kernel.carries:
                lines = [line for line in kernel.text.splitlines() if "tl.dot(" in line]
                products += len(lines)
                assert not [
                    line for line in lines for x in carried_in(kernel.text) if re.search(rf"permute\({x}\b", line)
                ]
    assert products


def test_versions_that_are_wrong_have_no_product_of_two_that_are_carried_on():
    """One of them transposed: it is no tile there, and written elsewhere; one alone is never transposed."""
    a = Tile("th_A", (16, 16), (0, 1), frozenset({0, 1}), held=True)
    turned = permuted(a, [1, 0])

    def written_by(version, x, y):
        writer = Writer(torch.float32, Precision(turns=triton_launch.turns(version)))
        writer.product("found", x, y, (16, 16))
        return writer.loop[-1]

    for version in ("3.3.1", "3.8.0"):
        assert "tl.permute(th_A" in written_by(version, a, turned)
    for version in ("3.4.0", "3.7.1"):
        with pytest.raises(Untileable, match="both factors are carried on, one of them transposed"):
            written_by(version, a, turned)
    for version in ("3.6.0", "3.9.0"):
        other = Tile("x", (16, 16), (0, 1), frozenset({0, 1}))
        assert "tl.dot(th_A, tl.permute(x, [1, 0])" in written_by(version, other, turned)


def test_a_schedule_is_readable_source():
    program = df.derive(built_in[6](16), shifted, rules["averaged"], chunk=16)
    text = str(program.schedule("triton")["forward"])
    for line in ("def forward(", "for n in tl.range(first, last", "  # 16 x 16"):
        assert line in text
    parts = program.schedule(("triton", {"slices": True}))
    assert {"forward_loop", "forward_after", "advance", "reverse_before", "reverse_loop", "reverse_after"} <= set(parts)


def test_nothing_takes_more_than_recorded(tmp_path):
    """Registers, spills and shared memory of a learner in both directions, for cards of three generations and one of
    another maker, in a process that does not interpret."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, str(BENCHMARKS / "triton_compiled.py"), "--check", "K != V"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": 168}, "K != V, sm_90, forward forward: registers 168 -> 172"),
        ({"kernel": "forward_loop"}, "the kernels are"),
    ],
    ids=["registers", "kernel"],
)
def test_what_takes_more_is_said(change, says, monkeypatch):
    """With how it is recorded again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import triton_compiled

    record = json.loads((BENCHMARKS / "results" / "triton_compiled.json").read_text())["rows"]
    own = [x for x in record if (x["learner"], x["d"]) == ("K != V", 64)]
    monkeypatch.setattr(triton_compiled, "rows_of", lambda *words: [x for x in own if x["card"] == words[2]])
    assert not list(triton_compiled.worse("K != V", record))
    changed = [x | change if x in own and (x["card"], x.get("kernel")) == (90, "forward") else x for x in record]
    assert [line for line in triton_compiled.worse("K != V", changed) if says in line]


def test_an_older_triton_compiles_them():
    """As `make triton` recorded it, of the versions that are wrong where what is carried on is transposed."""
    record = json.loads((BENCHMARKS / "results" / "triton_compiled.json").read_text())
    (older,) = [x for x in record["others"] if x["triton"] == "3.6.0"]
    assert not triton_launch.turns(older["triton"])
    assert {x["card"] for x in older["rows"]} >= {80, 90, 100, "gfx942"}
    assert all(x.get("fits") for x in older["rows"])


def test_at_64_every_learner_fits_every_card_in_both_directions():
    """By the table: of the cards that the chooser knows, those of 99 KiB included; what ran out of time is unknown."""
    path = BENCHMARKS / "results" / "triton_compiled.json"
    rows = [x for x in json.loads(path.read_text())["rows"] if x["d"] == 64 and x["card"] != "gfx942"]
    cards = {10 * major + minor for major, minor in triton_launch.SHARED}
    learners = {x["learner"] for x in rows}
    assert len(learners) >= 8
    assert {(x["learner"], x["way"], x["card"]) for x in rows} == {
        (name, way, card) for name in learners for way in ("forward", "backward") for card in cards
    }
    late = [x for x in rows if "failed" in x]
    assert all(x["failed"].startswith("time is up") for x in late), late
    assert len(late) <= 1  # one direction of one learner on one card took longer than the run gave it
    for x in rows:
        if x not in late:
            assert x["fits"], x
            assert x["shared"] <= triton_launch.SHARED[divmod(x["card"], 10)], x


class LogGamma(nn.Module):
    """What the next state waits for has no text: the logarithm of the Gamma function."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return torch.lgamma(2 + x @ self.W)


def test_an_op_without_a_text_is_refused_by_name_and_line():
    program = df.derive(LogGamma(), squared, rules["sgd"], chunk=2)
    x = torch.rand(1, 4, 1, 4)
    with pytest.raises(
        BackendError,
        match=r"triton: the op aten\.lgamma\.default at return torch\.lgamma\(.*'lgamma' has no Triton "
        r"text.*backend='eager'",
    ):
        program(x, x, x, backend="triton")


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    x = torch.rand(1, 4, 1, 4)
    with pytest.raises(BackendError, match="triton: q is on cpu; expected a CUDA device"):
        df.derive(built_in[0](4), squared, rules["sgd"], chunk=2)(x, x, x, backend="triton")


# -- large states ------------------------------------------------------------------------------------------------------


def of_blocks(monkeypatch, again):
    """Write small kernels as those of large states are: in blocks, in order, made again where it is `again`."""
    as_on_a_card(monkeypatch)
    monkeypatch.setattr(triton_schedule, "BLOCK", 4 if again else 1 << 20)
    monkeypatch.setattr(triton_schedule, "LARGE", 8)
    monkeypatch.setattr(triton_slices, "ENTRIES", 8)
    monkeypatch.setattr(triton_order, "ROOM", 64)


@pytest.mark.parametrize("again", [False, True], ids=["in order", "in blocks"])
@pytest.mark.parametrize(
    ("recipe", "rule", "slices"),
    [(5, "averaged", True), (5, "momentum", False), (6, "momentum", True), (4, "sgd", True)],
)
def test_large_states_in_blocks(again, recipe, rule, slices, monkeypatch):
    of_blocks(monkeypatch, again)
    backend = ("triton", {"slices": slices, "stages": 8 + again})
    check_backend(of(built_in[recipe], shifted, rule, 3), backend, time=7, batch=1, heads=1, carried=True)


def test_blocks_are_written_and_what_is_cheap_is_made_again(monkeypatch):
    of_blocks(monkeypatch, True)
    texts = [k.text for k in kernels_of(built_in[5], slices=True).values()]
    assert any(re.search(r"^    cotangent_1_1 = tl\.load\(", x, re.M) for x in texts)
    assert any("tl.minimum(n + 2, 0)" in x for x in texts)
    monkeypatch.undo()
    assert not any("tl.minimum(n + " in k.text for k in kernels_of(built_in[5], slices=True).values())


def test_lines_in_order_have_what_they_read_and_hold_less():
    """Two chains are written one after the other, and what is carried on is read before it is taken over."""
    lines = [
        "a = tl.load(x_at)", "b = tl.dot(a, s)", "c = tl.load(y_at)", "d = tl.dot(c, r)", "u = s + b",
        "e = tl.dot(d, s)",
        "tl.store(z_at, e)", "f = tl.dot(b, b)", "tl.store(w_at, f)",
    ]  # fmt: skip
    sizes = dict.fromkeys("abcdefsru", 16)
    found = triton_order.tightened(lines, sizes, ["s", "r"], ["s = u"], False)
    assert sorted(found) == sorted(lines)
    place = {x.split(" = ")[0]: k for k, x in enumerate(found)}
    assert place["a"] < place["b"] < place["f"]
    assert place["c"] < place["d"] < place["e"] < place["u"]
    assert place["a"] > place["e"]  # a chain ends before the next begins

"""Generated C++ equals eager: outputs, state and all outer gradients, for learners that no file of kernels/ knows.

What is compiled is compiled without optimising, which is most of the time; one test takes the flags of users.
"""

import itertools
import operator
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_laws import DOUBLE, built_in, names, of, own, parameter, rules, wobble
from test_learners_drawn import is_tame, learners
from test_learners_drawn import rules as tame
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dualform as df
from dualform import testing as laws
from dualform.graphs.edit import only_outputs
from dualform.graphs.split import split
from dualform.kernels import backend, cpp_rows, cpp_slices, cpp_text, launch, lowering, report, sharing, targets
from dualform.learning.plan import Input
from dualform.ops.table import ENTRIES, find_row, kind_of
from dualform.testing import LawBroken, check_backend

squared = df.objectives.Squared()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Compile fast rather than fast code; scratch memory is NaN."""
    monkeypatch.setattr(launch, "OPTIMISE", "-O0")
    monkeypatch.setattr(launch, "poison", True)


# -- one op at a time ------------------------------------------------------------------------------------------------

one_argument = (
    "neg exp log tanh sigmoid erf sqrt abs rsqrt reciprocal sin cos sign relu log1p expm1 atan sinh cosh floor lgamma "
    "tan ceil trunc asinh erfc exp2 log2 log10 digamma i0 special.i1 special.i0e special.i1e special.erfcx"
)
two = "fmod remainder atan2 hypot copysign fmax fmin logical_xor"
entries = [lambda x, y, f=f: operator.attrgetter(f)(torch)(x) for f in one_argument.split()]
entries += [lambda x, y, f=f: getattr(torch, f)(5 * x - 3, y) for f in two.split()]
entries += [
    lambda x, y: (5 * x - 3).round() * x, lambda x, y: x.round(decimals=1), lambda x, y: (1 + x).acosh(), lambda x,
    y: (x - 0.5).atanh(),
    lambda x, y: (x - 1.2).erfinv(), lambda x, y: torch.special.ndtri(x - 0.19),
    lambda x, y: torch.polygamma(2, x), lambda x, y: torch.polygamma(1, x), lambda x,
    y: torch.div(3 - 5 * x, y, rounding_mode="floor"),
    lambda x, y: torch.div(3 - 5 * x, y, rounding_mode="trunc"), lambda x, y: (x - 0.7).signbit() * y,
    lambda x, y: torch.where(x > 0.7, torch.nan, x).isnan() * y, lambda x,
    y: torch.where(x > 0.7, -torch.inf, x).isinf() * y,
    lambda x, y: ((x > 0.7) ^ (y > 0.7)) * y, lambda x, y: ~(x > 0.7) * y, lambda x, y: (5 * x).bool() * y, lambda x,
    y: (9 * x - 5).long() * y,
    lambda x, y: (~(9 * x).long() & 5 | 8 ^ (9 * y).long()) * x, lambda x,
    y: (((9 * x).long() << 2) ^ (9 * y).long() >> 1) * x,
] + [
    lambda x, y: (0.3 * x).asin(), lambda x, y: (0.3 * x).acos(), lambda x, y: x + y, lambda x,
    y: torch.add(x, y, alpha=2),
    lambda x, y: x - y, lambda x, y: torch.sub(x, y, alpha=3), lambda x, y: 2 - x, lambda x, y: x * y, lambda x,
    y: x / y,
    lambda x, y: x**y, lambda x, y: x**3, lambda x, y: x**-1, lambda x, y: 1.5**x, torch.maximum, torch.minimum,
    lambda x, y: x.clamp(0.6, 0.9), lambda x, y: torch.where((x > y) & (x != 0.5), x, y), lambda x,
    y: ((x <= y) | (y < 0.4)) * x,
    lambda x, y: (x >= y).logical_not() * y, lambda x, y: (x == y) * x, lambda x, y: x.tril(1), lambda x, y: x.triu(-1),
    lambda x, y: torch.eye(*x.shape, dtype=x.dtype) + x, lambda x, y: torch.arange(x.shape[1]) * x, lambda x,
    y: torch.full_like(x, 7.0),
    lambda x, y: torch.addcmul(x, x, y, value=0.5), lambda x, y: x.clone(), lambda x, y: x - x.amax(1, keepdim=True),
    lambda x, y: x / x.sum(0), lambda x, y: x * x.mean() + x.amin(), lambda x, y: x * x.prod(-1, keepdim=True),
    lambda x, y: torch.cat([x[:, 2:], y[:, :2]], 1), lambda x, y: x @ y.T @ x, lambda x,
    y: (x.T @ (x @ y[0])) @ y.T @ x.new_ones(*x.shape),
    lambda x, y: torch.nn.functional.pad(x[1:], (0, 0, 1, 0)), lambda x,
    y: torch.bmm(x[:, :, None], y[:, None, :]).sum(2) + x,
]  # fmt: skip


# What picks, puts and orders; with entries that are equal, and some that are no numbers.
places = torch.tensor([[4, 0, 1, 3, 2]] * 3), torch.tensor([[1, 1, -1, 0, 1], [4, 0, 2, 2, 3]])
picks = [
    lambda x, y, P, Q: x.gather(1, P), lambda x, y, P, Q: x.gather(-1, x.argsort(-1, descending=True)), lambda x, y, P,
    Q: x[:2].gather(0, Q[:1] % 2).sum(0),
    lambda x, y, P, Q: x.scatter_add(1, P % 3, y), lambda x, y, P, Q: x[:, :4].scatter_add(0, Q[1:, :4] % 3, y).sum(),
    lambda x, y, P, Q: x.scatter(1, P, y),
    lambda x, y, P, Q: x.scatter(1, P[:, :2], 0.5), lambda x, y, P, Q: x.scatter(0, Q[1:, :3] % 3, y), lambda x, y, P,
    Q: (x > 0.7).long().sort(-1)[1] * x,
    lambda x, y, P, Q: torch.where(x > 0.7, 0.7, x).sort(-1)[1] * y, lambda x, y, P,
    Q: torch.where(x > 0.7, 0.7, x).sort(0, descending=True)[1] * y,
    lambda x, y, P, Q: torch.sort(torch.where(x > 0.9, torch.nan, x), stable=True, dim=-1, descending=True)[1] * y,
    lambda x, y, P, Q: x.sort(0)[0] * y,
    lambda x, y, P, Q: torch.where(x > 0.9, torch.nan, x).sort(-1)[1] * y, lambda x, y, P,
    Q: torch.where(x > 0.7, torch.nan, x).argmax(1, keepdim=True) * y,
    lambda x, y, P, Q: x.argmin() * y, lambda x, y, P, Q: x.max(0)[1] * y, lambda x, y, P, Q: x.cumsum(1), lambda x, y,
    P, Q: x.cumprod(0), lambda x, y, P, Q: x.logcumsumexp(-1),
    lambda x, y, P, Q: x[Q[0] % 3, Q[1]], lambda x, y, P, Q: x[:, None].expand(3, 2, 5)[Q[0] % 3, :, Q[1]].sum(1),
    lambda x, y, P, Q: x[:, Q].sum(2).sum(1, True),
    lambda x, y, P, Q: x.index_put((Q[0] % 3, Q[1]), y[0]), lambda x, y, P,
    Q: x.index_put((Q[0] % 3, Q[1]), y[0], accumulate=True),
    lambda x, y, P, Q: x.index_put((Q[1][:4] % 3,), y[:1]), lambda x, y, P, Q: torch.diagonal_scatter(x, y[:, 0], 1),
    lambda x, y, P, Q: torch.diagonal_scatter(x, y[1:, 0], -1),
    lambda x, y, P, Q: x.diagonal_scatter(x.diagonal() + 1), lambda x, y, P,
    Q: torch.nn.functional.embedding(Q[0] % 3, x)[:3], lambda x, y, P, Q: x.index_select(1, Q[1]),
    lambda x, y, P, Q: x.index_add(1, Q[1], y), lambda x, y, P, Q: x.flip(0, 1), lambda x, y, P,
    Q: x / x.var(1, keepdim=True) + x.var(0, correction=0),
    lambda x, y, P, Q: x.std() * x, lambda x, y, P, Q: x.clamp(y - 0.1, y + 0.1), lambda x, y, P,
    Q: x.repeat(2, 3)[2:5, 4:9], lambda x, y, P, Q: x.unfold(1, 3, 2).sum(-1).sum(1, True),
    lambda x, y, P, Q: torch.nn.functional.pad(x, (-1, 1, 2, -2), value=3.0), lambda x, y, P,
    Q: torch.where(x > 0.7, 0.1, 0.2) + x,
]  # fmt: skip


def both_ways(dtype):
    """All of `entries` as one function in C++, and what torch makes of it."""
    g = torch.Generator().manual_seed(0)
    x, y = (0.2 + torch.rand(3, 5, generator=g, dtype=dtype) for _ in range(2))

    def f(x, y, *places):
        found = [*(entry(x, y) for entry in entries), *(pick(x, y, *places) for pick in picks)]
        return [torch.stack([torch.broadcast_to(value, x.shape) for value in found])]

    gm = make_fx(f, tracing_mode="fake")(x, y, *places)
    unit = cpp_rows.unit(targets.forward(gm, [Input("q", n, "block") for n in "xyPQ"], dtype, "entries"))
    native = launch.Native(launch.compiled(unit.text), unit.flops, dtype)
    o = torch.full((1, 1, 1, len(entries) + len(picks), 3, 5), torch.nan, dtype=dtype)
    given = dict(zip("xyPQ", (x, y, *places), strict=True))
    tensors = [o if role == "o" else given[what.name][None, None, None] for role, what in unit.arguments]
    native([launch.placed(t) for t in tensors], 1, 1, 1, 0, 0)
    return gm, o[0, 0, 0], f(x, y, *places)[0]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_every_row(dtype):
    gm, got, expected = both_ways(dtype)
    laws.agree("entries", got, expected)
    lowered = [n for n in lowering.lowered(gm).graph.nodes if n.op == "call_function"]
    texts = {find_row(n.target).spelt(n)[0] for n in lowered if kind_of(n.target) == "map"}
    assert set(ENTRIES) - texts == set()


@pytest.mark.parametrize("text", ["tanh", "sub", "tril"])
def test_a_wrong_row_is_found(text, monkeypatch):
    monkeypatch.setitem(ENTRIES, text, replace(ENTRIES[text], cpp=f"T(1.001) * ({ENTRIES[text].cpp})"))
    _, got, expected = both_ways(DOUBLE)
    with pytest.raises(AssertionError):
        laws.agree("entries", got, expected)


def test_the_law_bites(monkeypatch):
    monkeypatch.setitem(ENTRIES, "neg", replace(ENTRIES["neg"], cpp="T(-1.001) * {0}"))
    with pytest.raises(LawBroken, match="cpp"):
        check_backend(of(built_in[3], squared, "sgd", 3), "cpp", time=3)


class Sorts(nn.Module):
    """The largest entries, where they were, the rest below them; running products; a running sum by rank."""

    def __init__(self):
        super().__init__()
        self.W = parameter(4, 4)

    def forward(self, x):
        h = x @ self.W
        place = h.argsort(-1, descending=True)
        most = h.gather(-1, place)
        gate = torch.nn.functional.pad(most[..., :2].softmax(-1), (0, 2))
        spread = torch.zeros_like(h).scatter(-1, place, gate)
        return h.sort(-1)[0] + spread * h + (0.3 * h).cumprod(-1) / h.std(-1, keepdim=True)


class Picks(nn.Module):
    """Columns by a table of whole numbers, sums along a row, and the row in reverse."""

    def __init__(self):
        super().__init__()
        self.W = parameter(4, 4)
        self.register_buffer("places", torch.tensor([2, 0, -1, 2, 1]))
        self.register_buffer("times", torch.tensor([3, -2, 1, 5]))

    def forward(self, x):
        h = (x * self.times @ self.W)[:, self.places].cumsum(-1).flip(-1)
        return torch.tanh(h).index_select(-1, self.places.abs()) @ x.new_ones(5, 4) * x


@pytest.mark.parametrize("kind", [Picks, Sorts])
def test_what_picks_and_orders(kind):
    laws.check_backend(df.derive(kind().double(), squared, rules["averaged"], chunk=3), "cpp", time=3)


# -- learners, rules, objectives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", own, ids=lambda k: k.__name__)
def test_learners_of_ones_own(kind):
    """Rules rotate; one mini-batch, whole."""
    n = own.index(kind)
    laws.check_backend(df.derive(kind(), squared, rules[names[n % len(names)]], chunk=3), "cpp", time=3, seed=n)


# Every objective with every rule, the learners in turn; all three products of two under DUALFORM_PAIRS=all.
taylor = df.learners.Head(expansion=("taylor", {"degree": 2}), reconciliation=("low_rank", {"rank": 2}))
learned = [*built_in, taylor]
aims = [*(df.objectives.build(name) for name in df.objectives.names()), df.objectives.Squared("v-k"), wobble]
pairs = [
    ((n + n // len(rules)) % len(learned), aim, rule)
    for n, (aim, rule) in enumerate(itertools.product(range(len(aims)), rules))
]
if os.environ.get("DUALFORM_PAIRS") == "all":
    pairs += [(n, (n + k) % len(aims), rule) for n in range(len(learned)) for k, rule in enumerate(rules)]
    pairs += [(n, aim, names[(n + aim) % len(names)]) for n in range(len(learned)) for aim in range(len(aims))]


@pytest.mark.parametrize(("learner", "aim", "rule"), dict.fromkeys(pairs))
def test_learners_objectives_and_rules(learner, aim, rule):
    laws.check_backend(of(learned[learner], aims[aim], rule, 3), "cpp", time=3, seed=learner)


@pytest.mark.parametrize("rule", rules)
def test_padding_resets_and_carried_state(rule):
    drawn = {"carried": True, "ragged": True, "resets": True}
    laws.check_backend(of(built_in[0], squared, rule, 3), "cpp", time=7, **drawn)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (3, 2, 1)], ids=str)
def test_few_tokens_rows_and_heads(shape):
    batch, time, heads = shape
    laws.check_backend(of(built_in[1], squared, "averaged", 2), "cpp", batch=batch, time=time, heads=heads)


@pytest.mark.parametrize(("dim", "dtype", "optimise"), [(9, DOUBLE, "-O0"), (17, torch.float32, "-O3")])
def test_sizes_that_are_no_multiple_of_a_vector_with_the_flags_of_users(dim, dtype, optimise, monkeypatch):
    monkeypatch.setattr(launch, "OPTIMISE", optimise)
    program = df.derive(built_in[5](dim).to(dtype), squared, rules["averaged"], chunk=dim - 2)
    laws.check_backend(program, "cpp", time=dim - 2, dtype=dtype)


def test_learners_drawn():
    @settings(
        max_examples=int(os.environ.get("DUALFORM_EXAMPLES", "3")),
        deadline=None,
        derandomize="DUALFORM_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        learner=learners(),
        rule=st.sampled_from(list(tame)),
        chunk=st.sampled_from([3, 2, 4, 1]),
        seed=st.integers(0, 9),
    )
    def agrees(learner, rule, chunk, seed):
        program = df.derive(learner, squared, tame[rule], chunk=chunk)
        drawn = {"time": chunk + 1, "carried": True, "seed": seed}
        assume(is_tame(laws.draw(program, **drawn)))
        laws.check_backend(program, "cpp", **drawn)

    agrees()


# -- the way a call takes ----------------------------------------------------------------------------------------------


def mlp(**options):
    return of(built_in[1], squared, "averaged", 3, **options)


@pytest.mark.parametrize("remat", [None, 1, 3, "auto"])
def test_kept_states(remat):
    problem = laws.draw(mlp(), time=14)
    runs = (laws.outcome(problem, partial(problem.run, "auto", backend=b, remat=remat)) for b in ("cpp", "eager"))
    laws.same_outcome(*runs, f"remat={remat}")


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(launch, "FLOPS_PER_THREAD", 1)
    problem, before, found = laws.draw(mlp(), time=12, batch=3), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(laws.outcome(problem, partial(problem.run, "auto", backend="cpp")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@pytest.fixture
def sliced(monkeypatch):
    """As with more threads than rows."""
    monkeypatch.setattr(backend, "cut", lambda rows, count: count > 1)
    monkeypatch.setattr(cpp_slices, "WINDOW", (2, 2))
    monkeypatch.setattr(launch, "FLOPS_PER_THREAD", 1)


@pytest.mark.parametrize("n", range(max(len(learned), len(rules))))
def test_slices_beside_each_other(n, sliced):
    """Every learner and every rule, through windows and groups that are not all full."""
    learner, aim, rule = learned[n % len(learned)], aims[n % len(aims)], names[n % len(names)]
    program = of(learner, aim, rule, 2)
    laws.check_backend(program, "cpp", batch=1, time=15, carried=n % 2 == 0, seed=n)
    assert any(
        made.native.slices
        for plan in program.plans.values()
        for made in plan.natives.of(backend.NativeFunctions).functions.values()
    )


def test_slices_with_resets_and_padding(sliced):
    laws.check_backend(mlp(), "cpp", time=20, carried=True, ragged=True, resets=True)


def test_slices_of_a_state_that_waits_for_nothing(sliced):
    """A cotangent that is carried on, made of nothing that is: the loop hands it on, and must have made it.
    It was memory as it lay."""
    laws.check_backend(of(learned[1], aims[1], "decay", 2), "cpp", batch=1, time=12)


@pytest.mark.parametrize("again", [None, set])
def test_a_split_hands_on_in_order_what_waits_for_nothing(again):
    """The next state, made of no state: passed to the loop in its order, which texts show; or made again,
    and then in the loop."""
    for _ in range(30):
        graph = fx.Graph()
        *state, x = [graph.placeholder(name) for name in (*"abcdefgh", "x")]
        after = [graph.call_function(torch.ops.aten.mul.Tensor, (x, k)) for k in range(len(state))]
        graph.output(after)
        for n in graph.nodes:
            n.meta["val"] = torch.empty(2, 2, device="meta")
        f = split(fx.GraphModule({}, graph), range(8), range(8), None, lambda n: 1.0, again=again)
        assert list(f.loop.inputs) == ([x] if again else after)
        assert list(f.before.outputs) == ([] if again else after)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_neither_slices_nor_threads_change_a_bit(dtype, monkeypatch):
    """Not even with the flags of users: what is fused with what is not seen in a result."""
    monkeypatch.setattr(launch, "OPTIMISE", "-O3")
    monkeypatch.setattr(launch, "FLOPS_PER_THREAD", 1)
    program = df.derive(df.learners.residual_norm(df.learners.MLP())(16).to(dtype), squared, rules["averaged"], chunk=4)
    problem, before, found = laws.draw(program, time=160, batch=1, heads=2, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            found.append(laws.outcome(problem, partial(problem.run, "auto", backend="cpp")))
    finally:
        torch.set_num_threads(before)
    assert {
        made.native.slices
        for plan in program.plans.values()
        for made in plan.natives.of(backend.NativeFunctions).functions.values()
    } == {False, True}
    assert all(torch.equal(x, other[name]) for name, x in found[0].items() for other in found[1:])


def test_any_memory_layout():
    program = mlp()
    x = torch.randn(3, 4, 2, 12, 2, dtype=DOUBLE)
    q, k, v = (y.permute(1, 3, 2, 0, 4)[:, :, :, :, 0].contiguous().requires_grad_() for y in (x, x + 1, x - 1))
    q, k, v = (torch.cat([y, y[..., :1]], -1) for y in (q, k, v))
    for layout in (
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: y.mT.contiguous().mT,
        lambda y: y.flip(1)[:, ::2],
        lambda y: y[:1].expand(4, -1, -1, -1),
    ):
        given = [layout(y).detach().requires_grad_() for y in (q, k, v)]
        found = []
        for name in ("cpp", "eager"):
            o, _ = program(*given, backend=name)
            found.append([o, *torch.autograd.grad(o.sin().sum(), given)])
        for got, expected in zip(*found, strict=True):
            laws.agree("strided", got, expected)


@pytest.mark.parametrize(("dim", "chunk", "batch"), [(8, 3, 2), (5, 1, 1)])
@pytest.mark.parametrize("rule", ["averaged", "titans"])
def test_token_by_token_over_the_state_given(rule, dim, chunk, batch):
    """In place where a state is laid out as a buffer (8 doubles) and where it is not."""
    program = of(built_in[1], squared, rule, chunk, dim=dim)
    problem = laws.draw(program, time=2 * chunk + 2, batch=batch)
    with torch.no_grad():
        whole, after = problem.run("auto", backend="eager")
        _, state = problem.run("auto", slice(0, 1), backend="eager")
        kept, held = state.fork(1), {name: x.data_ptr() for name, x in state.tensors().items() if name != "position"}
        for t in range(1, 2 * chunk + 2):
            before = {name: x.clone() for name, x in state.tensors().items()}
            apart, other = problem.run("auto", slice(t, t + 1), state, backend="cpp")
            for name, x in state.tensors().items():
                laws.agree(f"untouched {name}", x, before[name])
            o, state = problem.run("auto", slice(t, t + 1), state, backend="cpp", overwrite=True)
            laws.agree(f"o {t}", o, whole[:, t : t + 1])
            laws.agree(f"apart {t}", apart, o)
            for name, x in other.tensors().items():
                laws.agree(f"apart {name}", x, state.tensors()[name])
        assert held == {name: x.data_ptr() for name, x in state.tensors().items() if name != "position"}
        for name, x in after.tensors().items():
            laws.agree(name, state.tensors()[name], x)
        _, again = problem.run("auto", slice(1, 2 * chunk + 2), kept, backend="cpp")
        for name, x in after.tensors().items():
            laws.agree(f"forked before {name}", again.tensors()[name], x)


def test_a_state_that_is_the_weights_is_not_written_over():
    program = mlp()
    weights = {name: p.detach().clone() for name, p in program.learner.named_parameters()}
    with torch.no_grad():
        state, x = program.initial_state(1, 1), torch.randn(1, 1, 1, 4, dtype=DOUBLE)
        program(x, x, x, state=state, backend="cpp", overwrite=True)
    for name, p in program.learner.named_parameters():
        assert torch.equal(p, weights[name])


def test_single_tokens_repay_compiling(monkeypatch):
    monkeypatch.setattr(backend, "TOKENS_WORTH_COMPILING", 2)
    program = of(built_in[0], squared, "momentum", 5, dim=8)
    plan, x = program.plan(8, DOUBLE, "auto"), torch.randn(2, 1, 1, 8, dtype=DOUBLE)
    plan.natives.made.clear()
    plan.natives.tokens = 0
    with torch.no_grad():
        _, state = program(x, x, x)  # counts, too
        plan.natives.tokens = 0
        for made in (False, False, True):
            _, state = program(x, x, x, state=state)
            assert bool(plan.natives.of(backend.NativeFunctions).functions) == made


def test_two_calls_are_one():
    problem = laws.draw(mlp(), time=7)
    whole, after = problem.run("auto", backend="cpp")
    first, state = problem.run("auto", slice(0, 4), backend="cpp")
    rest, state = problem.run("auto", slice(4, 7), state, backend="cpp")
    laws.agree("o", torch.cat([first, rest], 1), whole)
    for name, x in state.tensors().items():
        laws.agree(name, x, after.tensors()[name])


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize(
    ("dtype", "drawn"),
    [
        (torch.bfloat16, {"time": 7}), (torch.bfloat16, {"time": 7, "ragged": True, "resets": True, "carried": True}),
        (torch.bfloat16, {"time": 9, "batch": 1, "heads": 1}), (torch.float16, {"time": 3}),
        (torch.float32, {"time": 3}),
    ],
)  # fmt: skip
def test_fewer_digits_in_and_out_are_those_of_a_copy(dtype, drawn, backend, monkeypatch, request):
    """To the bit: numbers are widened while they are read, and rounded while they are written.
    One in another type, too."""
    wide = torch.promote_types(torch.float32, dtype) if dtype != torch.float32 else DOUBLE
    if drawn.get("heads") == 1:
        request.getfixturevalue("sliced")
    program = df.derive(built_in[1](4).to(wide), squared, rules["averaged"], chunk=3)
    problem = laws.draw(program, dtype=wide, **drawn)
    tokens = {name: x for name, x in problem.tensors.items() if name in ("q", "k", "v", "gate.lr")}
    for layout in (lambda x: x, lambda x: x.mT.contiguous().mT):
        few = {
            name: layout(x.detach()).to(dtype if name != "v" else wide).requires_grad_() for name, x in tokens.items()
        }
        narrow = replace(problem, tensors=problem.tensors | few)
        copy = replace(problem, tensors=problem.tensors | {name: x.to(wide) for name, x in few.items()})

        def through_a_copy(copy=copy):
            o, state = copy.run("auto", backend=backend)
            return o.to(dtype), state

        expected = laws.outcome(narrow, through_a_copy)
        with monkeypatch.context() as within:
            within.setattr(launch, "FLOPS_PER_THREAD", 1)
            got = laws.outcome(narrow, lambda narrow=narrow: narrow.run("auto", backend=backend))
        assert got["o"].dtype == got["d k"].dtype == dtype
        assert {x.dtype for name, x in got.items() if name.startswith("state")} == {wide, torch.long}
        assert [n for n, x in expected.items() if x.dtype != got[n].dtype or not torch.equal(x, got[n])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(dtype):
    """Both ways, of all numbers of two bytes and of many others, as torch does."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x, y = (high + low).view(torch.float32).flatten(), torch.arange(-(2**15), 2**15).short().view(dtype)
    body = "Flush flush; for (long i = 0; i < n; ++i) {};"
    head = 'extern "C" long need(long, long, long, long) {{ return 0; }}\n'
    head += 'extern "C" void run(long n, long, long, long, long, const void* in, void* out, long) {{\n{}\n}}'
    kind = cpp_text.TYPES[dtype]
    for put, numbers in (("put(({0}*)out + i, ((float*)in)[i])", x), ("((float*)out)[i] = get((const {0}*)in + i)", y)):
        text = cpp_text.source(torch.float32, [head.format(body.format(put.format(kind)))])
        got = torch.empty(len(numbers), dtype=dtype if numbers is x else torch.float32)
        launch.compiled(text).run(len(numbers), 0, 0, 0, 0, numbers.data_ptr(), got.data_ptr(), 0)
        torch.testing.assert_close(got, numbers.to(got.dtype), rtol=0, atol=0, equal_nan=True)


def test_the_tokens_are_not_copied(monkeypatch):
    """What the compiled code is given is the caller's own memory, and it writes to the result's."""
    program, seen = df.derive(built_in[1](4).float(), squared, rules["averaged"], chunk=3), []
    placed = backend.placed
    monkeypatch.setattr(backend, "placed", lambda x: (seen.append(x.data_ptr()), placed(x))[1])
    q, k, v = torch.randn(3, 2, 6, 2, 4).bfloat16().unbind()
    with torch.no_grad():
        o, _ = program(q, k, v, backend="cpp")
    assert {x.data_ptr() for x in (q, k, v, o)} <= {*seen}


def test_single_tokens_autocast_and_empty():
    program = df.derive(built_in[1](4), squared, rules["averaged"], chunk=3)
    q, k, v = torch.randn(3, 2, 6, 2, 4).bfloat16().unbind()
    with torch.no_grad():
        o, state = program(q, k, v, backend="cpp")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(program(q, k, v, backend="cpp")[0], o)
        steps, last = [], program.initial_state(2, 2)
        for t in range(6):
            y, last = program(*(x[:, t : t + 1] for x in (q, k, v)), state=last, backend="cpp")
            steps.append(y)
    laws.agree("o", torch.cat(steps, 1), o)
    for name, x in state.tensors().items():
        laws.agree(name, last.tensors()[name], x)
    assert program.losses(k, v)[0].dtype == torch.float32
    assert program(q[:0], k[:0], v[:0], backend="cpp")[0].shape == (0, 6, 2, 4)
    assert program(q[:, :0], k[:, :0], v[:, :0], backend="cpp")[0].shape == (2, 0, 2, 4)


def test_losses(monkeypatch):
    program = mlp()
    k, v = torch.randn(2, 2, 6, 2, 4, dtype=DOUBLE).unbind()
    expected = program.losses(k, v)
    monkeypatch.setattr(backend, "WORTH_COMPILING", 0)
    for got, wanted in zip(program.losses(k, v)[:2], expected[:2], strict=True):
        laws.agree("losses", got, wanted)
    assert program.plan(4, DOUBLE, "losses").natives


def test_checkpoint_and_compile():
    program = mlp()
    x = torch.randn(2, 6, 2, 4, dtype=DOUBLE, requires_grad=True)

    def f(x):
        return program(x, x.sin(), x.cos(), backend="cpp")[0].sum()

    (expected,) = torch.autograd.grad(f(x), x)
    again = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)
    laws.agree("checkpoint", torch.autograd.grad(again, x)[0], expected)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    laws.agree("compile", torch.autograd.grad(compiled(x), x)[0], expected)


# -- where it cannot be done -------------------------------------------------------------------------------------------


class Waits(nn.Module):
    """An incomplete gamma function: an op without a row."""

    def __init__(self):
        super().__init__()
        self.W = parameter(4, 4)

    def forward(self, x):
        return torch.igamma(x.square(), (x @ self.W).square())


def test_an_op_without_a_row_is_named_with_its_line_or_left_to_eager(monkeypatch):
    program = df.derive(Waits(), chunk=3)
    x = torch.randn(1, 6, 1, 4, dtype=DOUBLE)
    with pytest.raises(
        ValueError,
        match=r"aten.igamma.default at return torch.igamma\(x.square\(\), "
        r"\(x @ self.W\).square\(\)\)   \(test_kernels.py:\d+\)",
    ):
        program(x, x, x, backend="cpp")
    monkeypatch.setattr(backend, "WORTH_COMPILING", 0)
    with pytest.warns(UserWarning, match="aten.igamma.default .* run on backend='eager'"):
        o, _ = program(x, x, x)
    laws.agree("o", o, program(x, x, x, backend="eager")[0])
    program(x, x, x)  # says so once: warnings are errors here


def test_another_device_is_refused():
    program = mlp()
    run = SimpleNamespace(call=SimpleNamespace(q=torch.zeros(1, 3, 1, 4, device="meta")), grid=None)
    with pytest.raises(ValueError, match="cpp: q is on meta; expected the CPU"):
        df.backends.build("cpp").build().whole.forward(run, 0)
    assert not df.backends.build("cpp").build().whole.suits(program.plan(4, DOUBLE, "auto"), run.call)


SOURCE = 'extern "C" long need(...) {{ return 0; }} extern "C" void run(...) {{}}  // {}'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of its own, and one for when it fails."""
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache"


def program_named(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, r"\$CXX is '/no/such/compiler', which is no program"),
        ("exit 3", "failed with status 3"),
        ("echo \"unrecognized option '-std=c++17'\" >&2; exit 1", r"unrecognized option '-std=c\+\+17'"),
        ("case $1 in -O*) exit 0;; esac", "no folder takes compiled code"),
        ("case \"$*\" in *-o*) echo 'No space left on device' >&2; exit 1;; esac", "No space left on device"),
        ("case \"$*\" in *-o*) while test \"$1\" != -o; do shift; done; echo no library > $2;; "
        "esac", "could not be loaded"),
    ],
    ids=["missing", "failing", "old", "silent", "full", "nonsense"],
)  # fmt: skip
def test_a_compiler_that_does_not_compile(script, message, monkeypatch, folder, tmp_path):
    path = "/no/such/compiler" if script is None else program_named(tmp_path / "cc", script)
    monkeypatch.setenv("CXX", path)
    with pytest.raises(launch.CompilerError, match=message):
        launch.compiled(SOURCE.format(0))
    monkeypatch.setattr(backend, "WORTH_COMPILING", 0)
    program = df.derive(built_in[0](5).double(), chunk=3, rule=rules["user"])
    x = torch.randn(1, 6, 1, 5, dtype=DOUBLE)
    natives = program.plan(5, DOUBLE, "auto").natives
    vars(natives).update(vars(type(natives)()))  # plans of equal structure share what was made
    with pytest.warns(UserWarning, match=message):
        o, _ = program(x, x, x)
    laws.agree("o", o, program(x, x, x, backend="eager")[0])
    vars(natives).update(vars(type(natives)()))


def test_no_compiler_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        launch.CompilerError, match=r"no C\+\+ compiler was found; expected \$CXX, g\+\+, clang\+\+ or c\+\+"
    ):
        launch.compiler()


def test_a_compiler_with_no_library_of_threads(monkeypatch, folder, tmp_path):
    script = (
        f'case "$*" in *-fopenmp\\ *|*-fopenmp) extra=-Dneed=missing;; esac\n{" ".join(launch.compiler())} $extra "$@"'
    )
    monkeypatch.setenv("CXX", program_named(tmp_path / "cc", script))
    assert launch.compiled(SOURCE.format(8)).need(0, 0, 0, 0) == 0
    assert len(list(folder.iterdir())) == 1


def test_a_cache_that_cannot_be_written(monkeypatch, folder, tmp_path):
    folder.write_text("a file, no folder")
    launch.compiled(SOURCE.format(1))
    assert len(list(tmp_path.glob("dualform-*/*.so"))) == 1
    assert launch.clear_cache()[0] == 1


def test_a_folder_that_others_write_is_not_trusted(folder):
    folder.mkdir()
    folder.chmod(0o777)
    launch.compiled(SOURCE.format(2))
    assert not list(folder.iterdir())


def test_the_cache(monkeypatch, folder):
    count = []
    execute = launch._execute
    monkeypatch.setattr(launch, "_execute", lambda command, *rest: (count.append(command), execute(command, *rest))[1])
    launch.compiled(SOURCE.format(3))
    (entry,) = folder.iterdir()
    made = len(count)
    launch.compiled(SOURCE.format(3))
    assert len(count) == made  # found
    cut = entry.read_bytes()[:100]
    entry.unlink()  # what this process has mapped stays as it is
    entry.write_bytes(cut)
    launch.compiled(SOURCE.format(3))
    assert len(count) == made + 1  # cut short: made anew
    identity = launch._identity
    monkeypatch.setattr(launch, "_identity", lambda *a: identity(*a) + "\n#define __ANOTHER_CPU__")
    launch.compiled(SOURCE.format(3))
    assert len(list(folder.iterdir())) == 2  # each machine its own
    assert launch.clear_cache()[0] == 2
    assert not list(folder.iterdir())


def test_the_identity_names_the_processor():
    described = launch._identity(launch.compiler(), launch.FLAGS)
    plain = subprocess.run([*launch.compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    for part in (plain, "-march=native", "#define __"):
        assert part in described


def test_the_cache_is_bounded(monkeypatch, folder):
    launch.compiled(SOURCE.format(4))
    size = sum(path.stat().st_size for path in folder.iterdir())
    (oldest,) = folder.iterdir()
    os.utime(oldest, (0, 0))
    monkeypatch.setattr(launch, "CACHE_BYTES", 2 * size + 64)
    launch.compiled(SOURCE.format(5))
    launch.compiled(SOURCE.format(6))
    assert len(list(folder.iterdir())) == 2
    assert not oldest.exists()


def test_many_processes_at_once(folder):
    code = f"from dualform.kernels import launch; launch.OPTIMISE = '-O0'; launch.compiled({SOURCE.format(7)!r})"
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(folder.iterdir())) == 1


def test_explain_says_which_backend_and_why(monkeypatch):
    program = df.derive(built_in[0](8).double(), chunk=5)
    made = "from 231,482 tokens x heads on, or 1,000 single tokens, which repay compiling"
    assert f"backend  cpp on the CPU, {made}, few rows in slices beside each other; else eager" in str(
        program.explain()
    )
    monkeypatch.setattr(backend, "WORTH_COMPILING", 0)
    x = torch.randn(1, 5, 1, 8, dtype=DOUBLE)
    program(x, x, x)
    assert "cpp on the CPU, compiled already" in str(program.explain())
    refused = df.derive(Waits(), chunk=2)
    with pytest.warns(UserWarning, match="igamma"):
        refused(x[..., :4], x[..., :4], x[..., :4])
    assert "backend  eager, because cpp: the op aten.igamma.default" in str(refused.explain())


@pytest.mark.parametrize("n", range(len(built_in)), ids=lambda n: repr(built_in[n]))
def test_a_schedule_counts_its_work(n):
    """Flops as torch counts them in the step and its vjp."""
    program = of(built_in[n], squared, "averaged", 4, dim=8)
    parts, step = program.schedule("cpp"), program.step

    def counted(graph):
        values = [x.meta["val"] for x in graph.graph.nodes if x.op == "placeholder"]
        inputs = [torch.ones(x.shape, dtype=x.dtype) for x in values]
        with FlopCounterMode(display=False) as counter:
            graph(*inputs)
        return counter.get_total_flops()

    assert abs(parts["forward"].flops / counted(step.plain) - 1) < 0.05
    again, reverse, _ = sharing.shared(
        lowering.lowered(only_outputs(step.plain, slice(1, None))), lowering.lowered(step.reverse), len(step.wants)
    )
    assert abs(parts["backward"].flops / (counted(again) + counted(reverse)) - 1) < 0.05
    assert counted(reverse) <= counted(step.reverse)  # what the states' computation had is kept


def test_a_schedule_counts_its_bytes(monkeypatch):
    """Those of the caller's tensors that a call reads and writes, and of the scratch memory that it allocates."""
    program, tensors, allocated = mlp(), [], []
    parts = program.schedule("cpp")
    call, empty = backend._Sequence._call, torch.empty

    def watched(run, made, given, *rest):
        tensors.extend(
            given[role](what) for role, what in made.arguments if role == "o" or getattr(what, "over", "") == "block"
        )
        return call(run, made, given, *rest)

    monkeypatch.setattr(backend._Sequence, "_call", staticmethod(watched))
    x = torch.randn(2, 6, 3, 4, dtype=DOUBLE)
    with torch.no_grad(), monkeypatch.context() as within:
        within.setattr(launch.torch, "empty", lambda *a, **k: (allocated.append(empty(*a, **k)), allocated[-1])[1])
        program(x, x, x, backend="cpp")
    assert sum(t.nbytes for t in tensors) == parts["forward"].nbytes * 2 * 2 * 3
    assert 0 <= allocated[-1].nbytes - parts["forward"].memory_bytes < 3 * 64 * 8
    assert f"memory of a thread: {parts['forward'].memory_bytes:,} bytes" in str(parts["forward"])


def test_the_source_is_the_same_in_every_process():
    """Else nothing that was compiled once would be found again."""
    code = (
        "import dualform as df, hashlib; p = df.derive(df.learners.MLP(depth=3)(6), rule=df.rules.SGD(momentum=0.9, "
        "decay=0.1), chunk=3);print([hashlib.sha256(u.text.encode()).hexdigest() for u in p.schedule('cpp').values()])"
    )
    run = [sys.executable, "-c", code]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second


def test_a_schedule_is_read():
    parts = of(built_in[0], squared, "sgd", 4).schedule("cpp")
    text = str(parts["backward"])
    for words in (
        "carries the state on",
        "flops in products",
        "bytes in and out",
        "buffers:",
        "for each state of a group",
    ):
        assert words in text
    flops, nbytes = parts["backward"].flops, parts["backward"].nbytes
    assert parts["backward"].bound(1e9, 1e12) == (flops / 1e9, "flops")
    assert parts["backward"].bound(1e12, 1e6) == (nbytes / 1e6, "bytes")
    with pytest.raises(df.DerivationError, match="backend is 'eager'; expected one that generates code"):
        of(built_in[0], squared, "sgd", 4).schedule("eager")


def test_slices():
    """Of a linear learner's step the products of keys with queries do not wait for the state;
    what is put out leads nowhere."""
    schedule = of(built_in[0], squared, "sgd", 4).schedule("cpp")["forward"].parts["step:"]
    found = report.slices(schedule)
    assert {*found} == {*report.SLICES}
    sources = {b for b in schedule.inputs if b.place not in ("scratch", "fixed")}
    for name, one in zip(found, schedule.statements, strict=True):
        late = any(v.buffer in sources for v in one.reads())
        sources |= {v.buffer for v in one.writes()} if late else set()
        assert (name == "before") == (not late)


def test_small_calls_are_not_compiled():
    program = df.derive(built_in[0](6), chunk=3)
    x = torch.randn(1, 6, 1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(x, x, x)
    assert not program.plan(6, torch.float32, "auto").natives.of(backend.NativeFunctions).functions

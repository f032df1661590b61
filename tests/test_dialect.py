"""One description of what generated functions do, each language in its files: what a second printer builds on.

A walker that runs the graphs by torch, on nothing but that description, gives eager's numbers: outputs, states,
all gradients.
"""

import ast
import itertools
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import aims, learned
from test_laws import names, of
from torch.fx.experimental.proxy_tensor import make_fx

from dualform import testing as laws
from dualform.kernels import backend, cpp_rows, cpp_slices, lowering, memory, schedule, tiles
from dualform.kernels.soundness import BrokenSchedule
from dualform.kernels.statements import MatrixProduct, Nest, Read, View
from dualform.kernels.targets import EACH, ROW, Target, in_turn, place_of
from dualform.learning.grid import Variant
from dualform.ops.table import ENTRIES, FOLDS, ROWS

KERNELS = Path(backend.__file__).parent


class Walk:
    """A direction, run graph by graph and row by row: what a printer would print is done."""

    def __init__(self, d, sliced):
        functions = d.sliced() if sliced else d.functions
        first = 0 if d.advance is None else 1
        self.d, self.advance, self.step = d, functions[:first], functions[first:]
        self.summands = {in_turn(Target("added", x)).what: x for x in d.summed}

    def __call__(self, tensors, rows, count, G, phase):
        self.argument = cache(lambda role, what: tensors[role](what))
        for self.row in torch.cartesian_prod(*map(torch.arange, rows)).tolist():
            self.sums = dict.fromkeys(self.d.summed, 0.0)
            (self.backward if self.advance else self.forward)(count, G, phase)
            for x, total in self.sums.items():
                self.give("gradient", x, ROW, 0, total)

    def take(self, role, what, n=0):
        return self.argument(role, what)[(n, *self.row)]

    def give(self, role, what, where, n, value):
        self.argument(role, what)[(n if where == EACH else 0, *self.row)] = value

    def add(self, x, value):
        self.sums[x] = self.sums[x] + value

    def run(self, functions, n, carried, stays):
        """Run a mini-batch; return what is carried on."""
        after = dict(carried)
        for f in functions:
            values = []
            for x in f.sources:
                place = place_of(x)
                if place in ("scratch", "fixed"):
                    values.append(self.take("input", x, n if place == "scratch" else 0))
                else:
                    values.append(stays[x.part, x.name] if place in ("kept", "passed") else carried[x])
            for target, value in zip(f.targets, f.graph(*values), strict=True):
                if target.kind == "given":
                    self.give(*target.what, n, value)
                elif target.is_carried:
                    after[target.what] = value
                elif target.kind == "added":
                    self.add(target.what, value)
                elif target.what in self.summands:
                    self.add(self.summands[target.what], value)
                else:
                    stays[target.kind, target.what] = value
        return after

    def forward(self, count, G, phase):
        state = {x: self.take("before", k) for k, x in enumerate(self.d.held("state"))}
        for n in range(count):
            for k, x in enumerate(self.d.held("state") if G and (n + phase) % G == 0 else ()):
                self.give("kept", k, EACH, (n + phase) // G, state[x])
            state = self.run(self.step, n, state, {})
        over = [t.what for t in self.d.step.targets if t.kind == "over"]
        for k, x in enumerate(self.d.held("state")):
            if x in over:
                self.give("after", k, ROW, 0, state[x])

    def backward(self, count, G, phase):
        turned = {x: self.take("cotangent", k) for k, x in enumerate(self.d.held("cotangent"))}
        for group in reversed(range(-(-count // G))):
            state, begun = {x: self.take("kept", k, group) for k, x in enumerate(self.d.held("state"))}, []
            for n in range(group * G, min(group * G + G, count)):
                stays = {}
                begun.append((n, state, stays))
                state = self.run(self.advance, n, state, stays)
            for n, state, stays in reversed(begun):
                turned = self.run(self.step, n, turned | state, stays)
        for k, x in enumerate(t.what for t in self.d.step.targets if t.kind == "over"):
            self.give("turned", k, ROW, 0, turned[x])


@pytest.fixture(params=[False, True], ids=["whole", "sliced"])
def walked(monkeypatch, request):
    """The backend's calls, with walks for compiled code."""
    walks = {}

    def made(plan, call, variant, direction, full=None, slices=False):
        key = (plan.derivation.structure, variant, direction, kinds := backend._kinds(plan, call))
        if key not in walks:
            walks[key] = Walk(backend.described(plan, variant, direction, full, kinds), request.param)
        return backend.NativeUnit(walks[key], ())

    def call(run, made, tensors, *rest):
        made.native(tensors, (run.B, run.H), *rest)

    monkeypatch.setattr(backend, "made", made)
    monkeypatch.setattr(backend._Sequence, "_call", staticmethod(call))


@pytest.mark.parametrize("n", range(len(learned)) if os.environ.get("DUALFORM_PAIRS") == "all" else (1, 5))
def test_the_description_is_all_that_a_walker_needs(n, walked):
    """Several kept states, several mini-batches of each, a carried state; learners, rules and objectives in turn."""
    program = of(learned[n], aims[n % len(aims)], names[(n + 2) % len(names)], 2)
    laws.check_backend(program, "cpp", time=7, carried=True, resets=n == 5, batch=1, seed=n)


@pytest.mark.parametrize("forgets", ["sums", "states"])
def test_a_walker_that_forgets_is_found(forgets, walked, monkeypatch):
    own = Walk.give
    if forgets == "sums":
        monkeypatch.setattr(Walk, "add", lambda self, x, value: None)
    else:
        monkeypatch.setattr(Walk, "give", lambda self, role, *rest: own(self, role, *rest) if role != "after" else None)
    with pytest.raises((laws.LawBroken, ValueError)):
        laws.check_backend(of(learned[6], aims[0], "averaged", 2), "cpp", time=5, batch=1)


# -- one language, one place -------------------------------------------------------------------------------------------

CPP = re.compile(
    r"\b(for|while|if) ?\(|\bT\(|std::|static |const Arg|\b(float|double|long|int\d*_t) ?[*&]* ?\w+ "
    r"?[=;(]|\w->|[\w)\]}];$|; ?}|\bg\["
)


def cpp_in(path):
    """List the string literals of a file that hold C++; docstrings are prose."""
    tree = ast.parse(path.read_text())
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    texts = [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in prose
    ]
    return [f"{path.name}:{n.lineno}: {n.value!r}" for n in texts if CPP.search(n.value)]


def test_a_language_stands_in_its_own_files():
    found = {path.name: cpp_in(path) for path in sorted(KERNELS.glob("*.py"))}
    assert [line for name, lines in found.items() if not name.startswith("cpp_") for line in lines] == []
    assert {name for name, lines in found.items() if lines} == {"cpp_rows.py", "cpp_slices.py", "cpp_text.py"}
    assert {path.name for path in KERNELS.glob("*.h")} == {"cpp_slices.h", "cpp_text.h"}


def test_a_language_elsewhere_is_found(tmp_path):
    for text in (
        'x = "for (int i = 0;"',
        'x = f"T {x} = exp_({y});"',
        'x = "static inline"',
        'x = f"g[{n}].s0"',
        'x = "float x = 0"',
    ):
        (tmp_path / "a.py").write_text(f'"""for (prose;"""\n{text}')
        assert len(cpp_in(tmp_path / "a.py")) >= 1, text


def test_what_describes_knows_no_language_and_no_buffer():
    def imported(path):
        for module, listed in re.findall(
            r"^from dualform\.kernels(?:\.(\w+))? import (.*)$", path.read_text(), re.MULTILINE
        ):
            yield from [module] if module else re.findall(r"\w+", listed)

    graph = {path.stem: {*imported(path)} for path in KERNELS.glob("*.py")}

    def reached(name):
        return {name}.union(*(reached(x) for x in graph.get(name, ())))

    speaking = {name for name in graph if any(x.startswith("cpp_") for x in reached(name))}
    assert {name for name in speaking if not name.startswith("cpp_")} == {"backend", "triton_backend", "__init__"}
    assert reached("targets") == {"targets", "lowering", "ops", "sharing"}


def test_a_dialect_spells_what_there_is():
    """Every entry and reduction, and how every op of a kind reads; that it is right is `test_every_row`."""
    assert {*FOLDS} == {*"sum prod amax amin".split()}
    assert all(x.cpp for x in (*ENTRIES.values(), *FOLDS.values()))
    kinds = {row.kind: row for row in ROWS.values()}
    assert {*kinds} == {"", "map", "reduction", "product", "pieces", "view"}
    assert [
        row.name for row in ROWS.values() if (row.entry is None) == (row.kind in ("map", "reduction", "pieces"))
    ] == []


# -- schedules are sound -----------------------------------------------------------------------------------------------


def scheduled(f=None, over=None, align=16, beside=False, stay=None):
    """A function of one mini-batch as statements; its first input is a state that the first result is written over."""
    f = f or (lambda w, x, y: (w - 0.5 * x.T @ torch.tanh(x @ w + y.sum(0)), torch.cat([x @ w, y.exp()], 1)))
    examples = [torch.empty(shape) for shape in ((6, 6), (4, 6), (4, 6))]
    gm = lowering.lowered(make_fx(f, tracing_mode="fake")(*examples))
    return schedule.schedule(gm, align, ["state", "scratch", "scratch"], ["w", "x", "y"], over or {0: 0}, beside, stay)


def after(name, change):
    """A broken pass: what the pass makes, and then a change."""
    own = getattr(memory, name)

    def broken(*given):
        found = own(*given)
        change(*given)
        return found

    return broken


def nests(statements):
    return [s for s in statements if isinstance(s, Nest)]


def beyond_bounds(statements, *_):
    item = next(i for s in nests(statements) for i in s.items if any(isinstance(x, Read) for x in i.operands))
    k = next(k for k, x in enumerate(item.operands) if isinstance(x, Read))
    read = item.operands[k]
    item.operands[k] = Read(replace(read.view, offset=read.view.buffer.size), read.steps)


def backwards(statements, *_):
    statements.reverse()


def other_dtype(statements, inputs, *_):
    inputs[1].dtype = torch.float16


def other_shape(statements, *_):
    p = next(s for s in statements if isinstance(s, MatrixProduct))
    p.a = View(p.a.buffer, p.a.shape[::-1], p.a.strides[::-1], p.a.offset)


def other_steps(statements, *_):
    item = next(i for s in nests(statements) for i in s.items if any(isinstance(x, Read) for x in i.operands))
    item.operands[:] = [Read(x.view, x.steps[::-1]) if isinstance(x, Read) else x for x in item.operands]


def one_place(statements, inputs, *_):
    for b in {v.buffer for s in statements for v in s.writes()}:
        b.offset = 0


def beyond_scratch(statements, *_):
    made = [v.buffer for s in statements for v in s.writes() if v.buffer.place == "scratch"]
    max(made, key=lambda b: b.offset).offset += 16


def lost_statement(statements, *_):
    statements.pop(0)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("into_pieces", beyond_bounds, "is read or written from"),
        ("into_pieces", backwards, "is read before it is written"),
        ("into_pieces", lost_statement, "is read before it is written"),
        ("place", other_dtype, r"x \[4, 6\] .* is of torch.float16, .*expected \[4, 6\] of torch.float32"),
        ("into_pieces", other_shape, r"is a factor or summand .*expected"),
        ("into_pieces", other_steps, r"at|is read along"),
        ("place", one_place, "is read where .* was written|is overwritten by|are written to one place"),
        ("place", beyond_scratch, "ends beyond the scratch memory"),
    ],
)  # fmt: skip
def test_a_broken_pass_over_schedules_is_caught(monkeypatch, name, change, says):
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    scheduled()
    monkeypatch.setattr(memory, name, after(name, change))
    with pytest.raises(BrokenSchedule, match=f"^{name}: .*({says})"):
        scheduled()
    monkeypatch.setenv("DUALFORM_VERIFY", "0")
    scheduled()  # in use nobody pays for it


@pytest.mark.parametrize(
    "f",
    [
        lambda w, x, y: (new := w.tanh(), (x + new.sum()) @ w),  # read by a later product
        lambda w, x, y: (w + w.T, x),  # read in another column
        lambda w, x, y: (w + w[:1], x),  # and in another row
        lambda w, x, y: (new := w.exp(), new.sum(1, keepdim=True) * w),  # read in a later stage of the row
        lambda w, x, y: (x.T @ x @ w, x),  # a product's factor
        lambda w, x, y: (x.T @ y + w.T, x),  # its summand, laid out otherwise
    ],
)
def test_a_state_that_is_written_over_too_soon_is_caught(monkeypatch, f):
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    scheduled(f)
    monkeypatch.setattr(memory, "_late", lambda *_: False)
    monkeypatch.setattr(memory, "_takes_place", lambda outputs, x, old: True)
    with pytest.raises(BrokenSchedule, match=r"^write_over: "):
        scheduled(f)


def test_a_product_that_writes_vectors_into_a_neighbour_is_caught(monkeypatch):
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    f = lambda w, x, y: (w, torch.cat([x @ w, y], 1))  # 6 columns are a vector of 16  # noqa: E731
    scheduled(f, over={})

    def into(statements, copies, outputs):
        product = next(s for s in statements if isinstance(s, MatrixProduct))
        copy = next(c for c in copies if c.items[0].operands[0].view.buffer is product.out.buffer)
        product.out = copy.items[0].out
        statements.remove(copy)
        statements.append(statements.pop(statements.index(product)))  # behind what it writes beside

    monkeypatch.setattr(memory, "into_pieces", into)
    with pytest.raises(BrokenSchedule, match=r"^into_pieces: .*is read before it is written"):
        scheduled(f, over={})


@pytest.mark.parametrize("n", range(len(learned)))
def test_every_schedule_is_sound(monkeypatch, n):
    """Both directions, in rows and in slices, of a whole and of a ragged block; rules and objectives in turn."""
    program = of(learned[n], aims[n % len(aims)], names[n % len(names)], 3)
    plan = program.plan(4, torch.float64, "auto")
    blocks = [(Variant(3, True, True, False), "forward"), (Variant(2, False, False, True), "backward")]
    directions = [backend.described(plan, *block) for block in blocks]
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    for d, walker in itertools.product(directions, (cpp_rows, cpp_slices)):
        walker.unit(d)


# -- tiles are where they say ------------------------------------------------------------------------------------------


def entries_of(x):
    """Which entries of its tensor, (4, 6, 5), a value in memory or parts of such are."""
    if isinstance(x, tiles.Parts):
        return torch.cat([entries_of(v) for v in x.values], x.axis)
    whole = torch.arange(120).reshape(4, 6, 5)
    strides = [0 if k is None else whole.stride(k) * step for k, step in zip(x.axes, x.steps, strict=True)]
    start = sum(s * n for s, n in zip(x.start, whole.stride(), strict=True))
    assert all(0 <= s + max([(n - 1) * step for j, n, step in zip(x.axes, x.shape, x.steps, strict=True) if j == k], default=0) < m
               for k, (s, m) in enumerate(zip(x.start, whole.shape, strict=True)))  # fmt: skip
    return whole.as_strided(x.shape, strides, start)


def drawn_view(draw, x, like):
    """A view of both."""
    r = like.ndim
    axis = draw(st.integers(-r, r - 1)) if r else 0
    kind = draw(
        st.sampled_from(
            ["permuted", "unsqueezed", "squeezed", "selected", "sliced", "expanded", "relabelled"]
            if r
            else ["unsqueezed"]
        )
    )
    if kind == "permuted":
        order = draw(st.permutations(range(r)))
        return tiles.permuted(x, order), like.permute(*order)
    if kind == "unsqueezed":
        axis = draw(st.integers(0, r))
        return tiles.unsqueezed(x, axis), like.unsqueeze(axis)
    if kind == "squeezed":
        return tiles.squeezed(x), like.squeeze()
    if kind == "selected":
        index = draw(st.integers(-like.shape[axis], like.shape[axis] - 1))
        return tiles.selected(x, axis, index), like.select(axis, index)
    if kind == "sliced":
        start, step = draw(st.integers(0, like.shape[axis] - 1)), draw(st.integers(1, 3))
        end = draw(st.integers(start + 1, like.shape[axis]))
        found = like.movedim(axis, 0)[start:end:step].movedim(0, axis)
        return tiles.sliced(x, axis, start, end, step), found
    if kind == "expanded":
        shape = [draw(st.integers(1, 2)), *(3 if n == 1 else n for n in like.shape)]
        return tiles.expanded(x, shape), like.expand(shape)
    shape = [m for n in like.shape for m in ([n] if draw(st.booleans()) else [1, n])]
    return tiles.relabelled(x, shape), like.reshape(shape)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_views_of_memory_are_torchs_views_of_it(data):
    like = torch.arange(120).reshape(4, 6, 5)
    x = tiles.Memory.whole("x", (4, 6, 5), torch.float32, False)
    if data.draw(st.booleans()):
        axis = data.draw(st.integers(0, 2))
        x, like = tiles.behind(axis, [x, tiles.permuted(x, range(3))]), torch.cat([like, like], axis)
    for _ in range(data.draw(st.integers(1, 5))):
        new, like = drawn_view(data.draw, x, like)
        if new is None:  # entries move
            return
        x = new
        assert tuple(x.shape) == tuple(like.shape)
        assert torch.equal(entries_of(x), like)

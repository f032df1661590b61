"""Printed text runs when pasted, and gives what the program gives: every learner, whatever its tensors are called."""

import ast

import pytest
import torch
from torch import nn

import dualform as df
from dualform import testing as laws
from dualform.explanations.python_text import statement
from dualform.graphs.trace import trace
from dualform.learning.printer import identifier, names_of

odd = [
    "a.w", "a_w", "0.weight", "q", "k", "v", "lr", "i", "o", "C", "x", "th", "torch", "mini_batch", "lambda", "None",
    "R", "R_q",
    "valid", "full", "o_next", "q_next", "R_q_next", "größe", "ﬁ", "fi", "w 1", "w-1", "w_1", "__", "arange", "mul",
    "1", "class", "init_q",
]  # fmt: skip


class Named(nn.Module):
    """A learner whose parameters, slow ones and buffers are called anything."""

    def __init__(self, names, slow=(), buffers=()):
        super().__init__()
        torch.manual_seed(len(names))
        self.where, self.slow = [], tuple(slow)
        for name in names:
            *path, last = name.split(".")
            home = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home._modules[part]
            if name in buffers:
                home.register_buffer("held", torch.randn(4))
                home._buffers[last] = home._buffers.pop("held")
            else:
                home._parameters[last] = nn.Parameter(torch.randn(4, 4) / 4)
            self.where.append((home, last))

    def forward(self, x):
        for home, name in self.where:
            held = home._parameters.get(name)
            x = x * home._buffers[name] if held is None else x + torch.tanh(x @ held)
        return x


def check_printed(program, seed=0):
    """The printed code of a mini-batch on drawn inputs is the program on them."""
    p = laws.draw(program, seed=seed, batch=1, heads=1, time=program.chunk)
    parts, rule, x = program.parts, program.rule, {n: t.detach() for n, t in p.tensors.items()}
    gates = {name: x["gate.offset"] if name == "offset" else x[f"gate.{name}"][0, :, 0] for name in rule.gates}
    fast = {n: x[f"param.{n}"][0] for n in parts.fast}
    others = {n: x[f"param.{n}"][0] if n in parts.slow else t for n, t in program.derivation.slow_values().items()}
    R = {n: torch.stack([s * w for s in rule.start]) for n, w in fast.items()}
    drawn = {"th": fast, "R": R, "gates": gates, "slow": others, **{n: x[n][0, :, 0] for n in "qkv"}}
    inputs = program.step.inputs
    given = []
    for part, value in inputs._asdict().items():
        if value is not None:
            given += [drawn[part][name] for name in value] if isinstance(value, dict) else [drawn[part]]
    assert len({*names_of(inputs)}) == len(given)
    scope = {}
    exec(program.code, scope)
    found = scope["mini_batch"](*given)
    found = found if isinstance(found, tuple) else (found,)
    o, state = p.run("auto")
    wanted = [o[0, :, 0], *(w[0, 0] for w in state.anchor.values()), *(r[0, 0] for r in state.registers.values())]
    for n, (a, b) in enumerate(zip(found, wanted, strict=False)):
        laws.agree(f"result {n}", a, b.detach())
    assert len(found) in (1 + len(fast), len(wanted))


def recipe(name):
    record = df.learners[name]
    needed = [n for n, default in record.options.items() if default is record.signature.empty]
    return record(**{n: "linear" if n in record.nested else 2 for n in needed})


@pytest.mark.parametrize("name", df.learners.names())
def test_every_learner_there_is(name):
    torch.manual_seed(0)
    check_printed(df.derive(recipe(name)(4).double(), rule=df.rules.SGD(lr=0.5), chunk=3))


@pytest.mark.parametrize(
    "rule", [df.rules.SGD(momentum=0.5, decay=0.1), df.rules.SGD(averaged=True)], ids=["momentum", "averaged"]
)
@pytest.mark.parametrize("objective", df.objectives.names())
def test_rules_and_objectives(rule, objective):
    torch.manual_seed(0)
    learner = df.learners.residual_norm(df.learners.MLP(depth=2, expand=2))(4).double()
    check_printed(df.derive(learner, objective, rule, chunk=3))


@pytest.mark.parametrize("names", [odd[:6], odd[6:16], odd[16:24], odd[24:]], ids=lambda names: names[0])
def test_odd_names(names):
    learner = Named(names, slow=(names[1],), buffers=(names[2],)).double()
    check_printed(df.derive(learner, rule=df.rules.SGD(momentum=0.5), chunk=2))


def test_sequential():
    torch.manual_seed(0)
    check_printed(df.derive(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), chunk=2))


def test_a_detach_and_a_number_that_is_not_finite_are_printed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            y = x @ self.W * x.detach()
            return y.masked_fill(y > 5, float("-inf")).exp()

    torch.manual_seed(0)
    program = df.derive(Masked().double(), chunk=2)
    assert "inf" in program.code
    check_printed(program)


def test_identifiers_are_apart():
    taken = set()
    found = [identifier(name, taken) for name in [*odd, *odd]]
    assert len({*found}) == len(found) == len(taken)
    for name in found:
        tree = ast.parse(f"{name} = 1").body[0]
        assert tree.targets[0].id == name


@pytest.mark.parametrize(
    "f",
    [lambda x: torch.pow(-2.0, x), lambda x: x.sum(0, keepdim=True), lambda x: (x == 1) | (x != x), lambda x: -x.T @ x, lambda x: torch.square(x).sum()],
)  # fmt: skip
def test_a_statement_runs_and_gives_what_its_op_gives(f):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    graph = trace(f, x).graph
    names = {node: node.name for node in graph.nodes}
    lines = [f"{node.name} = {statement(node, names)}" for node in graph.nodes if node.op == "call_function"]
    held = {"torch": torch, names[next(iter(graph.nodes))]: x}
    exec("\n".join(lines), held)
    (last,) = (n for n in next(iter(reversed(graph.nodes))).all_input_nodes)
    assert torch.equal(held[last.name], f(x)), lines

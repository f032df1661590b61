"""Exported files stand alone: another process runs them, for every length, whatever else was built there."""

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import dualform as df
from dualform import testing as laws
from dualform.learning import scan, shipped
from dualform.learning.grid import arrange, variants_of
from dualform.learning.state import State


class Two(nn.Module):
    """Two layers whose programs differ in a number only."""

    def __init__(self):
        super().__init__()
        rules = df.rules.SGD(lr=0.5, momentum=0.3), df.rules.SGD(lr=2.0, momentum=0.3)
        self.layers = nn.ModuleList(df.TestTimeTraining(8, 2, learner="linear", rule=rule, chunk=4) for rule in rules)

    def forward(self, x, mask=None, reset=None):
        for layer in self.layers:
            x = x + layer(x, attention_mask=mask, reset=reset)[0]
        return x


class Going(nn.Module):
    """A program that goes on with a state."""

    def __init__(self):
        super().__init__()
        self.program = df.derive(df.learners.MLP()(4).double(), rule=df.rules.SGD(momentum=0.3, decay=0.1), chunk=4)
        self.learner = self.program.learner

    def forward(self, x, anchor, registers, position):
        o, state = self.program(x, x, x.cos(), state=State(anchor, registers, position))
        return o, state.anchor, state.registers, state.position


def elsewhere(folder, code):
    """Run code in another process, which has built programs of its own before."""
    before = """
        import torch, dualform as df
        from torch import nn
        for lr in (5.0, 7.0):
            df.TestTimeTraining(8, 2, learner="linear", rule=df.rules.SGD(lr=lr, momentum=0.3), chunk=4)(torch.randn(1, 4, 8))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_runs_elsewhere_for_every_length(tmp_path):
    """Masks, resets, two programs in one file, parameters that learn: values and gradients of this process,
    to 1e-10."""
    torch.manual_seed(0)
    module = Two().double()
    T = Dim("T", min=2, max=512)
    example = (torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) > 0.3, torch.rand(2, 9) > 0.8)
    program = export(module, example, dynamic_shapes={"x": {1: T}, "mask": {1: T}, "reset": {1: T}})
    torch.export.save(program, tmp_path / "two.pt2")
    cases = []
    for length in (2, 13):
        x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
        mask, reset = torch.rand(2, length) > 0.3, torch.rand(2, length) > 0.8
        y = module(x, mask, reset)
        gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        cases.append((x.detach(), mask, reset, y.detach(), *gradients))
    torch.save(cases, tmp_path / "cases.pt")
    elsewhere(tmp_path, """
        from dualform import testing as laws
        module = torch.export.load("two.pt2").module()
        for x, mask, reset, y, *gradients in torch.load("cases.pt"):
            x.requires_grad_()
            found = module(x, mask, reset)
            laws.agree("y", found, y)
            for got, wanted in zip(torch.autograd.grad(found.square().sum(), [x, *module.parameters()]), gradients, strict=True):
                laws.agree("gradient", got, wanted)
    """)  # fmt: skip


def test_a_state_goes_on_elsewhere(tmp_path):
    """The state comes from this process, at any place in a mini-batch, and leaves the other one."""
    torch.manual_seed(0)
    module = Going()
    x = torch.randn(2, 11, 2, 4, dtype=torch.float64)
    state = module.program(x[:, :3], x[:, :3], x[:, :3])[1].detach()
    T = Dim("T", min=2, max=64)
    parts = (state.anchor, state.registers, state.position)
    shapes = (dict.fromkeys(state.anchor), dict.fromkeys(state.registers), None)
    torch.export.save(export(module, (x, *parts), dynamic_shapes=({1: T}, *shapes)), tmp_path / "going.pt2")
    apart = State(*parts[:2], torch.tensor([3, 1]))
    cases = [(x[:, :n], s.anchor, s.registers, s.position) for n in (2, 7, 11) for s in (state, apart)]
    torch.save([(c, module(*c)) for c in cases], tmp_path / "cases.pt")
    elsewhere(tmp_path, """
        from dualform import testing as laws
        from torch.utils._pytree import tree_leaves
        module = torch.export.load("going.pt2").module()
        for call, wanted in torch.load("cases.pt"):
            for n, (got, want) in enumerate(zip(tree_leaves(module(*call)), tree_leaves(wanted), strict=True)):
                laws.agree(str(n), got, want)
    """)  # fmt: skip


class Carrying(nn.Module):
    """A layer that takes and gives a state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = df.TestTimeTraining(dim=8, heads=2, chunk=2, learner=df.learners.Linear()).double()

    def forward(self, x, state):
        return self.layer(x, state=state)


def test_a_layer_s_state_goes_on_elsewhere(tmp_path):
    torch.manual_seed(0)
    module, x = Carrying(), torch.randn(2, 11, 8, dtype=torch.float64)
    state = module.layer(x[:, :3])[1].detach()
    with torch.no_grad():
        shapes = torch.export.ShapesCollection()
        shapes[x] = {1: Dim("T", min=2, max=64)}
        exported = export(module, (x, state), dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "carrying.pt2")
        y, after = module(x, state)
        torch.save([x, state.tensors(), y, after.tensors(), module(x[:, :5], after)[0]], tmp_path / "cases.pt")
    elsewhere(tmp_path, """
        import dualform as df
        from dualform import testing as laws
        from dualform.learning.layer import LayerState
        module = torch.export.load("carrying.pt2").module()
        x, before, wanted, after, further = torch.load("cases.pt")
        y, state = module(x, LayerState.of(before))
        laws.agree("y", y, wanted)
        for name, got in state.tensors().items():
            laws.agree(name, got, after[name])
        laws.agree("further", module(x[:, :5], state)[0], further)
    """)  # fmt: skip


@pytest.mark.parametrize(("strict", "frozen"), [(True, True), (False, False)])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_a_layer_whose_parameters_learn_or_do_not(strict, frozen):
    torch.manual_seed(0)
    module = Two().requires_grad_(not frozen)
    T = Dim("T", min=2, max=64)
    found = export(module, (torch.randn(1, 9, 8),), dynamic_shapes={"x": {1: T}}, strict=strict)
    assert all(f"plan{n}|" not in found.graph_module.code for n in range(1000))
    for length in (2, 9, 30):
        x = torch.randn(1, length, 8)
        laws.agree("y", found.module()(x), module(x))


def test_a_fixed_length_carries_its_own_blocks_only():
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=4)
    x = torch.randn(1, 9, 8)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    found = export(First(), (x,))
    (call,) = [n for n in found.graph.nodes if n.target is torch.ops.dualform.scan.default]
    told = shipped.read(call.args[1].partition("|")[0])
    assert {v.width for v in told.derivation.told} == {1, 4}
    with pytest.raises(ValueError, match=r"blocks of Variant\(width=2.*Export it again"):
        told.step(arrange(6, 4, torch.zeros(1), None, None, torch.float32, False).variants[-1])


def test_a_program_is_printed_out_of_sight_of_a_trace():
    program = df.derive(df.learners.Linear()(4), chunk=3)  # torch 2.11's export prints each module that it traces
    traced = make_fx(lambda x: x + len(str(program)), pre_dispatch=True, tracing_mode="fake")(torch.ones(2))
    made = [node.name for node in traced.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert made == ["x_1", "add"]


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("block", [None, 2])
def test_every_kind_of_block_is_foreseen(chunk, block):
    g = torch.Generator().manual_seed(0)
    for n in range(60):
        T, carried, masked, resets = 1 + n % 20, bool(n & 1), bool(n & 2), bool(n & 4)
        position = torch.randint(0, chunk, (2,), generator=g) if carried else torch.zeros(2, dtype=torch.long)
        position = position[:1].expand(2) if n & 8 else position
        mask = torch.rand(2, T, generator=g) > 0.4 if masked else None
        reset = torch.rand(2, T, generator=g) > 0.7 if resets else None
        grid = arrange(T, chunk, position, mask, reset, torch.float64, carried, block)
        for length in (T, None):
            assert {*grid.variants} <= {*variants_of(length, chunk, block, carried, masked, resets)}


def test_a_backend_runs_what_was_read():
    """The text is enough for generated code, too."""
    torch.manual_seed(0)
    module = Two().double()
    for layer in module.layers:
        layer.backend = "cpp"
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    found = export(module, (x,))
    laws.agree("y", found.module()(x), module(x))


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_a_graph_under_a_transform(transform):
    torch.manual_seed(0)
    module = Two().double().requires_grad_(False)
    x, dx = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    found = export(module, (x,)).module()
    run = {
        "jvp": lambda f: torch.func.jvp(f, (x,), (dx,))[1],
        "vmap": lambda f: torch.vmap(f)(torch.stack([x, dx])),
        "grad": lambda f: torch.func.grad(lambda x: f(x).sin().sum())(x),
    }[transform]
    laws.agree(transform, run(found), run(module))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"Use torch\.func\.jvp"):
        found(torch.autograd.forward_ad.make_dual(x, dx))


def test_gradients_outlive_the_program():
    """What a program holds lives as long as its autograd graph, and as long as what was compiled of it."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(keep):
        program = df.ChunkProgram(
            df.learners.MLP()(4).double(), df.objectives.Squared().build(), df.rules.SGD().build(), 3
        )
        params = {n: p.detach() * 0 + 0.1 for n, p in program.parts.fast.items()}
        o, state = program(x, x, x, params=params)
        keep.append(program)
        return o.square().sum() + sum(w.sum() for w in state.anchor.values())

    kept = []
    (wanted,) = torch.autograd.grad(run(kept), x)
    loss = run([])
    gc.collect()
    laws.agree("gradient", torch.autograd.grad(loss, x, retain_graph=True)[0], wanted)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    laws.agree("gradient that is differentiated again", first, wanted)
    first.square().sum().backward()
    name = kept[0].name
    kept.clear()
    del loss, first
    gc.collect()
    assert name not in scan._sources


def test_gradients_are_those_of_the_call_whatever_the_learner_becomes():
    """What changes a program after a call does not reach that call's graph."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.scale = nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), 1.0

        def forward(self, x):
            return torch.tanh(x @ self.W * self.scale)

    torch.manual_seed(0)
    program = df.derive(Scaled(), chunk=3)
    x = torch.randn(2, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(program(x, x, x)[0].sin().sum(), x)
    loss = program(x, x, x)[0].sin().sum()
    program.learner.scale = 3.0
    (other,) = torch.autograd.grad(program(x, x, x)[0].sin().sum(), x)
    assert not torch.allclose(other, wanted)
    laws.agree("gradient", torch.autograd.grad(loss, x, retain_graph=True)[0], wanted)
    laws.agree("gradient", torch.autograd.grad(loss, x, create_graph=True)[0].detach(), wanted)


def test_a_compiled_backward_outlives_the_program():
    torch._dynamo.reset()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)

    def run():
        torch.manual_seed(0)
        layer = df.TestTimeTraining(8, 2, learner="linear", chunk=4).double()
        return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0].square().sum(), layer(x)[
            0
        ].square().sum()

    compiled, plain = run()
    (wanted,) = torch.autograd.grad(plain, x)
    del plain
    torch._dynamo.reset()
    gc.collect()
    laws.agree("gradient", torch.autograd.grad(compiled, x)[0], wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["test_time", "sliding_attention"])
def test_models_of_any_length(kind, masked):
    torch.manual_seed(0)
    config = df.DualformConfig(preset="tiny-ttt-linear", num_hidden_layers=1, layer_types=[kind], sliding_window=5)
    model = df.DualformForCausalLM(config).eval()
    T = Dim("T", min=2, max=64)
    names = ["input_ids", *(["attention_mask"] if masked else [])]
    example = {name: torch.randint(1, 2, (2, 13)) for name in names} | {"use_cache": False}
    shapes = {name: {1: T} for name in names} | {"use_cache": None}
    found = export(model, (), example, dynamic_shapes=shapes).module()
    for length in (3, 21):
        given = {"input_ids": torch.randint(3, 259, (2, length)), "use_cache": False}
        mask = torch.rand(2, length) > 0.3 * masked  # what padding says is not defined
        if masked:
            given["attention_mask"] = mask.long()
        laws.agree("logits", found(**given).logits[mask], model(**given).logits[mask])


class Tempered(nn.Module):
    """An objective whose part holds what it learns."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4))

    def forward(self, prediction, target):
        return (self.parts(prediction) - target).square().sum(-1)


class Moded(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.3 * torch.randn(4, 4))

    def forward(self, x):
        return (x @ self.W) * (2 if self.training else 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("of", ["program", "layer"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_a_file_holds_the_weights_as_weights(of, strict):
    """They have gradients there, other ones may be loaded, and what an objective learns is among them."""
    torch.manual_seed(0)
    program = df.derive(Moded(), Tempered(), df.rules.SGD(lr=0.1), chunk=4)
    layer = df.TestTimeTraining(8, 2, learner=lambda _: Moded(), objective=Tempered(), chunk=4)
    module, given = (program, [torch.randn(2, 9, 2, 4)] * 3) if of == "program" else (layer, [torch.randn(2, 9, 8)])
    module.double()
    given = [x.double() for x in given]
    T = Dim("T", min=2, max=64)
    made = export(module, tuple(given), dynamic_shapes=({1: T},) * len(given), strict=strict).module()
    assert "objective.parts.0.weight" in dict(made.named_parameters())
    other = {name: x + 0.1 * torch.randn_like(x) for name, x in module.state_dict().items()}
    for one in (made, module):
        one.load_state_dict(other)
    shorter = [x[:, :5] for x in given]
    (got, wanted) = (call(*shorter)[0] for call in (made, module))
    laws.agree("o", got, wanted)
    names = [name for name, p in module.named_parameters() if "post_norm.bias" not in name]
    for name in names:
        parameters = made.get_parameter(name), module.get_parameter(name)
        found = [
            torch.autograd.grad(o.square().sum(), p, retain_graph=True)[0]
            for o, p in zip((got, wanted), parameters, strict=True)
        ]
        laws.agree(name, *found)


def test_a_mode_that_changed_is_exported_and_the_program_goes_on():
    torch.manual_seed(0)
    program, x = df.derive(Moded().double(), chunk=4), torch.randn(2, 9, 2, 4).double()
    program(x, x, x)
    program.eval()
    got = export(program, (x, x, x)).module()(x, x, x)[0]
    laws.agree("o", got, program(x, x, x)[0])
    laws.agree("definition", got, program(x, x, x, form="primal")[0])

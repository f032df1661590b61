"""torch.compile takes a layer whole, compiles it a few times for all lengths, and changes no number."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import dualform as df
from dualform import testing as laws


@pytest.fixture
def layer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    learner = df.learners.residual_norm(df.learners.MLP(depth=2, expand=2))
    return df.TestTimeTraining(8, 2, learner=learner, chunk=16, rule=df.rules.SGD(lr=0.5, averaged=True)).double()


def results(call, layer, x):
    """y and every gradient of a scalar of it."""
    x = x.detach().requires_grad_()
    y, _ = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def test_lengths_share_compilations(layer):
    """T in 1, 7, 64, 65: whole graphs, at most 2 recompilations, values and gradients those of eager mode."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (1, 7, 64, 65):
        x = torch.randn(2, T, 8, dtype=torch.float64)
        for n, (got, wanted) in enumerate(zip(results(compiled, layer, x), results(layer, layer, x), strict=True)):
            laws.agree(f"T {T}, result {n}", got, wanted)
    assert counter.frame_count <= 3


def test_the_state_is_carried(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    with torch.no_grad():
        whole, after = layer(x)
        state, outputs = None, []
        for part in x.split([16, 4, 1], 1):
            y, state = compiled(part, state)
            outputs.append(y)
    laws.agree("y", torch.cat(outputs, 1), whole)
    for name, t in after.tensors().items():
        laws.agree(name, state.tensors()[name], t)


def test_masks_and_resets_compile(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask, reset = torch.rand(2, 9) > 0.3, torch.rand(2, 9) > 0.8
    with torch.no_grad():
        got, wanted = (call(x, attention_mask=mask, reset=reset)[0] for call in (compiled, layer))
    laws.agree("y", got, wanted)


def test_ragged_rows_compile_with_gradients(layer):
    """The gradients of a gather lie otherwise in memory than a slice's; the compiled graph must know how."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask, reset = torch.rand(2, 21) > 0.3, torch.rand(2, 21) > 0.8

    def both(x):
        return [call(x, attention_mask=mask, reset=reset)[0] for call in (compiled, layer)]

    x = torch.randn(2, 21, 8, dtype=torch.float64, requires_grad=True)
    got, wanted = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in both(x))
    for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
        laws.agree(f"gradient {n}", a, b)


def test_a_program_compiles_for_sizes_that_vary():
    """dynamic=True takes the width for one that varies too, where a program is called on its inputs themselves."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    program = df.derive(df.learners.MLP(expand=2)(4).double(), rule=df.rules.SGD(lr=0.1), chunk=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, fullgraph=True, backend=counter, dynamic=True)
    for B, T, H in ((2, 6, 3), (3, 9, 2), (2, 13, 4)):
        given = [torch.randn(B, T, H, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
        got, wanted = (torch.autograd.grad(call(*given)[0].square().sum(), given) for call in (compiled, program))
        for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
            laws.agree(f"B {B}, T {T}, H {H}, gradient {n}", a, b)
    assert counter.frame_count <= 2


class Scaled(nn.Module):
    """A learner with everything that may change under a compiled graph."""

    def __init__(self):
        super().__init__()
        self.W, self.gain, self.slow = nn.Parameter(0.3 * torch.randn(4, 4)), nn.Parameter(torch.ones(4)), ("gain",)
        self.register_buffer("shift", torch.ones(4))
        self.scale = 1.0

    def forward(self, x):
        return (x @ self.W) * self.gain * self.scale * (2 if self.training else 1) + self.shift


class Weighted(nn.Module):
    """An objective with parameters of its own, one of them inside a part."""

    def __init__(self):
        super().__init__()
        self.t, self.parts = nn.Parameter(1.1 * torch.ones(4)), nn.Sequential(nn.Linear(4, 4))

    def forward(self, prediction, target):
        return ((self.parts(prediction) - target) * self.t).square().sum(-1)


@pytest.fixture
def program():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return df.derive(Scaled().double(), Weighted().double(), df.rules.SGD(lr=0.1), chunk=4)


qkv = [torch.randn(2, 7, 2, 4, dtype=torch.float64) for _ in "qkv"]


def compiled_on(program):
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    compiled(*qkv)
    return compiled


def others(program):
    """Other values of all that a program holds."""
    held = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    return {name: (x + 0.1 * torch.randn_like(x)).detach() for name, x in held.items()}


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_into_a_compiled_program(program, assign):
    compiled = compiled_on(program)
    program.load_state_dict(others(program), assign=assign)
    laws.agree("o", compiled(*qkv)[0], program(*qkv)[0])


def test_weights_that_are_arguments_of_a_compiled_function(program):
    given = {name: x.requires_grad_() for name, x in others(program).items()}
    call = torch.compile(lambda p: functional_call(program, p, tuple(qkv))[0], fullgraph=True, backend="aot_eager")
    results = [[o, *torch.autograd.grad(o.square().sum(), list(given.values()))] for o in (
        call(given), functional_call(program, given, tuple(qkv))[0],
    )]  # fmt: skip
    for name, got, wanted in zip(("o", *given), *results, strict=True):
        laws.agree(name, got, wanted)


@pytest.mark.parametrize("of", ["program", "layer"])
def test_a_mode_that_changes_is_compiled_anew(program, of):
    layer = df.TestTimeTraining(8, 2, learner=lambda _: Scaled(), chunk=4).double()
    module, given = (program, qkv) if of == "program" else (layer, [torch.randn(2, 7, 8, dtype=torch.float64)])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in (True, False, True):  # the compiled one first: nothing else has read the mode
        got = compiled.train(mode)(*given)[0]
        laws.agree(f"training {mode}", got, module(*given)[0])


def test_what_changed_before_it_is_compiled(program):
    program(*qkv)
    program.learner.scale = 3.0
    laws.agree("o", compiled_on(program)(*qkv)[0], program(*qkv)[0])


def test_what_a_compiled_graph_cannot_follow_is_refused(program):
    compiled = compiled_on(program)
    program.learner.scale = 3.0
    with pytest.raises(df.DerivationError, match=r"learner, objective or rule changed after torch\.compile"):
        compiled(*qkv)
    program.learner.scale = 1.0
    laws.agree("o", compiled(*qkv)[0], program(*qkv)[0])


def test_a_tensor_that_is_replaced_under_a_compiled_graph():
    torch._dynamo.reset()
    held = [torch.rand(4, dtype=torch.float64)]

    def objective(prediction, target):
        return ((prediction - target) * held[0]).square().sum(-1)

    program = df.derive(nn.Linear(4, 4).double(), objective, df.rules.SGD(lr=0.1), chunk=4)
    compiled = compiled_on(program)
    held[0].mul_(2)
    laws.agree("in place", compiled(*qkv)[0], program(*qkv)[0])
    held[0] = torch.rand(4, dtype=torch.float64)
    with pytest.raises(df.DerivationError, match=r"objective\.\S+ changed after torch\.compile"):
        compiled(*qkv)

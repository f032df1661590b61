"""torch.compile takes a layer whole, compiles it a few times for all lengths, and changes no number."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

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

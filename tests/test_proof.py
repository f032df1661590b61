"""The proof at `derive`: what it compares, what it says, what it refuses, what it remembers. On here alone."""

import dataclasses
import json
import re
import threading

import pytest
import torch
from torch import nn

import dualform as df
from dualform.graphs.kept import stop_gradient
from dualform.learning import emit, program
from dualform.learning import proof as proving
from dualform.learning.backends import BackendError
from dualform.learning.derive import undisturbed

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _on(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    forget(monkeypatch)


def forget(monkeypatch):
    """As a fresh process: nothing but the disk remembers."""
    for name in ("_programs", "_structures", "_proved"):
        monkeypatch.setattr(program, name, program.Bounded(64))


class Net(nn.Module):
    dim = 4

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.A, self.B = (nn.Parameter(0.5 * torch.randn(4, 4, generator=g).to(dtype)) for _ in "AB")

    def forward(self, x):
        return torch.tanh(x @ self.A) @ self.B


@pytest.mark.parametrize("name", df.learners.names())
def test_every_learner_of_the_catalogue_is_proved(name):
    given = {"LowRank": {"rank": 2}, "residual_norm": {"spec": "linear"}}
    learner = df.learners[name](**given.get(name, {}))(4)
    found = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3).proof
    assert found is not None
    assert found.error < 1e-12
    assert found.dtype == "float64"
    assert not found.remembered
    assert not found.unproved
    parts = {*dict(learner.named_parameters())} | {"q", "k", "v", "the gate lr"}
    assert {f"the gradient of {n}" for n in parts} <= {*found.compared}
    assert "the outputs" in found.compared


@pytest.mark.parametrize(
    "rule",
    [
        df.rules.SGD(lr=0.5, averaged=True),
        df.rules.SGD(lr=0.1, momentum=0.9),
        df.rules.SGD(lr=0.1, decay=0.1),
        df.rules.SGD(lr=0.1, momentum=0.5, decay=0.1),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5])
def test_every_rule_is_proved(rule, chunk):
    found = df.derive(Net(), rule=rule, chunk=chunk).proof
    assert found.error < 1e-12
    assert not found.unproved


def test_long_mini_batches_are_proved_in_blocks():
    found = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=70).proof
    assert found.error < 1e-12
    assert not found.unproved


def plant(monkeypatch, fault):
    real = emit.Emitter._corrected
    monkeypatch.setattr(
        emit.Emitter, "_corrected", lambda self, node, leaf, *rest: fault(real, self, node, leaf, *rest)
    )


def test_a_wrong_form_raises_with_what_how_much_and_the_line(monkeypatch):
    plant(
        monkeypatch,
        lambda real, self, node, leaf, *rest: (
            1.001 * real(self, node, leaf, *rest) if leaf == "B" and node else real(self, node, leaf, *rest)
        ),
    )
    with pytest.raises(
        df.DerivationError, match=r"form 'auto' and the definition differ in .* by .* of its largest entry"
    ) as caught:
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)
    assert re.search(r"at return torch\.tanh\(x @ self\.A\) @ self\.B   \(test_proof\.py:\d+\)", str(caught.value))
    assert df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3, prove=False).proof is None


def test_a_wrong_gradient_alone_is_found(monkeypatch):
    """Outputs and state are right; one outer gradient is off by a millionth."""

    def fault(real, self, node, leaf, y, *rest):
        y = real(self, node, leaf, y, *rest)
        return y + 1e-6 * (y - stop_gradient(y)) if leaf == "A" else y

    plant(monkeypatch, fault)
    with pytest.raises(df.DerivationError, match=r"differ in the gradient of"):
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)


def test_a_fault_of_ragged_blocks_alone_is_found(monkeypatch):
    def fault(real, self, node, leaf, y, J, axis, x, coef, keys):
        return real(self, node, leaf, y, J, axis, x, coef, keys) * (1.0 if self.variant.dense else 1.01)

    plant(monkeypatch, fault)
    with pytest.raises(df.DerivationError, match=r"differ in"):
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("row", "head"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_fault_of_any_row_and_head_is_found(monkeypatch, row, head, ragged):
    """The definition follows half of them to the end: the first tokens of the others tell."""
    real, wrong = proving.Drawn.run, []

    def run(self, program, form, **options):
        o, state = real(self, program, form, **options)
        if form == "primal" or (self.mask is not None) != ragged:
            return o, state
        wrong.append(o := o.clone())
        o[row, :, head] *= 1 + 1e-6
        return o, state

    monkeypatch.setattr(proving.Drawn, "run", run)
    with pytest.raises(df.DerivationError, match="differ in"):
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)
    assert wrong


@pytest.mark.parametrize(("row", "head"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_fault_of_the_state_of_any_row_and_head_is_found(monkeypatch, row, head):
    real = proving.Drawn.run

    def run(self, program, form, **options):
        o, state = real(self, program, form, **options)
        if form == "primal":
            return o, state
        wrong = {name: x.clone() for name, x in state.anchor.items()}
        for x in wrong.values():
            x[row, head] *= 1 + 1e-6
        return o, dataclasses.replace(state, anchor=wrong)

    monkeypatch.setattr(proving.Drawn, "run", run)
    with pytest.raises(df.DerivationError, match="differ in"):
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)


def test_what_differs_where_the_definition_was_followed_is_followed_to_the_end(monkeypatch):
    seen, real = [], proving.Drawn.defined
    monkeypatch.setattr(
        proving.Drawn, "defined", lambda self, program: seen.append(dict(self.reach)) or real(self, program)
    )
    assert df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).proof.error < 1e-12
    assert len(seen) == 2
    assert [sorted(n.values()) for n in seen] == [[2, 2, 6, 6], [4, 4, 7, 7]]
    forget(monkeypatch)
    plant(monkeypatch, lambda real, self, *args: 1.001 * real(self, *args))
    seen.clear()
    with pytest.raises(df.DerivationError, match="differ in"):
        df.derive(Net(), rule=df.rules.SGD(lr=0.2), chunk=3)
    assert [*seen[-1].values()] == [6] * 4


def test_it_is_remembered_on_disk_and_proved_again_where_that_cannot_be_read(monkeypatch, tmp_path):
    first = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).proof
    (file,) = (tmp_path / "proofs").glob("*.json")
    assert json.loads(file.read_text())["error"] == first.error
    forget(monkeypatch)
    second = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).proof
    assert second.remembered
    assert second.error == first.error
    assert second.compared == first.compared
    for text in ("", "{", "[1]", '{"form": 1}'):
        forget(monkeypatch)
        file.write_text(text)
        assert not df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).proof.remembered
    forget(monkeypatch)
    assert not df.derive(Net(), rule=df.rules.SGD(lr=0.2), chunk=3).proof.remembered  # another structure


def test_a_folder_that_takes_nothing_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path / "file"))
    assert df.derive(Net(), chunk=3).proof.error < 1e-12


def test_a_structure_is_proved_once_for_all_layers_alike(monkeypatch):
    count = []
    real = proving.prove
    monkeypatch.setattr(proving, "prove", lambda *args: count.append(1) or real(*args))
    layers = [df.TestTimeTraining(8, 2, learner=lambda d: Net(), chunk=3) for _ in range(3)]
    assert len(count) == 1
    assert all(layer.program.proof.error < 1e-12 for layer in layers)


def test_forced_forms_are_proved_at_their_first_use():
    made, x = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3), torch.randn(1, 5, 1, 4)
    assert set(made.proofs) == {"auto"}
    made(x, x, x, form="dual")
    assert made.proofs["dual"].error < 1e-12


def test_what_is_not_proved_is_said():
    still = df.derive(Net(), rule=df.rules.SGD(lr=0.0), chunk=3)
    assert "which moves the outputs by 0 % only" in str(still.proof)
    assert "not proved: how the state learns" in str(still.explain())

    class Spare(Net):
        def __init__(self):
            super().__init__()
            self.C = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return super().forward(x) + 0 * self.C

    assert df.derive(Spare(), rule=df.rules.SGD(lr=0.1), chunk=3).proof.unproved == ("C, whose gradients are all zero",)

    class InPlace:
        def __call__(self, p, v):
            d = p - v
            d.mul_(d)
            return 0.5 * d.sum(-1)

    cannot = df.derive(Net(), InPlace(), df.rules.SGD(lr=0.1), chunk=3).proof
    assert not cannot.compared
    assert "the definition cannot run: RuntimeError: one of the variables needed for gradient" in str(cannot)


def test_what_cannot_be_float64_is_proved_as_it_is():
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))

    class Single(Net):
        def forward(self, x):
            return super().forward(x) @ table

    found = df.derive(Single(), rule=df.rules.SGD(lr=0.1), chunk=3).proof
    assert found.dtype == "float32"
    assert found.error < 1e-3
    assert df.derive(Net(DOUBLE), rule=df.rules.SGD(lr=0.1), chunk=3).proof.error < 1e-12


def test_the_smallest_number_of_a_dtype_may_stand_in_a_trace():
    class Eps(Net):
        def forward(self, x):
            y = super().forward(x)
            return y / (y.square().mean(-1, keepdim=True) + 1e4 * torch.finfo(x.dtype).eps).sqrt()

    assert df.derive(Eps(), rule=df.rules.SGD(lr=0.1), chunk=3).proof.error < 1e-12


def test_a_domain_is_kept():
    class Logs(Net):
        def forward(self, x):
            return (x @ self.A.abs().log().tanh()) @ self.B.square().sqrt()

    found = df.derive(Logs(), rule=df.rules.SGD(lr=0.01), chunk=3).proof
    assert found.error < 1e-9


def test_it_runs_whatever_the_caller_has_switched_on():
    with torch.no_grad():
        assert df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=2).proof.error < 1e-12
    with torch.inference_mode():
        assert df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).proof.error < 1e-12
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=4).proof.error < 1e-12
    with torch.device("meta"):
        learner = Net()
    assert df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=5).proof.error < 1e-12
    torch.manual_seed(3)
    state = torch.get_rng_state()
    df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=6)
    assert torch.equal(state, torch.get_rng_state())


def test_explain_says_it_in_a_line(monkeypatch):
    made = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3)
    assert re.search(
        r"proof +auto == primal to \d\.\de-\d\d \(float64; \d+ tensors, outer gradients among them; in",
        str(made.explain()),
    )
    monkeypatch.setenv("DUALFORM_PROVE", "0")
    forget(monkeypatch)
    assert "proof    none: prove=False, or DUALFORM_PROVE=0" in str(
        df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=3).explain()
    )


def call(made, T=40, grad=True):
    x = torch.randn(2, T, 2, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)
    o, state = made(x, x, x, backend="cpp")
    if grad:
        o.sum().backward()
    return o, state


def test_a_generated_kernel_is_compared_with_eager_at_its_first_use(monkeypatch, tmp_path):
    made = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=4)
    before = len([*(tmp_path / "proofs").glob("*.json")])
    call(made)
    first = len([*(tmp_path / "proofs").glob("*.json")])
    assert first == before + 2  # forward and backward
    call(made)
    _, state = call(made, T=38)  # a tail: another kind of block
    assert len([*(tmp_path / "proofs").glob("*.json")]) == first + 2
    x = torch.randn(2, 1, 2, 4)
    with torch.no_grad():
        for _ in range(3):
            _, state = made(x, x, x, state=state, backend="cpp")
    assert len([*(tmp_path / "proofs").glob("*.json")]) > first + 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_kernel_is_refused(monkeypatch, direction):
    from dualform.kernels import backend

    real = getattr(backend._Sequence, direction)
    monkeypatch.setattr(
        backend._Sequence,
        direction,
        lambda self, *args: [1.01 * x if x.is_floating_point() else x for x in real(self, *args)],
    )
    made = df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=4)
    with pytest.raises(BackendError, match=r"cpp: its code and eager differ in .* by 0\.01 of the largest entry"):
        call(made)
    x = torch.randn(2, 6000, 2, 4)
    forget(monkeypatch)
    if direction == "forward":
        with pytest.warns(UserWarning, match="cpp: its code and eager differ"):
            df.derive(Net(), rule=df.rules.SGD(lr=0.1), chunk=4)(
                x.repeat(1, 60, 1, 1), x.repeat(1, 60, 1, 1), x.repeat(1, 60, 1, 1)
            )


def test_layers_and_language_models_are_proved_unless_told(tmp_path):
    pytest.importorskip("transformers")
    config = df.DualformConfig(preset="tiny-ttt-linear", num_hidden_layers=2)
    for make in (df.DualformForCausalLM, df.DualformModel, df.DualformForSequenceClassification):
        found = [m.program.proof for m in make(config).modules() if isinstance(m, df.TestTimeTraining)]
        assert [p.error < 1e-9 for p in found] == [True, True]
        found = [m.program.proof for m in make(config, prove=False).modules() if isinstance(m, df.TestTimeTraining)]
        assert found == [None, None]
    df.DualformForCausalLM(config).save_pretrained(tmp_path / "model")
    loaded = df.DualformForCausalLM.from_pretrained(tmp_path / "model", prove=False)
    assert all(m.program.proof is None for m in loaded.modules() if isinstance(m, df.TestTimeTraining))
    assert "prove" not in loaded.config.to_dict()


def test_a_layer_that_changes_its_type_is_proved_again_and_runs():
    layer = df.TestTimeTraining(8, 2, learner=lambda d: Net(), chunk=3)
    x = torch.randn(1, 7, 8)
    layer(x)
    y, _ = layer.double()(x.double())
    assert y.dtype == DOUBLE
    assert {k[1] for k in layer.program.plans} == {torch.float32, DOUBLE}
    assert all(plan.derivation.source is None for plan in layer.program.plans.values())


def test_a_backward_on_a_thread_of_autograds_waits_for_nobody():
    """As a GPU's is: the proof holds the tracers' lock, and autograd's thread traces what the backward needs."""
    program = df.derive(Net(), chunk=3, prove=False)
    x = torch.randn(1, 4, 1, 4, requires_grad=True)

    def proved():
        o, _ = program(x, x, x)
        thread = threading.Thread(target=lambda: o.sum().backward(), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "the backward waits for a lock that whoever waits for it holds"

    undisturbed(proved, role="holds")
    assert x.grad is not None


class Loss(nn.Module):
    """A loss with weights of its own, in single precision."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, prediction, target):
        return (self.scale * (self.head(prediction) - target)).square().sum(-1)


def test_gradients_in_single_precision_of_a_loss_are_compared_to_its_digits():
    """The definition sums them token by token in float32: no other digits than those can agree."""
    torch.manual_seed(0)
    learner, loss, rate = Net(), Loss(), nn.Parameter(torch.tensor(0.3))
    rule = df.Rule(lambda i, lr: df.Step(((1.0,),), (lr * rate.exp(),), (1.0,), 1.0))
    found = df.derive(learner, loss, rule, chunk=3).proof
    named = {f"the gradient of {n}" for n in ("objective.weight", "objective.bias", "objective.scale", "rule.rate")}
    assert named <= {*found.compared}
    assert not found.unproved
    assert found.error < 1e-5


@pytest.mark.parametrize("prove", [True, False])
def test_what_lies_on_the_meta_device_is_derived_and_has_no_proof(prove):
    """Shapes are all that a trace needs; numbers are asked for at the call, by name, and proved when they are there."""
    rule = df.rules.SGD(lr=0.1)
    with torch.device("meta"):
        learner, loss, table = Net(), Loss(), torch.ones(4)
    x, away = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4, device="meta")
    step = df.Rule(lambda i, lr: df.Step(((1.0,),), (lr * table[0],), (1.0,), 1.0))
    closed = df.derive(learner, lambda p, v: ((p - v) * table).square().sum(-1), step, chunk=3, prove=prove)
    assert closed(away, away, away)[0].is_meta
    for own in (learner, Net()):
        program = df.derive(own, loss, rule, chunk=3, prove=prove)
        assert program(away, away, away)[0].is_meta
        assert str(program.proof) == (
            "auto not proved: 'objective.weight' is on the meta device, where it has no numbers" if prove else "None"
        )
        with pytest.raises(
            ValueError, match=r"is on meta, where it has no numbers; expected q's device = cpu. Give it"
        ):
            program(x, x, x)
        assert not list(proving.cache_folder().rglob("*.json"))
    loaded = Loss()
    loss.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    expected = df.derive(own, loaded, rule, chunk=3)(x, x, x)[0]
    torch.testing.assert_close(program(x, x, x)[0], expected, rtol=0, atol=0)
    assert not prove or program.proof.compared


def test_a_layer_is_built_on_the_meta_device_with_a_loss_of_its_own():
    def build():
        torch.manual_seed(0)
        return df.TestTimeTraining(8, 2, learner="linear", objective=Loss(), rule="sgd", chunk=4)

    with torch.device("meta"):
        layer = build()
    x, there = torch.randn(2, 9, 8), build()
    assert layer(x.to("meta"))[0].is_meta
    layer.to_empty(device="cpu").load_state_dict(there.state_dict())
    torch.testing.assert_close(layer(x)[0], there(x)[0], rtol=0, atol=0)
    assert layer.program.proof.compared

"""What was seen right on a card: recorded by the card's tests, read by `auto`, by text, launch and types."""

import json

import pytest
import torch
from launched import launched
from test_laws import built_in, rules
from test_triton import shifted

import dualform as df
from dualform.kernels import triton_backend, triton_choice, triton_seen
from dualform.learning import backends, proof
from dualform.learning.backends import chosen_in_words

CPU = torch.device("cpu")


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run both directions, states kept or computed again, and without gradients; as on a card with its own record."""
    monkeypatch.setattr(triton_seen, "RECORD", tmp_path / "seen.json")
    (tmp_path / "seen.json").write_text("{}")
    triton_seen.seen.cache_clear()
    monkeypatch.setattr(triton_backend._Rows, "suits", lambda self, plan, call: True)

    def run(backend="auto", prove=False, dtype=torch.float32, steps=False):
        monkeypatch.setenv("DUALFORM_PROVE", str(int(prove)))
        monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
        torch.manual_seed(0)
        program = df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=prove)
        plan = program.plan(4, torch.float32, "auto")
        plan.natives.made.clear()
        plan.natives.checked.clear()
        x = [torch.randn(3, 6, 1, 4, dtype=dtype).requires_grad_() for _ in range(3)]
        found = []
        for remat in ("auto", 2):
            o, _ = program(*x, backend=backend, remat=remat)
            found += [o, *torch.autograd.grad(o.square().sum(), x)]
        with torch.no_grad():
            o, state = program(*x, backend=backend)
            found.append(o)
            for over in (False, True) * steps:
                o, state = program(*(y[:, :1] for y in x), state=state, backend=backend, overwrite=over)
                found.append(o)
        return found, plan

    yield run
    triton_seen.seen.cache_clear()


def compared(monkeypatch):
    """Collect what is compared with eager."""
    found, kernel = [], proof.kernel
    monkeypatch.setattr(proof, "kernel", lambda structure, words, f: found.append(words) or kernel(structure, words, f))
    return found


def test_what_was_recorded_is_taken_without_a_comparison(call, monkeypatch):
    """With prove=False too; nothing else is, which `explain` says."""
    asked = compared(monkeypatch)
    with launched() as ran:
        right, plan = call("triton", steps=True)
    assert ran
    with launched() as none:
        assert all(map(torch.equal, call(steps=True)[0], call("eager", steps=True)[0]))
    assert not none
    triton_seen.write(CPU, ran)
    for prove in (False, True):
        with launched() as again:
            found, plan = call(prove=prove, steps=True)
        assert again == ran
        assert all(map(torch.equal, found, right))
        assert not asked
        assert all(x.seen for x in plan.natives.of(triton_backend.Compiled).made.values())


@pytest.mark.parametrize("change", ["launch", "types", "text", "one kernel fewer", "another Triton"])
def test_what_is_otherwise_is_not_known(call, monkeypatch, change):
    """Nor is a direction of which one kernel is not."""
    with launched() as ran:
        call("triton")
    if change == "one kernel fewer":
        ran = set(sorted(ran)[1:])
    triton_seen.write(CPU, ran)
    assert json.loads(triton_seen.RECORD.read_text()) == {triton_seen.architecture(CPU): sorted(ran)}
    if change == "launch":
        monkeypatch.setattr(triton_choice, "WARPS", ((1 << 40, 16),))
    elif change == "text":
        monkeypatch.setattr(triton_backend, "written", changed(triton_backend.written))
    elif change == "another Triton":
        monkeypatch.setattr(triton_seen, "architecture", lambda device: "cpu, Triton 99")
        triton_seen.seen.cache_clear()
    asked = compared(monkeypatch)
    with launched() as again:
        call(dtype=torch.bfloat16 if change == "types" else torch.float32)
    assert not again - ran
    assert len(again) < len(ran)
    call(prove=True, dtype=torch.bfloat16 if change == "types" else torch.float32)
    assert asked


def changed(written):
    def other(*words, **more):
        found = written(*words, **more)
        every = {k: [backends.replace(x, text=x.text + "# another\n") for x in some] for k, some in found.items()}
        return every

    return other


def test_explain_says_what_was_seen_and_what_was_compiled_only(call, monkeypatch):
    _, plan = call("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_backend.triton_launch, "lack", lambda device: "")
    monkeypatch.setattr(triton_seen, "architecture", lambda device: "sm_90, Triton 3.6.0, ptxas 12.9")
    words = chosen_in_words(plan)
    for part in (
        "made: forward, reverse + advance, compiled only",
        "where the record of sm_90, Triton 3.6.0, ptxas 12.9 has it",
    ):
        assert part in words

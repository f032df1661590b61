"""What keeps generated Triton from running is said, with the way on; `auto` goes on with eager, and nothing is lost.

Forced without a card or Triton, types and ops that it has not, too little shared memory, no memory, a compile that is
killed, what another Triton or driver left behind, and caches that cannot be read.
"""

import builtins
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_laws import built_in, rules
from test_triton import LogGamma, shifted, squared

import dualform as df
from dualform.kernels import triton_backend, triton_launch, triton_seen, triton_trial
from dualform.learning import proof
from dualform.learning.backends import BackendError, backend_of, backends
from dualform.ops.table import ENTRIES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
triton = pytest.importorskip("triton")


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """A program, and what calls it: with a check of first uses, and `auto` that takes Triton wherever it may."""
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setattr(triton_backend._Rows, "suits", lambda self, plan, call: True)
    monkeypatch.setattr(backends, "names", lambda: ("triton", "eager"))
    torch.manual_seed(0)
    program = df.derive(built_in[6](4), shifted, rules["averaged"], chunk=2, prove=True)
    natives = program.plan(4, torch.float32, "auto").natives
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))  # of kernels alone
    x = [torch.randn(2, 5, 1, 4) for _ in range(3)]

    def forget():
        natives.made.clear()
        natives.checked.clear()
        natives.refused = ""
        natives.instead.clear()

    def call(backend="triton"):
        return program(*x, backend=backend)[0]

    forget()
    yield SimpleNamespace(call=call, forget=forget, natives=natives, proofs=tmp_path / "proofs")
    forget()


def goes_on(ask, match):
    """Forced, it is refused at every call; `auto` says so once, and is eager."""
    for _ in range(2):
        with pytest.raises(BackendError, match=match):
            ask.call()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*The calls of this program try backend=")  # the rest of the short list
        with pytest.warns(UserWarning, match=rf"{match}.*The calls of this program run on backend='eager'\."):
            found = ask.call("auto")
    assert torch.equal(found, ask.call("eager"))
    assert torch.equal(ask.call("auto"), found)


def test_without_triton(ask, monkeypatch):
    real = builtins.__import__

    def none(name, *words, **more):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", none)
    goes_on(ask, r"triton: the package is not installed .*; expected triton, which torch for CUDA brings\. Install it")


def test_without_a_card(ask, monkeypatch):
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    goes_on(ask, r"triton: q is on cpu; expected a CUDA device.*backend='auto', or move it")


@pytest.mark.parametrize(
    ("version", "capability", "match"),
    [
        ("3.3.1", (9, 0), r"its version is 3\.3\.1; expected >= 3\.4"),
        ("3.9.0", (7, 5), r"compute capability is 7\.5; expected >= 8\.0"),
    ],
)
def test_an_old_card_and_an_old_triton(version, capability, match, monkeypatch):
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    triton_launch.lack.cache_clear()
    try:
        card = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda", 0)), dtype=torch.float32)
        whole = backend_of("triton").whole
        with pytest.raises(BackendError, match=rf"triton: .*{match}.*Use backend='inductor' or 'eager'"):
            whole.check(card)
        assert not whole.suits(SimpleNamespace(is_checked=True), card)
    finally:
        triton_launch.lack.cache_clear()


def test_a_state_of_a_type_that_it_has_not(monkeypatch):
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(triton_launch, "lack", lambda device: "")
    card = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda", 0)), dtype=torch.float64)
    whole = backend_of("triton").whole
    with pytest.raises(BackendError, match=r"state is torch\.float64; expected torch\.float32.*backend='eager'"):
        whole.check(card)
    assert not whole.suits(SimpleNamespace(is_checked=True), card)


def test_an_op_that_it_has_not(monkeypatch):
    monkeypatch.setattr(triton_backend._Rows, "suits", lambda self, plan, call: True)
    monkeypatch.setattr(triton_seen, "seen", lambda device: {"something"})
    monkeypatch.setattr(backends, "names", lambda: ("triton", "eager"))
    program = df.derive(LogGamma(), squared, rules["sgd"], chunk=2)
    x = torch.rand(1, 4, 1, 4)
    program.plan(4, torch.float32, "auto").natives.refused = ""
    with pytest.warns(UserWarning, match=r"the op aten\.lgamma\.default at return torch\.lgamma.*Use backend='eager'"):
        found = program(x, x, x, backend="auto")[0]
    assert torch.equal(found, program(x, x, x, backend="eager")[0])
    program.plan(4, torch.float32, "auto").natives.refused = ""


class Card:
    """A function as Triton makes it, on a card that refuses."""

    def __init__(self, error, stages=None):
        self.error, self.stages, self.tried = error, stages, []

    def warmup(self, *places, grid, STAGES, num_warps):
        self.tried.append(STAGES)
        if self.stages is None or self.stages < STAGES:
            raise self.error

    def __getitem__(self, grid):
        return lambda *places, **words: "made"


def launched_on(card, monkeypatch):
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(triton_launch, "_newer", lambda: "")
    monkeypatch.setattr(triton_launch, "loaded", lambda text, name: card)
    return triton_launch.first_run("", "reverse", [torch.zeros(1)], (1, 1), (), triton_launch.Launch(8, 3))


def test_too_much_shared_memory(monkeypatch):
    """Fewer stages are tried first; what is said has the need, the limit, and what else there is."""
    few = triton.runtime.errors.OutOfResources(131072, 101376, "shared memory")
    card = Card(few, stages=1)
    assert launched_on(card, monkeypatch) == ("made", 1)
    assert card.tried == [3, 2, 1]
    with pytest.raises(
        BackendError,
        match=r"triton: reverse does not fit: .*131072.*101376.*backend='inductor' or 'eager', other warps",
    ):
        launched_on(Card(few), monkeypatch)


@pytest.mark.parametrize(
    "error", [RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_no_memory(error, monkeypatch):
    """Not taken for a fault of the compiler's, nor for a card on which nothing runs any more."""
    with pytest.raises(BackendError, match=r"reverse finds no memory .*out of memory.*smaller batch.*'eager'") as said:
        launched_on(Card(error), monkeypatch)
    assert "report" not in str(said.value)


def test_a_card_on_which_nothing_runs_any_more_is_said_as_it_is(monkeypatch):
    with pytest.raises(RuntimeError, match="illegal memory access") as said:
        launched_on(Card(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")), monkeypatch)
    assert not isinstance(said.value, BackendError)


def test_no_memory_in_the_other_process(ask, monkeypatch):
    monkeypatch.setitem(
        ENTRIES,
        "rsqrt",
        replace(ENTRIES["rsqrt"], triton='exec(\'raise __import__("torch").OutOfMemoryError("CUDA out of memory")\')'),
    )
    goes_on(ask, r"triton: forward finds no memory")


def test_a_compile_that_is_killed(ask, monkeypatch):
    """At every call: what was tried and not seen right does not run in the user's process."""
    rsqrt = ENTRIES["rsqrt"]
    kill = "exec('import os, signal; os.kill(os.getpid(), signal.SIGKILL)')"
    monkeypatch.setitem(ENTRIES, "rsqrt", replace(rsqrt, triton=kill))
    goes_on(ask, r"triton: forward ended its process with -9.*a process of its own.*Use backend='inductor' or 'eager'")
    assert not ask.proofs.exists()
    monkeypatch.setitem(ENTRIES, "rsqrt", rsqrt)
    ask.forget()
    assert (ask.call("auto") - ask.call("eager")).abs().max() < 1e-5


def counted(monkeypatch):
    names, tried = [], triton_trial.tried
    monkeypatch.setattr(triton_trial, "tried", lambda *words: names.append(words[1]) or tried(*words))
    return names


def test_what_another_driver_or_triton_left_is_not_taken(ask, monkeypatch):
    """What was seen right elsewhere is tried again here, and kept beside it."""
    names, places = counted(monkeypatch), [("3.9.0", "card", "driver 1")] * 2
    places += [("3.9.0", "card", "driver 2"), ("3.6.0", "card", "driver 1"), places[0]]
    monkeypatch.setattr(triton_launch, "place", lambda device: places[0])
    counts = []
    while places:
        ask.forget()
        ask.call()
        counts.append(len(names))
        places.pop(0)
    assert counts == [n * counts[0] for n in (1, 1, 2, 3, 3)]
    assert len(list(ask.proofs.iterdir())) == 3


@pytest.mark.parametrize("content", [b"", b"\xff\xfe not JSON", b'{"unlike": "o by 2"}', b"[]", None])
def test_a_cache_that_cannot_be_read(ask, content, monkeypatch):
    """Is no cache: what it should say is found out again, and written down where that can be."""
    names = counted(monkeypatch)
    ask.call()
    once, (path,) = len(names), ask.proofs.iterdir()
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    ask.forget()
    assert ask.call().isfinite().all()
    assert len(names) == 2 * once
    if content is not None:
        assert json.loads(path.read_text()) == {"unlike": ""}


def test_a_cache_that_is_no_folder(ask, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path / "file"))
    assert proof.cache_folder().is_file()
    assert ask.call().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "stride"), [((9, 1), (12, 12)), ((1, 1), (5, 7)), ((3, 1, 1), (12, 4, 4)), ((2, 3), (0, 1))]
)
def test_what_a_launch_wrote_is_seen_however_tensors_lie(shape, stride, dtype):
    """An axis of one entry has any stride, in what contiguous() gives too: a first run failed on rates of such layers."""
    x = torch.rand(400).to(dtype).as_strided(shape, stride)
    there = triton_trial._laid(triton_trial._told(x))
    assert torch.equal(triton_trial._bytes(x), triton_trial._bytes(there))
    assert not torch.equal(triton_trial._bytes(x), triton_trial._bytes(there + 1))

"""Generated Triton on a card, at real sizes: everything against eager in float64, splits, decoding, graphs, `auto`.

Skipped without CUDA, and under TRITON_INTERPRET=1, which tests/conftest.py sets. With DUALFORM_GPU_LOG=FILE each
comparison is a line there; with --seen what ran right becomes the record that `auto` reads.
"""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import dualform as df

on_card = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
pytestmark = pytest.mark.skipif(not on_card, reason="no CUDA device, or TRITON_INTERPRET is not 0")
if on_card:
    import gpu_kernels as kernels
    from gpu_kernels import built, called, case

    from dualform.kernels import triton_backend, triton_launch
else:

    def case(*words, **more):
        return {}


# Of the largest error in norm, of any output, state or gradient: two-byte factors keep eight or eleven bits.
LIMIT = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
cases = [
    case("TTT-Linear", T=2048), case("TTT-Linear", chunk=64, T=2048), case("TTT-Linear", B=1, T=32768, H=1),
    case("TTT-Linear", B=12, H=8, T=256),
    case("TTT-Linear", dtype="float32", T=1024), case("TTT-Linear", dtype="float16"),
    case("TTT-Linear", chunk=100, T=200),
    case("TTT-Linear", "SGD", chunk=1, T=6, dtype="float32"), case("TTT-Linear", dtype="float32", ragged=True, T=50),
    case("TTT-Linear", d=96, T=256), case("TTT-Linear", d=16, T=512), case("TTT-Linear", "momentum", d=128),
    case("TTT-Linear", chunk=128, T=512),
    case("TTT-Linear", d=48, chunk=24, T=90, ragged=True), case("TTT-Linear", "momentum", T=512),
    case("TTT-Linear", "decay", T=512),
    case("TTT-MLP", T=256), case("TTT-MLP", dtype="float32", d=32), case("SwiGLU", "SGD", T=256),
    case("low rank", "decay", objective="dot", T=256),
    case("Linear", "Titans", dtype="float32", T=512), case("Linear", "momentum", d=32, chunk=32, objective="dot"),
    case("MLP of 3", "decay", d=32, dtype="float32"),
    case("MLP of 3", B=8, T=2048, H=12),  # states computed again, by the kernel that read past its memory
]  # fmt: skip


def results(o, state):
    return {"o": o} | {f"state {n}": t for n, t in state.tensors().items() if t.is_floating_point()}


def drawn_params(c, module):
    g = torch.Generator("cuda").manual_seed(2)
    found = {}
    for n, p in module.named_parameters():
        own = p.detach().expand(c["H"], *p.shape) + 0.02 * torch.randn(c["H"], *p.shape, generator=g, device="cuda")
        found[n] = own.requires_grad_()
    more = {}
    if c["ragged"]:
        draw = torch.rand(2, c["B"], c["T"], generator=g, device="cuda")
        more = {"mask": draw[0] > 0.2, "reset": draw[1] > 0.95}
    return found, more


def outcome(program, x, params, backend, more, cotangents):
    """Return outputs, state and gradients."""
    found = results(*called(program, x, backend, params=params, **more))
    g = torch.Generator("cuda").manual_seed(3)
    for name, t in found.items():
        cotangents.setdefault(name, torch.randn(t.shape, generator=g, device="cuda"))
    total = sum((t.double() * cotangents[name]).sum() for name, t in found.items())
    leaves = {**x, **params}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {n: t.detach() for n, t in found.items()} | {f"d {n}": t for n, t in zip(leaves, grads, strict=True)}


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def note(c, **found):
    if "DUALFORM_GPU_LOG" in os.environ:
        with Path(os.environ["DUALFORM_GPU_LOG"]).open("a") as log:
            log.write(json.dumps({**c, **found}) + "\n")


@pytest.mark.parametrize("slices", [None, True, False], ids=["chosen", "slices", "whole"])
@pytest.mark.parametrize("n", range(len(cases)))
def test_it_is_eager_in_float64(n, slices):
    """In the same bits at every call, of which the third runs from a tape."""
    c = cases[n]
    if slices is not None and c["learner"] != "TTT-Linear":
        pytest.skip("both are tried on the smallest learner")
    program, module, x = built(c)
    params, more = drawn_params(c, module)
    cotangents, backend = {}, ("triton", {} if slices is None else {"slices": slices})
    got = outcome(program, x, params, backend, more, cotangents)
    again = [outcome(program, x, params, backend, more, cotangents) for _ in range(3)]
    eager = outcome(program, x, params, "eager", more, cotangents)
    exact = df.derive(
        copy.deepcopy(module).double(), kernels.objectives[c["objective"]], kernels.rules[c["rule"]], chunk=c["chunk"]
    )
    wide = [{n: t.detach().double().requires_grad_() for n, t in some.items()} for some in (x, params)]
    true = outcome(exact, *wide, "eager", more, cotangents)
    errors, others = {n: error(got[n], true[n]) for n in true}, {n: error(eager[n], true[n]) for n in true}
    worst = max(errors, key=errors.__getitem__)
    note(
        c,
        slices=slices,
        worst=worst,
        error=errors[worst],
        eager=others[worst],
        outputs=errors["o"],
        eager_outputs=others["o"],
    )
    assert errors[worst] <= LIMIT[c["dtype"]], (worst, errors[worst], others[worst])
    assert all(torch.equal(got[n], one[n]) for one in again for n in got)
    remade = outcome(program, x, params, backend, more | {"remat": 2}, cotangents)  # states are computed again
    with torch.no_grad():
        alone = results(*called(program, x, backend, params=params, **more))  # and none is kept
    assert all(error(one[n], true[n]) <= LIMIT[c["dtype"]] for one in (remade, alone) for n in one)


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_tape_reads_new_numbers(chunk):
    """Calls of one shape: the third and later run as written down, whatever is in the tensors."""
    c = case("TTT-Linear", chunk=chunk, T=1024)
    program, _, x = built(c)
    for seed in range(4):
        with torch.no_grad():
            for t in x.values():
                t.mul_(0.9 + 0.1 * seed)
        outs = [
            results(*called(program, {n: t.detach().clone().requires_grad_() for n, t in x.items()}, b))
            for b in ("triton", "eager")
        ]
        assert all(error(outs[0][n], outs[1][n].double()) < 2e-2 for n in outs[0])


def test_any_split_is_the_whole():
    c = case("TTT-Linear", T=200, dtype="float32")
    program, _, x = built(c)
    with torch.no_grad():
        whole, end = called(program, x, "triton")
        state, parts = None, []
        for a, b in ((0, 7), (7, 100), (100, 101), (101, 200)):
            part = {n: t if n == "offset" else t[:, a:b] for n, t in x.items()}
            o, state = called(program, part, "triton", state=state)
            parts.append(o)
    assert error(torch.cat(parts, 1), whole.double()) < 2e-5
    assert all(
        error(a, b.double()) < 2e-5
        for a, b in zip(state.tensors().values(), end.tensors().values(), strict=True)
        if a.is_floating_point()
    )


def test_packed_documents_are_documents_alone():
    c = case("TTT-Linear", B=1, T=150, dtype="float32")
    program, _, x = built(c)
    reset = torch.zeros(1, 150, dtype=torch.bool, device="cuda")
    reset[0, [40, 90]] = True
    packed, _ = called(program, x, "triton", reset=reset)
    alone = [
        called(program, {n: t if n == "offset" else t[:, a:b] for n, t in x.items()}, "triton")[0]
        for a, b in ((0, 40), (40, 90), (90, 150))
    ]
    assert error(packed, torch.cat(alone, 1).double()) < 2e-5


def test_a_token_is_one_launch():
    c = case("TTT-Linear", B=4, T=40, H=8)
    program, _, x = built(c)
    launches, plain = [], triton_launch.run
    with torch.no_grad():
        whole, _ = called(program, x, "triton")
        state, found = None, []
        for n in range(40):
            if n == 20:  # not from a tape, whose launches nobody sees
                program.plan(64, torch.float32, "auto").natives.of(triton_backend.Compiled).tapes.clear()
                triton_launch.run = lambda *words, **more: launches.append(words[0].name) or plain(*words, **more)
            try:
                o, state = called(
                    program, {m: t if m == "offset" else t[:, n : n + 1] for m, t in x.items()}, "triton", state=state,
                    overwrite=n % 2 == 1,
                )  # fmt: skip
            finally:
                triton_launch.run = plain
            found.append(o)
    assert launches == ["forward"]
    assert error(torch.cat(found, 1), whole.double()) < 2e-2


def test_auto_takes_it_and_says_so(monkeypatch, tmp_path):
    """After the check at its first use, in a process of its own."""
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    c = case("TTT-Linear", B=4, T=512, H=4)
    torch.manual_seed(0)
    program = df.derive(
        kernels.learners["TTT-Linear"](64).cuda(), "squared", kernels.rules["averaged"], chunk=16, prove=True
    )
    _, _, x = built(c)
    o, _ = called(program, x, "auto")
    o.float().sum().backward()
    plan = program.plan(64, torch.float32, "auto")
    assert any(key[0].startswith("triton") for key in plan.natives.checked)
    assert [p.name for p in (tmp_path / "proofs").iterdir()]
    assert "triton on the card" in str(program.explain())
    assert error(o, called(program, x, "eager")[0].double()) < 2e-2


def test_a_graph_replays_it():
    c = case("TTT-Linear", T=512, H=4)
    program, _, x = built(c)
    with torch.no_grad():
        for _ in range(4):
            expected, _ = called(program, x, "triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = called(program, x, "triton")
        o.zero_()
        graph.replay()
    assert torch.equal(o, expected)


def test_it_compiles_whole():
    c = case("TTT-Linear", T=512, H=4)
    program, _, x = built(c)
    expected = called(program, x, "triton")[0]
    got = torch.compile(lambda y: called(program, y, "triton")[0] * 2, fullgraph=True, backend="aot_eager")(x)
    assert error(got, 2 * expected.double()) < 1e-2

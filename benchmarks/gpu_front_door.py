"""Code of one's own on a GPU: proof, closures, own gradients, transforms, threads, copies,
compile, generation.

    python benchmarks/gpu_front_door.py [--only WORD ...] [--device cuda]     writes benchmarks/results/gpu_front_door.json and .md

Each check computes named tensors on a device; what the GPU gives is compared with what the CPU gives, in float64 unless
a model is float32 in part. The cases are those of the tests (`tests/` is imported), where the CPU is compared with
definitions.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

sys.path.insert(0, str(harness.HERE.parent / "tests"))
os.environ["DUALFORM_PROVE"] = "0"  # while the tests' modules are imported
import test_custom_gradients as own
import test_front_door as door
import test_generation as generation
import test_transforms as transforms

import dualform as df
from dualform import testing as laws
from dualform.learning import program as program_module
from dualform.learning.finite import NonFiniteError

Made = dict[str, Any]
Check = Callable[[str], Made]  # device -> what is compared; "proof": text, "true": what must hold there
CHECKS: dict[str, tuple[Check, float]] = {}
CPU, DOUBLE = "cpu", torch.float64


def check(name: str, tolerance: float = 1e-9) -> Callable[[Check], Check]:
    def kept(f: Check) -> Check:
        CHECKS[name] = f, tolerance
        return f

    return kept


def each(name: str, cases: Any, make: Callable[[Any, str], Made], tolerance: float = 1e-9) -> None:
    """Keep a check per case."""
    for case in cases:
        called = case if isinstance(case, str) else "/".join(case) if isinstance(case, tuple) else str(case)
        CHECKS[f"{name} {called}"] = (lambda d, case=case: make(case, d)), tolerance


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def numbered(tensors: Any, name: str = "") -> dict[str, Tensor]:
    return {f"{name}{k}": t for k, t in enumerate(tensors)}


def forget() -> None:
    """Let the next derivation be the first."""
    for name in ("_programs", "_structures", "_proved"):
        getattr(program_module, name).clear()


def mlp() -> nn.Module:
    return df.learners.residual_norm(df.learners.MLP(2, 2))(8).double()


# -- proofs
# --------------------------------------------------------------------------------------------------------------


@check("proof of every learner on the device")
def _(d: str) -> Made:
    given = {"LowRank": {"rank": 2}, "residual_norm": {"spec": df.learners.MLP(depth=2)}}
    proofs = {}
    for name in df.learners.names():
        learner = df.learners[name](**given.get(name, {}))(64 if name == "residual_norm" else 8).to(d)
        proofs[name] = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=16).proof
    return {
        "true": all(p.compared and not p.unproved for p in proofs.values()),
        "proof": "; ".join(map(str, proofs.values())),
    }


@check("proof of layers and language models on the device")
def _(d: str) -> Made:
    layer = df.TestTimeTraining(32, 2, learner="mlp").to(d)
    with torch.device(d):
        born = df.TestTimeTraining(32, 2, learner="linear")
    y = born(torch.randn(1, 9, 32, device=d))[0], layer(torch.randn(1, 9, 32, device=d))[0]
    df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-linear", num_hidden_layers=1)).to(d)
    return {"true": all(bool(x.isfinite().all()) for x in y), "proof": f"{born.program.proof}; {layer.program.proof}"}


# -- what is closed over
# -------------------------------------------------------------------------------------------------


def objectives(d: str) -> tuple[nn.Parameter, dict[str, Any]]:
    w, codes = nn.Parameter((drawn(4, seed=2).abs() + 0.5).to(d)), door.rand(5, 4, seed=3).to(d)
    F = torch.nn.functional
    return w, {
        "weighted by a parameter": lambda p, t: (w * (p - t) ** 2).sum(-1),
        "a module": door.Temperature().to(d),
        "a literal": lambda p, t: (torch.tensor([1.0, 2, 3, 4]) * (p - t) ** 2).sum(-1),
        "a literal on p's device": lambda p, t: (torch.tensor([1.0, 2, 3, 4], device=p.device) * (p - t) ** 2).sum(-1),
        "codebook distances": lambda p, t: ((p @ codes.T).log_softmax(-1) * (t @ codes.T).softmax(-1)).sum(-1),
        "codebook labels": lambda p, t: F.cross_entropy(p @ codes.T, (t @ codes.T).argmax(-1), reduction="none"),
        "detached": lambda p, t: (p - t).square().sum(-1) / (1 + (p - t).detach().abs().sum(-1)) * w.detach().sum(),
        "a number of the parameter": lambda p, t: (p - t).square().sum(-1) * w[0],
    }


def closed_over(name: str, d: str) -> Made:
    w, known = objectives(d)
    objective, learner = known[name], door.Square().to(d)
    program, x = df.derive(learner, objective, df.rules.SGD(lr=0.2), chunk=3), door.rand(2, 7, 2, 4).to(d)
    mask = torch.ones(2, 7, dtype=torch.bool, device=d)
    mask[1, 2] = False
    inputs = [learner.W, w, *(objective.parameters() if isinstance(objective, nn.Module) else [])]
    o, state = program(x, x, x, mask=mask)
    found = torch.autograd.grad(
        o.sin().sum() + state.anchor["W"].sum(), inputs, allow_unused=True, materialize_grads=True
    )
    return numbered([o, *found]) | {"proof": str(program.proof)}


each("objective closes over", objectives(CPU)[1], closed_over)


def rule_closes_over(k: int, d: str) -> Made:
    w = nn.Parameter(torch.tensor(0.3, dtype=DOUBLE, device=d))
    steps = [
        lambda i, lr: df.Step(((1.0,),), (w * lr,), (1.0,), 1.0),
        lambda i, lr: df.Step(((torch.sigmoid(w),),), (0.3 * lr,), (1.0,), 1.0 - w),
    ]
    program, x = df.derive(door.Square().to(d), rule=df.Rule(step=steps[k]), chunk=3), door.rand(2, 7, 2, 4).to(d)
    o = program(x, x, x)[0]
    return {"o": o, "w": torch.autograd.grad(o.sin().sum(), w)[0], "proof": str(program.proof)}


each("rule closes over a parameter", range(2), rule_closes_over)


class Hidden(door.Square):
    """Reads a parameter that is not registered, a buffer, and tensors that it makes."""

    def __init__(self, d: str) -> None:
        super().__init__()
        self.register_buffer("table", door.rand(4, seed=8))
        self.gains = [nn.Parameter(1.2 * torch.ones(4, dtype=DOUBLE, device=d))]
        self.to(d)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.arange(4, device=x.device) + x.new_ones(4) + torch.eye(4, device=x.device, dtype=x.dtype)[0]
        return torch.tanh(x @ self.W) * self.gains[0] + made * self.table


@check("a learner with an unregistered parameter, a buffer and tensors that it makes")
def _(d: str) -> Made:
    learner, x = Hidden(d), door.rand(2, 5, 2, 4).to(d)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.2), chunk=2)
    o = program(x, x, x)[0]
    found = torch.autograd.grad(o.sin().sum(), [learner.gains[0], learner.W])
    return numbered([o, *found]) | {"proof": str(program.proof)}


# -- gradients of one's own
# ----------------------------------------------------------------------------------------------


def own_gradients(learner: nn.Module, loss: Any, d: str) -> Made:
    module, (x, v) = learner.to(d), (t.detach().to(d).requires_grad_() for t in own.tokens())
    program = df.derive(module, loss, df.rules.SGD(0.05), chunk=3)
    o, _ = program(x, x, v)
    inputs = [x, v, *module.parameters()]
    return numbered([o, *torch.autograd.grad(o.sin().sum(), inputs, allow_unused=True, materialize_grads=True)]) | {
        "proof": str(program.proof)
    }


each("own gradients:", own.LEARNERS, lambda name, d: own_gradients(own.learner(own.LEARNERS[name]), own.squared, d))
losses = {"weighted": own.weighted, "hook": own.hook_in_loss}
each(
    "objective with own gradients:",
    losses,
    lambda n, d: own_gradients(own.learner(own.LEARNERS["tokens"]), losses[n], d),
)


# -- transforms
# ----------------------------------------------------------------------------------------------------------


def moved(p: laws.Problem, d: str) -> laws.Problem:
    """Return the same problem on a device."""
    old, place = p.program, lambda x: None if x is None else x.to(d)
    program = df.derive(copy.deepcopy(old.learner).to(d), old.objective, old.rule, chunk=old.chunk)
    tensors = {n: t.detach().to(d).requires_grad_() for n, t in p.tensors.items()}
    return laws.Problem(program, tensors, place(p.mask), place(p.reset), place(p.position))


def scalar(results: Any) -> Tensor:
    """Weigh results into one number."""
    weights = (torch.arange(1.0, x.numel() + 1, dtype=x.dtype, device=x.device).cos().reshape(x.shape) for x in results)
    return torch.stack([(x * w).sin().sum() for x, w in zip(results, weights, strict=True)]).sum()


def transformed(case: tuple[str, ...], d: str) -> Made:
    f, x = transforms.as_function(moved(transforms.problem(*case), d))
    dx = {n: t.to(d) for n, t in transforms.random_like({n: t.cpu() for n, t in x.items()}).items()}
    values, tangents = jvp(f, (x,), (dx,))
    found = numbered(values, "value ") | numbered(tangents, "jvp ")
    gradient = grad(lambda u: scalar(f(u)))
    found |= {f"forward over reverse {n}": t for n, t in jvp(gradient, (x,), (dx,))[1].items()}
    y, pull = vjp(f, x)
    found |= {f"vjp {n}": t for n, t in pull(tuple(map(torch.ones_like, y)))[0].items()}
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    inputs, along = list(leaves.values()), list(dx.values())
    first = torch.autograd.grad(scalar(f(leaves)), inputs, create_graph=True, materialize_grads=True)
    again = torch.autograd.grad(first, inputs, along, materialize_grads=True)
    return found | numbered(first, "first ") | numbered(again, "double backward ")


each("transforms", transforms.cases, transformed)


@check("vmap(grad) over masks, resets and positions, NaN in padding")
def _(d: str) -> Made:
    torch.manual_seed(0)
    rule = transforms.rules["momentum, decay"]
    program = df.derive(transforms.learners["mlp"]().double(), rule=rule, chunk=3)
    problems = [laws.draw(program, seed=s, ragged=True, resets=True, carried=True, time=7) for s in range(4)]
    masks = torch.stack([p.mask for p in problems])
    masks[3] = False
    given = {n: torch.stack([p.tensors[n].detach() for p in problems]) for n in problems[0].tensors}
    given |= {n: given[n].masked_fill(~masks[..., None, None], torch.nan) for n in "qkv"}
    marks = torch.stack([p.position for p in problems]), masks, torch.stack([p.reset for p in problems])
    there = df.derive(copy.deepcopy(program.learner).to(d), rule=rule, chunk=3)

    def loss(tensors: dict[str, Tensor], position: Tensor, mask: Tensor, reset: Tensor) -> Tensor:
        o, state = laws.Problem(there, tensors, mask, reset, position).run("auto")
        return scalar([o, *(x for x in state.tensors().values() if x.is_floating_point())])

    return vmap(grad(loss), in_dims=(0, 0, 0, 0))({n: t.to(d) for n, t in given.items()}, *(m.to(d) for m in marks))


LAYERS: dict[str, Any] = {
    "plain": {}, "gate, shared q and k": {"share_qk": True, "use_gate": True},
    "averaged": {"rule": df.rules.SGD(averaged=True)},
}  # fmt: skip


def layer_transformed(name: str, d: str) -> Made:
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=3, **LAYERS[name]).double().to(d)
    x, mask = drawn(3, 7, 8).to(d), (drawn(3, 7, seed=1) > -0.5).to(d)
    ps = {n: p.detach() for n, p in layer.named_parameters()}
    dp = {n: t.to(d) for n, t in transforms.random_like({n: p.cpu() for n, p in ps.items()}).items()}

    def loss(ps: Any, x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(layer, ps, (x[None],), {"attention_mask": mask[None]})[0].sin().sum()

    found = {f"per sample {n}": t for n, t in vmap(grad(loss), in_dims=(None, 0, 0))(ps, x, mask).items()}
    hvp = jvp(lambda p: grad(loss)(p, x[0], mask[0]), (ps,), (dp,))[1]
    return (
        found
        | {"jvp": jvp(lambda p: loss(p, x[0], mask[0]), (ps,), (dp,))[1]}
        | {f"hvp {n}": t for n, t in hvp.items()}
    )


each("transforms of a layer,", LAYERS, layer_transformed)


def model_transformed(kind: str, d: str) -> Made:
    torch.manual_seed(0)
    config = df.DualformConfig(preset="tiny-ttt-linear", num_hidden_layers=1, layer_types=[kind], sliding_window=4)
    model = df.DualformForCausalLM(config).double().eval()
    ids, ps = torch.randint(3, 259, (2, 9)).to(d), {n: p.detach().to(d) for n, p in model.named_parameters()}
    dp = {n: t.to(d) for n, t in transforms.random_like({n: p.cpu() for n, p in ps.items()}).items()}
    model.to(d)

    def logits(ps: Any) -> Tensor:
        return functional_call(model, ps, (), {"input_ids": ids, "use_cache": False}).logits

    y, pushed = jvp(logits, (ps,), (dp,))
    many = vmap(logits)({n: torch.stack([p, 1.1 * p]) for n, p in ps.items()})
    slopes = grad(lambda p: logits(p).sin().sum())(ps)
    return {"logits": y, "jvp": pushed, "ensemble": many} | {f"grad {n}": g for n, g in slopes.items()}


kinds = ("test_time", "full_attention", "sliding_attention")
each("transforms of a model,", kinds, model_transformed, 1e-5)  # norms are float32


# -- padding, threads, copies
# --------------------------------------------------------------------------------------------


@check("NaN in padding, program, a row of padding alone")
def _(d: str) -> Made:
    torch.manual_seed(0)
    program, x = df.derive(mlp().to(d), rule=df.rules.SGD(0.2, averaged=True), chunk=4), drawn(3, 11, 2, 8)
    mask = drawn(3, 11, seed=1) > -0.5
    mask[2] = False
    fill = 0.3 if d == CPU else torch.nan
    t = x.masked_fill(~mask[..., None, None], fill).to(d).requires_grad_()
    o, s = program(t, t, t, mask=mask.to(d))
    loss = o.sin().sum() + sum(a.square().sum() for a in s.anchor.values())
    g = torch.autograd.grad(loss, [t, *program.learner.parameters()])
    return numbered([o, *s.anchor.values(), g[0][mask.to(d)], *g[1:]])


def in_threads(count: int, call: Callable[[int], Any]) -> dict[int, Any]:
    """Call from so many threads at once; an error is raised here."""
    found: dict[int, Any] = {}
    barrier = threading.Barrier(count)

    def first(n: int) -> None:
        try:
            barrier.wait()
            found[n] = call(n)
        except BaseException as error:
            found[n] = error

    threads = [threading.Thread(target=first, args=(n,)) for n in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    for error in found.values():
        if isinstance(error, BaseException):
            raise error
    return {n: found[n] for n in range(count)}


@check("8 threads call first")
def _(d: str) -> Made:
    forget()
    torch.manual_seed(0)
    learner = mlp().to(d)
    program = df.derive(learner, rule=df.rules.SGD(lr=0.1), chunk=3)

    def call(n: int) -> list[Tensor]:
        x = drawn(1, 4 + n, 2, 8, seed=n).to(d).requires_grad_()
        o = program(x, x, x)[0]
        return [o, *torch.autograd.grad(o.sin().sum(), [x, *learner.parameters()])]

    return {name: t for n, found in in_threads(8, call).items() for name, t in numbered(found, f"thread {n}, ").items()}


@check("copies, load_state_dict(assign=True) and .to(device) of a module that holds a program")
def _(d: str) -> Made:
    torch.manual_seed(0)
    x, first = door.rand(1, 3, 1, 4), door.Model()
    moved_model = copy.deepcopy(first).to(d)
    twin, fresh = copy.deepcopy(moved_model), door.Model()
    fresh.load_state_dict({k: v.to(d) for k, v in first.state_dict().items()}, assign=True)
    found = numbered((m(x.to(d)) for m in (moved_model, twin, fresh)), "copy ")
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    return found | {"the original after its copy changed": moved_model(x.to(d)), "back": moved_model.cpu()(x)}


# -- compile, generate, the rest
# -----------------------------------------------------------------------------------------


def compiled(backend: str, d: str) -> Made:
    torch._dynamo.reset()
    torch.manual_seed(0)
    rule = df.rules.SGD(lr=0.5, averaged=True)
    layer = df.TestTimeTraining(
        8, 2, learner=df.learners.residual_norm(df.learners.MLP(2, 2)), chunk=16, rule=rule
    ).double()
    layer, found = layer.to(d), {}
    call = layer if d == CPU else torch.compile(layer, fullgraph=True, backend=backend)
    for T in (1, 7, 64, 65):
        x = drawn(2, T, 8, seed=T).to(d).requires_grad_()
        y = call(x)[0]
        found |= numbered([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])], f"T {T}, ")
    return found


each("torch.compile fullgraph of a layer,", ("aot_eager", "inductor"), compiled)


def generated(kind: str, d: str) -> Made:
    model = generation.build(kind).to(d)
    ids = torch.randint(3, 259, (1, 7), generator=torch.Generator().manual_seed(1)).repeat(1, 3).to(d)
    want = generation.greedy(model, ids)
    ways = {
        "no cache": {"use_cache": False}, "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": generation.build("learner", seed=1, num_hidden_layers=1).to(d)},
        "chunked prefill": {"prefill_chunk_size": 3},
    }  # fmt: skip
    same = {name: torch.equal(generation.greedy(model, ids, **options), want) for name, options in ways.items()}
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        logits = model(ids[:, 5:], past_key_values=cache).logits
    beams = generation.greedy(model, ids, num_beams=3)
    return {"cache": want, "beams": beams, "logits in two calls": logits, "true": all(same.values())}


each("generate on the device:", generation.kinds, generated, 1e-5)


@check("4 threads generate first")
def _(d: str) -> Made:
    forget()
    model = generation.build("hybrid", seed=3).to(d)
    ids = torch.randint(3, 259, (4, 9), generator=torch.Generator().manual_seed(1)).to(d)
    return numbered(in_threads(4, lambda n: generation.greedy(model, ids[n : n + 1])).values(), "row ")


@check("autocast on the device", 0.1)
def _(d: str) -> Made:
    torch.manual_seed(0)
    layer, x = df.TestTimeTraining(32, 2, learner="mlp", chunk=4).to(d), torch.randn(2, 13, 32).to(d)
    with torch.autocast(d, dtype=torch.bfloat16, enabled=d != CPU):
        y = layer(x)[0]
    return {"y": y.float()}


@check("a state that is saved and read; losses; a number that is not finite is named")
def _(d: str) -> Made:
    torch.manual_seed(0)
    program = df.derive(nn.Linear(4, 4).double().to(d), rule=df.rules.SGD(0.1), chunk=3)
    x = drawn(2, 7, 2, 4).to(d)
    y = x.clone()
    y[1, 4] = 1e200
    try:
        program(y, y, y, nan_policy="raise")
        named = False
    except NonFiniteError:
        named = True
    _, state = program(x, x, x)
    with tempfile.TemporaryDirectory() as folder:
        state.save(f"{folder}/state")
        read = df.State.load(f"{folder}/state").to(d)
    return {"next": program(x, x, x, state=read)[0], "true": named} | numbered(program.losses(x, x)[:2], "losses ")


@check("jacobian and hessian of functions that close over the device's tensors")
def _(d: str) -> Made:
    W, x = drawn(5, 5).to(d), drawn(5, seed=4).to(d)
    first, second = df.jacobian(lambda x: torch.tanh(W @ x), x), df.hessian(lambda x: (torch.tanh(W @ x) ** 2).sum(), x)
    return {"J": first.dense(), "H": second.dense(), "own": df.jacobian(lambda x: own.Modern.apply(W @ x), x).dense()}


# -- all of them
# ---------------------------------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.inf
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else torch.inf
    found = float((a - b).abs().max() / b.abs().max().clamp(min=1)) if a.numel() else 0.0
    return found if found == found else torch.inf


def outcome(made: Check, tolerance: float, device: str) -> harness.Found:
    """Run a check on the CPU and on the device, and compare."""
    try:
        here, there = made(CPU), made(device)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    holds, proof = there.pop("true", True), there.pop("proof", None)
    errors = {name: difference(x, here[name]) for name, x in there.items()}
    worst = max(errors, key=errors.__getitem__, default=None)
    found = {"ok": bool(holds) and (worst is None or errors[worst] <= tolerance)}
    found |= {} if worst is None else {"largest difference": errors[worst], "of": worst, "compared": len(errors)}
    return found | ({} if proof is None else {"proof": proof})


def measure(options: argparse.Namespace) -> harness.Found:
    warnings.simplefilter("ignore")
    os.environ["DUALFORM_PROVE"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for name, (made, tolerance) in CHECKS.items():
        if any(word in name for word in options.only):
            spent = harness.seconds(lambda: results.update({name: outcome(made, tolerance, options.device)}))  # noqa: B023
            results[name]["seconds"] = round(spent, 2)
            print(name, results[name], flush=True)
    return {"what": f"{options.device} against the CPU, float64 unless a model", "results": results}


def report(found: harness.Found) -> str:
    rows = [
        [name, "yes" if r["ok"] else "no", f"{x:.1e}" if (x := r.get("largest difference")) is not None else "-"]
        for name, r in found["results"].items()
    ]
    return harness.table(["check", "holds", "largest difference"], rows)


if __name__ == "__main__":
    harness.main(measure, report, harness.options(__doc__, only=[""], device="cuda"))

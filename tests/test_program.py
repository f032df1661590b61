"""A program is code that a person reads, formulas that are true, errors that help, and numbers that no mode changes."""

import re

import pytest
import torch
from safetensors.torch import save_file
from test_calculus_explain import value_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dualform as df
from dualform import testing as laws
from dualform.learning.printer import names_of

DOUBLE = torch.float64
SGD, Squared = df.rules.SGD, df.objectives.Squared
rules = {"averaged": SGD(lr=0.5, averaged=True), "titans": SGD(lr=0.2, momentum=0.6, decay=0.1)}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=DOUBLE)


def mlp(dim=4, **options):
    torch.manual_seed(0)
    learner = df.learners.MLP(depth=2, expand=2, **options)(dim).double()
    with torch.no_grad():
        for p in learner.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return learner


class Kronecker(nn.Module):
    dim = 64

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("...ab,ac,bd->...cd", x.unflatten(-1, (8, 8)), self.A, self.B).flatten(-2)


class Normed(nn.Module):
    dim = 4

    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.double()

    def forward(self, x):
        return x + self.norm(self.lin(x))


# -- what is printed is what runs ----------------------------------------------------------------------------------


def paste(program, seed=0):
    """Run the printed code on random inputs: (inputs by name, everything that it computes by name, what it returns)."""
    inputs = {}
    example = program.step.inputs
    for n, (name, x) in enumerate(zip(names_of(example), flat(example), strict=True)):
        inputs[name] = (
            rand(*x.shape, seed=seed + n)
            if name not in ("lr", "momentum", "decay")
            else rand(*x.shape, seed=n).sigmoid()
        )
    if example.R is not None:
        for name, w in example.th.items():  # as a mini-batch begins: registers at their start where the rule says so
            starts = torch.tensor(program.rule.start, dtype=DOUBLE).reshape(-1, *[1] * w.ndim)
            R, th = inputs[f"R_{name.replace('.', '_')}"], inputs[name.replace(".", "_")]
            keep = torch.tensor([not r for r in program.rule.resets]).reshape(starts.shape)
            R.copy_(torch.where(keep, R, starts * th))
    scope, traced = {}, {}
    code = str(program)
    exec(code, scope)
    returned = scope["mini_batch"](**inputs)
    exec(re.sub(r"    return .*$", "    return dict(locals())", code), traced)
    return inputs, traced["mini_batch"](**inputs), returned


def flat(inputs):
    return [
        x for value in inputs if value is not None for x in (value.values() if isinstance(value, dict) else [value])
    ]


@pytest.mark.parametrize(
    ("learner", "rule"),
    [(mlp, "averaged"), (mlp, "titans"), (Normed, "averaged"), (lambda: Kronecker().double(), "titans")],
)
def test_pasted_code_runs_and_is_the_program(learner, rule):
    program = df.derive(learner(), Squared(), rules[rule], chunk=3)
    inputs, _, (o, *after) = paste(program)
    leaves = {name: inputs[name.replace(".", "_")] for name in program.parts.fast}
    start = program.initial_state(1, 1, leaves)
    if program.step.inputs.R is not None:
        registers = {name: inputs[f"R_{name.replace('.', '_')}"][None, None] for name in leaves}
        start = df.State(start.anchor, registers, start.position)
    gates = {
        name: x if name == "offset" else x[None, :, None] for name, x in inputs.items() if name in program.rule.gates
    }
    rows = (inputs[name][None, :, None] for name in "qkv")
    for form in ("auto", "primal"):
        wanted, state = (
            program(*rows, gates, state=start, params=leaves, form=form) if form == "auto" else (wanted, state)
        )
        laws.agree("o", o, wanted[0, :, 0])
        for name, x in zip(leaves, after, strict=False):
            laws.agree(name, x, state.anchor[name][0, 0])
    assert program.code == str(program)
    assert all(
        re.search(r"# \(.*\)$|#\s*$|# \w|\"\"\"|^def|^import|^$|return", line) for line in program.code.splitlines()
    )


def test_printed_formulas_are_the_derivatives():
    """The names of a formula are those of the printed code: its values there,
    against jacrev of the learner's own ops."""
    program = df.derive(mlp(), Squared(), rules["averaged"], chunk=3)
    x, seen, _ = paste(program)
    q, k = x["q"], x["k"]
    C = (torch.tensor([1.0, 1 / 2, 1 / 3], dtype=DOUBLE) + x["offset"]).clamp(min=0)[:, None] * (0.5 * x["lr"])[None]
    C = C.tril()
    th = {name: x[name] for name in ("W1", "b1", "W2", "b2")}

    def predict(th, row):
        return F.gelu(row @ th["W1"] + th["b1"], approximate="tanh") @ th["W2"] + th["b2"]

    grads = [
        torch.func.grad(lambda th, t=t: 0.5 * (predict(th, k[t]) - x["v"][t]).square().sum())(th) for t in range(3)
    ]
    own = [{w: th[w] - sum(C[t, s] * grads[s][w] for s in range(3)) for w in th} for t in range(3)]
    hidden = torch.stack([F.gelu(q[t] @ own[t]["W1"] + own[t]["b1"], approximate="tanh") for t in range(3)])
    hidden_k = F.gelu(k @ th["W1"] + th["b1"], approximate="tanh")
    ops = {
        "W1": (lambda w, h: h @ w, q, k), "b1": (lambda w, h: h @ th["W1"] + w, q, k),
        "W2": (lambda w, h: h @ w, hidden, hidden_k), "b2": (lambda w, h: h @ th["W2"] + w, hidden, hidden_k),
    }  # fmt: skip
    assert [site.leaf for site in program.sites] == list(ops)
    for site in program.sites:
        op, at_q, at_k = ops[site.leaf]
        J, J_k = (torch.func.jacrev(lambda w, h=h, op=op: op(w, h))(th[site.leaf]) for h in (at_q, at_k))
        laws.agree(str(site.derivative), value_of(valued(site.derivative, seen), tuple(J.shape)), J)
        (kernel,) = site.kernels
        K = torch.einsum("tjw,skw,ts->tjsk", J.flatten(2), J_k.flatten(2), C)
        laws.agree(str(kernel), value_of(valued(kernel, seen), tuple(K.shape)), K)
        assert str(kernel) in str(program.explain())
        assert str(site.derivative) in str(program.explain())


def valued(formula, seen):
    """Give a formula the values that its names have in the code."""
    return type(formula)(formula.symbol, formula.out, formula.inn, formula.lines, {n: seen[n] for n in formula.tensors})


def test_explanations_at_every_level():
    program = df.derive(mlp(), Squared(), rules["averaged"], chunk=3)
    short, steps, proof = (str(program.explain(level)) for level in ("one-line", "steps", "proof"))
    assert "\n" not in short
    assert short.split(": ", 1)[1] in steps
    assert steps in proof
    assert program.code in proof
    for word in ("W1", "scores", "scan", "theta_t", "(4, 8)", "flops", "slow: none"):
        assert word in steps
    latex = program.explain().to_latex()
    assert latex.startswith("\\begin{align*}")
    assert latex.count("\\partial") == 2 * len(program.sites)
    assert latex.count("{") == latex.count("}")
    page = program.explain()._repr_html_()
    assert page.count("<table>") == len(program.sites)
    assert "<pre>" in page
    with pytest.raises(ValueError, match="level is 'long'"):
        program.explain("long")


# -- cost ----------------------------------------------------------------------------------------------------------


def test_the_cost_model_takes_what_is_cheap():
    forms = {site.leaf: site.form for site in df.derive(df.learners.MLP(depth=2)(64), chunk=16).sites}
    assert forms == {"W1": "scores", "b1": "scan", "W2": "scores", "b2": "scan"}
    assert {site.form for site in df.derive(Kronecker(), chunk=16).sites} == {"state"}
    forms = {site.leaf: site.form for site in df.derive(Normed(), chunk=4).sites}
    assert forms["norm.weight"] == forms["norm.bias"] == forms["lin.bias"] == "scan"


@pytest.mark.parametrize(
    "learner",
    [df.learners.MLP(depth=2)(64), Kronecker(), df.learners.SwiGLU(expand=2)(16)],
    ids=lambda m: type(m).__name__,
)
def test_printed_flops_are_torchs(learner):
    program = df.derive(learner, Squared(), SGD(lr=0.1, averaged=True), chunk=16)
    scope = {}
    exec(program.code, scope)
    with FlopCounterMode(display=False) as counter:
        scope["mini_batch"](*(torch.randn(x.shape) for x in flat(program.step.inputs)))
    assert program.cost.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    weights = sum(p.numel() * 4 for p in learner.parameters())
    assert program.cost.state_bytes == 2 * weights
    assert program.cost.bytes > 0


# -- caching -------------------------------------------------------------------------------------------------------


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.scale, self.drop = 4, 1.0, nn.Dropout(0.5)
        self.W = nn.Parameter(rand(4, 4))

    def forward(self, x):
        return self.scale * self.drop(x @ self.W)


def test_a_program_is_derived_once_and_anew_when_the_learner_changes():
    learner = Switched().eval()
    first = df.derive(learner, chunk=2)
    assert df.derive(learner, Squared(), SGD(), chunk=2) is first
    assert df.derive(learner, "squared", "sgd", chunk=2) is first
    assert df.derive(learner, chunk=3) is not first
    assert df.derive(learner, rule=SGD(lr=0.5), chunk=2) is not first
    x = rand(1, 2, 1, 4)
    learner.scale = 2.0
    second = df.derive(learner, chunk=2)
    assert second is not first
    laws.agree("o", second(x, x, x)[0], second(x, x, x, form="primal")[0])
    learner.train()
    with pytest.raises(ValueError, match=r"test_program.py:\d+"):
        df.derive(learner, chunk=2)
    learner.eval()
    assert df.derive(learner, chunk=2) is second
    learner.W.data.mul_(2)
    third = df.derive(learner, chunk=2)
    assert third is second  # weights are arguments
    laws.agree("o", third(x, x, x)[0], third(x, x, x, form="primal")[0])


# -- state ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran():
    program = df.derive(mlp(), Squared(), rules["titans"], chunk=3)
    x = rand(2, 4, 2, 4)
    return program, x, program(x, x, x)[1]


def test_states_survive_the_disk_and_fork(ran, tmp_path):
    program, x, state = ran
    state.save(tmp_path / "state.safetensors")
    back = df.State.load(tmp_path / "state.safetensors")
    for name, t in state.tensors().items():
        laws.agree(name, back.tensors()[name], t.detach())
    o, _ = program(x, x, x, state=state)
    laws.agree("o", program(x, x, x, state=back)[0], o)
    twice = x.repeat_interleave(3, 0)
    forked, _ = program(twice, twice, twice, state=state.fork(3))
    laws.agree("forked", forked, o.repeat_interleave(3, 0))
    rows = torch.tensor([1, 0, 1])
    laws.agree("selected", program(x[rows], x[rows], x[rows], state=state.select(rows))[0], o[rows])
    assert not any(t.requires_grad for t in state.detach().tensors().values())
    half = state.to(torch.float32)
    assert half.anchor["W1"].dtype == torch.float32
    assert half.position.dtype == torch.long
    assert {t.device.type for t in state.to("cpu").tensors().values()} == {"cpu"}


def test_states_of_others_are_refused(ran, tmp_path):
    program, x, state = ran
    other = df.derive(df.learners.Linear()(4).double(), rule=SGD(momentum=0.5), chunk=3)
    with pytest.raises(
        ValueError,
        match=r"holds the leaves \['W1', 'b1', 'W2', 'b2'\]|\['W1', 'W2', 'b1', 'b2'\].*\['W1', 'b1'\].*another model",
    ):
        other(x, x, x, state=state)
    with pytest.raises(ValueError, match=r"anchor.W1 has shape \(2, 2, 4, 8\).*expected \(1, 2, 4, 8\)"):
        program(x[:1], x[:1], x[:1], state=state)
    with pytest.raises(ValueError, match=r"torch.float32; expected .*torch.float64"):
        program(x, x, x, state=state.to(torch.float32))
    plain = df.derive(mlp(), Squared(), SGD(), chunk=3)
    with pytest.raises(ValueError, match=r"registers.W1 has shape \(2, 2, 2, 4, 8\).*expected \(2, 2, 1, 4, 8\)"):
        plain(x, x, x, state=state)
    path = tmp_path / "other.safetensors"
    for held, named in (({"weights": torch.ones(2)}, "a tensor named 'weights'"), ({"position": torch.ones(2)}, "")):
        save_file(held, str(path))  # one of nothing that is a state's, one of a state without weights
        with pytest.raises(ValueError, match=f"{named}.*; expected 'anchor"):
            df.State.load(path)


# -- errors name the value and the line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": {"momentun": torch.ones(2, 4, 2)}}, r"gates has 'momentun'; expected .*'lr', 'momentum', 'decay'"),
        ({"gates": {"lr": torch.ones(2, 4)}}, r"gates\['lr'\] has shape \(2, 4\); expected \(2, 4, 2\)"),
        ({"mask": torch.ones(2, 4)}, r"mask .*torch.float32; expected .*\(2, 4\) of torch.bool"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask has shape \(2, 5\)"),
        ({"reset": torch.ones(4, dtype=torch.bool)}, r"reset has shape \(4,\)"),
        ({"form": "dula"}, r"form is 'dula'; expected one of .*'dual'"),
        ({"backend": "eage"}, r"backend is 'eage'; expected .*'eager'"),
        ({"params": {"W3": torch.ones(2)}}, r"params names 'W3'; expected some of .*'W1'"),
        ({"params": {"W1": torch.ones(3, 4, 8)}}, r"params\['W1'\] has shape \(3, 4, 8\); expected \(4, 8\) or .*\(2, "
        r"4, 8\)"),
        ({"k": torch.ones(2, 3, 2, 4)}, r"k has shape \(2, 3, 2, 4\); expected q's = \(2, 4, 2, 4\)"),
        ({"v": torch.ones(2, 4, 1, 4)}, r"v has shape \(2, 4, 1, 4\)"),
        ({"q": torch.ones(2, 4, 4)}, r"q has shape \(2, 4, 4\).*4 axes"),
        ({"remat": "never"}, r"remat is 'never'"),
        ({"remat": 0}, r"remat is 0"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_say_so(ran, change, message):
    program, x, _ = ran
    call = {"q": x, "k": x, "v": x, **change}
    with pytest.raises(ValueError, match=message):
        program(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("gates", None), **call)


def test_a_value_of_another_width_is_refused(ran):
    program, x, _ = ran
    for form in ("auto", "primal"):
        with pytest.raises(ValueError, match=r"v has .*5.*expected .*4"):
            program(x, x, rand(2, 4, 2, 5), form=form)
    with pytest.raises(ValueError, match=r"5"):
        program(rand(2, 4, 2, 5), rand(2, 4, 2, 5), x)


def bad(body, *parts):
    """Make a learner of one line."""

    class Bad(nn.Module):
        dim = 4

        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(rand(4, 4))
            for n, part in enumerate(parts):
                self.add_module(f"part{n}", part)

        def forward(self, x):
            return body(self, x)

    return Bad().double()


refused = {
    "centred": (lambda m, x: x @ m.W - x.mean(0), "mixes tokens"),
    "cumsum": (lambda m, x: (x @ m.W).cumsum(0), "mixes tokens"),
    "softmax": (lambda m, x: (x @ m.W).softmax(0), "mixes tokens"),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x @ m.W, x, x), "mixes tokens"),
    "scores": (lambda m, x: (x @ m.W @ x.T).tril() @ x, "mixes tokens"),
    "flipped": (lambda m, x: (x @ m.W).flip(0), "mixes tokens"),
    "shifted": (lambda m, x: (x @ m.W).roll(1, 0), "mixes tokens"),
    "dropout": (lambda m, x: F.dropout(x @ m.W, 0.5), "random"),
    "noise": (lambda m, x: x @ m.W + torch.randn_like(x), "random"),
    "batch norm": (lambda m, x: m.part0(x @ m.W), "BatchNorm|buffer|writes|mixes", nn.BatchNorm1d(4)),
    "branch": (lambda m, x: x @ m.W if x.sum() > 0 else x, "control flow|values"),
    "item": (lambda m, x: (x @ m.W) * x.max().item(), "values|item"),
}  # fmt: skip


@pytest.mark.parametrize("name", refused)
def test_learners_that_cannot_be_name_their_line(name):
    body, message, *parts = refused[name]
    with pytest.raises(ValueError, match=message) as caught:
        df.derive(bad(body, *parts), chunk=4)
    assert re.search(r"test_program.py:\d+|batchnorm.py:\d+|functional.py:\d+", str(caught.value))


def test_a_trial_writes_to_no_buffer():
    learner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="expected"):
        df.derive(learner, chunk=2)
    assert not learner[1].running_mean.any()
    assert int(learner[1].num_batches_tracked) == 0


def test_the_width_is_the_one_that_runs():
    learner = mlp()
    learner.dim = 7  # another meaning of the word
    assert df.derive(learner, chunk=3).width == 4


def test_learners_without_weights_or_input_are_refused():
    with pytest.raises(df.DerivationError, match="no fast parameter"):
        df.derive(nn.Tanh(), chunk=2)
    with pytest.raises(df.DerivationError, match="no fast parameter"):
        df.derive(mlp(), chunk=2, slow=("*",))
    with pytest.raises(df.DerivationError, match=r"slow names 'gain'.*'W1'"):
        df.derive(mlp(), chunk=2, slow=("gain",))
    with pytest.raises(df.DerivationError, match="does not depend on its input"):
        df.derive(bad(lambda m, x: m.W), chunk=4)
    with pytest.raises(df.DerivationError, match=r"returns tuple; expected one tensor"):
        df.derive(bad(lambda m, x: (x @ m.W, x)), chunk=4)
    with pytest.raises(df.DerivationError, match=r"chunk is 0"):
        df.derive(mlp(), chunk=0)
    with pytest.raises(df.DerivationError, match=r"expected a built nn\.Module"):
        df.derive(df.learners.Linear(), chunk=2)
    with pytest.raises(df.DerivationError, match=r"K = 4, V = 3"):
        df.derive(nn.Linear(4, 3), Squared("v-k"), chunk=2)


# -- edges, dtypes and modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "primal"])
def test_empty_and_single(ran, form):
    program, x, state = ran
    o, after = program(x[:, :0], x[:, :0], x[:, :0], state=state, form=form)
    assert o.shape == (2, 0, 2, 4)
    assert program(x[:0], x[:0], x[:0], form=form)[0].shape == (0, *x.shape[1:])
    for name, t in state.tensors().items():
        laws.agree(name, after.tensors()[name], t)
    o, after = program(x[:1, :1], x[:1, :1], x[:1, :1], form=form)
    assert o.shape == (1, 1, 2, 4)
    assert after.position.tolist() == [1]
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    o, after = program(x, x, x, state=state, mask=nothing, form=form)
    assert not o.any()
    for name, t in state.tensors().items():
        laws.agree(name, after.tensors()[name], t)


def run(program, x, **options):
    """Outputs and the gradient of a scalar."""
    x = x.detach().clone().requires_grad_()
    o, _ = program(x, x.roll(1, -1), x.flip(-1), **options)
    (grad,) = torch.autograd.grad(o.double().square().sum(), x)
    return o.detach(), grad


@pytest.fixture(scope="module")
def single():
    """A float32 program, its inputs, and what float64 gives."""
    learner, x, rule = mlp(), rand(2, 12, 2, 4), SGD(lr=0.03, momentum=0.6, decay=0.1)
    wanted = run(df.derive(learner, Squared(), rule, chunk=3), x)
    return df.derive(mlp().float(), Squared(), rule, chunk=3), x.float(), wanted


def test_float32_is_near_float64(single):
    program, x, wanted = single
    for got, right in zip(run(program, x), wanted, strict=True):
        laws.agree("float32", got, right.float())


def test_bfloat16_inputs_keep_a_float32_state(single):
    program, x, wanted = single
    o, state = program(*[x.bfloat16()] * 3)
    assert o.dtype == torch.bfloat16
    assert {t.dtype for t in state.tensors().values()} == {torch.float32, torch.int64}
    rounded = x.bfloat16().float()
    laws.agree("o", o, program(rounded, rounded, rounded)[0].bfloat16())
    got, grad = run(program, x.bfloat16())
    laws.agree("o", got, wanted[0].bfloat16())
    assert grad.dtype == torch.bfloat16


def test_autocast_does_not_reach_the_state(single):
    program, x, _ = single
    wanted = run(program, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(program, x)
        primal, _ = program(x, x, x, form="primal")
        o, state = program(x, x, x)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    laws.agree("primal", primal, o)
    assert state.anchor["W1"].dtype == torch.float32


def test_checkpointing_changes_nothing(single):
    program, x, _ = single
    wanted = run(program, x)
    for remat in ("auto", None, 1, 3, 100):
        for a, b in zip(run(program, x, remat=remat), wanted, strict=True):
            laws.agree(f"remat {remat}", a, b)
    leaf = x.clone().requires_grad_()
    o, _ = checkpoint(lambda x: program(x, x.roll(1, -1), x.flip(-1)), leaf, use_reentrant=False)
    laws.agree("o", o, wanted[0])
    laws.agree("grad", torch.autograd.grad(o.double().square().sum(), leaf)[0], wanted[1])


def test_inference_is_training(single):
    program, x, _ = single
    wanted, state = program(x, x, x)
    with torch.no_grad():
        o, after = program(x, x, x)
    assert not o.requires_grad
    assert torch.equal(o, wanted)
    with torch.inference_mode():
        o, carried = program(x[:, :6], x[:, :6], x[:, :6])
        rest, after = program(x[:, 6:], x[:, 6:], x[:, 6:], state=carried)
        laws.agree("o", torch.cat([o, rest], 1), wanted)
        for name, t in state.tensors().items():
            laws.agree(name, after.tensors()[name], t)


def test_default_parameters_are_live():
    learner = mlp()
    program, x = df.derive(learner, chunk=3), rand(1, 4, 1, 4)
    program(x, x, x)[0].sum().backward()
    grads = {name: p.grad.clone() for name, p in learner.named_parameters()}
    learner.zero_grad()
    program(x, x, x, form="primal")[0].sum().backward()
    for name, p in learner.named_parameters():
        laws.agree(name, grads[name], p.grad)
        assert grads[name].abs().sum() > 0


# -- known identities ----------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """x W without a bias, from zero."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(4, 3, dtype=DOUBLE))

    def forward(self, x):
        return x @ self.W


@pytest.fixture(scope="module")
def sequence():
    q, k, v = rand(2, 7, 2, 4), rand(2, 7, 2, 4, seed=5), rand(2, 7, 2, 3)
    return q, k / k.norm(dim=-1, keepdim=True), v


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_dot_product_is_linear_attention(sequence, chunk):
    q, k, v = sequence
    attention = torch.einsum("bthk,bshk,ts,bshv->bthv", q, k, torch.ones(7, 7, dtype=DOUBLE).tril(), v)
    laws.agree("o", df.derive(Zero(), df.objectives.DotProduct(), SGD(lr=1.0), chunk=chunk)(q, k, v)[0], attention)


def test_one_token_at_a_time_is_the_delta_rule(sequence):
    q, k, v = sequence
    beta = rand(2, 7, 2).sigmoid()
    o, state = df.derive(Zero(), Squared(), SGD(lr=1.0), chunk=1)(q, k, v, {"lr": beta})
    S, outputs = torch.zeros(2, 2, 4, 3, dtype=DOUBLE), []
    for t in range(7):
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + beta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    laws.agree("o", o, torch.stack(outputs, 1))
    laws.agree("S", state.anchor["W"], S)


@pytest.mark.parametrize("chunk", [1, 3])
def test_momentum_and_decay_are_titans(sequence, chunk):
    q, k, v = sequence
    theta, eta, alpha = (rand(2, 7, 2, seed=n).sigmoid() for n in range(3))
    program = df.derive(Zero(), Squared(), SGD(lr=1.0, momentum=0.9, decay=0.1), chunk=chunk)
    o, state = program(q, k, v, {"lr": theta, "momentum": eta, "decay": alpha})
    M, outputs = torch.zeros(2, 2, 4, 3, dtype=DOUBLE), []
    S = anchor = M
    for t in range(7):
        anchor = M if t % chunk == 0 else anchor
        error = torch.einsum("bhk,bhkv->bhv", k[:, t], anchor) - v[:, t]
        S = eta[:, t, :, None, None] * S - theta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        M = (1 - alpha[:, t, :, None, None]) * M + S
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], M))
    laws.agree("o", o, torch.stack(outputs, 1))
    laws.agree("M", state.registers["W"][:, :, 0], M)
    laws.agree("S", state.registers["W"][:, :, 1], S)


def test_published_numbers_of_averaging(sequence):
    """theta_i = anchor - max(1/i + offset_i, 0) sum_{j<=i} lr_j g_j, written out."""
    q, k, v = sequence
    offset, rate = rand(3) * 0.3, rand(2, 7, 2).sigmoid()
    o, _ = df.derive(Zero(), Squared(), SGD(lr=0.7, averaged=True), chunk=3)(q, k, v, {"lr": rate, "offset": offset})
    W, outputs = torch.zeros(2, 2, 4, 3, dtype=DOUBLE), []
    for t in range(7):
        i = t % 3
        anchor, total = (own, 0.0) if i == 0 and t else (W, 0.0) if t == 0 else (anchor, total)
        error = torch.einsum("bhk,bhkv->bhv", k[:, t], anchor) - v[:, t]
        total = total + 0.7 * rate[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        own = anchor - max(1 / (i + 1) + float(offset[i]), 0) * total
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], own))
    laws.agree("o", o, torch.stack(outputs, 1))


@pytest.mark.parametrize("rule", [df.rules.SGD(lr=0.7, averaged=True), df.rules.SGD(lr=0.3, momentum=0.5, decay=0.1)])
def test_losses_are_those_of_the_definition(rule):
    torch.manual_seed(0)
    learner = df.learners.residual_norm(df.learners.MLP(depth=2, expand=2))(4).double()
    program, b = df.derive(learner, "squared", rule, chunk=3), 3
    k, v, lr = torch.randn(2, 8, 2, 4).double(), torch.randn(2, 8, 2, 4).double(), torch.rand(2, 8, 2).double()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :2] = False
    before, after, state = program.losses(k, v, {"lr": lr}, mask=mask)
    o, expected_state = program(k, k, v, {"lr": lr}, mask=mask, form="primal")
    objective = df.objectives.Squared().build()
    torch.testing.assert_close(after, objective(o, v) * mask[..., None], rtol=1e-10, atol=1e-10)
    for name, x in state.tensors().items():
        torch.testing.assert_close(x, expected_state.tensors()[name], rtol=1e-10, atol=1e-10)
    carried, found = None, []
    for start in range(0, 8, b):  # the row without padding: its anchors are the states at the cuts
        part = slice(start, start + b)
        anchor = (carried or program.initial_state(1, 2)).anchor
        for h in range(2):
            weights = {**dict(learner.named_parameters()), **{n: w[0, h] for n, w in anchor.items()}}
            found.append(objective(torch.func.functional_call(learner, weights, (k[0, part, h],)), v[0, part, h]))
        _, carried = program(k[:1, part], k[:1, part], v[:1, part], {"lr": lr[:1, part]}, state=carried, form="primal")
    expected = torch.cat([torch.stack(found[i : i + 2], 1) for i in range(0, len(found), 2)])
    torch.testing.assert_close(before[0], expected, rtol=1e-10, atol=1e-10)

"""Programs, layers and models under torch's transforms: forward mode, Hessians, vmap;
beside the primal form."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import dualform as df
from dualform import testing as laws
from dualform.learning import grid
from dualform.models import attention
from dualform.models.attention import Attention

# torch's forward mode scripts some of its formulas the first time that it is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")


class Frozen(nn.Module):
    """A learner with a slow gain, a table and a detached gate."""

    slow = ("gain",)

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4) / 2)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("table", torch.randn(4))

    def forward(self, x):
        return torch.tanh(x @ self.W * self.gain) + self.table * x.detach().sigmoid()


class PerToken(nn.Module):
    """Weights that enter nonlinearly: one set of them for each token."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        return x @ self.w.softmax(0)


titans = df.Rule(
    step=lambda i, lr, forget, keep: df.Step(A=((1 - forget, keep), (0.0, keep)), b=(lr, lr), u=(1.0, 0.0), a=0.0),
    gates=("lr", "forget", "keep"),
    constants={"forget": 0.1, "keep": 0.5},
    start=(1.0, 0.0),
    resets=(False, False),
)
rules = {
    "sgd": df.rules.SGD(lr=0.5),
    "averaged": df.rules.SGD(lr=0.5, averaged=True),
    "momentum, decay": df.rules.SGD(lr=0.3, momentum=0.5, decay=0.1),
    "titans": titans,
}
learners = {
    "mlp": lambda: df.learners.MLP(depth=2, expand=2)(4),
    "slow, table, detach": Frozen,
    "per token": PerToken,
}
layouts = {
    "aligned": {},
    "carried": {"carried": True},
    "ragged": {"ragged": True, "resets": True, "carried": True},
}


def problem(learner="mlp", rule="sgd", layout="aligned", chunk=3, time=7, seed=0):
    torch.manual_seed(seed)
    program = df.derive(learners[learner]().double(), rule=rules[rule], chunk=chunk)
    return laws.draw(program, seed=seed, time=time, **layouts[layout])


def as_function(p, form="auto"):
    """The call as a function of its tensors, (o, state) as a tuple of floating tensors."""

    def run(tensors):
        o, state = laws.Problem(p.program, tensors, p.mask, p.reset, p.position).run(form)
        return (o, *(x for x in state.tensors().values() if x.is_floating_point()))

    return run, {name: x.detach() for name, x in p.tensors.items()}


def random_like(tensors, seed=5):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=g, dtype=x.dtype) for name, x in tensors.items()}


def scalar(results):
    return sum(
        (x * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).cos().reshape(x.shape)).sin().sum() for x in results
    )


def same(got, wanted, where):
    assert len(got) == len(wanted)
    for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
        laws.agree(f"{where} {n}", a, b)


cases = [
    *[(learner, "sgd", layout) for learner in learners for layout in layouts],
    *[("mlp", rule, layout) for rule in list(rules)[1:] for layout in ("carried", "ragged")],
]


@pytest.mark.parametrize(("learner", "rule", "layout"), cases)
def test_transforms_agree_with_the_definition(learner, rule, layout):
    """jvp, dual numbers, vjp, double backward and forward over reverse: every tensor of the call at once, 1e-10."""
    p = problem(learner, rule, layout)
    (f, x), (primal, _) = as_function(p), as_function(p, "primal")
    dx = random_like(x)
    values, tangents = jvp(primal, (x,), (dx,))
    got = jvp(f, (x,), (dx,))
    same(got[0], values, "value")
    same(got[1], tangents, "tangent")
    with forward_ad.dual_level():
        dual = f({name: forward_ad.make_dual(t, dx[name]) for name, t in x.items()})
        found = [
            forward_ad.unpack_dual(y) for y in dual
        ]  # torch's None is the tangent of a constant: a register set anew
        same([torch.zeros_like(y) if t is None else t for y, t in found], tangents, "dual tangent")

    def gradient(function):
        return lambda tensors: grad(lambda t: scalar(function(t)))(tensors)

    wanted = gradient(primal)(x)
    same(gradient(f)(x).values(), wanted.values(), "gradient")
    second = jvp(gradient(primal), (x,), (dx,))[1]
    same(jvp(gradient(f), (x,), (dx,))[1].values(), second.values(), "forward over reverse")
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    first = torch.autograd.grad(scalar(f(leaves)), list(leaves.values()), create_graph=True, materialize_grads=True)
    same(first, wanted.values(), "first backward")
    again = torch.autograd.grad(first, list(leaves.values()), list(dx.values()), materialize_grads=True)
    same(again, second.values(), "double backward")


@pytest.mark.parametrize("layout", list(layouts))
def test_finite_differences(layout):
    """First and second derivatives of every tensor of the call, both modes, by torch's own check.

    With a fast norm, whose third derivative torch itself has wrong (2.13),
    so that no definition is there to compare with.
    """
    torch.manual_seed(0)
    learner = df.learners.residual_norm(df.learners.MLP(depth=1))(4).double()
    program = df.derive(learner, rule=rules["momentum, decay"], chunk=2)
    f, x = as_function(laws.draw(program, time=4, heads=1, **layouts[layout]))

    def of(*tensors):
        return scalar(f(dict(zip(x, tensors, strict=True))))

    given = [t.clone().requires_grad_() for t in x.values()]
    assert gradcheck(of, given, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(of, given, fast_mode=True, check_fwd_over_rev=True)


def test_vmap_over_inputs_parameters_and_states():
    p = problem("mlp", "momentum, decay", "carried")
    f, x = as_function(p)
    many = {name: torch.stack([t, 0.5 * t, t + 0.1]) for name, t in x.items()}
    for names in (
        ["q"],
        ["k", "v"],
        [n for n in x if "param" in n],
        [n for n in x if "anchor" in n or "register" in n],
        list(x),
    ):
        dims = {name: 0 if name in names else None for name in x}
        got = vmap(f, in_dims=(dims,))({n: many[n] if n in names else x[n] for n in x})
        alone = [f({n: many[n][j] if n in names else x[n] for n in x}) for j in range(3)]
        same(got, [torch.stack(y) for y in zip(*alone, strict=True)], f"vmap over {names[0]}")
    nested = vmap(lambda q: vmap(lambda v: f(x | {"q": q, "v": v}))(many["v"]))(many["q"])
    laws.agree("nested", nested[0][1, 2], f(x | {"q": many["q"][1], "v": many["v"][2]})[0])


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap_over_masks_resets_and_positions(masked, resets):
    """Layouts that differ where vmap hides it, calls that are all padding among them, with gradients."""
    torch.manual_seed(0)
    program = df.derive(learners["mlp"]().double(), rule=rules["momentum, decay"], chunk=3)
    drawn = [laws.draw(program, seed=s, ragged=True, resets=True, carried=True, time=7) for s in range(4)]
    masks = torch.stack([p.mask for p in drawn])
    masks[3] = False
    given = {name: torch.stack([p.tensors[name].detach() for p in drawn]) for name in drawn[0].tensors}
    marks = (
        torch.stack([p.position for p in drawn]),
        masks if masked else None,
        torch.stack([p.reset for p in drawn]) if resets else None,
    )

    def run(tensors, position, mask, reset):
        o, state = laws.Problem(program, tensors, mask, reset, position).run("auto")
        return o, state

    def loss(*call):
        o, state = run(*call)
        return scalar([o, *(x for x in state.tensors().values() if x.is_floating_point())])

    dims = (0, 0, 0 if masked else None, 0 if resets else None)
    o, state = vmap(run, in_dims=dims)(given, *marks)
    gradients = vmap(grad(loss), in_dims=dims)(given, *marks)
    for j in range(4):
        call = ({n: t[j] for n, t in given.items()}, *(None if m is None else m[j] for m in marks))
        alone, after = run(*call)
        laws.agree("o", o[j], alone)
        for name, t in after.tensors().items():
            laws.agree(name, state.tensors()[name][j], t)
        for name, t in grad(loss)(*call).items():
            laws.agree(f"gradient of {name}", gradients[name][j], t)


def test_padding_never_reaches_anything_under_vmap():
    torch.manual_seed(0)
    program = df.derive(learners["mlp"]().double(), chunk=3)
    x = torch.randn(3, 2, 6, 1, 4, dtype=torch.float64)
    mask = torch.rand(3, 2, 6) > 0.4
    mask[0, 1], mask[2] = False, False
    clean = x.masked_fill(~mask[..., None, None], 0.3)
    dirty = x.masked_fill(~mask[..., None, None], torch.nan)

    def loss(x, mask):
        o, state = program(x, x, x, mask=mask)
        return (
            o.square().sum()
            + state.anchor["norm.weight" if "norm.weight" in state.anchor else next(iter(state.anchor))].square().sum()
        )

    wanted = torch.stack([grad(loss)(a, m) for a, m in zip(clean, mask, strict=True)])
    laws.agree("gradient", vmap(grad(loss))(dirty, mask), wanted)


def test_the_grid_of_unknown_layouts_is_the_known_one():
    torch.manual_seed(0)
    mask, reset, position = torch.rand(5, 2, 9) > 0.3, torch.rand(5, 2, 9) > 0.8, torch.randint(0, 4, (5, 2))
    after = vmap(lambda p, m, r: grid.arrange(9, 4, p, m, r, torch.float64).position)(position, mask, reset)
    wanted = [
        grid.arrange(9, 4, p, m, r, torch.float64).position for p, m, r in zip(position, mask, reset, strict=True)
    ]
    assert torch.equal(after, torch.stack(wanted))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # linearize folds constants so
def test_jacobians_and_hessians():
    p = problem("mlp", "averaged", "aligned", chunk=2, time=3)
    f, x = as_function(p)
    primal, _ = as_function(p, "primal")

    def of_v(function):
        return lambda v: function(x | {"v": v})[0]

    wanted = jacrev(of_v(primal))(x["v"])
    laws.agree("jacrev", jacrev(of_v(f))(x["v"]), wanted)
    laws.agree("jacfwd", jacfwd(of_v(f))(x["v"]), wanted)
    value, pushed = linearize(of_v(f), x["v"])
    dv = torch.randn_like(value)
    laws.agree("linearize", pushed(dv), jvp(of_v(primal), (x["v"],), (dv,))[1])
    laws.agree("vjp", vjp(of_v(f), x["v"])[1](dv)[0], vjp(of_v(primal), x["v"])[1](dv)[0])
    functional = torch.autograd.functional
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        laws.agree(f"functional.jacobian {options}", functional.jacobian(of_v(f), x["v"], **options), wanted)

    def loss(function):
        return lambda v: scalar([function(x | {"v": v})[0]])

    second = hessian(loss(primal))(x["v"])
    laws.agree("hessian", hessian(loss(f))(x["v"]), second)
    laws.agree("jacrev(jacrev)", jacrev(jacrev(loss(f)))(x["v"]), second)
    laws.agree("jacfwd(jacfwd)", jacfwd(jacfwd(loss(f)))(x["v"]), second)
    laws.agree("functional.hessian", functional.hessian(loss(f), x["v"]), second)
    wanted = (second.flatten(4).flatten(0, 3) @ dv.flatten()).reshape(dv.shape)
    for product in (functional.hvp, functional.vhp):
        laws.agree(product.__name__, product(loss(f), x["v"], dv)[1], wanted)
    laws.agree("functional.jvp", functional.jvp(of_v(f), x["v"], dv)[1], jvp(of_v(primal), (x["v"],), (dv,))[1])


def test_many_cotangents_at_once():
    p = problem("mlp", "sgd", "ragged")
    f, x = as_function(p)
    leaf = x["v"].clone().requires_grad_()
    o = f(x | {"v": leaf})[0]
    cotangents = torch.randn(3, *o.shape, dtype=o.dtype)
    many = torch.autograd.grad(o, leaf, cotangents, is_grads_batched=True, retain_graph=True)[0]
    for j in range(3):
        laws.agree("gradient", many[j], torch.autograd.grad(o, leaf, cotangents[j], retain_graph=True)[0])


def test_a_tensor_given_twice_has_both_gradients():
    """q, k and v are one tensor, and the weights another's function: second derivatives too."""
    torch.manual_seed(0)
    program = df.derive(learners["mlp"]().double(), rule=rules["averaged"], chunk=2)
    x = 0.3 * torch.randn(2, 5, 2, 4, dtype=torch.float64)
    x.requires_grad_()
    found = []
    for form in ("auto", "primal"):
        y = x * 2
        o, _ = program(y, y, y, form=form)
        first = torch.autograd.grad(o.sin().sum(), [x, *program.learner.parameters()], create_graph=True)
        found.append(
            [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, *program.learner.parameters()])]
        )
    same(found[0], found[1], "gradient")


def test_third_derivatives():
    p = problem("slow, table, detach", "sgd", "carried", chunk=2, time=3)
    (f, x), (primal, _) = as_function(p), as_function(p, "primal")
    found = []
    for function in (f, primal):
        leaf = x["k"].clone().requires_grad_()
        y = scalar(function(x | {"k": leaf}))
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        found.append(y.detach())
    laws.agree("third derivative", *found)


def test_losses_under_transforms():
    torch.manual_seed(0)
    program = df.derive(learners["mlp"]().double(), chunk=3)
    x, dx = torch.randn(2, 2, 7, 2, 4, dtype=torch.float64)
    leaf, h = x.clone().requires_grad_(), 1e-6

    def f(x):
        return program.losses(x, x.cos())[1]

    pushed = jvp(f, (x,), (dx,))[1]
    first = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)[0]
    laws.agree("jvp, vjp", pushed.sum().detach(), (first * dx).sum().detach())
    assert torch.allclose(pushed, (f(x + h * dx) - f(x - h * dx)) / (2 * h), atol=1e-7)
    (second,) = torch.autograd.grad(first, leaf, dx)
    step = [grad(lambda x: f(x).sum())(x + s * h * dx) for s in (1, -1)]
    assert torch.allclose(second, (step[0] - step[1]) / (2 * h), atol=1e-6)


def test_nothing_that_a_transform_made_outlives_it():
    """What the first call keeps for later ones is plain, whatever was at work around it."""
    grid._sliced.cache_clear()
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=4, share_qk=True).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    wanted = copy.deepcopy(layer)(x[:, :11])[0]
    grid._sliced.cache_clear()
    vmap(grad(lambda x: layer(x[None])[0].sum()))(x)
    jvp(lambda x: layer(x)[0], (x,), (x,))
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)[0]
    y.sum().backward()
    laws.agree("y", y, wanted)


@pytest.mark.parametrize("options", [{}, {"share_qk": True, "use_gate": True}, {"rule": df.rules.SGD(averaged=True)}])
def test_layers(options):
    """Per-sample gradients, ensembles of weights, jvp and double backward through a layer, with a mask."""
    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner="linear", chunk=3, **options).double()
    x, mask = torch.randn(3, 7, 8, dtype=torch.float64), torch.rand(3, 7) > 0.3
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x, mask):
        return functional_call(layer, parameters, (x[None],), {"attention_mask": mask[None]})[0].sin().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, mask)
    for j in range(3):
        layer.zero_grad()
        loss(dict(layer.named_parameters()), x[j], mask[j]).backward()
        for name, p in layer.named_parameters():
            laws.agree(f"sample {j} {name}", each[name][j], torch.zeros_like(p) if p.grad is None else p.grad)
    ensemble = {name: torch.stack([p, 1.1 * p]) for name, p in parameters.items()}
    got = vmap(loss, in_dims=(0, None, None))(ensemble, x[0], mask[0])
    laws.agree("ensemble", got[1], loss({n: p[1] for n, p in ensemble.items()}, x[0], mask[0]))
    h, dp = 1e-6, random_like(parameters)
    shifted = [{n: p + s * h * dp[n] for n, p in parameters.items()} for s in (1, -1)]
    pushed = jvp(lambda p: loss(p, x[0], mask[0]), (parameters,), (dp,))[1]
    assert torch.allclose(
        pushed, (loss(shifted[0], x[0], mask[0]) - loss(shifted[1], x[0], mask[0])) / (2 * h), atol=1e-6
    )
    twice = jvp(lambda p: grad(loss)(p, x[0], mask[0]), (parameters,), (dp,))[1]
    sides = [grad(loss)(p, x[0], mask[0]) for p in shifted]
    layer.zero_grad()
    own = dict(layer.named_parameters())
    first = torch.autograd.grad(loss(own, x[0], mask[0]), list(own.values()), create_graph=True, materialize_grads=True)
    again = torch.autograd.grad(
        sum((g * dp[n]).sum() for n, g in zip(own, first, strict=True)), list(own.values()), materialize_grads=True
    )
    for name, g in zip(own, again, strict=True):
        laws.agree(f"Hessian times a vector, {name}", twice[name], g)
        assert torch.allclose(g, (sides[0][name] - sides[1][name]) / (2 * h), atol=1e-5), name


@pytest.mark.parametrize("kind", ["test_time", "full_attention", "sliding_attention"])
def test_models(kind):
    """An ensemble of weights by vmap; forward mode is the transpose of reverse mode."""
    torch.manual_seed(0)
    config = df.DualformConfig(preset="tiny-ttt-linear", num_hidden_layers=1, layer_types=[kind], sliding_window=4)
    model = df.DualformForCausalLM(config).double().eval()
    ids = torch.randint(3, 259, (2, 9))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(parameters):
        return functional_call(model, parameters, (), {"input_ids": ids, "use_cache": False}).logits

    ensemble = {name: torch.stack([p, 1.1 * p]) for name, p in parameters.items()}
    laws.agree("ensemble", vmap(logits)(ensemble)[1], logits({name: p[1] for name, p in ensemble.items()}))
    dp = random_like(parameters)
    y, pushed = jvp(logits, (parameters,), (dp,))
    dy = torch.randn_like(y)
    own = dict(model.named_parameters())
    pulled = torch.autograd.grad(
        (logits(own) * dy).sum(), list(own.values()), allow_unused=True, materialize_grads=True
    )
    sides = (pushed * dy).sum(), sum((g * dp[name]).sum() for name, g in zip(own, pulled, strict=True)).detach()
    assert torch.allclose(*sides, rtol=1e-10), sides


@pytest.mark.parametrize("fields", [{}, {"pre_conv": True, "share_qk": True}], ids=["plain", "convolutions"])
@pytest.mark.parametrize("kind", ["test_time", "full_attention", "sliding_attention"])
def test_models_twice(kind, fields):
    """The gradient of a model's gradient outside torch.func is what forward mode makes of it,
    also where layers run again."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "chunk": 4}
    kinds = {"layer_types": [kind, "full_attention"], "sliding_window": 4}
    model = df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-linear", **sizes, **kinds, **fields)).double()
    ids, mask = torch.randint(3, 259, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100), "use_cache": False}
    own = dict(model.named_parameters())
    dp = random_like(own)

    def loss(parameters):
        return functional_call(model, parameters, (), batch).loss

    wanted = jvp(grad(loss), ({name: p.detach() for name, p in own.items()},), (dp,))[1]
    assert loss(own).dtype == torch.float64
    for _ in range(2):
        first = torch.autograd.grad(loss(own), list(own.values()), create_graph=True)
        again = torch.autograd.grad(
            sum((g * dp[n]).sum() for n, g in zip(own, first, strict=True)), list(own.values()), materialize_grads=True
        )
        for name, g in zip(own, again, strict=True):
            assert torch.allclose(g, wanted[name], rtol=1e-7, atol=1e-9), name
        model.train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_three_times(masked):
    """SDPA's kernels have one derivative; a layer has as many as are asked for, by cotangents of any kind."""
    torch.manual_seed(0)
    layer, positions = Attention(8, 2, 1e4).double(), torch.arange(7)[None]
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool) if masked else None

    def run(x, with_weights=False):
        return layer(x, positions, mask, None, None, with_weights)[0]

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)
    thrice = []
    for with_weights in (False, True):
        first = torch.autograd.grad(run(x, with_weights).sin().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.cos().sum(), x, create_graph=True)[0]
        thrice.append(torch.autograd.grad(second.sin().sum(), x)[0])
    laws.agree("third", *thrice)
    y = run(x)
    many = torch.randn(3, *y.shape, dtype=torch.float64)
    each = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in many])
    for create_graph in (False, True):
        got = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True, create_graph=create_graph)[0]
        laws.agree("many", got, each)
    with forward_ad.dual_level():
        dual = torch.autograd.grad(y, x, forward_ad.make_dual(many[0], many[1]), retain_graph=True)[0]
        laws.agree("tangent of the cotangent", torch.stack(forward_ad.unpack_dual(dual)), each[:2])


def test_attention_differentiated_once_is_the_kernels(monkeypatch):
    """A backward that nobody differentiates computes no weights, and keeps no more than SDPA does."""
    monkeypatch.setattr(attention, "attend", None)
    layer, x = Attention(8, 2, 1e4), torch.randn(2, 7, 8, requires_grad=True)
    y = layer(x, torch.arange(7)[None], None, None, None)[0]
    y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.arange(7)[None], None, None, None)[0]
    y.sum().backward()
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.arange(7)[None], None, None, None)[0]
    (first,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    first.square().sum().backward()

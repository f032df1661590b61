"""The layer against an independent reading of the paper's equations, and the laws of sequence layers, every variant."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualform as df
from dualform import testing as laws
from dualform.learning.layer import LayerState, rotate
from dualform.shapes import ShapeError

DOUBLE = torch.float64
GELU = math.sqrt(2 / math.pi)
shells = list(itertools.product([False, True], repeat=3))  # share_qk, use_gate, post_norm
hidden = {"linear": df.learners.Linear(), "mlp": df.learners.MLP(depth=2, expand=2)}


def make(kind="linear", chunk=3, share_qk=False, use_gate=False, post_norm=True, rule=None, lr=0.7):
    """A layer of double precision whose every parameter matters."""
    torch.manual_seed(0)
    layer = df.TestTimeTraining(
        8, 2, learner=df.learners.residual_norm(hidden[kind]), chunk=chunk, share_qk=share_qk, use_gate=use_gate,
        rule=rule or df.rules.SGD(lr=lr, averaged=True), post_norm=post_norm,
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- an independent reading ----------------------------------------------------------------------------------------


def complex_rope(x, chunk, theta=1e4):
    """Pairs (2i, 2i+1) as complex numbers, turned by position mod chunk. x (B, T, H, f)."""
    T, f = x.shape[1], x.shape[-1]
    angle = torch.outer(torch.arange(T) % chunk, theta ** (-torch.arange(0, f, 2).double() / f))
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def norm_and_gradient(Z, gain, bias, target, eps=1e-6):
    """LN(Z) against target: dl/dZ, by the formula of theory 1.2."""
    f = Z.shape[-1]
    std = (Z.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    hat = (Z - Z.mean(-1, keepdim=True)) / std
    g = gain * (gain * hat + bias - target)
    return (f * g - g.sum(-1, keepdim=True) - hat * (g * hat).sum(-1, keepdim=True)) / (f * std)


def gelu_slope(x):
    t = torch.tanh(GELU * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (GELU + 3 * 0.044715 * GELU * x * x)) + 0.5 * (1 + t)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(GELU * x * (1 + 0.044715 * x * x)))


def dual_form(weights, gain, bias, q, k, v, eta):
    """One mini-batch of one head by hand, theory 1.5: (outputs, next weights). eta (b, b): [i, j] = tok_i lr_j."""
    low, last = eta.tril(), eta[-1][:, None]

    def corrected(x, y, W, b, G):
        return x @ W - (low * (x @ y.T)) @ G + b - low @ G, W - (last * y).T @ G, b - (last * G).sum(0)

    if len(weights) == 2:
        W, b = weights
        G = norm_and_gradient(k @ W + b, gain, bias, v - k)
        Z, *after = corrected(q, k, W, b, G)
    else:
        W1, b1, W2, b2 = weights
        Z1 = k @ W1 + b1
        X2 = gelu(Z1)
        G2 = norm_and_gradient(X2 @ W2 + b2, gain, bias, v - k)
        G1 = (G2 @ W2.T) * gelu_slope(Z1)
        H, *first = corrected(q, k, W1, b1, G1)
        Z, *second = corrected(gelu(H), X2, W2, b2, G2)
        after = [*first, *second]
    return q + F.layer_norm(Z, Z.shape[-1:], gain, bias, 1e-6), after


def by_hand(layer, x, lr=0.7):
    """The whole layer from its parameters."""
    B, T, _ = x.shape
    heads, f, b = layer.heads, layer.head_dim, layer.chunk
    q = x @ layer.q_proj.weight.T
    if layer.k_proj is None:
        q, k = (
            F.conv1d(F.pad(q.mT, (3, 0)), c.weight, c.bias, groups=c.groups).mT for c in (layer.conv_q, layer.conv_k)
        )
    else:
        k = x @ layer.k_proj.weight.T
    q, k, v = (y.unflatten(-1, (heads, f)) for y in (q, k, x @ layer.v_proj.weight.T))
    q, k = complex_rope(q, b), complex_rope(k, b)
    rate = lr * torch.sigmoid(torch.einsum("btd,hd->bth", x, layer.rate_weight) + layer.rate_bias) / f
    tok = (1 / torch.arange(1, b + 1).double() + layer.offset).clamp(min=0)
    names = [n for n in layer.leaves if n.startswith("inner.")]
    z = torch.zeros(B, T, heads, f, dtype=x.dtype)
    final = {}
    for n, h in itertools.product(range(B), range(heads)):
        weights = [getattr(layer, layer.leaves[name])[h] for name in names]
        gain, bias = (getattr(layer, layer.leaves[f"norm.{name}"])[h] for name in ("weight", "bias"))
        for start in range(0, T, b):
            at = slice(start, min(start + b, T))
            eta = torch.outer(tok[: at.stop - start], rate[n, at, h])
            out, after = dual_form(weights, gain, bias, q[n, at, h], k[n, at, h], v[n, at, h], eta)
            z[n, at, h] = out
            weights = after if at.stop - start == b else weights
        final[n, h] = dict(zip(names, weights, strict=True))
    y = z.flatten(2)
    y = (
        y
        if layer.post_norm is None
        else F.layer_norm(y, y.shape[-1:], layer.post_norm.weight, layer.post_norm.bias, 1e-6)
    )
    y = y if layer.g_proj is None else gelu(x @ layer.g_proj.weight.T) * y
    return y @ layer.o_proj.weight.T, final


@pytest.mark.parametrize("kind", hidden)
@pytest.mark.parametrize(("share_qk", "use_gate", "post_norm"), shells)
def test_the_layer_is_the_papers(kind, share_qk, use_gate, post_norm):
    """TTT-Linear and TTT-MLP, both backbones: the hand-written dual form, and a remainder shorter than a mini-batch."""
    layer, x = make(kind, share_qk=share_qk, use_gate=use_gate, post_norm=post_norm), rand(2, 8, 8)
    with torch.no_grad():
        y, state = layer(x)
        wanted, final = by_hand(layer, x)
    laws.agree("y", y, wanted)
    for (n, h), weights in final.items():
        for name, w in weights.items():
            laws.agree(f"{name} of row {n}, head {h}", state.memory.anchor[name][n, h], w)


def test_rope_is_complex_multiplication():
    x = rand(2, 11, 3, 6)
    position = torch.arange(11).expand(2, 11) % 4
    laws.agree("rope", rotate(x, position, 1e4), complex_rope(x, 4))
    laws.agree("norm", rotate(x, position, 1e4).norm(dim=-1), x.norm(dim=-1))


def test_the_rate_is_the_gates():
    """The gates that reach the program: sigmoid(<w_h, x> + c_h) / head_dim, times the rule's own rate there."""
    layer, x = make(), rand(2, 5, 8)
    seen = {}
    real = layer.program

    class Spy:
        def __getattr__(self, name):
            return getattr(real, name)

        def __call__(self, q, k, v, gates, **options):
            seen.update(gates)
            return real(q, k, v, gates, **options)

    layer.program = Spy()
    layer(x)
    logits = (x[:, :, None] * layer.rate_weight).sum(-1) + layer.rate_bias
    laws.agree("lr", seen["lr"], 1 / (1 + torch.exp(-logits)) / 4)
    assert seen["offset"] is layer.offset
    assert seen["lr"].shape == (2, 5, 2)


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share_qk", "use_gate", "post_norm"), shells)
def test_every_split_is_one_call(share_qk, use_gate, post_norm):
    layer = make("linear", share_qk=share_qk, use_gate=use_gate, post_norm=post_norm)
    n = shells.index((share_qk, use_gate, post_norm))
    laws.check_layer(layer, [[1, 4], [3], [3, 6], [4]][n % 4], seed=n, time=8)
    laws.check_layer(layer, [[2, 5], [1, 4]][n % 2], seed=n, time=8, ragged=True, resets=n % 2 == 0)


def test_decoding_is_the_whole_with_momentum():
    laws.check_layer(make("mlp", share_qk=True, rule=df.rules.SGD(lr=0.5, momentum=0.5)), range(1, 7), time=7)


@pytest.mark.parametrize("share_qk", [False, True])
def test_padding_changes_nothing(share_qk):
    """Left, right and scattered padding, as a tokenizer gives it: rows of one batch, each as if alone."""
    layer = make(share_qk=share_qk)
    lengths, T = [7, 4, 0], 7
    rows = [rand(1, n, 8, seed=n) for n in lengths]
    alone = [layer(x) for x in rows]
    scattered = [torch.arange(7), torch.tensor([0, 2, 3, 6]), torch.tensor([], dtype=torch.long)]
    for places in (
        [torch.arange(T - n, T) for n in lengths], [torch.arange(n) for n in lengths], scattered,
    ):  # fmt: skip
        x, mask = rand(3, T, 8, seed=9), torch.zeros(3, T, dtype=torch.long)
        for row, (at, tokens) in enumerate(zip(places, rows, strict=True)):
            x[row, at], mask[row, at] = tokens[0], 1
        y, state = layer(x, attention_mask=mask)
        for row, at in enumerate(places):
            laws.agree(f"y of row {row}", y[row, at], alone[row][0][0])
            for name, t in alone[row][1].tensors().items():
                laws.agree(f"state {name} of row {row}", state.tensors()[name][row], t[0])


@pytest.mark.parametrize("share_qk", [False, True])
def test_documents_of_one_row_are_apart(share_qk):
    layer, parts = make(share_qk=share_qk), [rand(1, n, 8, seed=n) for n in (4, 1, 3)]
    x = torch.cat(parts, 1)
    reset = torch.zeros(1, 8, dtype=torch.bool)
    reset[0, [4, 5]] = True
    y, state = layer(x, reset=reset)
    alone = [layer(part) for part in parts]
    laws.agree("y", y, torch.cat([o for o, _ in alone], 1))
    for name, t in alone[-1][1].tensors().items():
        laws.agree(name, state.tensors()[name], t)


def test_states_fork_select_and_survive_the_disk(tmp_path):
    layer = make(share_qk=True)
    _, state = layer(rand(2, 5, 8))
    x = rand(2, 4, 8, seed=1)
    y, _ = layer(x, state)
    state.save(tmp_path / "layer.safetensors")
    back = LayerState.load(tmp_path / "layer.safetensors")
    assert back.tensors().keys() == state.tensors().keys()
    laws.agree("loaded", layer(x, back)[0], y)
    laws.agree("forked", layer(x.repeat_interleave(2, 0), state.fork(2))[0], y.repeat_interleave(2, 0))
    rows = torch.tensor([1, 1, 0])
    laws.agree("selected", layer(x[rows], state.select(rows))[0], y[rows])
    assert not any(t.requires_grad for t in state.detach().tensors().values())
    state.memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"LayerState.load: .*'anchor.inner.W1'.*expected 'memory"):
        LayerState.load(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"State.load: .*'memory.position'"):
        df.State.load(tmp_path / "layer.safetensors")


@pytest.mark.parametrize("kind", hidden)
def test_gradients_reach_every_parameter(kind):
    layer, x = make(kind, share_qk=True, use_gate=True), rand(2, 8, 8)
    y, _ = layer(x)
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad.flatten(1).abs().sum(1) > 0).all() if p.ndim > 1 else p.grad.any(), name


def test_heads_start_apart_and_learn_alone():
    layer = df.TestTimeTraining(8, 2, learner=df.learners.Linear())
    assert not torch.equal(layer.initial_W1[0], layer.initial_W1[1])
    assert layer.initial_W1.shape == (2, 4, 4)


def test_a_learner_of_ones_own_with_a_buffer():
    class Own(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.W = nn.Parameter(0.3 * torch.randn(dim, dim))
            self.register_buffer("table", torch.linspace(0.5, 1.5, dim))

        def forward(self, x):
            return torch.tanh(x @ self.W) * self.table

    torch.manual_seed(0)
    layer = df.TestTimeTraining(8, 2, learner=Own, rule=df.rules.SGD(lr=0.5), chunk=3).double()
    laws.check_layer(layer, [2, 4], time=6)
    layer.learner_table.mul_(2)  # the layer's own buffer, not a constant of the trace
    before = layer(rand(1, 4, 8))[0]
    layer.learner_table.mul_(2)
    assert not torch.allclose(before, layer(rand(1, 4, 8))[0])


def test_sizes_that_do_not_fit_say_so():
    spec = df.learners.Linear()
    with pytest.raises(ValueError, match=r"dim is 10 with heads = 3; expected dim % heads = 0, here 1"):
        df.TestTimeTraining(10, 3, learner=spec)
    with pytest.raises(ValueError, match=r"dim / heads = 3; expected an even number"):
        df.TestTimeTraining(6, 2, learner=spec)
    layer = make()
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 7\); expected .*dim = 8"):
        layer(rand(2, 5, 7))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\)"):
        layer(rand(2, 5, 8), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"state has 2 rows .*expected batch = 3 rows"):
        layer(rand(3, 5, 8), layer(rand(2, 5, 8))[1])
    with pytest.raises(ValueError, match=r"convolutions \['qk'\]; expected .*\[\]"):
        layer(rand(2, 5, 8), make(share_qk=True)(rand(2, 5, 8))[1])
    with pytest.raises(ValueError, match="another model"):
        layer(rand(2, 5, 8), make("mlp")(rand(2, 5, 8))[1])


def test_a_state_that_is_not_finite_names_layer_head_and_mini_batch():
    model = df.DualformForCausalLM(df.DualformConfig(preset="tiny-ttt-linear", hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2, chunk=4, vocab_size=16))  # fmt: skip
    mixers = [m for m in model.modules() if isinstance(m, df.TestTimeTraining)]
    ids = torch.arange(12)[None] % 16
    with torch.no_grad():
        for mixer in mixers:
            mixer.nan_policy = "raise"
        model(ids)
        mixers[1].rate_bias[1] = torch.nan
        with pytest.raises(
            ValueError, match=r"layer 1: program: the state's .* row 0, head 1, from mini-batch 0 on \(tokens 0 to 3"
        ):
            model(ids)
        mixers[1].nan_policy = "propagate"
        assert model(ids).logits.isnan().any()


@pytest.mark.parametrize("form", ["auto", "primal"])
def test_where_a_state_stops_being_finite(form):
    program = df.derive(hidden["linear"](4).double(), chunk=3)
    q, k, v = torch.randn(3, 2, 11, 2, 4, dtype=DOUBLE).unbind()
    v[1, 7, 1, 2] = torch.inf
    program(q, k, v, form=form)
    with pytest.raises(ValueError, match=r"row 1, head 1, from mini-batch 2 on \(tokens 6 to 8 of the call\)"):
        program(q, k, v, form=form, nan_policy="raise")
    _, state = program(q, k, v, form=form)
    with pytest.raises(ValueError, match="head 1, in the state that was passed; expected finite numbers"):
        program(q, k, v, state=state, form=form, nan_policy="raise")
    with pytest.raises(ValueError, match="nan_policy is 'stop'; expected one of"):
        program(q, k, v, nan_policy="stop")


class Pair(nn.Module):
    """Two parameters and two buffers whose names differ by a dot."""

    def __init__(self, dim):
        super().__init__()
        self.a = nn.Module()
        self.a.w, self.a_w = nn.Parameter(0.3 * torch.randn(dim, dim)), nn.Parameter(0.3 * torch.randn(dim, dim))
        self.a.register_buffer("t", torch.linspace(0.5, 1, dim))
        self.register_buffer("a_t", torch.linspace(1, 2, dim))

    def forward(self, x):
        return (x @ self.a.w) * self.a.t + torch.tanh(x @ self.a_w) * self.a_t


def test_names_that_differ_by_a_dot_are_two_tensors():
    torch.manual_seed(0)
    models = [Pair(4), Pair(4)]
    drawn = iter(models)
    layer = df.TestTimeTraining(8, 2, learner=lambda dim: next(drawn), chunk=3).double()
    assert layer.leaves == {"a.w": "initial_a_w_", "a_w": "initial_a_w"}
    assert layer.tables == {"a.t": "learner_a_t_", "a_t": "learner_a_t"}
    for name, own in layer.leaves.items():
        laws.agree(name, getattr(layer, own), torch.stack([m.get_parameter(name).double() for m in models]))
    laws.check_layer(layer, [2], time=5)
    y, _ = layer(rand(1, 5, 8))
    y.square().sum().backward()
    assert all(getattr(layer, own).grad.abs().max() > 0 for own in layer.leaves.values())
    again = df.TestTimeTraining(8, 2, learner=Pair, chunk=3).double()
    again.load_state_dict(layer.state_dict())
    laws.agree("loaded", again(rand(1, 5, 8))[0], y)


def test_names_of_saved_layers_are_what_they_were():
    layer = df.TestTimeTraining(8, 2, learner=df.learners.residual_norm(df.learners.MLP()))
    assert set(layer.leaves.values()) == {"initial_inner_W1", "initial_inner_b1", "initial_inner_W2", "initial_inner_b2", "initial_norm_weight", "initial_norm_bias"}  # fmt: skip


class Frozen(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.W, self.table = (
            nn.Parameter(0.3 * torch.randn(dim, dim)),
            nn.Parameter(torch.ones(dim), requires_grad=False),
        )

    def forward(self, x):
        return x @ self.W * self.table


def test_frozen_parameters_stay_frozen():
    layer = df.TestTimeTraining(8, 2, learner=Frozen)
    assert layer.initial_W.requires_grad
    assert not layer.initial_table.requires_grad
    assert "table" not in layer(torch.randn(1, 3, 8))[1].memory.anchor
    layer(torch.randn(1, 3, 8))[0].sum().backward()
    assert layer.initial_table.grad is None


class Moody(nn.Module):
    """Twice as much in training."""

    def __init__(self, dim):
        super().__init__()
        self.W = nn.Parameter(0.3 * torch.randn(dim, dim))

    def forward(self, x):
        return x @ self.W * (2 if self.training else 1)


def test_the_mode_reaches_the_learner():
    torch.manual_seed(0)
    layer, x = df.TestTimeTraining(8, 2, learner=Moody, post_norm=False).double(), rand(1, 5, 8)
    trained = layer(x)[0]
    twin = copy.deepcopy(layer).eval()
    laws.agree("its twin's mode is another's", layer(x)[0], trained)
    answered = layer.eval()(x)[0]
    laws.agree("twin", twin(x)[0], answered)
    assert (trained - answered).abs().max() > 1e-3
    laws.agree("and back", layer.train()(x)[0], trained)
    whole = nn.Sequential(layer).eval()
    laws.agree("as a part", whole[0](x)[0], answered)
    laws.agree("pickled", pickle.loads(pickle.dumps(layer))(x)[0], answered)


@pytest.mark.parametrize(
    "learner",
    [
        Frozen,
        lambda dim: Frozen(dim),
        df.learners.Linear(),
        "linear",
        ("MLP", {"depth": 1}),
        {"name": "LowRank", "rank": 2},
    ],
)
def test_a_learner_is_said_in_many_ways(learner):
    assert df.TestTimeTraining(8, 2, learner=learner)(torch.randn(1, 3, 8))[0].shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (Frozen(4), r"learner is a built Frozen; .* Pass Frozen, not Frozen\(4\); the head width is dim / heads = 4"),
        (nn.Linear(4, 4), r"Pass Linear, not Linear\(4\)"),
        (4, r"learner is a int; expected a class or function of the head width, here 4"),
        ("MPL", r"no record is called 'MPL'. Did you mean 'MLP'"),
        (df.rules.SGD(), r"belongs to the catalogue 'rules'"),
        (lambda dim: torch.ones(dim), r"learner made tensor\(.*; expected what builds an nn.Module"),
    ],
)
def test_what_is_no_learner_is_named(learner, message):
    with pytest.raises(ValueError, match=message):
        df.TestTimeTraining(8, 2, learner=learner)


def test_an_objective_that_learns_is_a_part_of_the_layer():
    """What it holds is trained, moved, saved and copied with the layer."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(4, 4))

        def forward(self, prediction, target):
            return (self.parts(prediction) - target).square().sum(-1)

    layers = [df.TestTimeTraining(8, 2, learner="linear", objective=Weighted(), chunk=3).double() for _ in range(2)]
    x = rand(2, 7, 8)
    layers[0](x)[0].square().sum().backward()
    assert all(p.grad is not None for p in layers[0].parameters())
    torch.optim.SGD(layers[0].parameters(), 1e-2).step()
    layers[1].load_state_dict(layers[0].state_dict())
    for other in (layers[1], copy.deepcopy(layers[0])):
        torch.testing.assert_close(other(x)[0], layers[0](x)[0])
        assert other.objective is other.program.objective is not layers[0].objective


COPIED = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
def test_programs_accounts_and_states_are_copied_alike(copied):
    program = df.derive(df.learners.MLP(depth=2)(4), rule=df.rules.SGD(lr=0.1, momentum=0.5), chunk=3, prove=False)
    x = torch.randn(1, 5, 2, 4)
    o, state = program(x, x, x)
    again, told = copied(program), program.explain("proof")
    laws.agree("program", again(x, x, x)[0], o)
    assert str(copied(told)) == str(told)
    assert copied(told).to_latex() == told.to_latex()
    assert [str(c) for c in copied(program.sites)] == [str(c) for c in program.sites]
    assert copied(program.cost) == program.cost
    assert copied(program.schedule())["forward"].text == program.schedule()["forward"].text
    kept = state.detach()
    laws.agree("state", program(x, x, x, state=copied(kept))[0], program(x, x, x, state=kept)[0])
    for carried in (state, LayerState(state, {}, state.position)):
        with pytest.raises(ShapeError, match=r"State.deepcopy: (memory.)?anchor.W1 has gradients.*state.detach\(\)"):
            copy.deepcopy(carried)

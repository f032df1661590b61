"""The official models: their recorded numbers, their weights there and back, and the faults that ours lacks."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualform as df
from dualform.cli import main
from dualform.learning import layer as layer_module
from dualform.models import (
    CheckpointError,
    DualformConfig,
    DualformForCausalLM,
    from_jax,
    from_kernels,
    load_official,
    official_names,
    presets,
    read_folder,
    to_jax,
    to_official,
)
from dualform.models.folder import write_official
from dualform.train.data import byte_tokenizer

DATA = Path(__file__).parent / "data"
references = json.loads((DATA / "ttt_index.json").read_text())
T = 37  # tokens in the recordings: two mini-batches of 16 and a rest


def recorded(name):
    """The arrays of one recording, as tensors, by their first word: sd, grad, and the rest as it is."""
    found = {"sd": {}, "grad": {}}
    with np.load(DATA / f"ttt_{name}.npz") as arrays:
        for key in arrays.files:
            head, _, rest = key.partition(".")
            (found[head] if rest else found)[rest or head] = torch.from_numpy(arrays[key])
    return found


@pytest.fixture(scope="module", params=references)
def reference(request):
    return references[request.param], recorded(request.param)


def official_shapes(config):
    """Every key and shape of the official state dict, written down once more: theory, section 1.9."""
    c = {"use_gate": False, "share_qk": False, "pre_conv": False, "conv_kernel": 4, "ttt_layer_type": "linear"} | config
    d, V, m, H, n = (
        c[k] for k in ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "conv_kernel")
    )
    f, b = d // H, c.get("mini_batch_size", 16)
    shapes = {"model.embed_tokens.weight": (V, d), "lm_head.weight": (V, d), "model.norm.weight": (d,)}
    mlp = c["ttt_layer_type"] == "mlp"
    for i in range(c["num_hidden_layers"]):
        block = {"seq_norm.weight": (d,), "ffn_norm.weight": (d,)}
        block |= {"mlp.gate_proj.weight": (m, d), "mlp.up_proj.weight": (m, d), "mlp.down_proj.weight": (d, m)}
        if c["pre_conv"]:
            block |= {"conv.norm.weight": (d,), "conv.conv.weight": (d, 1, n), "conv.conv.bias": (d,)}
        layer = {"learnable_token_idx": (b,), "learnable_ttt_lr_weight": (H, 1, d), "learnable_ttt_lr_bias": (H, 1)}
        layer |= {"ttt_norm_weight": (H, f), "ttt_norm_bias": (H, f)}
        layer |= {"W1": (H, f, 4 * f if mlp else f), "b1": (H, 1, 4 * f if mlp else f)}
        layer |= {"W2": (H, 4 * f, f), "b2": (H, 1, f)} if mlp else {}
        layer |= {f"{x}_proj.weight": (d, d) for x in "qvo"} | ({} if c["share_qk"] else {"k_proj.weight": (d, d)})
        for x in "qk" if c["share_qk"] else "":
            layer |= {f"conv_{x}.weight": (d, 1, n), f"conv_{x}.bias": (d,)}
        layer |= {"g_proj.weight": (d, d)} if c["use_gate"] else {}
        layer |= {"post_norm.weight": (d,), "post_norm.bias": (d,)}
        block |= {f"seq_modeling_block.{key}": shape for key, shape in layer.items()}
        shapes |= {f"model.layers.{i}.{key}": shape for key, shape in block.items()}
    return shapes


small = {"vocab_size": 13, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
switches = ("use_gate", "share_qk", "pre_conv", "tie_word_embeddings")


def every_option():
    """Every kind and switch; the numbers take turns."""
    cycle = itertools.cycle
    turns = {
        "mini_batch_size": cycle([4, 8, 16]),
        "conv_kernel": cycle([4, 2, 3, 1]),
        "rope_theta": cycle([500, 10000.0, 123.5]),
        "ttt_base_lr": cycle([1.0, 0.1, 2.5, 1]),
        "rms_norm_eps": cycle([1e-6, 1e-5]),
        "initializer_range": cycle([0.02, 0.1, 0.02]),
        "pad_token_id": cycle([None, 0]),
        "dtype": cycle([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    }
    for kind, *on in itertools.product(["linear", "mlp"], *[[False, True]] * len(switches)):
        config = small | {"ttt_layer_type": kind} | dict(zip(switches, on, strict=True))
        config |= {name: next(turn) for name, turn in turns.items()}
        yield config.pop("dtype"), config


def random_state(config, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = official_shapes(config)
    state = {key: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}
    if config.get("tie_word_embeddings", True):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


# -- parity --------------------------------------------------------------------------------------------------------


def test_the_recorded_numbers_are_ours(reference):
    config, arrays = reference
    model = load_official(arrays["sd"], config)
    ids = arrays["input_ids"]
    out = model(ids, labels=ids)
    assert out.logits.dtype == torch.float64
    assert (out.logits - arrays["logits"]).abs().max() < 3e-6
    assert (out.loss - arrays["loss"]).abs() < 3e-6
    out.loss.backward()
    gradients, _ = to_official(model, read=lambda p: p.grad)
    assert len(arrays["grad"]) >= 27
    for key, want in arrays["grad"].items():
        assert (gradients[key] - want).abs().max() < 1e-5 * want.abs().max(), key


@torch.no_grad()
def test_the_recorded_decoding_is_ours(reference):
    config, arrays = reference
    model, ids = load_official(arrays["sd"], config), arrays["input_ids"]
    logits, cache = [], None
    for a, b in itertools.pairwise([0, *range(config["mini_batch_size"], T + 1)]):
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, out.logits], out.past_key_values
    assert (torch.cat(logits, 1) - arrays["cached_logits"]).abs().max() < 3e-6


# -- weights there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "config"), [*every_option()])
def test_every_option_goes_there_and_back_bit_for_bit(dtype, config):
    state = random_state(config, dtype)
    model = load_official(state, config)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(x.is_meta for x in model.state_dict().values())
    back, written = to_official(model)
    same(back, state)
    assert {name: written[name] for name in config} == config
    # What was written is read again, and without its head where that is tied.
    if config["tie_word_embeddings"]:
        del back["lm_head.weight"]
    again = load_official(back, written)
    assert again.config.to_dict() == model.config.to_dict()
    same(to_official(again)[0], state)
    assert official_names(model.config).keys() == state.keys()
    assert {*official_names(model.config).values()} <= model.state_dict().keys()


def test_the_model_owns_its_weights():
    state = random_state(small)
    model = load_official(state, small)
    before = {key: x.clone() for key, x in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    same(state, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    heads, _ = to_official(model)
    assert (
        heads["lm_head.weight"].data_ptr() != heads["model.embed_tokens.weight"].data_ptr()
    )  # so that they can be saved


def test_absent_fields_mean_the_official_defaults():
    for kind in ("linear", "mlp"):
        config = small | {"ttt_layer_type": kind}
        got = load_official(random_state(config), config).config
        assert (got.rule["lr"], got.chunk, got.tie_word_embeddings) == (1.0, 16, True)
        assert (got.use_gate, got.share_qk, got.pre_conv, got.conv_kernel) == (False, False, False, 4)
        assert (got.rope_theta, got.rms_norm_eps, got.initializer_range) == (1e4, 1e-6, 0.02)
        assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (1, 2, None)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight \(32000, 2048\).*num_hidden_layers = 24"):
        load_official({}, {})


def test_what_does_not_reach_the_numbers_is_read_over():
    config = small | {
        "model_type": "ttt",
        "architectures": ["TTTForCausalLM"],
        "torch_dtype": "float32",
        "use_cache": False,
    }
    config |= {"scan_checkpoint_group_size": 4, "max_position_embeddings": 99, "transformers_version": "4.40.0"}
    model = load_official(random_state(config), config)
    assert model.config.use_cache
    model.model.layers[0].mixer.rate_scale.fill_(0.5)
    same(to_official(model)[0], random_state(config))


@pytest.mark.parametrize("name", [name for name in presets if name.startswith("ttt-")])
def test_a_preset_has_the_official_parameters(name):
    with torch.device("meta"):
        model = DualformForCausalLM(DualformConfig(preset=name))
    state, config = to_official(model)
    shapes = official_shapes(config)
    assert {key: tuple(x.shape) for key, x in state.items()} == shapes
    own = sum(int(np.prod(shape)) for key, shape in shapes.items() if key != "lm_head.weight")
    assert sum(p.numel() for p in model.parameters()) == own
    sizes = {
        "125m": (768, 2048, 12, 12),
        "350m": (1024, 2736, 24, 16),
        "760m": (1536, 4096, 24, 16),
        "1b": (2048, 5504, 24, 32),
    }
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert tuple(config[field] for field in fields) == sizes[name.split("-")[2]]
    assert config["ttt_base_lr"] == (1.0 if "linear" in name else 0.1)


@pytest.mark.parametrize(("kind", "count"), [("linear", 31_730_716), ("mlp", 32_077_852)])
def test_one_layer_with_everything_on_has_the_official_count(kind, count):
    with torch.device("meta"):
        model = DualformForCausalLM(DualformConfig(preset=f"ttt-{kind}-125m-mamba", num_hidden_layers=1))
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_head_may_be_96_wide():
    config = small | {"hidden_size": 192, "ttt_layer_type": "mlp", "mini_batch_size": 4}
    model = load_official(random_state(config, torch.float64), config)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        logits = model(ids).logits
        start = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), logits)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_initial_values_are_the_official_ones(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 300,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    spread = 0.05
    options = {"pad_token_id": 3, "initializer_range": spread, "tie_word_embeddings": False}
    model = DualformForCausalLM(DualformConfig(preset=f"ttt-{kind}-125m-mamba", **sizes, **options))
    ones = r"(seq_norm|ffn_norm|conv\.norm|model\.norm|post_norm)\.weight|ttt_norm_weight"
    zeros = r"post_norm\.bias|ttt_norm_bias|learnable_token_idx|learnable_ttt_lr_bias|\.b[12]$"
    for key, x in to_official(model)[0].items():
        if re.search(ones, key):
            assert (x == 1).all(), key
        elif re.search(zeros, key):
            assert (x == 0).all(), key
        elif re.search(r"conv(_[qk])?\.(weight|bias)$", key):
            bound = 4**-0.5  # uniform, torch's own for a kernel of 4 and one channel
            assert bound * 0.95 < x.abs().max() <= bound, key
            torch.testing.assert_close(x.std(), torch.tensor(bound / 3**0.5), rtol=0.15, atol=0, msg=key)
        else:
            # The layer's own weights have a spread of their own; projections and embeddings the configuration's.
            want = 0.02 if re.search(r"W[12]$|learnable_ttt_lr_weight", key) else spread
            torch.testing.assert_close(x.std(), torch.tensor(want), rtol=0.1, atol=0, msg=key)
            assert x.mean().abs() < 5 * want / x.numel() ** 0.5, key
    assert (model.model.embed_tokens.weight[3] == 0).all()
    assert all(layer.mixer.rate_scale == 1 for layer in model.model.layers)


# -- the other two programs --------------------------------------------------------------------------------------------


def jax_tree(state, config):
    """The pytree of ttt-lm-jax for an official state dict, each name and turn written down."""
    tree = {"model": {"wte": {"embedding": state["model.embed_tokens.weight"]}, "h": {}}}
    tree["model"]["ln_f"] = {"kernel": state["model.norm.weight"]}
    if not config.get("tie_word_embeddings", True):
        tree["lm_head"] = {"kernel": state["lm_head.weight"].T}
    for i in range(config["num_hidden_layers"]):
        at = {key.removeprefix(f"model.layers.{i}."): x for key, x in state.items() if f".layers.{i}." in key}
        ttt = {key.removeprefix("seq_modeling_block."): x for key, x in at.items() if key.startswith("seq_")}

        def conv(key, tensors):
            return {"kernel": tensors[f"{key}.weight"].permute(2, 1, 0), "bias": tensors[f"{key}.bias"]}

        block = {f"w{w}": {"kernel": ttt[f"{w}_proj.weight"].T} for w in "qkvo" if f"{w}_proj.weight" in ttt}
        block |= {"wg": {"kernel": ttt["g_proj.weight"].T}} if config["use_gate"] else {}
        block |= {f"conv_{w}": conv(f"conv_{w}", ttt) for w in "qk"} if config["share_qk"] else {}
        block |= {f"ttt_dense_{j}": ttt[f"W{j + 1}"] for j in range(2) if f"W{j + 1}" in ttt}
        block |= {f"ttt_bias_{j}": ttt[f"b{j + 1}"] for j in range(2) if f"b{j + 1}" in ttt}
        # Its code registers these with a slash in the key.
        block["learnable_ttt_lr/kernel"] = ttt["learnable_ttt_lr_weight"].transpose(1, 2)
        block["learnable_ttt_lr/bias"] = ttt["learnable_ttt_lr_bias"]
        block["learnable_token_idx"] = ttt["learnable_token_idx"]
        block |= {"ttt_norm/scale": ttt["ttt_norm_weight"], "ttt_norm/bias": ttt["ttt_norm_bias"]}
        block["post_norm"] = {"scale": ttt["post_norm.weight"], "bias": ttt["post_norm.bias"]}
        mlp = {w: at[f"mlp.{key}_proj.weight"].T for w, key in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}
        tree["model"]["h"][str(i)] = {
            "seq_norm": {"kernel": at["seq_norm.weight"]},
            "ffn_norm": {"kernel": at["ffn_norm.weight"]},
            "feed_forward": {w: {"kernel": x} for w, x in mlp.items()},
            "seq_modeling_block": block,
        }
        if config["pre_conv"]:
            conv_part = {"conv_norm": {"kernel": at["conv.norm.weight"]}, "conv1": conv("conv.conv", at)}
            tree["model"]["h"][str(i)]["conv"] = conv_part
    return tree


def leaves(tree, prefix=""):
    for key, x in tree.items():
        yield from leaves(x, f"{prefix}{key}/") if isinstance(x, dict) else [(f"{prefix}{key}", x)]


def arrays_of(tree):
    return {key: arrays_of(x) if isinstance(x, dict) else x.contiguous().numpy() for key, x in tree.items()}


def as_bytes(tree):
    return {key: as_bytes(x) if isinstance(x, dict) else (x.shape, x.tobytes()) for key, x in tree.items()}


backbones = {
    "ttt_linear": {"ttt_layer_type": "linear", "use_gate": True, "share_qk": True},
    "ttt_mlp": {"ttt_layer_type": "mlp", "use_gate": True, "share_qk": True},
    "ttt_linear_base": {"ttt_layer_type": "linear", "use_gate": False, "share_qk": False},
    "ttt_mlp_base": {"ttt_layer_type": "mlp", "use_gate": False, "share_qk": False},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pre_conv", [False, True])
@pytest.mark.parametrize("block", backbones)
def test_a_jax_pytree_is_the_same_model(block, pre_conv, tied):
    # No two axes of one length, so that a turn that is forgotten shows.
    config = small | backbones[block] | {"pre_conv": pre_conv, "tie_word_embeddings": tied, "conv_kernel": 3}
    state = random_state(config)
    tree = arrays_of(jax_tree(state, config))
    got, fields = from_jax(tree, config)
    same(got, state)
    assert fields == config
    same(to_official(load_official(got, fields))[0], state)
    # In JAX's own terms, under "params", flat.
    own = {key: value for key, value in config.items() if key not in backbones[block] and key != "conv_kernel"}
    own |= {"seq_modeling_block": block, "conv_width": 3}
    same(from_jax({"params": {"params": tree}}, own)[0], state)
    del own["tie_word_embeddings"]
    flat, fields = from_jax(dict(leaves(tree)), own)
    same(flat, state)
    assert fields["tie_word_embeddings"] is tied
    params, written = to_jax(state, config)
    assert as_bytes(params) == as_bytes(tree)
    assert (written["seq_modeling_block"], written["conv_width"]) == (block, 3)
    same(from_jax(params, written)[0], state)


def test_jax_in_bfloat16_and_what_it_cannot_hold():
    config = small | backbones["ttt_mlp"] | {"pre_conv": True}
    state = random_state(config, torch.bfloat16)
    # numpy has no bfloat16: a file shows two raw bytes.
    tree = {key: x.contiguous().view(torch.int16).numpy().view("V2") for key, x in leaves(jax_tree(state, config))}
    got, _ = from_jax(tree, config)
    same(to_official(load_official(got, config))[0], state)
    with pytest.raises(CheckpointError, match="seq_modeling_block is 'self_attention'; expected one of 'ttt_linear'"):
        from_jax(tree, small | {"seq_modeling_block": "self_attention"})
    with pytest.raises(CheckpointError, match="use_gate is True and share_qk False; expected both or neither"):
        to_jax(state, small | {"use_gate": True})
    tree["model/h/0/ffn_norm/kernel"] = tree["model/h/0/ffn_norm/kernel"][:5]
    with pytest.raises(
        CheckpointError, match=r"from_jax: model/h/0/ffn_norm/kernel has shape \(5,\); expected \(hidden_size\)"
    ):
        from_jax(tree, config)
    del tree["model/h/0/ffn_norm/kernel"]
    with pytest.raises(CheckpointError, match=r"from_jax: state_dict lacks model/h/0/ffn_norm/kernel \(12,\)"):
        from_jax(tree, config)


def fused(state, config):
    """The state dict of ttt-lm-kernels for official weights whose projections are stacked."""
    found = {}
    for key, x in state.items():
        head, _, part = key.rpartition("seq_modeling_block.")
        if part in ("q_proj.weight", "g_proj.weight", "v_proj.weight", "learnable_ttt_lr_weight"):
            if part == "q_proj.weight":
                block = head + "seq_modeling_block."
                parts = [state[block + f"{w}_proj.weight"] for w in "qgv"]
                rates = state[block + "learnable_ttt_lr_weight"][:, 0]
                found[block + "qkv_learnable_ttt_lr_proj.weight"] = torch.cat([*parts, rates])
        elif part == "learnable_token_idx":
            found[key + "_bias"] = x.reshape(1, 1, -1, 1)
        elif part in ("ttt_norm_weight", "ttt_norm_bias"):
            found[key] = x[None, :, None]
        elif part == "learnable_ttt_lr_bias":
            found[key] = x.reshape(1, 1, -1)
        elif "gate_proj" in key:
            found[key.replace("gate", "up_gate")] = torch.cat([x, state[key.replace("gate", "up")]])
        elif "up_proj" not in key:
            found[key.replace("conv.norm", "conv_norm")] = x
    return found


kernels = small | {
    "use_gate": True,
    "share_qk": True,
    "pre_conv": True,
    "mini_batch_size": 4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_fused_checkpoint_is_the_function_of_its_program(kind, monkeypatch):
    config = kernels | {"ttt_layer_type": kind}
    state = random_state(config, torch.float64)
    own = {
        key: value for key, value in config.items() if key not in ("use_gate", "share_qk", "pre_conv", "ttt_layer_type")
    }
    own |= {"seq_modeling_block": f"ttt-{kind}-fast", "conv_before_ttt": True}
    stacked = fused(state, config)
    same(from_kernels(stacked, own, rotary="pairs")[0], state)
    # The same weights in a model that turns halves, as its program does.
    ids = torch.arange(11)[None]
    with torch.no_grad():
        got = load_official(*from_kernels(stacked, own))(ids).logits
        monkeypatch.setattr(layer_module, "turned", turned_halves)
        want = load_official(state, config)(ids).logits
    torch.testing.assert_close(got, want)


def turned_halves(x, by):
    """As the layer's, of halves instead of pairs; by: what its pairs are multiplied with."""
    cos, sin = by[0, :, :, None, ::2], by[1, :, :, None, 1::2]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def test_a_fused_checkpoint_that_does_not_fit_is_named():
    stacked = fused(random_state(kernels), kernels)
    key = "model.layers.1.seq_modeling_block.qkv_learnable_ttt_lr_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} has shape \(37, 12\); expected \(38, 12\)"):
        from_kernels(stacked | {key: stacked[key][1:]}, kernels)
    with pytest.raises(CheckpointError, match="rotary is 'thirds'; expected 'halves' or 'pairs'"):
        from_kernels(stacked, kernels, rotary="thirds")
    del stacked["model.layers.0.conv_norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"from_kernels: state_dict lacks model\.layers\.0\.conv\.norm\.weight \(12,\)"
    ):
        from_kernels(stacked | {"model.nothing": torch.ones(3)}, kernels)


# -- bad input -------------------------------------------------------------------------------------------------------

WHERE = "model.layers.1.seq_modeling_block."


def without(state, *keys):
    return {key: x for key, x in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda s: without(s, WHERE + "W1", "model.norm.weight"),
            {},
            r"lacks model\.norm\.weight \(12,\), .*W1 \(2, 6, 6\); expected the 39 tensors of a model with "
            r"ttt_layer_type = 'linear', num_hidden_layers = 2",
        ),
        (lambda s: s | {"model.extra": torch.ones(3, 4)}, {}, r"holds model\.extra \(3, 4\), which no tensor"),
        (
            lambda s: s,
            {"share_qk": True},
            r"lacks .*conv_q\.weight \(12, 1, 4\).* and holds .*k_proj\.weight \(12, 12\)",
        ),
        (
            lambda s: s | {WHERE + "W1": torch.ones(2, 6, 24)},
            {},
            r"layers\.1\.seq_modeling_block\.W1 has shape \(2, 6, 24\); expected \(num_attention_heads, head_dim, "
            r"head_dim\) = \(2, 6, 6\)",
        ),
        (
            lambda s: s,
            {"mini_batch_size": 8},
            r"0\.\S+learnable_token_idx has shape \(16,\); expected \(mini_batch_size\) = \(8,\), "
            r"\S+1\.\S+ has shape \(16,\)",
        ),
        (
            lambda s: (
                s | {WHERE + "b1": s[WHERE + "b1"].double(), "model.norm.weight": torch.ones(12, dtype=torch.half)}
            ),
            {},
            r"mixes dtypes: model\.norm\.weight \(torch\.float16\), .*b1 \(torch\.float64\); expected torch\.float32, "
            r"as the "
            r"other 37",
        ),
        (
            lambda s: s | {WHERE + "b1": torch.ones(2, 1, 6).long()},
            {},
            r"b1 has dtype torch\.int64; expected a tensor of float",
        ),
        (
            lambda s: s | {WHERE + "b1": np.ones((2, 1, 6))},
            {},
            r"b1 has type ndarray; expected a tensor of floating point",
        ),
        (
            lambda s: s | {"lm_head.weight": torch.ones(13, 12)},
            {},
            r"lm_head\.weight differs from model\.embed_tokens\.weight",
        ),
        (lambda s: without(s, "lm_head.weight"), {"tie_word_embeddings": False}, r"lacks lm_head\.weight \(13, 12\)"),
        (lambda s: s, {"model_type": "llama"}, "model_type is 'llama'; expected 'ttt'"),
        (lambda s: s, {"model_type": "dualform"}, "model_type is 'dualform'; expected 'ttt'. Use from_pretrained"),
        (
            lambda s: s,
            {"ttt_layer_type": "mpl"},
            "ttt_layer_type is 'mpl'; expected one of 'linear', 'mlp'. Did you mean 'mlp'",
        ),
        (lambda s: s, {"mini_batchsize": 8}, "no field 'mini_batchsize'. Did you mean 'mini_batch_size'"),
        (lambda s: s, {"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'silu'"),
        (
            lambda s: s,
            {"hidden_size": "12"},
            "hidden_size is '12'; expected a value of type int, as in hidden_size = 2048",
        ),
        (lambda s: s, {"ttt_base_lr": None}, "ttt_base_lr is None; expected a value of type float or int"),
        (lambda s: s, {"vocab_size": True}, "vocab_size is True; expected a value of type int"),
        (lambda s: {**s, "model.norm.weight": torch.ones(12).long()}, {}, r"has dtype torch\.int64; .* x\.float\(\)"),
        (lambda s: {**s, "model.norm.weight": np.ones(12)}, {}, r"has type ndarray; .* torch\.as_tensor"),
        (lambda s: {n: x.to("meta") for n, x in s.items()}, {}, "has no numbers, device meta; .* Load the weights"),
        (lambda s: {"module." + n: x for n, x in s.items()}, {}, r"Take the wrapper 'module\.' from the names"),
        (lambda s: s, {"pad_token_id": 13}, "pad_token_id is 13; expected .* vocab_size - 1 = 12"),
        (lambda s: s, {"pad_token_id": [1]}, r"pad_token_id is \[1\]; expected a value of type int or NoneType"),
        (lambda s: s, {"ttt_base_lr": float("nan")}, "lr is nan; expected a finite number"),
        (lambda s: s, {"rope_theta": 0}, r"rope_theta is 0\.0; expected a finite number > 0"),
        (lambda s: s, {"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0; expected a finite number > 0"),
        (lambda s: [*s.items()], {}, "state_dict is a list; expected a mapping of names to tensors"),
        (lambda s: s, {"num_attention_heads": 5}, r"hidden_size is 12 with num_attention_heads = 5"),
        (lambda s: jax_tree(s, small | backbones["ttt_linear_base"] | {"pre_conv": False}), {}, "from_jax"),
        (lambda s: fused(random_state(kernels), kernels), {}, "from_kernels"),
        (lambda s: DualformForCausalLM(DualformConfig(preset="tiny-ttt-mlp")).state_dict(), {}, "from_pretrained"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(change, config, message):
    with pytest.raises(ValueError, match=message):
        load_official(change(random_state(small)), small | config)


def test_numbers_that_numpy_lacks_are_named():
    with pytest.raises(
        CheckpointError, match=r"to_jax: state_dict is torch\.bfloat16, which numpy lacks; expected float32"
    ):
        to_jax(random_state(small, torch.bfloat16), small)


def test_a_config_object_is_named():
    with pytest.raises(
        CheckpointError, match=r"config is a DualformConfig; expected a mapping of fields. Pass config\.to_dict"
    ):
        load_official(random_state(small), DualformConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_types": ["test_time", "full_attention"]},
            r"layer_types holds \['full_attention'\]; expected 'test_time' for all 2",
        ),
        ({"learner": "linear"}, r"learner is learners\.Linear\(\); expected learners\.residual_norm"),
        (
            {"learner": {"name": "residual_norm", "spec": {"name": "MLP", "depth": 3}}},
            r"MLP\(depth=3\).*; expected learners",
        ),
        ({"learner": {"name": "residual_norm", "spec": {"name": "Linear", "bias": False}}}, r"Linear\(bias=False\)"),
        (
            {"rule": {"name": "SGD", "lr": 0.5}},
            r"rule is rules\.SGD\(lr=0\.5\); expected rules\.SGD\(lr=0\.5, averaged=True\)",
        ),
        ({"objective": "dot_product"}, r"objective is objectives\.DotProduct\(\); expected objectives\.Squared\(\)"),
    ],
)
def test_what_the_official_models_cannot_express_is_named(fields, message):
    model = DualformForCausalLM(DualformConfig(preset="tiny-ttt-linear", **small, **fields))
    with pytest.raises(CheckpointError, match=message):
        to_official(model)
    with pytest.raises(CheckpointError, match="model is a DualformModel; expected a DualformForCausalLM"):
        to_official(model.model)


# -- folders and the command line --------------------------------------------------------------------------------------


def convert(capfd, *arguments):
    status = main(["convert", *map(str, arguments)])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    config = small | {"ttt_layer_type": "mlp", "tie_word_embeddings": True}
    write_official(load_official(random_state(config), config), tmp_path / "official")
    return tmp_path / "official"


def test_convert_there_and_back(capfd, folder, tmp_path):
    byte_tokenizer().save_pretrained(folder)
    status, out, err = convert(capfd, folder, tmp_path / "ours")
    assert status == 0, err
    assert re.match(rf"official -> dualform: {re.escape(str(tmp_path / 'ours'))}, [\d,]+ parameters, float32\n$", out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    same(to_official(model)[0], load_file(folder / "model.safetensors"))
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("a")["input_ids"] == [100]
    status, out, err = convert(capfd, tmp_path / "ours", tmp_path / "back")
    assert (status, out.split(":")[0]) == (0, "dualform -> official"), err
    same(load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    # A folder of `train` holds its model one folder below.
    (tmp_path / "run").mkdir()
    (tmp_path / "ours").rename(tmp_path / "run" / "model")
    assert convert(capfd, tmp_path / "run", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "tokenizer.json").exists()
    # Told apart by its tensors where the configuration does not say.
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_folder(folder).layout == "official"


def test_convert_shards_and_the_other_two_layouts(capfd, folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    halves = [dict(list(state.items())[:20]), dict(list(state.items())[20:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, halves, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, halves, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert convert(capfd, folder, tmp_path / "ours")[0] == 0
    same(to_official(read_folder(tmp_path / "ours").model)[0], state)
    save_file(without(halves[1], "model.norm.weight"), folder / names[1])
    status, _, err = convert(capfd, folder, tmp_path / "lost")
    assert status == 1
    assert f"lists model.norm.weight in {names[1]}, which does not hold it" in err

    tree, fields = to_jax(state, config)
    jax = tmp_path / "jax"
    jax.mkdir()
    np.savez(jax / "weights.npz", **dict(leaves({"params": tree})))
    (jax / "config.json").write_text(json.dumps(fields))
    status, out, err = convert(capfd, jax, tmp_path / "from_jax", "--to", "official")
    assert (status, out.split(":")[0]) == (0, "jax -> official"), err
    same(load_file(tmp_path / "from_jax" / "model.safetensors"), state)

    other = tmp_path / "kernels"
    other.mkdir()
    save_file(fused(random_state(kernels), kernels), other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(kernels))
    status, out, err = convert(capfd, other, tmp_path / "from_kernels")
    assert (status, out.split(":")[0]) == (0, "kernels -> dualform"), err


def test_convert_refuses_in_one_line(capfd, folder, tmp_path):
    def refused(status, *messages, arguments=(folder, tmp_path / "new")):
        got, out, err = convert(capfd, *arguments)
        assert (got, out) == (status, ""), err
        for message in messages:
            assert message in err
        assert not (tmp_path / "new").exists()

    refused(2, "nowhere does not exist", arguments=("nowhere", tmp_path / "new"))
    refused(2, f"{folder} is not empty", arguments=(folder, folder))
    refused(
        2, "in the layout 'official' already", "--to dualform", arguments=(folder, tmp_path / "new", "--to", "official")
    )
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(1, "model.safetensors cannot be read", "expected a whole safetensors file")
    weights.write_bytes(b"\xff" * 100)
    refused(1, "model.safetensors cannot be read")
    weights.unlink()
    refused(1, "holds no weights; expected *.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refused(1, "pytorch_model.bin is a pickle", "weights_only=True", "safetensors.torch.save_file")
    (folder / "alone.pt").write_bytes(b"")
    refused(1, "alone.pt is a pickle", arguments=(folder / "alone.pt", tmp_path / "new"))
    np.savez(folder / "weights.npz", x=np.array([{}], dtype=object))
    refused(1, "weights.npz cannot be read")
    (folder / "weights.npz").write_bytes(b"PK junk")
    refused(1, "weights.npz cannot be read")
    (folder / "config.json").write_text("{")
    refused(1, "config.json is not JSON")
    (folder / "config.json").write_text("[]")
    refused(1, "config.json holds a list; expected a JSON object")
    (folder / "config.json").unlink()
    refused(1, "config.json cannot be read")


def test_our_own_folder_must_be_whole(capfd, tmp_path):
    model = load_official(random_state(small), small)
    model.save_pretrained(tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    save_file(without(state, "model.layers.0.mixer.offset"), tmp_path / "ours" / "model.safetensors")
    status, _, err = convert(capfd, tmp_path / "ours", tmp_path / "new")
    assert status == 1
    assert "read_folder: state_dict lacks model.layers.0.mixer.offset (16,)" in err
    config = tmp_path / "ours" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 12', '"hidden_size": "12"'))
    status, _, err = convert(capfd, tmp_path / "ours", tmp_path / "new")
    assert status == 1
    assert "config.json is no configuration of ours" in err


def test_from_pretrained_refuses_what_convert_does(folder, tmp_path):
    """Other models, damaged files and pickles; also behind the other verbs, in one line."""
    with pytest.raises(
        ValueError, match=r"model_type is 'ttt'; expected 'dualform'. Convert it: `python -m dualform con"
    ):
        DualformForCausalLM.from_pretrained(folder)
    ours = tmp_path / "ours"
    model = load_official(random_state(small), small)
    model.save_pretrained(ours)
    weights, whole = ours / "model.safetensors", (ours / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff" * 100, b""):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* Copy it again"):
            AutoModelForCausalLM.from_pretrained(ours)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"ours holds no weights; expected \*\.safetensors beside config\.json"):
        AutoModelForCausalLM.from_pretrained(ours)
    torch.save(model.state_dict(), ours / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*weights_only=True"):
        AutoModelForCausalLM.from_pretrained(ours)


# -- the faults of the official code, each absent (theory, section 2.1)
# --------------------------------------------------


@pytest.fixture(scope="module", params=references)
def loaded(request):
    arrays = recorded(request.param)
    return load_official(arrays["sd"], references[request.param]), arrays["input_ids"]


@torch.no_grad()
def split(model, ids, cuts, **columns):
    logits, cache, start = [], None, 0
    for n in cuts:
        part = {name: x[:, start : start + n] for name, x in columns.items()}
        out = model(ids[:, start : start + n], past_key_values=cache, use_cache=True, **part)
        logits, cache, start = [*logits, out.logits], out.past_key_values, start + n
    return torch.cat(logits, 1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_fault_1_it_is_built_on_transformers_5(loaded, tmp_path):
    model, ids = loaded
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("cuts", [(6, 10, 21), (6, 2, 8, 21), (16, 16, 5), (1, 36), (16, 21)], ids=str)
def test_faults_2_and_3_any_continuation_with_and_without_convolutions(loaded, cuts):
    model, ids = loaded
    close(split(model, ids, cuts), split(model, ids, (T,)))


def test_fault_4_padding_is_not_read(loaded):
    model, ids = loaded
    padded = torch.cat([torch.full((2, 5), 7), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    with torch.no_grad():
        close(model(padded, attention_mask=mask).logits[0, 5:], model(ids).logits[0])


def test_fault_5_embeddings_are_taken(loaded):
    model, ids = loaded
    with torch.no_grad():
        close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_fault_6_groups_of_checkpoints_need_not_divide(loaded, groups):
    program = loaded[0].model.layers[0].mixer.program
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, T, 2, 16, generator=generator, dtype=torch.float64) for _ in range(3)
    )  # 2 1/3 mini-batches
    found = []
    for remat in (None, groups):
        leaf = k.clone().requires_grad_()
        o, _ = program(q, leaf, v, remat=remat)
        found.append(torch.autograd.grad(o.square().sum(), leaf)[0])
    close(*found)


def test_fault_7_convolutions_decode_in_bfloat16():
    arrays = recorded("linear_mamba")
    model = load_official({key: x.bfloat16() for key, x in arrays["sd"].items()}, references["linear_mamba"])
    logits = split(model, arrays["input_ids"], (16, *[1] * 21))
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - arrays["logits"]).abs().max() < 0.25  # logits reach 3; bfloat16 has 8 bits


def test_fault_8_positions_are_the_documents_own(loaded):
    model, ids = loaded
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(T + 3) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], model(ids).logits)


def test_fault_9_rows_of_one_cache_stand_at_their_own_tokens(loaded):
    model, ids = loaded
    lengths = torch.tensor([20, 13])
    mask = (torch.arange(20) < lengths[:, None]).long()
    with torch.no_grad():
        cache = model(ids[:, :20], attention_mask=mask, use_cache=True).past_key_values
        more = torch.stack([row[n : n + 9] for row, n in zip(ids, lengths, strict=True)])
        got = split_from(model, more, cache)
        for row, n in enumerate(lengths):
            close(got[row], model(ids[row : row + 1]).logits[0, n : n + 9])


def split_from(model, ids, cache):
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1)


def test_fault_10_generation_reads_every_new_token_of_a_continuation(loaded):
    model, ids = loaded
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **greedy)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **greedy), want)


def test_it_trains_on():
    arrays = recorded("mlp")
    model = load_official({key: x.float() for key, x in arrays["sd"].items()}, references["mlp"]).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(arrays["input_ids"], labels=arrays["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    again = load_official(*to_official(model))
    assert isinstance(again, df.DualformForCausalLM)
    same(to_official(again)[0], to_official(model)[0])

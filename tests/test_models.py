"""Language models: any split, padding and packing is one computation; saved, loaded, generating they stay the same."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from dualform.models import DualformConfig, DualformForCausalLM, DualformModel, presets
from dualform.models.cache import DocumentCache, FastWeightCache
from dualform.models.state_file import StateFileError, load_state, save_state

T, PAST = 23, 3
kinds = {
    "linear": {"preset": "tiny-ttt-linear"},
    "mlp": {"preset": "tiny-ttt-mlp"},
    "mamba": {"preset": "tiny-ttt-linear", "use_gate": True, "share_qk": True, "pre_conv": True},
    "attention": {"preset": "tiny-attention"},
    "hybrid": {
        "preset": "tiny-ttt-mlp",
        "pre_conv": True,
        "layer_types": ["test_time", "sliding_attention"],
        "sliding_window": 5,
    },
}


def build(kind, **fields):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk": 4}
    torch.manual_seed(0)
    return DualformForCausalLM(DualformConfig(**{**sizes, "pre_conv": False, **kinds[kind], **fields}))


@pytest.fixture(scope="module", params=kinds)
def model(request):
    # Larger weights than at birth, so that a fault shows.
    lm = build(request.param, initializer_range=0.3).double().eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "initial_" in name:
                p.mul_(10)
    return lm


@pytest.fixture
def ids():
    return torch.randint(PAST, 259, (2, T), generator=torch.Generator().manual_seed(1))


def in_parts(model, ids, cuts, **columns):
    cache, outputs, start = None, [], 0
    for n in cuts:
        part = {name: x[:, start : start + n] for name, x in columns.items()}
        out = model(ids[:, start : start + n], past_key_values=cache, use_cache=True, **part)
        cache, start = out.past_key_values, start + n
        outputs.append(out.logits)
    return torch.cat(outputs, 1), cache


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(7, 1, 8, 7), (1,) * T, (16, 7)], ids=["odd", "ones", "aligned"])
def test_any_split_is_one_call(model, ids, cuts):
    close(in_parts(model, ids, cuts)[0], model(ids).logits)


@torch.no_grad()
def test_left_padding_changes_nothing(model, ids):
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    want = model(ids).logits[0]
    close(model(padded, attention_mask=mask).logits[0, 5:], want)
    parts, _ = in_parts(model, padded, (3, 4, 1, 20), attention_mask=mask)
    close(parts[0, 5:], want)
    close(parts[1], model(padded).logits[1])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, ids):
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, 9] = reset[1, 0] = reset[1, 4] = reset[1, 20] = True
    packed = model(ids, reset=reset).logits
    close(packed[0, :9], model(ids[:1, :9]).logits[0])
    close(packed[0, 9:], model(ids[:1, 9:]).logits[0])
    close(packed[1, 4:20], model(ids[1:, 4:20]).logits[0])
    close(in_parts(model, ids, (3, 4, 1, 8, 7), reset=reset)[0], packed)


@torch.no_grad()
def test_the_future_is_ignored(model, ids):
    other = ids.clone()
    other[:, 10:] = (other[:, 10:] + 7) % 250 + PAST
    close(model(ids).logits[:, :10], model(other).logits[:, :10])


def greedy(model, ids, n=9, **kwargs):
    return model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, **kwargs)


def test_generation_on_the_carried_state_is_generation_without(model, ids):
    want = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids), want)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(T + 5) >= 5).long().expand(2, -1)
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 5:], want)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=4), want)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), want)


def test_beams_samples_and_streams(model, ids):
    beams = greedy(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams, greedy(model, ids, num_beams=3, num_return_sequences=2, use_cache=False))
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=2).shape == (4, T + 4)

    class Heard:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    heard = Heard()
    assert greedy(model, ids[:1], streamer=heard)[0].tolist() == heard.ids
    assert heard.ended


def test_generation_goes_on_from_a_cache_and_from_the_last_document(model, ids):
    want = greedy(model, ids, 12)
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    again = greedy(model, first.sequences, 7, past_key_values=first.past_key_values)
    assert torch.equal(again, want)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, 9] = True
    assert torch.equal(greedy(model, ids, 5, reset=reset)[:, 9:], greedy(model, ids[:, 9:], 5))


def test_a_state_file_carries_on(model, ids, tmp_path):
    _, cache = in_parts(model, ids, (T,))
    save_state(tmp_path / "state", model.config, cache, ids)
    loaded, read = load_state(tmp_path / "state", model.config)
    assert torch.equal(read, ids)
    with torch.no_grad():
        got = model(ids, past_key_values=loaded).logits
        close(got, model(ids, past_key_values=cache).logits)
    with pytest.raises(StateFileError, match=r"another model, rms|another model, chunk = 4; expected 8"):
        load_state(tmp_path / "state", DualformConfig(**{**model.config.to_dict(), "chunk": 8}))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(StateFileError, match="cannot be read"):
        load_state(tmp_path / "junk", model.config)


def test_saved_and_loaded_it_is_the_same(model, ids, tmp_path):
    lm = model.float()
    try:
        lm.save_pretrained(tmp_path)
        assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json", ".py"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is DualformForCausalLM
        assert not loaded.training
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        for (name, a), (_, b) in zip(lm.named_buffers(), loaded.named_buffers(), strict=True):
            assert torch.equal(a, b), name
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, lm(ids).logits)
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
        assert type(AutoModel.from_pretrained(tmp_path)) is DualformModel
    finally:
        model.double()


def test_weights_that_a_file_lacks_are_drawn_not_left_to_memory(tmp_path):
    lm = build("mamba")
    state = {n: x for n, x in lm.state_dict().items() if "mixer" not in n and "conv" not in n and n != "lm_head.weight"}
    lm.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(lm.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert b.isfinite().all(), name
        spread_a, spread_b = a.std(correction=0), b.std(correction=0)
        torch.testing.assert_close(spread_b, spread_a, rtol=0.5, atol=0.05, msg=name)


@pytest.mark.parametrize("kind", kinds)
def test_labels_and_gradient_checkpointing(kind, ids):
    lm = build(kind).train()
    enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
    loss = lm(ids, labels=ids, use_cache=False).loss
    loss.backward()
    logits = lm(ids, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    plain = {n: p.grad.clone() for n, p in lm.named_parameters()}
    assert all(g.isfinite().all() for g in plain.values())
    lm.zero_grad()
    enable()
    lm(ids, labels=ids, use_cache=False).loss.backward()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_embeddings_hidden_states_and_kept_logits(model, ids):
    want = model(ids, output_hidden_states=True)
    assert len(want.hidden_states) == model.config.num_hidden_layers + 1
    close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, want.logits)
    close(model(ids, logits_to_keep=2).logits, want.logits[:, -2:])
    assert len(model(ids, return_dict=False)) == 2
    assert model(ids, use_cache=False).past_key_values is None


def test_a_cache_is_moved_by_rows(model, ids):
    _, cache = in_parts(model, ids, (T,))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 5]))
    cache.reorder_cache(torch.tensor([1, 0]))
    _, want = in_parts(model, ids.flip(0), (T,))
    with torch.no_grad():
        new = ids[:, :3]
        close(model(new, past_key_values=cache).logits, model(new, past_key_values=want).logits)
    cache.reset()
    assert cache.get_seq_length() == 0
    kinds_held = {type(layer) for layer in cache.layers}
    assert kinds_held <= {FastWeightCache, DocumentCache}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x + 300), r"input_ids holds \d+; expected ids in 0 ... vocab_size - 1 = 258"),
        (lambda m, x: m(-x), r"input_ids holds -\d+; expected ids in 0"),
        (lambda m, x: m(), "neither of input_ids and inputs_embeds"),
        (lambda m, x: m(x, inputs_embeds=x.float()), "both of input_ids and inputs_embeds"),
        (lambda m, x: m(x, reset=x[:, 1:] > 3), r"reset has shape \(2, 22\); expected \(batch, tokens\) = \(2, 23\)"),
        (lambda m, x: m(x, attention_mask=x[:1]), r"attention_mask has shape \(1, 23\)"),
    ],
)
def test_bad_input_is_named(ids, call, message):
    with pytest.raises(ValueError, match=message):
        call(build("attention"), ids)


def test_a_cache_of_another_model_is_refused(ids):
    attention, learner = build("attention"), build("linear")
    with pytest.raises(ValueError, match=r"layer 0 is a filled DocumentCache of window None; expected FastWeightCache"):
        learner(ids, past_key_values=attention(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match=r"holds keys of batch 2, heads 2, head_dim 8; expected batch 1"):
        attention(ids[:1], past_key_values=attention(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match=r"asked to forget 3 columns; expected 0 ... 0"):
        learner(ids, use_cache=True).past_key_values.crop(-3)
    assert attention(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.get_seq_length() == T


@pytest.mark.parametrize("name", presets)
def test_presets_are_configurations(name):
    config = DualformConfig(preset=name, num_hidden_layers=3)
    assert len(config.layer_types) == 3
    assert json.loads(config.to_json_string(use_diff=False))["learner"] == config.learner
    assert DualformConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert DualformConfig(preset=name, rule={"lr": 0.25}).rule["lr"] == 0.25


def test_published_sizes():
    with torch.device("meta"):
        one = {"preset": "ttt-linear-125m-mamba", "num_hidden_layers": 1}
        linear = DualformForCausalLM(DualformConfig(**one))
    # The official one-layer model has 31,730,716 (theory, 1.9).
    assert sum(p.numel() for p in linear.parameters()) == 31_730_716


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "tiny-ttt-mpl"}, "presets: no record is called 'tiny-ttt-mpl'. Did you mean 'tiny-ttt-mlp'"),
        ({"learner": "MPL"}, "learners: no record is called 'MPL'. Did you mean 'MLP'"),
        ({"rule": {"name": "SGD", "lrr": 1}}, "unknown option 'lrr'. Did you mean 'lr'"),
        ({"hiden_size": 8}, "unknown field 'hiden_size'. Did you mean 'hidden_size'"),
        ({"num_attention_heads": 7}, "hidden_size is 768 with num_attention_heads = 7; .* multiple of 2 \\* 7 = 14"),
        ({"layer_types": ["test_time"] * 3}, "layer_types has 3 entries; expected num_hidden_layers = 12"),
        ({"layer_types": ["attention"]}, "layer_types holds 'attention'; expected 'test_time'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window is None; expected"),
        ({"chunk": 0}, "chunk is 0; expected a whole number >= 1"),
    ],
)
def test_a_bad_configuration_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DualformConfig(**fields)


def test_types_of_fields_are_checked():
    with pytest.raises(Exception, match="hidden_size is '768'; expected a value of type int"):
        DualformConfig(hidden_size="768")

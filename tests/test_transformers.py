"""What a user of transformers expects of any model: outputs, types, devices, files, adapters, Trainer, compile."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments, pipeline

import dualform as df
from dualform import testing as laws
from dualform.models import DualformConfig, DualformForCausalLM
from dualform.train.data import byte_tokenizer

kinds = {
    "learner": {"preset": "tiny-ttt-mlp", "num_hidden_layers": 2, "use_gate": True, "share_qk": True},
    "hybrid": {
        "preset": "tiny-ttt-linear",
        "num_hidden_layers": 3,
        "layer_types": ["test_time", "full_attention", "sliding_attention"],
        "sliding_window": 5,
    },
}
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4, "initializer_range": 0.3}
T = 11


def build(kind, **fields):
    torch.manual_seed(0)
    return DualformForCausalLM(DualformConfig(**{**sizes, **kinds[kind], **fields})).eval()


@pytest.fixture(scope="module", params=kinds)
def model(request):
    return build(request.param)


@pytest.fixture
def ids():
    return torch.randint(3, 259, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_hidden_states_are_what_the_layers_say(model, ids):
    seen = []
    hooks = [layer.register_forward_hook(lambda m, a, y: seen.append(y)) for layer in model.model.layers]
    out = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    want = [model.model.embed_tokens(ids), *seen[:-1], model.model.norm(seen[-1])]
    for n, (got, expected) in enumerate(zip(out.hidden_states, want, strict=True)):
        assert torch.equal(got, expected), n
    assert torch.equal(out.logits, model.lm_head(out.hidden_states[-1]))
    assert model(ids).hidden_states is None
    plain = model(ids, use_cache=False, output_hidden_states=True, return_dict=False)
    assert [type(x) for x in plain] == [torch.Tensor, tuple]


@pytest.mark.parametrize("kind", kinds)
@torch.no_grad()
def test_a_model_and_its_cache_are_pickled(kind, ids):
    model = build(kind)  # its own: transformers' hooks for hidden states, once asked for, are local functions
    again, cache = pickle.loads(pickle.dumps((model, model(ids[:, :7], use_cache=True).past_key_values)))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])


@torch.no_grad()
def test_attention_weights_are_those_that_were_used(ids):
    model = build("hybrid").double()
    mask = torch.ones_like(ids)
    mask[0, 2:5] = 0
    out = model(ids, attention_mask=mask, output_attentions=True)
    laws.agree("logits", out.logits, model(ids, attention_mask=mask).logits)
    assert [tuple(w.shape) for w in out.attentions] == [(2, 2, T, T)] * 2  # two attention layers
    for w, window in zip(out.attentions, (T, 5), strict=True):
        laws.agree("sum", w.sum(-1), torch.ones(2, 2, T, dtype=torch.float64))
        assert not w.triu(1).any()
        assert not w[1].tril(-window).any()
        assert not w[0, :, 5:, 2:5].any()  # padding is not looked at
    cached = model(ids[:, :7], output_attentions=True, use_cache=True)
    more = model(ids[:, 7:], output_attentions=True, past_key_values=cached.past_key_values)
    assert [tuple(w.shape) for w in more.attentions] == [(2, 2, 4, 11), (2, 2, 4, 8)]
    assert build("learner")(ids, output_attentions=True).attentions == ()


@torch.no_grad()
def test_position_ids_say_where_packed_documents_start(ids):
    model = build("hybrid").double()
    positions = torch.cat([torch.arange(4), torch.arange(T - 4)])[None].expand(2, T)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, 4] = True
    packed = model(ids, position_ids=positions).logits
    laws.agree("packed", packed, model(ids, reset=reset).logits)
    laws.agree("second", packed[:, 4:], model(ids[:, 4:]).logits)
    ends = torch.tensor([0, 4, T], dtype=torch.int32)  # how collators without padding say it, for one row
    laws.agree("lengths", model(ids[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, packed[:1])
    laws.agree("shifted", model(ids, position_ids=torch.arange(T) + 50).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized(ids, tied):
    model = build("learner", tie_word_embeddings=tied)
    before = model(ids).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings == 300
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(model(ids).logits[..., :259], before)
    assert model(torch.full((1, 3), 299)).logits.shape == (1, 3, 300)
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"input_ids holds 2\d\d; expected ids in 0 ... vocab_size - 1 = 99"):
        model(ids)


@torch.no_grad()
@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
def test_half_precision(model, ids, tmp_path, word, recwarn):
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, **{word: torch.bfloat16})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    out = half(ids, use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    want = model(ids).logits
    assert (out.logits.float() - want).abs().max() < 0.1 * want.abs().max()
    state = out.past_key_values.layers[0].state.layer.memory
    assert {x.dtype for x in state.anchor.values()} == {torch.float32}  # what learns does so in float32
    found = half.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found.shape == (2, T + 5)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
def test_one_device(model, ids, tmp_path, device_map, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


def test_pipeline(model):
    model, tokenizer = copy.deepcopy(model), byte_tokenizer()
    tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = None
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts, options = ["to be", "or not to be, that"], {"max_new_tokens": 5, "do_sample": False}
    alone = [write(text, **options)[0]["generated_text"] for text in texts]
    assert all(found.startswith(text) for found, text in zip(alone, texts, strict=True))
    assert [found[0]["generated_text"] for found in write(texts, batch_size=2, **options)] == alone


def test_forward_compiles_whole(ids):
    """fullgraph, logits, loss and gradients those of eager mode; padding and documents, and a carried cache."""
    torch._dynamo.reset()
    model = build("hybrid", use_gate=True, share_qk=True).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask, reset = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :3], reset[1, 4] = 0, True
    for options in ({}, {"attention_mask": mask, "reset": reset}):
        found = []
        for call in (compiled, model):
            model.zero_grad()
            out = call(ids, labels=ids, use_cache=False, **options)
            out.loss.backward()
            found.append([out.logits, out.loss, *(p.grad.clone() for p in model.parameters())])
        for n, (got, want) in enumerate(zip(*found, strict=True)):
            laws.agree(f"result {n}", got, want)
    with torch.no_grad():
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split([6, 1, 4], 1):
            parts.append(compiled(part, past_key_values=cache, use_cache=True).logits)
        laws.agree("cached", torch.cat(parts, 1), model(ids).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_equal_gradients(model, ids, reentrant):
    model = copy.deepcopy(model).double().train()
    grads = []
    for n in range(2):
        model.zero_grad()
        if n:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            assert model.model.gradient_checkpointing or model.model.layers[0].gradient_checkpointing
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in grads[0].items():
        laws.agree(name, grads[1][name], want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters(model, ids, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["q_proj", "v_proj", "o_proj"]
    lora = peft.LoraConfig(r=2, target_modules=[*names, "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    first = adapted(input_ids=ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert adapted(input_ids=ids, labels=ids).loss < first
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained)
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        want = adapted(ids).logits
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        torch.testing.assert_close(loaded(ids).logits, want)
        found = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        merged = adapted.merge_and_unload()
        assert type(merged) is DualformForCausalLM
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), found)


def train(folder, rows, resume=None, **options):
    model = build("hybrid").double() if "bf16" not in options else build("hybrid")
    options = {"save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2,
        lr_scheduler_type="constant", dataloader_pin_memory=False, **options
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    return model, trainer.train(resume_from_checkpoint=resume)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path, capsys):
    rows = torch.randint(3, 259, (8, T), generator=torch.Generator().manual_seed(2))
    rows[3, 5:] = -100  # labels that do not count, so that rows weigh differently
    rows = [row.masked_fill(row < 0, 3) for row in rows]
    one, result = train(tmp_path, rows, per_device_train_batch_size=4)
    many, _ = train(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert result.training_loss > 0
    for (name, p), (_, q) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_the_trainer_in_bfloat16(tmp_path, capsys):
    rows = list(torch.randint(3, 259, (4, T), generator=torch.Generator().manual_seed(2)))
    born = build("hybrid").state_dict()
    model, result = train(tmp_path, rows, per_device_train_batch_size=2, bf16=True)
    assert 0 < result.training_loss < 20
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert p.isfinite().all(), name
    assert sum(not torch.equal(p, born[name]) for name, p in model.state_dict().items()) > 30


def test_a_trainer_resumes(tmp_path, capsys):
    """Also in bfloat16 with accumulated gradients; transformers reads our config.json with a class of its own there."""
    rows = list(torch.randint(3, 259, (8, T), generator=torch.Generator().manual_seed(2)))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True, "save_steps": 1}
    whole, _ = train(tmp_path, rows, save_strategy="steps", **options)
    again, result = train(tmp_path, rows, resume=str(tmp_path / "checkpoint-1"), **options)
    assert result.global_step == 2
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@torch.no_grad()
def test_inner_losses_fall_with_each_update(ids):
    model = build("hybrid", layer_types=["test_time", "full_attention", "test_time"], num_hidden_layers=3).double()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before, after = model.inner_losses(ids, attention_mask=mask)
    assert before.shape == after.shape == (2, 2, 2, T)
    assert not before[:, 0, :, :3].any()
    assert (after < before)[:, 1].float().mean() > 0.9
    alone = model.inner_losses(ids[:1, 3:])
    laws.agree("padding", before[:, :1, :, 3:], alone[0])
    # The first layer's own record, from the input that reaches it.
    block = model.model.layers[0]
    h = model.model.embed_tokens(ids)
    h = h + block.conv(h, None, None, None)[0]
    own = block.mixer.inner_losses(block.seq_norm(h))
    plain = model.inner_losses(ids)
    laws.agree("before", plain[0][0], own[0])
    laws.agree("after", plain[1][0], own[1])
    # Cut, with the cache read on; the body alone says the same.
    cache = DynamicCache(config=model.config)
    parts = [model.inner_losses(part, past_key_values=cache)[1] for part in ids.split([5, 6], 1)]
    laws.agree("cut", torch.cat(parts, -1), plain[1])
    laws.agree("body", model.model.inner_losses(ids)[1], plain[1])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_flags_say_what_is_so():
    model = build("hybrid")
    so = {"_supports_sdpa", "supports_gradient_checkpointing"}
    not_so = {"_is_stateful", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"}
    not_so |= {"_can_compile_fullgraph", "_supports_context_parallel"}
    assert {name for name in so | not_so if getattr(model, name)} == so
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        AutoModelForCausalLM.from_config(model.config, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("cls", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_tuples_are_what_the_records_hold(cls, ids):
    """By the argument or the configuration, with labels, hidden states, attentions and a cache, or without."""
    given = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "chunk": 4}
    config = df.DualformConfig(
        **given, learner="linear", num_labels=3, layer_types=["test_time", "full_attention"], num_hidden_layers=2
    )
    model = getattr(df, f"Dualform{cls}")(config).eval()
    labels = {
        "Model": {}, "ForCausalLM": {"labels": ids}, "ForSequenceClassification": {"labels": ids[:, 0] % 3},
        "ForTokenClassification": {"labels": ids % 3},
    }[cls]  # fmt: skip
    for words in ({}, {"output_hidden_states": True, "output_attentions": True, **labels}, {"use_cache": False}):
        model.config.return_dict = True
        expected, found = model(ids, **words).to_tuple(), [model(ids, return_dict=False, **words)]
        model.config.return_dict = False
        found.append(model(ids, **words))
        laws.agree("a record", model(ids, return_dict=True, **words).to_tuple()[0], expected[0])
        for got in found:
            assert [type(x) for x in got] == [type(x) for x in expected]
            for x, y in zip(got, expected, strict=True):
                for a, b in zip(x, y, strict=True) if isinstance(x, tuple) else ():
                    laws.agree("a layer's", a, b)
                if isinstance(x, torch.Tensor):
                    laws.agree("a result", x, y)
    if cls == "ForCausalLM":
        said = [model.generate(ids, max_new_tokens=3, do_sample=False), model.inner_losses(ids)[0]]
        model.config.return_dict = True
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), said[0])
        laws.agree("inner losses", model.inner_losses(ids)[0], said[1])

"""What acts on modules: hooks, adapters, offload, shards, checkpointing, overrides at load, a cache's rows."""

import copy
import json
import threading

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import dualform as df
from dualform import testing as laws
from dualform.models import DualformConfig, DualformForCausalLM

kinds = {
    "learner": {"preset": "tiny-ttt-mlp", "num_hidden_layers": 2, "use_gate": True, "share_qk": True},
    "plain": {"preset": "tiny-ttt-linear", "num_hidden_layers": 1, "pre_conv": False},
    "hybrid": {
        "preset": "tiny-ttt-linear", "num_hidden_layers": 3, "sliding_window": 5, "share_qk": True,
        "layer_types": ["test_time", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4, "initializer_range": 0.3}
T = 11


def build(kind, **fields):
    torch.manual_seed(0)
    return DualformForCausalLM(DualformConfig(**{**sizes, **kinds[kind], **fields})).double().eval()


@pytest.fixture(params=kinds)
def model(request):
    return build(request.param)


@pytest.fixture
def ids():
    return torch.randint(3, 259, (2, T), generator=torch.Generator().manual_seed(1))


# Modules are called


@pytest.mark.parametrize("padded", [False, True])
def test_every_module_with_weights_of_its_own_is_called(model, ids, padded):
    owners = {m for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
    called = set()
    for m in model.modules():
        m.register_forward_hook(lambda m, *rest: called.add(m))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids, attention_mask=mask if padded else None)
    assert not owners - called


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_convolutions(ids):
    peft = pytest.importorskip("peft")
    model = build("learner")
    before = model(ids).logits
    lora = peft.LoraConfig(r=16, target_modules=r".*(conv_q|conv_k|conv\.conv|q_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    out = adapted(input_ids=ids, labels=ids)
    assert (out.logits - before).abs().max() > 1e-3
    out.loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {"conv_q", "conv_k", "conv"} <= {part for name in trained for part in name.split(".")}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    # An adapter sees padded rows as it sees whole ones.
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    laws.agree("padding", adapted(ids, attention_mask=mask).logits[:1, 4:], adapted(ids[:1, 4:]).logits)


@torch.no_grad()
def test_weights_that_are_parametrized(model, ids):
    want = model(ids).logits
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.Conv1d | nn.Linear) and name != "lm_head":
            nn.utils.parametrizations.weight_norm(m)
    laws.agree("weight norm", model(ids).logits, want)


@torch.no_grad()
def test_weights_that_are_offloaded(model, ids, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want, losses = model(ids).logits, model.inner_losses(ids)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert {p.device.type for name, p in offloaded.named_parameters() if "mixer" in name} == {"meta"}
    laws.agree("offloaded", offloaded(ids).logits, want)
    for got, wanted in zip(offloaded.inner_losses(ids), losses, strict=True):
        laws.agree("inner losses", got, wanted)
    model.save_pretrained(tmp_path)
    limits = {"device_map": "auto", "max_memory": {"cpu": "20KB"}, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **limits)
    laws.agree("from disk", loaded(ids).logits, want)


def test_a_call_moves_to_the_device_of_a_layer(ids):
    seen = []
    model = build("hybrid")
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids, attention_mask=mask)
    moved = seen[0].to("meta")
    assert {moved.mask.device.type, moved.positions.device.type} == {"meta"}
    assert {view.mask.device.type for view in moved.views.values()} == {"meta"}


@torch.no_grad()
def test_shards(ids):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    model = build("learner").float()
    want = model(ids).logits
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            for part in (block.mixer.conv_q, block.conv.conv, block.mixer, block.mlp, block):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(ids).logits, want)
    finally:
        destroy_process_group()


# Where weights are made


def meta():
    return torch.device("meta")


def empty():
    return pytest.importorskip("accelerate").init_empty_weights()


class Buffered(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.W = nn.Parameter(torch.randn(dim, dim))
        self.register_buffer("table", torch.linspace(0.5, 1.5, dim))

    def forward(self, x):
        return x @ self.W * self.table


@pytest.mark.parametrize("context", [meta, empty])
@pytest.mark.parametrize("learner", ["mlp", Buffered, lambda d: nn.Linear(d, d)])
def test_layers_are_made_without_weights(context, learner):
    with context():
        layer = df.TestTimeTraining(16, 2, learner=learner, share_qk=True)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    torch.manual_seed(0)
    full = df.TestTimeTraining(16, 2, learner=learner, share_qk=True)
    layer.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x)[0], full(x)[0])


@pytest.mark.parametrize("context", [meta, empty])
def test_models_are_made_without_weights(context, ids):
    full = build("learner")
    with context():
        model = DualformForCausalLM(full.config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.load_state_dict(full.state_dict(), assign=True)
    model.tie_weights()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, full(ids).logits)


# Activation checkpointing with a carried cache


def checkpointed(model, reentrant):
    model = copy.deepcopy(model).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_carried_cache_is_remembered(model, ids, reentrant):
    model.train()
    again = checkpointed(model, reentrant)
    with torch.no_grad():
        past, found = model(ids[:, :4], use_cache=True).cache, []
    for called in (model, again):
        cache = copy.deepcopy(past)
        embeds = called.get_input_embeddings()(ids[:, 4:])
        out = called(inputs_embeds=embeds, labels=ids[:, 4:], cache=cache)
        out.loss.backward()
        assert cache.get_seq_length() == T
        with torch.no_grad():
            after = model(ids[:, :3], cache=cache.detach()).logits
        found.append([out.loss, out.logits, after, *gradients(called).values()])
    names = ["loss", "logits", "read on", *gradients(model)]
    for name, got, want in zip(names, *reversed(found), strict=True):
        laws.agree(name, got, want)
    assert (model(ids[:, 4:]).logits - found[0][1]).abs().max() > 1e-3  # it matters


def test_gradients_reach_what_an_earlier_call_made(model, ids):
    model.train()
    found = []
    for called in (model, checkpointed(model, False)):
        cache, loss = DynamicCache(config=model.config), 0
        for part in ids.split([4, 7], 1):
            loss = loss + called(part, labels=part, cache=cache).loss
        loss.backward()
        found.append(gradients(called))
    for name, want in found[0].items():
        laws.agree(name, found[1][name], want)


def test_a_state_without_its_gradients_is_not_taken_for_one_with(model, ids):
    called, cache = checkpointed(model, True), DynamicCache(config=model.config)
    called(ids[:, :4], cache=cache)
    with pytest.raises(
        ValueError, match=r"reentrant activation checkpointing made without gradients; .*cache\.detach\(\)"
    ):
        called(ids[:, 4:], cache=cache)
    called(ids[:, 4:], cache=cache.detach())


def test_generation_while_training_with_checkpointing(model, ids):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, **options)
    assert torch.equal(checkpointed(model, False).generate(ids, **options), want)


def test_a_detached_cache_has_no_graph(model, ids):
    cache = model(ids[:, :5], use_cache=True).cache
    assert cache.detach() is cache
    loss = model(ids[:, 5:], labels=ids[:, 5:], cache=cache).loss
    with torch.no_grad():
        laws.agree(
            "logits", model(ids).logits[:, 5:], model(ids[:, 5:], cache=model(ids[:, :5], use_cache=True).cache).logits
        )
    loss.backward()  # not through the call before, whose graph nobody holds


# Overrides at load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build("learner").save_pretrained(folder)
    return folder


def fields_of(config):
    return {name: getattr(config, name) for name in DualformConfig.__annotations__ if name in config.to_dict()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", {"lr": 0.0}),
        ("rule", df.rules.SGD(lr=0.0, averaged=True)),
        ("rule", ("sgd", {"lr": 0.25})),
        ("rule", "sgd"),
        ("objective", "dot_product"),
        ("learner", {"spec": {"name": "MLP", "depth": 2, "expand": 4, "activation": "silu"}}),
        ("rope_theta", 500),
        ("num_hidden_layers", 1),
        ("use_cache", False),
    ],
)
def test_what_is_given_at_load_is_laid_over(saved, tmp_path, field, value, capfd):
    written = json.loads((saved / "config.json").read_text())
    below = {"layer_types": ["test_time"]} if field == "num_hidden_layers" else {}
    given = value
    if isinstance(value, dict):  # options alone keep the rest
        given = {**written[field], **value}
    want = fields_of(DualformConfig(**{**written, **below, field: given}))
    assert fields_of(AutoConfig.from_pretrained(saved, **{field: value})) == want
    model = AutoModelForCausalLM.from_pretrained(saved, **{field: value})
    assert fields_of(model.config) == want
    model.save_pretrained(tmp_path)
    assert fields_of(AutoConfig.from_pretrained(tmp_path)) == {**want, "use_cache": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected a whole number >= 1"),
        ({"layer_types": ["tst_time"] * 2}, "layer_types holds 'tst_time'"),
        ({"layer_types": ["test_time"] * 3}, "layer_types has 3 entries; expected num_hidden_layers = 2"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; expected a finite number > 0"),
        ({"rule": {"lrr": 1.0}}, "unknown option 'lrr'. Did you mean 'lr'"),
        ({"chunck": 8}, "unknown field 'chunck'. Did you mean 'chunk'"),
        ({"preset": "tiny-ttt-mlp"}, "preset is 'tiny-ttt-mlp' while a configuration is read"),
    ],
)
@pytest.mark.parametrize("auto", [AutoConfig, AutoModelForCausalLM, DualformForCausalLM])
def test_what_is_given_at_load_is_checked(saved, given, message, auto):
    with pytest.raises(ValueError, match=message):
        auto.from_pretrained(saved, **given)


def test_a_field_at_load_that_changes_shapes(saved):
    assert AutoConfig.from_pretrained(saved, chunk=8).chunk == 8
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(saved, chunk=8)  # the offsets of 4 places in a mini-batch


def test_a_spec_that_is_assigned_is_json(tmp_path):
    config = DualformConfig(preset="tiny-ttt-linear")
    config.rule = df.rules.SGD(lr=0.5)
    assert config.rule["lr"] == 0.5
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rule == config.rule
    with pytest.raises(ValueError, match="no record is called"):
        config.learner = "MPL"


# Rows


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (torch.tensor([True, False, True]), [0, 2]),
        ([True, False, False], [0]),
        ([0, 2], [0, 2]),
        ((2, 2, 1, 0), [2, 2, 1, 0]),
        (torch.tensor([0, -1]), [0, 2]),
        (torch.tensor([-3, -2], dtype=torch.int32), [0, 1]),
        ([], []),
    ],
)
def test_rows_are_chosen_in_any_way(model, rows, wanted):
    ids = torch.randint(3, 259, (3, T), generator=torch.Generator().manual_seed(1))
    cache = model(ids[:, :5], use_cache=True).cache
    state = getattr(cache.layers[0], "state", None)
    cache.batch_select_indices(rows)
    if wanted:
        laws.agree("logits", model(ids[wanted, 5:], cache=cache).logits, model(ids[wanted]).logits[:, 5:])
    if state is not None:
        assert torch.equal(state.layer.select(rows).position, state.layer.position[wanted])


@pytest.mark.parametrize("rows", [[True], torch.tensor([[0]]), torch.tensor([0.0, 1.0]), [0, 3], [-4]])
def test_rows_that_are_not_there_are_refused(model, ids, rows):
    cache = model(ids, use_cache=True).cache
    with pytest.raises(IndexError):
        cache.batch_select_indices(rows)


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 3, 5])
@pytest.mark.parametrize("how", ["select", "repeat", "reorder"])
def test_rows_are_chosen_then_columns_taken_back(model, removed, how):
    ids = torch.randint(3, 259, (3, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 2:7] = 0
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).cache
    cache.activate_past_recording()
    for a, b in ((5, 7), (7, 10)):
        model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache)
    if how == "select":
        cache.batch_select_indices([1, -1])
        rows = [1, 2]
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
        rows = [0, 0, 1, 1, 2, 2]
    else:
        cache.reorder_cache(torch.tensor([2, 1, 1]))
        rows = [2, 1, 1]
    cache.crop(-removed)
    kept = 10 - removed
    assert cache.get_seq_length() == kept
    got = model(ids[rows, kept:], attention_mask=mask[rows], cache=cache).logits
    want = model(ids[rows], attention_mask=mask[rows]).logits[:, kept:]
    seen = mask[rows][:, kept:].bool()
    laws.agree("logits", got[seen], want[seen])


def test_a_cache_keeps_no_positive_number_of_columns(model, ids):
    with pytest.raises(
        ValueError, match=r"crop is asked to keep 3 columns, which crop does not know; expected 0 ... 0"
    ):
        model(ids, use_cache=True).cache.layers[0].crop(3)


# Saved, and asked from many threads


def test_what_a_trainer_saves_decodes_with_a_cache(ids, tmp_path, capsys):
    model = build("plain").float()
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert AutoConfig.from_pretrained(tmp_path / "model").use_cache is True


@pytest.mark.parametrize("kind", kinds)
def test_first_requests_come_from_many_threads(kind):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model, found = build(kind, hidden_size=8, chunk=3), {}  # sizes that no other test has traced
    prompts = [torch.randint(3, 259, (1, 5 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    together = threading.Barrier(4)

    def serve(n):
        together.wait()
        try:
            found[n] = (
                model.generate(prompts[n], **options),
                model.inner_losses(prompts[n]) if kind != "attention" else None,
            )
        except BaseException as error:
            found[n] = error

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, prompt in enumerate(prompts):
        assert not isinstance(found[n], BaseException), found[n]
        assert torch.equal(found[n][0], model.generate(prompt, **options))
        for got, want in zip(found[n][1], model.inner_losses(prompt), strict=True):
            laws.agree("inner losses", got, want)

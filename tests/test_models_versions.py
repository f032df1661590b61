"""A cache has two names, one per age of transformers; each is right, and a version nobody has seen is checked."""

import pytest
import torch
from transformers import DynamicCache

from dualform import testing as laws
from dualform.models import DualformConfig, DualformForCausalLM, DualformForSequenceClassification, versions

sizes = {
    "preset": "tiny-ttt-linear", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4,
    "num_hidden_layers": 3, "layer_types": ["test_time", "full_attention", "sliding_attention"], "sliding_window": 5,
    "initializer_range": 0.3, "share_qk": True,
}  # fmt: skip
names = ["past_key_values", "cache"]


def build(kind=DualformForCausalLM):
    torch.manual_seed(0)
    return kind(DualformConfig(**sizes)).double().eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def ids():
    return torch.randint(3, 259, (1, 7), generator=torch.Generator().manual_seed(1)).repeat(2, 3)


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("name", names)
def test_either_name_carries_the_cache(model, ids, name):
    for called in (model, model.model):
        cache, parts = None, []
        for part in ids.split([8, 1, 12], 1):
            out = called(part, use_cache=True, **{name: cache})
            cache = getattr(out, name)
            assert cache is out.cache is out.past_key_values
            parts.append(out[0])
        laws.agree(name, torch.cat(parts, 1), called(ids, use_cache=False)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", names)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
def test_generation_takes_a_cache_by_either_name(model, ids, name, options):
    ids = ids[:1]
    want = greedy(model, ids, use_cache=False, **({} if "num_beams" not in options else options))
    empty = DynamicCache(config=model.config)
    found = greedy(model, ids, return_dict_in_generate=True, **options, **{name: empty})
    assert torch.equal(found.sequences, want)
    assert found.cache is found.past_key_values
    if "num_beams" not in options:
        filled = getattr(model(ids[:, :9], use_cache=True), name)
        assert torch.equal(greedy(model, ids, **options, **{name: filled}), want)


@torch.no_grad()
@pytest.mark.parametrize("name", names)
def test_inputs_are_prepared_with_either_name(model, ids, name):
    cache = model(ids[:, :8], use_cache=True).cache
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=13, **{name: cache})
    assert inputs[versions.CACHE] is cache
    laws.agree("logits", model(**inputs).logits, model(ids).logits[:, 8:])


def test_both_names_are_one_too_many(model, ids):
    both, message = dict.fromkeys(names, DynamicCache(config=model.config)), "both past_key_values and cache are given"
    for call in (model, model.model, model.prepare_inputs_for_generation, model.generate):
        with pytest.raises(ValueError, match=message):
            call(ids, **both)
    with pytest.raises(ValueError, match=message):
        build(DualformForSequenceClassification)(ids, **both)


@pytest.fixture
def unseen(monkeypatch):
    """transformers as if it were a version that no run has seen; a list of the models that were built to check it."""
    check, built = versions.Unchecked("5.99.0"), []
    tiny = versions.transformers_version.build
    check.build = lambda: built.append(tiny()) or built[-1]
    monkeypatch.setattr(versions.transformers_version, "__dict__", vars(check))
    return built


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_version_that_no_run_has_seen_is_checked_once(model, ids, unseen, how):
    state = torch.get_rng_state()
    for _ in range(2):
        if how == "generate":
            greedy(model, ids)
        else:
            model(ids, use_cache=True)
    assert len(unseen) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_cache_nothing_is_checked(model, ids, unseen):
    model(ids, use_cache=False)
    assert not unseen


def forgets_by_name(monkeypatch):  # what a renamed argument does
    right = DualformForCausalLM.prepare_inputs_for_generation
    monkeypatch.setattr(
        DualformForCausalLM,
        "prepare_inputs_for_generation",
        lambda self, ids, **given: {n: x for n, x in right(self, ids, **given).items() if n != versions.CACHE},
    )


def loses_the_mask(monkeypatch):
    monkeypatch.setattr("dualform.models.body.read_mask", lambda *args: (None, None))


def loses_the_state(monkeypatch):
    monkeypatch.setattr("dualform.models.cache.FastWeightCache.lend", lambda self: (None, False))


@pytest.mark.parametrize("fault", [forgets_by_name, loses_the_state, loses_the_mask])
def test_the_check_bites(model, ids, unseen, monkeypatch, fault):
    if fault is loses_the_mask:  # wrong with a cache alone
        right = versions.difference
        monkeypatch.setattr(versions, "difference", lambda build: right(build) if not fault(monkeypatch) else 0)
        monkeypatch.setattr("dualform.models.body.adopt", lambda *args: None)
    else:
        fault(monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"transformers is 5\.99\.0, which no test run has seen, and .*Install"):
            model(ids, use_cache=True)
    assert len(unseen) == 1

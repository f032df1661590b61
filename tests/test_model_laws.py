"""Language models are one computation, however a text is cut, padded, packed or batched; each law bites."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualform import testing as laws
from dualform.models import DualformConfig, DualformForCausalLM, attention, blocks, cache

sizes = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "chunk": 4,
    "vocab_size": 31,
    "initializer_range": 0.3,
}
everything = {"use_gate": True, "share_qk": True, "pre_conv": True}
kinds = {
    "linear": {"preset": "tiny-ttt-linear", **everything},
    "mlp": {"preset": "tiny-ttt-mlp", **everything},
    "hybrid": {
        "preset": "tiny-ttt-linear",
        **everything,
        "layer_types": ["sliding_attention", "test_time", "full_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 4,
    },
}
few = max(2, settings().max_examples // 6)


def build(kind, **fields):
    torch.manual_seed(0)
    model = DualformForCausalLM(DualformConfig(**{**sizes, **kinds[kind], **fields})).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "initial_" in name:
                p.mul_(10)  # larger than at birth, so that a fault shows
    return model


@pytest.fixture(scope="module", params=kinds)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return build("hybrid")


@settings(max_examples=few)
@given(
    cuts=st.lists(st.integers(1, 12), max_size=5), seed=st.integers(0, 99), ragged=st.booleans(), resets=st.booleans()
)
def test_any_split_is_one_call(model, cuts, seed, ragged, resets):
    laws.check_model_split(model, cuts, seed=seed, ragged=ragged, resets=resets)


@settings(max_examples=2)
@given(seed=st.integers(0, 99))
def test_decoding_is_forward(model, seed):
    laws.check_model_split(model, range(13), seed=seed, ragged=True, resets=True)


@settings(max_examples=few)
@given(seed=st.integers(0, 99), resets=st.booleans(), cuts=st.lists(st.integers(1, 17), max_size=2))
def test_padding_anywhere_changes_nothing(model, seed, resets, cuts):
    laws.check_model_padding(model, cuts, seed=seed, resets=resets)


@settings(max_examples=few)
@given(seed=st.integers(0, 99), ragged=st.booleans())
def test_a_row_does_not_see_the_batch(model, seed, ragged):
    laws.check_model_batch(model, seed=seed, ragged=ragged, resets=True)


@settings(max_examples=few)
@given(at=st.integers(1, 12), seed=st.integers(0, 99), ragged=st.booleans())
def test_a_document_is_alone(model, at, seed, ragged):
    laws.check_model_reset(model, at, seed=seed, ragged=ragged)


@settings(max_examples=2)
@given(at=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_future_is_ignored(model, at, seed):
    laws.check_model_causal(model, at, seed=seed, ragged=True)


@settings(max_examples=2)
@given(seed=st.integers(0, 99), lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_generation_is_forward_again_and_again(model, seed, lengths):
    laws.check_model_generation(model, lengths, seed=seed)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DualformForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for (name, x), (_, y) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    ids = torch.randint(0, 31, (2, 13))
    with torch.no_grad():
        # A file's tensors lie elsewhere in memory, and a BLAS may sum in another order there.
        laws.agree("logits", loaded(ids).logits, model(ids).logits)


@settings(max_examples=few)
@given(
    cuts=st.lists(st.integers(1, 12), max_size=3),
    taken=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_what_is_taken_back_was_never_read(model, cuts, taken, seed):
    laws.check_model_rollback(model, cuts, taken, seed=seed, ragged=True, resets=True)


# Each law bites: one planted fault each.


class Wrong(torch.nn.Module):
    """A model that is wrong in the way of `spoil`: arguments -> arguments."""

    def __init__(self, right, spoil):
        super().__init__()
        self.right, self.spoil = right, spoil

    @property
    def config(self):
        return self.right.config

    def forward(self, input_ids, **options):
        return self.right(**self.spoil({"input_ids": input_ids, **options}))

    def generate(self, ids, **options):
        return self.right.generate(**self.spoil({"inputs": ids, **options}))


def bites(law, *args, **kwargs):
    with pytest.raises(laws.LawBroken) as caught:
        law(*args, **kwargs)
    return str(caught.value)


def without(name):
    return lambda options: {**options, name: None}


def mixed(options):
    return {
        **options,
        "input_ids": options["input_ids"].roll(1, 0) if options["input_ids"].shape[0] > 1 else options["input_ids"],
    }


def test_the_laws_bite(hybrid):
    assert "cut at" in bites(laws.check_model_split, Wrong(hybrid, without("past_key_values")), [5])
    assert "padding" in bites(laws.check_model_padding, Wrong(hybrid, without("attention_mask")))
    assert "row" in bites(laws.check_model_batch, Wrong(hybrid, mixed))
    assert "document" in bites(laws.check_model_reset, Wrong(hybrid, without("reset")), 5)
    flipped = Wrong(hybrid, lambda options: {**options, "input_ids": options["input_ids"].flip(1)})
    assert "before 5" in bites(laws.check_model_causal, flipped, 5)
    assert "generate" in bites(laws.check_model_generation, Wrong(hybrid, without("attention_mask")), (3, 7))


def test_the_laws_see_positions_that_count_padding(hybrid, monkeypatch):
    right = blocks.join

    def by_columns(past, mask, reset, like):
        columns = right(past, mask, reset, like)
        return columns and columns._replace(ranks=torch.arange(columns.ranks.shape[1]).expand_as(columns.ranks))

    monkeypatch.setattr(blocks, "join", by_columns)
    bites(laws.check_model_padding, hybrid, resets=True)


def test_the_laws_see_a_window_that_padding_narrows(hybrid, monkeypatch):
    def forget(self, kept):
        self.keys, self.values = self.keys[:, :, -kept:], self.values[:, :, -kept:]
        if self.columns is not None:
            self.columns = cache.Columns(*(x[:, -kept:] for x in self.columns[:2]), *self.columns[2:])

    monkeypatch.setattr(cache.DocumentCache, "_forget", forget)
    bites(laws.check_model_padding, hybrid, range(18))


def test_the_laws_see_documents_that_look_at_each_other(hybrid, monkeypatch):
    right = attention.allowed
    monkeypatch.setattr(blocks, "allowed", lambda columns, *rest: right(None, *rest))
    bites(laws.check_model_reset, hybrid, 5)


def test_the_laws_see_a_crop_that_forgets_nothing(hybrid, monkeypatch):
    monkeypatch.setattr(cache.Rollback, "crop", lambda self, n: self.records.clear())
    bites(laws.check_model_rollback, hybrid, [4, 8], [3])

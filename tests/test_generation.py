"""`generate` works unmodified: streams, drafts taken back, saved states, prompts of all lengths; nonsense is named."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from dualform import testing as laws
from dualform.kernels import launch
from dualform.learning.backends import backend_of
from dualform.learning.layer import TestTimeTraining
from dualform.models import DualformConfig, DualformForCausalLM
from dualform.models.state_file import load_state, save_state
from dualform.train.data import byte_tokenizer

kinds = {
    "learner": {"preset": "tiny-ttt-mlp", "num_hidden_layers": 2, "use_gate": True, "share_qk": True},
    "attention": {"preset": "tiny-attention", "num_hidden_layers": 2},
    "hybrid": {
        "preset": "tiny-ttt-linear",
        "num_hidden_layers": 3,
        "layer_types": ["test_time", "full_attention", "sliding_attention"],
        "sliding_window": 5,
    },
}
cpp = backend_of("cpp").whole
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4, "initializer_range": 0.3}


def build(kind, seed=0, **fields):
    torch.manual_seed(seed)
    return DualformForCausalLM(DualformConfig(**{**sizes, **kinds[kind], **fields})).double().eval()


@pytest.fixture(scope="module", params=kinds)
def model(request):
    return build(request.param)


@pytest.fixture
def ids():
    # A prompt that repeats itself, so that some drafts are right, some wrong, some partly right.
    part = torch.randint(3, 259, (1, 7), generator=torch.Generator().manual_seed(1))
    return part.repeat(1, 3)


def greedy(model, ids, n=24, **kwargs):
    return model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, **kwargs)


def test_drafts_that_are_taken_back_change_nothing(model, ids):
    want = greedy(model, ids)
    found = greedy(model, ids, prompt_lookup_num_tokens=4, return_dict_in_generate=True)
    assert torch.equal(found.sequences, want)
    assert not any(layer.record_past or layer.records for layer in found.past_key_values.layers)
    # What the cache learnt is what it would have learnt without drafts.
    more = torch.randint(3, 259, (1, 3))
    with torch.no_grad():
        got = model(more, past_key_values=found.past_key_values).logits
        laws.agree("logits", got, model(torch.cat([want[:, :-1], more], 1)).logits[:, -3:])


@pytest.mark.parametrize("assistant", ["same", "other"])
def test_a_smaller_model_may_draft(model, ids, assistant):
    drafter = copy.deepcopy(model) if assistant == "same" else build("learner", seed=1, num_hidden_layers=1)
    assert torch.equal(greedy(model, ids, assistant_model=drafter), greedy(model, ids))


@pytest.mark.parametrize("seen", [1, 5, 14, 20])
@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": 0}, {"prefill_chunk_size": 3}]
)
def test_generation_goes_on_from_a_filled_cache(model, ids, seen, options):
    options = {
        n: build("learner", seed=1, num_hidden_layers=1) if n == "assistant_model" else x for n, x in options.items()
    }
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    for prompt, mask in ((ids, torch.ones_like(ids)), (padded, (padded > 0).long())):
        n = prompt.shape[1] - ids.shape[1] + seen
        want = greedy(model, prompt, 12, attention_mask=mask)
        with torch.no_grad():
            cache = model(prompt[:, :n], attention_mask=mask[:, :n], use_cache=True).past_key_values
        found = greedy(model, prompt, 12, attention_mask=mask, past_key_values=copy.deepcopy(cache), **options)
        assert torch.equal(found, want)
        if not options or "prefill_chunk_size" in options:  # the new ids alone, where the mask says so
            found = greedy(model, prompt[:, n:], 12, attention_mask=mask, past_key_values=cache, **options)
            assert torch.equal(found, want[:, n:])


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        (lambda x: x[:, :3], {}, r"generate: input_ids has 3 columns and the cache has read 9 columns; "
        r".*read \+ new\) = \(1, 12\)"),
        (lambda x: x[:, 9:], {}, r"input_ids has \[.*\] before column 9, not \[.*\], and the cache has read 9 columns"),
        (lambda x: x[:, 9:], {"attention_mask": torch.ones(1, 21), "prompt_lookup_num_tokens": 3}, "holds new columns only"),
    ],
)  # fmt: skip
def test_ids_that_do_not_go_on_from_a_cache_are_named(model, ids, wrong, options, message):
    ids = ids.clone()
    ids[0, 9:] = ids[0, 9:].flip(0)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        greedy(model, wrong(ids), past_key_values=cache, **options)


def test_only_what_was_recorded_is_taken_back(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"Cache: crop is asked to forget 3 columns; expected 0 ... 0, .* Call `cache.activate"
        ):
            cache.crop(-3)
        cache.activate_past_recording()
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match=r"forget 5 columns; expected 0 ... 4"):
            cache.crop(-5)
        cache.crop(-4)
        assert cache.get_seq_length() == ids.shape[1]
        got = model(ids[:, :2], past_key_values=cache).logits
        laws.agree("logits", got, model(torch.cat([ids, ids[:, :2]], 1)).logits[:, -2:])


def test_a_copy_takes_back_what_it_read_itself(model, ids):
    """A cache that is copied while it records, as for trying several drafts:
    neither the copy nor the original is spoilt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(ids).logits
        model(ids[:, :9], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 9:13], past_key_values=cache)
        tried = copy.deepcopy(cache)
        tried.crop(-2)
        laws.agree("copy", model(ids[:, 11:], past_key_values=tried).logits, want[:, 11:])
        laws.agree("original", model(ids[:, 13:], past_key_values=cache).logits, want[:, 13:])


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
def test_several_answers_go_on_from_a_filled_cache(model, options, only_new):
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, **options}
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
    repeated = copy.deepcopy(cache)  # by hand, as it was asked for before
    repeated.batch_repeat_interleave(max(options.get("num_beams", 1), options.get("num_return_sequences", 1)))
    given = {"attention_mask": torch.ones(2, 9, dtype=torch.long)} if only_new else {}
    rest = ids[:, 7:] if only_new else ids
    found = []
    for past in (None, cache, repeated):
        torch.manual_seed(0)
        more = {} if past is None else {**given, "past_key_values": past}
        answer = model.generate(ids if past is None else rest, **options, **more)
        found.append(answer[:, 7 if past is None and only_new else 0 :])
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("kind", ["learner", "hybrid"])
def test_tokens_written_over_the_state_change_nothing(kind, ids, monkeypatch):
    """Greedy, beams that move, drafts that are taken back, a copy and what was read from the cache,
    with compiled steps."""
    monkeypatch.setattr(launch, "OPTIMISE", "-O0")
    model, calls = build(kind), []
    wanted = [greedy(model, ids), greedy(model, ids, num_beams=3), greedy(model, ids, prompt_lookup_num_tokens=4)]
    layers = [m for m in model.modules() if isinstance(m, TestTimeTraining)]
    for layer in layers:
        layer.backend = "cpp"
    step = cpp.step
    monkeypatch.setattr(type(cpp), "step", lambda self, *rest: (calls.append(rest[-1]), step(*rest))[1])
    for want, options in zip(wanted, [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], strict=True):
        assert torch.equal(greedy(model, ids, **options), want)
    assert {True, False} <= {*calls}
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        copied, held = copy.deepcopy(cache), cache.layers[0].state
        aside = copy.copy(cache.layers[0])
        before = {name: x.clone() for name, x in held.tensors().items()}
        calls.clear()
        first, then = (model(ids[:, n : n + 1], past_key_values=cache).logits for n in (1, 2))
        assert calls[: len(layers)] == [False, *[True] * (len(layers) - 1)]  # the first layer's was read from outside
        assert all(calls[len(layers) :])
        for state in (held, aside.state):
            assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())
        for n, want in ((1, first), (2, then)):
            laws.agree("copy", model(ids[:, n : n + 1], past_key_values=copied).logits, want)


def test_text_is_streamed(model):
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    ids = tokenizer("to be", return_tensors="pt")["input_ids"].long()
    work = threading.Thread(target=greedy, args=(model, ids, 6), kwargs={"streamer": streamer})
    work.start()
    heard = "".join(streamer)
    work.join()
    assert heard == tokenizer.decode(greedy(model, ids, 6)[0, ids.shape[1] :])


def test_embeddings_are_a_prompt(model, ids):
    embeds = model.get_input_embeddings()(ids).detach()
    assert torch.equal(greedy(model, None, 8, inputs_embeds=embeds), greedy(model, ids, 8)[:, ids.shape[1] :])


def test_no_prompt_is_the_beginning_of_a_text(model):
    want = greedy(model, torch.full((1, 1), model.config.bos_token_id), 5)
    assert torch.equal(greedy(model, None, 5), want)


@pytest.mark.parametrize("beams", [1, 3])
def test_right_padded_prompts_go_on_from_their_own_ends(model, ids, beams):
    padded = torch.cat([ids, ids])
    mask = torch.ones_like(padded)
    padded[0, 13:], mask[0, 13:] = 0, 0
    found = greedy(model, padded, 6, attention_mask=mask, num_beams=beams, pad_token_id=0)
    assert torch.equal(found[0, 21:], greedy(model, ids[:, :13], 6, num_beams=beams, pad_token_id=0)[0, 13:])
    assert torch.equal(found[1:], greedy(model, ids, 6, num_beams=beams, pad_token_id=0))
    every = model(padded, attention_mask=mask).logits
    assert torch.equal(every[0, 13:], every[0, 12].expand_as(every[0, 13:]))
    laws.agree("logits", model(padded, attention_mask=mask, logits_to_keep=3).logits, every[:, -3:])


def test_beams_of_ragged_prompts(model, ids):
    padded = torch.cat([torch.zeros(1, 21, dtype=torch.long), ids])
    padded[0, 10:] = ids[0, :11]
    mask = torch.ones_like(padded)
    mask[0, :10] = 0
    found = greedy(model, padded, 6, attention_mask=mask, num_beams=3, pad_token_id=0)
    assert torch.equal(found[:1, 10:], greedy(model, padded[:1, 10:], 6, num_beams=3, pad_token_id=0))
    assert torch.equal(found[1:], greedy(model, ids, 6, num_beams=3, pad_token_id=0))


def test_a_conversation_goes_on_from_a_file(model, ids, tmp_path):
    """Also where the rows were padded, and where one row goes on as several."""
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(24) >= 3).long()[None]
    first = greedy(model, padded, 5, attention_mask=mask, return_dict_in_generate=True)
    save_state(tmp_path / "state", model.config, first.past_key_values, first.sequences)
    cache, read = load_state(tmp_path / "state", model.config)
    said = torch.cat([read, ids[:, :6]], 1)
    longer = torch.cat([mask, torch.ones(1, said.shape[1] - 24, dtype=torch.long)], 1)
    got = greedy(model, said, 6, attention_mask=longer, past_key_values=cache)
    assert torch.equal(got, greedy(model, said, 6, attention_mask=longer))
    cache, _ = load_state(tmp_path / "state", model.config)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(0)
    many = model.generate(
        said.expand(3, -1), attention_mask=longer.expand(3, -1), past_key_values=cache, max_new_tokens=3
    )
    assert many.shape == (3, said.shape[1] + 3)


def with_cache(model, ids):
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: m.generate(x[:, :0], max_new_tokens=2),
            r"generate: input_ids has shape \(1, 0\); expected at least one",
        ),
        (
            lambda m, x: m.generate(x + 300, max_new_tokens=2),
            r"input_ids holds \d+; expected ids in 0 ... vocab_size - 1 = 258",
        ),
        (
            lambda m, x: m(x, attention_mask=x[0]),
            r"attention_mask has shape \(21,\); expected \(batch, tokens\) = \(1, 21\)\. ",
        ),
        (lambda m, x: m(x, attention_mask=x[:, 1:]), r"attention_mask has shape \(1, 20\); expected .* = \(1, 21\)"),
        (
            lambda m, x: m(x, attention_mask=torch.ones(1, 22)),
            r"attention_mask has shape \(1, 22\); expected .* = \(1, 21\)",
        ),
        (
            lambda m, x: m(x, attention_mask=torch.ones(1, 1, 21, 21)),
            r"has shape \(1, 1, 21, 21\); .* Pass the 2D padding mask",
        ),
        (
            lambda m, x: m(x[:, :2], attention_mask=torch.ones(1, 9), past_key_values=with_cache(m, x)),
            r"has shape \(1, 9\); expected \(batch, tokens\) = \(1, 2\) or \(batch, past \+ tokens\) = \(1, 23\)",
        ),
        (
            lambda m, x: m(x, position_ids=x[:, 1:]),
            r"position_ids has shape \(1, 20\); expected \(batch or 1, tokens\) = \(1, 21\)",
        ),
        (lambda m, x: m(inputs_embeds=torch.ones(1, 2, 9)), r"inputs_embeds has shape \(1, 2, 9\); .*hidden_size = 16"),
        (
            lambda m, x: m(
                x, past_key_values=with_cache(build("hybrid", num_hidden_layers=4, layer_types=["test_time"] * 4), x)
            ),
            r"layer 1 is a filled FastWeightCache; expected DocumentCache of window None for a layer of kind "
            r"'full_attention'",
        ),
        (
            lambda m, x: m(x, past_key_values=with_cache(build("hybrid", sliding_window=4), x)),
            r"layer 2 is a filled DocumentCache of window 4; expected DocumentCache of window 5",
        ),
        (
            lambda m, x: m(
                x,
                past_key_values=with_cache(
                    build("hybrid", num_hidden_layers=4, layer_types=[*m.config.layer_types, "test_time"]), x
                ),
            ),
            r"holds 4 layers that have seen \[21, 21, 21, 21\] columns; expected 3 layers",
        ),
        (
            lambda m, x: m(
                x, past_key_values=with_cache(build("hybrid", num_hidden_layers=1, layer_types=["test_time"]), x)
            ),
            r"holds 3 layers that have seen \[21, 0, 0\] columns; expected 3 layers, all with the same number",
        ),
        (
            lambda m, x: m(x.repeat(2, 1), past_key_values=with_cache(m, x)),
            r"past_key_values: holds the state of 1 rows; expected batch = 2",
        ),
        (
            lambda m, x: m(x, past_key_values=with_cache(build("hybrid", hidden_size=24), x)),
            r"past_key_values: holds conv.pre of \(3, 24\) a row; expected \(3, 16\)",
        ),
        (
            lambda m, x: m(x, past_key_values=with_cache(build("hybrid", chunk=8), x)),
            r"past_key_values: holds chunk of \(8,\) a row; expected \(4,\)",
        ),
        (lambda m, x: m(x[0]), r"input_ids has shape \(21,\) and type torch.int64; expected \(batch, tokens\)"),
        (lambda m, x: m(x, past_key_values=((x, x),)), r"past_key_values: is a tuple; expected a Cache"),
        (lambda m, x: m(x > 5), r"input_ids has shape \(1, 21\) and type torch.bool; expected"),
        (
            lambda m, x: m(x.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 4, 21])),
            r"cu_seq_lens_q has shape \(3,\) and dtype torch.int64 with batch = 2; expected .* one packed row, batch = 1",
        ),
        (lambda m, x: m(x.float()), r"input_ids has shape \(1, 21\) and type torch.float32"),
        (
            lambda m, x: build("attention").inner_losses(x),
            r"inner_losses: layer_types is .*expected a 'test_time' layer",
        ),
        (lambda m, x: greedy(m, x, cache_implementation="paged"), "continuous batching .*expected a cache that takes"),
        (lambda m, x: copy.deepcopy(m(x, use_cache=True).past_key_values), r"Call cache\.detach\(\) first"),
    ],
)
def test_nonsense_is_named(ids, call, message):
    with pytest.raises(ValueError, match=message):
        call(build("hybrid"), ids)


def test_nothing_is_read_from_nothing(model, ids):
    """A part without tokens is a part: nothing is said, nothing changes."""
    with torch.no_grad():
        assert model(ids[:, :0]).logits.shape == (1, 0, 259)
        cache = with_cache(model, ids[:, :9])
        cache = model(ids[:, :0], past_key_values=cache, use_cache=True).past_key_values
        laws.agree("logits", model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


def test_export_takes_any_length(ids):
    model = build("learner", chunk=4)
    length = {"input_ids": {1: torch.export.Dim("T", min=2, max=64)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=length).module()
        for T in (3, 11, 21):
            laws.agree("logits", program(input_ids=ids[:, :T], use_cache=False).logits, model(ids[:, :T]).logits)

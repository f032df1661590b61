"""What `generate` replays says what calls say: texts, logits, and what the cache holds afterwards.

A CUDA graph's part is played by a function that runs the captured call again; tests/gpu/ has the real one.
"""

import pytest
import torch

import dualform as df
from dualform.models import cache as cache_module
from dualform.models import causal_lm
from dualform.models.captured import ORDINARY, CapturedStep

PRESETS = [
    p for p in df.presets if p.startswith("tiny") and set(df.DualformConfig(preset=p).layer_types) == {"test_time"}
]
replays = []


def recorded(run):
    """As a graph is recorded: nothing is computed yet, and the host's part is over; replayed, it writes where it did."""
    layers = next(c for c in run.__closure__ if hasattr(c.cell_contents, "layers")).cell_contents.layers
    own = [layer._state for layer in layers]
    values = [{name: x.clone() for name, x in state.tensors().items()} for state in own]
    logits = run()
    for state, value in zip(own, values, strict=True):
        for name, x in state.tensors().items():
            x.copy_(value[name])

    def replay():
        replays.append(1)
        before = [dict(vars(layer)) for layer in layers]
        for layer, state in zip(layers, own, strict=True):
            layer._state, layer._ours = state, True
        logits.copy_(run())
        for layer, was in zip(layers, before, strict=True):
            vars(layer).update(was)

    return replay, logits


@pytest.fixture
def captured(monkeypatch):
    replays.clear()
    on = [True]
    monkeypatch.setattr(causal_lm, "is_capturable", lambda model: on[0])
    monkeypatch.setattr(CapturedStep, "recorded", staticmethod(recorded))
    monkeypatch.setattr(cache_module, "captures", lambda x: on[0])
    return on


def model_of(preset, **more):
    torch.manual_seed(0)
    return df.DualformForCausalLM(df.DualformConfig(preset=preset, **more)).double().eval()


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3, "do_sample": False},
    "answers": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", PRESETS)
def test_texts_and_caches_are_those_of_calls(preset, way, captured):
    model = model_of(preset)
    ids = torch.randint(4, 200, (3, 13))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    asks = {"max_new_tokens": 24, "min_new_tokens": 24, "return_dict_in_generate": True, "output_logits": True}

    def found(ids=ids, mask=mask, **more):
        torch.manual_seed(1)
        return model.generate(ids, attention_mask=mask, **asks, **WAYS[way], **more)

    own = found()
    assert len(replays) == (0 if way == "beams" else 24 - 1 - ORDINARY)  # transformers' beams are calls
    captured[0] = False
    true = found()
    assert torch.equal(own.sequences, true.sequences)
    for a, b in zip(own.logits, true.logits, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(own.past_key_values.layers, true.past_key_values.layers, strict=True):
        assert (a.seen, a.num_rows) == (b.seen, b.num_rows)
        assert (a.read is None) == (b.read is None)
        assert a.read is None or torch.equal(a.read, b.read)
        for x, y in zip(a.state.tensors().values(), b.state.tensors().values(), strict=True):
            assert torch.equal(x, y)
    if way in ("greedy", "sampled"):  # and it goes on
        more = torch.cat([true.sequences, torch.randint(4, 200, (3, 2))], 1)
        ones = torch.cat([mask, torch.ones(3, 26, dtype=torch.long)], 1)
        wanted = found(more, ones, past_key_values=true.past_key_values)
        captured[0] = True
        assert torch.equal(found(more, ones, past_key_values=own.past_key_values).sequences, wanted.sequences)


def test_what_calls_alone_can_do_stays_a_call(captured):
    model = model_of("tiny-ttt-linear")
    ids = torch.randint(4, 200, (2, 9))
    asks = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **asks)
    model.generate(ids[:1], prompt_lookup_num_tokens=2, **asks)
    assert not replays
    model.generate(ids, **asks)
    assert replays


def test_hooks_and_growing_layers_are_not_captured():
    from dualform.models.captured import is_capturable

    class On:
        def __init__(self, model):
            self.device, self.config, self.modules = torch.device("cuda"), model.config, model.modules

    model = model_of("tiny-ttt-linear")
    assert is_capturable(On(model))
    assert not is_capturable(model)
    assert not is_capturable(On(model_of("tiny-ttt-linear", layer_types=["test_time", "full_attention"])))
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert not is_capturable(On(model))
    hook.remove()
    assert is_capturable(On(model))


def test_a_call_that_waits_for_the_host_is_not_captured(captured, monkeypatch, caplog):
    def refused(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = model_of("tiny-ttt-linear")
    ids = torch.randint(4, 200, (2, 9))
    asks = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    captured[0] = False
    true = model.generate(ids, **asks)
    captured[0] = True
    monkeypatch.setattr(cache_module, "captures", lambda x: False)  # the call writes its state elsewhere
    monkeypatch.setattr(CapturedStep, "recorded", staticmethod(refused))
    assert torch.equal(model.generate(ids, **asks), true)
    assert "operation not permitted when stream is capturing" in caplog.text

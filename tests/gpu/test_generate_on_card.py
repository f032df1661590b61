"""Texts that CUDA graphs replay are those of calls, also from several threads, and a graph leaves nothing behind."""

import threading

import pytest
import torch

import dualform as df
from dualform.models.captured import CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PRESETS = [
    p for p in df.presets if p.startswith("tiny") and set(df.DualformConfig(preset=p).layer_types) == {"test_time"}
]
ASKS = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
def test_texts_are_those_of_calls(preset, backend, caplog):
    torch.manual_seed(0)
    model = df.DualformForCausalLM(df.DualformConfig(preset=preset)).cuda().eval()
    for layer in model.modules():
        if isinstance(layer, df.TestTimeTraining):
            layer.backend = backend
    ids = torch.randint(4, 200, (3, 13), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    replays = []
    original = CapturedStep._replayed
    CapturedStep._replayed = lambda self, *args: replays.append(1) or original(self, *args)
    try:
        for _ in range(2):
            own = model.generate(ids, attention_mask=mask, **ASKS)
            true = model.generate(ids, attention_mask=mask, disable_compile=True, **ASKS)
            assert torch.equal(own.sequences, true.sequences)
            for a, b in zip(own.past_key_values.layers, true.past_key_values.layers, strict=True):
                for x, y in zip(a.state.tensors().values(), b.state.tensors().values(), strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
        if backend == "triton":
            assert len(replays) == 2 * 36, caplog.text
        longer = torch.cat([true.sequences, ids[:, :2]], 1)
        ones = torch.cat([mask, torch.ones_like(longer[:, 13:])], 1)
        own = model.generate(longer, attention_mask=ones, past_key_values=own.past_key_values, **ASKS)
        more = {"past_key_values": true.past_key_values, "disable_compile": True}
        assert torch.equal(own.sequences, model.generate(longer, attention_mask=ones, **more, **ASKS).sequences)
    finally:
        CapturedStep._replayed = original
    # What a graph held is gone: calls go on as before.
    assert torch.equal(model.generate(ids, attention_mask=mask, **ASKS).sequences, true.sequences)


def test_several_threads_generate():
    torch.manual_seed(0)
    model = df.DualformForCausalLM(df.DualformConfig(preset=PRESETS[0])).cuda().eval()
    texts = [torch.randint(4, 200, (2, 9 + n), device="cuda") for n in range(4)]
    true = [model.generate(ids, disable_compile=True, **ASKS).sequences for ids in texts]
    found, errors = {}, []

    def run(n):
        try:
            found[n] = [model.generate(texts[n], **ASKS).sequences for _ in range(3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    for n, each in found.items():
        for text in each:
            assert torch.equal(text, true[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_as_it_comes_takes_triton_after_its_check(dtype, tmp_path, monkeypatch, recwarn):
    """Layers of both directions and of decoding, by auto, with the check of first uses, in a cache that is new."""
    monkeypatch.setenv("DUALFORM_PROVE", "1")
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    torch.manual_seed(0)
    config = df.DualformConfig(preset="ttt-linear-125m", num_hidden_layers=1, vocab_size=512)
    model = df.DualformForCausalLM(config).cuda().to(dtype)
    ids = torch.randint(4, 500, (2, 512), device="cuda")
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.eval().generate(ids, **ASKS)
    assert not [str(w.message) for w in recwarn if "backend='eager'" in str(w.message)]

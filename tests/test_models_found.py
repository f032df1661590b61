"""transformers' Auto classes find our models, whoever imports what first; heads classify, wherever padding stands."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import dualform as df
from dualform import testing as laws

sizes = {
    "preset": "tiny-ttt-linear", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4,
    "num_hidden_layers": 2, "layer_types": ["test_time", "full_attention"], "initializer_range": 0.3, "num_labels": 3,
}  # fmt: skip
T = 9


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    df.DualformForCausalLM(df.DualformConfig(**sizes)).save_pretrained(folder)
    return folder


def run(code, home):
    environment = {**os.environ, "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


orders = {
    "dualform first": "import dualform; from transformers import AutoModelForCausalLM as A, AutoConfig",
    "transformers "
    "first": "import transformers; import dualform; from transformers import AutoModelForCausalLM as A, AutoConfig",
    "its mapping first": "from transformers import AutoConfig, AutoModelForCausalLM as A; import dualform",
    "another model "
    "between": "import dualform; from transformers import LlamaForCausalLM, AutoConfig, AutoModelForCausalLM as A",
    "a layer of its "
    "own": "import dualform; import transformers.modeling_layers; from transformers import AutoConfig, "
    "AutoModelForCausalLM as A",
    "the Trainer": "import dualform; from transformers import Trainer, AutoConfig, AutoModelForCausalLM as A",
    "loaded again": "import dualform, importlib; from transformers import AutoConfig; "
    "importlib.reload(dualform.auto_classes); from transformers import AutoModelForCausalLM as A",
}  # fmt: skip


@pytest.mark.parametrize("order", orders)
def test_importing_dualform_is_enough(saved, tmp_path, order):
    code = f"""{orders[order]}
model = A.from_pretrained({str(saved)!r})
assert type(model).__name__ == "DualformForCausalLM", type(model)
assert type(AutoConfig.for_model("dualform")).__name__ == "DualformConfig"
from transformers import CONFIG_MAPPING
assert "llama" in CONFIG_MAPPING and CONFIG_MAPPING["llama"].model_type == "llama" and "nothing" not in CONFIG_MAPPING
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_dualform_brings_no_transformers(tmp_path):
    done = run(
        "import dualform, sys; assert not [m for m in sys.modules if m.split('.')[0] == 'transformers']", tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_saved_models_load_where_nobody_imports_dualform(saved, tmp_path, auto):
    code = f"""from transformers import {auto}, AutoConfig
import torch, sys
assert "dualform" not in sys.modules
model = {auto}.from_pretrained({str(saved)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("dualform."), type(model)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "again").glob("*.py")} == {"modeling_dualform.py"}
    if auto == "AutoModelForCausalLM":
        again, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "again", saved))
        ids = torch.arange(3, 14)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)


def heads():
    return [df.DualformForSequenceClassification, df.DualformForTokenClassification]


def build(kind, **fields):
    torch.manual_seed(0)
    return kind(df.DualformConfig(**{**sizes, **fields})).double().eval()


@pytest.fixture
def ids():
    return torch.randint(3, 259, (2, T), generator=torch.Generator().manual_seed(1))


def padded(ids, side, pad=0, n=4):
    """The first row with n columns of padding, the second n tokens longer."""
    extra = torch.randint(3, 259, (1, n), generator=torch.Generator().manual_seed(2))
    blank, ones = torch.full((1, n), pad), torch.ones(1, T + n, dtype=torch.long)
    at = {"left": 0, "right": T, "between": 5}[side]
    row = torch.cat([ids[:1, :at], blank, ids[:1, at:]], 1)
    mask = torch.cat([torch.ones(1, at), torch.zeros(1, n), torch.ones(1, T - at)], 1).long()
    return torch.cat([row, torch.cat([ids[1:], extra], 1)]), torch.cat([mask, ones])


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_texts_are_classified_by_their_last_token(ids, side, pad):
    model = build(df.DualformForSequenceClassification, pad_token_id=pad)
    both, mask = padded(ids, side)
    found = model(both, attention_mask=mask).logits
    assert found.shape == (2, 3)
    laws.agree("padded row", found[:1], model(ids[:1]).logits)
    laws.agree("other row", found[1:], model(both[1:]).logits)
    embeds = model.get_input_embeddings()(both)
    laws.agree("embeddings", model(inputs_embeds=embeds, attention_mask=mask).logits, found)
    if side == "right" and pad is not None:  # then padding is what has that id
        laws.agree("no mask", model(both).logits, found)
    h = model.model(ids).last_hidden_state
    laws.agree("score", model(ids).logits, model.score(h[:, -1]))
    cache = model(ids[:, :4], use_cache=True).cache
    laws.agree("read on", model(ids[:, 4:], cache=cache).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_tokens_are_classified_one_by_one(ids, side):
    model = build(df.DualformForTokenClassification)
    both, mask = padded(ids, side)
    found = model(both, attention_mask=mask).logits
    assert found.shape == (2, T + 4, 3)
    laws.agree("padded row", found[:1, mask[0].bool()], model(ids[:1]).logits)


@pytest.mark.parametrize(
    ("kind", "labels", "problem"),
    [
        (df.DualformForSequenceClassification, torch.tensor([0, 2]), "single_label_classification"),
        (df.DualformForSequenceClassification, torch.rand(2, 3).double().round(), "multi_label_classification"),
        (df.DualformForTokenClassification, torch.randint(0, 3, (2, T)), None),
    ],
)
def test_heads_learn(ids, kind, labels, problem):
    model = build(kind, problem_type=problem)
    out = model(ids, labels=labels)
    logits = out.logits.flatten(0, -2)
    if problem == "multi_label_classification":
        want = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    else:
        want = torch.nn.functional.cross_entropy(logits, labels.flatten())
    laws.agree("loss", out.loss, want)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_heads_stand_on_a_language_models_body(saved, ids, tmp_path, capfd):
    lm = AutoModelForCausalLM.from_pretrained(saved)
    for auto, kind in zip((AutoModelForSequenceClassification, AutoModelForTokenClassification), heads(), strict=True):
        model = auto.from_pretrained(saved, num_labels=5)
        assert type(model) is kind
        assert model.score.out_features == 5
        assert torch.equal(model.model(ids)[0], lm.model(ids)[0])
        model.save_pretrained(tmp_path / kind.__name__)
        assert torch.equal(auto.from_pretrained(tmp_path / kind.__name__)(ids).logits, model(ids).logits)

"""What was pickled and saved before the modules moved is read, and gives the numbers that it gave."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch

import dualform as df
from dualform.moved import moved_modules

BEFORE = Path(__file__).parent / "data" / "before_the_moves"


@pytest.fixture(scope="module")
def things():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of its own version
        return pickle.loads((BEFORE / "before.pickle").read_bytes())


def test_records_are_equal_to_those_of_today(things):
    assert things["records"] == [
        df.learners.MLP(depth=2), df.rules.SGD(lr=0.1), df.objectives.Squared(), df.expansions.taylor(degree=2),
        df.backends.eager(),
    ]  # fmt: skip


def test_a_layer_its_state_and_a_program_go_on(things):
    y, state = things["layer"](things["layer_input"])
    torch.testing.assert_close(y, things["layer_output"])
    for name, x in state.tensors().items():
        torch.testing.assert_close(things["layer_state"].tensors()[name], x)
    q = things["program_input"]
    o, after = things["program"](q, q, q)
    torch.testing.assert_close(o, things["program_output"])
    for name, x in after.tensors().items():
        torch.testing.assert_close(things["state"].tensors()[name], x)


def test_heads_and_estimators_predict_as_they_did(things):
    torch.testing.assert_close(things["head"](things["head_input"]), things["head_output"])
    assert str(things["estimator"].formula()) == "y = x0"


def test_a_saved_model_loads():
    model = df.DualformForCausalLM.from_pretrained(BEFORE / "model")
    torch.testing.assert_close(model(torch.arange(10)[None]).logits, torch.load(BEFORE / "logits.pt"))


def test_every_old_name_of_a_module_is_the_module_of_today():
    import importlib

    for old, new in moved_modules().items():
        assert importlib.import_module(old) is importlib.import_module(new)

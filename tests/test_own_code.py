"""A learner, objective or rule from a file of one's own: saved with the model, told apart by bytes, run on one's word."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dualform as df
from dualform import bundles, own_code
from dualform.catalogue import CatalogueError
from dualform.cli import main
from dualform.own_code import CodeError, UntrustedCodeError
from dualform.train.settings import Settings
from dualform.train.training import train

MINE = """
import torch
from torch import nn
from os import system
import dualform as df
from helper import scale


class Mine(nn.Module):
    def __init__(self, dim, rank=2):
        super().__init__()
        self.A, self.B = nn.Parameter(0.3 * torch.randn(dim, rank)), nn.Parameter(0.3 * torch.randn(rank, dim))

    def forward(self, x):
        return x + scale * torch.tanh(x @ (self.A @ self.B))


class Temperature(nn.Module):
    def __init__(self, start=1.5):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(start))

    def forward(self, prediction, target):
        return (self.t * prediction - target).square().sum(-1)


def loss(prediction, target, factor=1.0):
    return factor * (prediction - target).square().sum(-1)


def slow(lr=0.5):
    return df.Rule(lambda i, lr_gate: df.Step(((1.0,),), (lr * lr_gate,), (1.0,), 1.0), ("lr_gate",))


def needs(dim, width):
    return Mine(dim, width)


def nothing():
    return None


class Plain:
    def __init__(self, dim):
        pass


built = Mine(8)
number = 3
"""
SIZES = {
    "preset": "tiny-ttt-linear", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4,
    "num_hidden_layers": 2, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.arange(26).reshape(2, 13) * 7 % 250 + 3


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path / "cache"))
    stranger(monkeypatch)
    (tmp_path / "helper.py").write_text("scale = 0.5\n")
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def stranger(monkeypatch, cache=None):
    """Forget whatever this process knows of files, as another one does; with another cache, as another user does."""
    for held in ("_files", "_places", "_allowed"):
        monkeypatch.setattr(bundles, held, type(getattr(bundles, held))())
    for held in ("_live", "_reasons", "_records"):
        monkeypatch.setattr(own_code, held, {})
    for name in [name for name in sys.modules if name.startswith(bundles.PREFIX)]:
        del sys.modules[name]
    if cache is not None:
        monkeypatch.setenv("DUALFORM_CACHE", str(cache))


def model(**specs):
    torch.manual_seed(0)
    return df.DualformForCausalLM(df.DualformConfig(**SIZES, **specs)).double().eval()


def logits(lm):
    with torch.no_grad():
        return lm(IDS).logits


def load(folder, auto=df.DualformForCausalLM, **kwargs):
    return auto.from_pretrained(folder, dtype=torch.float64, **kwargs).eval()


def saved_by_another(mine, monkeypatch, tmp_path, **specs):
    lm = model(learner=f"{mine}:Mine", **specs)
    lm.save_pretrained(tmp_path / "saved")
    expected = logits(lm)
    stranger(monkeypatch, tmp_path / "another")
    return tmp_path / "saved", expected


specs = {
    "learner": [{"learner": "{}:Mine"}, {"learner": ("{}:Mine", {"rank": 3})}],
    "nested": [{"learner": {"name": "residual_norm", "spec": "{}:Mine"}}],
    "objective": [{"objective": "{}:loss"}, {"objective": {"name": "{}:loss", "factor": 0.5}}],
    "objective with parameters": [{"objective": "{}:Temperature"}],
    "rule": [{"rule": "{}:slow"}, {"rule": ("{}:slow", {"lr": 0.1})}],
}


def placed(spec, path):
    if isinstance(spec, str):
        return spec.format(path)
    if isinstance(spec, dict):
        return {key: placed(value, path) for key, value in spec.items()}
    return tuple(placed(part, path) for part in spec) if isinstance(spec, tuple) else spec


@pytest.mark.parametrize("given", [spec for some in specs.values() for spec in some], ids=str)
def test_what_is_saved_is_what_is_loaded(mine, monkeypatch, tmp_path, given):
    lm = model(**placed(given, mine))
    expected = logits(lm)
    lm.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(copy.deepcopy(lm)), expected)
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    stranger(monkeypatch)  # the same user, another process
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    stranger(monkeypatch, tmp_path / "another")
    with pytest.raises(UntrustedCodeError, match=r"mine\.py:\w+ is code that came with a model.*mine\.py \(\d+ lines"):
        load(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", trust_remote_code=True)), expected)


def test_nothing_of_a_folder_runs_before_its_reader_says_so(mine, monkeypatch, tmp_path):
    mark = tmp_path / "it ran"
    mine.write_text(MINE + f"\nopen({str(mark)!r}, 'w').close()\n")
    folder, expected = saved_by_another(mine, monkeypatch, tmp_path)
    mark.unlink()
    df.DualformConfig.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for auto in (df.DualformForCausalLM, AutoModelForCausalLM):
        for said in ({}, {"trust_remote_code": False}):
            with pytest.raises(UntrustedCodeError, match="--trust-code"):
                load(folder, auto, **said)
    assert not mark.exists()
    assert torch.equal(logits(load(folder, AutoModelForCausalLM, trust_remote_code=True)), expected)
    assert mark.exists()
    shutil.copy(folder / "model.safetensors", tmp_path / "again")  # a configuration read and saved has its files too
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_a_cache_that_others_write_vouches_for_nothing(mine, monkeypatch, tmp_path):
    folder, _ = saved_by_another(mine, monkeypatch, tmp_path)
    stranger(monkeypatch, tmp_path / "cache")
    (tmp_path / "cache" / "code").chmod(0o777)
    with pytest.raises(UntrustedCodeError):
        load(folder)


@pytest.mark.parametrize("how", ["changed", "missing", "path", "outside", "imported"])
def test_a_folder_that_was_changed(mine, monkeypatch, tmp_path, how):
    folder, _ = saved_by_another(mine, monkeypatch, tmp_path)
    (file,) = folder.glob("code/*/mine.py")
    document = json.loads((folder / "config.json").read_text())
    if how == "changed":
        file.write_text(MINE + "\n# mine too\n")
        message = "mine.py has changed since the model was saved: its SHA-256 is"
    elif how == "missing":
        file.unlink()
        message = "mine.py is missing"
    elif how == "path":
        document["learner"] = f"{mine}:Mine"
        message = "a file's name without its digest"
    elif how == "outside":
        document["learner"]["code"]["../../evil.py"] = "0" * 64
        message = r"names the file '\.\./\.\./evil\.py'"
    else:
        document["objective"] = {"name": "mine.py:system", "code": document["learner"]["code"], "command": "touch ran"}
        message = r"mine\.py:system is not defined in mine\.py"
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CodeError, match=message):
        load(folder, trust_remote_code=True)


def test_files_of_one_name_do_not_meet(mine, tmp_path):
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    shutil.copy(tmp_path / "helper.py", other.parent)
    other.write_text(MINE.replace("x + scale", "x - scale"))
    a, b = model(learner=f"{mine}:Mine"), model(learner=f"{other}:Mine", objective=f"{mine}:loss")
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    assert not torch.equal(logits(a), logits(b))
    assert torch.equal(logits(load(tmp_path / "a")), logits(a))
    assert torch.equal(logits(load(tmp_path / "b")), logits(b))
    (tmp_path / "helper.py").write_text("scale = 0.25\n")  # a neighbour's change makes another bundle
    assert df.learners.build(f"{mine}:Mine") != df.learners.build(a.config.learner)


def test_a_class_stands_for_its_file(mine, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    from mine import Mine  # pyright: ignore[reportMissingImports]

    config = df.DualformConfig(**SIZES, learner=Mine)
    assert config.learner == df.DualformConfig(**SIZES, learner=f"{mine}:Mine").learner
    assert df.DualformConfig(**SIZES, learner=partial(Mine, rank=3)).learner["rank"] == 3
    with pytest.raises(ValueError, match=r"Pass Mine, not Mine\(8\); the head width is dim / heads = 8"):
        df.DualformConfig(**SIZES, learner=Mine(8))
    mine.write_text(MINE.replace("x + scale", "x - scale"))
    with pytest.warns(UserWarning, match=r"mine\.py is not what it was when Mine was imported"):
        model(learner=Mine).save_pretrained(tmp_path / "saved")
    for name in ("mine", "helper"):
        del sys.modules[name]


def test_a_class_without_a_file(mine, tmp_path):
    class Typed(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.W = nn.Parameter(torch.eye(dim))

        def forward(self, x):
            return x @ self.W

    lm = model(learner=Typed)
    assert lm.config.learner == df.DualformConfig(**SIZES, learner=Typed).learner
    with pytest.warns(UserWarning, match="made inside a function.*Move it to one.*learner=NAME"):
        lm.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(lm))
    document = json.loads((tmp_path / "saved" / "config.json").read_text())
    document["learner"]["code"] = {"": "of another session"}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(document))
    with pytest.raises(CodeError, match="made in a session"):
        load(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", learner=Typed)), logits(lm))


def test_a_pickle_is_read_in_another_process(mine, tmp_path):
    lm = model(learner=f"{mine}:Mine")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((lm, logits(lm))))
    code = f"import pickle, torch; a, b = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
    code += "with torch.no_grad(): assert torch.equal(a(torch.arange(26).reshape(2, 13) * 7 % 250 + 3).logits, b)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


wrong = {
    "learner": {
        "nowhere.py:Mine": r"there is no file .*nowhere\.py",
        "mime.py:Mine": "Did you mean 'mine.py'",
        "mine.py:Mne": "mine.py has no 'Mne'. Did you mean 'Mine'",
        "mine.py": "Write mine.py:",
        "mine.py:number": "mine.py:number is a int; expected a class or function of the head width",
        "mine.py:built": r"mine.py:built is a built Mine; .*Pass Mine, not Mine\(",
        "mine.py:Plain": "a class that is no nn.Module",
        "mine.py:nothing": "mine.py:nothing takes .*; expected NAME",
        "mine.py:needs": "missing a required argument: 'width'",
        "mine.py:system": "not defined in mine.py",
        "broken.py:Mine": "broken.py:2 is not Python",
        "raises.py:Mine": r"raises\.py:3: 1 / 0 raises ZeroDivisionError",
        "above.py:Mine": "above.py:1 imports from a folder above it",
        "package.py:Mine": "package.py:1 imports 'inside'",
        "lacks.py:Mine": "No module named 'nowhere_at_all'",
        "not-a-name.py:Mine": "not-a-name.py",
    },
    "objective": {
        "mine.py:nothing": "made a NoneType",
        "mine.py:number": "is a int",
        "mine.py:built": "is a built Mine",
    },
    "rule": {"mine.py:loss": "missing a required argument", "mine.py:nothing": "is a NoneType; expected a df.Rule"},
}


@pytest.mark.parametrize(("name", "given"), [(name, given) for name in wrong for given in wrong[name]])
def test_what_is_wrong_is_said(mine, monkeypatch, tmp_path, capfd, name, given):
    monkeypatch.chdir(tmp_path)
    files = {
        "broken": "\nclass Mine(:\n", "raises": "\n\n1 / 0\n", "above": "from ..x import y\n", "package": "import inside\n",
        "lacks": "import nowhere_at_all\n", "not-a-name": "class Mine: pass\n",
    }  # fmt: skip
    for stem, text in files.items():
        (tmp_path / f"{stem}.py").write_text(text)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "__init__.py").touch()
    with pytest.raises(CatalogueError, match=wrong[name][given]):
        df.DualformConfig(**SIZES, **{name: given})
    assert main(["train", "--data", "nowhere", "--set", f"model.{name}={given}"]) != 0
    assert "Traceback" not in capfd.readouterr().err


def test_unknown_options_are_near_something(mine):
    with pytest.raises(CodeError, match=r"unknown option 'rnk'\. Did you mean 'rank'"):
        df.learners.build((f"{mine}:Mine", {"rnk": 3}))


def test_a_run_goes_on_with_the_files_that_it_began_with(mine, monkeypatch, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    monkeypatch.chdir(tmp_path)
    sizes = {key: value for key, value in SIZES.items() if key != "preset"} | {"num_hidden_layers": 1}
    own = {"preset": "tiny-ttt-linear", "data": str(text), "seq_len": 16, "batch_size": 2, "save_steps": 1}
    settings = Settings(**own, output="run", max_steps=2, model=sizes | {"learner": "mine.py:Mine"})
    train(settings, quiet=True)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["model"]["learner"]["code"].keys() == {
        "mine.py", "helper.py"
    }  # fmt: skip
    for verb in (
        ["evaluate", "run"],
        ["generate", "run", "--prompt", "a", "--max-new-tokens", "2"],
        ["explain", "run"],
    ):
        assert main(verb) == 0
    shutil.rmtree("run/model")
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree("run/checkpoints/checkpoint-2")
    mine.write_text(MINE.replace("0.3", "0.2"))
    capfd.readouterr()
    assert main(["train", "--resume", "--output", "run", "--set", "model.learner=mine.py:Mine"]) == 2
    assert "model.learner.code.mine.py is" in capfd.readouterr().err
    stranger(monkeypatch, tmp_path / "another")
    assert main(["train", "--resume", "--output", "run"]) == 2
    assert "--trust-code" in capfd.readouterr().err
    assert main(["train", "--resume", "--output", "run", "--trust-code"]) == 0
    assert "code of the run runs: mine.py:Mine" in capfd.readouterr().err
    stranger(monkeypatch)
    for verb in (
        ["evaluate", "run"],
        ["generate", "run", "--prompt", "a", "--max-new-tokens", "2"],
        ["explain", "run"],
    ):
        assert main(verb) == 2
        assert "--trust-code" in capfd.readouterr().err
        assert main([*verb, "--trust-code"]) == 0
        stranger(monkeypatch)
    path = tmp_path / "run" / "settings.json"
    document = json.loads(path.read_text())
    document["model"]["learner"] = "mine.py:Mine"
    path.write_text(json.dumps(document))
    assert main(["train", "--resume", "--output", "run", "--trust-code"]) == 2
    assert "a file's name without its digest" in capfd.readouterr().err


def test_bench_and_toml_take_a_file(mine, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "cpu", "--learner", "mine.py:Mine", "--length", "8", "--rounds", "1", "--dim", "8"]) == 0
    assert "mine.py:Mine" in capfd.readouterr().out
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    rows = "".join(f"{key} = {value}\n" for key, value in SIZES.items() if key != "preset")
    (tmp_path / "run.toml").write_text(
        'preset = "tiny-ttt-linear"\ndata = "text.txt"\nmax_steps = 1\nseq_len = 16\nbatch_size = 2\noutput = "toml"\n'
        f'[model]\n{rows}learner = {{name = "mine.py:Mine", rank = 3}}\nobjective = "mine.py:loss"\n'
    )
    assert main(["train", "run.toml"]) == 0
    config = df.DualformConfig.from_pretrained(tmp_path / "toml" / "model")
    assert (config.learner["rank"], config.objective["name"]) == (3, "mine.py:loss")

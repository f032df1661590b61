"""A run's folder: it says what it is, goes on to the same numbers after any kill; no other file is ever lost."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualform.cli import main
from dualform.models import DualformConfig, DualformForCausalLM
from dualform.train.run import claim, damage, expect_only_a_run, newest_whole, remove_run, steps
from dualform.train.settings import Settings, SettingsError
from dualform.train.training import WatchedTrainer, train

small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# 11 batches an epoch, the last one of one row; lines of the log tell of two steps, and most checkpoints part such a
# pair.
chosen = {"preset": "tiny-attention", "max_steps": 24, "seq_len": 16, "batch_size": 2, "save_steps": 5, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Bit for bit is promised on one device; where there is a GPU,
    Trainer would train there and a model from a file score here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that tests start
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"the quick brown fox jumps over lazy dog {n}\n" for n in range(8)))
    return path


def settings(folder, text, **given):
    return Settings(**{**chosen, "model": small, "data": str(text), "output": str(folder), **given})


def cut(at, folder, text, **given):
    """Leave a run as one that went away in the midst of a step."""
    real = WatchedTrainer.training_step

    def breaks(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            raise RuntimeError("power cut")
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedTrainer, "training_step", breaks)
        with pytest.raises(RuntimeError, match="power cut"):
            train(settings(folder, text, **given), quiet=True)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    """A run that nothing disturbed."""
    return train(settings(tmp_path_factory.mktemp("straight") / "run", text), quiet=True).folder


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, text):
    """The same run, gone at step 13: its checkpoints are those of steps 5 and 10."""
    return cut(13, tmp_path_factory.mktemp("cut") / "run", text)


@pytest.fixture
def run(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "run")


def held(folder):
    """Everything in a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(capfd, *words):
    status = main([str(word) for word in words])
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    return status, told.out, told.err


def expect_same(folder, straight):
    """Law: weights, losses, the optimiser and the score are those of the run that nothing disturbed, bit for bit."""
    assert (folder / "model" / "model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, straight))
    lines = [[line for line in metrics["history"] if "loss" in line] for metrics in (ours, theirs)]
    assert lines[0] == lines[1]
    for name in ("step", "interrupted", "train_loss", "parameters"):
        assert ours[name] == theirs[name], name
    for name in ("loss", "bits_per_byte", "num_bytes", "loss_by_position"):
        assert ours["held_out"][name] == theirs["held_out"][name], name
    a, b = (torch.load(next(reversed(steps(path).values())) / "optimizer.pt") for path in (folder, straight))
    assert str(a["param_groups"]) == str(b["param_groups"])
    for key, state in b["state"].items():
        assert all(torch.equal(a["state"][key][name], value) for name, value in state.items())


# -- a run goes on as what it is


def test_resume_alone_goes_on_with_the_runs_own_settings(capfd, run, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # another folder than it began in
    before = (run / "settings.json").read_bytes()
    status, out, err = command(capfd, "train", "--resume", "--output", "run")
    assert status == 0, err
    assert "run goes on after step 10 of 24" in err
    assert "tiny-attention" in out
    assert (run / "settings.json").read_bytes() == before
    expect_same(run, straight)
    assert not list(run.rglob(".new"))
    assert set(steps(run)) == {20, 24}


def test_what_is_given_beside_resume_may_be_what_the_run_is(capfd, run, straight, text, tmp_path):
    config = tmp_path / "run.toml"
    moved = shutil.copy(text, tmp_path / "moved.txt")
    config.write_text('preset = "Tiny_Attention"\nseed = 3\n[model]\nhidden_size = 16\nrule = {lr = 0.1}\n')
    same = ["--data", moved, "--max-steps", 24, "--learning-rate", "0.005", "--set", "model.num_hidden_layers=1"]
    status, _, err = command(capfd, "train", config, "--resume", "--output", run, *same)
    assert status == 0, err
    expect_same(run, straight)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seq-len", "32"], "seq_len is 32 here and 16 in"),
        (["--max-steps", "48"], "max_steps is 48 here and 24 in"),
        (["--batch-size", "4", "--seed", "9"], "batch_size is 4 here and 2 in"),
        (["--seed", "9"], "seed is 9 here and 3 in"),
        (["--learning-rate", "0.1"], "learning_rate is 0.1 here and 0.005 in"),
        (["--preset", "tiny-ttt-mlp"], "preset is 'tiny-ttt-mlp' here and 'tiny-attention' in"),
        (["--set", "save_steps=7"], "save_steps is 7 here and 5 in"),
        (["--set", "model.hidden_size=32"], "model.hidden_size is 32 here and 16 in"),
        (["--set", "model.rule.lr=0.5"], "model.rule.lr is 0.5 here and 0.1 in"),
        (["--set", "model.learner={name='linear'}"], "model.learner.name is 'Linear' here and"),
        (["--data", "shakespeare"], "data is 'shakespeare' here, SHA-256 "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_contradiction_is_named_before_anything_is_written(capfd, run, words, told):
    before = held(run)
    status, out, err = command(capfd, "train", "--resume", "--output", run, *words)
    assert (status, out) == (2, "")
    assert told in err
    assert "settings.json" in err
    assert "name another --output" in err
    assert held(run) == before
    assert not (run / "model").exists()


def test_a_text_that_changed_or_went_away_is_named(capfd, run, text, tmp_path):
    document = json.loads((run / "settings.json").read_text())
    other = tmp_path / "other.txt"
    (run / "settings.json").write_text(json.dumps(document | {"data": str(other)}))
    for words, status, told in (
        (
            [],
            1,
            f"{other} does not exist; expected a file, a folder, or 'shakespeare'. {run} was made with it: pass --data",
        ),
        (["--data", tmp_path / "nowhere"], 1, "nowhere does not exist"),
    ):
        got, _, err = command(capfd, "train", "--resume", "--output", run, *words)
        assert got == status
        assert told in err
    other.write_text(text.read_text() + "and more\n" * 9)
    before = held(run)
    for verb in (["train", "--resume", "--output", run], ["train", "--resume", "--output", run, "--data", other]):
        got, _, err = command(capfd, *verb)
        assert got == 2
        assert f"{other} has changed since" in err or "SHA-256" in err
        assert document["text"][:12] in err
    assert held(run) == before


def test_a_folder_without_readable_settings_is_named(capfd, run):
    path = run / "settings.json"
    whole = json.loads(path.read_text())
    for content, told in (
        ("", "settings.json cannot be read"),
        ("[]", "holds no settings of a run"),
        ('{"editor.fontSize": 3}', "holds no settings of a run"),
        (json.dumps(whole | {"momentum": 1}), r"has the settings ['momentum'], which this version does not know"),
        (json.dumps(whole | {"seed": "x"}), "seed is 'x'; expected a value of type int"),
    ):
        path.write_text(content)
        status, _, err = command(capfd, "train", "--resume", "--output", run)
        assert (status, told in err) == (2, True), err
    path.unlink()
    status, _, err = command(capfd, "train", "--resume", "--output", run)
    assert (status, "is no run: it holds no settings.json" in err) == (2, True), err


def test_a_checkpoint_of_another_model_is_refused(capfd, run):
    """What a checkpoint lacks would be drawn anew without a word."""
    path = run / "settings.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"model": small | {"num_hidden_layers": 2}}))
    status, _, err = command(capfd, "train", "--resume", "--output", run)
    assert status == 2
    assert "num_hidden_layers is 2 by the run's settings and 1 in" in err


def test_a_finished_run_takes_no_further_step(capfd, straight, tmp_path, monkeypatch):
    finished = shutil.copytree(straight, tmp_path / "run")

    def refuse(*args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(WatchedTrainer, "training_step", refuse)
    before = held(finished)
    for gone in (None, "checkpoints"):
        if gone:
            shutil.rmtree(finished / gone)
            before = held(finished)
        status, out, err = command(capfd, "train", "--resume", "--output", finished, "--json")
        assert status == 0, err
        assert "is finished, 24 of 24 steps; nothing is left to do" in err
        assert json.loads(out)[0]["steps"] == 24
        assert held(finished) | {"loss_by_position.png": b""} == before | {"loss_by_position.png": b""}


@pytest.mark.parametrize("gone", [["model"], ["metrics.json"], ["model", "metrics.json"], ["model/config.json"]])
def test_a_run_that_went_away_before_it_was_scored_is_scored(straight, text, tmp_path, monkeypatch, gone):
    finished = shutil.copytree(straight, tmp_path / "run")
    for path in (finished / name for name in gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(WatchedTrainer, "training_step", None)
    outcome = train(settings(finished, text), resume=True, quiet=True)
    assert (outcome.step, outcome.train_tokens_per_second) == (24, None)
    expect_same(finished, straight)


def test_the_speed_of_a_run_that_went_on_counts_its_own_steps(run, text, monkeypatch):
    real = WatchedTrainer.train

    def timed(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        result.metrics["train_runtime"] = 7.0
        return result

    monkeypatch.setattr(WatchedTrainer, "train", timed)
    assert train(settings(run, text), resume=True, quiet=True).train_tokens_per_second == (24 - 10) * 2 * 16 / 7.0


# -- what is not whole is passed over


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES = {
    "no trainer_state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no rng": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no losses": (lambda c: (c / "losses.json").unlink(), "losses.json is missing"),
    "cut optimizer": (lambda c: truncate(c / "optimizer.pt", 4096), "optimizer.pt has 4,096 of "),
    "cut weights": (lambda c: truncate(c / "model.safetensors", 999), "model.safetensors has 999 of "),
    "empty config": (lambda c: truncate(c / "config.json", 0), "config.json has 0 of "),
    "one bit": (lambda c: garble(c / "model.safetensors"), "model.safetensors is not what was written"),
    "another step's": (
        lambda c: shutil.copy(c.with_name("checkpoint-5") / "trainer_state.json", c),
        "trainer_state.json ",
    ),
    "a copied checkpoint": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("checkpoint-5"), c)),
        "it is of step 5",
    ),
    "no seal": (lambda c: (c / "files.json").unlink(), "it has no files.json, which is written last"),
    "empty seal": (lambda c: truncate(c / "files.json", 0), "files.json cannot be read"),
    "no files in it": (lambda c: (shutil.rmtree(c), c.mkdir()), "it has no files.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(run, name):
    break_it, why = DAMAGES[name]
    break_it(run / "checkpoints" / "checkpoint-10")
    found, passed = newest_whole(run)
    assert found == run / "checkpoints" / "checkpoint-5"
    assert list(passed) == ["checkpoint-10"]
    assert why in passed["checkpoint-10"]


def test_resume_takes_the_newest_whole_one_and_says_so(capfd, run, straight):
    truncate(run / "checkpoints" / "checkpoint-10" / "optimizer.pt", 100)
    status, _, err = command(capfd, "train", "--resume", "--output", run)
    assert status == 0, err
    assert "checkpoint-10 is not whole (optimizer.pt has 100 of " in err
    assert "goes on after step 5 of 24" in err
    expect_same(run, straight)


def test_without_a_whole_one_each_is_named_and_nothing_is_touched(capfd, run):
    for step, name in ((5, "rng_state.pth"), (10, "optimizer.pt")):
        (run / "checkpoints" / f"checkpoint-{step}" / name).unlink()
    before = held(run)
    status, _, err = command(capfd, "train", "--resume", "--output", run)
    assert status == 2
    assert "checkpoint-10: optimizer.pt is missing; checkpoint-5: rng_state.pth is missing" in err
    assert "Begin again in another --output" in err
    assert held(run) == before


# -- the same numbers, whenever it is killed

SERVER = """
import json, os, random, signal, sys, time
from dualform.train.training import train
from dualform.train.settings import Settings

def child(job):
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    seen, folder = 0, job["settings"]["output"]
    def hook(event, args):  # before each file of the run is opened, made, renamed or removed
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(args[0]).startswith(folder):
            seen += 1
            if seen == job.get("at"):
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train(Settings(**job["settings"]), resume=job["resume"], quiet=True)
    if "count" in job:
        open(job["count"], "w").write(str(seen))
    os._exit(0)

for line in sys.stdin:
    job = json.loads(line)
    process = os.fork()
    if process == 0:
        try:
            child(job)
        finally:
            os._exit(1)
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps(status), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything once, and forks for each job."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:

        def do(folder, text, resume=False, **how):
            job = {"settings": settings(folder, text).to_dict(), "resume": resume, **how}
            it.stdin.write(json.dumps(job) + "\n")
            it.stdin.flush()
            return json.loads(it.stdout.readline())

        yield do
        it.stdin.close()


def go_on(server, folder, text):
    """What whoever started the run would do after it was killed: go on, or begin if nothing was saved."""
    return server(folder, text, resume=bool(steps(folder)))


def test_a_killed_run_goes_on_to_the_same_numbers(server, tmp_path, text, straight):
    count = tmp_path / "count"
    assert server(tmp_path / "whole", text, count=str(count)) == 0
    expect_same(tmp_path / "whole", straight)
    total = int(count.read_text())
    assert total > 100
    # Most of these fall into the saving of a checkpoint or of the model; the last ones after it.
    moments = [{"at": 1 + (2 * n + 1) * total // 10} for n in range(5)] + [{"at": total - 2}, {"seconds": 0.25}]
    for n, moment in enumerate(moments):
        folder = tmp_path / f"killed-{n}"
        assert server(folder, text, **moment) == -signal.SIGKILL
        for path in steps(folder).values():
            assert damage(path) is None, f"{moment}: {path.name} is there and not whole"
        assert go_on(server, folder, text) == 0, moment
        expect_same(folder, straight)


def test_a_run_killed_again_and_again_arrives(server, tmp_path, text, straight):
    for at in (60, 130, 90, 17):
        server(tmp_path / "run", text, resume=bool(steps(tmp_path / "run")), at=at)
    assert go_on(server, tmp_path / "run", text) == 0
    expect_same(tmp_path / "run", straight)


@pytest.mark.parametrize("at", [1, 6, 11, 23])
def test_ctrl_c_and_resume_are_the_same_numbers(tmp_path, text, straight, at):
    real = WatchedTrainer.training_step

    def pressed(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedTrainer, "training_step", pressed)
        assert train(settings(tmp_path / "run", text), quiet=True).step == at
    train(settings(tmp_path / "run", text), resume=True, quiet=True)
    expect_same(tmp_path / "run", straight)


def test_test_time_layers_go_on_to_the_same_numbers(tmp_path, text):
    given = {"preset": "tiny-ttt-linear", "max_steps": 6, "save_steps": 2, "rate_start": 0.25, "rate_warmup_steps": 5}
    given |= {"model": small | {"chunk": 4}}
    straight = train(settings(tmp_path / "straight", text, **given), quiet=True).folder
    cut(4, tmp_path / "run", text, **given)
    train(settings(tmp_path / "run", text, **given), resume=True, quiet=True)
    expect_same(tmp_path / "run", straight)


def test_what_is_saved_is_a_model_that_generates_with_its_cache(straight):
    for folder in (straight / "model", straight / "checkpoints" / "checkpoint-24"):
        assert DualformConfig.from_pretrained(folder).use_cache is True
        assert DualformForCausalLM.from_pretrained(folder).generation_config.use_cache in (None, True)


def test_a_disk_that_is_full_leaves_what_was_saved(capfd, run, straight, monkeypatch):
    real = torch.save
    for error in (RuntimeError("[enforce fail at inline_container.cc] . unexpected pos"), OSError(28, "No space left")):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(torch, "save", full)
        status, _, err = command(capfd, "train", "--resume", "--output", run)
        assert status == 1
        assert "the checkpoint of step 15 cannot be written to" in err
        assert set(steps(run)) == {5, 10}
    monkeypatch.setattr(torch, "save", real)
    assert command(capfd, "train", "--resume", "--output", run)[0] == 0
    expect_same(run, straight)


# -- nobody else's file is lost


@pytest.mark.parametrize("what", ["a file", "a folder", "hidden", "a settings.json", "no folder"])
def test_a_folder_of_someone_elses_is_refused_as_it_is(capfd, tmp_path, text, what):
    folder = tmp_path / "mine"
    if what == "no folder":
        folder.write_text("mine")
    else:
        folder.mkdir()
        place = {"a file": "notes.txt", "a folder": "sub/notes.txt", "hidden": ".notes"}.get(what, "settings.json")
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text('{"editor": 1}')
    before = held(tmp_path)
    status, out, err = command(capfd, "train", "--preset", "tiny-attention", "--data", text, "--output", folder)
    assert (status, out) == (2, "")
    assert "train: " in err
    assert str(folder) in err
    assert held(tmp_path) == before
    with pytest.raises(SettingsError):
        claim(folder)


def test_a_run_that_never_saved_may_begin_again(tmp_path, text, straight):
    cut(3, tmp_path / "run", text)
    with pytest.raises(SettingsError, match="no checkpoint in"):
        train(settings(tmp_path / "run", text), resume=True, quiet=True)
    train(settings(tmp_path / "run", text), quiet=True)
    expect_same(tmp_path / "run", straight)


def test_what_someone_laid_into_a_run_stays(run, text, straight):
    """Into a checkpoint that would go, into one that is not whole and is written again, into the model."""
    notes = [
        run / "checkpoints" / "checkpoint-5" / "notes.txt",
        run / "checkpoints" / "checkpoint-10" / "sub" / "notes",
    ]
    notes += [run / "model" / "notes.txt", run / "checkpoints" / "notes.txt"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (run / "model" / "link").symlink_to(text)
    truncate(run / "checkpoints" / "checkpoint-10" / "optimizer.pt", 10)
    train(settings(run, text), resume=True, quiet=True)
    assert [path.read_text() for path in notes] == ["mine"] * 4
    assert (run / "model" / "link").readlink() == text
    expect_same(run, straight)


def test_a_folder_that_was_being_replaced_comes_back(run, text, straight):
    """A kill between the two renames leaves the old folder in the workshop only."""
    work = run / ".new" / "before"
    work.mkdir(parents=True)
    (work / "model").mkdir()
    (work / "model" / "notes.txt").write_text("mine")
    train(settings(run, text), resume=True, quiet=True)
    assert (run / "model" / "notes.txt").read_text() == "mine"
    expect_same(run, straight)


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo_folder(straight, tmp_path):
    """What a demo leaves."""
    for name in ("tiny-attention", "tiny-ttt-mlp"):
        shutil.copytree(straight, tmp_path / "demo" / name)
    (tmp_path / "demo" / "loss_by_position.png").write_bytes(b"a picture")
    return tmp_path / "demo"


def test_the_demo_removes_what_a_demo_left(demo_folder, tmp_path):
    module = load_demo()
    module.clear(demo_folder)
    assert held(demo_folder) == {"loss_by_position.png": b"a picture"}
    module.clear(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    module.clear(tmp_path / "empty")
    assert (tmp_path / "empty").is_dir()


FOREIGN = [
    "notes.txt", "tiny-attention/notes.txt", "tiny-ttt-mlp/model/notes.txt", "tiny-attention/checkpoints/notes.txt",
    "tiny-attention/checkpoints/checkpoint-24/notes.txt", "tiny-ttt-mlp/checkpoints/checkpoint-2/notes.txt", "sub/x",
    ".x",
]  # fmt: skip


@pytest.mark.parametrize("place", FOREIGN)
def test_the_demo_refuses_a_folder_that_is_not_its_own(demo_folder, monkeypatch, place):
    (demo_folder / place).parent.mkdir(exist_ok=True)
    (demo_folder / place).write_text("mine")
    expect_refused(demo_folder, monkeypatch)


def test_the_demo_refuses_what_only_looks_like_its_own(demo_folder, monkeypatch, tmp_path):
    for path in (
        tmp_path / "a file",
        tmp_path / "pictures" / "loss_by_position.png",
        tmp_path / "named" / "tiny-attention" / "x",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        expect_refused(path if path.name == "a file" else tmp_path / path.relative_to(tmp_path).parts[0], monkeypatch)
    weights = demo_folder / "tiny-ttt-mlp" / "model" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)  # trained on by someone
    expect_refused(demo_folder, monkeypatch)
    other = demo_folder.rename(tmp_path / "other")
    demo_folder.mkdir()
    (demo_folder / "tiny-attention").symlink_to(other / "tiny-attention")
    expect_refused(demo_folder, monkeypatch)
    with pytest.raises(SettingsError):
        remove_run(demo_folder / "tiny-attention")
    expect_only_a_run(other / "tiny-attention")


def expect_refused(folder, monkeypatch):
    module, before = load_demo(), held(folder.parent)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "1", "--output", str(folder)])
    with pytest.raises(SettingsError, match=r"is not the demo's|is no run|is not what a run wrote"):
        module.main()
    assert held(folder.parent) == before


# -- a run is scored as what it is


def test_evaluate_scores_the_runs_own_text_by_its_own_settings(capfd, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = json.loads((straight / "metrics.json").read_text())["held_out"]
    for folder in (straight, straight / "model", straight / "checkpoints" / "checkpoint-24"):
        status, out, err = command(capfd, "evaluate", folder, "--json")
        assert status == 0, err
        row = json.loads(out)[-1]
        assert (row["bits per byte"], row["loss"], row["bytes"]) == tuple(
            metrics[name] for name in ("bits_per_byte", "loss", "num_bytes")
        )
    monkeypatch.chdir(straight / "model")
    assert json.loads(command(capfd, "evaluate", ".", "--json")[1])[-1]["loss"] == metrics["loss"]


def test_evaluate_may_score_another_text_and_says_when_it_would(capfd, straight, text, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("pack my box with five dozen liquor jugs\n" * 20)
    status, out, _ = command(capfd, "evaluate", run, "--data", other, "--seq-len", "8", "--batch-size", "3")
    assert (status, "held-out part of" in out, "other.txt" in out) == (0, True, True)
    document = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(document | {"data": str(other)}))
    status, _, err = command(capfd, "evaluate", run)
    assert status == 2
    assert f"the text {other} has changed since {run} was made with it" in err
    other.unlink()
    status, _, err = command(capfd, "evaluate", run)
    assert (status, f"{run} was made with it: pass --data" in err) == (1, True), err
    for words in (["--seq-len", "0"], ["--batch-size", "-1"], ["--seq-len", "1"]):
        status, _, err = command(capfd, "evaluate", run, "--data", text, *words)
        assert (status, f"is {words[1]}; expected" in err) == (2, True), err


def test_evaluate_on_no_text_is_named(capfd, straight):
    status, out, err = command(capfd, "evaluate", straight, "--data", "")
    assert (status, out) == (1, "")
    assert "data is ''; expected a file, a folder, or 'shakespeare'" in err


def test_evaluate_of_a_run_without_a_model_names_its_checkpoint(capfd, run, text):
    status, _, err = command(capfd, "evaluate", run)
    assert status == 2
    assert f"`train --resume` ends the run; or pass {run / 'checkpoints' / 'checkpoint-10'}" in err
    assert command(capfd, "evaluate", run / "checkpoints" / "checkpoint-10")[0] == 0


# -- whatever else is mistaken is one line

MISTAKES = {
    "--seed -1": (2, "seed is -1; expected a whole number, 0 <= seed < 2**32"),
    "--seed 4294967296": (2, "seed is 4294967296; expected"),
    "--learning-rate nan": (2, "learning_rate is nan; expected a finite number"),
    "--learning-rate inf": (2, "learning_rate is inf; expected a finite number"),
    "--set weight_decay=-1": (2, "weight_decay is -1; expected a number >= 0"),
    "--set warmup_steps=-2": (2, "warmup_steps is -2; expected a whole number >= 0"),
    "--seq-len 1": (2, "seq_len is 1; expected a whole number >= 2, a token and the next"),
    "--set model.chunk=abc": (2, "chunk is 'abc'; expected a value of type int"),
    "--set model.hidden_size=1.5": (2, "hidden_size is 1.5; expected a value of type int"),
    "--set model.chunk=2020-01-01": (2, "chunk is datetime.date(2020, 1, 1); expected a value of type int"),
    "--set model.learner=3": (2, "learner"),
    "--set model=3": (2, "model is 3; expected a table"),
    "--data /proc/self/mem": (1, "/proc/self/mem cannot be read"),
    "--set data=3": (2, "data is 3; expected a value of type str"),
    "--data ": (1, "data is ''; expected a file, a folder, or 'shakespeare'"),
    "--set data=": (1, "data is ''; expected"),
    "--set seed=1\nmax_steps=9": (2, "seed is '1\\nmax_steps=9'; expected a value of type int"),
    "--set model.dtype=bfloat16": (2, "the model has no field 'dtype'"),
    "--set model.return_dict=false": (2, "the model has no field 'return_dict'"),
    "--set model.output_hidden_states=true": (2, "the model has no field 'output_hidden_states'"),
    "--set model.bos_token_id=7": (2, "model.bos_token_id is 7; expected 1, that of the tokenizer of bytes"),
    "--set model.eos_token_id=[2, 5]": (2, "model.eos_token_id is [2, 5]; expected 2"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(capfd, tmp_path, text, words):
    status, told = MISTAKES[words]
    given = ["--preset", "tiny-ttt-linear", "--output", tmp_path / "run", "--max-steps", "1"]
    given += [] if "data" in words else ["--data", text]
    got, out, err = command(capfd, "train", *given, *words.split(" ", 1))
    assert (got, out) == (status, ""), err
    assert told in err
    assert not (tmp_path / "run").exists()

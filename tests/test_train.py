"""Training: every byte once, metrics that can be checked by hand, runs that resume, stop and fail cleanly."""

import gzip
import json
import math
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from dualform.models import DualformConfig, DualformForCausalLM
from dualform.train import data, metrics, training
from dualform.train.data import (
    BEGIN,
    END,
    OFFSET,
    CorpusError,
    Document,
    PackedRows,
    byte_tokenizer,
    held_out_plays,
    load_corpus,
    plain_text,
)
from dualform.train.metrics import baselines, evaluate, plot_loss_by_position, smoothed, terminal_plot
from dualform.train.settings import Settings, SettingsError, asked
from dualform.train.training import TrainingDiverged, WatchedTrainer, train
from dualform.train.warmup import set_rate_scale

small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def settings(tmp_path, text, **given):
    chosen = {
        "preset": "tiny-attention",
        "max_steps": 4,
        "seq_len": 16,
        "batch_size": 2,
        "save_steps": 2,
        "model": small,
    }
    return Settings(**{"data": str(text), "output": str(tmp_path / "run"), **chosen, **given})


def test_the_embedded_plays():
    corpus = load_corpus("shakespeare")
    assert len(corpus.train) + len(corpus.test) == 38
    assert tuple(d.name for d in corpus.test) == held_out_plays
    assert not {d.name for d in corpus.train} & set(held_out_plays)
    everything = b"".join(d.text for d in corpus.train + corpus.test)
    assert 4_500_000 < len(everything) < 5_500_000
    assert not set(b"*_#\\") & set(everything)
    assert corpus.test[0].text.startswith(b"Macbeth\n\nACT I\n")


def test_plain_text_keeps_every_word():
    assert plain_text("# Hamlet\n**A**  \nWho's _there_?\n") == "Hamlet\nA\nWho's there?\n"


def test_files_and_folders(tmp_path, text):
    one = load_corpus(str(text))
    assert one.train[0].text + one.test[0].text == text.read_bytes()
    assert 0.08 < len(one.test[0].text) / text.stat().st_size < 0.12
    assert one.train[0].text.endswith(b"\n")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for n in range(12):
        (folder / "sub" / f"{n:02}.txt").write_text(f"text {n}")
    (folder / ".hidden").write_text("no")
    (folder / "empty.txt").write_text("")
    many = load_corpus(str(folder))
    assert [len(many.train), len(many.test)] == [11, 1]
    assert many.test[0].text == b"text 11"


@pytest.mark.parametrize("content", ["", " \n"], ids=["empty", "blank"])
def test_an_empty_corpus_is_named(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(CorpusError, match=r"a\.txt holds no text"):
        load_corpus(str(tmp_path / "a.txt"))
    with pytest.raises(CorpusError, match="does not exist; expected a file"):
        load_corpus(str(tmp_path / "b.txt"))


def test_an_unreadable_corpus_is_named(tmp_path, monkeypatch, text):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(text), "read_bytes", refuse)
    with pytest.raises(CorpusError, match=r"text\.txt cannot be read \(Permission denied\)"):
        load_corpus(str(text))


@pytest.mark.parametrize("seq_len", [2, 5, 16, 1000])
def test_every_token_is_predicted_exactly_once(seq_len):
    documents = (Document("a", b"hello"), Document("b", "wörld".encode()), Document("c", bytes(range(256))))
    rows = PackedRows(documents, seq_len, keep_rest=True)
    predicted = [int(x) for i in range(len(rows)) for x in rows[i]["labels"][1:] if x != -100]
    stream = [x for d in documents for x in (*(b + OFFSET for b in d.text), END)]
    assert predicted == stream
    for i in range(len(rows)):
        row = rows[i]
        assert torch.equal(row["reset"][1:], row["input_ids"][1:] == BEGIN)
        assert not row["reset"][0]
        assert [x.shape for x in row.values()] == [(seq_len,)] * 3
    if len(rows) > 1:
        assert len(PackedRows(documents, seq_len)) in (len(rows), len(rows) - 1)


def test_a_text_shorter_than_one_row_is_named():
    with pytest.raises(CorpusError, match=r"the text has 7 tokens .* at least seq_len = 8"):
        PackedRows((Document("a", b"hello"),), 8)
    with pytest.raises(CorpusError, match="seq_len is 1; expected >= 2"):
        PackedRows((Document("a", b"hello"),), 1)


def test_the_tokenizer_is_bytes_plus_three(tmp_path):
    tokenizer = byte_tokenizer()
    text = "To be, or nöt\tto be —\n\n 'tis   x\x00"
    ids = tokenizer(text)["input_ids"]
    assert ids == [b + OFFSET for b in text.encode()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, END], skip_special_tokens=True) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (259, 0, 1, 2)


def test_baselines_by_hand():
    train_text, test_text = (Document("a", b"abab"),), (Document("b", b"aab"),)
    got = baselines(train_text, test_text, smoothing=1.0)
    a = b = 3 / 260  # two of each among four, and one more for each of 256
    assert got["unigram"] == pytest.approx(-(2 * math.log2(a) + math.log2(b)) / 3)
    # from a: b twice; "aab" has a->a (1 of 258) and a->b (3 of 258), and its first byte from the unigram
    assert got["bigram"] == pytest.approx(-(math.log2(a) + math.log2(1 / 258) + math.log2(3 / 258)) / 3)
    assert got["gzip -9"] == 8 * len(gzip.compress(b"aab", 9, mtime=0)) / 3


class Uniform(nn.Module):
    """Give every token the same probability."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, reset, use_cache):
        return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 259)})


def test_evaluate_counts_bytes_and_positions():
    rows = PackedRows((Document("a", bytes(range(100))),), 17, keep_rest=True)
    got = evaluate(Uniform(), rows, batch_size=4)
    assert got.num_bytes == 100
    assert got.loss == pytest.approx(math.log(259))
    assert got.bits_per_byte == pytest.approx(101 * math.log2(259) / 100)  # the end of the text is predicted too
    assert got.loss_by_position == pytest.approx([math.log(259)] * 16)
    assert evaluate(Uniform(), rows, max_rows=3).num_bytes == 48


def test_plots(tmp_path):
    curves = {"one": tuple(np.linspace(3, 2, 50)), "two": tuple(np.linspace(3, 1, 50))}
    path = plot_loss_by_position(curves, tmp_path / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "position" in terminal_plot(curves)
    assert smoothed((1.0, 3.0, 5.0), 2) == ([1, 2], [2.0, 5.0])


def test_a_run_is_whole_and_resumes_bit_for_bit(tmp_path, text):
    straight = train(settings(tmp_path, text, output=str(tmp_path / "straight")), quiet=True)
    # The same run, cut at step 2 as a machine that went away would: its settings are those of the whole.
    cut = settings(tmp_path, text)
    real = WatchedTrainer.training_step

    def breaks(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("power cut")
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedTrainer, "training_step", breaks)
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut, quiet=True)
    with pytest.raises(SettingsError, match="already holds a run"):
        train(cut, quiet=True)
    resumed = train(cut, resume=True, quiet=True)
    assert resumed.step == straight.step == 4
    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    metrics = json.loads((resumed.folder / "metrics.json").read_text())
    assert metrics["held_out"]["bits_per_byte"] == pytest.approx(resumed.evaluation.bits_per_byte)
    assert metrics["interrupted"] is False
    assert len(metrics["held_out"]["loss_by_position"]) == 15
    assert DualformForCausalLM.from_pretrained(resumed.folder / "model").config.hidden_size == 16


def test_ctrl_c_saves_and_resumes(tmp_path, text):
    real = WatchedTrainer.training_step

    def pressed(self, *args, **kwargs):
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedTrainer, "training_step", pressed)
        stopped = train(settings(tmp_path, text), quiet=True)
    assert (stopped.step, stopped.evaluation) == (1, None)
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped.folder / "checkpoints" / "checkpoint-1").is_dir()
    assert (stopped.folder / "model" / "model.safetensors").exists()
    assert json.loads((stopped.folder / "metrics.json").read_text())["interrupted"] is True
    assert train(settings(tmp_path, text), resume=True, quiet=True).step == 4


def test_a_loss_that_is_no_number_stops_at_its_step(tmp_path, text):
    real = Trainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))
        return real(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", poisoned)
        with pytest.raises(TrainingDiverged, match="the loss is nan at step 3; expected a finite number"):
            train(settings(tmp_path, text), quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


def test_bad_settings_write_nothing(tmp_path, text):
    for given, message in (
        ({"preset": "tiny-atention"}, "Did you mean 'tiny-attention'"),
        ({"model": {"hidden": 3}}, "the model has no field 'hidden'"),
        ({"model": {**small, "vocab_size": 100}}, "vocab_size is 100; expected >= 259"),
        ({"seq_len": 100_000}, "at least seq_len = 100000"),
        ({"data": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings(tmp_path, text, **given))
        assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match=r"no checkpoint in .*checkpoints to resume from"):
        train(settings(tmp_path, text), resume=True)


def test_a_folder_too_large_to_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 2**30 + 1)  # of nothing: no disk is taken
    for path in (tmp_path, tmp_path / "large.txt"):
        with pytest.raises(
            CorpusError, match=r"more than 1 GiB, with .*large.txt 1 .*expected at most 1073741824 bytes"
        ):
            load_corpus(str(path))
    monkeypatch.setattr(data, "most_bytes", 4096)
    for n in range(5):  # five of nothing weigh more than four kilobytes
        (tmp_path / f"{n}.txt").write_text("a\n")
    (tmp_path / "large.txt").unlink()
    with pytest.raises(CorpusError, match=r"a file counts 1024 bytes at least"):
        load_corpus(str(tmp_path))
    (tmp_path / "4.txt").rename(tmp_path / ".4.txt")
    assert len(load_corpus(str(tmp_path)).train) == 3


def test_rows_take_two_bytes_of_memory_a_byte_of_text():
    text = Document("a", bytes(range(256)) * 4096)
    tracemalloc.start()
    rows = PackedRows((text,), 128)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(held, most) < 2.1 * len(text.text)
    assert rows.stream[:3].tolist() == [1, 3, 4]
    assert rows.stream[-2:].tolist() == [258, 2]


def test_counts_of_pieces_are_those_of_the_whole(monkeypatch):
    texts = tuple(Document(name, name.encode() * 500 + b"end") for name in ("abc", "hello", "x"))
    right = metrics.baselines(texts, texts)
    for size in (1, 7, 500):
        monkeypatch.setattr(metrics, "_AT_ONCE", size)
        assert metrics.baselines(texts, texts) == right


def test_settings_come_from_defaults_file_assignments_and_flags(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "tiny-ttt-linear"\nmax_steps = 7\nseed = 1\n[model]\nchunk = 8\nrule = {lr = 0.5}\n')
    got = asked(file, ["model.rule.lr=0.25", "model.objective=squared", "seed=2"], {"seed": 3, "max_steps": None})
    assert Settings(**got) == Settings(
        preset="tiny-ttt-linear",
        max_steps=7,
        seed=3,
        model={"chunk": 8, "rule": {"lr": 0.25}, "objective": "squared"},
    )


@pytest.mark.parametrize(
    ("content", "assignments", "message"),
    [
        ("max_step = 3", [], "there is no setting 'max_step'. Did you mean 'max_steps'"),
        ("max_steps = ", [], "is not TOML"),
        ("max_steps = '3'", [], "max_steps is '3'; expected a value of type int"),
        ("max_steps = 0", [], "max_steps is 0; expected a whole number >= 1"),
        ("learning_rate = -1", [], "learning_rate is -1; expected a number > 0"),
        ("model = 3", [], "model is 3; expected a table"),
        ("", ["chunk"], "--set 'chunk' is no assignment"),
        ("seed = 3", ["seed.x=3"], "goes into 'seed', which is not a table"),
    ],
)
def test_bad_settings_are_named(tmp_path, content, assignments, message):
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(SettingsError, match=message):
        asked(tmp_path / "run.toml", assignments, {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml cannot be read"):
        asked(tmp_path / "none.toml", [], {})


def test_the_inner_rate_warms_up_and_ends_at_its_own(tmp_path, text):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([float(layer.mixer.rate_scale) for layer in model.model.layers])

    chosen = {"preset": "tiny-ttt-linear", "rate_start": 0.25, "rate_warmup_steps": 3, "model": {**small, "chunk": 4}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.WatchedTrainer, "__init__", add_callback(Watch()))
        outcome = train(settings(tmp_path, text, **chosen), quiet=True)
    assert seen == [[0.25], [0.5], [0.75], [1.0]]
    assert float(outcome.model.model.layers[0].mixer.rate_scale) == 1.0
    saved = DualformForCausalLM.from_pretrained(outcome.folder / "model")
    assert float(saved.model.layers[0].mixer.rate_scale) == 1.0
    # A checkpoint on the way holds its step's multiplier; resuming sets it by the step, and a run stopped there ends at
    # 1.
    half = DualformForCausalLM.from_pretrained(outcome.folder / "checkpoints" / "checkpoint-2")
    assert float(half.model.layers[0].mixer.rate_scale) == 0.5


def add_callback(callback):
    real = WatchedTrainer.__init__

    def init(self, *args, callbacks, **kwargs):
        real(self, *args, callbacks=[*callbacks, callback], **kwargs)

    return init


def test_the_inner_rate_multiplies_what_is_learnt():
    torch.manual_seed(0)
    model = DualformForCausalLM(DualformConfig(preset="tiny-ttt-linear", **small))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        want = model(ids).logits
        model.config.rule["lr"] *= 0.5
        slower = DualformForCausalLM(model.config)
        slower.load_state_dict(model.state_dict())
        set_rate_scale(model, 0.5)
        torch.testing.assert_close(model(ids).logits, slower(ids).logits)
        set_rate_scale(model, 1.0)
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(("start", "steps"), [(-0.1, 3), (1.5, 3), (0.5, -1)])
def test_a_bad_warmup_is_named_before_anything_is_written(tmp_path, text, start, steps):
    with pytest.raises(
        SettingsError, match=rf"\(rate_start\) is {start} and steps \(rate_warmup_steps\) {steps}; expected 0 <="
    ):
        train(settings(tmp_path, text, rate_start=start, rate_warmup_steps=steps))
    assert not (tmp_path / "run").exists()

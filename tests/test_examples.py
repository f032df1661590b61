"""The examples run, smaller than by default, and what they claim is so."""

import importlib.util
import io
import re
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

TEXT = b"the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


def load(name):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stream_is_read_at_constant_memory(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_bytes(TEXT)
    words = ["--file", tmp_path / "text", "--train", tmp_path / "text", "--steps", 3, "--tokens", 4200]
    monkeypatch.setattr(sys, "argv", ["stream.py", *map(str, words)])
    load("stream").main()
    out = capsys.readouterr().out
    assert "2,048 to 4,096" in out
    assert "4,096 to 4,200" in out
    assert float(re.search(r"the peak grew by ([\d.]+) MiB", out)[1]) < 8


def test_a_stream_in_parts_is_the_text_in_one():
    stream = load("stream")
    torch.manual_seed(0)
    model = stream.Reader(dim=16, heads=2).double()
    first = stream.train(model, TEXT, 1)
    assert stream.train(model, TEXT, 8) < first
    ids = torch.tensor(list(TEXT[:900]))[None]
    with torch.no_grad():
        logits, _ = model(ids[:, :-1])
    want = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    found = list(stream.read(model, io.BytesIO(TEXT), 900, part=300))
    assert [at for at, _, _ in found] == [0, 300, 600]
    for (at, loss, forgetful), n in zip(found, (299, 300, 300), strict=True):
        start = max(0, at - 1)
        assert abs(loss - float(want[start : start + n].mean())) < 1e-9
        assert (forgetful == loss) == (at == 0)


def test_digits_are_read_and_a_law_is_found(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--alpha", "2", "--plot", str(tmp_path / "digits.png")])
    load("digits").main()
    assert float(re.search(r"accuracy ([\d.]+)", capsys.readouterr().out)[1]) >= 0.97
    monkeypatch.setattr(sys, "argv", ["symbolic_regression.py", "--plot", str(tmp_path / "law.png")])
    load("symbolic_regression").main()
    learnt = re.search(r"learnt: +y = (.*)", capsys.readouterr().out)[1]
    assert learnt in ("0.5*m*v**2 - k/r", "-k/r + 0.5*m*v**2")
    assert (tmp_path / "law.png").stat().st_size > 10_000


def test_per_sample_work_agrees_with_torch_func(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["per_sample.py", "--samples", "6", "--width", "8"])
    threads = torch.get_num_threads()
    load("per_sample").main()
    torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert all(float(row.split()[-1]) < 1e-5 for row in rows)
    assert "Gauss-Newton diagonal" in rows[2]


def test_the_hidden_states_are_of_one_size():
    import dualform as df

    module = load("hidden_states")
    for changes in list(module.states.values())[1:]:
        width = 128 // changes.get("num_attention_heads", 4)
        made = df.learners.build(changes["learner"])(width)
        numbers = sum(p.numel() for name, p in made.named_parameters() if name.startswith("inner."))
        assert abs(128 // width * numbers / 4224 - 1) < 0.04
    rows = [{"hidden state": "a", "numbers per layer": 4224}]
    assert module.table(rows).endswith("| a | 4,224 |\n")

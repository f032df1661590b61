"""The command line: what each verb prints, and that every failure is one line and the right exit status."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_proof import forget

from dualform.cli import main
from dualform.cli.expression import compile_expression, drawn, functions, parse_shapes
from dualform.cli.output import UsageError

small = (
    "model.hidden_size=16 model.intermediate_size=24 model.num_hidden_layers=1 model.num_attention_heads=2 "
    "model.chunk=4"
)
tiny = [word for assignment in small.split() for word in ("--set", assignment)]


def run(capfd, *arguments):
    status = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("trained") / "run"
    few = ["--max-steps", "2", "--seq-len", "16", "--batch-size", "2"]
    status = main(["train", "--preset", "tiny-ttt-linear", "--data", str(text), "--output", str(folder), *few, *tiny])
    assert status == 0
    return folder


def test_train_writes_its_folder_and_a_table(capfd, tmp_path, text):
    config = tmp_path / "run.toml"
    config.write_text(f'data = "{text}"\nmax_steps = 9\nseq_len = 16\nbatch_size = 2\n')
    folder = tmp_path / "run"
    status, out, err = run(
        capfd, "train", config, "--preset", "tiny-attention", "--output", folder, "--max-steps", 2, *tiny
    )
    assert status == 0, err
    assert re.search(r"tiny-attention +[\d,]+ +2 ", out)
    assert "held-out loss by position" in out
    for name in (
        "metrics.json",
        "loss_by_position.png",
        "settings.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (folder / name).exists(), name
    assert json.loads((folder / "settings.json").read_text())["max_steps"] == 2
    status, out, err = run(capfd, "train", config, "--output", folder, "--max-steps", 2)
    assert (status, out) == (2, "")
    assert "already holds a run" in err


def test_train_json_is_json(capfd, tmp_path, text):
    few = ["--max-steps", 1, "--seq-len", 16, "--batch-size", 2, "--preset", "tiny-attention"]
    status, out, _ = run(capfd, "train", "--data", text, "--output", tmp_path / "run", *few, *tiny, "--json")
    assert status == 0
    (row,) = json.loads(out)
    assert row["steps"] == 1
    assert 0 < row["bits per byte"] < 10


def test_generate_is_seeded_and_carries_its_state(capfd, trained, tmp_path):
    few = ["--max-new-tokens", 8, "--seed", 3]
    status, out, err = run(capfd, "generate", trained, "--prompt", "the quick", *few)
    assert status == 0, err
    assert out.startswith("the quick")
    assert run(capfd, "generate", trained / "model", "--prompt", "the quick", *few)[1] == out
    # How it learnt goes to stderr, so that a pipe gets the text alone.
    assert re.search(r"layer +first quarter +last quarter +all *\n +0( +\d\.\d{4} → \d\.\d{4}){3}", err), err
    greedy = ["--temperature", 0, "--max-new-tokens", 6]
    state = tmp_path / "state.safetensors"
    assert run(capfd, "generate", trained, "--prompt", "the quick", *greedy, "--state", state)[0] == 0
    before = state.read_bytes()
    status, _, err = run(capfd, "generate", trained, "--prompt", " brown", *greedy, "--state", state)
    assert status == 0, err
    assert state.read_bytes() != before


def test_generate_and_evaluate_name_what_a_folder_is(capfd, trained, tmp_path):
    """Another model, no tokenizer, damaged weights, a state that has nowhere to go: one line each, before any work."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(trained / "model", ours)
    assert run(capfd, "convert", ours, theirs)[0] == 0
    few = ["--prompt", "a", "--max-new-tokens", 1]
    for verb in (["generate", theirs, *few], ["evaluate", theirs]):
        status, out, err = run(capfd, *verb)
        assert (status, out) == (1, "")
        assert "model_type is 'ttt'; expected 'dualform'. Convert it: `python -m dualform convert" in err
    for name in ("nowhere/state", "."):
        status, out, err = run(capfd, "generate", ours, *few, "--state", tmp_path / name)
        assert (status, out) == (2, "")
        assert "expected a file in a folder that exists" in err
    for word in ("nan", "inf"):
        assert f"temperature {word}" in run(capfd, "generate", ours, *few, "--temperature", word)[2]
    weights = ours / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, out, err = run(capfd, "generate", ours, *few)
    assert (status, out) == (1, "")
    assert "model.safetensors cannot be read" in err
    shutil.copy(trained / "model" / "model.safetensors", weights)
    for file in ours.glob("tokenizer*"):
        file.unlink()
    status, _, err = run(capfd, "generate", ours, *few)
    assert status == 2
    assert "holds no tokenizer; expected tokenizer.json" in err


def test_an_empty_prompt_is_the_beginning_of_a_text(capfd, trained):
    status, out, err = run(capfd, "generate", trained, "--prompt", "", "--max-new-tokens", 3, "--temperature", 0)
    assert status == 0, err
    assert "inner loss" in err
    assert "inner loss" not in out


def test_evaluate_stands_beside_counting(capfd, trained, text):
    status, out, err = run(capfd, "evaluate", trained, "--data", text, "--seq-len", 16, "--json")
    assert status == 0, err
    table = {row["model"]: row["bits per byte"] for row in json.loads(out)}
    assert list(table) == ["unigram", "bigram", "gzip -9", str(trained)]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert table[str(trained)] == pytest.approx(metrics["held_out"]["bits_per_byte"], rel=1e-5)
    assert "bits per byte" in run(capfd, "evaluate", trained, "--data", text)[1]


def test_presets(capfd):
    status, out, _ = run(capfd, "presets")
    assert status == 0
    assert "ttt-linear-125m-mamba" in out
    assert {row["name"] for row in json.loads(run(capfd, "presets", "--json")[1])} >= {"tiny-ttt-mlp"}
    assert json.loads(run(capfd, "presets", "tiny_ttt_mlp", "--json")[1])["rule"]["lr"] == 1.0
    assert "tie_word_embeddings" not in run(capfd, "presets", "tiny-ttt-mlp")[2]


LEARNER = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.W = nn.Parameter(torch.randn(dim, dim) / dim)

    def forward(self, x):
        return torch.tanh(x @ self.W)

def outer(a, b):
    return a[:, None] * b[None, :]
"""


def test_explain_a_preset_a_model_and_a_learner(capfd, trained, tmp_path):
    (tmp_path / "mine.py").write_text(LEARNER)
    texts = {}
    for target in ("tiny-ttt-linear", trained, f"{tmp_path / 'mine.py'}:Mine"):
        status, texts[target], err = run(capfd, "explain", target, "--dim", 8)
        assert status == 0, err
        assert len(texts[target].splitlines()) > 3
    assert "tanh" in texts[f"{tmp_path / 'mine.py'}:Mine"]
    for form, mark in (("latex", "\\"), ("html", "<")):
        assert mark in run(capfd, "explain", f"{tmp_path / 'mine.py'}:Mine", "--dim", 8, "--format", form)[1]


def test_explain_a_preset_at_another_width_and_level(capfd, trained):
    """What --dim and --level say is what is shown: of a preset, of a model (its own width alone), of a learner."""
    state = {}
    for width in ("8", "16", None):
        chosen = [] if width is None else ["--dim", width]
        status, out, err = run(capfd, "explain", "tiny-ttt-linear", *chosen, "--level", "one-line")
        assert (status, len(out.splitlines())) == (0, 1), err
        state[width] = int(re.search(r"([\d,]+) bytes of state", out)[1].replace(",", ""))
    assert state == {width: 8 * (d * d + d) for width, d in {"8": 8, "16": 16, None: 32}.items()}
    assert run(capfd, "explain", trained, "--dim", 8, "--level", "one-line") == run(
        capfd, "explain", trained, "--level", "one-line"
    )


def test_explain_a_formula_and_a_function(capfd, tmp_path):
    (tmp_path / "mine.py").write_text(LEARNER)
    status, out, err = run(capfd, "explain", "x + y", "--shapes", "x=2", "y=2,2")
    assert status == 0, err
    assert "(2, 2, 2)" in out
    status, other, err = run(capfd, "explain", "x + y", "--shapes", "x=2", "y=2,2", "--wrt", "y")
    assert status == 0, err
    assert "(2, 2, 2, 2)" in other
    file = f"{tmp_path / 'mine.py'}:outer"
    status, out, err = run(capfd, "explain", file, "--shapes", "b=3", "a=2", "--wrt", "b")
    assert status == 0, err
    assert "a:(2,)  b:(3,)  ->  z:(2, 3)" in out
    assert run(capfd, "explain", file, "--shapes", "a=2")[0::2] == (
        2, f"dualform: explain: {file} wants b too; expected a shape for each. Add b=SIZES.\n",
    )  # fmt: skip
    assert "has no argument 'c'" in run(capfd, "explain", file, "--shapes", "a=2", "b=2", "c=2")[2]
    (tmp_path / "bad.py").write_text("1 / 0")
    status, _, err = run(capfd, "explain", f"{tmp_path / 'bad.py'}:f", "--shapes", "x=2")
    assert (status, "bad.py:1: 1 / 0 raises ZeroDivisionError: division by zero" in err) == (2, True)


POINTED = {
    "x + ": ("invalid syntax", 3),
    "x + (y": ("'(' was never closed", 4),
    "x + yy * 3": ("'yy' in 'x + yy * 3' has no shape; expected one for each name. Add yy=SIZES to --shapes", 4),
    "x $ y": ("invalid syntax", 2),
    "2 * softmx(x)": ("there is no function 'softmx'. Did you mean 'softmax'", 4),
    "x.smu(0)": ("there is no method 'smu'. Did you mean 'sum'", 2),
    "x + x.__class__": ("'.__class__' is not part of a formula", 6),
    "x.item()": ("there is no method 'item'", 2),
    "9**9**9**9*x": ("this power is no number", 3),
    "x + [x][0]": ("'[x]' is not part of a formula", 4),
    "'a' * 9 + x": ("\"'a'\" is not part of a formula", 0),
    "x if x else x": ("is not part of a formula", 0),
    "sum + x": ("'sum' is a function; expected its arguments in brackets", 0),
    "(lambda: 1)()": ("this cannot be called", 1),
    "sum(**x)": ("** is not part of a formula", 6),
    "x[y": ("'[' was never closed", 1),
}


@pytest.mark.parametrize("formula", POINTED)
def test_a_malformed_formula_is_pointed_at(capfd, formula):
    status, out, err = run(capfd, "explain", formula, "--shapes", "x=2")
    message, column = POINTED[formula]
    first, shown, caret = err.rstrip("\n").split("\n")
    assert (status, out) == (2, "")
    assert first.startswith("dualform: explain: ")
    assert message in first
    assert shown == f"  {formula.strip()}"
    assert caret == " " * (column + 2) + "^"


def test_explain_as_latex_html_and_json(capfd):
    formula = ["explain", "softmax(x @ W, -1)", "--shapes", "x=2,3", "W=3,2", "--wrt", "W"]
    status, out, err = run(capfd, *formula, "--level", "proof", "--axes", "b i, i o -> b o")
    assert status == 0, err
    assert "dz/dW[b,o,i,o']" in out
    assert "Proof" in out
    assert run(capfd, *formula, "--format", "latex")[1].startswith("\\begin{aligned}")
    page = run(capfd, *formula, "--format", "html")[1]
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    told = json.loads(run(capfd, *formula, "--json")[1])
    assert [step["op"] for step in told["steps"]] == ["matmul", "softmax"]
    assert told["result"]["out_shape"] + told["result"]["in_shape"] == [2, 2, 3, 2]
    assert max(told["checks"].values()) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--preset", "tiny-ttt-mpl"], 2, "Did you mean 'tiny-ttt-mlp'"),
        (["train", "--max-steps", "many"], 2, "many"),
        (["train", "--max-step", "3"], 2, "max-step"),
        (["train", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
        (["train", "--set", "steps=3"], 2, "there is no setting 'steps'"),
        (["train", "--data", "nowhere", "--output", "nowhere"], 1, "nowhere does not exist"),
        (["train", "--resume", "--output", "nowhere"], 2, "no checkpoint"),
        (["generate", "nowhere", "--prompt", "a"], 2, "nowhere is no model"),
        (["generate", "nowhere"], 2, "prompt"),
        (["generate", "nowhere", "--prompt", "a", "--temperature", "-1"], 2, "temperature -1"),
        (["evaluate", "nowhere"], 2, "nowhere is no model"),
        (["presets", "tiny"], 2, "presets: no record is called 'tiny'"),
        (["explain", "tiny-ttt-mpl"], 2, "Did you mean 'tiny-ttt-mlp'"),
        (["explain", "x + y"], 2, "for a formula pass --shapes"),
        (["explain", "nowhere.py:Mine"], 2, "explain: there is no file"),
        (["explain", "x + y", "--shapes", "x=2"], 2, "'y' in 'x + y' has no shape"),
        (["explain", "x", "--shapes", "x=a"], 2, "'x=a' is no shape"),
        (["explain", "x", "--shapes", "x=-1"], 2, "'x=-1' is no shape"),
        (["explain", "x", "--shapes", "x=2", "x=3"], 2, "names 'x' twice"),
        (["explain", "x", "--shapes", "x=99999,99999"], 2, "x has 9,999,800,001 numbers; expected at most 16,777,216"),
        (["explain", "x + y", "--shapes", "x=2", "y=2", "z=2"], 2, "'z' has a shape but is not in 'x + y'"),
        (["explain", "cross_entropy(z, y)", "--shapes", "z=3,4", "y=3"], 2, "asked for so: y=3:int"),
        (["explain", "cross_entropy(z, y)", "--shapes", "z=3,4", "y=5:int"], 1, "match target batch_size (5)"),
        (
            ["explain", "eye(9999) * x", "--shapes", "x=1"],
            1,
            "eye makes 99,980,001 numbers; expected at most 16,777,216",
        ),
        (["explain", "k * 2", "--shapes", "k=3:int"], 1, "has dtype torch.int64; expected a floating dtype"),
        (["explain", "x + y", "--shapes", "x=2", "y=3"], 1, "axis 0 of x (size=2) meets axis 0 of y (size=3)"),
        (["explain", "split(x, 1)", "--shapes", "x=2"], 2, "gives a tuple; expected one tensor"),
        (["explain", "tiny-ttt-linear", "--wrt", "x"], 2, "--wrt are for formulas"),
        (["explain", "x", "--shapes", "x=2", "--wrt", "z"], 2, "--wrt is 'z'; expected one of x"),
        (["explain", "x", "--shapes", "x=2", "--format", "pdf"], 2, "pdf"),
        (["bench"], 2, "bench"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_failures_are_one_line_and_a_status(capfd, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capfd, *arguments)
    assert got == status, err
    assert message in re.sub(r"\s*[│╭╰─╮╯]+\s*", " ", err)
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert out == ""


@pytest.mark.parametrize("verb", [None, "train", "generate", "explain", "evaluate", "presets"])
def test_help_everywhere(capfd, verb):
    status, out, _ = run(capfd, *([verb] if verb else []), "--help")
    assert status == 0
    assert "Usage: dualform" in out


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "dualform", "presets", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) > 10
    assert (
        subprocess.run([sys.executable, "-m", "dualform", "no-such-verb"], capture_output=True, timeout=120).returncode
        == 2
    )


@pytest.mark.parametrize(
    ("formula", "want"),
    [
        ("x + y * 2", lambda x, y: x + y * 2),
        ("-x @ y.T", lambda x, y: -x @ y.mT),
        ("softmax(x, dim=-1) / y ** 2", lambda x, y: x.softmax(-1) / y**2),
        (
            "sum(layer_norm(x), -1)",
            lambda x, y: ((x - x.mean(-1, True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()).sum(-1),
        ),
        ("einsum('ij,kj->ik', x, y)", lambda x, y: x @ y.mT),
        ("transpose(gelu(x, approximate='tanh'))", lambda x, y: functions["gelu"](x, approximate="tanh").mT),
        ("x[1:, ::2].sum(0) + y[..., None, -1]", lambda x, y: x[1:, ::2].sum(0) + y[..., None, -1]),
        ("torch.where(x > 0.5, x, 0).reshape(3, -1)", lambda x, y: torch.where(x > 0.5, x, 0).reshape(3, -1)),
        ("cat([x, y], dim=-1).softmax(-1).T", lambda x, y: torch.cat([x, y], -1).softmax(-1).mT),
        ("F.layer_norm(x, [3]) * 2 ** 0.5", lambda x, y: torch.nn.functional.layer_norm(x, [3]) * 2**0.5),
    ],
)
def test_formulas_are_functions(formula, want):
    x, y = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) + 1
    torch.testing.assert_close(compile_expression(formula, ["x", "y"])(x, y), want(x, y))


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os')",
        "x.__class__",
        "(lambda: 1)()",
        "[i for i in x]",
        "exec('1')",
        "x[0].data",
        "x if x else x",
        "x +",
        "f'{x}'",
        "sum(**x)",
    ],
)
def test_a_formula_runs_nobodys_code(formula):
    with pytest.raises(UsageError, match="explain:"):
        compile_expression(formula, ["x"])


def test_shapes():
    assert parse_shapes(["x=2", "s=", "y=2,3"]) == {"x": (2,), "s": (), "y": (2, 3)}
    shapes = parse_shapes(["x=2,5", "k=3:int", "m=4:bool", "y=3:float"])
    assert [shape.kind for shape in shapes.values()] == ["float", "int", "bool", "float"]
    numbers = drawn(shapes)
    assert [x.dtype for x in numbers.values()] == [torch.float64, torch.int64, torch.bool, torch.float64]
    assert 0 <= numbers["k"].min() <= numbers["k"].max() < 2, "a place on every axis"
    with pytest.raises(UsageError, match=r"'k=3:itn' asks for 'itn'.*Did you mean 'int'"):
        parse_shapes(["k=3:itn"])


MATRICES = [
    "linalg.inv(S)",
    "linalg.eigvalsh(S)",
    "linalg.svdvals(S[:2])",
    "linalg.qr(S)[1]",
    "torch.linalg.pinv(S[:2])",
]
# A formula, what it is of, a part of its structure.
TOLD = {
    "where(x > 0, x, 0)": ("x=4", "δ(i,j)"), "inv(S)": ("S=2,2", "-inv(S)[i,k] inv(S)[l,j]"),
    "torch.linalg.solve(S, x)": ("S=2,2 x=2", "-inv(S)[i,j] solve(S,x)[k]"), "solve(S, x)": ("x=2 S=2,2", "inv(S)[i,j]"),
    "cross_entropy(z, y)": ("z=3,4 y=3:int", "[i,j]"), "embedding(k, w)": ("k=3:int w=5,2", "δ(j,m) δ(l,k[i])"),
    "x[k]": ("k=2:int x=5", "δ(j,k[i])"), "x[m]": ("x=5 m=5:bool", "[i])"), "eye(3) @ x": ("x=3,2", "δ(i,k) δ(j,l)"),
    "arange(3) * x": ("x=3", "[i] δ(i,j)"), "tensor([1.5, 0.1]) * x": ("x=2", "[i] δ(i,j)"), "ones(2) * x": ("x=2", "δ(i,j)"),
    "linspace(0, 1, 3) @ x": ("x=3", "[i]"), "full([2], 0.1) + x": ("x=2", "δ(i,j)"), **dict.fromkeys(MATRICES, ("S=3,3", "dz/dS")),
}  # fmt: skip


@pytest.mark.parametrize("formula", TOLD)
def test_formulas_of_matrices_masks_and_whole_numbers_are_explained(capfd, formula):
    shapes, mark = TOLD[formula]
    status, out, err = run(capfd, "explain", formula, "--shapes", *shapes.split(), "--level", "one-line")
    assert status == 0, err
    assert mark in out


def test_numbers_in_a_formula_have_all_their_digits():
    x = torch.rand(3, dtype=torch.float64)
    for formula, want in {
        "tensor([0.1, 0.2, 0.3]) * x": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) * x,
        "full([3], 0.1) * x": 0.1 * x, "linspace(0, 0.3, 3) * x": torch.linspace(0, 0.3, 3, dtype=torch.float64) * x,
        "arange(0, 0.3, 0.1) * x": torch.arange(0, 0.3, 0.1, dtype=torch.float64) * x, "x[arange(2)]": x[:2],
    }.items():  # fmt: skip
        assert torch.equal(compile_expression(formula, ["x"])(x), want)


def test_bench_compares_backends_and_the_cache_is_cleared(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("DUALFORM_CACHE", str(tmp_path))
    forget(monkeypatch)
    sizes = ["--length", "8", "--dim", "4", "--heads", "1", "--chunk", "4", "--rounds", "1"]
    status, out, _ = run(capfd, "bench", "cpu", "--learner", "linear", *sizes, "--json")
    assert status == 0
    row, attention = json.loads(out)
    assert row["learner"] == "linear"
    assert row["times faster"] == pytest.approx(row["eager ms"] / row["cpp ms"])
    assert attention["eager ms"] > 0
    assert len(list(tmp_path.iterdir())) == 2
    status, out, _ = run(capfd, "cache", "clear")
    assert status == 0
    assert out.startswith("cleared 2 compiled programs")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_of_a_gpu_that_is_not_there(capfd):
    status, _, err = run(capfd, "bench", "gpu")
    assert status == 2
    assert "torch sees no CUDA device; expected one. Use `bench cpu`." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "bench: --batch is 0; expected a number >= 1"),
        (("--learner", "lineer"), "Did you mean 'Linear'"),
    ],
)
def test_bench_refuses(capfd, arguments, message):
    status, _, err = run(capfd, "bench", "cpu", *arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("rows", [0, 1, -5])
def test_rows_without_a_next_token_are_bad_usage(capfd, trained, tmp_path, rows):
    for verb in (("train", "--output", tmp_path / "run"), ("evaluate", trained / "model")):
        status, _, err = run(capfd, *verb, "--seq-len", rows)
        assert status == 2
        assert f"seq_len is {rows}; expected a whole number >= 2" in err
    assert not (tmp_path / "run").exists()

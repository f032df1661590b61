"""The border is typed: what no signature takes is refused by name, for every record and field, with no traceback."""

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge, Lt
from beartype import BeartypeConf
from beartype.door import is_bearable

import dualform as df
from dualform.catalogue import Catalogue, CatalogueError, _of_kind, expect, hints_of, type_name
from dualform.cli import bench, evaluate, explain, generate, main, train
from dualform.functions.describe import given
from dualform.learning.objectives import Objective
from dualform.models.arguments import check_ids, check_labels
from dualform.models.configuration import DualformConfig, shared
from dualform.train.settings import Settings, SettingsError

nan, inf = math.nan, math.inf
numbers = BeartypeConf(is_pep484_tower=True)
values = [
    True, False, 0, 1, 3, -1, 2.0, 2.5, -0.5, nan, inf, 1j, "maybe", "3", "", None, (), ("a",), (None,), (1, "a"),
    (1, 2), (nan,),
    (1, True), ((1, 2), (3,)), {"a": 1},
]  # fmt: skip
catalogues = [c for c in _of_kind.values() if any(c[n].function.__module__.startswith("dualform.") for n in c)]
needed = {**given, "rank": 2, "spec": "Linear"}
records = [(c, name) for c in catalogues for name in c]


def wrong_number(value):
    """Does a value hold what Python takes for a number and nobody else does? beartype takes it too."""
    if isinstance(value, (list, tuple)):
        return any(wrong_number(part) for part in value)
    return isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))


def accepts_bool(hint):
    return hint is bool or any(accepts_bool(part) for part in typing.get_args(hint))


def fits(value, hint):
    if isinstance(value, bool):
        return accepts_bool(hint)
    # beartype looks at one part of a value, another one each time; a whole number is a float's value too.
    looks = 50 if isinstance(value, (list, tuple)) else 1
    return all(is_bearable(value, hint, conf=numbers) for _ in range(looks)) and not wrong_number(value)


def build(catalogue, name, **options):
    record = catalogue[name]
    empty = [n for n, default in record.options.items() if default is record.signature.empty]
    return catalogue.build({"name": name, **{n: needed[n] for n in empty}, **options})


def refusal(call, kind=ValueError):
    """Return the words with which a call is refused, which say what is right; None if it is not."""
    text = None
    try:
        call()
    except kind as error:
        text = str(error)
    assert text is None or re.search("expected|Did you mean|Known|There are none", text), text
    return text


def check_record(catalogue, name):
    """Each option refuses what is not of its type, by its name; what is of its type builds, or is refused in words."""
    record = catalogue[name]
    for option, hint in record.hints.items():
        is_open = option in record.nested or hint is Any
        assert not is_open or option in record.nested or record.options[option] is None, f"{option} has no type"
        where = rf"{record.kind}\.{record.name}: (option ')?{option}\b"
        for value in values:
            text = refusal(lambda option=option, value=value: build(catalogue, name, **{option: value}))
            if text is None:
                is_right = value is None or isinstance(value, tuple) if is_open else fits(value, hint)
                assert is_right, f"{option} takes {value!r}"
            elif not is_open and not fits(value, hint):
                assert re.match(where, text), f"{option} = {value!r} fails late: {text}"


@pytest.mark.parametrize(("catalogue", "name"), records, ids=lambda x: x.kind if isinstance(x, Catalogue) else x)
def test_every_option_of_every_record_is_typed(catalogue, name):
    check_record(catalogue, name)
    for option, hint in catalogue[name].hints.items():  # and a default is of the type that it is the default of
        default = catalogue[name].options[option]
        assert default is catalogue[name].signature.empty or option in catalogue[name].nested or fits(default, hint)


planted = Catalogue("planted")


@planted.record(name="untyped")
def untyped(width=3):
    return lambda x: x * width


@planted.record(name="late")
def late(width: int = 3):
    return lambda x: x / len(range(8, width, 2))


@planted.record(name="crashing")
def crashing(width: int = 3):
    return 1 / width


@planted.record(name="loose")
def loose(width: int | str = 3):
    return lambda x: x * int(width)


@planted.record(name="silent")
def silent(width: int = 3):
    if width < 0:
        raise ValueError("no")
    return width


@pytest.mark.parametrize("name", ["untyped", "crashing", "silent"])
def test_the_law_bites(name):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_record(planted, name)


def test_the_law_lets_what_is_right_pass():
    check_record(planted, "late")
    check_record(planted, "loose")


def test_a_range_may_stand_in_the_annotation():
    ranged = Catalogue("ranged")

    @ranged.record(name="Box")
    def box(sides: Annotated[int, Ge(1), Lt(9)] = 3, lids: Sequence[Annotated[float, Ge(0)]] = ()):
        return lambda x: x * sides

    check_record(ranged, "Box")
    with pytest.raises(CatalogueError, match=r"ranged\.Box: sides is 0; expected greater than or equal to 1"):
        ranged.Box(sides=0)
    with pytest.raises(CatalogueError, match=r"lids\[1\] is -1; expected greater than or equal to 0"):
        ranged.Box(lids=[0.5, -1])


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, True, "x is True; expected a value of type int."),
        (float, "0.1", "x is '0.1'; expected a value of type float."),
        (float, nan, "x is nan; expected a finite number."),
        (float | None, "a", "x is 'a'; expected a value of type float or None."),
        (bool, 1, "x is 1; expected a value of type bool."),
        (Sequence[int], "abc", "x is 'abc'; expected a value of type Sequence[int]."),
        (Sequence[int], (1, "a"), "x[1] is 'a'; expected a valid integer."),
        (Sequence[float] | Sequence[Sequence[float]], ((1.0, "a"),), "x[0][1] is 'a'; expected a valid number."),
        (tuple[float, float], (1, 2, 3), "x is (1, 2, 3); expected a value of type tuple[float, float]."),
        (Literal["v", "v-k"], "V", "x is 'V'; expected 'v' or 'v-k'. Did you mean 'v'"),
        (Literal["v", "v-k"], "k", "x is 'k'; expected 'v' or 'v-k'. Change it."),
        (Mapping[str, Any], 3, "x is 3; expected a value of type Mapping[str, Any]."),
    ],
)
def test_what_does_not_fit_is_said(hint, value, message):
    with pytest.raises(SettingsError, match=re.escape(f"train: {message}")):
        expect("train", "x", value, hint, kind=SettingsError)


@pytest.mark.parametrize("value", [3, 0.5, -2])
def test_whole_numbers_are_numbers(value):
    expect("train", "x", value, float)


def test_types_are_written_as_people_say_them():
    assert type_name(int | list[int] | None) == "int or list[int] or None"


own = [f for f in fields(DualformConfig) if f.name in DualformConfig.__annotations__]


@pytest.mark.parametrize("field", own, ids=lambda f: f.name)
def test_every_field_of_the_configuration_is_typed(field):
    hint = DualformConfig.__annotations__[field.name]
    for value in [*values, ["a"], [1], [None]]:
        text = refusal(lambda value=value: DualformConfig(preset="tiny-ttt-linear", **{field.name: value}))
        if text is None:
            assert value is None if hint is Any else fits(value, hint), f"{field.name} takes {value!r}"
        elif hint is not Any and not fits(value, hint):
            assert f"DualformConfig: {field.name}" in text


named = [(name, hint) for name, hint in shared.items() if hint is not Any]


@pytest.mark.parametrize(("name", "hint"), named, ids=[name for name, _ in named])
def test_what_stands_beside_the_fields_is_typed(tmp_path, name, hint):
    """In the constructor, and over a file while it is read."""
    DualformConfig(preset="tiny-ttt-linear").save_pretrained(tmp_path)
    for value in [*values, ["a"], [1], [None], {0: "a"}]:
        given = {name: value}
        text = refusal(lambda given=given: DualformConfig(preset="tiny-ttt-linear", **given))
        assert fits(value, hint) if text is None else re.match(rf"DualformConfig: {name}(\[0\])? is ", text), (
            value,
            text,
        )
        if text is not None and value is not None and name != "model_type":
            with pytest.raises(ValueError, match=rf"DualformConfig: {name}(\[0\])? is "):
                DualformConfig.from_pretrained(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dtype": "foo"},
            "dtype is 'foo'; expected a type of real numbers. Known: float16, bfloat16, float32, float64.",
        ),
        ({"dtype": "flaot32"}, "Did you mean 'float32'"),
        ({"dtype": torch.int8}, "dtype is torch.int8; expected a type of real numbers."),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; expected a type of real numbers."),
        ({"hidden_act": "rleu"}, "hidden_act is 'rleu'; expected 'silu' or 'swish'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'silu' or 'swish'"),
        ({"hiden_act": "silu"}, "unknown field 'hiden_act'. Did you mean 'hidden_act'"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; expected greater than or equal to 1"),
        ({"num_labels": 0}, "num_labels is 0; expected greater than or equal to 1"),
        ({"id2label": {}}, "id2label is {}; expected {0: name, ...}"),
        ({"id2label": {"a": "b"}}, "id2label is {'a': 'b'}; expected {0: name, ...}"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; expected False. There is no encoder."),
        ({"num_heads": 4}, "unknown field 'num_heads'. Did you mean 'num_attention_heads'"),
        ({"attention_dropout": 0.1}, "unknown field 'attention_dropout'."),
        ({"max_length": 20}, "unknown field 'max_length'. Known: "),
    ],
)
def test_what_no_model_reads_is_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DualformConfig(preset="tiny-ttt-linear", **given)


def test_what_others_write_into_a_configuration_is_kept(tmp_path):
    config = DualformConfig(preset="tiny-ttt-linear", dtype="torch.bfloat16", max_position_embeddings=64)
    config.note = "mine"
    config.save_pretrained(tmp_path)
    for same in (DualformConfig.from_pretrained(tmp_path), DualformConfig(**config.to_dict())):
        assert (same.note, same.max_position_embeddings, same.dtype) == ("mine", 64, torch.bfloat16)


def test_whole_numbers_become_the_fractions_that_fields_are():
    config = DualformConfig(preset="tiny-ttt-linear", rope_theta=3, initializer_range=1)
    assert [type(config.rope_theta), type(config.initializer_range)] == [float, float]


@pytest.mark.parametrize("field", fields(Settings), ids=lambda f: f.name)
def test_every_setting_is_typed(field):
    hint = hints_of(Settings)[field.name]
    for value in values:
        text = refusal(lambda value=value: Settings(**{field.name: value}), SettingsError)
        assert fits(value, hint) if text is None else f"{field.name} is " in text, (
            f"{field.name} takes {value!r}: {text}"
        )


# -- and by the command line, with no traceback


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("border")
    (path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (path / "mine.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self, dim, other):\n"
        "        super().__init__()\n"
        "def boom(dim):\n"
        "    raise KeyError('x')\n"
    )
    config = DualformConfig(preset="tiny-ttt-linear", hidden_size=16, intermediate_size=16, num_attention_heads=2)
    df.DualformForCausalLM(config).save_pretrained(path / "model")
    from dualform.train.data import byte_tokenizer

    byte_tokenizer().save_pretrained(path / "model")
    return path


def numbers_and_words(hint):
    """Write values of other types than a hint as a TOML file would."""
    texts = {
        "true": True,
        "3": 3,
        "2.5": 2.5,
        "nan": nan,
        '"maybe"': "maybe",
        "[1]": [1],
        '["a"]': ["a"],
        "{a = 1}": {"a": 1},
    }
    return [text for text, value in texts.items() if not fits(value, hint)]


def assignments():
    for name, hint in hints_of(Settings).items():
        if name != "model":
            yield from (f"{name}={text}" for text in numbers_and_words(hint))
    for field in own:
        hint = DualformConfig.__annotations__[field.name]
        if hint is not Any:
            yield from (f"model.{field.name}={text}" for text in numbers_and_words(hint))
    for part, catalogue in {"learner": df.learners, "objective": df.objectives, "rule": df.rules}.items():
        for name in catalogue:
            record = catalogue[name]
            more = "".join(f", {n} = {needed[n]!r}" for n, d in record.options.items() if d is record.signature.empty)
            for option, hint in record.hints.items():
                for text in (
                    numbers_and_words(hint) if hint is not Any and option not in record.nested else ["3", "true"]
                ):
                    rest = "" if option in more else more
                    yield f"model.{part}={{name = {name!r}{rest}, {option} = {text}}}"


def test_every_assignment_that_does_not_fit_is_one_line(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    told = list(assignments())
    assert len(told) > 250
    for assignment in told:
        status = main(
            ["train", "--preset", "tiny-ttt-linear", "--output", "run", "--data", "t.txt", "--set", assignment]
        )
        out, err = capfd.readouterr()
        assert (status, out) == (2, ""), (assignment, err)
        assert len(err.splitlines()) == 1, (assignment, err)
        assert "not foreseen" not in err, (assignment, err)
        assert "expected" in err or "Did you mean" in err or "Known" in err, (assignment, err)
        assert not (folder / "run").exists()


mistakes = {
    "generate model --prompt a --seed -1": (2, "seed is -1; expected a whole number, 0 <= seed < 2**32"),
    "generate model --prompt \udcff": (2, "prompt is no UTF-8 text"),
    "generate model --prompt a --temperature "
    "1e-320": (2, "temperature 1e-320; expected >= 1, and 0 or finite, >= 1e-6"),
    "generate model --prompt a --temperature nan": (2, "temperature nan"),
    "generate model --prompt a --max-new-tokens 1.5": (2, "max-new-tokens"),
    "evaluate model --seq-len 1 --data t.txt": (2, "seq_len is 1; expected a whole number >= 2"),
    "evaluate model --batch-size true": (2, "batch-size"),
    "explain mine.py:Two": (2, "mine.py:Two takes (dim, other), and missing a required argument: 'other'"),
    "explain mine.py:boom": (2, "raises KeyError: 'x'; expected NAME(dim) to make an nn.Module"),
    "explain mine.py:Two --dim 0": (2, "--dim is 0; expected a width >= 1"),
    "explain tiny-attention": (2, "no layer of tiny-attention learns at test time"),
    "explain x/0 --shapes x=2": (2, "division by zero"),
    "functions taylor --set degree=-1 degree=2": (2, "--set says 'degree' twice; expected once"),
    "functions taylor --png nowhere/x.png": (2, "--png is nowhere/x.png; expected FILE.png in a folder that exists"),
    "functions taylor --png x.jpg": (2, "--png is x.jpg; expected FILE.png in a folder that exists"),
    "functions gaussian_rbf --set span=3": (2, "span is 3; expected a value of type tuple[float, float]"),
    "functions normal --set theta=3": (2, "theta is 3; expected a value of type Sequence[float | Sequence[float]]"),
    "functions metric --set metric=3": (2, "metric is 3"),
    "functions mlp --set dims=3": (2, "dims is 3; expected a value of type Sequence[int]"),
    "functions taylor --set symmetric=maybe": (2, "symmetric is 'maybe'; expected a value of type bool"),
    "functions lora --set alpha=x": (2, "alpha is 'x'; expected a value of type float or None"),
    "bench cpu --dim 0": (2, "--dim is 0"),
    "explain tiny-ttt-linear --dim "
    "7": (2, "--dim is 7, which tiny-ttt-linear cannot have. DualformConfig: hidden_size is 28"),
    "explain model --dim 9": (2, "--dim is 9; expected model's own width of a head = "),
    "explain x --shapes x=2 --dim 8": (2, "--dim is 8 beside --shapes, which say every size"),
    "explain x --shapes x=2 --json --format html": (2, "--format is 'html' beside --json"),
    "explain x --shapes x=2 --json --level proof": (2, "--level is 'proof' beside --json, which tells all"),
    "train --max-steps 1 --set max_steps=1.5": (2, "max_steps is 1.5; expected a value of type int"),
    "train --max-steps 1 --set max_steps=-1": (2, "max_steps is -1; expected a whole number >= 1"),
    "train --set max_steps=0 --set max_steps=1": (2, "max_steps is 0; expected a whole number >= 1"),
    "train --batch-size 1 --set batch_size=0": (2, "batch_size is 0; expected a whole number >= 1"),
    "train --learning-rate 1 --set learning_rate=0": (2, "learning_rate is 0; expected a number > 0"),
    "train --seed 1 --set seed=-1": (2, "seed is -1; expected a whole number, 0 <= seed < 2**32"),
    "train --preset tiny-attention --set preset=tiny-atention": (2, "Did you mean 'tiny-attention'"),
    "train --preset tiny-attention --set save_steps=0 --set save_steps=1": (2, "save_steps is 0; expected"),
    "train --set training.max_steps=3": (2, "no setting 'training.max_steps'. Did you mean 'max_steps'"),
    "train --set training.x=3": (2, "no setting 'training.x'. Known: preset, data, output, max_steps, seq_len"),
    "train --set optimizer.args.seed=3": (2, "no setting 'optimizer.args.seed'. Did you mean 'seed'"),
    "train --set layer.chunk=3": (2, "no setting 'layer.chunk'. Did you mean 'model.chunk'"),
    "train --set modl.chunk=3": (2, "no setting 'modl'. Did you mean 'model'?"),
    "train --set rule.lr=1": (2, "no setting 'rule'. Did you mean 'model.rule'"),
    "train --set chunk=8": (2, "no setting 'chunk'. Did you mean 'model.chunk'"),
    "train --set max_step=8": (2, "no setting 'max_step'. Did you mean 'max_steps'"),
    "train --data t.txt --set model.eos_token_id=259": (2, "eos_token_id is 259; expected an id of the vocabulary"),
    "train --data t.txt --set model.bos_token_id=-5": (2, "bos_token_id is -5; expected an id of the vocabulary"),
    "train --data t.txt --set model.initializer_range=-1": (2, "initializer_range is -1.0; expected a number >= 0"),
    "train --data t.txt --set model.sliding_window=0": (2, "sliding_window is 0; expected a number of tokens > 0"),
    "train --data t.txt --set model.dtype=nonsense": (2, "the model has no field 'dtype'"),
    'train --data t.txt --set '
    'model.learner={name="SwiGLU",expand=0}': (2, "SwiGLU: expand is 0; expected a number > 0"),
}  # fmt: skip


@pytest.mark.parametrize("words", mistakes)
def test_a_users_mistake_is_one_line(folder, capfd, monkeypatch, words):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    status, message = mistakes[words]
    got = main(words.split())
    _, err = capfd.readouterr()
    assert got == status, err
    assert message in re.sub(r"\s*[│╭╰─╮╯]+\s*", " ", err)
    assert "Traceback" not in err
    assert "not foreseen" not in err
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_words_are_not_rounded(capfd):
    """Every number of every verb that counts something."""
    counted = 0
    for verb in (train, generate, evaluate, bench, explain):
        needs = {"generate": ["model", "--prompt", "a"], "evaluate": ["model"], "bench": ["cpu"], "explain": ["x"]}
        for option, hint in hints_of(verb).items():
            if int in (hint, *typing.get_args(hint)):
                words = [verb.__name__, *needs.get(verb.__name__, []), f"--{option.replace('_', '-')}", "1.5"]
                assert main(words) == 2
                assert "it is 1.5; expected a whole number" in " ".join(capfd.readouterr().err.replace("│", "").split())
                counted += 1
    assert counted > 12


def test_debug_shows_where_an_error_came_from(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["explain", "mine.py:boom", "--debug"]) == 2
    _, err = capfd.readouterr()
    assert "Traceback" in err
    assert "in boom" in err
    assert err.splitlines()[-1].startswith("dualform: explain: mine.py:boom")


def test_what_nobody_foresaw_is_one_line_too(capfd, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr("dualform.cli.presets.show", broken)
    assert main(["presets"]) == 1
    _, err = capfd.readouterr()
    assert err == "dualform: RuntimeError: a bug. This was not foreseen; --debug shows where it came from.\n"


# -- what is called in Python
# ----------------------------------------------------------------------------------------------------------

anything = [
    *values, b"v", len, int, object(), torch.ones(2), torch.tensor(3), torch.nn.Linear(2, 2), ["weight"], {"weight"}, "weight", ((3,),),
    ("weight",), (0.5,),
]  # fmt: skip


def step(i, lr):
    return df.Step(((1.0,),), (lr,), (1.0,), 1.0)


def loss(p, t):
    return (p - t).square().sum(-1)


def whole(x):
    return type(x) is int and x > 0


def flag(x):
    return type(x) is bool


def word(x):
    return isinstance(x, str)


def names(x):
    return isinstance(x, (tuple, list, set)) and all(isinstance(v, str) for v in x)


def tensor(x):
    return isinstance(x, torch.Tensor)


def mapping(x):
    return x is None or isinstance(x, dict)


def derive(**options):
    return df.derive(**{"learner": torch.nn.Linear(4, 4), "prove": False, **options})


def layer(**options):
    return df.TestTimeTraining(
        **{"dim": 8, "heads": 2, "learner": "linear", "share_qk": True, "prove": False, **options}
    )


x = torch.ones(1, 6, 1, 4)
program, built = derive(), layer()
whats = [
    (derive, {"learner": lambda v: isinstance(v, torch.nn.Module), "objective": lambda v: word(v) or callable(v), "rule": word}),
    (derive, {"chunk": whole, "slow": names, "block": lambda v: v is None or whole(v), "prove": flag}),
    (layer, {"dim": whole, "heads": whole, "conv_kernel": whole, "share_qk": flag, "use_gate": flag, "post_norm": flag}),
    (layer, {"rope_theta": lambda v: type(v) in (int, float) and 0 < v < inf, "chunk": whole, "prove": flag}),
    (lambda **o: df.Rule(**{"step": step, **o}), {"step": callable, "gates": names, "constants": mapping, "start": lambda v: isinstance(v, tuple)}),
    (lambda **o: df.Rule(**{"step": step, **o}), {"resets": lambda v: isinstance(v, tuple), "name": word}),
    (lambda **o: Objective(**{"loss": loss, **o}), {"loss": callable, "target": ("v", "v-k").__contains__}),
    (lambda **o: program(**{"q": x, "k": x, "v": x, **o}), {"q": tensor, "k": tensor, "v": tensor, "gates": mapping}),
    (lambda **o: program(x, x, x, **o), {"state": lambda v: v is None, "mask": lambda v: v is None or tensor(v)}),
    (lambda **o: program(x, x, x, **o), {"reset": lambda v: v is None or tensor(v), "params": mapping, "overwrite": flag}),
    (lambda **o: program(x, x, x, **o), {"form": word, "backend": word, "remat": lambda v: v is None or whole(v), "nan_policy": word}),
    (lambda lr: program(x, x, x, {"lr": lr}), {"lr": tensor}),
    (lambda weight: program(x, x, x, params={"weight": weight}), {"weight": tensor}),
    (lambda **o: program.initial_state(**{"batch": 1, "heads": 1, **o}), dict.fromkeys(["batch", "heads"], lambda v: type(v) is int and v >= 0)),
    (lambda **o: built(**{"x": torch.ones(1, 5, 8), **o}), {"x": tensor, "state": lambda v: v is None}),
    (lambda **o: built(torch.ones(1, 5, 8), **o), dict.fromkeys(["attention_mask", "reset"], lambda v: v is None or tensor(v))),
]  # fmt: skip
arguments = [(f, name, is_right) for f, kinds in whats for name, is_right in kinds.items()]


@pytest.mark.parametrize(
    ("call", "name", "is_right"), arguments, ids=[f"{name}-{k}" for k, (_, name, _) in enumerate(arguments)]
)
def test_every_argument_is_typed(call, name, is_right):
    """What is not of its kind is refused, by its name, with its value and what is expected; no error of Python's own."""
    for value in anything:
        text = refusal(lambda value=value: call(**{name: value}))
        assert text is not None or is_right(value), f"{name} takes {value!r}"
        assert text is None or is_right(value) or re.search(rf"\b{name}\b|\.build: ", text), text


def test_patterns_are_not_read_letter_by_letter():
    with pytest.raises(
        df.DerivationError, match=r"slow is 'weight'; expected a tuple of fnmatch patterns\. Write \('weight',\)\."
    ):
        derive(slow="weight")
    own = torch.nn.Linear(4, 4)
    own.slow = "bias"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(df.DerivationError, match=r"the learner's own slow is 'bias'; expected .*\('bias',\)"):
        derive(learner=own)
    assert list(derive(slow=(n for n in ["bi*"])).parts.slow) == ["bias"]


def test_parts_called_slow_are_parts():
    class Fast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slow, self.fast = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.fast(x.tanh() + self.slow(x))

    assert set(derive(learner=Fast()).parts.fast) == {"slow.weight", "slow.bias", "fast.weight", "fast.bias"}


def test_a_target_is_a_word_of_two():
    class Own(torch.nn.Module):
        target: Any = torch.zeros(4)

        def forward(self, p, t):
            return (p - t - self.target).square().sum(-1)

    assert derive(objective=Own()).target == "v"
    own = Own()
    own.target = "v - k"
    with pytest.raises(df.DerivationError, match=r"the objective's target is 'v - k'; expected 'v' or 'v-k'"):
        derive(objective=own)


def from_second(first, later):
    """A learner that builds one thing for the first head and another for all others."""
    made = []
    return lambda f: (made.append(1), first(f) if len(made) == 1 else later(f))[1]


def broken(f):
    raise KeyError("x")


LEARNERS = {
    "wider": (lambda f: torch.nn.Linear(f, f + 1), "learner is Linear, which gives V = 5; expected .* dim / heads = 4"),
    "no width": (lambda f: torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(f, 3)), "gives V = 3; expected"),
    "of another": (lambda f: torch.nn.Linear(f + 1, f), "is Linear, which takes tokens of width 5; expected .* = 4"),
    "of none": (lambda: 3, r"learner failed at 4 with TypeError: .* takes 0 positional .*; expected .* learner\(4\)"),
    "of two": (torch.nn.Linear, "learner failed at 4 with TypeError: .* 'out_features'"),
    "broken": (broken, "learner failed at 4 with KeyError: 'x'"),
    "in words": (lambda f: int("a"), "learner failed at 4 with ValueError: invalid literal"),
    "a number": (lambda f: 3, "learner made 3; expected what builds an nn.Module"),
    "nothing": (lambda f: None, "learner made None; expected"),
    "a class": (lambda f: torch.nn.Linear, "learner made <class .*Linear'>; expected"),
    "a spec": (lambda f: df.learners.MLP(), r"learner made learners.MLP\(\); expected"),
    "second": (from_second(lambda f: torch.nn.Linear(f, f), lambda f: 3), "learner made 3"),
    "other shapes": (
        from_second(*(lambda f, h=h: torch.nn.Sequential(torch.nn.Linear(f, h), torch.nn.Linear(h, f)) for h in (5, 6))),
        r"made parameters .*\(6, 4\).* for head 2; expected those of the first = .*\(5, 4\)",
    ),
    "other names": (
        from_second(*(lambda f, b=b: torch.nn.Linear(f, f, bias=b) for b in (False, True))), "parameters .*bias.* for head 2",
    ),
    "lazy": (torch.nn.LazyLinear, "'weight' has no shape yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_that_does_not_fit_is_refused_where_it_is_given(name):
    learner, words = LEARNERS[name]
    with pytest.raises(df.DerivationError, match=words):
        layer(learner=learner)


OBJECTIVES = {
    "record": (df.objectives.Squared, r"objectives.build: objectives.Squared\(.* is not a spec; .* Call it: Squared\(\)"),
    "class": (torch.nn.MSELoss, r"objective is <class '.*MSELoss'>; expected f\(prediction, target\)"),
    "own class": (Objective, "objective is <class '.*Objective'>"),
    "factory": (lambda: loss, r"objective takes \(\); expected a function of two: f\(prediction, target\)"),
    "of one": (lambda p: p, r"objective takes \(p\); expected a function of two"),
    "by name": (lambda p, *, t: p, r"objective takes \(p, \*, t\); expected a function of two"),
    "misspelt": ("sqared", "no record is called 'sqared'. Did you mean 'Squared'"),
    "rule": (df.rules.SGD(), r"objectives.build: rules.SGD\(\) belongs to the catalogue 'rules'"),
    "of targets": (lambda p, t: t.square().sum(-1), "loss has no gradient by the prediction"),
    "constant": (lambda p, t: torch.ones_like(p[..., 0]), "loss has no gradient by the prediction"),
    "compared": (lambda p, t: (p > t).sum(-1).to(p), "loss has no gradient by the prediction"),
    "by place": (lambda p, t: torch.arange(len(p)).to(p), "losses are not made of their own tokens alone"),
}  # fmt: skip
RULES = {
    "record": (df.rules.SGD, r"rules.build: rules.SGD\(.* is not a spec; .* Call it: SGD\(\)"),
    "class": (df.Rule, r"rule is <class '.*Rule'>; expected a df.Rule\(step=...\), or a spec"),
    "optimiser": (torch.optim.SGD, "rule is <class '.*SGD'>; expected a df.Rule"),
    "built optimiser": (torch.optim.SGD([torch.ones(1)], lr=0.1), "rules.build: SGD .* is not a spec"),
    "factory": (lambda: df.Rule(step), "rule is <function .*; expected a df.Rule"),
    "step": (step, "rule is <function step .*; expected a df.Rule"),
    "misspelt": ("SDG", "no record is called 'SDG'. Did you mean 'SGD'"),
    "objective": (df.objectives.Squared(), r"rules.build: objectives.Squared\(\) belongs to"),
    "options": ({"lr": 0.1}, "rules.build: {'lr': 0.1} is not a spec"),
}


@pytest.mark.parametrize(
    ("part", "name"), [*(("objective", n) for n in OBJECTIVES), *(("rule", n) for n in RULES)], ids=str
)
def test_an_objective_or_rule_that_is_none_is_refused_where_it_is_given(part, name):
    given, words = (OBJECTIVES if part == "objective" else RULES)[name]
    for make in (derive, layer):
        with pytest.raises(ValueError, match=words):
            make(**{part: given})


STEPS = {
    "a crash": (lambda i, lr: {}["a"], r"step failed on tensors of shape \(\) with KeyError: 'a'; expected step\(i, lr\)"),
    "a division": (lambda i, lr: 1 // 0, "with ZeroDivisionError"),
    "a shape": (lambda i, lr: df.Step(((i.reshape(7),),), (lr,), (1.0,), 1.0), "with RuntimeError: shape"),
    "an index": (lambda i, lr: df.Step(((i[0],),), (lr,), (1.0,), 1.0), "with IndexError"),
    "nothing": (lambda i, lr: None, "step failed .* with AttributeError"),
    "no Step": (lambda i, lr: (((1.0,),), (lr,), (1.0,), 1.0), "step failed .* with AttributeError"),
    "flat": (lambda i, lr: df.Step((1.0,), (lr,), (1.0,), 1.0), "step failed .* with TypeError"),
    "a word": (lambda i, lr: df.Step((("a",),), (lr,), (1.0,), 1.0), "an entry of step is 'a'; expected a number or a tensor"),
    "none": (lambda i, lr: df.Step(((1.0,),), (None,), (1.0,), 1.0), "an entry of step is None"),
    "none at the end": (lambda i, lr: df.Step(((1.0,),), (lr,), (1.0,), None), "an entry of step is None"),
    "complex": (lambda i, lr: df.Step(((1j,),), (lr,), (1.0,), 1.0), "an entry of step is 1j"),
    "no gate": (lambda i: df.Step(((1.0,),), (1.0,), (1.0,), 1.0), r"expected step\(i, lr\) -> Step"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_what_a_rules_step_gives_is_typed(name):
    made, words = STEPS[name]
    with pytest.raises(ValueError, match=words):
        df.Rule(step=made)


# -- types of numbers, and numbers of rows

TYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("types", itertools.product(TYPES, repeat=3), ids=str)
def test_the_widest_type_is_computed_in(types):
    """o has q's; what is given in float64 is not rounded, whichever of q, k, v and the fast weights it is."""
    torch.manual_seed(0)
    learner = torch.nn.Linear(4, 4)
    program, x = df.derive(learner, chunk=3, prove=False), torch.randn(3, 1, 7, 2, 4).double()
    q, k, v = (part.to(kind) for part, kind in zip(x, types, strict=True))
    o, state = program(q, k, v)
    is_wide = torch.float64 in types
    assert (o.dtype, state.anchor["weight"].dtype) == (types[0], torch.float64 if is_wide else torch.float32)
    if is_wide:
        _, want = df.derive(learner, chunk=3, prove=False)(q.double(), k.double(), v.double())
        torch.testing.assert_close(state.anchor["weight"], want.anchor["weight"], rtol=1e-12, atol=1e-12)


def test_fast_weights_of_float64_are_not_rounded():
    program, x = df.derive(torch.nn.Linear(4, 4), chunk=3, prove=False), torch.randn(1, 7, 2, 4)
    own = {"weight": torch.randn(4, 4).double()}
    start = program.initial_state(1, 2, own)
    assert torch.equal(start.anchor["weight"][0, 0], own["weight"])
    o, state = program(x, x, x, params=own)
    assert (o.dtype, state.anchor["weight"].dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(program(x, x, x, state=start, params=own)[0], o)


@pytest.mark.parametrize("options", [{}, {"share_qk": False}, {"use_gate": True}], ids=str)
@pytest.mark.parametrize(("own", "given"), itertools.permutations(TYPES, 2), ids=str)
def test_a_layer_names_numbers_of_another_type(options, own, given):
    made, x = layer(**options).to(own), torch.ones(1, 5, 8, dtype=given)
    words = rf"x has dtype {given}; expected the parameters' = {own}\. Pass x\.to\({own}\)"
    with pytest.raises(ValueError, match=words):
        made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if torch.float64 not in (own, given):  # which autocast leaves as it is
            assert made(x)[0].dtype == torch.bfloat16
            return
        with pytest.raises(ValueError, match=words):
            made(x)


def test_numbers_of_another_type_on_no_device_are_named():
    made = layer().to("meta")  # which autocast does not know
    assert made(torch.ones(1, 5, 8, device="meta"))[0].is_meta
    with pytest.raises(ValueError, match=r"x has dtype torch.float64; expected the parameters' = torch.float32"):
        made(torch.ones(1, 5, 8, dtype=torch.float64, device="meta"))


@pytest.fixture(scope="module")
def small():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    sizes |= {"pad_token_id": None, "num_labels": 3, "layer_types": ["test_time", "full_attention"]}
    return DualformConfig(preset="tiny-ttt-linear", **sizes)


def heads(small):
    import copy

    kinds = (
        df.DualformForCausalLM,
        df.models.DualformForTokenClassification,
        df.models.DualformForSequenceClassification,
    )
    return [kind(copy.deepcopy(small), prove=False) for kind in kinds]


def test_embeddings_of_another_type_are_named(small):
    model = df.DualformForCausalLM(small, prove=False)
    for kind in (torch.float64, torch.bfloat16):
        with pytest.raises(
            ValueError, match=rf"inputs_embeds has dtype {kind}; expected the parameters' = torch.float32"
        ):
            model(inputs_embeds=torch.ones(1, 3, 16, dtype=kind))


@pytest.mark.parametrize("wrong", [-1, -100, 11, 2**40])
def test_ids_of_no_row_are_named(small, wrong):
    ids = torch.tensor([[1, 2, wrong]])
    for model in heads(small):
        with pytest.raises(ValueError, match=rf"input_ids holds {wrong}; expected ids in 0 \.\.\. vocab_size - 1 = 10"):
            model(input_ids=ids)


@pytest.mark.parametrize("wrong", [-1, -99, 11, 2**40])
def test_labels_of_no_class_are_named(small, wrong):
    """By their value, with the number of classes and what -100 means; in each head, whatever brings them."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    lm, tokens, texts = heads(small)
    bad = torch.tensor([[0, 1, wrong], [-100, 2, 0]])
    for run, classes in (
        (lambda: lm(input_ids=ids, labels=bad), 11), (lambda: lm(input_ids=ids, labels=ids, shift_labels=bad), 11),
        (lambda: tokens(input_ids=ids, labels=bad), 3), (lambda: texts(input_ids=ids, labels=bad[0, 1:]), 3),
    ):  # fmt: skip
        words = rf"labels holds {wrong}; expected classes in 0 \.\.\. {classes - 1}, .* -100 where none counts"
        with pytest.raises(ValueError, match=words):
            run()


def test_labels_of_another_kind_are_named(small):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    lm, tokens, _ = heads(small)
    for kind in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=rf"labels has dtype {kind}; expected whole numbers"):
            lm(input_ids=ids, labels=ids.to(kind))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 2\); expected the logits' = \(2, 3\)"):
        tokens(input_ids=ids, labels=torch.zeros(2, 2, dtype=torch.long))
    want = lm(input_ids=ids, labels=ids).loss
    for kind in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(lm(input_ids=ids, labels=ids.to(kind)).loss, want)


def test_nothing_is_looked_at_where_values_are_hidden(small, monkeypatch):
    """A compiled loss has no question in it; and a GPU that trains is not waited for."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    lm = df.DualformForCausalLM(small, prove=False)
    run = torch.compile(lambda ids: lm(input_ids=ids, labels=ids).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(ids), lm(input_ids=ids, labels=ids).loss)

    class Far(torch.Tensor):  # a tensor that says that it lies on a GPU, and whose values nobody may ask for
        is_cuda = property(lambda self: True)
        aminmax = property(lambda self: pytest.fail("a GPU was waited for"))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    far = torch.full((2, 3), 99).as_subclass(Far)
    check_ids(far, 11)
    check_labels(far, torch.zeros(2, 3, 11), -100)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 99"):
        check_ids(torch.full((2, 3), 99), 11)

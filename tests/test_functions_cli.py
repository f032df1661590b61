"""`dualform functions`: every record of every family is listed, described and drawn."""

import json

import pytest

from dualform.cli import main
from dualform.cli.functions import _characters, _terminal, draw
from dualform.functions.describe import Curves, Image, describe, example, families, picture


def run(capfd, *arguments):
    status = main(["functions", *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_the_list_is_the_catalogues(capfd):
    status, out, _ = run(capfd, "--json")
    assert status == 0
    listed = {(row["family"], row["name"]) for row in json.loads(out)}
    assert listed == {(family, name) for family, catalogue in families.items() for name in catalogue}
    assert all(row["equation"] for row in json.loads(out))
    _, table, _ = run(capfd, "fusions")
    assert "fusions" in table
    assert "expansions" not in table
    assert [run(capfd, "compressions")[1], run(capfd, "compressions", "--json")[1]] == [
        "compressions: none as yet\n",
        "[]\n",
    ]
    assert "[sinh x, cosh x, tanh x]" in run(capfd, "expansions")[1]


RECORDS = [(family, name) for family, catalogue in families.items() for name in catalogue]


@pytest.mark.parametrize("pair", RECORDS, ids="-".join)
def test_every_record_describes_itself_and_has_a_picture(pair):
    family, name = pair
    record = families[family][name]
    text = describe(family, record)
    assert text.equation
    assert text.source
    made = example(record)
    if family == "networks":
        return
    assert text.sizes, "no size rule"
    what = picture(family, made)
    if isinstance(what, Image):
        assert len({len(row) for row in what.rows}) == 1
        assert what.title in _characters(what)
    else:
        assert isinstance(what, Curves)
        assert what.lines
        assert all(len(line) == len(what.t) for line in what.lines.values())
        assert what.title in _terminal(what)


@pytest.mark.parametrize("name", ["expansions.bspline", "reconciliations.hm"])
def test_a_picture_is_drawn(name):
    family, _, short = name.partition(".")
    figure = draw(picture(family, families[family][short]()))
    assert len(figure.axes) >= 1
    assert figure.axes[0].get_title(loc="left").startswith(short)


def test_a_record_is_described(capfd):
    status, out, _ = run(capfd, "taylor_expansion", "--set", "degree=3", "symmetric=true")
    assert status == 0
    assert "m = 100: D = 176,850" in out
    assert "degree=3, symmetric=True" in out
    (found,) = json.loads(run(capfd, "lorr", "--json")[1])
    assert found["sizes"]["n = 6, D = 12"] == "l = 36"
    status, out, _ = run(capfd, "identity")
    assert [f"{family}.identity" in out for family in ("expansions", "reconciliations", "remainders")] == [True] * 3


def test_a_png_is_written(capfd, tmp_path):
    status, out, _ = run(capfd, "expansions.chebyshev", "--set", "degree=5", "--png", tmp_path / "t.png")
    assert status == 0
    assert f"wrote {tmp_path / 't.png'}" in out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["taylr"], "Did you mean 'taylor'"),
        (["expansion.taylor"], "'expansion' is no family. Did you mean 'expansions'"),
        (["expansions.lorr"], "no record is called 'expansions.lorr'"),
        (["taylor", "--set", "degree"], "'degree' is no option; expected key=value"),
        (["taylor", "--set", "degre=2"], "Did you mean 'degree'"),
        (["identity", "--png", "x.png"], "in several families"),
        (["--png", "x.png"], "are of one record"),
        (["networks.mlp", "--png", "x.png"], "has no picture"),
    ],
)
def test_bad_usage_is_one_line(capfd, words, says):
    status, _, err = run(capfd, *words)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    status, _, err = run(capfd, "taylor", "--set", "degree=0")
    assert status == 1
    assert "degree is 0" in err

"""The table of versions is what was seen, and its rows are what the package says it stands on."""

import json
import re
import sys
import tomllib

import matrix
import pytest


def test_the_page_is_made_from_the_record():
    kept = json.loads(matrix.RECORD.read_text())
    assert matrix.PAGE.read_text() == matrix.page(kept)
    for row in kept:
        assert row.keys() - {"why"} == {"date", "python", *matrix.WATCHED, "passed", "failed", "skipped", "seconds"}
        assert row["passed"] > 1000
        assert sorted(row.get("why", {})) == row["failed"]  # nothing fails without a word


def test_rows_are_read_from_what_the_package_asks_for():
    rows = matrix.rows()
    assert f"torch=={matrix.floors()['torch']}.*" in rows["floor"][1]
    assert f"torch=={matrix.pinned('torch')}" in rows["pinned"][1]
    assert set(matrix.floors()) == set(matrix.WATCHED)
    for name in matrix.CORE:
        assert (matrix.ROOT / "tests" / f"test_{name}.py").exists()


def test_no_extra_asks_for_more_than_another():
    """A build of torch brings its own triton, by its exact version:
    a higher floor in one extra leaves no environment."""
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    floors: dict[str, set[str]] = {}
    for line in asked:
        name, floor = re.match(r"([\w-]+)(?:\[\w+\])?(.*)", line).groups()
        floors.setdefault(name, set()).add(floor)
    assert {name: found for name, found in floors.items() if len(found) > 1} == {}


def test_a_row_takes_the_place_of_the_one_with_its_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RECORD", tmp_path / "versions.json")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "versions.md")
    row = {"date": "2026-01-02", "python": "3.11.7", "passed": 5, "failed": ["test_x::y"], "skipped": 0, "seconds": 9}
    row |= dict(zip(matrix.WATCHED, ("2.11.0", "5.17.0", "1.6.1", "1.26.4"), strict=True))
    older = {"torch": "2.9.1", "why": {"test_x::y": "numpy is too old"}}
    for change in ({}, older, {"date": "2026-02-03", "failed": []}, {"torch": "2.9.1", "date": "2026-02-04"}):
        matrix.record(row | change)
    kept = json.loads(matrix.RECORD.read_text())
    assert [(r["torch"], r["date"]) for r in kept] == [("2.9.1", "2026-02-04"), ("2.11.0", "2026-02-03")]
    text = matrix.PAGE.read_text()
    assert "| 2.11.0 | 5.17.0 | 1.6.1 | 1.26.4 | 3.11.7 | 2026-02-03 | 5 | - |" in text
    assert "Failed with torch 2.9.1, transformers 5.17.0, Python 3.11.7:\n\n- `test_x::y`: numpy is too old" in text


def test_a_python_that_does_not_run_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    with pytest.raises(FileNotFoundError, match=r"no python3\.99 on PATH that runs"):
        matrix.interpreter("3.99")
    shim.write_text("#!/bin/sh\nexit 0\n")
    assert matrix.interpreter("3.99") == str(shim)


def test_an_unknown_row_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["matrix.py", "oldest"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "there is no row 'oldest'; expected floor, pinned" in capsys.readouterr().err

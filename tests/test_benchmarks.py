"""Every table of results is made from the JSON beside it, by the script of its name; nothing names a machine's path."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "harness")


def test_every_script_has_a_result_and_every_result_a_script():
    results = {p.stem for p in (FOLDER / "results").iterdir()} - {"hidden_states"}  # of examples/hidden_states.py
    assert results == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_is_its_jsons(name, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FOLDER))
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert {"machine", "versions", "commit"} <= found.keys()
    assert importlib.import_module(name).report(found) == (FOLDER / "results" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["harness", *SCRIPTS])
def test_machine_facts_processes_and_tables_are_the_harnesss(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert "/work/" not in text
    if name != "harness":
        assert "import harness" in text
        for word in ("platform.", 'clear_refs"', "rev-parse", "getloadavg", "cpu_count()}", "|---"):
            assert word not in text, f"{name} does by itself what the harness does: {word}"

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


def test_only_what_is_exact_counts_as_recovered(monkeypatch):
    pytest.importorskip("sklearn")
    sympy = pytest.importorskip("sympy")
    monkeypatch.syspath_prepend(str(FOLDER))
    symbolic = importlib.import_module("symbolic")
    known = symbolic.formulas()
    assert (len(known), sum("test" in number for number in known)) == (120, 20)
    m, v, u, w = sympy.symbols("m v u w", real=True)
    right = m * (v**2 + u**2 + w**2) / 2
    for found in (right, right + 2, 0.3 * right, -right, sympy.expand(right)):
        assert symbolic.is_recovered(found, *known["I.13.4"])
    for found in (right * m, right + w * 1e-9, m * (v**2 + u**2 + 1.0000001 * w**2) / 2, sympy.Integer(0)):
        assert not symbolic.is_recovered(found, *known["I.13.4"])
    assert symbolic.simple(1 / (8 * 3.141592653589793), 1e-6) == 1 / (8 * sympy.pi)

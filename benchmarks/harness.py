"""What every benchmark shares: options, one thread unless asked for more, what ran where, rounds in turn, JSON, tables.

Import it first: `OMP_NUM_THREADS` is 1 unless it is set, since libraries that each take all cores may wait for each
other for ever. A result is two files beside each other: JSON with machine, versions, commit, settings and what was
measured (median, least, most and number of samples, not the samples), and a Markdown table for the docs, which
`--report` makes again from the JSON.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Found = dict[str, Any]
Run = Callable[[], Any]


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make a parser of an option per default: a list takes several words, False is a flag, a type has no default.

    Every script has --output FILE, and --report, which makes the table again from the JSON there and measures nothing.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result = HERE / "results" / f"{Path(sys.argv[0]).stem}.json"
    for name, value in (defaults | {"output": result, "report": False}).items():
        flag, kind = f"--{name.replace('_', '-')}", value if isinstance(value, type) else type(value)
        if kind is bool:
            found.add_argument(flag, action="store_true")
        elif kind is list:
            found.add_argument(flag, nargs="+", type=type(value[0]), default=value)
        else:
            found.add_argument(
                flag, type=type(result) if value is result else kind, default=None if value is kind else value
            )
    return found


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Read the command line by `parser`."""
    return parser(doc, **defaults).parse_args()


# -- what ran, and where
# -------------------------------------------------------------------------------------------------


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE, check=False).stdout.strip()


def load() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()]


def machine(**more: Any) -> Found:
    """Describe processor, cores, load and, where torch is loaded, its threads and the GPU."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    found: Found = {
        "processor": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "vectors": next((name for name in ("amx_tile", "avx512f", "avx2") if name in info), "unknown"),
        "load": load(),
    }  # fmt: skip
    if (torch := sys.modules.get("torch")) is not None:
        found["threads"] = torch.get_num_threads()
        found |= {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return found | more


def about(*packages: str, **more: Any) -> Found:
    """Say what ran where: machine, versions, commit, date. Call it before anything is measured, for the load."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "dualform", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    changed = bool(git("status", "--porcelain", "--", "../src", "*.py"))
    return {
        "machine": machine(**more), "versions": versions, "commit": git("rev-parse", "HEAD"), "uncommitted": changed,
        "date": date.today().isoformat(),
    }  # fmt: skip


# -- time
# ----------------------------------------------------------------------------------------------------------------


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call."""
    start = clock()
    run()
    return clock() - start


def alternating(sides: Mapping[Any, Run], rounds: int, warm: int = 1, clock: Callable[[Run], float] = seconds) -> Found:
    """Time each side once a round, in an order that turns by one; the first `warm` rounds are not counted."""
    found: Found = {name: [] for name in sides}
    names = list(sides)
    for r in range(warm + rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            spent = clock(sides[name])
            if r >= warm:
                found[name].append(spent)
    return found


def repeated(run: Run, least: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call as the mean over so many that they last at least so long."""
    start, count = clock(), 0
    while True:
        run()
        count += 1
        if (spent := clock() - start) >= least:
            return spent / count


def quartiles(xs: Sequence[float]) -> tuple[float, float, float]:
    if len(xs) == 1:
        return xs[0], xs[0], xs[0]
    low, middle, high = statistics.quantiles(xs, n=4, method="inclusive")
    return low, middle, high


def summary(samples: Sequence[float], scale: float = 1.0, digits: int = 8) -> Found:
    """Keep what tables quote of samples, to so many significant digits: median, least, most, how many."""
    if not samples:
        return {}
    found = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return {name: float(f"{scale * x:.{digits}g}") for name, x in found.items()} | {"n": len(samples)}


# -- memory
# --------------------------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """Read a line of this process's status in bytes: VmRSS is the resident set, VmHWM its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def growth(run: Run) -> tuple[Any, int]:
    """Return a call's result, and how far the resident set rose during it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = run()
    return result, max(status("VmHWM") - before, 0)


# -- processes
# -----------------------------------------------------------------------------------------------------------


def alone(
    words: Sequence[Any], environment: Mapping[str, str] | None = None, python: str = sys.executable,
    limit: float = 3600
) -> Iterator[Found]:  # fmt: skip
    """Run this script with such words in a process of its own, so many seconds at most;
    yield its JSON lines as they come.

    The last line is {"failed": why} if it fails.
    """
    command = [python, sys.argv[0], *map(str, words)]
    env = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            late = threading.Timer(limit, process.kill)
            late.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            process.wait()
            late.cancel()
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["time is up"])[-1][:200]
            yield {"failed": f"exit status {process.returncode}: {last}"}


# -- files
# ---------------------------------------------------------------------------------------------------------------


def shown(x: Any, digits: int = 1) -> str:
    if isinstance(x, float) and math.isnan(x):
        return "-"
    return "-" if x is None else f"{x:.{digits}f}" if isinstance(x, float) else str(x)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 1) -> str:
    """Spell a Markdown table."""
    lines = [header, ["---"] * len(header), *([shown(x, digits) for x in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else "Not measured.\n"


def rows_table(rows: Sequence[Mapping[str, Any]], digits: int = 1) -> str:
    """Spell rows of named cells; a cell that a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table(names, [[row.get(name, "") for name in names] for row in rows], digits)


def spelt(x: Any, indent: str = "\n") -> str:
    """Spell JSON with what holds no lists and no mappings on a line of its own."""
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    if not any(isinstance(value, dict | list) for value in inner):
        return json.dumps(x)
    deeper = indent + " "
    if isinstance(x, dict):
        parts = [f"{json.dumps(key)}: {spelt(value, deeper)}" for key, value in x.items()]
        return f"{{{deeper}{f',{deeper}'.join(parts)}{indent}}}"
    return f"[{deeper}{f',{deeper}'.join(spelt(value, deeper) for value in x)}{indent}]"


def write(output: Path, found: Found, report: Callable[[Found], str]) -> None:
    """Write the JSON, and the table beside it."""
    output.write_text(spelt(found) + "\n")
    output.with_suffix(".md").write_text(report(found))


def main(
    measure: Callable[[argparse.Namespace], Found], report: Callable[[Found], str], options: argparse.Namespace,
    *packages: str
) -> Found:  # fmt: skip
    """Measure, or with --report read what was measured; write both files and print the table. packages:
    whose versions matter."""
    if options.report:
        found = json.loads(options.output.read_text())
    else:
        found = about(*packages) | measure(options)
        found["machine"]["load_after"] = load()
    write(options.output, found, report)
    print(report(found))
    return found

"""What the benchmarks write: a JSON file with the machine, the settings and every row, and the rows as a Markdown table."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dualform.cli.output import show


def write(
    output: Path, title: str, load: tuple[float, ...], settings: dict[str, Any], rows: list[dict[str, Any]],
    digits: int = 1, machine: dict[str, Any] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Write `output` and the table beside it, and print the table. load: the load average before the run."""
    about = {
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg(), "date": date.today().isoformat(),
    }  # fmt: skip
    found = {"machine": about | (machine or {}), "settings": settings, "rows": rows}
    output.write_text(json.dumps(found | more, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append([f"{x:.{digits}f}" if isinstance(x, float) else str(x) for x in cells])
    output.with_suffix(".md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    show(rows, f"{title}, {settings}")

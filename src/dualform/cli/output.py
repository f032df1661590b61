"""What every verb shares: tables for people or JSON for machines, and where a model comes from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dualform.models import DualformForCausalLM
from dualform.models.configuration import gather_code
from dualform.models.folder import model_folder
from dualform.train.run import newest_whole

AsJson = Annotated[bool, Parameter(name="--json", negative="")]
TrustCode = Annotated[bool, Parameter(name="--trust-code", negative="")]
Words = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]


class UsageError(ValueError):
    """An argument that names nothing, or does not fit another."""


def show(rows: Sequence[Mapping[str, Any]], title: str = "", as_json: bool = False, file: TextIO | None = None) -> None:
    """Print rows as a table, numbers with four digits, or as a JSON list of objects. file: default stdout."""
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    # A pipe or a file has no width to fold a name at.
    out = file or sys.stdout
    Console(file=out, width=None if out.isatty() else 1000).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else escape(str(value))  # [x] is no markup


def tell_trusted(folder: Path) -> None:
    """Let the code run that came with a model, saying what that is."""
    for said in gather_code(folder, {"local_files_only": True}, trusted=True):
        print(f"dualform: code of the model runs: {said}", file=sys.stderr)


def load_model(folder: str, trust_code: bool = False) -> tuple[DualformForCausalLM, PreTrainedTokenizerFast]:
    """Read a model and its tokenizer from the folder that `train` wrote; say what code of it runs if it is trusted."""
    path = model_folder(folder)
    if not (path / "config.json").exists():
        whole, _ = newest_whole(path)
        advice = f"`train --resume` ends the run; or pass {whole}." if whole else "Pass the folder that `train` wrote."
        raise UsageError(f"{folder} is no model; expected a folder with config.json. {advice}")
    if trust_code:
        tell_trusted(path)
    model = DualformForCausalLM.from_pretrained(path, local_files_only=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError):
        raise UsageError(
            f"{folder} holds no tokenizer; expected tokenizer.json beside config.json. Copy the files of the model's "
            "tokenizer there."
        ) from None
    return model.eval(), tokenizer

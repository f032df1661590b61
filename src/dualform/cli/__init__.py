"""The command line: one verb per file. Exit status 0, 1 (failed), 2 (bad usage)."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts import convert as converted
from transformers.utils import logging

from dualform.catalogue import CatalogueError
from dualform.cli.bench import bench
from dualform.cli.cache import cache
from dualform.cli.convert import convert
from dualform.cli.evaluate import evaluate
from dualform.cli.explain import explain
from dualform.cli.functions import functions
from dualform.cli.generate import generate
from dualform.cli.output import UsageError
from dualform.cli.presets import list_presets
from dualform.cli.train import train
from dualform.train.settings import SettingsError
from dualform.train.training import TrainingDiverged


def read_words(kind: Any, words: Sequence[Token]) -> Any:
    """Read what stands on the command line as cyclopts does, but round nothing: 1.5 steps are a mistake."""
    value = converted(kind, words)
    for word in words if kind is int else ():
        if "." in word.value and float(word.value) != value:
            raise ValueError(f"it is {word.value}; expected a whole number.")
    return value


app = App(
    name="dualform",
    default_parameter=Parameter(converter=read_words),
    help="Sequence layers that learn at test time: train, generate, evaluate, explain, convert, bench; "
    "functions that such layers are made of. --debug anywhere shows where an error came from.",
    version_flags=[],
)
for verb in (train, generate, explain, evaluate, convert, functions, bench, cache):
    app.command(verb)
app.command(list_presets, name="presets")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status. An error is one line on stderr, a traceback with --debug only."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, arguments = "--debug" in arguments, [word for word in arguments if word != "--debug"]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders here
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return 2
    except Exception as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in ("matplotlib", "plotille"):
        text = f"plots need the package {error.name!r}; expected the extra 'viz'. Run `pip install \"dualform[viz]\"`."
    elif not isinstance(error, (ValueError, OSError, TrainingDiverged, ModuleNotFoundError)):
        first = text.strip().partition("\n")[0].rstrip(".")
        text = f"{type(error).__name__}: {first}. This was not foreseen; --debug shows where it came from."
    print(f"dualform: {text}", file=sys.stderr)
    return 2 if isinstance(error, (UsageError, SettingsError, CatalogueError)) else 1

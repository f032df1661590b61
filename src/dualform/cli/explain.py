"""`dualform explain`: the derivation of a preset, a model, a learner in a file, or a formula."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from torch import nn

from dualform.calculus import explain as explain_function
from dualform.cli.expression import compile_expression, parse_shapes
from dualform.cli.output import UsageError, load_model
from dualform.learning.layer import TestTimeTraining
from dualform.learning.program import derive
from dualform.learning.rules import rules
from dualform.models import DualformConfig, presets
from dualform.models.causal_lm import learning_layer


def explain(
    target: str,
    /,
    *,
    dim: int = 64,
    shapes: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    wrt: str | None = None,
    format: Literal["text", "latex", "html"] = "text",
) -> None:
    """Show sites, structured derivatives, chosen forms, costs and the program; or the derivative of a formula.

    Parameters
    ----------
    target
        A preset, a folder that `train` wrote, FILE.py:NAME (NAME(dim) makes a module), or, with --shapes, a formula such
        as "x + y" or a FILE.py:NAME that is a function of tensors.
    dim
        The width that a learner from a file is made with.
    shapes
        The arguments and their shapes: --shapes x=2 y=2,2.
    wrt
        Which argument to differentiate by. Default the first.
    format
        text, latex or html.
    """
    found = _of_tensors(target, shapes, wrt) if shapes else _of_learner(target, dim)
    if format == "latex":
        print(found.to_latex())
    elif format == "html":
        print(found._repr_html_())
    else:
        print(found)


def _of_tensors(target: str, words: list[str], wrt: str | None) -> Any:
    shapes = parse_shapes(words)
    names = list(shapes)
    if wrt is not None and wrt not in names:
        raise UsageError(f"explain: --wrt is {wrt!r}; expected one of {', '.join(names)}.")
    function = load_object(target) if is_file_object(target) else compile_expression(target, names)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5 for shape in shapes.values()]
    return explain_function(function, *tensors, wrt=0 if wrt is None else names.index(wrt))


def _of_learner(target: str, dim: int) -> Any:
    if is_file_object(target):
        learner = load_object(target)(dim)
        if not isinstance(learner, nn.Module):
            raise UsageError(
                f"explain: {target} made a {type(learner).__name__}; expected NAME(dim) to make an nn.Module. For a function of "
                "tensors pass --shapes."
            )
        return derive(learner, rule=rules.SGD(lr=0.1)).explain()
    if target in presets:
        return learning_layer(DualformConfig(preset=target, layer_types=["test_time"])).explain()
    if Path(target).is_dir():
        model, _ = load_model(target)
        for layer in model.modules():
            if isinstance(layer, TestTimeTraining):
                return layer.explain()
        raise UsageError(f"explain: no layer of {target} learns at test time; expected a 'test_time' layer.")
    if not target.replace("-", "").replace("_", "").isalnum():
        raise UsageError(
            f"explain: {target!r} is no preset, folder or FILE.py:NAME; for a formula pass --shapes x=2 y=2,2."
        )
    return presets[target]  # raises, with the near misses


def is_file_object(target: str) -> bool:
    path, _, name = target.rpartition(":")
    return path.endswith(".py") and name.isidentifier()


def load_object(target: str) -> Callable[..., Any]:
    """Import FILE.py and return its NAME."""
    path, _, name = target.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"explain: {path} is no file; expected FILE.py:NAME.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"explain: {path} has no {name!r} to call; it defines {', '.join(defined) or 'nothing'}.")
    return getattr(module, name)

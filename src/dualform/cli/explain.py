"""`dualform explain`: the derivation of a preset, a model, a learner in a file, or a formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from html import escape
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from torch import nn

from dualform.calculus import Derivative, jacobian
from dualform.catalogue import near_misses
from dualform.cli.expression import compile_expression, drawn, expect_used, parse_shapes
from dualform.cli.output import TrustCode, UsageError, Words, load_model
from dualform.learning.layer import TestTimeTraining
from dualform.learning.learners import learners
from dualform.learning.program import derive
from dualform.learning.rules import rules
from dualform.models import DualformConfig, presets
from dualform.models.blocks import learning_layer
from dualform.own_code import CodeError, is_path, load
from dualform.shapes import TraceError


def explain(
    target: str, /, *, dim: int | None = None, shapes: Words = None, wrt: str | None = None, axes: str | None = None,
    level: Literal["one-line", "steps", "proof"] | None = None,
    format: Literal["text", "latex", "html"] | None = None, json: Annotated[bool, Parameter(negative="")] = False,
    trust_code: TrustCode = False,
) -> None:  # fmt: skip
    """Show sites, structured derivatives, chosen forms, costs and the program; or the derivative of a formula.

    Args:
        target: A preset, a folder that `train` wrote, FILE.py:NAME (NAME(dim) makes a module), or, with --shapes, a
            formula such as "x + y" or a FILE.py:NAME that is a function of tensors.
        dim: The width of a head: what a learner from a file is made with (default 64), and a preset beside its own.
        shapes: The arguments and their shapes: --shapes x=2 y=2,2; whole numbers and masks: k=3:int m=3:bool.
        wrt: Which argument to differentiate by. Default the first of floating numbers.
        axes: Names of the axes of a formula's arguments and result: --axes "i j, j l -> i l".
        level: How much to say: one-line, steps (the default) or proof.
        format: text (the default), latex or html (a page that stands alone).
        json: Print the steps of a formula as JSON.
        trust_code: Let code run that came with a model, its learner's own file, and say which; without this it is
            refused, unless you ran the same file before on this machine.
    """
    if not shapes and (json or axes is not None or wrt is not None):
        raise UsageError("explain: --json, --axes and --wrt are for formulas; expected --shapes x=2 y=2,2 with them.")
    for name, value, other in (("--dim", dim, shapes), ("--format", format, json), ("--level", level, json)):
        if other and value is not None:
            beside = "--json, which tells all" if other is json else "--shapes, which say every size"
            raise UsageError(f"explain: {name} is {value!r} beside {beside}; expected one of them. Leave one out.")
    if dim is not None and dim < 1:
        raise UsageError(f"explain: --dim is {dim}; expected a width >= 1. Leave it out for 64, or a preset's own.")
    try:
        found = _of_tensors(target, shapes, wrt, axes) if shapes else _of_learner(target, dim, trust_code)
        text = _written(found.explain(level or "steps"), target, format or "text", json)
    except ArithmeticError as error:
        raise UsageError(f"explain: {target} cannot be computed ({error}); expected numbers. Change it.") from error
    print(text)


def _written(found: Any, target: str, format: str, json: bool) -> str:
    if json:
        return dumps(found.to_dict(), indent=2, ensure_ascii=False)
    if format == "html":
        return f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(target)}</title>\n{found._repr_html_()}'
    return found.to_latex() if format == "latex" else str(found)


def _of_tensors(target: str, words: list[str], wrt: str | None, axes: str | None) -> Any:
    shapes = parse_shapes(words)
    names = list(shapes)
    if wrt is not None and wrt not in names:
        raise UsageError(f"explain: --wrt is {wrt!r}; expected one of {', '.join(names)}. {near_misses(wrt, names)}")
    if is_path(target):
        function = _function(target)
        names = _matched(target, function, names)
    else:
        target = " ".join(target.split())
        function = compile_expression(target, names)
        expect_used(target, names)
    numbers = drawn(shapes)
    tensors = {n: numbers[n] for n in names}
    by_name = {p.name for p in _parameters(function) if p.kind is p.KEYWORD_ONLY}
    named = {n: tensors.pop(n) for n in names if n in by_name}
    chosen = wrt or next((n for n, shape in shapes.items() if shape.kind == "float"), next(iter(shapes)))
    at: int | str = chosen if chosen in named else list(tensors).index(chosen)
    try:
        found = jacobian(function, *tensors.values(), wrt=at, axes=axes, **named)
    except TraceError as error:
        if not any(word in str(error) for word in ("Long", "integer", "indices")):
            raise
        some = next(reversed(shapes))
        said = f"{some}={','.join(map(str, shapes[some]))}:int"
        raise UsageError(
            f"explain: {error} Whole numbers, as of classes or places, are asked for so: {said}."
        ) from error
    if not isinstance(found, Derivative):
        raise UsageError(
            f"explain: {target!r} gives a {type(found).__name__}; expected one tensor. Take one of its parts."
        )
    return found


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _matched(target: str, function: Callable[..., Any], names: list[str]) -> list[str]:
    """The names in the order of the function's parameters; those that it lacks or wants are said."""
    parameters = _parameters(function)
    if not parameters or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return names
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for name in names:
        if name not in known:
            raise UsageError(f"explain: {target} has no argument {name!r}. {near_misses(name, known)}")
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in names]
    if missing:
        more = " ".join(f"{name}=SIZES" for name in missing)
        raise UsageError(f"explain: {target} wants {', '.join(missing)} too; expected a shape for each. Add {more}.")
    return [name for name in known if name in names]


def _of_learner(target: str, dim: int | None, trust_code: bool = False) -> Any:
    if is_path(target):
        try:
            make, dim = learners.build(target), dim or 64
        except CodeError as error:
            more = "" if "there is no file" in str(error) else " For a function of tensors pass --shapes."
            raise UsageError(f"explain: {str(error).removeprefix('learners: ')}{more}") from error
        try:
            learner = make(dim)
        except Exception as error:  # the caller's too
            raise UsageError(
                f"explain: {target} called with ({dim}) raises {type(error).__name__}: {error}; expected NAME(dim) to "
                "make an nn.Module. For a function of tensors pass --shapes."
            ) from error
        if not isinstance(learner, nn.Module):
            raise UsageError(
                f"explain: {target} made a {type(learner).__name__}; expected NAME(dim) to make an nn.Module. For a "
                "function of tensors pass --shapes."
            )
        return derive(learner, rule=rules.SGD(lr=0.1))
    if target in presets:
        config = DualformConfig(preset=target)
        if dim is not None:
            try:
                config = DualformConfig(preset=target, hidden_size=dim * config.num_attention_heads)
            except ValueError as error:
                raise UsageError(f"explain: --dim is {dim}, which {target} cannot have. {error}") from None
        found = [learning_layer(config)] if "test_time" in (config.layer_types or ()) else []
    elif Path(target).is_dir():
        model = load_model(target, trust_code)[0]
        own = model.config.hidden_size // model.config.num_attention_heads
        if dim not in (None, own):
            raise UsageError(f"explain: --dim is {dim}; expected {target}'s own width of a head = {own}. Leave it out.")
        found = [layer for layer in model.modules() if isinstance(layer, TestTimeTraining)]
    elif target.replace("-", "").replace("_", "").isalnum():
        return presets[target]  # raises, with the near misses
    else:
        raise UsageError(
            f"explain: {target!r} is no preset, folder or FILE.py:NAME; for a formula pass --shapes x=2 y=2,2."
        )
    if not found:
        raise UsageError(f"explain: no layer of {target} learns at test time; expected a 'test_time' layer.")
    return found[0]


def _function(target: str) -> Callable[..., Any]:
    """Return what FILE.py:NAME is, to be called."""
    found = load("explain", target)
    if not callable(found):
        raise UsageError(f"explain: {target} is a {type(found).__name__}; expected a function of tensors. Name one.")
    return found

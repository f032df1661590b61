"""What a layer's learner is built from: a model for each head, alike, of the head's width.

Legend: f head width, V width of what a model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualform.catalogue import Bound
from dualform.learning.learners import learners
from dualform.learning.program import ChunkProgram, DerivationError
from dualform.shapes import fail, shown


def templates(learner: Any, f: int, heads: int) -> list[nn.Module]:
    """Build each head's model of a width: modules alike, whose weights are drawn one by one."""
    recipe, models = recipe_of(learner, f), list[nn.Module]()
    expected, advice = f"what builds an nn.Module of the head width: learner({f})", "Pass such a class or function."
    for _ in range(heads):
        try:
            with torch.device("cpu"):  # a template holds shapes and code, never the layer's weights
                model = recipe(f)
        except Exception as error:
            if isinstance(error, ValueError) and type(error) is not ValueError:  # one of the house's
                raise
            found = f"failed at {f} with {type(error).__name__}: {error}"
            fail("TestTimeTraining", "learner", found, expected, advice, DerivationError)
        if not isinstance(model, nn.Module):
            fail("TestTimeTraining", "learner", f"made {shown(model)}", expected, advice, DerivationError)
        models.append(model)
    return models


def expect_fitting(program: ChunkProgram, models: list[nn.Module], f: int) -> None:
    """Refuse heads' models that are not alike, that do not take tokens of a head's width, or give others."""
    refuse = partial(fail, "TestTimeTraining", "learner", kind=DerivationError)
    first, *others = ({n: tuple(p.shape) for n, p in model.named_parameters()} for model in models)
    for n, own in enumerate(others, 2):
        if own != first:
            found = f"made parameters {own} for head {n}"
            refuse(found, f"those of the first = {first}", "Build the same module each time.")
    what, expected = f"is {type(program.learner).__name__}", f"(..., K) -> (..., V), K = V = dim / heads = {f}"
    try:
        V = program.plan(f, program.signature.kind[0], "auto").derivation.V
    except ValueError:
        if program.width not in (None, f):
            found = f"{what}, which takes tokens of width {program.width}"
            refuse(found, expected, "Build it of the width that it is given.")
        raise
    if f != V:
        refuse(f"{what}, which gives V = {V}", expected, "Let it end in the width that it is given.")


def recipe_of(learner: Any, f: int) -> Callable[[int], Any]:
    """Return what builds a head's model of a width: a class or function as it is, or what a spec names."""
    if isinstance(learner, nn.Module):
        kind = type(learner).__name__
        raise DerivationError(
            f"TestTimeTraining: learner is a built {kind}; expected what builds one for each head: a class, a function "
            f"of the head width, or a spec. Pass {kind}, not {kind}({f}); the head width is dim / heads = {f}."
        )
    if isinstance(learner, Bound | str | tuple | list | Mapping):
        return learners.build(learner)
    if not callable(learner):
        raise DerivationError(
            f"TestTimeTraining: learner is a {type(learner).__name__}; expected a class or function of the head width, "
            f"here {f}, "
            "or a spec: a name, (name, {options}), {'name': ..., options}, df.learners.MLP(...). Pass one of these."
        )
    return learner


def own_names(prefix: str, names: list[str]) -> dict[str, str]:
    """Give each tensor of a learner an attribute of its own: its dots become "_"; those that would coincide grow a "_".

    Example:
        >>> own_names("initial_", ["a.w", "a_w"])
        {'a.w': 'initial_a_w_', 'a_w': 'initial_a_w'}
    """
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.count(".")):
        own = prefix + name.replace(".", "_")
        while own in found.values():
            own += "_"
        found[name] = own
    return {name: found[name] for name in names}


def materialised(template: nn.Module) -> nn.Module:
    """Put a template on the CPU where a context (`init_empty_weights`) took its parameters to the meta device."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in template.modules() if isinstance(template, nn.Module) else ():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                drawn = torch.empty(p.shape, dtype=p.dtype, device="cpu").normal_(std=0.02)
                module._parameters[name] = made.setdefault(p, nn.Parameter(drawn, requires_grad=p.requires_grad))
    return template

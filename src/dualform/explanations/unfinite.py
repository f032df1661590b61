"""Why a gradient holds no number: the first step whose slope, or whose value, is infinite or none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dualform.graphs.local_derivatives import Program

NOT_LOOKED_AT = "what the function leaves out is not looked at here; torch multiplies it by 0"


def why_unfinite(program: Program, found: Tensor, expected: Tensor) -> list[str]:
    """Say where a gradient is no number, and why, and where autograd's is none though this one is.

    found, expected: x_bar for one g, here and by autograd
    """
    bad, theirs = ~found.isfinite(), ~expected.isfinite()
    more, said = theirs & ~bad, []
    if bad.any():
        said.append(f"x_bar is {_first(found, bad)}: {_cause(program)}")
    if more.any():
        said.append(f"autograd's is {_first(expected, more)}, and finite here: {_cause(program)}; {NOT_LOOKED_AT}")
    return said


def _first(x: Tensor, at: Tensor) -> str:
    where = at.nonzero()[0].tolist()
    return f"{x[tuple(where)].item():g} in {int(at.sum())} of {x.numel()} entries, first at {where}"


def _cause(program: Program) -> str:
    """The first value, or the first slope, that is no finite number; from the input on."""
    return next(_causes(program), "sums of finite numbers run over")


def _causes(program: Program) -> Iterator[str]:
    for node, parts in program.local.items():
        name, value = program.name_of(node), program.values[node]
        for source, J in parts:
            for f in (f for term in J.terms for f in term.tensors if not f.tensor.isfinite().all()):
                own, x = f.tensor, program.values[source]
                where = tuple((~own.isfinite()).nonzero()[0].tolist())
                at = f", where {program.name_of(source)} is {x[where].item():g}" if own.shape == x.shape else ""
                slope = f"{f.name or 'a factor'} in d{name}/d{program.name_of(source)} is {own[where].item():g}"
                yield f"{slope} at {list(where)}{at}, and infinity times 0 is no number"
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            where = (~value.isfinite()).nonzero()[0].tolist()
            yield f"the value of {name} is {value[tuple(where)].item():g} at {where}"

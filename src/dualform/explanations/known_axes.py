"""The caller's names of axes, carried from the inputs to what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from dualform.algebra.terms import Label
from dualform.graphs.local_derivatives import Program

# A name for each axis that has one.
AxisNames = tuple[str | None, ...]


def known_axes(program: Program, inputs: Sequence[Sequence[str]], output: Sequence[str]) -> dict[str, AxisNames]:
    """Name the axes of each value on the way: one that is an operand's axis, index by index, is called as that is."""
    known: dict[str, AxisNames] = {
        program.name_of(n): tuple(names) for n, names in zip(program.inputs, inputs, strict=False)
    }
    for node, parts in program.local.items():
        found: list[str | None] = [None] * program.values[node].ndim
        for source, J in parts:
            for term in J.terms[:1]:
                inn = [axis[0] if len(axis) == 1 else None for axis in term.inn]
                called: dict[Label | None, str | None] = {}
                for labels, name in ((inn, program.name_of(source)), *((f.labels, f.name) for f in term.tensors)):
                    if len(names := known.get(name, ())) == len(labels):
                        called |= dict(zip(labels, names, strict=True))
                for k, axis in enumerate(term.out):
                    name = called.get(axis[0]) if len(axis) == 1 else None
                    found[k] = found[k] or (name if name not in found else None)
        known[program.name_of(node)] = tuple(found)
    return known if program.output is program.source else {**known, program.name_of(program.output): tuple(output)}

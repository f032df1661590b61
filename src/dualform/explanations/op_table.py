"""The table of ops for people, made from the rows: does an op keep its structure, in what is it affine, an example."""

from __future__ import annotations

import warnings

from dualform.algebra.notation import formula
from dualform.algebra.terms import recorded
from dualform.graphs.local_rules import derivative
from dualform.ops.examples import Example
from dualform.ops.table import ROWS, OpCall, Row


def op_table() -> str:
    """Write the table of derivative rules as Markdown, a line per op, from the rows and their own examples.

    op | where its derivative comes from | jointly affine in | example | its derivative by the first operand | stored of
    dense
    Shape:  none.
    Dtype:  float64 in the examples.
    Raises: nothing.
    Example:
        >>> print(*[line for line in op_table().splitlines() if line.startswith("| `mm`")])
        | `mm` | row | x; B | `mm([n, m], [m, k])` | `B[l,j] δ(i,k)` | 8 of 72 |
    """
    head = [
        "| op | derivative | affine in | example | d / d first operand | numbers stored of dense |",
        "|---|---|---|---|---|---|",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old spellings
        return "\n".join([*head, *(_line(row) for _, row in sorted(ROWS.items()) if row.examples)])


def _line(row: Row) -> str:
    call = example_call(row.examples[0])
    name = row.name.removeprefix("aten::")
    source = "row" if row.rule is not None else "through its definition"
    structure, numbers = "0", "0"
    if call.operands:
        with recorded():
            J = derivative(call, 0)
            structure = formula(J.terms, J.out_shape, J.in_shape).sentence.partition(" = ")[2]
        numbers = f"{J.nbytes // 8} of {J.dense_nbytes // 8}"
    cells = [f"`{name}`", source, _affine(row, call), f"`{row.examples[0]}`", f"`{structure}`", numbers]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _affine(row: Row, call: OpCall) -> str:
    """The operands in which the op is jointly affine, by name; alternatives are parted by semicolons."""
    names = [call.operand_name(k) for k in range(len(call.operands))]
    if row.affine == "all":
        return "all"
    if row.affine == "each":
        return "; ".join(names)
    groups = [[names[k] for k in sorted(g) if k < len(names)] for g in row.affine if not isinstance(g, str)]
    return "; ".join(dict.fromkeys(" ".join(g) for g in groups if g))


def example_call(example: Example) -> OpCall:
    """Make the call that an example describes."""
    args, kwargs = example.arguments()
    result = example.target(*args, **kwargs)
    several = isinstance(result, (tuple, list))
    return OpCall(
        example.target, tuple(args), kwargs, result[example.part] if several else result,
        example.part if several else None,
    )  # fmt: skip

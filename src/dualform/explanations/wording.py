"""What an explanation says in words: why a derivative has its shape, what a name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count

import torch
from torch import fx

from dualform.algebra.index_products import Index
from dualform.algebra.index_text import IndexFormula, Line
from dualform.graphs.edit import inputs_of, results_of
from dualform.graphs.trace import source_line
from dualform.ops.table import ALL, ROWS, OpCall, find_row, row_of

_PLAIN = {"linalg_vector_norm": "norm", "scaled_dot_product_attention": "attention"}

# The letters of the rules' docstrings, for readers who have not read them.
_LETTERS = {
    "p": "the softmax itself", "h": "the normalised input, before gain and bias",
    "r": "1/√(variance + eps), one for each row that is normalised", "tril": "1 on and below the diagonal",
    "triu": "1 on and above the diagonal", "flip": "1 where one index is the other counted backwards",
    "[index]": "1 where the index is the one that was asked for",
    "[extremum]": "1 at the largest (smallest) entry, shared by ties", "[c]": "1 where the condition holds",
    "[not c]": "1 where the condition does not hold", "[kept]": "1 where nothing was filled in",
    "[mask]": "1 where something was filled in",
    "cos": "the cosine of 2π times frequency times place, over the length",
    "sin": "the sine of 2π times frequency times place, over the length",
    "reshape": "1 where both indices are one place in memory",
}  # fmt: skip

# What slopes are, where they are more than that of one entry.
_SLOPES: dict[str, str] = {}
_SLOPES["prod"] = "the product of all entries of {0} but this one, made without a division: right where entries are 0"
_SLOPES["cumprod"] = (
    "the products of the entries of {0} up to the first index but the second, right where entries are 0"
)
_SLOPES["norm"] = "{0} over its norm (of the p-th, sign(x) |x/‖x‖|^(p-1), entry by entry), and 0 where the norm is 0"
_SLOPES["var"] = "2 ({0} - its mean) / (count - correction)"
_SLOPES["std"] = "({0} - its mean) / (std (count - correction))"


_STORED = "factors multiplied and added up once, because the result is smaller than they are"


def plain(op: str) -> str:
    """What people call an op."""
    row = ROWS.get(f"aten::{op}")
    return "T" if row is not None and re.fullmatch(r"\{0\}\.\w+", row.python) else _PLAIN.get(op, op)


def rule(call: OpCall, x_is: str) -> str:
    """The rule of differentiation behind one op, in a sentence."""
    op = plain(call.target._schema.name.split("::")[1])
    row = find_row(call.target)
    if row is not None and row.multilinear:
        return f"{op} is a product, linear in {x_is}: its derivative by {x_is} is the product of the other operands"
    if torch.Tag.pointwise in call.target.tags:
        return (
            f"{op} works entry by entry: an entry of the result depends on one entry of {x_is}, so off the diagonal "
            "all is 0"
        )
    if row is None:
        return f"{op} has no rule: its own derivative is computed entry by entry and stored dense"
    if row.affine == ALL:
        return f"{op} is linear: it moves, copies or adds numbers, and its derivative says from where to where"
    said = (row.rule.__doc__ or "").strip().split("\n")[0]
    return f"the rule of {op}" + (f": {said.rstrip('.')}" if said else "")


def reasons(formula: IndexFormula, meaning: Callable[[str], str]) -> tuple[str, ...]:
    """Why a derivative has its shape: what each tie, each lone index and each factor is there for."""
    if not formula.lines:
        return ("the result does not depend on it: every entry is 0",)
    found: list[str] = []
    for k, line in enumerate(formula.lines):
        head = f"term {k + 1}: " if len(formula.lines) > 1 else ""
        said = _of_line(formula, line)
        if said:
            found.append(head + "; ".join(said))
    for name, tensor in formula.tensors.items():
        labels = next((at for line in formula.lines for n, at in line.factors if n == name), None)
        if labels is None:
            found.append(f"{name} {tuple(tensor.shape)}: the index that is read")
            continue
        shown = f"{name}[{','.join(labels)}]" if labels else name
        stands = _STORED if any(name == letter.symbol for letter in formula.where) else meaning(name)
        found.append(f"{shown} {tuple(tensor.shape)}: {stands}")
    return tuple(found)


def _of_line(formula: IndexFormula, line: Line) -> list[str]:
    said = []
    plain = [(a, b) for a, b in line.deltas if Index.read(a).plain and Index.read(b).plain]
    moved = [tie for tie in line.ties if tie not in plain]
    if plain:
        ties = ", ".join(f"δ({a},{b})" for a, b in plain)
        verbs = ("ties", "is") if len(plain) == 1 else ("tie", "are")
        said.append(f"{ties} {verbs[0]} output to input and {verbs[1]} never stored")
    if moved:
        ties = ", ".join(f"δ({a},{b})" for a, b in moved)
        said.append(f"{ties} {'says' if len(moved) == 1 else 'say'} which entry goes where; nothing is stored for it")
    tied = {name for tie in line.ties for text in tie for name in Index.read(text).names}
    bound = tied | {name for _, at in line.factors for text in at for name in Index.read(text).names}
    copied = [x for x in formula.out if x != "0" and x not in bound]
    summed = [x for x in formula.inn if x != "0" and x not in bound]
    if copied:
        said.append(f"{_listed(copied)} on the output only: the same value is copied along {_them(copied)}")
    if summed:
        said.append(f"{_listed(summed)} on the input only: a sum over {_them(summed)}")
    inner = [s for s, _ in line.sums if s not in tied]
    if inner:
        said.append(f"{_listed(inner)} on neither side: contracted between the factors")
    return said


def _listed(names: Sequence[str]) -> str:
    return f"{'index' if len(names) == 1 else 'indices'} {', '.join(names)} {'stands' if len(names) == 1 else 'stand'}"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def meaning(name: str, known: dict[str, str]) -> str:
    """What a factor's name stands for; `known` has the program's own names."""
    base = re.sub(r"#\d+$", "", name)
    if base in known:
        return known[base]
    numbered = re.sub(r"\d+$", "", base)
    if base in _LETTERS or numbered in _LETTERS:
        return _LETTERS.get(base) or _LETTERS[numbered]
    slope = re.fullmatch(r"(\w+)'(\d*)\((.*)\)", base)
    if slope is not None and slope[1] in _SLOPES:
        return _SLOPES[slope[1]].format(slope[3])
    if slope is not None:
        return f"the slope of {slope[1]} at {slope[3]}, entry by entry"
    if base[:1] == "d" and base[1:].isidentifier():
        return f"the derivative of {base[1:]}, stored dense"
    if base[0] == "[":
        return f"1 where {base[1:-1]}, else 0"
    return "the value of this expression"


def name_nodes(gm: fx.GraphModule, names: Sequence[str], closed: Mapping[int, str] | None = None) -> dict[fx.Node, str]:
    """What people call the nodes: the inputs' names, the caller's own variables where a line assigns one, else the op.

    closed: what the code calls the tensors that it closes over, by their identity
    """
    nodes = list(gm.graph.nodes)
    found: dict[fx.Node, str] = dict(zip(inputs_of(gm.graph), names, strict=False))
    results, taken, constants = set(results_of(gm.graph)), set(names), set[fx.Node]()
    last = {line: node for node in nodes if (line := source_line(node))}
    for node in nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        line = source_line(node)
        if node.op == "get_attr":
            constants.add(node)
        is_kept = row_of(node.target).ordered or getattr(node.target, "_opname", "") == "to"
        if is_kept and (source := node.all_input_nodes[0]) in constants:
            found[node] = found[source]  # a constant, as it is or in another type
            constants.add(node)
            continue
        assigned = re.match(r"(\w+)\s*=[^=]", line) if last.get(line) is node else None
        stems = ("z", "out", "result") if node in results and node.op == "call_function" else ()
        if node.op == "get_attr":
            stem = (closed or {}).get(id(getattr(gm, str(node.target)))) or "c"
        elif assigned and not stems:
            stem = assigned[1]
        else:
            stem = _called(node, found)
        numbered = (stem if k == 1 else f"{stem}{k}" for k in count(1))
        found[node] = next(n for n in chain(stems, numbered) if n not in taken)
        taken.add(found[node])
    return found


def _called(node: fx.Node, found: Mapping[fx.Node, str]) -> str:
    packet = plain(str(getattr(node.target, "_opname", None) or node.name))
    if packet in ("T", "detach"):
        return f"{found[node.all_input_nodes[0]]}_{packet.replace('detach', 'detached')}"
    return re.sub(r"^_+|_+$", "", packet)

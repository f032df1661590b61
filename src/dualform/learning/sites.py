"""Where the weights meet the data: reading a learner's trace.

A node is *par* if it depends on fast leaves only and *tok* if it depends on the tokens. A *site* is a tok node with a
par operand. It is admissible if, its tok operands held fixed, it is jointly affine in the leaves behind its par
operands; the op table says so. This file marks nodes, proves that tokens do not mix, and lists the sites.

Legend: W tokens in the trace, K key width.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree

from dualform.algebra.linear_map import Label, Term
from dualform.graphs import local_rules
from dualform.graphs.aside import value_of
from dualform.graphs.edit import inputs_of, needed, output_of, results_of
from dualform.graphs.kept import is_kept, named
from dualform.graphs.kept_derivative import first_bend
from dualform.graphs.trace import source_line
from dualform.learning.spelling import DerivationError, has_no_row, op_name, spell, spell_out
from dualform.learning.token_maps import Place, are_tied, carried_places, find_label, uncut
from dualform.ops.factories import is_uniform
from dualform.ops.table import arguments_of, kind_of, row_of
from dualform.storages import is_even

aten = torch.ops.aten
PER_TOKEN = "Per token: use reduction='none' and sum over the last axis, or df.objectives.Squared()."


@dataclass(eq=False)
class Site:
    """A node where fast weights meet tokens."""

    node: fx.Node
    pars: tuple[fx.Node, ...]  # its par operands
    leaves: tuple[str, ...]  # the fast leaves behind them
    why: str  # why it is not admissible; "": it is

    @property
    def admissible(self) -> bool:
        return not self.why


@dataclass(eq=False)
class Analysis:
    """A learner's trace at W tokens, marked."""

    graph: fx.GraphModule
    who: str  # whose: the learner's, the objective's or the rule's
    tokens: tuple[fx.Node, ...]  # inputs with a token axis
    leaf_nodes: dict[str, fx.Node]
    slow_nodes: dict[str, fx.Node]
    output: fx.Node
    constants: dict[str, Tensor]  # tensors that the trace made itself, as inputs
    held: dict[fx.Node, Tensor] = field(default_factory=dict)  # what was there before, as inputs
    read: list[Tensor] = field(default_factory=list)  # of these, what was found to be the same for all tokens
    leaves: dict[fx.Node, frozenset[str]] = field(default_factory=dict)  # fast leaves a node depends on
    tok: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, Place] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    @property
    def x(self) -> fx.Node:
        """The tokens that a learner reads."""
        return self.tokens[0]

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "call_function"]

    def value(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Run one node on the values in `env`."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        return value_of(node, args, kwargs)

    def call(self, node: fx.Node, env: Mapping[fx.Node, Any], row: str = "x") -> local_rules.OpCall:
        """Describe a node and its values for the op table; operands are named as in the trace, the tokens `row`."""
        made, part = maker(node)
        args, kwargs = map_arg((made.args, dict(made.kwargs)), env.__getitem__)
        names = tuple(
            row if s in self.tokens[:1] else f"{s.name}_{row}" if s in self.tok else s.name for s in operand_nodes(made)
        )
        return local_rules.OpCall(made.target, args, kwargs, env[node], part, names)  # type: ignore[arg-type]


def maker(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The node whose op makes a value, and which of its results the value is, if it has several."""
    got = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)
    return got  # type: ignore[return-value]


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """List the nodes behind `Call.operands`: the floating tensor arguments, lists flattened."""
    flat, _ = _pytree.tree_flatten((node.args, dict(node.kwargs)))
    return [x for x in flat if isinstance(x, fx.Node) and is_floating(x.meta["val"])]


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def prepared(graph: fx.GraphModule, **parts: Any) -> Analysis:
    """Spell out and number a trace whose inputs are told apart; `mark` fills in the rest."""
    for name, node in parts["leaf_nodes"].items():
        if not is_floating(node.meta["val"]):
            raise DerivationError(
                f"derive: the learner's fast weight {name!r} is {node.meta['val'].dtype}; expected real floating "
                "numbers, which a gradient step keeps real. Keep torch.view_as_real(w) as the parameter; use "
                "torch.view_as_complex in forward."
            )
    spell(graph, parts["who"])
    output: Any = output_of(graph.graph)
    return Analysis(graph=graph, output=(output.all_input_nodes or [output])[0], **parts)


def mark(a: Analysis, W: int) -> None:
    """Fill in leaves, tok, places (proving that tokens stay apart) and sites."""
    a.leaves, a.tok, a.places, a.sites = {}, set(a.tokens), dict.fromkeys(a.tokens, Place(0, 1, 1)), []
    names = {node: name for name, node in a.leaf_nodes.items()}
    env = {node: node.meta.get("val") for node in a.graph.graph.nodes}
    rows: dict[fx.Node, Place] = {}  # of what grows with the number of tokens, and is made of none
    for node in a.graph.graph.nodes:
        if node.op == "placeholder":
            a.leaves[node] = frozenset({names[node]} if node in names else ())
            rows |= {node: node.meta["rows"]} if "rows" in node.meta else {}
            continue
        if node.op == "output":
            continue
        sources = read_nodes(node)
        a.leaves[node] = frozenset().union(*(a.leaves[s] for s in sources))
        if any(s in a.tok for s in sources):
            a.tok.add(node)
            if W > 1 and isinstance(node.meta["val"], Tensor):
                a.places[node] = _place(a, node, env, W)
            pars = tuple(s for s in sources if s not in a.tok and a.leaves[s])
            if pars or _sums_tokens(a, node):
                leaves = tuple(name for name in a.leaf_nodes if any(name in a.leaves[p] for p in pars))
                a.sites.append(Site(node, pars, leaves, _why_inadmissible(a, node, pars)))
        else:
            _follow_rows(a, node, env, W, rows)
        if is_kept(node):
            _expect_apart(a, node)


def _follow_rows(a: Analysis, node: fx.Node, env: Mapping[fx.Node, Any], W: int, rows: dict[fx.Node, Place]) -> None:
    """Prove that rows that are as many as the tokens stay apart: what becomes one of them knows how many there are."""
    if W > 1 and any(s in rows for s in read_nodes(node)):
        place = _carried(a, node, a.call(node, env), W, rows)
        if place is None:
            raise counts(
                a.who, f"`{source_line(node) or op_name(node)}`: {op_name(node)} makes one of as many rows as tokens"
            )
        rows[node] = place
    elif "rows" in node.meta:
        rows[node] = node.meta["rows"]


def counts(who: str, where: str) -> DerivationError:
    """Refuse a function that knows how many tokens it is given."""
    return DerivationError(
        f"derive: the {who} reads the number of tokens, at {where}; expected the same ops and numbers however many "
        "tokens are computed at once. Use a number of your own, or the size of the last axis."
    )


def changes(who: str, where: str) -> DerivationError:
    """Refuse a function that is another one at each call."""
    return DerivationError(
        f"derive: the {who} is another function at each call (random, counted or timed), at {where}; expected the same "
        "ops and numbers. Draw or count outside, and pass the number in as a buffer or a gate."
    )


def read_nodes(node: fx.Node) -> list[fx.Node]:
    """List the inputs of a node whose numbers matter, not their shape or type alone."""
    unread = row_of(node.target).unread
    return [x for name, _, x in arguments_of(node, fx.Node) if name not in unread] if unread else node.all_input_nodes


def _why_inadmissible(a: Analysis, node: fx.Node, pars: tuple[fx.Node, ...]) -> str:
    operands = operand_nodes(node)
    if is_kept(node):
        return f"{op_name(node)} has a gradient of its own"
    if not all(p in operands for p in pars):
        return "a weight decides a branch or an index"
    if not is_of_one_type(node):
        return f"{op_name(node)} meets numbers of several types, or gives several results"
    if not local_rules.affine(node.target, frozenset(j for j, s in enumerate(operands) if s in pars)):
        return f"{op_name(node)} is not jointly affine in its weights"
    crooked = next((bad for p in pars if (bad := first_crooked(a, p)) is not None), None)
    return "" if crooked is None else f"the weights pass through {op_name(crooked)}, which is not affine in them"


def first_crooked(a: Analysis, node: fx.Node) -> fx.Node | None:
    """Find the first node behind a par node that is not jointly affine in the leaves; None if there is none."""
    if node.op == "placeholder" or not a.leaves[node]:
        return None
    operands = operand_nodes(node)
    pars = [s for s in node.all_input_nodes if a.leaves[s]]
    if found := next(filter(None, (first_crooked(a, p) for p in pars)), None):
        return found
    joint = frozenset(j for j, s in enumerate(operands) if a.leaves[s])
    straight = all(p in operands for p in pars) and local_rules.affine(node.target, joint)
    # A detach has no derivative: the value of weights behind one is carried.
    return None if straight and node.target != aten.detach.default and is_of_one_type(node) else node


def is_of_one_type(node: fx.Node) -> bool:
    """Does an op give one result of its operands' type? A cast rounds, which no correction repeats."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and all(x.meta["val"].dtype == value.dtype for x in operand_nodes(node))


def _place(a: Analysis, node: fx.Node, env: Mapping[fx.Node, Any], W: int) -> Place:
    """Prove that a node keeps tokens apart and treats them alike, and say where its token index sits."""
    call = a.call(node, env)
    place = _carried(a, node, call, W, a.places)
    if place is None:
        raise _mixes(a, node)
    for name, k, source in () if is_kept(node) else _read_arguments(node):
        if source not in a.tok and not _is_alike(a, call, name, k, source, place, W, env):
            raise _differs(a, node)
    return place


def _carried(
    a: Analysis, node: fx.Node, call: local_rules.OpCall, W: int, places: Mapping[fx.Node, Place]
) -> Place | None:
    """Follow an index of W rows from the tensors that have it to what is made of them; None where it is lost."""
    if is_kept(node):
        return _kept_place(a, node, W, places)
    found: set[Place | None] = set()
    for name, k, source in _read_arguments(node):
        if source not in places:
            continue
        place, before, after = places[source], source.meta["val"].shape, node.meta["val"].shape
        if 0 in (*after, *before):  # of no numbers nothing is read
            at = slice(place.axis, place.axis + 1)
            found.add(place if before[at] == after[at] else None)
        else:
            found |= carried_places(local_rules.reads(call, name, k), place, W) or {None}
    return found.pop() if len(found) == 1 else None


def _read_arguments(node: fx.Node) -> list[tuple[str, int | None, fx.Node]]:
    """List the tensors whose numbers the op behind a node reads."""
    op = maker(node)[0]
    return [x for x in arguments_of(op, fx.Node) if x[0] not in row_of(op.target).unread]


def _is_alike(
    a: Analysis, call: local_rules.OpCall, name: str, k: int | None, source: fx.Node, place: Place, W: int,
    env: Mapping[fx.Node, Any]
) -> bool:  # fmt: skip
    """Does an argument that no token reaches enter a result in the same way at every token?"""
    J = local_rules.reads(call, name, k)
    if J is None:
        return False
    for term in J.terms:
        hit = find_label(term.out[place.axis], place.inner, W)
        labels = {hit[0]} if hit else set(term.out[place.axis])
        if not _is_even_through(a, call, term, labels, source, env):
            return False
    return True


def _kept_place(a: Analysis, node: fx.Node, W: int, at: Mapping[fx.Node, Place]) -> Place | None:
    """Prove that a function with a gradient of its own keeps tokens apart, and that its gradient does."""
    inputs, key, result = cast("tuple[list[fx.Node], str, int]", node.args)
    made, places = named(key), [at.get(s) for s in inputs]
    results = _followed(a.who, made.forward, places, range(len(made.backward)), W)
    place, backward = results[result], made.backward[result]
    if backward is not None:
        wanted = [k for k, s in enumerate(inputs) if s in at]
        pulled = _followed(a.who, backward, [place, *places, *results], wanted, W)
        if any(pulled[k] not in (None, places[k]) for k in wanted):
            return None
    return place


def kept_apart(gm: fx.GraphModule, at: Sequence[int | None], many: int) -> list[int | None]:
    """Prove that a graph keeps rows apart that some inputs have along an axis; say which axis of results has them."""
    given = [None if k is None else Place(k, 1, 1) for k in at]
    places = _followed("learner", gm, given, range(len(results_of(gm.graph))), many)
    if any(p is not None and p[1:] != (1, 1) for p in places):
        raise DerivationError(f"derive: rows are cut, or joined with other numbers, in {gm.code}")
    return [None if p is None else p.axis for p in places]


def _followed(
    who: str, gm: fx.GraphModule, places: Sequence[Place | None], wanted: Iterable[int], W: int
) -> list[Place | None]:
    """Where the tokens of a graph's inputs are in its results; None: in none of them, or it was not asked for."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    spell_out(gm)
    inputs = inputs_of(gm.graph)
    at = {n: p for n, p in zip(inputs, places, strict=True) if p is not None}
    part = Analysis(gm, who, (*at, inputs[0]), {}, {}, inputs[0], {}, tok=set(at), places=at)
    env = {n: n.meta.get("val") for n in gm.graph.nodes}
    results, rows = results_of(gm.graph), dict[fx.Node, Place]()
    read = needed(results[k] for k in wanted)
    for node in part.nodes:
        if node in read and any(s in part.tok for s in read_nodes(node)):
            part.tok.add(node)
            part.places[node] = _place(part, node, env, W)
        elif node in read:
            _follow_rows(part, node, env, W, rows)
    return [part.places.get(n) for n in results]


def _sums_tokens(a: Analysis, node: fx.Node) -> bool:
    """Does a gradient of its own sum over tokens? It is run token by token: what it sums is then known."""
    return is_kept(node) and node in a.tok and any(s not in a.tok for s in _given_gradients(node))


def _given_gradients(node: fx.Node) -> list[fx.Node]:
    """The inputs of a function with a gradient of its own that get one."""
    inputs, key, result = cast("tuple[list[fx.Node], str, int]", node.args)
    backward = named(key).backward[result]
    if backward is None:
        return []
    return [s for s, g in zip(inputs, results_of(backward.graph), strict=True) if g is not None]


def _expect_apart(a: Analysis, node: fx.Node) -> None:
    """A gradient that is not linear in the one it is given is one token's: what tokens share has no such gradient."""
    _, key, result = cast("tuple[list[fx.Node], str, int]", node.args)
    made = named(key)
    backward = made.backward[result]
    bend = None if backward is None else first_bend(backward)
    shared = node not in a.tok and not a.leaves[node]
    if bend is not None and (shared or sum(b is not None for b in made.backward) > 1):
        why = "is shared by all tokens, whose gradients come as a sum" if shared else "has several results"
        raise DerivationError(
            f"derive: {made.name} at {source_line(node)} {why}, and its gradient is not linear in the one that it is "
            f"given: `{source_line(bend)}`; expected a linear backward there. Make it linear, or apply it to one "
            "token's result."
        )


def is_apart(a: Analysis, node: fx.Node) -> bool:
    """Does a value hold one entry for each token, made of that token's own, or the same for all?"""
    if node in a.tok:
        return a.places[node] == Place(0, 1, 1)
    return _is_even(a, node, 0, {n: n.meta.get("val") for n in a.graph.graph.nodes})


def felt(a: Analysis) -> set[fx.Node]:
    """List what a gradient by the first tokens passes: truth values and whole numbers have none."""
    found = {a.x}
    for node in a.nodes:
        value = node.meta["val"]
        has_none = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        if not has_none and not found.isdisjoint(read_nodes(node)):
            found.add(node)
    return found


def _is_even_through(
    a: Analysis, call: local_rules.OpCall, term: Term, labels: set[Label], source: fx.Node, env: Mapping[fx.Node, Any]
) -> bool:  # fmt: skip
    """Does a source bring no difference along some labels of a result?"""
    term, labels = uncut(term, labels)
    looked_up = any(labels & set(r.labels) for r in term.relations)
    # What is looked up by an index that is an argument too is as even as that index.
    if are_tied(term, labels) or (looked_up and all(is_floating(call.argument(*x)) for x in call.arguments)):
        return False
    return all(_is_even(a, source, n, env) for n, axis in enumerate(term.inn) if labels & set(axis))


def _is_even(a: Analysis, node: fx.Node, axis: int, env: Mapping[fx.Node, Any]) -> bool:
    """Is a value that no token reaches the same all along an axis?"""
    if node in a.held and is_even(a.held[node], axis):
        a.read.append(a.held[node])
        return True
    if node.op != "call_function":
        return False
    op, read = maker(node)[0], _read_arguments(node)
    if not read:
        return is_uniform(op) or bool(row_of(op.target).unread)
    call = a.call(node, env)
    for name, k, source in read:
        J = local_rules.reads(call, name, k)
        if J is None or not all(_is_even_through(a, call, t, set(t.out[axis]), source, env) for t in J.terms):
            return False
    return True


def _mixes(a: Analysis, node: fx.Node) -> DerivationError:
    op = maker(node)[0]
    if kind_of(op.target) == "view":
        return DerivationError(
            f"derive: the {a.who} takes rows apart, as a loop over them does, and so mixes tokens at "
            f"{source_line(node)}: {op_name(op)} gives some of them alone; expected {_apart[a.who]} Write it for all "
            "rows at once: ops on the last axes, or torch.vmap(f)(x) in place of torch.stack([f(row) for row in x]). "
            "Of an op that it has no rule for, as gru_cell and fused attention, torch.vmap makes such a loop: call "
            "that on all rows."
        )
    where = source_line(node) or f"{op_name(op)}, called inside torch"
    if not row_of(op.target).name and has_no_row(op):
        return DerivationError(
            f"derive: the {a.who} uses {op_name(op)} at {where}, which has no row in the table of ops; expected ops "
            "that can be shown to keep tokens apart. Write it with other ops, or add a row (ops/table.py)."
        )
    return DerivationError(
        f"derive: the {a.who} mixes tokens at {where}: {op_name(op)} makes one row depend on others; expected "
        f"{_apart[a.who]}"
    )


def _differs(a: Analysis, node: fx.Node) -> DerivationError:
    op = maker(node)[0]
    return DerivationError(
        f"derive: the {a.who} treats tokens by their place in the batch at {source_line(node) or op_name(op)}: "
        f"{op_name(op)} takes numbers that differ from row to row; expected {_apart[a.who]} Such numbers may have size "
        "1 along the token axis."
    )


_apart = {
    "learner": "a function of each row alone, (..., K) -> (..., V). Remove the operation over the token axis.",
    "objective": f"a loss of each token alone, (..., V), (..., V) -> (...,). {PER_TOKEN}",
    "rule": "coefficients made of each token's own position and gates. Remove the operation over the token axis.",
}

"""The account of one derivative: its program, the names of things in it, its steps, proof, code and checks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.index_products import collected
from dualform.algebra.index_text import IndexFormula
from dualform.algebra.linear_map import Derivative, Term, derivative_of, fresh_axes
from dualform.algebra.notation import Names, formula, spoken
from dualform.algebra.terms import Factor
from dualform.explanations.chain_rule import Link, Move, derive
from dualform.explanations.explanation import LEVELS, Explanation, agreed, deviation
from dualform.explanations.known_axes import known_axes
from dualform.explanations.matrix_terms import MatrixEquation
from dualform.explanations.python_text import written
from dualform.explanations.steps import OpStep, Stage
from dualform.explanations.textbook import matrix_form
from dualform.explanations.torch_code import Pullback, vjp_code
from dualform.explanations.unfinite import why_unfinite
from dualform.explanations.wording import meaning, name_nodes, plain, reasons, rule
from dualform.graphs.local_derivatives import Program
from dualform.graphs.local_rules import derivative as local_derivative
from dualform.graphs.rewriting import write_out
from dualform.graphs.trace import source_line, trace
from dualform.ops.table import OpCall, broadcast_axes
from dualform.shapes import fail

# A stage with more products than this, before deltas are eliminated, is written with stored sums instead.
MAX_PRODUCTS = 6
# A formula longer than this is written with stored sums, too.
MAX_TEXT = 200
# The entries up to which a whole derivative is compared with jacrev: always, and for a proof.
MAX_COMPARED, MAX_PROVED = 4096, 2**20
# The entries up to which an intermediate derivative is computed only to be shown.
MAX_SHOWN = 2**22


class Story:
    """A program and what people call things in it: the account of a derivative."""

    def __init__(
        self, f: Callable[..., Tensor], args: Sequence[Tensor], wrt: int, names: Sequence[str],
        axes: tuple[list[list[str]], list[str]] | None, closed: Mapping[int, str] | None = None, steps: bool = False,
    ) -> None:  # fmt: skip
        """`closed`: what the code calls the tensors that it closes over, by their identity; `steps`: as in `trace`."""
        self.f = f
        self.args = list(args)
        self.wrt = wrt
        gm = trace(f, *args, steps=steps)
        write_out(gm.graph)  # what an op is made of is what there is to tell about it
        gm.recompile()
        self.program = Program(gm, args, wrt, local_derivative, name_nodes(gm, names, closed))
        self.axes = {} if axes is None else known_axes(self.program, *axes)
        called = {self.program.name_of(n): v for n, v in self.program.values.items() if isinstance(v, Tensor)}
        # An index that is called like a tensor misleads; p, h and r are what rules call their factors.
        avoid = {*(name for name in called if len(name) == 1), *"phr", *(a for x in self.axes.values() for a in x if a)}
        self.names = Names(called, sorted(avoid), self.axes)

    def explain(self, derivative: Derivative, level: str, *rewritten: Program) -> Explanation:
        """Assemble the steps, the proof, the result, its code and its checks.

        rewritten: the program that the derivative comes from, whose names its factors have
        """
        if level not in LEVELS:
            fail("explain", "level", f"is {level!r}", f"one of {list(LEVELS)}", "Choose one.", ValueError)
        steps = self.steps  # first, so that plain names are theirs
        result = self._step("chain", "", derivative, self._symbol(self.program.output))
        stages = self.stages
        end = stages[-1].symbol if stages else ""
        whole: Any = end == result.formula.symbol and (stages[-1].moves[-1].formula if stages[-1].moves else None)
        code = vjp_code(derivative, self.names, self.program.name_of(self.program.source))
        checks, notes = self._checks(derivative, code, level)
        matrices = self._matrices(derivative, rewritten) if level != "one-line" else None
        if matrices is not None:
            agreed([("the matrix form against the entries", matrices.error(derivative))], derivative.dtype)
        return Explanation(
            level, self._title(), tuple(steps), tuple(self._chain()), result, code, tuple(checks), tuple(stages),
            whole or None, tuple(notes), matrices,
        )  # fmt: skip

    def shown(self, derivative: Derivative) -> IndexFormula:
        """The derivative in index notation, in the names that its steps use."""
        return self._formula(derivative, self._symbol(self.program.output))

    def _matrices(self, J: Derivative, rewritten: Sequence[Program]) -> MatrixEquation | None:
        """The derivative in matrix notation, in the names of the caller and of the rules."""

        def called(f: Factor) -> str:
            """Its name; that of the same numbers up to rounding, as of two ways to a softmax."""
            own, plain = self.names.of(f), self.names.found.get(f.name)
            if plain is None or plain.shape != f.tensor.shape or not plain.is_floating_point():
                return own
            return f.name if deviation(f.tensor, plain) < 1e-12 else own

        told = {*self.names.values, *self.names.found}
        return matrix_form([self.program, *rewritten], called, told, J, self._symbol(self.program.output))

    def _formula(self, J: Derivative, symbol: str) -> IndexFormula:
        shapes = (J.out_shape, J.in_shape)
        return formula(J.terms, *shapes, symbol, self._axes(*shapes, symbol), self.names)

    def _axes(self, out: Sequence[int], inn: Sequence[int], symbol: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The indices of a derivative, named after the two axes' names."""
        names = (name[1:] for name in symbol.split("/"))
        known = [self.axes.get(name, (None,) * len(shape)) for name, shape in zip(names, (out, inn), strict=True)]
        return spoken(out, inn, (known[0], known[1]), self.names.avoid)

    def _symbol(self, node: fx.Node) -> str:
        return f"d{self.program.name_of(node)}/d{self.program.name_of(self.program.source)}"

    def _title(self) -> str:
        program = self.program
        given = ((n, v) for n, v in program.values.items() if n.op == "placeholder")
        inputs = "  ".join(f"{program.name_of(n)}:{tuple(v.shape)}" for n, v in given)
        line = source_line(program.output)
        head = f"{line}\n" if line else ""
        return f"{head}{inputs}  ->  {program.name_of(program.output)}:{tuple(program.values[program.output].shape)}"

    @cached_property
    def steps(self) -> list[OpStep]:
        """One step for each op on a path and each of its operands, two where an operand is broadcast."""
        found: list[OpStep] = []
        for node, parts in self.program.local.items():
            call = self.program.call(node)
            assert call is not None
            if not call.out.is_floating_point():
                continue  # a comparison, a position: nothing flows through it
            for source in dict.fromkeys(source for source, _ in parts):
                found += self._op_steps(node, call, source, [d for s, d in parts if s is source])
        return _joined(found, self.program.name_of(self.program.source), self.program.name_of(self.program.output))

    def _copy_of(self, operand: str) -> str:
        """What an operand is called after it was broadcast."""
        name = f"{operand}_b"
        while name in self.names.values:
            name += "_"
        return name

    def _op_steps(self, node: fx.Node, call: OpCall, source: fx.Node, locals_: list[Derivative]) -> list[OpStep]:
        name, operand = self.program.name_of(node), self.program.name_of(source)
        places = [k for k, s in enumerate(self.program.operand_nodes(node)) if s is source]
        x, found, wide = call.operands[places[0]], [], {}
        shape = _broadcast_shape(call, x)
        if shape != tuple(x.shape):
            wide[source] = self._copy_of(operand)
            own = self.axes.get(name, (None,) * len(shape))
            if self.axes:  # a matrix that is broadcast keeps its last two
                last = self.axes.get(operand, (None, None))[-2:]
                self.axes[wide[source]] = own if shape == call.out.shape else (*own[:-2], *last)
            spread = _expansion(x, shape)
            text, symbol = f"{operand} -> {wide[source]}   {tuple(x.shape)} -> {shape}", f"d{wide[source]}/d{operand}"
            said = "broadcasting is a copy: it moves no number, and every copy is the entry that it was made of"
            found.append(self._step("broadcast", text, spread, symbol, node, said))
            operand = wide[source]
            for k in places:
                args, kwargs = call.with_operand(k, x.expand(shape))
                names = tuple(operand if j in places else n for j, n in enumerate(call.names))
                call = replace(call, args=args, kwargs=kwargs, names=names)
            locals_ = [local_derivative(call, k) for k in places]
        total = sum(locals_[1:], locals_[0])
        said = rule(call, operand) + (f"; {operand} stands in {len(places)} places, which add up" if places[1:] else "")
        text = f"{name} = {written(node, self.program.name_of, wide)}"
        op = plain(call.target._schema.name.split("::")[1])
        return [*found, self._step(op, text, total, f"d{name}/d{operand}", node, said)]

    def _step(
        self, op: str, text: str, derivative: Derivative, symbol: str, node: fx.Node | None = None, said: str = ""
    ) -> OpStep:
        shown = self._formula(derivative, symbol)
        shown = collected(shown) if op != "chain" else shown
        why = reasons(shown, lambda name: self._meaning(name, shown))
        why = why if math.prod(derivative.shape) else ("an axis is empty: there is no entry",)
        line = "" if node is None or source_line(node) == source_line(self.program.output) else source_line(node)
        return OpStep(op, text or symbol, shown, derivative, "; ".join(why), line, why, said)

    @cached_property
    def _known(self) -> dict[str, str]:
        known = {}
        for node, name in self.program.names.items():
            if node.op == "placeholder":
                known[name] = "an input"
            elif node.op == "call_function":
                known[name] = known.get(name) or f"the value of {written(node, self.program.name_of)}"
            else:
                known[name] = "a constant of the function"
        return known

    def _meaning(self, name: str, shown: IndexFormula) -> str:
        said = meaning(name, self._known)
        pointer = shown.tensors[name].data_ptr() if type(shown.tensors[name]) is Tensor else 0
        for node, value in self.program.values.items():
            own = isinstance(value, Tensor) and type(value) is Tensor and value.data_ptr() == pointer != 0
            called = self.program.name_of(node)
            if own and node.op == "call_function" and called != name and value.numel() == shown.tensors[name].numel():
                return f"{said}, {called}" if name not in self._known else said
        return said

    @cached_property
    def stages(self) -> list[Stage]:
        """Each step's result by the input, in order: the proof. It ends early where writing on would cost too much."""
        bottom = self.program.name_of(self.program.source)
        groups: dict[str, list[OpStep]] = {}
        for step in self.steps:
            groups.setdefault(step.above, []).append(step)
        told: dict[str, IndexFormula | None] = {bottom: None}
        found: list[Stage] = []
        for above, group in groups.items():
            if any(step.below not in told for step in group):
                break  # an operand's derivative was too large to write out
            links = [Link(step.formula, told[step.below], step.derivative.in_shape) for step in group]
            moves = self._moves(f"d{above}/d{bottom}", links, group)
            if moves is None:
                break
            told[above] = moves[-1].formula if moves else links[0].local
            found.append(Stage(f"d{above}/d{bottom}", tuple(moves), group[0].out_shape))
        return found

    def _moves(self, symbol: str, links: Sequence[Link], group: Sequence[OpStep]) -> list[Move] | None:
        """The lines of one stage; none where its only step starts at the input, None where it cannot be written."""
        if all(link.before is None for link in links):
            return []
        out, inn = group[0].out_shape, self.args[self.wrt].shape
        node = self._nodes.get(group[0].above)
        axes = self._axes(out, inn, symbol)
        size = sum(len(x.local.lines) * len(x.before.lines if x.before else (1,)) for x in links)
        if node is None or size <= MAX_PRODUCTS:
            copied = {step.above for step in self.steps if step.op == "broadcast"}
            moves = derive(symbol, links, out, inn, any(step.below in copied for step in group), self.names.avoid, axes)
            if node is None or len(moves[-1].formula.right()) <= MAX_TEXT:
                return moves
        else:
            moves = []
        if node not in self._totals:
            return moves or None
        shown = self._formula(self._totals[node], symbol)
        return [*moves, Move(shown, f"{size} products, added up where their deltas agree; the sums are stored")]

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {name: node for node, name in self.program.names.items()}

    @cached_property
    def _totals(self) -> dict[fx.Node, Derivative]:
        return self.program.totals(MAX_SHOWN)

    def _chain(self) -> list[str]:
        """The paths from the input to the output, by the names of their steps."""
        if len(self.steps) < 2:
            return []
        links: dict[str, list[tuple[str, str]]] = {}
        for step in self.steps:
            links.setdefault(step.below, []).append((step.above, step.formula.symbol))
        top, bottom = self.program.name_of(self.program.output), self.program.name_of(self.program.source)
        paths = _paths(links, bottom, top, 5)
        if len(paths) <= 4 and sum(map(len, paths)) <= 24:
            sums = " + ".join(" · ".join(reversed(path)) for path in paths)
        else:
            ops = ", ".join(f"{op} {n}x" for op, n in Counter(step.op for step in self.steps).most_common(8))
            sums = f"the sum over all paths from {bottom} to {top} of the products of their steps ({ops})"
        return [f"d{top}/d{bottom} = {sums}"]

    def _checks(self, J: Derivative, code: Pullback, level: str) -> tuple[list[tuple[str, float]], list[str]]:
        """Compare with autograd: the code that was printed, and on small derivatives every entry; say what is none."""

        def alone(x: Tensor) -> Tensor:
            return self.f(*self.args[: self.wrt], x, *self.args[self.wrt + 1 :])

        x = self.args[self.wrt]
        generator = torch.Generator(device="cpu").manual_seed(0)
        g = torch.randn(J.out_shape, generator=generator, dtype=torch.float64).to(J.device, J.dtype)
        # Plain autograd: what users' gradients are made by.
        expected: Any = torch.autograd.functional.vjp(alone, x, g)[1]
        checks = [("the code above against autograd's vjp", deviation(code.run(g), expected))]
        if math.prod(J.shape) <= (MAX_PROVED if level == "proof" else MAX_COMPARED):
            whole: Any = torch.autograd.functional.jacobian(alone, x) if math.prod(J.out_shape) else J.dense()
            checks.append(("every entry against autograd's", deviation(J.dense(), whole)))
        if level == "proof":
            v = torch.randn(J.in_shape, generator=generator, dtype=torch.float64).to(J.device, J.dtype)
            checks.append(("<g, J v> against <J^T g, v>", deviation((g * J.jvp(v)).sum(), (J.vjp(g) * v).sum())))
        return agreed(checks, J.dtype), why_unfinite(self.program, J.vjp(g), expected)


def _joined(steps: Sequence[OpStep], start: str, end: str) -> list[OpStep]:
    """The steps on a way from the start to the end; where nothing flows, as into what is overwritten, none is told."""
    flowing = [step for step in steps if step.derivative.terms or not math.prod(step.shape)]
    reached, needed = {start}, {end}
    for step in flowing:
        if step.below in reached:
            reached.add(step.above)
    for step in reversed(flowing):
        if step.above in needed:
            needed.add(step.below)
    return [step for step in flowing if step.below in reached and step.above in needed]


def _broadcast_shape(call: OpCall, x: Tensor) -> tuple[int, ...]:
    """What an operand is broadcast to: the result's shape entry by entry, its batch axes in a matrix product."""
    if torch.Tag.pointwise in call.target.tags:
        return tuple(call.out.shape)
    if call.target._schema.name == "aten::matmul" and min(v.ndim for v in call.operands) >= 2:
        return (*call.out.shape[:-2], *x.shape[-2:])
    return tuple(x.shape)


def _expansion(x: Tensor, shape: tuple[int, ...]) -> Derivative:
    axes = fresh_axes(shape)
    return derivative_of(x.expand(shape), x, (Term(1.0, (), axes, broadcast_axes(axes, x.shape)),))


def _paths(links: dict[str, list[tuple[str, str]]], start: str, end: str, most: int) -> list[list[str]]:
    """Up to `most` paths from start to end, each the symbols of its steps in order."""
    found: list[list[str]] = []
    stack: list[tuple[str, list[str]]] = [(start, [])]
    while stack and len(found) < most:
        at, symbols = stack.pop()
        if at == end:
            found.append(symbols)
            continue
        stack += [(above, [*symbols, symbol]) for above, symbol in reversed(links.get(at, []))]
    return found

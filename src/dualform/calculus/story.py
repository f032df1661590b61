"""The account of one derivative: the program behind it, what people call things in it, its steps, chain, code and checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from dualform.calculus.code import vjp_code
from dualform.calculus.explain import LEVELS, Explanation, Step
from dualform.calculus.notation import formula, letters
from dualform.calculus.program import Program
from dualform.calculus.rules import derivative as local_derivative
from dualform.calculus.structure import Derivative, Term, fresh_axes
from dualform.calculus.table import Call, broadcast_axes
from dualform.calculus.trace import source_line, trace
from dualform.shapes import fail


class Story:
    """A program and what people call things in it: the route of a derivative, and its account."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        args: Sequence[Tensor],
        wrt: int,
        names: Sequence[str],
        axes: tuple[list[list[str]], list[str]] | None,
    ) -> None:
        self.f = f
        self.args = list(args)
        self.wrt = wrt
        self.axes = None if axes is None else (axes[1], axes[0][wrt])
        gm = trace(f, *args)
        self.program = Program(gm, args, wrt, local_derivative, names)
        self._name_nodes(list(names))

    @property
    def out(self) -> Tensor:
        return self.program.values[self.program.output]

    def vjp(self, g: Tensor) -> Tensor:
        """Pull back along the graph."""
        return self.program.vjp(g)

    def jvp(self, v: Tensor) -> Tensor:
        """Push forward along the graph."""
        return self.program.jvp(v)

    def _name_nodes(self, names: list[str]) -> None:
        """Give intermediates the caller's own variable names where the line assigns one."""
        program, taken = self.program, set(names)
        last: dict[str, fx.Node] = {}
        for node in program.gm.graph.nodes:
            if line := source_line(node):
                last[line] = node
        for node in program.gm.graph.nodes:
            if node.op != "call_function" or node is program.output:
                continue
            line = source_line(node)
            assigned = re.match(r"(\w+)\s*=[^=]", line) if last.get(line) is node else None
            packet = getattr(node.target, "_opname", None) or node.name
            stem = assigned[1] if assigned else re.sub(r"^_+|_+$", "", str(packet))
            program.names[node] = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}{k}") not in taken)
            taken.add(program.names[node])
        if program.output.op == "call_function":
            program.names[program.output] = next(n for n in ("z", "out", "result", "f_out") if n not in taken)

    def explain(self, derivative: Derivative, level: str) -> Explanation:
        """Assemble the steps, the chain, the result, its code and its checks."""
        if level not in LEVELS:
            fail("explain", "level", f"is {level!r}", f"one of {list(LEVELS)}", "Choose one.", ValueError)
        code, namespace = vjp_code(derivative)
        top = self.program.name_of(self.program.output)
        bottom = self.program.name_of(self.program.source)
        shown = formula(derivative.terms, derivative.out_shape, derivative.in_shape, f"d{top}/d{bottom}", self.axes)
        result = Step("chain", f"d{top}/d{bottom}", shown, derivative, _why(derivative))
        return Explanation(
            level,
            self._title(),
            tuple(self.steps),
            tuple(self._chain(top, bottom)),
            result,
            code,
            namespace,
            tuple(self._checks(derivative, code, namespace, level)),
        )

    def _title(self) -> str:
        program = self.program
        inputs = "  ".join(
            f"{program.name_of(n)}:{tuple(v.shape)}" for n, v in program.values.items() if n.op == "placeholder"
        )
        line = source_line(program.output)
        head = f"{line}\n" if line else ""
        return f"{head}{inputs}  ->  {program.name_of(program.output)}:{tuple(self.out.shape)}"

    @cached_property
    def steps(self) -> list[Step]:
        """One step for each op on a path, two where an operand is broadcast."""
        found: list[Step] = []
        active = {self.program.source, *self.program.active}
        for node in self.program.active:
            call = self.program.call(node)
            if call is None:
                continue
            for k, source in enumerate(self.program.operand_nodes(node)):
                if source in active:
                    found += self._op_steps(node, call, k, source)
        return found

    def _op_steps(self, node: fx.Node, call: Call, k: int, source: fx.Node) -> list[Step]:
        name, operand = self.program.name_of(node), self.program.name_of(source)
        found = []
        x = call.operands[k]
        if _broadcasts(call, x):
            wide = f"{operand}_b"
            spread = _expansion(x, call.out)
            found.append(
                Step(
                    "broadcast",
                    f"{operand} -> {wide}   {tuple(x.shape)} -> {tuple(call.out.shape)}",
                    formula(spread.terms, spread.out_shape, spread.in_shape, f"d{wide}/d{operand}"),
                    spread,
                    _why_copied(spread),
                    self._line(node),
                )
            )
            args, kwargs = call.with_operand(k, x.expand(call.out.shape))
            names = tuple(wide if j == k else n for j, n in enumerate(call.names))
            call, operand = replace(call, args=args, kwargs=kwargs, names=names), wide
        local = local_derivative(call, k)
        text = f"{name} = {_written(call)}"
        symbol = f"d{name}/d{operand}"
        shown = formula(local.terms, local.out_shape, local.in_shape, symbol)
        op = call.target._schema.name.split("::")[1]
        found.append(Step(op, text, shown, local, _why(local), self._line(node)))
        return found

    def _line(self, node: fx.Node) -> str:
        """The line that made a node, where it is not the title's."""
        line = source_line(node)
        return "" if line == source_line(self.program.output) else line

    def _chain(self, top: str, bottom: str) -> list[str]:
        """How the steps join: the paths by name, and over a broadcast the sum index by index."""
        if not self.steps:
            return []
        links: dict[str, list[tuple[str, str]]] = {}
        for step in self.steps:
            above, below = (part[1:] for part in step.formula.symbol.split("/"))
            links.setdefault(below, []).append((above, step.formula.symbol))
        paths = _paths(links, bottom, top, 5)
        if len(paths) <= 4:
            sums = " + ".join(" · ".join(reversed(path)) for path in paths)
        else:
            sums = "sum over all paths from the input to the output of the products of their steps"
        lines = [f"d{top}/d{bottom} = {sums}"] if len(self.steps) > 1 else []
        direct = [s for s in self.steps if s.op == "broadcast" and s.formula.symbol.endswith(f"/d{bottom}")]
        if len(direct) == 1 and len(links[bottom]) == 1:
            lines += _broadcast_chain(direct[0].derivative, self.out.shape, top, bottom)
        return lines

    def _checks(self, J: Derivative, code: str, namespace: dict[str, Tensor], level: str) -> list[tuple[str, float]]:
        """Compare with autograd: the code that was printed, and on small derivatives every entry."""

        def alone(x: Tensor) -> Tensor:
            return self.f(*self.args[: self.wrt], x, *self.args[self.wrt + 1 :])

        x = self.args[self.wrt]
        generator = torch.Generator(device="cpu").manual_seed(0)
        g = torch.randn(J.out_shape, generator=generator, dtype=torch.float64).to(J.device, J.dtype)
        pulled: Any = torch.func.vjp(alone, x)
        (expected,) = pulled[1](g)
        scope: dict[str, Any] = {"torch": torch, "g": g, **namespace}
        exec(code, scope)
        checks = [("the code above against autograd's vjp", _error(scope["x_bar"], expected))]
        if level == "proof" or math.prod(J.shape) <= 4096:
            checks.append(("every entry against torch.func.jacrev", _error(J.dense(), torch.func.jacrev(alone)(x))))
        if level == "proof":
            v = torch.randn(J.in_shape, generator=generator, dtype=torch.float64).to(J.device, J.dtype)
            checks.append(("<g, J v> against <J^T g, v>", _error((g * J.jvp(v)).sum(), (J.vjp(g) * v).sum())))
        return checks


def _error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def _broadcasts(call: Call, x: Tensor) -> bool:
    """Is an entry-by-entry op's operand smaller than the result?"""
    return torch.Tag.pointwise in call.target.tags and x.shape != call.out.shape


def _expansion(x: Tensor, out: Tensor) -> Derivative:
    axes = fresh_axes(out.shape)
    term = Term(1.0, (), axes, broadcast_axes(axes, x.shape))
    return Derivative((term,), out.shape, x.shape, x.dtype, x.device)


def _written(call: Call) -> str:
    """The op as a person writes it."""
    op = call.target._schema.name.split("::")[1]
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "mm": "@", "bmm": "@"}
    schema = call.target._schema.arguments
    shown: list[str] = []
    named = {place: k for k, place in enumerate(call.places)}
    for a, value in zip(schema, call.args, strict=False):
        if (a.name, None) in named:
            shown.append(call.operand_name(named[a.name, None]))
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            parts = [call.operand_name(named[a.name, k]) for k in range(len(value)) if (a.name, k) in named]
            shown.append(f"[{', '.join(parts)}]")
        else:
            shown.append(f"{a.name}:{tuple(value.shape)}" if isinstance(value, Tensor) else str(value))
    defaults = {a.name: a.default_value for a in schema}
    plain = all(not isinstance(v, Tensor) and v == defaults.get(name) for name, v in call.kwargs.items())
    if op in signs and len(shown) == 2 and plain:
        return f"{shown[0]} {signs[op]} {shown[1]}"
    return f"{op}({', '.join(shown)})"


def _why_copied(J: Derivative) -> str:
    form = formula(J.terms, J.out_shape, J.in_shape)
    copied = _only_on_output(J.terms[0], form.out)
    subject, pronoun = ("index", "it") if len(copied) == 1 else ("indices", "them")
    verb = "stands" if len(copied) == 1 else "stand"
    return (
        f"{subject} {', '.join(copied)} {verb} on the output only: every entry of the input is copied along {pronoun}"
    )


def _only_on_output(term: Term, out: Sequence[str]) -> list[str]:
    used = {x for axis in term.inn for x in axis} | {x for f in term.factors for x in f.labels}
    return [name for name, axis in zip(out, term.out, strict=True) if axis and not any(x in used for x in axis)]


def _why(J: Derivative) -> str:
    """What the labels say: deltas tie, lone output indices copy, lone input indices sum."""
    if not J.terms:
        return "the result does not depend on it"
    term, *more = J.terms
    if more:
        return f"a sum of {len(J.terms)} terms"
    form = formula(J.terms, J.out_shape, J.in_shape)
    reasons = []
    deltas = form.lines[0].deltas
    if deltas:
        reasons.append(f"{', '.join(f'δ({a},{b})' for a, b in deltas)} ties output to input and is never stored")
    if copied := _only_on_output(term, form.out):
        reasons.append(f"index {', '.join(copied)} is on the output only: copies")
    used = {x for axis in term.out for x in axis} | {x for f in term.factors for x in f.labels}
    summed = [n for n, axis in zip(form.inn, term.inn, strict=True) if axis and not any(x in used for x in axis)]
    if summed:
        reasons.append(f"index {', '.join(summed)} is on the input only: a sum")
    for name, labels in form.lines[0].factors:
        reasons.append(f"{name}[{','.join(labels)}] {tuple(form.tensors[name].shape)}")
    return "; ".join(reasons)


def _broadcast_chain(spread: Derivative, out_shape: Sequence[int], top: str, bottom: str) -> list[str]:
    """dz/dx = Σ_b dz/dx_b dx_b/dx; the deltas of the copy keep one index each, the copied axes stay summed."""
    names = letters()
    out = ["0" if n == 1 else next(names) for n in out_shape]
    inn = ["0" if n == 1 else next(names) for n in spread.in_shape]
    mid = ["0" if n == 1 else next(names) for n in spread.out_shape]
    (term,) = spread.terms
    at = {axis: name for axis, name in zip(term.inn, inn, strict=True) if axis}
    copied = [name for name, axis in zip(mid, term.out, strict=True) if axis and axis not in at]
    tied = [(name, at[axis]) for name, axis in zip(mid, term.out, strict=True) if axis in at]
    kept = [at.get(axis, name) for name, axis in zip(mid, term.out, strict=True)]
    wide = f"{bottom}_b"
    left = f"d{top}/d{bottom}[{','.join([*out, *inn])}]"
    sums = " ".join(f"Σ_{m}" for m in mid if m != "0")
    first = f"{sums} d{top}/d{wide}[{','.join([*out, *mid])}] · d{wide}/d{bottom}[{','.join([*mid, *inn])}]"
    copies = " ".join(f"Σ_{m}" for m in copied)
    second = f"{copies} d{top}/d{wide}[{','.join([*out, *kept])}]"
    tie = " ".join(f"δ({a},{b})" for a, b in tied)
    reason = f"{tie} keeps one index; " if tied else ""
    return [
        f"{left} = {first}",
        f"{' ' * len(left)} = {second}    <- the sum runs over the broadcast axis {', '.join(copied)}: {reason}no delta ties "
        f"{', '.join(copied)}, each copy of {bottom}[{','.join(inn)}] in {wide}[{','.join(kept)}] contributes",
    ]


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

"""A derivation as data, and as text, LaTeX and HTML made from that data.

Each op is a step with its local derivative in index form; broadcasting is a step of its own, x -> x_b; then the chain,
the final formula, how to apply it (torch code), and a check against autograd.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dualform.calculus.notation import Formula
from dualform.calculus.structure import Derivative

LEVELS = ("one-line", "steps", "proof")


@dataclass(frozen=True)
class Step:
    """One link: d out / d operand of one op, its formula, and the reason for its shape."""

    op: str
    text: str
    formula: Formula
    derivative: Derivative
    why: str = ""
    line: str = ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.derivative.out_shape

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.derivative.in_shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.derivative.shape


@dataclass(frozen=True)
class Explanation:
    """The account of a derivative: `steps` link the input to the output, `result` is the whole.

    chain: lines that join the steps; code: torch statements that map `g` to `x_bar` with the tensors of `namespace`;
    checks: (what, largest error)
    """

    level: str
    title: str
    steps: tuple[Step, ...]
    chain: tuple[str, ...]
    result: Step
    code: str
    namespace: Mapping[str, Tensor]
    checks: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        if self.level == "one-line":
            return f"{self.result.formula}   {_account(self.result.derivative)}"
        lines = [self.title, ""]
        for number, step in enumerate(self.steps, 1):
            lines += _step_lines(f"Step {number}", step)
        lines += _step_lines(f"Step {len(self.steps) + 1}", self.result, self.chain)
        lines += [f"Step {len(self.steps) + 2}  use        the vjp, x_bar = Σ_out g[out] J[out, in]:"]
        lines += [f"        {line}" for line in self.code.splitlines()]
        lines += [f"checked     {what}: max error {error:.1e}" for what, error in self.checks]
        return "\n".join(lines)

    def to_latex(self) -> str:
        """Write the steps and the result as an aligned LaTeX block.

        Shape:  none.
        Dtype:  none.
        Raises: nothing.
        """
        rows = [
            step.formula.latex()
            for step in ((*self.steps, self.result) if self.level != "one-line" else (self.result,))
        ]
        body = " \\\\\n".join(row.replace(" = ", " &= ", 1) for row in rows)
        return "\\begin{aligned}\n" + body + "\n\\end{aligned}"

    def _repr_html_(self) -> str:
        return f'<pre class="dualform-explanation">{_coloured(html.escape(str(self)))}</pre>'


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")


def _coloured(text: str) -> str:
    """Give every index its colour wherever it stands inside brackets."""

    def paint(match: re.Match[str]) -> str:
        inside = re.sub(
            r"[a-z]\w*'?",
            lambda m: (
                f'<span style="color:{_COLOURS[sum(map(ord, m[0])) % len(_COLOURS)]}" title="index {m[0]}">{m[0]}</span>'
            ),
            match[2],
        )
        return match[1] + inside + match[3]

    return re.sub(r"([\[(])([a-z][a-z0-9,'+*]*)([\])])", paint, text)


def _step_lines(head: str, step: Step, chain: Sequence[str] = ()) -> list[str]:
    name = step.op if len(step.op) > 10 else f"{step.op:<10}"
    lines = [f"{head}  {name} {step.text}" + (f"      # {step.line}" if step.line else "")]
    lines += [f"        {line}" for line in chain]
    shown = f"{step.formula}" if not chain else f"{step.formula.left} = {step.formula.right()}"
    lines.append(f"        {shown}")
    lines.append(f"        {_account(step.derivative)}")
    if step.why:
        lines.append(f"        why: {step.why}")
    return [*lines, ""]


def _account(J: Derivative) -> str:
    """out-shape + in-shape = J-shape; how many numbers dense and stored."""
    unit = J.dtype.itemsize
    return f"shape {J.out_shape} + {J.in_shape} = {J.shape}; {math.prod(J.shape):,} numbers if dense, {J.nbytes // unit:,} stored"

"""A derivation as data, and as text, LaTeX and HTML made from that data.

Each op is a step with its local derivative in index form; broadcasting is a step of its own, x -> x_b; the stages are
the proof, one move a line; then the final formula, how to apply it (torch code), and a check against autograd.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Protocol

import torch
from torch import Tensor

from dualform.algebra.index_products import is_same
from dualform.algebra.index_text import IndexFormula
from dualform.explanations import html
from dualform.explanations.chain_rule import Move
from dualform.explanations.steps import Letters, OpStep, Stage
from dualform.explanations.torch_code import Pullback

LEVELS = ("one-line", "steps", "proof")
# How many steps, and how many stages of a proof, are shown; the rest is counted, and is in the data.
MAX_TOLD = 24
# The longest formula that is shown beside the stored form.
MAX_TEXT = 240


class MatrixText(Protocol):
    """The result in matrix notation: left = text."""

    @property
    def left(self) -> str: ...

    @property
    def text(self) -> str: ...

    def latex(self) -> str: ...


@dataclass(frozen=True)
class Explanation:
    """The account of a derivative: `steps` link the input to the output, `result` is the whole.

    chain: lines that join the steps; vjp: torch statements that pull a gradient back, in the formulas' names;
    checks: (what, largest error, relative to the largest number where that is above 1); stages: the proof; expanded:
    the result with no stored product or sum in it; notes: where the gradient is no number, and why; matrices: the
    result in matrix notation, of an argument and a result of two axes what a change does (dZ = A dX B)
    """

    level: str
    title: str
    steps: tuple[OpStep, ...]
    chain: tuple[str, ...]
    result: OpStep
    vjp: Pullback
    checks: tuple[tuple[str, float], ...]
    stages: tuple[Stage, ...] = ()
    expanded: IndexFormula | None = None
    notes: tuple[str, ...] = ()
    matrices: MatrixText | None = None

    @property
    def code(self) -> str:
        """The statements."""
        return self.vjp.text

    @property
    def namespace(self) -> Mapping[str, Tensor]:
        """The tensors that the code names, and the formulas."""
        return self.vjp.namespace

    @property
    def use(self) -> str:
        """What the code does, in index notation."""
        return f"{self.vjp.target} = Σ_out {self.vjp.seed}[out] J[out, in]"

    def __str__(self) -> str:
        if self.level == "one-line":
            return f"{self.result.formula.sentence}   {self.result.account}"
        lines, said = [self.title, ""], Letters()
        for number, step in self.shown:
            lines += [step, ""] if isinstance(step, str) else _step_lines(f"Step {number}", step, self.level, said)
        last = len(self.steps) + 1
        if self.level == "proof":
            lines += self._proof_lines(said)
        lines += self._result_lines(f"Step {last}", said)
        lines += [f"Step {last + 1}  use        the vjp, {self.use}:"]
        lines += [f"        {line}" for line in self.code.splitlines()]
        lines += [f"checked     {said}" for said in self.verdicts]
        lines += [f"note        {said}" for said in self.notes]
        return "\n".join(lines)

    @property
    def shown(self) -> list[tuple[int, OpStep | str]]:
        """The steps to show with their numbers; of a long program the first and the last, and a line on the others."""
        numbered: list[tuple[int, OpStep | str]] = list(enumerate(self.steps, 1))
        if len(numbered) <= MAX_TOLD:
            return numbered
        first, last = 2 * MAX_TOLD // 3, MAX_TOLD // 3
        between = Counter(step.op for step in self.steps[first:-last])
        ops = ", ".join(f"{op} {n}x" if n > 1 else op for op, n in between.most_common())
        told = f"Steps {first + 1} to {len(numbered) - last} are left out here; they are in .steps: {ops}"
        return [*numbered[:first], (0, told), *numbered[-last:]]

    @property
    def shown_stages(self) -> list[Stage]:
        """The stages of the proof that are shown."""
        return [stage for stage in self.stages if stage.moves][:MAX_TOLD]

    @property
    def key_stages(self) -> list[Stage]:
        """What belongs to the result without the whole proof: sums over copies, and a chain of two."""
        kept = [s for s in self.stages if s.has_copies or (s.moves and len(self.steps) == 2)]
        return [replace(stage, moves=tuple(_short(stage.moves))) for stage in kept]

    @property
    def result_name(self) -> str:
        return "chain" if len(self.steps) > 1 else "result"

    @property
    def verdicts(self) -> list[str]:
        """What was checked, and how it came out."""
        return [f"{what}: {_verdict(error)}" for what, error in self.checks]

    def _proof_lines(self, said: Letters) -> list[str]:
        """Every stage, every move, with its reason beside it."""
        lines = ["Proof   every line equals the one above it; beside it, why", ""] if self.shown_stages else []
        for stage in self.shown_stages:
            lines += [*(f"        {line}" for line in _moves(stage.moves, said)), ""]
        return [*lines, *([f"        {note}", ""] if (note := self.left_out) else [])]

    @property
    def left_out(self) -> str:
        """What the proof does not show, and why; empty if it is whole."""
        told = [stage for stage in self.stages if stage.moves]
        if len(told) > MAX_TOLD:
            return f"{len(told) - MAX_TOLD} further stages are left out here; they are in .stages."
        if self.steps and (not self.stages or self.stages[-1].symbol != self.result.formula.symbol):
            return "The later stages are left out: written out, their derivatives are too large to look at."
        return ""

    def _result_lines(self, head: str, said: Letters) -> list[str]:
        step, f = self.result, self.result.formula
        lines = [f"{head}  {self.result_name:<10} {f.symbol}"]
        lines += [f"        {line}" for line in self.chain]
        if self.level == "steps":
            for stage in self.key_stages:
                lines += [f"        {line}" for line in _moves(stage.moves, said)]
        if self.is_rewritten and self.expanded is not None:
            lines.append(f"        {self.expanded}    <- written out")
            lines += _where(said.of(self.expanded))
        lines += [f"        {f}{_ranges(f)}", *_where(said.of(f))]
        lines += [f"        {self.matrices}    <- in matrices"] if self.matrices else []
        lines.append(f"        {step.account}")
        if len(self.steps) != 1 or self.level == "proof":
            lines += _because(step.reasons)
        return [*lines, ""]

    @property
    def is_rewritten(self) -> bool:
        """Is the stored form another one than the formula that the steps give?"""
        if self.expanded is None or len(self.expanded.sentence) > MAX_TEXT:
            return False
        return not is_same(self.expanded, self.result.formula)

    def to_latex(self) -> str:
        """Write the steps and the result as an aligned LaTeX block.

        Shape:  none.
        Dtype:  none.
        Raises: nothing.
        """
        chains: list[list[IndexFormula]] = []
        if self.level != "one-line":
            chains += [[step.formula] for _, step in self.shown if isinstance(step, OpStep)]
        for stage in self.shown_stages if self.level == "proof" else self.key_stages if self.level == "steps" else []:
            chains.append([move.formula for move in stage.moves])
        is_whole = self.is_rewritten and self.expanded is not None and self.level != "one-line"
        chains.append([self.expanded, self.result.formula] if is_whole and self.expanded else [self.result.formula])
        rows, said = list[str](), Letters()
        for first, *rest in chains:
            rows += [first.latex(), *(f"= {f.latex_right()}" for f in rest)]
            rows += [letter.latex() for f in (first, *rest) for letter in said.of(f)]
        rows += [self.matrices.latex()] if self.matrices else []
        aligned = [row.replace("= ", "&= ", 1) for row in rows]
        return "\\begin{aligned}\n" + " \\\\\n".join(aligned) + "\n\\end{aligned}"

    def to_html(self) -> str:
        """Write the whole as HTML that stands alone: hovering over an index lights up its axis wherever it stands.

        Shape:  none.
        Dtype:  none.
        Raises: nothing.
        """
        return html.page(_html(self))

    _repr_html_ = to_html

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and strings, for JSON.

        Shape:  none.
        Dtype:  none.
        Raises: nothing.
        """

        def told(step: OpStep) -> dict[str, Any]:
            stored = step.derivative.nbytes // step.derivative.dtype.itemsize
            return {
                "op": step.op, "text": step.text, "formula": str(step.formula), "latex": step.formula.latex(),
                "where": [letter.told for letter in step.formula.where],
                "out_shape": list(step.out_shape), "in_shape": list(step.in_shape), "dense": math.prod(step.shape),
                "stored": stored, "why": list(step.reasons), "rule": step.rule,
            }  # fmt: skip

        stages = [stage.moves for stage in self.stages if stage.moves]
        proof = [[{"formula": str(move.formula), "why": move.reason} for move in moves] for moves in stages]
        return {
            "title": self.title, "steps": [told(step) for step in self.steps], "proof": proof,
            "result": told(self.result), "matrices": str(self.matrices or ""),
            "code": self.code, "checks": dict(self.checks), "notes": list(self.notes),
        }  # fmt: skip


def _html(told: Explanation) -> Iterable[str]:
    if told.level == "one-line":
        yield html.one_line(told.result)
        return
    said = Letters()
    line, _, shapes = told.title.rpartition("\n")
    yield f'<div class="head">{escape(shapes)}</div>'
    if line:
        yield f'<div class="note"><code>{escape(line)}</code></div>'
    for number, step in told.shown:
        if isinstance(step, str):
            yield f'<div class="note">{escape(step)}</div>'
        else:
            yield html.link(number, step, told.level == "proof", said)
    last = len(told.steps) + 1
    if told.level == "proof":
        yield from (html.stage(stage, said) for stage in told.shown_stages)
        if told.left_out:
            yield f'<div class="note">{escape(told.left_out)}</div>'
    yield _html_result(last, told, said)
    code = escape(told.code)
    close = torch.finfo(told.result.derivative.dtype).eps ** 0.5
    judged = zip(told.verdicts, told.checks, strict=True)
    checks = "".join(html.check(said, error < close) for said, (_, error) in judged)
    checks += "".join(f'<div class="note">{escape(said)}</div>' for said in told.notes)
    yield (
        f'<div class="step"><div class="head">Step {last + 1} &nbsp;use &nbsp;<code>{escape(told.use)}'
        f"</code></div><pre>{code}</pre>{checks}</div>"
    )


def _html_result(number: int, told: Explanation, said: Letters) -> str:
    step = told.result
    head = f"Step {number} &nbsp;{told.result_name} &nbsp;<code>{escape(step.formula.symbol)}</code>"
    parts = [f'<div class="head">{head}</div>']
    parts += [f'<div class="f">{escape(line)}</div>' for line in told.chain]
    parts += [html.stage(stage, said, "Chain rule") for stage in told.key_stages] if told.level == "steps" else []
    if told.is_rewritten and told.expanded is not None:
        parts.append(f'{html.formula(told.expanded, said)}<div class="note">stored as</div>')
    parts.append(html.formula(step.formula, said))
    parts += [f'<div class="f">{escape(str(told.matrices))}</div>'] if told.matrices else []
    parts.append(html.account(step))
    parts += [html.why(step.reasons)] if len(told.steps) != 1 or told.level == "proof" else []
    return f'<div class="step end lit">{"".join(parts)}</div>'


def _step_lines(head: str, step: OpStep, level: str, said: Letters) -> list[str]:
    name = step.op if len(step.op) > 10 else f"{step.op:<10}"
    lines = [f"{head}  {name} {step.text}" + (f"      # {_cut(step.line)}" if step.line else "")]
    lines += [f"        {step.formula}{_ranges(step.formula)}", *_where(said.of(step.formula))]
    lines.append(f"        {step.account}")
    lines += _because(step.reasons)
    if level == "proof" and step.rule:
        lines.append(f"        rule: {step.rule}")
    return [*lines, ""]


def _cut(line: str) -> str:
    """A source line that leaves the place where it stands readable."""
    code, _, place = line.rpartition("   (")
    return line if len(code) <= 60 else f"{code[:57]}...   ({place}"


def _because(reasons: Sequence[str]) -> list[str]:
    return [f"        {'why: ' if k == 0 else '     '}{reason}" for k, reason in enumerate(reasons)]


def _ranges(f: IndexFormula) -> str:
    return f"    ({f.ranges})" if f.ranges else ""


def _short(moves: Sequence[Move]) -> list[Move]:
    """The chain rule, the sum over copies, the formulas put in, and the end."""
    said = ("copy contributes", "put in")
    kept = [move for k, move in enumerate(moves) if k < 2 or any(words in move.reason for words in said)]
    if moves[-1] not in kept:
        # what came between is in the proof
        kept.append(moves[-1])
    return kept


def _moves(moves: Sequence[Move], said: Letters) -> list[str]:
    """left = right    <- reason, the equals signs below each other; then what their letters stand for."""
    left = moves[0].formula.left
    heads = [left, *[" " * len(left)] * (len(moves) - 1)]
    lines = [
        f"{head} = {move.formula.right()}{_ranges(move.formula)}    <- {move.reason}"
        for head, move in zip(heads, moves, strict=True)
    ]
    return lines + [line.strip() for move in moves for line in _where(said.of(move.formula))]


def _where(letters: Iterable[IndexFormula]) -> list[str]:
    return [f"        where {letter.told}" for letter in letters]


def _verdict(error: float) -> str:
    """How a check came out."""
    if math.isnan(error):
        return "not to be compared, the numbers are not finite here; differentiate at another point"
    return f"max error {error:.1e}"


def agreed(checks: list[tuple[str, float]], dtype: torch.dtype) -> list[tuple[str, float]]:
    """Hand checks on; one that failed is an error, not a line of an account."""
    most = torch.finfo(dtype).eps ** 0.5
    for what, error in checks:
        if error > most:
            raise ArithmeticError(
                f"explain: {what}: the largest error is {error:.1e}; expected at most {most:.1e}. The derivative is "
                "wrong here: do not use it, and report the function."
            )
    return checks


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest difference from the finite numbers of b, as a part of the largest where that is above 1."""
    if b.numel() and not b.isfinite().any():
        return math.nan
    apart = torch.where((a == b) | ~b.isfinite(), 0.0, (a - b).abs())
    return (apart.max() / b.nan_to_num(0, 0, 0).abs().max().clamp(min=1)).item() if a.numel() else 0.0

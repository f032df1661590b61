"""The derivation of a chunk program, told: where weights meet data, the derivative there, the form, its price."""

from __future__ import annotations

import html
from dataclasses import dataclass

from torch import nn

from dualform.algebra.planner import Price
from dualform.learning.derive import Derivation, TracedStep
from dualform.learning.emit import Choice
from dualform.learning.forms import says
from dualform.learning.printer import Cost


@dataclass(frozen=True)
class SiteStep:
    """One site: the text's lines, the same in LaTeX, and the choice itself."""

    title: str
    lines: tuple[tuple[str, str], ...]  # (what, text)
    latex: tuple[str, ...]
    choice: Choice


@dataclass(frozen=True)
class Account:
    """An explanation as data; print it, or ask for LaTeX or HTML."""

    title: str
    facts: tuple[str, ...]
    steps: tuple[SiteStep, ...]
    summary: str
    code: str
    level: str

    def __str__(self) -> str:
        if self.level == "one-line":
            return f"{self.title}: {self.summary}"
        lines = [self.title, *self.facts, ""]
        for step in self.steps:
            lines += [step.title, *(f"  {what:<11} {text}" for what, text in step.lines), ""]
        lines.append(self.summary)
        if self.level == "proof":
            lines += ["", self.code]
        return "\n".join(lines)

    def to_latex(self) -> str:
        """Return the sites' equations as one LaTeX `align*`."""
        rows = [row for step in self.steps for row in step.latex]
        return "\\begin{align*}\n" + " \\\\\n".join(rows) + "\n\\end{align*}"

    def _repr_html_(self) -> str:
        def table(step: SiteStep) -> str:
            rows = "".join(
                f"<tr><td>{html.escape(what)}</td><td><code>{html.escape(text)}</code></td></tr>"
                for what, text in step.lines
            )
            return f"<h4>{html.escape(step.title)}</h4><table>{rows}</table>"

        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self.facts)
        code = f"<details><summary>one mini-batch</summary><pre>{html.escape(self.code)}</pre></details>"
        body = "".join(table(step) for step in self.steps)
        return f"<h3>{html.escape(self.title)}</h3><ul>{facts}</ul>{body}<p>{html.escape(self.summary)}</p>{code}"


def account(
    learner: nn.Module, derivation: Derivation, step: TracedStep, cost: Cost, code: str, level: str, backend: str,
    proof: str,
) -> Account:  # fmt: skip
    """Tell a derivation from its traced step."""
    if level not in ("one-line", "steps", "proof"):
        raise ValueError(
            f"explain: level is {level!r}; expected 'one-line', 'steps' or 'proof'. Choose one of the three."
        )
    inner, leaves = derivation.inner, step.inputs.th
    shapes = ", ".join(f"{name} {tuple(w.shape)}" for name, w in leaves.items())
    slow = ", ".join(derivation.parts.slow) or "none"
    objective = derivation.door.objective
    loss = getattr(getattr(objective, "loss", objective), "__name__", "loss")
    target = "v - k" if inner.target == "v-k" else "v"
    registers = inner.rule.num_registers
    facts = (
        f"rows     (..., {derivation.K}) -> (..., {derivation.V}), one mini-batch = {derivation.chunk} tokens, one "
        "head",
        f"fast     {shapes};  slow: {slow}",
        f"loss     {loss}(f(k), {target}) per token, gradients g_s at the mini-batch's anchor th",
        f"rule     {inner.rule.name}: theta_t = c_t th + d_t . R_0 - sum over s <= t of C[t,s] g_s;  "
        f"{registers} register{'s' if registers > 1 else ''}, gates {', '.join(inner.rule.gates)}",
        "forms    " + ";  ".join(f"{name}: {why or 'applies'}" for name, why in derivation.forms().items()),
        f"backend  {backend}",
        f"proof    {proof}",
    )
    steps = tuple(_site(n, choice) for n, choice in enumerate(step.choices, 1))
    forms = ", ".join(f"{c.leaf} {c.form}" for c in step.choices)
    summary = (
        f"{forms}; {cost.flops:,} matmul flops and {cost.bytes:,} bytes written per mini-batch and head, "
        f"{cost.state_bytes:,} bytes of state"
    )
    title = f"{type(learner).__name__} learns at test time"
    return Account(title, facts, steps, summary, code, level)


def _site(n: int, c: Choice) -> SiteStep:
    title = f"site {n}: {c.leaf} meets the tokens in {c.op_text}"
    lines = [("derivative", str(c.derivative))]
    if c.why:
        lines.append(("per token", f"{c.leaf}_t = {c.leaf} - ... is formed for every token, because {c.why}"))
    left = ",".join(c.derivative.out)
    for k in c.kernels:
        right = ",".join(k.inn)
        lines.append(("correction", f"y[{left}] -= Σ_{right} K[{left},{right}] delta[{right}],   {k}"))
    other, rest = ("scores", "scores") if c.form != "scores" else ("weights per token", "state")
    lines.append(("form", f"{c.form}{says[c.form]}"))
    lines.append(("price", f"{_shown(c.prices[c.form])};  {other} would take {_shown(c.prices[rest])}"))
    latex = [c.derivative.latex(), *(f"y &\\mathrel{{-}}= K\\,\\delta, \\quad {k.latex()}" for k in c.kernels)]
    return SiteStep(title, tuple(lines), tuple(latex), c)


def _shown(price: Price) -> str:
    return f"{price.flops:,.0f} flops, {price.bytes:,.0f} bytes"

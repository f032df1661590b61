"""An explanation as HTML that stands alone: no network, no script; hovering over an index lights up its axis.

An index is a coloured span of class i-NAME wherever it stands: in a formula, and as the size of its axis in a shape. One
CSS rule for each index lights all of them up inside the step that the pointer is in.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch

from dualform.algebra.notation import Formula

if TYPE_CHECKING:
    from dualform.explanations.explain import Explanation, Stage, Step

# Okabe and Ito's colours, which colour-blind readers tell apart, darkened to be read on white.
_COLOURS = ("#0072b2", "#c04a00", "#00795a", "#a8407f", "#7a5c00", "#5b4fcf", "#8b1a1a", "#2f6f8f")
_serial = count(1)

_STYLE = """
.{k} {{ font: 14px/1.55 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; }}
.{k} .step {{ border: 1px solid #d8dee4; border-radius: 8px; padding: .5em .9em; margin: .6em 0; overflow-x: auto; }}
.{k} .step.end {{ border-color: #0072b2; background: #f6faff; }}
.{k} .head {{ font-weight: 600; }}
.{k} .head code {{ font-weight: 400; white-space: pre-wrap; }}
.{k} code, .{k} pre, .{k} .f {{ font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; font-size: 13px;
  background: none; border: 0; padding: 0; color: inherit; }}
.{k} pre {{ background: #f6f8fa; border-radius: 6px; padding: .5em .8em; margin: .3em 0; overflow-x: auto; }}
.{k} .f {{ margin: .25em 0; white-space: pre-wrap; }}
.{k} .f b {{ font-weight: 600; }}
.{k} .note, .{k} .why {{ color: #57606a; font-size: 13px; }}
.{k} ul.why {{ margin: .2em 0 .1em; padding-left: 1.3em; }}
.{k} table {{ border-collapse: collapse; border: 0; margin: .3em 0; }}
.{k} td {{ padding: .1em .5em .1em 0; vertical-align: baseline; white-space: pre; border: 0; background: none; text-align: left; }}
.{k} .move {{ display: flex; flex-wrap: wrap; column-gap: 1.4em; }}
.{k} .move .f {{ margin: 0; }} .{k} .move .why {{ flex: 1 1 15em; white-space: normal; }}
.{k} .i {{ border-radius: 3px; padding: 0 1px; cursor: help; }}
.{k} .tie {{ opacity: .92; border-bottom: 1px dashed currentColor; }}
.{k} .ok {{ color: #00795a; }} .{k} .bad {{ color: #b00020; font-weight: 600; }}
"""
_LIGHT = ".{k} .lit:has(.i-{n}:hover) .i-{n} {{ background: {c}; color: #fff; }}"
_INK = ".{k} .i-{n} {{ color: {c}; }}"


def page(told: Explanation) -> str:
    """Write an explanation as one HTML element with a style of its own."""
    key = f"df-explanation-{next(_serial)}"
    body = "".join(_body(told))
    names = sorted(set(re.findall(r'class="i i-([\w-]+)"', body)))
    colours = {n: _COLOURS[k % len(_COLOURS)] for k, n in enumerate(names)}
    style = _STYLE.format(k=key)
    style += "\n".join(rule.format(k=key, n=n, c=c) for n, c in colours.items() for rule in (_INK, _LIGHT))
    return f'<div class="dualform-explanation {key}"><style>{style}</style>{body}</div>'


def _body(told: Explanation) -> Iterable[str]:
    if told.level == "one-line":
        yield f'<div class="step lit">{_formula(told.result.formula)}{_account(told.result)}</div>'
        return
    line, _, shapes = told.title.rpartition("\n")
    yield f'<div class="head">{html.escape(shapes)}</div>'
    if line:
        yield f'<div class="note"><code>{html.escape(line)}</code></div>'
    for number, step in told.shown:
        if isinstance(step, str):
            yield f'<div class="note">{html.escape(step)}</div>'
        else:
            yield _step(number, step, told.level == "proof")
    last = len(told.steps) + 1
    if told.level == "proof":
        yield from (_stage(stage) for stage in told.shown_stages)
        if told.left_out:
            yield f'<div class="note">{html.escape(told.left_out)}</div>'
    yield _result(last, told)
    code = html.escape(told.code)
    close = torch.finfo(told.result.derivative.dtype).eps ** 0.5
    checks = "".join(_check(said, error < close) for said, (_, error) in zip(told.verdicts, told.checks, strict=True))
    yield (
        f'<div class="step"><div class="head">Step {last + 1} &nbsp;use &nbsp;<code>x_bar = Σ_out g[out] J[out, in]</code></div>'
        f"<pre>{code}</pre>{checks}</div>"
    )


def _step(number: int, step: Step, is_proof: bool) -> str:
    line = f'<div class="note"><code>{html.escape(step.line)}</code></div>' if step.line else ""
    rule = f'<div class="why">rule: {html.escape(step.rule)}</div>' if is_proof and step.rule else ""
    head = f'<div class="head">Step {number} &nbsp;{html.escape(step.op)} &nbsp;<code>{html.escape(step.text)}</code></div>'
    return f'<div class="step lit">{head}{line}{_formula(step.formula)}{_account(step)}{_why(step.reasons)}{rule}</div>'


def _stage(stage: Stage, name: str = "Proof") -> str:
    """Lines that are equal, each with its reason beside it, or below where there is no room."""
    rows = []
    for k, move in enumerate(stage.moves):
        left = _left(move.formula) if k == 0 else ""
        note = f' <span class="why">({move.formula.ranges})</span>' if move.formula.ranges else ""
        rows.append(
            f'<tr><td class="f">{left}&nbsp;</td><td><div class="move"><span class="f">= {_right(move.formula)}{note}</span>'
            f'<span class="why">{_indexed(move.reason)}</span></div></td></tr>'
        )
    head = f'<div class="head">{name} &nbsp;<code>{html.escape(stage.symbol)}</code></div>'
    return f'<div class="step lit">{head}<table>{"".join(rows)}</table></div>'


def _result(number: int, told: Explanation) -> str:
    step = told.result
    parts = [
        f'<div class="head">Step {number} &nbsp;{told.result_name} &nbsp;<code>{html.escape(step.formula.symbol)}</code></div>'
    ]
    parts += [f'<div class="f">{html.escape(line)}</div>' for line in told.chain]
    parts += [_stage(stage, "Chain rule") for stage in told.key_stages] if told.level == "steps" else []
    if told.is_rewritten and told.expanded is not None:
        parts.append(f'{_formula(told.expanded)}<div class="note">stored as</div>')
    parts += [_formula(step.formula), _account(step)]
    parts += [_why(step.reasons)] if len(told.steps) != 1 or told.level == "proof" else []
    return f'<div class="step end lit">{"".join(parts)}</div>'


def _why(reasons: Sequence[str]) -> str:
    return f'<ul class="why">{"".join(f"<li>{_indexed(reason)}</li>" for reason in reasons)}</ul>' if reasons else ""


def _check(said: str, good: bool) -> str:
    return f'<div class="{"ok" if good else "bad"}">{"✓" if good else "✗"} {html.escape(said)}</div>'


def _account(step: Step) -> str:
    """out-shape + in-shape = J-shape, each size an index of its axis."""
    f, J = step.formula, step.derivative
    sizes = [*zip(f.out, J.out_shape, strict=True)], [*zip(f.inn, J.in_shape, strict=True)]

    def shape(pairs: Sequence[tuple[str, int]]) -> str:
        shown = [_index(name, str(n)) if name != "0" else str(n) for name, n in pairs]
        return f"({', '.join(shown)}{',' if len(shown) == 1 else ''})"

    counts = step.account.partition("; ")[2]
    return f'<div class="note">shape {shape(sizes[0])} + {shape(sizes[1])} = {shape([*sizes[0], *sizes[1]])}; {counts}</div>'


def _formula(f: Formula) -> str:
    note = f' <span class="why">({f.ranges})</span>' if f.ranges else ""
    return f'<div class="f">{_left(f)} = {_right(f)}{note}</div>'


def _left(f: Formula) -> str:
    indices = ",".join(_index(name, name) for name in (*f.out, *f.inn))
    symbol = html.escape(f.symbol)
    return f"<b>{symbol}</b>[{indices}]" if indices else f"<b>{symbol}</b>"


def _right(f: Formula) -> str:
    """The sum of products with every index marked: the text of `Formula.right`, span by span."""
    return _indexed(f.right())


def _indexed(text: str) -> str:
    """Mark the indices of a text: what stands in [...] after a name, in δ(...), and below Σ."""
    inside = r"[\w*+'-]+(?:,[\w*+'-]+)*"

    def mark(match: re.Match[str]) -> str:
        head, indices, tail = match[1], match[2], match[3]
        shown = f"{html.escape(head)}{_marked(indices)}{tail}"
        return f'<span class="tie">{shown}</span>' if head == "δ(" else shown

    pattern = re.compile(rf"(δ\(|Σ_|(?<=[\w)'\]])\[)({inside})(\)|\]|(?=[\s,:]|$))")
    found, at = [], 0
    for match in pattern.finditer(text):
        found += [html.escape(text[at : match.start()]), mark(match)]
        at = match.end()
    return "".join([*found, html.escape(text[at:])])


def _marked(indices: str) -> str:
    return re.sub(r"[^\W\d]\w*'*", lambda m: _index(m[0], m[0]), indices)


def _index(name: str, shown: str) -> str:
    if name == "0":
        return shown
    word = name.replace("'", "-")
    return f'<span class="i i-{word}" title="index {html.escape(name)}">{html.escape(shown)}</span>'

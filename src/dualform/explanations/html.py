"""What an explanation is made of as HTML that stands alone: no network, no script; an index under the mouse lights up.

An index is a coloured span of class i-NAME wherever it stands: in a formula, and as the size of its axis in a shape.
One CSS rule for each index lights all of them up inside the step that the pointer is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import count

from dualform.algebra.drawing import COLOURS
from dualform.algebra.index_text import IndexFormula
from dualform.explanations.steps import Letters, OpStep, Stage

_serial = count(1)

_STYLE = """
.{k} {{ font: 14px/1.55 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; }}
.{k} .step {{ border: 1px solid #d8dee4; border-radius: 8px; padding: .5em .9em; margin: .6em 0; overflow-x: auto; }}
.{k} .step.end {{ border-color: #0072b2; background: #f6faff; }}
.{k} .head {{ font-weight: 600; }}
.{k} .head code {{ font-weight: 400; white-space: pre-wrap; }}
.{k} code, .{k} pre, .{k} .f {{ font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace;
  font-size: 13px; background: none; border: 0; padding: 0; color: inherit; }}
.{k} pre {{ background: #f6f8fa; border-radius: 6px; padding: .5em .8em; margin: .3em 0; overflow-x: auto; }}
.{k} .f {{ margin: .25em 0; white-space: pre-wrap; }}
.{k} .f b {{ font-weight: 600; }}
.{k} .note, .{k} .why {{ color: #57606a; font-size: 13px; }}
.{k} ul.why {{ margin: .2em 0 .1em; padding-left: 1.3em; }}
.{k} table {{ border-collapse: collapse; border: 0; margin: .3em 0; }}
.{k} td {{ padding: .1em .5em .1em 0; vertical-align: baseline; white-space: pre; border: 0; background: none;
  text-align: left; }}
.{k} .move {{ display: flex; flex-wrap: wrap; column-gap: 1.4em; }}
.{k} .move .f {{ margin: 0; }} .{k} .move .why {{ flex: 1 1 15em; white-space: normal; }}
.{k} .i {{ border-radius: 3px; padding: 0 1px; cursor: help; }}
.{k} .tie {{ opacity: .92; border-bottom: 1px dashed currentColor; }}
.{k} .ok {{ color: #00795a; }} .{k} .bad {{ color: #b00020; font-weight: 600; }}
"""
_LIGHT = ".{k} .lit:has(.i-{n}:hover) .i-{n} {{ background: {c}; color: #fff; }}"
_INK = ".{k} .i-{n} {{ color: {c}; }}"


def page(parts: Iterable[str]) -> str:
    """Join parts to one HTML element with a style of its own."""
    key = f"df-explanation-{next(_serial)}"
    body = "".join(parts)
    names = sorted(set(re.findall(r'class="i i-([\w-]+)"', body)))
    colours = {n: COLOURS[k % len(COLOURS)] for k, n in enumerate(names)}
    style = _STYLE.format(k=key)
    style += "\n".join(rule.format(k=key, n=n, c=c) for n, c in colours.items() for rule in (_INK, _LIGHT))
    return f'<div class="dualform-explanation {key}"><style>{style}</style>{body}</div>'


def one_line(step: OpStep) -> str:
    return f'<div class="step lit">{formula(step.formula, Letters())}{account(step)}</div>'


def link(number: int, step: OpStep, is_proof: bool, said: Letters) -> str:
    line = f'<div class="note"><code>{escape(step.line)}</code></div>' if step.line else ""
    rule = f'<div class="why">rule: {escape(step.rule)}</div>' if is_proof and step.rule else ""
    head = f'<div class="head">Step {number} &nbsp;{escape(step.op)} &nbsp;<code>{escape(step.text)}</code></div>'
    shown = formula(step.formula, said)
    return f'<div class="step lit">{head}{line}{shown}{account(step)}{why(step.reasons)}{rule}</div>'


def stage(told: Stage, said: Letters, name: str = "Proof") -> str:
    """Lines that are equal, each with its reason beside it, or below where there is no room."""
    rows = []
    for k, move in enumerate(told.moves):
        left = _left(move.formula) if k == 0 else ""
        note = f' <span class="why">({escape(move.formula.ranges)})</span>' if move.formula.ranges else ""
        rows.append(
            f'<tr><td class="f">{left}&nbsp;</td><td><div class="move"><span class="f">= '
            f"{_indexed(move.formula.right())}{note}</span>"
            f'<span class="why">{_indexed(move.reason)}</span></div></td></tr>'
        )
    head = f'<div class="head">{name} &nbsp;<code>{escape(told.symbol)}</code></div>'
    where = "".join(_stated(letter, "where ") for move in told.moves for letter in said.of(move.formula))
    return f'<div class="step lit">{head}<table>{"".join(rows)}</table>{where}</div>'


def why(reasons: Sequence[str]) -> str:
    return f'<ul class="why">{"".join(f"<li>{_indexed(reason)}</li>" for reason in reasons)}</ul>' if reasons else ""


def check(said: str, good: bool) -> str:
    return f'<div class="{"ok" if good else "bad"}">{"✓" if good else "✗"} {escape(said)}</div>'


def account(step: OpStep) -> str:
    """out-shape + in-shape = J-shape, each size an index of its axis."""
    f, J = step.formula, step.derivative
    sizes = [*zip(f.out, J.out_shape, strict=True)], [*zip(f.inn, J.in_shape, strict=True)]

    def shape(pairs: Sequence[tuple[str, int]]) -> str:
        shown = [_index(name, str(n)) if name != "0" else str(n) for name, n in pairs]
        return f"({', '.join(shown)}{',' if len(shown) == 1 else ''})"

    counts = step.account.partition("; ")[2]
    whole = f"{shape(sizes[0])} + {shape(sizes[1])} = {shape([*sizes[0], *sizes[1]])}"
    return f'<div class="note">shape {whole}; {counts}</div>'


def formula(f: IndexFormula, said: Letters) -> str:
    """A formula, and below it what its letters stand for."""
    return "".join([_stated(f), *(_stated(letter, "where ") for letter in said.of(f))])


def _stated(f: IndexFormula, head: str = "") -> str:
    note = f' <span class="why">({escape(f.ranges)})</span>' if f.ranges else ""
    return f'<div class="f">{head}{_left(f)} = {_indexed(f.right())}{note}</div>'


def _left(f: IndexFormula) -> str:
    indices = ",".join(_index(name, name) for name in (*f.out, *f.inn))
    symbol = escape(f.symbol)
    return f"<b>{symbol}</b>[{indices}]" if indices else f"<b>{symbol}</b>"


def _indexed(text: str) -> str:
    """Mark the indices of a text: what stands in [...] after a name, in δ(...), and below Σ."""
    inside = r"[\w*+'-]+(?:,[\w*+'-]+)*"

    def mark(match: re.Match[str]) -> str:
        head, indices, tail = match[1], match[2], match[3]
        shown = f"{escape(head)}{_marked(indices)}{tail}"
        return f'<span class="tie">{shown}</span>' if head == "δ(" else shown

    pattern = re.compile(rf"(δ\(|Σ_|(?<=[\w)'\]])\[)({inside})(\)|\]|(?=[\s,:]|$))")
    found, at = [], 0
    for match in pattern.finditer(text):
        found += [escape(text[at : match.start()]), mark(match)]
        at = match.end()
    return "".join([*found, escape(text[at:])])


def _marked(indices: str) -> str:
    return re.sub(r"[^\W\d]\w*'*", lambda m: _index(m[0], m[0]), indices)


def _index(name: str, shown: str) -> str:
    if name == "0":
        return shown
    word = name.replace("'", "-")
    return f'<span class="i i-{word}" title="index {escape(name)}">{escape(shown)}</span>'

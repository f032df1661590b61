"""A schedule as C++: one statement per value, static sizes, no header but the preamble's.

A generated file holds `forward` or `backward` for some rows (batch x heads): a loop over mini-batches whose state stays in
the cache. What the caller gives and takes is an array of `Arg`s; scratch memory is the caller's, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import torch

from dualform.kernels.ops import TEXT
from dualform.kernels.statements import Item, Nest, Operand, Product, Read, Schedule, View, space_of

BASES = {"scratch": "s", "fixed": "f", "state": "st", "kept": "kp", "passed": "ps", "cotangent": "ct", "sums": "acc"}
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16", torch.bool: "bool",
    torch.int64: "int64_t", torch.int32: "int32_t", torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t",
}  # fmt: skip
LETTERS = "i", "k", "l", "m", "o"


def pointer(view: View) -> str:
    b = view.buffer.over or view.buffer
    base = "nx" if view.buffer.place == "next" else BASES.get(b.place, b.place)
    return f"{base} + {b.offset + view.offset}"


def number(x: float) -> str:
    if math.isinf(x):
        return "T(INFINITY)" if x > 0 else "T(-INFINITY)"
    return "T(NAN)" if math.isnan(x) else f"T({float(x)!r})"


def comment(view: View) -> str:
    return f"{view.buffer.name} {list(view.shape)}"


# -- statements -----------------------------------------------------------------------------------------------------


def product_text(p: Product) -> list[str]:
    batch = p.out.shape[:-2]
    if not batch:
        return [f"// {comment(p.out)} = {p.alpha:g} {comment(p.a)} @ {comment(p.b)}" + (f" {p.beta:+g} {comment(p.init)}" if p.init else "")] + _one_product(p)  # fmt: skip
    lines = [f"// {comment(p.out)} = {comment(p.a)} @ {comment(p.b)}, one by one"]
    for at in itertools.product(*map(range, batch)):

        def one(v: View, at: tuple[int, ...] = at) -> View:
            lead = v.strides[: len(at)]
            shift = sum(i * s for i, s in zip(at, lead, strict=True)) if len(v.shape) == len(at) + 2 else 0
            return View(v.buffer, v.shape[-2:], v.strides[-2:], v.offset + shift)

        lines += _one_product(Product(one(p.out), one(p.a), one(p.b), p.alpha, p.beta, p.init and one(p.init)))
    return lines


def _one_product(p: Product) -> list[str]:
    (M, K), N = p.a.shape, p.b.shape[1]
    (am, ak), (bk, bn), (cm, cn) = p.a.strides, p.b.strides, p.out.strides
    D = p.init
    dm, dn = D.strides if D else (0, 0)
    A, B, C = pointer(p.a), pointer(p.b), pointer(p.out)
    Dp = f"{pointer(D)}" if D else "nullptr"
    scale = f"{number(p.alpha)}, {number(p.beta)}"
    sums = "true" if D else "false"
    if N == 1:
        return [f"mv<{M}, {K}, {am}, {ak}, {bk}>({C}, {cm}, {A}, {B}, {scale}, {Dp}, {dm});"]
    if M == 1 and bn != 1:  # (B^T a^T)^T
        return [f"mv<{N}, {K}, {bn}, {bk}, {ak}>({C}, {cn}, {B}, {A}, {scale}, {Dp}, {dn});"]
    assert cn == 1
    if D and dn != 1:  # laid out otherwise than the result: there first
        return [*copy_text(p.out, D), *_one_product(Product(p.out, p.a, p.b, p.alpha, p.beta, p.out))]
    if bn == 1:
        return [f"mm<{M}, {N}, {K}, {am}, {ak}, {bk}, {sums}>({C}, {cm}, {A}, {B}, {scale}, {Dp}, {dm});"]
    align = p.out.buffer.align
    ldm, ldn = (-(-n // align) * align for n in (M, N))
    if am != 1 and K * M + M * N > K * N:
        return [
            f"{{ alignas(64) T packed[{K * ldn}];",
            *_pack(K, N, ldn, B, bk, bn),
            f"mm<{M}, {N}, {K}, {am}, {ak}, {ldn}, {sums}>({C}, {cm}, {A}, packed, {scale}, {Dp}, {dm}); }}",
        ]
    lines = [f"{{ alignas(64) T turned[{N * ldm}];"]  # (B^T A^T)^T
    if am != 1:
        lines += [f"alignas(64) T packed[{K * ldm}];", *_pack(K, M, ldm, A, ak, am)]
    packed, lda = (A, ak) if am == 1 else ("packed", ldm)
    lines.append(
        f"mm<{N}, {M}, {K}, {bn}, {bk}, {lda}, false>(turned, {ldm}, {B}, {packed}, {number(p.alpha)}, T(0), nullptr, 0);"
    )
    added = f", {number(p.beta)}, {Dp}, {dm}" if D else ""
    return [*lines, f"turn<{N}, {M}>({C}, {cm}, turned, {ldm}{added}); }}"]


def _pack(rows: int, columns: int, ld: int, p: str, row_step: int, column_step: int) -> list[str]:
    """Write packed[r * ld + c] = p[r * row_step + c * column_step]."""
    if row_step == 1:
        return [f"turn<{columns}, {rows}>(packed, {ld}, {p}, {column_step});"]
    return [f"for (int r = 0; r < {rows}; ++r) for (int c = 0; c < {columns}; ++c) packed[r * {ld} + c] = ({p})[r * {row_step} + c * {column_step}];"]  # fmt: skip


class _NestText:
    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.names = {item: f"v{k}" for k, item in enumerate(nest.items)}
        *lead, self.column = nest.space or (1,)
        self.lead = lead
        self.loops = [*LETTERS[: len(lead)], "j"] if nest.space else []
        self.later = dict.fromkeys(
            x for item in nest.items for x in item.operands
            if isinstance(x, Item) and x.kind == "map" and self.used(item) > x.stage
        )  # fmt: skip

    def used(self, item: Item) -> int:
        return item.stage - (item.kind == "reduce")

    def index(self, steps: Sequence[int], loops: Sequence[str]) -> str:
        parts = [(f"{s} * {i}" if s != 1 else i) for s, i in zip(steps, loops, strict=True) if s]
        return " + ".join(parts) or "0"

    def place(self, view: View, steps: Sequence[int], loops: Sequence[str]) -> str:
        return f"({pointer(view)})[{self.index(steps, loops)}]"

    def operand(self, x: Operand, item: Item, loops: Sequence[str]) -> str:
        if isinstance(x, Read):
            return self.place(x.view, x.steps, loops)
        if not isinstance(x, Item):
            return number(x)
        if x in self.later and self.used(item) > x.stage:
            return self.place(x.out, x.steps, self.loops) if x.kept else f"{self.names[x]}_[j]"
        return self.names[x]

    def value(self, item: Item, loops: Sequence[str]) -> str:
        at = [loops[a] if a is not None else "0" for a in item.axes]
        names = {f"i{k}": x for k, x in enumerate(at)} | {
            "row": (["0", *at])[-2] if at else "0",
            "col": at[-1] if at else "0",
        }
        operands = [f"{self.operand(x, item, loops)}" for x in item.operands]
        params = {k: (number(v) if k in ("value", "alpha", "start", "step") else v) for k, v in item.params.items()}
        return TEXT[item.op].format(*operands, T="T", **names, **params)

    def lines(self) -> list[str]:
        nest, loops = self.nest, self.loops
        inner = loops[:-1] if nest.space else []
        shown = " ".join(f"{i.out.buffer.name}{list(i.out.shape)}={i.op}" for i in nest.items)
        lines = [f"// {shown}", "{"]
        for item in nest.items:
            if item.kind == "total":
                lines.append(
                    f"for (int e = 0; e < {item.out.buffer.size}; ++e) ({pointer(item.out)})[e] = {START[item.op]};"
                )
        for x in self.later:
            if not x.kept:
                lines.append(f"alignas(64) T {self.names[x]}_[{self.column + 64}];")
        lines += [f"for (int {i} = 0; {i} < {n}; ++{i}) {{" for i, n in zip(inner, self.lead, strict=True)]
        for stage in range(nest.stages):
            lines += self.stage(stage, inner)
        lines += ["}" for _ in inner]
        for item in nest.items:
            if item.kind == "total" and item.params.get("scale", 1.0) != 1.0:
                lines.append(f"for (int e = 0; e < {item.out.buffer.size}; ++e) ({pointer(item.out)})[e] *= {number(item.params['scale'])};")  # fmt: skip
        return [*lines, "}"]

    def stage(self, stage: int, inner: Sequence[str]) -> list[str]:
        names, lines, body, after, sums, plain = self.names, [], [], [], [], True
        for item in self.nest.items:
            if item.kind == "row" and item.stage == stage:
                lines.append(f"T {names[item]} = {self.value(item, inner)};")
                if item.kept:
                    lines.append(f"{self.place(item.out, item.steps, inner)} = {names[item]};")
            elif item.kind == "map" and item.stage == stage:
                body.append(f"T {names[item]} = {self.value(item, self.loops)};")
                if item.kept:
                    body.append(f"{self.place(item.out, item.steps, self.loops)} = {names[item]};")
                elif item in self.later:
                    body.append(f"{names[item]}_[j] = {names[item]};")
            elif item.kind == "reduce" and item.stage == stage + 1:
                value = self.operand(item.operands[0], item, self.loops)
                lines.append(f"T {names[item]} = {START[item.op]};")
                body.append(UPDATE[item.op].format(names[item], value))
                sums += [names[item]] if item.op == "sum" else []
                plain = plain and item.op == "sum"
                if item.params.get("scale", 1.0) != 1.0:
                    after.append(f"{names[item]} *= {number(item.params['scale'])};")
                if item.kept:
                    after.append(f"{self.place(item.out, item.steps, inner)} = {names[item]};")
            elif item.kind == "total" and item.stage == stage:
                value, steps = self.operand(item.operands[0], item, self.loops), item.steps
                if steps and steps[-1]:
                    body.append(UPDATE[item.op].format(self.place(item.out, steps, self.loops), value))
                else:
                    lines.append(f"T {names[item]} = {START[item.op]};")
                    body.append(UPDATE[item.op].format(names[item], value))
                    sums += [names[item]] if item.op == "sum" else []
                    plain = plain and item.op == "sum"
                    target = self.place(item.out, steps[:-1], inner) if steps else f"({pointer(item.out)})[0]"
                    after.append(UPDATE[item.op].format(target, names[item]))
        if body:
            pragma = f'_Pragma("omp simd reduction(+ : {", ".join(sums)})")' if sums else "FREE"
            lines.append(f"{pragma if plain else ''} for (int j = 0; j < {self.column}; ++j) {{")
            lines += [*body, "}"]
        return [*lines, *after]


START = {"sum": "T(0)", "amax": "T(-INFINITY)", "amin": "T(INFINITY)", "prod": "T(1)"}
UPDATE = {
    "sum": "{0} += {1};", "prod": "{0} *= {1};", "amax": "{0} = ({1} > {0} || {1} != {1} ? {1} : {0});",
    "amin": "{0} = ({1} < {0} || {1} != {1} ? {1} : {0});",
}  # fmt: skip


def statements(s: Schedule) -> list[str]:
    lines: list[str] = []
    for one in s.statements:
        lines += product_text(one) if isinstance(one, Product) else _NestText(one).lines()
    return lines


# -- what moves between the caller and a block ----------------------------------------------------------------------


def _loops(shape: Sequence[int]) -> tuple[str, list[str]]:
    names = ["a", "c", "d", "e"][: len(shape)]
    return "".join(f"for (int {x} = 0; {x} < {n}; ++{x}) " for x, n in zip(names, shape, strict=True)), names


def _outside(arg: int, kind: str, names: Sequence[str], where: str) -> str:
    inner = " + ".join([f"{x} * g[{arg}].s{k}" for k, x in enumerate(names)]) or "0"
    return f"at<{kind}>(g[{arg}], {where})[{inner}]"


def load_text(view: View, arg: int, dtype: torch.dtype, where: str, ahead: str = "0") -> str:
    *lead, n, step, inside = _rows(view.shape, view.strides)
    loops, names = _loops(lead)
    source = _outside(arg, TYPES[dtype], names, where)
    last = f"g[{arg}].s{len(lead)}" if view.shape else "1"
    return f"{loops}take<{n}, {step}>({pointer(view)}{_inside(inside, names)}, &{source}, {last}, {ahead.format(arg)});"


def store_text(view: View | float, shape: Sequence[int], arg: int, dtype: torch.dtype, where: str) -> str:
    *lead, n, step, inside = _rows(shape, view.strides if isinstance(view, View) else [0] * len(shape))
    loops, names = _loops(lead)
    target = _outside(arg, TYPES[dtype], names, where)
    last = f"g[{arg}].s{len(lead)}" if shape else "1"
    if not isinstance(view, View):
        return f"{{ T x = {number(view)}; {loops}give<{n}, 0>(&{target}, &x, {last}); }}"
    return f"{loops}give<{n}, {step}>(&{target}, {pointer(view)}{_inside(inside, names)}, {last});"


def _rows(shape: Sequence[int], strides: Sequence[int]) -> tuple[Any, ...]:
    """Part a value into the sizes that lead and the rows: (*lead, entries, step, strides that lead)."""
    return (*shape[:-1], *(shape[-1:] or (1,)), *(strides[-1:] or (1,)), list(strides[:-1]))


def _inside(strides: Sequence[int], names: Sequence[str]) -> str:
    return "".join(f" + {s} * {x}" for s, x in zip(strides, names, strict=True) if s)


def copy_text(out: View, value: View | float) -> list[str]:
    if not isinstance(value, View):
        operand: object = value
    else:
        if out.buffer in (value.buffer, value.buffer.over) and value.offset == out.offset:
            return []
        operand = Read(value, value.along(out.shape))
    item = Item("map", "copy", [operand], {}, out, out.along(out.shape), kept=True)
    return _NestText(Nest(space_of(out.shape), [item])).lines()


def add_text(out: View, value: View | float) -> list[str]:
    if not isinstance(value, View):
        if value == 0:
            return []
        operand: object = value
    else:
        operand = Read(value, value.along(out.shape))
    item = Item("map", "plus", [Read(out, out.along(out.shape)), operand], {}, out, out.along(out.shape), kept=True)
    return _NestText(Nest(space_of(out.shape), [item])).lines()


def source(dtype: torch.dtype, functions: Iterable[str]) -> str:
    preamble = files("dualform.kernels").joinpath("preamble.h").read_text()
    return f"typedef {TYPES[dtype]} T;\n{preamble}\n" + "\n".join(functions)


def function(name: str, arguments: str, body: Sequence[str]) -> str:
    return indented([f"static void {name}({arguments}) {{", *body, "}", ""])


def indented(lines: Iterable[str]) -> str:
    """Indent by braces."""
    depth, found = 0, []
    for line in lines:
        closes = len(line) - len(line.lstrip("}"))
        found.append("  " * (depth - closes) + line)
        depth += line.count("{") - line.count("}")
    return "\n".join(found)

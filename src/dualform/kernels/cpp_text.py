"""A schedule as C++: one statement per value, static sizes, no header but `cpp_text.h`.

A function is for one mini-batch of one row: what moves into its buffers, its statements, what moves out. What the
caller gives and takes is an array of `Arg`s; scratch memory is the caller's, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import torch

from dualform.kernels.dialect import Dialect
from dualform.kernels.layout import CHECKPOINT, GROUP, Address, Body, Clear, Load, Move, Store, Write
from dualform.kernels.statements import Item, MatrixProduct, Nest, Operand, Read, Schedule, Statement, View, entrywise
from dualform.kernels.targets import EACH, ROW

BASES = {"scratch": "s", "fixed": "f", "state": "st", "kept": "kp", "passed": "ps", "cotangent": "ct", "sums": "acc"}
ARGUMENTS = "const Arg* g, long n, long b, long h, T* s, T* f, T* st, T* kp, T* ps, T* ct, T* acc"
CALL = "g, n, b, h, s, f, st, {kp}, {ps}, ct, acc"
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16", torch.bool: "bool",
    torch.int64: "int64_t", torch.int32: "int32_t", torch.int16: "int16_t", torch.int8: "int8_t",
    torch.uint8: "uint8_t",
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


def product_text(p: MatrixProduct) -> list[str]:
    batch = p.out.shape[:-2]
    if not batch:
        added = f" {p.beta:+g} {comment(p.init)}" if p.init else ""
        return [f"// {comment(p.out)} = {p.alpha:g} {comment(p.a)} @ {comment(p.b)}{added}", *_one_product(p)]
    lines = [f"// {comment(p.out)} = {comment(p.a)} @ {comment(p.b)}, one by one"]
    for at in itertools.product(*map(range, batch)):

        def one(v: View, at: tuple[int, ...] = at) -> View:
            lead = v.strides[: len(at)]
            shift = sum(i * s for i, s in zip(at, lead, strict=True)) if len(v.shape) == len(at) + 2 else 0
            return View(v.buffer, v.shape[-2:], v.strides[-2:], v.offset + shift)

        lines += _one_product(MatrixProduct(one(p.out), one(p.a), one(p.b), p.alpha, p.beta, p.init and one(p.init)))
    return lines


def _one_product(p: MatrixProduct) -> list[str]:
    (M, K), N = p.a.shape, p.b.shape[1]
    (am, ak), (bk, bn), (cm, cn) = p.a.strides, p.b.strides, p.out.strides
    D = p.init
    dm, dn = D.strides if D else (0, 0)
    A, B, C = pointer(p.a), pointer(p.b), pointer(p.out)
    Dp, sums = (pointer(D), "true") if D else ("nullptr", "false")
    scale = f"{number(p.alpha)}, {number(p.beta)}"
    if N == 1:
        return [f"mv<{M}, {K}, {am}, {ak}, {bk}>({C}, {cm}, {A}, {B}, {scale}, {Dp}, {dm});"]
    if M == 1 and bn != 1:  # (B^T a^T)^T
        return [f"mv<{N}, {K}, {bn}, {bk}, {ak}>({C}, {cn}, {B}, {A}, {scale}, {Dp}, {dn});"]
    assert cn == 1
    if D and dn != 1:  # laid out otherwise than the result: there first
        return [
            *moved([Write("copy", p.out, D)]),
            *_one_product(MatrixProduct(p.out, p.a, p.b, p.alpha, p.beta, p.out)),
        ]
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
    (packed, lda), alpha = (A, ak) if am == 1 else ("packed", ldm), number(p.alpha)
    lines.append(
        f"mm<{N}, {M}, {K}, {bn}, {bk}, {lda}, false>(turned, {ldm}, {B}, {packed}, {alpha}, T(0), nullptr, 0);"
    )
    added = f", {number(p.beta)}, {Dp}, {dm}" if D else ""
    return [*lines, f"turn<{N}, {M}>({C}, {cm}, turned, {ldm}{added}); }}"]


def _pack(rows: int, columns: int, ld: int, p: str, row_step: int, column_step: int) -> list[str]:
    """Write packed[r * ld + c] = p[r * row_step + c * column_step]."""
    if row_step == 1:
        return [f"turn<{columns}, {rows}>(packed, {ld}, {p}, {column_step});"]
    entry = f"({p})[r * {row_step} + c * {column_step}]"
    return [f"{loop('r', rows)} {loop('c', columns)} packed[r * {ld} + c] = {entry};"]


class _NestText:
    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.names = {item: f"v{k}" for k, item in enumerate(nest.items)}
        *lead, self.column = nest.space or (1,)
        self.lead = lead
        self.loops = [*LETTERS[: len(lead)], "j"] if nest.space else []
        self.later = dict.fromkeys(
            x for item in nest.items for x in item.operands
            if isinstance(x, Item) and x.kind == "map" and item.reads_in > x.stage
        )  # fmt: skip

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
        if x in self.later and item.reads_in > x.stage:
            return self.place(x.out, x.steps, self.loops) if x.kept else f"{self.names[x]}_[j]"
        return self.names[x]

    def value(self, item: Item, loops: Sequence[str]) -> str:
        at = [loops[a] if a is not None else "0" for a in item.axes]
        return CPP.entry(item.op, [self.operand(x, item, loops) for x in item.operands], item.params, at)

    def lines(self) -> list[str]:
        nest, loops = self.nest, self.loops
        inner = loops[:-1] if nest.space else []
        shown = " ".join(f"{i.out.buffer.name}{list(i.out.shape)}={i.op}" for i in nest.items)
        lines = [f"// {shown}", "{"]
        for item in nest.items:
            if item.kind == "total":
                lines.append(f"{loop('e', item.out.buffer.size)} ({pointer(item.out)})[e] = {CPP.fold(item.op)[0]};")
        for x in self.later:
            if not x.kept:
                lines.append(f"alignas(64) T {self.names[x]}_[{self.column + 64}];")
        lines += [loop(i, n) + " {" for i, n in zip(inner, self.lead, strict=True)]
        for stage in range(nest.stages):
            lines += self.stage(stage, inner)
        lines += ["}" for _ in inner]
        for item in nest.items:
            if item.kind == "total" and (scale := item.params.get("scale", 1.0)) != 1.0:
                lines.append(f"{loop('e', item.out.buffer.size)} ({pointer(item.out)})[e] *= {number(scale)};")
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
            elif item.kind in ("reduce", "total") and item.reads_in == stage:
                name, value, steps = names[item], self.operand(item.operands[0], item, self.loops), item.steps
                if item.kind == "total" and steps and steps[-1]:  # no sum along the row
                    body.append(CPP.fold(item.op)[1].format(self.place(item.out, steps, self.loops), value))
                    continue
                lines.append(f"T {name} = {CPP.fold(item.op)[0]};")
                body.append(CPP.fold(item.op)[1].format(name, value))
                sums += [name] if item.op == "sum" else []
                plain = plain and item.op == "sum"
                if item.kind == "total":
                    target = self.place(item.out, steps[:-1], inner) if steps else f"({pointer(item.out)})[0]"
                    after.append(CPP.fold(item.op)[1].format(target, name))
                    continue
                if item.params.get("scale", 1.0) != 1.0:
                    after.append(f"{name} *= {number(item.params['scale'])};")
                if item.kept:
                    after.append(f"{self.place(item.out, steps, inner)} = {name};")
        if body:
            pragma = f'_Pragma("omp simd reduction(+ : {", ".join(sums)})")' if sums else "FREE"
            lines.append(f"{pragma if plain else ''} {loop('j', self.column)} {{")
            lines += [*body, "}"]
        return [*lines, *after]


def statement_text(s: Statement) -> list[str]:
    return product_text(s) if isinstance(s, MatrixProduct) else _NestText(s).lines()


def statements(s: Schedule) -> list[str]:
    return [line for one in s.statements for line in statement_text(one)]


def moved(moves: Iterable[Move]) -> list[str]:
    """Print moves, one after another."""
    return [line for move in moves for line in _moved(move)]


def _moved(move: Move) -> list[str]:
    match move:
        case Load():
            same = "" if move.unless is None else f"if (g[{move.argument}].p != g[{move.unless}].p) "
            return [same + CPP.load(move)]
        case Store():
            return [CPP.store(move)]
        case Write("copy", out, View() as x) if out.buffer in (x.buffer, x.buffer.over) and x.offset == out.offset:
            return []  # it is there
        case Write("plus", _, 0):
            return []
        case Write(op, out, value):
            return statement_text(entrywise(op, out, [value] if op == "copy" else [out, value]))
        case Clear(entries):
            return [f"{loop('e', entries, 'long')} acc[e] = 0;"]
        case Address(place, argument):
            return [f"T* {place} = at<T>(g[{argument}], {CPP.where[ROW]});"]


def _loops(shape: Sequence[int]) -> tuple[str, list[str]]:
    names = ["a", "c", "d", "e"][: len(shape)]
    return "".join(loop(x, n) + " " for x, n in zip(names, shape, strict=True)), names


def _outside(move: Load | Store, names: Sequence[str]) -> str:
    inner = " + ".join([f"{x} * g[{move.argument}].s{k}" for k, x in enumerate(names)]) or "0"
    return f"at<{CPP.types[move.dtype]}>(g[{move.argument}], {CPP.where[move.where]})[{inner}]"


def load_text(move: Load) -> str:
    view, arg = move.out, f"g[{move.argument}]"
    *lead, n, step, inside = _rows(view.shape, view.strides)
    loops, names = _loops(lead)
    last = f"{arg}.s{len(lead)}" if view.shape else "1"
    ahead = {0: "0", 1: f"{arg}.sn", -1: f"-{arg}.sn"}[move.turn]
    out = f"{pointer(view)}{_inside(inside, names)}"
    return f"{loops}take<{n}, {step}>({out}, &{_outside(move, names)}, {last}, {ahead});"


def store_text(move: Store) -> str:
    view, shape = move.value, move.shape
    *lead, n, step, inside = _rows(shape, view.strides if isinstance(view, View) else [0] * len(shape))
    loops, names = _loops(lead)
    target = _outside(move, names)
    last = f"g[{move.argument}].s{len(lead)}" if shape else "1"
    if not isinstance(view, View):
        return f"{{ T x = {number(view)}; {loops}give<{n}, 0>(&{target}, &x, {last}); }}"
    return f"{loops}give<{n}, {step}>(&{target}, {pointer(view)}{_inside(inside, names)}, {last});"


def _rows(shape: Sequence[int], strides: Sequence[int]) -> tuple[Any, ...]:
    """Part a value into the sizes that lead and the rows: (*lead, entries, step, strides that lead)."""
    return (*shape[:-1], *(shape[-1:] or (1,)), *(strides[-1:] or (1,)), list(strides[:-1]))


def _inside(strides: Sequence[int], names: Sequence[str]) -> str:
    return "".join(f" + {s} * {x}" for s, x in zip(strides, names, strict=True) if s)


def header(name: str) -> str:
    return files("dualform.kernels").joinpath(name).read_text()


def source(dtype: torch.dtype, functions: Iterable[str]) -> str:
    return f"typedef {CPP.types[dtype]} T;\n{header('cpp_text.h')}\n" + "\n".join(functions)


def body_text(body: Body) -> str:
    """Print a function with what moves before its statements and after them."""
    beside = [f"T* nx = st + {body.layout.slot};"] if body.beside else []
    lines = [*beside, *moved(body.first), *statements(body.schedule), *moved(body.last)]
    return function(body.function.name, lines)


def function(name: str, body: Sequence[str]) -> str:
    return indented([f"static void {name}({ARGUMENTS}) {{", *body, "}", ""])


def indented(lines: Iterable[str]) -> str:
    """Indent by braces."""
    depth, found = 0, []
    for line in lines:
        closes = len(line) - len(line.lstrip("}"))
        found.append("  " * (depth - closes) + line)
        depth += line.count("{") - line.count("}")
    return "\n".join(found)


def loop(i: str, n: int, kind: str = "int") -> str:
    return f"for ({kind} {i} = 0; {i} < {n}; ++{i})"


CPP = Dialect(
    "cpp", TYPES, {EACH: "n, b, h", ROW: "0, b, h", GROUP: "group, b, h", CHECKPOINT: "(n + phase) / G, b, h"},
    number, loop, load_text, store_text,
)  # fmt: skip

"""Where a schedule's values lie: in a piece of what they become part of, over what is needed no more, or in scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dualform.kernels.statements import Buffer, MatrixProduct, Nest, Read, Statement, View, space_of, whole

Output = View | float


def into_pieces(statements: list[Statement], copies: Iterable[Nest], outputs: Sequence[Output]) -> None:
    """Let values that are only copied, each to a place of its own, be written there; copies: those that do so."""
    read = Counter(v.buffer for s in statements for v in s.reads())
    read.update(x.buffer for x in outputs if isinstance(x, View))
    written = Counter(v.buffer for s in statements for v in s.writes())
    made = {x.out.buffer: x for s in statements if isinstance(s, Nest) for x in s.items if x.kept and x.kind == "map"}
    products = {s.out.buffer: s for s in statements if isinstance(s, MatrixProduct)}
    for copy in copies:
        source, target = copy.items[0].operands[0], copy.items[0].out
        if not isinstance(source, Read) or source.view != whole(source.view.buffer):
            continue
        if read[source.view.buffer] != 1 or written[source.view.buffer] != 1:
            continue
        buffer, alone = source.view.buffer, target.shape[-1:] == target.buffer.shape[-1:]
        product = products.get(buffer)
        if source.view.shape != target.shape:
            continue
        if buffer in made:
            item = made[target.buffer] = made.pop(buffer)  # perhaps to be moved on
            item.out, item.steps = target, target.along(target.shape)
        elif product is not None and product.out == source.view:
            # a product writes whole vectors: up to the next one's beginning, where a row is not its own
            if target.strides[-1] != 1 or not (alone or target.shape[-1] % buffer.align == 0):
                continue
            product.out = target
            made.pop(target.buffer, None)
        else:
            continue
        statements.remove(copy)


def stay(x: Output, place: str) -> None:
    """Let an output that is a buffer of its own be written where the mini-batch keeps it."""
    if isinstance(x, View) and x.buffer.place == "scratch" and x == whole(x.buffer):
        x.buffer.place = place


def write_beside(outputs: Sequence[Output], k: int, old: Buffer) -> None:
    """Let an output be written where the next mini-batch looks for an input: laid out like it, one state further."""
    x = outputs[k]
    if isinstance(x, View) and _takes_place(outputs, x, old):
        x.buffer.over, x.buffer.place = old, "next"


def _takes_place(outputs: Sequence[Output], x: View, old: Buffer) -> bool:
    """Is an output a value of its own, laid out like an input?"""
    if x.buffer.place != "scratch" or x.buffer.size != old.size or x.offset:
        return False
    if (x.along(x.shape), space_of(x.shape)) != (whole(old).along(old.shape), space_of(old.shape)):
        return False
    return sum(isinstance(y, View) and y.buffer is x.buffer for y in outputs) == 1


def write_over(statements: Sequence[Statement], outputs: Sequence[Output], k: int, old: Buffer) -> None:
    """Let an output take the place of an input, if whatever reads the input has done so before it is written."""
    x = outputs[k]
    if not isinstance(x, View) or not _takes_place(outputs, x, old):
        return
    if any(isinstance(y, View) and y.buffer is old for y in outputs):
        return
    for n, s in enumerate(statements):
        for writer, out in _written(s, x.buffer):
            if any(_late(statements, m, r, out, n, writer) for m, t in enumerate(statements) for r in _reads(t, old)):
                return
    x.buffer.over, x.buffer.place = old, old.place


Reader = tuple[int, View, tuple[int, ...]]  # the item of a nest, or -1; what it reads, and along which steps


def _reads(s: Statement, old: Buffer) -> Iterable[Reader]:
    if isinstance(s, MatrixProduct):
        yield from ((-1, v, v.strides) for v in s.reads() if v.buffer is old)
    else:
        items = ((k, r) for k, item in enumerate(s.items) for r in item.operands if isinstance(r, Read))
        yield from ((k, r.view, r.steps) for k, r in items if r.view.buffer is old)


def _written(s: Statement, new: Buffer) -> Iterable[tuple[int, View]]:
    if isinstance(s, MatrixProduct):
        if s.out.buffer is new:
            yield -1, s.out
    else:
        yield from ((k, x.out) for k, x in enumerate(s.items) if x.kept and x.out.buffer is new)


def _late(statements: Sequence[Statement], m: int, reader: Reader, out: View, n: int, writer: int) -> bool:
    """Is what statement m reads of the old value lost to what statement n writes there?"""
    item, view, steps = reader
    if m < n or _end(view) <= out.offset or _end(out) <= view.offset:
        return False
    s = statements[n]
    if m > n:
        return True
    if isinstance(s, MatrixProduct):  # C = beta C + alpha A B reads each entry before it writes it
        return not (
            s.init is not None and (view.strides, view.offset, view.shape) == (out.strides, out.offset, out.shape)
            and s.a.buffer is not view.buffer and s.b.buffer is not view.buffer
        )  # fmt: skip
    r, w = s.items[item], s.items[writer]
    return w.kind != "map" or steps != w.steps or view.offset != out.offset or item > writer or r.reads_in > w.stage


def _end(view: View) -> int:
    return view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) + 1


def place(statements: Sequence[Statement], inputs: Sequence[Buffer], outputs: Sequence[Output]) -> int:
    """Give every value of the scratch memory its place, the places of dead values again; return the size."""
    for k, s in enumerate(statements):
        for v in s.writes():
            v.buffer.first = k if v.buffer.first < 0 else v.buffer.first
            v.buffer.last = max(v.buffer.last, k)
        for v in s.reads():
            v.buffer.last = k
    for x in outputs:
        if isinstance(x, View):
            x.buffer.last = len(statements)
    for buffer in inputs:
        if buffer.place == "scratch":
            buffer.first = 0
    used = (v.buffer for s in statements for v in (*s.reads(), *s.writes()))
    buffers = dict.fromkeys((*inputs, *used))  # in order: the same text in every process
    placed: list[Buffer] = []
    size = 0
    for buffer in sorted((b for b in buffers if b.place == "scratch"), key=lambda b: (b.first, -b.size)):
        alive = sorted((b for b in placed if b.last >= buffer.first), key=lambda b: b.offset)
        at = 0
        for b in alive:
            if at + buffer.size <= b.offset:
                break
            at = max(at, b.offset + b.size)
        buffer.offset = at
        placed.append(buffer)
        size = max(size, at + buffer.size)
    return size

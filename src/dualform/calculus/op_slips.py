"""Slips in one op's local derivative: what it would be with a factor, a term, a relation or an axis that is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.linear_map import Derivative
from dualform.algebra.notation import told
from dualform.algebra.relations import Lookup, Triangle
from dualform.algebra.terms import Factor, Label, Relation, Term, make_factor, volume
from dualform.graphs.local_derivatives import Program
from dualform.ops.table import placed

# Axes up to which all sets of axes are tried.
MAX_RANK = 5


@dataclass(frozen=True)
class Slip:
    """A slug, and the sentence after "x's gradient"."""

    kind: str
    message: str


def close(a: Tensor, b: Tensor) -> bool:
    """Are two tensors equal up to rounding?"""
    if a.shape != b.shape:
        return False
    tight, largest = torch.finfo(b.dtype).eps ** 0.6, b.abs().max().item() if b.numel() else 0
    return torch.allclose(a.to(b.dtype), b, rtol=tight, atol=tight * max(1e-30, largest))


def subsets(rank: int) -> Iterator[list[int]]:
    for n in range(1, min(rank, MAX_RANK) + 1):
        yield from (list(c) for c in itertools.combinations(range(rank), n))


def shown_term(term: Term) -> str:
    return f"{term.coef:+.4g} {'·'.join(map(told, term.tensors))}".strip()


def slips(program: Program, node: fx.Node, source: fx.Node, J: Derivative) -> Iterator[tuple[Slip, Derivative]]:
    name, below = program.name_of(node), program.name_of(source)
    for k, term in enumerate(J.terms):
        before, after = J.terms[:k], J.terms[k + 1 :]
        shown = shown_term(term)
        if before or after:
            text = f"misses the term {shown} of d{name}/d{below}; expected {len(J.terms)} terms. Add it."
            yield Slip("missing term", text), J.with_terms([*before, *after])
            text = f"has the wrong sign in the term {shown} of d{name}/d{below}; expected minus it. Negate that term."
            yield Slip("term sign", text), J.with_terms([*before, replace(term, coef=-term.coef), *after])
        if term.coef not in (1, -1):
            text = f"misses the factor {term.coef:.6g} of d{name}/d{below}; expected it. Multiply by it."
            yield Slip("missing factor", text), J.with_terms([*before, replace(term, coef=1.0), *after])
        for j, f in enumerate(term.factors):
            made = _factor_slips(program, node, f, term) if isinstance(f, Factor) else _relation_slips(f, name, below)
            for slip, wrong in made:
                changed = replace(term, factors=(*term.factors[:j], *wrong, *term.factors[j + 1 :]))
                yield slip, J.with_terms([*before, changed, *after])
    yield Slip("path sign", f"has the wrong sign in d{name}/d{below}; expected minus it. Negate that path."), -1 * J
    if J.out_shape == J.in_shape:
        turned = "Run the op the other way round (reverse, apply, reverse)."
        text = f"applies d{name}/d{below} forward; expected its transpose. {turned}"
        yield Slip("not transposed", text), J.T
    for k, term in enumerate(J.terms):
        for f in term.relations:
            if isinstance(f, Triangle):
                text = f"has the triangle of d{name}/d{below} turned over; expected the other. Swap tril and triu."
                turned = tuple(Triangle(f.cols, f.rows, -f.offset) if r is f else r for r in term.factors)
                over = J.with_terms([*J.terms[:k], replace(term, factors=turned), *J.terms[k + 1 :]])
                yield Slip("not transposed", text), over
    text = f"misses the path through {name}; expected the sum of all paths from {below}. Add d{name}/d{below}."
    if node is program.output:
        text = (
            f"misses the path from {below} straight into {name}; expected the sum of all paths. Add d{name}/d{below}."
        )
    yield Slip("missing path", text), J.with_terms([])
    yield from _everywhere(J, name, below)
    yield from _other_dims(program, node, source, J)
    yield from _wrong_axes(J, name, below)


def _everywhere(J: Derivative, name: str, below: str) -> Iterator[tuple[Slip, Derivative]]:
    """A factor that all terms have, left out of each."""
    if len(J.terms) < 2:
        return
    for f, side in itertools.product(J.terms[0].tensors, ("out", "inn")):
        rest = []
        for term in J.terms:
            # of two equal factors the one that the index of that side is on
            same = [g for g in term.tensors if g.name == f.name and g.tensor.shape == f.tensor.shape]
            same.sort(key=lambda g, t=term: not {*g.labels} <= {x for axis in getattr(t, side) for x in axis})
            rest += [replace(term, factors=tuple(g for g in term.factors if g is not same[0]))] if same else []
        if len(rest) == len(J.terms):
            text = f"misses the factor {told(f)} of every term of d{name}/d{below}; expected it. Multiply by {told(f)}."
            yield Slip("missing factor", text), J.with_terms(rest)


def _other_dims(program: Program, node: fx.Node, source: fx.Node, J: Derivative) -> Iterator[tuple[Slip, Derivative]]:
    """The same op along another dim; and its factors of there in the pattern of here."""
    call = program.call(node)
    assert call is not None
    name, rank = program.name_of(node), call.operands[0].ndim if call.operands else 0
    given = {key: call.bound[key] for key in ("dim", "dims", "axis") if call.bound.get(key) is not None}
    places = [k for k, s in enumerate(program.operand_nodes(node)) if s is source]
    for key, value in given.items():
        own = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(own) != 1 or not isinstance(own[0], int) or isinstance(own[0], bool) or len(places) != 1:
            continue
        for dim in (d for d in range(rank) if d != own[0] % rank):
            args, kwargs = placed(
                call.target,
                {**call.bound, key: [dim] if own is not value and isinstance(value, (list, tuple)) else dim},
            )
            try:
                out = call.target(*args, **kwargs)
                out = out if call.part is None else out[call.part]
                wrong = program.rule(replace(call, args=args, kwargs=kwargs, out=out), places[0])
            except (RuntimeError, IndexError, ValueError):
                continue
            if out.shape == call.out.shape:
                text = f"is along axis {dim} in {name} where axis {own[0] % rank} is expected. Use dim={own[0]}."
                yield Slip("wrong axis", text), wrong
            if len(wrong.terms) == len(J.terms):
                mixed = [_with_numbers_of(t, w) for t, w in zip(J.terms, wrong.terms, strict=True)]
                text = f"has factors of {name} made along axis {dim} where axis {own[0] % rank} is expected."
                text = f"{text} Use dim={own[0]}."
                yield Slip("wrong axis", text), J.with_terms(mixed)


def _with_numbers_of(term: Term, other: Term) -> Term:
    """The pattern of one term with the numbers of another's factors, where they are shaped alike."""
    theirs = iter(other.tensors)
    factors: list[Factor | Relation] = []
    for f in term.factors:
        g = next(theirs, None) if isinstance(f, Factor) else None
        factors.append(
            replace(f, tensor=g.tensor)
            if g is not None and isinstance(f, Factor) and g.tensor.shape == f.tensor.shape
            else f
        )
    return replace(term, factors=tuple(factors))


def _relation_slips(f: Relation, name: str, below: str) -> Iterator[tuple[Slip, tuple[Factor | Relation, ...]]]:
    """A triangle that is off by one, turned, or missing; places that are met twice and overwritten."""
    if isinstance(f, Triangle):
        for n in (1, -1):
            change = "lost" if n > 0 else "gained"
            text = f"is off by one in d{name}/d{below}: its triangle has {change} a diagonal; expected"
            yield Slip("off by one", f"{text} {f.offset:+d}. Move it by {-n:+d}."), (replace(f, offset=f.offset + n),)
        text = f"misses the triangle of d{name}/d{below}: entries that are left out there count; expected 0 for them."
        yield Slip("missing mask", f"{text} Mask them."), ()
    if isinstance(f, Lookup) and len(f.smalls) == 1 and f.index.ndim == 1:
        places = f.index.tolist()
        for way, seen in (("last", places[::-1]), ("first", places)):
            first = torch.tensor([seen.index(p) == k for k, p in enumerate(seen)])
            mask = Factor(first.flip(0) if way == "last" else first, f.smalls, "[once]")
            text = (
                f"keeps only the {way} of the entries that are looked up more than once in {name}; expected their sum."
            )
            yield Slip("overwritten", f"{text} Add them (accumulate=True, index_add)."), (f, mask)


def _factor_slips(program: Program, node: fx.Node, f: Factor, term: Term) -> Iterator[tuple[Slip, tuple[Factor]]]:
    said = told(f)
    if said == "a factor":  # it has no name in this program
        return
    if f.is_mask:
        text = f"has {said} inverted: it keeps what should be dropped; expected the other. Negate the condition."
        yield Slip("inverted mask", text), (replace(f, tensor=~f.tensor),)
    f = replace(f, tensor=f.tensor.to(program.values[program.source].dtype))
    missing = f"misses the factor {said}; expected it. Multiply by {said}."
    yield Slip("missing factor", missing), (replace(f, tensor=torch.ones_like(f.tensor)),)
    for a, b in itertools.combinations(range(f.tensor.ndim), 2):
        if f.tensor.shape[a] == f.tensor.shape[b]:
            text = f"uses {said} transposed where it should not be, or not where it should; expected the other."
            turned = f"{said}.mT" if f.tensor.ndim == 2 else f"{said}.transpose({a}, {b})"
            yield Slip("transposed factor", f"{text} Use {turned}."), (replace(f, tensor=f.tensor.transpose(a, b)),)
    for axes in subsets(f.tensor.ndim):
        if all(f.tensor.shape[a] > 1 for a in axes):
            said_axes = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            text = (
                f"uses {said} in the wrong direction along {said_axes} (a kernel flipped, or not); expected the other."
            )
            yield Slip("flipped factor", f"{text} Use {said}.flip({axes})."), (replace(f, tensor=f.tensor.flip(axes)),)
    own = {node, *program.operand_nodes(node)}
    for at, value in program.values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        other = program.name_of(at)
        is_own = value is f.tensor or (f.tensor.shape == value.shape and close(f.tensor, value))
        if is_own and (opposite := _opposite(program, at)) is not None:
            text = f"has the wrong sign inside {other}, between its two parts; expected {said}. Look at its + and -."
            yield Slip("wrong factor", text), (replace(f, tensor=opposite),)
        if value is f.tensor:
            continue
        slip = Slip("wrong operand", f"uses {other} where {said} is expected. Replace {other} by {said}.")
        if value.ndim == 2 and value.mT.shape == f.tensor.shape:
            text = f"uses {other}.mT where {said} is expected. Replace {other} by {said}."
            yield Slip("wrong operand", text), (replace(f, tensor=value.mT),)
        if value.shape == f.tensor.shape:
            yield slip, (replace(f, tensor=value),)
            for text, wrong in _near(value, other) if at in own else ():
                yield (
                    Slip("wrong factor", f"has {text} where {said} is expected. Use {said}."),
                    (replace(f, tensor=wrong),),
                )
        elif value.ndim <= len(term.out):
            axes = term.out[len(term.out) - value.ndim :]
            if [volume(axis) for axis in axes] == list(value.shape):
                yield slip, (make_factor(value, axes, other),)
    text = f"divides by {said} where it should multiply, or the reverse; expected {said}. Invert it."
    yield Slip("inverted factor", text), (replace(f, tensor=1 / f.tensor),)
    yield (
        Slip("repeated factor", f"has the factor {said} twice; expected it once. Drop one."),
        (replace(f, tensor=f.tensor**2),),
    )


def _near(x: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """What people write for a slope, of a value."""
    yield f"1 - {name}", 1 - x
    yield f"{name}²", x * x
    yield f"1 - {name}²", 1 - x * x
    yield f"{name} (1 - {name})", x * (1 - x)
    yield f"1/{name}", 1 / x
    yield f"exp({name})", x.exp()
    yield f"1 - tanh({name})²", 1 - x.tanh() ** 2
    yield f"sigmoid({name})", x.sigmoid()
    yield f"sign({name})", x.sign()


def _opposite(program: Program, node: fx.Node) -> Tensor | None:
    """a + b for a value a - b, and the reverse."""
    name = getattr(node.target, "_opname", "")
    if name not in ("add", "sub") or len(node.args) != 2 or node.kwargs:
        return None
    parts: list[Any] = [program.values[x] if isinstance(x, fx.Node) else x for x in node.args]
    a, b = parts
    return a + b if name == "sub" else a - b


def _wrong_axes(J: Derivative, name: str, below: str) -> Iterator[tuple[Slip, Derivative]]:
    """An axis of the operand tied to another axis of the result of the same size: the wrong one is summed."""
    for k, term in enumerate(J.terms):
        for axis, inner in enumerate(term.inn):
            for other, outer in enumerate(term.out):
                tied = [a for a, labels in enumerate(term.out) if labels == inner]
                sizes = [x.size for x in inner], [x.size for x in outer]
                if len(tied) != 1 or tied[0] == other or not inner or sizes[0] != sizes[1]:
                    continue
                change = dict(zip((*inner, *outer), (*outer, *inner), strict=True))
                swapped = tuple(tuple(change.get(x, x) for x in labels) for labels in term.out)
                wrong = replace(term, out=swapped)
                text = f"sums {name}'s axis {tied[0]} where axis {other} should be summed for {below}'s axis {axis}"
                tied_to = tuple(outer if c == axis else labels for c, labels in enumerate(term.inn))
                for one in (wrong, replace(term, inn=tied_to)):  # factors go with the axis, or stay
                    made = J.with_terms([*J.terms[:k], one, *J.terms[k + 1 :]])
                    yield Slip("wrong axis", f"{text}; expected the sum over axis {other}. Use .sum({other})."), made
    each = [_other_axis(term) for term in J.terms]
    for k, options in enumerate(each):
        for (a, b, *_), wrong in options.items():
            yield _inside(a, b, name, below), J.with_terms([*J.terms[:k], wrong, *J.terms[k + 1 :]])
    ways = {way: None for options in each for way in options} if len(J.terms) > 1 else {}
    for way in ways:
        swapped = [options.get(way) or t for t, options in zip(J.terms, each, strict=True)]
        yield _inside(*way[:2], name, below), J.with_terms(swapped)


def _inside(a: int, b: int, name: str, below: str) -> Slip:
    text = f"sums over axis {a} inside d{name}/d{below} where axis {b} is expected. Use .sum({b}, keepdim=True)."
    return Slip("wrong axis", text)


def _other_axis(term: Term) -> dict[tuple[int, int, bool, bool], Term]:
    """A sum inside the op, as a softmax's, over the wrong axis: the tied axis and the summed one change places.

    By the two axes, whether a mean's share changes, too, and whether factors of the tied axis stay at the operand.
    """
    found: dict[tuple[int, int, bool, bool], Term] = {}
    if len(term.out) != len(term.inn):
        return found
    free = [a for a, (x, y) in enumerate(zip(term.out, term.inn, strict=True)) if x != y and len(x) == len(y) == 1]
    tied = [a for a, (x, y) in enumerate(zip(term.out, term.inn, strict=True)) if x == y and len(x) == 1]
    for a, b, inside in itertools.product(tied, free, (False, True)):
        (i,), (j,), (below_j,) = term.out[a], term.out[b], term.inn[b]
        new = Label(i.size)

        def moved(
            f: Factor | Relation, i: Label = i, j: Label = j, l: Label = below_j, new: Label = new,
            inside: bool = inside,
        ) -> Any:  # fmt: skip
            if not isinstance(f, Factor) or not (l in f.labels or (inside and f.labels == (i,))):
                return f
            return Factor(f.tensor, tuple({l: j, i: new}.get(x, x) for x in f.labels), f.name)

        inn = tuple((new,) if c == a else (j,) if c == b else axis for c, axis in enumerate(term.inn))
        found[a, b, False, inside] = swapped = replace(term, factors=tuple(map(moved, term.factors)), inn=inn)
        if i.size != j.size:
            found[a, b, True, inside] = replace(swapped, coef=term.coef * j.size / i.size)
    return found


def ratio_text(scale: float) -> str:
    if abs(scale) < 1e-6:
        return "0"
    whole, part = round(scale), round(1 / scale)
    if whole and abs(scale - whole) < 1e-6 * abs(whole):
        return f"{whole}"
    return f"1/{part}" if part and abs(1 / scale - part) < 1e-6 * abs(part) else f"{scale:.6g}"

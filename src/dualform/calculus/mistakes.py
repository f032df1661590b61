"""The usual slips in a hand-written gradient, each as what it would give: the one that gives what was got is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dualform.algebra.linear_map import Derivative
from dualform.algebra.notation import told
from dualform.algebra.terms import Factor, Label, Relation, Term, make_factor, recorded, volume
from dualform.graphs.local_derivatives import Program
from dualform.graphs.trace import source_line

Names = tuple[Sequence[str], Sequence[str]] | None
# Axes up to which all orders, and all sets of summed axes, are tried.
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


def _told(axes: Sequence[int], x: Tensor, names: Names, side: int) -> str:
    """Axes by number, size and, where the caller named those of that side, name."""
    known = names[side] if names and len(names[side]) == x.ndim else [""] * x.ndim
    return " and ".join(f"axis {a} ({known[a]}{'=' if known[a] else ''}{x.shape[a]})" for a in axes)


def of_shape(got: Tensor, right: Tensor, names: Names) -> Slip | None:
    """Name what is wrong with a gradient of the wrong shape; None if the shape is right."""
    if got.shape == right.shape:
        return None
    seen, wanted = tuple(got.shape), tuple(right.shape)
    found = _kept(got, right, names) or _turned(got, right) or _summed(got, right, names)
    if found is not None:
        return found
    if got.numel() == right.numel() and close(got.reshape(wanted), right):
        return Slip("reshaped", f"has the right entries in the shape {seen}; expected {wanted}. Reshape it.")
    return Slip("shape", f"has shape {seen}; expected its argument's = {wanted}. Look at which axes are summed.")


def _kept(got: Tensor, right: Tensor, names: Names) -> Slip | None:
    """Axes that are still there though the argument was copied along them, or has them with size 1."""
    for axes in _subsets(got.ndim):
        for keep in (True, False):
            if not close(got.sum(axes, keepdim=keep), right):
                continue
            if all(got.shape[a] == 1 for a in axes):
                text = f"has an extra axis of size 1 at {axes[0]}; expected {tuple(right.shape)}. Drop it."
                return Slip("extra axis", text)
            said = _told(axes, got, names, 0)
            code = f"g.sum({axes[0] if len(axes) == 1 else axes}{', keepdim=True' if keep else ''})"
            why = "the argument is broadcast along it, and the gradients of its copies add up"
            return Slip("kept axis", f"keeps {said}, which should be summed: {why}. Use {code} or unbroadcast.")
    return None


def _turned(got: Tensor, right: Tensor) -> Slip | None:
    for order in _orders(right.ndim):
        if got.ndim == right.ndim and order != tuple(range(right.ndim)) and close(got.permute(order), right):
            how = "transposed" if right.ndim == 2 else f"permuted: its axes should be taken in the order {order}"
            return Slip("transposed", f"is {how}; expected shape {tuple(right.shape)}. Use .permute({order}).")
    return None


def _summed(got: Tensor, right: Tensor, names: Names) -> Slip | None:
    """Axes that were summed or averaged though the argument has them."""
    if got.ndim == 0 and right.numel() == 1:
        return Slip("lost axis", f"lost its axes of size 1; expected shape {tuple(right.shape)}. Use keepdim=True.")
    for axes in _subsets(right.ndim):
        said = _told(axes, right, names, 1)
        for keep, (word, reduce) in itertools.product((False, True), (("summed", torch.sum), ("averaged", torch.mean))):
            if close(got, reduce(right, axes, keep)):
                if all(right.shape[a] == 1 for a in axes):
                    return Slip("lost axis", f"lost {said}; expected shape {tuple(right.shape)}. Use keepdim=True.")
                return Slip("summed axis", f"was {word} over {said}, which the argument has. Leave that axis.")
    return None


def _subsets(rank: int) -> Iterator[list[int]]:
    for n in range(1, min(rank, MAX_RANK) + 1):
        yield from (list(c) for c in itertools.combinations(range(rank), n))


def _orders(rank: int) -> Iterator[tuple[int, ...]]:
    if rank <= MAX_RANK:
        yield from itertools.permutations(range(rank))


def of_values(
    got: Tensor, right: Tensor, g: Tensor, again: Callable[[Tensor], Tensor], others: dict[str, Tensor],
    program: Program, names: Names,
) -> Slip | None:  # fmt: skip
    """Name what is wrong with a gradient of the right shape; None if nothing is."""
    unfinite = _not_finite(got, right)
    if unfinite is not None:
        return unfinite
    if close(got, right):
        return None
    found = _of_the_seed(got, right, g, again, program) or _scaled(got, right, g, names)
    found = found or _exchanged(got, right, others) or _of_an_op(got, g, program)
    return found or _along_an_axis(got, right, names) or _somewhere(got, right, names)


def _not_finite(got: Tensor, right: Tensor) -> Slip | None:
    if not right.isfinite().all():
        where = (~right.isfinite()).nonzero()[0].tolist()
        text = f"cannot be judged: the derivative itself is {right[tuple(where)].item()} at {where}"
        return Slip("not differentiable", f"{text}; expected a point where f is differentiable. Move the arguments.")
    bad = ~got.isfinite()
    if not bad.any():
        return None
    where = bad.nonzero()[0].tolist()
    what = "NaN" if got.isnan().any() else "infinite"
    count = f"{int(bad.sum())} of {got.numel()} entries, first at {where}"
    text = f"is {what} in {count}; expected {right[tuple(where)].item():.6g} there."
    return Slip("NaN", f"{text} Look for 0/0, inf - inf, log 0.")


def _of_the_seed(
    got: Tensor, right: Tensor, g: Tensor, again: Callable[[Tensor], Tensor], program: Program
) -> Slip | None:
    if not got.any():
        return Slip("zero", "is zero everywhere; expected one that is not. Return the gradient.")
    other = torch.flip(g.reshape(-1), [0]).reshape(g.shape) * 0.7 + 0.1
    if close(again(other), got) and not close(program.vjp(other), right):
        same = close(got, program.vjp(torch.ones_like(g)))
        why = "it is the gradient for g = 1" if same else "another g gives the same"
        return Slip("g unused", f"does not use g: {why}; expected a sum over g. Multiply by g (the chain rule).")
    if not close(again(2 * g), 2 * got):
        text = "is not linear in g: twice the g is not twice the gradient; expected a linear map. Use g once."
        return Slip("not linear", text)
    return None


def _scaled(got: Tensor, right: Tensor, g: Tensor, names: Names) -> Slip | None:
    """A constant factor: the sign, the number of entries of some axes, or another."""
    scale = ((got * right).sum() / (right * right).sum()).item()
    if not math.isfinite(scale) or scale == 0 or not close(got, scale * right):
        return None
    if abs(scale + 1) < 1e-6:
        return Slip("sign", "has the wrong sign; expected minus it. Negate it.")
    for axes in _subsets(g.ndim):
        count = math.prod(g.shape[a] for a in axes)
        if count > 1 and abs(scale * count - 1) < 1e-6 and right.numel() < g.numel():
            text = f"is averaged over {_told(axes, g, names, 0)} of the result; expected the sum."
            return Slip("averaged", f"{text} Use .sum instead of .mean.")
    for axes in _subsets(right.ndim):
        count = math.prod(right.shape[a] for a in axes)
        if count > 1 and abs(scale / count - 1) < 1e-6 and g.numel() < right.numel():
            said = _told(axes, right, names, 1)
            text = f"misses the factor 1/{count}, the entries of {said}; expected a mean's share."
            return Slip("count", f"{text} Divide by {count}.")
    advice = "Sum where you average, or drop a factor." if abs(scale) < 1 else "Drop the factor, or count a term once."
    return Slip("scale", f"is {_ratio(scale)} times what it should be; expected the factor 1. {advice}")


def _ratio(scale: float) -> str:
    whole, part = round(scale), round(1 / scale)
    if whole and abs(scale - whole) < 1e-6 * abs(whole):
        return f"{whole}"
    return f"1/{part}" if part and abs(1 / scale - part) < 1e-6 * abs(part) else f"{scale:.6g}"


def _exchanged(got: Tensor, right: Tensor, others: dict[str, Tensor]) -> Slip | None:
    for order in _orders(right.ndim):
        if order != tuple(range(right.ndim)) and close(got.permute(order), right):
            return Slip("transposed", f"is transposed: its axes are in the order {order}. Use .permute({order}).")
    for name, value in others.items():
        if close(got, value):
            return Slip("swapped", f"is the gradient of {name}; expected its own. Swap what you return.")
    for axis in range(right.ndim):
        if close(got.flip(axis), right):
            return Slip("reversed", f"is reversed along axis {axis}; expected the order of the argument. Flip it.")
    return None


def _of_an_op(got: Tensor, g: Tensor, program: Program) -> Slip | None:
    """One op's local derivative with one slip in it."""
    with recorded():
        local = program.local
    for node, parts in local.items():
        for place, (source, J) in enumerate(parts):
            for slip, wrong in _slips(program, node, source, J):
                program.__dict__["local"] = {**local, node: [*parts[:place], (source, wrong), *parts[place + 1 :]]}
                try:
                    same = close(program.vjp(g), got)
                except RuntimeError:  # a slip that does not fit the shapes
                    same = False
                finally:
                    program.__dict__["local"] = local
                if same:
                    return Slip(slip.kind, f"{slip.message} (at `{_line(program, node)}`)")
    return None


def _line(program: Program, node: fx.Node) -> str:
    line = source_line(node)
    return program.name_of(node) if not line or line.startswith("(") else line


def _slips(program: Program, node: fx.Node, source: fx.Node, J: Derivative) -> Iterator[tuple[Slip, Derivative]]:
    name, below = program.name_of(node), program.name_of(source)
    for k, term in enumerate(J.terms):
        before, after = J.terms[:k], J.terms[k + 1 :]
        shown = f"{term.coef:+.4g} {'·'.join(map(told, term.tensors))}".strip()
        if before or after:
            text = f"misses the term {shown} of d{name}/d{below}; expected {len(J.terms)} terms. Add it."
            yield Slip("missing term", text), J.with_terms([*before, *after])
            text = f"has the wrong sign in the term {shown} of d{name}/d{below}; expected minus it. Negate that term."
            yield Slip("term sign", text), J.with_terms([*before, replace(term, coef=-term.coef), *after])
        if term.coef not in (1, -1):
            text = f"misses the factor {term.coef:.6g} of d{name}/d{below}; expected it. Multiply by it."
            yield Slip("missing factor", text), J.with_terms([*before, replace(term, coef=1.0), *after])
        for j, f in enumerate(term.factors):
            if isinstance(f, Factor):
                for slip, wrong in _factor_slips(program, f, term):
                    changed = replace(term, factors=(*term.factors[:j], wrong, *term.factors[j + 1 :]))
                    yield slip, J.with_terms([*before, changed, *after])
    yield Slip("path sign", f"has the wrong sign in d{name}/d{below}; expected minus it. Negate that path."), -1 * J
    if J.out_shape == J.in_shape:
        turned = "Run the op the other way round (reverse, apply, reverse)."
        text = f"applies d{name}/d{below} forward; expected its transpose. {turned}"
        yield Slip("not transposed", text), J.T
    text = f"misses the path through {name}; expected the sum of all paths from {below}. Add d{name}/d{below}."
    yield Slip("missing path", text), J.with_terms([])
    yield from _wrong_axes(J, name, below)


def _factor_slips(program: Program, f: Factor, term: Term) -> Iterator[tuple[Slip, Factor]]:
    said = told(f)
    f = replace(f, tensor=f.tensor.to(program.values[program.source].dtype))
    missing = f"misses the factor {said}; expected it. Multiply by {said}."
    yield Slip("missing factor", missing), replace(f, tensor=torch.ones_like(f.tensor))
    for a, b in itertools.combinations(range(f.tensor.ndim), 2):
        if f.tensor.shape[a] == f.tensor.shape[b]:
            text = f"uses {said} transposed where it should not be, or not where it should; expected the other."
            text = f"{text} Use {said}.mT."
            yield Slip("transposed factor", text), replace(f, tensor=f.tensor.transpose(a, b))
    for node, value in program.values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value is f.tensor:
            continue
        other = program.name_of(node)
        slip = Slip("wrong operand", f"uses {other} where {said} is expected. Replace {other} by {said}.")
        if value.shape == f.tensor.shape:
            yield slip, replace(f, tensor=value)
        elif value.ndim <= len(term.out):
            axes = term.out[len(term.out) - value.ndim :]
            if [volume(axis) for axis in axes] == list(value.shape):
                yield slip, make_factor(value, axes, other)
    text = f"divides by {said} where it should multiply, or the reverse; expected {said}. Invert it."
    yield Slip("inverted factor", text), replace(f, tensor=1 / f.tensor)
    yield (
        Slip("repeated factor", f"has the factor {said} twice; expected it once. Drop one."),
        replace(f, tensor=f.tensor**2),
    )


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
                made = J.with_terms([*J.terms[:k], wrong, *J.terms[k + 1 :]])
                yield Slip("wrong axis", f"{text}; expected the sum over axis {other}. Use .sum({other})."), made
        yield from _other_axis(J, k, name, below)


def _other_axis(J: Derivative, k: int, name: str, below: str) -> Iterator[tuple[Slip, Derivative]]:
    """A sum inside the op, as a softmax's, over the wrong axis: the tied axis and the summed one change places."""
    term = J.terms[k]
    if len(term.out) != len(term.inn):
        return
    free = [a for a, (x, y) in enumerate(zip(term.out, term.inn, strict=True)) if x != y and len(x) == len(y) == 1]
    tied = [a for a, (x, y) in enumerate(zip(term.out, term.inn, strict=True)) if x == y and len(x) == 1]
    for a, b in itertools.product(tied, free):
        (i,), (j,), (below_j,) = term.out[a], term.out[b], term.inn[b]
        new = Label(i.size)

        def moved(f: Factor | Relation, i: Label = i, j: Label = j, l: Label = below_j, new: Label = new) -> Any:
            if not isinstance(f, Factor) or l not in f.labels:
                return f
            return Factor(f.tensor, tuple({l: j, i: new}.get(x, x) for x in f.labels), f.name)

        inn = tuple((new,) if c == a else (j,) if c == b else axis for c, axis in enumerate(term.inn))
        wrong = replace(term, factors=tuple(map(moved, term.factors)), inn=inn)
        terms = [*J.terms[:k], wrong, *J.terms[k + 1 :]]
        text = f"sums over axis {a} inside d{name}/d{below} where axis {b} is expected. Use .sum({b}, keepdim=True)."
        yield Slip("wrong axis", text), J.with_terms(terms)


def _along_an_axis(got: Tensor, right: Tensor, names: Names) -> Slip | None:
    """A factor that varies along one axis only."""
    if right.ndim < 2 or (right == 0).any():
        return None
    ratio = got / right
    for axis in range(right.ndim):
        first = ratio.movedim(axis, 0).reshape(right.shape[axis], -1)
        if close(first, first[:, :1].expand_as(first)):
            values = ", ".join([f"{v:.4g}" for v in first[:4, 0].tolist()] + ["..."] * (len(first) > 4))
            text = f"is scaled along {_told([axis], right, names, 1)} by [{values}]; expected no factor. Drop it."
            return Slip("scaled axis", text)
    return None


def _somewhere(got: Tensor, right: Tensor, names: Names) -> Slip:
    """Where it is wrong, and by how much."""
    tight = torch.finfo(right.dtype).eps ** 0.6
    wrong = (got - right).abs() > tight * right.abs().max()
    places = wrong.nonzero()
    text = f"is wrong in {len(places)} of {right.numel()} entries"
    for axis in range(right.ndim):
        at = places[:, axis].unique()
        if len(at) < right.shape[axis] and len(at) <= 3:
            text += f", all at {at.tolist()} of {_told([axis], right, names, 1)}"
    where = places[0].tolist()
    pair = f"got {got[tuple(where)].item():.6g} at {where}; expected {right[tuple(where)].item():.6g}"
    return Slip("values", f"{text}: {pair}. Compare with the formula below.")

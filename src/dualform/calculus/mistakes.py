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
from dualform.algebra.relations import Lookup, Triangle
from dualform.algebra.terms import Factor, Label, Relation, Term, make_factor, recorded, volume
from dualform.graphs.local_derivatives import Program
from dualform.graphs.trace import source_line
from dualform.ops.table import placed

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
            why = "the same argument is used all along it, and the gradients of its uses add up"
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
    programs: Sequence[Program], J: Derivative, names: Names,
) -> Slip | None:  # fmt: skip
    """Name what is wrong with a gradient of the right shape; None if nothing is.

    programs: the function in the caller's ops, and in what those are made of; J: the whole derivative
    """
    unfinite = _not_finite(got, right)
    if unfinite is not None:
        return unfinite
    if close(got, right):
        return None
    program = programs[0]
    found = _of_the_seed(got, right, g, again, program)
    if found is not None:
        return found
    found = _either([*_scaled(got, right, g, J, program, names), *_exchanged(got, right, others)])
    found = found or _along_the_result(got, g, program, names) or _diagonal(got, g, J)
    for each in programs:
        found = found or _of_an_op(got, right, g, again, each) or _of_paths(got, g, each)
    return found or _shifted(got, right) or _along_an_axis(got, right, names) or _somewhere(got, right, names)


def _either(found: Sequence[Slip]) -> Slip | None:
    """One slip, or what can not be told apart: several that give the same numbers."""
    if not found:
        return None
    first, *more = found
    rest = [slip for slip in more if slip.kind != first.kind]
    said = "".join(f" Or it {slip.message} Both give these numbers." for slip in rest[:1])
    return replace(first, message=first.message + said)


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
        still = again(torch.zeros_like(g))
        if still.shape == got.shape and still.isfinite().all() and still.any():
            text = "has a part without g: for g = 0 it is not 0 (not linear); expected a linear map of g."
            return Slip("not linear", f"{text} Multiply every term by g.")
        text = "is not linear in g: twice the g is not twice the gradient; expected a linear map. Use g once."
        return Slip("not linear", text)
    return None


def _scaled(
    got: Tensor, right: Tensor, g: Tensor, J: Derivative, program: Program, names: Names
) -> Iterator[Slip]:  # fmt: skip
    """A constant factor: the sign, the number of entries of some axes, a number of the function, or another."""
    scale = ((got * right).sum() / (right * right).sum()).item()
    if not math.isfinite(scale) or scale == 0 or not close(got, scale * right):
        return
    if abs(scale + 1) < 1e-6:
        yield Slip("sign", "has the wrong sign; expected minus it. Negate it.")
        return
    counted = list(_counts(scale, right, g, J, names))
    yield from counted
    if counted:
        return
    for node, value in program.values.items():
        is_number = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        for power in (1, -1, 2, -2, 0.5, -0.5) if is_number and abs(scale) != 1 else ():
            base = value.item()
            if (base < 0 and power % 1) or base == 0 or abs(abs(base) - 1) < 1e-9:
                continue
            if abs(scale / base**power - 1) < 1e-9:
                said = program.name_of(node)
                shown = {1: said, 2: f"{said}²", 0.5: f"√{said}"}[abs(power)]
                value = f"{shown} = {base ** abs(power):.6g}"
                if power > 0:
                    yield Slip("scale", f"has the factor {value} too many; expected it once less. Divide by it.")
                else:
                    yield Slip("scale", f"is divided by {value} once too often; expected it once less. Multiply by it.")
                return
    advice = "Sum where you average, or drop a factor." if abs(scale) < 1 else "Drop the factor, or count a term once."
    yield Slip("scale", f"is {_ratio(scale)} times what it should be; expected the factor 1. {advice}")


def _free(J: Derivative, side: str) -> list[int]:
    """The axes of one side that no term ties to the other: those that are summed, or averaged, or copied."""
    there = "inn" if side == "out" else "out"
    other = [{x for axis in getattr(t, there) for x in axis} | {x for r in t.relations for x in r.labels} for t in J.terms]
    count = len(getattr(J.terms[0], side)) if J.terms else 0
    return [a for a in range(count) if all(not {*getattr(t, side)[a]} & o for t, o in zip(J.terms, other, strict=True))]


def _counts(scale: float, right: Tensor, g: Tensor, J: Derivative, names: Names) -> Iterator[Slip]:
    """A number of entries: of axes that the derivative sums or averages over, no others."""
    summed, averaged = _free(J, "out"), _free(J, "inn")
    for axes in (axes for axes in _subsets(g.ndim) if {*axes} <= {*summed}):
        count = math.prod(g.shape[a] for a in axes)
        if count > 1 and abs(scale * count - 1) < 1e-6:
            text = f"is averaged over {_told(axes, g, names, 0)} of the result; expected the sum."
            yield Slip("averaged", f"{text} Use .sum instead of .mean.")
            return
    counts = {tuple(axes): math.prod(right.shape[a] for a in axes) for axes in _subsets(right.ndim) if {*axes} <= {*averaged}}
    for axes, count in counts.items():
        said = _told(axes, right, names, 1)
        if count > 1 and abs(scale / count - 1) < 1e-6:
            text = f"misses the factor 1/{count}, the entries of {said}; expected a mean's share."
            yield Slip("count", f"{text} Divide by {count}.")
            return
        if count > 1 and abs(scale * count - 1) < 1e-6:
            text = f"has the factor 1/{count}, the entries of {said}, too many; expected it once less."
            yield Slip("count", f"{text} Do not divide by {count}.")
            return
        for less, more in ((count - 1, count), (count, count - 1)):
            if less > 1 and more > 1 and abs(scale * more / less - 1) < 1e-9:
                text = f"divides by {more} where {less} is expected, of {count} entries along {said}."
                yield Slip("count", f"{text} Look at the correction.")
                return
    every = {(a,): right.shape[a] for a in range(right.ndim)}
    for (a, n), (b, m) in itertools.product(counts.items(), every.items()):
        if a != b and n != m and abs(scale * m / n - 1) < 1e-9:
            text = f"divides by {m}, the entries of {_told(b, right, names, 1)}; expected {n}"
            yield Slip("count", f"{text}, those of {_told(a, right, names, 1)}. Divide by {n}.")
            return


def _ratio(scale: float) -> str:
    if abs(scale) < 1e-6:
        return "0"
    whole, part = round(scale), round(1 / scale)
    if whole and abs(scale - whole) < 1e-6 * abs(whole):
        return f"{whole}"
    return f"1/{part}" if part and abs(1 / scale - part) < 1e-6 * abs(part) else f"{scale:.6g}"


def _exchanged(got: Tensor, right: Tensor, others: dict[str, Tensor]) -> Iterator[Slip]:
    for order in _orders(right.ndim):
        if order != tuple(range(right.ndim)) and close(got.permute(order), right):
            yield Slip("transposed", f"is transposed: its axes are in the order {order}. Use .permute({order}).")
            break
    for name, value in others.items():
        if close(got, value):
            yield Slip("swapped", f"is the gradient of {name}; expected its own. Swap what you return.")
    for axes in _subsets(right.ndim):
        if close(got.flip(axes), right):
            said = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            yield Slip("reversed", f"is reversed along {said}; expected the order of the argument. Flip it.")
            break


def _shifted(got: Tensor, right: Tensor) -> Slip | None:
    for axis, n in ((a, k) for a in range(right.ndim) for k in (1, -1, 2, -2) if right.shape[a] > abs(k)):
        if close(got, right.roll(n, axis)) or (right.any() and close(got, _moved(right, n, axis))):
            text = f"is shifted by {n:+d} along axis {axis}; expected every entry {-n:+d} from there."
            return Slip("shifted", f"{text} Look at where the slice starts.")
    return None


def _moved(x: Tensor, n: int, axis: int) -> Tensor:
    """Shift along an axis; zeros come in."""
    kept = x.narrow(axis, max(0, -n), x.shape[axis] - abs(n))
    gap = torch.zeros_like(x.narrow(axis, 0, abs(n)))
    return torch.cat([gap, kept] if n > 0 else [kept, gap], axis)


def _along_the_result(got: Tensor, g: Tensor, program: Program, names: Names) -> Slip | None:
    """Some entries along an axis of the result are left out, or all but one."""
    for axis, n in enumerate(g.shape):
        if n < 2 or n > 64:
            continue
        parts = [program.vjp(torch.zeros_like(g).index_copy(axis, k, g.index_select(axis, k))) for k in torch.arange(n).split(1)]
        total = sum(parts[1:], parts[0])
        for k, part in enumerate(parts):
            said = f"of {_told([axis], g, names, 0)} of the result"
            if part.any() and close(got, total - part):
                return Slip("missing entries", f"leaves out entry {k} {said}; expected the sum over all. Add it.")
            if not close(part, total) and close(got, part):
                return Slip("missing entries", f"has entry {k} {said} alone; expected the sum over all. Add the others.")
    return None


def _diagonal(got: Tensor, g: Tensor, J: Derivative) -> Slip | None:
    """g times the diagonal, where there is more."""
    if J.out_shape != J.in_shape or math.prod(J.shape) > 2**20 or not J.out_shape:
        return None
    n = math.prod(J.out_shape)
    if n < 2 or not close(got, J.dense().reshape(n, n).diagonal().reshape(got.shape) * g):
        return None
    text = "is g times the diagonal of the Jacobian; expected all of it: an entry of the result depends on others, too"
    return Slip("diagonal only", f"{text}. Add their terms.")


def _of_an_op(
    got: Tensor, right: Tensor, g: Tensor, again: Callable[[Tensor], Tensor], program: Program
) -> Slip | None:
    """One op's local derivative with one slip in it; what fits g by chance does not fit another."""
    with recorded():
        local = program.local
    other = torch.flip(g.reshape(-1), [0]).reshape(g.shape) * 0.7 + 0.1
    v = torch.randn(right.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(right)
    seeds, pushed, wanted = _pulled(program, g), _pushed(program, v), ((got - right) * v).sum()
    for node, parts in local.items():
        if node not in seeds:
            continue
        if len(parts) > 1 and all(source is parts[0][0] for source, _ in parts):  # x * x: the same slip in both places
            parts = [(parts[0][0], sum((J for _, J in parts[1:]), parts[0][1]))]
        for place, (source, J) in enumerate(parts):
            if source not in pushed:
                continue
            rest = J.vjp(seeds[node])
            for slip, wrong in _slips(program, node, source, J):
                try:
                    # One number tells most of them away: <what the slip changes, v> at the operand.
                    share = (wrong.vjp(seeds[node]) - rest) * pushed[source]
                    if abs(share.sum() - wanted) > 1e-3 * (share.abs().sum() + wanted.abs()):
                        continue
                    program.__dict__["local"] = {**local, node: [*parts[:place], (source, wrong), *parts[place + 1 :]]}
                    same = close(program.vjp(g), got) and close(program.vjp(other), again(other))
                except (RuntimeError, ValueError):  # a slip that does not fit the shapes
                    same = False
                finally:
                    program.__dict__["local"] = local
                if same:
                    return Slip(slip.kind, f"{slip.message} (at `{_line(program, node)}`)")
    return None


def _pulled(program: Program, g: Tensor) -> dict[fx.Node, Tensor]:
    """The gradient of every node on the way."""
    found = {program.output: g}
    for node, parts in reversed(program.local.items()):
        for source, J in parts if node in found else ():
            part = J.vjp(found[node])
            found[source] = found[source] + part if source in found else part
    return found


def _pushed(program: Program, v: Tensor) -> dict[fx.Node, Tensor]:
    """The change of every node on the way."""
    found = {program.source: v}
    for node, parts in program.local.items():
        changes = [J.jvp(found[source]) for source, J in parts if source in found]
        if changes:
            found[node] = sum(changes[1:], changes[0])
    return found


# Paths and terms of at most so many are weighed.
MAX_PATHS = 10


def _of_paths(got: Tensor, g: Tensor, program: Program) -> Slip | None:
    """Several terms of one op, or several paths, with factors of their own: those that give exactly what was got."""
    local = program.local
    for node, parts in local.items():
        terms = [(source, J, k) for source, J in parts for k in range(len(J.terms))]
        if not 2 <= len(terms) <= MAX_PATHS:
            continue
        shares = []
        for source, J, k in terms:
            only = [(s, L.with_terms([L.terms[k]] if s is source and L is J else [])) for s, L in parts]
            program.__dict__["local"] = {**local, node: only}
            shares.append(program.vjp(g))
        program.__dict__["local"] = {**local, node: [(s, L.with_terms([])) for s, L in parts]}
        rest = program.vjp(g)
        program.__dict__["local"] = local
        weights = _weights(got - rest, [share - rest for share in shares])
        if weights is not None and any(abs(w - 1) > 1e-6 for w in weights):
            name = program.name_of(node)
            said = [
                f"{_ratio(w)} times the term {_shown(J.terms[k])} of d{name}/d{program.name_of(source)}"
                for w, (source, J, k) in zip(weights, terms, strict=True) if abs(w - 1) > 1e-6
            ]  # fmt: skip
            return Slip("term factor", f"has {', and '.join(said)}; expected each once. (at `{_line(program, node)}`)")
    paths = _paths_of(program)
    if not 2 <= len(paths) <= MAX_PATHS:
        return None
    shares = []
    for path in paths:
        pulled = g
        for source, node in reversed(path):
            pulled = next(J for s, J in local[node] if s is source).vjp(pulled)
        shares.append(pulled)
    weights = _weights(got, shares)
    if weights is None:
        return None
    wrong = [(w, path) for w, path in zip(weights, paths, strict=True) if abs(w - 1) > 1e-6]
    if not wrong:
        return None
    kind = "missing path" if all(abs(w) < 1e-6 for w, _ in wrong) else "path factor"
    said = [f"{_ratio(w)} times the path {_way(program, path)}" for w, path in wrong]
    return Slip(kind, f"has {', and '.join(said)}; expected each path once.")


def _shown(term: Term) -> str:
    return f"{term.coef:+.4g} {'·'.join(map(told, term.tensors))}".strip()


def _way(program: Program, path: Sequence[tuple[fx.Node, fx.Node]]) -> str:
    return " -> ".join([program.name_of(path[0][0]), *(program.name_of(node) for _, node in path)])


def _paths_of(program: Program) -> list[list[tuple[fx.Node, fx.Node]]]:
    """The paths from the input to the result, none if there are too many."""
    into: dict[fx.Node, list[list[tuple[fx.Node, fx.Node]]]] = {program.source: [[]]}
    for node, parts in program.local.items():
        sources = [source for source, _ in parts]
        if len(sources) > len(set(sources)):
            return []
        into[node] = [[*path, (source, node)] for source in sources for path in into.get(source, [])]
        if len(into[node]) > MAX_PATHS:
            return []
    return [path for path in into.get(program.output, []) if path]


def _weights(got: Tensor, shares: Sequence[Tensor]) -> list[float] | None:
    """The factors with which shares add up to what was got, if there is one way only."""
    most = max(share.abs().max().item() for share in shares)
    mattering = [k for k, share in enumerate(shares) if share.abs().max().item() > 1e-9 * most]
    if len(mattering) < len(shares):  # what is 0 here says nothing
        some = _weights(got, [shares[k] for k in mattering]) if len(mattering) > 1 else None
        found = dict(zip(mattering, some, strict=True)) if some else {}
        return [found.get(k, 1.0) for k in range(len(shares))] if some else None
    A = torch.stack([share.flatten() for share in shares], 1).to(torch.float64)
    if A.shape[0] < A.shape[1] + 1 or int(torch.linalg.matrix_rank(A)) < A.shape[1]:
        return None
    weights = torch.linalg.lstsq(A, got.flatten().to(torch.float64)[:, None]).solution[:, 0]
    # A factor that nobody would write is chance: so few numbers say little.
    plain = all(abs(w * n - round(w * n)) < 1e-6 for w in weights.tolist() for n in [_denominator(w)])
    return weights.tolist() if plain and close((A @ weights).reshape(got.shape).to(got.dtype), got) else None


def _denominator(w: float) -> int:
    return next((n for n in range(1, 33) if abs(w * n - round(w * n)) < 1e-6), 1)


def _line(program: Program, node: fx.Node) -> str:
    line = source_line(node)
    return program.name_of(node) if not line or line.startswith("(") else line


def _slips(program: Program, node: fx.Node, source: fx.Node, J: Derivative) -> Iterator[tuple[Slip, Derivative]]:
    name, below = program.name_of(node), program.name_of(source)
    for k, term in enumerate(J.terms):
        before, after = J.terms[:k], J.terms[k + 1 :]
        shown = _shown(term)
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
        text = f"misses the path from {below} straight into {name}; expected the sum of all paths. Add d{name}/d{below}."
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
            args, kwargs = placed(call.target, {**call.bound, key: [dim] if own is not value and isinstance(value, (list, tuple)) else dim})
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
                text = f"has factors of {name} made along axis {dim} where axis {own[0] % rank} is expected. Use dim={own[0]}."
                yield Slip("wrong axis", text), J.with_terms(mixed)


def _with_numbers_of(term: Term, other: Term) -> Term:
    """The pattern of one term with the numbers of another's factors, where they are shaped alike."""
    theirs = iter(other.tensors)
    factors: list[Factor | Relation] = []
    for f in term.factors:
        g = next(theirs, None) if isinstance(f, Factor) else None
        factors.append(replace(f, tensor=g.tensor) if g is not None and isinstance(f, Factor) and g.tensor.shape == f.tensor.shape else f)
    return replace(term, factors=tuple(factors))


def _relation_slips(f: Relation, name: str, below: str) -> Iterator[tuple[Slip, tuple[Factor | Relation, ...]]]:
    """A triangle that is off by one, turned, or missing; places that are met twice and overwritten."""
    if isinstance(f, Triangle):
        for n in (1, -1):
            text = f"is off by one in d{name}/d{below}: its triangle has {'lost' if n > 0 else 'gained'} a diagonal; expected"
            yield Slip("off by one", f"{text} {f.offset:+d}. Move it by {-n:+d}."), (replace(f, offset=f.offset + n),)
        text = f"misses the triangle of d{name}/d{below}: entries that are left out there count; expected 0 for them."
        yield Slip("missing mask", f"{text} Mask them."), ()
    if isinstance(f, Lookup) and len(f.smalls) == 1 and f.index.ndim == 1:
        places = f.index.tolist()
        for way, seen in (("last", places[::-1]), ("first", places)):
            first = torch.tensor([seen.index(p) == k for k, p in enumerate(seen)])
            mask = Factor(first.flip(0) if way == "last" else first, f.smalls, "[once]")
            text = f"keeps only the {way} of the entries that are looked up more than once in {name}; expected their sum."
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
    for axes in _subsets(f.tensor.ndim):
        if all(f.tensor.shape[a] > 1 for a in axes):
            said_axes = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            text = f"uses {said} in the wrong direction along {said_axes} (a kernel flipped, or not); expected the other."
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
                yield Slip("wrong factor", f"has {text} where {said} is expected. Use {said}."), (replace(f, tensor=wrong),)
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
    a, b = (program.values[x] if isinstance(x, fx.Node) else x for x in node.args)
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

    By the two axes, whether a mean's share changes, too, and whether factors of the tied axis stay on the operand's side.
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
            f: Factor | Relation, i: Label = i, j: Label = j, l: Label = below_j, new: Label = new, inside: bool = inside
        ) -> Any:  # fmt: skip
            if not isinstance(f, Factor) or not (l in f.labels or (inside and f.labels == (i,))):
                return f
            return Factor(f.tensor, tuple({l: j, i: new}.get(x, x) for x in f.labels), f.name)

        inn = tuple((new,) if c == a else (j,) if c == b else axis for c, axis in enumerate(term.inn))
        found[a, b, False, inside] = swapped = replace(term, factors=tuple(map(moved, term.factors)), inn=inn)
        if i.size != j.size:
            found[a, b, True, inside] = replace(swapped, coef=term.coef * j.size / i.size)
    return found


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

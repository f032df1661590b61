"""The usual slips in a hand-written gradient, each as what it would give: the one that gives what was got is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from dualform.algebra.linear_map import Derivative
from dualform.algebra.terms import recorded
from dualform.calculus.op_slips import MAX_RANK, Slip, close, ratio_text, slips, subsets
from dualform.calculus.path_weights import line_of, of_paths
from dualform.graphs.local_derivatives import Program

Names = tuple[Sequence[str], Sequence[str]] | None


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
    for axes in subsets(got.ndim):
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
    for axes in subsets(right.ndim):
        said = _told(axes, right, names, 1)
        for keep, (word, reduce) in itertools.product((False, True), (("summed", torch.sum), ("averaged", torch.mean))):
            if close(got, reduce(right, axes, keep)):
                if all(right.shape[a] == 1 for a in axes):
                    return Slip("lost axis", f"lost {said}; expected shape {tuple(right.shape)}. Use keepdim=True.")
                return Slip("summed axis", f"was {word} over {said}, which the argument has. Leave that axis.")
    return None


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
        found = found or _of_an_op(got, right, g, again, each) or of_paths(got, g, each)
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
    yield Slip("scale", f"is {ratio_text(scale)} times what it should be; expected the factor 1. {advice}")


def _free(J: Derivative, side: str) -> list[int]:
    """The axes of one side that no term ties to the other: those that are summed, or averaged, or copied."""
    there = "inn" if side == "out" else "out"
    other = [
        {x for axis in getattr(t, there) for x in axis} | {x for r in t.relations for x in r.labels} for t in J.terms
    ]
    count = len(getattr(J.terms[0], side)) if J.terms else 0
    return [a for a in range(count) if all(not {*getattr(t, side)[a]} & o for t, o in zip(J.terms, other, strict=True))]


def _counts(scale: float, right: Tensor, g: Tensor, J: Derivative, names: Names) -> Iterator[Slip]:
    """A number of entries: of axes that the derivative sums or averages over, no others."""
    summed, averaged = _free(J, "out"), _free(J, "inn")
    for axes in (axes for axes in subsets(g.ndim) if {*axes} <= {*summed}):
        count = math.prod(g.shape[a] for a in axes)
        if count > 1 and abs(scale * count - 1) < 1e-6:
            text = f"is averaged over {_told(axes, g, names, 0)} of the result; expected the sum."
            yield Slip("averaged", f"{text} Use .sum instead of .mean.")
            return
    counts = {
        tuple(axes): math.prod(right.shape[a] for a in axes) for axes in subsets(right.ndim) if {*axes} <= {*averaged}
    }
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


def _exchanged(got: Tensor, right: Tensor, others: dict[str, Tensor]) -> Iterator[Slip]:
    for order in _orders(right.ndim):
        if order != tuple(range(right.ndim)) and close(got.permute(order), right):
            yield Slip("transposed", f"is transposed: its axes are in the order {order}. Use .permute({order}).")
            break
    for name, value in others.items():
        if close(got, value):
            yield Slip("swapped", f"is the gradient of {name}; expected its own. Swap what you return.")
    for axes in subsets(right.ndim):
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
        parts = [
            program.vjp(torch.zeros_like(g).index_copy(axis, k, g.index_select(axis, k)))
            for k in torch.arange(n).split(1)
        ]
        total = sum(parts[1:], parts[0])
        for k, part in enumerate(parts):
            said = f"of {_told([axis], g, names, 0)} of the result"
            if part.any() and close(got, total - part):
                return Slip("missing entries", f"leaves out entry {k} {said}; expected the sum over all. Add it.")
            if not close(part, total) and close(got, part):
                return Slip(
                    "missing entries", f"has entry {k} {said} alone; expected the sum over all. Add the others."
                )
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
            for slip, wrong in slips(program, node, source, J):
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
                    return Slip(slip.kind, f"{slip.message} (at `{line_of(program, node)}`)")
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

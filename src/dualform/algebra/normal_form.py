"""One form for sums of terms, so that the same function has the same structure, whatever way it was written.

labels that never part are one label; terms and factors in one order; letters for all but the function's inputs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from torch import Tensor

from dualform.algebra.contract import aligned
from dualform.algebra.index_text import letters
from dualform.algebra.sums import merged
from dualform.algebra.terms import (
    Axis,
    Factor,
    Identity,
    Label,
    Term,
    factor_of,
    identity_of,
    product,
    read_from,
    same_place,
    sizes,
)


def settled(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Bring a finished sum into its canonical form: coarse labels, and one factor where several lie on one pattern."""
    groups: dict[tuple, list[Term]] = {}
    for k, term in enumerate(merged([coarse(term) for term in terms])):
        plain = len(term.factors) == len(term.tensors) <= 1 and not any(f.is_mask for f in term.tensors)
        groups.setdefault(_pattern(term) if plain else (k,), []).append(term)
    return tuple(term for group in groups.values() for term in (_one_factor(group) if len(group) > 1 else group))


def _pattern(term: Term) -> tuple:
    number = {label: k for k, label in enumerate(term.visible)}
    sides = (tuple(tuple((number[x], x.size) for x in axis) for axis in side) for side in (term.out, term.inn))
    return tuple(sides)


def _one_factor(group: Sequence[Term]) -> Sequence[Term]:
    """Add terms of one pattern, each with one factor or none, if one of them has all the labels."""
    place = [{label: k for k, label in enumerate(term.visible)} for term in group]
    spans = [{at[x] for f in term.tensors for x in f.labels} for term, at in zip(group, place, strict=True)]
    full = max(range(len(group)), key=lambda k: len(spans[k]))
    if not spans[full] or not all(span <= spans[full] for span in spans):
        return group
    axes = group[full].tensors[0].labels
    own = {k: label for label, k in place[full].items()}
    made = []
    for term, at in zip(group, place, strict=True):
        parts = [replace(f, labels=tuple(own[at[x]] for x in f.labels)) for f in term.tensors]
        made.append(replace(product(parts, axes), coef=term.coef))
    total = sum((t.coef * aligned(t.tensors[0], axes) if t.factors else t.coef) for t in made)
    return [replace(group[full], coef=1.0, factors=(factor_of(made, total, axes),))]  # type: ignore[arg-type]


def coarse(term: Term) -> Term:
    """Make one label of two that stand side by side wherever they stand: what a reshape there and back leaves."""
    pairs = [p for axis in (*term.out, *term.inn) for p in zip(axis, axis[1:], strict=False)]
    for x, y in dict.fromkeys(pairs):
        if _inseparable(term, x, y):
            return coarse(_merged(term, x, y))
    return term


def _inseparable(term: Term, x: Label, y: Label) -> bool:
    if x is y:
        return False
    for axis in (*term.out, *term.inn):
        for k, label in enumerate(axis):
            if (label is x and axis[k + 1 : k + 2] != (y,)) or (label is y and (not k or axis[k - 1] is not x)):
                return False
    for f in term.factors:
        if (x in f.labels) != (y in f.labels) or (x in f.labels and not isinstance(f, Factor)):
            return False
    return True


def _merged(term: Term, x: Label, y: Label) -> Term:
    both = Label(x.size * y.size, x.name or y.name)

    def axis(old: Axis) -> Axis:
        return tuple(both if label is x else label for label in old if label is not y)

    factors: list[Any] = []
    for f in term.factors:
        if x in f.labels and isinstance(f, Factor):
            order = [label for label in f.labels if label is not y]
            order.insert(order.index(x) + 1, y)
            tensor = f.tensor.permute([f.labels.index(label) for label in order])
            labels = axis(tuple(order))
            f = read_from(f, tensor.reshape(sizes(labels)), labels, same_place((both,), (x, y)))
        factors.append(f)
    return Term(term.coef, tuple(factors), tuple(map(axis, term.out)), tuple(map(axis, term.inn)))


def _natural(f: Factor) -> Factor:
    """Order a factor's axes as its numbers lie in memory."""
    order = sorted(range(f.tensor.ndim), key=lambda k: (-f.tensor.stride(k), k))
    if order == list(range(f.tensor.ndim)):
        return f
    return Factor(f.tensor.permute(order), tuple(f.labels[k] for k in order), f.name)


Order = Callable[[Any, Mapping[Label, int], int], tuple[int, ...]]


def _numbered(term: Term, tag: Callable[[Any], tuple], order: Order) -> tuple[tuple, list[Any]]:
    """A key that is equal for equal terms, and the factors in its order.

    `tag` is what a factor is but for its labels, `order` the numbers of its labels as far as they count.
    """
    number = {label: k for k, label in enumerate(term.visible)}
    last = len(number)
    left = [_natural(f) if isinstance(f, Factor) else f for f in term.factors]
    done: list[Any] = []
    while left:
        # Hidden labels get their numbers from the factors that come first.
        best = min(left, key=lambda f: (tag(f), order(f, number, last)))
        left.remove(best)
        done.append(best)
        for label in best.labels:
            number.setdefault(label, len(number))
    axes = tuple(tuple(tuple(number[x] for x in axis) for axis in side) for side in (term.out, term.inn))
    sizes = tuple(label.size for label in number)
    return (len(done), tuple((tag(f), order(f, number, last)) for f in done), axes, sizes), done


def _as_it_lies(f: Any, number: Mapping[Label, int], last: int) -> tuple[int, ...]:
    return tuple(number.get(x, last) for x in f.labels)


def _relation(f: Any) -> tuple:
    index = getattr(f, "index", None)
    return ("~", repr(f.key if index is None else identity_of(index)))


def same_terms(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Are two sums equal term by term, with the same tensors at the same places?"""

    def tag(f: Any) -> tuple:
        return ("", repr(identity_of(f.tensor))) if isinstance(f, Factor) else _relation(f)

    def keys(terms: Sequence[Term]) -> Counter:
        return Counter((term.coef, _numbered(term, tag, _as_it_lies)[0]) for term in map(coarse, terms))

    return len(a) == len(b) and keys(a) == keys(b)


def ordered(terms: Sequence[Term], inputs: Mapping[str, Tensor]) -> tuple[Term, ...]:
    """Sort terms and factors, and name the factors: an input's name, or A, B, ... as they come.

    A factor that stands in one place only takes the coefficient into its letter.
    """
    known = {identity_of(x.squeeze()): name for name, x in inputs.items() if x.numel() > 1}

    def tag(f: Any) -> tuple:
        if not isinstance(f, Factor):  # where an index lies differs from run to run
            index = getattr(f, "index", None)
            return ("~", repr(f.key if index is None else ("lookup", index.shape)))
        name = known.get(identity_of(f.tensor))
        return ("", name) if name is not None else ("~", "")

    def order(f: Any, number: Mapping[Label, int], last: int) -> tuple[int, ...]:
        """Which axis of a letter comes first is nobody's choice."""
        numbers = _as_it_lies(f, number, last)
        return numbers if tag(f) != ("~", "") else tuple(sorted(numbers))

    sorted_terms = sorted((_numbered(term, tag, order) + (term,) for term in map(coarse, terms)), key=lambda t: t[0])
    names = letters(inputs, ascii_uppercase)
    letter: dict[Identity, str] = {}
    turns: dict[Identity, list[tuple[int, int]]] = {}
    uses = Counter(identity_of(f.tensor) for _, factors, _ in sorted_terms for f in factors if isinstance(f, Factor))
    found = []
    for _, factors, term in sorted_terms:
        coef, renamed = term.coef, []
        for f in factors:
            if isinstance(f, Factor):
                key = identity_of(f.tensor)
                if key not in known and key not in letter:
                    letter[key] = next(names)
                if key not in known and uses[key] == 1:
                    coef = 1.0
                f = _turned(f, turns.setdefault(key, _turn(f, term))) if key not in known else f
                f = replace(f, name=known.get(key) or letter[key])
            renamed.append(f)
        found.append(Term(coef, tuple(renamed), term.out, term.inn))
    return tuple(found)


def _turn(f: Factor, term: Term) -> list[tuple[int, int]]:
    """The steps of a factor's axes in the order in which its labels stand in the term."""
    number = {label: k for k, label in enumerate([*term.visible, *term.hidden])}
    axes = sorted(range(f.tensor.ndim), key=lambda k: number[f.labels[k]])
    return [(f.tensor.stride(k), f.tensor.shape[k]) for k in axes]


def _turned(f: Factor, steps: Sequence[tuple[int, int]]) -> Factor:
    """Order a factor's axes by their steps."""
    axes = sorted(range(f.tensor.ndim), key=lambda k: steps.index((f.tensor.stride(k), f.tensor.shape[k])))
    return Factor(f.tensor.permute(axes), tuple(f.labels[k] for k in axes), f.name)

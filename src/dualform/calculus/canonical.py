"""One form for sums of terms, so that the same function has the same structure, whatever way it was written.

labels that never part are one label; terms and factors in one order; letters for all but the function's inputs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from torch import Tensor

from dualform.calculus.terms import Axis, Factor, Label, Term

# A coefficient this much smaller than those that it was summed from is what rounding left of zero.
ROUNDING = 1e-13


def settled(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Bring a finished sum into its canonical form: coarse labels, dense where dense is smaller."""
    return tuple(_stored_dense_if_smaller(coarse(term)) for term in terms)


def _stored_dense_if_smaller(term: Term) -> Term:
    return term


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
            f = Factor(tensor.reshape([label.size for label in labels]), labels, f.name)
        factors.append(f)
    return Term(term.coef, tuple(factors), tuple(map(axis, term.out)), tuple(map(axis, term.inn)))


Identity = tuple[Any, ...]


def identity_of(t: Tensor) -> Identity:
    """What tells two tensors apart: where their numbers are; the order of axes does not matter."""
    steps = tuple(sorted(zip(t.stride(), t.shape, strict=True), reverse=True))
    try:
        where: Any = (t.untyped_storage()._cdata, t.storage_offset())
    except (NotImplementedError, RuntimeError):  # tensors inside a transform
        where = id(t)
    return (where, steps)


def _natural(f: Factor) -> Factor:
    """Order a factor's axes as its numbers lie in memory."""
    order = sorted(range(f.tensor.ndim), key=lambda k: (-f.tensor.stride(k), k))
    if order == list(range(f.tensor.ndim)):
        return f
    return Factor(f.tensor.permute(order), tuple(f.labels[k] for k in order), f.name)


def _numbered(term: Term, tag: Callable[[Any], tuple]) -> tuple[tuple, list[Any]]:
    """A key that is equal for equal terms, and the factors in its order; `tag` is what a factor is but for its labels."""
    number = {label: k for k, label in enumerate(term.visible)}
    last = len(number)
    left = [_natural(f) if isinstance(f, Factor) else f for f in term.factors]
    done: list[Any] = []
    while left:
        # Hidden labels get their numbers from the factors that come first.
        best = min(left, key=lambda f: (tag(f), tuple(number.get(x, last) for x in f.labels)))
        left.remove(best)
        done.append(best)
        for label in best.labels:
            number.setdefault(label, len(number))
    axes = tuple(tuple(tuple(number[x] for x in axis) for axis in side) for side in (term.out, term.inn))
    sizes = tuple(label.size for label in number)
    return (len(done), tuple((tag(f), tuple(number[x] for x in f.labels)) for f in done), axes, sizes), done


def _relation(f: Any) -> tuple:
    key = getattr(f, "key", None)
    return ("~", repr(key if key is not None else (f.start, f.step)))


def same_terms(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Are two sums equal term by term, with the same tensors at the same places?"""

    def tag(f: Any) -> tuple:
        return ("", repr(identity_of(f.tensor))) if isinstance(f, Factor) else _relation(f)

    def keys(terms: Sequence[Term]) -> Counter:
        return Counter((term.coef, _numbered(term, tag)[0]) for term in map(coarse, terms))

    return len(a) == len(b) and keys(a) == keys(b)


def ordered(terms: Sequence[Term], inputs: Mapping[str, Tensor]) -> tuple[Term, ...]:
    """Sort terms and factors, and name the factors: an input's name, or A, B, ... as they come.

    A factor that stands in one place only takes the coefficient into its letter.
    """
    known = {identity_of(x.squeeze()): name for name, x in inputs.items() if x.numel() > 1}

    def tag(f: Any) -> tuple:
        if not isinstance(f, Factor):
            return _relation(f)
        name = known.get(identity_of(f.tensor))
        return ("", name) if name is not None else ("~", "")

    sorted_terms = sorted((_numbered(term, tag) + (term,) for term in map(coarse, terms)), key=lambda t: t[0])
    names = _letters(inputs)
    letter: dict[Identity, str] = {}
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
                f = replace(f, name=known.get(key) or letter[key])
            renamed.append(f)
        found.append(Term(coef, tuple(renamed), term.out, term.inn))
    return tuple(found)


def _letters(taken: Mapping[str, Tensor]) -> Iterator[str]:
    round_ = 0
    while True:
        for letter in ascii_uppercase:
            name = letter + (str(round_) if round_ else "")
            if name not in taken:
                yield name
        round_ += 1

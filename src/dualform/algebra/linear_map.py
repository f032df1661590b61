"""The structured derivative: a sum of terms that keeps deltas, broadcasts and selections instead of storing them.

J[out..., in...] = d f[out...] / d x[in...] = sum over terms of coef * prod factors * prod deltas
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from dualform.algebra import queries
from dualform.algebra.compose import compose_terms
from dualform.algebra.contract import ContractionPlan
from dualform.algebra.drawing import draw, spy
from dualform.algebra.index_text import IndexFormula
from dualform.algebra.laid import laid
from dualform.algebra.materialise import DENSE_LIMIT, scatter, spread
from dualform.algebra.normal_form import ordered
from dualform.algebra.notation import formula, stored_bytes
from dualform.algebra.proofs import Questions
from dualform.algebra.queries import term_plan
from dualform.algebra.scipy import sparsity, to_linear_operator, to_scipy_sparse
from dualform.algebra.sums import merged
from dualform.algebra.terms import Axis, Factor, Label, Select, Term, atoms, fresh_axes, make_factor
from dualform.shapes import ShapeError, fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Axis", "Derivative", "Factor", "Label", "Select", "Term", "atoms", "compose", "derivative_of", "fresh_axes",
    "identity", "make_factor",
]  # fmt: skip


class Told(Protocol):
    """The account of a derivative, as `df.Explanation` is: text by str(), its steps as data, torch code."""

    @property
    def steps(self) -> Sequence[Any]: ...

    @property
    def code(self) -> str: ...

    def to_latex(self) -> str: ...

    def to_html(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


class Route(ABC):
    """A cheaper way to apply a derivative than its terms, as a program of local derivatives; and its account."""

    is_stored = False  # are the terms one stored tensor, of which nobody knows before it is made?

    @property
    def selects(self) -> bool | None:
        """Does it leave entries out? None where the terms are to say it."""
        return None

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The tensors that formulas call by name."""
        return {}

    @abstractmethod
    def vjp(self, g: Tensor) -> Tensor:
        """Pull back."""

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """Push forward."""

    def completed(self, dense: Tensor) -> Tensor:
        """The materialised derivative, once more where it came out as no number."""
        return dense

    def explain(self, derivative: Derivative, level: str) -> Told:
        """The account of the derivative."""
        raise ValueError(_NO_ACCOUNT)

    def shown(self, derivative: Derivative) -> IndexFormula:
        """The derivative in index notation, in the names of its account."""
        return formula(derivative.terms, derivative.out_shape, derivative.in_shape)

    def told(self, derivative: Derivative) -> Derivative:
        """The derivative made once more, with a record of what its factors are made of."""
        return derivative

    def joined(self, outer: Derivative, inner: Derivative) -> Route | None:
        """The route of outer @ inner, where one of them has this one."""
        return None


_NO_ACCOUNT = (
    "explain: the derivative is made of terms alone; expected one that df.jacobian made here, or a product of such. "
    "Read J.structure instead."
)


class Derivative(Questions):
    """Hold d f / d x with its structure: nothing is materialised unless asked.

    J[out..., in...]; `terms` is the sum, made on first use when given as a function
    Shape:  shape = out_shape + in_shape; out_axes and in_axes are the names of the axes, given or made.
    Dtype:  that of the function's result; sums are in that dtype.
    Raises: ShapeError when a vector or another derivative does not fit.
    Example:
        >>> J = identity(torch.ones(3))
        >>> J.shape, J.nbytes, J.dense_nbytes, J.structure
        ((3, 3), 0, 36, 'J[i,j] = δ(i,j)')
    """

    def __init__(
        self, terms: Sequence[Term] | Callable[[], Sequence[Term]], out_shape: Sequence[int], in_shape: Sequence[int],
        dtype: torch.dtype, device: torch.device | str, route: Route | None = None,
        axes: tuple[Sequence[str], Sequence[str]] | None = None, symmetric: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """inputs: the tensors that formulas call by name, where no route says it."""
        self._terms = terms if callable(terms) else tuple(terms)
        self.out_shape = tuple(out_shape)
        self.in_shape = tuple(in_shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self.route = route
        self._axes = axes
        self._symmetric = symmetric
        self._inputs = dict(inputs or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the terms and their names: the function that they are of, and so its account, stay in the process."""
        terms, inputs = laid(self.terms, self._by_name)
        own = (terms, self.out_shape, self.in_shape, self.dtype, str(self.device), None, self._axes)
        return Derivative, (*own, self._symmetric, inputs)

    def __copy__(self) -> Derivative:
        return self

    @property
    def terms(self) -> tuple[Term, ...]:
        """The products whose sum is the derivative."""
        if callable(self._terms):
            self._terms = tuple(self._terms())
        return self._terms

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers stored, each storage counted once."""
        return stored_bytes([t for term in self.terms for t in term.stored])

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the materialised derivative."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def structure(self) -> str:
        """The derivative in index notation, as `J[i,j,k] = δ(j,k)`.

        Equal for equal structures: inputs keep their names, other factors are A, B, ... in the order of the formula.
        """
        shown = ordered(self.terms, self._by_name)
        return str(formula(shown, self.out_shape, self.in_shape, axes=self._axes))

    @property
    def _by_name(self) -> Mapping[str, Tensor]:
        return self._inputs if self.route is None else self.route.inputs

    @property
    def T(self) -> Derivative:
        """Swap output and input: the adjoint map."""
        names = None if self._axes is None else (self._axes[1], self._axes[0])
        terms = self._terms if self._symmetric else queries.flipped(self.terms)
        return Derivative(terms, self.in_shape, self.out_shape, self.dtype, self.device, None, names, self._symmetric)

    def dense(self, limit: int | None = None) -> Tensor:
        """Materialise the derivative.

        Shape:  -> out_shape + in_shape.
        Dtype:  the derivative's.
        Raises: MemoryError above `limit` bytes (default: `DENSE_LIMIT`); `dense_nbytes` says beforehand what it costs.
        """
        most = DENSE_LIMIT if limit is None else limit
        if self.dense_nbytes > most:
            raise MemoryError(
                f"dense: the {' x '.join(map(str, self.shape))} entries take {self.dense_nbytes:,} bytes; expected at "
                f"most {most:,}. Use J.vjp, J.jvp, a slice J[...] or J.diagonal, or pass J.dense(limit=...); stored as "
                f"it is, the derivative takes {self.nbytes:,}."
            )
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if result.numel():
            for term in self.terms:
                scatter(term, (*term.out, *term.inn), result)
        return result if self.route is None else self.route.completed(result)

    def vjp(self, g: Tensor) -> Tensor:
        """Apply the adjoint to a gradient of the output.

        x_bar[in] = sum over out of g[out] J[out, in]
        Shape:  g out_shape -> in_shape.
        Dtype:  the derivative's.
        Raises: ShapeError if g is not shaped like the output.
        """
        return self._applied("vjp", "g", g)

    def jvp(self, v: Tensor) -> Tensor:
        """Apply the derivative to a direction in the input.

        y_dot[out] = sum over in of J[out, in] v[in]
        Shape:  v in_shape -> out_shape.
        Dtype:  the derivative's.
        Raises: ShapeError if v is not shaped like the input.
        """
        return self._applied("jvp", "v", v)

    def _applied(self, way: str, name: str, seed: Tensor) -> Tensor:
        sides, shapes = ("out", "inn"), (self.out_shape, self.in_shape)
        (side, other), (given, shape) = (sides, shapes) if way == "vjp" else (sides[::-1], shapes[::-1])
        if seed.shape != given:
            expected = f"the {side.replace('inn', 'in')}put's shape = {given}"
            fail(way, name, f"has shape {tuple(seed.shape)}", expected, "Reshape or slice it.")
        if self.route is not None:
            return getattr(self.route, way)(seed)
        total: Tensor | None = None
        if math.prod(self.shape):
            for term in self.terms:
                part = spread(term, getattr(term, other), [make_factor(seed, getattr(term, side), "g")], seed)
                total = part if total is None else total + part
        return torch.zeros(shape, dtype=self.dtype, device=self.device) if total is None else total

    def plans(self, use: str = "vjp") -> tuple[ContractionPlan, ...]:
        """The order in which each term is contracted for a use, and its cost, before it is paid.

        Shape:  one plan for each term; `use` is "vjp", "jvp" or "dense".
        Dtype:  bytes are counted in the factors' dtype.
        Raises: ValueError for another use.
        """
        sides = {"vjp": ("out", "inn"), "jvp": ("inn", "out"), "dense": (None, None)}
        if use not in sides:
            fail("plans", "use", f"is {use!r}", f"one of {list(sides)}", "Choose one.", ValueError)
        like = torch.empty((), dtype=self.dtype, device="meta")
        seed, result = sides[use]
        return tuple(term_plan(term, seed, result, like) for term in self.terms)

    def to_scipy_sparse(self) -> Any:
        """Make a scipy COO array of the flattened output by the flattened input: the entries that `sparsity` has.

        Shape:  (prod out_shape, prod in_shape).
        Dtype:  the derivative's; float32 for half precision.
        Raises: ImportError where scipy is not installed.
        """
        return to_scipy_sparse(self)

    def sparsity(self) -> Any:
        """Say which entries are not zero for all numbers, as a scipy COO array of truth values; none is computed.

        Shape:  (prod out_shape, prod in_shape).
        Dtype:  bool.
        Raises: ImportError where scipy is not installed.
        """
        return sparsity(self)

    def to_linear_operator(self) -> Any:
        """Make a scipy LinearOperator of the flattened output by the flattened input; nothing is materialised.

        Shape:  (prod out_shape, prod in_shape).
        Dtype:  the derivative's.
        Raises: ImportError where scipy is not installed.
        """
        return to_linear_operator(self, self.jvp, self.vjp)

    def __matmul__(self, inner: Derivative) -> Derivative:
        if not isinstance(inner, Derivative):
            return NotImplemented
        product, route = compose(self, inner), self.route or inner.route
        product.route = None if route is None else route.joined(self, inner)
        return product

    def __add__(self, other: Derivative) -> Derivative:
        if not isinstance(other, Derivative):
            return NotImplemented
        if self.shape != other.shape or self.out_shape != other.out_shape:
            found, advice = f"is {other.out_shape} by {other.in_shape}", "Add derivatives of one function space only."
            fail("Derivative +", "the second summand", found, f"{self.out_shape} by {self.in_shape}", advice)
        return self.with_terms(merged([*self.terms, *other.terms]), self._symmetric and other._symmetric)

    def __mul__(self, scale: float) -> Derivative:
        if not isinstance(scale, int | float):
            return NotImplemented
        return self.with_terms([replace(t, coef=t.coef * scale) for t in self.terms if scale != 0], self._symmetric)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Derivative:
        return self * (1 / scale) if isinstance(scale, int | float) else NotImplemented

    def __neg__(self) -> Derivative:
        return self * -1.0

    def __sub__(self, other: Derivative) -> Derivative:
        return self + -other

    def _like(self, terms: Sequence[Term], out: Sequence[int], inn: Sequence[int], axes: Any) -> Self:
        return type(self)(terms, out, inn, self.dtype, self.device, axes=axes)

    def with_terms(self, terms: Sequence[Term], symmetric: bool = False) -> Derivative:
        """The same of other terms."""
        shapes = (self.out_shape, self.in_shape)
        return Derivative(terms, *shapes, self.dtype, self.device, axes=self._axes, symmetric=symmetric)

    def explain(self, level: str = "steps") -> Told:
        """Say how the derivative comes about and how to use it: level "one-line", "steps" or "proof".

        Shape:  none.
        Dtype:  none.
        Raises: ValueError for another level, or for a derivative that no program made.
        """
        if self.route is None:
            raise ValueError(_NO_ACCOUNT)
        return self.route.explain(self, level)

    def plot(self) -> Figure:
        """Draw the derivative: its entries as a matrix of blocks, its terms as wires from output axes to input axes.

        Shape:  none; of axes too long to draw the first entries are drawn.
        Dtype:  none.
        Raises: ModuleNotFoundError without matplotlib, which the extra 'viz' brings.
        """
        route = self.route
        return draw(self, formula(self.terms, self.out_shape, self.in_shape) if route is None else route.shown(self))

    def spy(self) -> Figure:
        """Draw which entries are not zero for all numbers; where there are too many to draw, how many are.

        Shape:  none.
        Dtype:  none; no value is read.
        Raises: ModuleNotFoundError without matplotlib, which the extra 'viz' brings.
        """
        return spy(self)

    def __repr__(self) -> str:
        kind = ", symmetric" if self.is_symmetric else ""
        shapes = f"{self.out_shape} by {self.in_shape}{kind}"
        return f"Derivative({shapes}: {self.structure}; {self.nbytes} of {self.dense_nbytes} bytes)"


def compose(outer: Derivative, inner: Derivative) -> Derivative:
    """Compose two derivatives by the chain rule.

    J[out, in] = sum over mid of J2[out, mid] J1[mid, in]; deltas vanish by renaming labels
    Shape:  outer (out, mid), inner (mid, in) -> (out, in).
    Dtype:  the outer's.
    Raises: ShapeError if the shapes in the middle differ.
    """
    if outer.in_shape != inner.out_shape:
        raise ShapeError(
            f"compose: inner has output shape {inner.out_shape}; expected the outer's input shape = {outer.in_shape}. "
            "Write J2 @ J1 for J2 after J1."
        )
    empty = 0 in (math.prod(outer.shape), math.prod(inner.shape))
    pairs = [] if empty else [compose_terms(a, b) for a in outer.terms for b in inner.terms]
    terms = merged([t for t in pairs if t is not None])
    return Derivative(terms, outer.out_shape, inner.in_shape, outer.dtype, outer.device)


def derivative_of(out: Tensor, operand: Tensor, terms: Any = (), route: Route | None = None) -> Derivative:
    """d out / d operand, zero where no terms are named."""
    return Derivative(terms, out.shape, operand.shape, out.dtype, out.device, route)


def identity(x: Tensor) -> Derivative:
    """d x / d x: one delta per axis, nothing stored."""
    axes = fresh_axes(x.shape)
    return derivative_of(x, x, (Term(1.0, (), axes, axes),))

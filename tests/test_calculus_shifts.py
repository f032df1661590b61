"""Sums of many shifts, chunks and stencils keep their structure, whatever way they are written; nothing large is formed."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform import hessian, jacobian
from dualform.calculus import Derivative

TIGHT: Any = {"rtol": 1e-10, "atol": 1e-10}
NINE = list(itertools.product(range(3), repeat=2))
U = torch.linspace(-1, 1, 63, dtype=torch.float64).sin().reshape(7, 9)
ROW = torch.linspace(-1, 1, 36, dtype=torch.float64)


def stencil(u: Tensor, weights: list[float], reach: int = 1) -> Tensor:
    p, (n, m) = F.pad(u, (reach,) * 4), u.shape
    places = itertools.product(range(2 * reach + 1), repeat=2)
    return sum(w * p[i : i + n, j : j + m] for w, (i, j) in zip(weights, places, strict=True) if w)  # type: ignore[return-value]


def added(u: Tensor) -> Tensor:
    z = u.new_zeros(9, 11)
    for k, (i, j) in enumerate(NINE):
        z[i : i + 7, j : j + 9] += (k + 1) * u
    return z


def rolled(u: Tensor) -> Tensor:
    return sum((k + 1) * u.roll((i - 1, j - 1), (0, 1)) for k, (i, j) in enumerate(NINE))  # type: ignore[return-value]


STAR = [0, 0, 1, 0, 0, 0, 2, -8, 2, 0, 1, -8, 20, -8, 1, 0, 2, -8, 2, 0, 0, 0, 1, 0, 0]
# What is to be stored at most: (numbers, function, argument).
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor], Tensor]] = {
    "box": (0, lambda u: stencil(u, [1.0] * 9), U), "weighted": (9, lambda u: stencil(u, [*range(1, 10)]), U),
    "star": (25, lambda u: stencil(u, STAR, 2), U), "strided": (9, lambda u: sum((k + 1) * u[i : i + 5 : 2, j : j + 7 : 2] for k, (i, j) in enumerate(NINE)), U),  # type: ignore[dict-item]
    "twice": (63, lambda u: stencil(stencil(u, [1.0] * 9), [*range(1, 10)]), U), "thrice": (0, lambda u: stencil(stencil(stencil(u, [1.0] * 9), [1.0] * 9), [1.0] * 9), U),
    "of tanh": (63 * 9, lambda u: stencil(u.tanh(), [*range(1, 10)]), U), "square": (63 + 9, lambda u: stencil(u, [*range(1, 10)]) ** 2, U),
    "varying": (9 * 63, lambda u: sum((u.detach() + k) * stencil(u, [float(k == n) for n in range(9)]) for k in range(9)), U),  # type: ignore[dict-item]
    "rolled": (0, rolled, U), "added": (40, added, U), "both ways": (18, lambda u: torch.stack([stencil(u, [*range(1, 10)]), stencil(u, [*range(10, 19)])]), U),
    "chunks": (0, lambda x: torch.cat([(i + 2) * c for i, c in enumerate(x.chunk(9))]), ROW), "chunks of tanh": (36, lambda x: torch.cat([(i * c).tanh() for i, c in enumerate(x.chunk(12), 1)]), ROW),
    "sum of chunks": (12, lambda x: sum((i + 1) * c for i, c in enumerate(x.chunk(12))), ROW), "long": (25, lambda x: sum((k + 1) * F.pad(x, (12, 12))[k : k + 36] for k in range(25)), ROW),  # type: ignore[dict-item]
    "full": (25, lambda x: sum((k + 1) * F.pad(x, (k, 24 - k)) for k in range(25)), ROW), "dilated": (13, lambda x: sum((k + 1) * F.pad(x, (18, 18))[3 * k : 3 * k + 36] for k in range(13)), ROW),  # type: ignore[dict-item]
    "stacked": (0, lambda x: torch.stack([x[k : k + 24] for k in range(12)]), ROW), "turned": (12, lambda x: sum((k + 1) * x.flip(0)[k : k + 24] for k in range(12)), ROW),  # type: ignore[dict-item]
    "ranges": (0, lambda x: F.pad(x[:3], (0, 7)) + F.pad(x[:5], (0, 5)), ROW),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shifts_keep_their_structure(name: str) -> None:
    most, f, x = FUNCTIONS[name]
    J, expected = jacobian(f, x), torch.func.jacrev(f)(x)
    torch.testing.assert_close(J.dense(), expected, **TIGHT)
    plain = Derivative(J.terms, J.out_shape, J.in_shape, J.dtype, J.device)
    g = torch.linspace(0, 1, expected[..., 0].numel() if x.ndim == 1 else f(x).numel(), dtype=x.dtype).reshape(
        J.out_shape
    )
    for way in (J, plain):
        torch.testing.assert_close(way.vjp(g), torch.tensordot(g, expected, g.ndim), **TIGHT)
        torch.testing.assert_close(way.jvp(x), torch.tensordot(expected, x, x.ndim), **TIGHT)
    assert J.nbytes <= 8 * most


def test_long_recurrences_are_no_longer_than_they_store() -> None:
    def scan(x: Tensor) -> Tensor:
        h, found = x[0], []
        for t in range(1, len(x)):
            h = 0.9 * h + x[t]
            found.append(h)
        return torch.stack(found)

    x = torch.ones(24, 3, dtype=torch.float64)
    J = jacobian(scan, x)
    torch.testing.assert_close(J.dense(), torch.func.jacrev(scan)(x), **TIGHT)
    assert J.structure == "J[i,j,k,l] = A[i,k] δ(j,l)"


def test_a_second_derivative_of_a_stencil_is_a_stencil() -> None:
    def energy(u: Tensor) -> Tensor:
        return (stencil(u, [*range(1, 10)]) ** 2).sum() / 2

    H = hessian(energy, U)
    torch.testing.assert_close(H.dense(), torch.func.jacrev(torch.func.jacrev(energy))(U), **TIGHT)
    assert H.nbytes <= H.dense_nbytes / 8


def test_large_stencils_take_no_memory() -> None:
    """As one factor, 12.8 GB."""
    u, before = torch.zeros(200, 200, dtype=torch.float64), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    J = jacobian(lambda u: stencil(u, [1.0] * 9), u)
    assert (J.nbytes, J.dense_nbytes, len(J.terms)) == (0, 8 * 200**4, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    with pytest.raises(MemoryError, match="expected at most"):
        J.dense()
    with pytest.raises(MemoryError, match=r"that of aten::linalg_matrix_exp takes .* bytes if it is stored dense"):
        jacobian(torch.linalg.matrix_exp, torch.zeros(200, 200, dtype=torch.float64)).dense(limit=2**40)

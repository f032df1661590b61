"""L-BFGS on several costs at once: each descends by itself, and what they ask for is evaluated together.

Legend: P numbers, B costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence

import numpy as np

# points (b, P), which costs -> (b,), (b, P)
Costs = Callable[[np.ndarray, Sequence[int]], tuple[np.ndarray, np.ndarray]]
Ask = Generator[np.ndarray, tuple[float, np.ndarray], tuple[np.ndarray, bool]]


def _descent(x: np.ndarray, max_iter: int, tol: float, after: Callable[[np.ndarray, float], None] | None) -> Ask:
    """Give points, take the cost and gradient of each; return the last point, and whether the descent converged.

    L-BFGS (Nocedal, Wright 2006, algorithm 7.5); a step is halved or doubled until the cost falls enough and its slope
    flattens (Lewis, Overton 2013). It ends where no slope is steeper than tol, or the cost falls by
    less than a hundredth of tol.
    """
    value, g = yield x
    pairs = deque[tuple[np.ndarray, np.ndarray, float]](maxlen=10)
    for _ in range(max_iter):
        if np.abs(g).max(initial=0) <= tol:
            return x, True
        d = -_newton(g, pairs)
        slope = float(d @ g)
        low, high, t = 0.0, math.inf, 1.0 if pairs else 1 / float(np.linalg.norm(d))
        for _ in range(25):
            new, steeper = yield x + t * d
            if not new <= value + 1e-4 * t * slope:  # NaN is no fall
                high = t
            elif float(steeper @ d) < 0.9 * slope:
                low = t
            else:
                break
            t = 2 * t if math.isinf(high) else (low + high) / 2
        else:
            return x, True  # no lower point within rounding
        s, y = t * d, steeper - g
        fall = (value - new) / max(abs(value), abs(new), 1.0)
        x, value, g = x + s, new, steeper
        if (curvature := float(s @ y)) > 1e-16 * float(y @ y):
            pairs.append((s, y, 1 / curvature))
        if after is not None:
            after(x, value)
        if fall <= 1e-2 * tol:
            return x, True
    return x, bool(np.abs(g).max(initial=0) <= tol)


def _newton(g: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """Multiply by the inverse Hessian that steps s and changes y of the gradient tell; pairs: (s, y, 1 / s^T y)."""
    r, along = g.copy(), list[float]()
    for s, y, rho in reversed(pairs):
        along.append(rho * float(s @ r))
        r -= along[-1] * y
    if pairs:
        _, y, rho = pairs[-1]
        r /= rho * float(y @ y)
    for (s, y, rho), a in zip(pairs, reversed(along), strict=True):
        r += (a - rho * float(y @ r)) * s
    return r


def descended(
    costs: Costs, starts: np.ndarray, max_iter: int, tol: float,
    after: Callable[[np.ndarray, float], None] | None = None,
) -> tuple[np.ndarray, bool]:  # fmt: skip
    """Minimise each cost from its start (B, P), all at once; return the points and whether all converged."""
    runs = [_descent(start, max_iter, tol, after) for start in starts]
    asked = {b: next(run) for b, run in enumerate(runs)}
    found, converged = starts.copy(), True
    while asked:
        which = list(asked)
        for b, value, gradient in zip(which, *costs(np.stack(list(asked.values())), which), strict=True):
            try:
                asked[b] = runs[b].send((float(value), gradient))
            except StopIteration as end:
                del asked[b]
                found[b], is_low = end.value
                converged &= is_low
    return found, converged

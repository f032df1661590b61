"""The caller's names of axes: read, made where there are none, and spoken in errors about shapes that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from dualform.algebra.index_text import letters, primed
from dualform.shapes import ShapeError, fail


@dataclass(frozen=True)
class Axes:
    """Names of the axes of each tensor argument, and of each result."""

    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]

    def of(self, output: int, source: int) -> tuple[list[str], list[str]]:
        """The names of one derivative's axes; a name that both sides have gets a prime on the input's."""
        out = list(self.outputs[output])
        return out, primed(self.inputs[source], out)


def made(out_rank: int, in_rank: int) -> tuple[list[str], list[str]]:
    """Names for axes that have none: i, j, k, ... through the output, then the input."""
    names = letters()
    return [next(names) for _ in range(out_rank)], [next(names) for _ in range(in_rank)]


def parse(spec: str, tensors: Sequence[tuple[str, Tensor]]) -> Axes:
    """Read `axes="i j, j l -> i l"`: one list of names for each tensor argument, one for each result.

    Raises ShapeError where one name stands for two sizes, in the names of the caller.
    """
    left, arrow, right = spec.partition("->")
    inputs = [part.split() for part in left.split(",")]
    if not arrow or len(inputs) != len(tensors):
        wanted = f"{len(tensors)} inputs, '->' and an output"
        fail("jacobian", "axes", f"is {spec!r}", wanted, "Write 'i j, j l -> i l'.")
    owner: dict[str, tuple[int, str, int]] = {}
    for names, (name, x) in zip(inputs, tensors, strict=True):
        if len(names) != x.ndim:
            fail("jacobian", "axes", f"names {len(names)} axes of {name}", f"its rank = {x.ndim}", "Name every axis.")
        for k, (axis, n) in enumerate(zip(names, x.shape, strict=True)):
            at, other, size = owner.setdefault(axis, (k, name, n))
            if n != size and 1 not in (n, size):
                raise ShapeError(
                    f"jacobian: axis {at} of {other} ({axis}={size}) meets axis {k} of {name} ({axis}={n}); "
                    "expected one size for one name. Rename one of them, or reshape."
                )
    return Axes(tuple(map(tuple, inputs)), tuple(tuple(part.split()) for part in right.split(",")))


def expect_outputs(axes: Axes, results: Sequence[Tensor]) -> None:
    """Compare the names of the results with their ranks."""
    if len(axes.outputs) != len(results):
        found = f"names {len(axes.outputs)} results"
        fail("jacobian", "axes", found, f"one list for each of f's = {len(results)}", "Separate them by commas.")
    for names, result in zip(axes.outputs, results, strict=True):
        if len(names) != result.ndim:
            found = f"names {len(names)} output axes"
            fail("jacobian", "axes", found, f"one for each of f's = {result.ndim}", "Name them all.")
        if len(set(names)) != len(names):
            fail("jacobian", "axes", f"names the output {' '.join(names)}", "distinct names", "Rename one of them.")


# What torch says where it spreads two tensors over each other and their sizes differ.
_APART = re.compile("must match the (existing )?size|broadcast|non-singleton|[Ss]hape mismatch")


class _Failure(TorchFunctionMode):
    """Remember the tensors of the torch call that failed."""

    def __init__(self) -> None:
        super().__init__()
        self.name = self.error = ""
        self.tensors: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if not self.name:
                self.error = str(error)
                self.name = getattr(func, "__name__", str(func)).strip("_")
                self.tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            raise


def meeting(f: Callable[..., Any], tensors: Sequence[Tensor], names: Sequence[str], axes: Axes | None) -> str | None:
    """Say which axes do not fit, if running f on stand-ins fails in a product or a broadcast of two tensors."""
    stand_ins = [t.to("meta") if t.device.type != "meta" else t.clone() for t in tensors]
    mode = _Failure()
    try:
        with mode:
            f(*stand_ins)
    except Exception:
        pass
    if len(mode.tensors) < 2:
        return None
    a, b = mode.tensors[:2]
    pair = _inner(mode.name, a, b) or (_broadcast(a, b) if _APART.search(mode.error) else None)
    if pair is None:
        return None

    def said(t: Tensor, axis: int) -> str:
        k = next((k for k, s in enumerate(stand_ins) if s is t), None)
        label = axes.inputs[k][axis] if axes is not None and k is not None else "size"
        owner = names[k] if k is not None else f"an intermediate of shape {tuple(t.shape)}"
        return f"axis {axis} of {owner} ({label}={t.shape[axis]})"

    return f"{said(a, pair[0])} meets {said(b, pair[1])} in {mode.name}"


def _inner(name: str, a: Tensor, b: Tensor) -> tuple[int, int] | None:
    """The axes that a product sums over."""
    if name in ("matmul", "mm", "bmm", "mv", "dot", "rmatmul") and a.ndim and b.ndim:
        if name == "rmatmul":
            a, b = b, a
        pair = (a.ndim - 1, max(b.ndim - 2, 0))
        return pair if a.shape[pair[0]] != b.shape[pair[1]] else None
    if name == "linear" and a.ndim and b.ndim and a.shape[-1] != b.shape[-1]:
        return a.ndim - 1, b.ndim - 1
    return None


def _broadcast(a: Tensor, b: Tensor) -> tuple[int, int] | None:
    """The first axes, from the right, that neither are equal nor have size 1."""
    for k in range(1, min(a.ndim, b.ndim) + 1):
        if a.shape[-k] != b.shape[-k] and 1 not in (a.shape[-k], b.shape[-k]):
            return a.ndim - k, b.ndim - k
    return None

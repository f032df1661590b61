"""A derivative as scipy's sparse array and as scipy's LinearOperator; scipy is imported when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.pattern import entries, pattern
from dualform.algebra.proofs import Questions


def _scipy(name: str, function: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"{function}: the package 'scipy' is not installed; expected scipy. Run `pip install scipy`."
        ) from missing


def to_scipy_sparse(J: Questions) -> Any:
    """Write the entries that are not zero for all numbers as scipy.sparse.coo_array, output by input, flattened."""
    kept = torch.float32 if J.dtype.itemsize < 4 else J.dtype  # scipy has no smaller one
    return _array(J, *entries(J.terms if math.prod(J.shape) else (), torch.empty((), dtype=kept, device=J.device)))


def sparsity(J: Questions) -> Any:
    """Write where they are as scipy.sparse.coo_array of truth values."""
    where = pattern(J.terms if math.prod(J.shape) else (), J.device)
    return _array(J, where, torch.ones_like(where, dtype=torch.bool))


def _array(J: Questions, where: Tensor, data: Tensor) -> Any:
    sparse = _scipy("scipy.sparse", "to_scipy_sparse")
    rows, columns = math.prod(J.out_shape), math.prod(J.in_shape)
    at = where.cpu().numpy()
    return sparse.coo_array((data.cpu().numpy(), (at // max(columns, 1), at % max(columns, 1))), (rows, columns))


def to_linear_operator(J: Questions, jvp: Callable[[Tensor], Tensor], vjp: Callable[[Tensor], Tensor]) -> Any:
    """Wrap jvp and vjp as scipy.sparse.linalg.LinearOperator."""
    linalg = _scipy("scipy.sparse.linalg", "to_linear_operator")

    def tensor(vector: Any, shape: tuple[int, ...]) -> Tensor:
        return torch.as_tensor(vector, dtype=J.dtype, device=J.device).reshape(shape)

    def forward(v: Any) -> Any:
        return jvp(tensor(v, J.in_shape)).reshape(-1).detach().cpu().numpy()

    def adjoint(g: Any) -> Any:
        return vjp(tensor(g, J.out_shape)).reshape(-1).detach().cpu().numpy()

    name = str(J.dtype).removeprefix("torch.")
    shape = (math.prod(J.out_shape), math.prod(J.in_shape))
    kept = "float32" if name == "bfloat16" else name
    return linalg.LinearOperator(shape, matvec=forward, rmatvec=adjoint, dtype=kept)

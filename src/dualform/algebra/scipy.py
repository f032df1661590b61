"""A derivative as scipy's sparse array and as scipy's LinearOperator; scipy is imported when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dualform.algebra.materialise import entries
from dualform.algebra.proofs import Questions


def _scipy(name: str, function: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"{function}: the package 'scipy' is not installed; expected scipy. Run `pip install scipy`."
        ) from missing


def to_scipy_sparse(J: Questions) -> Any:
    """Write the entries that some term can reach as scipy.sparse.coo_array, flattened output by flattened input."""
    sparse = _scipy("scipy.sparse", "to_scipy_sparse")
    rows, columns = math.prod(J.out_shape), math.prod(J.in_shape)
    index: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    values: list[Tensor] = [torch.zeros(0, dtype=J.dtype)]
    if rows * columns:
        for term in J.terms:
            value, where = entries(term, (*term.out, *term.inn), torch.empty((), dtype=J.dtype, device=J.device))
            values.append(value.cpu())
            index.append(where.cpu())
    where, data = torch.cat(index), torch.cat(values)
    shape = (rows, columns)
    found = sparse.coo_array((data.numpy(), (where.numpy() // max(columns, 1), where.numpy() % max(columns, 1))), shape)
    found.sum_duplicates()
    return found


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

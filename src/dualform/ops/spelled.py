"""Functions whose own code reads values or writes in place for no need of the result, in ops that can be traced.

cov(x) = (x - mean) w (x - mean)^T / n        combinations(x) = x[places]        vander(x) = x^0, x^1, ...
fake_quantize(x) = x + (level - x).detach()        lstsq(A, B) = pinv(A) B
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dualform.ops.indexing import bags


def _cov(x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """Rows are variables; frequencies count, importances weigh: in their own precision, as torch has it."""
    rows = torch.atleast_2d(x)
    given = [w for w in (fweights, aweights) if w is not None]
    weight = math.prod(given[1:], start=given[0]) if given else torch.ones_like(rows[0])
    total = weight.sum()
    apart = rows - (rows * weight).sum(1, keepdim=True) / total
    lost = correction * (weight * aweights).sum() / total if aweights is not None and correction else correction
    return ((apart * weight) @ apart.mT / (total - lost).clamp(min=0)).squeeze()


def _corrcoef(x: Tensor) -> Tensor:
    c = _cov(x)
    if not c.ndim:
        return c / c
    deviation = c.diagonal().sqrt()
    return (c / deviation[:, None] / deviation).clamp(-1, 1)


def _combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    places = torch.tensor(list(choose(range(x.shape[0]), r)), dtype=torch.int64, device=x.device)
    return x[places.reshape(-1, r)]


def _vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    powers = torch.linalg.vander(x, N=x.shape[0] if N is None else N)
    return powers if increasing else powers.flip(-1)


def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, **rest: Any) -> Tensor:
    """Out of training, the mean slope."""
    if training:
        return torch.rrelu(x, lower, upper, training, **rest)  # refused as random
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def _fake_quantize(x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    """As torch: the scale, its inverse and the product with it are of single precision."""
    scale = scale.float() if isinstance(scale, Tensor) else x.new_full((), scale, dtype=torch.float32)
    grid = (x * (1 / scale)).round() + zero_point
    level = (grid.clamp(quant_min, quant_max) - zero_point).float() * scale
    return _straight_through(x, grid, level, quant_min, quant_max)


def _fake_quantize_channels(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """As torch: here the product with the scale is of the input's precision."""
    shape = [-1 if k == axis % x.ndim else 1 for k in range(x.ndim)]
    scale, zero = scale.reshape(shape), zero_point.reshape(shape)
    grid = (x * (1 / scale)).round() + zero
    return _straight_through(x, grid, (grid.clamp(quant_min, quant_max) - zero) * scale, quant_min, quant_max)


def _straight_through(x: Tensor, grid: Tensor, level: Tensor, low: int, high: int) -> Tensor:
    """The nearest level, with the derivative of the identity inside and of a constant outside."""
    inside = x * ((grid >= low) & (grid <= high)).to(x.dtype)
    return level.to(x.dtype).detach() + (inside - inside.detach())


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """The norm of all differences."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _fill_diagonal(x: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """In place; past the last row of a tall matrix the diagonal begins anew, one row further down."""
    if x.ndim == 2 and not wrap:
        x.diagonal().fill_(fill_value)
    else:
        x.view(-1)[:: sum(x.stride())].fill_(fill_value)
    return x


_results: Any = torch.return_types


def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """The shortest of the nearest, which torch differentiates by the pseudo-inverse too."""
    is_vector = B.ndim == A.ndim - 1
    B = B[..., None] if is_vector else B
    X = torch.linalg.pinv(A, rtol=rcond) @ B
    apart = (A @ X - B).square().sum(-2)
    X, apart = (X[..., 0], apart[..., 0]) if is_vector else (X, apart)
    rest = apart if A.shape[-2] > A.shape[-1] else apart.new_empty(0)
    values = torch.linalg.svdvals(A).detach() if driver in ("gelsd", "gelss") else A.new_empty(0)
    return _results.linalg_lstsq((X, rest, torch.linalg.matrix_rank(A, rtol=rcond), values))


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    """One result that weights and tokens meet in."""
    info = A.new_zeros(A.shape[:-2], dtype=torch.int32)
    return _results.linalg_solve_ex((torch.linalg.solve(A, B, left=left), info))


def _gaussian_nll(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """Where torch raises, at a negative variance, the loss is no number."""
    var = var if isinstance(var, Tensor) else var * torch.ones_like(input)
    var = var.unsqueeze(-1) if var.shape != input.shape and input.shape[:-1] == var.shape else var
    bounded = torch.where(var < 0, torch.nan, var + (var.clamp(min=eps) - var).detach())
    loss = 0.5 * (bounded.log() + (input - target).square() / bounded)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _first_moves(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Statistics beside a result have no gradient, as torch has it."""

    def run(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        made, *rest = f(*args, **named)
        return made, *(x.detach() for x in rest)

    return run


def _recurrent(whole: Callable[..., Any], cell: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Step by step: torch goes about it by sizes, and an LSTM of single precision is a call of oneDNN on the CPU, which
    vmap cannot map. cell: of what is read, what is remembered and the states, the new ones."""

    def run(input: Tensor, hx: Any, params: Any, *rest: Any) -> tuple[Tensor, ...]:
        states = hx if isinstance(hx, tuple | list) else (hx,)
        own = isinstance(params, tuple | list) and len({x.shape[-1] for x in states}) == 1  # not packed, no projections
        if not own or (rest[2] and rest[3]) or torch.is_autocast_enabled("cpu"):  # dropout is refused as random
            return whole(input, hx, params, *rest)
        has_biases, layers, _, _, bidirectional, batch_first = rest
        each, sides = 4 if has_biases else 2, 2 if bidirectional else 1
        x = input.transpose(0, 1) if batch_first else input
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            sweeps: list[Tensor] = []
            for n in range(layer * sides, (layer + 1) * sides):
                into, again, *biases = params[n * each : (n + 1) * each]
                (b, b_again), now = biases or (None, None), tuple(state[n] for state in states)
                read = torch.nn.functional.linear(x, into, b)
                steps: list[Tensor] = []
                for at in range(len(x)) if n % sides == 0 else reversed(range(len(x))):
                    now = cell(read[at], torch.nn.functional.linear(now[0], again, b_again), *now)
                    steps.append(now[0])
                sweeps.append(torch.stack(steps if n % sides == 0 else steps[::-1]))
                ends.append(now)
            x = torch.cat(sweeps, -1) if bidirectional else sweeps[0]
        last = (torch.stack(one) for one in zip(*ends, strict=True))
        return x.transpose(0, 1) if batch_first else x, *last

    return run


def _lstm_cell(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + y).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
    (r, z, n), (r_again, z_again, n_again) = x.chunk(3, -1), y.chunk(3, -1)
    n = (n + (r + r_again).sigmoid() * n_again).tanh()
    return ((h - n) * (z + z_again).sigmoid() + n,)


_bagged = torch.nn.functional.embedding_bag


def _embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Bags that are rows (..., n): looked up, and summed, averaged, or the largest of each, without what is padding."""
    w = per_sample_weights
    is_refused = w is not None and (mode != "sum" or w.shape != input.shape or w.dtype != weight.dtype)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    if input.ndim == 1 and offsets is not None and max_norm is None and not is_refused:
        kind, none = ("sum", "mean", "max").index(mode), -1 if padding is None else padding
        return bags(weight, input, offsets, False, kind, False, w, include_last_offset, none)[0]
    if input.ndim != 2 or max_norm is not None or is_refused:
        return _bagged(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    found = torch.nn.functional.embedding(input, weight)
    kept = torch.ones_like(input, dtype=torch.bool) if padding is None else input != padding
    count = kept.sum(-1, keepdim=True)
    if mode == "max":
        largest = torch.where(kept[..., None], found, -torch.inf).max(-2).values
        return torch.where(count > 0, largest, 0.0)
    weights = kept.to(found.dtype) if per_sample_weights is None else kept * per_sample_weights
    total = (found * weights[..., None]).sum(-2)
    return total / count.clamp(min=1) if mode == "mean" else total


def _once(join: Callable[..., Tensor], thick: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Tensor]:
    """[b] * n, joined: b so often. thick: what is done to each before."""

    def joined(tensors: Sequence[Tensor], dim: int = 0, **rest: Any) -> Tensor:
        first = tensors[0] if len(tensors) else None
        if rest or first is None or any(x is not first for x in tensors):
            return join(tensors, **rest) if thick is torch.atleast_2d else join(tensors, dim, **rest)
        x = thick(first)
        if join is torch.stack:
            dim %= x.ndim + 1
            return x.unsqueeze(dim).expand(*x.shape[:dim], len(tensors), *x.shape[dim:])
        return x.repeat([len(tensors) if k == dim % x.ndim else 1 for k in range(x.ndim)])

    return joined


_STATISTICS = [
    getattr(torch, n)
    for n in ("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit")
    if hasattr(torch, n)
]
_chunked: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)  # asks whether gradients are asked for


SPELLED: dict[Any, Callable[..., Any]] = {
    **{join: _once(join) for join in (torch.stack, torch.cat, torch.concat, torch.concatenate)},
    **{join: _once(join, torch.atleast_2d) for join in (torch.vstack, torch.row_stack)},
    **{f: _first_moves(f) for f in _STATISTICS},
    _bagged: _embedding_bag, _chunked: lambda *given, options=None, **named: _chunked(*given, **named),
    torch.linalg.lstsq: _lstsq, torch.linalg.solve_ex: _solve_ex,
    torch.nn.functional.gaussian_nll_loss: _gaussian_nll, torch.cov: _cov,
    Tensor.cov: _cov, torch.corrcoef: _corrcoef, Tensor.corrcoef: _corrcoef, torch.combinations: _combinations,
    Tensor.fill_diagonal_: _fill_diagonal, torch.vander: _vander, torch.rrelu: _rrelu,
    torch.lstm: _recurrent(torch.lstm, _lstm_cell), torch.gru: _recurrent(torch.gru, _gru_cell),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, lambda x, y, h: ((x + y).tanh(),)),
    torch.rnn_relu: _recurrent(torch.rnn_relu, lambda x, y, h: ((x + y).relu(),)),
    torch.fake_quantize_per_tensor_affine: _fake_quantize,
    torch.fake_quantize_per_channel_affine: _fake_quantize_channels,
}  # fmt: skip


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """As torch: its mean and deviation are of single precision at least."""
    axes = tuple(range(-len(normalized_shape), 0))
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    apart = wide - wide.mean(axes, keepdim=True)
    normed = apart * (apart.square().mean(axes, keepdim=True) + eps).rsqrt()
    scaled = normed if weight is None else normed * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def _instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return torch.instance_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False)
    normed = _layer_norm(input, input.shape[2:], None, None, eps)
    shape = [-1, *(1 for _ in input.shape[2:])]
    scaled = normed if weight is None else normed * weight.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)


# Functions that torch (2.13) differentiates twice (_weight_norm) or thrice (layer_norm, instance_norm) wrongly, or
# twice not at all.
TWICE: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    torch.cdist: cdist,
    torch.layer_norm: _layer_norm,
    torch.nn.functional.layer_norm: _layer_norm,
    torch.nn.functional.instance_norm: _instance_norm,
    _bagged: _embedding_bag,
}


class differentiable_twice(TorchFunctionMode):
    """Run what torch cannot differentiate twice or thrice by its definition; attention unfused, whoever calls it."""

    def __enter__(self) -> Self:
        self.unfused = sdpa_kernel(SDPBackend.MATH)
        self.unfused.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.unfused.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (TWICE.get(func) or func)(*args, **(kwargs or {}))

"""How heads in a row are fitted to a weighted set of rows: least squares, L-BFGS, or Adam on mini-batches.

    minimise   sum_r w_r loss_r / sum_r w_r  +  alpha / (2 sum_r w_r) |weights|^2         (biases are not penalised)

Legend: x (R, m) rows, y (R, ...) targets, w (R,) how often each row counts, n outputs, D features, alpha weight decay.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from dualform.functions.head import Head, HeadConfig
from dualform.functions.multilinear import Features
from dualform.models.descent import descended

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs (R, n), targets (R, ...) -> (R,)

# Rows are taken through the network in pieces of about so many features, so that memory does not grow with the rows.
_piece = 2**24
_drawing = Lock()  # heads draw their first weights from torch's global generator, which is lent and given back


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(-1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus the log-likelihood of the class; one output is the log-odds of the second of two classes."""
    if outputs.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs), reduction="none")
    return F.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class WeightedRows:
    """A weighted set of rows."""

    x: Tensor
    y: Tensor
    w: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | Sequence[int]) -> WeightedRows:
        return WeightedRows(self.x[index], self.y[index], self.w[index])

    def pieces(self, size: int) -> list[WeightedRows]:
        parts = (self.x.split(size), self.y.split(size), self.w.split(size))
        return [WeightedRows(x, y, w) for x, y, w in zip(*parts, strict=True)]


def merged(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge equal rows, adding their weights, drop weightless ones, and sort by value.

    A row of weight two and the row written twice become the same set, bit for bit, and so the same model; rows in
    other units come in the same order, and so fall into the same folds.
    """
    x, y, w = x[w > 0] + 0.0, y[w > 0], w[w > 0]  # + 0.0: minus zero is zero
    cells = np.concatenate([x, y.reshape(len(y), -1).astype(np.float64)], 1)
    order = np.lexsort(cells.T[::-1])
    cells = cells[order]
    is_new = np.concatenate([[True], (cells[1:] != cells[:-1]).any(1)])[: len(cells)]
    first = order[is_new]
    return x[first], y[first], np.bincount(is_new.cumsum() - 1, weights=w[order], minlength=len(first))


class Network(nn.Sequential):
    """Heads in a row. It is pickled as what it is, its configurations and its numbers."""

    heads: tuple[HeadConfig, ...]

    def __init__(self, heads: Sequence[HeadConfig], seed: int, dtype: torch.dtype) -> None:
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(*(config.build() for config in heads))
        self.heads = tuple(heads)
        self.to(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.heads, {name: value.cpu().numpy() for name, value in self.state_dict().items()})

    def forward(self, input: Tensor, kappa: Features | None = None) -> Tensor:
        """Return the outputs of rows; kappa: the first head's features of them, where they are known."""
        for head in self:
            input, kappa = head(input, kappa), None
        return input

    @property
    def piece(self) -> int:
        """How many rows go through at once."""
        return max(1, _piece // max(head.D for head in self if isinstance(head, Head)))

    def decayed(self) -> Tensor:
        """Return 1 for every number that decays, 0 for the biases, in the order of `flat`."""
        named = self.named_parameters()
        return torch.cat([torch.full_like(p, not name.endswith("bias")).detach().flatten() for name, p in named])

    def flat(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def load(self, vector: Tensor) -> None:
        nn.utils.vector_to_parameters(vector.clone(), self.parameters())

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        return torch.cat([self(part) for part in x.split(self.piece)])

    @torch.no_grad()
    def losses(self, rows: WeightedRows, loss: Loss) -> Tensor:
        """Return each row's part of the mean loss, times the number of rows."""
        return loss(self.outputs(rows.x), rows.y) * (rows.w / rows.w.mean())

    def loss(self, rows: WeightedRows, loss: Loss) -> float:
        return float(self.losses(rows, loss).mean())


def _restored(heads: tuple[HeadConfig, ...], state: dict[str, np.ndarray]) -> Network:
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    network = Network(heads, 0, next(value.dtype for value in tensors.values() if value.is_floating_point()))
    network.load_state_dict(tensors)
    return network


class Stop(Exception):
    """Training is over: the held-out loss no longer falls."""


@dataclass
class Watch:
    """What is told after every iteration: it keeps the curves, prints them, and stops a run that no longer improves.

    `patience` counts on the held-out loss; or on the loss itself where `on_training`, which stops nothing: Adam's goes
    up and down.
    """

    held_out: WeightedRows | None = None
    patience: int = 10
    tol: float = 1e-5
    label: str = ""
    every: int = 0  # print each so many iterations; 0 is never
    on_training: bool = False

    def __post_init__(self) -> None:
        self.converged = False
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.best: Tensor | None = None  # the weights of the least held-out loss
        self.least, self.idle = math.inf, 0

    def __call__(self, network: Network, value: float, loss: Loss) -> None:
        self.losses.append(value)
        said = f"{self.label}: iteration {len(self.losses)}, loss {value:.6g}"
        if self.held_out is not None:
            now = network.loss(self.held_out, loss)
            self.held_out_losses.append(now)
            said += f", held-out loss {now:.6g}"
            self._count(now)
            if now <= self.least:
                self.best = network.flat()
        elif self.on_training:
            self._count(value)
        if self.every and len(self.losses) % self.every == 0:
            print(said)
        if self.idle >= self.patience and not self.on_training:
            raise Stop

    def _count(self, now: float) -> None:
        better = math.isinf(self.least) or now < self.least - self.tol * abs(self.least)
        self.idle = 0 if better else self.idle + 1
        self.least = min(now, self.least)


class Costs:
    """What is minimised, and its gradient, of B networks of one kind, each with rows of its own.

    cost_b = sum_r w_br loss_br / sum_r w_br + alpha_b / (2 sum_r w_br) |weights_b|^2
    Shape:  points (B, P) -> costs (B,), gradients (B, P).
    What no weight changes, the first head's features, is computed once where the rows are one piece.
    """

    def __init__(self, network: Network, parts: Sequence[WeightedRows], loss: Loss, alphas: Sequence[float]) -> None:
        self.network, self.loss, self.like, self.is_one = network, loss, network.flat(), len(parts) == 1
        total = torch.stack([part.w.sum() for part in parts])
        decay = total.new_tensor(alphas) / total
        self.decay = (decay[:, None] * network.decayed()).double().cpu().numpy()
        first = cast("Head", network[0])
        shares = [WeightedRows(part.x, part.y, part.w / w) for part, w in zip(parts, total, strict=True)]
        self.pieces = shares[0].pieces(network.piece) if self.is_one else [_stacked(shares)]
        is_kept = len(self.pieces) == 1 and (self.is_one or first.is_matrix)
        self.kappas = [first.features(part.x) if is_kept else None for part in self.pieces]
        self.sizes = [p.numel() for p in network.parameters()]
        nn.utils.vector_to_parameters(self.like, network.parameters())  # they are views of it from here on

    def __call__(self, points: np.ndarray, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate networks `which`, one point each."""
        gradients = self.decay[which] * points
        values = 0.5 * (points * gradients).sum(1)
        theta = torch.from_numpy(points).to(self.like)
        for rows, kappa in zip(self.pieces, self.kappas, strict=True):
            found = self._one(theta[0], rows, kappa) if self.is_one else self._each(theta, rows, kappa, which)
            values, gradients = (x + y.double().cpu().numpy() for x, y in zip((values, gradients), found, strict=True))
        return values, gradients

    def _one(self, point: Tensor, rows: WeightedRows, kappa: Any) -> tuple[Tensor, Tensor]:
        self.like.copy_(point)
        cost = self.loss(self.network(rows.x, kappa), rows.y) @ rows.w
        parameters = list(self.network.parameters())
        found = torch.autograd.grad(cost, parameters, allow_unused=True, materialize_grads=True)
        return cost.detach(), torch.cat([g.flatten() for g in found])

    def _each(self, points: Tensor, rows: WeightedRows, kappa: Any, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        if len(which) < len(rows):
            rows, kappa = rows[which], None if kappa is None else kappa[which]
        points.requires_grad_()
        parts = zip(self.network.named_parameters(), points.split(self.sizes, 1), strict=True)
        weights = {name: part.unflatten(1, p.shape) for (name, p), part in parts}

        def cost(weights: dict[str, Tensor], x: Tensor, y: Tensor, w: Tensor, kappa: Any = None) -> Tensor:
            return self.loss(functional_call(self.network, weights, (x, kappa)), y) @ w

        costs = vmap(cost)(weights, rows.x, rows.y, rows.w, *() if kappa is None else (kappa,))
        return costs.detach(), torch.autograd.grad(costs.sum(), points)[0]


def _stacked(parts: Sequence[WeightedRows]) -> WeightedRows:
    """Lay sets of rows side by side, the shorter ones filled up with their first row, weightless."""
    longest = max(map(len, parts))
    index = [[*range(len(part)), *[0] * (longest - len(part))] for part in parts]
    full = [part[places] for part, places in zip(parts, index, strict=True)]
    for part, short in zip(full, parts, strict=True):
        part.w[len(short) :] = 0
    return WeightedRows(*(torch.stack([getattr(part, name) for part in full]) for name in ("x", "y", "w")))


def lbfgs(
    network: Network, rows: WeightedRows, loss: Loss, alpha: float, max_iter: int, tol: float, watch: Watch
) -> None:
    """Minimise over all rows at once, with curvature: for a few thousand rows this is both the fastest and the best."""
    start = network.flat()
    costs = Costs(network, [rows], loss, [alpha])

    def after(point: np.ndarray, value: float) -> None:
        costs.like.copy_(torch.from_numpy(point))
        watch(network, value, loss)

    try:
        found, watch.converged = descended(costs, start.double().cpu().numpy()[None], max_iter, tol, after)
        network.load(torch.from_numpy(found[0]).to(start))
    except Stop:
        watch.converged = True
    _finish(network, watch)


def held_out(
    network: Network, rows: WeightedRows, out: Tensor, loss: Loss, alphas: Sequence[float], max_iter: int, tol: float
) -> list[Tensor]:
    """Fit B times without some rows for each alpha; return these rows' parts of their mean loss, times their number.

    Shape:  out (B, R), which rows are left out -> for each alpha (B, R), 0 for the rows that are not.
    All at once where no row sees another and numbers are few: such fits are mostly calls.
    """
    start, parts = network.flat(), [rows[~part] for part in out]
    cases = [(alpha, k) for alpha in alphas for k in range(len(out))]
    first, ends = start.double().cpu().numpy()[None], list[np.ndarray]()
    heads = cast("list[Head]", list(network))
    few = len(rows) * len(cases) * sum(head.D for head in heads) <= _piece
    if few and len(cases) > 1 and all(head.expansion.batchwise for head in heads):
        with contextlib.suppress(RuntimeError):  # vmap cannot map an expansion or a psi of one's own
            costs = Costs(network, [parts[k] for _, k in cases], loss, [alpha for alpha, _ in cases])
            ends, _ = descended(costs, first.repeat(len(cases), 0), max_iter, tol)
    losses = [torch.zeros(out.shape, dtype=rows.w.dtype, device=rows.w.device) for _ in alphas]
    for i, (alpha, k) in enumerate(cases):
        end = ends[i] if len(ends) else descended(Costs(network, [parts[k]], loss, [alpha]), first, max_iter, tol)[0][0]
        network.load(torch.from_numpy(end).to(start))
        losses[i // len(out)][k, out[k]] = network.losses(rows[out[k]], loss)
    network.load(start)
    return losses


def adam(
    network: Network, rows: WeightedRows, loss: Loss, alpha: float, max_iter: int, watch: Watch,
    *, batch: int, rate: float, generator: torch.Generator, state: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pass over the rows in mini-batches, max_iter times at most; the state returned goes on where this leaves off."""
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    if state is not None:
        optimiser.load_state_dict(state)
    total = float(rows.w.sum())
    decayed = [p for name, p in network.named_parameters() if not name.endswith("bias")]
    try:
        for _ in range(max_iter):
            seen = 0.0
            for index in torch.randperm(len(rows), generator=generator).to(rows.x.device).split(batch):
                part = rows[index]
                cost = (loss(network(part.x), part.y) * part.w).sum() / part.w.sum()
                optimiser.zero_grad()
                penalty = alpha / (2 * total) * sum((p.square().sum() for p in decayed), cost.new_zeros(()))
                (cost + penalty).backward()
                optimiser.step()
                seen += float(cost.detach() * part.w.sum()) + float(penalty.detach() * part.w.sum())
            watch(network, seen / total, loss)
        watch.converged = watch.idle >= watch.patience
    except Stop:
        watch.converged = True
    _finish(network, watch)
    return optimiser.state_dict()


def _finish(network: Network, watch: Watch) -> None:
    if watch.best is not None:
        network.load(watch.best)
    network.zero_grad(set_to_none=True)


_widest = 2000  # the smaller side of the largest matrix that is decomposed


def is_linear(head: Head, num_rows: int) -> bool:
    """Is the output linear in the weights, one column per feature, and the problem small enough to solve at once?"""
    plain = head.channels == 1 and head.fusion.is_plain and head.config.reconciliation.name == "identity"
    r = head.remainder
    linear = r.kind != "linear" or r.inside or r.activation == "identity"
    columns = head.D + (head.m if r.kind == "linear" else 0)
    return plain and linear and head.bias is not None and min(num_rows, columns) <= _widest and columns <= 2 * 10**4


@torch.no_grad()
def least_squares(head: Head, rows: WeightedRows, alpha: float | None) -> list[float]:
    """Solve for all weights of a linear head; alpha=None: for each target the one of least leave-one-out error.

    With columns of unit variance, A = U S V^T: fitted = U s^2 / (s^2 + alpha) U^T y; a row left out errs e / (1 - h).
    """
    share = (rows.w / rows.w.sum())[:, None]
    learnt = head.remainder.kind == "linear"
    columns = head.expansion(rows.x)
    if learnt:
        columns = torch.cat([columns, head.remainder.linear_part(rows.x)], -1)
    targets = rows.y
    if not (learnt or head.remainder.is_zero):
        targets = targets - head.remainder(rows.x, head.n)
    mean, middle = (share * columns).sum(0), (share * targets).sum(0)
    scale = (share * (columns - mean).square()).sum(0).sqrt()
    flat = scale <= 1e-10 * (columns.abs().amax(0) + 1e-300)
    scale = torch.where(flat, torch.ones_like(scale), scale)
    root = rows.w.sqrt()[:, None]
    A, b = root * (columns - mean) / scale * ~flat, root * (targets - middle)
    U, s, Vt = torch.linalg.svd(A, full_matrices=False)
    along = U.mT @ b

    def left_out(a: float) -> Tensor:
        kept = s.square() / (s.square() + a)
        leverage = U.square() @ kept + share[:, 0]
        error = (b - U @ (kept[:, None] * along)) / (1 - leverage).clamp(min=1e-12)[:, None]
        return error.square().sum(0)

    if alpha is None:
        grid = [10.0 ** (k / 2) for k in range(12, -29, -1)]
        best = torch.stack([left_out(a) for a in grid]).argmin(0)
    else:
        grid, best = [alpha], torch.zeros(head.n, dtype=torch.long)
    alphas = torch.tensor(grid, dtype=s.dtype, device=s.device)[best]  # one per target
    shrunk = torch.where(s > s.max() * 1e-14, s, torch.zeros_like(s))[:, None] / (s.square()[:, None] + alphas)
    found = (Vt.mT @ (shrunk * along)).mT / scale
    assert head.bias is not None
    head.bias.copy_(middle - found @ mean)
    head.w.copy_(found[:, : head.D].flatten())
    if head.remainder_weight is not None:
        head.remainder_weight.copy_(found[:, head.D :])
    if head.remainder_bias is not None:
        head.remainder_bias.zero_()
    return alphas.tolist()


decays = (250.0, 50.0, 10.0, 2.0, 0.4, 0.08, 0.016, 3e-3, 1e-4, 1e-6)


def best_decay(score: Callable[[Sequence[float]], Sequence[Tensor]], start: float = 2.0) -> float:
    """Choose the largest decay that is not worse than the best by more than the error of that difference.

    score: decays -> for each the held-out loss of every row. From `start` to the nearest minimum along `decays`, then
    on to where mean(d) = std(d) / sqrt(R), d the rows' difference to the best, between two decays by interpolation:
    what is chosen moves little when the data do.
    """
    known: dict[int, Tensor] = {}

    def look(*places: int) -> None:
        new = [i for i in places if i not in known]
        known.update(zip(new, score([decays[i] for i in new]), strict=True))

    i, best = decays.index(start), -1
    while i != best:
        near = [j for j in (i, i - 1, i + 1) if 0 <= j < len(decays)]
        look(*near)
        best, i = i, min(near, key=lambda j: float(known[j].mean()))
    before = -1.0
    while i > 0:
        look(i - 1)
        difference = known[i - 1] - known[best]
        error = float(difference.std()) / math.sqrt(len(difference))
        worse = (float(difference.mean()) - error) / error if error > 0 else math.inf
        if not worse <= 0:  # NaN is worse
            share = 0.0 if not math.isfinite(worse) else -before / (worse - before)
            return decays[i] * (decays[i - 1] / decays[i]) ** share
        before, i = worse, i - 1
    return decays[0]


def folds(groups: Tensor | None, count: int, num_folds: int, generator: torch.Generator) -> Tensor:
    """Assign each of `count` rows to a fold, the classes in `groups` evenly."""
    order = torch.randperm(count, generator=generator)
    if groups is not None:
        order = order[groups.cpu()[order].argsort(stable=True)]
    fold = torch.empty(count, dtype=torch.long)
    fold[order] = torch.arange(count) % num_folds
    return fold

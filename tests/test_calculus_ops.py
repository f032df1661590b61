"""Functions as people write them: exact, and with their structure kept. A dense fallback among them is a bug.

Each stands for a group of ops of the issue's list; `stored` bounds the numbers kept,
as a share of the dense derivative.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.calculus import hessian, jacobian
from dualform.graphs import local_rules
from dualform.shapes import TraceError

torch.manual_seed(0)
IMAGE = torch.rand(2, 4, 6, 6, dtype=torch.float64) * 0.6 + 0.3
M = IMAGE[0, 0].clone()
V = M[0].clone()
P = M @ M.T + 6 * torch.eye(6, dtype=torch.float64)
CLASSES = torch.tensor([1, 2, 0, 1, 2, 3])
MASK = M > 0.5
ROW = MASK[0].clone()
SEEN = torch.eye(4).bool() | (torch.rand(4, 4) > 0.5)
LINE = IMAGE[:, :, 0].clone()
KERNEL = torch.rand(4, 2, 3, dtype=torch.float64)


class Held:
    """Numbers that an object holds."""

    at, ends, yes = torch.tensor(2), torch.tensor([1, 4]), torch.tensor(True)
    lengths, counts = torch.tensor([6, 5]), torch.tensor([2, 1])


WORDS = torch.tensor([[1, 2], [3, 0]])


def leaky(x: Tensor) -> Tensor:
    y = x - 0.5
    y[y <= 0] *= 0.2
    return y


def built(module: nn.Module) -> nn.Module:
    return module.double().eval()


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2] = 0.0
    y[1:, :2] += x[:-1, 1:3]
    y[y > 0.8] = 0.5
    y[torch.tensor([1, 3])] = x[0] * 2
    y.mul_(x).add_(1.0).clamp_(max=1.4)
    return y


bilinear = built(nn.Bilinear(6, 6, 3))
# What is to keep at most this share of the dense derivative's numbers: (share, function, argument).
FUNCTIONS: dict[str, tuple[float, Callable[[Tensor], Tensor], Tensor]] = {
    "conv1d": (0.1, built(nn.Conv1d(4, 3, 3, stride=2, padding=1, dilation=2)), LINE),
    "conv1d groups": (0.1, built(nn.Conv1d(4, 6, 2, groups=2)), LINE),
    "conv1d same": (0.1, built(nn.Conv1d(4, 2, 4, padding="same")), LINE),
    "conv1d circular": (0.1, built(nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular")), LINE),
    "conv1d reflect": (0.1, built(nn.Conv1d(4, 3, 3, padding=2, padding_mode="reflect")), LINE),
    "conv1d by weight": (0.3, lambda w: F.conv1d(LINE, w, groups=2, padding=1), KERNEL),
    "conv2d": (0.1, built(nn.Conv2d(4, 3, (2, 3), stride=(2, 1), padding=(1, 0))), IMAGE),
    "conv2d of itself": (0.9, lambda x: F.conv2d(x, x[:, :, :3, :3]), IMAGE[:1, :2, :4, :4].clone()),
    "conv3d": (0.2, built(nn.Conv3d(1, 2, 2)), IMAGE[:, None, :3, :3, :3].clone()),
    "transposed": (0.1, built(nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1)), IMAGE[:1, :, :3, :3].clone()),
    "max pool": (0.05, lambda x: F.max_pool2d(x, 2), IMAGE),
    "average pool": (0, lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
    "lp pool": (0.1, lambda x: F.lp_pool1d(x, 2, 2), LINE),
    "adaptive pool": (0.1, lambda x: F.adaptive_avg_pool2d(x, (3, 4)), IMAGE),
    "adaptive max": (0.05, lambda x: F.adaptive_max_pool1d(x, 4), LINE), "unfold": (0, lambda x: F.unfold(x, 2), IMAGE),
    "fold": (0, lambda x: F.fold(x.reshape(1, 4, 9), 4, 2), M), "windows": (0, lambda x: x.unfold(0, 3, 2), M),
    "group norm": (0.05, built(nn.GroupNorm(2, 4)), IMAGE), "layer norm": (0.2, built(nn.LayerNorm(6)), M),
    "rms norm": (0.2, built(nn.RMSNorm(6)), M), "batch norm": (0.01, built(nn.BatchNorm2d(4)), IMAGE),
    "instance norm": (0.05, built(nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "local response": (0.05, lambda x: F.local_response_norm(x, 2), IMAGE),
    "normalize": (0.2, lambda x: F.normalize(x, dim=-1), M),
    "normalize p": (0.2, lambda x: F.normalize(x, p=3, dim=0), M),
    "weight norm": (0.5, lambda x: torch._weight_norm(x, x[:, :1]), M), "softmax": (0.1, lambda x: x.softmax(0), M),
    "log softmax": (0.1, lambda x: F.log_softmax(x, -1), M), "softmin": (0.1, lambda x: F.softmin(x, -1), M),
    "glu": (0.1, F.glu, M), "prelu": (0.1, built(nn.PReLU(4)), IMAGE), "gelu": (0.1, F.gelu, M),
    "hardswish": (0.1, F.hardswish, M),
    "bilinear": (0.3, lambda x: bilinear(x, x.tanh()), M),
    "einsum": (0.1, lambda x: torch.einsum("ij,...jk->...ik", x, IMAGE), M),
    "cross entropy": (0.3, lambda x: F.cross_entropy(x, CLASSES, reduction="none"), M),
    "cross entropy "
    "smoothed": (0.3, lambda x: F.cross_entropy(x, CLASSES, weight=V, label_smoothing=0.1, reduction="none"), M),
    "cross entropy soft": (0.3, lambda x: F.cross_entropy(x, M.softmax(-1), reduction="none"), M),
    "cross entropy ignored": (1, lambda x: F.cross_entropy(x, CLASSES, ignore_index=1), M),
    "nll": (1, lambda x: F.nll_loss(x, CLASSES), M),
    "mse": (0.1, lambda x: F.mse_loss(x, M * 2, reduction="none"), M),
    "mse mean": (1, lambda x: F.mse_loss(x, M * 2), M),
    "huber": (0.1, lambda x: F.huber_loss(x, M * 2, reduction="none", delta=0.3), M),
    "smooth l1": (1, lambda x: F.smooth_l1_loss(x, M * 2), M),
    "l1": (1, lambda x: F.l1_loss(x, M * 2), M), "bce": (1, lambda x: F.binary_cross_entropy(x, M.sigmoid()), M),
    "bce logits": (1, lambda x: F.binary_cross_entropy_with_logits(x, M.sigmoid()), M),
    "kl": (0.1, lambda x: F.kl_div(x, M, reduction="none"), M),
    "cosine": (0.3, lambda x: F.cosine_similarity(x, M * 2 + 1), M),
    "distance": (0.3, lambda x: F.pairwise_distance(x, M * 2), M),
    "triplet": (1, lambda x: F.triplet_margin_loss(x, M, M * 2), M),
    "margin": (1, lambda x: F.margin_ranking_loss(x, M, M), M),
    "sort": (0.1, lambda x: x.sort(dim=0, descending=True)[0], M), "topk": (0.1, lambda x: x.topk(2)[0], M),
    "msort": (0.1, torch.msort, M),
    "kth": (0.1, lambda x: x.kthvalue(2)[0], M), "median": (0.1, lambda x: x.median(0)[0], M),
    "cummax": (0.1, lambda x: x.cummax(-1)[0], M),
    "max": (0.1, lambda x: x.max(0)[0], M), "aminmax": (0.3, lambda x: x.aminmax(dim=-1)[0], M),
    "amax": (0.3, lambda x: x.amax(-1), M),
    "max of two": (0.1, lambda x: torch.max(x, M * 2 - 0.5), M), "quantile": (0.3, lambda x: x.quantile(0.3, -1), M),
    "var mean": (0.3, lambda x: torch.var_mean(x, -1)[0], M), "std": (0.3, lambda x: x.std(0), M),
    "prod": (0.3, lambda x: x.prod(0), M),
    "norm 1": (0.3, lambda x: x.norm(p=1, dim=-1), M),
    "norm inf": (0.3, lambda x: torch.linalg.vector_norm(x, float("inf"), -1), M),
    "logsumexp": (0.3, lambda x: x.logsumexp(0), M), "cumsum": (0, lambda x: x.cumsum(0), M),
    "cumprod": (0.3, lambda x: x.cumprod(0), M),
    "logcumsumexp": (0.3, lambda x: x.logcumsumexp(-1), M), "renorm": (0.2, lambda x: x.renorm(2, 0, 1), M),
    "diff": (0, lambda x: x.diff(n=2, dim=0), M),
    "flip": (0, lambda x: x.flip(0, 1), M), "roll": (0, lambda x: x.roll((1, -2), (0, 1)), M),
    "rot90": (0, torch.rot90, M),
    "tril": (0, lambda x: x.tril(-1), M), "triu": (0, lambda x: x.triu(1), M),
    "diagonal": (0, lambda x: x.diagonal(1), M), "trace": (0, torch.trace, M),
    "diag embed": (0, lambda x: x.diag_embed(1), M), "tile": (0, lambda x: x.tile(2, 3), M),
    "repeat": (0, lambda x: x.repeat(2, 1, 2), M),
    "repeat interleave": (0, lambda x: x.repeat_interleave(2, 1), M), "steps": (0, lambda x: x[1::2, :-1:3], M),
    "cat": (0, lambda x: torch.cat([x, x * 2]), M),
    "stack": (0, lambda x: torch.stack([x, -x], 1), M), "hstack": (0, lambda x: torch.hstack([x, x[:, :2]]), M),
    "split": (0, lambda x: x.split([1, 5], 0)[1], M),
    "chunk": (0, lambda x: x.chunk(4, -1)[2], M), "tensor split": (0, lambda x: x.tensor_split(4)[1], M),
    "unbind": (0, lambda x: x.unbind(1)[-1], M),
    "pad": (0, lambda x: F.pad(x, (1, 2, -1, 0)), M),
    "pad reflect": (0.2, lambda x: F.pad(x, (2, 1), mode="reflect"), LINE),
    "pad replicate": (0.2, lambda x: F.pad(x, (2, 1), mode="replicate"), LINE),
    "pad circular": (0.2, lambda x: F.pad(x, (2, 1), mode="circular"), LINE),
    "broadcast": (0, lambda x: torch.broadcast_tensors(x, V)[0] + V[:, None], M[0]),
    "expand": (0, lambda x: x.expand(3, 6, 6), M[:1]),
    "movedim": (0, lambda x: x.movedim((0, 1), (2, 3)), IMAGE),
    "reshape": (0, lambda x: x.reshape(4, 9).T.reshape(12, 3), M),
    "unflatten": (0, lambda x: x.unflatten(1, (2, -1)), M),
    "pixel shuffle": (0, lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "meshgrid": (0, lambda x: torch.meshgrid(x, x * 2, indexing="ij")[0] * 1, V),
    "block diagonal": (0, lambda x: torch.block_diag(x, x * 2), M),
    "as strided": (0, lambda x: x.as_strided((3, 2), (1, 2)), M),
    "gather": (0.2, lambda x: x.gather(1, CLASSES[:, None].expand(6, 2)), M),
    "take along": (0.1, lambda x: x.take_along_dim(CLASSES[:, None], 1), M),
    "index": (0.1, lambda x: x[CLASSES, [0, 1, 2, 0, 1, -1]], M),
    "outer index": (0.1, lambda x: x[CLASSES[:3, None], CLASSES[None, 3:]], M),
    "index between": (0.1, lambda x: x[:, CLASSES, 1:, CLASSES], IMAGE[:, :, :, :4]),
    "mask": (0.1, lambda x: x[MASK], M), "masked select": (0.1, lambda x: x.masked_select(ROW), M),
    "index select": (0.1, lambda x: x.index_select(1, CLASSES), M),
    "embedding": (0.1, lambda x: F.embedding(CLASSES.reshape(2, 3), x), M),
    "scatter": (0.1, lambda x: torch.zeros_like(M).scatter(1, CLASSES[:, None], x[:, :1]), M),
    "scatter add": (0.1, lambda x: torch.zeros_like(M).scatter_add(0, CLASSES[:, None].expand(6, 6), x), M),
    "index add": (0.1, lambda x: x.index_add(0, CLASSES, x), M),
    "index copy": (0.1, lambda x: x.index_copy(0, torch.tensor([2, 0]), x[:2] * 2), M),
    "where": (0.1, lambda x: torch.where(MASK, x, x * x), M),
    "masked fill": (0.1, lambda x: x.masked_fill(MASK, 0.0), M), "in place": (1, written, M),
    "attention": (1, lambda x: F.scaled_dot_product_attention(x, x, M), M),
    "causal": (0.5, lambda x: F.scaled_dot_product_attention(x, LINE, LINE, is_causal=True), LINE),
    "grouped queries": (0.9, lambda x: F.scaled_dot_product_attention(IMAGE, x, x, enable_gqa=True), IMAGE[:, :2].clone()),
    "masked attention": (0.5, lambda x: F.scaled_dot_product_attention(x, LINE, LINE, SEEN), LINE),
    "multihead": (0.5, lambda x: attend(x, x, x, need_weights=False)[0], LINE),
    "encoder layer": (1, built(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), LINE[:, :2].clone()),
    "gru": (0.3, built(nn.GRUCell(6, 5)), M), "lstm": (0.3, lambda x: remember(x)[0], M),
    "interpolate": (0.1, lambda x: F.interpolate(x, scale_factor=2), LINE),
    "bilinear resize": (0.1, lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), IMAGE[:1, :2].clone()),
    "kron": (0.1, lambda x: torch.kron(x, M[:2]), M),
    "tensordot": (0.1, lambda x: torch.tensordot(x, IMAGE, dims=([1], [3])), M),
    "inner": (0.1, lambda x: torch.inner(x, M), M), "addmm": (0.1, lambda x: torch.addmm(x, M, M), M),
    "inverse": (0.1, torch.linalg.inv, P), "solve": (0.1, lambda x: torch.linalg.solve(x, M), P),
    "triangular": (0.1, lambda x: torch.linalg.solve_triangular(x, M, upper=False), P),
    "cholesky": (0.2, torch.linalg.cholesky, P), "slogdet": (1, lambda x: torch.linalg.slogdet(x)[1], P),
    "det": (1, torch.linalg.det, P), "multi dot": (0.1, lambda x: torch.linalg.multi_dot([M, x, M]), M),
    "cdist": (0.3, lambda x: torch.cdist(x, M * 3 + 1), M), "power": (1, lambda x: torch.linalg.matrix_power(x, 3), M),
    "cross": (0.2, lambda x: torch.linalg.cross(x[:, :3], x[:, 3:]), M),
    "covariance": (0.4, torch.cov, M),
    "weighted covariance": (0.4, lambda x: torch.cov(x, correction=0, aweights=V, fweights=CLASSES + 1), M),
    "correlation": (0.7, torch.corrcoef, M),
    "variance of one": (1, torch.cov, V), "combinations": (0.4, lambda x: torch.combinations(x, 2), V),
    "with replacement": (0.5, lambda x: torch.combinations(x, 2, True), V),
    "powers of one": (0.2, torch.linalg.vander, V),
    "bag mean": (0.1, lambda x: F.embedding_bag(CLASSES.reshape(2, 3), x), M),
    "bag sum": (0.1, lambda x: F.embedding_bag(CLASSES, x, torch.tensor([0, 2, 2]), mode="sum", padding_idx=1), M),
    "bag weights": (1, lambda w: F.embedding_bag(CLASSES[:6].reshape(2, 3), M, mode="sum", per_sample_weights=w), M[:2, :3].clone()),
    "masked scatter": (0.1, lambda x: torch.zeros_like(M).masked_scatter(MASK, x), M),
    "scatter sum": (0.1, lambda x: M.scatter_reduce(0, CLASSES[:, None].expand(6, 6), x, "sum"), M),
    "scatter mean": (0.1, lambda x: M.scatter_reduce(0, CLASSES[:, None].expand(6, 6), x, "mean", include_self=False), M), "rrelu": (0.1, lambda x: F.rrelu(x - 0.5), M),
    "cholesky solve": (0.1, lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(P)), M),
    "cholesky solve by L": (0.2, lambda x: torch.cholesky_solve(M, torch.linalg.cholesky(x)), P),
    "pinv": (0.5, torch.linalg.pinv, IMAGE[:, 0, :3, :2].clone()),
    "matrix exp": (0.5, torch.matrix_exp, IMAGE[:, 0, :3, :3].clone()),
    "svd": (0.5, lambda x: torch.linalg.svd(x, full_matrices=False)[1], IMAGE[:, 0, :3, :2].clone()),
    "eigh": (0.5, lambda x: torch.linalg.eigh(x @ x.mT)[0], IMAGE[:, 0, :3, :3].clone()),
    "qr": (0.5, lambda x: torch.linalg.qr(x)[0], IMAGE[:, 0, :3, :2].clone()),
    "eigenvalues": (0.2, torch.linalg.eigvalsh, P), "singular values": (0.5, torch.linalg.svdvals, M[:, :4].clone()),
    "eigenvalues of many": (0.2, torch.linalg.eigvalsh, torch.stack([P, P + M + M.T])),
    "by rows": (0.1, lambda x: torch.vmap(lambda r: (M @ r).sin())(x), M),
    "by columns": (0.1, lambda x: torch.vmap(lambda r, s: r * s, (1, None), 1)(x, x[0]), M),
    "by entries": (0.1, lambda x: torch.vmap(torch.vmap(torch.sin))(x), M),
    "gradients by rows": (0.1, lambda x: torch.vmap(torch.func.grad(lambda r: (r**3).sum()))(x), M),
    "solved by rows": (0.2, lambda x: torch.vmap(lambda r: torch.linalg.solve(P, r))(x), M),
    "flip of no axis": (0, lambda x: x.flip(()), M),
    "flip of all, then of none": (0, lambda x: x.flip((0, 1)).flip(()), M),
    "flip of one, then of none": (0, lambda x: x.flip(0).flip(()), V),
    "strided inside": (0, lambda x: x.as_strided((2, 2), (1, 2)), torch.arange(20.0, dtype=torch.float64)[5:15]),
    "strided of a part": (0, lambda x: (2 * x)[3:].as_strided((2, 2), (1, 1)), V),
    "repeat of no axis": (0, lambda x: x.sum().repeat(()), V), "mean of a number": (0, lambda x: x.sum().mean(-1), V),
    "tensordot, one with many": (1, lambda x: torch.tensordot(x, IMAGE[:, :1, 0, :3], ([0, 1], [2, 0])), M[:1, :1].clone()),
    "tensordot, many with one": (0.2, lambda x: torch.tensordot(x, M[:1, :1], ([0, 1], [0, 1])), M),
    "crop and wrap": (0.2, lambda x: F.pad(x, (-1, 2), mode="circular"), LINE),
    "crop and mirror": (0.2, lambda x: F.pad(x, (-1, 2), mode="reflect"), LINE),
    "rows by a held number": (0, lambda x: x.narrow(1, Held.at, 2), M),
    "row of a held number": (0, lambda x: x[Held.at], M), "one of one": (0, lambda x: x.sum().index_select(0, CLASSES[2:3]), M),
    "masked number": (0, lambda x: x.sum().masked_select(Held.yes), M),
    "nan quantile": (1, lambda x: x.nanquantile(0.3, 0), M), "gaussian nll": (0.1, lambda x: F.gaussian_nll_loss(x, M, M + 1, reduction="none"), M),
    "nearest": (0.5, lambda x: torch.linalg.lstsq(M[:, :4], x).solution, M),
    "nearest by A": (1, lambda x: torch.linalg.lstsq(x, M[:, 0]).solution, M[:, :3].clone()),
    "leaky": (0.1, lambda x: leaky(x), M), "where a constant is": (0.1, lambda x: x[M > 0.5], M),
    "norm in training": (0.5, nn.BatchNorm1d(6, track_running_stats=False).double(), M),
    "all dropped": (0, lambda x: F.dropout(x, 1.0), M), "norm with statistics": (0.2, lambda x: torch.native_layer_norm(x, [6], None, None, 1e-5)[0], M),
    "lu": (0.5, lambda x: torch.linalg.lu(x)[2], IMAGE[:, 0, :3, :3].clone()),
}  # fmt: skip
attend = built(nn.MultiheadAttention(6, 2, batch_first=True))
remember = built(nn.LSTMCell(6, 5))


# torch 2.11 cannot trace its quantile, which compares its own argument's values with 0 and 1; and it has no derivative
# of aminmax, where ours is compared with that of the same values.
UNTRACEABLE = {"quantile"} if torch.__version__.startswith("2.11.") else set()
DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {"aminmax": lambda x: x.amin(-1)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_exact_and_keeps_its_structure(name: str) -> None:
    share, f, x = FUNCTIONS[name]
    if name in UNTRACEABLE:
        with pytest.raises(TraceError, match="reads a tensor's values"):
            jacobian(f, x)
        return
    local_rules._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        J = jacobian(f, x)
        found = J.dense()
    assert not [str(w.message) for w in caught if "derivative row" in str(w.message)]
    expected = torch.func.jacrev(DIFFERENTIABLE.get(name, f), chunk_size=1)(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert J.nbytes <= share * J.dense_nbytes
    g = torch.rand_like(f(x))
    torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), rtol=1e-10, atol=1e-10)
    assert pickle.loads(pickle.dumps(J)).structure == copy.deepcopy(J).structure == J.structure


DENSE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "as_strided_scatter": (lambda x: torch.as_strided_scatter(M, x, (2, 2), (1, 2)), M[:2, :2].clone()),
    "put": (lambda x: x.put(CLASSES[:2], V[:2]), M),
    "multilabel_margin_loss_forward": (
        lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 2, -1, 0, 0, 0]] * 6)),
        M,
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_has_no_structured_rule_is_exact_and_says_so(name: str) -> None:
    f, x = DENSE[name]
    local_rules._warned.clear()
    with pytest.warns(UserWarning, match=f"aten::{name} has no derivative row"):
        found = jacobian(f, x).dense()
    torch.testing.assert_close(found, torch.func.jacrev(f, chunk_size=1)(x), rtol=1e-10, atol=1e-10)


# What torch.func cannot map, though autograd takes it.
UNMAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "ctc": lambda x: F.ctc_loss(x[:, None].log_softmax(-1).expand(6, 2, 6), WORDS, Held.lengths, Held.counts, reduction="none"),
    "ctc mean": lambda x: nn.CTCLoss(zero_infinity=True)(x[:, None].log_softmax(-1), WORDS[:1], (6,), (2,)),
    "ctc of one": lambda x: F.ctc_loss(x.log_softmax(-1), WORDS[0], torch.tensor(6), torch.tensor(2)),
    "ctc that cannot be": lambda x: F.ctc_loss(x.log_softmax(-1), WORDS[0], (1,), (2,), reduction="sum", zero_infinity=True),
    "cut at held places": lambda x: torch.cat([p.cumsum(0) for p in x.tensor_split(Held.ends)]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMAPPED)
def test_what_transforms_cannot_take_is_exact(name: str) -> None:
    f = UNMAPPED[name]
    expected: Any = torch.autograd.functional.jacobian(f, M)
    for _ in range(2):
        J = jacobian(f, M)
        g = torch.rand(J.out_shape, dtype=M.dtype)
        torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(J.vjp(g), torch.tensordot(g, expected, g.ndim), rtol=1e-10, atol=1e-10)


def test_what_torch_keeps_beside_a_norm_has_no_gradient() -> None:
    for f in (
        lambda x: torch.cat([y.reshape(-1) for y in torch.native_layer_norm(x, [6], None, None, 1e-5)]),
        lambda x: torch.cat(
            [y.reshape(-1) for y in torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)]
        ),
        lambda x: torch.cat([y.reshape(-1) for y in torch.linalg.lstsq(x[:, :3], M, driver="gelsd")[::3]]),
    ):
        expected = torch.autograd.functional.jacobian(f, M)
        torch.testing.assert_close(jacobian(f, M).dense(), expected, rtol=1e-10, atol=1e-10)


def test_a_norm_that_keeps_statistics_is_told_how_not_to() -> None:
    with pytest.raises(TraceError, match=r"BatchNorm1d.*writes to.*Build it with track_running_stats=False"):
        jacobian(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double(), M)
    with pytest.raises(TraceError, match="the second derivative of ctc_loss, which torch has none of"):
        hessian(lambda x: F.ctc_loss(x.log_softmax(-1), WORDS[0], (6,), (2,)), M).dense()


def test_arguments_that_nobody_differentiates_by_may_be_compared() -> None:
    t = M - 0.5

    def picked(x: Tensor, t: Tensor) -> Tensor:
        return x[t > 0] * (t[t > 0].exp() if t.sum() > 0 else 3.0)

    for other in (t, -t, t * 2, ~t.isnan() * t):
        expected = torch.autograd.functional.jacobian(lambda x: picked(x, other), M)  # noqa: B023
        torch.testing.assert_close(jacobian(picked, M, other).dense(), expected, rtol=1e-12, atol=1e-12)
    cubes = hessian(lambda x, t: (x[t > 0] ** 3).sum(), M, t)
    torch.testing.assert_close(
        cubes.dense().reshape(36, 36), (6 * M * (t > 0)).flatten().diag(), rtol=1e-12, atol=1e-12
    )
    for wrt in (1, (0, 1)):
        with pytest.raises(TraceError, match="reads a tensor's values"):
            jacobian(picked, M, t, wrt=wrt)


PICKED: dict[str, Callable[[Tensor], Tensor]] = {
    "x[x > c]": lambda x: x[x > 0.5],
    "of more": lambda x: (x * 2).sin()[x.exp() + x > 1.9] ** 3,
    "masked_select": lambda x: torch.masked_select(x * x, x.gt(0.4)),
    "nonzero": lambda x: x.flatten()[(x > 0.5).flatten().nonzero()[:, 0]],
    "where": lambda x: x[torch.where(x * x < 0.3)] * 2,
    "softmax of the picked": lambda x: x[x > 0.3].softmax(0),
    "rows": lambda x: x[x.sum(1) > 3.0] @ x.mT,
    "sum": lambda x: x[x > 0.5].square().sum(),
    "none": lambda x: x[x > 7.0],
    "written": lambda x: torch.masked_scatter(x, x > 0.5, x.cos()),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKED)
def test_a_mask_of_what_moves_is_the_mask_at_the_point(name: str) -> None:
    """It moves in steps. The same function elsewhere has another mask, and a graph of its own."""
    f = PICKED[name]
    for x in (M, 1 - M, M * 1.1, M):
        expected = (
            torch.autograd.functional.jacobian(f, x) if (out := f(x)).numel() else x.new_zeros(*out.shape, *x.shape)
        )
        torch.testing.assert_close(jacobian(f, x).dense(), expected, rtol=1e-12, atol=1e-12)
        second = torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x)
        torch.testing.assert_close(hessian(lambda x: f(x).square().sum(), x).dense(), second, rtol=1e-11, atol=1e-11)
    assert "against autograd's vjp: max error" in str(jacobian(f, M).explain())


@pytest.mark.parametrize(
    "f", [lambda x: x * x.max().item(), lambda x: x if (x > 0).any() else -x, lambda x: torch.unique(x)]
)
def test_numbers_and_branches_by_what_moves_are_refused(f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match="reads a tensor's values"):
        jacobian(f, M)


def test_masks_and_lengths_among_the_arguments_are_constants() -> None:
    def f(x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([part.cumsum(0) for part in x[mask].split(lengths.tolist())])

    for mask in (MASK[:, 0], ~MASK[:, 0]):
        count = int(mask.sum())
        for lengths in (torch.tensor([1, count - 1]), torch.tensor([count - 1, 1])):
            J = jacobian(f, M, mask, lengths)
            expected = torch.func.jacrev(lambda x: f(x, mask, lengths), chunk_size=1)(M)  # noqa: B023
            torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10)

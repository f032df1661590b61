"""What a model is worth on held-out text: bits per byte, beside counting and gzip, and the loss at each position.

L row length; position p predicts token p + 1 from p + 1 tokens read.
"""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from dualform.learning.layer import TestTimeTraining
from dualform.train.data import Document, PackedRows
from dualform.train.warmup import set_rate_scale


@dataclass(frozen=True)
class Evaluation:
    """The mean loss in nats per token, in bits per byte, and by position; how much was read, how fast."""

    loss: float
    bits_per_byte: float
    num_bytes: int
    tokens_per_second: float
    loss_by_position: tuple[float, ...]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, rows: PackedRows, *, batch_size: int = 16, max_rows: int | None = None
) -> Evaluation:
    """Score every token of the rows once; each row starts with what the model knows at birth.

    loss = mean_t -ln p(x_t | x_<t), bits per byte = sum_t -ln p / (ln 2 * bytes); the ends of documents count as loss.
    Shape:  loss_by_position (L - 1,).
    Dtype:  logits are scored in float32 at least; sums in float64.
    Raises: as the model does.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    n = len(rows) if max_rows is None else min(max_rows, len(rows))
    # Spread the rows over the whole text when only some are read.
    chosen = Subset(rows, [i * len(rows) // n for i in range(n)])
    total = torch.zeros(rows.seq_len - 1, dtype=torch.float64)
    count = torch.zeros(rows.seq_len - 1, dtype=torch.float64)
    num_bytes, start = 0, time.perf_counter()
    for batch in DataLoader(chosen, batch_size=batch_size):
        batch = {name: x.to(device) for name, x in batch.items()}
        found = model(input_ids=batch["input_ids"], reset=batch["reset"], use_cache=False)
        logits = (found[0] if isinstance(found, tuple) else found.logits)[:, :-1]
        target = batch["labels"][:, 1:]
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100)
        total += loss.view_as(target).double().sum(0).cpu()
        count += (target != -100).sum(0).cpu()
        num_bytes += int((target > 2).sum())
    seconds = time.perf_counter() - start
    model.train(was_training)
    nats, tokens = float(total.sum()), float(count.sum())
    return Evaluation(
        loss=nats / tokens, bits_per_byte=nats / math.log(2) / num_bytes, num_bytes=num_bytes,
        tokens_per_second=n * rows.seq_len / seconds, loss_by_position=tuple((total / count.clamp(min=1)).tolist()),
    )  # fmt: skip


@contextmanager
def without_learning(model: torch.nn.Module) -> Iterator[None]:
    """Set the inner learning rate of every test-time layer to 0 for a while: what is left is what was learnt before."""
    scales = [m.get_buffer("rate_scale") for m in model.modules() if isinstance(m, TestTimeTraining)]
    before = [scale.clone() for scale in scales]
    set_rate_scale(model, 0.0)
    try:
        yield
    finally:
        for scale, value in zip(scales, before, strict=True):
            scale.copy_(value)


_AT_ONCE = 2**20  # bytes, of which each is eight while it is counted


def baselines(train: tuple[Document, ...], test: tuple[Document, ...], smoothing: float = 0.1) -> dict[str, float]:
    """Score the held-out text by counts of the training text, and by `gzip -9` of itself, in bits per byte.

    unigram: p(x) = (n_x + k) / (n + 256 k);   bigram: p(y | x) = (n_xy + k) / (n_x + 256 k)
    Dtype:  float64.
    """
    k = smoothing
    one, two = np.full(256, k), np.full((256, 256), k)
    for document in train:
        x = np.frombuffer(document.text, np.uint8)
        for start in range(0, len(x), _AT_ONCE):
            part = x[start : start + _AT_ONCE + 1]  # and the next
            one += np.bincount(part[:_AT_ONCE], minlength=256)
            two += np.bincount(part[:-1].astype(np.int64) * 256 + part[1:], minlength=65536).reshape(256, 256)
    one, two = np.log2(one / one.sum()), np.log2(two / two.sum(1, keepdims=True))
    texts = [np.frombuffer(document.text, np.uint8) for document in test]
    num_bytes = sum(map(len, texts))
    # The first byte of a document has no byte before it: the unigram scores it.
    bigram = sum(two[x[:-1], x[1:]].sum() + one[x[:1]].sum() for x in texts)
    packed = len(gzip.compress(b"".join(document.text for document in test), compresslevel=9, mtime=0))
    return {
        "unigram": float(-sum(one[x].sum() for x in texts) / num_bytes),
        "bigram": float(-bigram / num_bytes),
        "gzip -9": 8 * packed / num_bytes,
    }


def smoothed(losses: tuple[float, ...], width: int = 16) -> tuple[list[int], list[float]]:
    """Average a curve over windows of `width` positions; return their centres and means."""
    edges = range(0, len(losses), width)
    windows = [losses[i : i + width] for i in edges]
    return [i + len(w) // 2 for i, w in zip(edges, windows, strict=True)], [sum(w) / len(w) for w in windows]


def plot_loss_by_position(curves: dict[str, tuple[float, ...]], path: Path) -> Path:
    """Draw the loss at each position, one line per model, as a PNG."""
    from matplotlib.figure import Figure  # here: of the extra `viz`, and slow to import

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, losses in curves.items():
        axes.plot(*smoothed(losses), label=label, linewidth=1.8)
    axes.set(xlabel="position in the row (bytes read)", ylabel="held-out loss (nats per byte)")
    axes.set_title("Loss by position", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def terminal_plot(curves: dict[str, tuple[float, ...]], width: int = 60, height: int = 12) -> str:
    """Draw the same in characters, each curve with its name on it: without colours nothing else tells them apart."""
    import plotille  # here: of the extra `viz`

    figure = plotille.Figure()
    figure.width, figure.height = width, height
    figure.x_label, figure.y_label = "position", "nats"
    figure.set_x_limits(0, max(map(len, curves.values())))
    figure.x_ticks_fkt, figure.y_ticks_fkt = (lambda low, _: f"{low:.0f}"), (lambda low, _: f"{low:.3f}")
    for label, losses in curves.items():
        x, y = smoothed(losses)
        figure.plot(x, y)
        figure.text([x[len(x) // 2]], [y[len(y) // 2]], [label])
    return figure.show()

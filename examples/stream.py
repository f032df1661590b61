"""Put test-time training into a plain PyTorch transformer, and let it read a file of any length at constant memory.

    python examples/stream.py [--file FILE] [--tokens N] [--train FILE] [--steps N]

Tokens are bytes. Training reads its text as eight streams, 128 bytes at a time: the layers' state is carried over eight
steps and detached, so that the model learns to learn over a longer text than gradients go back. Then one stream is read
to the end, the state carried; beside it the same model whose state is thrown away every 256 bytes. Less than a minute
on two cores.
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualform as df

State = list[df.LayerState] | None  # one per layer; None at the beginning of a text


class Block(nn.Module):
    """A transformer's block with the attention taken out and a layer that learns put in."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in "ab")
        learner = df.learners.residual_norm(df.learners.Linear())
        rule = df.rules.SGD(lr=3.0, averaged=True)
        self.mixer = df.TestTimeTraining(dim, heads, learner=learner, rule=rule, share_qk=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor, state: df.LayerState | None) -> tuple[Tensor, df.LayerState]:
        y, state = self.mixer(self.norms[0](h), state)
        h = h + y
        return h + self.mlp(self.norms[1](h)), state


class Reader(nn.Module):
    """Predict the next byte. The only thing that is not as in any transformer: a state goes in and comes out."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 256))

    def forward(self, ids: Tensor, states: State = None) -> tuple[Tensor, list[df.LayerState]]:
        h, after = self.embed(ids), []
        for n, block in enumerate(self.blocks):
            h, state = block(h, None if states is None else states[n])
            after.append(state.detach())  # the next call starts from numbers, not from a graph
        return self.head(h), after


def train(model: Reader, text: bytes, steps: int, batch: int = 8, width: int = 128, carry: int = 8) -> float:
    """Read the text as `batch` streams side by side; return the last loss, in nats per byte.

    Every `carry` steps the state begins anew: a state carried through the whole training would never be what a fresh
    one is.
    """
    streams = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    length = len(streams) // batch
    streams = streams[: batch * length].view(batch, length).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    states, loss, at = None, torch.zeros(()), 0
    for step in range(steps):
        at = at if at + width + 1 <= length else 0
        states = states if step % carry and at else None
        ids = streams[:, at : at + width + 1]
        logits, states = model(ids[:, :-1], states)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        at += width
    return loss.item()


@torch.no_grad()
def read(model: Reader, file: BinaryIO, num_tokens: int, part: int = 256) -> Iterator[tuple[int, float, float]]:
    """Read a file part by part; yield (bytes read, loss of the part,
    its loss if the state is thrown away before it)."""
    states, before, done = None, b"", 0
    while done < num_tokens and (new := file.read(min(part, num_tokens - done))):
        ids = torch.frombuffer(bytearray(before + new), dtype=torch.uint8).long()[None]
        if ids.shape[1] > 1:
            target = ids[0, 1:]
            logits, states = model(ids[:, :-1], states)
            forgetful, _ = model(ids[:, :-1])
            yield done, *(float(F.cross_entropy(x[0], target)) for x in (logits, forgetful))
        before, done = new[-1:], done + len(new)


def memory() -> tuple[float, float]:
    """Return the process's resident memory, now and at its peak, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20 if statm.exists() else peak
    return now, peak


def texts(options: argparse.Namespace) -> tuple[bytes, BinaryIO]:
    """Return what to train on and what to read; the embedded plays if no file is named."""
    corpus = None
    if options.train is None or options.file is None:
        from dualform.train.data import load_corpus

        corpus = load_corpus("shakespeare")
    known = b"".join(d.text for d in corpus.train) if options.train is None else options.train.read_bytes()
    if options.file is None:
        return known, io.BytesIO(b"".join(d.text for d in corpus.test))
    return known, options.file.open("rb")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="read this (default: the two plays that are not trained on)")
    parser.add_argument("--tokens", type=int, default=2**15, help="bytes to read at most")
    parser.add_argument("--train", type=Path, help="train on this (default: the other plays)")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    known, file = texts(options)
    model = Reader()
    print(f"training: {options.steps} steps of 8 x 128 bytes", flush=True)
    loss = train(model, known, options.steps)
    print(f"loss {loss:.3f} nats per byte, {time.perf_counter() - start:.0f} s\n")

    print(f"{'bytes read':>19}  {'loss':>6}  {'state thrown away':>17}  {'memory now':>10}  {'peak':>8}")
    # Rows end where the number of bytes doubles: what is gained by reading on is gained early.
    first, edge, rows = 0, 1024, []
    peaks = []

    def tell(stop: int) -> None:
        mean = torch.tensor(rows).mean(0)
        now, peak = memory()
        peaks.append(peak)
        span = f"{first:,} to {stop:,}"
        print(f"{span:>19}  {mean[0]:6.3f}  {mean[1]:17.3f}  {now:6.0f} MiB  {peak:4.0f} MiB", flush=True)

    with file:
        for at, *losses in read(model, file, options.tokens):
            if at >= edge:
                tell(at)
                first, edge, rows = at, 2 * edge, []
            rows.append(losses)
        if rows:
            tell(file.tell())
    states = [layer.mixer(torch.zeros(1, 1, 64))[1] for layer in model.blocks]
    held = sum(x.numel() * x.element_size() for state in states for x in state.tensors().values())
    grown = peaks[-1] - peaks[0] if peaks else 0.0
    print(f"\nwhat is carried: {held / 2**10:.0f} KiB; the peak grew by {grown:.1f} MiB after the first {1024:,} bytes")
    print(f"time: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

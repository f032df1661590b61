"""`dualform bench cpu|gpu`: how fast the built-in learners run here, op by op and compiled, beside attention."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dualform.cli.output import AsJson, UsageError, Words, show
from dualform.learning.backends import BackendError
from dualform.learning.learners import learners
from dualform.learning.program import ChunkProgram, derive
from dualform.learning.rules import rules


class Machine(NamedTuple):
    """What runs: where, by which backend beside eager, in which type, and at which sizes if none are asked for."""

    device: str
    backend: str
    dtype: torch.dtype
    batch: int
    length: int
    heads: int


MACHINES = {
    "cpu": Machine("cpu", "cpp", torch.float32, 1, 1024, 4),
    "gpu": Machine("cuda", "triton", torch.bfloat16, 8, 2048, 12),
}


def bench(
    name: Literal["cpu", "gpu"], /, *, learner: Words = None, batch: int | None = None, length: int | None = None,
    dim: int = 64, heads: int | None = None, chunk: int = 16, rounds: int = 3, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Time a forward and backward pass of each learner, in milliseconds, the best of some rounds.

    Args:
        name: cpu: eager and generated C++, float32. gpu: eager and generated Triton, bfloat16.
        learner: Names of learners, or FILE.py:NAME; default all, each with its default options.
        batch: Sequences at once. Default 1 on a CPU, 8 on a GPU.
        length: Tokens of a sequence. Default 1024 on a CPU, 2048 on a GPU.
        dim: Width of a head.
        heads: Heads. Default 4 on a CPU, 12 on a GPU.
        chunk: Tokens of a mini-batch.
        rounds: Passes of each; the first, which compiles, is not counted.
        as_json: Print JSON instead of a table.
    """
    on = MACHINES[name]
    batch, length, heads = (
        own if given is None else given for own, given in zip(on[3:], (batch, length, heads), strict=True)
    )
    sizes = {"batch": batch, "length": length, "dim": dim, "heads": heads, "chunk": chunk, "rounds": rounds}
    for key, value in sizes.items():
        if value < 1:
            raise UsageError(f"bench: --{key} is {value}; expected a number >= 1.")
    if on.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("bench: gpu is asked for, and torch sees no CUDA device; expected one. Use `bench cpu`.")
    torch.manual_seed(0)
    with torch.device(on.device):
        q, k, v = (torch.randn(batch, length, heads, dim, dtype=on.dtype, requires_grad=True) for _ in range(3))
        rule = rules.SGD(lr=0.1, averaged=True)
        programs = {key: derive(learners.build(key)(dim), rule=rule, chunk=chunk) for key in learner or _alone()}
    milliseconds = partial(_milliseconds, rounds=rounds)
    rows = [{"learner": key} | compare(program, (q, k, v), on, milliseconds) for key, program in programs.items()]

    def attend() -> Tensor:
        Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)

    rows.append({"learner": "(attention)", "eager ms": milliseconds(attend, [q, k, v])})
    size = f"batch {batch}, {length} tokens, {heads} heads of {dim}, mini-batches of {chunk}"
    where = f"{torch.get_num_threads()} thread(s)" if on.device == "cpu" else torch.cuda.get_device_name()
    show(rows, f"forward + backward, {size}, {where}", as_json)


def _alone() -> list[str]:
    """Name the learners that need no option."""
    empty = inspect.Parameter.empty
    return [name for name in learners.names() if empty not in learners[name].options.values()]


def compare(
    program: ChunkProgram, qkv: tuple[Tensor, Tensor, Tensor], on: Machine,
    milliseconds: Callable[[Callable[[], Tensor], list[Tensor]], float],
) -> dict[str, Any]:  # fmt: skip
    """Time a program's two directions on each backend, and one large matrix product beside them."""
    leaves = [*qkv, *program.learner.parameters()]
    found: dict[str, Any] = {}
    for backend in ("eager", on.backend):
        try:
            found[f"{backend} ms"] = milliseconds(lambda b=backend: program(*qkv, backend=b)[0], leaves)
        except BackendError as error:
            return found | {"note": str(error)}
    taken = found[f"{on.backend} ms"]
    rate = 100 * _work(program, qkv[0]) / (taken / 1e3) / _matmul_rate(on)
    return found | {"times faster": found["eager ms"] / taken, "% of matmul rate": rate}


def _work(program: ChunkProgram, q: Tensor) -> float:
    """Multiplications and additions of matrix products in both directions."""
    batch, length, heads, _ = q.shape
    parts = program.schedule("cpp")
    return sum(part.flops for part in parts.values()) * batch * heads * length / program.chunk


def _milliseconds(run: Callable[[], Tensor], leaves: list[Tensor], rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        start = _now(leaves[0])
        torch.autograd.grad(run().sum(), leaves, allow_unused=True)
        found.append(1e3 * (_now(leaves[0]) - start))
    return min(found[1:])


def _now(x: Tensor) -> float:
    """Read the clock, once all is done that was launched."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _matmul_rate(on: Machine) -> float:
    """Measure multiplications and additions per second of one large product."""
    size = 768 if on.device == "cpu" else 8192
    a = torch.randn(size, size, device=on.device, dtype=on.dtype)
    found = []
    for _ in range(15):
        start = _now(a)
        torch.mm(a, a)
        found.append(_now(a) - start)
    return 2 * size**3 / min(found)

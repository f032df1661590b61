"""`dualform bench cpu`: how fast the built-in learners run here, op by op and compiled, beside attention."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from torch import Tensor

from dualform.cli.output import UsageError, show
from dualform.learning.backends import BackendError
from dualform.learning.learners import learners
from dualform.learning.program import ChunkProgram, derive
from dualform.learning.rules import rules

BACKENDS = ("eager", "cpp")


def bench(
    name: Literal["cpu"], /, *,
    learner: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None, batch: int = 1,
    length: int = 1024, dim: int = 64, heads: int = 4, chunk: int = 16, rounds: int = 3,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:  # fmt: skip
    """Time a forward and backward pass of each learner, in milliseconds, the best of some rounds.

    Parameters
    ----------
    name
        cpu.
    learner
        Names of learners; default all, each with its default options.
    batch
        Sequences at once.
    length
        Tokens of a sequence.
    dim
        Width of a head.
    heads
        Heads.
    chunk
        Tokens of a mini-batch.
    rounds
        Passes of each; the first, which compiles, is not counted.
    as_json
        Print JSON instead of a table.
    """
    sizes = {"batch": batch, "length": length, "dim": dim, "heads": heads, "chunk": chunk, "rounds": rounds}
    for key, value in sizes.items():
        if value < 1:
            raise UsageError(f"bench: --{key} is {value}; expected a number >= 1.")
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, dim, requires_grad=True) for _ in range(3))
    rule = rules.SGD(lr=0.1, averaged=True)
    programs = {key: derive(learners.build(key)(dim), rule=rule, chunk=chunk) for key in learner or _alone()}
    rows = [{"learner": key} | compare(program, (q, k, v), rounds) for key, program in programs.items()]

    def attend() -> Tensor:
        Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)

    rows.append({"learner": "(attention)", "eager ms": _milliseconds(attend, [q, k, v], rounds)})
    size = f"batch {batch}, {length} tokens, {heads} heads of {dim}"
    title = f"forward + backward, {size}, {torch.get_num_threads()} thread(s)"
    show(rows, title, as_json)


def _alone() -> list[str]:
    """Name the learners that need no option."""
    empty = inspect.Parameter.empty
    return [name for name in learners.names() if empty not in learners[name].options.values()]


def compare(program: ChunkProgram, qkv: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, Any]:
    """Time a program's two directions on each backend, and one large matrix product beside them."""
    leaves = [*qkv, *program.learner.parameters()]
    found: dict[str, Any] = {}
    for backend in BACKENDS:

        def run(backend: str = backend) -> Tensor:
            return program(*qkv, backend=backend)[0]

        try:
            found[f"{backend} ms"] = _milliseconds(run, leaves, rounds)
        except BackendError as error:
            return found | {"note": str(error)}
    work = _work(program, qkv[0])
    return found | {
        "times faster": found["eager ms"] / found["cpp ms"],
        "% of matmul rate": 100 * work / (found["cpp ms"] / 1e3) / _matmul_rate(),
    }


def _work(program: ChunkProgram, q: Tensor) -> float:
    """Multiplications and additions of matrix products in both directions."""
    batch, length, heads, _ = q.shape
    parts = program.schedule("cpp")
    return sum(part.flops for part in parts.values()) * batch * heads * length / program.chunk


def _milliseconds(run: Callable[[], Tensor], leaves: list[Tensor], rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        torch.autograd.grad(run().sum(), leaves, allow_unused=True)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found[1:])


def _matmul_rate() -> float:
    """Measure multiplications and additions per second of one large product."""
    a = torch.randn(768, 768)
    found = []
    for _ in range(15):
        start = time.perf_counter()
        torch.mm(a, a)
        found.append(time.perf_counter() - start)
    return 2 * 768**3 / min(found)

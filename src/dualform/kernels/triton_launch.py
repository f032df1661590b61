"""Load generated Triton, run it on tensors, compile it for cards that are not here."""

from __future__ import annotations

import hashlib
import linecache
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.kernels.triton_schedule import SCALARS, Argument, Kernel
from dualform.learning.backends import BackendError


class Missing(BackendError):
    """Triton is not there, or nothing that runs it."""


def triton_module() -> Any:
    """Import Triton."""
    try:
        import triton  # pyright: ignore[reportMissingImports]: with torch for CUDA; not at `import dualform`
    except ImportError as error:
        raise Missing(
            f"triton: the package is not installed ({error}); expected triton, which torch for CUDA brings. Install it, or use backend='auto'."
        ) from None
    return triton


def is_interpreted() -> bool:
    """Does Triton run kernels on the CPU, op by op (TRITON_INTERPRET=1 before its import)?"""
    return bool(triton_module().knobs.runtime.interpret)


@cache
def loaded(text: str, name: str) -> Any:
    """Make a function of a kernel's source."""
    triton_module()
    where = f"<dualform-triton-{hashlib.sha256(text.encode()).hexdigest()[:16]}.py>"
    linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)
    space: dict[str, Any] = {"__name__": "dualform_triton"}
    exec(compile(text, where, "exec"), space)
    return space[name]


class Launch(NamedTuple):
    """How a kernel is run: warps of a program, and mini-batches whose reads are under way."""

    warps: int = 4
    stages: int = 2


def run(
    kernel: Kernel, tensors: Sequence[Tensor], rows: int, heads: int, groups: int, scalars: Sequence[int], how: Launch
) -> Any:
    """Run a kernel on (n, B, H, ...) tensors. scalars: count, group, G, phase."""
    places = [y for x in tensors for y in (x, *x.stride())]
    function, lack = loaded(kernel.text, kernel.name)[(rows, groups)], ""
    for stages in range(_stages.get((kernel.text, how), how.stages), 0, -1):
        try:
            made = function(*places, heads, *scalars, STAGES=stages, num_warps=how.warps)
            _stages[kernel.text, how] = stages
            return made
        except triton_module().runtime.errors.OutOfResources as error:
            lack = str(error)
    raise BackendError(
        f"triton: {kernel.name} does not fit: {lack} Expected what this card has. Use backend='inductor' or 'eager', other warps, or a "
        "smaller mini-batch."
    )


_stages: dict[tuple[str, Launch], int] = {}  # with which a kernel fits its card


# -- compiling without a card ------------------------------------------------------------------------------------------

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}


def signature(
    arguments: Sequence[Argument], types: Callable[[Argument], torch.dtype] = lambda a: a.dtype
) -> dict[str, str]:
    """List a kernel's parameters and their types, the last axis of each tensor one after another."""
    found = {}
    for a in arguments:
        found[f"{a.name}_p"] = _POINTERS[types(a)]
        found |= {f"{a.name}_s{k}": "i32" for k in ("n", "b", "h", *range(a.rank))}
    return found | dict.fromkeys(SCALARS, "i32") | {"STAGES": "constexpr"}


def compiled(
    kernel: Kernel, target: Any, how: Launch, types: Callable[[Argument], torch.dtype] = lambda a: a.dtype
) -> Any:
    """Compile a kernel for a target, `GPUTarget("cuda", 90, 32)` say: registers, spills and shared memory are in what it made."""
    triton = triton_module()
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]: as above

    ones = {f"{a.name}_s{a.rank - 1}": 1 for a in kernel.arguments if a.rank}
    kinds = {x: "constexpr" if x in ones else kind for x, kind in signature(kernel.arguments, types).items()}
    function = loaded(kernel.text, kernel.name)
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, (x, kind) in enumerate(kinds.items())
        if kind.startswith("*") or re.search(r"_s(n|b|h|0)$", x)
    }
    aligned = {k: v for k, v in aligned.items() if list(kinds.values())[k[0]] != "constexpr"}
    source = ASTSource(fn=function, signature=kinds, constexprs={**ones, "STAGES": how.stages}, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": how.warps})


__all__ = ["Launch", "Missing", "compiled", "is_interpreted", "loaded", "run", "signature", "triton_module"]

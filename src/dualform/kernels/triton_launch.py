"""Load generated Triton, run it on tensors, compile it for cards that are not here."""

from __future__ import annotations

import hashlib
import linecache
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.graphs.verify import is_on
from dualform.kernels.tape import recording
from dualform.kernels.triton_kernel import SCALARS, Argument, Kernel
from dualform.kernels.triton_soundness import verify
from dualform.learning.backends import BackendError, Miscompiled


class Missing(BackendError):
    """Triton is not there, or nothing that runs it."""


def triton_module() -> Any:
    """Import Triton."""
    try:
        import triton  # pyright: ignore[reportMissingImports]: with torch for CUDA; not at `import dualform`
    except ImportError as error:
        raise Missing(
            f"triton: the package is not installed ({error}); expected triton, which torch for CUDA brings. Install "
            "it, or use backend='auto'."
        ) from None
    return triton


def is_interpreted() -> bool:
    """Does Triton run kernels on the CPU, op by op (TRITON_INTERPRET=1 before its import)?"""
    return bool(triton_module().knobs.runtime.interpret)


OLDEST, CAPABILITY = (3, 4), (8, 0)  # of Triton, and of the card: what the texts are written for
# Bytes of shared memory that a program may have, by compute capability; of others, as little as of any.
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
ENOUGH = 128 << 10  # of it, for factors of products in the type that they are read in
TURNED_WRONG = (3, 4), (3, 7)  # first and last that are wrong where what is carried on is transposed in a product
# ptxas 12.8 gives products of matrices on Hopper addresses that are some other register's, silently (LAB.md).
HOPPER, ASSEMBLER = (9, 0), (12, 9)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:2])


@cache
def _newer() -> str:
    """Find the assembler for Hopper: "" for the one that Triton takes; else the path of one that is new enough."""
    tools, blackwell = triton_module().knobs.nvidia, getattr(triton_module().knobs.nvidia, "ptxas_blackwell", None)
    if _version(tools.ptxas.version) >= ASSEMBLER or blackwell is None or _version(blackwell.version) < ASSEMBLER:
        return ""
    return blackwell.path


def assembler_version() -> str:
    """Say which ptxas kernels are compiled with."""
    tools = triton_module().knobs.nvidia
    return tools.ptxas_blackwell.version if _newer() else tools.ptxas.version


@contextmanager
def assembler() -> Iterator[None]:
    """Compile with an assembler that is right: Triton 3.6 brings one for Hopper, and a newer one for Blackwell."""
    knobs = triton_module().knobs
    if is_interpreted() or not _newer():
        yield
        return
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = _newer()
        yield


@cache
def lack(device: torch.device) -> str:
    """Say what keeps kernels from a card; nothing if nothing does."""
    try:
        version = triton_module().__version__
    except Missing as error:
        return str(error)
    if _version(version) < OLDEST:
        return (
            f"its version is {version}; expected >= {'.'.join(map(str, OLDEST))}, which the kernels' texts are written "
            "for."
        )
    if is_interpreted() or torch.version.hip:
        return ""
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return (
            f"the card's compute capability is {found[0]}.{found[1]}; expected >= 8.0, whose matrix units take "
            "bfloat16."
        )
    tool = triton_module().knobs.nvidia.ptxas.version
    if found == HOPPER and _version(tool) < ASSEMBLER and not _newer():
        return (
            f"its ptxas is {tool}; expected >= {'.'.join(map(str, ASSEMBLER))}, whose products of matrices on Hopper "
            "are right. Set TRITON_PTXAS_PATH to CUDA's."
        )
    return ""


def is_narrow(capability: tuple[int, int]) -> bool:
    """Has a program of such a card so little shared memory that factors are made short before they pass through it?"""
    return SHARED.get(capability, min(SHARED.values())) < ENOUGH


def turns(version: str) -> bool:
    """Is a version of Triton right where what is carried on is transposed in a product?"""
    first, last = TURNED_WRONG
    return not first <= _version(version) <= last


@cache
def place(device: torch.device) -> tuple[str, ...]:
    """Name what compiled code depends on beside its text: Triton, the card, its driver."""
    if device.type != "cuda":
        return (triton_module().__version__,)
    try:
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        asked: Any = torch._C
        driver = str(asked._cuda_getDriverVersion()) if torch.version.cuda else str(torch.version.hip)
    tool = "" if torch.version.hip else _newer() or triton_module().knobs.nvidia.ptxas.version
    return triton_module().__version__, torch.cuda.get_device_name(device), driver, tool


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


# Compiled code by kernel, launch, device, and what it is specialised for: Triton's own look-up binds a hundred
# arguments, a tenth of a millisecond a launch.
_made: dict[Any, tuple[Any, int]] = {}
elsewhere = threading.local()  # run: what runs this thread's first launches instead, in another process


def run(
    kernel: Kernel, tensors: Sequence[Tensor], rows: int, heads: int, groups: int, scalars: Sequence[int], how: Launch
) -> Any:
    """Run a kernel on (n, B, H, ...) tensors. scalars: count, group, G, phase."""
    places, kinds, alike, seen = [], [], [], dict[Any, int]()
    for k, x in enumerate(tensors):
        steps = x.stride()
        alike.append(first := seen.setdefault(steps, k))
        places += (x, *steps) if first == k else (x,)
        kinds.append((x.dtype, steps, not x.data_ptr() % 16))
    device = tensors[0].device.index
    key = (kernel.text, how, device, heads, tuple(kinds))
    found = _made.get(key)
    with on(device):
        if found is not None:
            made, stages = found
            made[rows, groups, 1](*places, heads, *scalars, stages)
        else:
            spans = (zip(x.shape[3:], x.stride()[3:], strict=True) for x in tensors)
            far = any(sum((n - 1) * step for n, step in span) >= 2**31 for span in spans)
            text = sharing(kernel, tuple(alike), far)
            words = (text, kernel.name, places, (rows, groups), (heads, *scalars), how)
            if is_on():
                verify(*words[:-1])
            if (trial := getattr(elsewhere, "run", None)) is not None:
                return trial(*words)
            made, stages = first_run(*words)
            if made is not None:  # an interpreter makes nothing
                _made[key] = made, stages
    if (recorder := getattr(recording, "now", None)) is None:
        return made
    if key not in _made:
        again = partial(run, kernel, rows=rows, heads=heads, groups=groups, scalars=scalars, how=how)
        recorder.called(tensors, again)
        return made
    own = [x.stride() if first == k else () for k, (x, first) in enumerate(zip(tensors, alike, strict=True))]
    last = (heads, *scalars, _made[key][1])

    def launch(w: Any, pointers: list[str]) -> str:
        """As the compiled kernel's own look-up does, which makes a mapping of a hundred names for hooks that nobody
        set."""
        words = [x for pointer, steps in zip(pointers, own, strict=True) for x in (pointer, *map(str, steps))]
        made = _made[key][0]
        where = f"{w.name(_stream)}({device})" if tensors[0].is_cuda else "0"
        start = (
            f"{rows}, {groups}, 1, {where}, {w.name(made.function)}, {w.name(made.packed_metadata)}, None, None, None"
        )
        return f"{w.name(made.run)}({start}, {', '.join([*words, *map(str, last)])})"

    recorder.launched(tensors, launch)
    return made


_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_watched() -> bool:
    """Has somebody, a profiler say, asked to be told of launches, or to make them?"""
    if getattr(elsewhere, "run", None) is not None:
        return True
    at = triton_module().knobs.runtime
    hooks = (at.launch_enter_hook, at.launch_exit_hook)
    return any(getattr(x, "calls", x) for x in hooks)


@cache
def sharing(kernel: Kernel, alike: tuple[int, ...], far: bool = False) -> str:
    """Write a kernel for tensors of which some lie alike: those have one set of strides, which takes fewer registers.

    alike: for each tensor, the first that lies as it does. far: do entries of one mini-batch lie 2^31 and more apart?
    Rows, heads and mini-batches are counted in 64 bits anyway.
    """
    other = {
        f"{a.name}_{x}": f"{kernel.arguments[k].name}_{x}"
        for a, k in zip(kernel.arguments, alike, strict=True)
        for x in a.strides
    }
    text = re.sub(r"\b\w+_s\w\b", lambda found: other.get(found[0], found[0]), kernel.text)
    if far:
        text = re.sub(r"(= tl\.arange\(0, \d+\))$", r"\1.to(tl.int64)", text, flags=re.M)
        text = re.sub(r"(?<= \+ )(\d+)(?= \* \w+_s\d)", r"(row * 0 + \1)", text)
    head, given, rest = re.split(rf"(?<=def {kernel.name}\()(.*)(?=\):)", text, maxsplit=1)
    return f"{head}{', '.join(dict.fromkeys(given.split(', ')))}{rest}"


def on(device: int | None) -> Any:
    """Make a device the current one, where it is not."""
    return nullcontext() if device is None or device == torch.cuda.current_device() else torch.cuda.device(device)


def first_run(
    text: str, name: str, places: Sequence[Any], grid: tuple[int, int], numbers: Sequence[int], how: Launch
) -> tuple[Any, int]:
    """Compile and run a kernel, with fewer stages where it does not fit otherwise."""
    tried, function = "", loaded(text, name)
    for stages in range(how.stages, 0, -1):
        words = {"STAGES": stages, "num_warps": how.warps}
        try:
            with assembler():
                if not is_interpreted():
                    function.warmup(*places, *numbers, grid=grid, **words)
                made = function[grid](*places, *numbers, **words)
            return made, stages
        except triton_module().runtime.errors.OutOfResources as error:
            tried = str(error)
        except Exception as error:
            if "out of memory" in str(error):
                raise short_of_memory(name, error) from error
            # Of an earlier kernel: nothing runs on this card any more.
            if isinstance(error, torch.AcceleratorError) or "[CUDA]" in str(error):
                raise
            raise Miscompiled(
                f"triton: {name} does not compile ({type(error).__name__}: {str(error)[:300]}); expected code "
                f"for {' '.join(place(places[0].device))}. Use backend='inductor' or 'eager'; this is a fault of "
                "dualform or of Triton, please report it."
            ) from error
    raise Miscompiled(
        f"triton: {name} does not fit: {tried} Expected what this card has. Use backend='inductor' or 'eager', "
        "other warps, or a smaller mini-batch."
    )


def short_of_memory(name: str, error: Exception) -> BackendError:
    return BackendError(
        f"triton: {name} finds no memory for its first run ({str(error)[:200]}); expected room for two rows of the "
        "call beside it, and for what does not fit in registers. Free some, take a smaller batch, or use "
        "backend='eager'."
    )


_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}


def compiled(
    kernel: Kernel, target: Any, how: Launch, types: Callable[[Argument], torch.dtype] = lambda a: a.dtype,
    alike: Callable[[Argument], Any] = lambda a: a,
) -> Any:  # fmt: skip
    """Compile a kernel for a target, `GPUTarget("cuda", 90, 32)` say: registers,
    spills and shared memory are in what it made.

    alike: the same for tensors that lie alike.
    """
    triton = triton_module()
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]: as above

    same = [alike(a) for a in kernel.arguments]
    first = tuple(same.index(x) for x in same)
    kinds: dict[str, str] = {}
    for k, (a, j) in enumerate(zip(kernel.arguments, first, strict=True)):
        kinds[f"{a.name}_p"] = _POINTERS[types(a)]
        kinds |= {f"{a.name}_{x}": "i32" for x in a.strides if j == k}
    ones = {x: 1 for a in kernel.arguments if a.rank and (x := f"{a.name}_s{a.rank - 1}") in kinds}
    kinds |= dict.fromkeys(ones, "constexpr") | dict.fromkeys(SCALARS, "i32") | {"STAGES": "constexpr"}
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, (x, kind) in enumerate(kinds.items())
        if kind.startswith("*") or (kind != "constexpr" and re.search(r"_s(n|b|h|0)$", x))
    }
    function = loaded(sharing(kernel, first), kernel.name)
    source = ASTSource(fn=function, signature=kinds, constexprs={**ones, "STAGES": how.stages}, attrs=aligned)
    with assembler():
        return triton.compile(source, target=target, options={"num_warps": how.warps})


__all__ = [
    "Launch",
    "Missing",
    "assembler_version",
    "compiled",
    "elsewhere",
    "first_run",
    "is_interpreted",
    "is_narrow",
    "is_watched",
    "lack",
    "loaded",
    "on",
    "place",
    "run",
    "sharing",
    "short_of_memory",
    "triton_module",
    "turns",
]

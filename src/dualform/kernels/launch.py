"""Compile generated C++ once per source, compiler and machine; keep it on disk; call it on tensors, rows over threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OPTIMISE = "-O3"
FLAGS = (
    "-std=c++17", "-march=native", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
# Below so many multiplications and additions a second thread costs more than it brings.
FLOPS_PER_THREAD = 2_000_000


class CompilerError(RuntimeError):
    """There is no compiler that takes the generated code."""


def compiler() -> str:
    """Name the C++ compiler: $CXX, else the first of g++, clang++, c++ on the path."""
    from shutil import which

    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and which(name):
            return str(which(name))
    raise CompilerError(
        "cpp: no C++ compiler was found; expected $CXX, g++, clang++ or c++ on the path. Install one, or use backend='eager'."
    )


@cache
def _identity(path: str, flags: tuple[str, ...]) -> str:
    """Describe a compiler and this processor, for keys."""
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    target = subprocess.run(
        [path, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    ).stdout
    vectors = sorted(
        line
        for line in target.splitlines()
        if "__AVX" in line or "__FMA" in line or "__ARM" in line or "__znver" in line
    )
    return "\n".join([*version, platform.machine(), *vectors, *flags])


def cache_folder() -> Path:
    """Where compiled code is kept: $DUALFORM_CACHE, else the user's cache folder."""
    base = os.environ.get("DUALFORM_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dualform"


def compiled(text: str) -> Callable[..., None]:
    """Return the function `run` of a source, compiled now or before."""
    path = compiler()
    key = hashlib.sha256((text + _identity(path, (OPTIMISE, *FLAGS))).encode()).hexdigest()[:32]
    folder = cache_folder()
    target = folder / f"{key}.so"
    found = _opened(target)
    if found is None:
        folder = _writable(folder)
        target = folder / f"{key}.so"
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, made = Path(work) / "block.cpp", Path(work) / "block.so"
            source.write_text(text)
            done = subprocess.run(
                [path, OPTIMISE, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise CompilerError(
                    f"cpp: {path} failed with status {done.returncode}: {done.stderr[-2000:]}. Use backend='eager'."
                )
            made.replace(target)  # whole or not at all, whoever else writes it
        found = _opened(target)
        if found is None:
            raise CompilerError(f"cpp: what {path} made could not be loaded from {target}. Use backend='eager'.")
    return found


def _opened(path: Path) -> Callable[..., None] | None:
    try:
        run = ctypes.CDLL(str(path)).run
    except (OSError, AttributeError):  # absent, or cut short
        return None
    run.argtypes = [ctypes.c_long] * 6 + [ctypes.c_void_p] * 2
    run.restype = None
    return run


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        other = Path(tempfile.gettempdir()) / f"dualform-{os.getuid()}"
        other.mkdir(mode=0o700, exist_ok=True)
        return other


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def arguments(tensors: Sequence[Tensor]) -> np.ndarray:
    """Lay out (n, B, H, ...) tensors as the `Arg`s of the preamble."""
    rows = [[x.data_ptr(), *x.stride(), *[0] * (7 - x.ndim)] for x in tensors]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 8)


@dataclass(eq=False)
class Native:
    """A compiled function with its memory."""

    run: Callable[..., None]
    memory: int
    state: int
    flops: int
    dtype: torch.dtype

    def __call__(
        self, tensors: Sequence[Tensor], rows: int, heads: int, count: int, group: int, phase: int, ring: int
    ) -> None:
        """Run `count` mini-batches of all rows. ring: states kept per thread."""
        table = arguments(tensors)
        work = self.flops * rows * count
        threads = max(1, min(torch.get_num_threads(), rows, work // FLOPS_PER_THREAD))
        size = -(-(self.memory + ring * self.state + 64) // 64) * 64
        scratch = torch.empty(threads * size + 64, dtype=self.dtype)
        if poison:
            scratch.fill_(float("nan"))
        start = scratch.data_ptr() + (-scratch.data_ptr()) % 64
        edges = [rows * k // threads for k in range(threads + 1)]

        def part(k: int) -> None:
            where = start + k * size * self.dtype.itemsize
            self.run(edges[k], edges[k + 1], heads, count, group, phase, table.ctypes.data, where)

        if threads == 1:
            part(0)
            return
        others = [_pool(threads - 1).submit(part, k) for k in range(1, threads)]
        part(0)
        for other in others:
            other.result()


poison = False  # tests fill scratch memory with NaN

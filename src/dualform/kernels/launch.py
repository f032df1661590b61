"""Compile generated C++ once per source, compiler and machine; keep it on disk; call it, rows over threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualform.caches import cache_folder, is_private
from dualform.learning.backends import BackendError

OPTIMISE = "-O3"
FLAGS = (
    "-std=c++17", "-march=native", "-fPIC", "-shared", "-pthread", "-fopenmp-simd", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
# Below so many multiplications and additions a second thread costs more than it brings.
FLOPS_PER_THREAD = 2_000_000
THREADS_OF_A_ROW = 4  # cut in slices; more wait for the loop that carries its state on
# The cache drops what was not used for longest beyond this: some thousand programs.
CACHE_BYTES = 512 * 2**20
SECONDS = 600  # after which a compiler is held to hang

poison = False  # tests fill scratch memory with NaN


class CompilerError(BackendError):
    """There is no compiler that takes the generated code, or no place for what it makes."""


def _fail(what: str) -> CompilerError:
    return CompilerError(f"cpp: {what}. Use backend='eager'.")


def compiler() -> tuple[str, ...]:
    """Name the C++ compiler: $CXX, else the first of g++, clang++, c++ on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if not shutil.which(named[0]):
            raise _fail(
                f"$CXX is {named[0]!r}, which is no program; expected a C++17 compiler. Unset it, or install one"
            )
        return tuple(named)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return (name,)
    raise _fail("no C++ compiler was found; expected $CXX, g++, clang++ or c++ on the path. Install one")


def _execute(command: Sequence[str], text: str = "") -> str:
    """Run a compiler and return what it prints."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _fail(f"{command[0]} did not run: {error}; expected a C++17 compiler") from error
    if done.returncode:
        if "No space left" in done.stderr:
            raise OSError(done.stderr.strip()[-200:])
        raise _fail(
            f"{command[0]} failed with status {done.returncode}; expected a C++17 compiler (g++ 9, clang 10 or later). "
            f"It said: {done.stderr.strip()[-1500:]}"
        )
    return done.stdout


@cache
def _identity(command: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Describe a compiler and this processor, for keys: all that the compiler defines of its own on this machine."""
    defined = _execute([*command, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    return "\n".join([*command, _execute([*command, "--version"]), platform.machine(), defined, *flags])


def _folders() -> Iterator[Path]:
    """Yield the cache, then a private folder among the temporary files, for a cache that cannot be written."""
    yield cache_folder()
    yield Path(tempfile.gettempdir()) / f"dualform-{os.getuid()}"


def compiled(text: str) -> ctypes.CDLL:
    """Return a source's library, compiled now or before."""
    command = compiler()
    key = hashlib.sha256((text + _identity(command, (OPTIMISE, *FLAGS))).encode()).hexdigest()[:32]
    why: OSError | None = None
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(folder):
                raise PermissionError(f"others may write to {folder}")
            return _opened(folder, key) or _made(folder, key, command, text)
        except OSError as error:
            why = error
    raise _fail(f"no folder takes compiled code ({why}); expected {cache_folder()} to be writable. Set $DUALFORM_CACHE")


def _made(folder: Path, key: str, command: tuple[str, ...], text: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, made = Path(work) / "block.cpp", Path(work) / "block.so"
        source.write_text(text)
        call = [*command, OPTIMISE, *FLAGS, str(source), "-o", str(made)]
        for more in (["-fopenmp"], []):  # there are compilers that take it, and have no library of it
            try:
                _execute([*call, *more])
            except CompilerError:
                if not more:
                    raise
                continue
            made.replace(folder / f"{key}.{_digest(made)}.so")  # whole or not at all, whoever else writes it
            _shrink(folder)
            if found := _opened(folder, key):
                return found
    raise _fail(f"what {command[0]} made could not be loaded from {folder}; expected a shared library")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _opened(folder: Path, key: str) -> ctypes.CDLL | None:
    """Load an entry; one that is not what was written goes: to map a file cut short may end the process."""
    for path in folder.glob(f"{key}.*.so"):
        try:
            if _digest(path) == path.name.split(".")[1]:
                library = ctypes.CDLL(str(path))
                library.run.argtypes = [*[ctypes.c_long] * 5, *[ctypes.c_void_p] * 2, ctypes.c_long]
                library.run.restype = None
                library.need.argtypes, library.need.restype = [ctypes.c_long] * 4, ctypes.c_long
                with contextlib.suppress(OSError):
                    os.utime(path)  # used: it stays longest
                return library
        except (OSError, AttributeError):
            pass
        path.unlink(missing_ok=True)
    return None


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """List (last use, bytes, path) of all entries; others may delete meanwhile."""
    found = []
    for path in folder.glob("*.*.so"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    return sorted(found)


def _shrink(folder: Path) -> None:
    entries = _entries(folder)
    extra = sum(size for _, size, _ in entries) - CACHE_BYTES
    for _, size, path in entries[:-1]:
        if extra > 0:
            path.unlink(missing_ok=True)
            extra -= size


def clear_cache() -> tuple[int, int]:
    """Delete all compiled code; return how many entries and bytes there were."""
    count = nbytes = 0
    for folder in _folders():
        for _, size, path in _entries(folder):
            path.unlink(missing_ok=True)
            count, nbytes = count + 1, nbytes + size
    return count, nbytes


Place = tuple[int, ...]  # an `Arg` of the preamble: where a tensor's entries are, and strides of (n, B, H, ...)


def placed(x: Tensor) -> Place:
    """Say where the entries of an (n, B, H, ...) tensor are."""
    return (x.data_ptr(), *x.stride())


_ZEROS = (0,) * 8


@dataclass(eq=False)
class Native:
    """A compiled function with its memory."""

    library: ctypes.CDLL
    flops: int
    dtype: torch.dtype
    slices: bool = False  # does it run mini-batches of a row beside each other?

    def __call__(self, places: Sequence[Place], rows: int, heads: int, count: int, group: int, phase: int) -> None:
        """Run `count` mini-batches of all rows."""
        table = np.array([(*x, *_ZEROS[len(x) :]) for x in places], dtype=np.int64)
        work = self.flops * rows * count
        most = THREADS_OF_A_ROW * rows if self.slices else rows
        threads = max(1, min(torch.get_num_threads(), most, work // FLOPS_PER_THREAD))
        scratch = torch.empty(self.library.need(rows, count, group, threads) + 128, dtype=self.dtype)
        if poison:
            scratch.fill_(float("nan"))
        start = scratch.data_ptr() + (-scratch.data_ptr()) % 64
        self.library.run(rows, heads, count, group, phase, table.ctypes.data, start, threads)

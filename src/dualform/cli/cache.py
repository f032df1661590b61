"""`dualform cache`: compiled code on disk, and what was found right or wrong."""

from __future__ import annotations

from typing import Literal

from dualform.kernels.launch import clear_cache
from dualform.learning.proof import cache_folder, forget


def cache(action: Literal["clear"], /) -> None:
    """Delete the code that backend "cpp" compiled, and what comparisons found; both are made again when needed.

    Args:
        action: clear.
    """
    count, nbytes = clear_cache()
    size = f"{nbytes / 2**20:.1f} MiB"
    print(f"{action}ed {count} compiled programs, {size}, and {forget()} comparisons from {cache_folder()}")

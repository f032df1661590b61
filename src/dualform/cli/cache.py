"""`dualform cache`: compiled code on disk."""

from __future__ import annotations

from typing import Literal

from dualform.kernels.launch import clear_cache
from dualform.learning.proof import cache_folder


def cache(action: Literal["clear"], /) -> None:
    """Delete the code that backend "cpp" compiled; it is compiled again when it is needed.

    Args:
        action: clear.
    """
    count, nbytes = clear_cache()
    print(f"{action}ed {count} compiled programs, {nbytes / 2**20:.1f} MiB, from {cache_folder()}")

"""The folder where proofs, compiled code and copies of the user's own code are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where proofs and compiled code are kept: $DUALFORM_CACHE, else the user's cache folder."""
    base = os.environ.get("DUALFORM_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dualform"


def is_private(folder: Path) -> bool:
    """Is a folder ours alone to write? Code of anybody else's must not be loaded."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o002

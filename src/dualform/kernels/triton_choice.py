"""What is chosen by sizes alone, slices, warps and stages; and what is tried next where it was wrong."""

from __future__ import annotations

from collections.abc import Mapping

from dualform.kernels.triton_kernel import Kernel
from dualform.kernels.triton_launch import Launch
from dualform.kernels.triton_slices import ENTRIES

# Below so many rows a direction of a small state is cut in slices, its chain being what takes time: registers hold the
# state and what slices make again (LAB.md, one H200).
ROWS, COUNT = {"forward": 80, "backward": 1 << 30}, 16
WARPS = ((8192, 4), (49152, 8), (1 << 40, 16))  # that hold a state of so many entries, as seen on the card
# What is compiled and compared in turn, until something is right.
SHORT_LIST: list[Mapping[str, object]] = [
    {"warps": None, "stages": 3, "slices": None}, {"warps": None, "stages": 1, "slices": None},
    {"warps": None, "stages": 1, "slices": False}, {"warps": 16, "stages": 1, "slices": False},
]  # fmt: skip


def cut(entries: int, rows: int, count: int, direction: str) -> bool:
    """Is a stretch of `count` mini-batches cut in slices? In reverse, what is left of a large state's step fits."""
    return direction == "backward" if entries > ENTRIES else count >= COUNT and rows < ROWS[direction]


def launch_for(kernel: Kernel, warps: int | None, stages: int) -> Launch:
    """Choose the warps of a program: enough to hold the state; else for its tiles, the fewer the more run at once."""
    stages = 1 if kernel.again else stages  # what is read twice would have shared memory twice
    if kernel.carries:
        # Whose reads ahead take what shared memory there is.
        heavy = kernel.held > 2 * ENTRIES and kernel.name.startswith("reverse")
        return Launch(warps or next(n for most, n in WARPS if kernel.held <= most), min(stages, 2) if heavy else stages)
    return Launch(warps or (8 if kernel.largest > 8192 else 2 if kernel.usual <= 1536 else 4), min(stages, 2))


def tried_next(**own: object) -> Mapping[str, object] | None:
    """Say what comes after these options on the short list, if anything."""
    return SHORT_LIST[SHORT_LIST.index(own) + 1] if own in SHORT_LIST[:-1] else None


__all__ = ["cut", "launch_for", "tried_next"]

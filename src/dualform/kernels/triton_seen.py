"""Which kernels were seen to run right on a card, by its architecture, Triton and assembler: `triton_seen.json`.

`python -m pytest tests/gpu --seen` writes it on a card, of what its tests launched and found right. A kernel is known
by its text, by how it is launched, and by the types of a call's tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import torch

from dualform.kernels import triton_launch
from dualform.kernels.triton_kernel import Kernel
from dualform.kernels.triton_launch import Launch

RECORD = Path(__file__).with_name("triton_seen.json")


@cache
def architecture(device: torch.device) -> str:
    """Name what makes code of a text."""
    version = f"Triton {triton_launch.triton_module().__version__}"
    if device.type != "cuda":
        return f"{device.type}, {version}"
    if torch.version.hip:
        return f"{torch.cuda.get_device_properties(device).gcnArchName}, {version}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}, {version}, ptxas {triton_launch.assembler_version()}"


@lru_cache(1024)
def digest(kernel: Kernel, how: Launch, kinds: tuple[str, ...]) -> str:
    """Name a kernel as it is launched."""
    words = (kernel.text, tuple(how), kinds)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


@cache
def seen(device: torch.device) -> frozenset[str]:
    """Return what was seen right on such a device."""
    return frozenset(json.loads(RECORD.read_text()).get(architecture(device), ()))


def write(device: torch.device, found: Iterable[str]) -> None:
    """Put what was seen right in one run in the place of what was recorded of such devices."""
    record = json.loads(RECORD.read_text()) | {architecture(device): sorted(found)}
    RECORD.write_text(json.dumps(record, indent=0, sort_keys=True) + "\n")
    seen.cache_clear()


__all__ = ["architecture", "digest", "seen", "write"]

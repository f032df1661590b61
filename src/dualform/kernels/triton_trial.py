"""A first run apart: kernels run in a process of their own, so that one that reads past its memory ends no other.

During a trial every launch is sent there with its tensors' numbers, and what it wrote comes back. The other process
compiles and launches alone: it knows neither a learner nor its module. It ends when nothing came for a while.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dualform.kernels.triton_launch import Launch, elsewhere, first_run, short_of_memory
from dualform.learning.backends import BackendError, Miscompiled, Stopped

IDLE, LIMIT = 30, 900  # seconds that it waits for a launch, and that one may take, its compilation included


@contextmanager
def trial() -> Iterator[None]:
    """Have first launches of this thread run in another process."""
    before = getattr(elsewhere, "run", None)
    elsewhere.run = tried
    try:
        yield
    finally:
        elsewhere.run = before


def _send(file: IO[bytes], what: Any) -> None:
    held = io.BytesIO()
    torch.save(what, held)
    file.write(struct.pack("<q", held.tell()) + held.getvalue())
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    head = file.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<q", head)
    return torch.load(io.BytesIO(file.read(size)), weights_only=True)


class _Other:
    """The other process, and the lock of those who use it."""

    def __init__(self) -> None:
        self.lock, self.said, self.runs, self.stopped = threading.Lock(), Path(), False, False
        self.process: Any = None

    def started(self) -> Any:
        if self.process is None:
            handle, name = tempfile.mkstemp(prefix="dualform-trial-")
            self.said = Path(name)
            path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=handle, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
            os.close(handle)
            self.runs = False
            _receive(self.process.stdout)
            self.runs = True  # what ends it now is a launch's fault
        return self.process

    def ended(self, kill: bool = False) -> str:
        """End it, if it has not; says how it ended."""
        process, self.process = self.process, None
        if process is None:
            return ""
        if kill:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]
        code, said = process.wait(), ""
        self.stopped = code in (-signal.SIGKILL, -signal.SIGTERM)
        with suppress(OSError):
            said = "".join(self.said.read_text(errors="replace").strip().splitlines()[-1:])
            self.said.unlink()
        return f"ended its process with {code}: {said[:200]}" if code else ""

    def asked(self, what: dict[str, Any], limit: float) -> dict[str, Any]:
        """Have a launch run; of two processes, the first may have waited long enough."""
        why = "does not answer"
        for _ in range(2):
            try:
                process = self.started()
                _send(process.stdin, what)
                if select.select([process.stdout], [], [], limit)[0]:
                    found = _receive(process.stdout)
                    return found if "error" not in found else found | {"ended": self.ended()}
                self.ended(kill=True)
                return {"error": f"took more than {limit:.0f} s"}
            except (EOFError, OSError):
                if (said := self.ended()) and self.runs:
                    return {"error": said, "stopped": self.stopped}
                why = said or why
            except BaseException:  # the answer would be taken for that of the next launch
                self.ended(kill=True)
                raise
        where = f"triton: a process to try launches in {why}; expected one that starts. Use backend='eager'."
        return {"refused": where, "as_compiled": False}


_other = _Other()
atexit.register(_other.ended)


def tried(
    text: str, name: str, places: Sequence[Any], grid: tuple[int, int], numbers: Sequence[int], how: Launch
) -> None:
    """Run a launch in the other process, and take over what it wrote.

    Raises: BackendError if the launch ended that process, did not compile, or took too long.
    """
    tensors = [x for x in places if isinstance(x, Tensor)]
    sent = [_told(x) if isinstance(x, Tensor) else x for x in places]
    what = {"text": text, "name": name, "places": sent, "grid": grid, "numbers": tuple(numbers), "how": tuple(how)}
    with _other.lock:
        found = _other.asked(what, LIMIT)
    if "refused" in found:
        raise (Miscompiled if found["as_compiled"] else BackendError)(found["refused"])
    if "error" in found:
        raise (Stopped if found.get("stopped") else Miscompiled)(
            f"triton: {name} {found['error']}. It was tried in a process of its own; expected a launch that returns. "
            "Use backend='inductor' or 'eager'; this is a fault of dualform or of the compiler, please report it."
        )
    for x, y in zip(tensors, found["values"], strict=True):
        if y is not None:
            x.copy_(y)


def _told(x: Tensor) -> dict[str, Any]:
    """Say how a tensor lies, and its numbers, what is repeated once."""
    own = x.detach()[tuple(slice(None if step else 1) for step in x.stride())].cpu().contiguous()
    return {"values": own, "shape": x.shape, "stride": x.stride(), "device": str(x.device), "shift": x.data_ptr() % 16}


def _laid(x: dict[str, Any]) -> Tensor:
    """Lay numbers out as the tensor lay that they come from."""
    values, shift = x["values"], x["shift"] // x["values"].element_size()
    length = 1 + sum((n - 1) * s for n, s in zip(values.shape, x["stride"], strict=True))
    room = torch.zeros(length + shift, dtype=values.dtype, device=x["device"])[shift:]
    room.as_strided(values.shape, x["stride"]).copy_(values)
    return room.as_strided(x["shape"], x["stride"])


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor, NaNs too; contiguous() leaves an axis of one entry the stride that it has."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def serve() -> None:
    """Run launches that come in, one after the other."""
    source, goal = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    _send(goal, {})
    while select.select([source], [], [], IDLE)[0]:
        try:
            what = _receive(source)
        except EOFError:
            return
        try:
            places = [_laid(x) if isinstance(x, dict) else x for x in what["places"]]
            tensors = [x for x in places if isinstance(x, Tensor)]
            before = [x.clone() for x in tensors]
            first_run(what["text"], what["name"], places, what["grid"], what["numbers"], Launch(*what["how"]))
            pairs = zip(tensors, before, strict=True)
            answer = {"values": [None if torch.equal(_bytes(x), _bytes(y)) else x.cpu() for x, y in pairs]}
        except BackendError as error:
            answer = {"refused": str(error), "as_compiled": isinstance(error, Miscompiled)}
        except torch.OutOfMemoryError as error:
            answer = {"refused": str(short_of_memory(what["name"], error)), "as_compiled": False}
        except Exception as error:
            answer = {"error": f"failed ({type(error).__name__}: {str(error)[:400]})"}
        _send(goal, answer)
        if "error" in answer:  # of a card on which nothing runs any more, perhaps
            return


__all__ = ["serve", "trial"]

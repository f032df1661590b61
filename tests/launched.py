"""Which kernels a test launched, as the record of what was seen right names them."""

from contextlib import contextmanager

from dualform.kernels import triton_backend, triton_seen


@contextmanager
def launched():
    """Collect them."""
    found, plain = set(), triton_backend._Rows._run

    def run(self, run, made, kernel, *rest):
        found.add(triton_seen.digest(kernel, self._launch(kernel), run.call.kinds))
        return plain(self, run, made, kernel, *rest)

    triton_backend._Rows._run = run
    try:
        yield found
    finally:
        triton_backend._Rows._run = plain

"""Generated kernels: a schedule of a chunk program, and what prints it."""

from dualform.kernels import backend, triton_backend

__all__ = ["backend", "triton_backend"]

"""GPU kernels in Triton. Importing this package does not import Triton."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]

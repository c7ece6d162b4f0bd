"""Registers the backends, in ascending order of preference."""

from ..registry import register_backend
from .cuda import CudaBackend
from .eager import EagerBackend
from .native import NativeBackend
from .triton import TritonBackend

register_backend(EagerBackend())
register_backend(NativeBackend())
register_backend(CudaBackend())
register_backend(TritonBackend())

__all__ = ["CudaBackend", "EagerBackend", "NativeBackend", "TritonBackend"]

"""The backends, registered in order of preference: the last that can serve a device does."""

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

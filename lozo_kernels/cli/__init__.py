"""The command ``lozo-kernels``."""

from .command import main

__all__ = ["main"]

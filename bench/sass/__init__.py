"""Proof of the GPU kernels from their machine code, without a GPU: ``python -m bench.sass``."""

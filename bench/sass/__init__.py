"""Checks the machine code of the GPU kernels, without a GPU: ``python -m bench.sass``."""

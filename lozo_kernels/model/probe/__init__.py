"""Probing: a model is evaluated at W + (B + s U) V^T while W is only read.

Between two draws of V, LOZO (Chen et al., ICLR 2025, Algorithm 1) is plain zeroth-order SGD on a small factor B. A perturbation
enters each weight on one of two sides: on the outputs of the layer that uses it (``forward/activation.py``), or on a perturbed
weight that is written to other memory before its module runs (``forward/swapping.py``). ``handle.py`` puts them together.
"""

from ...errors import BatchSplitError
from .handle import ProbeHandle
from .lora import LoraAdapter, export_lora

__all__ = ["BatchSplitError", "LoraAdapter", "ProbeHandle", "export_lora"]

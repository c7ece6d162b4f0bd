"""This library's kernels inside other projects' zeroth-order trainers, and a backend for trainers that are written now."""

from .base import TrainerAdapter
from .directions import DirectionBackend, PerturbationBackend
from .recognise import FAMILIES, accelerate_trainer

__all__ = ["FAMILIES", "DirectionBackend", "PerturbationBackend", "TrainerAdapter", "accelerate_trainer"]

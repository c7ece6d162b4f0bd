"""The kernels of this library inside other projects' zeroth-order trainers, and a backend for new trainers."""

from .base import TrainerAdapter
from .directions import DirectionBackend, PerturbationBackend
from .recognise import FAMILIES, accelerate_trainer

__all__ = ["FAMILIES", "DirectionBackend", "PerturbationBackend", "TrainerAdapter", "accelerate_trainer"]

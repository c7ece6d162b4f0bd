"""RGE, the estimator of MeZO: dense Gaussian directions for everything (Malladi et al., 2023)."""

from __future__ import annotations

from torch import Tensor

from ..registry import Draw
from .estimator import Estimator, Place


class Dense(Estimator):
    """Z of the weight's own shape; nothing has low-rank factors."""

    name = "dense"
    low_rank = False

    def left(self, place: Place, draw: Draw) -> Tensor:
        """There is none."""
        raise TypeError("dense directions have no factors")

    def right(self, place: Place, window: int) -> Tensor:
        """There is none."""
        raise TypeError("dense directions have no factors")

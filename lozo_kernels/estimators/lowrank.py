"""LGE, the estimator of LOZO: L is a Gaussian U that the kernels regenerate (Chen et al., ICLR 2025)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..registry import Draw
from .estimator import Estimator, Place


class LowRank(Estimator):
    """U V^T, U new at every step, V every ``interval`` steps; with ``interval=1`` the plain LGE."""

    name = "lowrank"

    def left(self, place: Place, draw: Draw) -> Tensor:
        """U."""
        return self._factor(place, place.extent[1], draw, "U")

    def right(self, place: Place, window: int) -> Tensor:
        """V."""
        return self._factor(place, place.extent[2], Draw(window), "V").transpose(1, 2)

    def _factor(self, place: Place, rows: int, draw: Draw, stream: str) -> Tensor:
        batch, (seed, rank) = place.extent[0], (self.config.seed, self.config.rank)
        rest = {"stream": stream, "device": place.device, "backend": place.backend}
        return ops.factor(seed, batch * rows, rank, place.tensor_id, draw, **rest).view(batch, rows, rank)  # type: ignore[arg-type]

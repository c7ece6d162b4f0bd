"""AGZO: directions U V^T whose V spans what the layers are given (Lin et al., ICML 2026, arXiv 2601.17261).

The gradient of a linear layer is G^T H, of the gradients G of its outputs and its inputs H (tokens x columns). Its rows lie in the
span of the rows of H, of which a random V has little. So V is sqrt(columns) A, A orthonormal and close to the strongest directions
of H, and U stays the U of the noise. This needs inputs: :mod:`lozo_kernels.model.guidance` looks at them before a window begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import FactorSpec, LowRank
from .subspace import orthonormal_columns

_STEPS = 2047.0
"""The largest number of steps of its grid that a value of V has: 11 bits, as fp16 holds them."""
_FINEST = 2.0**-8
_LARGEST = 127.0
"""The largest value of V: kernels on the CPU count in steps of 2**-8, in 16 bits."""
_LARGEST_U = 4.9
_EXACT = 2.0**16
"""Steps of 2**-8 times those of the grid whose sums fp32 holds below 256 grids: 2**24 in all."""
_SHIFT = 1e-6


class Guided(LowRank):
    """Directions U V^T with the V of inputs where a layer was looked at, and LOZO's V elsewhere.

    Attributes:
        window: the window of :attr:`vs`, None before the first.
        vs: by tensor id, V transposed, (1, rank, columns) fp16 on the CPU.
    """

    name = "guided"

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        self.window: int | None = None
        self.vs: dict[int, Tensor] = {}

    def right(self, spec: FactorSpec, window: int) -> Tensor:
        if window != self.window:
            raise RuntimeError(
                f"V of window {window} is made from inputs, and this handle has that of window {self.window}: call guide(closure, "
                "step=...) of the handle first; an optimiser does it in the first step of a window"
            )
        v = self.vs.get(spec.tensor_id)
        return self.unguided(spec, window) if v is None else v.to(spec.device, torch.float32)

    def unguided(self, spec: FactorSpec, window: int) -> Tensor:
        """The V that LOZO has."""
        return super().right(spec, window)

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        self._write_right(table, window, backend, reproject=reproject)


def orthonormal_basis(v: Tensor) -> Tensor:
    """An orthonormal basis of the columns of V, (columns, k) fp64, from (rank, columns). k is at most the number of columns."""
    return orthonormal_columns(v.double().T[:, : v.shape[1]])


def power_step(a: Tensor, product: Tensor) -> Tensor:
    """One step of subspace iteration: an orthonormal basis of (H^T H + shift) A.

    The shift, a millionth of the product's norm, changes no direction of H^T H. It keeps A where H shows nothing: with fewer tokens
    than the rank, or inputs of zero.

    Args:
        a: (columns, k) fp64, orthonormal; product: H^T H A.
    """
    size = float(product.norm())
    return orthonormal_columns(product + (_SHIFT * size or 1.0) * a)


def as_factor(a: Tensor) -> Tensor:
    """V = sqrt(columns) A, rounded to a grid on which U V^T is exact.

    The columns of V have the length sqrt(columns), so that U V^T has entries of the variance of LOZO's. Where inputs are strong in
    a few of their elements, as those of language models are, values of V reach sqrt(columns), and LOZO's are below 4.9. So the grid
    is as fine as the largest value and the largest sum of products with U allow, 2**-8 or a power of two above it: a value is at
    most 2047 steps, and a sum has 24 bits. A column that no kernel could count is shortened; its direction stays.

    Args:
        a: (columns, k) fp64, orthonormal.

    Returns:
        (k, columns) fp16.
    """
    v = a.T * a.shape[0] ** 0.5
    v = v * (_LARGEST / v.abs().amax(1, keepdim=True)).clamp(max=1.0)
    grid, largest, most = _FINEST, float(v.abs().max()), float(v.abs().sum(0).max())
    while largest > _STEPS * grid or most * _LARGEST_U > _EXACT * grid:
        grid *= 2.0
    return (torch.round(v / grid) * grid).half()

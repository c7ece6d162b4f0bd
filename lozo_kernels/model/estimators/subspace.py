"""SubZero: directions U S V^T in a random subspace, U and V orthonormal for a window, S new at every draw (Yu et al., 2024).

The direction is U S V^T sqrt(rows * cols) / rank. With U' = sqrt(rows) U and V' = sqrt(cols) V that is (U' S / rank) V'^T, a
direction L V^T with L = U' S / rank, whose V' is kept for a window as LOZO's V is. U' and V' are rounded to multiples of 2**-8, the
grid of the noise contract, which keeps them orthonormal to about 1e-4. So U' S is exact in fp64 in any order of summation, and L
has the same bits wherever U' and V' have. Those come from a QR decomposition in fp64, whose last bits depend on the library: equal
factors on all devices are very likely (rounding to the grid hides differences that are 1e12 times smaller) but not promised.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...kernels import noise, ops
from ...kernels.calls import Draw
from ..config import PatchConfig
from .directions import FactorSpec
from .factored import FactoredEstimator, Key

GRID = 256.0
"""The grid of factors is made of multiples of 1 / 256."""
_LARGEST = 8.0 - 1.0 / GRID
"""The largest multiple of 2**-8 that is used; fp16 holds all of them up to here."""


@dataclasses.dataclass
class _Basis:
    """The basis of one tensor: U' (batch, rows, rank) fp16, the divisor of U' S, and the index of its first core S among all."""

    u: Tensor
    divisor: float
    first_core: int


class Subspace(FactoredEstimator):
    """Draws the bases U' and V' of a window when V is drawn, and the cores S of a step for all tensors at once.

    Args:
        whole: where the rank is above a dimension of a matrix, U and V have as many columns as each can have, as in the published
            trainer; otherwise both have as many as the smaller one.
    """

    name = "subspace"
    label = "SubZero"

    def __init__(self, config: PatchConfig, *, whole: bool = False) -> None:
        super().__init__(config)
        self._whole = whole
        self._bases: dict[int, _Basis] = {}
        self._owners: list[tuple[int, int]] = []  # (tensor id, index of the matrix in its batch) of every core
        self._cores: tuple[Key, Tensor] | None = None

    def left(self, spec: FactorSpec, draw: Draw) -> Tensor:
        step, seed = int(draw.step), self.config.seed
        u = self._draw_basis(spec, "U", step // self.config.interval)
        owners = [(spec.tensor_id, b) for b in range(spec.extent[0])]
        cores = noise.cores(seed, self.config.rank, owners, step, direction=draw.direction, device=spec.device)
        return _product(u, cores, self._divisor(spec))

    def right(self, spec: FactorSpec, window: int) -> Tensor:
        return self._draw_basis(spec, "V", window).transpose(1, 2).float()

    def basis(self, tensor_id: int) -> Tensor:
        """U' of a tensor for the window in memory, (batch, rows, rank) fp16. V must have been drawn for the tensor."""
        return self._bases[tensor_id].u

    def _make_left(self, tensor_id: int, key: Key, device: torch.device) -> Tensor:
        basis = self._bases[tensor_id]
        cores = self._cores_of(key, device)[basis.first_core :][: len(basis.u)]
        return _product(basis.u.to(device), cores, basis.divisor)

    def _cores_of(self, key: Key, device: torch.device) -> Tensor:
        """The cores S of all tensors: (cores, rank, rank) fp32."""
        if self._cores is None or self._cores[0] != key or self._cores[1].device != device:
            seed, step, direction = key
            s = noise.cores(seed, self.config.rank, self._owners, step, direction=direction, device=device)
            self._cores = (key, s)
        return self._cores[1]

    def _enter(self, spec: FactorSpec, window: int) -> None:
        """Draws U' of a window for a tensor, and gives a new tensor its place among the cores."""
        known = self._bases.get(spec.tensor_id)
        if known is None:
            first = len(self._owners)
            self._owners += [(spec.tensor_id, b) for b in range(spec.extent[0])]
            self._cores = None
        else:
            first = known.first_core
        self._bases[spec.tensor_id] = _Basis(self._draw_basis(spec, "U", window), self._divisor(spec), first)

    def _columns(self, spec: FactorSpec, stream: str) -> int:
        """The number of columns of a basis that are not zero."""
        _, rows, cols = spec.extent
        own = rows if stream == "U" else cols
        return min(self.config.rank, own if self._whole else min(rows, cols))

    def _divisor(self, spec: FactorSpec) -> float:
        """The rank, or the geometric mean of the numbers of columns of U and V if they differ."""
        return math.sqrt(self._columns(spec, "U") * self._columns(spec, "V"))

    def _draw_basis(self, spec: FactorSpec, stream: str, window: int) -> Tensor:
        """Returns sqrt(rows) times orthonormal columns, (batch, rows or cols, rank) fp16 on the grid."""
        (batch, rows, cols), rank = spec.extent, self.config.rank
        length = rows if stream == "U" else cols
        g = ops.factor(
            self.config.seed,
            batch * length,
            rank,
            spec.tensor_id,
            Draw(window),
            stream=stream,
            device=spec.device,
            backend=spec.backend,
        )
        return orthonormal(g.view(batch, length, rank), self._columns(spec, stream))


def orthonormal(g: Tensor, rank: int) -> Tensor:
    """Returns sqrt(rows) times the orthonormal factor of a QR decomposition whose R has a positive diagonal.

    Args:
        g: (batch, rows, columns) fp32.
        rank: columns to fill, at most rows; the others are zero.

    Returns:
        (batch, rows, columns) fp16 of multiples of 2**-8.
    """
    out = torch.zeros(g.shape, dtype=torch.float16, device=g.device)
    if g.numel():
        scaled = torch.round(orthonormal_columns(g[..., :rank].double()) * g.shape[1] ** 0.5 * GRID) / GRID
        out[..., :rank] = scaled.clamp(-_LARGEST, _LARGEST)
    return out


def orthonormal_columns(g: Tensor) -> Tensor:
    """The orthonormal factor of a QR decomposition whose R has a positive diagonal: the sign of a column depends on the library."""
    q, r = torch.linalg.qr(g)
    return q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def _product(u: Tensor, s: Tensor, divisor: float) -> Tensor:
    """U' S / divisor in fp32: the product, exact in fp64, is rounded once, and so is the division."""
    product = (u.double() @ s.double() + 0.0).float()
    return product / torch.full((), divisor, dtype=torch.float32, device=u.device)

"""ZO-Muon: directions U V^T with an orthonormal V, and updates that are orthogonal in the space of V (arXiv 2602.17155).

The direction is U V'^T / sqrt(rank) with V' = sqrt(cols) V. Its elements have variance 1, so that eps means what it means for MeZO:
the paper's U V^T is sqrt(cols / rank) times smaller. The update is X <- X - lr orth(N) V^T with orth(N) = N (N^T N)^(-1/2), so that
lr is the paper's, the spectral norm of an update.

V' is on the grid of the noise contract, as the factors of :mod:`.subspace` are. sqrt(max(rows, rank)) orth(N), whose elements are
about 1 in size, is rounded to that grid too, which keeps it orthonormal to about 1e-3. It comes from eigenvalues in fp64, whose
last bits depend on the library: equal bits on all devices are very likely (rounding hides differences that are 1e12 times smaller)
but not promised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import OPS, Op
from ...kernels.registry import Backend
from ...kernels.summed import Run, add_carried, momentum_of, run_summed
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import FactorSpec, LowRank
from .subspace import GRID, orthonormal

_LEAST = 1e-12
"""Eigenvalues of N^T N below this share of the largest are zeros: rounding of N to fp32 leaves about 1e-14 of it."""


class Muon(LowRank):
    """LOZO's U with an orthonormal V; what moves the weights is orth(N), so N is carried without momentum too (beta = 0)."""

    name = "muon"
    carries = True

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        self._columns: dict[int, int] = {}

    def right(self, spec: FactorSpec, window: int) -> Tensor:
        g = self._factor(spec, spec.extent[2], Draw(window), "V")
        return orthonormal(g, min(spec.extent[2], self.config.rank)).transpose(1, 2).float()

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        self._write_right(table, window, backend, reproject=reproject)
        self._columns.update((tensor_id, x.shape[2]) for x, tensor_id in zip(table.x, table.tensor_ids, strict=True))

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        if any(isinstance(draw.step, Tensor) for draw in call.draws):
            raise NotImplementedError("ZO-Muon cannot be captured: its updates are made of eigenvalues, for which a GPU waits")
        again = functools.partial(self.run, backend=backend)
        if not op.momentum:
            super().run(op, table, call, backend)
        elif not op.factors:
            run_summed(op, table, call, again)
        else:
            self._run_on_factors(table, call, again)

    def _run_on_factors(self, table: TensorTable, call: TableCall, run: Run) -> None:
        """N <- beta * N + sum of coefficient * U, then F <- decay * F + sum of scale * U + alpha * moved(N)."""
        assert table.n is not None and call.coefficients is not None and call.alpha is not None
        update = OPS["factor_update_"]
        run(update, momentum_of(table), TableCall(call.seed, call.draws, call.coefficients, call.beta))
        run(update, table, TableCall(call.seed, call.draws, call.scales, call.decay))
        add_carried(table, self.moved(table.n, table.tensor_ids), call.alpha)

    def moved(self, n: Sequence[Tensor], tensor_ids: Sequence[int]) -> Iterator[Tensor]:
        """orth(N) / sqrt(cols), which V' makes orth(N) V^T. Where V' has fewer columns than the rank, N has no others either."""
        columns = [self._columns[tensor_id] for tensor_id in tensor_ids]
        roots = inverse_roots([gram(_wide(some, cols)) for some, cols in zip(n, columns, strict=True)])
        for some, cols, root in zip(n, columns, roots, strict=True):
            size = math.sqrt(max(some.shape[1], min(cols, self.config.rank)))
            on_grid = torch.round(_wide(some, cols) @ root * (size * GRID)) / GRID
            yield (on_grid * (1.0 / (size * math.sqrt(cols)))).float()


def gram(n: Tensor) -> Tensor:
    """N^T N."""
    return n.mT @ n


def inverse_roots(grams: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the inverse square roots of positive semidefinite matrices, all in one decomposition.

    Args:
        grams: (batch, rank, rank) fp64 each.

    Returns:
        The same shapes. Directions without an extent, such as all of a matrix of zeros, have none in the result.
    """
    values, vectors = torch.linalg.eigh(torch.cat(list(grams)))
    kept = values > _LEAST * values[:, -1:]
    roots = (vectors * torch.where(kept, values.clamp(min=0).rsqrt(), 0.0).unsqueeze(-2)) @ vectors.mT
    return roots.split([len(some) for some in grams])


def _wide(n: Tensor, columns: int) -> Tensor:
    """N in fp64, of which V' has at most ``columns`` columns."""
    wide = n.to(torch.float64, copy=True)
    wide[..., columns:] = 0.0
    return wide

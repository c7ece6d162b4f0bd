"""SubZero: directions U S V^T in a random subspace, U and V orthonormal for a window, S new at every draw (Yu et al., 2024).

The direction is U S V^T sqrt(rows * cols) / rank. With U' = sqrt(rows) U and V' = sqrt(cols) V that is (U' S / rank) V'^T: the
left factor of a low-rank direction whose right factor is kept, as LOZO's. U' and V' are rounded to the grid of 2**-8 of the noise
contract, which keeps them orthonormal to about 1e-4, and so U' S is exact in fp64 in any order of summation, and L has the same
bits everywhere once U' and V' have. Those come from a QR decomposition in fp64, whose last bits are a library's own: equal factors
on all devices are very likely (rounding to the grid hides what is 1e12 times smaller) but not promised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import noise, ops, reference
from ...kernels.calls import Draw, Rounding
from ...kernels.ops import Scalars
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import Estimator, Place

_GRID = 256.0
_LARGEST = 8.0 - 1.0 / _GRID
"""Up to here fp16 holds multiples of 2**-8."""


@dataclasses.dataclass
class _Basis:
    """Of one tensor: U' (batch, rows, rank) fp16, how many of its columns are not zero, and where its S are among all."""

    u: Tensor
    rank: int
    first_core: int


class Subspace(Estimator):
    """Draws the bases of a window when V is drawn, and the cores S of a step for all tensors at once."""

    name = "subspace"

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        self._bases: dict[int, _Basis] = {}
        self._owners: list[tuple[int, int]] = []  # (tensor id, matrix of its batch) of every core
        self._cores: tuple[tuple[int, int], Tensor] | None = None
        self._left: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def left(self, place: Place, draw: Draw) -> Tensor:
        """U' S / rank."""
        step, batch = int(draw.step), place.extent[0]
        u, rank = self._draw_basis(place, "U", step // self.config.interval)
        owners = [(place.tensor_id, b) for b in range(batch)]
        cores = noise.cores(self.config.seed, self.config.rank, owners, step, direction=draw.direction, device=place.device)
        return _product(u, cores, rank)

    def right(self, place: Place, window: int) -> Tensor:
        """V'."""
        return self._draw_basis(place, "V", window)[0].transpose(1, 2).float()

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        """U' and V' of a window; with ``reproject`` the momentum is expressed in the new V', as LOZO-M's."""
        assert table.v is not None
        for t, (x, v, tensor_id) in enumerate(zip(table.x, table.v, table.tensor_ids, strict=True)):
            batch, rows, cols = x.shape
            place = Place(tensor_id, (batch, rows, cols), backend, x.device)
            new = self._draw_basis(place, "V", window)[0].transpose(1, 2)
            if reproject:
                assert table.n is not None
                table.n[t].copy_(reference.reproject(table.n[t], v, new))
            v.copy_(new)
            self._enter(place, window)
        self._left.clear()

    def lowrank_update_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw],
        scales: Scalars,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        backend: Backend,
    ) -> None:
        """One pass, by the op that merges a factor."""
        step = _like(table)
        assert step.n is not None
        self._add(table, step.n, draws, scales)
        self._merge(step, decay, rounding, None, backend)

    def lowrank_momentum_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw],
        scales: Scalars,
        coefficients: Scalars,
        alpha: Scalars,
        beta: Scalars,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        backend: Backend,
    ) -> None:
        """As :meth:`lowrank_update_`, with N in the factor."""
        assert table.n is not None
        count = len(table)
        for n, b in zip(table.n, _each(beta, count), strict=True):
            n.mul_(b)
        self._add(table, table.n, draws, coefficients)
        step = _like(table)
        assert step.n is not None
        self._add(table, step.n, draws, scales)
        for p, n, a in zip(step.n, table.n, _each(alpha, count), strict=True):
            p.add_(n * a)
        self._merge(step, decay, rounding, None, backend)

    def factor_update_(
        self, table: TensorTable, *, draws: Sequence[Draw], scales: Scalars, decay: Scalars | None = None, backend: Backend
    ) -> None:
        """Each operation rounded, draws in order."""
        if decay is not None:
            for f, d in zip(table.x, _each(decay, len(table)), strict=True):
                f.mul_(d)
        self._add(table, table.x, draws, scales)

    def lowrank_merge_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw] = (),
        scales: Scalars = 0.0,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        out: TensorTable | None = None,
        backend: Backend,
    ) -> None:
        """A draw goes into a copy of the factor."""
        if draws:
            at = table.cache.get(self.name)
            if not isinstance(at, TensorTable):
                table.cache[self.name] = at = _like(table)
            assert table.n is not None and at.n is not None
            for p, n in zip(at.n, table.n, strict=True):
                p.copy_(n)
            self._add(table, at.n, draws, scales)
            table, out = at, table if out is None else out
        self._merge(table, decay, rounding, out, backend)

    def _merge(
        self, table: TensorTable, decay: Scalars | None, rounding: Rounding | None, out: TensorTable | None, backend: Backend
    ) -> None:
        ops.lowrank_merge_(table, seed=self.config.seed, decay=decay, rounding=rounding, out=out, backend=backend)

    def _add(self, table: TensorTable, factors: Sequence[Tensor], draws: Sequence[Draw], scales: Scalars) -> None:
        """F <- F + sum of scale * L, a rounded multiply and a rounded add each."""
        rows = _rows(scales, len(draws), len(table))
        for draw, row in zip(draws, rows, strict=True):
            for f, tensor_id, scale in zip(factors, table.tensor_ids, row, strict=True):
                f.add_(self._left_of(tensor_id, draw, f.device) * scale)

    def _left_of(self, tensor_id: int, draw: Draw, device: torch.device) -> Tensor:
        """L of the window in memory; the last draw of every tensor is kept, since a step uses it three times."""
        if isinstance(draw.step, Tensor):
            raise NotImplementedError("SubZero cannot be captured: its cores are drawn for a step that is a number")
        key = (draw.step, draw.direction)
        kept = self._left.get(tensor_id)
        if kept is None or kept[0] != key or kept[1].device != device:
            basis = self._bases[tensor_id]
            cores = self._cores_of(key, device)[basis.first_core :][: len(basis.u)]
            kept = self._left[tensor_id] = (key, _product(basis.u.to(device), cores, basis.rank))
        return kept[1]

    def _cores_of(self, key: tuple[int, int], device: torch.device) -> Tensor:
        """S of all tensors: (cores, rank, rank) fp32."""
        if self._cores is None or self._cores[0] != key or self._cores[1].device != device:
            step, direction = key
            s = noise.cores(self.config.seed, self.config.rank, self._owners, step, direction=direction, device=device)
            self._cores = (key, s)
        return self._cores[1]

    def _enter(self, place: Place, window: int) -> None:
        """U' of a window, and a place among the cores for a tensor that has none yet."""
        known = self._bases.get(place.tensor_id)
        if known is None:
            first = len(self._owners)
            self._owners += [(place.tensor_id, b) for b in range(place.extent[0])]
            self._cores = None
        else:
            first = known.first_core
        u, rank = self._draw_basis(place, "U", window)
        self._bases[place.tensor_id] = _Basis(u, rank, first)

    def _draw_basis(self, place: Place, stream: str, window: int) -> tuple[Tensor, int]:
        """sqrt(rows) times orthonormal columns, (batch, rows or cols, rank) fp16 on the grid, and how many are not zero."""
        (batch, rows, cols), rank = place.extent, self.config.rank
        length, filled = rows if stream == "U" else cols, min(rank, rows, cols)
        rest = {"stream": stream, "device": place.device, "backend": place.backend}
        g = ops.factor(self.config.seed, batch * length, rank, place.tensor_id, Draw(window), **rest)  # type: ignore[arg-type]
        return orthonormal(g.view(batch, length, rank), filled), filled


def orthonormal(g: Tensor, rank: int) -> Tensor:
    """sqrt(rows) times the orthonormal factor of a QR decomposition whose R has a positive diagonal.

    Args:
        g: (batch, rows, columns) fp32.
        rank: columns to fill, at most rows; the others are zero.

    Returns:
        (batch, rows, columns) fp16 of multiples of 2**-8.
    """
    out = torch.zeros(g.shape, dtype=torch.float16, device=g.device)
    if g.numel():
        q, r = torch.linalg.qr(g[..., :rank].double())
        # A library is free to choose the sign of a column.
        q = q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        scaled = torch.round(q * g.shape[1] ** 0.5 * _GRID) / _GRID
        out[..., :rank] = scaled.clamp(-_LARGEST, _LARGEST)
    return out


def _product(u: Tensor, s: Tensor, rank: int) -> Tensor:
    """U' S / rank in fp32: the product exact in fp64, then one rounded division."""
    product = (u.double() @ s.double() + 0.0).float()
    return product / torch.full((), float(rank), device=u.device)


def _like(table: TensorTable) -> TensorTable:
    """The weights of a table with a factor of their own, zero."""
    assert table.v is not None
    n = [torch.zeros(x.shape[0], x.shape[1], table.rank, device=x.device) for x in table.x]
    return TensorTable(table.x, table.tensor_ids, v=table.v, n=n, checked=True)


def _each(value: Scalars, count: int) -> list[float | Tensor]:
    """A scalar for each tensor."""
    return _rows(value, 1, count)[0]


def _rows(value: Scalars, draws: int, count: int) -> list[list[float | Tensor]]:
    """A scalar for each draw and tensor, as :func:`ops.lowrank_update_` broadcasts them."""
    if isinstance(value, (int, float)):
        return [[float(value)] * count] * draws
    table = torch.as_tensor(value).to(torch.float32).expand(draws, count)
    return [list(row.unbind()) for row in table.unbind()]

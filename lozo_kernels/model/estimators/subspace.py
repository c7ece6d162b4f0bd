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
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import noise, ops, reference
from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import OPS, Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import Estimator, FactorSpec

_GRID = 256.0
_LARGEST = 8.0 - 1.0 / _GRID
"""The largest multiple of 2**-8 that is used; fp16 holds all of them up to here."""


@dataclasses.dataclass
class _Basis:
    """The basis of one tensor: U' (batch, rows, rank) fp16, the divisor of U' S, and the index of its first core S among all."""

    u: Tensor
    divisor: float
    first_core: int


class Subspace(Estimator):
    """Draws the bases U' and V' of a window when V is drawn, and the cores S of a step for all tensors at once.

    Args:
        whole: where the rank is above a dimension of a matrix, U and V have as many columns as each can have, as in the published
            trainer; otherwise both have as many as the smaller one.
    """

    name = "subspace"

    def __init__(self, config: PatchConfig, *, whole: bool = False) -> None:
        super().__init__(config)
        self._whole = whole
        self._bases: dict[int, _Basis] = {}
        self._owners: list[tuple[int, int]] = []  # (tensor id, index of the matrix in its batch) of every core
        self._cores: tuple[tuple[int, int, int], Tensor] | None = None
        self._left: dict[int, tuple[tuple[int, int, int], Tensor]] = {}

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

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        assert table.v is not None
        for t, (x, v, tensor_id) in enumerate(zip(table.x, table.v, table.tensor_ids, strict=True)):
            batch, rows, cols = x.shape
            spec = FactorSpec(tensor_id, (batch, rows, cols), backend, x.device)
            new = self._draw_basis(spec, "V", window).transpose(1, 2)
            if reproject:
                assert table.n is not None
                table.n[t].copy_(reference.reproject(table.n[t], v, new))
            v.copy_(new)
            self._enter(spec, window)
        self._left.clear()

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Adds the draws to a factor, each by a rounded multiply and a rounded add in order, and merges it into the weights."""
        if op.factors:
            if call.decay is not None:
                for f, decay in zip(table.x, call.decay.unbind(), strict=True):
                    f.mul_(decay)
            self._add(table, table.x, call.seed, call.draws, call.scales)
        elif op.out:
            self._merge(table, call, backend)
        else:
            step = self._with_factor(table)
            assert step.n is not None
            for p in step.n:
                p.zero_()
            if op.momentum:
                self._carry(table, call)
            self._add(table, step.n, call.seed, call.draws, call.scales)
            if op.momentum:
                assert table.n is not None and call.alpha is not None
                for p, n, alpha in zip(step.n, table.n, call.alpha.unbind(), strict=True):
                    p.add_(n * alpha)
            self._apply(step, call, table, backend)

    def _carry(self, table: TensorTable, call: TableCall) -> None:
        """N <- beta * N + sum of coefficient * L."""
        assert table.n is not None and call.beta is not None and call.coefficients is not None
        for n, beta in zip(table.n, call.beta.unbind(), strict=True):
            n.mul_(beta)
        self._add(table, table.n, call.seed, call.draws, call.coefficients)

    def _merge(self, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Merges the factor of a table. A draw is added to a copy of it."""
        if not call.draws:
            self._apply(table, call, call.out, backend)
            return
        at = self._with_factor(table)
        assert table.n is not None and at.n is not None
        for p, n in zip(at.n, table.n, strict=True):
            p.copy_(n)
        self._add(table, at.n, call.seed, call.draws, call.scales)
        self._apply(at, call, table if call.out is None else call.out, backend)

    def _with_factor(self, table: TensorTable) -> TensorTable:
        """A table of the same weights with a factor of its own, for the caller to fill. It is kept with the table."""
        found = table.cache.get(self.name)
        if not isinstance(found, TensorTable):
            assert table.v is not None
            n = [torch.zeros(x.shape[0], x.shape[1], table.rank, dtype=torch.float32, device=x.device) for x in table.x]
            found = table.cache[self.name] = TensorTable(table.x, table.tensor_ids, v=table.v, n=n, checked=True)
        return found

    def _apply(self, table: TensorTable, call: TableCall, out: TensorTable | None, backend: Backend) -> None:
        """Merges the factor of a table into ``out``, with the decay and the rounding of a call."""
        merge = TableCall(call.seed, (), call.scales[:0], call.decay, call.rounding, out=out)
        ops.dispatch(OPS["lowrank_merge_"], table, merge, backend)

    def _add(self, table: TensorTable, factors: Sequence[Tensor], seed: int, draws: Sequence[Draw], scales: Tensor) -> None:
        """F <- F + sum of scale * L, a rounded multiply and a rounded add each."""
        for draw, row in zip(draws, scales.unbind(), strict=True):
            if isinstance(draw.step, Tensor):
                raise NotImplementedError("SubZero cannot be captured: its cores are drawn for a step that is a number")
            key = (seed, draw.step, draw.direction)
            for f, tensor_id, scale in zip(factors, table.tensor_ids, row.unbind(), strict=True):
                f.add_(self._left_of(tensor_id, key, f.device) * scale)

    def _left_of(self, tensor_id: int, key: tuple[int, int, int], device: torch.device) -> Tensor:
        """L for the window in memory. The last one of every tensor is kept, since a step uses it three times."""
        kept = self._left.get(tensor_id)
        if kept is None or kept[0] != key or kept[1].device != device:
            basis = self._bases[tensor_id]
            cores = self._cores_of(key, device)[basis.first_core :][: len(basis.u)]
            kept = self._left[tensor_id] = (key, _product(basis.u.to(device), cores, basis.divisor))
        return kept[1]

    def _cores_of(self, key: tuple[int, int, int], device: torch.device) -> Tensor:
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
        q, r = torch.linalg.qr(g[..., :rank].double())
        # The sign of a column depends on the library.
        q = q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        scaled = torch.round(q * g.shape[1] ** 0.5 * _GRID) / _GRID
        out[..., :rank] = scaled.clamp(-_LARGEST, _LARGEST)
    return out


def _product(u: Tensor, s: Tensor, divisor: float) -> Tensor:
    """U' S / divisor in fp32: the product, exact in fp64, is rounded once, and so is the division."""
    product = (u.double() @ s.double() + 0.0).float()
    return product / torch.full((), divisor, dtype=torch.float32, device=u.device)

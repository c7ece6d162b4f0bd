"""GRZO: a direction for each part of a batch, diag(r_i) U V^T diag(s_i) with random signs r_i and s_i (arXiv 2606.02857).

The directions of a step share U and V. Their sum is (U V^T) o (sum of scale_i r_i s_i^T), which is not in the span of V: no factor
of a probe can hold it, and every update is made in the weights.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...kernels import noise, ops
from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import OPS, Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from .directions import FactorSpec, LowRank


class PerExample(LowRank):
    """Directions of matrices with signs, whose draws are the parts of a batch. Vectors have one direction for all parts."""

    name = "perexample"

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Runs an update, or writes what a weight is at a point to the table that a merge writes."""
        if op.out:
            out = table if call.out is None else call.out
            for x, y in zip(table.x, out.x, strict=True):
                if x.data_ptr() != y.data_ptr():
                    y.copy_(x)
            table = dataclasses.replace(table, x=out.x, n=None, cache={}, checked=True)
        if call.draws:
            first = dataclasses.replace(call, draws=call.draws[:1], out=None)
            ops.dispatch(OPS["lowrank_signed_update_"], table, first, backend)

    def left(self, spec: FactorSpec, draw: Draw) -> Tensor:
        return super().left(spec, Draw(draw.step))

    def direction(self, spec: FactorSpec, draw: Draw) -> Tensor:
        d = super().direction(spec, draw)
        batch, rows, cols = spec.extent
        for stream, count, shape in (("row signs", rows, (batch, rows, 1)), ("column signs", cols, (batch, 1, cols))):
            where = {"stream": stream, "direction": draw.direction, "device": spec.device}
            d = d * noise.part_signs(self.config.seed, 1, batch * count, spec.tensor_id, draw.step, **where).view(shape)  # type: ignore[arg-type]
        return d

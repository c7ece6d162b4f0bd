"""Many directions for the price of one: they share V, so that they are one factor, and one pass over the weights adds them all.

sum_i s_i U_i V^T = (sum_i s_i U_i) V^T. The factor in brackets has as many elements as momentum N; making it costs little beside
the weights. It is summed in fp32 in the order of the draws, and its product with V^T is that of a merge, so that the bits are the
same on every backend. Weights in half precision are rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.calls import TableCall
from ...kernels.op_table import MAX_DRAWS, OPS, Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable


def add_draws(factors: TensorTable, call: TableCall, backend: Backend) -> None:
    """F <- decay * F + sum of scale * U, for any number of draws: a rounded multiply and a rounded add each, in order."""
    decay = call.decay
    for i in range(0, len(call.draws), MAX_DRAWS):
        part = TableCall(call.seed, call.draws[i : i + MAX_DRAWS], call.scales[i : i + MAX_DRAWS], decay)
        ops.dispatch(OPS["factor_update_"], factors, part, backend)
        decay = None


def add_summed(op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
    """X <- decay * X + F V^T, F = sum of scale * U. With momentum F = sum of scale * U + alpha * N, after N has taken up the draws
    as in :func:`lozo_kernels.ops.lowrank_momentum_`."""
    weights, factors = _with_factor(table)
    for f in factors.x:
        f.zero_()
    add_draws(factors, dataclasses.replace(call, decay=None), backend)
    if op.momentum:
        assert call.coefficients is not None and call.alpha is not None
        momentum = _momentum_of(table)
        add_draws(momentum, TableCall(call.seed, call.draws, call.coefficients, call.beta), backend)
        for f, n, alpha in zip(factors.x, momentum.x, call.alpha.unbind(), strict=True):
            f.add_(n * alpha)  # two operations, each rounded
    merge = TableCall(call.seed, (), call.scales[:0], call.decay, call.rounding)
    ops.dispatch(OPS["lowrank_merge_"], weights, merge, backend)


def _with_factor(table: TensorTable) -> tuple[TensorTable, TensorTable]:
    """A table of the same weights with a factor of its own, and a table of these factors. They are kept with the table."""
    found = table.cache.get("summed")
    if found is None:
        n = [torch.empty(*x.shape[:2], table.rank, dtype=torch.float32, device=x.device) for x in table.x]
        weights = dataclasses.replace(table, n=n, cache={}, checked=True)
        found = table.cache["summed"] = weights, _factors(n, table)
    return found  # type: ignore[return-value]


def _momentum_of(table: TensorTable) -> TensorTable:
    """A table of the momentum as factors. It is kept with the table."""
    found = table.cache.get("momentum")
    if not isinstance(found, TensorTable):
        assert table.n is not None
        found = table.cache["momentum"] = _factors(table.n, table)
    return found


def _factors(n: Sequence[Tensor], table: TensorTable) -> TensorTable:
    return TensorTable(n, table.tensor_ids, row_offsets=table.row_offsets, checked=True)

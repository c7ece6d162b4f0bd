"""Many directions for the price of one: they share V, so that they are one factor, and one pass over the weights adds them all.

sum_i s_i U_i V^T = (sum_i s_i U_i) V^T. The factor in brackets has as many elements as momentum N; making it costs little beside
the weights. It is summed in fp32 in the order of the draws, and its product with V^T is that of a merge, so that the bits are the
same on every backend. Weights in half precision are rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ...kernels import ops, reference
from ...kernels.calls import TableCall
from ...kernels.op_table import MAX_DRAWS, OPS, Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable

Moved = Callable[[Sequence[Tensor], Sequence[int]], Iterable[Tensor]]
""":meth:`Estimator.moved` of what made the directions."""


def add_draws(factors: TensorTable, call: TableCall, backend: Backend) -> None:
    """F <- decay * F + sum of scale * U, for any number of draws: a rounded multiply and a rounded add each, in order."""
    decay = call.decay
    for i in range(0, len(call.draws), MAX_DRAWS):
        part = TableCall(call.seed, call.draws[i : i + MAX_DRAWS], call.scales[i : i + MAX_DRAWS], decay)
        ops.dispatch(OPS["factor_update_"], factors, part, backend)
        decay = None


def add_summed(op: Op, table: TensorTable, call: TableCall, backend: Backend, moved: Moved) -> None:
    """X <- decay * X + F V^T, F = sum of scale * U. With momentum F = sum of scale * U + alpha * moved(N), after N has taken up the
    draws as in :func:`lozo_kernels.ops.lowrank_momentum_`."""
    weights = with_factor(table)
    factors = _factors_of(weights)
    for f in factors.x:
        f.zero_()
    add_draws(factors, dataclasses.replace(call, decay=None), backend)
    if op.momentum:
        assert call.coefficients is not None and table.n is not None
        add_draws(_factors_of(table), TableCall(call.seed, call.draws, call.coefficients, call.beta), backend)
        add_momentum(weights, moved(table.n, table.tensor_ids), call)
    merge_factor(weights, call, None, backend)


def with_factor(table: TensorTable) -> TensorTable:
    """A table of the same weights whose ``n`` is a factor of its own, for the caller to fill. It is kept with the table."""
    found = table.cache.get("with factor")
    if not isinstance(found, TensorTable):
        n = [torch.empty(*x.shape[:2], table.rank, dtype=torch.float32, device=x.device) for x in table.x]
        found = table.cache["with factor"] = dataclasses.replace(table, n=n, cache={}, checked=True)
    return found


def add_momentum(weights: TensorTable, moved: Iterable[Tensor], call: TableCall) -> None:
    """F <- F + alpha * N: F is the factor of ``weights``, N what momentum moves them by."""
    assert weights.n is not None and call.alpha is not None
    for f, n, alpha in zip(weights.n, moved, call.alpha.unbind(), strict=True):
        f.add_(n * alpha)  # two operations, each rounded


def replace_v(table: TensorTable, t: int, new: Tensor, *, reproject: bool) -> None:
    """Gives a tensor of a table its next V (transposed), and with ``reproject`` carries its momentum over to it."""
    assert table.v is not None
    if reproject:
        assert table.n is not None
        table.n[t].copy_(reference.reproject(table.n[t], table.v[t], new))
    table.v[t].copy_(new)


def merge_factor(table: TensorTable, call: TableCall, out: TensorTable | None, backend: Backend) -> None:
    """Merges the factor of a table into ``out`` (None: itself), with the decay and the rounding of a call."""
    merge = TableCall(call.seed, (), call.scales[:0], call.decay, call.rounding, out=out)
    ops.dispatch(OPS["lowrank_merge_"], table, merge, backend)


def _factors_of(table: TensorTable) -> TensorTable:
    """A table of ``n`` as factors. It is kept with the table."""
    found = table.cache.get("factors")
    if not isinstance(found, TensorTable):
        assert table.n is not None
        found = table.cache["factors"] = TensorTable(table.n, table.tensor_ids, row_offsets=table.row_offsets, checked=True)
    return found

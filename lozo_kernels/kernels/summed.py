"""Updates that are one factor and one merge: those with momentum, and those of more draws than one call of an op adds.

All draws of an update share V, so sum_i s_i U_i V^T + alpha N V^T = F V^T with F = sum_i s_i U_i + alpha N. F has as many elements
as N; making it costs little beside the weights. It is summed in fp32 in the order of the draws, and its product with V^T is that of
a merge, so that the bits are the same on every backend. Weights in half precision are rounded once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .calls import TableCall
from .op_table import MAX_DRAWS, OPS, Op
from .table import TensorTable

Run = Callable[[Op, TensorTable, TableCall], None]
"""Runs an op, on factors with U or with what an estimator has in its place."""

_ALIGNMENT = 4  # elements of fp32: GPU kernels move 16 bytes at a time


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A factor F for each weight of a table.

    Attributes:
        weights: a table of the same weights with F as its ``n``.
        factors: F as the factors that ops work on, with the N of the table.
        memory: all F, one after the other.
    """

    weights: TensorTable
    factors: TensorTable
    memory: Tensor


def run_summed(op: Op, table: TensorTable, call: TableCall, run: Run) -> None:
    """X <- decay * X + F V^T, F = sum of scale * U; with momentum F = sum of scale * U + alpha * N, after N took up the draws."""
    scratch = scratch_factor(table)
    scratch.memory.zero_()
    on_factors = OPS["factor_momentum_" if op.momentum else "factor_update_"]
    run(on_factors, scratch.factors, dataclasses.replace(call, decay=None, rounding=None))
    run(OPS["lowrank_merge_"], scratch.weights, TableCall(call.seed, (), call.scales[:0], call.decay, call.rounding))


def run_probed(merge: Op, table: TensorTable, call: TableCall, run: Run) -> None:
    """OUT <- decay * X + (N + scale * U) V^T: a merge with draws, made of one without."""
    scratch = scratch_factor(table)
    assert table.n is not None
    for f, n in zip(scratch.factors.x, table.n, strict=True):
        f.copy_(n)
    run(OPS["factor_update_"], scratch.factors, TableCall(call.seed, call.draws, call.scales))
    out = table if call.out is None else call.out
    run(merge, scratch.weights, dataclasses.replace(call, draws=(), scales=call.scales[:0], out=out))


def run_in_parts(op: Op, factors: TensorTable, call: TableCall, run: Run) -> None:
    """Runs an op on factors that is given more draws than it takes, a few at a time in order."""
    update = OPS["factor_update_"]
    last = (len(call.draws) - 1) // MAX_DRAWS * MAX_DRAWS
    decay, beta = call.decay, call.beta
    for i in range(0, last + 1, MAX_DRAWS):
        some = slice(i, i + MAX_DRAWS)
        part = TableCall(call.seed, call.draws[some], call.scales[some], decay)
        if op.momentum:
            assert call.coefficients is not None and beta is not None
            part.coefficients, part.alpha, part.beta = call.coefficients[some], call.alpha, beta
            if i < last:  # alpha * N comes after all draws
                run(update, momentum_of(factors), TableCall(call.seed, part.draws, part.coefficients, beta))
            beta = torch.ones_like(beta)
        run(op if i == last else update, factors, part)
        decay = None


def add_carried(factors: TensorTable, carried: Iterable[Tensor], alpha: Tensor) -> None:
    """F <- F + alpha * N, with N or what is made of it in ``carried``: a rounded multiply and a rounded add."""
    for f, n, scale in zip(factors.x, carried, alpha.unbind(), strict=True):
        f.add_(n * scale)


def momentum_of(factors: TensorTable) -> TensorTable:
    """The N of factors as factors themselves."""
    cache = factors.cache.setdefault("of momentum", {})
    assert factors.n is not None and isinstance(cache, dict)
    return dataclasses.replace(factors, x=factors.n, n=None, cache=cache, checked=True)


def scratch_factor(table: TensorTable) -> Scratch:
    """The factors of a table that updates are summed in. Their memory, and what backends pack of them, is kept with the table."""
    kept = table.cache.get("scratch factor")
    if not isinstance(kept, _Kept):
        kept = table.cache["scratch factor"] = _make(table)
    weights = dataclasses.replace(table, n=kept.f, cache=kept.of_weights, checked=True)
    factors = dataclasses.replace(
        table, x=kept.f, v=None, global_cols=[table.rank] * len(table), cache=kept.of_factors, checked=True
    )
    return Scratch(weights, factors, kept.memory)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is kept of a scratch: no weight, which a cache may not keep alive."""

    memory: Tensor
    f: Sequence[Tensor]
    of_weights: dict[object, object] = dataclasses.field(default_factory=dict)
    of_factors: dict[object, object] = dataclasses.field(default_factory=dict)


def _make(table: TensorTable) -> _Kept:
    shapes = [(*x.shape[:2], table.rank) for x in table.x]
    sizes = [-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    with torch.inference_mode(False):  # otherwise it could be changed in inference mode only
        memory = torch.empty(sum(sizes), dtype=torch.float32, device=table.device)
        pieces = zip(memory.split(sizes), shapes, strict=True)
        return _Kept(memory, [piece[: math.prod(shape)].view(shape) for piece, shape in pieces])

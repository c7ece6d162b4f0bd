"""The ops: their documentation, the checks of their arguments, and one call of a backend for a whole table of tensors.

Scalars that change from step to step (scales, learning rate, projected gradient) may be numbers or tensors on the table's
device; nothing here reads a tensor's value, so nothing synchronises. Each op changes ``table.x`` (and momentum, V) in place,
touches no other element, and gives the bits of ``reference.py`` on every backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .calls import Draw, Rounding, TableCall
from .checks import LARGEST, check_range
from .compiled import call_operator, name_of, signed_seed
from .noise import MAX_DIRECTION, MAX_DRAW, MAX_RANK, STREAMS, check_draw, check_factor, check_law
from .op_table import MAX_DRAWS, MAX_PARTS, OPS, Op
from .registry import Backend, choose_backend
from .summed import run_in_parts, run_summed
from .table import TensorTable, check_alike

__all__ = [
    "MAX_DRAWS",
    "MAX_PARTS",
    "OPS",
    "Scalars",
    "dense_merge_",
    "dense_momentum_",
    "dense_update_",
    "dispatch",
    "factor",
    "factor_momentum_",
    "factor_update_",
    "lowrank_merge_",
    "lowrank_momentum_",
    "lowrank_signed_update_",
    "lowrank_update_",
    "resample_",
    "run",
]

Scalars = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
"""A number, one per tensor, or one per draw and tensor: anything that broadcasts to the shape in question."""


Signature = ParamSpec("Signature")


def op(**takes: Any) -> Callable[[Callable[Signature, None]], Callable[Signature, None]]:
    """Makes an op of a function's name, signature and docstring; ``takes`` are fields of :class:`Op`."""

    def decorate(function: Callable[Signature, None]) -> Callable[Signature, None]:
        described = OPS[function.__name__] = Op(function.__name__, **takes)

        @functools.wraps(function)
        def call(*args: Signature.args, **kwargs: Signature.kwargs) -> None:
            function(*args, **kwargs)  # only checks the arguments against the signature
            run(described, *args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate


@op(v=True)
def lowrank_update_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    backend: Backend | None = None,
) -> None:
    """X <- decay * X + sum over draws of scale * U V^T, U regenerated from the seed (LOZO, Algorithm 1).

    Args:
        table: low-rank tensors (``v`` given).
        seed: 64-bit seed of the run.
        draws: one or two; two fuse the restore and update of one step with the perturbation of the next.
        scales: broadcastable to (draws, tensors).
        decay: broadcastable to (tensors,): 1 - lr * weight_decay; None for 1.
        rounding: stochastic rounding into bf16 and fp16; None rounds to nearest even.
        backend: default: the best for the table's device.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape, or is out of range; nothing was changed.
    """


@op(v=True, signed=True, draws=(1, 1))
def lowrank_signed_update_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    backend: Backend | None = None,
) -> None:
    """X <- decay * X + (U V^T) o sum over parts of scale_i * r_i s_i^T, with a direction for each part of a batch (GRZO).

    r_i and s_i are random signs of the rows and the columns (docs/noise.md): the directions are diag(r_i) U V^T diag(s_i). The sum
    has i ascending; its product with U V^T is rounded, and so is the sum with X.

    Args:
        table: low-rank tensors (``v`` given).
        draws: one. U is that of direction 0 of its step, and its direction is that of the first part's signs.
        scales: (parts, tensors), or (parts, 1), for up to :data:`MAX_PARTS` parts; fewer dimensions stand for one part.
        seed, decay, rounding, backend: as in :func:`lowrank_update_`.
    """


@op()
def dense_update_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    law: str = "normal",
    backend: Backend | None = None,
) -> None:
    """X <- decay * X + sum over draws of scale * Z (MeZO).

    Args:
        table: dense tensors (without ``v``).
        law: that of Z, "normal" or "rademacher": random signs, which cost one bit each instead of 32.
        seed, draws, scales, decay, rounding, backend: as in :func:`lowrank_update_`.
    """


@op(v=True, n="needed", momentum=True, summed=True)
def lowrank_momentum_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    coefficients: Scalars,
    alpha: Scalars,
    beta: Scalars,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    backend: Backend | None = None,
) -> None:
    """N <- beta * N + sum of coefficient * U, then X <- decay * X + (sum of scale * U + alpha * N) V^T (LOZO-M, Algorithm 2).

    It is :func:`factor_momentum_` into a factor of zeros, and :func:`lowrank_merge_` of that factor, which is kept with the table.

    Args:
        table: low-rank tensors with momentum (``v`` and ``n`` given).
        draws: one or two. A draw that only perturbs has coefficient 0, one that only enters the momentum has scale 0.
        coefficients: broadcastable to (draws, tensors): (1 - beta) * c.
        alpha: broadcastable to (tensors,): -lr / r, signs included.
        beta: broadcastable to (tensors,).
        seed, scales, decay, rounding, backend: as in :func:`lowrank_update_`.
    """


@op(n="needed", momentum=True)
def dense_momentum_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    coefficients: Scalars,
    alpha: Scalars,
    beta: Scalars,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    law: str = "normal",
    backend: Backend | None = None,
) -> None:
    """M <- beta * M + sum of coefficient * Z, then X <- decay * X + sum of scale * Z + alpha * M (MeZO-M).

    Arguments as :func:`lowrank_momentum_`, and ``law`` as :func:`dense_update_`, for a table without V; M is ``table.n``.
    """


@op(factors=True, rounding=False)
def factor_update_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    decay: Scalars | None = None,
    backend: Backend | None = None,
) -> None:
    """F <- decay * F + sum over draws of scale * U: LOZO's update of the factor B of a window, or of the momentum N.

    Args:
        table: the factors as ``x``, (batch, rows, rank) fp32, without V; their row offsets are those of the weights.
        draws: one or two.
        seed, scales, decay, backend: as in :func:`lowrank_update_`.

    Raises:
        TypeError, ValueError: as in :func:`lowrank_update_`; or a factor is not fp32.
    """


@op(factors=True, n="needed", momentum=True, rounding=False)
def factor_momentum_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw],
    scales: Scalars,
    coefficients: Scalars,
    alpha: Scalars,
    beta: Scalars,
    decay: Scalars | None = None,
    backend: Backend | None = None,
) -> None:
    """N <- beta * N + sum of coefficient * U, then F <- decay * F + sum of scale * U + alpha * N: LOZO-M on factors.

    Arguments as :func:`lowrank_momentum_`, for a table as that of :func:`factor_update_` with N as ``table.n``, of F's shape.
    """


@op(v=True, n="needed", draws=(0, 1), out=True)
def lowrank_merge_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw] = (),
    scales: Scalars = 0.0,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    out: TensorTable | None = None,
    backend: Backend | None = None,
) -> None:
    """OUT <- decay * X + (N + scale * U) V^T: merges N into the weights or, with a draw, makes the weights that a probe evaluates.

    The product has k ascending from 0, each after the first by a fused multiply-add: promised in bits at any rank.

    Args:
        table: low-rank tensors with a factor (``v`` and ``n`` given), which are only read.
        draws: none or one.
        out: a table of the same shapes and dtypes whose ``x`` are written instead of ``table.x``.
        seed, scales, decay, rounding, backend: as in :func:`lowrank_update_`.
    """


@op(n="optional", draws=(0, 1), out=True)
def dense_merge_(
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw] = (),
    scales: Scalars = 0.0,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    law: str = "normal",
    out: TensorTable | None = None,
    backend: Backend | None = None,
) -> None:
    """OUT <- decay * X + (N + scale * Z).

    Arguments as :func:`lowrank_merge_`, and ``law`` as :func:`dense_update_`, for a table without V; ``n`` may be missing.
    """


def run(
    op: Op,
    table: TensorTable,
    *,
    seed: int,
    draws: Sequence[Draw] = (),
    scales: Scalars = 0.0,
    decay: Scalars | None = None,
    rounding: Rounding | None = None,
    law: str = "normal",
    coefficients: Scalars | None = None,
    alpha: Scalars | None = None,
    beta: Scalars | None = None,
    out: TensorTable | None = None,
    backend: Backend | None = None,
) -> None:
    """Runs an op of :data:`OPS` after it has checked the arguments.

    Args:
        op: the op; the function of the same name documents the other arguments.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed.
    """
    _check_table(op, table)
    check_range("seed", seed, 1 << 64)
    _check_draws(op, draws, rounding)
    check_law("law", law)
    if op.along_rows and law != "normal":
        raise ValueError(f"law={law!r} is about dense noise, and that of {op.name} is U")
    table.check_positions(factors=op.along_rows, flat=not op.along_rows or rounding is not None)
    if out is not None:
        check_alike(table, out)
    count, device = len(table), table.device
    rows = _parts_of(scales, draws[0]) if op.signed else len(draws)
    call = TableCall(
        seed,
        draws,
        _broadcast(scales, (rows, count), device, "scales"),
        None if decay is None else _broadcast(decay, (count,), device, "decay"),
        rounding,
        out=out,
        law=law,
    )
    if op.momentum:
        assert coefficients is not None and alpha is not None and beta is not None
        call.coefficients = _broadcast(coefficients, (len(draws), count), device, "coefficients")
        call.alpha, call.beta = _broadcast(alpha, (count,), device, "alpha"), _broadcast(beta, (count,), device, "beta")
    if backend is not None:
        _check_backend(backend)
    dispatch(op, table, call, backend)


def dispatch(op: Op, table: TensorTable, call: TableCall, backend: Backend | None) -> None:
    """Runs an op whose arguments are known to be right, by the backend or, in compiled code, by the torch operator.

    Args:
        call: may have any number of draws if the op is on factors, or updates low-rank tensors.
    """
    many = len(call.draws) > op.draws[1]
    compiling = torch.compiler.is_compiling()
    if compiling and not many:
        call_operator(op, table, call, backend)
        return
    if op.out and call.out is None:
        call.out = table
    chosen = choose_backend(table.device).backend if backend is None else backend
    if op.summed or (many and not op.factors):
        run_summed(op, table, call, functools.partial(dispatch, backend=backend))
    elif many and (compiling or not chosen.many_draws):
        run_in_parts(op, table, call, functools.partial(dispatch, backend=backend))
    else:
        chosen.run(op, table, call)


def resample_(table: TensorTable, *, seed: int, window: int, reproject: bool = False, backend: Backend | None = None) -> None:
    """V <- the V of a window; with ``reproject`` also N <- N (V_old^T V_new) / cols (LOZO-M, Algorithm 2, line 6).

    Args:
        table: low-rank tensors. V's global row is ``col_offset + b * global_cols + j`` for matrix b of a batch.
        window: step // interval.
        reproject: also re-project ``table.n``; ``table.v`` must then hold the V under which it was accumulated.

    Raises:
        TypeError, ValueError: an argument does not fit or is out of range, or ``reproject`` without momentum.
    """
    _check_kind(table, v=True, n=reproject)
    check_range("seed", seed, 1 << 64)
    check_range("window", window, MAX_DRAW)
    table.check_positions(factors=True, flat=False)
    if torch.compiler.is_compiling():
        n = table.n if reproject else []
        torch.ops.lozo_kernels.resample_(table.x, table.v, n, table.positions, signed_seed(seed), window, name_of(backend))
        return
    if backend is not None:
        _check_backend(backend)
    (choose_backend(table.device).backend if backend is None else backend).resample_(table, seed, window, reproject)


def factor(
    seed: int,
    rows: int,
    rank: int,
    tensor_id: int,
    draw: Draw,
    *,
    stream: str = "U",
    row_offset: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> Tensor:
    """Makes U, V or S of :func:`noise.factor` by a backend: (rows, rank) fp32 on ``device``, with the same bits.

    Args:
        seed, rows, rank, tensor_id, stream, row_offset: as in :func:`noise.factor`.
        draw: the step (for V the window) and the direction.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backend cannot serve the device.
    """
    device = torch.device(device)
    check_factor(seed, rows, rank, tensor_id, draw.step, stream=stream, row_offset=row_offset, direction=draw.direction)
    if torch.compiler.is_compiling():
        where = (signed_seed(seed), rows, rank, tensor_id, draw.step, draw.direction, STREAMS[stream], row_offset)
        return torch.ops.lozo_kernels.factor(*where, device, name_of(backend))
    if backend is None:
        backend = choose_backend(device).backend
    _check_backend(backend)
    reason = backend.unavailable(device)
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} cannot serve {device}: {reason}")
    return backend.factor(seed, rows, rank, tensor_id, draw, stream=stream, row_offset=row_offset, device=device)


def _check_backend(backend: Backend) -> None:
    if not hasattr(backend, "resample_"):
        raise TypeError(f"backend is an object as choose_backend(device, name).backend is, not {backend!r}")


def _check_kind(table: TensorTable, *, v: bool, n: bool) -> None:
    if not isinstance(table, TensorTable):
        raise TypeError(f"an op works on a TensorTable, not {table!r}")
    if v and table.v is None:
        raise ValueError("this op needs a table with V; dense tensors have ops of their own")
    if not v and table.v is not None:
        raise ValueError("this op is for dense tensors, and the table has V")
    if n and table.n is None:
        raise ValueError("this op needs a table with momentum (n)")


def _check_table(op: Op, table: TensorTable) -> None:
    _check_kind(table, v=op.v, n=op.n == "needed")
    for f in table.x if op.factors else ():
        if f.dtype != torch.float32:
            raise TypeError(f"factors are fp32, not {f.dtype}")
        if not 1 <= f.shape[2] <= MAX_RANK:
            raise ValueError(f"rank is 1 to {MAX_RANK}, not {f.shape[2]}")


def _check_draws(op: Op, draws: Sequence[Draw], rounding: Rounding | None) -> None:
    least, most = op.draws
    if not isinstance(draws, Sequence) or not all(isinstance(draw, Draw) for draw in draws):
        raise TypeError(f"draws is a sequence of Draw, not {draws!r}")
    if not least <= len(draws) <= most:
        takes = "a merge takes one draw at most" if op.out else f"an op takes {least} to {most} draws"
        raise ValueError(f"{takes}, not {len(draws)}")
    for draw in draws:
        check_draw("draw step", draw.step)
        check_range("direction", draw.direction, MAX_DIRECTION)
    if rounding is not None:
        if not isinstance(rounding, Rounding):
            raise TypeError(f"rounding is a Rounding or None, not {rounding!r}")
        check_draw("rounding step", rounding.step)
        check_range("rounding index", rounding.index, MAX_DIRECTION)


def _parts_of(scales: Scalars, draw: Draw) -> int:
    """The parts of a batch that scales are for. Raises TypeError or ValueError if they are too many for an op or for the noise."""
    if isinstance(scales, Tensor):
        parts = scales.shape[0] if scales.dim() > 1 else 1
    else:
        parts = len(scales) if isinstance(scales, Sequence) and len(scales) and isinstance(scales[0], Sequence) else 1
    check_range("the number of parts less 1", parts - 1, min(MAX_PARTS, MAX_DIRECTION - draw.direction))
    return parts


def _broadcast(value: Scalars, shape: tuple[int, ...], device: torch.device, name: str) -> Tensor:
    """Returns the value as a contiguous fp32 tensor of the shape on the device, without waiting for the device."""
    if isinstance(value, (int, float)):
        if LARGEST < abs(value) < math.inf:
            raise ValueError(f"{name} is {value}, which is beyond fp32")
        return torch.full(shape, value, dtype=torch.float32, device=device)
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value, dtype=torch.float32, pin_memory=device.type == "cuda", device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} is a number, a tensor or a nest of numbers that has a shape, not {value!r}") from None
    if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
        raise TypeError(f"{name} is {value.dtype} {value.layout} on {value.device}; it is made of real numbers in storage")
    t = value.detach().to(device, torch.float32, non_blocking=True)
    if t.shape == shape:
        return t.contiguous()
    try:
        return t.expand(shape).contiguous()
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, which does not broadcast to {shape}") from None

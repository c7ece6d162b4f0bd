"""The functions of ``reference.py`` as a backend: slow, correct, and on every device that PyTorch has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import noise, reference
from ..calls import Draw, LayerCall, PointsCall, TableCall
from ..op_table import Op
from ..registry import Backend
from ..table import TensorTable


class EagerBackend(Backend):
    """Plain PyTorch, one tensor after the other. It runs in inference mode, so that weights loaded under it can be changed too."""

    name = "eager"

    def unavailable(self, device: torch.device) -> str | None:
        return "there is no storage to change" if device.type == "meta" else None

    @torch.inference_mode()
    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        function = getattr(reference, op.kernel)
        for t in _tensors(table):
            given = [table.x[t]]
            if op.v:
                assert table.v is not None
                given.append(table.v[t])
            if op.n != "none":
                given.append(None if table.n is None else table.n[t])  # type: ignore[arg-type]
            if op.signed:
                given += [row_signs(table, t, call), column_signs(table, t, call)]
            noise = [_noise(op, table, t, call, draw) for draw in call.draws]
            decay = None if call.decay is None else call.decay[t]
            if op.momentum:
                assert table.n is not None and call.coefficients is not None and call.alpha is not None and call.beta is not None
                terms = reference.MomentumTerms(list(call.coefficients[:, t]), call.alpha[t], call.beta[t])
                y, n = function(*given, noise, list(call.scales[:, t]), terms, decay)
                table.n[t].copy_(n)
            else:
                y = function(*given, noise, list(call.scales[:, t]), decay)
            _store(table, t, y, call)

    @torch.inference_mode()
    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        assert table.v is not None
        for t in _tensors(table):
            v = column_factor(table, t, seed, window)
            if reproject and table.n is not None:
                table.n[t].copy_(reference.reproject(table.n[t], table.v[t], v))
            table.v[t].copy_(v)

    @torch.inference_mode()
    def lowrank_linear_(self, call: LayerCall) -> None:
        for tokens, f, shift in _groups(call):
            y = reference.lowrank_linear(
                call.y[tokens], call.x[tokens], call.v, f, transposed=call.transposed, gain=call.gain, shift=shift
            )
            call.y[tokens] = y.to(call.y.dtype)

    @torch.inference_mode()
    def lowrank_embedding_(self, call: LayerCall) -> None:
        for tokens, f, _ in _groups(call):
            y = reference.lowrank_embedding(call.y[tokens], call.x[tokens], call.v, f, gain=call.gain)
            call.y[tokens] = y.to(call.y.dtype)

    @torch.inference_mode()
    def lowrank_points_(self, call: PointsCall) -> None:
        given = (call.y, call.x, call.v, call.b, call.u, call.directions, call.scales)
        call.y.copy_(reference.lowrank_points(*given, transposed=call.transposed, gain=call.gain))

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        return noise.factor(
            seed, rows, rank, tensor_id, draw.step, stream=stream, row_offset=row_offset, direction=draw.direction, device=device
        )


def _noise(op: Op, table: TensorTable, t: int, call: TableCall, draw: Draw) -> Tensor:
    """The noise that a draw adds to one tensor: U or Z."""
    if not op.along_rows:
        return dense_noise(table, t, call.seed, draw, call.law)
    if op.signed:  # the parts of a batch share U, and their directions tell their signs apart
        draw = Draw(draw.step)
    return _rows_of_u(table, t, table.x[t].shape[2] if op.factors else table.rank, call.seed, draw)


def row_factor(table: TensorTable, t: int, seed: int, draw: Draw) -> Tensor:
    """U of one tensor: (batch, rows, rank) fp32."""
    return _rows_of_u(table, t, table.rank, seed, draw)


def _rows_of_u(table: TensorTable, t: int, rank: int, seed: int, draw: Draw) -> Tensor:
    batch, rows, _ = table.x[t].shape
    u = noise.factor(
        seed,
        batch * rows,
        rank,
        table.tensor_ids[t],
        draw.step,
        row_offset=table.row_offsets[t],
        direction=draw.direction,
        device=table.device,
    )
    return u.view(batch, rows, rank)


def column_factor(table: TensorTable, t: int, seed: int, window: int) -> Tensor:
    """V of one tensor, transposed: (batch, rank, cols) fp16."""
    batch, _, cols = table.x[t].shape
    blocks = [
        noise.factor(
            seed,
            cols,
            table.rank,
            table.tensor_ids[t],
            window,
            stream="V",
            row_offset=table.col_offsets[t] + b * table.global_cols[t],
            device=table.device,
        )
        for b in range(batch)
    ]
    return torch.stack(blocks).transpose(1, 2).to(torch.float16)


def row_signs(table: TensorTable, t: int, call: TableCall) -> Tensor:
    """The signs of one tensor's rows for each part of a batch: (parts, batch, rows) fp32."""
    batch, rows, _ = table.x[t].shape
    return _signs(table, t, call, "row signs", table.row_offsets[t], batch * rows).view(-1, batch, rows)


def column_signs(table: TensorTable, t: int, call: TableCall) -> Tensor:
    """The signs of one tensor's columns for each part of a batch: (parts, batch, cols) fp32."""
    batch, _, cols = table.x[t].shape
    firsts = [table.col_offsets[t] + b * table.global_cols[t] for b in range(batch)]
    return torch.stack([_signs(table, t, call, "column signs", first, cols) for first in firsts], 1)


def _signs(table: TensorTable, t: int, call: TableCall, stream: str, offset: int, count: int) -> Tensor:
    (draw,), parts = call.draws, len(call.scales)
    where = {"stream": stream, "offset": offset, "direction": draw.direction}
    return noise.part_signs(call.seed, parts, count, table.tensor_ids[t], draw.step, **where, device=table.device)  # type: ignore[arg-type]


def dense_noise(table: TensorTable, t: int, seed: int, draw: Draw, law: str) -> Tensor:
    """Z of one tensor: (batch, rows, cols) fp32."""
    return _flat(table, t, lambda numel, offset: noise.dense(
        seed, numel, table.tensor_ids[t], draw.step, offset=offset, direction=draw.direction, law=law, device=table.device
    ))  # fmt: skip


def _flat(table: TensorTable, t: int, make: Callable[[int, int], Tensor]) -> Tensor:
    """Returns ``make(count, first index)`` for the flat elements that a tensor covers, in the tensor's shape."""
    batch, rows, cols = table.x[t].shape
    width, row, col = table.global_cols[t], table.row_offsets[t], table.col_offsets[t]
    if col == 0 and width == cols:
        return make(batch * rows * cols, row * width).view(batch, rows, cols)
    return torch.stack([make(cols, (row + i) * width + col) for i in range(batch * rows)]).view(batch, rows, cols)


def _tensors(table: TensorTable) -> Iterator[int]:
    return (t for t in range(len(table)) if table.x[t].numel())


def _groups(call: LayerCall) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yields the slice of tokens, the factor B + scale * U and the shift of each evaluation."""
    groups = len(call.draws)
    size = len(call.y) // groups
    for g in range(groups):
        step, direction = call.draws[g].tolist()
        u = noise.factor(
            call.seed,
            call.b.shape[0],
            call.b.shape[1],
            call.tensor_id,
            step,
            row_offset=call.row_offset,
            direction=direction,
            device=call.b.device,
        )
        f = reference.factor_update(call.b, [u], [call.scales[g]])
        yield slice(g * size, (g + 1) * size), f, None if call.shift is None else call.shift[g]


def _store(table: TensorTable, t: int, y: Tensor, call: TableCall) -> None:
    x, rounding = (table if call.out is None else call.out).x[t], call.rounding
    if rounding is None or x.dtype == torch.float32:
        x.copy_(reference.round_nearest(y, x.dtype))
        return
    bits = _flat(table, t, lambda numel, offset: noise.rounding_bits(
        call.seed, numel, table.tensor_ids[t], rounding.step, offset=offset, direction=rounding.index, device=table.device
    ))  # fmt: skip
    x.copy_(reference.round_stochastic(y, bits, x.dtype))

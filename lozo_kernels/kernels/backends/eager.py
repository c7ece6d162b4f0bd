"""reference.py as a backend: slow, correct, and on every device that PyTorch has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import noise, reference
from ..calls import Draw, Momentum, Skinny, Update
from ..table import TensorTable


class EagerBackend:
    """Plain PyTorch, one tensor after the other; in inference mode, where weights that were loaded under it can be changed too."""

    name = "eager"

    def unavailable(self, device: torch.device) -> str | None:
        return "there is no storage to change" if device.type == "meta" else None

    def withheld(self, device: torch.device) -> str | None:
        return None

    @torch.inference_mode()
    def lowrank_update_(self, table: TensorTable, update: Update) -> None:
        assert table.v is not None
        for t in _tensors(table):
            us = [row_factor(table, t, update.seed, d) for d in update.draws]
            y = reference.lowrank_update(table.x[t], table.v[t], us, list(update.scales[:, t]), _decay(update, t))
            _store(table, t, y, update)

    @torch.inference_mode()
    def dense_update_(self, table: TensorTable, update: Update) -> None:
        for t in _tensors(table):
            zs = [dense_noise(table, t, update.seed, d) for d in update.draws]
            y = reference.dense_update(table.x[t], zs, list(update.scales[:, t]), _decay(update, t))
            _store(table, t, y, update)

    @torch.inference_mode()
    def lowrank_momentum_(self, table: TensorTable, update: Update, momentum: Momentum) -> None:
        assert table.v is not None and table.n is not None
        for t in _tensors(table):
            us = [row_factor(table, t, update.seed, d) for d in update.draws]
            table.n[t].copy_(reference.momentum(table.n[t], us, list(momentum.coefficients[:, t]), momentum.beta[t]))
            y = reference.lowrank_update(table.x[t], table.v[t], us, list(update.scales[:, t]), _decay(update, t))
            y = reference.apply_momentum(y, reference.momentum_product(table.n[t], table.v[t]), momentum.alpha[t])
            _store(table, t, y, update)

    @torch.inference_mode()
    def dense_momentum_(self, table: TensorTable, update: Update, momentum: Momentum) -> None:
        assert table.n is not None
        for t in _tensors(table):
            zs = [dense_noise(table, t, update.seed, d) for d in update.draws]
            table.n[t].copy_(reference.momentum(table.n[t], zs, list(momentum.coefficients[:, t]), momentum.beta[t]))
            y = reference.dense_update(table.x[t], zs, list(update.scales[:, t]), _decay(update, t))
            _store(table, t, reference.apply_momentum(y, table.n[t], momentum.alpha[t]), update)

    @torch.inference_mode()
    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        assert table.v is not None
        for t in _tensors(table):
            v = column_factor(table, t, seed, window)
            if reproject and table.n is not None:
                table.n[t].copy_(reference.reproject(table.n[t], table.v[t], v))
            table.v[t].copy_(v)

    @torch.inference_mode()
    def factor_update_(self, table: TensorTable, update: Update) -> None:
        for t in _tensors(table):
            f = table.x[t]
            us = [_rows_of_u(table, t, f.shape[2], update.seed, d) for d in update.draws]
            f.copy_(reference.factor_update(f, us, list(update.scales[:, t]), _decay(update, t)))

    @torch.inference_mode()
    def lowrank_merge_(self, table: TensorTable, update: Update, out: TensorTable) -> None:
        assert table.v is not None and table.n is not None
        for t in _tensors(table):
            us = [row_factor(table, t, update.seed, d) for d in update.draws]
            y = reference.lowrank_merge(table.x[t], table.v[t], table.n[t], us, list(update.scales[:, t]), _decay(update, t))
            _store(table, t, y, update, out)

    @torch.inference_mode()
    def dense_merge_(self, table: TensorTable, update: Update, out: TensorTable) -> None:
        for t in _tensors(table):
            zs = [dense_noise(table, t, update.seed, d) for d in update.draws]
            f = None if table.n is None else table.n[t]
            y = reference.dense_merge(table.x[t], f, zs, list(update.scales[:, t]), _decay(update, t))
            _store(table, t, y, update, out)

    @torch.inference_mode()
    def lowrank_linear_(self, call: Skinny) -> None:
        for tokens, f, shift in _groups(call):
            y = reference.lowrank_linear(
                call.y[tokens], call.x[tokens], call.v, f, transposed=call.transposed, gain=call.gain, shift=shift
            )
            call.y[tokens] = y.to(call.y.dtype)

    @torch.inference_mode()
    def lowrank_embedding_(self, call: Skinny) -> None:
        for tokens, f, _ in _groups(call):
            y = reference.lowrank_embedding(call.y[tokens], call.x[tokens], call.v, f, gain=call.gain)
            call.y[tokens] = y.to(call.y.dtype)

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        return noise.factor(
            seed, rows, rank, tensor_id, draw.step, stream=stream, row_offset=row_offset, direction=draw.direction, device=device
        )


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


def dense_noise(table: TensorTable, t: int, seed: int, draw: Draw) -> Tensor:
    """Z of one tensor: (batch, rows, cols) fp32."""
    return _flat(table, t, lambda numel, offset: noise.dense(
        seed, numel, table.tensor_ids[t], draw.step, offset=offset, direction=draw.direction, device=table.device
    ))  # fmt: skip


def _flat(table: TensorTable, t: int, make: Callable[[int, int], Tensor]) -> Tensor:
    """Values of the flat elements that a tensor covers, in its shape."""
    batch, rows, cols = table.x[t].shape
    width, row, col = table.global_cols[t], table.row_offsets[t], table.col_offsets[t]
    if col == 0 and width == cols:
        return make(batch * rows * cols, row * width).view(batch, rows, cols)
    return torch.stack([make(cols, (row + i) * width + col) for i in range(batch * rows)]).view(batch, rows, cols)


def _tensors(table: TensorTable) -> Iterator[int]:
    return (t for t in range(len(table)) if table.x[t].numel())


def _decay(update: Update, t: int) -> Tensor | None:
    return None if update.decay is None else update.decay[t]


def _groups(call: Skinny) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The tokens, the factor B + scale * U and the shift of each evaluation."""
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


def _store(table: TensorTable, t: int, y: Tensor, update: Update, out: TensorTable | None = None) -> None:
    x, rounding = (table if out is None else out).x[t], update.rounding
    if rounding is None or x.dtype == torch.float32:
        x.copy_(reference.round_nearest(y, x.dtype))
        return
    bits = _flat(table, t, lambda numel, offset: noise.rounding_bits(
        update.seed, numel, table.tensor_ids[t], rounding.step, offset=offset, direction=rounding.index, device=table.device
    ))  # fmt: skip
    x.copy_(reference.round_stochastic(y, bits, x.dtype))

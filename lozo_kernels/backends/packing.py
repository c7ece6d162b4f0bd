"""A table as the rows of integers that the kernels read (``lozo_tensor`` of csrc/include/lozo/abi.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..table import DTYPES, TensorTable

FIELDS = (
    *("x", "v", "n", "dtype", "batch", "rows", "cols", "batch_stride", "row_stride"),
    *("tensor_id", "row_offset", "col_offset", "global_cols"),
)
"""The columns, all int64; strides are in elements, ``dtype`` is a position in :data:`~lozo_kernels.table.DTYPES`."""

_FACTOR_LIMIT, _FLAT_LIMIT = 1 << 32, 1 << 42  # positions that the noise counters reach


def pack(table: TensorTable, factors: bool = False) -> Tensor:
    """(tensors, len(FIELDS)) int64, on the CPU.

    Args:
        factors: the tensors are factors themselves, whose noise is that of U.

    Raises:
        ValueError: the noise cannot address a tensor.
    """
    rows = [_row(table, t, factors or table.v is not None) for t in range(len(table))]
    return torch.tensor(rows, dtype=torch.int64).view(len(table), len(FIELDS))


def redirect(rows: Tensor, out: TensorTable) -> Tensor:
    """Packed rows with the addresses and strides of other weights of the same shapes."""
    rows = rows.clone()
    for t, x in enumerate(out.x):
        for name, value in (("x", x.data_ptr()), ("batch_stride", x.stride(0)), ("row_stride", x.stride(1))):
            rows[t, FIELDS.index(name)] = value
    return rows


def _row(table: TensorTable, t: int, low_rank: bool) -> list[int]:
    x = table.x[t]
    batch, rows, cols = x.shape
    row, col, width = table.row_offsets[t], table.col_offsets[t], table.global_cols[t]
    _check_positions(table, t, batch, rows, cols, row, col, width, low_rank)
    return [
        x.data_ptr(),
        table.v[t].data_ptr() if table.v is not None else 0,
        table.n[t].data_ptr() if table.n is not None else 0,
        DTYPES.index(x.dtype),
        batch,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        table.tensor_ids[t],
        row,
        col,
        width,
    ]


def _check_positions(
    table: TensorTable, t: int, batch: int, rows: int, cols: int, row: int, col: int, width: int, low_rank: bool
) -> None:
    """What the noise cannot address, reported as noise.py reports it."""
    if not 0 <= table.tensor_ids[t] < 1 << 32:
        raise ValueError(f"tensor_id is 0 to {(1 << 32) - 1}, not {table.tensor_ids[t]}")
    if min(row, col, width) < 0:
        raise ValueError(f"tensor {t} has a negative offset or width: {row}, {col}, {width}")
    if low_rank:
        end, limit = max(row + batch * rows, col + (batch - 1) * width + cols), _FACTOR_LIMIT
    else:
        end, limit = (row + batch * rows - 1) * width + col + cols, _FLAT_LIMIT
    if batch * rows * cols and end > limit:
        raise ValueError(f"tensor {t} reaches position {end}, beyond {limit}")

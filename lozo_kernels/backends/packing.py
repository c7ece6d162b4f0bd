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


def pack(table: TensorTable) -> Tensor:
    """(tensors, len(FIELDS)) int64, on the CPU.

    Raises:
        ValueError: the noise cannot address a tensor.
    """
    return torch.tensor([_row(table, t) for t in range(len(table))], dtype=torch.int64).view(len(table), len(FIELDS))


def _row(table: TensorTable, t: int) -> list[int]:
    x = table.x[t]
    batch, rows, cols = x.shape
    row, col, width = table.row_offsets[t], table.col_offsets[t], table.global_cols[t]
    _check_positions(table, t, batch, rows, cols, row, col, width)
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


def _check_positions(table: TensorTable, t: int, batch: int, rows: int, cols: int, row: int, col: int, width: int) -> None:
    """What the noise cannot address, reported as noise.py reports it."""
    if not 0 <= table.tensor_ids[t] < 1 << 32:
        raise ValueError(f"tensor_id is 0 to {(1 << 32) - 1}, not {table.tensor_ids[t]}")
    if min(row, col, width) < 0:
        raise ValueError(f"tensor {t} has a negative offset or width: {row}, {col}, {width}")
    if table.v is not None:
        end, limit = max(row + batch * rows, col + (batch - 1) * width + cols), _FACTOR_LIMIT
    else:
        end, limit = (row + batch * rows - 1) * width + col + cols, _FLAT_LIMIT
    if batch * rows * cols and end > limit:
        raise ValueError(f"tensor {t} reaches position {end}, beyond {limit}")

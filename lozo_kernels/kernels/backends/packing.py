"""A table as rows of integers, which is the form that kernels read (``lozo_tensor`` of csrc/include/lozo/abi.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..table import DTYPES, TensorTable

FIELDS = (
    *("x", "v", "n", "dtype", "batch", "rows", "cols", "batch_stride", "row_stride"),
    *("tensor_id", "row_offset", "col_offset", "global_cols"),
)
"""The columns, all int64; strides are in elements, ``dtype`` is a position in :data:`~lozo_kernels.kernels.table.DTYPES`."""


def pack(table: TensorTable, factors: bool = False) -> Tensor:
    """Returns the rows of a table, (tensors, len(FIELDS)) int64, on the CPU.

    Args:
        factors: the tensors are factors themselves, and their noise is U.

    Raises:
        TypeError, ValueError: the noise cannot address a tensor.
    """
    low_rank = factors or table.v is not None
    table.check_positions(factors=low_rank, flat=not low_rank)
    rows = [_row(table, t) for t in range(len(table))]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(table), len(FIELDS))


def redirect(rows: Tensor, out: TensorTable) -> Tensor:
    """Returns packed rows with the weight addresses and strides of another table of the same shapes."""
    rows = rows.clone()
    for t, x in enumerate(out.x):
        for name, value in (("x", x.data_ptr()), ("batch_stride", x.stride(0)), ("row_stride", x.stride(1))):
            rows[t, FIELDS.index(name)] = value
    return rows


def _row(table: TensorTable, t: int) -> list[int]:
    x = table.x[t]
    batch, rows, cols = x.shape
    row, col, width = table.row_offsets[t], table.col_offsets[t], table.global_cols[t]
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

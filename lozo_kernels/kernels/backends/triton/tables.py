"""Functions that read a row of the tensor table (backends/packing.py) and a tile (backends/launches.py) inside a kernel."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(13)


@triton.jit
def tile_at(tiles, index):
    """Returns tensor, matrix, first row, and first column divided by the columns of a tile."""
    tile = tiles + index.to(tl.int64) * 4
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def weights_at(tensors, t, ALIGNED: tl.constexpr):
    """Returns the address of the weights, the batch stride and the row stride."""
    row = tensors + t.to(tl.int64) * FIELDS
    batch_stride = tl.load(row + 7)
    row_stride = tl.load(row + 8)
    if ALIGNED:  # hints go here: Triton 3.6 forgets those on what a function returned
        batch_stride = tl.multiple_of(batch_stride, 8)
        row_stride = tl.multiple_of(row_stride, 8)
    return tl.load(row), batch_stride, row_stride


@triton.jit
def factors_at(tensors, t, ALIGNED: tl.constexpr):
    """Returns pointers to V and N."""
    row = tensors + t.to(tl.int64) * FIELDS
    v = tl.load(row + 1).to(tl.pointer_type(tl.float16))
    n = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        v = tl.multiple_of(v, 16)
    return v, n


@triton.jit
def dtype_at(tensors, t):
    """Returns the dtype code."""
    return tl.load(tensors + t.to(tl.int64) * FIELDS + 3).to(tl.int32)


@triton.jit
def extent_at(tensors, t, ALIGNED: tl.constexpr):
    """Returns the rows and columns of a matrix, int64."""
    row = tensors + t.to(tl.int64) * FIELDS
    width = tl.load(row + 6)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    return tl.load(row + 5), width


@triton.jit
def place_at(tensors, t):
    """Returns tensor id (uint32), row offset, column offset and global columns (int64)."""
    row = tensors + t.to(tl.int64) * FIELDS
    return tl.load(row + 9).to(tl.uint32), tl.load(row + 10), tl.load(row + 11), tl.load(row + 12)

"""Reading one row of the tensor table (backends/packing.py) and one tile (backends/launches.py) inside a kernel."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(13)


@triton.jit
def tile_at(tiles, index):
    """Tensor, matrix, first row, index of the first column in tiles."""
    tile = tiles + index.to(tl.int64) * 4
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def weights_at(tensors, t):
    """Address of the weights, batch stride, row stride."""
    row = tensors + t.to(tl.int64) * FIELDS
    return tl.load(row), tl.load(row + 7), tl.load(row + 8)


@triton.jit
def factors_at(tensors, t):
    """V and the momentum."""
    row = tensors + t.to(tl.int64) * FIELDS
    return tl.load(row + 1).to(tl.pointer_type(tl.float16)), tl.load(row + 2).to(tl.pointer_type(tl.float32))


@triton.jit
def dtype_at(tensors, t):
    """The dtype code."""
    return tl.load(tensors + t.to(tl.int64) * FIELDS + 3).to(tl.int32)


@triton.jit
def extent_at(tensors, t):
    """Rows and columns of a matrix, int64."""
    row = tensors + t.to(tl.int64) * FIELDS
    return tl.load(row + 5), tl.load(row + 6)


@triton.jit
def place_at(tensors, t):
    """Tensor id (uint32); row offset, column offset and global columns (int64)."""
    row = tensors + t.to(tl.int64) * FIELDS
    return tl.load(row + 9).to(tl.uint32), tl.load(row + 10), tl.load(row + 11), tl.load(row + 12)

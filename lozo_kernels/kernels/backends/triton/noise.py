"""The noise contract (lozo_kernels/kernels/noise.py) as Triton functions.

They use plain integer and fp32 operations only: no ``tl.rand``, no libdevice. Kernels that use them are compiled with
``enable_fp_fusion=False``, so that every operation is rounded by itself.
"""

import triton
import triton.language as tl

from .arithmetic import times

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
# The doubles that equal the fp32 bit patterns 0x207c3b8f, 0xa9065b6e, 0x31b0c331, 0x3bd4a59c.
C3 = tl.constexpr(2.1364936556432737e-19)
C2 = tl.constexpr(-2.983327967260793e-14)
C1 = tl.constexpr(5.14446485411213e-09)
C0 = tl.constexpr(0.006489468738436699)
GRID = tl.constexpr(49152.0)
STREAM_U = tl.constexpr(0)
STREAM_V = tl.constexpr(1)
STREAM_Z = tl.constexpr(2)
STREAM_SIGNS = tl.constexpr(4)
STREAM_ROUNDING = tl.constexpr(8)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Returns Philox4x32-10, four uint32 words for every counter. All arguments are uint32 and of one shape, or scalars."""
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * M0
        b = c2.to(tl.uint64) * M1
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = k0 + W0
        k1 = k1 + W1
    return c0, c1, c2, c3


@triton.jit
def normal(w, DP4A: tl.constexpr):
    """Returns fp32 standard normals of uint32 words. DP4A: one NVIDIA instruction sums the four bytes and sets the exponent."""
    if DP4A:
        m = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;", "=r,r", [w], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        pairs = (w & 0x00FF00FF) + ((w >> 8) & 0x00FF00FF)
        m = ((pairs & 0xFFFF) + (pairs >> 16)) | 0x4B000000
    x = m.to(tl.float32, bitcast=True) - 8389118.0  # 2^23 + 510: the sum of the bytes less its mean, exact
    q = x * x
    p = times(q, C3, DP4A)
    p = p + C2
    p = times(p, q, DP4A)
    p = p + C1
    p = times(p, q, DP4A)
    p = p + C0
    return times(x, p, DP4A)


@triton.jit
def seed_words(header):
    """Returns the two words of the key from a launch's header."""
    return tl.load(header).to(tl.uint32, bitcast=True), tl.load(header + 1).to(tl.uint32, bitcast=True)


@triton.jit
def draw_words(header, DRAW: tl.constexpr, STREAM: tl.constexpr):
    """Returns, for draw 0 or 1, the direction in its bits of c1, and c3."""
    direction = tl.load(header + 2 + DRAW).to(tl.uint32) << 8
    c3 = tl.load(header + 5 + DRAW).to(tl.uint32) | (STREAM << 28)
    return direction, c3


@triton.jit
def dense_words(header, DRAW: tl.constexpr, SIGNS: tl.constexpr):
    """Returns :func:`draw_words` for dense noise: signs, or normal numbers."""
    return draw_words(header, DRAW, STREAM_SIGNS if SIGNS else STREAM_Z)


@triton.jit
def factor_quad(c0, c1, tensor_id, c3, k0, k1, DP4A: tl.constexpr):
    """Returns four neighbouring entries of a factor for each counter: c0 is the global row, c1 is column / 4 | direction."""
    zero = c0 * 0
    w0, w1, w2, w3 = philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)
    u0 = (normal(w0, DP4A) + GRID) - GRID
    u1 = (normal(w1, DP4A) + GRID) - GRID
    u2 = (normal(w2, DP4A) + GRID) - GRID
    u3 = (normal(w3, DP4A) + GRID) - GRID
    return u0, u1, u2, u3


@triton.jit
def factor_at(
    rows, tensor_id, direction, c3, k0, k1, ROWS: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr, DP4A: tl.constexpr
):  # fmt: skip
    """Returns (ROWS, COLS) fp32 of a factor at global rows (uint32); columns from RANK on are zero."""
    GROUPS: tl.constexpr = COLS // 4
    c0 = rows[:, None] + tl.zeros([1, GROUPS], dtype=tl.uint32)
    c1 = c0 * 0 + (tl.arange(0, GROUPS).to(tl.uint32)[None, :] | direction)
    u0, u1, u2, u3 = factor_quad(c0, c1, tensor_id, c3, k0, k1, DP4A)
    u = tl.join(tl.join(u0, u2), tl.join(u1, u3)).reshape(ROWS, COLS)
    if RANK < COLS:
        u = tl.where(tl.arange(0, COLS)[None, :] < RANK, u, 0.0)
    return u


@triton.jit
def factor(first, tensor_id, direction, c3, k0, k1, ROWS: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr, DP4A: tl.constexpr):
    """Returns :func:`factor_at` of the ROWS rows from global row ``first`` (uint32) on."""
    rows = first + tl.arange(0, ROWS).to(tl.uint32)
    return factor_at(rows, tensor_id, direction, c3, k0, k1, ROWS, RANK, COLS, DP4A)


@triton.jit
def flat_words(counter, direction, tensor_id, c3, k0, k1):
    """Returns Philox words of flat counters (int64 tensor), whose upper bits go beside the direction."""
    c0 = counter.to(tl.uint32)
    zero = c0 * 0
    c1 = (counter >> 32).to(tl.uint32) | direction
    return philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)


@triton.jit
def sign(w):
    """Returns fp32 -1 for uint32 words whose highest bit is set, and 1 for others."""
    return ((w & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def signs_block(first, offset, direction, tensor_id, c3, k0, k1, COUNT: tl.constexpr):
    """Returns what :func:`dense_block` does for signs. The 8 of a thread have one byte."""
    byte = (first + offset) >> 3
    bytes = (byte & 15).to(tl.uint32) + tl.arange(0, COUNT // 8).to(tl.uint32)  # from the first one's counter on
    c0 = (byte >> 4).to(tl.uint32) + (bytes >> 4)
    zero = c0 * 0
    c1 = zero + ((first >> 39).to(tl.uint32) | direction)
    w0, w1, w2, w3 = philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)
    k = (bytes >> 2) & 3
    w = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3)) >> ((bytes & 3) * 8)
    a = tl.join(tl.join(sign(w << 31), sign(w << 27)), tl.join(sign(w << 29), sign(w << 25)))
    b = tl.join(tl.join(sign(w << 30), sign(w << 26)), tl.join(sign(w << 28), sign(w << 24)))
    return tl.join(a, b).reshape(COUNT)


@triton.jit
def dense_block(
    first, offset, direction, tensor_id, c3, k0, k1, COUNT: tl.constexpr, SIGNS: tl.constexpr, DP4A: tl.constexpr
):  # fmt: skip
    """Returns (COUNT,) fp32 of dense noise from flat element ``first + offset`` on, a multiple of 8. A thread makes 8 neighbours.

    The upper bits of the counters are those of ``first``: only tensors in which they do not change are launched this way.
    """
    if SIGNS:
        return signs_block(first, offset, direction, tensor_id, c3, k0, k1, COUNT)
    else:
        return normal_block(first, offset, direction, tensor_id, c3, k0, k1, COUNT, DP4A)


@triton.jit
def normal_block(first, offset, direction, tensor_id, c3, k0, k1, COUNT: tl.constexpr, DP4A: tl.constexpr):
    """Returns what :func:`dense_block` does for Z."""
    low = ((first + offset) >> 2).to(tl.uint32)
    c0 = low + tl.arange(0, COUNT // 8).to(tl.uint32) * 2
    zero = c0 * 0
    c1 = zero + ((first >> 34).to(tl.uint32) | direction)
    w0, w1, w2, w3 = philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)
    w4, w5, w6, w7 = philox(c0 + 1, c1, zero + tensor_id, zero + c3, k0, k1)
    a = tl.join(tl.join(normal(w0, DP4A), normal(w4, DP4A)), tl.join(normal(w2, DP4A), normal(w6, DP4A)))
    b = tl.join(tl.join(normal(w1, DP4A), normal(w5, DP4A)), tl.join(normal(w3, DP4A), normal(w7, DP4A)))
    return tl.join(a, b).reshape(COUNT)


@triton.jit
def dense_any(element, direction, tensor_id, c3, k0, k1, SIGNS: tl.constexpr, DP4A: tl.constexpr):
    """Returns fp32 of dense noise at arbitrary flat elements (int64 tensor), with a counter for each."""
    words = element >> 5 if SIGNS else element  # each has a normal number, or 32 signs
    w0, w1, w2, w3 = flat_words(words >> 2, direction, tensor_id, c3, k0, k1)
    k = (words & 3).to(tl.int32)
    w = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3))
    if SIGNS:
        return sign(w << (31 - (element & 31).to(tl.uint32)))
    else:
        return normal(w, DP4A)


@triton.jit
def rounding_words(header):
    """Returns, for the rounding bits, the index of the pass in its bits of c1, and c3."""
    index = tl.load(header + 4).to(tl.uint32) << 8
    # The word 8 << 28 as int32 is negative: shift in uint32.
    c3 = tl.load(header + 7).to(tl.uint32) | (tl.full([], 8, tl.uint32) << 28)
    return index, c3


@triton.jit
def rounding_any(element, index, tensor_id, c3, k0, k1):
    """Returns uint32 values below 2^16 at arbitrary flat elements (int64 tensor), with a counter for each."""
    w0, w1, w2, w3 = flat_words(element >> 3, index, tensor_id, c3, k0, k1)
    k = (element & 7).to(tl.int32)
    w = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
    return tl.where((k & 1) == 0, w & 0xFFFF, w >> 16)


@triton.jit
def half_words(w0, w1, w2, w3):
    """Returns the eight half-words of four words, in order, in three new dimensions."""
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(low, high)


@triton.jit
def rounding_rows(first, index, tensor_id, c3, k0, k1, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns (ROWS, COLS) uint32 values below 2^16; ``first`` (ROWS, 1) int64 is the flat element of each row's first column."""
    c0 = (first >> 3).to(tl.uint32) + tl.arange(0, COLS // 8).to(tl.uint32)[None, :]
    zero = c0 * 0
    c1 = zero + ((first >> 35).to(tl.uint32) | index)
    w0, w1, w2, w3 = philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)
    return half_words(w0, w1, w2, w3).reshape(ROWS, COLS)


@triton.jit
def rounding_block(first, offset, index, tensor_id, c3, k0, k1, COUNT: tl.constexpr):
    """Returns (COUNT,) uint32 values below 2^16 from flat element ``first + offset`` on, as :func:`dense_block` does."""
    c0 = ((first + offset) >> 3).to(tl.uint32) + tl.arange(0, COUNT // 8).to(tl.uint32)
    zero = c0 * 0
    c1 = zero + ((first >> 35).to(tl.uint32) | index)
    w0, w1, w2, w3 = philox(c0, c1, zero + tensor_id, zero + c3, k0, k1)
    return half_words(w0, w1, w2, w3).reshape(COUNT)

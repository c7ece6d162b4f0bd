"""The noise contract once more, in numpy and without the library: what every implementation is compared with."""

import numpy as np

F32, U64 = np.float32, np.uint64
C0, C1, C2, C3 = np.array([0x3BD4A59C, 0x31B0C331, 0xA9065B6E, 0x207C3B8F], np.uint32).view(F32)
STREAM = {"U": 0, "V": 1, "Z": 2, "S": 3, "signs": 4, "row signs": 5, "column signs": 6, "rounding": 8}
LOW = U64(0xFFFFFFFF)


def philox(seed, c0, c1, c2, c3):
    x = [np.asarray(c, U64) & LOW for c in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = x[0] * U64(0xD2511F53), x[2] * U64(0xCD9E8D57)
        x = [(b >> U64(32)) ^ x[1] ^ U64(k0), b & LOW, (a >> U64(32)) ^ x[3] ^ U64(k1), a & LOW]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(x, -1).astype(np.uint32)


def normal(w):
    x = w.view(np.uint8).reshape(*w.shape, 4).sum(-1).astype(np.int32).astype(F32) - F32(510)
    q = x * x
    p = q * C3
    p = (p + C2) * q
    p = (p + C1) * q
    return x * (p + C0)


def factor(seed, rows, rank, tensor_id, draw, stream="U", row_offset=0, direction=0):
    i = np.arange(row_offset, row_offset + rows)[:, None]
    k = np.arange(-(-rank // 4))[None, :] | direction << 8
    z = normal(philox(seed, i, k, tensor_id, STREAM[stream] << 28 | draw)).reshape(rows, -(-rank // 4) * 4)[:, :rank]
    return (z + F32(49152)) - F32(49152)


def _flat(seed, numel, tensor_id, c3, offset, direction, shift):
    e = np.arange(offset, offset + numel, dtype=U64)
    q = e >> U64(shift)
    return philox(seed, q & LOW, (q >> U64(32)) | U64(direction << 8), tensor_id, c3), e


def _signs(seed, numel, tensor_id, c3, offset, direction):
    words, e = _flat(seed, numel, tensor_id, c3, offset, direction, 7)
    word = words[np.arange(numel), (e >> U64(5) & U64(3)).astype(int)]
    return np.where(word >> (e & U64(31)).astype(np.uint32) & np.uint32(1), F32(-1), F32(1))


def part_signs(seed, parts, count, tensor_id, draw, stream, offset=0, direction=0):
    c3 = STREAM[stream] << 28 | draw
    return np.stack([_signs(seed, count, tensor_id, c3, offset, direction + i) for i in range(parts)])


def dense(seed, numel, tensor_id, draw, offset=0, direction=0, law="normal"):
    if law == "rademacher":
        return _signs(seed, numel, tensor_id, STREAM["signs"] << 28 | draw, offset, direction)
    words, e = _flat(seed, numel, tensor_id, STREAM["Z"] << 28 | draw, offset, direction, 2)
    return normal(words[np.arange(numel), (e & U64(3)).astype(int)].copy())


def rounding_bits(seed, numel, tensor_id, draw, offset=0, direction=0):
    words, e = _flat(seed, numel, tensor_id, STREAM["rounding"] << 28 | draw, offset, direction, 3)
    half = (e & U64(7)).astype(int)
    return (words[np.arange(numel), half >> 1] >> (16 * (half & 1)).astype(np.uint32) & np.uint32(0xFFFF)).astype(np.int32)

"""The noise contract, version 1: a value depends on its coordinates only.

Every random number of this library is a pure function of (seed, stream, tensor id, draw, direction, position): never of the
device, the tile shape, the launch order or the sharding. This module is the plain PyTorch form of that function and the truth
that every backend is held to, bit for bit. ``docs/noise.md`` states the statistics of the distribution.

Philox4x32-10 (Salmon et al., SC'11) turns a 128-bit counter into four 32-bit words:

* key ``(seed low word, seed high word)``;
* ``c2`` = tensor id, ``c3 = stream << 28 | draw`` with ``draw < 2**28``: the step, or for V the window ``step // interval``;
* U, V, S at ``[i, k]``: ``c0 = i``, ``c1 = (k >> 2) | direction << 8``, word ``k & 3``;
* Z at flat element ``e``: ``c0 = low 32 bits of e >> 2``, ``c1 = e >> 34 | direction << 8``, word ``e & 3``;
* signs at flat element ``e``, and row signs at row ``e`` and column signs at column ``e``: ``c0 = low 32 bits of e >> 7``,
  ``c1 = e >> 39 | direction << 8``, bit ``e & 31`` of word ``(e >> 5) & 3``;
* rounding bits at flat element ``e``: ``c0 = low 32 bits of e >> 3``, ``c1 = e >> 35 | direction << 8``, half-word ``e & 7``.

Dense directions are Z (the law "normal") or signs ("rademacher"): -1 where the bit is set, else 1.

A word becomes a standard normal from the sum of its four bytes by an odd polynomial of degree 7, every operation rounded to
fp32 and never contracted. U, V and S are then rounded to multiples of 2**-8, which makes ``U @ V.T`` a sum of integers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .checks import check_integer, check_range

NOISE_VERSION = 1
"""Version of the noise. Checkpoints store it, so that a run is never resumed with other noise."""
CONTRACT_VERSION = 3
"""Version of all promised bits: the noise, and what is computed with it. Later versions than the noise's changed sums, and no noise
(docs/noise.md). Checkpoints of runs with such sums store theirs instead."""

STREAMS = {"U": 0, "V": 1, "Z": 2, "S": 3, "signs": 4, "row signs": 5, "column signs": 6, "rounding": 8}
LAWS = ("normal", "rademacher")
"""The laws that dense directions can have: normal numbers (stream Z), or signs, each 1 or -1 with the same probability."""
MAX_DRAW = 1 << 28
MAX_RANK = 64
MAX_DIRECTION = 1 << 24
GRID = 49152.0
"""1.5 * 2^15: adding and subtracting it rounds an fp32 of magnitude below 2^14 to a multiple of 2^-8."""

# C3 to C0 of docs/noise.md as the doubles that equal their fp32 bit patterns (0x207c3b8f, 0xa9065b6e, 0x31b0c331, 0x3bd4a59c).
_COEFFICIENTS = tuple(float.fromhex(h) for h in ("0x1.f8771ep-63", "-0x1.0cb6dcp-45", "0x1.618662p-28", "0x1.a94b38p-8"))
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 20  # counters of four values expanded at once; bounds the int64 temporaries of this slow path to some 64 MiB


def tensor_id(name: str) -> int:
    """The 32-bit id of a parameter: BLAKE2s of its canonical name, so that it survives reordering, subsetting and sharding."""
    if not isinstance(name, str):
        raise TypeError(f"a parameter's name is a string, not {name!r}")
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def tensor_ids(names: Iterable[str]) -> dict[str, int]:
    """Returns the ids of several names: that of :func:`tensor_id`, unless two names share it, since their noise would be identical.

    The alphabetically first of such names keeps it. The others are hashed again, with a number after them, until an id is free. So
    an id depends on the set of names, not on their order, and on the other names only where two collide.
    """
    every = sorted(set(names))
    owners: dict[int, str] = {}
    for name in every:
        owners.setdefault(tensor_id(name), name)
    ids = {name: i for i, name in owners.items()}
    for name in every:
        if name not in ids:
            again = (tensor_id(f"{name}\0{attempt}") for attempt in itertools.count(1))
            ids[name] = next(i for i in again if owners.setdefault(i, name) == name)
    return ids


def philox(seed: int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int) -> Tensor:
    """Philox4x32-10 of a batch of counters.

    Args:
        seed: 64-bit key.
        c0: (n,) int64, values below 2**32.
        c1, c2, c3: (n,) int64, a number or a 0-dim int64 tensor; all below 2**32.

    Returns:
        (n, 4) int64 words in [0, 2**32).
    """
    x0, x1, x2, x3 = c0, _words(c1, c0), _words(c2, c0), _words(c3, c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64, so their bits are those of the unsigned product.
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = ((b >> 32) & _MASK) ^ x1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((x0, x1, x2, x3), -1)


def _words(value: Tensor | int, like: Tensor) -> Tensor:
    return value.expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)


def normal(words: Tensor) -> Tensor:
    """fp32 standard normals from 32-bit words, one each (variance 0.99998, kurtosis 3.0000, |z| < 4.9)."""
    byte_sum = (words & 255) + ((words >> 8) & 255) + ((words >> 16) & 255) + ((words >> 24) & 255)
    x = (byte_sum - 510).to(torch.float32)
    q = x * x
    p = q * _COEFFICIENTS[0]
    for c in _COEFFICIENTS[1:-1]:
        p = (p + c) * q
    return x * (p + _COEFFICIENTS[-1])


def to_grid(z: Tensor) -> Tensor:
    """fp32 values rounded to the nearest multiple of 2**-8."""
    return (z + GRID) - GRID


def factor(
    seed: int,
    rows: int,
    rank: int,
    tensor_id: int,
    draw: int | Tensor,
    *,
    stream: str = "U",
    row_offset: int = 0,
    direction: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes a random factor: U (one per step), V (one per window) or S (SubZero's core).

    Args:
        seed: 64-bit seed of the run.
        rows: number of rows to make; ``row_offset`` is the global index of the first.
        rank: columns, 1 to 64. Ranks nest: rank 2 is the first two columns of rank 4.
        tensor_id: see :func:`tensor_id`.
        draw: the step for U and S, the window (step // interval) for V; a 0-dim int64 tensor is used without being read.
        stream: "U", "V" or "S".
        direction: index among the directions of one step.

    Returns:
        (rows, rank) fp32 of multiples of 2**-8.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
    """
    check_factor(seed, rows, rank, tensor_id, draw, stream=stream, row_offset=row_offset, direction=direction)
    groups = (rank + 3) // 4
    out = torch.empty(rows, rank, dtype=torch.float32, device=device)
    chunk = max(1, _CHUNK // groups)
    for start in range(0, rows, chunk):
        size = min(chunk, rows - start)
        i = torch.arange(row_offset + start, row_offset + start + size, device=device, dtype=torch.int64).repeat_interleave(groups)
        k = torch.arange(groups, device=device, dtype=torch.int64).repeat(size) | direction << 8
        words = philox(seed, i, k, tensor_id, STREAMS[stream] << 28 | draw)
        out[start : start + size] = to_grid(normal(words)).view(size, groups * 4)[:, :rank]
    return out


def cores(
    seed: int,
    rank: int,
    owners: Sequence[tuple[int, int]],
    draw: int,
    *,
    direction: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes the cores S of SubZero for many matrices at once. Raises as :func:`factor`.

    Args:
        seed, rank, direction: as in :func:`factor`; ``draw`` is the step.
        owners: for each matrix its tensor id and its index in the tensor's batch.

    Returns:
        (matrices, rank, rank) fp32. The core of matrix b is rows ``b * rank`` to ``(b + 1) * rank - 1`` of ``factor(stream="S")``.
    """
    check_factor(seed, 0, rank, 0, draw, stream="S", row_offset=0, direction=direction)
    if not isinstance(owners, Sequence) or not all(isinstance(o, Sequence) and len(o) == 2 for o in owners):
        raise TypeError(f"owners is a sequence of pairs, a tensor id and the index of a matrix, not {owners!r}")
    for tensor, batch in owners:
        check_integer("the index of a matrix", batch)
        check_factor(seed, rank, rank, tensor, draw, stream="S", row_offset=batch * rank, direction=direction)
    groups = (rank + 3) // 4
    places = torch.tensor(owners, dtype=torch.int64, device="cpu").reshape(-1, 2).to(device)
    i = (places[:, 1:] * rank + torch.arange(rank, device=device, dtype=torch.int64)).flatten().repeat_interleave(groups)
    k = torch.arange(groups, device=device, dtype=torch.int64).repeat(len(owners) * rank) | direction << 8
    words = philox(seed, i, k, places[:, 0].repeat_interleave(rank * groups), STREAMS["S"] << 28 | draw)
    return to_grid(normal(words)).view(len(owners), rank, groups * 4)[..., :rank].contiguous()


def dense(
    seed: int,
    numel: int,
    tensor_id: int,
    draw: int | Tensor,
    *,
    offset: int = 0,
    direction: int = 0,
    law: str = "normal",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes dense noise: Z (MeZO, and every one-dimensional tensor), or signs in its place. Raises as :func:`factor`.

    Args:
        seed, tensor_id, draw, direction: as in :func:`factor`; ``draw`` is the step.
        numel: number of values; ``offset`` is the global flat index of the first.
        law: one of :data:`LAWS`.

    Returns:
        (numel,) fp32.
    """
    check_law("law", law)
    _check(seed, numel, tensor_id, draw, offset, direction, limit=1 << 42)
    out = torch.empty(numel, dtype=torch.float32, device=device)
    if law == "rademacher":
        for piece, bits in _flat_words(seed, numel, tensor_id, STREAMS["signs"] << 28 | draw, offset, direction, 128, device):
            out[piece] = 1 - 2 * bits
        return out
    for piece, words in _flat_words(seed, numel, tensor_id, STREAMS["Z"] << 28 | draw, offset, direction, 4, device):
        out[piece] = normal(words)
    return out


def part_signs(
    seed: int,
    parts: int,
    count: int,
    tensor_id: int,
    draw: int | Tensor,
    *,
    stream: str,
    offset: int = 0,
    direction: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes the signs of the rows or of the columns of a matrix for each part of a batch (GRZO). Raises as :func:`factor`.

    Args:
        seed, tensor_id: as in :func:`factor`; ``draw`` is the step.
        parts: how many parts, of which the first has the direction ``direction``.
        count: rows or columns; ``offset`` is the global index of the first.
        stream: "row signs" or "column signs".

    Returns:
        (parts, count) fp32 of 1 and -1.
    """
    _check(seed, count, tensor_id, draw, offset, direction, limit=1 << 32)
    check_range("parts", parts, MAX_DIRECTION + 1 - direction)
    words = sign_words(seed, [(tensor_id, stream, offset, count)], draw, parts, direction=direction, device=device)
    return unpack_signs(words, offset, count)


def sign_words(
    seed: int,
    places: Sequence[tuple[int, str, int, int]],
    draw: int | Tensor,
    parts: int,
    *,
    direction: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes the words that hold the signs of many matrices at once, for :func:`unpack_signs`.

    Args:
        places: for each run of signs its tensor id, stream, first global index and count. :func:`sign_counters` says how many
            counters it has.
        seed, draw, parts, direction: as in :func:`part_signs`.

    Returns:
        (parts, 4 * counters of all places) int32.
    """
    spans = [(first >> 7, sign_counters(first, count)) for _, _, first, count in places]
    lengths = torch.tensor([length for _, length in spans], dtype=torch.int64, device="cpu").to(device)
    begins = torch.tensor([begin for begin, _ in spans], dtype=torch.int64, device="cpu").to(device)
    owners = torch.tensor([(i, STREAMS[stream] << 28) for i, stream, _, _ in places], dtype=torch.int64, device="cpu").to(device)
    total = sum(length for _, length in spans)
    ids, c3 = owners.repeat_interleave(lengths, 0, output_size=total).unbind(1)
    c0 = torch.arange(total, dtype=torch.int64, device=device)
    c0 = c0 - (lengths.cumsum(0) - lengths - begins).repeat_interleave(lengths, output_size=total)
    out = torch.empty(parts, total, 4, dtype=torch.int32, device=device)
    some = max(1, _CHUNK // max(1, total))
    for i in range(0, parts, some):
        size = min(some, parts - i)
        c1 = torch.arange(direction + i, direction + i + size, dtype=torch.int64, device=device).repeat_interleave(total) << 8
        words = philox(seed, c0.repeat(size), c1, ids.repeat(size), (c3 | draw).repeat(size))
        out[i : i + size] = words.view(size, total, 4).to(torch.int32)
    return out.view(parts, total * 4)


def sign_counters(first: int, count: int) -> int:
    """The counters that a run of ``count`` signs from global index ``first`` on takes, of 128 signs each."""
    return (first + count + 127 >> 7) - (first >> 7) if count else 0


def unpack_signs(words: Tensor, first: int, count: int) -> Tensor:
    """Returns the signs of one place of :func:`sign_words`: (parts, count) fp32 of 1 and -1.

    Args:
        words: (parts, 4 * counters of the place) int32.
        first, count: those of the place.
    """
    skipped = first & 127
    return (1 - 2 * _bits(words).flatten(1)[:, skipped : skipped + count]).to(torch.float32)


def rounding_bits(
    seed: int,
    numel: int,
    tensor_id: int,
    draw: int | Tensor,
    *,
    offset: int = 0,
    direction: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes uniform 16-bit integers for stochastic rounding. Raises as :func:`factor`.

    Args:
        seed, tensor_id, numel, offset: as in :func:`dense`.
        draw: the step; ``direction`` counts the stochastically rounded passes of one step.

    Returns:
        (numel,) int32 in [0, 2**16).
    """
    _check(seed, numel, tensor_id, draw, offset, direction, limit=1 << 42)
    out = torch.empty(numel, dtype=torch.int32, device=device)
    for piece, halves in _flat_words(seed, numel, tensor_id, STREAMS["rounding"] << 28 | draw, offset, direction, 8, device):
        out[piece] = halves
    return out


def _flat_words(
    seed: int,
    numel: int,
    tensor_id: int,
    c3: int | Tensor,
    offset: int,
    direction: int,
    per: int,
    device: torch.device | str,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice of the range, its int64 values), with ``per`` values from each counter: 4 words of 32 bits, 8 of 16, or 128
    single bits."""
    end, chunk = offset + numel, max(1, _CHUNK * 4 // per)
    for start in range(offset // per, -(-end // per), chunk):
        stop = min(start + chunk, -(-end // per))
        q = torch.arange(start, stop, device=device, dtype=torch.int64)
        values = philox(seed, q & _MASK, (q >> 32) | direction << 8, tensor_id, c3)
        if per == 8:
            values = torch.stack((values & 0xFFFF, values >> 16), -1)
        elif per == 128:
            values = _bits(values)
        lo, hi = max(offset, start * per), min(end, stop * per)
        yield slice(lo - offset, hi - offset), values.view(-1)[lo - start * per : hi - start * per]


def _bits(words: Tensor) -> Tensor:
    """The 32 bits of each word, lowest first, in a dimension of their own."""
    return words.unsqueeze(-1) >> torch.arange(32, dtype=words.dtype, device=words.device) & 1


def check_factor(
    seed: int, rows: int, rank: int, tensor_id: int, draw: int | Tensor, *, stream: str, row_offset: int, direction: int
) -> None:
    """Raises TypeError or ValueError for coordinates of a factor that are out of range."""
    if stream not in ("U", "V", "S"):
        raise ValueError(f"stream is 'U', 'V' or 'S', not {stream!r}")
    check_integer("rank", rank)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is 1 to {MAX_RANK}, not {rank}")
    _check(seed, rows, tensor_id, draw, row_offset, direction, limit=1 << 32)


def check_law(name: str, law: object) -> None:
    """Raises ValueError unless it is a law of dense directions."""
    if law not in LAWS:
        raise ValueError(f"{name} is one of {', '.join(map(repr, LAWS))}, not {law!r}")


def check_draw(name: str, draw: int | Tensor) -> None:
    """Raises TypeError or ValueError unless it is a step or window: a number, or a 0-dim int64 tensor, whose value is not read."""
    if isinstance(draw, Tensor):
        if draw.dim() or draw.dtype != torch.int64 or draw.device.type == "meta" or draw.layout != torch.strided:
            raise ValueError(
                f"{name} is a number or a 0-dim int64 tensor, not {tuple(draw.shape)} {draw.dtype} {draw.layout} on {draw.device}"
            )
    else:
        check_range(name, draw, MAX_DRAW)


def _check(seed: int, count: int, tensor_id: int, draw: int | Tensor, offset: int, direction: int, limit: int) -> None:
    for name, value, bound in (
        ("seed", seed, 1 << 64),
        ("tensor_id", tensor_id, 1 << 32),
        ("direction", direction, MAX_DIRECTION),
    ):
        check_range(name, value, bound)
    check_draw("draw", draw)
    check_integer("the number of values", count)
    check_integer("the offset", offset)
    if count < 0 or offset < 0 or offset + count > limit:
        raise ValueError(f"positions {offset} to {offset + count} are outside 0 to {limit}")

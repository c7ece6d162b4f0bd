"""What GPU kernels are launched on: a table of tensors, lists of tiles, and a header that says which noise to make.

One launch serves all tiles of a dtype whose tensors allow 128-bit access; one more serves all other tensors, of any dtype. The
data lie on the device and are made once per table. They hold addresses, so a new table is made when storage moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls import Draw, Rounding, TableCall
from ..table import DTYPES, TensorTable
from .packing import FIELDS, pack, redirect

ANY_DTYPE = -1
"""Stands in place of a dtype code if the kernel reads the code of every tensor."""

HEADER = ("seed_low", "seed_high", "direction_0", "direction_1", "rounding_index", "step_0", "step_1", "rounding_step")
"""The int32 words that say which noise a launch makes."""

_FIRST_STEP = HEADER.index("step_0")
_VECTOR = 8  # where columns, strides and offsets are multiples of it, access to every dtype and to V may be 128 bits wide
_UPPER_BITS = 34  # higher bits of a flat position go into another word of the counter, which is constant in an aligned tensor
_LEAST_BYTES = 4 << 20  # a dtype whose aligned tensors have fewer bytes gets no launch of its own
_MOST_SOURCES = 4  # the most tables whose merges into it a table of outputs keeps a device form for
_AT = {name: i for i, name in enumerate(FIELDS)}


@dataclasses.dataclass(frozen=True)
class Tile:
    """The part of a matrix that one program or block works on."""

    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """The tiles of one launch.

    Attributes:
        dtype: code of the one dtype of all its tensors, or :data:`ANY_DTYPE`.
        aligned: every access may be 128 bits wide, which holds for one dtype and not for :data:`ANY_DTYPE`.
        tiles: (count, 4) int32 on the device: tensor, matrix, first row, first column divided by the columns of a tile.
    """

    dtype: int
    aligned: bool
    tiles: Tensor

    def __len__(self) -> int:
        return len(self.tiles)


TileOf = Callable[[int], Tile]
"""Returns the tile for a dtype code or :data:`ANY_DTYPE`."""


class Headers:
    """Makes headers on a device, and keeps those that captured passes copy from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def words(self, seed: int, draws: Sequence[Draw], rounding: Rounding | None = None) -> Tensor:
        """Returns the words of :data:`HEADER`, (8,) int32 on the device, without waiting for the device.

        A step that is a tensor is copied on the device. Under stream capture only such steps may be new: the other words must
        have been used before (in the warm-up that capturing needs anyway). Callers only read the result, so it can be shared.
        """
        missing = 2 - len(draws)
        constant = (
            *(seed & 0xFFFFFFFF, seed >> 32),
            *(d.direction for d in draws),
            *[0] * missing,
            0 if rounding is None else rounding.index,
        )
        steps = [*(d.step for d in draws), *[0] * missing, 0 if rounding is None else rounding.step]
        tensors = {i: s for i, s in enumerate(steps) if isinstance(s, Tensor)}
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not tensors and (draws or rounding is not None):
            if capturing:  # the graph would copy the words from host memory that is used for something else by then
                raise RuntimeError("a captured pass needs its step as a tensor on the device: see capture_step()")
            return _recent((*constant, *steps), self._device)  # type: ignore[arg-type]
        numbers = tuple(0 if isinstance(s, Tensor) else s for s in steps)
        key = constant + numbers
        base = self._kept.get(key)
        if base is None:
            if capturing:
                raise RuntimeError("run the step once before capturing it: its noise header cannot be filled during a capture")
            base = self._kept[key] = _upload(key, self._device)
        if not tensors:
            return base
        header = base.clone()
        for i, s in tensors.items():
            header[_FIRST_STEP + i] = s
        return header


class DeviceTable:
    """A table in the form that GPU kernels read.

    Attributes:
        tensors: (tensors, 13) int64 on the device with the columns :data:`~.packing.FIELDS`. A contiguous dense tensor is one row
            of all its elements here, and its extents and offsets say so.
        outputs: the same for the weights that are written. It is ``tensors`` itself unless ``out`` is given.
        headers: makes the headers of its launches.
        prepared: what a backend has prepared to launch on it, under keys of the backend's own.

    Args:
        out: a table of the same shapes whose weights are written.
        factors: the tensors are factors themselves.
    """

    def __init__(self, table: TensorTable, out: TensorTable | None = None, factors: bool = False) -> None:
        rows = pack(table, factors)
        written = rows if out is None else redirect(rows, out)
        if table.v is None and not factors:
            flat = _is_flat(rows) & _is_flat(written)
            rows, written = _flatten(rows, flat), _flatten(written, flat)
        self._rows, self._written = rows, written
        self._device = table.device
        self.tensors = rows.to(self._device)
        self.outputs = self.tensors if out is None else written.to(self._device)
        self._launches: dict[object, list[Launch]] = {}
        self._row_tiles: dict[int, Tensor] = {}
        self._matrices: Tensor | None = None
        self._factor_starts: tuple[Tensor, int] | None = None
        self.prepared: dict[object, list[Any]] = {}
        self.headers = Headers(self._device)

    def launches(self, key: object, tile_of: TileOf) -> list[Launch]:
        """Returns launches that together cover every element once.

        Args:
            key: stands for ``tile_of``: with the same key the same launches are returned.
        """
        if key not in self._launches:
            self._launches[key] = self._make_launches(tile_of)
        return self._launches[key]

    def row_tiles(self, rows: int) -> Tensor:
        """Tiles over the rows of the factors N, (count, 4) int32: tensor, matrix, first row, index in :meth:`matrices`."""
        if rows not in self._row_tiles:
            filled = _filled(self._rows)
            tiles = _tiles(self._rows, filled, Tile(rows, 0))
            batch = torch.where(filled, self._rows[:, _AT["batch"]], 0)
            before = (batch.cumsum(0) - batch).to(torch.int32)
            tiles[:, 3] = before[tiles[:, 0]] + tiles[:, 1]
            self._row_tiles[rows] = tiles.to(self._device)
        return self._row_tiles[rows]

    def matrices(self) -> Tensor:
        """One entry for each matrix, (count, 4) int32: tensor, matrix, 0, 0."""
        if self._matrices is None:
            self._matrices = _tiles(self._rows, _filled(self._rows), Tile(0, 0)).to(self._device)
        return self._matrices

    def factor_starts(self) -> tuple[Tensor, int]:
        """Where each tensor's rows begin among the rows of all, (tensors,) int64 on the device, and how many there are."""
        if self._factor_starts is None:
            counts = self._rows[:, _AT["batch"]] * self._rows[:, _AT["rows"]]
            self._factor_starts = (counts.cumsum(0) - counts).to(self._device), int(counts.sum())
        return self._factor_starts

    def header(self, call: TableCall) -> Tensor:
        """The words of :data:`HEADER` for a call."""
        return self.headers.words(call.seed, call.draws, call.rounding)

    def _make_launches(self, tile_of: TileOf) -> list[Launch]:
        rows = self._rows
        filled = _filled(rows)
        aligned = filled & _vectorises(rows) & _vectorises(self._written)
        launches = []
        for code, dtype in enumerate(DTYPES):
            of_dtype = aligned & (rows[:, _AT["dtype"]] == code)
            elements = int(rows[of_dtype][:, [_AT["batch"], _AT["rows"], _AT["cols"]]].prod(1).sum())
            if len(rows) > 1 and elements * dtype.itemsize < _LEAST_BYTES:
                aligned &= ~of_dtype
            elif elements:
                launches.append(Launch(code, True, _tiles(rows, of_dtype, tile_of(code)).to(self._device)))
        rest = filled & ~aligned
        if bool(rest.any()):
            launches.append(Launch(ANY_DTYPE, False, _tiles(rows, rest, tile_of(ANY_DTYPE)).to(self._device)))
        return launches


def device_table(table: TensorTable, factors: bool = False) -> DeviceTable:
    """The device form of a table (with ``factors``, of a table of factors), made at the first use and kept with the table."""
    key = "gpu factors" if factors else "gpu"
    found = table.cache.get(key)
    if not isinstance(found, DeviceTable):
        found = table.cache[key] = DeviceTable(table, factors=factors)
    return found


def merge_table(table: TensorTable, out: TensorTable) -> DeviceTable:
    """The device form of a table whose results are written to the weights of ``out``.

    It is kept with ``out``, so that whoever keeps many tables of outputs, one for each evaluation, has one made for each.
    """
    if out is table:
        return device_table(table)
    made = out.cache.setdefault("gpu merges", [])
    assert isinstance(made, list)
    found = next((on_device for source, on_device in made if source is table.cache), None)
    if found is None:
        found = DeviceTable(table, out)
        made[:] = [*made[1 - _MOST_SOURCES :], (table.cache, found)]
    return found  # type: ignore[no-any-return]


def _filled(rows: Tensor) -> Tensor:
    """Whether each tensor has elements."""
    return rows[:, [_AT["batch"], _AT["rows"], _AT["cols"]]].prod(1) > 0


def _is_flat(rows: Tensor) -> Tensor:
    """Whether each dense tensor is contiguous both in memory and in the noise."""
    b, r, c, bs, rs, co, gc = (
        rows[:, _AT[name]] for name in ("batch", "rows", "cols", "batch_stride", "row_stride", "col_offset", "global_cols")
    )
    return ((r <= 1) | (rs == c)) & ((b <= 1) | (bs == r * c)) & (co == 0) & ((gc == c) | (b * r <= 1))


def _flatten(rows: Tensor, flat: Tensor) -> Tensor:
    """Rewrites each flat tensor as one row of all its elements."""
    rows = rows.clone()
    b, r, c, ro, gc = (rows[:, _AT[name]].clone() for name in ("batch", "rows", "cols", "row_offset", "global_cols"))
    for name, value in (("batch", 1), ("rows", 1), ("cols", b * r * c), ("row_offset", 0), ("col_offset", ro * gc)):
        column = rows[:, _AT[name]]
        rows[:, _AT[name]] = torch.where(flat, torch.as_tensor(value, dtype=torch.int64, device="cpu"), column)
    return rows


def _vectorises(rows: Tensor) -> Tensor:
    """Whether each tensor allows 128-bit access to X, V and N, and noise in whole counters."""
    x, v, n, batch, height, cols, bs, rs, _, row, col, width = (rows[:, i] for i in range(len(FIELDS)) if FIELDS[i] != "dtype")

    def multiple(value: Tensor) -> Tensor:
        return value % _VECTOR == 0

    single = (batch * height) <= 1
    begin, stop = row * width + col, (row + batch * height - 1) * width + col + cols
    return (
        (x % 16 == 0)
        & (v % 16 == 0)
        & (n % 16 == 0)
        & multiple(cols)
        & multiple(col)
        & (multiple(rs) | single)
        & (multiple(width) | (single & multiple(row * width)))  # rows begin at multiples in the noise too
        & (multiple(bs) | (batch <= 1))
        & (begin >> _UPPER_BITS == (stop - 1) >> _UPPER_BITS)
    )


def _tiles(rows: Tensor, chosen: Tensor, tile: Tile) -> Tensor:
    """Returns the tiles of the chosen tensors, (count, 4) int32. An extent of 0 in ``tile`` leaves that side undivided."""

    def parts(size: Tensor, step: int) -> Tensor:
        return -(-size // step) if step else (size > 0).long()

    index = chosen.nonzero()[:, 0]
    batch, height, cols = (rows[index, _AT[name]] for name in ("batch", "rows", "cols"))
    down, across = parts(height, tile.rows), parts(cols, tile.cols)
    count = batch * down * across
    owner = torch.repeat_interleave(torch.arange(len(index), dtype=torch.int64, device="cpu"), count)
    local = torch.arange(len(owner), dtype=torch.int64, device="cpu") - (count.cumsum(0) - count)[owner]
    matrix, local = local // (down * across)[owner], local % (down * across)[owner]
    row, col = local // across[owner], local % across[owner]
    return torch.stack((index[owner], matrix, row * tile.rows, col), 1).to(torch.int32)


_shared: dict[tuple[torch.device, int], tuple[tuple[int, ...], Tensor]] = {}


def _recent(words: tuple[int, ...], device: torch.device) -> Tensor:
    """Words on a device: the tensor of the last call if they are the same, as they are for all layers of one pass."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _shared.get((device, stream))
    if found is None or found[0] != words:
        found = _shared[device, stream] = words, _upload(words, device)
    return found[1]


def _upload(words: Sequence[int], device: torch.device) -> Tensor:
    """Unsigned words as int32 on a device, copied from pinned memory, whose allocator waits for the copy before it reuses it."""
    signed = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
    if device.type == "cpu":
        return torch.tensor(signed, dtype=torch.int32, device="cpu")
    return torch.tensor(signed, dtype=torch.int32, pin_memory=True, device="cpu").to(device, non_blocking=True)

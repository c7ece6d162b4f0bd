"""One call of an op over a table, as the functions see it that launch its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...calls import TableCall
from ...op_table import Op
from ...table import DTYPES, TensorTable
from ..launches import ANY_DTYPE, DeviceTable, Tile, device_table, merge_table
from .launcher import Launcher, PreparedLaunch
from .plans import FACTOR_ROWS, Plan, Target, UpdateKind, target_of
from .tilesizes import TileSize

PlanOf = Callable[[torch.dtype | None, UpdateKind, TileSize, Target], Plan]
"""Makes the plan of a pass over the weights from their dtype (None: any), the kind, tile size and target."""
SizeOf = Callable[[str, torch.device, bool, int, bool], TileSize]
"""Returns a tile size for a kernel, device, whether the weights are aligned, rank, and stochastic rounding."""


class Work:
    """A call, its table on the device, and what launches it.

    Attributes:
        on_device: the table in the form that kernels read; for a merge also the weights that are written.
        header: the words that say which noise the call makes (``launches.HEADER``).
    """

    def __init__(self, op: Op, table: TensorTable, call: TableCall, launcher: Launcher, size_of: SizeOf) -> None:
        self.op = op
        self.table = table
        self.call = call
        self.on_device: DeviceTable = device_table(table, op.factors) if call.out is None else merge_table(table, call.out)
        self.header: Tensor = self.on_device.header(call)
        self.device = table.device
        self._launcher = launcher
        self._size_of = size_of

    @property
    def target(self) -> Target:
        """What the kernels are compiled for."""
        return target_of(self.device)

    def rows(self) -> Tensor:
        """The tiles of a pass over the rows of factors."""
        return self.on_device.row_tiles(FACTOR_ROWS)

    def or_unused(self, values: Tensor | None) -> Tensor:
        """Returns the scalars, or a placeholder for a pointer that the kernel does not read."""
        return self.call.scales if values is None else values

    def launch(self, plan: Plan, tiles: Tensor, *arguments: object) -> None:
        """Launches a kernel on tiles. Its first arguments are the tiles and the table, then come ``arguments``.

        The launch is kept with the table. Of what a kernel is specialised for, only the alignment of scalars changes.
        """
        key = (self._launcher, id(plan), *(a.data_ptr() & 15 for a in arguments if isinstance(a, Tensor)))
        prepared = self.on_device.prepared
        found = prepared.get(key)
        if found is None:
            found = prepared[key] = PreparedLaunch(self._launcher, plan, tiles.shape[0], self.device, ())  # which keeps the plan
        found(tiles, self.on_device.tensors, *arguments)

    def over_weights(self, plan_of: PlanOf) -> list[tuple[Plan, Tensor]]:
        """Returns the plans and tiles of the pass over the weights. The table keeps them, since a pass may not cost much Python."""
        call, prepared = self.call, self.on_device.prepared
        # Sizes are a backend's own.
        key = (self._size_of, self.op, len(call.draws), call.decay is None, call.rounding is None, call.law)
        found = prepared.get(key)
        if found is None:
            found = prepared[key] = self._plans(plan_of)
        return found

    def _plans(self, plan_of: PlanOf) -> list[tuple[Plan, Tensor]]:
        op, table, call = self.op, self.table, self.call
        momentum = op.momentum or (op.n == "optional" and table.n is not None)
        kind = UpdateKind(len(call.draws), call.decay is not None, call.rounding is not None, momentum, table.rank, call.signs)

        def size_of(code: int) -> TileSize:
            return self._size_of(op.kernel, table.device, code != ANY_DTYPE, table.rank, kind.stochastic)

        def tile_of(code: int) -> Tile:
            size = size_of(code)
            return Tile(size.rows, size.cols * size.blocks)

        def plan(code: int) -> Plan:
            return plan_of(None if code == ANY_DTYPE else DTYPES[code], kind, size_of(code), self.target)

        launches = self.on_device.launches((self._size_of, op.kernel, kind.stochastic), tile_of)
        return [(plan(launch.dtype), launch.tiles) for launch in launches]

"""The ops as Triton kernels: a whole table per launch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...calls import Draw, LayerCall, TableCall
from ...noise import STREAMS
from ...op_table import Op
from ...registry import Backend
from ...table import DTYPES, TensorTable
from ..launches import ANY_DTYPE, DeviceTable, Headers, Tile, device_table, merge_table
from .activations import Activations
from .tilesizes import TileSize, tile_sizes

if TYPE_CHECKING:
    from .launcher import Launcher
    from .plans import Plan, Target

_LEAST_CAPABILITY = (8, 0)  # bf16 and the matrix instructions that the kernels are compiled to


class TritonBackend(Backend):
    """Triton kernels on NVIDIA and AMD GPUs; on the CPU through Triton's interpreter, to check them.

    Args:
        launcher: makes the launches; None for Triton's own.
        sizes: instead of the tile sizes of the device, by kernel name (:data:`~.tilesizes.KERNELS`).
    """

    name = "triton"

    def __init__(self, launcher: Launcher | None = None, sizes: dict[str, TileSize] | None = None) -> None:
        self._launcher = launcher
        self._sizes = sizes or {}

    def unavailable(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return "it serves cuda (and rocm) devices only"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed: pip install triton"
        if device.type == "cpu":
            interpreting = self._launcher is not None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
            return None if interpreting else "it serves GPUs, and the CPU through TRITON_INTERPRET=1"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
            return f"compute capability 8.0 is needed, and {torch.cuda.get_device_name(device)} is older"
        return None

    def opt_in_reason(self, device: torch.device) -> str | None:
        return "Triton's interpreter is for checking the kernels" if device.type == "cpu" else None

    @property
    def launcher(self) -> Launcher:
        """What makes the launches."""
        if self._launcher is None:
            from .launcher import Launcher

            self._launcher = Launcher()
        return self._launcher

    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        launch = {"factor_update": self._factor_update, "lowrank_merge": self._lowrank_merge, "dense_merge": self._dense_merge}
        (launch.get(op.kernel) or (self._lowrank if op.v else self._dense))(op, table, call)
        torch.autograd.graph.increment_version(op.written(table, call.out))

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        from . import plans

        assert table.v is not None
        on_device, rank, device = device_table(table), table.rank, table.device
        matrices = on_device.matrices()
        header = on_device.headers.words(seed, [Draw(window)])
        ratios = torch.empty(len(matrices) * rank * rank if reproject else 1, dtype=torch.float32, device=device)
        plan = plans.resample_plan(rank, reproject, _target(device))
        self.launcher.launch(plan, len(matrices), device, matrices, on_device.tensors, header, ratios)
        torch.autograd.graph.increment_version(table.v)
        if reproject:
            assert table.n is not None
            tiles = on_device.row_tiles(plans.FACTOR_ROWS)
            self.launcher.launch(plans.reproject_plan(rank), len(tiles), device, tiles, on_device.tensors, ratios)
            torch.autograd.graph.increment_version(table.n)

    def lowrank_linear_(self, call: LayerCall) -> None:
        self._activations(call).linear(call)
        torch.autograd.graph.increment_version(call.y)

    def lowrank_embedding_(self, call: LayerCall) -> None:
        self._activations(call).embedding(call)
        torch.autograd.graph.increment_version(call.y)

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        from . import plans

        out = torch.empty(rows, rank, dtype=torch.float32, device=device)
        header = Headers(device).words(seed, [draw])
        plan = plans.factor_plan(STREAMS[stream], rank, _target(device))
        programs = -(-rows // plans.FACTOR_ROWS)
        self.launcher.launch(plan, programs, device, out, header, _signed(tensor_id), _signed(row_offset), rows)
        return out

    def _lowrank(self, op: Op, table: TensorTable, call: TableCall) -> None:
        on_device, device, count = device_table(table), table.device, len(table)
        header = on_device.header(call)
        alpha = _or_unused(call.alpha, call)
        for plan, tiles in self._prepare(op, table, on_device, call):
            if "WEIGHT" in plan.constants:
                arguments = (call.scales, _or_unused(call.decay, call), alpha)
            else:  # N, before the weights
                arguments = (_or_unused(call.coefficients, call), _or_unused(call.beta, call))  # type: ignore[assignment]
            self.launcher.launch(plan, len(tiles), device, tiles, on_device.tensors, header, *arguments, count)

    def _dense(self, op: Op, table: TensorTable, call: TableCall) -> None:
        on_device = device_table(table)
        header = on_device.header(call)
        scalars = [call.scales, *[_or_unused(x, call) for x in (call.decay, call.coefficients, call.alpha, call.beta)]]
        for plan, tiles in self._prepare(op, table, on_device, call):
            self.launcher.launch(plan, len(tiles), table.device, tiles, on_device.tensors, header, *scalars, len(table))

    def _factor_update(self, op: Op, table: TensorTable, call: TableCall) -> None:
        from . import plans

        on_device, rank = device_table(table, factors=op.factors), max((x.shape[2] for x in table.x), default=1)
        tiles = on_device.row_tiles(plans.FACTOR_ROWS)
        plan = plans.factor_update_plan(rank, len(call.draws), call.decay is not None, False, _target(table.device))
        arguments = (tiles, on_device.tensors, on_device.header(call), call.scales, _or_unused(call.decay, call), len(table))
        self.launcher.launch(plan, len(tiles), table.device, *arguments)

    def _lowrank_merge(self, op: Op, table: TensorTable, call: TableCall) -> None:
        from . import plans

        assert call.out is not None
        on_device, device, rank = merge_table(table, call.out), table.device, table.rank
        header = on_device.header(call)
        factors, starts = call.scales, on_device.tensors  # something to point at where nothing is read
        if call.draws and plans.is_wide(rank):
            starts, rows = on_device.factor_starts()
            factors = torch.empty(rows * rank, dtype=torch.float32, device=device)
            tiles = on_device.row_tiles(plans.FACTOR_ROWS)
            plan = plans.probed_factor_plan(rank, _target(device))
            self.launcher.launch(plan, len(tiles), device, tiles, on_device.tensors, header, call.scales, factors, starts)
        decay = _or_unused(call.decay, call)
        arguments = (on_device.tensors, on_device.outputs, header, call.scales, decay, factors, starts, rank // 4)
        for plan, tiles in self._prepare(op, table, on_device, call):
            self.launcher.launch(plan, len(tiles), device, tiles, *arguments)

    def _dense_merge(self, op: Op, table: TensorTable, call: TableCall) -> None:
        assert call.out is not None
        on_device = merge_table(table, call.out)
        decay = _or_unused(call.decay, call)
        arguments = (on_device.tensors, on_device.outputs, on_device.header(call), call.scales, decay)
        for plan, tiles in self._prepare(op, table, on_device, call):
            self.launcher.launch(plan, len(tiles), table.device, tiles, *arguments)

    def _prepare(self, op: Op, table: TensorTable, on_device: DeviceTable, call: TableCall) -> list[tuple[Plan, Tensor]]:
        """What an op is launched with over a table, in order; kept with the table, since a pass may not cost much Python."""
        key = (self, op, len(call.draws), call.decay is None, call.rounding is None)
        found = on_device.prepared.get(key)
        if found is None:
            found = on_device.prepared[key] = list(self._plans(op, table, on_device, call))
        return found

    def _plans(self, op: Op, table: TensorTable, on_device: DeviceTable, call: TableCall) -> Iterator[tuple[Plan, Tensor]]:
        from . import plans

        kernel, rank, target = op.kernel, table.rank, _target(table.device)
        momentum = op.momentum or (op.n == "optional" and table.n is not None)
        kind = plans.UpdateKind(len(call.draws), call.decay is not None, call.rounding is not None, momentum)
        if op.momentum and op.v:
            tiles = on_device.row_tiles(plans.FACTOR_ROWS)
            yield plans.factor_update_plan(rank, kind.draws, True, True, target), tiles

        def size_of(code: int) -> TileSize:
            return self._size(kernel, table.device, code != ANY_DTYPE, rank, kind.stochastic)

        def tile_of(code: int) -> Tile:
            size = size_of(code)
            return Tile(size.rows, size.cols * size.blocks)

        for launch in on_device.launches((self, kernel, kind.stochastic), tile_of):
            dtype = None if launch.dtype == ANY_DTYPE else DTYPES[launch.dtype]
            yield plans.plan_of(kernel, dtype, rank, kind, size_of(launch.dtype), target), launch.tiles

    def _size(self, kernel: str, device: torch.device, aligned: bool, rank: int, stochastic: bool = False) -> TileSize:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        vendor = "nvidia" if torch.version.hip is None else "amd"
        return self._sizes.get(kernel) or tile_sizes(name, vendor).find(kernel, aligned, rank, stochastic)

    def _activations(self, call: LayerCall) -> Activations:
        device = call.y.device
        return Activations(self.launcher, _target(device), lambda kernel, rank: self._size(kernel, device, True, rank))


def _or_unused(values: Tensor | None, call: TableCall) -> Tensor:
    """Scalars, or something to point at where nothing is read."""
    return call.scales if values is None else values


def _target(device: torch.device) -> Target:
    from .plans import Target

    hip, cpu = torch.version.hip is not None, device.type == "cpu"
    return Target(dp4a=not hip and not cpu, eights=hip, emulate=cpu, tf32=not hip)


def _signed(word: int) -> int:
    """An unsigned 32-bit word as a kernel argument takes it."""
    return word - (1 << 32) if word >= 1 << 31 else word

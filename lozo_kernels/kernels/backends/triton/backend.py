"""The Triton backend: each op is one launch, or a few, for a whole table."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...calls import Draw, LayerCall, PointsCall, TableCall
from ...op_table import Op
from ...registry import Backend
from ...table import TensorTable
from .tilesizes import TileSize, tile_sizes
from .versions import unsupported

if TYPE_CHECKING:
    from .activations import Activations
    from .launcher import Launcher
    from .points import Points

_LEAST_CAPABILITY = (8, 0)  # needed for bf16 and for the matrix instructions that the kernels compile to


class TritonBackend(Backend):
    """Triton kernels on NVIDIA and AMD GPUs; on the CPU through Triton's interpreter, to check them.

    Args:
        launcher: makes the launches; default: :class:`~.launcher.Launcher`.
        sizes: tile sizes by kernel (:data:`~.tilesizes.KERNELS`) that replace those of the device.
    """

    name = "triton"

    def __init__(self, launcher: Launcher | None = None, sizes: dict[str, TileSize] | None = None) -> None:
        self._launcher = launcher
        self._kernels: ModuleType | None = None
        self._sizes = sizes or {}
        self._size_of = self._size  # one object, by which tables keep what was prepared for these sizes

    def unavailable(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return "it serves cuda (and rocm) devices only"
        try:
            import triton
        except ImportError:
            return "triton is not installed: pip install triton"
        old = unsupported(triton.__version__)
        if old is not None:
            return old
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
        """The object that makes the launches. It is created at the first use, because it imports Triton."""
        if self._launcher is None:
            from .launcher import Launcher

            self._launcher = Launcher()
        return self._launcher

    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        if self._kernels is None:
            from . import kernels

            self._kernels = kernels
        self._kernels.launch(op, table, call, self.launcher, self._size_of)
        torch.autograd.graph.increment_version(op.written(table, call.out))

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        from .resample import launch_resample

        assert table.v is not None
        launch_resample(table, seed, window, reproject, self.launcher)
        torch.autograd.graph.increment_version((*table.v, *(table.n or ())) if reproject else table.v)

    @functools.cached_property
    def _activations(self) -> Activations:
        from .activations import Activations

        return Activations(self.launcher, self._size_of)

    @functools.cached_property
    def _points(self) -> Points:
        from .points import Points

        return Points(self.launcher, self._size_of)

    def lowrank_linear_(self, call: LayerCall) -> None:
        self._activations.linear(call)
        torch.autograd.graph.increment_version(call.y)

    def lowrank_embedding_(self, call: LayerCall) -> None:
        self._activations.embedding(call)
        torch.autograd.graph.increment_version(call.y)

    def lowrank_points_(self, call: PointsCall) -> None:
        self._points.launch(call)
        torch.autograd.graph.increment_version(call.y)

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        from .resample import launch_factor

        out = torch.empty(rows, rank, dtype=torch.float32, device=device)
        launch_factor(out, seed, draw, tensor_id, row_offset, stream, self.launcher)
        return out

    def _size(self, kernel: str, device: torch.device, aligned: bool, rank: int, stochastic: bool) -> TileSize:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        vendor = "nvidia" if torch.version.hip is None else "amd"
        return self._sizes.get(kernel) or tile_sizes(name, vendor).find(kernel, aligned, rank, stochastic)

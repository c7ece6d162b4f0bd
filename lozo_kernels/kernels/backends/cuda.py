"""The CUDA kernels of csrc/cuda, called through their C ABI."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..calls import Draw, LayerCall, PointsCall, TableCall
from ..noise import LAWS, STREAMS
from ..op_table import Op
from ..registry import Backend
from ..summed import run_probed
from ..table import TensorTable
from .eager import EagerBackend
from .launches import ANY_DTYPE, DeviceTable, Tile, TileOf, device_table, merge_table
from .native import Factor
from .shared_library import open_library
from .structs import int64s, pointers

ABI_VERSION = 4

_BAD_ARGUMENT = 1  # a lozo_status
_KERNELS = ("lowrank_update", "dense_update", "dense_momentum", "factor_update", "factor_momentum", "lowrank_merge")
"""The ops over tables that have a CUDA kernel. The others run on the eager backend."""
_FUNCTIONS = (*_KERNELS, "resample", "reproject")

_ROWS = Tile(256, 0)  # for passes over the rows of factors
_EAGER = EagerBackend()


def _lowrank_tile(dtype: int) -> Tile:
    """Wide, because the noise of a row is made once a tile, with enough rows that starting a block costs little beside it."""
    return Tile(16, 512) if dtype == ANY_DTYPE else Tile(64, 2048)


def _dense_tile(dtype: int) -> Tile:
    """Wide, because contiguous dense tensors are one row; the several rows are for the other tensors."""
    return Tile(8, 1024) if dtype == ANY_DTYPE else Tile(8, 8192)


class _Tiles(ctypes.Structure):
    """The struct ``lozo_gpu_tiles`` of csrc/include/lozo/abi_cuda.h."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        *int64s("count rows cols dtype"),
    )


class _Call(ctypes.Structure):
    """The struct ``lozo_gpu_call`` of csrc/include/lozo/abi_cuda.h."""

    _fields_ = (
        *pointers("tensors outputs"),
        ("count", ctypes.c_int64),
        ("header", ctypes.c_void_p),
        *int64s("rank num_draws rounding law"),
        *pointers("scales coefficients alpha beta decay ratios"),
        ("device", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


class CudaBackend(Backend):
    """CUDA kernels compiled ahead of time. An op takes at most one launch per dtype and one for all unaligned tensors.

    Args:
        library: the shared library; tests give one that emulates a GPU.
        device_type: the type of device that the library serves.
    """

    name = "cuda"

    def __init__(self, library: Path | None = None, *, device_type: str = "cuda") -> None:
        self._path = library if library is not None else library_path()
        self._device_type = device_type

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != self._device_type:
            return f"it serves {self._device_type} only"
        if device.type == "cuda" and torch.version.cuda is None:
            return "this PyTorch is not built for CUDA"
        try:
            library = _load(self._path)
        except (OSError, RuntimeError, AttributeError) as error:
            return str(error)
        if device.type == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        with _current(device):  # the library makes the device current to ask it
            status = library.lozo_cuda_probe(_index(device))
        if status == 0:
            return None
        which = ""
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            which = f"compute capability {major}.{minor}, compiled for {library.lozo_cuda_architectures().decode()}: "
        return which + library.lozo_cuda_message(status).decode()

    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        if op.kernel not in _KERNELS:  # the Triton backend, which is preferred wherever Triton is installed, has kernels for these
            _EAGER.run(op, table, call)
            return
        if op.out and call.draws:  # the kernel merges, and makes no noise
            run_probed(op, table, call, self.run)
            return
        with self._calling(table, call, op.factors) as launches:
            if op.factors:
                launches.run(op.kernel, launches.tables.row_tiles(_ROWS.rows), _ROWS)
            else:
                launches.run_all(op.kernel, _lowrank_tile if op.v else _dense_tile)
        torch.autograd.graph.increment_version(op.written(table, call.out))

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        assert table.v is not None
        nothing = torch.empty(0, dtype=torch.float32, device=table.device)
        with self._calling(table, TableCall(seed, [Draw(window)], nothing)) as launches:
            matrices = launches.tables.matrices()
            if reproject:
                ratios = torch.empty(len(matrices), table.rank, table.rank, dtype=torch.float32, device=table.device)
                launches.arguments.ratios = ratios.data_ptr()
            launches.run("resample", matrices, Tile(0, 0))
            if reproject:
                launches.run("reproject", launches.tables.row_tiles(_ROWS.rows), _ROWS)
        torch.autograd.graph.increment_version((*table.v, *(table.n or ())) if reproject else table.v)

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        library = _load(self._path)
        with _current(device):
            out = torch.empty(rows, rank, dtype=torch.float32, device=device)
            what = Factor(seed, STREAMS[stream], tensor_id, int(draw.step), draw.direction, row_offset, rows, rank)
            status = library.lozo_cuda_factor(ctypes.byref(what), out.data_ptr(), _index(out.device), _stream(out.device))
        _check(library, "factor", status)
        return out

    def lowrank_linear_(self, call: LayerCall) -> None:
        _EAGER.lowrank_linear_(call)

    def lowrank_embedding_(self, call: LayerCall) -> None:
        _EAGER.lowrank_embedding_(call)

    def lowrank_points_(self, call: PointsCall) -> None:
        _EAGER.lowrank_points_(call)

    @contextlib.contextmanager
    def _calling(self, table: TensorTable, call: TableCall, factors: bool = False) -> Iterator[_Calling]:
        """Yields the arguments of a call on the table's device. The memory that they point to lives until the body ends."""
        with _current(table.device):
            tables = device_table(table, factors) if call.out is None else merge_table(table, call.out)
            header = tables.header(call)
            arguments = _Call(
                tensors=tables.tensors.data_ptr(),
                outputs=tables.outputs.data_ptr(),
                count=len(table),
                header=header.data_ptr(),
                rank=table.rank,
                num_draws=len(call.draws),
                rounding=call.rounding is not None,
                law=LAWS.index(call.law),
                device=_index(table.device),
                stream=_stream(table.device),
            )
            for name in ("scales", "decay", "coefficients", "alpha", "beta"):
                values = getattr(call, name)
                if values is not None:
                    setattr(arguments, name, values.data_ptr())
            yield _Calling(_load(self._path), tables, arguments)
            del header  # the allocator reuses its memory in the order of the stream


@dataclasses.dataclass(frozen=True)
class _Calling:
    """What all launches of one call of an op have in common."""

    library: ctypes.CDLL
    tables: DeviceTable
    arguments: _Call

    def run(self, op: str, tiles: Tensor, tile: Tile, dtype: int = ANY_DTYPE) -> None:
        if len(tiles):
            what = _Tiles(tiles.data_ptr(), len(tiles), tile.rows, tile.cols, dtype)
            status = getattr(self.library, f"lozo_cuda_{op}")(ctypes.byref(what), ctypes.byref(self.arguments))
            _check(self.library, op, status)

    def run_all(self, op: str, tile_of: TileOf) -> None:
        for launch in self.tables.launches(("cuda", tile_of), tile_of):
            self.run(op, launch.tiles, tile_of(launch.dtype), launch.dtype)


def library_path() -> Path:
    """The path of the shared library, whether it was built or not."""
    return Path(__file__).resolve().parents[2] / "lib" / "liblozo_cuda.so"


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    missing = "not built (reinstall lozo_kernels where nvcc is)"
    library = open_library(path, "lozo_cuda_abi_version", ABI_VERSION, missing)
    library.lozo_cuda_architectures.restype = library.lozo_cuda_message.restype = ctypes.c_char_p
    library.lozo_cuda_probe.argtypes = (ctypes.c_int64,)
    for name in _FUNCTIONS:
        getattr(library, f"lozo_cuda_{name}").argtypes = (ctypes.POINTER(_Tiles), ctypes.POINTER(_Call))
    library.lozo_cuda_factor.argtypes = (ctypes.POINTER(Factor), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return library


def _check(library: ctypes.CDLL, op: str, status: int) -> None:
    if status:
        message = f"{op}: {library.lozo_cuda_message(status).decode()}"
        raise ValueError(message) if status == _BAD_ARGUMENT else RuntimeError(message)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None

"""The CPU kernels of csrc/cpu, called through their C ABI."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calls import Draw, LayerCall, PointsCall, TableCall
from ..noise import LAWS, STREAMS
from ..op_table import MAX_DRAWS, OPS, Op
from ..registry import Backend
from ..table import DTYPES, TensorTable
from .packing import pack
from .shared_library import open_library
from .structs import int64s, pointers

ABI_VERSION = 8


class _Call(ctypes.Structure):
    """The struct ``lozo_call`` of csrc/include/lozo/abi.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        *int64s("rank num_draws"),
        ("draw_steps", ctypes.c_int64 * MAX_DRAWS),
        ("directions", ctypes.c_int64 * MAX_DRAWS),
        *int64s("rounding rounding_step rounding_index"),
        *pointers("scales coefficients alpha beta decay out"),
        *int64s("reproject parts law"),
        ("draws", ctypes.POINTER(ctypes.c_int64)),
        *int64s("threads"),
    )


class Factor(ctypes.Structure):
    """The struct ``lozo_factor`` of csrc/include/lozo/abi.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        *int64s("stream tensor_id draw direction row_offset rows rank"),
    )


class _Layer(ctypes.Structure):
    """The struct ``lozo_skinny`` of csrc/include/lozo/abi.h."""

    _fields_ = (
        *pointers("y x v b draws scales gain shift"),
        ("seed", ctypes.c_uint64),
        *int64s("tensor_id row_offset y_dtype x_dtype y_stride x_stride tokens groups rows cols rank transposed threads"),
    )


class _Points(ctypes.Structure):
    """The struct ``lozo_points`` of csrc/include/lozo/abi.h."""

    _fields_ = (
        *pointers("y x v b u directions scales gain"),
        *int64s("y_dtype x_dtype y_stride x_stride tokens rows cols ranks count rank transposed threads"),
    )


_CODES = {dtype: code for code, dtype in enumerate(DTYPES)} | {torch.int32: 4, torch.int64: 8}
"""The dtype codes that ``lozo_skinny`` has for y and x."""

_STATUS: dict[int, Callable[[str], Exception]] = {
    1: lambda op: ValueError(f"{op}: the native library rejected the arguments"),
    2: lambda op: MemoryError(f"{op}: no memory for scratch; nothing was changed"),
    3: lambda op: RuntimeError(f"{op}: no such instruction set"),
}


class NativeBackend(Backend):
    """Compiled CPU kernels, one call for a whole table."""

    name = "native"
    many_draws = True

    def unavailable(self, device: torch.device) -> str | None:
        """Returns why this backend cannot serve the device, or None if it can. Raises ValueError if LOZO_KERNELS_ISA names an
        instruction set that this machine has not: another backend in its place would be slow without a word."""
        if device.type != "cpu":
            return "it serves cpu only"
        try:
            _library()
        except (OSError, RuntimeError, AttributeError) as error:
            _warn(f"the compiled CPU kernels are not used, and slower ones are: {error}")
            return str(error)
        return None

    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        packed: _Packed = table.cache.get("native factors" if op.factors else "native") or _packed(table, op.factors)  # type: ignore[assignment]
        arguments = _arguments(packed.rank, call)
        if call.out is not None:
            arguments.out = _packed(call.out).address
        function = getattr(_library(), f"lozo_cpu_{op.kernel}")
        status = function(packed.address, packed.count, arguments)
        if status:
            raise _STATUS[status](function.__name__)
        torch.autograd.graph.increment_version(op.written(table, call.out))

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        assert table.v is not None
        packed, function = _packed(table), _library().lozo_cpu_resample
        threads = torch.get_num_threads()
        call = _Call(seed=seed, rank=packed.rank, num_draws=1, draw_steps=(window,), reproject=reproject, threads=threads)
        _check(function(packed.address, packed.count, call), function)
        torch.autograd.graph.increment_version((*table.v, *(table.n or ())) if reproject else table.v)

    def lowrank_linear_(self, call: LayerCall) -> None:
        _run_layer("lozo_cpu_lowrank_linear", call, call.x.stride(0))

    def lowrank_embedding_(self, call: LayerCall) -> None:
        _run_layer("lozo_cpu_lowrank_embedding", call, 1)

    def lowrank_points_(self, call: PointsCall) -> None:
        _run_points(call)

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor:
        out = torch.empty(rows, rank, dtype=torch.float32, device=device)
        what = Factor(seed, STREAMS[stream], tensor_id, int(draw.step), draw.direction, row_offset, rows, rank)
        function = _library().lozo_cpu_factor
        _check(function(what, out.data_ptr()), function)
        return out


def library_path() -> Path:
    """The path of the shared library, whether it was built or not."""
    return Path(__file__).resolve().parents[2] / "lib" / "liblozo_cpu.so"


def isa() -> str:
    """Returns the name of the instruction set in use.

    Raises:
        OSError, RuntimeError, ValueError: the library cannot be used; the message is that of ``unavailable``.
    """
    return _library().lozo_isa_name().decode()


def supported_isas() -> list[str]:
    """The instruction sets that were compiled in and that this machine can run, best first. Raises as :func:`isa`."""
    library = _load()
    return [name for name in _compiled_isas(library) if library.lozo_isa_supported(name.encode())]


def set_isa(name: str | None) -> None:
    """Switches the process to an instruction set. None means that of LOZO_KERNELS_ISA, else the best.

    Raises:
        ValueError: there is no such set, or this machine cannot run it.
        OSError, RuntimeError: as :func:`isa`.
    """
    _choose(_load(), name or os.environ.get("LOZO_KERNELS_ISA") or None)


def openmp_path() -> Path | None:
    """Returns the path of the OpenMP runtime that torch computes with, or None if it cannot be found."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    mapped = {Path(line.split(None, 5)[5]) for line in lines if "/" in line}
    runtimes = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    packages = Path(torch.__file__).resolve().parent.parent
    # Other packages bring runtimes of their own; torch's lies in its folder, or in torch.libs beside it.
    of_torch = [p for p in runtimes if any(p.is_relative_to(packages / name) for name in ("torch", "torch.libs"))]
    candidates = of_torch or runtimes
    return candidates[0] if len(candidates) == 1 else None


def use_threads(whose: str) -> None:
    """Chooses the threads that the kernels run on: "torch" (its OpenMP runtime; own threads if that is not found) or "own".

    Torch's are the default: after an operator of torch they are awake, and threads of our own would compete with them.
    """
    if whose not in ("torch", "own"):
        raise ValueError(f"threads are 'torch' or 'own', not {whose!r}")
    _load().lozo_use_openmp(_gomp_parallel() if whose == "torch" else None)


@functools.cache
def _gomp_parallel() -> int | None:
    path = openmp_path()
    try:
        return None if path is None else ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _library() -> ctypes.CDLL:
    """The loaded library, after an instruction set has been chosen."""
    library = _load()
    if not _isa_is_chosen:
        _choose(library, os.environ.get("LOZO_KERNELS_ISA") or None)
    return library


@functools.cache
def _warn(text: str) -> None:
    """Says something once in a process."""
    warnings.warn(text, stacklevel=3)


@functools.cache
def _load() -> ctypes.CDLL:
    missing = "not built (install a wheel for this platform, or reinstall lozo_kernels where a C++ compiler is)"
    library = open_library(library_path(), "lozo_abi_version", ABI_VERSION, missing)
    library.lozo_isa_list.restype = library.lozo_isa_name.restype = ctypes.c_char_p
    library.lozo_use_openmp.argtypes = (ctypes.c_void_p,)
    library.lozo_use_openmp.restype = None
    library.lozo_use_openmp(_gomp_parallel())
    library.lozo_isa_supported.argtypes = library.lozo_set_isa.argtypes = (ctypes.c_char_p,)
    for name in [*(op.kernel for op in OPS.values() if not op.summed), "resample"]:
        getattr(library, f"lozo_cpu_{name}").argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Call))
    for name in ("lowrank_linear", "lowrank_embedding"):
        getattr(library, f"lozo_cpu_{name}").argtypes = (ctypes.POINTER(_Layer),)
    library.lozo_cpu_lowrank_points.argtypes = (ctypes.POINTER(_Points),)
    library.lozo_cpu_factor.argtypes = (ctypes.POINTER(Factor), ctypes.c_void_p)
    return library


def _compiled_isas(library: ctypes.CDLL) -> list[str]:
    return library.lozo_isa_list().decode().split()


_isa_is_chosen = False


def _choose(library: ctypes.CDLL, name: str | None) -> None:
    global _isa_is_chosen
    if library.lozo_set_isa(None if name is None else name.encode()) == 0:
        _isa_is_chosen = True
        return
    compiled = _compiled_isas(library)
    supported = [other for other in compiled if library.lozo_isa_supported(other.encode())]
    why = "this machine does not run it" if name in compiled else "there is no such set"
    raise ValueError(f"instruction set {name!r} (LOZO_KERNELS_ISA): {why}; choose from {', '.join(supported)}")


def _check(status: int, function: Any) -> None:
    if status:
        raise _STATUS[status](function.__name__)


def _arguments(rank: int, call: TableCall) -> _Call:
    """The arguments of a call as the C struct. It holds addresses, so the caller has to keep ``call`` alive."""
    law, threads = LAWS.index(call.law), torch.get_num_threads()
    parts = len(call.scales)  # of the op that has them
    arguments = _Call(seed=call.seed, rank=rank, num_draws=len(call.draws), parts=parts, law=law, threads=threads)
    if len(call.draws) > MAX_DRAWS:
        numbers = [int(number) for draw in call.draws for number in (draw.step, draw.direction)]
        arguments.draws = (ctypes.c_int64 * len(numbers))(*numbers)
    else:
        for d, draw in enumerate(call.draws):
            arguments.draw_steps[d], arguments.directions[d] = int(draw.step), draw.direction
    rounding = call.rounding
    if rounding is not None:
        arguments.rounding, arguments.rounding_step, arguments.rounding_index = 1, int(rounding.step), rounding.index
    for name in ("scales", "decay", "coefficients", "alpha", "beta"):
        values = getattr(call, name)
        if values is not None:
            setattr(arguments, name, values.data_ptr())
    return arguments


def _run_layer(name: str, call: LayerCall, x_stride: int) -> None:
    y, x, v, b, gain, shift = call.y, call.x, call.v, call.b, call.gain, call.shift
    rows, rank = b.shape
    arguments = _Layer(
        y.data_ptr(),
        x.data_ptr(),
        v.data_ptr(),
        b.data_ptr(),
        call.draws.data_ptr(),
        call.scales.data_ptr(),
        None if gain is None else gain.data_ptr(),
        None if shift is None else shift.data_ptr(),
        call.seed,
        call.tensor_id,
        call.row_offset,
        _CODES[y.dtype],
        _CODES[x.dtype],
        y.stride(0),
        x_stride,
        y.shape[0],
        call.scales.shape[0],
        rows,
        v.shape[1],
        rank,
        call.transposed,
        torch.get_num_threads(),
    )
    status = getattr(_library(), name)(arguments)
    if status:
        raise _STATUS[status](name)
    torch.autograd.graph.increment_version(y)


def _run_points(call: PointsCall) -> None:
    y, x, v, b, u, gain = call.y, call.x, call.v, call.b, call.u, call.gain
    count, rank = (0, 0) if u is None else u.shape[:2]
    arguments = _Points(
        y.data_ptr(),
        x.data_ptr(),
        v.data_ptr(),
        b.data_ptr(),
        None if u is None else u.data_ptr(),
        call.directions.data_ptr(),
        call.scales.data_ptr(),
        None if gain is None else gain.data_ptr(),
        _CODES[y.dtype],
        _CODES[x.dtype],
        y.stride(0),
        x.stride(0),
        y.shape[0],
        b.shape[1],
        v.shape[1],
        v.shape[0],
        count,
        rank,
        call.transposed,
        torch.get_num_threads(),
    )
    function = _library().lozo_cpu_lowrank_points
    _check(function(arguments), function)
    torch.autograd.graph.increment_version(y)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A table as rows of ``lozo_tensor``, kept with the table."""

    rows: Tensor
    address: int
    count: int
    rank: int


def _packed(table: TensorTable, factors: bool = False) -> _Packed:
    key = "native factors" if factors else "native"
    packed = table.cache.get(key)
    if packed is None:
        rows = pack(table, factors)
        packed = table.cache[key] = _Packed(rows, rows.data_ptr(), len(table), table.rank)
    return packed  # type: ignore[return-value]

"""The ops as torch operators (``torch.ops.lozo_kernels``) for compiled code and other libraries, with flat schemas and fakes.

``ops.py`` calls them under ``torch.compile``. In eager code it calls a backend directly, because passing hundreds of tensors
through the dispatcher takes longer than launching the kernel.

Arguments that differ from ``ops.py``: ``place`` holds tensor id, row offset, column offset and global columns of each tensor;
``seed`` is its 64 bits as a signed number; ``steps`` (draws,) and ``rounding_step`` (0-dim, or None to round to nearest) are int64,
on the device of the weights or on the CPU; ``backend`` is a name, "" for the best. ``law`` is taken by an overload of that name.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, skinny
from .calls import Draw, Rounding
from .noise import STREAMS
from .op_table import Op
from .registry import Backend, choose_backend
from .table import TensorTable

_LIBRARY = torch.library.Library("lozo_kernels", "DEF")
_SEED = (1 << 64) - 1
_STREAM_NAMES = {number: name for name, number in STREAMS.items()}
_UPDATE = (
    "int seed, Tensor steps, int[] directions, Tensor scales, Tensor? decay, Tensor? rounding_step, int rounding_index, str backend"
)
_MOMENTUM = ("coefficients", "alpha", "beta")
_FACTORS = "Tensor v, Tensor b, int seed, int tensor_id, int row_offset, Tensor draws, Tensor scales"

_packed: collections.OrderedDict[object, dict[object, object]] = collections.OrderedDict()
"""The caches of recent tables, by the addresses, shapes and positions of their tensors. A cache keeps no weight alive."""
_MOST_PACKED = 32
_PACKING = threading.Lock()


def _schema(op: Op, overload: str) -> str:
    lists = [f"{kind} {name}" for name, kind in op.lists.items()]
    momentum = [f"Tensor {name}" for name in _MOMENTUM] if op.momentum else []
    name, law = (op.name, []) if overload == "default" else (f"{op.name}.{overload}", ["str law"])
    return f"{name}({', '.join([*lists, 'int[] place', _UPDATE, *momentum, *law])}) -> ()"


def _run(op: Op, *arguments: Any) -> None:
    """Implements the operator of an op: turns its flat arguments into those of ``ops.run``."""
    names = list(op.lists)
    tensors = dict(zip(names, arguments, strict=False))
    place, *rest = arguments[len(names) :]
    seed, steps, directions, scales, decay, rounding_step, rounding_index, backend, *more = rest
    table = _table(tensors["x"], tensors.get("v"), tensors.get("n") or None, place)
    ops.run(
        op,
        table,
        seed=seed & _SEED,
        draws=[Draw(_step(step), direction) for step, direction in zip(steps.unbind(), directions, strict=True)],
        scales=scales,
        decay=decay,
        rounding=None if rounding_step is None else Rounding(_step(rounding_step), rounding_index),
        out=_table(tensors["out"], None, None, place) if op.out else None,
        backend=_backend(backend, scales.device),
        **dict(zip((*(_MOMENTUM if op.momentum else ()), "law"), more, strict=False)),
    )


def _table(x: Sequence[Tensor], v: Sequence[Tensor] | None, n: Sequence[Tensor] | None, place: Sequence[int]) -> TensorTable:
    tensors = [*x, *(v or ()), *(n or ())]
    key = (tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors), tuple(place), v is None, n is None)
    known = _packed.get(key)
    cache = {} if known is None else known
    table = TensorTable.at_positions(x, place, v=v, n=n, cache=cache, checked=known is not None)
    with _PACKING:  # only now, so that tensors that fail the checks are checked again the next time
        _packed[key] = cache
        _packed.move_to_end(key)
        while len(_packed) > _MOST_PACKED:
            _packed.popitem(last=False)
    return table


def _step(step: Tensor) -> int | Tensor:
    """The step as a number, or, if it is on a device, as the tensor, because reading it would wait."""
    return int(step) if step.device.type == "cpu" else step


def _backend(name: str, device: torch.device) -> Backend | None:
    return choose_backend(device, name).backend if name else None


def _resample_(
    x: Sequence[Tensor], v: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], seed: int, window: int, backend: str
) -> None:
    table = _table(x, v, n or None, place)
    ops.resample_(table, seed=seed & _SEED, window=window, reproject=bool(n), backend=_backend(backend, table.device))


def _lowrank_linear_(y: Tensor, x: Tensor, v: Tensor, b: Tensor, *rest: Any) -> None:
    *where, transposed, gain, shift, backend = rest
    skinny.lowrank_linear_(y, x, v, b, transposed=transposed, shift=shift, **_layer_call(where, gain, backend, y.device))


def _lowrank_embedding_(y: Tensor, rows: Tensor, v: Tensor, b: Tensor, *rest: Any) -> None:
    *where, gain, backend = rest
    skinny.lowrank_embedding_(y, rows, v, b, **_layer_call(where, gain, backend, y.device))


def _lowrank_points_(y: Tensor, x: Tensor, *rest: Any) -> None:
    *factors, transposed, gain, backend = rest
    skinny.lowrank_points_(y, x, *factors, transposed=transposed, gain=gain, backend=_backend(backend, y.device))


def _layer_call(where: Sequence[Any], gain: Tensor | None, backend: str, device: torch.device) -> dict[str, Any]:
    """The arguments that both products of activations share, as ``skinny.py`` takes them."""
    seed, tensor_id, row_offset, draws, scales = where
    return {
        "seed": seed & _SEED,
        "tensor_id": tensor_id,
        "row_offset": row_offset,
        "draws": draws,
        "scales": scales,
        "gain": gain,
        "backend": _backend(backend, device),
    }


def _factor(
    seed: int,
    rows: int,
    rank: int,
    tensor_id: int,
    step: int,
    direction: int,
    stream: int,
    row_offset: int,
    device: torch.device,
    backend: str,
) -> Tensor:
    return ops.factor(
        seed & _SEED,
        rows,
        rank,
        tensor_id,
        Draw(step, direction),
        stream=_STREAM_NAMES[stream],
        row_offset=row_offset,
        device=device,
        backend=_backend(backend, device),
    )


def _fake_factor(_seed: int, rows: int, rank: int, *rest: Any) -> Tensor:
    return torch.empty(rows, rank, dtype=torch.float32, device=rest[-2])


def _fake_nothing(*_: Any) -> None:
    """The fake of every op that changes tensors: it returns nothing."""


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] = _fake_nothing) -> None:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lozo_kernels::{name}", fake, lib=_LIBRARY)


for _op in ops.OPS.values():
    for _overload in _op.overloads:
        _register(_schema(_op, _overload), functools.partial(_run, _op))
_register(
    "resample_(Tensor[] x, Tensor(a!)[] v, Tensor(b!)[] n, int[] place, int seed, SymInt window, str backend) -> ()", _resample_
)
_register(
    f"lowrank_linear_(Tensor(a!) y, Tensor x, {_FACTORS}, bool transposed, Tensor? gain, Tensor? shift, str backend) -> ()",
    _lowrank_linear_,
)
_register(f"lowrank_embedding_(Tensor(a!) y, Tensor rows, {_FACTORS}, Tensor? gain, str backend) -> ()", _lowrank_embedding_)
_register(
    "lowrank_points_(Tensor(a!) y, Tensor x, Tensor v, Tensor b, Tensor? u, Tensor directions, Tensor scales, bool transposed, "
    "Tensor? gain, str backend) -> ()",
    _lowrank_points_,
)
_register(
    "factor(int seed, SymInt rows, int rank, int tensor_id, SymInt step, int direction, int stream, SymInt row_offset, "
    "Device device, str backend) -> Tensor",
    _factor,
    _fake_factor,
)

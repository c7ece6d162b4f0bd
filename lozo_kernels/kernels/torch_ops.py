"""The ops as operators of torch (``torch.ops.lozo_kernels``): flat schemas that say what is changed, and fakes.

For compiled code and for other libraries. ``ops.py`` takes this way under ``torch.compile``; in eager code it calls a backend
directly, because passing hundreds of tensors through the dispatcher takes longer than launching the kernel.

Arguments, where they differ from ``ops.py``: ``place`` holds tensor id, row offset, column offset and global columns of each
tensor; ``seed`` is its 64 bits as a signed number; ``steps`` is (draws,) int64 and ``rounding`` (2,) int64, step and index or
empty, on the device of the weights or on the CPU; ``backend`` is a name, "" for the best.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, skinny
from .calls import Draw, Rounding
from .noise import STREAMS
from .registry import Backend, choose_backend
from .table import TensorTable

_LIBRARY = torch.library.Library("lozo_kernels", "DEF")
_PLACE = 4
_SEED = (1 << 64) - 1
_STREAM_NAMES = {number: name for name, number in STREAMS.items()}
_UPDATE = (
    "int seed, Tensor steps, int[] directions, Tensor scales, Tensor? decay, Tensor? rounding_step, int rounding_index, str backend"
)
_MOMENTUM = "Tensor coefficients, Tensor alpha, Tensor beta"
_FACTORS = "Tensor v, Tensor b, int seed, int tensor_id, int row_offset, Tensor draws, Tensor scales"
_SCHEMAS = (
    f"lowrank_update_(Tensor(a!)[] x, Tensor[] v, int[] place, {_UPDATE}) -> ()",
    f"dense_update_(Tensor(a!)[] x, int[] place, {_UPDATE}) -> ()",
    f"lowrank_momentum_(Tensor(a!)[] x, Tensor[] v, Tensor(b!)[] n, int[] place, {_UPDATE}, {_MOMENTUM}) -> ()",
    f"dense_momentum_(Tensor(a!)[] x, Tensor(b!)[] n, int[] place, {_UPDATE}, {_MOMENTUM}) -> ()",
    "resample_(Tensor[] x, Tensor(a!)[] v, Tensor(b!)[] n, int[] place, int seed, SymInt window, str backend) -> ()",
    f"factor_update_(Tensor(a!)[] x, int[] place, {_UPDATE}) -> ()",
    f"lowrank_merge_(Tensor(a!)[] out, Tensor[] x, Tensor[] v, Tensor[] n, int[] place, {_UPDATE}) -> ()",
    f"dense_merge_(Tensor(a!)[] out, Tensor[] x, Tensor[] n, int[] place, {_UPDATE}) -> ()",
    f"lowrank_linear_(Tensor(a!) y, Tensor x, {_FACTORS}, bool transposed, Tensor? gain, Tensor? shift, str backend) -> ()",
    f"lowrank_embedding_(Tensor(a!) y, Tensor rows, {_FACTORS}, Tensor? gain, str backend) -> ()",
    "factor(int seed, SymInt rows, int rank, int tensor_id, SymInt step, int direction, int stream, SymInt row_offset, "
    "Device device, str backend) -> Tensor",
)

_packed: collections.OrderedDict[object, dict[object, object]] = collections.OrderedDict()
"""Packed forms of recent tables by what they were made from: addresses and shapes, so no weight is kept alive."""
_MOST_PACKED = 32
_PACKING = threading.Lock()


def _table(x: Sequence[Tensor], v: Sequence[Tensor] | None, n: Sequence[Tensor] | None, place: Sequence[int]) -> TensorTable:
    tensors = [*x, *(v or ()), *(n or ())]
    key = (tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors), tuple(place), v is None, n is None)
    known = _packed.get(key)
    cache = {} if known is None else known
    ids, rows, cols, widths = (list(place[i::_PLACE]) for i in range(_PLACE))
    table = TensorTable(
        x, ids, v=v, n=n, row_offsets=rows, col_offsets=cols, global_cols=widths, cache=cache, checked=known is not None
    )
    with _PACKING:  # only now: tensors that do not fit are not known the next time either
        _packed[key] = cache
        _packed.move_to_end(key)
        while len(_packed) > _MOST_PACKED:
            _packed.popitem(last=False)
    return table


def _noise(
    seed: int,
    steps: Tensor,
    directions: Sequence[int],
    scales: Tensor,
    decay: Tensor | None,
    rounding_step: Tensor | None,
    rounding_index: int,
    backend: str,
) -> dict[str, Any]:
    """The arguments that the updates share, as ops.py takes them. Steps on a device are not read."""
    return {
        "seed": seed & _SEED,
        "draws": [Draw(_step(step), direction) for step, direction in zip(steps.unbind(), directions, strict=True)],
        "scales": scales,
        "decay": decay,
        "rounding": None if rounding_step is None else Rounding(_step(rounding_step), rounding_index),
        "backend": _backend(backend, scales.device),
    }


def _step(step: Tensor) -> int | Tensor:
    return int(step) if step.device.type == "cpu" else step


def _backend(name: str, device: torch.device) -> Backend | None:
    return choose_backend(device, name).backend if name else None


def _lowrank_update_(x: Sequence[Tensor], v: Sequence[Tensor], place: Sequence[int], *update: Any) -> None:
    ops.lowrank_update_(_table(x, v, None, place), **_noise(*update))


def _dense_update_(x: Sequence[Tensor], place: Sequence[int], *update: Any) -> None:
    ops.dense_update_(_table(x, None, None, place), **_noise(*update))


def _lowrank_momentum_(x: Sequence[Tensor], v: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], *rest: Any) -> None:
    *update, coefficients, alpha, beta = rest
    table = _table(x, v, n, place)
    ops.lowrank_momentum_(table, **_noise(*update), coefficients=coefficients, alpha=alpha, beta=beta)


def _dense_momentum_(x: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], *rest: Any) -> None:
    *update, coefficients, alpha, beta = rest
    table = _table(x, None, n, place)
    ops.dense_momentum_(table, **_noise(*update), coefficients=coefficients, alpha=alpha, beta=beta)


def _resample_(
    x: Sequence[Tensor], v: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], seed: int, window: int, backend: str
) -> None:
    table = _table(x, v, n or None, place)
    ops.resample_(table, seed=seed & _SEED, window=window, reproject=bool(n), backend=_backend(backend, table.device))


def _factor_update_(x: Sequence[Tensor], place: Sequence[int], *update: Any) -> None:
    noise = _noise(*update)
    del noise["rounding"]
    ops.factor_update_(_table(x, None, None, place), **noise)


def _lowrank_merge_(
    out: Sequence[Tensor], x: Sequence[Tensor], v: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], *update: Any
) -> None:
    ops.lowrank_merge_(_table(x, v, n, place), **_noise(*update), out=_table(out, None, None, place))


def _dense_merge_(out: Sequence[Tensor], x: Sequence[Tensor], n: Sequence[Tensor], place: Sequence[int], *update: Any) -> None:
    ops.dense_merge_(_table(x, None, n or None, place), **_noise(*update), out=_table(out, None, None, place))


def _lowrank_linear_(y: Tensor, x: Tensor, v: Tensor, b: Tensor, *rest: Any) -> None:
    *draws, transposed, gain, shift, backend = rest
    noise = _factor_noise(draws, gain, _backend(backend, y.device))
    skinny.lowrank_linear_(y, x, v, b, **noise, transposed=transposed, shift=shift)


def _lowrank_embedding_(y: Tensor, rows: Tensor, v: Tensor, b: Tensor, *rest: Any) -> None:
    *draws, gain, backend = rest
    skinny.lowrank_embedding_(y, rows, v, b, **_factor_noise(draws, gain, _backend(backend, y.device)))


def _factor_noise(noise: Sequence[Any], gain: Tensor | None, backend: Backend | None) -> dict[str, Any]:
    """The arguments that products of activations share, as skinny.py takes them."""
    seed, tensor_id, row_offset, draws, scales = noise
    place = {"seed": seed & _SEED, "tensor_id": tensor_id, "row_offset": row_offset}
    return place | {"draws": draws, "scales": scales, "gain": gain, "backend": backend}


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


def _fake_factor(seed: int, rows: int, rank: int, *rest: Any) -> Tensor:
    return torch.empty(rows, rank, device=rest[-2])


def _fake_nothing(*arguments: Any) -> None:
    """The ops that change weights return nothing."""


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lowrank_update_": (_lowrank_update_, _fake_nothing),
    "dense_update_": (_dense_update_, _fake_nothing),
    "lowrank_momentum_": (_lowrank_momentum_, _fake_nothing),
    "dense_momentum_": (_dense_momentum_, _fake_nothing),
    "resample_": (_resample_, _fake_nothing),
    "factor_update_": (_factor_update_, _fake_nothing),
    "lowrank_merge_": (_lowrank_merge_, _fake_nothing),
    "dense_merge_": (_dense_merge_, _fake_nothing),
    "lowrank_linear_": (_lowrank_linear_, _fake_nothing),
    "lowrank_embedding_": (_lowrank_embedding_, _fake_nothing),
    "factor": (_factor, _fake_factor),
}

for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lozo_kernels::{_name}", _fake, lib=_LIBRARY)

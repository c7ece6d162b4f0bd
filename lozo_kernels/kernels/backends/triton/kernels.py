"""Which function launches the kernels of an op over a table."""

from __future__ import annotations

from collections.abc import Callable

from .dense import launch_dense
from .dense_merge import launch_dense_merge
from .lowrank import launch_factor_update, launch_lowrank
from .lowrank_merge import launch_lowrank_merge
from .work import Work

LAUNCH: dict[str, Callable[[Work], None]] = {
    "lowrank_update": launch_lowrank,
    "lowrank_momentum": launch_lowrank,
    "dense_update": launch_dense,
    "dense_momentum": launch_dense,
    "factor_update": launch_factor_update,
    "lowrank_merge": launch_lowrank_merge,
    "dense_merge": launch_dense_merge,
}

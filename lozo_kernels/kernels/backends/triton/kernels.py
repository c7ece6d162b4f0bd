"""Which function launches the kernels of an op over a table."""

from __future__ import annotations

from collections.abc import Callable

from ...calls import TableCall
from ...op_table import Op
from ...table import TensorTable
from .dense import launch_dense
from .dense_merge import launch_dense_merge
from .launcher import Launcher
from .lowrank import launch_factor_update, launch_lowrank
from .lowrank_merge import launch_lowrank_merge
from .lowrank_signed import launch_lowrank_signed
from .work import SizeOf, Work

_LAUNCH: dict[str, Callable[[Work], None]] = {
    "lowrank_update": launch_lowrank,
    "lowrank_signed_update": launch_lowrank_signed,
    "dense_update": launch_dense,
    "dense_momentum": launch_dense,
    "factor_update": launch_factor_update,
    "factor_momentum": launch_factor_update,
    "lowrank_merge": launch_lowrank_merge,
    "dense_merge": launch_dense_merge,
}


def launch(op: Op, table: TensorTable, call: TableCall, launcher: Launcher, size_of: SizeOf) -> None:
    """Launches the kernels of an op.

    Raises:
        NotImplementedError: it has none.
    """
    of_op = _LAUNCH.get(op.kernel)
    if of_op is None:
        raise NotImplementedError(f"the triton backend has no kernel for {op.name}; backend='eager' runs every op")
    of_op(Work(op, table, call, launcher, size_of))

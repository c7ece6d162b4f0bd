"""Correctness before speed: an op is timed only if it gives the bits of ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.registry import choose_backend
from ..kernels.table import TensorTable
from .cases import Case, compare
from .op_calls import SEED, WINDOW, OpCall, Weights, dense_calls, lowrank_calls

_ROWS, _ELEMENTS = 3, 512  # of a piece: whole rows of a matrix, elements of a dense tensor
_FEW = 64  # up to so many tensors are checked at the beginning, in the middle and at the end; of more, each at one of them
_ODD_SHAPES = ((5, 3), (33, 129), (2, 1), (1, 70))


class GateError(Exception):
    """An op disagrees with its reference."""


def check_small(name: str, dtype: torch.dtype, call: OpCall) -> None:
    """Checks the op of a call on small matrices of odd shapes, in full, against reference.py on the CPU.

    Raises:
        GateError: it disagrees with its reference.
    """
    small = small_call(name, dtype, call)
    pieces = [(t, slice(0, _size(small.case.table, t))) for t in range(len(small.case.table))]
    _compare(name, "small matrices", small, pieces, torch.device("cpu"))


def small_call(name: str, dtype: torch.dtype, call: OpCall) -> OpCall:
    """Makes the same call on small matrices of odd shapes."""
    generator = torch.Generator().manual_seed(0)
    matrices = [
        (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") / 50).to(call.case.table.device, dtype)
        for shape in _ODD_SHAPES
    ]
    weights = Weights("small", matrices)
    if call.case.table.v is None:
        return dense_calls(weights.dense_table(), call.backend)[name]
    return lowrank_calls(weights.lowrank_table(call.case.table.rank, call.backend), call.backend)[name]


def check(name: str, label: str, call: OpCall) -> None:
    """Runs a call and compares parts of every tensor of its table with reference.py, evaluated on the device of the table.

    Args:
        name: of the row, for the message.
        label: of the weights, for the message.

    Raises:
        GateError: they disagree.
    """
    table = call.case.table
    pieces = [(t, piece) for t in range(len(table)) for piece in _pieces(_size(table, t), table, t)]
    _compare(name, label, call, pieces, table.device)


def _compare(name: str, label: str, call: OpCall, pieces: list[tuple[int, slice]], device: torch.device) -> None:
    table = call.case.table
    arguments = {k: _of_pieces(v, pieces) if isinstance(v, Tensor) else v for k, v in call.case.call.items()}
    want = Case(call.case.op, _cut(table, pieces), arguments).on(device)
    eager = choose_backend(device, "eager").backend
    if table.v is not None:  # V is made anew, so that a wrong resample_ shows too
        eager.resample_(want.table, SEED, WINDOW, reproject=False)
    ops.run(want.op, want.table, **want.call, backend=eager)
    call.run()
    got = Case(call.case.op, _cut(table, pieces), arguments).on(device)
    for compared in compare(got, want):
        if compared.wrong:
            rank = f" rank {table.rank}" if table.rank else ""
            dtype = str(table.x[0].dtype).removeprefix("torch.")
            raise GateError(
                f"{name} {dtype}{rank} on {label}: checked values differ from reference.py (backend {call.backend.name}): "
                f"{compared.text}"
            )


def _cut(table: TensorTable, pieces: list[tuple[int, slice]]) -> TensorTable:
    """Copies pieces of a table into a table of their own, in which they have the same noise."""
    if table.v is None:
        return TensorTable(
            [table.x[t][:, :, piece].clone() for t, piece in pieces],
            [table.tensor_ids[t] for t, _ in pieces],
            col_offsets=[piece.start for _, piece in pieces],
            global_cols=[table.global_cols[t] for t, _ in pieces],
        )
    return TensorTable(
        [table.x[t][:, piece].clone() for t, piece in pieces],
        [table.tensor_ids[t] for t, _ in pieces],
        v=[table.v[t].clone() for t, _ in pieces],
        n=None if table.n is None else [table.n[t][:, piece].clone() for t, piece in pieces],
        row_offsets=[piece.start for _, piece in pieces],
    )


def _of_pieces(scalars: Tensor, pieces: list[tuple[int, slice]]) -> Tensor:
    """Makes scalars for each piece of those for each tensor, which are the same for all tensors here."""
    return scalars[..., :1].expand(*scalars.shape[:-1], len(pieces)).contiguous()


def _size(table: TensorTable, t: int) -> int:
    """Returns the rows of a low-rank tensor, or the elements of a dense one."""
    _, rows, cols = table.x[t].shape
    return rows if table.v is not None else cols


def _pieces(size: int, table: TensorTable, t: int) -> list[slice]:
    """Chooses ranges of rows of a low-rank tensor, or of elements of a dense one."""
    width = _ROWS if table.v is not None else _ELEMENTS
    starts = sorted({0, max(0, size // 2 - width), max(0, size - width)})
    if len(table) > _FEW:
        starts = [starts[t % len(starts)]]
    return [slice(s, min(size, s + width)) for s in starts]

"""Correctness before speed: an op is timed only if it gives the bits of reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import noise, reference
from ..kernels.table import TensorTable
from .weights import SEED, WINDOW, OpCall, Weights, dense_calls, lowrank_calls

_EXACT_MOMENTUM_RANK = 8  # above it momentum products are bounded, not promised in bits
_ROWS, _ELEMENTS = 3, 512  # of a piece: whole rows of a matrix, elements of a dense tensor
_FEW = 64  # up to so many tensors are checked at the beginning, in the middle and at the end; of more, each at one of them
_ODD_SHAPES = ((5, 3), (33, 129), (2, 1), (1, 70))
_BITS = {2: torch.int16, 4: torch.int32}


class GateError(Exception):
    """An op disagrees with its reference."""


def check_small(name: str, dtype: torch.dtype, call: OpCall) -> None:
    """Checks the op of a call on small matrices of odd shapes, in full, against reference.py on the CPU.

    Raises:
        GateError: it disagrees with its reference.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = [(torch.randn(shape, generator=generator) / 50).to(call.table.device, dtype) for shape in _ODD_SHAPES]
    weights = Weights("small", matrices)
    if call.table.v is None:
        small = dense_calls(weights.dense_table(), call.backend)[name]
    else:
        small = lowrank_calls(weights.lowrank_table(call.table.rank, call.backend), call.backend)[name]
    pieces = [(t, slice(0, _size(small.table, t))) for t in range(len(small.table))]
    _compare(name, "small matrices", small, pieces, torch.device("cpu"))


def check(name: str, label: str, call: OpCall) -> None:
    """Runs a call and compares parts of every tensor of its table with reference.py, evaluated on the device of the table.

    Args:
        name: of the row, for the message.
        label: of the weights, for the message.

    Raises:
        GateError: they disagree.
    """
    table = call.table
    pieces = [(t, piece) for t in range(len(table)) for piece in _pieces(_size(table, t), table, t)]
    _compare(name, label, call, pieces, table.device)


def _compare(name: str, label: str, call: OpCall, pieces: list[tuple[int, slice]], device: torch.device) -> None:
    expected = [_Expected(call, t, piece, device) for t, piece in pieces]
    call.run()
    for (t, piece), want in zip(pieces, expected, strict=True):
        got = _part(call.table, t, piece).to(device)
        wrong = want.count_wrong(got, None if call.table.n is None else call.table.n[t][0, piece].to(device))
        if wrong:
            rank = f" rank {call.table.rank}" if call.table.rank else ""
            dtype = str(got.dtype).removeprefix("torch.")
            raise GateError(
                f"{name} {dtype}{rank} on {label}: {wrong} of {got.numel()} checked values of tensor {t} "
                f"differ from reference.py (backend {call.backend.name})"
            )


def _size(table: TensorTable, t: int) -> int:
    """Rows of a low-rank tensor, elements of a dense one."""
    _, rows, cols = table.x[t].shape
    return rows if table.v is not None else cols


def _pieces(size: int, table: TensorTable, t: int) -> list[slice]:
    """Ranges of rows of a low-rank tensor, of elements of a dense one."""
    width = _ROWS if table.v is not None else _ELEMENTS
    starts = sorted({0, max(0, size // 2 - width), max(0, size - width)})
    if len(table) > _FEW:
        starts = [starts[t % len(starts)]]
    return [slice(s, min(size, s + width)) for s in starts]


def _part(table: TensorTable, t: int, piece: slice) -> Tensor:
    return table.x[t][0, piece] if table.v is not None else table.x[t][0, 0, piece]


class _Expected:
    """A piece of one tensor, and of its momentum, as they must be after a call that was not made yet."""

    def __init__(self, call: OpCall, t: int, piece: slice, device: torch.device) -> None:
        table = call.table
        tensor_id = table.tensor_ids[t]
        size = piece.stop - piece.start
        x = _part(table, t, piece).to(device)
        scales = [torch.tensor(s) for s in call.scales]
        self.n: Tensor | None = None
        self.tolerance: Tensor | None = None
        if table.v is None:
            zs = [noise.dense(SEED, size, tensor_id, d.step, offset=piece.start, device=device) for d in call.draws]
            self.x = reference.round_nearest(reference.dense_update(x, zs, scales), x.dtype)
            return
        rank, cols = table.rank, x.shape[1]
        us = [noise.factor(SEED, size, rank, tensor_id, d.step, row_offset=piece.start, device=device) for d in call.draws]
        # Made anew, not taken from the table: a wrong resample_ shows too.
        v = noise.factor(SEED, cols, rank, tensor_id, WINDOW, stream="V", device=device).t()
        y = reference.lowrank_update(x, v, us, scales)
        if call.op == "lowrank_momentum":
            assert table.n is not None
            coefficients = [torch.tensor(c) for c in call.coefficients]
            self.n = reference.momentum(table.n[t][0, piece].to(device), us, coefficients, torch.tensor(call.beta))
            y = reference.apply_momentum(y, reference.momentum_product(self.n, v), torch.tensor(call.alpha))
            if rank > _EXACT_MOMENTUM_RANK:  # rank roundings of the partial sums, and one into the dtype
                sums = abs(call.alpha) * (self.n.abs().double() @ v.abs().double()) + y.abs().double()
                self.tolerance = rank * 2.0**-23 * sums + torch.finfo(x.dtype).eps * y.abs().double()
        self.x = reference.round_nearest(y, x.dtype)

    def count_wrong(self, x: Tensor, n: Tensor | None) -> int:
        """How many values differ."""
        if self.tolerance is None:
            bits = _BITS[x.element_size()]
            wrong = x.contiguous().view(bits) != self.x.contiguous().view(bits)
        else:
            wrong = (x.double() - self.x.double()).abs() > self.tolerance
        count = int(wrong.sum())
        if self.n is not None and n is not None:
            count += int((n != self.n).sum())
        return count

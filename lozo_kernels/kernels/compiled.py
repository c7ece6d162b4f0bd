"""Calls of the operators of ``torch_ops.py`` from code that torch compiles: the arguments of ``ops.py`` are made flat here."""

from __future__ import annotations

import torch

from .calls import LayerCall, PointsCall, TableCall
from .op_table import Op
from .registry import Backend
from .table import TensorTable


def call_operator(op: Op, table: TensorTable, call: TableCall, backend: Backend | None) -> None:
    """Calls the torch operator of an op over a table. Raises NotImplementedError for a merge into the table's own weights,
    because the schema says that a merge only reads them."""
    if op.out and call.out is None:
        raise NotImplementedError("compiled code can merge into other memory only: give out")
    device, rounding = table.device, call.rounding
    tensors = {"out": None if call.out is None else call.out.x, "x": table.x, "v": table.v, "n": table.n}
    steps = [torch.as_tensor(draw.step, device=device, dtype=torch.int64) for draw in call.draws]
    packet = getattr(torch.ops.lozo_kernels, op.name)
    (packet.law if call.signs else packet.default)(
        *[tensors[name] or [] for name in op.lists],
        table.positions,
        signed_seed(call.seed),
        torch.stack(steps) if steps else torch.zeros(0, dtype=torch.int64, device=device),
        [draw.direction for draw in call.draws],
        call.scales,
        call.decay,
        None if rounding is None else torch.as_tensor(rounding.step, device=device, dtype=torch.int64),
        0 if rounding is None else rounding.index,
        name_of(backend),
        *([call.coefficients, call.alpha, call.beta] if op.momentum else []),
        *([call.law] if call.signs else []),
    )


def call_layer_operator(call: LayerCall, backend: Backend | None, *, lookup: bool) -> None:
    """Calls the torch operator lowrank_embedding_ with ``lookup``, otherwise lowrank_linear_."""
    factors = (call.v, call.b, signed_seed(call.seed), call.tensor_id, call.row_offset, call.draws, call.scales)
    if lookup:
        torch.ops.lozo_kernels.lowrank_embedding_(call.y, call.x, *factors, call.gain, name_of(backend))
    else:
        torch.ops.lozo_kernels.lowrank_linear_(call.y, call.x, *factors, call.transposed, call.gain, call.shift, name_of(backend))


def call_points_operator(call: PointsCall, backend: Backend | None) -> None:
    """Calls the torch operator lowrank_points_."""
    factors = (call.v, call.b, call.u, call.directions, call.scales)
    torch.ops.lozo_kernels.lowrank_points_(call.y, call.x, *factors, call.transposed, call.gain, name_of(backend))


def name_of(backend: Backend | None) -> str:
    """The backend's name as the operators take it; "" chooses the best backend."""
    return "" if backend is None else backend.name


def signed_seed(seed: int) -> int:
    """The 64 bits of a seed as a signed number, which is what a schema's ``int`` can hold."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed

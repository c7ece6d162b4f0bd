"""Code that torch compiles calls the operators of ``torch_ops.py``, whose flat arguments are made here from those of ``ops.py``."""

from __future__ import annotations

import torch

from .calls import LayerCall, TableCall
from .op_table import Op
from .registry import Backend
from .table import TensorTable


def call_operator(op: Op, table: TensorTable, call: TableCall, backend: Backend | None) -> None:
    """One pass over a table.

    Raises:
        NotImplementedError: a merge into the table's own weights, of which a schema cannot say that it only reads them.
    """
    if op.out and call.out is None:
        raise NotImplementedError("compiled code can merge into other memory only: give out")
    device, rounding = table.device, call.rounding
    tensors = {"out": None if call.out is None else call.out.x, "x": table.x, "v": table.v, "n": table.n}
    steps = [torch.as_tensor(draw.step, device=device) for draw in call.draws]
    getattr(torch.ops.lozo_kernels, op.name)(
        *[tensors[name] or [] for name in op.lists],
        table.positions,
        signed_seed(call.seed),
        torch.stack(steps) if steps else torch.zeros(0, dtype=torch.int64, device=device),
        [draw.direction for draw in call.draws],
        call.scales,
        call.decay,
        None if rounding is None else torch.as_tensor(rounding.step, device=device),
        0 if rounding is None else rounding.index,
        name_of(backend),
        *([call.coefficients, call.alpha, call.beta] if op.momentum else []),
    )


def call_layer_operator(call: LayerCall, backend: Backend | None, *, lookup: bool) -> None:
    """One product of activations, or with ``lookup`` of an embedding's rows."""
    factors = (call.v, call.b, signed_seed(call.seed), call.tensor_id, call.row_offset, call.draws, call.scales)
    if lookup:
        torch.ops.lozo_kernels.lowrank_embedding_(call.y, call.x, *factors, call.gain, name_of(backend))
    else:
        torch.ops.lozo_kernels.lowrank_linear_(call.y, call.x, *factors, call.transposed, call.gain, call.shift, name_of(backend))


def name_of(backend: Backend | None) -> str:
    """A backend as operators take it: "" for the best."""
    return "" if backend is None else backend.name


def signed_seed(seed: int) -> int:
    """The 64 bits of a seed as a signed number."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed

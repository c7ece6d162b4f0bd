"""Products of activations with the factors of a weight: what a probe adds to the outputs of a layer whose weight is only read.

Between two draws of V the weight of LOZO is W + B V^T (Chen et al., ICLR 2025, Section 4.1), so a probed layer computes
X W^T + (X V)(B + scale U)^T. Sums of activations are not promised in bits: they are bounded, as the layer's own are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import LayerCall
from .checks import check_integer, check_range
from .compiled import call_layer_operator
from .noise import MAX_DIRECTION, MAX_DRAW, MAX_RANK
from .registry import Backend, choose_backend
from .table import DTYPES, FACTOR_LIMIT, check_apart, storage_problem


def lowrank_linear_(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    seed: int,
    tensor_id: int,
    draws: Tensor,
    scales: Tensor,
    row_offset: int = 0,
    transposed: bool = False,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Y <- gain * Y + (X V)(B + scale U)^T + shift, for a layer that computes X W^T with W (rows, cols).

    Args:
        y: (tokens, rows), fp32, bf16 or fp16, unit column stride; changed in place.
        x: (tokens, cols), its dtype may be another.
        v: (rank, cols) fp16, contiguous: V transposed.
        b: (rows, rank) fp32, contiguous.
        seed, tensor_id, row_offset: place of U in the noise.
        draws: (groups, 2) int64 on the device of y: step and direction. The tokens are ``groups`` equal blocks, in order.
        scales: (groups,) fp32.
        transposed: the layer computes X W: y is (tokens, cols), x (tokens, rows), and X (B + scale U) V^T is added.
        gain: (1,) fp32, or None for 1.
        shift: (groups, columns of y) fp32, or None for 0.
        backend: default: the best for the device.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    _check_storage(y, x, v, b, draws, scales, *(t for t in (gain, shift) if t is not None))
    tokens, groups, rows, cols = _check(y, v, b, draws, scales, gain)
    _check_place(seed, tensor_id, row_offset, rows, draws)
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    if y.shape[1] != outputs:
        raise ValueError(f"y is {tuple(y.shape)}; needed is ({tokens}, {outputs})")
    if x.shape != (tokens, inputs) or x.dtype not in DTYPES or (inputs > 1 and x.stride(1) != 1) or x.device != y.device:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; "
            f"needed is ({tokens}, {inputs}) on {y.device}, rows contiguous"
        )
    if shift is not None and (shift.shape != (groups, outputs) or not _is_plain(shift, torch.float32, y.device)):
        raise ValueError(f"shift is {_describe(shift)}; needed is contiguous fp32 ({groups}, {outputs}) on {y.device}")
    dispatch(LayerCall(y, x, v, b, seed, tensor_id, row_offset, draws, scales, transposed, gain, shift), backend, lookup=False)


def lowrank_embedding_(
    y: Tensor,
    rows: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    seed: int,
    tensor_id: int,
    draws: Tensor,
    scales: Tensor,
    row_offset: int = 0,
    gain: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Y <- gain * Y + ((B + scale U) V^T)[rows]: only the rows of U that are looked up are generated.

    Args:
        y: (tokens, cols); rows: (tokens,) int64 or int32, contiguous; on a GPU the embedding itself has to have checked them.
        v, b, seed, tensor_id, draws, scales, row_offset, gain, backend: as in :func:`lowrank_linear_`.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    _check_storage(y, rows, v, b, draws, scales, *(() if gain is None else (gain,)))
    tokens, _, count, cols = _check(y, v, b, draws, scales, gain)
    _check_place(seed, tensor_id, row_offset, count, draws)
    if y.shape[1] != cols:
        raise ValueError(f"y is {tuple(y.shape)}; needed is ({tokens}, {cols})")
    if rows.shape != (tokens,) or rows.dtype not in (torch.int64, torch.int32) or not _is_plain(rows, rows.dtype, y.device):
        raise ValueError(f"rows is {_describe(rows)}; needed is contiguous int64 or int32 ({tokens},) on {y.device}")
    if tokens and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = torch.aminmax(rows)
        if least < 0 or most >= count:
            raise ValueError(f"rows are 0 to {count - 1}, not {int(least)} to {int(most)}")
    dispatch(LayerCall(y, rows, v, b, seed, tensor_id, row_offset, draws, scales, gain=gain), backend, lookup=True)


def dispatch(call: LayerCall, backend: Backend | None, *, lookup: bool) -> None:
    """Makes a call whose arguments are known to be right: this runs after every layer of a probed model's forward pass.

    Args:
        lookup: :func:`lowrank_embedding_`, otherwise :func:`lowrank_linear_`.
    """
    if torch.compiler.is_compiling():
        call_layer_operator(call, backend, lookup=lookup)
        return
    backend = choose_backend(call.y.device).backend if backend is None else backend
    (backend.lowrank_embedding_ if lookup else backend.lowrank_linear_)(call)


def _check(y: Tensor, v: Tensor, b: Tensor, draws: Tensor, scales: Tensor, gain: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens, groups, rows and columns of the weight."""
    device = y.device
    if y.dtype not in DTYPES:
        raise TypeError(f"y is {y.dtype}; supported are {', '.join(str(d) for d in DTYPES)}")
    if y.dim() != 2 or (y.shape[1] > 1 and y.stride(1) != 1) or (y.shape[0] > 1 and y.stride(0) < y.shape[1]):
        raise ValueError(f"y is {tuple(y.shape)} with strides {y.stride()}; needed is (tokens, outputs), rows contiguous and apart")
    if v.dim() != 2 or not _is_plain(v, torch.float16, device):
        raise ValueError(f"v is {_describe(v)}; needed is contiguous fp16 (rank, cols) on {device}")
    rank, cols = v.shape
    if b.dim() != 2 or b.shape[1] != rank or not 1 <= rank <= MAX_RANK or not _is_plain(b, torch.float32, device):
        raise ValueError(f"b is {_describe(b)}; needed is contiguous fp32 (rows, {rank}) on {device}, rank 1 to {MAX_RANK}")
    if draws.dim() != 2 or draws.shape[1] != 2 or not _is_plain(draws, torch.int64, device):
        raise ValueError(f"draws is {_describe(draws)}; needed is contiguous int64 (groups, 2) on {device}")
    tokens, groups = y.shape[0], draws.shape[0]
    if scales.shape != (groups,) or not _is_plain(scales, torch.float32, device):
        raise ValueError(f"scales is {_describe(scales)}; needed is contiguous fp32 ({groups},) on {device}")
    if gain is not None and (gain.shape != (1,) or not _is_plain(gain, torch.float32, device)):
        raise ValueError(f"gain is {_describe(gain)}; needed is fp32 (1,) on {device}")
    if groups == 0 or tokens % groups:
        raise ValueError(f"{tokens} tokens do not divide into {groups} evaluations")
    return tokens, groups, b.shape[0], cols


def _check_storage(*tensors: Tensor) -> None:
    """Raises TypeError or ValueError unless all are tensors with memory of their own; the first, which is written, shares none."""
    if torch.compiler.is_compiling():
        return
    written = None
    for t in tensors:
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type == "meta":
            raise TypeError(f"the arguments are dense tensors in storage, not {t!r:.200}")
        memory = t.untyped_storage().data_ptr()
        if not memory or t.is_neg():
            problem = storage_problem(t)
            if problem is not None:
                raise ValueError(f"a tensor of shape {tuple(t.shape)}: {problem}")
        if written is None:
            written = memory
        elif memory == written and memory:
            check_apart([("y", tensors[0]), ("another argument", t)])


def _check_place(seed: int, tensor_id: int, row_offset: int, rows: int, draws: Tensor) -> None:
    """Raises TypeError or ValueError for a place that is not in the noise; draws on a device are not read."""
    if type(seed) is int and type(tensor_id) is int and type(row_offset) is int:
        good = 0 <= seed < 1 << 64 and 0 <= tensor_id < 1 << 32 and 0 <= row_offset <= FACTOR_LIMIT - rows
    else:
        good = False
    if not good:
        check_range("seed", seed, 1 << 64)
        check_range("tensor_id", tensor_id, 1 << 32)
        check_integer("row_offset", row_offset)
        if not 0 <= row_offset <= FACTOR_LIMIT - rows:
            raise ValueError(f"rows {row_offset} to {row_offset + rows} are outside 0 to {FACTOR_LIMIT}")
    if draws.device.type == "cpu" and not torch.compiler.is_compiling():
        for step, direction in draws.tolist():
            if not (0 <= step < MAX_DRAW and 0 <= direction < MAX_DIRECTION):
                raise ValueError(
                    f"a draw is a step below {MAX_DRAW} and a direction below {MAX_DIRECTION}, not {step}, {direction}"
                )


def _is_plain(t: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return t.dtype == dtype and t.device == device and t.is_contiguous()


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device} (contiguous: {t.is_contiguous()})"

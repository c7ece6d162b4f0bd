"""Products of activations with the factors of a weight: what a probe adds to the outputs of a layer whose weight is only read.

Within a window the weight of LOZO is W + B V^T (Chen et al., ICLR 2025, Section 4.1), so a probed layer computes
X W^T + (X V)(B + scale U)^T. Sums over activations are bounded, not promised in bits, as are the layer's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import LayerCall, PointsCall
from .checks import check_integer, check_range
from .compiled import call_layer_operator, call_points_operator
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
    """Y <- gain * Y + (X V)(B + scale U)^T + shift, where Y are the outputs of a layer that computes X W^T with W (rows, cols).

    Args:
        y: (tokens, rows), fp32, bf16 or fp16, unit column stride; changed in place.
        x: (tokens, cols), any of these dtypes.
        v: (rank, cols) fp16, contiguous: V transposed.
        b: (rows, rank) fp32, contiguous.
        seed, tensor_id, row_offset: the place of U in the noise.
        draws: (groups, 2) int64 on the device of y: step and direction. The tokens are ``groups`` equal blocks, in order.
        scales: (groups,) fp32.
        transposed: the layer computes X W: y is (tokens, cols), x (tokens, rows), and X (B + scale U) V^T is added.
        gain: (1,) fp32, or None for 1.
        shift: (groups, columns of y) fp32, or None for 0.
        backend: default: the best for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device, or shares memory with y.
    """
    _check_storage(y, x, v, b, draws, scales, *(t for t in (gain, shift) if t is not None))
    _, groups, rows, cols = _check(y, v, b, draws, scales, gain)
    _check_place(seed, tensor_id, row_offset, rows, draws)
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    _check_activations(y, x, inputs, outputs)
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
    """Y <- gain * Y + ((B + scale U) V^T)[rows]. Only the rows of U that are looked up are generated.

    Args:
        y: (tokens, cols).
        rows: (tokens,) int64 or int32, contiguous. On a GPU they are not checked here: the embedding itself has to have done it.
        v, b, seed, tensor_id, draws, scales, row_offset, gain, backend: as in :func:`lowrank_linear_`.

    Raises:
        TypeError, ValueError: as in :func:`lowrank_linear_`.
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


def lowrank_points_(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    b: Tensor,
    u: Tensor | None,
    directions: Tensor,
    scales: Tensor,
    *,
    transposed: bool = False,
    gain: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Y[t] <- gain * Y[t] + (X[t] V) B^T + scales[t] * (X[t] V_r) U[directions[t]]^T, where V_r is the first r columns of V.

    What tokens at several points add to the outputs of a layer that computes X W^T with W (rows, cols). The first r ranks are those
    of the current window, the others those of earlier windows.

    Args:
        y: (tokens, rows), fp32, bf16 or fp16, unit column stride; changed in place.
        x: (tokens, cols), any of these dtypes.
        v: (ranks, cols) fp32, contiguous: V transposed.
        b: (ranks, rows) fp32, contiguous: B transposed.
        u: (count, r, rows) fp32, contiguous: U of each direction transposed, r <= ranks; None adds no U.
        directions: (tokens,) int64, below count. They are not read without u, and not checked here on a GPU.
        scales: (tokens,) fp32. A token with scale 0 gets no U.
        transposed: the layer computes X W: y is (tokens, cols), x (tokens, rows), and (X[t] B) V^T + scales[t] * (X[t] U) V_r^T is
            added.
        gain: (1,) fp32, or None for 1.
        backend: default: the best for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device, or shares memory with y.
    """
    _check_storage(y, x, v, b, directions, scales, *(t for t in (u, gain) if t is not None))
    _check_outputs(y)
    device, tokens = y.device, y.shape[0]
    if v.dim() != 2 or not len(v) or not _is_plain(v, torch.float32, device):
        raise ValueError(f"v is {_describe(v)}; needed is contiguous fp32 (ranks, cols) on {device}, one rank at least")
    if b.dim() != 2 or len(b) != len(v) or not _is_plain(b, torch.float32, device):
        raise ValueError(f"b is {_describe(b)}; needed is contiguous fp32 ({len(v)}, rows) on {device}")
    ranks, rows, cols = len(v), b.shape[1], v.shape[1]
    _check_activations(y, x, *((rows, cols) if transposed else (cols, rows)))
    if directions.shape != (tokens,) or not _is_plain(directions, torch.int64, device):
        raise ValueError(f"directions is {_describe(directions)}; needed is contiguous int64 ({tokens},) on {device}")
    if scales.shape != (tokens,) or not _is_plain(scales, torch.float32, device):
        raise ValueError(f"scales is {_describe(scales)}; needed is contiguous fp32 ({tokens},) on {device}")
    _check_gain(gain, device)
    if u is not None:
        most = min(ranks, MAX_RANK)
        if u.dim() != 3 or not 1 <= u.shape[1] <= most or u.shape[2] != rows or not _is_plain(u, torch.float32, device):
            raise ValueError(f"u is {_describe(u)}; needed is contiguous fp32 (count, 1 to {most}, {rows}) on {device}")
        if tokens and device.type == "cpu" and not torch.compiler.is_compiling():
            least, largest = torch.aminmax(directions)
            if least < 0 or largest >= len(u):
                raise ValueError(f"directions are 0 to {len(u) - 1}, not {int(least)} to {int(largest)}")
    dispatch_points(PointsCall(y, x, v, b, u, directions, scales, transposed, gain), backend)


def dispatch(call: LayerCall, backend: Backend | None, *, lookup: bool) -> None:
    """Makes a call whose arguments are known to be right. A probed model calls this after every layer of its forward pass.

    Args:
        lookup: the op is :func:`lowrank_embedding_`, otherwise :func:`lowrank_linear_`.
    """
    if torch.compiler.is_compiling():
        call_layer_operator(call, backend, lookup=lookup)
        return
    backend = choose_backend(call.y.device).backend if backend is None else backend
    (backend.lowrank_embedding_ if lookup else backend.lowrank_linear_)(call)


def dispatch_points(call: PointsCall, backend: Backend | None) -> None:
    """Makes a call of :func:`lowrank_points_` whose arguments are known to be right."""
    if torch.compiler.is_compiling():
        call_points_operator(call, backend)
        return
    backend = choose_backend(call.y.device).backend if backend is None else backend
    backend.lowrank_points_(call)


def _check_outputs(y: Tensor) -> None:
    if y.dtype not in DTYPES:
        raise TypeError(f"y is {y.dtype}; supported are {', '.join(str(d) for d in DTYPES)}")
    if y.dim() != 2 or (y.shape[1] > 1 and y.stride(1) != 1) or (y.shape[0] > 1 and y.stride(0) < y.shape[1]):
        raise ValueError(f"y is {tuple(y.shape)} with strides {y.stride()}; needed is (tokens, outputs), rows contiguous and apart")


def _check_activations(y: Tensor, x: Tensor, inputs: int, outputs: int) -> None:
    tokens = y.shape[0]
    if y.shape[1] != outputs:
        raise ValueError(f"y is {tuple(y.shape)}; needed is ({tokens}, {outputs})")
    if x.shape != (tokens, inputs) or x.dtype not in DTYPES or (inputs > 1 and x.stride(1) != 1) or x.device != y.device:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; "
            f"needed is ({tokens}, {inputs}) on {y.device}, rows contiguous"
        )


def _check_gain(gain: Tensor | None, device: torch.device) -> None:
    if gain is not None and (gain.shape != (1,) or not _is_plain(gain, torch.float32, device)):
        raise ValueError(f"gain is {_describe(gain)}; needed is fp32 (1,) on {device}")


def _check(y: Tensor, v: Tensor, b: Tensor, draws: Tensor, scales: Tensor, gain: Tensor | None) -> tuple[int, int, int, int]:
    """Returns tokens, groups, and the rows and columns of the weight, or raises for arguments that do not fit."""
    _check_outputs(y)
    device = y.device
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
    _check_gain(gain, device)
    if groups == 0 or tokens % groups:
        raise ValueError(f"{tokens} tokens do not divide into {groups} evaluations")
    return tokens, groups, b.shape[0], cols


def _check_storage(*tensors: Tensor) -> None:
    """Raises TypeError or ValueError unless all are tensors with storage and none overlaps the first, which is written."""
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
    """Raises TypeError or ValueError for coordinates that the noise does not have. Draws on a device are not read."""
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

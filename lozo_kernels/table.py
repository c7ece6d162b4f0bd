"""The list of tensors that one call of an op works on, checked once and then reused until storage moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import MAX_RANK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Weight dtypes that the ops take; their position is the dtype code of the C ABI."""


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """Weights on one device as batches of matrices, with their factors and their place in the noise.

    Shapes, per tensor: ``x`` (batch, rows, cols) with unit column stride and any other strides; ``v`` (batch, rank, cols) fp16,
    contiguous: V transposed, whose values are multiples of 2**-8; ``n`` the momentum, fp32, contiguous: (batch, rows, rank) for
    low-rank tensors, (batch, rows, cols) for dense ones.

    Attributes:
        x: the weights, changed in place by the ops.
        tensor_ids: one :func:`noise.tensor_id` each.
        v: V, or None for a table of dense tensors.
        n: momentum, or None without.
        row_offsets: global index of the first local row, 0 if left out; matrix b of a batch starts at ``row_offset + b * rows``.
        col_offsets, global_cols: global index of the first local column (0 if left out) and the global number of columns. A dense
            tensor's flat element is ``row * global_cols + col``, all three global.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes, strides, devices or lengths do not fit.
    """

    x: Sequence[Tensor]
    tensor_ids: Sequence[int]
    v: Sequence[Tensor] | None = None
    n: Sequence[Tensor] | None = None
    row_offsets: Sequence[int] = ()
    col_offsets: Sequence[int] = ()
    global_cols: Sequence[int] = ()
    cache: dict[object, object] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Backends keep their packed form of this table here, under their name."""
    checked: bool = dataclasses.field(default=False, compare=False, repr=False)
    """The same tensors went into a table before, so that only the lengths are checked again."""

    def __post_init__(self) -> None:
        count = len(self.x)
        defaults = {
            "row_offsets": [0] * count,
            "col_offsets": [0] * count,
            "global_cols": [x.shape[-1] for x in self.x],
        }
        for name, value in defaults.items():
            if not len(getattr(self, name)):
                object.__setattr__(self, name, value)
        for name in ("tensor_ids", "v", "n", *defaults):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {count} tensors")
        for t in range(0 if self.checked else count):
            self._check(t)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where all of the table lives (cpu for an empty table)."""
        return self.x[0].device if len(self.x) else torch.device("cpu")

    @property
    def rank(self) -> int:
        """The common rank of the low-rank tensors, 0 for a dense table."""
        return self.v[0].shape[1] if self.v else 0

    def _check(self, t: int) -> None:
        x = self.x[t]
        where = f"tensor {t}"
        if x.layout != torch.strided or x.device.type == "meta":
            raise TypeError(f"{where} is {x.layout} on {x.device}; the ops change dense storage in place")
        if x.dtype not in DTYPES:
            raise TypeError(f"{where} is {x.dtype}; supported are {', '.join(str(d) for d in DTYPES)}")
        if x.dim() != 3:
            raise ValueError(f"{where} has shape {tuple(x.shape)}; give it as (batch, rows, cols)")
        batch, rows, cols = x.shape
        problem = stride_problem(x)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        if x.device != self.device:
            raise ValueError(f"{where} is on {x.device}, tensor 0 on {self.device}; use one table a device")
        if self.v is not None:
            v, rank = self.v[t], self.rank
            _check_like(v, (batch, rank, cols), torch.float16, x.device, f"v of {where}")
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"rank is 1 to {MAX_RANK}, not {rank}")
        if self.n is not None:
            last = self.rank if self.v is not None else cols
            _check_like(self.n[t], (batch, rows, last), torch.float32, x.device, f"n of {where}")


def stride_problem(x: Tensor) -> str | None:
    """Why a (batch, rows, cols) view cannot be changed in place by the ops, or None if it can."""
    batch, rows, cols = x.shape
    if x.numel() == 0:
        return None
    if cols > 1 and x.stride(2) != 1:
        return f"its column stride is {x.stride(2)}, and columns must be contiguous"
    if rows > 1 and x.stride(1) < cols:
        return f"its row stride is {x.stride(1)} for {cols} columns, so rows overlap (an expanded tensor?)"
    if batch > 1 and x.stride(0) < (rows - 1) * x.stride(1) + cols:
        return f"its batch stride is {x.stride(0)}, so matrices overlap (an expanded tensor?)"
    return None


def check_alike(table: TensorTable, out: TensorTable) -> None:
    """Raises ValueError unless ``out`` has weights of the same number, shapes, dtypes and device."""
    if len(out) != len(table):
        raise ValueError(f"out has {len(out)} tensors for {len(table)}")
    for t, (x, y) in enumerate(zip(table.x, out.x, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise ValueError(
                f"out of tensor {t} is {tuple(y.shape)} {y.dtype} on {y.device}; needed is {tuple(x.shape)} {x.dtype} on {x.device}"
            )


def _check_like(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype or t.device != device or not t.is_contiguous():
        raise ValueError(
            f"{what} is {tuple(t.shape)} {t.dtype} on {t.device} (contiguous: {t.is_contiguous()}); "
            f"needed is contiguous {shape} {dtype} on {device}"
        )

"""The list of tensors that one call of an op works on. It is checked once and reused until storage moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .checks import check_integer, check_range
from .noise import MAX_RANK

FACTOR_LIMIT, FLAT_LIMIT = 1 << 32, 1 << 42
"""The most rows of a factor, and the most elements of a tensor, that the noise counters can address."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Weight dtypes that the ops take. A dtype's position is its code in the C ABI."""


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """Weights on one device as batches of matrices, with their factors and their place in the noise.

    Shapes, per tensor: ``x`` (batch, rows, cols) with unit column stride and any other strides; ``v`` (batch, rank, cols) fp16,
    contiguous: V transposed, whose values are multiples of 2**-8; ``n`` fp32, contiguous: (batch, rows, rank) for low-rank tensors,
    (batch, rows, cols) for dense ones. No two of all these tensors share an element.

    Attributes:
        x: the weights, changed in place by the ops.
        tensor_ids: one :func:`noise.tensor_id` each.
        v: V, or None for a table of dense tensors.
        n: the momentum, or for a merge what is merged; None without.
        row_offsets: global index of the first local row, 0 if left out; matrix b of a batch starts at ``row_offset + b * rows``.
        col_offsets, global_cols: global index of the first local column (0 if left out) and the global number of columns. A dense
            tensor's flat element is ``row * global_cols + col``, all three global.

    Raises:
        TypeError: an entry is not a tensor with storage, or its dtype is not supported.
        ValueError: shapes, strides, devices or lengths do not fit, storage was freed, or tensors share some.
    """

    x: Sequence[Tensor]
    tensor_ids: Sequence[int]
    v: Sequence[Tensor] | None = None
    n: Sequence[Tensor] | None = None
    row_offsets: Sequence[int] = ()
    col_offsets: Sequence[int] = ()
    global_cols: Sequence[int] = ()
    cache: dict[object, object] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Backends keep their packed forms of this table here, under keys of their own."""
    checked: bool = dataclasses.field(default=False, compare=False, repr=False)
    """The same tensors passed the checks in an earlier table, so only the lengths are checked again."""

    def __post_init__(self) -> None:
        for name in ("x", "tensor_ids", "v", "n", "row_offsets", "col_offsets", "global_cols"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) and not (value is None and name in ("v", "n")):
                raise TypeError(f"{name} is a sequence, one entry for each tensor, not {value!r}")
        if not self.checked:
            self._check_tensors()
        count = len(self.x)
        defaults = {
            "row_offsets": lambda: [0] * count,
            "col_offsets": lambda: [0] * count,
            "global_cols": lambda: [x.shape[-1] if x.dim() else 1 for x in self.x],
        }
        for name, make in defaults.items():
            if not len(getattr(self, name)):
                object.__setattr__(self, name, make())
        for name in ("tensor_ids", "v", "n", *defaults):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {count} tensors")
        if not self.checked:
            for t in range(count):
                self._check(t)
            check_apart([*self.named("x"), *self.named("v"), *self.named("n")])

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """The device of all tensors (cpu for an empty table)."""
        return self.x[0].device if len(self.x) else torch.device("cpu")

    @property
    def rank(self) -> int:
        """The common rank of the low-rank tensors, 0 for a dense table."""
        return self.v[0].shape[1] if self.v else 0

    @property
    def positions(self) -> list[int]:
        """The places of the tensors in the noise as one list: id, row offset, column offset and global columns of each."""
        rows = zip(self.tensor_ids, self.row_offsets, self.col_offsets, self.global_cols, strict=True)
        return [number for row in rows for number in row]

    @classmethod
    def at_positions(cls, x: Sequence[Tensor], positions: Sequence[int], **rest: Any) -> TensorTable:
        """Makes a table from :attr:`positions` and its other fields."""
        ids, rows, cols, widths = (list(positions[i::4]) for i in range(4))
        return cls(x, ids, row_offsets=rows, col_offsets=cols, global_cols=widths, **rest)

    def check_positions(self, *, factors: bool, flat: bool) -> None:
        """Raises TypeError or ValueError if the noise cannot address a tensor. Once a check has passed, it is not repeated.

        Args:
            factors: rows and columns have factors U and V.
            flat: single elements have noise: Z, or rounding bits.
        """
        key = ("positions", factors, flat)
        if key not in self.cache:
            for t in range(len(self)):
                self._check_position(t, factors, flat)
            self.cache[key] = True

    def _check_position(self, t: int, factors: bool, flat: bool) -> None:
        batch, rows, cols = self.x[t].shape
        row, col, width = self.row_offsets[t], self.col_offsets[t], self.global_cols[t]
        check_range(f"tensor_id of tensor {t}", self.tensor_ids[t], 1 << 32)
        for name, value in (("row_offset", row), ("col_offset", col), ("global_cols", width)):
            check_integer(f"{name} of tensor {t}", value)
        if min(row, col, width) < 0:
            raise ValueError(f"tensor {t} has a negative offset or width: {row}, {col}, {width}")
        ends = []
        if factors:
            ends.append((max(row + batch * rows, col + (batch - 1) * width + cols), FACTOR_LIMIT))
        if flat:
            ends.append(((row + batch * rows - 1) * width + col + cols, FLAT_LIMIT))
        for end, limit in ends if batch * rows * cols else ():
            if end > limit:
                raise ValueError(f"tensor {t} reaches position {end}, beyond {limit}")

    def named(self, kind: str) -> list[tuple[str, Tensor]]:
        """For each of the tensors ``x``, ``v`` or ``n``: its name for messages, and the tensor."""
        prefix = "" if kind == "x" else f"{kind} of "
        return [(f"{prefix}tensor {t}", tensor) for t, tensor in enumerate(getattr(self, kind) or ())]

    def _check_tensors(self) -> None:
        for kind in ("x", "v", "n"):
            for name, t in self.named(kind):
                if not isinstance(t, Tensor):
                    raise TypeError(f"{name} is no tensor, but {t!r}")
                if t.layout != torch.strided or t.device.type == "meta":
                    raise TypeError(f"{name} is {t.layout} on {t.device}; the ops change dense storage in place")

    def _check(self, t: int) -> None:
        x = self.x[t]
        where = f"tensor {t}"
        if x.dtype not in DTYPES:
            raise TypeError(f"{where} is {x.dtype}; supported are {', '.join(str(d) for d in DTYPES)}")
        if x.dim() != 3:
            raise ValueError(f"{where} has shape {tuple(x.shape)}; give it as (batch, rows, cols)")
        batch, rows, cols = x.shape
        problem = stride_problem(x)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        problem = storage_problem(x)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        if x.device != self.device:
            raise ValueError(f"{where} is on {x.device}, tensor 0 on {self.device}; use one table a device")
        if self.v is not None:
            v = self.v[t]
            if self.v[0].dim() != 3:
                raise ValueError(f"v of tensor 0 has shape {tuple(self.v[0].shape)}; give it as (batch, rank, cols)")
            rank = self.rank
            _check_like(v, (batch, rank, cols), torch.float16, x.device, f"v of {where}")
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"rank is 1 to {MAX_RANK}, not {rank}")
        if self.n is not None:
            last = self.rank if self.v is not None else cols
            _check_like(self.n[t], (batch, rows, last), torch.float32, x.device, f"n of {where}")


def stride_problem(x: Tensor) -> str | None:
    """Returns why the ops cannot change a (batch, rows, cols) view in place, or None if they can."""
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


def storage_problem(t: Tensor) -> str | None:
    """Returns why a tensor's memory does not hold its values, or None if it does."""
    if torch.compiler.is_compiling():  # the memory is checked when the compiled code runs
        return None
    if t.is_neg() or t.is_conj():
        return "it is a view that negates or conjugates what it shows: give its resolve_neg() or resolve_conj()"
    if t.numel():
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if t.untyped_storage().nbytes() < (t.storage_offset() + last + 1) * t.element_size():
            return "its storage was freed or is too small"
    return None


def check_apart(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError if two tensors share an element.

    Args:
        tensors: for each its name for messages, and the tensor. Runs of contiguous elements are compared, not only address ranges.
    """
    if torch.compiler.is_compiling():
        return
    spans = []
    for name, t in tensors:
        if t.numel() and not isinstance(t, FakeTensor):  # fake tensors, which plans are made with, have no memory
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            spans.append((str(t.device), t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name, t))
    spans.sort(key=lambda span: span[:3])
    within: list[tuple[str, int, int, str, Tensor]] = []
    for span in spans:
        device, start, _, name, t = span
        within = [other for other in within if other[0] == device and other[2] > start]
        for *_, other_name, other in within:
            if _share(other, t):
                raise ValueError(
                    f"{other_name} and {name} share storage, which a pass over the weights would change twice: tie them (make them "
                    "one tensor), leave one out, or give one storage of its own"
                )
        within.append(span)


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose address ranges overlap have bytes in common. Two blocks of columns of one matrix have none."""
    (a_starts, a_size), (b_starts, b_size) = _runs(a), _runs(b)
    after = torch.searchsorted(a_starts, b_starts)  # the first run of a that begins at or after each run of b
    last = len(a_starts) - 1
    before = (after > 0) & (a_starts[(after - 1).clamp(min=0)] + a_size > b_starts)
    behind = (after <= last) & (a_starts[after.clamp(max=last)] < b_starts + b_size)
    return bool((before | behind).any())


def _runs(t: Tensor) -> tuple[Tensor, int]:
    """Returns the addresses at which the contiguous runs of a tensor begin, ascending, and the bytes of each run."""
    size = t.element_size()
    if t.is_contiguous():
        return torch.tensor([t.data_ptr()], dtype=torch.int64, device="cpu"), t.numel() * size
    whole = t.stride(-1) == 1
    starts, run = torch.tensor([0], dtype=torch.int64, device="cpu"), t.shape[-1] if whole else 1
    for length, stride in zip(t.shape[:-1] if whole else t.shape, t.stride(), strict=False):
        starts = (starts.unsqueeze(1) + torch.arange(length, dtype=torch.int64, device="cpu") * stride).flatten()
    return (starts * size + t.data_ptr()).sort().values, run * size


def check_alike(table: TensorTable, out: TensorTable) -> None:
    """Raises TypeError or ValueError unless ``out`` has weights of the table's number, shapes, dtypes and device, each of which
    is the table's own weight or shares no memory with anything in the table."""
    if not isinstance(out, TensorTable):
        raise TypeError(f"out is a TensorTable, not {out!r}")
    if len(out) != len(table):
        raise ValueError(f"out has {len(out)} tensors for {len(table)}")
    for t, (x, y) in enumerate(zip(table.x, out.x, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise ValueError(
                f"out of tensor {t} is {tuple(y.shape)} {y.dtype} on {y.device}; needed is {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if out.cache.get("apart from") is not table.cache:
        own = [_same_memory(x, y) for x, y in zip(table.x, out.x, strict=True)]
        theirs = [(f"out of {name}", y) for (name, y), same in zip(out.named("x"), own, strict=True) if not same]
        check_apart([*table.named("x"), *table.named("v"), *table.named("n"), *theirs])
        out.cache["apart from"] = table.cache  # marks the pair as checked; a cache does not keep weights alive


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()


def _check_like(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype or t.device != device or not t.is_contiguous():
        raise ValueError(
            f"{what} is {tuple(t.shape)} {t.dtype} on {t.device} (contiguous: {t.is_contiguous()}); "
            f"needed is contiguous {shape} {dtype} on {device}"
        )
    problem = storage_problem(t)
    if problem is not None:
        raise ValueError(f"{what}: {problem}")

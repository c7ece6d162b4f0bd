"""Random tables of awkward tensors: strides, gaps filled with other values, and storage that is not what it seems."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lozo_kernels import TensorTable
from lozo_kernels.kernels import noise
from lozo_kernels.kernels.table import DTYPES
from python_tests.fuzz.choices import ODD_THINGS, Choices, Memory

OTHER_DTYPES = (torch.float64, torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
FACTOR_LIMIT, FLAT_LIMIT = 1 << 32, 1 << 42


@dataclasses.dataclass
class Parts:
    """What a table is made from."""

    x: Any
    ids: Any
    v: Any
    n: Any
    rows: Any
    cols: Any
    widths: Any

    def table(self) -> TensorTable:
        return TensorTable(
            self.x, self.ids, v=self.v, n=self.n, row_offsets=self.rows, col_offsets=self.cols, global_cols=self.widths
        )

    def memory(self) -> Memory:
        tensors = [t for part in (self.x, self.v, self.n) if isinstance(part, list) for t in part]
        return Memory([t for t in tensors if isinstance(t, Tensor)])


def strided(case: Choices, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A random tensor in storage full of other values, with gaps between rows and between matrices."""
    batch, rows, cols = shape
    row_stride = cols + case.of(0, 0, 1, 3, 8)
    batch_stride = rows * row_stride + case.of(0, 0, 5)
    lead = case.of(0, 0, 1, 3)
    storage = torch.randint(-128, 128, ((lead + batch * batch_stride + 33) * 4,), dtype=torch.int8).view(dtype)
    x = torch.as_strided(storage, shape, (batch_stride, row_stride, 1), lead)
    x.copy_(torch.randn(shape) * case.of(0.1, 0.1, 0.1, 1e4, 1e-6))
    if x.numel() and case.chance(8):
        x[0, 0, 0] = case.of(float("nan"), float("inf"), -0.0, 1e-41, 6e4)
    return x


def make_parts(case: Choices, *, low_rank: bool, momentum: bool, factors: bool) -> Parts:
    """Tensors, factors and places that fit each other, then perhaps one thing that does not."""
    rank = case.of(1, 2, 3, 4, 8, 9, 16, 64) if low_rank else 0
    for odd in case.odd(2, 0, 65, 70, note="rank") if low_rank else ():
        rank = odd
    xs, ids, rows, cols, widths = [], [], [], [], []
    for _ in range(case.of(1, 2, 3, 2, 1, 0)):
        n = case.of(1, 2, 4, 8, 17, 64) if factors else case.of(0, 1, 3, 8, 17, 64)
        shape = (case.of(1, 1, 1, 2, 3), case.of(0, 1, 2, 5, 16), n)
        xs.append(strided(case, shape, torch.float32 if factors else case.of(*DTYPES)))
        ids.append(case.whole("tensor id", 1 << 32, 1))
        _place(case, shape, low_rank or factors, rows, cols, widths)
    vs = [noise.to_grid(torch.randn(x.shape[0], rank, x.shape[2])).half() for x in xs] if low_rank else None
    ns = [torch.randn(*x.shape[:2], rank if low_rank else x.shape[2]) for x in xs] if momentum else None
    parts = Parts(xs, ids, vs, ns, rows, cols, widths)
    if xs and case.chance(35):
        name, spoil = case.of(*SPOILERS)
        if name not in HARMLESS:
            case.notes.append(name)
        spoil(case, parts)
    return parts


def _place(case: Choices, shape: tuple[int, int, int], as_factor: bool, rows: list, cols: list, widths: list) -> None:
    batch, m, n = shape
    row, col = case.of(0, 0, 7, 1000), case.of(0, 0, 5, 64)
    width = n + col + case.of(0, 0, 3)
    for odd in case.odd(3, 1 << 20, 1 << 40, note="wide"):
        width = odd
    if case.chance(10) and n:  # as far as the noise reaches, or further
        row = FACTOR_LIMIT - batch * m if as_factor else max(0, (FLAT_LIMIT - col - n) // width + 1 - batch * m)
        for past in case.odd(30, 1, 2, 1 << 45, note="position"):
            row += past
    for odd in case.odd(1, -1, -(2**40), note="offset"):
        row, col = case.of((odd, col), (row, odd))
    rows.append(row)
    cols.append(col)
    widths.append(width)


def _some(case: Choices, parts: Parts) -> int:
    return case.integer(0, len(parts.x) - 1)


def _replace(case: Choices, parts: Parts, make: Callable[[Tensor], Any], of: tuple[str, ...] = ("x", "x", "v", "n")) -> None:
    name = case.of(*([part for part in of if getattr(parts, part) is not None] or ["x"]))
    which = getattr(parts, name)
    i = _some(case, parts)
    with contextlib.suppress(RuntimeError):  # a shape that this cannot be done to
        which[i] = make(which[i])


def _share(case: Choices, parts: Parts) -> None:
    """The same memory twice: a tensor of the table, or a factor inside of a weight."""
    i, j = _some(case, parts), _some(case, parts)
    x = parts.x[i]
    kind = case.of("again", "shifted", "n", "v", "n of another")
    if kind in ("again", "shifted") or parts.n is None:
        extra = x if kind != "shifted" else _shifted(x)
        for name, value in (("x", extra), ("ids", 5), ("rows", 0), ("cols", 0), ("widths", extra.shape[2])):
            getattr(parts, name).append(value)
        for name in ("v", "n"):
            if getattr(parts, name) is not None:
                getattr(parts, name).append(getattr(parts, name)[i].clone())
    elif kind == "v" and parts.v is not None:
        parts.v[j] = _inside(x, parts.v[j])
    elif kind == "n":
        parts.n[j] = _inside(x, parts.n[j])
    else:
        parts.n[j] = parts.n[i]
    if not (x.numel() and (kind == "again" or len({*map(id, parts.n or ())}) < len(parts.n or ()))):
        case.notes[-1] = "perhaps shared"


def _shifted(x: Tensor) -> Tensor:
    return torch.as_strided(x, x.shape, x.stride(), x.storage_offset() + 1)


def _inside(x: Tensor, like: Tensor) -> Tensor:
    """A tensor like another in the storage of a weight, where that is large enough."""
    flat = torch.tensor([], dtype=like.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
    return flat[: like.numel()].view(like.shape) if flat.numel() >= like.numel() else like


def _columns(case: Choices, parts: Parts) -> None:
    """Two weights that are columns of one matrix: side by side, apart."""
    i = _some(case, parts)
    batch, rows, cols = parts.x[i].shape
    whole = torch.randn(batch, rows, 2 * cols).to(parts.x[i].dtype)
    parts.x[i], other = whole[..., :cols], whole[..., cols:]
    for name, value in (("x", other), ("ids", 6), ("rows", 0), ("cols", 0), ("widths", cols)):
        getattr(parts, name).append(value)
    for name in ("v", "n"):
        if getattr(parts, name) is not None:
            getattr(parts, name).append(getattr(parts, name)[i].clone())


def _lengths(case: Choices, parts: Parts) -> None:
    name = case.of("ids", "v", "n", "rows", "cols", "widths")
    value = getattr(parts, name)
    if value is not None:
        setattr(parts, name, case.of(value[:-1] if len(value) > 1 else value * 2, value * 2))


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _other_rank(case: Choices, x: Tensor) -> Tensor:
    return case.of(x[0] if len(x) else x.flatten(), x.unsqueeze(0), x.flatten(), torch.zeros((), dtype=x.dtype))


def _one_thing(case: Choices, parts: Parts) -> None:
    name = case.of("x", "ids", "v", "n", "rows", "cols", "widths")
    odd = case.of(*ODD_THINGS)
    if case.chance(50) and getattr(parts, name):
        getattr(parts, name)[_some(case, parts)] = odd
    else:
        setattr(parts, name, odd)


SPOILERS: tuple[tuple[str, Callable[[Choices, Parts], None]], ...] = (
    ("another dtype", lambda case, p: _replace(case, p, lambda x: x.to(case.of(*OTHER_DTYPES)))),
    ("another rank", lambda case, p: _replace(case, p, lambda x: _other_rank(case, x))),
    ("transposed", lambda case, p: _replace(case, p, lambda x: x.transpose(1, 2))),
    ("expanded", lambda case, p: _replace(case, p, lambda x: x[:, :1].expand(-1, max(2, x.shape[1]), -1))),
    ("expanded batch", lambda case, p: _replace(case, p, lambda x: x[:1].expand(3, -1, -1))),
    ("overlapping rows", lambda case, p: _replace(case, p, lambda x: torch.as_strided(x.flatten(), (1, 2, 3), (3, 1, 1)), ("x",))),
    ("on meta", lambda case, p: _replace(case, p, lambda x: x.to("meta"))),
    ("sparse", lambda case, p: _replace(case, p, lambda x: x.to_sparse())),
    ("negated view", lambda case, p: _replace(case, p, torch._neg_view)),
    ("freed", lambda case, p: _replace(case, p, _freed)),
    ("inference", lambda case, p: _replace(case, p, _inference)),
    ("requires grad", lambda case, p: _replace(case, p, lambda x: x.requires_grad_(), ("x",))),
    ("a copy", lambda case, p: _replace(case, p, lambda x: x[..., :-1] if x.shape[-1] else x, ("v", "n"))),
    ("shared", _share),
    ("columns of one", _columns),
    ("lengths", _lengths),
    ("something else", _one_thing),
)
HARMLESS = ("requires grad", "columns of one", "inference")
